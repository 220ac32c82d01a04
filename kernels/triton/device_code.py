# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""The kernels of launch.py: norms, sums over pairs, gradients.

Names: rows i are this rank's b samples, columns j all n of them; row i is column first + i, so that everything is read
from the columns' tensors. F and G are real and fake features [n, d], contiguous. `stats` [2, n] float32 (real, fake)
is all that is known of a column beforehand: s = 1/|x|, 0 for a row of zeros, where rows are scaled to length 1 (UNIT);
otherwise |x|^2. `moments` float32 [4] is (1/m_F, 1/m_G, kappa_F, kappa_G), read where MEAN; reference.py has the names.

Offsets are 32 bits wide (the host checks n d < 2^31), and rows and columns beyond the end are clamped to the last one
and given the weight 0: 64-bit offsets and masked loads of whole tiles cost more registers than there are. As in
reference.py, 0 * NaN stays NaN. What is masked out of a load is 0, and nothing depends on the order of programs.
"""

import triton
import triton.language as tl

from sadm_kernels.triton.pair_code import omega_of, penalty_of, pull_of, relation_of, slope_of


@triton.jit
def _products(
    X, rows, columns, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, x_j>, [M, N] float32."""
    ks = tl.arange(0, BLOCK_K)
    row_pointers = X + rows[:, None] * d + ks[None, :]
    column_pointers = X + columns[None, :] * d + ks[:, None]
    dots = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        if EVEN_K:
            x_rows = tl.load(row_pointers + k)
            x_columns = tl.load(column_pointers + k)
        else:
            x_rows = tl.load(row_pointers + k, mask=ks[None, :] < d - k, other=0.0)
            x_columns = tl.load(column_pointers + k, mask=ks[:, None] < d - k, other=0.0)
        dots = tl.dot(x_rows, x_columns, dots, input_precision=PRECISION)
    return dots


