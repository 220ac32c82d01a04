"""The check for broken images before training: unreadable, truncated, empty, or of a kind that is not supported.

An image is sound if its kind is supported (refused_kind) and Pillow decodes all of it; what is broken here is broken
in training, whatever the loader. No decoder notices bytes changed in the middle of a JPEG's entropy-coded data: they
decode, in Pillow and in DALI, to a picture with a smear in it.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from sadm_fast.data.paths import broken_link
from sadm_fast.data.source import ImageSource, printable
from sadm_fast.errors import UserError
from sadm_fast.files import default_cache, remember

Progress = Callable[[int, int], None]  # images (or shards) done, of how many

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM")  # MPO: a camera's JPEG with a second picture behind it
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
_REMEDY = "remove it or replace it"
_MAX_SAMPLED = 2_000  # headers that the quick look opens: a second or two
_CHUNK = 64  # images a thread checks at a time
_LOOKED_AT_AGAIN = 16  # remembered problems that are verified before the report is believed
_VERSION = 2  # of the remembered reports

# Remarks on odd but readable files: clear colours in a palette, EXIF that ends too early, very many pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Verdict(NamedTuple):
    """One image: its size as far as it is known, and what is wrong with it."""

    width: int
    height: int
    reason: str | None


def examine(encoded: bytes, *, decode: bool = True) -> Verdict:
    """Look at an encoded image: at its header, and at all of its pixels if `decode`. Any size is sound."""
    width = height = 0
    try:
        with Image.open(BytesIO(encoded)) as image:
            width, height = image.size
            reason = refused_kind(image)
            if reason is None and decode:
                image.convert("RGB")
    except UnidentifiedImageError:
        reason = f"{'is not an image' if encoded else 'is an empty file'}; {_REMEDY}"
    except Image.DecompressionBombError as error:
        reason = f"is too large to decode ({error}); {_REMEDY}"
    # Whatever Pillow's parsers trip over (struct.error, SyntaxError, OverflowError, ...) means a damaged file.
    except Exception as error:
        reason = f"the image is damaged ({type(error).__name__}: {printable(str(error))}); {_REMEDY}"
    return Verdict(width, height, reason)


def refused_kind(image: ImageFile.ImageFile) -> str | None:
    """Why an opened image's kind is not supported, by its header, as the end of a message; None if it is."""
    if image.format not in _FORMATS:
        return f"is {image.format}, which the loaders do not read; convert it to PNG or JPEG"
    if image.mode not in _MODES:
        return f"has pixel mode {image.mode}, not 8 bits a channel; convert it to 8-bit PNG"
    if _is_deep(image):
        return "has more than 8 bits a channel; convert it to 8-bit PNG"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "is animated; save the frames as separate images"
    return None


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has more than 8 bits a channel, of which Pillow keeps 8; its decoder's arguments tell."""
    if not image.tile:
        return False
    codec, arguments = image.tile[0].codec_name, image.tile[0].args
    if image.format == "PNG":
        return isinstance(arguments, str) and arguments.endswith(";16B")
    # PPM: (mode, largest value), where that is not 255
    return codec.startswith("ppm") and isinstance(arguments, tuple) and arguments[1] > 255


def read_problem(error: OSError) -> str:
    """Why ImageSource.read failed, as the end of a message."""
    if isinstance(error, PermissionError):
        return "no permission to read it; fix with chmod a+r"
    if isinstance(error.filename, str) and (link := broken_link(error.filename, error)):
        return f"cannot be read: it is a {link}; {_REMEDY}"
    return f"cannot be read ({type(error).__name__}: {printable(str(error))}); {_REMEDY}"


def too_small(width: int, height: int, resolution: int) -> str:
    """What is wrong with an image of that size where images are not enlarged."""
    return (
        f"{width}x{height} pixels is smaller than data.resolution={resolution}; "
        "remove it, lower data.resolution or --set data.enlarge=true"
    )


def header_problem(source: ImageSource, index: int, resolution: int | None) -> str | None:
    """What is wrong with an image by its header, as one line that names it; None if nothing is.

    resolution: the smallest side that is large enough; None or 0: any is.
    """
    width, height, reason = _look(source, index, decode=False)
    if reason is None and resolution and min(width, height) < resolution:
        reason = too_small(width, height, resolution)
    return None if reason is None else f"{source.name(index)}: {reason}"


def _look(source: ImageSource, index: int, decode: bool = True) -> Verdict:
    try:
        encoded = source.read(index)
    except OSError as error:
        return Verdict(0, 0, read_problem(error))
    return examine(encoded, decode=decode)


