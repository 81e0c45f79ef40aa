# %% [markdown]
# # Lesson 14 · Best practice, measured
#
# "LoRA wants ten times the learning rate." "Warm up for five percent of the steps." "Three epochs are enough." "A few
# good examples beat many bad ones." This lesson tests such advice on two tasks, nearly all of it on one small model.
# Some of it holds in some cases; much these runs cannot decide. What you take along is the way of measuring: each side
# tuned for itself, on validation; several seeds; a test that chose nothing; an interval over seeds and items.
#
# You need Lessons 0 (seeds, intervals, validation), 3 and 4, and the methods' names of 5 to 7. Reading takes about 25
# minutes (200 words or 25 lines of code a minute, up to the quiz). Where a line begins with **Predict**, write down
# your answer. Run it with `python lessons/14_best_practices.py` (about ten seconds), or open it as a notebook. It reads
# the rows of the league (Lesson 3), and 14 more from `lessons/results/14_best_practices.jsonl`. With `--full` it first
# computes what is missing there.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import practice
from experiments.practice import BATCHES, along, searched

import minipeft as mp
from minipeft.accounting import memory_ledger
from minipeft.claims import data, judge, protocol
from minipeft.claims.comparison import CASES, KEYS, Case, compare, in_cases
from minipeft.claims.large import Large
from minipeft.claims.league import MAIN, league
from minipeft.claims.practice import ADVISED, EQUAL_STEPS, HARD, HARDER, LONG, NOISE, REPEATED, SKEWED, WARM
from minipeft.claims.protocol import SEEDS, finder, report, search
from minipeft.claims.searches import Searches
from minipeft.claims.seconds import seconds
from minipeft.claims.statistics import crossed
from minipeft.evaluation.intervals import mean
from minipeft.experiments import shipped
from minipeft.experiments.run import fine_tune
from minipeft.experiments.shipped import Rewriting

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "14_best_practices.jsonl"
if REDUCED:
    print("REDUCED SETTING: the runs computed now take 2 steps, so no number after 'now' says anything. The rows are "
          "those of the full lesson.\n")

if "--full" in sys.argv:
    practice.compute(practice.SEARCHES, RESULTS)
rows = practice.known([*league(MAIN).searches, *Searches.pairs("league", NOISE).searches, *practice.SEARCHES], RESULTS)
find = finder(rows)
missing = protocol.wanted(find, practice.SEARCHES)
assert not missing, f"{len(missing)} runs are missing: --full computes them"

# %% [markdown]
# ## 1 · What is a run, and when is a difference one?
#
# The tasks are the league's (Lesson 3). In `rewrite`, a verse of the King James Bible is to be written in plain
# English, judged by the loss, in nats per token; `source` asks which of three books a sentence is from, judged by the
# share of right answers. A run has a method, 50, 500 or 5,000 examples, a rate (which rises over the first 5 % of the
# steps, and falls to 0 along a cosine), a number of epochs (at most 64, 16 or 4 for these sizes), and a batch size (1
# to 64). Chance enters through the examples that a run gets to see, their order, and where an adapter starts: the
# **seed**.
#
# *Choose* and *report* are kept apart. Rate, epochs and batch size are chosen by the loss on 256 validation records,
# under a seed of its own: the search goes from neighbor to neighbor (twice, or half as much) until none is better by
# more than 0.002. The chosen setting then runs under five other seeds, and is reported on 512 test records (`source`:
# 768). The loss of record $i$ under seed $s$ is $x_{si}$:
#
# $$x_{si} = \mu + \alpha_s + \beta_i + \varepsilon_{si}, \qquad
#   \text{SE}^2 = \frac{MS_\alpha + MS_\beta - MS_\varepsilon}{5 \cdot 512}, \qquad \mu \pm t\,\text{SE} .$$
#
# $\alpha$ is the luck of a seed, $\beta$ that of a record, $\varepsilon$ the rest. $MS_\alpha$, 512 times the variance
# of the seeds' means, is on average $512\,\sigma_\alpha^2 + \sigma_\varepsilon^2$; $MS_\beta$, 5 times that of the
# records' means, is $5\,\sigma_\beta^2 + \sigma_\varepsilon^2$; and $MS_\varepsilon$ is $\sigma_\varepsilon^2$. So the
# fraction is $\sigma_\alpha^2/5 + \sigma_\beta^2/512 + \sigma_\varepsilon^2/(5 \cdot 512)$, the variance of the mean.
# ($t$ is Student's; its degrees of freedom: `claims/statistics.py`.) The interval is of other seeds *and* other
# records, and never narrower than that of the five seeds' means alone, $\pm t\, s / \sqrt 5$ with $t = 2.78$ and their
# standard deviation $s$.
#
# Two settings are compared seed by seed and record by record: $x_{si}$ is then the *difference* of two losses, and what
# both have in common drops out. The run that one compares with is the **control**. It has to be the same in all but the
# thing asked about, and as well tuned; else nobody knows what made the difference.
#
# **Predict:** is a loss uncertain because of the seeds or because of the records? And a difference of two losses?

# %%
full, lora = (report(find, search("rewrite", method, 500)) for method in ("full", "lora"))


def by_seed(values):
    """Means [seeds] of values [seeds, items] in nats per token, or as shares."""
    return values.sum(axis=1) / full.weights.sum()


