"""`fwp check`: compares each rule in every backend, form and dtype with the paper's equation.

The truth is the rule's equation, one token after the other, in float64. The output, the final state and the gradient of
every input are compared. Their error is that of the worst row (`fwp.testing.row_error`). The bound is 1e-10 in float64
and 3e-4 in float32. In 16 bits it is twice (for gradients three times) the error that comes from rounding alone.

The rule can be a row of the table, or a `Rule` in a file of your own. If a rule raises, that comparison has failed.

Kernels run on the GPU if there is one. Otherwise they run in Triton's interpreter, and their rows are marked so. The
interpreter is slow, so it gets small sizes and fewer cases, and 16 bits only in the first case. Its bfloat16 arithmetic
is broken, so float16 stands in for it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fwp
from fwp import rules, testing
from fwp._torch_private import tree_map
from fwp.core import Core, Read, to_heads
from fwp.errors import suggest
from fwp.functional import choose
from fwp.nn import FastWeightAttention, SlowFastNet
from fwp.rules import Rule
from fwp.validate import named_tensors

from . import laws
from .results import write_whole
from .workers import cores, for_workers, start_worker

Row = dict[str, Any]
BOUNDS = {torch.float64: 1e-10, torch.float32: 3e-4}
BITS = (64, 32, 16)
ANY = "any"  # stands for the backend where a comparison of several backends raised
FORMS: tuple[tuple[Any, Any], ...] = (("reference", "recurrent"), ("torch", "recurrent"), ("torch", "chunk"))


@dataclass(frozen=True)
class CallCase:
    """One way to call the op.

    shape: arguments of `testing.sample`. options: those of the op. lengths: of packed sequences; empty: not packed.
    masked: whether a mask leaves out some tokens.
    interpreted: whether Triton's interpreter runs the case, too. The last case already covers a mask, read "before" and
    several writes.
    """

    name: str
    shape: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    masked: bool = False
    interpreted: bool = True

    def inputs(self, rule: Rule, **shape: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of the op in float64, with an initial state, and its options."""
        options = dict(self.options)
        normalised = {name: options[name] for name in ("feature_map", "denominator") if name in options}
        shape |= self.shape
        if self.lengths:
            shape |= {"B": 1, "T": sum(self.lengths), "sequences": len(self.lengths)}
            options["cu_seqlens"] = torch.tensor([0, *self.lengths]).cumsum(0)
        if self.masked:
            options["mask"] = torch.rand(shape["B"], shape["T"], generator=torch.Generator().manual_seed(0)) < 0.8
        return testing.sample(rule, **shape, **normalised, state=True), options


CASES = (
    CallCase("equation"),
    CallCase("read before", options={"read": "before"}, interpreted=False),
    CallCase("normalised", options={"denominator": True, "feature_map": "elu+1", "feature_norm": "sum"}),
    CallCase("grouped heads", {"Hq": 4, "Hk": 1, "Hv": 2}),
    CallCase("packed", lengths=(0, 1, 66, 0, 3)),
    CallCase("masked", masked=True, interpreted=False),
    CallCase("several writes", {"writes": 2}, interpreted=False),
    CallCase("writes, packed", {"writes": 3}, {"read": "before"}, (0, 1, 20, 0, 3), True),
)


def row(
    rule: str, case: str, backend: str, form: str, dtype: torch.dtype, quantity: str, error: float, bound: float
) -> Row:
    """The row of one comparison. An error that isn't a number fails."""
    return {
        "rule": rule,
        "case": case,
        "backend": backend,
        "form": form,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "interpreted": False,
        "quantity": quantity,
        "error": error if math.isfinite(error) else None,
        "bound": bound,
        "ok": error <= bound,
    }


def skipped(rule: str, case: str, backend: str, note: str) -> Row:
    """The row of a comparison that did not run. note: the reason."""
    empty = dict.fromkeys(("form", "dtype", "device", "interpreted", "quantity", "error", "bound", "ok"))
    return {"rule": rule, "case": case, "backend": backend, **empty, "note": note}


