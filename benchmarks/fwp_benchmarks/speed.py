"""`fwp bench`: how long each rule takes, beside peers in the same run and the machine's limit.

What is measured is the list `points`. First comes whether a point is right: against the equation in float64 at a small
size, and by itself at its own; what is wrong is not timed. Then ours and the peers take turns, so that a ratio holds
when the machine's speed drifts. The limit of a point is what its fewest bytes or its operations take at the rates of a
large copy and a large matrix product, measured in the same run. On a GPU the kernels of all points are compiled
beforehand, in processes side by side; whatever the time does not suffice for is left out and said.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fwp
from fwp import feature_maps, functional, testing
from fwp._torch_private import tree_leaves
from fwp.core import state_dtype
from fwp.measure import row_error
from fwp.rules import RULES

from . import peers as others
from .beforehand import Beforehand, first_call
from .peers import LEADER, Call, in_a_line

Row = dict[str, Any]

CHUNK = 64  # the chunk whose operations count as necessary
ROUNDS = 30  # at most, of everybody taking turns …
SECONDS = 0.5  # … until these are over, but 3 rounds at least
TOTAL = 540.0  # seconds that a whole run may take …
BEFOREHAND = 240.0  # … and of these, with peers, what compiles beforehand
SPREAD = {"cpu": 0, "cuda": 2**28}  # bytes of all inputs in rotation, so that no cache holds them

FORWARD, BOTH, STEP, COLD = "forward", "forward + backward", "step", "first call"


@dataclass(frozen=True)
class Point:
    """A rule with what belongs to it, at a size: B sequences of T tokens, H heads of D key and value features.

    graph: in a CUDA graph as well. cold: only the first call of a process whose kernels nobody has compiled yet.
    """

    rule: str
    B: int
    T: int
    H: int
    D: int
    device: str = "cuda"
    feature_map: str | None = None
    feature_norm: str | None = None
    denominator: bool = False
    graph: bool = False
    cold: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """For `fwp.fast_weights`."""
        names = ("feature_map", "feature_norm", "denominator")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def what(self) -> str:
        """The rule and what belongs to it, in words."""
        more = [self.feature_map, self.feature_norm, "denominator" if self.denominator else None]
        return " + ".join([self.rule, *(name for name in more if name)])

    @property
    def passes(self) -> tuple[str, ...]:
        return (COLD,) if self.cold else (STEP,) if self.T == 1 else (FORWARD, BOTH)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def width(self) -> int:
        """K', the features of a key after the feature map."""
        return feature_maps.get(self.feature_map)(torch.zeros(self.D)).shape[-1]


