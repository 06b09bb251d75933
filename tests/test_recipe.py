"""The recipe of CONTRIBUTING, followed literally in a copy of the checkout.

The new row is tested, checked, listed and trained. It gives the same numbers as the same rule outside the table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import agree, forms

import fwp
from fwp.testing import evaluate, sample

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:])
TRIED, ADDED = SECTIONS["Try a rule, with no edit here"], SECTIONS["Add a rule to the table"]
PLACE = r"(at the end of|above `_ROWS` in|as the last row of `_ROWS` in) `([\w/.]+)`"
BLOCK = r"```python\n(.*?)```"
COPIED = ("fwp", "kernels", "benchmarks", "tests", "README.md", "pyproject.toml")

# All ways in which k can reach `lower`, with masks and packed sequences.
WAYS = """
import itertools, torch
LENGTHS = torch.tensor([0, 0, 3, 19, 20])
MASK = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) < 0.8
WAYS = [
    {"feature_map": phi, "feature_norm": norm, "scale": 0.5} | where | {"read": read}
    for phi, norm in ((None, None), (None, "l2"), ("elu+1", "sum"), ("dpfp-2", "sum"), ("softmax", None))
    for where in ({}, {"mask": MASK}, {"cu_seqlens": LENGTHS}, {"cu_seqlens": LENGTHS, "mask": MASK})
    for read in ("after", "before")
]
"""

EQUAL = """
import runpy
from fwp.testing import evaluate, sample
import fwp
own, row = runpy.run_path("efla.py")["EFLA"], fwp.RULES["efla"]
assert own is not row
compared = 0
for way, dtype, writes in itertools.product(WAYS, (torch.float64, torch.bfloat16), (1, 2)):
    given = {"B": 1, "T": 20, "Hq": 4, "Hk": 1, "dtype": dtype, "writes": writes, "feature_map": way["feature_map"]}
    inputs = sample(row, **given)
    for backend, form in (("reference", "recurrent"), ("torch", "recurrent"), ("torch", "chunk"), ("auto", "auto")):
        gradients = dtype == torch.float64 and backend == "torch"
        inside, outside = (
            evaluate(rule, inputs, gradients=gradients, backend=backend, form=form, **way) for rule in ("efla", own)
        )
        assert inside.keys() == outside.keys()
        assert all(torch.equal(x, outside[name]) for name, x in inside.items()), (way, dtype, writes, backend, form)
        compared += 1
