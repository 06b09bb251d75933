"""Errors of arguments are one line: which argument, what was expected, what was found."""

import dataclasses
import math
import re

import pytest
import torch
from laws import RULES, case, forms
from outside.delta_rnn import DELTA_RNN
from outside.pkda import PKDA

import fwp
from fwp import State
from fwp.testing import sample

B, T, H, K, V = 2, 8, 4, 6, 5
FLOAT = "a floating dtype of 16 to 64 bits"


def arguments(like="gated_delta", **changed):
    """Valid arguments with some changed. The value ... leaves one out."""
    inputs = {"rule": like, **sample(like, B, T, H, K, V, state=True), **changed}
    return {key: value for key, value in inputs.items() if value is not ...}


def zeros(*size, dtype=torch.float64, device="cpu"):
    return torch.zeros(size, dtype=dtype, device=device)


NAMES = ", ".join(fwp.RULES)
WRONG = [
    # names
    ({"sate": None}, TypeError, "unexpected keyword 'sate'; did you mean 'state'?"),
    ({"bata": zeros(B, T, H)}, TypeError, "unexpected keyword 'bata'; did you mean 'beta'?"),
    ({"colour": 3}, TypeError, "unexpected keyword 'colour'"),
    ({"rule": "additive"}, TypeError, "unexpected keyword 'beta'"),
    (
        {"rule": "gated_dleta"},
        ValueError,
        f"rule: expected one of {NAMES}, got 'gated_dleta'; did you mean 'gated_delta'?",
    ),
    ({"rule": 3}, ValueError, f"rule: expected one of {NAMES}, got 3"),
    ({"rule": [3]}, ValueError, f"rule: expected one of {NAMES}, got [3]"),
    ({"read": "befor"}, ValueError, "read: expected one of after, before, got 'befor'; did you mean 'before'?"),
    (
        {"backend": "trition"},
        ValueError,
        "backend: expected one of auto, reference, torch, native, triton, got 'trition'; did you mean 'triton'?",
    ),
    (
        {"form": "chunks"},
        ValueError,
        "form: expected one of auto, recurrent, chunk, got 'chunks'; did you mean 'chunk'?",
    ),
    (
        {"feature_map": "rleu"},
        ValueError,
        "feature_map: expected one of relu, elu+1, exp, softmax, dpfp-1, dpfp-2, dpfp-3, favor+, taylor, 'dpfp-ν' or a "
        "callable, got 'rleu'; did you mean 'relu'?",
    ),
    ({"feature_map": fwp.DPFP}, TypeError, "feature_map: expected an instance, got the class DPFP"),
    ({"feature_map": lambda x: x.sum(-1)}, ValueError, "feature_map: expected (2, 8, 4, *), got (2, 8, 4)"),
    ({"feature_map": lambda x: x.flatten(2)}, ValueError, "feature_map: expected (2, 8, 4, *), got (2, 8, 24)"),
    (
        {"feature_map": lambda x: x > 0},
        TypeError,
        f"feature_map: expected {FLOAT}, got torch.bool",
    ),
    ({"feature_map": lambda x: None}, TypeError, "feature_map: expected a tensor, got NoneType"),
    (
        {"feature_map": lambda x: x[..., :0]},
        ValueError,
        "feature_map: expected at least one feature, got (2, 8, 4, 0)",
    ),
    (
        {"feature_map": torch.nn.Flatten(2).double()},
        ValueError,
        "feature_map: expected (2, 8, 4, *), got (2, 8, 24)",
    ),
    ({"feature_norm": "L2"}, ValueError, "feature_norm: expected None, 'sum' or 'l2', got 'L2'"),
    # numbers and switches
    ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": -math.inf}, ValueError, "scale: expected a finite number, got -inf"),
    ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
    ({"scale": torch.ones(())}, TypeError, "scale: expected a number, got Tensor"),
    ({"eps": -1e-6}, ValueError, "eps: expected a finite number ≥ 0, got -1e-06"),
    ({"eps": math.inf}, ValueError, "eps: expected a finite number ≥ 0, got inf"),
    ({"causal": 1}, TypeError, "causal: expected True or False, got 1"),
    ({"causal": "no"}, TypeError, "causal: expected True or False, got 'no'"),
    ({"denominator": "sum"}, TypeError, "denominator: expected True or False, got 'sum'"),
    ({"check": None}, TypeError, "check: expected True or False, got None"),
    # gates
    ({"beta": ...}, TypeError, "beta: 'gated_delta' needs it, of shape (2, 8, 4)"),
    ({"beta": None}, TypeError, "beta: 'gated_delta' needs it, of shape (2, 8, 4)"),
    ({"beta": 0.5}, TypeError, "beta: expected a tensor, got float"),
    (
        {"beta": zeros(B, T, H, dtype=torch.int64)},
        TypeError,
        f"beta: expected {FLOAT}, got torch.int64",
    ),
    ({"beta": zeros(B, T, 1)}, ValueError, "beta: expected (2, 8, 4), got (2, 8, 1)"),
    ({"g": zeros(B, T, H, K)}, ValueError, "g: expected (2, 8, 4), got (2, 8, 4, 6)"),
    ({"rule": "kda", "g": zeros(B, T, H)}, ValueError, "g: expected (2, 8, 4, 6), got (2, 8, 4)"),
    (
        {"rule": "kda", "feature_map": "dpfp-2", "state": None},
        ValueError,
        "g: expected (2, 8, 4, 24), got (2, 8, 4, 6)",
    ),
    ({"beta": zeros(B, T, H, device="meta")}, ValueError, "beta: expected on cpu, got on meta"),
    # q, k, v
    ({"q": [[1.0]]}, TypeError, "q: expected a tensor, got list"),
    (
        {"q": zeros(B, T, H, K, dtype=torch.int32)},
        TypeError,
        f"q: expected {FLOAT}, got torch.int32",
    ),
    (
        {"q": zeros(B, T, H, K, dtype=torch.complex64)},
        TypeError,
        f"q: expected {FLOAT}, got torch.complex64",
    ),
    (
        {"q": zeros(B, T, H, K).to(torch.float8_e4m3fn)},
        TypeError,
        f"q: expected {FLOAT}, got torch.float8_e4m3fn",
    ),
    (
        {"beta": zeros(B, T, H).to(torch.float8_e5m2)},
        TypeError,
        f"beta: expected {FLOAT}, got torch.float8_e5m2",
    ),
    ({"q": zeros(T, H, K)}, ValueError, "q: expected (*, *, *, *), got (8, 4, 6)"),
    ({"k": zeros(B, T, H, 7)}, ValueError, "k: expected (2, 8, *, 6), got (2, 8, 4, 7)"),
    ({"k": zeros(B, 9, H, K)}, ValueError, "k: expected a multiple of the 8 tokens of q, got 9"),
    ({"k": zeros(B, 7, H, K)}, ValueError, "k: expected (2, 8, *, 6), got (2, 7, 4, 6)"),
    ({"k": zeros(B, 16, H, K)}, ValueError, "v: expected (2, 16, *, *), got (2, 8, 4, 5)"),
    ({"k": zeros(B, T, H, K, dtype=torch.float32)}, TypeError, "k: expected torch.float64, got torch.float32"),
    ({"v": zeros(B, T, H, V, device="meta")}, ValueError, "v: expected on cpu, got on meta"),
    ({"v": zeros(1, T, H, V)}, ValueError, "v: expected (2, 8, *, *), got (1, 8, 4, 5)"),
    ({"v": zeros(B, T, H, 0)}, ValueError, "v: expected at least one head and one feature, got (2, 8, 4, 0)"),
    ({"v": zeros(B, T, 0, V)}, ValueError, "v: expected at least one head and one feature, got (2, 8, 0, 5)"),
    (
        {"v": zeros(B, T, 3, V)},
        ValueError,
        "k, v: expected head counts of which one divides the other, got 4 and 3",
    ),
    ({"q": zeros(B, T, 3, K)}, ValueError, "q: expected a multiple or a divisor of 4 heads, got 3"),
    # mask and packing
    ({"mask": zeros(B, T)}, TypeError, "mask: expected torch.bool, got torch.float64"),
    ({"mask": zeros(B, 1, dtype=torch.bool)}, ValueError, "mask: expected (2, 8), got (2, 1)"),
    ({"mask": [True]}, TypeError, "mask: expected a tensor, got list"),
    ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "q: expected a batch of 1 with cu_seqlens, got 2"),
    ({"cu_seqlens": [0, T]}, TypeError, "cu_seqlens: expected an int32 or int64 tensor, got list"),
    ({"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens: expected an int32 or int64 tensor, got torch.float64"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens: expected (N + 1,) with N ≥ 1, got (1,)"),
    ({"cu_seqlens": torch.tensor([[0, 8]])}, ValueError, "cu_seqlens: expected (N + 1,) with N ≥ 1, got (1, 2)"),
    # state
    ({"state": zeros(B, H, K, V)}, TypeError, "state: expected fwp.State, got Tensor"),
    ({"state": State(zeros(B, 1, K, V))}, ValueError, "state: expected (2, 4, 6, 5), got (2, 1, 6, 5)"),
    ({"state": State(zeros(1, H, K, V))}, ValueError, "state: expected (2, 4, 6, 5), got (1, 4, 6, 5)"),
    (
        {"state": State(zeros(B, H, K, V, dtype=torch.float32))},
        TypeError,
        "state: expected torch.float64, got torch.float32",
    ),
    (
        {"state": State(zeros(B, H, K, V), zeros(B, H, K))},
        ValueError,
        "state.z: expected None without denominator=True, got a tensor",
    ),
    ({"denominator": True}, TypeError, "state.z: expected a tensor, got NoneType"),
    (
        {"denominator": True, "state": State(zeros(B, H, K, V), zeros(B, H, V))},
        ValueError,
        "state.z: expected (2, 4, 6), got (2, 4, 5)",
    ),
    # what doesn't go together
    (
        {"causal": False},
        ValueError,
        "causal: False needs a rule that neither decays nor erases, got 'gated_delta'",
    ),
    (
        {"causal": False, "read": "before"},
        ValueError,
        "read: 'before' needs causal=True, since without it every query reads the final state",
    ),
    (
        {"backend": "reference", "form": "chunk"},
        ValueError,
        "form: the reference runs token by token, expected 'recurrent' or 'auto', got 'chunk'",
    ),
    ({"rule": PKDA, "denominator": True}, ValueError, "denominator: 'pkda' has no attention normalisation"),
    ({"rule": DELTA_RNN, "denominator": True}, ValueError, "denominator: 'delta_rnn' has no attention normalisation"),
    (
        {"rule": DELTA_RNN, "backend": "torch"},
        ValueError,
        "backend: 'torch' serves rules that lower onto the recurrence, this one does not",
    ),
    (
        {"rule": DELTA_RNN, "q": zeros(B, T, 8, K)},
        ValueError,
        "q: expected at most 4 heads, since 'delta_rnn' has one output per state head, got 8",
    ),
    (
        {"rule": DELTA_RNN, "state": State(zeros(B, H, K, V))},
        TypeError,
        "state: expected what the 'init' of 'delta_rnn' makes, got State",
    ),
    (
        {"rule": DELTA_RNN, "state": (zeros(B, H, K, V), zeros(1, H, V, V), zeros(B, H, V))},
        ValueError,
        "state[1]: expected (2, 4, 5, 5), got (1, 4, 5, 5)",
    ),
    (
        {"rule": DELTA_RNN, "state": (zeros(B, H, K, V), zeros(B, H, V, V), zeros(B, H, V, dtype=torch.float32))},
        TypeError,
        "state[2]: expected torch.float64, got torch.float32",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=[message[:60] for _, _, message in WRONG])
def test_errors_say_argument_expected_and_found(changed, error, message):
    rule = changed.get("rule")
    known = rule if isinstance(rule, fwp.Rule) or rule == "kda" else "gated_delta"
    given = arguments(known, **changed)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fwp.fast_weights(**given)


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        ([0, 5, 3, 8], "[0, 5, 3, 8]"),
        ([1, 8], "[1, 8]"),
        ([0, 7], "[0, 7]"),
        ([0, 9], "[0, 9]"),
        ([-1, 8], "[-1, 8]"),
        ([0, *range(10), 7], "[0, 0, 1, 2, …, 7]"),
    ],
)
@pytest.mark.parametrize(("rule", "form"), [case(rule, form) for rule in RULES[-3:] for form in forms(rule)])
def test_borders_of_packed_sequences(rule, form, bounds, shown):
    message = f"cu_seqlens: must start at 0, not decrease, and end at T = 8; got {shown}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fwp.fast_weights(rule, **sample(rule, 1, T), cu_seqlens=torch.tensor(bounds), **form)


