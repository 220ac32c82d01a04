"""A micro-batch of each loader, a group for each kind of images: `pytest benchmarks/ --benchmark-only`.

A quick look: loaders run one after the other here, so the ratios that count are those of data_loading.py, where they
take turns.
"""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import image_sets, measure
from benchmarks.data_loading import LOADERS, OWN_SIZE, Case, factories
from sadm_fast.data import open_images

THREADS = 2
WARMUP = 4
CASES = [
    Case("photographs", 64, 32),
    Case("photographs", 256, 32),
    Case("photographs", 512, 32),
    Case("digits", OWN_SIZE, 128),
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batch(benchmark: Any, request: pytest.FixtureRequest, case: Case, loader: str) -> None:
    measure.use_threads(THREADS)
    root: Path = image_sets.digits()
    if case.data == "photographs":
        root = image_sets.photographs(request.config.rootpath / "build/photographs")
    iterator = factories(root, open_images(root), case, THREADS)[loader]()
    try:
        for _ in range(WARMUP):
            next(iterator)
        benchmark.group = str(case)
        benchmark.extra_info |= {"threads": THREADS, "micro_batch": case.micro_batch}
        benchmark.pedantic(lambda: next(iterator), rounds=25, iterations=1)
    finally:
        iterator.close()
