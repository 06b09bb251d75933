"""The Triton ops under PyTorch: opcheck, derivatives, vmap, compile, export, autocast, and no waiting for the GPU."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cells import ADDITIVE, DEVICE, FIELDS, GPU, KDA, MARKS, OWN_KEY, C, agree, kernels, moved, problem, recurrence
from torch.func import grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from fwp.backends import triton as backend
from fwp.core import Features, State
from fwp.functional import fast_weights
from fwp.testing import deviation, evaluate, sample

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")]  # by jvp

NO_FORWARD = "forward derivatives are not supported by the triton backend; use backend='torch'"
NO_SECOND = "double backward is not supported by the triton backend; use backend='torch'"
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])


FEATURES = Features("dpfp-1", "sum", 0.5)
CORNERS = pytest.mark.parametrize("cell", [ADDITIVE, OWN_KEY], ids=["additive", "own key"])
DIAGONAL = pytest.mark.parametrize(  # for what is slow: each cell and each layout once
    ("cell", "packed"), [(ADDITIVE, False), (OWN_KEY, True)], ids=["additive-plain", "own key-packed"]
)


def packed_or_not(cell, packed, seed=0, T=7, **options):
    """A random problem. With an erase key it has two writes per read and erases before the decay."""
    options |= {"N": 3, "cu_seqlens": torch.tensor([0, 1, 1, T], device=DEVICE)} if packed else {"B": 2}
    options |= {"writes": 2, "erase_before_decay": True} if cell == OWN_KEY else {}
    return problem(cell, T=T, H=(2, 1, 1), seed=seed, **options)


def tensors(core):
    return {name: x for name in FIELDS if (x := getattr(core, name)) is not None}


# ---- what PyTorch asks of an op ----


@pytest.mark.parametrize(
    ("cell", "packed", "more"),
    [(ADDITIVE, False, True), (ADDITIVE, True, False), (OWN_KEY, False, False), (OWN_KEY, True, True)],
    ids=["additive-features", "additive-packed", "own key", "own key-packed-features"],
)
def test_opcheck(cell, packed, more):
    """Every pair of a cell, packing, and a denominator with features. Packed ones have a gradient of the end state."""
    options = {"denominator": True, "features": FEATURES} if more else {}
    core = moved(packed_or_not(cell, packed, T=2, **options), lambda x: x.requires_grad_())
    eps, features = core.eps if more else None, (core.features.phi, core.features.norm, core.features.scale)
    writes = core.writes, core.erase_before_decay
    given = (*(getattr(core, name) for name in FIELDS), core.cu_seqlens, False, eps, *features, *writes, C, None)
    torch.library.opcheck(backend.OPS._forward, (*given, "chunk", True))
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    o, S, z, den, *_ = backend.OPS._forward(*given, "chunk", True)
    made, d_z = ((None, None), None) if eps is None else ((o, den), torch.ones_like(z))
    d_S = torch.ones_like(S) if packed else None
    torch.library.opcheck(backend.OPS._backward, (*given, *made, None, None, torch.ones_like(o), d_S, d_z))


# ---- torch.func ----


@PACKED
@CORNERS
def test_func_grad(cell, packed):
    core = packed_or_not(cell, packed)

    def slopes(run):
        return grad(lambda x: run(replace(core, **x))[0].sin().sum())(tensors(core))

    found, truth = slopes(kernels), slopes(recurrence)
    assert all(deviation(found[name], x) <= 1e-10 for name, x in truth.items())


def on_each(fn, cores, names):
    """fn under vmap over the stacked tensors `names`, and fn of each core by itself."""
    mapped = {name: torch.stack([getattr(core, name) for core in cores], 1) for name in names}
    found = vmap(lambda x: fn(replace(cores[0], **x)), 1)(mapped)
    one_by_one = [fn(replace(cores[0], **{name: getattr(core, name) for name in names})) for core in cores]
    return found, torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *one_by_one)


@pytest.mark.parametrize("which", ["everything", "queries", "state"])
@PACKED
@CORNERS
def test_vmap(cell, packed, which):
    cores = [packed_or_not(cell, packed, seed, T=4, denominator=which == "everything") for seed in (1, 2, 3)]
    names = {"everything": [*tensors(cores[0])], "queries": "q", "state": "S"}[which]
    form = "recurrent" if which == "queries" else "chunk"

    def results(core):
        o, state = backend.run(core, form, C)
        return o, *(x for x in state if x is not None)

    found, truth = on_each(results, cores, names)
    assert all(torch.equal(x, y) for x, y in zip(found, truth, strict=True))


@DIAGONAL
def test_vmap_of_grad(cell, packed):
    cores = [packed_or_not(cell, packed, seed, T=4, denominator=cell == OWN_KEY, features=FEATURES) for seed in (1, 2)]
    names = [*tensors(cores[0])] if packed else "q"

    def slopes(core):
        return grad(lambda x: backend.run(replace(core, **x), "chunk", C)[0].sin().sum())(tensors(core))

    found, truth = on_each(slopes, cores, names)
    assert all(deviation(found[name], x) <= 1e-14 for name, x in truth.items())


@PACKED
def test_grad_of_vmap_and_a_jacobian(packed):
    cores = [packed_or_not(KDA, packed, seed) for seed in (1, 2)]

    def loss(run, S):
        return vmap(lambda S: run(replace(cores[0], S=S))[0])(S).sin().sum()

    S = torch.stack([core.S for core in cores])
    assert deviation(grad(lambda S: loss(kernels, S))(S), grad(lambda S: loss(recurrence, S))(S)) <= 1e-10

    def jacobian(run):
        return jacrev(lambda S: run(replace(cores[0], S=S))[0][:, -1, 0, 0])(S[0])

    assert deviation(jacobian(kernels), jacobian(recurrence)) <= 1e-10


def test_vmap_over_borders_of_packed_sequences():
    core = packed_or_not(KDA, True)
    bounds = torch.tensor([[0, 2, 2, 7], [0, 0, 6, 7]], device=DEVICE, dtype=torch.int32)
    found = vmap(lambda x: backend.run(replace(core, cu_seqlens=x), "chunk", C)[0])(bounds)
    assert all(torch.equal(x, kernels(replace(core, cu_seqlens=b))[0]) for x, b in zip(found, bounds))


def test_vmap_within_vmap():
    core = problem(ADDITIVE, T=3)
    q = torch.randn(2, 3, *core.q.shape, dtype=torch.float64, device=DEVICE)
    found = vmap(vmap(lambda q: backend.run(replace(core, q=q), "chunk", C)[0]))(q)
    assert all(torch.equal(found[i, j], kernels(replace(core, q=q[i, j]))[0]) for i in range(2) for j in range(3))


# ---- what the kernels don't have ----


def test_no_second_derivative():
    core = moved(problem(ADDITIVE, T=3), lambda x: x.requires_grad_())
    o, _ = kernels(core)
    (dq,) = torch.autograd.grad(o.sum(), core.q, create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        torch.autograd.grad(dq.sum() + (core.k**3).sum(), core.k)  # beside a path that has a second derivative


BESIDE = pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an ordinary path"])
TWICE = {
    "jvp": (lambda f, x: jvp(f, (x,), (x,)), NO_FORWARD),
    "grad of grad": (lambda f, x: grad(lambda x: grad(f)(x).sum())(x), NO_SECOND),
    "jvp of grad": (lambda f, x: jvp(grad(f), (x,), (x,)), NO_FORWARD),
    "vmap of jvp": (lambda f, x: vmap(lambda u: jvp(f, (x,), (u,)))(torch.stack([x, x])), NO_FORWARD),
}


@BESIDE
@pytest.mark.parametrize("name", TWICE)
def test_no_forward_or_second_derivative(name, beside):
    core = problem(ADDITIVE, T=3)
    transform, message = TWICE[name]

    def f(q):
        return backend.run(replace(core, q=q), "chunk", C)[0].sin().sum() + beside * (q**3).sum()

    with pytest.raises(RuntimeError, match=message):
        transform(f, core.q)


def test_dual_numbers():
    core = problem(ADDITIVE, T=3)
    with torch.autograd.forward_ad.dual_level():
        kernels(core)  # it has no forward derivative
        dual = torch.autograd.forward_ad.make_dual(core.q, torch.ones_like(core.q))
        with pytest.raises(RuntimeError, match=NO_FORWARD):
            kernels(replace(core, q=dual))


# ---- torch.compile and torch.export ----


@pytest.fixture
def compiled():
    """compiled(function) → the compiled function and a counter of its compilations."""
    torch._dynamo.reset()

    def compile_(function):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        return torch.compile(function, fullgraph=True, backend=counter), counter

    yield compile_
    torch._dynamo.reset()


@DIAGONAL
def test_one_graph_for_any_length(cell, packed, compiled):
    fast, counter = compiled(lambda core: backend.run(core, "chunk", C))
    for T in (3, 2, 1 + (C // 2 if cell == OWN_KEY else C)):  # the last has two chunks
        core = packed_or_not(cell, packed, T=T, denominator=cell == OWN_KEY, features=FEATURES)
        agree(core, run=fast, truth=kernels, bound=0)
    assert counter.frame_count <= 2


def layer(**inputs):
    out, state = fast_weights("kda", **inputs, backend="triton", form="chunk")
    return out, state.S


@PACKED
def test_the_op_compiles(packed, compiled):
    fast, counter = compiled(lambda rule, **inputs: fast_weights(rule, **inputs, backend="triton", form="chunk"))
    for T in (7, 2, 17, 9):
        inputs = sample("kda", B=1, T=T, H=1, K=3, V=2, state=True, sequences=2, device=DEVICE)
        if packed:
            inputs["cu_seqlens"] = torch.tensor([0, T // 2, T], device=DEVICE)
        else:
            inputs["state"] = State(inputs["state"].S[:1])
        where = {"cu_seqlens": inputs.pop("cu_seqlens", None)}
        found = evaluate("kda", inputs, call=fast, **where)
        truth = evaluate("kda", inputs, backend="reference", **where)
        assert all(deviation(found[name], x) <= 1e-10 for name, x in truth.items())
    assert counter.frame_count <= 2


COMPILED = {
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sin().sum()))(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", COMPILED)
def test_transforms_inside_a_compiled_function(name, compiled):
    """The result is right, or it is refused. A derivative can't see into a traced op, and a jvp would be 0."""
    inputs = sample("kda", B=1, T=5, H=1, K=3, V=2, device=DEVICE)
    v = inputs.pop("v")

    def transformed(v):
        return COMPILED[name](lambda v: fast_weights("kda", v=v, **inputs, backend="triton")[0], v)

    fast, _ = compiled(transformed)
    if name == "vmap":
        assert torch.equal(fast(v), transformed(v))
    else:
        with pytest.raises(Exception, match="torch.func.grad and jvp inside a compiled function"):
            fast(v)


