"""The one recurrence that every fast backend serves.

Per sequence and state head, with S of shape [K, V] kept in float32 (float64 for float64 inputs)::

    S ← Diag(exp g_t) S + k_t (w_t v_t − e_t S'ᵀ a_t)ᵀ     S' is S after this decay, or before it
    o_t = Sᵀ q_t                                   read "after" this update, or S before it
    z ← Diag(exp g_t) z + k_t,  o_t ← o_t / (zᵀ q_t + eps)   with denominator=True, 0 where zᵀ q_t = 0

The erase key a_t is k_t unless it is given. With n writes per read, the first line runs n times for each o_t.
A rule *lowers* onto this recurrence by choosing g, a, e and w, or by changing k and v; see `fwp.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from fwp import errors
from fwp._torch_private import constant_under_compile, inside_dual_level, inside_transform, tree_leaves, tree_map

Read = Literal["after", "before"]
Form = Literal["recurrent", "chunk"]


class Carried:
    """What every kind of state can do: a named tuple, tuple or mapping of tensors, of None and of such states.

    A subclass adds it beside its fields. `torch.load` takes it with its safe default then.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        torch.serialization.add_safe_globals([cls])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, self)

    def select(self, indices: Tensor | Sequence[int]) -> Self:
        """The sequences of these indices [M], in their order: to reorder beams, repeat a prompt, or drop what ended.

        indices: int64, along the first axis; negative ones count from its end. TypeError and ValueError for others.
        """
        if not isinstance(indices, Tensor):
            indices = torch.tensor(indices, dtype=torch.int64)
        errors.tensor("indices", indices, (None,), torch.int64)
        sizes = {len(x) for x in tree_leaves(self) if isinstance(x, Tensor)}
        if indices.device.type == "cpu" and not torch.compiler.is_compiling():
            for N in sizes:
                if not all(-N <= n < N for n in indices.tolist()):
                    raise ValueError(f"indices: expected integers in [{-N}, {N}), got {indices.tolist()}")
        return self._each(lambda x: x[indices.to(x.device)])

    def detach(self) -> Self:
        """The same numbers without their history, in the same memory: to cut backpropagation through time."""
        return self._each(Tensor.detach)

    def clone(self) -> Self:
        """A copy in memory of its own. Gradients flow through it."""
        return self._each(Tensor.clone)

    def to(
        self, device: torch.device | str | int | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The state on a device, and in the dtype that goes with inputs of `dtype`.

        That is float64 for float64, and float32 for all others: a state is never kept in 16 bits.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype not in (None, *errors.FLOATS):
            raise TypeError(f"dtype: expected a floating dtype of 16 to 64 bits, got {dtype}")
        kept = None if dtype is None else state_dtype(dtype)
        return self._each(lambda x: x.to(device, kept if x.is_floating_point() else None))

    @property
    def nbytes(self) -> int:
        """The bytes that its tensors take."""
        return sum(x.nbytes for x in tree_leaves(self) if isinstance(x, Tensor))


class _State(NamedTuple):
    S: Tensor
    z: Tensor | None = None


class State(_State, Carried):
    """The fast weights of one layer: everything that is remembered of the past.

    S: [N, H, K, V], float32 or float64; N sequences, H state heads, K key features, V value features.
    z: [N, H, K], the running sum of keys, or None without attention normalisation.
    """

    __slots__ = ()


class _ScaledState(NamedTuple):
    S: Tensor
    z: Tensor
    log_scale: Tensor


class ScaledState(_ScaledState, Carried):
    """A `State` in units that keep exponential features in range: the fast weights are exp(log_scale) ⊙ S.

    Calls with a denominator return it for maps such as "exp" and "favor+", without a feature norm. See `fwp.units`.
    S: [N, H, K, V]. z: [N, H, K]. log_scale: [N, H, K], or [N, H, 1] for rules that erase.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Features:
    """The feature map that a backend is to apply as it reads q and k: q ← scale · norm(φ(q)), k ← norm(φ(k)).

    phi: "relu", "elu+1", "exp", "dpfp-ν", or None for φ(x) = x. norm: "sum", "l2" or None. See `fwp.feature_maps`.
    """

    phi: str | None = None
    norm: str | None = None
    scale: float = 1.0

    def width(self, D: int) -> int:
        """K', the width of φ(x) where x has D features."""
        if self.phi is None or not self.phi.startswith("dpfp-"):
            return D
        return 2 * D * int(self.phi.removeprefix("dpfp-"))


@dataclass(frozen=True)
class Core:
    """The inputs of the recurrence above. Letters: B batch, T time, H state heads, K key and V value features.

    Tokens: q has T, and k, v and the gates have n·T, with n = `writes`. Token t of q reads after writes
    n·t … n·t + n − 1, or before all of them.
    Heads: Hk and Hv divide H = max(Hk, Hv), and Hq is a multiple or a divisor of H. State head h uses key head
    h // (H / Hk) and value head h // (H / Hv). Where Hq ≥ H, query head i reads state head i // (Hq / H).
    Features: q is already scaled, and q and k have passed the feature map and its norm. What is left to do stands in
    `features`.
    Mask: masked tokens arrive with v = 0, neutral gates, and a k whose φ is 0. Their output is discarded.
    Packed sequences: with cu_seqlens [N + 1], which counts tokens of q, B is 1 and there are N states. Else N = B.
    """

    q: Tensor  # [B, T, Hq, K]
    k: Tensor  # [B, n·T, Hk, K]
    v: Tensor  # [B, n·T, Hv, V]
    g: Tensor | None = None  # decay in log space ≤ 0: [B, n·T, H] or [B, n·T, H, K]; None: no decay
    a: Tensor | None = None  # erase key, after any feature map: [B, n·T, H, K], in k's or the state's dtype; None: k
    e: Tensor | None = None  # erase strength: [B, n·T, H]; None: 1 if `a` is given, else nothing is erased
    w: Tensor | None = None  # write strength: [B, n·T, H]; None: 1
    S: Tensor | None = None  # initial state [N, H, K, V]; None: 0
    z: Tensor | None = None  # initial sum of keys [N, H, K]; None: 0
    cu_seqlens: Tensor | None = None
    read: Read = "after"
    denominator: bool = False
    eps: float = 1e-6
    causal: bool = True
    features: Features = Features()
    writes: int = 1  # n
    erase_before_decay: bool = False  # whether the erase key reads S before the decay of its own token
    rescale: Tensor | None = None  # one more decay, of S and z, as g: their units grow. `lower` leaves it as it is

    @property
    def erases(self) -> bool:
        """Whether anything is removed before a write."""
        return self.e is not None or self.a is not None

    @property
    def width(self) -> int:
        """K, the number of key features of the state."""
        return self.features.width(self.k.shape[-1])

    @property
    def heads(self) -> int:
        """H, the number of state heads."""
        return max(self.k.shape[2], self.v.shape[2])

    @property
    def sequences(self) -> int:
        """N, the number of sequences."""
        return self.k.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of state, gates and all accumulation."""
        return state_dtype(self.v.dtype)

    @property
    def wants_gradients(self) -> bool:
        """Whether autograd may ask for a gradient of these inputs."""
        given = (self.q, self.k, self.v, self.g, self.a, self.e, self.w, self.S, self.z)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)

    def initial(self) -> State:
        """The initial state, zeros where none was given."""
        shape = (self.sequences, self.heads, self.width, self.v.shape[-1])
        S = self.v.new_zeros(shape, dtype=self.dtype) if self.S is None else self.S
        if not self.denominator:
            return State(S)
        return State(S, self.v.new_zeros(shape[:3], dtype=self.dtype) if self.z is None else self.z)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast is off on the device of x. Meta tensors have no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


_overwrites: ContextVar[bool] = ContextVar("_overwrites", default=False)


@contextmanager
def overwriting() -> Iterator[None]:
    """A context in which a backend may write the new S over the given one, for a layer that owns its state."""
    token = _overwrites.set(True)
    try:
        yield
    finally:
        _overwrites.reset(token)


def overwrites() -> bool:
    """Whether a backend may write over S. Never while torch.compile traces."""
    return not torch.compiler.is_compiling() and _overwrites.get()


_exports: ContextVar[bool] = ContextVar("_exports", default=False)


@contextmanager
def exporting() -> Iterator[None]:
    """A context in which what `torch.export` traces is meant for ONNX."""
    token = _exports.set(True)
    try:
        yield
    finally:
        _exports.reset(token)


def exports() -> bool:
    """Whether this is traced for ONNX, here or by `torch.onnx.export`. torch.compile, which isn't, can't trace this."""
    return not torch.compiler.is_dynamo_compiling() and (_exports.get() or torch.onnx.is_in_onnx_export())


def differentiable(state: Any) -> Any:
    """The state, with copies of tensors that were made in inference mode: outside it autograd can't save them.

    Compiled functions get it as it is, since torch.compile can't ask tensors for this.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return state
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, state)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, else float32. A bf16 state drifts by percents within a few thousand tokens."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b = 0, with finite gradients there.

    It is (a/c) / (b/c) with c = b as a constant. The gradient of a/b divides by b², which is 0 in float32 from
    b = 1e-23 on, where this one only divides by b.
    """
    zero = b == 0
    c = b.detach().masked_fill(zero, 1)
    return (a / c / (b / c).masked_fill(zero, 1)).masked_fill(zero, 0)


def denominators(found: Tensor, eps: float) -> Tensor:
    """zᵀq + eps, 0 where zᵀq = 0. Where eps is smaller, a zᵀq near the least number of the dtype counts as 0."""
    least = torch.finfo(found.dtype).tiny * 64
    return torch.where(found.abs() < least if eps < least else found == 0, 0, found + eps)


def retrieval(z: Tensor, k: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """c α k and c zᵀ α k [..., 1]: Sᵀ of the first over the second is what attention normalisation retrieves.

    z, k [..., K], and α = exp g with g [..., 1 or K]. The factor c cancels. It makes the largest feature of α k 1 in
    time, so that only decays that are 0 in float64 erase nothing. A divisor near the least number of the dtype is 0:
    the state is lost in this dtype, and what is divided by it could overflow.
    """
    size = _largest(k)
    if g is not None:
        k = k / size
        top = g.detach().masked_fill(k == 0, -torch.inf).amax(-1, keepdim=True).clamp(min=-745)
        k = (g - top).clamp(max=0).exp() * k
    k = k / _largest(k)
    found = (z * k).sum(-1, keepdim=True)
    lost = found.abs() < torch.finfo(found.dtype).tiny * 64 * size.clamp(min=1)
    return k, found.masked_fill(lost, 0)


def _largest(k: Tensor) -> Tensor:
    """The largest |feature| of k, 1 where all are 0, as a constant of the gradient: [..., 1]."""
    top = k.detach().abs().amax(-1, keepdim=True)
    return top.masked_fill(top == 0, 1)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hx, …] → [B, T, heads, …]: each of the Hx heads is repeated heads / Hx times."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def within(cu_seqlens: Tensor, T: int) -> Tensor:
    """The borders of packed sequences, moved into [0, T] and made never to decrease.

    Nobody waits for a GPU to look at borders there. So wrong ones must not make a kernel read out of range.
    """
    return cu_seqlens.clamp(0, T).cummax(0).values


def sequence_of(borders: Tensor, T: int) -> Tensor:
    """The sequence of each of T tokens [T], by borders [N + 1]. Tokens behind the last border are in the last one."""
    t = torch.arange(T, device=borders.device)
    return torch.searchsorted(borders[1:].contiguous(), t, right=True).clamp(max=len(borders) - 2)


def check_bounds(cu_seqlens: Tensor, T: int) -> None:
    """ValueError unless the borders of packed sequences start at 0, never decrease and end at T."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in pairwise(bounds)):
        shown = str(bounds) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:4]))}, …, {bounds[-1]}]"
        raise ValueError(f"cu_seqlens: must start at 0, not decrease, and end at T = {T}; got {shown}")


def opaque() -> bool:
    """Whether loops over T should run inside opaque ops: torch.compile would recompile them for every T.

    Inside vmap, grad or jvp they should not: those can't see into an op, and a jvp would silently be 0.
    """
    return torch.compiler.is_compiling() and not _transformed()


@constant_under_compile
def _transformed() -> bool:
    """Whether torch.func is active: a constant of each trace, since torch.compile guards on surrounding transforms."""
    return inside_transform()


def refuse_forward_derivatives() -> None:
    """Raises under forward derivatives: opaque ops would silently drop the tangents."""
    if inside_dual_level():
        raise RuntimeError("forward derivatives are not supported under torch.compile; call fast_weights in eager mode")
