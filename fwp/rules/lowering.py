"""How each rule lowers onto the recurrence of `fwp.core`: it sets g, a, e and w, or changes k and v."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fwp.core import Core, opaque, ratio, refuse_forward_derivatives, retrieval, sequence_of, to_heads
from fwp.feature_maps import applied


def additive(core: Core) -> Core:
    """The same core: nothing decays and nothing is erased."""
    return core


def decay(core: Core, g: Tensor | None = None) -> Core:
    """g [B, T, H], or [B, T, H, K] for `gla`."""
    return replace(core, g=g)


def delta(core: Core, beta: Tensor, g: Tensor | None = None) -> Core:
    """e = w = β. With attention normalisation what is retrieved is divided by z'ᵀk, by an erase key of its own.

    S' = α S and z' = α z, so S'ᵀk / z'ᵀk = Sᵀa with a = α k / (zᵀ α k), which reads S before the decay. A decay per
    head cancels, unless it forgets all.
    """
    core = replace(core, g=g, w=beta, e=beta)
    if not core.denominator:
        return core
    core = applied(core)
    k = to_heads(core.k, core.heads).to(core.dtype)  # [B, T, H, K]
    decay = g.unsqueeze(-1) if g is not None and g.dim() == 3 else g
    return replace(core, a=ratio(*retrieval(keys_before(core, k), k, decay)), erase_before_decay=True)


def gdn2(core: Core, b: Tensor, w: Tensor, g: Tensor) -> Core:
    """a = b ⊙ k with erase strength 1, and w ⊙ v in place of v. b, g [B, T, H, K], w [B, T, H, V]."""
    k, v = (to_heads(x, core.heads).to(core.dtype) for x in (core.k, core.v))
    return replace(core, g=g, a=(b * k).to(core.k.dtype), v=(w * v).to(core.v.dtype))


def longhorn(core: Core, beta: Tensor) -> Core:
    """`delta` with the learning rate β / (1 + β kᵀk). beta [B, T, H]."""
    k = to_heads(core.k, core.heads).to(core.dtype)
    return delta(core, beta / (1 + beta * (k * k).sum(-1)))


def comba(core: Core, p: Tensor, beta: Tensor, g: Tensor) -> Core:
    """a = p, which reads before the decay, and e = w = β. p [B, T, H, K], beta, g [B, T, H]."""
    return replace(core, g=g, a=p.to(core.k.dtype), e=beta, w=beta, erase_before_decay=True)


def rwkv7(core: Core, kappa: Tensor, a: Tensor, g: Tensor) -> Core:
    """Two writes per token: −(κ ⊙ a)(Sᵀκ)ᵀ with the decay, then k vᵀ alone. kappa, a, g [B, T, H, K]."""
    dtype = core.k.dtype
    k, zero = to_heads(core.k, core.heads), torch.zeros_like(kappa)
    return replace(
        core,
        k=_interleaved((kappa * a).to(dtype), k),
        v=_interleaved(torch.zeros_like(core.v), core.v),
        g=_interleaved(g, zero),
        a=_interleaved(kappa, zero).to(dtype),
        writes=2 * core.writes,
        erase_before_decay=True,
    )


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Two tensors [B, T, …] → [B, 2T, …], with both entries of a token side by side."""
    return torch.stack([first, second], 2).flatten(1, 2)


def with_rescale(core: Core) -> Core:
    """The core with its growing units as a part of the decay."""
    g, rescale = core.g, core.rescale
    if g is not None and rescale is not None and g.dim() != rescale.dim():  # one per head is the same in every channel
        g, rescale = (x if x.dim() == 4 else x.unsqueeze(-1) for x in (g, rescale))
    return replace(core, rescale=None, g=g if rescale is None else rescale if g is None else g + rescale)


def keys_before(core: Core, k: Tensor) -> Tensor:
    """z_{t−1}, the decayed sum of the keys before token t in its sequence. k and result [B, T, H, K]."""
    z, T = core.initial().z, k.shape[1]
    assert z is not None
    g = with_rescale(core).g
    decay = torch.zeros_like(k) if g is None else g if g.dim() == 4 else g.unsqueeze(-1)
    a = decay.exp().expand_as(k)
    a = torch.cat([torch.zeros_like(a[:, :1]), a], 1)[:, :-1]  # the decay of the token before
    before = torch.cat([torch.zeros_like(k[:, :1]), k], 1)[:, :-1]
    if core.cu_seqlens is None:
        first = torch.zeros(T, dtype=torch.bool, device=k.device)
        first[:1] = True
        start = z.unsqueeze(1)
    else:
        bounds = core.cu_seqlens.long() * core.writes
        slot = torch.where(bounds[:-1] < bounds[1:], bounds[:-1], T)  # the slot of empty sequences is discarded
        first = torch.zeros(T + 1, dtype=torch.bool, device=k.device).index_fill(0, slot, True)[:T]
        start = z[sequence_of(bounds, T)].unsqueeze(0)
    scan = _scan_op if opaque() and T else _scan
    return scan(a.masked_fill(first[:, None, None], 0), torch.where(first[:, None, None], start, before))


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """z_t = a_t z_{t−1} + b_t along dim 1, with z = 0 before the first.

    Each pass doubles the reach: after pass s, (a, b) is the composition of the last 2^s maps z ← a z + b. Every a is
    a product of α ≤ 1, so nothing overflows. It takes O(T log T) elementwise work.
    """
    shift = 1
    while shift < b.shape[1]:
        b = torch.cat([b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]], 1)
        a = torch.cat([a[:, :shift], a[:, shift:] * a[:, :-shift]], 1)
        shift *= 2
    return b


# Under torch.compile the scan is one opaque op: its loop would be unrolled, and recompiled for every power of two.


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
    # shifts by one token; torch.compile would guard on slices of T − 1
    earlier, later = (0, 0, 0, 0, -1, 1), (0, 0, 0, 0, 1, -1)
    d_b = _scan_op(pad(a, earlier).flip(1), d_z.flip(1)).flip(1)
    return pad(z, later) * d_b, d_b


_scan_op.register_autograd(
    _scan_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output)
)
