# %% [markdown]
# # Lesson 14 · Best practice, measured
#
# "LoRA wants ten times the learning rate." "Warm up for five percent of the steps." "Three epochs are enough." "A few
# good examples beat many bad ones." Such advice is repeated far more often than it is measured. This lesson measures
# it: on a small model, a small task and a small budget, but with every number in sight, and over three seeds. Some of
# the advice holds here, and some does not. The lesson does not know which until it has looked.
#
# You need Lessons 3 and 4. Run it with `python lessons/14_best_practices.py` (a minute and a half on two cores), or
# open it as a notebook. It computes one seed of the most telling runs now, and reads the rest from
# `lessons/results/14_best_practices.jsonl`, one line a run, with all its settings. `python lessons/14_best_practices.py
# --full` (in a notebook `!python lessons/14_best_practices.py --full`) first computes those of the 90 runs that are
# missing there (all of them: about a quarter of an hour), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import practice
from experiments.practice import Classification

import minipeft as mp
from minipeft.accounting import memory_ledger
from minipeft.experiments import shipped
from minipeft.experiments.rows import complete, is_of, read_rows
from minipeft.experiments.seeds import CLEAR, below, over_seeds, spread
from minipeft.experiments.shipped import Rewriting
from minipeft.experiments.sweep import sweep

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "14_best_practices.jsonl"

if "--full" in sys.argv:
    sweep(practice.run, practice.RUNS, executor=1, store=RESULTS)
rows, SEEDS = complete(read_rows(RESULTS), practice.RUNS)
task_before, general_before = shipped.before(8, 2) if REDUCED else shipped.before()
print(f"{len(rows)} runs were measured, with the seeds {SEEDS}; the base, before any: task loss {task_before:.3f}, general loss {general_before:.3f}")

# %% [markdown]
# ## 1 · What is a run, and when is a difference one?
#
# The task is Lesson 3's: a verse of the King James Bible, to be written in plain English. A run is 40 steps of 16 short
# verses from the shipped base, and what counts is the loss on 96 verses that nobody trained on, in nats per token.
# Chance enters through the verses that a run gets to see, and their order: the **seed**. So each setting runs with
# three seeds, and is reported as
#
# $$\bar L \pm s, \qquad \bar L = \frac13 \sum_{i=1}^{3} L_i, \qquad s^2 = \frac{1}{2} \sum_{i=1}^{3} (L_i - \bar L)^2 .$$
#
# Two settings are compared seed by seed, on the same verses, so what counts are the three differences $d_i$, with a
# mean $\bar d$ and a standard deviation $s_d$ of their own. First, all three must have the same sign. How often would
# that happen if there were no difference? Each sign is then a coin, and three coins agree with probability $2 \cdot
# 2^{-3} = \frac14$. That is a low bar! So, second, the difference must be large beside its spread, $|\bar d| > 2.5 \,
# s_d$: Student's t-test of three pairs, which chance passes one time in twenty ($t = \sqrt3 \, \bar d / s_d$ is beyond
# $\pm 4.3$). What fails either is *no clear difference*. With some twenty such tests in this lesson, one that passes
# may still be chance.

# %%
seeds = over_seeds(rows, Rewriting(learning_rate=1e-3))
print(f"full fine-tuning at rate 1e-3, {len(seeds)} seeds: {', '.join(f'{loss:.3f}' for loss in seeds)}, or {spread(seeds)}")
coins = np.random.default_rng(0).integers(0, 2, (100_000, 3)).sum(axis=1)
print(f"three coins agree in {np.isin(coins, (0, 3)).mean():.1%} of throws")
assert abs(np.isin(coins, (0, 3)).mean() - 1 / 4) < 0.01
chance = np.random.default_rng(0).normal(size=(100_000, 3))
passed = np.abs(chance.mean(axis=1)) > CLEAR * chance.std(axis=1, ddof=1)
print(f"three differences that are only chance are large beside their spread in {passed.mean():.1%} of cases")
assert abs(passed.mean() - 0.05) < 0.005


def measure(*runs):
    """These runs, computed now."""
    if REDUCED:
        runs = [replace(s, steps=2, examples=32, **({} if isinstance(s, Classification) else {"held_out": 8, "blocks": 2})) for s in runs]
        runs = [replace(s, evaluations=2) if getattr(s, "evaluations", 1) > 1 else s for s in runs]
    return sweep(practice.run, runs, executor=1)


