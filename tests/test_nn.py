"""The layer, the block and the decoder: one state, however the tokens are cut, padded, packed or compiled."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from laws import RULES, cat_states, sequence
from outside.delta_rnn import DELTA_RNN
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

import fwp
from fwp.models import Decoder, DecoderConfig
from fwp.nn import (
    PRESETS,
    Block,
    FastWeightAttention,
    FavorPlusFeatures,
    FeedForward,
    GateProjection,
    LayerState,
    ShortConvolution,
    SoftplusDecay,
)

E, H = 8, 2


def given(rule):
    """A rule of the table by its name, another as it is."""
    return rule.name if rule.name in fwp.RULES else rule


LAYERS = {
    f"{rule.name}-conv{width}": (
        lambda rule=rule, width=width, **options: FastWeightAttention(
            E, H, given(rule), feature_norm="l2", short_conv=width, value_dim=3, **options
        )
    )
    for rule in RULES
    for width in (0, 4)
}
LAYERS |= {f"preset-{name}": (lambda make=make, **options: make(E, H, **options)) for name, make in PRESETS.items()}
LAYERS |= {
    "grouped-queries": lambda: FastWeightAttention(
        E, 4, "gated_delta", num_key_heads=2, num_value_heads=2, short_conv=2
    ),
    "grouped-values": lambda: PRESETS["gated_delta_net"](E, H, num_value_heads=4, norm_eps=1e-6),
    "normalised": lambda: FastWeightAttention(E, H, "delta", "dpfp-2", "sum", True, short_conv=3, bias=True),
    "wide-gates": lambda: FastWeightAttention(E, H, "kda", "dpfp-2", "sum", out_norm="layer", out_gate=True),
    "before": lambda: FastWeightAttention(E, H, "decay", "elu+1", read="before", activation="relu"),
    "favor": lambda: FastWeightAttention(E, H, "additive", FavorPlusFeatures(4, 6, redraw="never"), denominator=True),
}
each_layer = pytest.mark.parametrize("layer", LAYERS, indirect=True)


@pytest.fixture
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def tokens(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*trees):
    """All tensors of results and states."""
    return [x for x in tree_leaves(list(trees)) if x is not None]


def close(found, truth, bound=1e-10):
    """All tensors of two trees."""
    found, truth = leaves(found), leaves(truth)
    assert len(found) == len(truth)
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def gradients(layer, x, *results, retain_graph=True):
    """Of a fixed random weighting of all results: for the inputs and every parameter."""
    results = [r for r in leaves(*results) if r.is_floating_point()]
    loss = sum((r * tokens(*r.shape, seed=i)).sum() for i, r in enumerate(results))
    return torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True, retain_graph=retain_graph)


# ---- laws ----


@each_layer
def test_cutting_the_sequence_and_carrying_the_state_changes_nothing(layer):
    x = tokens(2, 11, E).requires_grad_()
    y, end = layer(x)
    assert y.shape == (2, 11, E)
    assert torch.equal(end.position, torch.tensor([11, 11]))
    for cuts in ([1], [2, 3], [0, 5, 5, 10], [11]):
        parts, state = [], None
        for part in x.tensor_split(cuts, 1):
            out, state = layer(part, state)
            parts.append(out)
        close((torch.cat(parts, 1), state), (y, end))
        close(gradients(layer, x, torch.cat(parts, 1), state), gradients(layer, x, y, end))


@each_layer
@torch.no_grad()
def test_steps_equal_the_whole(layer):
    x = tokens(2, 7, E)
    truth = layer(x)
    out, state = [], None
    for t in range(7):
        y, state = layer.step(x[:, t], state) if t % 2 else layer.step(x[:, t : t + 1], state)
        assert y.shape == ((2, E) if t % 2 else (2, 1, E))
        out.append(y.view(2, E))
    close((torch.stack(out, 1), state), truth)


@each_layer
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_padding_anywhere_equals_none(layer, carried):
    kept = ["", "0 1 2 3 4 5 6 7 8", "0 1 2 3", "4 5 6 7 8", "0 3 4 7", "5"]  # none, all, left, right, scattered
    mask = torch.zeros(6, 9, dtype=torch.bool)
    for row, places in zip(mask, kept):
        row[[int(t) for t in places.split()]] = True
    real = [tokens(int(n), E, seed=row) for row, n in enumerate(mask.sum(1))]
    x = torch.full((6, 9, E), torch.nan, dtype=torch.float64)
    x = x.masked_scatter(mask.unsqueeze(-1), torch.cat(real)).requires_grad_()
    before = layer(tokens(6, 3, E, seed=7))[1] if carried else None
    y, state = layer(x, before, mask=mask)
    assert not y[~mask].any()

    alone = [layer(x[n : n + 1, mask[n]], before and sequence(before, n)) for n in range(6)]
    whole = torch.cat([out[0] for out, _ in alone])
    close((y[mask], state), (whole, cat_states([end for _, end in alone])))
    found, truth = gradients(layer, x, y[mask], state), gradients(layer, x, whole, cat_states([e for _, e in alone]))
    close(found, truth)
    assert not found[0][~mask].any()


@each_layer
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_packed_equals_one_by_one(layer, masked):
    lengths = [0, 1, 5, 0, 2, 7, 0]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    x = tokens(1, 15, E).requires_grad_()
    mask = torch.rand(1, 15, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    for before in (None, layer(tokens(7, 4, E, seed=3))[1]):
        packed = layer(x, before, mask=mask, cu_seqlens=cu_seqlens)
        alone = [
            layer(part, before and sequence(before, n), mask=None if mask is None else mask[:, start : start + len_])
            for n, (part, start, len_) in enumerate(zip(x.split(lengths, 1), cu_seqlens, lengths))
        ]
        truth = torch.cat([y for y, _ in alone], 1), cat_states([state for _, state in alone])
        close(packed, truth)
        close(gradients(layer, x, *packed), gradients(layer, x, *truth))


@each_layer
@torch.no_grad()
def test_no_token_sees_a_later_one(layer):
    x = tokens(2, 9, E)
    changed = torch.cat([x[:, :5], tokens(2, 4, E, seed=2)], 1)
    a, b = layer(x)[0], layer(changed)[0]
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()


@each_layer
def test_empty_inputs(layer):
    _, state = layer(tokens(2, 3, E))
    y, end = layer(tokens(2, 0, E), state)
    assert y.shape == (2, 0, E)
    close(end, state)
    none = torch.ones(0, 4, dtype=torch.bool)
    for mask in (None, none):
        y, end = layer(tokens(0, 4, E), mask=mask)
        assert y.shape == (0, 4, E)
        assert all(len(x) == 0 for x in leaves(end))


def test_the_convolution_sees_the_last_real_tokens():
    conv = ShortConvolution(1, 3).double()
    conv.weight.data[:] = torch.tensor([100.0, 10.0, 1.0])
    x = torch.tensor([1.0, 2, 3, 4, 5]).double().view(1, 5, 1)
    assert conv(x)[0].flatten().tolist() == [1, 12, 123, 234, 345]
    mask = torch.tensor([[True, False, True, False, True]])
    y, tail = conv(x, mask=mask)
    assert y[mask].flatten().tolist() == [1, 13, 135]
    assert tail.flatten().tolist() == [3, 5]
    y, tail = conv(x, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert y.flatten().tolist() == [1, 12, 3, 34, 345]
    assert tail.flatten(1).tolist() == [[1, 2], [0, 0], [4, 5]]
    assert conv(x[:, :1], tail[2:])[0].item() == 451


# ---- gates and options ----


def test_gates_come_from_the_rule():
    layer = FastWeightAttention(E, H, DELTA_RNN, value_dim=3)
    assert list(layer.gates) == list(DELTA_RNN.gates)
    x = torch.randn(2, 4, E)
    assert {name: tuple(gate(x).shape[2:]) for name, gate in layer.gates.items()} == {
        "beta": (H,),
        "k_r": (H, 3),
        "v_r": (H, 3),
        "beta_r": (H,),
    }
    raw = F.linear(x, layer.gates["k_r"].proj.weight, layer.gates["k_r"].proj.bias).view(2, 4, H, 3)
    torch.testing.assert_close(layer.gates["k_r"](x), F.normalize(raw, dim=-1))


def test_a_gate_can_be_made_otherwise():
    seen = []

    class Constant(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            seen.append(sizes)
            self.shape = [size for size in sizes[1:] if size]

        def forward(self, x):
            return x.new_full((*x.shape[:2], *self.shape), -torch.inf)

    x = torch.randn(1, 5, E)
    forgetful = FastWeightAttention(E, H, "gla", "dpfp-1", gates={"g": Constant})
    assert seen == [(E, H, 8)]  # K' = 2 · 4
    plain = FastWeightAttention(E, H, "additive", "dpfp-1")
    plain.load_state_dict(forgetful.state_dict())
    alone = torch.cat([plain(x[:, t : t + 1])[0] for t in range(5)], 1)  # g = −inf leaves nothing of the past
    torch.testing.assert_close(forgetful(x)[0], alone)


@pytest.mark.parametrize(("read", "seen"), [("after", 0), ("before", -1)])
def test_the_layer_is_its_equation(read, seen):
    torch.manual_seed(0)
    options = {"scale": 0.5, "activation": "silu", "out_norm": "rms", "out_gate": True}
    layer = FastWeightAttention(E, H, "additive", read=read, **options)
    nn.init.normal_(layer.out_norm.weight)
    x = torch.randn(1, 4, E)
    q, k, v = (F.silu(m(x)).view(4, H, 4) for m in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = torch.einsum("thk,shk,ts,shv->thv", 0.5 * q, k, torch.ones(4, 4).tril(seen), v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.out_norm.weight
    y = layer.o_proj(o.reshape(1, 4, E) * F.silu(layer.out_gate(x)))
    torch.testing.assert_close(layer(x)[0], y)


def test_favor_plus_draws_when_a_sequence_begins():
    x = torch.randn(1, 3, E)

    def draws(layer, state=None):
        R = layer.feature_map.R
        _, after = layer(x, state)
        return not torch.equal(R, layer.feature_map.R), after

    layer = FastWeightAttention(E, H, feature_map="favor+", denominator=True)
    drawn, state = draws(layer)
    assert drawn
    assert not draws(layer, state)[0]  # a state was written with this R
    assert not draws(layer.eval())[0]
    for redraw, expected in (("always", True), ("never", False)):
        layer = FastWeightAttention(E, H, feature_map=FavorPlusFeatures(4, 6, redraw=redraw))
        assert draws(layer)[0] is expected
        assert draws(layer.eval())[0] is expected
        assert layer.feature_map.R.shape == (6, 4)
    # two forward passes before one backward: the first needs its own R
    layer = FastWeightAttention(E, H, feature_map="favor+")
    torch.manual_seed(3)
    first = torch.autograd.grad(layer(x)[0].sum(), layer.k_proj.weight)
    torch.manual_seed(3)
    y = layer(x)[0].sum()
    layer(x)
    close(torch.autograd.grad(y, layer.k_proj.weight), first, 0)


def test_a_learned_feature_map_is_trained_with_the_layer():
    layer = FastWeightAttention(E, H, "gla", nn.Sequential(nn.Linear(4, 3), nn.Softplus()))
    layer(torch.randn(1, 5, E))[0].sum().backward()
    assert layer.feature_map[0].weight.grad.any()


def test_an_activation_under_autocast_computes_in_float32():
    gate = GateProjection(E, H, 4, activation=lambda y: y @ torch.eye(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(torch.randn(1, 3, E)).dtype == torch.float32


def test_a_decay_starts_gentle():
    torch.manual_seed(0)
    gate = SoftplusDecay(E, 64, 4)
    keep = gate(torch.zeros(1, 1, E)).exp()
    assert 0.19 < keep.min() < keep.max() < 0.9991


@pytest.mark.parametrize("name", PRESETS)
def test_state_dict_pickle_and_copy_round_trip_bitwise(name, tmp_path):
    x = torch.randn(2, 6, E)
    layer = PRESETS[name](E, H)
    y = layer(x)[0]
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = PRESETS[name](E, H)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x)[0], y)


def test_the_state_survives_saving(tmp_path):
    x = torch.randn(2, 6, E)
    layer = PRESETS["gated_delta_net"](E, H)
    with torch.no_grad():
        _, state = layer(x)
        torch.save(tuple(state), tmp_path / "state.pt")
        with torch.serialization.safe_globals([fwp.State]):
            loaded = LayerState(*torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(layer(x, loaded)[0], layer(x, state)[0])


# ---- dtypes ----


@each_layer
def test_dtypes_under_autocast(layer):
    layer = layer.float()
    x = torch.randn(2, 6, E, requires_grad=True)
    seen = {}
    for name, gate in layer.gates.items():
        gate.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        y, state = layer(x, state)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in leaves(state.memory)} == {torch.float32}
    assert state.conv is None or state.conv.dtype == torch.bfloat16
    assert state.position.dtype == torch.int64
    assert set(seen.values()) <= {torch.float32}
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {x.grad.dtype} == {torch.float32}
    if layer.feature_norm != "sum":  # where all features nearly vanish, dividing by their sum magnifies any rounding
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
    assert {gate(torch.randn(1, 1, E, dtype=dtype)).dtype for gate in layer.gates.values()} <= {kept}
    y.sum().backward()


# ---- compile ----


@pytest.mark.parametrize(
    ("name", "how"), [("linear_transformer", "plain"), ("gated_delta_net", "masked"), ("kda", "packed")]
)
def test_compiles_as_one_graph_for_every_length(name, how):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = PRESETS[name](E, H)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (7, 9, 12, 16):
        x = torch.randn(1 if how == "packed" else 2, T, E, requires_grad=True)
        mask = torch.rand(2, T) < 0.7 if how == "masked" else None
        cu_seqlens = torch.tensor([0, 4, 4, T]) if how == "packed" else None
        found, truth = (f(x, None, mask, cu_seqlens) for f in (compiled, layer))
        close(found, truth, 1e-5)
        found, truth = (gradients(layer, x, *results, retain_graph=False) for results in (found, truth))
        close(found, truth, 1e-4)
    assert counter.frame_count <= 2  # once for a length, once more for all


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


@torch.no_grad()
def test_the_decoder_compiles_as_one_graph():
    torch.compiler.reset()
    model = Decoder(DecoderConfig(11, E, 2, H))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(11, (2, 6))
    found, truth = compiled(ids), model(ids)
    close(found, truth, 1e-5)
    close(compiled(ids[:, :1], found[1]), model(ids[:, :1], truth[1]), 1e-5)


# ---- presets against the published layers ----


def test_shapes_of_the_presets_parameters():
    shapes = {
        name: {key: tuple(p.shape) for key, p in make(32, 4, **options).named_parameters()}
        for name, make, options in [
            *((name, make, {}) for name, make in PRESETS.items()),
            ("grouped", PRESETS["gated_delta_net"], {"num_value_heads": 8, "value_dim": 6}),
        ]
    }

    def projections(q, v, bias=False):
        found = {"q_proj.weight": (q, 32), "k_proj.weight": (q, 32), "v_proj.weight": (v, 32), "o_proj.weight": (32, v)}
        biases = {"q_proj.bias": (q,), "k_proj.bias": (q,), "v_proj.bias": (v,), "o_proj.bias": (32,)}
        return found | biases if bias else found

    beta = {"gates.beta.proj.weight": (4, 32)}
    conv, norm = {"conv.weight": (96, 1, 4)}, {"out_norm.weight": (8,)}
    decay = {"gates.g.A_log": (4,), "gates.g.dt_bias": (4,), "gates.g.proj.weight": (4, 32)}
    low_rank = {"gates.g.proj.0.weight": (8, 32), "gates.g.proj.1.weight": (32, 8)}
    assert shapes == {
        "linear_transformer": projections(32, 32, bias=True),
        "delta_net_2021": projections(32, 32) | beta,
        "delta_net": projections(32, 32) | beta | conv | norm,
        "gla": projections(16, 32)
        | norm
        | {"out_gate.weight": (32, 32)}
        | {"gates.g.proj.0.weight": (16, 32), "gates.g.proj.1.weight": (16, 16), "gates.g.proj.1.bias": (16,)},
        "gated_delta_net": projections(32, 32) | beta | decay | conv | norm | {"out_gate.weight": (32, 32)},
        "kda": projections(32, 32)
        | beta
        | low_rank
        | {"gates.g.A_log": (4,), "gates.g.dt_bias": (32,)}
        | conv
        | norm
        | {"out_gate.0.weight": (8, 32), "out_gate.1.weight": (32, 8)},
        "grouped": projections(32, 48)
        | {key: (8, *shape[1:]) for key, shape in (beta | decay).items()}
        | {"conv.weight": (112, 1, 4), "out_norm.weight": (6,), "out_gate.weight": (48, 32)},
    }


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _by_hand(name, w, x):
    """The published layers once more in NumPy: 4 heads, the rule itself by the oracle."""

    def heads(y):
        return y.reshape(*y.shape[:2], 4, -1)

    def linear(key):
        return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)

    def rms(o):
        return o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * w["out_norm.weight"]

    q, k, v = (linear(f"{key}_proj") for key in "qkv")
    if name == "linear_transformer":
        o, *_ = oracle.fast_weights("additive", *map(heads, (q, k, v)), feature_map="elu+1", denominator=True)
    elif name == "delta_net_2021":
        beta = _sigmoid(linear("gates.beta.proj"))
        o, *_ = oracle.fast_weights(
            "delta", *map(heads, (q, k, v)), beta=beta, feature_map="dpfp", feature_norm="sum", scale=1 / np.sqrt(8)
        )
    elif name == "delta_net":
        qkv = np.concatenate([q, k, v], -1)
        past = np.concatenate([np.zeros((len(x), 3, 96)), qkv], 1)
        qkv = sum(past[:, i : i + x.shape[1]] * w["conv.weight"][:, 0, i] for i in range(4))
        q, k, v = np.split(qkv * _sigmoid(qkv), 3, -1)
        beta = _sigmoid(linear("gates.beta.proj"))
        o, *_ = oracle.fast_weights("delta", *map(heads, (q, k, v)), beta=beta, feature_norm="l2", scale=1 / np.sqrt(8))
        o = rms(o)
    elif name == "gla":
        g = x @ w["gates.g.proj.0.weight"].T @ w["gates.g.proj.1.weight"].T + w["gates.g.proj.1.bias"]
        o, *_ = oracle.fast_weights("gla", *map(heads, (q, k, v)), g=heads(np.log(_sigmoid(g)) / 16), scale=0.5)
        gate = heads(linear("out_gate"))
        o = rms(o) * gate * _sigmoid(gate)
    return o.reshape(*x.shape) @ w["o_proj.weight"].T + w.get("o_proj.bias", 0)


@pytest.mark.parametrize("name", ["linear_transformer", "delta_net_2021", "delta_net", "gla"])
@torch.no_grad()
def test_presets_are_the_published_layers(name):
    torch.manual_seed(0)
    layer = PRESETS[name](32, 4).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    x = tokens(2, 9, 32)
    truth = _by_hand(name, {key: p.numpy() for key, p in layer.named_parameters()}, x.numpy())
    close(layer(x)[0], torch.from_numpy(truth))


def olmo_hybrid(w):
    """OlmoHybridGatedDeltaNet's weights under our names."""
    return {
        **{f"{key}.weight": w[f"{key}.weight"] for key in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "conv.weight": w["conv1d.weight"],
        "gates.beta.proj.weight": w["b_proj.weight"],
        "gates.g.proj.weight": w["a_proj.weight"],
        "gates.g.A_log": w["A_log"],
        "gates.g.dt_bias": w["dt_bias"],
        "out_norm.weight": w["o_norm.weight"],
        "out_gate.weight": w["g_proj.weight"],
    }


def qwen3_next(w, key_heads, K, group, V):
    """Qwen3NextGatedDeltaNet's: the joint projections hold, per key head, q, k, and values and gates of its group."""
    q, k, v, z = w["in_proj_qkvz.weight"].unflatten(0, (key_heads, -1)).split([K, K, group * V, group * V], 1)
    b, a = w["in_proj_ba.weight"].unflatten(0, (key_heads, -1)).split([group, group], 1)
    return {
        **{f"{key}_proj.weight": x.flatten(0, 1) for key, x in zip("qkv", (q, k, v))},
        "conv.weight": w["conv1d.weight"],
        "gates.beta.proj.weight": b.flatten(0, 1),
        "gates.g.proj.weight": a.flatten(0, 1),
        "gates.g.A_log": w["A_log"],
        "gates.g.dt_bias": w["dt_bias"],
        "out_norm.weight": w["norm.weight"],
        "out_gate.weight": z.flatten(0, 1),
        "o_proj.weight": w["out_proj.weight"],
    }


def kimi_linear(w):
    """KimiLinearDeltaAttention's."""
    return {
        **{f"{key}.weight": w[f"{key}.weight"] for key in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "conv.weight": w["conv1d.weight"],
        "gates.beta.proj.weight": w["b_proj.weight"],
        "gates.g.proj.0.weight": w["forget_gate.f_a_proj.weight"],
        "gates.g.proj.1.weight": w["forget_gate.f_b_proj.weight"],
        "gates.g.A_log": w["forget_gate.A_log"].flatten(),
        "gates.g.dt_bias": w["forget_gate.dt_bias"],
        "out_norm.weight": w["o_norm.weight"],
        "out_gate.0.weight": w["g_a_proj.weight"],
        "out_gate.1.weight": w["g_b_proj.weight"],
    }


def _published(family):
    """A layer of transformers with random weights, and our preset with the same."""
    from transformers import AutoConfig  # noqa: F401  (the models below need the package's own set-up)

    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 6}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    if family == "qwen3_next":
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        theirs = Qwen3NextGatedDeltaNet(
            Qwen3NextConfig(hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], **sizes), 0
        )
        ours = PRESETS["gated_delta_net"](32, 2, head_dim=8, num_value_heads=4, value_dim=6, norm_eps=1e-6)
        return theirs, ours, lambda w: qwen3_next(w, 2, 8, 2, 6)
    if family == "olmo_hybrid":
        from transformers import OlmoHybridConfig
        from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

        types = ["linear_attention", "full_attention"]
        config = OlmoHybridConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types=types, **sizes
        )
        assert config.linear_allow_neg_eigval
        theirs = OlmoHybridGatedDeltaNet(config, 0)
        ours = PRESETS["gated_delta_net"](32, 2, head_dim=8, num_value_heads=4, value_dim=6, allow_neg_eigval=True)
        return theirs, ours, olmo_hybrid
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], linear_head_dim=8, linear_num_heads=4
    )
    return KimiLinearDeltaAttention(config, 0), PRESETS["kda"](32, 4), kimi_linear


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid", "kimi_linear"])
@torch.no_grad()
def test_presets_take_the_weights_of_transformers(family):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours, names = _published(family)
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    ours.load_state_dict(names(theirs.state_dict()))
    x = torch.randn(2, 70, 32)  # beyond one of their chunks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = theirs(x)
    assert truth.std() > 0.1
    torch.testing.assert_close(ours(x)[0], truth, rtol=1e-5, atol=1e-5)


