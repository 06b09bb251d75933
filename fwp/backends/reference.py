"""The specification, run by one generic loop over a rule's equation, token by token. Slow, differentiable, exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fwp._torch_private import tree_map as _tree_map
from fwp.core import Core, State, denominators, ratio, to_heads
from fwp.feature_maps import applied
from fwp.rules import lowering
from fwp.rules.reference import gated_delta_normalised
from fwp.rules.spec import Rule


def tree_map(fn: Callable[..., Tensor], *states: Any) -> Any:
    """Applies fn to the tensors of states of the same structure. None, a leaf in torch, stays None."""
    return _tree_map(lambda *x: None if x[0] is None else fn(*x), *states)


def run(rule: Rule, core: Core, gates: Mapping[str, Tensor], mask: Tensor | None, state: Any) -> tuple[Tensor, Any]:
    """Runs `rule` over q, k and v of `core`. mask [B, T]: False skips a token. state: the rule's, of N sequences.

    Returns o [B, T, max(Hq, H), V] in the state's dtype and the final state.
    """
    core, H = applied(core), core.heads
    if core.rescale is not None and rule.erases:  # what is erased is found before the decay, so this must be part of it
        g = lowering.with_rescale(replace(core, g=gates.get("g"))).g
        assert g is not None
        rule = rule if "g" in gates else replace(rule, normalised=gated_delta_normalised)
        core, gates = replace(core, rescale=None), {**gates, "g": g}
    if state is None:
        state = rule.init((core.sequences, H), core.k.shape[-1], core.v.shape[-1], core.initial().S)
    q = to_heads(core.q, max(core.q.shape[2], H)).to(core.dtype)
    k, v = (to_heads(x, H).to(core.dtype) for x in (core.k, core.v))
    if core.cu_seqlens is None:
        return _walk(rule, core, q, k, v, gates, core.rescale, mask, state)
    bounds = core.cu_seqlens.tolist()
    V = core.v.shape[-1]  # tokens outside all sequences read nothing
    outputs, states = [q.new_zeros(1, bounds[0], q.shape[2], V)], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        part, one = slice(start, end), slice(n, n + 1)
        written = slice(core.writes * start, core.writes * end)
        o, final = _walk(
            rule,
            core,
            q[:, part],
            k[:, written],
            v[:, written],
            {name: gate[:, written] for name, gate in gates.items()},
            None if core.rescale is None else core.rescale[:, written],
            None if mask is None else mask[:, part],
            tree_map(itemgetter(one), state),
        )
        outputs.append(o)
        states.append(final)
    outputs.append(q.new_zeros(1, q.shape[1] - bounds[-1], q.shape[2], V))
    return torch.cat(outputs, 1), tree_map(lambda *x: torch.cat(x), *states)


def _walk(
    rule: Rule,
    core: Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    rescale: Tensor | None,
    mask: Tensor | None,
    state: Any,
) -> tuple[Tensor, Any]:
    """One sequence per batch row."""
    outputs: list[Tensor] = []
    for t in range(q.shape[1]):
        past = state
        if core.causal and core.read == "before":
            o, state = _read(rule, core, state, q[:, t])
            outputs.append(o)
        for i in range(core.writes * t, core.writes * (t + 1)):
            if rescale is not None:
                shrink = rescale[:, i].exp()
                state = State(shrink.unsqueeze(-1) * state.S, shrink * state.z)
            state = _step(rule, core, state, k[:, i], v[:, i], {name: gate[:, i] for name, gate in gates.items()})
        if core.causal and core.read == "after":
            o, state = _read(rule, core, state, q[:, t])
            outputs.append(o)
        if mask is not None:
            state = _where(mask[:, t], state, past)
    if not core.causal:
        outputs = [_read(rule, core, state, q[:, t])[0] for t in range(q.shape[1])]
    out = torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])
    return (out if mask is None else out.masked_fill(~mask[:, :, None, None], 0)), state


def _step(rule: Rule, core: Core, state: Any, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Any:
    """The state after one token. k [B, H, K], v [B, H, V]."""
    if not rule.plain:
        return rule.step(state, k, v, **gates)
    S, z = state
    if not core.denominator:
        return State(rule.step(S, k, v, **gates))
    if rule.normalised is not None:
        return State(*rule.normalised(S, z, k, v, **gates))
    ones = torch.ones_like(v[..., :1])
    return State(rule.step(S, k, v, **gates), rule.step(z.unsqueeze(-1), k, ones, **gates).squeeze(-1))


def _read(rule: Rule, core: Core, state: Any, q: Tensor) -> tuple[Tensor, Any]:
    """What the queries q [B, max(Hq, H), K] of one token read."""
    if not rule.plain:
        return rule.read(state, q)
    group = q.shape[1] // state.S.shape[1]
    S, z = tree_map(lambda x: x.repeat_interleave(group, 1), state)
    o = rule.read(S, q)[0]
    if core.denominator:
        found = (z * q).sum(-1, keepdim=True)
        o = ratio(o, denominators(found, core.eps))
    return o, state


def _where(keep: Tensor, new: Any, old: Any) -> Any:
    """The new state where keep [B] is True, else the old one."""
    return tree_map(lambda a, b: torch.where(keep.view(-1, *[1] * (a.dim() - 1)), a, b), new, old)
