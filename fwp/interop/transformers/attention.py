"""Linear attention as attention functions of transformers: the quick way, which keeps the whole cache of keys.

The functions compute exactly what a fast weight memory without gates would, so they need no change of the model. They
run over all cached keys for every new token. `fwp.convert` gives a state of constant size, and gates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from fwp.functional import fast_weights, read

# name → feature map φ, and whether φ is of √scaling · x, since it approximates the softmax of scaling · qᵀk
IMPLEMENTATIONS: dict[str, tuple[str, bool]] = {
    "fwp_linear": ("elu+1", False),  # Katharopoulos et al. 2020, arXiv 2006.16236
    "fwp_relu": ("relu", False),
    "fwp_dpfp": ("dpfp-1", False),  # Schlag, Irie and Schmidhuber 2021, arXiv 2102.11174
    "fwp_taylor": ("taylor", True),  # Based, Arora et al. 2024, arXiv 2402.18668
    "fwp_favor": ("favor+", True),  # Performer, Choromanski et al. 2021, arXiv 2009.14794
}


def register() -> tuple[str, ...]:
    """Adds the attention functions of `IMPLEMENTATIONS` to transformers, and returns their names.

    After it `attn_implementation="fwp_linear"` works in `from_config`, `from_pretrained` and `set_attn_implementation`.
    Attention becomes o_t = Σ_i φ(k_i)ᵀφ(q_t) v_i / Σ_i φ(k_i)ᵀφ(q_t), over i ≤ t in a decoder and over all i in an
    encoder and in cross attention. Grouped queries share keys. Padding is left out. Packed sequences are told apart as
    in transformers: by position_ids, where there is neither an attention_mask nor a cache.

    transformers does not write the attention function into config.json, so that a saved model would silently come back
    with softmax. Therefore `register` makes configurations write these names. Such a model can't be loaded before
    `register` is called, and then it comes back as it was.

    The functions raise a ValueError where they would be wrong: for masks that are not padding, a causal order or packed
    sequences, as those of a sliding window that is shorter than the text; for biases, sinks and soft caps of attention
    scores; for static caches, whose empty slots would count; and for `output_attentions`. Dropout of attention weights
    can't be done, since there are none: in training a warning says so. torch.compile and torch.export get one graph if
    an attention_mask is given; without it transformers looks for packed sequences, which depends on values.
    """
    for name, (feature_map, scaled) in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(_attention, feature_map=feature_map, scaled=scaled))
        AttentionMaskInterface.register(name, _mask)
    config: Any = PreTrainedConfig
    if not hasattr(config._remove_keys_not_serialized, "before_fwp"):
        config._remove_keys_not_serialized = _recording(config._remove_keys_not_serialized)
    return tuple(IMPLEMENTATIONS)


def _recording(remove: Callable[..., None]) -> Callable[..., None]:
    """The method that drops what config.json does not hold, which now keeps the name of our attention functions."""

    def remove_keys_not_serialized(self: Any, d: dict[str, Any]) -> None:
        implementation = d.get("_attn_implementation_internal")
        remove(self, d)
        if implementation in IMPLEMENTATIONS:
            d["attn_implementation"] = implementation

    remove_keys_not_serialized.before_fwp = remove  # type: ignore[attr-defined]
    return remove_keys_not_serialized


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What `_attention` gets as its mask: None or [B, Tk], False or 0 for padding.

    It is bool, or int64 with the number ≥ 1 of the sequence that a token belongs to.
    """
    plain = None if attention_mask is None else attention_mask[:, :kv_length].to(device, torch.bool)
    if mask_function is bidirectional_mask_function:
        return plain
    if isinstance(q_offset, Tensor) or kv_offset != 0 or kv_length != q_offset + q_length:
        raise ValueError(
            f"cache: expected a DynamicCache without a sliding window, got one of {kv_length} slots "
            f"for {int(q_offset) + q_length} tokens"
        )
    if mask_function is causal_mask_function:
        return plain
    rows, columns = (torch.arange(n, device=device) for n in (q_length, kv_length))
    batch = torch.arange(batch_size, device=device)
    allowed = mask_function(batch.view(-1, 1, 1, 1), batch.new_zeros(1, 1, 1, 1), rows.view(-1, 1) + q_offset, columns)
    allowed = allowed.expand(batch_size, 1, q_length, kv_length)[:, 0]  # [B, Tq, Tk]
    causal = (rows.unsqueeze(1) + q_offset) >= columns
    first = allowed.int().argmax(-1)  # [B, Tq], where each token's sequence begins
    if q_length == kv_length and torch.equal(allowed, causal & (first.unsqueeze(-1) == first.unsqueeze(1))):
        number = first.diff(dim=1, prepend=first[:, :1]).ne(0).cumsum(1) + 1
        if number.amax() > 1:
            return number if plain is None else number * plain
        return plain
    if torch.equal(allowed, causal.expand_as(allowed)):
        return plain
    raise ValueError(
        "attention_mask: expected padding, a causal order or packed sequences, got another mask, "
        f"as of a sliding window shorter than the {kv_length} tokens"
    )


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    feature_map: str,
    scaled: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D] → o [B, Tq, Hq, D] and no weights."""
    for name in ("softcap", "s_aux", "position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, since linear attention has no scores to change, got a value")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False, since linear attention makes no weights, got True")
    if dropout:
        warnings.warn("dropout of attention weights is left out: linear attention has none", stacklevel=2)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, T], got {tuple(attention_mask.shape)}")
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None and len(borders) > 2 and (attention_mask is None or attention_mask.dtype == torch.bool):
        raise ValueError("cu_seq_lens_q: expected position_ids beside it, use_cache=False and no attention_mask")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    if scaled:
        factor = (q.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
        q, k = q * factor, k * factor
    program = partial(fast_weights, "additive", feature_map=feature_map, denominator=True)
    Tq, Tk = q.shape[1], k.shape[1]
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        return _packed(program, q, k, v, attention_mask), None
    if causal and Tq > 1:
        if Tk > Tq:  # the first keys were cached; nobody asks for their outputs
            q = torch.cat([q.new_zeros(()).expand(q.shape[0], Tk - Tq, *q.shape[2:]), q], 1)
        return program(q, k, v, mask=attention_mask)[0][:, Tk - Tq :], None
    nobody = q.new_zeros(()).expand(*k.shape[:2], 1, k.shape[-1])  # writes need no queries
    _, state = program(nobody, k, v, mask=attention_mask)
    out: Tensor = read(state, q, feature_map=feature_map)
    return out, None


def _packed(program: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, number: Tensor) -> Tensor:
    """The outputs where the tokens of each row belong to sequences of these numbers [B, T], 0 for padding."""
    B, T = number.shape
    starts = number.diff(dim=1, prepend=number.new_full((B, 1), -1)) != 0
    borders = starts.flatten().nonzero()[:, 0]
    cu_seqlens = torch.cat([borders, borders.new_full((1,), B * T)])
    q, k, v = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    out, _ = program(q, k, v, mask=number.flatten().unsqueeze(0) > 0, cu_seqlens=cu_seqlens)
    return out.view(B, T, *out.shape[2:])