# ---- block ----


class Double(nn.Module):
    """A mixer that counts its calls in the state."""

    def forward(self, x, state=None, mask=None, cu_seqlens=None):
        return 2 * x, (state or 0) + 1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_placement_of_the_norm(norm):
    x = torch.randn(2, 3, E)
    square = type("Square", (nn.Module,), {"forward": lambda self, x: x * x})()

    def normed(x):
        return F.rms_norm(x, (E,), eps=1e-5) if norm == "rms" else F.layer_norm(x, (E,), eps=1e-5)

    y, state = Block(E, Double(), square, norm, "pre")(x, 4)
    h = x + 2 * normed(x)
    torch.testing.assert_close(y, h + normed(h) ** 2)
    assert state == 5
    y, _ = Block(E, Double(), square, norm, "post")(x)
    h = normed(x + 2 * x)
    torch.testing.assert_close(y, normed(h + h**2))


def test_feed_forward():
    x = torch.randn(3, E)
    for activation, f in (("gelu", F.gelu), ("relu", F.relu)):
        net = FeedForward(E, 12, activation)
        torch.testing.assert_close(net(x), net.down_proj(f(net.up_proj(x))))
    net = FeedForward(E, 12, "swiglu")
    torch.testing.assert_close(net(x), net.down_proj(F.silu(net.gate_proj(x)) * net.up_proj(x)))


