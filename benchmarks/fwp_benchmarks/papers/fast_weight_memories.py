"""Can one net learn to write the weights of another? The two experiments of Schmidhuber 1991/92.

"Learning to control fast-weight memories: an alternative to dynamic recurrent networks", Neural Computation 4(1),
131-139, 1992; FKI-147-91, TU München, 1991. A slow net S writes the weights w of a fast net F. At step t, F answers
y(t) = F(x(t)) with w(t − 1). Then S gives the change □w(t), and w(t) = 1 / (1 + exp(−T (w(t − 1) + □w(t) − 0.5))).
S learns online by gradient descent on E(t) = ½ Σ (d(t) − y(t))². For that, ∂w/∂W_S is carried forward from step to step
(`fwp.nn.SlowFastNet.step_online`).

Nets. S and F are linear, without hidden units or biases. W_S starts uniform in (−0.1, 0.1), and w(0) = □w(0). In
version 1, S has one output per fast weight, which is □w. In version 2, S has outputs FROM_a per input and TO_b per
output of F, and □w_ab = FROM_a TO_b.
Flip-flop. Each step shows A, B or C. The right answer is 1 the first time that B follows an A, else 0. F has 3 inputs
and 1 output. S has 3 inputs, and 3 outputs (version 1) or 4 (version 2). Nothing is ever reset.
Parking. F has one input, which asks "where is my car?", and one output per parking slot, 3 in all. S sees 3 slot
detectors and 3 random bits. A detector is on only in the step in which the car is parked in its slot. Before each step,
driving ends with probability ¼, and so does business. F is asked at random steps of business.
Solved. A net has solved its task once E(t) ≤ 0.05 for 100 steps in a row. In parking, only the steps that ask count,
because F's answer is 0 at all others.

The paper reports one net of each kind. It doesn't say what x(0) was, how often it asked for the car (here at half of
the steps of business), or whether its "error" of 0.05 was E or |d − y|. In parking, |d − y| ≤ 0.05 would leave no net
at T = 5: there a fast weight to which nothing is written comes to rest at 0.855.

Here a net stops learning once it has solved its task. Then all nets are tested, as they are, on a new stream. A hundred
steps in a row can be luck. When flip-flop ran for 20,000 steps, 264 of 912 "solved" nets of version 1 were no latch,
and 113 didn't bridge the lag. So flip-flop ends after 5,000 steps, and the claim on lags is about nets that learned
within them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fwp.nn import SlowFastNet

from ..claims import Claim, Family, Outcome, Paper, Rows, Scale, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = Paper(
    "Schmidhuber 1992, Learning to control fast-weight memories: an alternative to dynamic recurrent networks, Neural "
    "Computation 4(1); FKI-147-91, 1991",
    not_attempted=("learning off-line, by unfolding in time",),
)

# ----------------------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Stream:
    """Steps 0 to L of N streams.

    slow, fast, target: the inputs of S, the inputs of F and the right answers, [L + 1, N, ·].
    scored: whether the step counts, [L + 1, N].
    """

    slow: Tensor
    fast: Tensor
    target: Tensor
    scored: Tensor


def flip_flop(generators: Sequence[torch.Generator], steps: int) -> Stream:
    """Streams of random events, one per generator."""
    return flip_flop_from(torch.stack([torch.randint(3, (steps + 1,), generator=g) for g in generators], 1))


def flip_flop_from(events: Tensor) -> Stream:
    """Streams of given events [L + 1, N]: 0 is A, 1 is B, 2 is C."""
    x = nn.functional.one_hot(events, 3).double()
    target, armed = torch.zeros(events.shape), torch.zeros(events.shape[1], dtype=torch.bool)
    for t in range(1, len(events)):
        target[t] = armed & (events[t] == 1)
        armed = (armed | (events[t] == 0)) & (events[t] != 1)
    return Stream(x, x, target.unsqueeze(2).double(), torch.ones(events.shape, dtype=torch.bool))


def parking(generators: Sequence[torch.Generator], steps: int, asked: float = 0.5) -> Stream:
    """Streams of a car owner's life, one per generator: driving, a step of parking, business, again.

    asked: the probability that F is asked at a step of business.
    """
    L, N = steps + 1, len(generators)
    chance = torch.stack([torch.rand(L, 3, generator=g) for g in generators], 1)  # for leaving, parking and asking
    bits = torch.stack([torch.randint(2, (L, 3), generator=g) for g in generators], 1)
    slots = torch.stack([torch.randint(3, (L,), generator=g) for g in generators], 1)
    detectors, target, ask = torch.zeros(L, N, 3), torch.zeros(L, N, 3), torch.zeros(L, N, dtype=torch.bool)
    slot, parked = torch.zeros(N, dtype=torch.long), torch.zeros(N, dtype=torch.bool)
    for t in range(1, L):
        leaves, parks, asks = chance[t].unbind(1)
        parked = parked & (leaves >= 0.25)
        ask[t] = parked & (asks < asked)
        target[t] = nn.functional.one_hot(slot, 3) * ask[t].unsqueeze(1)
        arrives = ~parked & (parks < 0.25)
        slot = torch.where(arrives, slots[t], slot)
        detectors[t] = nn.functional.one_hot(slot, 3) * arrives.unsqueeze(1)
        parked = parked | arrives
    return Stream(torch.cat([detectors, bits], 2).double(), ask.unsqueeze(2).double(), target.double(), ask)


# -------------------------------------------------------------------------------------------------------- the training

TOLERANCE, IN_A_ROW = 0.05, 100  # solved: E ≤ TOLERANCE for IN_A_ROW steps
TEST = 1000  # steps of the new stream
LAG = 1000  # steps between an A and its B, more than any net meets in training


@dataclass
class Run:
    """What N nets did in L steps.

    E: the error [L, N]. W: W_S at the end [N, ·, ·]. y: the answers [L, N, ·]. w: w(t) [L, N, fast weights].
    solved: per net, the step that completed 100 scored steps in a row with E ≤ 0.05; None if there was none.
    any: the same, but every step counts, scored or not.
    """

    E: Tensor
    W: Tensor
    y: Tensor
    w: Tensor
    solved: list[int | None]
    any: list[int | None]


def run(net: SlowFastNet, W: Tensor, stream: Stream, rate: float = 0.0) -> Run:
    """N nets learn online from W: W_S ← W_S − rate · ∂E(t)/∂W_S until a net solves its task.

    y and w are kept only at rate 0, because those of a long training would not fit into memory.
    """

    def step(slow: Any, carried: Any, rate: Tensor, x: Tensor, target: Tensor, fast_input: Tensor) -> Any:
        gradient, y, carried = net.step_online(slow, carried, x, target, fast_input)
        return {name: w - rate * gradient[name] for name, w in slow.items()}, carried, y

    N = W.shape[0]
    slow: Any = {"weight": W}
    carried = vmap(net.begin_online)(slow, stream.slow[0])
    rates = torch.full((N,), rate, dtype=W.dtype)
    given = list(zip(stream.slow[1:], stream.target[1:], stream.fast[1:]))
    # make_fx records the plain operations of a step once. Running the record takes a third of the time.
    all_nets = make_fx(vmap(step))(slow, carried, rates, *given[0])
    E: list[Tensor] = []
    y: list[Tensor] = []
    w: list[Tensor] = []
    row = {name: torch.zeros(N, dtype=torch.long) for name in ("solved", "any")}
    found: dict[str, list[int | None]] = {name: [None] * N for name in row}
    for t, (x, target, fast_input) in enumerate(given, 1):
        slow, carried, answer = all_nets(slow, carried, rates, x, target, fast_input)
        E.append(0.5 * (target - answer).square().sum(1))
        if not rate:
            y.append(answer)
            w.append(carried.weights["weight"].flatten(1))
        for name, counts in (("solved", stream.scored[t]), ("any", torch.ones(N, dtype=torch.bool))):
            row[name] = torch.where(E[-1] <= TOLERANCE, row[name] + counts, 0)
            for n in (counts & (row[name] == IN_A_ROW)).nonzero().flatten().tolist():
                found[name][n] = found[name][n] or t
        rates[row["solved"] >= IN_A_ROW] = 0
    if not torch.isfinite(slow["weight"]).all():
        raise FloatingPointError(f"a weight of S isn't finite after {t} steps at rate {rate}")
    kept_y, kept_w = (torch.stack(values) if values else torch.empty(0) for values in (y, w))
    return Run(torch.stack(E), slow["weight"], kept_y, kept_w, **found)


def judge_flip_flop(net: SlowFastNet, W: Tensor, test: Stream, tested: Run) -> dict[str, list[float]]:
    """How well each net works as a latch.

    good: the share of steps at which the fast weights are right: w_B is above ½ if and only if an A waits for its B,
    and w_A and w_C are below ½.
    after_lag: E at a B that follows its A after 1,000 C.
    """
    N = W.shape[0]
    armed, known = torch.zeros(2, N, dtype=torch.bool)  # known from the first A or B on
    good, steps = torch.zeros(2, N)
    for event, on in zip(test.slow[1:].bool(), tested.w > 0.5):
        a, b, _ = event.unbind(1)
        armed, known = (armed | a) & ~b, known | a | b
        good += known & (on[:, 1] == armed) & ~on[:, 0] & ~on[:, 2]
        steps += known
    events = torch.tensor([2, 0, *[2] * LAG, 1]).unsqueeze(1).expand(-1, N)
    return {"good": (good / steps).tolist(), "after_lag": run(net, W, flip_flop_from(events)).E[-1].tolist()}


def judge_parking(net: SlowFastNet, W: Tensor, test: Stream, tested: Run) -> dict[str, list[float]]:
    """How well each net remembers the car's slot.

    good: the share of questions at which the fast weight of the car's slot is above ½ and the other two are below.
    from_bits: the largest absolute weight of S from a random bit.
    """
    asked = test.scored[1:]
    right = ((tested.y > 0.5) == (test.target[1:] > 0.5)).all(2)  # where F is asked, y is w(t − 1)
    return {
        "good": ((right & asked).sum(0) / asked.sum(0)).tolist(),
        "from_bits": W[:, :, 3:].abs().amax((1, 2)).tolist(),
    }


@dataclass(frozen=True)
class Task:
    """A task: its streams, its judge, and its sizes.

    inputs: the numbers of inputs of S and of F. outputs: the number of outputs of F.
    window: steps per point of the learning curve.
    """

    stream: Callable[..., Stream]
    judge: Callable[[SlowFastNet, Tensor, Stream, Run], dict[str, list[float]]]
    inputs: tuple[int, int]
    outputs: int
    window: int


TASKS = {
    "flip-flop": Task(flip_flop, judge_flip_flop, (3, 3), 1, 100),
    "parking": Task(parking, judge_parking, (6, 1), 3, 500),
}


@torch.no_grad()
def train(settings: Settings) -> dict[str, Any]:
    """Trains nets side by side, each with a seed of its own, and tests them on a new stream."""
    task = TASKS[settings["task"]]
    (to_slow, to_fast), outputs = task.inputs, task.outputs
    program = nn.Linear(to_slow, to_fast * outputs if settings["version"] == 1 else to_fast + outputs, bias=False)
    fast = nn.Linear(to_fast, outputs, bias=False)
    net = SlowFastNet(program, fast, settings["version"], steepness=settings["steepness"])
    generators = [torch.Generator().manual_seed(settings["seed"] + n) for n in range(settings["nets"])]
    W = torch.stack([torch.rand(program.weight.shape, generator=g, dtype=torch.float64) for g in generators])
    options = {name: settings[name] for name in ("asked",) if name in settings}
    stream, test = (task.stream(generators, steps, **options) for steps in (settings["steps"], TEST))
    learnt = run(net, 0.2 * W - 0.1, stream, settings["rate"])
    tested = run(net, learnt.W, test)
    wrong = ((tested.E > TOLERANCE) & test.scored[1:]).sum(0) / test.scored[1:].sum(0)
    judged = {"wrong": wrong.tolist(), **task.judge(net, learnt.W, test, tested)}
    best = max(range(settings["nets"]), key=judged["good"].__getitem__)
    return {
        "solved": learnt.solved,
        "any": learnt.any,
        "curve": curve(learnt.E, stream.scored[1:], task.window),
        **{name: [float(f"{x:.4g}") for x in values] for name, values in judged.items()},
        "trace": trace(test, tested, best),
    }


def curve(E: Tensor, scored: Tensor, window: int) -> list[list[float]]:
    """The learning curve: per window of steps, the quartiles over nets of the mean E at scored steps.

    E, scored: [L, N].
    """
    at = torch.tensor([0.25, 0.5, 0.75], dtype=E.dtype)
    parts = zip(E.split(window), scored.split(window))
    means = ((errors * which).sum(0) / which.sum(0).clamp(min=1) for errors, which in parts)
    return [[float(f"{x:.3g}") for x in mean.quantile(at).tolist()] for mean in means]


def trace(test: Stream, tested: Run, n: int, steps: int = 80) -> dict[str, list[list[float]]]:
    """The first steps of net n in the test: inputs of S and F, target, answer, and the new fast weights."""
    seen = {"slow": test.slow[1:], "fast": test.fast[1:], "target": test.target[1:], "y": tested.y, "w": tested.w}
    return {name: [[round(value, 3) for value in now[n].tolist()] for now in x[:steps]] for name, x in seen.items()}


# ----------------------------------------------------------------------------------------------------------- the grids

# The settings that the paper states, but for η of version 2.
FLIP_FLOP: dict[int, dict[str, Any]] = {
    1: {"task": "flip-flop", "version": 1, "steepness": 10.0, "rate": 1.0},
    2: {"task": "flip-flop", "version": 2, "steepness": 10.0, "rate": 0.5},
}
# The scanned paper doesn't legibly state η of version 2. η = 1 is that of version 1.
SAME_RATE = FLIP_FLOP[2] | {"rate": 1.0}
PARKING = {"task": "parking", "version": 1, "steepness": 10.0, "rate": 0.02, "asked": 0.5}
GENTLE = PARKING | {"steepness": 5.0}


def runs(kinds: Sequence[Settings], nets: int, steps: int) -> list[dict[str, Any]]:
    """One run per kind, with all its nets side by side."""
    return [{**kind, "seed": 1, "nets": nets, "steps": steps} for kind in kinds]


FLIP_FLOP_GRID = [
    kind | change
    for kind in FLIP_FLOP.values()
    for change in (
        *({"steepness": T} for T in (5.0, 7.0, 8.0, 9.0, 12.0)),
        *({"rate": kind["rate"] * factor} for factor in (0.5, 2.0)),
    )
    if kind | change != SAME_RATE
]
PARKING_GRID = [
    PARKING | change
    for change in ({"asked": 0.25}, {"asked": 1.0}, {"rate": 0.05}, {"steepness": 8.0}, {"steepness": 6.0})
]
FLIP_FLOP_SCALES = {
    "smoke": Scale(runs([*FLIP_FLOP.values(), SAME_RATE], 2, 150), "seconds; shows that the code runs", False),
    "quick": Scale(runs([*FLIP_FLOP.values(), SAME_RATE], 100, 5000), "ten seconds; the paper’s task, 100 nets each"),
    "reduced": Scale(
        runs([*FLIP_FLOP.values(), SAME_RATE, *FLIP_FLOP_GRID], 100, 5000),
        "two minutes; also other steepness and learning rates",
    ),
    "paper": Scale(runs([*FLIP_FLOP.values(), SAME_RATE], 1000, 5000), "half a minute; 1,000 nets each"),
}
PARKING_SCALES = {
    "smoke": Scale(runs([PARKING, GENTLE], 2, 150), "seconds; shows that the code runs", False),
    "quick": Scale(runs([PARKING, GENTLE], 100, 20000), "half a minute; the paper’s task, 100 nets"),
    "reduced": Scale(
        runs([PARKING, GENTLE, *PARKING_GRID], 100, 20000),
        "minutes; also other steepness, learning rates and shares of questions",
    ),
    "paper": Scale(runs([PARKING, GENTLE], 200, 60000), "two minutes; 200 nets, 60,000 steps"),
}

# ---------------------------------------------------------------------------------------------------------- the claims

SOURCE = "section 3, one net"


def row_of_kind(rows: Rows, kind: Settings) -> Mapping[str, Any]:
    """The row of a kind of net in a grid."""
    return next(row for row in rows if all(row[name] == value for name, value in kind.items()))


def count_solved(row: Mapping[str, Any], name: str, limit: int) -> int:
    """How many nets solved the task within `limit` steps. name: "solved" or "any"."""
    return sum(step is not None and step <= limit for step in row[name])


def claim_on_steps(kind: Settings, published: int, why: str) -> Claim:
    """The claim that a net learns within the paper's number of steps.

    published: that number. why: the reason if the claim fails.
    """
    parking = kind["task"] == "parking"

    def measure(rows: Rows) -> Outcome:
        row = row_of_kind(rows, kind)
        nets, done = row["nets"], sorted(step for step in row["solved"] if step is not None)
        soon = count_solved(row, "solved", published)
        typical = median(done + [math.inf] * (nets - len(done)))
        measured = {
            f"within {published:,}:": f"{soon} of {nets}",
            "median": typical if math.isfinite(typical) else None,
            f"unsolved after {row['steps']:,}:": f"{nets - len(done)}",
        }
        if parking:
            measured[f"within {published:,} if every step counts:"] = f"{count_solved(row, 'any', published)} of {nets}"
        holds = soon >= nets / 4
        return Outcome(measured, holds, [done[0], done[-1]] if done else None, "" if holds else why)

    return Claim(
        f"{kind['task']}-steps-{kind['version']}" + ("-same-rate" if kind == SAME_RATE else ""),
        f"At T = {kind['steepness']:g} and η = {kind['rate']:g} version {kind['version']} learns the task within "
        f"{published:,} steps. Here: at least a quarter of the nets does, so the paper’s one net was no lucky draw.",
        published,
        SOURCE,
        "the step that completes 100 in a row with E ≤ 0.05, of parking only those that ask; median over all nets, an "
        "unsolved one being slower than any, range of the solved ones",
        measure,
    )


VERSIONS = {f"version {version}:": kind for version, kind in FLIP_FLOP.items()}
STEEPNESS = {f"T = {kind['steepness']:g}:": kind for kind in (PARKING, GENTLE)}


def share_of_solved(
    kinds: Mapping[str, Settings], good: Callable[[Mapping[str, Any], int], bool], least: float
) -> Callable[[Rows], Outcome]:
    """Measures how many of the nets that solved the task are good.

    kinds: by name. good: (row, number of the net) → whether the net is good. least: the share that each kind needs.
    """

    def measure(rows: Rows) -> Outcome:
        words, shares, others = {}, [], []
        for name, kind in kinds.items():
            row = row_of_kind(rows, kind)
            solved = [n for n, step in enumerate(row["solved"]) if step is not None]
            bad = [n for n in solved if not good(row, n)]
            words[name] = f"{len(solved) - len(bad)} of {len(solved)}"
            shares += [1 - len(bad) / len(solved)] if solved else []
            others += [row["wrong"][n] for n in bad]
        if not shares:
            return Outcome(words, None, note="no net solved the task")
        luck = (
            f"the median of the others errs at {median(others):.0%} of new steps: it passed by luck" if others else ""
        )
        return Outcome(words, min(shares) >= least, note=luck)

    return measure


def measure_steepness(rows: Rows) -> Outcome:
    found = {name: row_of_kind(rows, kind) for name, kind in STEEPNESS.items()}
    steep, gentle = (median(row["good"]) for row in found.values())
    spread = {name: [round(min(row["good"]), 2), round(max(row["good"]), 2)] for name, row in found.items()}
    bits = " and ".join(f"{median(row['from_bits']):.2g}" for row in found.values())
    note = f"S’s largest weight from a random bit, which should be 0, is {bits} in the median net"
    return Outcome(
        {name: round(median(row["good"]), 3) for name, row in found.items()}, steep < 0.9 <= gentle, spread, note
    )


# --------------------------------------------------------------------------------------------------------- the figures

COLOURS = ("#219ebc", "#e76f3c", "#2a9d4a")


def drawn(rows: Rows, kinds: Iterable[Settings]) -> Iterator[tuple[Settings, Mapping[str, Any], str]]:
    """The kinds that have a row, each with its row and colour. A stopped run leaves rows of some kinds only."""
    for kind, colour in zip(kinds, COLOURS):
        if any(kind.items() <= row.items() for row in rows):
            yield kind, row_of_kind(rows, kind), colour


def draw_flip_flop(rows: Rows) -> Figure:
    """When the nets solve the task, how E falls, and the latch in one net of each version."""
    figure, axes = panels(("version 1", "version 2"))
    for kind, row, colour in drawn(rows, [*FLIP_FLOP.values(), SAME_RATE]):
        if kind is SAME_RATE:
            learning(axes["solved"], axes["curve"], row, TASKS["flip-flop"], None, colour, "version 2, η = 1")
            continue
        name, published = f"version {kind['version']}", {1: 300, 2: 800}[kind["version"]]
        learning(axes["solved"], axes["curve"], row, TASKS["flip-flop"], published, colour, name)
        first = next(t for t, seen in enumerate(row["trace"]["slow"]) if seen[0])  # from the first A on, armed is known
        part = {what: values[first : first + 60] for what, values in row["trace"].items()}
        fast_weights(axes[name], part, "ABC", ["#1c2126"])
        armed = False
        for t, seen in enumerate(part["slow"]):
            event = "ABC"[seen.index(1)]
            axes[name].text(t, 1.2, event, ha="center", fontsize=8)
            armed = event == "A" or (armed and event != "B")
            if armed:
                axes[name].axvspan(t + 0.5, t + 1.5, color="#e9ecef", zorder=0)
    axes["curve"].set_ylim(0)
    axes["version 2"].set_xlabel("step of the test, its event above; grey: an A waits for its B")
    return figure


def draw_parking(rows: Rows) -> Figure:
    """When the nets solve the task, how E falls, and what one net of each steepness binds."""
    figure, axes = panels(("T = 10", "T = 5"))
    for kind, row, colour in drawn(rows, (PARKING, GENTLE)):
        name = f"T = {kind['steepness']:g}"
        part = {what: values[:60] for what, values in row["trace"].items()}
        learning(axes["solved"], axes["curve"], row, TASKS["parking"], 6000 if kind is PARKING else None, colour, name)
        fast_weights(axes[name], part, "123", COLOURS)
        for t, seen in enumerate(part["slow"]):
            if 1 in seen[:3]:
                slot = seen.index(1)
                axes[name].text(t, 1.2, f"{slot + 1}", ha="center", fontsize=8, color=COLOURS[slot])
    axes["curve"].set_ylim(0)
    axes["T = 5"].set_xlabel("step of the test; a number above: the car is parked in this slot")
    return figure


def panels(nets: Sequence[str]) -> tuple[Figure, dict[str, Axes]]:
    """Two panels for learning, and below them one wide panel per net."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    layout: list[Any] = [["solved", "curve"], *([net, net] for net in nets)]
    axes = figure.subplot_mosaic(layout, height_ratios=[1.5, 1, 1])
    for net in nets:
        axes[net].set_ylabel(f"fast weights, {net}")
    return figure, axes


