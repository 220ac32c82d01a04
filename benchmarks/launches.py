"""How many operations does an iteration launch beside the networks? Counted on the CPU: every machine counts the same.

    python benchmarks/launches.py [--modes plain sadm --stages 0 1 2 --out runs/launches]

DiT of depth 28 and ResNet-18 as Psi, small but with all their tensors, eager, through DeepSpeed on one rank. One
iteration is what the trainer does with a micro-batch: draw, both players' turns, the average, and settling the one
before. `beyond` leaves out the forward and backward of the networks alone; views launch nothing and are not
counted; a call of our C++ library counts as one, as the Triton kernel in its place would. `syncs` are operations whose
value the host waits for. Launch times are not measured here: a GPU's CPU takes some 5 microseconds for each.
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.latent_game import game_config, made_up, made_up_players, steady_iteration  # noqa: E402
from benchmarks.report import Row, aligned  # noqa: E402
from sadm_fast.config import Config  # noqa: E402
from sadm_fast.game import frozen  # noqa: E402
from sadm_fast.ranks.launch import distributed  # noqa: E402
from sadm_kernels import native  # noqa: E402
from sadm_kernels.adamw import bytes_per_element  # noqa: E402

VIEWS = frozenset(
    f"aten.{name}"
    for name in [
        "view",
        "detach",
        "t",
        "slice",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "as_strided",
        "alias",
        "select",
        "_unsafe_view",
        "_reshape_alias",
        "reshape",
        "unbind",
        "narrow",
        "chunk",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "lift_fresh",
    ]
)
SYNCS = frozenset(
    f"aten.{name}" for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")
)
DENOISER = {"hidden_size": 64, "depth": 28, "num_heads": 4, "patch_size": 4, "num_classes": 1000}
WARMUP = 2


class Count(TorchDispatchMode):
    """Operations by name, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        if name not in VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _Library:
    """The C++ library, whose calls are counted."""

    def __init__(self, library: Any, count: Count) -> None:
        self._library, self._count = library, count

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            self._count.found[f"C++ {name}"] += 1
            return function(*arguments)

        return call


@contextmanager
def counted() -> Iterator[Count]:
    """Count what is launched inside."""
    with Count() as count, mock.patch.object(native, "_library", native._library and _Library(native._library, count)):
        yield count


def configuration(mode: str, stage: int, precision: str = "bf16") -> Config:
    return game_config(
        mode,
        micro_batch=4,
        data={"resolution": 64},
        denoiser=DENOISER,
        structure_encoder={"stem": "small"},
        train={"precision": precision},
        zero_optimization={"stage": stage},
    )


def of_the_networks(config: Config, players: Any) -> Count:
    """Forward and backward of the networks as an iteration needs them, and nothing else."""
    batch, process, psi = made_up(config, 0), config.process, players.psi
    x_t = process.add_noise(batch.x0, batch.noise, batch.t)
    inputs = process.model_input(x_t, batch.t)
    both = torch.cat([batch.x0, batch.x0])
    xhat0 = batch.x0.clone().requires_grad_(True)
    with Count() as count:
        players.denoiser.module(*inputs, batch.condition).sum().backward()
        if config.game.mode == "sadm":
            psi(both).sum().backward()
        if config.game.mode != "plain":
            with torch.no_grad():
                psi(batch.x0)
            with frozen(psi):
                psi(xhat0).sum().backward()
    return count


def measured(mode: str, stage: int, device: torch.device) -> Row:
    """Count one setup."""
    config = configuration(mode, stage)
    players = made_up_players(config, device)
    iteration = steady_iteration(config, players)
    for _ in range(WARMUP):
        iteration()
    with counted() as all_of_it:
        iteration()
    networks = of_the_networks(config, players)
    return {
        "mode": mode,
        "zero_stage": stage,
        "beyond": all_of_it.found.total() - networks.found.total(),
        "networks": networks.found.total(),
        "syncs": sum(all_of_it.found[name] for name in SYNCS),
        "optimizer_bytes": bytes_per_element(torch.bfloat16, torch.bfloat16, len(config.train.profiles)),
        "most": dict((all_of_it.found - networks.found).most_common(12)),
    }


def table(rows: list[Row], markdown: bool) -> str:
    head = ["mode", "ZeRO", "beyond the networks", "networks", "syncs", "optimizer, bytes an element"]
    keys = ("mode", "zero_stage", "beyond", "networks", "syncs", "optimizer_bytes")
    return aligned([head, *([str(row[key]) for key in keys] for row in rows)], markdown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modes", nargs="+", choices=("plain", "structure", "sadm"), default=["plain", "structure", "sadm"])
    add("--stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[0, 1, 2], metavar="N", help="of ZeRO")
    add("--out", type=Path, metavar="FILE", help="also write the rows as JSON, with the most frequent operations")
    add("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args(argv)
    with distributed() as place:
        rows = [measured(mode, stage, place.device) for stage in arguments.stages for mode in arguments.modes]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
