"""The experiments of 1991/92: tasks, the criterion for solved, training against NumPy, claims that can fail."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fwp.nn import SlowFastNet
from fwp_benchmarks import oracle
from fwp_benchmarks.claims import Claim
from fwp_benchmarks.papers import fast_weight_memories as paper


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def net(task: str, version: int = 1) -> SlowFastNet:
    """A net for a task. `paper.run` takes its slow weights W apart from it."""
    inputs, outputs = paper.TASKS[task].inputs, paper.TASKS[task].outputs
    width = inputs[1] * outputs if version == 1 else inputs[1] + outputs
    return SlowFastNet(nn.Linear(inputs[0], width, bias=False), nn.Linear(inputs[1], outputs, bias=False), version)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter test after the training."""
    monkeypatch.setattr(paper, "TEST", 150)
    monkeypatch.setattr(paper, "LAG", 30)


# solutions of the tasks: W_S of version 1
LATCH = torch.tensor([[0.0, 0, 0], [2, -2, 0], [0, 0, 0]]).double()  # an A raises w_B, a B lowers it
BINDING = torch.cat([4 * torch.eye(3) - 2, torch.zeros(3, 3)], 1).double()  # a slot raises its w, lowers the others


# ---- the tasks ----


def test_flip_flop_answers_the_first_b_after_an_a() -> None:
    events = [2, 1, 0, 2, 1, 1, 0, 0, 1, 2, 1]  # C B A C B B A A B C B
    stream = paper.flip_flop_from(torch.tensor(events).unsqueeze(1))
    assert stream.target.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert stream.slow.argmax(2).flatten().tolist() == events
    assert stream.scored.all()
    shares = paper.flip_flop(generators(20), 1000).slow.mean((0, 1))
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3).double(), atol=0.02, rtol=0)


def test_parking_asks_for_the_slot_seen_last() -> None:
    stream = paper.parking(generators(3), 2000)
    detectors, bits = stream.slow.split(3, 2)
    for n in range(3):
        slot = None
        for t in range(1, 2001):
            asked = bool(stream.fast[t, n])
            assert asked == bool(stream.scored[t, n])
            if asked:
                assert slot is not None
                assert not detectors[t, n].any()
            assert stream.target[t, n].tolist() == [float(asked and slot == i) for i in range(3)]
            if detectors[t, n].any():
                assert detectors[t, n].sum() == 1
                slot = int(detectors[t, n].argmax())
    assert not stream.scored[0].any()
    torch.testing.assert_close(bits.mean((0, 1)), torch.full((3,), 0.5).double(), atol=0.02, rtol=0)
    # a cycle is 3 steps of driving, 1 of parking and 3 of business on average
    assert detectors.sum(2).mean().item() == pytest.approx(1 / 7, abs=0.01)
    assert stream.scored.double().mean().item() == pytest.approx(1.5 / 7, abs=0.02)
    rarely, always = (paper.parking(generators(3), 2000, asked).scored.sum() for asked in (0.25, 1.0))
    assert always / rarely == pytest.approx(4, rel=0.15)


# ---- the training ----


