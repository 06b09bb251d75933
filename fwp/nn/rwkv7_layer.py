"""RWKV-7's time mixing: a token shift, low-rank gates, and a bonus for the current token, around the rule "rwkv7"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwp import errors, validate
from fwp.core import without_autocast
from fwp.functional import Backend, fast_weights
from fwp.nn.convolution import real_tokens, token_shift
from fwp.nn.layer import Layer, lengths, matched, one_dtype
from fwp.rules import RULES
from fwp.states import LayerState

FASTEST_DECAY = -math.exp(-0.5)  # the lowest log decay: a token keeps at least 54.5 %


class LowRank(nn.Module):
    """W_up a(W_down x) + b: x [..., E] → [..., E], through `rank` features.

    At first W_down is 0, W_up is 0.1 √(E / rank) times orthogonal columns, and b [E], if there is one, is 0.
    """

    def __init__(
        self,
        embed_dim: int,
        rank: int,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(embed_dim, rank, bias=False)
        self.up = nn.Linear(rank, embed_dim, bias=False)
        self.bias = nn.Parameter(torch.empty(embed_dim)) if bias else None
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As above."""
        nn.init.zeros_(self.down.weight)
        embed_dim, rank = self.up.weight.shape
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, math.sqrt(embed_dim / rank)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., E] → [..., E]."""
        y = self.down(matched(x, self.down))
        y = self.up(matched(y if self.activation is None else self.activation(y), self.up))
        return y if self.bias is None else y + self.bias


class RWKV7Attention(Layer):
    """The time mixing of RWKV-7, on the rule "rwkv7".

    With E features in H heads of N = E / H each, x'_• = x_t + (x_{t−1} − x_t) ⊙ mix_•, and x_{−1} = 0:

        q = W_q x'_r,  k = W_k x'_k,  v = W_v x'_v                        q is the paper's receptance r
        g = −e^(−1/2) σ(decay(x'_w)),  a = σ(rate(x'_a)),  gate = out_gate(x'_g)
        v ← v + (v_first − v) ⊙ σ(value_mix(x'_v))                       in every layer but the first
        κ = k ⊙ k_k with unit length per head,  k ← k ⊙ (1 + (a − 1) ⊙ k_a)
        S ← Diag(exp g) S − (κ ⊙ a)(Sᵀκ)ᵀ + k vᵀ,  o = Sᵀ q
        y = W_o ((norm(o) + (Σ q ⊙ k ⊙ r_k) v) ⊙ gate)                    the sum and the norm per head

    Args:
        embed_dim: E. num_heads: H, a divisor of E.
        layer, num_layers: the place in a stack, 0 … num_layers − 1, on which the first values of the parameters depend.
            Layer 0 makes v_first, its own v; a later one has `value_mix` and needs v_first, unless mix_values is False.
        mix_values: whether v is mixed with v_first; None: in every layer but the first.
        decay_rank, rate_rank, value_rank, gate_rank: of the low-rank maps; None: the published choice for E and N.
        norm_eps: the norm's eps is N times this.
        backend: as in `fwp.fast_weights`.

    Parameters: q_proj, k_proj, v_proj, o_proj; mix [6, E] for r, w, k, v, a, g; decay, rate, value_mix and out_gate,
    each a `LowRank` (tanh inside decay, σ inside out_gate, which has no bias); k_k, k_a [E]; r_k [H, N]; out_norm, a
    group norm over the heads with weight and bias [E].

    Raises: ValueError for options or a v_first that don't fit, TypeError for a wrong state or dtype.

    Source: Peng et al. 2025, arXiv 2503.14456, and BlinkDL's RWKV-LM, RWKV_Tmix_x070.
    """

    own_starts = True

    @errors.explains_options
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        layer: int = 0,
        num_layers: int = 1,
        mix_values: bool | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 1e-5,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_layers", num_layers)):
            errors.size(name, size)
        errors.size("layer", layer, 0)
        errors.number("norm_eps", norm_eps, 0)
        validate.options(RULES["rwkv7"], backend=backend)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of embed_dim = {embed_dim}, got {num_heads}")
        if layer >= num_layers:
            raise ValueError(f"layer: expected at most num_layers − 1 = {num_layers - 1}, got {layer}")
        E, H, N = embed_dim, num_heads, embed_dim // num_heads
        given = {"decay_rank": decay_rank, "rate_rank": rate_rank, "value_rank": value_rank, "gate_rank": gate_rank}
        ranks = {name: _published_rank(name, E, N) if rank is None else rank for name, rank in given.items()}
        for name, rank in ranks.items():
            errors.size(name, rank)
        self.embed_dim, self.num_heads, self.backend, self.tail = E, H, backend, (1, E)
        self.mixes_values = layer > 0 if mix_values is None else mix_values
        self.layer, self.num_layers = layer, num_layers

        self.mix = nn.Parameter(torch.empty(6, E))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.decay = LowRank(E, ranks["decay_rank"], activation=torch.tanh)
        self.rate = LowRank(E, ranks["rate_rank"])
        self.value_mix = LowRank(E, ranks["value_rank"]) if self.mixes_values else None
        self.out_gate = LowRank(E, ranks["gate_rank"], bias=False, activation=torch.sigmoid)
        self.k_k, self.k_a = nn.Parameter(torch.empty(E)), nn.Parameter(torch.empty(E))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.out_norm = nn.GroupNorm(H, E, eps=N * norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published first values, also of the parts whose own are others. The parts come before it."""
        E = self.embed_dim
        start = _Start(E, E // self.num_heads, self.layer, self.num_layers)
        for linear, width in ((self.q_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(linear.weight, -width * E**-0.5, width * E**-0.5)
        nn.init.zeros_(self.o_proj.weight)
        self.mix.copy_(start.mix())
        for part, bias in ((self.decay, start.decay()), (self.rate, start.rate()), (self.value_mix, start.value_mix())):
            if part is not None and part.bias is not None:
                part.bias.copy_(bias)
        self.k_k.copy_(0.71 - 0.1 * start.ramp)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        nn.init.constant_(self.out_norm.weight, ((self.layer + 1) / self.num_layers) ** 0.7)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        v_first: Tensor | None = None,
        return_v_first: bool = False,
    ) -> tuple[Tensor, LayerState] | tuple[Tensor, LayerState, Tensor]:
        """x [B, T, E] → y [B, T, E] and the state after it, with return_v_first also v_first [B, T, E].

        state, mask, cu_seqlens: as in `FastWeightAttention`; `LayerState.conv` [N, 1, E] is each sequence's last x.
        v_first: what the stack's first layer returned for the same tokens; it is passed on as it is.
        """
        self._check(x, state, mask, cu_seqlens, self.q_proj)
        if self.mixes_values and v_first is None:
            raise ValueError(
                "v_first: expected the first layer's values, which this layer mixes with its own, got None"
            )
        if v_first is not None:
            errors.tensor("v_first", v_first, tuple(x.shape), device=x.device)
        memory, tail, position = (None, None, 0) if state is None else state
        real = real_tokens(x, mask, cu_seqlens)
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0)  # other inputs may be anything, even NaN
        q, k, v, gates, out_gate, tail = self._project(x, tail, mask, cu_seqlens)
        if v_first is None:
            v_first = v
        elif self.mixes_values:
            gate = gates.pop("value_mix")
            first = v_first if real is None else v_first.masked_fill(~real.unsqueeze(-1), 0)
            v = v + ((first.to(gate.dtype) - v) * gate).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))  # [B, T, H, N]
        o, memory = fast_weights(
            "rwkv7", q, k, v, mask=mask, state=memory, cu_seqlens=cu_seqlens, backend=self.backend, **gates
        )
        o = o.to(self.out_norm.weight.dtype).flatten(2)  # [B, T, E]
        o = self.out_norm(o.flatten(0, 1)).view_as(o)
        o = o + ((q * k * self.r_k.to(k.dtype)).sum(-1, keepdim=True) * v).flatten(2)
        y = self.o_proj(matched((o * out_gate).to(v.dtype), self.o_proj))
        if real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)
        end = LayerState(memory, tail, position + lengths(x, mask, cu_seqlens))
        return (y, end, v_first) if return_v_first else (y, end)

    def _project(
        self, x: Tensor, tail: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], Tensor, Tensor]:
        """q, k, v [B, T, E], the rule's gates and that of value mixing, the output gate, and the token shift's tail."""
        before, tail = token_shift(x, tail, mask, cu_seqlens)
        x_r, x_w, x_k, x_v, x_a, x_g = ((x + (before - x) * mix).to(x.dtype) for mix in self.mix)
        projected = ((self.q_proj, x_r), (self.k_proj, x_k), (self.v_proj, x_v))
        q, k, v = one_dtype(*(module(matched(y, module)) for module, y in projected))
        wide = torch.promote_types(k.dtype, torch.float32)
        raw = {"g": self.decay(x_w), "a": self.rate(x_a)}
        if self.value_mix is not None:
            raw["value_mix"] = self.value_mix(x_v)
        with without_autocast(x):
            found = {name: y.to(wide).sigmoid() for name, y in raw.items()}
            a, wide_k = found["a"], k.to(wide)
            found["kappa"] = F.normalize((wide_k * self.k_k).unflatten(-1, (self.num_heads, -1)), dim=-1)
            found["g"] = FASTEST_DECAY * found["g"]
            k = (wide_k * (1 + (a - 1) * self.k_a)).to(k.dtype)
        for name in ("g", "a"):
            found[name] = found[name].unflatten(-1, (self.num_heads, -1))
        return q, k, v, found, self.out_gate(x_g), tail

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, heads={self.num_heads}, mixes_values={self.mixes_values}"


