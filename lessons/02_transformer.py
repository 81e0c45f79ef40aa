# %% [markdown]
# # Lesson 2 · The transformer: what is in it, what it costs, how it writes
#
# This course fine-tunes one kind of model: a decoder-only transformer (Vaswani et al. 2017, arXiv:1706.03762; the
# decoder alone as in GPT-2, Radford et al. 2019). This lesson opens it. You will build each part in a few lines,
# recompute the whole in NumPy to float32 rounding, count its parameters and operations, watch a small one learn what no
# table of letter pairs can know, see which heads learned it, and measure what the cache buys.
#
# You need Lessons 0 and 1. Reading takes about 25 minutes (200 words or 25 lines of code a minute, up to the quiz). Run
# it with `python lessons/02_transformer.py` (half a minute on two cores), or open it as a notebook.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import math
import os
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting.memory import kv_cache_bytes
from minipeft.nn.generation import generate_stream

F = mp.functional
REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
if REDUCED:
    print("REDUCED SETTING: 60 training steps for 300 in sections 5 to 7, too few to learn the task. What the text says of")
    print("trained models holds for the full lesson alone; here it is neither printed nor checked.\n")

# %% [markdown]
# ## 1 · The stream, a norm, an MLP
#
# A token id (Lesson 0) picks a row of a table, the **embedding**: a vector of $d$ numbers. So $T$ tokens are an array
# $x$ of $[T, d]$, the **residual stream**. Each of $L$ **blocks** reads the stream and *adds* to it, twice:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x)) .$$
#
# Attention (section 2) moves information between positions. A last norm and a product with a $[V, d]$ table make of
# each position a logit for each of the $V$ possible next tokens.
#
# A **norm** keeps the numbers of a position at one size. *RMS norm* (Zhang & Sennrich 2019, arXiv:1910.07467) divides
# by the root of the mean square and multiplies by $d$ trained weights $w$. Layer norm (Lesson 1) also subtracts the
# mean and adds a bias. To both, $x$ and $10x$ are the same but for the small $\epsilon$.
#
# $$\mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot w .$$
#
# The **MLP** maps each position to $m$ numbers, applies a nonlinearity, and maps back to $d$. This one makes two wide
# arrays. The first is a *gate* on the second (Shazeer 2020, arXiv:2002.05202), through
# $\mathrm{silu}(z) = z / (1 + e^{-z})$:
#
# $$\mathrm{MLP}(h) = W_\text{down}\,\big(\mathrm{silu}(W_\text{gate}\, h) \cdot W_\text{up}\, h\big) .$$
#
# **Predict:** change the stream at position 2 alone. At which of 5 positions does the MLP's output change?

# %%
def norm(x, weight, eps):  # [T, d] -> [T, d]
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def mlp(h, gate, up, down):  # [T, d] -> [T, d]; weights are stored as [outputs, inputs]
    z = h @ gate.T  # [T, m]
    return (z / (1 + np.exp(-z)) * (h @ up.T)) @ down.T


rng = np.random.default_rng(0)
base = mp.load_base("numpy")[0]  # what is done by hand here is NumPy's
block = base.model.layers[0]
x = rng.standard_normal((5, base.config.hidden_size)).astype(np.float32)
by_hand = norm(x, block.input_layernorm.weight.numpy(), base.config.rms_norm_eps)
print("norm, by hand against the library's:", np.abs(by_hand - block.input_layernorm(mp.Tensor(x)).numpy()).max())
weights = [getattr(block.mlp, f"{name}_proj").weight.numpy() for name in ("gate", "up", "down")]
wide = mlp(by_hand, *weights)
print("MLP,  by hand against the library's:", np.abs(wide - block.mlp(mp.Tensor(by_hand)).numpy()).max())
assert np.allclose(by_hand, block.input_layernorm(mp.Tensor(x)).numpy(), atol=1e-5)
assert np.allclose(wide, block.mlp(mp.Tensor(by_hand)).numpy(), atol=1e-5)
assert np.allclose(norm(10 * x, block.input_layernorm.weight.numpy(), base.config.rms_norm_eps), by_hand, atol=1e-3)
other = by_hand.copy()
other[2] += 1
changed = np.abs(mlp(other, *weights) - wide).max(axis=1) > 1e-4
print("positions at which the MLP's output changes:", np.flatnonzero(changed))
assert changed.tolist() == [False, False, True, False, False]

# %% [markdown]
# At position 2 alone: the MLP works on each position for itself. The figure shows the shipped model, from token ids to
# logits, with the shape of each weight.

# %%
diagrams.block(base.config).savefig(OUT / "02_transformer_block.png")

