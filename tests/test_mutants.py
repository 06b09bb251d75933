"""The comparisons can fail: faults planted in a copy of the sources turn them red, one by one.

The comparisons are those of the op with the NumPy oracle, and of the token and chunk forms with the reference, output,
state and every gradient in float64, at sizes that cross a border of chunks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCH, LOWERING, OP = "fwp/backends/torch.py", "fwp/rules/lowering.py", "fwp/functional.py"
EQUATIONS, LOOP, MAPS = "fwp/rules/reference.py", "fwp/backends/reference.py", "fwp/feature_maps.py"

COMPARISONS = """
import sys
import oracle
import torch
import fwp
from fwp.testing import deviation, evaluate, sample

MASK = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.7
NORMALISED = {"denominator": True, "feature_map": "elu+1", "feature_norm": "sum"}
CASES = [
    ("kda", {"Hq": 4, "Hk": 1}, {}),
    ("gated_delta", {}, {"mask": MASK, "read": "before", "scale": 0.5}),
    ("decay", {}, {}),
    ("gla", {}, {"read": "before", "feature_map": "dpfp-2"}),
    ("delta", {}, NORMALISED),
    ("kda", {}, NORMALISED | {"mask": MASK}),
    ("gated_delta", {"B": 1, "sequences": 4}, {"cu_seqlens": torch.tensor([0, 3, 3, 69, 70])}),
    ("additive", {}, {"causal": False, "feature_norm": "l2"}),
]
for rule, shape, options in CASES:
    x = sample(rule, **{"T": 70, "K": 5, "V": 3} | shape, feature_map=options.get("feature_map"), state=True,
               denominator=options.get("denominator", False))
    found = {form: evaluate(rule, x, backend="torch", form=form, **options) for form in ("recurrent", "chunk")}
    truth = evaluate(rule, x, backend="reference", **options)
    told = options | ({"feature_map": lambda x: oracle.dpfp(x, 2)} if options.get("feature_map") == "dpfp-2" else {})
    told = {n: t.numpy() if isinstance(t, torch.Tensor) else t for n, t in told.items()}
    told |= {n: t.numpy() for n, t in x.items() if n != "state"}
    z = x["state"].z
    out, S, _ = oracle.fast_weights(rule, **told, S=x["state"].S.numpy(), z=None if z is None else z.numpy())
    for name, expected in (("out", out), ("state.S", S)):
        if not deviation(truth[name], torch.from_numpy(expected)) <= 1e-10:
            sys.exit(f"RED: reference {rule} {name}")
    for form, results in found.items():
        for name, expected in truth.items():
            if not deviation(results[name], expected) <= 1e-10:
                sys.exit(f"RED: {form} {rule} {name}")
print("GREEN")
"""

MUTANTS = {
    "an eraser that sees itself": (TORCH, "strict = ones.tril(-1)", "strict = ones.tril()"),
    "a reader that sees itself before the update": (TORCH, 'strict if read == "before"', 'ones.tril() if read == ""'),
    "a reader with the decay of its own token": (TORCH, 'Gq = G if read == "after"', "Gq = G if True"),
    "a border of chunks without decay": (TORCH, "(d.whole * S + ", "(S + "),
    "writers that don't decay to the end": (TORCH, "(p.k * d.end).mT @ X).squeeze", "p.k.mT @ X).squeeze"),
    "erasing without the state before the chunk": (TORCH, "X - (erase * d.start) @ S", "X - 0 * (erase * d.start) @ S"),
    "a gradient lost at the border of chunks": (TORCH, "step(piece, S, ", "step(piece, S.detach(), "),
    "pairs of the wrong blocks": (TORCH, "block = i // (2 * half)", "block = i // (4 * half)"),
    "a diagonal left out": (TORCH, "M = ((a * b).sum(-1) *", "M = 0 * ((a * b).sum(-1) *"),
    "packed sequences in the wrong order": (TORCH, "return S[self.unorder]", "return S[self.order]"),
    "a column z that erases": (TORCH, "torch.ones_like(x[..., :1])", "x[..., :1]"),
    "one learning rate for erasing and writing": (LOWERING, "e=ratio(beta,", "e=0 * ratio(beta,"),
    "the keys up to a token, not before it": (LOWERING, "[:, :-1]", "[:, 1:]"),
    "a decay forgotten in the lowering": (LOWERING, "g=g, w=beta", "g=None, w=beta"),
    "a mask that gates don't see": (OP, "masked_fill(hidden, ", "masked_fill(hidden & False, "),
    "a mask that φ(0) passes": (OP, "k = k.masked_fill(~mask[:, :, None, None], 0)", "k = k"),
    "keys that are scaled": (OP, "feature_norm, 1.0)", "feature_norm, scale)"),
    "a decay after the write": (EQUATIONS, "None] * S + outer(k, v)", "None] * (S + outer(k, v))"),
    "an equation that forgets to erase": (EQUATIONS, "outer(k, v - retrieve(S, k))", "outer(k, v)"),
    "an equation that normalises what it writes": (EQUATIONS, "v - old), z + k", "v / 2 - old), z + k"),
    "a loop that reads too late": (LOOP, 'core.read == "before"', 'core.read == ""'),
    "a roll the wrong way": (MAPS, "r.roll(i, -1)", "r.roll(-i, -1)"),
}  # fmt: skip


def compare(folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-c", COMPARISONS]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "fwp", tmp_path / "fwp", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_without_a_fault_all_is_green(copy: Path) -> None:
    run = compare(copy)
    assert run.stdout == "GREEN\n", run.stderr


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_planted_fault_is_red(fault: str, copy: Path) -> None:
    name, right, wrong = MUTANTS[fault]
    text = (copy / name).read_text(encoding="utf-8")
    assert right in text, f"{name} has changed: plant the fault anew"
    (copy / name).write_text(text.replace(right, wrong), encoding="utf-8")
    run = compare(copy)
    assert run.returncode == 1, f"survived: {run.stdout}"
    assert run.stderr.startswith("RED: "), run.stderr
