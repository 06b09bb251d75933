"""The recurrence on the Triton kernels of `fwp_kernels`, forward and backward as opaque ops of torch.

They serve every core: without decay, with one per head or with one per key channel, with or without erasing.
Triton is imported when the first kernel runs. So the ops and their shapes are known without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

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
from fwp.core import Core, Features, Form, State, overwrites
from fwp.feature_maps import applied

if TYPE_CHECKING:
    from fwp_kernels.problem import Problem

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
    dtypes = [core.v.dtype if core.a is None else core.a.dtype, core.dtype if core.denominator else core.v.dtype]
    itemsize = max(dtype.itemsize for dtype in dtypes)
    most = widest(itemsize, channels, tiles, _shared_memory(core.v.device))
    if core.width > most and (form == "chunk" or core.wants_gradients):
        return f"K: expected at most {most} features of these inputs for the memory of this GPU, got {core.width}"
    return None


def widest(itemsize: int, channels: bool, tiles: int, memory: int) -> int:
    """The largest K with which the chunk form's tiles [16, K] fit into a program's shared memory.

    There are two tiles, of inputs or of a decay per channel. There are three if several query heads read a state or if
    q and k pass a feature map, and four with erase keys.
    """
    tile = 16 * max(itemsize, 4 if channels else 0)
    return next((K for K in (1024, 512, 256) if tiles * tile * K + 3072 <= memory), 128)


@constant_under_compile
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per program. On AMD, where tiles pass through it one by one, they count twice."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 2**20
    from triton.compiler import max_shared_mem

    memory = int(max_shared_mem(device.index if device.index is not None else torch.cuda.current_device()))
    return memory if torch.version.hip is None else 2 * memory


def _interpreted() -> bool:
    """Whether Triton runs the kernels on a CPU, in Python."""
    from fwp_kernels.problem import INTERPRETED

    return INTERPRETED


@constant_under_compile
def _derives() -> bool:
    """Whether torch.func.grad or jvp is active while torch.compile traces."""
    return inside_derivative()


class _Inputs(NamedTuple):
    """The inputs of both ops, in the order of their arguments: the fields of `fwp_kernels.problem.Problem`."""

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
    read_before: bool
    eps: float | None
    phi: str | None
    norm: str | None
    scale: float
    writes: int
    erase_before_decay: bool
    chunk: int | None
    segment: int | None

    @staticmethod
    def from_core(core: Core, chunk: int | None, segment: int | None) -> tuple[Any, ...]:
        """The inputs of a causal core, as a plain tuple: torch.compile warns of tangents in a named one."""
        return (
            core.q,
            core.k,
            core.v,
            core.g,
            core.a,
            core.e,
            core.w,
            core.S,
            core.z,
            core.cu_seqlens,
            core.read == "before",
            core.eps if core.denominator else None,
            core.features.phi,
            core.features.norm,
            core.features.scale,
            core.writes,
            core.erase_before_decay,
            chunk,
            segment,
        )

    def core(self) -> Core:
        """The core of these inputs."""
        return Core(
            **{name: getattr(self, name) for name in (*TOKENS, *STATES, "cu_seqlens", "writes", "erase_before_decay")},
            read="before" if self.read_before else "after",
            denominator=self.eps is not None,
            features=Features(self.phi, self.norm, self.scale),
        )

    def problem(self, form: str) -> Problem:
        """The launch layer's `Problem`. Sequences stay whole if the kernels that cut them are not trusted."""
        from fwp_kernels.packing import segment_chunks
        from fwp_kernels.problem import Problem

        problem = Problem(*self)
        if (warps := trust.most_warps(self.core)) is not None:
            problem = replace(problem, warps=warps)
        if form == "chunk" and self.segment is None and segment_chunks(problem) and not trust.may_cut(self.core()):
            return replace(problem, segment=0)
        return problem


TOKENS, STATES = ("q", "k", "v", "g", "a", "e", "w"), ("S", "z")
DIFFERENTIABLE = len(TOKENS) + len(STATES)  # the first fields of the inputs


class _Upstream(NamedTuple):
    """The arguments of a backward beside the inputs."""

    o: Tensor | None  # outputs and their denominators, only with attention normalisation
    den: Tensor | None
    d_o: Tensor | None
    d_S: Tensor | None
    d_z: Tensor | None


