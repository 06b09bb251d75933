"""Kernels that a compiler got wrong are found before they are used."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fwp import canary, functional, trust
from fwp.backends import chunked
from fwp.backends.ops import Inputs
from fwp.core import Core, Features
from fwp.functional import fast_weights
from fwp.testing import deviation, sample

pytest.importorskip("triton")
import triton

from fwp.backends import triton as kernels
from fwp_kernels import launch, packing, problem, tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
NAMES = ("q", "k", "v", "g", "a", "e", "w", "S")
REAL_T, REAL_PROGRAMS, REAL_DISTINCT = canary.T, canary.PROGRAMS, canary.DISTINCT
PAIR = f"Triton {triton.__version__} and torch {torch.__version__} on Some GPU 9000 (sm_99)"


@pytest.fixture(autouse=True)
def stranger(monkeypatch, tmp_path):
    """An unknown GPU and an empty cache. Without a GPU the interpreter plays its part."""
    monkeypatch.setattr(trust, "gpu_and_architecture", lambda device: ("Some GPU 9000", "sm_99"))
    monkeypatch.setattr(trust, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(canary, "T", 37)
    for name in ("PROGRAMS", "DISTINCT", "REPEATS"):
        monkeypatch.setattr(canary, name, 1)
    monkeypatch.setattr(trust, "_canary", beside)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def beside(case, warps=None):
    """The check in this process, where faults are planted, and in a thread of its own."""
    if warps is not None:
        return "fewer warps change nothing"
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(canary.check, case).result()


def forget():
    trust._warps.clear()
    trust._ask.cache_clear()


@pytest.fixture
def canaries(monkeypatch):
    """The cases for which a canary was run."""
    ran, run = [], trust._canary

    def noted(case, warps):
        if warps is None:
            ran.append(case)
        return run(case, warps)

    monkeypatch.setattr(trust, "_canary", noted)
    return ran


def arguments(rule="kda", **options):
    inputs = sample(rule, B=1, T=5, H=1, K=4, V=3, dtype=torch.float32, device=DEVICE, **options)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def some_core(dtype=torch.float32, **options):
    x = torch.randn(1, 5, 1, 4, dtype=dtype, device=DEVICE)
    width = options.get("features", Features()).width(4)
    gates = {"g": -torch.rand(1, 5, 1, width), "e": torch.rand(1, 5, 1), "w": torch.rand(1, 5, 1)}
    kept = torch.promote_types(dtype, torch.float32)
    options = {
        "S": torch.randn(1 if "cu_seqlens" not in options else 2, 1, width, 4, dtype=kept, device=DEVICE),
        **options,
    }
    return Core(x.requires_grad_(), x, x, **{name: gate.to(DEVICE) for name, gate in gates.items()}, **options)


def spoil(monkeypatch, name, change):
    """Applies `change` to the results of a function of the launch layer."""
    right = getattr(launch, name)

    def wrong(*args):
        results = list(right(*args))
        change(results)
        return results if name == "backward" else tuple(results)

    monkeypatch.setattr(launch, name, wrong)


def halve_a_row(i):
    def change(results):
        results[i].view(-1, results[i].shape[-1])[0] *= 0.5

    return change


OPTIONS = {
    "chunk": {},
    "before": {"read": "before"},
    "normalised": {"denominator": True},
    "features": {"features": Features("dpfp-2", "l2", 0.5)},
    "packed": {"cu_seqlens": torch.tensor([0, 2, 5])},
}


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("name", OPTIONS)
def test_right_kernels_are_trusted(name, form, canaries):
    options = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    assert trust.reason_to_distrust(some_core(**options), form) is None
    assert [case.form for case in canaries] == [form]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_right_kernels_are_trusted_in_other_precisions(dtype):
    assert trust.reason_to_distrust(some_core(dtype), "chunk") is None


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
def test_a_wrong_gradient_is_found(monkeypatch, i):
    spoil(monkeypatch, "backward", halve_a_row(i))
    core = some_core()
    core = replace(core, a=core.k) if NAMES[i] == "a" else core
    assert f"{PAIR}: d{NAMES[i]} is off by " in trust.reason_to_distrust(core, "chunk")


@pytest.mark.parametrize("i", range(2), ids="oS")
def test_a_wrong_result_is_found(monkeypatch, i):
    spoil(monkeypatch, "forward", halve_a_row(i))
    assert f"{PAIR}: {'oS'[i]} is off by " in trust.reason_to_distrust(some_core(), "recurrent")


def test_what_is_not_finite_is_found(monkeypatch):
    spoil(monkeypatch, "forward", lambda results: results[0][..., -1].fill_(torch.nan))
    assert "o is off by inf" in trust.reason_to_distrust(some_core(), "chunk")


def test_what_does_not_compile_is_found(monkeypatch):
    def fails(*args):
        raise RuntimeError("no such instruction\nin line 3")

    monkeypatch.setattr(launch, "backward", fails)
    assert trust.reason_to_distrust(some_core(), "chunk").endswith("(sm_99): RuntimeError: no such instruction")


def test_without_gradients_only_the_forward_is_asked(monkeypatch):
    spoil(monkeypatch, "backward", halve_a_row(0))
    with torch.no_grad():
        assert trust.reason_to_distrust(some_core(), "chunk") is None
    assert trust.reason_to_distrust(some_core(), "chunk") is not None


# ---- cases ----

CASE = trust.KernelCase(
    *(torch.device("cpu"), torch.float32, "chunk", 2, True, False, False, False, True, 1, "after"),
    *(False, False, True, None, None, False, 4, 3, 2, 1, 2),
)


def test_no_two_cases_share_a_file():
    changed = {
        "dtype": torch.float16,
        "form": "recurrent",
        "decay": 1,
        "read": "before",
        "phi": "relu",
        "norm": "l2",
        "writes": 2,
        **dict.fromkeys(("K", "V", "Hq", "Hk", "Hv"), 5),
        "layout": "T16.qdddd",
        **{name: not getattr(CASE, name) for name in trust.SWITCHES},
    }
    assert set(CASE._fields) - set(changed) == {"device"}
    names = [CASE.name, *(CASE._replace(**{name: value}).name for name, value in changed.items())]
    assert len(set(names)) == len(names)
    assert not any(set(name) & set("/\\: ") for name in names)


ERASERS = {
    "own key": {"erase_key": True},
    "own key, no strength": {"erase_key": True, "erase_strength": False},
    "before decay": {"erase_key": True, "erase_before_decay": True},
    "wide own key": {"erase_key": True, "wide_erase_key": True, "dtype": torch.bfloat16},
    "own key of few features": {"erase_key": True, "erase_strength": False, "phi": "dpfp-1", "K": 2},
    "writes": {"writes": 3, "packed": True},
    "writes and own key": {"writes": 2, "erase_key": True, "denominator": True, "read": "before"},
}


@pytest.mark.parametrize("name", ERASERS)
def test_a_call_asks_for_a_canary_like_itself(name):
    case = CASE._replace(**ERASERS[name])
    core = canary.small_inputs(case)
    assert (
        trust.KernelCase(*trust.case_fields(replace(core, q=core.q.requires_grad_()), case.form))._replace(layout="")
        == case
    )
    assert core.k.shape[1] == core.v.shape[1] == case.writes * core.q.shape[1]
    for gate in (core.g, core.a, core.e, core.w):
        assert gate is None or gate.shape[:3] == (len(core.v), core.k.shape[1], 2)
    assert core.a is None or (core.a.shape[-1] == core.width and (core.a.dtype != core.k.dtype) == case.wide_erase_key)


@pytest.mark.parametrize("name", ERASERS)
def test_the_state_of_a_canary_lives_and_does_not_blow_up(monkeypatch, name):
    monkeypatch.setattr(canary, "T", REAL_T)
    core = canary.small_inputs(CASE._replace(**ERASERS[name]))
    ends = chunked.run(core, "chunk")[1].S.norm(dim=(-2, -1))
    assert ends.min() > 1e-3 and ends.max() < 1e3


def forgets_the_erase_key(core):
    return replace(core, a=None, e=core.w if core.e is None else core.e)


def erases_after_the_decay(core):
    return replace(core, erase_before_decay=False)


def reads_after_every_write(core):
    q = core.q.repeat_interleave(core.writes, 1)
    ends = None if core.cu_seqlens is None else core.cu_seqlens * core.writes
    return replace(core, q=q, cu_seqlens=ends, writes=1)


@pytest.mark.parametrize(
    ("name", "fault", "found"),
    [
        ("own key", forgets_the_erase_key, "o is off by"),
        ("own key, no strength", forgets_the_erase_key, "o is off by"),
        ("before decay", erases_after_the_decay, "o is off by"),
        ("writes", reads_after_every_write, "o is off by inf"),
    ],
)
def test_kernels_that_erase_or_read_wrongly_are_found(monkeypatch, name, fault, found):
    """The torch backend plays the kernels' part."""
    case = CASE._replace(**ERASERS[name], gradients=False)
    monkeypatch.setattr(kernels, "run", lambda core, form, segment: chunked.run(core, form))
    assert canary.check(case) is None
    monkeypatch.setattr(kernels, "run", lambda core, form, segment: chunked.run(fault(core), form))
    assert canary.check(case).startswith(found)


