"""`fwp.models.Decoder` as a model of transformers, known to its Auto classes as "fwp"."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fwp.config import DecoderConfig
from fwp.interop.transformers.cache import LoneFastWeightCacheLayer
from fwp.models import Decoder
from fwp.nn.stateful import carry

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # 5.24, and before


@strict
class FwpConfig(PreTrainedConfig):
    """The fields of `fwp.config.DecoderConfig`, under transformers' names where it has some.

    rule: a name of `fwp.RULES` for layers without a preset. attention: further options of the layers, such as
    {"feature_map": "dpfp-1"}; names and numbers only, since they stand in config.json.
    """

    model_type = "fwp"
    attribute_map = {  # noqa: RUF012 - transformers' own form
        "embed_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ff_dim": "intermediate_size",
    }

    vocab_size: int = 50257
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    preset: str | None = "gated_delta_net"
    rule: str | None = None
    attention: dict[str, Any] | None = None
    intermediate_size: int | None = None
    ff_activation: str = "gelu"
    norm: str = "rms"
    placement: str = "pre"
    dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def decoder_config(self) -> DecoderConfig:
        """What `fwp.models.Decoder` is made from. ValueError for a rule beside a preset, which has its own."""
        attention: Mapping[str, Any] = self.attention or {}
        if self.rule is not None:
            if self.preset is not None:
                raise ValueError(f"rule: expected None with the preset {self.preset!r}, got {self.rule!r}")
            attention = {"rule": self.rule, **attention}
        return DecoderConfig(
            self.vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.num_attention_heads,
            self.preset,
            attention,
            self.intermediate_size,
            self.ff_activation,
            self.norm,  # type: ignore[arg-type]  # checked there
            self.placement,  # type: ignore[arg-type]
            self.dropout,
            self.tie_word_embeddings,
        )


class _StateLayer(LoneFastWeightCacheLayer):
    """The `LayerState` of one block."""

    is_croppable = False  # what was written can't be taken back

    def keep(self, state: Any, tokens: int) -> None:
        self.state, self.length = state, self.length + tokens
        self.has_previous_state[0] = True


class FwpForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder on fast weights that predicts the next token: `generate`, Trainer, saving and loading as usual.

    Its cache holds the states of the blocks, whose size doesn't depend on the text. Padding on either side changes
    nothing. Packed sequences are told apart by `cu_seq_lens_q`, or by `position_ids` that begin anew.
    Assisted generation is refused by transformers, since a state can't be taken back.
    """

    config_class = FwpConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _tied_weights_keys = {"decoder.head.weight": "decoder.embedding.weight"}  # noqa: RUF012 - transformers' own form
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: FwpConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.decoder_config())
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder has drawn its weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.head

    def set_output_embeddings(self, value: Any) -> None:
        self.decoder.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, T] or inputs_embeds [B, T, E] → logits, the loss of labels, and the cache.

        attention_mask: [B, T], or [B, past + T] with a cache, 0 for padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds, got both or neither")
        x = self.decoder.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        layers = None if cache is None else [_layer(cache, i) for i in range(len(self.decoder.blocks))]
        mask = None if attention_mask is None else _tokens(attention_mask, T)
        borders = cu_seq_lens_q
        if borders is None and mask is None and position_ids is not None and layers is None:
            borders = _borders(position_ids.expand(B, T))
        states = None if layers is None else [layer.state for layer in layers]
        if borders is not None:
            if layers is not None and any(layer.state is not None for layer in layers):
                raise ValueError("cu_seq_lens_q: expected None with a cache that has seen tokens, got packed sequences")
            x, mask = x.reshape(1, B * T, -1), None if mask is None else mask.reshape(1, B * T)
            borders = borders.to(x.device)
        seen: list[Tensor] | None = [] if output_hidden_states else None
        call = carry
        if self.gradient_checkpointing and self.training:
            call = lambda block, *args, **options: self._gradient_checkpointing_func(  # noqa: E731
                partial(carry, block, **options), *args
            )
        x, after = self.decoder.mix(self.decoder.dropout(x), states, mask, borders, call, seen)
        if layers is not None and borders is None:
            for layer, state in zip(layers, after):
                layer.keep(state, T)
        x = self.decoder.norm(x.view(B, T, -1))
        if seen is not None:
            seen = [*(y.view(B, T, -1) for y in seen[:-1]), x]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = {"loss": loss, "logits": logits, CACHE: cache, "hidden_states": None if seen is None else tuple(seen)}
        result = CausalLMOutputWithPast(**out)
        return result if return_dict is not False else result.to_tuple()

    def _prepare_cache_for_generation(  # type: ignore[override]  # whose result differs between versions
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache of states, whatever kind is asked for: all are of constant size."""
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            return
        model_kwargs[CACHE] = Cache(layers=[_StateLayer() for _ in self.decoder.blocks])


def _layer(cache: Any, i: int) -> _StateLayer:
    """The cache's layer of that index, which becomes one of states if it is still empty."""
    if not isinstance(cache, Cache):
        raise TypeError(f"{CACHE}: expected a Cache, got {type(cache).__name__}")
    while len(cache.layers) <= i:
        cache.layers.append(_StateLayer())
    layer: Any = cache.layers[i]
    if not isinstance(layer, _StateLayer):
        if layer.get_seq_length() > 0:
            raise ValueError(f"{CACHE}: expected states in layer {i}, got keys and values of another model")
        cache.layers[i] = layer = _StateLayer()
    return layer


def _tokens(attention_mask: Tensor, T: int) -> Tensor | None:
    """[B, T] bool of the last T tokens; None if all are real, as far as that is known without waiting for a GPU."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected (B, T), got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, -T:].bool()
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _borders(position_ids: Tensor) -> Tensor | None:
    """[N + 1] where positions [B, T] begin anew within a row, the rows laid end to end; None if they never do."""
    if position_ids.device.type == "cpu" and torch.compiler.is_compiling():
        return None
    new = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(new.any()):
        return None
    B, T = position_ids.shape
    first = torch.cat([torch.ones_like(new[:, :1]), new], 1).flatten()
    starts = first.nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([B * T])])


AutoConfig.register("fwp", FwpConfig)
AutoModelForCausalLM.register(FwpConfig, FwpForCausalLM)
