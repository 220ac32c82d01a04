"""EDM's augmentation of training images (Karras et al. 2022, appendix F.2), of which the network is told.

What was done to an image comes with it as labels, on which the denoiser is conditioned; samples are drawn at labels of
0, so that no augmentation leaks into them. Parameters and probabilities are the paper's. The resampling is our own: at
twice the resolution, between windowed-sinc filters.

Shapes in comments: B samples.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sadm_fast.counters import Purpose, uniform

LABELS = 9  # mirrored; upside down; scaling; rotation: cos - 1, sin; anisotropy: two; translation: two
_SCALE_STD = 0.2  # of log2, both scalings
_TRANSLATION_STD = 0.125  # of an image's side
_UNIFORM = 14  # numbers of a sample
_TAPS = 12


def augment(x0: Tensor, sample_ids: Tensor, seed: int, probability: float) -> tuple[Tensor, Tensor]:
    """Augment images x0 [B, C, H, W], as functions of (seed, sample_ids int64 [B]).

    Each image is mirrored with probability 1/2, and each of these is done with `probability` of its own: turning upside
    down (or, as likely, not), scaling, rotation, anisotropic scaling, translation. An image that none of the last four
    meets keeps its bits, but for mirroring.

    Returns:
        The images, and labels float32 [B, LABELS], 0 where nothing was done. As in EDM's release, those of the
        anisotropy do not tell a stretched axis from a shortened one that points the other way.
    """
    u = uniform(seed, Purpose.AUGMENT, sample_ids, _UNIFORM).unbind(1)  # 14 of float64 [B]
    done = [v < probability for v in u[:5]]  # upside down, scaling, rotation, anisotropy, translation
    zero = torch.zeros_like(u[0])
    mirrored, flipped = u[5] < 0.5, done[0] & (u[6] < 0.5)
    scaling = torch.where(done[1], torch.special.ndtri(u[7]), zero)
    angle = torch.where(done[2], math.pi * (2.0 * u[8] - 1.0), zero)
    anisotropy = torch.where(done[3], torch.special.ndtri(u[9]), zero)
    axis = torch.where(u[10] < 0.5, math.pi * (2.0 * u[11] - 1.0), zero)
    shifts = [torch.where(done[4], torch.special.ndtri(v), zero) for v in u[12:]]

    x = torch.where(mirrored.view(-1, 1, 1, 1), x0.flip(3), x0)
    x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(2), x)
    # From where in the image each place of the result comes: the inverses, the first one last.
    stretch = torch.exp2(_SCALE_STD * anisotropy)
    inverse = (
        _scale(torch.exp2(-_SCALE_STD * scaling))
        @ _rotation(-angle)
        @ (_rotation(axis) @ _diagonal(1.0 / stretch, stretch) @ _rotation(-axis))
    )  # [B, 2, 2]
    # In sides of the image, of which affine_grid has two from -1 to 1.
    offset = -inverse @ torch.stack(shifts, dim=1)[:, :, None] * (2.0 * _TRANSLATION_STD)  # [B, 2, 1]
    moved = torch.stack(done[1:]).any(dim=0).view(-1, 1, 1, 1)
    x = torch.where(moved, _resampled(x, torch.cat([inverse, offset], dim=2).to(x.dtype)), x)
    labels = [
        mirrored, flipped, scaling, angle.cos() - 1.0, angle.sin(), anisotropy * axis.cos(), anisotropy * axis.sin(),
        *shifts,
    ]  # fmt: skip
    return x, torch.stack([label.double() for label in labels], dim=1).float()


def _diagonal(a: Tensor, b: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([a, b], dim=1))


def _scale(a: Tensor) -> Tensor:
    return _diagonal(a, a)


def _rotation(angle: Tensor) -> Tensor:
    """[B, 2, 2], of (x, y)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _resampled(x: Tensor, inverse: Tensor) -> Tensor:
    """Images [B, C, H, W] under the affine map whose inverse is [B, 2, 3] in coordinates from -1 to 1.

    What lies outside is mirrored at the edge.
    """
    channels, half = x.shape[1], _TAPS // 2
    line = _low_pass(x)
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, _TAPS, _TAPS)
    wide = F.conv_transpose2d(
        _mirror_padded(x, half), 4.0 * kernel, stride=2, padding=3 * half - 1, groups=channels
    )  # [B, C, 2H, 2W]
    grid = F.affine_grid(inverse, list(wide.shape), align_corners=False)
    wide = F.grid_sample(wide, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.conv2d(_mirror_padded(wide, half - 1), kernel, stride=2, groups=channels)


def _mirror_padded(x: Tensor, by: int) -> Tensor:
    """Pad height and width, however small they are, by mirroring at the edge."""
    for dim in (2, 3):
        side = x.shape[dim]
        place = torch.arange(-by, side + by, device=x.device) % (2 * side)
        x = x.index_select(dim, torch.where(place < side, place, 2 * side - 1 - place))
    return x


def _low_pass(like: Tensor) -> Tensor:
    """Taps [12] of the filter between an image and one of twice the resolution: a sinc under Kaiser's window; sum 1."""
    places = torch.arange(_TAPS, device=like.device, dtype=like.dtype) - (_TAPS - 1) / 2
    window = torch.kaiser_window(_TAPS, periodic=False, beta=5.0, device=like.device, dtype=like.dtype)
    taps = torch.sinc(places / 2.0) * window
    return taps / taps.sum()
