"""The `fwp` command.

Its commands import what they run, so that `fwp list` needs neither benchmarks nor kernels.
"""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fwp.errors import suggest
from fwp.rules import RULES, Rule
from fwp.terminal import show

if TYPE_CHECKING:
    from fwp_benchmarks.claims import Family

app = typer.Typer(
    help="Fast weight programmers: look at the rules, check every implementation, reproduce the papers.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Bad arguments print one line and return 2 before any work starts.
    """
    try:
        return app(arguments, prog_name="fwp", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except Exception as error:
        # newer versions of typer have their own copy of click's exceptions, so their classes can't be named here
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(error.format_message().removeprefix("Invalid value: ").split())
        print(f"fwp: {message}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))


@app.callback(
    invoke_without_command=True,
    epilog="Examples: fwp list · fwp check --rule delta · fwp reproduce schlag2021-setting1 --scale smoke",
)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    """Fast weight programmers: look at the rules, check every implementation, reproduce the papers."""
    if version:
        from fwp import __version__

        print(f"fwp {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which batch queues stop a job. It ends a command as Ctrl-C does."""


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """A context that a stop leaves with a line that says what is kept and how to go on.

    The exit status is 130 after Ctrl-C and 143 after SIGTERM.
    """

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"Stopped. {kept()}", file=sys.stderr)
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def rows_kept(json: Path | None, resumes: bool) -> Callable[[], str]:
    """What a stopped command says of the rows in its file. resumes: whether the same command goes on from them."""

    def stamp() -> tuple[int, int] | None:
        return (json.stat().st_mtime_ns, json.stat().st_size) if json is not None and json.exists() else None

    before = stamp()

    def kept() -> str:
        if json is None or stamp() is None:
            return "No rows were written; the same command starts anew."
        found = f"No rows were added to {json.resolve()}" if stamp() == before else f"The rows are in {json.resolve()}"
        return f"{found}; the same command {'goes on from there' if resumes else 'starts anew and replaces them'}."

    return kept


def known(name: str, value: str, names: Iterable[str]) -> None:
    """Raises BadParameter unless value is one of the names."""
    names = list(names)
    if value not in names:
        raise typer.BadParameter(f"{name}: expected one of {', '.join(names)}, got {value!r}{suggest(value, names)}")


# ---------------------------------------------------------------------------------------------------------- fwp list


@app.command("list", epilog="Examples: fwp list · fwp list --markdown · fwp list --bibtex > fast_weights.bib")
def list_rules(
    markdown: Annotated[bool, typer.Option("--markdown", help="as a Markdown table")] = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="the papers' BibTeX entries")] = False,
) -> None:
    """The table of rules: equation, gates, the simpler rules each extends, paper."""
    if markdown and bibtex:
        raise typer.BadParameter("--markdown, --bibtex: expected at most one of them, got both")
    if bibtex:
        print("\n\n".join(dict.fromkeys(rule.bibtex for rule in RULES.values())))
    elif markdown:
        print(as_markdown())
    else:
        rows = [[escape(cell) for cell in described(rule)] for rule in RULES.values()]
        show(Console(highlight=False), "Fast weight update rules: what S becomes at each token", COLUMNS, rows)


COLUMNS = ("rule", "S becomes", "gates", "extends", "paper")


def described(rule: Rule) -> tuple[str, ...]:
    """The cells of a rule's row in the table."""
    gates = ", ".join(f"{name} [{', '.join(gate.shape)}]" for name, gate in rule.gates.items())
    return rule.name, rule.equation, gates or "none", ", ".join(rule.extends) or "none", rule.paper


