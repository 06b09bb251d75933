"""Where chunks and segments lie, in batch rows or in packed sequences. Only the GPU knows the lengths of the latter."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Packing
from .problem import Problem
from .tiling import cdiv, power_of_2

SHORTEST = 8  # least chunks of a segment; fewer are not worth the launches


class Layout(NamedTuple):
    """The chunks and segments of a problem."""

    packing: Packing
    firsts: Tensor | None  # [N + 1], the first segment of each packed sequence that is cut
    slots: int  # number of places for chunks; with packing some are spare
    segments: int
    segments_of_row: int  # without packing
    chunks_of_segment: int  # without packing

    def kept(self, every: int) -> int:
        """The largest number of kept states, as `kept_at` in device.py counts them."""
        return (self.slots + (self.segments + 1) * (every - 1)) // every


@cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors. Each runs one program of a walk at a time, which takes all its registers."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_length(chunks: int, sequences: int, fill: int, least: int) -> int:
    """The number of chunks of a segment. 0: sequences are not cut into segments.

    All `chunks` together make `fill` segments, but only if the sequences have at least `least` segments on average. It
    depends only on shapes and the GPU, so that equal calls give equal bits.
    """
    length = max(SHORTEST, cdiv(chunks, max(1, fill)))
    return length if chunks >= least * sequences * length else 0


def segment_chunks(p: Problem) -> int:
    """Chunks of a segment, a multiple of checkpoint_every; 0: sequences aren't cut."""
    if p.empty:
        return 0
    length = p.segment
    if length is None:
        programs = p.H * cdiv(p.V, power_of_2(p.V, p.tiles.walk))
        # A cut walk takes the time of N and of the outputs. With erasing it also takes that of M, which has K columns.
        least = 3 + (cdiv(p.K, p.V) if p.erases else 0)
        length = segment_length(p.B * p.chunks, p.N, multiprocessors(p.v.device) // programs, least)
    return cdiv(length, p.tiles.checkpoint_every) * p.tiles.checkpoint_every


def layout(p: Problem, length: int) -> Layout:
    """The layout with segments of `length` chunks, 0: sequences aren't cut.

    It asks the GPU for nothing: packed sequences have at most n·T // C + N chunks, and so many are launched.
    """
    if p.borders is None:
        per = cdiv(p.chunks, length) if length else 1
        return Layout(Packing(), None, p.N * p.chunks, p.N * per, per, length or p.chunks)
    borders, firsts, segments = p.borders.long(), None, p.N
    if length:
        size, segments = length * p.C, p.tokens // (length * p.C) + p.N
        counts = (borders.diff() + size - 1) // size
        first, owner = _starts(counts, segments)
        firsts = torch.cat([first, counts.sum(0, keepdim=True)])
        inner = torch.arange(segments, device=borders.device) - first[owner]
        borders = torch.cat([torch.minimum(borders[owner] + inner * size, borders[owner + 1]), borders[-1:]])
    most = p.tokens // p.C + p.N
    slots, owners = _starts((borders.diff() + p.C - 1) // p.C, most)
    return Layout(Packing(borders, slots, owners), firsts, most, segments, 1, p.chunks)


def _starts(parts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first part of each sequence, and the sequence of each of `most` parts. parts: their number per sequence."""
    ends = parts.cumsum(0)
    at = torch.arange(most, device=ends.device)
    return ends - parts, torch.searchsorted(ends, at, right=True).clamp_(max=len(parts) - 1)
