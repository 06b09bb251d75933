"""How much recall does a state of constant size buy? Multi-query associative recall (MQAR).

From two papers of Arora et al.: "Zoology: Measuring and Improving Recall in Efficient Language Models", ICLR 2024,
arXiv 2312.04927 (the task and its Figure 2), and "Simple linear attention language models balance the recall-throughput
tradeoff", ICML 2024, arXiv 2402.18668 (accuracy against state size). Softmax attention keeps the whole past; fast
weights keep one matrix.

Data. A sequence of L tokens begins with `pairs` keys, each followed by its value. Later every key comes once more, and
its value is the token to be predicted there. Keys are drawn from the lower half of the vocabulary, except token 0, and
values from the upper half, both without replacement. A key is asked for at the n-th even place after the context with
p ∝ n^(0.01 − 1), and no two keys at the same place. All other tokens are 0, as in the configuration of Figure 2.
Model. Embedding, dropout 0.1, two blocks, norm, and the embedding's transpose as head. A block is x + mixer(norm x),
then x + norm x: their block without a feed-forward net. Every norm is a LayerNorm. Weights start as N(0, 0.02²), those
of a convolution as PyTorch's default.
Mixers. Each has one head, with or without a short convolution of width 4 on q, k and v.
- Softmax attention. Without a convolution, learned positions are added to the embeddings, as in their Figure 2, because
  attention by content alone cannot find the previous token. With one there are none, as in the second paper's figure.
- Linear attention. φ = elu + 1 with the denominator, as in the second paper's comparison of feature maps.
- Delta rule and gated delta rule. The layers of arXiv 2406.06484 and 2412.06464.
Training. Cross entropy at the answers, over the whole vocabulary. AdamW with weight decay 0.1; the learning rate falls
to 0 along a cosine. After each pass over the training sequences the model is tested, and training stops when more than
99 % of the test answers are right.

Differences from their configuration: one learning rate, where they take the best of four. Batches of 32 or 64, not 512.
The cosine falls at each step, not at each pass. There is no dropout of attention weights. The projection out of a mixer
starts with the same standard deviation as the others, where theirs starts with half of it. Their convolution is a gated
layer of its own, one of two layers, and the mixer is the other; here each of the two mixers has a convolution. At the
scale "quick" the vocabulary is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwp.nn import PRESETS, Block, LayerState, ShortConvolution

from ..claims import Claim, Family, Outcome, Paper, Rows, Scale, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ------------------------------------------------------------------------------------------------------------ the data


def distinct(rows: int, count: int, start: int, stop: int) -> Tensor:
    """Rows of `count` different numbers from start to stop − 1, in random order.

    All such rows are equally likely (Floyd's sampling).
    """
    chosen = torch.empty(rows, 0, dtype=torch.int64)
    for last in range(stop - count, stop):
        drawn = torch.randint(start, last + 1, (rows, 1))
        chosen = torch.cat([chosen, torch.where((chosen == drawn).any(1, keepdim=True), last, drawn)], 1)
    return chosen.gather(1, torch.rand(rows, count).argsort(1))


def sequences(rows: int, L: int, pairs: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [rows, L], the places of the questions [rows, pairs], and their answers [rows, pairs]."""
    keys = distinct(rows, pairs, 1, vocabulary // 2)
    values = distinct(rows, pairs, vocabulary // 2, vocabulary)
    tokens = torch.zeros(rows, L, dtype=torch.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = (L - 2 * pairs) // 2
    odds = torch.arange(1, places + 1).double() ** (0.01 - 1)
    asked = 2 * pairs + 2 * torch.multinomial(odds.expand(rows, -1), pairs)
    return tokens.scatter_(1, asked, keys), asked, values


# ----------------------------------------------------------------------------------------------------------- the model


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with one head: softmax(q kᵀ / √E) v.

    Its state is all keys and values, and the convolution's tail.
    """

    def __init__(self, embed_dim: int, num_heads: int = 1, short_conv: int = 0) -> None:
        super().__init__()
        assert num_heads == 1
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.conv = ShortConvolution(3 * embed_dim, short_conv) if short_conv else None
        self.o = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, LayerState]:
        """x [B, T, E] → [B, T, E] and the state."""
        qkv, tail = self.qkv(x), None
        if self.conv is not None:
            qkv, tail = self.conv(qkv)
        q, k, v = qkv.chunk(3, -1)
        y = self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return y, LayerState((k, v), tail, torch.full((len(x),), x.shape[1], device=x.device))


@dataclass(frozen=True)
class Mixer:
    """One line of the figure. make: (embed_dim, num_heads, short_conv) → the layer."""

    label: str
    colour: str
    make: Callable[..., nn.Module]


MIXERS = {
    "softmax": Mixer("Softmax attention", "#2a9d4a", SoftmaxAttention),
    "linear": Mixer("Linear attention", "#7a7a7a", PRESETS["linear_transformer"]),
    "delta": Mixer("Delta rule", "#219ebc", PRESETS["delta_net"]),
    "gated_delta": Mixer("Gated delta rule", "#e76f3c", PRESETS["gated_delta_net"]),
}
FAST_WEIGHTS = ("linear", "delta", "gated_delta")


class Recall(nn.Module):
    """The model at the top of this file: tokens → logits at the places of the questions."""

    def __init__(self, model: str, conv: int, L: int, d: int, vocabulary: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(L, d) if model == "softmax" and not conv else None
        self.dropout = nn.Dropout(dropout)
        make = MIXERS[model].make
        self.blocks = nn.ModuleList(
            Block(d, make(d, 1, short_conv=conv), nn.Identity(), norm="layer") for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[LayerState]]:
        """Tokens [B, L] → the last block's output [B, L, d], and the state of each block."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        x, states = self.dropout(x), []
        for block in self.blocks:
            x, state = block(x)
            states.append(state)
        return x, states

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Tokens [B, L] and places of the questions [B, Q] → logits [B, Q, vocabulary] at these places only."""
        x, _ = self.hidden(tokens)
        x = x.gather(1, asked.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return self.norm(x) @ self.embedding.weight.T


@torch.no_grad()
def state_size(model: Recall, L: int) -> int:
    """How many numbers a layer keeps after L tokens: its memory and the convolution's tail."""
    _, states = model.hidden(torch.zeros(1, L, dtype=torch.int64))
    return sum(kept.numel() for kept in (*states[0].memory, states[0].conv) if kept is not None)


# -------------------------------------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class Training:
    """The paper's settings for training. 1e-2 is the highest of its four learning rates."""

    vocabulary: int = 8192
    sequences: int = 100_000
    passes: int = 64
    batch: int = 512
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    dropout: float = 0.1
    layers: int = 2
    test_sequences: int = 3000
    solved: float = 0.99


@torch.no_grad()
def evaluate(model: Recall, test: tuple[Tensor, Tensor, Tensor], batch: int) -> float:
    """The share of test questions for which the right value is the most likely token."""
    model.eval()
    right = [
        model(tokens, asked).argmax(-1) == values for tokens, asked, values in zip(*(x.split(batch) for x in test))
    ]
    model.train()
    return torch.cat(right).double().mean().item()


def train(settings: Settings) -> dict[str, Any]:
    """Trains one run. Returns its last accuracy, that after each pass, and the size of a state."""
    how = Training(**{name: settings[name] for name in asdict(Training())})
    L, pairs = settings["L"], settings["pairs"]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(settings["seed"])
        tokens, asked, values = sequences(how.sequences, L, pairs, how.vocabulary)
        test = sequences(how.test_sequences, L, pairs, how.vocabulary)
        model = Recall(settings["model"], settings["conv"], L, settings["d"], how.vocabulary, how.layers, how.dropout)
        optimizer = torch.optim.AdamW(model.parameters(), how.learning_rate, weight_decay=how.weight_decay, fused=True)
        steps = how.passes * -(-how.sequences // how.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        accuracy, done, curve = 0.0, 0, []
        while accuracy <= how.solved and done < how.passes:
            done += 1
            for rows in torch.randperm(how.sequences).split(how.batch):
                optimizer.zero_grad()
                logits = model(tokens[rows], asked[rows])
                F.cross_entropy(logits.flatten(0, 1), values[rows].flatten()).backward()
                optimizer.step()
                schedule.step()
            accuracy = evaluate(model, test, how.batch)
            curve.append(round(accuracy, 4))
    return {"accuracy": round(accuracy, 5), "passes_done": done, "state": state_size(model.cpu(), L), "curve": curve}


# ----------------------------------------------------------------------------------------------------------- the grids

SIZES = ((64, 4), (128, 8), (256, 16))  # L, pairs
RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)


def runs(
    sizes: Iterable[tuple[int, int]],
    widths: Iterable[int],
    training: Training = Training(),
    learning_rates: Iterable[float] = RATES[-1:],
    convolutions: Iterable[int] = (4, 0),
    seeds: int = 1,
) -> list[dict[str, Any]]:
    """One run per size, width d, convolution, mixer, learning rate and seed.

    sizes: (L, pairs). convolutions: widths, 0 for none.
    """
    return [
        {"model": model, "conv": conv, "L": L, "pairs": pairs, "d": d, "seed": seed}
        | asdict(training)
        | {"learning_rate": learning_rate}
        for L, pairs in sizes
        for d in widths
        for conv in convolutions
        for model in MIXERS
        for learning_rate in learning_rates
        for seed in range(1, seeds + 1)
    ]


SMOKE = Training(vocabulary=64, sequences=64, passes=1, batch=32, test_sequences=32)
QUICK = Training(vocabulary=1024, sequences=10_000, passes=3, batch=32, test_sequences=500)
REDUCED = Training(sequences=20_000, passes=3, batch=64)
SCALES = {
    "smoke": Scale(runs(SIZES[:1], [16], SMOKE), "seconds; shows that the code runs", False),
    "quick": Scale(
        runs(SIZES[:1], [16], QUICK, convolutions=[4], seeds=2) + runs(SIZES[:1], [32], QUICK),
        "three minutes on 2 cores; L = 64, vocabulary of 1,024",
    ),
    "reduced": Scale(
        runs(SIZES[:2], [32, 64], REDUCED, convolutions=[4]) + runs(SIZES[:2], [64], REDUCED, convolutions=[0]),
        "an hour on 2 cores; 20,000 sequences, one learning rate",
    ),
    "paper": Scale(
        runs(SIZES[:2], [64, 128, 256, 512], Training(), RATES)
        + runs(SIZES[2:], [64, 128, 256, 512], Training(batch=256), RATES),
        "days on a GPU, estimated; the best of four learning rates",
    ),
}

# ---------------------------------------------------------------------------------------------------------- the claims

Point = tuple[str, bool, int, int]  # mixer, whether it has a convolution, L, d


def by_seed(rows: Rows) -> dict[Point, list[float]]:
    """The accuracies per point: one per seed, at the best learning rate of that seed."""
    best: dict[Point, dict[int, float]] = {}
    for row in rows:
        seeds = best.setdefault((row["model"], row["conv"] > 0, row["L"], row["d"]), {})
        seeds[row["seed"]] = max(row["accuracy"], seeds.get(row["seed"], 0.0))
    return {point: list(seeds.values()) for point, seeds in best.items()}


def points(rows: Rows) -> dict[Point, float]:
    """The accuracy per point, the median over seeds."""
    return {point: median(found) for point, found in by_seed(rows).items()}


def select(rows: Rows, models: Sequence[str], conv: bool) -> dict[Point, float]:
    """The points of these mixers, with a convolution or without."""
    return {point: value for point, value in points(rows).items() if point[0] in models and point[1] is conv}


def point_in_words(point: Point) -> str:
    """A point in words."""
    model, conv, L, d = point
    return f"{MIXERS[model].label.lower()} {'with' if conv else 'without'} convolution at L = {L}, d = {d}"


def solved(rows: Rows) -> float:
    """The accuracy above which a run stops. Differences above it mean nothing."""
    return float(rows[0]["solved"])


def note(rows: Rows, why: str = "") -> str:
    """A claim's note: how the runs differ from the paper's, and why the claim doesn't hold."""
    ours, paper = rows[0], Training()
    names = {
        "vocabulary": "tokens",
        "sequences": "training sequences",
        "passes": "passes over them",
        "batch": "sequences a batch",
    }
    fewer = [f"{ours[key]:,} {word}, not {getattr(paper, key):,}" for key, word in names.items()]
    changed = [text for text, key in zip(fewer, names) if ours[key] != getattr(paper, key)]
    return "; ".join(filter(None, (", ".join(changed), why)))


def as_long(rows: Rows) -> bool:
    """Whether every model saw as many sequences as the paper's.

    If not, more training might solve a task that is unsolved here.
    """
    paper = Training()
    return all(row["sequences"] * row["passes"] >= paper.sequences * paper.passes for row in rows)


def solves(conv: bool) -> Callable[[Rows], Outcome]:
    """Measures the lowest accuracy of softmax attention over L and d. All must solve the task."""

    def measure(rows: Rows) -> Outcome:
        found = select(rows, ["softmax"], conv)
        worst = min(found, key=found.__getitem__)
        lowest = round(found[worst], 3)
        if found[worst] > solved(rows):
            return Outcome(lowest, True, note=note(rows))
        if as_long(rows):
            return Outcome(lowest, False, note=note(rows, f"lowest: {point_in_words(worst)}"))
        return Outcome(lowest, None, note=note(rows, f"undecided: too little training for {point_in_words(worst)}"))

    return measure


def measure_linear_alone(rows: Rows) -> Outcome:
    """Measures the highest accuracy of linear attention without a convolution.

    Only points at which softmax attention without a convolution solves the task count: there training was long enough.
    """
    rivals, found = select(rows, ["softmax"], False), select(rows, ["linear"], False)
    fair = {p: value for p, value in found.items() if rivals[("softmax",) + p[1:]] > solved(rows)}
    if not fair:
        best = round(max(found.values()), 3)
        return Outcome(best, None, note=note(rows, "undecided: no more did softmax attention with positions"))
    return Outcome(round(max(fair.values()), 3), max(fair.values()) <= solved(rows), note=note(rows))


def compare(rows: Rows, lower: Iterable[Point], higher: Callable[[Point], Point]) -> Outcome:
    """Compares each of the lower points with the point that is expected to be more accurate.

    The claim holds if the higher point is nowhere less accurate and somewhere more accurate, both by more than 0.01.
    The lowest seed of the higher point is compared with the highest seed of the lower one. An accuracy above the one
    at which runs stop counts as that one.
    """
    found, top = by_seed(rows), solved(rows)
    gains = {p: min(*found[higher(p)], top) - min(max(found[p]), top) for p in lower if higher(p) in found}
    if not gains:
        return Outcome(None, None, note="nothing to compare at this scale")
    worst = min(gains, key=gains.__getitem__)
    holds = gains[worst] >= -0.01 and max(gains.values()) > 0.01
    why = (
        f"least: {point_in_words(higher(worst))}, {min(found[higher(worst)]):.3f}, "
        f"against {point_in_words(worst)}, {max(found[worst]):.3f}"
    )
    fewest = min(min(len(found[p]), len(found[higher(p)])) for p in gains)
    why = "; ".join([why] * (not holds) + ["some points have one seed"] * (fewest == 1))
    measured = f"{sum(gain > 0.01 for gain in gains.values())} of {len(gains)} higher"
    return Outcome(measured, holds, [round(gains[worst], 3), round(max(gains.values()), 3)], note(rows, why))


def learned(rows: Rows, point: Point) -> bool:
    """Whether some seed is more accurate than a guess among the values of the context, by half of such a guess."""
    pairs = next(row["pairs"] for row in rows if row["L"] == point[2])
    return max(by_seed(rows)[point]) > 1.5 / pairs


def measure_convolution(rows: Rows) -> Outcome:
    """Compares only where the net without a convolution learned something. Beating a guess shows nothing."""
    plain = select(rows, FAST_WEIGHTS, False)
    fair = [point for point in plain if learned(rows, point)]
    left_out = f"undecided: without one, {len(plain) - len(fair)} of {len(plain)} nets are at the guess line"
    if not fair:
        return Outcome(None, None, note=note(rows, left_out))
    outcome = compare(rows, fair, lambda p: (p[0], True, *p[2:]))
    everywhere = outcome.holds and outcome.spread is not None and outcome.spread[0] > 0.01
    decided = everywhere if len(fair) == len(plain) or not everywhere else None
    why = [outcome.note] + [left_out] * (len(fair) < len(plain))
    return Outcome(outcome.measured, decided, outcome.spread, "; ".join(filter(None, why)))


def measure_delta(rows: Rows) -> Outcome:
    return compare(rows, select(rows, ["linear"], True), lambda p: ("delta", *p[1:]))


def measure_state(rows: Rows) -> Outcome:
    widths = sorted({row["d"] for row in rows})
    wider = dict(pairwise(widths))
    return compare(rows, select(rows, FAST_WEIGHTS, True), lambda p: (*p[:3], wider.get(p[3], 0)))


def measure_length(rows: Rows) -> Outcome:
    lengths = sorted({row["L"] for row in rows})
    shorter = {long: short for short, long in pairwise(lengths)}
    return compare(rows, select(rows, FAST_WEIGHTS, True), lambda p: (*p[:2], shorter.get(p[2], 0), p[3]))


# ---------------------------------------------------------------------------------------------------------- the figure


def draw(rows: Rows) -> Figure:
    """Draws accuracy against state size: one panel per length, one line per model, one point per width."""
    from matplotlib.figure import Figure

    sizes = sorted({(row["L"], row["pairs"]) for row in rows})
    found, each = points(rows), by_seed(rows)
    states = {(row["model"], row["conv"] > 0, row["L"], row["d"]): row["state"] for row in rows}
    grown = {d: 4.0 + 2.5 * n for n, d in enumerate(sorted({point[3] for point in found}))}  # a marker's size
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, (L, pairs) in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes):
        for model, mixer in MIXERS.items():
            for conv in (True, False):
                line = sorted(p for p in found if p[:3] == (model, conv, L))
                axes.plot(
                    [states[p] for p in line],
                    [found[p] for p in line],
                    "-" if conv else "--",
                    color=mixer.colour,
                    lw=1.3,
                )
                for p in line:
                    shape = "s" if model == "softmax" else "o"
                    fill = mixer.colour if conv else "none"
                    axes.plot(states[p], found[p], shape, color=mixer.colour, markersize=grown[p[3]], mfc=fill)
                    axes.vlines(states[p], min(each[p]), max(each[p]), color=mixer.colour, lw=1.2)
        axes.axhline(1 / pairs, color="black", lw=0.7, ls=":")
        axes.set(ylim=(-0.02, 1.03), title=f"L = {L}, {pairs} pairs", ylabel="accuracy")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("numbers in a layer's state after L tokens")
    handles = [
        axes.plot([], [], color=mixer.colour, marker="s" if model == "softmax" else "o", lw=1.3, label=mixer.label)[0]
        for model, mixer in MIXERS.items()
    ]
    black = {"color": "black", "marker": "o", "lw": 1.3}
    handles += axes.plot([], [], **black, label="short convolution")
    handles += axes.plot([], [], **black, ls="--", mfc="none", label="none (softmax: learned positions)")
    for d, size in grown.items():
        handles += axes.plot([], [], "o", color="#8a8a8a", markersize=size, label=f"width {d}")
    handles += axes.plot([], [], "k:", lw=0.7, label="a guess among the values of the context")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------- the family


def summarise_run(row: Mapping[str, Any]) -> str:
    """A finished run in one line."""
    point = (row["model"], row["conv"] > 0, row["L"], row["d"])
    result = f"{row['accuracy']:.1%}, {row['passes_done']} passes, {row['seconds']:.0f} s"
    return f"{point_in_words(point)}, seed {row['seed']}: {result}"


ZOOLOGY, BASED = "arXiv 2312.04927", "arXiv 2402.18668"

MQAR = Family(
    id="arora2023-mqar",
    title="How much recall does a state of constant size buy?",
    paper=Paper(
        "Arora et al. 2023, Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927",
        not_attempted=(
            "language models, the Pile: perplexity, and how much of its gap is associative recall",
            "MQAR with gated convolutions (Hyena, H3, RWKV, BaseConv)",
            "hybrids that attend only where recall needs it",
        ),
    ),
    question="Softmax attention keeps every key and value; fast weights keep one matrix. A sequence shows some keys, "
    "each followed by its value, and then asks for each key once. How much does each update rule recall from a state "
    "of a given size? And how much does it help if a short convolution shows a layer a key and its value at once?",
    protocol=(
        "The first 2 · pairs of L tokens are keys, each followed by its value. Keys come from one half of the "
        "vocabulary and values from the other, without replacement. Then each key comes once more, at the n-th even "
        "place with p ∝ n^(0.01 − 1). There its value is to be predicted. Everything else is token 0.",
        "Embedding, dropout 0.1, two blocks, LayerNorm, tied head. A block is x + mixer(LN x), then x + LN x: the "
        "paper’s block without a feed-forward net. One head. Weights start as N(0, 0.02²), those of a convolution "
        "uniform in ±½.",
        "Softmax attention has learned positions, or a short convolution and no positions. Linear attention has "
        "φ = elu + 1 and its denominator. The delta rule and the gated delta rule are the layers of arXiv 2406.06484 "
        "and 2412.06464. The short convolution mixes the last 4 tokens of q, k and v, each channel by itself.",
        "Cross entropy at the answers, over the whole vocabulary. AdamW with weight decay 0.1; the learning rate falls "
        "to 0 along a cosine. Training is tested after each pass and stops when more than 99 % of the test answers are "
        "right. The result is the last accuracy.",
        "The state size counts the numbers that one layer keeps after L tokens: S, z and the convolution’s last 3 "
        "inputs. For softmax attention it counts 2 L d numbers and these inputs, so it grows with L.",
    ),
    caption="Accuracy against the numbers in a layer’s state, with one point per width d. The state of softmax "
    "attention grows with L; the others do not. A run ends above 99 %, so differences there mean nothing. At the "
    "dotted line a model knows the values of the context, but not which of them belongs to the key. The numbers are d; "
    "bars span the seeds.",
    scales=SCALES,
    train=train,
    summarise=summarise_run,
    draw=draw,
    claims=(
        Claim(
            "attention-positions",
            "Softmax attention with learned positions solves every length at every width.",
            1.0,
            f"{ZOOLOGY}, Figure 2, read off: L 64 to 512, d 64 to 512",
            "lowest accuracy over L and d; holds above 0.99; below it decided only after as much training",
            solves(False),
        ),
        Claim(
            "attention-convolution",
            "Softmax attention with a short convolution instead of positions solves every length at every width.",
            1.0,
            f"{BASED}, section 3.1: “Attention achieves perfect recall accuracy”, its convolution a layer of its own, "
            "on mixed lengths",
            "lowest accuracy over L and d; holds above 0.99; below it decided only after as much training",
            solves(True),
        ),
        Claim(
            "linear-alone",
            "Without a convolution linear attention solves no length at any width at which softmax attention with "
            "positions does.",
            None,
            f"{BASED}, introduction: “linear attention alone struggles to solve associative recall”",
            "highest accuracy of linear attention over such L and d (over all, where there is none); holds up to 0.99",
            measure_linear_alone,
        ),
        Claim(
            "convolution",
            "With the same training a short convolution makes linear attention, the delta rule and the gated delta "
            "rule more accurate, at every length and width.",
            None,
            f"{BASED}, section 4: “Linear attention lacks the precision to perform local token shifts”",
            "accuracy with minus without, both up to 0.99, lowest seed against highest, where the net without learned "
            "something (1.5 times a guess); holds if above 0.01 everywhere, undecided where it learned nothing",
            measure_convolution,
        ),
        Claim(
            "delta-over-linear",
            "With a short convolution the layer of the delta rule recalls more than that of linear attention of the "
            "same width, whose state is as large but for z. (They differ in norms and activations too.)",
            None,
            "arXiv 2406.06484, abstract: the delta rule was found “more effective at associative recall”",
            "accuracy of delta minus linear, both up to 0.99, lowest seed against highest; holds if nowhere below "
            "−0.01 and somewhere above 0.01",
            measure_delta,
        ),
        Claim(
            "state",
            "With a short convolution, a larger state recalls more: linear attention, delta rule, gated delta rule.",
            None,
            f"{BASED}, section 3.1: within a class of models “increasing the recurrent state size almost always leads "
            "to an improvement in accuracy”",
            "accuracy at a width minus the next smaller, both up to 0.99, lowest seed against highest; holds if "
            "nowhere below −0.01 and somewhere above 0.01",
            measure_state,
        ),
        Claim(
            "length",
            "With a short convolution, more pairs in a longer sequence are harder for the same state.",
            None,
            f"{ZOOLOGY}, the authors’ code: “Increasing the sequence length correlates with increased task difficulty”",
            "accuracy at a length minus the next longer, both up to 0.99, lowest seed against highest; holds if "
            "nowhere below −0.01 and somewhere above 0.01",
            measure_length,
        ),
    ),
)