def agree(now, settings):
    """Assert that a run that was computed now is the one that was measured before, but for the last digits."""
    for row, s in zip(now, settings):
        key = "accuracy" if isinstance(s, Classification) else "task_loss"
        there = over_seeds(rows, s, key)[s.seed]
        assert REDUCED or abs(row[key] - there) < 0.03, f"{s}: {row[key]:.3f} now, {there:.3f} in {RESULTS.name}"


def report(topic):
    """What the rows say of a topic, beside the advice."""
    for finding in practice.findings(rows):
        if finding.topic in topic:
            print(f"  advice   {finding.advice}\n  measured {finding.measured}\n  so       {finding.verdict.upper()}\n")


def verdicts(topic):
    """Of each piece of advice on a topic: True, as advised; False, not; None, no clear difference."""
    return [finding.agrees for finding in practice.findings(rows) if finding.topic == topic]


# %% [markdown]
# ## 2 · The learning rate
#
# *Advice: LoRA and adapters want about ten times the rate of full fine-tuning.* Where would that come from? LoRA's
# update is $\Delta W = \frac{\alpha}{r} B A$ with $B = 0$ at the start: a product of two small factors, which both have
# to travel from their start, while full fine-tuning moves $W$ itself. Adam makes every weight travel about $\eta$ a
# step, whatever its gradient; so what a step does to the *function* depends on which weights there are to move.

# %%
pairs = (("lora", 1e-3), ("lora", 1e-2), ("full", 1e-4), ("full", 1e-3), ("full", 1e-2))
few = [Rewriting(method, rate) for method, rate in pairs]
now = measure(*few)
agree(now, few[:-1])  # the last rate is so high that rounding grows: its numbers differ from machine to machine
print("\nnow, seed 0:")
for row in now:
    print(f"  {row['method']:5s} rate {row['learning_rate']:6g}: task loss {row['task_loss']:.3f}, general text {row['forgotten']:+.3f}")
print("\nall seeds:   rate", "".join(f"{rate:>16g}" for rate in sorted({r for m in ("full", "lora") for r in practice.RATES[m]})))
for method in ("full", "lora"):
    rates = practice.RATES[method]
    cells = {rate: spread(over_seeds(rows, Rewriting(method, rate))) for rate in rates}
    print(f"  {method:14s}", "".join(f"{cells.get(rate, ''):>16s}" for rate in sorted({r for m in ("full", "lora") for r in practice.RATES[m]})))
print()
report(("learning rate",))
full_best = practice.best(rows, [Rewriting(learning_rate=rate) for rate in practice.RATES["full"]])
curve = [over_seeds(rows, Rewriting(learning_rate=rate)).mean() for rate in practice.RATES["full"]]
assert 0 < practice.RATES["full"].index(full_best.learning_rate) < len(curve) - 1, "the optimum is inside the grid: a U"
lora_best = practice.best_rates(rows, [Rewriting("lora", rate) for rate in practice.RATES["lora"]])
assert full_best.learning_rate == 1e-3 and lora_best == [3e-3, 1e-2] and verdicts("learning rate") == [None, None]
print("general text loses")
for s in (full_best, Rewriting("lora", lora_best[0])):
    lowest = replace(s, learning_rate=practice.RATES[s.method][0])
    kind, best = (over_seeds(rows, which, "forgotten") for which in (lowest, s))
    print(f"  {s.method}: {spread(best)} at the best rate, {spread(kind)} at the lowest")
    assert below(kind, best)

# %% [markdown]
# Full fine-tuning is best at 1e-3. LoRA is lowest at 1e-2, by 0.012 ± 0.017 under its loss at 3e-3, and not under every
# seed: the two do not differ clearly, so its rate is three to ten times full's. It certainly wants a higher one, and whether
# ten times is right this grid of half decades cannot say. Each at its best, neither learns clearly more. And the rate
# that is best for the task is never the kindest: general text loses least at the lowest rate, with both (Lesson 15).
#
# ## 3 · The batch, whole or in parts
#
# A batch's gradient is a mean over $B$ examples, so its noise falls like $\operatorname{Var} g_B = \sigma^2 / B$: four
# times the batch, half the standard deviation, and a larger step can be trusted. *Advice: a larger batch wants a larger
# rate.* But with the same 640 examples a larger batch also means fewer steps. And if the batch does not fit, add the
# gradients of its parts: *accumulation is the same as the whole batch*, for less memory.