def guarded(rule: Rule, case: str, backend: str, comparison: Iterator[Row]) -> Iterator[Row]:
    """The rows of a comparison. If it raises, a failed row says what it raised, and where."""
    try:
        yield from comparison
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})".split())
        yield skipped(rule.name, case, backend, why) | {"ok": False}


# ---- every form against the equation ----


def against_reference(rule: Rule, backend: str, device: str, interpreted: bool) -> Iterator[Row]:
    """Compares output, state and gradients in every case, form and dtype."""
    if rule.lower is None:
        yield skipped(rule.name, "all cases", backend, "no lowered form, so only the reference serves this rule")
        return
    for case in CASES:
        if applies(rule, case) and (case.interpreted or not interpreted):
            yield from guarded(rule, case.name, backend, in_case(case, rule, backend, device, interpreted))


def in_case(case: CallCase, rule: Rule, backend: str, device: str, interpreted: bool) -> Iterator[Row]:
    """Compares one case in every form and dtype."""
    first = case is CASES[0]
    shape = {"B": 2, "T": 70, "K": 16, "V": 8}
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    if device == "cuda" or backend == "native":
        dtypes.remove(torch.float64)  # these kernels accumulate in float32
    if interpreted:
        shape = {"B": 1, "T": 20, "H": 2 if first else 1, "K": 16, "V": 16}
        dtypes = [torch.float64, torch.float16] if first else [torch.float64]
        longest = 18 // case.shape.get("writes", 1)
        case = replace(case, lengths=tuple(min(length, longest) for length in case.lengths if length != 1))
    drawn, options = case.inputs(rule, **shape)
    exact = testing.cast(testing.cast(drawn, dtypes[-1]), torch.float64)  # numbers that every dtype represents
    truth = testing.evaluate(rule, exact, backend="reference", **options)
    there: dict[str, Any] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    for dtype in dtypes:
        inputs = testing.cast(exact, dtype)
        budgets = {} if dtype in BOUNDS else testing.budgets(rule, inputs, truth=truth, **options)
        for form in ("recurrent", "chunk"):
            try:
                found = testing.evaluate(rule, moved(inputs, device), backend=backend, form=form, **there)
            except ValueError as refusal:
                if not str(refusal).startswith("backend:"):
                    raise
                yield skipped(rule.name, case.name, backend, str(refusal))  # the backend doesn't serve this case
                return
            for name, x in found.items():
                error, bound = (
                    testing.result_error(name, x.cpu(), truth[name]),
                    BOUNDS.get(dtype, budgets.get(name, 0.0)),
                )
                yield row(rule.name, case.name, backend, form, dtype, name, error, bound) | {
                    "device": device,
                    "interpreted": interpreted,
                }


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """The inputs on the device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def applies(rule: Rule, case: CallCase) -> bool:
    """Whether the rule is compared in this case.

    A rule with a state of its own has no attention normalisation and no grouped heads.
    """
    if case.options.get("denominator"):
        return rule.plain and (not rule.erases or rule.normalised is not None)
    return rule.plain or "Hq" not in case.shape


# ---- a rule that has no lowered form ----


def against_loop(rule: Rule, case: CallCase) -> Iterator[Row]:
    """The reference in one case against a plain loop over sequences, heads and tokens."""
    drawn, options = case.inputs(rule, B=2, T=20, K=16, V=8)
    exact = testing.cast(testing.cast(drawn, torch.float32), torch.float64)
    truth = testing.evaluate(rule, exact, call=laws.token_by_token, **options)
    for dtype, bound in BOUNDS.items():
        found = testing.evaluate(rule, testing.cast(exact, dtype), backend="reference", **options)
        for name, x in found.items():
            error = testing.result_error(name, x, truth[name])
            yield row(rule.name, case.name, "reference", "recurrent", dtype, name, error, bound)


def against_law(rule: Rule, law: Callable[[Rule], Iterator[laws.Comparison]]) -> Iterator[Row]:
    """The comparisons of one law."""
    for name, x, truth, bound in law(rule):
        error, case = testing.result_error(name, x, truth), in_words(law)
        yield row(rule.name, case, "reference", "recurrent", torch.float64, name, error, bound)


def without_lower(rule: Rule) -> Iterator[Row]:
    """All that can be compared for a rule without `lower`: its equation in every case, and the laws."""
    for case in CASES:
        if applies(rule, case):
            yield from guarded(rule, case.name, "reference", against_loop(rule, case))
    for law in laws.LAWS:
        yield from guarded(rule, in_words(law), "reference", against_law(rule, law))


def in_words(fn: Callable[..., Any]) -> str:
    """The name of a function, for a table."""
    return fn.__name__.replace("_", " ")


# ---- named identities ----


def quadratic(core: Core) -> Tensor:
    """The op as one masked matrix product for all heads: (QKᵀ ⊙ M) X, where QKᵀ ⊙ M has T × nT entries.

    M_ij = exp(G_i − G_j) if query i sees write j, else 0, where G is the running sum of g. Without erasing, X = w ⊙ V.
    With erasing, X solves (I + tril(e ⊙ AKᵀ ⊙ M, −1)) X = w ⊙ V, where A holds the erase keys. There, M_ij is
    exp(G_{i−1} − G_j) if the erase keys read before the decay. With a denominator, each output is divided by the sum of
    its row of QKᵀ ⊙ M, plus eps.
    """
    H, n = core.heads, core.writes

    def features(x: Tensor) -> Tensor:  # [B, T, H] or [B, T, H, D] → [B, H, T, 1 or D]
        return x.reshape(*x.shape[:3], -1).movedim(1, 2)

    q, k, X = (features(to_heads(x, H)) for x in (core.q, core.k, core.v))
    g = torch.zeros_like(k[..., :1]) if core.g is None else features(core.g)
    G, write = g.cumsum(2), torch.arange(k.shape[2])
    last = n * torch.arange(q.shape[2]) + n - 1  # the last write that a query sees

    def products(x: Tensor, G_x: Tensor, seen: Tensor) -> Tensor:  # x_iᵀ Diag(exp(G_x_i − G_j)) k_j where seen
        M = (G_x.unsqueeze(3) - G.unsqueeze(2)).masked_fill(~seen.unsqueeze(-1), -math.inf).exp()
        return (x.unsqueeze(3) * k.unsqueeze(2) * M).sum(-1)

    if core.w is not None:
        X = features(core.w) * X
    if core.erases:
        a = k if core.a is None else features(core.a)
        A = products(a, G - g if core.erase_before_decay else G, write < write.unsqueeze(1))
        A = A if core.e is None else features(core.e) * A
        X = torch.linalg.solve_triangular(A, X, upper=False, unitriangular=True)
    P = products(q, G[:, :, last], write <= last.unsqueeze(1))
    out = P @ X
    if core.denominator:
        out = out / (P.sum(-1, keepdim=True) + core.eps)
    return out.movedim(1, 2)


def against_quadratic(rule: Rule) -> Iterator[Row]:
    """Both forms against `quadratic`, also with a denominator and with several writes per read."""
    if rule.lower is None:
        return
    for case in (
        CallCase("quadratic masked"),
        CallCase("quadratic, normalised", options={"denominator": True, "feature_map": "elu+1"}),
        CallCase("quadratic, writes", {"writes": 2}),
    ):
        if not applies(rule, case):
            continue
        x = testing.sample(rule, **{"T": 70, "K": 16, "seed": 1} | case.shape)
        q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
        phi = fwp.feature_maps.get(case.options.get("feature_map"))
        core = Core(phi(q), phi(k), v, denominator=bool(case.options), writes=case.shape.get("writes", 1))
        truth = quadratic(rule.lower(core, **x))
        for backend, form in FORMS:
            out, _ = fwp.fast_weights(rule, q, k, v, **x, **case.options, backend=backend, form=form)
            yield row(rule.name, case.name, backend, form, torch.float64, "out", testing.row_error(out, truth), 1e-10)


def against_simpler(rule: Rule) -> Iterator[Row]:
    """The rule against each simpler rule that it extends, with the gates that make the two equal."""
    for name, mapping in rule.extends.items():
        x = testing.sample(name, T=70, K=16, seed=2)
        q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
        truth, end = fwp.fast_weights(name, q, k, v, **x, backend="reference")
        gates: dict[str, Any] = mapping(k, v, **x)
        for backend, form in (FORMS[0], FORMS[2]) if rule.lower else FORMS[:1]:
            out, found = fwp.fast_weights(rule, q, k, v, **gates, backend=backend, form=form)
            pairs = {"out": (out, truth)} | ({"state.S": (found.S, end.S)} if rule.plain else {})
            for quantity, (a, b) in pairs.items():
                error = testing.row_error(a, b)
                yield row(rule.name, f"extends {name}", backend, form, torch.float64, quantity, error, 1e-10)


def carried(rule: Rule) -> Iterator[Row]:
    """A sequence cut in two, with the state carried over, against the whole sequence."""
    inputs = testing.sample(rule, T=70, K=16, seed=6, state=True)
    state = inputs.pop("state")
    for backend, form in FORMS:
        if rule.lower is None and backend == "torch":
            continue
        truth, last = fwp.fast_weights(rule, **inputs, state=state, backend="reference")
        parts, end = [], state
        for part in (slice(0, 30), slice(30, None)):
            given = {name: x[:, part] for name, x in inputs.items()}
            out, end = fwp.fast_weights(rule, **given, state=end, backend=backend, form=form)
            parts.append(out)
        found = {"out": torch.cat(parts, 1), **named_tensors("state", end)}
        for name, x in {"out": truth, **named_tensors("state", last)}.items():
            error = testing.row_error(found[name], x)
            yield row(rule.name, "split and carry", backend, form, torch.float64, name, error, 1e-10)


# The rules that all others extend, and the gates with which they recall exactly, under orthonormal keys.
ROOTS: dict[str, dict[str, float]] = {"additive": {}, "delta": {"beta": 1.0}}


def as_root(rule: Rule, k: Tensor, v: Tensor) -> tuple[Rule, dict[str, Tensor]] | None:
    """The root that the rule extends, and the gates that make the rule equal to it. None: no root."""
    if rules.RULES.get(rule.name) is rule and rule.name in ROOTS:
        return rule, {name: k.new_full(k.shape[:3], value) for name, value in ROOTS[rule.name].items()}
    for name, mapping in rule.extends.items():
        if found := as_root(rules.get(name), k, v):
            return found[0], mapping(k, v, **found[1])
    return None


def recall(rule: Rule) -> Iterator[Row]:
    """With orthonormal keys, no decay and full strength, a read returns what was written.

    If the root erases, every key is written twice, and a read returns the latest value.
    """
    K, V, case = 16, 8, "orthonormal recall"
    generator = torch.Generator().manual_seed(3)
    keys = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=torch.float64))[0]
    k = keys.repeat(2, 1)[None, :, None]  # [1, 2K, 1, K]
    v = torch.randn(1, 2 * K, 1, V, generator=generator, dtype=torch.float64)
    found = as_root(rule, k, v)
    if found is None or not rule.plain:
        return
    root, gates = found
    if not all(x.isfinite().all() for x in gates.values()):
        yield skipped(rule.name, case, "reference", f"no finite gates make it {root.name!r} at full strength")
        return
    if not root.erases:  # a second write under the same key would add to the first
        k, v, gates = k[:, :K], v[:, :K], {name: x[:, :K] for name, x in gates.items()}
    for backend, form in FORMS if rule.lower else FORMS[:1]:
        given: dict[str, Any] = {"k": k, "v": v, "backend": backend, "form": form, **gates}
        _, state = fwp.fast_weights(rule, k, **given)
        error = testing.row_error(fwp.read(state, k[:, -K:]), v[:, -K:])
        yield row(rule.name, case, backend, form, torch.float64, "out", error, 1e-12)


def against_oracle(rule: Rule) -> Iterator[Row]:
    """The reference itself against the oracle, which states the equations once more in NumPy."""
    if rules.RULES.get(rule.name) is not rule or not rule.plain:
        return
    try:
        from fwp_benchmarks import oracle
    except ImportError:
        yield skipped(rule.name, "oracle", "reference", "NumPy is not installed")
        return
    if rule.name not in oracle.RULES:
        yield skipped(rule.name, "oracle", "reference", "the oracle has no function of this name")
        return
    normalised = {"denominator": True, "feature_map": "elu+1", "feature_norm": "sum"}
    for case in (
        CallCase("oracle"),
        CallCase("oracle, normalised", options=normalised),
        CallCase("oracle, writes", {"writes": 2}, {"read": "before", "feature_map": "elu+1", "feature_norm": "l2"}),
    ):
        if not applies(rule, case):
            continue
        x = testing.sample(rule, **{"T": 20, "Hq": 4, "Hk": 1, "V": 5, "seed": 4} | case.shape)
        expected = oracle.fast_weights(rule.name, **{n: t.numpy() for n, t in x.items()}, **case.options)
        found, end = fwp.fast_weights(rule, **x, **case.options, backend="reference")
        for quantity, a, b in (("out", found, expected[0]), ("state.S", end.S, expected[1])):
            error = testing.row_error(a, torch.from_numpy(b))
            yield row(rule.name, case.name, "reference", "recurrent", torch.float64, quantity, error, 1e-12)


def against_transformers(rule: Rule) -> Iterator[Row]:
    """gated_delta against the fallback of transformers' Qwen3-Next, both in float32."""
    if rule is not rules.RULES.get("gated_delta"):
        return
    case = "transformers' fallback"
    try:
        from transformers import logging
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except Exception as error:  # it is not installed, or it is broken, which is no fault of ours
        yield skipped(rule.name, case, "torch", f"transformers could not be imported: {error}")
        return
    logging.set_verbosity_error()  # silences the warning that this is a fallback
    x = testing.sample(rule, T=70, K=16, seed=5, dtype=torch.float32)
    truth, end = torch_chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
    for form in ("recurrent", "chunk"):
        out, state = fwp.fast_weights(rule, q, k, v, **x, scale=16**-0.5, feature_norm="l2", backend="torch", form=form)
        for quantity, a, b in (("out", out, truth), ("state.S", state.S, end)):
            yield row(rule.name, case, "torch", form, torch.float32, quantity, testing.row_error(a, b), 3e-4)


