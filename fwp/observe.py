"""Observing the op's arguments and its choice of backend, for `fwp.inspect.recording` and for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwp._torch_private import tree_map
from fwp.core import Form, overwrites


class ObservedCall(NamedTuple):
    """One call of `fwp.fast_weights`.

    arguments: all of them by name, gates too, as the caller gave them, else their defaults.
    backend, form: those that run.
    """

    arguments: Mapping[str, Any]
    backend: str
    form: Form


Observer = Callable[[ObservedCall], None]
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("_observers", default=())


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """A context in which `observer` hears of every call of the op, after its checks and before it runs.

    Observers of contexts around this one hear of it as well. Other threads and compiled functions are not observed.
    """
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


@contextmanager
def unobserved() -> Iterator[None]:
    """A context in which no observer hears of any call."""
    token = _observers.set(())
    try:
        yield
    finally:
        _observers.reset(token)


def observed() -> bool:
    """Whether there is an observer.

    Always False while torch.compile traces, so that observers change no compiled function.
    """
    return not torch.compiler.is_compiling() and bool(_observers.get())


def tell(asked: Mapping[str, Any], backend: str, form: Form) -> None:
    """Tells all observers of a call.

    asked: the arguments of `fast_weights`, with its gates under "gates".
    """
    arguments = {name: x for name, x in asked.items() if name != "gates"}
    if overwrites():
        arguments["state"] = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments["state"])
    call = ObservedCall(arguments | asked["gates"], backend, form)
    for observer in _observers.get():
        observer(call)
