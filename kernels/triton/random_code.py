# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What runs on the GPU of streams.py: the random numbers of a micro-batch in one launch.

PRECISE takes CUDA's own logf, sinf and cosf, which torch's operations call as well; the interpreter has none of them.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

TWO_PI: tl.constexpr = tl.constexpr(6.283185307179586)


@triton.jit
def _words(block, stream, sample, key0, key1):
    """The four words of Philox4x32-10's counter (block int32 [N], stream, sample)."""
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + stream.to(tl.uint32)
    c2 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (sample >> 32).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, key0.to(tl.uint32), key1.to(tl.uint32))


@triton.jit
def _word(number, stream, sample, key0, key1):
    """Number `number` (int32 [N]) of a stream and a sample: word number % 4 of counter number // 4."""
    w0, w1, w2, w3 = _words(number // 4, stream, sample, key0, key1)
    which = number % 4
    return tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))


@triton.jit
def _uniform(number, stream, sample, key0, key1):
    return _to_unit(_word(number, stream, sample, key0, key1))


@triton.jit
def _to_unit(word):
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit(do_not_specialize=["key0", "key1", "stream", "stream0", "stream1"])
def draw(
    IDS, NORMAL, FIRST, key0, key1, stream, stream0, stream1, samples, count, half,
    PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """NORMAL [samples, count] by Box-Muller from `stream`, and FIRST [2, samples] float64 from the two others."""
    row = tl.program_id(0)
    sample = tl.load(IDS + row)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = _uniform(i, stream, sample, key0, key1)
    angle = _uniform(half + i, stream, sample, key0, key1) * TWO_PI
    if PRECISE:
        radius = tl.sqrt_rn(libdevice.log(u) * -2.0)
        cosine = radius * libdevice.cos(angle)
        sine = radius * libdevice.sin(angle)
    else:
        radius = tl.sqrt(tl.log(u) * -2.0)
        cosine = radius * tl.cos(angle)
        sine = radius * tl.sin(angle)
    at = NORMAL + row.to(tl.int64) * count + i
    tl.store(at, cosine, mask=i < half)
    tl.store(at + half, sine, mask=(i < half) & (half + i < count))
    if tl.program_id(1) == 0:
        which = tl.arange(0, 2)
        word = _word(tl.zeros_like(which), tl.where(which == 0, stream0, stream1), sample, key0, key1)
        tl.store(FIRST + which * samples + row, (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10)


@triton.jit(do_not_specialize=["key0", "key1", "stream"])
def keep(IDS, KEPT, key0, key1, stream, rate, count, BLOCK: tl.constexpr):
    """KEPT [samples, count]: whether the numbers of `stream` are at least `rate`."""
    row = tl.program_id(0)
    sample = tl.load(IDS + row)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = _words(block, stream, sample, key0, key1)
    i = 4 * block
    at = KEPT + row.to(tl.int64) * count + i
    tl.store(at, _to_unit(w0) >= rate, mask=i < count)
    tl.store(at + 1, _to_unit(w1) >= rate, mask=i + 1 < count)
    tl.store(at + 2, _to_unit(w2) >= rate, mask=i + 2 < count)
    tl.store(at + 3, _to_unit(w3) >= rate, mask=i + 3 < count)
