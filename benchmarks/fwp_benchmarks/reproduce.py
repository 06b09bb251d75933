"""`fwp reproduce`: trains what the papers trained, and says whether each of their claims holds.

Each finished run is one line of `<family>.jsonl` in the output folder, under a key made of all its settings. A rerun
keeps these lines and trains only what is missing. The figures, `claims.json` and `report.html` are made from them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .claims import Family, Settings
from .papers.fast_weight_memories import FLIP_FLOP_FAMILY, PARKING_FAMILY
from .papers.secretly_fast_weights_1 import SETTING_1
from .papers.secretly_fast_weights_2 import SETTING_2
from .papers.zoology import MQAR
from .results import append, missing, results_file, run_key
from .workers import cores, for_workers, start_worker

FAMILIES: dict[str, Family] = {
    family.id: family for family in (FLIP_FLOP_FAMILY, PARKING_FAMILY, SETTING_1, SETTING_2, MQAR)
}
SCALES = ("smoke", "quick", "reduced", "paper")

Progress = Callable[[int, int, str], None]  # number of finished runs, number of all runs, the run that just finished


def main(ids: Sequence[str], scale: str, out: Path, progress: Progress = lambda done, total, text: None) -> Path:
    """Trains the missing runs of the named families, or of all if none is named, and writes the report.

    Returns the path of the report. KeyboardInterrupt passes through; the finished runs are kept.
    """
    from . import report  # before any training, because it raises if matplotlib is missing

    out.mkdir(parents=True, exist_ok=True)
    families = [FAMILIES[name] for name in dict.fromkeys(ids or FAMILIES)]
    todo = [(family, settings) for family in families for settings in missing(family, scale, out)]
    total = sum(len(family.scales[scale].settings) for family in families)
    if todo:
        progress(total - len(todo), total, "")
        with closing(train(todo)) as rows:
            for done, (family, row) in enumerate(rows, total - len(todo) + 1):
                append(results_file(family, out), row)
                progress(done, total, family.summarise(row))
    return report.write(FAMILIES.values(), scale, out, ids)


def train(todo: Sequence[tuple[Family, Settings]]) -> Generator[tuple[Family, dict[str, Any]], None, None]:
    """Trains the runs side by side, one process per core, and yields each as it ends.

    Closing the generator ends the processes.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(len(todo), cores()), multiprocessing.get_context("spawn"), start_worker)
    try:
        with for_workers():
            futures = {pool.submit(timed_run, family.train, settings): (family, settings) for family, settings in todo}
        for future in as_completed(futures):
            family, settings = futures[future]
            yield family, {"key": run_key(settings), **settings, **future.result()}
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def timed_run(run: Callable[[Settings], Any], settings: Settings) -> dict[str, Any]:
    """Does one run. Returns its result, the seconds it took, PyTorch's version, the device and the CPU's vectors."""
    started = time.perf_counter()
    result = run(settings)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    seconds = round(time.perf_counter() - started, 2)
    cpu = torch.backends.cpu.get_cpu_capability()  # AVX2 and AVX-512 round differently
    return {**result, "seconds": seconds, "torch": torch.__version__, "device": device, "cpu": cpu}
