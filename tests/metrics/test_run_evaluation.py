"""The evaluation of a run: which samples are drawn."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sadm_fast.config import check_config
from sadm_fast.metrics import run_evaluation
from sadm_fast.metrics.run_evaluation import RunEvaluation


def test_labels_go_round_the_given_classes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = check_config({"name": "tiny", "evaluate": {"samples": 10, "batch": 4}})
    drawn: list[int] = []

    def score(samples: Any) -> dict[str, Any]:
        drawn.extend(torch.cat(list(samples)).tolist())
        return {}

    monkeypatch.setattr(run_evaluation.Evaluator, "build", lambda *_, **__: SimpleNamespace(score=score))
    monkeypatch.setattr(run_evaluation, "generate", lambda config, model, labels, ids, **_: labels)
    source: Any = range(1)
    evaluation = RunEvaluation(config, source, None, [1, 4, 9], torch.device("cpu"))
    evaluation.score(None, step=1)  # type: ignore[arg-type]
    assert drawn == [1, 4, 9, 1, 4, 9, 1, 4, 9, 1]
