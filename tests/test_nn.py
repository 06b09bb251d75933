"""The layers: the same results and state however the tokens are split, padded, packed or compiled."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import RULES, cat_states, close, leaves, sequence
from layers import LAYERS, E, H, awake, gradients, tokens
from outside.delta_rnn import DELTA_RNN
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fwp
from fwp.nn import (
    PRESETS,
    Block,
    FastWeightAttention,
    FastWeightRNN,
    FavorPlusFeatures,
    FeedForward,
    GateProjection,
    ShortConvolution,
    SlowFastNet,
    SoftplusDecay,
    token_shift,
)
from fwp.nn.block import ACTIVATIONS

each_layer = pytest.mark.parametrize("layer", LAYERS, indirect=True)


@pytest.fixture
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


# ---- laws ----


@each_layer
def test_cutting_the_sequence_and_carrying_the_state_changes_nothing(layer):
    x = tokens(2, 11, E).requires_grad_()
    y, end = layer(x)
    assert y.shape == (2, 11, E)
    assert torch.equal(end.position, torch.tensor([11, 11]))
    for cuts in ([1], [2, 3], [0, 5, 5, 10], [11]):
        parts, state = [], None
        for part in x.tensor_split(cuts, 1):
            out, state = layer(part, state)
            parts.append(out)
        close((torch.cat(parts, 1), state), (y, end))
        close(gradients(layer, x, torch.cat(parts, 1), state), gradients(layer, x, y, end))


@each_layer
@torch.no_grad()
def test_steps_equal_the_whole(layer):
    x = tokens(2, 7, E)
    truth = layer(x)
    out, state = [], None
    for t in range(7):
        y, state = layer.step(x[:, t], state) if t % 2 else layer.step(x[:, t : t + 1], state)
        assert y.shape == ((2, E) if t % 2 else (2, 1, E))
        out.append(y.view(2, E))
    close((torch.stack(out, 1), state), truth)


@each_layer
@torch.no_grad()
def test_steps_in_place(layer):
    x = tokens(2, 4, E)
    _, state = layer.step(x[:, 0])
    held = tree_map(lambda y: y.clone() if isinstance(y, torch.Tensor) else y, state)
    for t in range(1, 4):
        y, state = layer.step(x[:, t], state)
        before = tree_leaves(held)
        found, kept = layer.step(x[:, t], held, in_place=True)
        assert kept is held and all(a is b for a, b in zip(before, tree_leaves(kept)))
        close((found, held), (y, state))


def test_no_step_in_place_where_gradients_or_a_state_are_missed():
    layer, x = FastWeightAttention(E, H).double(), tokens(1, 1, E)
    with pytest.raises(ValueError, match=r"^in_place: expected torch\.no_grad\(\), gradients need the state"):
        layer.step(x, layer.step(x)[1], in_place=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^in_place: expected a state to overwrite, got None$"):
        layer.step(x, in_place=True)


@each_layer
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_padding_anywhere_equals_none(layer, carried):
    kept = ["", "0 1 2 3 4 5 6 7 8", "0 1 2 3", "4 5 6 7 8", "0 3 4 7", "5"]  # none, all, left, right, scattered
    mask = torch.zeros(6, 9, dtype=torch.bool)
    for row, places in zip(mask, kept):
        row[[int(t) for t in places.split()]] = True
    real = [tokens(int(n), E, seed=row) for row, n in enumerate(mask.sum(1))]
    x = torch.full((6, 9, E), torch.nan, dtype=torch.float64)
    x = x.masked_scatter(mask.unsqueeze(-1), torch.cat(real)).requires_grad_()
    before = layer(tokens(6, 3, E, seed=7))[1] if carried else None
    y, state = layer(x, before, mask=mask)
    assert not y[~mask].any()

    alone = [layer(x[n : n + 1, mask[n]], before and sequence(before, n)) for n in range(6)]
    whole = torch.cat([out[0] for out, _ in alone])
    close((y[mask], state), (whole, cat_states([end for _, end in alone])))
    found, truth = gradients(layer, x, y[mask], state), gradients(layer, x, whole, cat_states([e for _, e in alone]))
    close(found, truth)
    assert not found[0][~mask].any()


@each_layer
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_packed_equals_one_by_one(layer, masked):
    lengths = [0, 1, 5, 0, 2, 7, 0]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    x = tokens(1, 15, E).requires_grad_()
    mask = torch.rand(1, 15, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    for before in (None, layer(tokens(7, 4, E, seed=3))[1]):
        packed = layer(x, before, mask=mask, cu_seqlens=cu_seqlens)
        alone = [
            layer(part, before and sequence(before, n), mask=None if mask is None else mask[:, start : start + len_])
            for n, (part, start, len_) in enumerate(zip(x.split(lengths, 1), cu_seqlens, lengths))
        ]
        truth = torch.cat([y for y, _ in alone], 1), cat_states([state for _, state in alone])
        close(packed, truth)
        close(gradients(layer, x, *packed), gradients(layer, x, *truth))


OUTSIDE = pytest.mark.parametrize(
    "ends", [[3, 5, 5, 11], [0, 2, 2, 5], [2, 9, 20]], ids=["late start", "early end", "beyond"]
)


def inside(op):
    """The op on the tokens of the packed sequences alone, with an output of 0 for others."""

    def run(rule, q, k, v, *, cu_seqlens, mask, state, **options):
        T, n = q.shape[1], k.shape[1] // q.shape[1]
        bounds = cu_seqlens.clamp(max=T)
        first, last = bounds[[0, -1]].tolist()
        given = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
        cut = {name: x[:, n * first : n * last] for name, x in {**given, "k": k, "v": v}.items()}
        cut |= {"q": q[:, first:last], "mask": None if mask is None else mask[:, first:last]}
        out, end = op(rule, **{**options, **cut}, state=state, cu_seqlens=bounds - first)
        return F.pad(out, (0, 0, 0, 0, first, T - last)), end

    return run


@OUTSIDE
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", PRESETS)
def test_tokens_outside_the_packed_sequences_count_as_masked(name, masked, ends, monkeypatch):
    """As on a GPU, where nobody checks the borders."""
    torch.manual_seed(0)
    layer, T = awake(PRESETS[name](E, H, **{} if name == "rwkv7" else {"bias": True, "out_norm": "layer"})).double(), 13
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    cu_seqlens, before = torch.tensor(ends), layer(tokens(len(ends) - 1, 3, E, seed=3))[1]
    first, last = ends[0], min(ends[-1], T)
    x = torch.full((1, T, E), torch.nan, dtype=torch.float64)
    x[:, first:last] = tokens(1, last - first, E)
    mask = (torch.arange(T) % 3 > 0).unsqueeze(0) if masked else None
    truth = layer(
        x[:, first:last], before, None if mask is None else mask[:, first:last], cu_seqlens.clamp(max=T) - first
    )
    module = sys.modules[next(c.__module__ for c in type(layer).__mro__ if "forward" in vars(c))]
    monkeypatch.setattr(module, "fast_weights", inside(fwp.fast_weights))
    monkeypatch.setattr(fwp.validate, "check_bounds", lambda *_: None)
    x.requires_grad_()
    y, state = layer(x, before, mask, cu_seqlens)
    close((y[:, first:last], state), truth)
    found = gradients(layer, x, y, state)
    assert all(g is None or g.isfinite().all() for g in found)
    for outside in (slice(first), slice(last, None)):
        assert not y[:, outside].any() and not found[0][:, outside].any()


@each_layer
@torch.no_grad()
def test_no_token_sees_a_later_one(layer):
    x = tokens(2, 9, E)
    changed = torch.cat([x[:, :5], tokens(2, 4, E, seed=2)], 1)
    a, b = layer(x)[0], layer(changed)[0]
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.isclose(a[:, 5:], b[:, 5:]).all(-1).any()


@each_layer
def test_empty_inputs(layer):
    _, state = layer(tokens(2, 3, E))
    y, end = layer(tokens(2, 0, E), state)
    assert y.shape == (2, 0, E)
    close(end, state)
    assert not {x.data_ptr() for x in leaves(state)} & {x.data_ptr() for x in leaves(end)}
    none = torch.ones(0, 4, dtype=torch.bool)
    for mask in (None, none):
        y, end = layer(tokens(0, 4, E), mask=mask)
        assert y.shape == (0, 4, E)
        assert all(len(x) == 0 for x in leaves(end))


def test_the_convolution_sees_the_last_real_tokens():
    conv = ShortConvolution(1, 3).double()
    conv.weight.data[:] = torch.tensor([100.0, 10.0, 1.0])
    x = torch.tensor([1.0, 2, 3, 4, 5]).double().view(1, 5, 1)
    assert conv(x)[0].flatten().tolist() == [1, 12, 123, 234, 345]
    mask = torch.tensor([[True, False, True, False, True]])
    y, tail = conv(x, mask=mask)
    assert y[mask].flatten().tolist() == [1, 13, 135]
    assert tail.flatten().tolist() == [3, 5]
    y, tail = conv(x, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert y.flatten().tolist() == [1, 12, 3, 34, 345]
    assert tail.flatten(1).tolist() == [[1, 2], [0, 0], [4, 5]]
    assert conv(x[:, :1], tail[2:])[0].item() == 451


@OUTSIDE
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_no_convolution_reaches_outside_the_packed_sequences(masked, ends):
    """On a GPU nobody checks the borders. Tokens outside are 0, change nothing and get no gradient."""
    torch.manual_seed(0)
    conv, T = ShortConvolution(2, 4).double(), 13
    cu_seqlens, tail = torch.tensor(ends), tokens(len(ends) - 1, 3, 2)
    first, last = ends[0], min(ends[-1], T)
    x = torch.full((1, T, 2), torch.nan, dtype=torch.float64)
    x[:, first:last] = tokens(1, last - first, 2, seed=2)
    mask = (torch.arange(T) % 3 > 0).unsqueeze(0) if masked else None
    inner = None if mask is None else mask[:, first:last]
    for run, past in ((conv, tail), (token_shift, tail[:, :1])):
        given = x.clone().requires_grad_()
        y, end = run(given, past, mask, cu_seqlens)
        bounds = cu_seqlens.clamp(max=T) - first
        truth, expected = run(x[:, first:last], past, inner, bounds)
        close((y[:, first:last], end), (truth, expected))
        (gradient,) = torch.autograd.grad(y.sin().sum() + end.sin().sum(), given)
        for outside in (slice(first), slice(last, None)):
            assert not y[:, outside].any() and not gradient[:, outside].any()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolution_sums_in_float32(dtype):
    torch.manual_seed(0)
    conv, x = ShortConvolution(64, 4).to(dtype), torch.randn(2, 50, 64).to(dtype)
    truth = conv.double()(x.double())[0]
    y = conv.to(dtype)(x)[0]
    assert y.dtype == dtype
    assert ((y.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6).all()  # one rounding


def test_the_token_shift_sees_the_last_real_token():
    x = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 5, 1)
    y, tail = token_shift(x)
    assert y.flatten().tolist() == [0, 1, 2, 3, 4] and tail.flatten().tolist() == [5]
    mask = torch.tensor([[True, False, True, False, True]])
    y, tail = token_shift(x, torch.tensor([[[7.0]]]), mask)
    assert y[mask].flatten().tolist() == [7, 1, 3] and tail.flatten().tolist() == [5]
    y, tail = token_shift(x, cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert y.flatten().tolist() == [0, 1, 0, 3, 4] and tail.flatten().tolist() == [2, 0, 5]


# ---- several writes per read ----


@pytest.mark.parametrize("n", [1, 2, 3])
def test_writes_of_a_token_are_ordered_by_write_head_feature(n):
    """A layer with n writes per read against n layers with one, under a rule whose writes don't interact."""
    torch.manual_seed(0)
    whole = FastWeightAttention(E, H, "decay", "elu+1", writes_per_read=n, activation="silu", value_dim=3).double()
    parts = [FastWeightAttention(E, H, "decay", "elu+1", activation="silu", value_dim=3).double() for _ in range(n)]
    weights = whole.state_dict()
    assert {key: tuple(x.shape) for key, x in weights.items()} == {
        "q_proj.weight": (8, E),
        "k_proj.weight": (8 * n, E),
        "v_proj.weight": (6 * n, E),
        "gates.g.proj.weight": (H, E),
        "gates.g.proj.bias": (H,),
        "o_proj.weight": (E, 6),
    }
    for j, part in enumerate(parts):
        k, v = (weights[f"{key}_proj.weight"].chunk(n)[j] for key in "kv")
        part.load_state_dict(weights | {"k_proj.weight": k, "v_proj.weight": v})
    x = tokens(2, 5, E)
    close(whole(x)[0], sum(part(x)[0] for part in parts))


