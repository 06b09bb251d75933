"""Looking into fast weights: states over time, attention matrices, ranks, recorded calls, plots.

S = fwp.inspect.states("delta", q, k, v, beta=beta, steps=[0, 9, 99]).S  # [3, N, H, K', V]
A = fwp.inspect.attention("delta", q, k, v, beta=beta)                   # [B, H, T, T], o_t = Σ_s A_ts v_s
rank = fwp.inspect.spectrum(S).rank                                      # [3, N, H]
figure = fwp.inspect.plot_state(S[:, 0, 0], steps=[0, 9, 99])            # of one sequence and head

with fwp.inspect.recording() as calls:  # what layers ask of the op
    decoder(tokens)
A = fwp.inspect.attention(**calls[2])  # of the third block
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fwp import errors, functional, rules, validate
from fwp._torch_private import tree_map
from fwp.backends import reference
from fwp.core import ScaledState, State, ratio
from fwp.observe import ObservedCall, observing, unobserved
from fwp.rules import Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- the state and its spectrum ----

PER_READ = ("q", "mask")  # these have T tokens, all others writes · T


def states(
    rule: str | Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    steps: Iterable[int] | None = None,
    mask: Tensor | None = None,
    state: Any = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Any:
    """The state after each of `steps`, in one pass that stops only there.

    steps: indices along T, in any order; negative ones count from its end; None means every token. With cu_seqlens
        [N + 1] they count within each sequence, and a sequence that has ended keeps its last state. A masked step
        shows the state before it.
    All else is as in `fwp.fast_weights`, gates included.

    Returns the states of the op, stacked along a first axis: `State(S [len(steps), N, H, K', V], z [len(steps), N, H,
    K'] or None)`, or the same structure as its `init` for a rule with a state of its own.
    TypeError and ValueError as in `fwp.fast_weights`; ValueError for steps outside T.
    """
    row = rules.get(rule)
    writes = validate.tensors(row, q, k, v)
    B, T = q.shape[:2]
    given = {"q": q, "k": k, "v": v, "mask": mask, **{name: options.pop(name, None) for name in row.gates}}
    over_time = {name: x for name, x in given.items() if x is not None}
    for name, x in over_time.items():
        free = [None] * (x.dim() - 2 if isinstance(x, Tensor) else 0)
        tokens = T if name in PER_READ else writes * T
        errors.tensor(name, x, (B, tokens, *free), torch.bool if name == "mask" else None)
    bounds = [0, T]
    if cu_seqlens is not None:
        validate.packing(cu_seqlens, B, T, check=True)
        bounds = cu_seqlens.tolist()
    wanted = _indices(steps, max(b - a for a, b in pairwise(bounds)))

    found, start = {}, 0
    for t in sorted(set(wanted)):
        spans = [(min(a + start, b), min(a + t + 1, b)) for a, b in pairwise(bounds)]  # tokens start … t of each
        at = torch.cat([torch.arange(*span, device=k.device) for span in spans])
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.new_tensor([0, *accumulate(b - a for a, b in spans)])
        written = (at[:, None] * writes + torch.arange(writes, device=k.device)).flatten()
        piece = {name: x[:, at if name in PER_READ else written] for name, x in over_time.items()}
        with unobserved():
            _, state = functional.fast_weights(row, **piece, state=state, cu_seqlens=cu_seqlens, **options)
        found[t], start = state, t + 1
    return reference.tree_map(lambda *x: torch.stack(x), *(found[t] for t in wanted))


def _indices(steps: Iterable[int] | None, T: int) -> list[int]:
    """The steps as indices in [0, T)."""
    try:
        wanted = list(range(T)) if steps is None else [operator.index(t) for t in steps]
    except TypeError:
        raise TypeError(f"steps: expected integers, got {steps!r}") from None
    if not wanted or not all(-T <= t < T for t in wanted):
        raise ValueError(f"steps: expected one or more in [{-T}, {T}), got {wanted}")
    return [t % T for t in wanted]


class Spectrum(NamedTuple):
    """The singular values σ_1 ≥ σ_2 ≥ … of matrices S [..., K, V], and what follows from them.

    values: σ, [..., min(K, V)].
    rank: how many of them exceed rtol · σ_1, [...] int64.
    stable_rank: Σσ² / σ_1², between 1 and the rank, 0 for S = 0, [...]. It changes little when S does.
    norm: √Σσ², the Frobenius norm of S, [...].
    """

    values: Tensor
    rank: Tensor
    stable_rank: Tensor
    norm: Tensor


def spectrum(S: Tensor, rtol: float | None = None) -> Spectrum:
    """Singular values, rank and norm of each matrix of S [..., K, V].

    rtol: up to rtol · σ_1 a singular value counts as 0; None: max(K, V) · eps of S's dtype, as in NumPy. A state that
        erased much more than it still holds contains rounding errors of what it erased, and needs a larger rtol.
    ValueError unless S has two axes or more; TypeError unless it is floating.
    """
    errors.tensor("S", S, (*[None] * max(S.dim() - 2, 0), None, None))
    if rtol is None:
        rtol = max(S.shape[-2:]) * torch.finfo(S.dtype).eps
    values = torch.linalg.svdvals(S)
    energy = values.square().sum(-1)
    rank = (values > rtol * values[..., :1]).sum(-1)
    return Spectrum(values, rank, ratio(energy, values[..., 0].square()), energy.sqrt())


# ---- the attention matrix ----


def attention(rule: str | Rule, q: Tensor, k: Tensor, v: Tensor, *, state: Any = None, **options: Any) -> Tensor:
    """A with o_t = Σ_s A_ts v_s: what the op does to values, one matrix per head.

    It is the op's output for v = I.

    Arguments as in `fwp.fast_weights`; of v only its shape and dtype matter. The rule must be linear in v and treat
    all value features alike, as every rule of the table does.

    Returns A [B, max(Hq, H), T, n·T] in v's dtype. Row t is the read of token t, column s is write s, with n writes per
    read. Output head i reads value head i // (max(Hq, H) / Hv). If the rule has a gate per value feature ("BTHV"), each
    feature has its own matrix: [B, max(Hq, H), V, T, n·T].
    - Writes after the read, those with s ≥ n·(t + 1), are exactly 0, with read="before" those with s ≥ n·t; with
      causal=False none need be.
    - Rows and columns of masked tokens are 0; packed sequences (cu_seqlens) are blocks along the diagonal.
    - Feature map, norms, scale and denominator are in A. With a denominator the rows of `additive` sum to almost 1.
    - Only z of a given state counts: what its S adds to the output is not part of A.

    ValueError for a rule that isn't linear in v, and for a given state of a rule's own kind.
    """
    row = rules.get(rule)
    if not row.linear_in_v:
        raise ValueError(f"rule: expected one that is linear in v, got {row.name!r}")
    if state is not None and not isinstance(state, (State, ScaledState)):
        raise ValueError(f"state: expected fwp.State or None, got {type(state).__name__}")
    validate.tensors(row, q, k, v)
    B, T, Hv, V = v.shape
    H = max(q.shape[2], k.shape[2], Hv)
    by_feature = [name for name, gate in row.gates.items() if gate.shape == "BTHV" and options.get(name) is not None]
    if T == 0:
        return v.new_zeros(B, H, *([V] if by_feature else []), 0, 0)
    identity = torch.eye(T, dtype=v.dtype, device=v.device).view(1, T, 1, T).expand(B, T, Hv, T)
    if state is not None:
        state = state._replace(S=state.S.new_zeros(*state.S.shape[:-1], T))

    def matrix(**gates: Tensor) -> Tensor:
        with unobserved():
            out, _ = functional.fast_weights(row, q, k, identity, state=state, **(options | gates))
        return out.transpose(1, 2)

    if not by_feature:
        return matrix()
    for name in by_feature:
        errors.tensor(name, options[name], (B, T, max(k.shape[2], Hv), V))
    features = range(V)
    return torch.stack(
        [matrix(**{name: options[name][..., c, None].expand(-1, -1, -1, T) for name in by_feature}) for c in features],
        2,
    )


# ---- inside layers ----


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """A context that keeps the arguments of every call of the op, also of those by layers and models.

    Gives a list of dicts in the order of the calls, so one entry per block after one pass of a `Decoder`:
    `states(**calls[0])`, `attention(**calls[0])`. Each holds all arguments of `fwp.fast_weights`, the gates by name,
    tensors detached. A feature map is kept as the object it is. Calls that are refused, calls of other threads and
    calls inside compiled modules are not seen.
    """
    calls: list[dict[str, Any]] = []

    def keep(call: ObservedCall) -> None:
        calls.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, dict(call.arguments)))

    with observing(keep):
        yield calls


# ---- plots ----

Panels = Tensor | Mapping[str, Tensor]


def plot_state(S: Tensor, steps: Sequence[int] | None = None) -> Figure:
    """Fast weights as pictures with one colour scale, one panel per step.

    S: [len(steps), K', V], of one sequence and head.
    steps: those given to `states`; None: 0, 1, …
    """
    errors.tensor("S", S, (None, None, None))
    titles = [f"after token {t}" for t in _numbers(steps, len(S))]
    return _heatmaps(dict(zip(titles, S)), "value feature", "key feature", "fast weight", cell=1.5)


def plot_attention(A: Panels, seen: Tensor | None = None) -> Figure:
    """Attention matrices as pictures with one colour scale, one panel per matrix. What t cannot read is grey.

    A: [T, n·T], [H, T, n·T], or a mapping of titles to [T, n·T].
    seen: which writes each token can read, bool [T, n·T]; None: those up to itself if all later ones are 0 in A, else
        all. Masked tokens and packed sequences need it, since a 0 can also be a result.
    """
    if isinstance(A, Tensor):
        A = {f"head {h}": x for h, x in enumerate(A)} if A.dim() == 3 else {"": A}
    for name, x in A.items():
        errors.tensor(f"A[{name!r}]" if name else "A", x, (None, None))
        if seen is not None:
            errors.tensor("seen", seen, tuple(x.shape), torch.bool)
    hidden = {name: _later(x) if seen is None else ~seen for name, x in A.items()}
    return _heatmaps(A, "written token s", "reading token t", "attention A", cell=2.4, hidden=hidden)


def _later(x: Tensor) -> Tensor:
    """Which entries of A [T, n·T] are writes after the read, if they all are 0; else none of them."""
    T, writes = x.shape
    later = torch.ones_like(x, dtype=torch.bool).triu(1)
    if T and writes % T == 0:
        later = later.new_ones(T, T).triu(1).repeat_interleave(writes // T, 1)
    return later & (x[later] == 0).all()


def plot_rank(S: Panels, steps: Sequence[int] | None = None, rtol: float | None = None) -> Figure:
    """Rank, stable rank and norm of S over time.

    S: [len(steps), K', V], of one sequence and head, or a mapping of labels to such.
    steps, rtol: as in `plot_state` and `spectrum`. The dashed line is the largest rank after t + 1 writes into S = 0.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = {"": S} if isinstance(S, Tensor) else S
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    bounds: list[tuple[Sequence[int], list[int]]] = []
    for i, (name, x) in enumerate(lines.items()):
        errors.tensor(f"S[{name!r}]" if name else "S", x, (None, None, None))
        at, found = _numbers(steps, len(x)), spectrum(x.detach(), rtol)
        bounds.append((at, [min(t + 1, *x.shape[1:]) for t in at]))
        width = len(lines) - i + 0.5  # ranks often coincide: later lines lie on earlier, thicker ones
        for axes, y in zip(panels, (found.rank, found.stable_rank, found.norm)):
            axes.plot(at, y.cpu().numpy(), marker="o" if len(at) < 40 else None, markersize=3, lw=width, label=name)
    for at, bound in bounds[:1] if all(bound == bounds[0] for bound in bounds) else bounds:
        panels[0].plot(at, bound, "k--", lw=1, label="min(t + 1, K', V)")
    for axes, title in zip(panels, ("rank of S", "stable rank of S, Σσ² / σ₁²", "Frobenius norm of S")):
        axes.set(xlabel="token t", title=title, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _numbers(steps: Sequence[int] | None, count: int) -> Sequence[int]:
    """The step number of each state, for an axis."""
    steps = range(count) if steps is None else steps
    if len(steps) != count or any(t < 0 for t in steps):
        raise ValueError(f"steps: expected {count} numbers from 0 on, one per state, got {list(steps)}")
    return steps


GREY = "#b8b8b8"
SHOWN = 0.99  # the share of entries within the colour scale, so that a few large ones do not bleach the others


def _heatmaps(
    panels: Mapping[str, Tensor],
    across: str,
    down: str,
    value: str,
    cell: float,
    hidden: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Matrices [rows, columns] by title, in rows of at most six.

    White is 0, and the colour scale is symmetric. It ends at the SHOWN quantile of the sizes; the label of the colours
    states the share beyond.
    hidden: entries to draw grey, which the scale leaves out.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    hidden = hidden or {name: torch.zeros_like(x, dtype=torch.bool) for name, x in panels.items()}
    sizes = torch.cat([x.detach()[~hidden[name]].abs().flatten() for name, x in panels.items()])
    most = sizes.kthvalue(1 + math.ceil(SHOWN * (len(sizes) - 1))).values.item() or sizes.max().item() or 1.0
    beyond = (sizes > most).float().mean().item()
    if beyond:
        value += f"\n{beyond:.1%} of entries lie beyond"
    height = cell * min(max(x.shape[0] / x.shape[1] for x in panels.values()), 3)
    figure = Figure(figsize=(columns * (cell + 0.2) + 1.4, rows * (height + 0.4) + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for unused in grid.flat[len(panels) :]:
        unused.remove()
    used = list(grid.flat[: len(panels)])
    colours = colormaps["RdBu_r"].with_extremes(bad=GREY)
    for axes, (title, x) in zip(used, panels.items()):
        picture = np.ma.array(x.detach().cpu().float().numpy(), mask=hidden[title].cpu().numpy())
        shown = axes.imshow(picture, cmap=colours, vmin=-most, vmax=most, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    figure.supxlabel(across, fontsize=9)
    figure.supylabel(down, fontsize=9)
    bar = figure.colorbar(shown, ax=used, extend="both" if beyond else "neither")
    bar.set_label(value, fontsize=8)
    if any(x.any() for x in hidden.values()):
        figure.legend(
            handles=[Patch(color=GREY, label="masked: t cannot read s")],
            loc="outside upper center",
            fontsize=8,
            frameon=False,
        )
    return figure
