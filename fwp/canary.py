"""A small run of the Triton kernels, forward and backward, against the torch backend in float64.

It runs in a process of its own, since an illegal memory access makes the GPU unusable for its process.
`fault_of_kernels` asks that process, which `serve` runs.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp import trust
from fwp.core import Core, Features, State, state_dtype, to_heads
from fwp.feature_maps import applied
from fwp.measure import rounded_products, row_error
from fwp.trust import KernelCase, specialisation

# Least sequence length: two chunks of 64 and a remainder, and at least two segments where sequences are cut.
T = 131
PROGRAMS = 2048  # of each kernel: some wrong code showed from 1,000 programs on
STATE_NUMBERS = 2**25  # most numbers of all states, where a backward keeps states for each chunk
FORWARD_NUMBERS = 2**28  # the same without a backward: so many sequences of the widest states have enough chunks
DISTINCT = 2  # sequences of which all others are copies
REPEATS = 3
TIMEOUT = 600.0  # seconds per case, with compilation
WORKER = "from fwp.canary import serve; serve()"


# ---- the process ----


class _Worker:
    """A process that runs canaries. It is started by its first question, and anew where it died."""

    def __init__(self) -> None:
        self.lock, self.owner = threading.Lock(), os.getpid()
        self.process: subprocess.Popen[bytes] | None = None
        self.answers: dict[Any, str | None] = {}

    def ask(self, question: Any) -> str | None:
        """What is wrong, or None. Threads that ask the same get one answer."""
        with self.lock:
            if question not in self.answers:
                self.answers[question] = self._answer(question)
            return self.answers[question]

    def _answer(self, question: Any) -> str | None:
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        process, late = self.process, threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIMEOUT, end)
        timer.daemon = True
        timer.start()
        answer = None
        try:
            assert process.stdin is not None and process.stdout is not None
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
            return answer[0]
        except (EOFError, OSError, pickle.UnpicklingError):
            process.kill()
            why = f"took more than {TIMEOUT:g} s" if late.is_set() else f"died with status {process.wait()}"
            return f"the process of the check {why}"
        finally:
            timer.cancel()
            if answer != (None,):  # a fault may leave its GPU unusable, and after a stop it still has an answer to give
                self.stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise RuntimeError("the check needs a process of its own, and sys.executable names no Python")
        path = os.pathsep.join(x or os.getcwd() for x in sys.path)
        environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", WORKER]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=null)

    def stop(self) -> None:
        """Ends the process, which may have ended. A fork leaves its parent's process alone."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was not yet written to a dead process
                pipe.close()  # type: ignore[union-attr]


_worker = _Worker()
atexit.register(lambda: _worker.stop())


def fault_of_kernels(case: KernelCase, warps: int | None = None) -> str | None:
    """One line that says what is wrong with the kernels of this case, with at most so many warps, or None."""
    global _worker
    if _worker.owner != os.getpid():  # after a fork
        _worker = _Worker()
    try:
        return _worker.ask((case, warps, T, PROGRAMS))
    except (RuntimeError, OSError) as error:
        return str(error).partition("\n")[0]


def serve() -> None:
    """Answers questions on stdin until it ends. What others print goes to stderr."""
    global T, PROGRAMS
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            case, trust.forced_warps, T, PROGRAMS = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        fault = check(case)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the caller needs the memory while this process waits
        pickle.dump((fault,), answers)
        answers.flush()


# ---- the check ----


