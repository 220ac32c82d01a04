"""Small collectives: which rank of how many, sums and maxima, JSON values, whole modules.

Without torch.distributed, or with one rank, each of them returns what this rank has.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sadm_fast.errors import UserError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_distributed() -> bool:
    """Whether there are several ranks."""
    return rank_and_world_size()[1] > 1


def is_rank_zero() -> bool:
    """Whether this rank writes what is written once."""
    return rank_and_world_size()[0] == 0


def communication_device() -> torch.device:
    """The device that the backend of the process group can send from."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def first_on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0, then on the others, which find the files that rank 0 has written. Collective."""
    if is_rank_zero():
        try:
            return work()
        finally:
            barrier()
    barrier()
    return work()


def only_on_rank_zero(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the others wait; they all raise its UserError. Collective."""
    problem: str | None = None
    if is_rank_zero():
        try:
            work()
        except UserError as error:
            problem = str(error)
    problem = broadcast_json(problem)
    if problem is not None:
        raise UserError(problem)


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum of all ranks' `values` (equal shapes and dtypes), on the device of `values`. Collective."""
    return _reduce(values, dist.ReduceOp.SUM)


@torch.no_grad()
def max_over_ranks(values: Tensor) -> Tensor:
    """The elementwise maximum of all ranks' `values` (equal shapes and dtypes), on their device. Collective."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Tensor, op: Any) -> Tensor:
    if not is_distributed():
        return values
    reduced = values.detach().to(communication_device(), copy=True).contiguous()
    dist.all_reduce(reduced, op=op)
    return reduced.to(values.device)


@torch.no_grad()
def broadcast_state(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0. Collective."""
    if not is_distributed():
        return
    for module in modules:
        for tensor in module.state_dict().values():
            shared = tensor.to(communication_device()).contiguous()
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank, sent as bytes: torch's broadcast of objects would unpickle. Collective."""
    if not is_distributed():
        return value
    device = communication_device()
    payload = json.dumps(value).encode() if is_rank_zero() else b""
    length = torch.tensor([len(payload)], device=device)
    dist.broadcast(length, src=0)
    data = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.cpu().tolist()))
