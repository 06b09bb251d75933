"""How many associations fit into fast weights? Setting 1 of Schlag, Irie and Schmidhuber 2021.

"Linear Transformers Are Secretly Fast Weight Programmers", ICML 2021, arXiv 2102.11174. A memory of d_dot features has
room for at most d_dot orthogonal keys; Setting 1 stores S keys with S values and asks for one of them, for growing S.

Data. S keys, S values. A sequence writes every key once, with a random value, each value used once; training asks for
one random key a sequence, evaluation for all.
Model. Keys have learned embeddings e of int(2.2 S) numbers. The value v is one-hot. The written key sees its value:
k = W_k [v; e] + b, q = W_q e + b, both of d_key numbers. The sum rule, normalised: W = Σ v ⊗ φ(k), z = Σ φ(k),
y = W φ(q) / (z·φ(q) + 1e-6). Softmax attention reads the same k, v and q, all of them kept.
Training. ½ ‖y − v‖², mean over a batch of 32 (0.5 is the loss of the answer 0); Adam at 1e-3. Every 100 steps the loss
on all queries of 20 new sequences; stop at 0.001, at the eleventh evaluation in a row without a new best, or after
100,000 steps. The result is the best of these losses.

`associative_retrieval_2021.csv` holds the best loss of every run in the authors' MIT-licensed logs at d_key 64
(github.com/ischlag/fast-weight-transformers). They average over batches of 32 queries, the last one smaller, and over
at most 200 queries a sequence; here every query counts once. No other difference is known.

Reading W with q gives S answers of rank at most d_dot, the targets are a permutation of rank S; so by Eckart and Young
no memory of d_dot features answers all queries of a sequence with less than ½ (1 − d_dot / S): the floor in the figure.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fwp
from fwp.feature_maps import FeatureMap

from ..claims import Claim, Family, Outcome, Rows, Scale, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True)
class Memory:
    """One line of the figure. phi: d_key → φ, asked anew in every forward pass; None: softmax attention.

    d_dot: features of φ for one number of the key. logs: its name in the authors' logs.
    """

    label: str
    logs: str
    colour: str
    phi: Callable[[int], str | FeatureMap] | None = None
    d_dot: int | None = None

    @property
    def random(self) -> bool:
        """Whether φ is drawn anew for each pass, training and evaluation."""
        return self.label.startswith("FAVOR+")


def favor(factor: int) -> Callable[[int], FeatureMap]:
    """FAVOR+ with m = factor · d_key random directions, 2m features."""
    return lambda d_key: fwp.FavorPlus.draw(d_key, factor * d_key)


MEMORIES = {
    "linear": Memory("Linear", "d64_linear_sum", "#7a7a7a", lambda d_key: "elu+1", 1),
    "dpfp-1": Memory("DPFP-1", "d64_dpfp1_sum", "#8ecae6", lambda d_key: "dpfp-1", 2),
    "dpfp-2": Memory("DPFP-2", "d64_dpfp2_sum", "#219ebc", lambda d_key: "dpfp-2", 4),
    "dpfp-3": Memory("DPFP-3", "d64_dpfp3_sum", "#023e73", lambda d_key: "dpfp-3", 6),
    "favor-1": Memory("FAVOR+, m = d", "d64_favor64_sum", "#f4b183", favor(1), 2),
    "favor-2": Memory("FAVOR+, m = 2d", "d64_favor128_sum", "#e76f3c", favor(2), 4),
    "favor-8": Memory("FAVOR+, m = 8d", "d64_favor512_sum", "#a63c06", favor(8), 16),
    "softmax": Memory("Softmax", "d64_softmax_cat", "#2a9d4a"),
}
MAPS = ("linear", "dpfp-1", "dpfp-2", "dpfp-3")  # the deterministic ones, by capacity


class Retrieval(nn.Module):
    """Writes S pairs and answers queries, see the top of this file."""

    def __init__(self, memory: Memory, S: int, d_key: int) -> None:
        super().__init__()
        self.memory, self.S, self.d_key = memory, S, d_key
        width = int(2.2 * S)
        self.embedding = nn.Parameter(torch.randn(S, width))
        self.W_k, self.W_q = nn.Linear(S + width, d_key), nn.Linear(width, d_key)
        for projection in (self.W_k, self.W_q):
            if memory.phi is None:
                nn.init.xavier_uniform_(projection.weight)
            else:
                nn.init.uniform_(projection.weight, -(d_key**-0.5), d_key**-0.5)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """keys, values [B, S] and queries [B, Q] as indices → answers [B, Q, S]."""
        for_value, for_key = self.W_k.weight.split([self.S, self.embedding.shape[1]], 1)
        k = F.embedding(keys, F.linear(self.embedding, for_key, self.W_k.bias))  # [B, S, d_key]
        k = k + F.embedding(values, for_value.T)  # a matrix times a one-hot vector is one of its columns
        q = F.embedding(queries, self.W_q(self.embedding))  # [B, Q, d_key]
        v = F.one_hot(values, self.S).to(k.dtype)  # [B, S, S]
        if self.memory.phi is None:
            return F.scaled_dot_product_attention(q, k, v)
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)  # [B, ·, one head, ·]
        phi = self.memory.phi(self.d_key)
        unasked = k.new_zeros(1).expand_as(k)
        _, state = fwp.fast_weights("additive", unasked, k, v, feature_map=phi, denominator=True)
        return fwp.read(state, q, feature_map=phi).squeeze(2)


# -------------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class Training:
    """The paper's numbers."""

    batch: int = 32
    learning_rate: float = 1e-3
    max_steps: int = 100_000
    evaluate_every: int = 100
    evaluation_sequences: int = 20
    solved: float = 1e-3
    patience: int = 11


