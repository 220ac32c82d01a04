"""Where this process runs: which rank of how many, on which device, however it was started."""

import datetime
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import NamedTuple

import torch
import torch.distributed as dist

from sadm_fast.errors import LostRank, UserError, sign_of_a_lost_rank
from sadm_fast.ranks.environment import check_environment, number, ranks_here
from sadm_fast.ranks.rendezvous import all_ranks_are_here, meet, stay_on_loopback

# Rank 0 may train Psi or write the demo set while the others wait for it.
_PATIENCE = datetime.timedelta(hours=2)
# All ranks must be there by then; other machines may have a slow disk to import from.
_MEETING = datetime.timedelta(minutes=15)
# Rank 0 keeps the store, so it waits for those who have met the same error and ask there whether to print it.
_GOODBYE_S = 2.0


class Place(NamedTuple):
    """A process among the others."""

    rank: int
    world_size: int
    device: torch.device


def choose_accelerator() -> bool:
    """Whether to use a GPU: if there is one, unless DS_ACCELERATOR (DeepSpeed's variable) says cpu.

    Sets DS_ACCELERATOR where there is none, before DeepSpeed's import looks for a GPU and warns.

    Raises:
        UserError: DS_ACCELERATOR says cuda where there is no GPU.
    """
    there, wanted = torch.cuda.is_available(), os.environ.get("DS_ACCELERATOR")
    if wanted == "cuda" and not there:
        raise UserError("DS_ACCELERATOR=cuda: torch finds no GPU here; set it to cpu, or unset it")
    if not there:
        os.environ["DS_ACCELERATOR"] = "cpu"
    return there and wanted != "cpu"


def own_device() -> torch.device:
    """This rank's device: the GPU numbered LOCAL_RANK, or the CPU. UserError if there is no such GPU."""
    if not choose_accelerator():
        return torch.device("cpu")
    local_rank, gpus = number("LOCAL_RANK") or 0, torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank}: this process sees {gpus} GPU(s), numbered from 0; start one rank a GPU, and let"
            " each see all GPUs of its machine (CUDA_VISIBLE_DEVICES, SLURM's --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def distributed(*, deepspeed: bool = True) -> Iterator[Place]:
    """Start torch.distributed, and DeepSpeed on top of it; yield this rank's place.

    deepspeed: False where no engine is made. Besides the seconds of its import it keeps the process group, so that
    gloo's threads outlive it, and now and then abort a process that ends at once ("terminate called").

    Started by `deepspeed` or `torchrun`, RANK, WORLD_SIZE and LOCAL_RANK are set; started by plain `python`, this is
    the only rank and no port is opened.

    Raises:
        UserError: the launcher's variables do not tell where the ranks meet, or which GPU is this rank's.
        LostRank: another rank has not come, or, in place of a collective's RuntimeError, is gone.
    """
    check_environment()
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core slow one another down several times.
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here()))
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        if all_ranks_are_here():
            stay_on_loopback()
        store, rank, world_size = meet(_MEETING)
    else:
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
    if deepspeed:
        with _silence():
            _start_deepspeed(backend)
    # The imports stay for good, and DeepSpeed collects garbage whenever a ZeRO-3 engine starts: half a second saved.
    gc.freeze()
    lost = False
    try:
        yield Place(rank, world_size, device)
    except UserError as error:
        error.said = False
        with suppress(RuntimeError):  # rank 0, which keeps the store, may be gone, or another rank have no error
            error.said = store.add(f"error/{sha256(repr(error).encode()).hexdigest()}", 1) > 1
            store.set(f"ended/{rank}", "")
            if rank == 0:
                _wait_for([f"ended/{other}" for other in range(world_size)], store)
        raise
    except RuntimeError as error:
        sign = sign_of_a_lost_rank(error)
        if sign is None or world_size == 1:
            raise
        lost = True
        raise LostRank(f"rank {rank}: another rank is gone ({sign.lower()})") from None
    finally:
        if not lost:  # saying goodbye would wait for it
            _end_deepspeed() if deepspeed else dist.destroy_process_group()


def _wait_for(keys: list[str], store: dist.Store) -> None:
    """Wait at most `_GOODBYE_S` seconds for keys; the store's own wait prints warnings when its time is over."""
    until = time.monotonic() + _GOODBYE_S
    while not store.check(keys) and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def _silence() -> Iterator[None]:
    """Discard stdout and stderr, children's included: importing DeepSpeed probes compilers, which print."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


def _end_deepspeed() -> None:
    """Destroy the process group, and what DeepSpeed keeps of it: it would use that in the next training."""
    import deepspeed

    deepspeed.comm.destroy_process_group()


def _start_deepspeed(backend: str) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by the names that torch is about to drop; nobody at a terminal can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Shared-memory collectives for CPUs: compiled at the first start, for tens of seconds and not without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, verbose=False)
