"""Models of transformers that have fast weights already, such as Qwen3-Next and Kimi Linear, on our functions.

Their modules call a gated delta rule or KDA, and a causal convolution before it, as functions of the module's file.
transformers takes them from flash-linear-attention and causal-conv1d where these run, and else from plain PyTorch that
is slow and refuses packed sequences. `install` puts ours in the place of either, on CPUs and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.activations import ACT2FN

from fwp.core import state_dtype
from fwp.interop import fla

FAMILIES = (
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "olmo_hybrid",
    "lara_mini",
    "kimi_linear",
    "bailing_hybrid",
    "glm5_next",
)
_originals: dict[ModuleType, dict[str, Any]] = {}


class Installed:
    """What `install` returns: a context that calls `uninstall` when it is left, unless ours were there before."""

    def __init__(self, new: bool) -> None:
        self._new = new

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._new:
            uninstall()


def install() -> Installed:
    """Lets all models of `FAMILIES`, built before or after, run on `fwp.fast_weights`; also a context manager.

    Packed sequences are kept apart by `cu_seq_lens_q`, by `seq_idx` or by both. These are what transformers'
    DataCollatorWithFlattening gives with return_flash_attn_kwargs and return_seq_idx. Its position_ids alone reach no
    module with fast weights, so they keep nothing apart there.

    RuntimeError if a family's file has other functions than transformers 5.23 and 5.24 have.
    """
    if _originals:
        return Installed(new=False)
    found = {}
    for family in FAMILIES:
        name = f"transformers.models.{family}.modeling_{family}"
        if find_spec(f"transformers.models.{family}") is None:  # not in this version
            continue
        module = import_module(name)
        ours = {function: ours for function, ours in _FUNCTIONS.items() if hasattr(module, function)}
        if not any("delta" in function for function in ours) or not set(_CONVOLUTIONS) <= ours.keys():
            raise RuntimeError(
                f"{name}: expected the functions of transformers 5.23 and 5.24, got those of {transformers.__version__}"
            )
        found[module] = ours
    for module, ours in found.items():
        _originals[module] = {function: getattr(module, function) for function in ours}
        for function, mine in ours.items():
            setattr(module, function, mine)
    return Installed(new=True)


def uninstall() -> None:
    """Takes back `install`: every function is the one that was there before. Nothing happens without it."""
    for module, functions in _originals.items():
        for name, function in functions.items():
            setattr(module, name, function)
    _originals.clear()


# ---- what is installed ----


def _rule(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function of `fwp.interop.fla` with the arguments that these models give."""

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, T = query.shape[:2]
        borders = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
        if borders is None and seq_idx is not None and seq_idx.shape == (B, T):
            borders = _borders(seq_idx)
        elif borders is not None and B != 1:
            raise ValueError(f"query: expected a batch of 1 with cu_seq_lens_q, got {B}")
        x = [y if borders is None else y.flatten(0, 1).unsqueeze(0) for y in (query, key, value, g, beta)]
        out, state = function(
            *x[:3],
            g=x[3],
            beta=x[4],
            initial_state=None if initial_state is None else initial_state.to(state_dtype(value.dtype)),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=borders,
        )
        if state is not None and borders is not None:  # a cache has one state per row: that of its last sequence
            state = state[_last_sequences(borders, B, T)]
        return out.view(B, T, *out.shape[2:]), state

    return rule


def _borders(seq_idx: Tensor) -> Tensor:
    """[N + 1]: where sequences begin and end if the rows of seq_idx [B, T] are laid end to end."""
    B, T = seq_idx.shape
    first = torch.ones(B, T, dtype=torch.bool, device=seq_idx.device)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([B * T])])


def _last_sequences(borders: Tensor, B: int, T: int) -> Tensor:
    """[B]: the sequence that holds the last token of each row."""
    last = torch.arange(1, B + 1, device=borders.device) * T - 1
    return torch.searchsorted(borders[1:].contiguous(), last.to(borders.dtype), right=True)


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """y_t = act(Σ_i w_i ⊙ x_{t−W+1+i} + b) over tokens of the same sequence. hidden_states [B, C, T], weight [C, W]."""
    B, _, T = hidden_states.shape
    W = weight.shape[1]
    x = hidden_states.to(weight.dtype)
    padded = F.pad(x, (W - 1, 0))
    borders = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
    if (seq_idx is None or seq_idx.shape != (B, T)) and borders is not None:
        seq_idx = torch.searchsorted(
            borders[1:].contiguous(), torch.arange(T, device=x.device, dtype=borders.dtype), right=True
        )
        seq_idx = seq_idx.expand(B, T)
    y = x * weight[:, -1:]
    for i in range(W - 1):
        past = padded[:, :, i : i + T]
        if seq_idx is not None and seq_idx.shape == (B, T):  # a cache puts earlier inputs in front, which have no index
            same = F.pad(seq_idx, (W - 1 - i, 0), value=-1)[:, :T] == seq_idx
            past = past * same.unsqueeze(1)
        y = torch.addcmul(y, past, weight[:, i : i + 1])
    return _activated(y, bias, activation).to(hidden_states.dtype)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The next tokens' outputs [B, C, T]. conv_state [B, C, W] or [B, C, W − 1], the last inputs, moves on in place."""
    W, T = weight.shape[1], hidden_states.shape[2]
    stream = torch.cat([conv_state, hidden_states], -1).to(weight.dtype)
    conv_state.copy_(stream[:, :, -conv_state.shape[2] :])
    y = sum(stream[:, :, stream.shape[2] - T - i : stream.shape[2] - i] * weight[:, W - 1 - i, None] for i in range(W))
    assert isinstance(y, Tensor)
    return _activated(y, bias, activation).to(hidden_states.dtype)


def _activated(y: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = y if bias is None else y + bias.unsqueeze(-1)
    return y if activation is None else ACT2FN[activation](y)


_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _rule(fla.chunk_gated_delta_rule),
    "torch_recurrent_gated_delta_rule": _rule(fla.fused_recurrent_gated_delta_rule),
    "chunk_kimi_delta_attention": _rule(fla.chunk_kda),
    "recurrent_kimi_delta_attention": _rule(fla.fused_recurrent_kda),
    **_CONVOLUTIONS,
}
