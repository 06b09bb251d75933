"""Looking into fast weights: states over time, implied attention matrices, spectra, recorded calls, plots."""

import subprocess
import sys
import threading
import types
from itertools import pairwise
from unittest import mock

import pytest
import torch
from laws import RULES as ALL
from laws import case, each_rule, each_way, forms, normalises, over_time, sequence, tokens, ways
from outside.delta_rnn import DELTA_RNN

import fwp
from fwp import functional
from fwp.core import to_heads
from fwp.functional import fast_weights
from fwp.inspect import attention, plot_attention, plot_rank, plot_state, recording, spectrum, states
from fwp.models import Decoder, DecoderConfig
from fwp.nn import FastWeightAttention
from fwp.observe import observing
from fwp.rules.reference import outer
from fwp.testing import deviation, sample

LINEAR = [rule for rule in ALL if rule.linear_in_v]
STEPS = [3, 0, 20, -2, 3]  # unordered, one twice, one from the end; T = 21
T = 21


def momentum_step(state, k, v):
    """M ← M / 2 + k vᵀ, S ← S + M."""
    S, M = state
    M = M / 2 + outer(k, v)
    return S + M, M


def zeros(batch, K, V, like):
    return like.new_zeros(*batch, K, V), like.new_zeros(*batch, K, V)


# A rule that is linear in v and has a state of its own.
MOMENTUM = fwp.Rule(
    "momentum",
    step=momentum_step,
    init=zeros,
    read=lambda state, q: ((state[0] * q.unsqueeze(-1)).sum(-2), state),
)


def tensors(state):
    return [x for x in state if x is not None]


def assert_same(found, truth, bound=1e-12):
    assert type(found) is type(truth)
    assert len(tensors(found)) == len(tensors(truth))
    assert all(deviation(a, b) <= bound for a, b in zip(tensors(found), tensors(truth)))


