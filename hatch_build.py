"""Puts the top-level folders kernels/ and benchmarks/ into the wheel as fwp/kernels and fwp/benchmarks."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BridgeHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":  # there `fwp.bridge` finds the folders of the checkout
            build_data["force_include"].update({"kernels": "fwp/kernels", "benchmarks": "fwp/benchmarks"})
