"""Hugging Face data sets on disk: Parquet files, or the Arrow files of save_to_disk, read by row where they lie.

A row holds an encoded image, as struct<bytes, path> or plain bytes, and a whole number that is its class. Which files
are there is in sadm_fast.data.table_files, which columns they are in sadm_fast.data.table_columns.

Parquet gives no single row: the row group around it is read, and the last ones used are kept. Arrow files are mapped
into memory, and a row is one copy.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from sadm_fast.data.checking import Progress
from sadm_fast.data.source import ImageSource, PackedNames, hash_names, printable
from sadm_fast.data.table_columns import Columns, find_columns
from sadm_fast.data.table_files import ARROW, TableFile, list_tables
from sadm_fast.errors import UserError

_THREADS = 16  # that list files: more than cores, as it is waiting
_OPEN_TABLES = 1024  # footers and maps that a process keeps
_MAX_CLASSES = 1 << 20

KEPT_BYTES = 256 << 20
"""Row groups of Parquet that a process keeps; one that is larger is kept alone."""


@dataclass(frozen=True, eq=False)
class TableRows(ImageSource):
    """The images of tables, in the order of file names and of rows within one."""

    root: str  # what was scanned: a folder, a file, or what the names of files begin with
    files: tuple[TableFile, ...]
    starts: np.ndarray  # int64 [files + 1], rows before each file
    image: str  # name of the column
    rows: np.ndarray  # int64 [N], counted through all files
    labels: np.ndarray  # int64 [N]
    classes: tuple[str, ...]

    @property
    def where(self) -> str:
        return printable(self.root)

    def name(self, index: int) -> str:
        file, row = self._place(index)
        return printable(f"{file.path}: row {row}")

    def read(self, index: int) -> bytes:
        file, row = self._place(index)
        try:
            value = _opened(file, self.image).value(row)
        except _arrow().ArrowException as error:  # some of these are no OSError
            raise OSError(" ".join(str(error).split())) from None
        encoded, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if encoded is None:
            raise OSError("the row holds " + (f"only the name {path!r}, no bytes" if path else "no image"))
        return encoded

    def _place(self, index: int) -> tuple[TableFile, int]:
        row = int(self.rows[index])
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[number], row - int(self.starts[number])

    def stamp(self) -> str:
        return json.dumps([(os.path.basename(path), size, modified) for path, size, modified in self.files])

    def subset(self, indices: np.ndarray) -> "TableRows":
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and sizes of the files, classes, labels and the chosen rows."""
        names = PackedNames.from_iterable(f"{os.path.basename(file.path)} {file.size}" for file in self.files)
        digest = hash_names(names, PackedNames.from_iterable(self.classes))
        for numbers in (self.starts, self.rows, self.labels):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    @staticmethod
    def scan(path: str | Path, progress: Progress | None = None) -> "TableRows":
        """List the rows of tables and read their labels, not their images.

        path: a folder of tables of one split, one table, or what the names of some begin with (DIR/train).
        progress: called with (files done, files).
        Raises UserError: pyarrow is missing; no such tables, of several splits, or some missing or damaged; no column
        of images or labels; labels without a class.
        """
        where = printable(str(path))
        _arrow()
        files = list_tables(Path(path))
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = []
            for part in pool.map(_list_rows, files):
                parts.append(part)
                if progress is not None:
                    progress(len(parts), len(files))
        first = parts[0].columns
        for file, part in zip(files, parts, strict=True):
            if part.columns != first:
                raise UserError(
                    f"data.path={where}: {os.path.basename(file.path)} has {part.columns.described()}, and"
                    f" {os.path.basename(files[0].path)} {first.described()}; give files of one data set"
                )
        starts = np.cumsum([0, *(part.rows for part in parts)])
        if not starts[-1]:
            raise UserError(f"data.path={where}: the tables hold no rows; give files that hold some")
        labels = np.concatenate([part.labels for part in parts])
        classes = first.classes or tuple(map(str, range(int(labels.max()) + 1)))
        return TableRows(str(path), files, starts, first.image, np.arange(starts[-1]), labels, classes)


class _Listed(NamedTuple):
    """What scanning one file gives."""

    columns: Columns
    rows: int
    labels: np.ndarray  # int64 [rows]


