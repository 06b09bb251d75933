"""Swaps the self-attention of a transformers model for fast weights, and restores such a model from its files.

A converted module keeps its class as a base, its projections and its `forward`. Three things change. Attention itself,
`softmax(q kᵀ) v`, becomes `FastWeightMemory`, a new child `fast_weights`. The memory gets the [B, T] mask, which the
model hands down as a keyword. And the cache holds the memory's state in place of keys and values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fwp import errors
from fwp.errors import suggest
from fwp.interop.transformers.cache import FastWeightCacheLayer, fast_weight_layer
from fwp.interop.transformers.memory import FastWeightMemory, suited_options
from fwp.rules import RULES

MODEL_TYPE = "fwp_converted"  # in config.json: without this module transformers refuses to load the model
ATTENTION = "fwp_converted"  # the attention function of converted modules
_CACHES = ("cache", "past_key_values", "layer_past")  # the cache's names, in transformers 5.24 and before


class Tokens(NamedTuple):
    """What a converted module must know about the tokens: mask [B, T] bool, cu_seqlens [N + 1] of packed sequences."""

    mask: Tensor | None
    cu_seqlens: Tensor | None


class _Call(NamedTuple):
    """What the attention function of a converted module gets beside q, k and v."""

    x: Tensor
    tokens: Tokens
    layer: FastWeightCacheLayer | None


def _program(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    fast_weight_call: _Call | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function of a converted module: q, k, v [B, H, T, K] → o [B, T, H, K]."""
    if fast_weight_call is None:
        raise ValueError(
            f"attn_implementation: expected {ATTENTION!r} in modules of fwp.convert only, got it elsewhere"
        )
    if is_causal is False:
        raise ValueError("is_causal: expected True in a model with fast weights, which hold the past only, got False")
    x, tokens, layer = fast_weight_call
    q, k, v = (y.transpose(1, 2) for y in (query, key, value))
    return module.fast_weights(x, q, k, v, *tokens, layer), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _program)


class _Derived:
    """The first base of every class that is made of a class of transformers, which is the second base."""

    @classmethod
    def attributes(cls, base: Any) -> dict[str, Any]:
        """What a class derived from `base` has beside the methods of this one."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled by the bases, since the class has no place in a module."""
        mixins: list[Any] = []
        base: Any = type(self)
        while issubclass(base, _Derived):
            mixin, base = base.__bases__
            mixins.append(mixin)
        return _new, (mixins[::-1], base), self.__dict__


class _ConvertedAttention(_Derived):
    """A self-attention module with fast weights; derived classes have the module's class as their second base."""

    _names: tuple[str, ...]
    alone: bool
    rotary: bool
    layer_idx: int

    @classmethod
    def attributes(cls, base: Any) -> dict[str, Any]:
        return {"_names": _parameters(base)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args)) | kwargs
        tokens = given.pop("fast_weight_tokens", None)
        if tokens is None:
            raise TypeError(
                f"fast_weight_tokens: expected it from the model's forward, but {type(self).__name__} got none; "
                "the model hands no keyword arguments to its layers"
            )
        caches = [given.pop(name, None) for name in _CACHES]
        cache = next((x for x in caches if x is not None), None)
        layer = None if cache is None else fast_weight_layer(cache, self.layer_idx, self.alone)
        given["attention_mask"] = None
        if not self.rotary:
            cos, sin = given["position_embeddings"]
            given["position_embeddings"] = torch.ones_like(cos), torch.zeros_like(sin)
        call = _Call(given["hidden_states"], tokens, layer)
        return super().forward(**given, fast_weight_call=call)  # type: ignore[misc]


class _ConvertedModel(_Derived):
    """A model, head included: it restores its converted modules when it is made, and prepares caches for them."""

    @classmethod
    def attributes(cls, base: Any) -> dict[str, Any]:
        return {"config_class": _derived(_ConvertedConfig, base.config_class)}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _swap(self)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        modules = converted_modules(self)
        static = generation_config.cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if static and not all(module.alone for module in modules):
            generation_config.cache_implementation = None  # see fast_weight_layer
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = next((model_kwargs[name] for name in _CACHES if model_kwargs.get(name) is not None), None)
        if cache is not None:
            for module in modules:
                fast_weight_layer(cache, module.layer_idx, module.alone)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return done


class _ConvertedStack(_Derived):
    """The part of a model that calls its layers: it hands the mask down to them."""

    _names: tuple[str, ...]

    @classmethod
    def attributes(cls, base: Any) -> dict[str, Any]:
        return {"_names": _parameters(base)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args)) | kwargs
        return super().forward(**given, fast_weight_tokens=tokens_of(given))  # type: ignore[misc]


class _ConvertedConfig(_Derived):
    """The configuration of a converted model, `fwp` being what `convert` was asked for."""

    fwp: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"model_type": MODEL_TYPE}  # type: ignore[misc]