# ---- sequences in segments ----


@pytest.fixture
def segments(monkeypatch):
    """Makes every sequence long enough to be cut. Gives the chunks per segment of each call, 0 for whole sequences."""
    lengths, forward, backward = [], launch.forward, launch.backward
    monkeypatch.setattr(canary, "T", 67)
    cut = packing.segment_chunks
    monkeypatch.setattr(packing, "segment_length", lambda *sizes, **named: 1)
    monkeypatch.setattr(launch, "forward", lambda p, *args: lengths.append(cut(p)) or forward(p, *args))
    monkeypatch.setattr(launch, "backward", lambda p, *args: lengths.append(cut(p)) or backward(p, *args))
    return lengths


def test_sequences_are_cut_by_kernels_that_were_checked(segments, canaries):
    out, _ = fast_weights("kda", **arguments(), backend="triton", form="chunk")
    out.sum().backward()
    assert [case.cut for case in canaries] == [False, True] and canaries[1].gradients
    assert all(segments[-2:])


@pytest.mark.parametrize("back", [False, True])
def test_sequences_stay_whole_where_cutting_them_fails(monkeypatch, segments, back):
    def join(p, *given, back=False):
        states = right(p, *given, back=back)
        return type(states)(*(x if x is None or back != wrong else x * 1.5 for x in states))

    right, wrong = launch.Kernels.join, back
    monkeypatch.setattr(launch.Kernels, "join", join)
    inputs = arguments()
    with pytest.warns(RuntimeWarning, match="^long sequences are not cut into segments, which is slower: .* off by "):
        out, _ = fast_weights("kda", **inputs, backend="triton", form="chunk")
        grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert segments[-2:] == [0, 0]
    out, _ = fast_weights("kda", **inputs, backend="torch")
    truth = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert all(deviation(x, y) < 1e-4 for x, y in zip(grads, truth))