def permutations(count: int, S: int) -> Tensor:
    """`count` random orders of S things, [count, S]."""
    return torch.rand(count, S).argsort(-1)


def loss(answers: Tensor, values: Tensor) -> Tensor:
    """½ ‖y − one-hot(value)‖², mean over queries. answers [B, Q, S], values [B, Q]."""
    return 0.5 * (answers - F.one_hot(values, answers.shape[-1])).square().sum(-1).mean()


@torch.no_grad()
def evaluate(model: Retrieval, sequences: int) -> float:
    """The mean loss over all queries of new sequences. Where φ is random, every sequence draws its own."""
    keys, values = permutations(sequences, model.S), permutations(sequences, model.S)
    one_by_one = 1 if model.memory.random else sequences
    answers = [model(k, v, k) for k, v in zip(keys.split(one_by_one), values.split(one_by_one))]
    return loss(torch.cat(answers), values).item()


def train(settings: Settings) -> dict[str, Any]:
    """One run: the best evaluation loss, the step it was reached at, and the last step."""
    S, how = settings["keys"], Training(**{name: settings[name] for name in asdict(Training())})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(settings["seed"])
        model = Retrieval(MEMORIES[settings["model"]], S, settings["d_key"])
        optimizer = torch.optim.Adam(model.parameters(), how.learning_rate, fused=True)
        best, best_step, step = math.inf, 0, 0
        while best > how.solved and step < min(how.max_steps, best_step + how.patience * how.evaluate_every):
            step += 1
            keys, values = permutations(how.batch, S), permutations(how.batch, S)
            asked = torch.randint(S, (how.batch, 1))
            optimizer.zero_grad()
            loss(model(keys, values, keys.gather(1, asked)), values.gather(1, asked)).backward()
            optimizer.step()
            if step % how.evaluate_every == 0:
                now = evaluate(model, how.evaluation_sequences)
                if not math.isfinite(now):
                    raise FloatingPointError(f"the evaluation loss is {now} at step {step} of {dict(settings)}")
                if now < best:
                    best, best_step = now, step
    return {"best_loss": best, "best_step": best_step, "last_step": step}


# ----------------------------------------------------------------------------------------------------------- the grids


def runs(
    d_key: int, keys: Mapping[str, Iterable[int]], seeds: int, training: Training = Training()
) -> list[dict[str, Any]]:
    """A run for each model, number of keys and seed; the longest first, lest one core be left with it at the end."""
    grid = [
        {"model": model, "d_key": d_key, "keys": S, "seed": seed, **asdict(training)}
        for model, sizes in keys.items()
        for S in sizes
        for seed in range(1, seeds + 1)
    ]
    return sorted(grid, key=lambda run: -run["keys"] * (MEMORIES[run["model"]].d_dot or 1))


