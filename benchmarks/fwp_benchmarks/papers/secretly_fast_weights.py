"""What fast weights can hold, and how to write them: Settings 1 and 2 of Schlag et al. 2021.

"Linear Transformers Are Secretly Fast Weight Programmers", ICML 2021, arXiv 2102.11174, section 6.1. A sequence writes
key-value pairs into a memory and then asks for the value of a key. Setting 1 writes S keys once each, for growing S: a
memory of d_dot features has room for at most d_dot orthogonal keys. Setting 2 draws 2S pairs of S keys with
replacement. The last value of a key is the right one, so a rule has to overwrite.

Model. Keys have learned embeddings e of int(2.2 S) numbers. Values v are one-hot. The written key sees its value:
k = W_k [v; e] + b and q = W_q e + b have d_key numbers each, and β = σ(w [v; e] + b).
Update rules.
- sum: W = Σ v ⊗ φ(k), y = W φ(q) / (z·φ(q) + 1e-6) with z = Σ φ(k).
- gated sum (Peng et al. 2021, arXiv 2103.02143): W = (1 − β) W + β v ⊗ φ(k), and z likewise. y is that of sum.
- delta: W += β (v − W φ(k)) ⊗ φ(k), y = W φ(q), with φ divided by its sum.
- fwm (Schlag et al. 2021): delta with φ not divided. After each step W is divided by max(‖W‖, 1).
  y = LayerNorm(W φ(q)).
Training. The loss is ½ ‖y − v‖², mean over a batch of 32. Answering 0 costs 0.5. Adam has the learning rate 1e-3. (tanh
fwm: a batch of 128 and 1e-4.) Every 100 steps the loss is evaluated on all keys of 20 new sequences of S pairs. A run
stops at 0.001, at the eleventh evaluation in a row without a new best, or after 100,000 steps. Its result is the best
of these losses. The paper says that Setting 2 is evaluated on 2S pairs, but the authors' code uses S. The result holds
both.

`associative_retrieval_2021.csv` holds the best loss of every run in the authors' MIT-licensed logs at d_key 64
(github.com/ischlag/fast-weight-transformers). Known differences: they average over batches of 32 queries, the last of
which is smaller, and over at most 200 queries per sequence, while here every query counts once. Their delta adds 1e-6
to the sum of φ(q). Their fwm doesn't divide W after the first step.

The floor in the figure: reading W gives S answers of rank at most d_dot, while the right answers are a permutation,
which has rank S. So, by Eckart and Young, no memory of d_dot features answers all queries of a sequence with a mean
loss below ½ (1 − d_dot / S).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fwp
from fwp import feature_maps, rules
from fwp.core import Core
from fwp.feature_maps import FeatureMap
from fwp.rules import Rule, lowering, reference, spec

from ..claims import Outcome, Paper, Rows, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ------------------------------------------------------------------------------------------------- rules and memories


def gated_sum_step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """(1 − β) S + β k vᵀ."""
    beta = beta[..., None, None]
    return (1 - beta) * S + beta * reference.outer(k, v)


def gated_sum_lower(core: Core, beta: Tensor) -> Core:
    """The decay is 1 − β and the keys are β k, so that z = (1 − β) z + β k."""
    return replace(lowering.decay(core, torch.log1p(-beta)), k=beta[..., None] * core.k)


def fwm_step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """The delta rule's S, divided by max(‖S‖, 1)."""
    old = (k.unsqueeze(-2) @ S).squeeze(-2)
    S = S + reference.outer(k, beta[..., None] * (v - old))
    return S / S.flatten(-2).norm(dim=-1).clamp(min=1)[..., None, None]


GATED_SUM = Rule("gated_sum", step=gated_sum_step, gates={"beta": spec.beta()}, lower=gated_sum_lower)
FWM = Rule("fwm", step=fwm_step, gates={"beta": spec.beta()}, erases=True, linear_in_v=False)


@dataclass(frozen=True)
class Update:
    """How a memory is written.

    rule, options: those of `fwp.fast_weights`. logs: its name in the authors' logs.
    """

    rule: str | Rule
    logs: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


