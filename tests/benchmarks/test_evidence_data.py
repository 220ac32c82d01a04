"""The evidence's data sets, laid out from packages made here: what is taken of them, and what not."""

import io
import json
import tarfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from benchmarks import evidence_data
from sadm_fast.data import open_images
from sadm_fast.errors import UserError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def emoji_package(folder: Path, vendor: str, count: int) -> Path:
    """A package of `count` pictures of food, half transparent red, a component, and an entry without a picture."""
    entries = [{"category": "Food & Drink", "image": f"{i:04x}.png", f"has_img_{vendor}": True} for i in range(count)]
    entries.append({"category": "Component", "image": "ffff.png", f"has_img_{vendor}": True})
    entries.append({"category": "Food & Drink", "image": "eeee.png", f"has_img_{vendor}": False})
    picture = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(picture, "PNG")
    files = {f"img/{vendor}/64/{entry['image']}": picture.getvalue() for entry in entries}
    files["emoji.json"] = json.dumps(entries).encode()
    path = folder / f"emoji-datasource-{vendor}-16.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_emoji_are_rgb_on_white_in_folders_of_their_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_data, "FEWEST", 2)
    packages = [emoji_package(tmp_path, vendor, 3) for vendor in ("apple", "google")]
    assert evidence_data.emoji(packages, tmp_path / "emoji") == 6
    images = open_images(tmp_path / "emoji")
    assert images.classes == ("food-drink",) and len(images) == 6
    with Image.open(tmp_path / "emoji" / "food-drink" / "google-0001.png") as image:
        assert image.mode == "RGB" and image.size == (64, 64)
        assert image.getpixel((5, 5)) == (255, 127, 127)


def test_letters_fill_their_picture_and_each_picture_is_there_once(tmp_path: Path) -> None:
    fonts = sorted(FONTS.glob("DejaVuSans*.ttf"))
    twins = [*fonts, fonts[0]]
    count = evidence_data.letters(twins, tmp_path / "letters")
    images = open_images(tmp_path / "letters")
    assert len(images) == count == evidence_data.letters(fonts, tmp_path / "again")
    assert images.classes == tuple(evidence_data.LETTERS) and count > 26 * 3
    with Image.open(tmp_path / "letters" / "H" / f"{fonts[0].parent.name}-{fonts[0].stem}.png") as image:
        drawn = np.asarray(image)
    assert drawn.shape == (32, 32) and drawn.dtype == np.uint8
    rows = np.flatnonzero(drawn.max(axis=1) > 128)
    assert 20 <= rows[-1] - rows[0] + 1 <= 28 and abs((rows[0] + rows[-1]) - 31) <= 1  # in the middle


def test_letters_that_a_font_does_not_have_are_left_out(tmp_path: Path) -> None:
    assert dict(evidence_data.letters_of(FONTS / "STIXSizFiveSymReg.ttf")) == {}
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert list(evidence_data.letters_of(tmp_path / "broken.ttf")) == []


def test_a_set_is_fetched_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def client(command: list[str], folder: Path, what: str) -> None:
        asked.append(command)
        emoji_package(folder, command[-1].removeprefix("emoji-datasource-").partition("@")[0], 60)

    monkeypatch.setattr(evidence_data, "run", client)
    assert evidence_data.build("emoji", tmp_path, None) == (tmp_path / "emoji", 180)
    assert len(asked) == 3 and asked[0][:3] == ["npm", "pack", "--silent"]
    assert evidence_data.build("emoji", tmp_path, None) == (tmp_path / "emoji", None) and len(asked) == 3


def test_a_client_that_is_missing_or_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="emoji: no-such-client cannot be run"):
        evidence_data.run(["no-such-client"], tmp_path, "emoji")
    with pytest.raises(UserError, match="letters: sh -c echo no; exit 3 failed .no."):
        evidence_data.run(["sh", "-c", "echo no; exit 3"], tmp_path, "letters")
    evidence_data.run(["true"], tmp_path, "letters")
