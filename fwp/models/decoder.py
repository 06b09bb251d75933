"""A small decoder language model on fast weights: its state is explicit and of constant size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fwp import errors
from fwp.config import DecoderConfig
from fwp.nn import LayerState, StackState
from fwp.nn.block import NORMS, pick
from fwp.nn.stateful import Stateful, carry


class Decoder(Stateful):
    """Embedding → blocks → norm (of "pre" placement) → head.

    Linear weights and embeddings start as N(0, 0.02²) and biases at 0, except within a module whose attribute
    `own_starts` is True, as in RWKV-7's layer. All other parameters start as their modules say.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(config.block(layer) for layer in range(config.num_layers))
        norm = pick("norm", config.norm, NORMS)
        self.norm = norm(config.embed_dim, eps=1e-5) if config.placement == "pre" else nn.Identity()
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the linear weights and embeddings, and ties the head's. The parts come before it."""
        if self.config.tied:
            self.head.weight = self.embedding.weight  # `to_empty` separates them
        for module in _without_own_starts(self):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        state: Sequence[LayerState] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """tokens [B, T] int → logits [B, T, vocab_size] and the state, one `LayerState` per block.

        state, mask [B, T] and cu_seqlens [N + 1] as in `FastWeightAttention`.
        """
        errors.tensor("tokens", tokens, (None, None), torch.int64)
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state: expected {len(self.blocks)} layer states, got {len(state)}")
        x, after = self.mix(self.dropout(self.embedding(tokens)), state, mask, cu_seqlens)
        return self.head(self.norm(x)), after

    def mix(
        self,
        x: Tensor,
        states: Sequence[LayerState | None] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        call: Callable[..., Any] = carry,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, StackState]:
        """The blocks alone: x [B, T, E] → x and the state after it.

        call: runs a block, as block(x, state, mask, cu_seqlens). seen: gets the input of each block and the output.
        """
        after, v_first = [], None
        for block, before in zip(self.blocks, [None] * len(self.blocks) if states is None else states):
            if seen is not None:
                seen.append(x)
            if self.config.preset == "rwkv7":
                x, end, v_first = call(block, x, before, mask, cu_seqlens, v_first=v_first, return_v_first=True)
            else:
                x, end = call(block, x, before, mask, cu_seqlens)
            after.append(end)
        if seen is not None:
            seen.append(x)
        return x, StackState(after)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T], T ≥ 1 → [B, T + max_new_tokens]: continues each row with constant memory per new token.

        temperature: divides the logits; 0, the limit of small ones, takes the likeliest token.
        top_k: draws from the k likeliest tokens only.
        generator: makes the draws. mask: [B, T] bool, False for padding; each row needs a True.
        Dropout is active in training mode. ValueError and TypeError for invalid options.
        """
        errors.tensor("tokens", tokens, (None, None), torch.int64)
        B, T = tokens.shape
        if T == 0:
            raise ValueError(f"tokens: expected (B, T) with T ≥ 1, got {tuple(tokens.shape)}")
        errors.size("max_new_tokens", max_new_tokens, 0)
        errors.number("temperature", temperature, 0)
        if top_k is not None:
            errors.size("top_k", top_k)
        last = tokens.new_full((B,), T - 1)  # the last real token of each row
        if mask is not None:
            errors.tensor("mask", mask, (B, T), torch.bool, tokens.device)
            if not mask.any(1).all():
                raise ValueError("mask: expected a True in each row, got a row without")
            last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(1)
        made, state = [tokens], None
        for _ in range(max_new_tokens):
            logits, state = self(made[-1], state, mask)
            logits = logits[torch.arange(B, device=tokens.device), last]  # [B, vocab_size]
            made.append(_draw(logits, temperature, top_k, generator))
            mask, last = None, torch.zeros_like(last)
        return torch.cat(made, 1)


def _without_own_starts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside this one, but for those with `own_starts` and what is inside them."""
    for child in module.children():
        if not getattr(child, "own_starts", False):
            yield child
            yield from _without_own_starts(child)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row: logits [B, vocab_size] → [B, 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    most, limits = logits.amax(-1, keepdim=True), torch.finfo(logits.dtype)
    below = (logits - most).masked_fill(logits == most, 0)  # the difference of two infinities is 0 here
    scaled = below / min(max(temperature, limits.tiny), limits.max)  # beyond them 0 / 0 or ∞ / ∞ would be NaN
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)