def test_a_token_decays_once_however_often_it_writes():
    layer = FastWeightAttention(E, H, "gated_delta", feature_norm="l2", writes_per_read=3)
    x = torch.randn(2, 4, E)
    _, gates = layer._ask(x, None, None)
    g = gates["g"].unflatten(1, (4, 3))
    close(g[:, :, 0], layer.gates["g"](x))
    assert g[:, :, 0].all() and not g[:, :, 1:].any()
    close(gates["beta"].unflatten(1, (4, 3)).flatten(2), layer.gates["beta"](x))


# ---- gates ----


def test_gates_come_from_the_rule():
    layer = FastWeightAttention(E, H, DELTA_RNN, value_dim=3)
    assert list(layer.gates) == list(DELTA_RNN.gates)
    x = torch.randn(2, 4, E)
    assert {name: tuple(gate(x).shape[2:]) for name, gate in layer.gates.items()} == {
        "beta": (H,),
        "k_r": (H, 3),
        "v_r": (H, 3),
        "beta_r": (H,),
    }
    raw = F.linear(x, layer.gates["k_r"].proj.weight, layer.gates["k_r"].proj.bias).view(2, 4, H, 3)
    torch.testing.assert_close(layer.gates["k_r"](x), F.normalize(raw, dim=-1))