print(f"full fine-tuning, tuned, 500 examples of rewrite, {len(SEEDS)} seeds: " + ", ".join(f"{loss:.3f}" for loss in by_seed(full.values)))
widths = []  # by the seeds alone, with the records
for name, values in (("its loss", full.values), ("LoRA's minus it", lora.values - full.values)):
    a, b = mean(by_seed(values)), crossed(values, full.weights)
    print(f"{name:16s} {b.value:.3f}: by the seeds alone [{a.low:.3f}, {a.high:.3f}], with the records [{b.low:.3f}, {b.high:.3f}]")
    widths.append((a.high - a.low, b.high - b.low))
assert widths[0][1] > 2 * max(widths[0][0], widths[1][1]) and widths[1][1] < 1.1 * widths[1][0], "the records' luck is common to both"
assert [protocol.epochs_of(case.examples)[1] for case in CASES[:3]] == [64, 16, 4] and protocol.BATCHES == (1, 64)

# %% [markdown]
# The loss depends on the records: with them its interval is about four times as wide as by the seeds alone. That of the
# difference hardly widens, as both runs have the same records. A difference is **clear** where its interval excludes 0
# (where nothing differs, one time in twenty; here are dozens); *equal*, clear or not, where the interval lies within
# 0.02 of 0 (nats or shares, set by hand); if neither, **undecided**.
#
# A statement's rule asks something of each comparison, mostly whether the first way is better. The answer is yes (*as
# stated*), no, or open (*not told*). It is open where the interval contains the limit that the rule asks about, mostly
# 0. Where better is asked, *equal*, even clearly so, is no. Of all its $k$ comparisons, a statement *holds* if all
# answers are yes. It *holds if* one is yes even at the level $1 - 0.05/k$. It *does not hold here* if all are no. Else
# it *cannot be tested here*. In pictures bars are 95 % intervals; lines without are on validation, under one seed.

# %%
def compared(pair):
    """How much better the first of a pair is, on test."""
    key = KEYS[pair.task]
    return compare(report(find, pair.one, key), report(find, pair.other, key), key)


# %% [markdown]
# *Advice: hold out a validation set.* What does one pay who has none? Of the settings of a method that the league's
# search saw, take the one with the lowest *training* loss (the mean over the last quarter of a run), in place of the
# one chosen on validation.
#
# **Predict:** with 50, 500 or 5,000 examples: where does that cost most?

# %%
found = judge("best-8")
price = {n.name.partition("loss, ")[2]: n for n in (found.effect, *found.evidence)}
each = (f"{n.value:+.3f} [{n.low:+.3f}, {n.high:+.3f}] ({case})" for case, n in price.items())
print("\nchosen by the training loss, nats a token more on test:", *each, sep="\n  ")
ways = {m: search("rewrite", m, 50) for m in MAIN}
times = {m: protocol.chosen(find, protocol.Fits(way))[0].rate / protocol.chosen(find, way)[0].rate for m, way in ways.items()}
print("its rate, in that of the one chosen on validation (rewrite, 50):", ", ".join(f"{m} {x:g}" for m, x in times.items()))
assert [round(n.value, 3) for n in price.values() if n.low > 0] == [0.642, 0.055, 0.013]
assert all(n.low < 0 < n.high for n in [*price.values()][3:]) and sorted(times.values())[1::4] == [4, 32]

# %% [markdown]
# It costs most with 50 examples of `rewrite`: 0.64 [0.61, 0.68] nats in the mean of six methods. With five of them the
# lowest training loss is at 4 to 32 times the chosen rate. With 500 it costs 0.055, with 5,000 0.013. On `source` (by
# its loss, too) it is nowhere clear. (Validation led these searches; who follows the training loss may end further
# away.)
#
# `best-8` asks that validation's choice is clearly better, and not *equal*, in each case. The gap, and diverse tests,
# it does not judge.

# %% [markdown]
# > `best-8` hold out a validation set; watch the gap; test on diverse examples: **holds if**. Of 6 comparisons 2 are as
# > stated, 3 are not and 1 is not told:
# >
# > - validation beside training loss, rewrite, 50 examples: better (+0.642 [+0.609, +0.675]).
# > - validation beside training loss, rewrite, 500 examples: better (+0.055 [+0.049, +0.061]).
# > - validation beside training loss, rewrite, 5000 examples: better, by less than 0.02 (+0.013 [+0.010, +0.016]).
# > - validation beside training loss, source, 50 examples: undecided (+0.018 [-0.017, +0.053]), not told.
# > - validation beside training loss, source, 500 examples: equal (+0.001 [-0.001, +0.004]).
# > - validation beside training loss, source, 5000 examples: equal (-0.003 [-0.008, +0.001]).
# >
# > (5 seeds, 512 test items)

# %% [markdown]
# ## 2 · The learning rate
#
# *Advice: LoRA wants about ten times the rate of full fine-tuning* (Schulman et al. 2025,
# thinkingmachines.ai/blog/lora). Where would that come from? Adam's first step moves every trained weight by the rate
# $\eta$. In full fine-tuning these are the entries of $W$. LoRA starts with $B = 0$, so $A$ has no gradient yet: $B$
# moves, and $W$ by $\frac{\alpha}{r} B A$. Each entry of $B A$ is a sum of $r$ terms with either sign, $\pm\eta$ times
# an entry of $A$, which is uniform in $\pm 1/\sqrt k$ for $k$ inputs (Lesson 4, section 4) and so has the root mean
# square $1/\sqrt{3k}$. The root mean square of $W$'s moves is about
#
# $$\frac{\alpha}{r}\, \eta \sqrt{\frac{r}{3k}}, \qquad 0.29\, \eta \text{ for } \alpha = 16,\ r = 8,\ k = 128
#   \text{ as here, and } 0.05\, \eta \text{ for } k = 4096 .$$
#
# **Predict:** by this estimate, what rate must LoRA have here to move $W$ as far as full fine-tuning in the first step?

