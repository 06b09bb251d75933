"""Whether the Triton kernels are right on this GPU: known from tests, or found out by a canary at the first use.

Triton has compiled right kernels into wrong code, for one GPU and not for another. So on a pair of GPU and Triton that
isn't known to be good, the first use of a kernel's configuration runs it on a small input, forward and, if gradients
are needed, backward, against the torch backend in float64. What passed is remembered in the user's cache directory.
The kernels that cut long sequences into segments are asked for where one is to be cut; in doubt it stays whole.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp.core import Core, Features, Form, state_dtype, without_autocast
from fwp.feature_maps import applied
from fwp.measure import rounded_products, row_error

# (architecture, version of Triton) on which all tests passed. None has been measured yet.
KNOWN_GOOD: frozenset[tuple[str, str]] = frozenset()

T = 131  # tokens of a canary: two chunks of 64 at most, and a piece; of a sequence that is cut, two segments at least


class Case(NamedTuple):
    """What the compiled kernels of a call depend on; constants, so that a traced call can ask too."""

    device: torch.device
    dtype: torch.dtype
    form: Form
    decay: int  # 0 none, 1 one a head, 2 one a key channel
    erase: bool
    write: bool
    read: Any
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
    cut: bool = False  # into segments of the fewest chunks

    @property
    def name(self) -> str:
        """As a file: all but the device, which the folder says, and the heads, which change no code within them."""
        switches = [self.form, f"decay{self.decay}", *(n for n in SWITCHES if getattr(self, n)), self.read]
        switches += [name for name in (self.phi, self.norm) if name is not None]
        return "-".join([*switches, f"K{self.K}", f"V{self.V}", str(self.dtype).removeprefix("torch.")])


SWITCHES = ("erase", "write", "denominator", "packed", "gradients", "scaled", "cut")


def doubt(core: Core, form: Form) -> str | None:
    """Why the Triton kernels are not to be trusted with these inputs, in one line; None: they are.

    Under tracing, vmap and torch.func too: the canary runs outside of them. While a CUDA graph is being captured it
    can't, and what is not known by then is doubtful.
    """
    if not runs_on_gpu(core.v):
        return None
    return _verdict(*constants(core, form))


def may_cut(core: Core) -> bool:
    """Whether sequences may be cut into segments, forward and backward alike, since a backward cuts as its forward."""
    if not runs_on_gpu(core.v):
        return True
    reason = _verdict(*Case(*constants(core, "chunk"))._replace(gradients=True, cut=True))
    if reason is not None:
        warnings.warn(f"long sequences are not cut into segments, slower: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def warn(reason: str) -> None:
    """That `auto` takes torch."""
    warnings.warn(f"backend: 'auto' takes 'torch', many times slower: {reason}", RuntimeWarning, stacklevel=4)


def runs_on_gpu(x: Tensor) -> bool:
    """Not in the interpreter, nor for what merely pretends to be on a GPU."""
    return x.is_cuda and torch.cuda.is_available()


def constants(core: Core, form: Form) -> tuple[Any, ...]:
    """The fields of the inputs' `Case`; torch.compile takes a plain tuple."""
    scaled = False
    if core.features.scale != 1.0:  # a branch makes a constant of what is traced
        scaled = True
    return (
        core.v.device,
        core.v.dtype,
        form,
        0 if core.g is None else core.g.dim() - 2,
        core.e is not None,
        core.w is not None,
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


def _verdict(*constants: Any) -> str | None:
    case = Case(*constants)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing() and case not in _asked:
        return "this use of the kernels was not yet checked on this GPU; call it once before a CUDA graph is captured"
    reason = _ask(case)
    _asked.add(case)
    return reason


# Traced calls run these as they are, all that torch.compiler.assume_constant_result does.
_verdict._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]

_asked: set[Case] = set()


@cache
def _ask(case: Case) -> str | None:
    """A failure is not remembered beyond this process: what caused it may be gone."""
    import triton

    from fwp import __version__

    gpu, architecture = describe(case.device)
    if (architecture, triton.__version__) in KNOWN_GOOD:
        return None
    pair = f"{gpu}-{architecture}-triton-{triton.__version__}-torch-{torch.__version__}-fwp-{__version__}"
    passed = cache_folder() / re.sub(r"[^\w.+-]+", "_", pair) / case.name
    try:
        if passed.exists():
            return None
    except OSError:
        pass
    if torch._C._current_graph_task_id() >= 0:  # in a backward, for whose thread the canary's would wait
        with torch.enable_grad(), without_autocast(torch.empty(0, device=case.device)):
            wrong = canary(case)
    else:
        with ThreadPoolExecutor(1) as thread:  # of its own: no trace, vmap, autocast or mode of the caller's is there
            wrong = thread.submit(canary, case).result()
    if wrong is not None:
        versions = f"Triton {triton.__version__} and torch {torch.__version__} on {gpu} ({architecture})"
        return f"the kernels fail a check with {versions}: {wrong}"
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError:
        pass  # then the next process asks again
    return None