@BESIDE
def test_no_second_derivative_of_a_compiled_function(beside, compiled):
    core = moved(problem(ADDITIVE, T=3), lambda x: x.requires_grad_())
    fast, _ = compiled(lambda core: backend.run(core, "chunk", C)[0])
    loss = fast(core).sin().sum() + beside * (core.v**3).sum()
    (slope,) = torch.autograd.grad(loss, core.v, create_graph=True)
    with pytest.raises(RuntimeError, match="not (currently )?support(ed)? double backward"):
        torch.autograd.grad(slope.sum(), core.v)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by dynamo
@pytest.mark.parametrize("training", [False, True])
def test_dual_numbers_in_a_compiled_function(training, compiled):
    core = moved(problem(ADDITIVE, T=3), lambda x: x.requires_grad_(training))
    fast, _ = compiled(lambda core: backend.run(core, "chunk", C)[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(core.q, torch.ones_like(core.q))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            fast(replace(core, q=dual))


class Layer(torch.nn.Module):
    def forward(self, q, k, v, beta, g):
        return layer(q=q, k=k, v=v, beta=beta, g=g)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """One program for every length."""
    T = torch.export.Dim("T", min=2, max=4096)
    inputs = sample("kda", B=1, T=20, H=1, K=3, V=2, device=DEVICE)
    shapes = {key: {1: T} for key in inputs}
    program = torch.export.export(Layer(), (), inputs, dynamic_shapes=shapes, strict=strict)
    for length in (20, 2, 35):
        inputs = sample("kda", B=1, T=length, H=1, K=3, V=2, seed=length, device=DEVICE)
        for found, truth in zip(program.module()(**inputs), layer(**inputs)):
            assert torch.equal(found, truth)


# ---- autocast ----


@pytest.mark.parametrize("trace", [False, True], ids=["eager", "compiled"])
def test_autocast(trace, compiled):
    """q, k and v are rounded to bfloat16, gates and state stay in float32."""
    inputs = sample("kda", B=1, T=19, H=1, K=16, V=16, dtype=torch.float32, state=True, device=DEVICE)

    def call(rule, **given):
        with torch.autocast(DEVICE, torch.bfloat16):
            return fast_weights(rule, **given, backend="triton", form="chunk")

    found = evaluate("kda", inputs, call=compiled(call)[0] if trace else call)
    cast = {name: x.bfloat16() if name in "qkv" else x for name, x in inputs.items()}
    truth = evaluate("kda", cast, backend="triton", form="chunk")
    assert found["out"].dtype == torch.bfloat16 and found["state.S"].dtype == torch.float32
    for name, x in truth.items():
        assert torch.equal(found[name], x.to(found[name].dtype)), name
        assert name in ("out", "state.S") or found[name].dtype == torch.float32


# ---- nothing waits for the GPU ----


class Waiting(TorchDispatchMode):
    """A context that raises where the host would have to wait for a value on the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@contextmanager
def not_waiting():
    if not GPU:
        with Waiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DIAGONAL
def test_no_launch_waits_for_a_value(cell, packed):
    core = moved(packed_or_not(cell, packed), lambda x: x.requires_grad_())
    for form in ("chunk", "recurrent"):
        for ready in (nullcontext, not_waiting):  # the first call compiles, which may wait
            with ready():
                o, state = backend.run(core, form, C)
                torch.autograd.grad((o, state.S), core.q, (torch.ones_like(o), torch.ones_like(state.S)))


def test_waiting_is_seen():
    with pytest.raises((AssertionError, RuntimeError)), not_waiting():
        torch.ones((), device=DEVICE).item()
