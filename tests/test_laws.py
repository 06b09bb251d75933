"""Laws that every rule obeys in every form: equations, limits, symmetries. In float64 to 1e-10 unless stated."""

import inspect
import itertools
import math
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import (
    REFERENCE,
    RULES,
    agree,
    case,
    chunk_size,
    divisors_near_zero,
    each_fast_form,
    each_form,
    each_lowered,
    each_lowered_way,
    each_rule,
    each_way,
    each_way_in_one_form,
    forms,
    from_the_simplest,
    leaves,
    normalises,
    over_time,
    resets,
    tokens,
    ways,
)
from poison import poisoned_empties

import fwp
from fwp import feature_maps, verbs
from fwp.backends import chunked
from fwp.core import ScaledState, State, ratio
from fwp.functional import fast_weights
from fwp.rules.spec import OPTIONS
from fwp.testing import deviation, evaluate, sample
from fwp_benchmarks import oracle

TABLE = fwp.RULES.values()


def to_oracle(rule, inputs, **options):
    """The oracle on the same arguments: (out, State)."""
    start = inputs.get("state", State(None))
    arrays = {key: x.detach().numpy() for key, x in inputs.items() if key != "state"}
    S, z = (None if x is None else x.detach().numpy() for x in start)
    out, S, z = oracle.fast_weights(rule.name, **arrays, S=S, z=z, **options)
    return torch.from_numpy(out), State(torch.from_numpy(S), None if z is None else torch.from_numpy(z))


# ---- against the oracle ----

STATED_TWICE = [rule for rule in TABLE if rule.name in oracle.RULES]


@pytest.mark.parametrize(
    ("rule", "form", "way"),
    [case(rule, form, way) for rule in STATED_TWICE for form in forms(rule) for way in ways(rule)],
)
def test_equals_the_oracle(rule, form, way):
    inputs = sample(rule, B=2, T=37, K=5, V=3, Hq=4, Hk=1, Hv=2, state=True, seed=1, **way.inputs)
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.8
    with chunk_size(16):
        out, end = fast_weights(rule, **inputs, mask=mask, scale=0.5, eps=0.1, **way.options, **form)
    expected, state = to_oracle(rule, inputs, mask=mask.numpy(), scale=0.5, eps=0.1, **way.options)
    assert deviation(out, expected) < 1e-10
    assert deviation(end.S, state.S) < 1e-10
    assert (end.z is None) == (state.z is None)
    assert end.z is None or deviation(end.z, state.z) < 1e-10


@pytest.mark.parametrize(("rule", "way"), [case(rule, way) for rule in STATED_TWICE for way in ways(rule)])
def test_gradients_equal_the_oracle(rule, way):
    """Along a random direction, against fourth-order differences of the oracle, whose own error is about 1e-10."""
    inputs = sample(rule, B=1, T=7, H=2, K=4, V=3, state=True, seed=3, **way.inputs)
    generator = torch.Generator().manual_seed(4)
    flat = {key: x for key, x in inputs.items() if key != "state"} | dict(zip("Sz", inputs["state"]))
    flat = {key: x for key, x in flat.items() if x is not None}
    along = {key: torch.randn(x.shape, generator=generator, dtype=x.dtype) for key, x in flat.items()}

    def loss(run, step):
        moved = {key: x + step * along[key] for key, x in flat.items()}
        moved["state"] = State(moved.pop("S"), moved.pop("z", None))
        out, end = run(rule, moved, **way.options)
        return sum((x.sin() * x).sum() for x in (out, *end) if x is not None)

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(lambda rule, x, **options: fast_weights(rule, **x, **options), step), step)
    h = 2e-4
    near, far = (loss(to_oracle, i * h) - loss(to_oracle, -i * h) for i in (1, 2))
    assert deviation(slope, (8 * near - far) / (12 * h)) < 1e-8


