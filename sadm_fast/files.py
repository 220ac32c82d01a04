"""Small files that are replaced as a whole, or grow by a line; the folder for what can be made again."""

import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from sadm_fast.errors import UserError


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


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


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
        # A leading dot: what a killed run leaves behind is never taken for the file.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(temporary, 0o644)  # mkstemp makes it private
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError:
        return False
    return True
