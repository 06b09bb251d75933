"""The published layers, one function per layer, all in `PRESETS`. Published weights load unless a docstring says no.

Options are those of `FastWeightAttention` and replace a preset's own. `fwp.interop.fla.load_layer` loads the weights of
the publications that it lists under their own names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp import errors
from fwp.nn.attention import FastWeightAttention, GateProjection, SoftplusDecay
from fwp.nn.comba_layer import CombaAttention
from fwp.nn.layer import Layer
from fwp.nn.rwkv7_layer import RWKV7Attention

# Published with A uniform in (0, 16), where log A may be −∞; transformers starts at 0.01.
_wide_decay = partial(SoftplusDecay, A_min=0.01)


def _slow_decay(y: Tensor) -> Tensor:
    """logsigmoid(y) / 16: at y = 0 the state keeps 96 %."""
    return F.logsigmoid(y) / 16


def _twice_sigmoid(y: Tensor) -> Tensor:
    """2 σ(y): a learning rate that can mirror the old value."""
    return 2 * torch.sigmoid(y)


def _beta(allow_neg_eigval: bool = False) -> Callable[..., GateProjection]:
    return partial(GateProjection, activation=_twice_sigmoid if allow_neg_eigval else torch.sigmoid, bias=False)


def _head_dim(embed_dim: int, num_heads: int, options: dict[str, Any]) -> int:
    """Features of a key head."""
    errors.size("num_heads", num_heads)
    return options.get("head_dim") or embed_dim // num_heads


def _layer(embed_dim: int, num_heads: int, options: dict[str, Any], **own: Any) -> FastWeightAttention:
    return FastWeightAttention(embed_dim, num_heads, **{**own, **options})


def linear_transformer(embed_dim: int, num_heads: int, **options: Any) -> FastWeightAttention:
    """Linear Transformer, Katharopoulos et al. 2020 (arXiv 2006.16236): φ = elu + 1, o_t = Sᵀφ(q) / (zᵀφ(q) + 1e-6)."""
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="additive",
        feature_map="elu+1",
        denominator=True,
        scale=1.0,
        bias=True,
    )


def delta_net_2021(embed_dim: int, num_heads: int, **options: Any) -> FastWeightAttention:
    """Delta Net, Schlag, Irie and Schmidhuber 2021 (arXiv 2102.11174): DPFP-1, sum norm, β = σ(w x) per head, 1/√d.

    The residual connection and the layer norm of the authors' language models belong to the block.
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="delta",
        feature_map="dpfp-1",
        feature_norm="sum",
        gates={"beta": _beta()},
    )


def delta_net(embed_dim: int, num_heads: int, *, allow_neg_eigval: bool = False, **options: Any) -> FastWeightAttention:
    """DeltaNet, Yang et al. 2024 (arXiv 2406.06484): convolution 4 and silu, unit q and k, RMSNorm of each head.

    flash-linear-attention's use_gate=True is out_gate=True. allow_neg_eigval: β in (0, 2).
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="delta",
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(allow_neg_eigval)},
        out_norm="rms",
    )


def gla(embed_dim: int, num_heads: int, *, gate_rank: int = 16, **options: Any) -> FastWeightAttention:
    """Gated Linear Attention, Yang et al. 2024 (arXiv 2312.06635): g = logsigmoid(W x)/16 per channel, W of low rank.

    Keys half as wide as values: head_dim is embed_dim / (2 num_heads), value_dim embed_dim / num_heads.
    """
    errors.size("num_heads", num_heads)
    if embed_dim % (2 * num_heads) and "head_dim" not in options:
        raise ValueError(f"num_heads: expected a divisor of embed_dim / 2 = {embed_dim / 2:g}, got {num_heads}")
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="gla",
        head_dim=embed_dim // (2 * num_heads),
        value_dim=embed_dim // num_heads,
        gates={"g": partial(GateProjection, activation=_slow_decay, rank=gate_rank)},
        out_norm="rms",
        out_gate="silu",
    )


def gated_delta_net(
    embed_dim: int, num_heads: int, *, allow_neg_eigval: bool = False, **options: Any
) -> FastWeightAttention:
    """Gated DeltaNet, Yang, Kautz and Hatamizadeh 2025 (arXiv 2412.06464); grouped value heads by num_value_heads.

    g = −exp(A_log) · softplus(W_a x + dt_bias), convolution 4 and silu, unit q and k, RMSNorm(o) ⊙ silu(W_g x).
    transformers' Qwen3NextGatedDeltaNet has norm_eps=1e-6. exp(A_log) starts between 1 and 16 here, and between 0 and
    16 in transformers.
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="gated_delta",
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(allow_neg_eigval), "g": SoftplusDecay},
        out_norm="rms",
        out_gate="silu",
    )


