"""The states of layers, models and the nets of 1991 and 1993: what is carried from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fwp._torch_private import register_pytree_node
from fwp.core import Carried

Weights = dict[str, Tensor]  # a tensor for each parameter of a net, by its name


class _LayerState(NamedTuple):
    memory: Any
    conv: Tensor | None
    position: Tensor


class LayerState(_LayerState, Carried):
    """All that a layer remembers of N sequences. Its size doesn't depend on how many tokens they had.

    memory: `fwp.State(S [N, H, K', V], z [N, H, K'] or None)`, a `fwp.ScaledState` of exponential features with a
        denominator, or the state of a rule that has its own.
    conv: [N, W − 1, C], the last inputs of the short convolution, oldest first; None without one. A token shift
        counts as a convolution of width W = 2.
    position: [N] int64, the tokens seen, masked ones not counted.
    """

    __slots__ = ()


class StackState(tuple[LayerState, ...], Carried):
    """The states of a stack of layers, in their order."""

    __slots__ = ()


class FastWeights(dict[str, Tensor], Carried):
    """The fast weights of N sequences by the names of the fast net's parameters, each [N, *its shape]."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FastWeights, (dict(self),)  # torch.load's safe default fills no dict but Python's own


class _RecurrentState(NamedTuple):
    weight: Tensor
    y: Tensor


class RecurrentState(_RecurrentState, Carried):
    """What a `FastWeightRNN` remembers of B sequences: weight [B, units, inputs + units], y [B, units].

    The weights are float32, or float64 for a net of that dtype.
    """

    __slots__ = ()


class _Online(NamedTuple):
    weights: Weights
    sensitivity: dict[str, dict[str, Tensor]]


class Online(_Online, Carried):
    """What online learning carries from step to step.

    weights: the fast weights w, {name: its shape}.
    sensitivity: p = ∂w/∂W_S, {fast name: {slow name: [*shape of the fast weight, *shape of the slow one]}}.
    With an axis of nets in front of each, from `torch.func.vmap`, `select` takes some of these nets.
    """

    __slots__ = ()


register_pytree_node(StackState, lambda state: (list(state), None), lambda states, _: StackState(states))
register_pytree_node(
    FastWeights,
    lambda state: (list(state.values()), list(state)),
    lambda weights, names: FastWeights(zip(names, weights)),
)