@triton.jit
def _side(
    X, stats, own, columns, d, scale, gamma,
    RELATION: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, x_j>, R_ij, D_ij of one input, [M, N], and the columns' `stats`, [N]."""
    dots = _products(X, own, columns, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    of_columns = tl.load(stats + columns)
    relation, distance = relation_of(dots, tl.load(stats + own), of_columns, scale, gamma, RELATION, UNIT, SCALED)
    return dots, relation, distance, of_columns


@triton.jit
def _pairs(
    F, G, stats, weight, labels, scale_f, scale_g, rows, columns, first, b, n, d, gamma,
    RELATION: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both sides of a tile and its pair weights; `rows` and `columns` may run beyond the end."""
    own = tl.minimum(rows, b - 1) + first
    inside = tl.minimum(columns, n - 1)
    f = _side(
        F, stats, own, inside, d, scale_f, gamma,
        RELATION, UNIT, SCALED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    g = _side(
        G, stats + n, own, inside, d, scale_g, gamma,
        RELATION, UNIT, SCALED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    # Only now: masks held in registers across the products would spill.
    counted = (rows < b)[:, None] & (columns < n)[None, :] & (inside[None, :] != own[:, None])
    return f, g, omega_of(own, inside, counted, weight, labels, WEIGHTED, LABELLED)


@triton.jit
def _scales(moments, MEAN: tl.constexpr):
    """1/m of both inputs; 1 where distances are not divided by their mean."""
    scale_f = 1.0
    scale_g = 1.0
    if MEAN:
        scale_f = tl.load(moments)
        scale_g = tl.load(moments + 1)
    return scale_f, scale_g


@triton.jit
def _norms(
    X, stats, n, d,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.minimum(columns, n - 1)
    dots = _products(X, inside, inside, d, BLOCK, BLOCK, BLOCK_K, EVEN_K, PRECISION)
    lanes = tl.arange(0, BLOCK)
    squared = tl.sum(tl.where(lanes[:, None] == lanes[None, :], dots, 0.0), axis=1)
    if UNIT:
        zero = squared == 0
        squared = tl.where(zero, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(zero, 1.0, squared))))
    tl.store(stats + columns, squared, mask=columns < n)


@triton.jit(do_not_specialize=["n"])
def row_norms(
    F, G, stats, n, d,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`stats` of all columns. Grid: blocks of columns, 2 inputs.

    |x|^2 is the diagonal of the same matrix product that <x_i, x_j> comes from, not a sum of squares: tensor cores
    round the terms of a sum towards zero, which makes long ones too small, but equal rows alike. Their distance is
    then 0 for every d, and not only where the bias stays below MERGE. It costs BLOCK/n of what the pairs cost.
    """
    if tl.program_id(1) == 0:
        _norms(F, stats, n, d, UNIT, BLOCK, BLOCK_K, EVEN_K, PRECISION)
    else:
        _norms(G, stats + n, n, d, UNIT, BLOCK, BLOCK_K, EVEN_K, PRECISION)


@triton.jit(do_not_specialize=["first", "b", "n"])
def weight_sums(
    weight, labels, partials, first, b, n,
    WEIGHTED: tl.constexpr, LABELLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`partials` [b]: sum_j omega_ij. Grid: blocks of rows.

    On its own, because in the others this sum would need the weights in a second register layout.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(rows, b - 1) + first
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = tl.minimum(columns, n - 1)
        counted = (columns < n)[None, :] & (inside[None, :] != own[:, None])
        sums += tl.sum(omega_of(own, inside, counted, weight, labels, WEIGHTED, LABELLED), axis=1)
    tl.store(partials + rows, sums, mask=rows < b)


@triton.jit(do_not_specialize=["first", "b", "n"])
def pair_sums(
    F, G, stats, weight, labels, moments, partials, first, b, n, d, gamma, delta,
    STATISTIC: tl.constexpr, RELATION: tl.constexpr, PENALTY: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
    MEAN: tl.constexpr, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr, TRIANGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over pairs, a column of `partials` [1 or 2, programs] from each program (tile).

    STATISTIC "loss": omega rho(R_G - R_F); "distances": omega D, real and fake; "slopes": Q u, real and fake.
    TRIANGLE (b == n): only the tiles on and above the diagonal; those above count twice. Grid: T (T + 1) / 2 of
    T = ceil(n / BLOCK_M), BLOCK_N = BLOCK_M. Otherwise: all tiles, row block by row block.
    """
    program = tl.program_id(0)
    if TRIANGLE:
        # Exact in integers: row t has T - t tiles, and row T - 1 - t the t + 1 that make them up to T + 1.
        T = tl.cdiv(n, BLOCK_M)
        t = program // (T + 1)
        rest = program % (T + 1)
        row_block = tl.where(rest < T - t, t, T - 1 - t)
        column_block = tl.where(rest < T - t, t + rest, rest - 1)
        times = tl.where(row_block == column_block, 1.0, 2.0)
    else:
        across = tl.cdiv(n, BLOCK_N)
        row_block = program // across
        column_block = program % across
        times = 1.0
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_f, scale_g = _scales(moments, MEAN)
    f, g, omega = _pairs(
        F, G, stats, weight, labels, scale_f, scale_g, rows, columns, first, b, n, d, gamma,
        RELATION, UNIT, SCALED, WEIGHTED, LABELLED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    _, f_relation, f_distance, _ = f
    _, g_relation, g_distance, _ = g
    difference = g_relation - f_relation
    if STATISTIC == "loss":
        tl.store(partials + program, times * tl.sum(omega * penalty_of(difference, delta, PENALTY)))
    else:
        if STATISTIC == "distances":
            f_term = omega * f_distance
            g_term = omega * g_distance
        else:
            slope = omega * slope_of(difference, delta, PENALTY)
            f_term = -slope * (f_distance * scale_f)
            g_term = slope * (g_distance * scale_g)
            if RELATION == "gaussian":
                f_term = f_term * (f_distance * scale_f) * f_relation * (-2.0 * gamma)
                g_term = g_term * (g_distance * scale_g) * g_relation * (-2.0 * gamma)
        tl.store(partials + program, times * tl.sum(f_term))
        tl.store(partials + tl.num_programs(0) + program, times * tl.sum(g_term))


@triton.jit(do_not_specialize=["first", "b", "n"])
def row_gradient(
    F, G, stats, weight, labels, moments, gradient, partials, first, b, n, d, gamma, delta,
    RELATION: tl.constexpr, PENALTY: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr, LABELLED: tl.constexpr, FAKE: tl.constexpr, LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gradient` [b, d] float32 of one input, FAKE or real. Grid: blocks of rows, chunks of d.

    A program owns its part of the gradient and goes through all columns: attention without softmax. Where LOSS, the
    programs of the first chunk leave sum_j omega_ij rho_ij in `partials` [b].

    With V_ij = W_ij s_j, rounded to what the tensor cores multiply, and t_i = sum_j V_ij x_j, the gradient is
        UNIT:       2 s_i (x_i s_i^2 sum_j V_ij <x_i, x_j> - t_i)       t_i without its part along x_i
        otherwise:  2 (x_i sum_j V_ij - t_i)
    The sums over V see it rounded, too: rounding then changes how hard a pair pulls but not that it pulls along
    x_i - x_j. Otherwise what is common to all features, say a mean of 10, would swamp the gradient.
    """
    X = G if FAKE else F
    scale_f, scale_g = _scales(moments, MEAN)
    scale = scale_g if FAKE else scale_f
    kappa = 0.0
    if MEAN:
        kappa = tl.load(moments + 2 + FAKE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1)
    dims = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    along = tl.zeros([BLOCK_M], dtype=tl.float32)
    loss = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        f, g, omega = _pairs(
            F, G, stats, weight, labels, scale_f, scale_g, rows, columns, first, b, n, d, gamma,
            RELATION, UNIT, SCALED, WEIGHTED, LABELLED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        difference = g[1] - f[1]
        if LOSS:
            loss += tl.sum(omega * penalty_of(difference, delta, PENALTY), axis=1)
        slope = omega * slope_of(difference, delta, PENALTY)
        if FAKE:
            dots = g[0]
            pull = pull_of(g, slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
        else:
            dots = f[0]
            pull = pull_of(f, -slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
        x_pointers = X + tl.minimum(columns, n - 1)[:, None] * d + dims[None, :]
        if EVEN_D:
            x = tl.load(x_pointers)
        else:
            x = tl.load(x_pointers, mask=dims[None, :] < d, other=0.0)
        if X.dtype.element_ty == tl.float16:
            # V ranges like 1/|x| times the user's weights, float16 does not: a power of two for each row of the tile
            # brings its largest entry to [1, 2), so that what underflows is nothing beside it.
            largest = tl.maximum(tl.max(tl.abs(pull), axis=1), 2.0**-100)
            power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            pull = (pull / power[:, None]).to(tl.float16)
            acc += tl.dot(pull, x) * power[:, None]
        else:
            power = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
            pull = pull.to(X.dtype.element_ty)
            acc = tl.dot(pull, x, acc, input_precision=PRECISION)
        rounded = pull.to(tl.float32)
        along += tl.sum(rounded * dots if UNIT else rounded, axis=1) * power

    own = tl.minimum(rows, b - 1) + first
    inside = (rows < b)[:, None] & (dims < d)[None, :]
    x = tl.load(X + own[:, None] * d + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.full([BLOCK_M], 2.0, dtype=tl.float32)
    if UNIT:
        s = tl.load(stats + FAKE * n + own)
        along = along * s * s
        factor = factor * s
    tl.store(gradient + rows[:, None] * d + dims[None, :], factor[:, None] * (along[:, None] * x - acc), mask=inside)
    if LOSS:
        tl.store(partials + rows, loss, mask=(rows < b) & (chunk == 0))


@triton.jit
def _strip_half(
    side, slope, omega, scale, kappa, gamma, strip, stride, offsets, inside,
    RELATION: tl.constexpr, UNIT: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pull = pull_of(side, slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
    rounded = pull.to(tl.bfloat16)
    found = rounded.to(tl.float32)
    if PARTS == 1:
        tl.store(strip + offsets, rounded, mask=inside)
    else:
        rest = pull - found
        middle = rest.to(tl.bfloat16)
        last = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        tl.store(strip + offsets, last, mask=inside)
        tl.store(strip + stride + offsets, middle, mask=inside)
        tl.store(strip + 2 * stride + offsets, rounded, mask=inside)
        found = found + (middle.to(tl.float32) + last.to(tl.float32))
    return tl.sum(found * side[0] if UNIT else found, axis=1)


@triton.jit
def _strip_side(
    dots, stats, own, columns, offsets, inside, scale, gamma,
    RELATION: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    found = tl.load(dots + offsets, mask=inside, other=0.0)
    of_columns = tl.load(stats + columns)
    relation, distance = relation_of(found, tl.load(stats + own), of_columns, scale, gamma, RELATION, UNIT, SCALED)
    return found, relation, distance, of_columns


@triton.jit(do_not_specialize=["start", "height", "first", "n"])
def weigh_strip(
    f_dots, g_dots, stats, weight, labels, moments, real_strip, fake_strip, partials, start, height, stride, first, n,
    gamma, delta,
    RELATION: tl.constexpr, PENALTY: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr, LABELLED: tl.constexpr, REAL: tl.constexpr, FAKE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """V (see row_gradient) of the rows start ... start + height - 1, for the inputs REAL, FAKE; GEMMs do the rest.

    `f_dots`, `g_dots` [height, stride] float32: <x_i, x_j>, nothing from column n on. Strips [height, PARTS, stride]
    bfloat16: V, or what three numbers keep of it, the least first. `partials` [3, column blocks, height] float32 takes
    the rows' sums over STEPS tiles: the loss, and what row_gradient calls `along`, real and fake. Grid: column blocks,
    row blocks.
    """
    scale_f, scale_g = _scales(moments, MEAN)
    kappa_f = 0.0
    kappa_g = 0.0
    if MEAN:
        kappa_f = tl.load(moments + 2)
        kappa_g = tl.load(moments + 3)
    lines = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = lines < height
    own = first + start + tl.minimum(lines, height - 1)
    loss = tl.zeros([BLOCK_M], dtype=tl.float32)
    f_along = tl.zeros([BLOCK_M], dtype=tl.float32)
    g_along = tl.zeros([BLOCK_M], dtype=tl.float32)
    for step in range(STEPS):
        columns = (tl.program_id(0) * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        clamped = tl.minimum(columns, n - 1)
        inside = mine[:, None] & (columns < n)[None, :]
        offsets = lines[:, None] * stride + columns[None, :]
        f = _strip_side(f_dots, stats, own, clamped, offsets, inside, scale_f, gamma, RELATION, UNIT, SCALED)
        g = _strip_side(g_dots, stats + n, own, clamped, offsets, inside, scale_g, gamma, RELATION, UNIT, SCALED)
        counted = inside & (clamped[None, :] != own[:, None])
        omega = omega_of(own, clamped, counted, weight, labels, WEIGHTED, LABELLED)
        difference = g[1] - f[1]
        slope = omega * slope_of(difference, delta, PENALTY)
        loss += tl.sum(omega * penalty_of(difference, delta, PENALTY), axis=1)
        offsets = lines[:, None] * (PARTS * stride) + columns[None, :]
        if REAL:
            f_along += _strip_half(
                f, -slope, omega, scale_f, kappa_f, gamma, real_strip, stride, offsets, inside,
                RELATION, UNIT, MEAN, PARTS,
            )  # fmt: skip
        if FAKE:
            g_along += _strip_half(
                g, slope, omega, scale_g, kappa_g, gamma, fake_strip, stride, offsets, inside,
                RELATION, UNIT, MEAN, PARTS,
            )  # fmt: skip
    line_sums = partials + tl.program_id(0) * height + lines
    plane = tl.num_programs(0) * height
    tl.store(line_sums, loss, mask=mine)
    if REAL:
        tl.store(line_sums + plane, f_along, mask=mine)
    if FAKE:
        tl.store(line_sums + 2 * plane, g_along, mask=mine)


@triton.jit(do_not_specialize=["start", "height", "blocks", "first", "n"])
def finish_strip(
    X, stats, product, partials, gradient, loss, start, height, blocks, first, n, d,
    UNIT: tl.constexpr, FAKE: tl.constexpr, LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of `gradient` [b, d] from a strip's `product` V X [height, d] and its `partials`. Grid: lines, chunks of d.

    Where LOSS, also the rows of `loss` [b].
    """
    lines = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = lines < height
    along = tl.zeros([BLOCK_M], dtype=tl.float32)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for block in range(blocks):
        along += tl.load(partials + ((1 + FAKE) * blocks + block) * height + lines, mask=own, other=0.0)
        if LOSS:
            sums += tl.load(partials + block * height + lines, mask=own, other=0.0)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = own[:, None] & (dims < d)[None, :]
    column = first + start + lines
    x = tl.load(X + column[:, None] * d + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    t = tl.load(product + lines[:, None] * d + dims[None, :], mask=inside, other=0.0)
    factor = tl.full([BLOCK_M], 2.0, dtype=tl.float32)
    if UNIT:
        s = tl.load(stats + FAKE * n + column, mask=own, other=0.0)
        along = along * s * s
        factor = factor * s
    row = start + lines
    tl.store(gradient + row[:, None] * d + dims[None, :], factor[:, None] * (along[:, None] * x - t), mask=inside)
    if LOSS:
        tl.store(loss + row, sums, mask=own & (tl.program_id(1) == 0))
