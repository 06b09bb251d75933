"""The parts of a reproduction: settings of runs, rows of results, and claims to test against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]  # JSON values that determine a run's result, "seed" among them
Rows = Sequence[Mapping[str, Any]]  # one row per run: its settings and its results


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run.

    settings: one per run. cost: how long all runs take, in words.
    judged: whether claims are measured; False for a scale that only shows that the code runs.
    """

    settings: Sequence[Settings]
    cost: str
    judged: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the rows say about a claim.

    measured: our value. holds: None if the rows can't decide it. spread: the range of our value, or None.
    note: the reason, or what a reader should know beside the verdict.
    """

    measured: Any
    holds: bool | None
    spread: Any = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that can be false.

    published: the paper's value. source: where the paper gives it. method: how the value is measured here.
    measure: (rows) → `Outcome`.
    """

    id: str
    statement: str
    published: Any
    source: str
    method: str
    measure: Callable[[Rows], Outcome]


@dataclass(frozen=True)
class Paper:
    """A reproduced paper.

    not_attempted: its results that no family trains, so that a count of claims isn't read as the whole paper.
    """

    name: str
    not_attempted: Sequence[str]


@dataclass(frozen=True)
class Family:
    """One experiment of a paper, and the claims that rest on it.

    protocol: the experiment in steps, for the report. caption: that of the figure. scales: by name.
    train: (settings) → the result of one run. It must be a module's top-level function, so that it can be sent to other
    processes.
    summarise: (row) → one line for the terminal. draw: (rows) → the figure.
    """

    id: str
    title: str
    paper: Paper
    question: str
    protocol: Sequence[str]
    caption: str
    scales: Mapping[str, Scale]
    train: Callable[[Settings], Mapping[str, Any]]
    summarise: Callable[[Mapping[str, Any]], str]
    draw: Callable[[Rows], Figure]
    claims: Sequence[Claim]
