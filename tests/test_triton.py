"""The Triton kernels against the recurrence of `fwp.core`, which `cells` runs token by token.

Without a GPU they run in Triton's interpreter at tiny sizes. With one the same tests run on it.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cells import (
    ADDITIVE,
    CELLS,
    CORNERS,
    DEVICE,
    ERASERS,
    GPU,
    KDA,
    MARKS,
    OWN_KEY,
    READS,
    C,
    agree,
    kept_every,
    kernels,
    moved,
    pairwise,
    problem,
    recurrence,
    results,
)
from laws import divisors_near_zero
from torch.utils._pytree import tree_leaves, tree_map

from fwp import feature_maps
from fwp.backends import triton as backend
from fwp.core import Core, Features, State, overwriting
from fwp.feature_maps import applied
from fwp.inspect import recording
from fwp.nn import FastWeightAttention
from fwp.testing import budgets, cast, deviation, evaluate, result_error, row_error, sample

pytestmark = MARKS

# ---- both forms equal the recurrence ----


@READS
@CELLS
def test_chunks_are_the_recurrence(cell, read):
    agree(problem(cell, B=2, T=C + 3, read=read))


@CORNERS
@pytest.mark.parametrize("T", [1, C - 1, C, C + 1, 4 * C + 11])
def test_lengths(cell, T):
    agree(problem(cell, T=T))


@READS
@CELLS
def test_tokens_are_the_recurrence(cell, read):
    core = problem(cell, B=2, T=5, H=(2, 2, 2), read=read)
    for name, x in zip("oS", (recurrence(core)[0], recurrence(core)[1].S)):
        o, state = kernels(core, "recurrent")
        assert deviation({"o": o, "S": state.S}[name], x) <= 1e-10


@CORNERS
def test_gradients_of_the_recurrent_form(cell):
    agree(problem(cell, T=3), run=lambda core: kernels(core, "recurrent"))


@pytest.mark.parametrize("denominator", [False, True])
@CORNERS
def test_a_step_over_its_state(cell, denominator):
    """The state is overwritten only if a layer owns it."""
    core = problem(cell, T=1, K=5, V=35, denominator=denominator)
    o, state = kernels(core, "recurrent")
    before = core.S.clone()
    with overwriting():
        chunked = kernels(core)[1].S
        assert torch.equal(core.S, before) and chunked is not core.S
        found, over = kernels(core, "recurrent")
    assert over.S is core.S and torch.equal(over.S, state.S) and torch.equal(found, o)
    assert not denominator or torch.equal(over.z, state.z)


@torch.no_grad()
def test_whoever_holds_a_state_hears_of_a_step_over_it():
    layer = FastWeightAttention(8, 2, "kda", backend="triton", head_dim=4).to(DEVICE)
    x = torch.randn(2, 8, device=DEVICE)
    _, state = layer.step(x)
    with torch.enable_grad():
        factor = torch.ones((), device=DEVICE, requires_grad=True)
        pending = (factor * state.memory.S).sum()
    before = state.memory.S.clone()
    with recording() as calls:
        layer.step(x, state, in_place=True)
    assert torch.equal(calls[0]["state"].S, before) and not torch.equal(state.memory.S, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pending.backward()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("denominator", [False, True])
def test_steps_in_a_cuda_graph(denominator):
    layer = FastWeightAttention(64, 2, "kda", "elu+1", "sum", denominator, short_conv=4).to(DEVICE, torch.bfloat16)
    tokens = torch.randn(5, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    _, state = layer.step(tokens[0])
    x, held, spare = tokens[1].clone(), copied(state), copied(state)
    layer.step(x, spare, in_place=True)  # the first use compiles and checks the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = layer.step(x, held, in_place=True)
    for token in tokens[1:]:
        x.copy_(token)
        graph.replay()
        expected, state = layer.step(token, state)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, leaves(held), leaves(state)))


def copied(state):
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)


def leaves(state):
    return [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("chunk", [16, 32, 64])
@CORNERS
def test_chunk_sizes(cell, chunk):
    agree(problem(cell, T=chunk - 3, K=2, V=2), run=lambda core: kernels(core, chunk=chunk))


@CORNERS
def test_many_blocks(cell):
    """K and V of several blocks, the last ones partial."""
    agree(problem(cell, T=5, K=35, V=37))


@pytest.mark.parametrize("present", ["o", "S"])
@CORNERS
def test_a_loss_on_one_output(cell, present):
    agree(problem(cell, T=C + 2), outputs=(present,))


@CORNERS
def test_without_initial_state(cell):
    agree(replace(problem(cell), S=None))


def test_writes_without_strength_and_erasing_alone():
    core = problem(KDA)
    agree(replace(core, w=None))
    agree(replace(core, e=None))


# ---- gates and keys ----


@pytest.mark.parametrize("cell", [(1, "k"), KDA], ids=["scalar", "channel"])
@pytest.mark.parametrize("value", [0.0, -0.5, -20.0, -200.0, -1e4, -torch.inf])
def test_gates_of_any_size(cell, value):
    core = problem(cell, T=C + 3, read="before" if value == -20.0 else "after")
    hit = torch.rand(core.g.shape, generator=torch.Generator().manual_seed(3)).to(core.g.device) < 0.3
    found = agree(replace(core, g=core.g.masked_fill(hit, value)))
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("value", [-750.0, -torch.inf])
@pytest.mark.parametrize("cell", [(1, ""), (2, ""), KDA], ids=["decay", "gla", "kda"])
@READS
def test_a_reset_by_the_last_token_of_a_chunk_that_is_not_full(read, cell, value):
    packed = {"N": 2, "cu_seqlens": torch.tensor([0, C + 3, C + 5], device=DEVICE)}
    for shape in ({"T": C + 1}, {"T": C + 5, **packed}):
        core = problem(cell, read=read, **shape)
        last = [-1] if "cu_seqlens" not in shape else [C + 2, C + 4]
        core.g[:, last] = value
        agree(core)


@pytest.mark.parametrize("cell", [(1, "k"), KDA], ids=["scalar", "channel"])
def test_a_reset_forgets_everything(cell):
    core = problem(cell, T=C + 3)
    g = core.g.clone()
    g[:, 5] = -torch.inf
    far = replace(core, g=g, S=core.S * 1e30, v=torch.cat([core.v[:, :5] * 1e30, core.v[:, 5:]], 1))
    o, state = kernels(far)
    near_o, near = kernels(replace(core, g=g))
    assert torch.equal(o[:, 5:], near_o[:, 5:]) and torch.equal(state.S, near.S)


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["same", "opposite", "nearly the same"])
def test_keys_that_are_alike(keys, strength):
    """With these keys a power series for (I + A)⁻¹ diverges."""
    chunk = 64
    core = problem((0, "k"), T=chunk, K=3)
    k = core.k[:, :1].expand_as(core.k)
    if keys == "opposite":
        k = k * (-1) ** torch.arange(chunk, device=DEVICE).view(1, -1, 1, 1)
    elif keys == "nearly the same":
        k = F.normalize(k + 1e-6 * core.k, dim=-1)
    strong = torch.full_like(core.e, strength)
    agree(replace(core, k=k, e=strong, w=strong), run=lambda core: kernels(core, chunk=chunk))


# ---- laws ----


@pytest.mark.parametrize("cut", [1, C - 1, C, C + 1])
@CORNERS
def test_split_and_carry(cell, cut):
    def in_two(core):
        def part(at):
            return moved(replace(core, S=None), lambda x: x[:, at])

        o, state = kernels(replace(part(slice(None, cut)), S=core.S))
        o2, state = kernels(replace(part(slice(cut, None)), S=state.S))
        return torch.cat([o, o2], 1), state

    agree(problem(cell, T=C + 3), run=in_two)


@READS
@CORNERS
def test_causality(cell, read):
    core = problem(cell, T=2 * C, read=read)
    cut = C + 3

    def replaced(x):
        return torch.cat([x[:, :cut], -x[:, cut:].abs() * 3], 1) if x is not core.S else x

    o, _ = kernels(core)
    other, _ = kernels(moved(core, replaced))
    assert torch.equal(o[:, :cut], other[:, :cut])
    assert (o[:, cut:] != other[:, cut:]).any()


@pytest.mark.parametrize(
    "lengths", [(0, 3, C + 1), (3, 0, C), (2, C, 0), (0, 0), (1, 0, 0, 2)], ids=lambda x: "-".join(map(str, x))
)
@CORNERS
def test_packed_sequences(cell, lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    core = problem(cell, T=sum(lengths), N=len(lengths), cu_seqlens=cu_seqlens)
    found = agree(core)
    assert torch.equal(kernels(replace(core, cu_seqlens=cu_seqlens.int()))[0], found["o"])


@pytest.mark.parametrize(
    "cell", [ADDITIVE, (1, "k"), OWN_KEY, (2, "a alone")], ids=lambda c: f"{c[0]}-{c[1] or 'adds'}"
)
def test_tokens_outside_all_packed_sequences(cell):
    """Their outputs and gradients are 0. Nobody checks the borders of packed sequences on a GPU."""
    more = {} if cell == ADDITIVE else {"denominator": True, "features": Features("dpfp-1", "sum"), "writes": 2}
    core = problem(cell, T=9, N=2, H=(2, 1, 1), cu_seqlens=torch.tensor([2, 5, 7], device=DEVICE), **more)

    def inner(core):
        n = core.writes
        tokens = {name: x[:, 2 * n : 7 * n] for name in "kvgaew" if (x := getattr(core, name)) is not None}
        o, state = recurrence(replace(core, q=core.q[:, 2:7], **tokens, cu_seqlens=core.cu_seqlens - 2))
        return F.pad(o, (0, 0, 0, 0, 2, 2)), state

    for run in (kernels, lambda core: kernels(core, segment=1), lambda core: kernels(core, "recurrent")):
        agree(core, run=run, truth=inner)


def test_packed_recurrent_and_read_before():
    core = problem(KDA, T=6, N=4, H=(2, 1, 1), cu_seqlens=torch.tensor([0, 0, 2, 2, 6], device=DEVICE), read="before")
    agree(core)
    agree(core, run=lambda core: kernels(core, "recurrent"))


@pytest.mark.parametrize("H", [(4, 1, 2), (1, 2, 2), (2, 2, 1), (4, 2, 1)], ids=str)
@CORNERS
def test_shared_heads(cell, H):
    core = problem(cell, T=4, H=H)
    agree(core)
    assert deviation(kernels(core, "recurrent")[0], recurrence(core)[0]) <= 1e-10


@CORNERS
def test_strides(cell):
    core = problem(cell, B=2, T=5, H=(2, 2, 2))
    moved_axes = moved(core, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    moved_axes = replace(moved_axes, q=core.q.mT.contiguous().mT, S=core.S.mT.contiguous().mT)
    gaps = moved(core, lambda x: torch.stack([x, x.new_full((), torch.nan).expand_as(x)], -1)[..., 0])
    for strange in (moved_axes, gaps):
        for form in ("chunk", "recurrent"):
            assert torch.equal(kernels(strange, form)[0], kernels(core, form)[0])
    # expanded inputs and an expanded gradient
    leaf = core.k[:1].clone().requires_grad_()
    kernels(replace(core, k=leaf.expand_as(core.k)))[0].sum().backward()
    whole = core.k[:1].clone().requires_grad_()
    recurrence(replace(core, k=whole.expand_as(core.k)))[0].sum().backward()
    assert deviation(leaf.grad, whole.grad) <= 1e-10


@CORNERS
def test_nothing_to_do(cell):
    for sizes in ({"T": 0}, {"B": 0}, {"T": 0, "cu_seqlens": torch.zeros(1, dtype=torch.long, device=DEVICE), "N": 0}):
        core = problem(cell, **sizes)
        for form in ("chunk", "recurrent"):
            found = results(lambda core, form=form: kernels(core, form), core)
            assert found["o"].shape == (*core.q.shape[:3], 3) and torch.equal(found["S"], core.S)
            assert all(found[f"d{name}"].count_nonzero() == 0 for name in "qkv")
            assert found["dS"].shape == core.S.shape
    core = replace(problem(cell, T=0), S=None)
    assert kernels(core)[1].S.count_nonzero() == 0


def test_addresses_beyond_32_bits():
    """Head 1 of q lies 2³¹ elements behind head 0."""
    core = problem(ADDITIVE, T=2, H=(2, 1, 1), dtype=torch.float16)
    far = torch.empty(
        2**31 + 2 * core.q.shape[-1], dtype=torch.float16, device=DEVICE
    )  # untouched pages take no memory
    q = far.as_strided(core.q.shape, (0, core.q.shape[-1], 2**31, 1))
    q.copy_(core.q)
    for form in ("chunk", "recurrent"):
        assert torch.equal(kernels(replace(core, q=q), form)[0], kernels(core, form)[0])


# ---- erase keys, and several writes per read ----

LAYOUTS = ("whole", "packed", "packed segments")
WRITERS = pairwise(ERASERS, ("after", "before"), LAYOUTS, (False, True), (1, 2, 3))


@pytest.mark.parametrize(("eraser", "read", "layout", "denominator", "writes"), WRITERS)
def test_erase_keys_and_writes(eraser, read, layout, denominator, writes, monkeypatch):
    """Every pair of these choices: output, state and all gradients of both forms."""
    kept_every(monkeypatch, 2)
    decay, erase, before = eraser
    T = 2 * C // writes + 2  # three chunks, of which two are one segment
    options = {"N": 3, "cu_seqlens": torch.tensor([0, 1, 1, T], device=DEVICE)} if layout != "whole" else {}
    options |= {"read": read, "denominator": denominator, "writes": writes, "erase_before_decay": before}
    core = problem((decay, erase), T=T, K=3, V=2, **options)
    found = agree(core, run=lambda core: kernels(core, segment=2 * layout.endswith("segments")))
    o, state = kernels(core, "recurrent")
    errors = [deviation(o, found["o"]), deviation(state.S, found["S"])]
    assert max([*errors, deviation(state.z, found["z"])] if denominator else errors) <= 1e-10


@pytest.mark.parametrize("H", [(4, 1, 2), (1, 2, 2), (2, 2, 1)], ids=str)
def test_erase_keys_of_shared_heads_and_many_blocks(H):
    agree(problem((1, "a alone"), T=3, H=H, K=35, V=37, writes=2, erase_before_decay=True))


@pytest.mark.parametrize("phi", ["elu+1", "dpfp-2"])
def test_erase_keys_beside_features(phi):
    """φ and its norm are applied to q and k, not to erase keys, and also to keys that no token reads."""
    features = Features(phi, "sum", 0.5)
    core = problem(OWN_KEY, T=5, H=(2, 1, 2), K=2, writes=2, features=features, denominator=True)
    assert deviation(kernels(core, "recurrent")[0], agree(core)["o"]) <= 1e-10


@pytest.mark.parametrize("cell", [(1, "a alone"), OWN_KEY], ids=["scalar", "channel"])
@pytest.mark.parametrize("value", [-200.0, -torch.inf])
def test_what_is_erased_is_found_before_a_reset(cell, value):
    core = problem(cell, T=C + 3, writes=2, erase_before_decay=True)
    core.g[:, [0, 5, C, -1]] = value
    found = agree(core)
    assert all(x.isfinite().all() for x in found.values())


def test_erase_keys_of_any_strides():
    core = problem(OWN_KEY, T=2, H=(2, 2, 2), K=3, V=2, writes=2)
    strange = moved(core, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    strange = replace(strange, a=core.a.mT.contiguous().mT)
    for form in ("chunk", "recurrent"):
        assert torch.equal(kernels(strange, form)[0], kernels(core, form)[0])
    leaf = core.a[:1, :1].clone().requires_grad_()
    kernels(replace(core, a=leaf.expand_as(core.a)))[0].sum().backward()
    whole = core.a[:1, :1].clone().requires_grad_()
    recurrence(replace(core, a=whole.expand_as(core.a)))[0].sum().backward()
    assert deviation(leaf.grad, whole.grad) <= 1e-10


def test_no_tokens_with_erase_keys():
    core = problem(OWN_KEY, T=0, writes=2)
    for form in ("chunk", "recurrent"):
        found = results(lambda core, form=form: kernels(core, form), core)
        assert torch.equal(found["S"], core.S) and found["da"].shape == core.a.shape


def test_a_query_that_reads_the_end_of_several_writes():
    bounds = torch.tensor([0, 3, 3, 7], device=DEVICE)
    core = problem(ADDITIVE, T=7, H=(2, 1, 2), N=3, cu_seqlens=bounds, writes=2, denominator=True)
    agree(replace(core, causal=False))


# ---- normalisation ----


@READS
@CELLS
def test_denominator(cell, read):
    core = problem(cell, T=C + 2, H=(2, 1, 1), read=read, denominator=True, eps=0.1)
    agree(core)
    for name, x in zip("oSz", (recurrence(core)[0], *recurrence(core)[1])):
        o, state = kernels(core, "recurrent")
        assert deviation({"o": o, "S": state.S, "z": state.z}[name], x) <= 1e-10


@pytest.mark.parametrize("present", ["o", "S", "z"])
def test_a_loss_on_one_output_beside_a_denominator(present):
    core = problem(KDA, T=C + 2, K=35, V=37, denominator=True)
    agree(replace(core, z=None) if present == "o" else core, outputs=(present,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decay", [-50.0, -100.0, -torch.inf])
@pytest.mark.parametrize("rule", ["delta", "gated_delta", "kda"])
def test_divisors_near_zero(rule, decay, dtype):
    """As in the law of that name. float16 has no smaller keys than 1e-5, and its results are rounded."""
    options = {"denominator": True, "eps": 0.0}
    inputs = cast(divisors_near_zero(rule, decay, 1e-20 if dtype == torch.float32 else 1.0), dtype)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    truth = evaluate(rule, cast(inputs, torch.float64), backend="reference", **options)
    for form in ("chunk", "recurrent"):
        found = evaluate(rule, inputs, backend="triton", form=form, **options)
        for name, x in truth.items():
            assert (found[name] - x).abs().amax() <= (1e-5 if dtype == torch.float32 else 4e-3) * x.abs().amax(), name


def test_denominators_of_packed_sequences():
    bounds = torch.tensor([0, 0, C + 1, C + 1, C + 4], device=DEVICE)
    core = problem(KDA, T=C + 4, N=4, H=(2, 1, 2), cu_seqlens=bounds, read="before", denominator=True)
    agree(core)
    agree(core, run=lambda core: kernels(core, "recurrent"))


def test_denominator_of_zero():
    core = problem(ADDITIVE, denominator=True)
    core = replace(core, k=torch.zeros_like(core.k), z=torch.zeros_like(core.z))
    found = agree(core)
    assert found["o"].count_nonzero() == 0


def test_denominators_of_nothing():
    given = problem(KDA, T=0, denominator=True)
    for core in (given, replace(given, S=None, z=None)):
        for form in ("chunk", "recurrent"):
            found = results(lambda core, form=form: kernels(core, form), core)
            assert torch.equal(found["z"], torch.zeros_like(found["z"]) if core.z is None else core.z)


def test_the_sum_of_keys_stays_in_float32():
    """Of 1,200 keys of value 1, a bfloat16 sum would stop at 256."""
    one = torch.ones(1, 1200, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    _, state = backend.run(Core(one, one, one, denominator=True), "chunk", 64)
    assert state.z.dtype == torch.float32 and state.z.item() == 1200 and state.S.item() == 1200


@pytest.mark.parametrize("denominator", [False, True])
def test_every_query_reads_the_end(denominator):
    bounds = torch.tensor([0, 3, 3, 7], device=DEVICE)
    core = problem(ADDITIVE, T=7, H=(2, 1, 2), N=3, cu_seqlens=bounds, denominator=denominator)
    agree(replace(core, causal=False))


# ---- features ----


@pytest.mark.parametrize("norm", ["sum", "l2"])
@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_norms_of_huge_features(form, norm):
    """Squares of features from 1e19 on are out of float32's range, their norm is not. Both passes, for q and k."""
    x = sample("gated_delta", B=1, T=C + 3, H=1, K=4, V=3, seed=3)
    huge = torch.tensor([1e-4, 1.0, 1e18, 1e20, 1e25, 1e29]).repeat(C)[: C + 3].view(1, -1, 1, 1)
    x |= {name: (x[name].abs() if norm == "sum" else x[name]) * huge for name in "qk"}
    rough = cast(x, torch.float32)
    truth = evaluate("gated_delta", cast(rough, torch.float64), backend="reference", feature_norm=norm)
    there = {name: y.to(DEVICE) for name, y in rough.items()}
    found = evaluate("gated_delta", there, backend="triton", form=form, feature_norm=norm)
    assert {
        name: error for name, y in found.items() if (error := result_error(name, y.cpu(), truth[name])) > 1e-4
    } == {}


