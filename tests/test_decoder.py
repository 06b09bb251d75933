"""The block and the decoder: their parts, generation, state, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import close, leaves
from outside.delta_rnn import DELTA_RNN
from torch import nn

from fwp.models import Decoder, DecoderConfig
from fwp.models.decoder import _draw
from fwp.nn import Block, FavorPlusFeatures, FeedForward

E, H = 8, 2


# ---- block ----


class Double(nn.Module):
    """A mixer that counts its calls in the state."""

    def forward(self, x, state=None, mask=None, cu_seqlens=None):
        return 2 * x, (state or 0) + 1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_placement_of_the_norm(norm):
    x = torch.randn(2, 3, E)
    square = type("Square", (nn.Module,), {"forward": lambda self, x: x * x})()

    def normed(x):
        return F.rms_norm(x, (E,), eps=1e-5) if norm == "rms" else F.layer_norm(x, (E,), eps=1e-5)

    y, state = Block(E, Double(), square, norm, "pre")(x, 4)
    h = x + 2 * normed(x)
    torch.testing.assert_close(y, h + normed(h) ** 2)
    assert state == 5
    y, _ = Block(E, Double(), square, norm, "post")(x)
    h = normed(x + 2 * x)
    torch.testing.assert_close(y, normed(h + h**2))


def test_feed_forward():
    x = torch.randn(3, E)
    for activation, f in (("gelu", F.gelu), ("relu", F.relu)):
        net = FeedForward(E, 12, activation)
        torch.testing.assert_close(net(x), net.down_proj(f(net.up_proj(x))))
    net = FeedForward(E, 12, "swiglu")
    torch.testing.assert_close(net(x), net.down_proj(F.silu(net.gate_proj(x)) * net.up_proj(x)))


# ---- decoder ----

CONFIGS = {
    "gated_delta_net": {},
    "post": {"placement": "post", "norm": "layer", "ff_activation": "relu", "preset": "delta_net_2021", "tied": False},
    "rule": {"preset": None, "attention": {"rule": "kda", "feature_norm": "l2", "short_conv": 2}},
    "writes": {"preset": "gated_delta_product", "attention": {"writes_per_read": 3}},
    "rwkv7": {"preset": "rwkv7"},
    "outside": {"preset": None, "attention": {"rule": DELTA_RNN, "feature_map": "softmax"}},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(13, E, 2, H, **CONFIGS[request.param])).double()
    for p in model.parameters():
        if p.dim() > 1:  # large weights make the greedy choice clear
            nn.init.normal_(p, std=1.0)
    return model


def ids(*size, seed=0):
    return torch.randint(13, size, generator=torch.Generator().manual_seed(seed))


def test_the_decoder_is_its_parts(model):
    tokens = ids(2, 5)
    x, values = model.embedding(tokens), {}
    for block in model.blocks:
        if model.config.preset == "rwkv7":
            x, _, values["v_first"] = block(x, **values, return_v_first=True)
        else:
            x, _ = block(x)
    if model.config.placement == "pre":
        x = F.rms_norm(x, (E,), model.norm.weight, eps=1e-5)
    close(model(tokens)[0], x @ model.head.weight.T)


def test_a_decoder_builds_rwkv7s_layers_for_their_places():
    model = Decoder(DecoderConfig(13, E, 3, H, preset="rwkv7"))
    mixers = [block.mixer for block in model.blocks]
    assert [mixer.mixes_values for mixer in mixers] == [False, True, True]
    weights = [mixer.out_norm.weight.unique().item() for mixer in mixers]
    assert weights == pytest.approx([(place / 3) ** 0.7 for place in (1, 2, 3)])
    for block in model.blocks:
        nn.init.normal_(block.mixer.o_proj.weight)
    model(ids(2, 5))[0].sum().backward()
    assert all(mixer.value_mix.bias.grad.any() for mixer in mixers[1:])
    with pytest.raises(TypeError, match="multiple values for keyword argument 'layer'"):
        Decoder(DecoderConfig(13, E, 2, H, preset="rwkv7", attention={"layer": 1}))


@torch.no_grad()
def greedy_by_recomputation(model, tokens, n):
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    return tokens


def test_greedy_generation_equals_recomputation(model):
    prompt = ids(3, 4)
    found = model.generate(prompt, 12, temperature=0)
    assert found.shape == (3, 16)
    assert torch.equal(found, greedy_by_recomputation(model, prompt, 12))
    assert len(found[:, 4:].unique()) > 2


def test_padded_prompts_generate_what_unpadded_ones_do(model):
    prompt, mask = ids(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[0, :3], mask[1, 4:], mask[2, 2:4] = False, False, False
    found = model.generate(prompt, 8, temperature=0, mask=mask)
    for row in range(3):
        alone = model.generate(prompt[row : row + 1, mask[row]], 8, temperature=0)
        assert torch.equal(found[row, 6:], alone[0, -8:])


def test_sampling(model):
    prompt = ids(64, 2)

    def sample(seed, **options):
        return model.generate(prompt, 6, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    greedy = model.generate(prompt, 6, temperature=0)
    assert torch.equal(sample(0, top_k=1), greedy)
    assert torch.equal(sample(0, temperature=1e-6), greedy)
    assert torch.equal(sample(0, temperature=1e-40), greedy)
    assert not torch.equal(sample(0), greedy)
    best = model(prompt)[0][:, -1].topk(3).indices
    drawn = sample(0, top_k=3, temperature=2.0)[:, 2:3]
    assert (drawn == best).any(-1).all()
    assert (drawn != best[:, :1]).any()
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [None, 2])
def test_drawing_at_the_limits_of_temperatures_and_logits(top_k, dtype):
    """Small temperatures take the likeliest token. Large ones take every token alike, except those that can't be."""
    most, least = torch.finfo(dtype).max, torch.finfo(dtype).min

    def drawn(row, temperature):
        logits = torch.tensor([row], dtype=dtype).expand(200, -1)
        found = _draw(logits, temperature, top_k, torch.Generator().manual_seed(0))
        assert found.shape == (200, 1)
        return {*found.flatten().tolist()}

    for row in ([0, 3, 1], [-torch.inf, 1, 0], [0, torch.inf, 1], [least, most, 0], [-torch.inf, least, -torch.inf]):
        for temperature in (1e-40, 1e-46, 5e-324, 1e-10):
            assert drawn(row, temperature) == {1}
    for temperature in (1e40, 1e300, 10**400):
        assert drawn([1, 2, -torch.inf], temperature) == {0, 1}
        assert drawn([1, torch.inf, torch.inf], temperature) == {1, 2}