def points(device: str) -> list[Point]:
    """What is measured, most important first: the time may not suffice for the last."""
    if device == "cpu":
        cpu = partial(Point, B=1, H=4, device="cpu")
        return [
            *(cpu(rule, T=T, D=D) for D in (64, 128) for T in (512, 2048) for rule in RULES),
            *(cpu("additive", T=512, D=64, feature_map=phi, denominator=True) for phi in ("elu+1", "dpfp-3")),
            cpu("gated_delta", T=1, D=128),
            cpu("gated_delta", T=512, D=64, cold=True),
        ]
    full, small = (partial(Point, B=B, T=T, H=8) for B, T in ((16, 4096), (1, 256)))
    six = ("additive", "gated_delta", "kda", "decay", "delta", "gla")
    maps = [(D, phi) for D in (64, 32, 16) for phi in ("dpfp-3", "elu+1")]
    return [
        *(Point(rule, 1, 4096, 8, 128, cold=True) for rule in ("additive", "gated_delta")),
        *(full(rule, D=128) for rule in six[:5]),
        *(Point(rule, 64, 1, 32, 128, graph=True) for rule in ("additive", "delta", "gated_delta", "kda")),
        *(full("additive", D=D, feature_map=phi, denominator=True) for D, phi in maps),
        *(full(rule, D=64) for rule in ("additive", "decay")),
        *(small(rule, D=128, graph=True) for rule in six[:5]),
        small("additive", D=64, feature_map="elu+1", denominator=True, graph=True),
        *(
            Point(rule, min(64, 65536 // T), T, 8, 128)
            for T in (65536, 16384, 1024)
            for rule in ("additive", "gated_delta")
        ),
        full("gated_delta", D=128, feature_norm="l2"),
        *(full(rule, D=256) for rule in ("additive", "gated_delta", "kda", "delta")),
        *(full(rule, D=64) for rule in ("gated_delta", "kda", "delta")),
        full("gla", D=128),
    ]


# ---- limits ----


def work(point: Point, backward: bool) -> tuple[float, float]:
    """The fewest bytes through memory, and the operations of the chunk form's matrix products, of a pass.

    Bytes: each input read and each result written once, the final state among them. Operations, a token and head, with
    products over whole chunks of C: QKᵀ, its product with V, Q S and Kᵀ V; a rule that erases has K Kᵀ, K S and two
    products with the triangular inverse as well. The backward has two products for each of the forward's, after those
    of the forward whose results it needs.
    """
    K, V, C = point.width, point.D, min(CHUNK, point.T)
    tokens, heads, kept = point.B * point.T * point.H, point.B * point.H, state_dtype(point.dtype).itemsize
    rows = 2 * point.D + V  # q, k, v: the feature map needs not lie in memory
    gates = sum(K if gate.shape == "BTHK" else 1 for gate in RULES[point.rule].gates.values())
    state = K * V + (K if point.denominator else 0)
    erases = RULES[point.rule].erases
    if backward:
        numbers, moved = 2 * rows + V, 2 * gates * kept * tokens
        counted = 18 * C * K + 10 * C * V + 16 * K * V if erases else 6 * C * K + 4 * C * V + 10 * K * V
    else:
        numbers, moved = rows + V, gates * kept * tokens + state * kept * heads * (2 if point.T == 1 else 1)
        counted = 6 * C * K + 4 * C * V + 6 * K * V if erases else 2 * C * (K + V) + 4 * K * V
    return float(numbers * point.dtype.itemsize * tokens + moved), float(counted * tokens)


def limit(point: Point, backward: bool, ceilings: tuple[float, float]) -> float:
    """Seconds that no implementation of a pass beats: forward, or forward and backward."""
    passes = (False, True) if backward else (False,)
    return sum(max(amount / rate for amount, rate in zip(work(point, x), ceilings)) for x in passes)


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a large matrix product."""
    n, numbers = (8192, 2**28) if device == "cuda" else (1024, 2**24)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x = torch.zeros(numbers, device=device, dtype=dtype)
    y = torch.empty_like(x)
    copied, multiplied = (min(timed(run, device) for _ in range(10)) for run in (lambda: y.copy_(x), lambda: a @ b))
    return 2 * numbers * dtype.itemsize / copied, 2 * n**3 / multiplied


# ---- whether it is right ----


@cache
def wrong(point: Point) -> float | None:
    """The worst error over its bound, of output, state or a gradient; None if there is none. For small points."""
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
        state=True,  # else the first token's output does not depend on q under a denominator, and dq is rounding alone
    )
    how: dict[str, Any] = point.options | {"gradients": not step}
    truth = testing.evaluate(point.rule, testing.cast(draw(), torch.float64), backend="reference", **how)
    exact = point.dtype == torch.float32
    bounds = dict.fromkeys(truth, 3e-4) if exact else testing.budgets(point.rule, draw(), **point.options)
    found = testing.evaluate(point.rule, draw(device=point.device), **how)
    errors = {name: row_error(found[name].cpu(), x) for name, x in truth.items()}
    return max((error for name, error in errors.items() if error > bounds[name]), default=None)


def inconsistent(point: Point, x: dict[str, Any], d_o: Tensor) -> str | None:
    """What is amiss at the point's own size: not finite, other bits at a second run, other halves than the whole."""

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
    bound = 3e-3 if point.dtype == torch.float32 else 0.1  # a chunk gone wrong is far beyond
    return None if off <= bound else f"two halves differ from the whole by {off:.1e}"


# ---- how long it takes ----


def inputs(point: Point, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Random arguments of `fwp.fast_weights` and a gradient of the output: few tokens over and over, quickly drawn."""
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
    """Backend and form that `fast_weights` takes of itself."""
    taken: list[tuple[str, str]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        found = functional_choose(*arguments, **options)
        taken.append(found[:2])
        return found

    functional_choose = functional.choose
    with mock.patch.object(functional, "choose", watched), torch.no_grad():
        ours(point)(x)
    return taken[-1]


def gradients(out: Tensor, x: dict[str, Any], d_o: Tensor) -> tuple[Tensor, ...]:
    """Of every input that has one; softmax attention has none for gates."""
    leaves = [y for y in x.values() if isinstance(y, Tensor)]
    return torch.autograd.grad(out, leaves, d_o, allow_unused=True)


def through(call: Call, sets: list[tuple[dict[str, Any], Tensor]], backward: bool) -> None:
    """One call for each set of inputs."""
    with torch.set_grad_enabled(backward):
        for x, d_o in sets:
            out = call(x)
            if backward:
                gradients(out, x, d_o)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call, by the device's own clock on a GPU."""
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
    """The same in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lap()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lap()
    return lambda: graph.replay()


def compared(laps: dict[str, Callable[[], None]], calls: int, device: str) -> dict[str, list[float]]:
    """Seconds of a call in each round, everybody taking turns; the first round warms up."""
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
    """The rows of a point: a pass each, eager or in a graph; one without times if it is wrong."""
    row = blank(point)
    if off := wrong(replace(point, B=1, T=min(point.T, 80), H=2, graph=False)):
        yield row | {"red": f"not timed, it is wrong by {off:.1e}"}
        return
    x, d_o = inputs(point)
    if amiss := inconsistent(point, x, d_o):
        yield row | {"red": f"not timed: {amiss}"}
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
                lap = partial(through, call, sets, kind == BOTH)
                try:
                    lap()
                    laps[name] = graphed(lap) if mode == "graph" else lap
                except Exception as error:
                    if name == "ours":
                        raise
                    notes.append(f"{name}, {kind}, {mode}: {in_a_line(error)}")
            times = compared(laps, count, point.device)
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
    """Ours, softmax attention and the peers whose result is ours; and why others don't come."""
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
                except Exception as error:  # a peer that is broken breaks nothing of ours
                    notes.append(f"{name}: {in_a_line(error)}")
    return calls, notes


def cold(point: Point, who: str) -> dict[str, float]:
    """Seconds of the first forward and backward of this process, and of the peer's import before it."""
    x, d_o = inputs(point)
    started = time.perf_counter()
    call = ours(point) if who == "ours" else others.PEERS[who](point)
    imported = time.perf_counter()
    assert call is not None, who
    gradients(call(x), x, d_o)
    if point.device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - imported, "import": imported - started}


# ---- all of it ----


def rows(device: str, peers: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[Row]:
    """All measurements, point by point; "red" says what is wrong, "note" what is missing."""
    started = time.monotonic()
    todo = points(device)
    machine = describe(device)
    rates = ceilings(device, todo[0].dtype)
    machine |= {"bytes_per_second": rates[0], "operations_per_second": rates[1]}
    say(f"{machine['card']}: copies {rates[0] / 1e12:.2f} TB/s, multiplies {rates[1] / 1e12:.1f} TFLOP/s")
    before = Beforehand(todo, device, peers, started + BEFOREHAND * (1 if peers else 0.6))
    costs = [20.0]
    for done, point in enumerate(todo, 1):
        left = started + TOTAL - time.monotonic()
        begun = time.monotonic()
        row = blank(point)
        found: list[Row] = []
        if point.cold:
            found = [row | first_call(before.cold[point])]
            found[0]["note"] = "; ".join(filter(None, (found[0]["note"], before.note)))
        elif left < max(costs[-3:]):
            found = [row | {"note": "left out, no time"}]
        else:
            with_peers = peers and before.serves(point, LEADER)
            try:
                for made in measure(point, rates, with_peers):
                    found.append(made)
            except Exception as error:
                found.append(row | {"red": in_a_line(error)})
            if peers and not with_peers:
                for made in found:
                    made["note"] = "; ".join(filter(None, (made.get("note"), "peers not compiled in time")))
            costs.append(time.monotonic() - begun)
        if device == "cuda":
            torch.cuda.empty_cache()
        left = started + TOTAL - time.monotonic()
        say(f"{done} of {len(todo)}, {left:.0f} s left: {point.what}, T {point.T}, D {point.D}: {told(found)}")
        for made in found:
            yield made | machine


def told(found: list[Row]) -> str:
    """The times of a point's rows in words."""
    words = []
    for row in found:
        ms = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in row["seconds"].items())
        words.append(row.get("red") or f"{row['pass']}: {ms or row['note']}")
    return "; ".join(words)


def describe(device: str) -> Row:
    """The machine, and the versions of everything."""
    folder = Path(fwp.__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not from a checkout
        commit = None
    threads = torch.get_num_threads()
    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {"card": card, "versions": others.versions() | {"fwp": fwp.__version__}, "commit": commit}


def main(device: str | None = None, peers: bool = False, json_file: Path | None = None) -> int:
    """Prints times as they are measured, then a table; writes the rows as JSON and draws beside it; 1 if one is red."""
    from rich.console import Console

    from . import speed_report as report

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    found: list[Row] = []
    goals: list[dict[str, Any]] = []
    for row in rows(device, peers, lambda line: console.print(line, markup=False, soft_wrap=True)):
        found.append(row)
        goals = report.verdicts(found) if device == "cuda" else []
        if json_file is not None:  # whatever stops a run, what was measured is kept
            text = json.dumps({"rows": found, "goals": goals}, indent=1, allow_nan=False)
            json_file.write_text(text + "\n", encoding="utf-8")
    console.print(report.table(found))
    for goal in goals:
        console.print(report.in_words(goal), markup=False, soft_wrap=True)
    console.print(
        f"PyTorch {torch.__version__} on {found[0]['card']}; medians of up to {ROUNDS} rounds.", soft_wrap=True
    )
    if json_file is not None and find_spec("matplotlib") is not None:
        for path in report.plots(found, json_file):
            console.print(f"Drawn: {path}", soft_wrap=True)
    return int(any(row.get("red") for row in found))


if __name__ == "__main__":
    task, given, who = sys.argv[1:]
    if task == "cold":
        print(json.dumps(cold(Point(**json.loads(given)), who)))
    else:
        print(len(list(measure(Point(**json.loads(given)), (1.0, 1.0), who != "ours"))))