MAPS, NORMS = (None, "relu", "elu+1", "exp", "dpfp-1", "dpfp-3"), (None, "sum", "l2")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("phi", MAPS)
def test_features(phi, norm):
    positive = phi is None  # otherwise their sum can be near 0
    core = problem((1, "k"), T=C + 3, H=(2, 1, 1), K=3, features=Features(phi, norm, 0.5), denominator=positive)
    found = agree(core)
    assert deviation(kernels(core, "recurrent")[0], found["o"]) <= 1e-10


@READS
@CELLS
def test_features_in_every_cell(cell, read):
    core = problem(cell, T=C + 1, K=2, read=read, features=Features("dpfp-2", "sum", 0.5), denominator=True)
    core = replace(core, q=-core.q)  # so that both halves of [x, −x] count
    agree(core)


@pytest.mark.parametrize("phi", ["elu+1", "dpfp-3"])
@pytest.mark.parametrize("norm", NORMS)
def test_many_blocks_of_features(phi, norm):
    core = problem(KDA, T=5, K=67 if phi == "elu+1" else 11, V=37, H=(1, 2, 2), features=Features(phi, norm))
    agree(replace(core, e=0.01 * core.e))


def test_features_of_packed_sequences_and_strange_tensors():
    bounds = torch.tensor([0, 0, C + 1, C + 1, C + 4], device=DEVICE)
    features = Features("dpfp-2", "l2", 2.0)
    core = problem(KDA, T=C + 4, N=4, H=(2, 1, 2), K=2, cu_seqlens=bounds, read="before", features=features)
    o = agree(core)["o"]
    assert deviation(kernels(core, "recurrent")[0], o) <= 1e-10
    strange = replace(core, q=core.q.mT.contiguous().mT, k=core.k.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(kernels(strange)[0], o)
    nothing = problem(KDA, T=0, features=features)
    assert results(kernels, nothing)["dq"].shape == nothing.q.shape


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=[] if GPU else pytest.mark.skip)])
@pytest.mark.parametrize("phi", ["relu", "dpfp-2"])
def test_features_are_rounded_as_those_that_lie_in_memory(phi, dtype):
    core = problem(ADDITIVE, T=C + 3, K=4, dtype=dtype, features=Features(phi, None, 0.3))
    assert applied(core).k.dtype == dtype
    for form in ("chunk", "recurrent"):
        for found, truth in zip(kernels(core, form), kernels(applied(core), form)):
            assert found is truth or torch.equal(*(found, truth) if torch.is_tensor(found) else (found.S, truth.S))


