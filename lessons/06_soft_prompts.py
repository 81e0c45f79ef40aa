# %% [markdown]
# # Lesson 6 · Soft prompts: training the input instead of the model
#
# A prompt changes what a language model does without changing the model. But a prompt's words come from a finite
# vocabulary, and the model computes with their *embeddings*, which are vectors. So train vectors. Prompt tuning (Lester
# et al. 2021, arXiv:2104.08691) puts a few in front of the input and trains them by gradient; prefix tuning (Li & Liang
# 2021, arXiv:2101.00190) puts trained keys and values in front of every layer's own. The model stays frozen.
#
# After this lesson you can build both through two arguments that the model has anyway, count them, say how the right
# learning rate depends on the start, and name what they cost that other methods do not: room in the context.
#
# You need Lessons 2 (attention, its cache), 3 and 4 (LoRA). Reading takes about 25 minutes (200 words or 25 lines of
# code a minute, up to the quiz). Run it with `python lessons/06_soft_prompts.py` (a minute on two cores), or open it as
# a notebook. Where a line begins with **Predict**, write down your answer; the next cell computes it.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import os
from itertools import product
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import count_parameters, memory_ledger
from minipeft.claims import data, memorization
from minipeft.claims.comparison import KEYS, compare
from minipeft.claims.league import MIDDLE, league
from minipeft.claims.protocol import finder, report, search
from minipeft.claims.standings import so_far, standings
from minipeft.experiments.seeds import below, interval, spread

F = mp.functional
REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
if REDUCED:
    print("REDUCED SETTING: 3 steps of training for 20, on fewer verses and one seed: no number of section 4 says anything.\n")
model, tokenizer = mp.load_base()
ids = np.array([tokenizer.encode("And it came to pass in those days")])

# %% [markdown]
# Blue is frozen and orange is trained: vectors in front of the input, or keys and values in front of each block's own.

# %%
for name, method in (("prompt", mp.PromptTuningConfig), ("prefix", mp.PrefixTuningConfig)):
    diagrams.block(model.config, method(num_virtual_tokens=20)).savefig(OUT / f"06_soft_prompts_{name}.png")

# %% [markdown]
# ## 1 · Vectors in front of the input
#
# Let $E(x)$, of shape $[T, d]$, be the embeddings of the input's $T$ tokens, $d$ the model's width. Prompt tuning
# computes
#
# $$\mathrm{model}\big([P;\, E(x)]\big), \qquad P\ [p, d]\ \text{trained}.$$
#
# The rows of $P$ are the **virtual tokens**. (In the verdicts quoted below, P is their *number*.) The model's argument
# `inputs_embeds` takes embeddings in place of ids. By hand, and by the library, which returns the logits at the input's
# positions alone:

# %%
soft = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=20))
P = soft.prompts["default"].prompt_embeddings
by_hand = F.cat([P.reshape(1, *P.shape), model.backbone.embedding(mp.backend.asarray(ids))], axis=1)  # [1, 20 + T, d]
full = model(inputs_embeds=by_hand)  # [1, 20 + T, the vocabulary]
logits = full.numpy()[:, 20:]
print("by hand against minipeft:", np.abs(logits - soft(ids).numpy()).max(), "  logits", soft(ids).shape)
assert np.allclose(logits, soft(ids).numpy(), atol=1e-4)
assert soft(ids).shape[1] == ids.shape[1]
assert np.isclose(soft.loss(ids, ids).item(), F.cross_entropy(full[:, 19:-1], mp.backend.asarray(ids)).item())

# %% [markdown]
# The virtual tokens are no targets of the loss: their labels are $-100$ (Lesson 3), here as in PEFT. But the last of
# them predicts the input's first token, as the last line checks; in the base nothing does. So over a whole text this
# loss and the base's are means over different tokens: leave out the first before comparing. Where its label is $-100$
# anyway, as in Lesson 3, which learns answers alone, both are over the same. (With the prefix of section 2 they are in
# any case: a prefix predicts nothing.)
#
# Is a soft prompt more than a prompt of words? Every prompt of words is a soft one: if the vectors are the embeddings
# of real tokens, the model computes exactly what it computes behind that text. `prompt_tuning_init="TEXT"` starts
# there, and training leaves the finite set of texts for all of $\mathbb R^{p \times d}$. What it finds need not be
# readable: a prompt can be trained so that its nearest words are any text one likes, and still come within 2 % of the
# accuracy of the best prompt of its length (Khashabi et al. 2021, arXiv:2112.08348).

