"""Every rule as its paper writes it: one function, one token. These functions are the specification.

S [..., K, V] fast weights, k [..., K] key, v [..., V] value, beta [...] learning rate, g [...] or [..., K] log decay.
Other gates have the letters of their papers. Their shapes stand in the table of `fwp.rules`.
The `*_normalised` functions carry z [..., K], the running sum of keys, which also divides the retrieved value.
"""

from __future__ import annotations

from torch import Tensor

from fwp.core import ratio, retrieval


def outer(k: Tensor, v: Tensor) -> Tensor:
    """k vᵀ: [..., K], [..., V] → [..., K, V]."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def retrieve(S: Tensor, k: Tensor) -> Tensor:
    """Sᵀ k, the value stored under k: [..., K, V], [..., K] → [..., V]."""
    return (S * k.unsqueeze(-1)).sum(-2)


def additive(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """S + k vᵀ."""
    return S + outer(k, v)


def decay(S: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """α S + k vᵀ, α = exp g per head."""
    return g.exp()[..., None, None] * S + outer(k, v)


def gla(S: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Diag(α) S + k vᵀ, α = exp g per key channel."""
    return g.exp().unsqueeze(-1) * S + outer(k, v)


def delta(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S + β k (v − Sᵀ k)ᵀ."""
    return S + beta[..., None, None] * outer(k, v - retrieve(S, k))


def gated_delta(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S' = α S, then S' + β k (v − S'ᵀ k)ᵀ."""
    return delta(g.exp()[..., None, None] * S, k, v, beta)


def kda(S: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """S' = Diag(α) S, then S' + β k (v − S'ᵀ k)ᵀ."""
    return delta(g.exp().unsqueeze(-1) * S, k, v, beta)


def gdn2(S: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """S' = Diag(α) S, then S' + k (w ⊙ v − S'ᵀ(b ⊙ k))ᵀ."""
    S = g.exp().unsqueeze(-1) * S
    return S + outer(k, w * v - retrieve(S, b * k))


def longhorn(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """S + ε k (v − Sᵀ k)ᵀ, ε = β / (1 + β kᵀk)."""
    return delta(S, k, v, beta / (1 + beta * (k * k).sum(-1)))


def comba(S: Tensor, k: Tensor, v: Tensor, p: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """α S + β k (v − Sᵀ p)ᵀ, where p reads S before the decay."""
    return g.exp()[..., None, None] * S + beta[..., None, None] * outer(k, v - retrieve(S, p))


def rwkv7(S: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Diag(α) S − (κ ⊙ a)(Sᵀ κ)ᵀ + k vᵀ, where κ reads S before the decay."""
    return g.exp().unsqueeze(-1) * S - outer(kappa * a, retrieve(S, kappa)) + outer(k, v)


def mean(S: Tensor, z: Tensor, k: Tensor, g: Tensor | None = None) -> Tensor:
    """S'ᵀk / (z'ᵀk) with S' = α S, z' = α z and α = exp g, g [..., 1 or K]: the mean of the values under keys like k.

    It is 0 where z'ᵀk is 0. `retrieval` cancels what numerator and denominator share before they underflow.
    """
    k, found = retrieval(z, k, g)
    return ratio(retrieve(S, k), found)


def delta_normalised(S: Tensor, z: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """v̄ = Sᵀ k / (zᵀ k), 0 at the first token; S + β k (v − v̄)ᵀ; z + k (equation 25 of the 2021 paper)."""
    return S + beta[..., None, None] * outer(k, v - mean(S, z, k)), z + k


def gated_delta_normalised(
    S: Tensor, z: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """`delta_normalised` on the decayed αS and αz."""
    alpha, found = g.exp(), mean(S, z, k, g.unsqueeze(-1))
    return alpha[..., None, None] * S + beta[..., None, None] * outer(k, v - found), alpha.unsqueeze(-1) * z + k


def kda_normalised(S: Tensor, z: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_normalised` on the decayed Diag(α)S and Diag(α)z."""
    alpha, found = g.exp(), mean(S, z, k, g)
    return alpha.unsqueeze(-1) * S + beta[..., None, None] * outer(k, v - found), alpha * z + k
