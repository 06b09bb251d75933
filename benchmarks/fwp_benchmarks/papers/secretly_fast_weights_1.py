"""How many associations fit into fast weights? Setting 1 of `secretly_fast_weights`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any

from ..claims import Claim, Family, Outcome, Rows, Scale
from .secretly_fast_weights import (
    DEVIATION,
    DUAL,
    EMBEDDING,
    MAPS,
    MEMORIES,
    MEMORIES_1,
    PAPER,
    SOURCE,
    STOPPING,
    authors,
    capacity,
    floor,
    fullness,
    legend,
    lines,
    measure_deviation,
    over_seeds,
    rows_of_model,
    runs,
    solved,
    summarise_run,
    train,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# At d_key 16 S is a quarter of the authors' S at d_key 64, so that S / d_dot is the same.
QUICK = {
    "linear": [10, 15, 20, 40],
    "dpfp-1": [20, 25, 30, 40],
    "dpfp-2": [40, 60, 65, 80],
    "dpfp-3": [60, 80, 90],
    "favor-1": [5, 20],
    "favor-2": [5, 20],
    "favor-8": [5, 20],
    "softmax": [5, 20, 60, 100, 150],
}
EVERY_20 = range(20, 601, 20)
REDUCED = {
    "linear": [*range(20, 141, 20), 200, 300, 600],
    "dpfp-1": [*range(20, 161, 20), 200, 300, 600],
    "dpfp-2": [20, 100, 160, *range(200, 281, 20), 320, 400, 500, 600],
    "dpfp-3": [20, 100, 200, *range(300, 401, 20), 500, 600],
    "favor-1": range(20, 101, 20),
    "favor-2": range(20, 101, 20),
    "favor-8": [20, 40, 60, 200],
    "softmax": [20, 100, 200, *range(300, 521, 20), 600],
}
SCALES = {
    "smoke": Scale(
        runs(16, dict.fromkeys(MEMORIES_1, (5,)), 1, max_steps=100), "seconds; shows that the code runs", False
    ),
    "quick": Scale(runs(16, QUICK, 3), "ten minutes on 2 busy cores; d_key 16, 3 seeds"),
    "reduced": Scale(runs(64, REDUCED, 1), "two hours on 2 cores; d_key 64, S to 600, one seed"),
    "paper": Scale(runs(64, dict.fromkeys(MEMORIES_1, EVERY_20), 3), "days on 2 cores, estimated; d_key 64, 3 seeds"),
}
AUTHORS = authors(MEMORIES_1, False)


def first_unsolved(rows: Rows, model: str) -> list[Mapping[str, Any]]:
    """Per seed, the run with the smallest S that stayed above 0.001. Empty if a seed solved every S."""
    mine = rows_of_model(rows, model)
    failed = {row["seed"]: row for row in reversed(mine) if not solved(row)}
    seeds = sorted({row["seed"] for row in mine})
    return [failed[seed] for seed in seeds] if len(failed) == len(seeds) else []


def last_solved(rows: Rows, first: Mapping[str, Any]) -> float:
    """The largest S / d_dot below the first unsolved S of the same seed; 0 if there is none."""
    same = [row for row in rows_of_model(rows, first["model"]) if row["seed"] == first["seed"]]
    return max((fullness(row) for row in same if row["keys"] < first["keys"]), default=0.0)


def spread(rows: Rows, values: Sequence[float]) -> list[float] | None:
    """The lowest and the highest value over seeds. None if there is only one seed."""
    return [round(min(values), 3), round(max(values), 3)] if len({row["seed"] for row in rows}) > 1 else None


def note(rows: Rows, why: str = "") -> str:
    """A claim's note: how the size differs from the paper's, and why the claim doesn't hold."""
    d_key = rows[0]["d_key"]
    size = "" if d_key == 64 else f"same law at another size: d_key {d_key}, not 64"
    return "; ".join(filter(None, (size, why)))


