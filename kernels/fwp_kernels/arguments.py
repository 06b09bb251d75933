"""Named tuples of the kernels' arguments: the tensors of a call, and the constants that kernels are compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """A tensor [B, T, heads, features] whose features are contiguous in memory."""

    pointer: Tensor
    batch: int  # strides
    token: int
    head: int


class Inputs(NamedTuple):
    """The inputs of the recurrence. Each token of q has n = WRITES tokens of k, v and the gates."""

    q: Strided  # [B, T, Hq, D]
    k: Strided  # [B, n·T, Hk, D]
    v: Strided | None  # [B, n·T, Hv, V]; None: nothing is written
    G: Strided | None = None  # [B, n·T, H, GATE_WIDTH], running sums of the gates in each chunk; None: no decay
    a: Strided | None = None  # [B, n·T, H, K], erase keys; None: φ(k)
    e: Strided | None = None  # [B, n·T, H, 1]; None: 1 if something is erased
    w: Strided | None = None  # [B, n·T, H, 1]; None: 1
    q_norms: Strided | None = None  # [B, T, Hq, 1], factors of φ(q)'s norm; None: a block holds all features
    k_norms: Strided | None = None  # [B, n·T, Hk, 1]


class OutputGradients(NamedTuple):
    """The gradient of the outputs, and with a denominator also n and the gradient of n."""

    d_o: Strided | None = None  # [B, T, H·READERS, V]; None: 0
    den: Strided | None = None  # [B, T, H·READERS, 1]; None: no denominator
    d_den: Strided | None = None  # [B, T, H·READERS, 1]


class States(NamedTuple):
    """S and z at several places, or their gradients. None means 0 for an input, and not wanted for an output."""

    S: Tensor | None = None  # [·, H, K, V]
    z: Tensor | None = None  # [·, H, K]


class Packing(NamedTuple):
    """Places of packed sequences, or of their segments if sequences are cut. All None without packing."""

    borders: Tensor | None = None  # [segments + 1], in tokens of k
    slots: Tensor | None = None  # [segments], the slot of each segment's first chunk
    owners: Tensor | None = None  # [slots], the segment of each chunk


class Phi(NamedTuple):
    """How x with D features becomes SCALE · norm(φ(x)) with K features. `features.py` explains MAP and NORM."""

    K: int
    D: int
    MAP: int
    NORM: int
    SCALE: float


class Switches(NamedTuple):
    """The constants of a problem. A kernel is compiled anew for each combination of them."""

    H: int  # state heads
    HEADS_PER_K: int  # state heads that share a key head
    HEADS_PER_V: int  # state heads that share a value head
    HEADS_PER_Q: int  # readers that share a query head
    READERS: int  # readers of a state head
    K: int
    V: int
    Q_PHI: Phi
    K_PHI: Phi
    C: int  # tokens of a chunk
    CHECKPOINT_EVERY: int  # chunks between the states that are kept for the backward
    DECAY: int  # 0 none, 1 per head, 2 per key channel
    GATE_WIDTH: int  # gates per head: 1, or K
    READ_BEFORE: bool  # o is read before the update of its token
    ERASE_BEFORE_DECAY: bool  # what is erased is found before the decay of its token
    WRITES: int  # tokens of k, v and the gates per token of q
    EPS: float | None  # None: no denominator
    LEAST: float  # a zᵀq below it counts as 0
    DOT: Any  # Triton's dtype of the operands of matrix products
    ACC: Any  # Triton's dtype of everything else
