"""Two hosts on this machine: network namespaces joined by a cable, or two addresses of the loopback interface."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from tests.support.programs import Program

# Rank 0's host is node0. Both have a host name, an eth0, a list of processes of their own, and the same files.
_RACK = """
set -e
mount -t tmpfs tmpfs /run
for n in 0 1; do
  ip netns add node$n
  echo "10.99.0.1$n node$n" >> /run/hosts
done
ip link add eth0 netns node0 type veth peer name eth0 netns node1
for n in 0 1; do
  ip -n node$n link set lo up
  ip -n node$n address add 10.99.0.1$n/24 dev eth0
  ip -n node$n link set eth0 up
done
mount --bind /run/hosts /etc/hosts
echo ready
exec sleep infinity
"""
_IN_NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child", "--fork"]


class Hosts(NamedTuple):
    """names: for a hostfile. addresses: where they are reached. prefixes: what starts a command on each.

    cable: what, with "up" or "down" behind it, plugs and unplugs the cable; nothing where there is none.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]
    prefixes: tuple[list[str], list[str]]
    cable: list[str]


def namespaces_allowed() -> bool:
    """Whether this user may make network namespaces here, and join them."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    attempt = "ip netns add a && ip netns add b && ip link add x netns a type veth peer name x netns b"
    command = [*_IN_NAMESPACES, "sh", "-c", f"mount -t tmpfs tmpfs /run && {attempt}"]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextmanager
def two_namespaces() -> Iterator[Hosts]:
    """Hosts that share files and nothing else; a process that ends there takes all it has started along."""
    rack = subprocess.Popen([*_IN_NAMESPACES, "sh", "-c", _RACK], stdout=subprocess.PIPE, text=True)
    try:
        assert rack.stdout is not None and rack.stdout.readline() == "ready\n"
        inside = Path(f"/proc/{rack.pid}/task/{rack.pid}/children").read_text().split()[0]
        enter = ["nsenter", "--target", inside, "--user", "--preserve-credentials", "--mount"]
        alone = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]

        def prefix(name: str) -> list[str]:
            return [*enter, "ip", "netns", "exec", name, *alone, "sh", "-c", f'hostname {name}; exec "$@"', "sh"]

        cable = [*enter, "ip", "-n", "node1", "link", "set", "eth0"]
        yield Hosts(("node0", "node1"), ("10.99.0.10", "10.99.0.11"), (prefix("node0"), prefix("node1")), cable)
    finally:
        rack.kill()
        rack.wait()


@contextmanager
def two_loopback_addresses() -> Iterator[Hosts]:
    """Where namespaces are not to be had: two launchers of one machine."""
    addresses = ("127.0.0.1", "127.0.0.2")
    yield Hosts(addresses, addresses, ([], []), [])


def kill_all(program: Program) -> None:
    """SIGKILL to the program and everything it has started."""
    os.killpg(program.process.pid, signal.SIGKILL)


def listening(program: Program) -> list[tuple[str, int]]:
    """Addresses and ports at which the program and its children take connections or datagrams, sorted (Linux)."""
    session = str(program.process.pid)
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("stat").read_text().rpartition(")")[2].split()[3] != session:
                continue
            inodes |= {os.readlink(descriptor) for descriptor in process.glob("fd/*")}
        except OSError:  # it has ended meanwhile
            continue
    found = []
    for table, open_state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{session}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == open_state and f"socket:[{rest[5]}]" in inodes:
                number, port = local.split(":")
                words = [bytes.fromhex(number[i : i + 8])[::-1] for i in range(0, len(number), 8)]  # little-endian
                found.append((str(ip_address(b"".join(words))), int(port, 16)))
    return sorted(found)