def run(core: Core, form: Form, chunk: int | None = None, segment: int | None = None) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V], and the final state.

    chunk: chunk size, a power of 2 up to 64 (on a GPU from 16); None chooses by K and dtype.
    segment: chunks per segment, where the segments of a sequence run in parallel; 0: no segments; None chooses by the
        GPU.
    RuntimeError for a second derivative and a forward derivative, which the kernels don't have.
    """
    if not core.causal:
        return _read_the_end(applied(core), form, chunk, segment)
    inputs = _Inputs.from_core(core, chunk, segment)  # in the order of the ops' arguments
    over = overwrites() and form == "recurrent"
    if torch.compiler.is_compiling():
        o, S, z, _ = _forward(*inputs, form)
    elif over or (_plain(inputs) and not core.wants_gradients):
        # called directly: going through an op takes longer than all that is done before the kernels run
        from fwp_kernels.launch import forward

        o, S, z, _ = forward(_Inputs(*inputs).problem(form), form, over)
        if S is core.S:  # whoever saved it for a backward hears of the change
            torch.autograd.graph.increment_version(S)
    else:
        o, S, z, _ = _Forward.apply(*inputs, form)
    return o, State(S, z if core.denominator else None)


def _read_the_end(core: Core, form: Form, chunk: int | None, segment: int | None) -> tuple[Tensor, State]:
    """Every query reads the final state: a first walk writes, a second one reads and writes nothing."""
    _, end = run(replace(core, causal=True, read="after"), form, chunk, segment)
    k, v = (x.new_zeros(()).expand(*core.q.shape[:2], *x.shape[2:]) for x in (core.k, core.v))
    queries = replace(
        core, causal=True, read="after", k=k, v=v, g=None, a=None, e=None, w=None, S=end.S, z=end.z, writes=1
    )
    return run(queries, form, chunk, segment)[0], end


def _plain(inputs: Sequence[Any]) -> bool:
    """Whether all tensors are ordinary ones, and no mode or transform of torch is active."""
    return (
        dispatch_modes() == 0
        and not inside_transform()
        and not inside_dual_level()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor))
    )


# ---- the ops ----

_SCHEMA = """Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? a, Tensor? e, Tensor? w, Tensor? S, Tensor? z,
    Tensor? cu_seqlens, bool read_before, float? eps, str? phi, str? norm, float scale, SymInt writes,
    bool erase_before_decay, SymInt? chunk, SymInt? segment"""


@torch.library.custom_op(
    "fwp::triton_forward", mutates_args=(), schema=f"({_SCHEMA}, str form) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, S, z and the denominators; empty tensors stand for None."""
    if inside_dual_level() and forward_derivatives_enabled():  # they are disabled inside an autograd.Function
        _no_forward_derivative(None)
    return _launch_forward(*inputs)


def _launch_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fwp_kernels.launch import forward

    *given, form = inputs
    o, S, z, den = forward(_Inputs(*given).problem(form), form)
    return o, S, o.new_empty(0) if z is None else z, o.new_empty(0) if den is None else den


@torch.library.custom_op(
    "fwp::triton_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor? o, Tensor? den, Tensor? d_o, Tensor? d_S, Tensor? d_z) -> Tensor[]",
)
def _backward(*inputs: Any) -> list[Tensor]:
    """The gradients of q, k, v, g, a, e, w, S and z; empty tensors stand for None."""
    return _launch_backward(*inputs)


def _launch_backward(*inputs: Any) -> list[Tensor]:
    from fwp_kernels.launch import backward

    given, upstream = _split(inputs)
    grads = backward(given.problem("chunk"), *upstream)
    return [given.q.new_empty(0) if x is None else x for x in grads]


def _split(inputs: Sequence[Any]) -> tuple[Any, Any]:
    """The two parts of a backward's arguments, `_Inputs` and `_Upstream`."""
    end = len(_Inputs._fields)
    return _Inputs(*inputs[:end]), _Upstream(*inputs[end:])