# %%
words = tokenizer.encode("Say it in plain English: ")
hard = np.concatenate([[words], ids], axis=1)
from_text = mp.PromptTuningConfig(
    num_virtual_tokens=len(words), prompt_tuning_init="TEXT", prompt_tuning_init_ids=list(words)
)
difference = np.abs(mp.get_peft_model(model, from_text)(ids).numpy() - model(hard).numpy()[:, len(words) :]).max()
print(f"soft tokens that are {len(words)} real ones, against the text itself: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# > `soft-1` P learnable vectors before the input: **holds**. The logits on both sides differ by at most 5e-07 of the
# > largest, with P = 10.

# %% [markdown]
# ## 2 · Keys and values in front of every layer's own
#
# A virtual token in the input is processed by every layer like a real one. Prefix tuning is more direct: a token acts
# on *others* only through its keys and values, so train these, per layer, and let nothing be computed at the virtual
# positions:
#
# $$\mathrm{attention}\big(q,\ [P_k; k],\ [P_v; v]\big) .$$
#
# ($P_k$, $P_v$ are trained; $q$, $k$, $v$ are the input's.) Who sees whom: in the second panel, every token sees the
# prefix, which has no rows: it looks at nothing.

# %%
diagrams.attention_mask().savefig(OUT / "06_soft_prompts_masks.png")

# %% [markdown]
# So a prefix is a cache of positions where no token ever stood. The model takes it as `past_key_values`.
#
# **Predict:** take the cache that a text leaves, and use it as the prefix. How far are the logits from those behind the
# text itself?

# %%
cache = mp.KVCache()
model(np.array([words]), past_key_values=cache)
prefixed = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=len(words)))
flat = [a[0].transpose(1, 0, 2).reshape(len(words), -1) for pair in cache for a in pair]  # of each layer: keys, values
prefixed.prompts["default"].prompt_embeddings.data = mp.backend.xp_of(*flat).concatenate(flat, axis=1)
difference = np.abs(prefixed(ids).numpy() - model(hard).numpy()[:, len(words) :]).max()
print(f"a prefix that is a text's keys and values, against the text itself: {difference:.1e}")
assert difference < 1e-3

plain = prefixed.prompts["default"].key_values()  # (keys, values) of each layer: plain arrays
continued = model.generate(ids, max_new_tokens=8, past_key_values=plain)
assert (continued == prefixed.generate(ids, max_new_tokens=8)).all()
print("the base, given the prefix as a plain cache, continues as the adapted model does")

# %% [markdown]
# By rounding alone. So each prompt is also a prefix of as many positions: under the causal mask its vectors see only
# each other, and leave the same keys and values before any text. But not each prefix is a prompt: a prefix's keys and
# values are free in every layer, a prompt's follow from the layer below. The model does not turn a prefix's keys by a
# position: it takes all keys in a cache as turned already (Lesson 2, section 6). The text begins at position $p$,
# behind a prefix as behind a prompt. Code that knows only caches can serve a prefix. Neither method has anything to
# merge: what is trained stays beside the weights, in the input or in the cache. So rows of one batch may carry those of
# different tasks (Lesson 4, section 9).
#
# **Predict:** can a prefix, within a layer, make a token attend more to one word of the text, and less to another?

# %%
rng = np.random.default_rng(0)
(q, keys, values, P_k, P_v), scale = (rng.standard_normal((n, 16)) for n in (1, 5, 5, 3, 3)), 16**-0.5  # one head
mixed = F.softmax(mp.Tensor(q @ np.concatenate([P_k, keys]).T * scale)).numpy()  # [1, 3 + 5]
alone = F.softmax(mp.Tensor(q @ keys.T * scale)).numpy()
share = mixed[:, :3].sum()  # of attention that goes to the prefix
print("attention to the text's words over that without a prefix:", (mixed[:, 3:] / alone).round(3))
of_prefix = mixed[:, :3] / share @ P_v
assert np.allclose(mixed @ np.concatenate([P_v, values]), (1 - share) * alone @ values + share * of_prefix)
assert np.allclose(mixed[:, 3:] / alone, 1 - share)

# %% [markdown]
# No. Let $\lambda$ be the share of a query's attention that goes to the prefix. Attention to each word is multiplied by
# $1-\lambda$. So is the output; $\lambda$ times a weighted mean of $P_v$ is added (He et al. 2021, arXiv:2110.04366,
# section 3.1). LoRA on queries and keys can change the relative attention among the text's words. The next layer reads
# changed outputs, so there a prefix may change it. Even so, Petrov et al. (2023, arXiv:2310.19698) argue that tasks
# which need new patterns of attention may be out of a prefix's reach.

# %% [markdown]
# > `soft-2` prefix tuning: learnable keys and values in each layer: **holds**. 6 of 6 layers have keys and values of
# > their own. Behind those that the base computes of 10 real tokens the logits differ by at most 6e-07 of the largest
# > from those behind the tokens themselves.
#
# > `soft-5` no change of the architecture: **holds**. The base alone computes the same from embeddings in front of the
# > input (to 5e-07) and from a cache (to 6e-07); its 84 modules are as they were with both, where LoRA replaces some by
# > its own.

# %% [markdown]
# ## 3 · The count
#
# Prompt tuning trains $p\,d$ numbers. A model of width 1024 with 100 virtual tokens: 102,400. Prefix tuning has keys
# and values in each of $L$ layers, $2\,L\,p\,d$. Where several query heads share a key head (Lesson 2), the keys and
# values are narrower than $d$, and so is the prefix.
#
# **Predict:** GPT-2 medium has this width and 24 layers. How many megabytes is a prefix of 100 tokens in float32?

# %%
prompt, prefix = (c(num_virtual_tokens=100) for c in (mp.PromptTuningConfig, mp.PrefixTuningConfig))
gpt2_medium = {name: count_parameters("gpt2-m", c).trainable for name, c in (("prompt", prompt), ("prefix", prefix))}
print("GPT-2 medium (width 1024, 24 layers), 100 virtual tokens:", gpt2_medium)
assert gpt2_medium["prompt"] == 100 * 1024 == 102_400  # "102K"
assert gpt2_medium["prefix"] == 2 * 24 * 102_400
print(f"in float32: the prompt {4 * gpt2_medium['prompt'] / 1e6:.1f} MB, the prefix {4 * gpt2_medium['prefix'] / 1e6:.1f} MB")
xxl = count_parameters("t5v1.1-xxl", prompt).trainable
print(f"T5 XXL (11B), 100 tokens of width 4096: {xxl:,}; Lester et al. (2021), Table 4: 409,600")
assert xxl == 409_600

