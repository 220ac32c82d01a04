"""Where the ranks of a job meet, and what that opens to the network.

Rank 0 listens on MASTER_PORT for a key-value store through which the ranks find one another; gloo and NCCL then open
ports of their own choice. Nobody is asked for a password on any of them. So ranks that are all on this machine meet on
its loopback interface, and otherwise rank 0 listens on the address that it was given, not on all it has.
"""

import datetime
import errno
import ipaddress
import os
import socket

import torch.distributed as dist

from sadm_fast.errors import LostRank, UserError

_LOOPBACK = "127.0.0.1"


def check_alone() -> None:
    """UserError if this process has no RANK but is one of several: each would take itself for the only one."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # srun, mpirun
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"{variable}={os.environ[variable]}: several tasks were started, but RANK is not set;"
                " docs/scale.md says how to start them"
            )


def all_ranks_are_here() -> bool:
    """Whether the launcher's variables say that no rank is on another machine; UserError if one of them is missing."""
    for variable in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if variable not in os.environ:
            raise UserError(f"{variable}: is not set, though RANK is; docs/scale.md says how to start several ranks")
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun, deepspeed
    return here == os.environ["WORLD_SIZE"] or _is_loopback(os.environ["MASTER_ADDR"])


def stay_on_loopback() -> None:
    """Let gloo and NCCL use the loopback interface, unless the user has chosen another one."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux, macOS
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])


def meet(patience: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store of this job's ranks, once all have come; this one's rank; how many they are.

    Raises:
        UserError: rank 0 cannot listen on MASTER_PORT.
        LostRank: somebody has not come in time.
    """
    here = all_ranks_are_here()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun keeps the store
        store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
        return store, rank, world_size
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = _LOOPBACK if here else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
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
    """Rank 0's socket: on `address` if it is one of this machine's, on all of them if it is a name.

    What a host calls itself is often not what the others call it (Debian: 127.0.1.1), so a name does not tell where.
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
    """The address that a string is, None for a name."""
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None