# %%
base, _ = mp.load_base()
adapted = mp.get_peft_model(base, mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (4, 32))
adapted.loss(ids, ids).backward()
mp.optim.AdamW(adapted.parameters(), lr=1.0, weight_decay=0.0).step()  # A has no gradient yet
parts = [layer.adapters["default"] for layer in adapted.layers.values()]
moves = [np.sqrt(((16 / 8 * a.lora_B.numpy() @ a.lora_A.numpy()) ** 2).mean()) for a in parts if a.lora_A.shape[1] == 128]
print(f"first step of LoRA: each of {len(moves)} matrices moves by {min(moves):.2f} to {max(moves):.2f} times the rate (root mean square)")
estimate = 16 / 8 * np.sqrt(8 / (3 * 128))
assert min(moves) < estimate < max(moves) and abs(np.mean(moves) - estimate) < np.std(moves), "the estimate lies among them"

# %% [markdown]
# By the estimate $1/0.29$ or 3.5 times the rate of full fine-tuning, and 20 times it in a model of width 4096. The
# estimate is of the first step alone, since later $A$ moves too.
#
# **Predict:** what does the loss look like over the rate, and where does it turn with each method?

# %%
tried = searched(find, CASES, ("full", "lora"))  # (case, method) -> the trial that was chosen, {trial: loss on validation}
best = {key: at for key, (at, _) in tried.items()}
curves = {key: along("rate", at, seen) for key, (at, seen) in tried.items()}  # {rate: loss} at the chosen epochs and batch
print("\nloss on validation over the rate, less that at the best one:")
for (case, method), curve in curves.items():
    print(f"  {case.name:23s}{method:5s}", ", ".join(f"{loss - min(curve.values()):+.3f} at {rate:.2g}" for rate, loss in curve.items()))
    assert min(curve) < best[case, method].rate < max(curve), "it is inside what was tried"
times = {case: best[case, "lora"].rate / best[case, "full"].rate for case in CASES}
print("LoRA's best rate in full fine-tuning's: " + ", ".join(f"{x:g} ({case.name})" for case, x in times.items()))
law = judge("full-3").because.rpartition("model's. ")[2]
print(law)
assert "1.4e-04, is a factor of 9.1 from" in law and law.endswith("this says nothing of 7B.")
assert (Large("full").examples, Large("full").validation) == (320, 256)
once = {rate: find(replace(best[Case("source", 500), "full"], rate=rate, epochs=1.0))["loss"] for rate in (5e-4, 1e-3, 2e-3)}
assert min(once, key=once.get) == 1e-3 and base.config.hidden_size == 128, "as in full-3: one epoch, batches of 8"
logs = np.log([*times.values()])
assert logs.min() > 0 and mean(logs).low < np.log(3.5) and mean(logs).high < np.log(10) < mean(logs + np.log(2) * (np.arange(6) == 1)).high
beside = {pair.where: compared(pair) for pair in in_cases("lora", CASES, "full")}
print("\nLoRA beside full fine-tuning, on test:", *(f"{where}: {d.word} ({d.interval})" for where, d in beside.items()), sep="\n  ")

# %%
practice.rates_picture(curves, beside).savefig(OUT / "14_best_practices_rates.png", dpi=120)

# %% [markdown]
# A U: too low a rate learns little, too high does damage. In all six cases LoRA's rate is higher, 1.5 to 12 times full
# fine-tuning's; the geometric mean is 4.2 [2.0, 9.1]. The estimate's 3.5 is inside. Ten is not, but would be if LoRA's
# rate were one step higher with 500 of `rewrite`. (Steps are factors of two, under one seed; LoRA's searches start at
# three times full fine-tuning's rate; epochs and batches differ, too. With 500 and 5,000 of `source` full fine-tuning's
# U is nearly flat.) Full fine-tuning's best rates, 6e-5 to 1e-3, are all above the textbook's 1e-5 to 5e-5. (`best-4`
# asks for these, and for clearly higher rates with each other method.)
#
# Each at its best, LoRA has a clearly lower loss on `rewrite` with 50 and 500 examples, and a higher one with 5,000
# (after four epochs; eight are no better); on `source` it finds more with 500 (0.012 [0.000, 0.023]); with 50 that is
# undecided, with 5,000 they are equal.
#
# Width may be one reason for lower rates in large models: `full-3` briefly pretrains models of widths 32 to 256, and
# extrapolates their best rate of fine-tuning. That of SmolLM2-135M-Instruct, measured afterwards (width 576, 30 layers,
# pretrained for long; `source` with 320 examples, one seed, 256 validation records), is a ninth of what this predicts.
# Pretraining may be the reason: ten times as much lowers the best rate at width 128, and that of the shipped base, as
# wide and pretrained for longer, is 1e-3 (its depth differs, too). SmolLM2's is a 21st of its pretraining's (3e-3,
# github.com/huggingface/smollm), much lower as advised, but above 5e-5.

