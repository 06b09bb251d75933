"""The recurrent form: the recurrence of `fwp.core` itself, token by token, with a part of S in registers.

It serves decoding and short inputs. The chunk form computes its gradient, since both are the same function.
"""

import triton
import triton.language as tl

from .device import Rows, denominators, load_state, load_vector, quotient, span, state_at, state_block
from .features import keys, queries


@triton.jit
def load_token(x, n, t, h, d, D: tl.constexpr, ACC: tl.constexpr):
    """Features d of token t and head h in ACC, 0 beyond D: [len(d)]."""
    return tl.load(x.pointer + n * x.batch + t * x.token + h * x.head + d, mask=d < D, other=0.0).to(ACC)


@triton.jit
def load_number(x, n, t, h, ACC: tl.constexpr):
    """The number that token t and head h have in x, in ACC."""
    return tl.load(x.pointer + n * x.batch + t * x.token + h * x.head).to(ACC)


@triton.jit
def one_row(n, t):
    """Token t alone, as rows."""
    row = tl.arange(0, 1)
    return Rows(n, t + row, row == 0)


@triton.jit
def retrieved(p, b_S, b_k, n, t, h, k_offsets, s: tl.constexpr):
    """e Sᵀ a for token t: [V]. Without erase keys a is k, and without strengths e is 1."""
    b_a = b_k
    if p.a is not None:
        b_a = load_token(p.a, n, t, h, k_offsets, s.K, s.ACC)
    b_e = 1.0
    if p.e is not None:
        b_e = load_number(p.e, n, t, h, s.ACC)
    return b_e * tl.sum(b_S * b_a[:, None], 0)


@triton.jit
def read_token(p, p_o, p_den, n, t, h, b_S, b_z, k_offsets, v_offsets, first_block, s: tl.constexpr):
    """o = Sᵀ q for the readers of token t and state head h, divided by zᵀ q + EPS unless EPS is None."""
    for r in range(s.READERS):
        b_q = tl.sum(queries(p, one_row(n, t), h, r, k_offsets, s).to(s.ACC), 0)
        b_o = tl.sum(b_S * b_q[:, None], 0)
        reader = h * s.READERS + r
        if s.EPS is not None:
            found = tl.sum(b_z * b_q, 0)
            b_den = denominators(found, s)
            b_o = quotient(b_o, b_den)
            at = p_den.pointer + n * p_den.batch + t * p_den.token + reader * p_den.head
            tl.store(at, b_den, mask=first_block)
        at = p_o.pointer + n * p_o.batch + t * p_o.token + reader * p_o.head + v_offsets
        tl.store(at, b_o.to(p_o.pointer.dtype.element_ty), mask=v_offsets < s.V)


@triton.jit(do_not_specialize=["T"])
def token_kernel(
    p,  # Inputs
    p_g,  # [B, n·T, H, GATE_WIDTH] or None
    p_o,  # out [B, T, H·READERS, V]
    p_den,  # out [B, T, H·READERS, 1], zᵀq + EPS, 0 where zᵀq = 0, or None
    p_before,  # States before the first token
    p_after,  # out, States after the last token
    p_borders,  # [N + 1] or None
    T,  # tokens of k
    s: tl.constexpr,  # Switches
    BK: tl.constexpr,  # all of K
    BV: tl.constexpr,
):
    """S ← Diag(exp g) S;  S ← S + k (w v − e Sᵀ a)ᵀ;  o = Sᵀ q.

    A program takes a sequence, a head and a block of V, and goes through T.
    """
    n, h, block, k_offsets, v_offsets, mask = state_block(s.H, s.K, s.V, BK, BV)
    first, length = span(p_borders, n, T)
    b_S = load_state(p_before.S, n * s.H + h, k_offsets, v_offsets, s.K, s.V, s.ACC)
    b_z = tl.sum(load_vector(p_before.z, n * s.H + h, k_offsets, s.K, s.ACC), 0)
    first_block = block == 0  # programs of other V blocks compute the same z
    for step in range(length.to(tl.int32)):
        t = first + step
        reads = t % s.WRITES == (0 if s.READ_BEFORE else s.WRITES - 1)
        if s.READ_BEFORE:
            if reads:
                read_token(p, p_o, p_den, n, t // s.WRITES, h, b_S, b_z, k_offsets, v_offsets, first_block, s)
        b_k = tl.sum(keys(p, one_row(n, t), h, k_offsets, s).to(s.ACC), 0)
        b_x = load_token(p.v, n, t, h // s.HEADS_PER_V, v_offsets, s.V, s.ACC)
        if p.w is not None:
            b_x *= load_number(p.w, n, t, h, s.ACC)
        if p.a is not None or p.e is not None:
            if s.ERASE_BEFORE_DECAY:
                b_x -= retrieved(p, b_S, b_k, n, t, h, k_offsets, s)
        if s.DECAY == 1:
            decay = tl.exp(load_number(p_g, n, t, h, s.ACC))
            b_S *= decay
            b_z *= decay
        if s.DECAY == 2:
            decay = tl.exp(load_token(p_g, n, t, h, k_offsets, s.K, s.ACC))
            b_S *= decay[:, None]
            b_z *= decay
        if p.a is not None or p.e is not None:
            if not s.ERASE_BEFORE_DECAY:
                b_x -= retrieved(p, b_S, b_k, n, t, h, k_offsets, s)
        b_S += b_k[:, None] * b_x[None, :]
        b_z += b_k
        if not s.READ_BEFORE:
            if reads:
                read_token(p, p_o, p_den, n, t // s.WRITES, h, b_S, b_z, k_offsets, v_offsets, first_block, s)
    tl.store(state_at(p_after.S, n * s.H + h, k_offsets, v_offsets, s.K, s.V), b_S, mask=mask)
    if p_after.z is not None:
        tl.store(p_after.z + (n * s.H + h) * s.K + k_offsets, b_z, mask=(k_offsets < s.K) & first_block)
