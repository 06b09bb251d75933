"""The table of fast weight update rules: one row per rule, the only list there is.

Two axes make the first six: decay (none, per head, per key channel) × correction (none, delta).
"""

from __future__ import annotations

import copyreg
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fwp.rules import lowering, reference, spec
from fwp.rules.spec import Gate, Rule

__all__ = ["RULES", "Gate", "Rule", "get"]


def _without_decay(k: Tensor, v: Tensor, **gates: Tensor) -> dict[str, Tensor]:
    """g = 0 per head."""
    return gates | {"g": k.new_zeros(k.shape[:3])}


def _every_channel(k: Tensor, v: Tensor, g: Tensor, **gates: Tensor) -> dict[str, Tensor]:
    """A decay per head is the same decay in every key channel."""
    return gates | {"g": g.unsqueeze(-1).expand(*g.shape, k.shape[-1])}


def _one_strength(k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> dict[str, Tensor]:
    """b = w = β in every channel."""
    return {"b": beta.unsqueeze(-1).expand_as(k), "w": beta.unsqueeze(-1).expand_as(v), "g": g}


def _erase_decayed(k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> dict[str, Tensor]:
    """p = α k: what it finds before the decay is what k finds after it."""
    return {"p": g.exp().unsqueeze(-1) * k, "beta": beta, "g": g}


def _erase_nothing(k: Tensor, v: Tensor, g: Tensor) -> dict[str, Tensor]:
    """a = 0, whatever κ is."""
    return {"kappa": k, "a": torch.zeros_like(k), "g": g}


def _explicit_rate(k: Tensor, v: Tensor, beta: Tensor) -> dict[str, Tensor]:
    """The β for which ε is the given rate, which has to be below 1 / kᵀk."""
    return {"beta": beta / (1 - beta * (k * k).sum(-1))}


_ROWS = (
    Rule(
        "additive",
        step=reference.additive,
        lower=lowering.additive,
        lower_uses_k=False,
        paper="Schmidhuber 1991; Katharopoulos et al. 2020, arXiv 2006.16236",
        bibtex="""@inproceedings{katharopoulos2020transformers,
  title = {Transformers are {RNN}s: Fast Autoregressive Transformers with Linear Attention},
  author = {Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, Fran{\\c{c}}ois},
  booktitle = {International Conference on Machine Learning}, year = {2020}}""",
    ),
    Rule(
        "decay",
        step=reference.decay,
        gates={"g": spec.decay()},
        lower=lowering.decay,
        lower_uses_k=False,
        extends={"additive": _without_decay},
        paper="RetNet, Sun et al. 2023, arXiv 2307.08621; Mamba-2, Dao and Gu 2024, arXiv 2405.21060",
        bibtex="""@article{sun2023retentive,
  title = {Retentive Network: A Successor to {T}ransformer for Large Language Models},
  author = {Sun, Yutao and Dong, Li and Huang, Shaohan and Ma, Shuming and Xia, Yuqing and Xue, Jilong and
            Wang, Jianyong and Wei, Furu},
  journal = {arXiv preprint arXiv:2307.08621}, year = {2023}}""",
    ),
    Rule(
        "gla",
        step=reference.gla,
        gates={"g": spec.decay("BTHK")},
        lower=lowering.decay,
        lower_uses_k=False,
        extends={"decay": _every_channel},
        paper="Gated Linear Attention, Yang et al. 2024, arXiv 2312.06635",
        bibtex="""@inproceedings{yang2024gated,
  title = {Gated Linear Attention Transformers with Hardware-Efficient Training},
  author = {Yang, Songlin and Wang, Bailin and Shen, Yikang and Panda, Rameswar and Kim, Yoon},
  booktitle = {International Conference on Machine Learning}, year = {2024}}""",
    ),
    Rule(
        "delta",
        step=reference.delta,
        gates={"beta": spec.beta()},
        lower=lowering.delta,
        lower_uses_k=False,
        normalised=reference.delta_normalised,
        erases=True,
        paper="Schlag, Irie and Schmidhuber 2021, arXiv 2102.11174",
        bibtex="""@inproceedings{schlag2021linear,
  title = {Linear Transformers Are Secretly Fast Weight Programmers},
  author = {Schlag, Imanol and Irie, Kazuki and Schmidhuber, J{\\"u}rgen},
  booktitle = {International Conference on Machine Learning}, year = {2021}}""",
    ),
    Rule(
        "gated_delta",
        step=reference.gated_delta,
        gates={"beta": spec.beta(), "g": spec.decay()},
        lower=lowering.delta,
        lower_uses_k=False,
        normalised=reference.gated_delta_normalised,
        extends={"delta": _without_decay},
        erases=True,
        paper="Gated DeltaNet, Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464",
        bibtex="""@inproceedings{yang2025gated,
  title = {Gated Delta Networks: Improving {M}amba2 with Delta Rule},
  author = {Yang, Songlin and Kautz, Jan and Hatamizadeh, Ali},
  booktitle = {International Conference on Learning Representations}, year = {2025}}""",
    ),
    Rule(
        "kda",
        step=reference.kda,
        gates={"beta": spec.beta(), "g": spec.decay("BTHK")},
        lower=lowering.delta,
        lower_uses_k=False,
        normalised=reference.kda_normalised,
        extends={"gated_delta": _every_channel},
        erases=True,
        paper="Kimi Linear, Kimi Team 2025, arXiv 2510.26692",
        bibtex="""@article{kimi2025linear,
  title = {Kimi Linear: An Expressive, Efficient Attention Architecture},
  author = {{Kimi Team}},
  journal = {arXiv preprint arXiv:2510.26692}, year = {2025}}""",
    ),
    # Equations 9 and 10 of the paper. Its layer has unit q and k, and b and w between 0 and 1.
    Rule(
        "gdn2",
        step=reference.gdn2,
        gates={"b": spec.beta("BTHK"), "w": spec.beta("BTHV"), "g": spec.decay("BTHK")},
        lower=lowering.gdn2,
        extends={"kda": _one_strength},
        erases=True,
        paper="Gated DeltaNet-2, Hatamizadeh, Choi and Kautz 2026, arXiv 2605.22791",
        bibtex="""@article{hatamizadeh2026gated,
  title = {Gated {DeltaNet}-2: Decoupling Erase and Write in Linear Attention},
  author = {Hatamizadeh, Ali and Choi, Yejin and Kautz, Jan},
  journal = {arXiv preprint arXiv:2605.22791}, year = {2026}}""",
    ),
    # The closed form of the paper's theorem, with β per head. The theorem has β per value channel, which needs one
    # triangular solve per channel. The authors' model also takes the diagonal of k kᵀ for k kᵀ: another recurrence.
    Rule(
        "longhorn",
        step=reference.longhorn,
        gates={"beta": spec.beta()},
        lower=lowering.longhorn,
        extends={"delta": _explicit_rate},
        erases=True,
        any_keys=True,
        paper="Longhorn, Liu et al. 2025, arXiv 2407.14207",
        bibtex="""@inproceedings{liu2025longhorn,
  title = {Longhorn: State Space Models are Amortized Online Learners},
  author = {Liu, Bo and Wang, Rui and Wu, Lemeng and Feng, Yihao and Stone, Peter and Liu, Qiang},
  booktitle = {International Conference on Learning Representations}, year = {2025}}""",
    ),
    # Equation 5 of the paper and the chunk form of the authors' code: p reads S before the decay. The authors' variant
    # "iplr", and one naive function of flash-linear-attention, let it read αS instead.
    Rule(
        "comba",
        step=reference.comba,
        gates={"p": spec.unit_key(), "beta": spec.strength(), "g": spec.decay()},
        lower=lowering.comba,
        lower_uses_k=False,
        extends={"gated_delta": _erase_decayed},
        erases=True,
        paper="Comba, Hu et al. 2025, arXiv 2506.02475",
        bibtex="""@inproceedings{hu2025improving,
  title = {Improving Bilinear {RNN}s with Closed-loop Control},
  author = {Hu, Jiaxi and Pan, Yongqi and Du, Jusen and Lan, Disen and Tang, Xiaqiang and Wen, Qingsong and
            Liang, Yuxuan and Sun, Weigao},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2025},
  note = {arXiv:2506.02475}}""",
    ),
    # As in the authors' NumPy inference code: κ has unit length, k is not normalised, a and g are per key channel.
    Rule(
        "rwkv7",
        step=reference.rwkv7,
        gates={"kappa": spec.unit_key(), "a": spec.strength("BTHK"), "g": spec.decay("BTHK")},
        lower=lowering.rwkv7,
        extends={"gla": _erase_nothing},
        erases=True,
        any_keys=True,
        paper="RWKV-7, Peng et al. 2025, arXiv 2503.14456",
        bibtex="""@article{peng2025rwkv7,
  title = {{RWKV}-7 ``{G}oose'' with Expressive Dynamic State Evolution},
  author = {Peng, Bo and Zhang, Ruichong and Goldstein, Daniel and Alcaide, Eric and Du, Xingjian and Hou, Haowen and
            Lin, Jiaju and Liu, Jiaxing and Lu, Janna and Merrill, William and Song, Guangyu and Tan, Kaifeng and
            Utpala, Saiteja and Wilce, Nathan and Wind, Johan S. and Wu, Tianyi and Wuttke, Daniel and
            Zhou-Zheng, Christian},
  journal = {arXiv preprint arXiv:2503.14456}, year = {2025}}""",
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ROWS}


def get(rule: str | Rule) -> Rule:
    """The row of that name, or the `Rule` itself. ValueError for an unknown name, with the nearest one."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, str) and rule in RULES:
        return RULES[rule]
    from fwp.errors import suggest

    raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}{suggest(str(rule), RULES)}")


def _reduced(rule: Rule) -> Any:
    """How pickle and copy see a rule: by its name in the table or in its module, as they see functions; else by value.

    So a rule may hold functions that can't be pickled, such as lambdas.
    """
    if RULES.get(rule.name) is rule:
        return get, (rule.name,)
    for module, content in [*sys.modules.items()]:
        for name, value in [*getattr(content, "__dict__", {}).items()]:
            if value is rule:
                return _defined, (module, name)
    return rule.__reduce_ex__(2)


def _defined(module: str, name: str) -> Rule:
    """The rule of that name in a module."""
    return getattr(import_module(module), name)


copyreg.pickle(Rule, _reduced)
torch.serialization.add_safe_globals([get])  # for torch.load, which by default makes known types only
