"""Where ranks meet: what the launcher's variables say, where rank 0 listens, and who does not come."""

import datetime
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from sadm_fast.errors import LostRank, UserError
from sadm_fast.ranks import rendezvous
from sadm_fast.ranks.launch import distributed
from tests.support.programs import free_port

SOON = datetime.timedelta(seconds=1)


def launched(environment: pytest.MonkeyPatch, address: str, port: int, **more: str) -> None:
    """Set what a launcher sets for rank 0 of 2."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port), **more}
    for name, value in values.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("address", "more", "here"),
    [
        ("127.0.0.1", {}, True),
        ("127.1.2.3", {}, True),
        ("::1", {}, True),
        ("localhost", {}, True),
        ("10.0.0.1", {}, False),
        ("node0", {}, False),
        ("10.0.0.1", {"LOCAL_SIZE": "2"}, True),
        ("node0", {"LOCAL_WORLD_SIZE": "2"}, True),
        ("node0", {"LOCAL_WORLD_SIZE": "1"}, False),
    ],
)
def test_the_launcher_says_whether_all_ranks_are_here(
    environment: pytest.MonkeyPatch, address: str, more: dict[str, str], here: bool
):
    launched(environment, address, 29500, **more)
    assert rendezvous.all_ranks_are_here() == here


def test_loopback_is_used_unless_another_interface_was_chosen(environment: pytest.MonkeyPatch):
    environment.setenv("GLOO_SOCKET_IFNAME", "")  # counts as not chosen
    environment.setenv("NCCL_SOCKET_IFNAME", "eth7")
    rendezvous.stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0") and os.environ["NCCL_SOCKET_IFNAME"] == "eth7"


# 192.0.2.1 is nobody's (RFC 5737): an address that leads to this machine without being one of its own.
@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", {"127.0.0.1"}), ("192.0.2.1", {"::", "0.0.0.0"}), ("node0", {"::", "0.0.0.0"})],
)
def test_rank_0_listens_only_on_an_address_that_is_its_own(address: str, expected: set[str]):
    with rendezvous._listen(address, free_port(), 2) as listening:
        assert listening.getsockname()[0] in expected


def test_two_ranks_meet(environment: pytest.MonkeyPatch):
    port = free_port()
    launched(environment, "10.99.99.99", port, LOCAL_SIZE="2")  # all here: the address does not matter
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(dist.TCPStore, "127.0.0.1", port, 2, is_master=False, timeout=SOON)
        store, rank, world_size = rendezvous.meet(SOON)
        assert (rank, world_size) == (0, 2)
        other.result().set("key", "value")
        assert store.get("key") == b"value"


def test_torchrun_keeps_the_store(environment: pytest.MonkeyPatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched(environment, "127.0.0.1", agent.port, WORLD_SIZE="1", TORCHELASTIC_USE_AGENT_STORE="True")
    store, rank, world_size = rendezvous.meet(SOON)
    assert (rank, world_size) == (0, 1)
    store.set("key", "value")
    assert agent.get("key") == b"value"


def test_a_taken_port_is_named(environment: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as other_job:
        port = other_job.getsockname()[1]
        launched(environment, "127.0.0.1", port)
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: Address already in use .* --master_port"):
            rendezvous.meet(SOON)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_nobody_meets_says_so(environment: pytest.MonkeyPatch, rank: str):
    port = free_port()
    launched(environment, "127.0.0.1", port, RANK=rank)
    with pytest.raises(LostRank, match=f"rank {rank} of 2: not all ranks met at .* MASTER_PORT={port}"):
        rendezvous.meet(datetime.timedelta(milliseconds=200))


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
def test_an_interface_that_is_not_there_is_named_in_one_line(environment: pytest.MonkeyPatch):
    launched(environment, "127.0.0.1", free_port(), WORLD_SIZE="1")
    environment.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(LostRank, match=r"rank 0 of 1 cannot connect.*nowhere0.*GLOO_SOCKET_IFNAME"), distributed():
        pass
