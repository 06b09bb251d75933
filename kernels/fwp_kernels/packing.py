"""Where chunks and segments lie: in rows of a batch, or in packed sequences whose lengths only the GPU knows."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Packing
from .problem import Problem
from .tiling import cdiv, power_of_2

SHORTEST = 8  # chunks of a segment, at least: fewer are not worth the launches


class Layout(NamedTuple):
    """The chunks and segments of a problem."""

    packing: Packing
    firsts: Tensor | None  # [N + 1], the first segment of each packed sequence that is cut
    slots: int  # places for chunks; with packing some are spare
    segments: int
    segments_of_row: int  # without packing
    chunks_of_segment: int  # without packing

    def kept(self, every: int) -> int:
        """The most states that are kept, as `kept_at` in device.py counts."""
        return (self.slots + (self.segments + 1) * (every - 1)) // every


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at once: a walk takes the registers of a whole multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_length(chunks: int, sequences: int, fill: int, least: int) -> int:
    """How many chunks a segment has where walks are cut into segments that run side by side; 0: they are not cut.

    Of all `chunks` it makes `fill` segments, but only where the sequences have `least` segments or more on average.
    A pure function of shapes and the GPU, so that the same call always computes the same.
    """
    length = max(SHORTEST, cdiv(chunks, max(1, fill)))
    return length if chunks >= least * sequences * length else 0


def segment_chunks(p: Problem) -> int:
    """Chunks of a segment, a multiple of those that share a kept state; 0: sequences aren't cut."""
    if p.empty:
        return 0
    length = p.segment
    if length is None:
        programs = p.H * cdiv(p.V, power_of_2(p.V, p.tiles.walk))
        # A cut walk takes the time of its segments' own states and of the outputs; with erasing also that of the
        # matrices, which are K wide.
        least = 3 + (cdiv(p.K, p.V) if p.erases else 0)
        length = segment_length(p.B * p.chunks, p.N, multiprocessors(p.v.device) // programs, least)
    return cdiv(length, p.tiles.checkpoint_every) * p.tiles.checkpoint_every


def layout(p: Problem, length: int) -> Layout:
    """The layout with segments of `length` chunks, 0: sequences aren't cut.

    Made without asking the GPU: packed sequences have at most T // C + N chunks, and no more are launched.
    """
    if p.borders is None:
        per = cdiv(p.chunks, length) if length else 1
        return Layout(Packing(), None, p.N * p.chunks, p.N * per, per, length or p.chunks)
    borders, firsts, segments = p.borders.long(), None, p.N
    if length:
        size, segments = length * p.C, p.tokens // (length * p.C) + p.N
        counts = (borders.diff() + size - 1) // size
        first, of = _starts(counts, segments)
        firsts = torch.cat([first, counts.sum(0, keepdim=True)])
        inner = torch.arange(segments, device=borders.device) - first[of]
        borders = torch.cat([torch.minimum(borders[of] + inner * size, borders[of + 1]), borders[-1:]])
    most = p.tokens // p.C + p.N
    slots, owners = _starts((borders.diff() + p.C - 1) // p.C, most)
    return Layout(Packing(borders, slots, owners), firsts, most, segments, 1, p.chunks)


def _starts(parts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where each sequence's parts begin, and the sequence of each of the `most` parts there can be."""
    ends = parts.cumsum(0)
    at = torch.arange(most, device=ends.device)
    return ends - parts, torch.searchsorted(ends, at, right=True).clamp_(max=len(parts) - 1)
