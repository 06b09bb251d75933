"""`fwp bench`: it times what is right, beside a peer, and nothing that is wrong."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch

from fwp import rules, testing
from fwp.cli import main

speed = import_module("fwp.benchmarks.speed")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setitem(speed.SIZES, "cpu", [speed.Size(1, 65, 2, 16)])
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: 1e10)


def test_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert speed.main("cpu", peers=True, json_file=file) == 0
    found = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
    assert [(row["rule"], row["pass"]) for row in found] == [(r, p) for r in rules.RULES for p in ("fwd", "fwd + bwd")]
    assert all(row["seconds"] > 0 and row["softmax_over_ours"] > 0 and row["share"] > 0 for row in found)
    assert "medians of 1 rounds" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    row = rules.RULES["decay"]
    lowered = rules.lowering.replace(row, lower=lambda core, g=None: core)
    monkeypatch.setitem(rules.RULES, "decay", lowered)
    file = tmp_path / "rows.json"
    assert speed.main("cpu", json_file=file) == 1
    red = [row for row in json.loads(file.read_text()) if row["seconds"] is None]
    assert [row["rule"] for row in red] == ["decay"]
    assert "it is wrong by" in red[0]["note"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_of_one_percent_is_wrong_in_every_dtype(dtype, monkeypatch):
    assert speed.wrong("delta", "cpu", dtype) is None
    right = testing.evaluate

    def faulty(*inputs, **options):  # what "auto" takes, not the reference and the budgets
        return {name: x * (1 if options else 1.01) for name, x in right(*inputs, **options).items()}

    monkeypatch.setattr(testing, "evaluate", faulty)
    assert speed.wrong("delta", "cpu", dtype) > 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cdua"], "device: expected one of cpu, cuda, got 'cdua'; did you mean 'cuda'?"),
        (
            ["--json", "nowhere/rows.json"],
            "json: expected a file that can be written, got 'nowhere/rows.json': No such file or directory",
        ),
    ],
)
def test_bad_arguments_exit_2_before_any_work(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"fwp: {message}\n"
