"""The C++ kernels against the recurrence of `fwp.core`, which `cells` runs token by token in float64."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from cells import ADDITIVE, CELLS, ERASERS, KDA, OWN_KEY, READS, agree, moved, problem
from laws import RULES, ways
from torch.func import grad, jacrev, jvp, vmap

import fwp
from fwp.backends import native as backend
from fwp.core import State, overwriting
from fwp.functional import fast_weights
from fwp.testing import deviation, evaluate, row_error, sample
from fwp_kernels import native

if native.compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

BOUND = 2e-5  # float32 against float64
CORNERS = pytest.mark.parametrize("cell", [ADDITIVE, (1, "k"), OWN_KEY], ids=["additive", "gated delta", "own key"])
FORMS = pytest.mark.parametrize("form", ["chunk", "recurrent"])


def kernels(form="chunk"):
    """The backend in float32 between float64 inputs and results."""

    def run(core):
        o, state = backend.run(moved(core, lambda x: x.float()), form)
        return o.double(), State(*(x if x is None else x.double() for x in state))

    return run


def matches(core, form="chunk", bound=BOUND, **how):
    return agree(core, bound, run=kernels(form), **how)


@FORMS
@READS
@CELLS
def test_every_cell(cell, read, form):
    matches(problem(cell, B=2, T=37, H=(2, 2, 2), read=read), form)


@FORMS
@pytest.mark.parametrize(("decay", "erase", "before"), ERASERS)
def test_every_erasure(decay, erase, before, form):
    grows = erase == "a alone"  # along other keys than k, fully: float32 recurrences are off by 8e-5
    matches(problem((decay, erase), B=2, T=35, erase_before_decay=before), form, 2e-4 if grows else BOUND)


@CORNERS
@pytest.mark.parametrize("T", [0, 1, 15, 16, 31, 32, 33, 127, 128, 129, 300])
def test_lengths(cell, T):
    matches(problem(cell, T=T))


@CORNERS
@pytest.mark.parametrize(("K", "V"), [(1, 1), (31, 33), (64, 5)])
def test_widths(cell, K, V):
    matches(problem(cell, T=40, K=K, V=V))


@FORMS
@CORNERS
@pytest.mark.parametrize("H", [(4, 2, 2), (8, 2, 4), (1, 4, 2), (6, 6, 6)])
def test_grouped_heads(cell, H, form):
    matches(problem(cell, B=2, T=20, H=H), form)


@FORMS
@READS
@pytest.mark.parametrize("writes", [2, 3])
@CORNERS
def test_several_writes_per_read(cell, writes, read, form):
    matches(problem(cell, B=2, T=20, writes=writes, read=read, erase_before_decay=cell == OWN_KEY), form)


@FORMS
@CORNERS
@pytest.mark.parametrize("bounds", [[0, 0, 20, 21, 150, 150], [3, 40, 140]])
def test_packed(cell, bounds, form):
    core = problem(cell, T=150, N=len(bounds) - 1, H=(2, 1, 2), writes=2, cu_seqlens=torch.tensor(bounds))
    if bounds[0] == 0 and bounds[-1] == 150:
        matches(core, form)
    else:  # tokens outside all sequences give and get nothing
        o, _ = backend.run(moved(core, lambda x: x.float()), form)
        assert (o[:, : bounds[0]] == 0).all() and (o[:, bounds[-1] :] == 0).all()


@FORMS
@READS
@CORNERS
def test_denominator(cell, read, form):
    matches(problem(cell, B=2, T=40, H=(4, 2, 2), read=read, denominator=True), form)


@pytest.mark.parametrize("cell", [ADDITIVE, (0, "k")])
def test_not_causal(cell):
    matches(problem(ADDITIVE, B=2, T=40, causal=False))


@CORNERS
def test_without_state_and_with_a_loss_on_one_output(cell):
    core = replace(problem(cell, T=140), S=None)
    matches(core, outputs=("o",))
    matches(core, outputs=("S",))


def test_writes_without_strength_and_erasing_alone():
    core = problem(KDA, T=40)
    matches(replace(core, w=None))
    matches(replace(core, e=None))


@pytest.mark.parametrize("value", [0.0, -0.5, -20.0, -200.0, -1e4, -torch.inf])
@pytest.mark.parametrize("cell", [(1, "k"), (1, ""), KDA, (2, "")])
def test_gates_of_any_size(cell, value):
    core = problem(cell, T=80, read="before" if value == -20.0 else "after")
    hit = torch.rand(core.g.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    for form in ("chunk", "recurrent"):
        found = matches(replace(core, g=core.g.masked_fill(hit, value)), form)
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("decay", [0, 1, 2])
def test_one_key_again_and_again(decay, strength):
    core = problem((decay, "k"), T=70)
    k = core.k[:, :1].expand_as(core.k).contiguous()
    if core.g is not None:
        core = replace(core, g=core.g * 1e-2)
    # reflections along one key: float32 loses a digit more
    matches(replace(core, k=k, e=torch.full_like(core.e, strength)), bound=3e-4 if strength == 2 else BOUND)


def test_strided_and_expanded_inputs():
    core = problem((1, "k"), B=2, T=40, H=(2, 2, 2), K=32, V=32)
    apart = moved(core, lambda x: torch.stack([x, x], -1)[..., 0])
    matches(apart)
    x = moved(core, lambda x: x.float().requires_grad_())
    o, _ = backend.run(x, "chunk")
    o.sum().backward()  # its gradient is one number, expanded
    y = moved(core, lambda x: x.float().requires_grad_())
    o, _ = backend.run(y, "chunk")
    (o * torch.ones_like(o)).sum().backward()
    assert torch.equal(x.q.grad, y.q.grad) and torch.equal(x.v.grad, y.v.grad)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.lower], ids=lambda rule: rule.name)
def test_every_rule_in_every_way(rule):
    for way in ways(rule):
        inputs = sample(rule, B=2, T=45, H=2, K=8, V=6, state=True, **way.inputs)
        truth = evaluate(rule, inputs, backend="reference", **way.options)
        narrow = {name: _narrow(x) for name, x in inputs.items()}
        for form in ("chunk", "recurrent"):
            found = evaluate(rule, narrow, backend="native", form=form, **way.options)
            errors = {name: row_error(found[name].double(), x) for name, x in truth.items()}
            assert max(errors.values()) <= 3e-4, errors


def _narrow(x):
    return State(*(y if y is None else y.float() for y in x)) if isinstance(x, State) else x.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32(dtype):
    inputs = sample("kda", B=2, T=45, H=2, K=8, V=6, dtype=dtype)
    wide = {name: x.float() for name, x in inputs.items()}
    out, state = fast_weights("kda", **inputs, backend="native")
    expected, end = fast_weights("kda", **wide, backend="native")
    assert out.dtype == dtype and torch.equal(out, expected.to(dtype)) and torch.equal(state.S, end.S)


def test_auto_takes_it_for_float32_on_a_cpu():
    inputs = sample("delta", T=5, K=4, V=4, dtype=torch.float32)
    out, _ = fast_weights("delta", **inputs)
    assert torch.equal(out, fast_weights("delta", **inputs, backend="native")[0])
    with pytest.raises(ValueError, match="'native' can't serve this: expected float32 or 16 bits, got torch.float64"):
        fast_weights("delta", **sample("delta", T=5, K=4, V=4), backend="native")


# ---- PyTorch ----


def inputs_of(cell, **options):
    return moved(problem(cell, T=20, **options), lambda x: x.float())


@CORNERS
@pytest.mark.parametrize("denominator", [False, True])
def test_opcheck(cell, denominator):
    core = moved(inputs_of(cell, denominator=denominator), lambda x: x.requires_grad_())
    given = backend.Inputs.from_core(core)
    torch.library.opcheck(backend.OPS._forward, (*given, "chunk", True))


@CORNERS
def test_compile_for_any_length(cell):
    torch._dynamo.reset()
    fast = torch.compile(kernels(), fullgraph=True, backend="aot_eager")
    for T in (40, 33, 150):
        agree(problem(cell, B=2, T=T), BOUND, run=fast)
    torch._dynamo.reset()


@CORNERS
def test_func_grad_vmap_and_a_jacobian(cell):
    core = inputs_of(cell)

    def f(q):
        return backend.run(replace(core, q=q), "chunk")[0].sin().sum()

    q = core.q.clone().requires_grad_()
    (truth,) = torch.autograd.grad(f(q), q)
    assert deviation(grad(f)(core.q), truth) <= 1e-6
    both = torch.stack([core.q, 2 * core.q])
    assert deviation(vmap(grad(f))(both)[0], truth) <= 1e-6
    assert (
        deviation(vmap(lambda q: backend.run(replace(core, q=q), "chunk")[0])(both)[0], backend.run(core, "chunk")[0])
        <= 1e-6
    )
    rows = jacrev(lambda v: backend.run(replace(core, v=v), "chunk")[0][0, -1, 0])(core.v)
    for i, row in enumerate(rows):
        v = core.v.clone().requires_grad_()
        (expected,) = torch.autograd.grad(backend.run(replace(core, v=v), "chunk")[0][0, -1, 0, i], v)
        assert deviation(row, expected) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by jvp
def test_what_the_kernels_don_t_have():
    core = inputs_of(ADDITIVE)

    def f(q):
        return backend.run(replace(core, q=q), "chunk")[0].sin().sum()

    with pytest.raises(RuntimeError, match="forward derivatives are not supported by the native backend"):
        jvp(f, (core.q,), (core.q,))
    with pytest.raises(RuntimeError, match="double backward is not supported by the native backend"):
        grad(lambda x: grad(f)(x).sum())(core.q)


def test_a_step_over_its_state():
    core = replace(inputs_of(KDA, K=32, V=32), q=torch.randn(1, 1, 1, 32))
    core = replace(core, **{name: getattr(core, name)[:, :1] for name in ("k", "v", "g", "e", "w")})
    o, state = backend.run(core, "recurrent")
    with overwriting():
        found, over = backend.run(core, "recurrent")
    assert over.S is core.S and torch.equal(over.S, state.S) and torch.equal(o, found)


# ---- threads and processes ----


def test_threads_change_no_bit():
    core = moved(problem((1, "k"), B=3, T=200, H=(8, 8, 8), K=32, V=32), lambda x: x.float())
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = moved(core, lambda x: x.clone().requires_grad_())
            o, _ = backend.run(x, "chunk")
            o.square().sum().backward()
            found.append([o, x.q.grad, x.k.grad, x.g.grad])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other))


def test_several_python_threads_at_once():
    core = moved(problem((1, "k"), B=2, T=200, H=(4, 4, 4), K=32, V=32), lambda x: x.float())
    expected, found = backend.run(core, "chunk")[0], []
    threads = [threading.Thread(target=lambda: found.append(backend.run(core, "chunk")[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(x, expected) for x in found)


CHILD = """
import os, torch, fwp
torch.set_num_threads(2)
x = dict(q=torch.ones(1, 100, 8, 32), k=torch.full((1, 100, 8, 32), .1), v=torch.ones(1, 100, 8, 32))
beta = torch.full((1, 100, 8), .5)  # small enough for torch's own operations, whose threads don't survive a fork
out, _ = fwp.fast_weights("delta", **x, beta=beta, backend="native")
if (child := os.fork()) == 0:
    again, _ = fwp.fast_weights("delta", **x, beta=beta, backend="native")
    os._exit(not torch.equal(out, again))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


