"""Every check of the op's arguments: one line that names the argument, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from fwp.core import Core, State, check_bounds, state_dtype
from fwp.errors import suggest
from fwp.rules import Gate, Rule

BACKENDS = ("auto", "reference", "torch", "triton")
FORMS = ("auto", "recurrent", "chunk")
OPTIONS = (
    *("mask", "causal", "read", "scale", "feature_map", "feature_norm", "denominator", "eps"),
    *("state", "cu_seqlens", "backend", "form", "check"),
)


def tensor(
    name: str,
    x: Any,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """x is a tensor of that shape (None: any size), dtype (None: any floating one) and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if dtype is None and not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected ({wanted}), got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected on {device}, got on {x.device}")


def tensors(rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v fit each other and the rule."""
    tensor("q", q, (None, None, None, None))
    B, T, Hq, K = q.shape
    tensor("k", k, (B, T, None, K), q.dtype, q.device)
    tensor("v", v, (B, T, None, None), q.dtype, q.device)
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
        raise ValueError(f"q: expected at most {H} heads, since {rule.name!r} has one output a state head, got {Hq}")


def options(rule: Rule, *, causal: bool, read: str, denominator: bool, backend: str, form: str) -> None:
    """Names are known and the rule has what is asked."""
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


def packing(cu_seqlens: Tensor, B: int, T: int, check: bool = False) -> None:
    """cu_seqlens [N + 1] are the borders of N sequences in one row. check: look at values on a GPU too."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected (N + 1,) with N ≥ 1, got {tuple(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"q: expected a batch of 1 with cu_seqlens, got {B}")
    if (check or cu_seqlens.device.type == "cpu") and not torch.compiler.is_compiling():
        check_bounds(cu_seqlens, T)


def gates(
    rule: Rule, given: Mapping[str, Tensor | None], sizes: tuple[int, int, int, int, int], like: Tensor
) -> dict[str, Tensor]:
    """The rule's gates in the state's dtype, those with a default left out where not given. sizes: B, T, H, K', V."""
    for name in given:
        if name not in rule.gates:
            raise TypeError(f"unexpected keyword {name!r}{suggest(name, [*rule.gates, *OPTIONS])}")
    axes = dict(zip("BTHKV", sizes))
    found = {}
    for name, gate in rule.gates.items():
        x = given.get(name)
        if x is None:
            if gate.default is None:
                raise TypeError(f"{name}: {rule.name!r} needs it, of shape {_shape(gate, axes)}")
            continue
        tensor(name, x, _shape(gate, axes), None, like.device)
        found[name] = x.to(state_dtype(like.dtype))
    return found


def _shape(gate: Gate, axes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(axes[letter] for letter in gate.shape)


def with_state(core: Core, state: Any) -> Core:
    """The core with a given initial state."""
    if state is None:
        return core
    if not isinstance(state, State):
        raise TypeError(f"state: expected fwp.State, got {type(state).__name__}")
    shape = (core.sequences, core.heads, core.k.shape[-1], core.v.shape[-1])
    tensor("state", state.S, shape, core.dtype, core.v.device)
    if core.denominator:
        tensor("state.z", state.z, shape[:3], core.dtype, core.v.device)
    elif state.z is not None:
        raise ValueError("state.z: expected None without denominator=True, got a tensor")
    return replace(core, S=state.S, z=state.z)


def own_state(rule: Rule, core: Core, state: Any) -> None:
    """A given state is built like what the rule's `init` makes."""
    if state is None:
        return
    batch, like = (core.sequences, core.heads), core.v.new_zeros((), dtype=core.dtype)
    wanted, shape = tree_flatten_with_path(rule.init(batch, core.k.shape[-1], core.v.shape[-1], like))
    found, other = tree_flatten_with_path(state)
    if shape != other:
        raise TypeError(f"state: expected what the 'init' of {rule.name!r} makes, got {type(state).__name__}")
    for (path, want), (_, x) in zip(wanted, found):
        tensor("state" + keystr(path), x, tuple(want.shape), want.dtype, core.v.device)


def readable(state: Any, q: Tensor, cu_seqlens: Tensor | None) -> None:
    """The state can be asked by q [B, T, Hq, K']."""
    if not isinstance(state, State):
        raise TypeError(f"state: expected fwp.State, got {type(state).__name__}")
    B, T, Hq, K = q.shape
    if cu_seqlens is not None:
        packing(cu_seqlens, B, T)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    tensor("state", state.S, (N, None, K, None), state_dtype(q.dtype), q.device)
    H = state.S.shape[1]
    if state.z is not None:
        tensor("state.z", state.z, (N, H, K), state.S.dtype, q.device)
    if Hq % H and H % Hq:
        raise ValueError(f"q: expected a multiple or a divisor of {H} heads, got {Hq}")


def values(rule: Rule, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Tensor]) -> None:
    """No NaN, gates within their range, and unit keys for rules that erase: the first offender with its index."""
    for name, x in {"q": q, "k": k, "v": v, **given}.items():
        _first(name, x, x.isnan(), "a number")
    for name, gate in rule.gates.items():
        if name in given:
            x = given[name]
            _first(name, x, (x < gate.low) | (x > gate.high), f"a value in [{gate.low:g}, {gate.high:g}]")
    if rule.erases:
        length = k.float().norm(dim=-1)
        # masked keys are 0; beyond length 1 a step can overshoot and the state blow up
        _first("k", length, (length > 1 + 1e-2), "keys of at most unit length for a rule that erases")


def _first(name: str, x: Tensor, wrong: Tensor, expected: str) -> None:
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(f"{name}{list(at)}: expected {expected}, got {x[at].item():g}")