def learning(
    left: Axes, right: Axes, row: Mapping[str, Any], task: Task, published: int | None, colour: str, label: str
) -> None:
    """Draws, left, the share of nets that have solved the task and, right, the quartiles of E over nets."""
    done = sorted(step for step in row["solved"] if step is not None)
    shares = [n / row["nets"] for n in range(len(done) + 1)]
    left.step([0, *done, row["steps"]], [*shares, shares[-1]], where="post", color=colour, label=label)
    if published is not None:
        left.axvline(published, color=colour, ls="--", lw=1, label=f"the paper’s net: {published:,} steps")
    left.set(xlabel="steps", ylabel="share of nets that have solved it", xlim=(0, row["steps"]), ylim=(0, 1.02))
    low, middle, high = zip(*row["curve"])
    at = [(n + 0.5) * task.window for n in range(len(middle))]
    right.plot(at, middle, color=colour, label=label)
    right.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
    right.set(xlabel="steps", ylabel="mean E, quartiles over nets", xlim=(0, row["steps"]))
    for axes in (left, right):
        axes.locator_params("x", nbins=5)
        # above the axes, where it hides neither a curve nor the paper's line
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, fontsize=8)


def fast_weights(axes: Axes, trace: Mapping[str, Any], names: str, answers: Sequence[str]) -> None:
    """Draws a net's fast weights over time and, where F is asked, its answers beside the targets.

    answers: the colours of the answers.
    """
    steps = range(len(trace["w"]))
    for weights, name, colour in zip(zip(*trace["w"]), names, COLOURS):
        # a write at step t is read from step t + 1 on
        axes.step([t + 0.5 for t in steps], weights, where="post", color=colour, lw=1.5, label=f"w({name})")
    asked = [t for t in steps if any(trace["fast"][t])]
    for n, colour in enumerate(answers):
        targets, found = ([trace[name][t][n] for t in asked] for name in ("target", "y"))
        axes.plot(asked, targets, "o", color=colour, mfc="none", ms=5, mew=0.8, label="" if n else "target")
        axes.plot(asked, found, "x", color=colour, ms=4, mew=0.8, label="" if n else "answer")
    axes.set(xlim=(-0.5, len(steps)), ylim=(-0.08, 1.12), yticks=(0, 0.5, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


# -------------------------------------------------------------------------------------------------------- the families


def summarise_run(row: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    done = [step for step in row["solved"] if step is not None]
    soonest = f", the first after {min(done)} steps" if done else ""
    return (
        f"{row['task']}, version {row['version']}, T = {row['steepness']:g}, η = {row['rate']:g}: {len(done)} of "
        f"{row['nets']} nets solved it in {row['steps']} steps{soonest}, {row['seconds']:.0f} s"
    )


NETS = (
    "F answers y(t) with the fast weights w(t − 1). Then w(t) = σ(w(t − 1) + □w(t)), where □w(t) comes from S and "
    "σ(x) = 1 / (1 + exp(−T (x − 0.5))). Both nets are linear, without hidden units or biases. W_S starts uniform in "
    "(−0.1, 0.1), and w(0) = □w(0).",
    "S learns online: W_S ← W_S − η ∂E(t)/∂W_S with E(t) = ½ Σ (d(t) − y(t))² and ∂w/∂W_S carried forward. Nothing is "
    "ever reset.",
)
AFTER = (
    "A net stops learning once it has solved its task. Then all nets are tested, as they are, on 1,000 new steps.",
    "The paper reports one net of each kind. Here each run trains many side by side, each with its own seed.",
)

FLIP_FLOP_FAMILY = Family(
    id="schmidhuber1991-flip-flop",
    title="One net learns to switch another: the flip-flop of 1991",
    paper=PAPER,
    question="In the first fast weight programmer, a slow net writes the weights of a fast net. Can it learn, online "
    "and without resets, to answer 1 the first time that a B follows an A, after any number of steps?",
    protocol=(
        "At each step A, B or C is drawn. Both nets see it as a one-hot vector. F has 3 inputs and 1 output.",
        "Version 1: S has one output for each of F’s 3 weights; T = 10, η = 1. Version 2: S has 3 outputs FROM and 1 "
        "output TO, and □w_ab = FROM_a TO_b; T = 10. Its η is not legible in the scanned paper. η = 0.5 is our choice; "
        "η = 1, that of version 1, is shown beside it.",
        *NETS,
        "Solved: E(t) ≤ 0.05 for 100 steps in a row. It is unknown whether the paper’s “error” was E or |d − y|; at "
        "T = 10 that makes hardly any difference.",
        *AFTER,
    ),
    caption="Top: the share of nets that have solved the task after so many steps, and the error while they learn. "
    "Below: the best net of each version in the test. An A makes S write a large w(B), the weight from F’s input B. A "
    "B makes it small again. So a single fast weight is the memory.",
    scales=FLIP_FLOP_SCALES,
    train=train,
    summarise=summarise_run,
    draw=draw_flip_flop,
    claims=(
        claim_on_steps(FLIP_FLOP[1], 300, ""),
        claim_on_steps(SAME_RATE, 800, "only our fastest nets need so few; a smaller T makes more of them as fast"),
        claim_on_steps(
            FLIP_FLOP[2],
            800,
            "only our fastest nets need so few; a smaller T or a larger η makes more of them as fast (scale “reduced”)",
        ),
        Claim(
            "flip-flop-latch",
            "The typical solution is a latch in one weight: w(B) is above ½ from an A until the next B and below "
            "otherwise, w(A) and w(C) stay below ½.",
            "described as the typical solution",
            "section 3.1",
            "nets that solved the task and do so at 99 % of 1,000 new steps; holds if these are at least half",
            share_of_solved(VERSIONS, lambda row, n: row["good"][n] >= 0.99, 0.5),
        ),
        Claim(
            "flip-flop-lag",
            "There can be arbitrary time lags: nets that solved the task answer a B that follows its A after 1,000 C.",
            "described, not measured",
            "section 3.1",
            "nets that solved the task within 5,000 steps, with E ≤ 0.05 at that B; holds if these are at least 90 % "
            "(of nets that took up to 20,000 steps fewer do)",
            share_of_solved(VERSIONS, lambda row, n: row["after_lag"][n] <= TOLERANCE, 0.9),
        ),
    ),
)

PARKING_FAMILY = Family(
    id="schmidhuber1991-parking",
    title="Where is my car? Variables bound by fast weights",
    paper=PAPER,
    question="Can a net bind a value to a variable by a fast weight, and keep it among distractions? S sees for one "
    "step in which of three slots a car is parked. It sees random bits all the time. Later F is asked where the car "
    "is.",
    protocol=(
        "A car owner drives, parks the car in a random slot, does business, and drives again. Before each step, "
        "driving ends with probability ¼, and so does business. S sees three slot detectors, which are on only in the "
        "step of parking, and three random bits.",
        "F has one input, “where is my car?”, and three outputs, one per slot. It is asked at half of the steps of "
        "business. How often the paper asked is unknown.",
        "Version 1: S has one output for each of F’s 3 weights; T = 10, η = 0.02. The runs at T = 5 are ours.",
        *NETS,
        "Solved: E(t) ≤ 0.05 for 100 steps in a row, counting only steps that ask. At the others F’s input and answer "
        "are 0.",
        *AFTER,
    ),
    caption="Top: the share of nets that have solved the task after so many steps, and the error per question while "
    "they learn. Below: the best net of each steepness in the test. The weight of the slot in which the car is parked "
    "is large, and the others are suppressed.",
    scales=PARKING_SCALES,
    train=train,
    summarise=summarise_run,
    draw=draw_parking,
    claims=(
        claim_on_steps(
            PARKING,
            6000,
            "see the claim on steepness; if every step counts it depends on how often F is asked: with fewer questions "
            "in 100 steps more nets pass (scale “reduced”)",
        ),
        Claim(
            "parking-binding",
            "Nets that solved the task bind: at a question the fast weight to the car’s slot is above ½, and the other "
            "two are suppressed.",
            "described",
            "section 3.2",
            "nets that solved the task and do so at 90 % of the questions in 1,000 new steps; holds if these are at "
            "least 90 %",
            share_of_solved(STEEPNESS, lambda row, n: row["good"][n] >= 0.9, 0.9),
        ),
        Claim(
            "parking-steepness",
            "What stops the others is the steepness: where nothing is written ∂w(t)/∂w(t − 1) = T w (1 − w) is 0.07 at "
            "T = 10, so an error hardly reaches the step of parking, and 0.62 at T = 5, where the median net binds.",
            None,
            "ours, not in the paper",
            "share of questions in 1,000 new steps at which the fast weights are right, median over all nets, solved "
            "or not, and range; holds if it is at least 0.9 at T = 5 and less at T = 10",
            measure_steepness,
        ),
    ),
)
