"""PyTorch's attention with linear attention inside, against the T × T formula in float64 and PyTorch's own modules."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fwp.interop.torch import MultiheadAttention, convert_attention, scaled_dot_product_attention

INF = float("inf")


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(x):
    return x.square() + 0.1


PHI = {"elu+1": lambda x: F.elu(x) + 1, "exp": torch.exp, "relu": torch.relu, square: square, None: lambda x: x}


def weights_of(q, k, bias, scale, feature_map="elu+1", denominator=True, eps=1e-6):
    """[..., L, S]: the weights of q [..., L, E] and k [..., S, E] with a bias that broadcasts to them."""
    a = PHI[feature_map](q * scale) @ PHI[feature_map](k).mT * bias.exp()
    if not denominator:
        return a
    total = a.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, a / torch.where(total == 0, 1, total + eps))


def as_bias(mask):
    """0 where a bool mask is True, else −∞."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -INF)


def causal(L, S):
    """True where query t sees key s, from the top left."""
    return torch.arange(L).unsqueeze(1) >= torch.arange(S)


def check_with_gradients(found, truth, inputs):
    """Asserts that both agree, and their gradients for a random sum."""
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    seed = random(*truth.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad((found * seed).sum(), inputs), torch.autograd.grad((truth * seed).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- scaled_dot_product_attention ----

KEYS = torch.tensor([[True, False, True, True, True], [False, False, True, True, False]])  # [B, S]
ROW = random(2, 5, seed=3).masked_fill(~KEYS, -INF)


def masks(L):
    """Arguments, and the bias that they mean, for B = 2 and S = 5."""
    lower = causal(L, 5)
    return {
        "none": ({}, torch.zeros(1, 1)),
        "is_causal": ({"is_causal": True}, as_bias(lower)),
        "causal": ({"attn_mask": lower}, as_bias(lower)),
        "causal float": ({"attn_mask": as_bias(lower)}, as_bias(lower)),
        "padding": ({"attn_mask": KEYS[:, None, None]}, as_bias(KEYS[:, None, None])),
        "padding of each query": ({"attn_mask": KEYS[:, None, None].expand(2, 4, L, 5)}, as_bias(KEYS[:, None, None])),
        "bias": ({"attn_mask": ROW[:, None, None]}, ROW[:, None, None]),
        "causal padding": ({"attn_mask": lower & KEYS[:, None, None]}, as_bias(lower & KEYS[:, None, None])),
        "causal bias": (
            {"attn_mask": ROW[:, None, None].masked_fill(~lower, -INF)},
            ROW[:, None, None].masked_fill(~lower, -INF),
        ),
    }


@pytest.mark.parametrize("L", [3, 5, 8])
@pytest.mark.parametrize("mask", masks(5))
@pytest.mark.parametrize(
    ("feature_map", "denominator"), [("elu+1", True), ("exp", True), ("relu", False), (square, True), (None, False)]
)
def test_sdpa_is_the_formula(feature_map, denominator, mask, L):
    options, bias = masks(L)[mask]
    options |= {"feature_map": feature_map, "denominator": denominator}
    eps = 0.0 if feature_map == "exp" else 0.01  # there eps has units of its own
    inputs = [x.requires_grad_() for x in (random(2, 4, L, 6), random(2, 4, 5, 6, seed=1), random(2, 4, 5, 3, seed=2))]
    q, k, v = inputs
    truth = weights_of(q, k, bias, 6**-0.5, feature_map, denominator, eps) @ v
    check_with_gradients(scaled_dot_product_attention(q, k, v, eps=eps, **options), truth, inputs)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_takes_any_leading_dimensions(lead, is_causal):
    q, k, v = (random(*lead, 5, 6, seed=i) for i in range(3))
    bias = as_bias(causal(5, 5)) if is_causal else torch.zeros(1, 1)
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
    assert out.shape == F.scaled_dot_product_attention(q, k, v).shape
    torch.testing.assert_close(out, weights_of(q, k, bias, 0.3) @ v, rtol=1e-10, atol=1e-10)
    keep = KEYS[0].expand(*lead[:1], *(1,) * max(0, len(lead) - 1), 1, 5)
    out = scaled_dot_product_attention(q, k, v, keep)
    torch.testing.assert_close(out, weights_of(q, k, as_bias(keep), 6**-0.5) @ v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_shares_keys_as_pytorch_does(is_causal):
    q, k, v = random(2, 6, 5, 4), random(2, 2, 5, 4, seed=1), random(2, 2, 5, 3, seed=2)
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    k, v = (x.repeat_interleave(3, 1) for x in (k, v))
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, is_causal=is_causal), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_that_are_left_out_may_hold_anything(is_causal):
    keep = torch.tensor([[True, True, False, False], [False, False, False, False]])[:, None, None]
    mask = keep & causal(4, 4) if is_causal else keep
    q, k, v = (random(2, 2, 4, 6, seed=i) for i in range(3))
    truth = scaled_dot_product_attention(q, k, v, mask)
    assert not truth[1].any() and truth[0].all()
    k, v = (x.masked_fill(~keep.mT, torch.nan).requires_grad_() for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(out, truth)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (k, v)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_leaves_out_keys(is_causal):
    torch.manual_seed(0)
    L = S = 50
    q, k, v = random(2, 3, L, 4), random(2, 3, S, 4, seed=1), torch.eye(S, dtype=torch.float64).expand(2, 3, S, S)
    whole = scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # the weights
    kept = scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=is_causal)[..., -1:, :] / whole[..., -1:, :]
    assert {round(x, 9) for x in kept.flatten().tolist()} == {0.0, round(4 / 3, 9)}
    assert 0.6 < (kept > 0).double().mean() < 0.9
    torch.manual_seed(0)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=is_causal), whole * kept, rtol=1e-10, atol=1e-12
    )