def random_mask(B=2):
    """A mask of B × T tokens. It hides about a fifth of them, and the first."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[:, 0] = False
    return mask


# ---- states ----


@each_way
def test_a_state_is_the_end_of_a_prefix(rule, form, way):
    grouped = {"Hq": 4, "Hk": 1} if rule.plain else {}
    x = sample(rule, T=T, K=5, V=3, state=True, **grouped, **way.inputs)
    mask = random_mask()
    found = states(rule, **x, steps=STEPS, mask=mask, scale=0.5, **way.options, **form)
    for i, t in enumerate(STEPS):
        n = t % T + 1
        prefix = tokens(x, None, n)
        _, truth = fast_weights(rule, **prefix, mask=mask[:, :n], scale=0.5, **way.options, **form)
        assert_same(
            type(truth)(*[None if x is None else x[i] for x in found]) if rule.plain else tuple(x[i] for x in found),
            truth,
        )


@each_rule
def test_packed_states_are_those_of_each_sequence(rule):
    """Steps count within a sequence. A sequence that has ended or is empty keeps its last state."""
    lengths = [4, 0, 11, 6]
    x = sample(rule, B=1, T=T, K=5, V=3, state=True, sequences=4)
    cu_seqlens = torch.tensor([0, 4, 4, 15, 21])
    steps = [10, 2, 4]
    found = states(rule, **x, steps=steps, cu_seqlens=cu_seqlens, mask=random_mask(1))
    for n, (start, length) in enumerate(zip([0, 4, 4, 15], lengths)):
        part = over_time(lambda x, a=start, b=start + length: x[:, a:b], x) | {"state": sequence(x["state"], n)}
        for i, t in enumerate(steps):
            prefix = over_time(lambda x, t=t: x[:, : t + 1], part)
            _, end = fast_weights(rule, **prefix, mask=random_mask(1)[:, start : start + length][:, : t + 1])
            for a, b in zip(tensors(found), tensors(end)):
                assert deviation(a[i, n], b[0]) <= 1e-12


def test_every_step_without_steps():
    x = sample("kda", T=T)
    assert_same(states("kda", **x), states("kda", **x, steps=range(T)))


def test_the_sequence_is_walked_once_and_in_pieces():
    """There are as many pieces as steps, and no token after the last step is run."""
    x, lengths = sample("gated_delta", T=T), []

    def counted(rule, q, k, v, **options):
        lengths.append(k.shape[1])
        return fast_weights(rule, q, k, v, **options)

    with mock.patch.object(functional, "fast_weights", counted):
        states("gated_delta", **x, steps=[15, 3, 15])
    assert lengths == [4, 12]


def test_hidden_tokens_leave_the_state():
    x, mask = sample("gated_delta", T=T, state=True), random_mask()
    S = states("gated_delta", **x, mask=mask).S
    before = torch.cat([x["state"].S[None], S[:-1]])
    unchanged = (before == S).flatten(2).all(-1).T
    assert torch.equal(unchanged, ~mask)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": [0, T]}, rf"steps: expected one or more in \[-{T}, {T}\), got \[0, {T}\]"),
        ({"steps": []}, r"steps: expected one or more in .*, got \[\]"),
        ({"steps": [0.5]}, r"steps: expected integers, got \[0.5\]"),
        ({"beta": torch.ones(2, T + 1, 2)}, rf"beta: expected \(2, {T}, \*\), got \(2, {T + 1}, 2\)"),
        ({"beta": 1.0}, "beta: expected a tensor, got float"),
        ({"mask": torch.ones(2, 3) > 0}, rf"mask: expected \(2, {T}\), got \(2, 3\)"),
        ({"bta": None}, "unexpected keyword 'bta'; did you mean 'beta'?"),
        ({"cu_seqlens": torch.tensor([0, T])}, "q: expected a batch of 1 with cu_seqlens, got 2"),
    ],
)
def test_wrong_arguments_of_states(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        states("delta", **(sample("delta", T=T) | wrong))


def test_packed_borders_are_checked_before_the_first_step():
    with pytest.raises(
        ValueError, match=rf"cu_seqlens: must start at 0, not decrease, and end at T = {T}; got \[0, 9\]"
    ):
        states("delta", **sample("delta", B=1, T=T), steps=[2], cu_seqlens=torch.tensor([0, 9]))


# ---- attention ----


def applied(A, v):
    """A v: A [B, H, T, T], or [B, H, V, T, T] with one matrix per value feature; v [B, T, Hv, V] → [B, T, H, V]."""
    v = to_heads(v, A.shape[1])
    return torch.einsum("bhts,bshv->bthv" if A.dim() == 4 else "bhvts,bshv->bthv", A, v)


@pytest.mark.parametrize(
    ("rule", "form", "way"),
    [case(rule, form, way) for rule in (*LINEAR, MOMENTUM) for form in forms(rule) for way in ways(rule)],
)
def test_attention_times_values_is_the_output(rule, form, way):
    grouped = {"Hq": 4, "Hk": 1} if rule.plain else {}
    x = sample(rule, T=70, K=5, V=3, **grouped, **way.inputs)
    options = {"mask": torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.8, "scale": 0.5}
    A = attention(rule, **x, **options, **way.options, **form)
    assert A.shape[:2] == (2, 4 if rule.plain else 2)
    assert A.shape[-2:] == (70, 70 * way.writes)
    assert deviation(applied(A, x["v"]), fast_weights(rule, **x, **options, **way.options, **form)[0]) <= 1e-12


@pytest.mark.parametrize("feature_map", ["elu+1", "dpfp-2"])
@pytest.mark.parametrize("rule", [case(rule) for rule in fwp.RULES.values() if normalises(rule)])
def test_attention_includes_features_norms_and_denominator(rule, feature_map):
    x = sample(rule, T=T, K=3, V=4, feature_map=feature_map, denominator=True)
    options = {"feature_map": feature_map, "feature_norm": "sum", "denominator": True, "eps": 0.1}
    A = attention(rule, **x, **options)
    assert deviation(applied(A, x["v"]), fast_weights(rule, **x, **options)[0]) <= 1e-12


@pytest.mark.parametrize("heads", [(4, 2, 2), (2, 4, 4), (4, 4, 1), (1, 2, 4), (8, 1, 4)], ids=str)
def test_attention_under_shared_heads(heads):
    x = sample("gated_delta", T=T, V=3, **dict(zip(("Hq", "Hk", "Hv"), heads)))
    A = attention("gated_delta", **x)
    assert A.shape[1] == max(heads)
    assert deviation(applied(A, x["v"]), fast_weights("gated_delta", **x)[0]) <= 1e-12


@pytest.mark.parametrize(
    ("rule", "form", "way"),
    [case(rule, form, way) for rule in (*LINEAR, MOMENTUM) for form in forms(rule) for way in ways(rule)],
)
def test_the_future_is_exactly_zero(rule, form, way):
    A = attention(rule, **sample(rule, T=70, **way.inputs), **way.options, **form)
    first = way.writes * torch.arange(70)[:, None]  # write of each token
    seen = torch.arange(70 * way.writes) < (first if way.read == "before" else first + way.writes)
    assert torch.equal(A.masked_fill(seen, 0), torch.zeros_like(A))
    assert (A[..., (seen & (torch.arange(70 * way.writes) >= first - way.writes))] != 0).all()


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.name)
def test_hidden_tokens_have_no_row_and_no_column(rule):
    mask = random_mask()
    A = attention(rule, **sample(rule, T=T, V=2), mask=mask)
    A = A if A.dim() == 5 else A.unsqueeze(2)
    seen = mask[:, :, None] & mask[:, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(A != 0, seen[:, None, None].expand_as(A))


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.name)
def test_packed_attention_is_blocks(rule):
    x, bounds = sample(rule, B=1, T=T, V=2), [0, 4, 4, 15, T]
    A = attention(rule, **x, cu_seqlens=torch.tensor(bounds))
    blocks = torch.zeros_like(A)
    for a, b in pairwise(bounds):
        if a < b:
            blocks[..., a:b, a:b] = attention(rule, **over_time(lambda x, a=a, b=b: x[:, a:b], x))
    assert deviation(A, blocks) <= 1e-12
    assert torch.equal(A != 0, blocks != 0)


def test_additive_is_masked_scores():
    x = sample("additive", T=T, Hq=4, Hk=2)
    q, k = x["q"], to_heads(x["k"], 4)
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    assert deviation(attention("additive", **x, scale=0.3), 0.3 * scores.tril()) <= 1e-12
    assert deviation(attention("additive", **x, read="before"), scores.tril(-1)) <= 1e-12
    assert deviation(attention("additive", **x, causal=False), scores) <= 1e-12


def test_normalised_additive_is_a_weighted_mean():
    """Rows are the scores over their sum (plus eps), so they sum to 1 with eps = 0."""
    x = sample("additive", T=T, denominator=True)
    scores = torch.einsum("bthk,bshk->bhts", x["q"], x["k"]).tril()
    A = attention("additive", **x, denominator=True, eps=0.0)
    assert deviation(A, scores / scores.sum(-1, keepdim=True)) <= 1e-12
    assert deviation(A.sum(-1), torch.ones(2, 2, T).double()) <= 1e-12


def test_decay_weighs_scores_by_age():
    x = sample("decay", T=T)
    G = x["g"].cumsum(1).transpose(1, 2)  # [B, H, T]
    age = (G[..., :, None] - G[..., None, :]).exp()
    scores = torch.einsum("bthk,bshk->bhts", x["q"], x["k"])
    assert deviation(attention("decay", **x), (age * scores).tril()) <= 1e-12


def test_delta_under_orthonormal_keys_erases_nothing():
    k = torch.eye(8, dtype=torch.float64).view(1, 8, 1, 8)
    q = torch.randn(1, 8, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = attention("delta", q, k, torch.empty_like(k), beta=torch.ones(1, 8, 1))
    assert deviation(A, attention("additive", q, k, torch.empty_like(k))) <= 1e-12


def test_delta_sees_the_last_value_of_a_key():
    """With β = 1 and repeated orthonormal keys, a key reads only the last token that wrote it."""
    which = torch.tensor([0, 1, 2, 1, 0, 0, 3, 2])
    k = torch.eye(4, dtype=torch.float64)[which].view(1, 8, 1, 4)
    A = attention("delta", k.roll(1, 1), k, torch.empty_like(k), beta=torch.ones(1, 8, 1))[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for t, asked in enumerate(which.roll(1).tolist()):
        written = [s for s in range(t + 1) if which[s] == asked]
        if written:
            expected[t, written[-1]] = 1
    assert deviation(A, expected) <= 1e-12


@pytest.mark.parametrize(("rule", "way"), [case(rule, way) for rule in fwp.RULES.values() for way in ways(rule)])
def test_a_state_at_the_start_counts_by_its_z(rule, way):
    """out(v, S₀, z₀) = A v + out(0, S₀, z₀)."""
    x = sample(rule, T=T, V=3, state=True, **way.inputs)
    out, _ = fast_weights(rule, **x, **way.options)
    silent, _ = fast_weights(rule, **(x | {"v": torch.zeros_like(x["v"])}), **way.options)
    assert deviation(applied(attention(rule, **x, **way.options), x["v"]) + silent, out) <= 1e-12


def test_a_value_gate_makes_one_matrix_per_feature():
    x = sample("gdn2", T=T, V=3)
    A = attention("gdn2", **x)
    assert A.shape == (2, 2, 3, T, T)
    for c in range(3):
        assert (
            deviation(attention("gdn2", **(x | {"w": x["w"][..., c, None], "v": x["v"][..., :1]}))[:, :, 0], A[:, :, c])
            <= 1e-12
        )


def test_attention_of_nothing():
    assert attention("delta", **sample("delta", T=0, Hq=4)).shape == (2, 4, 0, 0)
    assert attention("gdn2", **sample("gdn2", T=0, V=3)).shape == (2, 2, 3, 0, 0)  # a matrix per value feature


def test_attention_in_low_precision():
    x = sample("gated_delta", T=T, dtype=torch.bfloat16)
    assert attention("gated_delta", **x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rule", "wrong", "message"),
    [
        (DELTA_RNN, {}, "rule: expected one that is linear in v, got 'delta_rnn'"),
        (MOMENTUM, {"state": zeros((2, 2), 8, 8, torch.zeros(()))}, "state: expected fwp.State or None, got tuple"),
        ("gdn2", {"w": torch.ones(2, T, 2)}, rf"w: expected \(2, {T}, 2, 8\), got \(2, {T}, 2\)"),
        (fwp.RULES["delta"], {"beta": None}, rf"beta: 'delta' needs it, of shape \(2, {T}, 2\)"),
    ],
)
def test_wrong_arguments_of_attention(rule, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attention(rule, **(sample(rule, T=T) | wrong))


# ---- spectrum ----


@each_rule
def test_each_write_adds_at_most_one_to_the_rank(rule):
    found = states(rule, **sample(rule, T=12, K=10, V=9))
    rank = spectrum(found[0]).rank
    tokens = torch.arange(1, 13).clamp(max=9)[:, None, None]
    assert (rank <= tokens).all()
    assert (rank[0] == 1).all()
    assert (rank[8] == 9).all()  # random keys and values are independent


def test_spectrum_of_a_known_matrix():
    S = torch.zeros(2, 3, 4, dtype=torch.float64)
    S[0, 0, 1], S[0, 2, 0] = -4.0, 3.0
    found = spectrum(S)
    assert torch.allclose(found.values, torch.tensor([[4.0, 3, 0], [0, 0, 0]], dtype=torch.float64))
    assert found.rank.tolist() == [2, 0]
    assert found.stable_rank.tolist() == [25 / 16, 0]
    assert found.norm.tolist() == [5, 0]


def test_spectrum_agrees_with_linalg():
    S = torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = S @ torch.diag(torch.tensor([1.0, 1e-3, 1e-17, 1.0]).double())
    found = spectrum(S)
    assert torch.equal(found.rank, torch.linalg.matrix_rank(S))
    assert found.rank.tolist() == [3] * 5
    assert deviation(found.norm, torch.linalg.matrix_norm(S)) <= 1e-12
    assert deviation(found.stable_rank, (found.norm / torch.linalg.matrix_norm(S, 2)) ** 2) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_of_rank(dtype):
    """σ counts where it exceeds rtol σ_1, by default max(K, V) eps."""
    eps = torch.finfo(dtype).eps
    S = torch.zeros(2, 6, dtype=dtype)
    S[0, 0] = 1
    for small, rank in ((7 * eps, 2), (5 * eps, 1)):
        S[1, 1] = small
        assert spectrum(S).rank == rank
    S[1, 1] = 0.1
    assert spectrum(S, rtol=0.09).rank == 2
    assert spectrum(S, rtol=0.11).rank == 1


def test_spectrum_wants_matrices():
    with pytest.raises(ValueError, match=r"S: expected \(\*, \*\), got \(3,\)"):
        spectrum(torch.ones(3))


# ---- recording ----


def layer(rule="gated_delta", **options):
    torch.manual_seed(0)
    return FastWeightAttention(16, 2, rule, feature_norm="l2", short_conv=3, **options).double()


@pytest.mark.parametrize("rule", LINEAR, ids=lambda rule: rule.name)
def test_a_layer_is_its_attention_matrix(rule):
    net = layer(rule, num_key_heads=1)
    x = torch.randn(2, T, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = random_mask()
    with recording() as calls:
        y, state = net(x, mask=mask)
    (call,) = calls
    o = applied(attention(**call), call["v"])
    assert deviation(net.o_proj(o.flatten(2)), y) <= 1e-12
    assert deviation(states(**call, steps=[-1]).S[0], state.memory.S) <= 1e-12


def test_a_continued_layer_is_recorded_with_its_state():
    net, x = layer(), torch.randn(2, T, 16, dtype=torch.float64)
    _, first = net(x)
    with recording() as calls:
        _, second = net(x, first)
    assert deviation(states(**calls[0], steps=[-1]).S[0], second.memory.S) <= 1e-12
    assert attention(**calls[0]).shape == (2, 2, T, T)


def test_every_block_of_a_decoder_is_recorded_in_order():
    torch.manual_seed(0)
    net = Decoder(DecoderConfig(11, embed_dim=16, num_layers=3, num_heads=2))
    with recording() as calls:
        _, state = net(torch.randint(11, (2, T)))
    assert len(calls) == 3
    for call, end in zip(calls, state):
        assert torch.allclose(states(**call, steps=[-1]).S[0], end.memory.S, atol=1e-5)


def test_recording_changes_and_keeps_nothing():
    net, x = layer(), torch.randn(2, T, 16, dtype=torch.float64)
    with recording() as outside:
        with recording() as calls:
            recorded, _ = net(x)
        fwp.fast_weights("additive", *torch.ones(3, 1, 1, 1, 1))
        fwp.additive(*torch.ones(3, 1, 1, 1, 1))
    assert torch.equal(net(x)[0], recorded)
    assert len(calls) == 1
    assert [call["rule"] for call in outside] == ["gated_delta", "additive", "additive"]
    assert fwp.fast_weights is fast_weights
    assert all(
        not leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(calls) if isinstance(leaf, torch.Tensor)
    )
    recorded.sum().backward()  # recorded tensors are detached, those that run are not
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    "line",
    [
        "from fwp import fast_weights; call = lambda x: fast_weights('additive', x, x, x)",
        "from fwp import fast_weights as f; call = lambda x: f('additive', x, x, x)",
        "import fwp; call = lambda x: fwp.fast_weights('additive', x, x, x)",
        "import fwp; f = fwp.fast_weights; call = lambda x: f('additive', x, x, x)",
        "from fwp.functional import fast_weights as call_; call = lambda x: call_('additive', x, x, x)",
        "from fwp import additive; call = lambda x: additive(x, x, x)",
        "import fwp.verbs as verbs; call = lambda x: verbs.additive(x, x, x)",
        "import functools, fwp; f = functools.partial(fwp.fast_weights, 'additive'); call = lambda x: f(x, x, x)",
        "from fwp.nn import FastWeightAttention; call = lambda x: FastWeightAttention(4, 1)(x[:, :, 0])",
    ],
)
def test_a_call_by_any_name_is_recorded(line):
    """Names that a module of one's own took before the recording began."""
    module = types.ModuleType("own")
    exec(line, module.__dict__)
    with recording() as calls:
        module.call(torch.ones(1, 2, 1, 4))
    assert [call["rule"] for call in calls] == ["additive"]