@pytest.mark.parametrize("feature_map", ["relu", "elu+1", "dpfp-2"])
@pytest.mark.parametrize("rule", ["gla", "delta"])
def test_the_op_leaves_features_to_the_kernels(rule, feature_map, monkeypatch):
    """This includes masked keys, whose φ is 0."""
    inputs = sample(rule, B=2, T=7, H=1, K=3, V=2, feature_map=feature_map, denominator=True, state=True, device=DEVICE)
    mask = torch.tensor([[True] * 7, [False, True, True, False, False, True, False]], device=DEVICE)
    options = {"feature_map": feature_map, "feature_norm": "sum", "scale": 0.5, "mask": mask}
    if rule == "delta":
        inputs["state"] = State(inputs["state"].S)
    else:
        options["denominator"] = True
    truth = evaluate(rule, inputs, backend="reference", **options)
    monkeypatch.setattr(feature_maps, "transform", None)
    found = evaluate(rule, inputs, backend="triton", form="chunk", **options)
    assert all(deviation(found[name], x) <= 1e-10 for name, x in truth.items())


# ---- precision ----


@pytest.mark.parametrize("cell", [ADDITIVE, (1, "k"), KDA], ids=["additive", "scalar", "kda"])
def test_float32(cell):
    core = problem(cell, T=2 * C + 1, K=16, V=16, dtype=torch.float32)
    found, truth = results(kernels, core), results(recurrence, moved(core, torch.Tensor.double))
    errors = {name: row_error(found[name], truth[name]) for name in found}
    assert max(errors.values()) <= 3e-4, errors


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=[] if GPU else pytest.mark.skip)])
@pytest.mark.parametrize("rule", ["additive", "kda"])
def test_low_precision(rule, dtype):
    inputs = sample(rule, B=1, T=19, H=1, K=16, V=16, dtype=dtype, state=True, device=DEVICE)
    found = evaluate(rule, inputs, backend="triton", form="chunk")
    truth = evaluate(rule, {name: _double(x) for name, x in inputs.items()}, backend="reference")
    allowed = budgets(rule, inputs)
    errors = {name: (result_error(name, found[name], truth[name]), allowed[name]) for name in truth}
    assert all(error <= bound for error, bound in errors.values()), errors


