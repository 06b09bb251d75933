"""The nets of 1991 and 1993 against NumPy, online learning against unfolding in time, and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fwp.nn import FastWeightRNN, Online, SlowFastNet
from fwp_benchmarks import equivalence, oracle

KINDS = [
    (version, update, read) for version in (1, 2) for update in ("bounded", "additive") for read in ("before", "after")
]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def one_layer(version, A=3, B=2, **options):
    """A net with F: A → B without bias, and S with inputs A, a hidden layer and the version's outputs."""
    slow = nn.Sequential(nn.Linear(A, 5), nn.Tanh(), nn.Linear(5, A * B if version == 1 else A + B))
    return SlowFastNet(slow, nn.Linear(A, B, bias=False), version, **options)


def two_layers(version, read="before", **options):
    """A net with F: 3 → 4 → 2 with biases: 26 weights, FROM 3 + 1 and 4 + 1, TO 4 and 2."""
    fast = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    slow = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 26 if version == 1 else 15))
    return SlowFastNet(slow, fast, version, read=read, steepness=4.0, **options)


def slow_weights(net):
    return {name: weight.detach() for name, weight in net.slow.named_parameters()}


@pytest.mark.parametrize(("version", "update"), [(1, "bounded"), (2, "bounded"), (1, "additive"), (2, "additive")])
def test_the_oracle(version, update):
    net, x, w_0 = one_layer(version, update=update), torch.randn(2, 9, 3), torch.rand(2, 2, 3)
    y, state = net(x, {"weight": w_0})

    def slow(x):
        s = net.slow(torch.from_numpy(x)).detach().numpy()
        return s.reshape(2, 3).T.ravel() if version == 1 else s  # ours are [to, from], the oracle's [from, to]

    for n in range(2):
        expected, w = oracle.slow_fast_1991(
            slow,
            x[n].numpy(),
            x[n].numpy(),
            w_0[n].T.numpy(),
            version=version,
            steepness=None if update == "additive" else 10.0,
        )
        np.testing.assert_allclose(y[n].detach(), expected, atol=1e-12)
        np.testing.assert_allclose(state["weight"][n].T.detach(), w, atol=1e-12)


def test_read_after_is_read_before_one_step_later():
    """A step with input 0 writes nothing, since S(0) = 0 without biases. It shows what the step before wrote."""
    before, after = (
        SlowFastNet(nn.Linear(3, 5, bias=False), nn.Linear(3, 2, bias=False), update="additive", read=read)
        for read in ("before", "after")
    )
    after.load_state_dict(before.state_dict())
    x, seen = torch.randn(1, 6, 3), torch.randn(1, 6, 3)
    now, end = after(x, fast_input=seen)
    later, same = before(torch.cat([x, torch.zeros(1, 1, 3)], 1), fast_input=torch.cat([torch.zeros(1, 1, 3), seen], 1))
    torch.testing.assert_close(later[:, 1:], now)
    torch.testing.assert_close(same["weight"], end["weight"])


@pytest.mark.parametrize("version", [1, 2])
def test_two_layers_with_biases_by_hand(version):
    net, x = two_layers(version, update="additive"), torch.randn(1, 7, 3)
    y, state = net(x)
    w = {
        "0.weight": torch.zeros(4, 3),
        "0.bias": torch.zeros(4),
        "2.weight": torch.zeros(2, 4),
        "2.bias": torch.zeros(2),
    }
    for t in range(7):
        hidden = torch.tanh(w["0.weight"] @ x[0, t] + w["0.bias"])
        torch.testing.assert_close(y[0, t], w["2.weight"] @ hidden + w["2.bias"])
        s = net.slow(x[0, t])
        if version == 1:
            parts = s.split([12, 4, 8, 2])
            changes = [part.view_as(w[name]) for name, part in zip(w, parts)]
        else:
            from_1, on_1, to_1, from_2, on_2, to_2 = s.split([3, 1, 4, 4, 1, 2])
            changes = [torch.outer(to_1, from_1), to_1 * on_1, torch.outer(to_2, from_2), to_2 * on_2]
        w = {name: w[name] + change for name, change in zip(w, changes)}
    for name in w:
        torch.testing.assert_close(state[name][0], w[name])


