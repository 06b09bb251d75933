"""What `fwp check` compares for a rule without `lower`, which only the reference backend can run.

The rule's equation is run once more by a plain loop that shares no code with the reference. Then come laws that hold
for every rule: an output depends on no later token and on no other sequence, packed sequences equal separate ones,
masked tokens equal removed ones, and gradients agree with differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import fwp
from fwp import testing
from fwp._torch_private import tree_map
from fwp.core import State
from fwp.rules import Rule
from fwp.validate import named_tensors

# One comparison: the name of a result, what was found, what it must equal, and the bound of their `row_error`.
Comparison = tuple[str, Tensor, Tensor, float]

EXACT = 1e-10
DIFFERENCES = 1e-6  # of central differences in float64, which cancel
STEP = 1e-5
DIRECTIONS = 4


# ---- the equation in a plain loop ----


def token_by_token(rule: Rule, q: Tensor, k: Tensor, v: Tensor, *, state: Any, **given: Any) -> tuple[Tensor, Any]:
    """`fwp.fast_weights` as a loop over sequences, state heads and tokens. It serves the options of `fwp check`."""
    mask, bounds = given.pop("mask", None), given.pop("cu_seqlens", None)
    read, denominator = given.pop("read", "after"), given.pop("denominator", False)
    phi, norm = fwp.feature_maps.get(given.pop("feature_map", None)), given.pop("feature_norm", None)
    q, k = phi(q), phi(k)
    if norm == "sum":
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    n, H = k.shape[1] // q.shape[1], max(k.shape[2], v.shape[2])
    q, k, v = (x.repeat_interleave(max(1, H // x.shape[2]), 2) for x in (q, k, v))
    q = q.unflatten(2, (H, -1))  # the queries of each state
    if bounds is None:
        parts = [(b, slice(None), slice(None)) for b in range(len(q))]
    else:
        parts = [(0, slice(a, z), slice(n * a, n * z)) for a, z in pairwise(bounds.tolist())]
    outputs, states = [], []
    for s, (b, reads, writes) in enumerate(parts):
        found = []
        for h in range(H):
            start = tree_map(lambda x, s=s, h=h: None if x is None else x[s : s + 1, h : h + 1], state)
            gates = {name: gate[b, writes, h] for name, gate in given.items()}
            seen = None if mask is None else mask[b, reads]
            head = partial(one_head, rule, read=read, denominator=denominator, mask=seen)
            found.append(head(q[b, reads, h], k[b, writes, h], v[b, writes, h], gates, start))
        outputs.append(torch.cat([o for o, _ in found], 1))
        states.append(joined([end for _, end in found], 1))
    return torch.stack(outputs) if bounds is None else torch.cat(outputs).unsqueeze(0), joined(states, 0)


def one_head(
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: Any,
    *,
    read: str,
    denominator: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Any]:
    """One sequence of one state. q [T, G, K] of G query heads, k [nT, K], v [nT, V], gates [nT, …] → o [T, G, V]."""

    def look(state: Any, queries: Tensor) -> tuple[Tensor, Any]:
        if not rule.plain:
            o, state = rule.read(state, queries[None])
            return o[0], state
        o = queries @ state.S[0, 0]
        return o / (queries @ state.z[0, 0] + 1e-6).unsqueeze(-1) if denominator else o, state

    def write(state: Any, i: int) -> Any:
        key, value, now = (
            k[i].view(1, 1, -1),
            v[i].view(1, 1, -1),
            {name: x[i][None, None] for name, x in gates.items()},
        )
        if not rule.plain:
            return rule.step(state, key, value, **now)
        if not denominator:
            return State(rule.step(state.S, key, value, **now))
        if rule.normalised is not None:
            return State(*rule.normalised(state.S, state.z, key, value, **now))
        z = rule.step(state.z.unsqueeze(-1), key, torch.ones_like(value[..., :1]), **now).squeeze(-1)
        return State(rule.step(state.S, key, value, **now), z)

    n, outputs = len(k) // max(1, len(q)), [q.new_zeros(0, q.shape[1], v.shape[-1])]
    for t, queries in enumerate(q):
        if mask is not None and not mask[t]:
            outputs.append(q.new_zeros(1, q.shape[1], v.shape[-1]))
            continue
        if read == "before":
            o, state = look(state, queries)
        for i in range(n * t, n * t + n):
            state = write(state, i)
        if read == "after":
            o, state = look(state, queries)
        outputs.append(o.unsqueeze(0))
    return torch.cat(outputs), state


def joined(states: list[Any], axis: int) -> Any:
    """States of several heads or sequences as one."""
    return tree_map(lambda *x: None if x[0] is None else torch.cat(x, axis), *states)


# ---- laws ----


def inputs(rule: Rule, **shape: Any) -> dict[str, Any]:
    """Random arguments in float64, with an initial state."""
    return testing.sample(rule, **{"B": 3, "T": 12, "K": 8, "V": 5, "seed": 8, "state": True} | shape)


def results(rule: Rule, x: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    """Output and state by name."""
    return testing.evaluate(rule, x, gradients=False, backend="reference", **options)


def compared(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Iterator[Comparison]:
    """All results of two runs."""
    return ((name, found[name], x, EXACT) for name, x in truth.items())


def causality(rule: Rule) -> Iterator[Comparison]:
    """Other tokens from the eighth on change no output before it."""
    x, other = inputs(rule), inputs(rule, seed=9)
    for read in ("after", "before"):
        y = {name: x[name] if name == "state" else torch.cat([x[name][:, :7], other[name][:, 7:]], 1) for name in x}
        yield "out", results(rule, y, read=read)["out"][:, :7], results(rule, x, read=read)["out"][:, :7], EXACT


def packed_as_separate(rule: Rule) -> Iterator[Comparison]:
    """Sequences of 5, 0 and 7 tokens in one pack, against each of them alone."""
    bounds = (0, 5, 5, 12)
    x = inputs(rule, B=1, sequences=3)
    outs, ends = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        alone = {name: y if name == "state" else y[:, start:end] for name, y in x.items()}
        alone["state"] = tree_map(lambda y, n=n: None if y is None else y[n : n + 1], x["state"])
        out, final = fwp.fast_weights(rule, **alone, backend="reference")
        outs.append(out)
        ends.append(final)
    truth = {"out": torch.cat(outs, 1), **named_tensors("state", joined(ends, 0))}
    yield from compared(results(rule, x, cu_seqlens=torch.tensor(bounds)), truth)


def masked_as_removed(rule: Rule) -> Iterator[Comparison]:
    """A sequence with masked tokens, against the same without these tokens."""
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    x = inputs(rule)
    found = results(rule, x, mask=keep.expand(3, -1))
    yield "out", found["out"][:, ~keep], torch.zeros_like(found["out"][:, ~keep]), EXACT
    fewer = {name: y if name == "state" else y[:, keep] for name, y in x.items()}
    yield from compared(found | {"out": found["out"][:, keep]}, results(rule, fewer))


def permuted_batch(rule: Rule) -> Iterator[Comparison]:
    """Sequences in another order have the same results in that order."""
    order, x = [2, 0, 1], inputs(rule)

    def reordered(y: Any) -> Any:
        return tree_map(lambda z: None if z is None else z[order], y)

    truth = {name: y[order] for name, y in results(rule, x).items()}
    yield from compared(results(rule, {name: reordered(y) for name, y in x.items()}), truth)


def gradients_as_differences(rule: Rule) -> Iterator[Comparison]:
    """The derivative along random directions of each input, against central differences."""
    x = inputs(rule, B=1, T=6, H=1)
    found, plain = testing.evaluate(rule, x, backend="reference"), results(rule, x)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(y.shape, generator=generator).bfloat16().double() for name, y in plain.items()}

    def total(y: Mapping[str, Any]) -> Tensor:  # what `evaluate` differentiates
        return torch.stack([(weights[name] * z).sum() for name, z in results(rule, y).items()]).sum()

    for name, value in x.items():
        for path, leaf in named_tensors(name, value).items():
            slopes, differences = [], []
            for _ in range(DIRECTIONS):
                direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
                ahead, behind = (total(x | {name: moved(value, leaf, h * direction)}) for h in (STEP, -STEP))
                slopes.append((found[f"d{path}"] * direction).sum())
                differences.append((ahead - behind) / (2 * STEP))
            yield f"d{path}", torch.stack(slopes), torch.stack(differences), DIFFERENCES


def moved(tree: Any, leaf: Tensor, by: Tensor) -> Any:
    """The tree with `by` added to one of its tensors."""
    return tree_map(lambda y: y + by if y is leaf else y, tree)


LAWS: tuple[Callable[[Rule], Iterator[Comparison]], ...] = (
    causality,
    packed_as_separate,
    masked_as_removed,
    permuted_batch,
    gradients_as_differences,
)
