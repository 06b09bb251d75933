# %% [markdown]
# # Linear Transformers are secretly fast weight programmers
#
# In 2021 Schlag, Irie and Schmidhuber ([arXiv 2102.11174](https://arxiv.org/abs/2102.11174)) looked at linear
# attention and found the network of 1991 in it: a slow net that programs a matrix of fast weights by outer products.
# This view raises two questions that attention does not: *how much fits into the matrix*, and *how should it be
# written*?
#
# Symbols: keys and queries $k_t, q_t$ have $K$ numbers and values $v_t$ have $V$. A feature map $\phi$ has
# $d_\text{dot}$ features. The fast weights $S$ have the shape $d_\text{dot} \times V$ (the paper's $W$ is $S^\top$).

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import fwp
from fwp_benchmarks.papers import secretly_fast_weights as experiment

_ = torch.manual_seed(0)


def sequence(x):
    """[T, features] as one batch, one head: [1, T, 1, features]."""
    return x[None, :, None]


# %% [markdown]
# ## Attention without its softmax is a memory
#
# Softmax attention weights a value by $\exp(q_t^\top k_s)$. Take a product of features instead:
#
# $$o_t = \frac{\sum_{s \le t} \phi(q_t)^\top \phi(k_s)\, v_s}{\sum_{s \le t} \phi(q_t)^\top \phi(k_s)}$$
#
# Now $\phi(q_t)$ can be taken out of the sums. The rest does not depend on the query, so it can be kept and updated:
#
# $$S_t = S_{t-1} + \phi(k_t)\, v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t), \qquad
# o_t = \frac{S_t^\top \phi(q_t)}{z_t^\top \phi(q_t)}$$
#
# So each token makes one write, by an outer product, and one read. Attention compares all $T \times T$ pairs of tokens.
# The memory is one matrix that never grows. Here are both, and the op of this package, on the same numbers.

# %%
T, K, V = 12, 8, 6
q, k, v = (torch.randn(T, width, dtype=torch.float64) for width in (K, K, V))


def phi(x):
    return F.elu(x) + 1


scores = (phi(q) @ phi(k).T).tril()  # every pair of tokens [T, T]
by_attention = (scores / scores.sum(-1, keepdim=True)) @ v

S, z, outputs = torch.zeros(K, V, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), []
for t in range(T):  # one token at a time
    S = S + torch.outer(phi(k[t]), v[t])
    z = z + phi(k[t])
    outputs.append(S.T @ phi(q[t]) / (z @ phi(q[t])))
by_memory = torch.stack(outputs)

out, state = fwp.fast_weights(
    "additive", sequence(q), sequence(k), sequence(v), feature_map="elu+1", denominator=True, eps=0.0
)
for name, found in (("memory", by_memory), ("op", out[0, :, 0])):
    difference = (found - by_attention).abs().max().item()
    assert difference < 1e-12
    print(f"attention and {name}: largest difference {difference:.1e}")

# %% [markdown]
# ## How much fits?
#
# Store $n$ pairs, then ask for each. (The paper calls this number $S$.) Reading is linear: the $n$ answers are the
# features of the $n$ queries times one matrix of $d_\text{dot}$ rows. So the answers have at most rank $d_\text{dot}$.
# If the values are $n$ different one-hot vectors, the right answers have rank $n$. With $n \le d_\text{dot}$ orthogonal
# keys nothing is lost. With more keys, a matrix of rank $d_\text{dot}$ lacks $n - d_\text{dot}$ directions of the right
# answers (Eckart and Young). So the loss $\tfrac12 \lVert o - v \rVert^2$, mean over keys, is at least
#
# $$\tfrac12 \left(1 - \frac{d_\text{dot}}{n}\right).$$
#
# No learning is needed to see this. Keys that share the space evenly (a tight frame) lie exactly on this floor. Random
# directions, which are not orthogonal, lie far above it.

# %%
d_dot = 16


def loss_of(keys):
    """½ ‖o − v‖² after all pairs were written, mean over keys [n, d_dot]."""
    values = torch.eye(len(keys), dtype=keys.dtype)
    _, state = fwp.fast_weights("additive", sequence(keys), sequence(keys), sequence(values))
    answers = fwp.read(state, sequence(keys))[0, :, 0]
    return 0.5 * (answers - values).square().sum(-1).mean().item()


