"""DALI graphs: decoding alone for the CPU, where fast_crop does the rest; decoding with the ADM crop for the GPU.

On the GPU the crop (sadm_fast.data.adm_crop) has to be put together from DALI's operators. DALI has no box filter, so
a halving takes the four pixels of each 2x2 block apart with nearest-neighbour resizes and averages them in uint8,
across and then down, rounded up like Pillow's two passes: exact for even sides. Pillow's box filter on an odd side
2k+1 averages pairs from the first edge up to the middle and pairs that end at the last edge, with one triple between
them; here the middle of that triple is left out and the rest is exact. The last step, CUBIC with antialiasing and
subpixel_scale=False, and a crop window rounded down, differ from Pillow only in that Pillow rounds to uint8 between
its two passes and DALI does not. EXIF orientation is not applied, as in the references.
"""

from typing import Any

from nvidia.dali import fn, math, pipeline_def, types


@pipeline_def
def decode_pipeline(source: Any) -> tuple[Any, ...]:
    """A pipeline from encoded images to whole ones on the CPU.

    source: as crop_pipeline. Outputs: images uint8 [H, W, 3] of any sizes, labels, sample ids and mirror flags.
    """
    images, label, sample_id, mirror = _given(source)
    return _decoded(images, 3, "cpu"), label, sample_id, mirror


@pipeline_def(enable_conditionals=True)
def crop_pipeline(source: Any, size: int, channels: int, halvings: int, mixed_decode: bool) -> tuple[Any, ...]:
    """A pipeline from encoded images to crops, with at most `halvings` box halvings; small images are enlarged.

    source: callable(run) -> a list of B encoded images uint8 [n_i], labels int64 [B], sample ids int64 [B], mirror
    int32 [B].
    mixed_decode: decode JPEG with nvJPEG and crop on the GPU; otherwise (in tests) nothing touches one. Outputs: pixels
    uint8 [B, size, size, channels] (on the GPU if mixed_decode), and on the CPU labels, sample ids and the
    images' shapes int64 [B, 3] as (height, width, channels).
    """
    images, label, sample_id, mirror = _given(source)
    image = _decoded(images, channels, "mixed" if mixed_decode else "cpu")
    shape = image.shape(device="cpu")
    image = _halve_while_large(image, shape[0], shape[1], size, halvings)
    pixels = fn.resize_crop_mirror(
        image,
        resize_shorter=size,
        crop=(size, size),
        rounding="truncate",
        mirror=mirror,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        subpixel_scale=False,
    )
    return pixels, label, sample_id, shape


def _given(source: Any) -> Any:
    return fn.external_source(
        source=source,
        num_outputs=4,
        batch=True,
        dtype=[types.UINT8, types.INT64, types.INT64, types.INT32],
        ndim=[1, 0, 0, 0],
    )


def _decoded(images: Any, channels: int, device: str) -> Any:
    return fn.decoders.image(
        images,
        device=device,
        output_type=types.RGB if channels == 3 else types.GRAY,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # nvJPEG interpolates colours as libjpeg-turbo does, which a CPU decodes with
    )


def _halve_while_large(image: Any, height: Any, width: Any, size: int, levels: int) -> Any:
    """Halve while the shorter side is at least 2 * size, at most `levels` times; image uint8 HWC."""
    if levels:
        if math.min(height, width) >= 2 * size:
            image = _halve(image, fn.cast(height, dtype=types.FLOAT), fn.cast(width, dtype=types.FLOAT))
            image = _halve_while_large(image, height // 2, width // 2, size, levels - 1)
    return image


def _halve(image: Any, height: Any, width: Any) -> Any:
    """Pillow's box filter to (height // 2, width // 2), each side rounded down."""
    half = fn.stack(math.floor(height / 2), math.floor(width / 2))

    def nearest(down: float, right: float) -> Any:
        window = {"roi_start": [down, right], "roi_end": fn.stack(height + down, width + right)}
        return fn.resize(image, size=half, interp_type=types.INTERP_NN, **window)

    # Output i of k samples the pixel at (i + 1/2) n / k = 2i + 1 + (n - 2k)(i + 1/2) / k. Half a pixel before and
    # after that lie the two pixels of its pair, in both halves of an odd side too; the excess over one half makes
    # them the outer two of the triple.
    before, after = -0.501, 0.501
    upper = _mean(nearest(before, before), nearest(before, after))
    lower = _mean(nearest(after, before), nearest(after, after))
    return _mean(upper, lower)


def _mean(a: Any, b: Any) -> Any:
    """(a + b + 1) // 2 of uint8, without a wider type: a cast costs more than all the rest."""
    return (a | b) - ((a ^ b) >> types.Constant(1).uint8())
