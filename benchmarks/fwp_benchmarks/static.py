"""Compiles the kernels for GPUs that need not be there: registers, spills, shared memory, matrix instructions.

`make static` compiles all that ships into `benchmarks/results/static.csv`; a test compiles some of it and compares. The
launches of the launch layer are recorded, so block sizes and switches are the real ones. Triton must not interpret
(TRITON_INTERPRET=0).
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fwp.backends.triton import widest
from fwp_kernels import launch
from fwp_kernels.problem import Problem

LIMITS = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB of shared memory a program
# The matrix instructions that a GPU is built for, and those it still takes.
OLDER = "mma.sync"
MATRIX = {"sm_80": OLDER, "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "sm_120": OLDER, "gfx942": "v_mfma"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class StaticCase(NamedTuple):
    """A cell, the sizes of its state, and what q and k pass on the way to it."""

    decay: int  # 0 none, 1 per head, 2 per key channel
    erase: int  # 0 none, 1 along k, 2 along a key of its own
    K: int
    V: int
    dtype: str = "bfloat16"
    feature_map: str = ""
    norm: str = ""
    denominator: int = 0
    writes: int = 1  # per read
    erase_before_decay: int = 0


SIZES = [(64, 64), (128, 128), (256, 256), (768, 128)]
CELLS = [(decay, erase) for decay in (0, 1, 2) for erase in (0, 1)]
CASES = [StaticCase(*cell, *size) for size in SIZES for cell in CELLS]
CASES += [StaticCase(*cell, *size, "float32") for size in SIZES for cell in CELLS]
CASES += [
    StaticCase(*cell, *size, feature_map=feature_map, norm=norm, denominator=denominator)
    for cell, size, feature_map, norm, denominator in [
        ((0, 0), (64, 64), "elu+1", "", 1),
        ((1, 0), (128, 128), "elu+1", "", 1),
        ((2, 0), (128, 128), "exp", "sum", 1),
        ((0, 0), (384, 64), "dpfp-3", "", 1),
        ((0, 1), (384, 64), "dpfp-3", "sum", 0),
        ((1, 0), (768, 128), "dpfp-3", "", 1),
        ((2, 1), (128, 128), "relu", "l2", 0),
    ]
]
CASES += [StaticCase(*cell, 512, 128, "float32", "relu", "l2") for cell in CELLS]
CASES += [StaticCase(decay, 2, 128, 128, denominator=1, erase_before_decay=1) for decay in (0, 1, 2)]
CASES += [
    StaticCase(*cell, *size, writes=writes, erase_before_decay=before)
    for size in SIZES[:2]
    for cell, writes, before in [
        ((0, 2), 1, 0),
        ((1, 2), 1, 0),
        ((2, 2), 1, 0),
        ((1, 1), 1, 1),
        ((2, 2), 1, 1),
        ((1, 1), 2, 0),
        ((2, 2), 2, 1),
    ]
]


def launches(case: StaticCase, target: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and arguments of what a forward in both forms and a backward start."""

    def empty(*size: int, dtype: torch.dtype = torch.float32, writes: int = 1) -> torch.Tensor:
        return torch.empty(2, 128 * writes, 4, *size, dtype=dtype)

    dtype, K, phi = DTYPES[case.dtype], case.K, case.feature_map
    D = K // (2 * int(phi.removeprefix("dpfp-"))) if phi.startswith("dpfp-") else K
    eps = 1e-6 if case.denominator else None

    def problem(segment: int = 0) -> Problem:
        n = case.writes
        q, k, v = empty(D, dtype=dtype), empty(D, dtype=dtype, writes=n), empty(case.V, dtype=dtype, writes=n)
        strength = empty(writes=n) if case.erase else None
        wide = torch.float32 if case.denominator else dtype  # as the rules that erase with a denominator make it
        a = empty(K, dtype=wide, writes=n) if case.erase == 2 else None
        g = [None, empty(writes=n), empty(K, writes=n)][case.decay]
        state = torch.empty(2, 4, K, case.V), torch.empty(2, 4, K) if case.denominator else None
        scale = D**-0.5 if phi or case.norm else 1.0
        options: dict[str, Any] = {"feature_map": phi or None, "norm": case.norm or None, "scale": scale}
        options |= {"writes": n, "erase_before_decay": bool(case.erase_before_decay), "segment": segment, "gpu": target}
        return Problem(q, k, v, g, a, strength, strength, *state, None, False, eps, **options)

    started: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(kernel: Any, programs: int, **arguments: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        if name == "walk" and arguments["p_o"] is None:
            name = "walk_again" if arguments["p_kept"].S is not None else "walk_state"
            name = name if arguments["p"].v is not None else "walk_matrix"
        if name == "walk_back" and arguments["p_d_kept"].S is None:
            name = "walk_back_state"
        if name == "join" and arguments["BACK"]:
            name = "join_back"
        started.setdefault(name, (kernel, arguments))

    launch.forward(problem(), "recurrent", start=record)
    for segment in (0, 1):  # whole, and cut into segments of the fewest chunks
        o, S, z, den = launch.forward(problem(segment), "chunk", start=record)
        launch.backward(problem(segment), o, den, empty(case.V, dtype=dtype), S, z, start=record)
    return [(name, *what) for name, what in started.items()]


def compiled(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """The kernel compiled for a target, specialised as a launch does: on what is None, and on multiples of 16."""
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def described(x: Any, at: tuple[int, ...], constant: bool = False) -> Any:
        if constant or x is None:
            constants[at] = x
            return "constexpr"
        if isinstance(x, tuple):
            inner = [described(y, (*at, i)) for i, y in enumerate(x)]
            return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)
        if isinstance(x, torch.Tensor) or (len(at) > 1 and x % 16 == 0):  # other numbers stand for lengths
            attributes[at] = [["tt.divisibility", 16]]
        return pointers[x.dtype] if isinstance(x, torch.Tensor) else "i32"

    signature = {
        parameter.name: described(arguments[parameter.name], (at,), parameter.is_constexpr)
        for at, parameter in enumerate(kernel.params)
    }
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options | {"enable_fp_fusion": True})


