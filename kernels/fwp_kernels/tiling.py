"""Block sizes of the kernels: a rule by size, dtype, cell and GPU, or those measured on this machine."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the kernels of the chunk form."""

    chunk: int  # tokens of a chunk, C
    walk: int  # columns of S that a program of a walk holds, with all K rows
    block: int = 64  # features per block where work is split over K or summed over V
    warps: int = 8  # per program
    stages: int = 2  # of the software pipeline
    checkpoint_every: int = 2  # chunks between the states that are kept for the backward


# Bytes of a matrix product's operand → (largest K, tiles). Chosen to fit into registers and shared memory.
TABLE: dict[int, list[tuple[int, Tiles]]] = {
    2: [
        (64, Tiles(64, 64)),
        (128, Tiles(64, 64)),
        (256, Tiles(32, 32)),
        (512, Tiles(16, 32)),
        (1024, Tiles(16, 16)),
    ],
    4: [
        (64, Tiles(32, 32, 32)),
        (256, Tiles(16, 32, 32)),
        (512, Tiles(16, 16, 32, stages=1)),
        (1024, Tiles(16, 16, 32, stages=1)),
    ],
    8: [(64, Tiles(16, 16, 16, stages=1)), (1024, Tiles(16, 16, 16, stages=1))],
}

KEPT = 128  # the backward keeps a state at least every so many tokens
ROWS = 16  # tokens per program in kernels that take each token alone
KEY = ("architecture", "decay", "erase", "K", "V", "dtype")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Outside of kernels Triton's own takes microseconds."""
    return -(-a // b)


def power_of_2(n: int, most: int = 1024) -> int:
    """The block for n features: a power of 2 from 16, the least for matrix instructions, up to `most`."""
    return min(most, max(16, 1 << (n - 1).bit_length()))


@cache
def architecture(device: torch.device) -> str:
    """The architecture, such as "sm_90" or "gfx942". The interpreter counts as "sm_90"."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def measured_file() -> Path:
    """Where `fwp bench --tune` writes what it measures: the user's cache folder, never the package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp" / "tiles.csv"


@cache
def measured() -> dict[tuple[str, ...], Tiles]:
    """The measured tiles by KEY; empty where nothing was measured or the file can't be read."""
    try:
        with measured_file().open(encoding="utf-8") as file:
            return {
                tuple(row[name] for name in KEY): Tiles(*(int(row[field.name]) for field in fields(Tiles)))
                for row in csv.DictReader(file)
            }
    except (OSError, KeyError, ValueError):
        return {}


def key(K: int, V: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str) -> tuple[str, ...]:
    """The values of KEY for a cell, sizes and a GPU."""
    sizes = (architecture, decay, int(erase), power_of_2(K), power_of_2(V))
    return (*map(str, sizes), str(dtype).removeprefix("torch."))


_forced: Tiles | None = None


@contextmanager
def forcing(tiles: Tiles) -> Iterator[None]:
    """A context for tuning, in which every call in every thread takes these tiles: backwards run in other threads."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


def tiles(
    K: int, V: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str, denominator: bool = False
) -> Tiles:
    """The tiles measured for this cell, size and GPU, else those of the rule. Denominators always follow the rule."""
    if _forced is not None:
        return _forced
    table = {} if denominator else measured()
    row = table.get(key(K, V, dtype, decay, erase, architecture)) if table else None
    return row or by_rule(K, dtype, decay, erase, architecture, denominator)


@cache
def by_rule(K: int, dtype: torch.dtype, decay: int, erase: bool, architecture: str, denominator: bool = False) -> Tiles:
    """TABLE's row for K key features and operands of `dtype`, narrower where a cell or a GPU needs room."""
    row = next(row for limit, row in TABLE[dtype.itemsize] if limit >= K)
    if decay == 2:
        row = replace(row, walk=max(16, row.walk // 2 if K > 64 else row.walk), block=max(16, row.block // 2))
    if erase:
        row = replace(row, walk=min(row.walk, 32), block=min(row.block, 32))
    if architecture.startswith("gfx"):  # warps of 64 threads, twice the registers, a quarter of the shared memory
        row = replace(row, chunk=min(row.chunk, 32 if decay == 2 else 64), warps=4, stages=1)
    elif not 90 <= int(architecture.removeprefix("sm_")) < 120:  # operands of matrix products are in registers
        stages = 1 if K > (128 if decay == 2 else 512) else row.stages  # some have 99 KiB of shared memory
        row = replace(row, chunk=min(row.chunk, 32), walk=min(row.walk, 32), block=16, stages=stages)
    if denominator and K > 64 and (erase or decay < 2):  # z and its sums need registers
        walk = min(row.walk, 16) if erase else row.walk
        block = min(row.block, 16) if erase else row.block
        row = replace(row, chunk=min(row.chunk, 32), walk=walk, block=block, stages=1 if K > 512 else row.stages)
    # To write and read every state [K, V] takes K V / C numbers per token, which is more than all inputs if C is small.
    # Recomputing a state takes one or two matrix products, and neighbouring chunks read the same kept state at the same
    # time. If `gradients` has no registers left for that, every state is kept.
    every = 1 if erase and (decay == 2 or denominator) else (KEPT if dtype.itemsize == 2 else KEPT // 2) // row.chunk
    return replace(row, checkpoint_every=max(1, min(4, every)))
