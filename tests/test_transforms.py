"""The op under PyTorch's transforms: first and second derivatives, vmap, jvp, checkpointing, compile, export."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from laws import CHUNKS, REFERENCE, RULES, TOKENS, agree, chunk_size, each_form
from torch.utils.checkpoint import checkpoint

import fwp
from fwp import feature_maps
from fwp.backends import chunked
from fwp.core import Core, State
from fwp.functional import fast_weights
from fwp.testing import deviation, evaluate, sample

leaves = torch.utils._pytree.tree_leaves


def problem(rule, *, T=5, seed=1, state=True, **sizes):
    """The op as a function of tensors only, those tensors (q, k, v, gates and state), and their names."""
    inputs = sample(rule, **{"B": 1, "T": T, "H": 1, "K": 3, "V": 2} | sizes, state=state, seed=seed)
    start = inputs.pop("state", None)
    tensors = [x for x in leaves(start) if x is not None]

    def function(*given, **options):
        given, own = given[: len(inputs)], list(given[len(inputs) :])
        begin = torch.utils._pytree.tree_map(lambda x: None if x is None else own.pop(0), start)
        out, end = fast_weights(rule, **dict(zip(inputs, given)), state=begin, **options)
        return out, *(x for x in leaves(end) if x is not None)

    return function, [*inputs.values(), *tensors]


# ---- derivatives in eager mode ----


@each_form
def test_gradcheck(rule, form):
    function, tensors = problem(rule, T=4)
    tensors = [x.requires_grad_() for x in tensors]
    with chunk_size(3):
        assert torch.autograd.gradcheck(lambda *x: function(*x, **form), tensors)


@each_form
def test_gradgradcheck(rule, form):
    function, tensors = problem(rule, T=4)
    tensors = [x.requires_grad_() for x in tensors]
    with chunk_size(3):
        assert torch.autograd.gradgradcheck(lambda *x: function(*x, **form), tensors, fast_mode=True)


@pytest.mark.parametrize("form", [REFERENCE, TOKENS, CHUNKS], ids=lambda form: "-".join(form.values()))
def test_second_derivatives_of_the_normalised_rule(form):
    inputs = sample("gated_delta", B=1, T=4, H=1, K=3, V=2, denominator=True)

    def function(*given):
        out, end = fast_weights("gated_delta", **dict(zip(inputs, given)), denominator=True, **form)
        return out, end.S, end.z

    tensors = [x.requires_grad_() for x in inputs.values()]
    with chunk_size(3):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@each_form
def test_every_subset_of_requires_grad(rule, form):
    function, tensors = problem(rule, T=5)
    weights = [
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        for i, x in enumerate(function(*tensors))
    ]
    names = range(len(tensors))

    def grads(wanted):
        given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        out = sum((x * w).sum() for x, w in zip(function(*given, **form), weights))
        return torch.autograd.grad(out, [given[i] for i in wanted], materialize_grads=True)

    with chunk_size(3):
        every = grads([*names])
        subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, len(names)))
        for wanted in [*subsets] if len(names) < 7 else [*subsets][::5]:
            for i, grad in zip(wanted, grads(wanted)):
                assert torch.allclose(grad, every[i], rtol=1e-12, atol=1e-12), (wanted, i)


@each_form
def test_loss_on_the_output_or_the_state_alone(rule, form):
    function, tensors = problem(rule, T=7)

    def grads(form, chosen):
        given = [x.detach().requires_grad_() for x in tensors]
        loss = sum(x.sin().sum() for x in function(*given, **form)[chosen])
        return torch.autograd.grad(loss, given, materialize_grads=True)

    for chosen in (slice(0, 1), slice(1, None), slice(None)):
        with chunk_size(3):
            for found, truth in zip(grads(form, chosen), grads(REFERENCE, chosen)):
                assert deviation(found, truth) < 1e-10


@pytest.mark.parametrize("reentrant", [False, True])
@each_form
def test_checkpointing_gives_the_same_bits(rule, form, reentrant):
    function, tensors = problem(rule, T=9)

    def grads(wrap):
        given = [x.detach().requires_grad_() for x in tensors]
        outs = wrap(lambda *x: function(*x, **form), *given)
        return torch.autograd.grad(sum(x.sin().sum() for x in outs), given) if not reentrant else backward(outs, given)

    def backward(outs, given):
        sum(x.sin().sum() for x in outs).backward()
        return [x.grad for x in given]

    plain = grads(lambda f, *x: f(*x))
    again = grads(lambda f, *x: checkpoint(f, *x, use_reentrant=reentrant))
    assert all(torch.equal(x, y) for x, y in zip(plain, again))


# ---- torch.func ----


@each_form
def test_func_grad(rule, form):
    function, tensors = problem(rule, T=7)
    every = tuple(range(len(tensors)))

    def loss(*given):
        return sum(x.sin().sum() for x in function(*given, **form))

    given = [x.detach().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(loss(*given), given)
    with chunk_size(3):
        for found, expected in zip(torch.func.grad(loss, every)(*tensors), truth):
            assert deviation(found, expected) < 1e-10


@each_form
def test_vmap_and_vmap_of_grad(rule, form):
    """Over a new axis of all inputs, and over one of the queries alone."""
    several = [problem(rule, T=7, seed=seed) for seed in (2, 3, 4)]
    function = several[0][0]
    stacked = [torch.stack(x) for x in zip(*(tensors for _, tensors in several))]

    def loss(*given):
        return sum(x.sin().sum() for x in function(*given, **form))

    with chunk_size(3):
        mapped = torch.func.vmap(lambda *x: function(*x, **form))(*stacked)
        slopes = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*stacked)
        for i, (_, tensors) in enumerate(several):
            for x, y in zip(mapped, function(*tensors, **form)):
                assert deviation(x[i], y) < 1e-12
            for x, y in zip(slopes, torch.func.grad(loss, (0, 1, 2))(*tensors)):
                assert deviation(x[i], y) < 1e-12
        axes = (0, *[None] * (len(stacked) - 1))
        only = torch.func.vmap(lambda *x: function(*x, **form), in_dims=axes)(stacked[0], *several[0][1][1:])
        for i in range(3):
            assert deviation(only[0][i], function(stacked[0][i], *several[0][1][1:], **form)[0]) < 1e-12


@each_form
def test_vmap_and_grad_of_packed_and_masked(rule, form):
    inputs = [sample(rule, B=1, T=12, H=1, K=3, V=2, seed=seed) for seed in (2, 3)]
    stacked = {key: torch.stack([x[key] for x in inputs]) for key in inputs[0]}
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 12]), "mask": torch.arange(12)[None] % 4 != 1, **form}

    def loss(x):
        return fast_weights(rule, **x, **options)[0].sin().sum()

    with chunk_size(3):
        slopes = torch.func.vmap(torch.func.grad(loss))(stacked)
        for i in range(2):
            for key, grad in torch.func.grad(loss)(inputs[i]).items():
                assert deviation(slopes[key][i], grad) < 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by PyTorch itself
@each_form
def test_forward_derivative(rule, form):
    """⟨w, J u⟩ by jvp is ⟨Jᵀ w, u⟩ by backward."""
    function, tensors = problem(rule, T=7)
    generator = torch.Generator().manual_seed(5)
    along = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in tensors)
    with chunk_size(3):
        outs, slopes = torch.func.jvp(lambda *x: function(*x, **form), tuple(tensors), along)
        weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outs]
        given = [x.detach().requires_grad_() for x in tensors]
        grads = torch.autograd.grad(function(*given, **form), given, weights)
    forward = sum((w * x).sum() for w, x in zip(weights, slopes))
    assert deviation(forward, sum((g * u).sum() for g, u in zip(grads, along))) < 1e-10
    assert all(slope.abs().max() > 0 for slope in slopes)


# ---- the opaque ops ----

SHAPES = {"none": None, "head": (2,), "key": (2, 3)}
ERASE = ("none", "along k", "own key", "own key, strength 1")


def core(decay, erase, write, *, writes=1, T=19, read="after", packed=False, r=1, column=False, **options):
    """Inputs of the recurrence for one cell. column: whether S has z as its last column."""
    generator = torch.Generator().manual_seed(6)
    dtype = options.pop("dtype", torch.float64)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    B, N = (1, 4) if packed else (2, 2)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def gate(kind, low, high):
        if kind == "none":
            return None
        x = torch.rand(B, writes * T, *SHAPES[kind], generator=generator, dtype=torch.float64)
        return (low + (high - low) * x).to(kept)

    def keys():
        return torch.nn.functional.normalize(normal(B, writes * T, 2, 3), dim=-1)

    return Core(
        normal(B, T, 2 * r, 3),
        keys(),
        normal(B, writes * T, 2, 4),
        g=gate(decay, -0.5, 0),
        a=keys() if "own" in erase else None,
        e=gate("head", 0.1, 0.9) if erase in ("along k", "own key") else None,
        w=gate(write, 0.1, 0.9),
        S=normal(N, 2, 3, 4 + column).to(kept),
        cu_seqlens=torch.tensor([0, 3, 3, 11, T]) if packed else None,
        read=read,
        writes=writes,
        **options,
    )


NAMES = ("q", "k", "v", "g", "a", "e", "w", "S")


def walked(walk, given, chosen=slice(None)):
    """Results and gradients by name."""
    inputs = {key: getattr(given, key).detach().requires_grad_() for key in NAMES if getattr(given, key) is not None}
    out, end = walk(replace(given, **inputs), 8)
    generator = torch.Generator().manual_seed(7)
    used = [(x, torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)) for x in (out, end)][chosen]
    outs, weights = zip(*((x, w) for x, w in used if x.requires_grad))
    grads = torch.autograd.grad(outs, list(inputs.values()), weights, materialize_grads=True)
    return {"out": out, "S": end} | {f"d{key}": x for key, x in zip(inputs, grads)}


CELLS = [*itertools.product(("none", "head", "key"), ERASE, ("none", "head"))]


@pytest.mark.parametrize(("decay", "erase", "write"), CELLS)
def test_the_written_gradient_equals_autograd(decay, erase, write):
    orders = (False, True) if decay != "none" and erase != "none" else (False,)
    with mock.patch.object(chunked, "CHUNK", 8):
        for read, packed, r, column in itertools.product(("after", "before"), (False, True), (1, 2), (False, True)):
            for before, writes in itertools.product(orders, (1, 3) if r == 1 else (1,)):
                options = {"read": read, "packed": packed, "r": r, "column": column}
                given = core(decay, erase, write, writes=writes, erase_before_decay=before, **options)
                agree(walked(chunked._opaque_walk, given), walked(chunked._walk, given))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("write", ["none", "head"])
def test_the_written_gradient_when_not_causal(write, r, packed):
    with mock.patch.object(chunked, "CHUNK", 8):
        given = core("none", "none", write, packed=packed, r=r, causal=False)
        agree(walked(chunked._opaque_walk, given), walked(chunked._walk, given))


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(1, 2)], ids=["output", "state"])
def test_the_written_gradient_of_the_output_or_the_state_alone(chosen):
    given = core("key", "own key", "head")
    agree(walked(chunked._opaque_walk, given, chosen), walked(chunked._walk, given, chosen))


def test_the_written_gradient_at_its_own_chunk_size_and_token_by_token():
    given = core("key", "along k", "head", T=150)
    truth = walked(chunked._walk, given)
    agree(walked(chunked._opaque_walk, given), truth)
    agree(walked(lambda core, chunk: chunked._opaque_walk(core, 1), given), truth)


@pytest.mark.parametrize("strength", [0.0, -20.0, -1e4, -torch.inf])
@pytest.mark.parametrize("decay", ["head", "key"])
def test_the_written_gradient_under_strong_decays(decay, strength):
    given = core(decay, "along k", "head", T=70)
    given = replace(
        given,
        g=torch.where(torch.rand(given.g.shape, generator=torch.Generator().manual_seed(8)) < 0.5, strength, given.g),
    )
    truth = walked(chunked._walk, given)
    agree(walked(chunked._opaque_walk, given), truth)
    single = core(decay, "along k", "head", T=70, dtype=torch.float32)
    agree(walked(chunked._opaque_walk, replace(single, g=given.g.float())), truth, 1e-4)


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_the_written_gradient_of_almost_nothing(T, packed):
    given = core("key", "along k", "head", T=T)
    if packed:
        cut = {key: x[:1] for key in NAMES if key != "S" and (x := getattr(given, key)) is not None}
        given = replace(given, **cut, cu_seqlens=torch.tensor([0, 0, T]))
    agree(walked(chunked._opaque_walk, given), walked(chunked._walk, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_opaque_ops_in_low_precision(dtype):
    given = core("key", "along k", "head", dtype=dtype)
    found, truth = walked(chunked._opaque_walk, given), walked(chunked._walk, given)
    for key, x in truth.items():
        assert found[key].dtype == x.dtype
        assert deviation(found[key], x) < (1e-5 if x.dtype == torch.float32 else 2 * torch.finfo(dtype).eps), key


ARGUMENTS = {
    "bare": core("none", "none", "none"),
    "full": core("key", "own key", "head", read="before", r=2, column=True, writes=2, erase_before_decay=True),
    "packed": core("head", "along k", "head", packed=True),
    "mean": core("none", "none", "none", causal=False),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    given = ARGUMENTS[name]
    tensors = [getattr(given, key) for key in NAMES]
    options = [given.read, given.causal, given.writes, given.erase_before_decay]
    arguments = [*tensors, given.cu_seqlens, *options, 8]
    wanting = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]
    torch.library.opcheck(torch.ops.fwp.walk.default, wanting)
    out, end = torch.ops.fwp.walk(*arguments)
    torch.library.opcheck(
        torch.ops.fwp.walk_backward.default, [*arguments[:-1], torch.ones_like(out), torch.ones_like(end)]
    )


@pytest.mark.parametrize("T", [1, 9])
def test_the_op_that_sums_keys(T):
    """z_t = a_t z_{t−1} + b_t: PyTorch's checks, the result against a loop, and the gradient."""
    generator = torch.Generator().manual_seed(9)
    a, b = (torch.rand(2, T, 2, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.fwp.scan.default, (a, b))
    z, sums = torch.zeros_like(b[:, :0]).sum(1), []
    for t in range(T):
        z = a[:, t] * z + b[:, t]
        sums.append(z)
    truth, found = torch.stack([z, *sums], 1)[:, 1:], torch.ops.fwp.scan(a, b)
    assert deviation(found, truth) < 1e-14
    for x, y in zip(torch.autograd.grad(found.sin().sum(), (a, b)), torch.autograd.grad(truth.sin().sum(), (a, b))):
        assert deviation(x, y) < 1e-14


def test_wrong_borders_are_found_inside_the_op():
    given = replace(core("none", "none", "none", packed=True), cu_seqlens=torch.tensor([0, 9, 3, 11, 19]))
    with pytest.raises(ValueError, match=r"^cu_seqlens: must start at 0, not decrease, and end at T = 19; got "):
        chunked._opaque_walk(given, 8)


# ---- torch.compile ----


@pytest.fixture
def compiled():
    """compiled(function, **options) → the compiled function and a counter of its compilations."""
    torch._dynamo.reset()

    def compile_(function, **options):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        return torch.compile(function, fullgraph=True, backend=counter, **options), counter

    yield compile_
    torch._dynamo.reset()


LENGTHS = (7, 64, 2, 65, 130, 3, 200, 63, 129, 15, 16, 71)
COMPILED = {
    "additive": ("additive", {}, {}),
    "delta": ("delta", {}, {}),
    "kda-denominator-grouped": ("kda", {"denominator": True, "read": "before"}, {"Hq": 4, "Hk": 1}),
    "gla-feature-map-mask": ("gla", {"feature_map": "elu+1", "feature_norm": "l2", "mask": True}, {}),
    "pkda": (RULES[-2], {}, {}),
    "gated_delta-packed": ("gated_delta", {"packed": True, "denominator": True}, {"B": 1}),
    "kda-packed": ("kda", {"packed": True}, {"B": 1}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile_once_for_every_length(name, compiled):
    """Twelve lengths, forward and backward, equal to eager mode; at most one recompilation."""
    rule, options, sizes = COMPILED[name]
    options = dict(options)
    packed, masked = options.pop("packed", False), options.pop("mask", False)

    def call(rule, **given):
        return fast_weights(rule, **given, **options)

    fast, counter = compiled(call)
    for i, T in enumerate(LENGTHS):
        inputs = sample(
            rule,
            T=T,
            K=5,
            V=3,
            seed=i,
            state=True,
            sequences=3 if packed else None,
            denominator=options.get("denominator", False),
            **sizes,
        )
        given = {"cu_seqlens": torch.tensor([0, T // 3, T // 3, T])} if packed else {}
        if masked:
            given["mask"] = torch.arange(T).expand(2, T) % 5 != 1
        agree(evaluate(rule, inputs, call=fast, **given), evaluate(rule, inputs, call=call, **given))
    assert counter.frame_count <= 2


def test_compile_decode_steps(compiled):
    """One compiled function decodes one token at a time from the returned state."""
    fast, counter = compiled(lambda **given: fast_weights("kda", **given))
    inputs = sample("kda", T=12, K=5, V=3, state=True)
    whole, end = fast_weights("kda", **inputs)
    state, outs = inputs.pop("state"), []
    with torch.no_grad():
        for t in range(12):
            out, state = fast(**{key: x[:, t : t + 1] for key, x in inputs.items()}, state=state)
            outs.append(out)
    assert deviation(torch.cat(outs, 1), whole) < 1e-12
    assert deviation(state.S, end.S) < 1e-12
    assert counter.frame_count <= 2


@pytest.mark.parametrize("T", [0, 1])
def test_compile_almost_nothing(T, compiled):
    inputs = sample("kda", T=T, K=5, V=3, state=True, denominator=True)

    def call(rule, **given):
        return fast_weights(rule, **given, denominator=True)

    agree(evaluate("kda", inputs, call=compiled(call)[0]), evaluate("kda", inputs, call=call))


def test_compile_under_autocast(compiled):
    def call(rule, **given):
        with torch.autocast("cpu", torch.bfloat16):
            return fast_weights(rule, **given)

    fast, _ = compiled(call)
    inputs = sample("gated_delta", T=9, state=True, dtype=torch.float32)
    found, truth = evaluate("gated_delta", inputs, call=fast), evaluate("gated_delta", inputs, call=call)
    for key, x in truth.items():
        assert found[key].dtype == x.dtype
        assert deviation(found[key], x) < 1e-2, key


def test_compiled_read_and_not_causal(compiled):
    state = sample("additive", K=6, state=True)["state"]
    q = torch.randn(2, 9, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, _ = compiled(lambda S, q: fwp.read(State(S), q))
    assert torch.equal(fast(state.S, q), fwp.read(state, q))
    inputs = sample("additive", T=9)
    fast, _ = compiled(lambda **given: fast_weights("additive", **given, causal=False))
    assert torch.equal(fast(**inputs)[0], fast_weights("additive", **inputs, causal=False)[0])


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an ordinary path"])
def test_double_backward_of_compiled_raises(beside, compiled):
    """It raises even where another part of the loss has a second derivative."""
    inputs = sample("delta", T=5)
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    fast, _ = compiled(lambda **given: fast_weights("delta", **given)[0])
    out = fast(**leaves).sin().sum()
    if beside:
        out = out + (leaves["v"] ** 3).sum()
    (grad,) = torch.autograd.grad(out, leaves["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="not (currently )?support(ed)? double backward|double backward is not"):
        torch.autograd.grad(grad.sum(), leaves["v"])


TRANSFORMS = {
    "vmap": lambda f, x, u: torch.func.vmap(f)(torch.stack([x, u])),
    "grad": lambda f, x, u: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "vmap of grad": lambda f, x, u: torch.func.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(torch.stack([x, u])),
    "jvp": lambda f, x, u: torch.func.jvp(f, (x,), (u,))[1],
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by PyTorch itself
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_a_compiled_function(name, compiled):
    """The result is right, or it raises. An opaque op would give a jvp of 0."""
    inputs = sample("kda", T=5, denominator=True)
    x, u = inputs.pop("v"), torch.ones_like(inputs["q"])

    def transformed(x, u):
        return TRANSFORMS[name](lambda v: fast_weights("kda", v=v, **inputs, denominator=True)[0], x, u)

    fast, _ = compiled(transformed)
    try:
        found = fast(x, u)
    except RuntimeError:  # PyTorch 2.13 raises for jvp, by a fault of its own
        assert name == "jvp"
    else:
        assert deviation(found, transformed(x, u)) < 1e-12


def test_dual_numbers_in_a_compiled_function_raise(compiled):
    inputs = sample("kda", T=5, denominator=True)
    fast, _ = compiled(lambda **given: fast_weights("kda", **given, denominator=True)[0])
    with torch.autograd.forward_ad.dual_level():
        inputs["v"] = torch.autograd.forward_ad.make_dual(inputs["v"], torch.ones_like(inputs["v"]))
        with pytest.raises(RuntimeError, match="^forward derivatives are not supported under torch.compile"):
            fast(**inputs)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an ordinary path"])
def test_double_backward_of_the_op_raises(beside):
    given = core("head", "along k", "head")
    v = given.v.requires_grad_()
    out = chunked._opaque_walk(given, 8)[0].sin().sum()
    if beside:
        out = out + (v**3).sum()
    (grad,) = torch.autograd.grad(out, v, create_graph=True)
    with pytest.raises(RuntimeError, match="^double backward is not supported"):
        torch.autograd.grad(grad.sum(), v)


# ---- random features that are drawn once ----

CONTEXTS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None])[0],
    "grad": lambda f, x: 0 * torch.func.grad(lambda x: f(x).sum())(x).sum() + f(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager")(x),
    "compile any size": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)(x),
    "compiled vmap": lambda f, x: torch.compile(torch.func.vmap(f), fullgraph=True, backend="aot_eager")(x[None])[0],
    "inference": lambda f, x: torch.inference_mode()(f)(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by PyTorch itself
@pytest.mark.parametrize("name", [*CONTEXTS, "meta", "export", "strict export"])
def test_random_features_by_name_are_the_same_wherever_they_are_first_used(name):
    """They are drawn once and kept as an ordinary tensor, under whatever transform the first call ran."""
    torch._dynamo.reset()
    inputs = sample("additive", T=5, K=4, V=3, seed=2)
    x = inputs.pop("q")
    R = fwp.FavorPlus.draw(4, generator=torch.Generator().manual_seed(0))

    def named(q):
        return fast_weights("additive", q, **inputs, feature_map="favor+")[0]

    truth = fast_weights("additive", x, **inputs, feature_map=R)[0]
    feature_maps._drawn_once.cache_clear()
    if name.endswith("export"):
        module = torch.nn.Module()
        module.forward = named
        found = torch.export.export(module, (x,), strict=name == "strict export").module()(x)
    elif name == "meta":
        with torch.device("meta"):
            found = named(x)
    else:
        found = CONTEXTS[name](named, x)
    assert deviation(found, truth) < 1e-14
    with mock.patch.object(torch.linalg, "qr", side_effect=AssertionError("drawn again")):
        given = x.clone().requires_grad_()
        assert deviation(named(given), truth) < 1e-14
        (grad,) = torch.autograd.grad(named(given).sum(), given)
    assert grad.isfinite().all() and grad.any()


def test_random_features_made_inside_a_compiled_function(compiled):
    inputs = sample("additive", T=5, K=4, V=3)
    R = fwp.FavorPlus.draw(4, 6).R

    def call(R):
        return fast_weights("additive", **inputs, feature_map=fwp.FavorPlus(R))[0]

    fast, _ = compiled(call)
    assert deviation(fast(R), call(R)) < 1e-14


# ---- torch.export ----


class Layer(torch.nn.Module):
    def forward(self, q, k, v, beta, g):
        out, state = fast_weights("kda", q, k, v, beta=beta, g=g)
        return out, state.S


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """One program for every length."""
    inputs = sample("kda", T=70, K=5, V=3)
    T = torch.export.Dim("T", min=2, max=4096)
    dynamic = {key: {1: T} for key in inputs}
    program = torch.export.export(Layer(), (), inputs, dynamic_shapes=dynamic, strict=strict)
    for length in (70, 2, 131):
        inputs = sample("kda", T=length, K=5, V=3, seed=length)
        out, S = program.module()(**inputs)
        truth, state = fast_weights("kda", **inputs)
        assert deviation(out, truth) < 1e-12
        assert deviation(S, state.S) < 1e-12
