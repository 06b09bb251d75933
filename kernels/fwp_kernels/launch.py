"""Starts the kernels: grids, buffers, and their order in the forward and the backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import Inputs, OutputGradients, Phi, States, Strided
from .chunk import pairs_kernel, sums_kernel, walk_kernel
from .chunk_back import denominator_back_kernel, gradients_kernel, walk_back_kernel
from .features import features_back_kernel, norms_kernel
from .packing import Layout, layout, segment_chunks
from .problem import Problem
from .recurrent import token_kernel
from .segments import join_kernel
from .tiling import ROWS, cdiv, power_of_2


class Prepared(NamedTuple):
    """The results of `prepare`, which depend on no state."""

    inputs: Inputs  # with the running sums of the gates
    P: Strided | None  # [B, T, readers, C], only with a decay per channel; else the walks make it
    A_inv: Strided | None  # [B, n·T, H, C], only where something is erased


class Segments(NamedTuple):
    """How each segment changes a state: S ← M S + N."""

    N: States
    M: Tensor | None  # [segments, H, K, K], only where something is erased
    decay: Tensor | None  # [segments, H, GATE_WIDTH], the product of the decays


Start = Callable[..., None]


def start_kernel(kernel: Any, programs: int, **arguments: Any) -> None:
    """Starts a kernel on a grid of so many programs."""
    kernel[(programs,)](**arguments)


def start_with_fewer_warps(start: Start, most: int, kernel: Any, programs: int, **arguments: Any) -> None:
    """Starts a kernel with at most so many warps per program. Triton's default is 4."""
    start(kernel, programs, **arguments | {"num_warps": min(most, arguments.get("num_warps", 4))})