# S of d_key 16 is a quarter of the authors' S at d_key 64: the same shares of d_dot.
QUICK = {
    "linear": [5, 10, 15, 20, 40],
    "dpfp-1": [10, 20, 25, 30, 40],
    "dpfp-2": [40, 60, 65, 80],
    "dpfp-3": [60, 80, 90],
    "favor-1": [5, 20],
    "favor-2": [5, 20],
    "favor-8": [5, 20],
    "softmax": [5, 20, 60, 100, 150],
}
REDUCED = {
    "linear": [20, 40, 60, 80, 160],
    "dpfp-1": [60, 80, 100, 120, 140, 160],
    "dpfp-2": [160, 200, 220, 240, 260, 280, 320],
    "dpfp-3": [240, 300, 320, 340, 360, 380, 480],
    "favor-1": [20, 40, 60],
    "favor-2": [20, 40, 60],
    "favor-8": [20, 40, 60],
    "softmax": [20, 100, 200, 340, 400, 500, 600],
}
SCALES = {
    "smoke": Scale(
        runs(16, dict.fromkeys(MEMORIES, (5,)), 1, Training(max_steps=100)), "seconds; shows that the code runs", False
    ),
    "quick": Scale(runs(16, QUICK, 1), "five minutes on 2 cores; d_key 16"),
    "reduced": Scale(runs(64, REDUCED, 1), "hours on 2 cores; d_key 64, S around each break"),
    "paper": Scale(runs(64, dict.fromkeys(MEMORIES, range(20, 601, 20)), 1), "days on 2 cores; all of d_key 64"),
}

# ---------------------------------------------------------------------------------------------------------- the claims


def authors() -> list[dict[str, Any]]:
    """The authors' runs of Setting 1 as rows like ours."""
    names = {memory.logs: name for name, memory in MEMORIES.items()}
    with Path(__file__).with_name("associative_retrieval_2021.csv").open(encoding="utf-8", newline="") as file:
        return [
            {"model": names[row["model"]], "d_key": 64, "keys": int(row["keys"]), "seed": 1, "solved": 1e-3}
            | {"best_loss": float(row["best_loss"])}
            for row in csv.DictReader(file)
            if row["model"] in names and row["replacement"] == "0"
        ]


AUTHORS = authors()
SOURCE = "the authors’ logs, d_key 64, one seed"


def capacity(row: Mapping[str, Any]) -> float:
    """d_dot, the number of features; of softmax attention infinite."""
    return (MEMORIES[row["model"]].d_dot or math.inf) * row["d_key"]


def fullness(row: Mapping[str, Any]) -> float:
    """S / d_dot."""
    return float(row["keys"] / capacity(row))


def floor(row: Mapping[str, Any]) -> float:
    """½ (1 − d_dot / S), below which no memory of d_dot features can get; 0 within its capacity."""
    return 0.5 * (1 - 1 / fullness(row)) if fullness(row) > 1 else 0.0


def solved(row: Mapping[str, Any]) -> bool:
    """Whether the run reached the paper's 0.001."""
    return bool(row["best_loss"] <= row["solved"])


def first_unsolved(rows: Rows, model: str) -> list[Mapping[str, Any]]:
    """For each seed the run with the smallest S that stayed above 0.001; none at all if a seed solved every S."""
    mine = [row for row in rows if row["model"] == model]
    seeds = {row["seed"] for row in mine}
    failed = {row["seed"]: row for row in sorted(mine, key=lambda row: -row["keys"]) if not solved(row)}
    return [failed[seed] for seed in sorted(seeds)] if len(failed) == len(seeds) else []


def last_solved(rows: Rows, first: Mapping[str, Any]) -> float:
    """The largest S below a seed's first unsolved one, over d_dot."""
    same = [row for row in rows if (row["model"], row["seed"]) == (first["model"], first["seed"])]
    return max((fullness(row) for row in same if row["keys"] < first["keys"]), default=0.0)


def spread(rows: Rows, values: Sequence[float]) -> list[float] | None:
    """From the lowest to the highest seed, where there are several."""
    return [round(min(values), 3), round(max(values), 3)] if len({row["seed"] for row in rows}) > 1 else None


def note(rows: Rows, why: str = "") -> str:
    """What sets the rows' size apart from the paper's, and why a claim doesn't hold."""
    d_key = rows[0]["d_key"]
    size = "" if d_key == 64 else f"same law at another size: d_key {d_key}, not 64"
    return "; ".join(filter(None, (size, why)))


