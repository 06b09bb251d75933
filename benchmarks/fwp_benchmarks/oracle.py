"""The oracle: the rules' mathematics once more, in NumPy float64.

Other implementations are compared with it, and it shares no code with the package. It is written to be checked line by
line against the papers: loops over one token after the other, without tricks. Nothing is validated here, and no input
is changed.

Shapes: q [B, T, Hq, K], k [B, n·T, Hk, K] and v [B, n·T, Hv, V], with n writes per read. The state is S [N, H, K, V],
which is read as Sᵀq. The sum of keys is z [N, H, K].
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


def ratio(a, b, eps=0.0):
    """a / (b + eps) for a vector a and a number b; 0 if b = 0."""
    return np.zeros_like(a) if b == 0 else a / (b + eps)


# ---- feature maps, over the last axis ----
def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dpfp(x, nu=1):
    """Schlag et al. 2021: r = relu([x, −x]); φ = [r ⊙ roll(r, 1), …, r ⊙ roll(r, ν)], of width 2dν."""
    r = np.maximum(np.concatenate([x, -x], -1), 0.0)
    return np.concatenate([r * np.roll(r, i, -1) for i in range(1, nu + 1)], -1)


def favor_plus(R):
    """Choromanski et al. 2021: φ = exp(−‖x‖²/2) / √(2m) · [exp(Rx), exp(−Rx)] with R [m, d].

    For random R the expectation of φ(q)·φ(k) is exp(q·k).
    """

    def phi(x):
        e = np.concatenate([np.exp(x @ R.T), np.exp(-x @ R.T)], -1)  # [..., 2m]
        return np.exp(-(x**2).sum(-1, keepdims=True) / 2) * e / np.sqrt(2 * len(R))

    return phi


def taylor(x):
    """[1, x, x⊗x/√2], so that φ(q)·φ(k) = 1 + q·k + (q·k)²/2."""
    xx = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], x.shape[-1] ** 2)
    return np.concatenate([np.ones_like(x[..., :1]), x, xx / np.sqrt(2)], -1)


FEATURE_MAPS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "elu+1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0.0))),
    "exp": np.exp,
    "softmax": softmax,
    "dpfp": dpfp,
    "taylor": taylor,
}


def normalise(x, feature_norm):
    """None: x. "l2": x / √(Σx² + 1e-6). "sum": x / Σx, 0 where Σx = 0."""
    if feature_norm == "l2":
        return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    if feature_norm == "sum":
        total = x.sum(-1, keepdims=True)
        return np.where(total == 0, 0.0, x / np.where(total == 0, 1.0, total))
    return x


# ---- the rules: one function each, found by its name ----
RULES: dict[str, Callable[..., Any]] = {}


def rule(step):
    """Enters a rule into `RULES`: a function for one write of one head.

    It maps S [K, V], k [K], v [V] and the gates to the new S. A gate is a number or a vector. g is the log decay. A
    rule that takes z [K] has attention normalisation, and z is the decayed sum of the keys before this one. The
    matrix forms I − … are deliberate: they differ from the package, which subtracts the retrieved value instead.
    """
    RULES[step.__name__] = step
    return step


def normalises(name):
    """Whether the rule of that name has attention normalisation."""
    return "z" in inspect.signature(RULES[name]).parameters


def diag(g, K):
    """Diag(exp g) [K, K] for g [K] or one number."""
    return np.diag(np.broadcast_to(np.exp(g), K))


@rule
def additive(S, k, v, z=None):
    """Katharopoulos et al. 2020 (2006.16236). Without the sum of keys: Schmidhuber 1991."""
    return S + np.outer(k, v)


@rule
def decay(S, k, v, g=0.0, z=None):
    """RetNet (2307.08621), with a decay of its own for each token as in Mamba-2 (2405.21060)."""
    return np.exp(g) * S + np.outer(k, v)


@rule
def gla(S, k, v, g=0.0, z=None):
    """Gated Linear Attention (2312.06635): Diag(α) S + k vᵀ."""
    return diag(g, len(k)) @ S + np.outer(k, v)


@rule
def delta(S, k, v, beta, z=None):
    """Schlag et al. 2021 (2102.11174). With z: its equation 25, which divides the retrieved value by zᵀk."""
    v_old = S.T @ k if z is None else ratio(S.T @ k, z @ k)
    return S + beta * np.outer(k, v - v_old)


@rule
def gated_delta(S, k, v, beta, g=0.0, z=None):
    """Gated DeltaNet (2412.06464): the delta rule on α S."""
    return delta(np.exp(g) * S, k, v, beta, z)


@rule
def kda(S, k, v, beta, g=0.0, z=None):
    """Kimi Linear (2510.26692): the delta rule on Diag(α) S."""
    return delta(diag(g, len(k)) @ S, k, v, beta, z)


@rule
def gdn2(S, k, v, b, w, g=0.0):
    """GDN-2 (2605.22791), equations 9 and 10: (I − k (b ⊙ k)ᵀ) Diag(α) S + k (w ⊙ v)ᵀ."""
    return (np.eye(len(k)) - np.outer(k, b * k)) @ diag(g, len(k)) @ S + np.outer(k, w * v)


@rule
def longhorn(S, k, v, beta):
    """Longhorn (2407.14207): argmin over X of ‖X − S‖² + β ‖Xᵀk − v‖², solved for a gradient of 0."""
    return np.linalg.solve(np.eye(len(k)) + beta * np.outer(k, k), S + beta * np.outer(k, v))


@rule
def comba(S, k, v, p, beta, g=0.0):
    """Comba (2506.02475), equation 5: (α I − β k pᵀ) S + β k vᵀ, a scalar plus low rank."""
    return (np.exp(g) * np.eye(len(k)) - beta * np.outer(k, p)) @ S + beta * np.outer(k, v)


@rule
def rwkv7(S, k, v, kappa, a, g=0.0):
    """RWKV-7 (2503.14456): W ← W (diag(w) − κᵀ(a ⊙ κ)) + vᵀ k with row vectors and W = Sᵀ."""
    W = S.T @ (diag(g, len(k)) - np.outer(kappa, a * kappa)) + np.outer(v, k)
    return W.T


@rule
def pkda(S, k, v, m, beta, g=0.0):
    """Preconditioned KDA (2604.21100): (I − β (m ⊙ k) kᵀ) Diag(α) S + β (m ⊙ k) vᵀ."""
    return (np.eye(len(k)) - beta * np.outer(m * k, k)) @ diag(g, len(k)) @ S + beta * np.outer(m * k, v)


def write(step, S, z, k, v, gates, denominator):
    """One write of one head. Returns the new S and the new z = exp(g) z + k."""
    z = np.exp(gates.get("g", 0.0)) * z
    S = step(S, k, v, **gates, z=z) if denominator else step(S, k, v, **gates)
    return S, z + k


def fast_weights(
    rule,
    q,
    k,
    v,
    *,
    mask=None,
    causal=True,
    read="after",
    scale=1.0,
    feature_map=None,
    feature_norm=None,
    denominator=False,
    eps=1e-6,
    S=None,
    z=None,
    cu_seqlens=None,
    **gates,
):
    """Any rule by its name, over whole sequences.

    Returns out [B, T, max(Hq, H), V], S [N, H, K', V] and z [N, H, K'] (None if unused). Gates are [B, n·T, H] or
    [B, n·T, H, K' or V]. A gate that is None counts as not given. feature_map is a name or any function. Token t of q
    has the writes n·t … n·t + n − 1. The mask [B, T] and cu_seqlens count tokens of q. The N sequences are the B
    rows, or the parts of row 0 between the numbers in cu_seqlens [N + 1].
    """
    phi = feature_map if callable(feature_map) else FEATURE_MAPS[feature_map]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    gates = {name: np.asarray(gate, np.float64) for name, gate in gates.items() if gate is not None}
    q, k = scale * normalise(phi(q), feature_norm), normalise(phi(k), feature_norm)
    B, T = q.shape[:2]
    writes = k.shape[1] // T if T else 1
    H = max(k.shape[2], v.shape[2])
    H_out = max(q.shape[2], H)
    k = np.repeat(k, H // k.shape[2], axis=2)  # state head h uses key head h // (H / Hk)
    v = np.repeat(v, H // v.shape[2], axis=2)
    q = np.repeat(q, H_out // q.shape[2], axis=2)
    K, V = k.shape[3], v.shape[3]
    mask = np.ones((B, T), bool) if mask is None else np.asarray(mask, bool)

    if cu_seqlens is None:
        sequences = [(b, range(T)) for b in range(B)]
    else:
        sequences = [(0, range(cu_seqlens[n], cu_seqlens[n + 1])) for n in range(len(cu_seqlens) - 1)]
    S = np.zeros((len(sequences), H, K, V)) if S is None else np.array(S, np.float64)
    z = np.zeros((len(sequences), H, K)) if z is None else np.array(z, np.float64)
    out = np.zeros((B, T, H_out, V))

    def read_out(n, b, t, h):  # for every query head that reads state head h
        for j in range(h * H_out // H, (h + 1) * H_out // H):
            o = S[n, h].T @ q[b, t, j]
            out[b, t, j] = ratio(o, z[n, h] @ q[b, t, j], eps) if denominator else o

    for n, (b, times) in enumerate(sequences):
        times = [t for t in times if mask[b, t]]  # a masked token leaves the state as it is, and its output is 0
        for h in range(H):
            for t in times:
                if causal and read == "before":
                    read_out(n, b, t, h)
                for i in range(writes * t, writes * t + writes):
                    now = {name: gate[b, i, h] for name, gate in gates.items()}
                    S[n, h], z[n, h] = write(RULES[rule], S[n, h], z[n, h], k[b, i, h], v[b, i, h], now, denominator)
                if causal and read == "after":
                    read_out(n, b, t, h)
            if not causal:  # every query reads the final state
                for t in times:
                    read_out(n, b, t, h)
    return out, S, z if denominator else None


def quadratic_masked(q, k, v, g=None, denominator=False, eps=1e-6):
    """(QKᵀ ⊙ M) V, where M_ij = exp(g_{j+1} + … + g_i) for i ≥ j, else 0.

    This is additive (g None), decay (g [B, T, H]) or gla (g [B, T, H, K]) from a zero state. For gla, M stands inside
    the sum over K. q, k and v have H heads each.
    """
    B, T, H, K = k.shape
    g = np.zeros((B, T, H, K)) if g is None else np.broadcast_to(g.reshape(B, T, H, -1), (B, T, H, K))
    out = np.zeros(v.shape)
    for b, h, i in np.ndindex(B, H, T):
        a = np.zeros(T)
        for j in range(i + 1):
            a[j] = (q[b, i, h] * k[b, j, h] * np.exp(g[b, j + 1 : i + 1, h].sum(0))).sum()
        out[b, i, h] = ratio(a @ v[b, :, h], a.sum(), eps) if denominator else a @ v[b, :, h]
    return out


# ---- a rule with a state of its own ----
def delta_rnn(q, k, v, *, beta, k_r, v_r, beta_r, W=None, R=None, y=None):
    """Delta RNN (2106.06295): y_t = W_t q_t + R_t softmax(y_{t−1}), where W and R are delta memories.

    y_0 = 0 unless given. Shapes: k_r and v_r [B, n·T, H, V], beta and beta_r [B, n·T, H]; q, k and v have H heads each.
    W [B, H, K, V] and R [B, H, V, V] are stored like S, and so read as Wᵀq.
    """
    B, T, H, K = q.shape
    V, writes = v.shape[3], k.shape[1] // T
    W = np.zeros((B, H, K, V)) if W is None else np.array(W, np.float64)
    R = np.zeros((B, H, V, V)) if R is None else np.array(R, np.float64)
    y = np.zeros((B, H, V)) if y is None else np.array(y, np.float64)
    out = np.zeros((B, T, H, V))
    for n, t, h in np.ndindex(B, T, H):
        for i in range(writes * t, writes * t + writes):
            W[n, h] += beta[n, i, h] * np.outer(k[n, i, h], v[n, i, h] - W[n, h].T @ k[n, i, h])
            R[n, h] += beta_r[n, i, h] * np.outer(k_r[n, i, h], v_r[n, i, h] - R[n, h].T @ k_r[n, i, h])
        y[n, h] = W[n, h].T @ q[n, t, h] + R[n, h].T @ softmax(y[n, h])
        out[n, t, h] = y[n, h]
    return out, W, R, y


# ---- Schmidhuber 1991 ----
def slow_fast_1991(slow, slow_in, fast_in, w, *, version, steepness=10.0):
    """One stream through a linear fast net: y(t) = w(t−1)ᵀ x(t), then w(t) = σ(w(t−1) + □w(t)) (eq. 7).

    slow: a function of slow_in[t] [d]. In version 1 it returns □w, row by row [a·b]. In version 2 it returns the
    patterns FROM and TO [a + b], and □w = FROM ⊗ TO. slow_in [T, d], fast_in [T, a], w = w(0) [a, b].
    σ(x) = 1/(1 + exp(−steepness · (x − 0.5))). With steepness None there is no σ, only the sum.
    Returns y [T, b] and the last w.
    """
    out = np.zeros((len(fast_in), w.shape[1]))
    for t in range(len(fast_in)):
        out[t] = w.T @ fast_in[t]
        s = slow(slow_in[t])
        w = w + (s.reshape(w.shape) if version == 1 else np.outer(s[: len(w)], s[len(w) :]))
        if steepness is not None:
            w = 1 / (1 + np.exp(-steepness * (w - 0.5)))
    return out, w


def slow_fast_1991_online(W, slow_in, fast_in, target, w, *, version, steepness=10.0, rate=1.0):
    """The same net while a linear slow net W [outputs, d] learns online.

    At each step W −= rate · ∂E(t)/∂W with E(t) = ½ Σ (target − y)². p[a, b] = ∂w_ab/∂W starts at 0 and is carried
    forward (eq. 2, 3, 4 and 6). target [T, b]. Returns y [T, b] and the last W.
    """
    (T, A), B = fast_in.shape, w.shape[1]
    out, p = np.zeros((T, B)), np.zeros((A, B, *W.shape))
    for t in range(T):
        out[t] = w.T @ fast_in[t]
        s, d_E = W @ slow_in[t], np.zeros(W.shape)
        w_new, p_new = np.zeros(w.shape), np.zeros(p.shape)
        for a, b in np.ndindex(A, B):
            d_E += (out[t, b] - target[t, b]) * fast_in[t, a] * p[a, b]
            d_box = np.zeros(W.shape)
            if version == 1:
                box = s[a * B + b]
                d_box[a * B + b] = slow_in[t]
            else:
                box = s[a] * s[A + b]
                d_box[a] = s[A + b] * slow_in[t]
                d_box[A + b] = s[a] * slow_in[t]
            w_new[a, b], slope = w[a, b] + box, 1.0
            if steepness is not None:
                w_new[a, b] = 1 / (1 + np.exp(-steepness * (w_new[a, b] - 0.5)))
                slope = steepness * w_new[a, b] * (1 - w_new[a, b])
            p_new[a, b] = slope * (p[a, b] + d_box)
        w, p, W = w_new, p_new, W - rate * d_E
    return out, W


# ---- Schmidhuber 1993 ----
def recurrent_1993(x, w, y, *, f, g, h, steepness=10.0):
    """One stream through the recurrent net of 1993, with l = [x, y] (eq. 3 and 4).

    y_i(t+1) = f(Σ_j w_ij(t) l_j(t)), then w_ij(t+1) = σ(w_ij(t) + g(l_j(t)) h(y_i(t+1))), with σ as above.
    x [T, d], w = w(1) [n, d + n], y = y(1) [n]. Returns y(2) … y(T + 1) [T, n] and the last w.
    """
    out = np.zeros((len(x), len(y)))
    for t in range(len(x)):
        seen = np.concatenate([x[t], y])
        y = f(w @ seen)
        w_new = np.zeros(w.shape)
        for i, j in np.ndindex(w.shape):
            w_new[i, j] = w[i, j] + g(seen[j]) * h(y[i])
            if steepness is not None:
                w_new[i, j] = 1 / (1 + np.exp(-steepness * (w_new[i, j] - 0.5)))
        w, out[t] = w_new, y
    return out, w
