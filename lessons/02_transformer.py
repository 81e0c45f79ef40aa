# %% [markdown]
# # Lesson 2 · The transformer: what is in it, what it costs, how it writes
#
# This course fine-tunes one kind of model: a decoder-only transformer (Vaswani et al. 2017, arXiv:1706.03762; the
# decoder alone as in GPT-2, Radford et al. 2019). After this lesson you can write each part of a Llama in NumPy,
# count its parameters, operations and cache, say what bounds its speed, and notice a missing mask or wrong padding.
#
# You need Lessons 0 and 1. Reading takes about 25 minutes (200 words or 25 lines of code a minute, up to the quiz).
# Run it with `python lessons/02_transformer.py` (half a minute on two cores), or open it as a notebook.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import math
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting.memory import kv_cache_bytes
from minipeft.nn.generation import token_probabilities

F = mp.functional
REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
if REDUCED:
    print("REDUCED SETTING: 16 training steps for 300, too few to learn the task: what the text says of trained models is not checked.\n")

# %% [markdown]
# ## 1 · The stream, a norm, an MLP
#
# The shipped model, from token ids to logits, with the shape of each weight:

# %%
base = mp.load_base("numpy")[0]  # what is done by hand here is NumPy's
diagrams.block(base.config).savefig(OUT / "02_transformer_block.png")

# %% [markdown]
# A token id picks a row of a table, the **embedding**: a vector of $d$ numbers. So $T$ tokens are an array $x$ of
# $[T, d]$, the **residual stream**. Each of $L$ **blocks** reads the stream and *adds* to it, twice:
#
# $$x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x)) .$$
#
# Attention (section 2) moves information between positions; the MLP works on each position alone. A last norm and a
# product with a $[V, d]$ table make of each position a logit for each of the $V$ possible next tokens.
#
# A **norm** keeps the numbers of a position at one size. *RMS norm* (Zhang & Sennrich 2019, arXiv:1910.07467) divides
# by the root of the mean square and multiplies by $d$ trained weights $w$:
#
# $$\mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot w .$$
#
# Layer norm (Lesson 1) also subtracts the mean and adds a bias. Both norms give the same for $x$ and $10x$, but for the
# small $\epsilon$. Differentiate both sides: $10\,\mathrm{norm}'(10x) = \mathrm{norm}'(x)$. So at $10x$ the derivative
# (Lesson 1's Jacobian) is a tenth.

# %%
def norm(x, weight, eps):  # [T, d] -> [T, d]
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


rng = np.random.default_rng(0)
block = base.model.layers[0]
x = rng.standard_normal((5, base.config.hidden_size)).astype(np.float32)
scale, eps = block.input_layernorm.weight.numpy(), base.config.rms_norm_eps
h, ours = norm(x, scale, eps), block.input_layernorm(mp.Tensor(x)).numpy()
assert np.allclose(h, ours, atol=1e-5) and np.allclose(norm(10 * x, scale, eps), ours, atol=1e-3)

# %% [markdown]
# The **MLP** (multilayer perceptron) maps the $d$ numbers of a normed position, $h$, to $m$, applies a nonlinearity,
# and maps back. This one (**SwiGLU**; Shazeer 2020, arXiv:2002.05202) makes two wide arrays. The first is a *gate*:
# through $\mathrm{silu}(z) = z / (1 + e^{-z})$ it scales each number of the second.
#
# $$\mathrm{MLP}(h) = W_\text{down}\,\big(\mathrm{silu}(W_\text{gate}\, h) \cdot W_\text{up}\, h\big) .$$

# %%
def mlp(h, gate, up, down):  # [T, d] -> [T, d]; weights are stored as [outputs, inputs]
    z = h @ gate.T  # [T, m]
    return (z / (1 + np.exp(-z)) * (h @ up.T)) @ down.T


weights = [getattr(block.mlp, f"{name}_proj").weight.numpy() for name in ("gate", "up", "down")]
wide, ours = mlp(h, *weights), block.mlp(mp.Tensor(h)).numpy()
print("MLP, by hand against the library's:", np.abs(wide - ours).max())
assert np.allclose(wide, ours, atol=1e-5)

# %% [markdown]
# ## 2 · Attention by hand
#
# In the figure a filled square says that the token of its row sees that of its column. (Padding: section 7; the prefix:
# Lesson 6; packing: Lesson 8.)

# %%
diagrams.attention_mask().savefig(OUT / "02_transformer_masks.png")

