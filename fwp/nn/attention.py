"""A layer for any rule: projections → short convolution → fast weights → norm and gate → projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fwp import errors, feature_maps, rules, validate
from fwp._torch_private import tree_leaves
from fwp.core import Read, overwriting, without_autocast
from fwp.feature_maps import FeatureMap
from fwp.functional import Backend, fast_weights
from fwp.nn.block import ACTIVATIONS, NORMS, Norm, pick
from fwp.nn.convolution import ShortConvolution, borders
from fwp.rules import Rule


class LayerState(NamedTuple):
    """All that a layer remembers of N sequences, of a size that doesn't depend on how many tokens they had.

    memory: `fwp.State(S [N, H, K', V], z [N, H, K'] or None)`, or the state of a rule that has its own.
    conv: [N, W − 1, C], the last inputs of the short convolution, oldest first; None without one.
    position: [N] int64, the tokens seen, masked ones not counted.
    """

    memory: Any
    conv: Tensor | None
    position: Tensor


def projection(embed_dim: int, width: int, rank: int | None = None, bias: bool = False) -> nn.Module:
    """A linear map of [..., embed_dim] to [..., width], through `rank` features if given."""
    if rank is None:
        return nn.Linear(embed_dim, width, bias=bias)
    errors.size("rank", rank)
    return nn.Sequential(nn.Linear(embed_dim, rank, bias=False), nn.Linear(rank, width, bias=bias))


class GateProjection(nn.Module):
    """activation(W x + b): x [B, T, E] → a gate [B, T, H], or [B, T, H, D] with features D.

    activation: of the projection in float32 (float64 for float64 inputs), under autocast too.
    rank: W = W_2 W_1 through that many features; None: one full matrix.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        features: int | None = None,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
        rank: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.shape = (heads,) if features is None else (heads, features)
        self.activation = activation
        self.proj = projection(embed_dim, heads * (features or 1), rank, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, E] → [B, T, H] or [B, T, H, D]."""
        y = self.proj(x)
        y = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, self.shape)
        with without_autocast(x):
            return self.activate(y)

    def activate(self, y: Tensor) -> Tensor:
        """The gate of a projection y [B, T, H] or [B, T, H, D]."""
        return self.activation(y)


class SoftplusDecay(GateProjection):
    """g = −exp(A_log) · softplus(W x + dt_bias), the decay of Mamba-2, Gated DeltaNet and KDA.

    A_log [H], dt_bias [H] or [H · D]. At first exp(A_log) is uniform in (1, 16) and softplus(dt_bias) log-uniform in
    (0.001, 0.1), so that a token keeps between 20 % and 99.9 %.
    """

    def __init__(self, embed_dim: int, heads: int, features: int | None = None, rank: int | None = None) -> None:
        super().__init__(embed_dim, heads, features, rank=rank, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads * (features or 1)).uniform_(-3, -1) * torch.log(torch.tensor(10.0))
        self.dt_bias = nn.Parameter(step.exp().expm1().log())  # softplus⁻¹

    def activate(self, y: Tensor) -> Tensor:
        rate = self.A_log.to(y.dtype).exp()
        rate = rate if len(self.shape) == 1 else rate.unsqueeze(-1)
        return -rate * F.softplus(y + self.dt_bias.to(y.dtype).view(self.shape))


class FavorPlusFeatures(nn.Module):
    """FAVOR+ for a layer: the random directions R [m, d] are a buffer and drawn anew when a sequence begins.

    redraw: "training" draws in every forward pass of a module in training mode that starts without a state,
        "always" in evaluation too (as the experiments of arXiv 2102.11174 do), "never" keeps the first R.
    A state was written with an R, so a call that continues one keeps it; what was begun before the last draw can't be
    continued. Draws come from torch's CPU generator.
    """

    R: Tensor

    def __init__(
        self, head_dim: int, m: int | None = None, redraw: Literal["training", "always", "never"] = "training"
    ) -> None:
        super().__init__()
        self.redraw = pick("redraw", redraw, {name: name for name in ("training", "always", "never")})
        self.size = (head_dim, m)
        self.register_buffer("R", feature_maps.directions(*self.size).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] → [..., 2m], in float32 or float64."""
        with without_autocast(x):
            return feature_maps.positive_features(x.to(torch.promote_types(x.dtype, torch.float32)), self.R)

    def begin(self) -> None:
        """A sequence begins: draws a new R if `redraw` says so."""
        if self.redraw == "always" or (self.redraw == "training" and self.training):
            # a new tensor: a backward pass may need the old one
            self.R = feature_maps.directions(*self.size).to(self.R)


