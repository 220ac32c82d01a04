"""The ADM crop (sadm_fast.data.adm_crop) as a DALI graph.

DALI has no box filter, but halving an even side with LINEAR and no antialiasing averages the same two pixels.
Pillow's box filter on an odd side 2k+1 averages pairs from the first edge up to the middle and pairs that end
at the last edge, with one triple between them; here the middle of that triple is dropped and the rest is
exact. The last step, CUBIC with antialiasing and subpixel_scale=False, and a crop window rounded down, agree
with Pillow up to rounding. EXIF orientation is not applied, as in the references.
"""

from typing import Any

from nvidia.dali import fn, math, pipeline_def, types


@pipeline_def(enable_conditionals=True)
def crop_pipeline(
    source: Any, size: int, channels: int, halvings: int, from_paths: bool, mixed_decode: bool
) -> tuple[Any, ...]:
    """A pipeline from files to crops, with at most `halvings` box halvings of an image; small images are enlarged.

    source: callable(run) -> images, labels int64 [B], sample ids int64 [B], mirror int32 [B]. images:
    from_paths: paths uint8 [B, length], which DALI opens; otherwise a list of B encoded images uint8 [n_i].
    mixed_decode: decode JPEG with nvJPEG and crop on the GPU; otherwise nothing touches one. Outputs: pixels
    uint8 [B, size, size, channels] (on the GPU if mixed_decode), and on the CPU labels, sample ids and the
    images' shapes int64 [B, 3] as (height, width, channels).
    """
    images, label, sample_id, mirror = fn.external_source(
        source=source,
        num_outputs=4,
        batch=True,
        dtype=[types.UINT8, types.INT64, types.INT64, types.INT32],
        ndim=[1, 0, 0, 0],
    )
    # Mapping small files into memory costs more than reading them, and gains nothing on a network file
    # system.
    encoded = fn.io.file.read(images, dont_use_mmap=True) if from_paths else images
    image = fn.decoders.image(
        encoded,
        device="mixed" if mixed_decode else "cpu",
        output_type=types.RGB if channels == 3 else types.GRAY,
        adjust_orientation=False,
    )
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


def _halve_while_large(image: Any, height: Any, width: Any, size: int, levels: int) -> Any:
    """Halve while the shorter side is at least 2 * size, at most `levels` times; image uint8 HWC."""
    if levels:
        if math.min(height, width) >= 2 * size:
            image = _even(_even(image, height, 0), width, 1)
            half_height, half_width = height // 2, width // 2
            image = fn.resize(
                image,
                resize_y=fn.cast(half_height, dtype=types.FLOAT),
                resize_x=fn.cast(half_width, dtype=types.FLOAT),
                interp_type=types.INTERP_LINEAR,
                antialias=False,
            )
            image = _halve_while_large(image, half_height, half_width, size, levels - 1)
    return image


def _even(image: Any, side: Any, axis: int) -> Any:
    """Drop the middle of the three rows (axis 0) or columns (axis 1) that Pillow's box filter averages."""
    if side % 2 == 1:
        dropped = 2 * ((side // 2 + 1) // 2) - 1
        if axis == 0:
            image = fn.cat(image[:dropped], image[dropped + 1 :], axis=0)
        else:
            image = fn.cat(image[:, :dropped], image[:, dropped + 1 :], axis=1)
    return image
