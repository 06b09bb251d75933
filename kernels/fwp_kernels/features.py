"""Feature maps φ and their norms, made where q and k are loaded, and their gradients.

x [B, T, H, D] becomes SCALE · norm(φ(x)) [B, T, H, K], in ACC and then rounded to x's dtype. MAP is 0 for φ(x) = x, 1
for relu, 2 for elu + 1, 3 for exp and 4 for DPFP, whose feature 2D(i − 1) + j is r_j r_{j−i}, r = relu([x, −x])
(2102.11174, equation 37). NORM is 0 for none, 1 for the sum of the features, 2 for the root of that of their squares.
"""

import triton
import triton.language as tl

from .tiles import load, quotient, rows_from, store


@triton.jit
def rectified(x, rows, h, j, D: tl.constexpr, ACC: tl.constexpr):
    """r_j of relu([x, −x]) [2D], j taken modulo 2D: [C, len(j)]."""
    j = (j % (2 * D) + 2 * D) % (2 * D)
    b = load(x, rows, h, j % D, D).to(ACC)
    b = tl.where(j[None, :] < D, b, -b)
    return tl.where(b < 0, 0.0, b)


@triton.jit
def mapped(x, rows, h, f, K: tl.constexpr, D: tl.constexpr, MAP: tl.constexpr, ACC: tl.constexpr):
    """Features f of φ(x) in ACC, 0 where there is no token and beyond K: [C, len(f)]."""
    if MAP == 4:
        f = tl.where(f < K, f, K)  # what lies beyond is 0 below
        b = rectified(x, rows, h, f, D, ACC)
        b *= rectified(x, rows, h, f % (2 * D) - f // (2 * D) - 1, D, ACC)
    else:
        b = load(x, rows, h, f, K).to(ACC)
        if MAP == 1:
            b = tl.where(b < 0, 0.0, b)
        if MAP == 2:
            b = tl.where(b > 0, b + 1, tl.exp(b))
        if MAP == 3:
            b = tl.exp(b)
    if MAP > 1:
        b = tl.where(rows[2][:, None] & (f[None, :] < K), b, 0.0)
    return b


@triton.jit
def sum_for(b, NORM: tl.constexpr):
    """What these features add to the sum that the norm takes: [C, 1]."""
    if NORM == 2:
        b *= b
    return tl.sum(b, 1)[:, None]


@triton.jit
def factor_of(total, NORM: tl.constexpr):
    """What the norm multiplies features by, of that sum."""
    if NORM == 1:
        y = quotient(tl.full(total.shape, 1.0, total.dtype), total)
    else:
        y = 1 / tl.sqrt(total + 1e-6)
    return y


@triton.jit
def features(
    x,
    norms,  # [B, T, H, 1], what the norm multiplies by; None if f holds all features
    rows,
    h,
    f,
    K: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Features f of what x becomes [C, len(f)], in its dtype, 0 where there is no token and beyond K."""
    if MAP == 0 and NORM == 0 and SCALE == 1:
        return load(x, rows, h, f, K)
    else:
        b = mapped(x, rows, h, f, K, D, MAP, ACC)
        if norms is not None:
            b *= load(norms, rows, h, tl.arange(0, 1), 1)
        elif NORM > 0:
            b *= factor_of(sum_for(b, NORM), NORM)
        return (b * SCALE).to(x[0].dtype.element_ty)


@triton.jit
def slope(x, rows, h, f, D: tl.constexpr, MAP: tl.constexpr, ACC: tl.constexpr):
    """φ' of a map that takes each feature alone: [C, len(f)]."""
    b = load(x, rows, h, f, D).to(ACC)
    if MAP == 0:
        b = tl.full(b.shape, 1.0, ACC)
    if MAP == 1:
        b = tl.where(b > 0, 1.0, 0.0).to(ACC)
    if MAP == 2:
        b = tl.where(b > 0, 1.0, tl.exp(b))
    if MAP == 3:
        b = tl.exp(b)
    return b


@triton.jit(do_not_specialize=["T"])
def norms_kernel(
    x,  # [B, T, H, D]
    norms,  # out [B, T, H, 1]
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the norm multiplies the features of each row by. A program BT tokens of a batch row and head."""
    rows, h = tokens_of(T, H, BT)
    total = tl.zeros([BT, 1], ACC)
    for block in range(tl.cdiv(K, BK)):
        f = block * BK + tl.arange(0, BK)
        total += sum_for(mapped(x, rows, h, f, K, D, MAP, ACC), NORM)
    store(norms, rows, h, tl.arange(0, 1), 1, factor_of(total, NORM))


@triton.jit
def tokens_of(T, H: tl.constexpr, BT: tl.constexpr):
    """Rows and head of a program that takes BT tokens."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    return rows_from(pid // blocks // H, pid % blocks * BT, T, BT), pid // blocks % H


@triton.jit
def summed(
    dy,
    rows,
    h,
    f,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of features f before they were scaled, summed over the SHARE heads that share head h: [C, len(f)]."""
    total = tl.zeros([rows[1].shape[0], f.shape[0]], ACC)
    for s in range(SHARE):
        total += load(dy, rows, h * SHARE + s, f, K)
    return total * SCALE


@triton.jit
def before_norm(dy, b, along, factor, NORM: tl.constexpr):
    """Gradient of features b from that of factor · b, along being Σ_f of their product: [C, ·]."""
    if NORM == 0:
        return dy
    elif NORM == 1:
        return factor * (dy - along)
    else:
        return factor * (dy - factor * b * along)


@triton.jit(do_not_specialize=["T"])
def features_back_kernel(
    x,  # [B, T, H, D]
    norms,  # [B, T, H, 1] or None
    dy,  # [B, T, H·SHARE, K]
    dx,  # out [B, T, H, D]
    T,
    H: tl.constexpr,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of x from that of its features. A program BT tokens of a batch row and head."""
    rows, h = tokens_of(T, H, BT)
    along = tl.zeros([BT, 1], ACC)
    factor = along
    if NORM > 0:
        factor = load(norms, rows, h, tl.arange(0, 1), 1)
        for block in range(tl.cdiv(K, BK)):
            f = block * BK + tl.arange(0, BK)
            b = mapped(x, rows, h, f, K, D, MAP, ACC)
            along += tl.sum(b * summed(dy, rows, h, f, SHARE, K, SCALE, ACC), 1)[:, None]
        along *= factor
    for block in range(tl.cdiv(D, BK)):
        d = block * BK + tl.arange(0, BK)
        if MAP < 4:
            b_dx = summed(dy, rows, h, d, SHARE, K, SCALE, ACC)
            b_dx = before_norm(b_dx, mapped(x, rows, h, d, K, D, MAP, ACC), along, factor, NORM)
            b_dx *= slope(x, rows, h, d, D, MAP, ACC)
        else:
            b_dx = tl.zeros([BT, BK], ACC)
            for half in range(2):
                # r_j is in the features that begin with it, r_j r_{j−i}, and in those that end with it, r_{j+i} r_j
                j = tl.where(d < D, d, 0) + half * D
                own = rectified(x, rows, h, j, D, ACC)
                b_dr = tl.zeros([BT, BK], ACC)
                for i in range(1, K // (2 * D) + 1):
                    other = rectified(x, rows, h, j - i, D, ACC)
                    b_dy = summed(dy, rows, h, (i - 1) * 2 * D + j, SHARE, K, SCALE, ACC)
                    b_dr += other * before_norm(b_dy, own * other, along, factor, NORM)
                    other = rectified(x, rows, h, j + i, D, ACC)
                    b_dy = summed(dy, rows, h, (i - 1) * 2 * D + (j + i) % (2 * D), SHARE, K, SCALE, ACC)
                    b_dr += other * before_norm(b_dy, own * other, along, factor, NORM)
                b_dx += tl.where(own > 0, b_dr, 0.0) * (1 - 2 * half)
        store(dx, rows, h, d, D, b_dx)