def resources(binary: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of it that they don't hold."""

    def number(name: str, text: str) -> int:
        found = re.search(rf"{name}: ?(\d+)", text)
        assert found is not None, f"no {name} in {text}"
        return int(found[1])

    if "amdgcn" in binary.asm:
        return number("TotalNumVgprs", binary.asm["amdgcn"]), number("ScratchSize", binary.asm["amdgcn"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    return number("REG", usage.stdout), number("STACK", usage.stdout)


def compiled_rows(target: str, case: StaticCase, only: str | None = None) -> Iterator[dict[str, Any]]:
    """A row of the table for each kernel of a case, or for the kernel `only`."""
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    started = [what for what in launches(case, target) if only in (None, what[0])]
    for name, kernel, arguments in started:
        binary = compiled(kernel, arguments, gpu)
        registers, spilled = resources(binary)
        text = binary.asm["amdgcn" if amd else "ptx"]
        yield {
            "target": target,
            **case._asdict(),
            "kernel": name,
            "warps": binary.metadata.num_warps,
            "registers": registers,
            "spilled": spilled,
            "shared": binary.metadata.shared,
            "limit": LIMITS[target] * 1024,
            "matrix": text.count(MATRIX[target]),
            "older": 0 if MATRIX[target] == OLDER else text.count(OLDER),
            "triton": triton.__version__,
        }


def cases(target: str) -> list[StaticCase]:
    """What the backend serves there; for sm_100 and sm_120, whose assembler is slow, only what matters most."""
    memory = LIMITS[target] * 1024 * (2 if target.startswith("gfx") else 1)
    served = []
    for case in CASES:
        tiles = 4 if case.erase == 2 else 3 if case.feature_map or case.norm else 2
        if widest(DTYPES[case.dtype].itemsize, case.decay == 2, tiles, memory) >= case.K:
            served.append(case)
    if target in ("sm_100", "sm_120"):
        return [case for case in served if case.dtype == "bfloat16" and (case.K <= 128 or target == "sm_120")]
    return served


def main(path: Path, *targets: str) -> None:
    """Compiles the cases for the targets named, default all, and replaces their rows in the table at `path`."""
    targets = targets or tuple(LIMITS)
    kept = [row for row in read(path) if row["target"] not in targets]
    made = [row for target in targets for case in cases(target) for row in compiled_rows(target, case)]
    table = sorted(kept + made, key=lambda row: list(LIMITS).index(row["target"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fwp_benchmarks.static TABLE.csv [TARGET …]")
    main(Path(sys.argv[1]), *sys.argv[2:])