MAPS = {
    "relu": "relu",
    "elu+1": "elu+1",
    "exp": "exp",
    "softmax": "softmax",
    "dpfp": "dpfp",
    "dpfp-1": lambda x: oracle.dpfp(x, 1),
    "dpfp-3": lambda x: oracle.dpfp(x, 3),
    "dpfp-4": lambda x: oracle.dpfp(x, 4),
    "favor+": oracle.favor_plus(fwp.FavorPlus.draw(3, generator=torch.Generator().manual_seed(0)).R.numpy()),
    "taylor": "taylor",
}


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize(
    ("feature_map", "norm"),
    # the features of "taylor" are not positive, so their sum can be anything
    [(phi, norm) for phi in MAPS for norm in (None, "sum", "l2") if (phi, norm) != ("taylor", "sum")],
)
@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_feature_maps_equal_the_oracle(rule, feature_map, norm, denominator):
    rule = fwp.RULES[rule]
    x = sample(rule, T=18, K=3, V=2, feature_map=feature_map, state=True, denominator=denominator, seed=5)
    x["q"], x["k"] = (
        torch.randn(2, 18, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (6, 7)
    )
    if rule.erases and norm is None:
        x["beta"] = x["beta"] / 50  # long keys
    options = {"feature_norm": norm, "denominator": denominator, "scale": 0.7}
    options["eps"] = 1e-6 if feature_maps.logarithm(feature_map) is None else 0.0  # in units it is another number
    truth, state = to_oracle(rule, x, feature_map=MAPS[feature_map], **options)
    for form in forms(rule):
        out, end = fast_weights(rule, **x, feature_map=feature_map, **options, **form)
        S = end.log_scale.exp().unsqueeze(-1) * end.S if isinstance(end, ScaledState) else end.S
        assert deviation(out, truth) < 1e-10
        assert deviation(S, state.S) < 1e-10


def test_feature_map_objects():
    x = sample("additive", T=9, K=3, V=2)
    R = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for given, phi in (
        (fwp.DPFP(nu=2), lambda x: oracle.dpfp(x, 2)),
        (fwp.FavorPlus(R), oracle.favor_plus(R.numpy())),
        (fwp.Taylor(), "taylor"),
        (torch.square, np.square),
    ):
        assert (
            deviation(
                fast_weights("additive", **x, feature_map=given)[0],
                to_oracle(fwp.RULES["additive"], x, feature_map=phi)[0],
            )
            < 1e-12
        )


def test_a_learned_feature_map_learns():
    torch.manual_seed(0)
    phi = torch.nn.Linear(8, 4, dtype=torch.float64)
    out, state = fast_weights("additive", **sample("additive"), feature_map=phi)
    assert state.S.shape == (2, 2, 4, 8)
    out.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in phi.parameters())


# ---- chunks, tokens, reference ----


@pytest.mark.parametrize("T", [1, 63, 64, 65, 4 * 64 + 11])
@each_lowered
def test_forms_agree(rule, T):
    inputs = sample(rule, T=T, K=6, V=5, state=True, seed=T)
    truth = evaluate(rule, inputs, **REFERENCE)
    for form in forms(rule)[1:]:
        agree(evaluate(rule, inputs, **form), truth)


@each_lowered_way
def test_chunk_size_does_not_matter(rule, way):
    inputs = sample(rule, T=37, K=6, V=5, Hq=4, Hk=2, Hv=2, state=True, seed=8, **way.inputs)
    truth = evaluate(rule, inputs, **way.options, **REFERENCE)
    for form in forms(rule)[1:]:
        for size in (8, 16, 32, 37) if form["form"] == "chunk" else (64,):
            with chunk_size(size):
                agree(evaluate(rule, inputs, **way.options, **form), truth)


