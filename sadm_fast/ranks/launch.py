"""Where this process runs: which rank of how many, on which device, however it was started."""

import datetime
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
import torch.distributed as dist

from sadm_fast.errors import LostRank, UserError, sign_of_a_lost_rank
from sadm_fast.ranks.rendezvous import all_ranks_are_here, check_alone, meet, stay_on_loopback

# Rank 0 may train Psi or write the demo set while the others wait for it.
_PATIENCE = datetime.timedelta(hours=2)
# All ranks must be there by then; other machines may have a slow disk to import from.
_MEETING = datetime.timedelta(minutes=15)


class Place(NamedTuple):
    """A process among the others."""

    rank: int
    world_size: int
    device: torch.device


def choose_accelerator() -> bool:
    """Whether there is a GPU; where there is none DeepSpeed is told so, before its import looks for one and warns."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.cuda.is_available()


@contextmanager
def distributed() -> Iterator[Place]:
    """torch.distributed and DeepSpeed's view of it, for one rank or for what the launcher's environment says.

    Started by `deepspeed` or `torchrun`, RANK, WORLD_SIZE and LOCAL_RANK are set; started by plain `python`, this is
    the only rank and no port is opened.

    Raises:
        UserError: the launcher's variables do not tell where the ranks meet.
        LostRank: another rank has not come, or, in place of a collective's RuntimeError, is gone.
    """
    cuda = choose_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core slow one another down several times.
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")  # torchrun, deepspeed
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        if all_ranks_are_here():
            stay_on_loopback()
        store, rank, world_size = meet(_MEETING)
    else:
        check_alone()
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
        store, rank, world_size = dist.HashStore(), 0, 1
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_PATIENCE,
            device_id=device if cuda else None,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        raise LostRank(
            f"rank {rank} of {world_size} cannot connect to the others ({reason}); where machines have several"
            " network interfaces, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the one to use (docs/scale.md)"
        ) from None
    with _silence():
        _start_deepspeed(backend)
    lost = False
    try:
        yield Place(rank, world_size, device)
    except UserError as error:
        error.said = False
        with suppress(RuntimeError):  # rank 0, which holds the store, may be gone
            error.said = store.add(f"error/{error}", 1) > 1
        raise
    except RuntimeError as error:
        sign = sign_of_a_lost_rank(error)
        if sign is None or world_size == 1:
            raise
        lost = True
        raise LostRank(f"rank {rank}: another rank is gone ({sign.lower()})") from None
    finally:
        if not lost:  # saying goodbye would wait for it
            dist.destroy_process_group()


@contextmanager
def _silence() -> Iterator[None]:
    """Let nothing on stdout and stderr, not from children either: DeepSpeed tries compilers out when it is imported."""
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def _start_deepspeed(backend: str) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by the names that torch is about to drop; nobody at a terminal can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Shared-memory collectives for CPUs: compiled at the first start, for tens of seconds and not without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, verbose=False)
