"""Worker processes that compute side by side, with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

import torch

# By default glibc returns the pages of every large tensor to the operating system and takes new ones at the next step.
# That costs a third of a run's time.
WORKER = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def start_worker() -> None:
    """Prepares a worker: it computes with one thread, and it ends when its parent ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def for_workers() -> Iterator[None]:
    """A context in which to start workers. They get the variables above and leave Ctrl-C to this process.

    A variable that is already set keeps its value. At the end the environment of this process is restored.
    """
    ours = {name: value for name, value in WORKER.items() if name not in os.environ}
    os.environ.update(ours)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        for name in ours:
            os.environ.pop(name, None)
