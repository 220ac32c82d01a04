"""Medical images of your own, in the layout of MedMNIST: one .npz with {train,val,test}_images and _labels.

    python examples/medical.py --npz pneumoniamnist.npz      # trains on train_images, into runs/medical
    python examples/medical.py --stand-in                    # on made-up images, to see that it runs

Images are uint8 [N, S, S] or [N, S, S, 3], labels whole numbers [N, 1]. They are small enough to be kept in memory, so
nothing is unpacked; square images need no network of their own.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

import sadm_fast

CONFIG: dict[str, Any] = {
    "name": "medical",
    "denoiser": {"patch_size": 4, "hidden_size": 128, "depth": 4, "num_heads": 4},
    "game": {"start_step": 1000, "lambda_s": 0.3, "gate_log_snr": -2.2},
    "denoiser_optimizer": {"lr": 2e-3, "warmup_steps": 50, "decay_steps": 1000},
    "train": {"steps": 2000, "micro_batch": 64},
    "evaluate": {"every": 1000, "samples": 1000},
}


def read(path: Path, part: str = "train") -> sadm_fast.Arrays:
    """One part ("train", "val" or "test") of a file.

    Raises:
        UserError: it cannot be read, or is not of this layout; an image has several labels.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise sadm_fast.UserError(f"--npz {path}: {part}_images and {part}_labels cannot be read ({error})") from None
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or images.shape[1] != images.shape[2]:
        found = f"{images.dtype} {list(images.shape)}"
        raise sadm_fast.UserError(f"--npz {path}: {part}_images are {found}; must be uint8 [N, S, S] or [N, S, S, 3]")
    if labels.reshape(len(images), -1).shape[1] != 1:
        raise sadm_fast.UserError(f"--npz {path}: an image has several labels; choose one column, or all of one class")
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    scaled = channels_first.astype(np.float32) / 127.5 - 1
    return sadm_fast.Arrays(scaled, labels.reshape(-1).astype(np.int64), where=path.name)


def write_stand_in(path: Path, count: int = 200, side: int = 28) -> None:
    """Write made-up images of two classes, bright discs and rings on noise, in the layout of MedMNIST."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    parts: dict[str, Any] = {}
    for part, n in (("train", count), ("val", count // 10), ("test", count // 10)):
        labels = np.arange(n) % 2
        centre, radius = rng.uniform(0.35, 0.65, (2, n, 1, 1)) * side, rng.uniform(0.15, 0.3, (n, 1, 1)) * side
        away = np.hypot(x - centre[0], y - centre[1])
        shape = np.where(labels[:, None, None] == 0, away < radius, np.abs(away - radius) < 1.5)
        images = 40 + 150 * shape + rng.normal(0, 10, shape.shape)
        parts |= {f"{part}_images": images.clip(0, 255).astype(np.uint8), f"{part}_labels": labels[:, None]}
    np.savez_compressed(path, **parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, default=Path("datasets/medical.npz"), help="a file in MedMNIST's layout")
    parser.add_argument("--stand-in", action="store_true", help="write made-up images to --npz first")
    parser.add_argument("--run-dir", type=Path, help="the run's folder (default: runs/medical)")
    parser.add_argument("--steps", type=int, default=CONFIG["train"]["steps"], help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.stand_in:
        arguments.npz.parent.mkdir(parents=True, exist_ok=True)
        write_stand_in(arguments.npz)
    config = {**CONFIG, "train": {**CONFIG["train"], "steps": arguments.steps}}
    try:
        return 0 if sadm_fast.train(config, data=read(arguments.npz), run_dir=arguments.run_dir) else 75
    except sadm_fast.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
