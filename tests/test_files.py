"""Paths as a person writes them; files of the cache: whole or not at all."""

import errno
import os
import pwd
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sadm_fast.errors import UserError
from sadm_fast.files import LOCK, default_cache, expand_home, locked, parse_json, remember, replacing


def test_a_tilde_at_the_start_is_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert expand_home("~") == "/home/of/mine" and expand_home(Path("~/a/b")) == "/home/of/mine/a/b"
    assert expand_home("~root/x") == f"{pwd.getpwnam('root').pw_dir.rstrip('/')}/x"
    for other in ("a/~/b", "./~a", "a~", "demo:mnist5k", "", "/x"):
        assert expand_home(other) == other
    with pytest.raises(UserError, match=r"^~no-such-user/x: there is no home folder ~no-such-user; write"):
        expand_home("~no-such-user/x")


def test_the_folder_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.setenv("HOME", "/home/of/mine")
    monkeypatch.setenv("SADM_CACHE", "~/cache")
    assert default_cache() == Path("/home/of/mine/cache")
    monkeypatch.delenv("SADM_CACHE")
    assert default_cache() == Path("datasets")


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second"):
        assert remember(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_is_replaced_when_the_new_one_is_whole_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text()))
    for several in (False, True):
        with pytest.raises(ZeroDivisionError), replacing(path, by_several=several) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old" and not synced
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "new" and synced == ["old"]


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    assert remember(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not remember(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert not remember(tmp_path / "cache" / "file", b"content")


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    """A child that holds the lock on a folder; its process id."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder, "", ""):
            os.write(tell, b".")
            signal.pause()
    try:
        os.read(ready, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_a_lock_is_refused_to_another_process_and_dies_with_its_own(tmp_path: Path) -> None:
    lock = locked(tmp_path, "run {x}", "is in it")
    with held_by_another_process(tmp_path) as holder, pytest.raises(UserError) as caught, lock:
        pass
    assert str(caught.value) == f"run {{x}}: process {holder} on {socket.gethostname()} is in it"
    with locked(tmp_path, "", ""):
        assert (tmp_path / LOCK).read_text().split()[0] == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_keep_a_lock(tmp_path: Path) -> None:
    """As loader workers that outlive a trainer that was killed."""
    ready, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        with locked(tmp_path, "", ""):
            if os.fork() == 0:
                os.write(tell, str(os.getpid()).encode())
                signal.pause()
            signal.pause()
    orphan = int(os.read(ready, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with locked(tmp_path, "", ""):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with locked(tmp_path, "", ""):
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "text", ["{", 100_000 * "[", 200 * "[" + 200 * "]", 120 * '{"a":' + "1" + 120 * "}", b"\xff", ""]
)
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [[1], {}]}') == {"a": [[1], {}]}
