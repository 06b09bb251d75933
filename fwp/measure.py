"""Errors of results by row and by element, and error budgets for low precision.

This module works on tensors and knows no rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fwp._torch_private import TorchDispatchMode


def row_error(x: Tensor, ref: Tensor) -> float:
    """The worst row: max ‖x − ref‖ / (‖ref‖ + 0.01 · mean ‖ref‖) over the last axis, in float64.

    One global mean would hide a broken row. 0 for empty tensors, inf where x is not finite or has another shape.
    """
    if x.shape != ref.shape:
        return math.inf
    if x.numel() == 0:
        return 0.0
    x, ref = x.detach().double(), ref.detach().to(x.device).double()
    length = ref.norm(dim=-1)
    error = (x - ref).norm(dim=-1)
    scale = length + 0.01 * length.mean()
    worst = torch.where(error == 0, 0, error / scale).max().item()
    return worst if math.isfinite(worst) else math.inf


def result_error(name: str, x: Tensor, ref: Tensor) -> float:
    """`row_error` of the result of that name.

    The gradient of a per-head gate, [B, T, H], has no features. Its rows are the sequences of its heads: a row of a few
    heads is near 0 now and then, and its relative error means nothing.
    """
    per_head_gate = x.dim() == 3 and name.startswith("d") and not name.startswith("dstate")
    return row_error(x.mT, ref.mT) if per_head_gate else row_error(x, ref)


def deviation(x: Tensor, ref: Tensor) -> float:
    """The worst element: max |x − ref| / max(1, |ref|). 0 and inf as in `row_error`."""
    if x.shape != ref.shape:
        return math.inf
    if x.numel() == 0:
        return 0.0
    x, ref = x.detach().double(), ref.detach().to(x.device).double()
    worst = ((x - ref).abs() / ref.abs().clamp(min=1)).max().item()
    return worst if math.isfinite(worst) else math.inf


def error_budgets(rough: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """The `result_error` that each result may have when its inputs are of `dtype`.

    It is twice a sum: the error of `rough` after its results are rounded as the op rounds them, plus one rounding of
    the result. For gradients, whose names start with "d", it is three times that sum.
    rough: results in float32 under `rounded_products`. truth: the same results in float64.
    "out", "dq", "dk" and "dv" are kept in `dtype`, all else in float32.
    """
    allowed = {}
    for name, x in rough.items():
        kept = dtype if name in ("out", "dq", "dk", "dv") else torch.float32
        own = result_error(name, x.to(kept), truth[name]) + torch.finfo(kept).eps / 2
        allowed[name] = (3 if name.startswith("d") else 2) * own
    return allowed


class rounded_products(TorchDispatchMode):
    """A context in which matrix products round their operands to `dtype`, but not their sums.

    Products in a backward pass do the same.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(x.to(self.dtype).to(x.dtype) for x in args)
        return func(*args, **(kwargs or {}))
