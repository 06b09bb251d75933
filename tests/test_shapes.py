"""Every rule and form under masks, packing, shared heads, odd shapes and layouts, and all dtypes."""

import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import (
    CHUNKS,
    REFERENCE,
    RULES,
    TOKENS,
    agree,
    case,
    cat_states,
    chunk_size,
    each_fast_form,
    each_form,
    each_lowered,
    each_way,
    each_way_in_one_form,
    forms,
    keeps_k_and_v,
    over_time,
    sequence,
    tokens,
    ways,
)

from fwp import validate
from fwp.core import state_dtype, within
from fwp.functional import fast_weights, read
from fwp.rules import Rule
from fwp.testing import budgets, cast, deviation, evaluate, result_error, row_error, sample

# ---- masks and packed sequences ----

T = 21
MASKS = {
    "left": [t >= 6 for t in range(T)],
    "right": [t < 12 for t in range(T)],
    "interior": [t % 5 not in (0, 3) for t in range(T)],
    "all": [False] * T,
}


def unpadded(rule, mask, state, options, tensors):
    """The results of each row without its masked tokens, with zeros in their place."""
    outs, states = [], []
    for b, kept in enumerate(mask):
        at = kept.nonzero().squeeze(1)
        n = tensors["k"].shape[1] // len(kept)
        written = (at[:, None] * n + torch.arange(n)).flatten()
        row = {key: x[b : b + 1, at if key == "q" else written] for key, x in tensors.items()}
        out, end = fast_weights(rule, **row, state=sequence(state, b), **options)
        outs.append(out.new_zeros(1, len(kept), *out.shape[2:]).index_copy(1, at, out))
        states.append(end)
    return torch.cat(outs), cat_states(states)


def split_options(call, *names):
    """A call that `evaluate` takes, made of call(rule, state, options, tensors), where tensors have a T axis."""

    def called(rule, state=None, **options):
        tensors = {key: options.pop(key) for key in [*options] if key in ("q", "k", "v", *rule.gates)}
        return call(rule, state=state, options=options, tensors=tensors)

    return called


