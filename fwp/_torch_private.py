"""Every private name of torch that this package uses, each with its reason. No other file uses one.

When a version of torch changes one of them, this file is where to look.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

# Only a dispatch mode sees the matrix products of a backward pass too; its class is public nowhere else.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# States are pytrees, and the public torch.utils has no tree functions. `keystr` names a leaf in an error message.
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import register_pytree_node as register_pytree_node
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_under_compile(fn: Function) -> Function:
    """A decorator: torch.compile runs the function as it is and keeps its result as a constant.

    torch.compiler.assume_constant_result does the same, and imports half of PyTorch for it.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def inside_transform() -> bool:
    """Whether vmap, grad or jvp of torch.func is active. torch has no public function that tells."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def inside_derivative() -> bool:
    """Whether grad or jvp of torch.func is active, not vmap alone. torch has no public function that tells."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def inside_dual_level() -> bool:
    """Whether a level of forward derivatives is open. `forward_ad` has no public function that tells."""
    return forward_ad._current_level >= 0


def forward_derivatives_enabled() -> bool:
    """Whether operations propagate tangents. An autograd.Function switches this off around its forward."""
    return bool(torch._C._is_fwd_grad_enabled())


def dispatch_modes() -> int:
    """How many modes watch every operation. Launching a kernel past them would hide it."""
    return int(torch._C._len_torch_dispatch_stack())