# %% [markdown]
# > `full-3` the rate is much smaller than in pretraining; typically 1e-5 to 5e-5: **cannot be tested here**. After a
# > brief pretraining at widths 32, 64, 128 and 256 the best rate of fine-tuning is 3.0, 2.3, 1.3 and 1.1 times
# > pretraining's, clearly less than half at 0 of 4. It falls as width^-1.06, by this law to 1.6e-04 [7.0e-05, 3.6e-04]
# > at width 4096. At 128, after 10 times the pretraining, it is 1.0 times pretraining's, and 0.4 [0.2, 0.6] times the
# > briefly pretrained model's. SmolLM2-135M's best rate, 1.4e-04, is a factor of 9.1 from the law's at its width,
# > 1.3e-03 [8.5e-04, 1.9e-03]: more than 2, so this says nothing of 7B. (5 seeds, 256 validation records)
#
# > `best-4` 1e-5 to 5e-5 for full, higher for PEFT: **holds if**. The best rates of full fine-tuning are 6e-05 to
# > 1e-03; of the other methods they are higher by a factor of 4.2 for lora (2.0 to 9.1), 4.8 for qlora (2.2 to 10.1),
# > 5.3 for bottleneck (2.3 to 12.5), 17.8 for prefix (10.3 to 30.8) and 762.0 for prompt (359.5 to 1615.1). It is so
# > for: lora above it, qlora above it, bottleneck above it, prefix above it and prompt above it; not for: full between
# > 1e-5 and 5e-5. (256 validation records)

# %% [markdown]
# ## 3 · The batch, whole or in parts
#
# A batch's gradient is a mean over $B$ examples, so its noise falls like $\operatorname{Var} g_B = \sigma^2 / B$: and a
# larger step can be trusted. *Advice: a larger batch wants a larger rate*, for the same epochs in proportion to $B$
# with SGD (Goyal et al. 2017, arXiv:1706.02677), to $\sqrt B$ with Adam where noise dominates the gradient (Malladi et
# al. 2022, arXiv:2205.10287). But for the same epochs a larger batch also means fewer steps. And if the batch does not
# fit, add the gradients of its parts: *accumulation is the same as the whole batch*, for less memory. It is the same
# only where each part counts by its tokens (Lesson 3; Transformers' `Trainer` took the mean of the parts' means until
# October 2024, huggingface.co/blog/gradient_accumulation).
#
# **Predict:** 16 examples at once, and 4 times 4: by how much do the losses differ after ten steps? And batches of 64
# and of 4, each with its own rate and epochs: which learns more?

# %%
small = {"steps": 2, "held_out": 8, "blocks": 2} if REDUCED else {"steps": 10}
settings = [Rewriting(learning_rate=1e-3, accumulation=n, **small) for n in (1, 4)]
whole, parts = (fine_tune(base, shipped.data(s), s, progress=False)[0]["task_loss"] for s in settings)
print(f"\nnow, {small['steps']} steps: 16 at once {whole:.5f}, 4 x 4 {parts:.5f}")
assert abs(whole - parts) < 1e-3, "the Trainer weighs the parts by their tokens, so this is only rounding"
assert memory_ledger(base, batch=4, seq_len=64).total < memory_ledger(base, batch=16, seq_len=64).total / 2, "for less memory"
for name, found in ((BATCHES.a, report(find, BATCHES.one)), (BATCHES.b, report(find, BATCHES.other))):
    t = found.trial
    print(f"{name:14s} rate {t.rate:g}, {t.epochs:g} epochs ({t.steps} steps, {practice.learned(t):,} examples, {seconds(t):.1f} s): "
          f"loss {found.mean.value:.3f} [{found.mean.low:.3f}, {found.mean.high:.3f}]")
batches = compared(BATCHES)
print(f"64 beside 4: {batches.word} ({batches.interval})")
equal = {pair.where: compared(pair) for pair in EQUAL_STEPS}
print("62 steps of 64 beside 62 of 8:", *(f"{where}: {d.word} ({d.interval})" for where, d in equal.items()), sep="\n  ")
assert batches.clearly_worse and [d.word for d in equal.values()] == ["better", "equal", "better", "better"], "rewrite, source"

# %% [markdown]
# The parts give the same loss as the whole with less than half the memory. With full
# fine-tuning on `rewrite` batches of 64 are worse than batches of 4, by 0.054 [0.048, 0.061] nats a token. The rate
# chosen for them is twice as high. ($\sqrt B$ would make it four times, but for the same epochs: it is not tested
# here.) Those of 64 took four epochs against two, and still made only 31 steps against 250. A control makes 62 steps of
# 64 or 8 examples, each at its own rate: there 64 is better on `rewrite`, by 0.033 [0.027, 0.038] (LoRA: 0.017 [0.003,
# 0.032]), and on `source` equal (LoRA: better, by 0.018 [0.009, 0.027]). Step for step a large batch was not found
# worse; it computes eight times as much.
#
# `best-5` asks that 64 is not worse by 0.02 than 4 and 16, nor in the control.

# %% [markdown]
# > `best-5` a batch as large as memory allows: **holds if**. At equal examples: of 8 comparisons (6 worse, 1 better and
# > 1 worse, by less than 0.02) 2 are as stated, 4 are not and 2 are not told. At the level for 12: Batches of 64 beside
# > of 4, full, source, 500 examples: better (+0.014 [+0.006, +0.022]). At equal steps: of 4 comparisons (3 better and 1
# > equal) 4 are as stated. (5 seeds, 512 test items)

