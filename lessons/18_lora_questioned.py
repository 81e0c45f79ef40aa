# %% [markdown]
# # Lesson 18 · LoRA questioned: which rank, which layers, which rate, and is it as good?
#
# Lesson 4 built LoRA, and chose $r = 8$, $\alpha = 16$ and all layers without a reason. This lesson asks for the
# reasons: is the update of low rank, what do rank, layers, $\alpha$ and the learning rate do, does LoRA lose to full
# fine-tuning, and what do its variants change (rsLoRA, DoRA, PiSSA, OLoRA)?
#
# You need Lesson 4, and of Lesson 3 "The league". Reading takes about 25 minutes (200 words or 25 lines of code a
# minute, up to the quiz). Run it with `python lessons/18_lora_questioned.py` (half a minute on two cores), or open it
# as a notebook. Where a line begins with **Predict**, write down your answer; the next cell computes it.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import ranks

import minipeft as mp
from minipeft import diagrams
from minipeft.backend import asarray, one_blas_thread, to_numpy
from minipeft.claims import data, intrinsic_dimension
from minipeft.claims.comparison import KEYS, compare
from minipeft.claims.league import ALPHAS, MIDDLE, RANKS, TARGETS, league
from minipeft.claims.protocol import finder, report, search
from minipeft.claims.standings import so_far
from minipeft.files import read_json, write_json

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
if REDUCED:
    print("REDUCED SETTING: 3 steps of 2 verses for 20 of 12, and 4 held-out verses for 64, so section 1's shares say nothing.\n")

# %% [markdown]
# ## 1 · Is the update of low rank?
#
# LoRA's change of a matrix has rank $r$ at most. The paper's reason is a conjecture: "the change in weights during
# model adaptation also has a low 'intrinsic rank'" (Hu et al. 2021, section 1). It goes back to the **intrinsic
# dimension** (Li et al. 2018, arXiv:1804.08838): how many numbers must be free for a task to be learned? Let $D$
# weights $w$ start at $w_0$ and move only with $d$ trained numbers $z$, through a random, fixed matrix $P$:
#
# $$w = w_0 + P z, \qquad P\ [D, d] .$$
#
# The plainest task has 1,000 weights, $w_0 = 0$, and three examples, the rows of $X$, with right answers $t$: $Xw = t$.
#
# **Predict:** for which $d$ does training in $d$ random directions reach loss 0?

# %%
rng = np.random.default_rng(0)
X, t = rng.standard_normal((3, 1000)), rng.standard_normal(3)
for d in (1, 2, 3, 4, 10):
    XP = X @ rng.standard_normal((1000, d))
    z = np.linalg.lstsq(XP, t)[0]  # the best z
    loss = ((XP @ z - t) ** 2).sum() / (t**2).sum()
    print(f"d = {d:2d}: least loss {loss:.3f} of that of w = 0")
    assert (loss < 1e-20) == (d >= 3)

# %% [markdown]
# From three on. Each example is an equation, so in this linear task the number of independent examples counts, not that
# of the weights. For pretrained language models Aghajanyan et al. (2020, arXiv:2012.13255) measured $d_{90}$, the
# smallest $d$ that reaches 90 % of full fine-tuning's result. Pretraining lowers it, and larger models tend to have a
# *lower* one.
#
# Low dimension is not low rank: a single column of $P$, written as a matrix, has full rank. So look at a full
# fine-tune: 20 steps on `rewrite`, the task of Lesson 3. The change $\Delta W$ of each of the 42 matrices is a sum of
# matrices of rank 1, *directions* for short, and the **singular values** $\sigma_1 \ge \sigma_2 \ge \dots$ are their
# sizes. The **energy** of $\Delta W$, $\sum \sigma_i^2$, is the sum of its squared elements. Ask how much of it the $r$
# strongest directions hold,
#
# $$E_r = \frac{\sum_{i \le r} \sigma_i^2}{\sum_i \sigma_i^2} ,$$
#
# beside the same for a random matrix of the same shape. With $E_8 = 1$, LoRA of rank 8 could copy $\Delta W$.
#
# **Predict:** how much of the energy do the 8 strongest of the 128 directions (of $k$ and $v$: 64) hold, and how much
# in a random matrix?

# %%
STEPS, SIZE = (3, 2) if REDUCED else (20, 12)
RANK = [1, 2, 4, 8, 16, 32, 64, 128]
base, tokenizer = mp.load_base()
originals = dict(base.named_parameters())
train_set = data.drawn("rewrite", STEPS * SIZE, seed=0)
first_batch = mp.train.collate(train_set[:SIZE], tokenizer.pad_token_id).arguments
held_out = data.encode(data.asked("rewrite", "validation", 4 if REDUCED else 64))


def loss_of(model):
    """The held-out loss of the task, in nats per token."""
    return mp.train.evaluate(model, held_out, batch_size=32, pad_token_id=tokenizer.pad_token_id)


def svd(matrix):
    """U, s, Vt with matrix = U diag(s) Vt."""
    with one_blas_thread():  # thousands of tiny products: to wake a second thread for each takes far longer
        return np.linalg.svd(to_numpy(matrix), full_matrices=False)


def energy(sigma):
    """[E_r for r in RANK]; beyond the smaller side of the matrix it is 1."""
    held = np.cumsum(sigma**2) / np.sum(sigma**2)
    return [held[min(r, len(held)) - 1] for r in RANK]


