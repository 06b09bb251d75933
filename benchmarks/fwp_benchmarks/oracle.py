"""The mathematics once more, in NumPy float64: every other implementation is measured against this one.

It shares no code with the package and is written to be checked line by line against the papers: one token after the
other, loops, no tricks. Arrays are q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], the state S [N, H, K, V] with the
read-out Sᵀq and the sum of keys z [N, H, K]. Nothing is validated here, and no input is changed.
"""

import numpy as np

SCALAR_DECAY = ("decay", "gated_delta")
CHANNEL_DECAY = ("gla", "kda")
DELTA_FAMILY = ("delta", "gated_delta", "kda")


def ratio(a, b, eps=0.0):
    """a / (b + eps) for a vector a and a number b; 0 where b = 0."""
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
    """Choromanski et al. 2021: exp(−‖x‖²/2) / √(2m) · [exp(Rx), exp(−Rx)] with R [m, d]; E φ(q)·φ(k) = exp(q·k)."""

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


# ---- the six rules ----
def step(rule, S, z, k, v, beta, g, denominator):
    """One token of one head: S [K, V], z [K], k [K], v [V], beta a number, g a number or [K]; the new S and z."""
    if rule in SCALAR_DECAY:
        S, z = np.exp(g) * S, np.exp(g) * z
    if rule in CHANNEL_DECAY:
        S, z = np.diag(np.exp(g)) @ S, np.exp(g) * z
    if rule in DELTA_FAMILY:
        v_old = S.T @ k
        if denominator:  # Schlag et al. 2021: what is retrieved is normalised by the keys before this one
            v_old = ratio(v_old, z @ k)
        S = S + beta * np.outer(k, v - v_old)
    else:
        S = S + np.outer(k, v)
    return S, z + k


