"""The comparisons can fail: each fault planted in a copy of the sources makes one of them fail.

The comparisons are: the op with the NumPy oracle; the recurrent and chunk forms and the written gradient with the
reference; the Triton kernels with the recurrence of the core. Each compares output, state and all gradients in float64,
at sizes of more than one chunk. `make mutants` plants the faults. `make test` only checks that each fault still finds
the code that it changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from faults import CORE_FAULTS, KERNEL_FAULTS, find, plant
from interpreter import patch_language_once

ROOT = Path(__file__).resolve().parents[1]
T, CHUNK = 22, 8
MASK = torch.rand(2, T, generator=torch.Generator().manual_seed(0)) < 0.7
PACKED = torch.tensor([0, 3, 3, T - 1, T])
NORMALISED = {"denominator": True, "feature_map": "elu+1", "feature_norm": "sum"}
CASES = [
    ("kda", {"Hq": 4, "Hk": 1}, {}),
    ("gated_delta", {}, {"mask": MASK, "read": "before", "scale": 0.5}),
    ("decay", {}, {}),
    ("gla", {}, {"read": "before", "feature_map": "dpfp-2"}),
    ("delta", {}, NORMALISED),
    ("kda", {}, NORMALISED | {"mask": MASK}),
    ("gated_delta", {"B": 1, "sequences": 4}, {"cu_seqlens": PACKED}),
    ("gdn2", {}, {"mask": MASK}),
    ("comba", {"Hq": 4, "Hk": 1}, {"read": "before"}),
    ("comba", {"B": 1, "sequences": 4}, {"cu_seqlens": PACKED}),
    ("rwkv7", {}, {"feature_map": "elu+1", "feature_norm": "l2"}),
    ("rwkv7", {"B": 1, "sequences": 4}, {"cu_seqlens": PACKED, "read": "before"}),
    ("additive", {}, {"causal": False, "feature_norm": "l2"}),
    ("additive", {"B": 1, "sequences": 4}, {"causal": False, "cu_seqlens": PACKED}),
]
OURS = ("fwp", "fwp_kernels", "fwp_benchmarks", "cells", "laws", "outside")


def forget() -> None:
    """Removes these packages from sys.modules, so that they are imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]


def compare_core() -> str:
    """The first comparison that fails with the current sources, "" if none does."""
    forget()
    laws, oracle, testing = map(importlib.import_module, ("laws", "fwp_benchmarks.oracle", "fwp.testing"))
    compiled = {"now": False}  # whether the op is to run as under torch.compile
    for name, module in [*sys.modules.items()]:
        if name.startswith("fwp.") and hasattr(module, "opaque"):
            module.opaque = lambda: compiled["now"]

    def run(form, **options):
        with laws.chunk_size(CHUNK), mock.patch.object(laws.chunked, "CHUNK", CHUNK):
            return testing.evaluate(rule, x, backend="torch", form=form, **options)

    def written(**options):
        with mock.patch.dict(compiled, now=True):
            return run("chunk", **options)

    for rule, shape, options in CASES:
        normalised, phi = options.get("denominator", False), options.get("feature_map")
        sizes = {"T": T, "K": 5, "V": 3} | shape
        x = testing.sample(rule, **sizes, feature_map=phi, state=True, denominator=normalised)
        truth = testing.evaluate(rule, x, backend="reference", **options)
        told = options | ({"feature_map": lambda x: oracle.dpfp(x, 2)} if phi == "dpfp-2" else {})
        told |= {name: t for name, t in x.items() if name != "state"} | x["state"]._asdict()
        told = {name: t.numpy() if isinstance(t, torch.Tensor) else t for name, t in told.items()}
        expected = oracle.fast_weights(rule, **told)
        for name, value in zip(("out", "state.S", "state.z"), expected):
            if value is not None and not testing.deviation(truth[name], torch.from_numpy(value)) <= 1e-10:
                return f"reference {rule} {name}"
        for form in ("recurrent", "chunk", "written"):
            found = written(**options) if form == "written" else run(form, **options)
            for name, value in truth.items():
                if not testing.deviation(found[name], value) <= 1e-10:
                    return f"{form} {rule} {name}"
    return ""


