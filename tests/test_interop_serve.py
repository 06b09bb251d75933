"""Models of transformers that have fast weights, on ours: equal to its fallback, packed, cached, padded, trained."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", "5.23")

from fwp.interop.transformers import serve  # noqa: E402
from fwp.interop.transformers.serve import install, uninstall  # noqa: E402

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # config, model, options
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**LINEAR, **EXPERTS}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**LINEAR, **EXPERTS}),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {k: x for k, x in LINEAR.items() if k != "head_dim"}),
    "lara_mini": ("LaraMiniConfig", "LaraMiniForCausalLM", {**LINEAR, **EXPERTS}),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {**LATENT, **EXPERTS, "linear_num_heads": 4, "linear_head_dim": 8},
    ),
}
PRESENT = [name for name in FAMILIES if find_spec(f"transformers.models.{name}") is not None]
EACH = pytest.mark.parametrize("family", PRESENT)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def tiny(family: str, seed: int = 0) -> Any:
    """A small random model whose layers matter."""
    config, model, options = FAMILIES[family]
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    options = {"layer_types": MIXED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | options
    given = getattr(transformers, config)(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.1,
        **options,
    )
    torch.manual_seed(seed)
    return getattr(module, model)(given).eval()


@pytest.fixture(autouse=True)
def clean() -> Any:
    yield
    uninstall()


def text(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    assert (a - b).abs().max() <= bound * max(1.0, b.abs().max().item())


@EACH
def test_logits_and_gradients_are_those_of_the_fallback(family: str) -> None:
    """For a model that was built before `install`, in more than one of the fallback's chunks."""
    theirs, ids = tiny(family), text(2, 70)
    ours = copy.deepcopy(theirs)
    truth = theirs(ids, labels=ids, use_cache=False)
    truth.loss.backward()
    with install():
        found = ours(ids, labels=ids, use_cache=False)
        found.loss.backward()
    close(found.logits, truth.logits)
    assert truth.logits.std() > 0.1
    grads = [(x.grad, y.grad) for x, y in zip(ours.parameters(), theirs.parameters()) if y.grad is not None]
    assert len(grads) > 20
    largest = max(b.abs().max() for _, b in grads)
    assert max((a - b).abs().max() for a, b in grads) <= 1e-5 * largest


@EACH
@torch.no_grad()
def test_ours_is_what_runs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, function in list(serve._FUNCTIONS.items()):
        monkeypatch.setitem(
            serve._FUNCTIONS, name, lambda *a, _f=function, _n=name, **k: (calls.append(_n), _f(*a, **k))[1]
        )
    with install():
        model = tiny(family)
        model.generate(text(1, 5), max_new_tokens=3, do_sample=False, eos_token_id=None)
    kinds = {name for name in calls if "delta" in name}
    assert len(kinds) == 2 and {"causal_conv1d_fn", "causal_conv1d_update"} <= {*calls}
    before = len(calls)
    model(text(1, 5), use_cache=False)
    assert len(calls) == before  # uninstalled


@EACH
@torch.no_grad()
def test_packed_sequences_are_separate_ones(family: str) -> None:
    model, lengths = tiny(family), (9, 1, 30)
    apart = [text(1, T, seed) for seed, T in enumerate(lengths)]
    borders = torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    packed = {
        "input_ids": torch.cat(apart, 1),
        "position_ids": torch.cat([torch.arange(T) for T in lengths]).unsqueeze(0),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": 30,
        "max_length_k": 30,
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int().unsqueeze(0),
    }
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        model(**packed, use_cache=False)
    with install():
        truth = torch.cat([model(ids, use_cache=False).logits for ids in apart], 1)
        found = model(**packed, use_cache=False).logits
        close(found, truth)
        other = packed | {"input_ids": torch.cat([text(1, 9, 77), *apart[1:]], 1)}
        close(model(**other, use_cache=False).logits[:, 9:], found[:, 9:])  # nothing leaks; experts round differently
        for missing in ("seq_idx", "cu_seq_lens_q"):
            less = {name: x for name, x in packed.items() if name != missing}
            if missing == "cu_seq_lens_q":
                less = {
                    name: x for name, x in less.items() if name not in ("cu_seq_lens_k", "max_length_q", "max_length_k")
                }
            close(model(**less, use_cache=False).logits, truth)


