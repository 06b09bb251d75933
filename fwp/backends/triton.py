"""The recurrence on the Triton kernels of `fwp_kernels`, forward and backward as opaque ops of torch.

They serve every core: no decay, one per head or one per key channel, with or without erasing.
Triton is imported when the first kernel runs, so that the ops and their shapes are known wherever torch is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fwp import trust
from fwp._torch_private import (
    constant_under_compile,
    dispatch_modes,
    forward_derivatives_enabled,
    inside_derivative,
    inside_dual_level,
    inside_transform,
)
from fwp.core import Core, Features, Form, Read, State, overwrites
from fwp.feature_maps import applied

MAX_FEATURES = 1024


def refuses(core: Core, form: Form) -> str | None:
    """Why these inputs can't be served, in one line; None: they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    device = core.v.device.type
    if device not in ("cuda", "cpu") or (device == "cpu" and not _interpreted()):
        return f"expected CUDA tensors, got {device}; TRITON_INTERPRET=1, set before Triton loads, interprets on CPU"
    if torch.compiler.is_compiling() and _derives():
        return "torch.func.grad and jvp inside a compiled function don't see into its ops"
    for name, size in (("K", core.width), ("V", core.v.shape[-1])):
        if not 1 <= size <= MAX_FEATURES:
            return f"{name}: expected 1 to {MAX_FEATURES} features, got {size}"
    phi, norm, scale = core.features.phi, core.features.norm, core.features.scale
    more = phi is not None or norm is not None or scale != 1.0 or core.q.shape[2] > core.heads
    channels = core.g is not None and core.g.dim() == 4
    tiles = 4 if core.a is not None else 3 if more else 2
    most = widest(core.v.dtype.itemsize, channels, tiles, _shared_memory(core.v.device))
    if core.width > most and (form == "chunk" or core.wants_gradients):
        return f"K: expected at most {most} features of these inputs for the memory of this GPU, got {core.width}"
    return None


def widest(itemsize: int, channels: bool, tiles: int, memory: int) -> int:
    """K up to which the chunk form's tiles [16, K] fit into a program's shared memory.

    There are two, of inputs or of a decay per channel, three if a state has several readers or q and k pass features,
    and four with erase keys.
    """
    tile = 16 * max(itemsize, 4 if channels else 0)
    return next((K for K in (1024, 512, 256) if tiles * tile * K + 3072 <= memory), 128)


@constant_under_compile
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have. On AMD, where tiles pass through it one by one, as if it were twice as many."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 2**20
    from triton.compiler import max_shared_mem

    memory = int(max_shared_mem(device.index if device.index is not None else torch.cuda.current_device()))
    return memory if torch.version.hip is None else 2 * memory


def _interpreted() -> bool:
    """Whether Triton runs the kernels on a CPU, in Python."""
    from fwp_kernels.launch import INTERPRETED

    return bool(INTERPRETED)


@constant_under_compile
def _derives() -> bool:
    """Whether torch.func.grad or jvp is at work, asked while torch.compile traces."""
    return inside_derivative()


