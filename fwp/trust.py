"""Whether to trust the Triton kernels on this GPU: by tests, or by a canary before the first use.

Triton has compiled correct kernels into wrong code on one GPU and not on another. On a pair of GPU and Triton that is
not known to be good, each configuration of the kernels is therefore run once on a small input (`fwp.canary`) before
its first use. What passed is remembered in the user's cache directory. This module decides and remembers; it imports
no backend, so that backends can ask it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwp._torch_private import constant_under_compile, inside_backward
from fwp._version import __version__
from fwp.core import Core, Form, Read, without_autocast

# (architecture, version of Triton) on which all tests passed. None has been measured yet.
KNOWN_GOOD: frozenset[tuple[str, str]] = frozenset()


class KernelCase(NamedTuple):
    """What the compiled kernels of a call depend on.

    All fields are constants, so that a traced call can ask too.
    """

    device: torch.device
    dtype: torch.dtype
    form: Form
    decay: int  # 0: none, 1: one per head, 2: one per key channel
    erase_strength: bool
    erase_key: bool  # whether `a` is given
    wide_erase_key: bool  # in the state's dtype, not in v's
    erase_before_decay: bool
    write_strength: bool
    writes: int  # per read
    read: Read
    denominator: bool
    packed: bool
    gradients: bool
    phi: str | None
    norm: str | None
    scaled: bool
    K: int  # before φ
    V: int
    Hq: int
    Hk: int
    Hv: int
    cut: bool = False  # whether sequences are cut into segments, each of the fewest chunks

    @property
    def name(self) -> str:
        """A file name for the case. It leaves out the device, which the folder names.

        It leaves out the numbers of heads as well, since they change no code.
        """
        switches = [self.form, f"decay{self.decay}", *(name for name in SWITCHES if getattr(self, name)), self.read]
        switches += [f"writes{self.writes}"] if self.writes != 1 else []
        switches += [name for name in (self.phi, self.norm) if name is not None]
        return "-".join([*switches, f"K{self.K}", f"V{self.V}", str(self.dtype).removeprefix("torch.")])


SWITCHES = (
    *("erase_strength", "erase_key", "wide_erase_key", "erase_before_decay", "write_strength"),
    *("denominator", "packed", "gradients", "scaled", "cut"),
)

Canary = Callable[[KernelCase], str | None]
_canary: Canary | None = None


def use_canary(canary: Canary) -> None:
    """Sets the function that runs the kernels of a case on a small input.

    The function returns what is wrong with them, or None. `fwp.functional` sets it, since it may import the backends.
    """
    global _canary
    _canary = canary


def reason_to_distrust(core: Core, form: Form) -> str | None:
    """Why the Triton kernels are not to be trusted with these inputs, in one line. None: they are.

    It works under tracing, vmap and torch.func too, since the canary runs outside of them. No canary can run while a
    CUDA graph is being captured: a case that is not yet known is not trusted then.
    """
    if not runs_on_gpu(core.v):
        return None
    return _verdict(*case_fields(core, form))


def may_cut(core: Core) -> bool:
    """Whether long sequences may be cut into segments.

    It always checks both passes, since a backward cuts as its forward did.
    """
    if not runs_on_gpu(core.v):
        return True
    reason = _verdict(*KernelCase(*case_fields(core, "chunk"))._replace(gradients=True, cut=True))
    if reason is not None:
        message = f"long sequences are not cut into segments, which is slower: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return reason is None


@constant_under_compile
def warn_of_torch(reason: str) -> None:
    """Warns that `backend="auto"` takes torch although there is a GPU."""
    warnings.warn(f"backend: 'auto' takes 'torch', which is many times slower: {reason}", RuntimeWarning, stacklevel=4)


def runs_on_gpu(x: Tensor) -> bool:
    """Whether kernels on x run on a real GPU, not in the interpreter and not on a fake tensor."""
    return x.is_cuda and torch.cuda.is_available()


def case_fields(core: Core, form: Form) -> tuple[Any, ...]:
    """The fields of the `KernelCase` of these inputs, as a plain tuple, which torch.compile can trace."""
    scaled = False
    if core.features.scale != 1.0:  # the branch makes it a constant under torch.compile
        scaled = True
    return (
        core.v.device,
        core.v.dtype,
        form,
        0 if core.g is None else core.g.dim() - 2,
        core.e is not None,
        core.a is not None,
        core.a is not None and core.a.dtype != core.v.dtype,
        core.erase_before_decay,
        core.w is not None,
        index(core.writes),
        core.read,
        core.denominator,
        core.cu_seqlens is not None,
        core.wants_gradients,
        core.features.phi,
        core.features.norm,
        scaled,
        index(core.k.shape[-1]),
        index(core.v.shape[-1]),
        index(core.q.shape[2]),
        index(core.k.shape[2]),
        index(core.v.shape[2]),
    )


@constant_under_compile  # a traced call runs the canary as it is
def _verdict(*fields: Any) -> str | None:
    case = KernelCase(*fields)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing() and case not in _asked:
        return "this use of the kernels was not yet checked on this GPU; call it once before a CUDA graph is captured"
    reason = _ask(case)
    _asked.add(case)
    return reason


_asked: set[KernelCase] = set()


@cache
def _ask(case: KernelCase) -> str | None:
    """Asks the cache directory, then the canary.

    A failure is remembered in this process only, since its cause may be temporary.
    """
    import triton

    gpu, architecture = gpu_and_architecture(case.device)
    if (architecture, triton.__version__) in KNOWN_GOOD:
        return None
    versions = f"triton-{triton.__version__}-torch-{torch.__version__}-fwp-{__version__}"
    passed = cache_folder() / re.sub(r"[^\w.+-]+", "_", f"{gpu}-{architecture}-{versions}") / case.name
    try:
        if passed.exists():
            return None
    except OSError:
        pass
    if _canary is None:
        return "the function that checks the kernels is not set; import fwp.functional"
    fault = _run_outside(_canary, case)
    if fault is not None:
        with_ = f"Triton {triton.__version__} and torch {torch.__version__} on {gpu} ({architecture})"
        return f"the kernels fail a check with {with_}: {fault}"
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError:
        pass  # then the next process asks again
    return None


def _run_outside(canary: Canary, case: KernelCase) -> str | None:
    """Runs the canary where no trace, vmap, autocast or mode of the caller is active."""
    if inside_backward():  # a new thread would wait for this thread's backward to end
        with torch.enable_grad(), without_autocast(torch.empty(0, device=case.device)):
            return canary(case)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(canary, case).result()


def gpu_and_architecture(device: torch.device) -> tuple[str, str]:
    """Name and architecture of a GPU, as ("NVIDIA H100 80GB HBM3", "sm_90")."""
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", None) if torch.version.hip is not None else None
    return properties.name, amd or f"sm_{properties.major}{properties.minor}"


def cache_folder() -> Path:
    """Where fwp remembers which kernels passed, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp"
