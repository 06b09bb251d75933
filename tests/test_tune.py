"""The search for block sizes and its table, with made-up times in place of a GPU's."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from fwp.cli import main
from fwp_benchmarks import tune
from fwp_kernels import tiling

START = tiling.Tiles(64, 64)


def test_the_fastest_that_works():
    def times(candidates):
        fails = {"chunk": 16, "walk": 128}
        return [
            math.inf
            if any(getattr(x, name) == value for name, value in fails.items())
            else x.chunk / 32 * (0.5 if x.warps == 4 else 1) + (x.stages == 3) * 0.001
            for x in candidates
        ]

    best, gained = tune.fastest(START, times)
    assert best == replace(START, chunk=32, warps=4) and gained == pytest.approx(4)
    assert tune.fastest(START, lambda tried: [1.0, *[0.99] * (len(tried) - 1)]) == (START, 1.0)  # may be chance
    broken = tune.fastest(START, lambda tried: [math.inf, 1.0, *[2.0] * (len(tried) - 2)])[0]
    assert broken != START


def test_every_chunk_is_tried_with_the_states_that_may_be_kept():
    tried = []
    tune.fastest(tiling.Tiles(32, 32, checkpoint_every=4), lambda some: tried.extend(some) or [1.0] * len(some))
    assert tiling.Tiles(64, 32, checkpoint_every=2) in tried and all(
        x.chunk * x.checkpoint_every <= tiling.KEPT for x in tried
    )


def test_what_fails_has_no_time(monkeypatch):
    monkeypatch.setattr(tune, "works", lambda rule, D, device, tiles: tiles.warps == 8)
    cell = (4, 4, torch.bfloat16, 2, True, "sm_90")
    monkeypatch.setattr(tune, "timed", lambda run, device: tiling.tiles(*cell).chunk)
    few = {"B": 1, "T": 2, "H": 1}
    monkeypatch.setattr(tune, "SIZES", few)
    tried = [START, replace(START, chunk=32), replace(START, warps=4)]
    assert tune.times("kda", 4, "cpu", tried) == [64, 32, math.inf]


def test_the_table_is_read_where_it_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "RULES", {(1, 1): "gated_delta"})
    monkeypatch.setattr(tune, "WIDTHS", (64,))
    monkeypatch.setattr(tune, "times", lambda rule, D, device, tried: [x.chunk for x in tried])
    tiling.measured.cache_clear()
    (row,) = tune.tuned_rows("cpu")
    assert (tmp_path / "fwp" / "tiles.csv").exists()
    assert row["K"] == "64" and row["chunk"] == 16 and row["gained"] == 4.0
    cell = (64, 64, torch.bfloat16, 1)
    assert tiling.tiles(*cell, True, "sm_90").chunk == 16
    assert tiling.tiles(*cell, False, "sm_90") == tiling.by_rule(64, torch.bfloat16, 1, False, "sm_90")
    assert tiling.tiles(*cell, True, "sm_80").chunk == 32
    assert tiling.tiles(128, *cell[1:], True, "sm_90").chunk == 64
    tiling.measured.cache_clear()


@pytest.mark.parametrize("more", [[], ["--device", "cpu"]])
def test_nothing_is_tuned_without_a_gpu(more, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--tune", *more]) == 2
    assert capsys.readouterr().err == "fwp: tune: expected a machine with a CUDA GPU, found none\n"
