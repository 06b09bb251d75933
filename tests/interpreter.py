"""A faster interpreter of Triton."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def patch_language_once() -> None:
    """Keeps Triton's interpreter from patching `triton.language` again at every call of a device function.

    The launch of a kernel has already patched what most of them use. Patching again takes half of the time of small
    kernels. The names are private: if one is missing, nothing is changed.
    """
    if find_spec("triton") is None:
        return
    interpreter, language = import_module("triton.runtime.interpreter"), import_module("triton.language")
    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope is None or hasattr(patch, "original"):
        return

    @cache
    def seen(fn: Any) -> list[Any]:
        return [module for module in (language, language.core) if any(x is module for x in fn.__globals__.values())]

    def patch_once(fn: Any) -> Any:
        return patch(fn) if any(language.core.is_builtin(module.load) for module in seen(fn)) else scope()

    patch_once.original = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once
