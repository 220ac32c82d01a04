"""The section about copies of training images."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sadm_fast.report.memorisation import memorisation
from sadm_fast.report.reading import read_run

FACTS: dict[str, Any] = {
    "step": 2000,
    "samples": 1000,
    "training_images": 4500,
    "held_out": {"of": "demo", "images": 500},
    "spaces": {
        "fid_<b>": {
            "copies": 0.123, "nearer": 0.625, "deviations": 4.5, "threshold": 2.0,
            "nearest": [{"distance": 1.0}, {"distance": 3.0}],
        }
    },
    "held_out_batches": {"loss": {"training": 0.25, "held_out": 0.375, "difference": 0.125, "error": 0.01}},
}  # fmt: skip


def section(folder: Path, facts: Any) -> str:
    (folder / "memorisation").mkdir()
    (folder / "memorisation/memorisation.json").write_text(json.dumps(facts))
    Image.new("L", (40, 40), 128).save(folder / "memorisation/fid_<b>.png")
    return memorisation(read_run(folder))


def test_shares_gaps_and_neighbours_are_shown(tmp_path: Path) -> None:
    html = section(tmp_path, FACTS)
    for words in (
        "12.3%",
        ">0.625</data> (",
        ">4.5</data>)",
        ">0.375</data>",
        ">0.125</data>",
        "image/png",
        ">0.5</data>",
        ">1.5</data>",
    ):
        assert words in html, words
    assert (
        "held-out images, which nothing was trained on" in html and "<b>fid_&lt;b&gt;" in html and "fid_<b>" not in html
    )


def test_without_held_out_images_the_page_says_what_stands_in_for_them(tmp_path: Path) -> None:
    html = section(tmp_path, FACTS | {"held_out": None, "held_out_batches": {}})
    assert "each compared with the others" in html and "Denoising loss" not in html


@pytest.mark.parametrize("facts", [[], {"spaces": 5, "held_out": None}, {"spaces": {"a": 1}, "held_out": None}, {}])
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, facts: Any) -> None:
    assert "memorisation.json is there but cannot be read." in section(tmp_path, facts)


def test_a_run_that_was_not_looked_at_says_how_to(tmp_path: Path) -> None:
    assert f"evaluate.py {tmp_path} --memorisation" in memorisation(read_run(tmp_path))
