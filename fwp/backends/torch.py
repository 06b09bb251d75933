"""The recurrence as chunked matrix products in plain torch: any device, differentiable as often as you like.

Within a chunk of C tokens, G the running sum of g and G^q the reader's (one token behind for read "before")::

    A_ij = (e_i ⊙ k_i)ᵀ exp(G_i − G_j) k_j  for j < i      P_ij = q_iᵀ exp(G^q_i − G_j) k_j  for j ≤ i (before: j < i)
    (I + A) X = w ⊙ V − (e ⊙ k ⊙ exp G) S₀
    O = (q ⊙ exp G^q) S₀ + P X                             S = exp(G_C) S₀ + (exp(G_C − G) ⊙ k)ᵀ X

No exponent is ever positive, and the mask comes before the exponential. The gradient of a chunk is written out as well,
for torch.compile: there a Python loop over chunks would be unrolled and recompiled for every length, so forward and
backward are two opaque ops. In eager mode autograd differentiates the forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    opaque,
    ratio,
    refuse_forward_derivatives,
    to_heads,
    without_autocast,
)
from fwp.feature_maps import applied

CHUNK = 64


def refuses(core: Core, form: Form) -> str | None:
    """Why these inputs can't be served; None: they can."""
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
    """o [B, T, max(Hq, H), V] of queries against the initial state, in its dtype; k and v are not looked at."""
    if core.cu_seqlens is not None and opaque():
        return run(core, "chunk")[0]
    core = _with_z(core)
    assert core.S is not None
    layout = Layout(core, max(core.q.shape[1], 1))
    with without_autocast(core.q):
        S = layout.sort(core.S)
        outs = [q @ S[: len(q)].unsqueeze(2) for q in layout.split(core.q)]
        out = layout.join(outs, core.q[..., :1].expand(*core.q.shape[:3], S.shape[-1]))
        return _normalised(out, core.eps) if core.denominator else out


def _with_z(core: Core) -> Core:
    """A head of k and v a state head, and the initial state, z being one more column, of value 1 and never erased."""
    H = core.heads
    S, z = core.initial()
    if z is not None:
        S = torch.cat([S, z.unsqueeze(-1)], -1)
    return replace(core, q=to_heads(core.q, max(core.q.shape[2], H)), k=to_heads(core.k, H), v=to_heads(core.v, H), S=S)


def _normalised(out: Tensor, eps: float) -> Tensor:
    """Sᵀq / (zᵀq + eps), 0 where zᵀq = 0, from both side by side."""
    out, found = out.split([out.shape[-1] - 1, 1], -1)
    return ratio(out, torch.where(found == 0, 0, found + eps))


# What a step of the walk sees. Dimensions [N, H, r, C, ·]: sequences, state heads, query heads a state head, tokens.


@dataclass(frozen=True)
class Piece:
    """C consecutive tokens of N sequences, in the state's dtype. Gates have 1 feature where they are one a head."""

    q: Tensor  # [N, H, r, C, K]
    k: Tensor  # [N, H, 1, C, K]
    v: Tensor  # [N, H, 1, C, V]
    g: Tensor | None  # [N, H, 1, C, 1 or K]
    e: Tensor | None  # [N, H, 1, C, 1 or K]
    w: Tensor | None  # [N, H, 1, C, 1 or V]


def _rows(x: Tensor, H: int, dtype: torch.dtype) -> Tensor:
    """[N, C, H·r, D] → [N, H, r, C, D] in the state's dtype; [N, C, H] as D = 1."""
    x = x if x.dim() == 4 else x.unsqueeze(-1)
    return x.to(dtype).unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4)