# %%
whole, parts = Rewriting(learning_rate=1e-3), Rewriting(learning_rate=1e-3, accumulation=4)
now = measure(parts)
agree(now, [parts])
print(f"\nnow, seed 0, 4 x 4: task loss {now[0]['task_loss']:.5f}; as it was with 16 at once: {over_seeds(rows, whole)[0]:.5f}")
base, _ = mp.load_base()
ledgers = {size: memory_ledger(base, batch=size, seq_len=64).total for size in (16, 4)}
print(f"memory of a step: 16 at once {ledgers[16] / 1e6:.0f} MB, in parts of 4 {ledgers[4] / 1e6:.0f} MB\n")
for size in (4, 16, 64):
    cells = {s.learning_rate: spread(over_seeds(rows, s)) for s in practice.batch_size((0,)) if s.batch_size == size and s.accumulation == 1}
    print(f"  batch {size:2d}, {640 // size:3d} steps: " + ", ".join(f"{cell} at {rate:g}" for rate, cell in cells.items()))
print()
report(("batch size", "accumulation"))
assert ledgers[4] < ledgers[16]
difference = np.abs(over_seeds(rows, parts) - over_seeds(rows, whole)).max()
assert difference < 0.005, "the Trainer weighs the parts by their tokens, so this is only rounding"
unbroken = [s for s in practice.batch_size((0,)) if s.accumulation == 1]
best_of = [practice.best(rows, [s for s in unbroken if s.batch_size == size]) for size in (4, 16, 64)]
assert [s.learning_rate for s in best_of] == [3e-4, 1e-3, 1e-3]
for smaller, larger in pairwise(best_of):
    assert below(over_seeds(rows, smaller), over_seeds(rows, larger)), "small batches teach more"

# %% [markdown]
# From 4 to 16 the best rate rises (at 4 it is the lowest that was tried); from 16 to 64 this grid shows no rise. And
# small batches win: of the same examples they make more steps.
#
# ## 4 · Epochs, and the gap
#
# *Advice: one to three epochs; then stop.* With 96 examples, sixteen times over, both losses are in sight. The gap
# between them, $L_\text{held out} - L_\text{train}$, is what was learned by heart.

# %%
longest = practice.epochs((0,))[0]
(now,) = measure(longest)
agree([now], [longest])
print("\nnow, full fine-tuning, seed 0:   epoch", " ".join(f"{i:5d}" for i in range(1, len(now["train_curve"]) + 1)))
print("                              training", " ".join(f"{loss:5.2f}" for loss in now["train_curve"]))
print("                              held out", " ".join(f"{loss:5.2f}" for loss in now["held_out_curve"]))
print()
report(("epochs",))
rise = {}
for s in practice.epochs((0,)):
    curves = [row for row in rows if is_of(row, replace(s, seed=row["seed"]))]
    rise[s.method] = [row["held_out_curve"][-1] - min(row["held_out_curve"]) for row in curves]
    assert all(row["train_curve"][-1] < row["train_curve"][0] for row in curves), "the training loss has only fallen"
    assert all(row["held_out_curve"][-1] > min(row["held_out_curve"]) for row in curves), "the held-out loss has turned"
    assert {1 + np.argmin(row["held_out_curve"]) for row in curves} == {{"full": 2, "lora": 4}[s.method]}
assert min(rise["full"]) > 1.8 * max(rise["lora"])

# %% [markdown]
# Full fine-tuning is best after two epochs, as advised, and LoRA after four, under every seed. After sixteen full
# fine-tuning has lost twice as much as LoRA, which learns less by heart.
#
# ## 5 · Warm-up
#
# *Advice: let the rate rise from 0 over the first 5 to 10 % of the steps.* Adam divides by $\sqrt{\hat v}$, which in
# the first steps is an estimate from one or two gradients: a step is then about $\pm\eta$ in every weight, whatever it
# should have been. Warm-up makes those first steps small. The usual rate first, then one that is too high:

# %%
hot = [Rewriting(learning_rate=1e-2, warmup=share) for share in (0.0, 0.1)]
now = measure(*hot)  # too high a rate for `agree`, as above
print("\nnow, full, rate 1e-2, seed 0: " + ", ".join(f"{row['task_loss']:.3f} with {row['warmup']:.0%}" for row in now) + "\n")
report(("warm-up",))
assert verdicts("warm-up") == [False, True]
assert over_seeds(rows, hot[1]).mean() > task_before - 0.05 or REDUCED, "with warm-up, too, nothing was learned"

# %% [markdown]
# At the usual rate warm-up did a little harm: it takes steps away, and nothing went wrong without it. At ten times that
# rate it helps, and yet saves nothing: with it or without, the run ends about where the base began.
#
# ## 6 · Few clean examples, or many with mistakes?
#
# *Advice: quality beats quantity.* Here a mistake is a verse with the plain English of another verse. All runs take the
# same 40 steps: 160 examples are seen four times each, 640 once.

