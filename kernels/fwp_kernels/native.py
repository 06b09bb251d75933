"""The C++ kernels of `native.cpp`: building them for this processor, and calling them on CPU tensors.

A library serves one pair of widths, K and V rounded up, and one kind of decay and of erasure. It is compiled when first
asked for, which takes some seconds, and kept in a folder of the user's cache. Nothing here needs PyTorch's headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
WIDTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # to which K and V are rounded up


class BuildError(RuntimeError):
    """The kernels can't be compiled here; the message says why in one line."""


# ---- building ----


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, the system's, or Clang from the package ziglang; None: there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    for name in ("g++", "clang++", "c++"):
        if found := shutil.which(name):
            return [found]
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else None


def target(portable: bool = False) -> list[str]:
    """The flags for this processor, or for any of the last ten years or so."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    if portable:
        return [] if arm else ["-march=x86-64-v3"]
    return ["-mcpu=native"] if arm else ["-march=native"]


@cache
def processor() -> str:
    """What decides which instructions a native library may hold."""
    described = [platform.system(), platform.machine(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        described += sorted(
            {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
        )
    return "\n".join(described)


def folder() -> Path:
    """Where libraries are kept: $FWP_CACHE, else fwp in the user's cache, else in the temporary folder."""
    if given := os.environ.get("FWP_CACHE"):
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fwp"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"fwp-{os.getuid() if hasattr(os, 'getuid') else platform.node()}"


SEGMENT = 128  # tokens between two states that are kept for the backward pass


def chunk_of(decay: int) -> int:
    """Tokens of a chunk, as in `native.cpp`."""
    return 16 if decay == 2 else 32


class Kind(NamedTuple):
    """What a library is compiled for."""

    KP: int  # K and V rounded up to one of WIDTHS
    VP: int
    decay: int  # 0 none, 1 per head, 2 per key channel
    erase: int  # 0 nothing, 1 along k, 2 along an erase key


def rounded(features: int) -> int:
    """The width of a library for so many features, at most the last of WIDTHS."""
    return next(width for width in WIDTHS if features <= width)


def path_of(kind: Kind) -> Path:
    """The file of a library for this source and this processor."""
    command = " ".join([*(compiler() or ["none"]), *FLAGS, *target()])
    name = hashlib.sha256("\0".join([SOURCE.read_text("utf-8"), command, processor()]).encode()).hexdigest()[:16]
    return folder() / f"native-{name}-{'-'.join(map(str, kind))}.so"


def build(kind: Kind) -> Path:
    """The library of that kind, compiled if it isn't there yet. One process compiles and the others wait."""
    path = path_of(kind)
    if path.exists():
        return path
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found; install g++ or clang++, or `pip install ziglang`")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not path.exists():
                print(f"fwp: compiling a CPU kernel, once: {kind}", file=sys.stderr, flush=True)
                made = path.with_suffix(f".{os.getpid()}")
                sizes = (f"-D{name}={value}" for name, value in zip(("KEYS", "VALUES", "DECAY_OF", "ERASE_OF"), kind))
                done = subprocess.run(
                    [*command, *FLAGS, *target(), *sizes, str(SOURCE), "-o", str(made)], capture_output=True, text=True
                )
                if done.returncode:
                    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
                    raise BuildError(f"{command[0]} can't compile the CPU kernels: {said}")
                os.replace(made, path)  # whoever looks sees a whole file or none
    except OSError as error:
        raise BuildError(f"the CPU kernels can't be kept in {path.parent}: {error}") from error
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process is inside, where the system has such locks."""
    with open(path, "w", encoding="utf-8") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- calling ----


class _Rows(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("batch", "time", "head", "inner", "share")),
    ]


_LONGS = ("sequences", "heads", "queries", "keys", "values", "read_before", "erase_before")
_ORDER = ("every", "part", "parts")
_BORDERS = ("first", "length", "chunk", "segment")
_INPUTS, _GRADIENTS = ("q", "k", "v", "a", "e", "w", "g", "o"), ("dq", "dk", "dv", "da", "de", "dw", "dg", "dout")


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in (*_LONGS, *_ORDER)),
        *((name, ctypes.c_void_p) for name in _BORDERS),
        *((name, _Rows) for name in _INPUTS),
        *((name, ctypes.c_void_p) for name in ("S", "end", "kept", "xs")),
        *((name, _Rows) for name in _GRADIENTS),
        *((name, ctypes.c_void_p) for name in ("dend", "dS")),
    ]


@cache
def library(kind: Kind) -> ctypes.CDLL:
    """The loaded library of that kind. BuildError where it can't be built."""
    found = ctypes.CDLL(str(build(kind)))
    found.fwp_run.argtypes = [ctypes.c_long, ctypes.POINTER(_Problem)]
    found.fwp_run.restype = None
    found.fwp_size.restype = found.fwp_chunk.restype = ctypes.c_long
    assert (found.fwp_size(), found.fwp_chunk()) == (ctypes.sizeof(_Problem), chunk_of(kind.decay))
    return found


