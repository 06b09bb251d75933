"""The attention functions of `register` against linear attention that is written down as a T × T matrix."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from tiny_transformers import CACHE, greedy, text, tiny
from transformers import AutoModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fwp.interop.transformers import register

NAMES = register()
KINDS = ("gpt2", "llama", "qwen3", "mistral", "gemma", "phi", "phi3", "gpt_neox", "opt", "stablelm")


def features(name: str, x: Tensor, scaling: float) -> Tensor:
    """φ of each attention function, once more."""
    if name == "fwp_linear":
        return torch.nn.functional.elu(x) + 1
    if name == "fwp_relu":
        return x.relu()
    if name == "fwp_dpfp":
        r = torch.cat([x, -x], -1).relu()
        return r * r.roll(1, -1).roll(-2, -1)
    x = x * scaling**0.5
    if name == "fwp_taylor":
        outer = torch.einsum("...i,...j->...ij", x, x).flatten(-2)
        return torch.cat([torch.ones_like(x[..., :1]), x, outer / 2**0.5], -1)
    raise AssertionError(name)


def matrix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, of: str, **kwargs: Any
) -> tuple[Tensor, None]:
    """Linear attention of explicit weights φ(q)ᵀφ(k), which a 4-D mask sets to 0. key has Hkv heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    weights = features(of, query, scaling) @ features(of, key, scaling).transpose(-1, -2)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        mask = mask.tril() if kwargs.get("is_causal", module.is_causal) else mask
    weights = weights.masked_fill(~mask, 0)
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total == 0, 1, total + 1e-6) @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def explicit() -> None:
    for name in NAMES:
        AttentionInterface.register(
            f"matrix_{name}", lambda *args, name=name, **kwargs: matrix_attention(*args, of=name, **kwargs)
        )
        AttentionMaskInterface.register(f"matrix_{name}", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def both(kind: str, name: str, **inputs: Any) -> None:
    """Logits and gradients of the attention function are those of the matrix."""
    found = []
    for implementation in (name, f"matrix_{name}"):
        model = tiny(kind, attn_implementation=implementation).double()
        out = model(use_cache=False, **inputs).logits
        if (mask := inputs.get("attention_mask")) is not None:
            out = out * mask.unsqueeze(-1)
        out.square().mean().backward()
        found.append([out.detach(), *(x.grad for x in model.parameters() if x.grad is not None)])
    assert len(found[0]) > 5
    for ours, other in zip(*found):
        assert (ours - other).abs().max() <= 1e-9 * max(1, other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_computes_linear_attention(kind: str) -> None:
    both(kind, "fwp_linear", input_ids=text(2, 9))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fwp_favor"])
def test_every_function_is_its_matrix(name: str) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    for kind in ("gpt2", "llama"):
        both(kind, name, input_ids=text(2, 9), attention_mask=mask)


def test_packed_sequences_are_kept_apart() -> None:
    positions = torch.cat([torch.arange(4), torch.arange(5)]).unsqueeze(0)
    for kind in ("gpt2", "llama"):
        both(kind, "fwp_linear", input_ids=text(1, 9), position_ids=positions)
        model, ids = tiny(kind, attn_implementation="fwp_linear").double(), text(1, 9)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
        assert (packed - alone).abs().max() <= 1e-10
    borders = {"cu_seq_lens_q": torch.tensor([0, 4, 9])}
    assert torch.equal(model(ids, position_ids=positions, use_cache=False, **borders).logits, packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected position_ids beside it"):
        model(ids, use_cache=False, **borders)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_padding_changes_nothing(name: str, kind: str) -> None:
    model, ids = tiny(kind, attn_implementation=name).double(), text(1, 9)
    alone = model(ids).logits
    for left, right in ((4, 0), (0, 4)):
        padded = torch.cat([text(1, left, 1), ids, text(1, right, 2)], 1)
        mask = torch.zeros(1, 13, dtype=torch.long)
        mask[:, left : left + 9] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(padded, attention_mask=mask, position_ids=positions).logits[:, left : left + 9]
        assert (out - alone).abs().max() <= 1e-9
        assert (model(padded, position_ids=positions).logits[:, left : left + 9] - alone).abs().max() > 1e-3 or right


def test_a_bidirectional_encoder_reads_all_tokens() -> None:
    model, ids = tiny("bert", AutoModel, attn_implementation="fwp_linear").double(), text(2, 9)
    other = tiny("bert", AutoModel, attn_implementation="matrix_fwp_linear").double()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    for given in ({}, {"attention_mask": mask}):
        ours, theirs = (m(ids, **given).last_hidden_state for m in (model, other))
        real = given.get("attention_mask", torch.ones_like(ids)).bool()
        assert (ours - theirs)[real].abs().max() <= 1e-10


def test_a_decoder_can_be_told_to_read_all_tokens() -> None:
    both("llama", "fwp_linear", input_ids=text(2, 9), is_causal=False)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_generating_with_a_cache_says_the_same(kind: str) -> None:
    ids, mask = text(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for name in ("fwp_linear", "fwp_dpfp"):
        model = tiny(kind, attn_implementation=name)
        without = greedy(model, ids, attention_mask=mask, use_cache=False)
        assert torch.equal(greedy(model, ids, attention_mask=mask), without)
        assert len(set(without[1, 9:].tolist())) > 2


@torch.no_grad()
def test_logits_of_pieces_are_those_of_the_whole() -> None:
    model, ids, cache, parts = tiny("llama", attn_implementation="fwp_linear").double(), text(2, 12), None, []
    for a, b in ((0, 5), (5, 6), (6, 10), (10, 12)):
        out = model(ids[:, a:b], use_cache=True, **{CACHE: cache})
        cache = out[CACHE]
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - model(ids, use_cache=False).logits).abs().max() <= 1e-9


def test_the_choice_can_be_changed_and_is_saved(tmp_path: Path) -> None:
    ids, model = text(2, 9), tiny("llama")
    model.set_attn_implementation("fwp_linear")
    linear = model(ids).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config._attn_implementation == "fwp_linear"
    assert torch.equal(again(ids).logits, linear)
    softmax = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert (softmax(ids).logits - linear).abs().max() > 1e-2


def test_training_with_checkpointing_gives_the_same_gradients() -> None:
    model, ids = tiny("llama", attn_implementation="fwp_linear").double().train(), text(2, 9)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([x.grad for x in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    ("kind", "inputs", "options", "message"),
    [
        (
            "llama",
            {"attention_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)},
            {},
            "attention_mask: expected .B, T., got",
        ),
        ("mistral", {}, {"sliding_window": 4}, "attention_mask: expected padding, .* sliding window shorter"),
        ("gemma2", {}, {}, "softcap: expected None"),
        ("llama", {"output_attentions": True}, {}, "output_attentions: expected False"),
    ],
)
def test_what_would_be_wrong_is_refused(
    kind: str, inputs: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = tiny(kind, attn_implementation="fwp_linear", **options)
    with pytest.raises(ValueError, match=message):
        model(text(1, 9), use_cache=False, **inputs)


def test_caches_with_empty_slots_are_refused() -> None:
    model = tiny("llama", attn_implementation="fwp_linear")
    with pytest.raises(ValueError, match="cache: expected a DynamicCache .* got one of 32 slots for 9 tokens"):
        model(text(1, 9), **{CACHE: StaticCache(config=model.config, max_cache_len=32)})
    model = tiny("mistral", attn_implementation="fwp_linear", sliding_window=16)
    with pytest.raises(ValueError, match="expected"):
        greedy(model, text(1, 9), new=12)


def test_a_window_that_is_longer_than_the_text_changes_nothing() -> None:
    both("mistral", "fwp_linear", input_ids=text(2, 9))
    model = tiny("mistral", attn_implementation="fwp_linear", sliding_window=64)
    assert torch.equal(greedy(model, text(1, 9)), greedy(model, text(1, 9), use_cache=False))


def test_dropout_of_weights_is_said_to_be_left_out() -> None:
    model = tiny("gpt2", attn_implementation="fwp_linear", attn_pdrop=0.1).train()
    with pytest.warns(UserWarning, match="dropout of attention weights is left out"):
        model(text(1, 9))


@torch.no_grad()
def test_with_a_mask_it_is_traced_as_one_graph() -> None:
    model, ids, mask = tiny("llama", attn_implementation="fwp_linear"), text(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    traced = torch.compile(model, backend="eager", fullgraph=True)
    assert (traced(ids, attention_mask=mask, use_cache=False).logits - logits).abs().max() <= 1e-5
    torch.compiler.reset()