SUM = Update("additive", "sum", {"denominator": True})
DELTA = Update("delta", "ours", {"feature_norm": "sum"})
GATED = Update(GATED_SUM, "", {"denominator": True})
NORMED = Update(FWM, "fwm")


@dataclass(frozen=True)
class Memory:
    """One line of a figure.

    phi: the feature map; None: softmax attention. d_dot: the number of features of φ, divided by d_key.
    logs: its name in the authors' logs, without the update rule.
    """

    label: str
    logs: str
    colour: str
    phi: str | FeatureMap | None = None
    d_dot: int | None = None
    update: Update = SUM

    @property
    def random(self) -> bool:
        """Whether φ is drawn anew in each pass, in training and in evaluation."""
        return self.phi == "favor+"

    def features(self, d_key: int) -> str | FeatureMap:
        """φ for one pass."""
        assert self.phi is not None and self.d_dot is not None
        # as a plain function, of which the 1e-6 in the denominator is a number, as in the paper, and no share
        return fwp.FavorPlus.draw(d_key, self.d_dot * d_key // 2).__call__ if self.random else self.phi


LINEAR = Memory("Linear", "d64_linear", "#7a7a7a", "elu+1", 1)
DPFP_1 = Memory("DPFP-1", "d64_dpfp1", "#8ecae6", "dpfp-1", 2)
DPFP_2 = Memory("DPFP-2", "d64_dpfp2", "#219ebc", "dpfp-2", 4)
FAVOR_1 = Memory("FAVOR+, m = d", "d64_favor64", "#f4b183", "favor+", 2)
FAVOR_2 = Memory("FAVOR+, m = 2d", "d64_favor128", "#e76f3c", "favor+", 4)
MEMORIES_1 = {
    "linear": LINEAR,
    "dpfp-1": DPFP_1,
    "dpfp-2": DPFP_2,
    "dpfp-3": Memory("DPFP-3", "d64_dpfp3", "#023e73", "dpfp-3", 6),
    "favor-1": FAVOR_1,
    "favor-2": FAVOR_2,
    "favor-8": Memory("FAVOR+, m = 8d", "d64_favor512", "#a63c06", "favor+", 16),
    "softmax": Memory("Softmax", "d64_softmax", "#2a9d4a"),
}
MEMORIES_2 = {
    "linear-delta": replace(LINEAR, label="Linear, delta", update=DELTA),
    "dpfp-1": replace(DPFP_1, label="DPFP-1, sum"),
    "dpfp-1-gated": replace(DPFP_1, label="DPFP-1, gated sum", colour="#b08bc9", update=GATED),
    "dpfp-1-fwm": replace(DPFP_1, label="DPFP-1, fwm", colour="#c9a227", update=NORMED),
    "dpfp-1-delta": replace(DPFP_1, label="DPFP-1, delta", colour="#219ebc", update=DELTA),
    "dpfp-2-delta": replace(DPFP_2, label="DPFP-2, delta", colour="#023e73", update=DELTA),
    "favor-1-delta": replace(FAVOR_1, label="FAVOR+, m = d, delta", update=DELTA),
    "favor-2-delta": replace(FAVOR_2, label="FAVOR+, m = 2d, delta", update=DELTA),
    "tanh-fwm": Memory("tanh, fwm", "d64_tanh", "#2f2f2f", torch.tanh, 1, NORMED),
}
MEMORIES = MEMORIES_2 | MEMORIES_1
MAPS = ("linear", "dpfp-1", "dpfp-2", "dpfp-3")  # the deterministic maps of Setting 1, by capacity


class Retrieval(nn.Module):
    """The model at the top of this file: it writes pairs of S keys and S values, and answers queries."""

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
        self.W_beta = nn.Linear(S + width, 1) if "beta" in self.rule.gates else None

    @property
    def rule(self) -> Rule:
        """The memory's update rule."""
        return rules.get(self.memory.update.rule)

    def written(self, W: nn.Linear, keys: Tensor, values: Tensor) -> Tensor:
        """W [v; e] + b of pairs [B, L]. Since v is one-hot, its product with W is a column of W."""
        of_value, of_key = W.weight.split([self.S, self.embedding.shape[1]], 1)
        return F.embedding(keys, F.linear(self.embedding, of_key, W.bias)) + F.embedding(values, of_value.T)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Indices of keys and values [B, L] and of queries [B, Q] → answers [B, Q, S]."""
        k = self.written(self.W_k, keys, values)  # [B, L, d_key]
        few = queries.shape[1] == 1
        e = self.embedding
        q = self.W_q(F.embedding(queries, e)) if few else F.embedding(queries, self.W_q(e))  # [B, Q, d_key]
        if self.memory.phi is None:
            return F.scaled_dot_product_attention(q, k, F.one_hot(values, self.S).to(k.dtype))
        update, phi = self.memory.update, self.memory.features(self.d_key)
        gates: dict[str, Any] = (
            {} if self.W_beta is None else {"beta": self.written(self.W_beta, keys, values).sigmoid()}
        )
        if few:
            answers = self.answer(phi, q, k, values, gates)
        else:
            v = F.one_hot(values, self.S).to(k.dtype).unsqueeze(2)  # [B, L, one head, S]
            q, k = q.unsqueeze(2), k.unsqueeze(2)
            unasked = k.new_zeros(1).expand_as(k)
            _, state = fwp.fast_weights(self.rule, unasked, k, v, feature_map=phi, **update.options, **gates)
            norm = update.options.get("feature_norm")
            answers = fwp.read(state, q, feature_map=phi, feature_norm=norm).squeeze(2)
        return F.layer_norm(answers, answers.shape[-1:]) if update is NORMED else answers

    def answer(
        self, phi: str | FeatureMap, q: Tensor, k: Tensor, values: Tensor, gates: Mapping[str, Tensor]
    ) -> Tensor:
        """W φ(q) for one query [B, 1, d_key] per sequence, as y = Σ c_i v_i. Not making W is S times cheaper.

        A rule that erases multiplies W by I − e φ(k) φ(k)ᵀ at each later pair. Here these factors act on the query
        instead, from the last block of pairs to the first. Per block, c solves the transpose of the chunk form's
        triangular system. A rule without a lowering steps through its equation.
        """
        options = self.memory.update.options
        q, k = (feature_maps.norm(feature_maps.get(phi)(x), options.get("feature_norm")) for x in (q, k))
        if self.rule.lower is None:
            W = k.new_zeros(len(k), k.shape[2], self.S)
            for key, value, beta in zip(k.unbind(1), values.unbind(1), gates["beta"].squeeze(2).unbind(1)):
                W = self.rule.step(W, key, F.one_hot(value, self.S).to(k.dtype), beta)
            return q @ W
        one_head = k.unsqueeze(2)
        core = self.rule.lower(Core(one_head, one_head, one_head), **gates)
        if core.e is None:
            c = core.k.squeeze(2) @ q.mT  # [B, L, 1]
        else:
            parts, reader = [], q.mT  # [B, d_dot, 1]
            for block, e in zip(reversed(k.split(64, 1)), reversed(core.e.split(64, 1))):
                erased = e * block
                later = block @ erased.mT  # the solver reads above the diagonal only
                parts.append(torch.linalg.solve_triangular(later, block @ reader, upper=True, unitriangular=True))
                reader = reader - erased.mT @ parts[-1]
            c = torch.cat(parts[::-1], 1)
        if core.g is not None:
            c = c * (core.g.sum(1, keepdim=True) - core.g.cumsum(1)).exp()
        if core.w is not None:
            c = core.w * c
        if options.get("denominator"):
            c = c / (c.sum(1, keepdim=True) + 1e-6)
        return k.new_zeros(len(k), self.S).scatter_add(1, values, c.squeeze(2)).unsqueeze(1)


# -------------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class Training:
    """The paper's settings for training."""

    batch: int = 32
    learning_rate: float = 1e-3
    max_steps: int = 100_000
    evaluate_every: int = 100
    evaluation_sequences: int = 20
    solved: float = 1e-3
    patience: int = 11


def sequences(count: int, S: int, length: int, repeated: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [count, length] below S: drawn with replacement if `repeated`, else each once."""
    if repeated:
        return torch.randint(S, (count, length)), torch.randint(S, (count, length))
    return torch.rand(count, S).argsort(-1), torch.rand(count, S).argsort(-1)


def latest(keys: Tensor, values: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """The last value of each of the S keys, and whether it has one, [B, S]."""
    last = torch.full((len(keys), S), -1).scatter_reduce(1, keys, torch.arange(keys.shape[1]).expand_as(keys), "amax")
    return values.gather(1, last.clamp(min=0)), last >= 0


def losses(answers: Tensor, values: Tensor) -> Tensor:
    """½ ‖y − one-hot(value)‖² of answers [B, Q, S] to queries with values [B, Q]."""
    return 0.5 * (answers - F.one_hot(values, answers.shape[-1])).square().sum(-1)


@torch.no_grad()
def evaluate(model: Retrieval, count: int, length: int, repeated: bool) -> float:
    """The mean loss over all keys of new sequences. If φ is random, each sequence draws its own φ."""
    keys, values = sequences(count, model.S, length, repeated)
    asked = torch.arange(model.S).expand(count, -1)
    targets, there = latest(keys, values, model.S)
    one_by_one = 1 if model.memory.random else count
    answers = [model(*part) for part in zip(*(x.split(one_by_one) for x in (keys, values, asked)))]
    return losses(torch.cat(answers), targets)[there].mean().item()


def train(settings: Settings) -> dict[str, Any]:
    """Trains one run, and returns its best evaluation loss, the step of it, and the last step.

    "diverged" says that a later evaluation was not finite. In Setting 2, "loss_2S" is the loss on sequences of 2S pairs
    at the best step. "curve" holds evaluation losses, one per "curve_every" steps from the first evaluation on.
    """
    S, repeated = settings["keys"], settings["repeated"]
    how = Training(**{name: settings[name] for name in asdict(Training())})
    length = 2 * S if repeated else S
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(settings["seed"])
        model = Retrieval(MEMORIES[settings["model"]], S, settings["d_key"])
        optimizer = torch.optim.Adam(model.parameters(), how.learning_rate, fused=True)
        result: dict[str, Any] = {"best_loss": math.inf, "best_step": 0}
        step, curve = 0, []
        while result["best_loss"] > how.solved and step < min(
            how.max_steps, result["best_step"] + how.patience * how.evaluate_every
        ):
            step += 1
            keys, values = sequences(how.batch, S, length, repeated)
            query = keys.gather(1, torch.randint(length, (how.batch, 1)))
            optimizer.zero_grad()
            losses(model(keys, values, query), latest(keys, values, S)[0].gather(1, query)).mean().backward()
            optimizer.step()
            if step % how.evaluate_every == 0:
                now = evaluate(model, how.evaluation_sequences, S, repeated)
                if not math.isfinite(now):
                    if math.isinf(result["best_loss"]):
                        raise FloatingPointError(f"the evaluation loss is {now} at step {step} of {dict(settings)}")
                    result["diverged"] = True  # no later evaluation can be better
                    break
                curve.append(float(f"{now:.3g}"))
                if now < result["best_loss"]:
                    result = {"best_loss": now, "best_step": step}
                    if repeated:
                        result["loss_2S"] = evaluate(model, how.evaluation_sequences, length, repeated)
    every = max(1, math.ceil(len(curve) / 50))  # at most 50 points are kept
    return result | {"last_step": step, "curve": curve[::every], "curve_every": every * how.evaluate_every}


def runs(
    d_key: int, keys: Mapping[str, Iterable[int]], seeds: int, repeated: bool = False, **training: Any
) -> list[dict[str, Any]]:
    """One run per model, number of keys and seed.

    The longest runs come first, so that all cores end at about the same time.
    """
    of_model = {"tanh-fwm": {"batch": 128, "learning_rate": 1e-4}}
    grid = [
        {"model": model, "d_key": d_key, "keys": S, "repeated": repeated, "seed": seed}
        | asdict(Training(**of_model.get(model, {}) | training))
        for model, sizes in keys.items()
        for S in sizes
        for seed in range(1, seeds + 1)
    ]
    return sorted(grid, key=lambda run: -run["keys"] * (MEMORIES[run["model"]].d_dot or 1))


# ------------------------------------------------------------------------------------------------------- the comparison


def capacity(row: Mapping[str, Any]) -> float:
    """d_dot, the number of features. It is infinite for softmax attention."""
    return (MEMORIES[row["model"]].d_dot or math.inf) * row["d_key"]


def fullness(row: Mapping[str, Any]) -> float:
    """S / d_dot."""
    return float(row["keys"] / capacity(row))


def floor(row: Mapping[str, Any]) -> float:
    """½ (1 − d_dot / S), the least loss that a memory of d_dot features can have; 0 within its capacity."""
    return 0.5 * (1 - 1 / fullness(row)) if fullness(row) > 1 else 0.0


def solved(row: Mapping[str, Any]) -> bool:
    """Whether the run reached the paper's loss of 0.001."""
    return bool(row["best_loss"] <= 1e-3)


def authors(memories: Mapping[str, Memory], repeated: bool) -> list[dict[str, Any]]:
    """The authors' runs of a setting, as rows like ours.

    The file has the last finite evaluation. From there FAVOR+ with delta went on in NaN, until the eleventh evaluation
    without a new best. One log is left out because it ends while the loss still falls: DPFP-2 with delta at S = 100,
    at a loss of 0.085.
    """
    names = {f"{memory.logs}_{memory.update.logs}": name for name, memory in memories.items() if memory.update.logs}
    names["d64_softmax_cat"] = "softmax"
    with Path(__file__).with_name("associative_retrieval_2021.csv").open(encoding="utf-8", newline="") as file:
        logs = [
            row for row in csv.DictReader(file) if row["replacement"] == str(int(repeated)) and row["model"] in names
        ]
    rows = []
    for log in logs:
        row: dict[str, Any] = {
            "model": names[log["model"]],
            "d_key": 64,
            "keys": int(log["keys"]),
            "repeated": repeated,
            "seed": 1,
        }
        row |= {name: int(log[name]) for name in ("best_step", "last_step")} | {"best_loss": float(log["best_loss"])}
        whole = solved(row) or row["last_step"] == row["best_step"] + 1100
        if whole or MEMORIES[row["model"]].random:
            rows.append(row if whole else row | {"diverged": True})
    return rows


SOURCE = "the authors’ logs, d_key 64, one seed"


def rows_of_model(rows: Rows, model: str) -> list[Mapping[str, Any]]:
    """The runs of a model, in the order of S."""
    return sorted((row for row in rows if row["model"] == model), key=lambda row: row["keys"])


def best(rows: Rows, model: str, column: str = "best_loss") -> dict[int, float]:
    """A model's loss per S, the median over seeds."""
    found: dict[int, list[float]] = {}
    for row in rows_of_model(rows, model):
        found.setdefault(row["keys"], []).append(row[column])
    return {S: median(values) for S, values in found.items()}


def measure_deviation(published: Rows) -> Callable[[Rows], Outcome]:
    """Measures |ours / theirs − 1| at the points that both ran and that the authors left unsolved.

    Our loss is the median over seeds.
    """
    theirs = {(row["model"], row["d_key"], row["keys"]): row for row in published}

    def measure(rows: Rows) -> Outcome:
        ours: dict[Any, list[float]] = {}
        for row in rows:
            ours.setdefault((row["model"], row["d_key"], row["keys"]), []).append(row["best_loss"])
        pairs = [(theirs[point], median(found)) for point, found in ours.items() if point in theirs]
        if not pairs:
            return Outcome(None, None, note="the authors logged d_key 64 only")
        off = [(row, abs(loss / row["best_loss"] - 1)) for row, loss in pairs if not solved(row)]
        found = [x for _, x in off]
        near = [x for row, x in off if 0.75 <= fullness(row) <= 1.25]
        alone = sum(solved(row) != (loss <= 1e-3) for row, loss in pairs)
        note = f"{len(found)} points"
        note += f"; {median(near):.0%} on the {len(near)} where S is within a quarter of d_dot" if near else ""
        note += f"; of all {len(pairs)} common points {alone} were solved by one side only"
        quartiles = [round(x, 3) for x in quantiles(found)[::2]] if len(found) > 1 else None
        return Outcome(round(median(found), 3), median(found) <= 0.1, quartiles, note)

    return measure


def over_seeds(rows: Rows, model: str, x: Callable[[Any], float]) -> tuple[list[float], ...]:
    """A model's values of x in order, and per value the median, lowest and highest loss."""
    points: dict[float, list[float]] = {}
    for row in rows_of_model(rows, model):
        points.setdefault(x(row), []).append(row["best_loss"])
    xs = sorted(points)
    return xs, *([statistic(points[at]) for at in xs] for statistic in (median, min, max))


def lines(axes: Axes, rows: Rows, memories: Mapping[str, Memory], theirs: Rows) -> None:
    """Draws one line per model with its range over seeds, and the authors' dotted at their d_key."""
    d_key = rows[0]["d_key"]
    for name, memory in memories.items():
        xs, middle, low, high = over_seeds(rows, name, lambda row: row["keys"])
        if not xs:
            continue
        marker = "s" if memory.phi is None else "o"
        axes.plot(xs, middle, marker=marker, markersize=3.5, lw=1.2, color=memory.colour, label=memory.label)
        axes.fill_between(xs, low, high, color=memory.colour, alpha=0.25, lw=0)
        lost = [(row["keys"], row["best_loss"]) for row in rows_of_model(rows, name) if row.get("diverged")]
        axes.plot(*zip(*lost) if lost else ([], []), "o", mfc="white", color=memory.colour, markersize=4, zorder=3)
        if d_key == 64:
            xs, middle, *_ = over_seeds(theirs, name, lambda row: row["keys"])
            axes.plot(xs, middle, "x:", markersize=4, lw=0.8, color=memory.colour, alpha=0.8)
    if d_key == 64:
        axes.plot([], [], "kx:", markersize=4, lw=0.8, label="the authors' logs")
    if any(row.get("diverged") for row in rows):
        axes.plot([], [], "o", color="k", mfc="white", markersize=4, label="ended in NaN")
    axes.set(xlabel=f"number of keys S, at d_key = {d_key}", ylabel="best evaluation loss (0.5: the answer 0)")


def legend(axes: Axes, columns: int) -> None:
    """Puts a legend above the axes."""
    above = (-0.02, 1)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=above,
        ncols=columns,
        frameon=False,
        fontsize=8,
        columnspacing=1,
        handlelength=1.5,
    )


def summarise_run(row: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    return (
        f"{MEMORIES[row['model']].label}, S = {row['keys']}, seed {row['seed']}: best loss {row['best_loss']:.3g} "
        f"at step {row['best_step']} of {row['last_step']}{', then NaN' * row.get('diverged', False)}, "
        f"{row['seconds']:.0f} s"
    )


PAPER = Paper(
    "Schlag, Irie, Schmidhuber 2021, Linear Transformers Are Secretly Fast Weight Programmers, arXiv 2102.11174",
    not_attempted=(
        "machine translation, WMT14 English to German: BLEU",
        "language models, WikiText-103: perplexity by update rule and feature map",
        "WikiText-103 ablations: positions, attention norm and sum norm",
        "WikiText-103 without truncated context: perplexity by state size",
        "training speed in words per second",
    ),
)
STOPPING = (
    "The loss is ½ ‖y − v‖²; answering 0 costs 0.5. Adam at 0.001, batches of 32. Every 100 steps the loss is "
    "evaluated on all keys of 20 new sequences.",
    "A run ends at a loss of 0.001 (solved), at the eleventh evaluation in a row without a new best, or after 100,000 "
    "steps. Its result is the best loss.",
)
DUAL = (
    "Training asks for one key per sequence, evaluation for all. The evaluated memory is the state of "
    "fwp.fast_weights, read by fwp.read. The one answer of a training sequence is the same product, taken from the "
    "query backwards, without making W."
)
DEVIATION = "On the points that the authors left unsolved, our loss deviates from theirs by at most 10 % in the median."
EMBEDDING = (
    "Keys have learned embeddings e of int(2.2 S) numbers. k = W_k [v; e] + b sees its one-hot value v, and "
    "q = W_q e + b; both have d_key numbers."
)