def test_borders_on_another_device():
    bounds = torch.tensor([0, T], device="meta")
    with pytest.raises(ValueError, match="^cu_seqlens: expected on cpu, got on meta$"):
        fwp.fast_weights("delta", **sample("delta", 1, T), cu_seqlens=bounds)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"state": None}, TypeError, "state: expected fwp.State, got NoneType"),
        ({"q": zeros(T, H, K)}, ValueError, "q: expected (*, *, *, *), got (8, 4, 6)"),
        ({"q": zeros(B, T, H, 7)}, ValueError, "state: expected (2, *, 7, *), got (2, 4, 6, 5)"),
        ({"q": zeros(1, T, H, K)}, ValueError, "state: expected (1, *, 6, *), got (2, 4, 6, 5)"),
        ({"q": zeros(B, T, 3, K)}, ValueError, "q: expected a multiple or a divisor of 4 heads, got 3"),
        ({"q": zeros(B, T, 0, K)}, ValueError, "q: expected at least one head and one feature, got (2, 8, 0, 6)"),
        (
            {"state": State(zeros(B, 0, K, V))},
            ValueError,
            "state: expected at least one head and one feature, got (2, 0, 6, 5)",
        ),
        ({"scale": math.inf}, ValueError, "scale: expected a finite number, got inf"),
        ({"eps": -1}, ValueError, "eps: expected a finite number ≥ 0, got -1"),
        (
            {"q": zeros(1, T, H, K), "cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
            ValueError,
            "cu_seqlens: expected on cpu, got on meta",
        ),
        (
            {"q": zeros(B, T, H, K, dtype=torch.float32)},
            TypeError,
            "state: expected torch.float32, got torch.float64",
        ),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "q: expected a batch of 1 with cu_seqlens, got 2"),
        (
            {"q": zeros(1, T, H, K), "cu_seqlens": torch.tensor([0, 9, 8])},
            ValueError,
            "cu_seqlens: must start at 0, not decrease, and end at T = 8; got [0, 9, 8]",
        ),
        ({"feature_map": "elu"}, ValueError, "feature_map: expected one of"),
    ],
)
def test_errors_of_read(changed, error, message):
    given = {"state": State(zeros(B, H, K, V)), "q": zeros(B, T, H, K)} | changed
    with pytest.raises(error, match=f"^{re.escape(message)}") as raised:
        fwp.read(**given)
    assert "\n" not in str(raised.value)