def as_markdown() -> str:
    """The table of rules for the README."""
    rows = [
        (f"`{name}`", equation, gates, extends, paper)
        for name, equation, gates, extends, paper in map(described, RULES.values())
    ]
    lines = (COLUMNS, ("---",) * len(COLUMNS), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------------------------- fwp check


@app.command(epilog="Examples: fwp check · fwp check --rule delta --backend torch · fwp check --rule my_rule.py:RULE")
def check(
    rule: Annotated[str | None, typer.Option(metavar="NAME", help="only this rule; FILE.py:NAME for one's own")] = None,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="only this backend")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the rows there as well")] = None,
) -> None:
    """Compares every rule, backend, form and dtype with the paper's equation.

    Exit status 1 if a row fails, or if nothing could be compared.
    """
    from fwp.validate import BACKENDS
    from fwp_benchmarks import equivalence

    if rule is not None:
        try:
            equivalence.find(rule)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if backend is not None:
        known("backend", backend, [name for name in BACKENDS if name != "auto"])
    writable(json)
    with stoppable(rows_kept(json, resumes=False)):
        raise typer.Exit(equivalence.main(rule, backend, json))


# --------------------------------------------------------------------------------------------------------- fwp bench


@app.command(epilog="Examples: fwp build · fwp build --features 64 --features 128")
def build(
    features: Annotated[
        list[int],
        typer.Option("--features", metavar="N", min=1, help="key and value features per head; may be repeated"),
    ] = [64, 128],  # noqa: B006 - typer copies it
) -> None:
    """Compile the CPU kernels ahead of time, for every kind of decay and erasure. It takes some seconds per kernel.

    Without it each kernel is compiled when it is first used. Both keep it in the user's cache.
    """
    from itertools import product

    from rich.progress import track

    from fwp_kernels import native

    if (most := native.WIDTHS[-1]) < max(features):
        raise typer.BadParameter(f"--features: expected at most {most}, got {max(features)}")
    kinds = [
        native.Kind(width, width, *axes)
        for width in map(native.rounded, features)
        for axes in product(range(3), repeat=2)
    ]
    try:
        for kind in track(kinds, "Compiling", console=Console(stderr=True)):
            native.build(kind)
    except native.BuildError as error:
        print(f"fwp: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{len(kinds)} kernels are in {native.folder()}.")


@app.command(epilog="Examples: fwp bench · fwp bench --device cpu --peers · fwp bench --peers --json times.json")
def bench(
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="where it runs; a GPU if there is one")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="time other installed packages too")] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="rows go there, plots beside it; a rerun resumes there"),
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="only find and keep this GPU's block sizes")] = False,
) -> None:
    """Times each rule beside softmax attention and the machine's limit, in ten minutes.

    Wrong results are not timed.

    Peers: on a GPU flash-linear-attention and flash-qla, on a CPU the fallback of transformers.
    """
    import torch

    if device is not None:
        known("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device: expected a machine with a CUDA GPU, found none")
    if tune:
        if device == "cpu" or not torch.cuda.is_available():
            raise typer.BadParameter("tune: expected a machine with a CUDA GPU, found none")
        from fwp_benchmarks.tune import table_file, tuned_rows

        with stoppable(lambda: f"The block sizes found so far are in {table_file()}; the same command starts anew."):
            for row in tuned_rows():
                typer.echo(" ".join(f"{name}={value}" for name, value in row.items()))
        raise typer.Exit()
    writable(json)
    with stoppable(rows_kept(json, resumes=True)):
        from fwp_benchmarks import speed

        raise typer.Exit(speed.main(device, peers, json))


def writable(json: Path | None) -> None:
    """Raises BadParameter unless the file can be written. It tries to, since permissions alone do not tell."""
    if json is None:
        return
    there = json.exists()
    try:
        json.open("ab").close()
        if not there:
            json.unlink()
        if json.is_file() or not there:  # a new file takes its place
            tempfile.TemporaryFile(dir=json.resolve().parent).close()
    except OSError as error:
        raise cannot_write("json", "file", json, error) from None


