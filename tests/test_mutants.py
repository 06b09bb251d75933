"""The comparisons can fail: faults planted in a copy of the sources turn them red, one by one.

The comparisons are those of the op with the NumPy oracle, of the token and chunk forms and the written gradient with
the reference, and of the Triton kernels with the recurrence of the core: output, state and every gradient in float64,
at sizes that cross a border of chunks.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH, LOWERING, OP = "fwp/backends/torch.py", "fwp/rules/lowering.py", "fwp/functional.py"
EQUATIONS, LOOP, MAPS = "fwp/rules/reference.py", "fwp/backends/reference.py", "fwp/feature_maps.py"
CORE = "fwp/core.py"

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
    ("additive", {"B": 1, "sequences": 4}, {"causal": False, "cu_seqlens": torch.tensor([0, 3, 3, 69, 70])}),
]

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
    "a mask that φ(0) passes": (OP, "None], zero)  #", "None], 0)  #"),
    "keys that are scaled": (CORE, "transform(self.k, phi, norm)", "transform(self.k, phi, norm, scale)"),
    "a decay after the write": (EQUATIONS, "None] * S + outer(k, v)", "None] * (S + outer(k, v))"),
    "an equation that forgets to erase": (EQUATIONS, "outer(k, v - retrieve(S, k))", "outer(k, v)"),
    "an equation that normalises what it writes": (EQUATIONS, "v - old), z + k", "v / 2 - old), z + k"),
    "a loop that reads too late": (LOOP, 'core.read == "before"', 'core.read == ""'),
    "a roll the wrong way": (MAPS, "r.roll(i, -1)", "r.roll(-i, -1)"),
    "a written gradient that doesn't decay": (TORCH, "d_S0 = d.whole * d_S + ", "d_S0 = d_S + "),
    "a written gradient without the state's own decay": (TORCH, "+= (S_end * d_S).sum(-1)", "+= (0 * d_S).sum(-1)"),
    "a written gradient of a later reader": (TORCH, "pad(d_Gq[..., 1:, :], (0, 0, 0, 1))", "d_Gq"),
    "a written gradient without the erased keys": (TORCH, "d_k + d.A.grad_b(d_A, erase)", "d_k"),
    "a written gradient of the wrong sequences": (TORCH, "layout.unsort(d_S).clone()", "d_S.clone()"),
    "a written gradient of the state before": (TORCH, "found[0] = d @ S_end[:n]", "found[0] = d @ S0[:n]"),
    "a written gradient summed the wrong way": (LOWERING, "pad(a, earlier)", "a"),
}  # fmt: skip


FEATURES, CHUNK, BACK, TILES, LAUNCH, TOKEN = (
    "kernels/fwp_kernels/features.py",
    "kernels/fwp_kernels/chunk.py",
    "kernels/fwp_kernels/chunk_back.py",
    "kernels/fwp_kernels/tiles.py",
    "kernels/fwp_kernels/launch.py",
    "kernels/fwp_kernels/recurrent.py",
)
SEGMENTS = "kernels/fwp_kernels/segments.py"
KERNEL_MUTANTS = {
    "gates that count below the floor": (CHUNK, "tl.where(x < FLOOR, FLOOR, x)", "x"),
    "gates that aren't summed": (CHUNK, "KG, tl.cumsum(x, 0))", "KG, x)"),
    "erasing without its strength": (CHUNK, "A *= load(e,", "A *= 1 + 0 * load(e,"),
    "a reader that decays too much": (CHUNK, "gates, KG, LAG, False, DECAY", "gates, KG, False, False, DECAY"),
    "an inverse that isn't transposed": (BACK, "dot(tl.trans(load(I, rows", "dot((load(I, rows"),
    "a gradient that doesn't decay": (BACK, "dS = through(dS, gates, KG, C)", "dS = dS"),
    "a gradient of the wrong head": (BACK, "b_v = load(v, rows, h // GV", "b_v = load(v, rows, h * 0"),
    "a gate's gradient without the state's": (BACK, "kept += tl.sum(", "kept += 0 * tl.sum("),
    "a gate's gradient of a later reader": (BACK, "b_dg -= per_gate(border, DECAY) + lagging", "b_dg -= 0"),
    "an eraser's gradient that misses its keys": (BACK, "b_dk += d_writer + b_e * b_dek", "b_dk += d_writer"),
    "gates from beyond the end": (TILES, "tl.minimum(start + i - LAG, end - 1)", "tl.minimum(start + i - LAG, end)"),
    "pairs of the wrong blocks": (TILES, "(2 * half) + half - 1", "(2 * half) + half"),
    "a diagonal left out of a gradient": (TILES, "db += own * a", "db += 0 * a"),
    "the chunks of the first sequence": (TILES, "before = tl.load(p_slots + n)", "before = 0 * tl.load(p_slots + n)"),
    "a state that isn't brought on to its chunk": (BACK, "range((c % APART)", "range((c % 1)"),
    "a gradient of S that isn't brought back": (BACK, "tl.maximum(last - c, 0)", "tl.maximum(-1 - c, 0)"),
    "a gradient of S of a chunk too far": (BACK, "tl.cdiv(end - first, C)) - 1", "tl.cdiv(end - first, C))"),
    "a state in the place of another's": (TILES, "(before + (n + 1) * (APART - 1)) // APART", "before // APART"),
    "a segment that starts a chunk too early": (TILES, "c = s % NS * CS", "c = s % NS * CS - (s % NS)"),
    "a border of segments without decay": (SEGMENTS, "S = S * tl.trans(decay)", "S = S"),
    "the decay of a segment's last chunk": (CHUNK, "g += load_last(", "g = load_last("),
    "a matrix that isn't transposed backward": (SEGMENTS, "dk[:, None] if BACK", "dk[:, None] if False"),
    "a z that a segment's gates don't reach": (SEGMENTS, "z *= decay", "z *= 1"),
    "a segment that passes nothing on": (CHUNK, "if v is None:", "if False:"),
    "segments that begin with their sequence": (LAUNCH, "cu[of] + inner * size", "cu[of] + 0 * inner"),
    "gradients that stay in their segment": (LAUNCH, '["p_Nz"], **divided', '["p_Nz"], **divided | {"do": None}'),
    "halves of an inverse that don't meet": (TILES, "X21 = -dot(", "X21 = 0 * dot("),
    "chunks of the wrong sequence": (LAUNCH, "right=True", "right=False"),
    "a key head's gradient of one head alone": (LAUNCH, "(heads, -1)).sum(3)", "(heads, -1))[:, :, :, 0]"),
    "a denominator that forgets the chunks before": (CHUNK, "zq = read_sum(", "zq = 0 * read_sum("),
    "a denominator of the wrong tokens": (CHUNK, "zq += tl.sum(b_P.to(ACC), 1)", "zq += tl.sum(b_P.to(ACC), 0)"),
    "a sum of keys that doesn't decay": (CHUNK, " z *= tl.exp(load_last(", " z *= 1 + 0 * tl.exp(load_last("),
    "a gradient without the denominator's": (BACK, "dP += b_dden", "dP += 0 * b_dden"),
    "a gradient without the denominator's past": (BACK, "b_dq += b_dden * z", "b_dq += 0 * z"),
    "a gradient of z that doesn't decay": (BACK, " dz *= tl.exp(load_last(", " dz *= 1 + 0 * tl.exp(load_last("),
    "a gradient of z without its readers": (BACK, " dz += write_sum(", " dz += 0 * write_sum("),
    "a gradient of gates without z": (BACK, "kept += z * dz", "kept += 0 * z"),
    "features of half of [x, −x]": (FEATURES, "< D, b, -b)", "< D, b, b)"),
    "features rolled the wrong way": (FEATURES, "f % (2 * D) - f //", "f % (2 * D) + f //"),
    "a norm of the features that are there": (FEATURES, "total += sum_for(", "total = sum_for("),
    "a gradient without the norm's": (FEATURES, "factor * (dy - along)", "factor * dy"),
    "a gradient without the length's": (FEATURES, "dy - factor * b * along", "dy"),
    "a gradient of features of one block": (FEATURES, "along += tl.sum(", "along = 0 * along + tl.sum("),
    "a gradient of half of the pairs": (FEATURES, "j + i, D, ACC)", "j + i, D, ACC) * 0"),
    "a gradient of negative x": (FEATURES, "(1 - 2 * half)", "1"),
    "a gradient of the first that shares a head": (FEATURES, "h * SHARE + s, f", "h * SHARE, f"),
    "a slope of 1 everywhere": (FEATURES, "b > 0, 1.0, tl.exp(b))", "b > 0, 1.0, 1.0)"),
    "keys that are scaled": (CHUNK, "dk, K, D, MAP, NORM, 1.0, ACC)", "dk, K, D, MAP, NORM, SCALE, ACC)"),
    "a gradient of unscaled queries": (BACK, "MAP, ACC) * SCALE", "MAP, ACC)"),
    "a token's sum of keys that doesn't decay": (TOKEN, "z *= decay", "z *= 1 + 0 * decay"),
    "a token that doesn't erase": (TOKEN, "x -= b_e * tl.sum(S", "x -= 0 * tl.sum(S"),
}  # fmt: skip


def forget() -> None:
    """fwp is to be imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fwp", "cells")]:
        del sys.modules[name]


