"""Latents as LightningDiT's extract_features.py writes them.

    DIR/latents_rank00_shard000.safetensors   latents       float [n, c, h, w], one draw of each image's posterior, raw
                                              latents_flip  the same of the mirror images
                                              labels        int64 [n]
    DIR/latents_stats.pt                      mean, std     float [1, c, 1, 1]

Samples are in the order of file names and of rows, as in its ImgLatentDataset. That trains on (latent - mean) / std
with `latent_norm: true` and `latent_multiplier: 1.0`, which is what a scale of null means here, or on latent *
latent_multiplier with `latent_norm: false`: latents.scale. Which autoencoder made them is not in the files.

Source: hustvl/LightningDiT, extract_features.py and datasets/img_latent_dataset.py.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sadm_fast.data.latents import LatentSource, described, map_tensors, not_finite
from sadm_fast.data.shards import MAX_CLASSES
from sadm_fast.data.source import PackedNames, hash_names
from sadm_fast.errors import UserError
from sadm_fast.scales import LatentScale

STATS = "latents_stats.pt"

_TENSORS = ("latents", "latents_flip", "labels")


def holds_lightning_latents(root: Path) -> bool:
    """Whether safetensors files lie in the folder `root` itself."""
    try:
        return any(root.glob("*.safetensors"))
    except (OSError, ValueError):
        return False


class LightningLatents(LatentSource):
    """The latents of a folder; `scale` is by channel if the folder holds latents_stats.pt."""

    _names: PackedNames  # name and size of each file, as they were when they were listed

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map the files of a folder; shapes and labels are checked, values are not (check_shards).

        Classes are "0" to the largest label. Raises UserError: a file that is cut short, lacks a tensor, or whose
        shapes do not agree with each other or the other files'; a label that is no class; damaged statistics.
        """
        root = Path(path)
        files = sorted(root.glob("*.safetensors"))
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        labels: list[np.ndarray] = []
        for file in files:
            latents, flipped, of_file = _map_file(file)
            if pairs and (latents.shape[1:], latents.dtype) != (pairs[0][0].shape[2:], pairs[0][0].dtype):
                raise UserError(
                    f"{file}: its latents are {described(latents)}, those of {files[0].name}"
                    f" {described(pairs[0][0][:, 0])}; give files of one data set"
                )
            pairs.append((latents[:, None], flipped[:, None]))
            labels.append(of_file)
        if not sum(map(len, labels)):
            raise UserError(f"data.path={root}: the files hold no latents; give some that do")
        classes = tuple(map(str, range(max(int(of_file.max(initial=0)) for of_file in labels) + 1)))
        scale = LatentScale(1.0)
        stats = root / STATS
        if stats.exists():
            mean, std = _read_stats(stats, pairs[0][0].shape[2])
            scale = LatentScale(tuple((1 / std).tolist()), tuple(mean.tolist()))
        source = cls(root, files, pairs, labels, classes, scale)
        source._names = PackedNames.from_iterable(f"{file.name} {file.stat().st_size}" for file in files)
        return source

    def with_scale(self, scale: LatentScale | None) -> Self:
        """The same latents with another scale; None: that of latents_stats.pt, UserError if there is none."""
        if scale is None and not isinstance(self.scale.scale, tuple):
            raise UserError(
                f"data.path={self.where}: has no {STATS}, and latents.scale is null; put it there, or give"
                " latents.scale (0.18215 for Stable Diffusion's autoencoder)"
            )
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__, scale=self.scale if scale is None else scale)
        return chosen

    @property
    def space(self) -> dict[str, Any]:
        return {"autoencoder": None, **self.scale.to_json()}

    def described(self) -> str:
        by = f"normalised by {STATS}" if isinstance(self.scale.scale, tuple) else f"without {STATS}"
        return f"latents {list(self.latent_shape)} of {len(self.classes)} classes in LightningDiT's layout, {by}"

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and sizes of the files, the shape, labels and the chosen rows; not values."""
        digest = hash_names(self._names)
        digest.update(f"{self.dtype.str} {self.latent_shape}".encode())
        for numbers in (self._ends, self._rows, self.labels):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    def damage(self, number: int) -> str | None:
        bad, count = not_finite(self.pairs[number]), len(self.pairs[number][0])
        if not bad:
            return None
        return f"{self.files[number]}: {bad} of {count} latents hold values that are not finite; extract them again"


def _map_file(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """latents and latents_flip [n, c, h, w], read-only, and labels int64 [n]."""
    try:
        latents, flipped, labels = map_tensors(file, _TENSORS).values()
        if latents.ndim != 4 or latents.dtype.kind != "f" or latents.shape[2] != latents.shape[3]:
            raise ValueError(f"latents is {described(latents)}, not floats [n, c, h, h]")
        if flipped.shape != latents.shape or flipped.dtype != latents.dtype:
            raise ValueError(f"latents_flip is {described(flipped)}, latents {described(latents)}")
        if labels.shape != latents.shape[:1] or labels.dtype.kind != "i":
            raise ValueError(f"labels is {described(labels)}, not int64 [{len(latents)}]")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).replace("'", "").split())[:200]
        raise UserError(f"{file}: not a file of LightningDiT's latents ({reason}); extract or fetch it again") from None
    if len(bad := np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))):
        raise UserError(
            f"{file}: row {bad[0]} has label {labels[bad[0]]}; it must be a class number below {MAX_CLASSES}"
        )
    return latents, flipped, labels.copy()


def _read_stats(file: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel: float64 [c]."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (content[key].double() for key in ("mean", "std"))
    except Exception:  # torch raises nearly anything, with pages of advice
        raise UserError(f"{file}: holds no tensors called mean and std; fetch it again, or remove it") from None
    for key, value in (("mean", mean), ("std", std)):
        if value.shape != (1, channels, 1, 1):
            raise UserError(f"{file}: {key} is {list(value.shape)}, must be [1, {channels}, 1, 1]; fetch it again")
    if not (bool(mean.isfinite().all()) and bool(std.isfinite().all()) and bool((std > 0).all())):
        raise UserError(f"{file}: its numbers must be finite, and deviations above 0; fetch it again")
    return mean.flatten(), std.flatten()
