"""Drawing many samples: on several ranks, going on after a kill, with a record of how they were drawn beside them."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sadm_fast.config_tree import flatten
from sadm_fast.console import Console
from sadm_fast.counters import Purpose, uniform
from sadm_fast.errors import UserError
from sadm_fast.files import locked, parse_json, write_json
from sadm_fast.generation import Trained, generate, sampling_facts, to_images
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.pictures import Output, beside
from sadm_fast.ranks.collectives import barrier, broadcast_json, only_on_rank_zero
from sadm_fast.ranks.launch import Place
from sadm_fast.ranks.stopping import Stopped
from sadm_fast.run.facts import program

# What may differ when a drawing goes on: the same weights may lie elsewhere, and the ending is not known before it.
_FREE = ("weights.file", "guide.file", "complete")


class Labels(NamedTuple):
    """The labels of samples as a function of their numbers."""

    of: Callable[[Tensor], Tensor]  # int64 [B] -> int64 [B], on the CPU
    facts: dict[str, Any]


def labels_in_turn(trained: Trained, names: Sequence[str] | None) -> Labels:
    """Sample n is of class n modulo their number.

    names: of the classes; None: all that the run was trained on. UserError for one that it was not.
    """
    chosen = _chosen(trained, names)
    return Labels(lambda ids: chosen[ids % len(chosen)], {"drawn": "in turn", "classes": names or f"all {len(chosen)}"})


def labels_at_random(trained: Trained, names: Sequence[str] | None) -> Labels:
    """Each sample's class is uniform, a function of (seed, n). names: as `labels_in_turn`."""
    chosen, seed = _chosen(trained, names), trained.config.seed

    def of(ids: Tensor) -> Tensor:
        return chosen[(uniform(seed, Purpose.SAMPLE_LABEL, ids)[:, 0] * len(chosen)).long()]

    return Labels(of, {"drawn": "at random", "classes": names or f"all {len(chosen)}"})


def _chosen(trained: Trained, names: Sequence[str] | None) -> Tensor:
    return torch.tensor(trained.filled if names is None else _labels_of(trained, names, "--classes"))