def _list_rows(file: TableFile) -> _Listed:
    where, pa = printable(file.path), _arrow()
    try:
        table = _Mapped(file) if file.path.endswith(ARROW) else _Grouped(file)
        columns = find_columns(table.schema, file.path)
        if columns.label is None:
            return _Listed(columns, table.rows, np.zeros(table.rows, dtype=np.int64))
        column = table.column(columns.label)
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0]
            raise UserError(f"{where}: row {row} has no {columns.label}; remove such rows, or fill them in")
        labels = column.to_numpy().astype(np.int64)
    except PermissionError:
        raise UserError(f"{where}: no permission to read it; fix with chmod a+r") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: is not the table that its name says, or is cut off ({reason}); fetch or write it again"
        ) from None
    number = len(columns.classes) if columns.classes else _MAX_CLASSES
    bad = np.flatnonzero((labels < 0) | (labels >= number))
    if len(bad):
        what = f"only {number} classes are named" if columns.classes else f"must be from 0 to {_MAX_CLASSES - 1}"
        remedy = "take the split that has labels, or remove such rows" if labels[bad[0]] < 0 else "correct it"
        raise UserError(f"{where}: row {bad[0]} has {columns.label} {labels[bad[0]]}, and {what}; {remedy}")
    return _Listed(columns, table.rows, labels)


class _Grouped:
    """A Parquet file: its footer, and rows by way of their groups."""

    def __init__(self, file: TableFile, image: str = "") -> None:
        from pyarrow import parquet

        self._path, self._image = file.path, image
        self._open = lambda metadata=None: parquet.ParquetFile(file.path, metadata=metadata)
        with self._open() as opened:
            self._metadata, self.schema = opened.metadata, opened.schema_arrow
        groups = range(self._metadata.num_row_groups)
        self._ends = np.cumsum([self._metadata.row_group(group).num_rows for group in groups], dtype=np.int64)
        self.rows = self._metadata.num_rows

    def column(self, name: str) -> Any:
        with self._open(self._metadata) as opened:
            return opened.read(columns=[name], use_threads=False).column(name)

    def value(self, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))

        def read() -> Any:  # a file of its own: they are not for several threads
            with self._open(self._metadata) as opened:
                return opened.read_row_group(group, columns=[self._image], use_threads=False).column(self._image)

        values = _GROUPS.get((self._path, self._image, group), read)
        return values[row - int(self._ends[group]) + len(values)].as_py()


class _Mapped:
    """An Arrow file, a stream (as save_to_disk writes) or with a footer, mapped into memory."""

    def __init__(self, file: TableFile, image: str = "") -> None:
        pa = _arrow()
        mapped = pa.memory_map(file.path)
        stream = mapped.read(6) != b"ARROW1"
        mapped.seek(0)
        with (pa.ipc.open_stream if stream else pa.ipc.open_file)(mapped) as reader:
            self._table = reader.read_all()
        self._image, self.schema, self.rows = image, self._table.schema, self._table.num_rows

    def column(self, name: str) -> Any:
        return self._table.column(name)

    def value(self, row: int) -> Any:
        return self._table.column(self._image)[row].as_py()


@lru_cache(_OPEN_TABLES)
def _opened(file: TableFile, image: str) -> _Grouped | _Mapped:
    """A table in this process; OSError if it is not the one that was listed."""
    if os.stat(file.path).st_size != file.size:
        raise OSError("the file's size has changed since it was listed; start again to list it anew")
    return _Mapped(file, image) if file.path.endswith(ARROW) else _Grouped(file, image)


class _Groups:
    """The row groups used last, up to KEPT_BYTES. Threads that want the same one wait for one read."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, str, int], Future[Any]] = OrderedDict()

    def get(self, key: tuple[str, str, int], read: Callable[[], Any]) -> Any:
        with self._lock:
            found = self._kept.get(key)
            future = self._kept.setdefault(key, found or Future())
            self._kept.move_to_end(key)
        if found is None:
            try:
                future.set_result(read())
            except BaseException as error:
                with self._lock:
                    del self._kept[key]
                future.set_exception(error)
            else:
                self._shrink()
        return future.result()

    def _shrink(self) -> None:
        with self._lock:
            sizes = {key: group.result().nbytes for key, group in self._kept.items() if group.done()}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total > KEPT_BYTES:
                    total -= sizes[key]
                    del self._kept[key]


_GROUPS = _Groups()


def _arrow() -> Any:
    """The module pyarrow; UserError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"data.source=huggingface: pyarrow cannot be imported ({error}); install the extra hf (pip install pyarrow)"
        ) from error
    return pyarrow