def test_an_interrupted_canary_decides_nothing(monkeypatch):
    def interrupted(case, warps):
        raise KeyboardInterrupt

    monkeypatch.setattr(trust, "_canary", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trust.reason_to_distrust(some_core(), "chunk")
    assert trust._ask.cache_info().currsize == 0


def test_a_canary_has_two_segments():
    """Its longest sequence has at least two segments, whatever the block sizes."""
    for dtype, K, erase, denominator in product(problem.TYPES, (64, 1024), (False, True), (False, True)):
        for decay, architecture in product(range(3), ("sm_80", "sm_90", "gfx942")):
            tiles = tiling.by_rule(K, dtype, decay, erase, architecture, denominator)
            assert tiles.chunk * tiles.checkpoint_every <= tiling.KEPT < REAL_T


ROWS_OF_TOKENS = {"norms_kernel", "features_back_kernel"}  # without matrix products, and the same for every V


@pytest.mark.parametrize("K", [64, 256, 1024])
def test_a_canary_has_thousands_of_programs_of_each_kernel(K, monkeypatch):
    """In one of its runs, as the launch layer counts them. Faults have shown from 1,000 programs on."""
    for name, value in (("T", REAL_T), ("PROGRAMS", REAL_PROGRAMS), ("DISTINCT", REAL_DISTINCT)):
        monkeypatch.setattr(canary, name, value)
    for dtype, V, H, decay, erase in product(
        (torch.bfloat16, torch.float32), (64, 1024), (1, 8), (0, 2), (False, True)
    ):
        sizes = {"dtype": dtype, "K": K, "V": V, "Hq": H, "Hk": H, "Hv": H, "norm": "l2"}
        case = CASE._replace(**sizes, decay=decay, erase_strength=erase)
        core = canary._each_tensor(canary.small_inputs(case), lambda x: x.to("meta"))
        most = {}
        for times, gradients in canary.runs(case):
            for kernel, count in programs(canary.copied(core, times), case.form, gradients).items():
                most[kernel] = max(count, most.get(kernel, 0))
        few = {kernel: count for kernel, count in most.items() if count < 2000}
        assert few.keys() <= ROWS_OF_TOKENS and "walk_back_kernel" in most, (case.name, few)


def programs(core, form, gradients):
    """The least number of programs of each kernel of a call."""
    counts = {}

    def start(kernel, count, **_):
        name = kernel.fn.__name__
        counts[name] = min(count, counts.get(name, count))

    p = problem.Problem(*Inputs.from_core(core, None, 0))
    o, S, z, den = launch.forward(p, form, start=start)
    if gradients:
        launch.backward(p, o, den, o, S, z, start=start)
    return counts


# ---- consequences of distrust ----


def test_an_explicit_request_raises_and_names_the_versions(monkeypatch):
    spoil(monkeypatch, "backward", halve_a_row(2))
    with pytest.raises(RuntimeError, match="^backend: 'triton' is not to be trusted here: ") as error:
        fast_weights("kda", **arguments(), backend="triton")
    assert PAIR in str(error.value)


def test_auto_warns_and_takes_torch(monkeypatch):
    core, seen = some_core(), SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.float32, shape=(1, 5, 1, 4))
    assert functional.choose(core, "auto", "auto", seen) == ("triton", "chunk")
    forget()
    for folder in trust.cache_folder().iterdir():
        for file in folder.iterdir():
            file.unlink()
    spoil(monkeypatch, "backward", halve_a_row(2))
    with pytest.warns(RuntimeWarning, match="^backend: 'auto' takes 'torch', which is many times slower: ") as warned:
        assert functional.choose(core, "auto", "auto", seen) == ("torch", "chunk")
    assert PAIR in str(warned[0].message)


