"""Tables that stay readable on a narrow terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def fitted(console: Console, title: str | None, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table | None:
    """A table in the width of the console, or None if a word or a number would be cut. Cells may have rich's markup."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = [[Text.from_markup(cell).plain for cell in cells] for cells in zip(headers, *rows)]
    widths = [max(len(word) for cell in ("", *cells) for word in (cell.split() or [""])) for cells in columns]
    wanted = [max(map(len, cells)) for cells in columns]
    room = console.width - sum(widths) - 2 * len(columns) - 1  # padding and edges
    if room < 0:
        return None
    for _ in range(room):  # rich would shrink columns below their longest word
        i = max(range(len(columns)), key=lambda i: wanted[i] / max(1, widths[i]))
        widths[i] += wanted[i] > widths[i]
    for header, width in zip(headers, widths):
        made.add_column(header, width=width)
    for row in rows:
        made.add_row(*row)
    return made


def show(console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table. Where it does not fit, each row has lines of its own, one per column."""
    made = fitted(console, title, headers, rows)
    if made is not None:
        console.print(made)
        return
    console.print(title, style="italic")
    for first, *cells in rows:
        console.print(f"\n[bold]{first}[/]")
        for header, cell in zip(headers[1:], cells):
            console.print(f"{header}: {cell}")