def against_1991(rule: Rule) -> Iterator[Row]:
    """The additive slow and fast nets of 1991 against linear attention.

    FROM is the key, TO the value, and F's input the query. Version 2 with a linear slow net is the layer with the same
    weights, without normalisation. With read "before", each query reads what it would read "after" the previous token.
    A fast net of two layers is two ops.
    """
    if rule is not rules.RULES.get("additive"):
        return
    E, K, M, T = 8, 16, 6, 20
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        slow, deep_slow = nn.Linear(E, K + E, bias=False).double(), nn.Linear(E, K + 2 * M + E).double()
        layer = FastWeightAttention(E, 1, head_dim=K, value_dim=E, scale=1.0).double()
        x, d = torch.randn(2, T, E, dtype=torch.float64), torch.randn(2, T, K, dtype=torch.float64)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(E))
        slow.weight.copy_(torch.cat([layer.k_proj.weight, layer.v_proj.weight]))
        q, k, v = (project(x).unsqueeze(2) for project in (layer.q_proj, layer.k_proj, layer.v_proj))

        def output(net: nn.Module, fast: nn.Module, read: Read, seen: Tensor) -> Tensor:
            return SlowFastNet(net, fast, update="additive", read=read)(x, fast_input=seen)[0]

        flat = nn.Linear(K, E, bias=False)
        late = fwp.additive(q.roll(-1, 1), k, v)[0].roll(1, 1).squeeze(2)
        late[:, 0] = 0
        FROM, TO, FROM_2, TO_2 = deep_slow(x).unsqueeze(2).split([K, M, M, E], -1)
        hidden = fwp.additive(d.unsqueeze(2), FROM, TO)[0].tanh()
        deep = nn.Sequential(nn.Linear(K, M, bias=False), nn.Tanh(), nn.Linear(M, E, bias=False))
        pairs = {
            "1991: linear attention": (output(slow, flat, "after", q.squeeze(2)), layer(x)[0]),
            "1991: read before": (output(slow, flat, "before", q.squeeze(2)), late),
            "1991: two layers": (
                output(deep_slow, deep, "after", d),
                fwp.additive(hidden, FROM_2, TO_2)[0].squeeze(2),
            ),
        }
    for case, (found, truth) in pairs.items():
        yield row(rule.name, case, "torch", "chunk", torch.float64, "out", testing.row_error(found, truth), 1e-12)


