# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What runs on the GPU of adamw.py: one pass over the elements, and a conditional copy.

Every program reads the norm first and ends where it is not finite (or is: `copy_back`), so nothing else is read or
written then. Offsets are 64 bits wide: a flat parameter may have more than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def _finite(norm):
    return tl.abs(norm) < float("inf")  # NaN compares false


@triton.jit
def _between(a, b, share):
    """a + share (b - a), from the nearer end, as torch.lerp does."""
    return tl.where(share < 0.5, a + share * (b - a), b - (b - a) * (1.0 - share))


@triton.jit(do_not_specialize=["n", "lr_step", "root", "kept", "share0", "share1", "share2", "share3"])
def adamw(
    MASTER, GRADIENT, FIRST, SECOND, WEIGHT, MEAN0, MEAN1, MEAN2, MEAN3, NORM,
    n, max_norm, beta2, rest1, rest2, eps, kept, lr_step, root, share0, share1, share2, share3,
    AVERAGES: tl.constexpr, HAS_WEIGHT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = tl.load(NORM)
    if _finite(norm):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        gradient = tl.load(GRADIENT + at, mask=inside, other=0.0).to(tl.float32)
        if CLIPPED:
            gradient *= tl.minimum(max_norm / (norm + 1e-6), 1.0)
        first = _between(tl.load(FIRST + at, mask=inside, other=0.0), gradient, rest1)
        second = tl.load(SECOND + at, mask=inside, other=0.0) * beta2 + rest2 * gradient * gradient
        master = tl.load(MASTER + at, mask=inside, other=0.0) * kept
        master -= lr_step * first / (tl.sqrt(second) / root + eps)
        tl.store(FIRST + at, first, mask=inside)
        tl.store(SECOND + at, second, mask=inside)
        tl.store(MASTER + at, master, mask=inside)
        if AVERAGES > 0:
            mean = tl.load(MEAN0 + at, mask=inside, other=0.0)
            tl.store(MEAN0 + at, _between(mean, master, share0), mask=inside)
        if AVERAGES > 1:
            mean = tl.load(MEAN1 + at, mask=inside, other=0.0)
            tl.store(MEAN1 + at, _between(mean, master, share1), mask=inside)
        if AVERAGES > 2:
            mean = tl.load(MEAN2 + at, mask=inside, other=0.0)
            tl.store(MEAN2 + at, _between(mean, master, share2), mask=inside)
        if AVERAGES > 3:
            mean = tl.load(MEAN3 + at, mask=inside, other=0.0)
            tl.store(MEAN3 + at, _between(mean, master, share3), mask=inside)
        if HAS_WEIGHT:
            tl.store(WEIGHT + at, master.to(WEIGHT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def copy_back(TENSOR, SAVED, NORM, n, BLOCK: tl.constexpr):
    """TENSOR = SAVED [n] where the norm is not finite."""
    if not _finite(tl.load(NORM)):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        tl.store(TENSOR + at, tl.load(SAVED + at, mask=inside), mask=inside)
