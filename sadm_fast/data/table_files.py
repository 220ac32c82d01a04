"""Which files of a Hugging Face data set are one split: by their folder and by what their names begin with.

DIR/train-00000-of-00005.parquet   DIR/train
DIR/data/test-00000-of-00001-0123456789abcdef.parquet   DIR/data/test
DIR/train/0000.parquet   DIR/train
DIR/train/data-00000-of-00002.arrow   DIR/train
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sadm_fast.data.source import printable
from sadm_fast.errors import UserError

PARQUET, ARROW = ".parquet", ".arrow"

_NUMBERED = re.compile(r"((?P<split>.*?)[-_.])?(?P<number>\d+)(-of-(?P<total>\d+))?(-[0-9a-f]{16})?")
_DEEPEST = 3  # folders below the one that was given


class TableFile(NamedTuple):
    """One table as it was when it was listed."""

    path: str
    size: int
    modified: int  # nanoseconds


def list_tables(root: Path) -> tuple[TableFile, ...]:
    """The tables of one split, by name: those in the folder `root`, the file `root`, or those that begin with it.

    Raises UserError: there are none, of several splits, or the names say that there should be more.
    """
    where = printable(str(root))
    try:
        splits = _splits(root)
        if not splits:
            what = "is a file of another kind" if root.is_file() else "no such folder"
            found = f"has no {PARQUET} or {ARROW} files" if root.is_dir() else what
            raise UserError(
                f"data.path={where}: {found}; give the folder that they lie in, one file,"
                " or FOLDER/SPLIT where their names begin with the split"
            )
        if len(splits) > 1:
            names = sorted(map(printable, splits))
            listed = ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
            raise UserError(f"data.path={where}: holds several splits ({listed}); give one, like {names[-1]}")
        paths = sorted(next(iter(splits.values())))
        _require_all(where, paths)
        stated = [(path, os.stat(path)) for path in paths]
        return tuple(TableFile(path, status.st_size, status.st_mtime_ns) for path, status in stated)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        path = printable(str(getattr(error, "filename", None) or root))
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.path={where}: {path} cannot be read ({reason})") from None


def holds_tables(root: Path) -> bool:
    """Whether tables lie at `root`, by a look that is quick in a folder of a million images too."""
    if root.suffix in (PARQUET, ARROW):
        return True
    try:
        if not root.is_dir():
            return str(root) in _splits(root)
        return (root / "dataset_dict.json").exists() or any(
            any(folder.glob(f"*{suffix}")) for folder in (root, root / "data") for suffix in (PARQUET, ARROW)
        )
    except OSError:
        return False


def _splits(root: Path) -> dict[str, list[str]]:
    """Paths of tables by the data.path that means them."""
    if root.is_file():
        return {str(root): [str(root)]} if root.suffix in (PARQUET, ARROW) else {}
    if not root.is_dir():
        return {
            str(root): paths for (folder, split), paths in _groups(root.parent, 0).items() if folder / split == root
        }
    groups = _groups(root, _DEEPEST)
    if len(groups) == 1:
        return {str(root): next(iter(groups.values()))}
    folders = [folder for folder, _ in groups]
    return {
        str(folder if folders.count(folder) == 1 else folder / split): paths
        for (folder, split), paths in groups.items()
    }


def _groups(root: Path, depth: int) -> dict[tuple[Path, str], list[str]]:
    """Paths of tables by their folder and by what their names begin with."""
    found: dict[tuple[Path, str], list[str]] = {}
    for path in _tables(root, depth):
        numbered = _NUMBERED.fullmatch(path.stem)
        split = path.stem if numbered is None else numbered["split"] or ""
        found.setdefault((path.parent, split), []).append(str(path))
    return found


def _tables(folder: Path, depth: int) -> Iterator[Path]:
    """The tables in a folder and in those below it, hidden ones left out."""
    if not folder.is_dir():
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.suffix in (PARQUET, ARROW):
            yield entry
        elif depth and entry.is_dir():
            yield from _tables(entry, depth - 1)


def _require_all(where: str, paths: list[str]) -> None:
    """UserError if the names count to a total that is not there."""
    found = [match for path in paths if (match := _NUMBERED.fullmatch(Path(path).stem)) and match["total"]]
    numbers = sorted(int(match["number"]) for match in found)
    totals = {int(match["total"]) for match in found}
    if not totals or len(totals) == 1 and numbers == list(range(*totals)):
        return
    missing = sorted(set(range(max(totals))) - set(numbers))
    raise UserError(
        f"data.path={where}: "
        + (
            f"lacks file {missing[0]:05d} of {max(totals)}; fetch it again"
            if missing
            else "holds files of two data sets"
        )
    )
