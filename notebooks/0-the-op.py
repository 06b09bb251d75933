# %% [markdown]
# # The op: a matrix that is written and read
#
# A fast weight matrix $S$ is a memory. Writing the value $v$ under the key $k$ adds the outer product $k v^\top$ to
# it. Reading with a query $q$ gives $S^\top q$. A linear Transformer does nothing else, and neither did the network of
# 1991, in which a slow net chose the keys and values.

# %%
import matplotlib.pyplot as plt
import torch

import fwp

_ = torch.manual_seed(0)

# %% [markdown]
# ## Write two pairs, read one
#
# With orthonormal keys, $S^\top k_i = \sum_j v_j (k_j^\top k_i) = v_i$: the written value comes back exactly.

# %%
k = torch.eye(4, dtype=torch.float64)[:2]  # two orthonormal keys [T, K]
v = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.0]], dtype=torch.float64)  # their values [T, V]

S = torch.zeros(4, 3, dtype=torch.float64)
for t in range(2):
    S = S + torch.outer(k[t], v[t])
S.T @ k[0]

# %% [markdown]
# The op does this for whole sequences, batches and heads: `q, k, v` are `[B, T, H, features]`. It returns the output of
# each query, read right after its own token was written, and the final state. `fwp.read` reads from that state later.


# %%
def sequence(x):
    """[T, features] as one batch, one head: [1, T, 1, features]."""
    return x[None, :, None]


out, state = fwp.fast_weights("additive", sequence(k), sequence(k), sequence(v))
assert torch.equal(state.S[0, 0], S)
assert torch.equal(fwp.read(state, sequence(k)), sequence(v))
out[0, :, 0]

# %% [markdown]
# ## When keys overlap
#
# More keys than dimensions can't all be orthogonal, so the sum mixes their values. The delta rule of 2021 first reads
# the value stored under the key, and writes only the difference: $S + \beta k (v - S^\top k)^\top$. With $\beta = 1$
# and unit keys the newest pair is always recalled exactly, at the cost of older ones.

# %%
K, V, T = 16, 16, 48
keys = torch.nn.functional.normalize(torch.randn(T, K, dtype=torch.float64), dim=-1)
values = torch.randn(T, V, dtype=torch.float64)


def recall(rule, **gates):
    """Relative error of each pair after all T were written."""
    _, state = fwp.fast_weights(rule, sequence(keys), sequence(keys), sequence(values), **gates)
    found = fwp.read(state, sequence(keys))[0, :, 0]
    return (found - values).norm(dim=-1) / values.norm(dim=-1)


beta = torch.ones(1, T, 1, dtype=torch.float64)
errors = {"additive": recall("additive"), "delta, β = 1": recall("delta", beta=beta)}
assert errors["delta, β = 1"][-1] < 1e-12

figure, axes = plt.subplots(figsize=(6, 3.2))
for name, error in errors.items():
    axes.plot(range(T), error, marker=".", label=name)
axes.set(xlabel="pair, in the order of writing", ylabel="relative error of recall", ylim=(0, None))
axes.set_title(f"{T} pairs under random unit keys of dimension {K}")
axes.legend(loc="upper right")
figure.tight_layout()

# %% [markdown]
# ## The state is all that is remembered
#
# A sequence can be cut anywhere: the second part starts from the state of the first part. The state never grows.

# %%
whole, _ = fwp.fast_weights("delta", sequence(keys), sequence(keys), sequence(values), beta=beta)
first, state = fwp.fast_weights(
    "delta", sequence(keys[:20]), sequence(keys[:20]), sequence(values[:20]), beta=beta[:, :20]
)
second, state = fwp.fast_weights(
    "delta", sequence(keys[20:]), sequence(keys[20:]), sequence(values[20:]), beta=beta[:, 20:], state=state
)
torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
state.S.shape

# %% [markdown]
# ## The rules and their gates
#
# One table holds the rules. Each row says which gates the rule needs beside `q, k, v`. `fwp list` prints the table.

# %%
for name, rule in fwp.RULES.items():
    print(f"{name:12} {rule.step.__doc__.rstrip('.'):55} {', '.join(rule.gates) or 'no gates'}")
