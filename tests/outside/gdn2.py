"""GDN-2 (arXiv 2605.22791), a rule from outside the table: b erases by key channel, w writes by value channel.

S' = Diag(α)S, then S' + k (w ⊙ v − S'ᵀ (b ⊙ k))ᵀ, α = exp g.
"""

import dataclasses

import torch

import fwp
from fwp.rules.reference import outer, retrieve
from fwp.rules.spec import decay, uniform


def step(S, k, v, b, w, g):
    S = g.exp().unsqueeze(-1) * S
    return S + outer(k, w * v - retrieve(S, b * k))


def as_kda(k, v, beta, g):
    """kda is b = w = β."""
    return {"b": beta.unsqueeze(-1).expand_as(k), "w": beta.unsqueeze(-1).expand_as(v), "g": g}


GDN2 = fwp.Rule(
    "gdn2",
    step=step,
    gates={
        "b": fwp.Gate("BTHK", 0, 2, torch.sigmoid, uniform(0.1, 0.9)),
        "w": fwp.Gate("BTHV", 0, 2, torch.sigmoid, uniform(0.1, 0.9)),
        "g": decay("BTHK"),
    },
    lower=lambda core, b, w, g=None: dataclasses.replace(core, e=b, w=w, g=g),
    extends={"kda": as_kda},
    erases=True,
)