def breaks(model: str) -> Claim:
    """The first S that φ can't hold."""
    published = fullness(first_unsolved(AUTHORS, model)[0])
    step = fullness(next(row for row in AUTHORS if row["model"] == model and row["keys"] == 20))

    def measure(rows: Rows) -> Outcome:
        first = first_unsolved(rows, model)
        if not first:
            return Outcome(None, None, note="a seed solved every S that was run, so its break was not reached")
        shares = [fullness(row) for row in first]
        interval = [round(median(last_solved(rows, row) for row in first), 3), round(median(shares), 3)]
        holds = abs(median(shares) - published) <= step + 1e-9
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
        "last S solved and first S with a best loss above 0.001, over d_dot; median over seeds, range of the latter",
        measure,
    )


def measure_bound(rows: Rows) -> Outcome:
    beyond = [row for row in rows if floor(row) > 0]
    lucky = [row for row in beyond if solved(row)]
    return Outcome(f"{len(lucky)} of {len(beyond)} runs solved", not lucky, note=note(rows))


def measure_floor(rows: Rows) -> Outcome:
    ratios = [row["best_loss"] / floor(row) for row in rows if row["model"] in MAPS and fullness(row) >= 1.25]
    middle = median(ratios)
    return Outcome(round(middle, 3), middle <= 1.1, [round(min(ratios), 2), round(max(ratios), 2)], note(rows))


def measure_order(rows: Rows) -> Outcome:
    firsts = {model: [row["keys"] for row in first_unsolved(rows, model)] for model in MAPS}
    if not all(firsts.values()):
        return Outcome(None, None, note="a seed of some map solved every S that was run")
    middle = {model: median(found) for model, found in firsts.items()}
    ranges = {model: spread(rows, found) for model, found in firsts.items()}
    holds = sorted(set(middle.values())) == list(middle.values())
    return Outcome(middle, holds, ranges if all(ranges.values()) else None, note(rows))


def measure_favor(rows: Rows) -> Outcome:
    runs = sorted((row for row in rows if MEMORIES[row["model"]].random), key=lambda row: row["best_loss"])
    below = [f"{MEMORIES[row['model']].label} at S = {row['keys']}" for row in runs if solved(row)]
    why = (
        f"reached by {', '.join(dict.fromkeys(below))}, likely because the variance of random features grows "
        "exponentially with the squared length of q + k, and short keys have less of it"
    )
    return Outcome(float(f"{runs[0]['best_loss']:.3g}"), not below, note=note(rows, why if below else ""))


def measure_softmax(rows: Rows) -> Outcome:
    largest = {
        model: max((row["keys"] for row in rows if row["model"] == model and solved(row)), default=0)
        for model in MEMORIES
    }
    rivals = {model: S for model, S in largest.items() if model != "softmax"}
    best = max(rivals, key=rivals.__getitem__)
    outcome = {"softmax": largest["softmax"], best: rivals[best]}
    return Outcome(outcome, largest["softmax"] > rivals[best], note=note(rows))


# ---------------------------------------------------------------------------------------------------------- the figure


