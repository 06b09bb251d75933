"""Encoders and cross attention: layers whose queries read everything that was written."""

from dataclasses import replace

import pytest
import torch
from laws import RULES, close
from layers import E, H, tokens

import fwp
from fwp.core import Core
from fwp.models import Decoder, DecoderConfig
from fwp.nn import PRESETS, Block, FastWeightAttention, FavorPlusFeatures, FeedForward
from fwp.rules import Rule, reference, spec


def strong(S, k, v, beta):
    """S + β k vᵀ."""
    return reference.additive(S, k, beta.unsqueeze(-1) * v)


def lower(core: Core, beta) -> Core:
    return replace(core, w=beta)


STRENGTH = Rule("strength", step=strong, gates={"beta": spec.strength()}, lower=lower)  # a gate, and no order
LAYERS = {
    "plain": lambda **options: FastWeightAttention(E, H, causal=False, bias=True, **options),
    "normalised": lambda **options: PRESETS["linear_transformer"](E, H, causal=False, **options),
    "grouped": lambda **options: FastWeightAttention(
        E, 4, causal=False, num_key_heads=2, num_value_heads=1, value_dim=3, out_norm="rms", out_gate=True, **options
    ),
    "few queries": lambda **options: FastWeightAttention(E, 1, causal=False, num_value_heads=2, head_dim=3, **options),
    "strength": lambda **options: FastWeightAttention(E, H, STRENGTH, "dpfp-1", "sum", causal=False, **options),
    "writes": lambda **options: FastWeightAttention(E, H, STRENGTH, causal=False, writes_per_read=2, **options),
    "favor": lambda **options: FastWeightAttention(
        E, H, "additive", FavorPlusFeatures(4, 6, redraw="never"), denominator=True, causal=False, **options
    ),
}
each_layer = pytest.mark.parametrize("layer", LAYERS, indirect=True)


@pytest.fixture
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def by_hand(layer, x, context):
    """The causal layer with the same weights: first it writes the context, then each token of x reads alone."""
    causal = FastWeightAttention.__new__(type(layer))
    causal.__dict__ = {**layer.__dict__, "causal": True}
    state = causal(context)[1] if context.shape[1] else None
    out = []
    for t in range(x.shape[1]):
        q, *_ = causal._project(x[:, t : t + 1], x[:, t : t + 1], None, None, None)
        o = fwp.read(
            state.memory,
            q,
            scale=layer.scale,
            feature_map=layer.feature_map,
            feature_norm=layer.feature_norm,
        )
        if layer.out_norm is not None:
            o = layer.out_norm(o)
        o = o.flatten(2)
        if layer.out_gate is not None:
            o = o * layer.out_activation(layer.out_gate(x[:, t : t + 1]))
        out.append(layer.o_proj(o))
    return torch.cat(out, 1), state


@each_layer
def test_every_token_of_an_encoder_reads_all_tokens(layer):
    x = tokens(2, 9, E)
    y, state = layer(x)
    close((y, state), by_hand(layer, x, x))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    close(layer(x[:, order])[0], y[:, order])


@each_layer
def test_cross_attention_reads_the_context_alone(layer):
    x, context = tokens(2, 5, E).requires_grad_(), tokens(2, 9, E, seed=2).requires_grad_()
    y, state = layer(x, context=context)
    truth, expected = by_hand(layer, x, context)
    close((y, state), (truth, expected))
    assert state.position.tolist() == [9, 9]
    inputs = [x, context, *layer.parameters()]
    found, wanted = (torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True) for out in (y, truth))
    close(found, wanted)

    again, same = layer(x, state, context=context[:, :0])  # encode once, read often
    close((again, same), (y, state))
    close(layer.step(x[:, 0], state, context=context[:, :0])[0], y[:, 0])
    _, first = layer(x[:, :0], context=context[:, :4])
    close(layer(x, first, context=context[:, 4:]), (y, state))


