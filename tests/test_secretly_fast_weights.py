"""Settings 1 and 2 of the 2021 paper: its model, its training protocol, and claims that can fail."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fwp
from fwp_benchmarks.claims import Claim
from fwp_benchmarks.papers import secretly_fast_weights as paper
from fwp_benchmarks.papers import secretly_fast_weights_1 as setting_1
from fwp_benchmarks.papers import secretly_fast_weights_2 as setting_2

# ---- the experiment ----


def literal(model: paper.Retrieval, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The paper's equations on one-hot vectors, one pair after the other."""
    v = torch.eye(model.S, dtype=torch.float64)[values]
    x = torch.cat([v, model.embedding[keys]], -1)
    k, q = model.W_k(x), model.W_q(model.embedding[queries])
    if model.memory.phi is None:
        return (q @ k.transpose(1, 2) / model.d_key**0.5).softmax(-1) @ v
    phi = fwp.feature_maps.get(model.memory.features(model.d_key))
    k, q = phi(k), phi(q)
    update = model.memory.update
    if update is paper.DELTA:
        k, q = k / k.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    W, z = torch.zeros(len(keys), model.S, k.shape[-1], dtype=torch.float64), torch.zeros(len(keys), k.shape[-1])
    beta = None if model.W_beta is None else model.W_beta(x).sigmoid()
    for i in range(keys.shape[1]):
        old = torch.einsum("bvk,bk->bv", W, k[:, i])
        if update is paper.SUM:
            W = W + torch.einsum("bv,bk->bvk", v[:, i], k[:, i])
            z = z + k[:, i]
        elif update is paper.GATED:
            b = beta[:, i, :, None]
            W = (1 - b) * W + b * torch.einsum("bv,bk->bvk", v[:, i], k[:, i])
            z = (1 - b[:, 0]) * z + b[:, 0] * k[:, i]
        else:
            W = W + torch.einsum("bv,bk->bvk", beta[:, i] * (v[:, i] - old), k[:, i])
        if update is paper.NORMED:
            W = W / (F.relu(W.norm(dim=(1, 2), keepdim=True) - 1) + 1)
    y = torch.einsum("bvk,bqk->bqv", W, q)
    if update in (paper.SUM, paper.GATED):
        y = y / (torch.einsum("bk,bqk->bq", z, q) + 1e-6).unsqueeze(-1)
    return F.layer_norm(y, [model.S]) if update is paper.NORMED else y


@pytest.mark.parametrize("asked", [1, 2])  # one answer takes a path without W
@pytest.mark.parametrize("name", paper.MEMORIES)
def test_model_is_the_papers(name: str, asked: int) -> None:
    torch.manual_seed(0)
    model = paper.Retrieval(paper.MEMORIES[name], 70, 4).double()
    keys, values = paper.sequences(3, 70, 140, repeated=name in paper.MEMORIES_2)
    queries = keys[:, :asked]
    results = []
    for answers in (model, lambda *given: literal(model, *given)):
        torch.manual_seed(1)  # what FAVOR+ draws
        y = answers(keys, values, queries)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weights).sum(), list(model.parameters()))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_width_of_features() -> None:
    for memory in paper.MEMORIES.values():
        if memory.phi is not None and memory.d_dot is not None:
            phi = fwp.feature_maps.get(memory.features(16))
            assert phi(torch.randn(16)).shape == (memory.d_dot * 16,), memory.label


def test_data_and_loss() -> None:
    orders, values = paper.sequences(50, 9, 9, repeated=False)
    assert (orders.sort(-1).values == torch.arange(9)).all()
    assert (orders[0] != orders).any() and (orders != values).any()
    assert paper.losses(torch.zeros(2, 9, 9), orders[:2]).mean().item() == 0.5
    assert paper.losses(F.one_hot(orders[:2], 9).float(), orders[:2]).sum().item() == 0
    keys, values = paper.sequences(50, 9, 18, repeated=True)
    assert keys.shape == values.shape == (50, 18)
    assert keys.max() == values.max() == 8
    targets, there = paper.latest(keys, values, 9)
    for b in range(50):
        last = dict(zip(keys[b].tolist(), values[b].tolist()))  # a later pair overwrites
        assert {key: targets[b, key].item() for key in range(9) if there[b, key]} == last