tuned = base.copy()
arguments = mp.TrainingArguments(learning_rate=1e-3, max_steps=STEPS, per_device_train_batch_size=SIZE, warmup_steps=3, progress=False)
mp.Trainer(tuned, train_set, args=arguments).train()
updates = {name: svd(p.data - originals[name].data) for name, p in tuned.named_parameters() if "_proj" in name}
parts = {"attention": "self_attn", "MLP": "mlp"}
spectra = {group: np.mean([energy(s) for name, (_, s, _) in updates.items() if part in name], axis=0) for group, part in parts.items()}
noise = np.random.default_rng(0)
chance = {
    group: np.mean([energy(svd(noise.standard_normal(p.shape))[1]) for name, p in originals.items() if part in name], axis=0)
    for group, part in parts.items()
}

# %% [markdown]
# And what are those directions *worth*? Cut every $\Delta W$ down to its first $r$ directions, put that on the base
# (without norms and embeddings), and measure how much of the run's gain is still there. Then the opposite: throw away
# the first 8 alone.

# %%
def cut(directions):
    """The base plus the given singular directions (a slice) of each update."""
    model = base.copy()
    for name, p in model.named_parameters():
        if name in updates:
            U, s, Vt = updates[name]
            p.data += asarray((U[:, directions] * s[directions]) @ Vt[directions])
    return model


start, end = loss_of(base), loss_of(tuned)
worth = {r: (start - loss_of(cut(slice(0, r)))) / (start - end) for r in ([8] if REDUCED else RANK)}
rest = (start - loss_of(cut(slice(8, None)))) / (start - end)
print(f"held-out loss: base {start:.3f}, full fine-tune {end:.3f}")
ranks.print_update(RANK, spectra, chance, worth)
print(f"all but the first 8: {1 - spectra['MLP'][3]:.0%} of the MLP's energy, {rest:.0%} of the gain")
if not REDUCED:
    at = RANK.index(8)
    assert all(spectra[g][at] > 2.5 * chance[g][at] for g in spectra), "far from random"
    assert 0.4 < spectra["MLP"][at] < 0.6 and spectra["MLP"][RANK.index(32)] < 0.8 < 0.9 < spectra["attention"][RANK.index(32)]
    assert ranks.beside_noise(updates, "self_attn") < 0.5 < 0.6 < ranks.beside_noise(updates, "mlp") < 0.8, "far from 8, and from 32"
    assert worth[8] > 0.95 and worth[128] - worth[8] < 0.05 and 0 < rest < 0.5
lora_3 = next(row for row in intrinsic_dimension.EXPERIMENT.rows() if row["start"] == "base" and not row["d"])["spectra"]  # by seed
mlps = [np.median([one["rank"] / one["noise"] for path, one in found.items() if "mlp" in path]) for found in lora_3]
print(f"lora-3's runs, the median matrix of mlp: {min(mlps):.2f} to {max(mlps):.2f} of noise's rank")
assert (len(lora_3[0]), sum("self_attn" in path for path in lora_3[0])) == (43, 24) and max(mlps) < 0.5

# %%
ranks.update_picture(RANK, spectra, chance, worth).savefig(OUT / "18_lora_questioned_update.png", dpi=130)

# %% [markdown]
# In the MLPs the 8 strongest hold about half, more than 2.5 times a random matrix's share, and 32 of 128 leave out more
# than a fifth. So in this run (one seed, 20 steps of Adam) the conjecture does not hold to the letter in the MLPs:
# their update is no matrix of low rank. Attention's is nearer to one: 32 directions hold over nine tenths (in noise,
# over seven tenths). (How much of the rank is Adam's, or noise of the batches, is not measured. Biderman et al. 2024,
# arXiv:2405.09673, find ranks 10 to 100 times those that LoRA is usually given.) What is low is the rank of a part that
# *suffices*: the first 8 directions of each matrix keep over 95 % of the gain. The others add nearly nothing to these,
# though alone they bring a part of the gain: gains do not add up as energies do.
#
# The verdict is on tuned runs under five seeds, on `source`, and on the dimension, too: its d90 brings 90 % of what
# full fine-tuning *gains*, and is clearly larger from random weights. Its *squared norm* is the energy. Three things
# are called low: d90, if below a hundredth of the weights (it is about a thousandth); the rank for 90 % of the gain, if
# 16 or less; the rank for 90 % of the energy, if less than half of noise's in the median matrix. By the third,
# attention above is low (22 directions, noise 54), and the MLPs are not (64, noise 93). Of the verdict's 43 matrices 24
# are attention's, but in its runs the MLPs' own median is low, too (0.35 to 0.41 of noise's rank). Its cut keeps the
# tuned norms, and cuts the embedding, too.

# %% [markdown]
# > `lora-3` updates of fine-tuning have a low intrinsic dimension: **holds**. The update is of low dimension by random
# > subspaces, the rank that the task needs and the rank that holds the squared norm: d90 is 1,237 [842, 1,819] of
# > 1,443,456 from the base, 26,884 [3,013, 239,868] from random weights; in the mean the 4.7 strongest directions of
# > each update have 90 % of the gain; 90 % of the squared norm needs 35% of the rank that noise needs. (5 seeds, 768
# > test items)

