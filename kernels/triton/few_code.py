# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""The kernels of few.py, for a micro-batch on one rank. Names and offsets are those of device_code.py."""

import triton
import triton.language as tl

from sadm_kernels.triton.pair_code import omega_of, penalty_of, pull_of, relation_of, slope_of


@triton.jit
def _lengths(
    X, own, d,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """1/|x| of float32 rows of any scale, 0 for rows of zeros, [BLOCK]."""
    ks = tl.arange(0, BLOCK_K)
    pointers = X + own[:, None] * d + ks[None, :]
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        x = tl.load(pointers + k, mask=ks[None, :] < d - k, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    squared = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        x = tl.load(pointers + k, mask=ks[None, :] < d - k, other=0.0) / power[:, None]
        squared += tl.sum(x * x, axis=1)
    zero = squared == 0
    return tl.where(zero, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(zero, 1.0, squared)))) / power


@triton.jit
def _diagonal(square, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    return tl.sum(tl.where(lanes[:, None] == lanes[None, :], square, 0.0), axis=1)


@triton.jit
def _few_side(
    X, scales, own, inside, d, gamma, stored,
    RELATION: tl.constexpr, UNIT: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_side` gives, norms included, which come from the same products (see row_norms).

    CENTRE, float32 distances: rows are scaled first, and the mean of the tile's rows is taken off, which no distance
    notices (see rows.py). `scales` [n] takes the own rows' 1/|x| where `stored`.
    """
    ks = tl.arange(0, BLOCK_K)
    row_pointers = X + own[:, None] * d + ks[None, :]
    column_pointers = X + inside[:, None] * d + ks[None, :]
    of_rows = tl.full([BLOCK], 1.0, dtype=tl.float32)
    of_columns = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if CENTRE and UNIT:
        of_rows = _lengths(X, own, d, BLOCK, BLOCK_K, EVEN_K)
        of_columns = _lengths(X, inside, d, BLOCK, BLOCK_K, EVEN_K)
        tl.store(scales + own, of_rows, mask=stored)
    dots = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    row_dots = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    column_dots = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        if EVEN_K:
            x_rows = tl.load(row_pointers + k)
            x_columns = tl.load(column_pointers + k)
        else:
            x_rows = tl.load(row_pointers + k, mask=ks[None, :] < d - k, other=0.0)
            x_columns = tl.load(column_pointers + k, mask=ks[None, :] < d - k, other=0.0)
        if CENTRE:
            x_rows = x_rows * of_rows[:, None]
            x_columns = x_columns * of_columns[:, None]
            centre = (tl.sum(x_rows, axis=0) + tl.sum(x_columns, axis=0)) * (0.5 / BLOCK)
            x_rows = x_rows - centre[None, :]
            x_columns = x_columns - centre[None, :]
        dots = tl.dot(x_rows, tl.trans(x_columns), dots, input_precision=PRECISION)
        row_dots = tl.dot(x_rows, tl.trans(x_rows), row_dots, input_precision=PRECISION)
        column_dots = tl.dot(x_columns, tl.trans(x_columns), column_dots, input_precision=PRECISION)
    of_rows = _diagonal(row_dots, BLOCK)
    of_columns = _diagonal(column_dots, BLOCK)
    if UNIT and not CENTRE:
        of_rows = tl.where(of_rows == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(of_rows == 0, 1.0, of_rows))))
        of_columns = tl.where(
            of_columns == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(of_columns == 0, 1.0, of_columns)))
        )
        tl.store(scales + own, of_rows, mask=stored)
    relation, distance = relation_of(
        dots, of_rows, of_columns, 1.0, gamma, RELATION, UNIT and not CENTRE, UNIT and CENTRE
    )  # fmt: skip
    return dots, relation, distance, of_columns


@triton.jit
def _few_half(
    side, slope, omega, gamma, weights, lines, offsets, plane,
    RELATION: tl.constexpr, UNIT: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """Store a tile of V and its lines' sums: `along`, and what goes with it (see few_gradient)."""
    dots, _, distance, _ = side
    pull = pull_of(side, slope, omega, 1.0, 0.0, gamma, RELATION, UNIT and not CENTRE, False)
    if weights.dtype.element_ty == tl.float16:
        # See row_gradient of device_code.py.
        largest = tl.maximum(tl.max(tl.abs(pull), axis=1), 2.0**-100)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        stored = (pull / power[:, None]).to(tl.float16)
        rounded = stored.to(tl.float32) * power[:, None]
        tl.store(lines + plane, power)
    else:
        stored = pull.to(weights.dtype.element_ty)
        rounded = stored.to(tl.float32)
        if CENTRE and UNIT:
            tl.store(lines + plane, tl.sum(rounded * (distance * distance), axis=1))
    tl.store(weights + offsets, stored)
    tl.store(lines, tl.sum(rounded * dots if UNIT and not CENTRE else rounded, axis=1))


@triton.jit(do_not_specialize=["n"])
def few_weights(
    F, G, weight, labels, real_weights, fake_weights, real_lines, fake_lines, scales, partials, n, d, gamma, delta,
    RELATION: tl.constexpr, PENALTY: tl.constexpr, UNIT: tl.constexpr, CENTRE: tl.constexpr, WEIGHTED: tl.constexpr,
    LABELLED: tl.constexpr, REAL: tl.constexpr, FAKE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V (see row_gradient) of all pairs, norms and sums included, for the inputs REAL, FAKE. Grid: tiles, T x T.

    V [T BLOCK, T BLOCK] in the features' dtype; lines [2, T, T BLOCK] and scales [2, n] float32 for few_gradient;
    `partials` [2, T T] takes the tiles' sums of omega rho and of omega.
    """
    T = tl.num_programs(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.minimum(rows, n - 1)
    inside = tl.minimum(columns, n - 1)
    stored = (rows < n) & (tl.program_id(0) == 0)
    f = _few_side(
        F, scales, own, inside, d, gamma, stored, RELATION, UNIT, CENTRE, BLOCK, BLOCK_K, EVEN_K, PRECISION
    )  # fmt: skip
    g = _few_side(
        G, scales + n, own, inside, d, gamma, stored, RELATION, UNIT, CENTRE, BLOCK, BLOCK_K, EVEN_K, PRECISION
    )  # fmt: skip
    counted = (rows < n)[:, None] & (columns < n)[None, :] & (inside[None, :] != own[:, None])
    omega = omega_of(own, inside, counted, weight, labels, WEIGHTED, LABELLED)
    difference = g[1] - f[1]
    tile = tl.program_id(1) * T + tl.program_id(0)
    tl.store(partials + tile, tl.sum(omega * penalty_of(difference, delta, PENALTY)))
    tl.store(partials + T * T + tile, tl.sum(omega))
    slope = omega * slope_of(difference, delta, PENALTY)
    offsets = rows[:, None] * (T * BLOCK) + columns[None, :]
    line = tl.program_id(0) * (T * BLOCK) + rows
    plane = T * T * BLOCK
    if REAL:
        _few_half(f, -slope, omega, gamma, real_weights, real_lines + line, offsets, plane, RELATION, UNIT, CENTRE)
    if FAKE:
        _few_half(g, slope, omega, gamma, fake_weights, fake_lines + line, offsets, plane, RELATION, UNIT, CENTRE)


@triton.jit(do_not_specialize=["tiles"])
def few_sums(partials, loss, inverse, tiles, BLOCK: tl.constexpr):
    """S and 1 / sum omega, float32, both 0 where no pair counts; of few_weights' `partials`. One program."""
    losses = tl.zeros([BLOCK], dtype=tl.float64)
    totals = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, tiles, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        losses += tl.load(partials + lanes, mask=lanes < tiles, other=0.0).to(tl.float64)
        totals += tl.load(partials + tiles + lanes, mask=lanes < tiles, other=0.0).to(tl.float64)
    total = tl.sum(totals)
    factor = tl.where(total < 2.0**-126, 0.0, 1.0 / total)  # NaN compares false and stays NaN
    tl.store(loss, (tl.sum(losses) * factor).to(tl.float32))
    tl.store(inverse, factor.to(tl.float32))


@triton.jit
def _few_gradient(
    X, weights, lines, scales, inverse, upstream, gradient, n, d,
    UNIT: tl.constexpr, CENTRE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    T = tl.num_programs(0)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.minimum(rows, n - 1)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    known = dims[None, :] < d
    x = tl.load(X + own[:, None] * d + dims[None, :], mask=known, other=0.0).to(tl.float32)
    factor = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if UNIT:
        factor = tl.load(scales + own)
    centre = tl.zeros([BLOCK_D], dtype=tl.float32)
    if CENTRE:
        x = x * factor[:, None]
        centre = tl.sum(x, axis=0) / BLOCK
    acc = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    along = tl.zeros([BLOCK], dtype=tl.float32)
    outward = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(T):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = tl.minimum(columns, n - 1)
        pull = tl.load(weights + rows[:, None] * (T * BLOCK) + columns[None, :])
        pointers = X + inside[:, None] * d + dims[None, :]
        if EVEN_D:
            x_columns = tl.load(pointers)
        else:
            x_columns = tl.load(pointers, mask=known, other=0.0)
        line = block * (T * BLOCK) + rows
        along += tl.load(lines + line)
        if X.dtype.element_ty == tl.float16:
            acc += tl.dot(pull, x_columns) * tl.load(lines + T * T * BLOCK + line)[:, None]
        else:
            if CENTRE:
                if UNIT:
                    x_columns = x_columns * tl.load(scales + inside)[:, None]
                    outward += tl.load(lines + T * T * BLOCK + line)
                x_columns = x_columns - centre[None, :]
            acc = tl.dot(pull, x_columns, acc, input_precision=PRECISION)
    if CENTRE:
        value = 2.0 * (along[:, None] * (x - centre[None, :]) - acc)
        if UNIT:
            value = factor[:, None] * (value - outward[:, None] * x)
    else:
        if UNIT:
            along = along * factor * factor
        value = 2.0 * factor[:, None] * (along[:, None] * x - acc)
    value = value * (tl.load(inverse) * tl.load(upstream))
    stored = (rows < n)[:, None] & known
    tl.store(gradient + rows[:, None] * d + dims[None, :], value.to(gradient.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["n"])
def few_gradient(
    F, G, real_weights, fake_weights, real_lines, fake_lines, scales, inverse, upstream, real_gradient, fake_gradient,
    n, d,
    UNIT: tl.constexpr, CENTRE: tl.constexpr, REAL: tl.constexpr, FAKE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients [n, d] of `upstream` S, in the features' dtype, from what few_weights and few_sums left.

    As in row_gradient; where CENTRE, rows are as few_weights had them but centred on the program's own rows, and UNIT
    ones have r_i with sum_j V_ij D_ij^2 = <r_i, 2 sum_j V_ij (r_i - r_j)> along themselves, which does not cancel.
    Grid: blocks of rows, chunks of d, the inputs wanted.
    """
    if REAL and FAKE:
        if tl.program_id(2) == 0:
            _few_gradient(
                F, real_weights, real_lines, scales, inverse, upstream, real_gradient, n, d,
                UNIT, CENTRE, BLOCK, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
        else:
            _few_gradient(
                G, fake_weights, fake_lines, scales + n, inverse, upstream, fake_gradient, n, d,
                UNIT, CENTRE, BLOCK, BLOCK_D, EVEN_D, PRECISION,
            )  # fmt: skip
    elif REAL:
        _few_gradient(
            F, real_weights, real_lines, scales, inverse, upstream, real_gradient, n, d,
            UNIT, CENTRE, BLOCK, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
    else:
        _few_gradient(
            G, fake_weights, fake_lines, scales + n, inverse, upstream, fake_gradient, n, d,
            UNIT, CENTRE, BLOCK, BLOCK_D, EVEN_D, PRECISION,
        )  # fmt: skip
