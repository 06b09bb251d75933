"""Settings of all tests: Triton's interpreter without a GPU, and tests that need a GPU only with one."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from interpreter import patch_language_once

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported
    patch_language_once()

# `make test-gpu` needs nothing but PyTorch, Triton and pytest. Files that need hypothesis are left out without it.
collect_ignore: list[str] = []
if importlib.util.find_spec("hypothesis") is None:
    collect_ignore += [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if re.search(r"^(from|import) hypothesis", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the files that were left out."""
    if collect_ignore:
        terminalreporter.write_line(f"LEFT OUT {', '.join(collect_ignore)}: hypothesis is not installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {} if GPU else {"gpu": "needs a GPU"}
    if "mutants" not in config.option.markexpr:
        left_out["mutants"] = "works on a changed copy of the checkout: make mutants"
    for item in items:
        for marker, reason in left_out.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
