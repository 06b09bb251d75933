"""`fwp bench` times right results beside peers, and never wrong ones."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from threading import Timer
from types import ModuleType, SimpleNamespace

import pytest
import torch
import typer
from matplotlib.text import Text
from rich.console import Console

from fwp import rules, testing
from fwp.cli import main, stoppable
from fwp.testing import row_error
from fwp_benchmarks import peers, precompile, speed
from fwp_benchmarks import speed_report as report
from fwp_benchmarks.oracle import fast_weights as oracle
from fwp_benchmarks.points import Point

RATES = (1e9, 1e10)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(speed, "SECONDS", 0)
    monkeypatch.setattr(speed, "points", lambda device: [Point(rule, 1, 65, 2, 16, device) for rule in rules.RULES])
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: RATES)
    speed.worst_violation.cache_clear()


def read(file):
    found = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
    return found["rows"]


# ---- rows ----


def test_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert speed.main("cpu", peers=True, json_file=file) == 0
    found = read(file)
    both = ("forward", "forward + backward")
    assert [(row["rule"], row["pass"]) for row in found] == [(rule, x) for rule in rules.RULES for x in both]
    for row in found:
        assert {"ours", "softmax"} <= row["seconds"].keys() and row["backend"] == "native" and row["limit"] > 0
        assert all(min(times) <= row["seconds"][name] <= max(times) for name, times in row["times"].items())
        assert all(len(times) == 3 and min(times) > 0 for times in row["times"].values())
        assert row["card"].startswith("CPU") and row["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert f"{len(rules.RULES)} of {len(rules.RULES)}" in printed and "medians of" in printed
    assert "s left: kda, T 65, D 16: forward: ours" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "rows-limit.png"}


def test_the_fallback_of_transformers_is_a_peer(tmp_path):
    pytest.importorskip("transformers")
    point = Point("gated_delta", 1, 65, 2, 16, "cpu")
    assert all("transformers" in row["seconds"] and row["note"] == "" for row in speed.measure(point, RATES, True))


def test_a_step_and_a_feature_map_with_denominator():
    step, mapped = Point("kda", 3, 1, 2, 16, "cpu"), Point("additive", 1, 65, 2, 8, "cpu", "dpfp-3", None, True)
    (row,) = speed.measure(step, RATES, False)
    assert row["pass"] == "step" and row["form"] == "recurrent" and row["seconds"].keys() == {"ours"}
    x, _ = speed.inputs(step)
    assert x["state"].S.shape == (3, 2, 16, 16)
    assert [row["what"] for row in speed.measure(mapped, RATES, False)] == ["additive + dpfp-3 + denominator"] * 2
    assert mapped.width == 48


def test_plots(tmp_path, monkeypatch):
    """Time against T for rules measured at several T. All text has at least 7 points at the width of a page."""
    made = [
        row(T * 1e-6, T * 1e-7, point={"rule": rule, "T": T}, peers={peers.LEADER: T * 2e-6})
        for rule in list(rules.RULES)[:5]
        for T in (1024, 4096)
    ]
    figures = []
    monkeypatch.setattr(
        report, "save", lambda figure, *args, right=report.save: figures.append(figure) or right(figure, *args)
    )
    found = report.plots(made, tmp_path / "rows.json")
    assert [path.name for path in found] == ["rows-time.png", "rows-limit.png"]
    assert all(path.stat().st_size > 10_000 for path in found)
    for figure in figures:
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert len(texts) > 10 and min(text.get_fontsize() for text in texts) * 7.5 / figure.get_figwidth() >= 7
        box = figure.bbox
        assert all(box.x0 <= x.x0 and x.x1 <= box.x1 for x in (text.get_window_extent() for text in texts if text.axes))


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_the_table_fits_into_few_columns(columns, monkeypatch, capsys):
    """Less important columns are left out, and no number is cut. What is not timed has a line below."""
    monkeypatch.setenv("COLUMNS", str(columns))
    times = {"softmax": 2.345, peers.LEADER: 3.456, "flash-qla": 4.567}
    mapped = {"D": 64, "T": 65536, "feature_map": "dpfp-3", "denominator": True}
    found = [row(1.0, 0.5, backend="triton", peers=times), row(1.0, 0.5, backend="triton", point=mapped, mode="graph")]
    found += [row(1.0, point=mapped) | {"red": "not timed, it is wrong by 0.1", "seconds": {}}]
    report.show(found, Console(highlight=False))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    assert {"gated_delta", "65536", "1e+03", "2.35", "2.0", "denominator", "wrong"} - set(printed.split()) == {
        "gated_delta"
    }
    assert ("triton" in printed, "3.46" in printed, "4.57" in printed) == (columns == 160, columns > 60, columns > 60)
    below = "additive + dpfp-3 + denominator, T 65536, D 64, fwd+bwd: not timed, it is wrong by 0.1"
    assert below in " ".join(printed.split())


# ---- a run that was stopped ----


def test_a_rerun_times_only_what_is_missing(tmp_path, monkeypatch, capsys):
    timed, right = [], speed.measure
    monkeypatch.setattr(speed, "measure", lambda point, *args: timed.append(point.rule) or right(point, *args))
    file, todo = tmp_path / "rows.json", list(rules.RULES)

    def run(peers=False):
        timed.clear()
        assert main(["bench", "--device", "cpu", "--json", str(file), *["--peers"] * peers]) == 0
        assert [row["rule"] for row in read(file)] == [rule for rule in todo for _ in range(2)]
        return list(timed)

    assert run() == todo
    whole = read(file)
    stopped = [row for row in whole if row["rule"] not in ("decay", "kda")]
    stopped[0] |= {"red": "not timed", "seconds": {}}
    stopped[-1] |= {"seconds": {}, "note": "left out, no time"}
    file.write_text(json.dumps({"rows": stopped}))
    capsys.readouterr()
    assert run() == [rule for rule in todo if rule in (todo[0], "decay", "kda", todo[-1])]
    assert f"{len(todo) - 4} of {len(todo)} points are there already" in capsys.readouterr().out
    kept = [row for row in whole if row["rule"] in todo[2:-1] and row["rule"] not in ("decay", "kda")]
    assert all(row in read(file) for row in kept)
    assert run() == []
    assert run(peers=True) == todo
    for name, value in (("code", "another"), ("processor", "another"), ("versions", {"torch": "another"})):
        file.write_text(json.dumps({"rows": [row | {name: value} for row in read(file)]}))
        assert run(peers=True) == todo


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [1]}', '{"rows": {"a": 1}}', '{"rows": [{}]}'])
def test_a_file_of_something_else_keeps_nothing(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    assert speed.kept_rows(tmp_path / "rows.json", speed.points("cpu"), speed.describe_machine("cpu", False)) == {}


def test_a_stopped_run_keeps_every_point(tmp_path, monkeypatch):
    """Also those of an earlier run that come later in the list."""
    file, todo = tmp_path / "rows.json", list(rules.RULES)
    assert main(["bench", "--device", "cpu", "--json", str(file)]) == 0
    file.write_text(json.dumps({"rows": [row for row in read(file) if row["rule"] not in todo[:2]]}))

    def stops(point, *args):
        if point.rule == todo[1]:
            signal.raise_signal(signal.SIGTERM)
        return right(point, *args)

    right = speed.measure
    monkeypatch.setattr(speed, "measure", stops)
    assert main(["bench", "--device", "cpu", "--json", str(file)]) == 143
    assert [row["rule"] for row in read(file)] == [rule for rule in todo if rule != todo[1] for _ in range(2)]


def test_a_stop_ends_the_processes_that_compile(monkeypatch):
    """They would run until the deadline, and the command would wait for them."""
    point = Point("additive", 1, 4, 1, 4, "cpu", cold=True)
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    started, right = [], subprocess.Popen

    def popen(command, **options):
        started.append(right(sleep, **options))
        Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    begun = precompile.time.monotonic()
    with pytest.raises(typer.Exit), stoppable(str):
        precompile.Precompiler([point, replace(point, T=8)], "cpu", False, begun + 90)
    assert precompile.time.monotonic() - begun < 30 and len(started) == 1
    assert started[0].wait(10) == -signal.SIGKILL


# ---- wrong results are not timed ----


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    row = rules.RULES["decay"]
    lowered = rules.lowering.replace(row, lower=lambda core, g=None: core)
    monkeypatch.setitem(rules.RULES, "decay", lowered)
    file = tmp_path / "rows.json"
    assert speed.main("cpu", json_file=file) == 1
    red = [row for row in read(file) if row.get("red")]
    assert [row["rule"] for row in red] == ["decay"] and red[0]["seconds"] == {} and red[0]["times"] == {}
    assert "it is wrong by" in red[0]["red"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_one_percent_is_wrong_in_every_dtype(dtype, monkeypatch):
    monkeypatch.setattr(Point, "dtype", dtype)
    point = Point("delta", 1, 70, 2, 64, "cpu")
    assert speed.worst_violation(point) is None
    right = testing.evaluate

    def faulty(*inputs, **options):  # only "auto" is faulty, not the reference and the budgets
        return {name: x * (1 if "backend" in options else 1.01) for name, x in right(*inputs, **options).items()}

    monkeypatch.setattr(testing, "evaluate", faulty)
    speed.worst_violation.cache_clear()
    assert speed.worst_violation(point) > 0.005


def faulty_from(T, change):
    """A `fast_weights` that is wrong only at one length T."""
    right = speed.fwp.fast_weights

    def call(rule, q, k, v, **options):
        out, state = right(rule, q, k, v, **options)
        return (change(out) if q.shape[1] >= T else out), state

    return call


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: out.masked_fill(torch.arange(out.shape[1]).view(1, -1, 1, 1) == 90, torch.nan), "is not finite"),
        (lambda out: torch.cat([out[:, :64], out[:, 64:] * 1.5], 1), "two halves differ from the whole by 3.3e-01"),
    ],
)
def test_what_is_wrong_at_its_own_size_is_not_timed(change, reason, monkeypatch):
    monkeypatch.setattr(speed.fwp, "fast_weights", faulty_from(100, change))
    (row,) = speed.measure(Point("additive", 1, 128, 2, 16, "cpu"), RATES, False)
    assert row["red"].endswith(reason) and row["times"] == {}


def test_what_raises_is_red_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(rule, *inputs, **options):
        if rule == "gla" and options.get("backend") != "reference":
            raise RuntimeError("out of something\nmore")
        return right(rule, *inputs, **options)

    right = speed.fwp.fast_weights
    monkeypatch.setattr(speed.fwp, "fast_weights", broken)
    file = tmp_path / "rows.json"
    assert speed.main("cpu", json_file=file) == 1
    assert [row["red"] for row in read(file) if row.get("red")] == ["RuntimeError: out of something"]
    assert len(read(file)) == 2 * len(rules.RULES) - 1


# ---- time ----


def test_candidates_take_turns_and_medians_are_kept(monkeypatch):
    order = []
    monkeypatch.setattr(speed, "timed", lambda lap, device: order.append(lap()) or float(len(order)))
    laps = {name: lambda name=name: name for name in ("ours", "peer")}
    assert speed.times_by_turns(laps, 2, "cpu") == {
        "ours": [1.5, 2.5, 3.5],
        "peer": [2, 3, 4],
    }  # after a round of warm-up
    assert order == ["ours", "peer"] * 4


def test_a_run_ends_in_time(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 50))  # each reading of the clock is 50 seconds later
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=lambda: next(clock)))
    monkeypatch.setattr(speed, "measure", lambda point, rates, peers: iter([speed.blank(point)]))
    file = tmp_path / "rows.json"
    assert speed.main("cpu", json_file=file) == 0
    notes = [row["note"] for row in read(file)]
    assert notes[0] == "" and notes[-1] == "left out, no time"
    assert next(clock) < speed.TOTAL + 5 * 50 * len(notes)


def test_the_list_of_points(monkeypatch):
    monkeypatch.undo()
    for device in ("cpu", "cuda"):
        todo = speed.points(device)
        assert len(set(todo)) == len(todo) <= 4 * len(rules.RULES) + 6
        assert {point.rule for point in todo} == set(rules.RULES)
        for point in todo:
            rows = point.B * point.T * point.H
            channels = any(gate.shape == "BTHK" for gate in rules.RULES[point.rule].gates.values())
            most = max(rows * max(point.width, point.D) * point.dtype.itemsize, rows * 4 * point.D * channels)
            assert max(most, 4 * point.B * point.H * point.width * point.D) <= 1e9, point
    todo = [point for point in todo if not point.cold]
    assert {point.D for point in todo if point.denominator} == {16, 32, 64}
    assert {point.T for point in todo} == {1, 256, 1024, 4096, 16384, 65536}
    assert {point.B * point.H for point in todo if point.T > 1} >= {8, 512}


@pytest.mark.parametrize(
    ("rule", "backward", "bytes_", "operations"),
    [
        ("additive", False, 1024, 98_304),
        ("additive", True, 1792, 245_760),
        ("delta", False, 1028, 180_224),
        ("delta", True, 1800, 491_520),
    ],
)
def test_the_limit_per_token_and_head(rule, backward, bytes_, operations):
    """Bytes and operations at D = 128 in bfloat16, beside the final state's 64 KiB."""
    found = speed.work(Point(rule, 2, 4096, 3, 128), backward)
    state = 0 if backward else 4 * 128 * 128 * 6
    assert found == (2 * 4096 * 3 * bytes_ + state, 2 * 4096 * 3 * operations)


