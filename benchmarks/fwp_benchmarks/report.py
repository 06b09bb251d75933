"""Makes figures, `claims.json` and a self-contained `report.html` from the finished runs."""

from __future__ import annotations

import base64
import datetime
import html
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import fwp

from .claims import Claim, Family, Outcome, Paper
from .results import finished, write_whole
from .workers import cores

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1c2126; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .small { color: #555e66; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #d8dde2; }
code, pre { font-family: ui-monospace, monospace; background: #f3f5f7; } pre { padding: .6rem; overflow-x: auto; }
.yes { color: #17703a; font-weight: 600; } .no { color: #b3261e; font-weight: 600; } .open { color: #555e66; }
"""
FONT: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
VERDICTS = {True: ("yes", "holds"), False: ("no", "does not hold"), None: ("open", "undecided")}


def write(families: Iterable[Family], scale: str, out: Path, asked: Sequence[str]) -> Path:
    """Makes figures, claims and report from the finished runs. Returns the path of report.html.

    asked: the families that the command named. The report prints that command.
    """
    families = list(families)
    sections, claims = [], []
    for family in families:
        rows = finished(family, scale, out)
        verdicts = [judge(family, claim, rows, scale) for claim in family.claims]
        claims += verdicts
        sections.append(section(family, rows, scale, verdicts, picture(family, rows, out)))
    write_whole(out / "claims.json", json.dumps(claims, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    path = out / "report.html"
    write_whole(path, page(sections, claims, {family.paper.name: family.paper for family in families}, scale, asked))
    return path


def judge(family: Family, claim: Claim, rows: Sequence[dict[str, Any]], scale: str) -> dict[str, Any]:
    """A claim's entry in claims.json. A claim is measured only if all runs of the scale are finished."""
    wanted = family.scales[scale]
    if not wanted.judged:
        outcome = Outcome(None, None, note=f"the {scale} scale only shows that the code runs")
    elif len(rows) < len(wanted.settings):
        outcome = Outcome(None, None, note=f"{len(rows)} of {len(wanted.settings)} runs are there")
    else:
        outcome = claim.measure(rows)
    return {
        "id": claim.id,
        "paper": family.paper.name,
        "statement": claim.statement,
        "published": claim.published,
        "source": claim.source,
        "measured": outcome.measured,
        "spread": outcome.spread,
        "seeds": seeds(rows),
        "scale": scale,
        "holds": outcome.holds,
        "method": claim.method,
        "note": outcome.note,
    }


def seeds(rows: Sequence[Mapping[str, Any]]) -> int:
    """The number of seeds. A run that trains many nets at once has one seed per net."""
    return len({(row["seed"], n) for row in rows for n in range(row.get("nets", 1))})


def picture(family: Family, rows: Sequence[dict[str, Any]], out: Path) -> str:
    """Draws a family's figure into `<family>.png` beside the report, and returns it as HTML.

    The HTML embeds the image, so that the report needs no other file. Without rows it is empty.
    """
    if not rows:
        return ""
    with matplotlib.rc_context(FONT):
        figure = family.draw(rows)
        FigureCanvasAgg(figure)
        path = out / f"{family.id}.png"
        figure.savefig(path, dpi=200)
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(family.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(family.caption)}</figcaption></figure>"
    )


def section(
    family: Family, rows: Sequence[dict[str, Any]], scale: str, verdicts: Sequence[dict[str, Any]], image: str
) -> str:
    """A family's section of the report, as HTML."""
    wanted = family.scales[scale]
    protocol = "".join(f"<li>{html.escape(line)}</li>" for line in family.protocol)
    spent = sum(row["seconds"] for row in rows)
    versions = sorted({f"torch {row['torch']} on {row['device']}" for row in rows})
    runs = f"{len(rows)} of {len(wanted.settings)} runs, {spent:.0f} s of training"
    runs += f" with {'; '.join(versions)}." if versions else "."
    return (
        f'<h2 id="{family.id}">{html.escape(family.title)}</h2><p class="small">{html.escape(family.paper.name)}</p>'
        f"<p>{html.escape(family.question)}</p><ol>{protocol}</ol>{image}"
        f"<h3>Claims at the scale “{scale}” ({html.escape(wanted.cost)}; seeds: {seeds(rows)})</h3>"
        f"{claim_table(verdicts)}"
        f'<p class="small">{html.escape(runs)} Every run: <code>{family.id}.jsonl</code>.</p>'
    )


def claim_table(verdicts: Sequence[dict[str, Any]]) -> str:
    """The claims with their verdicts, as an HTML table."""
    lines = []
    for claim in verdicts:
        mark, word = VERDICTS[claim["holds"]]
        note = html.escape(claim["note"])
        spread = "" if claim["spread"] is None else f"<br>{html.escape(in_words(claim['spread']))}"
        lines.append(
            f"<tr><td>{html.escape(claim['statement'])}"
            f'<br><span class="small"><code>{claim["id"]}</code>: {html.escape(claim["method"])}</span></td>'
            f"<td>{html.escape(in_words(claim['published']))}"
            f'<br><span class="small">{html.escape(claim["source"])}</span></td>'
            f'<td>{html.escape(in_words(claim["measured"]))}<span class="small">{spread}</span></td>'
            f'<td><span class="{mark}">{word}</span><br><span class="small">{note}</span></td></tr>'
        )
    head = "<tr><th>Claim</th><th>Published</th><th>Measured</th><th>Verdict</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"


def tally(claims: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Counts the claims of each paper: [how many held, how many were decided, how many are listed]."""
    counts: dict[str, list[int]] = {}
    for claim in claims:
        found = counts.setdefault(claim["paper"], [0, 0, 0])
        for i, counted in enumerate((claim["holds"] is True, claim["holds"] is not None, True)):
            found[i] += counted
    return counts


def page(
    sections: Sequence[str],
    claims: Sequence[dict[str, Any]],
    papers: Mapping[str, Paper],
    scale: str,
    asked: Sequence[str],
) -> str:
    """The whole report, as HTML."""
    lines = "".join(
        f"<tr><td>{html.escape(paper)}</td>{''.join(f'<td>{n}</td>' for n in counts)}"
        f"<td>{html.escape('; '.join(papers[paper].not_attempted))}</td></tr>"
        for paper, counts in tally(claims).items()
    )
    summary = "<table><tr><th>Paper</th><th>Claims held</th><th>decided</th><th>listed</th>"
    summary += f"<th>Not attempted</th></tr>{lines}</table>"
    command = " ".join(["fwp", "reproduce", *asked, "--scale", scale])
    made = (
        f"fwp {fwp.__version__}, torch {torch.__version__}, Python {platform.python_version()} on {platform.machine()} "
        f"{platform.system()} with {cores()} cores, {datetime.date.today()}."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Reproductions by fwp</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>Papers on fast weights, reproduced</h1>{summary}{''.join(sections)}"
        f'<h2>Made by</h2><pre>{html.escape(command)}</pre><p class="small">{html.escape(made)}</p></body></html>\n'
    )


def in_words(value: Any) -> str:
    """A value of claims.json as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return " to ".join(map(in_words, value))
    return "–" if value is None else str(value)
