"""Layers: fast weight attention for any rule, published ones, the block around them; the nets of 1991 and 1993."""

from fwp.nn.attention import FastWeightAttention, FavorPlusFeatures, GateProjection, LayerState, SoftplusDecay
from fwp.nn.block import Block, FeedForward
from fwp.nn.convolution import ShortConvolution
from fwp.nn.presets import PRESETS, delta_net, delta_net_2021, gated_delta_net, gla, kda, linear_transformer
from fwp.nn.slow_fast import FastWeightRNN, Online, RecurrentState, SlowFastNet

__all__ = [
    "PRESETS",
    "Block",
    "FastWeightAttention",
    "FastWeightRNN",
    "FavorPlusFeatures",
    "FeedForward",
    "GateProjection",
    "LayerState",
    "Online",
    "RecurrentState",
    "ShortConvolution",
    "SlowFastNet",
    "SoftplusDecay",
    "delta_net",
    "delta_net_2021",
    "gated_delta_net",
    "gla",
    "kda",
    "linear_transformer",
]
