"""Feature maps φ and their norms, applied where q and k are loaded, and their gradients.

x [B, T, H, D] becomes SCALE · norm(φ(x)) [B, T, H, K], computed in ACC and then rounded to x's dtype. MAP is 0 for
φ(x) = x, 1 for relu, 2 for elu + 1, 3 for exp and 4 for DPFP, whose feature 2D(i − 1) + j is r_j r_{j−i} with
r = relu([x, −x]) (2102.11174, equation 37). NORM is 0 for none, 1 for the sum of the features, 2 for the root of the
sum of their squares. Kernels take these constants as `phi`, an `arguments.Phi`.
"""

import triton
import triton.language as tl

from .device import load, quotient, rows_from, store


@triton.jit
def rectified(x, rows, h, j, D: tl.constexpr, ACC: tl.constexpr):
    """r_j of relu([x, −x]) [2D], j taken modulo 2D: [C, len(j)]."""
    j = (j % (2 * D) + 2 * D) % (2 * D)
    b = load(x, rows, h, j % D, D).to(ACC)
    b = tl.where(j[None, :] < D, b, -b)
    return tl.where(b < 0, 0.0, b)


@triton.jit
def mapped(x, rows, h, f, phi: tl.constexpr, ACC: tl.constexpr):
    """Features f of φ(x) in ACC, 0 for absent tokens and beyond K: [C, len(f)]."""
    D: tl.constexpr = phi.D
    if phi.MAP == 4:
        f = tl.where(f < phi.K, f, phi.K)  # features beyond K become 0 below
        b = rectified(x, rows, h, f, D, ACC)
        b *= rectified(x, rows, h, f % (2 * D) - f // (2 * D) - 1, D, ACC)
    else:
        b = load(x, rows, h, f, phi.K).to(ACC)
        if phi.MAP == 1:
            b = tl.where(b < 0, 0.0, b)
        if phi.MAP == 2:
            b = tl.where(b > 0, b + 1, tl.exp(b))
        if phi.MAP == 3:
            b = tl.exp(b)
    if phi.MAP > 1:
        b = tl.where(rows.present[:, None] & (f[None, :] < phi.K), b, 0.0)
    return b


# In float32 the squares of features from 1e19 on are out of range. Times this power of 2 they are in range up to 1e29,
# no bit of the factor changes, and squares that get too small are nothing beside the 1e-6.
SHRINK = tl.constexpr(2.0**-36)


@triton.jit
def sum_for(b, NORM: tl.constexpr):
    """The sum of the features b, or of the squares of SHRINK b for NORM 2: [C, 1]."""
    if NORM == 2:
        b *= SHRINK
        b *= b
    return tl.sum(b, 1)[:, None]


@triton.jit
def norm_factor(total, NORM: tl.constexpr):
    """The factor by which the norm multiplies features, from `sum_for` all of them."""
    if NORM == 1:
        y = quotient(tl.full(total.shape, 1.0, total.dtype), total)
    else:
        y = SHRINK / tl.sqrt(total + 1e-6 * SHRINK * SHRINK)
    return y


@triton.jit
def features(x, norms, rows, h, f, phi: tl.constexpr, ACC: tl.constexpr):
    """Features f of SCALE · norm(φ(x)) in x's dtype, 0 for absent tokens and beyond K: [C, len(f)].

    norms [B, T, H, 1]: the factors of the norm, or None if f holds all features.
    """
    if phi.MAP == 0 and phi.NORM == 0 and phi.SCALE == 1:
        return load(x, rows, h, f, phi.K)
    else:
        b = mapped(x, rows, h, f, phi, ACC)
        if norms is not None:
            b *= load(norms, rows, h, tl.arange(0, 1), 1)
        elif phi.NORM > 0:
            b *= norm_factor(sum_for(b, phi.NORM), phi.NORM)
        return (b * phi.SCALE).to(x.pointer.dtype.element_ty)


@triton.jit
def queries(p, rows, h, r, f, s: tl.constexpr):
    """Features f of the queries of reader r of state head h: [C, len(f)]."""
    return features(p.q, p.q_norms, rows, (h * s.READERS + r) // s.HEADS_PER_Q, f, s.Q_PHI, s.ACC)


@triton.jit
def keys(p, rows, h, f, s: tl.constexpr):
    """Features f of the keys of state head h: [C, len(f)]."""
    return features(p.k, p.k_norms, rows, h // s.HEADS_PER_K, f, s.K_PHI, s.ACC)


@triton.jit
def slope(x, rows, h, f, phi: tl.constexpr, ACC: tl.constexpr):
    """φ'(x) for a map that takes each feature alone: [C, len(f)]."""
    b = load(x, rows, h, f, phi.D).to(ACC)
    if phi.MAP == 0:
        b = tl.full(b.shape, 1.0, ACC)
    if phi.MAP == 1:
        b = tl.where(b > 0, 1.0, 0.0).to(ACC)
    if phi.MAP == 2:
        b = tl.where(b > 0, 1.0, tl.exp(b))
    if phi.MAP == 3:
        b = tl.exp(b)
    return b


@triton.jit
def token_block(T, H: tl.constexpr, BT: tl.constexpr):
    """Rows and head of a program that takes BT tokens of a batch row and head."""
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0).to(tl.int64)
    return rows_from(pid // blocks // H, pid % blocks * BT, T, BT), pid // blocks % H


@triton.jit(do_not_specialize=["T"])
def norms_kernel(
    p_x,  # [B, T, H, D]
    p_norms,  # out [B, T, H, 1]
    T,
    H: tl.constexpr,
    phi: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """1 / Σ_f φ(x)_f, or 1 / √(Σ_f φ(x)_f² + 1e-6): the factors of the norm.

    A program takes BT tokens of a batch row and head.
    """
    rows, h = token_block(T, H, BT)
    total = tl.zeros([BT, 1], ACC)
    for block in range(tl.cdiv(phi.K, BK)):
        f = block * BK + tl.arange(0, BK)
        total += sum_for(mapped(p_x, rows, h, f, phi, ACC), phi.NORM)
    store(p_norms, rows, h, tl.arange(0, 1), 1, norm_factor(total, phi.NORM))


@triton.jit
def summed(d_y, rows, h, f, SHARE: tl.constexpr, phi: tl.constexpr, ACC: tl.constexpr):
    """Gradients of features f before the scale, summed over the SHARE heads that share head h: [C, len(f)]."""
    total = tl.zeros([rows.t.shape[0], f.shape[0]], ACC)
    for i in range(SHARE):
        total += load(d_y, rows, h * SHARE + i, f, phi.K)
    return total * phi.SCALE


@triton.jit
def before_norm(d_y, b, along, factor, NORM: tl.constexpr):
    """The gradient of features b [C, ·] from the gradient d_y of factor · b. along [C, 1] is Σ_f d_y factor b."""
    if NORM == 0:
        return d_y
    elif NORM == 1:
        return factor * (d_y - along)
    else:
        return factor * (d_y - factor * b * along)


@triton.jit(do_not_specialize=["T"])
def features_back_kernel(
    p_x,  # [B, T, H, D]
    p_norms,  # [B, T, H, 1] or None
    p_dy,  # [B, T, H·SHARE, K]
    p_dx,  # out [B, T, H, D]
    T,
    H: tl.constexpr,
    SHARE: tl.constexpr,  # heads of y that share a head of x
    phi: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx = φ'(x)ᵀ norm'(φ(x))ᵀ SCALE dy.

    A program takes BT tokens of a batch row and head.
    """
    D: tl.constexpr = phi.D
    rows, h = token_block(T, H, BT)
    along = tl.zeros([BT, 1], ACC)
    factor = along
    if phi.NORM > 0:
        factor = load(p_norms, rows, h, tl.arange(0, 1), 1)
        for block in range(tl.cdiv(phi.K, BK)):
            f = block * BK + tl.arange(0, BK)
            b = mapped(p_x, rows, h, f, phi, ACC)
            along += tl.sum(b * summed(p_dy, rows, h, f, SHARE, phi, ACC), 1)[:, None]
        along *= factor
    for block in range(tl.cdiv(D, BK)):
        d = block * BK + tl.arange(0, BK)
        if phi.MAP < 4:
            b_dx = summed(p_dy, rows, h, d, SHARE, phi, ACC)
            b_dx = before_norm(b_dx, mapped(p_x, rows, h, d, phi, ACC), along, factor, phi.NORM)
            b_dx *= slope(p_x, rows, h, d, phi, ACC)
        else:
            b_dx = tl.zeros([BT, BK], ACC)
            for half in range(2):
                # r_j is the first factor of the features r_j r_{j−i} and the second one of r_{j+i} r_j
                j = tl.where(d < D, d, 0) + half * D
                own = rectified(p_x, rows, h, j, D, ACC)
                b_dr = tl.zeros([BT, BK], ACC)
                for i in range(1, phi.K // (2 * D) + 1):
                    other = rectified(p_x, rows, h, j - i, D, ACC)
                    b_dy = summed(p_dy, rows, h, (i - 1) * 2 * D + j, SHARE, phi, ACC)
                    b_dr += other * before_norm(b_dy, own * other, along, factor, phi.NORM)
                    other = rectified(p_x, rows, h, j + i, D, ACC)
                    b_dy = summed(p_dy, rows, h, (i - 1) * 2 * D + (j + i) % (2 * D), SHARE, phi, ACC)
                    b_dr += other * before_norm(b_dy, own * other, along, factor, phi.NORM)
                b_dx += tl.where(own > 0, b_dr, 0.0) * (1 - 2 * half)
        store(p_dx, rows, h, d, D, b_dx)
