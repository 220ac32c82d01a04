"""Three gloo ranks: each plays every case of test_group.py and writes down what it got.

Usage: group_worker.py FOLDER

The ranks are forked from one process that has imported what they need: the imports take longer than the cases.
"""

import itertools
import multiprocessing
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sadm_kernels import Queue, StructureLoss, backends, share, structure_loss
from sadm_kernels.collectives import gather

IMPLEMENTATIONS = [impl for impl in ("reference", "native") if backends()[impl] == "ok"]
WORLD = 3
SHARE = 3  # rows of a rank
DIMENSION = 4
GROUPS: dict[str, tuple[int, ...]] = {"three": (0, 1, 2), "two": (1, 2)}  # ranks of the second differ from its indices
CASES = [  # every relation, penalty and normalisation, with weights and labels each alone, or both and neither
    (relation, penalty, normalize, weighted, weighted == alike)
    for (relation, penalty, normalize), alike in zip(
        itertools.product(
            ("euclidean", "cosine", "gaussian"), ("squared", "absolute", "huber"), ("unit", "mean", "none")
        ),
        itertools.cycle((True, False)),
    )
    for weighted in (False, True)
]
QUEUE_CASES = [  # relation, normalize, weighted
    ("euclidean", "unit", False),
    ("euclidean", "mean", True),
    ("cosine", "unit", True),
    ("gaussian", "mean", False),
    ("gaussian", "none", True),
]
SHAPES: dict[str, Any] = {"tau": 0.8, "delta": 0.2}
COLUMNS = {"native": (2048, 4096), "reference": (2048,)}  # of batches shared by two ranks, whose memory is measured
WIDTH = 32


def whole_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """real, fake [size, DIMENSION] and weight [size] in float64, labels [size]; labels repeat across ranks."""
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, size, DIMENSION, generator=generator, dtype=torch.float64)
    weight = torch.rand(size, generator=generator, dtype=torch.float64)
    weight[:SHARE] = 0.0  # the first rank's gate is closed
    return real, fake, weight, torch.arange(size) % 2


def past(weighted: bool) -> Queue:
    """The same on every rank."""
    real, fake, weight, labels = whole_batch(7, seed=1)
    weight += 0.1
    return Queue(real, fake, weight if weighted else None, labels)


def play(group: Any, ranks: tuple[int, ...], impl: str) -> dict[Any, tuple[Tensor, ...]]:
    """Every case on this rank's share: loss, gradients, and the gradients of a second backward."""
    own = slice(dist.get_rank(group) * SHARE, (dist.get_rank(group) + 1) * SHARE)
    real, fake, weight, labels = (x[own] for x in whole_batch(SHARE * len(ranks)))
    results: dict[Any, tuple[Tensor, ...]] = {}
    for case in CASES:
        relation, penalty, normalize, weighted, labelled = case
        f, g = real.clone().requires_grad_(True), fake.clone().requires_grad_(True)
        loss = structure_loss(
            f,
            g,
            relation=relation,
            penalty=penalty,
            normalize=normalize,
            weight=weight if weighted else None,
            labels=labels if labelled else None,
            group=group,
            impl=impl,
            **SHAPES,
        )
        first = torch.autograd.grad(loss, (f, g), retain_graph=True)
        second = torch.autograd.grad(loss, (f, g))
        results[case] = (loss.detach(), *first, *second)
    for relation, normalize, weighted in QUEUE_CASES:
        f, g = real.clone().requires_grad_(True), fake.clone().requires_grad_(True)
        options: dict[str, Any] = {"relation": relation, "normalize": normalize, "impl": impl, **SHAPES}
        given = {"weight": weight if weighted else None, "labels": labels, "queue": past(weighted), "group": group}
        loss = structure_loss(f, g, **given, **options)
        results["queue", relation, normalize, weighted] = (loss.detach(), *torch.autograd.grad(loss, (f, g)))
        for check in (True, False):
            early = structure_loss(share(real, **given, check=check), g, **options)
            results["early", relation, normalize, weighted, check] = (early.detach(), *torch.autograd.grad(early, g))
    f = real.clone().requires_grad_(True)
    loss = structure_loss(f, fake, normalize="mean", group=group, impl=impl)
    (only_real,) = torch.autograd.grad(loss, f)
    results["real only"] = (loss.detach(), only_real)
    cases: dict[str, dict[str, Any]] = {
        "no pair": {"labels": torch.arange(SHARE) + own.start},
        "weight": {"weight": weight},
        "small weight": {"weight": weight * 2.0**-600},  # products would underflow in float64
    }
    for name, given in cases.items():
        f, g = real.clone().requires_grad_(True), fake.clone().requires_grad_(True)
        loss = structure_loss(f, g, normalize="mean", group=group, impl=impl, **given)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, (f, g)))
    return results


