"""A layer for any rule: projections → short convolution → fast weights → norm and gate → projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fwp import errors, feature_maps, rules, validate
from fwp.core import Read, without_autocast
from fwp.feature_maps import FeatureMap
from fwp.functional import Backend, fast_weights
from fwp.functional import read as read_state
from fwp.nn.block import NORMS, Norm, pick
from fwp.nn.convolution import ShortConvolution, real_tokens
from fwp.nn.layer import Layer, function, lengths, matched, one_dtype, projection
from fwp.rules import Gate, Rule
from fwp.states import LayerState


class GateProjection(nn.Module):
    """activation(W x + b): x [B, T, E] → a gate [B, T, H], or [B, T, H, D] with features D.

    activation: computed in float32 (float64 for float64 inputs), under autocast too.
    rank: W = W_2 W_1 through that many features; None: one full matrix.
    shared: number of neighbouring heads that share one gate; a divisor of H.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        features: int | None = None,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
        rank: int | None = None,
        bias: bool = True,
        shared: int = 1,
    ) -> None:
        super().__init__()
        if heads % shared:
            raise ValueError(f"shared: expected a divisor of {heads} heads, got {shared}")
        self.shape = (heads // shared,) if features is None else (heads // shared, features)
        self.activation, self.shared = activation, shared
        self.proj = projection(embed_dim, heads // shared * (features or 1), rank, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, E] → [B, T, H] or [B, T, H, D]."""
        y = self.proj(matched(x, self.proj))
        y = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(-1, self.shape)
        with without_autocast(x):
            gate = self.activate(y)
        return gate if self.shared == 1 else gate.repeat_interleave(self.shared, 2)

    def activate(self, y: Tensor) -> Tensor:
        """The gate of a projection y [B, T, H] or [B, T, H, D]."""
        return self.activation(y)


@dataclass(frozen=True)
class ActivationOf:
    """The activation of a rule's gate. A layer with it can be pickled if the rule can, whatever function it is."""

    rule: Rule
    gate: str

    def __call__(self, y: Tensor) -> Tensor:
        return self.rule.gates[self.gate].activation(y)


class SoftplusDecay(GateProjection):
    """g = −exp(A_log) · softplus(W x + dt_bias), the decay of Mamba-2, Gated DeltaNet and KDA.

    A_log [H], dt_bias [H] or [H · D]. At first exp(A_log) is uniform in (A_min, 16) and softplus(dt_bias) log-uniform
    in (0.001, 0.1). With A_min = 1 a token keeps between 20 % and 99.9 %.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        features: int | None = None,
        rank: int | None = None,
        A_min: float = 1.0,
        shared: int = 1,
    ) -> None:
        super().__init__(embed_dim, heads, features, rank=rank, bias=False, shared=shared)
        H = heads // shared
        self.A_min = A_min
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(H)), nn.Parameter(torch.empty(H * (features or 1)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A_log and dt_bias as above."""
        self.A_log.uniform_(self.A_min, 16).log_()
        self.dt_bias.uniform_(-3, -1).mul_(math.log(10)).exp_().expm1_().log_()  # softplus⁻¹

    def activate(self, y: Tensor) -> Tensor:
        rate = self.A_log.to(y.dtype).exp()
        rate = rate if len(self.shape) == 1 else rate.unsqueeze(-1)
        return -rate * F.softplus(y + self.dt_bias.to(y.dtype).view(self.shape))


class FavorPlusFeatures(nn.Module):
    """FAVOR+ for a layer: the random directions R [m, d] are a buffer, drawn anew when a sequence begins.

    redraw: "training" draws in every forward pass of a module in training mode that starts without a state,
        "always" in evaluation too (as the experiments of arXiv 2102.11174 do), "never" keeps the first R.
    A state belongs to the R that it was written with. A call that continues a state keeps R, and a state from before
    the last draw can't be continued. Draws come from torch's CPU generator.
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

    def logarithm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`fwp.feature_maps.log_positive_features` of x."""
        return feature_maps.log_positive_features(x, self.R)

    def begin(self) -> None:
        """A sequence begins: draws a new R if `redraw` says so."""
        if self.redraw == "always" or (self.redraw == "training" and self.training):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R, as a new tensor: a backward pass may need the old one."""
        with torch.inference_mode(False):  # made in inference mode it could never be loaded again
            self.R = feature_maps.directions(*self.size).to(self.R)


class FastWeightAttention(Layer):
    """Multi-head attention by fast weights, under any rule.

    For each token x: q, k, v = a(conv(W x)) per head, and the rule's gates are made of x. The rule writes (k, v) into S
    and reads o = scale · Sᵀ norm(φ(q)), as in `fwp.fast_weights`. Then y = W_o concat(norm(o) ⊙ a(W_g x)) over heads.

    Args:
        embed_dim: E. num_heads: Hq, of the queries.
        rule: a name of `fwp.RULES`, or a `Rule`, which may have its own state and gates.
        feature_map, denominator, read: as in `fwp.fast_weights`; "favor+" is `FavorPlusFeatures`, and a map that is a
            module is trained with the layer.
        feature_norm: as in `fwp.fast_weights`; "auto" is "l2" for a rule that diverges on keys longer than 1, without
            a denominator. With a denominator and features ≥ 0 the length of keys cancels, so that it is None, as for
            all other rules. An explicit None leaves the keys of every rule as they are.
        causal: False lets every query read the final state, as in an encoder and in cross attention. It is for rules
            that neither decay nor erase, without a short convolution and with read="after".
        num_key_heads, num_value_heads: Hk and Hv; None: num_heads. H = max(Hk, Hv) states; Hk and Hv divide H, and Hq
            is a multiple or a divisor of H.
        head_dim: K, width of a query and key head; None: embed_dim / num_heads.
        value_dim: V, width of a value head; None: head_dim.
        writes_per_read: n, the number of keys, values and gates that each token makes. It writes them in turn and then
            reads once, as in DeltaProduct (arXiv 2502.10297). The features of k_proj, v_proj, their convolutions and
            the gates are ordered (n, head, feature). The decay g has one value per token, before the first write; so
            has any gate that is optional and does nothing at its default.
        scale: of the queries; None: 1/√head_dim.
        bias: of the projections of q, k, v and the output.
        short_conv: width W of a causal convolution of q, k and v along T; 0: none.
        activation: of q, k and v, after the convolution: "silu", "relu", … or a function; None: none.
        gates: name of a gate → what makes it, called with (embed_dim, H, D or None), the gate being [B, T, H, D] or
            [B, T, H]; a module [B, T, E] → gate. By default `GateProjection` with the activation of the rule's row.
            With n writes per read it is called with n·H heads, except for gates with one value per token.
        out_norm: "rms" or "layer" normalises each head's o; None: no norm. norm_eps: its eps.
        out_gate: whether o is multiplied by silu(W_g x); a name or function takes the place of silu.
        out_gate_rank: W_g = W_2 W_1 through that many features. out_gate_bias: W_g x + b.
        backend: as in `fwp.fast_weights`.

    Raises: ValueError for options that don't fit, TypeError for a wrong state or dtype.

    Under autocast the projections and the convolution run in its dtype, the norm and the gate of o in their weights'.
    The rule's gates are float32 from their activation on, and the state always is (float64 for float64 inputs).
    """

    made_of_keys: tuple[str, ...] = ()  # gates that a subclass makes in `_ask`

    @errors.explains_options
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rule: str | Rule = "additive",
        feature_map: str | FeatureMap | None = None,
        feature_norm: Literal["auto", "sum", "l2"] | None = "auto",
        denominator: bool = False,
        *,
        causal: bool = True,
        read: Read = "after",
        num_key_heads: int | None = None,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        writes_per_read: int = 1,
        scale: float | None = None,
        bias: bool = False,
        short_conv: int = 0,
        activation: str | Callable[[Tensor], Tensor] | None = None,
        gates: Mapping[str, Callable[[int, int, int | None], nn.Module]] | None = None,
        out_norm: Norm | None = None,
        norm_eps: float = 1e-5,
        out_gate: bool | str | Callable[[Tensor], Tensor] = False,
        out_gate_rank: int | None = None,
        out_gate_bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        row = rules.get(rule)
        factor = 1.0 if scale is None else scale
        validate.options(row, causal=causal, read=read, scale=factor, denominator=denominator, backend=backend)
        errors.number("norm_eps", norm_eps, 0)
        if feature_norm == "auto":
            feature_norm = "l2" if row.wants_unit_keys and not denominator else None
        elif feature_norm not in (None, "sum", "l2"):
            raise ValueError(f"feature_norm: expected 'auto', None, 'sum' or 'l2', got {feature_norm!r}")
        errors.size("short_conv", short_conv, 0)
        if short_conv and not causal:
            raise ValueError(f"short_conv: expected 0 with causal=False, since it is causal itself, got {short_conv}")
        widths = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim, "value_dim": value_dim}
        widths |= {"num_key_heads": num_key_heads, "num_value_heads": num_value_heads}
        widths |= {"writes_per_read": writes_per_read, "out_gate_rank": out_gate_rank}
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
        sizes, n = ((num_heads, K), (Hk, K), (Hv, V)), writes_per_read
        validate.tensors(row, *(torch.empty(0, 0, *size, device="meta") for size in sizes))
        if not causal:
            _refuse_order(row)

        self.rule, self.feature_norm, self.denominator = rule, feature_norm, denominator
        self.causal, self.read, self.backend, self.writes_per_read = causal, read, backend, n
        self.scale = K**-0.5 if scale is None else scale
        self.feature_map = FavorPlusFeatures(K) if feature_map == "favor+" else feature_map

        self.embed_dim, self.heads = embed_dim, [h for h, _ in sizes]
        self.widths = [num_heads * K, n * Hk * K, n * Hv * V]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed_dim, width, bias=bias) for width in self.widths)
        self.conv = ShortConvolution(sum(self.widths), short_conv) if short_conv else None
        self.tail = (short_conv - 1, sum(self.widths)) if short_conv else None
        self.activation = function("activation", activation)
        self.gates = self._make_gates(row, {} if gates is None else gates, K, V)

        width = max(num_heads, Hk, Hv) * V
        self.out_norm = None if out_norm is None else pick("out_norm", out_norm, NORMS)(V, eps=norm_eps)
        self.out_gate = projection(embed_dim, width, out_gate_rank, out_gate_bias) if out_gate else None
        self.out_activation = function("out_gate", "silu" if out_gate is True else out_gate or None)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias)

    def _make_gates(
        self, row: Rule, given: Mapping[str, Callable[[int, int, int | None], nn.Module]], K: int, V: int
    ) -> nn.ModuleDict:
        """A module for each gate that the layer makes of x."""
        phi, (_, Hk, Hv) = feature_maps.get(self.feature_map), self.heads
        wanted = {name: gate for name, gate in row.gates.items() if name not in self.made_of_keys}
        for name in given:
            pick("gates", name, wanted)
        found = nn.ModuleDict()
        for name, gate in wanted.items():
            features = None if gate.shape == "BTH" else V if gate.shape == "BTHV" else _width(phi, Hk, K)
            activation = gate.activation if isinstance(self.rule, str) else ActivationOf(self.rule, name)
            make = given.get(name, partial(GateProjection, activation=activation))
            n = 1 if _once_per_token(gate) else self.writes_per_read
            found[_module_name(name)] = make(self.embed_dim, n * max(Hk, Hv), features)
        return found

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, E] → y [B, T, E] and the state after it.

        state: what an earlier call returned, of N sequences; None: the sequences begin here.
        mask: [B, T] bool; a False token changes nothing, neither the fast weights nor what the convolution sees, and
            its output is 0. Padding on the left, on the right or in between changes nothing else.
        cu_seqlens: [N + 1] int32 or int64; B = 1 and sequence n lies at cu_seqlens[n] : cu_seqlens[n + 1]. Without it
            N = B. On a GPU the values are not checked; tokens outside all sequences count as masked.
        context: [N, T', E], cross attention: its tokens are written, and x only reads. Needs causal=False. The state is
            then the context's. Give it back with `context[:, :0]` to read it again, or with more context to add that.
        context_mask: [N, T'] bool; a False token of the context is not written.
        """
        self._check(x, state, mask, cu_seqlens, self.q_proj)
        self._check_context(x, context, context_mask, cu_seqlens)
        memory, tail, position = (None, None, 0) if state is None else state
        if state is None and isinstance(self.feature_map, FavorPlusFeatures):
            self.feature_map.begin()
        real = real_tokens(x, mask, cu_seqlens)
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0)  # other inputs may be anything, even NaN

        if context is None:
            q, k, v, tail = self._project(x, x, tail, mask, cu_seqlens)
            q, gates = self._ask(x, q, k)
            o, memory = self._program(q, k, v, gates, memory, mask, cu_seqlens)
            written = lengths(x, mask, cu_seqlens)
        else:
            if context_mask is not None:
                context = context.masked_fill(~context_mask.unsqueeze(-1), 0)
            q, k, v, tail = self._project(x, context, tail, None, None)
            q, gates = self._ask(context, q, k)
            nobody = q.new_zeros(()).expand(*context.shape[:2], 1, q.shape[-1])  # writes need no queries
            _, memory = self._program(nobody, k, v, gates, memory, context_mask, None)
            o = read_state(
                memory,
                q,
                scale=self.scale,
                feature_map=self.feature_map,
                feature_norm=self.feature_norm,
                cu_seqlens=cu_seqlens,
            )
            written = lengths(context, context_mask, None)
        if self.out_norm is not None:
            o = self.out_norm(o.to(self.out_norm.weight.dtype))
        o = rearrange(o, "b t h d -> b t (h d)")
        if self.out_gate is not None and self.out_activation is not None:
            o = o * self.out_activation(self.out_gate(matched(x, self.out_gate)).to(o.dtype))
        y = self.o_proj(matched(o.to(v.dtype), self.o_proj))
        if real is not None:
            y = y.masked_fill(~real.unsqueeze(-1), 0)  # with a bias it would not be 0
        return y, LayerState(memory, tail, position + written)

    def _program(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: dict[str, Any],
        memory: Any,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """The op with the layer's options."""
        return fast_weights(
            self.rule,
            q,
            k,
            v,
            mask=mask,
            causal=self.causal,
            read=self.read,
            scale=self.scale,
            feature_map=self.feature_map,
            feature_norm=self.feature_norm,
            denominator=self.denominator,
            state=memory,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            **gates,
        )

    def _check_context(
        self, x: Tensor, context: Tensor | None, context_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        if context is None:
            if context_mask is not None:
                raise ValueError("context_mask: expected None without a context, got a tensor")
            return
        if self.causal:
            raise ValueError("context: expected None in a layer with causal=True, got a tensor")
        N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        errors.tensor("context", context, (N, None, self.embed_dim), x.dtype, x.device)
        if context_mask is not None:
            errors.tensor("context_mask", context_mask, tuple(context.shape[:2]), torch.bool, x.device)

    def _project(
        self, x: Tensor, source: Tensor, tail: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, T, Hq, K] of x, k [N, n·T, Hk, K] and v [N, n·T, Hv, V] of the source, the convolution's new tail.

        What the projections return decides the dtype. Adapters and quantised weights may have several dtypes.
        """
        made_of = ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        qkv = one_dtype(*(module(matched(y, module)) for module, y in made_of))
        if self.conv is not None:
            mixed, tail = self.conv(torch.cat(qkv, -1), tail, mask, cu_seqlens)
            qkv = list(mixed.split(self.widths, -1))
        if self.activation is not None:
            qkv = [self.activation(y) for y in qkv]
        q, k, v = (
            rearrange(y, "b t (n h d) -> b (t n) h d", n=n, h=h)
            for y, n, h in zip(qkv, (1, self.writes_per_read, self.writes_per_read), self.heads)
        )
        return q, k, v, tail

    def _ask(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The queries and gates that the op gets. A subclass may make them of q and k too."""
        found: dict[str, Any] = {}
        row, n = rules.get(self.rule), self.writes_per_read
        names = (name for name in row.gates if name not in self.made_of_keys)
        for name, module in zip(names, self.gates.values()):
            gate = module(x)
            if n > 1 and _once_per_token(row.gates[name]):
                idle = torch.full_like(gate, row.gates[name].neutral)
                gate = torch.stack([gate, *[idle] * (n - 1)], 2).flatten(1, 2)
            elif n > 1:
                gate = gate.unflatten(2, (n, -1)).flatten(1, 2)  # [B, T, n·H, …] → [B, n·T, H, …]
            found[name] = gate
        return q, found

    def extra_repr(self) -> str:
        rule = self.rule if isinstance(self.rule, str) else self.rule.name
        writes = "" if self.writes_per_read == 1 else f", writes_per_read={self.writes_per_read}"
        causal = "" if self.causal else ", causal=False"
        return f"{self.embed_dim}, rule={rule!r}, heads={self.heads}, feature_map={self.feature_map!r}{writes}{causal}"


def _refuse_order(row: Rule) -> None:
    """ValueError for a rule that decays or erases: its state depends on the order of the writes. The op can tell."""
    q = torch.zeros(1, 0, 1, 1, device="cpu")
    gates: dict[str, Any] = {name: q[..., 0] if gate.shape == "BTH" else q for name, gate in row.gates.items()}
    fast_weights(row, q, q, q, causal=False, **gates)


def _module_name(gate: str) -> str:
    """The gate's name, unless a `ModuleDict` has an attribute of that name, such as "values"; no gate has a hyphen."""
    return f"gate-{gate}" if hasattr(nn.ModuleDict(), gate) else gate


def _once_per_token(gate: Gate) -> bool:
    """Whether a gate is optional and does nothing at its default, as a decay. It then acts at the first write only."""
    return gate.default is not None and gate.default == gate.neutral


def _width(phi: FeatureMap, heads: int, K: int) -> int:
    """K', the number of features that φ makes of K."""
    like = next(phi.parameters(), torch.zeros(())) if isinstance(phi, nn.Module) else torch.zeros(())
    with torch.no_grad():
        return feature_maps.apply(phi, like.new_zeros(1, 1, heads, K)).shape[-1]