def test_recording_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), recording() as calls:
        raise ZeroDivisionError
    layer()(torch.zeros(1, 2, 16, dtype=torch.float64))
    assert calls == []


def test_calls_of_inspect_are_not_recorded():
    x = sample("delta", T=4)
    with recording() as calls:
        states("delta", **x)
        attention("delta", **x)
    assert calls == []


def test_refused_calls_are_not_recorded():
    x = sample("delta", T=4)
    with recording() as calls:
        with pytest.raises(TypeError):
            fast_weights("delta", x["q"], x["k"], x["v"])
        fast_weights("delta", **x, read="before")
    assert [call["read"] for call in calls] == ["before"] and torch.equal(calls[0]["beta"], x["beta"])


def test_threads_do_not_see_each_others_calls():
    x = sample("delta", T=4)
    heard = {}

    def listen(name, first, then):
        with recording() as calls:
            first.wait()
            fast_weights("delta", **x, scale=float(len(name)))
            then.wait()
        heard[name] = [call["scale"] for call in calls]

    together, done = threading.Barrier(3), threading.Barrier(3)
    threads = [threading.Thread(target=listen, args=(name, together, done)) for name in ("a", "bc")]
    for thread in threads:
        thread.start()
    with recording() as calls:
        together.wait()
        done.wait()
    for thread in threads:
        thread.join()
    assert heard == {"a": [1.0], "bc": [2.0]} and calls == []


