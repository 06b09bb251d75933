"""`fwp bench`: how long each rule takes, beside a peer in the same run and the machine's limit.

A row is one rule at one size, forward or forward and backward: the median over rounds in which ours, softmax attention
(`scaled_dot_product_attention`, causal) and, with peers, transformers' fallback for the gated delta rule take turns, so
that a ratio holds when the machine's speed drifts. `share` is the rate of necessary operations over the rate of a large
matrix product of the same dtype measured in the same run. Nothing that is wrong is timed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fwp
from fwp import testing
from fwp.core import Core
from fwp.functional import choose
from fwp.rules import RULES

CHUNK = 64  # the chunk whose operations count as necessary
ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens, H heads of D key and value features."""

    B: int
    T: int
    H: int
    D: int


SIZES = {
    "cpu": [Size(1, T, 4, D) for D in (64, 128) for T in (512, 2048)],
    "cuda": [Size(4, T, 16, D) for D in (64, 128) for T in (1024, 4096, 16384)],
}


def operations(erases: bool, size: Size, backward: bool) -> float:
    """Floating-point operations that the chunk form needs, the causal triangle counted once."""
    D, C = size.D, CHUNK
    forward = 6 * D * D + 4 * C * D if erases else 4 * D * D + 2 * C * D
    back = 12 * D * D + 10 * C * D if erases else 8 * D * D + 5 * C * D
    return size.B * size.T * size.H * (forward + back * backward)


def rows(device: str, peers: bool) -> Iterator[dict[str, Any]]:
    """All measurements; what is wrong or missing comes with seconds null and a note."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    limit = matmul_rate(device, dtype)
    for size in SIZES[device]:
        for name in RULES:
            x = testing.sample(name, B=size.B, T=size.T, H=size.H, K=size.D, V=size.D, dtype=dtype, device=device)
            probe = Core(x["q"], x["k"], x["v"])
            backend, form = choose(probe, "auto", "auto", x["v"])
            row = {"rule": name, "backend": backend, "form": form, "device": device, "dtype": str(dtype), **vars(size)}
            if error := wrong(name, device, dtype):
                yield row | {"pass": None, "seconds": None, "note": f"not timed, it is wrong by {error:.1e}"}
                continue
            runs: dict[str, Callable[[], Tensor]] = {
                "ours": ours(name, x),
                "softmax": softmax_attention(x),
            }
            if peers and name == "gated_delta" and (fallback := transformers_fallback(x)):
                runs["transformers"] = fallback
            for backward in (False, True):
                seconds = compared(runs, x, backward, device)
                rate = operations(RULES[name].erases, size, backward) / seconds["ours"]
                yield row | {
                    "pass": "fwd + bwd" if backward else "fwd",
                    "seconds": seconds["ours"],
                    **{f"{peer}_over_ours": seconds[peer] / seconds["ours"] for peer in runs if peer != "ours"},
                    "share": rate / limit,
                }


def ours(name: str, x: dict[str, Any]) -> Callable[[], Tensor]:
    """The rule as `fast_weights` runs it."""
    return lambda: fwp.fast_weights(name, **x)[0]


def softmax_attention(x: dict[str, Tensor]) -> Callable[[], Tensor]:
    """PyTorch's own attention on the same q, k, v."""

    def run() -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def transformers_fallback(x: dict[str, Tensor]) -> Callable[[], Tensor] | None:
    """The gated delta rule of transformers in plain torch, whose backward is quadratic in T; None without it."""
    try:
        from transformers import logging
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except Exception:  # not installed or broken: no peer, nothing of ours
        return None
    logging.set_verbosity_error()
    return lambda: torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"])[0]


def compared(
    runs: dict[str, Callable[[], Tensor]], x: dict[str, Tensor], backward: bool, device: str
) -> dict[str, float]:
    """Median seconds of each, taking turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for tensor in x.values():
        tensor.requires_grad_(backward)
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            seconds = timed(lambda run=run: grads(run(), x) if backward else run(), device)  # type: ignore[misc]
            if round_:
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def grads(out: Tensor, x: dict[str, Tensor]) -> None:
    """Every gradient of the sum of the output."""
    torch.autograd.grad(out.sum(), list(x.values()), allow_unused=True)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call, by the device's own clock on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def wrong(name: str, device: str, dtype: torch.dtype) -> float | None:
    """The worst error over its bound, of output or a gradient at a small size; None if there is none."""
    inputs = testing.sample(name, T=70, K=64, V=64, dtype=dtype)
    truth = testing.evaluate(name, testing.cast(inputs, torch.float64), backend="reference")
    bounds = dict.fromkeys(truth, 3e-4) if dtype == torch.float32 else testing.budgets(name, inputs)
    found = testing.evaluate(name, {n: t.to(device) for n, t in inputs.items()})
    errors = {n: testing.row_error(found[n].cpu(), truth[n]) for n in truth}
    return max((error for n, error in errors.items() if error > bounds[n]), default=None)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product: the machine's limit as PyTorch reaches it."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def main(device: str | None = None, peers: bool = False, json_file: Path | None = None) -> int:
    """Prints a table as it is measured, and writes the rows as JSON; exit status 1 if a rule was wrong."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    found: list[dict[str, Any]] = []
    with console.status("measuring …") as status:
        for row in rows(device, peers):
            found.append(row)
            status.update(f"measured {row['rule']} at T = {row['T']}, D = {row['D']}")
    names = ("softmax_over_ours", *(("transformers_over_ours",) if peers else ()))
    headers = ("rule", "on", "T", "D", "pass", "ms", *(n.split("_")[0] + "\n/ ours" for n in names), "share of\nmatmul")
    table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found:
        start = (row["rule"], row["backend"], str(row["T"]), str(row["D"]))
        if row["seconds"] is None:
            table.add_row(*start, row["note"])
            continue
        ratios = (f"{row[name]:.2f}" if name in row else "" for name in names)
        table.add_row(*start, row["pass"], f"{row['seconds'] * 1e3:.1f}", *ratios, f"{row['share']:.0%}")
    console.print(table)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    console.print(f"PyTorch {torch.__version__} on {device}, {threads}; medians of {ROUNDS} rounds.")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return int(any(row["seconds"] is None for row in found))