# ---- the cache ----


def test_asked_once_in_a_process_and_once_on_a_machine(canaries):
    core = some_core()
    for _ in range(3):
        assert trust.reason_to_distrust(core, "chunk") is None
    assert len(canaries) == 1
    forget()  # as in a new process
    assert trust.reason_to_distrust(core, "chunk") is None
    assert len(canaries) == 1
    assert trust.reason_to_distrust(core, "recurrent") is None
    assert len(canaries) == 2


def test_another_gpu_or_version_is_asked_anew(monkeypatch, canaries):
    def change(*_):
        forget()
        assert trust.reason_to_distrust(some_core(), "chunk") is None

    change()
    for count, place, name, value in (
        (2, trust, "gpu_and_architecture", lambda device: ("Another GPU", "sm_99")),
        (3, triton, "__version__", "9.9"),
        (4, torch, "__version__", "9.9"),
    ):
        monkeypatch.setattr(place, name, value)
        change()
        assert len(canaries) == count


def test_a_failure_is_forgotten_with_the_process(monkeypatch, canaries):
    with monkeypatch.context() as wrong:
        spoil(wrong, "forward", halve_a_row(0))
        for _ in range(2):
            assert trust.reason_to_distrust(some_core(), "chunk") is not None
    assert len(canaries) == 1
    forget()
    assert trust.reason_to_distrust(some_core(), "chunk") is None


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, canaries):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert trust.reason_to_distrust(some_core(), "chunk") is None
    assert len(canaries) == 1