def _tokens(x: Tensor) -> Tensor:
    """The inverse: [N, H, r, C, D] → [N, C, H·r, D]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


class Layout:
    """Cuts the T axis into pieces of at most `chunk` tokens of one sequence, and puts results together again.

    Packed sequences are walked side by side, longest first, so that the living ones are always a prefix. Everything is
    gathered once and then split: indexing inside the loop would cost a pass over all of T per piece in the backward.
    """

    def __init__(self, core: Core, chunk: int) -> None:
        self.T, self.H, self.dtype, self.chunk = core.k.shape[1], core.heads, core.dtype, chunk
        self.packed = core.cu_seqlens is not None
        if core.cu_seqlens is None:
            return
        bounds = core.cu_seqlens.to("cpu", torch.long)
        lengths = bounds.diff()
        order = lengths.argsort(descending=True, stable=True)
        starts, lengths = bounds[:-1][order], lengths[order]
        steps = []  # [N, C] each: where the tokens lie; T, a row of zeros, for none
        for t in range(0, int(lengths.max()) if len(lengths) else 0, chunk):
            left = lengths[lengths > t] - t
            at = torch.arange(min(chunk, int(left[0])))
            steps.append(torch.where(at < left[:, None], starts[: len(left), None] + t + at, self.T))
        self.shapes = [step.shape for step in steps]
        rows = torch.cat([torch.zeros(0, dtype=torch.long), *(step.flatten() for step in steps)])
        real = (rows < self.T).nonzero().squeeze(1)
        device = core.k.device
        self.rows, self.back = rows.to(device), real[rows[real].argsort()].to(device)
        self.order, self.unorder = order.to(device), order.argsort().to(device)

    def sort(self, S: Tensor) -> Tensor:
        """The sequences' states, longest sequence first."""
        return S[self.order] if self.packed else S

    def unsort(self, S: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return S[self.unorder] if self.packed else S

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, T, H·r, D] → [N, H, r, C, D] for every step; [B, T, H] as D = 1."""
        x = x if x.dim() == 4 else x.unsqueeze(-1)
        if self.packed:
            x = torch.cat([x[0], torch.zeros_like(x[0, :1])])[self.rows]
            sizes = [n * c for n, c in self.shapes]
            parts = [part.unflatten(0, shape) for part, shape in zip(x.split(sizes), self.shapes)]
        else:
            parts = list(x.split(self.chunk, 1)) if self.T else []
        return [_rows(part, self.H, self.dtype) for part in parts]

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `split`, [B, T, H·r, D]; zeros of the shape of `like` if there are no tokens."""
        if not parts:
            return like.new_zeros(like.shape, dtype=self.dtype)
        parts = [_tokens(part) for part in parts]
        if not self.packed:
            return torch.cat(parts, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])[self.back].unsqueeze(0)

    def pieces(self, core: Core) -> list[Piece]:
        """What every step sees."""
        columns = [None if x is None else self.split(x) for x in (core.q, core.k, core.v, core.g, core.e, core.w)]
        steps = range(len(columns[1] or ()))
        return [Piece(*(None if column is None else column[i] for column in columns)) for i in steps]  # type: ignore[arg-type]