CHECKS = [
    ("beta", (1, 2, 3), 2.5, "beta[1, 2, 3]: expected a value in [0, 2], got 2.5"),
    ("beta", (0, 7, 0), -0.1, "beta[0, 7, 0]: expected a value in [0, 2], got -0.1"),
    ("g", (1, 0, 1), 0.1, "g[1, 0, 1]: expected a value in [-inf, 0], got 0.1"),
    ("g", (1, 0, 1), math.nan, "g[1, 0, 1]: expected a value in [-inf, 0], got nan"),
    ("beta", (1, 0, 1), math.inf, "beta[1, 0, 1]: expected a value in [0, 2], got inf"),
    ("v", (0, 3, 2, 4), math.nan, "v[0, 3, 2, 4]: expected a finite number, got nan"),
    ("q", (1, 3, 2, 5), -math.inf, "q[1, 3, 2, 5]: expected a finite number, got -inf"),
    ("k", (1, 3, 2, 5), math.inf, "k[1, 3, 2, 5]: expected a finite number, got inf"),
    ("k", (1, 4, 3), 2.0, "k[1, 4, 3]: expected keys of at most unit length for a rule that erases, got "),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), CHECKS)
def test_values_are_checked_when_asked(name, at, value, message):
    given = arguments()
    fwp.fast_weights(**given, check=True)
    given[name][at] = value
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fwp.fast_weights(**given, check=True)
    fwp.fast_weights(**given)


