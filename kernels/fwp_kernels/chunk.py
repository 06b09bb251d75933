"""The chunk form: C tokens at a time by matrix products.

Per sequence and state head, for a chunk that starts from S₀, with G the running sum of g in the chunk, G^q the reader's
(one token behind for read "before", where j < i in P too), every exponent ≤ 0::

    A_ij = e_i Σ_d k_id k_jd exp(G_i − G_j)_d  for j < i     P_ij = Σ_d q_id k_jd exp(G^q_i − G_j)_d  for j ≤ i
    (I + A) X = w ⊙ V − e ⊙ (k ⊙ exp G) S₀
    O = (q ⊙ exp G^q) S₀ + P X                              S = exp(G_C) S₀ + (exp(G_C − G) ⊙ k)ᵀ X

A denominator reads z, one more column of S in which X is 1.

Source: 2006.16236, 2406.06484 (the delta rule by chunks), 2510.26692 (a decay per channel).
"""

import triton
import triton.language as tl

from .features import features
from .tiles import (
    chunk_of,
    dot,
    erase_key,
    inverse,
    kept_at,
    load,
    load_last,
    load_state,
    load_sum,
    products,
    quotient,
    read_state,
    read_sum,
    readers,
    row_at,
    rows_from,
    segment_of,
    span,
    state_at,
    state_block,
    store,
    strength,
    through,
    write_state,
    write_sum,
)


