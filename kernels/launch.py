"""Grids, block sizes and buffers: what stands between tensors and kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .chunk import (
    denominator_back_kernel,
    gradients_kernel,
    pairs_kernel,
    sums_kernel,
    walk_back_kernel,
    walk_kernel,
)
from .recurrent import token_kernel

INTERPRETED = isinstance(walk_kernel, InterpretedFunction)  # TRITON_INTERPRET=1 when Triton was imported
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the kernels of the chunk form: C tokens, features a block, warps a program."""

    chunk: int
    walk: int  # V columns of S in a walk, beside all of K
    block: int = 64  # features at a time where the work is split over K or summed over V
    warps: int = 8
    stages: int = 2


# By bytes of a matrix product's operand: (K up to, tiles). Chosen so that registers and shared memory hold them.
TABLE: dict[int, list[tuple[int, Tiles]]] = {
    2: [
        (64, Tiles(64, 64)),
        (128, Tiles(64, 64)),
        (256, Tiles(32, 32)),
        (512, Tiles(16, 32)),
        (1024, Tiles(16, 16)),
    ],
    4: [(64, Tiles(32, 32, 32)), (256, Tiles(16, 32, 32)), (1024, Tiles(16, 16, 32))],
    8: [(64, Tiles(16, 16, 16, stages=1)), (1024, Tiles(16, 16, 16, stages=1))],
}


@cache
def family(device: torch.device) -> str:
    """Of GPUs that take the same tiles: "cdna" (AMD), "ampere" (NVIDIA's, and before it), "hopper" (and after it)."""
    if torch.version.hip is not None:
        return "cdna"
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return "ampere" if old else "hopper"


