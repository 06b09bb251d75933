"""What layers and models start with: first values, also after the meta device, and fast weights that stay bounded."""

import pytest
import torch
from laws import RULES
from torch import nn

import fwp
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

E, H = 8, 2


def given(rule):
    """The name of a rule of the table, or the rule itself if it is from outside."""
    return rule.name if rule.name in fwp.RULES else rule


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
