"""`fwp bench`: times each rule, beside peers in the same run and beside the limit of the machine.

`fwp_benchmarks.points` lists what is measured. Each point is checked first: at a small size against the equation in
float64, and at its own size for consistency. A point that is wrong is not timed. Then our op and the peers take turns,
so that their ratio holds even when the machine's speed drifts. The limit of a point is the time for its fewest bytes at
the rate of a large copy, or for its operations at the rate of a large matrix product, whichever is longer. These rates
are measured in the same run. On a GPU the kernels of all points are compiled beforehand, in processes side by side. A
point for which no time is left is listed as left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fwp
from fwp import testing
from fwp._torch_private import tree_leaves
from fwp.core import state_dtype
from fwp.measure import result_error, row_error
from fwp.observe import ObservedCall, observing
from fwp.rules import RULES

from . import peers as others
from .peers import LEADER, Call, in_a_line
from .points import BOTH, Point, points
from .precompile import Precompiler, first_call
from .results import write_whole

Row = dict[str, Any]

CHUNK = 64  # the limit counts the operations of chunks of this size
ROUNDS = 30  # at most so many rounds per pass; in a round everybody takes a turn
SECONDS = 0.5  # per function of a pass; at least 3 rounds are run
TOTAL = 540.0  # seconds of a whole run
PRECOMPILE = 240.0  # seconds of these for compiling, with peers
LATE = "peers not compiled in time"
SPREAD = {"cpu": 0, "cuda": 2**28}  # inputs rotate through so many bytes, so that no cache holds them


# ---- limits ----


def work(point: Point, backward: bool) -> tuple[float, float]:
    """The fewest bytes that a pass moves, and the operations of the chunk form's matrix products.

    Bytes: each input is read once, and each result is written once, the final state included.
    Operations are counted per token and head, with products over whole chunks of C tokens. These are QKᵀ, its product
    with V, Q S and Kᵀ V. A rule that erases also has K Kᵀ, K S and two products with the triangular inverse. The
    backward has two products per product of the forward, and it repeats those of the forward whose results it needs.
    """
    K, V, C = point.width, point.D, min(CHUNK, point.T)
    tokens, heads, kept = point.B * point.T * point.H, point.B * point.H, state_dtype(point.dtype).itemsize
    numbers_in = 2 * point.D + V  # q, k and v per token and head; φ(q) and φ(k) need not be stored
    gates = sum({"BTH": 1, "BTHK": K, "BTHV": V}[gate.shape] for gate in RULES[point.rule].gates.values())
    state = K * V + (K if point.denominator else 0)
    erases = RULES[point.rule].erases
    if backward:
        numbers, moved = 2 * numbers_in + V, 2 * gates * kept * tokens
        counted = 18 * C * K + 10 * C * V + 16 * K * V if erases else 6 * C * K + 4 * C * V + 10 * K * V
    else:
        numbers, moved = numbers_in + V, gates * kept * tokens + state * kept * heads * (2 if point.T == 1 else 1)
        counted = 6 * C * K + 4 * C * V + 6 * K * V if erases else 2 * C * (K + V) + 4 * K * V
    return float(numbers * point.dtype.itemsize * tokens + moved), float(counted * tokens)


def limit(point: Point, backward: bool, ceilings: tuple[float, float]) -> float:
    """The seconds that no implementation can beat, of the forward or of forward and backward together."""
    passes = (False, True) if backward else (False,)
    return sum(max(amount / rate for amount, rate in zip(work(point, x), ceilings)) for x in passes)


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy (read plus written), and operations per second of a large product."""
    n, numbers = (8192, 2**28) if device == "cuda" else (1024, 2**24)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x = torch.zeros(numbers, device=device, dtype=dtype)
    y = torch.empty_like(x)
    copied, multiplied = (min(timed(run, device) for _ in range(10)) for run in (lambda: y.copy_(x), lambda: a @ b))
    return 2 * numbers * dtype.itemsize / copied, 2 * n**3 / multiplied


# ---- checks before timing ----


@cache
def worst_violation(point: Point) -> float | None:
    """The largest error of output, state or gradient beyond its bound. None: all are within bounds.

    The point must be small, because the reference computes it token by token.
    """
    step = point.T == 1
    draw = partial(
        testing.sample,
        point.rule,
        B=point.B,
        T=point.T,
        H=point.H,
        K=point.D,
        V=point.D,
        dtype=point.dtype,
        feature_map=point.feature_map,
        denominator=point.denominator,
        state=True,  # without one, dq of the first token is 0 under a denominator: only rounding would be compared
    )
    how: dict[str, Any] = point.options | {"gradients": not step}
    truth = testing.evaluate(point.rule, testing.cast(draw(), torch.float64), backend="reference", **how)
    exact = point.dtype == torch.float32
    bounds = dict.fromkeys(truth, 3e-4) if exact else testing.budgets(point.rule, draw(), **point.options)
    found = testing.evaluate(point.rule, draw(device=point.device), **how)
    errors = {name: result_error(name, found[name].cpu(), x) for name, x in truth.items()}
    return max((error for name, error in errors.items() if error > bounds[name]), default=None)


