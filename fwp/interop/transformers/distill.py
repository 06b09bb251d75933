"""Trains a converted model to do what it did with softmax attention, and tells whether its fast weights are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import tqdm

from fwp import errors
from fwp.interop.transformers.conversion import converted_modules, original, self_attention, tokens_of

Batch = Mapping[str, Tensor]


class Losses(NamedTuple):
    """The losses of a `transfer`. match: per step and converted layer. tune: per step."""

    match: list[list[float]]
    tune: list[float]


class Contribution(NamedTuple):
    """The next-token loss of a model, of the model without one converted layer's memory, and without all of them."""

    loss: float
    without: dict[int, float]
    without_all: float


def transfer(
    model: Any,
    batches: Sequence[Batch],
    *,
    teacher: Any = None,
    match_steps: int = 1000,
    tune_steps: int = 0,
    match_rate: float = 1e-3,
    tune_rate: float = 1e-4,
    folder: str | os.PathLike[str] | None = None,
    save_every: int = 100,
) -> Losses:
    """Trains a converted model in two stages, in place.

    First each converted layer learns the output of the attention that it took the place of, on the same inputs: it
    minimises ‖y − y'‖² / ‖y'‖² over the real tokens, y' being the teacher's. The inputs are the teacher's too, so the
    layers learn independently of each other. All parameters of the converted attention modules are trained. Then, for
    `tune_steps`, all parameters of the model are trained on the next-token loss. Parameters that need no gradient stay.
    AdamW without weight decay and gradients clipped to norm 1 in both stages.

    Sources: attention transfer of Hedgehog (arXiv 2402.04347) and LoLCATs (arXiv 2410.10254), and RADLADS (arXiv
    2505.03005), which also trains the projections.

    Args:
        model: of `fwp.convert`.
        batches: inputs of the model, such as input_ids [B, T] and attention_mask [B, T]; each step takes the next one,
            and after the last the first again. labels default to the input_ids of the real tokens.
        teacher: the model with softmax attention; None: `model` with its attention back, as its weights are now.
        match_steps, tune_steps: the steps of each stage. match_rate, tune_rate: their learning rates.
        folder: where the state is saved every `save_every` steps. A later call with the same arguments goes on from
            there, and ends as if it had never stopped. The model must be as it was before the first call.

    Returns the losses of all steps, those before an interruption included. They are shown while it runs.

    Raises ValueError for a model that is not converted, and for a folder of a run with other settings.
    """
    for name, steps in (("match_steps", match_steps), ("tune_steps", tune_steps)):
        errors.size(name, steps, 0)
    errors.size("save_every", save_every)
    modules = converted_modules(model)
    if not modules or len(batches) == 0:
        what = "model: expected one of fwp.convert" if not modules else "batches: expected at least one"
        raise ValueError(f"{what}, got {type(model).__name__ if not modules else 'none'}")
    teacher = original(model) if teacher is None else teacher
    was_training, teacher_was_training = model.training, teacher.training
    matched = [x for module in modules for x in module.parameters() if x.requires_grad]
    tuned = [x for x in model.parameters() if x.requires_grad]
    settings = {"match_steps": match_steps, "match_rate": match_rate, "tune_rate": tune_rate, "spec": model.config.fwp}
    record = _Record(None if folder is None else Path(folder), json.loads(json.dumps(settings)))
    try:
        teacher.eval()
        model.eval()
        record.run("match", matched, match_steps, match_rate, save_every, batches, lambda x: _errors(model, teacher, x))
        model.train()
        record.run("tune", tuned, tune_steps, tune_rate, save_every, batches, lambda x: _loss(model, x).view(1))
    finally:
        model.train(was_training)
        teacher.train(teacher_was_training)
    return Losses(record.losses["match"], [values[0] for values in record.losses["tune"]])


