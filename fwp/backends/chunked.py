"""The recurrence as chunked matrix products in plain torch, on any device, differentiable any number of times.

G is the running sum of g within a chunk of C writes. G^q is the reader's sum: G after its token's last write, or with
read "before" G ahead of the first. G^a is the eraser's sum: G, or with erase_before_decay G of the write before::

    A_ij = e_i a_iᵀ exp(G^a_i − G_j) k_j  for j < i        P_ij = q_iᵀ exp(G^q_i − G_j) k_j  for each j that i sees
    (I + A) X = w V − (e a ⊙ exp G^a) S₀
    O = (q ⊙ exp G^q) S₀ + P X                             S = exp(G_C) S₀ + (exp(G_C − G) ⊙ k)ᵀ X

No exponent is ever positive, since the mask comes before the exponential. In eager mode autograd differentiates the
forward. Under torch.compile forward and backward are two opaque ops: a Python loop over chunks would be unrolled
and recompiled for every length. The gradient of a chunk is written out for these ops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

from fwp.core import (
    Core,
    Form,
    Read,
    State,
    check_bounds,
    denominators,
    opaque,
    ratio,
    refuse_forward_derivatives,
    to_heads,
    without_autocast,
)
from fwp.feature_maps import applied

CHUNK = 64


def refuses(core: Core, form: Form) -> str | None:
    """Why these inputs can't be served, or None."""
    return None


def run(core: Core, form: Form, chunk: int = CHUNK) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V] in the state's dtype, and the final state."""
    core, V = _with_z(applied(core)), core.v.shape[-1]
    if core.causal or core.cu_seqlens is not None or form == "recurrent":
        walk = _opaque_walk if opaque() else _walk
    else:
        walk = _at_once
    with without_autocast(core.q):
        out, S = walk(core, 1 if form == "recurrent" else chunk)
        if not core.denominator:
            return out, State(S)
        return _normalised(out, core.eps), State(S[..., :V], S[..., V])


def read(core: Core) -> Tensor:
    """o [B, T, max(Hq, H), V] in the state's dtype: the queries read the initial state. k and v don't matter."""
    if core.cu_seqlens is not None and opaque():
        return run(core, "chunk")[0]
    core = _with_z(core)
    assert core.S is not None
    layout = Layout(core, max(core.q.shape[1], 1), 1)
    with without_autocast(core.q):
        S = layout.sort(core.S)
        outs = [q @ S[: len(q)].unsqueeze(2) for q in layout.split(core.q)]
        out = layout.join(outs, core.q[..., :1].expand(*core.q.shape[:3], S.shape[-1]))
        return _normalised(out, core.eps) if core.denominator else out


def _with_z(core: Core) -> Core:
    """The core with k and v repeated to the state heads, and with S. z becomes one more column of S, never erased."""
    H = core.heads
    S, z = core.initial()
    if z is not None:
        S = torch.cat([S, z.unsqueeze(-1)], -1)
    return replace(core, q=to_heads(core.q, max(core.q.shape[2], H)), k=to_heads(core.k, H), v=to_heads(core.v, H), S=S)


def _normalised(out: Tensor, eps: float) -> Tensor:
    """Sᵀq / (zᵀq + eps), 0 where zᵀq = 0. out holds Sᵀq and zᵀq side by side."""
    out, found = out.split([out.shape[-1] - 1, 1], -1)
    return ratio(out, denominators(found, eps))


# What a step of the walk gets. Dimensions [N, H, r, C, ·]: sequences, state heads, query heads per state head, tokens.


class Inputs(NamedTuple):
    """The tensors with a T axis, of a whole call or of a piece of it. None means what it means in `fwp.core.Core`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    a: Tensor | None
    e: Tensor | None
    w: Tensor | None


class Options(NamedTuple):
    """How the recurrence runs: fields of `fwp.core.Core`."""

    read: Read
    causal: bool
    writes: int
    erase_before_decay: bool


@dataclass(frozen=True)
class Piece:
    """C consecutive writes of N sequences and their reads, in the state's dtype. A per-head gate has 1 feature."""

    q: Tensor  # [N, H, r, C / n, K]
    k: Tensor  # [N, H, 1, C, K]
    v: Tensor  # [N, H, 1, C, V]
    g: Tensor | None  # [N, H, 1, C, 1 or K]
    a: Tensor | None  # [N, H, 1, C, K]
    e: Tensor | None  # [N, H, 1, C, 1]
    w: Tensor | None  # [N, H, 1, C, 1]

    @property
    def eraser(self) -> Tensor | None:
        """e a [N, H, 1, C, K]: what a token erases along; None: nothing is erased."""
        key = self.k if self.a is None else self.a
        if self.e is not None:
            return self.e * key
        return self.a


