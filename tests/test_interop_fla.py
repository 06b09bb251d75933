"""flash-linear-attention's functions against their equations in float64, and the weights of its layers."""

import inspect

import published
import pytest
import torch
import torch.nn.functional as F

from fwp.errors import OPTIONS_ELSEWHERE
from fwp.interop import fla
from fwp.nn import PRESETS, CombaAttention, FastWeightAttention, RWKV7Attention

# The parameters of release 0.6.0 in their order, with defaults; after * those that it takes from **kwargs.
SHARED = "scale=None initial_state=None output_final_state=False"
GATE = "use_gate_in_kernel=False A_log=None dt_bias=None"
RAW = "use_beta_sigmoid_in_kernel=False allow_neg_eigval=False"
PACKED = "cu_seqlens=None cu_seqlens_cpu=None"
SIGNATURES = {
    "chunk_linear_attn": f"q k v {SHARED} normalize=True cu_seqlens=None",
    "fused_chunk_linear_attn": f"q k v {SHARED} normalize=True cu_seqlens=None",
    "fused_recurrent_linear_attn": f"q k v {SHARED} reverse=False normalize=False cu_seqlens=None",
    "chunk_simple_gla": f"q k v g=None g_gamma=None {SHARED} state_v_first=False {PACKED} * chunk_size=None",
    "fused_recurrent_simple_gla": f"q k v g=None g_gamma=None {SHARED} reverse=False state_v_first=False "
    "cu_seqlens=None",
    "chunk_retention": f"q k v {SHARED} cu_seqlens=None * chunk_size=None",
    "fused_recurrent_retention": f"q k v {SHARED} reverse=False state_v_first=False cu_seqlens=None",
    "chunk_gla": f"q k v g {SHARED} state_v_first=False {PACKED}",
    "fused_recurrent_gla": f"q k v gk=None gv=None {SHARED} reverse=False state_v_first=False cu_seqlens=None",
    "chunk_delta_rule": f"q k v beta {SHARED} use_qk_l2norm_in_kernel=False {PACKED} * chunk_size=64",
    "fused_recurrent_delta_rule": f"q k v beta=None {SHARED} use_qk_l2norm_in_kernel=False cu_seqlens=None",
    "chunk_gated_delta_rule": f"q k v g beta {SHARED} use_qk_l2norm_in_kernel=False {RAW} state_v_first=False {PACKED} "
    f"chunk_indices=None cp_context=None * chunk_size=64 {GATE}",
    "fused_recurrent_gated_delta_rule": f"q k v g=None gk=None gv=None beta=None {SHARED} "
    f"use_qk_l2norm_in_kernel=False {GATE} {RAW} state_v_first=False cu_seqlens=None",
    "chunk_kda": f"q k v g beta {SHARED} use_qk_l2norm_in_kernel=False use_gate_in_kernel=False {RAW} safe_gate=False "
    "lower_bound=None disable_recompute=False return_intermediate_states=False state_v_first=False "
    f"{PACKED} cp_context=None use_graph=False max_num_seqs=None * chunk_size=64 A_log=None dt_bias=None",
    "fused_recurrent_kda": f"q k v g beta A_log=None dt_bias=None {SHARED} use_qk_l2norm_in_kernel=False "
    f"use_gate_in_kernel=False {RAW} lower_bound=None state_v_first=False cu_seqlens=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_release(name):
    found, keywords = [], False
    for parameter in inspect.signature(getattr(fla, name)).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and not keywords:
            found.append("*")
            keywords = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        found.append(parameter.name + default)
    assert " ".join(found) == SIGNATURES[name]


# ---- values ----

B, T, H, K, V = 2, 7, 2, 4, 3
CU = torch.tensor([0, 3, 3, 7])  # three packed sequences, one empty


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def sequence(q, k, v, S, z, g=None, beta=None):
    """One sequence q, k [T, HV, K], v [T, HV, V] from S [HV, K, V] and z: o, S, z. g [T, HV] or [T, HV, K]."""
    out = []
    for t in range(len(q)):
        if g is not None:
            S = S * g[t].exp().reshape(len(S), -1, 1)
        written = v[t]
        if beta is not None:
            written = beta[t].unsqueeze(-1) * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
        S = S + torch.einsum("hk,hv->hkv", k[t], written)
        z = z + k[t]
        o = torch.einsum("hkv,hk->hv", S, q[t])
        out.append((o, (z * q[t]).sum(-1, keepdim=True)))
    empty = q.new_zeros(0, len(S), V), q.new_zeros(0, len(S), 1)
    o, divisor = (torch.stack(x) for x in zip(*out)) if out else empty
    return o, divisor, S, z


def naive(q, k, v, S, z, *, scale=None, cu=None, reverse=False, l2=False, **gates):
    """o and its divisor [B, T, HV, ·], S and z of each sequence. Heads of q and k are repeated, gates broadcast."""
    q, k = (unit(x) if l2 else x for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q * (K**-0.5 if scale is None else scale), k))
    bounds = [(b, 0, T) for b in range(len(q))] if cu is None else [(0, *x) for x in zip(cu.tolist(), cu[1:].tolist())]
    found = []
    for n, (b, start, end) in enumerate(bounds):
        at = list(range(start, end))[:: -1 if reverse else 1]
        parts = [x[b, at] for x in (q, k, v)]
        one = sequence(*parts, S[n], z[n], **{name: x[b, at] for name, x in gates.items() if x is not None})
        found.append([*(x.flip(0) if reverse else x for x in one[:2]), *one[2:]])
    o, divisor, S, z = zip(*found)
    if cu is not None:
        return torch.cat(o).unsqueeze(0), torch.cat(divisor).unsqueeze(0), torch.stack(S), torch.stack(z)
    return tuple(map(torch.stack, (o, divisor, S, z)))