# ---- building ----

FIRST = """
import torch, fwp
x = torch.ones(1, 3, 1, 4)
out, _ = fwp.fast_weights("additive", x, x, x, backend="native")
print(out.sum().item())
"""


def start(script, warn="error", **environment):
    return subprocess.Popen(
        [sys.executable, "-W", warn, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


def test_processes_that_start_at_once_build_once(tmp_path):
    running = [start(FIRST, FWP_CACHE=tmp_path) for _ in range(4)]
    said = [process.communicate() for process in running]
    assert [out.strip() for out, _ in said] == ["96.0"] * 4, said
    assert sum("compiling" in error for _, error in said) == 1
    assert len([*tmp_path.glob("*.so")]) == 1


def test_without_a_compiler(tmp_path):
    out, error = start(FIRST, FWP_CACHE=tmp_path, CXX="no-such-compiler").communicate()
    assert out == "" and "no C++ compiler was found" in error.splitlines()[-1]
    out, error = start(FIRST.replace('"native"', '"auto"'), FWP_CACHE=tmp_path, CXX="no-such-compiler").communicate()
    assert out == "" and "RuntimeWarning: backend: 'auto' takes 'torch'" in error  # -W error
    said = start(FIRST.replace('"native"', '"auto"'), FWP_CACHE=tmp_path, CXX="no-such-compiler", warn="default")
    out, error = said.communicate()
    assert out.strip() == "96.0" and error.count("no C++ compiler was found; install g++ or clang++") == 1


def test_a_library_of_another_processor_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("FWP_CACHE", str(tmp_path))
    kind = native.Kind(32, 32, 0, 0)
    here = native.path_of(kind)
    monkeypatch.setattr(native, "processor", lambda: "another")
    assert native.path_of(kind) != here


def test_a_home_that_can_t_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("FWP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert native.folder().is_relative_to(__import__("tempfile").gettempdir())


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FWP_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.BuildError, match="^false can't compile the CPU kernels"):
        native.build(native.Kind(32, 32, 0, 0))
    assert not [*tmp_path.glob("*.so")]


def test_the_package_is_in_the_wheel():
    assert native.SOURCE.name == "native.cpp" and native.SOURCE.exists() and fwp.__version__