class ConvertedConfig(PreTrainedConfig):
    """What `AutoConfig` finds for a converted model's config.json; it makes the original kind of configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = CONFIG_MAPPING[config_dict["fwp"]["base"]]
        _tell_auto_classes(base)
        return _derived(_ConvertedConfig, base).from_dict(config_dict | {"model_type": base.model_type}, **kwargs)


CONFIG_MAPPING.register(MODEL_TYPE, ConvertedConfig)


def convert(
    model: Any,
    rule: str = "gated_delta",
    layers: Iterable[int] | None = None,
    *,
    keep_every: int | None = None,
    **options: Any,
) -> Any:
    """Swaps self-attention of a transformers decoder for fast weights, in place, and returns the model.

    Per layer and key-value head S ← decay(S) + write(k_t, v_t) and o_t = Sᵀ q_t, with the q, k and v of the attention
    module: its projections, their norms and rotary positions are kept and shared. Grouped queries share the state of
    their key-value head. What the rule needs beside is made of the layer's input by new, trainable gates. The model
    computes something else now, so it has to be trained; see `transfer`.

    `model.generate` works as before: its cache holds one state per converted layer, whatever the length of the text.
    `save_pretrained` writes a config.json from which `AutoModelForCausalLM.from_pretrained` restores the model, after
    `import fwp.interop.transformers`; without that import transformers refuses an unknown model type.

    Attention dropout, sliding windows and the soft capping of attention scores act on attention weights, which a
    converted layer does not have; there they have no effect. Packed sequences are told apart by `cu_seq_lens_q`, or by
    `position_ids` without an `attention_mask`, as in transformers.

    Args:
        model: a `PreTrainedModel` with causal self-attention through transformers' attention interface.
        rule: a name of `fwp.RULES`.
        layers: the indices of the layers to convert; None: all.
        keep_every: n, every n-th layer keeps its softmax attention: layers n − 1, 2n − 1, …
        options: feature_map (a name of `fwp.FEATURE_MAPS`, or "hedgehog" for learned features), feature_norm,
            denominator and backend of `fwp.fast_weights`, and rotary (False: no rotary positions in these layers).
            By default rules that erase have unit keys (feature_norm="l2"); the others have "elu+1" features and
            attention normalisation.

    Raises: TypeError and ValueError for a model or an option that doesn't fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if isinstance(model.config, _ConvertedConfig):
        raise ValueError("model: expected one that is not converted yet, got a converted one")
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}{suggest(str(rule), RULES)}")
    asked = suited_options(rule, options)
    found = {module.layer_idx: module for module in self_attention(model)}
    _check_model(model, list(found.values()), asked["rotary"])
    chosen = sorted(_chosen(found, layers, keep_every))
    spec = {"base": model.config.model_type, "rule": rule, "layers": chosen, "options": asked}
    with torch.device("meta"):  # whatever does not fit raises here, while the model is still as it was
        for i in chosen:
            _memory(found[i], spec)
    _tell_auto_classes(type(model.config))
    model.config.__class__ = _derived(_ConvertedConfig, type(model.config))
    model.config.fwp = spec
    model.__class__ = _derived(_ConvertedModel, type(model))
    _swap(model)
    return model


def converted_modules(model: Any) -> list[Any]:
    """The attention modules with fast weights, in the order of their layers."""
    return [module for module in model.modules() if isinstance(module, _ConvertedAttention)]


def original(model: Any) -> Any:
    """A copy of a converted model with its attention back, and without the memories. The copy has its own weights."""
    model = copy.deepcopy(model)
    for module in converted_modules(model):
        del module.fast_weights
        module.config = model.config
        module.__class__ = type(module).__bases__[1]
    for part in {id(x): x for x in (_stack(model), model)}.values():
        while isinstance(part, _ConvertedStack | _ConvertedModel):
            part.__class__ = type(part).__bases__[1]
    del model.config.fwp
    model.config.__class__ = type(model.config).__bases__[1]
    if model.config._attn_implementation == ATTENTION:
        model.config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    return model


def _swap(model: Any) -> None:
    """Makes fast weight modules of those that `model.config.fwp` names. Some models are made with them already."""
    spec = model.config.fwp
    found = list(self_attention(model))
    alone = len(spec["layers"]) == len(found)
    for module in found:
        if module.layer_idx in spec["layers"] and not isinstance(module, _ConvertedAttention):
            _swap_module(module, spec, alone)
    stack = _stack(model)
    if not isinstance(stack, _ConvertedStack):
        stack.__class__ = _derived(_ConvertedStack, type(stack))
    if alone:  # no layer needs a mask of T × T
        model.config._attn_implementation = ATTENTION


def _swap_module(module: Any, spec: dict[str, Any], alone: bool) -> None:
    """Makes a self-attention module one with fast weights, whose gates have its device and dtype."""
    weight = next(x for x in module.parameters() if x.dim() == 2)
    dtype = weight.dtype if weight.dtype in errors.FLOATS else torch.get_default_dtype()
    module.fast_weights = _memory(module, spec).to(weight.device, dtype)
    module.alone, module.rotary = alone, spec["options"]["rotary"]
    module.config = copy.copy(module.config)
    module.config._attn_implementation = ATTENTION
    module.__class__ = _derived(_ConvertedAttention, type(module))


