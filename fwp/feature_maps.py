"""Feature maps φ, applied to keys and queries before they meet the fast weights.

A map is any callable [..., d] → [..., K']. `FEATURE_MAPS` names those of the field. `norm` holds the two norms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from operator import index

import torch
from torch import Tensor

from fwp import errors
from fwp._torch_private import constant_under_compile
from fwp.core import Core, Features, exports, ratio, state_dtype, without_autocast
from fwp.errors import suggest

FeatureMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DPFP:
    """Deterministic parameter-free projection of width 2dν: concat over i = 1…ν of r ⊙ roll(r, i), r = relu([x, −x]).

    Schlag, Irie and Schmidhuber 2021, equation 37.
    """

    nu: int = 1

    def __post_init__(self) -> None:
        if self.nu < 1:
            raise ValueError(f"nu: expected a positive integer, got {self.nu}")

    def __call__(self, x: Tensor) -> Tensor:
        r = torch.cat([x, -x], -1).relu()
        return torch.cat([r * r.roll(i, -1) for i in range(1, self.nu + 1)], -1)


@dataclass(frozen=True, eq=False)
class FavorPlus:
    """Positive random features of exp(qᵀk), width 2m: exp(−‖x‖²/2) / √(2m) · [exp(Rx), exp(−Rx)], R [m, d].

    The 2021 paper's form of the Performer's features (Choromanski et al. 2021, arXiv 2009.14794).
    """

    R: Tensor

    @staticmethod
    def draw(d: int, m: int | None = None, generator: torch.Generator | None = None) -> FavorPlus:
        """m (default d) random directions in d dimensions: orthogonal in blocks of d, Gaussian norms."""
        return FavorPlus(directions(d, m, generator))

    def __call__(self, x: Tensor) -> Tensor:
        return positive_features(x, self.R)

    def logarithm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log_positive_features` of x."""
        return log_positive_features(x, self.R)


def directions(d: int, m: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """R [m, d] of `FavorPlus.draw`, in float64."""
    m = d if m is None else m
    errors.size("d", d)
    errors.size("m", m)
    blocks = [
        torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0].T
        for _ in range(math.ceil(m / d))
    ]
    norms = torch.randn(m, d, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:m] * norms


def positive_features(x: Tensor, R: Tensor) -> Tensor:
    """φ of `FavorPlus`: x [..., d], R [m, d] → [..., 2m]."""
    features, common = log_positive_features(x, R)
    return (features + common).exp()