@pytest.mark.parametrize(
    ("rule", "at", "message"),
    [
        ("delta", "S", "state.S[1, 3, 5, 4]: expected a finite number, got inf"),
        ("delta", "z", "state.z[1, 3, 5]: expected a finite number, got inf"),
        (DELTA_RNN, 2, "state[2][1, 3, 4]: expected a finite number, got inf"),
    ],
)
def test_values_of_the_state_are_checked_when_asked(rule, at, message):
    given = sample(rule, B, T, H, K, V, state=True, denominator=at == "z")
    options = {"denominator": at == "z", "check": True}
    fwp.fast_weights(rule, **given, **options)
    part = given["state"][at] if isinstance(at, int) else getattr(given["state"], at)
    part.flatten()[-1:].fill_(math.inf)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fwp.fast_weights(rule, **given, **options)


def test_features_beyond_float16_are_found():
    given = sample("additive", B, T, H, K, V, dtype=torch.float16)
    given["k"][1, 2, 3, 4] = 12  # exp(12) = 162755
    out, _ = fwp.fast_weights("additive", **given, feature_map="exp")
    assert not out.isfinite().all()
    with pytest.raises(ValueError, match=re.escape("k[1, 2, 3, 4]: expected a finite number, got inf")):
        fwp.fast_weights("additive", **given, feature_map="exp", check=True)


