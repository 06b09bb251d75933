"""Layers and decoders as ONNX graphs: onnxruntime, fed from NumPy alone, gives what PyTorch gives, state in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from outside.delta_rnn import DELTA_RNN
from torch import nn

import fwp
from fwp.models import Decoder
from fwp.nn import PRESETS, FastWeightAttention

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", "1.32")
pytest.importorskip("onnxscript")

from fwp.interop.onnx import export  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # torch's export
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
]
E_DIM = 24


def layer(rule: str, **options) -> Callable[[], nn.Module]:
    return lambda: FastWeightAttention(E_DIM, 4, rule=rule, **options)


def decoder(**options) -> Callable[[], nn.Module]:
    return lambda: Decoder(fwp.config.DecoderConfig(50, E_DIM, num_layers=2, num_heads=4, **options))


GATED_SUM = dataclasses.replace(
    fwp.RULES["delta"],
    name="gated_sum",
    lower=lambda core, beta: dataclasses.replace(core, g=torch.log1p(-beta), w=beta),
    lower_uses_k=False,
)
LINEAR = {"preset": None, "attention": {"rule": "additive", "feature_map": "elu+1", "denominator": True}}
CASES = {
    **{rule: layer(rule) for rule in ("additive", "decay", "gla", "delta", "gated_delta", "kda", "longhorn")},
    "denominator": layer("decay", feature_map="dpfp-2", denominator=True),
    "feature norm": layer("delta", feature_map="dpfp", feature_norm="sum"),
    "several writes per read": layer("gated_delta", writes_per_read=3),
    "grouped queries": layer("gla", num_key_heads=2, num_value_heads=2),
    "grouped keys": layer("delta", num_key_heads=2),
    "few queries": lambda: FastWeightAttention(E_DIM, 2, "decay", num_key_heads=4, num_value_heads=4),
    "short convolution": layer("gated_delta", short_conv=4, activation="silu"),
    "a rule that weighs its writes": layer(GATED_SUM),
    "preset gated_delta_net": lambda: PRESETS["gated_delta_net"](E_DIM, 4),
    "preset kda": lambda: PRESETS["kda"](E_DIM, 4),
    "decoder": decoder(),
    "decoder with denominator": decoder(**LINEAR),
}


def tensors(state) -> list[torch.Tensor]:
    """The tensors of a state in the order of their fields."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [] if state is None else [x for part in state for x in tensors(part)]


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_gives_the_same_numbers(name, tmp_path):
    torch.manual_seed(0)
    model = CASES[name]()
    export(model, tmp_path / "model.onnx")
    assert model.training  # as it was
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(x.domain, x.version) for x in graph.opset_import] == [("", 27)]
    assert sum(node.op_type == "LinearAttention" for node in graph.graph.node) == (2 if "decoder" in name else 1)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    first, *carried = session.get_inputs()
    model.eval()
    for B, T in ((2, 3), (3, 70), (1, 1)):
        calls = torch.randint(50, (2, B, T)) if first.name == "tokens" else torch.randn(2, B, T, E_DIM)
        past = {x.name: np.zeros((B, *x.shape[1:]), "int64" if "int64" in x.type else "float32") for x in carried}
        state = None
        for x in calls:  # the second goes on from the state of the first
            y, *present = session.run(None, {first.name: x.numpy(), **past})
            with torch.no_grad():
                expected, state = model(x, state)
            np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=5e-6 * max(1, expected.abs().max().item()))
            assert len(present) == len(tensors(state))
            for found, true in zip(present, tensors(state)):
                np.testing.assert_allclose(found, true.numpy(), rtol=0, atol=5e-6 * max(1, true.abs().max().item()))
            past = dict(zip(past, present))


@pytest.mark.parametrize("rule", ["gdn2", "comba", "rwkv7"])
def test_a_rule_with_an_erase_key_of_its_own_is_refused(rule, tmp_path):
    with pytest.raises(ValueError, match="^rule: expected one that erases along k for LinearAttention of ONNX, got"):
        export(layer(rule)(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "delta", "feature_map": "relu", "denominator": True}, "rule: expected one that erases along k"),
        ({"rule": "additive", "feature_map": "exp", "denominator": True}, "feature_map: expected no exponential"),
        ({"rule": "additive", "read": "before"}, "read: expected 'after'"),
        ({"rule": DELTA_RNN}, "rule: expected one with a lowering"),
    ],
)
def test_what_the_operator_has_no_place_for_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        export(FastWeightAttention(E_DIM, 4, **options), tmp_path / "model.onnx")


def test_float64_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^v: expected float32 or 16 bits for LinearAttention of ONNX, got"):
        export(layer("delta")().double(), tmp_path / "model.onnx")


class Pooled(nn.Module):
    """A model of somebody else's, with masks and an encoder's layer in it."""

    def __init__(self):
        super().__init__()
        self.encoder = FastWeightAttention(E_DIM, 4, feature_map="elu+1", denominator=True, causal=False)
        self.decoder = FastWeightAttention(E_DIM, 4, rule="kda")

    def forward(self, x, mask):
        y, _ = self.encoder(x, mask=mask)
        y, _ = self.decoder(x + y, mask=mask)
        return y.sum(1)


def test_any_model_with_such_layers_is_exported(tmp_path):
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(2, 9, E_DIM)
    model.encoder.eval()
    mask = torch.ones(2, 9, dtype=torch.bool)
    time = {1: torch.export.Dim("time")}
    export(model, tmp_path / "m.onnx", (x, mask), input_names=["x", "mask"], dynamic_shapes=(time, time))
    assert model.training and model.decoder.training and not model.encoder.training  # each as it was
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x, mask = torch.randn(2, 40, E_DIM), torch.arange(40) >= torch.tensor([[0], [17]])
    (y,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(y, model(x, mask).detach().numpy(), atol=5e-6)


def test_what_export_is_not_given(tmp_path):
    with pytest.raises(TypeError, match="^args: expected example inputs, since Pooled is no layer and no Decoder"):
        export(Pooled(), tmp_path / "m.onnx")
    with pytest.raises(TypeError, match="^options: expected none that export sets itself, got opset_version"):
        export(layer("delta")(), tmp_path / "m.onnx", opset_version=18)
