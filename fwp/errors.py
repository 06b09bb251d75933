"""Checks that need no rule. Each error is one line: which argument, what was expected, what was found."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What flash-linear-attention's layers call our options.
OPTIONS_ELSEWHERE = {
    "hidden_size": "embed_dim",
    "d_model": "embed_dim",
    "expand_k": "head_dim, the features of a key head",
    "expand_v": "value_dim, the features of a value head",
    "num_v_heads": "num_value_heads",
    "num_kv_heads": "num_key_heads and num_value_heads",
    "num_householder": "writes_per_read",
    "use_short_conv": "short_conv, the width of the convolution, 0 for none",
    "conv_size": "short_conv",
    "qk_activation": "activation or feature_map",
    "qk_norm": "feature_norm",
    "use_gate": "out_gate",
    "use_output_gate": "out_gate",
    "gate_fn": "out_gate, which takes the name of an activation",
    "output_gate_activation": "out_gate, which takes the name of an activation",
    "output_norm": "out_norm",
    "do_feature_map_norm": "denominator",
    "allow_neg_eigval": "an activation 2σ of gates['beta']",
    "gate_low_rank_dim": "gate_rank",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "rate_rank",
    "v_low_rank_dim": "value_rank",
    "layer_idx": "layer, or nothing where no place in a stack is needed",
    "num_hidden_layers": "num_layers",
    "mode": "nothing, since the number of tokens decides",
}

P = ParamSpec("P")


def explains_options(init: Callable[P, None]) -> Callable[P, None]:
    """An `__init__` whose TypeError for an option of flash-linear-attention's layers says what it is here."""

    @wraps(init)
    def explained(*args: P.args, **options: P.kwargs) -> None:
        for name in options:
            if name in OPTIONS_ELSEWHERE:
                raise TypeError(f"unexpected keyword {name!r}; here it is {OPTIONS_ELSEWHERE[name]}")
        init(*args, **options)

    return explained


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
