"""What tests and benchmarks of any rule share: inputs, results with gradients, errors by row, error budgets.

inputs = fwp.testing.sample("kda", B=2, T=70, H=2, K=16, V=8, dtype=torch.bfloat16)
found = fwp.testing.evaluate("kda", inputs, backend="torch", form="chunk")
truth = fwp.testing.evaluate("kda", fwp.testing.cast(inputs, torch.float64), backend="reference")
allowed = fwp.testing.budgets("kda", inputs)
assert all(fwp.testing.result_error(name, found[name], truth[name]) <= allowed[name] for name in truth)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp import feature_maps, rules
from fwp._torch_private import tree_map
from fwp.core import State, state_dtype
from fwp.feature_maps import FeatureMap
from fwp.functional import fast_weights
from fwp.measure import deviation as deviation
from fwp.measure import error_budgets
from fwp.measure import result_error as result_error
from fwp.measure import rounded_products as rounded_products
from fwp.measure import row_error as row_error
from fwp.rules import Rule
from fwp.validate import named_tensors


def sample(
    rule: str | Rule,
    B: int = 2,
    T: int = 16,
    H: int = 2,
    K: int = 8,
    V: int = 8,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    Hq: int | None = None,
    Hk: int | None = None,
    Hv: int | None = None,
    feature_map: str | FeatureMap | None = None,
    denominator: bool = False,
    writes: int = 1,
    state: bool = False,
    sequences: int | None = None,
) -> dict[str, Any]:
    """Random arguments of `fwp.fast_weights` for a rule: q, k, v and its gates, without equal numbers.

    q [B, T, Hq, K], k [B, n·T, Hk, K] and v [B, n·T, Hv, V] are of `dtype`, with n = `writes`. Hq, Hk and Hv are H
    unless given. `Gate.sample` makes the gates in the state's dtype, for max(Hk, Hv) heads and the feature map's width.
    Keys have unit length if longer ones can make the rule diverge. With `denominator` q and k are positive, so that no
    zᵀq is near 0. state=True adds the "state" before the first token of `sequences` sequences (default B): S and z > 0,
    or what the rule's `init` makes, plus noise. One seed draws the same float64 numbers for every dtype and device.
    """
    row = rules.get(rule)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    Hq, Hk, Hv = (H if heads is None else heads for heads in (Hq, Hk, Hv))
    H = max(Hk, Hv)
    q, k, v = normal(B, T, Hq, K), normal(B, writes * T, Hk, K), normal(B, writes * T, Hv, V)
    if denominator:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    if row.wants_unit_keys:
        k = F.normalize(k, dim=-1)
    width = feature_maps.get(feature_map)(k[:1, :1]).shape[-1] if feature_map is not None else K
    features: dict[str, tuple[int, ...]] = {"BTH": (), "BTHK": (width,), "BTHV": (V,)}
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v}
    for name, gate in row.gates.items():
        inputs[name] = gate.sample((B, writes * T, H, *features[gate.shape]), generator)
    if state:
        N = B if sequences is None else sequences
        start = tree_map(lambda x: x + 0.5 * normal(*x.shape), row.init((N, H), width, V, q.new_zeros(())))
        if row.plain:
            start = State(start, normal(N, H, width).abs() + 1 if denominator else None)
        inputs["state"] = start
    return cast({name: _tensors(lambda x: x.to(device), x) for name, x in inputs.items()}, dtype)


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with q, k and v cast to `dtype`, and gates and state cast to the state's dtype for it."""
    plain = {name: x.to(dtype) for name, x in inputs.items() if name in ("q", "k", "v")}
    return plain | {
        name: _tensors(lambda x: x.to(state_dtype(dtype)), x) for name, x in inputs.items() if name not in plain
    }


def evaluate(
    rule: str | Rule,
    inputs: Mapping[str, Any],
    *,
    gradients: bool = True,
    seed: int = 0,
    call: Callable[..., tuple[Tensor, Any]] = fast_weights,
    **options: Any,
) -> dict[str, Tensor]:
    """Every result of `call(rule, **inputs, **options)` by name.

    These are "out", the tensors of the final state ("state.S" and "state.z", or "state[0]" …) and the gradient of each
    input ("dq" … "dstate.S"). The gradients are of the sum of all results, weighted by fixed random numbers that every
    dtype represents exactly.
    """
    leaves = {name: _tensors(lambda x: x.detach().requires_grad_(gradients), x) for name, x in inputs.items()}
    out, end = call(rule, **leaves, **options)
    results = {"out": out, **named_tensors("state", end)}
    found = {name: x.detach() for name, x in results.items()}
    if gradients:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results.values()]
        given = {name: x for key, value in leaves.items() for name, x in named_tensors(key, value).items()}
        used = [(x, w) for x, w in zip(results.values(), weights) if x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in used], list(given.values()), [w for _, w in used], materialize_grads=True
        )
        found |= {f"d{name}": grad for name, grad in zip(given, grads)}
    return found


def budgets(
    rule: str | Rule,
    inputs: Mapping[str, Any],
    *,
    seed: int = 0,
    truth: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, float]:
    """The `result_error` that each result of `evaluate` may have on low-precision inputs, against float64.

    See `fwp.measure.error_budgets`. The rough results come from the chunk form in float32, with the operands of matrix
    products rounded to the dtype of v. truth: the reference's results in float64, if they are at hand.
    """
    dtype = inputs["v"].dtype
    if truth is None:
        truth = evaluate(rule, cast(inputs, torch.float64), seed=seed, backend="reference", **options)
    with rounded_products(dtype):
        rough = evaluate(rule, cast(inputs, torch.float32), seed=seed, backend="torch", form="chunk", **options)
    return error_budgets(rough, truth, dtype)


def _tensors(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Applies fn to the tensors of x and leaves all else as it is."""
    return tree_map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, x)
