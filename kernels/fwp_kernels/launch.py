"""Grids, block sizes and buffers: what stands between tensors and kernels."""

from __future__ import annotations

import csv
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .chunk import pairs_kernel, sums_kernel, walk_kernel
from .chunk_back import denominator_back_kernel, gradients_kernel, walk_back_kernel
from .features import features_back_kernel, norms_kernel
from .recurrent import token_kernel
from .segments import join_kernel

INTERPRETED = isinstance(walk_kernel, InterpretedFunction)  # TRITON_INTERPRET=1 when Triton was imported
MAPS = (None, "relu", "elu+1", "exp")
NORMS = (None, "sum", "l2")
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
    apart: int = 2  # chunks between the states that the walks of the backward keep; `gradients` makes the others again


# By bytes of a matrix product's operand: (K up to, tiles). Chosen so that registers and shared memory hold them.
TABLE: dict[int, list[tuple[int, Tiles]]] = {
    2: [
        (64, Tiles(64, 64)),
        (128, Tiles(64, 64)),
        (256, Tiles(32, 32)),
        (512, Tiles(16, 32)),
        (1024, Tiles(16, 16)),
    ],
    4: [
        (64, Tiles(32, 32, 32)),
        (256, Tiles(16, 32, 32)),
        (512, Tiles(16, 16, 32, stages=1)),
        (1024, Tiles(16, 16, 32, stages=1)),
    ],
    8: [(64, Tiles(16, 16, 16, stages=1)), (1024, Tiles(16, 16, 16, stages=1))],
}


KEPT = 128  # tokens in which a state is kept for the backward, at least
ROWS = 16  # tokens of a program where tokens don't meet


@cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90" or "gfx942"; the first in the interpreter, too."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


MEASURED = Path(__file__).with_name("tiles.csv")  # what `fwp bench --tune` found, if it was run
KEY = ("architecture", "decay", "erase", "K", "V", "dtype")


@cache
def measured() -> dict[tuple[str, ...], Tiles]:
    """The rows of that table by KEY."""
    if not MEASURED.exists():
        return {}
    with MEASURED.open(encoding="utf-8") as file:
        return {
            tuple(row[name] for name in KEY): Tiles(*(int(row[field.name]) for field in fields(Tiles)))
            for row in csv.DictReader(file)
        }


def key(K: int, V: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str) -> tuple[str, ...]:
    sizes = (architecture, decay, int(erase), power_of_2(K), power_of_2(V))
    return (*map(str, sizes), str(dtype).removeprefix("torch."))


def tiles(
    K: int, V: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str, denominator: bool = False
) -> Tiles:
    """What was measured for this cell, these sizes and this GPU without a denominator, else what the rule says."""
    table = {} if denominator else measured()
    row = table.get(key(K, V, dtype, decay, erase, architecture)) if table else None
    return row or by_rule(K, dtype, decay, erase, architecture, denominator)


