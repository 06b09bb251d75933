"""What a reproduction is made of: settings, rows of results, and claims that they confirm or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]  # everything that decides a run's result, with its "seed"; JSON values
Rows = Sequence[Mapping[str, Any]]  # one row per run: its settings and its results


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run.

    settings: the runs. cost: how long they take, in words. judged: False if the scale only shows that the code runs;
    then no claim is measured.
    """

    settings: Sequence[Settings]
    cost: str
    judged: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the rows say of a claim. holds: None if the rows it needs are missing.

    note: why, in one sentence.
    """

    measured: Any
    holds: bool | None
    spread: Any = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that can be false.

    published: the paper's value. source: its place in the paper. method: how the same is measured here.
    measure: (rows) → `Outcome`.
    """

    id: str
    statement: str
    published: Any
    source: str
    method: str
    measure: Callable[[Rows], Outcome]


@dataclass(frozen=True)
class Family:
    """One experiment of a paper and the claims that rest on it.

    train: (settings) → result of one run. It must stand at the top level of a module, to be sent to other processes.
    summarise: (row) → one line for the terminal. draw: (rows) → the figure.
    """

    id: str
    title: str
    paper: str
    question: str
    protocol: Sequence[str]
    caption: str
    scales: Mapping[str, Scale]
    train: Callable[[Settings], Mapping[str, Any]]
    summarise: Callable[[Mapping[str, Any]], str]
    draw: Callable[[Rows], Figure]
    claims: Sequence[Claim]