def test_sdpa_refuses_what_it_can_not_serve():
    q = torch.randn(2, 4, 5, 6)
    band = torch.ones(5, 5, dtype=torch.bool).tril().triu(-2)
    heads = torch.rand(2, 4, 1, 5) > 0.5
    for match, args, options in [
        ("attn_mask: expected the causal mask or one row", (q, q, q, band), {}),
        ("attn_mask: expected the causal mask or one row", (q, q, q, torch.randn(5, 5)), {}),
        ("attn_mask: expected the causal mask or one row", (q, q, q, heads), {}),
        (r"attn_mask: expected a shape that broadcasts to \(2, 4, 5, 5\), got \(5, 4\)", (q, q, q, band[:, 1:]), {}),
        ("attn_mask: expected None with is_causal=True", (q, q, q, band), {"is_causal": True}),
        ("key: expected 4 heads without enable_gqa, got 2", (q, q[:, :2], q[:, :2]), {}),
        ("key: expected a divisor of 4 heads, got 3", (q, q[:, :3], q[:, :3]), {"enable_gqa": True}),
        (r"key: expected \(2, \*, \*, 6\)", (q, q[..., :3], q), {}),
        (r"value: expected \(2, 4, 5, \*\)", (q, q, q[:, :, 1:]), {}),
        ("query: expected", (q[0, 0, 0], q[0, 0, 0], q[0, 0, 0]), {}),
        ("dropout: expected", (q, q, q), {"dropout_p": -0.5}),
        ("feature_map: expected", (q, q, q), {"feature_map": "elu"}),
        ("eps: expected", (q, q, q), {"eps": -1.0}),
    ]:
        with pytest.raises(ValueError, match=match) as caught:
            scaled_dot_product_attention(*args, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"attn_mask: expected a floating dtype"):
        scaled_dot_product_attention(q, q, q, torch.ones(5, 5, dtype=torch.long))


# ---- MultiheadAttention ----