@triton.jit(do_not_specialize=["T", "NC"])
def sums_kernel(
    g,  # [B, T, H, KG]
    G,  # out [B, T, H, KG]
    p_cu,
    p_slots,
    p_owners,
    T,
    NC,
    H: tl.constexpr,
    KG: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    FLOOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """Running sums of the gates in each chunk. A gate counts at least FLOOR, whose exponential is 0 in ACC."""
    NK: tl.constexpr = (KG + BK - 1) // BK
    pid = tl.program_id(0).to(tl.int64)
    h = pid // NK % H
    n, c = chunk_of(pid // NK // H, p_cu, p_slots, p_owners, NC)
    first, length = span(p_cu, n, T)
    rows = rows_from(n, first + c * C, first + length, C)
    d = pid % NK * BK + tl.arange(0, BK)
    x = load(g, rows, h, d, KG).to(ACC)
    x = tl.where(x < FLOOR, FLOOR, x)
    store(G, rows, h, d, KG, tl.cumsum(x, 0))


@triton.jit(do_not_specialize=["T", "NC"])
def pairs_kernel(
    q,  # [B, T, Hq, D]
    k,  # [B, T, Hk, D]
    q_norms,  # [B, T, Hq, 1], by which their features are multiplied, or None
    k_norms,  # [B, T, Hk, 1] or None
    G,  # [B, T, H, 1 or K], the gates' running sums in each chunk, or None
    a,  # [B, T, H, K], erase keys, or None: φ(k)
    e,  # [B, T, H, 1] or None: 1
    P,  # out [B, T, H·R, C] or None: made in the walks unless the decay is per channel
    I,  # out [B, T, H, C], (I + A)⁻¹, or None without erasing
    p_cu,
    p_slots,
    p_owners,
    T,
    NC,
    H: tl.constexpr,
    GK: tl.constexpr,  # state heads that share a key head
    GQ: tl.constexpr,  # readers that share a query head
    R: tl.constexpr,  # readers of a state head
    K: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,  # of q's features
    C: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    LAG: tl.constexpr,
    ERASE_LAG: tl.constexpr,  # what is erased is found before the decay of its token
    WRITES: tl.constexpr,  # tokens of k, v and the gates for one of q
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(I + A)⁻¹ and P: what doesn't depend on the state. A program a chunk and head."""
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    n, c = chunk_of(pid // H, p_cu, p_slots, p_owners, NC)
    first, length = span(p_cu, n, T)
    end = first + length
    start = first + c * C
    rows = rows_from(n, start, end, C)
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    KG: tl.constexpr = K if DECAY == 2 else 1
    if I is not None:
        A = tl.zeros([C, C], ACC)
        for block in range(tl.cdiv(K, BK)):
            d = block * BK + tl.arange(0, BK)
            gates = (G, n, h, start, end, d if DECAY == 2 else one)
            b_k = features(k, k_norms, rows, h // GK, d, K, D, MAP, NORM, 1.0, ACC)
            b_a = erase_key(a, b_k, rows, h, d, K)
            A += products(b_a, b_k, gates, KG, False, ERASE_LAG, DECAY, DOT, ACC)
        A *= strength(e, rows, h, ACC)
        store(I, rows, h, i, C, inverse(A, ACC))
    if P is not None:
        reading = readers(rows, WRITES, LAG)
        for r in range(R):
            b_P = tl.zeros([C, C], ACC)
            for block in range(tl.cdiv(K, BK)):
                d = block * BK + tl.arange(0, BK)
                gates = (G, n, h, start, end, d if DECAY == 2 else one)
                b_q = features(q, q_norms, reading, (h * R + r) // GQ, d, K, D, MAP, NORM, SCALE, ACC)
                b_k = features(k, k_norms, rows, h // GK, d, K, D, MAP, NORM, 1.0, ACC)
                b_P += products(b_q, b_k, gates, KG, not LAG, LAG, DECAY, DOT, ACC)
            store(P, reading, h * R + r, i, C, b_P)


@triton.jit(do_not_specialize=["T", "NC", "NS", "CS"])
def walk_kernel(
    q,
    k,
    v,  # [B, T, Hv, V]; None: nothing is written, V = K
    G,
    a,
    e,
    w,  # [B, T, H, 1] or None
    P,
    I,
    o,  # out [B, T, H·R, V] or None
    den,  # out [B, T, H·R, 1], zᵀq + EPS, 0 where zᵀq = 0, or None
    X,  # out [B, T, H, V] or None
    p_S0,  # [segments, H, K, V] or None
    p_S,  # out [segments, H, K, V] or None
    p_decay,  # out [segments, H, 1 or K], the product of the decays, or None
    p_starts,  # out [·, H, K, V], the state before every APART-th chunk of a sequence, as `kept_at` says, or None
    p_z0,  # [segments, H, K] or None
    p_z,  # out [segments, H, K] or None
    p_z_starts,  # out [slots, H, K], z before each chunk, or None
    p_cu,
    p_slots,
    T,
    NC,
    NS,
    CS,
    H: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,  # state heads that share a value head
    GQ: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,  # all of K
    BV: tl.constexpr,
    APART: tl.constexpr,
    DECAY: tl.constexpr,
    LAG: tl.constexpr,
    ERASE_LAG: tl.constexpr,
    WRITES: tl.constexpr,
    EPS: tl.constexpr,  # None: no denominator
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """From the first chunk to the last, [K, BV] of S and z in registers. A program a segment, head and V block.

    Without v and S0 it starts from the identity, so that S ends as the matrix by which the segment passes on a state.
    """
    s, h, block, dk, dv, inside = state_block(H, K, V, BK, BV)
    n, c0, first, length = segment_of(s, p_cu, T, NS, CS, C)
    end = first + length
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    KG: tl.constexpr = K if DECAY == 2 else 1
    channels = dk if DECAY == 2 else one
    S = load_state(p_S0, s * H + h, dk, dv, K, V, ACC)
    if v is None:
        S += (dk[:, None] == dv[None, :]).to(ACC)
    z = load_sum(p_z0, s * H + h, dk, K, ACC)
    z_inside = (dk < K)[None, :]
    first_block = block == 0  # the programs of the other V blocks find the same z
    if p_decay is not None:
        g = tl.zeros([1, channels.shape[0]], ACC)
    for c in tl.range(tl.cdiv(length, C).to(tl.int32), disable_licm=True):
        start = first + c * C
        rows = rows_from(n, start, end, C)
        gates = (G, n, h, start, end, channels)
        b_k = features(k, None, rows, h // GK, dk, K, D, MAP, NORM, 1.0, ACC)
        if p_starts is not None:
            at = state_at(p_starts, kept_at(p_slots, n, c0 + c, NC, APART) * H + h, dk, dv, K, V)
            tl.store(at, S.to(p_starts.dtype.element_ty), mask=inside & ((c0 + c) % APART == 0))
        if p_z_starts is not None:
            at = row_at(p_z_starts, kept_at(p_slots, n, c0 + c, NC, 1) * H + h, dk, K)
            tl.store(at, z, mask=z_inside & first_block)
        if I is not None:
            b_a = erase_key(a, b_k, rows, h, dk, K)
            found = read_state(b_a, S, gates, KG, ERASE_LAG, False, DECAY, DOT, ACC)
        x = tl.zeros([C, BV], ACC)
        if v is not None:
            x = load(v, rows, h // GV, dv, V)
            if w is not None:
                x = x.to(ACC) * load(w, rows, h, one, 1).to(ACC)
        if I is not None:
            x = x.to(ACC) - strength(e, rows, h, ACC) * found
            x = dot(load(I, rows, h, i, C), x, DOT, ACC)
        if X is not None:
            store(X, rows, h, dv, V, x)
        if o is not None:
            reading = readers(rows, WRITES, LAG)
            for r in range(R):
                b_q = features(q, None, reading, (h * R + r) // GQ, dk, K, D, MAP, NORM, SCALE, ACC)
                b_o = read_state(b_q, S, gates, KG, LAG, False, DECAY, DOT, ACC)
                if P is not None:
                    b_P = load(P, reading, h * R + r, i, C)
                else:
                    b_P = products(b_q, b_k, gates, KG, not LAG, LAG, DECAY, DOT, ACC)
                b_o += dot(b_P, x, DOT, ACC)
                if EPS is not None:
                    zq = read_sum(b_q, z, gates, KG, LAG, DECAY, ACC)
                    zq += tl.sum(b_P.to(ACC), 1)[:, None]
                    b_den = tl.where(zq == 0, 0.0, zq + EPS)
                    b_o = quotient(b_o, b_den)
                    store(den, (n, reading[1], reading[2] & first_block), h * R + r, one, 1, b_den)
                store(o, reading, h * R + r, dv, V, b_o)
        if DECAY > 0:
            S = through(S, gates, KG, C)
            if p_decay is not None:
                g += load_last(gates, KG, C)
        S += write_state(b_k, x, gates, KG, False, True, DECAY, DOT, ACC)
        if EPS is not None:
            if DECAY > 0:
                z *= tl.exp(load_last(gates, KG, C))
            ones = tl.full([C, 1], 1.0, ACC)
            z += write_sum(b_k, ones, gates, KG, False, True, DECAY, ACC)
    if p_S is not None:
        tl.store(state_at(p_S, s * H + h, dk, dv, K, V), S, mask=inside)
    if p_z is not None:
        tl.store(row_at(p_z, s * H + h, dk, K), z, mask=z_inside & first_block)
    if p_decay is not None:
        at = p_decay + (s * H + h) * KG + channels[None, :]
        tl.store(at, tl.exp(g), mask=(channels[None, :] < KG) & first_block)
