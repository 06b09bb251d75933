"""States of every kind: reordered, cut, copied, moved, saved and loaded."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from laws import cat_states, close, leaves, sequence
from outside.delta_rnn import DELTA_RNN
from torch import nn

import fwp
from fwp.models import Decoder, DecoderConfig
from fwp.nn import PRESETS, FastWeightAttention, FastWeightRNN, Online, SlowFastNet

E, H, N = 8, 2, 3


def op(q, state=None):
    return fwp.fast_weights("additive", q, q, q, state=state, denominator=True)


def slow_fast():
    return SlowFastNet(nn.Linear(E, E + 4), nn.Linear(E, 3))


MODELS = {
    "op": lambda: op,
    "layer": lambda: FastWeightAttention(E, H),
    "convolution": lambda: PRESETS["gated_delta_net"](E, H),
    "rwkv7": lambda: PRESETS["rwkv7"](E, H),
    "own": lambda: FastWeightAttention(E, H, DELTA_RNN),
    "decoder": lambda: Decoder(DecoderConfig(11, E, 2, H)),
    "slow-fast": slow_fast,
    "recurrent": lambda: FastWeightRNN(E, 4),
}
ONLINE = Online({"w": torch.ones(N, 2)}, {"w": {"W": torch.ones(N, 2, 3)}})


def given(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "decoder":
        return torch.randint(11, (N, 4), generator=generator)
    return torch.rand(N, 4, *((H, 4) if name == "op" else (E,)), generator=generator)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return request.param, MODELS[request.param]()


def states():
    """One state of each kind by its model's name."""
    torch.manual_seed(0)
    return {name: make()(given(name))[1] for name, make in MODELS.items()} | {"online": ONLINE}


def test_select_is_the_state_of_the_selected_sequences(model):
    name, net = model
    _, state = net(given(name))
    assert all(len(x) == 0 for x in leaves(state.select([])))
    for chosen in ([2, 0, 0, 1], [-1], torch.tensor([1, 2])):
        found = state.select(chosen)
        assert type(found) is type(state)
        close(found, cat_states([sequence(state, int(n) % N) for n in chosen]))
    for chosen, error, message in (
        ([3], ValueError, r"indices: expected integers in \[-3, 3\), got \[3\]"),
        (torch.tensor(1), ValueError, r"indices: expected \(\*,\), got \(\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, "indices: expected torch.int64, got torch.bool"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            state.select(chosen)


def test_a_reordered_state_continues_the_reordered_sequences(model):
    name, net = model
    x, later, order = given(name), given(name, 1), [2, 0, 0]
    found, _ = net(later, net(x)[1].select(order))
    truth, _ = net(torch.cat([x[order], later], 1))
    torch.testing.assert_close(found, truth[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "online"])
def test_detach_clone_to_and_nbytes(name):
    state = states()[name]
    tensors = leaves(state)
    detached, copied = state.detach(), state.clone()
    for other in (detached, copied, state.to("cpu")):
        assert type(other) is type(state)
        close(other, state, 0)
    assert not any(x.requires_grad for x in leaves(detached))
    assert [x.data_ptr() for x in leaves(detached)] == [x.data_ptr() for x in tensors]
    assert not {x.data_ptr() for x in leaves(copied)} & {x.data_ptr() for x in tensors}
    assert [x.requires_grad for x in leaves(copied)] == [x.requires_grad for x in tensors]
    assert state.nbytes == sum(x.numel() * x.element_size() for x in tensors)
    floating = [x.is_floating_point() for x in tensors]
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for moved in (state.to(dtype), state.to("meta", dtype), state.to(dtype=dtype)):
            assert [x.dtype for x in leaves(moved)] == [kept if f else torch.int64 for f in floating]
    assert {x.device.type for x in leaves(state.to("meta"))} == {"meta"}
    with pytest.raises(TypeError, match=r"^dtype: expected a floating dtype of 16 to 64 bits, got torch\.int64$"):
        state.to(torch.int64)


def test_a_state_in_the_dtype_of_the_layer_goes_on_with_it():
    layer, x = PRESETS["gated_delta_net"](E, H), torch.randn(N, 4, E)
    _, state = layer(x)
    for dtype in (torch.bfloat16, torch.float64):
        layer, state = layer.to(dtype), state.to(dtype)
        y, state = layer(x.to(dtype), state)
        assert y.dtype == dtype


def test_states_pass_through_transforms_and_compilers():
    kept = {name: state.detach() for name, state in states().items()}

    def each(kept):
        return {name: state.select([1, 0]).detach().clone() for name, state in kept.items()}

    torch.compiler.reset()
    traced = {name: kept[name] for name in ("rwkv7", "decoder", "slow-fast")}
    found = torch.compile(each, fullgraph=True, backend="aot_eager")(traced)
    for name, state in traced.items():
        assert type(found[name]) is type(state)
        close(found[name], state.select([1, 0]))
    double = torch.vmap(lambda state: torch.utils._pytree.tree_map(lambda x: 2 * x, state))
    for name in ("op", "slow-fast", "recurrent", "online"):
        assert type(double(kept[name])) is type(kept[name])
        close(double(kept[name]), [2 * x for x in leaves(kept[name])])


def test_a_state_from_inference_mode_is_read_with_gradients():
    with torch.inference_mode():
        _, state = op(given("op"))
    q = given("op", 1).requires_grad_()
    found = torch.autograd.grad(fwp.read(state, q).sum(), q)[0]
    assert torch.equal(found, torch.autograd.grad(fwp.read(state.clone(), q).sum(), q)[0])


# ---- saving ----

CONFIGS = {
    "preset": DecoderConfig(11, E, 2, H, preset="kda", attention={"short_conv": 3, "gate_rank": 2}),
    "rule": DecoderConfig(11, E, 2, H, preset=None, attention={"rule": fwp.RULES["delta"], "feature_norm": "l2"}),
    **{
        f"map-{i}": DecoderConfig(11, E, 2, H, preset=None, attention={"feature_map": phi})
        for i, phi in enumerate((fwp.DPFP(2), fwp.Taylor(), fwp.FEATURE_MAPS["elu+1"], fwp.FEATURE_MAPS["favor+"]))
    },
}


def test_torch_load_takes_states_and_configs_with_its_safe_default(tmp_path):
    kept = states() | {name: state.memory for name, state in states().items() if hasattr(state, "memory")}
    torch.save({"states": kept, "configs": CONFIGS}, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt")
    for name, state in kept.items():
        assert type(loaded["states"][name]) is type(state)
        close(loaded["states"][name], state, 0)
    assert loaded["configs"] == CONFIGS
    assert loaded["configs"]["rule"].attention["rule"] is fwp.RULES["delta"]
    phi = fwp.FavorPlus.draw(4)
    torch.save(phi, tmp_path / "phi.pt")
    assert torch.equal(torch.load(tmp_path / "phi.pt").R, phi.R)
    code = f"import torch, fwp; print(*torch.load({str(tmp_path / 'all.pt')!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert run.stdout == "states configs\n", run.stderr


@pytest.mark.parametrize("name", [*MODELS, "online"])
def test_pickle_and_deepcopy_of_states(name):
    state = torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, states()[name])
    for other in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert type(other) is type(state)
        close(other, state, 0)
