"""What several tests share: every rule of the table and two from outside it, in every form, and how results agree."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from outside.delta_rnn import DELTA_RNN
from outside.pkda import PKDA

import fwp
from fwp.backends import torch as chunked
from fwp.testing import deviation

RULES = (*fwp.RULES.values(), PKDA, DELTA_RNN)
REFERENCE = {"backend": "reference"}
TOKENS = {"backend": "torch", "form": "recurrent"}
CHUNKS = {"backend": "torch", "form": "chunk"}


def forms(rule):
    return (REFERENCE, TOKENS, CHUNKS) if rule.lower else (REFERENCE,)


def ways(rule):
    """Reads and normalisations that the rule has."""
    normalised = rule.plain and (rule.normalised is not None or not rule.erases)
    return [
        {"read": read} | ({"denominator": True} if denominator else {})
        for denominator in ((False, True) if normalised else (False,))
        for read in ("after", "before")
    ]


def name(options):
    return "-".join(key if value is True else str(value) for key, value in options.items())


def case(*values):
    """A parameter set whose id names its rule and options."""
    return pytest.param(*values, id="-".join(name(x) if isinstance(x, dict) else x.name for x in values))


each_rule = pytest.mark.parametrize("rule", [case(rule) for rule in RULES])
each_lowered = pytest.mark.parametrize("rule", [case(rule) for rule in RULES if rule.lower])
each_form = pytest.mark.parametrize(("rule", "form"), [case(rule, form) for rule in RULES for form in forms(rule)])
each_fast_form = pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES for form in forms(rule)[1:]]
)
each_way = pytest.mark.parametrize(
    ("rule", "form", "way"), [case(rule, form, way) for rule in RULES for form in forms(rule) for way in ways(rule)]
)
each_lowered_way = pytest.mark.parametrize(
    ("rule", "way"), [case(rule, way) for rule in RULES if rule.lower for way in ways(rule)]
)


def normalised(way):
    """The arguments of `fwp.testing.sample` for a way."""
    return {"denominator": way.get("denominator", False)}


def agree(found, truth, bound=1e-10):
    """Every result of `fwp.testing.evaluate` within bound · max(1, |truth|), none missing."""
    assert list(found) == list(truth)
    wrong = {name: deviation(found[name], truth[name]) for name in truth}
    wrong = {name: error for name, error in wrong.items() if error > bound}
    assert not wrong, f"beyond {bound}: {wrong}"


@contextmanager
def chunk_size(size):
    """The torch backend's chunk form with chunks of another size."""
    with mock.patch.object(chunked, "run", partial(chunked.run, chunk=size)):
        yield


def over_time(fn, inputs):
    """fn over what has a T axis; the state stays."""
    return {name: x if name == "state" else fn(x) for name, x in inputs.items()}


def cat_states(states):
    """States of single sequences as one."""
    return torch.utils._pytree.tree_map(lambda *x: None if x[0] is None else torch.cat(x), *states)


def sequence(state, n):
    """The state of sequence n."""
    return torch.utils._pytree.tree_map(lambda x: None if x is None else x[n : n + 1], state)


def leaves(*trees):
    """All tensors of results and states."""
    return [x for x in torch.utils._pytree.tree_leaves(list(trees)) if x is not None]


def close(found, truth, bound=1e-10):
    """All tensors of two trees."""
    found, truth = leaves(found), leaves(truth)
    assert len(found) == len(truth)
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