def _walk(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    """Carries the state over all pieces: Sᵀq [B, T, Hq, V] and the final S."""
    assert core.S is not None
    layout = Layout(core, chunk)
    pieces = layout.pieces(core)
    outs, S = _forward(pieces, layout.sort(core.S), core, chunk)
    like = core.q[..., :1].expand(*core.q.shape[:3], core.S.shape[-1])
    return layout.join(outs, like), layout.unsort(S)


def _at_once(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    """`_walk` where every query reads the final state: two products, whatever the chunk."""
    assert core.S is not None
    q, k, v = (_rows(x, core.heads, core.dtype) for x in (core.q, core.k, core.v))
    x = v if core.w is None else _rows(core.w, core.heads, core.dtype) * v
    S = core.S + (k.mT @ _with_one(x, core.S)).squeeze(2)
    return _tokens(q @ S.unsqueeze(2)), S


def _forward(
    pieces: list[Piece], S: Tensor, core: Core, chunk: int, starts: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Outputs [N, H, r, C, V] of each piece and the final state, sequences sorted; `starts` gets the states between."""
    step = _token if chunk == 1 else _chunk
    outs, ended = [], []
    for piece in pieces:
        n = len(piece.k)
        if n < len(S):
            ended.append(S[n:])
            S = S[:n]
        if starts is not None:
            starts.append(S)
        out, S = step(piece, S, core.read)
        outs.append(out)
    if ended:
        S = torch.cat([S, *reversed(ended)])
    if not core.causal:
        outs = [piece.q @ S[: len(piece.k)].unsqueeze(2) for piece in pieces]
    return outs, S


def _token(p: Piece, S: Tensor, read: Read) -> tuple[Tensor, Tensor]:
    """One token: the recurrence as it stands in `fwp.core`."""
    before, S = S, S.unsqueeze(2)
    if p.g is not None:
        S = p.g.exp().mT * S
    x = p.v if p.w is None else p.w * p.v
    if p.e is not None:
        x = x - (p.e * p.k) @ S[..., : x.shape[-1]]
    S = S + p.k.mT @ _with_one(x, S)
    return p.q @ (S if read == "after" else before.unsqueeze(2)), S.squeeze(2)


def _with_one(x: Tensor, S: Tensor) -> Tensor:
    """x with the constant 1 that makes the column z of S, if S has it."""
    return x if x.shape[-1] == S.shape[-1] else torch.cat([x, torch.ones_like(x[..., :1])], -1)


class Pairs:
    """M_ij = Σ_d a_id b_jd exp(Ga_i − Gb_j)_d where visible, else 0, and the two gradients of that product.

    A decay per channel can't be taken out of the sum over d, and exp(Ga_i) exp(−Gb_j) overflows. But where i lies in
    the later half of a block of tokens and j in the earlier one, it is i's decay since the middle times j's until the
    middle; every pair does so in one block of some size 2, 4, 8, …, so that log₂ C masked products make all pairs.
    """

    def __init__(self, Ga: Tensor | None, Gb: Tensor | None, visible: Tensor, dtype: torch.dtype) -> None:
        self.visible = visible  # [C, C]
        self.factor: Tensor | None = None  # [N, H, 1, C, C]
        self.levels: list[tuple[Tensor, Tensor]] | None = None  # pairs [C, C] and decays [N, H, 1, C, K] of each size
        if Ga is None or Gb is None:
            return
        if Ga.shape[-1] == 1:
            self.factor = (Ga - Gb.mT).to(dtype).masked_fill(~visible, -torch.inf).exp()
            return
        self.levels = []
        C, i = len(visible), torch.arange(len(visible), device=visible.device)
        half = 1
        while half < C:
            late = i // half % 2 == 1
            middle = Gb[..., (torch.where(late, 0, half) + i // half * half - 1).clamp(max=C - 1), :]
            decay = torch.where(late[:, None], Ga - middle, middle - Gb).to(dtype).exp()
            block = i // (2 * half)
            self.levels.append((late[:, None] & ~late & (block[:, None] == block), decay))
            half *= 2

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [N, H, r, C, K], b [N, H, 1, C, K] → M [N, H, r, C, C]."""
        if self.levels is None:
            M = a @ b.mT
            return M.masked_fill(~self.visible, 0) if self.factor is None else M * self.factor
        M = ((a * b).sum(-1) * self.visible.diagonal()).diag_embed()
        for pairs, decay in self.levels:
            M = M + ((a * decay) @ (b * decay).mT).masked_fill(~pairs, 0)
        return M

    def grad_a(self, M: Tensor, b: Tensor) -> Tensor:
        """The gradient of Σ M ⊙ product(a, b) for a."""
        if self.levels is None:
            return (M.masked_fill(~self.visible, 0) if self.factor is None else M * self.factor) @ b
        a = (M.diagonal(dim1=-2, dim2=-1) * self.visible.diagonal()).unsqueeze(-1) * b
        for pairs, decay in self.levels:
            a += (M.masked_fill(~pairs, 0) @ (b * decay)) * decay
        return a

    def grad_b(self, M: Tensor, a: Tensor) -> Tensor:
        """The same for b, summed over the r readers."""
        if self.levels is None:
            M = M.masked_fill(~self.visible, 0) if self.factor is None else M * self.factor
            return (M.mT @ a).sum(2, keepdim=True)
        b = (M.diagonal(dim1=-2, dim2=-1) * self.visible.diagonal()).unsqueeze(-1) * a
        for pairs, decay in self.levels:
            b += (M.masked_fill(~pairs, 0).mT @ (a * decay)) * decay
        return b.sum(2, keepdim=True)


@dataclass(frozen=True)
class Decays:
    """The decays of a piece: exponentials [N, H, 1, C or 1, 1 or K], 1 where nothing decays, and the products."""

    A: Pairs  # eraser with writer
    P: Pairs  # reader with writer
    start: Tensor | float = 1.0  # exp G: from before the piece to a token
    reader: Tensor | float = 1.0  # exp G^q
    end: Tensor | float = 1.0  # exp(G_C − G): from a token to the end
    whole: Tensor | float = 1.0  # exp G_C, as [N, H, 1, 1 or K, 1]: for S

    @staticmethod
    def of(p: Piece, read: Read) -> Decays:
        C, dtype = p.k.shape[-2], p.k.dtype
        ones = torch.ones(C, C, dtype=torch.bool, device=p.k.device)
        strict = ones.tril(-1)
        visible = strict if read == "before" else ones.tril()
        if p.g is None:
            return Decays(Pairs(None, None, strict, dtype), Pairs(None, None, visible, dtype))
        # Summed in float64: differences of float32 sums of gates like −1e4 are off by 1e-3. exp(−800) is 0 in float64,
        # so the floor changes nothing and keeps −inf out of the differences. MPS has no float64.
        g = p.g.clamp(min=-104) if p.g.device.type == "mps" else p.g.double().clamp(min=-800)
        G = g.cumsum(-2)
        Gq = G if read == "after" else pad(G[..., :-1, :], (0, 0, 1, 0))
        last = G[..., -1:, :]
        return Decays(
            Pairs(G, G, strict, dtype),
            Pairs(Gq, G, visible, dtype),
            G.to(dtype).exp(),
            Gq.to(dtype).exp(),
            (last - G).to(dtype).exp(),
            last.to(dtype).exp().mT,
        )


def _chunk(p: Piece, S: Tensor, read: Read) -> tuple[Tensor, Tensor]:
    """A piece by the equations at the top of this file: S [N, H, K, V] → outputs [N, H, r, C, V], S."""
    d, S = Decays.of(p, read), S.unsqueeze(2)
    X, _ = _solve(p, S, d)
    out = (p.q * d.reader) @ S + d.P.product(p.q, p.k) @ X
    return out, (d.whole * S + (p.k * d.end).mT @ X).squeeze(2)


def _solve(p: Piece, S: Tensor, d: Decays) -> tuple[Tensor, Tensor | None]:
    """X [N, H, 1, C, V], what each token writes, and A."""
    X = p.v if p.w is None else p.w * p.v
    A = None
    if p.e is not None:
        erase = p.e * p.k
        A = d.A.product(erase, p.k)
        X = solve_triangular(A, X - (erase * d.start) @ S[..., : X.shape[-1]], upper=False, unitriangular=True)
    return _with_one(X, S), A


def _chunk_backward(p: Piece, S: Tensor, read: Read, d_out: Tensor, d_S: Tensor) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of a piece's inputs (q, k, v, g, e, w) and of the state before it.

    Wherever a feature of q, k or e ⊙ k stands, its exp G stands beside it: so dG is that feature times its gradient.
    """
    d, S, d_S = Decays.of(p, read), S.unsqueeze(2), d_S.unsqueeze(2)
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
    d_R = d_X[..., :V]
    d_e = d_g = None
    d_erase = torch.zeros_like(p.k)
    if p.e is not None and A is not None:
        erase = p.e * p.k
        d_R = solve_triangular(A.mT, d_R, upper=True, unitriangular=True)
        d_A = -d_R @ X[..., :V].mT
        d_erase = d.A.grad_a(d_A, p.k) - (d_R @ S[..., :V].mT) * d.start
        d_k = d_k + d.A.grad_b(d_A, erase)
        d_S0[..., :V] -= (erase * d.start).mT @ d_R
    if p.g is not None:
        d_G = -p.k * d_k
        if p.e is not None:
            d_G += p.e * p.k * d_erase
        d_Gq = (p.q * d_q).sum(2, keepdim=True)
        d_G += d_Gq if read == "after" else pad(d_Gq[..., 1:, :], (0, 0, 0, 1))
        d_G[..., -1, :] += (S_end * d_S).sum(-1)
        if p.g.shape[-1] == 1:
            d_G = d_G.sum(-1, keepdim=True)
        d_g = d_G.flip(-2).cumsum(-2).flip(-2)
    if p.e is not None:
        d_e = p.k * d_erase
        d_k = d_k + p.e * d_erase
        if p.e.shape[-1] == 1:
            d_e = d_e.sum(-1, keepdim=True)
    d_v, d_w = d_R, None
    if p.w is not None:
        d_v, d_w = p.w * d_R, p.v * d_R
        if p.w.shape[-1] == 1:
            d_w = d_w.sum(-1, keepdim=True)
    return [d_q, d_k, d_v, d_g, d_e, d_w], d_S0.squeeze(2)


# Under torch.compile: the walk and its gradient as two opaque ops. None travels as an empty tensor.


def _core(tensors: list[Tensor | None], read: str, causal: bool) -> Core:
    q, k, v, g, e, w, S, cu_seqlens = tensors
    return Core(q, k, v, g, e=e, w=w, S=S, cu_seqlens=cu_seqlens, read=read, causal=causal)  # type: ignore[arg-type]


@torch.library.custom_op("fwp::walk", mutates_args=())
def _walk_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_seqlens: Tensor | None,
    read: str,
    causal: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    refuse_forward_derivatives()
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, q.shape[1])
    out, end = _walk(_core([q, k, v, g, e, w, S, cu_seqlens], read, causal), chunk)
    return out.contiguous(), end.clone()


@_walk_op.register_fake
def _(q, k, v, g, e, w, S, cu_seqlens, read, causal, chunk):  # type: ignore[no-untyped-def]
    return S.new_empty(*q.shape[:3], S.shape[-1]), torch.empty_like(S, memory_format=torch.contiguous_format)


@torch.library.custom_op("fwp::walk_backward", mutates_args=())
def _walk_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor,
    cu_seqlens: Tensor | None,
    read: str,
    causal: bool,
    chunk: int,
    d_out: Tensor,
    d_S: Tensor,
) -> list[Tensor]:
    inputs = [q, k, v, g, e, w]
    core = _core([*inputs, S, cu_seqlens], read, causal)
    layout = Layout(core, CHUNK)
    pieces = layout.pieces(core)
    starts: list[Tensor] = []
    _, S_end = _forward(pieces, layout.sort(S), core, CHUNK, starts)
    d_outs, d_S = layout.split(d_out), layout.sort(d_S)
    if not causal:
        for p, d in zip(pieces, d_outs):
            d_S = d_S.clone()
            d_S[: len(d)] += (p.q.mT @ d).sum(2)
    grads: list[list[Tensor | None]] = []
    for p, S0, d in zip(reversed(pieces), reversed(starts), reversed(d_outs)):
        n = len(p.k)
        given = d if causal else torch.zeros_like(d)
        found, d_S0 = _chunk_backward(p, S0, core.read, given, d_S[:n])
        if not causal:
            found[0] = d @ S_end[:n].unsqueeze(2).mT
        d_S = torch.cat([d_S0, d_S[n:]]) if n < len(d_S) else d_S0
        grads.append(found)
    grads.reverse()
    result = []
    for i, x in enumerate(inputs):
        if x is None:
            result.append(S.new_empty(0))
        else:
            joined = layout.join([g[i] for g in grads], x if x.dim() == 4 else x.unsqueeze(-1))  # type: ignore[misc]
            result.append(joined.reshape(x.shape).to(x.dtype).contiguous())
    return [*result, layout.unsort(d_S).clone()]


@_walk_backward_op.register_fake
def _(q, k, v, g, e, w, S, cu_seqlens, read, causal, chunk, d_out, d_S):  # type: ignore[no-untyped-def]
    return [S.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, e, w, S)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.read, ctx.causal, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out: Tensor, d_S: Tensor):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grads = _walk_backward_op(*saved, ctx.read, ctx.causal, ctx.chunk, d_out, d_S)
    return *(None if x is None else g for x, g in zip(saved[:7], grads)), None, None, None, None


def _no_second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError("double backward is not supported under torch.compile; call fast_weights in eager mode for it")


_walk_op.register_autograd(_backward, setup_context=_save)
_walk_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


def _opaque_walk(core: Core, chunk: int) -> tuple[Tensor, Tensor]:
    assert core.S is not None
    return _walk_op(
        core.q, core.k, core.v, core.g, core.e, core.w, core.S, core.cu_seqlens, core.read, core.causal, chunk
    )
