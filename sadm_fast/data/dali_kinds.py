"""The encoded images that DALI may decode; Pillow decodes all others before they are handed to it.

DALI reads some files that Pillow refuses, refuses some that Pillow reads, and decodes some to other colours: a JPEG of
four channels without Adobe's marker comes out inverted, a PPM with a maximum other than 255 too dark. Which images are
readable, and what is in them, must not depend on the loader: Pillow decides wherever the two may differ. DALI gets
JPEGs of one or three channels whose markers are in their places, and PNGs with nothing behind the pixels that Pillow
could stumble over: nearly all images of nearly every set.
"""

import re
import struct
from io import BytesIO

from PIL import Image

from sadm_fast.data.checking import refused_kind

_MARKER = re.compile(rb"\xff+[^\x00\xff]")  # of JPEG
_MARKER_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # any but those that may stand inside one
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman-coded: baseline, extended, progressive
_BEFORE_SCANS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} | _FRAMES  # tables, comments, application data
_BETWEEN_SCANS = {0xC4, 0xDD}


def for_dali(encoded: bytes) -> tuple[bytes, bool]:
    """Return bytes that DALI decodes to Pillow's pixels of `encoded`, and whether they are `encoded` itself.

    Raises ValueError for a kind that is not supported (checking.refused_kind), and whatever Pillow raises for damage.
    """
    with Image.open(BytesIO(encoded)) as image:
        if refused := refused_kind(image):
            raise ValueError(refused)
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _is_regular_jpeg(encoded):
            return encoded, True
        if image.format == "PNG" and _ends_with_pixels(encoded, image.tile[0].offset):
            return encoded, True
        return _as_ppm(image), False


def decoded_by_pillow(encoded: bytes) -> bytes:
    """Decode with Pillow and return the pixels as PPM, for DALI; raises whatever Pillow raises for damage."""
    with Image.open(BytesIO(encoded)) as image:
        return _as_ppm(image)


def _as_ppm(image: Image.Image) -> bytes:
    return b"P6 %d %d 255\n" % image.size + image.convert("RGB").tobytes()


def _is_regular_jpeg(encoded: bytes) -> bool:
    """Check that a JPEG is Huffman-coded and its markers are in their places, up to the end of the first image."""
    position, allowed = 2, _BEFORE_SCANS
    while True:
        in_scan = allowed is _BETWEEN_SCANS
        marker = (_MARKER_BEHIND_SCAN.search if in_scan else _MARKER.match)(encoded, position)
        if marker is None or marker.end() + 2 > len(encoded):
            return in_scan and marker is not None and encoded[marker.end() - 1] == _END_OF_IMAGE
        kind = encoded[marker.end() - 1]
        if kind == _START_OF_SCAN:
            allowed = _BETWEEN_SCANS
        elif kind not in allowed:
            return in_scan and kind == _END_OF_IMAGE
        position = marker.end() + int.from_bytes(encoded[marker.end() : marker.end() + 2], "big")


def _ends_with_pixels(encoded: bytes, offset: int) -> bool:
    """Check that a PNG has only pixels and the end mark from the first pixel data, at byte `offset`, on."""
    offset -= 8  # the chunk's header: its length and kind
    while offset + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, offset)
        offset += 12 + length
        if kind == b"IEND":
            return offset <= len(encoded)
        if kind != b"IDAT":
            return False
    return False
