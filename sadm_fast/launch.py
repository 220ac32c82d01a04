"""Where this process runs: which rank of how many, on which device, however it was started."""

import datetime
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Rank 0 may train Psi or write the demo set while the others wait for it.
_PATIENCE = datetime.timedelta(hours=2)


class Place(NamedTuple):
    """A process among the others."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def distributed() -> Iterator[Place]:
    """torch.distributed and DeepSpeed's view of it, for one rank or for what the launcher's environment says.

    Started by `deepspeed` or `torchrun`, RANK, WORLD_SIZE and LOCAL_RANK are set; started by plain `python`, this is
    the only rank and no port is opened.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=device if cuda else None)
    else:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _start_deepspeed(backend)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def _start_deepspeed(backend: str) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        # Its shared-memory collectives are compiled at the first start; without a compiler gloo does the work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, verbose=False)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.get_world_size() > 1:
        dist.barrier()


def first_on_rank_zero(work: Callable[[], T]) -> T:
    """`work` on rank 0, then on the others, which find what it left behind."""
    if dist.get_rank() == 0:
        try:
            return work()
        finally:
            barrier()
    barrier()
    return work()
