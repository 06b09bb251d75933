"""Fast weight programmers and linear attention: one op, S ← decay(S) + write(k, v), o = Sᵀ q.

Names are loaded when first used; importing this package loads torch and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fwp import config as config  # so that torch.load knows these types
from fwp import states as states
from fwp._version import __version__ as __version__
from fwp.rules import RULES as RULES
from fwp.rules import Gate as Gate
from fwp.rules import Rule as Rule

_HOME = {
    "fast_weights": "functional",
    "read": "functional",
    "State": "core",
    "ScaledState": "core",
    "FEATURE_MAPS": "feature_maps",
    "DPFP": "feature_maps",
    "FavorPlus": "feature_maps",
    "Taylor": "feature_maps",
    **dict.fromkeys(RULES, "verbs"),  # each rule has a typed function of its name
}
_NEEDS_EXTRA = {"convert": "interop.transformers"}  # not in __all__, since `from fwp import *` works without extras
_MODULES = ("inspect", "nn", "models", "testing")

__all__ = ["RULES", "Gate", "Rule", "__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from fwp import inspect as inspect
    from fwp import models as models
    from fwp import nn as nn
    from fwp import testing as testing
    from fwp.core import ScaledState as ScaledState
    from fwp.core import State as State
    from fwp.feature_maps import DPFP as DPFP
    from fwp.feature_maps import FEATURE_MAPS as FEATURE_MAPS
    from fwp.feature_maps import FavorPlus as FavorPlus
    from fwp.feature_maps import Taylor as Taylor
    from fwp.functional import fast_weights as fast_weights
    from fwp.functional import read as read
    from fwp.interop.transformers import convert as convert
    from fwp.verbs import *  # noqa: F403 - a list of its functions here would be one more list of rules
else:  # a type checker that saw this would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(f"fwp.{_HOME[name]}"), name)
        elif name in _NEEDS_EXTRA:
            value = getattr(import_module(f"fwp.{_NEEDS_EXTRA[name]}"), name)
        elif name in _MODULES:
            value = import_module(f"fwp.{name}")
        else:
            raise AttributeError(f"module 'fwp' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NEEDS_EXTRA})
