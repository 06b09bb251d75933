"""The published layers, exactly enough that their weights load: a function a layer, all in `PRESETS`.

Options are those of `FastWeightAttention` and replace a preset's own. Each docstring says which of the published names
hold the weights of ours, where the names differ; `conv.weight` is q's, k's and v's convolution one after the other.
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


def _slow_decay(y: Tensor) -> Tensor:
    """logsigmoid(y) / 16: at y = 0 a token keeps 96 %."""
    return F.logsigmoid(y) / 16


def _twice_sigmoid(y: Tensor) -> Tensor:
    """2 σ(y): a learning rate that can mirror the old value."""
    return 2 * torch.sigmoid(y)


def _beta(allow_neg_eigval: bool = False) -> Callable[..., GateProjection]:
    return partial(GateProjection, activation=_twice_sigmoid if allow_neg_eigval else torch.sigmoid, bias=False)


def _layer(embed_dim: int, num_heads: int, options: dict[str, Any], **own: Any) -> FastWeightAttention:
    return FastWeightAttention(embed_dim, num_heads, **{**own, **options})


def linear_transformer(embed_dim: int, num_heads: int, **options: Any) -> FastWeightAttention:
    """Linear Transformer, Katharopoulos et al. 2020 (arXiv 2006.16236): φ = elu + 1, o_t = Sᵀφ(q) / (zᵀφ(q) + 1e-6).

    pytorch-fast-transformers' AttentionLayer: query_projection, key_projection, value_projection, out_projection are
    q_proj, k_proj, v_proj, o_proj.
    """
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
    """Delta Net, Schlag, Irie and Schmidhuber 2021 (arXiv 2102.11174): DPFP-1, sum norm, β = σ(w x) a head, 1/√d.

    The authors' language models: o_net is o_proj; qkvb_net.weight, seen as [head, 3d + 1, E], holds each head's rows of
    q_proj, k_proj, v_proj and gates.beta.proj. Their residual connection and layer norm belong to the block.
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

    flash-linear-attention's DeltaNet: b_proj is gates.beta.proj, o_norm is out_norm, q_conv1d, k_conv1d, v_conv1d are
    conv; its use_gate=True is out_gate=True, with g_proj. allow_neg_eigval: β in (0, 2).
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
    """Gated Linear Attention, Yang et al. 2024 (arXiv 2312.06635): g = logsigmoid(W x)/16 a channel, W of low rank.

    Keys half as wide as values: head_dim is embed_dim / (2 num_heads), value_dim embed_dim / num_heads.
    flash-linear-attention's GatedLinearAttention: gk_proj is gates.g.proj, g_proj is out_gate, g_norm_swish_gate is
    out_norm.
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
    transformers' OlmoHybridGatedDeltaNet (and flash-linear-attention's): a_proj is gates.g.proj, b_proj
    gates.beta.proj, g_proj out_gate, o_norm out_norm, conv1d conv. Qwen3NextGatedDeltaNet joins q_proj, k_proj, v_proj,
    out_gate in in_proj_qkvz and beta, g in in_proj_ba, by key heads; norm_eps is 1e-6 there.
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


def kda(embed_dim: int, num_heads: int, *, gate_rank: int | None = None, **options: Any) -> FastWeightAttention:
    """Kimi Delta Attention, Kimi Team 2025 (arXiv 2510.26692): Gated DeltaNet with a decay a key channel.

    The decay's and the output gate's projections go through gate_rank (default head_dim) features; the output gate is a
    sigmoid. transformers' KimiLinearDeltaAttention: forget_gate.f_a_proj and f_b_proj are gates.g.proj.0 and .1,
    b_proj gates.beta.proj, g_a_proj and g_b_proj out_gate.0 and .1, o_norm out_norm, conv1d conv.
    """
    errors.size("num_heads", num_heads)
    rank = (options.get("head_dim") or embed_dim // num_heads) if gate_rank is None else gate_rank
    return _layer(
        embed_dim,
        num_heads,
        options,
        rule="kda",
        feature_norm="l2",
        short_conv=4,
        activation="silu",
        gates={"beta": _beta(), "g": partial(SoftplusDecay, rank=rank)},
        out_norm="rms",
        out_gate="sigmoid",
        out_gate_rank=rank,
    )


PRESETS: dict[str, Callable[..., FastWeightAttention]] = {
    "linear_transformer": linear_transformer,
    "delta_net_2021": delta_net_2021,
    "delta_net": delta_net,
    "gla": gla,
    "gated_delta_net": gated_delta_net,
    "kda": kda,
}