@each_way
def test_masked_is_unpadded(rule, form, way):
    """This holds with NaN and infinities in masked tokens, and with a φ for which φ(0) ≠ 0."""
    mask = torch.tensor([*MASKS.values()])
    maps = {"feature_map": "elu+1", "feature_norm": "l2"}
    inputs = sample(rule, B=4, T=T, K=6, V=5, Hq=4 if rule.plain else 2, state=True, seed=1, **way.inputs)
    alone = split_options(lambda rule, **rest: unpadded(rule, mask, **rest))
    garbage = [math.nan, math.inf, -math.inf, 1e30]
    soiled = over_time(lambda x: x.clone(), inputs)
    for i, (key, x) in enumerate(soiled.items()):
        if key != "state":
            x[~mask.repeat_interleave(x.shape[1] // T, 1)] = garbage[i % 4]
    with chunk_size(8):
        truth = evaluate(rule, inputs, call=alone, **maps, **way.options, **form)
        agree(evaluate(rule, inputs, mask=mask, **maps, **way.options, **form), truth)
        agree(evaluate(rule, soiled, mask=mask, **maps, **way.options, **form), truth)


def one_by_one(rule, bounds, state, options, tensors):
    outs, states = [], []
    for n, (a, b) in enumerate(itertools.pairwise(bounds.tolist())):
        part = tokens(tensors, a, b)
        out, end = fast_weights(rule, **part, state=sequence(state, n), **options)
        outs.append(out)
        states.append(end)
    return torch.cat(outs, 1), cat_states(states)


LENGTHS = [[0, 1, 15, 16, 17, 2], [16, 0, 33, 0], [0, 0], [0, 5], [64, 65, 0, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
@each_form
def test_packed_is_one_by_one(rule, form, lengths):
    inputs = sample(rule, B=1, T=sum(lengths), K=6, V=5, state=True, sequences=len(lengths), seed=2)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    alone = split_options(lambda rule, **rest: one_by_one(rule, bounds, **rest))
    agree(evaluate(rule, inputs, cu_seqlens=bounds, **form), evaluate(rule, inputs, call=alone, **form))


@each_way
def test_tokens_outside_all_packed_sequences(rule, form, way, monkeypatch):
    """Their outputs and gradients are 0, where borders are not checked, as on a GPU."""
    monkeypatch.setattr(validate, "check_bounds", lambda *args: None)
    inputs = sample(rule, B=1, T=20, K=6, V=5, state=True, sequences=2, **way.inputs)
    bounds = torch.tensor([3, 14, 17])

    def inner(rule, tensors, options, state):
        part = {name: x[:, 3 * x.shape[1] // 20 : 17 * x.shape[1] // 20] for name, x in tensors.items()}
        out, end = fast_weights(rule, **part, state=state, cu_seqlens=bounds - 3, **options)
        return F.pad(out, (0, 0, 0, 0, 3, 3)), end

    with chunk_size(8):
        found = evaluate(rule, inputs, cu_seqlens=bounds, **way.options, **form)
        agree(found, evaluate(rule, inputs, call=split_options(inner), **way.options, **form))
    assert within(torch.tensor([-1, 5, 3, 99]), 20).tolist() == [0, 5, 5, 20]


@each_way
def test_packed_with_other_options(rule, form, way):
    """Together with int32 borders, a mask, grouped heads, a feature map and another chunk size."""
    lengths = [7, 0, 16, 1, 9]
    heads = {"Hq": 4 if rule.plain else 2, "Hk": 1}
    inputs = sample(rule, B=1, T=33, K=6, V=5, **heads, state=True, sequences=5, **way.inputs)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.rand(1, 33, generator=torch.Generator().manual_seed(3)) < 0.7
    maps = {"feature_map": "elu+1", "feature_norm": "l2"}

    def masked(rule, tensors, options, **rest):
        return one_by_one(rule, bounds, tensors=tensors | {"mask": mask}, options=options, **rest)

    with chunk_size(8):
        found = evaluate(rule, inputs, cu_seqlens=bounds, mask=mask, **maps, **way.options, **form)
        agree(found, evaluate(rule, inputs, call=split_options(masked), **maps, **way.options, **form))


# ---- heads ----

HEADS = [(1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 4, 2), (1, 1, 3), (4, 2, 2), (8, 2, 4), (3, 1, 1)]


@pytest.mark.parametrize(
    ("rule", "form", "heads"),
    [
        pytest.param(rule, form, heads, id="-".join([rule.name, *form.values(), *map(str, heads)]))
        for rule in RULES
        for form in forms(rule)
        for heads in HEADS
        if rule.plain or heads[0] <= max(heads[1:])  # a rule with its own state has one output per state
    ],
)
def test_shared_heads_are_repeated_ones(rule, form, heads):
    Hq, Hk, Hv = heads
    H = max(Hk, Hv)
    inputs = sample(rule, T=11, K=6, V=5, Hq=Hq, Hk=Hk, Hv=Hv, state=True, seed=4)
    every = max(Hq, H)

    def repeated(rule, state, options, tensors):
        tensors = {key: x.repeat_interleave(every // x.shape[2], 2) for key, x in tensors.items()}
        state = torch.utils._pytree.tree_map(lambda x: None if x is None else x.repeat_interleave(every // H, 1), state)
        out, end = fast_weights(rule, **tensors, state=state, **options)
        return out, torch.utils._pytree.tree_map(lambda x: None if x is None else x[:, :: every // H], end)

    found = evaluate(rule, inputs, **form)
    assert found["out"].shape == (2, 11, every, 5)
    agree(found, evaluate(rule, inputs, call=split_options(repeated), **form))


# ---- sizes ----


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5), (0, 0)])
@each_way_in_one_form
def test_empty_inputs(rule, form, way, B, T):
    """Without tokens or sequences the output is empty, the state unchanged, and gradients are 0."""
    for maps in ({}, {"feature_map": "elu+1", "feature_norm": "sum"}):
        inputs = sample(rule, B=B, T=T, K=6, V=5, Hq=4 if rule.plain else 2, state=True, **way.inputs)
        found = evaluate(rule, inputs, **maps, **way.options, **form)
        assert found["out"].shape == (B, T, 4 if rule.plain else 2, 5)
        for key, x in found.items():
            if key.startswith("state"):
                assert found["d" + key].shape == x.shape
            elif key != "out":
                assert key.startswith("dstate") or x.abs().sum() == 0
        out, end = fast_weights(rule, **inputs, **maps, **way.options, **form)
        for x, y in zip(end, inputs["state"]):
            assert x is y is None or torch.equal(x, y)
        del inputs["state"]
        out, end = fast_weights(rule, **inputs, **maps, **way.options, **form)
        assert out.shape == found["out"].shape
        assert all(x is None or (len(x) == B and x.abs().sum() == 0) for x in end)


@pytest.mark.parametrize("T", range(1, 10))
@each_fast_form
def test_short_sequences(rule, form, T):
    inputs = sample(rule, T=T, K=6, V=5, state=True, seed=5)
    with chunk_size(4):
        agree(evaluate(rule, inputs, **form), evaluate(rule, inputs, **REFERENCE))


@pytest.mark.parametrize(("K", "V"), [(1, 1), (1, 3), (3, 1), (60, 100), (100, 60), (128, 3), (3, 128)])
@each_fast_form
def test_any_width(rule, form, K, V):
    inputs = sample(rule, B=1, T=19, K=K, V=V, state=True, seed=6)
    agree(evaluate(rule, inputs, **form), evaluate(rule, inputs, **REFERENCE))


# ---- layouts ----


def sliced(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "sliced": sliced,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_form
def test_layouts(rule, form, layout):
    """Inputs and incoming gradients may have any strides."""
    move = LAYOUTS[layout]
    inputs = sample(rule, B=2, T=19, K=6, V=5, state=True, seed=7)
    moved = torch.utils._pytree.tree_map(lambda x: x if x is None else move(x), inputs)
    assert not moved["q"].is_contiguous()

    def strided(rule, **options):  # nothing makes the gradient of `move` contiguous
        out, end = fast_weights(rule, **options)
        return move(out), torch.utils._pytree.tree_map(lambda x: None if x is None else move(x), end)

    with chunk_size(8):
        agree(evaluate(rule, moved, call=strided, **form), evaluate(rule, inputs, **form), 1e-13)


@each_form
def test_expanded_inputs_and_gradients(rule, form):
    inputs = sample(rule, B=1, T=19, K=6, V=5, seed=8)

    def loss(inputs):
        leaves = over_time(lambda x: x.detach().requires_grad_(), inputs)
        wide = {key: x.expand(3, *x.shape[1:]) for key, x in leaves.items()}
        out = fast_weights(rule, **wide, **form)[0]
        return out, torch.autograd.grad(out.sum(), [*leaves.values()])  # the incoming gradient is one expanded number

    out, grads = loss(inputs)
    alone = fast_weights(rule, **over_time(lambda x: x.requires_grad_(), inputs), **form)[0]
    assert deviation(out, alone.expand_as(out)) < 1e-13
    for grad, x in zip(grads, torch.autograd.grad(alone, [*inputs.values()], torch.ones_like(alone))):
        assert deviation(grad, 3 * x) < 1e-12


# ---- dtypes and precision ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@each_way_in_one_form
def test_dtypes(rule, form, way, dtype):
    """out has v's dtype, the state float32 or float64, and every gradient its input's dtype."""
    inputs = sample(rule, T=5, state=True, dtype=dtype, **way.inputs)
    for maps in ({}, {"feature_map": "elu+1"}):
        for key, x in evaluate(rule, inputs, **maps, **way.options, **form).items():
            low = key in ("out", "dq", "dk", "dv")
            assert x.dtype == (dtype if low else state_dtype(dtype)), key
    low = {key: inputs[key].to(dtype) for key in rule.gates}  # gates in the low dtype get gradients in it
    found = evaluate(rule, inputs | low, **way.options, **form)
    assert all(found[f"d{key}"].dtype == dtype for key in low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rule", "form", "way"),
    [case(rule, form, way) for rule in RULES if keeps_k_and_v(rule) for form in forms(rule) for way in ways(rule)],
)
def test_gates_and_state_are_not_rounded(rule, form, way, dtype):
    """16-bit q, k and v give float32 results, rounded only at the end. Gates and state are never rounded.

    Rules whose lowering makes keys or values round those once; `test_low_precision` bounds that error.
    """
    inputs = sample(rule, T=19, K=6, V=5, state=True, seed=14, dtype=dtype, **way.inputs)
    found = evaluate(rule, inputs, **way.options, **form)
    for key, x in evaluate(rule, cast(inputs, torch.float32), **way.options, **form).items():
        if key == "dk" and (
            way.denominator or (rule.lower and rule.lower_uses_k)
        ):  # the sum of two gradients, each rounded
            assert row_error(found[key], x) < 4 * torch.finfo(dtype).eps
        else:
            assert torch.equal(found[key], x.to(found[key].dtype)), key


@pytest.mark.parametrize(("rule", "way"), [case(rule, way) for rule in RULES for way in ways(rule)])
def test_float32(rule, way):
    inputs = sample(rule, T=70, K=16, V=12, state=True, seed=9, dtype=torch.float32, **way.inputs)
    truth = evaluate(rule, cast(inputs, torch.float64), **way.options, **REFERENCE)
    for form in forms(rule):
        for key, x in evaluate(rule, inputs, **way.options, **form).items():
            assert row_error(x, truth[key]) < 3e-4, (form, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_lowered
def test_low_precision(rule, dtype):
    for way in ways(rule)[::2]:
        inputs = sample(rule, B=1, T=70, K=16, V=12, state=True, seed=10, dtype=dtype, **way.inputs)
        truth = evaluate(rule, cast(inputs, torch.float64), **way.options, **REFERENCE)
        allowed = budgets(rule, inputs, truth=truth, **way.options)
        for form in forms(rule)[1:]:
            for key, x in evaluate(rule, inputs, **way.options, **form).items():
                assert result_error(key, x, truth[key]) <= allowed[key], (form, key)


@each_form
def test_autocast(rule, form):
    """With float32 inputs, q, k and v are rounded to bfloat16, gates and state are not, and gradients are float32."""
    inputs = sample(rule, T=19, K=6, V=5, state=True, dtype=torch.float32, seed=11)

    def under_autocast(rule, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return fast_weights(rule, **options)

    found = evaluate(rule, inputs, call=under_autocast, **form)
    truth = evaluate(rule, cast(inputs, torch.bfloat16), **form)
    assert found["out"].dtype == torch.bfloat16
    for key, x in truth.items():
        assert torch.equal(found[key], x.to(found[key])), key
        if key != "out":
            assert found[key].dtype == torch.float32


@each_way_in_one_form
def test_meta_tensors(rule, form, way):
    """Meta tensors give shapes and dtypes of results, of `read` and of gradients, under CPU autocast too."""
    heads = 4 if rule.plain else 2
    inputs = sample(rule, Hq=heads, T=5, K=6, V=5, state=True, dtype=torch.bfloat16, **way.inputs)

    def shapes(device):
        there = torch.utils._pytree.tree_map(lambda x: x if x is None else x.to(device), inputs)
        mask = torch.ones(2, 5, dtype=torch.bool, device=device)
        found = evaluate(rule, there, mask=mask, feature_map="elu+1", **way.options, **form)
        if rule.plain:
            found["read"] = read(there["state"], there["q"])
        return {key: (x.shape, x.dtype) for key, x in found.items()}

    expected = shapes("cpu")
    assert shapes("meta") == expected
    with torch.autocast("cpu", torch.float16):
        assert shapes("meta") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_read_under_autocast(dtype):
    """As in the op, q is cast to autocast's dtype, but neither the state nor float64 is."""
    inputs = sample("additive", state=True, dtype=dtype)
    state, q = inputs["state"], inputs["q"]
    with torch.autocast("cpu", torch.bfloat16):
        out = read(state, q)
    assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    assert torch.equal(out, read(state, q.to(out.dtype)))


def test_float64_is_left_alone_by_autocast():
    inputs = sample("kda", T=9)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = fast_weights("kda", **inputs)
    assert torch.equal(out, fast_weights("kda", **inputs)[0])


def test_the_state_is_kept_in_float32():
    """A sum of ones in bfloat16 stops at 256."""
    ones = torch.ones(1, 600, 1, 1, dtype=torch.bfloat16)
    for form in (REFERENCE, TOKENS, CHUNKS):
        _, state = fast_weights("additive", ones, ones, ones, denominator=True, **form)
        assert state.S.item() == state.z.item() == 600


# ---- random problems ----


@st.composite
def problems(draw):
    rule = draw(st.sampled_from(RULES))
    H, r = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    way = draw(st.sampled_from(ways(rule)))
    inputs = sample(
        rule,
        B=draw(st.integers(0, 3)),
        T=draw(st.integers(0, 40)),
        H=H,
        Hq=H * r if rule.plain else H,
        Hk=draw(st.sampled_from([1, H])),
        K=draw(st.integers(1, 9)),
        V=draw(st.integers(1, 9)),
        state=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        **way.inputs,
    )
    layout = draw(st.sampled_from([lambda x: x, *LAYOUTS.values()]))
    inputs = torch.utils._pytree.tree_map(lambda x: x if x is None else layout(x), inputs)
    return rule, way, inputs, draw(st.sampled_from(forms(rule))), draw(st.integers(2, 20)), draw(st.floats(0, 1))


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(problems())
def test_random_problems(problem):
    """For any shape, dtype, layout and chunk size: the form equals the reference, and a split sequence the whole."""
    rule, way, inputs, form, size, where = problem
    cut = round(where * inputs["q"].shape[1])
    bound = 1e-10 if inputs["v"].dtype == torch.float64 else 1e-3
    with chunk_size(size), torch.no_grad():
        whole, end = fast_weights(rule, **inputs, **way.options, **form)
        truth, expected = fast_weights(rule, **inputs, **way.options, **REFERENCE)
        start = inputs.pop("state", None)
        first, middle = fast_weights(rule, **tokens(inputs, None, cut), state=start, **way.options, **form)
        last, final = fast_weights(rule, **tokens(inputs, cut), state=middle, **way.options, **form)
    assert deviation(whole, truth) <= bound
    assert deviation(torch.cat([first, last], 1), truth) <= bound
    for state in (end, final):
        assert all(x is y is None or deviation(x, y) <= bound for x, y in zip(state, expected))


@pytest.mark.parametrize("form", [REFERENCE, TOKENS, CHUNKS], ids=lambda form: "-".join(form.values()))
def test_two_threads(form):
    """Nothing is kept between calls that another thread could change."""
    inputs = [sample("kda", T=70, seed=seed) for seed in (12, 13)]
    alone = [evaluate("kda", x, **form) for x in inputs]
    found = [[], []]

    def work(i):
        found[i] = [evaluate("kda", inputs[i], **form) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, truth in zip(found, alone):
        assert len(results) == 5
        assert all(torch.equal(x[key], truth[key]) for x in results for key in truth)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_learned_feature_map_under_autocast(enabled):
    phi = torch.nn.Linear(8, 6)
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        out, state = fast_weights("additive", q, k, v, feature_map=phi)
    assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert state.S.dtype == torch.float32
    (grad,) = torch.autograd.grad(out.float().sum(), phi.weight)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()


def test_an_equation_leaves_autocast():
    """Matrix products in a rule's own step are as exact as without autocast."""

    def step(S, k, v):
        return S + k.unsqueeze(-1) @ v.unsqueeze(-2)

    rule = Rule("products", step=step)
    inputs = sample(rule, dtype=torch.bfloat16)
    _, apart = fast_weights(rule, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under = fast_weights(rule, **inputs)
    assert torch.equal(apart.S, under.S)


def test_packed_sequences_lie_on_the_device_of_the_inputs():
    q, k, v = torch.randn(3, 1, 8, 2, 4).unbind()
    bounds = torch.tensor([0, 3, 8])
    expected, _ = fast_weights("additive", q, k, v, cu_seqlens=bounds, backend="torch", form="chunk")
    with torch.device("meta"):  # the default device, which isn't that of the inputs
        found, _ = fast_weights("additive", q, k, v, cu_seqlens=bounds, backend="torch", form="chunk")
    assert torch.equal(found, expected)
