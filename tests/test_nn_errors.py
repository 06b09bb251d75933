"""Errors of the layers: one line that names the argument, what was expected and what was found."""

import re

import pytest
import torch
from laws import sequence
from outside.delta_rnn import DELTA_RNN
from torch import nn

from fwp.nn import PRESETS, FastWeightAttention, FavorPlusFeatures, GateProjection, ShortConvolution

E, H = 8, 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim = 8 without head_dim, got 3"),
        *(
            ({name: width}, f"{name}: expected a whole number ≥ 1, got {width}")
            for name, width in [
                ("embed_dim", -8),
                ("num_heads", 0),
                ("num_heads", -2),
                ("head_dim", -4),
                ("head_dim", 4.0),
                ("value_dim", 0),
                ("num_key_heads", 0),
                ("num_value_heads", -1),
                ("out_gate_rank", 0),
            ]
        ),
        ({"rule": "delt"}, "rule: expected one of additive, .*, got 'delt'; did you mean 'delta'?"),
        ({"feature_map": "dfpf"}, "feature_map: expected one of .*, got 'dfpf'"),
        ({"num_key_heads": 3}, "k, v: expected head counts of which one divides the other, got 3 and 2"),
        ({"num_key_heads": 3, "num_value_heads": 3}, "q: expected a multiple or a divisor of 3 heads, got 2"),
        ({"writes_per_read": 0}, "writes_per_read: expected a whole number ≥ 1, got 0"),
        ({"short_conv": -1}, "short_conv: expected a whole number ≥ 0, got -1"),
        ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
        ({"norm_eps": -1.0}, "norm_eps: expected a finite number ≥ 0, got -1.0"),
        ({"feature_norm": "L2"}, "feature_norm: expected 'auto', None, 'sum' or 'l2', got 'L2'"),
        (
            {"rule": "gla", "feature_map": lambda x: x.sum(-1)},
            r"feature_map: expected \(1, 1, 2, \*\), got \(1, 1, 2\)",
        ),
        ({"activation": "sliu"}, "activation: expected one of silu, .*, got 'sliu'; did you mean 'silu'?"),
        ({"out_norm": "rsm"}, "out_norm: expected one of rms, layer, got 'rsm'; did you mean 'rms'?"),
        ({"out_gate": "swish"}, "out_gate: expected one of silu, .*, got 'swish'"),
        (
            {"rule": "delta", "gates": {"bta": nn.Linear}},
            "gates: expected one of beta, got 'bta'; did you mean 'beta'?",
        ),
        ({"gates": {"beta": nn.Linear}}, "gates: expected none, got 'beta'"),
        ({"out_norm": ["rms"]}, r"out_norm: expected one of rms, layer, got \['rms'\]; did you mean 'rms'?"),
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
        (TypeError, "x: expected torch.float32, as the weights, got torch.float64", {"x": x.double()}),
        (TypeError, "x: expected a floating dtype of 16 to 64 bits, got torch.int64", {"x": x.long()}),
        (ValueError, r"mask: expected \(2, 5\), got \(2, 4\)", {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        (TypeError, "mask: expected torch.bool, got torch.float32", {"mask": torch.ones(2, 5)}),
        (TypeError, "state: expected LayerState, got State", {"state": state.memory}),
        (ValueError, r"state.position: expected \(2,\), got \(1,\)", {"state": sequence(state, 0)}),
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
    for wrong, shape in ((x, "(2, 5, 8)"), (x[:, 0, :7], "(2, 7)"), (x[0, 0], "(8,)"), (x[:, None], "(2, 1, 5, 8)")):
        message = re.escape(f"x: expected one token, (*, 8) or (*, 1, 8), got {shape}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            layer.step(wrong)
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
        layer.step([1.0])
    with torch.autocast("cpu", torch.bfloat16):  # it casts between float32 and 16 bits, never float64
        layer(x.half())
        with pytest.raises(TypeError, match=r"^x: expected torch\.float32, as the weights, got torch\.float64$"):
            layer(x.double())
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected on cpu, got on meta$"):
        layer(x[:1], cu_seqlens=torch.tensor([0, 5], device="meta"))
    with pytest.raises(ValueError, match=r"^state\.conv: expected None without short_conv, got a tensor$"):
        PRESETS["delta_net"](E, H, short_conv=0)(x, state)
    with pytest.raises(ValueError, match=r"^num_heads: expected a divisor of embed_dim / 2 = 5, got 2$"):
        PRESETS["gla"](10, 2)
    for make in PRESETS.values():
        with pytest.raises(ValueError, match=r"^num_heads: expected a whole number ≥ 1, got 0$"):
            make(E, 0)
    for options, message in (
        ({"num_key_heads": 1}, "num_key_heads: expected num_heads = 2, since q is corrected by k, got 1"),
        ({"writes_per_read": 2}, "writes_per_read: expected 1, since q is corrected by one k, got 2"),
        ({"gates": {"p": nn.Linear}}, "gates: expected one of beta, g, got 'p'"),
        ({"correction": float("nan")}, "correction: expected a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            PRESETS["comba"](E, H, **options)
    for options, message in (
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim = 8, got 3"),
        ({"layer": 2, "num_layers": 2}, "layer: expected at most num_layers − 1 = 1, got 2"),
        ({"layer": -1}, "layer: expected a whole number ≥ 0, got -1"),
        ({"decay_rank": 0}, "decay_rank: expected a whole number ≥ 1, got 0"),
        ({"backend": "cuda"}, "backend: expected one of .*, got 'cuda'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            PRESETS["rwkv7"](**{"embed_dim": E, "num_heads": H, **options})
    later = PRESETS["rwkv7"](E, H, layer=1, num_layers=2)
    with pytest.raises(ValueError, match=r"^v_first: expected the first layer's values, .*, got None$"):
        later(x)
    with pytest.raises(ValueError, match=r"^v_first: expected \(2, 5, 8\), got \(2, 4, 8\)$"):
        later(x, v_first=x[:, :4])
    with pytest.raises(ValueError, match=r"^shared: expected a divisor of 3 heads, got 2$"):
        GateProjection(E, 3, shared=2)
    for name in ("gla", "kda", "gdn2"):
        with pytest.raises(ValueError, match=r"rank: expected a whole number ≥ 1, got 0$"):
            PRESETS[name](E, H, gate_rank=0)
    for sizes, name in (((0, 3), "channels"), ((4, 0), "width")):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number ≥ 1, got 0$"):
            ShortConvolution(*sizes)
    with pytest.raises(ValueError, match=r"^m: expected a whole number ≥ 1, got 0$"):
        FavorPlusFeatures(4, 0)
