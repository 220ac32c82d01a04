"""Pictures and evaluations of a run: classes without images, and scores that cannot be had."""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast import gallery
from sadm_fast.config import Config, check_config
from sadm_fast.console import Console
from sadm_fast.data import open_images
from sadm_fast.data.source import Source
from sadm_fast.errors import UserError
from sadm_fast.gallery import Gallery, RelationView, grid_classes, most_changed, real_grid
from sadm_fast.models import Denoiser
from sadm_fast.run.folder import RunFolder


def shards(path: Path, labels: Sequence[int]) -> Source:
    """8-pixel images whose grey is their label, in one shard."""
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            encoded = io.BytesIO()
            Image.new("L", (8, 8), label).save(encoded, "PNG")
            for end, content in (("png", encoded.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return open_images(path, "webdataset")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "cache"))
    tiny = {
        "name": "tiny",
        "data": {"resolution": 8, "threads": 1},
        "sampling": {"rows": 2, "columns": 3},
    }
    return check_config(tiny)


def test_columns_are_spread_evenly_over_the_classes() -> None:
    assert grid_classes(range(3), 10) == [0, 1, 2]
    assert grid_classes(range(1000), 4) == [0, 250, 500, 750]
    assert grid_classes([2, 30, 31, 40, 90], 2) == [2, 31]


