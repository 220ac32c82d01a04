"""Is every shard of a cache still what encode.py wrote? Hashing ImageNet takes minutes, so the answer is remembered."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sadm_fast.data.cache import default_cache, remember
from sadm_fast.data.latents import MANIFEST, LatentSource

Progress = Callable[[int, int], None]  # shards done, of how many


def check_shards(source: LatentSource, *, threads: int, progress: Progress | None = None) -> list[str]:
    """Read all shards and compare their hashes: one line for each that differs. A clean result is remembered."""

    def damage(shard: dict[str, Any]) -> str | None:
        path = source.root / shard["file"]
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]:
                    return None
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror or error})"
        return f"{path}: does not match its hash in {MANIFEST}"

    state = _state(source)
    problems = []
    with ThreadPoolExecutor(threads) as pool:
        for done, problem in enumerate(pool.map(damage, source.shards), start=1):
            if problem:
                problems.append(problem)
            if progress is not None:
                progress(done, len(source.shards))
    if not problems:
        remember(_path(source), json.dumps(state).encode())
    return problems


def checked_shards(source: LatentSource, *, threads: int, progress: Progress | None = None) -> list[str]:
    """As `check_shards`, but nothing is read if these files were found whole before and have not changed since."""
    try:
        if json.loads(_path(source).read_bytes()) == _state(source):
            return []
    except (OSError, ValueError):
        pass  # never checked, or the note is damaged
    return check_shards(source, threads=threads, progress=progress)


def _path(source: LatentSource) -> Path:
    identity = f"{source.fingerprint()} {source.root.absolute()}"
    return default_cache() / "checked" / f"latents-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def _state(source: LatentSource) -> list[list[int]]:
    """Size and time of change of each shard."""
    stats = [(source.root / shard["file"]).stat() for shard in source.shards]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]
