"""Layers: fast weight attention for any rule, the published layers as presets, and the block around them."""

from fwp.nn.attention import FastWeightAttention, FavorPlusFeatures, GateProjection, LayerState, SoftplusDecay
from fwp.nn.block import Block, FeedForward
from fwp.nn.convolution import ShortConvolution
from fwp.nn.presets import PRESETS, delta_net, delta_net_2021, gated_delta_net, gla, kda, linear_transformer

__all__ = [
    "PRESETS",
    "Block",
    "FastWeightAttention",
    "FavorPlusFeatures",
    "FeedForward",
    "GateProjection",
    "LayerState",
    "ShortConvolution",
    "SoftplusDecay",
    "delta_net",
    "delta_net_2021",
    "gated_delta_net",
    "gla",
    "kda",
    "linear_transformer",
]
