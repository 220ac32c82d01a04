# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What kernels on tiles of pairs do to a pair: the arithmetic of reference.py, called from kernels only.

Rows i and columns j, [M, N] float32; R is a relation, D the distance that it is a function of, S the loss. As in
reference.py, 0 * NaN stays NaN.
"""

import triton
import triton.language as tl

# ||a||^2 + ||b||^2 - 2ab cancels: up to 8 eps of (||a||^2 + ||b||^2) is rounding noise and counts as 0 (reference.py).
MERGE: tl.constexpr = tl.constexpr(8.0 * 2.0**-23)
# Rows that were scaled to length 1 before (SCALED) and have one direction differ by their rounding, 8 eps together: one
# for their elements, three for each length.
MERGE_SCALED: tl.constexpr = tl.constexpr(2.0**-40)


@triton.jit
def relation_of(
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
def penalty_of(x, delta, PENALTY: tl.constexpr):
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
def slope_of(x, delta, PENALTY: tl.constexpr):
    """rho'(x), 0 at 0."""
    if PENALTY == "squared":
        slope = 2.0 * x
    elif PENALTY == "absolute":
        slope = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    else:
        slope = tl.where(x > delta, delta, tl.where(x < -delta, -delta, x))
    return slope


@triton.jit
def omega_of(own, columns, counted, weight, labels, WEIGHTED: tl.constexpr, LABELLED: tl.constexpr):
    """Pair weights w_i w_j [label_i == label_j], exactly 0 where not `counted`, [M, N]."""
    omega = tl.where(counted, 1.0, 0.0)
    if WEIGHTED:
        omega = tl.where(counted, tl.load(weight + own)[:, None] * tl.load(weight + columns)[None, :], 0.0)
    if LABELLED:
        same = tl.load(labels + own)[:, None] == tl.load(labels + columns)[None, :]
        omega = omega * tl.where(same, 1.0, 0.0)
    return omega


@triton.jit
def pull_of(
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
