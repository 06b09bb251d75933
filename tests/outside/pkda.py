"""Preconditioned KDA (arXiv 2604.21100), a rule from outside the table: it writes along m ⊙ k and erases along k.

S' = Diag(α)S, then S' + β (m ⊙ k)(v − S'ᵀ k)ᵀ, α = exp g. The paper makes m > 0 by a recurrence of its own.
"""

import dataclasses

import torch

import fwp
from fwp.core import to_heads
from fwp.rules.reference import outer, retrieve
from fwp.rules.spec import beta, decay, uniform


def step(S, k, v, m, beta, g):
    S = g.exp().unsqueeze(-1) * S
    return S + beta[..., None, None] * outer(m * k, v - retrieve(S, k))


def lower(core, m, beta, g):
    k = to_heads(core.k, core.heads)
    return dataclasses.replace(core, k=(m * k.to(core.dtype)).to(k.dtype), a=k, e=beta, w=beta, g=g)


def as_kda(k, v, beta, g):
    """kda is the case m = 1."""
    return {"m": torch.ones_like(k), "beta": beta, "g": g}


PKDA = fwp.Rule(
    "pkda",
    step=step,
    gates={"m": fwp.Gate("BTHK", 0, 1, torch.sigmoid, uniform(0.2, 1.0)), "beta": beta(), "g": decay("BTHK")},
    lower=lower,
    extends={"kda": as_kda},
    erases=True,
)
