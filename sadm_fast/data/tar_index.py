"""The index of WebDataset shards: where in which tar file the bytes of each image lie, and its label.

A sample is a run of members with one key, the name up to the first dot of its last part: 0001.jpg and 0001.cls
are one sample, as are 0001.jpg and 0001.json. Making an index reads the tar headers and the labels, and skips
the images.
"""

import json
import os
import tarfile
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby

import numpy as np

from sadm_fast.data.checking import Progress
from sadm_fast.data.image_folder import EXTENSIONS
from sadm_fast.data.paths import open_plain_file
from sadm_fast.data.shards import MAX_CLASSES, ShardIndex
from sadm_fast.data.source import PackedNames, printable
from sadm_fast.data.tar_members import Member, read_members
from sadm_fast.data.workers import end_with_trainer, worker_context
from sadm_fast.errors import UserError

_MAX_LABEL_BYTES = 1 << 20
_MAX_PROCESSES = 16

PARALLEL_FROM_BYTES = 4 << 30
"""Shards of less together are indexed by this process: others need seconds to start.

Reading headers is Python code, 20,000 samples a second. Threads would share one core, and were slower than it.
"""


def build_index(paths: Sequence[str], progress: Progress | None = None) -> ShardIndex:
    """The index of tar files, in the order of `paths` and of members within each.

    progress is called with (shards done, shards). Raises UserError that names the shard: no permission, not a tar
    archive or cut off, without samples, or with a sample that is not one image and one class number.
    """
    processes = min(len(paths), os.cpu_count() or 1, _MAX_PROCESSES)
    if processes == 1 or sum(map(_size, paths)) < PARALLEL_FROM_BYTES:
        parts = _collect(map(_index_shard, paths), len(paths), progress)
    else:
        with ProcessPoolExecutor(processes, worker_context(__name__), end_with_trainer) as pool:
            parts = _collect(pool.map(_index_shard, paths), len(paths), progress)
    return ShardIndex(
        np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.labels) for part in parts]),
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.labels for part in parts]),
        PackedNames.from_iterable(name for part in parts for name in part.members),
    )


def _size(path: str) -> int:
    return os.stat(path).st_size


def _collect(parts: Iterable[ShardIndex], total: int, progress: Progress | None) -> list[ShardIndex]:
    collected = []
    for part in parts:
        collected.append(part)
        if progress is not None:
            progress(len(collected), total)
    return collected


def _index_shard(path: str) -> ShardIndex:
    """The index of one shard, as shard 0."""
    offsets, sizes, labels = array("q"), array("q"), array("q")
    names = []
    try:
        with open(path, "rb", opener=open_plain_file) as file:
            keyed = (member for member in read_members(path, file) if _key(member.name))
            for (_, key), members in groupby(keyed, key=lambda member: (member.archive, _key(member.name))):
                sample = _sample(path, key, list(members), file.fileno())
                if sample is not None:
                    image, label = sample
                    offsets.append(image.offset)
                    sizes.append(image.size)
                    labels.append(label)
                    names.append(image.name)
    except PermissionError:
        raise UserError(f"{printable(path)}: no permission to read it; fix with chmod a+r") from None
    except tarfile.TarError as error:
        raise UserError(
            f"{printable(path)}: is not an uncompressed tar archive, or is cut off ({error}); "
            "fetch or write it again, or remove it"
        ) from None
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror or error}); remove it") from None
    if not names:
        raise UserError(
            f"{printable(path)}: has no samples; a sample is an image and a label: 0001.jpg and 0001.cls or 0001.json"
        )
    return ShardIndex(
        np.zeros(len(names), dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(sizes, dtype=np.int64),
        np.array(labels, dtype=np.int64),
        PackedNames.from_iterable(names),
    )


def _key(name: str) -> str:
    """The sample that a member belongs to; empty for hidden files and names without an extension."""
    folder, slash, base = name.rpartition("/")
    key, dot, _ = base.partition(".")
    return f"{folder}{slash}{key}" if key and dot else ""


def _sample(path: str, key: str, members: Sequence[Member], descriptor: int) -> tuple[Member, int] | None:
    """(image member, label) of one sample; None if it has neither. Members of other kinds are ignored.

    Raises UserError: more than one image, an image without label or the reverse, a label that is no class number.
    """
    where = f"{printable(path)}: sample {printable(key)}"
    images = [member for member in members if member.name.lower().endswith(EXTENSIONS)]
    label = _label(where, members, descriptor)
    if not images and label is None:
        return None
    if len(images) > 1:
        raise UserError(
            f"{where} has {len(images)} images ({', '.join(printable(image.name) for image in images[:3])}); leave one"
        )
    if not images or label is None:
        what = "an image but no label (.cls, or .json with a label)" if images else "a label but no image"
        raise UserError(
            f"{where} has {what}; the members of a sample must follow each other (tar --sort=name) "
            "and have the same name up to the first dot"
        )
    if images[0].problem:
        raise UserError(f"{where}: {images[0].problem}")
    return images[0], label


def _label(where: str, members: Sequence[Member], descriptor: int) -> int | None:
    """The label in a sample's .cls, or else its .json; None if it has neither, or the .json has no label."""
    for extension in (".cls", ".json"):
        for member in members:
            if not member.name.lower().endswith(extension):
                continue
            if member.problem:
                raise UserError(f"{where}: {member.problem}")
            if member.size > _MAX_LABEL_BYTES:
                raise UserError(f"{where}: {printable(member.name)} has {member.size} bytes, too many for a label")
            content = os.pread(descriptor, member.size, member.offset)
            if extension == ".cls":
                return _class_number(where, content.decode("ascii", "replace").strip())
            try:
                fields = json.loads(content)
            except ValueError:
                raise UserError(f"{where}: {printable(member.name)} is not JSON; write it again") from None
            if isinstance(fields, dict) and "label" in fields:
                return _class_number(where, fields["label"])
    return None


def _class_number(where: str, value: object) -> int:
    text = str(value)
    if type(value) not in (int, str) or not (text.isascii() and text.isdigit()):
        raise UserError(f"{where}: the label is {text[:40]!r}; it must be a class number: 0, 1, 2, ...")
    if len(text) > 9 or int(text) >= MAX_CLASSES:
        raise UserError(f"{where}: the label is {text[:40]}; class numbers end below {MAX_CLASSES}")
    return int(text)
