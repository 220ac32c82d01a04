"""float32 rows on their way to the kernels: scaled if they are to be, and their mean taken off.

No distance notices the mean, but |a|^2 + |b|^2 - 2ab loses eps (mean / std)^2 of itself to it. It is a matter of b x d
numbers, beside the b x b x d of the kernels. Narrower features go as they are, and cosines, which are not distances:
at a mean at which the kernels would lose them, bfloat16 has no digits left for their differences.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sadm_kernels.samples import Pairs
from sadm_kernels.scaling import row_scale


class _Unit(NamedTuple):
    """Rows of length 1, and what they were multiplied by: [n, d], [n, 1]; rows of zeros stay so."""

    rows: Tensor
    factor: Tensor

    def gradient(self, own: range, g: Tensor) -> Tensor:
        """The gradient [b, d] of the own rows as they came, from that of the rows of length 1."""
        rows, factor = (x[own.start : own.stop] for x in self)
        return (g - rows * (rows * g).sum(1, keepdim=True)) * factor


class Prepared(NamedTuple):
    """What the kernels get in the place of some pairs."""

    pairs: Pairs
    units: tuple[_Unit, _Unit] | None  # of real and fake, where they were scaled here

    def gradient(self, side: int, g: Tensor | None) -> Tensor | None:
        """A gradient of the kernels [b, d] as one of the caller's rows; side: 0 real, 1 fake."""
        if g is None or self.units is None:
            return g
        return self.units[side].gradient(self.pairs.own, g)


def prepared(p: Pairs) -> Prepared:
    """The pairs with centred rows if they are float32 and compared by distances, else as they are."""
    real, fake, *_ = p.samples
    if real.dtype != torch.float32 or p.options.relation == "cosine":
        return Prepared(p, None)
    if not p.options.unit:
        return Prepared(p._replace(samples=p.samples._replace(real=_centred(real), fake=_centred(fake))), None)
    units = (_unit(real), _unit(fake))
    real, fake = (_centred(unit.rows) for unit in units)
    samples, options = p.samples._replace(real=real, fake=fake), p.options._replace(normalize="none")
    return Prepared(p._replace(samples=samples, options=options), units)


def _centred(x: Tensor) -> Tensor:
    return x - x.sum(0) / max(len(x), 1)


def _unit(x: Tensor) -> _Unit:
    scale = row_scale(x)  # a power of two: squares stay in float32's range
    rows = x / scale
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    inverse = torch.where(length == 0, 0.0, 1.0 / length)
    return _Unit(rows * inverse, inverse / scale)
