"""The backward of the chunk form, by the chain rule from the equations and in the letters of `chunk.py`.

Only the inputs were kept. (I + A)⁻¹, P, X and S₀ are made again by the kernels of the forward, then it is walked back::

    dX = Pᵀ dO + (exp(G_C − G) ⊙ k) dS,  dR = (I + A)⁻ᵀ dX,  dV = w ⊙ dR,  dw = Σ_v v ⊙ dR
    dS₀ = exp(G_C) dS + (q ⊙ exp G^q)ᵀ dO − (e ⊙ k ⊙ exp G)ᵀ dR

and then, all chunks at once, from dP = dO Xᵀ and dA = −dR Xᵀ (visible pairs), with D the decays of each pair::

    dq      = exp G^q ⊙ (dO S₀ᵀ) + Σ_j (dP ⊙ D)_ij k_j
    d(e k)  = −exp G ⊙ (dR S₀ᵀ) + Σ_j (dA ⊙ D)_ij k_j,   de = k · d(e k)
    dk      = exp(G_C − G) ⊙ (X dSᵀ) + Σ_i (dP ⊙ D)_ij q_i + Σ_i (dA ⊙ D)_ij e_i k_i + e ⊙ d(e k)
    dg_s    = what passed the gate of s: from S₀ to readers and erasers i ≥ s, from writers j < s to the end, from S₀
              to the end, from j < s to i ≥ s in the chunk

Of S₀ and dS the walks keep one in APART chunks; from it those of the chunks between are made by the equations above.

With a denominator, O and the denominators n are kept too. The gradient of what they divide is dO / n, and that of n, in
the column of z, dn = −Σ_v dO ⊙ O / n.
"""

import triton
import triton.language as tl

from .features import features, slope, tokens_of
from .tiles import (
    chunk_of,
    dot,
    erase_key,
    from_start,
    kept_at,
    load,
    load_last,
    load_state,
    load_sum,
    product_gradients,
    products,
    quotient,
    read_state,
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
    to_end,
    write_state,
    write_sum,
)


