"""Published weights in our layers: `load_layer` knows what other libraries call the parameters of our presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fwp.nn import FastWeightAttention, Layer

AnyLayer = TypeVar("AnyLayer", bound=Layer)

# Published names and ours, of parameters or of the modules that hold them. Of several of ours, a layer has one.
NAMES: dict[str, tuple[str, ...]] = {
    # flash-linear-attention's layers, and the authors' of GatedDeltaNet2 and Comba
    "a_proj": ("gates.g.proj",),
    "f_proj": ("gates.g.proj",),
    "gk_proj": ("gates.g.proj",),
    "b_proj": ("gates.beta.proj", "gates.b.proj"),
    "w_proj": ("gates.w.proj",),
    "A_log": ("gates.g.A_log",),
    "dt_bias": ("gates.g.dt_bias",),
    "g_proj": ("out_gate",),
    "g_norm": ("out_norm",),
    "g_norm_swish_gate": ("out_norm",),
    "o_norm": ("out_norm",),
    "norm": ("out_norm",),
    # its RWKV7Attention
    "r_proj": ("q_proj",),
    **{
        f"{theirs}_lora.lora.{at}": (f"{ours}.{part}",)
        for ours, theirs in {"decay": "w", "rate": "a", "value_mix": "v", "out_gate": "g"}.items()
        for at, part in {"0": "down", "2": "up", "2.bias": "bias"}.items()
    },
    # transformers' OlmoHybridGatedDeltaNet, KimiLinearDeltaAttention, Qwen3NextGatedDeltaNet, Qwen3_5GatedDeltaNet
    "conv1d": ("conv",),
    "forget_gate.f_a_proj": ("gates.g.proj.0",),
    "forget_gate.f_b_proj": ("gates.g.proj.1",),
    "forget_gate.A_log": ("gates.g.A_log",),
    "forget_gate.dt_bias": ("gates.g.dt_bias",),
    "g_a_proj": ("out_gate.0",),
    "g_b_proj": ("out_gate.1",),
    "in_proj_a": ("gates.g.proj",),
    "in_proj_b": ("gates.beta.proj",),
    "in_proj_z": ("out_gate",),
    "out_proj": ("o_proj",),
    # BlinkDL's RWKV_Tmix_x070
    "receptance": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "output": ("o_proj",),
    "ln_x": ("out_norm",),
    **{
        f"{theirs}{at}": (f"{ours}.{part}",)
        for ours, theirs in {"decay": "w", "rate": "a", "value_mix": "v", "out_gate": "g"}.items()
        for at, part in {0: "bias", 1: "down.weight", 2: "up.weight"}.items()
    },
    # pytorch-fast-transformers' AttentionLayer
    "query_projection": ("q_proj",),
    "key_projection": ("k_proj",),
    "value_projection": ("v_proj",),
    "out_projection": ("o_proj",),
    # the language models of 2021
    "o_net": ("o_proj",),
}
TRANSPOSED = {f"{letter}{at}" for letter in "wavg" for at in (1, 2)}  # RWKV_Tmix_x070 multiplies from the left
# Ours, and the published parameters that it holds one after the other.
JOINED = {
    "conv.weight": [f"{letter}_conv1d.weight" for letter in "qkv"],
    "mix": [f"x_{letter}" for letter in "rwkvag"],
}


def load_layer(layer: AnyLayer, state_dict: Mapping[str, Tensor]) -> AnyLayer:
    """Copies published weights into a layer, and returns it. Every weight of both sides must find its place.

    layer: a preset of `fwp.nn` with the options of the published layer: numbers of heads, widths, out_gate, norm_eps,
        allow_neg_eigval and so on. Weights don't tell them all.
    state_dict: that of the published layer alone, or of a layer of ours. Published are, by preset::

            linear_transformer    pytorch-fast-transformers' AttentionLayer
            delta_net_2021        the authors' language models, without residual connection and layer norm
            rwkv7                 BlinkDL's RWKV_Tmix_x070, flash-linear-attention's RWKV7Attention
            gated_delta_net       flash-linear-attention's GatedDeltaNet, transformers' OlmoHybridGatedDeltaNet,
                                  Qwen3NextGatedDeltaNet and Qwen3_5GatedDeltaNet
            kda                   flash-linear-attention's KimiDeltaAttention, whose bias of g_proj needs
                                  out_gate_bias=True; transformers' KimiLinearDeltaAttention
            delta_net, gla, gdn2, comba, delta_product, gated_delta_product
                                  flash-linear-attention's DeltaNet, GatedLinearAttention, GatedDeltaNet2, Comba and
                                  GatedDeltaProduct (`delta_product` has use_forget_gate=False)

    ValueError with the name of a weight that is missing, has no place or has another shape.
    """
    own, found = layer.state_dict(), {}
    for key, x in _joined(own, _split(layer, state_dict)).items():
        names = _names(key)
        name = next((name for name in names if name in own), None)
        if name is None or name in found:
            meaning = f", which would be {names[-1]!r}" if name is None and names[-1] != key else ""
            raise ValueError(f"state_dict: expected weights with a place in the layer, got {key!r}{meaning}")
        x = x.T if key in TRANSPOSED else x
        shape = own[name].shape
        if [n for n in x.shape if n > 1] != [n for n in shape if n > 1]:
            raise ValueError(f"state_dict[{key!r}]: expected {tuple(shape)} for {name}, got {tuple(x.shape)}")
        found[name] = x.reshape(shape)
    if missing := own.keys() - found.keys():
        raise ValueError(f"state_dict: expected weights for {', '.join(sorted(missing))} too, got none")
    layer.load_state_dict(found)
    return layer


def _names(key: str) -> list[str]:
    """What a weight may be called here, the likeliest last."""
    names = [key]
    for end in [i for i, letter in enumerate(key) if letter == "."] + [len(key)]:
        names += [ours + key[end:] for ours in NAMES.get(key[:end], ())]
    return names


def _split(layer: Layer, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with joint projections taken apart."""
    weights = dict(state_dict)
    if not isinstance(layer, FastWeightAttention):
        return weights
    Hq, Hk, Hv = layer.heads
    K, V, group = layer.widths[0] // Hq, layer.widths[2] // (layer.writes_per_read * Hv), max(1, Hv // Hk)
    joint = {  # for each of so many heads, rows of these projections
        "in_proj_qkvz": (Hk, {"q_proj": K, "k_proj": K, "v_proj": group * V, "g_proj": group * V}),
        "in_proj_ba": (Hk, {"b_proj": group, "a_proj": group}),
        "in_proj_qkv": (1, dict(zip(("q_proj", "k_proj", "v_proj"), layer.widths))),
        "qkvb_net": (Hq, {"q_proj": K, "k_proj": K, "v_proj": V, "b_proj": 1}),
    }
    for name, (heads, rows) in joint.items():
        x = weights.pop(f"{name}.weight", None)
        if x is None:
            continue
        if x.shape[0] != heads * sum(rows.values()):
            wanted = (heads * sum(rows.values()), layer.embed_dim)
            raise ValueError(f"state_dict['{name}.weight']: expected {wanted}, got {tuple(x.shape)}")
        parts = x.unflatten(0, (heads, -1)).split(list(rows.values()), 1)
        weights |= {f"{part}.weight": y.flatten(0, 1) for part, y in zip(rows, parts)}
    return weights


def _joined(own: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with those together that one parameter of ours holds."""
    for name, parts in JOINED.items():
        there = [part for part in parts if part in weights]
        if name not in own or not there:
            continue
        if len(there) < len(parts):
            raise ValueError(f"state_dict: expected {', '.join(parts)}, got only {', '.join(there)}")
        taken = [weights.pop(part) for part in parts]
        weights[name] = torch.cat([x.reshape(1, -1) for x in taken] if name == "mix" else taken)
    return weights