def _rows(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """[N, C, H·r, D] → [N, H, r, C, D] in the state's dtype. [N, C, H] counts as D = 1."""
    x = x if x.dim() == 4 else x.unsqueeze(-1)
    return x.to(dtype).unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4)


def _tokens(x: Tensor) -> Tensor:
    """The inverse: [N, H, r, C, D] → [N, C, H·r, D]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


class Layout:
    """Cuts a T axis into pieces of at most `chunk` tokens of one sequence, and puts results together again.

    tokens: the number of tokens on this axis per token of q: 1 for q itself, `writes` for k, v and the gates.

    Packed sequences are walked in parallel, longest first, so that those not yet ended are always a prefix. All tokens
    are gathered once and then split. Indexing inside the loop would cost the backward a pass over all of T per piece.
    """

    def __init__(self, core: Core, chunk: int, tokens: int) -> None:
        self.T, self.H, self.dtype, self.chunk = core.q.shape[1] * tokens, core.heads, core.dtype, chunk
        self.packed = core.cu_seqlens is not None
        if core.cu_seqlens is None:
            return
        bounds = core.cu_seqlens.to("cpu", torch.long) * tokens
        lengths = bounds.diff()
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = bounds[:-1][order], lengths[order]
        steps = []  # [N, C] each: indices of tokens. T, the index of a row of zeros, stands for no token
        for t in range(0, int(lengths.max()) if len(lengths) else 0, chunk):
            left = lengths[lengths > t] - t
            at = torch.arange(min(chunk, int(left[0])), device="cpu")
            steps.append(torch.where(at < left[:, None], starts[: len(left), None] + t + at, self.T))
        self.shapes = [step.shape for step in steps]
        rows = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *(step.flatten() for step in steps)])
        real, device = (rows < self.T).nonzero().squeeze(1), core.k.device
        back = torch.full((self.T,), len(rows), device="cpu")  # the index of a row of zeros, for no sequence's tokens
        back[rows[real]] = real
        self.rows, self.back = rows.to(device), back.to(device)
        self.order, self.unorder = order.to(device), order.argsort().to(device)

    def sort(self, S: Tensor) -> Tensor:
        """The sequences' states, longest sequence first."""
        return S[self.order] if self.packed else S

    def unsort(self, S: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return S[self.unorder] if self.packed else S

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, T, H·r, D] → [N, H, r, C, D] for every step. [B, T, H] counts as D = 1."""
        x = x if x.dim() == 4 else x.unsqueeze(-1)
        if self.packed:
            x = torch.cat([x[0], torch.zeros_like(x[0, :1])])[self.rows]
            sizes = [n * c for n, c in self.shapes]
            parts = [part.unflatten(0, shape) for part, shape in zip(x.split(sizes), self.shapes)]
        else:
            parts = list(x.split(self.chunk, 1)) if self.T else []
        return [_rows(part, self.H, self.dtype) for part in parts]

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `split`, [B, T, H·r, D]. Without tokens it is zeros of the shape of `like`."""
        if not parts:
            return like.new_zeros(like.shape, dtype=self.dtype)
        parts = [_tokens(part) for part in parts]
        if not self.packed:
            return torch.cat(parts, 1)
        zeros = torch.zeros_like(parts[0][0, :1])
        return torch.cat([*(part.flatten(0, 1) for part in parts), zeros])[self.back].unsqueeze(0)


