"""Multi-query associative recall: the paper's data and model, reproducible runs, claims that can fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fwp_benchmarks import reproduce, results
from fwp_benchmarks.claims import Claim
from fwp_benchmarks.papers import zoology as paper

TINY = {"vocabulary": 24, "sequences": 2000, "passes": 4, "batch": 20, "test_sequences": 100}


def settings(**changes: Any) -> dict[str, Any]:
    return paper.runs([(12, 2)], [32])[2] | TINY | changes  # the delta rule with a convolution


# ---- the data ----


def test_sequences_are_the_papers() -> None:
    torch.manual_seed(0)
    L, pairs, vocabulary = 24, 4, 30
    for tokens, asked, values in zip(*paper.sequences(200, L, pairs, vocabulary)):
        keys = tokens[: 2 * pairs : 2].tolist()
        assert tokens[1 : 2 * pairs : 2].tolist() == values.tolist()
        assert len(set(keys)) == len(set(values.tolist())) == pairs
        assert all(0 < key < vocabulary // 2 for key in keys)
        assert all(vocabulary // 2 <= value < vocabulary for value in values.tolist())
        assert tokens[asked].tolist() == keys
        assert len(set(asked.tolist())) == pairs
        assert all(2 * pairs <= place < L and place % 2 == 0 for place in asked.tolist())
        assert int((tokens != 0).sum()) == 3 * pairs


def near(counts: Counter[Any], odds: dict[Any, float]) -> bool:
    """Whether draws have these probabilities, up to five standard deviations each."""
    total = counts.total()
    return counts.keys() <= odds.keys() and all(
        abs(counts[each] - total * p) < 5 * (total * p * (1 - p)) ** 0.5 for each, p in odds.items()
    )


def test_draws_have_the_papers_probabilities() -> None:
    torch.manual_seed(0)
    couples = [(a, b) for a in range(3, 8) for b in range(3, 8) if a != b]
    drawn = Counter(map(tuple, paper.distinct(20_000, 2, 3, 8).tolist()))
    assert near(drawn, dict.fromkeys(couples, 1 / 20))

    _, asked, _ = paper.sequences(20_000, 22, 1, 30)
    law = {place: (place // 2) ** -0.99 for place in range(2, 22, 2)}
    assert near(Counter(asked.flatten().tolist()), {place: p / sum(law.values()) for place, p in law.items()})


# ---- the model ----


def build(model: str, conv: int) -> paper.Recall:
    torch.manual_seed(0)
    return paper.Recall(model, conv, L=16, d=8, vocabulary=20, layers=2, dropout=0.1).double().eval()


def mixers(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("conv", [0, 4])(pytest.mark.parametrize("model", paper.MIXERS)(test))


@mixers
def test_model_is_the_papers(model: str, conv: int) -> None:
    """It has two blocks x + mixer(norm x), x + norm x, a tied head, and logits of the answers only."""
    net = build(model, conv)
    tokens, asked, _ = paper.sequences(5, 16, 2, 20)
    x = net.embedding(tokens)
    assert (net.positions is not None) is (model == "softmax" and conv == 0)
    if net.positions is not None:
        x = x + net.positions(torch.arange(16))
    for block in net.blocks:
        x = x + block.mixer(F.layer_norm(x, (8,), block.mixer_norm.weight, block.mixer_norm.bias))[0]
        x = x + F.layer_norm(x, (8,), block.feed_forward_norm.weight, block.feed_forward_norm.bias)
    logits = F.layer_norm(x, (8,), net.norm.weight, net.norm.bias) @ net.embedding.weight.T
    expected = torch.stack([logits[row, asked[row]] for row in range(5)])
    torch.testing.assert_close(net(tokens, asked), expected, rtol=1e-10, atol=1e-10)


@mixers
def test_answers_do_not_see_what_comes_later(model: str, conv: int) -> None:
    net = build(model, conv)
    tokens = torch.randint(1, 20, (3, 16))
    asked = torch.full((3, 1), 9)
    later = tokens.clone()
    later[:, 10:] = torch.randint(1, 20, (3, 6))
    torch.testing.assert_close(net(later, asked), net(tokens, asked), rtol=1e-10, atol=1e-10)
    later[:, 2] = (later[:, 2] + 1) % 20
    assert not torch.allclose(net(later, asked), net(tokens, asked), rtol=0, atol=1e-10)


def test_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = paper.SoftmaxAttention(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).split(6, -1)
    for t in range(5):
        weights = (q[:, t : t + 1] @ k[:, : t + 1].transpose(1, 2) / 6**0.5).softmax(-1)
        torch.testing.assert_close(layer(x)[0][:, t], layer.o(weights @ v[:, : t + 1])[:, 0])


@mixers
def test_state_size(model: str, conv: int) -> None:
    """Softmax attention keeps keys and values of L tokens, linear attention S and z, the delta rules S."""
    L, d = 16, 8
    tail = 3 * (3 * d) if conv else 0
    expected = {"softmax": 2 * L * d, "linear": d * d + d, "delta": d * d, "gated_delta": d * d}[model] + tail
    assert paper.state_size(build(model, conv).float(), L) == expected


# ---- the training ----


def test_training_solves_and_repeats() -> None:
    first, second = paper.train(settings()), paper.train(settings())
    assert first == second
    assert first["accuracy"] > 0.99
    assert first["passes_done"] < 4
    assert paper.train(settings(seed=2, passes=1)) != paper.train(settings(passes=1))


def test_training_gives_up() -> None:
    result = paper.train(settings(learning_rate=0.0, passes=3))
    assert result["passes_done"] == 3
    assert result["accuracy"] < 0.2


def test_every_scale_has_runs_of_its_own() -> None:
    assert tuple(paper.MQAR.scales) == reproduce.SCALES
    for scale in paper.MQAR.scales.values():
        assert len({results.run_key(run) for run in scale.settings}) == len(scale.settings)


# ---- the claims ----


def rows(accuracy: Callable[[dict[str, Any]], float], scale: str = "paper") -> list[dict[str, Any]]:
    """The runs of a scale with a made-up accuracy."""
    return [
        {
            **run,
            "state": 2 * run["d"] * (run["L"] if run["model"] == "softmax" else run["d"]),
            "accuracy": accuracy(run),
        }
        for run in paper.SCALES[scale].settings
    ]


def as_expected(run: dict[str, Any]) -> float:
    """An accuracy under which all claims hold: it grows with d, falls with L, and needs a convolution or softmax."""
    if run["model"] == "softmax":
        return 0.995
    if not run["conv"]:
        return 2 / run["pairs"]
    return (0.75 if run["model"] == "linear" else 0.8) + run["d"] / 3200 - run["L"] / 6400


def planted(accuracy: float, **where: Any) -> list[dict[str, Any]]:
    """Rows as expected, except for the runs with these settings."""
    return rows(lambda run: accuracy if where.items() <= run.items() else as_expected(run))


# claim → runs in which it does not hold
PLANTED = {
    "attention-positions": planted(0.98, model="softmax", conv=0, L=128, d=64),
    "attention-convolution": planted(0.98, model="softmax", conv=4, L=64, d=512),
    "linear-alone": planted(0.991, model="linear", conv=0, L=64, d=64),
    "convolution": planted(0.81, model="gated_delta", conv=0, L=64, d=64),  # as good as with a convolution
    "delta-over-linear": planted(0.7, model="delta", conv=4, L=128, d=64),
    "state": planted(0.97, model="linear", conv=4, L=64, d=128),
    "length": planted(0.7, model="delta", conv=4, L=64, d=256),
}


@pytest.mark.parametrize("claim", paper.MQAR.claims, ids=lambda claim: claim.id)
def test_claim_can_hold_and_can_fail(claim: Claim) -> None:
    assert claim.measure(rows(as_expected)).holds is True
    assert claim.measure(PLANTED[claim.id]).holds is False


def test_nothing_is_shown_by_beating_a_guess() -> None:
    claim = next(claim for claim in paper.MQAR.claims if claim.id == "convolution")
    outcome = claim.measure(rows(lambda run: as_expected(run) if run["conv"] else 1.4 / run["pairs"]))
    assert outcome.holds is None and "36 of 36 nets are at the guess line" in outcome.note
    one = rows(lambda run: 1 / run["pairs"] if (run["conv"], run["L"], run["d"]) == (0, 64, 64) else as_expected(run))
    assert claim.measure(one).holds is None


def test_too_little_training_decides_nothing() -> None:
    short = rows(lambda run: 0.25 if run["conv"] == 0 else as_expected(run), "reduced")
    outcomes = {claim.id: claim.measure(short) for claim in paper.MQAR.claims}
    assert outcomes["attention-convolution"].holds is True
    for undecided in (outcomes["attention-positions"], outcomes["linear-alone"]):
        assert (undecided.measured, undecided.holds) == (0.25, None)
        assert "20,000 training sequences, not 100,000, 3 passes over them, not 64, 64 sequences" in undecided.note


def test_differences_among_solutions_count_for_nothing() -> None:
    """Runs end once they exceed 99 %, so 0.991 counts as much as 1."""
    flat = rows(lambda run: 1.0 if run["model"] == "linear" else 0.991)
    assert paper.measure_delta(flat).spread == [0, 0]
    assert paper.measure_delta(flat).holds is False


def test_every_seed_counts() -> None:
    one = rows(as_expected)
    two = one + [row | {"seed": 2} for row in one]
    assert paper.measure_delta(two).holds is True
    assert "one seed" in paper.measure_delta(one).note
    assert "one seed" not in paper.measure_delta(two).note
    lost = [row | {"accuracy": 0.1} if row["seed"] == 2 and row["model"] == "delta" else row for row in two]
    assert paper.measure_delta(lost).holds is False


def test_what_was_not_run_is_not_judged() -> None:
    one = [row for row in rows(as_expected) if row["L"] == 64 and row["d"] == 64]
    assert paper.measure_length(one).holds is None
    assert paper.measure_state(one).holds is None


def test_best_learning_rate_and_median_seed() -> None:
    some = [
        {"model": "delta", "conv": 4, "L": 64, "d": 32, "seed": seed, "learning_rate": rate, "accuracy": accuracy}
        for seed, rate, accuracy in ((1, 1e-3, 0.5), (1, 1e-2, 0.7), (2, 1e-2, 0.9), (3, 1e-3, 0.8), (3, 1e-2, 0.1))
    ]
    assert paper.points(some) == {("delta", True, 64, 32): 0.8}


def test_figure_shows_every_point() -> None:
    figure = paper.draw(rows(as_expected))
    drawn = [(float(x), float(y)) for axes in figure.axes for line in axes.lines for x, y in line.get_xydata()]
    for row in rows(as_expected):
        assert (row["state"], row["accuracy"]) in drawn