def compare_kernels() -> str:
    """What is wrong with the kernels as they are now, "" if nothing is."""
    forget()
    import cells

    features = cells.Features
    packed = {"T": 13, "N": 3, "cu_seqlens": torch.tensor([0, 11, 11, 13])}
    cases = {
        "kda": cells.problem(cells.KDA, H=(2, 1, 2), K=3, V=2, read="before", denominator=True, **packed),
        "gated_delta": cells.problem((1, True), T=11, H=(2, 2, 1), K=3, V=2, read="before", denominator=True),
        "delta": cells.problem((0, True), T=40, K=3, V=2),
        "gla": cells.problem((2, False), T=5, K=3, V=2, features=features("elu+1", None, 0.5)),
        "dpfp": cells.problem((1, False), T=4, H=(1, 2, 2), K=11, V=2, features=features("dpfp-3", "sum", 0.5)),
        "packed": cells.problem((0, True), K=3, V=2, **packed),
        "l2": cells.problem((2, False), T=3, K=20, V=2, features=features("exp", "l2")),
    }
    cases["kda"].g[:, 10] = -torch.inf
    try:
        for name, core in cases.items():
            chunk, segment = {"kda": (4, 2), "gla": (1, 4), "delta": (64, 0), "packed": (2, 0)}.get(name, (8, 0))
            cells.agree(core, run=lambda core, sizes=(chunk, segment): cells.kernels(core, "chunk", *sizes))
        cells.agree(cases["gated_delta"], run=lambda core: cells.kernels(core, "recurrent", 8))
    except AssertionError as error:
        return str(error).partition("\n")[0] or "a difference"
    return ""


