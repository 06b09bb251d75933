"""What several tests share: all rules of the table and two from outside it, their forms, and comparisons of results."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
from outside.delta_rnn import DELTA_RNN
from outside.pkda import PKDA

import fwp
from fwp.backends import chunked
from fwp.core import Core
from fwp.testing import deviation, sample

RULES = (*fwp.RULES.values(), PKDA, DELTA_RNN)
REFERENCE = {"backend": "reference"}
TOKENS = {"backend": "torch", "form": "recurrent"}
CHUNKS = {"backend": "torch", "form": "chunk"}


def forms(rule):
    return (REFERENCE, TOKENS, CHUNKS) if rule.lower else (REFERENCE,)


@dataclass(frozen=True)
class Way:
    """How a rule is called: read before or after, attention normalisation, and writes per read."""

    read: str
    denominator: bool = False
    writes: int = 1

    @property
    def options(self):
        """The arguments of `fwp.fast_weights`."""
        return {"read": self.read} | ({"denominator": True} if self.denominator else {})

    @property
    def inputs(self):
        """The arguments of `fwp.testing.sample`."""
        return {"denominator": self.denominator, "writes": self.writes}


def normalises(rule):
    """Whether the rule has an attention normalisation."""
    return rule.plain and (rule.normalised is not None or not rule.erases)


def ways(rule):
    """Every combination of read and normalisation, and two more with several writes per read."""
    denominators = (False, True) if normalises(rule) else (False,)
    single = [Way(read, denominator) for denominator in denominators for read in ("after", "before")]
    return [*single, Way("after", denominators[-1], writes=3), Way("before", writes=2)]


def divisors_near_zero(rule, decay, size):
    """Float64 inputs for attention normalisation: positive keys of that size, and one token with that decay."""
    inputs = sample(rule, B=1, T=6, H=1, K=4, V=3, denominator=True, seed=3)
    inputs["k"] = inputs["k"] * size
    if "g" in inputs:
        inputs["g"] = torch.full_like(inputs["g"], -0.1)
        inputs["g"][:, 3] = decay
        if inputs["g"].dim() == 4:
            inputs["g"][:, 4, :, 1:] = decay
    return inputs


def lowered(rule):
    """The lowered core of a few tokens, and the core before lowering."""
    inputs = sample(rule, T=3, K=4, V=3, dtype=torch.bfloat16)
    core = Core(inputs["q"], inputs["k"], inputs["v"])
    return rule.lower(core, **{name: inputs[name] for name in rule.gates}), core


def keeps_k_and_v(rule):
    """Whether the lowering keeps k and v and makes no erase key. Otherwise it rounds what it makes to their dtype."""
    if rule.lower is None:
        return True
    core, given = lowered(rule)
    return core.a is None and core.k is given.k and core.v is given.v


def resets(rule):
    """Whether a decay of −inf forgets everything. It doesn't if the rule erases before the decay."""
    return "g" in rule.gates and (rule.lower is None or not lowered(rule)[0].erase_before_decay)


def from_the_simplest(rule, k, v):
    """The gates that turn a rule into the simplest rule of its chain, with β = 1 there, and that simplest rule."""
    if not rule.extends:
        return {name: k.new_ones(k.shape[:3]) for name in rule.gates}, rule
    simpler = next(iter(rule.extends))
    gates, simplest = from_the_simplest(fwp.RULES[simpler], k, v)
    return rule.extends[simpler](k, v, **gates), simplest


def name(options):
    if isinstance(options, Way):
        words = [options.read, "denominator" * options.denominator, f"{options.writes}writes" * (options.writes > 1)]
        return "-".join(filter(None, words))
    return "-".join(key if value is True else str(value) for key, value in options.items())


def case(*values):
    """A parameter set whose id names its rule and options."""
    return pytest.param(*values, id="-".join(name(x) if isinstance(x, dict | Way) else x.name for x in values))


each_rule = pytest.mark.parametrize("rule", [case(rule) for rule in RULES])
each_lowered = pytest.mark.parametrize("rule", [case(rule) for rule in RULES if rule.lower])
each_form = pytest.mark.parametrize(("rule", "form"), [case(rule, form) for rule in RULES for form in forms(rule)])
each_fast_form = pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES for form in forms(rule)[1:]]
)
each_way = pytest.mark.parametrize(
    ("rule", "form", "way"), [case(rule, form, way) for rule in RULES for form in forms(rule) for way in ways(rule)]
)
each_way_in_one_form = pytest.mark.parametrize(  # for shapes, dtypes and memory, where forms and ways don't meet
    ("rule", "form", "way"),
    [
        case(rule, form, way)
        for rule in RULES
        for i, form in enumerate(forms(rule))
        for way in ways(rule)[i :: len(forms(rule))]
    ],
)
each_lowered_way = pytest.mark.parametrize(
    ("rule", "way"), [case(rule, way) for rule in RULES if rule.lower for way in ways(rule)]
)


def agree(found, truth, bound=1e-10):
    """Asserts that every result of `fwp.testing.evaluate` is there and within bound · max(1, |truth|)."""
    assert list(found) == list(truth)
    wrong = {name: deviation(found[name], truth[name]) for name in truth}
    wrong = {name: error for name, error in wrong.items() if error > bound}
    assert not wrong, f"beyond {bound}: {wrong}"


@contextmanager
def chunk_size(size):
    """A context in which the torch backend's chunk form has this chunk size."""
    with mock.patch.object(chunked, "run", partial(chunked.run, chunk=size)):
        yield


def over_time(fn, inputs):
    """Applies fn to all inputs but the state."""
    return {name: x if name == "state" else fn(x) for name, x in inputs.items()}


def tokens(inputs, start=None, end=None):
    """The inputs of tokens start … end of q, with all their writes and the same state."""
    T = inputs["q"].shape[1]
    start, end, _ = slice(start, end).indices(T)

    def cut(name, x):
        if name == "state" or not isinstance(x, torch.Tensor):
            return x
        n = 1 if name in ("q", "mask") or T == 0 else inputs["k"].shape[1] // T
        return x[:, n * start : n * end]

    return {name: cut(name, x) for name, x in inputs.items()}


def cat_states(states):
    """The states of single sequences, joined into one."""
    return torch.utils._pytree.tree_map(lambda *x: None if x[0] is None else torch.cat(x), *states)


def sequence(state, n):
    """The state of sequence n."""
    return torch.utils._pytree.tree_map(lambda x: None if x is None else x[n : n + 1], state)


def leaves(*trees):
    """All tensors of results and states."""
    return [x for x in torch.utils._pytree.tree_leaves(list(trees)) if x is not None]


def close(found, truth, bound=1e-10):
    """Asserts that all tensors of two trees agree."""
    found, truth = leaves(found), leaves(truth)
    assert len(found) == len(truth)
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
