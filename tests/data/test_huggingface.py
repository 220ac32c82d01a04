"""Tables of `datasets`: rows read where they lie, and the line a person reads when a table is wrong."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from sadm_fast.data import huggingface, kind_of, open_images
from sadm_fast.data.checking import check
from sadm_fast.data.huggingface import TableRows
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import split
from sadm_fast.errors import UserError
from tests.data.tables import make_table, write_table


@pytest.fixture
def folder(small_folder: Path) -> ImageFolder:
    """Eleven images of two classes."""
    return ImageFolder.scan(small_folder)


@pytest.fixture(params=["parquet", "arrow"])
def tables(request: pytest.FixtureRequest, tmp_path: Path, folder: ImageFolder) -> Path:
    """The images of the folder in its order, six and five rows of one split, in row groups of two."""
    for number, part in enumerate((range(6), range(6, 11))):
        table = make_table([folder.read(i) for i in part], folder.labels[list(part)].tolist())
        path = tmp_path / "tables" / f"train-{number:05d}-of-00002.{request.param}"
        write_table(path, table, **({"row_group_size": 2} if request.param == "parquet" else {}))
    return tmp_path / "tables"


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        TableRows.scan(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_rows_come_in_the_order_of_files_and_rows(folder: ImageFolder, tables: Path) -> None:
    steps: list[tuple[int, int]] = []
    source = TableRows.scan(tables, lambda *step: steps.append(step))
    assert source.classes == ("cat", "dog") and source.where == str(tables) and steps == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(source.labels, folder.labels)
    assert [source.read(i) for i in range(11)] == [folder.read(i) for i in range(11)]
    assert source.name(7).startswith(f"{tables}/train-00001-of-00002.") and source.name(7).endswith(": row 1")
    assert check(source, threads=2).problems == ()


def test_a_source_is_pickled_and_read_by_several_threads_in_any_order(folder: ImageFolder, tables: Path) -> None:
    source = pickle.loads(pickle.dumps(TableRows.scan(tables)))  # noqa: S301
    order = np.random.default_rng(0).integers(0, 11, 200).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, order)) == [folder.read(i) for i in order]


def test_parts_of_a_source_and_their_fingerprints(tables: Path, folder: ImageFolder) -> None:
    source = TableRows.scan(tables)
    chosen = source.subset(np.array([9, 2])).subset(np.array([1, 0]))
    assert [chosen.read(i) for i in (0, 1)] == [folder.read(i) for i in (2, 9)] and chosen.name(0) == source.name(2)
    rest, held_out = split(source, 0.3, seed=0)
    assert len(rest) + len(held_out) == 11 and held_out.labels.tolist() == [0, 0, 1]
    assert len({part.fingerprint() for part in (source, chosen, rest, held_out)}) == 4
    moved = tables.rename(tables.with_name("elsewhere"))
    assert TableRows.scan(moved).fingerprint() == source.fingerprint()


def test_row_groups_are_kept_up_to_a_limit(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept = TableRows.scan(tables), []
    for limit in (1 << 20, 300, 1):  # all of them; one or two; less than one
        monkeypatch.setattr(huggingface, "KEPT_BYTES", limit)
        monkeypatch.setattr(huggingface, "_GROUPS", groups := huggingface._Groups())
        images = [source.read(i) for i in range(11)]
        assert len(set(images)) == 11
        kept.append([group.result().nbytes for group in groups._kept.values()])
    if source.files[0].path.endswith("parquet"):
        assert len(kept[0]) == 6 and 1 <= len(kept[1]) < 4 and len(kept[2]) == 1 and sum(kept[1][:-1]) <= 300
    else:
        assert kept == [[], [], []]  # mapped


def test_a_split_is_named_by_its_folder_or_by_how_its_files_begin(tmp_path: Path) -> None:
    names = [
        "data/train-00000-of-00001-0123456789abcdef.parquet",
        "data/test-00000-of-00001.parquet",
        "converted/train/0000.parquet",
        "converted/train/0001.parquet",
        "saved/data-00000-of-00001.arrow",
    ]
    for label, name in enumerate(names):
        write_table(tmp_path / "set" / name, make_table([b"x"], [label], None))
    splits = {"data/train": [0], "data/test": [1], "converted": [2, 3], "converted/train": [2, 3], "saved": [4]}
    for path, labels in splits.items():
        assert open_images(tmp_path / "set" / path, "huggingface").labels.tolist() == labels
        assert kind_of(tmp_path / "set" / path) == (
            "folder" if path == "converted" else "huggingface"
        )  # too deep to see
    assert open_images(tmp_path / "set" / names[1], "huggingface").classes == ("0", "1")
    message = _refusal(tmp_path / "set")
    assert all(str(tmp_path / "set" / name) in message for name in ("data/test", "data/train", "saved"))
    assert "holds several splits" in message and "converted/train" in message


def test_class_names_from_beside_the_tables(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data" / "train.parquet", make_table([b"x"] * 2, [0, 1], None))
    assert TableRows.scan(path).classes == ("0", "1")
    card = "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
    card += "      class_label:\n        names:\n          '0': ant\n          '1': bee\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n# A set\n")
    assert TableRows.scan(path).classes == ("ant", "bee")
    (tmp_path / "README.md").write_text("---\n{{ not: yaml\n---\n")
    info = {"features": {"label": {"names": ["cow", "dog", "elk"], "_type": "ClassLabel"}}}
    (path.parent / "dataset_info.json").write_text(json.dumps(info))
    assert TableRows.scan(path).classes == ("cow", "dog", "elk")


def test_columns_of_other_names_and_kinds(tmp_path: Path) -> None:
    binary = pyarrow.table({"id": [7, 8], "img": pyarrow.array([b"a", b"b"], pyarrow.binary()), "fine_label": [1, 0]})
    source = TableRows.scan(write_table(tmp_path / "a.parquet", binary))
    assert source.read(1) == b"b" and source.labels.tolist() == [1, 0]
    alone = TableRows.scan(write_table(tmp_path / "b.parquet", make_table([b"a", b"b"], None)))
    assert alone.classes == ("all",) and alone.labels.tolist() == [0, 0]


def test_a_row_without_an_image_is_a_broken_image(tmp_path: Path, folder: ImageFolder) -> None:
    images = [folder.read(0), None, b"no image", folder.read(3)[:-40]]
    source = TableRows.scan(write_table(tmp_path / "x.parquet", make_table(images, [0, 0, 1, 1])))
    reasons = [reason for _, reason in check(source, threads=2).problems]
    assert "the row holds only the name '1.png', no bytes" in reasons[0] and "is not an image" in reasons[1]
    assert "damaged" in reasons[2] and len(reasons) == 3


def test_a_table_that_is_damaged_after_it_was_listed(tmp_path: Path) -> None:
    images = [bytes([i]) * 5000 for i in range(4)]
    path = write_table(
        tmp_path / "x.parquet",
        make_table(images, [0] * 4),
        row_group_size=2,
        compression="snappy",
        use_dictionary=False,
    )
    source = TableRows.scan(path)
    content = bytearray(path.read_bytes())
    content[40:80] = b"\xff" * 40  # of the first row group
    path.write_bytes(content)
    with pytest.raises(OSError):
        source.read(0)
    assert source.read(2) == images[2]
    huggingface._opened.cache_clear()
    os.truncate(path, 300)
    with pytest.raises(OSError, match="size has changed"):
        source.read(3)


def _nan_labels(path: Path) -> Path:
    table = make_table([b"x"], None)
    return write_table(path / "x.parquet", table.append_column("label", pyarrow.array([0.5])))


def _cut(path: Path, suffix: str) -> Path:
    written = write_table(path / f"x.{suffix}", make_table([b"x" * 500] * 4, [0] * 4))
    os.truncate(written, written.stat().st_size - 40)
    return written


def _two_sets(path: Path) -> Path:
    write_table(path / "train-0.parquet", make_table([b"x"], [0]))
    write_table(path / "train-1.parquet", make_table([b"x"], [0], ["a", "b", "c"]))
    return path


def _incomplete(path: Path) -> Path:
    for number in (0, 2):
        write_table(path / f"train-{number:05d}-of-00003.parquet", make_table([b"x"], [0]))
    return path


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such folder": (lambda path: path / "train", "no such folder; give the folder that they lie in"),
    "an empty folder": (lambda path: path, "has no .parquet or .arrow files"),
    "another file": (lambda path: _cut(path, "arrow").rename(path / "x.txt"), "is a file of another kind"),
    "a file is missing": (_incomplete, "lacks file 00001 of 3; fetch it again"),
    "cut off": (lambda path: _cut(path, "parquet"), "is not the table that its name says, or is cut off"),
    "cut off, arrow": (lambda path: _cut(path, "arrow"), "is not the table that its name says, or is cut off"),
    "no rows": (lambda path: write_table(path / "x.parquet", make_table([], [])), "hold no rows"),
    "no images": (
        lambda path: write_table(path / "x.parquet", pyarrow.table({"text": ["a"], "label": [0]})),
        "has no column of images.*there are text .string., label .int64.",
    ),
    "two kinds of images": (
        lambda path: write_table(path / "x.parquet", pyarrow.table({"a": [b""], "b": [b""], "label": [0]})),
        "has several columns of images",
    ),
    "no labels": (
        lambda path: write_table(path / "x.parquet", make_table([b"x"], None, caption=["a"])),
        "has no column of labels.*caption .string.",
    ),
    "labels that are no numbers": (_nan_labels, "has no column of labels.*label .double."),
    "a label is missing": (
        lambda path: write_table(path / "x.parquet", make_table([b"x"] * 3, [0, None, 1])), "row 1 has no label"
    ),
    "a label without a name": (
        lambda path: write_table(path / "x.parquet", make_table([b"x"] * 3, [0, 1, 2])),
        "row 2 has label 2, and only 2 classes are named; correct it",
    ),
    "a split without labels": (
        lambda path: write_table(path / "x.parquet", make_table([b"x"] * 2, [-1, -1])),
        "row 0 has label -1, .*take the split that has labels",
    ),
    "one name twice": (
        lambda path: write_table(path / "x.parquet", make_table([b"x"], [0], ["a", "a"])), "have one twice"
    ),
    "two data sets": (_two_sets, "has images in 'image', labels in 'label', 3 classes, and .* 2 classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, case: str) -> None:
    make, message = WRONG[case]
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        TableRows.scan(make(tmp_path / "set"))
    assert str(caught.value).isprintable()


def test_tables_where_something_else_was_asked_for(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("folder", "webdataset"):
        with pytest.raises(UserError, match="it looks like --set data.source=huggingface"):
            open_images(tables, kind)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow cannot be imported" in _refusal(tables) and "pip install pyarrow" in _refusal(tables)
