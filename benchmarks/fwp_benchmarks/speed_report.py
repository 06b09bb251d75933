"""What `fwp bench` shows of its rows: a table, which goals hold, two plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .peers import LEADER

Row = dict[str, Any]

# ---- goals ----

TWIN = "D = 128, scaled by its operations"


@dataclass(frozen=True)
class Goal:
    """What is to hold of every row that it is about.

    faster: how many times as long as ours a peer takes at least. near: how many times the limit ours takes at most.
    """

    work: str
    about: Callable[[Row], bool]
    faster: float
    near: float | None = None
    peer: str = LEADER


def _trained(row: Row) -> bool:
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
    """Each goal with its worst ratios and whether it holds: None without a measurement of all that it is about."""
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
    """The times of a row of D = 256, and what D = 128 took for the same, in proportion to the operations."""
    same = ("what", "B", "T", "H", "pass", "mode", "device")
    twins = [x for x in rows if x["D"] == 128 and all(x.get(name) == row.get(name) for name in same)]
    seconds: dict[str, float] = dict(row["seconds"])
    if twins and "ours" in twins[0]["seconds"]:
        seconds[TWIN] = twins[0]["seconds"]["ours"] * row["operations"] / twins[0]["operations"]
    return seconds


# ---- tables ----


def table(rows: list[Row]) -> Table:
    """A line a row: our time, that of the others over ours, ours over the limit."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "ours"))
    headers = (
        "rule",
        "on",
        "B·H",
        "T",
        "D",
        "pass",
        "ms",
        *(f"{name.replace(LEADER, 'fla')}\n/ ours" for name in names),
    )
    made = Table(*headers, "ours\n/ limit", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        start = (row["what"], row.get("backend", ""), str(row["B"] * row["H"]), str(row["T"]), str(row["D"]))
        kind = row["pass"].replace("forward", "fwd").replace("backward", "bwd")
        kind += " in a graph" if row.get("mode") == "graph" else ""
        ours = row["seconds"].get("ours")
        if row.get("red") or ours is None:
            made.add_row(*start, kind, row.get("red") or row["note"])
            continue
        ratios = (f"{row['seconds'][name] / ours:.2f}" if name in row["seconds"] else "" for name in names)
        made.add_row(*start, kind, f"{ours * 1e3:.3g}", *ratios, f"{ours / row['limit']:.1f}" if row["limit"] else "")
    return made


def in_words(goal: dict[str, Any]) -> str:
    """A verdict as a line."""
    held = {True: "held", False: "not held", None: "not measured"}[goal["holds"]]
    ratios = []
    if goal["faster"] is not None:
        ratios.append(f"{goal['faster']:.2f} times as fast as {goal['peer']} (at least {goal['at least']})")
    if goal["times the limit"] is not None:
        ratios.append(f"{goal['times the limit']:.2f} times the limit (at most {goal['at most']})")
    ratios.append(f"{goal['compared']} of {goal['rows']} rows")
    return f"{held}: {goal['work']}: {'; '.join(ratios)}"


# ---- plots ----


def plots(rows: list[Row], json_file: Path) -> list[Path]:
    """Time against T, of rules measured at several, and the fraction of the limit, beside the JSON file."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["limit"] and "ours" in row["seconds"] and row["mode"] == "eager"]
    trained = [row for row in timed if row["pass"] == "forward + backward"]
    made = []
    plain = [row for row in trained if row["what"] == row["rule"] and row["D"] == 128]
    lengths: dict[str, list[Row]] = {}
    for row in sorted(plain, key=lambda row: row["T"]):
        lengths.setdefault(row["rule"], []).append(row)
    swept = {rule: of for rule, of in lengths.items() if len({row["T"] for row in of}) > 1}
    figure = Figure(figsize=(max(4, 4 * len(swept)), 4), layout="constrained")
    for at, (rule, of) in enumerate(swept.items(), 1):
        axes = figure.add_subplot(1, len(swept), at)
        for name in names(of):
            times = [(row["T"], token(row, row["seconds"][name])) for row in of if name in row["seconds"]]
            axes.loglog(*zip(*times), marker="o", label=name)
        axes.loglog(*zip(*((row["T"], token(row, row["limit"])) for row in of)), "k:", label="limit")
        axes.set(title=f"{rule}, forward + backward, D = 128", xlabel="T", ylabel="ns a token and head")
        axes.legend()
    if swept:
        made.append(save(figure, json_file, "time"))
    figure = Figure(figsize=(7, 1 + 0.3 * max(1, len(trained))), layout="constrained")
    axes = figure.add_subplot()
    for name in names(trained):
        points = [(row["limit"] / row["seconds"][name], i) for i, row in enumerate(trained) if name in row["seconds"]]
        axes.plot(*zip(*points), "o", label=name)
    labels = [f"{row['what']}, T {row['T']}, D {row['D']}, B·H {row['B'] * row['H']}" for row in trained]
    axes.set_yticks(range(len(trained)), labels)
    axes.invert_yaxis()
    axes.set(title="forward + backward", xlabel="fraction of the limit", xscale="log")
    axes.axvline(1, color="k", linestyle=":")
    if trained:
        axes.legend()
    made.append(save(figure, json_file, "limit"))
    return made


def names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["seconds"]))


def token(row: Row, seconds: float) -> float:
    """Nanoseconds a token and head."""
    return float(seconds * 1e9 / (row["B"] * row["T"] * row["H"]))


def save(figure: Any, json_file: Path, name: str) -> Path:
    path = json_file.with_name(f"{json_file.stem}-{name}.png")
    figure.savefig(path, dpi=150)
    return path
