"""The command line and `fwp reproduce`: no run is lost or repeated, and claims can fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fwp
from fwp import cli
from fwp_benchmarks import reproduce, results, workers
from fwp_benchmarks.claims import Claim, Family, Outcome, Paper, Scale
from fwp_benchmarks.papers.secretly_fast_weights_1 import SETTING_1

ROOT = Path(__file__).resolve().parents[1]


# ---- the runner ----


def count(run: dict[str, Any]) -> dict[str, Any]:
    """A run that leaves a file, so that runs can be counted."""
    with open(run["marks"], "a", encoding="utf-8") as file:
        file.write(f"{run['n']}\n")
    if run["n"] == run["fails"]:
        raise FloatingPointError(f"run {run['n']}")
    if run["n"] == run["sleeps"]:
        time.sleep(600)
        with open(run["marks"], "a", encoding="utf-8") as file:
            file.write("woke\n")
    deaf = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    worker = [torch.get_num_threads(), os.environ["MALLOC_TOP_PAD_"], deaf]
    return {"square": run["n"] ** 2, "worker": worker}


def draw(rows: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([row["square"] for row in rows])
    return figure


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The only family: five trivial runs and two claims."""

    def runs(fails: int = -1, sleeps: int = -1) -> list[dict[str, Any]]:
        same = {"seed": 1, "marks": str(tmp_path / "marks"), "fails": fails, "sleeps": sleeps}
        return [{"n": n, **same} for n in range(5)]

    total = lambda rows: sum(row["square"] for row in rows)  # noqa: E731
    toy = Family(
        id="toy",
        title="Squares <of> numbers",
        paper=Paper("Nobody 0, No paper & none", not_attempted=("the moon & stars",)),
        question="What is their sum?",
        protocol=("Square.", "Add."),
        caption="Squares.",
        scales={
            "smoke": Scale(runs(), "nothing", judged=False),
            "quick": Scale(runs(), "nothing"),
            "reduced": Scale(runs(fails=3), "nothing, but fails"),
            "paper": Scale(runs(sleeps=1), "ten minutes"),
        },
        train=count,
        summarise=lambda row: f"run {row['n']}",
        draw=draw,
        claims=(
            Claim("sum", "The sum is 30.", 30, "page 1", "added", lambda rows: Outcome(total(rows), total(rows) == 30)),
            Claim("odd", "The sum is odd.", None, "page 2", "added", lambda rows: Outcome(30, False, [30, 31], "no")),
        ),
    )
    monkeypatch.setattr(reproduce, "FAMILIES", {"toy": toy})
    return toy


def marks(tmp_path: Path) -> list[int]:
    return sorted(map(int, (tmp_path / "marks").read_text().split()))


def test_stopping_does_not_wait(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "cores", lambda: 1)
    running = reproduce.train([(family, run) for run in family.scales["paper"].settings])
    assert next(running)[1]["n"] == 0
    running.close()
    assert "woke" not in (tmp_path / "marks").read_text()


def fill(family: Family, scale: str, out: Path) -> None:
    """Stores results for all runs of a scale."""
    for run in family.scales[scale].settings:
        row = {"square": run["n"] ** 2, "seconds": 1.0, "torch": "2", "device": "cpu"}
        results.append(results.results_file(family, out), {"key": results.run_key(run), **run, **row})


