"""Kernels compiled without a GPU: they fit, use matrix instructions and spill few registers.

`make static` compiles all shipped configurations and writes a table. These tests check the whole table and compile a
few of its rows again, in a new process, since Triton may be the interpreter in this one.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "benchmarks" / "results" / "static.csv"
FEATURES = {"norms", "features_back", "denominator_back"}  # kernels that not every configuration has
WITHOUT = {"token", "sums", "join", "join_back", *FEATURES}  # they multiply no matrices, or float32 ones
KERNELS = {"token", "sums", "pairs", "walk", "walk_again", "walk_back", "gradients"}
KERNELS |= {"walk_state", "walk_matrix", "walk_back_state", "join", "join_back"}  # where T is cut into segments
SPILLED = 32  # bytes per thread that kernels which use all 255 registers may spill …
OWN_KEY = {"sm_100": 72}  # … with erase keys of their own, else 40 …
CONSUMER = 80  # … on GPUs whose matrix products take operands from registers, with the newest assembler
ELSEWHERE = 1024  # with another Triton than the table's; a wrong layout spills several KiB
FUSED = [(1, 2, 128, 128, "bfloat16", "", "", 1, 1, 1), (2, 1, 128, 128, "bfloat16", "relu", "l2", 0)]
FUSED += [(2, 2, 64, 64, "bfloat16", "", "", 0, 2, 1)]
CASES = {  # decay, erase, K, V; dtype, feature map, norm, denominator, writes, erase before decay
    "sm_80": [(2, 1, 128, 128)],
    "sm_90": [(0, 0, 64, 64), *FUSED],
    "gfx942": [(2, 1, 128, 128)],
}
KEY = ("target", "decay", "erase", "K", "V", "dtype", "feature_map", "norm", "denominator")
KEY += ("writes", "erase_before_decay", "kernel")


def table():
    with TABLE.open(encoding="utf-8") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def check(row):
    assert int(row["shared"]) <= int(row["limit"]), row
    if row["dtype"] == "float32" or row["kernel"] in WITHOUT:
        return  # no matrix instruction multiplies float32 exactly
    small = int(row["K"]) > (64 if int(row["denominator"]) else 128)  # chunks below 64 use the older instructions
    assert int(row["matrix"]) + (int(row["older"]) if small else 0) > 0, row


def test_all_that_ships_fits():
    rows = table()
    assert {key[0] for key in rows} >= {*CASES} and {key[-1] for key in rows} == KERNELS | FEATURES
    for row in rows.values():
        check(row)
        plain = not row["feature_map"] and row["denominator"] == "0"
        if plain and row["dtype"] == "bfloat16" and max(int(row["K"]), int(row["V"])) <= 128:
            most = OWN_KEY.get(row["target"], 40) if row["erase"] == "2" else SPILLED
            assert int(row["spilled"]) <= (CONSUMER if row["target"] == "sm_120" else most), row


@pytest.mark.parametrize("target", CASES)
def test_kernels_are_those_of_the_table(target):
    """If it fails, run `make static` and read the difference, so that spills don't grow unseen."""
    triton = pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows, known = [json.loads(line) for line in run.stdout.splitlines()], table()
    assert {row["kernel"] for row in rows} == KERNELS | (FEATURES if target == "sm_90" else set())
    for row in rows:
        check(row)
        of_table = known[tuple(str(row[name]) for name in KEY)]
        same = of_table["triton"] == triton.__version__
        assert row["spilled"] <= (int(of_table["spilled"]) if same else ELSEWHERE), (row, of_table)


if __name__ == "__main__":
    from fwp_benchmarks import static

    for case in CASES[sys.argv[1]]:
        for row in static.compiled_rows(sys.argv[1], static.StaticCase(*case)):
            print(json.dumps(row), flush=True)