# %% [markdown]
# ## 2 · Which rank?
#
# If few directions suffice, a higher rank buys little, and it costs parameters in proportion. On query and value of
# GPT-3 Hu et al. (2021, section 7.2) find $r = 1$ about as good as 64. Dettmers et al. (2023, arXiv:2305.14314,
# appendix A) see no effect of the rank once all layers are adapted. But a comparison of ranks at one rate is easily one
# of rates. **rsLoRA** (Kalajdzievski 2023, arXiv:2312.03732) divides $\alpha$ by $\sqrt r$ in place of $r$. How large
# is the first step in $W$ under both rules with $\alpha = 16$, and under $1/r$ with the league's $\alpha = 2r$?

# %%
def moved(model, rule=mp.optim.AdamW, rate=1e-4):
    """Root mean square of what the first step moves an element of the adapted matrices by, in units of the rate."""
    model.loss(**first_batch).backward()
    rule(model.parameters(), lr=rate, weight_decay=0.0).step()
    after = model if type(model) is type(base) else model.merge_and_unload()
    moves = [to_numpy(p.data - originals[name].data) for name, p in after.named_parameters() if "_proj" in name]
    return np.sqrt(np.mean(np.concatenate([move.ravel() for move in moves]) ** 2)) / rate


def adapted(r=8, alpha=16, **options):
    return mp.get_peft_model(base, mp.LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **options))


TRIED = [1, 4, 16, 64]
SCALINGS = {"alpha = 16": {"alpha": 16}, "rsLoRA, alpha = 16": {"alpha": 16, "use_rslora": True}, "alpha = 2 r": {}}
steps_in_w = {label: [moved(adapted(**{"r": r, "alpha": 2 * r} | options)) for r in TRIED] for label, options in SCALINGS.items()}
print("a weight moves in the first step by, in units of the rate (full fine-tuning: 1)")
print(" " * 20 + "".join(f"   r = {r:2d}" for r in TRIED))
for label, sizes in steps_in_w.items():
    print(f"{label:20s}" + "".join(f"{size:9.2f}" for size in sizes))
growth = {label: np.log2(sizes[-1] / sizes[0]) / np.log2(64) for label, sizes in steps_in_w.items()}
print("grows as r to the power of:", ", ".join(f"{power:+.2f} ({label})" for label, power in growth.items()))
assert all(abs(power - wanted) < 0.1 for power, wanted in zip(growth.values(), (-0.5, 0, 0.5)))

# %%
ranks.steps_picture(TRIED, steps_in_w).savefig(OUT / "18_lora_questioned_steps.png", dpi=130)

# %% [markdown]
# $B$ first moves by $\Delta B$. The elements of $\Delta B\, A$ are sums of $r$ terms of either sign, so they grow as
# $\sqrt r$. The factor $1/r$ makes this $1/\sqrt r$, rsLoRA's $1/\sqrt r$ makes it 1, and the league's factor, 2 at
# every rank, leaves $\sqrt r$. Lesson 4 measured the first change of the *loss*, where the terms all have one sign and
# grow as $r$: there $1/r$ leaves 1. So over the ranks rsLoRA keeps the step in $W$, $1/r$ at a fixed $\alpha$ keeps the
# change of the loss, and neither keeps both: a rate found at one rank need not fit another. The league tunes rate,
# epochs and batch size for each rank anew:
#
# **Predict:** with $\alpha = 2r$, how should the best rates of rank 1 and of rank 64 compare?

# %%
print(so_far(RANKS.values()))
behind = ranks.beside(RANKS.values(), "lora-r32")
for task, (one, *_, most) in ranks.rates(RANKS.values()).items():
    print(f"{task}: rank 1's best rate is {one / most:g} times rank 64's")
    assert 1 < one / most < (8 * 64) ** 0.5, "nearer to 8 than to 64"
assert all(found.clearly_worse for found in behind["rewrite"].values())
assert not any(found.clearly_worse or found.clearly_better for found in behind["source"].values())

# %% [markdown]
# At one rate, rank 64's first step in $W$ is about $\sqrt{64} = 8$ times as long as rank 1's (the third row), and, as
# Lesson 4 argues, its change of the loss about 64 times as large. Tuned, its rate is an eighth of rank 1's on `rewrite`
# and a sixteenth on `source`: nearer to an equal step than to an equal change of the loss. (The search halves and
# doubles, under one seed, and tunes epochs and batch as well.)
#
# By the twelve intervals, which hold together 19 times in 20, rank 32 is ahead of every other on `rewrite`: of 1, 2 and
# 4 by 0.02 to 0.10 nats (from the lowest end of an interval to the highest), of 8, 16 and 64 by 0.04 at most. So there
# a higher rank does buy something: that 8 directions of a finished update suffice does not say that training in 8 finds
# them. On `source` no rank, not even 1, is clearly better or worse than 32 in right choices. But rank 1's `cloze` falls
# there by 19 ± 3 points, rank 32's by 9 ± 3. (Rank 1 was tuned to the highest rate. The verdict compares the best on
# validation of the ranks from 8 on with the best of 1, 2, 4.)

# %% [markdown]
# > `lora-2` rank is typically 8 to 64: **holds if**. Lora-r32 beside lora-r2, rewrite, 500 examples: better (+0.026
# > [+0.020, +0.033]); lora beside lora-r4, source, 500 examples: undecided (+0.016 [-0.005, +0.037]), not told. (5
# > seeds, 512 test items)