# %%
pair = [Rewriting(learning_rate=1e-3, examples=160), Rewriting(learning_rate=1e-3, examples=640, noise=0.5)]
now = measure(*pair)
agree(now, pair)
print(f"\nnow, seed 0: 160 clean {now[0]['task_loss']:.3f}, 640 of which half are wrong {now[1]['task_loss']:.3f}\n")
noisy = {noise: over_seeds(rows, Rewriting(learning_rate=1e-3, examples=640, noise=noise)) for noise in (0.0, 0.25, 0.5)}
print("  640 examples: " + ", ".join(f"{spread(losses)} with {noise:.0%} wrong" for noise, losses in noisy.items()) + "\n")
report(("data",))
assert below(noisy[0.0], noisy[0.5]), "wrong answers do harm"
assert verdicts("data") == [False, True]
clean = over_seeds(rows, Rewriting(learning_rate=1e-3, examples=160))
assert (noisy[0.5] - clean).max() < 0.02 < 0.07 < (clean - noisy[0.25]).min()

# %% [markdown]
# So quantity beats quality where a quarter is wrong, and clearly. Where half is wrong, quality wins, by a difference
# that is the same under every seed and very small: 0.014, a sixth of the other one.
#
# ## 7 · A class that is rare
#
# Another task: is a dictionary's definition that of a noun or of a verb? A classifier (Lesson 3, step 2) learns it from
# 320 definitions. With 90 % nouns, to say "noun" always is right 90 % of the time, on such data. So the test is on as
# many verbs as nouns, and what counts is the mean of the two recalls, the *balanced accuracy*. *Advice: a skewed
# training set costs the rare class; repeating its examples helps.*

# %%
skewed = [Classification(0.5), Classification(0.9)]
now = measure(*skewed)
print("\nnow, seed 0:")
for row in now:
    print(f"  {row['majority']:.0%} nouns: balanced accuracy {row['accuracy']:.2f}, finds {row['recall_nouns']:.0%} of nouns, {row['recall_verbs']:.0%} of verbs")
agree(now, skewed)
print()
report(("balance",))
nouns, verbs = (over_seeds(rows, Classification(0.9), f"recall_{kind}") for kind in ("nouns", "verbs"))
usual = 0.9 * nouns.mean() + 0.1 * verbs.mean()
print(f"on data as skewed as its training set, its accuracy would be {usual:.0%}, and look well; of verbs it finds {verbs.mean():.0%}")
assert usual > nouns.mean() / 2 + verbs.mean() / 2 and below(verbs, nouns)
assert verdicts("balance") == [True, None]

# %% [markdown]
# A skewed training set costs the rare class, as advised. Repeating its examples brought no clear gain: under two of the
# three seeds it did harm.
#
# ## The verdicts
#
# Each is computed from the rows: measure again and they may change.

# %%
findings = practice.findings(rows)
print()
for finding in findings:
    print(f"{finding.verdict:20s} {finding.advice}")
counts = {v: sum(f.verdict == v for f in findings) for v in ("as advised", "NOT as advised", "no clear difference")}
print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
assert sum(counts.values()) == len(findings)

# %% [markdown]
# Advice is an average over other people's models. On a model of a million parameters, with 40 steps, a base that has
# already read the task's texts, and Adam, some of it does not bite. What does carry over is the procedure: vary one
# thing, several seeds, look at the spread, then believe.
#
# ## The picture

# %%
figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
a, b, c, d, e, f = axes.flat
COLORS = {"full": "#0072B2", "lora": "#D55E00", "bottleneck": "#009E73"}


def curve_of(axis, xs, values, **style):
    """Means with the spread over seeds as bars."""
    values = np.array(values)  # [settings, seeds]
    axis.errorbar(xs, values.mean(axis=1), values.std(axis=1, ddof=len(SEEDS) > 1), capsize=3, marker="o", markersize=5, **style)


for method in ("full", "lora"):
    rates = practice.RATES[method]
    curve_of(a, rates, [over_seeds(rows, Rewriting(method, rate)) for rate in rates], label=method, color=COLORS[method])