class Inputs:
    """Random q, k, v, gates and states, as leaves. packed: one row of three sequences."""

    def __init__(self, packed=False, HV=H):
        rows, self.N = (1, len(CU) - 1) if packed else (B, B)
        self.cu = CU if packed else None
        self.q, self.k = random(rows, T, H, K), random(rows, T, H, K, seed=1)
        self.v = random(rows, T, HV, V, seed=2)
        self.g, self.gk = -random(rows, T, HV, seed=3).abs(), -random(rows, T, HV, K, seed=4).abs()
        self.beta = random(rows, T, HV, seed=5).sigmoid()
        self.S, self.z = random(self.N, HV, K, V, seed=6), random(self.N, HV, K, seed=7).abs()
        self.A_log, self.bias, self.wide_bias = random(HV, seed=8), random(HV, seed=9), random(HV * K, seed=10)
        self.raw_g, self.raw_gk, self.raw_beta = (
            random(*x.shape, seed=11 + i) for i, x in enumerate((self.g, self.gk, self.beta))
        )
        self.leaves = [
            x.requires_grad_() for x in vars(self).values() if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]


def check(found, truth, leaves):
    """Asserts that results agree, and the gradients of a random sum."""
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    losses = [sum((x * random(*x.shape, seed=20 + i)).sum() for i, x in enumerate(r)) for r in (found, truth)]
    for a, b in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in losses)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def gates_of(x):
    """Functions, the arguments of each beside q, k and v, and the gates of the equation that they mean."""
    rate = x.A_log.exp()
    retention = torch.log(1 - 2.0 ** (-5 - torch.arange(x.v.shape[2], dtype=torch.float64))).expand(x.g.shape)
    gamma = -x.A_log.exp()
    raw_beta = {"beta": x.raw_beta, "use_beta_sigmoid_in_kernel": True}
    raw_g = {"use_gate_in_kernel": True, "A_log": x.A_log}
    soft = -rate * F.softplus(x.raw_g + x.bias)
    wide = x.raw_gk + x.wide_bias.view(-1, K)
    l2 = {"use_qk_l2norm_in_kernel": True}
    sigma = x.raw_beta.sigmoid()
    simple = ["chunk_simple_gla", "fused_recurrent_simple_gla"]
    delta, gated = (
        ["chunk_delta_rule", "fused_recurrent_delta_rule"],
        ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"],
    )
    kda = ["chunk_kda", "fused_recurrent_kda"]
    return {
        "linear": (["chunk_linear_attn", "fused_recurrent_linear_attn"], {"normalize": False}, {}),
        "simple": (simple, {"g": x.g}, {"g": x.g}),
        "gamma": (simple, {"g_gamma": gamma}, {"g": gamma.expand(x.g.shape)}),
        "undecayed": (simple, {"scale": 0.3}, {"scale": 0.3}),
        "retention": (["chunk_retention", "fused_recurrent_retention"], {}, {"g": retention}),
        "gla": (["chunk_gla"], {"g": x.gk}, {"g": x.gk}),
        "recurrent gla": (["fused_recurrent_gla"], {"gk": x.gk}, {"g": x.gk}),
        "no gk": (["fused_recurrent_gla"], {}, {}),
        "delta": (delta, {"beta": x.beta} | l2, {"beta": x.beta, "l2": True}),
        "β = 1": (["fused_recurrent_delta_rule"], l2, {"beta": torch.ones_like(x.beta), "l2": True}),
        "gated": (
            gated,
            {"g": x.g, "beta": x.beta, "scale": 0.3} | l2,
            {"g": x.g, "beta": x.beta, "scale": 0.3, "l2": True},
        ),
        "raw": (
            gated,
            {"g": x.raw_g, "dt_bias": x.bias} | raw_g | raw_beta | l2,
            {"g": soft, "beta": sigma, "l2": True},
        ),
        "raw without bias": (
            gated,
            {"g": x.raw_g, "allow_neg_eigval": True} | raw_g | raw_beta | l2,
            {"g": -rate * F.softplus(x.raw_g), "beta": 2 * sigma, "l2": True},
        ),
        "gk": (
            gated[1:],
            {"g": x.g, "gk": x.gk} | l2,
            {"g": x.g.unsqueeze(-1) + x.gk, "beta": torch.ones_like(x.beta), "l2": True},
        ),
        "gk alone": (gated[1:], {"gk": x.gk, "beta": x.beta} | l2, {"g": x.gk, "beta": x.beta, "l2": True}),
        "kda": (kda, {"g": x.gk, "beta": x.beta} | l2, {"g": x.gk, "beta": x.beta, "l2": True}),
        "raw kda": (
            kda,
            {"g": x.raw_gk, "dt_bias": x.wide_bias} | raw_g | raw_beta | l2,
            {"g": -rate.unsqueeze(-1) * F.softplus(wide), "beta": sigma, "l2": True},
        ),
        "bounded": (
            kda,
            {"g": x.raw_gk, "dt_bias": x.wide_bias, "lower_bound": -2.0, "allow_neg_eigval": True}
            | raw_g
            | raw_beta
            | l2,
            {"g": -2 * (rate.unsqueeze(-1) * wide).sigmoid(), "beta": 2 * sigma, "l2": True},
        ),
        "bounded without A": (
            kda,
            {"g": x.raw_gk, "lower_bound": -2.0, "use_gate_in_kernel": True, "beta": x.beta} | l2,
            {"g": -2 * x.raw_gk.sigmoid(), "beta": x.beta, "l2": True},
        ),
    }


