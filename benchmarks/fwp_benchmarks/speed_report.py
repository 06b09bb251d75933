"""The report of `fwp bench`: a table of its rows, the goals with their verdicts, and two plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from fwp.terminal import fitted

from .peers import LEADER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

# ---- goals ----

TWIN = "D = 128, scaled by its operations"


@dataclass(frozen=True)
class Goal:
    """Bounds that must hold for every row that the goal is about.

    work: the goal in words. about: whether a row belongs to the goal. peer: the one to compare with.
    faster: the least ratio of the peer's time to ours. near: the greatest ratio of our time to the limit.
    """

    work: str
    about: Callable[[Row], bool]
    faster: float
    near: float | None = None
    peer: str = LEADER


def _trained(row: Row) -> bool:
    """Whether a row is about training, eagerly, on sequences of more than 512 tokens."""
    return row["pass"] == "forward + backward" and row["mode"] == "eager" and row["T"] > 512


GOALS = (
    Goal(
        "additive, decay: forward + backward, T ≥ 2048, D 64 and 128",
        lambda row: _trained(row) and row["what"] in ("additive", "decay") and row["T"] >= 2048 and row["D"] <= 128,
        2,
        2.5,
    ),
    Goal(
        "additive with DPFP-3 or elu+1 and denominator, D 16, 32, 64: forward + backward",
        lambda row: _trained(row) and row["rule"] == "additive" and row["denominator"],
        3,
        4,
    ),
    Goal(
        "delta, gated_delta, kda: forward + backward",
        lambda row: _trained(row) and row["rule"] in ("delta", "gated_delta", "kda") and row["D"] <= 128,
        1.3,
        5,
    ),
    Goal(
        "gated_delta past FlashQLA: forward + backward",
        lambda row: _trained(row) and row["rule"] == "gated_delta" and row["D"] == 128,
        1,
        None,
        "flash-qla",
    ),
    Goal(
        "T ≤ 512, eager (host path)",
        lambda row: 1 < row["T"] <= 512 and row["mode"] == "eager" and row["pass"] != "first call",
        4,
    ),
    Goal(
        "decode step in a graph, batch ≥ 64, 32 heads, D 128",
        lambda row: row["pass"] == "step" and row["mode"] == "graph" and row["B"] >= 64,
        1.3,
        1.5,
    ),
    Goal("first call, cold", lambda row: row["pass"] == "first call", 10),
    Goal("D = 256 never slower than D = 128 scaled by its operations", lambda row: row["D"] == 256, 1, None, TWIN),
)


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Each goal with its worst ratios and whether it holds.

    "holds" is None if the measured rows hold but others are missing.
    """
    found = []
    for goal in GOALS:
        about = [row for row in rows if goal.about(row | {"mode": row.get("mode", "eager")})]
        seconds = [with_twin(row, rows) if goal.peer == TWIN else row["seconds"] for row in about]
        both = [(s[goal.peer] / s["ours"]) for s in seconds if goal.peer in s and "ours" in s]
        near = [row["seconds"]["ours"] / row["limit"] for row in about if row["limit"] and "ours" in row["seconds"]]
        faster, far = min(both, default=None), max(near, default=None) if goal.near else None
        judged = [] if faster is None else [faster >= goal.faster]
        judged += [] if far is None or goal.near is None else [far <= goal.near]
        red = any(row.get("red") for row in about)
        whole = bool(about) and len(both) == len(about) and (goal.near is None or len(near) == len(about))
        holds = False if red or not all(judged) else True if whole else None
        found.append(
            {
                "work": goal.work,
                "peer": goal.peer,
                "rows": len(about),
                "compared": len(both),
                "faster": faster,
                "at least": goal.faster,
                "times the limit": far,
                "at most": goal.near,
                "holds": holds,
            }
        )
    return found


def with_twin(row: Row, rows: list[Row]) -> dict[str, float]:
    """The times of a row with D = 256, and our time at D = 128 scaled by the operations of both."""
    same = ("what", "B", "T", "H", "pass", "mode", "device")
    twins = [x for x in rows if x["D"] == 128 and all(x.get(name) == row.get(name) for name in same)]
    seconds: dict[str, float] = dict(row["seconds"])
    if twins and "ours" in twins[0]["seconds"]:
        seconds[TWIN] = twins[0]["seconds"]["ours"] * row["operations"] / twins[0]["operations"]
    return seconds


# ---- tables ----


def show(rows: list[Row], console: Console) -> None:
    """Prints one line per row: our time, every other time over ours, and ours over the limit.

    Of columns that do not fit, the least important are left out. What was not timed has a line below.
    """
    others = [name for name in timed_names(rows) if name != "ours"]
    columns = [columns_of(row, others) for row in rows]
    headers = list(columns[0])
    for left_out in ("", "on", "B·H", *reversed(headers[7:-1])):
        headers = [header for header in headers if header != left_out]
        made = fitted(console, None, headers, [[escape(cells[header]) for header in headers] for cells in columns])
        if made is not None:
            console.print(made)
            break
    for row in rows:
        if "ours" not in row["seconds"] or row.get("red"):
            why = row.get("red") or row["note"]
            console.print(f"{row['what']}, T {row['T']}, D {row['D']}, {short(row)}: {why}", markup=False)