def compare() -> str:
    """What is wrong with the sources as they are now, "" if nothing is."""
    forget()
    from fwp_benchmarks import oracle

    testing, backend, lowering = (
        importlib.import_module(f"fwp.{name}") for name in ("testing", "backends.torch", "rules.lowering")
    )

    def written(rule, **options):  # what torch.compile takes
        backend.opaque = lowering.opaque = lambda: True
        try:
            return testing.fast_weights(rule, backend="torch", **options)
        finally:
            backend.opaque = lowering.opaque = lambda: False

    for rule, shape, options in CASES:
        sizes = {"T": 70, "K": 5, "V": 3} | shape
        normalised, phi = options.get("denominator", False), options.get("feature_map")
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
            how = {"call": written} if form == "written" else {"backend": "torch", "form": form}
            found = testing.evaluate(rule, x, **how, **options)
            for name, value in truth.items():
                if not testing.deviation(found[name], value) <= 1e-10:
                    return f"{form} {rule} {name}"
    return ""


def plant_all(folder: Path, mutants: dict[str, tuple[str, str, str]], compare: Callable[[], str]) -> dict[str, str]:
    """What each fault turned red; under "" what was red without one."""
    red = {"": compare()}
    for fault, (name, right, wrong) in mutants.items():
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(right, wrong), encoding="utf-8")
        try:
            red[fault] = compare()
        except Exception as error:
            red[fault] = f"ERROR: {error}"
        (folder / name).write_text(text, encoding="utf-8")
    return red


def check(folder: Path, mutants: dict[str, tuple[str, str, str]], which: str) -> None:
    """In a process of its own, on a copy of the sources."""
    stale = [fault for fault, (name, right, _) in mutants.items() if right not in (ROOT / name).read_text("utf-8")]
    assert not stale, "their sources have changed, plant them anew"
    for name in ("fwp", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # by which fwp finds its kernels
    env = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", __file__, str(folder), which]
    run = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    red = json.loads(run.stdout)
    assert red.pop("") == "", "red without a fault"
    assert [*red] == [*mutants]
    wrong = {fault: said or "survived" for fault, said in red.items() if not said or said.startswith("ERROR")}
    assert not wrong


def test_planted_faults_are_red(tmp_path: Path) -> None:
    check(tmp_path, MUTANTS, "torch")


def test_planted_faults_of_kernels_are_red(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check(tmp_path, KERNEL_MUTANTS, "kernels")


if __name__ == "__main__":
    which = (KERNEL_MUTANTS, compare_kernels) if sys.argv[2] == "kernels" else (MUTANTS, compare)
    print(json.dumps(plant_all(Path(sys.argv[1]), *which)))
