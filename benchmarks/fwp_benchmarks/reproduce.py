"""`fwp reproduce`: trains what a paper trained, and says of each of its claims whether it held.

Every finished run is one line of `<family>.jsonl` in the output folder, under a key of all its settings; a rerun takes
what is there and trains the rest. Then the figures, `claims.json` and `report.html` are made from these lines.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import fwp

from .claims import Family, Settings
from .papers.fast_weight_memories import FLIP_FLOP_FAMILY, PARKING_FAMILY
from .papers.secretly_fast_weights_1 import SETTING_1
from .papers.secretly_fast_weights_2 import SETTING_2
from .papers.zoology import MQAR
from .workers import cores, for_workers, start_worker

FAMILIES: dict[str, Family] = {
    family.id: family for family in (FLIP_FLOP_FAMILY, PARKING_FAMILY, SETTING_1, SETTING_2, MQAR)
}
SCALES = ("smoke", "quick", "reduced", "paper")

Progress = Callable[[int, int, str], None]  # finished runs, all runs, what was just finished


def main(ids: Sequence[str], scale: str, out: Path, progress: Progress = lambda done, total, text: None) -> Path:
    """Trains what is missing of these families (none named: all), and writes the report. Its path.

    KeyboardInterrupt passes through; what was finished is kept.
    """
    from . import report  # matplotlib missing is to be said before any work

    out.mkdir(parents=True, exist_ok=True)
    families = [FAMILIES[name] for name in dict.fromkeys(ids or FAMILIES)]
    todo = [(family, settings) for family in families for settings in missing(family, scale, out)]
    total = sum(len(family.scales[scale].settings) for family in families)
    if todo:
        progress(total - len(todo), total, "")
        with closing(train(todo)) as rows:
            for done, (family, row) in enumerate(rows, total - len(todo) + 1):
                append(results(family, out), row)
                progress(done, total, family.describe(row))
    return report.write(FAMILIES.values(), scale, out, ids)


def results(family: Family, out: Path) -> Path:
    """Where a family's finished runs are kept."""
    return out / f"{family.id}.jsonl"


def key(settings: Settings) -> str:
    """Tells runs apart: every setting, and the version of the code."""
    return json.dumps({"fwp": fwp.__version__, **settings}, sort_keys=True)


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs by key. A line that a crash cut short is no run."""
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if "seconds" in row:
                rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a run, whole or not at all: one write, on the disk before the next run counts."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the rest of a line that a crash cut short
                line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def finished(family: Family, scale: str, out: Path) -> list[dict[str, Any]]:
    """The rows of the scale's runs that are there, in the order of its settings."""
    rows = load(results(family, out))
    keys = map(key, family.scales[scale].settings)
    return [rows[name] for name in keys if name in rows]


def missing(family: Family, scale: str, out: Path) -> list[Settings]:
    """The scale's runs that aren't there yet."""
    rows = load(results(family, out))
    return [settings for settings in family.scales[scale].settings if key(settings) not in rows]


def train(todo: Sequence[tuple[Family, Settings]]) -> Generator[tuple[Family, dict[str, Any]], None, None]:
    """Runs them side by side, a process a core, and yields each as it ends. Closing it ends the processes."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(len(todo), cores()), multiprocessing.get_context("spawn"), start_worker)
    try:
        with for_workers():
            futures = {pool.submit(timed, family.train, settings): (family, settings) for family, settings in todo}
        for future in as_completed(futures):
            family, settings = futures[future]
            yield family, {"key": key(settings), **settings, **future.result()}
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def timed(run: Callable[[Settings], Any], settings: Settings) -> dict[str, Any]:
    """The run's result, the seconds it took, and what it ran on."""
    started = time.perf_counter()
    result = run(settings)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    seconds = round(time.perf_counter() - started, 2)
    return {**result, "seconds": seconds, "torch": torch.__version__, "device": device}