@_forward.register_fake
def _(*inputs):  # type: ignore[no-untyped-def]
    core = _Inputs(*inputs[:-1]).core()
    shape = (*core.q.shape[:2], max(core.q.shape[2], core.heads))
    o = core.q.new_empty(*shape, core.v.shape[-1])
    S = core.q.new_empty(core.sequences, core.heads, core.width, core.v.shape[-1], dtype=core.dtype)
    if not core.denominator:
        return o, S, o.new_empty(0), o.new_empty(0)
    return o, S, S.new_empty(S.shape[:3]), S.new_empty(*shape, 1)


@_backward.register_fake
def _(*inputs):  # type: ignore[no-untyped-def]
    return [inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:DIFFERENTIABLE]]


# ---- derivatives ----


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given, (o, _, _, den) = _Inputs(*inputs[:-1]), output
    tensors = {name: x for name, x in given._asdict().items() if isinstance(x, Tensor)}
    ctx.names, ctx.options = tuple(tensors), given._asdict() | dict.fromkeys(tensors)
    ctx.save_for_backward(*tensors.values(), *(() if given.eps is None else (o, den)))
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_o: Tensor | None, d_S: Tensor | None, d_z: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    given = _Inputs(**ctx.options | dict(zip(ctx.names, saved)))
    o, den = (None, None) if given.eps is None else saved[-2:]
    upstream = _Upstream(o, den, d_o, d_S, None if den is None else d_z)
    backward: Callable[..., Sequence[Tensor]] = _backward if torch.compiler.is_compiling() else _Backward.apply
    grads = backward(*given, *upstream)
    others = len(_Inputs._fields) + 1 - DIFFERENTIABLE  # and the form
    return *(None if x is None else grad for x, grad in zip(given, grads)), *[None] * others


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("double backward is not supported by the triton backend; use backend='torch'")


def _no_forward_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("forward derivatives are not supported by the triton backend; use backend='torch'")


# ---- vmap ----


class _Axis:
    """Turns a vmap axis of size X into more sequences: it joins B, or T where sequences are packed and B is 1."""

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

    def inputs(self, given: _Inputs, at: Any) -> _Inputs:
        """The inputs with the axis merged. at: each input's vmap axis, or None."""
        moved: dict[str, Any] = {name: self.tokens(getattr(given, name), getattr(at, name)) for name in TOKENS}
        moved |= {name: self.states(getattr(given, name), getattr(at, name)) for name in STATES}
        moved["cu_seqlens"] = self.bounds(given.cu_seqlens, at.cu_seqlens, moved["q"].shape[1] // self.size)
        return given._replace(**moved)

    def split_states(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.size, x.shape[0] // self.size))

    def split_tokens(self, x: Tensor) -> Tensor:
        if not self.packed:
            return self.split_states(x)
        return x.unflatten(1, (self.size, x.shape[1] // self.size)).transpose(0, 1)


def _vmap_forward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        given, form = _Inputs(*inputs[:-1]), inputs[-1]
        axis = _Axis(info.batch_size, given.cu_seqlens)
        o, S, z, den = call(*axis.inputs(given, _Inputs(*in_dims[:-1])), form)
        o, S = axis.split_tokens(o), axis.split_states(S)
        if given.eps is None:
            return (o, S, z, den), (0, 0, None, None)
        return (o, S, axis.split_states(z), axis.split_tokens(den)), (0, 0, 0, 0)

    return rule


def _vmap_backward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        (given, upstream), (at, upstream_at) = _split(inputs), _split(in_dims)
        axis = _Axis(info.batch_size, given.cu_seqlens)
        outputs = [axis.tokens(x, i) for x, i in zip(upstream[:3], upstream_at)]
        states = [axis.states(x, i) for x, i in zip(upstream[3:], upstream_at[3:])]
        grads = call(*axis.inputs(given, at), *outputs, *states)
        back = [axis.split_tokens] * len(TOKENS) + [axis.split_states] * len(STATES)
        found = [grad if x is None else split(grad) for grad, x, split in zip(grads, given, back)]
        return type(grads)(found), type(grads)(None if x is None else 0 for x in given[:DIFFERENTIABLE])

    return rule


# Traced graphs contain the ops. In eager mode torch.func needs functions, since it can't see through an op's gradient.
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