class FastWeightAttention(nn.Module):
    """Multi-head attention by fast weights, under any rule.

    Per token x: q, k, v = a(conv(W x)) by heads and the rule's gates from x; the rule writes (k, v) into S and reads
    o = scale · Sᵀ norm(φ(q)), as in `fwp.fast_weights`; y = W_o concat over heads of norm(o) ⊙ a(W_g x).

    Args:
        embed_dim: E. num_heads: Hq, of the queries.
        rule: a name of `fwp.RULES`, or a `Rule`, which may have its own state and gates.
        feature_map, feature_norm, denominator, read: as in `fwp.fast_weights`; "favor+" is `FavorPlusFeatures`, and a
            map that is a module is trained with the layer.
        num_key_heads, num_value_heads: Hk and Hv; None: num_heads. H = max(Hk, Hv) states; Hk and Hv divide H, and Hq
            is a multiple or a divisor of H.
        head_dim: K, width of a query and key head; None: embed_dim / num_heads.
        value_dim: V, width of a value head; None: head_dim.
        scale: of the queries; None: 1/√head_dim.
        bias: of the projections of q, k, v and the output.
        short_conv: width W of a causal convolution of q, k and v along T; 0: none.
        activation: after it, of q, k and v: "silu", "relu", … or a function; None: none.
        gates: name of a gate → what makes it, called with (embed_dim, H, D or None), the gate being [B, T, H, D] or
            [B, T, H]; a module [B, T, E] → gate. By default `GateProjection` with the activation of the rule's row.
        out_norm: "rms" or "layer" normalises each head's o; None: no norm. norm_eps: its eps.
        out_gate: whether o is multiplied by silu(W_g x); a name or function takes the place of silu.
        out_gate_rank: W_g = W_2 W_1 through that many features.
        backend: as in `fwp.fast_weights`.

    Raises: ValueError for options that don't fit, TypeError for a wrong state or dtype.

    Under autocast the projections and the convolution run in its dtype, the norm and the gate of o in their weights'.
    The rule's gates are float32 from their activation on, and the state always is (float64 for float64 inputs).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rule: str | Rule = "additive",
        feature_map: str | FeatureMap | None = None,
        feature_norm: Literal["sum", "l2"] | None = None,
        denominator: bool = False,
        *,
        read: Read = "after",
        num_key_heads: int | None = None,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        scale: float | None = None,
        bias: bool = False,
        short_conv: int = 0,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        gates: Mapping[str, Callable[[int, int, int | None], nn.Module]] | None = None,
        out_norm: Norm | None = None,
        norm_eps: float = 1e-5,
        out_gate: bool | str | Callable[[Tensor], Tensor] = False,
        out_gate_rank: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        row = rules.get(rule)
        factor = 1.0 if scale is None else scale
        validate.options(row, read=read, scale=factor, denominator=denominator, backend=backend)
        errors.number("norm_eps", norm_eps, 0)
        feature_maps.norm(torch.zeros(1), feature_norm)
        errors.size("short_conv", short_conv, 0)
        widths = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim}
        widths |= {"num_key_heads": num_key_heads, "num_value_heads": num_value_heads, "out_gate_rank": out_gate_rank}
        for name, width in widths.items():
            if width is not None:
                errors.size(name, width)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim = {embed_dim} without head_dim, got {num_heads}"
            )
        K = embed_dim // num_heads if head_dim is None else head_dim
        V = K if value_dim is None else value_dim
        Hk = num_heads if num_key_heads is None else num_key_heads
        Hv = num_heads if num_value_heads is None else num_value_heads
        sizes = ((num_heads, K), (Hk, K), (Hv, V))
        validate.tensors(row, *(torch.empty(0, 0, *size, device="meta") for size in sizes))

        self.rule, self.feature_norm, self.denominator = rule, feature_norm, denominator
        self.read, self.backend = read, backend
        self.scale = K**-0.5 if scale is None else scale
        self.feature_map = FavorPlusFeatures(K) if feature_map == "favor+" else feature_map
        phi = feature_maps.get(self.feature_map)

        self.embed_dim, self.heads, self.widths = embed_dim, [h for h, _ in sizes], [h * d for h, d in sizes]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, width, bias=bias) for width in self.widths)
        self.conv = ShortConvolution(sum(self.widths), short_conv) if short_conv else None
        self.activation = _function("activation", activation)

        gates = {} if gates is None else gates
        for name in gates:
            pick("gates", name, row.gates)
        self.gates = nn.ModuleDict()
        for name, gate in row.gates.items():
            features = None if gate.shape == "BTH" else V if gate.shape == "BTHV" else _width(phi, Hk, K)
            make = gates.get(name, partial(GateProjection, activation=gate.activation))
            self.gates[name] = make(embed_dim, max(Hk, Hv), features)

        width = max(num_heads, Hk, Hv) * V
        self.out_norm = None if out_norm is None else pick("out_norm", out_norm, NORMS)(V, eps=norm_eps)
        self.out_gate = projection(embed_dim, width, out_gate_rank) if out_gate else None
        self.out_activation = _function("out_gate", "silu" if out_gate is True else out_gate or None)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias)

    def forward(
        self, x: Tensor, state: LayerState | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, E] → y [B, T, E] and the state after it.

        state: what an earlier call returned, of N sequences; None: nothing was seen yet.
        mask: [B, T] bool; a False token changes nothing, neither the fast weights nor what the convolution sees, and
            its output is 0. Left, right and interior padding equal none.
        cu_seqlens: [N + 1] int32 or int64; B = 1 and sequence n lies at cu_seqlens[n] : cu_seqlens[n + 1]. Without it
            N = B.
        """
        self._check(x, state, mask, cu_seqlens)
        memory, tail, position = (None, None, 0) if state is None else state
        if state is None and isinstance(self.feature_map, FavorPlusFeatures):
            self.feature_map.begin()
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)  # whatever stands there, NaN too

        qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.conv is not None:
            mixed, tail = self.conv(torch.cat(qkv, -1), tail, mask, cu_seqlens)
            qkv = list(mixed.split(self.widths, -1))
        if self.activation is not None:
            qkv = [self.activation(y) for y in qkv]
        q, k, v = (rearrange(y, "b t (h d) -> b t h d", h=h) for y, h in zip(qkv, self.heads))
        o, memory = fast_weights(
            self.rule,
            q,
            k,
            v,
            mask=mask,
            read=self.read,
            scale=self.scale,
            feature_map=self.feature_map,
            feature_norm=self.feature_norm,
            denominator=self.denominator,
            state=memory,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            **{name: gate(x) for name, gate in self.gates.items()},
        )
        if self.out_norm is not None:
            o = self.out_norm(o.to(self.out_norm.weight.dtype))
        o = rearrange(o, "b t h d -> b t (h d)")
        if self.out_gate is not None and self.out_activation is not None:
            o = o * self.out_activation(self.out_gate(x).to(o.dtype))
        y = self.o_proj(o.to(v.dtype))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)  # a bias would show there
        return y, LayerState(memory, tail, position + _lengths(x, mask, cu_seqlens))

    def step(self, x: Tensor, state: LayerState | None = None, *, in_place: bool = False) -> tuple[Tensor, LayerState]:
        """One token: x [B, E] or [B, 1, E] → y of that shape and the state after it.

        in_place: the new state is written into the tensors of `state`, which is returned. ValueError without a state,
        or where gradients are on.
        """
        E = self.embed_dim
        if isinstance(x, Tensor) and tuple(x.shape[1:]) not in ((E,), (1, E)):
            raise ValueError(f"x: expected one token, (*, {E}) or (*, 1, {E}), got {tuple(x.shape)}")
        if not isinstance(x, Tensor) or x.dim() == 3:
            return self._step_over(x, state) if in_place else self(x, state)
        y, state = self.step(x.unsqueeze(1), state, in_place=in_place)
        return y.squeeze(1), state

    def _step_over(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        if torch.is_grad_enabled():
            raise ValueError("in_place: expected torch.no_grad(), gradients need the state that would be overwritten")
        if state is None:
            raise ValueError("in_place: expected a state to overwrite, got None")
        with overwriting():
            y, end = self(x, state)
        for place, value in zip(tree_leaves(state), tree_leaves(end)):
            if place is not value:  # a kernel may have written it there
                place.copy_(value)
        return y, state

    def _check(self, x: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """What the convolution needs before the op looks at the rest."""
        errors.tensor("x", x, (None, None, self.embed_dim))
        weights = next((p.dtype for p in self.q_proj.parameters() if p.dtype in errors.FLOATS), x.dtype)
        cast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weights)
        if x.dtype != weights and not cast:
            raise TypeError(f"x: expected {weights}, as the weights, got {x.dtype}")
        B, T, _ = x.shape
        N = B
        if mask is not None:
            errors.tensor("mask", mask, (B, T), torch.bool, x.device)
        if cu_seqlens is not None:
            validate.packing(cu_seqlens, 1, T, device=x.device)
            if B != 1:
                raise ValueError(f"x: expected a batch of 1 with cu_seqlens, got {B}")
            N = len(cu_seqlens) - 1
        if state is None:
            return
        if not isinstance(state, LayerState):
            raise TypeError(f"state: expected LayerState, got {type(state).__name__}")
        errors.tensor("state.position", state.position, (N,), torch.int64, x.device)
        if self.conv is not None:
            C, _, W = self.conv.weight.shape
            errors.tensor("state.conv", state.conv, (N, W - 1, C), None, x.device)
        elif state.conv is not None:
            raise ValueError("state.conv: expected None without short_conv, got a tensor")

    def extra_repr(self) -> str:
        rule = self.rule if isinstance(self.rule, str) else self.rule.name
        return f"{self.embed_dim}, rule={rule!r}, heads={self.heads}, feature_map={self.feature_map!r}"


def _function(argument: str, given: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """A name of ACTIVATIONS as its function."""
    return given if given is None or callable(given) else pick(argument, given, ACTIVATIONS)


def _width(phi: FeatureMap, heads: int, K: int) -> int:
    """K', how many features φ makes of K."""
    like = next(phi.parameters(), torch.zeros(())) if isinstance(phi, nn.Module) else torch.zeros(())
    with torch.no_grad():
        return feature_maps.apply(phi, like.new_zeros(1, 1, heads, K)).shape[-1]


def _lengths(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[N] int64, the tokens of each sequence that are not masked."""
    at = borders(x, cu_seqlens)
    if mask is not None:
        at = F.pad(mask.flatten().cumsum(0), (1, 0))[at]
    return at.diff()