@each_way
def test_split_and_carry(rule, form, way):
    inputs = sample(rule, T=12, K=6, V=5, state=True, seed=9, **way.inputs)

    def in_two(rule, state, cut, **options):
        outs = []
        for part in (slice(None, cut), slice(cut, None)):
            now = tokens(options, part.start, part.stop)
            out, state = fast_weights(rule, **now, state=state)
            outs.append(out)
        return torch.cat(outs, 1), state

    with chunk_size(8):
        truth = evaluate(rule, inputs, **way.options, **form)
        for cut in (0, 1, 7, 8, 9):
            agree(evaluate(rule, inputs, call=in_two, cut=cut, **way.options, **form), truth)


@each_form
def test_prefill_and_decode(rule, form):
    """A prefill, 100 single steps, then two tokens at once. form="auto" is recurrent for one token, chunk for more."""
    inputs = sample(rule, T=133, K=6, V=5, state=True, seed=10)
    whole, end = fast_weights(rule, **inputs, **form)
    outs, state = [], inputs.pop("state")
    bounds = [0, 30, *range(31, 131), 133]
    with torch.no_grad():
        for a, b in itertools.pairwise(bounds):
            out, state = fast_weights(rule, **tokens(inputs, a, b), state=state, backend=form["backend"])
            outs.append(out)
    assert deviation(torch.cat(outs, 1), whole) < 1e-10
    for x, y in zip(state, end):
        assert x is y is None or deviation(x, y) < 1e-10


@each_way
def test_causality(rule, form, way):
    """Changed tokens after a cut inside a chunk change no bit before it, and every output after it."""
    cut, T = 11, 22
    inputs = sample(rule, T=T, K=6, V=5, state=True, seed=11, **way.inputs)
    other = sample(rule, T=T, K=6, V=5, seed=12, **way.inputs)
    past, future = tokens(inputs, None, cut), tokens(other, cut)
    mixed = {key: x if key == "state" else torch.cat([past[key], future[key]], 1) for key, x in inputs.items()}
    with chunk_size(8):
        leaves = over_time(lambda x: x.requires_grad_(), inputs)
        out = fast_weights(rule, **leaves, **way.options, **form)[0]
        changed = fast_weights(rule, **mixed, **way.options, **form)[0]
        grads = torch.autograd.grad(out[:, :cut].sum(), [x for key, x in leaves.items() if key != "state"])
    assert torch.equal(out[:, :cut], changed[:, :cut])
    assert (out[:, cut:] != changed[:, cut:]).all()
    grads = dict(zip([key for key in inputs if key != "state"], grads))
    assert all(grad.abs().max() == 0 for grad in tokens(grads, cut).values())


# ---- symmetries ----


@each_way
def test_batch_and_heads_are_interchangeable(rule, form, way):
    inputs = sample(rule, B=3, T=19, H=4, K=6, V=5, state=True, seed=13, **way.inputs)
    rows, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])

    def permuted(rule, state, **options):
        options = {key: x[rows][:, :, heads] if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        state = torch.utils._pytree.tree_map(lambda x: None if x is None else x[rows][:, heads], state)
        out, end = fast_weights(rule, state=state, **options)
        back = torch.utils._pytree.tree_map(lambda x: None if x is None else x[rows.argsort()][:, heads.argsort()], end)
        return out[rows.argsort()][:, :, heads.argsort()], back

    with chunk_size(8):
        agree(
            evaluate(rule, inputs, call=permuted, **way.options, **form),
            evaluate(rule, inputs, **way.options, **form),
            1e-12,
        )


@pytest.mark.parametrize(
    ("rule", "form", "way"),
    [case(rule, form, way) for rule in RULES if rule.linear_in_v for form in forms(rule) for way in ways(rule)],
)
def test_linearity_in_values_and_state(rule, form, way):
    one, two = (sample(rule, T=19, K=6, V=5, state=True, seed=seed, **way.inputs) for seed in (14, 15))
    a, b = one["state"], two["state"]
    one["state"], two = a, one | {"v": two["v"], "state": State(b.S, a.z)}
    both = one | {"v": one["v"] - 2 * two["v"], "state": State(a.S - 2 * b.S, a.z)}
    with chunk_size(8):
        (x, x_end), (y, y_end), (sum_, end) = (
            fast_weights(rule, **given, **way.options, **form) for given in (one, two, both)
        )
    assert deviation(sum_, x - 2 * y) < 1e-12
    assert deviation(end.S, x_end.S - 2 * y_end.S) < 1e-12
    assert not torch.equal(x, y)


# ---- special cases ----

each_plain_form = pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES if rule.plain for form in forms(rule)]
)


