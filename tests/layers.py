"""The layers that several tests build, random inputs for them, and gradients of their results."""

import torch
from laws import RULES, leaves
from outside.delta_rnn import DELTA_RNN
from torch import nn

import fwp
from fwp.nn import (
    PRESETS,
    FastWeightAttention,
    FavorPlusFeatures,
)

E, H = 8, 2


def given(rule):
    """The name of a rule of the table, or the rule itself if it is from outside."""
    return rule.name if rule.name in fwp.RULES else rule


def awake(layer):
    """The layer, with random weights in place of those that start at 0."""
    for p in layer.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.3)
    return layer


def gates(layer):
    """The layer's gate modules. Layers other than FastWeightAttention have none."""
    return getattr(layer, "gates", {})


LAYERS = {
    f"{rule.name}-conv{width}": (
        lambda rule=rule, width=width, **options: FastWeightAttention(
            E, H, given(rule), feature_norm="l2", short_conv=width, value_dim=3, **options
        )
    )
    for rule in RULES
    for width in (0, 4)
}
LAYERS |= {
    f"preset-{name}": (lambda make=make, **options: awake(make(E, H, **options))) for name, make in PRESETS.items()
}
LAYERS |= {
    "grouped-queries": lambda: FastWeightAttention(
        E, 4, "gated_delta", num_key_heads=2, num_value_heads=2, short_conv=2
    ),
    "grouped-values": lambda: PRESETS["gated_delta_net"](E, H, num_value_heads=4, norm_eps=1e-6),
    "normalised": lambda: FastWeightAttention(E, H, "delta", "dpfp-2", "sum", True, short_conv=3, bias=True),
    "wide-gates": lambda: FastWeightAttention(E, H, "kda", "dpfp-2", "sum", out_norm="layer", out_gate=True),
    "before": lambda: FastWeightAttention(E, H, "decay", "elu+1", read="before", activation="relu"),
    "writes": lambda: FastWeightAttention(E, H, "gated_delta", feature_norm="l2", short_conv=3, writes_per_read=2),
    "writes-of-keys": lambda: FastWeightAttention(E, H, "rwkv7", writes_per_read=3, out_gate=True, bias=True),
    "writes-before": lambda: FastWeightAttention(
        E, H, "delta", "dpfp-1", "sum", True, read="before", num_value_heads=4, writes_per_read=2
    ),
    "writes-outside": lambda: FastWeightAttention(E, H, DELTA_RNN, "softmax", value_dim=3, writes_per_read=2),
    "grouped-erase-gates": lambda: PRESETS["gdn2"](E, H, num_value_heads=4, value_dim=3),
    "grouped-corrections": lambda: PRESETS["comba"](E, H, num_value_heads=4),
    "favor": lambda: FastWeightAttention(E, H, "additive", FavorPlusFeatures(4, 6, redraw="never"), denominator=True),
}


def tokens(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(layer, x, *results, retain_graph=True):
    """Gradients of a fixed random sum of all results, for the inputs and every parameter."""
    results = [r for r in leaves(*results) if r.is_floating_point()]
    loss = sum((r * tokens(*r.shape, seed=i)).sum() for i, r in enumerate(results))
    return torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True, retain_graph=retain_graph)