def test_pairs_known_to_be_good_are_not_asked(monkeypatch, canaries):
    monkeypatch.setattr(trust, "KNOWN_GOOD", {("sm_99", triton.__version__)})
    assert trust.reason_to_distrust(some_core(), "chunk") is None
    assert not canaries


def test_the_interpreter_is_not_asked(monkeypatch, canaries):
    monkeypatch.undo()
    assert torch.cuda.is_available() or trust.reason_to_distrust(some_core(), "chunk") is None
    assert not canaries


# ---- traced calls ----


def plain(v, inputs):
    return fast_weights("kda", v=v, **inputs, backend="triton")[0]


CALLS = {
    "compile": lambda f, v: torch.compile(f, fullgraph=True, backend="aot_eager")(v),
    "compile any size": lambda f, v: torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)(v),
    "grad": lambda f, v: torch.func.grad(lambda v: f(v).sum())(v) * 0 + f(v),
    "autocast": lambda f, v: torch.autocast(DEVICE, torch.bfloat16, enabled=False)(f)(v),
    "inference": lambda f, v: torch.inference_mode()(f)(v),
}


@pytest.mark.parametrize("name", CALLS)
def test_traced_and_transformed_calls_ask_outside(name, canaries):
    torch._dynamo.reset()
    inputs = {key: x.detach() for key, x in arguments().items()}
    v = inputs.pop("v")
    truth = fast_weights("kda", v=v, **inputs, backend="torch")[0]
    assert deviation(CALLS[name](lambda v: plain(v, inputs), v), truth) < 1e-5
    assert len(canaries) in (1, 2)


def test_a_compiled_call_is_refused_too(monkeypatch):
    torch._dynamo.reset()
    spoil(monkeypatch, "forward", halve_a_row(0))
    inputs = {key: x.detach() for key, x in arguments().items()}
    with pytest.raises(Exception, match="is not to be trusted here"):
        torch.compile(lambda v: plain(v, inputs), fullgraph=True, backend="aot_eager")(inputs.pop("v"))


# ---- the process of the check ----

PLANT = "from fwp import canary, trust; import os, time; canary.check = {}; canary.serve()"


@pytest.fixture
def planted(monkeypatch):
    """Sets what the process does in place of its check."""
    monkeypatch.setattr(canary, "_worker", worker := canary._Worker())
    monkeypatch.setattr(trust, "_canary", canary.fault_of_kernels)
    yield lambda check: monkeypatch.setattr(canary, "WORKER", PLANT.format(check))
    worker.stop()


def test_the_process_runs_the_kernels_and_a_crash_or_a_hang_is_a_failure(planted, monkeypatch):
    assert canary.fault_of_kernels(CASE._replace(gradients=False)) is None
    canary._worker.stop()
    planted("lambda case: os.abort() if case.K == 9 else time.sleep(99) if case.K == 8 else None")
    assert canary.fault_of_kernels(CASE._replace(K=9)) == "the process of the check died with status -6"
    assert canary.fault_of_kernels(CASE) is None
    monkeypatch.setattr(canary, "TIMEOUT", 0.2)
    assert canary.fault_of_kernels(CASE._replace(K=8)) == "the process of the check took more than 0.2 s"


