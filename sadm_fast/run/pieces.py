"""Pieces of an engine's state (engine/state.py) in safetensors files: their keys, and reading any range of them.

A key is KIND/START/NAME: what the piece is, where it begins in the flattened parameter, and the parameter.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor


def key(kind: str, name: str, start: int) -> str:
    """The name of a piece in a file."""
    return f"{kind}/{start}/{name}"


def parse_key(stored: str) -> tuple[str, str, int]:
    """(kind, name, start) of a key; ValueError if it is none."""
    kind, start, name = stored.split("/", 2)
    return kind, name, int(start)


class SavedPieces:
    """Pieces in safetensors files, by any number of ranks, read as ranges of parameters; use as a context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._open = ExitStack()
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}  # (start, size, file, key)

    def __enter__(self) -> Self:
        for path in self._files:
            file = self._open.enter_context(safe_open(path, framework="pt"))
            stored_keys: list[str] = list(file.keys())  # the file itself is no mapping
            for stored in stored_keys:
                kind, name, start = parse_key(stored)
                size = math.prod(file.get_slice(stored).get_shape())
                self._places.setdefault((kind, name), []).append((start, size, file, stored))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start + count of a flattened parameter, in memory of their own: [count].

        Raises:
            KeyError: some of them were not saved.
        """
        result: Tensor | None = None
        covered = 0
        for first, size, file, stored in self._places.get((kind, name), ()):
            low, high = max(first, start), min(first + size, start + count)
            if low >= high:
                continue
            view = file.get_slice(stored)
            flat = len(view.get_shape()) == 1  # else a buffer, which is read as a whole
            piece = view[low - first : high - first] if flat else file.get_tensor(stored).flatten()
            if len(piece) == count:
                return piece
            if result is None:
                result = torch.empty(count, dtype=piece.dtype)
            result[low - start : high - start] = piece
            covered += high - low
        if result is None or covered != count:
            raise KeyError(f"{kind} of {name}: {covered} of {count} values from {start} on are there")
        return result
