"""Kinds of image files: the same are readable, with the same pixels, whatever the loader."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sadm_fast.data import LoaderSpec, MicroBatchPlan, dali_graph, load_samples, open_images
from sadm_fast.data.checking import check
from sadm_fast.data.dali_kinds import for_dali
from tests.data.loaders import open_loader

SIDE = 16
RAMP = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)  # all levels of grey
COLOURS = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=2)
GREY, COLOUR = Image.fromarray(RAMP), Image.fromarray(COLOURS)
CLEAR = Image.fromarray(np.dstack([COLOURS, RAMP]))  # transparent in parts
PALETTE = COLOUR.quantize(16)
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # an application segment; the colour transform follows


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


JPEG, CMYK, WEBP = _saved(COLOUR, "JPEG"), _saved(COLOUR.convert("CMYK"), "JPEG"), _saved(COLOUR, "WEBP")


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(pixels: np.ndarray, depth: int, colour_type: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of rows of bytes [SIDE, n], with further chunks before and behind the pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour_type, 0, 0, 0))
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + header + before + _chunk(b"IDAT", rows) + behind + _chunk(b"IEND", b"")


def _interlaced_png() -> bytes:
    """A grey PNG stored by Adam7: seven coarser and finer grids, one after the other."""
    grids = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for top, left, down, right in grids for row in RAMP[top::down, left::right])
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _packed(depth: int) -> np.ndarray:
    """RAMP in fewer bits a pixel."""
    bits = np.unpackbits(RAMP[:, :, None], axis=2)[:, :, :depth]
    return np.packbits(bits.reshape(SIDE, -1), axis=1)


def _without_adobe(jpeg: bytes) -> bytes:
    start = jpeg.index(ADOBE[:9])
    return jpeg[:start] + jpeg[start + len(ADOBE) + 1 :]


def _bmp16(masks: bytes) -> bytes:
    """A BMP of 16 bits a pixel; with masks they say which ones are red, green and blue."""
    head = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 16, 3 if masks else 0, 2 * SIDE * SIDE, 0, 0, 0, 0)
    start = 14 + len(head) + len(masks)
    body = (COLOURS[..., 0].astype("<u2") * 257)[::-1].tobytes()
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + masks + body


def _ppm(head: str, values: np.ndarray) -> bytes:
    return head.format(SIDE).encode() + values.tobytes()


def _plain(head: str, values: np.ndarray) -> bytes:
    return head.format(SIDE).encode() + b" ".join(b"%d" % value for value in values.ravel()) + b"\n"


READABLE: dict[str, bytes] = {
    "jpeg": JPEG,
    "jpeg, progressive": _saved(COLOUR, "JPEG", progressive=True),
    "jpeg, grey": _saved(GREY, "JPEG"),
    "jpeg, 4:4:4 of low quality": _saved(COLOUR, "JPEG", quality=3, subsampling=0),
    "jpeg, restart marks": _saved(COLOUR, "JPEG", restart_marker_blocks=1),
    "jpeg, not turned by EXIF": _saved(COLOUR, "JPEG", exif=_turned()),
    "jpeg, RGB": _saved(COLOUR, "JPEG", keep_rgb=True),
    "jpeg, Adobe's mark, RGB": JPEG[:2] + ADOBE + b"\0" + JPEG[20:],
    "jpeg, Adobe's mark, YCbCr": JPEG[:2] + ADOBE + b"\1" + JPEG[20:],
    "jpeg, CMYK": CMYK,
    "jpeg, YCCK": CMYK.replace(ADOBE + b"\0", ADOBE + b"\2"),
    "jpeg, CMYK without Adobe's mark": _without_adobe(CMYK),
    "jpeg, more bytes behind": JPEG + bytes(99),
    "jpeg, fill bytes": JPEG[:2] + b"\xff\xff" + JPEG[2:],
    "jpeg, stray bytes between segments": JPEG[:20] + b"\0\0" + JPEG[20:],
    "jpeg of a camera, two pictures": _saved(COLOUR, "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
    "png, RGB": _saved(COLOUR, "PNG"),
    "png, RGBA": _saved(CLEAR, "PNG"),
    "png, LA": _saved(CLEAR.convert("LA"), "PNG"),
    "png, palette": _saved(PALETTE, "PNG"),
    "png, palette with a clear colour": _saved(PALETTE, "PNG", transparency=3),
    "png, palette with many clear colours": _saved(PALETTE, "PNG", transparency=bytes(range(0, 160, 10))),
    "png, palette of two": _saved(COLOUR.quantize(2), "PNG", bits=1),
    **{f"png, {depth}-bit grey": _png(_packed(depth), depth, 0) for depth in (1, 2, 4)},
    "png, a clear grey": _png(RAMP, 8, 0, _chunk(b"tRNS", b"\0\7")),
    "png, gamma": _png(RAMP, 8, 0, _chunk(b"gAMA", struct.pack(">I", 100_000))),
    "png, damaged profile": _png(RAMP, 8, 0, _chunk(b"iCCP", b"p\0\0no zlib")),
    "png, interlaced": _interlaced_png(),
    "png, text behind": _png(RAMP, 8, 0, behind=_chunk(b"tEXt", b"key\0text")),
    "png, no end mark": _png(RAMP, 8, 0)[:-12],
    "webp": WEBP,
    "webp, lossless with alpha": _saved(CLEAR, "WEBP", lossless=True, exact=True),
    "webp, not turned by EXIF": _saved(COLOUR, "WEBP", exif=_turned().tobytes()),
    "bmp": _saved(COLOUR, "BMP"),
    "bmp, palette": _saved(PALETTE, "BMP"),
    "bmp, black and white": _saved(GREY.convert("1"), "BMP"),
    "bmp, 32 bits": _saved(CLEAR, "BMP"),
    "bmp, 15 bits": _bmp16(b""),
    "bmp, 16 bits": _bmp16(struct.pack("<III", 0xF800, 0x7E0, 0x1F)),
    "ppm": _ppm("P6 {0} {0} 255\n", COLOURS),
    "ppm, up to 100": _ppm("P6 {0} {0} 100\n", COLOURS // 3),
    "ppm, plain": _plain("P3 {0} {0} 255\n", COLOURS),
    "ppm, plain up to 9": _plain("P3 {0} {0} 9\n", COLOURS // 29),
    "pgm": _ppm("P5 {0} {0} 255\n", RAMP),
    "pgm, up to 254": _ppm("P5 {0} {0} 254\n", RAMP // 2),
    "pgm, plain": _plain("P2 {0} {0} 255\n", RAMP),
    "pbm": _ppm("P4 {0} {0}\n", _packed(1)),
    "pbm, plain": _plain("P1 {0} {0}\n", RAMP >> 7),
}

DEEP, TEXT = "has more than 8 bits a channel", "the image is damaged (ValueError: Decompressed data too large"
LONG_TEXT = _chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2_000_000)))
SIXTEEN = COLOURS.astype(">u2") * 257

# Most of them, DALI would read.
REFUSED: dict[str, tuple[bytes, str]] = {
    "png, 16-bit grey": (_png(SIXTEEN[..., 0], 16, 0), "has pixel mode I;16, not 8 bits"),
    "png, 16-bit RGB": (_png(SIXTEEN, 16, 2), DEEP),
    "png, 16-bit grey with alpha": (_png(SIXTEEN[..., :2], 16, 4), DEEP),
    "png, 16-bit RGBA": (_png(np.dstack([SIXTEEN, SIXTEEN[..., 0]]), 16, 6), DEEP),
    "ppm, 16-bit": (_ppm("P6 {0} {0} 65535\n", SIXTEEN), DEEP),
    "pgm, 16-bit": (_ppm("P5 {0} {0} 1023\n", SIXTEEN[..., 0] // 64), "has pixel mode I, not 8 bits"),
    "ppm, plain 16-bit": (_plain("P3 {0} {0} 65535\n", SIXTEEN), DEEP),
    "png, animated": (_saved(COLOUR, "PNG", save_all=True, append_images=[CLEAR]), "is animated"),
    "webp, animated": (_saved(COLOUR, "WEBP", save_all=True, append_images=[CLEAR]), "is animated"),
    "png, long text": (_png(RAMP, 8, 0, before=LONG_TEXT), TEXT),
    "png, long text behind": (_png(RAMP, 8, 0, behind=LONG_TEXT), TEXT),
    "png, wrong checksum of text": (_png(RAMP, 8, 0, before=_chunk(b"tEXt", b"key\0")[:-1] + b"?"), "is not an image"),
    "jpeg, a segment in the pixels": (JPEG[:-2] + b"\xff\xb0\xff\xff" + JPEG[-2:], "the image is damaged"),
    "tiff": (_saved(COLOUR, "TIFF"), "is TIFF"),
    "jpeg 2000": (_saved(COLOUR, "JPEG2000"), "is JPEG2000"),
    "ppm, a comment too late": (_ppm("P6 {0} {0} 255#x\n", COLOURS), "the image is damaged"),
}
REFUSED_BY_DALI_TOO: dict[str, tuple[bytes, str]] = {
    "jpeg, 12-bit": (JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "is not an image"),
    "gif": (_saved(PALETTE, "GIF"), "is GIF"),
    "avif": (_saved(COLOUR, "AVIF"), "is AVIF"),
    "jpeg, cut off at its last mark": (JPEG[:-2], "the image is damaged"),
    **{
        f"{kind}, cut off": (whole[: len(whole) * 3 // 4], "the image is damaged")
        for kind, whole in {
            "jpeg": JPEG,
            "png": _saved(COLOUR, "PNG"),
            "webp": WEBP,
            "bmp": _saved(COLOUR, "BMP"),
        }.items()
    },
}


def _write(folder: Path, kinds: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in kinds.items():
        (folder / f"{name}.png").write_bytes(content)  # the contents decide how a file is read


@pytest.mark.parametrize("channels", [1, 3])
def test_every_readable_kind_has_the_same_pixels_in_both_loaders(
    tmp_path: Path, built: list[int], channels: int
) -> None:
    _write(tmp_path / "0", READABLE)
    source = open_images(tmp_path)
    assert check(source, threads=2).problems == ()
    expected = load_samples(source, range(len(source)), LoaderSpec(SIDE, channels))
    plan = MicroBatchPlan(num_images=len(source), seed=1, flip=False, micro_batch=len(source))
    with open_loader(source, resolution=SIDE, channels=channels, micro_batch=len(source), flip=False) as loader:
        images = next(loader).images
        assert loader.broken == {} and built == [1]  # DALI has refused nothing
    shown = zip(plan[0].indices.tolist(), images, strict=True)
    assert [source.name(index) for index, image in shown if not torch.equal(image, expected[index])] == []


@pytest.mark.parametrize("refused", [REFUSED, REFUSED_BY_DALI_TOO], ids=["read by DALI", "not"])
def test_every_refused_kind_is_broken_to_the_check_and_to_both_loaders(
    tmp_path: Path, refused: dict[str, tuple[bytes, str]]
) -> None:
    _write(tmp_path / "refused", {name: content for name, (content, _) in refused.items()})
    _write(tmp_path / "sound", {str(number): READABLE["png, RGB"] for number in range(10)})
    source = open_images(tmp_path)
    problems = dict(check(source, threads=2).problems)
    assert len(problems) == len(refused)
    for name, reason in problems.items():
        assert reason.startswith(refused[Path(name).stem][1]), name
    for kind in ("dali", "torch"):
        with open_loader(source, loader=kind, resolution=SIDE, channels=3, micro_batch=len(source)) as loader:
            assert next(loader).labels.tolist() == [1] * len(source), kind
            assert loader.broken == problems, kind


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg, progressive", "jpeg, grey", "jpeg, restart marks", "jpeg, more bytes behind", "png, RGBA"]
)
def test_ordinary_images_are_left_to_dali(name: str) -> None:
    assert for_dali(READABLE[name]) == (READABLE[name], True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_dali_would_read_is_not_handed_to_it(name: str) -> None:
    with pytest.raises((OSError, ValueError)):
        for_dali(REFUSED[name][0])


def test_a_picture_of_too_many_pixels_is_not_handed_to_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        for_dali(JPEG)


def test_a_gpu_is_told_to_interpolate_colours_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG's own way is some 3 dB further from Pillow; a CPU's decoder knows one way only."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("sadm_fast.data.dali_graph.fn.decoders.image", lambda images, **options: given.update(options))
    dali_graph._decoded("images", 3, "mixed")
    assert given["device"] == "mixed" and given["jpeg_fancy_upsampling"] is True