CASES = [(case, name) for case, (names, *_) in gates_of(Inputs()).items() for name in names]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("case", "name"), CASES)
def test_functions_are_their_equations(case, name, packed):
    x = Inputs(packed)
    _, given, gates = gates_of(x)[case]
    o, _, S, _ = naive(x.q, x.k, x.v, x.S, x.z, cu=x.cu, **gates)
    fn, packing = getattr(fla, name), {"cu_seqlens": x.cu}
    check(fn(x.q, x.k, x.v, **given, initial_state=x.S, output_final_state=True, **packing), (o, S), x.leaves)
    o, _, S, _ = naive(x.q, x.k, x.v, torch.zeros_like(x.S), x.z, cu=x.cu, **gates)
    check(fn(x.q, x.k, x.v, **given, output_final_state=True, **packing), (o, S), x.leaves)
    assert fn(x.q, x.k, x.v, **given, **packing)[1] is None


def takes(argument):
    return [(case, name) for case, name in CASES if argument in inspect.signature(getattr(fla, name)).parameters]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("case", "name"), takes("reverse"))
def test_time_can_run_backwards(case, name, packed):
    x = Inputs(packed)
    _, given, gates = gates_of(x)[case]
    o, _, S, _ = naive(x.q, x.k, x.v, x.S, x.z, cu=x.cu, reverse=True, **gates)
    given |= {"initial_state": x.S, "output_final_state": True, "cu_seqlens": x.cu, "reverse": True}
    check(getattr(fla, name)(x.q, x.k, x.v, **given), (o, S), x.leaves)