# %% [markdown]
# ## 4 · Epochs, and the gap
#
# *Advice: 2 to 5 epochs.* Each doubling of the epochs is a run of its own, whose rate falls to 0 at its end. The gap
# between the losses, $L_\text{validation} - L_\text{train}$, has in it what was learned by heart. (Also that the
# records differ. With one epoch the training loss is of examples not seen before.)
#
# **Predict:** both losses fall at first. Which of them turns, and does it turn after fewer epochs with 50 examples or
# with 500?

# %%
over_epochs = {}  # (case, method) -> {epochs: (loss on validation, training loss)} at the rate and batch that were chosen
print("\nepochs: loss on validation (training loss)")
for (case, method), (at, seen) in tried.items():
    line = over_epochs[case, method] = {n: (y, find(replace(at, epochs=n))["train_loss"]) for n, y in along("epochs", at, seen).items()}
    print(f"  {case.name:23s}{method:5s}", ", ".join(f"{n:g}: {loss:.3f} ({train:.3f})" for n, (loss, train) in line.items()))
    assert (np.diff([train for _, train in line.values()]) <= 0).all(), "the training loss falls on"
    assert at.epochs == protocol.epochs_of(case.examples)[1] or line[2 * at.epochs][0] > line[at.epochs][0], "twice as many are worse"
assert {(best[CASES[0], m].epochs, best[CASES[1], m].epochs) for m in ("full", "lora")} == {(16, 2)}, "on rewrite, 50 and 500"

# %%
practice.epochs_picture(over_epochs).savefig(OUT / "14_best_practices_epochs.png", dpi=120)

# %% [markdown]
# The training loss falls on. At the chosen rate twice as many epochs have a higher loss on validation wherever they
# were allowed. On `rewrite` the loss on validation turns after 16 epochs of 50 examples, and after 2 of 500.
#
# But a rate suits a length. In `best-6` three more searches start from one epoch, from four, and from the most, 128 or,
# with 500, 16. The best setting of 2 to 5 epochs must not be worse by 0.02 than the best of any number, so *equal* is
# yes.
#
# **Predict:** with 50 verses, can 4 epochs do as well as 16, at another rate?

# %%
for pair in ADVISED:
    few, any_number = (report(find, way, KEYS[pair.task]).trial for way in (pair.one, pair.other))
    told = [f"{t.epochs:g} epochs at rate {t.rate:.2g}" for t in (few, any_number)]
    print(f"{pair.where:29s} best of 2 to 5: {told[0]}; of any: {told[1]}; {compared(pair).word} ({compared(pair).interval})")
    assert pair.one.start.examples == 50 or few == any_number, "with 500 the best is one of 2 to 5"
for pair, method in zip(ADVISED, ("full", "lora")):
    quick, slow = report(find, pair.one), report(find, search("rewrite", method, 50))
    same = compare(quick, slow, "nll")
    print(f"{method}, 4 epochs beside 16: {same.word} ({same.interval})")
    assert same.word == "equal" and (quick.trial.epochs, quick.trial.rate) == (slow.trial.epochs / 4, slow.trial.rate * 4)
found = judge("peft-4")
gains = {n.name.partition("full, ")[2]: n for n in (found.effect, *found.evidence) if " over " in n.name}
each = (f"{n.value:+.3f} [{n.low:+.3f}, {n.high:+.3f}] ({where})" for where, n in gains.items())
print("\nLoRA over full fine-tuning, at equal training loss:", *each, sep="\n  ")
assert sorted(round(n.value, 3) for n in gains.values() if n.low > 0 or n.high < 0) == [-0.346, 0.028, 0.071]

# %% [markdown]
# They can: a quarter of the epochs at four times the rate is equal, with full fine-tuning (+0.002 [-0.011, 0.015]) and
# with LoRA (-0.007 [-0.018, 0.004]). With 50 of `source` LoRA loses 18 points, full fine-tuning is open. With 500 the
# best number of epochs is itself 2 to 5, in all four cases.
#
# `peft-4` asks whether LoRA overfits less: whether its loss on test is clearly lower at the same training loss (within
# 0.02, and a factor of 2), for which full fine-tuning has as many epochs as it takes. With 500 of `rewrite` it is, by
# 0.071. (LoRA is chosen on validation there, full fine-tuning to fit; beside it at its best LoRA leads by 0.041.) With
# 50, nearly by heart, it is higher, by 0.346 [0.293, 0.399]. Two of `rewrite` are not compared: over five seeds
# the training losses differ.

# %% [markdown]
# > `peft-4` frozen weights reduce overfitting: **holds if**. Of 8 comparisons (2 better, 2 equal, 2 not compared, 1
# > worse and 1 undecided within [-0.00, +0.06] nats) 2 are as stated, 3 are not and 3 are not told. At the level for 8:
# > Lora beside full, at its best, rewrite, 500 examples: better (+0.071 [+0.058, +0.084]). (5 seeds, 512 test items)
#
# > `best-6` 2 to 5 epochs: **holds if**. Of 8 comparisons (6 equal, 1 worse and 1 undecided) 6 are as stated, 1 is not
# > and 1 is not told. 2 to 5 epochs beside any number, full, source, 50 examples: undecided (-0.017 [-0.100, +0.066]),
# > not told; 2 to 5 epochs beside any number, lora, source, 50 examples: worse (-0.184 [-0.308, -0.060]). (5 seeds, 512
# > test items)

# %% [markdown]
# ## 5 · Warm-up
#
# *Advice: let the rate rise from 0 over the first 5 to 10 % of the steps.* Adam divides by $\sqrt{\hat v}$, which in
# the first steps is an estimate from one or two gradients: a step is then about $\pm\eta$ in every weight, whatever it
# should have been (Liu et al. 2019, arXiv:1908.03265). Warm-up makes those first steps small.
#
# **Predict:** with warm-up and without, each with its own best rate, epochs and batch size: what does it gain?

