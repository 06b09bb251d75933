"""The recurrence on the Triton kernels of `fwp.kernels`, forward and backward as opaque ops of torch.

They serve no decay, one a head or one a key channel, with or without erasing, erase and write strengths one a head.
Triton is imported when the first kernel runs, so that the ops and their shapes are known wherever torch is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fwp.core import Core, Form, State
from fwp.rules.reference import ratio

MAX_FEATURES = 1024


def refuses(core: Core, form: Form) -> str | None:
    """Why these inputs can't be served, in one line; None: they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    device = core.v.device.type
    if device not in ("cuda", "cpu") or (device == "cpu" and not _interpreted()):
        return f"expected CUDA tensors, got {device}; TRITON_INTERPRET=1, set before Triton loads, interprets on CPU"
    for name, gate in (("e", core.e), ("w", core.w)):
        if gate is not None and gate.dim() == 4:
            return f"{name}: expected one strength a head [B, T, H], got one a channel {tuple(gate.shape)}"
    for name, size in (("K", core.k.shape[-1]), ("V", core.v.shape[-1])):
        if not 1 <= size <= MAX_FEATURES:
            return f"{name}: expected 1 to {MAX_FEATURES} features, got {size}"
    return None


def _interpreted() -> bool:
    """Whether Triton runs the kernels on a CPU, in Python."""
    from fwp.kernels.launch import INTERPRETED

    return bool(INTERPRETED)


def run(core: Core, form: Form, chunk: int | None = None) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V], and the final state.

    chunk: tokens at a time, a power of 2 up to 64 (on a GPU from 16); None chooses by K and dtype.
    RuntimeError for a second derivative, a forward derivative and vmap, which the kernels don't have.
    """
    numerator, S = _walk(core, form, chunk, core.dtype if core.denominator else core.v.dtype)
    if not core.denominator:
        return numerator, State(S)
    # z is the state of the same recurrence with nothing erased and v = 1, in the state's dtype
    one = core.v.new_ones((), dtype=core.dtype).expand(*core.k.shape[:2], core.heads, 1)
    z = None if core.z is None else core.z.unsqueeze(-1)
    found, z = _walk(replace(core, v=one, e=None, w=None, S=z), form, chunk, core.dtype)
    return ratio(numerator, torch.where(found == 0, 0, found + core.eps)), State(S, z.squeeze(-1))


def _walk(core: Core, form: Form, chunk: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs without denominator, in `dtype`, and the final S."""
    tensors = (core.q, core.k, core.v, core.g, core.e, core.w, core.S)
    forward: Callable[..., tuple[Tensor, Tensor]] = _forward
    if not torch.compiler.is_compiling():
        if any(_has_tangent(x) for x in tensors):
            raise RuntimeError("forward derivatives are not supported by the triton backend; use backend='torch'")
        forward = _Forward.apply
    before = core.read == "before"
    o, S = forward(*tensors, core.cu_seqlens, before and core.causal, form, chunk, dtype)
    if not core.causal:  # everybody reads the final state: a walk that writes nothing
        nothing = [x.new_zeros(()).expand(x.shape) for x in (core.k, core.v)]
        o, _ = forward(core.q, *nothing, None, None, None, S, core.cu_seqlens, False, form, chunk, dtype)
    return o, S


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@torch.library.custom_op("fwp::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    form: str,
    chunk: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from fwp.kernels.launch import Problem, forward

    return forward(Problem(q, k, v, g, e, w, S, cu_seqlens, before, chunk), form, dtype)


@torch.library.custom_op("fwp::triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    chunk: int | None,
    d_o: Tensor | None,
    d_S: Tensor | None,
) -> list[Tensor]:
    from fwp.kernels.launch import Problem, backward

    grads = backward(Problem(q, k, v, g, e, w, S, cu_seqlens, before, chunk), d_o, d_S)
    return [q.new_empty(0) if x is None else x for x in grads]


@_forward.register_fake
def _(q, k, v, g, e, w, S, cu_seqlens, before, form, chunk, dtype):  # type: ignore[no-untyped-def]
    core = Core(q, k, v, cu_seqlens=cu_seqlens)
    o = q.new_empty(*q.shape[:2], max(q.shape[2], core.heads), v.shape[-1], dtype=dtype)
    return o, q.new_empty(core.sequences, core.heads, k.shape[-1], v.shape[-1], dtype=core.dtype)


@_backward.register_fake
def _(q, k, v, g, e, w, S, cu_seqlens, before, chunk, d_o, d_S):  # type: ignore[no-untyped-def]
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, g, e, w, S)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.before, _, ctx.chunk, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_S: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    backward: Callable[..., Sequence[Tensor]] = _backward if torch.compiler.is_compiling() else _Backward.apply
    grads = backward(*tensors, ctx.before, ctx.chunk, d_o, d_S)
    return *(None if x is None else grad for x, grad in zip(tensors, grads)), None, None, None, None, None


def _second(ctx: Any, *_: Any) -> None:
    raise RuntimeError("double backward is not supported by the triton backend; use backend='torch'")


# Traced graphs see the ops. In eager mode torch.func needs functions: an op's own gradient stands in its way.
_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_second)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _forward(*inputs)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_backward(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_second)
