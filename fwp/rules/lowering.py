"""How each rule becomes decay g, erase e and write w of the recurrence in `fwp.core`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fwp.core import Core, to_heads
from fwp.rules.reference import ratio


def additive(core: Core) -> Core:
    """Nothing decays, nothing is erased."""
    return core


def decay(core: Core, g: Tensor | None = None) -> Core:
    """g [B, T, H], or [B, T, H, K] for `gla`."""
    return replace(core, g=g)


def delta(core: Core, beta: Tensor, g: Tensor | None = None) -> Core:
    """e = w = β; with attention normalisation e_t = β_t / (z'ᵀ k_t), z' being the decayed sum of the keys before t.

    A single β for both would be wrong there: what is written is not divided.
    """
    core = replace(core, g=g, w=beta, e=beta)
    if not core.denominator:
        return core
    k = to_heads(core.k, core.heads).to(core.dtype)  # [B, T, H, K]
    return replace(core, e=ratio(beta, (keys_before(core, k) * k).sum(-1)))


def keys_before(core: Core, k: Tensor) -> Tensor:
    """z'_t = Diag(exp g_t) z_{t−1}, the decayed sum of the keys before t in its sequence. k, result [B, T, H, K].

    By doubling: after step s, (a, b) compose the last 2^s maps z ← a z + b. Every a is a product of α ≤ 1, so nothing
    overflows, at O(T log T) elementwise work.
    """
    if core.g is None:
        a = torch.ones_like(k)
    else:
        a = (core.g if core.g.dim() == 4 else core.g.unsqueeze(-1)).exp().expand_as(k)
    z = core.initial().z
    assert z is not None
    # the map of token t: first add the key before it, or start from the sequence's z; then decay
    if core.cu_seqlens is None:
        before = torch.cat([z.unsqueeze(1), k], 1)[:, :-1]
        first = torch.zeros(k.shape[1], dtype=torch.bool, device=k.device)
        first[:1] = True
    else:
        starts = core.cu_seqlens[:-1].long()
        nonempty = starts < core.cu_seqlens[1:]
        T = k.shape[1]
        slot = torch.where(nonempty, starts, T)  # empty sequences write into a slot that is thrown away
        first = torch.zeros(T + 1, dtype=torch.bool, device=k.device).index_fill(0, slot, True)[:T]
        sequence = torch.searchsorted(core.cu_seqlens[1:].long(), torch.arange(T, device=k.device), right=True)
        shifted = torch.cat([torch.zeros_like(k[:, :1]), k], 1)[:, :-1]
        before = torch.where(first[:, None, None], z[sequence].unsqueeze(0), shifted)
    b = a * before
    a = a.masked_fill(first[:, None, None], 0)
    shift = 1
    while shift < k.shape[1]:
        b = torch.cat([b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return b
