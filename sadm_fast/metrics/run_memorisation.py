"""What evaluate.py --memorisation tells of a run: copies among its samples, and what held-out batches say."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadm_fast.config import Config
from sadm_fast.console import Bar, Console
from sadm_fast.data.source import Source
from sadm_fast.files import write_json
from sadm_fast.generation import Trained, to_images
from sadm_fast.metrics.held_out import gaps
from sadm_fast.metrics.judges import Judge
from sadm_fast.metrics.memorisation import LEVEL, look_for_copies
from sadm_fast.metrics.pretrained import PretrainedJudge
from sadm_fast.metrics.tables import aligned
from sadm_fast.models import StructureEncoder
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pictures import picture_grid, save_picture
from sadm_fast.run.folder import RunFolder


class Found(NamedTuple):
    """The content of memorisation.json, and by metric the pictures of `look_for_copies`."""

    facts: dict[str, Any]
    pictures: dict[str, Tensor]


def look_at_run(
    trained: Trained,
    judges: Sequence[Judge],
    training: Source,
    held_out: Source | None,
    psi: StructureEncoder | None,
    device: torch.device,
    console: Console,
    *,
    autoencoder: Autoencoder | None = None,
) -> Found:
    """Look for copies among the samples of a run, and with `held_out` compare batches of it with training. Collective.

    psi: the encoder of S in eval mode, as the training leaves it; None: S is not told.

    Raises:
        ValueError: a feature is not finite, or there are too few held-out images for two batches.
    """
    config = trained.config
    with ExitStack() as stack:
        bars: dict[str, Bar] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(console.bar(what, total))
            bars[what].at(done)

        copies = look_for_copies(
            config, trained.model, judges, training, held_out, trained.filled, device,
            autoencoder=autoencoder, progress=progress,
        )  # fmt: skip
    differences: dict[str, Any] = {}
    if held_out is not None:
        see = None if psi is None else _on_samples(config, psi, autoencoder)
        with console.progress("training and held-out batches") as report:
            of = gaps(config, trained.model, see, training, held_out, device, report)
        differences = {name: gap._asdict() for name, gap in of.items()}
    facts = {
        "step": trained.step,
        "samples": config.evaluate.samples,
        "training_images": len(training),
        "held_out": None if held_out is None else {"of": held_out.where, "images": len(held_out)},
        "level": LEVEL,
        "spaces": copies.scores,
        "held_out_batches": differences,
        "weights": trained.facts(),
        "judges": {judge.metric: judge.weights for judge in judges if isinstance(judge, PretrainedJudge)},
    }
    return Found(facts, copies.pictures)


def _on_samples(config: Config, psi: StructureEncoder, autoencoder: Autoencoder | None) -> Callable[[Tensor], Tensor]:
    """Psi as a function of what the denoiser sees."""
    if config.structure_encoder.input == "samples":
        return psi
    return lambda samples: psi(to_images(samples, autoencoder))


def save(found: Found, folder: RunFolder) -> None:
    """Write memorisation.json and a picture for each metric into the run's folder, where the report finds them."""
    folder.memorisation.mkdir(exist_ok=True)
    for name, images in found.pictures.items():
        save_picture(picture_grid(images, len(images) // 2), folder.memorisation / f"{name}.png")
    write_json(folder.memorisation / "memorisation.json", found.facts)


def summary(facts: dict[str, Any]) -> str:
    """The content of memorisation.json as a table for the terminal."""
    held_out = facts["held_out"]
    who = "held-out images" if held_out else "training images among each other"
    rows = [["", "copies", "nearer", "z"]]
    for name, of in facts["spaces"].items():
        rows.append([name, f"{of['copies']:.1%}", f"{of['nearer']:.3f}", f"{of['deviations']:+.1f}"])
    rows.append([f"as {who}", f"{facts['level']:.1%}", "0.500", "0"])
    lines = [aligned(rows)]
    for name, gap in facts["held_out_batches"].items():
        lines.append(
            f"{name}: {gap['training']:.4g} on training batches, {gap['held_out']:.4g} on held-out ones, difference"
            f" {gap['difference']:+.2g} with a standard error of {gap['error']:.2g}"
        )
    return "\n".join([*lines, f"{facts['samples']} samples, {facts['training_images']} training images"])