def check(case: KernelCase) -> str | None:
    """One line that says what is wrong with the kernels of this case, or None.

    Each result may be off by 4 times the error of float32 with rounded products, or by half the digits of the dtype.
    All copies of a sequence must have the same bits, and all repeats too.
    """
    from fwp.backends import chunked
    from fwp.backends import triton as kernels

    exact = partial(chunked.run, form="chunk")
    few = small_inputs(case)
    if case.layout:  # a missing state is compiled otherwise
        missing: dict[str, Any] = {name: None for name in "Sz" if f".{name}" not in case.layout}
        few = replace(few, **missing)
    run = partial(kernels.run, form=case.form, segment=int(case.cut))
    truth = _results(exact, _on_cpu(few, torch.float64), case.gradients)
    with rounded_products(case.dtype):
        rough = _results(exact, _on_cpu(few, state_dtype(case.dtype)), case.gradients)
    half_the_digits = math.sqrt(torch.finfo(case.dtype).eps)
    bounds = {name: max(half_the_digits, 4 * row_error(rough[name], x)) for name, x in truth.items()}
    for times, gradients in runs(case):
        try:
            core = in_layout(copied(few, times), case.layout)
            found = _results(run, core, gradients, times)
            for _ in range(REPEATS - 1):
                for name, x in _results(run, core, gradients, times).items():
                    if not _same_bits(x, found[name]):
                        return f"{name} differs between two runs of {case.name}"
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        for name, x in found.items():
            axis = 1 if case.packed and name.removeprefix("d") not in "Sz" else 0
            parts = x.unflatten(axis, (times, -1)).movedim(axis, 0)
            off = row_error(parts[0].contiguous(), truth[name])
            if not off <= bounds[name]:
                return f"{name} is off by {off:.1g} in {case.name}"
            if not _same_bits(parts, parts[:1].expand_as(parts)):
                return f"{name} differs between copies of a sequence in {case.name}"
    return None


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0))