def inconsistency(point: Point, x: dict[str, Any], d_o: Tensor) -> str | None:
    """What is wrong at the point's own size, in words. None: nothing is.

    All results must be finite. On a GPU a second run must give the same bits. Two halves must give the whole's output.
    """

    def results() -> list[Tensor]:
        found = tree_leaves(fwp.fast_weights(point.rule, **x, **point.options))
        found = [y for y in found if isinstance(y, Tensor)]
        return found + (list(gradients(found[0], x, d_o)) if point.T > 1 else [])

    whole = results()
    if not all(y.isfinite().all() for y in whole):
        return "a result is not finite"
    if point.device == "cuda" and not all(map(torch.equal, whole, results())):
        return "two runs differ"
    if point.T == 1:
        return None
    cut, state, out = point.T // 2, None, []
    with torch.no_grad():
        for part in (slice(None, cut), slice(cut, None)):
            half = {name: y[:, part] for name, y in x.items()}
            o, state = fwp.fast_weights(point.rule, **half, **point.options, state=state)
            out.append(o)
    off = row_error(torch.cat(out, 1), whole[0])
    bound = 3e-3 if point.dtype == torch.float32 else 0.1  # wide, because the error of a wrong chunk is far larger
    return None if off <= bound else f"two halves differ from the whole by {off:.1e}"


# ---- timing ----


