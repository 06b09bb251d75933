"""Every check of the op's arguments: one line that names the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fwp._torch_private import keystr, tree_flatten_with_path
from fwp.core import Core, ScaledState, State, check_bounds, state_dtype
from fwp.errors import number, suggest, tensor
from fwp.rules import Rule
from fwp.rules.spec import OPTIONS

BACKENDS = ("auto", "reference", "torch", "native", "triton")
FORMS = ("auto", "recurrent", "chunk")


def tensors(rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Checks that q, k and v fit each other and the rule. Returns n, the writes per read: k has n·T tokens, q has T."""
    tensor("q", q, (None, None, None, None))
    B, T, Hq, K = q.shape
    n = writes(k, T)
    tensor("k", k, (B, n * T, None, K), q.dtype, q.device)
    tensor("v", v, (B, n * T, None, None), q.dtype, q.device)
    Hk, Hv = k.shape[2], v.shape[2]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: expected at least one head and one feature, got {tuple(x.shape)}")
    H = max(Hk, Hv)
    if H % Hk or H % Hv:
        raise ValueError(f"k, v: expected head counts of which one divides the other, got {Hk} and {Hv}")
    if Hq % H and H % Hq:
        raise ValueError(f"q: expected a multiple or a divisor of {H} heads, got {Hq}")
    if Hq > H and not rule.plain:
        raise ValueError(f"q: expected at most {H} heads, since {rule.name!r} has one output per state head, got {Hq}")
    return n


