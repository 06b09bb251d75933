"""The tools of the tests: errors by hand, budgets that can be exceeded, inputs as documented."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import CHUNKS, RULES, each_rule
from poison import poisoned_empties

import fwp
from fwp.testing import budgets, cast, deviation, evaluate, result_error, rounded_products, row_error, sample


def test_row_error_by_hand():
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]])  # lengths 5, 0, 50: mean 55/3
    x = ref + torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert row_error(x, ref) == pytest.approx(1 / (5 + 0.55 / 3))
    x = ref + torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 0.0]])
    assert row_error(x, ref) == pytest.approx(0.5 / (0.55 / 3))
    assert row_error(ref, ref) == 0


def test_deviation_by_hand():
    ref = torch.tensor([0.5, -4.0, 100.0])
    assert deviation(ref + torch.tensor([0.25, 0.0, 0.0]), ref) == pytest.approx(0.25)
    assert deviation(ref + torch.tensor([0.0, 1.0, 5.0]), ref) == pytest.approx(0.25)


@pytest.mark.parametrize("error", [row_error, deviation])
def test_errors_of_nan_and_other_shapes(error):
    ref = torch.ones(3, 2)
    for bad in (math.nan, math.inf):
        x = ref.clone()
        x[1, 1] = bad
        assert error(x, ref) == math.inf
    assert error(torch.ones(2, 2), ref) == math.inf
    assert error(torch.ones(0, 2), torch.ones(0, 2)) == 0
    assert error(torch.zeros(3, 2), torch.zeros(3, 2)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["additive", "kda"])
def test_budgets_allow_one_rounding_and_no_more(rule, dtype):
    """With operands three bits shorter, the output and some gradients exceed the budgets."""
    inputs = sample(rule, T=70, K=16, dtype=dtype)
    allowed, truth = budgets(rule, inputs), evaluate(rule, cast(inputs, torch.float64), backend="reference")
    assert list(allowed) == list(truth)
    assert max(allowed.values()) < 0.3

    def coarse(rule, **given):  # drops three bits of each mantissa
        given = {key: x + (x * 2**3).detach() - (x * 2**3).detach() for key, x in given.items()}
        return fwp.fast_weights(rule, **given)

    found = evaluate(rule, inputs, call=coarse)
    assert row_error(found["out"], truth["out"]) > allowed["out"]
    fine = evaluate(rule, inputs, **CHUNKS)
    assert all(result_error(key, fine[key], truth[key]) <= allowed[key] for key in truth)


def test_rounded_products_round_operands_forward_and_backward():
    x = torch.tensor([[1 + 2**-10]]).requires_grad_()  # 1 in bfloat16
    with rounded_products(torch.bfloat16):
        y = x @ x
        (grad,) = torch.autograd.grad(y, x)
    assert y.item() == 1
    assert grad.item() == 2
    assert (x @ x).item() > 1


def test_poisoned_empties():
    x = torch.ones(2)
    with poisoned_empties():
        made = [torch.empty(2), torch.empty_like(x), torch.empty_strided((2,), (1,)), x.new_empty(2)]
        assert all(y.isnan().all() for y in made)
        assert torch.empty(2, dtype=torch.int64).shape == (2,)
        assert not torch.zeros(2).isnan().any()
    assert torch.empty.__name__ == "empty"


@each_rule
def test_samples(rule):
    """One seed, the same numbers in every dtype: all different, gates in range, unit keys for rules that need them."""
    inputs = sample(rule, B=3, T=5, H=4, K=6, V=7, Hq=8, Hk=2, seed=1)
    assert [*inputs] == ["q", "k", "v", *rule.gates]
    assert inputs["q"].shape == (3, 5, 8, 6)
    assert inputs["k"].shape == (3, 5, 2, 6)
    assert inputs["v"].shape == (3, 5, 4, 7)
    for key, gate in rule.gates.items():
        shape = {"BTH": (3, 5, 4), "BTHK": (3, 5, 4, 6), "BTHV": (3, 5, 4, 7)}[gate.shape]
        assert inputs[key].shape == shape
        assert ((inputs[key] >= gate.low) & (inputs[key] <= gate.high)).all()
    assert all(len(x.unique()) == x.numel() for x in inputs.values())
    lengths = inputs["k"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths)) == rule.wants_unit_keys
    again, other = (sample(rule, B=3, T=5, H=4, K=6, V=7, Hq=8, Hk=2, seed=seed) for seed in (1, 2))
    low = sample(rule, B=3, T=5, H=4, K=6, V=7, Hq=8, Hk=2, seed=1, dtype=torch.bfloat16)
    for key, x in inputs.items():
        assert torch.equal(x, again[key])
        assert not torch.equal(x, other[key])
        assert torch.equal(low[key], x.to(torch.bfloat16 if key in ("q", "k", "v") else torch.float32))


def test_sampled_states():
    x = sample("kda", K=6, feature_map="dpfp-2", denominator=True, state=True, sequences=5)
    assert x["state"].S.shape == (5, 2, 24, 8)
    assert (x["state"].z > 1).all()
    assert (x["q"] > 0).all() and (x["k"] > 0).all()
    assert x["g"].shape == (2, 16, 2, 24)
    assert sample("kda", state=True)["state"].z is None
    W, R, y = sample(RULES[-1], state=True)["state"]
    assert (W.shape, R.shape, y.shape) == ((2, 2, 8, 8), (2, 2, 8, 8), (2, 2, 8))


def test_evaluate_names_every_result():
    found = evaluate("kda", sample("kda", state=True, denominator=True), denominator=True)
    inputs = ["q", "k", "v", "beta", "g", "state.S", "state.z"]
    assert [*found] == ["out", "state.S", "state.z", *(f"d{name}" for name in inputs)]
    assert [*evaluate("kda", sample("kda"), gradients=False)] == ["out", "state.S"]
    assert "dstate[2]" in evaluate(RULES[-1], sample(RULES[-1], state=True))


def test_the_op_is_imported_without_the_compiler():
    code = "import fwp, sys; fwp.fast_weights, fwp.delta; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_tests_for_a_gpu_say_that_there_is_none():
    command = ["make", "--silent", "test-gpu", f"PYTHON={sys.executable}"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.splitlines()[0] == "test-gpu: PyTorch finds no GPU here"
    assert run.stdout == ""


def test_a_per_head_gate_has_a_row_per_head():
    """The rows of its gradient [B, T, H] are sequences; those of keys and states stay rows of features."""
    ref = torch.ones(1, 4, 2)
    x = ref.clone()
    x[0, 3, 1] += 1
    assert result_error("dbeta", x, ref) == pytest.approx(1 / (2 + 0.02))  # one of four tokens of a head
    assert result_error("dstate.z", x, ref) == row_error(x, ref) == pytest.approx(1 / (2**0.5 * 1.01))
    assert result_error("dk", x[None], ref[None]) == row_error(x[None], ref[None])