def run(core: Core, form: Form, chunk: int | None = None, segment: int | None = None) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V], and the final state.

    chunk: tokens at a time, a power of 2 up to 64 (on a GPU from 16); None chooses by K and dtype.
    segment: how many chunks walk in one go, beside others of the same sequence, 0: all; None chooses by the GPU's size.
    RuntimeError for a second derivative and a forward derivative, which the kernels don't have.
    """
    if not core.causal:
        core = applied(core)
    tensors = (core.q, core.k, core.v, core.g, core.a, core.e, core.w, core.S, core.z)
    before, eps = core.causal and core.read == "before", core.eps if core.denominator else None
    how = (core.features.phi, core.features.norm, core.features.scale, core.writes, core.erase_before_decay)
    if overwrites() and form == "recurrent" and core.causal:
        from fwp_kernels.launch import Problem
        from fwp_kernels.launch import forward as launch

        o, S, z, _ = launch(Problem(*tensors, core.cu_seqlens, before, eps, *how), form, over=True)
        return o, State(S, z)
    options = (eps, *how, chunk, segment, form)
    o, S, z, _ = _call(*tensors, core.cu_seqlens, before, *options)
    if not core.causal:  # everybody reads the final state: a walk that writes nothing
        nothing = [x.new_zeros(()).expand(x.shape) for x in (core.k, core.v)]
        end = S, z if core.denominator else None
        o, *_ = _call(core.q, *nothing, None, None, None, None, *end, core.cu_seqlens, False, *options)
    return o, State(S, z if core.denominator else None)


def _problem(*inputs: Any) -> Any:
    """What the launch layer takes, with sequences whole where the kernels that cut them are in doubt."""
    from fwp_kernels.launch import Problem

    problem = Problem(*inputs)
    if problem.segment is None and problem.length:
        q, k, v, g, a, e, w, S, z, cu_seqlens, before, eps, phi, norm, scale, writes, erase_before_decay, *_ = inputs
        read: Read = "before" if before else "after"
        core = Core(
            q,
            k,
            v,
            g,
            a=a,
            e=e,
            w=w,
            S=S,
            z=z,
            cu_seqlens=cu_seqlens,
            read=read,
            denominator=eps is not None,
            features=Features(phi, norm, scale),
            writes=writes,
            erase_before_decay=erase_before_decay,
        )
        if not trust.may_cut(core):
            problem.length = 0
    return problem


def _call(*inputs: Any) -> Sequence[Tensor]:
    """`_forward` by the shortest way: an op takes longer to call than all that it does before its kernels run."""
    if torch.compiler.is_compiling():
        return _forward(*inputs)
    grads = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if not grads and _plain(inputs):
        return _launch_forward(*inputs)
    return _Forward.apply(*inputs)


def _plain(inputs: Sequence[Any]) -> bool:
    """Whether the tensors are what they seem, and no mode or transform of torch sees what is done to them."""
    return (
        dispatch_modes() == 0
        and not inside_transform()
        and not inside_dual_level()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor))
    )


@torch.library.custom_op("fwp::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    eps: float | None,
    phi: str | None,
    norm: str | None,
    scale: float,
    writes: int,
    erase_before_decay: bool,
    chunk: int | None,
    segment: int | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, S, z and the denominators; empty tensors stand for None."""
    if inside_dual_level() and forward_derivatives_enabled():  # off where an autograd.Function called this
        _no_forward_derivative(None)
    return _launch_forward(
        q, k, v, g, a, e, w, S, z, cu_seqlens, before, eps, phi, norm, scale, writes, erase_before_decay,
        chunk, segment, form,
    )  # fmt: skip


def _launch_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fwp_kernels.launch import Problem, forward

    *given, form = inputs
    o, S, z, den = forward((Problem if form == "recurrent" else _problem)(*given), form)
    return o, S, o.new_empty(0) if z is None else z, o.new_empty(0) if den is None else den


@torch.library.custom_op("fwp::triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    e: Tensor | None,
    w: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    before: bool,
    eps: float | None,
    phi: str | None,
    norm: str | None,
    scale: float,
    writes: int,
    erase_before_decay: bool,
    chunk: int | None,
    segment: int | None,
    o: Tensor | None,
    den: Tensor | None,
    d_o: Tensor | None,
    d_S: Tensor | None,
    d_z: Tensor | None,
) -> list[Tensor]:
    return _launch_backward(
        q, k, v, g, a, e, w, S, z, cu_seqlens, before, eps, phi, norm, scale, writes, erase_before_decay,
        chunk, segment, o, den, d_o, d_S, d_z,
    )  # fmt: skip


def _launch_backward(*inputs: Any) -> list[Tensor]:
    from fwp_kernels.launch import backward

    grads = backward(_problem(*inputs[:19]), *inputs[19:])
    return [inputs[0].new_empty(0) if x is None else x for x in grads]


@_forward.register_fake
def _(q, k, v, g, a, e, w, S, z, cu_seqlens, before, eps, phi, norm, scale, *_):  # type: ignore[no-untyped-def]
    core = Core(q, k, v, cu_seqlens=cu_seqlens, features=Features(phi, norm, scale))
    rows = (*q.shape[:2], max(q.shape[2], core.heads))
    o = q.new_empty(*rows, v.shape[-1])
    S = q.new_empty(core.sequences, core.heads, core.width, v.shape[-1], dtype=core.dtype)
    if eps is None:
        return o, S, q.new_empty(0), q.new_empty(0)
    return o, S, S.new_empty(S.shape[:3]), S.new_empty(*rows, 1)