@cache
def by_rule(K: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str, denominator: bool = False) -> Tiles:
    """TABLE's row for K key features and operands of `dtype`, narrower where a cell or a GPU needs room."""
    row = next(row for limit, row in TABLE[dtype.itemsize] if limit >= K)
    if decay == 2:
        row = replace(row, walk=max(16, row.walk // 2 if K > 64 else row.walk), block=max(16, row.block // 2))
    if erase:
        row = replace(row, walk=min(row.walk, 32), block=min(row.block, 32))
    if architecture.startswith("gfx"):  # warps of 64 threads, twice the registers, a quarter of the shared memory
        row = replace(row, chunk=min(row.chunk, 32 if decay == 2 else 64), warps=4, stages=1)
    elif not 90 <= int(architecture.removeprefix("sm_")) < 120:  # operands of matrix products stand in registers
        stages = 1 if K > (128 if decay == 2 else 512) else row.stages  # some have 99 KiB of shared memory
        row = replace(row, chunk=min(row.chunk, 32), walk=min(row.walk, 32), block=16, stages=stages)
    if denominator and K > 64 and (erase or decay < 2):  # z and its sums take registers
        walk = min(row.walk, 16) if erase else row.walk
        block = min(row.block, 16) if erase else row.block
        row = replace(row, chunk=min(row.chunk, 32), walk=walk, block=block, stages=1 if K > 512 else row.stages)
    # A state [K, V] takes K V / C numbers a token to write and to read: more than all inputs where C is small. To make
    # it again takes a product or two of K V, and neighbours read the same kept one at the same time. Where `gradients`
    # has no registers left, every state is kept.
    apart = 1 if erase and (decay == 2 or denominator) else (KEPT if dtype.itemsize == 2 else KEPT // 2) // row.chunk
    return replace(row, apart=max(1, min(4, apart)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds to find out that it isn't in a kernel."""
    return -(-a // b)


def power_of_2(n: int, most: int = 1024) -> int:
    """The block that holds n features: a power of 2 from 16, the least that matrix instructions take, to `most`."""
    return min(most, max(16, 1 << (n - 1).bit_length()))


SHORTEST = 8  # chunks of a segment, at least: less is not worth the launches


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at once: a walk takes the registers of a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_length(chunks: int, sequences: int, fill: int, least: int) -> int:
    """How many chunks a segment has where a walk is cut into segments that run side by side; 0: it is not cut.

    As long as `fill` segments of all `chunks` make them, but only where the sequences have `least` segments or more on
    average. A pure function of shapes and the GPU: the same call always computes the same.
    """
    length = max(SHORTEST, cdiv(chunks, max(1, fill)))
    return length if chunks >= least * sequences * length else 0


class Layout(NamedTuple):
    """Where chunks and segments lie. Packed, all kernels take segments for the sequences."""

    cu: Tensor | None  # the segments' borders
    slots: Tensor | None  # where each segment's chunks begin
    owners: Tensor | None  # the segment of each chunk slot
    firsts: Tensor | None  # the first segment of each sequence
    chunks: int  # slots
    segments: int

    def kept(self, apart: int) -> int:
        """States that are kept, at most, as `kept_at` in tiles.py counts."""
        return (self.chunks + (self.segments + 1) * (apart - 1)) // apart


# Outputs of the walks, of which each call makes some.
WALKED: dict[str, Any] = dict.fromkeys(("o", "den", "X", "p_S", "p_starts", "p_z", "p_z_starts", "p_decay"))
WALKED_BACK: dict[str, Any] = dict.fromkeys(("dR", "dv", "dw", "p_dS0", "p_ends", "p_dz0", "p_z_ends"))


@dataclass
class Problem:
    """The inputs of `fwp.core.Core` that the kernels serve, and what follows from their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    a: Tensor | None
    e: Tensor | None
    w: Tensor | None
    S: Tensor | None
    z: Tensor | None
    cu_seqlens: Tensor | None
    before: bool  # read
    eps: float | None = None  # None: no denominator
    feature_map: str | None = None  # what q and k are yet to pass: one of MAPS or "dpfp-ν", a norm, and q's scale
    norm: str | None = None
    scale: float = 1.0
    writes: int = 1  # tokens of k, v and the gates for one of q
    erase_before_decay: bool = False
    chunk: int | None = None  # tokens of a chunk; None: the table's
    segment: int | None = None  # chunks of a segment, 0: sequences aren't cut; None: as `segment_length` says

    def __post_init__(self) -> None:
        self.B, self.Tq, self.Hq, self.D = self.q.shape
        self.T = self.writes * self.Tq
        nu = 0 if self.feature_map in MAPS else int(str(self.feature_map).removeprefix("dpfp-"))
        self.K = 2 * nu * self.D if nu else self.D
        self.phi = {"D": self.D, "MAP": 4 if nu else MAPS.index(self.feature_map), "NORM": NORMS.index(self.norm)}
        self.alone = not nu and self.norm is None  # each feature is mapped alone
        self.Hk, self.Hv, self.V = self.k.shape[2], self.v.shape[2], self.v.shape[3]
        self.H = max(self.Hk, self.Hv)
        self.Ho = max(self.Hq, self.H)
        self.N = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        self.acc = torch.float64 if self.v.dtype == torch.float64 else torch.float32
        # The interpreter's bfloat16 arithmetic is wrong, its loads and stores are right.
        self.dot = torch.float32 if INTERPRETED and self.v.dtype == torch.bfloat16 else self.v.dtype
        decay = 0 if self.g is None else self.g.dim() - 2
        self.erases = self.e is not None or self.a is not None
        gpu = architecture(self.v.device)
        self.tiles = tiles(self.K, self.V, self.dot, decay, self.erases, gpu, self.eps is not None)
        self.C = self.chunk or self.tiles.chunk
        self.chunks = cdiv(self.T, self.C)
        self.common: dict[str, Any] = {
            "T": self.T,
            "H": self.H,
            "GK": self.H // self.Hk,
            "GQ": self.Ho // self.Hq,
            "R": self.Ho // self.H,
            "K": self.K,
            **self.phi,
            "SCALE": self.scale,
            "DECAY": decay,
            "LAG": self.before,
            "ERASE_LAG": self.erase_before_decay and self.erases and decay > 0,
            "WRITES": self.writes,
            "ACC": TYPES[self.acc],
        }
        self.inputs = {name: self.rows(getattr(self, name)) for name in ("q", "k", "v", "g", "a", "e", "w")}
        self.ungated = {name: x for name, x in self.inputs.items() if name != "g"}
        self.kept_norms: list[Tensor] = []
        self.S, self.z = (None if x is None else x.contiguous() for x in (self.S, self.z))

    @cached_property
    def bounds(self) -> Tensor | None:
        """Where packed sequences begin in the tokens of k."""
        if self.cu_seqlens is None or self.writes == 1:
            return self.cu_seqlens
        return self.cu_seqlens * self.writes

    @cached_property
    def length(self) -> int:
        """Chunks of a segment, whole groups of those that share a kept state; 0: sequences aren't cut."""
        if self.empty:
            return 0
        length = self.segment
        if length is None:
            programs = self.H * cdiv(self.V, power_of_2(self.V, self.tiles.walk))
            # Cut, a walk takes the time of its segments' own states and of the outputs; with erasing also that of the
            # matrices, which are K wide.
            least = 3 + (cdiv(self.K, self.V) if self.erases else 0)
            fill = multiprocessors(self.v.device) // programs
            length = segment_length(self.B * self.chunks, self.N, fill, least)
        return cdiv(length, self.tiles.apart) * self.tiles.apart

    @cached_property
    def layout(self) -> Layout:
        """Made without asking the GPU: packed sequences have T // C + N chunks at most, and no more are launched."""
        length = self.length
        if self.bounds is None:
            per = cdiv(self.chunks, length) if length else 1
            return Layout(None, None, None, None, self.N * self.chunks, self.N * per)

        def starts(parts: Tensor, most: int) -> tuple[Tensor, Tensor]:
            """Where each sequence's parts begin, and the sequence of each of the `most` parts there can be."""
            ends = parts.cumsum(0)
            at = torch.arange(most, device=ends.device)
            return ends - parts, torch.searchsorted(ends, at, right=True).clamp_(max=len(parts) - 1)

        cu, firsts, segments = self.bounds.long(), None, self.N
        if length:
            size, segments = length * self.C, self.T // (length * self.C) + self.N
            counts = (cu.diff() + size - 1) // size
            first, of = starts(counts, segments)
            firsts = torch.cat([first, counts.sum(0, keepdim=True)])
            inner = torch.arange(segments, device=cu.device) - first[of]
            cu = torch.cat([torch.minimum(cu[of] + inner * size, cu[of + 1]), cu[-1:]])
        most = self.T // self.C + self.N
        slots, owners = starts((cu.diff() + self.C - 1) // self.C, most)
        return Layout(cu, slots, owners, firsts, most, segments)

    @cached_property
    def chunked(self) -> dict[str, Any]:
        """What all kernels of the chunk form take."""
        return self.common | {
            "p_cu": self.layout.cu,
            "p_slots": self.layout.slots,
            "NC": self.chunks,
            "C": self.C,
            "DOT": TYPES[self.dot],
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }

    @cached_property
    def walked(self) -> dict[str, Any]:
        """What the walks take beside it."""
        per = self.layout.segments // self.N  # without packing
        return (
            self.ungated
            | self.chunked
            | {"NS": per, "CS": self.length or self.chunks, "BK": power_of_2(self.K), "APART": self.tiles.apart}
        )

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

    def states(self, count: int) -> Tensor:
        return self.q.new_empty(count, self.H, self.K, self.V, dtype=self.acc)

    def vectors(self, count: int) -> Tensor | None:
        """For z, as many times: [count, H, K], None without denominator."""
        return None if self.eps is None else self.q.new_empty(count, self.H, self.K, dtype=self.acc)

    def buffer(self, heads: int, features: int, dtype: torch.dtype, tokens: int | None = None) -> Tensor:
        return self.q.new_empty(self.B, self.T if tokens is None else tokens, heads, features, dtype=dtype)

    def norms(self) -> dict[str, Any]:
        """By what the norm multiplies the features of each row of q and k [B, T, H, 1], where a kernel takes some."""
        if self.norm is None:
            return {"q_norms": None, "k_norms": None}
        if not self.kept_norms:
            for x in (self.q, self.k):
                found = self.buffer(x.shape[2], 1, self.acc, x.shape[1])
                norms_kernel[(self.B * x.shape[2] * cdiv(x.shape[1], ROWS),)](
                    x=self.rows(x),
                    norms=self.rows(found),
                    T=x.shape[1],
                    H=x.shape[2],
                    K=self.K,
                    BT=ROWS,
                    BK=power_of_2(self.K, 64),
                    ACC=TYPES[self.acc],
                    **self.phi,
                )
                self.kept_norms.append(found)
        return {name: self.rows(x) for name, x in zip(("q_norms", "k_norms"), self.kept_norms)}

    def inputs_gradient(self, name: str, d_features: Tensor) -> Tensor:
        """Of q or k [B, T, Hx, D] from that of the features [B, T, H or Ho, K] in ACC."""
        x = getattr(self, name)
        found = self.buffer(x.shape[2], self.D, x.dtype, x.shape[1])
        features_back_kernel[(self.B * x.shape[2] * cdiv(x.shape[1], ROWS),)](
            x=self.rows(x),
            norms=self.norms()[f"{name}_norms"],
            dy=self.rows(d_features),
            dx=self.rows(found),
            T=x.shape[1],
            H=x.shape[2],
            SHARE=d_features.shape[2] // x.shape[2],
            K=self.K,
            SCALE=self.scale if name == "q" else 1.0,
            BT=ROWS,
            BK=power_of_2(self.D, 64),
            ACC=TYPES[self.acc],
            **self.phi,
        )
        return found

    def prepare(self) -> dict[str, Any]:
        """What the kernels of the chunk form read beside q, k, v, e, w: G, P if the decay is per channel, (I + A)⁻¹."""
        decay, block = self.common["DECAY"], power_of_2(self.K, self.tiles.block)
        G = P = inverse = None
        if self.g is not None:
            features = self.K if decay == 2 else 1
            G = self.buffer(self.H, features, self.acc)
            BK = block if decay == 2 else 1
            sums_kernel[(self.layout.chunks * self.H * cdiv(features, BK),)](
                g=self.inputs["g"],
                G=self.rows(G),
                p_owners=self.layout.owners,
                KG=features,
                BK=BK,
                FLOOR=-800.0 if self.acc == torch.float64 else -104.0,
                **{name: self.chunked[name] for name in ("p_cu", "p_slots", "T", "NC", "H", "C", "ACC")},
            )
        if decay == 2:
            P = self.buffer(self.Ho, self.C, self.dot, self.Tq)
        if self.erases:
            inverse = self.buffer(self.H, self.C, self.dot)
        made = {"G": self.rows(G), "P": self.rows(P), "I": self.rows(inverse)}
        if P is not None or inverse is not None:
            pairs_kernel[(self.layout.chunks * self.H,)](
                **{name: self.inputs[name] for name in ("q", "k", "a", "e")},
                **self.norms(),
                **made,
                p_owners=self.layout.owners,
                BK=block,
                **self.chunked,
            )
        return made

    def walk(self, prepared: dict[str, Any], S0: Tensor | None, z0: Tensor | None, **outputs: Any) -> None:
        """From the states before each segment, None 0. Outputs: as `walk_kernel` names them."""
        BV = power_of_2(self.V, self.tiles.walk)
        given = self.walked | prepared | WALKED | {"EPS": self.eps, "GV": self.H // self.Hv, "V": self.V, "BV": BV}
        given |= {"p_S0": S0, "p_z0": z0} | outputs
        walk_kernel[(self.layout.segments * self.H * cdiv(given["V"], given["BV"]),)](**given)

    def walk_back(self, prepared: dict[str, Any], dS: Tensor | None, dz: Tensor | None, **others: Any) -> None:
        """From the gradients of the states after each segment. Others: as `walk_back_kernel` names them."""
        BV = power_of_2(self.V, self.tiles.walk)
        given = self.walked | prepared | WALKED_BACK | {"GV": self.H // self.Hv, "V": self.V, "BV": BV}
        given |= {"p_dS": dS, "p_dz": dz} | others
        walk_back_kernel[(self.layout.segments * self.H * cdiv(self.V, BV),)](**given)

    def segments(self, prepared: dict[str, Any]) -> dict[str, Tensor | None]:
        """N, M, decay and Nz of `join_kernel`: what each segment makes of a state of 0, and what it does to a state."""
        count = self.layout.segments
        N, Nz, M, decay = self.states(count), self.vectors(count), None, None
        if self.g is not None and (not self.erases or Nz is not None):
            decay = self.q.new_empty(count, self.H, self.K if self.common["DECAY"] == 2 else 1, dtype=self.acc)
        self.walk(prepared, None, None, p_S=N, p_z=Nz, p_decay=decay)
        if self.erases:
            M, BV = self.q.new_empty(count, self.H, self.K, self.K, dtype=self.acc), power_of_2(self.K, self.tiles.walk)
            self.walk(prepared, None, None, v=None, w=None, p_S=M, V=self.K, BV=BV, EPS=None)
        return {"p_N": N, "p_M": M, "p_decay": decay, "p_Nz": Nz}

    def join(
        self,
        segments: dict[str, Tensor | None],
        S0: Tensor | None,
        z0: Tensor | None,
        S: Tensor | None,
        z: Tensor | None,
        back: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """S and z before each segment, from S0 and z0 before the first. Those after the last go to S and z."""
        starts, z_starts = self.states(self.layout.segments), self.vectors(self.layout.segments)
        BK, BV = power_of_2(self.K), power_of_2(self.V, 16)
        join_kernel[(self.N * self.H * cdiv(self.V, BV),)](
            **segments,
            p_S0=S0,
            p_starts=starts,
            p_S=S,
            p_z0=z0,
            p_z_starts=z_starts,
            p_z=z,
            p_firsts=self.layout.firsts,
            NS=self.walked["NS"],
            **{name: self.common[name] for name in ("H", "K", "DECAY", "ACC")},
            V=self.V,
            BK=BK,
            BJ=min(BK, 32 if self.K <= 256 else 16),
            BV=BV,
            BACK=back,
            num_warps=8 if self.K > 64 else 4,
            num_stages=1,
        )
        return starts, z_starts

    def denominator_gradient(self, d_o: Tensor, o: Tensor, den: Tensor) -> Tensor:
        """[B, T, Ho, 1] of the outputs' [B, T, Ho, V]."""
        found = torch.empty_like(den)
        denominator_back_kernel[(self.B * self.Ho * cdiv(self.Tq, ROWS),)](
            do=self.rows(d_o),
            o=self.rows(o),
            den=self.rows(den),
            dden=self.rows(found),
            T=self.Tq,
            HO=self.Ho,
            V=self.V,
            BT=ROWS,
            BV=power_of_2(self.V, 64),
            ACC=TYPES[self.acc],
        )
        return found


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current GPU, which need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(p: Problem, form: str, over: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o [B, T, Ho, V] in v's dtype and the final S [N, H, K, V]; z [N, H, K] and denominators [B, T, Ho, 1] or None.

    over: the recurrent form writes S over the initial one, each block by the program that read it. z is read by the
    programs of all V blocks, so it gets a place of its own.
    """
    o = p.buffer(p.Ho, p.V, p.v.dtype, p.Tq)
    den = None if p.eps is None else p.buffer(p.Ho, 1, p.acc, p.Tq)
    S, z = p.S if over and p.S is not None else p.states(p.N), p.vectors(p.N)
    if p.empty:
        for x, start in ((S, p.S), (z, p.z)):
            if x is not None and x is not start:
                x.zero_() if start is None else x.copy_(start)
        return o, S, z, den
    with on_device(o):
        if form == "chunk":
            prepared = p.prepare()
            outputs: dict[str, Any] = {"o": p.rows(o), "den": p.rows(den)}
            if p.length:
                p.walk(prepared, *p.join(p.segments(prepared), p.S, p.z, S, z), **outputs)
            else:
                p.walk(prepared, p.S, p.z, p_S=S, p_z=z, **outputs)
        else:
            BK, BV = power_of_2(p.K), power_of_2(p.V, 32 if p.K <= 256 else 16)
            token_kernel[(p.N * p.H * cdiv(p.V, BV),)](
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
                p_cu=p.bounds,
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
    """Gradients of q, k, v, g, a, e, w, S, z, None for what is None.

    o, den: the outputs and their denominators, None without. d_o, d_S or d_z None: nothing flows from there.
    """
    inputs = [p.q, p.k, p.v, p.g, p.a, p.e, p.w]
    if p.empty:
        states = [
            None if x is None else torch.zeros_like(x) if d_x is None else d_x.clone()
            for x, d_x in ((p.S, d_S), (p.z, d_z))
        ]
        return [None if x is None else torch.zeros_like(x) for x in inputs] + states

    def head_buffer(heads: int, shared: int, like: Tensor) -> Tensor:
        """A gradient for each state head or reader: in the input's dtype, or for summing over those that share it."""
        return p.buffer(heads, like.shape[-1], like.dtype if heads == shared else p.acc, like.shape[1])

    def summed(x: Tensor, heads: int, like: Tensor) -> Tensor:
        """… and its sum over those that share a head."""
        return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3).to(like.dtype)

    NV, BK = cdiv(p.V, power_of_2(p.V, p.tiles.walk)), power_of_2(p.K, p.tiles.block)
    NK = cdiv(p.K, BK)
    d_S, d_z = (None if x is None else x.contiguous() for x in (d_S, d_z))
    X = p.buffer(p.H, p.V, p.dot) if p.erases else None
    dR = p.buffer(p.H, p.V, p.dot) if p.erases else None
    starts, ends = p.q.new_empty(2, p.layout.kept(p.tiles.apart), p.H, p.K, p.V, dtype=p.dot).unbind(0)
    dv = head_buffer(p.H, p.Hv, p.v)
    if p.alone:
        dq, dk = head_buffer(p.Ho, p.Hq, p.q), head_buffer(p.H, p.Hk, p.k)
    else:  # gradients of the features
        dq, dk = p.buffer(p.Ho, p.K, p.acc, p.Tq), p.buffer(p.H, p.K, p.acc)
    if d_o is None:
        dq.zero_()
    dw = p.buffer(p.H, NV, p.acc) if p.w is not None else None
    da = None if p.a is None else torch.empty_like(p.a, memory_format=torch.contiguous_format)
    de = p.buffer(p.H, NK, p.acc) if p.e is not None else None
    dg = p.buffer(p.H, p.K if p.common["DECAY"] == 2 else NK, p.acc) if p.g is not None else None
    dS0, dz0 = (None if x is None else torch.empty_like(x) for x in (p.S, p.z))
    z_starts, z_ends = p.vectors(p.layout.chunks), p.vectors(p.layout.chunks)
    with on_device(dq):
        d_den = None
        if d_o is None or o is None or den is None:
            den = None
        else:
            d_den = p.denominator_gradient(d_o, o, den)
        divided: dict[str, Any] = {"do": p.rows(d_o), "den": p.rows(den), "dden": p.rows(d_den)}
        prepared = p.prepare()
        before, after = (p.S, p.z), (d_S, d_z)
        starting: dict[str, Any] = {"p_dS0": dS0, "p_dz0": dz0}
        if p.length:
            segments = p.segments(prepared)
            before = p.join(segments, p.S, p.z, None, None)
            p.walk_back(prepared, None, None, p_dS0=segments["p_N"], p_dz0=segments["p_Nz"], **divided)
            after, starting = p.join(segments, d_S, d_z, dS0, dz0, back=True), {}
        p.walk(prepared, before[0], before[1], X=p.rows(X), p_starts=starts, p_z_starts=z_starts)
        outputs = {"dR": p.rows(dR), "dv": p.rows(dv), "dw": p.rows(dw), "p_ends": ends, "p_z_ends": z_ends}
        p.walk_back(prepared, after[0], after[1], **divided | outputs | starting)
        gradients_kernel[(p.layout.chunks * p.H * NK,)](
            **p.ungated,
            **p.norms(),
            G=prepared["G"],
            X=p.rows(X),
            **divided,
            dR=p.rows(dR),
            dq=p.rows(dq),
            dk=p.rows(dk),
            dg=p.rows(dg),
            da=p.rows(da),
            de=p.rows(de),
            p_starts=starts,
            p_ends=ends,
            p_z_starts=z_starts,
            p_z_ends=z_ends,
            p_owners=p.layout.owners,
            GV=p.H // p.Hv,
            V=p.V,
            BK=BK,
            BV=power_of_2(p.V, p.tiles.block),
            APART=p.tiles.apart,
            **p.chunked | {"num_stages": 1},
        )
        if p.alone:
            dq, dk = summed(dq, p.Hq, p.q), summed(dk, p.Hk, p.k)
        else:
            dq, dk = p.inputs_gradient("q", dq), p.inputs_gradient("k", dk)
    if dg is not None and p.common["DECAY"] == 1:
        dg = dg.sum(-1)
    gates = [dg, da, None if de is None else de.sum(-1), None if dw is None else dw.sum(-1)]
    gates = [None if x is None or like is None else x.to(like.dtype) for x, like in zip(gates, inputs[3:])]
    return [dq, dk, summed(dv, p.Hv, p.v), *gates, dS0, dz0]
