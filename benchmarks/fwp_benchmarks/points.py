"""What `fwp bench` measures: the list of points, most important first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fwp import feature_maps
from fwp.rules import RULES

FORWARD, BOTH, STEP, COLD = "forward", "forward + backward", "step", "first call"


@dataclass(frozen=True)
class Point:
    """A rule with its options at a size: B sequences of T tokens, H heads of D key and D value features.

    graph: it is timed in a CUDA graph as well.
    cold: only the first call of a process is timed, with nothing compiled before.
    """

    rule: str
    B: int
    T: int
    H: int
    D: int
    device: str = "cuda"
    feature_map: str | None = None
    feature_norm: str | None = None
    denominator: bool = False
    graph: bool = False
    cold: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """For `fwp.fast_weights`."""
        names = ("feature_map", "feature_norm", "denominator")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def what(self) -> str:
        """The rule and its options in words."""
        more = [self.feature_map, self.feature_norm, "denominator" if self.denominator else None]
        return " + ".join([self.rule, *(name for name in more if name)])

    @property
    def passes(self) -> tuple[str, ...]:
        """What is timed."""
        return (COLD,) if self.cold else (STEP,) if self.T == 1 else (FORWARD, BOTH)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def width(self) -> int:
        """K', the features of a key after the feature map."""
        return feature_maps.get(self.feature_map)(torch.zeros(self.D)).shape[-1]


def points(device: str) -> list[Point]:
    """What is measured on a device.

    The most important points come first, as time may run out before the last.
    """
    if device == "cpu":
        cpu = partial(Point, B=1, H=4, device="cpu")
        return [
            *(cpu(rule, T=T, D=D) for D in (64, 128) for T in (512, 2048) for rule in RULES),
            *(cpu("additive", T=512, D=64, feature_map=phi, denominator=True) for phi in ("elu+1", "dpfp-3")),
            cpu("gated_delta", T=1, D=128),
            cpu("gated_delta", T=512, D=64, cold=True),
        ]
    full, small = (partial(Point, B=B, T=T, H=8) for B, T in ((16, 4096), (1, 256)))
    six = ("additive", "gated_delta", "kda", "decay", "delta", "gla")
    maps = [(D, phi) for D in (64, 32, 16) for phi in ("dpfp-3", "elu+1")]
    return [
        *(Point(rule, 1, 4096, 8, 128, cold=True) for rule in ("additive", "gated_delta")),
        *(full(rule, D=128) for rule in six[:5]),
        *(Point(rule, 64, 1, 32, 128, graph=True) for rule in ("additive", "delta", "gated_delta", "kda")),
        *(full("additive", D=D, feature_map=phi, denominator=True) for D, phi in maps),
        *(full(rule, D=64) for rule in ("additive", "decay")),
        *(small(rule, D=128, graph=True) for rule in six[:5]),
        small("additive", D=64, feature_map="elu+1", denominator=True, graph=True),
        *(
            Point(rule, min(64, 65536 // T), T, 8, 128)
            for T in (65536, 16384, 1024)
            for rule in ("additive", "gated_delta")
        ),
        full("gated_delta", D=128, feature_norm="l2"),
        *(full(rule, D=256) for rule in ("additive", "gated_delta", "kda", "delta")),
        *(full(rule, D=64) for rule in ("gated_delta", "kda", "delta")),
        full("gla", D=128),
        *(full(rule, D=128) for rule in RULES if rule not in six),
    ]
