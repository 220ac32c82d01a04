"""Collectives for small things: JSON values, whole modules. One rank, or none at all, is a group too."""

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def communication_device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")


@torch.no_grad()
def broadcast_state(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if not is_distributed():
        return
    for module in modules:
        for tensor in module.state_dict().values():
            shared = tensor.to(communication_device()).contiguous()
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)


def broadcast_json(value: Any) -> Any:
    """Rank 0's JSON value on every rank. As bytes: torch's own broadcast of objects would unpickle them."""
    if not is_distributed():
        return value
    device = communication_device()
    payload = json.dumps(value).encode() if dist.get_rank() == 0 else b""
    length = torch.tensor([len(payload)], device=device)
    dist.broadcast(length, src=0)
    data = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if payload:
        data.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(data, src=0)
    return json.loads(bytes(data.cpu().tolist()))
