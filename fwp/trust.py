"""Whether to trust the Triton kernels on this GPU: by tests, or by a canary before the first use.

Triton has compiled correct kernels into wrong code on one GPU and not on another. On a pair of GPU and Triton that is
not known to be good, each configuration of the kernels is therefore run once on a small input (`fwp.canary`) before
its first use, in a process of its own, whose crash leaves the caller's GPU context alone. What passed is remembered in
the user's cache directory. This module decides and remembers; it imports no backend, so that backends can ask it.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from functools import cache
from math import gcd
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwp._torch_private import constant_under_compile, inside_transform
from fwp._version import __version__
from fwp.core import Core, Form, Read

# (architecture, version of Triton) on which all tests passed. None has been measured yet.
KNOWN_GOOD: frozenset[tuple[str, str]] = frozenset()


TENSORS = ("q", "k", "v", "g", "a", "e", "w", "S", "z", "cu_seqlens")
ALIGNED = ""  # the layout of contiguous tensors in new memory, and of traced ones, whose memory is not known


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
    layout: str = ALIGNED  # what Triton specialises on, see `layout_of`
    cut: bool = False  # whether sequences are cut into segments, each of the fewest chunks

    @property
    def name(self) -> str:
        """A file name for the case. It leaves out the device, which the folder names."""
        switches = [self.form, f"decay{self.decay}", *(name for name in SWITCHES if getattr(self, name)), self.read]
        switches += [f"writes{self.writes}"] if self.writes != 1 else []
        switches += [name for name in (self.phi, self.norm) if name is not None]
        switches += [f"{name}{getattr(self, name)}" for name in ("K", "V", "Hq", "Hk", "Hv")]
        return "-".join([*switches, str(self.dtype).removeprefix("torch."), self.layout or "aligned"])


SWITCHES = (
    *("erase_strength", "erase_key", "wide_erase_key", "erase_before_decay", "write_strength"),
    *("denominator", "packed", "gradients", "scaled", "cut"),
)

Canary = Callable[[KernelCase, int | None], str | None]
_canary: Canary | None = None


def use_canary(canary: Canary) -> None:
    """Sets the function that runs the kernels of a case on a small input.

    The function takes the most warps per program, None for the tuned ones. It returns what is wrong, or None.
    `fwp.functional` sets it, since it may import the backends.
    """
    global _canary
    _canary = canary


def reason_to_distrust(core: Core, form: Form) -> str | None:
    """Why the Triton kernels are not to be trusted with these inputs, in one line. None: they are.

    It works under tracing, vmap and torch.func too, since another process runs the canary. While a CUDA graph is
    captured, only kernels that passed before are trusted.
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
        layout_of(core),
    )


def specialisation(n: int) -> str:
    """How Triton compiles an integer: as the constant 1, as a multiple of 16 ("d"), or as any number ("n")."""
    return "1" if n == 1 else "n" if n % 16 else "d"


def layout_of(core: Core) -> str:
    """The specialisation of each given tensor's pointer, and of its strides where kernels take them.

    It begins with the power of 2 in T, on which strides of outputs and of buffers depend.
    """
    if torch.compiler.is_compiling() or inside_transform():
        return ALIGNED
    T = core.q.shape[1]
    parts = ["step" if T == 1 else f"T{gcd(T, 16)}"]
    for name in TENSORS:
        x = getattr(core, name)
        if x is None:
            continue
        strides = ()
        if name in TENSORS[:7]:
            x = x.contiguous() if x.dim() == 4 and x.shape[3] > 1 and x.stride(3) != 1 else x
            strides = x.stride()[:3] if core.cu_seqlens is None else (0, *x.stride()[1:3])
        elif not x.is_contiguous():  # the launch layer copies it
            parts.append(name + "d")
            continue
        parts.append(name + ("n" if x.data_ptr() % 16 else "d") + "".join(map(specialisation, strides)))
    return ".".join(parts)


@constant_under_compile  # a traced call runs the canary as it is
def _verdict(*fields: Any) -> str | None:
    try:
        return _ask(KernelCase(*fields))
    except _Capturing:
        return "a CUDA graph is being captured before these kernels were checked; make the same call once before"


class _Capturing(Exception):
    """Raised where a canary would have to run. So `_ask` does not remember it."""


def capturing() -> bool:
    """Whether a CUDA graph is being captured. A canary would be compiled and run in the middle of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_warps: dict[KernelCase, int] = {}  # the most warps with which a case passed, if fewer than tuned


forced_warps: int | None = None  # what the process of a canary tries


def most_warps(core: Callable[[], Core]) -> int | None:
    """The most warps per program of these kernels, None: as tuned. A backward takes what its forward found."""
    if forced_warps is not None or not _warps:
        return forced_warps
    return _warps.get(_family(KernelCase(*case_fields(core(), "chunk"))))


def _family(case: KernelCase) -> KernelCase:
    """The case without what a backward does not know of its forward."""
    return case._replace(form="chunk", gradients=True, cut=False, layout=ALIGNED)


@cache
def _ask(case: KernelCase) -> str | None:
    """Asks the cache directory, then the canary with the tuned number of warps and with fewer.

    A failure is remembered in this process only, since its cause may be temporary.
    """
    import triton

    gpu, architecture = gpu_and_architecture(case.device)
    if (architecture, triton.__version__) in KNOWN_GOOD:
        return None
    versions = f"triton-{triton.__version__}-torch-{torch.__version__}-fwp-{__version__}{_measured_tiles()}"
    passed = cache_folder() / re.sub(r"[^\w.+-]+", "_", f"{gpu}-{architecture}-{versions}") / case.name
    try:
        _limit(case, int(passed.read_text() or 0))
        return None
    except (OSError, ValueError):
        pass
    if capturing():
        raise _Capturing
    if _canary is None:
        return "the function that checks the kernels is not set; import fwp.functional"
    fault = None
    for warps in (None, 4, 2, 1):
        found = _canary(case, warps)
        if found is None:
            break
        fault = fault or found
    else:
        with_ = f"Triton {triton.__version__} and torch {torch.__version__} on {gpu} ({architecture})"
        return f"the kernels fail a check with {with_}: {fault}"
    _limit(case, warps or 0)
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(str(warps or ""))
    except OSError:
        pass  # then the next process asks again
    return None


def _limit(case: KernelCase, warps: int) -> None:
    if warps:
        _warps[_family(case)] = min(warps, _warps.get(_family(case), warps))


def _measured_tiles() -> str:
    """What names the block sizes measured on this machine, which take the place of those of the package."""
    try:
        return "-tiles-" + hashlib.sha256((cache_folder() / "tiles.csv").read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def gpu_and_architecture(device: torch.device) -> tuple[str, str]:
    """Name and architecture of a GPU, as ("NVIDIA H100 80GB HBM3", "sm_90")."""
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", None) if torch.version.hip is not None else None
    return properties.name, amd or f"sm_{properties.major}{properties.minor}"


def cache_folder() -> Path:
    """Where fwp remembers which kernels passed, below $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp"
