"""Separate processes for `fwp bench`: some time first calls, others compile kernels for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from .peers import LEADER
from .points import Point
from .workers import cores

Job = Future[tuple[float, str | None]]  # what `run_child` returns
running: set[subprocess.Popen[str]] = set()


def run_child(task: str, point: Point, who: str, until: float, environment: dict[str, str]) -> tuple[float, str | None]:
    """Runs `fwp_benchmarks.speed` on a point in a new process.

    task: "cold" or "ready". who: "ours" or the name of a peer. until: the deadline, by `time.monotonic`.
    Returns the seconds that the process ran, and the last line of its output, or None if the deadline came first.
    Raises RuntimeError if the process failed.
    """
    command = [sys.executable, "-m", "fwp_benchmarks.speed", task, json.dumps(asdict(point)), who]
    started = time.monotonic()
    if started >= until:
        return 0.0, None
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True) as process:
        running.add(process)
        try:
            output, errors = process.communicate(timeout=until - started)
        except subprocess.TimeoutExpired:
            return time.monotonic() - started, None
        finally:
            process.kill()
            running.discard(process)
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1])
    return time.monotonic() - started, output.strip().splitlines()[-1]


@contextmanager
def pool_of_children(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that run children. At the end it waits for all of them, but a stop ends them."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool
            pool.shutdown()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise


def first_call(jobs: dict[str, Job]) -> dict[str, Any]:
    """The part of a cold point's row that holds its times. jobs: one process per name."""
    row: dict[str, Any] = {"seconds": {}, "times": {}}
    notes = []
    for name, job in jobs.items():
        try:
            ran, line = job.result()
        except RuntimeError as error:
            notes.append(f"{name}: {error}")
            continue
        if line is None:
            if ran:
                row["seconds"][name] = ran
            notes.append(f"{name}: stopped after {ran:.0f} s")
        else:
            found = json.loads(line)
            row["seconds"][name], row["times"][name] = found["seconds"], [found["seconds"]]
            notes += [f"{name}: {found['import']:.1f} s of import before"] if found["import"] > 0.1 else []
    if "ours" not in row["times"]:
        row["red"] = "; ".join(notes)
    return row | {"note": "; ".join(notes)}


class Precompiler:
    """Times first calls, each in its own process. On a GPU it also compiles the kernels of all points.
    todo: the points. peers: whether to include the main peer, if it is installed.
    until: the deadline, by `time.monotonic`.
    """

    def __init__(self, todo: list[Point], device: str, peers: bool, until: float) -> None:
        who = ["ours", *([LEADER] if peers and device == "cuda" and find_spec("fla") is not None else [])]
        workers = min(16, cores()) if device == "cuda" else 1
        self.note = f"timed while up to {workers - 1} other processes compiled" if workers > 1 else ""
        with tempfile.TemporaryDirectory() as empty, pool_of_children(workers) as pool:

            def start(task: str, point: Point, name: str) -> Job:
                # beside so many processes a peer's autotuner measures badly, so its results are not kept
                own: dict[str, str] = {"FLA_CACHE_RESULTS": "0"}
                if task == "cold":
                    folders = ("TRITON_CACHE_DIR", "XDG_CACHE_HOME")
                    own = {name: tempfile.mkdtemp(dir=empty) for name in folders}
                return pool.submit(run_child, task, point, name, until, own)

            self.cold = {point: {name: start("cold", point, name) for name in who} for point in todo if point.cold}
            self.ready: dict[str, dict[Point, Job]] = {name: {} for name in who}
            if device == "cuda":
                kernels = dict.fromkeys(with_same_kernels(point) for point in todo if not point.cold)
                self.ready = {name: {small: start("ready", small, name) for small in kernels} for name in who}

    def serves(self, point: Point, name: str) -> bool:
        """Whether a point can be timed: its kernels are compiled, or compiling them failed.

        A compilation that failed will fail as quickly again, so it doesn't hold up the timing.
        """
        job = self.ready.get(name, {}).get(with_same_kernels(point))
        return job is None or job.exception() is not None or job.result()[1] is not None


def with_same_kernels(point: Point) -> Point:
    """A smaller point that needs the same kernels."""
    return replace(point, B=1, T=min(point.T, 256), graph=False)
