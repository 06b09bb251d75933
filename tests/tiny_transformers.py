"""Tiny random models of transformers, large enough in their weights to generate varied text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_OF_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _OF_GPT2 | {"n_positions": 512},
    "llama": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "mistral": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt_neox": _SIZES,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "stablelm": _GROUPED,
    "mixtral": _GROUPED | {"num_local_experts": 2},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "bert": _SIZES,
}


def tiny(kind: str, auto: Any = AutoModelForCausalLM, attn_implementation: str | None = None, **more: Any) -> Any:
    """A model of that kind, always with the same weights."""
    options = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.4}
    config = AutoConfig.for_model(kind, **(options | _CONFIGS[kind] | more))
    given = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return auto.from_config(config, **given).eval()


def text(B: int, T: int, seed: int = 0) -> Tensor:
    """Random tokens [B, T]."""
    return torch.randint(2, 61, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: Tensor, new: int = 16, **options: Any) -> Tensor:
    """What the model says next, [B, T + new]."""
    return model.generate(ids, max_new_tokens=new, **{"do_sample": False, **options})