@pytest.mark.parametrize("version", [1, 2])
def test_training_is_the_oracles(version: int) -> None:
    stream = paper.flip_flop(generators(2), 60)
    W = torch.randn(2, 3 if version == 1 else 4, 3, dtype=torch.float64)
    found = paper.run(net("flip-flop", version), W, stream, 0.5)
    for n in range(2):
        x, target = stream.slow[1:, n].numpy(), stream.target[1:, n].numpy()
        s = W[n].numpy() @ stream.slow[0, n].numpy()
        w_0 = s if version == 1 else s[:3] * s[3]
        y, W_end = oracle.slow_fast_1991_online(
            W[n].numpy(), x, x, target, w_0.reshape(3, 1), version=version, rate=0.5
        )
        np.testing.assert_allclose(found.E[:, n], 0.5 * ((target - y) ** 2).sum(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.W[n], W_end, rtol=1e-9)
    assert (found.W != W).any()


def test_solved_is_100_scored_steps_in_a_row() -> None:
    stream = paper.parking(generators(1), 700)
    found = paper.run(net("parking"), BINDING.unsqueeze(0), stream)
    asked = stream.scored[:, 0].nonzero().flatten().tolist()
    assert (found.solved, found.any) == ([asked[99]], [100])
    (wrong,) = paper.run(net("parking"), -BINDING.unsqueeze(0), stream).solved
    assert wrong is None
    # one error in between starts the count anew
    events = torch.randint(3, (300,), generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    right = paper.flip_flop_from(events)
    spoilt = paper.Stream(right.slow, right.fast, right.target.clone(), right.scored)
    spoilt.target[50] += 1
    assert paper.run(net("flip-flop"), LATCH.unsqueeze(0), right).solved == [100]
    assert paper.run(net("flip-flop"), LATCH.unsqueeze(0), spoilt).solved == [150]


def test_a_net_that_has_solved_its_task_learns_no_more() -> None:
    stream = paper.flip_flop(generators(1), 200)
    start = LATCH + 0.01
    until = paper.Stream(*(part[:101] for part in (stream.slow, stream.fast, stream.target, stream.scored)))
    longer, shorter = (paper.run(net("flip-flop"), start.unsqueeze(0), s, 1.0) for s in (stream, until))
    assert longer.solved == shorter.solved == [100]
    assert not torch.equal(shorter.W[0], start)
    assert torch.equal(longer.W, shorter.W)


@pytest.mark.usefixtures("short")
def test_judges_know_a_latch_and_a_binding() -> None:
    forgets = LATCH + torch.tensor([[0.0, 0, 0], [0, 0, -2], [0, 0, 0]])  # a C lowers w_B, too
    W, test = torch.stack([LATCH, forgets.double()]), paper.flip_flop(generators(2), 200)
    judged = paper.judge_flip_flop(net("flip-flop"), W, test, paper.run(net("flip-flop"), W, test))
    assert judged["good"][0] == 1 and judged["good"][1] < 0.9
    assert judged["after_lag"][0] < 1e-3 and judged["after_lag"][1] == pytest.approx(0.5, abs=0.02)

    deaf = torch.cat([BINDING[:, :3], torch.full((3, 3), -3.0).double()], 1)  # a bit lowers everything
    W, test = torch.stack([BINDING, deaf]), paper.parking(generators(2), 300)
    judged = paper.judge_parking(net("parking"), W, test, paper.run(net("parking"), W, test))
    assert judged["good"][0] == 1 and judged["good"][1] < 0.5
    assert judged["from_bits"] == [0, 3]


def test_the_curve_is_of_scored_steps() -> None:
    E = torch.tensor([[1.0, 5], [9, 9], [3, 9], [2, 2]]).double()
    scored = torch.tensor([[True, True], [False, False], [True, False], [True, True]])
    assert paper.curve(E, scored, 3) == [[2.75, 3.5, 4.25], [2, 2, 2]]  # means 2 and 5, then 2 and 2


def settings(family: Any, **changes: Any) -> dict[str, Any]:
    return {**family.scales["smoke"].settings[0], **changes}


@pytest.mark.usefixtures("short")
def test_a_net_does_not_depend_on_the_others_in_its_batch() -> None:
    alone, two = (paper.train(settings(paper.FLIP_FLOP_FAMILY, nets=nets, steps=150)) for nets in (1, 2))
    for name in ("solved", "any", "good", "wrong", "after_lag"):
        assert two[name][:1] == alone[name], name
    other = paper.train(settings(paper.FLIP_FLOP_FAMILY, nets=1, steps=150, seed=2))
    assert two["good"][1:] == other["good"]
    assert other["good"] != alone["good"]


@pytest.mark.usefixtures("short")
def test_some_nets_of_version_1_learn_the_flip_flop_within_300_steps() -> None:
    found = paper.train(settings(paper.FLIP_FLOP_FAMILY, nets=10, steps=300))
    solved = [n for n, step in enumerate(found["solved"]) if step is not None]
    assert solved
    assert all(100 < found["solved"][n] <= 300 for n in solved)
    assert any(found["good"][n] == 1 and found["wrong"][n] < 0.01 for n in solved)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("family", [paper.FLIP_FLOP_FAMILY, paper.PARKING_FAMILY], ids=lambda family: family.id)
def test_every_scale_has_the_papers_nets_and_smoke_draws(family: Any) -> None:
    for scale in family.scales.values():
        kinds = paper.FLIP_FLOP.values() if family is paper.FLIP_FLOP_FAMILY else (paper.PARKING, paper.GENTLE)
        assert all(paper.row_of_kind(scale.settings, kind) for kind in kinds)
        keys = [json.dumps(run, sort_keys=True) for run in scale.settings]
        assert len(set(keys)) == len(keys)
    rows = [{**run, **family.train(run), "seconds": 1.0} for run in family.scales["smoke"].settings]
    rows = json.loads(json.dumps(rows, allow_nan=False))
    for row in rows:
        assert f"of {row['nets']} nets" in family.summarise(row)
    for axes in family.draw(rows).axes:
        assert axes.has_data()


# ---- the claims ----


def row(kind: Any, **results: Any) -> dict[str, Any]:
    """Four nets of which three solved the task, the first two before the paper's."""
    return {
        **kind,
        "nets": 4,
        "steps": 20000,
        "solved": [200, 200, 7000, None],
        "any": [200, 200, 7000, None],
        "good": [1.0, 1.0, 1.0, 0.2],
        "wrong": [0.0, 0.0, 0.0, 0.3],
        "after_lag": [0.0, 0.0, 0.0, 0.5],
        "from_bits": [0.1, 0.1, 0.1, 2.0],
        **results,
    }


GOOD = [
    *(row(kind) for kind in paper.FLIP_FLOP.values()),
    row(paper.PARKING, good=[1.0, 1.0, 1.0, 0.2][:1] + [0.95, 0.3, 0.2]) | {"solved": [200, 5000, None, None]},
    row(paper.GENTLE),
    row(paper.SAME_RATE),
]
LATE = {"solved": [5000, 7000, 8000, None]}
PLANTED: dict[str, list[dict[str, Any]]] = {
    "flip-flop-steps-1": [GOOD[0] | LATE, *GOOD[1:]],
    "flip-flop-steps-2": [GOOD[0], GOOD[1] | LATE, *GOOD[2:]],
    "flip-flop-steps-2-same-rate": [*GOOD[:4], GOOD[4] | LATE],
    "flip-flop-latch": [GOOD[0] | {"good": [0.8, 0.8, 1.0, 1.0]}, *GOOD[1:]],
    "flip-flop-lag": [GOOD[0], GOOD[1] | {"after_lag": [0.0, 0.5, 0.0, 0.0]}, *GOOD[2:]],
    "parking-steps-1": [*GOOD[:2], GOOD[2] | {"solved": [7000, None, None, None]}, GOOD[3]],
    "parking-binding": [*GOOD[:3], GOOD[3] | {"good": [1.0, 0.8, 1.0, 1.0]}],
    "parking-steepness": [*GOOD[:2], GOOD[2] | {"good": [1.0] * 4}, GOOD[3]],
}
CLAIMS = [*paper.FLIP_FLOP_FAMILY.claims, *paper.PARKING_FAMILY.claims]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_claims_can_hold_and_fail(claim: Claim) -> None:
    assert claim.measure(GOOD).holds is True
    outcome = claim.measure(PLANTED[claim.id])
    assert outcome.holds is False
    json.dumps([outcome.measured, outcome.spread], allow_nan=False)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_claims_where_no_net_learnt_anything(claim: Claim) -> None:
    none = [{**row, "solved": [None] * 4, "any": [None] * 4} for row in GOOD]
    outcome = claim.measure(none)
    wanted = {"steps": False, "latch": None, "lag": None, "binding": None, "steepness": True}
    assert outcome.holds is next(value for name, value in wanted.items() if name in claim.id.removeprefix("flip-flop"))
    json.dumps([outcome.measured, outcome.spread], allow_nan=False)


def test_unsolved_nets_count_in_the_median() -> None:
    steps = paper.FLIP_FLOP_FAMILY.claims[0].measure(GOOD)
    assert steps.measured == {"within 300:": "2 of 4", "median": 3600, "unsolved after 20,000:": "1"}
    assert steps.spread == [200, 7000]
    most = [GOOD[0] | {"solved": [200, None, None, None]}]
    assert paper.FLIP_FLOP_FAMILY.claims[0].measure(most).measured["median"] is None
