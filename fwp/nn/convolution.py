"""Mixing each token with the few before it: the short convolution and the token shift.

Neither looks across padding or across the border of two sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwp import errors


def borders(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[N + 1] int64: where each sequence of x [B, T, …] starts and ends when the rows are laid end to end."""
    if cu_seqlens is not None:
        return cu_seqlens.long().clamp(0, x.shape[1])  # a GPU's values are not checked, and index tensors here
    return torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]


def real_tokens(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """[B, T] bool: the tokens of x [B, T, …] that are not masked and lie in a packed sequence; None: all."""
    if cu_seqlens is None:
        return mask
    at, token = borders(x, cu_seqlens), torch.arange(x.shape[1], device=x.device)
    inside = ((token >= at[0]) & (token < at[-1])).unsqueeze(0)
    return inside if mask is None else inside & mask


class ShortConvolution(nn.Module):
    """y_t = Σ_i w_i ⊙ x_{t−W+1+i}, i = 0 … W − 1: every channel mixes its own last W inputs, including x_t.

    Masked tokens are skipped: each token sees the W − 1 real tokens before it. Before the first token come zeros, or
    the tail that an earlier call returned.

    channels: C. width: W. Parameter: weight [C, 1, W], as in `torch.nn.Conv1d`, without a bias.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        errors.size("channels", channels)
        errors.size("width", width)
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√width, as `torch.nn.Conv1d` starts."""
        width = self.weight.shape[-1]
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(
        self, x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C], tail [N, W − 1, C] → y [B, T, C] and the new tail, each sequence's last W − 1 real inputs.

        mask and cu_seqlens as in `fwp.fast_weights`; y is 0 at masked tokens and outside the packed sequences.
        """
        return slide(x, tail, self.weight.shape[-1] - 1, self._mix, mask, cu_seqlens)

    def _mix(self, stream: Tensor) -> Tensor:
        """[B, W − 1 + T, C] → [B, T, C], summed in float32 (float64 for float64 inputs).

        Shifted products, not `F.conv1d`: inductor can't compile the latter's transposed output for a second T.
        """
        dtype = torch.promote_types(stream.dtype, torch.float32)
        w = self.weight.squeeze(1).T.to(dtype)  # [W, C]
        T = stream.shape[1] - len(w) + 1
        y = w[0] * stream[:, :T]
        for i in range(1, len(w)):
            y = torch.addcmul(y, w[i], stream[:, i : i + T])
        return y.to(stream.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[-1]}"


def token_shift(
    x: Tensor, tail: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [B, T, C] → x_{t−1} [B, T, C] and the new tail [N, 1, C], each sequence's last real input.

    Masked tokens, borders of sequences and the tail are treated as in `ShortConvolution`.
    """
    return slide(x, tail, 1, lambda stream: stream[:, :-1], mask, cu_seqlens)


def slide(
    x: Tensor,
    tail: Tensor | None,
    past: int,
    mix: Callable[[Tensor], Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `mix` makes of each token and the `past` real tokens before it, and the new tail [N, past, C].

    x [B, T, C]. tail: [N, past, C], None for zeros. mix: a stream [B, past + T, C] → [B, T, C].
    """
    B, T, C = x.shape
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    tail = x.new_zeros(N, past, C) if tail is None else tail.to(x.dtype)
    if T == 0:
        return x, tail.clone()
    if mask is None and cu_seqlens is None:
        stream = torch.cat([tail, x], 1)  # [B, past + T, C]
        return mix(stream), stream[:, T:].clone()  # a view would keep the whole stream alive
    # One stream of all sequences: each one's tail, then its real tokens. All other tokens are 0 and go to the last
    # place, behind zeros, so that y is 0 there.
    at, real = borders(x, cu_seqlens), real_tokens(x, mask, cu_seqlens)
    assert real is not None
    x, real = x.masked_fill(~real.unsqueeze(-1), 0), real.flatten()
    sequence = torch.searchsorted(at[1:], torch.arange(B * T, device=x.device), right=True)
    count = real.cumsum(0)  # real tokens up to and with this one
    end = (N + 1) * past + B * T
    place = torch.where(real, count - 1 + (sequence + 1) * past, end)
    seen = F.pad(count, (1, 0))[at]  # [N + 1]
    window = torch.arange(N, device=x.device).unsqueeze(1) * past + torch.arange(past, device=x.device)
    before, after = seen[:-1].unsqueeze(1) + window, seen[1:].unsqueeze(1) + window  # [N, past]
    stream = x.new_zeros(end + 1, C).index_copy(0, before.flatten(), tail.flatten(0, 1))
    stream = stream.index_copy(0, place, x.flatten(0, 1))
    y = mix(stream.unsqueeze(0)).squeeze(0)  # y[i] belongs to stream[i + past]
    return y[place - past].view(B, T, C), stream[after]
