"""The problem that kernels solve: the inputs of `fwp.core.Core`, and what follows from their shapes.

Nothing here starts a kernel or waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from . import tiling
from .arguments import Phi, Switches
from .device import dot
from .tiling import Tiles, cdiv

INTERPRETED = isinstance(dot, InterpretedFunction)  # TRITON_INTERPRET=1 when Triton was imported
MAPS = (None, "relu", "elu+1", "exp")
NORMS = (None, "sum", "l2")
TYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of `fwp.core.Core` in its letters, n = writes."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, n·T, Hk, D]
    v: Tensor  # [B, n·T, Hv, V]
    g: Tensor | None  # [B, n·T, H] or [B, n·T, H, K]
    a: Tensor | None  # [B, n·T, H, K]
    e: Tensor | None  # [B, n·T, H]
    w: Tensor | None  # [B, n·T, H]
    S: Tensor | None  # [N, H, K, V]
    z: Tensor | None  # [N, H, K]
    cu_seqlens: Tensor | None  # [N + 1], in tokens of q
    read_before: bool
    eps: float | None = None  # None: no denominator
    feature_map: str | None = None  # still to be applied to q and k: one of MAPS or "dpfp-ν", a norm, and q's scale
    norm: str | None = None
    scale: float = 1.0
    writes: int = 1
    erase_before_decay: bool = False
    chunk: int | None = None  # tokens of a chunk; None: the table's
    segment: int | None = None  # chunks of a segment; 0: sequences aren't cut; None: `packing.segment_length` decides
    warps: int | None = None  # the most warps per program; None: as tuned
    gpu: str | None = None  # the architecture to choose block sizes for; None: that of v's device

    @property
    def B(self) -> int:
        """Rows of the batch."""
        return self.q.shape[0]

    @property
    def T(self) -> int:
        """Tokens of q."""
        return self.q.shape[1]

    @property
    def tokens(self) -> int:
        """n·T, the tokens of k."""
        return self.writes * self.q.shape[1]

    @property
    def V(self) -> int:
        """Value features."""
        return self.v.shape[3]

    @cached_property
    def K(self) -> int:
        """Key features of the state."""
        return 2 * self.nu * self.k.shape[3] if self.nu else self.k.shape[3]

    @property
    def nu(self) -> int:
        """ν of DPFP, 0 for other feature maps."""
        return 0 if self.feature_map in MAPS else int(str(self.feature_map).removeprefix("dpfp-"))

    @cached_property
    def H(self) -> int:
        """State heads."""
        return max(self.k.shape[2], self.v.shape[2])

    @cached_property
    def readers(self) -> int:
        """Heads of the output."""
        return max(self.q.shape[2], self.H)

    @property
    def N(self) -> int:
        """Sequences."""
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def empty(self) -> bool:
        """Whether there is no token."""
        return self.T == 0 or self.N == 0

    @property
    def erases(self) -> bool:
        """Whether anything is removed before a write."""
        return self.e is not None or self.a is not None

    @property
    def decay(self) -> int:
        """0 none, 1 per head, 2 per key channel."""
        return 0 if self.g is None else self.g.dim() - 2

    @property
    def gate_width(self) -> int:
        """Gates per head."""
        return self.K if self.decay == 2 else 1

    @property
    def maps_alone(self) -> bool:
        """Whether each feature is mapped alone, so that `gradients` can take its slope."""
        return not self.nu and self.norm is None

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of states, sums and everything but operands of matrix products."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32

    @property
    def operand(self) -> torch.dtype:
        """The dtype of operands. The interpreter's bfloat16 arithmetic is wrong, its loads and stores are right.

        Quotients by small denominators leave the range of float16, so their operands are float32.
        """
        if self.v.dtype == torch.float16 and self.eps is not None:
            return torch.float32
        return torch.float32 if INTERPRETED and self.v.dtype == torch.bfloat16 else self.v.dtype

    @cached_property
    def borders(self) -> Tensor | None:
        """The borders of packed sequences, in tokens of k."""
        if self.cu_seqlens is None or self.writes == 1:
            return self.cu_seqlens
        return self.cu_seqlens * self.writes

    @cached_property
    def tiles(self) -> Tiles:
        """Block sizes."""
        gpu, denominator = self.gpu or tiling.architecture(self.v.device), self.eps is not None
        return tiling.tiles(self.K, self.V, self.operand, self.decay, self.erases, gpu, denominator)

    @property
    def C(self) -> int:
        """Tokens of a chunk."""
        return self.chunk or self.tiles.chunk

    @property
    def chunks(self) -> int:
        """Chunks of a batch row."""
        return cdiv(self.tokens, self.C)

    @cached_property
    def k_phi(self) -> Phi:
        """The feature map and norm of k."""
        number = 4 if self.nu else MAPS.index(self.feature_map)
        return Phi(self.K, self.k.shape[3], number, NORMS.index(self.norm), 1.0)

    @property
    def q_phi(self) -> Phi:
        """The feature map, norm and scale of q."""
        k_phi = self.k_phi
        return k_phi if self.scale == 1.0 else k_phi._replace(SCALE=self.scale)

    @property
    def switches(self) -> Switches:
        """The constants that kernels are compiled for."""
        K, Hq, Hk, Hv = self.K, self.q.shape[2], self.k.shape[2], self.v.shape[2]
        H, decay = max(Hk, Hv), self.decay
        readers = max(Hq, H)
        least = torch.finfo(self.accumulator).tiny * 64  # as in `fwp.core.denominators`
        return Switches(
            H=H,
            HEADS_PER_K=H // Hk,
            HEADS_PER_V=H // Hv,
            HEADS_PER_Q=readers // Hq,
            READERS=readers // H,
            K=K,
            V=self.v.shape[3],
            Q_PHI=self.q_phi,
            K_PHI=self.k_phi,
            C=self.C,
            CHECKPOINT_EVERY=self.tiles.checkpoint_every,
            DECAY=decay,
            GATE_WIDTH=K if decay == 2 else 1,
            READ_BEFORE=self.read_before,
            ERASE_BEFORE_DECAY=self.erase_before_decay and decay > 0 and self.erases,
            WRITES=self.writes,
            EPS=self.eps,
            LEAST=least if self.eps is not None and self.eps < least else 0.0,
            DOT=TYPES[self.operand],
            ACC=TYPES[self.accumulator],
        )