# %% [markdown]
# ## 3 · Which layers?
#
# The paper (section 7.1, Table 5) finds on GPT-3 that $q$ alone is worse than $q$ and $v$ or all four matrices of
# attention with as many parameters; it left the MLPs alone. The QLoRA paper (Dettmers et al. 2023, section 4) finds
# that all linear layers are needed to match full fine-tuning. Schulman et al. (2025, thinkingmachines.ai/blog/lora)
# find attention alone worse than the MLPs even with as many parameters.
#
# **Predict:** rank 8 on all seven matrices of each of the six blocks trains 116,736 numbers. Which rank on $q$ and $v$
# has as many?

# %%
def trained(r, targets="all-linear"):
    return mp.get_peft_model(base, mp.LoraConfig(r=r, target_modules=targets)).get_nb_trainable_parameters()[0]


q_and_v = ["q_proj", "v_proj"]
on = {"all-linear, r = 8": trained(8), "q and v, r = 8": trained(8, q_and_v), "q and v, r = 43": trained(43, q_and_v)}
print(*(f"{name}: {n:,}" for name, n in on.items()), sep="\n")
assert 0 < on["all-linear, r = 8"] - on["q and v, r = 43"] < on["q and v, r = 8"] / 8

# %% [markdown]
# Rank 43, nearly, as parameters grow in proportion. So the league has $q$ and $v$ twice, as `lora-qv` (rank 8) and
# `lora-qv-r43`; at rank 8, `lora` is all layers, `lora-qkvo` the four of attention, `lora-mlp` gate, up and down:

# %%
layers = [*TARGETS[:-1], "lora-qv", "lora-qv-r43"]
print(so_far([*layers, "lora"]))
find, BESIDE = finder(league([*layers, "lora"], MIDDLE).rows()), ranks.beside(layers, "lora")
mlp, qkvo = ([report(find, search(task, m, 500), key) for task, key in KEYS.items()] for m in ("lora-mlp", "lora-qkvo"))
for task, key, a, b in zip(KEYS, KEYS.values(), qkvo, mlp):
    print(f"{task}: attention's four better than the MLPs by {compare(a, b, key).interval}")
q_v, every = (report(find, search("source", m, 500), "cloze") for m in ("lora-qv", "lora"))
print(f"source: q and v lose less in cloze by {compare(q_v, every, 'cloze').interval}")
assert compare(qkvo[0], mlp[0], "nll").better.low > 0.13 and compare(q_v, every, "cloze").clearly_worse
assert all(BESIDE["rewrite"][m].clearly_worse for m in ("lora-q", "lora-v", "lora-mlp", "lora-qv"))
assert BESIDE["rewrite"]["lora-qkvo"].clearly_better and not BESIDE["rewrite"]["lora-qv-r43"].clearly_worse
assert {m for m, found in BESIDE["source"].items() if found.word == "worse"} == {"lora-q", "lora-qv"}
assert all(found.word == "undecided" for m, found in BESIDE["source"].items() if m not in ("lora-q", "lora-qv"))

# %% [markdown]
# On `rewrite`, $q$, $v$ and the MLPs, each alone, are behind all layers by 0.08 to 0.15 nats (ends of intervals,
# again). The MLPs have more numbers to train than the four matrices of attention, and lose to them there by 0.13 nats
# at least: Schulman et al. found the opposite on larger models. On `source` the two are equal. Attention's four
# matrices are even ahead of all seven on `rewrite`, though perhaps by next to nothing. (On `rewrite` all choices within
# attention were best after four epochs, all layers after two.)
#
# $q$ and $v$ at rank 8, with less than a fifth of the numbers, are behind all layers on `rewrite`, by 0.029 at most; at
# rank 43, with as many numbers, the interval has both signs. On `source` they are behind, too, by 0.2 to 2.7 of 100
# sentences, and so is $q$ alone, by 1.2 to 7.7; the other four intervals have both signs (by single ones of 95 % three
# of them are behind, rank 43 among them). And they forget more there, at four times the rate: 13 ± 4 points of `cloze`,
# all layers 7 ± 2.
#
# `lora-7` asks whether $q$ and $v$ are clearly better than their rival (all layers, which of rank 8 have the lowest
# loss on validation, though on test attention's four are ahead on `rewrite`), `lora-8` whether all layers are clearly
# better than $q$ and $v$. *Worse* is a no, and so is *equal*, within ±0.02. *Holds if* takes one yes, in an interval
# wide enough for all four to hold together. `lora-7` has none, so it *does not hold here*.

# %% [markdown]
# > `lora-7` usually on the query and value projections, empirically the most effective: **does not hold here**. Lora-qv
# > beside lora, rewrite, 500 examples: worse (-0.015 [-0.022, -0.008]); lora-qv beside lora, source, 500 examples:
# > worse (-0.014 [-0.023, -0.005]). Lora-qv-r43 beside lora, rewrite, 500 examples: equal (+0.008 [-0.003, +0.019]);
# > lora-qv-r43 beside lora, source, 500 examples: worse (-0.026 [-0.039, -0.013]). (5 seeds, 512 test items)
#
# > `lora-8` all linear layers: more parameters and better: **holds if**. Of 4 comparisons 3 are as stated and 1 is not:
# >
# > - lora beside lora-qv, rewrite, 500 examples: better (+0.015 [+0.008, +0.022]).
# > - lora beside lora-qv, source, 500 examples: better (+0.014 [+0.005, +0.023]).
# > - lora beside lora-qv-r43, rewrite, 500 examples: equal (-0.008 [-0.019, +0.003]).
# > - lora beside lora-qv-r43, source, 500 examples: better (+0.026 [+0.013, +0.039]).
# >
# > (5 seeds, 512 test items)

