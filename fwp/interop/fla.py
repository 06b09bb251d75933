"""flash-linear-attention's functions over `fwp.fast_weights`, with the names, arguments and results of its release 0.6.

They run on CPUs and GPUs, in float64 too. "chunk" and "fused_recurrent" name the `form` of `fwp.fast_weights`.
`load_layer` puts the weights of its layers into our presets.

Shapes: q, k [B, T, H, K], v [B, T, HV, V] with HV a multiple of H, gates as each docstring says; decays are in log
space. o [B, T, HV, V]. The state is [N, HV, K, V] in float32, or float64 for float64 inputs.

Arguments that all share:
    scale: of the queries; None: 1/√K.
    initial_state: [N, HV, K, V]; None: zeros. N = B, or the number of packed sequences.
    output_final_state: whether the state is returned; else it is None.
    use_qk_l2norm_in_kernel: whether q and k get unit length, x · rsqrt(Σx² + 1e-6).
    use_gate_in_kernel: whether g is a raw projection, made to a decay with A_log and dt_bias as `_log_decay` says.
        Without it A_log, dt_bias and lower_bound are not used.
    use_beta_sigmoid_in_kernel: whether beta is raw: β = σ(beta), or 2σ(beta) with allow_neg_eigval.
    reverse: whether time runs backwards.
    state_v_first: whether states are [N, HV, V, K].
    cu_seqlens: [N + 1], packed sequences in a batch of 1.
    cu_seqlens_cpu, chunk_indices, chunk_size, safe_gate, disable_recompute, max_num_seqs: change only how kernels run
        there, and nothing here.
    cp_context, use_graph, return_intermediate_states, gv: have no counterpart. ValueError where they are given.

Other errors are those of `fwp.fast_weights`: one line that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp import errors
from fwp.core import State, state_dtype, without_autocast
from fwp.functional import fast_weights
from fwp.interop.weights import load_layer as load_layer

Form = Literal["chunk", "recurrent"]
KeySums = tuple[Tensor, Tensor]  # a state [N, H, K, V], and its sum of keys [N, 1, H, K]


class _Shared(NamedTuple):
    """The arguments that all functions hand on as they are. unit: use_qk_l2norm_in_kernel."""

    scale: float | None
    initial_state: Any
    output_final_state: bool
    cu_seqlens: Tensor | None
    state_v_first: bool = False
    reverse: bool = False
    unit: bool = False


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | KeySums | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | KeySums | None]:
    """S ← S + k vᵀ, o = scale · Sᵀq, divided by scale · zᵀq + 1e-10 if normalize, with z the sum of the keys.

    With normalize states are pairs (S, z [N, 1, H, K]). An initial S alone means z = 0.
    """
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens)
    return _linear("chunk", q, k, v, shared, normalize)


fused_chunk_linear_attn = chunk_linear_attn


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | KeySums | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | KeySums | None]:
    """`chunk_linear_attn` token by token, by default without its denominator."""
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, reverse=reverse)
    return _linear("recurrent", q, k, v, shared, normalize)


def _linear(
    form: Form, q: Tensor, k: Tensor, v: Tensor, shared: _Shared, normalize: bool
) -> tuple[Tensor, Tensor | KeySums | None]:
    if not normalize:
        return _run(form, "additive", q, k, v, {}, shared)
    start, z = shared.initial_state, None
    if isinstance(start, tuple):
        start, z = start
        errors.tensor("initial_state[1]", z, (_sequences(q, shared), 1, *k.shape[2:]), device=q.device)
        z = z.squeeze(1)
    options = {"denominator": True, "eps": 1e-10}
    o, state = _core(form, "additive", q, k, v, {}, shared._replace(initial_state=start), z, **options)
    assert state.z is not None
    return o, (state.S, state.z.unsqueeze(1)) if shared.output_final_state else None


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← e^g S + k vᵀ, o = scale · Sᵀq. g [B, T, H], or g_gamma [H], the same for all tokens; neither: g = 0."""
    gates = {"g": _constant_decay(g, g_gamma, v)}
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first)
    return _run("chunk", "decay", q, k, v, gates, shared)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` token by token."""
    gates = {"g": _constant_decay(g, g_gamma, v)}
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse=reverse)
    return _run("recurrent", "decay", q, k, v, gates, shared)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` with e^g = 1 − 2^(−5−h) in head h = 0 … H − 1 (arXiv 2307.08621)."""
    return chunk_simple_gla(
        q, k, v, None, _retention_decay(q), scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention` token by token."""
    return fused_recurrent_simple_gla(
        q,
        k,
        v,
        None,
        _retention_decay(q),
        scale,
        initial_state,
        output_final_state,
        reverse,
        state_v_first,
        cu_seqlens,
    )


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← Diag(e^g) S + k vᵀ, o = scale · Sᵀq. g [B, T, H, K]."""
    gates = {"g": g}
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first)
    return _run("chunk", "gla", q, k, v, gates, shared)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gla` token by token, with g = gk [B, T, H, K]; None: g = 0."""
    _refuse(gv=gv)
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, reverse=reverse)
    return _run("recurrent", "gla", q, k, v, {"g": gk}, shared)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """S ← S + β k (v − Sᵀk)ᵀ, o = scale · Sᵀq. beta [B, T, HV]."""
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, unit=use_qk_l2norm_in_kernel)
    return _run("chunk", "delta", q, k, v, {"beta": beta}, shared)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_delta_rule` token by token; without beta β = 1."""
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, unit=use_qk_l2norm_in_kernel)
    return _run("recurrent", "delta", q, k, v, {"beta": _strength(beta, v)}, shared)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    chunk_size: int = 64,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← S' + β k (v − S'ᵀk)ᵀ with S' = e^g S, o = scale · Sᵀq. g, beta [B, T, HV]; A_log, dt_bias [HV]."""
    _refuse(cp_context=cp_context)
    gates = {
        "g": _log_decay(g, A_log, dt_bias) if use_gate_in_kernel else g,
        "beta": _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
    }
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, unit=use_qk_l2norm_in_kernel)
    return _run("chunk", "gated_delta", q, k, v, gates, shared)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_gated_delta_rule` token by token. gk [B, T, HV, K] decays each key channel as well; without beta β = 1."""
    _refuse(gv=gv)
    if use_gate_in_kernel:
        errors.tensor("g", g, (None, None, None))
        assert g is not None
        g = _log_decay(g, A_log, dt_bias)
    if gk is not None:
        gk = gk.to(state_dtype(gk.dtype))
        gk = gk if g is None else gk + g.to(state_dtype(g.dtype)).unsqueeze(-1)
    gates = {
        "g": g if gk is None else gk,
        "beta": _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
    }
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, unit=use_qk_l2norm_in_kernel)
    return _run("recurrent", "gated_delta" if gk is None else "kda", q, k, v, gates, shared)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    chunk_size: int = 64,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← S' + β k (v − S'ᵀk)ᵀ with S' = Diag(e^g) S, o = scale · Sᵀq.

    g [B, T, HV, K], beta [B, T, HV]; A_log [HV], dt_bias [HV · K]. With lower_bound the decay is bounded.
    """
    _refuse(
        cp_context=cp_context,
        use_graph=use_graph or None,
        return_intermediate_states=return_intermediate_states or None,
    )
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound: expected a number in [-5, 0) with safe_gate=True, got {lower_bound}")
    gates = {
        "g": _log_decay(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g,
        "beta": _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
    }
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, unit=use_qk_l2norm_in_kernel)
    return _run("chunk", "kda", q, k, v, gates, shared)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_kda` token by token."""
    gates = {
        "g": _log_decay(g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g,
        "beta": _strength(beta, v, use_beta_sigmoid_in_kernel, allow_neg_eigval),
    }
    shared = _Shared(scale, initial_state, output_final_state, cu_seqlens, state_v_first, unit=use_qk_l2norm_in_kernel)
    return _run("recurrent", "kda", q, k, v, gates, shared)


def _run(
    form: Form, rule: str, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor | None], shared: _Shared
) -> tuple[Tensor, Tensor | None]:
    """o, and the final state or None."""
    o, state = _core(form, rule, q, k, v, gates, shared)
    if not shared.output_final_state:
        return o, None
    return o, state.S.mT.contiguous() if shared.state_v_first else state.S


def _core(
    form: Form,
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor | None],
    shared: _Shared,
    z: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, State]:
    """The op's results. z [N, H, K]: the initial sum of keys, None for zeros."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        errors.tensor(name, x, (None, None, None, None))
    S, cu_seqlens, dtype = shared.initial_state, shared.cu_seqlens, state_dtype(v.dtype)
    state = None
    if S is not None or z is not None:
        N, H, K, V = _sequences(q, shared), max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1]
        if S is None:
            S = v.new_zeros(N, H, K, V, dtype=dtype)
        else:
            errors.tensor("initial_state", S, (N, H, V, K) if shared.state_v_first else (N, H, K, V), device=v.device)
            S = (S.mT if shared.state_v_first else S).to(dtype)
        if "denominator" in options:
            z = S.new_zeros(N, H, K) if z is None else z.to(dtype)
        state = State(S, z)
    if shared.reverse:
        q, k, v = (x.flip(1) for x in (q, k, v))
        gates = {name: None if gate is None else gate.flip(1) for name, gate in gates.items()}
        if cu_seqlens is not None:
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            state = _flipped(state)
    o, end = fast_weights(
        rule,
        q,
        k,
        v,
        scale=k.shape[-1] ** -0.5 if shared.scale is None else shared.scale,
        feature_norm="l2" if shared.unit else None,
        state=state,
        cu_seqlens=cu_seqlens,
        form=form,
        **(options | dict(gates)),
    )
    if shared.reverse:
        o = o.flip(1)
        end = end if cu_seqlens is None else _flipped(end)
    return o, end


def _flipped(state: Any) -> Any:
    """The state with its sequences in reverse order."""
    return None if state is None else State(state.S.flip(0), None if state.z is None else state.z.flip(0))


def _sequences(q: Tensor, shared: _Shared) -> int:
    return q.shape[0] if shared.cu_seqlens is None else len(shared.cu_seqlens) - 1


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None = None) -> Tensor:
    """−e^A_log softplus(g + dt_bias); with lower_bound lower_bound · σ(e^A_log (g + dt_bias)), where A_log may be None.

    g [B, T, H] or [B, T, H, K], A_log [H], dt_bias [H] or [H · K].
    """
    if A_log is None and lower_bound is None:
        raise ValueError("A_log: expected a tensor with use_gate_in_kernel=True, got None")
    with without_autocast(g):
        g = _wide(g)
        if dt_bias is not None:
            errors.tensor("dt_bias", dt_bias.flatten(), (math.prod(g.shape[2:]),), device=g.device)
            g = g + _wide(dt_bias).view(g.shape[2:])
        rate = None
        if A_log is not None:
            errors.tensor("A_log", A_log.flatten(), (g.shape[2],), device=g.device)
            rate = _wide(A_log).exp().view(-1, *[1] * (g.dim() - 3))
        if lower_bound is None:
            assert rate is not None
            return -rate * F.softplus(g)
        return lower_bound * torch.sigmoid(g if rate is None else rate * g)


def _strength(beta: Tensor | None, v: Tensor, raw: bool = False, neg: bool = False) -> Tensor:
    """β [B, T, HV] of an argument; without one 1. raw: σ(beta), or 2σ(beta) with neg."""
    if neg and not raw:
        raise ValueError("allow_neg_eigval: expected False without use_beta_sigmoid_in_kernel=True, got True")
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    if not raw:
        return beta
    return _wide(beta).sigmoid() * (2 if neg else 1)


def _constant_decay(g: Tensor | None, g_gamma: Tensor | None, v: Tensor) -> Tensor | None:
    """g [B, T, H] of one of two arguments, or None."""
    if g_gamma is None:
        return g
    if g is not None:
        raise ValueError("g_gamma: expected None beside g, got a tensor")
    errors.tensor("g_gamma", g_gamma, (v.shape[2],), device=v.device)
    return g_gamma.expand(v.shape[:3])


def _retention_decay(q: Tensor) -> Tensor:
    """log(1 − 2^(−5−h)) for each head, [H]."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(q.shape[2], dtype=state_dtype(q.dtype), device=q.device))))


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected its default, since it has no counterpart here, got another value")
