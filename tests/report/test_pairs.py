"""The pairs whose relation the denoiser changes most, on the page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.report.pairs import changed_most
from sadm_fast.report.reading import Run, read_run

STEP = "relations/step-000250"


def run_with_pairs(folder: Path) -> Run:
    (folder / "relations").mkdir()
    (folder / "run.json").write_text('{"classes": ["a <b>", "c"]}')
    real, fake = np.zeros((3, 3)), np.zeros((3, 3))
    real[0, 2], fake[0, 2], fake[1, 2] = 0.25, 1.5, 0.75
    pairs = np.array([[0, 2], [1, 2]])
    np.savez(folder / f"{STEP}.npz", real=real, fake=fake, labels=[0, 0, 1], log_snr=np.zeros(3), pairs=pairs)
    Image.new("L", (40, 80), 128).save(folder / f"{STEP}.png")
    return read_run(folder)


def test_a_pair_has_its_classes_its_relations_and_its_pictures(tmp_path: Path) -> None:
    html = changed_most(run_with_pairs(tmp_path), 250)
    for words in ("a &lt;b&gt;, c<br>", ">0.25</data> →", ">1.5</data>", ">0.75</data>", "--count: 2", "image/png"):
        assert words in html
    assert html.index("1.5") < html.index("0.75")


@pytest.mark.parametrize("damage", ["no picture", "no pairs", "beyond the matrix", "cut"])
def test_a_run_without_them_has_no_such_figure(tmp_path: Path, damage: str) -> None:
    run = run_with_pairs(tmp_path)
    path = tmp_path / f"{STEP}.npz"
    arrays: dict[str, Any] = dict(np.load(path))
    if damage == "no picture":
        path.with_suffix(".png").unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        del arrays["pairs"]
        if damage == "beyond the matrix":
            arrays["pairs"] = np.array([[0, 9]])
        np.savez(path, **arrays)
    assert changed_most(run, 250) == ""