def tiles(K: int, dtype: torch.dtype, decay: int, erase: bool, family: str) -> Tiles:
    """The table's row for K key features and operands of `dtype`, narrower where a cell needs room."""
    row = next(row for limit, row in TABLE[dtype.itemsize] if limit >= K)
    if decay == 2:
        row = replace(row, walk=max(16, row.walk // 2 if K > 64 else row.walk), block=max(16, row.block // 2))
    if erase:
        row = replace(row, walk=min(row.walk, 32), block=min(row.block, 32))
    if family == "cdna":  # warps of 64 threads, twice the registers a thread, a quarter of the shared memory
        row = replace(row, chunk=min(row.chunk, 32 if decay == 2 else 64), warps=4, stages=1)
    if family == "ampere":  # operands of matrix products stand in registers
        stages = 1 if K > (128 if decay == 2 else 512) else row.stages  # some have 99 KiB of shared memory
        row = replace(row, chunk=min(row.chunk, 32), walk=min(row.walk, 32), block=16, stages=stages)
    return row


def power_of_2(n: int, most: int = 1024) -> int:
    """The block that holds n features: a power of 2 from 16, the least that matrix instructions take, to `most`."""
    return min(most, max(16, triton.next_power_of_2(n)))


@dataclass
class Problem:
    """The inputs of `fwp.core.Core` that the kernels serve, and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    e: Tensor | None
    w: Tensor | None
    S: Tensor | None
    z: Tensor | None
    cu_seqlens: Tensor | None
    before: bool  # read
    eps: float | None = None  # None: no denominator
    chunk: int | None = None  # None: the table's

    def __post_init__(self) -> None:
        self.B, self.T, self.Hq, self.K = self.q.shape
        self.Hk, self.Hv, self.V = self.k.shape[2], self.v.shape[2], self.v.shape[3]
        self.H = max(self.Hk, self.Hv)
        self.Ho = max(self.Hq, self.H)
        self.N = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.acc = torch.float64 if self.v.dtype == torch.float64 else torch.float32
        # The interpreter's bfloat16 arithmetic is wrong, its loads and stores are right.
        self.dot = torch.float32 if INTERPRETED and self.v.dtype == torch.bfloat16 else self.v.dtype
        decay = 0 if self.g is None else self.g.dim() - 2
        self.tiles = tiles(self.K, self.dot, decay, self.e is not None, family(self.v.device))
        self.C = self.chunk or self.tiles.chunk
        self.chunks = -(-self.T // self.C)
        self.slots, self.owners = None, None
        self.count = self.N * self.chunks
        if self.cu_seqlens is not None and self.N:
            # Where each sequence's chunks begin, without asking the GPU: at most T // C + N of them.
            self.count = self.T // self.C + self.N
            per = (self.cu_seqlens.long().diff() + self.C - 1) // self.C
            ends = per.cumsum(0)
            at = torch.arange(self.count, device=ends.device)
            self.slots, self.owners = ends - per, torch.searchsorted(ends, at, right=True).clamp_(max=self.N - 1)
        self.common: dict[str, Any] = {
            "p_cu": self.cu_seqlens,
            "T": self.T,
            "H": self.H,
            "GK": self.H // self.Hk,
            "GQ": self.Ho // self.Hq,
            "R": self.Ho // self.H,
            "K": self.K,
            "DECAY": decay,
            "LAG": self.before,
            "ACC": TYPES[self.acc],
        }
        self.chunked: dict[str, Any] = self.common | {
            "p_slots": self.slots,
            "NC": self.chunks,
            "C": self.C,
            "DOT": TYPES[self.dot],
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }
        self.inputs = {name: self.rows(getattr(self, name)) for name in ("q", "k", "v", "g", "e", "w")}
        self.ungated = {name: x for name, x in self.inputs.items() if name != "g"}
        self.S, self.z = (None if x is None else x.contiguous() for x in (self.S, self.z))

    @property
    def empty(self) -> bool:
        return self.T == 0 or self.N == 0

    def rows(self, x: Tensor | None) -> tuple[Tensor, int, int, int] | None:
        """x [B, T, H] or [B, T, H, D] as the kernels take it."""
        if x is None:
            return None
        if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1:
            x = x.contiguous()
        # packed: sequence n starts at cu_seqlens[n] of the one batch row
        return x, 0 if self.cu_seqlens is not None else x.stride(0), x.stride(1), x.stride(2)

    def vectors(self, count: int) -> Tensor | None:
        """For z, as many times: [count, H, K], None without denominator."""
        return None if self.eps is None else self.q.new_empty(count, self.H, self.K, dtype=self.acc)

    def buffer(self, heads: int, features: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(self.B, self.T, heads, features, dtype=dtype)

    def prepare(self) -> dict[str, Any]:
        """What the kernels of the chunk form read beside q, k, v, e, w: G, P if the decay is per channel, (I + A)⁻¹."""
        decay, block = self.common["DECAY"], power_of_2(self.K, self.tiles.block)
        G = P = inverse = None
        if self.g is not None:
            features = self.K if decay == 2 else 1
            G = self.buffer(self.H, features, self.acc)
            BK = block if decay == 2 else 1
            sums_kernel[(self.count * self.H * triton.cdiv(features, BK),)](
                g=self.inputs["g"],
                G=self.rows(G),
                p_owners=self.owners,
                KG=features,
                BK=BK,
                FLOOR=-800.0 if self.acc == torch.float64 else -104.0,
                **{name: self.chunked[name] for name in ("p_cu", "p_slots", "T", "NC", "H", "C", "ACC")},
            )
        if decay == 2:
            P = self.buffer(self.Ho, self.C, self.dot)
        if self.e is not None:
            inverse = self.buffer(self.H, self.C, self.dot)
        made = {"G": self.rows(G), "P": self.rows(P), "I": self.rows(inverse)}
        if P is not None or inverse is not None:
            pairs_kernel[(self.count * self.H,)](
                **{name: self.inputs[name] for name in ("q", "k", "e")},
                **made,
                p_owners=self.owners,
                BK=block,
                **self.chunked,
            )
        return made

    def walk(
        self,
        prepared: dict[str, Any],
        o: Tensor | None = None,
        den: Tensor | None = None,
        X: Tensor | None = None,
        S: Tensor | None = None,
        z: Tensor | None = None,
        starts: Tensor | None = None,
        z_starts: Tensor | None = None,
    ) -> None:
        """Fills what is given of: outputs o, denominators, writes X, the final state, those before each chunk."""
        BV = power_of_2(self.V, self.tiles.walk)
        walk_kernel[(self.N * self.H * triton.cdiv(self.V, BV),)](
            **self.ungated,
            **prepared,
            o=self.rows(o),
            den=self.rows(den),
            X=self.rows(X),
            p_S0=self.S,
            p_S=S,
            p_starts=starts,
            p_z0=self.z,
            p_z=z,
            p_z_starts=z_starts,
            GV=self.H // self.Hv,
            V=self.V,
            BK=power_of_2(self.K),
            BV=BV,
            EPS=self.eps,
            **self.chunked,
        )

    def denominator_gradient(self, d_o: Tensor, o: Tensor, den: Tensor) -> Tensor:
        """[B, T, Ho, 1] of the outputs' [B, T, Ho, V]."""
        found = torch.empty_like(den)
        block = 16
        denominator_back_kernel[(self.B * self.Ho * triton.cdiv(self.T, block),)](
            do=self.rows(d_o),
            o=self.rows(o),
            den=self.rows(den),
            dden=self.rows(found),
            T=self.T,
            HO=self.Ho,
            V=self.V,
            BT=block,
            BV=power_of_2(self.V, 64),
            ACC=TYPES[self.acc],
        )
        return found


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current GPU, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(p: Problem, form: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o [B, T, Ho, V] in v's dtype and the final S [N, H, K, V]; z [N, H, K] and denominators [B, T, Ho, 1] or None."""
    o, den = p.buffer(p.Ho, p.V, p.v.dtype), None if p.eps is None else p.buffer(p.Ho, 1, p.acc)
    S, z = p.q.new_empty(p.N, p.H, p.K, p.V, dtype=p.acc), p.vectors(p.N)
    if p.empty:
        for x, start in ((S, p.S), (z, p.z)):
            if x is not None:
                x.zero_() if start is None else x.copy_(start)
        return o, S, z, den
    with on_device(o):
        if form == "chunk":
            p.walk(p.prepare(), o=o, den=den, S=S, z=z)
        else:
            BK, BV = power_of_2(p.K), power_of_2(p.V, 32 if p.K <= 256 else 16)
            token_kernel[(p.N * p.H * triton.cdiv(p.V, BV),)](
                **p.inputs,
                o=p.rows(o),
                den=p.rows(den),
                p_S0=p.S,
                p_S=S,
                p_z0=p.z,
                p_z=z,
                GV=p.H // p.Hv,
                V=p.V,
                BK=BK,
                BV=BV,
                EPS=p.eps,
                num_warps=max(1, BK * BV // 1024) if BK * BV < 8192 else 8,
                **p.common,
            )
    return o, S, z, den


def backward(
    p: Problem,
    o: Tensor | None,
    den: Tensor | None,
    d_o: Tensor | None,
    d_S: Tensor | None,
    d_z: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of q, k, v, g, e, w, S, z, None for what is None.

    o, den: the outputs and their denominators, None without. d_o, d_S or d_z None: nothing flows from there.
    """
    inputs = [p.q, p.k, p.v, p.g, p.e, p.w]
    if p.empty:
        states = [
            None if x is None else torch.zeros_like(x) if d_x is None else d_x.clone()
            for x, d_x in ((p.S, d_S), (p.z, d_z))
        ]
        return [None if x is None else torch.zeros_like(x) for x in inputs] + states

    def head_buffer(heads: int, shared: int, like: Tensor) -> Tensor:
        """A gradient for each state head or reader: in the input's dtype, or for summing over those that share it."""
        return p.buffer(heads, like.shape[-1], like.dtype if heads == shared else p.acc)

    def summed(x: Tensor, heads: int, like: Tensor) -> Tensor:
        """… and its sum over those that share a head."""
        return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3).to(like.dtype)

    tl_, BV = p.tiles, power_of_2(p.V, p.tiles.walk)
    NV, BK = triton.cdiv(p.V, BV), power_of_2(p.K, tl_.block)
    NK = triton.cdiv(p.K, BK)
    erases, decays = p.e is not None, p.g is not None
    X = p.buffer(p.H, p.V, p.dot) if erases else None
    dR = p.buffer(p.H, p.V, p.dot) if erases else None
    starts, ends = p.q.new_empty(2, p.count, p.H, p.K, p.V, dtype=p.dot).unbind(0)
    dq, dk, dv = head_buffer(p.Ho, p.Hq, p.q), head_buffer(p.H, p.Hk, p.k), head_buffer(p.H, p.Hv, p.v)
    if d_o is None:
        dq.zero_()
    dw = p.buffer(p.H, NV, p.acc) if p.w is not None else None
    de = p.buffer(p.H, NK, p.acc) if erases else None
    dg = p.buffer(p.H, p.K if p.common["DECAY"] == 2 else NK, p.acc) if decays else None
    dS0, dz0 = (None if x is None else torch.empty_like(x) for x in (p.S, p.z))
    z_starts, z_ends = p.vectors(p.count), p.vectors(p.count)
    with on_device(dq):
        d_den = None
        if d_o is None or o is None or den is None:
            den = None
        else:
            d_den = p.denominator_gradient(d_o, o, den)
        divided = {"do": p.rows(d_o), "den": p.rows(den), "dden": p.rows(d_den)}
        prepared = p.prepare()
        p.walk(prepared, X=X, starts=starts, z_starts=z_starts)
        walk_back_kernel[(p.N * p.H * NV,)](
            **p.ungated,
            **prepared,
            **divided,
            dR=p.rows(dR),
            dv=p.rows(dv),
            dw=p.rows(dw),
            p_dS=None if d_S is None else d_S.contiguous(),
            p_dS0=dS0,
            p_ends=ends,
            p_dz=None if d_z is None else d_z.contiguous(),
            p_dz0=dz0,
            p_z_ends=z_ends,
            GV=p.H // p.Hv,
            V=p.V,
            BK=power_of_2(p.K),
            BV=BV,
            **p.chunked,
        )
        gradients_kernel[(p.count * p.H * NK,)](
            **p.ungated,
            G=prepared["G"],
            X=p.rows(X),
            **divided,
            dR=p.rows(dR),
            dq=p.rows(dq),
            dk=p.rows(dk),
            dg=p.rows(dg),
            de=p.rows(de),
            p_starts=starts,
            p_ends=ends,
            p_z_starts=z_starts,
            p_z_ends=z_ends,
            p_owners=p.owners,
            GV=p.H // p.Hv,
            V=p.V,
            BK=BK,
            BV=power_of_2(p.V, tl_.block),
            **p.chunked,
        )
    if dg is not None and p.common["DECAY"] == 1:
        dg = dg.sum(-1)
    gates = [dg, None if de is None else de.sum(-1), None if dw is None else dw.sum(-1)]
    gates = [None if x is None or like is None else x.to(like.dtype) for x, like in zip(gates, inputs[3:])]
    return [summed(dq, p.Hq, p.q), summed(dk, p.Hk, p.k), summed(dv, p.Hv, p.v), *gates, dS0, dz0]