@each_plain_form
def test_neutral_gates_keep_the_state(rule, form):
    """A token with k = v = 0 and neutral gates changes nothing."""
    inputs = sample(rule, T=19, K=6, V=5, state=True)
    neutral = {key: torch.full_like(inputs[key], gate.neutral) for key, gate in rule.gates.items()}
    nothing = {key: torch.zeros_like(inputs[key]) for key in "kv"}
    _, end = fast_weights(rule, **inputs | neutral | nothing, **form)
    assert torch.equal(end.S, inputs["state"].S)


@pytest.mark.parametrize(
    ("rule", "form"),
    [case(rule, form) for rule in RULES if "beta" in rule.gates and rule.plain for form in forms(rule)],
)
def test_a_learning_rate_of_zero_writes_and_erases_nothing(rule, form):
    inputs = sample(rule, T=19, K=6, V=5, state=True)
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    if "g" in inputs:
        inputs["g"] = torch.zeros_like(inputs["g"])
    out, end = fast_weights(rule, **inputs, **form)
    assert torch.equal(end.S, inputs["state"].S)
    assert deviation(out, fwp.read(inputs["state"], inputs["q"])) < 1e-12


@each_form
def test_a_gate_left_out_is_its_default(rule, form):
    """`lower` gets the default as `step` does."""
    defaults = {"g": -0.25, "beta": 0.75, "b": 0.75, "w": 0.5}
    rule = replace(rule, gates={key: replace(gate, default=defaults.get(key)) for key, gate in rule.gates.items()})
    inputs = sample(rule, T=19, K=6, V=5, state=True)
    optional = [key for key, gate in rule.gates.items() if gate.default is not None]
    given = inputs | {key: torch.full_like(inputs[key], rule.gates[key].default) for key in optional}
    left_out = {key: x for key, x in inputs.items() if key not in optional}
    truth = evaluate(rule, given, **form)
    truth = {key: x for key, x in truth.items() if key.removeprefix("d") not in optional}
    agree(evaluate(rule, left_out, **form), truth, 1e-12)
    agree(evaluate(rule, left_out | dict.fromkeys(optional), **form), truth, 1e-12)


def twice_orthonormal():
    """Values, and 8 orthonormal keys of 8 features, each used twice."""
    generator = torch.Generator().manual_seed(16)
    keys = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    return keys.repeat(2, 1)[None, :, None], torch.randn(1, 16, 1, 5, generator=generator, dtype=torch.float64)


def recalls(rule):
    """Whether finite gates make the rule recall exactly. Longhorn would need infinite ones."""
    return rule.plain and all(x.isfinite().all() for x in from_the_simplest(rule, *twice_orthonormal())[0].values())


@pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES if recalls(rule) for form in forms(rule)]
)
def test_orthonormal_keys_recall_exactly(rule, form):
    """Each key is written twice. Rules that erase return the last value, all others the sum of both."""
    k, v = twice_orthonormal()
    K = k.shape[-1]
    gates, simplest = from_the_simplest(rule, k, v)
    gates["g"] = torch.zeros_like(gates["g"]) if "g" in gates else None
    with chunk_size(5):
        _, state = fast_weights(rule, k, k, v, **{key: x for key, x in gates.items() if key in rule.gates}, **form)
    expected = v[:, K:] if simplest.erases else v[:, K:] + v[:, :K]
    assert deviation(fwp.read(state, k[:, :K]), expected) < 1e-13


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in STATED_TWICE if normalises(rule) for form in forms(rule)]
)
def test_zero_over_zero_is_zero(rule, form, read, eps):
    """Where zᵀq = 0 the output is 0 and gradients are finite: before the first key, or with a query of zeros."""
    inputs = sample(rule, T=19, K=6, V=5, state=True, denominator=True, seed=24)
    inputs["state"] = State(inputs["state"].S, torch.zeros_like(inputs["state"].z))
    inputs["q"][:, 5], inputs["k"][:, 7] = 0, 0
    options = {"denominator": True, "read": read, "eps": eps}
    with chunk_size(8):
        out, end = fast_weights(rule, **inputs, **options, **form)
        grads = evaluate(rule, inputs, **options, **form)
    expected, state = to_oracle(rule, inputs, **options)
    assert deviation(out, expected) < 1e-10
    assert deviation(end.S, state.S) < 1e-10
    assert (out[:, 5] == 0).all()
    assert read == "after" or (out[:, 0] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rule", "form"), [case(rule, form) for rule in RULES if resets(rule) for form in forms(rule)])
def test_minus_infinity_resets_exactly(rule, form, dtype):
    """Everything before the reset is gone, even 1e30: the results are those of a sequence that starts there."""
    at = 13
    inputs = sample(rule, T=22, K=6, V=5, state=True, dtype=dtype)
    inputs["state"] = State(torch.full_like(inputs["state"].S, 1e30))
    inputs["g"][:, at] = -math.inf
    leaves = over_time(lambda x: x.requires_grad_(), inputs)
    with chunk_size(8):
        out, end = fast_weights(rule, **leaves, **form)
        fresh = {key: x[:, at:] for key, x in inputs.items() if key != "state"}
        expected, state = fast_weights(rule, **fresh, **form)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert deviation(out[:, at:], expected) < bound
    assert deviation(end.S, state.S) < bound
    assert out[:, :at].abs().min() > 1e20
    grads = torch.autograd.grad(out[:, at:].sum() + end.S.sum(), [x for key, x in leaves.items() if key != "state"])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("strength", [0.0, -0.5, -20.0, -200.0, -1e4, -math.inf, "mixed"])
@pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES if "g" in rule.gates for form in forms(rule)[1:]]
)
def test_strong_decays(rule, form, strength):
    inputs = sample(rule, T=150, K=6, V=5, state=True, seed=17)
    if strength == "mixed":
        values = torch.tensor([0.0, -0.5, -20.0, -200.0, -1e4, -math.inf], dtype=torch.float64)
        inputs["g"] = values[torch.randint(6, inputs["g"].shape, generator=torch.Generator().manual_seed(18))]
    else:
        inputs["g"] = torch.full_like(inputs["g"], strength)
    truth = evaluate(rule, inputs, **REFERENCE)
    agree(evaluate(rule, inputs, **form), truth)
    single = fwp.testing.cast(inputs, torch.float32)
    agree(evaluate(rule, single, **form), truth, 1e-3)


@pytest.mark.parametrize("size", [1.0, 1e-20])
@pytest.mark.parametrize("decay", [-50.0, -100.0, -1e4, -math.inf])
@pytest.mark.parametrize(
    ("rule", "form"), [case(rule, form) for rule in RULES if rule.erases and normalises(rule) for form in forms(rule)]
)
def test_divisors_near_zero(rule, form, decay, size):
    """What is retrieved under attention normalisation is a mean. No float32 under- or overflows on the way to it."""
    inputs, options = divisors_near_zero(rule, decay, size), {"denominator": True, "eps": 0.0}
    truth = evaluate(rule, inputs, **REFERENCE, **options)
    assert all(x.isfinite().all() for x in truth.values())
    found = evaluate(rule, fwp.testing.cast(inputs, torch.float32), **form, **options)
    for name, x in truth.items():
        assert (found[name] - x).abs().amax() <= 1e-5 * x.abs().amax(), name