def test_fewer_warps_are_tried_and_remembered(monkeypatch):
    tried = []
    monkeypatch.setattr(trust, "_canary", lambda case, warps: tried.append(warps) or (None if warps == 2 else "wrong"))
    core, started = some_core(), []
    for _ in range(2):  # the second time as in a new process
        forget()
        assert trust.reason_to_distrust(core, "chunk") is None and trust.most_warps(lambda: core) == 2
    assert tried == [None, 4, 2]
    launch.start_with_fewer_warps(lambda *_, num_warps: started.append(num_warps), 2, None, 1, num_warps=8)
    assert started == [2]


class Recorded:
    """A kernel that records the number of warps of each launch."""

    def __init__(self, kernel, warps):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        def launched(**arguments):
            self.warps.append(arguments.get("num_warps", 4))
            return self.kernel[grid](**arguments)

        return launched


@pytest.mark.parametrize("most", [None, 2, 1])
def test_a_launch_has_no_more_warps_than_passed(most, monkeypatch):
    """From the failed canary to the launches of the next call and of its backward."""
    passed = (None, 8) if most is None else range(most + 1)
    monkeypatch.setattr(trust, "_canary", lambda case, warps: None if warps in passed else "wrong")
    inputs, warps = arguments(), []
    truth, _ = fast_weights("kda", **inputs, backend="torch")
    for name in [name for name in vars(launch) if name.endswith("_kernel") and name != "start_kernel"]:
        monkeypatch.setattr(launch, name, Recorded(getattr(launch, name), warps))
    out, _ = fast_weights("kda", **inputs, backend="triton", form="chunk")
    forward = len(warps)
    out.sum().backward()
    assert 0 < forward < len(warps)
    assert set(warps) == {most} if most else max(warps) > 2
    assert deviation(out, truth) < 1e-5


# ---- where a canary may start ----


@pytest.fixture
def started(planted, monkeypatch):
    """The processes that were started. They find every kernel right."""
    found, start = [], canary._Worker._start
    monkeypatch.setattr(canary._Worker, "_start", lambda self: found.append(start(self)) or found[-1])
    planted("lambda case: time.sleep(0.2)")
    return found


class AsksInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ask):
        ctx.ask = ask
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        ctx.ask()
        return d_x, None


def test_a_canary_starts_from_within_a_backward(started):
    x, found, core = torch.ones(1, requires_grad=True), [], some_core()
    AsksInBackward.apply(x, lambda: found.append(trust.reason_to_distrust(core, "chunk"))).backward()
    assert found == [None] and len(started) == 1


@pytest.mark.parametrize("check", ["time.sleep(0.2)", "'wrong'"])
def test_threads_share_a_process_and_a_verdict(check, started, planted):
    planted(f"lambda case: {check}")
    core = some_core()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: trust.reason_to_distrust(core, "chunk"), range(8)))
    assert len(set(found)) == 1 and (found[0] is None) == ("sleep" in check)
    # a process ends after a fault: one for each number of warps
    assert len(started) == (1 if "sleep" in check else 4)


def test_a_captured_graph_starts_no_process(started, monkeypatch):
    """What passed before is trusted. All else is left to torch, and is asked after the capture."""
    core, seen = some_core(), SimpleNamespace(is_cuda=True, is_cpu=False, dtype=torch.float32, shape=(1, 5, 1, 4))
    with monkeypatch.context() as capture:
        capture.setattr(trust, "capturing", lambda: True)
        with pytest.warns(
            RuntimeWarning, match="^backend: 'auto' takes 'torch'.*: a CUDA graph is being captured"
        ) as said:
            assert functional.choose(core, "auto", "auto", seen)[0] == "torch"
        assert "\n" not in str(said[0].message)
        with pytest.raises(RuntimeError, match="^backend: 'triton' is not to be trusted here: a CUDA graph"):
            fast_weights("kda", **arguments(), backend="triton")
    assert not started
    assert functional.choose(core, "auto", "auto", seen)[0] == "triton" and len(started) == 1
    monkeypatch.setattr(trust, "capturing", lambda: True)
    for _ in range(2):  # from this process, then from the cache folder
        assert functional.choose(core, "auto", "auto", seen)[0] == "triton"
        forget()
    assert len(started) == 1


