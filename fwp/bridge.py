"""Lets `fwp.kernels` and `fwp.benchmarks` find their modules.

In a checkout these stand in top-level folders without `__init__.py`: a regular package called `kernels` in the working
directory would shadow Hugging Face's package of that name and break transformers, a namespace folder does not. In a
wheel the same files lie inside `fwp/`, so nothing is to be done there.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from pathlib import Path


def extend(path: MutableSequence[str], name: str) -> None:
    """Appends the checkout's folder `name` to `path`, the `__path__` of the package `fwp.<name>`; else does nothing.

    A checkout is told by a pyproject.toml of fwp, two folders above the package.
    """
    root = Path(path[0]).parents[1]
    project = root / "pyproject.toml"
    if project.is_file() and 'name = "fwp"' in project.read_text(encoding="utf-8"):
        path.append(str(root / name))
