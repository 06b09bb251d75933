"""One net programs the weights of another, step by step: Schmidhuber 1991/92, and the recurrent form of 1993."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from fwp import errors
from fwp.core import Read, differentiable, state_dtype, without_autocast
from fwp.errors import suggest
from fwp.nn.stateful import Stateful
from fwp.states import FastWeights, Online, RecurrentState, Weights

Update = Literal["bounded", "additive"]


class SlowFastNet(Stateful):
    """A slow net S programs a fast net F: from every input S makes changes □w of all of F's weights.

    For t = 1 … T: y(t) = F(x(t)) with the weights w(t − 1), then w(t) = σ(w(t − 1) + □w(t)), where S makes □w(t) from
    x(t) and σ(x) = 1 / (1 + exp(−steepness · (x − 0.5))). The weights W_S of S are trained. The fast weights w are
    not parameters: they hold what S wrote.

    Args:
        slow: S, any module [N, …] → [N, outputs], of one step at a time.
        fast: F, any module. Its parameters are names and shapes of the fast weights; their values are never used, and
            their requires_grad is switched off.
        version: 1: S has one output for each fast weight, in the order of `fast.named_parameters()` (eq. 4).
            2: for each layer of F, S has an output FROM_a per input of the layer and an output TO_b per output, and
            □w_ab = FROM_a · TO_b (eq. 5). A layer is a parameter "weight" of shape [out, in], with or without a "bias"
            of shape [out]. A bias is the weight from a unit that is always on, which has a FROM of its own. For each
            layer in turn, S's outputs are FROM [in] (with a bias [in + 1], its own last), then TO [out].
        update: "bounded" is σ (eq. 7); "additive" leaves it out, w(t) = w(t − 1) + □w(t).
        steepness: T of eq. 7. With 10, a weight to which nothing is written stays at 0.007 or 0.993, as in a latch.
        read: "before" the update, as above, or "after" it: y(t) = F(x(t)) with w(t).

    Raises: ValueError for what doesn't fit, in the constructor or when S or F is first called.

    Version 2, additive, read "after", is linear attention without normalisation: FROM is the key, TO the value, F's
    input the query. Source: Learning to control fast-weight memories, Neural Computation 4(1), 1992; FKI-147-91, 1991.
    """

    def __init__(
        self,
        slow: nn.Module,
        fast: nn.Module,
        version: Literal[1, 2] = 2,
        *,
        update: Update = "bounded",
        steepness: float = 10.0,
        read: Read = "before",
    ) -> None:
        super().__init__()
        _one_of("version", version, (1, 2))
        _one_of("update", update, ("bounded", "additive"))
        _one_of("read", read, ("before", "after"))
        self.slow, self.fast = slow, fast.requires_grad_(False)
        self.version, self.update, self.steepness, self.read = version, update, steepness, read
        self.shapes = {name: w.shape for name, w in fast.named_parameters()}
        if not self.shapes:
            raise ValueError(f"fast: expected a module with parameters, got {type(fast).__name__}")
        self.layers = _layers(self.shapes) if version == 2 else {}

    @property
    def outputs(self) -> int:
        """The number of outputs that S must have."""
        if self.version == 1:
            return sum(shape.numel() for shape in self.shapes.values())
        return sum(sum(self.shapes[weight]) + int(bias is not None) for weight, bias in self.layers.items())

    def forward(
        self, x: Tensor, state: Weights | None = None, fast_input: Tensor | None = None
    ) -> tuple[Tensor, FastWeights]:
        """x [B, T, …] → y [B, T, …] and the fast weights after it, {name: [B, *its shape]}.

        state: w(0), what an earlier call returned; None: zeros. The paper starts from `begin(x_0)`.
        fast_input: [B, T, …], F's input if it differs from S's input x.

        The fast weights are float32 (float64 for float64 outputs of S), under autocast and in 16-bit nets too.
        Autograd through it is the paper's unfolding in time.
        """
        if x.dim() < 2 or x.shape[1] == 0:
            raise ValueError(f"x: expected (B, T, …) with T ≥ 1, got {tuple(x.shape)}")
        B, T = x.shape[:2]
        seen = x if fast_input is None else fast_input
        if seen.shape[:2] != x.shape[:2]:
            raise ValueError(f"fast_input: expected ({B}, {T}, …), got {tuple(seen.shape)}")
        steps = {name: w.unflatten(0, (B, T)).unbind(1) for name, w in self.begin(x.flatten(0, 1)).items()}
        w = (
            {name: torch.zeros_like(steps[name][0]) for name in steps}
            if state is None
            else differentiable(self._checked(state, B))
        )
        y = []
        for t in range(T):
            before = w
            w = {name: self._squash(w[name] + steps[name][t]) for name in w}
            y.append(vmap(self._run_fast, randomness="different")(before if self.read == "before" else w, seen[:, t]))
        return torch.stack(y, 1), FastWeights(w)

    def begin(self, x: Tensor) -> FastWeights:
        """The paper's time step 0: w(0) = □w(0), not squashed. x [B, …] → {name: [B, *its shape]}, a state."""
        return FastWeights(self._changes(self.slow(x)))

    # ---- online ----

    def begin_online(self, slow: Weights, x: Tensor) -> Online:
        """Time step 0 of one stream: w(0) = □w(0) and, as in the paper, ∂w(0)/∂W_S = 0. x […]; slow as below."""
        w = self._run_slow(slow, x)
        p = {
            name: {W: now.new_zeros(*self.shapes[name], *weight.shape) for W, weight in slow.items()}
            for name, now in w.items()
        }
        return Online(w, p)

    def step_online(
        self,
        slow: Weights,
        carried: Online,
        x: Tensor,
        target: Tensor,
        fast_input: Tensor | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = lambda y, target: 0.5 * (y - target).square().sum(),
    ) -> tuple[Weights, Tensor, Online]:
        """One step of one stream: the gradient of its error E(t) with respect to W_S, y(t), and what to carry on.

        slow: W_S, as in `dict(net.slow.named_parameters())`. x, target, fast_input: […], without a batch.
        loss: E(t) of y and target, by default ½ Σ (target − y)².

        With p = ∂w/∂W_S, of |w| |W_S| numbers: ∂E(t)/∂W_S = Σ ∂E(t)/∂w(t − 1) p(t − 1) (eq. 2), then
        p(t) = σ'(w(t − 1) + □w(t)) (p(t − 1) + ∂□w(t)/∂W_S) (eq. 3). While W_S stays the same, the gradients of a
        sequence add up to that of unfolding in time from the same w(0).

        It is a pure function: `torch.func.vmap` runs many nets at once.
        """

        def change(slow: Weights) -> tuple[Weights, Weights]:
            w = self._run_slow(slow, x)
            return w, w

        def error(w: Weights) -> tuple[Tensor, Tensor]:
            y = self._run_fast(w, x if fast_input is None else fast_input)
            return loss(y, target), y

        before, p = differentiable(carried)
        jacobian, step = jacrev(change, has_aux=True)(slow)
        w = {name: self._squash(before[name] + step[name]) for name in before}
        slope = {name: self._slope(w[name]) for name in w}
        after = {
            name: {
                W: slope[name].reshape(*slope[name].shape, *[1] * slow[W].dim()) * (p[name][W] + jacobian[name][W])
                for W in slow
            }
            for name in w
        }
        delta, y = grad(error, has_aux=True)(before if self.read == "before" else w)
        at = p if self.read == "before" else after
        with without_autocast(x):
            gradient = {
                W: torch.stack([torch.tensordot(d, at[name][W], d.dim()) for name, d in delta.items()])
                .sum(0)
                .to(W_S.dtype)
                for W, W_S in slow.items()
            }
        return gradient, y, Online(w, after)

    # ---- the parts ----

    def _run_slow(self, slow: Weights, x: Tensor) -> Weights:
        """□w of one input x […], with the weights W_S."""
        w = self._changes(functional_call(self.slow, slow, (x.unsqueeze(0),)))
        return {name: w[name].squeeze(0) for name in w}

    def _run_fast(self, w: Weights, x: Tensor) -> Tensor:
        """F of one input x […], with the weights w."""
        if x.dtype in (torch.float16, torch.bfloat16):
            w = {name: weight.to(x.dtype) for name, weight in w.items()}
        return functional_call(self.fast, w, (x.unsqueeze(0),)).squeeze(0)

    def _changes(self, s: Tensor) -> Weights:
        """S's outputs s [N, outputs] as □w, {name: [N, *its shape]}."""
        if s.dim() != 2 or s.shape[1] != self.outputs:
            shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in self.shapes.items())
            raise ValueError(
                f"slow: expected (N, {self.outputs}) for version {self.version} with {shapes}, got {tuple(s.shape)}"
            )
        s = s.to(state_dtype(s.dtype))  # many changes are added up
        if self.version == 1:
            parts = s.split([shape.numel() for shape in self.shapes.values()], 1)
            return {name: part.reshape(-1, *shape) for part, (name, shape) in zip(parts, self.shapes.items())}
        found = {}
        for weight, bias in self.layers.items():
            (TO, FROM), always = self.shapes[weight], int(bias is not None)
            patterns, s = s.tensor_split([FROM + always + TO], 1)
            source, on, target = patterns.split([FROM, always, TO], 1)
            found[weight] = target.unsqueeze(2) * source.unsqueeze(1)  # [N, out, in]
            if bias is not None:
                found[bias] = target * on
        return found

    def _squash(self, w: Tensor) -> Tensor:
        return squash(w, self.steepness) if self.update == "bounded" else w

    def _slope(self, w: Tensor) -> Tensor:
        """σ' at the point where σ equals w."""
        return self.steepness * w * (1 - w) if self.update == "bounded" else torch.ones_like(w)

    def _checked(self, state: Weights, B: int) -> Weights:
        if set(state) != set(self.shapes):
            raise ValueError(f"state: expected the weights {', '.join(self.shapes)}, got {', '.join(state) or 'none'}")
        for name, shape in self.shapes.items():
            errors.tensor(f"state[{name!r}]", state[name], (B, *shape))
        return state

    def extra_repr(self) -> str:
        bound = f", steepness={self.steepness:g}" if self.update == "bounded" else ""
        return f"version={self.version}, update={self.update!r}{bound}, read={self.read!r}"


