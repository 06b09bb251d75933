"""Layers: fast weight attention for any rule, published layers, the block around them; the nets of 1991 and 1993.

Every module with parameters or buffers of its own has `reset_parameters`. A model that was built on the meta device
and moved by `to_empty` gets its first values from `model.apply`, which comes to the parts before the whole::

    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
"""

from fwp.nn.attention import FastWeightAttention, FavorPlusFeatures, GateProjection, SoftplusDecay
from fwp.nn.block import Block, FeedForward
from fwp.nn.comba_layer import CombaAttention
from fwp.nn.convolution import ShortConvolution, token_shift
from fwp.nn.layer import Layer
from fwp.nn.presets import (
    PRESETS,
    comba,
    delta_net,
    delta_net_2021,
    delta_product,
    gated_delta_net,
    gated_delta_product,
    gdn2,
    gla,
    kda,
    linear_transformer,
    longhorn,
    rwkv7,
)
from fwp.nn.rwkv7_layer import RWKV7Attention
from fwp.nn.slow_fast import FastWeightRNN, SlowFastNet
from fwp.nn.stateful import Stateful
from fwp.states import FastWeights, LayerState, Online, RecurrentState, StackState

__all__ = [
    "PRESETS",
    "Block",
    "CombaAttention",
    "FastWeightAttention",
    "FastWeightRNN",
    "FastWeights",
    "FavorPlusFeatures",
    "FeedForward",
    "GateProjection",
    "Layer",
    "LayerState",
    "Online",
    "RWKV7Attention",
    "RecurrentState",
    "ShortConvolution",
    "SlowFastNet",
    "SoftplusDecay",
    "StackState",
    "Stateful",
    "comba",
    "delta_net",
    "delta_net_2021",
    "delta_product",
    "gated_delta_net",
    "gated_delta_product",
    "gdn2",
    "gla",
    "kda",
    "linear_transformer",
    "longhorn",
    "rwkv7",
    "token_shift",
]