# ---- decoder ----

CONFIGS = {
    "gated_delta_net": {},
    "post": {"placement": "post", "norm": "layer", "ff_activation": "relu", "preset": "delta_net_2021", "tied": False},
    "rule": {"preset": None, "attention": {"rule": "kda", "feature_norm": "l2", "short_conv": 2}},
    "outside": {"preset": None, "attention": {"rule": DELTA_RNN, "feature_map": "softmax"}},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(13, E, 2, H, **CONFIGS[request.param])).double()
    for p in model.parameters():
        if p.dim() > 1:  # far from the near-uniform start, so that the greedy choice is clear
            nn.init.normal_(p, std=1.0)
    return model


def ids(*size, seed=0):
    return torch.randint(13, size, generator=torch.Generator().manual_seed(seed))


def test_the_decoder_is_its_parts(model):
    tokens = ids(2, 5)
    x = model.embedding(tokens)
    for block in model.blocks:
        x, _ = block(x)
    if model.config.placement == "pre":
        x = F.rms_norm(x, (E,), model.norm.weight, eps=1e-5)
    close(model(tokens)[0], x @ model.head.weight.T)


@torch.no_grad()
def greedy_by_recomputation(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    return tokens


def test_greedy_generation_equals_recomputation(model):
    prompt = ids(3, 4)
    found = model.generate(prompt, 12, temperature=0)
    assert found.shape == (3, 16)
    assert torch.equal(found, greedy_by_recomputation(model, prompt, 12))
    assert len(found[:, 4:].unique()) > 2


def test_padded_prompts_generate_what_unpadded_ones_do(model):
    prompt, mask = ids(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[0, :3], mask[1, 4:], mask[2, 2:4] = False, False, False
    found = model.generate(prompt, 8, temperature=0, mask=mask)
    for row in range(3):
        alone = model.generate(prompt[row : row + 1, mask[row]], 8, temperature=0)
        assert torch.equal(found[row, 6:], alone[0, -8:])


def test_sampling(model):
    prompt = ids(64, 2)

    def sample(seed, **options):
        return model.generate(prompt, 6, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    greedy = model.generate(prompt, 6, temperature=0)
    assert torch.equal(sample(0, top_k=1), greedy)
    assert torch.equal(sample(0, temperature=1e-6), greedy)
    assert not torch.equal(sample(0), greedy)
    best = model(prompt)[0][:, -1].topk(3).indices
    drawn = sample(0, top_k=3, temperature=2.0)[:, 2:3]
    assert (drawn == best).any(-1).all()
    assert (drawn != best[:, :1]).any()
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_the_decoder_carries_pads_and_packs(model):
    tokens = ids(2, 9)
    logits, state = model(tokens)
    assert logits.shape == (2, 9, 13)
    first, middle = model(tokens[:, :4])
    second, end = model(tokens[:, 4:], middle)
    close((torch.cat([first, second], 1), end), (logits, state))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, [0, 5, 6]] = False
    padded = ids(2, 12, seed=1).masked_scatter(mask, tokens)
    found, end = model(padded, mask=mask)
    close((found[mask].view_as(logits), end), (logits, state))
    packed, end = model(tokens.view(1, 18), cu_seqlens=torch.tensor([0, 9, 18]))
    close((packed.view_as(logits), end), (logits, state))


def test_the_decoders_state_has_a_constant_size(model):
    sizes = [sum(x.numel() for x in leaves(model(ids(1, T))[1])) for T in (1, 5, 40)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_decoder_learns():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(13, 16, 1, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = ids(4, 24)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(13), rel=0.05)
    assert losses[-1] < 0.3 * losses[0]


def test_tied_and_untied_heads():
    tied, untied = (Decoder(DecoderConfig(13, E, 1, H, tied=tied)) for tied in (True, False))
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 13 * E
    other = Decoder(tied.config)
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(ids(1, 5))[0], tied(ids(1, 5))[0])


# ---- errors: one line that names the argument, what was expected and what was found ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim = 8 without head_dim, got 3"),
        ({"num_heads": 0}, "num_heads: expected a divisor of embed_dim = 8 without head_dim, got 0"),
        ({"rule": "delt"}, "rule: expected one of additive, .*, got 'delt'; did you mean 'delta'?"),
        ({"feature_map": "dfpf"}, "feature_map: expected one of .*, got 'dfpf'"),
        ({"num_key_heads": 3}, "k, v: expected head counts of which one divides the other, got 3 and 2"),
        ({"num_key_heads": 3, "num_value_heads": 3}, "q: expected a multiple or a divisor of 3 heads, got 2"),
        ({"value_dim": 0}, r"v: expected at least one head and one feature, got \(0, 0, 2, 0\)"),
        ({"short_conv": -1}, "short_conv: expected a width, or 0 for none, got -1"),
        ({"activation": "sliu"}, "activation: expected one of silu, .*, got 'sliu'; did you mean 'silu'?"),
        ({"out_norm": "rsm"}, "out_norm: expected one of rms, layer, got 'rsm'; did you mean 'rms'?"),
        ({"out_gate": "swish"}, "out_gate: expected one of silu, .*, got 'swish'"),
        (
            {"rule": "delta", "gates": {"bta": nn.Linear}},
            "gates: expected one of beta, got 'bta'; did you mean 'beta'?",
        ),
        ({"read": "afte"}, "read: expected one of after, before, got 'afte'; did you mean 'after'?"),
        ({"backend": "cuda"}, "backend: expected one of .*, got 'cuda'"),
        ({"rule": DELTA_RNN, "denominator": True}, "denominator: 'delta_rnn' has no attention normalisation"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}".replace("?", r"\?")) as caught:
        FastWeightAttention(**{"embed_dim": E, "num_heads": H, **options})
    assert "\n" not in str(caught.value)


def test_errors_of_inputs():
    layer = PRESETS["delta_net"](E, H)
    x = torch.randn(2, 5, E)
    _, state = layer(x)
    for error, message, arguments in (
        (TypeError, "x: expected a tensor, got list", {"x": [1.0]}),
        (ValueError, r"x: expected \(\*, \*, 8\), got \(2, 5, 7\)", {"x": x[..., :7]}),
        (TypeError, "x: expected a floating dtype of 16 to 64 bits, got torch.int64", {"x": x.long()}),
        (ValueError, r"mask: expected \(2, 5\), got \(2, 4\)", {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        (TypeError, "mask: expected torch.bool, got torch.float32", {"mask": torch.ones(2, 5)}),
        (TypeError, "state: expected LayerState, got State", {"state": state.memory}),
        (ValueError, r"state.position: expected \(2,?\), got \(1,\)", {"state": sequence(state, 0)}),
        (
            ValueError,
            r"state.conv: expected \(2, 3, 24\), got \(2, 2, 24\)",
            {"state": state._replace(conv=state.conv[:, 1:])},
        ),
        (TypeError, "state.conv: expected a tensor, got NoneType", {"state": state._replace(conv=None)}),
        (ValueError, "x: expected a batch of 1 with cu_seqlens, got 2", {"cu_seqlens": torch.tensor([0, 5])}),
        (
            ValueError,
            r"cu_seqlens: must start at 0, not decrease, and end at T = 5; got \[0, 4\]",
            {"x": x[:1], "cu_seqlens": torch.tensor([0, 4])},
        ),
        (TypeError, "cu_seqlens: expected an int32 or int64 tensor, got list", {"x": x[:1], "cu_seqlens": [0, 5]}),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            layer(**{"x": x, **arguments})
    with pytest.raises(ValueError, match=r"^x: expected one token, \(\*, 8\) or \(\*, 1, 8\), got \(2, 5, 8\)$"):
        layer.step(x)
    with pytest.raises(ValueError, match=r"^state\.conv: expected None without short_conv, got a tensor$"):
        PRESETS["delta_net"](E, H, short_conv=0)(x, state)
    with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of embed_dim / 2 = 5, got 2$"):
        PRESETS["gla"](10, 2)


def test_errors_of_models():
    for options, message in (
        ({"preset": "gla2"}, "preset: expected one of .*, got 'gla2'; did you mean 'gla'?"),
        ({"norm": "batch"}, "norm: expected one of rms, layer, got 'batch'"),
        ({"placement": "per"}, "placement: expected one of pre, post, got 'per'; did you mean 'pre'?"),
        ({"ff_activation": "gleu"}, "activation: expected one of .*, got 'gleu'; did you mean 'gelu'?"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$".replace("?", r"\?")):
            Decoder(DecoderConfig(13, E, 1, H, **options))
    model = Decoder(DecoderConfig(13, E, 2, H))
    _, state = model(ids(1, 3))
    with pytest.raises(ValueError, match=r"^state: expected 2 layer states, got 1$"):
        model(ids(1, 3), state[:1])
    with pytest.raises(TypeError, match=r"^tokens: expected torch.int64, got torch.float32$"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"^tokens: expected \(B, T\) with T ≥ 1, got \(1, 0\)$"):
        model.generate(ids(1, 0), 3)
    with pytest.raises(ValueError, match=r"^redraw: expected one of training, always, never, got 'on'$"):
        FavorPlusFeatures(4, redraw="on")


def test_importing_the_layers_loads_torch_and_einops_alone():
    code = "import sys, torch, einops; old = {*sys.modules}; import fwp.nn, fwp.models; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert {name.split(".")[0] for name in run.stdout.split()} <= {"fwp", "__future__"}, run.stdout