def test_the_limit_of_a_step_is_its_state():
    moved, _ = speed.work(Point("additive", 64, 1, 32, 128), False)
    assert moved == 64 * 32 * (2 * 4 * 128 * 128 + 4 * 128 * 2)
    assert speed.limit(Point("additive", 64, 1, 32, 128), False, (3e12, 8e14)) == moved / 3e12


# ---- in other processes ----


def test_the_first_call_of_a_process(monkeypatch):
    point = Point("additive", 1, 4, 1, 4, "cpu", cold=True)
    found = precompile.Precompiler([point], "cpu", False, precompile.time.monotonic() + 300)
    row = precompile.first_call(found.cold[point])
    assert row["seconds"]["ours"] > 0 and "red" not in row and found.serves(point, "ours")


@pytest.mark.parametrize(
    ("task", "who", "left", "expected"),
    [("cold", "ours", 0, "ours: stopped after 0 s"), ("cold", "nobody", 300, "ours: KeyError: 'nobody'")],
)
def test_a_process_that_fails_or_is_late_is_red(task, who, left, expected):
    point = Point("additive", 1, 4, 1, 4, "cpu", cold=True)
    with precompile.ThreadPoolExecutor(1) as pool:
        job = pool.submit(precompile.run_child, task, point, who, precompile.time.monotonic() + left, {})
    row = precompile.first_call({"ours": job})
    assert row["red"] == expected and row["times"] == {}