def _double(x):
    return State(*(None if y is None else y.double() for y in x)) if isinstance(x, State) else x.double()


def test_bfloat16_in_the_interpreter():
    """The interpreter multiplies in float32, so only loads and stores round."""
    core = problem(KDA, T=5, dtype=torch.bfloat16)
    found, truth = results(kernels, core), results(recurrence, moved(core, torch.Tensor.double))
    assert found["o"].dtype == torch.bfloat16
    errors = {name: row_error(found[name], truth[name]) for name in found}
    assert max(errors.values()) <= 2**-6, errors


# ---- what is refused ----


def test_refusals():
    core = problem(OWN_KEY, writes=2, erase_before_decay=True)
    assert backend.refuses(core, "chunk") is None
    wide = core.q.new_zeros(1, 9, 1, 1025)
    for other, reason in (
        (replace(core, q=wide, k=wide), "K: expected 1 to 1024 features, got 1025"),
        (replace(core, v=wide), "V: expected 1 to 1024 features, got 1025"),
        (moved(core, lambda x: x.to("meta")), "expected CUDA tensors, got meta"),
    ):
        assert backend.refuses(other, "chunk").startswith(reason)


@pytest.mark.parametrize(
    ("itemsize", "channels", "own_key", "kib", "most"),
    [
        (2, False, False, 99, 1024),
        (2, True, False, 99, 512),
        (4, False, False, 99, 512),
        (4, True, False, 163, 1024),
        (8, False, False, 227, 512),
        (2, False, True, 227, 1024),
        (2, True, True, 227, 512),
    ],
)
def test_wide_states_need_shared_memory(itemsize, channels, own_key, kib, most, monkeypatch):
    monkeypatch.setattr(backend, "_shared_memory", lambda device: kib * 1024)
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    for K in (most, most + 1):
        k = torch.zeros(1, 2, 1, K, dtype=dtype, device=DEVICE)
        core = Core(k, k, k[..., :2], g=k.float() if channels else None, a=k if own_key else None)
        assert K > 1024 or backend.refuses(core, "recurrent") is None
        reason = backend.refuses(core, "chunk")
        if most == K:
            assert reason is None
        elif most < 1024:
            assert reason == f"K: expected at most {most} features of these inputs for the memory of this GPU, got {K}"
