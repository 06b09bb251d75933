"""Comba's layer: fast weight attention in which keys correct the queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fwp import errors
from fwp.core import state_dtype, to_heads
from fwp.feature_maps import transform
from fwp.nn.attention import FastWeightAttention


class CombaAttention(FastWeightAttention):
    """`FastWeightAttention` on the rule "comba", with p = norm(φ(σ(decay) k)) and q ← q − D σ(decay) k before φ.

    q and k here have passed the convolution and its activation. Parameters beside those of `FastWeightAttention`: decay
    and D [Hq], at first 1 and `correction`. Options as there, except for the rule. ValueError for several writes per
    read, and for numbers of key heads and query heads that differ.

    With feature_norm="l2" p is normalised again and equals k, so that decay acts on the queries alone. The published
    kernels compute the same, in training and in their recurrent form.
    """

    made_of_keys = ("p",)

    def __init__(self, embed_dim: int, num_heads: int, *, correction: float = 1.0, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, "comba", **options)
        Hq, Hk, _ = self.heads
        if Hk != Hq:
            raise ValueError(f"num_key_heads: expected num_heads = {Hq}, since q is corrected by k, got {Hk}")
        if self.writes_per_read != 1:
            raise ValueError(f"writes_per_read: expected 1, since q is corrected by one k, got {self.writes_per_read}")
        errors.number("correction", correction)
        self.correction = float(correction)
        self.decay, self.D = nn.Parameter(torch.empty(Hq)), nn.Parameter(torch.empty(Hq))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """decay is 1, D is `correction`."""
        nn.init.ones_(self.decay)
        nn.init.constant_(self.D, self.correction)

    def _ask(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, dict[str, Any]]:
        q, gates = super()._ask(x, q, k)
        dtype = state_dtype(k.dtype)
        p = self.decay.to(dtype).sigmoid().unsqueeze(-1) * k.to(dtype)  # [B, T, Hk, K]
        q = (q.to(dtype) - self.D.to(dtype).unsqueeze(-1) * p).to(q.dtype)
        p = transform(p, self.feature_map, self.feature_norm)
        return q, gates | {"p": to_heads(p, max(self.heads[1:]))}