def test_what_is_compiled_before(monkeypatch):
    """Each set of kernels has its own process. Peers serve only if theirs ended in time."""
    started = []

    def child(task, point, who, until, environment):
        started.append((task, point.rule, point.D, point.T, who))
        return (1.0, None if point.rule == "delta" and who == peers.LEADER else "1")

    monkeypatch.setattr(precompile, "run_child", child)
    monkeypatch.setattr(precompile, "find_spec", lambda name: True)
    todo = [Point(rule, 2, T, 8, 64) for rule in ("additive", "delta") for T in (256, 4096)]
    found = precompile.Precompiler([*todo, Point("kda", 1, 64, 8, 64, cold=True)], "cuda", True, 0.0)
    who = ("ours", peers.LEADER)
    ready = {("ready", rule, 64, 256, name) for rule in ("additive", "delta") for name in who}
    assert set(started) == ready | {("cold", "kda", 64, 64, name) for name in who} and len(started) == 6
    assert [found.serves(point, peers.LEADER) for point in todo] == [True, True, False, False]


# ---- peers ----


def documented(rule, *names, scale=None, normalize=False, map_state=lambda state: state):
    """A function of flash-linear-attention as documented, computed by the NumPy oracle."""

    def call(q, k, v, *gates, scale=scale, initial_state=None, output_final_state=False, **options):
        given = dict(zip(names, gates)) | {name: options.pop(name) for name in names if name in options}
        norm = "l2" if options.pop("use_qk_l2norm_in_kernel", False) else None
        divide = options.pop("normalize", normalize)
        assert not options, options
        S, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
        out, S, z = oracle(
            rule,
            *(x.double().numpy() for x in (q, k, v)),
            beta=None if "beta" not in given else given["beta"].double().numpy(),
            g=next((given[name].double().numpy() for name in ("g", "gk") if name in given), None),
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            feature_norm=norm,
            denominator=divide,
            eps=1e-10,
            S=None if S is None else S.double().numpy(),
            z=None if z is None else z[:, 0].double().numpy(),  # [N, 1, H, K]
        )
        return torch.as_tensor(out), (torch.as_tensor(S) if output_final_state else None)

    return call