def cubed(y: Tensor) -> Tensor:
    """(2y − 1)³: −1 at 0, 1 at 1, and near 0 in between."""
    return (2 * y - 1) ** 3


class FastWeightRNN(Stateful):
    """A recurrent net that programs its own weights: its units' activations are FROM and TO.

    With l(t) = [x(t); y(t)] and W(t) [units, inputs + units]: y(t + 1) = f(W(t) l(t)), y(1) = f(0), and
    W(t + 1) = σ(W(t) + h(y(t + 1)) ⊗ g(l(t))), that is w_ij(t + 1) = σ(w_ij(t) + g(j(t)) h(i(t + 1))) from unit j to i.

    Args:
        inputs, units: numbers of inputs and of units. The parameter `weight` is W(1), at first uniform in (−0.1, 0.1).
        g, h: functions of activations in (0, 1), by default `cubed`.
        activation: f.
        update, steepness: σ, as in `SlowFastNet`.

    Source: Schmidhuber, Reducing the ratio between learning complexity and number of time varying variables in fully
    recurrent nets, ICANN 1993, eq. 3 and 4. It leaves g, h and σ open.
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        *,
        g: Callable[[Tensor], Tensor] = cubed,
        h: Callable[[Tensor], Tensor] = cubed,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
        update: Update = "bounded",
        steepness: float = 10.0,
    ) -> None:
        super().__init__()
        _one_of("update", update, ("bounded", "additive"))
        self.inputs, self.g, self.h, self.activation = inputs, g, h, activation
        self.update, self.steepness = update, steepness
        self.weight = nn.Parameter(torch.empty(units, inputs + units))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W(1), uniform in (−0.1, 0.1)."""
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """x [B, T, inputs] → y [B, T, units], each step's y(t + 1), which is the first to see x(t), and the state."""
        errors.tensor("x", x, (None, None, self.inputs))
        units = self.weight.shape[0]
        if state is None:
            state = RecurrentState(
                self.weight.expand(x.shape[0], -1, -1), self.activation(x.new_zeros(x.shape[0], units))
            )
        W, y = differentiable(state)
        errors.tensor("state.weight", W, (x.shape[0], *self.weight.shape))
        W = W.to(state_dtype(W.dtype))  # many changes are added up
        errors.tensor("state.y", y, (x.shape[0], units))
        found = []
        for now in x.unbind(1):
            seen = torch.cat([now, y], 1)  # [B, inputs + units]
            y = self.activation((W.to(seen.dtype) @ seen.unsqueeze(2)).squeeze(2))
            W = W + self.h(y.to(W.dtype)).unsqueeze(2) * self.g(seen.to(W.dtype)).unsqueeze(1)
            W = squash(W, self.steepness) if self.update == "bounded" else W
            found.append(y)
        return torch.stack(found, 1) if found else x.new_zeros(x.shape[0], 0, units), RecurrentState(W, y)


def squash(w: Tensor, steepness: float) -> Tensor:
    """σ(w) = 1 / (1 + exp(−steepness · (w − 0.5))), eq. 7 of 1992."""
    return torch.sigmoid(steepness * (w - 0.5))


def _layers(shapes: dict[str, torch.Size]) -> dict[str, str | None]:
    """The layers of a fast net for FROM and TO: each weight [out, in] and its bias [out], if it has one."""
    layers: dict[str, str | None] = {name: None for name, shape in shapes.items() if len(shape) == 2}
    for name, shape in shapes.items():
        path, dot, last = name.rpartition(".")
        weight = path + dot + last.replace("bias", "weight")
        if len(shape) == 1 and weight in layers and shape[0] == shapes[weight][0]:
            layers[weight] = name
        elif name not in layers:
            raise ValueError(
                f"fast: expected for version 2 weights (out, in), each with or without a bias (out,), got {name} "
                f"{tuple(shape)}; version 1 takes any"
            )
    return layers


def _one_of(argument: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        names = [str(name) for name in known]
        raise ValueError(f"{argument}: expected {' or '.join(names)}, got {value!r}{suggest(str(value), names)}")
