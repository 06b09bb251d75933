"""What a decoder is made from. It stands alone, so that `import fwp` is enough to load one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fwp import errors

if TYPE_CHECKING:
    from fwp.nn.block import Block, Norm, Placement


@dataclass(frozen=True)
class DecoderConfig:
    """Everything a `Decoder` is made from.

    vocab_size: number of token ids. embed_dim: E. num_layers: number of blocks. num_heads: heads per block.
    preset: a name of `fwp.nn.PRESETS`; None: `FastWeightAttention`.
    attention: its further options, such as {"rule": "delta", "feature_map": "dpfp-1"}. With its safe default torch.load
        takes names, numbers, feature maps of this package and rules of the table, but no other functions or classes.
    ff_dim: width of the feed-forward nets; None: 4 E. ff_activation: "gelu", "relu", "swiglu", …
    norm: "rms" or "layer". placement: "pre" or "post", see `fwp.nn.Block`. dropout: after the embedding and in blocks.
    tied: whether the head's weights are the embedding's.

    There is no positional encoding: a causal recurrence knows the order. With preset "rwkv7" each block is built for
    its place in the stack, and mixes its values with those of the first.
    """

    vocab_size: int
    embed_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    preset: str | None = "gated_delta_net"
    attention: Mapping[str, Any] = field(default_factory=dict)
    ff_dim: int | None = None
    ff_activation: str = "gelu"
    norm: Norm = "rms"
    placement: Placement = "pre"
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "ff_dim"):
            if getattr(self, name) is not None:
                errors.size(name, getattr(self, name))
        if not self.attention.get("causal", True):
            raise ValueError("attention: expected a causal layer, since a decoder predicts the next token, got another")

    def block(self, layer: int = 0) -> Block:
        """The block at that place, 0 … num_layers − 1."""
        from fwp.nn import PRESETS, Block, FastWeightAttention, FeedForward
        from fwp.nn.block import pick

        E = self.embed_dim
        make = FastWeightAttention if self.preset is None else pick("preset", self.preset, PRESETS)
        place: dict[str, Any] = {"layer": layer, "num_layers": self.num_layers} if self.preset == "rwkv7" else {}
        mixer = make(E, self.num_heads, **place, **self.attention)
        feed_forward = FeedForward(E, 4 * E if self.ff_dim is None else self.ff_dim, self.ff_activation)
        return Block(E, mixer, feed_forward, self.norm, self.placement, self.dropout)


torch.serialization.add_safe_globals([DecoderConfig])  # for torch.load, which by default makes known types only