@cache
def unbuilt(kind: Kind) -> str | None:
    """Why there is no library of that kind and none can be made, in one line; None: it is there."""
    try:
        library(kind)
    except BuildError as error:
        return str(error)
    return None


@dataclass(frozen=True, eq=False)
class Problem:
    """The inputs of `fwp.core.Core` in its letters, n = writes, without feature map and denominator. All float32."""

    q: Tensor  # [B, T, Hq, K]
    k: Tensor  # [B, n·T, Hk, K]
    v: Tensor  # [B, n·T, Hv, V]
    g: Tensor | None = None  # [B, n·T, H] or [B, n·T, H, K]
    a: Tensor | None = None  # [B, n·T, H, K]
    e: Tensor | None = None  # [B, n·T, H]
    w: Tensor | None = None  # [B, n·T, H]
    S: Tensor | None = None  # [N, H, K, V]
    cu_seqlens: Tensor | None = None  # [N + 1], in tokens of q
    read_before: bool = False
    writes: int = 1
    erase_before_decay: bool = False

    @property
    def H(self) -> int:
        """State heads."""
        return max(self.k.shape[2], self.v.shape[2])

    @property
    def readers(self) -> int:
        """Heads of the output."""
        return max(self.q.shape[2], self.H)

    @property
    def N(self) -> int:
        """Sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def decay(self) -> int:
        """0 none, 1 per head, 2 per key channel."""
        return 0 if self.g is None else self.g.dim() - 2

    @property
    def erase(self) -> int:
        """0 nothing, 1 along k, 2 along an erase key."""
        return 2 if self.a is not None else 1 if self.e is not None else 0

    @property
    def kind(self) -> Kind:
        """The library that serves it."""
        return Kind(rounded(self.q.shape[3]), rounded(self.v.shape[3]), self.decay, self.erase)

    def one_read_per_write(self) -> Problem:
        """The same with a query for each write: zeros where nobody reads."""
        if self.writes == 1:
            return self
        B, T, Hq, K = self.q.shape
        q = self.q.new_zeros(B, T, self.writes, Hq, K)
        q[:, :, 0 if self.read_before else -1] = self.q
        borders = None if self.cu_seqlens is None else self.cu_seqlens * self.writes
        return replace(self, q=q.flatten(1, 2), writes=1, cu_seqlens=borders)

    def of_reads(self, x: Tensor) -> Tensor:
        """The tokens of x [B, n·T, …] that belong to queries, [B, T, …]."""
        return x if self.writes == 1 else x[:, (0 if self.read_before else self.writes - 1) :: self.writes].contiguous()


class _Call:
    """One call of a library: the structure that it gets, and the tensors to which that points."""

    def __init__(self, p: Problem) -> None:
        K, V = p.q.shape[3], p.v.shape[3]
        self.p, self.library = p, library(p.kind)
        C = chunk_of(p.decay)
        every = SEGMENT // C
        B, T = p.q.shape[:2]
        if p.cu_seqlens is None:
            first, length = torch.zeros(B, dtype=torch.int64), torch.full((B,), T, dtype=torch.int64)
        else:
            first, length = p.cu_seqlens[:-1].long(), p.cu_seqlens.diff().long()
        chunks = (length + C - 1) // C
        segments = (chunks + every - 1) // every
        self.tensors = [first, length, chunks.cumsum(0) - chunks, segments.cumsum(0) - segments]
        self.raw = _Problem(
            sequences=p.N,
            heads=p.H,
            queries=max(p.q.shape[2] // p.H, 1),
            keys=K,
            values=V,
            read_before=p.read_before,
            erase_before=p.erase_before_decay,
            every=every,
        )
        for name, x in zip(_BORDERS, self.tensors):
            setattr(self.raw, name, x.data_ptr())
        for name in _INPUTS[:-1]:
            self.rows(name, getattr(p, name))
        self.plain("S", None if p.S is None else p.S.contiguous())

    def rows(self, name: str, x: Tensor | None) -> None:
        """A field that is a tensor [B, T, heads, …]."""
        if x is None or x.numel() == 0:
            return
        if x.dim() == 4 and x.stride(3) not in ((0, 1) if name == "dout" else (1,)) and x.shape[3] > 1:
            x = x.contiguous()
        self.tensors.append(x)
        inner = x.stride(3) if x.dim() == 4 and x.shape[3] > 1 else 1
        batch = 0 if self.p.cu_seqlens is not None else x.stride(0)
        share = max(self.p.H // x.shape[2], 1)
        setattr(self.raw, name, _Rows(x.data_ptr(), batch, x.stride(1), x.stride(2), inner, share))

    def plain(self, name: str, x: Tensor | None) -> None:
        """A field that is a contiguous tensor."""
        if x is not None:
            self.tensors.append(x)
            setattr(self.raw, name, x.data_ptr())

    def run(self, what: int) -> None:
        """Runs the units of work on as many threads as torch uses."""
        p = self.p
        units = p.N * -(-p.H // 4)
        work = p.q.shape[0] * p.q.shape[1] * p.H * p.q.shape[3] * p.v.shape[3]
        parts = max(min(torch.get_num_threads(), units), 1) if work > 2**18 else 1
        problems = []
        for part in range(parts):
            one = _Problem.from_buffer_copy(self.raw)
            one.part, one.parts = part, parts
            problems.append(one)
        others = [_threads().submit(self.library.fwp_run, what, one) for one in problems[1:]]
        self.library.fwp_run(what, problems[0])
        for other in others:
            other.result()


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    """Threads that wait inside the kernels, where Python's lock is released. They start when first needed."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, "fwp")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # a forked child has none of its parent's threads


