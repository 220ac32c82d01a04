"""Small tables, written by pyarrow as Hugging Face's `datasets` writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


def make_table(
    images: Sequence[bytes | None],
    labels: Sequence[int | None] | None,
    classes: Sequence[str] | None = ("cat", "dog"),
    **more: Any,
) -> Any:
    """A table of the columns image and label; of images alone, if there are no labels. more: further columns."""
    columns = {"image": pyarrow.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], IMAGE)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pyarrow.array(labels, pyarrow.int64())
        features["label"] = {"names": list(classes), "_type": "ClassLabel"} if classes else {"_type": "Value"}
    columns |= {name: pyarrow.array(values) for name, values in more.items()}
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_table(path: Path, table: Any, **options: Any) -> Path:
    """Write a .parquet (options as pyarrow's), or an .arrow as save_to_disk does; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path
