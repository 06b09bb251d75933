"""The chunk form: C tokens at a time by matrix products.

These equations hold per sequence and state head for a chunk that starts from S₀. a = k unless erase keys are given. G
is the running sum of g in the chunk. G^q is G at the readers, or with read "before" G of the token before, and then
j < i in P too. G^a is G at the erasers, or G of the token before if they erase before the decay. Exponents are ≤ 0::

    A_ij = e_i Σ_d a_id k_jd exp(G^a_i − G_j)_d  for j < i   P_ij = Σ_d q_id k_jd exp(G^q_i − G_j)_d  for j ≤ i
    (I + A) X = w ⊙ V − e ⊙ (a ⊙ exp G^a) S₀
    O = (q ⊙ exp G^q) S₀ + P X                              S = exp(G_C) S₀ + (exp(G_C − G) ⊙ k)ᵀ X

A denominator reads z, one more column of S in which X is 1. With several writes per read, only those writes at which a
token of q reads have rows in q, O and P.

Source: 2006.16236, 2406.06484 (the delta rule by chunks), 2510.26692 (a decay per channel).
"""

import triton
import triton.language as tl

from .device import (
    Gates,
    Rows,
    chunk_of,
    decay_over_chunk,
    denominators,
    dot,
    erase_keys,
    inverse,
    kept_at,
    load,
    load_last,
    load_state,
    load_vector,
    per_token,
    products,
    quotient,
    read_state,
    read_vector,
    reading_rows,
    rows_from,
    segment_of,
    span,
    state_at,
    state_block,
    store,
    vector_at,
    write_state,
    write_vector,
)
from .features import keys, queries


