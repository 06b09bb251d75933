"""Random inputs of the recurrence of `fwp.core` for each cell of the Triton kernels, and that recurrence by tokens."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from poison import poisoned_empties

from fwp.core import Core, Features, State
from fwp.feature_maps import applied
from fwp.testing import deviation

pytest.importorskip("triton")
from fwp.backends import triton as backend
from fwp_kernels import tiling

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MARKS = [pytest.mark.gpu] if GPU else []
C = 16 if GPU else 8  # matrix instructions need at least 16 rows

# A cell is (decay, erase). decay: 0 none, 1 per head, 2 per channel. erase: "" nothing, "k" along k with a strength,
# "a" along an erase key with a strength, "a alone" along an erase key without one.
ADDITIVE, KDA, OWN_KEY = (0, ""), (2, "k"), (2, "a")
CORNERS = pytest.mark.parametrize("cell", [ADDITIVE, KDA], ids=["additive", "kda"])
CELLS = pytest.mark.parametrize(
    "cell",
    [(decay, erase) for decay in (0, 1, 2) for erase in ("", "k")],
    ids=lambda c: f"decay{c[0]}-{c[1] or 'adds'}",
)
ERASERS = [
    (decay, erase, before)
    for decay in (0, 1, 2)
    for erase in ("", "k", "a", "a alone")
    for before in ((False, True) if decay and erase else (False,))
]
READS = pytest.mark.parametrize("read", ["after", "before"])
FIELDS = ("q", "k", "v", "g", "a", "e", "w", "S", "z")


def problem(cell, B=1, T=9, H=(1, 1, 1), K=5, V=3, N=None, dtype=torch.float64, seed=0, **options):
    """Random inputs of the core without equal numbers. q, k > 0 with a denominator. H: query, key and value heads."""
    (decay, erase), positive = cell, options.get("denominator", False)
    width, writes = options.get("features", Features()).width(K), options.get("writes", 1)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def uniform(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    Hq, Hk, Hv = H
    h, gates = max(Hk, Hv), torch.float64 if dtype == torch.float64 else torch.float32
    q, k, T = normal(B, T, Hq, K), normal(B, writes * T, Hk, K), writes * T
    if positive:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    core = Core(
        q.to(dtype),
        F.normalize(k, dim=-1).to(dtype),
        normal(B, T, Hv, V).to(dtype),
        g=-uniform(B, T, h, *([width] if decay == 2 else [])).to(gates) if decay else None,
        a=F.normalize(normal(B, T, h, width), dim=-1).to(dtype) if erase.startswith("a") else None,
        e=uniform(B, T, h).to(gates) if erase in ("k", "a") else None,
        w=uniform(B, T, h).to(gates) if erase else None,
        S=normal(B if N is None else N, h, width, V).to(gates),
        z=uniform(B if N is None else N, h, width).to(gates) if positive else None,
        **options,
    )
    return moved(core, lambda x: x.to(DEVICE))


def pairwise(*axes):
    """Few elements of the product of the axes. Any two values of two axes meet in at least one of them."""
    rows, chosen = [*product(*axes)], []

    def pairs(row):
        return {*combinations(enumerate(row), 2)}

    open_ = set().union(*map(pairs, rows))
    while open_:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & open_)))
        open_ -= pairs(chosen[-1])
    return chosen


def moved(core, fn):
    return replace(core, **{name: fn(x) for name in FIELDS if (x := getattr(core, name)) is not None})


def recurrence(core):
    """The definition at the top of `fwp.core`, in the dtype of its inputs."""
    core = applied(core)
    o, S = numerators(core)
    if not core.denominator:
        return o, State(S)
    one = core.v.new_ones(*core.k.shape[:2], core.heads, 1)  # z is the state that v = 1 makes when nothing is erased
    found, z = numerators(
        replace(core, v=one, a=None, e=None, w=None, S=None if core.z is None else core.z.unsqueeze(-1))
    )
    o = torch.where(found == 0, 0, o / (found + core.eps).masked_fill(found == 0, 1))
    return o, State(S, z.squeeze(-1))


def numerators(core):
    """Sᵀ q and the final S."""
    H = core.heads
    bounds = [0, core.q.shape[1]] if core.cu_seqlens is None else core.cu_seqlens.tolist()
    outputs, ends = [], []
    for n in range(core.sequences):
        b, (first, last) = (n, bounds) if core.cu_seqlens is None else (0, bounds[n : n + 2])
        rows, sums, finals = [], [], []
        for h in range(H):
            k, v = core.k[b, :, h // (H // core.k.shape[2])], core.v[b, :, h // (H // core.v.shape[2])]
            S = v.new_zeros(k.shape[1], v.shape[1]) if core.S is None else core.S[n, h]
            past = [S]
            for t in range(core.writes * first, core.writes * last):
                undecayed = S
                if core.g is not None:
                    S = core.g[b, t, h].exp().reshape(-1, 1) * S
                x = v[t] if core.w is None else core.w[b, t, h] * v[t]
                if core.erases:
                    key = k[t] if core.a is None else core.a[b, t, h]
                    found = key @ (undecayed if core.erase_before_decay else S)
                    x = x - (found if core.e is None else core.e[b, t, h] * found)
                S = S + torch.outer(k[t], x)
                if (t + 1) % core.writes == 0:
                    past.append(S)
            seen = past[1:] if core.read == "after" else past[:-1]
            rows.append(torch.stack(seen if core.causal else [S] * len(seen)) if seen else S.new_zeros(0, *S.shape))
            finals.append(S)
        heads = max(core.q.shape[2], H)
        sums = [
            (core.q[b, first:last, i // (heads // core.q.shape[2])].unsqueeze(1) @ rows[i // (heads // H)]).squeeze(1)
            for i in range(heads)
        ]
        outputs.append(torch.stack(sums, 1))
        ends.append(torch.stack(finals))
    out = torch.stack(outputs) if core.cu_seqlens is None else torch.cat(outputs).unsqueeze(0)
    return out, torch.stack(ends)


def results(run, core, outputs=("o", "S", "z"), seed=1):
    """o, the final state and the gradients of a weighted sum of `outputs`, by name."""
    core = moved(core, lambda x: x.detach().requires_grad_())
    o, (S, z) = run(core)
    found = {"o": o, "S": S} | ({} if z is None else {"z": z})
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for name, x in found.items()}
    given = {name: x for name in FIELDS if (x := getattr(core, name)) is not None}
    names = [name for name in found if name in outputs]
    grads = torch.autograd.grad(
        [found[name] for name in names], list(given.values()), [weights[name] for name in names], materialize_grads=True
    )
    return {name: x.detach() for name, x in found.items()} | {f"d{name}": x for name, x in zip(given, grads)}


def kernels(core, form="chunk", chunk=C, segment=None):
    with poisoned_empties():
        return backend.run(core, form, chunk, segment)


def agree(core, bound=1e-10, run=kernels, truth=recurrence, **how):
    found, expected = results(run, core, **how), results(truth, core, **how)
    assert found.keys() == expected.keys()
    errors = {name: deviation(found[name], expected[name]) for name in found}
    assert max(errors.values()) <= bound, errors
    for name in FIELDS:
        assert getattr(core, name) is None or found[f"d{name}"].dtype == getattr(core, name).dtype
    return found


def kept_every(monkeypatch, chunks):
    """Keeps a state every that many chunks for the backward."""
    tiles = tiling.tiles
    monkeypatch.setattr(tiling, "tiles", lambda *sizes: replace(tiles(*sizes), checkpoint_every=chunks))