# %%
warm = {f"{pair.a}, {pair.where.removesuffix(', 500 examples')}": compared(pair) for pair in WARM + LONG}
print("\nwith warm-up beside none:", *(f"{name}: {d.word} ({d.interval})" for name, d in warm.items()), sep="\n  ")
assert [d.word for d in warm.values()][-4:] == ["equal"] * 4 and {report(find, pair.one).trial.steps for pair in LONG} == {1250}
assert not any(d.clearly_better for d in warm.values()) and max(d.better.high for d in warm.values()) < 0.1

# %%
practice.intervals_picture(warm, "better with warm-up than without, nats or share").savefig(OUT / "14_best_practices_warmup.png", dpi=120)

# %% [markdown]
# Warm-up of 5 or 10 % is never clearly better than none: with 500 examples six of eight comparisons are equal, and two,
# of full fine-tuning on `source`, undecided; in 1,250 steps of 5,000 all four are equal. Not tested: one high rate for
# both, at which a run without warm-up may fail.

# %% [markdown]
# > `best-7` warm up for 5 to 10 % of the steps: **cannot be tested here**. Of 8 comparisons (6 equal and 2 undecided) 0
# > are as stated, 6 are not and 2 are not told. 5% warm-up beside none, full, source, 500 examples: undecided (+0.005
# > [-0.011, +0.022]), not told; 10% warm-up beside none, full, source, 500 examples: undecided (+0.007 [-0.009,
# > +0.022]), not told. Of 4 comparisons (4 equal) 0 are as stated and 4 are not. (5 seeds, 512 test items)

# %% [markdown]
# ## 6 · Few clean examples, or many with mistakes?
#
# *Advice: quality beats quantity* (as Zhou et al. 2023, arXiv:2305.11206, with 1,000 chosen examples). Of 500 examples a
# quarter or a half are spoiled. `random` gives them the answer of another one. `systematic` gives a wrong answer by a
# rule: the verse as it is, or, in `source`, the next book. `off-topic` puts a word and its definition in their place.
# Beside them stands the clean part alone, 375 or 250, which may take as many steps.
#
# **Predict:** which of the three does most harm? The same one in both tasks?

# %%
noise = {(pair.where.removesuffix(", 500 examples"), pair.b): compared(pair) for pair in NOISE}
for (where, spoiled), found in noise.items():
    print(f"  {where:14s} the clean part beside {spoiled:24s} {found.word} ({found.interval})")
random, systematic, off_topic = (dict([*noise.items()][i : i + 8]) for i in (0, 8, 16))
assert [found.clearly_better for found in random.values()] == [True, False] * 2 + [True] * 4
for of, task, least, most in ((random, "rewrite", 0.04, 0.08), (random, "source", -0.01, 0.19), (systematic, "source", 0.06, 0.44)):
    better = [d.better.value for (where, _), d in of.items() if task in where]
    assert (round(min(better), 2), round(max(better), 2), round(max(d.better.value for d in off_topic.values()), 3)) == (least, most, 0.019)
assert all(found.clearly_better == ("source" in where) for (where, _), found in systematic.items())
assert [found.word for found in systematic.values()].count("worse") == 2 == sum(found.clearly_better for found in off_topic.values())
spoiled, as_often = report(find, NOISE[4].other), report(find, practice.AS_OFTEN)  # half random; 250 clean ones, seen as often
harm = crossed(spoiled.values - as_often.values)  # of an answer, not of a token
print(f"half random costs {harm.value:.2f} [{harm.low:.2f}, {harm.high:.2f}] nats an answer; the best mixture, at most {np.log(2):.2f}")
assert harm.low > 2 * np.log(2) and spoiled.trial.data == "random:0.5" and round(as_often.weights.sum() / 512) == 26

# %%
practice.noise_picture(noise).savefig(OUT / "14_best_practices_clean.png", dpi=120)

# %% [markdown]
# On `rewrite` *random*, on `source` *systematic*. *Random* answers harm both: the clean part is clearly better, by 0.04
# to 0.08 nats a token and, of half, 0.17 and 0.19 of the sentences (of a quarter undecided). A *systematic* mistake
# costs `source` 0.06 to 0.44 of them. On `rewrite`, where it is a copy, it does no clear harm; a quarter of copies is
# better with both, by 0.024 (settings differ). *Off-topic* records cost 0.019 nats at most, clearly in two of eight.
#
# If a share $p$ of the answers is wrong, the training loss is least for the mixture $(1 - p)\,q_\text{right} +
# p\,q_\text{wrong}$ of distributions of whole answers. So a right answer keeps at least the share $1 - p$ of its
# probability under $q_\text{right}$. It costs at most $-\ln(1 - p)$ nats more than there, however many tokens it has.
# On `rewrite` (full fine-tuning, 26 tokens an answer), beside 250 clean ones, each seen twice as there, half random
# costs 2.02 [1.69, 2.35] nats an answer; the best mixture explains at most $\ln 2 = 0.69$.
#
# *Advice: include hard examples.* Of 1,500 drawn records take the easiest third, those with the lowest loss on the
# base, or half of these and half of the hardest third. The test has every kind, so the mixture is more like it than
# easy ones are. So 500 drawn at random, a third of the hardest third, stand beside it, too.
#
# **Predict:** which set teaches most?

