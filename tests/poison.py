"""Makes uninitialised memory visible: whatever a kernel forgets to write is NaN."""

import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def poisoned_empties():
    """A context in which torch.empty and its kin fill floating tensors with NaN."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return made

    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    with ExitStack() as patches:
        for place, name in places:
            patches.enter_context(mock.patch.object(place, name, poison(getattr(place, name))))
        yield
