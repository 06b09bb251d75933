"""Exponential features whose normalised form is in range, however large or small they are themselves."""

import math

import pytest
import torch
from laws import CHUNKS, REFERENCE, TOKENS

import fwp
from fwp import feature_maps
from fwp.core import ScaledState, State
from fwp.functional import fast_weights
from fwp.testing import cast, deviation, evaluate, row_error, sample

pytest.importorskip("triton")
TRITON = {"backend": "triton"}
FORMS = pytest.mark.parametrize(
    "form",
    [REFERENCE, TOKENS, CHUNKS, TRITON | {"form": "chunk"}, TRITON | {"form": "recurrent"}],
    ids=lambda form: "-".join(form.values()),
)
MAPS = pytest.mark.parametrize(("phi", "size"), [("favor+", 2.5), ("favor+", 6.0), ("exp", 40.0)])
T, D, ATTENTION = 12, 16, {"denominator": True, "eps": 0.0}


def drawn(size, seed=0):
    """q, k [1, T, 2, D] and v [1, T, 2, 3] in float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = size * torch.randn(2, 1, T, 2, D, generator=generator, dtype=torch.float64)
    return {"q": q, "k": k, "v": torch.randn(1, T, 2, 3, generator=generator, dtype=torch.float64)}


def logs(phi, x):
    return feature_maps.log_features(feature_maps.logarithm(phi), x)


def by_softmax(phi, q, k, v):
    """o_t = Σ_s softmax_s(log φ(q_t)ᵀφ(k_s)) v_s over s ≤ t, from logarithms alone."""
    scores = torch.logsumexp(logs(phi, q)[:, :, None] + logs(phi, k)[:, None], -1)  # [B, T, T, H]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)[None, :, :, None]
    return torch.einsum("btsh,bshv->bthv", scores.masked_fill(later, -math.inf).softmax(2), v)


@FORMS
@MAPS
def test_attention_is_a_softmax(phi, size, form):
    """Outputs and gradients, in float64, float32 and bfloat16, whole, and in two parts that carry the state."""

    def truth(_, q, k, v):
        return by_softmax(phi, q, k, v), State(q.new_zeros(0))

    def in_parts(rule, **x):
        first, state = fast_weights(rule, **{name: y[:, :5] for name, y in x.items()}, **options)
        second, _ = fast_weights(rule, **{name: y[:, 5:] for name, y in x.items()}, state=state, **options)
        return torch.cat([first, second], 1), State(second.new_zeros(0))

    options, x = {"feature_map": phi, **ATTENTION, **form}, drawn(size)
    expected = evaluate("additive", x, call=truth)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        found = evaluate("additive", cast(x, dtype), call=in_parts)
        for name in ("out", "dq", "dk", "dv"):
            assert (found[name] - expected[name]).abs().amax() <= bound * expected[name].abs().amax(), (dtype, name)
    x = cast(x, torch.bfloat16)
    rounded = by_softmax(phi, **cast(x, torch.float64))
    assert row_error(fast_weights("additive", **x, **options)[0], rounded) <= 0.1


@MAPS
def test_a_final_state_is_read_as_it_was(phi, size):
    x = cast(drawn(size), torch.float32)
    options = {"feature_map": phi, "eps": 0.0}
    out, state = fast_weights("additive", **x, **options, denominator=True)
    assert isinstance(state, ScaledState)
    everything = fwp.read(state, x["q"], **options)
    assert row_error(everything[:, -1], out[:, -1]) <= 1e-4
    for form in (TOKENS, CHUNKS, TRITON):
        seen, end = fast_weights("additive", **x, **options, denominator=True, causal=False, **form)
        assert row_error(seen, everything) <= 1e-4 and row_error(end.S, state.S) <= 1e-4


@FORMS
@MAPS
def test_masks_and_packing_see_no_other_unit(phi, size, form):
    x, options = cast(drawn(size), torch.float32), {"feature_map": phi, **ATTENTION, **form}
    bounds = torch.tensor([0, 0, 5, T, T])
    packed, state = fast_weights("additive", **x, cu_seqlens=bounds, **options)
    parts = [fast_weights("additive", **{n: y[:, a:b] for n, y in x.items()}, **options) for a, b in ((0, 5), (5, T))]
    assert row_error(packed, torch.cat([out for out, _ in parts], 1)) <= 1e-4
    assert torch.equal(state.log_scale[1:3], torch.cat([end.log_scale for _, end in parts]))
    _, same = fast_weights(
        "additive", **{n: y[:, :0] for n, y in x.items()}, cu_seqlens=bounds * 0, state=state, **options
    )
    assert all(map(torch.equal, same, state))
    mask = torch.arange(T) % 3 != 1
    masked, _ = fast_weights("additive", **x, mask=mask[None], **options)
    alone, _ = fast_weights("additive", **{n: y[:, mask] for n, y in x.items()}, **options)
    assert row_error(masked[:, mask], alone) <= 1e-4


@FORMS
@pytest.mark.parametrize(("read", "writes"), [("after", 1), ("before", 2)])
@pytest.mark.parametrize("rule", ["decay", "gla", "delta", "gated_delta", "kda"])
def test_every_rule_counts_in_units(rule, form, read, writes):
    """float64 has the range for these features without units."""
    x = sample(rule, 1, T, 2, D, 3, feature_map="favor+", denominator=True, writes=writes)
    x["q"], x["k"] = (y * 1.5 for y in (x["q"], x["k"]))
    options = {"feature_map": "favor+", "read": read, **ATTENTION}

    def plain(rule, q, k, **rest):
        q, k = (feature_maps.favor_plus(y) for y in (q, k))
        return fast_weights(rule, q, k, **rest, **(options | {"feature_map": None}), **REFERENCE)

    truth = evaluate(rule, x, call=lambda *a, **b: (plain(*a, **b)[0], State(x["q"].new_zeros(0))))
    found = evaluate(
        rule, x, call=lambda *a, **b: (fast_weights(*a, **b, **options, **form)[0], State(x["q"].new_zeros(0)))
    )
    assert all(deviation(found[name], y) <= 1e-9 for name, y in truth.items())


@pytest.mark.parametrize("size", [0.1, 1.0, 2.0, 10.0])
def test_rows_of_attention_sum_to_one(size):
    """With the default eps, in the layer for FAVOR+."""
    layer = fwp.nn.FastWeightAttention(32, 2, "additive", feature_map="favor+", denominator=True)
    with fwp.inspect.recording() as calls:
        layer(size * torch.randn(2, T, 32))
    assert (fwp.inspect.attention(**calls[0]).sum(-1) - 1).abs().amax() <= 1e-4


@FORMS
def test_normalised_features_are_a_softmax(form):
    directions = feature_maps.directions(D, generator=torch.Generator().manual_seed(0))
    for phi in ("favor+", "exp"):
        x = drawn(2.5 if phi == "favor+" else 200.0)
        q, k = ((y @ directions.T, y)[phi == "exp"] for y in (x["q"], x["k"]))
        q, k = ((torch.cat([y, -y], -1) if phi == "favor+" else y).softmax(-1) for y in (q, k))
        truth, _ = fast_weights("delta", q, k, x["v"], beta=torch.ones(1, T, 2, dtype=torch.float64), **REFERENCE)
        single = cast(x | {"beta": torch.ones(1, T, 2)}, torch.float32)
        found, _ = fast_weights("delta", **single, feature_map=phi, feature_norm="sum", **form)
        assert row_error(found, truth) <= 1e-3


def test_norms_of_numbers_whose_squares_are_out_of_range():
    x = torch.tensor([[3e30, -4e30], [3e-3, 4e-3], [0.0, 0.0]], requires_grad=True)
    y = feature_maps.norm(x, "l2")
    assert torch.allclose(y, torch.tensor([[0.6, -0.8], [3 / 5.0990, 4 / 5.0990], [0.0, 0.0]]), atol=1e-4)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    overflowing = feature_maps.transform(torch.tensor([200.0, 199.0]), "exp", "l2")
    assert torch.allclose(overflowing, torch.nn.functional.normalize(torch.tensor([1.0, math.exp(-1)]), dim=0))
    assert feature_maps.elu_plus_one(torch.tensor(-30.0)).item() == pytest.approx(math.exp(-30))


def test_a_state_in_units_where_there_are_none():
    x = drawn(1.0)
    _, state = fast_weights("additive", **x, feature_map="exp", denominator=True)
    with pytest.raises(TypeError, match=r"^state: expected fwp\.State, got ScaledState of an exponential feature map"):
        fast_weights("additive", **x, denominator=True, state=state)
    with pytest.raises(ValueError, match=r"^state\.log_scale: expected"):
        wrong = state._replace(log_scale=state.log_scale[0])
        fast_weights("additive", **x, feature_map="exp", denominator=True, state=wrong)
    assert isinstance(state.select([0]), ScaledState) and state.nbytes > 0
