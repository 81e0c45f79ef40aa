# %% [markdown]
# # Lesson 0 · Foundations: what every later lesson takes for granted
#
# A language model reads a text and says what may come next. This lesson explains the words that all later lessons
# use: token, logit, softmax, cross-entropy, nat, gradient, momentum, Adam, warm-up, validation, seed.
#
# You need Python, NumPy and high-school calculus. Reading takes about 25 minutes (200 words or 25 lines of code a
# minute, up to the quiz; not the imports and the code of figures, which the book folds). Run it with `python
# lessons/00_foundations.py` (under a minute), or open it as a notebook. Where a line begins with **Predict**, stop and
# write down your answer. The next cell computes it.
#
# Where a lesson says what another library does, and names no version, it speaks of PyTorch 2.13, of Hugging Face's
# libraries transformers 5.18 (models) and PEFT 0.21.2 (LoRA and its relatives), or of bitsandbytes 0.50 (quantization):
# the oldest versions that `pyproject.toml` allows for `tests/oracles`, the tests that compare minipeft with them.
#
# Environment: `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import json
import math
import os
import sys
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import foundations

import minipeft as mp
from minipeft import diagrams
from minipeft.text.corpora import austen, general_text

F = mp.functional
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## 1 · Tokens: a text as a list of integers
#
# A text is cut into pieces, the **tokens**, and each token has a number, its **id**. All tokens together are the
# **vocabulary**. The **tokenizer** turns text into ids, and ids into text.
#
# The package ships a small language model, the **base**, and its tokenizer. Vertical bars separate the tokens:

# %%
base, tokenizer = mp.load_base()


def pieces(text):
    """The tokens of a text, as text."""
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


SENTENCE = "It is a truth universally acknowledged"
ids = tokenizer.encode(SENTENCE)
print("vocabulary:", tokenizer.vocab_size, "tokens")
print("|".join(pieces(SENTENCE)))
print(*ids)
assert tokenizer.vocab_size == base.config.vocab_size == 2048 and tokenizer.decode(ids) == SENTENCE, "nothing is lost"

# %% [markdown]
# **Byte-pair encoding** (Sennrich et al. 2016, arXiv:1508.07909) makes frequent words one token, and rare ones several.
# Here it works on bytes, as in GPT-2 (Radford et al. 2019). A large text is cut into words, each with the space before
# it, and the words into bytes. The two neighbors that occur together most often are joined into a new token, again and
# again. To encode a word, make the same joins in the same order. (`tokenizer.json` writes the space as `Ġ`.) Special
# tokens are added; one marks the end of a text.

