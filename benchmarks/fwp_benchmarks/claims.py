"""What a reproduction is made of: runs, rows of results, and claims that the rows bear out or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]  # everything that decides a run's result, "seed" among it; JSON values
Rows = Sequence[Mapping[str, Any]]  # a run's settings and what came out of it, a row a run


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run.

    settings: the runs. cost: how long that takes, in words. judged: False where it only shows that the code runs, so
    that no claim is measured.
    """

    settings: Sequence[Settings]
    cost: str
    judged: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the rows say of a claim. holds: None where the rows it needs are missing. note: why, in one sentence."""

    measured: Any
    holds: bool | None
    spread: Any = None
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that can be false.

    published: the paper's value. source: where it stands. method: how the same is measured here.
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

    train: (settings) → result, one run; a function at a module's top level, as it is sent to other processes.
    describe: (row) → one line for the terminal. draw: (rows) → the figure.
    """

    id: str
    title: str
    paper: str
    question: str
    protocol: Sequence[str]
    caption: str
    scales: Mapping[str, Scale]
    train: Callable[[Settings], Mapping[str, Any]]
    describe: Callable[[Mapping[str, Any]], str]
    draw: Callable[[Rows], Figure]
    claims: Sequence[Claim]