def kda(
    embed_dim: int,
    num_heads: int,
    *,
    allow_neg_eigval: bool = False,
    gate_rank: int | None = None,
    **options: Any,
) -> FastWeightAttention:
    """Kimi Delta Attention, Kimi Team 2025 (arXiv 2510.26692): Gated DeltaNet with a decay per key channel.

    The decay's and the output gate's projections go through gate_rank (default head_dim) features; the output gate is a
    sigmoid. flash-linear-attention's KimiDeltaAttention has value_dim for head_dim there, and out_gate_bias=True.
    allow_neg_eigval: β in (0, 2).
    """
    rank = _head_dim(embed_dim, num_heads, options) if gate_rank is None else gate_rank
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="kda",
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(allow_neg_eigval), "g": partial(SoftplusDecay, rank=rank)},
        out_norm="rms",
        out_gate="sigmoid",
        out_gate_rank=rank,
    )


def gdn2(
    embed_dim: int,
    num_heads: int,
    *,
    allow_neg_eigval: bool = False,
    gate_rank: int | None = None,
    **options: Any,
) -> FastWeightAttention:
    """Gated DeltaNet-2, Hatamizadeh, Choi and Kautz 2026 (arXiv 2605.22791): KDA with two gates for its β.

    b = σ(W_b x) per key channel erases, or 2σ with allow_neg_eigval; w = σ(W_w x) per value channel writes;
    g = −exp(A_log) · softplus(W_f x + dt_bias) per key channel; convolution 4 and silu, unit q and k,
    RMSNorm(o) ⊙ silu(W_g x). W_f and W_g go through gate_rank (default value_dim) features. With more value heads than
    key heads, b and g are made per key head.
    The paper and the authors' code have silu in the output gate, flash-linear-attention has out_gate="sigmoid". All
    linear weights start as PyTorch's do; the authors' are Xavier uniform with gain 2^−2.5.
    """
    head_dim = _head_dim(embed_dim, num_heads, options)
    rank = (options.get("value_dim") or head_dim) if gate_rank is None else gate_rank
    key_heads, value_heads = (options.get(f"num_{kind}_heads") or num_heads for kind in ("key", "value"))
    shared = 1 if value_heads % key_heads else value_heads // key_heads
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="gdn2",
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={
            "b": partial(_beta(allow_neg_eigval), shared=shared),
            "w": _beta(),
            "g": partial(SoftplusDecay, rank=rank, shared=shared),
        },
        out_norm="rms",
        out_gate="silu",
        out_gate_rank=rank,
        out_gate_bias=True,
    )


def comba(embed_dim: int, num_heads: int, *, correction: float = 1.0, **options: Any) -> CombaAttention:
    """Comba, Hu et al. 2025 (arXiv 2506.02475): Gated DeltaNet that erases before the decay and reads with q − D p.

    p = σ(decay) k, q ← q − D p, then q, k and p to unit length; β = σ(W_b x), g as in Gated DeltaNet, convolution 4 and
    silu, RMSNorm(o) ⊙ σ(W_g x). The paper's p keeps its length. The published kernels normalise it, so that their
    trained models have p = k in the state and σ(decay) in the queries only; this preset does too.
    With more value heads than key heads p is repeated as k is; flash-linear-attention's layer does not repeat it.
    correction: D at first; the authors say 0.02 for models of 340M parameters, 1 for 1.3B.
    """
    own = {
        "feature_norm": "l2",
        "short_conv": 4,
        "activation": "silu",
        "gates": {"beta": _beta(), "g": _wide_decay},
        "out_norm": "rms",
        "out_gate": "sigmoid",
    }
    return CombaAttention(embed_dim, num_heads, correction=correction, **{**own, **options})