def _memory(module: Any, spec: dict[str, Any]) -> FastWeightMemory:
    """The fast weights for a self-attention module, with its heads."""
    config = module.config
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"model: expected keys and values of one width, got latent attention, {type(module).__name__}")
    query_heads = config.num_attention_heads
    heads = getattr(module, "kv_heads", None) or getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", config.hidden_size // query_heads)
    return FastWeightMemory(spec["rule"], config.hidden_size, query_heads, heads, head_dim, spec["options"])


def self_attention(model: Any) -> Iterator[Any]:
    """The causal self-attention modules that call transformers' attention interface."""
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        calls_interface = "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())
        if isinstance(module, _ConvertedAttention) or (
            calls_interface and isinstance(getattr(module, "layer_idx", None), int) and module.is_causal
        ):
            yield module


def _stack(model: Any) -> Any:
    """The innermost model that holds all self-attention modules, such as the `LlamaModel` of a `LlamaForCausalLM`."""
    wanted = {id(module) for module in self_attention(model)}
    whole = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and wanted <= {id(module) for module in part.modules()}
    ]
    return whole[-1]


def _chosen(found: dict[int, Any], layers: Iterable[int] | None, keep_every: int | None) -> set[int]:
    """The layers to convert."""
    count = len(found)
    if keep_every is not None:
        errors.size("keep_every", keep_every, 2)
        if layers is not None:
            raise ValueError("keep_every: expected None beside layers, got a number")
        return {i for i in found if (i + 1) % keep_every}
    if layers is None:
        return set(found)
    chosen = {i + count if isinstance(i, int) and i < 0 else i for i in layers}
    if not chosen or not all(i in found for i in chosen):
        raise ValueError(f"layers: expected some of the {count} layers with attention, got {sorted(chosen)}")
    return chosen


def _check_model(model: Any, modules: list[Any], rotary: bool) -> None:
    """Refuses models in which the swap would not be right."""
    name = type(model).__name__
    if not modules:
        raise ValueError(
            "model: expected causal self-attention that has a layer_idx and calls ALL_ATTENTION_FUNCTIONS, "
            f"found none in {name}"
        )
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"model: expected a decoder without cross attention, got {name}")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"model: expected a language model with one configuration, got {name} of several")
    if not rotary and not all("position_embeddings" in _parameters(type(x)) for x in modules):
        raise ValueError(f"rotary: False needs attention that is given position_embeddings, got {name}")


def tokens_of(given: dict[str, Any]) -> Tokens:
    """The mask and the packing of the tokens that a model's forward is given."""
    x = given.get("input_ids")
    x = given.get("inputs_embeds") if x is None else x
    mask, cu_seqlens, positions = (given.get(name) for name in ("attention_mask", "cu_seq_lens_q", "position_ids"))
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected [B, T] in a model with fast weights, got {kind}")
        mask = mask[:, -x.shape[1] :].to(x.device, torch.bool) if x is not None else mask.bool()
    elif cu_seqlens is None and positions is not None and x is not None and positions.dim() == 2:
        starts = positions.expand(x.shape[0], -1).diff(dim=1, prepend=positions.new_full((x.shape[0], 1), -2)) != 1
        if starts[:, 1:].any():
            borders = starts.flatten().nonzero()[:, 0]
            cu_seqlens = torch.cat([borders, borders.new_full((1,), starts.numel())])
    return Tokens(mask, cu_seqlens)


def _parameters(module: Any) -> tuple[str, ...]:
    """The names of a module's forward, self left out."""
    return tuple(inspect.signature(module.forward).parameters)[1:]


_classes: dict[tuple[Any, Any], Any] = {}


def _derived(mixin: Any, base: Any) -> Any:
    """The class FastWeight… of a mixin and a class of transformers, always the same one."""
    if (mixin, base) not in _classes:
        name = base.__name__ if base.__name__.startswith("FastWeight") else f"FastWeight{base.__name__}"
        _classes[mixin, base] = type(name, (mixin, base), {"__module__": __name__, **mixin.attributes(base)})
    return _classes[mixin, base]


def _new(mixins: list[Any], base: Any) -> Any:
    """An object without attributes, of a class derived from `base`."""
    for mixin in mixins:
        base = _derived(mixin, base)
    return base.__new__(base)


def _tell_auto_classes(base: Any) -> None:
    """Tells `AutoModelForCausalLM` and its like which converted models belong to a configuration class."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and base in mapping:
            models = mapping[base]
            several = isinstance(models, list | tuple)
            converted = [_derived(_ConvertedModel, x) for x in (models if several else [models])]
            mapping.register(
                _derived(_ConvertedConfig, base), tuple(converted) if several else converted[0], exist_ok=True
            )