def breaks(model: str) -> Claim:
    """The claim about the first S at which a map's features no longer suffice."""
    published = fullness(first_unsolved(AUTHORS, model)[0])
    step = 20 / capacity({"model": model, "d_key": 64})

    def measure(rows: Rows) -> Outcome:
        first, largest = first_unsolved(rows, model), max(map(fullness, rows_of_model(rows, model)))
        if not first:
            late = largest > published + step
            why = f"a seed solved every S that was run, to {largest:.2f} d_dot"
            return Outcome(None, False if late else None, note=note(rows, why))
        shares = [fullness(row) for row in first]
        below = median(last_solved(rows, row) for row in first)
        interval = [round(below, 3), round(median(shares), 3)]
        near = [abs(share - published) <= step + 1e-9 for share in shares]
        if below > 0 and any(near) and not all(near):
            agree = f"undecided: the seeds disagree, {sum(near)} of {len(near)} are within a step"
            return Outcome(interval, None, spread(rows, shares), note(rows, agree))
        holds = below > 0 and all(near)
        early = min(first, key=fullness)
        why = f"at S = {early['keys']} training ended with {2 * early['keys'] * early['best_loss']:.1f} keys lost"
        why += ", though there was room for them" if fullness(early) <= 1 else ""
        return Outcome(interval, holds, spread(rows, shares), note(rows, "" if holds else why))

    return Claim(
        f"break-{model}",
        f"{MEMORIES[model].label} first leaves an S unsolved at the same S / d_dot as at d_key 64, to one step of the "
        f"authors’ grid ({step:.3f}).",
        measure(AUTHORS).measured,
        SOURCE,
        "last S solved and first S with a best loss above 0.001, over d_dot; median over seeds, then their range; "
        "undecided where seeds disagree, since then it depends on the seeds and on a processor’s rounding",
        measure,
    )


def measure_break_softmax(rows: Rows) -> Outcome:
    first, largest = first_unsolved(rows, "softmax"), max(row["keys"] for row in rows_of_model(rows, "softmax"))
    if rows[0]["d_key"] != 64:
        return Outcome(None, None, note="softmax attention has no d_dot to scale by: measured at d_key 64 only")
    why = "the authors’ 360 is one run of one seed: they solved 380 to 440 and 480, and nothing from 500 on"
    if not first:
        why = f"every S that was run was solved, to {largest}; {why}"
        return Outcome(None, False if largest > 380 else None, note=why)
    found = [row["keys"] for row in first]
    holds = abs(median(found) - 360) <= 20
    return Outcome(median(found), holds, spread(rows, found), "" if holds else why)


def located(rows: Rows) -> dict[str, list[tuple[float, float]]] | None:
    """Per map and seed, the last S solved and the first unsolved.

    None if some seed solved all or none of the S that were run.
    """
    found = {
        model: [(last_solved(rows, row) * capacity(row), float(row["keys"])) for row in first_unsolved(rows, model)]
        for model in MAPS
    }
    return found if all(cells and all(low > 0 for low, _ in cells) for cells in found.values()) else None


NOT_LOCATED = "a seed of some map solved all or none of the S that were run"


def measure_law(rows: Rows) -> Outcome:
    """Fits log S = slope · log d_dot + constant to the first unsolved S, by least squares.

    A map breaks somewhere between the last S solved and the first unsolved. The interval holds every slope that such
    breaks could give.
    """
    cells = located(rows)
    if cells is None:
        return Outcome(None, None, note=note(rows, NOT_LOCATED))
    d_key = rows[0]["d_key"]
    x = [math.log(capacity({"model": model, "d_key": d_key})) for model in MAPS for _ in cells[model]]
    ends = [[math.log(S) for S in cell] for model in MAPS for cell in cells[model]]
    last = [high for _, high in ends]
    slope, _ = linear_regression(x, last)
    middle = sum(x) / len(x)
    flattest, steepest = (
        linear_regression(x, [ends[i][(at > middle) == up] for i, at in enumerate(x)])[0] for up in (False, True)
    )
    ratio = math.exp(sum(last) / len(x) - middle)
    measured = {"slope": round(slope, 3), "S / d_dot": round(ratio, 3)}
    return Outcome(measured, abs(slope - 1) <= 0.15, [round(flattest, 2), round(steepest, 2)], note(rows))


def measure_floor(rows: Rows) -> Outcome:
    ratios = [row["best_loss"] / floor(row) for row in rows if row["model"] in MAPS and fullness(row) >= 1.25]
    middle = median(ratios)
    return Outcome(round(middle, 3), middle <= 1.1, [round(min(ratios), 2), round(max(ratios), 2)], note(rows))