@dataclass(frozen=True)
class CheckReport:
    """What a look at every image found. It holds for any resolution: smallest_side tells what fits."""

    images: int
    problems: tuple[tuple[str, str], ...]  # (name, reason) of each broken image, in the order of the source
    smallest_side: int  # pixels, of the sound images; 0 if there is none
    smallest_name: str
    problem_indices: tuple[int, ...] = ()  # where `problems` are in the source
    smallest_index: int = -1


def check(source: ImageSource, *, threads: int, progress: Progress | None = None) -> CheckReport:
    """Decode every image, `threads` at a time. progress is called with (images done, images)."""

    def look(start: int) -> list[Verdict]:
        return [_look(source, index) for index in range(start, min(start + _CHUNK, len(source)))]

    indices, problems = [], []
    smallest_side, smallest_index = 0, -1
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for verdicts in pool.map(look, range(0, len(source), _CHUNK)):
            for width, height, reason in verdicts:
                if reason is not None:
                    indices.append(done)
                    problems.append((source.name(done), reason))
                elif smallest_index < 0 or min(width, height) < smallest_side:
                    smallest_side, smallest_index = min(width, height), done
                done += 1
            if progress is not None:
                progress(done, len(source))
    smallest_name = "" if smallest_index < 0 else source.name(smallest_index)
    return CheckReport(len(source), tuple(problems), smallest_side, smallest_name, tuple(indices), smallest_index)


def checked(source: ImageSource, *, threads: int, progress: Progress | None = None) -> CheckReport:
    """The report of an earlier check of the same data, or of one now, which is remembered in the cache folder.

    Data are the same if path, names, labels and the modification times of class folders or shards are: a file
    that was overwritten in place goes unnoticed, unless the report names it. Then everything is checked again.
    """
    path = _report_path(source)
    report = _remembered(path, source)
    if report is None:
        report = check(source, threads=threads, progress=progress)
        remember(path, json.dumps({"version": _VERSION, **asdict(report)}).encode())
    return report


def forget(source: ImageSource) -> None:
    """Let the next `checked` look at every image again."""
    with contextlib.suppress(OSError):  # a cache that cannot be written has nothing to forget
        _report_path(source).unlink(missing_ok=True)


def require_sound(
    source: ImageSource,
    resolution: int,
    *,
    enlarge: bool,
    policy: Literal["refuse", "skip"],
    threads: int,
    progress: Progress | None = None,
) -> None:
    """UserError unless the images can be trained on.

    policy "refuse": every image was decoded (see checked), is sound, and has sides of at least `resolution`
    unless `enlarge`. policy "skip": more than half of an even sample of headers are so.
    """
    how = f"python sadm_fast/encode.py --check {source.where}"
    if policy == "skip":
        count = min(len(source), _MAX_SAMPLED)
        sample = np.unique(np.linspace(0, len(source) - 1, count).round().astype(np.int64)).tolist()
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda index: header_problem(source, index, None if enlarge else resolution), sample)
            bad = [problem for problem in found if problem]
        if 2 * len(bad) > len(sample):
            raise UserError(f"{bad[0]} (and {len(bad) - 1} more of {len(sample)} looked at; list them with {how})")
        return
    report = checked(source, threads=threads, progress=progress)
    if report.problems:
        name, reason = report.problems[0]
        raise UserError(
            f"{name}: {reason} (and {len(report.problems) - 1} more of {report.images} images; "
            f"list them with {how}, or go on without them with --set data.broken=skip)"
        )
    if report.smallest_side < resolution and not enlarge:
        raise UserError(
            f"{report.smallest_name}: its shorter side of {report.smallest_side} pixels is smaller than "
            f"data.resolution={resolution}; lower data.resolution, or --set data.enlarge=true to enlarge small "
            "images, or --set data.broken=skip to go on without them"
        )


def _report_path(source: ImageSource) -> Path:
    identity = [source.fingerprint(), os.path.abspath(source.where), source.stamp()]
    return default_cache() / "checked" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.json"


def _remembered(path: Path, source: ImageSource) -> CheckReport | None:
    """The report at `path`, if it is one and is still true of the first images that it names."""
    try:
        fields = json.loads(path.read_bytes())
        if fields.pop("version") != _VERSION:
            return None
        fields["problems"] = tuple((name, reason) for name, reason in fields["problems"])
        report = CheckReport(**fields | {"problem_indices": tuple(fields["problem_indices"])})
        for index, (_, reason) in list(zip(report.problem_indices, report.problems, strict=True))[:_LOOKED_AT_AGAIN]:
            if _look(source, index).reason != reason:
                return None
        if report.smallest_index >= 0:
            smallest = _look(source, report.smallest_index)
            if smallest.reason is not None or min(smallest.width, smallest.height) != report.smallest_side:
                return None
        return report if report.images == len(source) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None  # not there, or not a report: another program's file, or a damaged one
