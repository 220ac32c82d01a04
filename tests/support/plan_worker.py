"""One rank of test_plan_counts.py: plays each case, and counts what it holds and what it sends."""

import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from sadm_fast.build import build_denoiser, build_psi
from sadm_fast.ema import EMA
from sadm_fast.engine.masters import local_masters
from sadm_fast.engine.players import Players
from sadm_fast.game import Batch, draw
from sadm_fast.ranks.launch import Place, distributed
from sadm_kernels import collectives
from tests.support.plan_cases import CASES, CLASSES, ITERATIONS, QUICK, PlanCase

_OPERATIONS = {
    "allreduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


_GLOO_THREADS = 2  # of a process group


class Collectives(TorchDispatchMode):
    """Counts payloads of torch.distributed underneath whoever calls it: the larger of input and output."""

    def __init__(self, optimizers: list[Any]) -> None:
        super().__init__()
        self.payload: dict[str, int] = {}
        self.largest_buckets = 0
        self._optimizers = optimizers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not func.__name__.startswith("barrier"):  # look() has some
            name = func.__name__.partition(".")[0]
            size = max(sum(t.nbytes for t in _tensors(a)) for a in args[:2])
            operation = _OPERATIONS.get(name, name)
            self.payload[operation] = self.payload.get(operation, 0) + size
            self.largest_buckets = max(self.largest_buckets, sum(map(_buckets, self._optimizers)))
        own = getattr(collectives, func.__name__.partition(".")[0], None) if func.namespace == "sadm_kernels" else None
        if isinstance(own, CustomOpDef):  # an operator hides what it calls: run its body here
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _buckets(optimizer: Any) -> int:
    """Bytes of DeepSpeed's buffers in which gradients wait for their reduction."""
    found = getattr(optimizer, "ipg_buckets", {})
    return sum(tensor.nbytes for bucket in found.values() for tensor in _tensors(bucket.buffer))


def alive() -> dict[int, int]:
    """Bytes of every storage that some tensor of this process holds, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _storages(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(players: Players, emas: list[EMA]) -> dict[str, int]:
    """Bytes by purpose, as far as the engines say which tensor is which."""
    found = {"EMA": _storages(fragment.value for ema in emas for fragment in ema.average)}
    for name, engine in players.engines.items():
        player = "denoiser" if name == "denoiser" else "Psi"
        parameters = list(engine.module.parameters())
        shares = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # stage 3
        found[f"{player} weights"] = _storages([p.data for p in parameters if p.numel()] + shares)
        optimizer = engine.optimizer
        state = getattr(optimizer, "optimizer", optimizer).state
        found[f"{player} AdamW moments"] = _storages(
            value for of_one in state.values() for key, value in of_one.items() if key in ("exp_avg", "exp_avg_sq")
        )
        masters = _storages(fragment.value for fragment in local_masters(engine))
        shared = any(m.value.data_ptr() == p.data_ptr() for m in local_masters(engine) for p in parameters)
        found[f"{player} fp32 masters"] = 0 if shared else masters
    return found


def micro_batch(case: PlanCase, index: int, place: Place) -> Batch:
    config = case.config
    size = config.train.micro_batch
    ids = torch.arange(size) + size * (index * place.world_size + place.rank)
    x0 = torch.randn(size, *config.sample_shape, generator=torch.Generator().manual_seed(index)).clamp(-1, 1)
    return draw(config.process, x0, ids % 2, ids, seed=0, null_class=CLASSES, label_dropout=0.1)


def played(case: PlanCase, place: Place) -> dict[str, Any]:
    """Play a few iterations of a case; what it held, and what the last one sent."""
    config = case.config
    gc.unfreeze()
    before = alive()
    gc.freeze()  # what is here before the case need not be searched again: it is most of what there is
    denoiser = build_denoiser(config, CLASSES)
    with torch.no_grad():  # a DiT as built is 0, with no gradient below its last layer
        for parameter in denoiser.parameters():
            parameter.add_(0.05)
    players = Players(config, denoiser, None if config.game.mode == "plain" else build_psi(config), place.device)
    emas = [EMA(lambda: list(local_masters(players.denoiser)), profile) for profile in config.train.profiles]
    found: dict[str, Any] = {}
    step = players.denoiser.step

    def look() -> int:
        """Bytes of this case; gloo's threads let go of what they have sent once they have sent something else."""
        for _ in range(_GLOO_THREADS):
            dist.barrier()
        return sum(size for at, size in alive().items() if at not in before)

    def watched_step() -> None:
        if iteration == ITERATIONS - 1 and players.denoiser.is_gradient_accumulation_boundary():
            found["alive"] = min(look() for _ in range(5))
        step()

    players.denoiser.step = watched_step
    counted = Collectives([engine.optimizer for engine in players.engines.values()])
    for iteration in range(ITERATIONS):
        micro_batches = config.train.grad_accumulation
        batches = [micro_batch(case, iteration * micro_batches + k, place) for k in range(micro_batches)]
        with counted if iteration == ITERATIONS - 1 else nullcontext():
            players.iteration(batches, iteration)
        for ema in emas:
            ema.update()
    players.denoiser.step = step
    found |= {
        "held": held(players, emas),
        "payload": counted.payload,
        "buckets": counted.largest_buckets,
    }
    for engine in players.engines.values():
        engine.destroy()
    return found


def main(folder: Path, part: str) -> None:
    with distributed() as place:
        names = [name for name in CASES if (name in QUICK) == (part == "quick")]
        torch.save({name: played(CASES[name], place) for name in names}, folder / f"rank-{place.rank}.pt")
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
