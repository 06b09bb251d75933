"""What a fast weight update rule is: one row of the table in `fwp.rules`, or a `Rule` of your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp.core import Core

Shape = Literal["BTH", "BTHK", "BTHV"]

# The keyword arguments that `fwp.fast_weights` takes of every rule.
OPTIONS = (
    *("mask", "causal", "read", "scale", "feature_map", "feature_norm", "denominator", "eps"),
    *("state", "cu_seqlens", "backend", "form", "check"),
)


@dataclass(frozen=True)
class Gate:
    """One input of a rule beside q, k and v, given per token and state head.

    shape: its axes, B batch, T writes, H state heads, K' key and V value features: "BTH", "BTHK" or "BTHV".
    low, high: the values it may take.
    activation: how a layer makes it from a linear projection of its input.
    sample: (size, generator) → float64 values that a test or benchmark uses.
    neutral: the value at which a token leaves the state alone (with k = v = 0); what a masked token gets.
    unit: whether its features are a key of at most unit length.
    default: the value when it isn't given; None: it must be given.
    """

    shape: Shape
    low: float
    high: float
    activation: Callable[[Tensor], Tensor]
    sample: Callable[[tuple[int, ...], torch.Generator], Tensor]
    neutral: float = 0.0
    default: float | None = None
    unit: bool = False

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape: expected one of {', '.join(get_args(Shape))}, got {self.shape!r}")


def uniform(low: float, high: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """A sampler of independent values between low and high."""
    return partial(_uniform, low, high)  # partial objects of named functions can be pickled, local functions can't


def _uniform(low: float, high: float, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64) * (high - low) + low


def beta(shape: Shape = "BTH") -> Gate:
    """A learning rate: 0 changes nothing, 1 replaces the value stored under a unit key, 2 mirrors it."""
    return Gate(shape, 0.0, 2.0, torch.sigmoid, uniform(0.1, 0.9))


def strength(shape: Shape = "BTH") -> Gate:
    """A fraction: 0 does nothing, 1 does all of it."""
    return Gate(shape, 0.0, 1.0, torch.sigmoid, uniform(0.1, 0.9))


def decay(shape: Shape = "BTH") -> Gate:
    """A decay in log space, α = exp g; 0 keeps all, −inf forgets all."""
    return Gate(shape, -math.inf, 0.0, F.logsigmoid, uniform(-0.3, 0.0), default=0.0)


def unit_key() -> Gate:
    """A second key of unit length beside k, with K' features."""
    return Gate("BTHK", -1.0, 1.0, partial(F.normalize, dim=-1), _directions, unit=True)


def _directions(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)


def read_linear(S: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """o = Sᵀ q, the state unchanged. S [..., K, V], q [..., K] → o [..., V]."""
    return (S * q.unsqueeze(-1)).sum(-2), S


def init_zero(batch: tuple[int, ...], K: int, V: int, like: Tensor) -> Tensor:
    """S = 0 of shape [*batch, K, V] in the dtype and on the device of `like`."""
    return like.new_zeros(*batch, K, V)


@dataclass(frozen=True)
class Rule:
    """A fast weight update rule.

    step: (state, k [..., K], v [..., V], **gates) → state, the paper's equation for one token. The specification.
    gates: name → `Gate`, in the order of the typed function's arguments; no name may be an option of the op.
    lower: (core, **gates) → core: sets g, a, e and w (or k, v) of the recurrence in `fwp.core`, by plain differentiable
        torch on [B, T, H, …]. A gate that wasn't given arrives at its default, as in `step`. None: the rule has no such
        form and runs token by token through `step`.
    lower_uses_k: whether `lower` looks at k, which then has passed the feature map. False leaves the map to the
        backend, which may compute it as it reads k: faster, with the same result.
    normalised: (state, z, k, v, **gates) → (state, z), `step` under attention normalisation. None: z is what `step`
        makes of v = 1, which is right for rules that erase nothing.
    init: (batch, K, V, like) → state before the first token; any pytree of tensors [*batch, …].
    read: (state, q [..., K]) → (o [..., V], state).
    extends: name of a simpler rule → how its gates become this rule's, (k, v, **gates) → gates, k and v of H heads.
    erases: whether an old value is removed before writing.
    any_keys: whether the state of a rule that erases stays bounded for keys longer than 1; else `check` refuses them.
    linear_in_v: whether output and state are linear in (v, initial state).
    paper, bibtex: the source.

    A rule is pickled by its name in the table or in the module that holds it, so its functions may be lambdas there.
    """

    name: str
    step: Callable[..., Any]
    gates: Mapping[str, Gate] = field(default_factory=dict)
    lower: Callable[..., Core] | None = None
    lower_uses_k: bool = True
    normalised: Callable[..., Any] | None = None
    init: Callable[..., Any] = init_zero
    read: Callable[..., Any] = read_linear
    extends: Mapping[str, Callable[..., dict[str, Tensor]]] = field(default_factory=dict)
    erases: bool = False
    any_keys: bool = False
    linear_in_v: bool = True
    paper: str = ""
    bibtex: str = ""

    def __post_init__(self) -> None:
        for name, gate in self.gates.items():
            if not isinstance(gate, Gate):
                raise TypeError(f"gates: expected a Gate for {name!r}, got {type(gate).__name__}")
            if not name.isidentifier() or name in ("rule", "q", "k", "v", *OPTIONS):
                raise ValueError(f"gates: expected a name that is no argument of fast_weights, got {name!r}")
        own_init, own_read = self.init is not init_zero, self.read is not read_linear
        if self.lower is not None and (own_init or own_read):
            # the recurrence starts from S = 0 and reads Sᵀq
            raise ValueError(f"lower: expected None beside a custom {'init' if own_init else 'read'}, got {self.lower}")
        if own_read and not own_init:
            raise ValueError("read: a custom one needs a custom init, got none")

    @property
    def equation(self) -> str:
        """What S becomes: the first line of the step's docstring."""
        return (self.step.__doc__ or "").strip().split("\n")[0].rstrip(".")

    @property
    def wants_unit_keys(self) -> bool:
        """Whether keys longer than 1 can make the state diverge."""
        return self.erases and not self.any_keys

    @property
    def plain(self) -> bool:
        """Whether the state is one matrix S, which the op wraps into a `State`."""
        return self.init is init_zero