def fast_weights(
    rule,
    q,
    k,
    v,
    *,
    beta=None,
    g=None,
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
):
    """Any of the six rules. Returns out [B, T, max(Hq, H), V], S [N, H, K', V] and z [N, H, K'] (None if unused).

    beta [B, T, H]; g [B, T, H] or, for gla and kda, [B, T, H, K'], None standing for 0; feature_map a name or any
    function; N sequences: the B rows, or those between cu_seqlens [N + 1] in row 0.
    """
    phi = feature_map if callable(feature_map) else FEATURE_MAPS[feature_map]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k = scale * normalise(phi(q), feature_norm), normalise(phi(k), feature_norm)
    B, T = q.shape[:2]
    H = max(k.shape[2], v.shape[2])
    H_out = max(q.shape[2], H)
    k = np.repeat(k, H // k.shape[2], axis=2)  # state head h uses key head h // (H / Hk)
    v = np.repeat(v, H // v.shape[2], axis=2)
    q = np.repeat(q, H_out // q.shape[2], axis=2)
    K, V = k.shape[3], v.shape[3]
    g = np.zeros((B, T, H, K) if rule in CHANNEL_DECAY else (B, T, H)) if g is None else np.asarray(g, np.float64)
    mask = np.ones((B, T), bool) if mask is None else np.asarray(mask, bool)

    if cu_seqlens is None:
        sequences = [(b, range(T)) for b in range(B)]
    else:
        sequences = [(0, range(cu_seqlens[n], cu_seqlens[n + 1])) for n in range(len(cu_seqlens) - 1)]
    S = np.zeros((len(sequences), H, K, V)) if S is None else np.array(S, np.float64)
    z = np.zeros((len(sequences), H, K)) if z is None else np.array(z, np.float64)
    out = np.zeros((B, T, H_out, V))

    def read_out(n, b, t, h):  # every query head that belongs to state head h
        for j in range(h * H_out // H, (h + 1) * H_out // H):
            o = S[n, h].T @ q[b, t, j]
            out[b, t, j] = ratio(o, z[n, h] @ q[b, t, j], eps) if denominator else o

    for n, (b, times) in enumerate(sequences):
        times = [t for t in times if mask[b, t]]  # a masked token leaves the state as it is, its output is 0
        for h in range(H):
            for t in times:
                if causal and read == "before":
                    read_out(n, b, t, h)
                beta_t = None if beta is None else beta[b, t, h]
                S[n, h], z[n, h] = step(rule, S[n, h], z[n, h], k[b, t, h], v[b, t, h], beta_t, g[b, t, h], denominator)
                if causal and read == "after":
                    read_out(n, b, t, h)
            if not causal:  # every query reads the final state
                for t in times:
                    read_out(n, b, t, h)
    return out, S, z if denominator else None


def quadratic_masked(q, k, v, g=None, denominator=False, eps=1e-6):
    """(QKᵀ ⊙ M)V, M_ij = exp(g_{j+1} + … + g_i) for i ≥ j, else 0; with g [B, T, H, K] M is inside the sum over K.

    additive (g None), decay (g [B, T, H]) and gla from a zero state; all of q, k, v with H heads.
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


# ---- rules beyond the six; equal numbers of heads ----
def gdn2(q, k, v, *, b, w, g, S=None):
    """GDN-2 (2605.22791): S' = Diag(α)S; S = S' + k (w⊙v − S'ᵀ(b⊙k))ᵀ; b, g [B, T, H, K], w [B, T, H, V]."""
    B, T, H, K = k.shape
    S = np.zeros((B, H, K, v.shape[3])) if S is None else np.array(S, np.float64)
    out = np.zeros(v.shape)
    for n, t, h in np.ndindex(B, T, H):
        S_ = np.diag(np.exp(g[n, t, h])) @ S[n, h]
        S[n, h] = S_ + np.outer(k[n, t, h], w[n, t, h] * v[n, t, h] - S_.T @ (b[n, t, h] * k[n, t, h]))
        out[n, t, h] = S[n, h].T @ q[n, t, h]
    return out, S


def delta_rnn(q, k, v, *, beta, k_r, v_r, beta_r, W=None, R=None, y=None):
    """Delta RNN (2106.06295): y_t = W_t q_t + R_t softmax(y_{t−1}), W and R each a delta memory, y_0 = 0 unless given.

    k_r, v_r [B, T, H, V]; beta, beta_r [B, T, H]. W [B, H, K, V] and R [B, H, V, V] are stored as S is, read as Wᵀq.
    """
    B, T, H, K = k.shape
    V = v.shape[3]
    W = np.zeros((B, H, K, V)) if W is None else np.array(W, np.float64)
    R = np.zeros((B, H, V, V)) if R is None else np.array(R, np.float64)
    y = np.zeros((B, H, V)) if y is None else np.array(y, np.float64)
    out = np.zeros((B, T, H, V))
    for n, t, h in np.ndindex(B, T, H):
        W[n, h] += beta[n, t, h] * np.outer(k[n, t, h], v[n, t, h] - W[n, h].T @ k[n, t, h])
        R[n, h] += beta_r[n, t, h] * np.outer(k_r[n, t, h], v_r[n, t, h] - R[n, h].T @ k_r[n, t, h])
        y[n, h] = W[n, h].T @ q[n, t, h] + R[n, h].T @ softmax(y[n, h])
        out[n, t, h] = y[n, h]
    return out, W, R, y


# ---- Schmidhuber 1991 ----
def slow_fast_1991(slow, slow_in, fast_in, w, *, version, steepness=10.0):
    """One stream through a linear fast net: y(t) = w(t−1)ᵀ x(t), then w(t) = σ(w(t−1) + □w(t)) (eq. 7).

    slow maps [d] to, in version 1, □w itself, [a·b] row by row; in version 2, the patterns FROM and TO, [a + b], with
    □w = FROM ⊗ TO. slow_in [T, d], fast_in [T, a], w = w(0) [a, b]. σ(x) = 1/(1 + exp(−steepness · (x − 0.5)));
    steepness None leaves σ out: the plain sum. Returns y [T, b] and the last w.
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
    """The same net while a linear slow net W [outputs, d] learns, W −= rate · ∂E(t)/∂W, E(t) = ½ Σ (target − y)².

    p[a, b] = ∂w_ab/∂W is carried forward from 0 (eq. 2, 3, 4 and 6). target [T, b]. Returns y [T, b] and the last W.
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
    """y_i(t+1) = f(Σ_j w_ij(t) l_j(t)), l = [x, y], then w_ij(t+1) = σ(w_ij(t) + g(l_j(t)) h(y_i(t+1))) (eq. 3, 4).

    One stream: x [T, d], w = w(1) [n, d + n], y = y(1) [n]. Returns y(2) … y(T + 1), [T, n], and the last w.
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