a.axhline(task_before, color="grey", linestyle=":")
a.set(xscale="log", ylim=(2.4, 4.0), xlabel="learning rate", ylabel="held-out loss", title="Each method has its U")
for size, color in ((4, "#CC79A7"), (16, "#0072B2"), (64, "#333333")):
    runs = [s for s in practice.batch_size((0,)) if s.batch_size == size and s.accumulation == 1]
    curve_of(b, [s.learning_rate for s in runs], [over_seeds(rows, s) for s in runs], label=f"batch {size}, {640 // size} steps", color=color)
b.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title="640 examples, in small steps or large")
b.set_xticks([3e-4, 1e-3, 3e-3], ["3e-4", "1e-3", "3e-3"])
b.set_xticks([], minor=True)
for s in practice.epochs((0,)):
    curves = [row for row in rows if is_of(row, replace(s, seed=row["seed"]))]
    for key, line in (("held_out_curve", "-"), ("train_curve", "--")):
        values = np.array([row[key] for row in curves])
        xs = np.arange(1, values.shape[1] + 1)
        c.fill_between(xs, values.min(axis=0), values.max(axis=0), color=COLORS[s.method], alpha=0.2)
        c.plot(xs, values.mean(axis=0), line, color=COLORS[s.method], label=f"{s.method}, {'held out' if line == '-' else 'training'}")
c.set(xlabel="epoch", ylabel="loss", title="96 examples, again and again")
cases = [s for s in practice.warm_up((0,)) if s.warmup == 0]
for i, s in enumerate(cases):
    for share, color in ((0.05, "#E69F00"), (0.1, "#D55E00")):
        change = over_seeds(rows, replace(s, warmup=share)) - over_seeds(rows, s)
        d.plot(change, np.full(change.shape, i + 4 * (share - 0.075)), "o", color=color, label=f"{share:.0%} warm-up" if i == 0 else None)
d.set_yticks(range(len(cases)), [f"rate\n{s.learning_rate:g}" for s in cases])
d.set_ylim(-0.5, len(cases) - 0.5)
d.axvline(0, color="grey")
d.locator_params(axis="x", nbins=5)
d.set(xlabel="held-out loss minus that without warm-up", title="Warm-up: left is better, a dot a seed")
curve_of(e, list(noisy), list(noisy.values()), label="640 examples", color="#0072B2")
e.axhspan(clean.min(), clean.max(), color="#56B4E9", alpha=0.4, label="160 examples, all right")
e.set(xlabel="share of wrong examples", ylabel="held-out loss", title="Quantity and quality", xticks=[0, 0.25, 0.5])
cases = {"50% nouns": Classification(), "90% nouns": Classification(0.9), "90%, verbs\nrepeated": Classification(0.9, True)}
for kind, color in (("nouns", "#999999"), ("verbs", "#CC79A7")):
    values = [over_seeds(rows, s, f"recall_{kind}") for s in cases.values()]
    curve_of(f, list(cases), values, label=kind, color=color)
f.set(xlim=(-0.3, 2.3), ylabel="share that is found", ylim=(0, 1.05), title="A rare class, and a remedy")
for axis in axes.flat:
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
figure.savefig(OUT / "14_best_practices.png", dpi=120)
print("picture:", OUT / "14_best_practices.png")

# %% [markdown]
# ## Break it: judge by the training loss
#
# Everything above looks at held-out verses. Suppose somebody chooses the number of epochs by the loss that the training
# loop prints anyway.

# %%
for s in practice.epochs((0,)):
    curves = [row for row in rows if is_of(row, replace(s, seed=row["seed"]))]
    blind = [1 + int(np.argmin(row["train_curve"])) for row in curves]
    paid = np.array([row["held_out_curve"][epoch - 1] - min(row["held_out_curve"]) for row, epoch in zip(curves, blind)])
    print(f"{s.method}: the training loss says epoch {', '.join(map(str, blind))}; the held-out loss pays {spread(paid)}")
    assert all(epoch > 12 for epoch in blind) and (paid > 0.1).all(), "the training loss always asks for more"

# %% [markdown]
# ## Exercises
#
# 1. **A finer grid.** `measure(Rewriting("lora", 5e-3), ...)`: where is LoRA's optimum between the grid's points, and
#    does it change the verdict? Then double `r` (`mp.LoraConfig` in `minipeft/peft/methods.py`): does it move?
# 2. **More seeds.** Take one verdict that says *no clear difference*, or one whose difference is smaller than the
#    spread, and run seeds 3 to 9 of it. With ten coins, when would you believe a majority?
# 3. **Early stopping.** `mp.TrainingArguments(eval_steps=..., early_stopping_patience=...)` stops where the held-out
#    loss turns. How close does it come to the best epoch, and what does choosing by the held-out loss do to that loss
#    as a measure?