@pytest.mark.parametrize(("name", "passes"), [("favor-2", 6), ("dpfp-2", 1)])
def test_random_features_are_drawn_for_each_sequence(name: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = paper.Retrieval(paper.MEMORIES[name], 5, 4)
    seen: list[int] = []
    monkeypatch.setattr(
        paper.Retrieval, "forward", lambda self, k, v, q: seen.append(len(k)) or torch.zeros(*q.shape, 5)
    )
    assert paper.evaluate(model, 6, 5, False) == 0.5
    assert (len(seen), sum(seen)) == (passes, 6)


def test_floor_is_the_best_rank() -> None:
    """The floor is the distance of the best matrix of rank r for S answers from a permutation."""
    S, r = 12, 5
    U, s, Vh = torch.linalg.svd(torch.eye(S, dtype=torch.float64)[torch.randperm(S)])
    best = (U[:, :r] * s[:r]) @ Vh[:r]
    row = {"model": "linear", "d_key": r, "keys": S}
    assert math.isclose(0.5 * (U @ Vh - best).square().sum(-1).mean().item(), paper.floor(row))
    assert paper.floor({"model": "dpfp-3", "d_key": 2, "keys": S}) == 0


def settings(model: str = "dpfp-1", repeated: bool = False, **changes: Any) -> dict[str, Any]:
    return paper.runs(16, {model: [5]}, 1, repeated)[0] | changes


@pytest.mark.parametrize(("model", "repeated"), [("dpfp-1", False), ("dpfp-1-delta", True)])
def test_training_solves_and_repeats(model: str, repeated: bool) -> None:
    given = settings(model, repeated)
    first, second = paper.train(given), paper.train(given)
    assert first == second
    assert first["best_loss"] <= 1e-3
    assert first["best_step"] == first["last_step"] <= 2000
    assert ("loss_2S" in first) == repeated
    assert paper.train(given | {"seed": 2}) != first


def test_training_gives_up() -> None:
    """Without learning, evaluations only scatter. Patience ends the run a fixed number of steps after the best."""
    result = paper.train(settings(learning_rate=0.0, patience=3, evaluate_every=2))
    assert result["last_step"] == result["best_step"] + 6
    assert paper.train(settings(learning_rate=0.0, max_steps=4, evaluate_every=2))["last_step"] == 4


def test_divergence_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.3, 0.2, math.nan])
    monkeypatch.setattr(paper, "evaluate", lambda *_: next(found))
    result = paper.train(settings(evaluate_every=1))
    kept = {"curve": [0.3, 0.2], "curve_every": 1}
    assert result == {"best_loss": 0.2, "best_step": 2, "last_step": 3, "diverged": True, **kept}
    monkeypatch.setattr(paper, "evaluate", lambda *_: math.nan)
    with pytest.raises(FloatingPointError, match="step 1 "):
        paper.train(settings(evaluate_every=1))


def test_settings_are_the_papers() -> None:
    assert settings() | {"batch": 32, "learning_rate": 1e-3, "max_steps": 100_000, "patience": 11} == settings()
    tanh = settings("tanh-fwm", True)
    assert (tanh["batch"], tanh["learning_rate"]) == (128, 1e-4)


# ---- the claims ----


def keys(rows: Any) -> list[int]:
    return [row["keys"] for row in rows]


def test_authors_logs() -> None:
    assert len(setting_1.AUTHORS) == 240
    firsts = {model: keys(setting_1.first_unsolved(setting_1.AUTHORS, model)) for model in paper.MAPS}
    assert firsts == {"linear": [60], "dpfp-1": [120], "dpfp-2": [260], "dpfp-3": [360]}
    assert len(setting_2.AUTHORS) == 72 - 1
    assert sum(row.get("diverged", False) for row in setting_2.AUTHORS) == 10


def scaled(rows: Any, model: str, column: str, factor: float) -> list[dict[str, Any]]:
    """The rows with one column multiplied for one model ("": for all)."""
    return [row | {column: type(row[column])(row[column] * factor)} if model in row["model"] else row for row in rows]


A1, A2 = setting_1.AUTHORS, [row | {"loss_2S": 2 * row["best_loss"]} for row in setting_2.AUTHORS]
# claim → runs in which it does not hold
PLANTED = {
    "break-linear": scaled(A1, "linear", "keys", 2),
    "break-dpfp-1": scaled(A1, "dpfp-1", "keys", 0.5),
    "break-dpfp-2": scaled(A1, "dpfp-2", "keys", 1.5),
    "break-dpfp-3": scaled(A1, "dpfp-3", "keys", 0.5),
    "break-softmax": scaled(A1, "softmax", "keys", 0.5),
    "order": scaled(A1, "dpfp-2", "keys", 2),
    "law": scaled(scaled(A1, "linear", "keys", 2), "dpfp-3", "keys", 0.5),
    "floor": scaled(A1, "", "best_loss", 1.2),
    "favor": scaled(A1, "", "best_loss", 1 / 30),
    "softmax": scaled(A1, "softmax", "keys", 0.5),
    "deviation-1": scaled(A1, "", "best_loss", 1.2),
    "overwrite": scaled(A2, "dpfp-1", "best_loss", 2),
    "best-rule": scaled(A2, "fwm", "best_loss", 1e-3),
    "break-linear-delta": scaled(A2, "linear", "keys", 2),
    "break-dpfp-1-delta": scaled(A2, "dpfp-1-delta", "keys", 2),
    "break-dpfp-2-delta": scaled(A2, "dpfp-2-delta", "best_loss", 100),
    "favor-delta": scaled(A2, "favor", "best_loss", 0.05),
    "tanh": scaled(A2, "tanh", "best_loss", 0.1),
    "length-2S": scaled(A2, "dpfp-1", "loss_2S", 0.5),
    "deviation-2": scaled(A2, "", "best_loss", 1.2),
}
FAMILIES = ((setting_1.SETTING_1, A1), (setting_2.SETTING_2, A2))
CLAIMS = [(claim, rows) for family, rows in FAMILIES for claim in family.claims]


