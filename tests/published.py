"""The newer published layers, written independently in plain torch, token by token, with published names of weights.

Each takes weights w {published name: tensor} and x [B, T, E], and returns y [B, T, E]. None uses code of the package.
"""

import torch
import torch.nn.functional as F


def linear(w, name, x):
    """x W, through two matrices if w has two, with a bias if w has one."""
    for i in ("0.", "1.") if f"{name}.0.weight" in w else ("",):
        x = F.linear(x, w[f"{name}.{i}weight"], w.get(f"{name}.{i}bias"))
    return x


def conv_silu(weight, x):
    """A causal convolution of width 4 per channel, then silu."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(4):
            if t - 3 + i >= 0:
                out[:, t] += weight[:, 0, i] * x[:, t - 3 + i]
    return F.silu(out)


def heads(x, H):
    return x.view(*x.shape[:2], H, -1)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(w, o):
    return o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["o_norm.weight"]


def softplus_decay(w, raw, per_channel):
    """g = −exp(A_log) softplus(raw + dt_bias). raw [B, T, H] or [B, T, H, K]."""
    rate = w["A_log"].exp()
    return -(rate[:, None] if per_channel else rate) * F.softplus(raw + w["dt_bias"].view(raw.shape[2:]))


def qkv(w, x, Hk, Hv):
    q, k, v = (conv_silu(w[f"{key}_conv1d.weight"], linear(w, f"{key}_proj", x)) for key in "qkv")
    return heads(q, Hk), heads(k, Hk), heads(v, Hv)


def finish(w, x, o, gate):
    """o [B, T, H, V] → y. gate: the activation of the output gate, or None."""
    o = rms(w, o)
    if gate is not None:
        o = o * gate(heads(linear(w, "g_proj", x), o.shape[2]))
    return linear(w, "o_proj", o.flatten(2))


def found(S, k):
    """Sᵀ k for S [B, H, K, V] and k [B, H, K]."""
    return torch.einsum("bhkv,bhk->bhv", S, k)


def product(k, v):
    return torch.einsum("bhk,bhv->bhkv", k, v)


def gla(w, x, H, Hk):
    """GatedLinearAttention of flash-linear-attention, with grouped queries."""
    q, k, v = (heads(linear(w, f"{key}_proj", x), n) for key, n in (("q", H), ("k", Hk), ("v", Hk)))
    g = heads(F.logsigmoid(linear(w, "gk_proj", x)) / 16, Hk)
    k, v, g = (y.repeat_interleave(H // Hk, 2) for y in (k, v, g))
    S, out = x.new_zeros(len(x), H, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        S = g[:, t].exp().unsqueeze(-1) * S + product(k[:, t], v[:, t])
        out.append(found(S, q[:, t]) * k.shape[-1] ** -0.5)
    return finish(w | {"o_norm.weight": w["g_norm_swish_gate.weight"]}, x, torch.stack(out, 1), F.silu)


def kda(w, x, Hk, Hv, neg=False):
    """KimiDeltaAttention of flash-linear-attention, whose decays belong to value heads."""
    q, k, v = qkv(w, x, Hk, Hv)
    beta = linear(w, "b_proj", x).sigmoid()[..., None] * (2 if neg else 1)
    g = softplus_decay(w, heads(linear(w, "f_proj", x), Hv), True)
    q, k = (y.repeat_interleave(Hv // Hk, 2) for y in (unit(q), unit(k)))
    S, out = x.new_zeros(len(x), Hv, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        S = g[:, t].exp().unsqueeze(-1) * S
        S = S + product(beta[:, t] * k[:, t], v[:, t] - found(S, k[:, t]))
        out.append(found(S, q[:, t]) * k.shape[-1] ** -0.5)
    return finish(w, x, torch.stack(out, 1), torch.sigmoid)


def gdn2(w, x, Hk, Hv, neg=False, gate=F.silu):
    """GatedDeltaNet2 of the authors (silu) and of flash-linear-attention (sigmoid)."""
    q, k, v = qkv(w, x, Hk, Hv)
    b = heads(linear(w, "b_proj", x).sigmoid(), Hk) * (2 if neg else 1)
    write = heads(linear(w, "w_proj", x).sigmoid(), Hv)
    g = softplus_decay(w, heads(linear(w, "f_proj", x), Hk), True)
    q, k, b, g = (y.repeat_interleave(Hv // Hk, 2) for y in (unit(q), unit(k), b, g))
    S, out = x.new_zeros(len(x), Hv, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        S = g[:, t].exp().unsqueeze(-1) * S
        S = S + product(k[:, t], write[:, t] * v[:, t] - found(S, b[:, t] * k[:, t]))
        out.append(found(S, q[:, t]) * k.shape[-1] ** -0.5)
    return finish(w, x, torch.stack(out, 1), gate)


def comba(w, x, H, Hv):
    """Comba as its training kernels compute it. With Hv > H p is repeated, which the published layer forgets."""
    q, k, v = qkv(w, x, H, Hv)
    p = w["decay"].sigmoid()[:, None] * k
    q = q - w["D"][:, None] * p
    q, k, p = (unit(y).repeat_interleave(Hv // H, 2) for y in (q, k, p))
    beta = linear(w, "b_proj", x).sigmoid()[..., None]
    alpha = softplus_decay(w, linear(w, "a_proj", x), False).exp()[..., None, None]
    S, out = x.new_zeros(len(x), Hv, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        S = alpha[:, t] * S - product(beta[:, t] * k[:, t], found(S, p[:, t])) + product(beta[:, t] * k[:, t], v[:, t])
        out.append(found(S, q[:, t]) * k.shape[-1] ** -0.5)
    return finish(w, x, torch.stack(out, 1), torch.sigmoid)


def delta_product(w, x, Hk, Hv, n, neg=True):
    """GatedDeltaProduct; without a decay or an output gate if w has none."""
    B, T, _ = x.shape
    q = unit(heads(conv_silu(w["q_conv1d.weight"], linear(w, "q_proj", x)), Hk)).repeat_interleave(Hv // Hk, 2)
    k = conv_silu(w["k_conv1d.weight"], linear(w, "k_proj", x)).view(B, T, n, Hk, -1)
    v = conv_silu(w["v_conv1d.weight"], linear(w, "v_proj", x)).view(B, T, n, Hv, -1)
    k = unit(k).repeat_interleave(Hv // Hk, 3)
    beta = linear(w, "b_proj", x).sigmoid().view(B, T, n, Hv, 1) * (2 if neg else 1)
    alpha = softplus_decay(w, linear(w, "a_proj", x), False).exp() if "A_log" in w else x.new_ones(B, T, Hv)
    S, out = x.new_zeros(B, Hv, k.shape[-1], v.shape[-1]), []
    for t in range(T):
        S = alpha[:, t, :, None, None] * S
        for j in range(n):
            S = S + product(beta[:, t, j] * k[:, t, j], v[:, t, j] - found(S, k[:, t, j]))
        out.append(found(S, q[:, t]) * k.shape[-1] ** -0.5)
    return finish(w, x, torch.stack(out, 1), F.silu if "g_proj.weight" in w else None)


def longhorn(w, x, H):
    """The problem that Longhorn's step solves, min |S − S_{t−1}|² + β |Sᵀk − v|², in a layer of our own."""
    q, k, v = qkv(w, x, H, H)
    beta = linear(w, "b_proj", x).sigmoid()[..., None, None]
    S, out = x.new_zeros(len(x), H, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        A = torch.eye(k.shape[-1], dtype=x.dtype) + beta[:, t] * product(k[:, t], k[:, t])
        S = torch.linalg.solve(A, S + beta[:, t] * product(k[:, t], v[:, t]))
        out.append(found(S, q[:, t]))
    return linear(w, "o_proj", torch.stack(out, 1).flatten(2) * F.silu(linear(w, "g_proj", x)))


def rwkv7(w, x, H, v_first):
    """RWKV-7's time mixing with BlinkDL's names and the paper's state [V, K]. Returns v_first too."""
    B, T, C = x.shape
    before, state, out, firsts = torch.zeros_like(x[:, 0]), x.new_zeros(B, H, C // H, C // H), [], []
    for t in range(T):
        now = x[:, t]
        xr, xw, xk, xv, xa, xg = (now + (before - now) * w[f"x_{key}"].view(C) for key in "rwkvag")
        before = now
        r, k, v = xr @ w["receptance.weight"].T, xk @ w["key.weight"].T, xv @ w["value.weight"].T
        d = w["w0"].view(C) + torch.tanh(xw @ w["w1"]) @ w["w2"]
        decay = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=x.dtype)) * d.sigmoid())
        a = (w["a0"].view(C) + xa @ w["a1"] @ w["a2"]).sigmoid()
        g = (xg @ w["g1"]).sigmoid() @ w["g2"]
        if v_first is None:
            firsts.append(v)
        else:
            v = v + (v_first[:, t] - v) * (w["v0"].view(C) + xv @ w["v1"] @ w["v2"]).sigmoid()
        kk = (k * w["k_k"].view(C)).view(B, H, -1)
        kk = kk / kk.norm(dim=-1, keepdim=True)
        k = k * (1 + (a - 1) * w["k_a"].view(C))
        r, decay, k, v, a = (y.view(B, H, 1, -1) for y in (r, decay, k, v, a))  # rows
        kk = kk.unsqueeze(2)
        state = state * decay + state @ (-kk.mT @ (kk * a)) + v.mT @ k
        y = (state @ r.mT).squeeze(-1)  # [B, H, N]
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + C // H * 1e-5).sqrt()
        y = y.flatten(1) * w["ln_x.weight"] + w["ln_x.bias"]
        bonus = (r * k * w["r_k"].view(1, H, 1, -1)).sum(-1, keepdim=True) * v
        out.append((y + bonus.flatten(1)) * g @ w["output.weight"].T)
    return torch.stack(out, 1), torch.stack(firsts, 1) if v_first is None else v_first
