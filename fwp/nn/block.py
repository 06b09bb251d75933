"""The parts around a mixer: norms, the feed-forward net, and the place of the norm in a residual block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from fwp.errors import suggest
from fwp.nn.stateful import Stateful, carry

Norm = Literal["rms", "layer"]
Placement = Literal["pre", "post"]
Option = TypeVar("Option")

NORMS: Mapping[str, type[nn.RMSNorm] | type[nn.LayerNorm]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
}


def pick(argument: str, name: Any, table: Mapping[str, Option]) -> Option:
    """table[name]. ValueError with the known names if it is none of them."""
    if not isinstance(name, str) or name not in table:
        known = f"one of {', '.join(table)}" if table else "none"
        raise ValueError(f"{argument}: expected {known}, got {name!r}{suggest(str(name), table)}")
    return table[name]


class FeedForward(nn.Module):
    """W_2 a(W_1 x), or W_2 (silu(W_g x) ⊙ W_1 x) for activation "swiglu"; x [..., E], the hidden width ff_dim.

    activation: "swiglu" (Shazeer 2020, arXiv 2002.05202), or a name of ACTIVATIONS.
    """

    def __init__(self, embed_dim: int, ff_dim: int, activation: str = "gelu") -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.activation = F.silu if self.gated else pick("activation", activation, {**ACTIVATIONS, "swiglu": F.silu})
        self.gate_proj = nn.Linear(embed_dim, ff_dim) if self.gated else None
        self.up_proj = nn.Linear(embed_dim, ff_dim)
        self.down_proj = nn.Linear(ff_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(hidden)


def pre(x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
    """x + f(norm(x))."""
    return x + f(norm(x))


def post(x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor]) -> Tensor:
    """norm(x + f(x))."""
    return norm(x + f(x))


PLACEMENTS: Mapping[str, Callable[[Tensor, nn.Module, Callable[[Tensor], Tensor]], Tensor]] = {"pre": pre, "post": post}


class Block(Stateful):
    """A mixer and a feed-forward net, each with a residual connection and a norm.

    mixer: (x [B, T, E], state, mask, cu_seqlens) → (y [B, T, E], state), such as `FastWeightAttention`. Other options
        of its `forward`, such as a context, reach it as they are, without the norm.
    feed_forward: [..., E] → [..., E].
    norm: "rms" or "layer".
    placement: "pre" is x + f(norm(x)), "post" is norm(x + f(x)) (Xiong et al. 2020, arXiv 2002.04745).
    dropout: of what the mixer and the feed-forward net add.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: nn.Module,
        feed_forward: nn.Module,
        norm: Norm = "rms",
        placement: Placement = "pre",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        make = pick("norm", norm, NORMS)
        self.place = pick("placement", placement, PLACEMENTS)
        self.mixer, self.feed_forward = mixer, feed_forward
        self.mixer_norm, self.feed_forward_norm = make(embed_dim, eps=1e-5), make(embed_dim, eps=1e-5)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """x [B, T, E] → [B, T, E], the mixer's state and its further results; the other arguments go to the mixer."""
        rest: list[Any] = []

        def mix(x: Tensor) -> Tensor:
            nonlocal rest
            y, *rest = carry(self.mixer, x, state, mask, cu_seqlens, **options)
            return self.dropout(y)

        x = self.place(x, self.mixer_norm, mix)
        x = self.place(x, self.feed_forward_norm, lambda x: self.dropout(self.feed_forward(x)))
        return x, *rest