def inputs(point: Point, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Random arguments of `fwp.fast_weights`, and a gradient of the output.

    At most 64 tokens are drawn and then repeated, which is quicker.
    """
    few = min(point.T, 64)
    x = testing.sample(
        point.rule,
        B=1,
        T=few,
        H=point.H,
        K=point.D,
        V=point.D,
        seed=seed,
        dtype=point.dtype,
        device=point.device,
        feature_map=point.feature_map,
        denominator=point.denominator,
        state=point.T == 1,
    )
    state = x.pop("state", None)
    times = -(-point.T // few)
    x = {name: y.repeat(point.B, times, *[1] * (y.dim() - 2))[:, : point.T].contiguous() for name, y in x.items()}
    d_o = x["v"].roll(1, 1)
    for y in x.values():
        y.requires_grad_(point.T > 1)
    if state is not None:
        x["state"] = type(state)(*(None if y is None else y.repeat(point.B, *[1] * (y.dim() - 1)) for y in state))
    return x, d_o


def ours(point: Point) -> Call:
    """The rule as `fast_weights` runs it."""
    return lambda x: fwp.fast_weights(point.rule, **x, **point.options)[0]


def chosen(point: Point, x: dict[str, Any]) -> tuple[str, str]:
    """The backend and form that `fast_weights` chooses."""
    calls: list[ObservedCall] = []
    with observing(calls.append), torch.no_grad():
        ours(point)(x)
    return calls[-1].backend, calls[-1].form


def gradients(out: Tensor, x: dict[str, Any], d_o: Tensor) -> tuple[Tensor, ...]:
    """The gradient of every input. It is None if the input is not used: softmax attention has no gates."""
    leaves = [y for y in x.values() if isinstance(y, Tensor)]
    return torch.autograd.grad(out, leaves, d_o, allow_unused=True)


def run_all(call: Call, sets: list[tuple[dict[str, Any], Tensor]], backward: bool) -> None:
    """Makes one call per set of inputs."""
    with torch.set_grad_enabled(backward):
        for x, d_o in sets:
            out = call(x)
            if backward:
                gradients(out, x, d_o)


def timed(run: Callable[[], Any], device: str) -> float:
    """The seconds of one call. On a GPU they are measured by its own clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def graphed(lap: Callable[[], None]) -> Callable[[], None]:
    """Captures a lap in a CUDA graph, and returns a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lap()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lap()
    return lambda: graph.replay()


def times_by_turns(laps: dict[str, Callable[[], None]], calls: int, device: str) -> dict[str, list[float]]:
    """Seconds per call in each round. In a round, each takes one turn. The first round only warms up.

    laps: the functions to time, by name. calls: the number of calls that a lap makes.
    """
    found: dict[str, list[float]] = {name: [] for name in laps}
    until = time.monotonic() + SECONDS * len(laps)
    for round_ in range(ROUNDS + 1):
        for name, lap in laps.items():
            seconds = timed(lap, device) / calls
            if round_:
                found[name].append(seconds)
        if round_ >= 3 and time.monotonic() > until:
            break
    return found


def measure(point: Point, rates: tuple[float, float], peers: bool) -> Iterator[Row]:
    """The rows of a point, one per pass and mode (eager or in a graph).

    If the point is wrong, it has a single row without times.
    """
    with others.separate():
        yield from _measure(point, rates, peers)


def _measure(point: Point, rates: tuple[float, float], peers: bool) -> Iterator[Row]:
    row = blank(point)
    if off := worst_violation(replace(point, B=1, T=min(point.T, 80), H=2, graph=False)):
        yield row | {"red": f"not timed, it is wrong by {off:.1e}"}
        return
    x, d_o = inputs(point)
    if reason := inconsistency(point, x, d_o):
        yield row | {"red": f"not timed: {reason}"}
        return
    row["backend"], row["form"] = chosen(point, x)
    size = sum(y.nbytes for y in tree_leaves([x, d_o]) if isinstance(y, Tensor))
    count = min(16, max(2, -(-SPREAD[point.device] // size))) if SPREAD[point.device] else 1
    sets = [(x, d_o), *(inputs(point, seed) for seed in range(1, count))]
    calls, notes = callers(point, x, peers)
    for kind in point.passes:
        for mode in ("eager", "graph") if point.graph and point.device == "cuda" else ("eager",):
            laps: dict[str, Callable[[], None]] = {}
            for name, call in calls.items():
                lap = partial(run_all, call, sets, kind == BOTH)
                try:
                    lap()
                    laps[name] = graphed(lap) if mode == "graph" else lap
                except Exception as error:
                    if name == "ours":
                        raise
                    notes.append(f"{name}, {kind}, {mode}: {in_a_line(error)}")
            times = times_by_turns(laps, count, point.device)
            yield row | {
                "pass": kind,
                "mode": mode,
                "seconds": {name: statistics.median(found) for name, found in times.items()},
                "times": times,
                "operations": sum(work(point, x)[1] for x in ((False, True) if kind == BOTH else (False,))),
                "limit": limit(point, kind == BOTH, rates),
                "note": "; ".join(notes),
            }


def blank(point: Point) -> Row:
    """A row without times."""
    row = asdict(point) | {"what": point.what, "dtype": str(point.dtype).removeprefix("torch.")}
    return row | {"pass": point.passes[-1], "mode": "eager", "seconds": {}, "times": {}, "limit": None, "note": ""}


def callers(point: Point, x: dict[str, Any], peers: bool) -> tuple[dict[str, Call], list[str]]:
    """The functions to time: ours, softmax attention, and the peers whose result agrees with ours.

    Also returns notes that say why other peers are left out.
    """
    calls, notes = {"ours": ours(point)}, list[str]()
    if softmax := others.softmax(point):
        calls["softmax"] = softmax
    if peers:
        more, notes = others.calls(point)
        with torch.no_grad():
            truth = calls["ours"](x).double()
            for name, call in more.items():
                try:
                    off = float((call(x) - truth).norm() / truth.norm())
                    if not off < 0.05:
                        raise ValueError(f"another result, by {off:.2f}")
                    calls[name] = call
                except Exception as error:  # a broken peer must not stop our own measurement
                    notes.append(f"{name}: {in_a_line(error)}")
    return calls, notes


def cold(point: Point, who: str) -> dict[str, float]:
    """The seconds of this process's first forward and backward, and of importing the peer before it."""
    x, d_o = inputs(point)
    with others.separate():
        started = time.perf_counter()
        call = ours(point) if who == "ours" else others.PEERS[who](point)
        imported = time.perf_counter()
        assert call is not None, who
        gradients(call(x), x, d_o)
        if point.device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - imported, "import": imported - started}


# ---- the command ----