def by_hand(layer, query, key, value, bias, scale):
    """The layer's output and weights from its parameters. Inputs [B, T, ·]; bias broadcasts to [B, H, L, S]."""
    if layer.in_proj_weight is not None:
        matrices = layer.in_proj_weight.split(layer.embed_dim)
    else:
        matrices = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    q, k, v = (x @ w.T for x, w in zip((query, key, value), matrices))
    if layer.in_proj_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), layer.in_proj_bias.split(layer.embed_dim)))
    bias = bias.expand(len(q), layer.num_heads, q.shape[1], k.shape[1])
    added = []
    if layer.bias_k is not None:
        added.append((layer.bias_k[0], layer.bias_v[0]))
    if layer.add_zero_attn:
        added.append((torch.zeros_like(k[0, :1]), torch.zeros_like(v[0, :1])))
    for extra_k, extra_v in added:
        k, v = (torch.cat([x, extra.expand(len(x), 1, -1)], 1) for x, extra in ((k, extra_k), (v, extra_v)))
        bias = F.pad(bias, (0, 1))
    q, k, v = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = weights_of(q, k, bias, scale)
    out = (weights @ v).transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
    return out if layer.out_proj.bias is None else out + layer.out_proj.bias, weights


def randomise(module):
    for i, p in enumerate(module.parameters()):
        p.data = random(*p.shape, seed=100 + i) / 2