class Kernels:
    """The kernels on the tensors of one problem."""

    def __init__(self, problem: Problem, start: Start) -> None:
        self.p = problem
        self.start = start if problem.warps is None else partial(start_with_fewer_warps, start, problem.warps)
        self.switches = problem.switches
        self.before = contiguous(problem.S, problem.z)

    @cached_property
    def cut(self) -> int:
        """Chunks of a segment; 0: sequences aren't cut."""
        return segment_chunks(self.p)

    @cached_property
    def layout(self) -> Layout:
        """Where chunks and segments lie."""
        return layout(self.p, self.cut)

    def inputs(self) -> Inputs:
        """The inputs without sums of gates and factors of norms."""
        p = self.p
        a, e, w = self.optional(p.a), self.optional(p.e), self.optional(p.w)
        return Inputs(self.strided(p.q), self.strided(p.k), self.strided(p.v), None, a, e, w)

    @cached_property
    def q_and_k_norms(self) -> tuple[Strided | None, Strided | None]:
        """The factors of the norms of φ(q) and φ(k), for kernels that take some features at a time."""
        p = self.p
        return (None, None) if p.norm is None else (self.norms(p.q, p.q_phi), self.norms(p.k, p.k_phi))

    def normed(self, inputs: Inputs) -> Inputs:
        """The inputs with the factors of the norms."""
        q_norms, k_norms = self.q_and_k_norms
        return inputs._replace(q_norms=q_norms, k_norms=k_norms)

    def strided(self, x: Tensor) -> Strided:
        """x [B, T, H] or [B, T, H, D] as the kernels take it."""
        if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1:
            x = x.contiguous()
        # packed sequences all lie in batch row 0
        return Strided(x, 0 if self.p.cu_seqlens is not None else x.stride(0), x.stride(1), x.stride(2))

    def optional(self, x: Tensor | None) -> Strided | None:
        """`strided`, or None for None."""
        return None if x is None else self.strided(x)

    def states(self, count: int) -> States:
        """Uninitialised S, and z with a denominator."""
        p = self.p
        S = p.q.new_empty(count, p.H, p.K, p.V, dtype=p.accumulator)
        return States(S, self.vectors(count))

    def vectors(self, count: int) -> Tensor | None:
        """Uninitialised z [count, H, K], None without a denominator."""
        p = self.p
        return None if p.eps is None else p.q.new_empty(count, p.H, p.K, dtype=p.accumulator)

    def buffer(self, tokens: int, heads: int, features: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised [B, tokens, heads, features]."""
        return self.p.q.new_empty(self.p.B, tokens, heads, features, dtype=dtype)

    def result(self, tokens: int, heads: int, features: int, dtype: torch.dtype) -> Tensor:
        """A `buffer` that the caller gets. Kernels write no tokens outside all packed sequences, so these are 0."""
        x = self.buffer(tokens, heads, features, dtype)
        return x if self.p.cu_seqlens is None else x.zero_()

    def chunk_arguments(self) -> dict[str, Any]:
        """The arguments of all kernels of the chunk form."""
        p, tiles = self.p, self.p.tiles
        return {
            "packing": self.layout.packing,
            "T": p.tokens,
            "NC": p.chunks,
            "s": self.switches,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def walk_arguments(self) -> dict[str, Any]:
        """The arguments of both walks."""
        place = {"NS": self.layout.segments_of_row, "CS": self.layout.chunks_of_segment}
        return self.chunk_arguments() | place | {"BK": power_of_2(self.p.K)}

    # ---- each kernel ----

    def tokens(self, o: Tensor, den: Tensor | None, after: States) -> None:
        """The recurrent form."""
        p = self.p
        BK, BV = power_of_2(p.K), power_of_2(p.V, 32 if p.K <= 256 else 16)
        self.start(
            token_kernel,
            p.N * p.H * cdiv(p.V, BV),
            p=self.inputs(),
            p_g=self.optional(p.g),
            p_o=self.strided(o),
            p_den=self.optional(den),
            p_before=self.before,
            p_after=after,
            p_borders=p.borders,
            T=p.tokens,
            s=self.switches,
            BK=BK,
            BV=BV,
            num_warps=max(1, BK * BV // 1024) if BK * BV < 8192 else 8,
        )

    def norms(self, x: Tensor, phi: Phi) -> Strided:
        """The factors of the norm of φ(x) [B, T, H, 1]."""
        T, heads = x.shape[1:3]
        found = self.strided(self.buffer(T, heads, 1, self.p.accumulator))
        self.start(
            norms_kernel,
            self.p.B * heads * cdiv(T, ROWS),
            p_x=self.strided(x),
            p_norms=found,
            T=T,
            H=heads,
            phi=phi,
            BT=ROWS,
            BK=power_of_2(phi.K, 64),
            ACC=self.switches.ACC,
        )
        return found

    def features_back(self, x: Tensor, norms: Strided | None, phi: Phi, d_features: Tensor) -> Tensor:
        """The gradient of x [B, T, Hx, D] from that of its features [B, T, H, K]."""
        T, heads = x.shape[1:3]
        found = self.buffer(T, heads, phi.D, x.dtype)
        self.start(
            features_back_kernel,
            self.p.B * heads * cdiv(T, ROWS),
            p_x=self.strided(x),
            p_norms=norms,
            p_dy=self.strided(d_features),
            p_dx=self.strided(found),
            T=T,
            H=heads,
            SHARE=d_features.shape[2] // heads,
            phi=phi,
            BT=ROWS,
            BK=power_of_2(phi.D, 64),
            ACC=self.switches.ACC,
        )
        return found

    def prepare(self) -> Prepared:
        """The running sums of the gates, P and (I + A)⁻¹."""
        p, inputs = self.p, self.inputs()
        block, P, A_inv = power_of_2(p.K, p.tiles.block), None, None
        if p.g is not None:
            G = self.strided(self.buffer(p.tokens, p.H, p.gate_width, p.accumulator))
            BK = block if p.decay == 2 else 1
            self.start(
                sums_kernel,
                self.layout.slots * p.H * cdiv(p.gate_width, BK),
                p_g=self.strided(p.g),
                p_G=G,
                packing=self.layout.packing,
                T=p.tokens,
                NC=p.chunks,
                H=p.H,
                GATE_WIDTH=p.gate_width,
                C=p.C,
                BK=BK,
                FLOOR=-800.0 if p.accumulator == torch.float64 else -104.0,
                ACC=self.switches.ACC,
            )
            inputs = inputs._replace(G=G)
        if p.decay == 2:
            P = self.strided(self.buffer(p.T, p.readers, p.C, p.operand))
        if p.erases:
            A_inv = self.strided(self.buffer(p.tokens, p.H, p.C, p.operand))
        if P is not None or A_inv is not None:
            self.start(
                pairs_kernel,
                self.layout.slots * p.H,
                p=self.normed(inputs),
                p_P=P,
                p_A_inv=A_inv,
                BK=block,
                **self.chunk_arguments(),
            )
        return Prepared(inputs, P, A_inv)

    def walk(
        self,
        prepared: Prepared,
        before: States,
        after: States = States(),  # noqa: B008  an immutable tuple
        kept: States = States(),  # noqa: B008
        o: Tensor | None = None,
        den: Tensor | None = None,
        X: Tensor | None = None,
        decay: Tensor | None = None,
        matrix: bool = False,
    ) -> None:
        """Walks forward from the states before each segment, and fills the outputs that are given.

        matrix: starts from the identity and writes nothing, so that `after` gets the M of each segment as S
        [segments, H, K, K].
        """
        s, inputs = self.switches, prepared.inputs
        if matrix:
            s, inputs = s._replace(V=s.K, EPS=None), inputs._replace(v=None, w=None)
        BV = power_of_2(s.V, self.p.tiles.walk)
        self.start(
            walk_kernel,
            self.layout.segments * s.H * cdiv(s.V, BV),
            p=inputs,
            p_P=prepared.P,
            p_A_inv=prepared.A_inv,
            p_o=self.optional(o),
            p_den=self.optional(den),
            p_X=self.optional(X),
            p_before=before,
            p_after=after,
            p_kept=kept,
            p_decay=decay,
            BV=BV,
            **self.walk_arguments() | {"s": s},
        )

    def walk_back(
        self,
        prepared: Prepared,
        upstream: OutputGradients,
        d_after: States,
        d_before: States = States(),  # noqa: B008
        d_kept: States = States(),  # noqa: B008
        dR: Tensor | None = None,
        dv: Tensor | None = None,
        dw: Tensor | None = None,
    ) -> None:
        """Walks back from the gradients of the states after each segment, and fills the gradients that are given."""
        p = self.p
        BV = power_of_2(p.V, p.tiles.walk)
        self.start(
            walk_back_kernel,
            self.layout.segments * p.H * cdiv(p.V, BV),
            p=prepared.inputs,
            p_P=prepared.P,
            p_A_inv=prepared.A_inv,
            up=upstream,
            p_dR=self.optional(dR),
            p_dv=self.optional(dv),
            p_dw=self.optional(dw),
            p_d_after=d_after,
            p_d_before=d_before,
            p_d_kept=d_kept,
            BV=BV,
            **self.walk_arguments(),
        )

    def segments(self, prepared: Prepared) -> Segments:
        """N and M of each segment, or in place of M the product of its decays."""
        p, count = self.p, self.layout.segments
        N, M, decay = self.states(count), None, None
        if p.g is not None and (not p.erases or N.z is not None):
            decay = p.q.new_empty(count, p.H, p.gate_width, dtype=p.accumulator)
        self.walk(prepared, States(), after=N, decay=decay)
        if p.erases:
            M = p.q.new_empty(count, p.H, p.K, p.K, dtype=p.accumulator)
            self.walk(prepared, States(), after=States(M), matrix=True)
        return Segments(N, M, decay)

    def join(self, segments: Segments, before: States, after: States, back: bool = False) -> States:
        """The states before each segment, from those before the first one. Fills `after` with those after the last."""
        p, starts = self.p, self.states(self.layout.segments)
        BK, BV = power_of_2(p.K), power_of_2(p.V, 16)
        self.start(
            join_kernel,
            p.N * p.H * cdiv(p.V, BV),
            p_N=segments.N,
            p_M=segments.M,
            p_decay=segments.decay,
            p_before=before,
            p_starts=starts,
            p_after=after,
            p_firsts=self.layout.firsts,
            NS=self.layout.segments_of_row,
            s=self.switches,
            BK=BK,
            BJ=min(BK, 32 if p.K <= 256 else 16),
            BV=BV,
            BACK=back,
            num_warps=8 if p.K > 64 else 4,
            num_stages=1,
        )
        return starts

    def upstream(self, d_o: Tensor | None, o: Tensor | None, den: Tensor | None) -> OutputGradients:
        """The gradients of the outputs and of the denominators [B, T, readers, 1]."""
        if d_o is None or o is None or den is None:
            return OutputGradients(self.optional(d_o))
        p, found = self.p, OutputGradients(*map(self.strided, (d_o, den, torch.empty_like(den))))
        self.start(
            denominator_back_kernel,
            p.B * p.readers * cdiv(p.T, ROWS),
            p_do=found.d_o,
            p_o=self.strided(o),
            p_den=found.den,
            p_dden=found.d_den,
            T=p.T,
            READERS=p.readers,
            V=p.V,
            BT=ROWS,
            BV=power_of_2(p.V, 64),
            ACC=self.switches.ACC,
        )
        return found


def contiguous(S: Tensor | None, z: Tensor | None) -> States:
    """States as the kernels take them."""
    return States(S if S is None else S.contiguous(), z if z is None else z.contiguous())


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels start on the GPU of x, even if it is not the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(
    p: Problem, form: str, over: bool = False, start: Start = start_kernel
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o [B, T, readers, V] and the final S [N, H, K, V]; z [N, H, K] and denominators [B, T, readers, 1], or None.

    over: the recurrent form writes S over the initial S, since only the program that writes a block reads it. z gets
    new memory, since the programs of all V blocks read it. start: how kernels are started.
    """
    kernels = Kernels(p, start)
    before = kernels.before
    o = kernels.result(p.T, p.readers, p.V, p.v.dtype)
    den = None if p.eps is None else kernels.result(p.T, p.readers, 1, p.accumulator)
    if over and before.S is not None:
        after = States(before.S, kernels.vectors(p.N))
    else:
        after = kernels.states(p.N)
    assert after.S is not None
    if p.empty:
        for x, given in zip(after, before):
            if x is not None and x is not given:
                x.zero_() if given is None else x.copy_(given)
        return o, after.S, after.z, den
    with on_device(o):
        if form == "recurrent":
            kernels.tokens(o, den, after)
        else:
            prepared = kernels.prepare()
            if kernels.cut:
                starts = kernels.join(kernels.segments(prepared), before, after)
                kernels.walk(prepared, starts, o=o, den=den)
            else:
                kernels.walk(prepared, before, after, o=o, den=den)
    return o, after.S, after.z, den


class Gradients(NamedTuple):
    """Buffers for dR and for the gradients of the inputs as kernels write them.

    A buffer has the input's dtype if a kernel writes the final gradient, else the accumulator's.
    """

    dq: Tensor  # [B, T, readers, K]
    dk: Tensor  # [B, n·T, H, K]
    dv: Tensor  # [B, n·T, H, V]
    dg: Tensor | None  # [B, n·T, H, K], or [B, n·T, H, K blocks] for a gate per head
    da: Tensor | None  # [B, n·T, H, K]
    de: Tensor | None  # [B, n·T, H, K blocks]
    dw: Tensor | None  # [B, n·T, H, V blocks]
    dR: Tensor | None  # [B, n·T, H, V]

    @classmethod
    def empty(cls, kernels: Kernels) -> Gradients:
        """Uninitialised buffers."""
        p = kernels.p
        NK, NV = cdiv(p.K, power_of_2(p.K, p.tiles.block)), cdiv(p.V, power_of_2(p.V, p.tiles.walk))

        def per_head(heads: int, like: Tensor, features: int, final: bool = True) -> Tensor:
            final = final and like.shape[2] == heads
            return kernels.result(like.shape[1], heads, features, like.dtype if final else p.accumulator)

        def per_gate(gate: Tensor | None, shares: int) -> Tensor | None:
            return None if gate is None else kernels.result(p.tokens, p.H, shares, p.accumulator)

        return cls(
            dq=per_head(p.readers, p.q, p.K, p.maps_alone),
            dk=per_head(p.H, p.k, p.K, p.maps_alone),
            dv=per_head(p.H, p.v, p.V),
            dg=per_gate(p.g, p.K if p.decay == 2 else NK),
            da=None if p.a is None else kernels.result(p.tokens, p.H, p.K, p.a.dtype),
            de=per_gate(p.e, NK),
            dw=per_gate(p.w, NV),
            dR=kernels.buffer(p.tokens, p.H, p.V, p.operand) if p.erases else None,
        )


def backward(
    p: Problem,
    o: Tensor | None,
    den: Tensor | None,
    d_o: Tensor | None,
    d_S: Tensor | None,
    d_z: Tensor | None,
    start: Start = start_kernel,
) -> list[Tensor | None]:
    """The gradients of q, k, v, g, a, e, w, S and z; None for inputs that are None.

    o, den: outputs and denominators, None without a denominator. d_o, d_S, d_z: None means 0.
    """
    if p.empty:
        inputs = (p.q, p.k, p.v, p.g, p.a, p.e, p.w)
        states = [
            None if x is None else torch.zeros_like(x) if d_x is None else d_x.clone()
            for x, d_x in ((p.S, d_S), (p.z, d_z))
        ]
        return [None if x is None else torch.zeros_like(x) for x in inputs] + states
    kernels = Kernels(p, start)
    grads = Gradients.empty(kernels)
    before, d_after = kernels.before, contiguous(d_S, d_z)
    d_before = States(*(None if x is None else torch.empty_like(x) for x in before))
    if d_o is None:
        grads.dq.zero_()
    with on_device(grads.dq):
        upstream = kernels.upstream(d_o, o, den)
        prepared = kernels.prepare()
        first, last, d_first = before, d_after, d_before
        if kernels.cut:
            segments = kernels.segments(prepared)
            first = kernels.join(segments, before, States())
            kernels.walk_back(prepared, upstream, States(), d_before=segments.N)
            last, d_first = kernels.join(segments, d_after, d_before, back=True), States()
        _run_all(kernels, prepared, upstream, grads, first, last, d_first)
        dq, dk, dv = _input_gradients(kernels, grads)
    return [dq, dk, dv, *_gate_gradients(p, grads), *d_before]


def _run_all(
    kernels: Kernels,
    prepared: Prepared,
    upstream: OutputGradients,
    grads: Gradients,
    before: States,
    d_after: States,
    d_before: States,
) -> None:
    """Walks forward and back, then runs `gradients` on all chunks: fills `grads` and d_before."""
    p, slots = kernels.p, kernels.layout.slots
    kept, d_kept = (
        States(S, kernels.vectors(slots))
        for S in p.q.new_empty(2, kernels.layout.kept(p.tiles.checkpoint_every), p.H, p.K, p.V, dtype=p.operand).unbind(
            0
        )
    )
    X = kernels.buffer(p.tokens, p.H, p.V, p.operand) if p.erases else None
    kernels.walk(prepared, before, kept=kept, X=X)
    kernels.walk_back(prepared, upstream, d_after, d_before, d_kept, grads.dR, grads.dv, grads.dw)
    BK = power_of_2(p.K, p.tiles.block)
    kernels.start(
        gradients_kernel,
        slots * p.H * cdiv(p.K, BK),
        p=kernels.normed(prepared.inputs),
        p_X=kernels.optional(X),
        up=upstream,
        p_dR=kernels.optional(grads.dR),
        p_dq=kernels.strided(grads.dq),
        p_dk=kernels.strided(grads.dk),
        p_dg=kernels.optional(grads.dg),
        p_da=kernels.optional(grads.da),
        p_de=kernels.optional(grads.de),
        p_kept=kept,
        p_d_kept=d_kept,
        BK=BK,
        BV=power_of_2(p.V, p.tiles.block),
        **kernels.chunk_arguments() | {"num_stages": 1},
    )


def _input_gradients(kernels: Kernels, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from those per head and feature."""
    p = kernels.p

    def summed(x: Tensor, like: Tensor) -> Tensor:
        """The sum over the heads that share a head of `like`."""
        return x if x.shape[2] == like.shape[2] else x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)

    if p.maps_alone:
        return summed(grads.dq, p.q), summed(grads.dk, p.k), summed(grads.dv, p.v)
    q_norms, k_norms = kernels.q_and_k_norms
    dq = kernels.features_back(p.q, q_norms, p.q_phi, grads.dq)
    dk = kernels.features_back(p.k, k_norms, p.k_phi, grads.dk)
    return dq, dk, summed(grads.dv, p.v)


def _gate_gradients(p: Problem, grads: Gradients) -> list[Tensor | None]:
    """The gradients of g, a, e and w, summed over the parts of blocks."""

    def summed(x: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if x is None or like is None else x.sum(-1).to(like.dtype)

    dg = grads.dg if p.g is None or p.decay == 2 else summed(grads.dg, p.g)
    if dg is not None and p.g is not None:
        dg = dg.to(p.g.dtype)
    return [dg, grads.da, summed(grads.de, p.e), summed(grads.dw, p.w)]