def draw(rows: Rows) -> Figure:
    """Left: the best loss against S, as in the paper. Right: against S / d_dot, with the authors' runs at d_key 64."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    d_key = rows[0]["d_key"]
    for name, memory in MEMORIES.items():
        xs, middle, low, high = over_seeds(rows, name, lambda row: row["keys"])
        marker = "s" if memory.d_dot is None else "o"
        left.plot(xs, middle, marker=marker, markersize=4, lw=1.2, color=memory.colour, label=memory.label)
        left.vlines(xs, low, high, color=memory.colour, lw=1.2)
    left.set(xlabel=f"number of keys S, at d_key = {d_key}", ylabel="best evaluation loss")

    shares = [1 + i / 100 for i in range(301)]
    right.plot([0, *shares], [0, *(0.5 * (1 - 1 / x) for x in shares)], "k-", lw=0.8, zorder=0, label="floor")
    for name in MAPS:
        colour = MEMORIES[name].colour
        theirs, losses, *_ = over_seeds(AUTHORS, name, fullness)
        right.plot(theirs, losses, "x", color=colour, markersize=5, alpha=0.7)
        xs, middle, low, high = over_seeds(rows, name, fullness)
        right.plot(xs, middle, "o", color=colour, markersize=5)
        right.vlines(xs, low, high, color=colour, lw=1.2)
    right.plot([], [], "ko", markersize=5, label=f"ours, d_key = {d_key}")
    right.plot([], [], "kx", markersize=5, label="the authors' logs, d_key = 64")
    right.set(xlabel="S / d_dot, Linear and DPFP", xlim=(0, 4))

    for axes, columns in ((left, 4), (right, 3)):
        axes.set_ylim(-0.01, 0.52)
        above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1), "ncols": columns}
        axes.legend(**above, frameon=False, fontsize=8, columnspacing=1, handlelength=1.5)
    return figure


def over_seeds(rows: Rows, model: str, x: Callable[[Any], float]) -> tuple[list[float], ...]:
    """A model's x in order, and the median, lowest and highest loss there."""
    points: dict[float, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            points.setdefault(x(row), []).append(row["best_loss"])
    xs = sorted(points)
    return xs, *([statistic(points[at]) for at in xs] for statistic in (median, min, max))


# ---------------------------------------------------------------------------------------------------------- the family


def describe(row: dict[str, Any]) -> str:
    """A finished run in one line."""
    return (
        f"{MEMORIES[row['model']].label}, S = {row['keys']}, seed {row['seed']}: best loss {row['best_loss']:.3g} "
        f"at step {row['best_step']} of {row['last_step']}, {row['seconds']:.0f} s"
    )


SETTING_1 = Family(
    id="schlag2021-setting1",
    title="How many associations fit into fast weights?",
    paper="Schlag, Irie, Schmidhuber 2021, Linear Transformers Are Secretly Fast Weight Programmers, arXiv 2102.11174",
    question="Linear attention keeps the past in one matrix of d_dot features, so it can hold at most d_dot orthogonal "
    "keys apart. Setting 1 of the paper writes S random key-value pairs and asks for one of them: where does each "
    "feature map break, and where does softmax attention, which keeps every pair?",
    protocol=(
        "A sequence writes each of S keys once, with a random value of S one-hot values; training asks for one random "
        "key, evaluation for all.",
        "Keys have learned embeddings of int(2.2 S) numbers; k = W_k [v; e] + b sees its value, q = W_q e + b; both of "
        "d_key numbers.",
        "Memory: W = Σ v ⊗ φ(k), z = Σ φ(k), y = W φ(q) / (z·φ(q) + 1e-6), through fwp.fast_weights(“additive”). d_dot "
        "is the width of φ: Linear d_key, DPFP-ν 2ν d_key, FAVOR+ 2m, drawn anew in each pass.",
        "Loss ½ ‖y − v‖², where answering 0 costs 0.5; Adam at 0.001, batch 32; evaluated every 100 steps on 20 new "
        "sequences.",
        "A run ends at a loss of 0.001 (solved), at the eleventh evaluation in a row without a new best, or after "
        "100,000 steps. Its result is the best loss.",
    ),
    caption="Left: best evaluation loss against the number of keys, the paper’s figure at this d_key. Right: the four "
    "deterministic maps against S / d_dot, at both sizes, and the floor ½ (1 − d_dot / S): S answers read from d_dot "
    "features have at most rank d_dot, and no matrix of that rank is nearer to a permutation of S (Eckart and Young).",
    scales=SCALES,
    train=train,
    describe=describe,
    draw=draw,
    claims=(
        *map(breaks, MAPS),
        Claim(
            "order",
            "The first unsolved S grows with d_dot: Linear < DPFP-1 < DPFP-2 < DPFP-3.",
            measure_order(AUTHORS).measured,
            SOURCE,
            "smallest S with a best loss above 0.001; median over seeds",
            measure_order,
        ),
        Claim(
            "bound",
            "No memory of d_dot features solves an S above d_dot.",
            measure_bound(AUTHORS).measured,
            SOURCE,
            "runs with S > d_dot that reached 0.001",
            measure_bound,
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
            "FAVOR+ reaches 0.001 at no S, with m = d_key, 2 d_key or 8 d_key random directions.",
            measure_favor(AUTHORS).measured,
            SOURCE,
            "lowest best loss of all FAVOR+ runs",
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
    ),
)
