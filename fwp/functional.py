"""The op: `fast_weights` runs any rule, `read` asks a given state.

`fwp.validate` checks the arguments. Then the rule is lowered onto the recurrence of `fwp.core`, and a backend runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fwp import canary, errors, feature_maps, observe, rules, trust, units, validate
from fwp._torch_private import tree_leaves, tree_map
from fwp.core import (
    Core,
    Features,
    Form,
    Read,
    ScaledState,
    State,
    differentiable,
    exports,
    overwrites,
    within,
    without_autocast,
)
from fwp.feature_maps import FeatureMap
from fwp.rules import Rule, lowering

trust.use_canary(canary.fault_of_kernels)

Backend = Literal["auto", "reference", "torch", "native", "triton"]


def fast_weights(
    rule: str | Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    read: Read = "after",
    scale: float = 1.0,
    feature_map: str | FeatureMap | None = None,
    feature_norm: Literal["sum", "l2"] | None = None,
    denominator: bool = False,
    eps: float = 1e-6,
    state: Any = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
    form: Literal["auto", "recurrent", "chunk"] = "auto",
    check: bool = False,
    **gates: Tensor | None,
) -> tuple[Tensor, Any]:
    """Programs fast weights with (k, v) and reads them with q: causal linear attention under any update rule.

    Per state head S ← decay(S) + write(k_t, v_t) and o_t = Sᵀ q_t, after q ← scale · norm(φ(q)) and k ← norm(φ(k)).

    Letters: B batch, T time, K and V features, K' the width of φ(k). There are H = max(Hk, Hv) state heads. Hk and Hv
    divide H, and Hq is a multiple or a divisor of H. More query heads than H share states, as in grouped queries.

    Several writes per read: where k, v and the gates have n·T tokens, query t reads after writes n·t … n·t + n − 1, or
    with read="before" ahead of them (DeltaProduct, arXiv 2502.10297).

    Args:
        rule: a name of `fwp.RULES` or a `Rule`.
        q, k, v: [B, T, Hq, K], [B, n·T, Hk, K], [B, n·T, Hv, V], n ≥ 1, one dtype: float16, bfloat16, float32 or
            float64. Under autocast they are cast to its dtype, unless they are float64. Never changed.
        mask: [B, T] bool; a False token neither writes, erases nor decays, and its output is 0.
        causal: False lets every query read the final state; for rules that neither decay nor erase.
        read: "after" the update of its own token, or "before" it (1991).
        scale: factor of the queries.
        feature_map: φ, a name of `fwp.FEATURE_MAPS`, "dpfp-ν", or a callable [..., K] → [..., K']. It and its norm are
            computed in the state's dtype, then rounded to q's: exp of 12 is infinite in float16, which `check` finds.
        feature_norm: "sum" divides φ by the sum of its features, "l2" makes it unit length.
        denominator: attention normalisation, o_t = Sᵀq / (zᵀq + eps) with z the (decayed) sum of keys, 0 where
            zᵀq = 0. Rules that erase divide the retrieved value by zᵀk likewise, as in the 2021 paper.
        eps: ≥ 0, added to the denominator of the output. With "exp", "favor+" and other maps that have a `logarithm` it
            counts in the units of `fwp.units`, in which these features neither overflow nor underflow.
        state: what an earlier call returned; for rules on one matrix `State(S [N, H, K', V], z [N, H, K'] or None)`,
            and a `ScaledState` where features count in units.
        cu_seqlens: [N + 1] int32 or int64 on v's device, in tokens of q; B = 1 and N sequences lie end to end, the i-th
            from cu_seqlens[i] on.
        backend: "auto" takes the fastest backend that can serve the call. An explicit one that can't raises an error.
        form: "recurrent" token by token, "chunk" by matrix products; "auto" is recurrent for one token.
        check: check values too, which synchronises a GPU: q, k (after φ), v and state are finite, gates are in range,
            and keys have at most unit length where the rule needs it.
        gates: what the rule asks for (`fwp list`), [B, n·T, H] or [B, n·T, H, K'] or [B, n·T, H, V], computed in the
            state's dtype. Decays g are in log space.

    Returns:
        out [B, T, max(Hq, H), V] in v's dtype, and the final state in float32 (float64 for float64 inputs). The state
        shares no memory with other tensors.

    Raises:
        TypeError: a missing or unknown gate, or a wrong dtype.
        ValueError: a wrong shape, name or value, or a backend that can't serve the request.

    Source: each rule's `paper`; the normalised delta rule is equation 25 of arXiv 2102.11174.
    """
    asked = dict(locals()) if observe.observed() else None
    row = rules.get(rule)
    q, k, v = _under_autocast(q, k, v)
    writes = validate.tensors(row, q, k, v)
    validate.options(
        row,
        causal=causal,
        read=read,
        scale=scale,
        denominator=denominator,
        eps=eps,
        backend=backend,
        form=form,
        check=check,
    )
    if cu_seqlens is not None:
        validate.packing(cu_seqlens, q.shape[0], q.shape[1], check, device=v.device)
        cu_seqlens = cu_seqlens if cu_seqlens.device.type == "cpu" else within(cu_seqlens, q.shape[1])
    if mask is not None:
        errors.tensor("mask", mask, tuple(q.shape[:2]), torch.bool, v.device)
    core = Core(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens,
        read=read,
        denominator=denominator,
        eps=eps,
        causal=causal,
        features=Features(),  # torch.compile can't trace the default object
        writes=writes,
    )
    scaled = units.serve(row, denominator, feature_map, feature_norm)
    written = None if mask is None else mask if writes == 1 else mask.repeat_interleave(writes, 1)
    core, given = _prepared(row, core, gates, mask, written, feature_map, feature_norm, scale, scaled)
    state = differentiable(state)
    if row.plain:
        core = validate.with_state(core, state, scaled)
    else:
        validate.own_state(row, core, state)
    log_scale = None
    if scaled:
        if exports():
            raise ValueError("feature_map: expected no exponential with a denominator for ONNX, got one")
        with without_autocast(v):
            core, log_scale = units.to_units(row, core, scale, state, written)
    if check:
        seen = feature_maps.applied(core)
        validate.values(row, seen.q, seen.k, seen.v, given, state)

    lowered = None
    if row.lower is not None and (backend != "reference" or not causal):  # the reference runs the equation itself
        with without_autocast(v):
            lowered = lowering.with_rescale(row.lower(core, **given))
    if not causal and (lowered is None or lowered.g is not None or lowered.erases):
        raise ValueError(f"causal: False needs a rule that neither decays nor erases, got {row.name!r}")
    name, form = choose(lowered, backend, form, q)
    if asked is not None:
        observe.tell(asked, name, form)
    if lowered is None or name == "reference":
        from fwp.backends import reference

        with without_autocast(v):
            out, end = reference.run(row, core, given, mask, core.initial() if row.plain else state)
    else:
        out, end = _backend(name).run(lowered, form)
    if mask is not None:
        out = out.masked_fill(~mask[:, :, None, None], 0)
    if log_scale is not None:
        end = ScaledState(end.S, end.z, log_scale)
    return out.to(v.dtype), _owned(end, state)


def _prepared(
    row: Rule,
    core: Core,
    gates: Mapping[str, Tensor | None],
    mask: Tensor | None,
    written: Tensor | None,
    feature_map: str | FeatureMap | None,
    feature_norm: str | None,
    scale: float,
    scaled: bool,
) -> tuple[Core, dict[str, Tensor]]:
    """The core with feature map and mask applied, and the rule's gates, checked. written: the mask of k, v and gates.

    The feature map is left to the backend where the backend can apply it and the rule's lowering doesn't look at k.
    scaled: q and k become the logarithms of their features, in the state's dtype.
    """
    q, k, v = core.q, core.k, core.v
    if mask is not None and written is not None:
        q = q.masked_fill(~mask[:, :, None, None], 0)
        k, v = (x.masked_fill(~written[:, :, None, None], 0) for x in (k, v))
    deferred = core.causal and not row.lower_uses_k and not scaled
    features, zero = feature_maps.kernel_features(feature_map, feature_norm, scale) if deferred else None, 0.0
    if scaled:
        log_phi = feature_maps.logarithm(feature_map)
        assert log_phi is not None
        q, k = feature_maps.log_features(log_phi, q), feature_maps.log_features(log_phi, k)
        features, zero = core.features, -math.inf
    elif features is None:
        q = feature_maps.transform(q, feature_map, feature_norm, scale)
        k = feature_maps.transform(k, feature_map, feature_norm)
        features = core.features
    else:
        zero = feature_maps.preimage_of_zero(features)
    core = replace(core, q=q, k=k, v=v, features=features)
    given = validate.gates(row, gates, (*k.shape[:2], core.heads, core.width, v.shape[-1]), v)
    if written is None:
        return core, given
    for name, gate in given.items():
        masked = ~written.view(*written.shape, *[1] * (gate.dim() - 2))
        given[name] = gate.masked_fill(masked, row.gates[name].neutral)
    k = k.masked_fill(~written[:, :, None, None], zero)  # φ(0) need not be 0
    return replace(core, k=k), given


def _owned(end: Any, given: Any) -> Any:
    """The final state in its own memory: not the given state (T = 0), nor a view that keeps a larger buffer alive."""
    before = tree_leaves(given)

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.clone() if any(x is y for y in before) and not overwrites() else x.contiguous()

    return tree_map(own, end)


def read(
    state: State | ScaledState,
    q: Tensor,
    *,
    scale: float = 1.0,
    feature_map: str | FeatureMap | None = None,
    feature_norm: Literal["sum", "l2"] | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o = Sᵀ q, or Sᵀ q / (zᵀ q + eps) if the state has z: queries against given fast weights.

    state: `State(S [N, H, K', V], z)` or a `ScaledState`. q: [N, T, Hq, K], or [1, T, Hq, K] with cu_seqlens [N + 1].
    The rest is as in `fast_weights`, with the feature map the state was written with.
    Returns [N or 1, T, max(Hq, H), V] in q's dtype. Under autocast q is cast as there. For cross attention and
    inspection. Errors as in `fast_weights`.
    """
    errors.number("scale", scale)
    errors.number("eps", eps, 0)
    (q,) = _under_autocast(q)
    errors.tensor("q", q, (None, None, None, None))
    from fwp.backends import chunked

    log_phi = feature_maps.logarithm(feature_map) if feature_norm is None and isinstance(state, ScaledState) else None
    if log_phi is None:
        x = feature_maps.transform(q, feature_map, feature_norm, scale)
    else:
        x = feature_maps.log_features(log_phi, q)
    validate.readable(state, x, cu_seqlens, scaled=log_phi is not None)
    state = differentiable(state)
    if isinstance(state, ScaledState):
        with without_autocast(q):
            x = units.asked(state, x, scale, cu_seqlens).to(q.dtype)
    B, T = q.shape[:2]
    if cu_seqlens is not None and cu_seqlens.device.type != "cpu":
        cu_seqlens = within(cu_seqlens, T)
    nothing = x.new_zeros(()).expand(B, T, state.S.shape[1], 1)
    core = Core(
        x,
        nothing.expand(B, T, state.S.shape[1], x.shape[-1]),
        nothing.expand(B, T, state.S.shape[1], state.S.shape[-1]),
        S=state.S,
        z=state.z,
        cu_seqlens=cu_seqlens,
        denominator=state.z is not None,
        eps=eps,
        causal=False,
        features=Features(),  # torch.compile can't trace the default object
    )
    return chunked.read(core).to(q.dtype)


def choose(core: Core | None, backend: str, form: str, q: Tensor) -> tuple[str, Form]:
    """The backend and form that run a lowered core (None: the rule has no lowered form) for queries q."""
    if backend == "auto" and exports() and (core is None or core.causal):
        if core is None:
            raise ValueError("rule: expected one with a lowering for LinearAttention of ONNX, got one without")
        if why := _refusal("onnx", core, "recurrent"):
            raise ValueError(why)
        return "onnx", "recurrent"
    if core is None:
        if backend not in ("auto", "reference"):
            raise ValueError(f"backend: {backend!r} serves rules that lower onto the recurrence, this one does not")
        backend = "reference"
    if backend == "reference":
        if form == "chunk":
            raise ValueError("form: the reference runs token by token, expected 'recurrent' or 'auto', got 'chunk'")
        return "reference", "recurrent"
    assert core is not None
    picked: Form = "recurrent" if form == "recurrent" or (form == "auto" and q.shape[1] == 1) else "chunk"
    if backend == "auto":
        if q.is_cuda and q.dtype != torch.float64 and _refusal("triton", core, picked) is None:
            if (reason := trust.reason_to_distrust(core, picked)) is None:
                return "triton", picked
            trust.warn_of_torch(reason)
        if q.is_cpu and not exports():
            if (reason := _refusal("native", core, picked)) is None:
                return "native", picked
            if reason.startswith("no kernel: "):
                trust.warn_of_torch(reason)
        return "torch", picked
    if why := _refusal(backend, core, picked):
        raise ValueError(f"backend: {backend!r} can't serve this: {why}")
    if backend == "triton" and (reason := trust.reason_to_distrust(core, picked)):
        raise RuntimeError(f"backend: 'triton' is not to be trusted here: {reason}")
    return backend, picked


class _Backend(Protocol):
    """The functions of each module of `fwp.backends` that serves a lowered core."""

    def refuses(self, core: Core, form: Form) -> str | None: ...

    def run(self, core: Core, form: Form) -> tuple[Tensor, State]: ...


def _backend(name: str) -> _Backend:
    if name == "triton":
        from fwp.backends import triton

        return triton
    if name == "native":
        from fwp.backends import native

        return native
    if name == "onnx":
        from fwp.backends import onnx

        return onnx
    from fwp.backends import chunked

    return chunked


def _refusal(name: str, core: Core, form: Form) -> str | None:
    """Why a backend can't serve these inputs."""
    if name == "torch":
        return None
    try:
        module = _backend(name)
    except ImportError as error:
        return f"{name} is not installed ({error})"
    return module.refuses(core, form)


def _under_autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in autocast's dtype where it is on; gates and state stay in float32."""
    kind = inputs[0].device.type if isinstance(inputs[0], Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return inputs
    dtype, cast = torch.get_autocast_dtype(kind), (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in cast else x for x in inputs)