def longhorn(embed_dim: int, num_heads: int, **options: Any) -> FastWeightAttention:
    """A layer on Longhorn's exact rule, Liu et al. 2025 (arXiv 2407.14207). The authors' trained layer is another one.

    Theirs has a β per value channel and keeps only the diagonal of k kᵀ: a recurrence per entry of S, whose weights
    can't be loaded. Ours solves the paper's problem with β = σ(W x + b) per head, so that S moves towards v by
    ε = β / (1 + β kᵀk). As there: convolution 4 and silu, q and k of any length (long keys learn faster), no scale of
    q, no decay, no norm of o, an output gate silu(W_g x). Not as there: q, k and v have projections and convolutions of
    their own, several heads, and no skip connection D.
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="longhorn",
        scale=1.0,
        short_conv=4,
        activation="silu",
        out_gate="silu",
    )


def delta_product(
    embed_dim: int, num_heads: int, *, writes_per_read: int = 2, allow_neg_eigval: bool = True, **options: Any
) -> FastWeightAttention:
    """DeltaProduct, Siems et al. 2025 (arXiv 2502.10297): DeltaNet with several keys, values and β per token.

    Convolution 4 and silu before the writes are laid out in time, unit q and k, β = 2σ(W_b x), or σ without
    allow_neg_eigval, RMSNorm of each head.
    flash-linear-attention's GatedDeltaProduct with use_forget_gate=False: num_householder is writes_per_read, and
    use_output_gate=True, which the authors' language models don't have, is out_gate=True. The authors' k_projs.j,
    v_projs.j, b_projs.j and convolutions are the j-th block of rows of ours; of q_conv1ds they use the first.
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="delta",
        writes_per_read=writes_per_read,
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(allow_neg_eigval)},
        out_norm="rms",
    )


def gated_delta_product(
    embed_dim: int, num_heads: int, *, writes_per_read: int = 2, allow_neg_eigval: bool = True, **options: Any
) -> FastWeightAttention:
    """Gated DeltaProduct, Siems et al. 2025 (arXiv 2502.10297): `delta_product` with a decay and an output gate.

    Each token decays once, before its first write: g = −exp(A_log) · softplus(W_a x + dt_bias). The output is
    RMSNorm(o) ⊙ silu(W_g x). Linear weights start as PyTorch's do; the authors' are Xavier uniform with gain 2^−2.5.
    """
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="gated_delta",
        writes_per_read=writes_per_read,
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(allow_neg_eigval), "g": _wide_decay},
        out_norm="rms",
        out_gate="silu",
    )


def rwkv7(embed_dim: int, num_heads: int, **options: Any) -> RWKV7Attention:
    """RWKV-7 "Goose", Peng et al. 2025 (arXiv 2503.14456): its time mixing. Options: see `RWKV7Attention`.

    By default it is a first layer. In a stack, give layer=l and num_layers=L and pass v_first on from the first layer:
    `y, state, v_first = layer(x, state, v_first=v_first, return_v_first=True)`. The published heads have 64 features.
    flash-linear-attention's RWKV7Attention normalises κ with 1e-6 under the root where fuse_norm=True.
    """
    return RWKV7Attention(embed_dim, num_heads, **options)


PRESETS: dict[str, Callable[..., Layer]] = {
    "linear_transformer": linear_transformer,
    "delta_net_2021": delta_net_2021,
    "delta_net": delta_net,
    "gla": gla,
    "gated_delta_net": gated_delta_net,
    "kda": kda,
    "gdn2": gdn2,
    "longhorn": longhorn,
    "comba": comba,
    "delta_product": delta_product,
    "gated_delta_product": gated_delta_product,
    "rwkv7": rwkv7,
}
