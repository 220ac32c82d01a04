# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What runs on the GPU of adamw.py: one pass over the elements, and a conditional copy.

Launched with enable_fp_fusion=False: a sum is fused with a product where tl.fma says so, as in adamw.h, and nowhere
else; roots and quotients are rounded correctly. So the bits are those of the definition on a CPU that fuses, too.
Every program reads the norm first, and nothing else where that forbids the step (`copy_back`: does not). Offsets are
64 bits wide: a flat parameter may have more than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def _between(a, b, share):
    """a + share (b - a), from the nearer end, as torch.lerp does."""
    distance = b - a
    return tl.where(share < 0.5, tl.fma(distance, share, a), tl.fma(distance, share - 1.0, b))


@triton.jit
def _average(MEAN, at, inside, master, share):
    tl.store(MEAN + at, _between(tl.load(MEAN + at, mask=inside), master, share), mask=inside)


@triton.jit
def _step(
    MASTER, GRADIENT, FIRST, SECOND, WEIGHT, MEAN0, MEAN1, MEAN2, MEAN3, at, inside, clip,
    beta2, rest1, rest2, eps, kept, lr_step, root, share0, share1, share2, share3,
    AVERAGES: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """The step of the elements `at` that are `inside`; None: all are."""
    gradient = tl.load(GRADIENT + at, mask=inside).to(tl.float32) * clip
    first = _between(tl.load(FIRST + at, mask=inside), gradient, rest1)
    second = tl.fma(gradient * rest2, gradient, tl.load(SECOND + at, mask=inside) * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(second), root) + eps
    master = tl.load(MASTER + at, mask=inside) * kept - tl.div_rn(first * lr_step, denominator)
    tl.store(FIRST + at, first, mask=inside)
    tl.store(SECOND + at, second, mask=inside)
    tl.store(MASTER + at, master, mask=inside)
    if AVERAGES > 0:
        _average(MEAN0, at, inside, master, share0)
    if AVERAGES > 1:
        _average(MEAN1, at, inside, master, share1)
    if AVERAGES > 2:
        _average(MEAN2, at, inside, master, share2)
    if AVERAGES > 3:
        _average(MEAN3, at, inside, master, share3)
    if HAS_WEIGHT:
        tl.store(WEIGHT + at, master.to(WEIGHT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "lr_step", "root", "kept", "share0", "share1", "share2", "share3"])
def adamw(
    MASTER, GRADIENT, FIRST, SECOND, WEIGHT, MEAN0, MEAN1, MEAN2, MEAN3, NORM,
    n, max_norm, beta2, rest1, rest2, eps, kept, lr_step, root, share0, share1, share2, share3,
    AVERAGES: tl.constexpr, HAS_WEIGHT: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = tl.load(NORM)
    clip = 1.0
    if CLIPPED:
        clip = tl.minimum(tl.div_rn(1.0, norm + 1e-6) * max_norm, 1.0)
    n = tl.where(norm - norm == 0.0, n, 0)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    # Without a mask it loads 16 bytes at a time, whatever n is.
    if start + BLOCK <= n:
        _step(
            MASTER, GRADIENT, FIRST, SECOND, WEIGHT, MEAN0, MEAN1, MEAN2, MEAN3, at, None, clip,
            beta2, rest1, rest2, eps, kept, lr_step, root, share0, share1, share2, share3, AVERAGES, HAS_WEIGHT,
        )  # fmt: skip
    elif start < n:
        _step(
            MASTER, GRADIENT, FIRST, SECOND, WEIGHT, MEAN0, MEAN1, MEAN2, MEAN3, at, at < n, clip,
            beta2, rest1, rest2, eps, kept, lr_step, root, share0, share1, share2, share3, AVERAGES, HAS_WEIGHT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def copy_back(TENSOR, SAVED, NORM, n, BLOCK: tl.constexpr):
    """TENSOR = SAVED [n] where the norm is not finite."""
    norm = tl.load(NORM)
    n = tl.where(norm - norm == 0.0, 0, n)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        tl.store(TENSOR + at, tl.load(SAVED + at))
    elif start < n:
        tl.store(TENSOR + at, tl.load(SAVED + at, mask=at < n), mask=at < n)