def test_a_state_continues_the_sequence():
    net, x = two_layers(2), torch.randn(2, 8, 3)
    whole, end = net(x)
    first, state = net(x[:, :5])
    rest, last = net(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(last, end)


def test_time_step_0_is_what_s_writes_unsquashed():
    net, x = one_layer(2), torch.randn(4, 3)
    source, target = net.slow(x).split([3, 2], 1)
    torch.testing.assert_close(net.begin(x)["weight"], torch.einsum("nb,na->nba", target, source))


def test_any_module_is_programmed_by_version_1():
    """F is a convolution with inputs [2, 5] per step. S gets the whole input."""
    fast = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten())
    net = SlowFastNet(nn.Sequential(nn.Flatten(), nn.Linear(10, 15)), fast, 1)
    x = torch.randn(2, 4, 2, 5)
    y, state = net(x)
    assert y.shape == (2, 4, 12)
    before = net(x[:, :3])[1]
    for n in range(2):
        expected = functional_call(fast, {name: w[n] for name, w in before.items()}, (x[n, 3:],))
        torch.testing.assert_close(y[n, 3:], expected)
    assert {name: w.shape[1:] for name, w in state.items()} == {name: w.shape for name, w in fast.named_parameters()}


def test_only_the_slow_net_is_trained():
    net, x = two_layers(2), torch.randn(2, 5, 3)
    y, _ = net(x)
    y.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in net.slow.parameters())
    assert not any(weight.requires_grad for weight in net.fast.parameters())
    with torch.no_grad():
        for weight in net.fast.parameters():
            weight.fill_(torch.nan)
    torch.testing.assert_close(net(x)[0], y)


def test_unfolding_in_time_against_finite_differences():
    net, x = one_layer(2, steepness=3.0), torch.randn(1, 4, 3)
    names = list(slow_weights(net))

    def outputs(*weights):
        return functional_call(net, {f"slow.{name}": weight for name, weight in zip(names, weights)}, (x,))[0]

    assert torch.autograd.gradcheck(outputs, [w.clone().requires_grad_() for w in slow_weights(net).values()])