def compare_kernels() -> str:
    """The first comparison that fails with the current kernels, "" if none does. Cheap comparisons run first."""
    forget()
    import cells

    features, problem = cells.Features, cells.problem
    packed = {"T": 13, "N": 3, "cu_seqlens": torch.tensor([0, 11, 11, 13]), "K": 3, "V": 2}
    scalar = problem((1, "k"), T=11, H=(2, 2, 1), K=3, V=2, read="before", denominator=True)
    own_key = problem(cells.OWN_KEY, T=4, K=3, V=2, writes=2, erase_before_decay=True)
    everything = problem(cells.KDA, H=(2, 1, 2), read="before", denominator=True, **packed)
    everything.g[:, 10] = -torch.inf
    dpfp = problem((1, ""), T=4, H=(1, 2, 2), K=11, V=2, features=features("dpfp-3", "sum", 0.5))
    cases = [  # inputs; form, chunk and segment
        (problem((0, "k"), T=40, K=3, V=2), ("chunk", 64, 0)),
        (problem((2, ""), T=3, K=20, V=2, features=features("exp", "l2")), ("chunk", 8, 0)),
        (own_key, ("recurrent", 8)),
        (own_key, ("chunk", 4, 0)),
        (problem((0, "k"), **packed), ("chunk", 2, 0)),
        (scalar, ("recurrent", 8)),
        (scalar, ("chunk", 8, 0)),
        (problem((2, ""), T=5, K=3, V=2, features=features("elu+1", None, 0.5)), ("chunk", 1, 4)),
        (dpfp, ("chunk", 8, 0)),
        (everything, ("chunk", 4, 2)),
    ]
    try:
        for core, how in cases:
            cells.agree(core, run=lambda core, how=how: cells.kernels(core, *how))
    except AssertionError as error:
        return str(error).partition("\n")[0] or "a difference"
    return ""


SETS = {"core": (CORE_FAULTS, compare_core), "kernels": (KERNEL_FAULTS, compare_kernels)}
FAULTS = [
    pytest.param(which, fault, id=f"{which}: {fault}".encode("ascii", "replace").decode())
    for which, (faults, _) in SETS.items()
    for fault in faults
]


class Laboratory:
    """A process that plants faults in a copy of the sources, one at a time, and compares."""

    def __init__(self, which: str, folder: Path) -> None:
        for name in ("fwp", "kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)  # fwp finds its kernels by it
        path = os.pathsep.join(map(str, (folder, folder / "kernels", ROOT / "tests", ROOT / "benchmarks")))
        self.errors = (folder / "errors").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-B", __file__, which, str(folder)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.sound = self.ask("")

    def ask(self, fault: str) -> str:
        """The comparison that fails under a fault. fault "": none is planted."""
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it may have died of the last fault, and then there is no answer
            print(json.dumps(fault), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        self.errors.seek(0)
        assert answer, self.errors.read()
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Laboratory]]:
    """The laboratories of this worker, each made at its first use."""
    made: dict[str, Laboratory] = {}

    def get(which: str) -> Laboratory:
        if which not in made:
            made[which] = Laboratory(which, tmp_path_factory.mktemp(which))
        return made[which]

    yield get
    for each in made.values():
        each.close()


@pytest.mark.mutants
@pytest.mark.parametrize(("which", "fault"), FAULTS)
def test_a_planted_fault_is_red(which: str, fault: str, laboratory: Callable[[str], Laboratory]) -> None:
    if which == "kernels":
        pytest.importorskip("triton")
    there = laboratory(which)
    assert there.sound == "", "red without a fault"
    red = there.ask(fault)
    assert red, "survived"
    assert not red.startswith("ERROR"), red


def test_every_fault_has_its_place() -> None:
    """Rewrite a fault when its function is renamed or the code that it changes is rewritten."""
    stale = {}
    for faults, _ in SETS.values():
        for name, fault in faults.items():
            try:
                find(ROOT, fault)
            except LookupError as error:
                stale[name] = str(error)
    assert not stale, "\n".join(f"{name}: {error}" for name, error in stale.items())


def answer(which: str, folder: Path) -> None:
    """The laboratory's process: reads names of faults and writes the comparison that fails under each."""
    patch_language_once()
    faults, compare = SETS[which]
    for line in sys.stdin:
        path, text = plant(folder, faults[json.loads(line)]) if json.loads(line) else (None, "")
        sound = path.read_text(encoding="utf-8") if path else ""
        if path:
            path.write_text(text, encoding="utf-8")
        try:
            red = compare()
        except Exception as error:
            red = f"ERROR: {error}"
        if path:
            path.write_text(sound, encoding="utf-8")
        print(json.dumps(red), flush=True)


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]))