IDENTITIES: tuple[Callable[[Rule], Iterator[Row]], ...] = (
    against_quadratic,
    against_simpler,
    carried,
    recall,
    against_oracle,
    against_transformers,
    against_1991,
)


# ---- the command ----


def find(rule: str) -> Rule:
    """The rule of this name in the table, or, for "file.py:NAME", the `Rule` of this name in that file."""
    path, _, name = rule.rpartition(":")
    if rule.endswith(".py"):
        raise ValueError(f"rule: expected FILE.py:NAME with the name of a fwp.Rule in that file, got {rule!r}")
    if not path.endswith(".py"):
        return rules.get(rule)
    if not Path(path).is_file():
        raise ValueError(f"rule: expected a file, got {path!r}")
    try:
        there = runpy.run_path(path)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"rule: expected a file that runs, got {path!r}, which raises {why}") from error
    found = there.get(name)
    if not isinstance(found, Rule):
        names = [key for key, value in there.items() if isinstance(value, Rule)]
        known = f"one of the rules {', '.join(names)}" if names else "the name of a fwp.Rule, but there is none,"
        raise ValueError(f"rule: expected {known} in {path}, got {name!r}{suggest(name, names)}")
    return found


def rule_rows(name: str, backend: str | None = None) -> Iterator[Row]:
    """All rows of one rule except those of kernels."""
    rule = find(name)
    for served in ("torch", "native"):
        if backend in (None, served):
            yield from against_reference(rule, served, "cpu", False)
    if rule.lower is None and backend in (None, "reference"):
        yield from without_lower(rule)
    for identity in IDENTITIES:
        found = guarded(rule, in_words(identity), ANY, identity(rule))
        yield from (r for r in found if backend is None or r["backend"] in (backend, ANY))