def may_be_out_of_order(rows: Rows) -> bool:
    """Whether each map could have broken no later than the map with fewer features, by the S that were run."""
    sizes = [sorted({row["keys"] for row in rows_of_model(rows, model)})[1:] for model in MAPS]
    return all(larger and smaller and larger[0] <= smaller[-1] for smaller, larger in pairwise(sizes))


def measure_order(rows: Rows) -> Outcome:
    cells = located(rows)
    if cells is None:
        return Outcome(None, None, note=note(rows, NOT_LOCATED))
    firsts = {model: [int(high) for _, high in cells[model]] for model in MAPS}
    if not may_be_out_of_order(rows):
        why = "undecided: with the S that were run, some neighbours could break in no other order"
        return Outcome(None, None, note=note(rows, why))
    middle = {model: median(found) for model, found in firsts.items()}
    ranges = {model: spread(rows, found) for model, found in firsts.items()}
    holds = sorted(set(middle.values())) == list(middle.values())
    return Outcome(middle, holds, ranges if all(ranges.values()) else None, note(rows))


def measure_favor(rows: Rows) -> Outcome:
    found = sorted((row for row in rows if MEMORIES[row["model"]].random), key=lambda row: row["best_loss"])
    below = [f"{MEMORIES[row['model']].label} at S = {row['keys']}" for row in found if solved(row)]
    why = (
        f"reached by {', '.join(dict.fromkeys(below))}, likely because the variance of random features grows "
        "exponentially with the squared length of q + k, and short keys have less of it"
    )
    lowest = found[0]["best_loss"]
    return Outcome(float(f"{lowest:.3g}"), not below and lowest < 0.25, note=note(rows, why if below else ""))


def measure_softmax(rows: Rows) -> Outcome:
    largest = {
        model: max((row["keys"] for row in rows_of_model(rows, model) if solved(row)), default=0)
        for model in MEMORIES_1
    }
    rivals = {model: S for model, S in largest.items() if model != "softmax"}
    best = max(rivals, key=rivals.__getitem__)
    outcome = {"softmax": largest["softmax"], best: rivals[best]}
    return Outcome(outcome, largest["softmax"] > rivals[best], note=note(rows))


