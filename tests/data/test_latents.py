"""Cached latents: what is written is read back, and what is damaged is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sadm_fast.data.latents import (
    ENCODING,
    MANIFEST,
    Encoding,
    LatentCache,
    check_shards,
    checked_shards,
    shard_record,
    write_shard,
)
from sadm_fast.errors import UserError
from tests.data.latent_caches import make_encoding, make_moments, write_cache


@pytest.fixture(params=[("float16", True), ("float16", False), ("float32", True)], ids=str)
def encoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Encoding:
    dtype, native = request.param
    if not native:
        monkeypatch.setattr("sadm_fast.data.latents.has_streams", lambda: False)
    return make_encoding(dtype=dtype)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "latents")


def test_what_is_written_is_read(tmp_path: Path, encoding: Encoding) -> None:
    source = LatentCache.open(write_cache(tmp_path / "written", encoding))
    moments, labels = make_moments(encoding)
    assert len(source) == 11 and source.classes == ("ant", "bee", "cat")
    np.testing.assert_array_equal(source.labels, labels)
    indices, mirror = np.array([10, 0, 3, 4, 7]), np.array([True, False, True, True, False])
    out = source.buffer(5)
    source.read(indices, mirror, out)
    np.testing.assert_array_equal(out, moments[indices, mirror.astype(int)])


def test_a_batch_from_one_shard_and_one_from_several_are_the_same_rows(cache: Path) -> None:
    source, (moments, _) = LatentCache.open(cache), make_moments(make_encoding())
    for indices in (np.array([4, 6, 5]), np.array([4, 6, 8])):
        out = source.buffer(3)
        source.read(indices, np.zeros(3, dtype=bool), out)
        np.testing.assert_array_equal(out, moments[indices, 0])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=20), st.integers(0, 2**20))
def test_any_choice_of_samples_is_read_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], flips: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "any-choice"
    source = LatentCache.open(root if root.exists() else write_cache(root))
    mirror = np.array([bool(flips >> i & 1) for i in range(len(indices))])
    out = source.buffer(len(indices))
    source.read(np.array(indices), mirror, out)
    np.testing.assert_array_equal(out, make_moments(make_encoding())[0][indices, mirror.astype(int)])


def test_a_subset_keeps_rows_labels_and_names_together(cache: Path) -> None:
    source = LatentCache.open(cache)
    chosen = source.subset(np.array([9, 2])).subset(np.array([1, 0]))
    assert len(chosen) == 2 and chosen.labels.tolist() == source.labels[[2, 9]].tolist()
    assert chosen.name(1) == source.name(9) and chosen.name(1).endswith("00002.safetensors: row 1")
    assert torch.equal(chosen.means(np.array([0, 1])), source.means(np.array([2, 9])))
    assert chosen.fingerprint() != source.fingerprint()


def test_means_are_scaled_latents_of_the_image_itself(cache: Path) -> None:
    moments, _ = make_moments(make_encoding())
    expected = (torch.from_numpy(moments[[3, 8], 0, 0]) - 0.25) * 0.5
    assert torch.equal(LatentCache.open(cache).means(np.array([3, 8])), expected)


def test_the_shards_are_plain_safetensors(cache: Path) -> None:
    tensors = load_file(cache / "shards/00001.safetensors")
    moments, labels = make_moments(make_encoding())
    np.testing.assert_array_equal(tensors["moments"], moments[4:8])
    np.testing.assert_array_equal(tensors["labels"], labels[4:8])


def test_writing_the_same_shard_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    both = [write_cache(tmp_path / name) for name in ("a", "b")]
    for name in ("shards/00000.safetensors", "shards/00000.json", MANIFEST):
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()
    assert LatentCache.open(both[0]).fingerprint() == LatentCache.open(both[1]).fingerprint()


def test_other_contents_have_another_fingerprint(tmp_path: Path) -> None:
    a, b = (LatentCache.open(write_cache(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert a.fingerprint() != b.fingerprint()


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = make_encoding()
    moments, labels = make_moments(encoding)
    (tmp_path / "shards").mkdir()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, moments[:4], labels[:4], [])
    assert list((tmp_path / "shards").iterdir()) == [] and shard_record(tmp_path, 0) is None


def test_a_record_counts_only_with_its_whole_shard(cache: Path) -> None:
    assert shard_record(cache, 1) is not None
    path = cache / "shards/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert shard_record(cache, 1) is None and shard_record(cache, 0) is not None and shard_record(cache, 99) is None


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def unfinished(root: Path) -> None:
    (root / MANIFEST).rename(root / ENCODING)


def cut_short(root: Path) -> None:
    path = root / "shards/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def shifted_tensor(root: Path) -> None:
    path = root / "shards/00001.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["moments"]["data_offsets"][0] += 64  # as long as before, but from a place where it does not fit
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (unfinished, "the cache is not finished; start encode.py again"),
    "no manifest": (lambda root: (root / MANIFEST).unlink(), r"holds no latents \(manifest.json: No such file"),
    "not json": (lambda root: (root / MANIFEST).write_text("{"), "not a manifest this code reads"),
    "a list": (lambda root: (root / MANIFEST).write_text("[]"), "not a manifest this code reads"),
    "other format": (
        lambda root: edit_manifest(root, lambda m: m["encoding"].update(format="x/9")),
        "format 'x/9', this code reads",
    ),
    "no shards": (lambda root: edit_manifest(root, lambda m: m["shards"].clear()), "the cache holds no samples"),
    "outside": (
        lambda root: edit_manifest(root, lambda m: m["shards"][0].update(file="../../x.safetensors")),
        r"names '../../x.safetensors', which is outside of the cache",
    ),
    "missing shard": (lambda root: (root / "shards/00001.safetensors").unlink(), "00001.safetensors: cannot be read"),
    "cut short": (cut_short, r"00001.safetensors: not the shard of its manifest \(it is cut short"),
    "shifted tensor": (shifted_tensor, "00001.safetensors: not the shard of its manifest"),
    "empty shard": (lambda root: (root / "shards/00001.safetensors").write_bytes(b""), "not the shard of its manifest"),
    "other shape": (
        lambda root: edit_manifest(root, lambda m: m["encoding"].update(latent_channels=3)),
        r"moments is float32 \[4, 2, 2, 4, 4, 4\], not float32 \[4, 2, 2, 3, 4, 4\]",
    ),
    "labels outside": (
        lambda root: edit_manifest(root, lambda m: m["encoding"].update(classes=["ant"])),
        "holds labels outside of the manifest's 1 classes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_one_line(cache: Path, damage: str) -> None:
    break_it, message = DAMAGES[damage]
    break_it(cache)
    with pytest.raises(UserError, match=message) as caught:
        LatentCache.open(cache)
    assert "\n" not in str(caught.value) and str(cache) in str(caught.value)


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; encode the images first \(encode.py\)"):
        LatentCache.open(tmp_path / "nothing")


ANEW = "delete it and encode again, it alone is made anew"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_by_its_hash(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "remembered"))
    assert check_shards(LatentCache.open(cache), threads=2) == []
    flip_a_bit(cache / "shards/00001.safetensors")
    calls: list[tuple[int, int]] = []
    problems = check_shards(LatentCache.open(cache), threads=2, progress=lambda *done: calls.append(done))
    assert problems == [f"{cache / 'shards/00001.safetensors'}: does not match its hash in manifest.json; {ANEW}"]
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_values_that_are_not_finite_are_found_though_their_hash_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "remembered"))
    encoding = make_encoding(dtype="float16")
    moments, _ = make_moments(encoding)
    moments[6, 1, 0, 3, 2, 1] = np.inf
    moments[7, 0, 1, 0, 0, 0] = np.nan
    root = write_cache(tmp_path / "cache", encoding, moments=moments)
    source = LatentCache.open(root)
    for _ in range(2):  # a second time as well: only what is whole is remembered
        (problem,) = checked_shards(source, threads=1)
        assert problem.startswith(
            f"{root / 'shards/00001.safetensors'}: 2 of 4 latents hold values that are not finite"
        )
        assert "latents.dtype=float32" in problem


def test_a_clean_check_is_remembered_until_a_file_changes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SADM_CACHE", str(tmp_path / "remembered"))
    read: list[tuple[int, int]] = []

    def problems() -> list[str]:
        read.clear()
        return checked_shards(LatentCache.open(cache), threads=1, progress=lambda *done: read.append(done))

    assert problems() == [] and len(read) == 3
    assert problems() == [] and read == []
    flip_a_bit(cache / "shards/00002.safetensors")
    assert len(problems()) == 1 and len(read) == 3
    assert len(problems()) == 1  # a damaged cache is not remembered as checked