def unlike(size: int) -> tuple[Tensor, Tensor]:
    """Features of a float32 teacher and a narrower float64 student."""
    real, fake, *_ = whole_batch(size)
    return real.float(), fake[:, :3]


def play_unlike(group: Any, impl: str) -> dict[str, tuple[Tensor, ...]]:
    """Loss and gradients of this rank's share of `unlike`, also sent ahead."""
    own = slice(dist.get_rank(group) * SHARE, (dist.get_rank(group) + 1) * SHARE)
    real, fake = (x[own].clone().requires_grad_(True) for x in unlike(SHARE * dist.get_world_size(group)))
    loss = structure_loss(real, fake, normalize="mean", group=group, impl=impl)
    early = structure_loss(share(real.detach(), group=group), fake, normalize="mean", impl=impl)
    return {
        "together": (loss.detach(), *torch.autograd.grad(loss, (real, fake))),
        "early": (early.detach(), *torch.autograd.grad(early, fake)),
    }


def play_compiled(group: Any, impl: str) -> dict[str, tuple[Tensor, ...]]:
    """Loss and gradients, eager and compiled without a graph break, while tau changes and with only a rank's weight."""
    own = slice(dist.get_rank(group) * SHARE, (dist.get_rank(group) + 1) * SHARE)
    real, fake, weight, labels = (x[own] for x in whole_batch(SHARE * dist.get_world_size(group)))
    loss, queue = StructureLoss(relation="gaussian", normalize="mean", group=group, impl=impl), past(True)

    def call(f: Tensor, g: Tensor, tau: float) -> Tensor:
        loss.tau = tau
        return loss(f, g, weight if dist.get_rank(group) else None, labels, queue)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, function in (("eager", call), ("compiled", compiled)):
        found = []
        for tau in (1.0, 0.9, 0.8) if impl == IMPLEMENTATIONS[-1] else (1.0,):  # 3 s for each to be compiled
            f, g = real.clone().requires_grad_(True), fake.clone().requires_grad_(True)
            value = function(f, g, tau)
            found += [value.detach(), *torch.autograd.grad(value, (f, g))]
        results[name] = tuple(found)
    return results