for config in (mp.PromptTuningConfig(num_virtual_tokens=20), mp.PrefixTuningConfig(num_virtual_tokens=20)):
    built = mp.get_peft_model(model, config).get_nb_trainable_parameters()[0]
    assert built == count_parameters(model.config, config).trainable
    print(f"the shipped base, {config.peft_type}, 20 tokens: {built:,} numbers, {4 * built / 1e3:.0f} KB")

# %% [markdown]
# About 20 MB: the prefix has 48 times the numbers of the prompt, keys and values in 24 layers.
#
# Li & Liang (section 4.3) found that training a prefix directly is unstable and ends slightly worse. So while training
# they compute it from a smaller matrix by an MLP (`prefix_projection=True`; the default, here as in PEFT, is `False`),
# and throw the MLP away afterwards: more is trained than is stored. Every prefix that the MLP can give can also be
# trained directly; but the start and the steps differ, and with them where training may end. **P-tuning** (Liu et al.
# 2021, arXiv:2103.10385; `PromptEncoderConfig`) computes the virtual tokens at the input by a network, too: here, as by
# default in PEFT, an MLP of three layers, from as many trained vectors (the paper has an LSTM before the MLP).
# **P-tuning v2** (Liu et al. 2021, arXiv:2110.07602) is prefix tuning for classification and tagging.

# %%
through_mlp = mp.PrefixTuningConfig(num_virtual_tokens=20, prefix_projection=True)
counted = count_parameters(model.config, through_mlp)
print(f"prefix by an MLP: {counted.trainable:,} trained, {counted.stored:,} stored")
assert counted.stored == count_parameters(model.config, mp.PrefixTuningConfig(num_virtual_tokens=20)).trainable
p_tuning = count_parameters(model.config, mp.PromptEncoderConfig(num_virtual_tokens=20))
print(f"P-tuning, 20 tokens: {p_tuning.trainable:,} trained, {p_tuning.stored:,} stored")
assert p_tuning.stored == 20 * 128 and p_tuning.trainable == 20 * 128 + 3 * (128 * 128 + 128)  # the vectors, and three layers
for llm, width, vectors in ((model.config, 128, 13), ("llama-7b", 4096, 65), ("llama2-70b", 8192, 161)):  # for the next paragraph
    assert count_parameters(llm, mp.LNTuningConfig()).trainable == vectors * width
    assert count_parameters(llm, mp.LoraConfig(r=1, target_modules=["q_proj"])).trainable == (vectors - 1) * width

# %% [markdown]
# How many virtual tokens? Lester et al. (section 3.2) find only small gains beyond 20; Li & Liang's prefixes (section
# 7.1) were best at 10 for tables and at 200 for summaries. Is a prompt the least one can train? **LN tuning** trains
# the weights of the norms and nothing else: two vectors a layer, and one at the end. In our base of 6 layers these are
# 13 vectors, in Llama 7B (32 layers) 65, in 70B (80 layers) 161: a prompt of fewer tokens trains less. (Other methods
# get as low with other options: LoRA of rank 1 on the queries alone has one vector fewer than LN tuning. LN tuning is
# the smallest variant of Zhao et al. 2023, arXiv:2312.11420; their others train the embedding and the output head, too,
# by their figure 1.)

# %% [markdown]
# > `soft-3` P d parameters; 100 x 1024 = 102K: **holds**. The built prompt trains 102,400 numbers, P d is 102,400.
#
# > `soft-4` fewest parameters: **holds if**. Beside every method that is no soft prompt it is so for P = 20 on 7B, P =
# > 20 on 70B and P = 100 on 70B, and not for P = 20 on the base, P = 100 on the base and P = 100 on 7B, where LN tuning
# > trains fewer: a prompt has P vectors, LN tuning two of them a layer.

# %% [markdown]
# ## 4 · The start, and the rate
#
# Lester et al. (section 3.2) found that starting from embeddings of real words beats random vectors, most of all for
# small models. Their random numbers were at most 0.5 in size, and they trained with Adafactor at a constant rate of
# 0.3. What follows, with larger numbers and another optimizer, is no test of their finding. Here `RANDOM` draws
# standard normal numbers, as PEFT does (the start of a torch embedding). Such a vector is far longer than any token's
# embedding; and AdamW moves each element by about the learning rate a step, whatever its size (Lesson 0, section 6).

# %%
STEPS, BATCH, SEEDS = (3, 2, 1) if REDUCED else (20, 12, 5)
E = model.backbone.embedding.weight.numpy()
size = np.sqrt((E**2).mean())
longest, length = np.linalg.norm(E, axis=1).max(), np.sqrt(E.shape[1])
print(f"root mean square of an element: of a token's embedding {size:.3f}, of a random vector 1.000")
print(f"length of a vector: of the longest embedding {longest:.1f}, of a random vector about {length:.1f}")
whole = sum(mp.optim.linear(step, 3, STEPS) for step in range(STEPS))  # factors of the rate: three steps of warm-up, then down to 1/17
print(f"{STEPS} steps at rate 0.03 move an element by at most about {whole * 0.03:.2g}, at rate 0.3 by {whole * 0.3:.2g}")
assert size < 0.2 and longest < length / 3

