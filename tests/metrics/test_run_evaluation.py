"""The evaluation of a run: which samples are drawn."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from sadm_fast.config import check_config
from sadm_fast.metrics import run_evaluation
from sadm_fast.metrics.run_evaluation import RunEvaluation
from sadm_fast.metrics.tables import one_line, summary, table


def test_labels_go_round_the_given_classes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = check_config({"name": "tiny", "evaluate": {"samples": 10, "batch": 4}})
    drawn: list[int] = []

    def score(samples: Any) -> dict[str, Any]:
        drawn.extend(torch.cat(list(samples)).tolist())
        return {}

    monkeypatch.setattr(run_evaluation.Evaluator, "build", lambda *_, **__: SimpleNamespace(score=score))
    monkeypatch.setattr(run_evaluation, "generate", lambda config, model, labels, ids, **_: labels)
    source: Any = MagicMock(__len__=lambda _: 1, where="images", fingerprint=lambda: "f")
    evaluation = RunEvaluation(config, source, [], [1, 4, 9], torch.device("cpu"))
    row = evaluation.score(None, step=1, guidance_scale=1.5)  # type: ignore[arg-type]
    assert drawn == [1, 4, 9, 1, 4, 9, 1, 4, 9, 1]
    # The record holds what was drawn with, not the settings of sample.py.
    assert (row["sampling"]["sampler"]["steps"], row["sampling"]["guidance"]["scale"]) == (12, 1.5)
    assert row["sampling"]["labels"] == {"drawn": "in turn", "classes": 3}
    assert row["weights"] == {"ema": config.train.ema.model_dump()}
    assert row["images_per_s"] == 0.0 and "loss_denoise" not in row  # nothing is known of these images' labels
    assert row["reference"] == {"of": "images", "images": 1, "fingerprint": "f"}


ROW: dict[str, Any] = {
    "fid_pixels": 2.5, "fid_inception": 31.25, "sfid_inception": 40.0,
    "floor": {"fid_pixels": 0.5, "fid_inception": None, "sfid_inception": None},
    "samples": 300, "inception_score": 8.5, "inception_score_std": 0.25,
    "kid": {"fid_pixels": 0.01, "fid_inception": 0.02},
    "precision": {"fid_pixels": 0.75, "fid_inception": 0.5}, "recall": {"fid_pixels": 0.25, "fid_inception": 0.125},
}  # fmt: skip


def test_fid_and_sfid_are_shown_with_their_count_the_inception_score_beside_them() -> None:
    lines = [line.split() for line in summary(ROW).splitlines()]
    assert lines[1] == ["fid_pixels", "2.5", "0.5", "0.01", "0.75", "0.25"]
    assert lines[2] == ["FID(300)", "31.25", "0.02", "0.5", "0.125"] and lines[3] == ["sFID(300)", "40"]
    assert lines[4] == ["IS", "8.5"] and lines[5][:2] == ["300", "samples;"]
    assert one_line(ROW) == "fid_pixels 2.5, FID(300) 31.25, sFID(300) 40 of 300 samples"
    rows = [{"guidance": "1", **ROW}, {"guidance": "2", **ROW, "inception_score": 9.0, "fid_inception": 32.0}]
    head, first, second, floor, _ = (line.split() for line in table(rows, ["guidance"]).splitlines())
    assert head[:5] == ["guidance", "fid_pixels", "FID(300)", "sFID(300)", "IS"]
    assert (first[2], second[2]) == ("31.25*", "32") and (first[4], second[4]) == ("8.5", "9*")
    assert (first[1], second[1]) == ("2.5", "2.5"), "nothing is best where all are equal"
    assert floor == ["floor", "0.5"]
    assert "FID-50K" in summary(ROW | {"samples": 50_000})
