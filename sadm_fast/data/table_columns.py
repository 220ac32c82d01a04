"""Which columns of a table are the image and its class, and what the classes are called.

Hugging Face's `datasets` describes them in the schema of each file; otherwise dataset_info.json or the front matter of
README.md may, in the files' folder or the two above it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sadm_fast.data.source import printable
from sadm_fast.errors import UserError

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label", "class", "target")
_FOLDERS = 3  # the files' own and two above


class Columns(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None  # None: the image is the only column
    classes: tuple[str, ...] | None  # None: not named

    def described(self) -> str:
        """For a message that compares two files."""
        named = "no class names" if self.classes is None else f"{len(self.classes)} classes"
        return f"images in {self.image!r}, labels in {self.label!r}, {named}"


def find_columns(schema: Any, path: str) -> Columns:
    """The columns of a table with the pyarrow `schema`, which lies at `path`.

    Raises UserError: no column of images, or several; no column of labels beside others; classes twice.
    """
    where = printable(path)
    there = ", ".join(f"{printable(field.name)} ({field.type})" for field in schema)
    features = _described(schema)
    images = [field.name for field in schema if _holds_bytes(field.type)]
    images = [name for name in images if _kind(features, name) == "Image"] or images
    image = one_of(images, IMAGES)
    if image is None:
        raise UserError(
            f"{where}: has {'several columns' if images else 'no column'} of images; one must hold encoded images, as"
            f" struct<bytes, path> or binary, and be called image if there are more; there are {there}"
        )
    if len(schema.names) == 1:
        return Columns(image, None, ("all",))
    numbers = [field.name for field in schema if str(field.type).startswith(("int", "uint"))]
    marked = [name for name in numbers if _kind(features, name) == "ClassLabel"]
    label = one_of(marked, LABELS) or next((name for name in LABELS if name in numbers), None)
    if label is None:
        raise UserError(
            f"{where}: has no column of labels; one must hold class numbers and be called label, or a ClassLabel; to"
            f" train without labels, write the file with the column {image} alone; there are {there}"
        )
    names = features.get(label, {}).get("names") or _names_beside(Path(path), label)
    if names is not None and len(set(names)) < len(names):
        raise UserError(f"{where}: the names of {label} have one twice; correct them")
    return Columns(image, label, None if names is None else tuple(map(str, names)))


def one_of(names: list[str], first: tuple[str, ...]) -> str | None:
    """The only name, or else the first one of `first` that is there."""
    return names[0] if len(names) == 1 else next((name for name in first if name in names), None)


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is binary, or a struct with a binary field `bytes`."""
    for index in range(kind.num_fields if str(kind).startswith("struct") else 0):
        if kind.field(index).name == "bytes":
            return _holds_bytes(kind.field(index).type)
    return str(kind) in ("binary", "large_binary")


def _kind(features: dict[str, Any], name: str) -> Any:
    return features.get(name, {}).get("_type")


def _described(schema: Any) -> dict[str, Any]:
    """`datasets`' features by column, from the schema; {} if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _names_beside(path: Path, label: str) -> list[str] | None:
    """The classes of column `label` by a file beside the table or above it; None if there is none that says."""
    for folder in list(path.absolute().parents)[:_FOLDERS]:
        for read in (_from_info, _from_readme):
            try:
                names = read(folder, label)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
                continue  # not there, or about something else
            if names:
                return names
    return None


def _from_info(folder: Path, label: str) -> list[str]:
    return list(json.loads((folder / "dataset_info.json").read_bytes())["features"][label]["names"])


def _from_readme(folder: Path, label: str) -> list[str]:
    """From the block between two lines of dashes at the head of a data set's card."""
    head = (folder / "README.md").read_text(encoding="utf-8").split("\n---", 1)
    if not head[0].startswith("---") or len(head) < 2:
        return []
    import yaml

    try:
        infos = yaml.safe_load(head[0].removeprefix("---"))["dataset_info"]
    except yaml.YAMLError:
        return []
    found = []
    for info in infos if isinstance(infos, list) else [infos]:
        for feature in info["features"]:
            if feature["name"] == label and isinstance(feature["dtype"], dict):
                names = feature["dtype"]["class_label"]["names"]
                found.append([names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names))
    return found[0] if found and all(names == found[0] for names in found) else []
