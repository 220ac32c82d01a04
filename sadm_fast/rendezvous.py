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

from sadm_fast.errors import UserError

# All ranks are started at about the same time; who has not come after this will not come.
PATIENCE = datetime.timedelta(minutes=10)

_LOOPBACK = "127.0.0.1"


def all_ranks_are_here() -> bool:
    """Whether the launcher's variables say that no rank is on another machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun, deepspeed
    return here == os.environ["WORLD_SIZE"] or _is_loopback(os.environ["MASTER_ADDR"])


def check_alone() -> None:
    """UserError if this process has no RANK but is one of several: each would take itself for the only one."""
    for variable in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # srun, mpirun
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"{variable}={os.environ[variable]}: several tasks were started, but RANK is not set;"
                " docs/scale.md says how to start them"
            )


def stay_on_loopback() -> None:
    """Let gloo and NCCL use the loopback interface, unless the user has chosen another one."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux, macOS
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])


def meet(patience: datetime.timedelta = PATIENCE) -> dist.Store | None:
    """The store of this job's ranks, once all have come; None where torchrun keeps it.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set by the launcher.

    Raises:
        UserError: a variable is missing, the port is taken, or somebody has not come in time.
    """
    for variable in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if variable not in os.environ:
            raise UserError(f"{variable}: is not set, though RANK is; start through deepspeed, torchrun or srun")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    address = _LOOPBACK if all_ranks_are_here() else os.environ["MASTER_ADDR"]
    listening = _listen(address, port, world_size) if rank == 0 else None
    try:
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=patience,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except dist.DistError:
        who = f"not all of {world_size} ranks came to" if rank == 0 else f"rank {rank} did not reach rank 0 at"
        raise UserError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {who} it in {patience}; is every host started, and is the"
            " address one that the others can reach?",
            on_every_rank=True,
        ) from None


def _listen(address: str, port: int, world_size: int) -> socket.socket:
    """Rank 0's socket: on `address` if it is one of this machine's, on all of them if it is a name.

    What a host calls itself is often not what the others call it (Debian: 127.0.1.1), so a name does not tell where.
    """
    try:
        try:
            number = ipaddress.ip_address(address)
            family = socket.AF_INET6 if number.version == 6 else socket.AF_INET
            return socket.create_server((address, port), family=family, backlog=world_size)
        except ValueError:
            pass
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
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