def describe(device: torch.device) -> tuple[str, str]:
    """Name and architecture of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    amd = getattr(properties, "gcnArchName", None) if torch.version.hip is not None else None
    return properties.name, amd or f"sm_{properties.major}{properties.minor}"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp"


def canary(case: Case) -> str | None:
    """What is wrong with the kernels on a small input; None: nothing.

    Each result may be off by 4 times what float32 with rounded products is, or by half the digits of the dtype.
    """
    from fwp.backends import torch as exact
    from fwp.backends import triton as kernels

    core = small(case)
    try:
        found = _results(kernels, core, case.form, case.gradients, None, int(case.cut))
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    truth = _results(exact, _on_cpu(core, torch.float64), "chunk", case.gradients)
    with rounded_products(case.dtype):
        rough = _results(exact, _on_cpu(core, state_dtype(case.dtype)), "chunk", case.gradients)
    half_the_digits = math.sqrt(torch.finfo(case.dtype).eps)
    for name, x in truth.items():
        off = row_error(found[name], x)
        if not off <= max(half_the_digits, 4 * row_error(rough[name], x)):
            return f"{name} is off by {off:.1g} in {case.name}"
    return None


def small(case: Case) -> Core:
    """Random inputs of a case: keys of unit length, gates that let a state live through some chunks."""
    H, N = max(case.Hk, case.Hv), 3 if case.packed else 1
    length = T * (2 if case.cut and case.packed else 1)
    generator = torch.Generator().manual_seed(0)
    kept, features = state_dtype(case.dtype), Features(case.phi, case.norm, 0.5 if case.scaled else 1.0)
    width = features.width(case.K)

    def normal(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator)
        return x.abs() + 0.1 if case.denominator else x  # then no zᵀq is near 0

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).to(case.device, kept)

    core = Core(
        normal(1, length, case.Hq, case.K).to(case.device, case.dtype),
        F.normalize(normal(1, length, case.Hk, case.K), dim=-1).to(case.device, case.dtype),
        normal(1, length, case.Hv, case.V).to(case.device, case.dtype),
        g=-0.05 * uniform(1, length, H, *[width] * (case.decay - 1)) if case.decay else None,
        e=uniform(1, length, H) if case.erase else None,
        w=uniform(1, length, H) if case.write else None,
        S=normal(N, H, width, case.V).to(case.device, kept),
        z=uniform(N, H, width) + 1 if case.denominator else None,
        cu_seqlens=torch.tensor([0, length // 2, length // 2, length], device=case.device) if case.packed else None,
        read=case.read,
        denominator=case.denominator,
        features=features,
    )
    if core.e is None:
        return core
    longest = applied(core).k.to(kept).square().sum(-1).amax().clamp(min=1)
    return replace(core, e=core.e / longest)  # else the state blows up


def _each(core: Core, fn: Callable[[Tensor], Tensor]) -> Core:
    tensors: dict[str, Any] = {name: fn(x) for name, x in vars(core).items() if isinstance(x, Tensor)}
    return replace(core, **tensors)


def _on_cpu(core: Core, dtype: torch.dtype) -> Core:
    return _each(core, lambda x: x.to("cpu", dtype if x.is_floating_point() else x.dtype))


def _results(backend: Any, core: Core, form: Form, gradients: bool, *sizes: int | None) -> dict[str, Tensor]:
    """Output, state and, if wanted, the gradients of a weighed sum of both. sizes: of chunk and segment."""
    core = _each(core, lambda x: x.detach().requires_grad_(gradients and x.is_floating_point()))
    out, state = backend.run(core, form, *sizes)
    results = {"o": out, "S": state.S} | ({} if state.z is None else {"z": state.z})
    if not gradients:
        return results
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in results.values()]
    leaves = {name: x for name, x in vars(core).items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(list(results.values()), list(leaves.values()), weights)
    return {name: x.detach() for name, x in results.items()} | {f"d{name}": x for name, x in zip(leaves, grads)}