def _cut(core: Core, chunk: int) -> tuple[Layout, Layout, list[Piece]]:
    """The layouts of reads and writes, and the pieces: at most `chunk` writes each, but at least those of one read."""
    reads = max(1, chunk // core.writes)
    reading, writing = Layout(core, reads, 1), Layout(core, reads * core.writes, core.writes)
    columns = [None if x is None else (writing if i else reading).split(x) for i, x in enumerate(_inputs(core))]
    steps = range(len(columns[1] or ()))
    pieces = [Piece(*(None if column is None else column[i] for column in columns)) for i in steps]  # type: ignore[arg-type]
    return reading, writing, pieces


def _inputs(core: Core) -> Inputs:
    return Inputs(core.q, core.k, core.v, core.g, core.a, core.e, core.w)


def _walk(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    """Carries the state over all pieces: Sᵀq [B, T, Hq, V] and the final S."""
    assert core.S is not None
    reading, _, pieces = _cut(core, chunk)
    outs, S = _forward(pieces, reading.sort(core.S), core, chunk)
    like = core.q[..., :1].expand(*core.q.shape[:3], core.S.shape[-1])
    return reading.join(outs, like), reading.unsort(S)


def _at_once(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    """`_walk` where every query reads the final state: two products, without chunks."""
    assert core.S is not None
    q, k, v = (_rows(x, core.heads, core.dtype) for x in (core.q, core.k, core.v))
    x = v if core.w is None else _rows(core.w, core.heads, core.dtype) * v
    S = core.S + (k.mT @ _with_one(x, core.S)).squeeze(2)
    return _tokens(q @ S.unsqueeze(2)), S


def _forward(
    pieces: list[Piece], S: Tensor, core: Core, chunk: int, starts: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Outputs [N, H, r, C, V] of each piece and the final state, sequences sorted. `starts` gets the initial states."""
    step, options = _tokens_of_one_read if chunk == 1 else _chunk, _options(core)
    outs, ended = [], []
    for piece in pieces:
        n = len(piece.k)
        if n < len(S):
            ended.append(S[n:])
            S = S[:n]
        if starts is not None:
            starts.append(S)
        out, S = step(piece, S, options)
        outs.append(out)
    if ended:
        S = torch.cat([S, *reversed(ended)])
    if not core.causal:
        outs = [piece.q @ S[: len(piece.k)].unsqueeze(2) for piece in pieces]
    return outs, S


def _options(core: Core) -> Options:
    return Options(core.read, core.causal, core.writes, core.erase_before_decay)


def _tokens_of_one_read(p: Piece, S: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The writes of one read, by the recurrence as `fwp.core` states it."""
    before = S = S.unsqueeze(2)
    values = p.v if p.w is None else p.w * p.v
    V, erasers = values.shape[-1], p.eraser
    for i in range(p.k.shape[-2]):
        token = slice(i, i + 1)
        undecayed = S
        if p.g is not None:
            S = p.g[..., token, :].exp().mT * S
        x = values[..., token, :]
        if erasers is not None:
            x = x - erasers[..., token, :] @ (undecayed if options.erase_before_decay else S)[..., :V]
        S = S + p.k[..., token, :].mT @ _with_one(x, S)
    return p.q @ (S if options.read == "after" else before), S.squeeze(2)


def _with_one(x: Tensor, S: Tensor) -> Tensor:
    """x with one more column of ones, if S has the column of z, which those ones make."""
    return x if x.shape[-1] == S.shape[-1] else torch.cat([x, torch.ones_like(x[..., :1])], -1)


class Pairs:
    """M_ij = Σ_d a_id b_jd exp(Ga_i − Gb_j)_d where visible, else 0, and the two gradients of that product.

    A decay per channel can't be taken out of the sum over d, and exp(Ga_i) exp(−Gb_j) overflows. But let i lie in the
    later half of a block of tokens and j in the earlier half. Then the decay is that from j to the middle times that
    from the middle to i. Each pair lies so in one block of size 2, 4, 8, …, so log₂ C masked products make all pairs.

    a has R rows and b has C. Row i of a stands at write at_i [R] and sees b's rows j < at_i, with `own` also row at_i.
    Ga [N, H, 1, R, 1 or K] and Gb [N, H, 1, C, 1 or K] are the summed log decays of the rows, None without decay.
    """

    def __init__(self, Ga: Tensor | None, Gb: Tensor | None, at: Tensor, C: int, own: bool, dtype: torch.dtype) -> None:
        j = torch.arange(C, device=at.device)
        self.at, self.own, self.C = at, own, C
        self.visible = j <= at[:, None] if own else j < at[:, None]  # [R, C]
        self.factor: Tensor | None = None  # [N, H, 1, R, C]
        # for each block size: the pairs that it makes [R, C], and the decays of a [.., R, K] and b [.., C, K]
        self.levels: list[tuple[Tensor, Tensor, Tensor]] | None = None
        if Ga is None or Gb is None:
            return
        if Ga.shape[-1] == 1:
            self.factor = (Ga - Gb.mT).to(dtype).masked_fill(~self.visible, -torch.inf).exp()
            return
        self.levels = []
        half = 1
        while half < C:
            late, early = at // half % 2 == 1, j // half % 2 == 0
            pairs = late[:, None] & early & ((at // (2 * half))[:, None] == j // (2 * half))
            start, end = (at // half * half - 1).clamp(min=0), (j // half * half + half - 1).clamp(max=C - 1)
            if len(at) == C:  # a row lies in one of the halves and needs only one of the two exponentials
                middle = Gb[..., torch.where(late, start, end), :]
                decay_a = decay_b = torch.where(late[:, None], Ga - middle, middle - Gb).to(dtype).exp()
            else:  # rows of the other half get the exponent 0, and their pairs are masked
                decay_a = (Ga - Gb[..., start, :]).masked_fill(~late[:, None], 0).to(dtype).exp()
                decay_b = (Gb[..., end, :] - Gb).masked_fill(~early[:, None], 0).to(dtype).exp()
            self.levels.append((pairs, decay_a, decay_b))
            half *= 2

    def _decayed(self, M: Tensor) -> Tensor:
        return M.masked_fill(~self.visible, 0) if self.factor is None else M * self.factor

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [N, H, r, R, K], b [N, H, 1, C, K] → M [N, H, r, R, C]."""
        if self.levels is None:
            return self._decayed(a @ b.mT)
        M = a.new_zeros(*a.shape[:-1], self.C)
        if self.own:
            M = M.scatter(-1, self._at(M), (a * b[..., self.at, :]).sum(-1, keepdim=True))
        for pairs, decay_a, decay_b in self.levels:
            M = M + ((a * decay_a) @ (b * decay_b).mT).masked_fill(~pairs, 0)
        return M

    def grad_a(self, M: Tensor, b: Tensor) -> Tensor:
        """The gradient of Σ M ⊙ product(a, b) for a."""
        if self.levels is None:
            return self._decayed(M) @ b
        a = M.new_zeros(*M.shape[:-1], b.shape[-1])
        if self.own:
            a = a + M.gather(-1, self._at(M)) * b[..., self.at, :]
        for pairs, decay_a, decay_b in self.levels:
            a = a + (M.masked_fill(~pairs, 0) @ (b * decay_b)) * decay_a
        return a

    def grad_b(self, M: Tensor, a: Tensor) -> Tensor:
        """The gradient of Σ M ⊙ product(a, b) for b, summed over the r readers."""
        if self.levels is None:
            return (self._decayed(M).mT @ a).sum(2, keepdim=True)
        b = M.new_zeros(*M.shape[:-2], self.C, a.shape[-1])
        if self.own:
            b = b.index_add(-2, self.at, M.gather(-1, self._at(M)) * a)
        for pairs, decay_a, decay_b in self.levels:
            b = b + (M.masked_fill(~pairs, 0).mT @ (a * decay_a)) * decay_b
        return b.sum(2, keepdim=True)

    def _at(self, M: Tensor) -> Tensor:
        """Each row's own write, as an index into M [N, H, r, R, C]."""
        return self.at[:, None].expand(*M.shape[:-1], 1)


@dataclass(frozen=True)
class Decays:
    """The decays of a piece: exponentials [N, H, 1, C or 1, 1 or K], 1 without decay, and the decayed products."""

    A: Pairs  # erasers with writers
    P: Pairs  # readers with writers
    eraser: Tensor | float = 1.0  # exp G^a: from the start of the piece to an eraser
    reader: Tensor | float = 1.0  # exp G^q: from the start of the piece to a reader
    end: Tensor | float = 1.0  # exp(G_C − G): from a write to the end of the piece
    whole: Tensor | float = 1.0  # exp G_C, as [N, H, 1, 1 or K, 1]: over the whole piece, for S

    @staticmethod
    def of_piece(p: Piece, options: Options) -> Decays:
        C, dtype, n, after = p.k.shape[-2], p.k.dtype, options.writes, options.read == "after"
        i = torch.arange(C, device=p.k.device)
        at = i[n - 1 :: n] if after else i[::n]
        if p.g is None:
            return Decays(Pairs(None, None, i, C, False, dtype), Pairs(None, None, at, C, after, dtype))
        # The sums are in float64: differences of float32 sums of gates like −1e4 are off by 1e-3. exp(−800) is 0 in
        # float64, so the floor changes nothing and keeps −inf out of the differences. MPS has no float64.
        g = p.g.clamp(min=-104) if p.g.device.type == "mps" else p.g.double().clamp(min=-800)
        G = g.cumsum(-2)
        earlier = pad(G[..., :-1, :], (0, 0, 1, 0))
        Gq = (G if after else earlier)[..., at, :]
        Ga = earlier if options.erase_before_decay else G
        last = G[..., -1:, :]
        return Decays(
            Pairs(Ga, G, i, C, False, dtype),
            Pairs(Gq, G, at, C, after, dtype),
            Ga.to(dtype).exp(),
            Gq.to(dtype).exp(),
            (last - G).to(dtype).exp(),
            last.to(dtype).exp().mT,
        )


def _chunk(p: Piece, S: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """One piece by the equations at the top of this file: S [N, H, K, V] → outputs [N, H, r, C, V] and S."""
    d, S = Decays.of_piece(p, options), S.unsqueeze(2)
    X, _ = _solve(p, S, d)
    out = (p.q * d.reader) @ S + d.P.product(p.q, p.k) @ X
    return out, (d.whole * S + (p.k * d.end).mT @ X).squeeze(2)


def _solve(p: Piece, S: Tensor, d: Decays) -> tuple[Tensor, Tensor | None]:
    """X [N, H, 1, C, V], what each token writes, and A."""
    X = p.v if p.w is None else p.w * p.v
    A, eraser = None, p.eraser
    if eraser is not None:
        A = d.A.product(eraser, p.k)
        X = solve_triangular(A, X - (eraser * d.eraser) @ S[..., : X.shape[-1]], upper=False, unitriangular=True)
    return _with_one(X, S), A


def _chunk_backward(p: Piece, S: Tensor, options: Options, d_out: Tensor, d_S: Tensor) -> tuple[Inputs, Tensor]:
    """Gradients of a piece's inputs and of the state before it.

    Each feature of q, k and e a is multiplied by exp(±G), so dG is plus or minus the feature times its gradient.
    """
    d, S, d_S = Decays.of_piece(p, options), S.unsqueeze(2), d_S.unsqueeze(2)
    X, A = _solve(p, S, d)
    V = p.v.shape[-1]
    P = d.P.product(p.q, p.k)
    kept = p.k * d.end
    S_end = d.whole * S + kept.mT @ X

    d_P = d_out @ X.mT
    d_X = (P.mT @ d_out).sum(2, keepdim=True) + kept @ d_S
    d_q = (d_out @ S.mT) * d.reader + d.P.grad_a(d_P, p.k)
    d_k = d.P.grad_b(d_P, p.q) + (X @ d_S.mT) * d.end
    d_S0 = d.whole * d_S + ((p.q * d.reader).mT @ d_out).sum(2, keepdim=True)
    d_R, eraser = d_X[..., :V], p.eraser
    d_eraser = d_g = None
    if eraser is not None and A is not None:
        d_R = solve_triangular(A.mT, d_R, upper=True, unitriangular=True)
        d_A = -d_R @ X[..., :V].mT
        d_eraser = d.A.grad_a(d_A, p.k) - (d_R @ S[..., :V].mT) * d.eraser
        d_k = d_k + d.A.grad_b(d_A, eraser)
        d_S0[..., :V] -= (eraser * d.eraser).mT @ d_R
    if p.g is not None:
        d_G, earlier = -p.k * d_k, torch.zeros_like(p.k)
        if eraser is not None and d_eraser is not None:
            (earlier if options.erase_before_decay else d_G).add_(eraser * d_eraser)
        readers = earlier if options.read == "before" else d_G
        readers.index_add_(-2, d.P.at, (p.q * d_q).sum(2, keepdim=True))
        d_G += pad(earlier[..., 1:, :], (0, 0, 0, 1))  # a reader or eraser before the decay misses its own gate
        d_G[..., -1, :] += (S_end * d_S).sum(-1)
        if p.g.shape[-1] == 1:
            d_G = d_G.sum(-1, keepdim=True)
        d_g = d_G.flip(-2).cumsum(-2).flip(-2)
    d_v, d_w, d_e, d_a = d_R, None, None, None
    if p.w is not None:
        d_v, d_w = p.w * d_R, (p.v * d_R).sum(-1, keepdim=True)
    if d_eraser is not None:
        key, d_key = p.k if p.a is None else p.a, d_eraser
        if p.e is not None:
            d_e, d_key = (key * d_eraser).sum(-1, keepdim=True), p.e * d_eraser
        if p.a is None:
            d_k = d_k + d_key
        else:
            d_a = d_key
    return Inputs(d_q, d_k, d_v, d_g, d_a, d_e, d_w), d_S0.squeeze(2)


# The walk and its gradient as two opaque ops, for torch.compile. An empty tensor stands for None in their results.


def _core(inputs: Inputs, S: Tensor, cu_seqlens: Tensor | None, options: Options) -> Core:
    return Core(*inputs, S=S, cu_seqlens=cu_seqlens, **options._asdict())


@torch.library.custom_op("fwp::walk", mutates_args=())
def _walk_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_seqlens: Tensor | None,
    read: str,
    causal: bool,
    writes: int,
    erase_before_decay: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    refuse_forward_derivatives()
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens, q.shape[1])
    options = Options(read, causal, writes, erase_before_decay)  # type: ignore[arg-type]
    out, end = _walk(_core(Inputs(q, k, v, g, a, e, w), S, cu_seqlens, options), chunk)
    return out.contiguous(), end.clone()


@_walk_op.register_fake
def _(q, k, v, g, a, e, w, S, cu_seqlens, read, causal, writes, erase_before_decay, chunk):  # type: ignore[no-untyped-def]
    return S.new_empty(*q.shape[:3], S.shape[-1]), torch.empty_like(S, memory_format=torch.contiguous_format)


@torch.library.custom_op("fwp::walk_backward", mutates_args=())
def _walk_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_seqlens: Tensor | None,
    read: str,
    causal: bool,
    writes: int,
    erase_before_decay: bool,
    d_out: Tensor,
    d_S: Tensor,
) -> list[Tensor]:
    inputs, options = Inputs(q, k, v, g, a, e, w), Options(read, causal, writes, erase_before_decay)  # type: ignore[arg-type]
    grads, d_S0 = _walk_backward(_core(inputs, S, cu_seqlens, options), d_out, d_S)
    return [*(S.new_empty(0) if x is None else x for x in grads), d_S0]


def _walk_backward(core: Core, d_out: Tensor, d_S: Tensor) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the inputs and of the initial state: repeats the walk, then goes back through its pieces."""
    assert core.S is not None
    options, inputs = _options(core), _inputs(core)
    reading, writing, pieces = _cut(core, CHUNK)
    starts: list[Tensor] = []
    _, S_end = _forward(pieces, reading.sort(core.S), core, CHUNK, starts)
    d_outs, d_S = reading.split(d_out), reading.sort(d_S)
    if not core.causal:
        for p, d in zip(pieces, d_outs):
            d_S = d_S.clone()
            d_S[: len(d)] += (p.q.mT @ d).sum(2)
    grads: list[Inputs] = []
    for p, S0, d in zip(reversed(pieces), reversed(starts), reversed(d_outs)):
        n = len(p.k)
        given = d if core.causal else torch.zeros_like(d)
        found, d_S0 = _chunk_backward(p, S0, options, given, d_S[:n])
        if not core.causal:
            found = found._replace(q=d @ S_end[:n].unsqueeze(2).mT)
        d_S = torch.cat([d_S0, d_S[n:]]) if n < len(d_S) else d_S0
        grads.append(found)
    grads.reverse()
    result: list[Tensor | None] = []
    for i, x in enumerate(inputs):
        if x is None:
            result.append(None)
            continue
        parts = [found[i] for found in grads]
        joined = (writing if i else reading).join(parts, x if x.dim() == 4 else x.unsqueeze(-1))  # type: ignore[arg-type]
        result.append(joined.reshape(x.shape).to(x.dtype).contiguous())
    return result, reading.unsort(d_S).clone()


@_walk_backward_op.register_fake
def _(q, k, v, g, a, e, w, S, cu_seqlens, read, causal, writes, erase_before_decay, d_out, d_S):  # type: ignore[no-untyped-def]
    return [S.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, a, e, w, S)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tensors, ctx.options = inputs[:9], Options(*inputs[9:13])
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out: Tensor, d_S: Tensor):  # type: ignore[no-untyped-def]
    *given, cu_seqlens = ctx.saved_tensors
    grads = _walk_backward_op(*given, cu_seqlens, *ctx.options, d_out, d_S)
    return *(None if x is None else grad for x, grad in zip(given, grads)), None, *[None] * len(ctx.options), None


def _no_second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("double backward is not supported under torch.compile; call fast_weights in eager mode for it")


_walk_op.register_autograd(_backward, setup_context=_save)
_walk_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _opaque_walk(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    assert core.S is not None
    return _walk_op(*_inputs(core), core.S, core.cu_seqlens, *_options(core), chunk)
