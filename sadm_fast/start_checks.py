"""What a run needs, opened before anything is trained: weights, data, disk, memory. train.py --dry-run does the same.

Each check raises a UserError that names the field or folder and says what to do.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sadm_fast.build import NONE, Own
from sadm_fast.config import Config
from sadm_fast.data.source import Source
from sadm_fast.engine.compilation import check_compilation
from sadm_fast.engine.feature_queue import check_queue
from sadm_fast.engine.optimizers import check_optimizers
from sadm_fast.errors import UserError
from sadm_fast.exchange.starting import check_denoiser_weights, check_psi_weights
from sadm_fast.metrics.run_evaluation import chosen_judges, judging, require_enough
from sadm_fast.planning.cost import activations, meta_models
from sadm_fast.planning.drawing import drawing
from sadm_fast.planning.memory import Activations, rank_memory
from sadm_fast.planning.players import players
from sadm_fast.planning.storage import checkpoint_bytes, checkpoints_at_once, snapshot_bytes
from sadm_fast.pretrain import JUDGE_FILE, PSI_FILE, why_no_classifier
from sadm_fast.run.folder import RunFolder
from sadm_fast.run.loggers import check_loggers
from sadm_fast.run.manifest import completed
from sadm_fast.run.snapshots import snapshots_in
from sadm_fast.train_once import require_own

_LEFT_FREE = 1 << 20  # bytes of disk for logs and pictures


def check_start(
    config: Config, source: Source, num_classes: int, folder: RunFolder, world_size: int, own: Own = NONE
) -> None:
    """Check everything that does not depend on the device; the run's folder itself has been checked before."""
    check_own(config, num_classes, own)
    check_weights(config, num_classes, own, source.classes)
    check_optimizers(config)
    check_compilation(config)
    check_loggers(config.logging)
    check_queue(config, world_size)
    if config.game.mode != "plain" and config.structure_encoder.weights is None:
        if config.structure_encoder.pretrain.steps:
            _require_classes(
                config, source, "structure_encoder.weights=null: Psi",
                "give the weights of an encoder trained elsewhere (docs/data.md), leave Psi untrained"
                " (structure_encoder.pretrain.steps=0), or use game.mode=plain",
            )  # fmt: skip
        require_own(folder.pretrained / PSI_FILE)
    if config.evaluate.every is not None:
        if "classifier" in config.judges:
            _require_classes(
                config, source, f"evaluate.every={config.evaluate.every}: its judge",
                'use evaluate.judges=["random", "pixels"], or evaluate.every=null',
            )  # fmt: skip
            require_own(folder.pretrained / JUDGE_FILE)
        require_enough(chosen_judges(config, None), config.evaluate.samples)
    check_disk(config, num_classes, folder, own)


def check_own(config: Config, num_classes: int, own: Own) -> None:
    """UserError unless networks of the caller's run on tensors without values, and give what the game needs."""
    denoiser, psi = meta_models(config, num_classes, own)
    dtype, shape = next(denoiser.parameters()).dtype, config.sample_shape
    with torch.device("meta"), torch.no_grad():
        x, time, labels = torch.empty(2, *shape, dtype=dtype), torch.empty(2), torch.zeros(2, dtype=torch.long)
        calls: list[tuple[nn.Module, tuple[Tensor, ...], tuple[int, ...]]] = []
        if own.denoiser is not None:
            output = (2, config.process.output_channels(shape[0]), *shape[1:])
            calls.append((denoiser, (x, time, labels), output))
        if own.psi is not None and psi is not None:
            calls.append((psi, (torch.empty(2, *config.psi_shape, dtype=dtype),), (2, psi.feature_dim)))
        for network, inputs, wanted in calls:
            name, asked = type(network).__name__, ", ".join(str(list(value.shape)) for value in inputs)
            try:
                found = tuple(network(*inputs).shape)
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{name}.forward: fails on tensors {asked} on the meta device ({reason})") from error
            if found != wanted:
                raise UserError(f"{name}.forward: makes {list(found)} of {asked}; must be {list(wanted)}")


