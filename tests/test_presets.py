"""The presets against the published layers: by hand, and with the weights of transformers."""

import warnings

import numpy as np
import published
import pytest
import torch
import torch.nn.functional as F
from laws import cat_states, close, leaves, sequence
from torch import nn

from fwp.interop.fla import load_layer
from fwp.nn import PRESETS, RWKV7Attention
from fwp_benchmarks import oracle

NEWER = ("gdn2", "longhorn", "comba", "delta_product", "gated_delta_product", "rwkv7")  # shapes as in `published`


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
    assert {name: shapes[name] for name in shapes if name not in NEWER} == {
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
    """The published layers in NumPy with 4 heads, where the oracle runs the rule."""

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
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    truth = _by_hand(name, {key: p.numpy() for key, p in layer.named_parameters()}, x.numpy())
    close(layer(x)[0], torch.from_numpy(truth))


def _published(family):
    """A layer of transformers, and our preset of the same sizes."""
    from transformers import AutoConfig  # noqa: F401  (the models below need the package's own set-up)

    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 6}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    if family == "qwen3_next":
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        theirs = Qwen3NextGatedDeltaNet(
            Qwen3NextConfig(hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], **sizes), 0
        )
        return theirs, PRESETS["gated_delta_net"](32, 2, head_dim=8, num_value_heads=4, value_dim=6, norm_eps=1e-6)
    if family == "qwen3_5":
        from transformers import Qwen3_5TextConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

        theirs = Qwen3_5GatedDeltaNet(
            Qwen3_5TextConfig(hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], **sizes), 0
        )
        return theirs, PRESETS["gated_delta_net"](32, 2, head_dim=8, num_value_heads=4, value_dim=6, norm_eps=1e-6)
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
        return theirs, ours
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], linear_head_dim=8, linear_num_heads=4
    )
    return KimiLinearDeltaAttention(config, 0), PRESETS["kda"](32, 4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
@torch.no_grad()
def test_presets_take_the_weights_of_transformers(family):
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = _published(family)
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    load_layer(ours, theirs.state_dict())
    x = torch.randn(2, 70, 32)  # more than one of their chunks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = theirs(x)
    assert truth.std() > 0.1
    torch.testing.assert_close(ours(x)[0], truth, rtol=1e-5, atol=1e-5)


# ---- the newer layers, token by token under the published names ----

E, H, K, V, T = 12, 2, 4, 6, 7


def random(shapes, seed=0):
    """Random weights under published names, far from initial values. Their shapes are those of the publication."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def inputs(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attention(Hk, Hv, n=1):
    """Shapes of projections, convolutions and the norm, for n writes per read."""
    widths = {"q": Hk * K, "k": n * Hk * K, "v": n * Hv * V}
    shapes = {f"{key}_proj.weight": (width, E) for key, width in widths.items()}
    shapes |= {f"{key}_conv1d.weight": (width, 1, 4) for key, width in widths.items()}
    return shapes | {"o_proj.weight": (E, Hv * V), "o_norm.weight": (V,)}


@pytest.mark.parametrize("Hv", [H, 2 * H], ids=["", "grouped"])
@pytest.mark.parametrize(("neg", "gate"), [(False, "silu"), (True, "sigmoid")])
def test_gdn2_is_the_published_layer(Hv, neg, gate):
    shapes = attention(H, Hv) | {"f_proj.0.weight": (V, E), "f_proj.1.weight": (H * K, V)}
    shapes |= {"A_log": (H,), "dt_bias": (H * K,), "b_proj.weight": (H * K, E), "w_proj.weight": (Hv * V, E)}
    shapes |= {"g_proj.0.weight": (V, E), "g_proj.1.weight": (Hv * V, V), "g_proj.1.bias": (Hv * V,)}
    w, x = random(shapes), inputs(2, T, E)
    layer = PRESETS["gdn2"](
        E, H, head_dim=K, value_dim=V, num_value_heads=Hv, allow_neg_eigval=neg, out_gate=gate
    ).double()
    load_layer(layer, w)
    close(layer(x)[0], published.gdn2(w, x, H, Hv, neg, getattr(F, gate)))


@pytest.mark.parametrize("Hv", [H, 2 * H], ids=["", "grouped"])
def test_comba_is_the_published_layer(Hv):
    shapes = attention(H, Hv) | {"a_proj.weight": (Hv, E), "b_proj.weight": (Hv, E), "decay": (H,), "D": (H,)}
    shapes |= {"A_log": (Hv,), "dt_bias": (Hv,), "g_proj.weight": (Hv * V, E)}
    w, x = random(shapes), inputs(2, T, E)
    layer = PRESETS["comba"](E, H, head_dim=K, value_dim=V, num_value_heads=Hv).double()
    load_layer(layer, w)
    close(layer(x)[0], published.comba(w, x, H, Hv))


@pytest.mark.parametrize("Hv", [H, 2 * H], ids=["", "grouped"])
@pytest.mark.parametrize("neg", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["delta_product", "gated_delta_product"])
def test_delta_product_is_the_published_layer(name, n, neg, Hv):
    shapes = attention(H, Hv, n) | {"b_proj.weight": (n * Hv, E)}
    if name == "gated_delta_product":
        shapes |= {"a_proj.weight": (Hv, E), "A_log": (Hv,), "dt_bias": (Hv,), "g_proj.weight": (Hv * V, E)}
    w, x = random(shapes), inputs(2, T, E)
    options = {"head_dim": K, "value_dim": V, "num_value_heads": Hv, "writes_per_read": n, "allow_neg_eigval": neg}
    layer = PRESETS[name](E, H, **options).double()
    load_layer(layer, w)
    close(layer(x)[0], published.delta_product(w, x, H, Hv, n, neg))


def test_delta_product_with_one_write_is_delta_net():
    for product, plain in (("delta_product", "delta_net"), ("gated_delta_product", "gated_delta_net")):
        one, other = PRESETS[product](E, H, writes_per_read=1, allow_neg_eigval=False), PRESETS[plain](E, H)
        other.load_state_dict(one.state_dict())
        x = torch.randn(2, T, E)
        assert torch.equal(one(x)[0], other(x)[0])


def test_longhorn_solves_its_problem_at_every_token():
    shapes = attention(H, H) | {"b_proj.weight": (H, E), "b_proj.bias": (H,), "g_proj.weight": (H * V, E)}
    del shapes["o_norm.weight"]
    w, x = random(shapes), 3 * inputs(2, T, E)
    layer = PRESETS["longhorn"](E, H, head_dim=K, value_dim=V).double()
    load_layer(layer, w)
    close(layer(x)[0], published.longhorn(w, x, H))


def rwkv7_weights(layer, seed):
    """Random weights under published names, with v0, v1 and v2 for all layers but the first."""
    N = E // H
    shapes = {f"x_{key}": (1, 1, E) for key in "rwkvag"} | {"r_k": (H, N)}
    shapes |= {f"{key}0": (1, 1, E) for key in "wa"} | {"g1": (E, 3), "g2": (3, E)}
    shapes |= {f"{key}1": (E, 5) for key in "wa"} | {f"{key}2": (5, E) for key in "wa"}
    shapes |= {"k_k": (1, 1, E), "k_a": (1, 1, E), "ln_x.weight": (E,), "ln_x.bias": (E,)}
    shapes |= {f"{key}.weight": (E, E) for key in ("receptance", "key", "value", "output")}
    if layer:
        shapes |= {"v0": (1, 1, E), "v1": (E, 4), "v2": (4, E)}
    return random(shapes, seed)


def rwkv7_stack():
    """Two layers with weights under published names. Returns those weights too."""
    weights, layers = [rwkv7_weights(layer, layer) for layer in range(2)], []
    for at, w in enumerate(weights):
        layer = PRESETS["rwkv7"](
            E, H, layer=at, num_layers=2, decay_rank=5, rate_rank=5, value_rank=4, gate_rank=3
        ).double()
        layers.append(load_layer(layer, w))
    return layers, weights


def run_stack(layers, x, states=(None, None), step=False, **options):
    """y and the states of two layers; the values of the first are passed on."""
    v_first, ends = None, []
    for layer, state in zip(layers, states):
        run = layer.step if step else layer
        y, end, v_first = run(x, state, v_first=v_first, return_v_first=True, **options)
        x = x + y
        ends.append(end)
    return x, ends


def test_rwkv7_is_the_published_layer():
    layers, weights = rwkv7_stack()
    x = inputs(2, T, E)
    truth, v_first = x, None
    for w in weights:
        y, v_first = published.rwkv7(w, truth, H, v_first)
        truth = truth + y
    close(run_stack(layers, x)[0], truth)
    close(layers[0](x, return_v_first=True)[2], published.rwkv7(weights[0], x, H, None)[1])


def test_rwkv7_passes_values_on_however_the_tokens_come():
    layers, _ = rwkv7_stack()
    x = inputs(2, T, E)
    y, ends = run_stack(layers, x)
    parts, states = [], (None, None)
    for t in range(T):
        out, states = run_stack(layers, x[:, t : t + 1], states, step=t % 2 == 0)
        parts.append(out)
    close((torch.cat(parts, 1), states), (y, ends))

    mask = torch.tensor([[False, True, True, False, True, True, True, True, False, True]] * 2)
    padded = torch.full((2, len(mask[0]), E), torch.nan, dtype=torch.float64).masked_scatter(mask.unsqueeze(-1), x)
    padded.requires_grad_()
    v_first, hidden, found = None, padded, []
    for layer in layers:
        out, end, v_first = layer(hidden, mask=mask, v_first=v_first, return_v_first=True)
        v_first = v_first.masked_fill(~mask.unsqueeze(-1), torch.nan)  # masked tokens may hold anything
        hidden = hidden + out
        found.append(end)
    close((hidden[mask].view_as(y), found), (y, ends))
    gradient, *rest = torch.autograd.grad(hidden[mask].sum(), [padded, *layers[1].parameters()])
    assert all(g.isfinite().all() for g in (gradient, *rest))

    packed, found = run_stack(layers, x.view(1, 2 * T, E), cu_seqlens=torch.tensor([0, T, T, 2 * T]))
    nothing = run_stack(layers, x[:1, :0])[1]
    truth = [cat_states([sequence(end, 0), none, sequence(end, 1)]) for end, none in zip(ends, nothing)]
    close((packed.view_as(y), found), (y, truth))


def test_rwkv7_steps_in_place():
    layers, _ = rwkv7_stack()
    x = inputs(2, 3, E)
    with torch.no_grad():
        y, ends = run_stack(layers, x)
        _, states = run_stack(layers, x[:, :2])
        held = leaves(states)
        found, after = run_stack(layers, x[:, 2:], states, step=True, in_place=True)
        assert all(a is b for a, b in zip(held, leaves(after)))
        close((found, after), (y[:, 2:], ends))


@pytest.mark.parametrize("at", [0, 2, 5])
def test_rwkv7_starts_as_published(at):
    torch.manual_seed(0)
    C, N, L = 128, 64, 6
    layer = PRESETS["rwkv7"](C, C // N, layer=at, num_layers=L)
    first, rest = at / (L - 1), 1 - at / L
    for n in range(0, C, 7):
        zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
        zigzag, ramp = zigzag * abs(zigzag), n / (C - 1) - 0.5
        for row, power in zip(layer.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):  # r, w, k, v, a, g
            assert row[n].item() == pytest.approx(1 - (n / C) ** (power * rest), abs=1e-6)
        decay = -6 + 6 * (n / (C - 1)) ** (1 + first**0.3)
        assert layer.decay.bias[n].item() == pytest.approx(decay + 0.5 + 2.5 * zigzag, abs=1e-5)
        assert layer.rate.bias[n].item() == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * ramp, abs=1e-6)
        assert layer.k_k[n].item() == pytest.approx(0.71 - 0.1 * ramp, abs=1e-6)
        if at:
            assert layer.value_mix.bias[n].item() == pytest.approx(0.73 - 0.4 * ramp, abs=1e-6)
    assert layer.out_norm.weight.unique().item() == pytest.approx(((at + 1) / L) ** 0.7)
    assert not layer.o_proj.weight.any() and not layer.decay.down.weight.any() and not layer.out_norm.bias.any()
    assert (layer.value_mix is None) == (at == 0)
    up = layer.decay.up.weight  # orthogonal columns, 0.1 √(rows / columns) long
    torch.testing.assert_close(up.T @ up, 0.01 * C / 32 * torch.eye(32), rtol=0, atol=1e-6)
    assert 0.4 < layer.q_proj.weight.abs().max() * C**0.5 <= 0.5
    assert 0.04 < layer.k_proj.weight.abs().max() * C**0.5 <= 0.05


@pytest.mark.parametrize(("C", "N", "ranks"), [(768, 64, [64, 64, 32, 128]), (2048, 32, [64, 64, 32, 224])])
def test_rwkv7s_ranks_grow_with_the_width(C, N, ranks):
    with torch.device("meta"):
        layer = RWKV7Attention(C, C // N, layer=1, num_layers=12)
    parts = (layer.decay, layer.rate, layer.value_mix, layer.out_gate)
    assert [part.down.out_features for part in parts] == ranks


@pytest.mark.parametrize("name", ["gated_delta_net", "comba", "gated_delta_product", "kda", "gdn2"])
def test_where_decays_start(name):
    torch.manual_seed(0)
    gate = PRESETS[name](1024, 1024).gates["g"]
    least = gate.A_log.exp().min().item()
    assert 1 <= least < 1.2 if name in ("gated_delta_net", "kda", "gdn2") else 0.01 <= least < 0.2
    assert 15.8 < gate.A_log.exp().max().item() <= 16
    step = F.softplus(gate.dt_bias)
    assert 0.0009 < step.min() < 0.0011 and 0.095 < step.max() < 0.101
