"""The recurrence as one node of an ONNX graph, while `torch.onnx.export` traces: `LinearAttention` of opset 27.

The node's numbers are float32, whatever dtype the model has, so that gates and state keep their precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fwp.core import Core, Form, State, denominators, to_heads
from fwp.feature_maps import applied

OPSET = 27  # the first that has the operator


def refuses(core: Core, form: Form) -> str | None:
    """Why the operator can't serve these inputs: it erases along k what was there after the decay, and reads after."""
    of = "for LinearAttention of ONNX"
    if core.cu_seqlens is not None:
        return f"cu_seqlens: expected None {of}, got packed sequences"
    if core.read != "after":
        return f"read: expected 'after' {of}, got {core.read!r}"
    if core.a is not None or core.erase_before_decay:
        return f"rule: expected one that erases along k {of}, got an erase key of its own"
    if core.erases and core.e is not core.w:
        return f"rule: expected one strength to erase and to write {of}, got two"
    if core.v.dtype == torch.float64:
        return f"v: expected float32 or 16 bits {of}, got torch.float64"
    return None


def run(core: Core, form: Form) -> tuple[Tensor, State]:
    """o [B, T, max(Hq, H), V] in float32 and the final state, as the outputs of one node."""
    core = applied(core)
    H, n = core.heads, core.writes
    q = to_heads(core.q, max(core.q.shape[2], H)).float()
    k, v = (to_heads(x, H).float() for x in (core.k, core.v))
    state = core.initial()
    if core.w is not None and not core.erases:
        v = core.w.unsqueeze(-1) * v
    S = state.S
    if state.z is not None:  # z is what a value of 1 writes
        v, S = torch.cat([v, torch.ones_like(v[..., :1])], -1), torch.cat([S, state.z.unsqueeze(-1)], -1)
    if n > 1:  # only the last write of a token is followed by a read that anybody sees
        q = torch.stack([torch.zeros_like(q)] * (n - 1) + [q], 2).flatten(1, 2)
    g = None if core.g is None else core.g.flatten(2)  # [B, n·T, H] or [B, n·T, H·K]
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    B, T, Hq, _ = q.shape
    flat, S = torch.onnx.ops.symbolic_multi_out(
        "LinearAttention",
        (q.flatten(2), k.flatten(2), v.flatten(2), S, g, core.e),
        {"q_num_heads": Hq, "kv_num_heads": H, "scale": 1.0, "update_rule": rule[g is not None, core.erases]},
        dtypes=(torch.float32, torch.float32),
        shapes=((B, T, Hq * v.shape[-1]), S.shape),
        version=OPSET,
    )
    out = flat.unflatten(2, (Hq, v.shape[-1]))[:, n - 1 :: n]
    if state.z is None:
        return out, State(S)
    out, found = out[..., :-1], out[..., -1:]
    divisor = denominators(found, core.eps)
    return torch.where(divisor == 0, 0, out / divisor.masked_fill(divisor == 0, 1)), State(S[..., :-1], S[..., -1])