@pytest.mark.parametrize(("claim", "rows"), CLAIMS, ids=[claim.id for claim, _ in CLAIMS])
def test_claim_holds_for_the_authors_and_can_fail(claim: Claim, rows: Any) -> None:
    outcome = claim.measure(rows)
    assert outcome.holds is True
    assert claim.published in (None, outcome.measured)
    assert claim.measure(PLANTED[claim.id]).holds is False


def test_seeds_that_disagree_decide_nothing() -> None:
    claim = next(claim for claim in setting_1.SETTING_1.claims if claim.id == "break-linear")
    later = [row | {"seed": 9} for row in scaled(A1, "linear", "keys", 2)]
    outcome = claim.measure([*A1, *later])
    assert outcome.holds is None and "the seeds disagree" in outcome.note


def test_an_order_that_no_run_could_contradict_decides_nothing() -> None:
    quick = [row for row in A1 if row["model"] in setting_1.MAPS and row["keys"] // 4 in setting_1.QUICK[row["model"]]]
    assert setting_1.may_be_out_of_order(A1) and not setting_1.may_be_out_of_order(quick)


def test_break_counts_each_seed() -> None:
    rows = [
        {"model": "linear", "d_key": 16, "keys": S, "seed": seed, "solved": 1e-3, "best_loss": loss}
        for seed, broken in ((1, 5), (2, 5), (3, 20))
        for S in (5, 10, 15, 20)
        for loss in (0.1 if broken <= S else 1e-4,)
    ]
    assert keys(setting_1.first_unsolved(rows, "linear")) == [5, 5, 20]
    outcome = setting_1.breaks("linear").measure(rows)
    assert (outcome.measured, outcome.spread) == ([0.0, 0.312], [0.312, 1.25])
    assert "d_key 16" in outcome.note
    assert outcome.holds is False
    assert "at S = 5 training ended with 1.0 keys lost, though there was room" in outcome.note
    unbroken = [row for row in rows if row["seed"] == 3 and row["keys"] < 20]
    assert setting_1.breaks("linear").measure(unbroken).holds is None


def test_no_break_is_claimed_without_runs() -> None:
    rows = [row for row in A2 if row["keys"] <= 80]
    assert setting_2.breaks("dpfp-2-delta").measure(rows).holds is None
    assert setting_2.breaks("linear-delta").measure(rows).measured == 80


def test_law_is_least_squares() -> None:
    """The law equals the closed form on points whose slope and spread are known."""
    rows = [
        {"model": model, "d_key": 16, "keys": S, "seed": 1, "best_loss": 0.1}
        for model, S in (("linear", 10), ("dpfp-1", 20), ("dpfp-2", 40), ("dpfp-3", 60))
    ]
    solved = [row | {"keys": row["keys"] // 2, "best_loss": 1e-4} for row in rows]
    assert setting_1.measure_law(rows).holds is None  # no map solved anything
    outcome = setting_1.measure_law(rows + solved)
    assert outcome.measured == {"slope": 1.0, "S / d_dot": 0.625}
    rows[0]["keys"] = 20
    import numpy as np

    x, last, first = np.log([16, 32, 64, 96]), np.log([5, 10, 20, 30]), np.log([20, 20, 40, 60])

    def slope(y: Any) -> float:
        return float(np.linalg.lstsq(np.stack([x, np.ones(4)], 1), y, rcond=None)[0][0])

    outcome = setting_1.measure_law(rows + solved)
    assert outcome.measured["slope"] == round(slope(first), 3)
    corners = [slope(np.where(pick, first, last)) for pick in itertools.product([False, True], repeat=4)]
    assert outcome.spread == [round(min(corners), 2), round(max(corners), 2)]


@pytest.mark.parametrize("family", [setting_1.SETTING_1, setting_2.SETTING_2], ids=lambda family: family.id)
def test_figure_of_every_scale(family: Any) -> None:
    """Each figure is drawn from rows like those of its scale, without a warning."""
    for scale in family.scales.values():
        family.draw([{**run, "best_loss": 0.1, "loss_2S": 0.2} for run in scale.settings])
