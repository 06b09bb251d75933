"""Puts the top-level folders kernels/ and benchmarks/ into the wheel as fwp/kernels and fwp/benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BridgeHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # there `fwp.bridge` finds the folders of the checkout
            return
        for folder in ("kernels", "benchmarks"):
            for path in (Path(self.root) / folder).iterdir():
                if path.name not in ("results", "__pycache__"):  # kept runs and their figures stay in the repository
                    build_data["force_include"][str(path)] = f"fwp/{folder}/{path.name}"
