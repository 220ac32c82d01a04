"""What is said, and set aside, where a training has diverged."""

from pathlib import Path

import pytest

from sadm_fast.run.divergence import way_on


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Those of steps 4, 6 and 8."""
    for step in (4, 6, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
        (tmp_path / f"step-{step:06d}" / "COMPLETE").write_text("{}")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_checkpoint_that_a_finite_step_followed_is_named_and_later_ones_set_aside(checkpoints: Path):
    (checkpoints / "diverged-step-000008").mkdir()  # of an earlier try
    said = way_on(checkpoints, finite_step=8, resumed_step=0, tidy=True)
    assert f"followed is {checkpoints / 'step-000006'}: lower the learning rate" in said
    assert names(checkpoints) == ["diverged-step-000008", "step-000004", "step-000006"]
    assert (checkpoints / "diverged-step-000008" / "COMPLETE").exists()
    assert way_on(checkpoints, finite_step=8, resumed_step=0, tidy=False) == said  # another rank, a moment later


def test_without_such_a_checkpoint_the_run_starts_again(checkpoints: Path):
    said = way_on(checkpoints, finite_step=3, resumed_step=0, tidy=True)
    assert said.startswith("no checkpoint was followed by a finite step") and said.endswith("start again")
    assert all(name.startswith("diverged-") for name in names(checkpoints))


def test_the_checkpoint_that_a_run_went_on_from_stays(checkpoints: Path):
    """It is not known to be bad: the data or the machine may be."""
    said = way_on(checkpoints, finite_step=8, resumed_step=8, tidy=True)
    assert f"none after {checkpoints / 'step-000008'} was finite" in said
    assert f"move it away to go on from {checkpoints / 'step-000006'}" in said
    assert len(names(checkpoints)) == 3
