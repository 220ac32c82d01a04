"""WebDataset shards: the index, reading in place, and the line a person reads when a shard is wrong."""

import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sadm_fast.data import open_any, tar_index, webdataset
from sadm_fast.data import shards as shards_module
from sadm_fast.data.checking import check
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.source import split
from sadm_fast.data.webdataset import TarShards
from sadm_fast.errors import UserError


def _png(value: int = 0) -> bytes:
    content = BytesIO()
    Image.new("L", (8, 8), value).save(content, format="PNG")
    return content.getvalue()


PNG = _png()


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        TarShards.scan(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_samples_come_in_the_order_of_shards_and_members(small_folder: Path, small_shards: Path) -> None:
    folder, shards = ImageFolder.scan(small_folder), TarShards.scan(small_shards)
    assert len(shards) == 11 and shards.classes == ("0", "1") and shards.where == str(small_shards)
    assert shards.labels.dtype == np.int64
    np.testing.assert_array_equal(shards.labels, folder.labels)
    assert [shards.read(i) for i in range(11)] == [folder.read(i) for i in range(11)]
    assert shards.name(6) == f"{small_shards / '001.tar'}: cat6.png"


def test_one_tar_file_is_a_source_too(small_shards: Path) -> None:
    shards = TarShards.scan(small_shards / "001.tar")
    assert len(shards) == 5 and shards.labels.tolist() == [0, 1, 1, 1, 1]


def test_other_files_beside_the_shards_are_ignored(small_shards: Path) -> None:
    for name in ("README.md", "000.tar.idx", ".hidden.tar", "._001.tar"):
        (small_shards / name).write_text("x")
    assert len(TarShards.scan(small_shards)) == 11


def test_labels_in_json_and_members_of_other_kinds(make_shard: Any) -> None:
    members = [
        ("a.txt", b"a cat"), ("a.json", b'{"label": 2, "width": 8}'), ("a.jpg", PNG),
        ("b.CLS", b" 1\n"), ("b.PNG", PNG), ("b.json", b'{"label": 7}'),  # .cls comes first
        ("c.json", b"{}"), ("c.webp", PNG), ("c.cls", b"0"),
        ("only.txt", b"no sample"),
    ]  # fmt: skip
    shards = TarShards.scan(make_shard("x.tar", members))
    assert shards.labels.tolist() == [2, 1, 0] and list(shards.index.members) == ["a.jpg", "b.PNG", "c.webp"]
    assert shards.classes == ("0", "1", "2")


def test_the_key_ends_at_the_first_dot_of_the_base_name(make_shard: Any) -> None:
    members = [("./v1.0/a.b.jpg", PNG), ("./v1.0/a.cls", b"3"), ("./v1.0/b.jpg", PNG), ("./v1.0/b.cls", b"4")]
    assert TarShards.scan(make_shard("x.tar", members)).labels.tolist() == [3, 4]


def test_equal_keys_in_two_folders_are_two_samples(make_shard: Any) -> None:
    members = [("x/1.jpg", PNG), ("x/1.cls", b"0"), ("y/1.jpg", PNG), ("y/1.cls", b"1")]
    assert TarShards.scan(make_shard("x.tar", members)).labels.tolist() == [0, 1]


def test_what_file_managers_add_is_ignored(make_shard: Any) -> None:
    members = [("._1.jpg", b"x"), ("1.jpg", PNG), ("._1.cls", b"x"), ("1.cls", b"0"), ("noextension", b"x")]
    assert len(TarShards.scan(make_shard("x.tar", members))) == 1


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_odd_names(make_shard: Any, format: int) -> None:
    key = "n" * 150 + "/Kätzchen\udcff"
    path = make_shard("x.tar", [(f"{key}.png", PNG), (f"{key}.cls", b"5")], format=format)
    shards = TarShards.scan(path)
    assert shards.labels.tolist() == [5] and shards.read(0) == PNG
    assert list(shards.index.members) == [f"{key}.png"]


def test_archives_joined_end_to_end_are_one_shard(make_shard: Any) -> None:
    path = make_shard("a.tar", [("1.png", PNG), ("1.cls", b"3")])
    other = make_shard("b.tar", [("1.png", _png(9)), ("1.cls", b"5")])  # the key with which the one before ends
    empty = make_shard("c.tar", [])
    path.write_bytes(empty.read_bytes() + path.read_bytes() + empty.read_bytes() + other.read_bytes())
    shards = TarShards.scan(path)
    assert shards.labels.tolist() == [3, 5] and [shards.read(i) for i in (0, 1)] == [PNG, _png(9)]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - len(other.read_bytes()) + 700)  # within the last one
    assert "is not an uncompressed tar archive, or is cut off" in _refusal(path)


