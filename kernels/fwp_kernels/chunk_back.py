"""The backward of the chunk form: the chain rule for the equations of `chunk.py`, in the same letters.

Only the inputs are saved. The forward's kernels compute (I + A)⁻¹, P, X and S₀ again. Then a walk goes back through the
chunks::

    dX = Pᵀ dO + (exp(G_C − G) ⊙ k) dS,  dR = (I + A)⁻ᵀ dX,  dV = w ⊙ dR,  dw = Σ_v v ⊙ dR
    dS₀ = exp(G_C) dS + (q ⊙ exp G^q)ᵀ dO − (e ⊙ a ⊙ exp G^a)ᵀ dR

All chunks then run at once, with dP = dO Xᵀ and dA = −dR Xᵀ for visible pairs and the decay D of each pair::

    dq      = exp G^q ⊙ (dO S₀ᵀ) + Σ_j (dP ⊙ D)_ij k_j
    d(e a)  = −exp G^a ⊙ (dR S₀ᵀ) + Σ_j (dA ⊙ D)_ij k_j,   de = a · d(e a),   da = e ⊙ d(e a)
    dk      = exp(G_C − G) ⊙ (X dSᵀ) + Σ_i (dP ⊙ D)_ij q_i + Σ_i (dA ⊙ D)_ij e_i a_i      + da where a is k
    dg_s    = the sum of x · dx over everything x that the gate of s decays: S₀ for readers and erasers i ≥ s, writes
              j < s at the chunk's end, S₀ at the chunk's end, and writes j < s for readers and erasers i ≥ s

The walks keep S₀ and dS every CHECKPOINT_EVERY chunks. Those of the chunks between are recomputed from them by the
equations above.

With a denominator, O and the denominators n are saved too. The gradient of the quotient's numerator is dO / n. That of
n is dn = −Σ_v dO ⊙ O / n, which belongs to the column z.
"""

import triton
import triton.language as tl

from .device import (
    Gates,
    Place,
    chunk_of,
    decay_over_chunk,
    dot,
    erase_keys,
    from_start,
    kept_at,
    load,
    load_last,
    load_state,
    load_vector,
    per_token,
    product_gradients,
    products,
    quotient,
    read_state,
    reading_rows,
    rows_from,
    segment_of,
    span,
    state_at,
    state_block,
    store,
    to_end,
    vector_at,
    write_state,
    write_vector,
)
from .features import keys, queries, slope, token_block


@triton.jit(do_not_specialize=["T"])
def denominator_back_kernel(
    p_do,  # [B, T, readers, V]
    p_o,  # [B, T, readers, V]
    p_den,  # [B, T, readers, 1]
    p_dden,  # out [B, T, readers, 1]
    T,
    READERS: tl.constexpr,  # of all state heads
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
):
    """dn = −Σ_v dO ⊙ O / n.

    A program takes BT tokens of a batch row and reader.
    """
    rows, h = token_block(T, READERS, BT)
    one = tl.arange(0, 1)
    total = tl.zeros([BT, 1], ACC)
    for part in range(tl.cdiv(V, BV)):
        d = part * BV + tl.arange(0, BV)
        total += tl.sum(load(p_do, rows, h, d, V).to(ACC) * load(p_o, rows, h, d, V).to(ACC), 1)[:, None]
    store(p_dden, rows, h, one, 1, -quotient(total, load(p_den, rows, h, one, 1)))


@triton.jit
def load_divided(up, rows, reader, d, s: tl.constexpr):
    """dO [C, len(d)], divided by the denominators if there are any."""
    x = load(up.d_o, rows, reader, d, s.V)
    if up.den is not None:
        x = quotient(x.to(s.ACC), load(up.den, rows, reader, tl.arange(0, 1), 1))
    return x