@pytest.mark.parametrize(("version", "update", "read"), KINDS)
def test_online_equals_unfolding(version, update, read):
    net = two_layers(version, read, update=update)
    T, weights = 30, slow_weights(net)
    x, target, seen = torch.randn(T, 3), torch.randn(T, 2), torch.randn(T, 3)
    carried = net.begin_online(weights, torch.randn(3))
    state = {name: w.unsqueeze(0) for name, w in carried.weights.items()}
    y, end = net(x.unsqueeze(0), state, seen.unsqueeze(0))
    (0.5 * (target - y[0]).square().sum()).backward()
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for t in range(T):
        gradient, answer, carried = net.step_online(weights, carried, x[t], target[t], seen[t])
        torch.testing.assert_close(answer, y[0, t], rtol=1e-10, atol=1e-10)
        total = {name: total[name] + gradient[name] for name in total}
    for name, weight in net.slow.named_parameters():
        torch.testing.assert_close(total[name], weight.grad, rtol=1e-10, atol=1e-10)
    for name in end:
        torch.testing.assert_close(carried.weights[name], end[name][0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", [1, 2])
def test_online_learning_is_the_oracles(version):
    """As in the paper's experiments, W_S changes at every step, and with it the sensitivity p."""
    A, B, T, rate = 3, 2, 40, 0.3
    outputs = A * B if version == 1 else A + B
    net = SlowFastNet(nn.Linear(4, outputs, bias=False), nn.Linear(A, B, bias=False), version, steepness=3.0)
    x, seen, target = torch.randn(T, 4), torch.randn(T, A), torch.randn(T, B)
    W, w_0 = 0.5 * torch.randn(outputs, 4), torch.rand(B, A)
    rows = torch.arange(outputs).view(B, A).T.flatten() if version == 1 else torch.arange(outputs)
    expected, W_end = oracle.slow_fast_1991_online(
        W[rows].numpy(),
        x.numpy(),
        seen.numpy(),
        target.numpy(),
        w_0.T.numpy(),
        version=version,
        steepness=3.0,
        rate=rate,
    )
    slow, start = {"weight": W}, net.begin_online({"weight": W}, x[0])
    carried = Online({"weight": w_0}, start.sensitivity)
    for t in range(T):
        gradient, y, carried = net.step_online(slow, carried, x[t], target[t], seen[t])
        slow = {"weight": slow["weight"] - rate * gradient["weight"]}
        np.testing.assert_allclose(y, expected[t], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(slow["weight"][rows], W_end, rtol=1e-10, atol=1e-10)
    assert (slow["weight"] - W).abs().max() > 0.1


def test_online_starts_from_s_without_a_past():
    net, x = one_layer(2), torch.randn(3)
    weights, sensitivity = net.begin_online(slow_weights(net), x)
    torch.testing.assert_close(weights["weight"], net.begin(x.unsqueeze(0))["weight"][0].detach())
    assert {name: p.shape for name, p in sensitivity["weight"].items()} == {
        name: (2, 3, *w.shape) for name, w in slow_weights(net).items()
    }
    assert not any(p.any() for p in sensitivity["weight"].values())


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", [1, 2, "recurrent"])
@torch.no_grad()
def test_fast_weights_add_up_in_float32(kind, how):
    """The sum of 300 changes is as exact as each of them. In bfloat16 it would be off by percents."""
    torch.set_default_dtype(torch.float32)
    if kind == "recurrent":
        net = FastWeightRNN(3, 2, update="additive")
    else:
        net = SlowFastNet(
            nn.Linear(3, 3 if kind == 1 else 4), nn.Linear(3, 1, bias=False), kind, update="additive", read="after"
        )
    net, x = net.bfloat16(), torch.rand(1, 300, 3).bfloat16()
    truth = net.double()(x.double())[1]
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, state = net.float()(x.float())
    else:
        y, state = net.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    found, wanted = (end.weight if kind == "recurrent" else end["weight"] for end in (state, truth))
    assert found.dtype == torch.float32 and wanted.dtype == torch.float64
    assert (found - wanted).norm() < 2**-7 * wanted.norm()  # each factor of a change is rounded by up to 2^−8


@torch.no_grad()
def test_online_learning_adds_up_in_float32():
    torch.set_default_dtype(torch.float32)
    net = SlowFastNet(nn.Linear(3, 4), nn.Linear(3, 1, bias=False), update="additive").bfloat16()
    x, weights = torch.rand(3).bfloat16(), slow_weights(net)
    carried = net.begin_online(weights, x)
    for _ in range(3):
        gradient, _, carried = net.step_online(weights, carried, x, torch.ones(1))
    assert {p.dtype for p in [*carried.weights.values(), *carried.sensitivity["weight"].values()]} == {torch.float32}
    assert {name: p.dtype for name, p in gradient.items()} == {name: p.dtype for name, p in weights.items()}


def test_a_state_from_inference_mode_is_trained_from():
    x, rnn, net = torch.randn(2, 5, 3), FastWeightRNN(3, 4, update="additive"), one_layer(2)
    with torch.inference_mode():
        _, state = rnn(x)
        _, weights = net(x)
        carried = net.begin_online(slow_weights(net), x[0, 0])
    assert torch.autograd.grad(rnn(x.requires_grad_(), state)[0].sum(), x)[0].any()
    net(x, weights)[0].sum().backward()
    assert all(w.grad.any() for w in net.slow.parameters())
    gradient, _, _ = net.step_online(slow_weights(net), carried, x[0, 1].detach(), torch.ones(2))
    assert all(w.isfinite().all() for w in gradient.values())


def test_many_nets_at_once():
    net = two_layers(2)
    many = {name: torch.randn(4, *w.shape) for name, w in slow_weights(net).items()}
    x, target = torch.randn(3, 4, 3), torch.randn(3, 4, 2)
    carried = vmap(net.begin_online)(many, x[0])
    for t in (1, 2):
        gradient, y, carried = vmap(net.step_online)(many, carried, x[t], target[t])
    for n in range(4):
        one = {name: w[n] for name, w in many.items()}
        alone = net.begin_online(one, x[0, n])
        for t in (1, 2):
            expected, y_n, alone = net.step_online(one, alone, x[t, n], target[t, n])
        torch.testing.assert_close(y[n], y_n)
        torch.testing.assert_close({name: g[n] for name, g in gradient.items()}, expected)


def test_a_loss_of_ones_own():
    net, x, target = one_layer(1), torch.randn(3), torch.randn(2)
    weights = slow_weights(net)
    start = net.begin_online(weights, torch.randn(3))
    _, _, carried = net.step_online(weights, start, x, target)
    squared = net.step_online(weights, carried, x, target)[0]
    doubled = net.step_online(weights, carried, x, target, loss=lambda y, d: (d - y).square().sum())[0]
    torch.testing.assert_close(doubled, {name: 2 * g for name, g in squared.items()})


@pytest.mark.parametrize("update", ["bounded", "additive"])
def test_the_recurrent_net_is_the_oracles(update):
    net = FastWeightRNN(2, 3, g=torch.tanh, h=torch.sin, update=update, steepness=6.0)
    x = torch.rand(2, 9, 2)
    y, state = net(x)
    for n in range(2):
        expected, w = oracle.recurrent_1993(
            x[n].numpy(),
            net.weight.detach().numpy(),
            np.full(3, 0.5),
            f=lambda z: 1 / (1 + np.exp(-z)),
            g=np.tanh,
            h=np.sin,
            steepness=None if update == "additive" else 6.0,
        )
        np.testing.assert_allclose(y[n].detach(), expected, atol=1e-12)
        np.testing.assert_allclose(state.weight[n].detach(), w, atol=1e-12)
        np.testing.assert_allclose(state.y[n].detach(), expected[-1], atol=1e-12)
    first, state = net(x[:, :4])
    torch.testing.assert_close(torch.cat([first, net(x[:, 4:], state)[0]], 1), y)
    assert net(x[:, :0])[0].shape == (2, 0, 3)


def test_the_recurrent_net_learns_its_first_weights():
    net, x = FastWeightRNN(2, 3, steepness=2.0), torch.rand(1, 5, 2)

    def outputs(weight):
        return functional_call(net, {"weight": weight}, (x,))[0]

    assert torch.autograd.gradcheck(outputs, net.weight.detach().clone().requires_grad_())
    assert net.g(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]


def test_what_a_user_gets_wrong_is_one_line():
    net, x = two_layers(2), torch.randn(2, 5, 3)
    state = net(x)[1]
    cases = [
        (lambda: SlowFastNet(nn.Linear(3, 3), nn.Linear(3, 1), 3), "version: expected 1 or 2, got 3"),
        (lambda: one_layer(2, update="bonded"), "update: expected bounded or additive, got 'bonded'; did you mean"),
        (lambda: one_layer(2, read="now"), "read: expected before or after, got 'now'"),
        (lambda: SlowFastNet(nn.Linear(3, 3), nn.ReLU()), "fast: expected a module with parameters, got ReLU"),
        (
            lambda: SlowFastNet(nn.Linear(3, 3), nn.Conv1d(1, 1, 1)),
            "fast: .* got weight (1, 1, 1); version 1 takes any",
        ),
        (lambda: SlowFastNet(nn.Linear(3, 3), nn.LayerNorm(2)), "fast: .* got weight (2,); version 1 takes any"),
        (
            lambda: SlowFastNet(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))(x),
            "slow: expected (N, 4) for version 2 with weight (1, 3), got (10, 3)",
        ),
        (lambda: net(x[0, 0]), "x: expected (B, T, …) with T ≥ 1, got (3,)"),
        (lambda: net(x[:, :0]), "x: expected (B, T, …) with T ≥ 1, got (2, 0, 3)"),
        (lambda: net(x, fast_input=x[:1]), "fast_input: expected (2, 5, …), got (1, 5, 3)"),
        (lambda: net(x, {"0.weight": state["0.weight"]}), "state: expected the weights 0.weight, .* got 0.weight"),
        (lambda: net(x[:1], state), "state['0.weight']: expected (1, 4, 3), got (2, 4, 3)"),
        (lambda: FastWeightRNN(2, 3)(torch.randn(2, 5, 3)), "x: expected (*, *, 2), got (2, 5, 3)"),
        (lambda: FastWeightRNN(2, 3, update="sum"), "update: expected bounded or additive, got 'sum'"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_repr():
    assert "version=2, update='bounded', steepness=10, read='before'" in repr(one_layer(2))
    assert "version=1, update='additive', read='after'" in repr(one_layer(1, update="additive", read="after"))


def test_fwp_check_compares_it_with_linear_attention(monkeypatch):
    torch.set_default_dtype(torch.float32)  # the default when `fwp check` runs
    additive = equivalence.rules.RULES["additive"]
    found = list(equivalence.against_1991(additive))
    assert [row["case"] for row in found] == ["1991: linear attention", "1991: read before", "1991: two layers"]
    assert all(row["ok"] and row["bound"] == 1e-12 and row["dtype"] == "float64" for row in found)
    right = SlowFastNet._changes
    monkeypatch.setattr(SlowFastNet, "_changes", lambda net, s: right(net, s * (1 + 1e-11)))
    assert not any(row["ok"] for row in equivalence.against_1991(additive))