# %% [markdown]
# ## 2 · Attention by hand
#
# From its normed stream $h_t$, each position $t$ makes three vectors of $D$ numbers: a **query** (what am I looking
# for?), a **key** (what is here?) and a **value** (what do I hand over?):
#
# $$q_t = W_q h_t, \qquad k_t = W_k h_t, \qquad v_t = W_v h_t .$$
#
# Position $t$ receives an average of the values it may see. A value weighs more if its key fits the query:
#
# $$o_t = \sum_{s \le t} a_{ts}\, v_s, \qquad
#   a_{t\cdot} = \mathrm{softmax}\Big(\frac{q_t \cdot k_s}{\sqrt D}\Big)_{s \le t} .$$
#
# $s \le t$ is the **causal mask**: a model that is to predict the next token must not look at it. With the mask, one
# forward pass makes an honest prediction at each of the $T$ positions, and training learns from all of them at once.
#
# All this is a **head**. A block has $H$ of them side by side, each with its own $W_q$. Their outputs are concatenated
# to $[T, HD]$, and $W_o$ maps them back to $[T, d]$. Keys and values may have fewer heads, $K$: in *grouped-query
# attention* query head $h$ reads key head $\lfloor h / (H/K) \rfloor$. Ainslie et al. (2023, arXiv:2305.13245) report
# quality close to $K = H$, and speed close to $K = 1$.
#
# **Predict:** the numbers of $q$ and $k$ are independent, with mean 0 and variance 1, and $D = 64$. How large is
# $q \cdot k$, typically?

# %%
def attention_by_hand(q, k, v):
    """q [T, H, D], k and v [T, K, D] -> [T, H, D], one query at a time."""
    (T, H, D), K = q.shape, k.shape[1]
    out = np.empty_like(q)
    for t in range(T):
        for h in range(H):
            j = h // (H // K)
            scores = k[: t + 1, j] @ q[t, h] / math.sqrt(D)  # [t + 1]: only what has been
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[: t + 1, j] / weights.sum()
    return out


q, k, v = rng.standard_normal((10, 4, 8)), rng.standard_normal((10, 2, 8)), rng.standard_normal((10, 2, 8))
one_batch = [mp.Tensor(a.swapaxes(0, 1)[None]) for a in (q, k, v)]  # [1, heads, T, D]
op = F.scaled_dot_product_attention(*one_batch, is_causal=True).data[0].swapaxes(0, 1)
print("\nattention, our loops against the library's op:", np.abs(attention_by_hand(q, k, v) - op).max())
assert np.allclose(attention_by_hand(q, k, v), op, atol=1e-14)

scores = (rng.standard_normal((1000, 16, 64)) * rng.standard_normal((1000, 1, 64))).sum(axis=-1)  # 1000 queries, 16 keys
largest = [F.softmax(mp.Tensor(s)).numpy().max(axis=-1).mean() for s in (scores, scores / math.sqrt(64))]
print(f"q·k of 64 numbers: standard deviation {scores.std():.2f}; the largest of 16 weights is {largest[0]:.2f} on average,")
print(f"and with q·k / 8 it is {largest[1]:.2f}")
assert abs(scores.std() - 8) < 0.2 and largest[0] > 0.8 and largest[1] < 0.4

# %% [markdown]
# $q \cdot k$ is a sum of $D$ products of variance 1, so its standard deviation is $\sqrt D = 8$. Undivided, such scores
# put most of the weight on one of 16 keys. There the derivatives of softmax are small, the reason that Vaswani et al.
# give (section 3.2.1). In the figure a filled square says that the token of its row sees the token
# of its column. (Its prefix belongs to Lesson 6, its packing to Lesson 8.)

# %%
diagrams.attention_mask().savefig(OUT / "02_transformer_masks.png")

# %% [markdown]
# ## 3 · Rotary positions: only distances matter
#
# In $q_t \cdot k_s$ no position stands: swap two earlier tokens, and a single attention layer hands the last position
# the same sum. (Several layers under a causal mask can recover order, as each position sees another set: Kazemnejad et
# al. 2023, arXiv:2305.19466.) GPT-2 adds a trained vector for each position to the embedding. Llama rotates (Su et al.
# 2021, arXiv:2104.09864): it reads two numbers of $q$, and the same two of $k$, as real and imaginary part of one
# complex number, and turns it by an angle proportional to the position,
#
# $$q_m \to q_m e^{i m \theta}, \quad k_n \to k_n e^{i n \theta}
#   \quad\Rightarrow\quad \mathrm{Re}\big(q_m e^{im\theta}\,\overline{k_n e^{in\theta}}\big)
#   = \mathrm{Re}\big(q_m \overline{k_n}\, e^{i(m-n)\theta}\big),$$
#
# so that of the positions only the distance $m - n$ enters the score. Values are not turned: a position is to decide
# who is looked at, not what is carried. Pair $j$ has its own speed, $\theta_j = 10000^{-2j/D}$: from one radian a
# position, which tells neighbors apart, to almost 1/10,000, which tells far from near. Here, as in Hugging Face's
# Llama, a pair is $j$ and $j + D/2$. In the paper and in Meta's code it is $2j$ and $2j + 1$, which is the same model
# with the rows of $W_q$ and $W_k$ in another order.
#
# **Predict:** with the query at 17 and the key at 10 the score is $s$. Move both 5,000 positions on. What is it now?

