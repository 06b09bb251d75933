"""The fast weights that stand in a converted attention module: the rule's gates, feature maps and options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fwp import errors, feature_maps, rules, validate
from fwp.errors import suggest
from fwp.interop.transformers.cache import FastWeightCacheLayer, Writes
from fwp.nn.attention import GateProjection

HEDGEHOG = "hedgehog"
OPTIONS = ("feature_map", "feature_norm", "denominator", "backend", "rotary")


def suited_options(rule: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a conversion with the rule's defaults, checked. All of them can be written as JSON."""
    for name in given:
        if name not in OPTIONS:
            raise TypeError(f"unexpected keyword {name!r}{suggest(name, OPTIONS)}")
    row = rules.get(rule)
    suited: dict[str, Any] = {"feature_map": None, "feature_norm": None, "denominator": False}
    if row.wants_unit_keys:
        suited["feature_norm"] = "l2"
    elif row.plain and not row.erases:
        suited |= {"feature_map": "elu+1", "denominator": True}
    options = suited | {"backend": "auto", "rotary": True} | given
    if options["feature_map"] != HEDGEHOG:
        if not isinstance(options["feature_map"], str | None):
            kind = type(options["feature_map"]).__name__
            raise TypeError(f"feature_map: expected a name, which config.json can hold, got {kind}")
        feature_maps.get(options["feature_map"])
    if options["feature_norm"] not in (None, "sum", "l2"):
        raise ValueError(f"feature_norm: expected None, 'sum' or 'l2', got {options['feature_norm']!r}")
    if not isinstance(options["rotary"], bool):
        raise TypeError(f"rotary: expected True or False, got {options['rotary']!r}")
    validate.options(row, denominator=options["denominator"], backend=options["backend"])
    return options


class Hedgehog(nn.Module):
    """Learned features φ(x) = [softmax(W x), softmax(−W x)] per head, width 2K. W [H, K, K] starts as the identity.

    Hedgehog, Zhang et al. 2024, arXiv 2402.04347.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H, K] → [B, T, H, 2K]."""
        y = torch.einsum("bthk,hkf->bthf", x, self.weight.to(x.dtype))
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class FastWeightMemory(nn.Module):
    """o = Sᵀ q under any rule, with S programmed by the keys and values of an attention module.

    embed_dim: E, of the inputs x from which the rule's gates are made. query_heads: Hq; heads: H, of keys and values,
    one state each. head_dim: K. options: of `suited_options`.

    At first the gates don't depend on x: a learning rate is 1/2, and the decays of the heads lie between 1 − 2⁻⁵ and
    1 − 2⁻⁸, as in RetNet (arXiv 2307.08621). Second keys are random projections of x.
    """

    def __init__(
        self, rule: str, embed_dim: int, query_heads: int, heads: int, head_dim: int, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.rule, self.heads, self.head_dim = rule, heads, head_dim
        self.options = {"rule": rule, **{name: options[name] for name in OPTIONS if name != "rotary"}}
        row = rules.get(rule)
        sizes = ((query_heads, head_dim), (heads, head_dim), (heads, head_dim))
        validate.tensors(row, *(torch.empty(0, 0, *size, device="meta") for size in sizes))
        self.q_features = self.k_features = None
        width = head_dim
        if options["feature_map"] == HEDGEHOG:
            self.options["feature_map"] = None
            self.q_features, self.k_features = Hedgehog(query_heads, head_dim), Hedgehog(heads, head_dim)
            width = 2 * head_dim
        elif options["feature_map"] is not None:
            probe = torch.zeros(1, 1, 1, head_dim, device="cpu")
            width = feature_maps.apply(feature_maps.get(options["feature_map"]), probe).shape[-1]
        self.gates = nn.ModuleDict()
        for name, gate in row.gates.items():
            features = {"BTH": None, "BTHK": width, "BTHV": head_dim}[gate.shape]
            made = GateProjection(embed_dim, heads, features, gate.activation)
            if not gate.unit:
                _start(made.proj, heads, decays=gate.high == 0)
            self.gates[f"gate-{name}"] = made

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layer: FastWeightCacheLayer | None = None,
    ) -> Tensor:
        """x [B, T, E], q [B, T, Hq, K], k and v [B, T, H, K] → o [B, T, Hq, K].

        mask: [B, T] bool, False for padding. cu_seqlens: [N + 1] int, the borders of packed sequences in the B·T
        tokens. layer: the cache's layer, whose state goes on; None: the sequences begin here.
        """
        errors.tensor("k", k, (x.shape[0], x.shape[1], self.heads, self.head_dim))
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)  # padding may be anything, even NaN
        if self.q_features is not None and self.k_features is not None:
            q, k = self.q_features(q), self.k_features(k)
        gates = {name.removeprefix("gate-"): gate(x) for name, gate in self.gates.items()}
        writes = Writes(k, v, gates, mask, self.options)
        if cu_seqlens is not None:
            if layer is not None:
                raise ValueError("cache: expected use_cache=False with packed sequences, got a cache")
            row = writes.change(lambda y: y.flatten(0, 1).unsqueeze(0))
            return row.apply(q.flatten(0, 1).unsqueeze(0), None, cu_seqlens)[0].view(*q.shape[:3], -1)
        return writes.apply(q, None)[0] if layer is None else layer.program(q, writes)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "backend")
        return f"heads={self.heads}, head_dim={self.head_dim}, {options}"


@torch.no_grad()
def _start(linear: Any, heads: int, decays: bool) -> None:
    """Sets a gate's projection to a constant: 0, or for a decay, which is logsigmoid of it, log(α / (1 − α))."""
    linear.weight.zero_()
    linear.bias.zero_()
    if decays:
        logits = torch.linspace(5, 8, heads, device=linear.bias.device).mul(math.log(2)).expm1().log()
        linear.bias.view(heads, -1).copy_(logits.unsqueeze(-1))
