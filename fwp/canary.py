"""A small run of the Triton kernels, forward and backward, against the torch backend in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp.core import Core, Features, State, state_dtype, to_heads
from fwp.feature_maps import applied
from fwp.measure import rounded_products, row_error
from fwp.trust import KernelCase

# Sequence length: two chunks of 64 and a remainder, and at least two segments where sequences are cut.
T = 131


def fault_of_kernels(case: KernelCase) -> str | None:
    """One line that says what is wrong with the kernels of this case, or None.

    Each result may be off by 4 times the error of float32 with rounded products, or by half the digits of the dtype.
    """
    from fwp.backends import chunked
    from fwp.backends import triton as kernels

    core, exact = small_inputs(case), partial(chunked.run, form="chunk")
    try:
        found = _results(partial(kernels.run, form=case.form, segment=int(case.cut)), core, case.gradients)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    truth = _results(exact, _on_cpu(core, torch.float64), case.gradients)
    with rounded_products(case.dtype):
        rough = _results(exact, _on_cpu(core, state_dtype(case.dtype)), case.gradients)
    half_the_digits = math.sqrt(torch.finfo(case.dtype).eps)
    for name, x in truth.items():
        off = row_error(found[name], x)
        if not off <= max(half_the_digits, 4 * row_error(rough[name], x)):
            return f"{name} is off by {off:.1g} in {case.name}"
    return None


def small_inputs(case: KernelCase) -> Core:
    """Random inputs of a case: keys of unit length, and gates under which a state survives several chunks."""
    H, N = max(case.Hk, case.Hv), 3 if case.packed else 1
    reads = T * (2 if case.cut and case.packed else 1)
    writes = reads * case.writes
    generator = torch.Generator().manual_seed(0)
    kept, features = state_dtype(case.dtype), Features(case.phi, case.norm, 0.5 if case.scaled else 1.0)
    width = features.width(case.K)

    def normal(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator)
        return x.abs() + 0.1 if case.denominator else x  # then no zᵀq is near 0

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).to(case.device, kept)

    core = Core(
        normal(1, reads, case.Hq, case.K).to(case.device, case.dtype),
        F.normalize(normal(1, writes, case.Hk, case.K), dim=-1).to(case.device, case.dtype),
        normal(1, writes, case.Hv, case.V).to(case.device, case.dtype),
        g=-0.05 * uniform(1, writes, H, *[width] * (case.decay - 1)) if case.decay else None,
        e=uniform(1, writes, H) if case.erase_strength else None,
        w=uniform(1, writes, H) if case.write_strength else None,
        S=normal(N, H, width, case.V).to(case.device, kept),
        z=uniform(N, H, width) + 1 if case.denominator else None,
        cu_seqlens=torch.tensor([0, reads // 2, reads // 2, reads], device=case.device) if case.packed else None,
        read=case.read,
        denominator=case.denominator,
        features=features,
        writes=case.writes,
        erase_before_decay=case.erase_before_decay,
    )
    if core.e is None and not case.erase_key:
        return core
    # A step must not remove more than it finds, else the state blows up.
    keys = to_heads(applied(core).k, H).to(kept)
    longest = keys.square().sum(-1).amax().clamp(min=1)
    if core.e is not None and not case.erase_key:
        return replace(core, e=core.e / longest)
    noise = F.normalize(torch.randn(keys.shape, generator=generator), dim=-1).to(keys)
    near = keys + 0.5 * keys.norm(dim=-1, keepdim=True) * noise  # an erase key far from the key removes nothing
    return replace(core, a=(near / longest).to(kept if case.wide_erase_key else case.dtype))


def _each_tensor(core: Core, fn: Callable[[Tensor], Tensor]) -> Core:
    tensors: dict[str, Any] = {name: fn(x) for name, x in vars(core).items() if isinstance(x, Tensor)}
    return replace(core, **tensors)


def _on_cpu(core: Core, dtype: torch.dtype) -> Core:
    return _each_tensor(core, lambda x: x.to("cpu", dtype if x.is_floating_point() else x.dtype))


def _results(run: Callable[[Core], tuple[Tensor, State]], core: Core, gradients: bool) -> dict[str, Tensor]:
    """Output, state and, if wanted, the gradients of a weighted sum of both."""
    core = _each_tensor(core, lambda x: x.detach().requires_grad_(gradients and x.is_floating_point()))
    out, state = run(core)
    results = {"o": out, "S": state.S} | ({} if state.z is None else {"z": state.z})
    if not gradients:
        return results
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results.values()]
    leaves = {name: x for name, x in vars(core).items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), weights)
    return {name: x.detach() for name, x in results.items()} | {f"d{name}": x for name, x in zip(leaves, grads)}
