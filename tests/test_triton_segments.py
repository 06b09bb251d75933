"""Sequences that the Triton kernels cut into segments, and states that they keep between: the recurrence itself."""

from dataclasses import replace

import pytest
import torch
from cells import (
    ADDITIVE,
    CELLS,
    CORNERS,
    DEVICE,
    KDA,
    MARKS,
    OWN_KEY,
    READS,
    C,
    agree,
    kept_every,
    problem,
)

from fwp import trust
from fwp.core import Features
from fwp_kernels import packing

pytestmark = MARKS


@CELLS
def test_states_between_those_that_are_kept(cell, monkeypatch):
    kept_every(monkeypatch, 3)
    agree(problem(cell, B=2, T=5 * C - 1))
    lengths = (4 * C, 0, 3, 2 * C + 1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    agree(problem(cell, T=sum(lengths), N=len(lengths), H=(2, 1, 2), read="before", cu_seqlens=cu_seqlens))


@pytest.fixture
def two_chunks(monkeypatch):
    """Makes every segment two chunks long, however full the GPU is."""
    kept_every(monkeypatch, 2)
    monkeypatch.setattr(packing, "segment_length", lambda *sizes: 2)
    monkeypatch.setattr(trust, "may_cut", lambda core: True)


@READS
@CELLS
def test_segments_are_the_recurrence(cell, read, two_chunks):
    """Three segments, the last one short."""
    agree(problem(cell, T=4 * C + 3, read=read))


SEGMENTED = pytest.mark.parametrize("cell", [ADDITIVE, (1, ""), (2, ""), KDA], ids=["additive", "decay", "gla", "kda"])


@pytest.mark.parametrize("T", [1, 2 * C, 2 * C + 1, 4 * C])
@CORNERS
def test_segments_of_any_length(cell, T, two_chunks):
    agree(problem(cell, B=2, T=T))


@SEGMENTED
def test_segments_of_packed_sequences(cell, two_chunks):
    lengths = (0, 4 * C + 1, 2, 0, 2 * C, 0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    agree(problem(cell, T=sum(lengths), N=len(lengths), cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("present", ["o", "S"])
@SEGMENTED
def test_a_loss_on_one_output_of_segments(cell, present, two_chunks):
    agree(replace(problem(cell, T=3 * C), S=None), outputs=(present,))


@SEGMENTED
def test_shared_heads_and_blocks_of_segments(cell, two_chunks):
    agree(problem(cell, T=2 * C + 2, H=(2, 1, 2), K=19, V=18))


@READS
@SEGMENTED
def test_denominators_of_segments(cell, read, two_chunks):
    lengths = (2 * C + 3, 0, 4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    agree(problem(cell, T=4 * C + 1, read=read, denominator=True))
    agree(problem(cell, T=sum(lengths), N=3, H=(2, 1, 1), cu_seqlens=cu_seqlens, denominator=True), outputs=("S",))


def test_features_of_segments(two_chunks):
    agree(problem(KDA, T=4 * C + 1, K=2, features=Features("dpfp-1", "l2", 0.5)))


def test_a_reset_in_a_segment(two_chunks):
    core = problem(KDA, T=4 * C)
    core.g[:, [C, 3 * C - 1]] = -torch.inf
    agree(core)


@pytest.mark.parametrize(("read", "before"), [("after", True), ("before", False)])
def test_erase_keys_of_segments_that_are_not_packed(read, before, two_chunks):
    agree(problem(OWN_KEY, T=2 * C // 3 + 1, K=3, V=2, read=read, writes=3, erase_before_decay=before))


def test_segments_are_cut_where_the_gpu_has_room():
    """132 multiprocessors. With room for only two segments at a time, cutting doesn't pay for its own work."""
    assert packing.segment_length(chunks=1024, sequences=1, fill=132 // 64, least=3) == 0
    assert packing.segment_length(chunks=1024, sequences=1, fill=132 // 8, least=4) == 64
    assert packing.segment_length(chunks=2048, sequences=8, fill=132 // 2, least=4) == 32
    assert packing.segment_length(chunks=2048, sequences=64, fill=132 // 2, least=4) == 0
    assert packing.segment_length(chunks=20, sequences=1, fill=132, least=3) == 0  # too short
    assert packing.segment_length(chunks=24, sequences=1, fill=132, least=3) == 8
    assert packing.segment_length(chunks=1024, sequences=1, fill=0, least=3) == 0