@triton.jit(do_not_specialize=["T", "NC"])
def sums_kernel(
    p_g,  # [B, n·T, H, GATE_WIDTH]
    p_G,  # out [B, n·T, H, GATE_WIDTH]
    packing,  # Packing
    T,
    NC,
    H: tl.constexpr,
    GATE_WIDTH: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    FLOOR: tl.constexpr,
    ACC: tl.constexpr,
):
    """G_i = Σ_{j ≤ i} max(g_j, FLOOR) over the tokens of a chunk; the exponential of FLOOR is 0 in ACC.

    A program takes a chunk, a head and a block of gates.
    """
    NK: tl.constexpr = (GATE_WIDTH + BK - 1) // BK
    pid = tl.program_id(0).to(tl.int64)
    h = pid // NK % H
    n, c = chunk_of(pid // NK // H, packing, NC)
    first, length = span(packing.borders, n, T)
    rows = rows_from(n, first + c * C, first + length, C)
    d = pid % NK * BK + tl.arange(0, BK)
    x = load(p_g, rows, h, d, GATE_WIDTH).to(ACC)
    x = tl.where(x < FLOOR, FLOOR, x)
    store(p_G, rows, h, d, GATE_WIDTH, tl.cumsum(x, 0))


@triton.jit(do_not_specialize=["T", "NC"])
def pairs_kernel(
    p,  # Inputs
    p_P,  # out [B, T, H·READERS, C], or None: the walks make it, unless the decay is per channel
    p_A_inv,  # out [B, n·T, H, C], or None: nothing is erased
    packing,  # Packing
    T,  # tokens of k
    NC,  # chunks of a sequence without packing
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,
):
    """(I + A)⁻¹ and P, which don't depend on the state.

    A program takes a chunk and a head.
    """
    C: tl.constexpr = s.C
    pid = tl.program_id(0).to(tl.int64)
    h = pid % s.H
    n, c = chunk_of(pid // s.H, packing, NC)
    first, length = span(packing.borders, n, T)
    end = first + length
    start = first + c * C
    rows = rows_from(n, start, end, C)
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    if p_A_inv is not None:
        A = tl.zeros([C, C], s.ACC)
        for block in range(tl.cdiv(s.K, BK)):
            d = block * BK + tl.arange(0, BK)
            gates = Gates(p.G, n, h, start, end, d if s.DECAY == 2 else one)
            b_k = keys(p, rows, h, d, s)
            b_a = erase_keys(p, b_k, rows, h, d, s)
            A += products(b_a, b_k, gates, False, s.ERASE_BEFORE_DECAY, s)
        A *= per_token(p.e, rows, h, s.ACC)
        store(p_A_inv, rows, h, i, C, inverse(A, s.ACC))
    if p_P is not None:
        reading = reading_rows(rows, s)
        for r in range(s.READERS):
            b_P = tl.zeros([C, C], s.ACC)
            for block in range(tl.cdiv(s.K, BK)):
                d = block * BK + tl.arange(0, BK)
                gates = Gates(p.G, n, h, start, end, d if s.DECAY == 2 else one)
                b_q = queries(p, reading, h, r, d, s)
                b_k = keys(p, rows, h, d, s)
                b_P += products(b_q, b_k, gates, not s.READ_BEFORE, s.READ_BEFORE, s)
            store(p_P, reading, h * s.READERS + r, i, C, b_P)


@triton.jit(do_not_specialize=["T", "NC", "NS", "CS"])
def walk_kernel(
    p,  # Inputs; v None: nothing is written, V = K
    p_P,  # [B, T, H·READERS, C] or None
    p_A_inv,  # [B, n·T, H, C] or None
    p_o,  # out [B, T, H·READERS, V] or None
    p_den,  # out [B, T, H·READERS, 1], zᵀq + EPS, 0 where zᵀq = 0, or None
    p_X,  # out [B, n·T, H, V] or None
    p_before,  # States before each segment, [segments, H, …]
    p_after,  # out, States after each segment
    p_kept,  # out, States before chunks: S every CHECKPOINT_EVERY chunks at `kept_at`, z before each
    p_decay,  # out [segments, H, GATE_WIDTH], the product of the decays, or None
    packing,  # Packing
    T,  # tokens of k
    NC,  # chunks of a sequence without packing
    NS,  # segments of a sequence without packing
    CS,  # chunks of a segment without packing
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,  # all of K
    BV: tl.constexpr,
):
    """X, O and S of the equations above, chunk after chunk.

    A program takes a segment, a head and a block of V. It goes through the segment's chunks with [K, BV] of S and z in
    registers. Without v and without S before the segment it starts from the identity. S then ends as the segment's
    matrix M.
    """
    C: tl.constexpr = s.C
    segment, h, block, k_offsets, v_offsets, mask = state_block(s.H, s.K, s.V, BK, BV)
    n, c0, first, length = segment_of(segment, packing, T, NS, CS, C)
    end = first + length
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    channels = k_offsets if s.DECAY == 2 else one
    b_S = load_state(p_before.S, segment * s.H + h, k_offsets, v_offsets, s.K, s.V, s.ACC)
    if p.v is None:
        b_S += (k_offsets[:, None] == v_offsets[None, :]).to(s.ACC)
    b_z = load_vector(p_before.z, segment * s.H + h, k_offsets, s.K, s.ACC)
    z_mask = (k_offsets < s.K)[None, :]
    first_block = block == 0  # programs of other V blocks compute the same z
    if p_decay is not None:
        g = tl.zeros([1, channels.shape[0]], s.ACC)
    for c in tl.range(tl.cdiv(length, C).to(tl.int32), disable_licm=True):
        start = first + c * C
        rows = rows_from(n, start, end, C)
        gates = Gates(p.G, n, h, start, end, channels)
        b_k = keys(p, rows, h, k_offsets, s)
        if p_kept.S is not None:
            index = kept_at(packing.slots, n, c0 + c, NC, s.CHECKPOINT_EVERY) * s.H + h
            at = state_at(p_kept.S, index, k_offsets, v_offsets, s.K, s.V)
            wanted = mask & ((c0 + c) % s.CHECKPOINT_EVERY == 0)
            tl.store(at, b_S.to(p_kept.S.dtype.element_ty), mask=wanted)
        if p_kept.z is not None:
            at = vector_at(p_kept.z, kept_at(packing.slots, n, c0 + c, NC, 1) * s.H + h, k_offsets, s.K)
            tl.store(at, b_z, mask=z_mask & first_block)
        if p_A_inv is not None:
            b_a = erase_keys(p, b_k, rows, h, k_offsets, s)
            found = read_state(b_a, b_S, gates, s.ERASE_BEFORE_DECAY, False, s)
        b_x = tl.zeros([C, BV], s.ACC)
        if p.v is not None:
            b_x = load(p.v, rows, h // s.HEADS_PER_V, v_offsets, s.V)
            if p.w is not None:
                b_x = b_x.to(s.ACC) * per_token(p.w, rows, h, s.ACC)
        if p_A_inv is not None:
            b_x = b_x.to(s.ACC) - per_token(p.e, rows, h, s.ACC) * found
            b_x = dot(load(p_A_inv, rows, h, i, C), b_x, s.DOT, s.ACC)
        if p_X is not None:
            store(p_X, rows, h, v_offsets, s.V, b_x)
        if p_o is not None:
            reading = reading_rows(rows, s)
            for r in range(s.READERS):
                b_q = queries(p, reading, h, r, k_offsets, s)
                b_o = read_state(b_q, b_S, gates, s.READ_BEFORE, False, s)
                if p_P is not None:
                    b_P = load(p_P, reading, h * s.READERS + r, i, C)
                else:
                    b_P = products(b_q, b_k, gates, not s.READ_BEFORE, s.READ_BEFORE, s)
                b_o += dot(b_P, b_x, s.DOT, s.ACC)
                if s.EPS is not None:
                    zq = read_vector(b_q, b_z, gates, s.READ_BEFORE, s)
                    zq += tl.sum(b_P.to(s.ACC), 1)[:, None]
                    b_den = denominators(zq, s)
                    b_o = quotient(b_o, b_den)
                    once = Rows(n, reading.t, reading.present & first_block)
                    store(p_den, once, h * s.READERS + r, one, 1, b_den)
                store(p_o, reading, h * s.READERS + r, v_offsets, s.V, b_o)
        if s.DECAY > 0:
            b_S = decay_over_chunk(b_S, gates, s)
            if p_decay is not None:
                g += load_last(gates, s)
        b_S += write_state(b_k, b_x, gates, False, True, s)
        if s.EPS is not None:
            if s.DECAY > 0:
                b_z *= tl.exp(load_last(gates, s))
            ones = tl.full([C, 1], 1.0, s.ACC)
            b_z += write_vector(b_k, ones, gates, False, True, s)
    if p_after.S is not None:
        tl.store(state_at(p_after.S, segment * s.H + h, k_offsets, v_offsets, s.K, s.V), b_S, mask=mask)
    if p_after.z is not None:
        tl.store(vector_at(p_after.z, segment * s.H + h, k_offsets, s.K), b_z, mask=z_mask & first_block)
    if p_decay is not None:
        at = vector_at(p_decay, segment * s.H + h, channels, s.GATE_WIDTH)
        tl.store(at, tl.exp(g), mask=(channels[None, :] < s.GATE_WIDTH) & first_block)