class _Start:
    """The published first values of a layer's parameters, each [E]."""

    def __init__(self, E: int, N: int, layer: int, num_layers: int) -> None:
        self.depth = layer / max(1, num_layers - 1)  # 0 … 1
        self.rest = 1 - layer / num_layers  # 1 … 1 / num_layers
        n = torch.arange(E, dtype=torch.float64, device="cpu")
        self.place = n / E
        self.fraction = n / max(1, E - 1)
        self.ramp = self.fraction - 0.5
        zigzag = ((n % N) - (N - 1) / 2) / max(1, (N - 1) / 2)
        self.zigzag = zigzag * zigzag.abs()

    def mix(self) -> Tensor:
        """[6, E], for r, w, k, v, a, g."""
        return torch.stack([1 - self.place ** (c * self.rest) for c in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])

    def decay(self) -> Tensor:
        return -5.5 + 6 * self.fraction ** (1 + self.depth**0.3) + 2.5 * self.zigzag

    def rate(self) -> Tensor:
        return -0.19 + 0.3 * self.zigzag + 0.4 * self.ramp

    def value_mix(self) -> Tensor:
        return 0.73 - 0.4 * self.ramp


def _published_rank(name: str, E: int, N: int) -> int:
    """A multiple of 32 that grows with √E."""
    factor = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}[name]
    return max(32, 32 * round(factor * math.sqrt(E) * (1 if name == "gate_rank" else N / 64) / 32))
