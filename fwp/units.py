"""Exponential features under attention normalisation, in units in which they neither overflow nor underflow.

o = Σ_j φ_j(q) S_j / Σ_j φ_j(q) z_j stays the same if feature j of all keys, S and z is divided by a number u_j that
φ_j(q) is multiplied by, and if φ(q) is multiplied by any number. So feature j counts in units of u_j = 2ⁿ, where n is
its largest exponent in any key so far: no output depends on a later key. Where n grows, S_j and z_j shrink, which is a
decay. φ(q) ⊙ u is divided by its largest feature. Then zᵀq ≥ 1/2 where nothing else decays, and eps counts beside
that. Rules that erase find what they erase by the key that they write, so that all features of a head share a unit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fwp import feature_maps
from fwp.core import Core, ScaledState, State, sequence_of, to_heads
from fwp.feature_maps import FeatureMap
from fwp.rules import Rule, lowering, reference

LEAST = -(2**17)  # the exponent of 0, and minus the largest
LOG_2 = math.log(2)


def serve(row: Rule, denominator: bool, feature_map: str | FeatureMap | None, feature_norm: str | None) -> bool:
    """Whether a call counts in units: the features are exponentials, and only attention normalisation divides them."""
    if not denominator or feature_norm is not None or not row.plain:
        return False
    known = (reference.delta_normalised, reference.gated_delta_normalised, reference.kda_normalised)
    if row.erases and (row.lower is not lowering.delta or row.normalised not in known):
        return False
    return feature_maps.logarithm(feature_map) is not None


def to_units(
    row: Rule, core: Core, scale: float, state: State | ScaledState | None, written: Tensor | None
) -> tuple[Core, Tensor]:
    """The core in units, and the final log_scale [N, H, K' or 1].

    core.q and core.k hold logarithms of features in the state's dtype, and S and z those of `state`. written [B, n·T]:
    False for masked tokens.
    """
    N, H, Hk, n = core.sequences, core.heads, core.k.shape[2], core.writes
    exponents = (core.k.detach() / LOG_2).ceil().nan_to_num(LEAST, -LEAST, LEAST).clamp(LEAST, -LEAST).long()
    if row.erases:
        exponents = exponents.amax(-1, keepdim=True)
    if written is not None:
        exponents = exponents.masked_fill(~written[:, :, None, None], LEAST)
    start = exponents.new_full((N, H, exponents.shape[-1]), LEAST if state is None else 0)
    if isinstance(state, ScaledState):
        start = (state.log_scale.detach() / LOG_2).round().clamp(LEAST, -LEAST).long()
    past = start.unflatten(1, (Hk, -1)).amax(2)  # [N, Hk, K' or 1]
    t = torch.arange(exponents.shape[1], device=exponents.device)
    if core.cu_seqlens is None:
        largest = torch.cat([past.unsqueeze(1), exponents], 1).cummax(1).values
        unit, before, end, first = largest[:, 1:], largest[:, :-1], largest[:, -1], t == 0
        sequences, empty = start.unsqueeze(1), torch.full_like(start, len(t) == 0, dtype=torch.bool)
    else:
        bounds = core.cu_seqlens.long() * n
        sequence = sequence_of(bounds, len(t))
        outside = (t < bounds[0]) | (t >= bounds[-1])
        exponents = torch.maximum(exponents.masked_fill(outside[:, None, None], LEAST), past[sequence])
        lift = sequence[:, None, None] * (-4 * LEAST)  # no sequence sees the exponents of those before it
        unit = (exponents + lift).cummax(1).values - lift
        before, first = torch.cat([unit[:, :1], unit], 1)[:, :-1], torch.ones_like(outside)
        first[1:] = sequence[1:] != sequence[:-1]
        sequences, empty = start[sequence].unsqueeze(0), (bounds[:-1] == bounds[1:])[:, None, None]
        end = torch.cat([unit[0], past[:1]])[(bounds[1:] - 1).clamp(min=0)]  # one more row, for T = 0
    end = torch.where(empty, start, to_heads(end.unsqueeze(1), H).squeeze(1))
    unit, before = to_heads(unit, H), torch.where(first[:, None, None], sequences, to_heads(before, H))
    if core.causal:
        rescale = in_logs(before - unit, core)
        core = replace(core, rescale=rescale.squeeze(-1) if row.erases else rescale)
    else:  # every query reads the end
        unit = end.unsqueeze(1) if core.cu_seqlens is None else end[sequence].unsqueeze(0)
        shrink = in_logs(start - end, core).exp()
        S, z = core.initial()
        assert z is not None
        core = replace(core, S=S * shrink.unsqueeze(-1), z=z * shrink)
    seen = (unit[:, n - 1 :: n] if core.read == "after" else before[:, ::n]) if core.causal else unit[:, ::n]
    q = to_heads(core.q, max(core.q.shape[2], H))
    q = scale * largest_1(q + in_logs(to_heads(seen, q.shape[2]), core))
    k = (to_heads(core.k, H) - in_logs(unit, core)).exp()
    return replace(core, q=q.to(core.v.dtype), k=k.to(core.v.dtype)), in_logs(end, core)


def asked(state: ScaledState, logs: Tensor, scale: float, cu_seqlens: Tensor | None) -> Tensor:
    """Queries for S and z in the state's units [N, T, max(Hq, H), K'], from the logarithms of their features."""
    unit = state.log_scale.unsqueeze(1)
    if cu_seqlens is not None:
        unit = unit.squeeze(1)[sequence_of(cu_seqlens, logs.shape[1])].unsqueeze(0)
    heads = max(logs.shape[2], unit.shape[2])
    return scale * largest_1(to_heads(logs, heads) + to_heads(unit, heads))


def in_logs(exponents: Tensor, core: Core) -> Tensor:
    """log 2ⁿ in the state's dtype."""
    return exponents.to(core.dtype) * LOG_2


def largest_1(logs: Tensor) -> Tensor:
    """exp(logs) over its largest feature, as a constant of the gradient."""
    return (logs - logs.detach().amax(-1, keepdim=True)).exp()
