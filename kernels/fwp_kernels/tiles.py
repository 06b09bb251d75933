"""The device functions that the kernels are made of.

Letters: C tokens in a chunk, K key and V value features. A tensor [B, T, H, D] with neighbouring features travels as a
tuple (pointer, stride of B, of T, of H), one number a head as D = 1; the tokens of a chunk as `rows`, its decays as
`gates`. DECAY is 0 without decay, 1 for one a head (tiles [C, 1]), 2 for one a key channel (tiles [C, K]), KG then 1 or
K. DOT is the dtype in which matrix products take their operands, ACC that of everything else.

Gates are summed within chunks, from a floor whose exponential is 0 (an exact reset, −inf too), and every exponent is
≤ 0: so nothing overflows, and a gate of −1e4 costs the decays after it few digits.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def rows_from(n, start, end, C: tl.constexpr):
    """Rows: batch row, C tokens from `start`, and which of them there are [C]."""
    t = start + tl.arange(0, C)
    return n, t, t < end


@triton.jit
def readers(rows, WRITES: tl.constexpr, LAG: tl.constexpr):
    """The rows of q, o and P that read at these writes: of WRITES writes after the last, with LAG before the first."""
    if WRITES == 1:
        return rows
    else:
        n, t, seen = rows
        return n, t // WRITES, seen & (t % WRITES == (0 if LAG else WRITES - 1))


@triton.jit
def load(x, rows, h, d, D: tl.constexpr):
    """Features d of head h: [C, len(d)] in the tensor's dtype, 0 where there is no token and beyond D."""
    n, t, seen = rows
    at = x[0] + n * x[1] + t[:, None] * x[2] + h * x[3] + d[None, :]
    return tl.load(at, mask=seen[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def erase_key(a, b_k, rows, h, d, K: tl.constexpr):
    """Features d of the key whose value is erased: a, or the key k that is written to."""
    if a is not None:
        return load(a, rows, h, d, K)
    else:
        return b_k


@triton.jit
def strength(e, rows, h, ACC: tl.constexpr):
    """The strength of each token [C, 1] in ACC, 1 if e is None."""
    if e is not None:
        return load(e, rows, h, tl.arange(0, 1), 1).to(ACC)
    else:
        return tl.full([rows[1].shape[0], 1], 1.0, ACC)


@triton.jit
def store(x, rows, h, d, D: tl.constexpr, value):
    """The reverse of `load`."""
    n, t, seen = rows
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
def state_block(H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Sequence, head and V block of a program, one of each, the features dk and columns dv of its part of S [K, V], and
    which of that exists."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    dk = tl.arange(0, BK)
    dv = pid % NV * BV + tl.arange(0, BV)
    return pid // NV // H, pid // NV % H, pid % NV, dk, dv, state_mask(dk, dv, K, V)


@triton.jit
def load_state(p_S, index, dk, dv, K: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr):
    """A block of matrix `index` in ACC, 0 if p_S is None."""
    S = tl.zeros([dk.shape[0], dv.shape[0]], ACC)
    if p_S is not None:
        S += tl.load(state_at(p_S, index, dk, dv, K, V), mask=state_mask(dk, dv, K, V), other=0.0).to(ACC)
    return S


@triton.jit
def load_sum(p_z, index, dk, K: tl.constexpr, ACC: tl.constexpr):
    """Features of vector `index` of a contiguous [..., K], [1, len(dk)], 0 if p_z is None."""
    z = tl.zeros([1, dk.shape[0]], ACC)
    if p_z is not None:
        z += tl.load(row_at(p_z, index, dk, K), mask=(dk < K)[None, :], other=0.0)
    return z


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
def segment_of(s, p_cu, T, NS, CS, C: tl.constexpr):
    """Batch row, first chunk in it, first token and length of segment s: CS chunks of a sequence, or a whole one.

    Without packing a row has NS segments. Packed, segments are the sequences whose borders are p_cu.
    """
    if p_cu is None:
        n = s // NS
        c = s % NS * CS
        first = c * C
        length = tl.minimum(T - first, CS * C)
    else:
        n = s
        c = s * 0
        first, length = span(p_cu, s, T)
    return n, c, first, length


@triton.jit
def kept_at(p_slots, n, c, NC, APART: tl.constexpr):
    """Where a state is kept that chunk c of sequence n shares with the APART chunks around it, from a multiple on.

    Rounded up, sequence by sequence, so that no two share one: ⌈(slots before + n (APART − 1)) / APART⌉ are before it.
    """
    if p_slots is None:
        before = n * NC
    else:
        before = tl.load(p_slots + n)
    return (before + (n + 1) * (APART - 1)) // APART + c // APART


@triton.jit
def dot(a, b, DOT: tl.constexpr, ACC: tl.constexpr):
    """a b, the operands rounded to DOT, summed in ACC. float32 operands stay float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="ieee", out_dtype=ACC)


# Decays. `gates` is a tuple (G, n, h, start, end, d): G [B, T, H, KG] is the running sum of the gates from the start of
# a token's chunk, here the one that starts at `start`, and d are the features of G that are wanted. Rows beyond the
# sequence's end repeat its last one, so that no exponent is ever positive.


@triton.jit
def load_sums(gates, i, KG: tl.constexpr, LAG: tl.constexpr):
    """G of tokens start + i of the chunk; with LAG of the tokens before them, 0 at the start."""
    G, n, h, start, end, d = gates
    t = tl.minimum(start + i - LAG, end - 1)
    return load(G, (n, t, t >= start), h, d, KG)


@triton.jit
def load_last(gates, KG: tl.constexpr, C: tl.constexpr):
    """G of the chunk's last token, [1, ·]."""
    return load_sums(gates, C - 1 + tl.arange(0, 1), KG, False)


@triton.jit
def from_start(x, gates, KG: tl.constexpr, LAG: tl.constexpr):
    """x [C, ·] decayed from the chunk's start to each token."""
    x = x.to(gates[0][0].dtype.element_ty)
    return x * tl.exp(load_sums(gates, tl.arange(0, x.shape[0]), KG, LAG))


@triton.jit
def to_end(x, gates, KG: tl.constexpr):
    """x [C, ·] decayed from each token to the chunk's end."""
    last = load_last(gates, KG, x.shape[0])
    return x.to(last.dtype) * tl.exp(last - load_sums(gates, tl.arange(0, x.shape[0]), KG, False))


@triton.jit
def through(S, gates, KG: tl.constexpr, C: tl.constexpr):
    """S [K, ·] decayed from the chunk's start to its end."""
    return S * tl.trans(tl.exp(load_last(gates, KG, C)))


@triton.jit
def decayed(x, gates, KG: tl.constexpr, LAG: tl.constexpr, END: tl.constexpr):
    """x [C, ·] decayed from the chunk's start to each token, or with END from each token to the chunk's end."""
    if END:
        return to_end(x, gates, KG)
    else:
        return from_start(x, gates, KG, LAG)


@triton.jit
def read_state(
    x,
    S,
    gates,
    KG: tl.constexpr,
    LAG: tl.constexpr,
    END: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """decayed(x) S for x [C, K]. One gate a head scales the product's rows, so that x goes into it as it was loaded."""
    if DECAY == 2:
        y = dot(decayed(x, gates, KG, LAG, END), S, DOT, ACC)
    else:
        y = dot(x, S, DOT, ACC)
        if DECAY == 1:
            y = decayed(y, gates, KG, LAG, END)
    return y


@triton.jit
def write_state(
    x,
    y,
    gates,
    KG: tl.constexpr,
    LAG: tl.constexpr,
    END: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """decayed(x)ᵀ y for x [C, K] and y [C, V]. One gate a head scales the rows of y."""
    if DECAY == 2:
        x = decayed(x, gates, KG, LAG, END)
    elif DECAY == 1:
        y = decayed(y, gates, KG, LAG, END)
    return dot(tl.trans(x), y, DOT, ACC)


# The denominator: z is a column of S, of value 1, that nothing erases and no strength weighs. A row [1, K] in ACC, it
# is read and written by sums, since a matrix product takes 16 columns at least.


@triton.jit
def row_at(p_z, index, d, K: tl.constexpr):
    """Pointers to features d of vector `index` of a contiguous [..., K], as a row [1, len(d)]."""
    return p_z + index * K + d[None, :]


@triton.jit
def read_sum(x, z, gates, KG: tl.constexpr, LAG: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr):
    """`read_state` of z from the chunk's start: [C, 1]."""
    if DECAY == 2:
        x = from_start(x, gates, KG, LAG)
    y = tl.sum(x.to(ACC) * z, 1)[:, None]
    if DECAY == 1:
        y = from_start(y, gates, KG, LAG)
    return y


@triton.jit
def write_sum(
    x, y, gates, KG: tl.constexpr, LAG: tl.constexpr, END: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr
):
    """`write_state` of y [C, 1] to z: [1, K]."""
    if DECAY == 2:
        x = decayed(x, gates, KG, LAG, END)
    elif DECAY == 1:
        y = decayed(y, gates, KG, LAG, END)
    return tl.sum(x.to(ACC) * y, 0)[None, :]


@triton.jit
def quotient(x, den):
    """x / den, 0 where den is 0. The reciprocal of a small den would overflow."""
    return tl.where(den == 0, 0.0, x / tl.where(den == 0, 1.0, den))


# Products of pairs of tokens: M_ij = Σ_d a_id b_jd exp(G_i − G_j)_d, with LAG (read "before") exp(G_{i−1} − G_j)_d.
# A decay per channel can't be taken out of the sum over d. But where i and j lie in the later and earlier half of the
# same block of tokens, it is the product of i's decay since the middle and j's until the middle: each pair is in one
# such block of some size 2, 4, …, C, so log2 C masked products make all pairs.


@triton.jit
def visible(C: tl.constexpr, DIAGONAL: tl.constexpr):
    """Which j each i sees: j < i, with DIAGONAL j ≤ i. [C, C]"""
    i = tl.arange(0, C)
    if DIAGONAL:
        return i[:, None] >= i[None, :]
    else:
        return i[:, None] > i[None, :]


@triton.jit
def halves(gates, KG: tl.constexpr, half, LAG: tl.constexpr, C: tl.constexpr):
    """For blocks of 2 half tokens, the decays since the middle [C, len(d)], 0 in the earlier half, those until the
    middle, 0 in the later half, and which pairs share a block [C, C]."""
    i = tl.arange(0, C)
    middle = load_sums(gates, i // (2 * half) * (2 * half) + half - 1, KG, False)
    late = ((i // half) % 2 == 1)[:, None]
    # masked before the exponential, where exponents would be positive
    after = tl.exp(tl.where(late, load_sums(gates, i, KG, LAG) - middle, -float("inf")))
    before = tl.exp(tl.where(late, -float("inf"), middle - load_sums(gates, i, KG, False)))
    return after, before, i[:, None] // (2 * half) == i[None, :] // (2 * half)


@triton.jit
def decays_between(gates, LAG: tl.constexpr, C: tl.constexpr):
    """exp(G_i − G_j) for one gate a head, 1 above the diagonal: [C, C]."""
    i = tl.arange(0, C)
    reader = load_sums(gates, i, 1, LAG)
    writer = load_sums(gates, i, 1, False)
    return tl.exp(tl.where(i[:, None] > i[None, :], reader - tl.trans(writer), 0.0))


@triton.jit
def products_between(a, b, gates, KG: tl.constexpr, half, LAG: tl.constexpr, DOT: tl.constexpr):
    after, before, together = halves(gates, KG, half, LAG, a.shape[0])
    return tl.where(together, dot(a * after, tl.trans(b * before), DOT, after.dtype), 0.0)


@triton.jit
def products(
    a,
    b,
    gates,
    KG: tl.constexpr,
    DIAGONAL: tl.constexpr,
    LAG: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """M [C, C] for some features of a and b [C, ·], 0 where not visible."""
    C: tl.constexpr = a.shape[0]
    if DECAY == 2:
        M = tl.zeros([C, C], ACC)
        a = a.to(ACC)
        b = b.to(ACC)
        for level in tl.range(log2(C), num_stages=1, disable_licm=True):
            M += products_between(a, b, gates, KG, 1 << level, LAG, DOT)
        if DIAGONAL:
            i = tl.arange(0, C)
            M = tl.where(i[:, None] == i[None, :], tl.sum(a * b, 1)[:, None], M)
    else:
        M = dot(a, tl.trans(b), DOT, ACC)
        if DECAY == 1:
            M *= decays_between(gates, LAG, C)
        M = tl.where(visible(C, DIAGONAL), M, 0.0)
    return M


@triton.jit
def product_gradients(
    dM,
    a,
    b,
    gates,
    KG: tl.constexpr,
    DIAGONAL: tl.constexpr,
    LAG: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of Σ dM ⊙ products(a, b): for a and b [C, ·], for G, and with LAG how much of the last is a's:
    [C, ·], or [C, 1] for one gate a head, those features' share.

    A pair (i, j) adds to that of G_i what it takes from that of G_j, with a and b as the products see them, rounded: so
    in the gradient of a gate, a sum over G, pairs that lie on one side of it cancel to the last digits of ACC.
    """
    C: tl.constexpr = a.shape[0]
    dM = tl.where(visible(C, DIAGONAL), dM, 0.0)
    if DECAY == 2:
        lagging = tl.zeros_like(a)
        da = tl.zeros_like(a)
        db = tl.zeros_like(a)
        dG = tl.zeros_like(a)
        for level in tl.range(log2(C), num_stages=1, disable_licm=True):
            after, before, together = halves(gates, KG, 1 << level, LAG, C)
            near = tl.where(together, dM, 0.0)
            a_seen = (a * after).to(DOT)
            b_seen = (b * before).to(DOT)
            da_seen = dot(near, b_seen, DOT, ACC)
            db_seen = dot(tl.trans(near), a_seen, DOT, ACC)
            da += after * da_seen
            db += before * db_seen
            dG += a_seen.to(ACC) * da_seen - b_seen.to(ACC) * db_seen
            if LAG:
                lagging += a_seen.to(ACC) * da_seen
        if DIAGONAL:
            i = tl.arange(0, C)
            own = tl.sum(tl.where(i[:, None] == i[None, :], dM, 0.0), 1)[:, None]
            da += own * b
            db += own * a
    else:
        dG = tl.zeros([C, 1], ACC)
        lagging = dG
        if DECAY == 1:
            dM *= decays_between(gates, LAG, C)
            pairs = dM * dot(a, tl.trans(b), DOT, ACC)  # before dM is rounded as an operand
            lagging = tl.sum(pairs, 1)[:, None]
            dG = lagging - tl.sum(pairs, 0)[:, None]
        da = dot(dM, b, DOT, ACC)
        db = dot(tl.trans(dM), a, DOT, ACC)
    return da, db, dG, lagging


@triton.jit
def substitution(A, ACC: tl.constexpr):
    """(I + A)⁻¹ of each of the strictly lower A [B, C, C], row by row."""
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
    """(I + A)⁻¹ of a strictly lower A [C, C], C ≤ 64, in ACC: exact up to rounding however alike the keys are.

    A power series is not. Beyond 32 rows by [[X, 0], [−Y A₂₁ X, Y]] from the inverses X and Y of the halves.
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