# %%
for easy, drawn in zip(HARD[::2], HARDER[::2]):  # of rewrite
    against = compare(report(find, drawn.other), report(find, easy.other), "nll")
    print(f"{drawn.b} beside {easy.b}, {easy.where}: {against.word} ({against.interval})")
    assert against.clearly_better and compared(easy).clearly_better and compared(drawn).clearly_better == ("lora" in easy.where)
assert practice.mixed_at_one_setting(find).equal

# %% [markdown]
# Easy ones alone cost something: the mixture is better on both tasks; on `rewrite` 500 drawn at random are, too, by
# 0.031 [0.016, 0.046] (LoRA: 0.017 [0.008, 0.026]) nats a token. More hard ones than chance brings gain full
# fine-tuning nothing clear. LoRA's 0.018 [0.012, 0.024] is the search's: the mixture got batches of 1 and half the
# rate, random ones 4. At the mixture's setting both are equal (0.004 [-0.003, 0.011]). The *holds if* of `best-3` says
# that easy ones alone lack something, not that hard ones teach more.

# %% [markdown]
# > `best-1` clean and relevant data beat more, noisy data: **holds if**. Of 24 comparisons (12 better, 4 equal, 2 worse
# > and 6 undecided within [-0.02, +0.03] of items, [-0.02, +0.05] nats) 12 are as stated, 6 are not and 6 are not told.
# > The clean part is clearly better in 6 of 8 with random mistakes (worse in 0), 4 of 8 with systematic mistakes (worse
# > in 2) and 2 of 8 with off-topic mistakes (worse in 0). (5 seeds, 512 test items)
#
# > `best-3` include hard examples: **holds if**. Beside easy ones: of 4 comparisons (4 better) 4 are as stated. Beside
# > random ones: of 4 comparisons (2 equal, 1 better and 1 undecided within [-0.02, +0.02] nats) 1 is as stated, 2 are
# > not and 1 is not told. At the level for 8: Easy and hard examples beside random ones, lora, rewrite, 500 examples:
# > better (+0.018 [+0.012, +0.024]). (5 seeds, 512 test items)

# %% [markdown]
# ## 7 · A class that is rare
#
# Three training sets of `source`: 500 balanced examples; 500 with 80 % from Jane Austen and 10 % from each other book;
# these, with the other books' repeated until each book has 400 (one "epoch" sees 500 of these 1,200). The test has 256
# of each. What counts is each class's *recall*, the share of its sentences that are found. The mean over the classes is
# the **balanced accuracy**. *Advice: a skewed training set costs the rare classes; repeating their examples helps.*
#
# **Predict:** which balanced accuracy has somebody who says "Austen" always, of three books?

# %%
asked = data.asked("source", "test", protocol.ITEMS["source"])
book = np.array([q.choices.index(q.completion) for q in asked])
recalls, shift = {}, {}  # (method, training set) or (method, what changed) -> of each book, with intervals
for balanced, repeated in zip(SKEWED, REPEATED):
    sets = {"balanced": balanced.one, "80 % Austen": balanced.other, "others repeated": repeated.one}
    found = {name: report(find, way, "right").values for name, way in sets.items()}
    method = balanced.where.partition(",")[0]
    recalls |= {(method, name): [crossed(each[:, book == i]) for i in range(3)] for name, each in found.items()}
    for what, to, of in (("the skew", "80 % Austen", "balanced"), ("repeating", "others repeated", "80 % Austen")):
        shift[method, what] = [crossed((found[to] - found[of])[:, book == i]) for i in range(3)]
for key, (austen, basic, james) in (recalls | shift).items():
    print(f"  {', '.join(key):22s}" + ", ".join(f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for e in (austen, basic, james)))
assert shift["full", "the skew"][2].high < 0 and all(e.high < 0 for e in shift["lora", "the skew"][1:]), "rare ones are found less"
assert all(e.low < 0 < e.high for (_, what), of in shift.items() if what == "repeating" for e in of)

# %%
practice.recalls_picture(recalls).savefig(OUT / "14_best_practices_rare.png", dpi=120)

# %% [markdown]
# A third. With the skewed set fewer sentences of the rare books are found: of the King James Bible -0.071 [-0.138,
# -0.005] with full fine-tuning and -0.108 [-0.200, -0.015] with LoRA, of the Basic English -0.072 [-0.129, -0.015] with
# LoRA (full: not clearly). Of Austen's, nearly all are found in any case. What repeating does is undecided for each.
#
# `best-2` asks whether balanced and repeated examples raise the share of all right answers, the mean of the three
# recalls. Balanced ones do, with both methods; repeated ones are not shown to.

# %% [markdown]
# > `best-2` balance the data set: **holds if**. Balanced beside 80 % of one class, full, source, 500 examples: better
# > (+0.027 [+0.007, +0.046]); balanced beside 80 % of one class, lora, source, 500 examples: better (+0.058 [+0.017,
# > +0.098]). 80 % of one class, the others repeated beside 80 % of one class, full, source, 500 examples: undecided
# > (+0.008 [-0.009, +0.024]), not told; 80 % of one class, the others repeated beside 80 % of one class, lora, source,
# > 500 examples: undecided (+0.031 [-0.011, +0.073]), not told. (5 seeds, 768 test items)

# %% [markdown]
# ## How far these verdicts reach
#
# They are of a model of 1.4 million parameters (`full-3`: of others, too), tens to 5,000 steps, a base that has read
# the training split, Adam, and a cosine schedule, the only one tried. (Rank, $\alpha$, layers: Lesson 18; masks: 8.)

