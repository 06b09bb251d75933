"""Our decoder as a model of transformers: its logits, generation, padding, packing, training, saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", "5.23")

import fwp  # noqa: E402
from fwp.interop.transformers import FwpConfig, FwpForCausalLM  # noqa: E402
from fwp.models import Decoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
PRESETS = ("gated_delta_net", "rwkv7", "delta_net_2021", "gla", "kda")
KINDS: dict[str, dict[str, Any]] = {
    **{rule: {"preset": None, "rule": rule} for rule in fwp.RULES},
    **{f"preset {name}": {"preset": name} for name in PRESETS},
    "linear attention": {
        "preset": None,
        "rule": "additive",
        "attention": {"feature_map": "elu+1", "denominator": True},
    },
}
EACH = pytest.mark.parametrize("kind", KINDS)
MAIN = pytest.mark.parametrize("kind", ["kda", "preset gated_delta_net", "preset rwkv7", "linear attention"])


def tiny(kind: str = "preset gated_delta_net", **options: Any) -> Any:
    torch.manual_seed(0)
    config = FwpConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **(KINDS[kind] | options)
    )
    model = FwpForCausalLM(config).eval()
    for name, x in model.named_parameters():
        if x.dim() > 1 and "conv" not in name:
            x.data.normal_(0, 0.3)
    return model


def text(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 40, (B, T), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, bound: float = 1e-10) -> None:
    assert (a - b).abs().max() <= bound * max(1.0, b.abs().max().item())


@EACH
@torch.no_grad()
def test_logits_are_the_decoder_s(kind: str) -> None:
    model, ids = tiny(kind), text(2, 9)
    decoder = Decoder(model.config.decoder_config()).eval()
    decoder.load_state_dict(model.decoder.state_dict())
    assert torch.equal(model(ids).logits, decoder(ids)[0])


@EACH
@torch.no_grad()
def test_generation_is_that_without_a_cache(kind: str) -> None:
    model = tiny(kind).double()
    ids, mask = text(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            found.append(
                model.generate(
                    ids, attention_mask=mask, use_cache=use_cache, max_new_tokens=7, pad_token_id=0, **options
                )
            )
        assert torch.equal(*found), options
    alone = model.generate(ids[:1, 4:], max_new_tokens=7, do_sample=False, pad_token_id=0)
    both = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(both[0, 4:], alone[0])


@MAIN
@torch.no_grad()
def test_several_turns_and_the_size_of_the_cache(kind: str) -> None:
    model, ids = tiny(kind).double(), text(1, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(ids, **options)
    name = "cache" if "cache" in first else "past_key_values"
    sizes = [sum(layer.nbytes for layer in first[name].layers)]
    more = torch.cat([first.sequences, text(1, 60, 2)], 1)
    second = model.generate(more, **options, **{name: first[name]})
    assert torch.equal(second.sequences, model.generate(more, **options, use_cache=False).sequences)
    sizes.append(sum(layer.nbytes for layer in second[name].layers))
    assert sizes[0] == sizes[1] > 0


@MAIN
@torch.no_grad()
def test_packed_sequences(kind: str) -> None:
    model, lengths = tiny(kind).double(), (5, 1, 12)
    apart = [text(1, T, seed) for seed, T in enumerate(lengths)]
    truth = torch.cat([model(ids).logits for ids in apart], 1)
    ids = torch.cat(apart, 1)
    positions = torch.cat([torch.arange(T) for T in lengths]).unsqueeze(0)
    borders = torch.tensor([0, 5, 6, 18], dtype=torch.int32)
    close(model(ids, cu_seq_lens_q=borders, use_cache=False).logits, truth)
    close(model(ids, position_ids=positions, use_cache=False).logits, truth)
    close(model(ids.expand(2, -1), position_ids=positions, use_cache=False).logits[1:], truth)
    assert (model(ids).logits - truth).abs().max() > 1e-3


@torch.no_grad()
def test_padding_on_the_right_and_embeddings_and_hidden_states() -> None:
    model, ids = tiny().double(), text(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    close(out.logits[1, :6], model(ids[1:, :6]).logits[0])
    assert len(out.hidden_states) == 3
    close(model.decoder.head(out.hidden_states[-1]), out.logits)
    close(out.hidden_states[0], model.decoder.embedding(ids))
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    with pytest.raises(ValueError, match="^input_ids: expected either input_ids or inputs_embeds, got both or neither"):
        model()


@MAIN
def test_gradient_checkpointing(kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny(kind).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        hook = model.decoder.blocks[0].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        model(text(2, 9), labels=text(2, 9)).loss.backward()
        hook.remove()
        assert len(calls) == 1 + checkpointing
        found.append([x.grad for x in model.parameters() if x.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found):
        close(a, b, 1e-12)


@EACH
def test_saving_and_the_auto_classes(kind: str, tmp_path: Any) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is FwpConfig and config.decoder_config() == model.config.decoder_config()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is FwpForCausalLM
    assert again.decoder.head.weight is again.decoder.embedding.weight
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert torch.equal(again(text(2, 5)).logits, model(text(2, 5)).logits)


def test_a_trainer_run_that_resumes(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": text(1, 8, i)[0].tolist(), "labels": text(1, 8, i)[0].tolist()} for i in range(12)]

    def run(steps: int, resume: bool) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
        )
        trainer = transformers.Trainer(model=tiny(), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(2, False)
    losses = [row["loss"] for row in run(6, True).state.log_history if "loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_new_tokens_and_16_bits_and_compile() -> None:
    model = tiny()
    model.resize_token_embeddings(50)
    assert model.decoder.head.weight is model.decoder.embedding.weight and model(text(1, 4)).logits.shape[-1] == 50
    wide, narrow = tiny()(text(2, 9)).logits, tiny().bfloat16()(text(2, 9)).logits
    assert narrow.dtype == torch.bfloat16 and (narrow.float() - wide).abs().max() < 0.1 * wide.abs().max()
    model = tiny()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    close(fast(text(2, 9), use_cache=False).logits, model(text(2, 9), use_cache=False).logits, 1e-6)
    torch._dynamo.reset()


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="^rule: expected None with the preset 'gated_delta_net', got 'kda'"):
        FwpForCausalLM(FwpConfig(rule="kda"))
    model, ids = tiny(), text(1, 6)
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids, assistant_model=tiny(), max_new_tokens=3)
    with pytest.raises(ValueError, match="^attention_mask: expected .B, T., got .1, 1, 6, 6."):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6))
    out = model(ids, use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"
    with pytest.raises(ValueError, match="^cu_seq_lens_q: expected None with a cache that has seen tokens"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6]), **{name: out[name]})
