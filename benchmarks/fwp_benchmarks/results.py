"""Files of results that a stop at any time leaves whole. `fwp reproduce` keeps finished runs as lines of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fwp

from .claims import Family, Settings


def results_file(family: Family, out: Path) -> Path:
    """The file that keeps a family's finished runs."""
    return out / f"{family.id}.jsonl"


def run_key(settings: Settings) -> str:
    """What tells a run from all others: every setting, and the version of the code."""
    return json.dumps({"fwp": fwp.__version__, **settings}, sort_keys=True)


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs by key. A line that a crash cut short does not count."""
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if "seconds" in row:
                rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a run, whole or not at all, by one write that is on the disk when this returns."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the rest of a line that a crash cut short
                line = b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all. Anything but a regular file, such as a pipe, is written in place."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link stays one
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def finished(family: Family, scale: str, out: Path) -> list[dict[str, Any]]:
    """The rows of a scale's finished runs, in the order of its settings."""
    rows = load(results_file(family, out))
    keys = map(run_key, family.scales[scale].settings)
    return [rows[name] for name in keys if name in rows]


def missing(family: Family, scale: str, out: Path) -> list[Settings]:
    """The settings of a scale's runs that are not finished."""
    rows = load(results_file(family, out))
    return [settings for settings in family.scales[scale].settings if run_key(settings) not in rows]
