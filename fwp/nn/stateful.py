"""What every module with a carried state shares: its state passes through FSDP unchanged."""

from __future__ import annotations

from typing import Any

from torch import nn


class Stateful(nn.Module):
    """A module (x, state, …) → (y, state, …) whose states keep their dtype under `fully_shard`.

    With mixed precision FSDP casts every floating input of a module, and its outputs if told so. A state in 16 bits
    would drift. A module of your own that hands states on can derive from this class before it is sharded.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # fully_shard derives a class from FSDPModule and that of the module
        if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
            cls.__call__ = _past_casts  # type: ignore[method-assign]


class _Hidden:
    """An object in which FSDP finds no tensors."""

    def __init__(self, state: Any) -> None:
        self.state = state


def carry(module: nn.Module, *args: Any, **options: Any) -> Any:
    """module(x, state, …), where the module may be sharded though it is no `Stateful`, such as a wrapper of one."""
    sharded = hasattr(module, "set_reshard_after_forward")
    return _past_casts(module, *args, **options) if sharded else module(*args, **options)


def _past_casts(module: nn.Module, *args: Any, **options: Any) -> Any:
    """module(…): the state is hidden on its way in, and that of `forward` is returned.

    The returned state is the one on which FSDP registers its hooks, before it casts the output.
    """
    if "state" in options:
        options["state"] = _Hidden(options["state"])
    elif len(args) > 1:
        args = (args[0], _Hidden(args[1]), *args[2:])
    made: list[Any] = []
    with (
        module.register_forward_pre_hook(_show, with_kwargs=True),
        module.register_forward_hook(lambda module, args, output: made.append(output[1]), prepend=True),
    ):
        y, _, *rest = nn.Module.__call__(module, *args, **options)
    return y, made[-1], *rest


def _show(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the state in sight again."""

    def seen(x: Any) -> Any:
        return x.state if isinstance(x, _Hidden) else x

    return tuple(map(seen, args)), {name: seen(x) for name, x in options.items()}
