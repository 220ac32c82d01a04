"""Real photographs without a network: those that scikit-learn, matplotlib and scikit-image carry, and what cameras and
programs make of such files: other encodings, orientations and sizes.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

COLOUR = {
    "china": "sklearn/datasets/images/china.jpg",  # 640x427
    "flower": "sklearn/datasets/images/flower.jpg",  # 640x427
    "hopper": "matplotlib/mpl-data/sample_data/grace_hopper.jpg",  # 512x600
    "astronaut": "skimage/data/astronaut.png",  # 512x512
    "chelsea": "skimage/data/chelsea.png",  # 451x300
    "coffee": "skimage/data/coffee.png",  # 600x400
    "rocket": "skimage/data/rocket.jpg",  # 640x427
    "hubble": "skimage/data/hubble_deep_field.jpg",  # 1000x872
    "retina": "skimage/data/retina.jpg",  # 1411x1411
    "motorcycle-left": "skimage/data/motorcycle_left.png",  # 741x500
    "motorcycle-right": "skimage/data/motorcycle_right.png",  # 741x500
}
GREY = {
    "camera": "skimage/data/camera.png",  # 512x512
    "coins": "skimage/data/coins.png",  # 384x303
    "moon": "skimage/data/moon.png",  # 512x512
    "gravel": "skimage/data/gravel.png",  # 512x512
}


def photograph_path(name: str) -> Path:
    """The file of an original; the package that carries it is located, not imported."""
    package, _, inside = (COLOUR | GREY)[name].partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed: pip install '.[demo,test]'"
    return Path(spec.origin).parent / inside


def photograph(name: str) -> Image.Image:
    """An original as an image of mode RGB or L."""
    with Image.open(photograph_path(name)) as image:
        return image.convert("RGB" if name in COLOUR else "L")


def write_photographs(folder: Path) -> list[Path]:
    """The originals as they are and all variants, as files in `folder`, in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COLOUR | GREY:
        path = photograph_path(name)
        (folder / path.name).write_bytes(path.read_bytes())
    for name, image, options in _variants():
        image.save(folder / name, **options)
    return sorted(folder.iterdir())


def _variants() -> Iterator[tuple[str, Image.Image, dict[str, Any]]]:
    """File name, image, save options."""
    jpeg = {"quality": 92}
    for name in COLOUR:
        image = photograph(name)
        if image.width != image.height:
            yield f"{name}-turned.jpg", image.transpose(Image.Transpose.ROTATE_90), jpeg
        yield f"{name}-odd.jpg", _cut(image, (image.width - 2) | 1, (image.height - 14) | 1), jpeg
    for name in GREY:
        yield f"{name}-grey.jpg", photograph(name), jpeg
    yield "coffee-cmyk.jpg", photograph("coffee").convert("CMYK"), jpeg
    yield "chelsea-palette.png", photograph("chelsea").quantize(256), {}
    yield "flower-palette.png", photograph("flower").quantize(64), {}
    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"rocket-exif{orientation}.jpg", photograph("rocket"), jpeg | {"exif": exif}
    yield "motorcycle-left-progressive.jpg", photograph("motorcycle-left"), jpeg | {"progressive": True}
    yield "astronaut-444.jpg", photograph("astronaut"), jpeg | {"subsampling": "4:4:4"}
    yield "astronaut-422.jpg", photograph("astronaut"), jpeg | {"subsampling": "4:2:2"}
    yield "astronaut-420.jpg", photograph("astronaut"), jpeg | {"subsampling": "4:2:0"}
    yield "china-low-quality.jpg", photograph("china"), {"quality": 30}
    yield "china-lossless.webp", photograph("china"), {"lossless": True, "method": 0}
    yield "chelsea-rgba.png", _with_alpha(photograph("chelsea")), {"compress_level": 1}
    yield "camera-la.png", _with_alpha(photograph("camera")), {"compress_level": 1}
    # Thumbnails, and photographs as large as cameras make them: resampled ones, there are no originals of that size.
    for name, side in {"china": 65, "astronaut": 97, "coffee": 130, "flower": 191}.items():
        yield f"{name}-resampled-to-{side}.png", _resampled(photograph(name), side), {}
    for name, side in {"china": 1024, "coffee": 1153, "motorcycle-right": 1500, "hubble": 1801}.items():
        yield f"{name}-resampled-to-{side}.jpg", _resampled(photograph(name), side), jpeg
    yield (
        "flower-resampled-to-2049-turned.jpg",
        _resampled(photograph("flower"), 2049).transpose(Image.Transpose.ROTATE_270),
        jpeg,
    )


def _cut(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.crop((0, 0, width, height))


def _with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _resampled(image: Image.Image, shorter_side: int) -> Image.Image:
    scale = shorter_side / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return image.resize(size, Image.Resampling.LANCZOS)