def train_with_ddp(group: Any) -> tuple[Tensor, Tensor]:
    """A network's gradient from one process with the whole batch, and from DDP by the recipe of kernels/README.md."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    real, fake, *_ = whole_batch(SHARE * ranks)
    own = slice(rank * SHARE, (rank + 1) * SHARE)
    torch.manual_seed(0)
    net = torch.nn.Linear(DIMENSION, DIMENSION).double()
    whole = torch.autograd.grad(structure_loss(real, net(fake)), net.weight)[0]
    parallel = torch.nn.parallel.DistributedDataParallel(net, process_group=group)
    (ranks * structure_loss(real[own], parallel(fake[own]), group=group)).backward()
    assert net.weight.grad is not None
    return whole, net.weight.grad


def gather_backward(group: Any, rank: int) -> tuple[Tensor, Tensor]:
    """The gradient through a gather of one row a rank, and afterwards the gradient that was handed in."""
    row = torch.zeros(1, 2, requires_grad=True)
    asked = torch.full((WORLD, 2), 10.0**rank)
    (grad,) = torch.autograd.grad(gather(row, group.group_name), row, grad_outputs=asked)
    return grad, asked


def memory(group: Any, impl: str) -> list[int]:
    """Bytes that loss and gradient of half a batch need at their fullest, for growing sizes of the batch (Linux).

    Counted from before the first: what the C++ kernel keeps for its next call belongs to it.
    """

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    structure_loss(torch.randn(4, 4), torch.randn(4, 4, requires_grad=True), group=group, impl=impl).backward()
    found = []
    before = status("VmRSS")
    for columns in COLUMNS[impl]:
        real, fake = torch.randn(2, columns // 2, WIDTH)
        fake.requires_grad_(True)
        Path("/proc/self/clear_refs").write_text("5")
        torch.autograd.grad(structure_loss(real, fake, group=group, impl=impl), fake)
        found.append(status("VmHWM") - before)
    return found


def attempt(call: Callable[[], object]) -> str:
    """The error of a call, which must come on every rank; "" without one."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mistakes(group: Any, rank: int) -> dict[str, str]:
    """What this rank is told when the ranks disagree."""
    real, fake, _, labels = (x[:SHARE] for x in whole_batch(SHARE * WORLD))
    rows = SHARE - (rank == 1)
    f = real.clone().requires_grad_(True)

    def second_derivative(impl: str) -> str:
        loss = structure_loss(f, fake, group=group, impl=impl)
        return attempt(lambda: torch.autograd.grad(loss, f, create_graph=True))

    return {
        "uneven": attempt(lambda: structure_loss(real[:rows], fake[:rows], group=group)),
        "empty": attempt(lambda: structure_loss(real[: rank and SHARE], fake[: rank and SHARE], group=group)),
        "width": attempt(lambda: structure_loss(real[:, : 3 + rank % 2], fake[:, : 3 + rank % 2], group=group)),
        "dtype": attempt(
            lambda: structure_loss(
                *(x.to(torch.float32 if rank else torch.bfloat16) for x in (real, fake)), group=group
            )
        ),
        "fake": attempt(lambda: structure_loss(real, fake[:, : 3 + rank % 2], group=group)),
        "relation": attempt(lambda: structure_loss(real, fake, relation="cosine" if rank else "gaussian", group=group)),
        "tau": attempt(lambda: structure_loss(real, fake, tau=1.0 + rank, group=group)),
        "impl": attempt(lambda: structure_loss(real, fake, impl="auto" if rank else "reference", group=group)),
        "queue": attempt(
            lambda: structure_loss(real, fake, queue=Queue(real[:rows], fake[:rows]) if rank else None, group=group)
        ),
        "labels": attempt(lambda: structure_loss(real, fake, labels=labels if rank else None, group=group)),
        "weight": attempt(lambda: structure_loss(real, fake, weight=torch.zeros(SHARE), group=group)),
        **{f"second derivative, {impl}": second_derivative(impl) for impl in IMPLEMENTATIONS},
        "nothing": attempt(lambda: structure_loss(real, fake, weight=None if rank else torch.ones(SHARE), group=group)),
    }


def be_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),  # a hang is a failure, not a wait
    )
    groups = {name: dist.new_group(list(ranks)) for name, ranks in GROUPS.items()}
    measured = {}
    if rank in GROUPS["two"] and Path("/proc/self/clear_refs").exists():  # before others leave room behind
        measured = {impl: memory(groups["two"], impl) for impl in sorted(IMPLEMENTATIONS)}
    results: dict[str, Any] = {
        f"{name}, {impl}": play(groups[name], ranks, impl)
        for name, ranks in GROUPS.items()
        if rank in ranks
        for impl in IMPLEMENTATIONS
    }
    for impl in IMPLEMENTATIONS:
        results[f"unlike, {impl}"] = play_unlike(groups["three"], impl)
        results[f"compiled, {impl}"] = play_compiled(groups["three"], impl)
    results["ddp"] = train_with_ddp(groups["three"])
    results["memory"] = measured
    results["gather"] = gather_backward(groups["three"], rank)
    results["mistakes"] = mistakes(groups["three"], rank)
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """The number of ranks that failed."""
    # What play_compiled imports on the way, before there are three of them.
    torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1, requires_grad=True))

    folder = Path(sys.argv[1])
    ranks = [multiprocessing.get_context("fork").Process(target=be_rank, args=(rank, folder)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