def kernel_rows(name: str) -> list[Row]:
    """The rows of the Triton kernels for one rule, on the GPU if there is one, else in the interpreter."""
    gpu = torch.cuda.is_available()
    return list(against_reference(find(name), "triton", "cuda" if gpu else "cpu", not gpu))


def start_interpreter() -> None:
    """Prepares a worker that interprets kernels. It must run before the process imports Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Kernels also multiply slots that no chunk of a packed sequence uses: arbitrary values, which are not stored.
    warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
    start_worker()


def main(rule: str | None = None, backend: str | None = None, json_file: Path | None = None) -> int:
    """Prints one table per rule as soon as it is measured, and writes the rows as JSON.

    A stopped run writes the rows that it has. Returns the exit status: 1 if a row failed or nothing was compared.
    """
    from rich.console import Console

    console = Console()
    found: list[Row] = []
    names = [rule] if rule else list(rules.RULES)
    kernels = names if backend in (None, "triton") else []
    interpreted = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
    # Interpreting kernels takes most of the time, so other processes do it meanwhile. A process serves several rules,
    # because starting one costs as much as a rule.
    others, threads = set(active_children()), torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads would only take the other processes' cores
    pool = ProcessPoolExecutor(min(len(names), cores()), get_context("spawn"), start_interpreter)
    try:
        with for_workers():
            elsewhere = {n: pool.submit(kernel_rows, n) for n in kernels if interpreted and find(n).lower}
        for name in names:
            before = len(found)
            with console.status(f"comparing {name} with the reference …"):
                for measured in rule_rows(name, backend):
                    found.append(measured)
                if name in kernels:
                    found += elsewhere[name].result() if name in elsewhere else kernel_rows(name)
            console.print(table(find(name), found[before:], console.width))
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        if found:
            write_rows(json_file, found)
        raise
    finally:
        torch.set_num_threads(threads)
        pool.shutdown(cancel_futures=True)
    failed, ran = sum(r["ok"] is False for r in found), sum(r["ok"] is not None for r in found)
    console.print(
        "Shown: the error of the worst row of outputs, states and gradients, in 64, 32 and 16 bits; "
        "* means in Triton's interpreter. Bounds: "
        "1e-10 in float64 (1e-12 for recall, oracle and 1991, 1e-6 for differences), 3e-4 in float32. "
        "In 16 bits: twice (gradients: three "
        f"times) the error of products of operands rounded to 16 bits. "
        f"Here, backend='auto' takes {automatic([find(name) for name in names])}."
    )
    bad = failed > 0 or not ran
    console.print(
        f"{ran} comparison{'s' * (ran != 1)}, {failed} failed, {len(found) - ran} not run.",
        style="red" if bad else "green",
    )
    write_rows(json_file, found)
    return int(bad)


def write_rows(json_file: Path | None, found: list[Row]) -> None:
    """Writes the rows as JSON, if a file is given."""
    if json_file is not None:
        write_whole(json_file, json.dumps(found, indent=1, allow_nan=False) + "\n")


def table(rule: Rule, found: list[Row], width: int = 80) -> Any:
    """A rule's rows for a console of this width.

    The table has one line per case and backend, and one column per form and precision. On a narrow console, each form
    has a line of its own. Notes stand below. They say what failed, and which cases did not run, and why.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    narrow = width < 80
    title = Text(f"{rule.name}: {rule.equation}" if rule.equation else rule.name, style="bold")
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("case")
    result.add_column("on", no_wrap=True)
    if narrow:
        result.add_column("form", no_wrap=True)
    for form in ("",) if narrow else ("recurrent", "chunk"):
        for bits in BITS:
            header, least = (f"{form}\n{bits}", len(form)) if form and bits == BITS[0] else (f"\n{bits}", None)
            result.add_column(str(bits) if narrow else header, justify="right", min_width=least, no_wrap=True)
    lines: dict[tuple[str, ...], dict[tuple[str, int], list[Row]]] = {}
    notes: dict[tuple[str, bool], tuple[dict[str, None], dict[str, None]]] = {}  # (note, whether it failed) → cases, on
    for r in found:
        on = r["backend"] + ("*" if r["interpreted"] else "")
        note = r.get("note") or failure(r)
        if note:
            cases, where = notes.setdefault((note, r["ok"] is False), ({}, {}))
            cases[r["case"]], where[on] = None, None
        if "note" not in r:
            line = (r["case"], on, *([r["form"]] if narrow else []))
            lines.setdefault(line, {}).setdefault(("" if narrow else r["form"], bits_of(r)), []).append(r)
    for line, cells in lines.items():
        forms = ("",) if narrow else ("recurrent", "chunk")
        result.add_row(*line, *(cell(cells.get((form, bits), [])) for form in forms for bits in BITS))
    said = [
        Text(f"{', '.join(cases)}, on {', '.join(where)}: {note}", style="red" if failed else "")
        for (note, failed), (cases, where) in notes.items()
    ]
    return Group(result, *said, *([""] if said else []))