def test_recording_changes_no_compiled_function():
    torch._dynamo.reset()
    x, traced = sample("delta", T=4), []

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: fast_weights("delta", **x)[0], fullgraph=True, backend=backend)
    truth = compiled(x)
    with recording() as calls:
        assert torch.equal(compiled(x), truth)
    assert calls == [] and len(traced) == 1


def test_observers_are_told_the_backend_and_form():
    x, heard = sample("delta", T=4), []
    with observing(heard.append):
        for options in ({"backend": "reference"}, {"form": "recurrent"}, {}):
            fast_weights("delta", **x, **options)
    assert [call[1:] for call in heard] == [("reference", "recurrent"), ("torch", "recurrent"), ("torch", "chunk")]
    assert all(call.arguments["mask"] is None and call.arguments["q"] is x["q"] for call in heard)


# ---- plots ----


@pytest.fixture
def S():
    return states("delta", **sample("delta", T=9, K=5, V=3)).S[:, 0, 0]


def images(figure):
    return [image for axes in figure.axes for image in axes.images]


def test_plot_state(S):
    pytest.importorskip("matplotlib")
    figure = plot_state(S[[0, 4, 8]], steps=[0, 4, 8])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["after token 0", "after token 4", "after token 8"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("value feature", "key feature")
    most = S[[0, 4, 8]].abs().max().item()
    for image, x in zip(images(figure), S[[0, 4, 8]], strict=True):
        assert image.get_clim() == (-most, most)
        assert torch.equal(torch.from_numpy(image.get_array().data), x.float())
    figure.draw_without_rendering()


def test_plot_state_of_zeros_and_of_many(S):
    pytest.importorskip("matplotlib")
    figure = plot_state(torch.cat([torch.zeros_like(S[:1]), S]))
    assert len(images(figure)) == 10
    assert images(plot_state(torch.zeros(1, 2, 2)))[0].get_clim() == (-1, 1)


def test_plot_attention():
    pytest.importorskip("matplotlib")
    A = attention("delta", **sample("delta", T=9, H=3))[0].requires_grad_()
    figure = plot_attention(A)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["head 0", "head 1", "head 2"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("written token s", "reading token t")
    assert images(figure)[0].get_array().mask.tolist() == torch.ones(9, 9).triu(1).bool().tolist()
    assert figure.legends[0].get_texts()[0].get_text() == "masked: t cannot read s"
    named = plot_attention({"delta": A[0], "twice": 2 * A[0]})
    assert [axes.get_title() for axes in named.axes[:2]] == ["delta", "twice"]
    most = 2 * A[0].abs().max().item()
    assert all(image.get_clim() == (-most, most) for image in images(named))
    assert len(images(plot_attention(A[0]))) == 1


def test_one_large_entry_does_not_bleach_the_others():
    """The scale ends at the 99th percentile of what can be read, and the colour bar says how much lies beyond."""
    pytest.importorskip("matplotlib")
    A = torch.ones(20, 20).tril()  # 210 entries
    A[3, 1] = 1000
    figure = plot_attention(A)
    assert images(figure)[0].get_clim() == (-1, 1)
    assert "0.5% of entries lie beyond" in figure.axes[-1].get_ylabel()
    assert "beyond" not in plot_attention(A.clamp(max=1)).axes[-1].get_ylabel()


@pytest.mark.parametrize(
    ("A", "seen", "hidden"),
    [
        (torch.eye(2), None, [[0, 1], [0, 0]]),  # a 0 before the read is a result
        (torch.ones(2, 2), None, [[0, 0], [0, 0]]),  # not causal
        (torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), None, [[0, 0, 1, 1], [0, 0, 0, 0]]),  # two writes per read
        (torch.eye(2), torch.eye(2).bool(), [[0, 1], [1, 0]]),
    ],
)
def test_what_cannot_be_read_is_no_zero(A, seen, hidden):
    np = pytest.importorskip("numpy")
    pytest.importorskip("matplotlib")
    figure = plot_attention(A, seen=seen)
    assert np.ma.getmaskarray(images(figure)[0].get_array()).astype(int).tolist() == hidden
    assert bool(figure.legends) == (sum(map(sum, hidden)) > 0)


def test_plot_rank(S):
    pytest.importorskip("matplotlib")
    figure = plot_rank({"delta": S[::2], "twice": 2 * S[::2]}, steps=range(0, 9, 2))
    rank, stable, norm = figure.axes
    assert [line.get_label() for line in rank.lines] == ["delta", "twice", "min(t + 1, K', V)"]
    assert rank.lines[2].get_ydata().tolist() == [1, 3, 3, 3, 3]
    assert all(axes.get_xlabel() == "token t" for axes in figure.axes)
    for axes, value in zip((rank, stable, norm), spectrum(S[::2])[1:]):
        assert axes.lines[0].get_xdata().tolist() == [0, 2, 4, 6, 8]
        assert axes.lines[0].get_ydata().tolist() == value.tolist()
    assert len(plot_rank(S).axes[0].lines) == 2


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda S: plot_state(S[0]), r"S: expected \(\*, \*, \*\), got \(5, 3\)"),
        (lambda S: plot_state(S, steps=[0, 1]), r"steps: expected 9 numbers from 0 on, one per state, got \[0, 1\]"),
        (lambda S: plot_rank(S[:1], steps=[-1]), r"steps: expected 1 numbers from 0 on, one per state, got \[-1\]"),
        (lambda S: plot_attention(S[0, 0]), r"A: expected \(\*, \*\), got \(3,\)"),
        (lambda S: plot_rank({"delta": S[0]}), r"S\['delta'\]: expected \(\*, \*, \*\), got \(5, 3\)"),
    ],
)
def test_wrong_arguments_of_plots(S, plot, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        plot(S)


def test_a_fresh_import():
    """`fwp.inspect` loads by name, does not shadow the standard library's inspect, and loads no plotting library."""
    code = """
import sys, fwp, inspect
assert fwp.inspect.states.__module__ == 'fwp.inspect'
assert inspect.signature(fwp.inspect.spectrum).parameters.keys() == {'S', 'rtol'}
assert not {'matplotlib', 'triton', 'transformers'} & sys.modules.keys()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
