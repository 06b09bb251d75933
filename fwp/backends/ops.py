"""A backend's forward and backward as opaque ops of torch: gradients, vmap, torch.compile, and clear refusals.

Traced graphs contain the ops. In eager mode torch.func needs autograd functions, since it can't see through an op's
gradient, and a plain call needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwp._torch_private import (
    dispatch_modes,
    forward_derivatives_enabled,
    inside_dual_level,
    inside_transform,
)
from fwp.core import Core, Features, State


class Inputs(NamedTuple):
    """The inputs of both ops, in the order of their arguments."""

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
    def from_core(core: Core, chunk: int | None = None, segment: int | None = None) -> tuple[Any, ...]:
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


TOKENS, STATES = ("q", "k", "v", "g", "a", "e", "w"), ("S", "z")
DIFFERENTIABLE = len(TOKENS) + len(STATES)  # the first fields of the inputs


class Upstream(NamedTuple):
    """The arguments of a backward beside the inputs."""

    o: Tensor | None  # outputs and their denominators, only with attention normalisation
    den: Tensor | None
    states: Tensor | None  # what the forward kept, if it kept anything
    written: Tensor | None
    d_o: Tensor | None
    d_S: Tensor | None
    d_z: Tensor | None


def plain(inputs: Sequence[Any]) -> bool:
    """Whether all tensors are ordinary ones, and no mode or transform of torch is active."""
    return (
        dispatch_modes() == 0
        and not inside_transform()
        and not inside_dual_level()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor))
    )


def read_the_end(core: Core, run: Callable[[Core], tuple[Tensor, State]]) -> tuple[Tensor, State]:
    """Every query reads the final state: a first walk writes, a second one reads and writes nothing."""
    _, end = run(replace(core, causal=True, read="after"))
    k, v = (x.new_zeros(()).expand(*core.q.shape[:2], *x.shape[2:]) for x in (core.k, core.v))
    queries = replace(
        core, causal=True, read="after", k=k, v=v, g=None, a=None, e=None, w=None, S=end.S, z=end.z, writes=1
    )
    return run(queries)[0], end


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

    def inputs(self, given: Inputs, at: Any) -> Inputs:
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


_SCHEMA = """Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? a, Tensor? e, Tensor? w, Tensor? S, Tensor? z,
    Tensor? cu_seqlens, bool read_before, float? eps, str? phi, str? norm, float scale, SymInt writes,
    bool erase_before_decay, SymInt? chunk, SymInt? segment"""
_UPSTREAM = ", ".join(f"Tensor? {name}" for name in Upstream._fields)
Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Forward = Callable[[Inputs, str, bool], Outputs]  # o, S, z, denominators, and what a backward may need
Backward = Callable[[Inputs, Upstream], Sequence[Tensor | None]]


def _split(inputs: Sequence[Any]) -> tuple[Inputs, Upstream]:
    """The two parts of a backward's arguments."""
    end = len(Inputs._fields)
    return Inputs(*inputs[:end]), Upstream(*inputs[end:])


