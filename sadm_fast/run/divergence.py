"""Where a run goes on after its losses have become NaN: the last checkpoint that a finite step followed."""

from pathlib import Path

from sadm_fast.run.checkpoint import folder_of, set_aside
from sadm_fast.run.manifest import completed, step_of


def way_on(checkpoints: Path, finite_step: int, resumed_step: int, *, tidy: bool) -> str:
    """Say what to do after too many skipped steps in a row.

    Checkpoints of `finite_step` and later hold weights that no finite step has followed. Where this process has saved
    them they are set aside, so that the same command finds the one before.

    Args:
        finite_step: the last step that was taken, or `resumed_step` if none was.
        resumed_step: of the checkpoint this process went on from, or 0.
        tidy: whether to set aside; on one rank.
    """
    folders = completed(checkpoints)
    good = [folder for folder in folders if (step_of(folder) or 0) < finite_step]
    lower = "lower the learning rate (--set denoiser_optimizer.lr=..., or discriminator_optimizer.lr)"
    if finite_step == resumed_step > 0:  # the checkpoint may be good, and the data or this machine bad: it stays
        instead = f"to go on from {good[-1]}" if good else "to start anew"
        return f"none after {folder_of(checkpoints, resumed_step)} was finite: move it away {instead}, and {lower}"
    if tidy:
        for folder in folders[len(good) :]:
            set_aside(folder)
    if not good:
        return f"no checkpoint was followed by a finite step: {lower}, and start again"
    return (
        f"the last checkpoint that a finite step followed is {good[-1]}: {lower}, and the same command goes on from it"
    )
