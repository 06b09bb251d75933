"""Functions of other packages that compute the same from the same tensors, for `fwp bench --peers`.

`PEERS` lists an adapter per peer. An adapter takes a `Point` and returns a function from the inputs to the output, or
None if the peer does not serve the point. Peers get scale 1, and the l2 norm only if the point has it. They return the
final state wherever they can, because our op always does. A peer that is not installed is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp.rules import RULES

from .points import Point

Call = Callable[[dict[str, Any]], Tensor]  # the inputs of `fast_weights` by name → the output


def softmax(point: Point) -> Call | None:
    """PyTorch's causal softmax attention, for comparison: a different result, at a cost quadratic in T.

    None for a single token.
    """
    if point.T == 1:
        return None

    def call(x: dict[str, Any]) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


# Rule → its folder in fla.ops, which also ends the names of its functions, and the recurrent form's name for the decay.
FLA = {
    "additive": ("linear_attn", "g"),
    "decay": ("simple_gla", "g"),
    "gla": ("gla", "gk"),
    "delta": ("delta_rule", "g"),
    "gated_delta": ("gated_delta_rule", "g"),
    "kda": ("kda", "g"),
}


def flash_linear_attention(point: Point) -> Call | None:
    """The ops of flash-linear-attention 0.6: the chunk form, and for one token the recurrent form.

    Feature maps are computed eagerly, before the op. `separate` keeps its gated delta rule from calling FlashQLA.
    """
    if point.device == "cpu" or point.rule not in FLA:
        return None
    folder, decay = FLA[point.rule]
    step = point.T == 1
    function = getattr(import_module(f"fla.ops.{folder}"), ("fused_recurrent_" if step else "chunk_") + folder)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if point.rule == "additive":
        options["normalize"] = point.denominator
    elif point.denominator:
        return None
    if point.feature_norm == "l2" and RULES[point.rule].erases:
        options["use_qk_l2norm_in_kernel"] = True
    elif point.feature_norm is not None:
        return None
    phi = _feature_map(point)

    def call(x: dict[str, Any]) -> Tensor:
        gates = {decay if step and name == "g" else name: x[name] for name in ("g", "beta") if name in x}
        if (state := x.get("state")) is not None:  # z is [N, 1, H, K] there
            gates["initial_state"] = state.S if state.z is None else (state.S, state.z.unsqueeze(1))
        out: Tensor = function(phi(x["q"]), phi(x["k"]), x["v"], **gates, **options)[0]
        return out

    return call


@contextmanager
def separate() -> Iterator[None]:
    """A context in which flash-linear-attention does not call FlashQLA, which is a peer of its own."""
    name = "FLA_FLASH_QLA"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _feature_map(point: Point) -> Callable[[Tensor], Tensor]:
    """φ as the layers of flash-linear-attention compute it."""
    if point.feature_map is None:
        return lambda x: x
    if point.feature_map == "elu+1":
        return lambda x: F.elu(x) + 1
    nu = int(point.feature_map.removeprefix("dpfp-"))
    made: Callable[[Tensor], Tensor] = import_module("fla.modules.feature_map").DPFPFeatureMap(point.D, nu)
    return made


def flash_qla(point: Point) -> Call | None:
    """FlashQLA's gated delta rule, in TileLang for Hopper and Blackwell: 128 features, in 16 bits."""
    if point.device == "cpu" or point.rule != "gated_delta" or point.D != 128 or point.T == 1 or point.denominator:
        return None
    if point.feature_map is not None or point.feature_norm not in (None, "l2"):
        return None
    options = {"scale": 1.0, "output_final_state": True, "use_qk_l2norm_in_kernel": point.feature_norm == "l2"}
    function = import_module("flash_qla").chunk_gated_delta_rule
    return lambda x: function(x["q"], x["k"], x["v"], x["g"], x["beta"], **options)[0]


def transformers(point: Point) -> Call | None:
    """The gated delta rule of transformers, in plain torch for CPUs. Its backward is quadratic in T."""
    if point.device != "cpu" or point.rule != "gated_delta" or point.T == 1:
        return None
    if point.denominator or point.feature_map is not None or point.feature_norm not in (None, "l2"):
        return None
    import_module("transformers").logging.set_verbosity_error()
    model = import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    function = partial(
        model.torch_chunk_gated_delta_rule,
        output_final_state=True,
        use_qk_l2norm_in_kernel=point.feature_norm == "l2",
    )

    def call(x: dict[str, Any]) -> Tensor:
        out: Tensor = function(x["q"], x["k"], x["v"], x["g"], x["beta"])[0]
        return out * point.D**0.5  # undoes its fixed scale D^-0.5

    return call


LEADER = "flash-linear-attention"
PEERS: dict[str, Callable[[Point], Call | None]] = {
    LEADER: flash_linear_attention,
    "flash-qla": flash_qla,
    "transformers": transformers,
}


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def calls(point: Point) -> tuple[dict[str, Call], list[str]]:
    """The peers that serve a point, and the errors of installed peers that are broken."""
    found: dict[str, Call] = {}
    broken: list[str] = []
    for name, adapter in PEERS.items():
        try:
            if (call := adapter(point)) is not None:
                found[name] = call
        except ModuleNotFoundError:  # not installed
            continue
        except Exception as error:  # a broken peer must not stop our own measurement
            broken.append(f"{name}: {in_a_line(error)}")
    return found, broken


def versions() -> dict[str, str]:
    """The versions of PyTorch, Triton and the installed peers."""
    found = {}
    for name in (*PEERS, "fla-core", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"torch": torch.__version__} | found
