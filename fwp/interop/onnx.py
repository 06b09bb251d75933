"""ONNX: models whose fast weights are the operator LinearAttention of opset 27, state in and out. The extra is `onnx`.

onnxruntime runs it from version 1.32 on. The operator has four recurrences, which serve `additive`, `decay`, `gla`,
`delta`, `gated_delta`, `kda` and what lowers onto them, such as `longhorn` and several writes per read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fwp._torch_private import tree_map
from fwp.backends.onnx import OPSET
from fwp.core import exporting
from fwp.models import Decoder
from fwp.nn.layer import Layer
from fwp.states import LayerState, StackState

WRITTEN = 18  # the opset in which torch's exporter writes; it converts to others, and doesn't know our operator
CONVERTED = 25  # the last opset that onnxscript converts to. Up to 27 only operators were added, and types to Range


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Writes a model as it is in evaluation mode to an ONNX file of opset 27.

    model: any module on layers or calls of `fwp` with backend "auto". A causal layer of `fwp.nn` or a
        `fwp.models.Decoder` needs no more: batch and time are dynamic then, and the state is part of the graph. Inputs
        are `x` [B, T, E] or `tokens` [B, T] int64, and a `past.…` for each tensor of the state; outputs are `y` or
        `logits`, and a `present.…` for each. A sequence starts with a state of zeros::

            session = onnxruntime.InferenceSession("layer.onnx")
            state = {"past.S": numpy.zeros((B, H, K, V), "float32"), "past.position": numpy.zeros(B, "int64")}
            y, *present = session.run(None, {"x": x, **state})

    args, kwargs: example inputs of any other model.
    options: of `torch.onnx.export`, such as input_names and dynamic_shapes.

    ImportError without the extra `onnx`; ValueError for a rule, dtype or argument that the operator has no place for.
    The exporter of torch 2.13 can't convert a graph to opset 27 itself, so a file that it writes can't be loaded.
    """
    try:
        from onnxscript import version_converter
    except ImportError as error:
        raise ImportError(f"export: expected the extra fwp[onnx] to be installed, got {error}") from error
    taken = {"dynamo", "opset_version", "f"} & options.keys()
    if taken:
        raise TypeError(f"options: expected none that export sets itself, got {', '.join(sorted(taken))}")
    if args is None:
        model, args, derived = _with_state(model)
        options = derived | options
    shapes = options.pop("dynamic_shapes", None)
    training = [module for module in model.modules() if module.training]
    try:
        with exporting():
            traced = torch.export.export(model.eval(), tuple(args), dict(kwargs or {}), dynamic_shapes=shapes)
        program = torch.onnx.export(traced, dynamo=True, opset_version=WRITTEN, **options)
    finally:
        for module in training:
            module.training = True
    assert program is not None
    nodes = [node for node in program.model.graph if node.op_type == "LinearAttention"]
    for node in nodes:  # out of the converter's sight, which knows no such operator
        node.domain, node.version = "fwp", 1
    version_converter.convert_version(program.model, CONVERTED)
    for node in nodes:
        node.domain, node.version = "", OPSET
    program.model.opset_imports.pop("fwp", None)
    program.model.opset_imports[""] = OPSET
    program.save(os.fspath(path))


class _WithState(nn.Module):
    """A model whose state is a list of tensors: (x, *past) → (y, *present)."""

    def __init__(self, model: Layer | Decoder, like: LayerState | StackState) -> None:
        super().__init__()
        self.model, self.like = model, like

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        tensors = iter(past)
        y, present = self.model(x, tree_map(lambda leaf: leaf if leaf is None else next(tensors), self.like))
        return y, *(tensor for _, tensor in _named(present))


def _with_state(model: nn.Module) -> tuple[nn.Module, Sequence[Any], dict[str, Any]]:
    """The model with its state in sight, its example inputs and the options of the export."""
    if not isinstance(model, Layer | Decoder):
        raise TypeError(f"args: expected example inputs, since {type(model).__name__} is no layer and no Decoder")
    B, T = 2, 3  # torch.export takes sizes of 0 and 1 for constants
    if isinstance(model, Decoder):
        x, names = torch.zeros(B, T, dtype=torch.int64), ("tokens", "logits")
    else:
        x, names = torch.zeros(B, T, model.embed_dim, dtype=next(model.parameters()).dtype), ("x", "y")
    x = x.to(next(model.parameters()).device)
    with torch.no_grad():
        _, state = model(x)
    parts = list(_named(state))
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    options = {
        "input_names": [names[0], *(f"past.{name}" for name, _ in parts)],
        "output_names": [names[1], *(f"present.{name}" for name, _ in parts)],
        "dynamic_shapes": ({0: batch, 1: time}, tuple({0: batch} for _ in parts)),
    }
    return _WithState(model, state), (x, *(tensor for _, tensor in parts)), options


def _named(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state by names such as S, conv and position, with the layer's number in front in a stack."""
    fields = getattr(state, "_fields", None)
    for name, part in zip(fields or range(len(state)), state):
        if isinstance(part, Tensor):
            yield f"{prefix}{name}", part
        elif part is not None:
            yield from _named(part, prefix if fields else f"{prefix}{name}.")
