"""What run.json says about the data, and what is said when they have changed since."""

import json
from pathlib import Path

import pytest

from sadm_fast.data import open_images
from sadm_fast.data.source import Source
from sadm_fast.run.facts import data_changes
from tests.test_train import write_images


@pytest.fixture
def images(tmp_path: Path) -> Source:
    """Four images of each of three classes."""
    return open_images(write_images(tmp_path / "images", count=4))


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ([4, 5, 4], "1 gone (1 of square), 12 now"),
        ([4, 2, 1], "5 added (2 of square, 3 of triangle), 12 now"),
        ([1, 6, 4], "3 added (3 of circle) and 2 gone (2 of square), 12 now"),
        ([4, 4, 4], "as many samples as before, but others"),
    ],
)
def test_samples_that_were_added_or_are_gone_are_counted(images: Source, tmp_path: Path, before: list[int], said: str):
    facts = tmp_path / "run.json"
    facts.write_text(json.dumps({"classes": images.classes, "images": sum(before), "images_of_class": before}))
    assert data_changes(facts, images) == said


def test_a_class_that_is_new_or_gone_is_counted(images: Source, tmp_path: Path):
    facts = tmp_path / "run.json"
    facts.write_text(json.dumps({"classes": ["circle", "line", "square"], "images": 10, "images_of_class": [4, 2, 4]}))
    assert data_changes(facts, images) == "4 added (4 of triangle) and 2 gone (2 of line), 12 now"


def test_the_first_versions_counted_all_classes_together(images: Source, tmp_path: Path):
    facts = tmp_path / "run.json"
    facts.write_text(json.dumps({"classes": images.classes, "images": 13}))
    assert data_changes(facts, images) == "1 gone (1 of all classes), 12 now"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"classes": 3, "images_of_class": 4}', '{"images": null}'])
def test_without_a_readable_run_json_nothing_is_counted(images: Source, tmp_path: Path, text: str):
    facts = tmp_path / "run.json"
    facts.write_text(text)
    assert data_changes(facts, images) == "other samples than this run began with"
