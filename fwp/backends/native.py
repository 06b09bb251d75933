"""The recurrence on the C++ kernels of `fwp_kernels.native`, on CPUs, forward and backward.

They compute in float32; inputs of 16 bits are widened before. Attention normalisation is a second recurrence, which
writes the value 1 and erases nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fwp._torch_private import constant_under_compile, inside_derivative
from fwp.backends.ops import DIFFERENTIABLE, Inputs, Ops, Outputs, Upstream, read_the_end
from fwp.core import Core, Form, State, denominators, overwrites
from fwp.feature_maps import applied

if TYPE_CHECKING:
    from fwp_kernels.native import Problem


def refuses(core: Core, form: Form) -> str | None:
    """Why these inputs can't be served, in one line; None: they can."""
    from fwp_kernels import native

    if core.v.device.type != "cpu":
        return f"expected CPU tensors, got {core.v.device.type}"
    if core.v.dtype == torch.float64:
        return "expected float32 or 16 bits, got torch.float64"
    if torch.compiler.is_compiling() and _derives():
        return "torch.func.grad and jvp inside a compiled function don't see into its ops"
    for name, size in (("K", core.width), ("V", core.v.shape[-1])):
        if not 1 <= size <= native.WIDTHS[-1]:
            return f"{name}: expected 1 to {native.WIDTHS[-1]} features, got {size}"
    erase = 2 if core.a is not None else 1 if core.e is not None else 0
    return _unbuilt(core.width, core.v.shape[-1], 0 if core.g is None else core.g.dim() - 2, erase)


@constant_under_compile
def _unbuilt(K: int, V: int, decay: int, erase: int) -> str | None:
    """Why there is no library for these widths, and none can be made."""
    from fwp_kernels import native

    reason = native.unbuilt(native.Kind(native.rounded(K), native.rounded(V), decay, erase))
    return None if reason is None else f"no kernel: {reason}"


@constant_under_compile
def _derives() -> bool:
    """Whether torch.func.grad or jvp is active while torch.compile traces."""
    return inside_derivative()


def run(core: Core, form: Form) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V] in float32, and the final state.

    RuntimeError for a second derivative and a forward derivative, which the kernels don't have.
    """
    core = applied(core)
    if not core.causal:
        return read_the_end(core, lambda causal: run(causal, form))
    inputs = Inputs.from_core(core)
    inputs = (*(None if x is None else x.float() for x in inputs[:DIFFERENTIABLE]), *inputs[DIFFERENTIABLE:])
    if overwrites() and form == "recurrent":
        o, S, z, *_ = _forward(Inputs(*inputs), form, over=True)
        if S is core.S:  # whoever saved it for a backward hears of the change
            torch.autograd.graph.increment_version(S)
    else:
        o, S, z, *_ = OPS(core, inputs, form)
    return o, State(S, z if core.denominator else None)


def _problem(x: Inputs) -> Problem:
    from fwp_kernels.native import Problem

    return Problem(x.q, x.k, x.v, x.g, x.a, x.e, x.w, x.S, x.cu_seqlens, x.read_before, x.writes, x.erase_before_decay)


def _sums(x: Inputs) -> Problem:
    """The recurrence of z: a value of 1 for each key, which nothing erases."""
    one = x.v.new_ones(()).expand(*x.v.shape[:3], 1)
    S = None if x.z is None else x.z.unsqueeze(-1)
    return replace(_problem(x), v=one, a=None, e=None, w=None, S=S, erase_before_decay=False)


def _forward(inputs: Inputs, form: str, keep: bool = False, over: bool = False) -> Outputs:
    from fwp_kernels import native

    o, S, states, written = native.forward(_problem(inputs), form, keep, over)
    if inputs.eps is None:
        return o, S, None, None, states, written
    found, z, *_ = native.forward(_sums(inputs), form)
    den = denominators(found, inputs.eps)
    return _over(o, den), S, z.squeeze(-1), den, states, written


def _over(x: Tensor, den: Tensor) -> Tensor:
    """x / den, and 0 where den is 0."""
    return torch.where(den == 0, 0, x / den)


def _backward(inputs: Inputs, upstream: Upstream) -> Sequence[Tensor | None]:
    from fwp_kernels import native

    d_o = upstream.d_o
    if inputs.eps is None or d_o is None:
        d_den = None
    else:
        assert upstream.o is not None and upstream.den is not None
        d_o = _over(d_o, upstream.den)
        d_den = -(d_o * upstream.o).sum(-1, keepdim=True)
    grads = native.backward(_problem(inputs), upstream.states, upstream.written, d_o, upstream.d_S)
    if inputs.eps is not None:
        d_z = None if upstream.d_z is None else upstream.d_z.unsqueeze(-1)
        more = native.backward(_sums(inputs), None, None, d_den, d_z)
        for name in ("q", "k", "g"):
            x, y = grads[name], more[name]
            grads[name] = x if x is None or y is None else x + y
        grads["z"] = None if (x := more["S"]) is None else x.squeeze(-1)
    return [grads.get(name) for name in Inputs._fields[:DIFFERENTIABLE]]


def _kept(core: Core) -> tuple[Sequence[Any], Sequence[Any]]:
    from fwp_kernels import native

    return native.kept_shapes(_problem(Inputs(*Inputs.from_core(core))))


OPS = Ops("native", _forward, _backward, _kept)
