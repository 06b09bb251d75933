"""The table of fast weight update rules: a row a rule, the only list there is.

Two axes make all six: decay (none, a number a head, a number a key channel) × correction (none, delta).
"""

from __future__ import annotations

from torch import Tensor

from fwp.rules import lowering, reference, spec
from fwp.rules.spec import Gate, Rule

__all__ = ["RULES", "Gate", "Rule", "get"]


def _without_decay(k: Tensor, v: Tensor, **gates: Tensor) -> dict[str, Tensor]:
    """g = 0 a head."""
    return gates | {"g": k.new_zeros(k.shape[:3])}


def _every_channel(k: Tensor, v: Tensor, g: Tensor, **gates: Tensor) -> dict[str, Tensor]:
    """One decay a head is the same decay in every key channel."""
    return gates | {"g": g.unsqueeze(-1).expand(*g.shape, k.shape[-1])}


_ROWS = (
    Rule(
        "additive",
        step=reference.additive,
        lower=lowering.additive,
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
        normalised=reference.kda_normalised,
        extends={"gated_delta": _every_channel},
        erases=True,
        paper="Kimi Linear, Kimi Team 2025, arXiv 2510.26692",
        bibtex="""@article{kimi2025linear,
  title = {Kimi Linear: An Expressive, Efficient Attention Architecture},
  author = {{Kimi Team}},
  journal = {arXiv preprint arXiv:2510.26692}, year = {2025}}""",
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