def strict(path: Path) -> Any:
    """JSON by the standard, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_runs_once_and_resumes(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # a worker uses one all the same
    out, lines = tmp_path / "results", []
    environment = dict(os.environ)
    report = reproduce.main([], "quick", out, lambda done, total, text: lines.append((done, total, text)))
    assert os.environ == environment
    assert marks(tmp_path) == [0, 1, 2, 3, 4]
    assert [line[:2] for line in lines] == [(n, 5) for n in range(6)]
    rows = results.finished(family, "quick", out)
    assert [row["square"] for row in rows] == [0, 1, 4, 9, 16]
    assert all(row["worker"] == [1, workers.WORKER["MALLOC_TOP_PAD_"], True] for row in rows)

    file = results.results_file(family, out)
    kept = file.read_bytes().splitlines(keepends=True)
    no_run = json.dumps({"key": json.loads(kept[3])["key"]}).encode() + b"\n\xff\n"
    file.write_bytes(b"".join(kept[:3]) + no_run + kept[3][:20])  # a crash in the middle of a line
    reproduce.main([], "quick", out)
    assert len(marks(tmp_path)) == 7
    assert [row["square"] for row in results.finished(family, "quick", out)] == [0, 1, 4, 9, 16]
    report.unlink()
    reproduce.main([], "quick", out)  # all runs are done: it only draws the report again
    assert len(marks(tmp_path)) == 7
    assert report.exists()


def test_every_setting_tells_runs_apart(family: Family) -> None:
    run = SETTING_1.scales["smoke"].settings[0]
    changed = [run | {name: "another"} for name in run]
    assert len({results.run_key(each) for each in (run, *changed)}) == len(run) + 1
    assert results.run_key(dict(reversed(run.items()))) == results.run_key(run)
    assert fwp.__version__ in results.run_key(run)


def test_failing_run_keeps_the_others(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "cores", lambda: 1)
    with pytest.raises(FloatingPointError, match="run 3"):
        reproduce.main([], "reduced", tmp_path)
    assert [row["n"] for row in results.finished(family, "reduced", tmp_path)] == [0, 1, 2]


def test_claims_and_report(family: Family, tmp_path: Path) -> None:
    fill(family, "quick", tmp_path)
    page = reproduce.main(["toy"], "quick", tmp_path).read_text(encoding="utf-8")
    held, failed = strict(tmp_path / "claims.json")
    assert "<td>the moon &amp; stars</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert held == {
        "id": "sum",
        "paper": "Nobody 0, No paper & none",
        "statement": "The sum is 30.",
        "published": 30,
        "source": "page 1",
        "measured": 30,
        "spread": None,
        "seeds": 1,
        "scale": "quick",
        "holds": True,
        "method": "added",
        "note": "",
    }
    assert (failed["holds"], failed["spread"], failed["note"]) == (False, [30, 31], "no")
    assert "<td>Nobody 0, No paper &amp; none</td><td>1</td><td>2</td><td>2</td>" in page
    assert "Squares &lt;of&gt; numbers" in page
    assert "<of>" not in page
    assert "No paper & none" not in page
    assert "fwp reproduce toy --scale quick" in page
    assert "does not hold" in page
    links = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)  # one file that fetches nothing
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_no_nan(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results.append(tmp_path / "rows.jsonl", {"key": "", "loss": math.nan})
    assert not (tmp_path / "rows.jsonl").exists()
    fill(family, "quick", tmp_path)
    wrong = Claim("sum", "", 30, "", "", lambda rows: Outcome(math.nan, False))
    monkeypatch.setattr(reproduce, "FAMILIES", {"toy": dataclasses.replace(family, claims=(wrong,))})
    with pytest.raises(ValueError, match="JSON"):
        reproduce.main([], "quick", tmp_path)


def test_unjudged_and_unfinished(family: Family, tmp_path: Path) -> None:
    fill(family, "smoke", tmp_path)
    page = reproduce.main([], "smoke", tmp_path).read_text(encoding="utf-8")
    assert [claim["holds"] for claim in strict(tmp_path / "claims.json")] == [None, None]
    assert all(claim["note"] for claim in strict(tmp_path / "claims.json"))
    assert "<td>0</td><td>0</td><td>2</td>" in page

    file = results.results_file(family, tmp_path)
    file.write_text(file.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    from fwp_benchmarks import report

    report.write([family], "quick", tmp_path, [])
    assert [claim["note"] for claim in strict(tmp_path / "claims.json")] == ["1 of 5 runs are there"] * 2


# ---- the command line ----


def run(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Starts `fwp` in its own process group, which SIGINT reaches even if a shell made this process ignore it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "fwp.cli", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def two_cores() -> Iterator[None]:
    """A context in which new processes may use two cores, on systems that can limit cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def wait_until_gone(group: int) -> None:
    """Waits until no process of the group is left. Kills those that outlast the limit of a test."""
    try:
        while True:
            os.killpg(group, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return
    except BaseException:
        os.killpg(group, signal.SIGKILL)
        raise


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_keeps_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "results"
    command = ("reproduce", "arora2023-mqar", "--scale", "smoke", "--out", str(out))
    total = len(reproduce.FAMILIES["arora2023-mqar"].scales["smoke"].settings)

    def rows() -> dict[str, list[str]]:
        return {file.name: file.read_text(encoding="utf-8").splitlines() for file in out.glob("*.jsonl")}

    def count(found: dict[str, list[str]]) -> int:
        return sum(map(len, found.values()))

    before = rows()
    for stop, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with two_cores():  # more workers might be done before they are stopped
            process = run(*command)
        while count(rows()) <= count(before):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, stop)  # to the whole group, as Ctrl-C in a terminal does
        _, error = process.communicate()
        assert process.returncode == status
        assert error == f"Stopped. The finished runs are in {out}; to go on: fwp {' '.join(command)}\n"
        wait_until_gone(process.pid)
        kept = rows()
        assert all(kept[name][: len(lines)] == lines for name, lines in before.items())
        assert count(before) < count(kept) < total
        before = kept

    process = run(*command)
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert f"{count(before)} of {total} runs are there already" in output
    assert "The report: " in output
    after = rows()
    assert all(after[name][: len(lines)] == lines for name, lines in before.items())
    assert count(after) == total


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    process = run("reproduce", "--scale", "quick", "--out", str(tmp_path), env=os.environ | {"PYTHONUNBUFFERED": "1"})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        process.communicate()
        pytest.skip("needs Linux's /proc")
    while len(children.read_text().split()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(5)  # the workers import torch
    process.kill()
    process.wait()
    wait_until_gone(process.pid)
    process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "reproduce --scale quik",
            "scale: expected one of smoke, quick, reduced, paper, got 'quik'; did you mean 'quick'?",
        ),
        ("reproduce schlag2021-seting1", "did you mean 'schlag2021-setting1'?"),
        ("reproduce --scal quick", "--scale"),
        ("reproduce --out pyproject.toml", "out: expected a folder that can be written, got 'pyproject.toml': "),
        ("reprduce", "reproduce"),
        ("check --rule dleta", "did you mean 'delta'?"),
        ("check --rule missing.py:RULE", "missing.py"),
        ("check --backend trition", "did you mean 'triton'?"),
        ("reproduce --out /dev/null/here", "out: expected a folder that can be written, got '/dev/null/here': "),
        ("check --json missing/rows.json", "json: expected a file that can be written, got 'missing/rows.json': "),
        ("check --json tests", "json: expected a file that can be written, got 'tests': "),
        ("list --markdown --bibtex", "at most one"),
    ],
)
def test_bad_arguments(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "main", lambda *_, **__: pytest.fail("worked before looking at the arguments"))
    assert cli.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fwp: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("status", [0, 1])
