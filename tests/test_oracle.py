"""The oracle against numbers worked out by hand, then the op against the oracle."""

import itertools

import numpy as np
import pytest
import torch
from laws import RULES, chunk_size, forms
from numpy.testing import assert_allclose

import fwp
from fwp.testing import deviation, sample
from fwp_benchmarks import oracle

# Two tokens, one head, K = 2, V = 1, from S_0 = (2, −4) and z_0 = (1, 1).
Q = np.array([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
K = np.array([[1.0, 2.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
V = np.array([3.0, 5.0]).reshape(1, 2, 1, 1)
S_0 = np.array([2.0, -4.0]).reshape(1, 1, 2, 1)
Z_0 = np.ones((1, 1, 2))
BETA = np.array([1 / 2, 1 / 4]).reshape(1, 2, 1)
G = np.log([1 / 2, 1 / 4]).reshape(1, 2, 1)  # per head
G_K = np.log([[1 / 2, 1 / 4], [1 / 4, 1 / 2]]).reshape(1, 2, 1, 2)  # per key channel


def channels(*tokens):
    """The features of the two tokens as [1, 2, 1, features]."""
    return np.array(tokens, float).reshape(1, 2, 1, -1)


GATES = {
    "additive": {},
    "decay": {"g": G},
    "gla": {"g": G_K},
    "delta": {"beta": BETA},
    "gated_delta": {"beta": BETA, "g": G},
    "kda": {"beta": BETA, "g": G_K},
    "gdn2": {"b": channels((1 / 2, 1 / 4), (1, 0)), "w": channels(1 / 3, 2), "g": G_K},
    "longhorn": {"beta": BETA},
    "comba": {"p": channels((1, 1), (2, 0)), "beta": BETA, "g": G},
    "rwkv7": {"kappa": channels((1, 1), (0, 2)), "a": channels((1 / 2, 1 / 4), (1, 1 / 2)), "g": G_K},
    "pkda": {"m": channels((2, 1), (1, 3)), "beta": BETA, "g": G_K},
}


# kda: S' = (1, −1), retrieves −1 with k_1, error 4, half of it: S_1 = (1, −1) + 2·(1, 2) = (3, 3), read at q_1: 3;
# S' = (.75, 1.5), retrieves 2.25, error 2.75, a quarter of it: S_2 = S' + .6875·(1, 1), read at q_2: 3.625.
# gdn2: S' = (1, −1), b⊙k = (.5, .5) retrieves 0, w⊙v = 1: S_1 = (2, 1); S' = (.5, .5), b⊙k = (1, 0) retrieves .5 of 10.
# longhorn: ε = (1/2)/(1 + 5/2) = 1/7, error 3 + 6: S_1 = (2, −4) + 9/7·(1, 2); ε = (1/4)/(1 + 2/4) = 1/6, error 22/7.
# comba: p_1 retrieves −2 from S_0 itself, error 5: S_1 = (1, −2) + 5/2·(1, 2); p_2 retrieves 7, error −2.
# rwkv7: κ_1 retrieves −2 from S_0 itself: S_1 = (1, −1) + 2·(.5, .25) + 3·(1, 2); κ_2 retrieves 11 for (0, 1).
# pkda: as kda, but m⊙k = (2, 2) writes: S_1 = (1, −1) + 2·(2, 2); S' = (1.25, 1.5), error 2.25: + .5625·(1, 3).
@pytest.mark.parametrize(
    ("rule", "after", "before", "S"),
    [
        ("additive", (5, 17), (2, 7), (10, 7)),
        ("decay", (4, 12), (2, 8), (6, 6)),
        ("gla", (4, 13.5), (2, 9), (6, 7.5)),
        ("delta", (6.5, 8.25), (2, 11.5), (4.875, 3.375)),
        ("gated_delta", (4, 3.5), (2, 8), (1.75, 1.75)),
        ("kda", (3, 3.625), (2, 6), (1.4375, 2.1875)),
        ("gdn2", (2, 20), (2, 3), (10, 10)),
        ("longhorn", (23 / 7, 61 / 21), (2, 13 / 7), (80 / 21, -19 / 21)),
        ("comba", (3.5, 0.625), (2, 6.5), (0.375, 0.25)),
        ("rwkv7", (5, 3), (2, 10.5), (6.25, -3.25)),
        ("pkda", (5, 5), (2, 8), (1.8125, 3.1875)),
    ],
)
def test_two_tokens_by_hand(rule, after, before, S):
    for read, expected in (("after", after), ("before", before)):
        out, S_2, z = oracle.fast_weights(rule, Q, K, V, read=read, S=S_0, **GATES[rule])
        assert_allclose(out.ravel(), expected, rtol=1e-14)
        assert_allclose(S_2.ravel(), S, rtol=1e-14)
        assert z is None
        # the same two writes for one query, q_2, which reads after both or ahead of both
        out, S_2, _ = oracle.fast_weights(rule, Q[:, 1:], K, V, read=read, S=S_0, **GATES[rule])
        assert_allclose(out.ravel(), after[1] if read == "after" else 2 - 4, rtol=1e-14)
        assert_allclose(S_2.ravel(), S, rtol=1e-14)
    assert (S_0.ravel() == [2, -4]).all()  # the given state is not written to


def test_each_function_has_numbers_worked_out_by_hand():
    assert set(GATES) == set(oracle.RULES)


# kda again: z' = (.5, .25), z'·k_1 = 1, so S_1 = (3, 3) as above, z_1 = (1.5, 2.25), out_1 = 3 / 1.5;
# z' = (.375, 1.125), z'·k_2 = 1.5, retrieves 2.25 / 1.5 = 1.5, S_2 = (.75, 1.5) + .875·(1, 1), out_2 = 4 / 3.5.
@pytest.mark.parametrize(
    ("rule", "numerators", "denominators", "S", "z"),
    [
        ("additive", (5, 17), (2, 7), (10, 7), (3, 4)),
        ("decay", (4, 12), (1.5, 3), (6, 6), (1.375, 1.625)),
        ("gla", (4, 13.5), (1.5, 3.5), (6, 7.5), (1.375, 2.125)),
        ("delta", (4.5, 7.45), (2, 7), (5.475, 1.975), (3, 4)),
        ("gated_delta", (3.5, 3.3125), (1.5, 3), (1.71875, 1.59375), (1.375, 1.625)),
        ("kda", (3, 4), (1.5, 3.5), (1.625, 2.375), (1.375, 2.125)),
    ],
)
def test_denominator_by_hand(rule, numerators, denominators, S, z):
    eps = 0.5  # large enough to matter; it enters only the output, never the retrieved value
    out, S_2, z_2 = oracle.fast_weights(rule, Q, K, V, denominator=True, eps=eps, S=S_0, z=Z_0, **GATES[rule])
    assert_allclose(out.ravel(), np.array(numerators) / (np.array(denominators) + eps), rtol=1e-14)
    assert_allclose(S_2.ravel(), S, rtol=1e-14)
    assert_allclose(z_2.ravel(), z, rtol=1e-14)
    # the same two writes for one query
    (last,), S_2, z_2 = oracle.fast_weights(
        rule, Q[:, 1:], K, V, denominator=True, eps=eps, S=S_0, z=Z_0, **GATES[rule]
    )
    assert_allclose(last.ravel(), out.ravel()[1:], rtol=1e-14)
    assert_allclose(S_2.ravel(), S, rtol=1e-14)
    assert_allclose(z_2.ravel(), z, rtol=1e-14)


def test_denominator_without_any_key_before():
    # z_0 = 0: nothing is retrieved from S_0 by the first key. Then k_2 = 0 writes nothing, q_2 = 0 reads 0, not 0/0.
    q, k = Q.copy(), K.copy()
    q[0, 1] = k[0, 1] = 0
    out, S, _ = oracle.fast_weights("delta", q, k, V, beta=BETA, denominator=True, eps=0.0, S=S_0)
    assert_allclose(S.ravel(), (2 + 1.5, -4 + 3), rtol=1e-14)  # S_0 + ½ · 3 · (1, 2)
    assert_allclose(out.ravel(), (3.5, 0), rtol=1e-14)


def test_first_delta_token_by_hand_with_two_values():
    v = np.array([3.0, 7.0]).reshape(1, 1, 1, 2)
    S_0 = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)  # retrieves (1, 2) + 2·(3, 4) = (7, 10) with k_1
    _, S, _ = oracle.fast_weights("delta", Q[:, :1], K[:, :1], v, beta=BETA[:, :1], S=S_0)
    assert_allclose(S[0, 0], [[1 - 2, 2 - 1.5], [3 - 4, 4 - 3]], rtol=1e-14)  # + ½ (1, 2) ⊗ (−4, −3)


@pytest.mark.parametrize("rule", ["additive", "delta", "gated_delta", "kda"])
def test_orthonormal_keys_recall_exactly(rule):
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.normal(size=(5, 5)))[0].reshape(1, 5, 1, 5)
    values = rng.normal(size=(1, 5, 1, 3))
    beta = None if rule == "additive" else np.ones((1, 5, 1))
    _, S, _ = oracle.fast_weights(rule, keys, keys, values, beta=beta)
    assert_allclose(keys[0, :, 0] @ S[0, 0], values[0, :, 0], atol=1e-14)


def test_delta_replaces_where_the_sum_adds_up():
    keys, values = np.repeat(K[:, :1], 2, axis=1), V  # the same key twice, first with 3, then with 5
    delta, _, _ = oracle.fast_weights(
        "delta", keys, keys, values, beta=np.ones((1, 2, 1)), feature_norm="sum", scale=1.8
    )
    total, _, _ = oracle.fast_weights("additive", keys, keys, values, feature_norm="sum", scale=1.8)
    k_k = 5 / 9  # (1/3, 2/3) with itself; the scale 1.8 makes q·k one
    assert_allclose(delta.ravel(), (3, 3 * (1 - k_k) + 5), rtol=1e-14)
    assert_allclose(total.ravel(), (3, 8), rtol=1e-14)


@pytest.mark.parametrize("writes", [1, 2])
@pytest.mark.parametrize(("Hk", "Hv"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("rule", list(GATES))
def test_mask_packing_and_heads(rule, Hk, Hv, writes):
    rng = np.random.default_rng(1)
    T, Hq, d, dv = 7, 8, 3, 2  # H = 4
    q, *kv = rng.normal(size=(1, T, Hq, d)), (Hk, d), (Hv, dv)
    k, v = (rng.normal(size=(1, writes * T, *shape)) for shape in kv)
    gates = {}
    for name, gate in GATES[rule].items():
        features = () if gate.ndim == 3 else (d,) if gate.shape[3] == 2 else (dv,)
        gates[name] = rng.uniform(size=(1, writes * T, 4, *features)) * (-1 if name == "g" else 1)
    options = {"feature_map": "elu+1", "denominator": oracle.normalises(rule)}
    S, z = rng.normal(size=(3, 4, d, dv)), rng.uniform(size=(3, 4, d))
    mask = np.array([[1, 1, 0, 1, 1, 0, 1]], bool)
    cuts = [0, 4, 4, 7]
    whole, S_n, z_n = oracle.fast_weights(rule, q, k, v, mask=mask, S=S, z=z, cu_seqlens=cuts, **gates, **options)

    assert (whole[~mask] == 0).all()
    assert (S_n[1] == S[1]).all()  # the empty sequence
    assert z_n is None or (z_n[1] == z[1]).all()
    for n in range(3):  # each sequence alone, without its masked tokens, one state head after the other
        kept = [t for t in range(cuts[n], cuts[n + 1]) if mask[0, t]]
        written = [writes * t + i for t in kept for i in range(writes)]
        for h in range(4):
            h_k, h_v = (h // 2, h) if Hk == 2 else (h, h // 2)
            for h_q in (2 * h, 2 * h + 1):
                part, S_1, z_1 = oracle.fast_weights(
                    rule,
                    q[:, kept][:, :, [h_q]],
                    k[:, written][:, :, [h_k]],
                    v[:, written][:, :, [h_v]],
                    S=S[n : n + 1, h : h + 1],
                    z=z[n : n + 1, h : h + 1],
                    **{name: gate[:, written][:, :, [h]] for name, gate in gates.items()},
                    **options,
                )
                assert_allclose(whole[0, kept, h_q], part[0, :, 0], rtol=1e-13)
                assert_allclose(S_n[n, h], S_1[0, 0], rtol=1e-13)
                assert (z_n is None) == (z_1 is None)
                assert z_n is None or np.allclose(z_n[n, h], z_1[0, 0], rtol=1e-13, atol=0)


def test_one_query_head_for_several_state_heads():
    v = np.concatenate([V, 2 * V], axis=2)
    out, S, _ = oracle.fast_weights("additive", Q, K, v)
    assert out.shape == (1, 2, 2, 1)
    assert S.shape == (1, 2, 2, 1)
    assert_allclose(out[0, :, 0, 0], (3, 3 * 3 + 5 * 2), rtol=1e-14)
    assert_allclose(out[0, :, 1, 0], (6, 38), rtol=1e-14)


def test_not_causal_reads_the_final_state():
    mask = np.array([[True, True, False]])
    q, k, v = (np.concatenate([x, x[:, :1]], axis=1) for x in (Q, K, V))
    out, S, _ = oracle.fast_weights("additive", q, k, v, causal=False, mask=mask)
    assert_allclose(S.ravel(), (8, 11), rtol=1e-14)  # 3·(1, 2) + 5·(1, 1)
    assert_allclose(out.ravel(), (8, 19, 0), rtol=1e-14)


def test_reset():
    g = np.array([0.0, -np.inf]).reshape(1, 2, 1)
    for rule, gate in (("decay", g), ("gla", np.repeat(g[..., None], 2, axis=3))):
        out, S, z = oracle.fast_weights(rule, Q, K, V, g=gate, S=S_0, z=Z_0, denominator=True, eps=0.0)
        assert_allclose(out[0, 1], [[5]], rtol=1e-14)  # the second token alone
        assert_allclose(S.ravel(), (5, 5), rtol=1e-14)
        assert_allclose(z.ravel(), (1, 1), rtol=1e-14)
        assert_allclose(oracle.quadratic_masked(Q, K, V, gate)[0, 1], [[10]], rtol=1e-14)


@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("rule", ["additive", "decay", "gla"])
def test_quadratic_form(rule, denominator):
    rng = np.random.default_rng(2)
    q, k, v = rng.uniform(size=(2, 6, 3, 4)), rng.uniform(size=(2, 6, 3, 4)), rng.normal(size=(2, 6, 3, 5))
    g = {"additive": None, "decay": -rng.uniform(size=(2, 6, 3)), "gla": -rng.uniform(size=(2, 6, 3, 4))}[rule]
    out, _, _ = oracle.fast_weights(rule, q, k, v, g=g, denominator=denominator)
    assert_allclose(out, oracle.quadratic_masked(q, k, v, g, denominator), rtol=1e-13)


def test_feature_maps_by_hand():
    x = np.array([2.0, -3.0])
    # r = relu(2, −3, −2, 3) = (2, 0, 0, 3); rolled by 1: (3, 2, 0, 0), by 2: (0, 3, 2, 0)
    assert_allclose(oracle.dpfp(x), (6, 0, 0, 0))
    assert_allclose(oracle.dpfp(np.array([2.0, 3.0])), (0, 6, 0, 0))
    assert_allclose(oracle.dpfp(np.array([2.0, 3.0, 5.0]), nu=2), (0, 6, 15, 0, 0, 0, 0, 0, 10, 0, 0, 0))
    assert_allclose(oracle.FEATURE_MAPS["relu"](x), (2, 0))
    assert_allclose(oracle.FEATURE_MAPS["elu+1"](x), (3, np.exp(-3)))
    assert_allclose(oracle.FEATURE_MAPS["exp"](x), (np.exp(2), np.exp(-3)))
    assert_allclose(oracle.FEATURE_MAPS["softmax"](x), (1 / (1 + np.exp(-5)), 1 / (1 + np.exp(5))))
    r = np.sqrt(2)
    favor_plus = oracle.favor_plus(np.array([[1.0, 0.0]]))
    assert_allclose(favor_plus(x), (np.exp(-6.5 + 2) / r, np.exp(-6.5 - 2) / r))
    assert_allclose(oracle.taylor(x), (1, 2, -3, 4 / r, -6 / r, -6 / r, 9 / r))
    for name, phi in oracle.FEATURE_MAPS.items():
        assert phi(np.ones((0, 3))).shape == (0, {"taylor": 13, "dpfp": 6}.get(name, 3))


def test_norms_by_hand():
    assert_allclose(oracle.normalise(np.array([[1.0, 3.0], [0.0, 0.0]]), "sum"), [[0.25, 0.75], [0, 0]])
    assert_allclose(oracle.normalise(np.array([3e-3, 4e-3]), "l2"), np.array([3e-3, 4e-3]) / np.sqrt(26e-6))


def test_the_maps_and_norms_reach_the_op():
    # token 1 only: φ(q) = (0, 6, 0, 0), the norm makes it (0, 1, 0, 0), and so k; the scale is on q alone
    q = np.array([2.0, 3.0]).reshape(1, 1, 1, 2)
    for norm, q_k in ((None, 36), ("sum", 1), ("l2", 36 / (36 + 1e-6))):
        options = {"feature_map": "dpfp", "feature_norm": norm, "scale": 0.5}
        out, S, _ = oracle.fast_weights("additive", q, q, V[:, :1], **options)
        assert S.shape == (1, 1, 4, 1)
        assert_allclose(out.ravel(), 0.5 * q_k * 3, rtol=1e-14)


def test_taylor_inner_product():
    q, k = np.random.default_rng(3).normal(size=(2, 10, 5))
    q_k = (q * k).sum(-1)
    assert_allclose((oracle.taylor(q) * oracle.taylor(k)).sum(-1), 1 + q_k + q_k**2 / 2, rtol=1e-12)


def test_favor_plus_estimates_the_exponential():
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(2, 20, 4)) / 2
    phi = oracle.favor_plus(rng.normal(size=(50_000, 4)))
    for x, y in zip(q, k, strict=True):
        # of one feature pair the estimate is exp(−(‖x‖² + ‖y‖²)/2) cosh(r·s), s = x + y, with this standard deviation
        s = ((x + y) ** 2).sum()
        deviation = np.exp(-((x**2).sum() + (y**2).sum()) / 2) * np.sqrt((1 + np.exp(2 * s)) / 2 - np.exp(s))
        assert abs(phi(x) @ phi(y) - np.exp(x @ y)) < 4 * deviation / np.sqrt(50_000)


def test_delta_rnn_by_hand():
    q = k = k_r = np.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    v = np.array([[1.0, 0.5], [3.0, 4.0]]).reshape(1, 2, 1, 2)
    v_r = np.array([[4.0, 6.0], [2.0, 8.0]]).reshape(1, 2, 1, 2)
    one, half = np.ones((1, 2, 1)), np.full((1, 2, 1), 0.5)
    out, W, R, y = oracle.delta_rnn(q, k, v, beta=one, k_r=k_r, v_r=v_r, beta_r=half)
    # t = 1: W = e₁⊗(1, .5), R = e₁⊗(2, 3), softmax(y_0 = 0) = (½, ½): y = (1, .5) + ½·(2, 3) = (2, 2);
    # t = 2: W + e₂⊗(3, 4), R + e₂⊗(1, 4), softmax(2, 2) = (½, ½): y = (3, 4) + ½·(2, 3) + ½·(1, 4)
    assert_allclose(out[0, :, 0], [(2, 2), (4.5, 7.5)], rtol=1e-14)
    assert_allclose(W[0, 0], [[1, 0.5], [3, 4]], rtol=1e-14)
    assert_allclose(R[0, 0], [[2, 3], [1, 4]], rtol=1e-14)
    # a second call goes on, with a key seen before: R adds ½·((4, 6) − (2, 3)) to its row 1, softmax(4.5, 7.5) reads it
    out, _, R, _ = oracle.delta_rnn(
        q[:, :1], k[:, :1], v[:, :1], beta=one[:, :1], k_r=k_r[:, :1], v_r=v_r[:, :1], beta_r=half[:, :1], W=W, R=R, y=y
    )
    p = 1 / (1 + np.exp(3.0))
    assert_allclose(R[0, 0], [[3, 4.5], [1, 4]], rtol=1e-14)
    assert_allclose(out.ravel(), (1 + 3 * p + (1 - p), 0.5 + 4.5 * p + 4 * (1 - p)), rtol=1e-14)
    # both writes for one query: W and R as after t = 2, but y_1 was never read, so softmax(y_0) = (½, ½)
    out, W, R, _ = oracle.delta_rnn(q[:, 1:], k, v, beta=one, k_r=k_r, v_r=v_r, beta_r=half)
    assert_allclose(W[0, 0], [[1, 0.5], [3, 4]], rtol=1e-14)
    assert_allclose(R[0, 0], [[2, 3], [1, 4]], rtol=1e-14)
    assert_allclose(out.ravel(), (4.5, 7.5), rtol=1e-14)


MAPS = ({}, {"feature_map": "elu+1", "feature_norm": "sum"}, {"feature_map": "dpfp", "feature_norm": "l2"})
MASK = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool()
BOUNDS = torch.tensor([0, 0, 3, 4, 8])


@pytest.mark.parametrize("features", MAPS, ids=lambda features: str(features.get("feature_map", "identity")))
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name in oracle.RULES], ids=lambda rule: rule.name)
def test_the_op_equals_the_oracle(rule, features):
    """All reads, numbers of writes, packing, masks and normalisation together, in every form, with chunks of four."""
    normalisations = (False, True) if oracle.normalises(rule.name) else (False,)
    for read, writes, packed, masked, denominator in itertools.product(
        ("after", "before"), (1, 3), (False, True), (False, True), normalisations
    ):
        B, sequences = (1, len(BOUNDS) - 1) if packed else (2, None)
        heads, phi = {"Hq": 4, "Hk": 1, "Hv": 2}, features.get("feature_map")
        x = sample(
            rule,
            **{"B": B, "T": 8, "K": 4, "V": 3, "writes": writes, "sequences": sequences} | heads,
            feature_map=phi,
            denominator=denominator,
            state=True,
            seed=6,
        )
        options = {"read": read, "scale": 0.5, "eps": 0.1, "denominator": denominator, **features}
        given = x | ({"cu_seqlens": BOUNDS} if packed else {}) | ({"mask": MASK.expand(B, 8)} if masked else {})
        arrays = {name: value.numpy() for name, value in given.items() if name != "state"}
        S, z = (None if value is None else value.numpy() for value in x["state"])
        truth = oracle.fast_weights(rule.name, **arrays, **options, S=S, z=z)
        for form in forms(rule):
            with chunk_size(4):
                out, end = fwp.fast_weights(rule, **given, **options, **form)
            assert deviation(out, torch.from_numpy(truth[0])) < 1e-12
            assert deviation(end.S, torch.from_numpy(truth[1])) < 1e-12
            assert (end.z is None) == (truth[2] is None)
            assert end.z is None or deviation(end.z, torch.from_numpy(truth[2])) < 1e-12


def test_1991_net_by_hand():
    def sigma(x):
        return 1 / (1 + np.exp(-10 * (x - 0.5)))

    w, x = np.array([[0.5, 0.25], [1.0, 0.0]]), np.array([[1.0, 2.0], [1.0, 0.0]])
    patterns = np.array(
        [[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.0, 0.0]]
    )  # the slow net's outputs, as if it were the identity
    y, w_1 = oracle.slow_fast_1991(lambda s: s, patterns[:1], x[:1], w, version=1)
    assert_allclose(y, [[2.5, 0.25]], rtol=1e-14)  # w(0), not w(1)
    assert_allclose(w_1, sigma(np.array([[0.6, 0.45], [1.3, 0.4]])), rtol=1e-14)
    assert_allclose(w_1[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-14)
    y, w_2 = oracle.slow_fast_1991(lambda s: s, patterns, x, w, version=2)  # FROM (.1, .2), TO (.3, .4)
    w_1 = sigma(np.array([[0.53, 0.29], [1.06, 0.08]]))
    assert_allclose(y, [[2.5, 0.25], w_1[0]], rtol=1e-14)
    assert_allclose(w_2, sigma(w_1), rtol=1e-14)


def test_1991_latch():
    # without input the weights settle at one of two values, depending on which side of ½ they start
    still = np.zeros((50, 2))
    _, w = oracle.slow_fast_1991(lambda s: s, still, np.ones((50, 1)), np.array([[0.45, 0.55]]), version=1)
    assert_allclose(w, [[0.007, 0.993]], atol=5e-4)


def test_1991_plain_sum_is_the_additive_rule_read_before():
    rng = np.random.default_rng(5)
    k, v, q, W = rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), rng.normal(size=(8, 3)), rng.normal(size=(3, 2))
    y, w = oracle.slow_fast_1991(lambda s: s, np.concatenate([k, v], 1), q, W, version=2, steepness=None)
    q, k, v = (x[None, :, None] for x in (q, k, v))
    out, S, _ = oracle.fast_weights("additive", q, k, v, read="before", S=W[None, None])
    assert_allclose(y, out[0, :, 0], rtol=1e-12)
    assert_allclose(w, S[0, 0], rtol=1e-12)
