"""PyTorch's attention with linear attention inside: `MultiheadAttention` and `scaled_dot_product_attention`.

Both are the rule "additive" of `fwp.fast_weights`, in time and memory linear in the sequence lengths. They take the
arguments of `torch.nn.MultiheadAttention` and `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwp import errors, feature_maps, validate
from fwp.feature_maps import FeatureMap
from fwp.functional import fast_weights, read
from fwp.rules import RULES


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    feature_map: str | FeatureMap | None = "elu+1",
    denominator: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention with PyTorch's arguments: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, V].

    With a_ts = e^(b_s) φ(scale · q_t)ᵀ φ(k_s) over the keys s that query t sees::

        o_t = Σ_s a_ts v_s / (Σ_s a_ts + eps)         0 where Σ_s a_ts = 0
        o_t = Σ_s a_ts v_s                            with denominator=False

    Softmax attention has a_ts = e^(b_s + scale · q_tᵀk_s) instead. The result is [..., Hq, L, V].

    Args:
        query, key, value: with equal leading dimensions, or none. With three dimensions they are [B, L, E], one head.
        attn_mask: bool, True for what takes part, or float, which is added to b. It broadcasts to [..., Hq, L, S] and
            is one of these: a row b of the keys, the same for all queries and heads; the causal mask; both at once. A
            mask with one row, [..., 1, S], isn't looked at. In others the values are checked, which synchronises a GPU.
        dropout_p: of the keys, also in evaluation as in PyTorch's function. A key's weights are dropped for all queries
            of a head at once; PyTorch draws each entry of the weights by itself, which would need all L × S of them.
        is_causal: query t sees the keys 0 … t, also where L ≠ S. Expects attn_mask=None.
        scale: of the queries, before φ. None: 1/√E.
        enable_gqa: whether Hq may be a multiple of H. Neighbouring queries then share a key.
        feature_map, denominator, eps: as in `fwp.fast_weights`.

    Raises: ValueError for shapes or masks that can't be served, TypeError for dtypes.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, equations 4, 5 and 8.
    """
    _check_options(denominator, eps)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None with is_causal=True, got a tensor")
    for name, x in (("query", query), ("key", key), ("value", value)):
        errors.tensor(name, x, (None,) * x.dim() if isinstance(x, Tensor) else ())
    if query.dim() < 2:
        raise ValueError(f"query: expected (..., L, E), got {tuple(query.shape)}")
    heads = query.dim() > 3
    if not heads:
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        attn_mask = attn_mask.unsqueeze(-3) if attn_mask is not None and attn_mask.dim() > 2 else attn_mask
    *lead, Hq, L, E = query.shape
    *_, H, S, _ = key.shape if key.dim() > 2 else (1, *key.shape)
    errors.tensor("key", key, (*lead, None, None, E), query.dtype, query.device)
    errors.tensor("value", value, (*lead, H, S, None), query.dtype, query.device)
    if Hq != H and not (enable_gqa and H and Hq % H == 0):
        wanted = f"a divisor of {Hq} heads" if enable_gqa else f"{Hq} heads without enable_gqa"
        raise ValueError(f"key: expected {wanted}, got {H}")
    bias = None
    if attn_mask is not None:
        is_causal, bias = _as_key_bias(attn_mask, (*lead, Hq, L, S), query)
    q, k, v = (x.reshape(-1, *x.shape[-3:]).transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    q = q * (E**-0.5 if scale is None else scale)
    v = v * _kept_keys(v, dropout_p)
    o = _attend(q, k, v, bias, is_causal, feature_map=feature_map, denominator=denominator, eps=eps)
    o = o.transpose(1, 2).reshape(*lead, Hq, L, v.shape[-1])
    return o if heads else o.squeeze(-3)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with linear attention: the same arguments, parameters and state dicts.

    It is `scaled_dot_product_attention` of this module between PyTorch's projections, and works in
    `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and `nn.Transformer`, where `convert_attention` puts it.
    In evaluation mode these would compute softmax attention from its parameters without calling it; it makes them
    decline.

    Args:
        embed_dim … dtype: as in `torch.nn.MultiheadAttention`. dropout: in training, of the keys as above.
            add_bias_kv, add_zero_attn: add a key that every query sees, with causal attention too.
        feature_map, denominator, eps: as in `fwp.fast_weights`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        feature_map: str | FeatureMap | None = "elu+1",
        denominator: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._set_options(feature_map=feature_map, denominator=denominator, eps=eps)

    def _set_options(self, *, feature_map: str | FeatureMap | None, denominator: bool, eps: float) -> None:
        _check_options(denominator, eps)
        feature_maps.get(feature_map)
        self.feature_map, self.denominator, self.eps = feature_map, denominator, eps
        # The transformer layers look here. True: they may compute softmax attention by a fused kernel.
        self._qkv_same_embed_dim = False

    def reset_parameters(self) -> None:
        """The first values of `torch.nn.MultiheadAttention`."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        self._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [L, B, E], key [S, B, kdim], value [S, B, vdim] → out [L, B, E] and the weights or None.

        With batch_first=True B comes first. Without a batch there is no B.

        key_padding_mask: [B, S], bool with True for keys to ignore, or float, a bias of each key; see
            `scaled_dot_product_attention`. Outputs of queries at padding are computed too.
        need_weights: whether to return a_ts / (Σ_s a_ts + eps), [B, L, S], or [B, H, L, S] without
            average_attn_weights. It costs time and memory of L × S. Columns of added keys come last.
        attn_mask: None, or the causal mask, or a row of biases for all queries, or both at once, [L, S] or
            [B · H, L, S]; bool with True for what is left out, or float. ValueError for others.
        is_causal: attention is causal. With an attn_mask it promises that this is the causal mask, which is checked
            except under torch.compile. Without this promise the values of the mask have to be looked at.
        """
        if query.is_nested:
            return self._nested(query, key, value, need_weights, average_attn_weights)
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            errors.tensor(name, x, (None, None, width))
        B, S = query.shape[0], key.shape[1]
        errors.tensor("key", key, (B, S, None))
        errors.tensor("value", value, (B, S, None))
        causal, bias = self._masks(query, S, key_padding_mask, attn_mask, is_causal)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._project(query, key, value))  # [B, T, H, D]
        k, v, added = self._add_keys(k, v)
        if bias is not None and added:
            bias = F.pad(bias, (added, 0))
        q = q * self.head_dim**-0.5
        kept = _kept_keys(v, self.dropout if self.training else 0.0)
        options: dict[str, Any] = {"feature_map": self.feature_map, "denominator": self.denominator, "eps": self.eps}
        o = _attend(q, k, v * kept, bias, causal, added, **options).flatten(2)
        out = self.out_proj(o)
        weights = None
        if need_weights:  # what is read where each value says whose it is
            one_hot = torch.eye(S + added, dtype=v.dtype, device=v.device).unsqueeze(1)  # [S, 1, S]
            weights = _attend(q, k, one_hot * kept, bias, causal, added, **options).transpose(1, 2)
            weights = weights.roll(-added, -1)  # [B, H, L, S]
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """PyTorch's projections of q, k and v to [B, T, E] each."""
        matrices: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases)]

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with the added keys in front, and their number."""
        B, H = k.shape[0], self.num_heads
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k.dtype).view(1, 1, H, -1).expand(B, -1, -1, -1))
            values.append(self.bias_v.to(v.dtype).view(1, 1, H, -1).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            keys.append(torch.zeros_like(k[:, :1]) if k.shape[1] else k.new_zeros(B, 1, *k.shape[2:]))
            values.append(v.new_zeros(B, 1, *v.shape[2:]))
        return torch.cat([*keys, k], 1), torch.cat([*values, v], 1), len(keys)

    def _masks(
        self,
        query: Tensor,
        S: int,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[bool, Tensor | None]:
        """Whether attention is causal, and the bias of each key [B, S] or None."""
        B, L, _ = query.shape
        bias = None
        if attn_mask is not None and not (is_causal and torch.compiler.is_compiling()):
            if attn_mask.dim() == 3:
                kind = torch.bool if attn_mask.dtype == torch.bool else None
                errors.tensor("attn_mask", attn_mask, (B * self.num_heads, L, S), kind)
                attn_mask = attn_mask.unflatten(0, (B, self.num_heads))
            seen = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
            found, bias = _as_key_bias(seen, (B, self.num_heads, L, S), query)
            if is_causal and not found and L > 1:
                raise ValueError("attn_mask: expected the causal mask, as is_causal=True promises, got another")
            is_causal = found or is_causal
        if key_padding_mask is not None:
            kind = key_padding_mask.dtype if key_padding_mask.is_floating_point() else torch.bool
            errors.tensor("key_padding_mask", key_padding_mask, (B, S), kind, query.device)
            padding = key_padding_mask if kind != torch.bool else _log(~key_padding_mask, query)
            bias = padding if bias is None else bias + padding
        return is_causal, bias

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, *weights: bool) -> tuple[Tensor, Tensor | None]:
        """Self attention within each sequence of a nested tensor, which `nn.TransformerEncoder` makes of padding."""
        if query is not key or key is not value:
            raise ValueError("key: expected the query where that is nested, got another tensor")
        lengths = [len(x) for x in query.unbind()]
        x = torch.nested.to_padded_tensor(query, 0.0)  # [B, T, E]
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device).unsqueeze(1)
        out, attention = self(x, x, x, padding, weights[0], None, weights[1])
        rows = [row[:n] for row, n in zip(out, lengths)]
        return torch.nested.as_nested_tensor(rows, layout=query.layout), attention

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, feature_map={self.feature_map!r}, denominator={self.denominator}"


def convert_attention(
    model: nn.Module,
    *,
    feature_map: str | FeatureMap | None = "elu+1",
    denominator: bool = True,
    eps: float = 1e-6,
) -> nn.Module:
    """Turns every `torch.nn.MultiheadAttention` in a model into a `MultiheadAttention` with the same parameters.

    The model is changed and returned. Modules stay the objects they are: optimisers, hooks and names keep hold of
    them. Subclasses with a forward of their own are left alone. ValueError where there is nothing to turn.
    """
    found = [module for module in model.modules() if type(module) is nn.MultiheadAttention]
    if not found:
        raise ValueError(f"model: expected a torch.nn.MultiheadAttention in it, got {type(model).__name__} without")
    for module in found:
        module.__class__ = MultiheadAttention
        assert isinstance(module, MultiheadAttention)
        module._set_options(feature_map=feature_map, denominator=denominator, eps=eps)
    return model


def _check_options(denominator: bool, eps: float) -> None:
    validate.options(RULES["additive"], denominator=denominator, eps=eps)


def _log(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where allowed, else −∞."""
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, -torch.inf)


def _as_key_bias(mask: Tensor, shape: tuple[int, ...], query: Tensor) -> tuple[bool, Tensor | None]:
    """Whether a mask is causal, and the bias that it gives each key, [B, S], None for zeros.

    mask: bool, True for what takes part, or float; it broadcasts to shape = (..., H, L, S). The last query sees all
    keys that any query sees. So its row is the bias, and the other rows equal it, or equal it up to the diagonal.
    """
    lead, S = shape[:-3], shape[-1]
    errors.tensor("attn_mask", mask, (None,) * mask.dim(), torch.bool if mask.dtype == torch.bool else None)
    try:
        mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}") from None
    mask = _log(mask, query) if mask.dtype == torch.bool else mask
    mask = mask.reshape((1,) * (len(shape) - mask.dim()) + tuple(mask.shape))  # [..., H or 1, L or 1, S or 1]
    row, rows = mask[..., :1, -1:, :], mask.shape[-2]
    causal = False
    if rows > 1 or mask.shape[-3] > 1:
        visible = torch.ones(rows, S, dtype=torch.bool, device=mask.device).tril()
        if torch.equal(mask, row.expand_as(mask)):
            pass
        elif rows > 1 and torch.equal(*torch.broadcast_tensors(mask, row.masked_fill(~visible, -torch.inf))):
            causal = True
        else:
            raise ValueError(
                "attn_mask: expected the causal mask or one row for all queries and heads, since linear attention "
                "has no weights to mask one by one, got another"
            )
        if not row.any():
            return causal, None
    return causal, row.squeeze(-3).squeeze(-2).expand(*lead, S).reshape(-1, S)


def _kept_keys(v: Tensor, p: float) -> Tensor:
    """Dropout of keys: 0 with probability p, else 1 / (1 − p), [B, S, H, 1] for v [B, S, H, V]. A 1 for p = 0."""
    errors.number("dropout", p, 0)
    return F.dropout(v.new_ones(*v.shape[:3], 1), p) if p else v.new_ones(())


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    causal: bool,
    always: int = 0,
    *,
    feature_map: str | FeatureMap | None,
    denominator: bool,
    eps: float,
) -> Tensor:
    """Linear attention of q [B, L, Hq, E], k [B, S, H, E] and v [B, S, 1 or H, V]: [B, L, Hq, V].

    bias: b [B, S] of the docstring above. always: number of first keys that every query sees, causal or not.
    """
    B, L, _, _ = q.shape
    v = v.expand(B, -1, -1, -1)
    if bias is not None:
        q, k, v, feature_map = _biased(q, k, v, bias, feature_map)

    def write(k: Tensor, v: Tensor) -> Any:
        nobody = k.new_zeros(()).expand(*k.shape[:2], 1, k.shape[-1])
        options: dict[str, Any] = {"causal": False, "denominator": denominator, "feature_map": feature_map}
        return fast_weights("additive", nobody, k, v, **options)[1]

    if not causal:
        return read(write(k, v), q, feature_map=feature_map, eps=eps)
    state = write(k[:, :always], v[:, :always]) if always else None
    k, v = k[:, always:], v[:, always:]
    T = min(L, k.shape[1])
    o, state = fast_weights(
        "additive",
        q[:, :T],
        k[:, :T],
        v[:, :T],
        feature_map=feature_map,
        denominator=denominator,
        eps=eps,
        state=state,
    )
    if T == L:
        return o
    return torch.cat([o, read(state, q[:, T:], feature_map=feature_map, eps=eps)], 1)


def _biased(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, feature_map: str | FeatureMap | None
) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """q, k and v with features that hold the bias, and the feature map that is left to apply.

    Features that are exponentials stay logarithms, and the bias is added to them. What a key of bias −∞ holds, maybe
    NaN, must not count.
    """
    bias = bias[:, :, None, None]  # [B, S, 1, 1]
    left_out = bias == -torch.inf
    k, v = k.masked_fill(left_out, 0), v.masked_fill(left_out, 0)
    log_phi = feature_maps.logarithm(feature_map)
    if log_phi is None:
        q, k = (feature_maps.transform(x, feature_map, None) for x in (q, k))
        return q, k * bias.exp().to(k.dtype), v, None
    q, k = (feature_maps.log_features(log_phi, x) for x in (q, k))
    return q, k + bias, v.to(k.dtype), "exp"