# %% [markdown]
# So at the lower rate an element of an embedding can move by at most about three times its usual size, and one of a
# random vector by a third of its own. Which start is better may be a question of the rate. The task is Lesson 3's, with
# three starts, two rates and five seeds, each with verses of its own. "Words" are embeddings of 20 tokens drawn from
# the vocabulary (`SAMPLE_VOCAB`), not of a text that makes sense. "Small" are random vectors about as long as
# embeddings: the *control*, with the usual size of words and random directions.
#
# **Predict:** at rate 0.03 words win. At 0.3?

# %%
held_out = data.encode(data.asked("rewrite", "validation", 8 if REDUCED else 64))
RATES, moved = (0.03, 0.3), {}


def loss_of(model, examples=held_out):
    """The held-out loss of the task, in nats per token."""
    return mp.train.evaluate(model, examples, batch_size=32, pad_token_id=tokenizer.pad_token_id)


def outcome(kind, rate, seed):
    """The held-out loss of a prompt after STEPS steps."""
    init = "SAMPLE_VOCAB" if kind == "words" else "RANDOM"
    tuned = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init=init), seed=seed)
    vectors = tuned.prompts["default"].prompt_embeddings
    if kind == "small":
        vectors.data *= np.float32(size)
    before = vectors.numpy().copy()
    arguments = mp.TrainingArguments(
        learning_rate=rate, max_steps=STEPS, per_device_train_batch_size=BATCH, warmup_steps=3, progress=False
    )
    mp.Trainer(tuned, data.drawn("rewrite", STEPS * BATCH, seed=seed), args=arguments).train()
    moved[kind, rate, seed] = np.sqrt(((vectors.numpy() - before) ** 2).mean())
    return loss_of(tuned)


start = loss_of(model)
runs = {kind: np.array([[outcome(kind, rate, seed) for seed in range(SEEDS)] for rate in RATES]) for kind in ("random", "small", "words")}
print(f"held-out loss after {STEPS} steps, each seed (the base: {start:.3f})")
print(" " * 10 + "".join(f"{f'rate {rate}':>40s}" for rate in RATES))
for kind, found in runs.items():
    print(f"{kind:10s}" + "".join(f"{', '.join(f'{loss:.3f}' for loss in of):>40s}" for of in found))
step = {kind: np.mean([moved[kind, 0.03, seed] for seed in range(SEEDS)]) for kind in runs}
print("root mean square by which an element moved at rate 0.03: " + ", ".join(f"{kind} {by:.2f}" for kind, by in step.items()))
(low, high), (small, _), (words, words_high) = runs.values()  # [seeds] each
for name, less in (
    ("random less words at 0.03", low - words),
    ("random less words at 0.3", high - words_high),
    ("small less words at 0.03", small - words),
    ("random at 0.3 less small at 0.03", high - small),
):
    print(f"{name + ':':34s}{spread(less)}")
if not REDUCED:
    assert below(words, low) and below(small, low) and below(high - words_high, low - words)
    assert np.mean(low - small) > np.mean(low - words) / 2 and round(1 / size) == 9
    assert 0.8 < step["words"] / size < 1.4 and 0.15 < step["random"] < 0.25

# %%
figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
for color, marker, (kind, found) in zip(("C3", "C1", "C0"), "s^o", runs.items()):
    axes.semilogx(RATES, found.mean(axis=1), marker + "-", color=color, label=kind)
    for rate, of in zip(RATES, found):
        axes.plot([rate] * len(of), of, marker, color=color, alpha=0.4, markersize=4)
axes.axhline(start, color="0.5", linestyle=":", label="the base")
axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
axes.minorticks_off()
axes.set(xlabel="learning rate", ylabel="held-out loss (nats per token)", title=f"Three starts, {STEPS} steps")
axes.legend(fontsize=9)
figure.savefig(OUT / "06_soft_prompts_start.png", dpi=120)

# %% [markdown]
# No longer. At 0.03 words lead by 0.449 ± 0.093; at 0.3 they are behind by 0.074 ± 0.102: undecided. (At 0.03 an
# element of words moved by 0.13, about its usual size, of a random vector by 0.20, a fifth of its own.) Cut to the
# length of embeddings, random vectors at 0.03 close most of the gap: most of it was one of size. What the direction
# adds, 0.022 ± 0.071, is undecided. If size is all, the rate *over the size of the start's elements* counts. Then a
# random start needs nine times the rate of words, and random at 0.3 does as small at 0.033 (beside small at 0.03:
# -0.075 ± 0.080). The verdict below compares words (`prompt`), random and small (`prompt-random`, `prompt-small`), each
# tuned. On `rewrite` words and random are equal, and small is behind both, by 0.017.
#
# LoRA and an adapter start as the base: they add zero.
#
# **Predict:** does a prefix start as the base if its keys and values are zeros?