@EACH
@torch.no_grad()
def test_prefill_then_decode_is_the_whole(family: str) -> None:
    model, ids = tiny(family), text(2, 20)
    with install():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :12], use_cache=True)
        logits, cache = [out.logits], getattr(out, "cache", None) or out.past_key_values
        name = "cache" if "cache" in out else "past_key_values"
        for t in range(12, 20):
            step = model(ids[:, t : t + 1], use_cache=True, **{name: cache})
            logits.append(step.logits)
        close(torch.cat(logits, 1), whole)


@EACH
@torch.no_grad()
def test_generation_with_left_padding(family: str) -> None:
    model, ids = tiny(family), text(1, 9)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    both = torch.cat([padded, text(1, 15, 5)])
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :6] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with install():
        truth = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found = model.generate(both, attention_mask=mask, **options)
        assert torch.equal(found[0, 6:], truth[0])
        uncached = model.generate(both, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(found, uncached)
        beams = model.generate(both, attention_mask=mask, num_beams=3, **options)
        assert torch.equal(beams, model.generate(both, attention_mask=mask, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("family", [name for name in PRESENT if name in ("qwen3_next", "kimi_linear")])
def test_a_trainer_run(family: str, tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": text(1, 8 + i % 3, i)[0].tolist()} for i in range(12)]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=3,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    with install():
        trainer = transformers.Trainer(model=tiny(family), args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_install_and_uninstall() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    names = [name for name in serve._FUNCTIONS if hasattr(module, name)]
    before = [getattr(module, name) for name in names]
    with install():
        assert all(getattr(module, name) is serve._FUNCTIONS[name] for name in names)
        with install():  # nested: the outer one stays
            pass
        assert module.causal_conv1d_fn is serve.causal_conv1d_fn
    assert [getattr(module, name) for name in names] == before
    install()
    install()
    uninstall()
    uninstall()
    assert [getattr(module, name) for name in names] == before


def test_a_file_with_other_functions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    before = module.torch_chunk_gated_delta_rule
    monkeypatch.delattr(module, "causal_conv1d_fn")
    with pytest.raises(
        RuntimeError, match="modeling_qwen3_next: expected the functions of transformers 5.23 and 5.24, got"
    ):
        install()
    assert module.torch_chunk_gated_delta_rule is before  # nothing was changed


@pytest.mark.parametrize("W", [1, 2, 4])
def test_convolutions(W: int) -> None:
    """Against torch's, and token by token; a packed one against separate ones."""
    x, w, b = torch.randn(2, 5, 13, dtype=torch.float64), torch.randn(5, W).double(), torch.randn(5).double()
    truth = torch.nn.functional.conv1d(x, w.unsqueeze(1), b, padding=W - 1, groups=5)[..., :13]
    close(serve.causal_conv1d_fn(x, w, b), truth, 1e-12)
    close(serve.causal_conv1d_fn(x, w, b, "silu"), torch.nn.functional.silu(truth), 1e-12)
    for length in (W - 1, W):  # either size of state
        if length:
            state, out = torch.zeros(2, 5, length, dtype=torch.float64), []
            for part in x.split([1, 1, 3, 8], -1):
                out.append(serve.causal_conv1d_update(part, state, w, b))
            close(torch.cat(out, -1), truth, 1e-12)
    index = torch.tensor([[0] * 4 + [1] * 9, [5] * 1 + [2] * 12])
    found = serve.causal_conv1d_fn(x, w, b, seq_idx=index)
    for row, cut in ((0, 4), (1, 1)):
        parts = [serve.causal_conv1d_fn(y, w, b) for y in (x[row : row + 1, :, :cut], x[row : row + 1, :, cut:])]
        close(found[row], torch.cat(parts, -1)[0], 1e-12)


def test_the_state_of_a_packed_row_is_that_of_its_last_sequence() -> None:
    q, k, v = (torch.randn(2, 9, 2, 4).double() for _ in range(3))
    gates = {"g": -torch.rand(2, 9, 2).double(), "beta": torch.rand(2, 9, 2).double()}
    rule = serve._FUNCTIONS["torch_chunk_gated_delta_rule"]
    index = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, state = rule(q, k, v, **gates, **options, seq_idx=index)
    for row, start in ((0, 4), (1, 0)):
        x = [y[row : row + 1, start:] for y in (q, k, v)]
        truth, end = rule(*x, **{name: y[row : row + 1, start:] for name, y in gates.items()}, **options)
        close(out[row, start:], truth[0], 1e-12)
        close(state[row], end[0], 1e-12)