# %% [markdown]
# From its normed stream $h_t$, each position $t$ makes three vectors of $D$ numbers: a **query** (what am I looking
# for?), a **key** (what is here?) and a **value** (what do I hand over?):
#
# $$q_t = W_q h_t, \qquad k_t = W_k h_t, \qquad v_t = W_v h_t .$$

# %%
attention, D = block.self_attn, base.config.head_dim
projections = attention.q_proj, attention.k_proj, attention.v_proj
W_q, W_k, W_v = (projection.weight.numpy()[:D] for projection in projections)  # [D, d]: of the first head, see below
q, k, v = h @ W_q.T, h @ W_k.T, h @ W_v.T  # [T, D]
print("\nnormed stream", h.shape, "-> query, key, value", q.shape, k.shape, v.shape)
assert all(np.allclose(a, p(mp.Tensor(h)).numpy()[:, :D], atol=1e-5) for a, p in zip((q, k, v), projections))

# %% [markdown]
# Position $t$ receives an average of the values it may see. A value weighs more if its key fits the query:
#
# $$o_t = \sum_{s \le t} a_{ts}\, v_s, \qquad
#   a_{t\cdot} = \mathrm{softmax}\Big(\frac{q_t \cdot k_s}{\sqrt D}\Big)_{s \le t} .$$
#
# $s \le t$ is the **causal mask**: a model that is to predict the next token must not look at it. With the mask, one
# forward pass makes an honest prediction at each of the $T$ positions, and training learns from all that have a next
# token. (In batched code, forbidden scores become $-\infty$ *before* the softmax. If weights were set to 0 after it,
# later tokens would stay in its denominator.)
#
# All this is a **head**. It makes one average for each position, so a block has $H$ of them, each with its own $W_q$,
# to read several places separately. Their outputs are concatenated to $[T, HD]$, and $W_o$ maps them back to $[T, d]$.
# Keys and values may have fewer heads, $K$: query head $h$ reads key and value head $\lfloor h / (H/K) \rfloor$. This
# *grouped-query attention* is close to $K = H$ in quality and to $K = 1$ (*multi-query*) in speed, report Ainslie et
# al. (2023, arXiv:2305.13245).

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

# %% [markdown]
# Why divide by $\sqrt D$?
#
# **Predict:** the numbers of $q$ and $k$ are independent, with mean 0 and variance 1, and $D = 64$. How large is
# $q \cdot k$, typically?

# %%
scores = (rng.standard_normal((1000, 16, 64)) * rng.standard_normal((1000, 1, 64))).sum(axis=-1)  # 1000 queries, 16 keys
largest = [F.softmax(mp.Tensor(s)).numpy().max(axis=-1).mean() for s in (scores, scores / math.sqrt(64))]
print(f"standard deviation of q·k: {scores.std():.2f}; largest of 16 weights: {largest[0]:.2f}, from q·k / 8: {largest[1]:.2f}")
assert abs(scores.std() - 8) < 0.2 and largest[0] > 0.8 and largest[1] < 0.4

# %% [markdown]
# $q \cdot k$ is a sum of $D$ independent products of variance 1, so its standard deviation is $\sqrt D = 8$. Undivided,
# such scores put most of the weight on one of 16 keys. The derivative of weight $a_i$ by score $j$ is
# $a_i (\delta_{ij} - a_j)$, with $\delta_{ii} = 1$ and else 0. Where one weight is near 1, all of these are near 0, and
# little gradient reaches $W_q$ and $W_k$: the harm that Vaswani et al. (section 3.2.1) suspect.
#
# ## 3 · Rotary positions: only distances matter
#
# In $q_t \cdot k_s$ no position stands: swap two earlier tokens, and a single attention layer hands the last position
# the same sum. GPT-2 adds a trained vector for each position to the embedding. Llama rotates (Su et al. 2021,
# arXiv:2104.09864): it reads two numbers of the query at position $m$ as real and imaginary part of a complex number
# $q_m$, and the same two of the key at position $n$ as $k_n$. They add $\mathrm{Re}(q_m \overline{k_n})$ to the dot
# product, with the conjugate $\overline{k_n}$. Each is turned by an angle proportional to its position,
#
# $$q_m \to q_m e^{i m \theta}, \quad k_n \to k_n e^{i n \theta}
#   \quad\Rightarrow\quad \mathrm{Re}\big(q_m e^{im\theta}\,\overline{k_n e^{in\theta}}\big)
#   = \mathrm{Re}\big(q_m \overline{k_n}\, e^{i(m-n)\theta}\big),$$
#
# so that of the positions only the distance $m - n$ enters the score. Values are not turned: nothing turned by
# $m\theta$ multiplies them, so $v_n e^{in\theta}$ would carry the absolute $n$ into the stream. Pair $j$, the numbers
# $j$ and $j + D/2$ (in Meta's code $2j$ and $2j + 1$; Lesson 13), has its own speed, $\theta_j = 10000^{-2j/D}$. The
# fastest turns one radian a position: the angles of neighbors differ by much, but it comes full circle after 6
# positions. The slowest (at $D = 64$) takes tens of thousands of positions for a circle: before that, a larger distance
# is always a larger angle.
#
# **Predict:** with the query at 17 and the key at 10 the score is $s$. Move both 5,000 positions on. What is it now?

