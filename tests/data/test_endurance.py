"""What only shows in a process of its own: memory over many epochs, ImageNet's number of files, DALI's crashes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.latent_caches import make_encoding, write_cache


def _output(program: str, *arguments: object, **environment: str) -> list[str]:
    """The lines that a Python program prints; it must succeed."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    return done.stdout.splitlines()


EPOCHS = """
import multiprocessing, sys
from pathlib import Path
from sadm_fast.data import open_images
from tests.data.loaders import open_loader

def resident():
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    return sum(int(Path(f"/proc/{process}/statm").read_text().split()[1]) for process in processes)

path, kind, loader = sys.argv[1:]
source = open_images(path, kind=kind)
with open_loader(source, loader=loader, resolution=32, channels=3, micro_batch=25, threads=2) as batches:
    for epoch in range(20):
        lowest = []
        for _ in range(len(source) // 25):
            next(batches)
            lowest.append(resident())
        print(min(lowest))
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
@pytest.mark.parametrize("loader, kind", [("dali", "folder"), ("dali", "webdataset"), ("torch", "folder")])
def test_memory_does_not_grow_over_twenty_epochs(make_folder: Any, make_shard: Any, loader: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 96, 80, 3), dtype=np.uint8)
    root = make_folder({f"class/{i:03d}.jpg": Image.fromarray(pixels[i % 50]) for i in range(200)})
    if kind == "webdataset":
        images = [(path.stem, path.read_bytes()) for path in sorted(root.glob("class/*.jpg"))]
        members = [(f"{key}.{end}", data) for key, image in images for end, data in (("jpg", image), ("cls", b"0"))]
        root = make_shard("0.tar", members)
    # Else glibc keeps more and more of what is freed, up to a limit that takes it hundreds of epochs to reach.
    output = _output(EPOCHS, root, kind, loader, MALLOC_MMAP_THRESHOLD_="65536")
    pages = [int(line) for line in output]
    assert len(pages) == 20
    # The least of an epoch: batches that are on their way come and go, what leaks stays.
    assert min(pages[17:]) < 1.01 * min(pages[2:5]), pages


LATENT_EPOCHS = """
import sys
from pathlib import Path
from sadm_fast.data.latents import LatentCache
from tests.data.loaders import open_loader

source = LatentCache.open(sys.argv[1])
with open_loader(source, micro_batch=25, threads=2) as batches:
    for epoch in range(20):
        lowest = []
        for _ in range(len(source) // 25):
            next(batches)
            lowest.append(int(Path("/proc/self/statm").read_text().split()[1]))
        print(min(lowest))
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_memory_does_not_grow_over_twenty_epochs_of_latents(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "latents", make_encoding(images=200, resolution=32, shard_size=64))
    pages = [int(line) for line in _output(LATENT_EPOCHS, root, MALLOC_MMAP_THRESHOLD_="65536")]
    assert len(pages) == 20 and min(pages[17:]) < 1.01 * min(pages[2:5]), pages


IMAGENET = """
import pickle, resource, time
from pathlib import Path
import numpy as np
from sadm_fast.data.image_folder import ImageFolder
from sadm_fast.data.order import MicroBatchPlan
from sadm_fast.data.source import PackedNames, split

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before, began = peak(), time.process_time()
classes = tuple(f"n{c:08d}" for c in range(1000))
files = PackedNames.from_iterable(f"{name}/{name}_{i}.JPEG" for name in classes for i in range(1300))
folder = ImageFolder(Path("/data/train"), files, np.repeat(np.arange(1000), 1300), classes)
folder.fingerprint()
rest, held_out = split(folder, 0.1, seed=1)
pickle.loads(pickle.dumps(rest))
plan = MicroBatchPlan(num_images=len(folder), seed=1, flip=True, micro_batch=256, first_sample=2_000_000)
assert folder.path(int(plan[0].indices[0])).startswith("/data/train/n")
print(time.process_time() - began, (peak() - before) / 1024)
"""


@pytest.mark.soak
def test_starting_with_a_million_files_takes_seconds_and_little_memory() -> None:
    (line,) = _output(IMAGENET)
    seconds, mebibytes = map(float, line.split())  # of the processor: other programs do not count
    assert seconds < 10 and mebibytes < 1024


DAMAGED = """
import sys
from itertools import islice
from sadm_fast.data import open_images
from tests.data.loaders import open_loader

source = open_images(sys.argv[1])
for seed in range(int(sys.argv[2])):
    with open_loader(source, seed=seed, micro_batch=64, threads=2) as batches:
        print(*(len(batch.labels) for batch in islice(batches, 2)), len(batches.broken))
"""


@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.soak)])
def test_dali_survives_damaged_headers_in_large_batches(make_folder: Any, times: int) -> None:
    # In runs of all 64 images at once this ends in a segmentation fault (see dali_loader), 30 times of 30.
    root = make_folder({f"class/{i:03d}.png": Image.new("L", (8, 8), i) for i in range(128)})
    for i in range(0, 128, 16):
        path = root / f"class/{i:03d}.png"
        path.write_bytes(path.read_bytes()[:20])
    assert _output(DAMAGED, root, times) == ["64 64 8"] * times
