"""Tests of the Triton kernels that need a GPU. Without one the interpreter runs the same code at small sizes.

`make test-gpu` runs these and all other tests of the kernels on the GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poison import poisoned_empties

pytest.importorskip("triton")
from fwp import canary, rules, trust
from fwp.backends import triton
from fwp.core import State
from fwp.functional import fast_weights
from fwp.testing import cast, evaluate, rounded_products, row_error, sample
from fwp_benchmarks import equivalence, speed

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LOW = torch.bfloat16 if GPU else torch.float16  # the interpreter's bfloat16 is wrong
RULES = tuple(rules.RULES) if GPU else ("additive", "kda")
FORMS = ("chunk", "recurrent")
T = 131 if GPU else 11
pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(autouse=True)
def no_canary(monkeypatch):
    """No canary: these tests check what it checks, and more."""
    monkeypatch.setattr(trust, "reason_to_distrust", lambda core, form: None)
    monkeypatch.setattr(trust, "may_cut", lambda core: True)


def drawn(rule, dtype, **options):
    return sample(rule, dtype=dtype, device=DEVICE, **options)


def agree(rule, inputs, form, **options):
    """Output, state and gradients against the torch backend in float64, within what its rounded products allow."""
    dtype = inputs["v"].dtype
    how = {"backend": "torch", "form": "chunk", **options}
    truth = evaluate(rule, cast(inputs, torch.float64), **how)
    with rounded_products(dtype):
        rough = evaluate(rule, cast(inputs, torch.float32), **how)
    with poisoned_empties():
        found = evaluate(rule, inputs, backend="triton", form=form, **options)
    least = 3e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    errors = {name: (row_error(found[name], x), 4 * row_error(rough[name], x) + least) for name, x in truth.items()}
    assert all(error <= allowed for error, allowed in errors.values()), errors


# ---- results ----


@pytest.mark.parametrize("rule", RULES)
def test_every_case_form_and_dtype(rule, monkeypatch):
    """The comparisons of `fwp check`."""
    if not GPU:
        monkeypatch.setattr(equivalence, "CASES", equivalence.CASES[:1])
    rows = equivalence.kernel_rows(rule)
    assert {row["form"] for row in rows} == {*FORMS} and {row["device"] for row in rows} == {DEVICE}
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


SHIPPED = [
    *(
        (size, LOW)
        for size in ([(16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (768, 128)] if GPU else [(5, 3)])
    ),
    *((size, torch.float32) for size in ([(64, 64), (128, 128), (768, 128)] if GPU else [(3, 5)])),
    *(((128, 128), torch.float16) for _ in range(GPU)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "dtype"), SHIPPED, ids=str)
def test_every_configuration_alone(size, dtype, rule, form):
    """Every row of the table of block sizes, with a partial last chunk and outputs that are NaN until written."""
    inputs = drawn(rule, dtype, B=1, T=T, K=size[0], V=size[1], state=True)
    channels = "g" in inputs and inputs["g"].dim() == 4
    if size[0] > triton.widest(dtype.itemsize, channels, 2, triton._shared_memory(inputs["v"].device)):
        pytest.skip("this GPU has too little shared memory")
    agree(rule, inputs, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", (16, 32, 64) if GPU else (3,))
@pytest.mark.parametrize("phi", ["elu+1", "dpfp-3"])
def test_feature_maps_with_denominator(phi, D, form):
    how = {"feature_map": phi, "denominator": True}
    agree("additive", drawn("additive", LOW, B=1, T=T, K=D, V=D, state=True, **how), form, **how)


@pytest.mark.parametrize("norm", ["l2", "sum"])
@pytest.mark.parametrize("rule", ("delta", "kda") if GPU else ("kda",))
def test_feature_norms(rule, norm):
    D = 128 if GPU else 3
    inputs = drawn(rule, LOW, B=1, T=T, K=D, V=D, state=True)
    inputs["q"], inputs["k"] = (inputs[name].abs() for name in "qk")  # no sum near 0
    agree(rule, inputs, "chunk", feature_norm=norm)


@pytest.mark.parametrize("B", (1, 64) if GPU else (1,))
@pytest.mark.parametrize("rule", RULES)
def test_many_tokens(rule, B):
    """One sequence does not fill a GPU, 64 do."""
    size = {"T": 32768 // B, "H": 2, "K": 64, "V": 64} if GPU else {"T": 40, "H": 1, "K": 3, "V": 3}
    agree(rule, drawn(rule, LOW, B=B, **size), "chunk")


# ---- determinism ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_sixty_runs_have_the_same_bits(rule, form):
    size = {"B": 4, "T": 300, "H": 8, "K": 64, "V": 64} if GPU else {"B": 1, "T": 9, "H": 1}
    inputs = drawn(rule, LOW, **size, state=True)
    first = evaluate(rule, inputs, backend="triton", form=form)
    for _ in range(60 if GPU else 2):
        again = evaluate(rule, inputs, backend="triton", form=form)
        assert all(torch.equal(again[name], x) for name, x in first.items())


# ---- graphs ----


def captured(call):
    """A function that replays the call from a CUDA graph."""
    return speed.graphed(call) if GPU else call


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rule", RULES)
def test_a_graph_takes_new_inputs(rule, backward):
    size = {"B": 2, "T": T, "H": 2, "K": 64, "V": 64} if GPU else {"B": 1, "T": T, "H": 1, "K": 3, "V": 3}
    x, results = drawn(rule, LOW, **size), {}

    def run(x):
        leaves = {name: y.detach().requires_grad_(backward) for name, y in x.items()}
        out, state = fast_weights(rule, **leaves, backend="triton", form="chunk")
        grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)) if backward else ()
        return out.detach(), state.S.detach(), *grads

    replay = captured(lambda: results.update(enumerate(run(x))))
    for seed in (1, 2):
        other = drawn(rule, LOW, **size, seed=seed)
        for name, y in other.items():
            x[name].copy_(y)
        replay()
        for i, y in enumerate(run(other)):
            assert torch.equal(results[i], y), i


@pytest.mark.parametrize("rule", RULES)
def test_a_graph_of_a_decode_step(rule):
    """The state stays in one buffer."""
    D = 64 if GPU else 3
    size = {"B": 2, "H": 2, "K": D, "V": D}
    whole = drawn(rule, LOW, T=5, **size, state=True)
    start = whole.pop("state").S
    x = {name: y[:, :1].clone() for name, y in whole.items()}
    S, results = start.clone(), {}

    def step():
        results["out"], end = fast_weights(rule, **x, state=State(S), backend="triton")
        S.copy_(end.S)

    replay = captured(step)
    S.copy_(start)
    state = State(start)
    for t in range(5):
        now = {name: y[:, t : t + 1] for name, y in whole.items()}
        for name, y in now.items():
            x[name].copy_(y)
        replay()
        out, state = fast_weights(rule, **now, state=state, backend="triton")
        assert torch.equal(results["out"], out) and torch.equal(S, state.S), t
    _, end = fast_weights(rule, **cast(whole, torch.float64), state=State(start.double()), backend="torch")
    assert row_error(S, end.S) <= 3e-4


# ---- memory ----


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"] if GPU else ["memcheck"])
def test_compute_sanitizer(tool):
    """No access out of bounds and no race in shared memory, for the simplest and the most complex cell."""
    command = [sys.executable, __file__]
    if GPU:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(sanitizer).exists():
            pytest.skip("compute-sanitizer is not installed")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "ran" in run.stdout.splitlines(), run.stdout


@pytest.mark.skipif(not GPU, reason="needs a GPU's context")
def test_an_illegal_access_in_the_check_leaves_the_callers_context_alive(monkeypatch):
    bad = "torch.empty(1, device='cuda').index_select(0, torch.full((1,), 2**40, device='cuda')).item()"
    plant = f"import torch; from fwp import canary; canary.check = lambda case: {bad}; canary.serve()"
    monkeypatch.setattr(canary, "_worker", canary._Worker())
    monkeypatch.setattr(canary, "WORKER", plant)
    assert canary.fault_of_kernels(None).startswith("the process of the check died")
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    canary._worker.stop()


def small_run():
    trust.reason_to_distrust, trust.may_cut = lambda core, form: None, lambda core: True
    for rule in ("additive", "kda"):
        for form in FORMS:
            x = drawn(rule, LOW, B=1, T=T if GPU else 5, H=1, K=64 if GPU else 2, V=64 if GPU else 2, state=True)
            found = evaluate(rule, x, backend="triton", form=form)
            assert all(y.isfinite().all() for y in found.values())
    print("ran")


if __name__ == "__main__":
    small_run()
