"""A typed function per rule, for autocompletion: `fwp.delta(q, k, v, beta)` is `fast_weights("delta", …, beta=beta)`.

Options are those of `fwp.fast_weights`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from fwp.core import Read, ScaledState, State
from fwp.feature_maps import FeatureMap
from fwp.functional import Backend, fast_weights


class Options(TypedDict, total=False):
    """The keyword arguments of `fwp.fast_weights` that are not gates."""

    mask: Tensor | None
    causal: bool
    read: Read
    scale: float
    feature_map: str | FeatureMap | None
    feature_norm: Literal["sum", "l2"] | None
    denominator: bool
    eps: float
    state: Any
    cu_seqlens: Tensor | None
    backend: Backend
    form: Literal["auto", "recurrent", "chunk"]
    check: bool


Result = tuple[Tensor, State | ScaledState]  # out, and the final state


def additive(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Result:
    """S + k vᵀ."""
    return fast_weights("additive", q, k, v, **options)


def decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Unpack[Options]) -> Result:
    """α S + k vᵀ, α = exp g, g [B, T, H]."""
    return fast_weights("decay", q, k, v, g=g, **options)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Unpack[Options]) -> Result:
    """Diag(α) S + k vᵀ, α = exp g, g [B, T, H, K']."""
    return fast_weights("gla", q, k, v, g=g, **options)


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Unpack[Options]) -> Result:
    """S + β k (v − Sᵀ k)ᵀ, beta [B, T, H]."""
    return fast_weights("delta", q, k, v, beta=beta, **options)


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, **options: Unpack[Options]
) -> Result:
    """S' = α S, then S' + β k (v − S'ᵀ k)ᵀ; beta and g [B, T, H]."""
    return fast_weights("gated_delta", q, k, v, beta=beta, g=g, **options)


def kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, **options: Unpack[Options]) -> Result:
    """S' = Diag(α) S, then S' + β k (v − S'ᵀ k)ᵀ; beta [B, T, H], g [B, T, H, K']."""
    return fast_weights("kda", q, k, v, beta=beta, g=g, **options)


def gdn2(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, g: Tensor | None = None, **options: Unpack[Options]
) -> Result:
    """S' = Diag(α) S, then S' + k (w ⊙ v − S'ᵀ(b ⊙ k))ᵀ; b and g [B, T, H, K'], w [B, T, H, V]."""
    return fast_weights("gdn2", q, k, v, b=b, w=w, g=g, **options)


def longhorn(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Unpack[Options]) -> Result:
    """S + ε k (v − Sᵀ k)ᵀ, ε = β / (1 + β kᵀk), beta [B, T, H]."""
    return fast_weights("longhorn", q, k, v, beta=beta, **options)


def comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, beta: Tensor, g: Tensor | None = None, **options: Unpack[Options]
) -> Result:
    """α S + β k (v − Sᵀ p)ᵀ, where p reads S before the decay; p [B, T, H, K'], beta and g [B, T, H]."""
    return fast_weights("comba", q, k, v, p=p, beta=beta, g=g, **options)


def rwkv7(
    q: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, g: Tensor | None = None, **options: Unpack[Options]
) -> Result:
    """Diag(α) S − (κ ⊙ a)(Sᵀ κ)ᵀ + k vᵀ, where κ reads S before the decay; kappa, a and g [B, T, H, K']."""
    return fast_weights("rwkv7", q, k, v, kappa=kappa, a=a, g=g, **options)
