"""WebDataset shards: tar files of images and labels (sadm_fast.data.tar_index)."""

import os
import stat
from pathlib import Path

from sadm_fast.data.checking import Progress
from sadm_fast.data.paths import broken_link
from sadm_fast.data.shards import Shard, Shards, remembered_index, stated
from sadm_fast.data.source import printable
from sadm_fast.data.tar_index import build_index
from sadm_fast.errors import UserError

_VERSION = 2  # of the remembered indices


class TarShards(Shards):
    """The images of WebDataset shards, in the order of shard names and of members within one."""

    @staticmethod
    def scan(path: str | Path, progress: Progress | None = None) -> "TarShards":
        """List the shards of a folder (*.tar, by name) or one shard; with the index of an earlier scan if there is one.

        Making the index reads all tar headers; progress is then called with (shards done, shards). Classes are
        "0" to the largest label. Raises UserError: no such path, no *.tar in it, no permission, and all that
        build_index raises.
        """
        root = Path(path)
        shards = _list_shards(root)
        index = remembered_index(str(_VERSION), shards, lambda: build_index([shard.path for shard in shards], progress))
        classes = tuple(str(label) for label in range(int(index.labels.max()) + 1))
        return TarShards(root, shards, index, classes)


def _list_shards(root: Path) -> tuple[Shard, ...]:
    where = printable(str(root))
    try:
        status = os.stat(root)
        paths = [str(root)]
        if stat.S_ISDIR(status.st_mode):
            paths = sorted(str(entry) for entry in root.iterdir() if _is_shard(entry))
        if not paths:
            raise UserError(
                f"data.path={where}: has no .tar files; give the folder that the shards lie in "
                "(for a folder of class folders: --set data.source=folder)"
            )
        return stated(paths)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        path = getattr(error, "filename", None) or str(root)
        name = printable(str(path))
        if isinstance(error, PermissionError):
            what = f"no permission to list {name}; fix with chmod a+rx {name}"
        elif isinstance(error, OSError) and (link := broken_link(str(path), error)):
            what = f"{name} is a {link}; remove it, or bring back what it leads to"
        elif isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            what = "no such file or folder; give a folder of .tar shards or one .tar file"
        else:
            what = f"{name} cannot be read ({error.strerror}); remove it"
        raise UserError(f"data.path={where}: {what}") from None


def _is_shard(entry: Path) -> bool:
    return entry.suffix == ".tar" and not entry.name.startswith(".")
