"""Converted models: what their layers compute, their caches, their files, and what people do with them."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from tiny_transformers import CACHE, greedy, text, tiny
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fwp
import fwp.interop.transformers
from fwp.interop.transformers import convert, register
from fwp.interop.transformers.conversion import converted_modules, original

register()
KINDS = ("gpt2", "llama", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "gpt_neox", "opt")
MAIN = ("gpt2", "llama", "qwen3")
LAYERS = (None, (0, 2))


def converted(kind: str, rule: str = "gated_delta", layers: Any = None, **options: Any) -> Any:
    """A converted model whose gates depend on the tokens."""
    model = convert(tiny(kind), rule, layers, **options)
    generator = torch.Generator().manual_seed(3)
    for name, x in model.named_parameters():
        if "fast_weights" in name and "weight" in name:
            x.data.normal_(0, 0.5, generator=generator)
    return model


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# ---- what a layer computes ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_additive_rule_is_the_linear_attention_function(kind: str) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attn_logit_softcapping": None} if kind == "gemma2" else {}
    found = []
    for model in (convert(tiny(kind, **options), "additive"), tiny(kind, attn_implementation="fwp_linear", **options)):
        model = model.double()
        logits = model(text(2, 9), attention_mask=mask, use_cache=False).logits * mask.unsqueeze(-1)
        logits.square().mean().backward()
        found.append([logits.detach(), *(x.grad for x in model.parameters() if x.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    assert all(worst(a, b) <= 1e-10 * max(1, b.abs().max()) for a, b in zip(*found))


def by_hand(module: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """A gated delta layer of Llama or Qwen3 token by token, from its projections."""
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, T, -1, module.head_dim) for p in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    if rotary is not None:
        q, k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    linear = {name: gate.proj for name, gate in module.fast_weights.gates.items()}
    beta = torch.sigmoid(x @ linear["gate-beta"].weight.T + linear["gate-beta"].bias)
    kept = torch.sigmoid(x @ linear["gate-g"].weight.T + linear["gate-g"].bias)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(q.shape[2]):
            group = h // (q.shape[2] // k.shape[2])
            S = x.new_zeros(module.head_dim, module.head_dim)
            for t in range(T):
                S = kept[b, t, group] * S
                key = k[b, t, group]
                S = S + beta[b, t, group] * torch.outer(key, v[b, t, group] - S.T @ key)
                out[b, t, h] = S.T @ q[b, t, h]
    return module.o_proj(out.flatten(2))


@pytest.mark.parametrize(("kind", "rotary"), [("llama", True), ("qwen3", True), ("llama", False)])
def test_a_layer_is_its_rule_between_the_projections(kind: str, rotary: bool) -> None:
    model, seen = converted(kind, rotary=rotary).double(), []
    module = model.model.layers[1].self_attn
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True)
    with torch.no_grad():
        model(text(2, 7), use_cache=False)
        given, out = seen[0]
        expected = by_hand(module, given["hidden_states"], given["position_embeddings"] if rotary else None)
    assert worst(out, expected) <= 1e-10


def test_grouped_queries_share_the_state_of_their_key_head() -> None:
    model = converted("llama")
    cache = model(text(2, 9)).to_tuple()[1]
    assert cache.layers[0].state.S.shape == (2, 2, 8, 8)
    assert cache.layers[0].state.S.dtype == torch.float32


def test_gates_start_as_constants_and_learn() -> None:
    model = convert(tiny("llama"), "gla")
    gate = converted_modules(model)[0].fast_weights.gates["gate-g"]
    kept = gate(torch.randn(1, 5, 32)).exp()
    assert torch.allclose(kept[0, :, :, 0], torch.tensor([1 - 2**-5, 1 - 2**-8]).expand(5, 2))
    model(text(2, 9), labels=text(2, 9)).loss.backward()
    assert gate.proj.weight.grad is not None and gate.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("rule", [name for name, row in fwp.RULES.items() if row.plain])
def test_every_rule_and_learned_features_generate_with_the_cache(rule: str) -> None:
    for options in ({}, {"feature_map": "hedgehog"}):
        model, ids = converted("llama", rule, **options), text(2, 7)
        assert torch.equal(greedy(model, ids, 8), greedy(model, ids, 8, use_cache=False))


def test_learned_features_are_those_of_hedgehog() -> None:
    model, x = converted("llama", "additive", feature_map="hedgehog").double(), torch.randn(2, 5, 4, 8).double()
    memory = converted_modules(model)[0].fast_weights
    for h in range(4):
        y = x[:, :, h] @ memory.q_features.weight[h]
        assert worst(memory.q_features(x)[:, :, h], torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)) <= 1e-12
    model(text(2, 9), labels=text(2, 9)).loss.backward()
    assert all(phi.weight.grad.abs().amax((1, 2)).min() > 0 for phi in (memory.q_features, memory.k_features))


@pytest.mark.parametrize("options", [{"rule": "kda"}, {"rule": "additive", "feature_map": "hedgehog"}])
def test_gradients_are_those_of_differences(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, ids, size = converted("gpt2", **options).double(), text(2, 9), 1e-5
    before = [x.detach().clone() for x in model.parameters()]

    def loss() -> Tensor:  # that of transformers is in float32
        return model(ids, use_cache=False).logits.square().mean()

    loss().backward()
    for part in ("c_attn", "c_proj", "fast_weights"):
        chosen = [(x, y) for (name, x), y in zip(model.named_parameters(), before) if part in name]
        ways = [torch.randn_like(x) for x, _ in chosen]
        found = []
        for sign in (1, -1):
            for (x, y), way in zip(chosen, ways):
                x.data.copy_(y + sign * size * way)
            found.append(loss().item())
        for x, y in chosen:
            x.data.copy_(y)
        expected = (found[0] - found[1]) / (2 * size)
        slope = sum((x.grad * way).sum().item() for (x, _), way in zip(chosen, ways))
        assert abs(slope - expected) <= 1e-6 * max(1, abs(expected)), part


def test_no_mask_of_all_pairs_is_made_where_nobody_needs_it(tmp_path: Path) -> None:
    model, seen = converted("llama"), []
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        layer = each.model.layers[0]
        layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
        each(text(2, 9), attention_mask=torch.tensor([[0] * 4 + [1] * 5, [1] * 9]))
    assert seen == [None, None]


# ---- the cache ----


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", MAIN)
def test_generating_with_the_cache_says_the_same(kind: str, layers: Any) -> None:
    model, ids = converted(kind, layers=layers), text(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for ways in ({}, {"do_sample": True}, {"num_beams": 3}):
        for given in ({"attention_mask": mask}, {}):
            said = []
            for how in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
                torch.manual_seed(5)
                said.append(greedy(model, ids, 7, **given, **ways, **how))
            assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2]), (ways, given)
    assert len(set(greedy(model, ids)[1, 9:].tolist())) > 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MAIN])
def test_other_models_generate_with_the_cache(kind: str) -> None:
    for layers in (None, (0, 2), (1,)):
        model, ids = converted(kind, layers=layers), text(2, 9)
        assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", MAIN)
def test_logits_of_pieces_are_those_of_the_whole(kind: str, layers: Any) -> None:
    model, ids = converted(kind, layers=layers).double(), text(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, parts = None, []
    for a, b in ((0, 5), (5, 6), (6, 10), (10, 12)):
        given = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b], CACHE: cache}
        out = model(ids[:, a:b], use_cache=True, **given)
        cache = out[CACHE]
        parts.append(out.logits)
    real = mask.bool()
    assert worst(torch.cat(parts, 1)[real], whole[real]) <= 1e-10
    assert cache is not None and cache.get_seq_length() == 12


def test_padding_changes_nothing() -> None:
    for kind in MAIN:
        model, ids = converted(kind).double(), text(1, 9)
        alone = model(ids).logits
        for left, right in ((4, 0), (0, 4)):
            padded = torch.cat([text(1, left, 1), ids, text(1, right, 2)], 1)
            mask = torch.zeros_like(padded)
            mask[:, left : left + 9] = 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = model(padded, attention_mask=mask, position_ids=positions).logits[:, left : left + 9]
            assert worst(out, alone) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_a_conversation_goes_on_from_its_cache(layers: Any) -> None:
    model = converted("llama", layers=layers)
    first = greedy(model, text(1, 6), 5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, text(1, 4, 8)], 1)
    assert torch.equal(greedy(model, turn, **{CACHE: first[CACHE]}), greedy(model, turn, use_cache=False))


@torch.no_grad()
def test_the_cache_does_not_grow() -> None:
    sizes = []
    for T in (9, 200):
        cache = DynamicCache()
        converted("llama")(text(2, T), **{CACHE: cache})
        sizes.append(sum(layer.nbytes for layer in cache.layers))
    assert sizes == [3 * 2 * 2 * 8 * 8 * 4] * 2


@torch.no_grad()
def test_sequences_of_the_cache_are_picked_and_repeated() -> None:
    model, ids = converted("llama").double(), text(3, 12)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :6], **{CACHE: cache})
    cache.crop(0)
    cache.activate_past_recording()
    for layer in cache.layers:
        layer.activate_past_recording()
    model(ids[:, 6:8], **{CACHE: cache})
    cache.batch_repeat_interleave(2)  # 0 0 1 1 2 2
    cache.batch_select_indices(torch.tensor([4, 1, 2]))
    cache.reorder_cache(torch.tensor([0, 2, 1]))  # 2 1 0
    cache.crop(-1)
    ids = ids[[2, 1, 0]]
    assert worst(model(ids[:, 7:], **{CACHE: cache}).logits, model(ids, use_cache=False).logits[:, 7:]) <= 1e-10
    cache.reset()
    assert cache.get_seq_length() == 0
    assert worst(model(ids, **{CACHE: cache}).logits, model(ids, use_cache=False).logits) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("layers", LAYERS)
def test_crop_takes_back_tokens(layers: Any) -> None:
    model, ids = converted("llama", layers=layers).double(), text(1, 12)
    whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], **{CACHE: cache})
    cache.activate_past_recording()
    model(ids[:, 6:10], **{CACHE: cache})
    model(text(1, 1, 9), **{CACHE: cache})  # two calls can be taken back together
    cache.crop(-3)
    assert cache.get_seq_length() == 8
    assert worst(model(ids[:, 8:], **{CACHE: cache}).logits, whole[:, 8:]) <= 1e-10
    layer = next(layer for layer in cache.layers if hasattr(layer, "recorded"))
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 4 tokens since the last crop, got 5"):
        layer.crop(-5)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0 or the negative number of tokens, got 3"):
        layer.crop(3)
    layer.crop(0)
    assert layer.recorded is None


@torch.no_grad()
def test_crop_needs_a_record() -> None:
    cache = DynamicCache()
    converted("llama")(text(1, 6), **{CACHE: cache})
    with pytest.raises(ValueError, match="crop: expected cache.activate_past_recording\\(\\) before"):
        cache.crop(-1)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
def test_assisted_generation_says_the_same(kind: str, layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, taken_back = converted(kind, layers=layers), text(1, 9), []
    layer = type(model(ids)[CACHE].layers[(layers or [0])[0]])
    crop = layer.crop

    def counting(self: Any, tokens_to_remove: Any) -> None:
        taken_back.append(-int(tokens_to_remove))
        crop(self, tokens_to_remove)

    monkeypatch.setattr(layer, "crop", counting)
    said = greedy(model, ids, 20)
    assert torch.equal(greedy(model, ids, 20, assistant_model=tiny("gpt2")), said)
    assert max(taken_back) > 1
    nearly = copy.deepcopy(model)  # an assistant of the same kind, which is often but not always right
    for x in nearly.parameters():
        x.data += 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * x.data.std(correction=0)
    assert torch.equal(greedy(model, ids, 20, assistant_model=nearly), said)
    again = torch.cat([ids, ids, ids], 1)
    assert torch.equal(greedy(model, again, 20, prompt_lookup_num_tokens=3), greedy(model, again, 20))


def test_a_compiled_model_says_the_same() -> None:
    model, ids = convert(tiny("llama", num_hidden_layers=2), "decay", [0]), text(1, 9)
    logits, said = model(ids, use_cache=False).logits, greedy(model, ids, 4)
    assert worst(torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits, logits) <= 1e-5
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(greedy(model, ids, 4), said)
    torch.compiler.reset()


def test_caches_that_do_not_fit_are_refused() -> None:
    hybrid, ids = converted("llama", layers=[0, 2]), text(1, 9)
    with pytest.raises(
        ValueError, match="cache: expected a DynamicCache in a model with attention .* got a StaticCache"
    ):
        hybrid(ids, **{CACHE: StaticCache(config=hybrid.config, max_cache_len=32)})
    of_another = tiny("llama")(ids)[CACHE]
    with pytest.raises(ValueError, match="cache: expected fast weights in layer 0, got keys and values"):
        hybrid(ids, **{CACHE: of_another})
    with pytest.raises(TypeError, match="cache: expected the cache of a model with attention, got one of fast weights"):
        tiny("llama")(ids, **{CACHE: converted("llama")(ids)[CACHE]})


# ---- packed sequences and masks ----


def test_packed_sequences_are_kept_apart() -> None:
    for kind in MAIN:
        for layers in LAYERS:
            model, ids = converted(kind, layers=layers).double(), text(2, 9)
            positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
            packed = model(ids, position_ids=positions, use_cache=False).logits
            for b, cut in ((0, 4), (1, 2)):
                parts = (ids[b : b + 1, :cut], ids[b : b + 1, cut:])
                alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
                assert worst(packed[b : b + 1], alone) <= 1e-10
    model = converted("llama").double()
    borders = {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "position_ids": positions[:1]}
    assert (
        worst(
            model(ids[:1], use_cache=False, **borders).logits,
            model(ids[:1], position_ids=positions[:1], use_cache=False).logits,
        )
        <= 1e-10
    )


def test_what_would_be_wrong_is_refused() -> None:
    model, ids = converted("llama"), text(1, 9)
    with pytest.raises(
        ValueError, match="attention_mask: expected .B, T. in a model with fast weights, got .1, 1, 9, 9"
    ):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="cache: expected use_cache=False with packed sequences"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), use_cache=True)
    with pytest.raises(ValueError, match="is_causal: expected True in a model with fast weights"):
        model(ids, is_causal=False)
    with pytest.raises(TypeError, match="hands no keyword arguments to its layers"):
        convert(tiny("stablelm"))(ids)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("bloom", {}, ValueError, "model: expected causal self-attention .* found none in BloomForCausalLM"),
        ("llama", {"rule": "gated_dleta"}, ValueError, "rule: expected one of .*; did you mean 'gated_delta'"),
        ("llama", {"layers": [0, 3]}, ValueError, "layers: expected some of the 3 layers with attention, got .0, 3."),
        ("llama", {"keep_every": 1}, ValueError, "keep_every: expected a whole number ≥ 2, got 1"),
        ("llama", {"layers": [0], "keep_every": 2}, ValueError, "keep_every: expected None beside layers"),
        ("llama", {"feature_mop": None}, TypeError, "unexpected keyword 'feature_mop'; did you mean 'feature_map'"),
        ("llama", {"feature_map": torch.exp}, TypeError, "feature_map: expected a name, which config.json can hold"),
        ("llama", {"feature_map": "elu"}, ValueError, "feature_map: expected one of"),
        ("llama", {"denominator": True, "rule": "comba"}, ValueError, "denominator: 'comba' has no attention norm"),
        ("gpt2", {"rotary": False}, ValueError, "rotary: False needs attention that is given position_embeddings"),
    ],
)
def test_conversions_that_do_not_fit_are_refused(
    model: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = tiny(model)
    with pytest.raises(error, match=message):
        convert(before, **options)
    assert type(before) is type(tiny(model))
    assert type(before.config) is type(tiny(model).config)


def test_a_conversion_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(rule: str, *sizes: Any) -> Any:
        raise ValueError("no such heads")

    monkeypatch.setattr("fwp.interop.transformers.conversion.FastWeightMemory", fails)
    model, ids = tiny("llama"), text(1, 9)
    with pytest.raises(ValueError, match="no such heads"):
        convert(model)
    assert type(model) is type(tiny("llama")) and type(model.config) is type(tiny("llama").config)
    assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)


def test_models_are_converted_once() -> None:
    with pytest.raises(ValueError, match="model: expected one that is not converted yet"):
        convert(converted("llama"))
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        convert(nn.Linear(2, 2))


def test_every_nth_layer_keeps_its_attention() -> None:
    model = fwp.convert(tiny("llama", num_hidden_layers=4), keep_every=2)
    assert [module.layer_idx for module in converted_modules(model)] == [0, 2]
    assert [m.layer_idx for m in converted_modules(fwp.convert(tiny("llama"), layers=[-1]))] == [2]


def test_without_a_new_enough_transformers_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "fwp.interop.transformers: expected transformers ≥ 5.23, pip install 'fwp.hf.'"
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.1")
    with pytest.raises(ImportError, match=f"{wanted}, got 5.22.1$"):
        importlib.reload(fwp.interop.transformers)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=f"{wanted}$"):
        importlib.reload(fwp.interop.transformers)


# ---- files ----


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_a_saved_model_comes_back_bitwise(kind: str, layers: Any, tmp_path: Path) -> None:
    model, ids = converted(kind, "kda", layers, feature_map="hedgehog"), text(2, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.to_diff_dict() == model.config.to_diff_dict()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(greedy(again, ids), greedy(again, ids, use_cache=False))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(x, ours[name].bfloat16()) for name, x in half.items())


def test_a_saved_model_is_refused_without_this_package(tmp_path: Path) -> None:
    converted("llama").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fwp_converted"
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode and "fwp_converted" in run.stderr


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_models_with_another_head_or_none(auto: Any, tmp_path: Path) -> None:
    model, ids = convert(tiny("llama", auto)), text(1, 9)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(again(ids)[0], model(ids)[0])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = convert(tiny("gpt2"))
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_copies_and_pickles_are_the_same_model(layers: Any) -> None:
    model, ids, file = converted("llama", layers=layers), text(2, 9), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other) is type(model) and type(other.config) is type(model.config)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other.model.embed_tokens.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_the_original_can_be_had_back(kind: str, layers: Any) -> None:
    model, ids = tiny(kind), text(2, 9)
    logits, names = model(ids).logits, list(model.state_dict())
    back = original(convert(model, layers=layers))
    assert type(back) is type(tiny(kind)) and type(back.config) is type(tiny(kind).config)
    assert torch.equal(back(ids).logits, logits) and list(back.state_dict()) == names
    assert worst(model(ids).logits, logits) > 1e-2  # it is a copy


# ---- what people do with models ----


def test_checkpointing_gives_the_same_gradients() -> None:
    for layers in (None, [0, 2]):
        model, ids, grads = converted("llama", layers=layers).double().train(), text(2, 9), []
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
            grads.append([x.grad for x in model.parameters()])
            model.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_converted_model_can_be_exported() -> None:
    model, ids = converted("llama"), text(2, 9)
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    shapes = {"input_ids": {0: B, 1: T}, "use_cache": None}
    program = torch.export.export(model, (ids,), {"use_cache": False}, dynamic_shapes=shapes, strict=False).module()
    longer = text(3, 70)
    assert worst(program(longer, use_cache=False).logits, model(longer, use_cache=False).logits) <= 1e-4


def test_half_precision_keeps_the_state_in_float32() -> None:
    model, cache = converted("llama").bfloat16(), DynamicCache()
    with torch.no_grad():
        assert model(text(2, 9), **{CACHE: cache}).logits.dtype == torch.bfloat16
    assert cache.layers[0].state.S.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*pin_memory:UserWarning", "ignore::FutureWarning")
def test_the_trainer_resumes_to_the_same_weights(tmp_path: Path) -> None:
    texts = [{"input_ids": text(1, 12, i % 4)[0], "labels": text(1, 12, i % 4)[0]} for i in range(16)]

    def run(resume: bool, steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_checkpointing=True,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=converted("llama", layers=[0, 2]), args=arguments, train_dataset=texts)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(False, 3)
    resumed = run(True, 6)
    straight = run(False, 6)
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for a, b in zip(resumed.model.parameters(), straight.model.parameters()):
        assert torch.equal(a, b)


def test_latent_attention_is_refused() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        first_k_dense_replace=1,
        intermediate_size=16,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match="^model: expected keys and values of one width, got latent attention, Deepseek"
    ):
        convert(model)
    assert not hasattr(model.config, "fwp")
