"""The device functions that the kernels are made of.

Letters: C tokens in a chunk, K key and V value features. A tensor [B, T, H, D] with neighbouring features travels as a
tuple (pointer, stride of B, of T, of H), one number a head as D = 1. DECAY is 0 without decay, 1 for one a head
(tiles [C, 1]), 2 for one a key channel (tiles [C, K]). DOT is the dtype in which matrix products take their operands,
ACC that of everything else.

A decay between two tokens is the sum of the gates between them, never a difference of two longer sums, and is ≤ 0
before the exponential: so nothing overflows, −1e4 costs no digits and −inf is an exact reset.
"""

import triton
import triton.language as tl


@triton.jit
def load(x, n, t, h, seen, d, D: tl.constexpr):
    """Rows t [C], features d of head h: [C, len(d)] in the tensor's dtype, 0 where not seen [C] and beyond D."""
    at = x[0] + n * x[1] + t[:, None] * x[2] + h * x[3] + d[None, :]
    return tl.load(at, mask=seen[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store(x, n, t, h, seen, d, D: tl.constexpr, value):
    """The reverse of `load`."""
    at = x[0] + n * x[1] + t[:, None] * x[2] + h * x[3] + d[None, :]
    tl.store(at, value.to(x[0].dtype.element_ty), mask=seen[:, None] & (d[None, :] < D))


@triton.jit
def state_at(p_S, index, dk, dv, K: tl.constexpr, V: tl.constexpr):
    """Pointers to a block of matrix `index` of a contiguous [..., K, V]."""
    return p_S + index * K * V + dk[:, None] * V + dv[None, :]


@triton.jit
def state_mask(dk, dv, K: tl.constexpr, V: tl.constexpr):
    return (dk[:, None] < K) & (dv[None, :] < V)


@triton.jit
def span(p_cu, n, T):
    """First token and length of sequence n. Without packing it is row n of the batch, all T tokens of it."""
    if p_cu is None:
        first = n * 0
        length = first + T
    else:
        first = tl.load(p_cu + n).to(tl.int64)
        length = tl.load(p_cu + n + 1).to(tl.int64) - first
    return first, length


@triton.jit
def chunk_of(slot, p_cu, p_slots, p_owners, NC):
    """Sequence n and chunk c that the chunk slot `slot` stands for. Slots to spare lie behind their sequence's end."""
    if p_cu is None:
        n = slot // NC
        c = slot % NC
    else:
        n = tl.load(p_owners + slot).to(tl.int64)
        c = slot - tl.load(p_slots + n)
    return n, c


@triton.jit
def first_slot(n, p_cu, p_slots, NC):
    """The chunk slot of the first chunk of sequence n."""
    if p_cu is None:
        slot = n * NC
    else:
        slot = tl.load(p_slots + n)
    return slot


@triton.jit
def dot(a, b, DOT: tl.constexpr, ACC: tl.constexpr):
    """a b, the operands rounded to DOT, summed in ACC. float32 operands stay float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee", out_dtype=ACC)


# Gates. g [C, D] are those of the chunk's tokens; g_reader those that a reader sees, which are g, or with LAG (read
# "before") the gate of the token before it; g_next is the gate of the token after. All are 0 outside the chunk.


@triton.jit
def load_gates(g, n, t, h, i, end, d, D: tl.constexpr, LAG: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """g, g_reader, g_next [C, len(d)]; t [C] are the rows, i = 0 … C − 1, end the sequence's."""
    b_g = load(g, n, t, h, t < end, d, D).to(ACC)
    b_next = load(g, n, t + 1, h, (i + 1 < C) & (t + 1 < end), d, D).to(ACC)
    if LAG:
        b_reader = load(g, n, t - 1, h, (i > 0) & (t < end), d, D).to(ACC)
    else:
        b_reader = b_g
    return b_g, b_reader, b_next


@triton.jit
def running_sum(x, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Running sums along the rows of x [C, D], starting anew every BLOCK rows."""
    C: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    return tl.reshape(tl.cumsum(tl.reshape(x, [C // BLOCK, BLOCK, D]), 1, reverse=REVERSE), [C, D])


@triton.jit
def since(g_reader, BLOCK: tl.constexpr, LAG: tl.constexpr):
    """exp of the sum of gates from the start of a token's block of BLOCK rows to the token. [C, D]"""
    if LAG:
        i = tl.arange(0, g_reader.shape[0])
        g_reader = tl.where((i % BLOCK > 0)[:, None], g_reader, 0.0)
    return tl.exp(running_sum(g_reader, BLOCK, False))


@triton.jit
def until(g_next, BLOCK: tl.constexpr):
    """exp of the sum of gates after a token to the end of its block of BLOCK rows. [C, D]"""
    i = tl.arange(0, g_next.shape[0])
    return tl.exp(running_sum(tl.where(((i + 1) % BLOCK > 0)[:, None], g_next, 0.0), BLOCK, True))


# Products of pairs of tokens: M_ij = Σ_d a_id b_jd exp(Σ g_sd over j < s ≤ i, or < i with LAG).
# A decay per channel can't be taken out of the sum over d. But where i and j lie in the later and earlier half of the
# same block of tokens, it is the product of i's decay since the middle and j's until the middle: each pair is in one such
# block of some size 2, 4, …, C, so log2 C masked products make all pairs.


@triton.jit
def visible(C: tl.constexpr, DIAGONAL: tl.constexpr):
    """Which j each i sees: j < i, with DIAGONAL j ≤ i. [C, C]"""
    i = tl.arange(0, C)
    if DIAGONAL:
        return i[:, None] >= i[None, :]
    else:
        return i[:, None] > i[None, :]


@triton.jit
def halves(g_reader, g_next, HALF: tl.constexpr, LAG: tl.constexpr):
    """For blocks of 2 HALF tokens: decays since the middle [C, D], 0 in the earlier half; decays until the middle, 0 in
    the later half; which pairs share a block [C, C]."""
    i = tl.arange(0, g_reader.shape[0])
    late = ((i // HALF) % 2 == 1)[:, None]
    after = tl.where(late, since(g_reader, HALF, LAG), 0.0)
    before = tl.where(late, 0.0, until(g_next, HALF))
    return after, before, i[:, None] // (2 * HALF) == i[None, :] // (2 * HALF)


@triton.jit
def products_between(a, b, g_reader, g_next, HALF: tl.constexpr, LAG: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    after, before, together = halves(g_reader, g_next, HALF, LAG)
    return tl.where(together, dot(a * after, tl.trans(b * before), DOT, ACC), 0.0)


@triton.jit
def decay_between(g_reader, LAG: tl.constexpr):
    """exp(Σ g_s over j < s ≤ i, or < i with LAG), 1 above the diagonal: g_reader [C, 1] → [C, C]."""
    i = tl.arange(0, g_reader.shape[0])
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :] + LAG, g_reader, 0.0), 0))


@triton.jit
def products(
    a,
    b,
    g_reader,
    g_next,
    DIAGONAL: tl.constexpr,
    LAG: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """M [C, C] for a, b [C, K], 0 where not visible."""
    C: tl.constexpr = a.shape[0]
    a = a.to(ACC) if DECAY == 2 else a
    b = b.to(ACC) if DECAY == 2 else b
    if DECAY == 2:
        M = tl.zeros([C, C], ACC)
        for level in tl.static_range(6):
            if (1 << level) < C:
                M += products_between(a, b, g_reader, g_next, 1 << level, LAG, DOT, ACC)
        if DIAGONAL:
            i = tl.arange(0, C)
            M = tl.where(i[:, None] == i[None, :], tl.sum(a * b, 1)[:, None], M)
    else:
        M = dot(a, tl.trans(b), DOT, ACC)
        if DECAY == 1:
            M *= decay_between(g_reader, LAG)
        M = tl.where(visible(C, DIAGONAL), M, 0.0)
    return M


@triton.jit
def from_start(da, BLOCK: tl.constexpr, LAG: tl.constexpr):
    """Gradient of the gates where rows decayed since their block's start; da = a ⊙ ∂a. Gate s is on the way of all
    i ≥ s (with LAG i > s)."""
    dg = running_sum(da, BLOCK, True)
    if LAG:
        dg -= da
    return dg


@triton.jit
def to_end(db, BLOCK: tl.constexpr):
    """Gradient of the gates where rows decayed until their block's end; db = b ⊙ ∂b. Gate s is on the way of all j < s."""
    return running_sum(db, BLOCK, False) - db


@triton.jit
def gradients_between(
    dM, a, b, g_reader, g_next, HALF: tl.constexpr, LAG: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr
):
    after, before, together = halves(g_reader, g_next, HALF, LAG)
    dM = tl.where(together, dM, 0.0)
    da = after * dot(dM, b * before, DOT, ACC)
    db = before * dot(tl.trans(dM), a * after, DOT, ACC)
    return da, db, from_start(a * da, HALF, LAG) + to_end(b * db, HALF)


@triton.jit
def product_gradients(
    dM,
    a,
    b,
    g_reader,
    g_next,
    DIAGONAL: tl.constexpr,
    LAG: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of Σ dM ⊙ products(a, b): for a and b [C, K], for g [C, K] or [C, 1] (0 without decay).

    a and b may be some of the features: the gradient of one gate a head is then that part's share.
    """
    C: tl.constexpr = a.shape[0]
    i = tl.arange(0, C)
    dM = tl.where(visible(C, DIAGONAL), dM, 0.0)
    if DECAY == 2:
        da = tl.zeros_like(a)
        db = tl.zeros_like(b)
        dg = tl.zeros_like(a)
        for level in tl.static_range(6):
            if (1 << level) < C:
                da_l, db_l, dg_l = gradients_between(dM, a, b, g_reader, g_next, 1 << level, LAG, DOT, ACC)
                da += da_l
                db += db_l
                dg += dg_l
        if DIAGONAL:
            own = tl.sum(tl.where(i[:, None] == i[None, :], dM, 0.0), 1)[:, None]
            da += own * b
            db += own * a
    else:
        dg = tl.zeros([C, 1], ACC)
        if DECAY == 1:
            dM *= decay_between(g_reader, LAG)
            strict = i[:, None] > i[None, :]
            through = tl.where(strict, dM * dot(a, tl.trans(b), DOT, ACC), 0.0)
            onwards = tl.cumsum(through, 0, reverse=True)  # [s, j]: pairs (i, j) with i ≥ s
            if LAG:
                onwards -= through
            dg += tl.sum(tl.where(strict, onwards, 0.0), 1)[:, None]
        da = dot(dM, b, DOT, ACC)
        db = dot(tl.trans(dM), a, DOT, ACC)
    return da, db, dg


# (I + A)⁻¹ for a strictly lower A: substitution in blocks of 16, then [[X, 0], [Z, Y]] with Z = −Y A₂₁ X.


@triton.jit
def joined(X, A, HALF: tl.constexpr, ACC: tl.constexpr):
    """From the inverses of the diagonal blocks of HALF rows to those of 2 HALF rows."""
    i = tl.arange(0, A.shape[0])
    late = (i // HALF) % 2 == 1
    together = i[:, None] // (2 * HALF) == i[None, :] // (2 * HALF)
    corner = tl.where(together & late[:, None] & (late[None, :] == 0), A, 0.0)
    return X - dot(dot(X, corner, ACC, ACC), X, ACC, ACC)


@triton.jit
def inverse(A, ACC: tl.constexpr):
    """(I + A)⁻¹ [C, C], exact up to rounding in ACC however alike the keys are (a power series is not)."""
    C: tl.constexpr = A.shape[0]
    BLOCK: tl.constexpr = 16 if C > 16 else C
    NB: tl.constexpr = C // BLOCK
    i = tl.arange(0, C)
    near = i[:, None] // BLOCK == i[None, :] // BLOCK
    r = tl.arange(0, BLOCK)[None, :, None]
    blocks = tl.sum(tl.reshape(tl.where(near, A, 0.0), [NB, BLOCK, NB, BLOCK]), 2)  # [NB, BLOCK, BLOCK]
    unit = (r == tl.arange(0, BLOCK)[None, None, :]).to(ACC)
    X = unit + tl.zeros_like(blocks)
    for row in range(1, BLOCK):
        weights = tl.sum(tl.where(r == row, blocks, 0.0), 1)  # [NB, BLOCK]
        known = tl.sum(weights[:, :, None] * X, 1)  # [NB, BLOCK]
        X = tl.where(r == row, X - known[:, None, :], X)
    wide = tl.broadcast_to(X[:, :, None, :], [NB, BLOCK, NB, BLOCK])
    X = tl.where(near, tl.reshape(wide, [C, C]), 0.0)
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            X = joined(X, A, 1 << level, ACC)
    return X