def test_the_gradient_of_a_ratio_overflows_only_where_it_is_large():
    b = torch.tensor([1e-30, 0.0], requires_grad=True)
    a = torch.tensor([1e-30, 0.0], requires_grad=True)
    d_a, d_b = torch.autograd.grad(ratio(a, b).sum(), (a, b))
    assert torch.allclose(d_a, torch.tensor([1e30, 0.0])) and torch.allclose(d_b, torch.tensor([-1e30, 0.0]))
    x = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ratio, (x[0], x[1] + 1)) and torch.autograd.gradgradcheck(ratio, (x[0], x[1] + 1))


@pytest.mark.parametrize("beta", [1.0, 1.9])
@each_fast_form
def test_keys_that_are_almost_the_same(rule, form, beta):
    """Nearly parallel, equal and opposite unit keys, for which the triangular system is farthest from the identity."""
    inputs = sample(rule, T=70, H=3, K=6, V=5, seed=19)
    k = inputs["k"]
    k[:, :, 0] = k[:, :1, 0] + 1e-6 * k[:, :, 0]
    k[:, :, 1] = k[:, :1, 1]
    k[:, :, 2] = k[:, :1, 2] * torch.tensor([1.0, -1.0]).repeat(35)[:, None]
    inputs["k"] = torch.nn.functional.normalize(k, dim=-1)
    for key, gate in rule.gates.items():
        if gate.low >= 0:
            inputs[key] = torch.full_like(inputs[key], min(beta, gate.high))
        elif gate.high > 0:  # a second key
            inputs[key] = inputs["k"]
    truth = evaluate(rule, inputs, **REFERENCE)
    agree(evaluate(rule, inputs, **form), truth)
    agree(evaluate(rule, fwp.testing.cast(inputs, torch.float32), **form), truth, 1e-3)


# ---- the lattice of rules ----


@pytest.mark.parametrize(
    ("rule", "simpler", "form"),
    [
        pytest.param(rule, simpler, form, id=f"{rule.name}-{simpler}-{'-'.join(form.values())}")
        for rule in RULES
        for simpler in rule.extends
        for form in forms(rule)
    ],
)
def test_extends(rule, simpler, form):
    simple = fwp.RULES[simpler]
    shared = [way for way in ways(simple) if way in ways(rule)]
    for way in shared:
        inputs = sample(simple, T=37, K=6, V=5, state=True, seed=20, **way.inputs)

        def as_this(name, q, k, v, state, **options):
            gates = {key: options.pop(key) for key in simple.gates}
            return fast_weights(rule, q, k, v, state=state, **rule.extends[simpler](k, v, **gates), **options)

        agree(
            evaluate(rule, inputs, call=as_this, **way.options, **form),
            evaluate(simple, inputs, **way.options, **REFERENCE),
        )


def test_the_lattice_is_connected():
    """From every rule with a lowered form, a chain of simpler rules ends at one of two that extend nothing."""
    for rule in TABLE:
        assert all(simpler in fwp.RULES for simpler in rule.extends)
    assert {rule.name for rule in TABLE if rule.lower and not rule.extends} == {"additive", "delta"}


# ---- not causal, read ----


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("form", forms(fwp.RULES["additive"]), ids=lambda form: "-".join(form.values()))
def test_not_causal(form, denominator):
    inputs = sample("additive", T=37, Hq=4, Hk=1, Hv=2, K=6, V=5, state=True, denominator=denominator)
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(21)) < 0.8
    rule, options = fwp.RULES["additive"], {"causal": False, "denominator": denominator}
    with chunk_size(8):
        out, end = fast_weights(rule, **inputs, mask=mask, **options, **form)
        agree(
            evaluate(rule, inputs, mask=mask, **options, **form),
            evaluate(rule, inputs, mask=mask, **options, **REFERENCE),
        )
    expected, state = to_oracle(rule, inputs, mask=mask.numpy(), **options)
    assert deviation(out, expected) < 1e-10
    assert deviation(end.S, state.S) < 1e-10
    assert deviation(out, fwp.read(end, inputs["q"]).masked_fill(~mask[:, :, None, None], 0)) < 1e-12