@pytest.mark.parametrize("new", [0, 1, 5])
def test_each_new_token_costs_one_pass(model, new):
    """One pass for the prompt, then one for each new token except the last."""
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    assert model.generate(ids(2, 4), new).shape == (2, 4 + new)
    assert seen == [4, *[1] * new][:new]


def test_the_decoder_carries_pads_and_packs(model):
    tokens = ids(2, 9)
    logits, state = model(tokens)
    assert logits.shape == (2, 9, 13)
    first, middle = model(tokens[:, :4])
    second, end = model(tokens[:, 4:], middle)
    close((torch.cat([first, second], 1), end), (logits, state))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, [0, 5, 6]] = False
    padded = ids(2, 12, seed=1).masked_scatter(mask, tokens)
    found, end = model(padded, mask=mask)
    close((found[mask].view_as(logits), end), (logits, state))
    packed, end = model(tokens.view(1, 18), cu_seqlens=torch.tensor([0, 9, 18]))
    close((packed.view_as(logits), end), (logits, state))


def test_the_decoders_state_has_a_constant_size(model):
    sizes = [sum(x.numel() for x in leaves(model(ids(1, T))[1])) for T in (1, 5, 40)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_decoder_learns():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(13, 16, 1, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = ids(4, 24)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(13), rel=0.05)
    assert losses[-1] < 0.3 * losses[0]


def test_tied_and_untied_heads():
    tied, untied = (Decoder(DecoderConfig(13, E, 1, H, tied=tied)) for tied in (True, False))
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 13 * E
    other = Decoder(tied.config)
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(ids(1, 5))[0], tied(ids(1, 5))[0])


@torch.no_grad()
def test_the_decoder_compiles_as_one_graph():
    torch.compiler.reset()
    model = Decoder(DecoderConfig(11, E, 2, H))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(11, (2, 6))
    found, truth = compiled(ids), model(ids)
    close(found, truth, 1e-5)
    close(compiled(ids[:, :1], found[1]), model(ids[:, :1], truth[1]), 1e-5)


# ---- errors: one line that names the argument, what was expected and what was found ----


def test_errors_of_models():
    for options, message in (
        ({"preset": "gla2"}, "preset: expected one of .*, got 'gla2'; did you mean 'gla'?"),
        ({"norm": "batch"}, "norm: expected one of rms, layer, got 'batch'"),
        ({"placement": "per"}, "placement: expected one of pre, post, got 'per'; did you mean 'pre'?"),
        ({"ff_activation": "gleu"}, "activation: expected one of .*, got 'gleu'; did you mean 'gelu'?"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$".replace("?", r"\?")):
            Decoder(DecoderConfig(13, E, 1, H, **options))
    model = Decoder(DecoderConfig(13, E, 2, H))
    _, state = model(ids(1, 3))
    with pytest.raises(ValueError, match=r"^state: expected 2 layer states, got 1$"):
        model(ids(1, 3), state[:1])
    with pytest.raises(TypeError, match=r"^tokens: expected torch.int64, got torch.float32$"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"^tokens: expected \(B, T\) with T ≥ 1, got \(1, 0\)$"):
        model.generate(ids(1, 0), 3)
    with pytest.raises(ValueError, match=r"^redraw: expected one of training, always, never, got 'on'$"):
        FavorPlusFeatures(4, redraw="on")
    for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "ff_dim"):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number ≥ 1, got -1$"):
            DecoderConfig(**{"vocab_size": 13, name: -1})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected a whole number ≥ 0, got -1"),
        ({"max_new_tokens": 2.0}, ValueError, "max_new_tokens: expected a whole number ≥ 0, got 2.0"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number ≥ 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number ≥ 0, got nan"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        ({"top_k": 0}, ValueError, "top_k: expected a whole number ≥ 1, got 0"),
        ({"tokens": [[1]]}, TypeError, "tokens: expected a tensor, got list"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens: expected torch.int64, got torch.float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected torch.bool, got torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask: expected \(2, 3\), got \(2, 4\)"),
        (
            {"mask": torch.tensor([[True] * 3, [False] * 3])},
            ValueError,
            "mask: expected a True in each row, got a row without",
        ),
    ],
)
def test_errors_of_generation(options, error, message):
    """The errors come before any work."""
    model = Decoder(DecoderConfig(13, E, 1, H))
    model.register_forward_pre_hook(lambda *_: pytest.fail("worked before looking at the arguments"))
    with pytest.raises(error, match=f"^{message}$"):
        model.generate(**{"tokens": ids(2, 3), "max_new_tokens": 2, **options})