# %%
D = 64
theta = 10000.0 ** (-np.arange(D // 2) / (D // 2))  # [D/2]


def rope(x, position):
    """The library's rotation of one vector [D] at one position."""
    angle = position * theta[None, None]  # [1, 1, D/2]
    return F.rope(mp.Tensor(x[None, None, None]), np.cos(angle), np.sin(angle)).data[0, 0, 0]


def rope_by_hand(x, position):
    z = (x[: D // 2] + 1j * x[D // 2 :]) * np.exp(1j * position * theta)
    return np.concatenate([z.real, z.imag])


q, k = rng.standard_normal((2, D))
assert np.allclose(rope(q, 17), rope_by_hand(q, 17), atol=1e-14)
print("rotary scores q·k at distance 7, wherever it is:", end=" ")
scores = [rope(q, m) @ rope(k, m - 7) for m in (7, 107, 5007)]
print("  ".join(f"{s:.10f}" for s in scores), f"  at distance 8: {rope(q, 8) @ rope(k, 0):.10f}")
assert np.allclose(scores, scores[0], atol=1e-9)
assert abs(rope(q, 8) @ rope(k, 0) - scores[0]) > 1e-3
assert np.isclose(np.linalg.norm(rope(q, 123)), np.linalg.norm(q)), "a rotation keeps the length"

# %% [markdown]
# Still $s$. That does not make a model good at distances longer than any in its training: Chen et al. (2023,
# arXiv:2306.15595) see LLaMA fail there, and rescale the positions into the trained range.
#
# ## 4 · The whole model in thirty lines
#
# Here is all of Llama (Touvron et al. 2023, arXiv:2302.13971) on one sequence, with one table at both ends. The norm
# stands on the branch and not on the stream (*pre-norm*). So the final stream is the embedding plus what each branch
# wrote, and gradients pass along the additions from the last norm to the embedding unchanged. The first transformers
# had the norm on the stream (*post-norm*), and depend more on warm-up (Xiong et al. 2020, arXiv:2002.04745).

# %%
def llama_by_hand(model, ids):
    """ids [T] -> (logits [T, V], what was written into the residual stream)."""
    c = model.config
    p = {name: mp.backend.to_numpy(a) for name, a in model.state_dict().items()}
    T, D = len(ids), c.head_dim
    angle = np.arange(T)[:, None] * c.rope_theta ** (-np.arange(D // 2) / (D // 2))  # [T, D/2]
    turn = np.exp(1j * angle)[:, None]  # [T, 1, D/2]

    def rotate(x):  # [T, heads, D]
        z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["model.embed_tokens.weight"][ids]  # [T, d]
    written = [x]
    for i in range(c.num_hidden_layers):
        here = f"model.layers.{i}."
        w = {name.removeprefix(here): a for name, a in p.items() if name.startswith(here)}
        h = norm(x, w["input_layernorm.weight"], c.rms_norm_eps)
        q, k, v = ((h @ w[f"self_attn.{name}_proj.weight"].T).reshape(T, -1, D) for name in "qkv")  # [T, heads, D]
        attention = attention_by_hand(rotate(q), rotate(k), v).reshape(T, -1) @ w["self_attn.o_proj.weight"].T
        x = x + attention
        h = norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)
        wide = mlp(h, *(w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
        x = x + wide
        written += [attention, wide]
    assert np.allclose(x, sum(written), atol=1e-5), "the stream is the sum of what was written into it"
    return norm(x, p["model.norm.weight"], c.rms_norm_eps) @ p["model.embed_tokens.weight"].T, written


VOCAB, PERIOD = 32, 16
config = mp.TransformerConfig.llama(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
model = mp.Transformer(config, seed=0)
ids = rng.integers(0, VOCAB, 2 * PERIOD)
(by_hand, _), logits = llama_by_hand(model, ids), model(ids[None]).numpy()[0]
print("\nLlama in NumPy against mp.Transformer, largest difference of a logit:", np.abs(by_hand - logits).max())
assert np.allclose(by_hand, logits, atol=1e-5)

# %% [markdown]
# ### Its parameters, counted twice
#
# Two families matter here; `TransformerConfig.llama` and `.gpt2` set their shapes:
#
# | | norm | positions | MLP | biases | heads for k, v |
# |---|---|---|---|---|---|
# | GPT-2 | layer norm (Lesson 1) | a trained table, added | $W_2\,\mathrm{gelu}(W_1 h)$ (GELU: Lesson 1), $m = 4d$ | yes | as many as for q |
# | Llama | RMS norm | rotations of q and k | that of section 1 | no | as many, or fewer |
#
# So a GPT-2 of vocabulary $V$, with at most $P$ positions, has
#
# $$\underbrace{Vd}_{\text{tokens}} + \underbrace{Pd}_{\text{positions}} + L\,(\underbrace{4d^2 + 4d}_{\text{attention}}
#   + \underbrace{8d^2 + 5d}_{\text{MLP}} + \underbrace{4d}_{\text{two norms}}) + \underbrace{2d}_{\text{last norm}}$$
#
# parameters: four $d \times d$ matrices and two of $d \times 4d$ in a block, a bias for each output, and two vectors in
# a layer norm. (Its output table *is* the token table: they are **tied**.) A Llama has, with $V' = V$ if the output
# table is tied and $2V$ if not,
#
# $$V'd + L\,(2\,d\,HD + 2\,d\,KD + 3\,d\,m + 2d) + d .$$
#
# With three matrices in the MLP, $m = \frac83 d$ costs as much as two at $m = 4d$; Llama 2 7B rounds it up to 11,008.
#
# Count the other way by building the model; with `seed=None` no weight is allocated.
#
# For each token, each number of a matrix takes one multiplication and one addition: $2N$ operations for $N$ numbers.
# Attention at position $t$ takes $4LHDt$ more, half for the scores and half for the average of the values. Over a
# sequence the weights' cost grows with $T$, and attention's with $T^2$. Training takes $6N$ a token: the backward pass
# (Lesson 1) has two products for each one forward, for the gradients of the input and of the weights.
#
# **Predict:** its paper calls GPT-2 small "117M" (Radford et al. 2019, Table 2). By the formula, with $V = 50{,}257$,
# $P = 1024$, $d = 768$, $L = 12$: how many millions are in the tables, and how many in all?

# %%
def gpt2_formula(c):
    d, L = c.hidden_size, c.num_hidden_layers
    return (c.vocab_size + c.max_position_embeddings) * d + L * (12 * d * d + 13 * d) + 2 * d


def llama_formula(c):
    d, L, D = c.hidden_size, c.num_hidden_layers, c.head_dim
    tables = c.vocab_size * d * (1 if c.tie_word_embeddings else 2)
    attention = 2 * d * c.num_attention_heads * D + 2 * d * c.num_key_value_heads * D
    return tables + L * (attention + 3 * d * c.intermediate_size + 2 * d) + d


gpt2, llama = mp.TransformerConfig.gpt2, mp.TransformerConfig.llama
gpt2_small = gpt2(vocab_size=50257, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=1024)
gpt3 = gpt2(vocab_size=50257, hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, max_position_embeddings=2048)
smollm2 = llama(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192,
)  # fmt: skip
llama2_7b = llama(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
print("\nmodel              by formula         by counting        published")
for name, c, formula, published in (
    ("GPT-2 small", gpt2_small, gpt2_formula, "124,439,808 (its checkpoint)"),
    ("GPT-3", gpt3, gpt2_formula, "175.0B (Brown et al. 2020, table 2.1)"),
    ("SmolLM2-135M", smollm2, llama_formula, "134,515,008 (its checkpoint)"),
    ("Llama 2 7B", llama2_7b, llama_formula, "6,738,415,616 (its checkpoint)"),
):
    counted = sum(p.size for p in mp.Transformer(c, seed=None).parameters())
    print(f"{name:14s} {formula(c):>18,} {counted:>18,}   {published}")
    assert counted == formula(c)
    if "checkpoint" in published:
        assert counted == int(published.split()[0].replace(",", ""))
    else:
        assert abs(counted / 175.0e9 - 1) < 0.003
tables = (50257 + 1024) * 768
assert llama2_7b.intermediate_size == 256 * math.ceil(8 / 3 * 4096 / 256)
matrices = llama_formula(llama2_7b) - 32000 * 4096  # the embedding is looked up, not multiplied
crossing = 2 * matrices / (4 * 32 * 32 * 128)
print(f"Llama 2 7B: at position {crossing:,.0f} attention takes as many operations as the weights")
assert crossing > 6 * 4096
assert round(tables / 1e6, 1) == 39.4 and round(gpt2_formula(gpt2_small) / 1e6, 1) == 124.4

# %% [markdown]
# 39.4 million are in the two tables, and 124.4 million in all, more than the paper says. Within the 4,096 positions of
# Llama 2 7B the weights dominate the operations.
#
# ## 5 · Watch one learn
#
# A task whose best possible loss is known: 16 random letters of an alphabet of 32, then the same 16 again.
#
# - The first 16 are pure chance: nobody can do better than $\ln 32 = 3.466$ each on average.
# - The second 16 can be known with certainty: 0.
# - A table of the frequencies of letter *pairs* (bigrams) has $\ln 32$ everywhere: after a given letter, every letter
#   is equally likely.
#
# The sequence offers 31 predictions, 15 of letters that are pure chance. So the bigram baseline is 3.466 and the floor
# is $\frac{15}{31} \ln 32 = 1.677$. To do better than the baseline, look back 15 positions: there stands the letter
# that comes next.

# %%
BASELINE, FLOOR = math.log(VOCAB), 15 / 31 * math.log(VOCAB)


def sequences(generator, n):
    """n rows of PERIOD random letters, twice: [n, 32]."""
    return np.tile(generator.integers(0, VOCAB, (n, PERIOD)), (1, 2))


def train(model, steps, seed=0):
    """Loss per step, each on 32 sequences that were never seen before."""
    optimizer = mp.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)  # without its decay: Adam of Lesson 0
    generator, losses = np.random.default_rng(seed), []
    for step in range(steps):
        batch = sequences(generator, 32)
        loss = model.loss(batch, batch)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)  # warm-up (Lesson 0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loss_by_position(model, n=256):
    """Mean loss of each of the 31 predictions, on fresh sequences."""
    batch = sequences(np.random.default_rng(99), n)
    with mp.no_grad():
        log_p = F.log_softmax(model(batch)).numpy()[:, :-1]
    return -np.take_along_axis(log_p, batch[:, 1:, None], axis=-1)[..., 0].mean(axis=0)  # [31]


counts = np.ones((VOCAB, VOCAB))  # a bigram table, estimated from 50,000 sequences
for row in np.split(sequences(np.random.default_rng(1), 50_000), 50):
    np.add.at(counts, (row[:, :-1].ravel(), row[:, 1:].ravel()), 1)
test = sequences(np.random.default_rng(99), 256)
bigram = -np.log((counts / counts.sum(axis=1, keepdims=True))[test[:, :-1], test[:, 1:]]).mean()

losses = train(model, 60 if REDUCED else 300)
final = loss_by_position(model)
print(f"\nbigram table: {bigram:.3f} (theory {BASELINE:.3f})")
halves = final[:15].mean(), final[15:].mean()
print(f"transformer:  {final.mean():.3f} (floor {FLOOR:.3f}); first half {halves[0]:.3f}, second half {halves[1]:.4f}")
assert abs(bigram - BASELINE) < 0.01
assert losses[-1] < losses[0]
if not REDUCED:
    assert FLOOR - 0.05 < final.mean() < FLOOR + 0.1, "it reaches the floor, and does not cross it"
    assert halves[1] < 0.05 and halves[0] > BASELINE - 0.1

# %% [markdown]
# The first half stays at chance, and the second is learned: the mean reaches the floor and does not cross it.
#
# Which head does it? The library's attention op does not hand out the weights $a_{ts}$, so we open it up: a module that
# takes the place of each `self_attn`, uses its matrices, and keeps the weights in sight. (`copy(share=True)` makes a
# new model over the same arrays, and `replace` puts a module where another was; the original is untouched.)
#
# **Predict:** there are two layers of four heads. How many of the eight learn to look 15 positions back?

# %%
class OpenAttention(mp.nn.Module):
    """An attention module opened up: the same computation, with the weights kept; and, on request, without the mask."""

    def __init__(self, attention, causal=True):
        self.attention, self.causal, self.weights = attention, causal, None

    def forward(self, x, context, layer, rng):
        a, (B, T, _) = self.attention, x.shape

        def heads(y):  # [B, T, H * D] -> [B, H, T, D]
            return y.reshape(B, T, -1, a.head_dim).swapaxes(1, 2)

        cos, sin = context.rotation  # of each position's angles (section 3)
        q, k = F.rope(heads(a.q_proj(x)), cos, sin), F.rope(heads(a.k_proj(x)), cos, sin)
        xp = mp.backend.xp_of(q.data)  # NumPy, or CuPy on a GPU
        group = xp.arange(q.shape[1]) // (q.shape[1] // k.shape[1])  # which key head each query head reads
        k, v = k[:, group], heads(a.v_proj(x))[:, group]
        scores = q @ k.swapaxes(2, 3) / math.sqrt(a.head_dim)  # [B, H, T, T]
        if self.causal:
            scores = F.where(xp.tril(xp.ones((T, T), bool)), scores, -np.inf)
        weights = F.softmax(scores)
        self.weights = weights.numpy()
        return a.o_proj((weights @ v).swapaxes(1, 2).reshape(B, T, -1))


def opened(model, causal=True):
    twin = model.copy(share=True)
    for i, block in enumerate(twin.model.layers):
        twin.replace(f"model.layers.{i}.self_attn", OpenAttention(block.self_attn, causal))
    return twin


watched = opened(model)
difference = np.abs(watched(test).numpy() - model(test).numpy()).max()
print(f"\nthe model with its attention opened up gives the same logits: largest difference {difference:.1e}")
assert difference < 1e-3
patterns = np.stack([block.self_attn.weights.mean(axis=0) for block in watched.model.layers])  # [layer, head, T, T]
looks_back = np.array(
    [[np.diagonal(head, -(PERIOD - 1)).mean() for head in layer] for layer in patterns]
)  # weight at distance 15
print("\nattention paid to the position 15 back; a row for each layer, a column for each head:\n", looks_back.round(2))
if not REDUCED:
    many = (looks_back > 0.8).sum(axis=1)
    print(f"of the heads of layer 0 (the first), {many[0]} look back; of layer 1, {many[1]}")
    assert looks_back[1].min() > 0.8 and looks_back[0].max() < 0.5
late = []
for layer in range(2):
    silenced = model.copy()
    silenced.model.layers[layer].self_attn.o_proj.weight.data[:] = 0  # this layer's attention writes nothing
    late.append(loss_by_position(silenced)[15:].mean())
if not REDUCED:
    print(f"loss of the second half without the attention of layer 0: {late[0]:.2f}; without that of layer 1: {late[1]:.2f}")
    assert late[1] > BASELINE - 0.1 and 0.5 < late[0] < late[1]

# %% [markdown]
# All four of the last layer, and none of the first. Silence the last layer's attention and the loss is back at chance;
# but silencing the first's costs, too. Where a head looks does not tell all that it does.
#
# ## 6 · Writing, and the cache
#
# To write, the model predicts a token, appends it, and predicts again. Done naively, each token costs a forward pass
# over all positions. But under the causal mask earlier positions never learn of later ones: their keys and values do
# not change. So keep them (the keys as rotated), in the **KV cache**, and compute only the new position; its query
# reads the kept keys, and no later position needs it. Reading the prompt (*prefill*) still takes all its positions in
# one pass; each later token (*decode*) takes one. A decode step reads all weights and the whole cache for the
# arithmetic of one position (a batch shares the weights, but each row has its own cache), so memory bandwidth often
# bounds it and not arithmetic (Pope et al. 2022, arXiv:2211.05102).
#
# The cache must change nothing but the time. We give the model the 16 letters and let it write the repetition.

# %%
prompt = sequences(np.random.default_rng(5), 4)[:, : PERIOD + 1]  # the 16 letters, and the first again
written = model.generate(prompt, max_new_tokens=15)
without = model.generate(prompt, max_new_tokens=15, use_cache=False)
letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
print("\nprompt           continuation    (each time the likeliest letter)")
for row in written:
    text = "".join(letters[i] for i in row)
    print(f"{text[: PERIOD + 1]} {text[PERIOD + 1 :]}")
copied = (written[:, PERIOD:] == written[:, :PERIOD]).mean()
print(f"letters copied rightly: {copied:.0%}; cached equals uncached, token for token: {(written == without).all()}")
assert np.array_equal(written, without)
options = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.9, "seed": 3}  # from the likeliest letters, 0.9 together
assert np.array_equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))
if not REDUCED:
    assert copied > 0.95

# %% [markdown]
# What does the cache weigh? Per position: a key and a value for each of $K$ heads in each of $L$ layers,
# $2 \cdot L \cdot K \cdot D$ numbers. Grouped-query attention divides this by $H/K$.

# %%
def cache_bytes(c, positions, itemsize):
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * positions * itemsize


cache = mp.KVCache()
model(test[:3], past_key_values=cache)
print(f"\nKV cache of 3 rows x 32 positions: {cache.nbytes:,} bytes")
assert cache.nbytes == 3 * cache_bytes(config, 32, 4) == kv_cache_bytes(config, batch=3, positions=32)
for name, c, length in (("SmolLM2-135M", smollm2, 2048), ("Llama 2 7B", llama2_7b, 4096), ("GPT-3", gpt3, 2048)):
    print(f"  {name:12s} at {length} positions, float16: {cache_bytes(c, length, 2) / 2**20:8,.0f} MiB")

# %% [markdown]
# And what does it buy? Take a somewhat larger model, of random weights, and look at one token at several lengths, with
# and without the cache: how many positions pass through a layer for it, and how long it takes on this machine.
#
# **Predict:** 960 positions have been read. How many pass through a layer for the next token, without the cache and
# with? Is it faster by the same factor?

# %%
larger = mp.Transformer(
    llama(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024)
)
lengths = [32, 64, 128] if REDUCED else [32, 64, 128, 256, 512, 960]


def one_token(length, use_cache, tokens=9):
    """(positions that pass through a layer, seconds of the fastest) for a token that follows `length` positions."""
    stream = generate_stream(larger, rng.integers(0, 256, (1, length)), None, tokens + 2, use_cache=use_cache)
    next(stream)  # the first token reads the prompt
    with larger.watch("model.layers.0.mlp") as seen:
        next(stream)
    times = []
    for _ in range(tokens):
        begin = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - begin)
    return seen["model.layers.0.mlp"].shape[1], min(times)


one_token(16, True)
uncached, cached = [], []
print("\nprompt    positions without cache / with    time without / with")
for n in lengths:
    (all_of_them, a), (new, b) = one_token(n, False), one_token(n, True)
    print(f"{n:6d}    {all_of_them:17d} / {new:8d}    {a / b:19.1f}")
    assert all_of_them == n + 1 and new == 1  # the token before is now part of what is read
    uncached.append(a)
    cached.append(b)
assert REDUCED or uncached[-1] / cached[-1] < 961

# %% [markdown]
# 961 against 1. The time falls by a smaller factor: with the cache each token also costs what does not depend on the
# length, such as Python's calls, and its query still reads every kept key.
#
# ## 7 · Break it: let the model peek
#
# Take the causal mask away and train on the same task. Then let the model write.
#
# **Predict:** where does the training loss end, above the floor of 1.677 or below? And how well does the model write?

# %%
peeking = opened(mp.Transformer(config, seed=0), causal=False)
peeked = train(peeking, 60 if REDUCED else 300)
print(f"\nwithout the mask the training loss ends at {peeked[-1]:.3f}; the honest floor is {FLOOR:.3f}")
row = prompt.copy()
for _ in range(15):
    with mp.no_grad():
        row = np.concatenate([row, peeking(row).numpy()[:, -1].argmax(axis=-1)[:, None]], axis=1)
peek_copied = (row[:, PERIOD + 1 :] == row[:, 1:PERIOD]).mean()
honest_copied = (written[:, PERIOD + 1 :] == written[:, 1:PERIOD]).mean()
print(f"writing the repetition: {peek_copied:.0%} of letters right;", end=" ")
print(f"the honest model: {honest_copied:.0%}; chance: {1 / VOCAB:.0%}")
if not REDUCED:
    assert peeked[-1] < 0.5 * FLOOR
    assert peek_copied < 0.2 and honest_copied > 0.95

# %% [markdown]
# Nothing crashed, and the loss fell *below the floor*, which no honest predictor of random letters can cross on
# average. That is the sign of a leak: the answer stands in the input, one position to the right. Where nothing stands
# on the right, the model gets fewer than a fifth of the letters.
#
# A second mistake is quieter. To write from prompts of different lengths in one batch, fill them up on the left, with
# **padding**, so that each ends where its continuation begins. Two things must be right: nobody may *see* the padding
# (the mask), and positions must start at the first real token. Compare the logits of a padded prompt with those of the
# prompt alone.
#
# **Predict:** the positions are wrong, counted from the padding. Which model notices, GPT-2 or Llama?

# %%
short = rng.integers(0, VOCAB, (1, 6))
padded = np.concatenate([np.zeros((1, 5), int), short], axis=1)
mask = np.array([[0] * 5 + [1] * 6])
naive = np.arange(11)[None]  # positions counted from the padding
print("\nlargest change of the last logits by left padding:")
print("            all right      positions wrong      mask forgotten")
changes = {}
for dialect in (gpt2, llama):
    c = dialect(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)  # so that attention matters
    m = mp.Transformer(c, seed=0)
    alone = m(short).numpy()[0, -1]
    runs = m(padded, mask), m(padded, mask, position_ids=naive), m(padded)
    change = changes[c.model_type] = [np.abs(run.numpy()[0, -1] - alone).max() for run in runs]
    print(f"  {c.model_type:6s}  {change[0]:10.1e}  {change[1]:17.1e}  {change[2]:18.1e}")
assert changes["gpt2"][0] < 1e-4 and changes["llama"][0] < 1e-4
assert changes["gpt2"][1] > 0.1, "learned positions: the prompt has moved"
assert changes["llama"][1] < 1e-3, "rotary positions: only distances matter, and they are the same"
assert changes["gpt2"][2] > 0.1 and changes["llama"][2] > 0.1

# %% [markdown]
# Wrong positions change GPT-2's logits by far and leave Llama's as they were, for only distances matter to it
# (section 3). A test on Llama alone would not find this mistake. A forgotten mask changes both.
#
# ## The picture
#
# Left: the loss of the honest model meets the floor; the peeking one falls through it. Middle: the attention of all
# eight heads, averaged over 256 sequences (a row looks, a column is looked at). The bright stripe in the lower row is
# "15 back". Right: the time of a token.

# %%
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
fig = plt.figure(figsize=(16, 4.6), layout="constrained")
parts = fig.subfigures(1, 3, width_ratios=[1, 1.75, 1])
a, heads, c = parts[0].subplots(), parts[1].subplots(2, 4, sharex=True, sharey=True), parts[2].subplots()
a.plot(losses, color=BLUE, label="with the causal mask")
a.plot(peeked, color=ORANGE, label="mask forgotten")
for level, name in ((BASELINE, "bigram table"), (FLOOR, "floor: what can be known")):
    a.axhline(level, color=GREY, ls="--", lw=1)
    up = level == BASELINE
    place = {"ha": "right", "va": "bottom" if up else "top", "fontsize": 9, "color": GREY}
    a.text(len(losses), level + (0.05 if up else -0.08), name, **place)
a.set(xlabel="training step", ylabel="loss (nats per letter)", ylim=(0, 4))
a.set_title("Reduced: too few steps" if REDUCED else "A loss that is too good is a leak")
a.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.8))
for (layer, head), axis in np.ndenumerate(heads):
    image = axis.imshow(patterns[layer, head], cmap="viridis", vmin=0, vmax=1)
    axis.set_title(f"layer {layer}, head {head}", fontsize=9)
    axis.set(xticks=range(0, 32, 16), yticks=range(0, 32, 16))
parts[1].suptitle("Who looks 15 positions back?")
parts[1].supxlabel("position looked at", fontsize=10)
parts[1].supylabel("position that looks", fontsize=10)
parts[1].colorbar(image, ax=heads, shrink=0.7, label="attention")
c.loglog(lengths, np.array(uncached) * 1e3, "o-", color=ORANGE, label="everything anew")
c.loglog(lengths, np.array(cached) * 1e3, "s-", color=BLUE, label="with the KV cache")
c.set(xlabel="positions so far", ylabel="milliseconds for one token", title="What the cache buys")
c.set_xticks(lengths, [str(n) for n in lengths])
c.minorticks_off()
c.grid(alpha=0.25)
c.legend(fontsize=9)
fig.savefig(OUT / "02_transformer.png", dpi=130)
print("picture:", OUT / "02_transformer.png")

# %% [markdown]
# ## Quiz
#
# **1.** Which of the two, attention or the MLP, moves information between positions?
#
# <details><summary>Answer</summary>
#
# Attention. The MLP works on each position alone.
#
# </details>
#
# **2.** Why does the rotary score of two tokens not change if both move 5000 positions on?
#
# <details><summary>Answer</summary>
#
# The query is turned by $m\theta$ and the key by $n\theta$; in the product only the difference $m - n$ is left. That is
# also why a Llama forgives wrong position ids under left padding, and GPT-2 does not.
#
# </details>
#
# **3.** Of the 31 predictions in a sequence of section 5, why can nobody do better than 1.677 nats on average?
#
# <details><summary>Answer</summary>
#
# 15 of them are of letters that are pure chance, $\ln 32$ each; the other 16 can be known.
# $\frac{15}{31} \ln 32 = 1.677$.
#
# </details>
#
# **4.** A training loss falls below that floor. What do you suspect, and what would show it?
#
# <details><summary>Answer</summary>
#
# A leak: the model sees the answer, here because the causal mask is missing. Let it write: then nothing stands on the
# right to be read, and it copies badly.
#
# </details>
#
# **5.** Why do the kept keys and values stay valid when a new token is appended, and what is the price of keeping them?
#
# <details><summary>Answer</summary>
#
# Under the causal mask earlier positions never learn of later ones, so their keys and values do not change. The price
# is memory: $2 \cdot L \cdot K \cdot D$ numbers a position.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("02.1", value)`, or at the terminal with
# `minipeft exercise 02.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 02.3 FILE.py`.
#
# **02.1 Where the parameters are.** For GPT-2 small, which share of all parameters sits in attention (biases included)?
# A method that changes only attention cannot reach more. Then look: what of the MLPs, and of GPT-3?
#
# **02.2 The cache of a larger model.** Llama 3 8B has 32 layers of width 4096, and 32 query heads of 128 channels that
# share 8 key heads. How many GiB does its cache take for one sequence of 8192 positions in 16 bits?
#
# **02.3 The mask.** Write `attention_weights(scores)`: from the scores $q_t \cdot k_s / \sqrt D$ of one head, `[T, T]`,
# the weights $a_{ts}$, causal, each row with the sum 1. (Scores may be large.)
#
# Further, without a checker:
#
# - **Two layers.** Our task has a fixed distance, so one layer is enough. Let the period vary from row to row, from 8
#   to 16. Now a head must find "the letter after the last time I saw this letter": an *induction head*, which takes two
#   layers working together (Olsson et al. 2022). How many more steps does it take, and what do the patterns show?
# - **The logit lens.** `llama_by_hand` returns what each branch wrote. Add the pieces up one after the other, and read
#   the final norm and the token table after each. From which branch on does the trained model know the next letter?
#
# <details><summary>Solution of 02.1</summary>
#
# By the formula of section 4, with $L = 12$, $d = 768$: not a quarter. The MLPs have 45.5 %; in GPT-3 the tables are
# lost, and attention has a third.
#
# ```python
# check("02.1", 12 * (4 * 768**2 + 4 * 768) / 124_439_808)
# ```
#
# </details>
#
# <details><summary>Solution of 02.2</summary>
#
# Two, for a key and a value; 32 layers; 8 heads of 128; two bytes.
#
# ```python
# check("02.2", 2 * 32 * 8 * 128 * 8192 * 2 / 2**30)
# ```
#
# </details>
#
# <details><summary>Solution of 02.3</summary>
#
# The mask comes before the softmax; taking the largest score off first keeps `exp` finite.
#
# ```python
# def attention_weights(scores):
#     seen = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)
#     weights = np.exp(seen - seen.max(axis=1, keepdims=True))
#     return weights / weights.sum(axis=1, keepdims=True)
#
# check("02.3", attention_weights)
# ```
#
# </details>