def log_positive_features(x: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """log φ of `FavorPlus`, as the sum of [Rx, −Rx] [..., 2m] and of what the features share [..., 1]."""
    if x.shape[-1] != R.shape[-1]:
        raise ValueError(f"R: expected (m, {x.shape[-1]}), got {tuple(R.shape)}")
    projected = x @ R.to(x).T  # [..., m]
    return torch.cat([projected, -projected], -1), -(x.square().sum(-1, keepdim=True) + math.log(2 * len(R))) / 2


@dataclass(frozen=True)
class Taylor:
    """Second-order Taylor features of exp(qᵀk), width 1 + d + d²: [1, x, vec(x xᵀ)/√2], so φ(q)ᵀφ(k) = 1 + s + s²/2.

    Based, Arora et al. 2024, arXiv 2402.18668 (without its d^−½ temperature: scale x for it).
    """

    def __call__(self, x: Tensor) -> Tensor:
        square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def favor_plus(x: Tensor) -> Tensor:
    """FAVOR+ with m = d directions, drawn once from a fixed seed. `FavorPlus.draw` draws others."""
    return positive_features(x, _fixed_directions(index(x.shape[-1]), x.dtype, x.device))


@constant_under_compile  # torch.compile takes the tensor as a constant
def _fixed_directions(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _drawn_once(d, dtype, device)


@cache
def _drawn_once(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Drawn in a thread of its own: the cached tensor must not belong to a vmap, trace or mode of the first caller."""

    def draw() -> Tensor:
        return directions(d, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(draw).result()


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive everywhere (Katharopoulos et al. 2020). exp(x) below 0, where elu(x) + 1 rounds to 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def softmax(x: Tensor) -> Tensor:
    """softmax over the features."""
    return x.softmax(-1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "relu": torch.relu,
    "elu+1": elu_plus_one,
    "exp": torch.exp,
    "softmax": softmax,
    "dpfp-1": DPFP(1),
    "dpfp-2": DPFP(2),
    "dpfp-3": DPFP(3),
    "favor+": favor_plus,
    "taylor": Taylor(),
}

# for torch.load, which by default makes known types only
torch.serialization.add_safe_globals([DPFP, FavorPlus, Taylor, favor_plus, elu_plus_one, softmax])


def get(feature_map: str | FeatureMap | None) -> FeatureMap:
    """The map of that name ("dpfp" is "dpfp-1", "dpfp-ν" any ν), the callable itself, or the identity for None."""
    if feature_map is None:
        return lambda x: x
    if isinstance(feature_map, type):
        raise TypeError(f"feature_map: expected an instance, got the class {feature_map.__name__}")
    if callable(feature_map):
        return feature_map
    if isinstance(feature_map, str):
        if feature_map in FEATURE_MAPS:
            return FEATURE_MAPS[feature_map]
        if match := re.fullmatch(r"dpfp(?:-([1-9]\d*))?", feature_map):
            return DPFP(int(match[1] or 1))
    raise ValueError(
        f"feature_map: expected one of {', '.join(FEATURE_MAPS)}, 'dpfp-ν' or a callable, "
        f"got {feature_map!r}{suggest(str(feature_map), FEATURE_MAPS)}"
    )


def apply(phi: FeatureMap, x: Tensor) -> Tensor:
    """φ(x). Checks that it has x's shape except for the last axis, and x's device."""
    y = phi(x)
    errors.tensor("feature_map", y, (*x.shape[:-1], None), device=x.device)
    if y.shape[-1] == 0:
        raise ValueError(f"feature_map: expected at least one feature, got {tuple(y.shape)}")
    return y


Logarithm = Callable[[Tensor], tuple[Tensor, Tensor]]


def logarithm(feature_map: str | FeatureMap | None) -> Logarithm | None:
    """x ↦ (l [..., K'], c [..., 1]) with φ(x) = exp(l + c), for maps that are exponentials; else None."""
    phi = get(feature_map)
    if phi is torch.exp:
        return lambda x: (x, torch.zeros_like(x[..., :1]))
    if phi is favor_plus:
        return lambda x: log_positive_features(x, _fixed_directions(index(x.shape[-1]), x.dtype, x.device))
    return getattr(phi, "logarithm", None)


def log_features(log_phi: Logarithm, x: Tensor) -> Tensor:
    """log φ(x) [..., K'] in the state's dtype."""
    with without_autocast(x):
        features, common = log_phi(x.to(state_dtype(x.dtype)))
        return features + common


def norm(x: Tensor, kind: str | None, log_scale: Tensor | None = None) -> Tensor:
    """The norm of x over its last axis. "sum": x / Σx, 0 where the sum is 0. "l2": x · rsqrt(Σx² + 1e-6). None: x.

    log_scale [..., 1]: that of x · exp(log_scale) for a kind, which is in range where the product is not.
    """
    if kind is None:
        return x
    if kind == "sum":
        return ratio(x, x.sum(-1, keepdim=True))
    if kind == "l2":
        if exports():  # it has no frexp
            least = torch.full_like(x[..., :1], 1e-6)
        elif log_scale is None:  # a power of 2 keeps squares in range and changes no bit
            largest = x.detach().abs().amax(-1, keepdim=True)
            size = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent).clamp(min=1)
            x, least = x / size, 1e-6 / size.square()
        else:
            least = 1e-6 * (-2 * log_scale).clamp(max=80).exp()
        return x * (x.square().sum(-1, keepdim=True) + least).rsqrt()
    raise ValueError(f"feature_norm: expected None, 'sum' or 'l2', got {kind!r}")


def transform(x: Tensor, feature_map: str | FeatureMap | None, kind: str | None, scale: float = 1.0) -> Tensor:
    """scale · norm(φ(x)), computed in the state's dtype. A module gets x as it is, under the caller's autocast."""
    dtype, phi = x.dtype, get(feature_map)
    if kind is not None and (log_phi := logarithm(feature_map)) is not None:
        with without_autocast(x):
            features, log_scale = log_phi(x.to(state_dtype(dtype)))
            largest = features.detach().amax(-1, keepdim=True)
            return (norm((features - largest).exp(), kind, log_scale + largest) * scale).to(dtype)
    if isinstance(phi, torch.nn.Module):
        x, phi = apply(phi, x), get(None)
    if feature_map is not None or kind is not None:
        with without_autocast(x):
            x = norm(apply(phi, x.to(state_dtype(dtype))), kind)
    return (x if scale == 1.0 else x * scale).to(dtype)


def applied(core: Core) -> Core:
    """The core with its feature map, norm and scale applied to q and k."""
    phi, norm, scale = core.features.phi, core.features.norm, core.features.scale
    q, k = transform(core.q, phi, norm, scale), transform(core.k, phi, norm)
    return replace(core, q=q, k=k, features=Features())


def kernel_features(feature_map: str | FeatureMap | None, kind: str | None, scale: float) -> Features | None:
    """The features that a backend can apply instead of `transform`, or None if no backend can."""
    phi: str | None = None
    if feature_map is not None:
        fn = get(feature_map)
        if type(fn) is DPFP:
            phi = f"dpfp-{fn.nu}"
        elif fn is torch.relu:
            phi = "relu"
        elif fn is elu_plus_one:
            phi = "elu+1"
        elif fn is torch.exp and kind is None:  # the norm of an exponential needs the largest feature first
            phi = "exp"
        else:
            return None
    return Features(phi, kind, scale) if kind in (None, "sum", "l2") else None


def preimage_of_zero(features: Features) -> float:
    """The x for which φ(x) is 0."""
    return -math.inf if features.phi in ("elu+1", "exp") else 0.0