def kept_shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what `forward` keeps: S before each segment, and X of each chunk.

    Each packed sequence takes at most one chunk and one segment more than its share of the tokens.
    """
    p, T = problem, problem.writes * problem.q.shape[1]
    C = chunk_of(p.decay)
    KP, VP, *_ = p.kind
    if p.cu_seqlens is None:
        segments, chunks = p.N * -(-T // SEGMENT), p.N * -(-T // C)
    else:
        segments, chunks = T // SEGMENT + p.N, T // C + p.N
    return (segments, p.H, KP, VP), (chunks, p.H, C, VP)


def forward(
    problem: Problem, form: str, keep: bool = False, over: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o [B, T, readers, V], the final S [N, H, K, V], and with `keep` what `backward` needs: states and written values.

    over: the recurrent form writes S over the given one.
    """
    p = problem.one_read_per_write()
    call, (B, T), K, V = _Call(p), p.q.shape[:2], p.q.shape[3], p.v.shape[3]
    o = p.v.new_empty(B, T, p.readers, V)
    if p.cu_seqlens is not None:
        o.zero_()  # tokens outside all sequences
    S = p.S if over and p.S is not None and p.S.is_contiguous() else p.v.new_empty(p.N, p.H, K, V)
    kept = xs = None
    if keep:
        kept, xs = (p.v.new_empty(shape) for shape in kept_shapes(p))
    call.rows("o", o)
    for name, x in (("end", S), ("kept", kept), ("xs", xs)):
        call.plain(name, x)
    call.run(2 if form == "recurrent" and not keep else 0)
    return problem.of_reads(o), S, kept, xs


def backward(
    problem: Problem, kept: Tensor | None, xs: Tensor | None, d_o: Tensor | None, d_S: Tensor | None
) -> dict[str, Tensor | None]:
    """The gradients of q, k, v, g, a, e, w and S by name, each in its input's shape; None for inputs that are None."""
    p = problem.one_read_per_write()
    call, (B, T), H, K, V = _Call(p), p.q.shape[:2], p.H, p.q.shape[3], p.v.shape[3]
    if kept is None or xs is None or (kept.shape, xs.shape) != kept_shapes(p):  # or a vmap came between
        _, _, again, written = forward(p, "chunk", keep=True)
        assert again is not None and written is not None
        kept, xs = again, written
    if d_o is None:
        d_o = p.v.new_zeros(()).expand(B, T, p.readers, V)
    elif problem.writes > 1:
        whole = d_o.new_zeros(B, T // problem.writes, problem.writes, p.readers, V)
        whole[:, :, 0 if p.read_before else -1] = d_o
        d_o = whole.flatten(1, 2)
    new = p.q.new_zeros if p.cu_seqlens is not None else p.q.new_empty
    grads: dict[str, Tensor | None] = {
        "q": new(B, T, p.readers, K),
        "k": new(B, T, H, K),
        "v": new(B, T, H, V),
        "g": None if p.g is None else new(p.g.shape),
        "a": None if p.a is None else new(p.a.shape),
        "e": None if p.e is None else new(p.e.shape),
        "w": None if p.w is None else new(p.w.shape),
        "S": None if p.S is None else p.q.new_empty(p.N, H, K, V),
    }
    call.rows("dout", d_o)
    for name, x in grads.items():
        if name != "S":
            call.rows(f"d{name}", x)
    for name, x in (
        ("kept", kept),
        ("xs", xs),
        ("dend", None if d_S is None else d_S.contiguous()),
        ("dS", grads["S"]),
    ):
        call.plain(name, x)
    call.run(1)
    found = {}
    for name, x in grads.items():
        given = getattr(p, name)
        if x is not None and x.shape != given.shape:  # heads that shared one of the input
            x = x.unflatten(2, (given.shape[2], x.shape[2] // given.shape[2])).sum(3)
        found[name] = problem.of_reads(x) if name == "q" and x is not None else x
    return found