@pytest.mark.parametrize(("case", "name"), takes("state_v_first"))
def test_states_can_have_values_first(case, name):
    x = Inputs()
    _, given, gates = gates_of(x)[case]
    o, _, S, _ = naive(x.q, x.k, x.v, x.S, x.z, **gates)
    given |= {"initial_state": x.S.mT, "output_final_state": True, "state_v_first": True}
    check(getattr(fla, name)(x.q, x.k, x.v, **given), (o, S.mT), x.leaves)


@pytest.mark.parametrize(("case", "name"), [x for x in CASES if "gated" in x[1] or "kda" in x[1]])
def test_values_may_have_more_heads(case, name):
    x = Inputs(HV=3 * H)
    _, given, gates = gates_of(x)[case]
    o, _, S, _ = naive(x.q, x.k, x.v, x.S, x.z, **gates)
    given |= {"initial_state": x.S, "output_final_state": True}
    check(getattr(fla, name)(x.q, x.k, x.v, **given), (o, S), x.leaves)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "reverse"),
    [
        ("chunk_linear_attn", False),
        ("fused_chunk_linear_attn", False),
        ("fused_recurrent_linear_attn", False),
        ("fused_recurrent_linear_attn", True),
    ],
)
def test_linear_attention_can_be_normalised(name, reverse, packed):
    x = Inputs(packed)
    q, k = x.q.exp(), x.k.exp()
    options = {"output_final_state": True, "cu_seqlens": x.cu, "normalize": True} | (
        {"reverse": True} if reverse else {}
    )
    for start, z, given in ((x.S, x.z, (x.S, x.z.unsqueeze(1))), (x.S, 0 * x.z, x.S), (0 * x.S, 0 * x.z, None)):
        o, divisor, S, end = naive(q, k, x.v, start, z, cu=x.cu, reverse=reverse)
        found, (found_S, found_z) = getattr(fla, name)(q, k, x.v, initial_state=given, **options)
        leaves = [x.q, x.k, x.v, x.S] if given is x.S else [x.q, x.k, x.v]
        check((found, found_S, found_z), (o / (divisor + 1e-10), S, end.unsqueeze(1)), leaves)
    found, state = getattr(fla, name)(q, k, x.v, normalize=True)
    assert state is None