def writes(k: Any, T: int) -> int:
    """n ≥ 1 where k has n·T tokens. Where k has fewer than T it is 1, and the check of k's shape says so."""
    if not isinstance(k, Tensor) or k.dim() < 2 or k.shape[1] == T or T == 0 or k.shape[1] < T:
        return 1
    if k.shape[1] % T:
        raise ValueError(f"k: expected a multiple of the {T} tokens of q, got {k.shape[1]}")
    return int(k.shape[1] // T)


def options(
    rule: Rule,
    *,
    causal: bool = True,
    read: str = "after",
    scale: float = 1.0,
    denominator: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
    form: str = "auto",
    check: bool = False,
) -> None:
    """Checks that names are known, that numbers are numbers, and that the rule has what is asked for."""
    for name, flag in (("causal", causal), ("denominator", denominator), ("check", check)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    number("scale", scale)
    number("eps", eps, 0)
    for name, value, known in (
        ("read", read, ("after", "before")),
        ("backend", backend, BACKENDS),
        ("form", form, FORMS),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{suggest(str(value), known)}")
    if not causal and read == "before":
        raise ValueError("read: 'before' needs causal=True, since without it every query reads the final state")
    if denominator and (not rule.plain or (rule.erases and rule.normalised is None)):
        raise ValueError(f"denominator: {rule.name!r} has no attention normalisation")


def packing(cu_seqlens: Tensor, B: int, T: int, check: bool = False, *, device: torch.device | None = None) -> None:
    """Checks that cu_seqlens [N + 1] are the borders of N sequences in one row. check: look at values on a GPU too."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected (N + 1,) with N ≥ 1, got {tuple(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"q: expected a batch of 1 with cu_seqlens, got {B}")
    if device is not None and cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected on {device}, got on {cu_seqlens.device}")
    if (check or cu_seqlens.device.type == "cpu") and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens, T)


def gates(
    rule: Rule, given: Mapping[str, Tensor | None], sizes: tuple[int, int, int, int, int], like: Tensor
) -> dict[str, Tensor]:
    """The rule's gates in the state's dtype. A gate that isn't given gets its default. sizes: B, n·T, H, K', V."""
    for name in given:
        if name not in rule.gates:
            raise TypeError(f"unexpected keyword {name!r}{suggest(name, [*rule.gates, *OPTIONS])}")
    axes, dtype = dict(zip("BTHKV", sizes)), state_dtype(like.dtype)
    found = {}
    for name, gate in rule.gates.items():
        x, shape = given.get(name), tuple(axes[letter] for letter in gate.shape)
        if x is not None:
            tensor(name, x, shape, None, like.device)
            found[name] = x.to(dtype)
        elif gate.default is not None:
            found[name] = like.new_full((), gate.default, dtype=dtype).expand(shape)
        else:
            raise TypeError(f"{name}: {rule.name!r} needs it, of shape {shape}")
    return found


def with_state(core: Core, state: Any, scaled: bool) -> Core:
    """The core with a given initial state. scaled: whether the call counts in units, see `fwp.units`."""
    if state is None:
        return core
    _state(state, scaled, (core.sequences, core.heads), core.v.device)
    shape = (core.sequences, core.heads, core.width, core.v.shape[-1])
    tensor("state", state.S, shape, core.dtype, core.v.device)
    if core.denominator:
        tensor("state.z", state.z, shape[:3], core.dtype, core.v.device)
    elif state.z is not None:
        raise ValueError("state.z: expected None without denominator=True, got a tensor")
    return replace(core, S=state.S, z=state.z)


def _state(state: Any, scaled: bool, shape: tuple[int, int | None], device: torch.device) -> None:
    """Checks the type of a state, and its units [N, H, ·] if it has them."""
    if isinstance(state, ScaledState) and scaled:
        tensor("state.log_scale", state.log_scale, (*shape, None), state.S.dtype, device)
    elif isinstance(state, ScaledState):
        raise TypeError("state: expected fwp.State, got ScaledState of an exponential feature map with a denominator")
    elif not isinstance(state, State):
        raise TypeError(f"state: expected fwp.State, got {type(state).__name__}")


def own_state(rule: Rule, core: Core, state: Any) -> None:
    """Checks that a given state has the structure, shapes and dtypes of what the rule's `init` makes."""
    if state is None:
        return
    batch, like = (core.sequences, core.heads), core.v.new_zeros((), dtype=core.dtype)
    wanted, shape = tree_flatten_with_path(rule.init(batch, core.k.shape[-1], core.v.shape[-1], like))
    found, other = tree_flatten_with_path(state)
    if shape != other:
        raise TypeError(f"state: expected what the 'init' of {rule.name!r} makes, got {type(state).__name__}")
    for (path, want), (_, x) in zip(wanted, found):
        tensor("state" + keystr(path), x, tuple(want.shape), want.dtype, core.v.device)


def named_tensors(name: str, tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their path, "state.S"."""
    return {name + keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, Tensor)}


def readable(state: Any, q: Tensor, cu_seqlens: Tensor | None, scaled: bool) -> None:
    """Checks that queries q [B, T, Hq, K'] can read the state. scaled: whether they are exponentials."""
    _state(state, scaled, (None, None), q.device)  # type: ignore[arg-type]
    B, T, Hq, K = q.shape
    if cu_seqlens is not None:
        packing(cu_seqlens, B, T, device=q.device)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    tensor("state", state.S, (N, None, K, None), state_dtype(q.dtype), q.device)
    H = state.S.shape[1]
    for name, x, sizes in (("q", q, q.shape[2:]), ("state", state.S, state.S.shape[1:])):
        if 0 in sizes:
            raise ValueError(f"{name}: expected at least one head and one feature, got {tuple(x.shape)}")
    if state.z is not None:
        tensor("state.z", state.z, (N, H, K), state.S.dtype, q.device)
    if Hq % H and H % Hq:
        raise ValueError(f"q: expected a multiple or a divisor of {H} heads, got {Hq}")


def values(rule: Rule, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor], state: Any) -> None:
    """Checks that numbers are finite, gates in range and keys short enough. The error names the first wrong index."""
    for name, x in ({"q": q, "k": k, "v": v} | named_tensors("state", state)).items():
        _first(name, x, ~x.isfinite(), "a finite number")
    for name, x in given.items():
        low, high = rule.gates[name].low, rule.gates[name].high
        _first(name, x, ~((x >= low) & (x <= high)), f"a value in [{low:g}, {high:g}]")
    keys = {"k": k} if rule.wants_unit_keys else {}
    for name, x in (keys | {name: x for name, x in given.items() if rule.gates[name].unit}).items():
        length = x.float().norm(dim=-1)
        # Masked keys are 0. Beyond length 1 a step can overshoot, and the state blows up.
        _first(name, length, (length > 1 + 1e-2), "keys of at most unit length for a rule that erases")


def _first(name: str, x: Tensor, invalid: Tensor, expected: str) -> None:
    if invalid.any():
        at = tuple(invalid.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(at)}: expected {expected}, got {x[at].item():g}")