@each_layer
@torch.no_grad()
def test_padding_and_packing_around_cross_attention(layer):
    x, context = tokens(2, 5, E), tokens(2, 6, E, seed=2)
    y, state = layer(x, context=context)
    mask, context_mask = torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    mask[:, [0, 4, 7]], context_mask[:, [0, 3, 8]] = False, False
    padded, source = torch.full((2, 8, E), torch.nan).double(), torch.full((2, 9, E), torch.nan).double()
    padded[mask], source[context_mask] = x.flatten(0, 1), context.flatten(0, 1)
    found, end = layer(padded, mask=mask, context=source, context_mask=context_mask)
    close((found[mask].view_as(y), end), (y, state))
    assert not found[~mask].any()
    packed, end = layer(x.view(1, 10, E), cu_seqlens=torch.tensor([0, 5, 10]), context=context)
    close((packed.view_as(y), end), (y, state))


@each_layer
@torch.no_grad()
def test_padding_and_packing_in_an_encoder(layer):
    x = tokens(2, 5, E)
    y, state = layer(x)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, [0, 4, 7]] = False
    padded = torch.full((2, 8, E), torch.nan).double()
    padded[mask] = x.flatten(0, 1)
    found, end = layer(padded, mask=mask)
    close((found[mask].view_as(y), end), (y, state))
    packed, end = layer(x.view(1, 10, E), cu_seqlens=torch.tensor([0, 5, 10]))
    close((packed.view_as(y), end), (y, state))


def test_cross_attention_under_autocast_and_compile():
    torch.compiler.reset()
    layer = LAYERS["grouped"]()
    x, context = torch.randn(2, 5, E), torch.randn(2, 9, E)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, context=context)
    truth, exact = layer(x, context=context)
    assert y.dtype == torch.bfloat16 and state.memory.S.dtype == torch.float32
    assert (y - truth).norm() < 0.05 * truth.norm()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x, context=context), (truth, exact), 1e-5)


def test_a_block_hands_the_context_on():
    torch.manual_seed(0)
    layer = LAYERS["plain"]()
    block = Block(E, layer, FeedForward(E, 12))
    x, context = torch.randn(2, 5, E), torch.randn(2, 9, E)
    y, state = block(x, context=context)
    h = x + layer(block.mixer_norm(x), context=context)[0]
    close((y, state), (h + block.feed_forward(block.feed_forward_norm(h)), layer(x, context=context)[1]), 1e-6)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.erases or rule.gates], ids=lambda rule: rule.name)
def test_rules_that_depend_on_the_order_are_refused(rule):
    message = f"^causal: False needs a rule that neither decays nor erases, got {rule.name!r}$"
    with pytest.raises(ValueError, match=message):
        FastWeightAttention(E, H, rule, causal=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"short_conv": 4}, ValueError, "short_conv: expected 0 with causal=False, since it is causal itself, got 4"),
        ({"read": "before"}, ValueError, "read: 'before' needs causal=True, .*"),
        ({"causal": 0}, TypeError, "causal: expected True or False, got 0"),
    ],
)
def test_errors_of_options(options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        FastWeightAttention(E, H, **{"causal": False, **options})


def test_errors_of_the_context():
    layer, causal = LAYERS["plain"](), FastWeightAttention(E, H)
    x, seen = torch.randn(2, 5, E), torch.ones(2, 4, dtype=torch.bool)
    for module, error, message, given in (
        (causal, ValueError, "context: expected None in a layer with causal=True, got a tensor", {"context": x}),
        (layer, ValueError, "context_mask: expected None without a context, got a tensor", {"context_mask": seen}),
        (layer, ValueError, r"context: expected \(2, \*, 8\), got \(1, 5, 8\)", {"context": x[:1]}),
        (layer, TypeError, "context: expected torch.float32, got torch.float64", {"context": x.double()}),
        (
            layer,
            ValueError,
            r"context_mask: expected \(2, 5\), got \(2, 4\)",
            {"context": x, "context_mask": seen},
        ),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            module(x, **given)
    message = "^attention: expected a causal layer, since a decoder predicts the next token, got another$"
    with pytest.raises(ValueError, match=message):
        Decoder(DecoderConfig(13, E, 1, H, preset="linear_transformer", attention={"causal": False}))
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        PRESETS["rwkv7"](E, H, causal=False)
