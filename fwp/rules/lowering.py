"""How each rule becomes decay g, erase e and write w of the recurrence in `fwp.core`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwp.core import Core, opaque, ratio, refuse_forward_derivatives, to_heads
from fwp.feature_maps import applied


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
    core = applied(core)
    k = to_heads(core.k, core.heads).to(core.dtype)  # [B, T, H, K]
    return replace(core, e=ratio(beta, (keys_before(core, k) * k).sum(-1)))


def keys_before(core: Core, k: Tensor) -> Tensor:
    """z'_t = Diag(exp g_t) z_{t−1}, the decayed sum of the keys before t in its sequence. k, result [B, T, H, K]."""
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
    scan = _scan_op if opaque() and k.shape[1] else _scan
    return scan(a.masked_fill(first[:, None, None], 0), a * before)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """z_t = a_t z_{t−1} + b_t along dim 1, z = 0 before the first.

    By doubling: after step s, (a, b) compose the last 2^s maps z ← a z + b. Every a is a product of α ≤ 1, so nothing
    overflows, at O(T log T) elementwise work.
    """
    shift = 1
    while shift < b.shape[1]:
        b = torch.cat([b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return b


# Under torch.compile the loop would be unrolled and recompiled for every power of two: there it is one opaque op.


@torch.library.custom_op("fwp::scan", mutates_args=())
def _scan_op(a: Tensor, b: Tensor) -> Tensor:
    refuse_forward_derivatives()
    return _scan(a, b).clone(memory_format=torch.contiguous_format)


@_scan_op.register_fake
def _(a, b):  # type: ignore[no-untyped-def]
    return torch.empty_like(b, memory_format=torch.contiguous_format)


def _scan_backward(ctx, d_z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """The gradient runs the other way: d b_t = d z_t + a_{t+1} d b_{t+1}, d a_t = z_{t−1} d b_t."""
    a, z = ctx.saved_tensors
    earlier, later = (0, 0, 0, 0, -1, 1), (0, 0, 0, 0, 1, -1)  # shifts by a token; slices of T − 1 would be guarded on
    d_b = _scan_op(pad(a, earlier).flip(1), d_z.flip(1)).flip(1)
    return pad(z, later) * d_b, d_b


_scan_op.register_autograd(
    _scan_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output)
)
