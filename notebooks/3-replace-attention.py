# %% [markdown]
# # Replace attention in a model that is trained already
#
# We train a small GPT-2 on text, swap its softmax attention for fast weights, and let the new layers learn what the old
# ones did. Then we compare what both remember and how long a token takes. All of it runs on a laptop's CPU in minutes.

# %%
import copy
import pydoc_data.topics
import time
import warnings

warnings.filterwarnings("ignore", "IProgress not found")  # progress bars are text here

import matplotlib.pyplot as plt
import torch
import transformers

import fwp
from fwp.interop.transformers import contribution, transfer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
_ = torch.manual_seed(0)

# %% [markdown]
# ## A small GPT-2, trained from text
#
# The text is Python's own documentation of its language, which comes with Python. The model reads it letter by letter.

# %%
text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
letters = sorted(set(text))
number = {letter: i for i, letter in enumerate(letters)}
tokens = torch.tensor([number[letter] for letter in text])
train, held_out = tokens[:-20_000], tokens[-20_000:]


def batches(source, count, B=16, T=64):
    """Random pieces of the text, as a model's inputs."""
    starts = [torch.randint(len(source) - T, (B,)) for _ in range(count)]
    return [{"input_ids": torch.stack([source[s : s + T] for s in start])} for start in starts]


config = transformers.GPT2Config(
    vocab_size=len(letters),
    n_embd=96,
    n_layer=3,
    n_head=3,
    n_positions=16_384,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
    bos_token_id=None,
    eos_token_id=None,
)
model = transformers.GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for batch in batches(train, 300):
    loss = model(**batch, labels=batch["input_ids"]).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
print(f"{len(text):,} letters, loss {losses[0]:.2f} → {losses[-1]:.2f}")

# %%
test = batches(held_out, 8)


@torch.no_grad()
def test_loss(model):
    return sum(model(**batch, labels=batch["input_ids"]).loss.item() for batch in test) / len(test)


softmax_loss = test_loss(model)
softmax_loss

# %% [markdown]
# ## One line swaps the attention
#
# Every layer keeps its projections. The gated delta rule takes the place of softmax, with new gates that start from
# their initial values. So at first the model is worse: its layers have never worked with these memories.

# %%
converted = fwp.convert(copy.deepcopy(model), rule="gated_delta")
swapped_loss = test_loss(converted)
swapped_loss

# %% [markdown]
# ## Let the new layers learn what the old ones did
#
# `transfer` first lets each layer match the output of the attention that it replaced, then trains the whole model a
# little on the text. That is more training than the softmax model had, which is why the last bar can be the lowest.

# %%
trained = transfer(converted, batches(train, 100), match_steps=100, tune_steps=60, tune_rate=1e-3)
after_loss = test_loss(converted)

fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
names = ["softmax", "swapped", "after\ntransfer"]
ax.bar(names, [softmax_loss, swapped_loss, after_loss], color=["tab:green", "tab:gray", "tab:blue"])
ax.set_ylabel("loss on held-out text")
ax.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# A conversion can go wrong unnoticed: a model may learn to do without its memories. `contribution` sets their outputs
# to zero and tells what that costs.

# %%
found = contribution(converted, test[0])
found

# %%
assert found.without_all > found.loss + 0.1

# %% [markdown]
# ## Generate
#
# `generate` works as before. Its cache is one matrix per head, whatever the length of the text, and with it every
# token is the one that the model would draw without a cache.

# %%
prompt = torch.tensor([[number[letter] for letter in "The statement "]])
options = {"max_new_tokens": 120, "do_sample": True, "temperature": 0.7, "pad_token_id": 0}
drawn = []
for use_cache in (True, False):
    torch.manual_seed(1)
    drawn.append(converted.generate(prompt, use_cache=use_cache, **options))
assert torch.equal(*drawn)
print("".join(letters[i] for i in drawn[0][0]))

# %% [markdown]
# ## What is remembered, and how long a token takes
#
# The cache of softmax attention grows with the text, and every new token reads all of it. Fast weights keep their size,
# so a token takes as long after 16,000 letters as after 64. In a model as small as this one Python takes most of that
# time, so that softmax is faster until the text is long.


# %%
def cache_of(out):
    return out.get("cache", out.get("past_key_values"))


def nbytes(cache):
    """The bytes of all tensors in a cache."""
    kept = [x for layer in cache.layers for x in vars(layer).values()]
    leaves = torch.utils._pytree.tree_leaves(kept)
    return sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))


@torch.no_grad()
def measure(model, lengths, repeats=15):
    """For each length of text: the bytes of the cache, and the seconds of the next token."""
    sizes, times = [], []
    for length in lengths:
        out = model(held_out[None, :length], use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        took = []
        for t in range(repeats):
            start = time.perf_counter()
            out = model(held_out[None, length + t : length + t + 1], use_cache=True, **{name: cache_of(out)})
            took.append(time.perf_counter() - start)
        sizes.append(nbytes(cache_of(out)))
        times.append(sorted(took)[repeats // 2])
    return sizes, times


lengths = [64, 1000, 4000, 16_000]
found = {"softmax": measure(model, lengths), "gated delta rule": measure(converted, lengths)}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for (name, (sizes, times)), color in zip(found.items(), ["tab:green", "tab:blue"]):
    axes[0].loglog(lengths, [size / 1024 for size in sizes], "o-", color=color, label=name)
    axes[1].semilogx(lengths, [1000 * t for t in times], "o-", color=color, label=name)
axes[0].set_ylabel("cache, KiB")
axes[1].set_ylabel("time of the next token, ms")
axes[1].set_ylim(bottom=0)
for ax in axes:
    ax.set_xlabel("letters read before")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].legend(frameon=False)

# %%
sizes = found["gated delta rule"][0]
assert len(set(sizes)) == 1 and found["softmax"][0][-1] > 20 * sizes[0]
{name: [f"{size / 1024:,.0f} KiB" for size in sizes] for name, (sizes, _) in found.items()}