# %% [markdown]
# ## 4 · Which α, and which rate?
#
# In the first step $\alpha$ and the rate do the same. Only $B$ moves, and Adam's steps do not depend on the size of the
# gradient, so the step in $W$ is in proportion to both. (Under plain SGD it grows with $\alpha^2$, as the gradient of
# $B$ has the factor $\frac{\alpha}{r}$, too.) Afterwards $A$ moves as well. **LoRA+** (Hayou et al. 2024,
# arXiv:2402.12354) gives $A$ and $B$ two rates. Adam moves each element by about the rate; an output of $A$ sums over a
# layer's width, one of $B$ over only $r$ numbers, so where $r$ is far smaller $B$ bears a higher rate.
#
# **Predict:** is LoRA+, with four times the rate for $B$, another method than LoRA with four times $\alpha$? Is rsLoRA,
# with its $\alpha / \sqrt r$?

# %%
for rule, rate, power in ((mp.optim.AdamW, 1e-4, 1), (mp.optim.SGD, 1.0, 2)):
    at_4, *larger = (moved(adapted(8, a), rule, rate) for a in (4, 16, 64))
    print(f"first step of {rule.__name__} at alpha 16 and 64, in units of that at 4:", *(f"{size / at_4:.1f}" for size in larger))
    assert np.allclose(np.array(larger) / at_4, [4**power, 16**power], rtol=0.02)
ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (4, 32))
rs = adapted(16, 16, use_rslora=True, init_lora_weights=False)
plain = adapted(16, 64, init_lora_weights=False)  # the same random A and B