LAYERS = {
    "plain": {},
    "cross": {"kdim": 5, "vdim": 7},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("mask", ["none", "padding", "causal", "both", "bias"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_multihead_attention_is_the_formula(options, mask):
    layer = MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **options)
    randomise(layer)
    L, S = 4, 5
    inputs = [random(2, T, width, seed=i) for i, (T, width) in enumerate([(L, 12), (S, layer.kdim), (S, layer.vdim)])]
    inputs = [x.requires_grad_() for x in inputs]
    bias, given = torch.zeros(1, 1, 1, 1, dtype=torch.float64), {}
    if mask in ("padding", "both"):
        given["key_padding_mask"] = ~KEYS
        bias = bias + as_bias(KEYS[:, None, None])
    if mask == "bias":
        given["key_padding_mask"] = ROW
        bias = bias + ROW[:, None, None]
    if mask in ("causal", "both"):
        given["attn_mask"] = ~causal(L, S)
        bias = bias + as_bias(causal(L, S))
    truth, weights = by_hand(layer, *inputs, bias, (12 // 3) ** -0.5)
    parts = [*inputs, *layer.parameters()]
    out, found = layer(*inputs, average_attn_weights=False, **given)
    check_with_gradients(out, truth, parts)
    torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-10)
    out, found = layer(*inputs, **given)
    torch.testing.assert_close((out, found), (truth, weights.mean(1)), rtol=1e-10, atol=1e-10)
    assert layer(*inputs, need_weights=False, **given)[1] is None
    if "attn_mask" in given:  # the same mask in other guises
        per_head = given["attn_mask"].expand(6, L, S)
        for attn_mask in (as_bias(~given["attn_mask"]), per_head):
            again = layer(*inputs, **given | {"attn_mask": attn_mask, "is_causal": True})[0]
            torch.testing.assert_close(again, truth, rtol=1e-10, atol=1e-10)
        again = layer(*inputs, **given | {"attn_mask": None, "is_causal": True})[0]
        torch.testing.assert_close(again, truth, rtol=1e-10, atol=1e-10)

    layer.batch_first = False
    moved = layer(*(x.transpose(0, 1) for x in inputs), **given)[0]
    torch.testing.assert_close(moved.transpose(0, 1), truth, rtol=1e-10, atol=1e-10)
    if "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"][1]
    for batch_first in (True, False):
        layer.batch_first = batch_first
        out, found = layer(*(x[1] for x in inputs), **given)
        torch.testing.assert_close((out, found), (truth[1], weights[1].mean(0)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_state_dicts_are_pytorchs(options):
    theirs, ours = nn.MultiheadAttention(12, 3, **options), MultiheadAttention(12, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    again = nn.MultiheadAttention(12, 3, **options)
    again.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters()))


def test_multihead_attentions_dropout_is_that_of_keys_in_training():
    layer = MultiheadAttention(12, 3, dropout=0.5, batch_first=True, dtype=torch.float64)
    randomise(layer)
    x = random(2, 40, 12)
    whole = layer.eval()(x, x, x, average_attn_weights=False)[1]
    out, weights = layer.train()(x, x, x, average_attn_weights=False)
    kept = weights[:, :, :1] / whole[:, :, :1]
    assert {round(y, 9) for y in kept.flatten().tolist()} == {0.0, 2.0}
    torch.testing.assert_close(weights, whole * kept, rtol=1e-10, atol=1e-12)
    v = F.linear(x, layer.in_proj_weight[24:], layer.in_proj_bias[24:]).unflatten(-1, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(out, layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)


def test_multihead_attention_refuses_what_it_can_not_serve():
    layer, x = MultiheadAttention(12, 3, batch_first=True), torch.randn(2, 4, 12)
    band = torch.ones(4, 4, dtype=torch.bool).triu(2)
    for error, match, args, options in [
        (ValueError, "attn_mask: expected the causal mask or one row", (x, x, x), {"attn_mask": band}),
        (
            ValueError,
            "attn_mask: expected the causal mask, as is_causal",
            (x, x, x),
            {"attn_mask": band & False, "is_causal": True},
        ),
        (
            ValueError,
            r"attn_mask: expected \(6, 4, 4\), got \(3, 4, 4\)",
            (x, x, x),
            {"attn_mask": band.expand(3, 4, 4)},
        ),
        (ValueError, r"key_padding_mask: expected \(2, 4\)", (x, x, x), {"key_padding_mask": band}),
        (TypeError, "key_padding_mask: expected torch.bool", (x, x, x), {"key_padding_mask": torch.ones(2, 4).long()}),
        (ValueError, r"query: expected \(\*, \*, 12\)", (x[..., 1:], x, x), {}),
        (ValueError, r"value: expected \(2, 4, \*\)", (x, x, x[:, 1:]), {}),
    ]:
        with pytest.raises(error, match=match) as caught:
            layer(*args, **options)
        assert "\n" not in str(caught.value)
    for match, options in [("feature_map", {"feature_map": "elu"}), ("eps", {"eps": -1.0})]:
        with pytest.raises(ValueError, match=f"{match}: expected"):
            MultiheadAttention(12, 3, **options)
        with pytest.raises(ValueError, match=f"{match}: expected"):
            convert_attention(nn.MultiheadAttention(12, 3), **options)
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.MultiheadAttention in it, got Linear"):
        convert_attention(nn.Linear(2, 2))


def test_multihead_attention_starts_as_pytorchs_and_can_be_copied():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, add_bias_kv=True)
    torch.manual_seed(0)
    ours = MultiheadAttention(12, 3, add_bias_kv=True, feature_map="relu", eps=0.1)
    with torch.device("meta"):
        later = MultiheadAttention(12, 3, add_bias_kv=True, feature_map="relu", eps=0.1)
    later.to_empty(device="cpu")
    torch.manual_seed(0)
    later.apply(lambda module: module.reset_parameters())
    x = torch.randn(5, 2, 12)
    for p, a, b in zip(theirs.parameters(), ours.parameters(), later.parameters()):
        assert torch.equal(p, a) and torch.equal(p, b)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (later, copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_attended_row_by_row(layout):
    layer = MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    rows = [random(4, 12), random(2, 12, seed=1)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    out, weights = layer(nested, nested, nested, need_weights=False)
    assert weights is None and out.layout == layout
    for found, x in zip(out.unbind(), rows):
        torch.testing.assert_close(found, layer(x, x, x)[0], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="key: expected the query where that is nested"):
        layer(nested, torch.nested.nested_tensor(rows, layout=layout), nested)


@pytest.mark.parametrize(
    "mask", [{}, {"key_padding_mask": torch.tensor([[False] * 9 + [True] * 3])}, {"is_causal": True}]
)
def test_multihead_attention_under_autocast(mask):
    layer = MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(1, 12, 32)
    exact = copy.deepcopy(layer).double()(*[x.double()] * 3, **mask)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, weights = layer(x, x, x, **mask)
    assert found.dtype == weights.dtype == torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()(*[x.bfloat16()] * 3, **mask)[0]
    error, reference, largest = (y.abs().amax() for y in (found - exact, low - exact, exact))
    assert error <= 2 * (reference + largest * 2**-8) < 0.1 * largest
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# ---- inside PyTorch's transformers ----

PADDING = torch.arange(7) >= torch.tensor([7, 5, 2]).unsqueeze(1)  # [B, T], as the encoder can nest


def encoder(nested=True, **options):
    options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why it won't nest
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, **options), 2, enable_nested_tensor=nested)


def assigned(model):
    """As `convert_attention`, by hand."""
    for layer in model.layers:
        ours = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("convert", [convert_attention, assigned])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_in_evaluation_do_what_they_do_in_training(norm_first, nested, padding, convert):
    model, x = encoder(nested, norm_first=norm_first), random(3, 7, 16)
    randomise(model)
    soft = model(x, src_key_padding_mask=padding)
    convert(model)
    real = slice(None) if padding is None else ~padding
    truth = model.train()(x, src_key_padding_mask=padding)[real]
    assert (truth - soft[real]).abs().max() > 0.05
    model.eval()
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            found = model(x, src_key_padding_mask=padding)[real]
        torch.testing.assert_close(found.detach(), truth.detach(), rtol=1e-10, atol=1e-10)
    alone = model(x[2:, :2])  # padding changes nothing
    torch.testing.assert_close(alone, model(x, src_key_padding_mask=PADDING)[2:, :2], rtol=1e-10, atol=1e-10)


def test_an_encoder_layer_is_what_its_attention_says():
    layer = encoder().layers[0]
    randomise(layer)
    convert_attention(layer)
    x = random(3, 7, 16)
    out, _ = by_hand(layer.self_attn, x, x, x, torch.zeros(1, 1, dtype=torch.float64), 4**-0.5)
    y = layer.norm1(x + out)
    truth = layer.norm2(y + layer.linear2(layer.linear1(y).relu()))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_nn_transformer_is_causal_and_ignores_padding(training):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    convert_attention(model).train(training)
    assert sum(isinstance(m, MultiheadAttention) for m in model.modules()) == 6
    src, tgt = random(3, 7, 16), random(3, 6, 16, seed=1)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    late = tgt.clone()
    late[:, 4:] += 1
    changed = src.masked_fill(PADDING.unsqueeze(-1), 9.0)
    padding = as_bias(~PADDING)  # PyTorch wants masks of one kind
    given = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = model(src, tgt, **given), model(changed, late, **given)
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=1e-10, atol=1e-10)
    assert (first[:, 4:] - second[:, 4:]).abs().max() > 1e-3


def test_convert_attention_keeps_parameters_hooks_and_optimisers():
    model, calls = encoder(dropout=0.3), []
    before = dict(model.named_parameters())
    model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    assert convert_attention(model, feature_map="relu", denominator=False, eps=0.5) is model
    assert all(p is before[name] for name, p in model.named_parameters())
    attention = model.layers[0].self_attn
    assert (attention.feature_map, attention.denominator, attention.eps) == ("relu", False, 0.5)
    assert attention.dropout == 0.3
    model(random(3, 7, 16))
    assert calls == [1]
    alone = convert_attention(nn.MultiheadAttention(8, 2))
    assert type(alone) is MultiheadAttention


@pytest.mark.parametrize("training", [True, False])
def test_encoder_layers_compile(training):
    layer = convert_attention(encoder()).layers[0].train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = random(3, 7, 16).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    for options in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": mask, "is_causal": True}):
        check_with_gradients(compiled(x, **options), layer(x, **options), [x, *layer.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-10, atol=1e-10)
