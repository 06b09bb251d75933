"""The device functions that kernels share.

The README beside this package explains letters and prefixes. `p` are the tensors of `arguments.Inputs`, and `s` the
constants of `arguments.Switches`.

Gates are summed within chunks. Each counts at least a floor whose exponential is 0, so that resets are exact, those of
−inf too, and a gate of −1e4 costs the decays after it few digits. Every exponent is ≤ 0, so nothing overflows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """Some tokens of a batch row."""

    n: Any  # batch row
    t: Any  # [C], tokens
    present: Any  # [C], whether the token exists


class Gates(NamedTuple):
    """The decays of a chunk. Rows beyond the sequence's end repeat its last row, so that no exponent is positive."""

    G: Any  # [B, n·T, H, GATE_WIDTH] or None
    n: Any  # batch row
    h: Any  # state head
    start: Any  # first token of the chunk
    end: Any  # end of the sequence
    channels: Any  # the features of G to load


class Place(NamedTuple):
    """A chunk of a sequence and head."""

    n: Any  # sequence
    h: Any  # state head
    c: Any  # chunk of the sequence
    first: Any  # first token of the sequence
    end: Any  # its end


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


# ---- tokens ----


@triton.jit
def rows_from(n, start, end, C: tl.constexpr):
    """C tokens of batch row n from `start`."""
    t = start + tl.arange(0, C)
    return Rows(n, t, t < end)