def measurements(
    todo: list[Point], device: str, machine: Row, peers: bool, say: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[Point, list[Row]]]:
    """The rows of each point. In a row, "red" says what is wrong, and "note" what is missing.

    say: called with one line per finished point.
    """
    started = time.monotonic()
    rates = ceilings(device, todo[0].dtype)
    machine = machine | {"bytes_per_second": rates[0], "operations_per_second": rates[1]}
    say(f"{machine['card']}: copies {rates[0] / 1e12:.2f} TB/s, multiplies {rates[1] / 1e12:.1f} TFLOP/s")
    compiled = Precompiler(todo, device, peers, started + PRECOMPILE * (1 if peers else 0.6))
    costs = [20.0]
    for done, point in enumerate(todo, 1):
        left = started + TOTAL - time.monotonic()
        begun = time.monotonic()
        row = blank(point)
        found: list[Row] = []
        if point.cold:
            found = [row | first_call(compiled.cold[point])]
            found[0]["note"] = "; ".join(filter(None, (found[0]["note"], compiled.note)))
        elif left < max(costs[-3:]):
            found = [row | {"note": "left out, no time"}]
        else:
            with_peers = peers and compiled.serves(point, LEADER)
            try:
                for made in measure(point, rates, with_peers):
                    found.append(made)
            except Exception as error:
                found.append(row | {"red": in_a_line(error)})
            if peers and not with_peers:
                for made in found:
                    made["note"] = "; ".join(filter(None, (made.get("note"), LATE)))
            costs.append(time.monotonic() - begun)
        if device == "cuda":
            torch.cuda.empty_cache()
        left = started + TOTAL - time.monotonic()
        say(
            f"{done} of {len(todo)}, {left:.0f} s left: {point.what}, T {point.T}, D {point.D}: {times_in_words(found)}"
        )
        yield point, [made | machine for made in found]


def kept_rows(json_file: Path | None, todo: list[Point], machine: Row) -> dict[Point, list[Row]]:
    """The rows of points that an earlier run timed wholly, with this code on this machine."""
    try:
        rows = json.loads(json_file.read_text(encoding="utf-8"))["rows"] if json_file is not None else []
        by_settings: dict[str, list[Row]] = {}
        for row in rows:
            by_settings.setdefault(_settings(row, machine), []).append(row)
        found = {point: by_settings.get(_settings(blank(point) | machine, machine), []) for point in todo}
        return {
            point: rows
            for point, rows in found.items()
            if rows and all(row["seconds"] and not row.get("red") and LATE not in row["note"] for row in rows)
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no file of this command
        return {}


def _settings(row: Row, machine: Row) -> str:
    """What determines the times of a row, as text."""
    names = [*(field.name for field in fields(Point)), *machine]
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def times_in_words(found: list[Row]) -> str:
    """The times of a point, from its rows."""
    words = []
    for row in found:
        ms = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in row["seconds"].items())
        words.append(row.get("red") or f"{row['pass']}: {ms or row['note']}")
    return "; ".join(words)


def describe_machine(device: str, peers: bool) -> Row:
    """What a time depends on beside its point: the processor, the packages, and the source code of fwp."""
    folder = Path(fwp.__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not from a checkout
        commit = None
    threads = torch.get_num_threads()
    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    versions = others.versions() | {"fwp": fwp.__version__}
    return {
        "card": card,
        "processor": processor(),
        "versions": versions,
        "commit": commit,
        "code": code(),
        "peers": peers,
    }


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def code() -> str:
    """A hash of the sources of fwp, its kernels and its benchmarks."""
    specs = [find_spec(name) for name in ("fwp", "fwp_kernels", "fwp_benchmarks")]
    folders = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    sources = [path.read_bytes() for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:12]


def main(device: str | None = None, peers: bool = False, json_file: Path | None = None) -> int:
    """Prints the times as they are measured, then a table. Returns the exit status: 1 if a row is red.

    device: None takes the GPU if there is one. json_file: receives the rows; plots are drawn beside it. Points that it
    already has from the same machine and code are not timed again.
    """
    from rich.console import Console

    from . import speed_report as report

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)
    say = partial(console.print, markup=False, soft_wrap=True)
    todo, machine = points(device), describe_machine(device, peers)
    there = kept_rows(json_file, todo, machine)
    if there:
        say(f"{len(there)} of {len(todo)} points are there already; to time them anew, delete {json_file}")
    missing = [point for point in todo if point not in there]
    for point, rows in measurements(missing, device, machine, peers, say) if missing else ():
        there[point] = rows
        if json_file is not None:  # after each point, so that a stopped run keeps what it has measured
            found = [row for point in todo for row in there.get(point, ())]
            result = {"rows": found, "goals": report.verdicts(found) if device == "cuda" else []}
            write_whole(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")
    found = [row for point in todo for row in there[point]]
    report.show(found, console)
    for goal in report.verdicts(found) if device == "cuda" else []:
        say(report.in_words(goal))
    say(f"PyTorch {torch.__version__} on {found[0]['card']}; medians of up to {ROUNDS} rounds.")
    if json_file is not None and find_spec("matplotlib") is not None:
        for path in report.plots(found, json_file):
            say(f"Drawn: {path}")
    return int(any(row.get("red") for row in found))


if __name__ == "__main__":
    task, given, who = sys.argv[1:]
    if task == "cold":
        print(json.dumps(cold(Point(**json.loads(given)), who)))
    else:
        print(len(list(measure(Point(**json.loads(given)), (1.0, 1.0), who != "ours"))))