def test_defaults_of_linear_attention_differ_between_its_forms():
    x = Inputs()
    q, k = x.q.exp(), x.k.exp()
    o, divisor, _, _ = naive(q, k, x.v, 0 * x.S, 0 * x.z)
    torch.testing.assert_close(fla.chunk_linear_attn(q, k, x.v)[0], o / divisor, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fla.fused_recurrent_linear_attn(q, k, x.v)[0], o, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_are_float32_whatever_the_inputs(dtype):
    x = Inputs()
    q, k, v, g, beta = (y.detach().to(dtype) for y in (x.q, x.k, x.v, x.g, x.beta))
    for start in (None, x.S.detach().to(dtype)):
        o, S = fla.chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        assert o.dtype == dtype and S.dtype == torch.float32
        wide = [y.double() for y in (q, k, v)]
        gates = {"g": g.double(), "beta": beta.double()}
        truth, _, end, _ = naive(
            *wide, torch.zeros_like(x.S) if start is None else start.double(), x.z, l2=True, **gates
        )
        bound = 2**-7 if dtype == torch.bfloat16 else 1e-6
        assert (o - truth).abs().max() <= 2 * bound * truth.abs().max()
        assert (S - end).abs().max() <= 2 * bound * end.abs().max()


def test_what_has_no_counterpart_is_refused_in_one_line():
    x = Inputs()
    q, k, v, g, gk, beta, S = (y.detach() for y in (x.q, x.k, x.v, x.g, x.gk, x.beta, x.S))
    gated, kda = (fla.chunk_gated_delta_rule, (q, k, v, g, beta)), (fla.chunk_kda, (q, k, v, gk, beta))
    for error, match, (fn, args), options in [
        (ValueError, "cp_context: expected its default", gated, {"cp_context": object()}),
        (ValueError, "cp_context: expected its default", kda, {"cp_context": object()}),
        (ValueError, "use_graph: expected its default", kda, {"use_graph": True}),
        (ValueError, "return_intermediate_states: expected its default", kda, {"return_intermediate_states": True}),
        (ValueError, "gv: expected its default", (fla.fused_recurrent_gla, (q, k, v)), {"gv": v}),
        (ValueError, "gv: expected its default", (fla.fused_recurrent_gated_delta_rule, (q, k, v)), {"gv": v}),
        (ValueError, "g_gamma: expected None beside g", (fla.chunk_simple_gla, (q, k, v, g)), {"g_gamma": g[0, 0]}),
        (ValueError, r"g_gamma: expected \(2,\)", (fla.chunk_simple_gla, (q, k, v)), {"g_gamma": g}),
        (ValueError, "allow_neg_eigval: expected False without", gated, {"allow_neg_eigval": True}),
        (ValueError, "A_log: expected a tensor with use_gate_in_kernel", gated, {"use_gate_in_kernel": True}),
        (ValueError, r"A_log: expected \(2,\)", gated, {"use_gate_in_kernel": True, "A_log": gk}),
        (ValueError, r"dt_bias: expected \(2,\)", gated, {"use_gate_in_kernel": True, "A_log": g[0, 0], "dt_bias": g}),
        (
            ValueError,
            r"lower_bound: expected a number in \[-5, 0\)",
            kda,
            {"safe_gate": True, "use_gate_in_kernel": True},
        ),
        (ValueError, r"initial_state: expected \(2, 2, 4, 3\), got \(1, 2, 4, 3\)", gated, {"initial_state": S[:1]}),
        (ValueError, r"initial_state: expected \(2, 2, 3, 4\)", gated, {"initial_state": S, "state_v_first": True}),
        (TypeError, "unexpected keyword argument 'head_first'", gated, {"head_first": False}),
        (TypeError, "unexpected keyword argument 'transpose_state_layout'", kda, {"transpose_state_layout": True}),
        (
            TypeError,
            "g: expected a tensor",
            (fla.fused_recurrent_gated_delta_rule, (q, k, v)),
            {"use_gate_in_kernel": True},
        ),
    ]:
        with pytest.raises(error, match=match) as caught:
            fn(*args, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"initial_state\[1\]: expected \(2, 1, 2, 4\)"):
        fla.chunk_linear_attn(q, k, v, initial_state=(S, S))
    with pytest.raises(TypeError, match="q: expected a tensor"):
        fla.chunk_gla(None, k, v, gk)


# ---- weights of its layers; those of gdn2, comba, gated_delta_product and of transformers load in test_presets.py ----

E, N = 12, 2  # N value heads per key head


def conv(q, k, v):
    return {f"{letter}_conv1d.weight": (width, 1, 4) for letter, width in zip("qkv", (q, k, v))}


def projections(q, k, v):
    widths = {"q_proj.weight": (q, E), "k_proj.weight": (k, E), "v_proj.weight": (v, E)}
    return widths | {"o_norm.weight": (V,), "b_proj.weight": (v // V, E)}


# Preset and options, the shapes of the published weights, and the published layer.
LAYERS = {
    "DeltaNet": (
        ("delta_net", {}),
        projections(H * K, H * K, H * V) | conv(H * K, H * K, H * V) | {"o_proj.weight": (E, H * V)},
        lambda w, x: published.delta_product(w, x, H, H, 1, neg=False),
    ),
    "DeltaNet with a gate": (
        ("delta_net", {"out_gate": True, "allow_neg_eigval": True}),
        projections(H * K, H * K, H * V)
        | conv(H * K, H * K, H * V)
        | {"o_proj.weight": (E, H * V), "g_proj.weight": (H * V, E)},
        lambda w, x: published.delta_product(w, x, H, H, 1),
    ),
    "GatedDeltaNet": (
        ("gated_delta_net", {"num_value_heads": N * H}),
        projections(H * K, H * K, N * H * V)
        | conv(H * K, H * K, N * H * V)
        | {"o_proj.weight": (E, N * H * V), "g_proj.weight": (N * H * V, E)}
        | {"a_proj.weight": (N * H, E), "A_log": (N * H,), "dt_bias": (N * H,)},
        lambda w, x: published.delta_product(w, x, H, N * H, 1, neg=False),
    ),
    "KimiDeltaAttention": (
        ("kda", {"num_value_heads": N * H, "gate_rank": V, "out_gate_bias": True}),
        projections(H * K, H * K, N * H * V)
        | conv(H * K, H * K, N * H * V)
        | {"o_proj.weight": (E, N * H * V), "A_log": (N * H,), "dt_bias": (N * H * K,)}
        | {"f_proj.0.weight": (V, E), "f_proj.1.weight": (N * H * K, V)}
        | {"g_proj.0.weight": (V, E), "g_proj.1.weight": (N * H * V, V), "g_proj.1.bias": (N * H * V,)},
        lambda w, x: published.kda(w, x, H, N * H),
    ),
    "KimiDeltaAttention with negative eigenvalues": (
        ("kda", {"allow_neg_eigval": True}),
        projections(H * K, H * K, H * V)
        | conv(H * K, H * K, H * V)
        | {"o_proj.weight": (E, H * V), "A_log": (H,), "dt_bias": (H * K,)}
        | {"f_proj.0.weight": (K, E), "f_proj.1.weight": (H * K, K)}
        | {"g_proj.0.weight": (K, E), "g_proj.1.weight": (H * V, K)},
        lambda w, x: published.kda(w, x, H, H, neg=True),
    ),
    "GatedLinearAttention": (
        ("gla", {"num_key_heads": 1, "num_value_heads": 1}),
        {"q_proj.weight": (H * K, E), "k_proj.weight": (K, E), "v_proj.weight": (V, E)}
        | {"gk_proj.0.weight": (16, E), "gk_proj.1.weight": (K, 16), "gk_proj.1.bias": (K,)}
        | {"g_proj.weight": (H * V, E), "g_norm_swish_gate.weight": (V,), "o_proj.weight": (E, H * V)},
        lambda w, x: published.gla(w, x, H, 1),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_load_and_compute_the_same(name):
    (preset, options), shapes, truth = LAYERS[name]
    w = {key: random(*shape, seed=i) / 2 for i, (key, shape) in enumerate(shapes.items())}
    layer = PRESETS[preset](E, H, head_dim=K, value_dim=V, **options).double()
    assert fla.load_layer(layer, w) is layer
    x = random(2, T, E, seed=99)
    torch.testing.assert_close(layer(x)[0], truth(w, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at", [0, 1])
@torch.no_grad()
def test_rwkv7_loads_under_both_of_its_names(at):
    width = H * K
    shapes = {f"x_{letter}": (1, 1, width) for letter in "rwkvag"} | {"r_k": (H, K)}
    shapes |= dict.fromkeys(("w0", "a0", "k_k", "k_a"), (1, 1, width)) | {
        "ln_x.weight": (width,),
        "ln_x.bias": (width,),
    }
    shapes |= {"w1": (width, 5), "w2": (5, width), "a1": (width, width), "a2": (width, width)}
    shapes |= {"g1": (width, 3), "g2": (3, width)}
    shapes |= {f"{key}.weight": (width, width) for key in ("receptance", "key", "value", "output")}
    if at:
        shapes |= {"v0": (1, 1, width), "v1": (width, 4), "v2": (4, width)}
    w = {key: random(*shape, seed=i) / 2 for i, (key, shape) in enumerate(shapes.items())}
    theirs = {key: x for key, x in w.items() if key[:2] in ("x_", "k_", "r_")}
    theirs |= {key: theirs[key].flatten() for key in ("k_k", "k_a")}
    for other, name in {"r": "receptance", "k": "key", "v": "value", "o": "output"}.items():
        theirs[f"{other}_proj.weight"] = w[f"{name}.weight"]
    for letter in "wavg"[: None if at else 2] + ("" if at else "g"):
        theirs[f"{letter}_lora.lora.0.weight"], theirs[f"{letter}_lora.lora.2.weight"] = (
            w[f"{letter}1"].T,
            w[f"{letter}2"].T,
        )
        if letter != "g":
            theirs[f"{letter}_lora.lora.2.bias"] = w[f"{letter}0"].flatten()
    theirs |= {f"g_norm.{key}": w[f"ln_x.{key}"] for key in ("weight", "bias")}
    x, v_first = random(2, T, width, seed=98), random(2, T, width, seed=99) if at else None
    ranks = {"decay_rank": 5, "rate_rank": width, "value_rank": 4, "gate_rank": 3}
    for weights in (w, theirs):
        layer = PRESETS["rwkv7"](width, H, layer=at, num_layers=2, **ranks).double()
        found = fla.load_layer(layer, weights)(x, v_first=v_first)[0]
        torch.testing.assert_close(found, published.rwkv7(w, x, H, v_first)[0], rtol=1e-10, atol=1e-10)


def test_linear_transformers_load():
    parts = {"query": "q", "key": "k", "value": "v", "out": "o"}
    w = {f"{name}_projection.weight": random(E, E, seed=i) for i, name in enumerate(parts)}
    w |= {f"{name}_projection.bias": random(E, seed=9 + i) for i, name in enumerate(parts)}
    layer = fla.load_layer(PRESETS["linear_transformer"](E, H).double(), w)
    for name, letter in parts.items():
        own = getattr(layer, f"{letter}_proj")
        assert torch.equal(own.weight, w[f"{name}_projection.weight"])
        assert torch.equal(own.bias, w[f"{name}_projection.bias"])


def test_the_joint_projection_of_2021_loads():
    d = E // H
    w = {"qkvb_net.weight": random(H * (3 * d + 1), E), "o_net.weight": random(E, E, seed=1)}
    layer = fla.load_layer(PRESETS["delta_net_2021"](E, H).double(), w)
    for head, rows in enumerate(w["qkvb_net.weight"].split(3 * d + 1)):
        for i, letter in enumerate("qkv"):
            own = getattr(layer, f"{letter}_proj").weight
            assert torch.equal(own[head * d : head * d + d], rows[i * d : i * d + d])
        assert torch.equal(layer.gates.beta.proj.weight[head], rows[-1])
    assert torch.equal(layer.o_proj.weight, w["o_net.weight"])


def test_its_linear_attention_loads_too():
    shapes = {f"{letter}_proj.weight": (E, E) for letter in "qkvo"} | {"norm.weight": (E // H,)}
    w = {key: random(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    layer = fla.load_layer(FastWeightAttention(E, H, out_norm="rms").double(), w)
    assert torch.equal(layer.out_norm.weight, w["norm.weight"])


def test_layers_load_their_own_weights():
    for name, make in PRESETS.items():
        one, other = make(E, H), make(E, H)
        fla.load_layer(other, one.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters())), name


def test_every_weight_must_find_its_place():
    (preset, options), shapes, _ = LAYERS["KimiDeltaAttention"]
    w = {key: random(*shape) for key, shape in shapes.items()}
    make = PRESETS[preset]
    layer = make(E, H, head_dim=K, value_dim=V, **options)
    before = {key: x.clone() for key, x in layer.state_dict().items()}
    narrow = make(E, H, head_dim=K, value_dim=V, **options | {"out_gate_bias": False})
    wide = make(E, H, head_dim=K, value_dim=V, **options | {"gate_rank": V + 1})
    qwen = PRESETS["gated_delta_net"](E, H, head_dim=K, num_value_heads=4)
    for target, weights, match in [
        (
            narrow,
            w,
            "expected weights with a place in the layer, got 'g_proj.1.bias', which would be 'out_gate.1.bias'",
        ),
        (layer, w | {"extra": w["A_log"]}, "expected weights with a place in the layer, got 'extra'$"),
        (
            layer,
            w | {"conv1d.weight": random(28, 1, 4)},
            "expected weights with a place in the layer, got 'conv.weight'",
        ),
        (layer, {key: x for key, x in w.items() if key != "A_log"}, "expected weights for gates.g.A_log too, got none"),
        (
            layer,
            {key: x for key, x in w.items() if key != "k_conv1d.weight"},
            "got only q_conv1d.weight, v_conv1d.weight$",
        ),
        (wide, w, r"state_dict\['f_proj.0.weight'\]: expected \(4, 12\) for gates.g.proj.0.weight, got \(3, 12\)"),
        (
            qwen,
            {"in_proj_ba.weight": random(6, E)},
            r"state_dict\['in_proj_ba.weight'\]: expected \(8, 12\), got \(6, 12\)",
        ),
    ]:
        with pytest.raises(ValueError, match=match) as caught:
            fla.load_layer(target, weights)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[key]) for key, x in layer.state_dict().items())


OPTIONS = {  # of flash-linear-attention's layers, and our names
    "hidden_size": "embed_dim",
    "expand_k": "head_dim",
    "expand_v": "value_dim",
    "num_v_heads": "num_value_heads",
    "num_kv_heads": "num_key_heads and num_value_heads",
    "num_householder": "writes_per_read",
    "conv_size": "short_conv",
    "use_short_conv": "short_conv",
    "qk_activation": "activation or feature_map",
    "qk_norm": "feature_norm",
    "use_gate": "out_gate",
    "use_output_gate": "out_gate",
    "gate_low_rank_dim": "gate_rank",
    "layer_idx": "layer",
    "mode": "nothing",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_its_options_are_answered_with_ours(option):
    for make in (FastWeightAttention, *PRESETS.values()):
        with pytest.raises(TypeError, match=f"^unexpected keyword '{option}'; here it is {OPTIONS[option]}") as caught:
            make(E, H, **{option: 2})
        assert "\n" not in str(caught.value)


def test_explained_options_are_none_of_ours():
    for make in (FastWeightAttention, CombaAttention, RWKV7Attention):
        parameters = inspect.signature(make).parameters
        assert {"embed_dim", "num_heads"} < parameters.keys()
        assert not parameters.keys() & OPTIONS_ELSEWHERE.keys()
    with pytest.raises(TypeError, match="here it is an activation 2σ of gates"):
        FastWeightAttention(E, H, "delta", allow_neg_eigval=True)
