"""Two levels of a walk over T: segments of whole chunks run side by side, then their states are joined in order.

What a segment does to the state before it is linear: S ← M S + N. N is what a walk makes of S = 0. M is the product of
the decays if nothing is erased, else the matrix that a walk makes of the identity when nothing is written. So the
states before all segments follow by a short recurrence, and the outputs by an ordinary walk from each. Gradients go the
other way: dS ← Mᵀ dS + N', N' being what a walk back makes of dS = 0.
"""

import triton
import triton.language as tl

from .tiles import dot, load_state, load_sum, row_at, state_at, state_block, state_mask


@triton.jit(do_not_specialize=["NS"])
def join_kernel(
    p_N,  # [segments, H, K, V]
    p_M,  # [segments, H, K, K] or None: nothing is erased
    p_decay,  # [segments, H, 1 or K] or None
    p_S0,  # [N, H, K, V] or None
    p_starts,  # out [segments, H, K, V], the state before each segment
    p_S,  # out [N, H, K, V], the state after the last, or None
    p_Nz,  # [segments, H, K] or None: the same of z, which decays alone change
    p_z0,
    p_z_starts,
    p_z,
    p_firsts,  # [N + 1], the first segment of each sequence, or None: NS of each
    NS,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,  # all of K
    BJ: tl.constexpr,  # features at a time in a product
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    BACK: tl.constexpr,
    ACC: tl.constexpr,
):
    """S ← M S + N, or with BACK dS ← Mᵀ dS + N from the last segment on. A program a sequence, head and V block."""
    n, h, block, dk, dv, inside = state_block(H, K, V, BK, BV)
    z_inside = (dk < K)[None, :] & (block == 0)
    KG: tl.constexpr = K if DECAY == 2 else 1
    gates = dk if DECAY == 2 else tl.arange(0, 1)
    if p_firsts is None:
        first = n * NS
        count = NS
    else:
        first = tl.load(p_firsts + n)
        count = (tl.load(p_firsts + n + 1) - first).to(tl.int32)
    S = load_state(p_S0, n * H + h, dk, dv, K, V, ACC)
    z = load_sum(p_z0, n * H + h, dk, K, ACC)
    for step in range(count):
        s = (first + (count - 1 - step if BACK else step)) * H + h
        tl.store(state_at(p_starts, s, dk, dv, K, V), S, mask=inside)
        b_N = tl.load(state_at(p_N, s, dk, dv, K, V), mask=inside, other=0.0)
        if p_decay is not None:
            decay = tl.load(row_at(p_decay, s, gates, KG), mask=gates[None, :] < KG, other=0.0)
        if p_M is not None:
            tl.debug_barrier()  # S is read again, by blocks, from where it was just written
            S = b_N
            for part in range(tl.cdiv(K, BJ)):
                dj = part * BJ + tl.arange(0, BJ)
                b_S = tl.load(state_at(p_starts, s, dj, dv, K, V), mask=state_mask(dj, dv, K, V), other=0.0)
                at = dj[None, :] * K + dk[:, None] if BACK else dk[:, None] * K + dj[None, :]
                b_M = tl.load(p_M + s * K * K + at, mask=state_mask(dk, dj, K, K), other=0.0)
                S += dot(b_M, b_S, ACC, ACC)
        elif p_decay is not None:
            S = S * tl.trans(decay) + b_N
        else:
            S += b_N
        if p_Nz is not None:
            tl.store(row_at(p_z_starts, s, dk, K), z, mask=z_inside)
            if p_decay is not None:
                z *= decay
            z += tl.load(row_at(p_Nz, s, dk, K), mask=z_inside, other=0.0)
    if p_S is not None:
        tl.store(state_at(p_S, n * H + h, dk, dv, K, V), S, mask=inside)
    if p_z is not None:
        tl.store(row_at(p_z, n * H + h, dk, K), z, mask=z_inside)
