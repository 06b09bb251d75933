"""Searches the fastest block sizes of the chunk form on this GPU: `fwp bench --tune`.

For each cell and size one block size after the other is changed. The choices that compile and compute rightly take
turns, and one that is faster by more than two per cent is kept. The results go to a table in the user's cache folder,
from which later calls on this machine take them.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fwp
from fwp import testing
from fwp.core import Core
from fwp_kernels import tiling

from .results import write_whole
from .speed import timed

WIDTHS = (64, 128, 256)
SIZES: dict[str, Any] = {"B": 4, "T": 2048, "H": 16}
CHOICES = {
    "chunk": (16, 32, 64),
    "walk": (16, 32, 64, 128),
    "block": (16, 32, 64),
    "warps": (4, 8),
    "stages": (1, 2, 3),
    "checkpoint_every": (1, 2, 4),
}
GAIN = 1.02  # less may be chance
ROUNDS = 20


def cells() -> dict[tuple[int, bool], str]:
    """(axes of the decay, erases) → the first rule of the table that lowers to it and has no erase key of its own."""
    found: dict[tuple[int, bool], str] = {}
    for name, rule in fwp.RULES.items():
        if rule.lower is not None:
            x = testing.sample(rule, B=1, T=1, H=1, K=1, V=1)
            core = rule.lower(Core(x.pop("q"), x.pop("k"), x.pop("v")), **x)
            if core.a is None:
                found.setdefault((0 if core.g is None else core.g.dim() - 2, core.erases), name)
    return found


RULES = cells()


def fastest(start: tiling.Tiles, times: Callable[[list[tiling.Tiles]], list[float]]) -> tuple[tiling.Tiles, float]:
    """The best tiles that are found, and by what factor they are faster than `start`.

    times: the seconds that each of some tiles takes; infinite for those that fail.
    """
    best, gained = start, 1.0
    for name, values in CHOICES.items():
        others = [replace(best, **{name: value}) for value in values]
        most = {tiles.chunk: tiling.KEPT // tiles.chunk for tiles in others}
        others = [replace(t, checkpoint_every=min(t.checkpoint_every, most[t.chunk])) for t in others]
        tried = [*dict.fromkeys([best, *others])]
        found = times(tried)
        quickest = min(range(len(tried)), key=found.__getitem__)
        if found[0] > GAIN * found[quickest]:
            best, gained = tried[quickest], gained * found[0] / found[quickest]
    return best, gained


def works(rule: str, D: int, device: str, tiles: tiling.Tiles) -> bool:
    """Whether these tiles compile, fit, and give the reference's results and gradients within the budgets."""
    x = testing.sample(rule, B=1, T=150, H=2, K=D, V=D, dtype=torch.bfloat16)
    truth = testing.evaluate(rule, testing.cast(x, torch.float64), backend="reference")
    allowed, there = testing.budgets(rule, x), {name: y.to(device) for name, y in x.items()}
    with tiling.forcing(tiles):
        try:
            found = testing.evaluate(rule, there, backend="triton", form="chunk")
        except Exception:  # whatever the compiler or the driver thinks of it
            return False
    return all(testing.result_error(name, found[name].cpu(), y) <= allowed[name] for name, y in truth.items())


def times(rule: str, D: int, device: str, candidates: list[tiling.Tiles]) -> list[float]:
    """Seconds of forward and backward together, the median of rounds in which the candidates take turns."""
    x = testing.sample(rule, **SIZES, K=D, V=D, dtype=torch.bfloat16, device=device)
    leaves = [y.requires_grad_() for y in x.values()]

    def run() -> None:
        out, _ = fwp.fast_weights(rule, **x, backend="triton", form="chunk")
        torch.autograd.grad(out, leaves, x["v"].detach())

    found = {i: list[float]() for i, tiles in enumerate(candidates) if works(rule, D, device, tiles)}
    for round_ in range(ROUNDS + 1):
        for i, seconds in found.items():
            with tiling.forcing(candidates[i]):
                taken = timed(run, device)
            if round_:  # the first one warms up
                seconds.append(taken)
    return [median(found[i]) if i in found else math.inf for i in range(len(candidates))]


def tuned_rows(device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Tunes bfloat16 for each cell and width, and adds each row to the table as it is found."""
    where, table = tiling.architecture(torch.device(device)), dict(tiling.measured())
    for (decay, erase), rule in RULES.items():
        for D in WIDTHS:
            start = tiling.by_rule(D, torch.bfloat16, decay, erase, where)
            best, gained = fastest(start, partial(times, rule, D, device))
            key = tiling.key(D, D, torch.bfloat16, decay, erase, where)
            table[key] = best
            write(table)
            yield dict(zip(tiling.KEY, key)) | asdict(best) | {"gained": round(gained, 3)}


def table_file() -> Path:
    """The table in the user's cache folder."""
    return tiling.measured_file()


def write(table: dict[tuple[str, ...], tiling.Tiles]) -> None:
    """Replaces the table, for this process too."""
    columns = [*tiling.KEY, *(field.name for field in fields(tiling.Tiles))]
    path = table_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([*key, *asdict(tiles).values()] for key, tiles in sorted(table.items()))
    write_whole(path, text.getvalue())
    tiling.measured.cache_clear()