# %%
merges = json.loads(files("minipeft.hub").joinpath("base", "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
ORDER = {tuple(pair): i for i, pair in enumerate(merges)}


def join(word):
    """The tokens of one word of English letters: join the pair that stands first in ORDER until there is none."""
    parts = list(word.replace(" ", "Ġ"))
    while found := [(ORDER[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ORDER]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [part.replace("Ġ", " ") for part in parts]


words = {" " + word for word in austen("validation")[0].text.split() if word.isascii() and word.isalpha()}
print(f"256 bytes + {len(merges)} joins + 4 special tokens; the first joins:", [" + ".join(pair) for pair in merges[:4]])
print(f"{len(words)} different words: all have the same tokens by hand:", all(join(word) == pieces(word) for word in words))
assert all(join(word) == pieces(word) for word in words) and 256 + len(merges) + 4 == tokenizer.vocab_size

# %% [markdown]
# **Predict:** how many tokens has `Lord` at the start of a text, and how many has ` Lord` after a space?

# %%
for text in ("Lord", " Lord", " word", " λόγος", "🙂"):
    print(f"{text!r:8s} {len(tokenizer.encode(text)):2d} tokens, {len(text.encode()):2d} bytes: {'|'.join(pieces(text))}")
assert [len(tokenizer.encode(text)) for text in ("Lord", " Lord", " word", " λόγος", "🙂")] == [2, 1, 1, 11, 4]
assert tokenizer.decode(tokenizer.encode("🙂")) == "🙂" and len("🙂".encode()) == 4

# %% [markdown]
# Two, and one: to the model, `Lord` and ` Lord` have no id in common. Each of the 256 bytes is a token, so every text
# can be encoded: the smiling face takes four tokens, one for each byte. But ` word` is one token in English and eleven
# in Greek.
#
# ## 2 · Logits, and softmax
#
# Given ids, the model returns for each position a score of how well each token of the vocabulary fits as the next. Such
# a score is called a **logit**. The figure shows the path of one prediction. Section 3 explains its last step, the
# loss.

# %%
OPENING = "And it came to pass in those"
diagrams.prediction(base, tokenizer, OPENING, " days").savefig(OUT / "00_foundations_path.png")

# %%
ids = np.array([tokenizer.encode(OPENING)])  # one text, T tokens
logits = base(ids).numpy()  # [1, T, V]: for each of T tokens, a logit for each of the V in the vocabulary
z = logits[0, -1].astype(np.float64)  # [V]: what comes after the last token
best = z.argsort()[::-1][:6]
print(f"{ids.shape} ids -> {logits.shape} logits, from {z.min():.2f} to {z.max():.2f}")
print("the largest:", ", ".join(f"{tokenizer.decode([i])!r} {z[i]:.2f}" for i in best))
assert logits.shape == (*ids.shape, 2048) and z.min() < 0, "a logit is no probability"

# %% [markdown]
# **Softmax** turns logits $z_i$ into probabilities $p_i$, numbers above zero that add up to 1:
#
# $$p_i = \frac{e^{z_i}}{\sum_k e^{z_k}} .$$
#
# **Predict:** what happens to the probabilities when 100 is added to every logit? And when every logit is doubled?

# %%
def softmax(z):
    """Probabilities along the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))  # see below
    return e / e.sum(axis=-1, keepdims=True)


p = softmax(z)
assert np.allclose(p, F.softmax(mp.Tensor(z)).numpy(), rtol=1e-12) and np.isclose(p.sum(), 1), "as the library's"
print("\n           " + "".join(f"{tokenizer.decode([i]):>9s}" for i in best))
for name, changed in (("z", z), ("z + 100", z + 100), ("2 z", 2 * z), ("z / 2", z / 2)):
    print(f"{name:8s}   " + "".join(f"{softmax(changed)[i]:9.3f}" for i in best))
assert np.allclose(softmax(z + 100), p, rtol=1e-9) and softmax(2 * z)[best[0]] > p[best[0]] > softmax(z / 2)[best[0]]

# %% [markdown]
# Adding a number changes nothing: $e^{100}$ cancels. Only *differences* of logits count: token $i$ is $e^{z_i - z_k}$
# times as probable as token $k$. So `softmax` may subtract the largest logit, and no exponential grows too large.
#
# Doubling makes the distribution sharper, and halving flatter. A text is sampled by drawing tokens with these
# probabilities, often after the logits are divided by a **temperature**: the rows `2 z` and `z / 2` have the
# temperatures 0.5 and 2. Toward 0 the largest logit takes all probability, and toward infinity all tokens become
# equally likely.
#
# ## 3 · Cross-entropy, nats, and what a loss of 3 means
#
# How good is a prediction? If the model gave the probability $p$ to the token that came, the **loss** is
#
# $$-\ln p .$$
#
# It is 0 if the model was certain and right, and grows without bound as $p$ goes to 0. The mean over all tokens of a
# text but the first, which nothing predicts, is the **cross-entropy**. Its unit, with the natural logarithm, is the
# **nat**. (With $\log_2$ it is the *bit*, and a bit is $\ln 2 = 0.693$ nats.)

# %%
def cross_entropy(logits, targets):
    """The mean of -ln p(target): logits [n, V], targets [n]."""
    return -np.log(softmax(logits)[np.arange(len(targets)), targets]).mean()


y = ids[0, 1:]  # what came after each token but the last
by_hand = cross_entropy(logits[0, :-1].astype(np.float64), y)
library = F.cross_entropy(mp.Tensor(logits[0, :-1].astype(np.float64)), y).item()
print(f"loss of {OPENING!r}: {by_hand:.6f}, by F.cross_entropy {library:.6f}, by base.loss {base.loss(ids, ids).item():.6f}")
assert abs(by_hand - library) < 1e-12 and abs(by_hand - base.loss(ids, ids).item()) < 1e-5

# %% [markdown]
# To read a loss $L$, undo the logarithm. $e^{L}$ is the **perplexity**: a loss of $L$ is that of someone who guesses
# among $e^L$ tokens that are equally likely.

# %%
print("\nnats    bits    probability    as if guessing among")
for L in (0.0, math.log(2), 1.0, 2.0, 3.0, math.log(2048)):
    print(f"{L:5.2f}   {L / math.log(2):5.2f}   {math.exp(-L):11.4f}    {math.exp(L):7.1f} tokens")
assert [round(math.log(x), 3) for x in (2, 2048, 10_000)] == [0.693, 7.625, 9.21] and round(math.exp(3)) == 20
assert round(math.exp(0.1), 3) == 1.105

# %% [markdown]
# **So a loss of 3 is that of a fair choice among 20 tokens.** A model that knows nothing about a vocabulary
# of 2,048 has a loss of 7.62. A loss lower by 0.1 nats means probabilities $e^{0.1} = 1.105$ times as large, in the
# geometric mean.
#
# **Predict:** on text that it was not trained on, the base has a loss near 3. Does it give the right token a
# probability of one in twenty, on average?

# %%
stream = np.concatenate([[*tokenizer.encode(text), tokenizer.eos_token_id] for text in general_text("validation")[::10]])
blocks = stream[: len(stream) // 256 * 256].reshape(-1, 256)
blocks = blocks[:: len(blocks) // 24][:24]  # 24 blocks of 256 tokens
with mp.no_grad():
    log_p = F.log_softmax(base(blocks)).numpy()[:, :-1]
losses = -np.take_along_axis(log_p, blocks[:, 1:, None], axis=-1).ravel().astype(np.float64)
probabilities = np.exp(-losses)
L = losses.mean()
size = sum(len(tokenizer.decode(block[1:], skip_special_tokens=True).encode()) for block in blocks)  # in bytes
bits_per_byte = losses.sum() / math.log(2) / size
print(f"\n{losses.size:,} tokens of held-out text: loss {L:.2f} nats a token, perplexity {math.exp(L):.0f}")
print(f"probability of the right token: geometric mean {math.exp(-L):.3f}, plain mean {probabilities.mean():.3f}")
sure, lost = (probabilities > 0.5).mean(), (probabilities < 0.01).mean()
print(f"tokens given more than a half: {sure:.0%}; less than one in a hundred: {lost:.0%}")
print(f"{size / losses.size:.2f} bytes a token, so {bits_per_byte:.2f} bits a byte")
assert round(L) == 3 and 0.045 < math.exp(-L) < 0.055 and probabilities.mean() > 5 * math.exp(-L)
assert sure > 0.2 and lost > 0.2 and round((losses < 0.5).mean(), 1) == 0.2 and losses.max() > 10

# %%
foundations.losses_picture(losses).savefig(OUT / "00_foundations_losses.png", dpi=130)

# %% [markdown]
# More: about one in twenty is the *geometric* mean, $e^{-L}$, and the plain mean is over five times that. The figure
# shows easy tokens, a fifth of all below half a nat, and hard ones, some above 10. The logarithm weighs the hard ones
# most: a single token with $p = 0.0001$ costs 9.2 nats.
#
# A loss per *token* depends on how long the tokens are. To compare models with different tokenizers, divide the sum of
# the losses by the bytes of the text instead, as the line of bits a byte does.
#
# ## 4 · The gradient, and downhill
#
# Training changes the numbers inside the model, its **weights** (or **parameters**), so that the loss falls. Here is a
# very small language model. Its tokens are the 26 letters and the space, and its weights are one table $W$ of
# $27 \times 27$ logits: row $a$ holds the logits of the letter after $a$. So the loss needs only the counts of how
# often letter $b$ follows $a$.

# %%
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def letters(split, n):
    """The first n letters of a split of Jane Austen's novels."""
    text = "".join(c if c in LETTERS else " " for c in " ".join(chapter.text for chapter in austen(split)[:9]).lower())
    return np.array([LETTERS.index(c) for c in " ".join(text.split())[:n]])


def count(a, b):
    """How often each letter b follows each letter a: [27, 27]."""
    table = np.zeros((27, 27))
    np.add.at(table, (a, b), 1)
    return table


def loss_of(W, counts):
    """The mean of -ln p(next letter) over all pairs of letters."""
    return -(counts * np.log(softmax(W))).sum() / counts.sum()


text = letters("train", 20_000)
pairs = count(text[:-1], text[1:])
W = np.random.default_rng(0).standard_normal((27, 27))
print(f"knowing nothing, W = 0: {loss_of(0 * W, pairs):.3f} nats a letter = ln 27")
assert np.isclose(loss_of(0 * W, pairs), math.log(27))

# %% [markdown]
# The **gradient** of the loss has one number for each weight: how fast the loss rises if that weight rises. For one
# prediction, $L = -z_y + \ln \sum_k e^{z_k}$, where $y$ is what came. The derivative of the second term by $z_i$ is
# $e^{z_i}/\sum_k e^{z_k}=p_i$, so
#
# $$\frac{\partial L}{\partial z_i} = p_i - [i = y] ,$$
#
# where $[i = y]$ is 1 for $i = y$, else 0: what the model said minus what happened. So the entries add up to zero. In
# the mean over all pairs, row $a$ of the gradient is the probabilities times the number of $a$'s, minus the counts, all
# divided by the number of pairs. Check it: change one weight a little, and ask the library.

# %%
def gradient_of(W, counts):
    """The gradient of loss_of at W: [27, 27]."""
    return (counts.sum(axis=1, keepdims=True) * softmax(W) - counts) / counts.sum()


g = gradient_of(W, pairs)
a, b, h = LETTERS.index("t"), LETTERS.index("h"), 1e-5
nudge = np.zeros_like(W)
nudge[a, b] = h
difference = (loss_of(W + nudge, pairs) - loss_of(W - nudge, pairs)) / (2 * h)
weights = mp.nn.Parameter(W)
F.cross_entropy(F.embedding(text[:-1], weights), text[1:]).backward()  # a row of W for each letter; Lesson 1 explains it
print(f"gradient of the weight 't, then h': by formula {g[a, b]:.9f}, by nudging {difference:.9f}")
assert abs(g[a, b] - difference) < 1e-9
assert np.allclose(g, weights.grad, atol=1e-12), "all 729, as the library's"

# %% [markdown]
# The gradient $g$ points uphill. **Gradient descent** moves the weights $w$ a step the other way, again and again:
#
# $$w \leftarrow w - \eta\, g .$$
#
# How large may the **learning rate** $\eta$ be? Look at a valley with one gentle and one steep direction,
# $L = \frac12(w_1^2+1000\,w_2^2)$. Its gradient is $(w_1, 1000\,w_2)$, so a step multiplies $w_1$ by $1-\eta$ and $w_2$
# by $1-1000\,\eta$.
#
# **Predict:** what are the losses after 500 steps from $(1, 1)$, with $\eta = 0.00195$ and with $\eta = 0.00205$?

# %%
STEEP = np.array([1.0, 1000.0])


def valley(w):
    return 0.5 * (STEEP * w * w).sum()


def valley_gradient(w):
    return STEEP * w


def descent(w, gradient, rates):
    """Gradient descent: the weights after each step."""
    for lr in rates:
        w = w - lr * gradient(w)
        yield w


start = np.ones(2)
ends = {lr: valley(list(descent(start, valley_gradient, [lr] * 500))[-1]) for lr in (0.00195, 0.00205)}
print(f"\nfrom a loss of {valley(start)}:", "   ".join(f"rate {lr}: {end:.2g}" for lr, end in ends.items()))
assert ends[0.00195] < 0.1 and ends[0.00205] > 1e20 and np.isclose(ends[0.00205], 500 * 1.05**1000, rtol=1e-6)

# %% [markdown]
# The first falls below 0.1, the second grows beyond $10^{20}$. Above $\eta = 2/1000$ the factor $1-1000\,\eta$ is below
# $-1$: each step jumps across the valley and lands higher on the other side. In general the limit near a minimum is 2
# over the largest curvature (second derivative) in any direction, here 1000. So the steep direction sets the rate for
# the gentle one, too: at 0.00195 $w_1$ shrinks by only 0.195 % a step.
#
# ## 5 · Momentum
#
# **Momentum** (Polyak 1964; in PyTorch's form) walks along a running sum $b$ of the gradients, in which each step
# multiplies older ones by $\mu < 1$:
#
# $$b \leftarrow \mu\, b + g, \qquad w \leftarrow w - \eta\, b .$$
#
# If the gradient stays the same, $b$ tends to $1+\mu+\mu^2+\dots=1/(1-\mu)$ times it: 10 times for $\mu = 0.9$. If its
# sign alternates, $b$ tends to $1-\mu+\mu^2-\dots=1/(1+\mu)=0.53$ times the newest. At descent's limit $w_2$ jumps to
# $-w_2$ and back. Momentum's limit is where it does so, too: $\eta\cdot 0.53\cdot 1000\,w_2 = 2w_2$, so $\eta$ is
# $1+\mu=1.9$ times that of descent (checked below).

# %%
def momentum(w, gradient, rates, mu=0.9):
    """Gradient descent with momentum: the weights after each step."""
    b = np.zeros_like(w)
    for lr in rates:
        b = mu * b + gradient(w)
        w = w - lr * b
        yield w


assert np.isclose(sum(0.9**i for i in range(1000)), 10), "along the valley"
assert round(sum((-0.9) ** i for i in range(1000)), 2) == 0.53, "across"
ends = [list(momentum(start, valley_gradient, [lr * 2 / 1000] * 2000))[-1] for lr in (1.89, 1.91)]
assert abs(ends[0][1]) < 1e-9 and abs(ends[1][1]) > 1e9, "below the limit and above it"

# %% [markdown]
# ## 6 · Adam, in eight lines
#
# **Adam** (Kingma & Ba 2015, arXiv:1412.6980) keeps two running means for each weight, the **moments**: $m$ of its
# gradients and $v$ of their squares. It walks along $m$, divided by $\sqrt v$, the usual size of this weight's
# gradients:
#
# $$m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
#   w \leftarrow w - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} .$$
#
# $t$ counts the steps from 1, and each step keeps the shares $\beta_1$ and $\beta_2$ of the old means. Both means start
# at zero, and are too small at first: if all gradients were $g$, $m$ would be
# $(1-\beta_1)(1+\beta_1+\dots+\beta_1^{t-1})\,g = (1-\beta_1^t)\,g$. The two divisions by $1 - \beta^t$ correct this. A
# small $\epsilon$ keeps a weight without gradient from a division by zero.

# %%
def adam(w, gradient, rates, beta1=0.9, beta2=0.999, eps=1e-8):
    m = v = np.zeros_like(w)
    for t, lr in enumerate(rates, start=1):
        g = gradient(w)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        yield w


early = count(text[:2000], text[1:2001])
print("\nlargest difference of a weight after 50 steps on the letters, ours against the library's optimizer")
for ours, lr, theirs, more in (
    (descent, 5.0, mp.optim.SGD, {}), (momentum, 1.0, mp.optim.SGD, {"momentum": 0.9}), (adam, 0.1, mp.optim.Adam, {})
):  # fmt: skip
    weights = mp.nn.Parameter(W.copy())
    optimizer = theirs([weights], lr=lr, **more)
    for _ in range(50):
        F.cross_entropy(F.embedding(text[:2000], weights), text[1:2001]).backward()
        optimizer.step()
        optimizer.zero_grad()
    *_, end = ours(W, lambda w: gradient_of(w, early), [lr] * 50)
    print(f"  {ours.__name__:9s} {np.abs(end - weights.numpy()).max():.0e}")
    assert np.abs(end - weights.numpy()).max() < 1e-9

# %% [markdown]
# **Predict:** at $(1, 1)$ the valley's gradient is $(1, 1000)$. How far does Adam's first step, with a rate of 0.1,
# move each weight? And if the loss, and so every gradient, were a thousand times larger?

# %%
def louder(w):
    """The gradient of a thousand times the loss."""
    return 1000 * valley_gradient(w)


path, louder_path = (np.array(list(adam(start, gradient, [0.1] * 100))) for gradient in (valley_gradient, louder))
print(f"\nAdam's first step: {path[0] - start}; of a loss a thousand times as large: {louder_path[0] - start}")
assert np.allclose(path[0] - start, -0.1) and np.allclose(path, louder_path, atol=1e-6), "all hundred steps are the same"

# %% [markdown]
# By 0.1 each, both times. In the first step the quotient is $g / |g|$: only the sign of a gradient is left. So Adam's
# rate has a plain meaning: about how far a weight moves in a step (less where its gradient shrinks or changes sign,
# more where it grows). A factor on the loss changes nothing, if the gradients are large beside $\epsilon$.
#
# How many steps does each of the three **optimizers** (descent, momentum, Adam) need until the valley's loss stays
# below 0.001, at its best rate of eight? And in the same valley turned by 45 degrees, so that its steep direction is no
# longer that of a single weight?

# %%
TURN = np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
RATES = {
    descent: [0.001, 0.0015, 0.0019, 0.00195, 0.00198, 0.00199, 0.001995, 0.002],
    momentum: [0.0003, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0033, 0.0036],
    adam: [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0],
}


def steps_needed(method, lr, turn, goal=1e-3, most=2000):
    """After how many steps the loss stays below the goal; infinity if it does not."""
    walk = method(turn @ start, lambda w: turn @ valley_gradient(turn.T @ w), [lr] * most)
    high = [i for i, w in enumerate(walk, start=1) if not valley(turn.T @ w) < goal]
    return high[-1] + 1 if high[-1] < most else math.inf


needed = {method: min((steps_needed(method, lr, np.eye(2)), lr) for lr in rates) for method, rates in RATES.items()}
turned = {method: min((steps_needed(method, lr, TURN), lr) for lr in rates) for method, rates in RATES.items()}
print("\nsteps until the loss stays below 0.001 (at the best rate)     the valley turned")
for method, rates in RATES.items():
    (n_steps, lr), (n_turned, lr_turned) = needed[method], turned[method]
    print(f"  {method.__name__:9s} {n_steps:5d} {f'({lr})':10s} {n_turned:38d} ({lr_turned})")
    assert rates[0] < lr < rates[-1] and rates[0] < lr_turned < rates[-1], "the best rate lies inside the grid"
assert max(needed[momentum][0], needed[adam][0]) < needed[descent][0] / 10
assert 3.5 < turned[adam][0] / needed[adam][0] < 4.5 and all(turned[m] == needed[m] for m in (descent, momentum))
walks = {method: np.array([start, *method(start, valley_gradient, [lr] * 40)]) for method, (_, lr) in needed.items()}
assert walks[descent][-1, 0] > 0.9 and walks[momentum][-1, 0] < 0.5 and np.allclose(*walks[adam].T, atol=1e-6)
assert abs(walks[momentum][-10:, 1]).max() < abs(walks[descent][-10:, 1]).min() / 2 and walks[adam].min() < -0.5

# %%
foundations.walks_picture(walks, needed).savefig(OUT / "00_foundations_walks.png", dpi=130)

# %% [markdown]
# Momentum and Adam need less than a tenth of descent's steps. The figure shows the first 40 of each. Descent jumps from
# side to side, and hardly moves along the valley. Momentum's jumps shrink faster, and it is past half of the way. Adam
# divides by the size of each gradient, so both weights move alike, beyond the minimum and back.
#
# Let $\kappa$ be the ratio of the largest curvature to the smallest, here 1000. In theory (Polyak 1964) the number of
# steps grows like $\kappa$ for descent, and like $\sqrt\kappa$ for momentum with the best $\eta$ and $\mu$. In the
# turned valley, from this start, Adam needs about four times as many steps. It divides by one size for each *weight*,
# and there each weight's gradient mixes the steep direction with the gentle one. The others need as many as before:
# their steps are sums of gradients, which turn with the valley.
#
# **AdamW** (Loshchilov & Hutter 2019, arXiv:1711.05101), which later lessons use, adds **weight decay**: each step also
# multiplies the weights by $1 - \eta\lambda$, with a small $\lambda$. If $\lambda w$ were added to the gradient
# instead, the decay, too, would be divided by $\sqrt v$.
#
# ## 7 · Warm-up and decay
#
# So far each gradient came from the whole text. A large text is too long for that, so a step takes the gradient of a
# few samples drawn from it, the **batch** (*stochastic gradient descent*, SGD). Such a gradient is right on average.
# Its noise, what it is off by, shrinks like $1/\sqrt n$ with the batch's size $n$. Below, one batch is off by more than
# the gradient's own length, and the mean of 2,000 batches, which is a batch 2,000 times as large, by less than 5 %.
#
# With a constant rate the noise keeps the weights moving about the best place. So the rate **decays** to zero, along a
# line here, and along a cosine in Lesson 8. Many runs begin with a **warm-up**: the rate grows from zero, so step 0
# moves nothing. The reason usually given is that Adam's first steps have full length while its means know only a batch
# or two. The rate as a function of the step is the **schedule**; here it is a factor, and steps count from 0:

# %%
N, WARM = 400, 20


def linear(step, warmup_steps, total_steps):
    if step < warmup_steps:
        return step / warmup_steps
    return (total_steps - step) / (total_steps - warmup_steps)


def batch_of(rng, n=64):
    """The counts of n pairs of letters, drawn from the text."""
    at = rng.integers(0, len(text) - 1, n)
    return count(text[at], text[at + 1])


draws, whole = [gradient_of(W, batch_of(np.random.default_rng(i))) for i in range(2000)], gradient_of(W, pairs)
one, mean = (np.linalg.norm(g - whole) / np.linalg.norm(whole) for g in (draws[0], sum(draws) / 2000))
print(f"\noff the whole text's gradient: one batch's by {one:.0%} of it, the mean of 2,000 batches by {mean:.1%}")
assert one > 1 and mean < 0.05 and 0.5 < mean / one * math.sqrt(2000) < 2

factors = [linear(s, WARM, N) for s in range(N)]
assert factors == [mp.optim.linear(s, WARM, N) for s in range(N)]
print(f"factors of steps 0, 1, {WARM}, {N - 1}: {factors[0]}, {factors[1]}, {factors[WARM]}, {factors[-1]:.4f}")

# %% [markdown]
# How low can this table's loss be? Let $q_b$ be the share of $b$ among the letters after $a$, and $p_b$ the probability
# that the table gives $b$ there. The loss is least if $p = q$ after every $a$: this least is the **entropy** of a
# letter, given the one before. (A model that sees more letters can have a lower loss.) A loss exceeds it by the mean,
# over the letters $a$ of the text, of $\sum_b q_b \ln(q_b/p_b)$, the **KL divergence** $\mathrm{KL}(q \| p)$, which is
# 0 for $p = q$ and else positive.
#
# **Predict:** which lowers the final loss, decay or warm-up? We train on batches of 64 pairs of letters with
# Adam, under five seeds (section 9), and measure how far the loss on the whole text ends above the entropy.

# %%
frequencies = pairs / pairs.sum(axis=1, keepdims=True)
ENTROPY = -(pairs * np.log(np.where(pairs > 0, frequencies, 1))).sum() / pairs.sum()


def run(seed, factors, lr=0.1):
    """Train on random batches; the loss above ENTROPY after each step."""
    rng = np.random.default_rng(seed)
    begin = 0.01 * rng.standard_normal((27, 27))
    walk = adam(begin, lambda w: gradient_of(w, batch_of(rng)), [lr * f for f in factors])
    return [loss_of(w, pairs) - ENTROPY for w in walk]


SEEDS = range(5)
schedules = {
    "constant": [1.0] * N,
    "warm-up alone": [mp.optim.constant(s, WARM, N) for s in range(N)],
    "decay alone": [linear(s, 0, N) for s in range(N)],
    "warm-up and decay": factors,
}
curves = {name: np.array([run(seed, f) for seed in SEEDS]) for name, f in schedules.items()}  # [seeds, steps]
last = {name: curve[:, -1] for name, curve in curves.items()}
print(f"\nthe entropy, the least loss of such a table: {ENTROPY:.4f}; above it after {N} steps, for five seeds")
for name, values in last.items():
    print(f"  {name:18s} mean {values.mean():.4f}, from {values.min():.4f} to {values.max():.4f}")
for name, curve in curves.items():
    half, end = curve[:, 200:240].mean(), curve[:, -40:].mean()
    assert end < 0.6 * half if "decay" in name else 0.9 < end / half < 1.1
falling, level = ([v for name, v in last.items() if ("decay" in name) is decays] for decays in (True, False))
assert np.max(falling) < np.min(level)

# %%
foundations.schedules_picture(schedules, curves).savefig(OUT / "00_foundations_schedules.png", dpi=130)

# %% [markdown]
# Decay: each run with decay ends below each run without. In the figure, the losses without decay keep their level after
# half of the steps, and the others go on falling. Warm-up changes little here (by how much: section 9; for the base:
# Lesson 14).
#
# ## 8 · Train, validation, test
#
# A model should be right about texts that it has *not* seen. So data are split in three: **train** gives the gradients,
# **validation** decides choices such as the rate and the number of steps, and **test** is measured once, at the end.
#
# Let the table learn from 500 letters, and look at all three losses.
#
# **Predict:** the training loss falls at every step. What does the loss on other chapters do?

# %%
small = count(text[:499], text[1:500])
held_out = {split: letters(split, 20_000) for split in ("validation", "test")}
held_out = {split: count(ids[:-1], ids[1:]) for split, ids in held_out.items()}
walk = list(adam(0 * W, lambda w: gradient_of(w, small), [0.05] * 300))
overfit = {"train": [loss_of(w, small) for w in walk]}
overfit |= {split: [loss_of(w, counts) for w in walk] for split, counts in held_out.items()}  # test: only to show it
chosen = int(np.argmin(overfit["validation"]))
print("\n               train    validation    test")
for name, step in (("after step 1", 0), (f"after step {chosen + 1}", chosen), (f"after step {len(walk)}", len(walk) - 1)):
    print(f"{name:14s} " + "    ".join(f"{overfit[split][step]:.3f}" for split in ("train", "validation", "test")))
assert np.all(np.diff(overfit["train"]) < 0) and 5 < chosen < 100
assert all(overfit[split][-1] > overfit[split][chosen] + 0.2 for split in held_out)

# %%
foundations.overfit_picture(overfit, chosen).savefig(OUT / "00_foundations_overfit.png", dpi=130)

# %% [markdown]
# It falls, and then it rises, as the figure shows. At first the model learns what holds for other chapters, too, and
# later what holds for these 500 letters alone: it **overfits**. The validation loss says when to stop.
#
# Why a third set? Because to choose by the validation set is to fit it, too.
#
# **Predict:** 100 "models" answer 50 yes-or-no questions by tossing coins. How many does the best of them get right?
# And how many of 50 new questions?

# %%
coins = np.random.default_rng(0).integers(0, 2, (1000, 100, 2, 50))  # [trials, models, validation or test, questions]
right = coins.sum(axis=-1)  # 1 is "right"
winner = right[..., 0].argmax(axis=1)
valid, test = (right[np.arange(1000), winner, i] for i in (0, 1))
print(f"\nthe best of 100 guessers, mean of 1,000 trials: {valid.mean():.1f} of 50 right; of 50 new ones: {test.mean():.1f}")
assert valid.mean() > 32 and round(valid.mean()) == 34 and abs(test.mean() - 25) < 0.5
assert abs((valid.mean() - 25) / math.sqrt(50 / 4) - 2.5) < 0.1 and abs(right.std() - math.sqrt(50 / 4)) < 0.1

# %% [markdown]
# About 34 of the 50, by luck alone, and half of the new ones. Of $n$ independent answers, each right with probability
# $p$, the number right has a standard deviation of $\sqrt{n p (1 - p)}$, here 3.5. The best of 100 lies 2.5 of these
# above the mean, like the largest of 100 normally distributed numbers. A test set, too, is fresh only until somebody
# chooses by it.
#
# ## 9 · What a seed is
#
# Chance enters these runs in two places: the weights at the start, and the batches. A computer's random numbers come
# from a formula, and the number that it starts from is the **seed**. With the same CPU, library and number of
# threads the same seed gives the same run, to the last bit.
#
# **Predict:** a single run of each of two schedules. By how much must the losses differ to show which is better?

# %%
assert run(0, factors) == run(0, factors), "bit for bit"
spread = {name: values.std(ddof=1) for name, values in last.items()}
print("\nstandard deviation of the final loss over five seeds:")
for name, s in spread.items():
    print(f"  {name:18s} {s:.4f}")


def interval(a, b):
    """Mean of a - b over the seeds, and the half width of its 95 % confidence interval."""
    d = a - b
    return d.mean(), 2.776 * d.std(ddof=1) / math.sqrt(len(d))


decay = interval(last["constant"], last["decay alone"])
warm = interval(last["warm-up and decay"], last["decay alone"])
print("how much higher the loss ends, seed by seed")
print(f"  constant, than decay alone:          {decay[0]:.4f} ± {decay[1]:.4f}")
print(f"  warm-up and decay, than decay alone: {warm[0]:.4f} ± {warm[1]:.4f}")
crossed = interval(last["warm-up and decay"], np.roll(last["decay alone"], 1))  # each against another seed's run
print(f"  the same, each against another seed: {crossed[0]:.4f} ± {crossed[1]:.4f}")
assert decay[0] > decay[1] > 0 and warm[0] > warm[1] > 0 and abs(crossed[0]) < crossed[1]

# %% [markdown]
# By more than chance alone changes the difference, and one run of each does not show how much that is. So later lessons
# run several seeds and report the mean of $n$ values with its **confidence interval**, $\pm\, t s / \sqrt n$. On
# average 95 of 100 such intervals contain the true mean, if the values are independent and normally distributed. ($s$
# is their standard deviation, and $t$, Student's, is in tables: 2.776 for five values.) If the interval of a difference
# contains zero, the runs do not show which is better.
#
# Here the first two intervals lie above zero: decay lowers the loss, and warm-up before it *costs* a little. So small a
# cost shows within a seed, where both runs began alike and drew the same batches. With each run held against another
# seed's, the interval contains zero.

# %% [markdown]
# ## Break it: two lines that look superfluous
#
# First, softmax without subtracting the largest logit. Second, Adam without its two corrections, $1 - \beta^t$.
#
# **Predict:** without the corrections, is Adam's first step shorter or longer?

# %%
large = np.array([1000.0, 999.0, 998.0])
with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # which would warn
    broken = np.exp(large) / np.exp(large).sum()
    assert [np.exp(np.float32(x)) for x in (89, -104)] == [np.inf, 0] and np.isfinite(np.exp(np.float32(88)))
print("\nsoftmax of 1000, 999, 998, careless:", broken, " careful:", softmax(large).round(3))
assert np.isnan(broken).all(), "infinity divided by infinity"


def uncorrected(w, gradient, rates, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam without the corrections."""
    m = v = np.zeros_like(w)
    for lr in rates:
        g = gradient(w)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w - lr * m / (np.sqrt(v) + eps)
        yield w


rates = [0.1] * 10
lengths = [-np.diff([start[0], *(w[0] for w in method(start, valley_gradient, rates))]) for method in (adam, uncorrected)]
print("w_1 moves in the first step by", f"{lengths[0][0]:.3f} with, {lengths[1][0]:.3f} without the corrections")
assert np.isclose(lengths[1][0] / lengths[0][0], (1 - 0.9) / math.sqrt(1 - 0.999), rtol=1e-4)

# %% [markdown]
# The careless softmax divides infinity by infinity, since $e^{1000}$ overflows. (In float32 $e^{89}$ does, too, and
# $e^{-104}$ is 0. So a probability can be 0, and its logarithm $-\infty$. Libraries compute the logarithm from the
# logits in one go, as exercise 00.3 does.) Adam's first step is longer, 3.16 times: $m$ is a tenth of the gradient, but
# $\sqrt v$ only $\sqrt{0.001} = 0.032$ of its size.
#
# ## Quiz
#
# Answer first, then unfold (in the raw file, the answer stands below the question).
#
# **1.** A model gives the right token a probability of 1/8, each time. What is its loss in nats, and in bits?
#
# <details><summary>Answer</summary>
#
# $\ln 8 = 2.08$ nats, or 3 bits: as a fair choice among 8 tokens.
#
# </details>
#
# **2.** Two models have a loss of 3.0 nats a token, and each has its own tokenizer. Which is better?
#
# <details><summary>Answer</summary>
#
# One cannot tell. At the same loss a token, the one with the longer tokens has the lower loss a byte. Compare bits a
# byte (section 3).
#
# </details>
#
# **3.** Somebody adds 5 to all logits of a trained model. What happens to its loss?
#
# <details><summary>Answer</summary>
#
# Nothing. Softmax, and so the loss, depends on differences of logits alone (section 2).
#
# </details>
#
# **4.** Somebody multiplies the loss by 1000. What becomes of a step of gradient descent, and of Adam?
#
# <details><summary>Answer</summary>
#
# Descent's step is 1000 times as long. Adam's is the same, if $\epsilon$ is small beside the gradients: $m$ and
# $\sqrt v$ both become 1000 times as large (section 6).
#
# </details>
#
# **5.** You have tried 100 settings and report the lowest of the 100 validation losses. What is wrong with it?
#
# <details><summary>Answer</summary>
#
# It is chosen partly for its luck with these data, like the best of the guessers (section 8). Report the chosen
# setting's loss on the test set.
#
# </details>

# %%
assert round(math.log(8), 2) == 2.08 and math.log2(8) == 3
assert np.isclose(cross_entropy(z[None] + 5, best[:1]), cross_entropy(z[None], best[:1]))
step, louder_step = (next(descent(start, gradient, [0.01])) - start for gradient in (valley_gradient, louder))
assert np.allclose(louder_step, 1000 * step)

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("00.1", value)`, or at the terminal with
# `minipeft exercise 00.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 00.3 FILE.py`.
#
# **00.1 Read a loss.** A model has a loss of 2.5 nats a token. Among how many equally likely tokens would one have to
# guess to have the same?
#
# **00.2 Bits a byte.** Another model has a loss of 3.2 nats a token, and its tokens are four bytes long on average. How
# many bits a byte is that?
#
# **00.3 Softmax that does not overflow.** Write `log_softmax(z)`: the logarithms of the probabilities along the last
# axis, also where logits are 1000, or where a probability is too small for a floating-point number.
#
# **00.4 Look ahead.** Nesterov's momentum walks along $g + \mu\, b$, with the new $b$, where momentum walks along $b$.
# Write `nesterov(w, gradients, lr, mu)`: the weights after one step for each row of `gradients`, `[steps, n]`.
#
# Projects, with no answer written down:
#
# - **By source.** `minipeft.text.corpora.general_corpora("validation")` has the held-out text by its source. Compute
#   the base's nats a token and bits a byte for each. Is the order the same?
# - **Weight decay.** Change `adam` by one line into AdamW (section 6), and hold it against
#   `mp.optim.AdamW(..., weight_decay=0.1)`.
#
# <details><summary>Solution of 00.1</summary>
#
# $e^{2.5} = 12.2$, the perplexity.
#
# ```python
# check("00.1", np.exp(2.5))
# ```
#
# </details>
#
# <details><summary>Solution of 00.2</summary>
#
# Nats into bits, and a token into four bytes.
#
# ```python
# check("00.2", 3.2 / np.log(2) / 4)
# ```
#
# </details>
#
# <details><summary>Solution of 00.3</summary>
#
# The logarithm of a quotient is a difference of logarithms, so the logarithm of a tiny probability is never taken.
#
# ```python
# def log_softmax(z):
#     z = z - z.max(axis=-1, keepdims=True)
#     return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
#
# check("00.3", log_softmax)
# ```
#
# </details>
#
# <details><summary>Solution of 00.4</summary>
#
# ```python
# def nesterov(w, gradients, lr, mu):
#     b = 0
#     for g in gradients:
#         b = mu * b + g
#         w = w - lr * (g + mu * b)
#     return w
#
# check("00.4", nesterov)
# ```
#
# </details>