def run_script(text, tmp_path):
    """The lines that a script prints. It has no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, warnings\n"
        "from fwp import canary\n"
        "print('script')\n"
        f"canary.WORKER = {PLANT.format('lambda case: str(os.getpid())')!r}\n"
        f"{text}\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_script_without_a_guard_runs_once(tmp_path):
    lines = run_script("print(canary.fault_of_kernels(None), flush=True)", tmp_path)
    assert lines[0] == "script" and len(lines) == 2 and lines[1].isdigit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_fork_has_a_process_of_its_own(tmp_path):
    """It neither uses nor ends its parent's. The parent's lock may be held when it forks."""
    lines = run_script(
        "import multiprocessing, threading\n"
        "warnings.simplefilter('ignore')\n"
        f"canary.WORKER = {PLANT.format('lambda case: None')!r}\n"
        "assert canary.fault_of_kernels(1) is None\n"
        "ours = canary._worker.process\n"
        "def child():\n"
        "    assert canary.fault_of_kernels(2) is None and canary._worker.process.pid != ours.pid\n"
        "with canary._worker.lock:\n"
        "    fork = multiprocessing.get_context('fork').Process(target=child)\n"
        "    fork.start(); fork.join(30)\n"
        "print(fork.exitcode)\n"
        "assert canary.fault_of_kernels(3) is None and canary._worker.process is ours and ours.poll() is None\n",
        tmp_path,
    )
    assert lines == ["script", "0"]


def test_no_executable_is_no_trust(planted, monkeypatch):
    monkeypatch.setattr("sys.executable", None)
    assert "sys.executable" in trust.reason_to_distrust(some_core(), "chunk")


class Copies:
    """The torch backend as kernels whose program number 1,000 is wrong, or that differ between runs."""

    def __init__(self, fault):
        self.fault, self.runs = fault, 0

    def run(self, core, form, segment):
        o, state = chunked.run(core, form)
        self.runs += 1
        if self.fault == "copy":
            o[1000] *= 1 + 1e-6
        return (o * (1 + 1e-6 * self.runs) if self.fault == "run" else o), state


@pytest.mark.parametrize(
    ("fault", "found"), [("copy", "o differs between copies"), ("run", "o differs between two runs")]
)
def test_copies_and_repeats_have_the_same_bits(monkeypatch, fault, found):
    for name, value in (("PROGRAMS", 2048), ("DISTINCT", 2), ("REPEATS", 3), ("T", 5)):
        monkeypatch.setattr(canary, name, value)
    monkeypatch.setattr(kernels, "run", Copies(fault).run)
    assert canary.check(CASE._replace(Hq=1, Hk=1, Hv=1, gradients=False)).startswith(found)


def misaligned(x):
    return torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)


def test_the_inputs_of_a_check_lie_in_memory_as_the_callers():
    core = some_core()
    other = replace(core, v=misaligned(core.v.detach()), e=core.e.transpose(1, 2).contiguous().transpose(1, 2))
    names = set()
    for x in (core, other, replace(core, v=torch.randn(1, 5, 1, 16)[..., :4])):
        case = trust.KernelCase(*trust.case_fields(x, "chunk"))
        names.add(case.name)
        laid = canary.in_layout(canary.small_inputs(case), case.layout)
        assert trust.layout_of(laid) == case.layout
    assert len(names) == 3