def columns_of(row: Row, others: list[str]) -> dict[str, str]:
    """The cells of a row by their headers."""
    seconds = {} if row.get("red") else row["seconds"]
    ours = seconds.get("ours", math.inf)
    ratios = {
        f"{name.replace(LEADER, 'fla')} / ours": f"{seconds[name] / ours:.2f}"
        if {name, "ours"} <= seconds.keys()
        else ""
        for name in others
    }
    return {
        "rule": row["what"],
        "on": row.get("backend", ""),
        "B·H": str(row["B"] * row["H"]),
        "T": str(row["T"]),
        "D": str(row["D"]),
        "pass": short(row),
        "ms": f"{ours * 1e3:.3g}" if seconds else "wrong" if row.get("red") else "–",
        **ratios,
        "ours / limit": f"{ours / row['limit']:.1f}" if row["limit"] and seconds else "",
    }


def short(row: Row) -> str:
    """The pass and mode of a row in few characters."""
    kind = row["pass"].replace("forward + backward", "fwd+bwd").replace("forward", "fwd")
    return kind + (", graph" if row.get("mode") == "graph" else "")


def in_words(goal: dict[str, Any]) -> str:
    """A verdict in one line."""
    held = {True: "held", False: "not held", None: "not measured"}[goal["holds"]]
    ratios = []
    if goal["faster"] is not None:
        ratios.append(f"{goal['faster']:.2f} times as fast as {goal['peer']} (at least {goal['at least']})")
    if goal["times the limit"] is not None:
        ratios.append(f"{goal['times the limit']:.2f} times the limit (at most {goal['at most']})")
    ratios.append(f"{goal['compared']} of {goal['rows']} rows")
    return f"{held}: {goal['work']}: {'; '.join(ratios)}"


# ---- plots ----

WIDTH = 7  # inches: that of a page, where text of 8 points and more is legible
ACROSS = 2


def plots(rows: list[Row], json_file: Path) -> list[Path]:
    """Draws time against T for rules measured at several T, and the fraction of the limit for all.

    Returns the paths of the figures, which lie beside the JSON file.
    """
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["limit"] and "ours" in row["seconds"] and row["mode"] == "eager"]
    trained = [row for row in timed if row["pass"] == "forward + backward"]
    made = []
    plain = [row for row in trained if row["what"] == row["rule"] and row["D"] == 128]
    lengths: dict[str, list[Row]] = {}
    for row in sorted(plain, key=lambda row: row["T"]):
        lengths.setdefault(row["rule"], []).append(row)
    swept = {rule: same for rule, same in lengths.items() if len({row["T"] for row in same}) > 1}
    down = -(-len(swept) // ACROSS)
    figure = Figure(figsize=(WIDTH, 2.8 * max(1, down)), layout="constrained")
    for at, (rule, same) in enumerate(swept.items(), 1):
        axes = figure.add_subplot(down, min(ACROSS, len(swept)), at)
        for name in timed_names(same):
            times = [(row["T"], ns_per_token(row, row["seconds"][name])) for row in same if name in row["seconds"]]
            axes.loglog(*zip(*times), marker="o", label=name)
        axes.loglog(*zip(*((row["T"], ns_per_token(row, row["limit"])) for row in same)), "k:", label="limit")
        axes.set(title=rule, xlabel="T", ylabel="ns per token and head")
    figure.suptitle("forward + backward, D = 128")
    legend(figure)
    if swept:
        made.append(save(figure, json_file, "time"))
    figure = Figure(figsize=(WIDTH, 1 + 0.3 * max(1, len(trained))), layout="constrained")
    axes = figure.add_subplot()
    for name in timed_names(trained):
        points = [(row["limit"] / row["seconds"][name], i) for i, row in enumerate(trained) if name in row["seconds"]]
        axes.plot(*zip(*points), "o", label=name)
    labels = [f"{row['what']}, T {row['T']}, D {row['D']}, B·H {row['B'] * row['H']}" for row in trained]
    axes.set_yticks(range(len(trained)), labels)
    axes.invert_yaxis()
    axes.set(title="forward + backward", xlabel="fraction of the limit", xscale="log")
    axes.axvline(1, color="k", linestyle=":")
    legend(figure)
    made.append(save(figure, json_file, "limit"))
    return made


def legend(figure: Figure) -> None:
    """Names the lines of all axes once, below them."""
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)


def timed_names(rows: Iterable[Row]) -> list[str]:
    """The names of all that were timed, in the order of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row["seconds"]))


def ns_per_token(row: Row, seconds: float) -> float:
    """Nanoseconds per token and head."""
    return float(seconds * 1e9 / (row["B"] * row["T"] * row["H"]))


def save(figure: Figure, json_file: Path, name: str) -> Path:
    """Writes a figure beside the JSON file and returns its path."""
    path = json_file.with_name(f"{json_file.stem}-{name}.png")
    figure.savefig(path, dpi=150)
    return path