def cannot_write(option: str, kind: str, path: Path, error: OSError) -> typer.BadParameter:
    """The error that says why nothing can be written to `path`."""
    return typer.BadParameter(f"{option}: expected a {kind} that can be written, got {str(path)!r}: {error.strerror}")


# ----------------------------------------------------------------------------------------------------- fwp reproduce


@app.command(epilog="Examples: fwp reproduce · fwp reproduce --list · fwp reproduce schlag2021-setting1 --scale smoke")
def reproduce(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="experiments; all if none")] = None,
    scale: Annotated[str, typer.Option(metavar="smoke|quick|reduced|paper", help="how much is run")] = "quick",
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder of results; a rerun resumes there")] = Path(
        "fwp-results"
    ),
    list_only: Annotated[bool, typer.Option("--list", help="only list the experiments and their cost")] = False,
) -> None:
    """Trains what the papers trained, at a size to choose, and tests their claims.

    Ctrl-C keeps the finished runs; the same command goes on from there.
    """
    from fwp_benchmarks import reproduce as runner

    known("scale", scale, runner.SCALES)
    for name in ids or ():
        known("ID", name, runner.FAMILIES)
    if list_only:
        list_families(runner.FAMILIES.values())
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("fwp: reproduce draws with matplotlib, which is missing: pip install 'fwp[bench]'", file=sys.stderr)
        raise typer.Exit(1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise cannot_write("out", "folder", out, error) from None
    again = shlex.join(["fwp", "reproduce", *(ids or ()), "--scale", scale, "--out", str(out)])
    with stoppable(lambda: f"The finished runs are in {out.resolve()}; to go on: {again}"), Lines() as lines:
        report = runner.main(ids or (), scale, out, lines)
    shown = [claim.id for name in ids or runner.FAMILIES for claim in runner.FAMILIES[name].claims]
    verdicts(report.parent / "claims.json", shown)
    print(f"The report: {report.resolve()}")


class Lines:
    """Prints a line for each finished run. A terminal also shows a progress bar below."""

    def __enter__(self) -> Lines:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(highlight=False)
        doing = TextColumn("{task.description}")
        columns = (BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn(), doing)
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.bar.start()
        self.task = self.bar.add_task("starting the processes that train", total=None)
        return self

    def __call__(self, done: int, total: int, text: str) -> None:
        doing = "training" if text else "training the first runs; each prints a line when it ends"
        self.bar.update(self.task, completed=done, total=total, description=doing)
        if not text:
            self.bar.console.print(f"{total - done} runs to train; each prints a line when it ends")
        if text or done:
            self.bar.console.print(text or f"{done} of {total} runs are there already")

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def list_families(families: Iterable[Family]) -> None:
    """Prints every experiment with its scales and claims."""
    console = Console(highlight=False)
    for family in families:
        console.print(f"[bold]{family.id}[/]  {family.title}\n{family.paper.name}", soft_wrap=True)
        for result in family.paper.not_attempted:
            console.print(f"  not attempted: {result}", markup=False, soft_wrap=True)
        for name, scale in family.scales.items():
            console.print(f"  --scale {name:8} {len(scale.settings):4} runs, {scale.cost}", soft_wrap=True)
        for claim in family.claims:
            console.print(f"  {claim.id}: {claim.statement}", soft_wrap=True)


def verdicts(path: Path, ids: Collection[str]) -> None:
    """Prints the claims of these ids, each with its published and measured value."""
    import json

    from fwp_benchmarks.report import in_words

    words = {True: "[green]yes[/]", False: "[red]no[/]", None: "undecided"}
    rows = [
        (claim["id"], escape(in_words(claim["published"])), escape(in_words(claim["measured"])), words[claim["holds"]])
        for claim in json.loads(path.read_text(encoding="utf-8"))
        if claim["id"] in ids
    ]
    show(Console(highlight=False), "Claims", ("claim", "published", "measured", "holds"), rows)


if __name__ == "__main__":
    sys.exit(main())
