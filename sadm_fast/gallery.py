"""Looking at a model in training: sample grids, the discriminator's view of a fixed batch, Frechet distances."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sadm_fast.config import Config
from sadm_fast.counters import Purpose, normal
from sadm_fast.data.source import Source
from sadm_fast.feed import load_samples
from sadm_fast.game import Batch, predict
from sadm_fast.generation import generate, to_images
from sadm_fast.models import DiT
from sadm_fast.models.autoencoder import Autoencoder
from sadm_fast.scales import float_to_pixels
from sadm_kernels import relation_matrix

_RELATION_IMAGES = 60
# The fixed batch is noisier than most of what is trained on: there the denoiser has to guess structure.
_RELATION_LEVEL = 0.8
_GRID_GAP = 2
_GRID_SCALE_TO = 56  # small images are enlarged to about this many pixels


def grid_classes(num_classes: int, columns: int) -> list[int]:
    """The classes shown in a grid's columns: all, or `columns` of them evenly chosen."""
    shown = min(num_classes, columns)
    return [i * num_classes // shown for i in range(shown)]


def picture_grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], row by row, as one picture uint8 [C, H', W'] with light gaps."""
    factor = max(1, round(_GRID_SCALE_TO / images.shape[-1]))
    pixels = float_to_pixels(images).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    n, c, h, w = pixels.shape
    rows = -(-n // columns)
    canvas = torch.full(
        (c, rows * (h + _GRID_GAP) + _GRID_GAP, columns * (w + _GRID_GAP) + _GRID_GAP), 230, dtype=torch.uint8
    )
    for i in range(n):
        top, left = _GRID_GAP + i // columns * (h + _GRID_GAP), _GRID_GAP + i % columns * (w + _GRID_GAP)
        canvas[:, top : top + h, left : left + w] = pixels[i].cpu()
    return canvas


def save_picture(picture: Tensor, path: Path) -> None:
    """A PNG of uint8 [1 or 3, H, W]; replaces an existing file as a whole."""
    array = picture.permute(1, 2, 0).numpy()
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(temporary, format="PNG")
    temporary.replace(path)


def sample_grid(
    config: Config, model: DiT, num_classes: int, device: torch.device, autoencoder: Autoencoder | None
) -> Tensor:
    """The grid of the run: a column a class, a row a starting noise; uint8 [C, H', W']."""
    classes = grid_classes(num_classes, config.sampling.columns)
    ids = torch.arange(len(classes) * config.sampling.rows, device=device)
    labels = torch.tensor(classes, device=device).repeat(config.sampling.rows)
    samples = generate(
        config, model, labels, ids, steps=config.sampling.steps, guidance_scale=config.sampling.guidance_scale
    )
    return picture_grid(to_images(samples, autoencoder), len(classes))


def real_grid(config: Config, source: Source, device: torch.device, autoencoder: Autoencoder | None) -> Tensor:
    """Real images of the same classes in the same arrangement; latents are decoded."""
    classes = grid_classes(len(source.classes), config.sampling.columns)
    chosen = []
    for row in range(config.sampling.rows):
        for c in classes:
            members = np.flatnonzero(source.labels == c)
            if len(members):  # a class of latents may be empty: all its images were broken
                chosen.append(int(members[row % len(members)]))
    samples = load_samples(config, source, chosen)
    return picture_grid(to_images(samples.to(device), autoencoder), len(classes))


class RelationView:
    """What the discriminator sees: relations of a fixed real batch, and of its denoised counterpart."""

    def __init__(self, config: Config, source: Source, device: torch.device) -> None:
        self._config = config
        per_class = max(1, _RELATION_IMAGES // len(source.classes))
        classes = grid_classes(len(source.classes), _RELATION_IMAGES)
        chosen = [int(i) for c in classes for i in np.flatnonzero(source.labels == c)[:per_class]]
        x0 = load_samples(config, source, chosen).to(device)
        labels = torch.from_numpy(source.labels[chosen]).long().to(device)
        ids = torch.arange(len(x0), device=device) + (1 << 33)  # noise that no training sample has
        level = torch.full((len(x0),), _RELATION_LEVEL, dtype=torch.float64, device=device)
        noise = normal(config.seed, Purpose.NOISE, ids, x0.shape[1:])
        self._batch = Batch(x0, labels, labels, noise, config.process.sample_t(level), level)

    @torch.no_grad()
    def save(self, path: Path, denoiser: nn.Module, psi: nn.Module) -> None:
        """relations/step-N.npz: real and fake relation matrices [B, B], labels [B], log_snr [B]."""
        game, batch = self._config.game, self._batch
        xhat0 = predict(self._config.process, denoiser, batch).xhat0

        def matrix(x: Tensor) -> np.ndarray:
            relation = relation_matrix(psi(x), relation=game.relation, normalize=game.normalize, tau=game.tau)
            return relation.cpu().numpy()

        np.savez_compressed(
            path,
            real=matrix(batch.x0),
            fake=matrix(xhat0),
            labels=batch.labels.cpu().numpy(),
            log_snr=self._config.process.log_snr(batch.t).cpu().numpy(),
        )