@torch.no_grad()
def contribution(model: Any, batch: Batch) -> Contribution:
    """What a model's next-token loss becomes when the memories of its converted layers return 0.

    A layer whose absence does not hurt is bypassed: the model does without its fast weights. Hybrid conversions are
    known for it.
    """
    was_training, memories = model.training, {x.layer_idx: x.fast_weights for x in converted_modules(model)}

    def without(layers: Sequence[int]) -> float:
        hooks = [memories[i].register_forward_hook(lambda module, args, out: torch.zeros_like(out)) for i in layers]
        try:
            return _loss(model, batch).item()
        finally:
            for hook in hooks:
                hook.remove()

    try:
        model.eval()
        return Contribution(without([]), {i: without([i]) for i in memories}, without(list(memories)))
    finally:
        model.train(was_training)


def _loss(model: Any, batch: Batch) -> Tensor:
    """The next-token loss."""
    labels = batch.get("labels")
    if labels is None:
        mask = batch.get("attention_mask")
        labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
    loss: Tensor = model(**{**batch, "labels": labels, "use_cache": False}).loss
    return loss


def _errors(model: Any, teacher: Any, batch: Batch) -> Tensor:
    """[layers], the squared error of each converted layer's output, relative to the size of the teacher's."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    seen: dict[int, tuple[Any, Any, Tensor]] = {}

    def see(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen[module.layer_idx] = (args, kwargs, out[0])

    hooks = [x.register_forward_hook(see, with_kwargs=True) for x in self_attention(teacher)]
    try:
        with torch.no_grad():
            teacher(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = tokens_of(inputs)
    found = []
    for module in converted_modules(model):
        args, kwargs, wanted = seen[module.layer_idx]
        wrong = module(*args, **(kwargs | {"fast_weight_tokens": tokens}))[0] - wanted
        if tokens.mask is not None:
            wrong, wanted = wrong[tokens.mask], wanted[tokens.mask]
        found.append(wrong.float().square().sum() / wanted.float().square().sum())
    return torch.stack(found)


class _Record:
    """The losses so far, and the file from which a run goes on."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.file = None if folder is None else folder / "transfer.safetensors"
        self.settings = settings
        self.losses: dict[str, list[list[float]]] = {"match": [], "tune": []}
        self.stage = "match"
        if self.file is not None and self.file.exists():
            with safe_open(self.file, "pt") as kept:
                state = json.loads(kept.metadata()["state"])
            if state["settings"] != settings:
                raise ValueError(f"folder: expected a run with settings {settings}, got one with {state['settings']}")
            self.losses, self.stage = state["losses"], state["stage"]

    def run(
        self,
        stage: str,
        parameters: list[Tensor],
        steps: int,
        rate: float,
        save_every: int,
        batches: Sequence[Batch],
        loss: Callable[[Batch], Tensor],
    ) -> None:
        """Trains the parameters for the steps that are left of a stage."""
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        if self.losses[stage] and self.stage == stage:
            self._restore(parameters, optimizer)
        done = self.losses[stage]
        for step in (bar := tqdm(range(len(done), steps), desc=stage, initial=len(done), total=steps)):
            with torch.random.fork_rng():
                torch.manual_seed(step)  # dropout does not depend on where a run was stopped
                values = loss(batches[step % len(batches)])
                optimizer.zero_grad()
                values.sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done.append(values.tolist())
            bar.set_postfix_str(" ".join(f"{x:.3g}" for x in done[-1]))
            if (step + 1) % save_every == 0 or step + 1 == steps:
                self._save(stage, parameters, optimizer)
        optimizer.zero_grad()

    def _save(self, stage: str, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        if self.file is None:
            return
        tensors = {f"parameter.{i}": x.detach().contiguous() for i, x in enumerate(parameters)}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": x.contiguous() for name, x in state.items()}
        state = {"stage": stage, "losses": self.losses, "settings": self.settings}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        save_file(tensors, unfinished, {"state": json.dumps(state)})
        unfinished.replace(self.file)  # at once: a run that is stopped here leaves the old file

    @torch.no_grad()
    def _restore(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        assert self.file is not None
        states: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.file, "pt") as kept:
            for key in kept.keys():  # noqa: SIM118 - it is no dict
                kind, i, *name = key.split(".")
                if kind == "parameter":
                    parameters[int(i)].copy_(kept.get_tensor(key))
                else:
                    states.setdefault(int(i), {})[name[0]] = kept.get_tensor(key)
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
