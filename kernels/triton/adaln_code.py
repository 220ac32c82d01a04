# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What runs on the GPU of adaln.py. A program takes ROWS tokens of one sample, one after the other; a row of D features
is held whole, in registers, so every activation is read and written once. Statistics and sums are float32.

x, h, y are [B, T, D], contiguous; shift, scale, gate [B, D], rows `stride` apart; mean and rstd float32 [B, T]. Sums
over a sample's tokens leave each program as one float32 row of `parts` [B, programs, D], to be added in order.
"""

import triton
import triton.language as tl


@triton.jit
def _normalized(x, inside, d, eps):
    """x [D] without its mean, over its deviation; mean; 1 / deviation. Lanes outside are 0."""
    mean = tl.sum(x, 0) / d
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / d + eps)
    return centred * rstd, mean, rstd


@triton.jit
def forward(
    X, H, GATE, SHIFT, SCALE, X_OUT, Y, MEAN, RSTD, gate_stride, shift_stride, scale_stride, t, d, eps,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Y = LN(x) (1 + scale) + shift of x = X, or of x = X_OUT = X + gate H."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    shift = tl.load(SHIFT + sample * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(GATE + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, tl.minimum(first + ROWS, t)):
        token = sample * t + row
        at = token * d + columns
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            h = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
            rounded = (x + gate * h).to(X_OUT.dtype.element_ty)
            tl.store(X_OUT + at, rounded, mask=inside)
            x = rounded.to(tl.float32)  # the backward pass finds the rounded ones
        normal, mean, rstd = _normalized(x, inside, d, eps)
        tl.store(Y + at, (normal * (1.0 + scale) + shift).to(Y.dtype.element_ty), mask=inside)
        tl.store(MEAN + token, mean)
        tl.store(RSTD + token, rstd)


@triton.jit
def backward(
    DX_OUT, DY, X, H, GATE, SCALE, MEAN, RSTD, DX, DH, DGATE, DSHIFT, DSCALE, gate_stride, scale_stride, t, d, programs,
    GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of `forward`; X is what was normalised, DX_OUT what arrives at it besides (GATED)."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    scale = 1.0 + tl.load(SCALE + sample * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK], dtype=tl.float32)
    d_scale = tl.zeros([BLOCK], dtype=tl.float32)
    if GATED:
        gate = tl.load(GATE + sample * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        d_gate = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(first, tl.minimum(first + ROWS, t)):
        token = sample * t + row
        at = token * d + columns
        mean = tl.load(MEAN + token)
        rstd = tl.load(RSTD + token)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        normal = tl.where(inside, (x - mean) * rstd, 0.0)
        d_shift += dy
        d_scale += dy * normal
        g = dy * scale
        dx = rstd * (g - tl.sum(g, 0) / d - normal * (tl.sum(g * normal, 0) / d))
        if GATED:
            dx += tl.load(DX_OUT + at, mask=inside, other=0.0).to(tl.float32)
            h = tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
            d_gate += dx * h
            tl.store(DH + at, (dx * gate).to(DH.dtype.element_ty), mask=inside)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    part = (sample * programs + tl.program_id(1)) * d + columns
    tl.store(DSHIFT + part, d_shift, mask=inside)
    tl.store(DSCALE + part, d_scale, mask=inside)
    if GATED:
        tl.store(DGATE + part, d_gate, mask=inside)