@pytest.mark.parametrize("form", forms(fwp.RULES["additive"]), ids=lambda form: "-".join(form.values()))
def test_not_causal_packed(form):
    lengths = [0, 9, 1, 0, 17]
    inputs = sample("additive", B=1, T=27, K=6, V=5, state=True, sequences=5)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with chunk_size(8):
        found = evaluate("additive", inputs, cu_seqlens=bounds, causal=False, **form)
    expected, state = to_oracle(fwp.RULES["additive"], inputs, cu_seqlens=bounds.tolist(), causal=False)
    assert deviation(found["out"], expected) < 1e-10
    assert deviation(found["state.S"], state.S) < 1e-10
    agree(found, evaluate("additive", inputs, cu_seqlens=bounds, causal=False, **REFERENCE))


@each_rule
def test_rules_that_decay_or_erase_are_causal(rule):
    for form in forms(rule):
        if rule.name == "additive":
            continue
        with pytest.raises(ValueError, match="causal: False needs a rule that neither decays nor erases"):
            fast_weights(rule, **sample(rule), causal=False, **form)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_read(heads, denominator):
    """Single, shared and grouped query heads, against the oracle when it is not causal and nothing is written."""
    x = sample("additive", T=9, K=3, V=5, Hq=heads, state=True, feature_map="elu+1", denominator=denominator, seed=22)
    state, nothing = x["state"], torch.zeros(2, 9, 2, 5, dtype=torch.float64)
    out = fwp.read(state, x["q"], scale=0.5, feature_map="elu+1", feature_norm="l2", eps=0.1)
    options = {"scale": 0.5, "feature_map": "elu+1", "feature_norm": "l2", "eps": 0.1, "denominator": denominator}
    written = x | {"k": x["k"] * 0 - 1e9, "v": nothing}  # elu(−1e9) + 1 = 0
    truth, _ = to_oracle(fwp.RULES["additive"], written, causal=False, **options)
    assert out.shape == (2, 9, max(heads, 2), 5)
    assert deviation(out, truth) < 1e-12