def _filled(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors, with empty ones for None, which an op can't return."""
    return [like.new_empty(0) if x is None else x for x in tensors]


class Ops:
    """The ops `fwp::NAME_forward` and `fwp::NAME_backward`.

    forward: (inputs, form, keep) → the outputs, None for what there isn't; keep: whether a backward may follow.
    backward: (inputs, upstream) → the gradients of q, k, v, g, a, e, w, S and z.
    kept: the shapes of the last two outputs for a core, where they are kept.
    """

    def __init__(
        self,
        name: str,
        forward: Forward,
        backward: Backward,
        kept: Callable[[Core], tuple[Sequence[Any], Sequence[Any]]] | None = None,
    ) -> None:
        self.name, self.forward, self.backward = name, forward, backward
        self._forward = torch.library.custom_op(
            f"fwp::{name}_forward",
            self._opaque_forward,
            mutates_args=(),
            schema=f"({_SCHEMA}, str form, bool keep) -> ({', '.join(['Tensor'] * 6)})",
        )
        self._backward = torch.library.custom_op(
            f"fwp::{name}_backward",
            self._opaque_backward,
            mutates_args=(),
            schema=f"({_SCHEMA}, {_UPSTREAM}) -> Tensor[]",
        )
        self._forward.register_fake(partial(_fake_forward, kept))
        self._backward.register_fake(_fake_backward)
        self._forward.register_autograd(self._gradients, setup_context=_save)
        self._backward.register_autograd(self._no_second_derivative)
        self._forward.register_vmap(_vmap_forward(self._forward))
        self._backward.register_vmap(_vmap_backward(self._backward))
        self._Forward, self._Backward = self._functions()

    def __call__(self, core: Core, inputs: tuple[Any, ...], form: str) -> Outputs:
        """The outputs, where gradients, transforms or modes of torch may be active."""
        keep = core.wants_gradients
        if torch.compiler.is_compiling():
            return self._forward(*inputs, form, keep)
        if plain(inputs) and not keep:
            return self.forward(Inputs(*inputs), form, False)
        outputs: Outputs = self._Forward.apply(*inputs, form, keep)
        return outputs

    def _opaque_forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        if inside_dual_level() and forward_derivatives_enabled():  # they are disabled inside an autograd.Function
            self._no_forward_derivative(None)
        return tuple(_filled(self._launch_forward(*inputs), inputs[0]))

    def _opaque_backward(self, *inputs: Any) -> list[Tensor]:
        return _filled(self._launch_backward(*inputs), inputs[0])

    def _launch_forward(self, *inputs: Any) -> Outputs:
        *given, form, keep = inputs
        return self.forward(Inputs(*given), form, keep)

    def _launch_backward(self, *inputs: Any) -> Sequence[Tensor | None]:
        return self.backward(*_split(inputs))

    def _gradients(self, ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        saved, (d_o, d_S, d_z, *_) = ctx.saved_tensors, upstream
        given = Inputs(**ctx.options | dict(zip(ctx.names, saved)))
        made = dict(zip(ctx.made, saved[len(ctx.names) :]))
        d_z = None if given.eps is None else d_z
        backward: Callable[..., Sequence[Tensor]] = (
            self._backward if torch.compiler.is_compiling() else self._Backward.apply
        )
        grads = backward(
            *given, *Upstream(**dict.fromkeys(Upstream._fields) | made | {"d_o": d_o, "d_S": d_S, "d_z": d_z})
        )
        others = len(Inputs._fields) + 2 - DIFFERENTIABLE  # and form and keep
        return *(None if x is None else grad for x, grad in zip(given, grads)), *[None] * others

    def _no_second_derivative(self, ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"double backward is not supported by the {self.name} backend; use backend='torch'")

    def _no_forward_derivative(self, ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"forward derivatives are not supported by the {self.name} backend; use backend='torch'")

    def _functions(ops) -> tuple[Any, Any]:
        """The autograd functions of eager mode."""

        class Forward(torch.autograd.Function):
            @staticmethod
            def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
                return tuple((ops._launch_forward if plain(inputs) else ops._forward)(*inputs))

            @staticmethod
            def vmap(*args: Any) -> Any:
                return _vmap_forward(Forward.apply)(*args)

            setup_context = staticmethod(_save)
            backward = staticmethod(ops._gradients)
            jvp = staticmethod(ops._no_forward_derivative)

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
                return tuple((ops._launch_backward if plain(inputs) else ops._backward)(*inputs))

            @staticmethod
            def vmap(*args: Any) -> Any:
                return _vmap_backward(Backward.apply)(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                pass

            backward = staticmethod(ops._no_second_derivative)
            jvp = staticmethod(ops._no_forward_derivative)

        return Forward, Backward


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    given, (o, _, _, den, states, written) = Inputs(*inputs[:-2]), output
    tensors = {name: x for name, x in given._asdict().items() if isinstance(x, Tensor)}
    made = {} if given.eps is None else {"o": o, "den": den}
    if inputs[-1] and states is not None:
        made |= {"states": states, "written": written}
    ctx.names, ctx.made, ctx.options = tuple(tensors), tuple(made), given._asdict() | dict.fromkeys(tensors)
    ctx.save_for_backward(*tensors.values(), *made.values())
    ctx.set_materialize_grads(False)


def _fake_forward(kept: Any, *inputs: Any) -> tuple[Tensor, ...]:
    core, keep = Inputs(*inputs[:-2]).core(), inputs[-1]
    shape = (*core.q.shape[:2], max(core.q.shape[2], core.heads))
    o = core.q.new_empty(*shape, core.v.shape[-1])
    S = core.q.new_empty(core.sequences, core.heads, core.width, core.v.shape[-1], dtype=core.dtype)
    z, den = (S.new_empty(S.shape[:3]), S.new_empty(*shape, 1)) if core.denominator else (None, None)
    more = [S.new_empty(size) for size in kept(core)] if kept is not None and keep else (None, None)
    return tuple(_filled([o, S, z, den, *more], o))


def _fake_backward(*inputs: Any) -> list[Tensor]:
    return [inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:DIFFERENTIABLE]]


def _vmap_forward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        given, (form, keep) = Inputs(*inputs[:-2]), inputs[-2:]
        axis = _Axis(info.batch_size, given.cu_seqlens)
        o, S, z, den, *kept = call(*axis.inputs(given, Inputs(*in_dims[:-2])), form, keep)
        o, S = axis.split_tokens(o), axis.split_states(S)
        if given.eps is None:
            return (o, S, z, den, *kept), (0, 0, *[None] * 4)
        return (o, S, axis.split_states(z), axis.split_tokens(den), *kept), (0, 0, 0, 0, None, None)

    return rule


def _vmap_backward(call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        (given, upstream), (at, upstream_at) = _split(inputs), _split(in_dims)
        axis = _Axis(info.batch_size, given.cu_seqlens)
        moved = {
            name: (axis.tokens if name in ("o", "den", "d_o") else axis.states)(x, getattr(upstream_at, name))
            for name, x in upstream._asdict().items()
            if name not in ("states", "written")  # laid out as the kernels like it, which notice if they don't fit
        }
        grads = call(*axis.inputs(given, at), *upstream._replace(**moved))
        back = [axis.split_tokens] * len(TOKENS) + [axis.split_states] * len(STATES)
        found = [grad if x is None else split(grad) for grad, x, split in zip(grads, given, back)]
        return type(grads)(found), type(grads)(None if x is None else 0 for x in given[:DIFFERENTIABLE])

    return rule