def test_an_exact_reset_is_in_range():
    given = arguments()
    given["g"][1, 2, 3] = -math.inf
    fwp.fast_weights(**given, check=True)


def test_values_in_masked_tokens_are_not_checked():
    given = arguments(mask=torch.arange(T).expand(B, T) > 0)
    for name in ("q", "k", "v", "beta", "g"):
        given[name][:, 0] = math.nan
    fwp.fast_weights(**given, check=True)


def test_rules_that_do_not_erase_may_have_long_keys():
    fwp.fast_weights("additive", **{key: 10 * x for key, x in sample("additive").items()}, check=True)


def test_errors_of_feature_maps():
    with pytest.raises(ValueError, match=r"^nu: expected a positive integer, got 0$"):
        fwp.DPFP(0)
    with pytest.raises(ValueError, match=r"^R: expected \(m, 8\), got \(3, 6\)$"):
        fwp.fast_weights("additive", **sample("additive"), feature_map=fwp.FavorPlus(torch.ones(3, 6)))


def test_any_dpfp_is_known_by_name():
    _, state = fwp.fast_weights("additive", **sample("additive"), feature_map="dpfp-7")
    assert state.S.shape == (2, 2, 2 * 8 * 7, 8)
    for name in ("dpfp-0", "dpfp-", "dpfp-1.5", "dpfp1"):
        with pytest.raises(ValueError, match=r"^feature_map: expected one of"):
            fwp.fast_weights("additive", **sample("additive"), feature_map=name)


@pytest.mark.parametrize(
    ("name", "gate", "error", "message"),
    [
        ("beta", ("BTX",), ValueError, "shape: expected one of BTH, BTHK, BTHV, got 'BTX'"),
        ("beta", ("BHT",), ValueError, "shape: expected one of BTH, BTHK, BTHV, got 'BHT'"),
        *(
            (name, ("BTH",), ValueError, f"gates: expected a name that is no argument of fast_weights, got {name!r}")
            for name in ("scale", "state", "q", "rule", "not a name")
        ),
        ("beta", None, TypeError, "gates: expected a Gate for 'beta', got NoneType"),
    ],
)
def test_a_rule_refuses_gates_that_calls_could_not_give(name, gate, error, message):
    beta = fwp.RULES["delta"].gates["beta"]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        gates = {name: gate and dataclasses.replace(beta, shape=gate[0])}
        dataclasses.replace(fwp.RULES["delta"], gates=gates)


@pytest.mark.parametrize("own", ["init", "read"])
def test_a_rule_with_a_state_or_read_of_its_own_has_no_lowered_form(own):
    row = fwp.RULES["additive"]
    function = (lambda *args: row.init(*args) + 1) if own == "init" else (lambda S, q: (row.read(S, q)[0] * 2, S))
    with pytest.raises(ValueError, match=f"lower: expected None beside a custom {own}"):
        dataclasses.replace(row, **{own: function})
    if own == "read":
        with pytest.raises(ValueError, match="read: a custom one needs a custom init"):
            dataclasses.replace(row, lower=None, read=function)


@pytest.mark.parametrize(("rule", "name"), [("rwkv7", "kappa"), ("comba", "p")])
def test_the_length_of_a_second_key_is_checked(rule, name):
    """Components within [−1, 1] can make a long key."""
    given = sample(rule, B, T, H, K, V)
    fwp.fast_weights(rule, **given, check=True)
    given[name][1, 2, 3] = 1
    message = f"{name}[1, 2, 3]: expected keys of at most unit length for a rule that erases, got 2.44949"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fwp.fast_weights(rule, **given, check=True)
