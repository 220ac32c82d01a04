"""The folder for what can be made again: the demo set, indices of tar shards, results of checks."""

import os
import tempfile
from pathlib import Path


def default_cache() -> Path:
    """$SADM_CACHE, or ./datasets."""
    return Path(os.environ.get("SADM_CACHE") or "datasets")


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
