"""The recurrent form: the recurrence of `fwp.core` itself, token by token, with a part of S in registers.

For decoding and short inputs. Its gradient is that of the chunk form, which is the same function.
"""

import triton
import triton.language as tl

from .features import features
from .tiles import load_state, load_sum, quotient, span, state_at, state_block


@triton.jit
def load_token(x, n, t, h, d, D: tl.constexpr, ACC: tl.constexpr):
    """Row t of head h, features d, in ACC; 0 beyond D."""
    return tl.load(x[0] + n * x[1] + t * x[2] + h * x[3] + d, mask=d < D, other=0.0).to(ACC)


@triton.jit
def token_features(
    x,
    n,
    t,
    h,
    f,
    K: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    """`features` of row t alone, all of them, in ACC: [len(f)]."""
    row = tl.arange(0, 1)
    return tl.sum(features(x, None, (n, t + row, row == 0), h, f, K, D, MAP, NORM, SCALE, ACC).to(ACC), 0)


@triton.jit
def read_token(
    q,
    o,
    den,
    n,
    t,
    h,
    S,
    z,
    dk,
    dv,
    first_block,
    GQ: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
):
    """o = Sᵀ q for the R readers of row t and state head h, divided by zᵀ q + EPS unless EPS is None."""
    for r in range(R):
        b_q = token_features(q, n, t, (h * R + r) // GQ, dk, K, D, MAP, NORM, SCALE, S.dtype)
        b_o = tl.sum(S * b_q[:, None], 0)
        if EPS is not None:
            found = tl.sum(z * b_q, 0)
            b_den = tl.where(found == 0, 0.0, found + EPS)
            b_o = quotient(b_o, b_den)
            tl.store(den[0] + n * den[1] + t * den[2] + (h * R + r) * den[3], b_den, mask=first_block)
        at = o[0] + n * o[1] + t * o[2] + (h * R + r) * o[3] + dv
        tl.store(at, b_o.to(o[0].dtype.element_ty), mask=dv < V)


@triton.jit
def erased(S, b_a, e, n, t, h):
    """e Sᵀ a, e = 1 if it is None."""
    b_e = 1.0
    if e is not None:
        b_e = tl.load(e[0] + n * e[1] + t * e[2] + h * e[3]).to(S.dtype)
    return b_e * tl.sum(S * b_a[:, None], 0)


@triton.jit(do_not_specialize=["T"])
def token_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, T, Hk, D]
    v,  # [B, T, Hv, V]
    g,  # [B, T, H, 1 or K] or None
    a,  # [B, T, H, K], erase keys, or None: φ(k)
    e,  # [B, T, H, 1] or None: 1 with erase keys, else nothing is erased
    w,  # [B, T, H, 1] or None
    o,  # out [B, T, H·R, V]
    den,  # out [B, T, H·R, 1], zᵀq + EPS, 0 where zᵀq = 0, or None
    p_S0,  # [N, H, K, V] or None
    p_S,  # out [N, H, K, V]
    p_z0,  # [N, H, K] or None
    p_z,  # out [N, H, K] or None
    p_cu,
    T,
    H: tl.constexpr,
    GK: tl.constexpr,  # state heads that share a key head
    GV: tl.constexpr,  # state heads that share a value head
    GQ: tl.constexpr,  # readers that share a query head
    R: tl.constexpr,  # readers of a state head
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,  # of q's features
    BK: tl.constexpr,  # all of K
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    LAG: tl.constexpr,
    ERASE_LAG: tl.constexpr,  # what is erased is found before the decay of its token
    WRITES: tl.constexpr,  # tokens of k, v and the gates for one of q
    EPS: tl.constexpr,  # None: no denominator
    ACC: tl.constexpr,
):
    """S ← Diag(exp g) S;  S ← S + k (w v − e Sᵀ k)ᵀ;  o = Sᵀ q. A program a sequence, head and V block."""
    n, h, block, dk, dv, inside = state_block(H, K, V, BK, BV)
    first, length = span(p_cu, n, T)
    S = load_state(p_S0, n * H + h, dk, dv, K, V, ACC)
    z = tl.sum(load_sum(p_z0, n * H + h, dk, K, ACC), 0)
    first_block = block == 0  # the programs of the other V blocks find the same z
    for step in range(length.to(tl.int32)):
        t = first + step
        reads = t % WRITES == (0 if LAG else WRITES - 1)
        if LAG:
            if reads:
                read_token(
                    q, o, den, n, t // WRITES, h, S, z, dk, dv, first_block,
                    GQ, R, K, V, D, MAP, NORM, SCALE, EPS,
                )  # fmt: skip
        b_k = token_features(k, n, t, h // GK, dk, K, D, MAP, NORM, 1.0, ACC)
        x = load_token(v, n, t, h // GV, dv, V, ACC)
        if w is not None:
            x *= tl.load(w[0] + n * w[1] + t * w[2] + h * w[3]).to(ACC)
        if e is not None or a is not None:
            b_a = b_k
            if a is not None:
                b_a = load_token(a, n, t, h, dk, K, ACC)
            if ERASE_LAG:
                x -= erased(S, b_a, e, n, t, h)
        if DECAY == 1:
            decay = tl.exp(tl.load(g[0] + n * g[1] + t * g[2] + h * g[3]).to(ACC))
            S *= decay
            z *= decay
        if DECAY == 2:
            decay = tl.exp(load_token(g, n, t, h, dk, K, ACC))
            S *= decay[:, None]
            z *= decay
        if e is not None or a is not None:
            if not ERASE_LAG:
                x -= erased(S, b_a, e, n, t, h)
        S += b_k[:, None] * x[None, :]
        z += b_k
        if not LAG:
            if reads:
                read_token(
                    q, o, den, n, t // WRITES, h, S, z, dk, dv, first_block,
                    GQ, R, K, V, D, MAP, NORM, SCALE, EPS,
                )  # fmt: skip
    tl.store(state_at(p_S, n * H + h, dk, dv, K, V), S, mask=inside)
    if p_z is not None:
        tl.store(p_z + (n * H + h) * K + dk, z, mask=(dk < K) & first_block)
