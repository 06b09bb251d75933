"""The recurrence on the Triton kernels of `fwp_kernels`, forward and backward.

They serve every core: without decay, with one per head or with one per key channel, with or without erasing.
Triton is imported when the first kernel runs. So the ops and their shapes are known without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fwp import trust
from fwp._torch_private import constant_under_compile, inside_derivative
from fwp.backends.ops import Inputs, Ops, Outputs, Upstream, read_the_end
from fwp.core import Core, Form, State, overwrites
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


def _problem(inputs: Inputs, form: str) -> Problem:
    """The launch layer's `Problem`. Sequences stay whole if the kernels that cut them are not trusted."""
    from fwp_kernels.packing import segment_chunks
    from fwp_kernels.problem import Problem

    problem = Problem(*inputs)
    if (warps := trust.most_warps(inputs.core)) is not None:
        problem = replace(problem, warps=warps)
    if form == "chunk" and inputs.segment is None and segment_chunks(problem) and not trust.may_cut(inputs.core()):
        return replace(problem, segment=0)
    return problem


def run(core: Core, form: Form, chunk: int | None = None, segment: int | None = None) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V], and the final state.

    chunk: chunk size, a power of 2 up to 64 (on a GPU from 16); None chooses by K and dtype.
    segment: chunks per segment, where the segments of a sequence run in parallel; 0: no segments; None chooses by the
        GPU.
    RuntimeError for a second derivative and a forward derivative, which the kernels don't have.
    """
    if not core.causal:
        return read_the_end(applied(core), lambda causal: run(causal, form, chunk, segment))
    inputs = Inputs.from_core(core, chunk, segment)  # in the order of the ops' arguments
    if overwrites() and form == "recurrent":
        # called directly: going through an op takes longer than all that is done before the kernels run
        o, S, z, *_ = _forward(Inputs(*inputs), form, over=True)
        if S is core.S:  # whoever saved it for a backward hears of the change
            torch.autograd.graph.increment_version(S)
    else:
        o, S, z, *_ = OPS(core, inputs, form)
    return o, State(S, z if core.denominator else None)


def _forward(inputs: Inputs, form: str, keep: bool = False, over: bool = False) -> Outputs:
    from fwp_kernels.launch import forward

    return *forward(_problem(inputs, form), form, over), None, None


def _backward(inputs: Inputs, upstream: Upstream) -> Sequence[Tensor | None]:
    from fwp_kernels.launch import backward

    return backward(_problem(inputs, "chunk"), upstream.o, upstream.den, upstream.d_o, upstream.d_S, upstream.d_z)


OPS = Ops("triton", _forward, _backward)
