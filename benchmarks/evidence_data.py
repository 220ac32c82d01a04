"""Fetch the data sets of docs/evidence.md from package registries and lay them out as image folders.

    python benchmarks/evidence_data.py                 datasets/emoji and datasets/letters (the digits are embedded)
    python benchmarks/evidence_data.py letters --debs DIR      from .deb files that are there already

Emoji come by `npm pack`, fonts by `apt-get download`, which need no rights: nothing is installed, and only npm, apt-get
and dpkg-deb are asked. What was fetched stays in the cache folder, so that a second call fetches nothing.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sadm_fast import cli  # noqa: E402
from sadm_fast.errors import UserError  # noqa: E402
from sadm_fast.files import default_cache  # noqa: E402

VENDORS = ("apple", "google", "twitter")
EMOJI_VERSION = "16.0.0"
EMOJI_SIDE = 64
FEWEST = 50  # emoji of a category; "Component" has 5
FONTS = (
    "fonts-aenigma",
    "fonts-averia-gwf",
    "fonts-dejavu-core",
    "fonts-dejavu-extra",
    "fonts-dustin",
    "fonts-freefont-ttf",
    "fonts-georgewilliams",
    "fonts-lato",
    "fonts-liberation",
    "fonts-texgyre",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SIDE = 32
_MARGIN = 3  # pixels around a letter
_DRAWN = 128  # side at which a letter is drawn before it is brought to LETTER_SIDE
_INK = (0.03, 0.75)  # share of a picture that a letter may fill: less is a hairline, more is a filled box
_MISSING = "\uffff"  # no font has it: what is drawn is the sign for a missing letter


def run(command: Sequence[str], folder: Path, what: str) -> None:
    """Run a client of a registry in `folder`; UserError with its last line if it cannot be run or fails."""
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{what}: {command[0]} cannot be run ({reason}); install it, or leave this set out") from None
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise UserError(f"{what}: {' '.join(command)} failed ({said[-1] if said else ended.returncode})")


def fetch_emoji(folder: Path) -> list[Path]:
    """The packages of all vendors, as npm delivers them."""
    files = []
    for vendor in VENDORS:
        name = f"emoji-datasource-{vendor}"
        path = folder / f"{name}-{EMOJI_VERSION}.tgz"
        if not path.exists():
            run(["npm", "pack", "--silent", f"{name}@{EMOJI_VERSION}"], folder, "emoji")
        files.append(path)
    return files


def fetch_fonts(folder: Path) -> list[Path]:
    """The Debian packages of FONTS; apt-get update must have run once on the machine."""
    for package in FONTS:
        if not list(folder.glob(f"{package}_*.deb")):
            run(["apt-get", "download", package], folder, "letters")
    return sorted(folder.glob("*.deb"))


def emoji(packages: Sequence[Path], target: Path) -> int:
    """Write category/vendor-code.png, RGB of 64 pixels on white, of the packages' emoji; return how many.

    One picture an emoji and vendor: tones of skin are left out, so that no picture is there six times.
    """
    pictures = 0
    for package in packages:
        vendor = package.name.removeprefix("emoji-datasource-").partition("-")[0]
        with tarfile.open(package) as archive:
            listed = archive.extractfile("package/emoji.json")
            assert listed is not None
            entries = [entry for entry in json.load(listed) if entry[f"has_img_{vendor}"]]
            sizes = Counter(entry["category"] for entry in entries)
            wanted = {f"package/img/{vendor}/64/{e['image']}": e for e in entries if sizes[e["category"]] >= FEWEST}
            for member in archive:
                entry = wanted.get(member.name)
                if entry is None:
                    continue
                category = "-".join("".join(c if c.isalnum() else " " for c in entry["category"].lower()).split())
                with Image.open(archive.extractfile(member)) as image:  # type: ignore[arg-type]
                    drawn = image.convert("RGBA").resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)
                white = Image.new("RGBA", drawn.size, "white")
                path = target / category / f"{vendor}-{Path(entry['image']).stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.alpha_composite(white, drawn).convert("RGB").save(path)
                pictures += 1
    return pictures


def unpacked_fonts(packages: Sequence[Path], folder: Path) -> list[Path]:
    """Unpack Debian packages into `folder`; the font files in them."""
    for package in packages:
        run(["dpkg-deb", "--extract", str(package.resolve()), "."], folder, "letters")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf") and not p.is_symlink())


def letter(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """A letter, white on black, grey of LETTER_SIDE pixels, as large as fits; None if nothing is drawn."""
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    scale = (_DRAWN - 8 * _MARGIN) / max(right - left, bottom - top)
    font = font.font_variant(size=max(1, round(font.size * scale)))
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (_DRAWN, _DRAWN), 0)
    place = (_DRAWN - right - left) / 2, (_DRAWN - bottom - top) / 2
    ImageDraw.Draw(image).text(place, text, fill=255, font=font)
    return image.resize((LETTER_SIDE, LETTER_SIDE), Image.Resampling.BOX)


def letters_of(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """The letters that a font has: its sign for a missing one, hairlines and filled boxes are left out."""
    try:
        font = ImageFont.truetype(str(path), _DRAWN)
        missing = letter(font, _MISSING)
        drawn = {text: letter(font, text) for text in LETTERS}
    except (OSError, ValueError, OverflowError):  # a font that FreeType cannot read
        return
    unknown = None if missing is None else missing.tobytes()
    for text, image in drawn.items():
        if image is None or image.tobytes() == unknown:
            continue
        share = float(np.asarray(image).mean()) / 255
        if _INK[0] <= share <= _INK[1]:
            yield text, image


def letters(fonts: Sequence[Path], target: Path) -> int:
    """Write LETTER/font.png of all fonts, each picture once; return how many."""
    seen: set[bytes] = set()
    for path in fonts:
        for text, image in letters_of(path):
            digest = sha256(text.encode() + image.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            file = target / text / f"{path.parent.name}-{path.stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return len(seen)


def build(name: str, cache: Path, packages: Path | None) -> tuple[Path, int | None]:
    """Lay out the set `name` below `cache`: its folder, and how many pictures; None if it was there."""
    target, kept = cache / name, packages or cache / "packages"
    if target.is_dir():
        return target, None
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as temporary:
        pictures = Path(temporary) / name
        if name == "emoji":
            count = emoji(fetch_emoji(kept), pictures)
        else:
            fonts = unpacked_fonts(fetch_fonts(kept) if packages is None else sorted(kept.glob("*.deb")),
                                   Path(temporary))  # fmt: skip
            count = letters(fonts, pictures)
        if not count:
            raise UserError(f"{name}: the packages in {kept} hold no picture of it; empty that folder and try again")
        shutil.move(pictures, target)
    return target, count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=["emoji", "letters", []], help="default: both")
    parser.add_argument("--debs", type=Path, help="folder of fonts' .deb files, instead of apt-get download")
    arguments = parser.parse_args(argv)

    def work(_: object) -> int:
        for name in arguments.sets or ("emoji", "letters"):
            target, count = build(name, default_cache(), arguments.debs if name == "letters" else None)
            print(f"{target}: " + ("is there" if count is None else f"{count} pictures"))
        return 0

    return cli.run(work, again="goes on")


if __name__ == "__main__":
    sys.exit(main())
