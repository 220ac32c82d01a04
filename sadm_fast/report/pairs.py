"""The pairs of the fixed batch whose relation the denoiser changes most, as pictures of the samples."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sadm_fast.report.figures import picture
from sadm_fast.report.markup import escape, show
from sadm_fast.report.reading import Run

_TEXT = (
    "<b>The pairs that change most.</b> A column is a pair of images: above, both real ones; below, what the denoiser "
    "made of their noised copies. Over it stand their classes, and their relation among the real images → among the "
    "estimates."
)


class Pair(NamedTuple):
    """Labels of two images, their relation, and that of their estimates."""

    labels: tuple[int, int]
    real: float
    fake: float


def changed_most(run: Run, step: int) -> str:
    """The pictures of a step with their relations; "" where the run has none."""
    path = run.relations[step].with_suffix(".png")
    pairs = read_pairs(run.relations[step])
    image = picture(path, target_width=700, most_bytes=200_000) if pairs and path.is_file() else None
    if image is None:
        return ""
    names = "".join(
        f"<span>{escape(run.class_name(pair.labels[0]))}, {escape(run.class_name(pair.labels[1]))}<br>"
        f"{show(pair.real)} → {show(pair.fake)}</span>"
        for pair in pairs
    )
    return (
        f'<figure class="pairs"><div class="framed by-column"><div class="asked" style="--count: {len(pairs)}">{names}'
        f'</div><img src="{image.uri}" width="{image.width}" height="{image.height}" alt="Pairs, step {step:,}"></div>'
        f"<figcaption>{_TEXT}</figcaption></figure>"
    )


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a relations/step-N.npz, in the order of the picture beside it; empty if it names none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            real, fake, labels, pairs = (np.asarray(arrays[key]) for key in ("real", "fake", "labels", "pairs"))
            return [
                Pair((int(labels[i]), int(labels[j])), float(real[i, j]), float(fake[i, j]))
                for i, j in pairs.reshape(-1, 2).tolist()
            ]
    except (OSError, KeyError, TypeError, ValueError, IndexError, EOFError, zipfile.BadZipFile):
        return []
