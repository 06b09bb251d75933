"""Checks that need no rule. Each error is one line: which argument, what was expected, what was found."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'state'?" when a known word is close, else ""."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def tensor(
    name: str,
    x: Any,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks that x is a tensor of that shape (None: any size), dtype (None: any of FLOATS) and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if dtype is None and x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype of 16 to 64 bits, got {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        wanted = str(tuple("*" if size is None else int(size) for size in shape)).replace("'", "")
        raise ValueError(f"{name}: expected {wanted}, got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected on {device}, got on {x.device}")


def number(name: str, x: Any, low: float = -math.inf) -> None:
    """Checks that x is a finite number ≥ low."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not (low <= x and -math.inf < x < math.inf):
        raise ValueError(f"{name}: expected a finite number{'' if low == -math.inf else f' ≥ {low:g}'}, got {x}")


def size(name: str, x: Any, low: int = 1) -> None:
    """Checks that x is a whole number ≥ low."""
    if isinstance(x, bool) or not isinstance(x, Integral) or x < low:
        raise ValueError(f"{name}: expected a whole number ≥ {low}, got {x!r}")