def labels_in_file(trained: Trained, path: Path) -> tuple[Labels, int]:
    """Line n of a text file names the class of sample n; also returns how many there are.

    Raises:
        UserError: it cannot be read, is empty, or names a class that the run was not trained on.
    """
    try:
        content = path.read_bytes()
        names = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--labels {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not names:
        raise UserError(f"--labels {path}: is empty; each line names the class of a sample")
    labels = torch.tensor(_labels_of(trained, names, f"--labels {path}, class"))
    facts = {"drawn": "in a file", "sha256": sha256(content).hexdigest()}
    return Labels(lambda ids: labels[ids], facts), len(names)


def _labels_of(trained: Trained, names: Sequence[str], what: str) -> list[int]:
    known = {trained.classes[label]: label for label in trained.filled}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{what} {unknown[0]}: the run was trained on images of {', '.join(list(known)[:20])}")
    return [known[name] for name in names]


def provenance(
    trained: Trained, labels: Labels, count: int, guide: Trained | None, autoencoder: Autoencoder | None
) -> dict[str, Any]:
    """The record of how samples are drawn: all that has a say in their pixels, and the program that draws them."""
    return {
        "images": count,
        "labels": labels.facts,
        "weights": trained.facts(),
        "guide": None if guide is None else guide.facts(),
        "autoencoder": None if autoencoder is None else autoencoder.identity,
        **sampling_facts(trained.config),
        **program(),
    }


def draw(
    trained: Trained,
    labels: Labels,
    count: int,
    output: Output,
    *,
    batch: int,
    guide: Trained | None,
    autoencoder: Autoencoder | None,
    place: Place,
    console: Console,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Draw the samples that `output` does not have yet, `batch` at a time on each rank. Collective.

    Raises:
        Stopped: asked to, between two batches.
        UserError: the output holds something else, or samples drawn otherwise; it cannot be written; a sample is not
            finite.
    """
    missing: list[list[int]] | None = None
    with ExitStack() as held:

        def begin() -> None:
            nonlocal missing
            record = provenance(trained, labels, count, guide, autoencoder)
            missing = None if _is_complete(output, record) else _begin(output, record, count, held)

        only_on_rank_zero(begin)
        missing = broadcast_json(missing)
        if missing is None:
            console.say(f"{output.path}: complete already")
            return
        gaps = [range(first, end) for first, end in missing]
        left = sum(len(gap) for gap in gaps)
        if left < count:
            console.say(f"{output.path}: {count - left} of {count} samples are there already")
        with console.bar("sampling", count, count - left) as bar:
            mine = 0
            for ids in islice(_batches(gaps, batch), place.rank, None, place.world_size):
                if asked_to_stop():
                    raise Stopped
                of_batch = labels.of(torch.tensor(ids))
                output.add(ids[0], _images(trained, of_batch, ids, guide, autoencoder, place), of_batch.tolist())
                mine += len(ids)
                bar.at(count - left + min(left, mine * place.world_size))
        barrier()
        only_on_rank_zero(lambda: _end(output))
    console.say(str(output.path))


def _images(
    trained: Trained, labels: Tensor, ids: range, guide: Trained | None, autoencoder: Autoencoder | None, place: Place
) -> Tensor:
    """Draw a batch: images [B, C, H, W] in about [-1, 1]; UserError if one is not finite."""
    sampling = trained.config.sampling
    samples = generate(
        trained.config,
        trained.model,
        labels.to(place.device),
        torch.tensor(ids, device=place.device),
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        guide=None if guide is None else guide.model,
    )
    images = to_images(samples, autoencoder)
    if not bool(torch.isfinite(images).all()):
        raise UserError(
            f"{trained.checkpoint}: draws samples that are not finite at --guidance-scale {sampling.guidance_scale:g},"
            f" --steps {sampling.steps}; try others, or an earlier checkpoint"
        )
    return images


def _is_complete(output: Output, wanted: dict[str, Any]) -> bool:
    """Whether a file of these very samples is there; not where the code has changes that its commit does not name."""
    if not output.path.is_file() or str(wanted["commit"]).endswith("+changes"):
        return False
    there = _read(beside(output.path))
    return there is not None and there.get("complete") is True and _difference(there, wanted) is None


def _begin(output: Output, wanted: dict[str, Any], count: int, held: ExitStack) -> list[list[int]]:
    """Keep other processes out, begin or go on, and return [first, end] of each gap in the samples that are there."""
    where = f"{output.option} {output.path}"
    held.enter_context(locked(output.prepare(), where, "is drawing into it; wait for its end, or stop it"))
    if output.in_use():
        there = _read(output.begun)
        if there is None:
            raise UserError(f"{where}: is not empty; choose another, or remove what is in it")
        if difference := _difference(there, wanted):
            raise UserError(f"{where}: holds samples drawn otherwise ({difference}); choose another, or remove it")
    write_json(output.begun, wanted | {"complete": False})
    found = output.found()
    edges = zip([-1, *found], [*found, count], strict=True)
    return [[before + 1, after] for before, after in edges if before + 1 < after]


def _end(output: Output) -> None:
    record = _read(output.begun)
    output.finish()
    write_json(beside(output.path), (record or {}) | {"complete": True})


def _batches(gaps: Sequence[range], size: int) -> Iterator[range]:
    """Cut the gaps into runs of at most `size` numbers."""
    for gap in gaps:
        for first in range(gap.start, gap.stop, size):
            yield range(first, min(first + size, gap.stop))


def _read(record: Path) -> dict[str, Any] | None:
    try:
        value = parse_json(record.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Name the first value in which two records differ; None if there is none."""
    one, other = flatten(there), flatten(parse_json(json.dumps(wanted)))
    for key in sorted(one.keys() | other.keys()):
        if key not in _FREE and one.get(key) != other.get(key):
            return f"{key} {one.get(key)}, now {other.get(key)}"
    return None