def test_what_follows_the_end_mark_and_is_no_archive(small_shards: Path) -> None:
    path = small_shards / "001.tar"
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"downloaded twice" * 100)
    message = f"{path}: what follows its end mark, from byte {end} on, is no tar archive; "
    assert _refusal(small_shards).startswith(message)


def _linked(path: Path, *members: tuple[str, Any]) -> Path:
    """A shard of files (name, content) and links: (name, "=NAME") is a hard one, (name, "-> PATH") a symbolic one."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            if isinstance(content, str):
                header.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                header.linkname = content.removeprefix("=").removeprefix("-> ")
                archive.addfile(header)
            else:
                header.size = len(content)
                archive.addfile(header, BytesIO(content))
    return path


def test_links_are_followed_inside_the_shard(tmp_path: Path) -> None:
    path = _linked(
        tmp_path / "x.tar",
        *[("./a.png", PNG), ("./a.cls", b"3")],
        *[("./b.png", "=./a.png"), ("./b.cls", "=a.cls")],  # as tar writes a file that it has met under another name
        *[("./c.png", _png(1)), ("./c.cls", "=./a.cls")],
        *[("./sub/d.png", "-> ../c.png"), ("./sub/d.cls", "-> e.cls")],
        *[("./sub/e.png", "-> d.png"), ("./sub/e.cls", b"4")],
        *[("./a.png", _png(2)), ("./a.json", b'{"label": 5}')],  # `b` was linked to the `a` before
        ("./notes.txt", "-> /elsewhere"),
    )
    shards = TarShards.scan(path)
    assert shards.labels.tolist() == [3, 3, 3, 4, 4, 5]
    assert [shards.read(i) for i in range(6)] == [PNG, PNG, _png(1), _png(1), _png(1), _png(2)]
    assert shards.name(1) == f"{path}: ./b.png"


@pytest.mark.parametrize(
    "link, message",
    [
        (("b.png", "=gone.png"), "b.png is a link to gone.png, which is not a file in the shard; write it again"),
        (("b.png", "-> /data/b.png"), "b.png is a link to /data/b.png, which is not a file in the shard"),
        (("b.png", "-> b.png"), "b.png is a link to b.png, which is not a file in the shard"),
        (("b.png", "=line\nend.png"), r"b.png is a link to line\nend.png, which"),
        (("b.cls", "-> ../labels/b.cls"), "b.cls is a link to ../labels/b.cls, which is not a file in the shard"),
    ],
)
def test_links_that_lead_out_of_the_shard_are_named(tmp_path: Path, link: tuple[str, str], message: str) -> None:
    rest = ("b.cls", b"1") if link[0] == "b.png" else ("b.png", PNG)
    path = _linked(tmp_path / "x.tar", ("a.png", PNG), ("a.cls", b"0"), link, rest)
    assert _refusal(path).startswith(f"{path}: sample b: {message}")


def test_sparse_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [("a.png", PNG), ("a.cls", b"0")]:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            if name == "a.png":
                header.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,8"}
            archive.addfile(header, BytesIO(content))
    assert _refusal(path).startswith(f"{path}: sample a: a.png is a sparse file; write the shard again without")


def test_missing_path(tmp_path: Path) -> None:
    assert "nowhere: no such file or folder" in _refusal(tmp_path / "nowhere")


def test_folder_without_shards(small_folder: Path) -> None:
    assert "has no .tar files" in _refusal(small_folder) and "data.source=folder" in _refusal(small_folder)


@pytest.mark.parametrize("content", [b"", b"this is no archive" * 100, b"\x1f\x8b" + bytes(1000)])
def test_file_that_is_no_tar_archive(small_shards: Path, content: bytes) -> None:
    (small_shards / "001.tar").write_bytes(content)
    assert f"{small_shards / '001.tar'}: is not an uncompressed tar archive, or is cut off" in _refusal(small_shards)


def test_shard_cut_off_anywhere_is_refused(small_shards: Path) -> None:
    path = small_shards / "001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512  # of the members: the end mark follows
    for length in [*range(0, end, 200), last.offset, end - 1, end, end + 511]:
        path.write_bytes(whole[:length])
        message = _refusal(small_shards)
        assert f"{path}: is not an uncompressed tar archive, or is cut off" in message, length
    path.write_bytes(whole[: end + 512])
    assert len(TarShards.scan(small_shards)) == 11


def test_damaged_header_in_the_middle(small_shards: Path) -> None:
    path = small_shards / "001.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[4].offset
    with path.open("r+b") as file:
        file.seek(header + 10)
        file.write(b"damage")
    assert f"{path}: is not an uncompressed tar archive, or is cut off" in _refusal(small_shards)


@pytest.mark.parametrize("members", [[], [("readme.txt", b"x")]])
def test_shard_without_samples(make_shard: Any, members: list[tuple[str, bytes]]) -> None:
    path = make_shard("x.tar", members)
    assert f"{path}: has no samples" in _refusal(path)


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.jpg", PNG)], "sample a has an image but no label"),
        ([("d/a.jpg", PNG), ("d/a.json", b'{"caption": "x"}')], "sample d/a has an image but no label"),
        ([("a.jpg", PNG), ("b.cls", b"1")], "sample a has an image but no label"),
        ([("a.cls", b"1")], "sample a has a label but no image"),
        ([("a.jpg", PNG), ("b.jpg", PNG), ("a.cls", b"1"), ("b.cls", b"1")], "must follow each other"),
        ([("a.jpg", PNG), ("a.png", PNG), ("a.cls", b"1")], "sample a has 2 images (a.jpg, a.png)"),
        ([("a.jpg", PNG), ("a.seg.png", PNG), ("a.cls", b"1")], "sample a has 2 images (a.jpg, a.seg.png)"),
        ([("a.jpg", PNG), ("a.cls", b"cat")], "sample a: the label is 'cat'; it must be a class number"),
        ([("a.jpg", PNG), ("a.cls", b"-1")], "the label is '-1'"),
        ([("a.jpg", PNG), ("a.cls", b"1.0")], "the label is '1.0'"),
        ([("a.jpg", PNG), ("a.cls", b"")], "the label is ''"),
        ([("a.jpg", PNG), ("a.cls", b"\xff\n7")], "the label is "),
        ([("a.jpg", PNG), ("a.json", b'{"label": true}')], "the label is 'True'"),
        ([("a.jpg", PNG), ("a.json", b'{"label": null}')], "the label is 'None'"),
        ([("a.jpg", PNG), ("a.json", b'{"label": 1.5}')], "the label is '1.5'"),
        ([("a.jpg", PNG), ("a.json", b"{")], "sample a: a.json is not JSON"),
        ([("a.jpg", PNG), ("a.cls", b"9" * 30)], "class numbers end below 1048576"),
        ([("a.jpg", PNG), ("a.cls", b"1048576")], "class numbers end below 1048576"),
        ([("a.jpg", PNG), ("a.cls", bytes(2 << 20))], "a.cls has 2097152 bytes, too many for a label"),
    ],
)
def test_sample_that_is_not_one_image_and_one_label(make_shard: Any, members: Any, message: str) -> None:
    path = make_shard("x.tar", [("0.jpg", PNG), ("0.cls", b"0"), *members])
    refusal = _refusal(path)
    assert refusal.startswith(f"{path}: sample ") and message in refusal


def test_shard_without_permission(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:  # chmod does not stop root
        if str(path).endswith("001.tar"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    assert f"{small_shards / '001.tar'}: no permission to read it" in _refusal(small_shards)


def test_folder_without_permission(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"no permission to list {small_shards}" in _refusal(small_shards)


@pytest.mark.parametrize(
    "name, problem",
    [
        ("gone.tar", "gone.tar is a link to /unmounted/disk, where nothing is"),
        ("loop.tar", "loop.tar is a link to loop.tar, in a circle"),
        ("pipe.tar", "pipe.tar: cannot be read (it is a named pipe, not a plain file)"),
        ("line\nend.tar", r"line\nend.tar: cannot be read (it is a folder, not a plain file)"),
    ],
)
def test_what_is_called_like_a_shard_and_is_none(small_shards: Path, name: str, problem: str) -> None:
    path = small_shards / name
    if name == "pipe.tar":
        os.mkfifo(path)
    elif "\n" in name:
        path.mkdir()
    else:
        path.symlink_to("/unmounted/disk" if name == "gone.tar" else name)
    assert f"{small_shards}/{problem}; remove it" in _refusal(small_shards)


@pytest.mark.parametrize(
    "path, problem", [("n" * 300, "cannot be read (File name too long)"), ("a\0b.tar", "no such file or folder")]
)
def test_path_that_cannot_exist(tmp_path: Path, path: str, problem: str) -> None:
    assert problem in _refusal(tmp_path / path)
    with pytest.raises(UserError):
        open_any(str(tmp_path / path))


def _no_index(*_: object) -> None:
    pytest.fail("indexed again")


def test_the_index_is_made_once(small_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = TarShards.scan(small_shards)
    assert len(list((cache / "index").iterdir())) == 1
    monkeypatch.setattr(webdataset, "build_index", _no_index)
    after = TarShards.scan(small_shards)
    for a, b in zip(before.index[:4], after.index[:4], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert list(before.index.members) == list(after.index.members)
    assert TarShards.scan(small_shards.rename(small_shards.parent / "moved")).fingerprint() == before.fingerprint()


def test_changed_shards_are_indexed_again(small_shards: Path, make_shard: Any) -> None:
    TarShards.scan(small_shards).read(6)
    path = make_shard("001.tar", [("new.png", PNG), ("new.cls", b"4")])
    os.utime(path, ns=(0, 1))  # as if time had passed
    shards = TarShards.scan(small_shards)
    assert len(shards) == 7 and shards.labels[-1] == 4 and shards.read(6) == PNG
    path.unlink()
    assert len(TarShards.scan(small_shards)) == 6


def _foreign_indices(whole: bytes) -> dict[str, bytes]:
    def changed(**arrays: Any) -> bytes:
        with np.load(BytesIO(whole)) as file:
            content = BytesIO()
            np.savez(content, **{**file, **arrays})
        return content.getvalue()

    return {
        "empty": b"",
        "text": b"no index",
        "cut off": whole[: len(whole) // 2],
        "one bit": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "an array": BytesIO(np.arange(3).tobytes()).read(),
        "a pickle": changed(labels=np.array([{}] * 11, dtype=object)),
        "shorter": changed(sizes=np.zeros(3, dtype=np.int64)),
        "other types": changed(offsets=np.zeros(11, dtype=np.float32)),
        "a shard too many": changed(shards=np.full(11, 2, dtype=np.int32)),
        "a negative label": changed(labels=np.full(11, -1)),
        "names cut off": changed(members=np.zeros(3, dtype=np.uint8)),
    }


def test_a_damaged_or_foreign_index_is_made_anew(small_shards: Path, cache: Path) -> None:
    expected = TarShards.scan(small_shards)
    (path,) = (cache / "index").iterdir()
    whole = path.read_bytes()
    for what, content in _foreign_indices(whole).items():
        path.write_bytes(content)
        assert TarShards.scan(small_shards).fingerprint() == expected.fingerprint(), what
        assert path.read_bytes() == whole, what


def test_a_cache_that_cannot_be_written_is_done_without(small_shards: Path, cache: Path) -> None:
    cache.write_text("a file in its place")
    assert len(TarShards.scan(small_shards)) == len(TarShards.scan(small_shards)) == 11


def test_the_shards_own_folder_is_never_written_to(small_shards: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [small_shards, *small_shards.iterdir()]}
    shards = TarShards.scan(small_shards)
    shards.read(3)
    assert {path: path.stat().st_mtime_ns for path in [small_shards, *small_shards.iterdir()]} == before


def test_progress_counts_shards(small_shards: Path) -> None:
    seen: list[tuple[int, int]] = []
    TarShards.scan(small_shards, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_processes_make_the_same_index(small_shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TarShards.scan(small_shards)
    (cache / "index").rename(cache / "elsewhere")
    monkeypatch.setattr(tar_index, "PARALLEL_FROM_BYTES", 0)
    monkeypatch.setattr(tar_index, "_index_shard", _index_shard_elsewhere)
    assert TarShards.scan(small_shards).fingerprint() == expected.fingerprint()
    (small_shards / "001.tar").write_bytes(b"")
    assert "001.tar: is not an uncompressed tar archive" in _refusal(small_shards)


_index_shard_here = tar_index._index_shard


def _index_shard_elsewhere(path: str) -> Any:
    assert multiprocessing.parent_process() is not None, "not in another process"
    return _index_shard_here(path)


def test_a_subset_and_a_split_keep_what_belongs_together(small_shards: Path) -> None:
    shards = TarShards.scan(small_shards)
    part = shards.subset(np.array([9, 2]))
    assert [part.name(i) for i in (0, 1)] == [shards.name(9), shards.name(2)]
    assert [part.read(i) for i in (0, 1)] == [shards.read(9), shards.read(2)]
    assert part.labels.tolist() == [1, 0] and part.classes == shards.classes and len(part) == 2
    rest, held = split(shards, 0.25, seed=0)
    assert len(rest) + len(held) == 11 and np.bincount(held.labels).tolist() == [2, 1]


def test_the_fingerprint_follows_names_and_labels(make_shard: Any) -> None:
    def fingerprint(shard: str, key: str, label: bytes, padding: bytes = b"x") -> str:
        path = make_shard(shard, [("a.txt", padding), (f"{key}.png", PNG), (f"{key}.cls", label)])
        return TarShards.scan(path).fingerprint()

    one = fingerprint("0.tar", "a", b"1")
    assert fingerprint("0.tar", "a", b"1", padding=bytes(5000)) == one  # other offsets, the same samples
    others = {fingerprint("1.tar", "a", b"1"), fingerprint("0.tar", "b", b"1"), fingerprint("0.tar", "a", b"2")}
    assert len(others) == 3 and one not in others


def test_a_check_finds_a_damaged_image_inside_a_shard(make_shard: Any) -> None:
    path = make_shard("x.tar", [("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG[:45]), ("b.cls", b"0")])
    shards = TarShards.scan(path)
    ((name, reason),) = check(shards, threads=2).problems
    assert name == f"{path}: b.png" and reason.startswith("the image is damaged")


def test_a_shard_that_changed_or_vanished_after_listing_is_an_os_error(small_shards: Path) -> None:
    shards = TarShards.scan(small_shards)
    shards.read(0)  # opens the first shard
    for shard, index in (("000.tar", 0), ("001.tar", 8)):
        os.truncate(small_shards / shard, 700)
        with pytest.raises(OSError, match="size has changed"):
            shards.read(index)
    (small_shards / "001.tar").unlink()
    shards_module._opened.cache_clear()
    with pytest.raises(FileNotFoundError):
        shards.read(8)


def test_fewer_bytes_than_the_image_has_are_an_os_error(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TarShards.scan(small_shards)
    real_pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real_pread(descriptor, size - 3, offset))
    with pytest.raises(OSError, match="ends 3 bytes too early"):
        shards.read(0)


def _open_below(folder: Path) -> int:
    """How many descriptors of this process are of files in a folder."""
    links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(folder)) for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_open_descriptors_are_bounded_and_threads_may_share_them(
    make_shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = shards_module._OPEN_SHARDS + 20
    contents = [_png(i) for i in range(count)]
    for i, content in enumerate(contents):
        root = make_shard(f"{i:03d}.tar", [("a.png", content), ("a.cls", b"0")]).parent
    shards = TarShards.scan(root)
    wanted = np.random.default_rng(0).integers(count, size=2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.read, wanted)) == [contents[i] for i in wanted]
    assert 0 < _open_below(root) <= shards_module._OPEN_SHARDS
    shards_module._opened.cache_clear()
    assert _open_below(root) == 0


def test_a_pickle_holds_names_and_numbers_but_no_descriptors(small_shards: Path) -> None:
    shards = TarShards.scan(small_shards)
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301
    assert [copy.read(i) for i in range(11)] == [shards.read(i) for i in range(11)]
    assert copy.fingerprint() == shards.fingerprint()
