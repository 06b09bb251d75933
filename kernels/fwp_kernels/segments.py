"""A walk over T in two levels: segments of whole chunks run in parallel, then their states are joined in order.

A segment changes the state linearly: S ← M S + N. A walk that starts from S = 0 gives N. If nothing is erased, M is the
product of the decays. Else a walk that starts from the identity and writes nothing gives M. A short recurrence over the
segments then gives the state before each, and an ordinary walk from that state gives its outputs. The backward is
dS ← Mᵀ dS + N', from the last segment to the first, where a walk back from dS = 0 gives N'.
"""

import triton
import triton.language as tl

from .device import dot, load_state, load_vector, state_at, state_block, state_mask, vector_at


@triton.jit(do_not_specialize=["NS"])
def join_kernel(
    p_N,  # States, S [segments, H, K, V] and z [segments, H, K], the result of each segment from 0
    p_M,  # [segments, H, K, K] or None: nothing is erased
    p_decay,  # [segments, H, GATE_WIDTH], the product of each segment's decays, or None
    p_before,  # States before the first segment, [N, H, …]
    p_starts,  # out, States before each segment, [segments, H, …]
    p_after,  # out, States after the last segment, [N, H, …]
    p_firsts,  # [N + 1], the first segment of each sequence, or None: each has NS
    NS,
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,  # all of K
    BJ: tl.constexpr,  # features at a time in a product
    BV: tl.constexpr,
    BACK: tl.constexpr,
):
    """S ← M S + N, or with BACK dS ← Mᵀ dS + N from the last segment on.

    A program takes a sequence, a head and a block of V, and goes through the segments.
    """
    K: tl.constexpr = s.K
    V: tl.constexpr = s.V
    n, h, block, k_offsets, v_offsets, mask = state_block(s.H, K, V, BK, BV)
    z_mask = (k_offsets < K)[None, :] & (block == 0)
    channels = k_offsets if s.DECAY == 2 else tl.arange(0, 1)
    if p_firsts is None:
        first = n * NS
        count = NS
    else:
        first = tl.load(p_firsts + n)
        count = (tl.load(p_firsts + n + 1) - first).to(tl.int32)
    b_S = load_state(p_before.S, n * s.H + h, k_offsets, v_offsets, K, V, s.ACC)
    b_z = load_vector(p_before.z, n * s.H + h, k_offsets, K, s.ACC)
    for step in range(count):
        at = (first + (count - 1 - step if BACK else step)) * s.H + h
        tl.store(state_at(p_starts.S, at, k_offsets, v_offsets, K, V), b_S, mask=mask)
        b_N = tl.load(state_at(p_N.S, at, k_offsets, v_offsets, K, V), mask=mask, other=0.0)
        if p_decay is not None:
            decay_at = vector_at(p_decay, at, channels, s.GATE_WIDTH)
            decay = tl.load(decay_at, mask=channels[None, :] < s.GATE_WIDTH, other=0.0)
        if p_M is not None:
            tl.debug_barrier()  # the S just written is read again, by blocks
            b_S = b_N
            for part in range(tl.cdiv(K, BJ)):
                j = part * BJ + tl.arange(0, BJ)
                b_part = tl.load(
                    state_at(p_starts.S, at, j, v_offsets, K, V), mask=state_mask(j, v_offsets, K, V), other=0.0
                )
                M_at = j[None, :] * K + k_offsets[:, None] if BACK else k_offsets[:, None] * K + j[None, :]
                b_M = tl.load(p_M + at * K * K + M_at, mask=state_mask(k_offsets, j, K, K), other=0.0)
                b_S += dot(b_M, b_part, s.ACC, s.ACC)
        elif p_decay is not None:
            b_S = b_S * tl.trans(decay) + b_N
        else:
            b_S += b_N
        if p_N.z is not None:
            tl.store(vector_at(p_starts.z, at, k_offsets, K), b_z, mask=z_mask)
            if p_decay is not None:
                b_z *= decay
            b_z += tl.load(vector_at(p_N.z, at, k_offsets, K), mask=z_mask, other=0.0)
    if p_after.S is not None:
        tl.store(state_at(p_after.S, n * s.H + h, k_offsets, v_offsets, K, V), b_S, mask=mask)
    if p_after.z is not None:
        tl.store(vector_at(p_after.z, n * s.H + h, k_offsets, K), b_z, mask=z_mask)