@triton.jit
def reading_rows(rows, s: tl.constexpr):
    """The rows of q, o and P that read at these writes. Writes without a read have no row.

    With several writes per read, token t of q reads after write WRITES t + WRITES − 1, or before write WRITES t.
    """
    if s.WRITES == 1:
        return rows
    else:
        reads = rows.t % s.WRITES == (0 if s.READ_BEFORE else s.WRITES - 1)
        return Rows(rows.n, rows.t // s.WRITES, rows.present & reads)


@triton.jit
def load(x, rows, h, d, D: tl.constexpr):
    """Features d of head h: [C, len(d)] in the tensor's dtype, 0 for absent tokens and beyond D."""
    at = x.pointer + rows.n * x.batch + rows.t[:, None] * x.token + h * x.head + d[None, :]
    return tl.load(at, mask=rows.present[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store(x, rows, h, d, D: tl.constexpr, value):
    """The reverse of `load`."""
    at = x.pointer + rows.n * x.batch + rows.t[:, None] * x.token + h * x.head + d[None, :]
    tl.store(at, value.to(x.pointer.dtype.element_ty), mask=rows.present[:, None] & (d[None, :] < D))


@triton.jit
def per_token(x, rows, h, ACC: tl.constexpr):
    """The numbers of tokens and head h in x: [C, 1] in ACC, 1 if x is None."""
    if x is not None:
        return load(x, rows, h, tl.arange(0, 1), 1).to(ACC)
    else:
        return tl.full([rows.t.shape[0], 1], 1.0, ACC)


@triton.jit
def erase_keys(p, b_k, rows, h, d, s: tl.constexpr):
    """The keys along which values are erased, [C, len(d)]: a, or k without erase keys."""
    if p.a is not None:
        return load(p.a, rows, h, d, s.K)
    else:
        return b_k


@triton.jit
def dot(a, b, DOT: tl.constexpr, ACC: tl.constexpr):
    """a b, with operands rounded to DOT and sums in ACC. float32 operands stay float32, without tf32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee", out_dtype=ACC)


@triton.jit
def denominators(found, s: tl.constexpr):
    """found + EPS, 0 where found is 0 or below LEAST."""
    if s.LEAST > 0:
        return tl.where(tl.abs(found) < s.LEAST, 0.0, found + s.EPS)
    else:
        return tl.where(found == 0, 0.0, found + s.EPS)


@triton.jit
def quotient(x, den):
    """x / den, 0 where den is 0. It divides, since the reciprocal of a small den would overflow."""
    return tl.where(den == 0, 0.0, x / tl.where(den == 0, 1.0, den))


# ---- states ----


@triton.jit
def state_at(p_S, index, k_offsets, v_offsets, K: tl.constexpr, V: tl.constexpr):
    """Pointers to a block of matrix `index` of a contiguous [..., K, V]."""
    return p_S + index * K * V + k_offsets[:, None] * V + v_offsets[None, :]


@triton.jit
def state_mask(k_offsets, v_offsets, K: tl.constexpr, V: tl.constexpr):
    """Which elements of a block exist."""
    return (k_offsets[:, None] < K) & (v_offsets[None, :] < V)


@triton.jit
def state_block(H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The part of S [K, V] that a program holds: sequence, head, block of V, k_offsets, v_offsets and mask."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    k_offsets = tl.arange(0, BK)
    v_offsets = pid % NV * BV + tl.arange(0, BV)
    return pid // NV // H, pid // NV % H, pid % NV, k_offsets, v_offsets, state_mask(k_offsets, v_offsets, K, V)


@triton.jit
def load_state(p_S, index, k_offsets, v_offsets, K: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr):
    """A block of matrix `index` in ACC, 0 if p_S is None."""
    S = tl.zeros([k_offsets.shape[0], v_offsets.shape[0]], ACC)
    if p_S is not None:
        mask = state_mask(k_offsets, v_offsets, K, V)
        S += tl.load(state_at(p_S, index, k_offsets, v_offsets, K, V), mask=mask, other=0.0).to(ACC)
    return S


@triton.jit
def vector_at(p_z, index, k_offsets, K: tl.constexpr):
    """Pointers to features of vector `index` of a contiguous [..., K], as a row [1, len(k_offsets)]."""
    return p_z + index * K + k_offsets[None, :]


@triton.jit
def load_vector(p_z, index, k_offsets, K: tl.constexpr, ACC: tl.constexpr):
    """Features of vector `index` in ACC, [1, len(k_offsets)], 0 if p_z is None."""
    z = tl.zeros([1, k_offsets.shape[0]], ACC)
    if p_z is not None:
        z += tl.load(vector_at(p_z, index, k_offsets, K), mask=(k_offsets < K)[None, :], other=0.0)
    return z


# ---- sequences, chunks and segments ----


@triton.jit
def span(borders, n, T):
    """First token and length of sequence n. Without packing that is batch row n with T tokens."""
    if borders is None:
        first = n * 0
        length = first + T
    else:
        first = tl.load(borders + n).to(tl.int64)
        length = tl.load(borders + n + 1).to(tl.int64) - first
    return first, length


@triton.jit
def chunk_of(slot, packing, NC):
    """Sequence n and chunk c of a slot. Spare slots give chunks behind the end of their sequence."""
    if packing.borders is None:
        n = slot // NC
        c = slot % NC
    else:
        n = tl.load(packing.owners + slot).to(tl.int64)
        c = slot - tl.load(packing.slots + n)
    return n, c


@triton.jit
def segment_of(segment, packing, T, NS, CS, C: tl.constexpr):
    """Batch row, first chunk in it, first token and length of a segment.

    Without packing a row has NS segments of CS chunks. With packing the borders are those of segments.
    """
    if packing.borders is None:
        n = segment // NS
        c = segment % NS * CS
        first = c * C
        length = tl.minimum(T - first, CS * C)
    else:
        n = segment
        c = segment * 0
        first, length = span(packing.borders, segment, T)
    return n, c, first, length


@triton.jit
def kept_at(slots, n, c, NC, EVERY: tl.constexpr):
    """Index of the state that is kept for chunk c of sequence n and the other chunks of its group of EVERY.

    No two sequences share a group. At most (chunks before + n (EVERY − 1)) / EVERY groups, rounded up, precede n.
    """
    if slots is None:
        before = n * NC
    else:
        before = tl.load(slots + n)
    return (before + (n + 1) * (EVERY - 1)) // EVERY + c // EVERY


# ---- decays ----


@triton.jit
def load_sums(gates, i, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """G of tokens start + i of the chunk. BEFORE_DECAY: G of the token before each, 0 at the start."""
    t = tl.minimum(gates.start + i - BEFORE_DECAY, gates.end - 1)
    return load(gates.G, Rows(gates.n, t, t >= gates.start), gates.h, gates.channels, s.GATE_WIDTH)


@triton.jit
def load_last(gates, s: tl.constexpr):
    """G of the chunk's last token, [1, ·]."""
    return load_sums(gates, s.C - 1 + tl.arange(0, 1), False, s)


@triton.jit
def from_start(x, gates, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """x [C, ·] decayed from the chunk's start to each token."""
    x = x.to(gates.G.pointer.dtype.element_ty)
    return x * tl.exp(load_sums(gates, tl.arange(0, x.shape[0]), BEFORE_DECAY, s))


@triton.jit
def to_end(x, gates, s: tl.constexpr):
    """x [C, ·] decayed from each token to the chunk's end."""
    last = load_last(gates, s)
    return x.to(last.dtype) * tl.exp(last - load_sums(gates, tl.arange(0, x.shape[0]), False, s))


@triton.jit
def decay_over_chunk(S, gates, s: tl.constexpr):
    """S [K, ·] decayed from the chunk's start to its end."""
    return S * tl.trans(tl.exp(load_last(gates, s)))


@triton.jit
def decayed(x, gates, BEFORE_DECAY: tl.constexpr, END: tl.constexpr, s: tl.constexpr):
    """x [C, ·] decayed from the chunk's start to each token, or with END from each token to the chunk's end."""
    if END:
        return to_end(x, gates, s)
    else:
        return from_start(x, gates, BEFORE_DECAY, s)


@triton.jit
def read_state(x, S, gates, BEFORE_DECAY: tl.constexpr, END: tl.constexpr, s: tl.constexpr):
    """decayed(x) S for x [C, K]. A gate per head scales the rows of the product, so that its operand is x as loaded."""
    if s.DECAY == 2:
        y = dot(decayed(x, gates, BEFORE_DECAY, END, s), S, s.DOT, s.ACC)
    else:
        y = dot(x, S, s.DOT, s.ACC)
        if s.DECAY == 1:
            y = decayed(y, gates, BEFORE_DECAY, END, s)
    return y


@triton.jit
def write_state(x, y, gates, BEFORE_DECAY: tl.constexpr, END: tl.constexpr, s: tl.constexpr):
    """decayed(x)ᵀ y for x [C, K] and y [C, V]. A gate per head scales the rows of y."""
    if s.DECAY == 2:
        x = decayed(x, gates, BEFORE_DECAY, END, s)
    elif s.DECAY == 1:
        y = decayed(y, gates, BEFORE_DECAY, END, s)
    return dot(tl.trans(x), y, s.DOT, s.ACC)


# The denominator: z is one more column of S, in which every write is 1 and nothing is erased. It is a row [1, K] in
# ACC, read and written by sums, since a matrix product needs at least 16 columns.


@triton.jit
def read_vector(x, z, gates, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """`read_state` of z from the chunk's start: [C, 1]."""
    if s.DECAY == 2:
        x = from_start(x, gates, BEFORE_DECAY, s)
    y = tl.sum(x.to(s.ACC) * z, 1)[:, None]
    if s.DECAY == 1:
        y = from_start(y, gates, BEFORE_DECAY, s)
    return y


@triton.jit
def write_vector(x, y, gates, BEFORE_DECAY: tl.constexpr, END: tl.constexpr, s: tl.constexpr):
    """`write_state` of y [C, 1] to z: [1, K]."""
    if s.DECAY == 2:
        x = decayed(x, gates, BEFORE_DECAY, END, s)
    elif s.DECAY == 1:
        y = decayed(y, gates, BEFORE_DECAY, END, s)
    return tl.sum(x.to(s.ACC) * y, 0)[None, :]


# ---- products of pairs of tokens ----

# M_ij = Σ_d a_id b_jd exp(G_i − G_j)_d, with BEFORE_DECAY exp(G_{i−1} − G_j)_d. A decay per channel can't be taken out
# of the sum over d. But let i lie in the later half of a block of tokens and j in the earlier half. Then the decay is
# that from j to the middle times that from the middle to i. Each pair lies so in one block of size 2, 4, …, C, so
# log₂ C masked products make all pairs.


@triton.jit
def visible(C: tl.constexpr, DIAGONAL: tl.constexpr):
    """Whether i sees j, [C, C]: j < i, or with DIAGONAL j ≤ i."""
    i = tl.arange(0, C)
    if DIAGONAL:
        return i[:, None] >= i[None, :]
    else:
        return i[:, None] > i[None, :]


@triton.jit
def half_block_decays(gates, half, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """The decays of the two halves of blocks of 2 half tokens, and whether i and j share a block [C, C].

    The first decays [C, ·] are those from the block's middle to each token of the later half, 0 in the earlier half.
    The second are those from each token of the earlier half to the middle, 0 in the later half.
    """
    i = tl.arange(0, s.C)
    middle = load_sums(gates, i // (2 * half) * (2 * half) + half - 1, False, s)
    late = ((i // half) % 2 == 1)[:, None]
    # exponents that would be positive are masked before the exponential
    after = tl.exp(tl.where(late, load_sums(gates, i, BEFORE_DECAY, s) - middle, -float("inf")))
    before = tl.exp(tl.where(late, -float("inf"), middle - load_sums(gates, i, False, s)))
    return after, before, i[:, None] // (2 * half) == i[None, :] // (2 * half)


@triton.jit
def decays_between(gates, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """exp(G_i − G_j) for a gate per head, 1 above the diagonal: [C, C]."""
    i = tl.arange(0, s.C)
    later = load_sums(gates, i, BEFORE_DECAY, s)
    earlier = load_sums(gates, i, False, s)
    return tl.exp(tl.where(i[:, None] > i[None, :], later - tl.trans(earlier), 0.0))


@triton.jit
def products_between(a, b, gates, half, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """The M_ij with i in the later half and j in the earlier half of a block of 2 half tokens, else 0."""
    after, before, together = half_block_decays(gates, half, BEFORE_DECAY, s)
    return tl.where(together, dot(a * after, tl.trans(b * before), s.DOT, after.dtype), 0.0)


@triton.jit
def products(a, b, gates, DIAGONAL: tl.constexpr, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """M [C, C] of some features a and b [C, ·], 0 where i doesn't see j."""
    C: tl.constexpr = s.C
    if s.DECAY == 2:
        M = tl.zeros([C, C], s.ACC)
        a = a.to(s.ACC)
        b = b.to(s.ACC)
        for level in tl.range(log2(C), num_stages=1, disable_licm=True):
            M += products_between(a, b, gates, 1 << level, BEFORE_DECAY, s)
        if DIAGONAL:
            i = tl.arange(0, C)
            M = tl.where(i[:, None] == i[None, :], tl.sum(a * b, 1)[:, None], M)
    else:
        M = dot(a, tl.trans(b), s.DOT, s.ACC)
        if s.DECAY == 1:
            M *= decays_between(gates, BEFORE_DECAY, s)
        M = tl.where(visible(C, DIAGONAL), M, 0.0)
    return M


@triton.jit
def product_gradients(dM, a, b, gates, DIAGONAL: tl.constexpr, BEFORE_DECAY: tl.constexpr, s: tl.constexpr):
    """The gradients da, db and dG of Σ dM ⊙ products(a, b), and dG_a: with BEFORE_DECAY the part of dG through a.

    da and db are [C, ·]. dG and dG_a are [C, ·] too, or for a gate per head [C, 1], summed over these features. A pair
    (i, j) adds to dG_i what it subtracts from dG_j, with a and b rounded as in the products. The gradient of a gate is
    a sum over dG, in which pairs that lie on one side of the gate therefore cancel to the last digits of ACC.
    """
    C: tl.constexpr = s.C
    dM = tl.where(visible(C, DIAGONAL), dM, 0.0)
    if s.DECAY == 2:
        dG_a = tl.zeros_like(a)
        da = tl.zeros_like(a)
        db = tl.zeros_like(a)
        dG = tl.zeros_like(a)
        for level in tl.range(log2(C), num_stages=1, disable_licm=True):
            after, before, together = half_block_decays(gates, 1 << level, BEFORE_DECAY, s)
            near = tl.where(together, dM, 0.0)
            a_seen = (a * after).to(s.DOT)
            b_seen = (b * before).to(s.DOT)
            da_seen = dot(near, b_seen, s.DOT, s.ACC)
            db_seen = dot(tl.trans(near), a_seen, s.DOT, s.ACC)
            da += after * da_seen
            db += before * db_seen
            dG += a_seen.to(s.ACC) * da_seen - b_seen.to(s.ACC) * db_seen
            if BEFORE_DECAY:
                dG_a += a_seen.to(s.ACC) * da_seen
        if DIAGONAL:
            i = tl.arange(0, C)
            own = tl.sum(tl.where(i[:, None] == i[None, :], dM, 0.0), 1)[:, None]
            da += own * b
            db += own * a
    else:
        dG = tl.zeros([C, 1], s.ACC)
        dG_a = dG
        if s.DECAY == 1:
            dM *= decays_between(gates, BEFORE_DECAY, s)
            pairs = dM * dot(a, tl.trans(b), s.DOT, s.ACC)  # dM is not yet rounded as an operand
            dG_a = tl.sum(pairs, 1)[:, None]
            dG = dG_a - tl.sum(pairs, 0)[:, None]
        da = dot(dM, b, s.DOT, s.ACC)
        db = dot(tl.trans(dM), a, s.DOT, s.ACC)
    return da, db, dG, dG_a


# ---- the inverse ----


@triton.jit
def substitution(A, ACC: tl.constexpr):
    """(I + A)⁻¹ of each strictly lower triangular matrix of A [B, C, C], row by row."""
    C: tl.constexpr = A.shape[1]
    row = tl.arange(0, C)[None, :, None]
    X = (row == tl.arange(0, C)[None, None, :]).to(ACC) + tl.zeros_like(A)
    for r in range(1, C):
        weights = tl.sum(tl.where(row == r, A, 0.0), 1)  # [B, C]
        known = tl.sum(weights[:, :, None] * X, 1)  # [B, C]
        X = tl.where(row == r, X - known[:, None, :], X)
    return X


@triton.jit
def inverse(A, ACC: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [C, C], C ≤ 64, in ACC.

    It is exact up to rounding however alike the keys are, which a power series is not. Above 32 rows it is
    [[X, 0], [−Y A₂₁ X, Y]] with the inverses X and Y of the diagonal blocks.
    """
    C: tl.constexpr = A.shape[0]
    if C <= 32:
        X = tl.reshape(substitution(tl.reshape(A, [1, C, C]), ACC), [C, C])
    else:
        HALF: tl.constexpr = C // 2
        upper, lower = tl.split(tl.permute(tl.reshape(A, [2, HALF, 2, HALF]), (1, 3, 2, 0)))  # [HALF, HALF, 2]
        A11, _ = tl.split(upper)
        A21, A22 = tl.split(lower)
        both = substitution(tl.permute(tl.join(A11, A22), (2, 0, 1)), ACC)
        X11, X22 = tl.split(tl.permute(both, (1, 2, 0)))
        X21 = -dot(dot(X22, A21, ACC, ACC), X11, ACC, ACC)
        parts = tl.join(tl.join(X11, tl.zeros_like(X11)), tl.join(X21, X22))  # [HALF, HALF, column half, row half]
        X = tl.reshape(tl.permute(parts, (3, 0, 2, 1)), [C, C])
    return X