@pytest.mark.parametrize(
    "name", ["keys", "values", "items", "pop", "update", "type", "forward", "training", "_modules", "T_destination"]
)
def test_a_gate_may_have_any_name(name):
    """Also that of an attribute of the module that holds the gates."""
    decay = fwp.RULES["decay"]
    rule = fwp.Rule(
        "renamed",
        step=lambda S, k, v, **gates: decay.step(S, k, v, gates[name]),
        gates={name: decay.gates["g"]},
        lower=lambda core, **gates: decay.lower(core, gates[name]),
    )
    torch.manual_seed(0)
    layer, plain = FastWeightAttention(E, H, rule), FastWeightAttention(E, H, decay)
    plain.load_state_dict(dict(zip(plain.state_dict(), layer.state_dict().values(), strict=True)))
    x = torch.randn(2, 5, E)
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert all(layer.get_submodule(path) is module for path, module in layer.named_modules())
    own = FastWeightAttention(E, H, rule, gates={name: SoftplusDecay})
    assert isinstance(next(own.gates.children()), SoftplusDecay)
    own.load_state_dict(own.state_dict())
    copy.deepcopy(own).bfloat16()(x.bfloat16())


def test_a_gate_can_be_made_otherwise():
    seen = []

    class Constant(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            seen.append(sizes)
            self.shape = [size for size in sizes[1:] if size]

        def forward(self, x):
            return x.new_full((*x.shape[:2], *self.shape), -torch.inf)

    x = torch.randn(1, 5, E)
    forgetful = FastWeightAttention(E, H, "gla", "dpfp-1", gates={"g": Constant})
    assert seen == [(E, H, 8)]  # K' = 2 · 4
    plain = FastWeightAttention(E, H, "additive", "dpfp-1")
    plain.load_state_dict(forgetful.state_dict())
    alone = torch.cat([plain(x[:, t : t + 1])[0] for t in range(5)], 1)  # g = −inf forgets the past
    torch.testing.assert_close(forgetful(x)[0], alone)


@pytest.mark.parametrize(("read", "seen"), [("after", 0), ("before", -1)])
def test_the_layer_is_its_equation(read, seen):
    torch.manual_seed(0)
    options = {"scale": 0.5, "activation": "silu", "out_norm": "rms", "out_gate": True}
    layer = FastWeightAttention(E, H, "additive", read=read, **options)
    nn.init.normal_(layer.out_norm.weight)
    x = torch.randn(1, 4, E)
    q, k, v = (F.silu(m(x)).view(4, H, 4) for m in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = torch.einsum("thk,shk,ts,shv->thv", 0.5 * q, k, torch.ones(4, 4).tril(seen), v)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.out_norm.weight
    y = layer.o_proj(o.reshape(1, 4, E) * F.silu(layer.out_gate(x)))
    torch.testing.assert_close(layer(x)[0], y)


def test_favor_plus_draws_when_a_sequence_begins():
    x = torch.randn(1, 3, E)

    def draws(layer, state=None):
        R = layer.feature_map.R
        _, after = layer(x, state)
        return not torch.equal(R, layer.feature_map.R), after

    layer = FastWeightAttention(E, H, feature_map="favor+", denominator=True)
    drawn, state = draws(layer)
    assert drawn
    assert not draws(layer, state)[0]  # the state was written with this R
    assert not draws(layer.eval())[0]
    for redraw, expected in (("always", True), ("never", False)):
        layer = FastWeightAttention(E, H, feature_map=FavorPlusFeatures(4, 6, redraw=redraw))
        assert draws(layer)[0] is expected
        assert draws(layer.eval())[0] is expected
        assert layer.feature_map.R.shape == (6, 4)
    # two forward passes before one backward: the first needs its own R
    layer = FastWeightAttention(E, H, feature_map="favor+")
    torch.manual_seed(3)
    first = torch.autograd.grad(layer(x)[0].sum(), layer.k_proj.weight)
    torch.manual_seed(3)
    y = layer(x)[0].sum()
    layer(x)
    close(torch.autograd.grad(y, layer.k_proj.weight), first, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_feature_map_is_trained_with_the_layer(dtype):
    layer = FastWeightAttention(E, H, "gla", nn.Sequential(nn.Linear(4, 3), nn.Softplus()).to(dtype)).to(dtype)
    layer(torch.randn(1, 5, E, dtype=dtype))[0].sum().backward()
    assert layer.feature_map[0].weight.grad.any()


def test_random_features_under_autocast_compute_in_float32():
    phi, x = FavorPlusFeatures(4), torch.randn(3, 4)
    truth = phi(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(phi(x), truth)


def test_an_activation_under_autocast_computes_in_float32():
    gate = GateProjection(E, H, 4, activation=lambda y: y @ torch.eye(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert gate(torch.randn(1, 3, E)).dtype == torch.float32


def test_a_decay_starts_gentle():
    torch.manual_seed(0)
    gate = SoftplusDecay(E, 64, 4)
    keep = gate(torch.zeros(1, 1, E)).exp()
    assert 0.19 < keep.min() < keep.max() < 0.9991


@pytest.mark.parametrize("name", PRESETS)
def test_state_dict_pickle_and_copy_round_trip_bitwise(name, tmp_path):
    x = torch.randn(2, 6, E)
    layer = awake(PRESETS[name](E, H))
    y = layer(x)[0]
    assert y.any()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = PRESETS[name](E, H)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x)[0], y)


# A rule whose functions pickle can't name, as those of many a rule of one's own.
NAMELESS = fwp.Rule(
    "nameless",
    step=lambda S, k, v, g: g.exp()[..., None, None] * S + k.unsqueeze(-1) * v.unsqueeze(-2),
    gates={"g": replace(fwp.RULES["decay"].gates["g"], activation=lambda y: -(y**2), sample=lambda *_: None)},
)
MODELS = LAYERS | {
    "nameless": lambda: FastWeightAttention(E, H, NAMELESS),
    **{f"object-{name}": lambda rule=rule: FastWeightAttention(E, H, rule) for name, rule in fwp.RULES.items()},
    **{f"map-{name}": lambda name=name: FastWeightAttention(E, H, feature_map=name) for name in fwp.FEATURE_MAPS},
    **{
        f"map-{type(phi).__name__}": lambda phi=phi: FastWeightAttention(E, H, feature_map=phi)
        for phi in (fwp.FavorPlus.draw(4), fwp.DPFP(2), fwp.Taylor())
    },
    **{
        f"activation-{name}": lambda name=name: FastWeightAttention(E, H, activation=name, out_gate=name)
        for name in ACTIVATIONS
    },
    "SlowFastNet": lambda: SlowFastNet(nn.Linear(E, E + 2), nn.Linear(E, 2, bias=False)),
    "FastWeightRNN": lambda: FastWeightRNN(E, 3),
    **{
        f"Block-{place}-{activation}": lambda place=place, activation=activation: Block(
            E, FastWeightAttention(E, H), FeedForward(E, 9, activation), placement=place
        )
        for place, activation in (("pre", "swiglu"), ("post", "gelu"))
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_pickling_copying_and_saving_a_whole_module(name, tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(2, 6, E), MODELS[name]().eval()
    y = model(x)[0]
    torch.save(model, tmp_path / "model.pt")
    for same in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert torch.equal(same(x)[0], y)
        assert getattr(same, "rule", None) == getattr(model, "rule", None)


@pytest.mark.parametrize("rule", [*RULES, NAMELESS], ids=lambda rule: rule.name)
def test_a_rule_is_pickled_by_its_name(rule):
    assert pickle.loads(pickle.dumps(rule)) is rule is copy.deepcopy(rule)
    own = replace(rule, name="own")  # no module has it
    for same in (copy.deepcopy(own), *([pickle.loads(pickle.dumps(own))] if rule.name in fwp.RULES else [])):
        assert same is not own and (same.name, same.step, *same.gates) == ("own", own.step, *own.gates)


def test_importing_the_layers_loads_torch_and_einops_alone():
    code = "import sys, torch, einops; old = {*sys.modules}; import fwp.nn, fwp.models; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert {name.split(".")[0] for name in run.stdout.split()} <= {"fwp", "__future__"}, run.stdout
