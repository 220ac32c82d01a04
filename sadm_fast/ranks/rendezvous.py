"""The meeting of a job's ranks, and the ports it opens.

Rank 0 keeps a key-value store on MASTER_PORT, through which the ranks find one another; gloo and NCCL then open ports
of their own choice. None of them asks for a password. Therefore ranks that are all on this machine meet on its loopback
interface, and otherwise rank 0 listens only on the address it was given.
"""

import datetime
import errno
import ipaddress
import os
import socket

import torch.distributed as dist

from sadm_fast.errors import LostRank, UserError
from sadm_fast.ranks.environment import number, ranks_here

_LOOPBACK = "127.0.0.1"


def all_ranks_are_here() -> bool:
    """Whether the launcher's variables say that every rank is on this machine."""
    return number("WORLD_SIZE") == ranks_here() or _is_loopback(os.environ["MASTER_ADDR"])


def stay_on_loopback() -> None:
    """Let gloo and NCCL use the loopback interface, unless the user has chosen another one."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux, macOS
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names and not os.environ.get(variable):
            os.environ[variable] = names[0]


def meet(patience: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """Wait for all ranks; return the key-value store they share, this one's rank and their number.

    The launcher's variables are checked before (sadm_fast.ranks.environment).

    Raises:
        UserError: rank 0 cannot listen on MASTER_PORT.
        LostRank: a rank has not come within `patience`.
    """
    here = all_ranks_are_here()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps the store
        store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
        return store, rank, world_size
    rank, world_size, port = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
    address = _LOOPBACK if here else os.environ["MASTER_ADDR"]
    listening = _listen(address, port, world_size).detach() if rank == 0 else None
    try:
        store = dist.TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=patience, master_listen_fd=listening
        )  # fmt: skip
    except dist.DistError as error:
        reason = " ".join(str(error).split())[:160]
        raise LostRank(
            f"rank {rank} of {world_size}: not all ranks met at MASTER_ADDR={address}, MASTER_PORT={port} within"
            f" {patience} ({reason}); is the job started on every machine, and do they reach one another there?"
        ) from None
    return store, rank, world_size


def _listen(address: str, port: int, world_size: int) -> socket.socket:
    """Rank 0's socket: on `address` if it is a number and one of this machine's, otherwise on all interfaces.

    A name is not resolved: a host's own name often leads to an address that others cannot reach (Debian: 127.0.1.1).
    """
    try:
        number = _number(address)
        if number is not None:
            family = socket.AF_INET6 if number.version == 6 else socket.AF_INET
            try:
                return socket.create_server((address, port), family=family, backlog=world_size)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # a router's address that leads here
                    raise
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=world_size, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=world_size)
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={port}: {os.strerror(error.errno or 0)} (another job on this machine?); choose another port,"
            " for example with deepspeed --master_port"
        ) from None


def _is_loopback(address: str) -> bool:
    number = _number(address)
    return address == "localhost" if number is None else number.is_loopback


def _number(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse a numeric address; None for a host name."""
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