@triton.jit(do_not_specialize=["T"])
def denominator_back_kernel(
    do,  # [B, T, H·R, V]
    o,  # [B, T, H·R, V]
    den,  # [B, T, H·R, 1]
    dden,  # out [B, T, H·R, 1]
    T,
    HO: tl.constexpr,  # readers: H·R
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of the denominators. A program BT tokens of a batch row and reader."""
    rows, h = tokens_of(T, HO, BT)
    one = tl.arange(0, 1)
    total = tl.zeros([BT, 1], ACC)
    for part in range(tl.cdiv(V, BV)):
        d = part * BV + tl.arange(0, BV)
        total += tl.sum(load(do, rows, h, d, V).to(ACC) * load(o, rows, h, d, V).to(ACC), 1)[:, None]
    store(dden, rows, h, one, 1, -quotient(total, load(den, rows, h, one, 1)))


@triton.jit
def load_divided(do, den, rows, h, d, V: tl.constexpr, ACC: tl.constexpr):
    """The gradient of what the denominators, if there are any, divide: [C, len(d)]."""
    x = load(do, rows, h, d, V)
    if den is not None:
        x = quotient(x.to(ACC), load(den, rows, h, tl.arange(0, 1), 1))
    return x


@triton.jit(do_not_specialize=["T", "NC", "NS", "CS"])
def walk_back_kernel(
    q,
    k,
    v,
    G,
    a,
    e,
    w,
    P,
    I,
    do,  # [B, T, H·R, V] or None
    den,  # [B, T, H·R, 1] or None
    dden,  # [B, T, H·R, 1] or None
    dR,  # out [B, T, H, V] or None
    dv,  # out [B, T, H, V] or None
    dw,  # out [B, T, H, V blocks] or None: each V block's share
    p_dS,  # [segments, H, K, V], gradient of the final state, or None
    p_dS0,  # out [segments, H, K, V] or None
    p_ends,  # out [·, H, K, V], gradient of the state after every APART-th chunk and the last, or None
    p_dz,  # [segments, H, K], gradient of the final z, or None
    p_dz0,  # out [segments, H, K] or None
    p_z_ends,  # out [slots, H, K], gradient of z after each chunk, or None
    p_cu,
    p_slots,
    T,
    NC,
    NS,
    CS,
    H: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
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
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """From the last chunk to the first with a [K, BV] part of dS and dz in registers, as `walk_kernel`."""
    s, h, block, dk, cols, inside = state_block(H, K, V, BK, BV)
    n, c0, first, length = segment_of(s, p_cu, T, NS, CS, C)
    end = first + length
    i = tl.arange(0, C)
    one = tl.arange(0, 1)
    KG: tl.constexpr = K if DECAY == 2 else 1
    channels = dk if DECAY == 2 else one
    dS = load_state(p_dS, s * H + h, dk, cols, K, V, ACC)
    dz = load_sum(p_dz, s * H + h, dk, K, ACC)
    z_inside = (dk < K)[None, :]
    first_block = block == 0
    chunks = tl.cdiv(length, C).to(tl.int32)
    for step in tl.range(chunks, disable_licm=True):
        c = chunks - 1 - step
        start = first + c * C
        rows = rows_from(n, start, end, C)
        gates = (G, n, h, start, end, channels)
        b_k = features(k, None, rows, h // GK, dk, K, D, MAP, NORM, 1.0, ACC)
        if p_ends is not None:
            at = state_at(p_ends, kept_at(p_slots, n, c0 + c, NC, APART) * H + h, dk, cols, K, V)
            last = ((c0 + c) % APART == APART - 1) | (step == 0)
            tl.store(at, dS.to(p_ends.dtype.element_ty), mask=inside & last)
        b_dR = read_state(b_k, dS, gates, KG, False, True, DECAY, DOT, ACC)
        if DECAY > 0:
            dS = through(dS, gates, KG, C)
        if p_z_ends is not None:
            at = row_at(p_z_ends, kept_at(p_slots, n, c0 + c, NC, 1) * H + h, dk, K)
            tl.store(at, dz, mask=z_inside & first_block)
        if DECAY > 0:
            if p_z_ends is not None or p_dz0 is not None:
                dz *= tl.exp(load_last(gates, KG, C))
        if do is not None:
            reading = readers(rows, WRITES, LAG)
            for r in range(R):
                b_q = features(q, None, reading, (h * R + r) // GQ, dk, K, D, MAP, NORM, SCALE, ACC)
                b_do = load_divided(do, den, reading, h * R + r, cols, V, ACC)
                if den is not None:
                    b_dden = load(dden, reading, h * R + r, one, 1)
                    dz += write_sum(b_q, b_dden, gates, KG, LAG, False, DECAY, ACC)
                if P is not None:
                    b_P = load(P, reading, h * R + r, i, C)
                else:
                    b_P = products(b_q, b_k, gates, KG, not LAG, LAG, DECAY, DOT, ACC)
                b_dR += dot(tl.trans(b_P), b_do, DOT, ACC)
                dS += write_state(b_q, b_do, gates, KG, LAG, False, DECAY, DOT, ACC)
        if I is not None:
            b_dR = dot(tl.trans(load(I, rows, h, i, C)), b_dR, DOT, ACC)
            b_a = erase_key(a, b_k, rows, h, dk, K)
            b_e = strength(e, rows, h, ACC)
            dS -= write_state(b_a, b_e * b_dR, gates, KG, ERASE_LAG, False, DECAY, DOT, ACC)
            if dR is not None:
                store(dR, rows, h, cols, V, b_dR)
        if dw is not None:
            b_v = load(v, rows, h // GV, cols, V).to(ACC)
            store(dw, rows, h, block + one, (V + BV - 1) // BV, tl.sum(b_v * b_dR, 1)[:, None])
            b_dR *= load(w, rows, h, one, 1).to(ACC)
        if dv is not None:
            store(dv, rows, h, cols, V, b_dR)
    if p_dS0 is not None:
        tl.store(state_at(p_dS0, s * H + h, dk, cols, K, V), dS, mask=inside)
    if p_dz0 is not None:
        tl.store(row_at(p_dz0, s * H + h, dk, K), dz, mask=z_inside & first_block)


@triton.jit
def load_written(v, w, X, rows, h, d, V: tl.constexpr, GV: tl.constexpr, ACC: tl.constexpr):
    """X [C, len(d)], what the tokens write: kept by the walk where something is erased, else w ⊙ v."""
    if X is not None:
        x = load(X, rows, h, d, V)
    else:
        x = load(v, rows, h // GV, d, V)
        if w is not None:
            x = x.to(ACC) * load(w, rows, h, tl.arange(0, 1), 1).to(ACC)
    return x


@triton.jit
def start_of(
    p_starts,
    p_slots,
    k,
    k_norms,
    v,
    w,
    X,
    G,
    n,
    c,
    h,
    first,
    end,
    d,
    channels,
    cols,
    NC,
    H: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    C: tl.constexpr,
    APART: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """S₀ [len(d), len(cols)] of chunk c, in ACC: from the state that was kept last, by what the chunks since wrote."""
    KG: tl.constexpr = K if DECAY == 2 else 1
    S = load_state(p_starts, kept_at(p_slots, n, c, NC, APART) * H + h, d, cols, K, V, ACC)
    if APART > 1:
        for step in range((c % APART).to(tl.int32)):
            start = first + (c // APART * APART + step) * C
            rows = rows_from(n, start, end, C)
            gates = (G, n, h, start, end, channels)
            b_k = features(k, k_norms, rows, h // GK, d, K, D, MAP, NORM, 1.0, ACC)
            x = load_written(v, w, X, rows, h, cols, V, GV, ACC)
            if DECAY > 0:
                S = through(S, gates, KG, C)
            S += write_state(b_k, x, gates, KG, False, True, DECAY, DOT, ACC)
    return S


@triton.jit
def end_of(
    p_ends,
    p_slots,
    q,
    k,
    q_norms,
    k_norms,
    G,
    a,
    e,
    do,
    den,
    dR,
    n,
    c,
    h,
    first,
    end,
    d,
    channels,
    cols,
    NC,
    H: tl.constexpr,
    GK: tl.constexpr,
    GQ: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    APART: tl.constexpr,
    DECAY: tl.constexpr,
    LAG: tl.constexpr,
    ERASE_LAG: tl.constexpr,
    WRITES: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dS after chunk c in the same way, from the next that was kept, back through the chunks between."""
    KG: tl.constexpr = K if DECAY == 2 else 1
    dS = load_state(p_ends, kept_at(p_slots, n, c, NC, APART) * H + h, d, cols, K, V, ACC)
    if APART > 1:
        last = tl.minimum(c // APART * APART + APART, tl.cdiv(end - first, C)) - 1
        for step in range(tl.maximum(last - c, 0).to(tl.int32)):
            start = first + (last - step) * C
            rows = rows_from(n, start, end, C)
            gates = (G, n, h, start, end, channels)
            if DECAY > 0:
                dS = through(dS, gates, KG, C)
            if do is not None:
                reading = readers(rows, WRITES, LAG)
                for r in range(R):
                    b_q = features(q, q_norms, reading, (h * R + r) // GQ, d, K, D, MAP, NORM, SCALE, ACC)
                    b_do = load_divided(do, den, reading, h * R + r, cols, V, ACC)
                    dS += write_state(b_q, b_do, gates, KG, LAG, False, DECAY, DOT, ACC)
            if dR is not None:
                if a is not None:
                    b_a = load(a, rows, h, d, K)
                else:
                    b_a = features(k, k_norms, rows, h // GK, d, K, D, MAP, NORM, 1.0, ACC)
                b_e = strength(e, rows, h, ACC)
                b_dR = load(dR, rows, h, cols, V).to(ACC)
                dS -= write_state(b_a, b_e * b_dR, gates, KG, ERASE_LAG, False, DECAY, DOT, ACC)
    return dS


@triton.jit
def per_gate(x, DECAY: tl.constexpr):
    """x [C, K] for the gates [C, K], its sum over K for one gate a head."""
    if DECAY == 1:
        return tl.sum(x, 1)[:, None]
    else:
        return x


@triton.jit(do_not_specialize=["T", "NC"])
def gradients_kernel(
    q,
    k,
    q_norms,
    k_norms,
    v,
    G,
    a,
    e,
    w,
    X,
    do,
    den,
    dden,
    dR,
    dq,  # out [B, T, H·R, K]: of q where each of its features is mapped alone, else of φ(q)
    dk,  # out [B, T, H, K]
    dg,  # out [B, T, H, K], or [B, T, H, K blocks] for one gate a head: each K block's share
    da,  # out [B, T, H, K] or None: added to dk
    de,  # out [B, T, H, K blocks] or None
    p_starts,
    p_ends,
    p_z_starts,
    p_z_ends,
    p_cu,
    p_slots,
    p_owners,
    T,
    NC,
    H: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    GQ: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    APART: tl.constexpr,
    DECAY: tl.constexpr,
    LAG: tl.constexpr,
    ERASE_LAG: tl.constexpr,
    WRITES: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq, dk, dg, de from the states and their gradients at the chunk's borders. A program a chunk, head, K block."""
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0).to(tl.int64)
    block = pid % NK
    h = pid // NK % H
    slot = pid // NK // H
    n, c = chunk_of(slot, p_cu, p_slots, p_owners, NC)
    first, length = span(p_cu, n, T)
    end = first + length
    start = first + c * C
    rows = rows_from(n, start, end, C)
    one = tl.arange(0, 1)
    d = block * BK + tl.arange(0, BK)
    KG: tl.constexpr = K if DECAY == 2 else 1
    channels = d if DECAY == 2 else one
    gates = (G, n, h, start, end, channels)
    b_k = features(k, k_norms, rows, h // GK, d, K, D, MAP, NORM, 1.0, ACC).to(ACC)

    # Writers to the state after the chunk, erasers from the state before it.
    b_dk = tl.zeros([C, BK], ACC)
    b_dea = tl.zeros([C, BK], ACC)  # of e a
    dA = tl.zeros([C, C], ACC)
    kept = tl.zeros([1, BK], ACC)  # Σ_v S₀ ⊙ dS
    for part in range(tl.cdiv(V, BV)):
        cols = part * BV + tl.arange(0, BV)
        dS = end_of(
            p_ends, p_slots, q, k, q_norms, k_norms, G, a, e, do, den, dR, n, c, h, first, end, d, channels, cols, NC,
            H, GK, GQ, R, K, V, D, MAP, NORM, SCALE, C, APART, DECAY, LAG, ERASE_LAG, WRITES, DOT, ACC,
        )  # fmt: skip
        x = load_written(v, w, X, rows, h, cols, V, GV, ACC)
        b_dk += dot(x, tl.trans(dS), DOT, ACC)
        if DECAY > 0 or dR is not None:
            S = start_of(
                p_starts, p_slots, k, k_norms, v, w, X, G, n, c, h, first, end, d, channels, cols, NC,
                H, GK, GV, K, V, D, MAP, NORM, C, APART, DECAY, DOT, ACC,
            )  # fmt: skip
            kept += tl.sum(S * dS, 1)[None, :]
            if dR is not None:
                b_dR = load(dR, rows, h, cols, V)
                b_dea -= dot(b_dR, tl.trans(S), DOT, ACC)
                dA -= dot(b_dR, tl.trans(x), DOT, ACC)
    if p_z_ends is not None:
        z_inside = (d < K)[None, :]
        z = tl.load(row_at(p_z_starts, slot * H + h, d, K), mask=z_inside, other=0.0)
        dz = tl.load(row_at(p_z_ends, slot * H + h, d, K), mask=z_inside, other=0.0)
        b_dk += dz
        kept += z * dz
    if DECAY > 0:
        b_dk = to_end(b_dk, gates, KG)
        # dG, and what the gates get beside its sum over the later tokens: all of what reaches the chunk's end
        b_dG = -per_gate(b_k * b_dk, DECAY)
        b_dg = per_gate(kept * tl.exp(load_last(gates, KG, C)), DECAY)
        b_dg += tl.zeros_like(b_dG) - tl.sum(b_dG, 0)[None, :]

    if dR is not None:
        b_a = erase_key(a, b_k, rows, h, d, K).to(ACC)
        b_e = strength(e, rows, h, ACC)
        d_eraser, d_writer, dG, late = product_gradients(
            dA, b_e * b_a, b_k, gates, KG, False, ERASE_LAG, DECAY, DOT, ACC
        )
        if DECAY > 0:
            b_dea = from_start(b_dea, gates, KG, ERASE_LAG)
            from_before = per_gate(b_e * b_a * b_dea, DECAY)
            b_dG += from_before + dG
            if ERASE_LAG:  # an eraser is one gate behind its token, as a reader with LAG
                b_dg -= from_before + late
        b_dea += d_eraser
        if a is None:
            b_dk += d_writer + b_e * b_dea
        else:
            b_dk += d_writer
            store(da, rows, h, d, K, b_e * b_dea)
        if de is not None:
            store(de, rows, h, block + one, NK, tl.sum(b_a * b_dea, 1)[:, None])

    if do is not None:
        reading = readers(rows, WRITES, LAG)
        for r in range(R):
            b_q = features(q, q_norms, reading, (h * R + r) // GQ, d, K, D, MAP, NORM, SCALE, ACC).to(ACC)
            b_dq = tl.zeros([C, BK], ACC)
            dP = tl.zeros([C, C], ACC)
            for part in range(tl.cdiv(V, BV)):
                cols = part * BV + tl.arange(0, BV)
                S = start_of(
                    p_starts, p_slots, k, k_norms, v, w, X, G, n, c, h, first, end, d, channels, cols, NC,
                    H, GK, GV, K, V, D, MAP, NORM, C, APART, DECAY, DOT, ACC,
                )  # fmt: skip
                x = load_written(v, w, X, rows, h, cols, V, GV, ACC)
                b_do = load_divided(do, den, reading, h * R + r, cols, V, ACC)
                b_dq += dot(b_do, tl.trans(S), DOT, ACC)
                dP += dot(b_do, tl.trans(x), DOT, ACC)
            if den is not None:
                b_dden = load(dden, reading, h * R + r, one, 1)
                b_dq += b_dden * z
                dP += b_dden
            d_reader, d_writer, dG, lagging = product_gradients(dP, b_q, b_k, gates, KG, not LAG, LAG, DECAY, DOT, ACC)
            b_dk += d_writer
            if DECAY > 0:
                b_dq = from_start(b_dq, gates, KG, LAG)
                border = b_q * b_dq
                b_dG += per_gate(border, DECAY) + dG
                if LAG:  # a reader is one gate behind its token
                    b_dg -= per_gate(border, DECAY) + lagging
            b_dq += d_reader
            if MAP < 4 and NORM == 0:
                b_dq *= slope(q, reading, (h * R + r) // GQ, d, D, MAP, ACC) * SCALE
            store(dq, reading, h * R + r, d, K, b_dq)
    if MAP < 4 and NORM == 0:
        b_dk *= slope(k, rows, h // GK, d, D, MAP, ACC)
    store(dk, rows, h, d, K, b_dk)
    if DECAY > 0:
        b_dg += tl.cumsum(b_dG, 0, reverse=True)
        if DECAY == 2:
            store(dg, rows, h, d, K, b_dg)
        else:
            store(dg, rows, h, block + one, NK, b_dg)