def test_read_packed():
    state = sample("additive", B=3, K=6, V=5, state=True)["state"]
    q = torch.randn(1, 10, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = fwp.read(state, q, cu_seqlens=torch.tensor([0, 4, 4, 10]))
    for n, part in ((0, slice(0, 4)), (2, slice(4, 10))):
        alone = fwp.read(State(state.S[n : n + 1]), q[:, part])
        assert deviation(out[:, part], alone) < 1e-14


# ---- calls ----


@each_way
def test_inputs_are_left_alone_and_calls_repeat(rule, form, way):
    """No argument is changed, a second call gives the same bits, and no uninitialised memory is read."""
    inputs = sample(rule, T=37, K=6, V=5, state=True, seed=23, dtype=torch.float32, **way.inputs)
    before = {key: [x.clone() for x in leaves(x)] for key, x in inputs.items()}
    versions = [x._version for value in inputs.values() for x in leaves(value)]
    with poisoned_empties():
        first = evaluate(rule, inputs, **way.options, **form)
    second = evaluate(rule, inputs, **way.options, **form)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(x.isfinite().all() for x in first.values())
    assert versions == [x._version for value in inputs.values() for x in leaves(value)]
    for key, value in inputs.items():
        assert all(torch.equal(x, y) for x, y in zip(leaves(value), before[key]))


@pytest.mark.parametrize("T", [0, 1, 9])
@each_way_in_one_form
def test_the_state_shares_no_memory(rule, form, way, T):
    """Its tensors are no arguments, share no buffer, and are not views of larger tensors."""
    inputs = sample(rule, T=T, K=6, V=5, state=True, **way.inputs)
    _, end = fast_weights(rule, **inputs, **way.options, **form)
    given = {x.untyped_storage().data_ptr() for x in leaves(inputs)}
    kept = [x.untyped_storage() for x in leaves(end)]
    assert len({x.data_ptr() for x in kept} - given) == len(kept)
    assert [x.nbytes() for x in kept] == [x.numel() * x.element_size() for x in leaves(end)]


@pytest.mark.parametrize("rule", TABLE, ids=lambda rule: rule.name)
def test_each_row_has_a_typed_verb(rule):
    verb = getattr(fwp, rule.name)
    assert verb is getattr(verbs, rule.name)
    parameters = inspect.signature(verb).parameters
    assert [*parameters] == ["q", "k", "v", *rule.gates, "options"]
    for key, gate in rule.gates.items():
        required = parameters[key].default is inspect.Parameter.empty
        assert required or gate.default is not None
    x = sample(rule, T=9)
    gates = [x[key] for key in rule.gates]
    for options in ({}, {"scale": 0.5, "read": "before", "backend": "reference"}):
        found, truth = verb(x["q"], x["k"], x["v"], *gates, **options), fast_weights(rule.name, **x, **options)
        assert torch.equal(found[0], truth[0])
        assert torch.equal(found[1].S, truth[1].S)


@pytest.mark.parametrize(
    ("options", "T", "runs"),
    [
        ({"backend": "torch", "form": "recurrent"}, 9, "_tokens_of_one_read"),
        ({"backend": "torch", "form": "chunk"}, 9, "_chunk"),
        ({"backend": "torch", "form": "chunk"}, 1, "_chunk"),
        ({"form": "recurrent"}, 9, "_tokens_of_one_read"),
        ({"form": "chunk"}, 1, "_chunk"),
        ({}, 1, "_tokens_of_one_read"),
        ({}, 2, "_chunk"),
        ({"backend": "reference"}, 9, "step"),
        ({"backend": "reference", "form": "recurrent"}, 9, "step"),
    ],
)
def test_what_is_asked_for_is_what_runs(options, T, runs, monkeypatch):
    """Explicit backends and forms run as asked; "auto" is tested on a CPU."""
    ran = set()

    def noted(name, function):
        return lambda *args, **kwargs: ran.add(name) or function(*args, **kwargs)

    for name in ("_tokens_of_one_read", "_chunk"):
        monkeypatch.setattr(chunked, name, noted(name, getattr(chunked, name)))
    rule = replace(fwp.RULES["kda"], step=noted("step", fwp.RULES["kda"].step))
    fast_weights(rule, **sample(rule, T=T), **options)
    assert ran == {runs}


@each_lowered
def test_the_reference_needs_no_lowering(rule):
    """A broken lowering does not change the reference, by which everything else is measured."""

    def broken(core, **gates):
        raise AssertionError("lowered")

    inputs = sample(rule, T=5, state=True)
    found = evaluate(replace(rule, lower=broken), inputs, **REFERENCE)
    assert all(torch.equal(found[key], x) for key, x in evaluate(rule, inputs, **REFERENCE).items())


def test_verbs_and_gates_know_every_option():
    signature = inspect.signature(fast_weights).parameters
    options = {key for key, p in signature.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(typing.get_type_hints(verbs.Options)) == options
    assert set(OPTIONS) == options


def test_a_rule_of_the_table_is_its_name():
    x = sample("kda", T=9)
    assert torch.equal(fast_weights("kda", **x)[0], fast_weights(fwp.RULES["kda"], **x)[0])


@each_rule
def test_without_a_state_it_starts_at_zero(rule):
    inputs = sample(rule, T=9, K=6, V=5, state=True)
    zero = torch.utils._pytree.tree_map(lambda x: None if x is None else torch.zeros_like(x), inputs.pop("state"))
    for form in forms(rule):
        found, truth = fast_weights(rule, **inputs, **form), fast_weights(rule, **inputs, state=zero, **form)
        assert torch.equal(found[0], truth[0])
