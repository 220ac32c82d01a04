"""Small files that are replaced as a whole or grow by a line, locks on folders, and the cache folder."""

import errno
import fcntl
import json
import math
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sadm_fast.errors import UserError

LOCK = ".lock"  # in a folder that a process has for itself
_DEEPEST = 100  # brackets in a JSON file that is read
_LOCK_TRIES = 10


def expand_home(path: str | Path) -> str:
    """`path` with `~` or `~name` at its start as the home folder meant; UserError if there is none of that name.

    A shell does it only where a word begins, so not in --run-dir=~/x or --set data.path=~/x, nor in a file.
    """
    given = str(path)
    expanded = os.path.expanduser(given)
    if given.startswith("~") and expanded == given:
        user = given.split("/")[0]
        raise UserError(f"{given}: there is no home folder {user}; write it in full, or ./{given} if it is a name")
    return expanded


@contextmanager
def replacing(path: Path, *, by_several: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; at the end of the block what is there replaces `path`, synced to disk.

    Readers see the old file or the new one. After an exception only the old one is there.

    by_several: several processes may do so at once; otherwise what a killed one leaves behind is written over.
    """
    # A leading dot: what is left behind is never taken for the file, not even by its suffix.
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}" if by_several else f"{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text; ValueError for anything wrong, brackets more than 100 deep included."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError("brackets are nested too deep")
    return value


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


@contextmanager
def locked(folder: Path, what: str, doing: str) -> Iterator[None]:
    """Hold a lock on a folder against other processes; it ends with the block, or with the process however that ends.

    It is a POSIX record lock on the file `.lock`: children do not inherit it, and NFS servers hold it between machines.
    On a file system that knows no locks there is none.

    Raises:
        UserError: another process holds it: "`what`: process 123 on its-machine `doing`".
    """
    path = folder / LOCK
    for _ in range(_LOCK_TRIES):
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                with file:
                    file.seek(0)
                    holder = " ".join(file.read(200).split())
                raise UserError(f"{what}: {f'process {holder}' if holder else 'another process'} {doing}") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # whoever held the lock has just removed this file
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def require_writable(path: Path, option: str, *, make_folder: bool = False) -> None:
    """Check that the file `path` can be written, before there is anything to write.

    Raises:
        UserError: naming `option` and the reason.
    """
    temporary = path.with_name(path.name + ".tmp")  # as it is written later
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary.open("ab").close()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None


def append_json(path: Path, value: dict[str, Any]) -> None:
    """Add a line to a JSON-lines file; what is not finite becomes null, because JSON has no word for it."""
    with open(path, "a") as file:
        file.write(json.dumps(_finite(value), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_cache() -> Path:
    """$SADM_CACHE, or ./datasets."""
    return Path(expand_home(os.environ.get("SADM_CACHE") or "datasets"))


def remember(path: Path, content: bytes) -> bool:
    """Write a file of the cache as a whole or not at all; False if that cannot be done (read-only, full).

    Safe when several processes write the same file at once. What is only remembered is never worth failing for.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, by_several=True) as temporary:
            temporary.write_bytes(content)
    except OSError:
        return False
    return True