def check_weights(config: Config, num_classes: int, own: Own = NONE, classes: Sequence[str] | None = None) -> None:
    """Check names and shapes in every file of weights that the run starts from, by the files' headers.

    classes: names of the data's classes; None: not known yet.
    """
    denoiser, psi = meta_models(config, num_classes, own)
    check_denoiser_weights(config, denoiser, classes)
    if psi is not None:
        check_psi_weights(config, psi)


def _require_classes(config: Config, source: Source, who: str, remedy: str) -> None:
    """UserError if the source cannot train and test a classifier: `who` needs it, `remedy` says what else helps."""
    if reason := why_no_classifier(config, source):
        raise UserError(f"{who} is trained to tell classes apart, and {reason}; {remedy}")


def check_disk(config: Config, num_classes: int, folder: RunFolder, own: Own = NONE) -> None:
    """UserError if what is still to be written, checkpoints and snapshots, does not fit on the run folder's disk."""
    denoiser, psi = meta_models(config, num_classes, own)
    both, train = players(config, denoiser, psi), config.train
    one = checkpoint_bytes(config, both, 0 if psi is None else psi.feature_dim)
    missing = max(1, checkpoints_at_once(config) - len(completed(folder.checkpoints)))
    there = folder.path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    needed, what = missing * one, f"{missing} checkpoints (train.keep_last, train.keep_every)"
    if train.ema_snapshot_every is not None:
        there_already = len({snapshot.step for snapshot in snapshots_in(folder.snapshots, train.steps)})
        more = train.steps // train.ema_snapshot_every - there_already
        needed += more * snapshot_bytes(config, both)
        what += f" and the averages of {more} steps (train.ema_snapshot_every)"
    if needed + _LEFT_FREE > free:
        raise UserError(
            f"run folder {folder.path}: needs {needed / 1e9:.3g} GB for {what}, {free / 1e9:.3g} GB are free; free"
            " some, or choose another with --run-dir"
        )


def check_memory(
    config: Config, num_classes: int, world_size: int, device: torch.device, ranks_here: int, own: Own = NONE
) -> None:
    """UserError if what the planner counts for one rank is more than there is: a start would end in a traceback.

    ranks_here: ranks that share this machine's memory.
    """
    denoiser, psi = meta_models(config, num_classes, own)
    # Compiled passes keep less than the planner counts.
    kept = Activations(0, 0, 0, 0) if config.train.compile != "off" else activations(config, denoiser, psi)
    memory = rank_memory(
        config,
        players(config, denoiser, psi),
        kept,
        world_size,
        feature_dim=0 if psi is None else psi.feature_dim,
        drawing=drawing(config, num_classes, denoiser, judging(config)),
    )
    host = ranks_here * sum(memory.host.values())
    if device.type == "cuda":
        _require(memory.peak, torch.cuda.get_device_properties(device).total_memory, f"{device}", config)
    else:
        host += ranks_here * memory.peak
    _require(host, _installed(), "this machine", config)


def _require(needed: int, there: int, where: str, config: Config) -> None:
    if needed > there:
        raise UserError(
            f"train.micro_batch={config.train.micro_batch}: the run needs {needed / 2**30:,.1f} GiB, and {where} has"
            f" {there / 2**30:,.1f} GiB; --dry-run lists what takes them. Smaller micro-batches, smaller networks, a"
            " higher deepspeed.zero_optimization.stage on more ranks, or train.activation_checkpointing=true need less"
        )


def _installed() -> int:
    """Bytes of memory and swap of this machine."""
    sizes: Mapping[str, int] = {"MemTotal": 0, "SwapTotal": 0}
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        sizes = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].rstrip(":") in sizes}
    except (OSError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return sum(sizes.values())
