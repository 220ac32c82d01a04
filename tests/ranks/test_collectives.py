"""Small collectives with two ranks, and without torch.distributed, where each returns what this rank has."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sadm_fast.ranks import collectives


def found_by(rank: int) -> dict[str, Any]:
    """What every collective returns to this rank."""
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 10.0 + rank)
    collectives.broadcast_state([layer])
    values = torch.tensor([rank, -rank], dtype=torch.float64)
    collectives.barrier()
    return {
        "place": collectives.rank_and_world_size(),
        "zero": collectives.is_rank_zero(),
        "several": collectives.is_distributed(),
        "sum": collectives.sum_over_ranks(values).tolist(),
        "max": collectives.max_over_ranks(values).tolist(),
        "untouched": values.tolist(),
        "json": collectives.broadcast_json({"rank": rank, "\u03a8": [None, 1.5, "x"]}),
        "weight": layer.weight.item(),
        "first": collectives.first_on_rank_zero(lambda: f"from {rank}"),
    }


def one_rank(rank: int, store: str, results: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    found = found_by(rank)

    def fail_on_rank_zero() -> str:
        if rank == 0:
            raise ValueError
        return "went on"

    try:
        found["failed"] = collectives.first_on_rank_zero(fail_on_rank_zero)
    except ValueError:
        found["failed"] = "failed"
    results.put((rank, found))
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=one_rank, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    for rank in range(2):
        assert found[rank] == {
            "place": (rank, 2), "zero": rank == 0, "several": True, "sum": [1.0, -1.0], "max": [1.0, 0.0],
            "untouched": [rank, -rank], "json": {"rank": 0, "\u03a8": [None, 1.5, "x"]}, "weight": 10.0,
            "first": f"from {rank}", "failed": ("failed", "went on")[rank],
        }  # fmt: skip


def test_without_a_group():
    assert found_by(0) == {
        "place": (0, 1), "zero": True, "several": False, "sum": [0.0, 0.0], "max": [0.0, 0.0], "untouched": [0.0, 0.0],
        "json": {"rank": 0, "\u03a8": [None, 1.5, "x"]}, "weight": 10.0, "first": "from 0",
    }  # fmt: skip