# %%
D = 64
theta = 10000.0 ** (-np.arange(D // 2) / (D // 2))  # [D/2]


def rope(x, position):
    z = (x[: D // 2] + 1j * x[D // 2 :]) * np.exp(1j * position * theta)
    return np.concatenate([z.real, z.imag])


q, k = rng.standard_normal((2, D))
cos, sin = np.cos(17 * theta), np.sin(17 * theta)
assert np.allclose(F.rope(mp.Tensor(q[None, None, None]), cos[None, None], sin[None, None]).data.ravel(), rope(q, 17), atol=1e-14)
scores, farther = [rope(q, m) @ rope(k, m - 7) for m in (17, 117, 5017)], rope(q, 17) @ rope(k, 9)
print("\nscores at distance 7:", "  ".join(f"{s:.10f}" for s in scores), f"  at distance 8: {farther:.10f}")
assert np.allclose(scores, scores[0], atol=1e-9) and abs(farther - scores[0]) > 1e-3
assert theta[0] == 1 and 4e4 < 2 * math.pi / theta[-1] < 5e4, "positions of a full circle of the slowest pair"

# %% [markdown]
# Still $s$. That does not make a model good at distances longer than any in its training. There the slowest pairs,
# which had not completed a turn, come to angles that it has never seen. Chen et al. (2023, arXiv:2306.15595) see
# LLaMA fail there, and rescale the positions into the trained range.
#
# ## 4 · The whole model by hand
#
# Here is all of Llama (Touvron et al. 2023, arXiv:2302.13971) on one sequence, with one table at both ends.

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
config = mp.TransformerConfig.llama(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                    num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
model = mp.Transformer(config, seed=0)
ids = rng.integers(0, VOCAB, 2 * PERIOD)
(by_hand, _), logits = llama_by_hand(model, ids), model(ids[None]).numpy()[0]
print("\nLlama in NumPy against mp.Transformer, largest difference of a logit:", np.abs(by_hand - logits).max())
assert np.allclose(by_hand, logits, atol=1e-5)

# %% [markdown]
# The norm stands on the branch and not on the stream (*pre-norm*). So the final stream is the embedding plus what each
# branch wrote. The derivative of $x + f(x)$ is $1 + f'(x)$: along the additions, part of the gradient reaches every
# block without passing through the branch of another. The first transformers had the norm on the stream,
# $x \leftarrow \mathrm{norm}(x + \mathrm{MLP}(x))$ (*post-norm*). What does this change at initialization, in blocks of
# MLPs alone?
#
# **Predict:** from 4 blocks to 64, what becomes of the stream's size and of the last matrix's gradient in pre-norm, and
# what in post-norm?

# %%
def at_the_start(L, post, d=64):
    """Of L blocks, MLPs alone: (root mean square of the final stream, norm of the gradient by the last matrix)."""
    g = np.random.default_rng(0)
    x, rms = mp.Tensor(g.standard_normal((32, d))), mp.nn.RMSNorm(d)
    for _ in range(L):
        w1, w2 = (mp.nn.Parameter(g.standard_normal((d, d)) / math.sqrt(d)) for _ in range(2))
        x = rms(x + F.relu(x @ w1) @ w2) if post else x + F.relu(rms(x) @ w1) @ w2
    F.cross_entropy(x if post else rms(x), g.integers(0, d, 32)).backward()
    return math.sqrt((x.data**2).mean()), np.linalg.norm(w2.grad)


print("\nblocks    pre-norm: stream, gradient    post-norm: stream, gradient")
starts = [(L, *at_the_start(L, False), *at_the_start(L, True)) for L in (4, 16, 64)]
for row in starts:
    print("{:6d}    {:16.2f}, {:8.2f}    {:17.2f}, {:8.2f}".format(*row))
assert starts[2][1] > 3 * starts[0][1] and starts[2][2] < starts[0][2] / 3
assert abs(starts[2][4] - starts[0][4]) < 0.1 and starts[2][4] > 4 * starts[2][2]

# %% [markdown]
# In pre-norm the variances of the embedding and of all branches add up. So the stream grows about like $\sqrt{L}$, and
# the last norm divides the gradient by the stream's size (section 1). In post-norm each norm sets the stream back to
# size 1, and near the output the gradient is about as large after 64 blocks as after 4. After 64 it is over four times
# that of pre-norm. Xiong et al. (2020, arXiv:2002.04745) prove such bounds: falling like $1/\sqrt L$ in pre-norm,
# constant in post-norm. So large a gradient, they argue, is why post-norm needs a warm-up (Lesson 0); their pre-norm
# models train comparably well without. (Nothing is trained here, so this need is not shown. Adam divides each gradient
# by its usual size, which makes the argument less direct.)
#
# ### Its parameters, counted twice
#
# GPT-2 differs from Llama: layer norm, a trained table of positions, an MLP $W_2\,\mathrm{gelu}(W_1 h)$ with $m = 4d$
# (GELU: Lesson 1), biases, $K = H$ and $HD = d$. With a vocabulary of $V$ and at most $P$ positions it has
#
# $$\underbrace{Vd}_{\text{tokens}} + \underbrace{Pd}_{\text{positions}} + L\,(\underbrace{4d^2 + 4d}_{\text{attention}}
#   + \underbrace{8d^2 + 5d}_{\text{MLP}} + \underbrace{4d}_{\text{two norms}}) + \underbrace{2d}_{\text{last norm}}$$
#
# parameters, with a bias for each output and two vectors in a layer norm. (The output table *is* the token table: they
# are **tied**, which saves $Vd$.) A Llama has, with $V' = V$ if tied and $2V$ if not,
#
# $$V'd + L\,(2\,d\,HD + 2\,d\,KD + 3\,d\,m + 2d) + d .$$
#
# For each token, each number of a matrix takes one multiplication and one addition, except in the embedding, which is
# looked up: $2N$ operations for $N$ numbers. Attention at position $t$ takes $4LHDt$ more, half for the scores and half
# for the average of the values, so over a sequence its cost grows with $T^2$. Training takes three times both, so $6N$
# a token for the weights: the backward pass (Lesson 1) has two products for each one forward.
#
# **Predict:** Llama 2 7B has $L = 32$ and $HD = 4096$. At its last position, 4,096, does attention take more operations
# than the weights?

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
smollm2 = llama(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)  # fmt: skip
llama2_7b = llama(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, max_position_embeddings=4096, tie_word_embeddings=False)  # fmt: skip
print("\nmodel           by formula    by counting    its checkpoint")
for name, c, formula, published in (
    ("GPT-2 small", gpt2_small, gpt2_formula, 124_439_808),
    ("SmolLM2-135M", smollm2, llama_formula, 134_515_008),
    ("Llama 2 7B", llama2_7b, llama_formula, 6_738_415_616),
):
    counted = sum(p.size for p in mp.Transformer(c, seed=None).parameters())  # no weight is allocated
    print(f"{name:12s} {formula(c):>13,}  {counted:>13,}     {published:>13,}")
    assert counted == formula(c) == published
matrices = llama_formula(llama2_7b) - 32000 * 4096  # the embedding is looked up, not multiplied
crossing = 2 * matrices / (4 * 32 * 4096)
print(f"Llama 2 7B: at position {crossing:,.0f} attention takes as many operations as the weights")
assert crossing > 6 * 4096

# %% [markdown]
# No, less than a sixth as many.
#
# ## 5 · Watch one learn
#
# A task whose best loss is known: 16 random letters of an alphabet of 32, then the same 16 again.
#
# - The first 16 are pure chance: nobody can do better than $\ln 32 = 3.466$ each on average.
# - The second 16 can be known with certainty: 0.
# - A table of letter *pairs* (bigrams) has $\ln 32$ everywhere: after a given letter, every letter is equally likely.
#
# Of 31 predictions 15 are of letters that are pure chance. So the floor is
# $\frac{15}{31} \ln 32 = 1.677$. To get there, look back 15 positions: there stands the letter that comes next.

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
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)  # warm-up (Lesson 0), here from 1/30 on
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


test = sequences(np.random.default_rng(99), 256)
losses = train(model, 16 if REDUCED else 300)
final = loss_by_position(model)
first, second = final[:15].mean(), final[15:].mean()
print(f"\ntransformer: {final.mean():.3f} (floor {FLOOR:.3f}); first half {first:.3f} (chance {BASELINE:.3f}), second half {second:.4f}")
if not REDUCED:
    assert FLOOR - 0.05 < final.mean() < FLOOR + 0.1, "it reaches the floor, and does not cross it"
    assert second < 0.05 and first > BASELINE - 0.1

# %% [markdown]
# The first half stays at chance, and the second is learned.
#
# **Predict:** there are two layers of four heads. How many of the eight learn to look 15 positions back?

# %%
attentions = model(test, output_attentions=True)[1]  # the weights a_ts of each layer, [256, H, T, T]
patterns = np.stack([a.numpy().mean(axis=0) for a in attentions])  # [layer, head, T, T]
looks_back = np.diagonal(patterns, -(PERIOD - 1), 2, 3).mean(axis=-1)  # weight at distance 15
print("\nattention paid to the position 15 back; a row for each layer, a column for each head:\n", looks_back.round(2))
assert REDUCED or (looks_back[1].min() > 0.8 and looks_back[0].max() < 0.1)
late = []
for layer in range(2):
    silenced = model.copy()
    silenced.model.layers[layer].self_attn.o_proj.weight.data[:] = 0  # this layer's attention writes nothing
    late.append(loss_by_position(silenced)[15:].mean())
one_layer = mp.Transformer(replace(config, num_hidden_layers=1), seed=0)
train(one_layer, 16 if REDUCED else 300)
late.append(loss_by_position(one_layer)[15:].mean())
if not REDUCED:
    print("loss of the second half: layer 0 silenced {:.2f}, layer 1 {:.2f}; trained with one layer {:.2f}".format(*late))
    assert late[1] > BASELINE - 0.1 and 0.5 < late[0] < late[1] and late[2] < 0.2

# %%
fig, heads = plt.subplots(2, 4, figsize=(8.5, 4.4), sharex=True, sharey=True, layout="constrained")
for (layer, head), axis in np.ndenumerate(heads):
    image = axis.imshow(patterns[layer, head], cmap="viridis", vmin=0, vmax=1)
    axis.set_title(f"layer {layer}, head {head}", fontsize=9)
fig.suptitle("Who looks 15 positions back?")
fig.supxlabel("position looked at", fontsize=10)
fig.supylabel("position that looks", fontsize=10)
fig.colorbar(image, ax=heads, shrink=0.7, label="attention, mean of 256 sequences")
fig.alt = "the attention of each head; to the position 15 back it is " + "; ".join(
    f"in layer {layer} {', '.join(f'{weight:.2f}' for weight in of)}" for layer, of in enumerate(looks_back)
)
fig.savefig(OUT / "02_transformer_heads.png", dpi=130)

# %% [markdown]
# In this run all four of the last layer (layer 1; the bright stripes) give that position over 0.8 of their attention,
# and none of the first gives it 0.1. Silence the last layer's attention and the second half's loss is back at chance;
# silencing the first layer's costs, too. Where a head looks does not tell all that it does, and silencing tells what
# this model needs, not what the task needs: a model of one layer learns it, too.
#
# Here the distance is fixed, so positions say where to look. If it varies, a head must *find* the place: just after an
# earlier occurrence of the present letter. An **induction head** does so with two layers (Elhage et al. 2021,
# transformer-circuits.pub/2021/framework):
#
# 1. In the first layer, a head looks one position back and writes the letter that it finds into the stream. Now each
#    position holds its own letter and the one before.
# 2. In the second layer, the query comes from the present letter, and each position's key from the letter before it.
#    They fit where the letter before is the present one.
# 3. The value is the letter that stands there, the one that followed. Through $W_o$ and the stream it reaches the
#    logits.
#
# Without step 1, a key knows no letter but its own; Elhage et al. find no induction heads in one-layer models. By hand,
# each letter a vector of 32 numbers, 1 at its own place and 0 elsewhere:

# %%
def induction(ids, sharpness=20):
    """ids [T] -> the probabilities [T, V] that an induction head gives the next letter."""
    own = np.eye(VOCAB)[ids]  # what the embedding wrote
    before = np.concatenate([np.zeros((1, VOCAB)), own[:-1]])  # what the first layer's head wrote
    scores = np.where(np.tril(np.ones((len(ids), len(ids)), bool)), sharpness * own @ before.T, -np.inf)
    return F.softmax(mp.Tensor(scores)).numpy() @ own


for period in (8, 16):
    ids = np.tile(rng.permutation(VOCAB)[:period], 2)  # no letter twice in a period
    right = induction(ids).argmax(axis=-1)[period:-1] == ids[period + 1 :]
    print(f"induction head by hand, period {period}: {right.mean():.0%} of the repeated letters predicted")
    assert right.all()

# %% [markdown]
# The same head copies at both distances. Olsson et al. (2022, arXiv:2209.11895) see such heads form in the short
# stretch of training in which models learn to use their context. Their evidence that models use context by these heads
# is causal for small models without MLPs, and correlational for larger ones.
#
# ## 6 · Writing, and the cache
#
# To write, the model predicts a token, appends it, and predicts again. That costs a forward pass over all positions for
# each token. But under the causal mask earlier positions never learn of later ones: their keys and values do not
# change. So keep them (the keys as rotated), in the **KV cache**, and compute only the new position; its query reads
# the kept keys, and is not kept. Reading the prompt (*prefill*) still takes all its positions in one pass; each later
# token (*decode*) takes one position. The cache must not change what is written.

# %%
prompt = sequences(np.random.default_rng(5), 4)[:, : PERIOD + 1]  # the 16 letters, and the first again
written = model.generate(prompt, max_new_tokens=15)
without = model.generate(prompt, max_new_tokens=15, use_cache=False)
print("\nprompt, then what the model writes:", *written[0, : PERIOD + 1], "->", *written[0, PERIOD + 1 :])
copied = (written[:, PERIOD + 1 :] == written[:, 1:PERIOD]).mean()
print(f"letters copied rightly: {copied:.0%}; cached equals uncached, token for token: {(written == without).all()}")
assert np.array_equal(written, without) and (REDUCED or copied > 0.95)

# %% [markdown]
# Copying wants the likeliest token each time (*greedy*). In open text that becomes bland and repetitive (Holtzman et
# al. 2020, arXiv:1904.09751), so one draws. **Temperature** $\tau$ divides the logits, which raises the ratio of two
# probabilities to the power $1/\tau$: a small $\tau$ nears greedy, a large one the uniform distribution, and no token
# is excluded. **Top-k** keeps the $k$ likeliest tokens, **top-p** the fewest likeliest whose probabilities sum to at
# least $p$. Both set the rest to 0 and rescale what they keep, so its ratios stay.
#
# **Predict:** one of six tokens has the probability 0.97 (sure); or they have 0.28, 0.23, 0.19, 0.15, 0.12 and 0.04
# (unsure). How many do top-k of 3 and top-p of 0.9 keep?

# %%
kept = {}
for name, logits in (("sure", [6, 2, 1, 0, 0, 0]), ("unsure", [2, 1.8, 1.6, 1.4, 1.2, 0])):
    for options in ({}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.9}):
        p = token_probabilities(np.array(logits), **options)
        kept[name, *options] = (p > 0).sum()
        print(f"{name:6s} {options!s:20s}", p.round(3))
assert [kept[n, o] for o in ("top_k", "top_p") for n in ("sure", "unsure")] == [3, 3, 1, 5] and kept["sure", "temperature"] == 6

# %% [markdown]
# Top-k keeps 3 in both, however sure the model is. Top-p keeps 1 and 5.
#
# What does the cache weigh? Per position: a key and a value for each of $K$ heads in each of $L$ layers, $2LKD$
# numbers. Without grouped queries ($K = H$) it would be $2LHD$, $H/K$ times as many.

# %%
def cache_bytes(c, positions, itemsize):
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * positions * itemsize


cache = mp.KVCache()
model(test[:3], past_key_values=cache)
assert cache.nbytes == 3 * cache_bytes(config, 32, 4) == kv_cache_bytes(config, batch=3, positions=32)
for name, c, length in (("SmolLM2-135M", smollm2, 2048), ("Llama 2 7B", llama2_7b, 4096)):
    print(f"KV cache, {name:12s} at {length} positions, float16: {cache_bytes(c, length, 2) / 2**20:8,.0f} MiB")

# %% [markdown]
# And what bounds the speed? A GPU computes while it reads its memory, so a step takes at least the longer of the two
# times. The **arithmetic intensity** of a step is its operations per byte read. An A100 of 80 GB (SXM) does 312
# trillion operations a second in 16 bits, and reads 2.039 trillion bytes (NVIDIA's datasheet). Below 312 / 2.039 =
# 153 operations a byte, its memory is the bound.
#
# In a decode step of one row (one text of a batch), a weight of two bytes is read for one multiplication and one
# addition: intensity 1. Prefill reads it once for all positions, and a batch once for all rows. But each row has its
# own cache, and each number in the cache serves two operations for its two bytes, too: intensity 1, however many rows
# there are ($H/K$ if $H/K$ query heads share it; Pope et al. 2022, arXiv:2211.05102).
#
# **Predict:** after 960 positions of Llama 2 7B, the cache spares 960 of 961 positions. If each step takes only the
# longer of its two times, is a token 961 times faster? And how many times as many tokens a second do 16 rows write as
# one?

# %%
def at_best(rows, past, new=1, c=llama2_7b):
    """(operations per byte, least seconds on an A100) for `new` positions a row, with `past` ones in the cache."""
    pairs = new * past + new * (new + 1) / 2  # of a query and a key that it sees
    operations = rows * (2 * matrices * new + 4 * c.num_hidden_layers * c.hidden_size * pairs)
    read = 2 * matrices + rows * cache_bytes(c, past + new, 2)
    return operations / read, max(operations / 312e12, read / 2.039e12)


anew, cached = at_best(1, 0, 961)[1], at_best(1, 960)[1]
print(f"\nposition 961: {anew * 1e3:.1f} ms without the cache, {cached * 1e3:.1f} ms with it, {anew / cached:.1f} times faster")
print("\npast positions    rows    operations per byte    tokens a second, at most")
speed = {}
for past, rows in ((512, 1), (512, 16), (4095, 1), (4095, 16)):
    intensity, seconds = at_best(rows, past)
    speed[past, rows] = rows / seconds
    print(f"{past:14d}    {rows:4d}    {intensity:19.1f}    {speed[past, rows]:24,.0f}")
assert 5 < anew / cached < 8 and speed[512, 16] > 12 * speed[512, 1] and speed[4095, 16] < 6 * speed[4095, 1]
assert at_best(1, 0, 961)[0] > 153 > at_best(1, 960)[0] and 16 * cache_bytes(llama2_7b, 4096, 2) > 2 * matrices  # bytes

# %% [markdown]
# No. By these bounds, about six times: without the cache arithmetic is the bound, with it the reading of the weights.
# And 16 rows write over 12 times as many tokens a second as one after 512 positions, and less than 6 times as many
# after 4,095, where their caches are most of what is read. No GPU was measured.
#
# ## 7 · Break it: let the model peek
#
# Take the causal mask away, train on the same task, and let the model write.
#
# **Predict:** where does the training loss end, above the floor of 1.677 or below? And how well does the model write?

# %%
class NoMask(mp.nn.Module):
    """A layer's attention, without the mask."""

    def __init__(self, attention):
        self.attention = attention

    def forward(self, x, context, layer, rng):
        a, (B, T, _) = self.attention, x.shape
        q, k, v = (p(x).reshape(B, T, -1, a.head_dim).swapaxes(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (F.rope(y, *context.rotation) for y in (q, k))  # cos and sin of every position's angles, section 3
        return a.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=False).swapaxes(1, 2).reshape(B, T, -1))


peeking = mp.Transformer(config, seed=0)
for i, block in enumerate(peeking.model.layers):
    peeking.replace(f"model.layers.{i}.self_attn", NoMask(block.self_attn))
cut = [np.abs(m(prompt[:, :9]).numpy() - m(prompt).numpy()[:, :9]).max() for m in (model, peeking)]
peeked = train(peeking, 16 if REDUCED else 300)
print(f"\nwithout the mask the training loss ends at {peeked[-1]:.3f}; the honest floor is {FLOOR:.3f}")
row = prompt.copy()
for _ in range(15):
    with mp.no_grad():
        row = np.concatenate([row, peeking(row).numpy()[:, -1].argmax(axis=-1)[:, None]], axis=1)
peek_copied = (row[:, PERIOD + 1 :] == row[:, 1:PERIOD]).mean()
print(f"letters copied rightly: {peek_copied:.0%}; the honest model: {copied:.0%}; chance: {1 / VOCAB:.0%}")
print(f"change of the first 9 logits as the rest is cut off: {cut[0]:.1e} with the mask; without, untrained: {cut[1]:.1e}")
assert cut[0] < 1e-3 and cut[1] > 0.1 and (REDUCED or (peeked[-1] < 0.5 * FLOOR and peek_copied < 0.2))

# %% [markdown]
# The loss fell *below the floor*, which no honest predictor of random letters can cross on average. That is the sign of
# a leak: each answer stands in the input, one position to the right, so without the mask the floor is 0. In writing
# nothing stands there, and the model gets fewer than a fifth of the letters. A direct test needs no training: cut the
# end off, and no earlier logit may change.
#
# A second mistake is quieter. To write from prompts of different lengths in one batch, fill them up on the left, with
# **padding**, so that each ends where its continuation begins. Nobody may *see* the padding (the mask), and positions
# should start at the first real token.
#
# **Predict:** the positions are wrong, counted from the padding. Which model notices, GPT-2 or Llama?

# %%
short = rng.integers(0, VOCAB, (1, 6))
padded = np.concatenate([np.zeros((1, 5), int), short], axis=1)
mask = np.array([[0] * 5 + [1] * 6])
print("\nlargest difference of the last logits, padded on the left against the prompt alone:\n            all right    "
      "  positions wrong      mask forgotten")
for dialect in (gpt2, llama):
    c = dialect(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    m = mp.Transformer(c, seed=0)
    places = np.array([[0] * 5 + [0, 1, 2, 3, 4, 5]])
    runs = m(padded, mask), m(padded, mask, position_ids=np.arange(11)[None]), m(padded, position_ids=places)
    right, moved, unmasked = (np.abs(run.numpy()[0, -1] - m(short).numpy()[0, -1]).max() for run in runs)
    print(f"  {c.model_type:6s}  {right:10.1e}  {moved:17.1e}  {unmasked:18.1e}")
    assert right < 1e-4 and unmasked > 0.1 and (moved > 0.1 if dialect is gpt2 else moved < 1e-3)

# %% [markdown]
# A shift of all positions changes the logits of this untrained GPT-2 by far, and Llama's by rounding alone: only
# distances matter to it (section 3). A forgotten mask changes both.
#
# ## The picture
#
# The honest model's loss nears the floor; the peeking model's falls through it.

# %%
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
fig, a = plt.subplots(figsize=(5, 4.6), layout="constrained")
a.plot(losses, color=BLUE, label="with the causal mask")
a.plot(peeked, color=ORANGE, label="mask forgotten")
a.axhline(BASELINE, color=GREY, ls=":", label="bigram table")
a.axhline(FLOOR, color=GREY, ls="--", label="floor: what can be known")
a.set(
    xlabel="training step",
    ylabel="loss (nats per letter)",
    ylim=(0, 4),
    title="Reduced: too few steps" if REDUCED else "A loss that is too good is a leak",
)
a.legend(fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.8))
fig.savefig(OUT / "02_transformer.png", dpi=130)

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
# also why a Llama forgives position ids that left padding has shifted, all alike, and GPT-2 does not.
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
# A leak: the model sees the answer, here because the causal mask is missing. Cut the end off: no earlier logit may
# change. Or let it write: then nothing stands on the right to be read, and it copies badly.
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
# **02.1 Where the parameters are.** For GPT-2 small ($L = 12$, $d = 768$, $V = 50{,}257$, $P = 1024$), which share of
# all parameters sits in attention (biases included)? A method that changes only attention cannot reach more. Then look:
# what of the MLPs, and of GPT-3 ($L = 96$, $d = 12{,}288$, $P = 2048$, the same $V$)?
#
# **02.2 The cache of a larger model.** Llama 3 8B has 32 layers of width 4096, and 32 query heads of 128 channels that
# share 8 key heads. How many GiB does its cache take for one sequence of 8192 positions in 16 bits?
#
# **02.3 The mask.** Write `attention_weights(scores)`: from the scores $q_t \cdot k_s / \sqrt D$ of one head, `[T, T]`,
# the weights $a_{ts}$, causal, each row with the sum 1. (Scores may be large.)
#
# Projects, with no answer written down:
#
# - **Two layers.** Let the period vary from row to row, from 8 to 16. Now positions alone no longer say where to look.
#   How many more steps does it take, and does a head of the first layer look one back?
# - **The logit lens.** `llama_by_hand` returns what each branch wrote. Add the pieces up one after the other, and read
#   the final norm and the token table after each. From which branch on does the trained model know the next letter?
#
# <details><summary>Solution of 02.1</summary>
#
# By the formula of section 4: not a quarter. The MLPs have 45.5 %; in GPT-3 the tables are less than 1 %, and attention
# has a third.
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
