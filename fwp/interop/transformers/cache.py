"""The cache of a converted model: a layer whose size does not depend on how many tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer, StaticLayer

from fwp._torch_private import tree_leaves, tree_map
from fwp.functional import fast_weights


class Writes(NamedTuple):
    """What some tokens write: the arguments of `fwp.fast_weights` beside the queries.

    k [B, T, Hk, K], v [B, T, Hv, V], gates by name, mask [B, T] bool or None, options: the rule and its settings.
    """

    k: Tensor
    v: Tensor
    gates: Mapping[str, Tensor]
    mask: Tensor | None
    options: Mapping[str, Any]

    def change(self, change: Callable[[Tensor], Tensor]) -> Writes:
        """The same writes with every tensor changed."""
        gates = {name: change(gate) for name, gate in self.gates.items()}
        return Writes(change(self.k), change(self.v), gates, _changed(self.mask, change), self.options)

    def then(self, later: Writes) -> Writes:
        """These writes and those of later tokens."""
        masks = [
            torch.ones(x.k.shape[:2], dtype=torch.bool, device=x.k.device) if x.mask is None else x.mask
            for x in (self, later)
        ]
        return Writes(
            torch.cat([self.k, later.k], 1),
            torch.cat([self.v, later.v], 1),
            {name: torch.cat([gate, later.gates[name]], 1) for name, gate in self.gates.items()},
            None if self.mask is None and later.mask is None else torch.cat(masks, 1),
            self.options,
        )

    def apply(self, q: Tensor, state: Any, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Programs the state and reads it with q [B, T, Hq, K]. Returns what `fwp.fast_weights` does."""
        settings: dict[str, Any] = {**self.options, **self.gates}
        return fast_weights(q=q, k=self.k, v=self.v, mask=self.mask, state=state, cu_seqlens=cu_seqlens, **settings)


class FastWeightCacheLayer(LinearAttentionLayer):
    """The fast weights of one layer, in a transformers `Cache` that has softmax layers too.

    state: what `fwp.fast_weights` returned, of B sequences; None before the first token.
    length: the tokens seen, padding included.

    After `activate_past_recording` it also keeps what was written since the last `crop`, and the state before that.
    So `crop(−n)` can undo the last n of these tokens: it writes the others again.
    """

    is_compileable = False  # the state moves: it is a new tensor after every token
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.length = 0
        self.begin: Any = None
        self.recorded: Writes | None = None

    def program(self, q: Tensor, writes: Writes) -> Tensor:
        """Writes the tokens and reads with q [B, T, Hq, K], from the state on that is kept here."""
        if self.record_past:
            if self.recorded is None:
                self.begin = self.state
            self.recorded = writes if self.recorded is None else self.recorded.then(writes)
        out, self.state = writes.apply(q, self.state)
        self.length += q.shape[1]
        self.has_previous_state[0] = True
        return out

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last −tokens_to_remove tokens, all of which came after the last crop."""
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"tokens_to_remove: expected 0 or the negative number of tokens, got {tokens_to_remove}")
        if count and not self.record_past:
            raise ValueError(
                "crop: expected cache.activate_past_recording() before the tokens that are to be removed, got none"
            )
        known = 0 if self.recorded is None else self.recorded.k.shape[1]
        if count > known:
            raise ValueError(f"tokens_to_remove: expected at most the {known} tokens since the last crop, got {count}")
        if count and self.recorded is not None:
            kept = self.recorded.change(lambda x: x[:, : known - count])
            nobody = kept.k.new_zeros(()).expand(*kept.k.shape[:2], 1, kept.k.shape[-1])  # writes need no queries
            self.state = kept.apply(nobody, self.begin)[1] if known > count else self.begin
            self.length -= count
        self.begin, self.recorded = None, None

    def reset(self) -> None:
        super().reset()
        self.state, self.length, self.begin, self.recorded = None, 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state, self.begin = _changed(self.state, change), _changed(self.begin, change)
        self.recorded = None if self.recorded is None else self.recorded.change(change)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors that are kept."""
        kept: list[Any] = [self.state, self.begin]
        if self.recorded is not None:
            kept += [self.recorded.k, self.recorded.v, dict(self.recorded.gates), self.recorded.mask]
        return sum(x.nbytes for x in tree_leaves(kept) if isinstance(x, Tensor))


class LoneFastWeightCacheLayer(FastWeightCacheLayer, CacheLayerMixin):
    """The same in a cache without softmax layers, which otherwise say how many tokens were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.values = None
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("cache: expected the cache of a model with attention, got one of fast weights")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length


def fast_weight_layer(cache: Any, layer: int, alone: bool) -> FastWeightCacheLayer:
    """The cache's layer of that index, which becomes one of fast weights if it is still empty.

    alone: whether no layer of the model has softmax attention.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"cache: expected a Cache of a decoder, got {type(cache).__name__}")
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= layer:
        raise ValueError(f"cache: expected more than {layer} layers, got {len(cache.layers)}")
    found: Any = cache.layers[layer]
    if isinstance(found, FastWeightCacheLayer):
        return found
    if getattr(found, "is_initialized", False) and found.get_seq_length() > 0:
        raise ValueError(f"cache: expected fast weights in layer {layer}, got keys and values of another model")
    if isinstance(found, StaticLayer) and not alone:
        # transformers leaves out the mask of a single token where not all layers are static
        raise ValueError(
            "cache: expected a DynamicCache in a model with attention beside fast weights, got a StaticCache"
        )
    cache.layers[layer] = made = LoneFastWeightCacheLayer() if alone else FastWeightCacheLayer()
    return made


def _changed(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return None if tree is None else tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, tree)