class DPFPFeatureMap:
    def __init__(self, head_dim, nu=4):
        self.nu = nu

    def __call__(self, x):
        x = torch.cat([x.relu(), (-x).relu()], -1)
        return torch.cat([x * x.roll(i, -1) for i in range(1, self.nu + 1)], -1)


@pytest.fixture
def fakes(monkeypatch):
    """Modules of the peers' names whose functions are the documented equations, with the documented arguments."""
    modules = {
        "fla.ops.linear_attn": {
            "chunk_linear_attn": documented("additive", normalize=True),
            "fused_recurrent_linear_attn": documented("additive"),
        },
        "fla.ops.simple_gla": {f"{form}_simple_gla": documented("decay", "g") for form in ("chunk", "fused_recurrent")},
        "fla.ops.gla": {"chunk_gla": documented("gla", "g"), "fused_recurrent_gla": documented("gla", "gk")},
        "fla.ops.delta_rule": {f"{x}_delta_rule": documented("delta", "beta") for x in ("chunk", "fused_recurrent")},
        "fla.ops.gated_delta_rule": {
            "chunk_gated_delta_rule": documented("gated_delta", "g", "beta"),
            "fused_recurrent_gated_delta_rule": documented("gated_delta", "g", "gk", "gv", "beta"),
        },
        "fla.ops.kda": {f"{form}_kda": documented("kda", "g", "beta") for form in ("chunk", "fused_recurrent")},
        "fla.modules.feature_map": {"DPFPFeatureMap": DPFPFeatureMap},
        "flash_qla": {"chunk_gated_delta_rule": documented("gated_delta", "g", "beta")},
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FLA_FLASH_QLA", "1")


PEER_POINTS = [
    *(Point(rule, 2, T, 2, 128 if rule == "gated_delta" else 8) for rule in peers.FLA for T in (1, 9)),
    *(Point("additive", 2, 9, 2, 8, feature_map=phi, denominator=True) for phi in ("elu+1", "dpfp-3")),
    *(Point("additive", 2, 1, 2, 8, feature_map=phi, denominator=True) for phi in ("elu+1", "dpfp-3")),
    *(Point(rule, 2, 5, 2, 128, feature_norm="l2") for rule in ("delta", "gated_delta", "kda")),
]


def check_peer(point, call):
    """Asserts that a peer's result is that of the rule's equation, on the inputs that are timed."""
    x, _ = speed.inputs(replace(point, device="cpu"))
    with torch.no_grad():
        x = {name: torch.utils._pytree.tree_map(lambda y: y if y is None else y.detach(), y) for name, y in x.items()}
        exact = testing.cast(x, torch.float64)
        truth, _ = speed.fwp.fast_weights(point.rule, **exact, **point.options, backend="reference", eps=1e-10)
    assert row_error(call(x), truth) < 1e-5, point


@pytest.mark.parametrize("point", PEER_POINTS, ids=lambda point: f"{point.what}-{point.T}")
def test_peers_compute_the_rules_equation(point, fakes):
    found, notes = peers.calls(point)
    qla = point.rule == "gated_delta" and point.T > 1
    assert list(found) == [peers.LEADER, *(["flash-qla"] if qla else [])] and notes == []
    for call in found.values():
        check_peer(point, call)


def test_a_measured_peer_does_not_delegate(fakes, monkeypatch):
    monkeypatch.setattr(speed, "_measure", lambda *_: iter([os.environ["FLA_FLASH_QLA"]]))
    assert list(speed.measure(Point("gated_delta", 2, 9, 2, 128), RATES, True)) == ["0"]
    assert os.environ["FLA_FLASH_QLA"] == "1"
    monkeypatch.delenv("FLA_FLASH_QLA")
    with peers.separate():
        assert os.environ["FLA_FLASH_QLA"] == "0"
    assert "FLA_FLASH_QLA" not in os.environ


def test_a_peer_with_another_result_is_left_out(fakes, monkeypatch):
    point = Point("delta", 1, 9, 2, 8)
    monkeypatch.setattr(Point, "dtype", torch.float32)
    x, _ = speed.inputs(replace(point, device="cpu"))
    x = {name: y.detach() for name, y in x.items()}
    assert list(speed.callers(point, x, True)[0]) == ["ours", "softmax", peers.LEADER]
    right = documented("delta", "beta")
    sys.modules["fla.ops.delta_rule"].chunk_delta_rule = lambda *x, **options: (1.1 * right(*x, **options)[0], None)
    found, notes = speed.callers(point, x, True)
    assert list(found) == ["ours", "softmax"] and notes[0].startswith(
        f"{peers.LEADER}: ValueError: another result, by "
    )


def test_a_broken_peer_is_reported(fakes):
    del sys.modules["fla.ops.kda"].chunk_kda
    found, notes = peers.calls(Point("kda", 1, 9, 2, 8))
    assert found == {} and notes[0].startswith(f"{peers.LEADER}: AttributeError: ")


NAIVE = {
    "additive": "linear_attn",
    "decay": "simple_gla",
    "gated_delta": "gated_delta_rule",
    "kda": "kda",
}


@pytest.mark.parametrize("rule", peers.FLA)
def test_the_leader_itself(rule, monkeypatch):
    """If it is installed, it takes all our arguments, and its references on a CPU give our results."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is no GPU
        pytest.importorskip("fla")
        folder = peers.FLA[rule][0]
        module = import_module(f"fla.ops.{folder}")
        naive = getattr(import_module(f"fla.ops.{folder}.naive"), f"naive_recurrent_{folder}", None)
    gates = {"gla": ("g", "gk"), "decay": ("g",)}.get(rule, ("g", "beta"))
    equation = naive if rule in NAIVE else documented(rule, *gates)
    for form in ("chunk_", "fused_recurrent_"):
        signature = inspect.signature(getattr(module, form + folder))

        def call(*inputs, signature=signature, **options):
            given = signature.bind(*inputs, **options).arguments
            assert not given.keys() & {"kwargs", "head_first"}  # unknown arguments would be ignored silently
            given.pop("use_qk_l2norm_in_kernel", None)
            return equation(**given)

        monkeypatch.setattr(module, form + folder, call)
    for point in PEER_POINTS:
        if point.rule == rule and point.feature_norm is None:
            found, notes = peers.calls(point)
            assert notes == []
            check_peer(point, found[peers.LEADER])


# ---- goals ----


def row(ours, limit=None, **given):
    point = Point(**{"rule": "additive", "B": 16, "T": 4096, "H": 8, "D": 128} | given.pop("point", {}))
    seconds = {"ours": ours} | given.pop("peers", {})
    made = speed.blank(point) | {"seconds": seconds, "limit": limit, "operations": speed.work(point, True)[1]}
    return made | given


def held(rows):
    return {goal["work"].split(",")[0].split(":")[0]: goal["holds"] for goal in report.verdicts(rows)}


def test_goals():
    leader = peers.LEADER
    assert set(held([]).values()) == {None}
    fast = row(1.0, 0.5, peers={leader: 2.5})
    assert held([fast])["additive"] is True
    assert held([fast, row(1.0, 0.5, peers={leader: 1.5})])["additive"] is False  # the worst counts
    assert held([row(1.0, 0.3, peers={leader: 2.5})])["additive"] is False  # too far from the limit
    assert held([fast, row(1.0, 0.5)])["additive"] is None  # no peer was measured
    assert held([fast, row(1.0, 0.5) | {"red": "wrong", "seconds": {}}])["additive"] is False
    (goal,) = [goal for goal in report.verdicts([fast]) if goal["rows"]]
    assert (goal["faster"], goal["times the limit"], goal["rows"]) == (2.5, 2.0, 1)


def test_the_goals_of_wide_heads():
    wide = {"D": 256}
    ratio = (
        speed.work(Point("additive", 16, 4096, 8, 256), True)[1]
        / speed.work(Point("additive", 16, 4096, 8, 128), True)[1]
    )
    assert held([row(1.0), row(0.99 * ratio, point=wide)])["D = 256 never slower than D = 128 scaled by its operations"]
    assert (
        held([row(1.0), row(1.01 * ratio, point=wide)])["D = 256 never slower than D = 128 scaled by its operations"]
        is False
    )


def test_every_goal_has_points(monkeypatch):
    """Each goal has points in the list that is measured on a GPU."""
    monkeypatch.undo()
    made = []
    for point in speed.points("cuda"):
        for kind in point.passes:
            made += [
                speed.blank(point) | {"pass": kind, "mode": mode} for mode in ("eager", "graph")[: 1 + point.graph]
            ]
    counts = {goal.work: sum(map(goal.about, made)) for goal in report.GOALS}
    assert min(counts.values()) > 0, counts


# ---- a run on a GPU, with fakes in place of the GPU ----


def test_a_run_on_a_gpu(tmp_path, fakes, monkeypatch, capsys):
    """All steps of a run on a GPU, with fakes: processes that compile, peers, events, graphs, goals."""
    drawn = testing.sample
    monkeypatch.setattr(testing, "sample", lambda *a, device="cpu", **options: drawn(*a, **options))
    monkeypatch.setattr(Point, "dtype", torch.float32)
    todo = [
        Point("decay", 1, 8, 1, 8, cold=True),
        Point("decay", 1, 8, 1, 8, graph=True),
        Point("delta", 64, 1, 1, 128, graph=True),
        Point("additive", 1, 9, 1, 8, feature_map="elu+1", denominator=True),
        Point("kda", 1, 9, 1, 8),
    ]
    monkeypatch.setattr(speed, "points", lambda device: todo)
    asked, replayed = [], []

    def child(task, point, who, until, environment):
        asked.append((task, point.rule, who))
        if task == "ready" and point.rule == "kda":
            return 99.0, None
        return 1.0, json.dumps(
            {"seconds": 12.0 if who == peers.LEADER else 1.0, "import": 3.0}
        ) if task == "cold" else "2"

    monkeypatch.setattr(precompile, "run_child", child)
    monkeypatch.setattr(precompile, "find_spec", lambda name: True)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0)
    for name, value in {
        "Event": lambda enable_timing: event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda: "Some GPU 9000",
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(speed.SPREAD, "cuda", 2**12)
    file = tmp_path / "rows.json"
    assert speed.main("cpu", json_file=file) == 0  # none of the above runs on a CPU
    assert asked.pop() == ("cold", "decay", "ours") and asked == []
    assert speed.main("cuda", peers=True, json_file=file) == 0
    found = json.loads(file.read_text())
    passes = [(row["rule"], row["pass"], row["mode"]) for row in found["rows"]]
    assert passes == [
        ("decay", "first call", "eager"),
        *(("decay", kind, mode) for kind in ("forward", "forward + backward") for mode in ("eager", "graph")),
        ("delta", "step", "eager"),
        ("delta", "step", "graph"),
        *(("additive", kind, "eager") for kind in ("forward", "forward + backward")),
        *(("kda", kind, "eager") for kind in ("forward", "forward + backward")),
    ]
    for row in found["rows"]:
        late, backward = row["rule"] == "kda", row["pass"] == "forward + backward"
        assert (peers.LEADER in row["seconds"]) == (not late and not backward), row
        assert ("peers not compiled in time" in row["note"]) == late
        assert ("backward, eager: RuntimeError" in row["note"]) == (
            backward and not late
        )  # the oracle has no gradients
        assert row["card"] == "Some GPU 9000"
    assert len(replayed) >= 4 * 3 * 3
    held = {goal["work"]: (goal["holds"], goal["faster"]) for goal in found["goals"]}
    assert held["first call, cold"] == (True, 12.0)
    printed = capsys.readouterr().out
    assert "held: first call, cold: 12.00 times as fast as flash-linear-attention (at least 10); 1 of 1 rows" in printed
    ready = {(rule, who) for task, rule, who in asked if task == "ready"}
    assert ready == {(rule, who) for rule in ("decay", "delta", "additive", "kda") for who in ("ours", peers.LEADER)}


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cdua"], "device: expected one of cpu, cuda, got 'cdua'; did you mean 'cuda'?"),
        (
            ["--json", "nowhere/rows.json"],
            "json: expected a file that can be written, got 'nowhere/rows.json': No such file or directory",
        ),
    ],
)
def test_bad_arguments_exit_2_before_any_work(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"fwp: {message}\n"


def test_tuning_says_what_it_finds(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(table_file=None, tuned_rows=lambda: [{"K": 64, "warps": 4}, {"K": 128, "warps": 8}])
    monkeypatch.setitem(sys.modules, "fwp_benchmarks.tune", found)
    assert main(["bench", "--tune"]) == 0
    assert capsys.readouterr().out == "K=64 warps=4\nK=128 warps=8\n"


def test_stopped_tuning_says_where_the_table_is(capsys, monkeypatch):
    def rows():
        yield {"K": 64, "warps": 4}
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fake = SimpleNamespace(tuned_rows=rows, table_file=lambda: "tiles.csv")
    monkeypatch.setitem(sys.modules, "fwp_benchmarks.tune", fake)
    assert main(["bench", "--tune"]) == 143
    out, err = capsys.readouterr()
    assert out == "K=64 warps=4\n"
    assert err == "Stopped. The block sizes found so far are in tiles.csv; the same command starts anew.\n"