def test_check_passes_on(status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fwp_benchmarks import equivalence

    seen: list[Any] = []
    monkeypatch.setattr(equivalence, "main", lambda *arguments: seen.append(arguments) or status)
    file = tmp_path / "rows.json"
    assert cli.main(["check", "--rule", "delta", "--backend", "torch", "--json", str(file)]) == status
    assert cli.main(["check"]) == status
    assert seen == [("delta", "torch", file), (None, None, None)]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    table = capsys.readouterr().out
    assert cli.main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(fwp.RULES)
    assert len({line.count(" | ") for line in lines}) == 1
    for rule, line in zip(fwp.RULES.values(), lines[2:]):
        assert rule.name in table
        assert line.startswith(f"| `{rule.name}` | ")
        assert (rule.step.__doc__ or "").splitlines()[0].rstrip(".") in line
        assert rule.paper in line
        assert all(f"{gate} [" in line for gate in rule.gates)
    assert cli.main(["list", "--bibtex"]) == 0
    entries = re.findall(r"^@\w+\{(\w+),", capsys.readouterr().out, re.MULTILINE)
    assert len(entries) == len(set(entries)) == len({rule.bibtex for rule in fwp.RULES.values()})


@pytest.mark.parametrize("command", ["list", "check", "reproduce"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"fwp {command}" in capsys.readouterr().out.split("Examples:")[1]
    assert cli.main([]) == 0
    assert command in capsys.readouterr().out


def test_list_of_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    claims = [claim.id for family in reproduce.FAMILIES.values() for claim in family.claims]
    assert len(set(claims)) == len(claims)
    for family in reproduce.FAMILIES.values():
        assert family.id in printed
        assert set(family.scales) == set(reproduce.SCALES)
        assert all(f"--scale {scale}" in printed for scale in family.scales)
        assert all(claim.statement in printed for claim in family.claims)
        assert family.paper.not_attempted
        assert all(f"not attempted: {result}" in printed for result in family.paper.not_attempted)


README_WIDTH = 830  # pixels of a figure in the rendered README


@pytest.mark.parametrize(
    ("name", "scale"), [*((name, "reduced") for name in reproduce.FAMILIES), ("schlag2021-setting2", "quick")]
)
def test_figures_can_be_read_in_readme(name: str, scale: str) -> None:
    """Every text has at least 9 pixels, none lies on another, and no legend hides a curve or a line."""
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    from fwp_benchmarks import report

    family = reproduce.FAMILIES[name]
    rows = results.finished(family, scale, Path(__file__).parents[1] / "benchmarks" / "results" / scale)
    with matplotlib.rc_context(report.FONT):
        figure = family.draw(rows)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(README_WIDTH / figure.get_size_inches()[0])
    canvas.draw()
    visible = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    axes_off = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in hidden_labels(axis)}
    texts = [text for text in visible if text not in axes_off]
    assert texts
    small = {text.get_text() for text in texts if text.get_fontsize() / 72 * figure.dpi < 9}
    assert not small
    boxes = [text.get_window_extent() for text in texts]
    overlapping = {
        (a.get_text(), b.get_text())
        for i, a in enumerate(texts)
        for j, b in enumerate(texts[:i])
        if boxes[i].shrunk(0.9, 0.9).overlaps(boxes[j].shrunk(0.9, 0.9))
    }
    assert not overlapping
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is None or not legend.get_window_extent().shrunk(1, 0.9).overlaps(axes.bbox.shrunk(0.9, 0.9))
        shown = {text.get_text() for text in (legend.get_texts() if legend else [])}
        shown |= {text.get_text() for whole in figure.legends for text in whole.get_texts()}
        flat = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]  # axhline
        assert all(line.get_label() in shown or figure.legends for line in flat)


@pytest.mark.parametrize("name", reproduce.FAMILIES)
def test_figures_are_drawn_from_what_a_stopped_run_leaves(name: str) -> None:
    """Runs end in any order, so a stopped command may leave any one of them."""
    pytest.importorskip("matplotlib")
    rows = results.finished(reproduce.FAMILIES[name], "quick", ROOT / "benchmarks" / "results" / "quick")
    for left in ([rows[0]], [rows[-1]], rows[1:]):
        assert any(axes.lines for axes in reproduce.FAMILIES[name].draw(left).axes)


def hidden_labels(axis: Any) -> set[Any]:
    """The labels of ticks beyond the limits of an axis, which are not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