def test_real_images_stand_under_their_own_class(config: Config, tmp_path: Path) -> None:
    source = shards(tmp_path / "one-based.tar", [1, 2, 4, 4, 1, 2, 5])
    assert source.classes == ("0", "1", "2", "3", "4", "5") and source.filled == [1, 2, 4, 5]
    picture = real_grid(config, source, torch.device("cpu"), None)
    cell = (picture.shape[2] - 2) // 3
    middle = slice(2 + cell // 2, None, cell)
    assert picture[0, middle, middle].tolist() == [[1, 2, 4], [1, 2, 4]]
    assert grid_classes(source.filled, 3) == [1, 2, 4]


def test_relations_of_a_subset_of_a_thousand_classes_are_looked_at(config: Config, tmp_path: Path) -> None:
    view = RelationView(config, shards(tmp_path / "subset.tar", [7, 99, 255] * 25), torch.device("cpu"))
    assert np.bincount(view._batch.labels)[[7, 99, 255]].tolist() == [20, 20, 20]


def test_the_pairs_that_change_most_are_named_and_shown(config: Config, tmp_path: Path) -> None:
    source = shards(tmp_path / "greys.tar", [0, 100, 200] * 25)
    view = RelationView(config, source, torch.device("cpu"))

    def psi(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean(dim=(1, 2, 3)), torch.ones(len(x))], dim=1)

    class Grey(Denoiser):
        null_class = 256

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)  # xhat0 is the noised image, scaled down

    view.save(tmp_path / "step-000005.npz", Grey(), psi, lambda samples: samples)
    with np.load(tmp_path / "step-000005.npz") as arrays:
        real, fake, labels, pairs = (arrays[key] for key in ("real", "fake", "labels", "pairs"))
    change = np.abs(fake - real)
    assert pairs.shape == (6, 2) and change[tuple(pairs[0])] == change.max() > 0
    assert [change[i, j] for i, j in pairs] == sorted(np.unique(change), reverse=True)[:6]
    with Image.open(tmp_path / "step-000005.png") as opened:
        picture = np.asarray(opened)
    side = (picture.shape[1] - 2) // 6
    assert picture.shape[0] == 4 * side + 2
    middles = picture[2 + side // 2 :: side, 2 + side // 2 :: side]
    assert np.array_equal(middles[:2], labels[pairs].T), "above, the real ones"


def test_what_is_not_finite_has_not_changed_most() -> None:
    real = np.zeros((4, 4))
    fake = np.array([[9, 1, -3, 0], [1, 9, np.nan, 2], [-3, np.nan, 9, np.inf], [0, 2, np.inf, 9]])
    assert most_changed(real, fake, 3).tolist() == [[0, 2], [1, 3], [0, 1]]
    assert most_changed(real[:2, :2], fake[:2, :2], 3).tolist() == [[0, 1]]


class Evaluation:
    """Stands for a RunEvaluation; every score is NaN, or the scale of the guidance."""

    def __init__(self, *, diverged: bool = False) -> None:
        self.diverged = diverged
        self.scored: list[tuple[object, float]] = []
        self.tf32: list[bool] = []

    def rehearse(self, model: object, scale: float) -> float:
        self.tf32.append(torch.backends.cudnn.allow_tf32)
        if self.diverged:
            raise ValueError("an image is not finite")
        return 2.0

    def rows(
        self, averages: Iterable[tuple[Any, dict[str, Any]]], step: int, guidance: Sequence[float], **_: Any
    ) -> Iterator[dict[str, Any]]:
        for model, weights in averages:
            for scale in guidance:
                if self.diverged:
                    raise ValueError("the moments hold NaN or infinite values")
                self.scored.append((model["taken"], scale))
                self.tf32.append(torch.backends.cudnn.allow_tf32)
                sampling = {"guidance": {"scale": scale}, "sampler": {"steps": 12}}
                floor = {"fid_pixels": 0.5}
                yield {
                    "step": step, "fid_pixels": scale, "floor": floor, "samples": 8, "weights": weights,
                    "sampling": sampling,
                }  # fmt: skip


def looking(config: Config, evaluation: Evaluation, folder: Path) -> Gallery:
    """A gallery on one rank whose viewer is a dictionary that tells which average it took up."""
    found: Any = Gallery.__new__(Gallery)
    found._config, found._folder, found._evaluation = config, RunFolder(folder), evaluation
    found._viewer, found._console, found._rank = {"taken": None}, Console(), 0
    found._take_up_average = lambda label: found._viewer.update(taken=label)
    return cast(Gallery, found)


def test_an_evaluation_that_cannot_be_made_ends_no_training(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    diverged = looking(config, Evaluation(diverged=True), tmp_path)
    diverged.evaluate(7, cast(Any, None))  # writes no line
    assert "step 7: no evaluation (the moments hold NaN or infinite values)" in capfd.readouterr().out
    diverged.rehearse(7)
    assert "samples of step 7 cannot be scored (an image is not finite); training" in capfd.readouterr().out
    with pytest.raises(UserError, match="samples of step 0 cannot be scored"):
        diverged.rehearse(0)


def test_every_average_is_scored_at_every_guidance_scale(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Path] = []
    monkeypatch.setattr(gallery, "write_report", reports.append)
    several = check_config(
        {
            "name": "tiny",
            "train": {"more_ema": [{"profile": "power", "std": 0.05}, {"profile": "constant"}]},
            "evaluate": {"every": 5, "samples": 8, "guidance": [1, 1.5], "ema": [0.05, "constant-0.9999"]},
        }
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default, and that of the training
    evaluation = Evaluation()
    look = looking(several, evaluation, tmp_path)
    assert look.evaluates_after(5) and not look.evaluates_after(0) and not look.evaluates_after(6)
    look.rehearse(0)
    assert "An evaluation every 5 steps: 4 x 8 samples, up to about 8 s" in capfd.readouterr().out
    written: list[tuple[str, int]] = []
    log = SimpleNamespace(write_evaluation=lambda row, name: written.append((name, row["step"])))
    look.evaluate(5, cast(Any, log))
    assert evaluation.scored == [(label, scale) for label in ("power-0.05", "constant-0.9999") for scale in (1.0, 1.5)]
    assert not any(evaluation.tf32) and len(evaluation.tf32) == 5, "evaluate.py scores in fp32"
    assert torch.backends.cudnn.allow_tf32
    names = ["", "/power-0.05-guidance-1.5", "/constant-0.9999-guidance-1", "/constant-0.9999-guidance-1.5"]
    assert written == [(f"evaluation{name}", 5) for name in names] and reports == [tmp_path]
    said = capfd.readouterr().out
    assert "step 5: an evaluation (" in said and "images/s)" in said and said.count("1*") == 2