def even(n):
    """n keys whose answers are a projection onto d_dot directions; orthonormal for n ≤ d_dot."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0][:, :d_dot]


sizes = range(2, 4 * d_dot + 1, 2)
floor = [0.5 * max(0, 1 - d_dot / n) for n in sizes]
evenly = [loss_of(even(n)) for n in sizes]
randomly = [loss_of(F.normalize(torch.randn(n, d_dot, dtype=torch.float64), dim=-1)) for n in sizes]
torch.testing.assert_close(evenly, floor, rtol=0, atol=1e-12)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(sizes, randomly, ".", color="#e76f3c", label="random unit keys")
axes.plot(sizes, evenly, "o", markersize=4, color="#219ebc", label="keys of a tight frame")
axes.plot(sizes, floor, "k-", lw=0.8, label="floor ½ (1 − d_dot / n)")
axes.axvline(d_dot, color="k", lw=0.6, ls=":")
axes.set(xlabel=f"pairs stored n, at d_dot = {d_dot}", ylabel="loss ½‖o − v‖²")
_ = axes.legend(frameon=False)

# %% [markdown]
# Can a slow net *learn* keys that are as good? This is Setting 1 of the paper. The embeddings, $W_k$ and $W_q$ are
# trained so that a query for any of the $n$ pairs is answered. This notebook trains three short runs at a small size:
# key width 16, at most 1,000 steps. The crosses are the authors' own runs at key width 64, from the logs that come with
# this package. `fwp reproduce schlag2021-setting1` trains all sizes and draws the full figure.

# %%
settings = experiment.runs(16, {"linear": (32,), "dpfp-1": (16, 48)}, seeds=1, max_steps=1000)
here = [run | experiment.train(run) for run in settings]
logs = experiment.authors(experiment.MEMORIES_1, repeated=False)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
shares = [1 + i / 50 for i in range(151)]
axes.plot([0, *shares], [0, *(0.5 * (1 - 1 / x) for x in shares)], "k-", lw=0.8, label="floor")
for name in experiment.MAPS:
    memory = experiment.MEMORIES[name]
    rows = sorted((row for row in logs if row["model"] == name), key=lambda row: row["keys"])
    axes.plot(
        [experiment.fullness(row) for row in rows],
        [row["best_loss"] for row in rows],
        "x",
        markersize=5,
        color=memory.colour,
        label=f"{memory.label}, the authors' logs",
    )
for row in here:
    colour = experiment.MEMORIES[row["model"]].colour
    axes.plot(experiment.fullness(row), row["best_loss"], "o", color=colour, mec="k", zorder=3)
axes.plot([], [], "o", color="w", mec="k", label="trained in this notebook")
axes.set(xlabel="pairs over features, n / d_dot", ylabel="best evaluation loss", xlim=(0, 4), ylim=(-0.01, 0.52))
axes.legend(frameon=False, fontsize=8)
for row in here:
    name, share = experiment.MEMORIES[row["model"]].label, experiment.fullness(row)
    print(f"{name:7} n = {row['keys']}: n / d_dot = {share:g}, loss {row['best_loss']:.4f}, step {row['best_step']}")

# %% [markdown]
# The learned memories follow the floor: four feature maps and two key widths lie on one curve. The number of features
# is the capacity. (A few crosses lie slightly below the floor. The bound counts every query of a sequence once, and the
# authors' average does not.)
#
# ## DPFP: more features, and orthogonal ones
#
# So the paper makes more features, without any parameter or randomness. With $r = \text{relu}([x, -x])$, of length
# $2K$,
#
# $$\phi_\nu(x) = \big[\, r \odot \text{roll}(r, 1),\; \dots,\; r \odot \text{roll}(r, \nu) \,\big], \qquad
# d_\text{dot} = 2 K \nu .$$
#
# A feature is nonzero only where both of its entries of $r$ are. In two dimensions, with $\nu = 1$, there are four
# features, one per quadrant, so keys in different quadrants are exactly orthogonal. All features of elu + 1 are
# positive, so no two keys are ever orthogonal.

# %%
degrees = torch.arange(0, 361, dtype=torch.float64)
circle = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], -1)
maps = {"elu+1": fwp.FEATURE_MAPS["elu+1"], "DPFP-1": fwp.DPFP(nu=1)}

figure, (left, *right) = plt.subplots(1, 3, figsize=(10.5, 3.4), layout="constrained")
for i, feature in enumerate(fwp.DPFP(nu=1)(circle).T):
    left.plot(degrees, feature, label=f"feature {i}")
left.set(xlabel="direction of x in the plane, degrees", ylabel="DPFP-1 feature", xticks=range(0, 361, 90))
left.set_ylim(None, 0.75)
left.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
for axes, (name, feature_map) in zip(right, maps.items()):
    features = F.normalize(feature_map(circle), dim=-1)
    shown = axes.imshow(features @ features.T, origin="lower", extent=(0, 360, 0, 360), vmin=0, vmax=1)
    ticks = range(0, 361, 90)
    axes.set(title=f"cosine of φ(k) and φ(q), {name}", xlabel="direction of k, degrees", xticks=ticks, yticks=ticks)
right[0].set_ylabel("direction of q, degrees")
_ = figure.colorbar(shown, ax=right)

# %% [markdown]
# ## How to write: the delta rule
#
# A sum never forgets. If a second value is written under the same key, both come back, mixed. The paper's rule first
# reads the value stored under the key. Then it writes the difference, with a learning rate $\beta_t$ that the slow net
# chooses:
#
# $$S_t = S_{t-1} + \beta_t\, k_t \left(v_t - S_{t-1}^\top k_t\right)^\top$$
#
# This is the delta rule of Widrow and Hoff: one step of gradient descent on
# $\tfrac12 \lVert S^\top k_t - v_t \rVert^2$. Below, with $\beta = 1$, key 0 gets value 0, key 1 gets value 1, and then
# key 0 gets value 2. `fwp.inspect.states` gives $S$ after each token.

# %%
keys, values = torch.eye(3)[[0, 1, 0]], torch.eye(3)
beta = torch.ones(1, 3, 1)
summed = fwp.inspect.states("additive", sequence(keys), sequence(keys), sequence(values)).S
replaced = fwp.inspect.states("delta", sequence(keys), sequence(keys), sequence(values), beta=beta).S
assert summed[-1, 0, 0, 0].tolist() == [1, 0, 1]
assert replaced[-1, 0, 0, 0].tolist() == [0, 0, 1]
print("additive: key 0 holds values 0 and 2")
fwp.inspect.plot_state(summed[:, 0, 0])

# %%
print("delta: key 0 holds value 2")
fwp.inspect.plot_state(replaced[:, 0, 0])

# %% [markdown]
# Setting 2 of the paper tests exactly this: $2n$ pairs of $n$ keys are drawn with replacement, and the *last* value of
# a key is right. Here are two runs with $n = 20$ keys, the paper's key width of 64, DPFP-1, one seed and at most 700
# steps. They differ only in the rule. `fwp reproduce schlag2021-setting2` has all rules and sizes.

# %%
settings = experiment.runs(64, {"dpfp-1": (20,), "dpfp-1-delta": (20,)}, seeds=1, repeated=True, max_steps=700)
runs = {run["model"]: experiment.train(run) for run in settings}
for name, run in runs.items():
    print(f"{experiment.MEMORIES[name].label:14} loss {run['best_loss']:.4f} at step {run['best_step']}")
assert runs["dpfp-1-delta"]["best_loss"] < 0.1 * runs["dpfp-1"]["best_loss"]

# %% [markdown]
# ## The attention that a rule implies
#
# Any rule that is linear in the values is still attention: $o_t = \sum_s A_{ts} v_s$ with some $T \times T$ matrix $A$.
# The op returns $A$ if the values are the identity matrix. `fwp.inspect.attention` does this. For `additive`, $A$ is
# $QK^\top$ below the diagonal. How does $A$ look for the other rules?
#
# Four orthonormal keys come in random order, and each token asks for its own key *before* it writes. The sum attends
# to every earlier token with that key. The delta rule with $\beta = 1$ attends only to the last of them, so erasing
# acts as a selection. `gated_delta` of 2024 also decays, here by $\alpha = 0.8$ per token.

# %%
T = 20
rates = {
    "additive": {},
    "delta": {"beta": torch.ones(1, T, 1)},
    "gated_delta": {"beta": torch.ones(1, T, 1), "g": torch.full((1, T, 1), 0.8).log()},
}
which = torch.randint(4, (T,))
keys = sequence(torch.eye(4, dtype=torch.float64)[which])
values = torch.randn(1, T, 1, 6, dtype=torch.float64)


def attentions(keys):
    """[T, T] of each rule, reading before writing."""
    found = {}
    for rule, gates in rates.items():
        A = fwp.inspect.attention(rule, keys, keys, values, read="before", **gates)
        out, _ = fwp.fast_weights(rule, keys, keys, values, read="before", **gates)
        torch.testing.assert_close(A @ values.transpose(1, 2), out.transpose(1, 2), rtol=0, atol=1e-12)
        found[rule] = A[0, 0]
    return found


A = attentions(keys)
for t in range(T):
    last = [s for s in range(t) if which[s] == which[t]][-1:]
    assert A["delta"][t].nonzero().flatten().tolist() == last
fwp.inspect.plot_attention(A)

# %% [markdown]
# Random unit keys overlap. So every rule attends to every earlier token, with weights of both signs.

# %%
keys = F.normalize(torch.randn(1, T, 1, 8, dtype=torch.float64), dim=-1)
fwp.inspect.plot_attention(attentions(keys))

# %% [markdown]
# Yet with the delta rule old tokens fade, even without any decay. A write with $\beta = 1$ first multiplies $S$ by
# $I - k_t k_t^\top$. If $k_t$ is random, this takes $1/K$ of the energy in $S$. Let $a = t - s$ be the age of a token.
# For the sum the mean of $A_{ts}^2$ is $1/K$ at any age. For the delta rule it is $\frac1K (1 - \frac1K)^{a - 1}$.

# %%
B = 2000
keys = F.normalize(torch.randn(B, T, 1, 8, dtype=torch.float64), dim=-1)
expected = {"additive": lambda age: 1 / 8, "delta": lambda age: (1 - 1 / 8) ** (age - 1) / 8}
for rule, law in expected.items():
    gates = {name: gate.expand(B, T, 1) for name, gate in rates[rule].items()}
    A = fwp.inspect.attention(rule, keys, keys, keys, read="before", **gates)
    for age in (1, 5, 15):
        measured = A.diagonal(-age, -2, -1).square().mean().item()
        assert abs(measured / law(age) - 1) < 0.1
        print(f"{rule:8} age {age:2}: mean of A² {measured:.4f}, expected {law(age):.4f}")

# %% [markdown]
# ## The rank of the memory over time
#
# A write adds at most one to the rank of $S$, and the rank can't exceed $d_\text{dot}$ or $V$. The rank says how many
# directions *can* be told apart. The stable rank $\sum_i \sigma_i^2 / \sigma_1^2$, with the singular values $\sigma_i$,
# says how evenly $S$ uses them. The norm says how much $S$ holds. Here 64 random values are written under random unit
# keys of dimension 16.

# %%
T, K, V = 64, 16, 16
keys = F.normalize(torch.randn(1, T, 1, K, dtype=torch.float64), dim=-1)
values = torch.randn(1, T, 1, V, dtype=torch.float64)
rates = {
    "additive": {},
    "delta": {"beta": torch.ones(1, T, 1)},
    "gated_delta": {"beta": torch.ones(1, T, 1), "g": torch.full((1, T, 1), 0.8).log()},
}
S = {rule: fwp.inspect.states(rule, keys, keys, values, **gates).S[:, 0, 0] for rule, gates in rates.items()}
for rule, states in S.items():
    found = fwp.inspect.spectrum(states)
    bound = torch.arange(1, T + 1).clamp(max=min(K, V))
    assert (found.rank <= bound).all()
    print(
        f"{rule:12} after {T} pairs: rank {found.rank[-1]}, stable rank {found.stable_rank[-1]:.1f}, "
        f"norm {found.norm[-1]:.1f}"
    )
fwp.inspect.plot_rank(S)

# %% [markdown]
# All three memories have full rank after 16 pairs. From there on, each new pair costs something old. Each random value
# adds $V$ to the mean of $\lVert S \rVert^2$. The sum takes nothing away, so after $T$ pairs its norm is near
# $\sqrt{T V} = 32$, and it keeps growing. The delta rule also takes away $1/K$ of $\lVert S \rVert^2$ per write, so its
# norm settles where the two balance, near $\sqrt{K V} = 16$. Decay takes away more: the memory is smaller, and what it
# holds is newer.
#
# ## Looking into a layer
#
# The layers of `fwp.nn` make $q$, $k$, $v$ and the gates from their inputs. `fwp.inspect.recording` keeps the arguments
# with which they call the op, so all of the above can be applied to a model. Here is an untrained Gated DeltaNet layer
# with two heads.

# %%
layer = fwp.nn.gated_delta_net(32, 2).double()
x = torch.randn(1, 24, 32, dtype=torch.float64)
with torch.no_grad(), fwp.inspect.recording() as calls:
    layer(x)
A = fwp.inspect.attention(**calls[0])
print(calls[0]["rule"], *A.shape)
fwp.inspect.plot_attention(A[0])