@triton.jit(do_not_specialize=["T", "NC", "NS", "CS"])
def walk_back_kernel(
    p,  # Inputs
    p_P,  # [B, T, H·READERS, C] or None
    p_A_inv,  # [B, n·T, H, C] or None
    up,  # OutputGradients
    p_dR,  # out [B, n·T, H, V] or None
    p_dv,  # out [B, n·T, H, V] or None
    p_dw,  # out [B, n·T, H, V blocks] or None: one part per V block
    p_d_after,  # gradients of the States after each segment, [segments, H, …]
    p_d_before,  # out, gradients of the States before each segment
    p_d_kept,  # out, gradients of the States after chunks: S every CHECKPOINT_EVERY chunks, z after each
    packing,  # Packing
    T,  # tokens of k
    NC,  # chunks of a sequence without packing
    NS,  # segments of a sequence without packing
    CS,  # chunks of a segment without packing
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,  # all of K
    BV: tl.constexpr,
):
    """dR, dV, dw and dS of the equations above, from the last chunk to the first.

    A program takes a segment, a head and a block of V, with [K, BV] of dS and dz in registers, and goes through its
    chunks.
    """
    C: tl.constexpr = s.C
    segment, h, block, k_offsets, v_offsets, mask = state_block(s.H, s.K, s.V, BK, BV)
    n, c0, first, length = segment_of(segment, packing, T, NS, CS, C)
    end = first + length
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    channels = k_offsets if s.DECAY == 2 else one
    b_dS = load_state(p_d_after.S, segment * s.H + h, k_offsets, v_offsets, s.K, s.V, s.ACC)
    b_dz = load_vector(p_d_after.z, segment * s.H + h, k_offsets, s.K, s.ACC)
    z_mask = (k_offsets < s.K)[None, :]
    first_block = block == 0
    chunks = tl.cdiv(length, C).to(tl.int32)
    for step in tl.range(chunks, disable_licm=True):
        c = chunks - 1 - step
        start = first + c * C
        rows = rows_from(n, start, end, C)
        gates = Gates(p.G, n, h, start, end, channels)
        b_k = keys(p, rows, h, k_offsets, s)
        if p_d_kept.S is not None:
            index = kept_at(packing.slots, n, c0 + c, NC, s.CHECKPOINT_EVERY) * s.H + h
            at = state_at(p_d_kept.S, index, k_offsets, v_offsets, s.K, s.V)
            last = ((c0 + c) % s.CHECKPOINT_EVERY == s.CHECKPOINT_EVERY - 1) | (step == 0)
            tl.store(at, b_dS.to(p_d_kept.S.dtype.element_ty), mask=mask & last)
        b_dR = read_state(b_k, b_dS, gates, False, True, s)
        if s.DECAY > 0:
            b_dS = decay_over_chunk(b_dS, gates, s)
        if p_d_kept.z is not None:
            at = vector_at(p_d_kept.z, kept_at(packing.slots, n, c0 + c, NC, 1) * s.H + h, k_offsets, s.K)
            tl.store(at, b_dz, mask=z_mask & first_block)
        if s.DECAY > 0:
            if p_d_kept.z is not None or p_d_before.z is not None:
                b_dz *= tl.exp(load_last(gates, s))
        if up.d_o is not None:
            reading = reading_rows(rows, s)
            for r in range(s.READERS):
                reader = h * s.READERS + r
                b_q = queries(p, reading, h, r, k_offsets, s)
                b_do = load_divided(up, reading, reader, v_offsets, s)
                if up.den is not None:
                    b_dden = load(up.d_den, reading, reader, one, 1)
                    b_dz += write_vector(b_q, b_dden, gates, s.READ_BEFORE, False, s)
                if p_P is not None:
                    b_P = load(p_P, reading, reader, i, C)
                else:
                    b_P = products(b_q, b_k, gates, not s.READ_BEFORE, s.READ_BEFORE, s)
                b_dR += dot(tl.trans(b_P), b_do, s.DOT, s.ACC)
                b_dS += write_state(b_q, b_do, gates, s.READ_BEFORE, False, s)
        if p_A_inv is not None:
            b_dR = dot(tl.trans(load(p_A_inv, rows, h, i, C)), b_dR, s.DOT, s.ACC)
            b_a = erase_keys(p, b_k, rows, h, k_offsets, s)
            b_e = per_token(p.e, rows, h, s.ACC)
            b_dS -= write_state(b_a, b_e * b_dR, gates, s.ERASE_BEFORE_DECAY, False, s)
            if p_dR is not None:
                store(p_dR, rows, h, v_offsets, s.V, b_dR)
        if p_dw is not None:
            b_v = load(p.v, rows, h // s.HEADS_PER_V, v_offsets, s.V).to(s.ACC)
            store(p_dw, rows, h, block + one, (s.V + BV - 1) // BV, tl.sum(b_v * b_dR, 1)[:, None])
            b_dR *= per_token(p.w, rows, h, s.ACC)
        if p_dv is not None:
            store(p_dv, rows, h, v_offsets, s.V, b_dR)
    if p_d_before.S is not None:
        tl.store(state_at(p_d_before.S, segment * s.H + h, k_offsets, v_offsets, s.K, s.V), b_dS, mask=mask)
    if p_d_before.z is not None:
        tl.store(vector_at(p_d_before.z, segment * s.H + h, k_offsets, s.K), b_dz, mask=z_mask & first_block)


@triton.jit
def load_written(p, p_X, rows, h, d, s: tl.constexpr):
    """X [C, len(d)], what the tokens write: loaded if something is erased, else w ⊙ v."""
    if p_X is not None:
        x = load(p_X, rows, h, d, s.V)
    else:
        x = load(p.v, rows, h // s.HEADS_PER_V, d, s.V)
        if p.w is not None:
            x = x.to(s.ACC) * per_token(p.w, rows, h, s.ACC)
    return x


@triton.jit
def recompute_S(p, p_X, p_kept_S, slots, NC, at, k_offsets, channels, v_offsets, s: tl.constexpr):
    """S₀ of the chunk `at`, recomputed from the last kept state before it.

    Returns [len(k_offsets), len(v_offsets)] in ACC.
    """
    EVERY: tl.constexpr = s.CHECKPOINT_EVERY
    index = kept_at(slots, at.n, at.c, NC, EVERY) * s.H + at.h
    b_S = load_state(p_kept_S, index, k_offsets, v_offsets, s.K, s.V, s.ACC)
    if EVERY > 1:
        for step in range((at.c % EVERY).to(tl.int32)):
            start = at.first + (at.c // EVERY * EVERY + step) * s.C
            rows = rows_from(at.n, start, at.end, s.C)
            gates = Gates(p.G, at.n, at.h, start, at.end, channels)
            b_k = keys(p, rows, at.h, k_offsets, s)
            x = load_written(p, p_X, rows, at.h, v_offsets, s)
            if s.DECAY > 0:
                b_S = decay_over_chunk(b_S, gates, s)
            b_S += write_state(b_k, x, gates, False, True, s)
    return b_S


@triton.jit
def recompute_dS(p, up, p_dR, p_d_kept_S, slots, NC, at, k_offsets, channels, v_offsets, s: tl.constexpr):
    """dS after the chunk `at`, recomputed from the next kept gradient after it.

    Returns [len(k_offsets), len(v_offsets)] in ACC.
    """
    EVERY: tl.constexpr = s.CHECKPOINT_EVERY
    index = kept_at(slots, at.n, at.c, NC, EVERY) * s.H + at.h
    b_dS = load_state(p_d_kept_S, index, k_offsets, v_offsets, s.K, s.V, s.ACC)
    if EVERY > 1:
        last = tl.minimum(at.c // EVERY * EVERY + EVERY, tl.cdiv(at.end - at.first, s.C)) - 1
        for step in range(tl.maximum(last - at.c, 0).to(tl.int32)):
            start = at.first + (last - step) * s.C
            rows = rows_from(at.n, start, at.end, s.C)
            gates = Gates(p.G, at.n, at.h, start, at.end, channels)
            if s.DECAY > 0:
                b_dS = decay_over_chunk(b_dS, gates, s)
            if up.d_o is not None:
                reading = reading_rows(rows, s)
                for r in range(s.READERS):
                    b_q = queries(p, reading, at.h, r, k_offsets, s)
                    b_do = load_divided(up, reading, at.h * s.READERS + r, v_offsets, s)
                    b_dS += write_state(b_q, b_do, gates, s.READ_BEFORE, False, s)
            if p_dR is not None:
                b_a = erase_keys(p, keys(p, rows, at.h, k_offsets, s), rows, at.h, k_offsets, s)
                b_e = per_token(p.e, rows, at.h, s.ACC)
                b_dR = load(p_dR, rows, at.h, v_offsets, s.V).to(s.ACC)
                b_dS -= write_state(b_a, b_e * b_dR, gates, s.ERASE_BEFORE_DECAY, False, s)
    return b_dS


@triton.jit
def per_gate(x, DECAY: tl.constexpr):
    """x [C, K] for gates per channel, or its sum over K [C, 1] for a gate per head."""
    if DECAY == 1:
        return tl.sum(x, 1)[:, None]
    else:
        return x


@triton.jit(do_not_specialize=["T", "NC"])
def gradients_kernel(
    p,  # Inputs
    p_X,  # [B, n·T, H, V], or None: nothing is erased
    up,  # OutputGradients
    p_dR,  # [B, n·T, H, V], or None: nothing is erased
    p_dq,  # out [B, T, H·READERS, K]: of q if the map takes each feature alone, else of φ(q)
    p_dk,  # out [B, n·T, H, K], likewise
    p_dg,  # out [B, n·T, H, K], or [B, n·T, H, K blocks] for a gate per head, one part per K block; or None
    p_da,  # out [B, n·T, H, K] or None: a is k
    p_de,  # out [B, n·T, H, K blocks] or None: one part per K block
    p_kept,  # States that `walk_kernel` kept
    p_d_kept,  # gradients that `walk_back_kernel` kept
    packing,  # Packing
    T,  # tokens of k
    NC,  # chunks of a sequence without packing
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dq, dk, dg, da and de of the equations above.

    A program takes a chunk, a head and a block of K, and sums over V.
    """
    NK: tl.constexpr = (s.K + BK - 1) // BK
    C: tl.constexpr = s.C
    pid = tl.program_id(0).to(tl.int64)
    block = pid % NK
    h = pid // NK % s.H
    slot = pid // NK // s.H
    n, c = chunk_of(slot, packing, NC)
    first, length = span(packing.borders, n, T)
    end = first + length
    start = first + c * C
    rows = rows_from(n, start, end, C)
    one = tl.arange(0, 1)
    d = block * BK + tl.arange(0, BK)
    channels = d if s.DECAY == 2 else one
    gates = Gates(p.G, n, h, start, end, channels)
    at = Place(n, h, c, first, end)
    b_k = keys(p, rows, h, d, s).to(s.ACC)

    # Gradients of writers through the state after the chunk, and of erasers through the state before it.
    b_dk = tl.zeros([C, BK], s.ACC)
    b_dea = tl.zeros([C, BK], s.ACC)  # d(e a)
    dA = tl.zeros([C, C], s.ACC)
    b_SdS = tl.zeros([1, BK], s.ACC)  # Σ_v S₀ ⊙ dS
    for part in range(tl.cdiv(s.V, BV)):
        v_offsets = part * BV + tl.arange(0, BV)
        b_dS = recompute_dS(p, up, p_dR, p_d_kept.S, packing.slots, NC, at, d, channels, v_offsets, s)
        x = load_written(p, p_X, rows, h, v_offsets, s)
        b_dk += dot(x, tl.trans(b_dS), s.DOT, s.ACC)
        if s.DECAY > 0 or p_dR is not None:
            b_S = recompute_S(p, p_X, p_kept.S, packing.slots, NC, at, d, channels, v_offsets, s)
            b_SdS += tl.sum(b_S * b_dS, 1)[None, :]
            if p_dR is not None:
                b_dR = load(p_dR, rows, h, v_offsets, s.V)
                b_dea -= dot(b_dR, tl.trans(b_S), s.DOT, s.ACC)
                dA -= dot(b_dR, tl.trans(x), s.DOT, s.ACC)
    if p_d_kept.z is not None:
        z_mask = (d < s.K)[None, :]
        b_z = tl.load(vector_at(p_kept.z, slot * s.H + h, d, s.K), mask=z_mask, other=0.0)
        b_dz = tl.load(vector_at(p_d_kept.z, slot * s.H + h, d, s.K), mask=z_mask, other=0.0)
        b_dk += b_dz
        b_SdS += b_z * b_dz
    if s.DECAY > 0:
        b_dk = to_end(b_dk, gates, s)
        # In the end the gradient of a gate is b_dg plus the sum of b_dG over its own and all later tokens.
        b_dG = -per_gate(b_k * b_dk, s.DECAY)
        b_dg = per_gate(b_SdS * tl.exp(load_last(gates, s)), s.DECAY)
        b_dg += tl.zeros_like(b_dG) - tl.sum(b_dG, 0)[None, :]

    if p_dR is not None:
        b_a = erase_keys(p, b_k, rows, h, d, s).to(s.ACC)
        b_e = per_token(p.e, rows, h, s.ACC)
        d_eraser, d_writer, dG, dG_eraser = product_gradients(dA, b_e * b_a, b_k, gates, False, s.ERASE_BEFORE_DECAY, s)
        if s.DECAY > 0:
            b_dea = from_start(b_dea, gates, s.ERASE_BEFORE_DECAY, s)
            from_S = per_gate(b_e * b_a * b_dea, s.DECAY)
            b_dG += from_S + dG
            if s.ERASE_BEFORE_DECAY:  # erasers don't see their own token's gate
                b_dg -= from_S + dG_eraser
        b_dea += d_eraser
        if p.a is None:
            b_dk += d_writer + b_e * b_dea
        else:
            b_dk += d_writer
            store(p_da, rows, h, d, s.K, b_e * b_dea)
        if p_de is not None:
            store(p_de, rows, h, block + one, NK, tl.sum(b_a * b_dea, 1)[:, None])

    if up.d_o is not None:
        reading = reading_rows(rows, s)
        for r in range(s.READERS):
            reader = h * s.READERS + r
            b_q = queries(p, reading, h, r, d, s).to(s.ACC)
            b_dq = tl.zeros([C, BK], s.ACC)
            dP = tl.zeros([C, C], s.ACC)
            for part in range(tl.cdiv(s.V, BV)):
                v_offsets = part * BV + tl.arange(0, BV)
                b_S = recompute_S(p, p_X, p_kept.S, packing.slots, NC, at, d, channels, v_offsets, s)
                x = load_written(p, p_X, rows, h, v_offsets, s)
                b_do = load_divided(up, reading, reader, v_offsets, s)
                b_dq += dot(b_do, tl.trans(b_S), s.DOT, s.ACC)
                dP += dot(b_do, tl.trans(x), s.DOT, s.ACC)
            if up.den is not None:
                b_dden = load(up.d_den, reading, reader, one, 1)
                b_dq += b_dden * b_z
                dP += b_dden
            d_reader, d_writer, dG, dG_reader = product_gradients(
                dP, b_q, b_k, gates, not s.READ_BEFORE, s.READ_BEFORE, s
            )
            b_dk += d_writer
            if s.DECAY > 0:
                b_dq = from_start(b_dq, gates, s.READ_BEFORE, s)
                border = b_q * b_dq
                b_dG += per_gate(border, s.DECAY) + dG
                if s.READ_BEFORE:  # readers don't see their own token's gate
                    b_dg -= per_gate(border, s.DECAY) + dG_reader
            b_dq += d_reader
            if s.Q_PHI.MAP < 4 and s.Q_PHI.NORM == 0:
                b_dq *= slope(p.q, reading, reader // s.HEADS_PER_Q, d, s.Q_PHI, s.ACC) * s.Q_PHI.SCALE
            store(p_dq, reading, reader, d, s.K, b_dq)
    if s.K_PHI.MAP < 4 and s.K_PHI.NORM == 0:
        b_dk *= slope(p.k, rows, h // s.HEADS_PER_K, d, s.K_PHI, s.ACC)
    store(p_dk, rows, h, d, s.K, b_dk)
    if s.DECAY > 0:
        b_dg += tl.cumsum(b_dG, 0, reverse=True)
        if s.DECAY == 2:
            store(p_dg, rows, h, d, s.K, b_dg)
        else:
            store(p_dg, rows, h, block + one, NK, b_dg)