# %% [markdown]
# ## Break it: choose and report on the same verses
#
# Suppose somebody has 96 verses for both. The five seeds of full fine-tuning are the same setting: take the one with
# the lowest loss on 96 of the 512 test verses, and quote that loss. How much better than the mean of the five does it
# look there, and on the other 416 verses?

# %%
generator, better = np.random.default_rng(0), []
for _ in range(2000):
    order = generator.permutation(protocol.ITEMS["rewrite"])
    here, elsewhere = ((full.values[:, i].sum(axis=1) / full.weights[i].sum()) for i in (order[:96], order[96:]))
    better.append([verses.mean() - verses[here.argmin()] for verses in (here, elsewhere)])
looks, is_so = np.mean(better, axis=0)
print(f"the best of five on 96 verses looks {looks:.4f} nats better than their mean; on the other verses it is {is_so:.4f} better")
assert looks > 2 * is_so > 0

# %% [markdown]
# It looks 0.019 nats better; on the other verses it is 0.004. The five differ by luck alone, so nothing was there to be
# chosen but a lucky seed; the rest is the luck of 96 verses.

# %% [markdown]
# ## Quiz
#
# **1.** Three seeds, and under each of them A ends below B. Why is that not yet clear?
#
# <details><summary>Answer</summary>
#
# Were there no difference, each sign would be a coin, and three coins agree once in four times. The interval of the
# three differences has to exclude 0.
#
# </details>
#
# **2.** Why are two settings compared seed by seed, and not mean with mean?
#
# <details><summary>Answer</summary>
#
# What both runs of a seed have in common, such as their verses, drops out of the difference. What is left scatters
# less, so a smaller difference can be clear.
#
# </details>
#
# **3.** A batch of 64 is compared with one of 4, each for two epochs of the same 500 examples. Which two things differ?
#
# <details><summary>Answer</summary>
#
# The noise of a gradient, and the number of steps: 16 against 250. So from this comparison alone nobody knows which of
# the two makes the difference. A control has the same number of steps (section 3).
#
# </details>
#
# **4.** Of three books one has 80 % of the training data, and a classifier is right 80 % of the time on such data. What
# may it have learned?
#
# <details><summary>Answer</summary>
#
# Nothing: who always names this book is right as often. Its balanced accuracy would be a third.
#
# </details>
#
# **5.** Somebody takes the epoch with the lowest training loss. What goes wrong, and what is still not quite right if
# it is the epoch with the lowest held-out loss?
#
# <details><summary>Answer</summary>
#
# The training loss goes on falling while examples are learned by heart, so it may ask for too many epochs. The lowest
# held-out loss is chosen partly for its luck with these verses: report a loss on a test set (Lesson 0).
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("14.1", value)`, or at the terminal with
# `minipeft exercise 14.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 14.3 FILE.py`.
#
# **14.1 Three differences.** Seed by seed, a setting ends below its control by 0.03, 0.01 and 0.05 nats. How large is
# the half width of the 95 % interval of the mean, to three digits? ($t = 4.303$.) Is the difference clear?
#
# **14.2 Five seeds agree.** There is no difference, and each sign is a coin. With which probability do five seeds
# agree, on whichever side?
#
# **14.3 Seed by seed.** Write `clear(a, b)`: whether the losses `a` are clearly below the losses `b` of the same seeds,
# two arrays of 3 or of 10. ($t$ is 4.303 for three, and 2.262 for ten.)
#
# **14.4 Parts of a batch.** A batch comes in two parts: 10 tokens with a mean loss of 1.0 and 30 with 3.0. What is the
# loss of the batch?
#
# Projects, with no answer written down:
#
# - **A finer lattice.** `protocol.run(replace(best[CASES[1], "lora"], rate=4.2e-3))`: where is LoRA's optimum between
#   the rates that were tried? How flat is the bottom of its U, beside what the seeds do to a loss?
# - **More seeds.** Take one difference that is *undecided*, and run its two settings under seeds 6 to 10
#   (`protocol.run`, `split="test"`). How much narrower is the interval of ten seeds, and is the word another one?
# - **Early stopping.** `mp.TrainingArguments(eval_steps=..., early_stopping_patience=...)` stops where the held-out
#   loss turns. How close does it come to the best epoch?
#
# <details><summary>Solution of 14.1</summary>
#
# The mean is 0.03 and $s = 0.02$; the interval reaches below 0, so it is undecided, though all three agree.
#
# ```python
# d = np.array([0.03, 0.01, 0.05])
# check("14.1", 4.303 * d.std(ddof=1) / np.sqrt(3))
# ```
#
# </details>
#
# <details><summary>Solution of 14.2</summary>
#
# All on the one side, or all on the other.
#
# ```python
# check("14.2", 2 * 0.5**5)
# ```
#
# </details>
#
# <details><summary>Solution of 14.3</summary>
#
# Of the differences, not of the two means.
#
# ```python
# def clear(a, b):
#     d, t = a - b, {3: 4.303, 10: 2.262}[len(a)]
#     return d.mean() + t * d.std(ddof=1) / np.sqrt(len(d)) < 0
#
# check("14.3", clear)
# ```
#
# </details>
#
# <details><summary>Solution of 14.4</summary>
#
# The sum over all tokens, by their number.
#
# ```python
# check("14.4", (10 * 1.0 + 30 * 3.0) / 40)
# ```
#
# </details>