# %%
few, begins = held_out[:8], {"the base": model}
for name, config in (
    ("words", mp.PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")),
    ("a random prefix", mp.PrefixTuningConfig(num_virtual_tokens=20)),
    ("a prefix of zeros", mp.PrefixTuningConfig(num_virtual_tokens=20, init_weights="zero")),
):
    begins[name] = mp.get_peft_model(model, config, seed=0)
begins = {name: loss_of(m, few) for name, m in begins.items()}
print("loss of 8 verses before the first step:", ", ".join(f"{name} {loss:.3f}" for name, loss in begins.items()))
assert all(loss > begins["the base"] + 0.03 for name, loss in begins.items() if name != "the base")

# %% [markdown]
# No, nor do words or a random prefix. Values of zero add nothing, but a key of zero has the score 0, and $e^0 = 1$: so
# the prefix gets its share $\lambda$ of the attention (section 2), which the text loses. (As $\lambda$ depends on the
# keys, they have a gradient from the first step.) LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199) starts a prefix
# as nothing by a *gate*: attention to the prefix has a softmax of its own, and is multiplied by a trained number that
# starts at zero.

# %% [markdown]
# > `soft-9` sensitive to initialization: **holds if**. Of 6 comparisons 2 are as stated, 1 is not and 3 are not told:
# >
# > - prompt beside prompt-random, rewrite, 500 examples: equal (-0.000 [-0.005, +0.004]).
# > - prompt beside prompt-random, source, 500 examples: undecided (-0.080 [-0.238, +0.079]), the first within 16 epochs
# >   (32: 0.005 better on validation), the other within 16 epochs (32: 0.016 better on validation), not told.
# > - prompt beside prompt-small, rewrite, 500 examples: better (+0.017 [+0.009, +0.025]).
# > - prompt beside prompt-small, source, 500 examples: undecided (-0.098 [-0.247, +0.050]), not told.
# > - prompt-small beside prompt-random, rewrite, 500 examples: worse (-0.017 [-0.026, -0.008]).
# > - prompt-small beside prompt-random, source, 500 examples: undecided (+0.018 [-0.030, +0.067]), not told.
# >
# > (5 seeds, 512 test items)

# %% [markdown]
# ## 5 · The lost context
#
# What is trained takes up *positions*, in the input or in the cache. Every virtual token takes a position from the
# input. In generation it stands in each layer's cache, which every new token reads. In training, prompt tuning also
# computes at each virtual position, in every layer, for every example.
#
# **Predict:** a prompt of 200 tokens, or a prefix of 200: which keeps more activations in a training step?

# %%
budget = model.config.max_position_embeddings
print(repr(soft).splitlines()[1].strip())
assert soft(np.zeros((1, budget - 20), int)).shape[1] == budget - 20
try:
    soft(np.zeros((1, budget), int))
    raise AssertionError("20 virtual tokens and a full context cannot fit")
except ValueError as error:
    print("refused:", error)

batch, length = 8, 128
cost = {}
for p in (1, 20, 100, 200):
    for name, kind in (("prompt", mp.PromptTuningConfig), ("prefix", mp.PrefixTuningConfig)):
        ledger = memory_ledger(model.config, kind(num_virtual_tokens=p), batch, length)
        cost[name, p] = ledger.held["activations"] / 1e6
        print(f"{name} of {p:3}: {budget - p} positions left, {cost[name, p]:.0f} MB of activations kept for a step")
whole = memory_ledger(model.config, None, batch, length).held["activations"] / 1e6
print(f"full fine-tuning: {whole:.0f} MB")
assert cost["prompt", 100] > cost["prompt", 1] and cost["prompt", 100] > cost["prefix", 100]
assert 0.7 < cost["prompt", 1] / whole < 0.8
assert cost["prompt", 200] > 1.9 * cost["prefix", 200]
assert cost["prompt", 100] > whole + 17.4 > whole + 12 * count_parameters(model.config).total / 1e6
for llm, rows in ((model.config, 1), ("gpt2-m", 8)):  # where it keeps less
    mine, full = (memory_ledger(llm, of, rows, length).held["activations"] for of in (prompt, None))
    assert mine < full + 12 * count_parameters(llm).total < 2 * 12 * count_parameters(llm).total

# %%
figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
for name in ("prompt", "prefix"):
    axes.plot([p for n, p in cost if n == name], [cost[key] for key in cost if key[0] == name], "o-", label=name)
axes.set(xlabel="virtual tokens", ylabel="MB of activations for a step", title=f"{batch} rows of {length} tokens", ylim=(0, None))
left_over = axes.secondary_xaxis(-0.28, functions=(lambda p: budget - p, lambda rest: budget - rest))
left_over.set_xlabel("positions left for the input")
axes.legend()
figure.savefig(OUT / "06_soft_prompts_cost.png", dpi=120)

# %% [markdown]
# The prompt, about twice as much, by Lesson 3's ledger. It computes at $p + T$ positions, with $(p + T)^2$ scores of
# attention a head; with a prefix there are $T$ positions and $T (p + T)$ scores. At $p = 200$ and $T = 128$ the prompt
# has $328/128 = 2.6$ times as many of both; as a prefix also keeps keys and values of its own, the whole is about
# twice. Here, with 8 rows of 128 tokens, a prompt of 100 keeps more than full fine-tuning does, even with full
# fine-tuning's gradients and AdamW's moments (12 bytes a weight, 17 MB) added. With one row it keeps less, and so it
# does in GPT-2 medium with 8 rows. What lost positions cost a text that needs them, the verdict below estimates without
# a prompt, by cutting texts of 256. A prompt of one token trains $d$ = 128 numbers, and still keeps three quarters of
# the activations of full fine-tuning: the gradient must travel back through every layer to reach the input. Only the
# inputs of frozen matrices need not be kept: the gradients of those matrices alone need them (Lesson 4, section 6). Few
# trained parameters need not mean little memory.

# %% [markdown]
# > `soft-7` takes length from the context: **holds if**. With 10 vectors the model takes 502 of its 512 positions. What
# > lost positions cost was tried without a prompt, by cutting texts of 256 tokens: the base's loss on the last 32 rises
# > clearly where the first 50, 100 and 200 are cut, and not clearly for 20: by 0.053 nats for 200, by -0.000 for 20.
# > (512 test items)

# %% [markdown]
# ## 6 · The league so far
#
# By the protocol of Lesson 3, everything tuned: `prompt` starts as words, `prompt-random` at random, `prompt-small` is
# cut to size (section 4); `prefix` is computed by an MLP while training, `prefix-direct` is not; 20 virtual tokens
# each. Lester et al. find (figure 1) that prompts catch up with full fine-tuning as models reach billions of
# parameters; ours has 1.4 million.

# %%
names = ["full", "head", "lora", "bottleneck", "prompt", "prompt-random", "prompt-small", "prefix", "prefix-direct", "p-tuning"]
print(so_far(names))
find, prefixes, networks = finder(league(names, MIDDLE).rows()), {}, {}
for task, key in KEYS.items():
    by_mlp, direct = (report(find, search(task, m, 500), key) for m in ("prefix", "prefix-direct"))
    prefixes[task] = compare(direct, by_mlp, key)
    print(f"{task}: the direct prefix, at {direct.trial.rate / by_mlp.trial.rate:.0f} times the rate, "
          f"is better by {prefixes[task].interval}")
    assert direct.trial.rate > 5 * by_mlp.trial.rate
    networks[task] = compare(*(report(find, search(task, m, 500), key) for m in ("p-tuning", "prompt")), key)
    print(f"{task}: P-tuning is better than a prompt by {networks[task].interval}")
assert (prefixes["rewrite"].word, prefixes["source"].word) == ("equal", "undecided")
assert [found.word for found in networks.values()] == ["equal", "undecided"]
chosen = {task: [report(find, search(task, m, 500)).trial.rate for m in ("prompt-random", "prompt-small", "prompt")] for task in KEYS}
print(
    "tuned rate of a random start over that of words: "
    + ", ".join(f"{task} {random / word:.0f}, cut to size {small / word:.0f}" for task, (random, small, word) in chosen.items())
)
assert [(random / word, small / word) for random, small, word in chosen.values()] == [(8, 1), (4, 4)]
prompts = "prompt", "prompt-random", "p-tuning", "prompt-small"
most_lost = [(("prefix", "prefix-direct"), prompts), (["head"], prompts[:3]), (prompts[:2], ["bottleneck"])]
most_lost += [(["bottleneck"], ["full"]), (["full"], ["lora"])]
kept = {name: report(find, search("source", name, 500), "cloze") for name in names}
for more, less in most_lost:
    assert all(compare(kept[b], kept[a], "cloze").clearly_better for a, b in product(more, less)), "each loses clearly more"
assert all(line.cloze.high < 0 for line in standings(MIDDLE[0], names)), "all lose some after rewrite, too"

# %% [markdown]
# On `rewrite` the tuned rate of a random start is 8 times that of words, and if cut to their size the same: about as
# the size has it. On `source` it is 4 times, cut or not. So the rate need not go with the size. (One tuning seed, steps
# of two; all but `prompt-small` on `rewrite` took 16 epochs, the most allowed; on `source` their batches differ.) On
# `rewrite` the direct prefix equals the one by an MLP, at 32 times its rate: there direct training does not end worse.
# On `source` the interval, ± 0.16, is too wide to tell. P-tuning equals `prompt` on `rewrite`; on `source` it is
# undecided.
#
# `cloze` says what is lost with the trained numbers in place: how many fewer of 100 general passages are continued
# rightly than by the base. After `source` prefixes and the head lose most, then prompts and P-tuning, then adapters,
# full fine-tuning, and LoRA, each clearly more than the next (each comparison at 95 %; small is undecided beside the
# head, small and P-tuning beside adapters). (They did not learn equally well: of 100 sentences prompts and P-tuning
# name the right book for 65 to 77, full fine-tuning for 94.) After `rewrite` all lose some. Without its prefix the base
# is whole.

# %% [markdown]
# ## 7 · How much can be remembered
#
# A prompt of 20 trains 2,560 numbers. How much can these take up? *Random* answers can only be remembered (Zhang et al.
# 2017, arXiv:1611.03530). Behind the first 8 tokens of a sentence we train an answer of $T = 16$ tokens, each drawn
# evenly from all $V = 2048$. Of such an answer a model has memorized
#
# $$T \log_2 V + \log_2 p(\text{answer} \mid \text{sentence})\ \text{bits}$$
#
# (Morris et al. 2025, arXiv:2505.24832): 0 if it knows only that any token may come, $16 \cdot 11 = 176$ if it knows
# the answer, and less than 0 if it expects something else, as the base does. So 64 examples have 11,264 bits. Each
# method passes over them 32 or 128 times, or over 512 examples 32 times, in batches of 8, at the rate that was best
# under one seed. Five other seeds, with other sentences and answers, are reported. (IA)$^3$ (Liu et al. 2022,
# arXiv:2205.05638) trains one factor for each channel of the keys, the values, and the MLP's input to its last matrix.
#
# **Predict:** LoRA of rank 8 trains a twelfth of full fine-tuning's numbers. Does it remember a twelfth of the bits?

# %%
memory = {(row["method"], row["examples"], row["epochs"]): row for row in memorization.EXPERIMENT.rows()}
shares = {key: np.array(row["memorized"]) / row["bits"] for key, row in memory.items()}
print("\nrandom answers       trained   64 in 32 passes     64 in 128           512 in 32")
for method in memorization.METHODS:
    told = ("{:7.1%} ± {:5.1%} ".format(*interval(shares[(method, *load)])) for load in memorization.LOADS)
    print(f"{method:18s} {memory[method, 64, 32]['trainable']:9,}  ", "   ".join(told))
lora = shares["lora", 64, 128], shares["lora-r64", 64, 128]
assert min(shares[("full", *load)].min() for load in memorization.LOADS) > 0.998 and shares["prompt", 64, 128].max() < 0
assert shares["ia3", 64, 128].mean() > 0.5 > 0 > shares["ia3", 512, 32].max() and 0.2 < shares["lora", 64, 32].min() < 0.25, "one seed"
assert all(np.subtract(*interval(shares[m, 64, 128] - shares[m, 64, 32])) > 0.1 for m in ("ia3", "bottleneck", "lora-r1"))
assert shares["lora-r64", 512, 32].min() > 0.9 and np.sum(interval(shares["lora", 512, 32])) < 0.6, "here the rank counts"
E = model.backbone.embedding.weight.numpy().astype(float)
squares = (E**2).sum(axis=1)
apart = np.sqrt(np.maximum(squares[:, None] + squares - 2 * E @ E.T, 0))  # of each two embeddings, 0 on the diagonal
nearest = np.partition(apart, 1, axis=0)[1]
twins = nearest < 0.2
left = 1 - twins.mean() * np.log2(twins.sum()) / np.log2(len(E))
print(f"{twins.sum()} of {len(E)} embeddings are within {apart[twins][:, twins].max():.2f} of each other; a token's nearest is at "
      f"{np.median(nearest):.2f} (median); the bits of who cannot tell these apart: {left:.1%}")
single = [tokenizer.decode([i]) for i in np.flatnonzero(twins)]  # half a character is one replacement sign
assert sum(len(text) == 1 for text in single) > 0.9 * len(single) and apart[twins][:, twins].max() < 0.2
assert all(abs(x.mean() - left) < 0.005 for x in lora), "LoRA's, of either rank"

# %%
figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
for (n, passes), color, marker in zip(memorization.LOADS, ("C0", "C1", "C2"), "os^"):
    trained = [memory[method, n, passes]["trainable"] for method in memorization.METHODS]
    found = [shares[method, n, passes] for method in memorization.METHODS]
    axes.semilogx(trained, [x.mean() for x in found], marker, color=color, label=f"{n} answers, {passes} passes")
    for x, each in zip(trained, found):
        axes.plot([x] * len(each), each, marker, color=color, alpha=0.4, markersize=3)
for method in memorization.METHODS:
    axes.annotate(method, (memory[method, 64, 32]["trainable"], -0.53), rotation=90, fontsize=8, ha="center", va="bottom")
axes.axhline(0, color="0.5", linestyle=":")
axes.set(xlabel="trained numbers", ylabel="share of the bits memorized", ylim=(-0.55, 1.05), title="random answers, mean and five seeds")
axes.legend(fontsize=8, loc=(0.63, 0.4))
figure.savefig(OUT / "06_soft_prompts_memory.png", dpi=120)

# %% [markdown]
# No: 77 % ± 39 of all bits in 32 passes, where one seed of five ends at 22 %, and 94 % in 128. Full fine-tuning has
# over 99.8 % after 32. So such shares tell of speed as well as of room: with four times the passes adapters come from
# 23 % to 93 %, and LoRA of rank 1 from 38 % to 89 %.
#
# LoRA of rank 8 and of rank 64 end alike, so there the rank is not what holds them back. Of the 2,048 tokens 172, most
# of them single bytes, have embeddings within 0.2 of each other; a token's nearest neighbor is at 0.79 as a rule.
# Embeddings are frozen in LoRA, and so is the head, which here is the same table (Lesson 2). Who knows that one of
# these tokens comes, and not which, lacks $\log_2 172 = 7.4$ of its 11 bits. These are 8 % of the tokens, so 94.3 % of
# all bits are left, and LoRA has about as much. Full fine-tuning trains the table, too.
#
# (IA)$^3$ remembers over half of the bits with 3,072 numbers: two bits a number. A prompt remembers nothing. With 512
# examples the rank counts: of 90,112 bits rank 64 has 93 %, rank 8 44 % ± 11, rank 1 8 %, full fine-tuning all,
# (IA)$^3$ none, though of 64 it had 38 % in as many passes. (More passes, and tokens without twins, were not tried:
# what each can hold stays open.)

# %% [markdown]
# > `full-7` the whole capacity of the model is available: **holds if**. Of random answers:
# >
# > - 64 examples in 32 passes: full fine-tuning remembers 99.9% of 11,264 bits, clearly more than ia3, prompt,
# >   bottleneck, lora-r1 and lora-r64, and not clearly more than lora (by 0.23 [-0.16, 0.61]).
# > - 64 examples in 128 passes: full fine-tuning remembers 100.0% of 11,264 bits, clearly more than ia3, prompt,
# >   bottleneck, lora-r1, lora and lora-r64.
# > - 512 examples in 32 passes: full fine-tuning remembers 100.0% of 90,112 bits, clearly more than ia3, prompt,
# >   bottleneck, lora-r1, lora and lora-r64.
# >
# > (5 seeds)

# %% [markdown]
# ## 8 · Break it
#
# Pad a batch on the left, as generation does, and count the padding as text: the 20 virtual tokens have the positions 0
# to 19, six tokens of padding 20 to 25, and the text begins at 26 in place of 20. That happens where positions are not
# derived from the mask. (In prompt tuning PEFT's `forward` drops the `position_ids` that it is given, and Llama in
# `transformers` then counts all columns.) With rotary positions only distances count (Lesson 2, section 3). Those
# within the text are unchanged, but the one from the text to the virtual tokens has grown by six, behind a prefix as
# behind a prompt. The row's logits now depend on how long the other rows are.

# %%
padded = np.concatenate([np.zeros((1, 6), int), ids], axis=1)
mask = np.concatenate([np.zeros((1, 6), int), np.ones_like(ids)], axis=1)
for name, tuned in (("prompt", soft), ("prefix", prefixed)):
    alone = tuned(ids).numpy()[:, -1]
    right_way = tuned(padded, attention_mask=mask).numpy()[:, -1]
    wrong_way = tuned(padded, attention_mask=mask, position_ids=np.arange(padded.shape[1])[None]).numpy()[:, -1]
    print(f"{name}, positions from the mask: differs by {np.abs(right_way - alone).max():.1e} from the row alone")
    print(f"{name}, padding counted as text: differs by {np.abs(wrong_way - alone).max():.1e}")
    assert np.abs(right_way - alone).max() < 1e-3 < np.abs(wrong_way - alone).max()

# %% [markdown]
# ## Quiz
#
# **1.** In which sense is a soft prompt more than a prompt of words?
#
# <details><summary>Answer</summary>
#
# Every prompt of words is one: if the vectors are the embeddings of real tokens, the model computes what it computes
# behind that text. Training may leave the finite set of texts.
#
# </details>
#
# **2.** What is a trained prefix, seen from the model's code?
#
# <details><summary>Answer</summary>
#
# A cache of keys and values at positions where no token ever stood. The base, given the prefix as a plain cache,
# continues as the adapted model does.
#
# </details>
#
# **3.** At the rate 0.03 a random start ends far behind one from words. Does that show that words are a better start?
#
# <details><summary>Answer</summary>
#
# No. A standard normal vector is far longer than an embedding, and AdamW moves every element by about the rate a step,
# whatever its size: it needs a higher rate. Random vectors as short as embeddings end much nearer to words.
#
# </details>
#
# **4.** A prefix is trained through an MLP. What is trained, and what is stored?
#
# <details><summary>Answer</summary>
#
# More is trained than is stored: the smaller matrix and the MLP; afterwards the MLP is thrown away and the keys and
# values are kept, as many numbers as without it.
#
# </details>
#
# **5.** One virtual token trains 128 numbers. Why does training it not take little memory?
#
# <details><summary>Answer</summary>
#
# The gradient must travel back through every layer to reach the input, so most activations of the model are kept.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("06.1", value)`, or at the terminal with
# `minipeft exercise 06.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 06.2 FILE.py`.
#
# **06.1 A prefix of a larger model.** Llama 3 8B has 32 layers of width 4096, and 32 query heads of 128 channels that
# share 8 key heads. How many numbers does a prefix of 20 virtual tokens train?
#
# **06.2 Positions.** Write `position_ids(mask, p)` for a batch that is padded on the left, `mask [B, T]`, behind `p`
# virtual tokens, which have the positions 0 to p - 1: the positions of the real tokens, as if each row were alone.
# (Padding may have any.)
#
# **06.3 A prefix of zeros.** A prefix of zeros (`init_weights="zero"`) is not nothing: attention still spends weight on
# it. Let all scores be equal, 20 virtual tokens with values of zero stand in front, and a token see 60 real ones. By
# which factor is the output of attention multiplied? (Then show that such a prefix changes the logits.)
#
# Projects, with no answer written down:
#
# - **Still words?** Take the trained vectors of "words" and find the vocabulary's nearest embedding of each, by cosine.
#   Are they still words? Replace them by those words: how much of the gain is lost?
# - **How many?** Train prompts of 1, 5, 20 and 100 tokens. Where does the gain end, and what does each token of it cost
#   in context?
#
# <details><summary>Solution of 06.1</summary>
#
# $2 L p$ times the numbers of the key heads.
#
# ```python
# check("06.1", 2 * 32 * 20 * 8 * 128)
# ```
#
# </details>
#
# <details><summary>Solution of 06.2</summary>
#
# The number of real tokens so far, from 0 on, behind the virtual ones.
#
# ```python
# check("06.2", lambda mask, p: p + mask.cumsum(axis=1) - 1)
# ```
#
# </details>
#
# <details><summary>Solution of 06.3</summary>
#
# The weights are 1/80 each, and 60 of them meet a value.
#
# ```python
# check("06.3", 60 / (20 + 60))
# ```
#
# </details>
