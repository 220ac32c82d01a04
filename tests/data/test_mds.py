"""MosaicML's MDS: shards of the documented layout, read in place, and the line a person reads when one is wrong."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data import mds, open_any, open_images
from sadm_fast.data.checking import check
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.mds import MdsShards
from sadm_fast.data.source import split
from sadm_fast.errors import UserError

Sample = Sequence[bytes]


def _number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little", signed=value < 0)


def _stored(image: Image.Image) -> bytes:
    """As the encoding `pil` stores it."""
    return struct.pack("<3I", *image.size, len(image.mode)) + image.mode.encode() + image.tobytes()


def write_mds(root: Path, columns: dict[str, tuple[str, int | None]], shards: Sequence[Sequence[Sample]]) -> Path:
    """Write index.json and shards of samples, of a value for each column: name -> (encoding, size); return root."""
    root.mkdir(parents=True)
    described = {
        "column_names": list(columns),
        "column_encodings": [encoding for encoding, _ in columns.values()],
        "column_sizes": [size for _, size in columns.values()],
    }
    entries = []
    for number, samples in enumerate(shards):
        bodies = []
        for sample in samples:
            sizes = [len(value) for value, (_, size) in zip(sample, columns.values(), strict=True) if size is None]
            bodies.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(sample))
        head = json.dumps(described).encode()
        first = 4 * (len(samples) + 2) + len(head)
        offsets = first + np.cumsum([0, *map(len, bodies)])
        content = struct.pack(f"<{len(offsets) + 1}I", len(samples), *offsets) + head + b"".join(bodies)
        name = f"shard.{number:05d}.mds"
        (root / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        more = {"format": "mds", "version": 2, "samples": len(samples), "compression": None, "zip_data": None}
        entries.append({**described, **more, "raw_data": raw})
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return root


COLUMNS: dict[str, tuple[str, int | None]] = {"i": ("int", 8), "t": ("str", None), "x": ("png", None), "y": ("int", 8)}


@pytest.fixture
def folder(small_folder: Path) -> ImageFolder:
    """Eleven images of two classes."""
    return ImageFolder.scan(small_folder)


@pytest.fixture
def root(tmp_path: Path, folder: ImageFolder) -> Path:
    """The images of the folder in its order, six and five samples, with a text of any length before each."""
    samples = [
        (_number(i), b"t" * (i % 3), folder.read(i), _number(label)) for i, label in enumerate(folder.labels.tolist())
    ]
    return write_mds(tmp_path / "mds", COLUMNS, [samples[:6], samples[6:]])


def test_samples_come_in_the_order_of_shards(folder: ImageFolder, root: Path, cache: Path) -> None:
    steps: list[tuple[int, int]] = []
    source = MdsShards.scan(root, lambda *step: steps.append(step))
    assert steps == [(1, 2), (2, 2)] and source.classes == ("0", "1") and source.where == str(root)
    np.testing.assert_array_equal(source.labels, folder.labels)
    assert [source.read(i) for i in range(11)] == [folder.read(i) for i in range(11)]
    assert source.name(7) == f"{root}/shard.00001.mds: sample 1" and check(source, threads=2).problems == ()
    assert isinstance(open_any(str(root)), MdsShards) and len(list((cache / "index").iterdir())) == 1
    with pytest.raises(UserError, match="it looks like --set data.source=mds"):
        open_images(root, "folder")


def test_parts_of_a_source_and_their_fingerprints(folder: ImageFolder, root: Path) -> None:
    source: MdsShards = pickle.loads(pickle.dumps(MdsShards.scan(root)))  # noqa: S301
    chosen = source.subset(np.array([9, 2])).subset(np.array([1, 0]))
    assert isinstance(chosen, MdsShards) and chosen.name(1) == source.name(9)
    assert [chosen.read(i) for i in (0, 1)] == [folder.read(i) for i in (2, 9)]
    assert len({part.fingerprint() for part in (source, chosen, *split(source, 0.3, seed=0))}) == 4
    assert MdsShards.scan(root.rename(root.with_name("moved"))).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_read_as_they_were_stored(tmp_path: Path, folder: ImageFolder, mode: str) -> None:
    images = [Image.open(BytesIO(folder.read(i))).convert(mode).crop((0, 0, 8, 5 + i)) for i in range(3)]
    samples = [(_number(i + 3, 2), _stored(image)) for i, image in enumerate(images)]
    source = MdsShards.scan(write_mds(tmp_path / "mds", {"label": ("uint16", 2), "image": ("pil", None)}, [samples]))
    assert source.labels.tolist() == [3, 4, 5] and source.classes == tuple("012345")
    for i, image in enumerate(images):
        read = Image.open(BytesIO(source.subset(np.array([i])).read(0)))
        assert read.mode == mode and read.tobytes() == image.tobytes()


def test_images_that_are_none_are_broken_images(tmp_path: Path, folder: ImageFolder) -> None:
    grey = Image.open(BytesIO(folder.read(0)))
    stored = [b"", _stored(grey.convert("CMYK")), _stored(grey)[:-1], _stored(grey)]
    source = MdsShards.scan(write_mds(tmp_path / "mds", {"x": ("pil", None)}, [[(image,) for image in stored]]))
    reasons = [reason for _, reason in check(source, threads=1).problems]
    assert source.classes == ("all",) and len(reasons) == 3
    for reason, words in zip(
        reasons, ["cut off", "mode 'CMYK'; write them as RGB", "63 bytes are not 8x8"], strict=True
    ):
        assert words in reason


def test_an_index_is_made_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = MdsShards.scan(root)
    with monkeypatch.context() as patched:
        patched.setattr(mds, "_index_shard", None)
        assert MdsShards.scan(root).fingerprint() == first.fingerprint()
    index = json.loads((root / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_names"] = ["y", "t", "x", "i"]  # the other number is the label
    (root / "index.json").write_text(json.dumps(index))
    assert MdsShards.scan(root).labels.tolist() == list(range(11))


def _index(root: Path, change: Callable[[Any], object]) -> Path:
    index = json.loads((root / "index.json").read_text())
    change(index)
    (root / "index.json").write_text(json.dumps(index))
    return root


def _patched(root: Path, place: int, content: bytes) -> Path:
    with (root / "shard.00001.mds").open("r+b") as file:
        file.seek(place)
        file.write(content)
    return root


def _packed(root: Path) -> Path:
    for shard in root.glob("*.mds"):
        shard.rename(f"{shard}.zstd")
    return root


def _other(root: Path, columns: dict[str, tuple[str, int | None]], *samples: Sample) -> Path:
    return write_mds(root / "other", columns, [samples])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda root: root / "there", "no such folder; give the folder that index.json lies in"),
    "splits": (lambda root: root.parent, "has no index.json; give one of its splits, mds"),
    "no JSON": (lambda root: (root / "index.json").write_text("{"), "index.json: not the index of MDS shards"),
    "another format": (
        lambda root: _index(root, lambda index: index["shards"][1].update(format="json")), "of format 'json', version 2"
    ),
    "other columns": (
        lambda root: _index(root, lambda index: index["shards"][1].update(column_names=["a", "t", "x", "y"])),
        "shards of different columns",
    ),
    "a path": (
        lambda root: _index(root, lambda index: index["shards"][1]["raw_data"].update(basename="../x.mds")), "outside"
    ),
    "no shards": (lambda root: _index(root, lambda index: index["shards"].clear()), "names no shards"),
    "a shard is missing": (lambda root: os.remove(root / "shard.00001.mds"), "shard.00001.mds is missing; fetch it"),
    "compressed": (_packed, r"are compressed \(shard.00000.mds.zstd\).*zstd -d FILE.zstd -o FILE"),
    "cut off": (lambda root: os.truncate(root / "shard.00001.mds", 300), "has 300 bytes, and index.json says"),
    "offsets": (lambda root: _patched(root, 8, b"\0\0\0\0"), "is not an MDS shard .its offsets are wrong"),
    "a count": (lambda root: _patched(root, 0, b"\xff\xff\xff\x7f"), "is not an MDS shard"),
    "sizes": (
        lambda root: _patched(root, struct.unpack("<I", (root / "shard.00001.mds").read_bytes()[8:12])[0], b"\xff"),
        "sample 1 is not as long as its columns",
    ),
    "no images": (lambda root: _other(root, {"text": ("str", None)}, (b"a",)), "has no column of images.*text .str."),
    "two of images": (
        lambda root: _other(root, {"a": ("png", None), "b": ("png", None)}, (b"", b"")), "has several columns of images"
    ),
    "no labels": (
        lambda root: _other(root, {"x": ("png", None), "i": ("int", 8)}, (b"", _number(0))), "has no column of labels"
    ),
    "a label": (
        lambda root: _other(root, {"x": ("png", None), "y": ("int32", 4)}, (b"", _number(0, 4)), (b"", _number(-1, 4))),
        "sample 1 has label -1; it must be a class number",
    ),
    "no samples": (lambda root: _other(root, {"x": ("png", None)}), "hold no samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(root: Path, case: str) -> None:
    make, message = WRONG[case]
    made = make(root)
    with pytest.raises(UserError, match=message) as caught:
        MdsShards.scan(made if isinstance(made, Path) else root)
    assert str(caught.value).isprintable()
