"""The presets against the published layers: by hand, and with the weights of transformers."""

import warnings

import numpy as np
import pytest
import torch
from laws import close
from torch import nn

from fwp.nn import PRESETS
from fwp_benchmarks import oracle


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
    x = torch.randn(2, 9, 32, dtype=torch.float64)
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