def runs(case: KernelCase) -> list[tuple[int, bool]]:
    """How often the distinct sequences are repeated in each run of a check, and whether the run has a backward.

    In one of the runs each kernel has PROGRAMS programs. The widest states need a second run for that, of the forward.
    """
    numbers = max(case.Hk, case.Hv) * Features(case.phi, case.norm).width(case.K) * case.V
    wanted = -(-PROGRAMS // min(case.Hq, case.Hk, case.Hv))

    def times(most: int) -> int:
        return max(1, -(-min(most // numbers, wanted) // DISTINCT))

    few, many = times(STATE_NUMBERS), times(FORWARD_NUMBERS)
    return [(few, case.gradients)] + ([(many, False)] if many > few else [])


def copied(core: Core, times: int) -> Core:
    """The sequences of a core, so many times."""
    packed = core.cu_seqlens is not None
    found: dict[str, Any] = {}
    for name in trust.TENSORS[:9]:
        x = getattr(core, name)
        if x is not None:
            found[name] = torch.cat([x] * times, 1 if packed and name not in "Sz" else 0)
    if core.cu_seqlens is not None:
        end = core.q.shape[1]
        starts = end * torch.arange(times, device=core.q.device).unsqueeze(1)
        starts = (core.cu_seqlens[:-1] + starts).flatten()
        found["cu_seqlens"] = torch.cat([starts, starts.new_full((1,), end * times)])
    return replace(core, **found)


def in_layout(core: Core, layout: str) -> Core:
    """The core with tensors that Triton specialises as `trust.layout_of` says."""
    parts = [part for part in layout.split(".")[1:] if part]
    found: dict[str, Any] = {}
    for part in parts:
        name = next(name for name in reversed(trust.TENSORS) if part.startswith(name))
        pointer, *wanted = list(part.removeprefix(name))
        found[name] = _laid_out(getattr(core, name), pointer, wanted)
    return replace(core, **found)


def _laid_out(x: Tensor, pointer: str, wanted: list[str]) -> Tensor:
    """x with a pointer and first strides of these specialisations, where its sizes allow them."""
    strides, extent = list(x.stride()), math.prod(x.shape[3:]) if len(wanted) == 3 else 1
    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i] != "1", -i)):
        if wanted[i] == "1" and (extent == 1 or x.shape[i] == 1):
            strides[i] = 1
        else:
            strides[i] = next(n for n in range(max(2, extent), extent + 34) if specialisation(n) in (wanted[i], "1"))
        extent = max(extent, strides[i] * x.shape[i])
    if not wanted:
        extent = x.numel()
    memory = x.new_empty(extent + 1)[int(pointer == "n") :]
    return memory.as_strided(x.shape, strides, memory.storage_offset()).copy_(x)


def small_inputs(case: KernelCase) -> Core:
    """Random inputs of a case: keys of unit length, and gates under which a state survives several chunks."""
    H, N, B = max(case.Hk, case.Hv), 3 if case.packed else DISTINCT, 1 if case.packed else DISTINCT
    length = case.layout.partition(".")[0]
    reads = T * (2 if case.cut and case.packed else 1)
    if length == "step":
        reads = 2 if case.packed else 1
    elif length:
        reads = next(n for n in range(reads, reads + 32) if gcd(n, 16) == int(length[1:]))
    writes = reads * case.writes
    generator = torch.Generator().manual_seed(0)
    kept, features = state_dtype(case.dtype), Features(case.phi, case.norm, 0.5 if case.scaled else 1.0)
    width = features.width(case.K)

    def normal(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator)
        return x.abs() + 0.1 if case.denominator else x  # then no zᵀq is near 0

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).to(case.device, kept)

    core = Core(
        normal(B, reads, case.Hq, case.K).to(case.device, case.dtype),
        F.normalize(normal(B, writes, case.Hk, case.K), dim=-1).to(case.device, case.dtype),
        normal(B, writes, case.Hv, case.V).to(case.device, case.dtype),
        g=-0.05 * uniform(B, writes, H, *[width] * (case.decay - 1)) if case.decay else None,
        e=uniform(B, writes, H) if case.erase_strength else None,
        w=uniform(B, writes, H) if case.write_strength else None,
        S=normal(N, H, width, case.V).to(case.device, kept),
        z=uniform(N, H, width) + 1 if case.denominator else None,
        cu_seqlens=torch.tensor([0, reads // 2, reads // 2, reads], device=case.device) if case.packed else None,
        read=case.read,
        denominator=case.denominator,
        features=features,
        writes=case.writes,
        erase_before_decay=case.erase_before_decay,
    )
    if core.e is None and not case.erase_key:
        return core
    # A step must not remove more than it finds, else the state blows up.
    keys = to_heads(applied(core).k, H).to(kept)
    longest = keys.square().sum(-1).amax().clamp(min=1)
    if core.e is not None and not case.erase_key:
        return replace(core, e=core.e / longest)
    noise = F.normalize(torch.randn(keys.shape, generator=generator), dim=-1).to(keys)
    near = keys + 0.5 * keys.norm(dim=-1, keepdim=True) * noise  # an erase key far from the key removes nothing
    return replace(core, a=(near / longest).to(kept if case.wide_erase_key else case.dtype))


def _each_tensor(core: Core, fn: Callable[[Tensor], Tensor]) -> Core:
    tensors: dict[str, Any] = {name: fn(x) for name, x in vars(core).items() if isinstance(x, Tensor)}
    return replace(core, **tensors)


def _on_cpu(core: Core, dtype: torch.dtype) -> Core:
    return _each_tensor(core, lambda x: x.to("cpu", dtype if x.is_floating_point() else x.dtype))


def _results(
    run: Callable[[Core], tuple[Tensor, State]], core: Core, gradients: bool, times: int = 1
) -> dict[str, Tensor]:
    """Output, state and, if wanted, the gradients of a weighted sum of both."""
    core = _each_tensor(core, lambda x: x.detach().requires_grad_(gradients and x.is_floating_point()))
    out, state = run(core)
    results = {"o": out, "S": state.S} | ({} if state.z is None else {"z": state.z})
    if not gradients:
        return results
    generator, weights = torch.Generator().manual_seed(1), []
    for name, x in results.items():  # each copy of a sequence has the same
        axis = 1 if core.cu_seqlens is not None and name == "o" else 0
        size = [n // times if i == axis else n for i, n in enumerate(x.shape)]
        weights.append(torch.cat([torch.randn(size, generator=generator).bfloat16().to(x)] * times, axis))
    leaves = {name: x for name, x in vars(core).items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), weights)
    return {name: x.detach() for name, x in results.items()} | {f"d{name}": x for name, x in zip(leaves, grads)}