print(compared, "equal")
"""

TRAIN = """
import torch, fwp, runpy
from fwp.nn import FastWeightAttention
losses = {}
for name, rule in (("row", "efla"), ("object", runpy.run_path("efla.py")["EFLA"])):
    torch.manual_seed(0)
    layer = FastWeightAttention(16, 2, rule, "elu+1", "l2")
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x = torch.randn(4, 12, 16)
    losses[name] = []
    for _ in range(30):
        loss = (layer(x)[0] - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
assert losses["row"] == losses["object"]
assert losses["row"][-1] < 0.8 * losses["row"][0]
print("trained")
"""


def run(folder: Path, *command: str) -> str:
    """The output of a command run in the copy. The test fails if the command fails."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("PYTEST", "COV_"))}
    environment["PYTHONPATH"] = os.pathsep.join(str(folder / part) for part in ("", "kernels", "benchmarks"))
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def put(block: str, place: str, path: Path) -> None:
    """One edit of the recipe."""
    text = path.read_text(encoding="utf-8")
    if place == "at the end of":
        text = f"{text}\n\n{block}"
    else:
        mark = "_ROWS = (\n" if place.startswith("above") else "\n)\n\nRULES"
        assert text.count(mark) == 1
        text = text.replace(mark, f"{block}\n\n{mark}" if place.startswith("above") else f"\n{block.rstrip()}{mark}")
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout after the recipe's six steps, with the rule file of the section before it."""
    folder = tmp_path_factory.mktemp("recipe")
    leave = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in COPIED:
        there = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        there(ROOT / name, folder / name, **({"ignore": leave} if there is shutil.copytree else {}))
    (own,) = re.findall(BLOCK, TRIED, re.DOTALL)
    (folder / "efla.py").write_text(own, encoding="utf-8")
    steps = re.findall(rf"^\*\*(\d)\. .*?{PLACE}.*?{BLOCK}", ADDED, re.DOTALL | re.MULTILINE)
    assert [number for number, *_ in steps] == ["1", "2", "3", "4", "5"]
    assert len(re.findall(BLOCK, ADDED, re.DOTALL)) == 5
    for _, place, path, block in steps:
        put(block, place, folder / path)
    assert "**6. The README**: the output of `fwp list --markdown`" in ADDED
    readme = (folder / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition("<!-- rules -->\n")
    table = run(folder, "-m", "fwp.cli", "list", "--markdown")
    after = rest.partition("<!-- /rules -->")[2]
    (folder / "README.md").write_text(f"{before}<!-- rules -->\n{table}<!-- /rules -->{after}", encoding="utf-8")
    return folder


pytestmark = [
    pytest.mark.mutants,
    pytest.mark.xdist_group("recipe"),  # one worker makes one copy
    pytest.mark.skipif("efla" in fwp.RULES, reason="the recipe has been followed here"),
]


def test_the_file_of_a_rule_of_ones_own_runs(copy: Path) -> None:
    run(copy, "efla.py")


def test_the_laws_hold_for_the_new_row(copy: Path) -> None:
    """A quick sample of the tests, all of which would cover the row."""
    laws = "forms_agree or extends or recall or typed_verb or connected or packed_is_one_by_one or masked_is_unpadded"
    files = ("tests/test_laws.py", "tests/test_shapes.py")
    options = ("-q", "-p", "no:cacheprovider")
    found = run(copy, "-m", "pytest", *options, *files, "-k", f"(efla or connected) and ({laws})")
    assert int(re.search(r"(\d+) passed", found)[1]) > 20
    assert "failed" not in found
    readme = "tests/test_packaging.py::test_readme_shows_the_table_of_rules"
    assert "1 passed" in run(copy, "-m", "pytest", *options, readme)


def test_commands_know_the_new_row(copy: Path) -> None:
    found = run(copy, "-m", "fwp.cli", "list")
    assert re.search(r"efla .*S \+ ε k \(v − Sᵀ k\)ᵀ.*delta", found)
    found = run(copy, "-m", "fwp.cli", "check", "--rule", "efla", "--backend", "torch")
    assert "efla: S + ε k (v − Sᵀ k)ᵀ" in found
    assert ", 0 failed" in found
    found = run(copy, "-m", "fwp.cli", "check", "--rule", "efla", "--backend", "reference")
    assert "the oracle has no function of this name" in found
    assert ", 0 failed" in found


def test_the_new_row_gives_the_numbers_of_the_object(copy: Path) -> None:
    """They are the same bits with all feature maps, norms, masks and packing."""
    assert "equal" in run(copy, "-c", WAYS + EQUAL)


def test_a_layer_learns_with_the_new_row(copy: Path) -> None:
    assert "trained" in run(copy, "-c", TRAIN)


def test_the_edits_are_formatted(copy: Path) -> None:
    run(copy, "-m", "ruff", "check", "fwp", "efla.py")
    run(copy, "-m", "ruff", "format", "--check", "fwp", "efla.py")


@pytest.mark.parametrize("rule", fwp.RULES.values(), ids=lambda rule: rule.name)
def test_a_row_gives_the_numbers_of_the_same_rule_elsewhere(rule: fwp.Rule) -> None:
    """Results depend neither on the name nor on the table."""
    ways: dict[str, list[dict]] = {}
    exec(WAYS, ways)
    elsewhere = replace(rule, name="elsewhere")
    for way in ways["WAYS"]:
        inputs = sample(rule, B=1, T=20, Hq=4, Hk=1, feature_map=way["feature_map"], dtype=torch.float32)
        for form in forms(rule):
            inside, outside = (evaluate(x, inputs, gradients=False, **way, **form) for x in (rule.name, elsewhere))
            agree(inside, outside, 0.0)