def bits_of(r: Row) -> int:
    """The bits of a number of the row's dtype."""
    return torch.finfo(getattr(torch, r["dtype"])).bits


def failure(r: Row) -> str:
    """What is wrong with a row's result, in words; empty if nothing is."""
    if r["ok"] is not False:
        return ""
    off = "is not finite" if r["error"] is None else f"is off by {r['error']:.1e}, more than {r['bound']:.0e}"
    return f"{r['quantity']} {off} ({r['form']}, {r['dtype']})"


def cell(group: list[Row]) -> str:
    """The worst error of one comparison, red if one is beyond its bound."""
    if not group:
        return ""
    worst = max(math.inf if r["error"] is None else r["error"] for r in group)
    return f"{worst:.0e}" if all(r["ok"] for r in group) else f"[red]{worst:.0e}[/]"


def automatic(checked: list[Rule]) -> str:
    """The backends that backend="auto" takes here for float32 and float64 inputs of these rules, in words."""
    if all(rule.lower is None for rule in checked):
        return "reference"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = []
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(1, 64, 1, 16, dtype=dtype, device=device)
        chosen.append(f"{choose(Core(x, x, x), 'auto', 'auto', x)[0]} for {str(dtype).removeprefix('torch.')}")
    return f"{', '.join(chosen)} on {device}"
