"""Training of converted models: it learns, it resumes bitwise, and the fast weights carry what was learned."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from tiny_transformers import text, tiny
from transformers.utils import logging

from fwp.interop.transformers import contribution, convert, transfer
from fwp.interop.transformers.conversion import converted_modules


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def repeated(seed: int, B: int = 32) -> dict[str, Tensor]:
    """Random tokens twice. The second time they can be known from the first, by memory alone."""
    a = text(B, 6, seed)
    return {"input_ids": torch.cat([a, a], 1), "labels": torch.cat([torch.full_like(a, -100), a], 1)}


@pytest.fixture(scope="module")
def teacher() -> Any:
    """A model that learned to repeat."""
    model = tiny("llama", num_hidden_layers=2, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for i in range(150):
        optimizer.zero_grad()
        model(**repeated(i), use_cache=False).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("options", "at_most"),
    [({"rule": "additive", "feature_map": "hedgehog"}, 0.3), ({"rule": "gated_delta", "layers": [1]}, 1.5)],
)
def test_the_transfer_learns_and_the_fast_weights_are_used(
    teacher: Any, options: dict[str, Any], at_most: float
) -> None:
    model = tiny("llama", num_hidden_layers=2, initializer_range=0.1)
    model.load_state_dict(teacher.state_dict())
    convert(model, **options)
    before = contribution(model, repeated(999)).loss
    batches = [repeated(i) for i in range(160)]
    losses = transfer(model, batches, match_steps=100, tune_steps=60, match_rate=1e-2, tune_rate=3e-3)
    assert len(losses.match) == 100 and len(losses.tune) == 60
    for first, last in zip(losses.match[0], losses.match[-1]):
        assert last < 0.6 * first
    after = contribution(model, repeated(999))
    assert after.loss < min(at_most, 0.5 * before)
    for without in [*after.without.values(), after.without_all]:
        assert without > after.loss + 1
    assert after.without.keys() == {module.layer_idx for module in converted_modules(model)}
    assert all(not module.fast_weights._forward_hooks for module in converted_modules(model))


def test_a_layer_is_compared_with_the_attention_in_its_place() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 7:] = 0
    batch, outputs = {"input_ids": text(2, 9), "attention_mask": mask}, []
    plain, model = tiny("gpt2"), convert(tiny("gpt2"))
    for module in (plain.transformer.h[0].attn, model.transformer.h[0].attn):  # before the first, all is the same
        module.register_forward_hook(lambda m, args, out: outputs.append(out[0][mask.bool()].detach()))
    for x in (plain, model):
        x(**batch, use_cache=False)
    wanted, found = outputs
    expected = (found - wanted).square().sum() / wanted.square().sum()
    losses = transfer(convert(tiny("gpt2")), [batch], match_steps=1)
    assert abs(losses.match[0][0] - expected.item()) <= 1e-5 * expected.item()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(mask == 0, 7)}
    assert transfer(convert(tiny("gpt2")), [other], match_steps=1).match == losses.match


class Stopped(Exception):
    pass


class StopsAt(Sequence[dict[str, Tensor]]):
    """Batches of which one can't be had."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.given = stop, 0

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: Any) -> Any:
        if self.given == self.stop:
            raise Stopped
        self.given += 1
        return {"input_ids": text(2, 9, i)}


@pytest.mark.parametrize("stop", [3, 5, 9])
def test_a_stopped_transfer_ends_as_if_it_had_not(tmp_path: Path, stop: int) -> None:
    def run(stop: int | None, folder: Path | None) -> tuple[Any, Any]:
        model = convert(tiny("gpt2", resid_pdrop=0.2))  # dropout acts in the second stage
        arguments = {"match_steps": 5, "tune_steps": 6, "save_every": 2, "folder": folder}
        return transfer(model, StopsAt(stop), **arguments), model

    losses, straight = run(None, None)
    with pytest.raises(Stopped):
        run(stop, tmp_path)
    saved = {3: 2, 5: 5, 9: 9}[stop]  # every second step of a stage, and its last one
    again, resumed = run(11 - saved, tmp_path)  # from the start it would need more batches
    assert again == losses
    for (name, x), y in zip(resumed.named_parameters(), straight.parameters()):
        assert torch.equal(x, y), name
    assert run(0, tmp_path)[0] == losses  # it is finished, and takes no more batches
    with pytest.raises(ValueError, match="folder: expected a run with settings .*, got one with"):
        transfer(convert(tiny("gpt2")), StopsAt(None), match_steps=7, folder=tmp_path)


def test_frozen_parameters_stay() -> None:
    model = convert(tiny("llama"))
    for name, x in model.named_parameters():
        x.requires_grad_("fast_weights" in name)
    before = {name: x.clone() for name, x in model.named_parameters()}
    transfer(model, [{"input_ids": text(2, 9)}], match_steps=2, tune_steps=2, match_rate=1e-2)
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed and all("fast_weights" in name for name in changed)
    assert not model.training


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected one of fwp.convert, got LlamaForCausalLM"):
        transfer(tiny("llama"), [{"input_ids": text(2, 9)}])
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        transfer(convert(tiny("llama")), [])
    with pytest.raises(ValueError, match="match_steps: expected a whole number ≥ 0, got -1"):
        transfer(convert(tiny("llama")), [{"input_ids": text(2, 9)}], match_steps=-1)
