# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What runs on the GPU: the pair arithmetic of reference.py on tiles, and the kernels around it.

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

# ||a||^2 + ||b||^2 - 2ab cancels: up to 8 eps of (||a||^2 + ||b||^2) is rounding noise and counts as 0 (reference.py).
MERGE: tl.constexpr = tl.constexpr(8.0 * 2.0**-23)
# Rows that were scaled to length 1 before (SCALED) and have one direction differ by their rounding, 8 eps together: one
# for their elements, three for each length.
MERGE_SCALED: tl.constexpr = tl.constexpr(2.0**-40)


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
def _relation(
    dots, of_rows, of_columns, scale, gamma, RELATION: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """R_ij and the distance D_ij that it is a function of (cosine: R again). `scale` = 1/m, `gamma` = 1/(2 tau^2)."""
    if UNIT:
        # One after the other: the product of two scales can overflow where the result does not.
        dots = dots * of_rows[:, None] * of_columns[None, :]
    if RELATION == "cosine":
        relation = dots
        distance = dots
    else:
        if UNIT:
            of_rows = tl.where(of_rows == 0, 0.0, 1.0)
            of_columns = tl.where(of_columns == 0, 0.0, 1.0)
        q = of_rows[:, None] + of_columns[None, :]
        d2 = q - 2.0 * dots
        noise = q * MERGE
        if SCALED:
            noise += MERGE_SCALED
        d2 = tl.where(d2 <= noise, 0.0, d2)  # NaN compares false and stays NaN
        distance = tl.sqrt(d2)
        if RELATION == "euclidean":
            relation = distance * scale
        else:
            relation = tl.exp(-(d2 * (scale * scale)) * gamma)
    return relation, distance


@triton.jit
def _penalty(x, delta, PENALTY: tl.constexpr):
    """rho(x)."""
    if PENALTY == "squared":
        rho = x * x
    else:
        size = tl.abs(x)
        if PENALTY == "absolute":
            rho = size
        else:
            rho = tl.where(size <= delta, 0.5 * x * x, delta * (size - 0.5 * delta))
    return rho


@triton.jit
def _penalty_slope(x, delta, PENALTY: tl.constexpr):
    """rho'(x), 0 at 0."""
    if PENALTY == "squared":
        slope = 2.0 * x
    elif PENALTY == "absolute":
        slope = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    else:
        slope = tl.where(x > delta, delta, tl.where(x < -delta, -delta, x))
    return slope


@triton.jit
def _omega(own, columns, counted, weight, labels, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr):
    """Pair weights w_i w_j [label_i == label_j], exactly 0 where not `counted`, [M, N]."""
    omega = tl.where(counted, 1.0, 0.0)
    if WEIGHTED:
        omega = tl.where(counted, tl.load(weight + own)[:, None] * tl.load(weight + columns)[None, :], 0.0)
    if LABELLED:
        same = tl.load(labels + own)[:, None] == tl.load(labels + columns)[None, :]
        omega = omega * tl.where(same, 1.0, 0.0)
    return omega


@triton.jit
def _side(
    X, stats, own, columns, d, scale, gamma,
    RELATION: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, x_j>, R_ij, D_ij of one input, [M, N], and the columns' `stats`, [N]."""
    dots = _products(X, own, columns, d, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION)
    of_columns = tl.load(stats + columns)
    relation, distance = _relation(dots, tl.load(stats + own), of_columns, scale, gamma, RELATION, UNIT, SCALED)
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
    return f, g, _omega(own, inside, counted, weight, labels, WEIGHTED, LABELLED)


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
def _pull(
    side, slope, omega, scale, kappa, gamma,
    RELATION: tl.constexpr, UNIT: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """V_ij = W_ij s_j (s = 1 unless UNIT), where S has the gradient 2 sum_j W_ij (s_i x_i - s_j x_j) in s_i x_i. [M, N]

    `slope` is dS/dR_ij, `kappa` what every distance loses to the mean. Cosine's gradient is without the first term and
    with the other sign, W = -slope; the projection off x_i removes that term anyway.
    """
    dots, relation, distance, of_columns = side
    if RELATION == "cosine":
        pull = -slope
    elif RELATION == "euclidean":
        if MEAN:
            slope = (slope - omega * kappa) * scale
        pull = tl.where(distance == 0, 0.0, slope / distance)
    else:
        # dR/du / D, where u = D scale, is -2 gamma R scale: nothing to divide by.
        pull = slope * relation * (-2.0 * gamma * (scale * scale))
        if MEAN:
            pull = pull - omega * kappa * scale / distance
        pull = tl.where(distance == 0, 0.0, pull)
    if UNIT:
        pull = pull * of_columns[None, :]
    return pull


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
        sums += tl.sum(_omega(own, inside, counted, weight, labels, WEIGHTED, LABELLED), axis=1)
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
        tl.store(partials + program, times * tl.sum(omega * _penalty(difference, delta, PENALTY)))
    else:
        if STATISTIC == "distances":
            f_term = omega * f_distance
            g_term = omega * g_distance
        else:
            slope = omega * _penalty_slope(difference, delta, PENALTY)
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
            loss += tl.sum(omega * _penalty(difference, delta, PENALTY), axis=1)
        slope = omega * _penalty_slope(difference, delta, PENALTY)
        if FAKE:
            dots = g[0]
            pull = _pull(g, slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
        else:
            dots = f[0]
            pull = _pull(f, -slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
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
    pull = _pull(side, slope, omega, scale, kappa, gamma, RELATION, UNIT, MEAN)
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
    relation, distance = _relation(found, tl.load(stats + own), of_columns, scale, gamma, RELATION, UNIT, SCALED)
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
        omega = _omega(own, clamped, counted, weight, labels, WEIGHTED, LABELLED)
        difference = g[1] - f[1]
        slope = omega * _penalty_slope(difference, delta, PENALTY)
        loss += tl.sum(omega * _penalty(difference, delta, PENALTY), axis=1)
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


# A micro-batch: few rows and one rank, so that all pair weights fit into a workspace and the time is that of launches.


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
    relation, distance = _relation(
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
    pull = _pull(side, slope, omega, 1.0, 0.0, gamma, RELATION, UNIT and not CENTRE, False)
    if weights.dtype.element_ty == tl.float16:
        # See row_gradient.
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
    omega = _omega(own, inside, counted, weight, labels, WEIGHTED, LABELLED)
    difference = g[1] - f[1]
    tile = tl.program_id(1) * T + tl.program_id(0)
    tl.store(partials + tile, tl.sum(omega * _penalty(difference, delta, PENALTY)))
    tl.store(partials + T * T + tile, tl.sum(omega))
    slope = omega * _penalty_slope(difference, delta, PENALTY)
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