@_backward.register_fake
def _(*inputs):  # type: ignore[no-untyped-def]
    return [inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:9]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.options = inputs[:10], inputs[10:19]
    o, _, _, den = output
    ctx.save_for_backward(*tensors, *((None, None) if inputs[11] is None else (o, den)))
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_o: Tensor | None, d_S: Tensor | None, d_z: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    *tensors, o, den = ctx.saved_tensors
    backward: Callable[..., Sequence[Tensor]] = _backward if torch.compiler.is_compiling() else _Backward.apply
    grads = backward(*tensors, *ctx.options, o, den, d_o, d_S, None if den is None else d_z)
    return *(None if x is None else grad for x, grad in zip(tensors, grads)), *[None] * 11


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("double backward is not supported by the triton backend; use backend='torch'")


def _no_forward_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("forward derivatives are not supported by the triton backend; use backend='torch'")


class _Axis:
    """A new axis of vmap as more sequences: of size X it joins B, or T where sequences are packed, B being 1."""

    def __init__(self, size: int, cu_seqlens: Tensor | None) -> None:
        self.size, self.packed = size, cu_seqlens is not None

    def first(self, x: Tensor, at: int | None) -> Tensor:
        return x.expand(self.size, *x.shape) if at is None else x.movedim(at, 0)

    def states(self, x: Tensor | None, at: int | None) -> Tensor | None:
        return None if x is None else self.first(x, at).flatten(0, 1)

    def tokens(self, x: Tensor | None, at: int | None) -> Tensor | None:
        if x is None or not self.packed:
            return self.states(x, at)
        return self.first(x, at).flatten(0, 2).unsqueeze(0)

    def bounds(self, x: Tensor | None, at: int | None, T: int) -> Tensor | None:
        if x is None:
            return None
        starts = self.first(x, at)[:, :-1].long() + T * torch.arange(self.size, device=x.device).unsqueeze(1)
        return torch.cat([starts.flatten(), starts.new_full((1,), T * self.size)])

    def inputs(self, tensors: Sequence[Tensor | None], at: Sequence[int | None]) -> list[Tensor | None]:
        """q, k, v, g, a, e, w, S, z, cu_seqlens."""
        rows = [self.tokens(x, i) for x, i in zip(tensors[:7], at)]
        assert rows[0] is not None
        T = rows[0].shape[1] // self.size
        states = [self.states(x, i) for x, i in zip(tensors[7:9], at[7:9])]
        return [*rows, *states, self.bounds(tensors[9], at[9], T)]

    def split_states(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.size, x.shape[0] // self.size))

    def split_tokens(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.split_states(x)
        return x.unflatten(1, (self.size, x.shape[1] // self.size)).transpose(0, 1)


def _vmap_forward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        axis, eps = _Axis(info.batch_size, inputs[9]), inputs[11]
        o, S, z, den = call(*axis.inputs(inputs[:10], in_dims[:10]), *inputs[10:])
        o, S = axis.split_tokens(o), axis.split_states(S)
        if eps is None:
            return (o, S, z, den), (0, 0, None, None)
        return (o, S, axis.split_states(z), axis.split_tokens(den)), (0, 0, 0, 0)

    return rule


def _vmap_backward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        given, options = inputs[:10], inputs[10:19]
        axis = _Axis(info.batch_size, given[9])
        rows = [axis.tokens(x, i) for x, i in zip(inputs[19:22], in_dims[19:22])]
        states = [axis.states(x, i) for x, i in zip(inputs[22:], in_dims[22:])]
        grads = call(*axis.inputs(given, in_dims[:10]), *options, *rows, *states)
        split = [axis.split_tokens] * 7 + [axis.split_states] * 2
        found = [x if of is None else back(x) for x, of, back in zip(grads, given, split)]
        return type(grads)(found), type(grads)(None if x is None else 0 for x in given[:9])

    return rule


# Traced graphs see the ops. In eager mode torch.func needs functions: an op's own gradient stands in its way.
_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
_forward.register_vmap(_vmap_forward(_forward))
_backward.register_vmap(_vmap_backward(_backward))


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return (_launch_forward if _plain(inputs) else _forward)(*inputs)

    @staticmethod
    def vmap(*args: Any) -> Any:
        return _vmap_forward(_Forward.apply)(*args)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)
    jvp = staticmethod(_no_forward_derivative)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple((_launch_backward if _plain(inputs) else _backward)(*inputs))

    @staticmethod
    def vmap(*args: Any) -> Any:
        return _vmap_backward(_Backward.apply)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivative)
    jvp = staticmethod(_no_forward_derivative)
