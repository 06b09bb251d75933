"""What layers and models start with: first values, also after the meta device, and fast weights that stay bounded."""

from functools import partial

import pytest
import torch
from laws import RULES, leaves, normalises
from layers import E, H, given
from torch import nn

from fwp.models import Decoder, DecoderConfig
from fwp.nn import (
    PRESETS,
    Block,
    FastWeightAttention,
    FastWeightRNN,
    FavorPlusFeatures,
    FeedForward,
    GateProjection,
    ShortConvolution,
    SlowFastNet,
    SoftplusDecay,
)

MODELS = {
    f"rule-{rule.name}": (
        lambda rule=rule: FastWeightAttention(
            E, H, given(rule), short_conv=3, out_norm="layer", out_gate=True, out_gate_rank=2, bias=True
        )
    )
    for rule in RULES
}
MODELS |= {f"preset-{name}": (lambda make=make: make(E, H)) for name, make in PRESETS.items()}
MODELS |= {
    f"decoder-{name}": (lambda name=name: Decoder(DecoderConfig(13, E, 2, H, preset=name, ff_activation="swiglu")))
    for name in PRESETS
}
MODELS |= {
    "rwkv7-later": lambda: PRESETS["rwkv7"](E, H, layer=1, num_layers=3),
    "comba-weak": lambda: PRESETS["comba"](E, H, correction=0.02),
    "decoder-untied": lambda: Decoder(DecoderConfig(13, E, 1, H, tied=False, placement="post", norm="layer")),
    "favor+": lambda: FastWeightAttention(E, H, feature_map="favor+", denominator=True),
    "learned features": lambda: FastWeightAttention(E, H, "gla", nn.Sequential(nn.Linear(4, 3), nn.Softplus())),
    "features": lambda: FavorPlusFeatures(4, 6),
    "gate": lambda: GateProjection(E, H, 3, rank=2),
    "decay": lambda: SoftplusDecay(E, H, 3, rank=2, A_min=0.01),
    "convolution": lambda: ShortConvolution(5, 3),
    "block": lambda: Block(E, PRESETS["kda"](E, H), FeedForward(E, 12)),
    "slow and fast": lambda: SlowFastNet(nn.Linear(3, 4), nn.Linear(3, 1, bias=False)),
    "recurrent": lambda: FastWeightRNN(3, 4),
}


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("name", MODELS)
def test_first_values_after_the_meta_device_are_those_of_construction(name):
    torch.manual_seed(0)
    truth = MODELS[name]()
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.fill_(torch.nan)
    torch.manual_seed(0)
    model.apply(reset)
    found, expected = model.state_dict(), truth.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in truth.parameters()]
    assert all(p.isfinite().all() for p in truth.parameters())


def test_a_decoder_keeps_the_starts_of_layers_that_have_their_own():
    model = Decoder(DecoderConfig(13, 64, 1, 2, preset="rwkv7"))
    mixer, alone = model.blocks[0].mixer, PRESETS["rwkv7"](64, 2)
    assert not mixer.o_proj.weight.any() and not mixer.decay.down.weight.any()
    up = mixer.decay.up.weight
    torch.testing.assert_close(up.T @ up, alone.decay.up.weight.T @ alone.decay.up.weight, rtol=0, atol=1e-6)
    assert mixer.k_proj.weight.abs().max() <= 0.05 / 8 < mixer.q_proj.weight.abs().max() <= 0.5 / 8
    assert 0.015 < model.blocks[0].feed_forward.up_proj.weight.std() < 0.025


# ---- on N(0, 1) the fast weights stay bounded ----


def twice(*sizes):
    """A gate between 0 and 2."""
    return GateProjection(*sizes, activation=lambda y: 2 * y.sigmoid())


def slow_gates(rule):
    """Decays that keep up to 99.9 % of the state, so that erasing alone has to bound it."""
    return {"g": partial(SoftplusDecay, A_min=0.01)} if "g" in rule.gates else {}


WAYS = {"": {}, "up to 2": {}, "two writes": {"writes_per_read": 2}, "normalised": {"denominator": True}}
LAYERS = {
    f"{rule.name} {way}".strip(): (rule, options)
    for rule in RULES
    for way, options in WAYS.items()
    if (way != "normalised" or normalises(rule)) and (way != "up to 2" or "beta" in rule.gates or "b" in rule.gates)
}


@pytest.mark.parametrize("name", [*LAYERS, *(f"preset-{name}" for name in PRESETS)])
@torch.no_grad()
def test_a_layer_starts_with_bounded_fast_weights(name):
    """The sum of all writes would be eight times as large after 4,096 tokens as after 512."""
    torch.manual_seed(0)
    T, erases, decays, normalised = 512, True, False, name == "preset-linear_transformer"
    if name.startswith("preset-"):
        layer = PRESETS[name.removeprefix("preset-")](64, 1)
    else:
        rule, options = LAYERS[name]
        gates, normalised = slow_gates(rule), "denominator" in options
        if name.endswith("up to 2"):
            gates |= {key: twice for key, gate in rule.gates.items() if gate.high == 2}
        phi = "elu+1" if normalised else None
        layer = FastWeightAttention(64, 1, given(rule), phi, value_dim=8, gates=gates, **options)
        T, erases, decays = 512 // options.get("writes_per_read", 1), rule.erases, "g" in rule.gates
        T = T if rule.lower else T // 8
    x, state = torch.randn(1, 8 * T, 64, generator=torch.Generator().manual_seed(1)), None
    sizes, outputs = [], []
    for part in x.split(T, 1):
        y, state = layer(part, state)
        sizes.append(max(S.norm(dim=(-2, -1)).max().item() for S in leaves(state.memory)))
        outputs.append(y.abs().max().item())
    assert all(0 <= size < float("inf") for size in sizes + outputs), (sizes, outputs)
    if normalised:  # a mean of what was written
        assert max(outputs) < 2 * outputs[0] < 4
    else:
        assert max(sizes) < (4 if erases or decays else 10) * sizes[0], sizes


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@torch.no_grad()
def test_a_decoder_of_any_rule_stays_bounded(rule):
    torch.manual_seed(0)
    attention = {"rule": given(rule), "gates": slow_gates(rule)}
    model = Decoder(DecoderConfig(13, 64, 2, 1, preset=None, attention=attention))
    for block in model.blocks:  # as large as training may make them
        nn.init.normal_(block.mixer.k_proj.weight)
    logits, state = model(torch.randint(13, (1, 512), generator=torch.Generator().manual_seed(1)))
    assert logits.isfinite().all() and logits.abs().max() < 10
    assert max(S.abs().max() for S in leaves(state)) < 1e4


def test_the_norm_of_features_comes_from_the_rule():
    for rule in RULES:
        norm = "l2" if rule.wants_unit_keys else None
        assert FastWeightAttention(E, H, given(rule)).feature_norm == norm
        assert FastWeightAttention(E, H, given(rule), feature_norm=None).feature_norm is None
        if normalises(rule):
            assert FastWeightAttention(E, H, given(rule), "elu+1", denominator=True).feature_norm is None
    for rule in ("longhorn", "rwkv7"):  # bounded for keys of any length
        assert FastWeightAttention(E, H, rule).feature_norm is None
    assert FastWeightAttention(E, H, "delta", "dpfp-1", "sum").feature_norm == "sum"
