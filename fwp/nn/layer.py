"""What every layer with fast weights shares: its checks, and one decode step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwp import errors, validate
from fwp._torch_private import tree_leaves
from fwp.core import overwriting
from fwp.nn.block import ACTIVATIONS, pick
from fwp.nn.convolution import borders
from fwp.nn.stateful import Stateful
from fwp.states import LayerState


class Layer(Stateful):
    """A layer from x [B, T, E] and a `LayerState` to y [B, T, E] and the state after it.

    A subclass sets `embed_dim` and `tail`, the shape (W − 1, C) of what `LayerState.conv` holds per sequence, or None.
    own_starts: whether a model leaves the first values of its linear weights to the layer.
    """

    embed_dim: int
    tail: tuple[int, int] | None
    own_starts = False

    def step(
        self, x: Tensor, state: LayerState | None = None, *, in_place: bool = False, **options: Any
    ) -> tuple[Any, ...]:
        """One token: x [B, E] or [B, 1, E] → y of that shape and the state after it.

        in_place: the new state is written into the tensors of `state`, which is returned. ValueError without a state,
        or where gradients are on. options: further arguments of `forward`, whose further results are returned too.
        """
        E = self.embed_dim
        if isinstance(x, Tensor) and tuple(x.shape[1:]) not in ((E,), (1, E)):
            raise ValueError(f"x: expected one token, (*, {E}) or (*, 1, {E}), got {tuple(x.shape)}")
        run = self._overwriting if in_place else self
        if not isinstance(x, Tensor) or x.dim() == 3:
            return run(x, state, **options)
        y, *rest = run(x.unsqueeze(1), state, **options)
        return y.squeeze(1), *rest

    def _overwriting(self, x: Tensor, state: LayerState | None, **options: Any) -> tuple[Any, ...]:
        """`forward`, with the new state in the tensors of the given one."""
        if torch.is_grad_enabled():
            raise ValueError("in_place: expected torch.no_grad(), gradients need the state that would be overwritten")
        if state is None:
            raise ValueError("in_place: expected a state to overwrite, got None")
        with overwriting():
            y, end, *rest = self(x, state, **options)
        for place, value in zip(tree_leaves(state), tree_leaves(end)):
            if place is not value:  # a kernel may have written it there
                made_there = not torch.compiler.is_compiling() and place.is_inference()
                with torch.inference_mode() if made_there else nullcontext():  # elsewhere it can't be changed
                    place.copy_(value)
        return y, state, *rest

    def _check(
        self, x: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None, projection: nn.Module
    ) -> None:
        """Checks the arguments that the op doesn't see, or sees too late. projection: the first module applied to x."""
        errors.tensor("x", x, (None, None, self.embed_dim))
        weights = weight_dtype(projection) or x.dtype
        if x.dtype != weights and not (_autocasts(x) and torch.float64 not in (x.dtype, weights)):
            raise TypeError(f"x: expected {weights}, as the weights, got {x.dtype}")
        B, T, _ = x.shape
        N = B
        if mask is not None:
            errors.tensor("mask", mask, (B, T), torch.bool, x.device)
        if cu_seqlens is not None:
            validate.packing(cu_seqlens, 1, T, device=x.device)
            if B != 1:
                raise ValueError(f"x: expected a batch of 1 with cu_seqlens, got {B}")
            N = len(cu_seqlens) - 1
        if state is None:
            return
        if not isinstance(state, LayerState):
            raise TypeError(f"state: expected LayerState, got {type(state).__name__}")
        errors.tensor("state.position", state.position, (N,), torch.int64, x.device)
        if self.tail is not None:
            errors.tensor("state.conv", state.conv, (N, *self.tail), None, x.device)
        elif state.conv is not None:
            raise ValueError("state.conv: expected None without short_conv, got a tensor")


def projection(embed_dim: int, width: int, rank: int | None = None, bias: bool = False) -> nn.Module:
    """A linear map of [..., embed_dim] to [..., width], through `rank` features if given."""
    if rank is None:
        return nn.Linear(embed_dim, width, bias=bias)
    errors.size("rank", rank)
    return nn.Sequential(nn.Linear(embed_dim, rank, bias=False), nn.Linear(rank, width, bias=bias))


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a linear map takes its input. None: an adapter or a quantised map, which decides itself."""
    while type(module) is nn.Sequential and len(module):
        module = module[0]
    if type(module) is not nn.Linear:
        return None
    plain = type(module.weight) in (Tensor, nn.Parameter) and module.weight.dtype in errors.FLOATS
    return module.weight.dtype if plain else None


def matched(x: Tensor, module: nn.Module) -> Tensor:
    """x as the input of a module: in the dtype of its weights, where parts of a layer differ in dtype."""
    return x if _autocasts(x) else x.to(weight_dtype(module) or x.dtype)


def one_dtype(*given: Tensor) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds them all."""
    dtype = reduce(torch.promote_types, (x.dtype for x in given))
    return [x.to(dtype) for x in given]


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def function(argument: str, given: str | Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
    """The activation of that name, or the function itself."""
    return given if given is None or callable(given) else pick(argument, given, ACTIVATIONS)


def lengths(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[N] int64, the tokens of each sequence that are not masked."""
    at = borders(x, cu_seqlens)
    if mask is not None:
        at = F.pad(mask.flatten().cumsum(0), (1, 0))[at]
    return at.diff()
