"""The layers under torch.compile and torch.export: one program for every length."""

import os
import shutil

import pytest
import torch
from laws import close
from layers import LAYERS, E, H, gradients
from torch._dynamo.testing import CompileCounterWithBackend

from fwp.nn import (
    FastWeightAttention,
)


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # by PyTorch itself
@pytest.mark.parametrize(
    ("name", "how", "backend"),
    [
        ("preset-linear_transformer", "plain", "aot_eager"),
        ("preset-gated_delta_net", "masked", "aot_eager"),
        ("preset-kda", "packed", "aot_eager"),
        ("preset-gated_delta_product", "masked", "aot_eager"),
        ("preset-comba", "plain", "aot_eager"),
        ("preset-rwkv7", "packed", "aot_eager"),
        pytest.param(
            *("additive-conv4", "plain", "inductor"),
            marks=pytest.mark.skipif(
                not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="needs a C++ compiler"
            ),
        ),
    ],
)
def test_compiles_as_one_graph_for_every_length(name, how, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = LAYERS[name]()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (7, 9, 12, 16):
        x = torch.randn(1 if how == "packed" else 2, T, E, requires_grad=True)
        mask = torch.rand(2, T) < 0.7 if how == "masked" else None
        cu_seqlens = torch.tensor([0, 4, 4, T]) if how == "packed" else None
        found, truth = (f(x, None, mask, cu_seqlens) for f in (compiled, layer))
        close(found, truth, 1e-5)
        found, truth = (gradients(layer, x, *results, retain_graph=False) for results in (found, truth))
        close(found, truth, 1e-4)
    assert counter.frame_count <= 2  # once for the first length, once for all others


@pytest.mark.parametrize("name", ["preset-gated_delta_net", "gated_delta-conv4", "preset-rwkv7"])
@torch.no_grad()
def test_export_for_every_batch_and_length(name):
    torch.compiler.reset()
    layer, (B, T) = LAYERS[name](), (torch.export.Dim(axis, min=1 + (axis == "T"), max=4096) for axis in "BT")
    program = torch.export.export(layer, (torch.randn(3, 9, E),), dynamic_shapes=({0: B, 1: T},))
    for sizes in ((3, 9), (1, 2), (5, 130)):
        x = torch.randn(*sizes, E)
        close(program.module()(x), layer(x), 1e-5)


def test_favor_plus_draws_in_a_compiled_layer_too():
    torch.compiler.reset()
    layer = FastWeightAttention(E, H, feature_map="favor+")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, E)
    drawn = []
    for _ in range(3):
        compiled(x)
        drawn.append(layer.feature_map.R)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