def losses_of(alpha, rate, ratio):
    """The first batch's loss before each of five steps of AdamW on it; B's rate is `ratio` times A's."""
    model, losses = adapted(8, alpha), []
    optimizer = mp.optim.AdamW(mp.optim.loraplus_groups(model, rate, ratio), weight_decay=0.0)
    for _ in range(5):
        losses.append(model.loss(**first_batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


trials = {"alpha = 64": (64, 3e-3, 1), "LoRA+, B's rate by 4": (16, 3e-3, 4), "both rates by 4": (16, 12e-3, 1)}
paths = {name: losses_of(*how) for name, how in trials.items()}
for name, path in paths.items():
    print(f"{name:21s}", *(f"{loss:.4f}" for loss in path))
assert np.allclose(paths["alpha = 64"], paths["LoRA+, B's rate by 4"], atol=1e-3)
assert not np.allclose(paths["alpha = 64"], paths["both rates by 4"], atol=1e-2)
assert np.array_equal(rs(ids).numpy(), plain(ids).numpy()), "bit for bit"

# %% [markdown]
# LoRA+ is LoRA with another $\alpha$, up to Adam's $\epsilon$, and without weight decay and clipping: in
# $\frac{\alpha}{r} BA$ four times $\alpha$ is four times $B$, $B$ starts at zero, and Adam moves it in proportion to
# its rate. So the product is the same, and with it $A$'s gradient: $\alpha$ and $B$'s rate are one handle, and $A$'s
# rate is the other. At one rank rsLoRA is LoRA with another $\alpha$, too. It is a rule for *carrying a rate over* from
# one rank to another. Its paper argues that with $1/r$ a high rank learns too slowly; Schulman et al. (2025) find the
# best rate under $1/r$ nearly the same at all ranks. The league, at $\alpha = 2r$, does not decide this.
#
# **Predict:** the rate tuned anew, what does an $\alpha$ of 64 cost beside 4, at rank 8, and which rates are chosen?

# %%
print(so_far(["lora", *ALPHAS]))
for task, rates in ranks.rates(["lora-alpha4", "lora", "lora-alpha64"]).items():
    print(f"{task}: at alpha 4, 16 and 64 the rates are {rates}, at 4 that of 64 times {rates[0] / rates[2]:g}")
    assert rates == sorted(rates, reverse=True) and 1 < rates[0] / rates[2] < 16

# %% [markdown]
# For 16 times $\alpha$ the rate is an eighth on `rewrite` and a quarter on `source`, not the sixteenth of an equal
# first step. That may be luck: the search halves and doubles, under one seed, and batches (`rewrite`) or epochs
# (`source`) differ, too, 4 and 2. Tuned, $\alpha = 64$ costs 0.011 nats beside 4 on `rewrite` and 0.010 of the answers
# on `source`, both clearly. The verdict compares, for each hyperparameter, the best value on validation with the worst.
# Its limit is 0.02: "better, not told" is clearly better, perhaps by less.

# %% [markdown]
# > `lora-13` adds hyperparameters (r, alpha, which layers): **holds if**. Of 6 comparisons 3 are as stated, 2 are not
# > and 1 is not told:
# >
# > - lora-r32 beside lora-r1, rank, rewrite, 500 examples: better (+0.075 [+0.061, +0.088]).
# > - lora beside lora-r16, rank, source, 500 examples: better (+0.021 [+0.008, +0.035]), not told.
# > - lora beside lora-v, layers, rewrite, 500 examples: better (+0.132 [+0.120, +0.144]).
# > - lora beside lora-q, layers, source, 500 examples: better (+0.045 [+0.029, +0.060]).
# > - lora-alpha4 beside lora-alpha64, alpha, rewrite, 500 examples: better, by less than 0.02 (+0.011 [+0.007,
# >   +0.014]).
# > - lora-alpha4 beside lora-alpha64, alpha, source, 500 examples: better, by less than 0.02 (+0.010 [+0.001, +0.019]).
# >
# > (5 seeds, 512 test items)

# %% [markdown]
# ## 5 · LoRA against full fine-tuning
#
# Hu et al. (2021, Table 4) find LoRA on GPT-3 as good as full fine-tuning or better. Biderman et al. (2024) find that
# it learns less on code and mathematics, and forgets less. Schulman et al. (2025) compare both at their best rates,
# LoRA's about 10 times higher. They find them alike on data as small as post-training's, and LoRA behind where the data
# exceed what its parameters can hold. At one rate for both, LoRA's first step is smaller:

# %%
sizes = {"full": moved(base.copy()), "LoRA, r = 8, alpha = 16": moved(adapted())}
print("first step in W, in units of the rate:", ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()))
assert sizes["LoRA, r = 8, alpha = 16"] < 0.5 < sizes["full"]

# %% [markdown]
# With everything tuned, on 50, 500 and 5,000 examples, the 5,000 seen at most four times:
#
# **Predict:** at which of the three sizes does rank 8 fall behind full fine-tuning?

# %%
for examples in (50, 500, 5000):
    print(so_far(["full", "lora"], examples), end="\n\n")
AGAINST = ranks.beside(RANKS.values(), "full")
print(*(f"{m} beside full, {task}: {found.word} ({found.interval})" for task, of in AGAINST.items() for m, found in of.items()), sep="\n")
assert [m for m, found in AGAINST["rewrite"].items() if found.clearly_better] == ["lora-r2", "lora", "lora-r16", "lora-r32", "lora-r64"]
assert not any(found.clearly_worse for of in AGAINST.values() for found in of.values()), "at no rank, on neither task"
assert {found.word for found in AGAINST["source"].values()} == {"undecided"}
assert [m for m in RANKS.values() if all(of[m].better.low > -0.02 for of in AGAINST.values())] == ["lora"]
assert all(found.better.low < -0.025 for m, found in AGAINST["source"].items() if m != "lora")

# %% [markdown]
# On `rewrite` LoRA's loss is below full fine-tuning's with 50 and 500 examples, and above it with 5,000, by 0.08 nats:
# there LoRA falls behind. It took four epochs, the most allowed; at its rate and batch eight are no better on
# validation. Whether the rank limits it, Schulman et al.'s reason, is open: there no other rank was run. On `source` no
# size shows LoRA clearly behind, and all three intervals lie above -0.02. So in five of six cases what LoRA may lose is
# below 0.02, the verdict's limit. LoRA's tuned rate is 1.5 to 12 times full fine-tuning's.
#
# With 500 there are ranks 1 to 64, and by fourteen intervals that hold together none is clearly behind full
# fine-tuning. On `rewrite` rank 2 and those from 8 on are ahead; of 1 and 4 it is undecided (by single intervals of 95
# % rank 1 is behind, 4 ahead). On `source` all seven are undecided. Only rank 8 is shown to lose less than 0.02 on
# both: of right answers each of the others may lose 0.027 or more.
#
# Equal losses are not equal weights. Shuttleworth et al. (2024, arXiv:2410.21228) find strong singular directions in
# LoRA's merged weights that resemble none of the base's (*intruder dimensions*; in full fine-tuning's they find none),
# and that these cause forgetting (Lesson 15).

# %% [markdown]
# > `lora-12` a slight loss of quality against full fine-tuning, usually negligible: **holds if**. Of 6 comparisons 5
# > are as stated and 1 is not:
# >
# > - lora beside full, rewrite, 50 examples: better (+0.032 [+0.017, +0.046]).
# > - lora beside full, rewrite, 500 examples: better (+0.041 [+0.027, +0.055]).
# > - lora beside full, rewrite, 5000 examples: worse (-0.082 [-0.095, -0.070]).
# > - lora beside full, source, 50 examples: undecided (+0.061 [-0.006, +0.129]).
# > - lora beside full, source, 500 examples: better (+0.012 [+0.000, +0.023]).
# > - lora beside full, source, 5000 examples: equal (-0.001 [-0.012, +0.010]).
# >
# > (5 seeds, 512 test items)

# %% [markdown]
# ## 6 · Variants: another form, another start
#
# **DoRA** (Liu et al. 2024, arXiv:2402.09353) splits each row of $W$, the weights of one output, into its length $m$
# and its direction. LoRA's update then only turns the row; $m$, one more trained number a row, is the length. The
# authors' reason: in their full fine-tunes lengths tend to change less where directions change more, and in LoRA the
# two grow together.

# %%
diagrams.dora().savefig(OUT / "18_lora_questioned_dora.png")

# %% [markdown]
# Row by row:
#
# $$W' = m \cdot \frac{W + \frac{\alpha}{r} BA}{\lVert W + \frac{\alpha}{r} BA \rVert}, \qquad
#   m = \lVert W \rVert \text{ at the start}.$$
#
# Backward takes the norm below the line as a constant, which saves memory. (So $BA$ is pushed along the row, too; the
# division takes that out again.)
#
# **Predict:** a row is $(3, 4)$, and LoRA's change $(-3, 0)$. What is the row in LoRA, and what in DoRA with $m$ as at
# the start?

# %%
W, change = np.array([[3.0, 4.0]]), np.array([[-3.0, 0.0]])
m, turned = np.linalg.norm(W, axis=1, keepdims=True), W + change
print(f"m = {m[0, 0]:g}; LoRA: {turned[0]}, of length {np.linalg.norm(turned):g}; DoRA: {(m * turned / np.linalg.norm(turned))[0]}")
place = "model.layers.2.mlp.down_proj"
dora = adapted(use_dora=True, init_lora_weights=False)  # B random, so that there is something to turn
part = dora.layers[place].adapters["default"]
W, delta, m = to_numpy(originals[f"{place}.weight"].data), to_numpy(part.delta_weight()), part.lora_magnitude_vector.numpy()
by_hand = m[:, None] * (W + delta) / np.linalg.norm(W + delta, axis=1, keepdims=True)
library = dict(dora.merge_and_unload().named_parameters())[f"{place}.weight"].numpy()
assert np.abs(by_hand - library).max() < 1e-5
m = adapted(use_dora=True).layers[place].adapters["default"].lora_magnitude_vector.numpy()  # the usual start, B = 0
assert np.allclose(m, np.linalg.norm(W, axis=1), rtol=1e-5)

# %% [markdown]
# LoRA's row is shorter, DoRA's is not. Unmerged, each pass computes all row norms.
#
# **PiSSA** (Meng et al. 2024, arXiv:2404.02948) and **OLoRA** (Büyükakyüz 2024, arXiv:2406.01775) keep LoRA's form and
# change its start. Both papers report faster learning; PiSSA's reason is that the strongest part of $W$ is trained in
# place of noise and zero. $A$ and $B$ start from $W$, and what they start as is subtracted, so that the model still
# starts as the base:
#
# $$W' = \Big(W - \frac{\alpha}{r} B_0 A_0\Big) + \frac{\alpha}{r} B A .$$
#
# In PiSSA $\frac{\alpha}{r} B_0 A_0$ are the $r$ strongest directions of $W$, from its singular values; in OLoRA $B_0$
# is the first $r$ columns of $Q$ and $A_0$ the first $r$ rows of $R$, where $W = QR$ and $Q$'s columns are
# perpendicular and of length 1.
#
# **Predict:** in LoRA only $B$ moves in the first step. And in these two?

# %%
print("            start of the logits: off the base's     matrices moved in step 1     first step in W / rate")
for name, options in {
    "LoRA": {},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
}.items():
    model = adapted(**options)
    off, size = np.abs(model(ids).numpy() - base(ids).numpy()).max(), moved(model)
    both = sum(f".lora_{factor}" in path for path, p in model.named_parameters() for factor in "AB" if p.requires_grad)
    still = sum(".lora_A" in path or ".lora_B" in path for path in model.unmoved())
    print(f"  {name:10s} {off:38.1e} {both - still:21d} of {both} {size:26.2f}")
    assert off < 1e-3 and (both - still, size > 0.5) == ((42, False) if name in ("LoRA", "DoRA") else (84, True))

svd_of_w = svd(originals[f"{place}.weight"].data)
pissa = adapted(init_lora_weights="pissa").layers[place].adapters["default"]
strongest = (svd_of_w[0][:, :8] * svd_of_w[1][:8]) @ svd_of_w[2][:8]
assert np.abs(2 * pissa.start_B.numpy() @ pissa.start_A.numpy() - strongest).max() < 1e-4, "alpha / r = 2 times B0 A0"

# %% [markdown]
# All 84, as neither factor is zero, and the first step in $W$ is longer: so a comparison at LoRA's rate would be one of
# rates again. Lee et al. (2026, arXiv:2602.04998) tune LoRA and nine variants, the rate among other things, and find
# their best within 1 to 2 % of each other. The league, too, tunes each one's rate, epochs and batch size (500 examples,
# rank 8, $\alpha = 16$).
#
# **Predict:** which of the four ends clearly better than LoRA, and on which task?

# %%
VARIANTS = ("rslora", "dora", "pissa", "olora")
print(so_far(["lora", *VARIANTS]))
varied = ranks.beside(VARIANTS, "lora")
print(*(f"{m} beside lora, {task}: {found.word} ({found.interval})" for task, of in varied.items() for m, found in of.items()), sep="\n")
signs = {task: " ".join(found.sign for found in of.values()) for task, of in varied.items()}
assert signs == {"rewrite": "-= += - -", "source": "= ? ? ="}

# %% [markdown]
# DoRA, on `rewrite`, by 0.010 [0.005, 0.014] nats (0.012 from another start: Lesson 16); on `source` none.
# PiSSA and OLoRA end clearly worse on `rewrite`, by 0.035 [0.013, 0.057] and 0.049 [0.031, 0.068]. On `source` rsLoRA
# and OLoRA are equal to LoRA, DoRA and PiSSA undecided. (All eight intervals hold together 19 times in 20.) On
# `rewrite` rsLoRA, here LoRA with $\alpha=16\sqrt8\approx45$, ends 0.012 [0.009, 0.016] behind LoRA with 16. Whether a
# start learns *faster*, losses at the end do not tell.
#
# ## 7 · Break it
#
# PiSSA's file holds $A$ and $B$; that $B_0 A_0$ is to be subtracted stands in the configuration alone. Lose that line.
# Every shape fits.
#
# **Predict:** the adapter has not been trained for a single step. What is the model?

# %%
folder = OUT / "18_pissa"
adapted(init_lora_weights="pissa").save_pretrained(folder)
losses = {}
for start_option in ("pissa", True):
    options = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", options | {"init_lora_weights": start_option})
    losses[start_option] = loss_of(mp.PeftModel.from_pretrained(base, folder))
print(f"held-out loss: base {start:.3f}, read as PiSSA {losses['pissa']:.3f}, read as LoRA {losses[True]:.3f}")
assert abs(losses["pissa"] - start) < 1e-3 and losses[True] > start + 1

# %% [markdown]
# The model is not the base: the strongest directions of $W$ are there twice. (PEFT can save PiSSA as a plain LoRA of
# rank $2r$: exercise 18.3.)

# %% [markdown]
# ## Quiz
#
# **1.** Is the update of a full fine-tune a matrix of low rank?
#
# <details><summary>Answer</summary>
#
# Not in section 1's run, least in the MLPs: much of the energy lies outside of the 8 strongest directions. But those 8
# keep nearly all of the gain. Of low rank is a part that suffices.
#
# </details>
#
# **2.** A linear model has 1,000 weights, and a task has three examples. How many random directions must be free?
#
# <details><summary>Answer</summary>
#
# Three, if they are drawn at random and the model is linear: each example is one equation.
#
# </details>
#
# **3.** Rank 64 loses to rank 8 at one learning rate and $\alpha = 2r$. What does that show of the rank?
#
# <details><summary>Answer</summary>
#
# Nothing: the first step in $W$ grows with $\sqrt r$, so that the rate may be right for one and too high for the
# other. Each rank needs its own rate.
#
# </details>
#
# **4.** What is rsLoRA at one rank?
#
# <details><summary>Answer</summary>
#
# LoRA with another $\alpha$, $\sqrt r$ times as large (in section 4, with $r = 16$, bit for bit). It differs in how a
# rate carries over from one rank to another.
#
# </details>
#
# **5.** Why do all matrices move in PiSSA's first step, and how can the model yet start as the base?
#
# <details><summary>Answer</summary>
#
# Neither $A$ nor $B$ starts at zero: together they start as a part of $W$. What they start as is subtracted from $W$.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("18.1", value)`, or at the terminal with
# `minipeft exercise 18.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 18.2 FILE.py`.
#
# **18.1 A budget.** LoRA of rank 8 on query and value of LLaMA-7B (both 4096 by 4096) has a number of parameters. Which
# rank on the query alone has as many?
#
# **18.2 DoRA's weight.** Write `dora(W, A, B, m, alpha)`: the weight $W'$ of section 6, for `W [d, k]` and `m [d]`.
#
# **18.3 As plain LoRA.** Write `as_lora(A, B, A0, B0)`: the factors $A$ and $B$, in this order, of a plain LoRA whose
# product is $BA - B_0 A_0$.
#
# **18.4 Carried over.** rsLoRA with $r = 64$ and $\alpha = 16$ is LoRA of which $\alpha$?
#
# Projects, with no answer written down:
#
# - **The same directions?** For one matrix, compare the 8 strongest left singular vectors of a full fine-tune's
#   $\Delta W$ with the columns of LoRA's $B$: how much of each column lies in their span, and how much of a random one
#   would ($8/d$)? Then compare two LoRAs of different seeds with each other (the paper's section 7.2).
# - **A thrifty optimizer.** Full fine-tuning with `optim="sgd"` and `learning_rate=1.0` learns this task too. Is its
#   update of lower rank than Adam's? Look at attention and at the MLPs, and after 5 steps as well as after 20.
#
# <details><summary>Solution of 18.1</summary>
#
# $r (d + k)$ for each matrix: one matrix in place of two has twice the rank.
#
# ```python
# check("18.1", 2 * 8)
# ```
#
# </details>
#
# <details><summary>Solution of 18.2</summary>
#
# The length of each row is a number a row.
#
# ```python
# def dora(W, A, B, m, alpha):
#     V = W + alpha / len(A) * B @ A
#     return m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
#
# check("18.2", dora)
# ```
#
# </details>
#
# <details><summary>Solution of 18.3</summary>
#
# A product of two matrices is a sum over what they share, so strips side by side add their products.
#
# ```python
# def as_lora(A, B, A0, B0):
#     return np.concatenate([A, A0]), np.concatenate([B, -B0], axis=1)
#
# check("18.3", as_lora)
# ```
#
# </details>
#
# <details><summary>Solution of 18.4</summary>
#
# $\alpha' / r = \alpha / \sqrt r$.
#
# ```python
# check("18.4", 16 * np.sqrt(64))
# ```
#
# </details>