def draw(rows: Rows) -> Figure:
    """Draws the best loss against S, as in the paper, and against S / d_dot, and where each map breaks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    panels = figure.subplot_mosaic([["top", "top"], ["left", "right"]], width_ratios=(1.2, 1))
    top, left, right = panels["top"], panels["left"], panels["right"]
    d_key = rows[0]["d_key"]
    lines(top, rows, MEMORIES_1, AUTHORS)

    shares = [1 + i / 100 for i in range(901)]
    floors = [0, *(0.5 * (1 - 1 / x) for x in shares)]
    left.plot([0.01, *shares], floors, "k-", lw=0.8, zorder=0, label="least loss of d_dot features")
    for name in MAPS:
        colour = MEMORIES[name].colour
        theirs, losses, *_ = over_seeds(AUTHORS, name, fullness)
        left.plot(theirs, losses, "x", color=colour, markersize=5, alpha=0.7)
        xs, losses, low, high = over_seeds(rows, name, fullness)
        left.plot(xs, losses, "o", color=colour, markersize=4)
        left.vlines(xs, low, high, color=colour, lw=1.2)
        for found, marker in ((AUTHORS, "x"), (rows, "o")):
            for row in first_unsolved(found, name):
                right.plot(capacity(row), row["keys"], marker, color=colour, markersize=6)
    left.plot([], [], "ko", markersize=4, label=f"ours, d_key = {d_key}")
    left.plot([], [], "kx", markersize=5, label="the authors' logs, d_key = 64")
    left.set(xlabel="S / d_dot, Linear and DPFP", ylabel="best evaluation loss", xscale="log", xlim=(0.2, 10))
    left.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    right.plot([10, 500], [10, 500], "k-", lw=0.8, label="S = d_dot")
    right.plot([], [], "ko", markersize=6, label="ours")
    right.plot([], [], "kx", markersize=6, label="theirs")
    right.set(xscale="log", yscale="log", xlabel="d_dot", ylabel="first S with a loss above 0.001")

    for axes, columns in ((top, 5), (left, 1), (right, 3)):
        legend(axes, columns)
    for axes in (top, left):
        axes.set_ylim(-0.01, 0.52)
    return figure


SETTING_1 = Family(
    id="schlag2021-setting1",
    title="How many associations fit into fast weights?",
    paper=PAPER,
    question="Linear attention keeps the past in one matrix of d_dot features, so it can hold at most d_dot orthogonal "
    "keys apart. Setting 1 of the paper writes S random key-value pairs and asks for one of them. At which S does each "
    "feature map break, and at which softmax attention, which keeps every pair?",
    protocol=(
        "A sequence writes S keys once each, in random order. The S values come once each, too. Then it is asked for "
        "one key.",
        EMBEDDING,
        "Memory: W = Σ v ⊗ φ(k), z = Σ φ(k), y = W φ(q) / (z·φ(q) + 1e-6), rule “additive”. d_dot is the width of φ: "
        "d_key for Linear, 2ν d_key for DPFP-ν, 2m for FAVOR+, which is drawn anew in each pass.",
        DEVIATION,
        DUAL,
        *STOPPING,
        "“Solved” means a loss of at most 0.001 here, where the paper ends a run. Setting 2 counts the first S left "
        "above 0.01, since there the losses of the authors and ours cross 0.001 more than once.",
    ),
    caption="Top: best evaluation loss against the number of keys, as in the paper’s figure. Bands reach from the "
    "lowest to the highest seed. Below left: deterministic maps against S / d_dot, and the floor ½ (1 − d_dot / S). "
    "S answers read from d_dot features have at most rank d_dot, and no matrix of that rank is nearer to a permutation "
    "of S than the floor (Eckart and Young). Below right: the first S that is not solved grows like d_dot.",
    scales=SCALES,
    train=train,
    summarise=summarise_run,
    draw=draw,
    claims=(
        *map(breaks, MAPS),
        Claim(
            "break-softmax",
            "Softmax attention first leaves an S unsolved where the authors’ did, to one step of their grid (20).",
            360,
            SOURCE,
            "smallest S with a best loss above 0.001",
            measure_break_softmax,
        ),
        Claim(
            "order",
            "The first unsolved S grows with d_dot: Linear < DPFP-1 < DPFP-2 < DPFP-3.",
            measure_order(AUTHORS).measured,
            SOURCE,
            "smallest S with a best loss above 0.001; median over seeds",
            measure_order,
        ),
        Claim(
            "law",
            "The first unsolved S is proportional to d_dot: log S against log d_dot has slope 1, to 0.15.",
            measure_law(AUTHORS).measured,
            SOURCE + "; the fit is ours",
            "least squares over Linear and DPFP-1/2/3, a point a seed; then the slopes that breaks anywhere between "
            "the last S solved and the first unsolved could give",
            measure_law,
        ),
        Claim(
            "floor",
            "Past its capacity a deterministic map learns the best memory of its size: for S ≥ 1.25 d_dot the median "
            "of loss / floor is at most 1.1, the floor being ½ (1 − d_dot / S).",
            measure_floor(AUTHORS).measured,
            SOURCE + "; the floor is not in the paper",
            "best loss over floor, all runs of Linear and DPFP with S ≥ 1.25 d_dot; median and range",
            measure_floor,
        ),
        Claim(
            "favor",
            "FAVOR+ reaches 0.001 at no S, with m = d_key, 2 d_key or 8 d_key random directions, though it learns: its "
            "lowest loss is below half of answering 0.",
            measure_favor(AUTHORS).measured,
            SOURCE,
            "lowest best loss of all FAVOR+ runs, against 0.001 and 0.25",
            measure_favor,
        ),
        Claim(
            "softmax",
            "Softmax attention solves a larger S than any memory of fixed size.",
            measure_softmax(AUTHORS).measured,
            SOURCE,
            "largest S with a best loss of at most 0.001: softmax, and the best of the others",
            measure_softmax,
        ),
        Claim(
            "deviation-1",
            DEVIATION,
            None,
            SOURCE,
            "|ours / theirs − 1|; median, range from lower to upper quartile",
            measure_deviation(AUTHORS),
        ),
    ),
)
