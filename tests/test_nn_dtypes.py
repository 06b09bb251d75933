"""The layers in every dtype, under autocast, with quantised projections, and in inference mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import close, leaves
from layers import LAYERS, E, H, awake, gates, gradients, tokens
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fwp.nn import (
    PRESETS,
    FastWeightAttention,
    FavorPlusFeatures,
    RWKV7Attention,
)

each_layer = pytest.mark.parametrize("layer", LAYERS, indirect=True)


@pytest.fixture
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


# ---- inference mode ----


@each_layer
def test_inference_first_then_loading_training_and_continuing(layer):
    x = tokens(2, 6, E)
    with torch.inference_mode():
        _, state = layer(x)
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    truth = gradients(layer, x.requires_grad_(), *layer(x, tree_map(lambda y: None if y is None else y.clone(), state)))
    close(gradients(layer, x, *layer(x, state)), truth)
    with torch.no_grad():
        wanted = layer.step(x[:, 0], state)
        held, places = state, tree_leaves(state)
        found, state = layer.step(x[:, 0], state, in_place=True)
        close((found, state), wanted)
        assert state is held and all(a is b for a, b in zip(places, tree_leaves(state)))


@pytest.mark.parametrize("redraw", ["training", "always"])
def test_random_features_drawn_in_inference_mode_load_and_train(redraw):
    layer = FastWeightAttention(E, H, "delta", FavorPlusFeatures(4, redraw=redraw), "sum", True)
    x, R = torch.randn(2, 6, E), layer.feature_map.R
    with torch.inference_mode():
        _, state = layer(x)
    assert not torch.equal(layer.feature_map.R, R)
    layer(x, state)[0].sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
    other = FastWeightAttention(E, H, "delta", FavorPlusFeatures(4, redraw=redraw), "sum", True)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.feature_map.R, other.feature_map.R)


# ---- dtypes ----


@each_layer
def test_dtypes_under_autocast(layer):
    layer = layer.float()
    x = torch.randn(2, 6, E, requires_grad=True)
    seen = {}
    for name, gate in gates(layer).items():
        gate.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        y, state = layer(x, state)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in leaves(state.memory)} == {torch.float32}
    shifts = isinstance(layer, RWKV7Attention)  # its tail is x itself
    assert state.conv is None or state.conv.dtype == (torch.float32 if shifts else torch.bfloat16)
    assert state.position.dtype == torch.int64
    assert set(seen.values()) <= {torch.float32}
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {x.grad.dtype} == {torch.float32}
    if getattr(layer, "feature_norm", None) != "sum":  # dividing by a sum of features near 0 magnifies rounding errors
        exact = layer(x, layer(x)[1])[0]
        assert (y - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
def test_dtypes_of_a_layer_in_one_dtype(name, dtype):
    layer = PRESETS[name](E, H).to(dtype)
    y, state = layer(torch.randn(2, 6, E, dtype=dtype))
    assert y.dtype == dtype
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in leaves(state.memory)} == {kept}
    assert {gate(torch.randn(1, 1, E, dtype=dtype)).dtype for gate in gates(layer).values()} <= {kept}
    y.sum().backward()


class Adapted(nn.Module):
    """A quantised linear map and a trained one of low rank beside it. Only the named dtypes pass through it."""

    def __init__(self, linear, returns):
        super().__init__()
        self.returns = returns
        scale = linear.weight.abs().amax().detach() / 127
        self.register_buffer("quantised", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.down, self.up = nn.Linear(linear.in_features, 2, False), nn.Linear(2, linear.out_features, False)

    def forward(self, x):
        assert x.dtype in (self.returns, torch.bfloat16)
        whole = F.linear(x.float(), self.quantised * self.scale.float()) + self.up(self.down(x.float()))
        return whole.to(self.returns)


def adapted(module, returns, names=("q_proj", "k_proj", "v_proj", "o_proj")):
    """The module with adapters in place of the linear maps of those names."""
    for name, child in module.named_children():
        if name in names and isinstance(child, nn.Linear):
            setattr(module, name, Adapted(child.float(), returns))
        else:
            adapted(child, returns, names)
    return module


@pytest.mark.parametrize("returns", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "proj", "out_gate", "o_proj")])
@pytest.mark.parametrize("name", ["gated_delta_net", "kda", "comba", "rwkv7"])
def test_projections_decide_the_dtype(name, names, returns):
    """Quantised weights with float32 adapters among 16-bit parameters, and some parameters in float32."""
    torch.manual_seed(0)
    layer = adapted(awake(PRESETS[name](E, H)).bfloat16(), returns, names)
    if len(names) > 2:
        layer = layer.float()
    x = torch.randn(2, 6, E, dtype=torch.bfloat16)
    y, state = layer(x)
    again, state = layer(x, state)
    assert {part.dtype for part in leaves(state.memory)} == {torch.float32}
    (y.float().sum() + again.float().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    exact = copy.deepcopy(layer).double()
    for module in exact.modules():
        if isinstance(module, Adapted):
            module.forward = lambda x, m=module: F.linear(x, m.quantised * m.scale) + m.up(m.down(x))
    truth = exact(x.double())[0]
    assert (y - truth).norm() < 0.05 * truth.norm()
