# %% [markdown]
# # Lesson 15 · Forgetting: what is learned, and what it costs
#
# Fine-tuning asks for one thing, and nothing in its loss asks to keep the rest. So the rest gets worse: *catastrophic
# forgetting*. Everybody has a remedy: a lower rate, some of the old text in between, weight decay, dropout, a leash to
# the start, or LoRA, which "learns less and forgets less" (Biderman et al. 2024). This lesson puts all of them into one
# picture, with what is learned on one axis and what is forgotten on the other, and draws the frontier: the runs that no
# other run beats at both. The conclusion is what is measured.
#
# You need Lessons 3, 4 and 14. Run it with `python lessons/15_forgetting.py` (less than a minute on two cores), or open
# it as a notebook. It computes a few runs now, and reads the others, with three seeds each, from
# `lessons/results/15_forgetting.jsonl`. `python lessons/15_forgetting.py --full` (in a notebook `!python
# lessons/15_forgetting.py --full`) first computes those of the 66 runs that are missing there (all of them:
# about a quarter of an hour), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import forgetting
from experiments.forgetting import FULL, LORA, RATES, REMEDIES, frontier, point

import minipeft as mp
from minipeft.experiments import shipped
from minipeft.experiments.rows import complete, read_rows
from minipeft.experiments.run import evaluate, fine_tune
from minipeft.experiments.seeds import below, over_seeds, spread
from minipeft.experiments.shipped import Rewriting
from minipeft.experiments.sweep import sweep
from minipeft.peft.methods import METHODS

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "15_forgetting.jsonl"

if "--full" in sys.argv:
    sweep(forgetting.run, forgetting.RUNS, executor=1, store=RESULTS)
rows, SEEDS = complete(read_rows(RESULTS), forgetting.RUNS)
base, tokenizer = mp.load_base()
small = {"steps": 2, "held_out": 8, "blocks": 2} if REDUCED else {}
task_before, general_before = shipped.before()
print(f"{len(rows)} runs were measured, with the seeds {SEEDS}; the base: task loss {task_before:.3f}, general loss {general_before:.3f}")

# %% [markdown]
# ## 1 · Two numbers
#
# The task is Lesson 3's, King James English to plain English. What the base could do before is its loss on held-out
# text of all that it was trained on: two Bibles, novels, a dictionary. With $\theta_0$ the base and $\theta$ a
# fine-tuned model,
#
# $$\text{learned} = L_\text{task}(\theta_0) - L_\text{task}(\theta), \qquad
# \text{forgotten} = L_\text{general}(\theta) - L_\text{general}(\theta_0).$$
#
# Here is one run of full fine-tuning, now.

# %%
settings = replace(FULL, **small)
data = shipped.data(settings)
row, tuned = fine_tune(base, data, settings)
start = evaluate(base, data)
print(f"\nnow: learned {start[0] - row['task_loss']:.3f}, forgotten {row['general_loss'] - start[1]:.3f} nats a token")
if not REDUCED:
    there = point([r for r in rows if r["seed"] == 0], FULL)
    print(f"as measured before: learned {task_before - there[0]:.3f}, forgotten {there[1]:.3f}")
    assert abs(row["task_loss"] - there[0]) < 0.02 and abs(row["general_loss"] - start[1] - there[1]) < 0.04

# %% [markdown]
# ## 2 · Why it is paid for: the way back
#
# Walk on the straight line from the base to the tuned model, $\theta_t = \theta_0 + t\,(\theta - \theta_0)$. The base
# is near a minimum of its own loss, where the gradient is about zero, so with the Hessian $H$ of that loss
#
# $$\text{forgotten}(t) \approx \tfrac12\, t^2\, (\theta - \theta_0)^\top H\, (\theta - \theta_0),$$
#
# a parabola: the first half of the way costs a quarter. The task's gradient at $\theta_0$ is *not* zero, so what is
# learned starts like a straight line. The first steps of the way are cheap, the last ones dear.

# %%
def between(t, far):
    """The base with its weights moved by the share t of the way to those of `far`."""
    model = base.copy()
    for p, q in zip(model.parameters(), far.parameters()):
        p.data += t * (q.data - p.data)
    return model


ts = [0.0, 0.25, 0.5, 0.75, 1.0]
line = np.array([evaluate(between(t, tuned), data) for t in ts])  # [ts, (task, general)]
learned, forgotten = line[0, 0] - line[:, 0], line[:, 1] - line[0, 1]
print("\nof the way    learned    forgotten    a parabola's")
for t, gain, loss in zip(ts, learned, forgotten):
    print(f"{t:10.0%} {gain:10.3f} {loss:12.3f} {t * t * forgotten[-1]:15.3f}")
if not REDUCED:
    assert learned[2] > learned[-1] / 2, "half of the way brings more than half"
    assert forgotten[2] < forgotten[-1] / 2, "and costs less than half"

# %% [markdown]
# So whatever makes the way shorter is a remedy of sorts: going only half of it (averaging the weights of base and tuned
# model is known as WiSE-FT, Wortsman et al. 2022), fewer steps, a lower rate, a leash. The question is only what is
# lost in learning, and whether something does better than a shorter way.
#
# ## 3 · Methods and rates
#
# Every method at several rates, three seeds each. Full fine-tuning, LoRA and adapters start as the base itself, so a
# low rate stays near it: little learned, little forgotten. Raising it draws a curve, from the base down in the task's
# loss and up in what is forgotten; the less it rises on the way, the better. Prompts and prefixes start elsewhere:
# before the first step there are already 20 positions in front of every text that the base has never seen.

# %%
points = {method: [point(rows, Rewriting(method, rate)) for rate in rates] for method, rates in RATES.items()}
print("\n(task loss, forgotten) at each rate, means over the seeds")
for method, rates in RATES.items():
    cells = (f"{rate:g}: ({x:.2f}, {y:+.2f})" for rate, (x, y) in zip(rates, points[method]))
    print(f"  {METHODS[method].title:14s}", "  ".join(cells))
for method in ("full", "lora"):
    losses, costs = np.array(points[method]).T
    assert (np.diff(costs[: losses.argmin() + 1]) > 0).all(), "up to the best rate, a higher rate forgets more"
slow, fast = (over_seeds(rows, Rewriting("prompt", rate), "forgotten") for rate in RATES["prompt"])
print(f"prompts forget {spread(slow)} at the lower rate, {spread(fast)} at the higher")
assert below(fast, slow) is None, "with prompts the rates do not differ by more than the seeds do"
edge = frontier([(task_before, 0.0)] + [p for several in points.values() for p in several])
names = {p: f"{METHODS[m].title} at {rate:g}" for m, rates in RATES.items() for rate, p in zip(rates, points[m])}
print("on the frontier:", ", ".join(f"{names[p]} ({p[0]:.2f}, {p[1]:+.2f})" for p in edge if p in names))
assert all(not (q[0] < p[0] and q[1] < p[1]) for p in edge for q in names), "nothing beats a point of the frontier at both"

# %% [markdown]
# ### Does LoRA forget less?
#
# Compared at its usual rate with full fine-tuning at its own, it may; but it also may have learned less, and a lower
# rate does the same. The fair question is the price of the *same* learning: how much is forgotten where the task's loss
# has come down to a given value? Read it off the lines between the points, for each seed. Where a method's lowest rate
# has already come down further, the line is the one from the base. The true curve bends below it (section 2), so such a
# price, marked "≤", is at most that.

# %%
levels = (2.8, 2.7, 2.6, 2.55)
prices = {m: {level: forgetting.price(rows, m, level) for level in levels} for m in RATES}
print("\nforgotten where the task loss is" + "".join(f"{level:>18}" for level in levels))
for m in RATES:
    marks = ["≤ " if points[m][0][0] < level else "" for level in levels]
    known = [not np.isnan(prices[m][level]).any() for level in levels]
    cells = [mark + spread(prices[m][level]) if k else "not reached" for k, mark, level in zip(known, marks, levels)]
    print(f"  {METHODS[m].title:30s}" + "".join(f"{cell:>18s}" for cell in cells))
print()
verdicts = []
for level in levels:
    lora, full = prices["lora"][level], prices["full"][level]
    verdicts.append(below(lora, full))
    verdict = {True: "less", False: "MORE", None: "neither clearly less nor more"}[verdicts[-1]]
    more = ", ".join(f"{x:+.3f}" for x in lora - full)
    print(f"at a task loss of {level}: LoRA forgets {verdict} than full fine-tuning, by seed {more}")
assert verdicts == [None, False, None, None]
assert (prices["lora"][2.8] > prices["full"][2.8]).all() and (prices["lora"][2.55] < prices["full"][2.55]).all()
(lora, lora_forgot), (full, full_forgot) = ([over_seeds(rows, s, key) for key in ("task_loss", "forgotten")] for s in (LORA, FULL))
print(f"each at its best rate: LoRA's task loss is {spread(lora - full)} above full's;")
print(f"it forgets {spread(lora_forgot)}, full fine-tuning {spread(full_forgot)}")
assert below(lora, full) is None and below(2 * lora_forgot, full_forgot)

# %% [markdown]
# It depends on how much is to be learned. At 2.8 and 2.7 LoRA forgets *more* than full fine-tuning at a low rate under
# every seed, at 2.7 by enough for a verdict. At 2.6 the seeds disagree. At 2.55 it forgets *less* under every seed, 0.20
# against 0.27, and there the seeds of full fine-tuning lie too far apart for a verdict. The gain comes at the very end
# of the way: each at its best rate, neither learns clearly more, and LoRA forgets less than half. So "learns less and
# forgets less" is not what is measured here: in its range LoRA is no cheaper, and then it does not pay the price of the
# last step.
#
# This holds for a model of 1.4 million parameters, after 40 steps. The claim was made for models of 7 billion after
# billions of tokens, where full fine-tuning can go very far from the base.
#
# ## 4 · The remedies
#
# All but the last on full fine-tuning at its usual rate, so that something is there to be saved:
#
# - **lower rate**;
# - **replay**: for every four verses, one block of 64 tokens of the base's own training text (or one for each);
# - **weight decay**, decoupled (AdamW): each step $w \leftarrow (1 - \eta \lambda)\, w$, towards *zero*;
# - **dropout** in the base;
# - **L2-SP** (Li et al. 2018), a leash: $\frac{\alpha}{2} \lVert \theta - \theta_0 \rVert^2$ in the loss, towards the
#   *start*;
# - **LoRA**, and LoRA with replay.

# %%
def strength(s):
    """What is special about these settings."""
    usual = LORA if s.method == "lora" else FULL
    found = [f"{k.replace('_', ' ')} {getattr(s, k):g}" for k in ("learning_rate", "replay", "weight_decay", "dropout", "l2_start") if getattr(s, k) != getattr(usual, k)]
    return ", ".join(found) or "-"


by_rates = np.array([over_seeds(rows, Rewriting("full", rate)) for rate in RATES["full"]]).min(axis=0)  # best, by seed
saved = {}
print(f"\n{'remedy':14s}{'strength':24s}{'task loss':>17s}{'forgotten':>17s}   against the same learning by a lower rate")
for name, several in REMEDIES.items():
    for s in several:
        loss, cost = over_seeds(rows, s), over_seeds(rows, s, "forgotten")
        print(f"{name:14s}{strength(s):24s}{spread(loss):>17s}{spread(cost):>17s}", end="   ")
        if name in ("none", "lower rate"):
            print("-")
            continue
        lower = forgetting.price(rows, "full", np.maximum(loss, by_rates))
        saved[f"{name} ({strength(s)})" if strength(s) != "-" else name] = lower - cost
        print({True: "forgets less", False: "forgets more", None: "no clear difference"}[below(cost, lower)], f"({spread(lower)})")
print("\nwhat a remedy saves, beyond a lower rate for the same learning, from the best to the worst:")
for name, by_seed in sorted(saved.items(), key=lambda item: -item[1].mean()):
    print(f"  {name:28s} {spread(by_seed):>16s}{'' if (by_seed > 0).all() or (by_seed < 0).all() else '   (the seeds disagree)'}")
for s in REMEDIES["replay"]:
    assert below(over_seeds(rows, s, "forgotten"), over_seeds(rows, FULL, "forgotten")), "replay saves something, under every seed"
zero = np.zeros(len(SEEDS))
worth = {name: below(zero, by_seed) for name, by_seed in saved.items()}
better, worse = ({name for name, clear in worth.items() if clear is which} for which in (True, False))
assert better == {"L2-SP (l2 start 0.3)", "LoRA", "LoRA, replay (replay 0.25)", "replay (replay 1)"}
assert worse == {"weight decay (weight decay 10)", "dropout (dropout 0.1)"}
assert (saved["replay (replay 0.25)"] < 0).all(), "a little replay: worse under every seed, if not clearly"
(leash,), (decay,) = REMEDIES["L2-SP"], REMEDIES["weight decay"]
assert (over_seeds(rows, leash) < over_seeds(rows, FULL)).all(), "on the leash the task is learned no worse"
assert below(over_seeds(rows, FULL, "forgotten"), over_seeds(rows, decay, "forgotten")), "weight decay makes it worse"

# %% [markdown]
# The last column is the test: a remedy that only slows learning down lies on the line of the lower rates. One that
# forgets *less than a lower rate would for the same learning* is worth its trouble. Measured:
#
# - **L2-SP** wins outright. It forgets 0.14 instead of 0.46, and the task's loss is not higher for it (a little lower,
#   under every seed). It knows where it came from, and nothing else, and here that is enough.
# - **LoRA** comes next, alone and with replay.
# - **Replay** is better than a lower rate where there is as much of it as of the task. A quarter as much forgets less
#   than none, but *more* than a lower rate would, under every seed. It knows some of the old text, and pays for it with
#   steps that take longer.
# - **Dropout** and **weight decay** are worse than a lower rate by far; weight decay even forgets more than no remedy.
#   It knows nothing: zero is no place the base has ever been.
#
# Each was tried in one strength or two. Another one may do better.

# %%
everything = {**names, **{point(rows, s): f"{name} ({strength(s)})" for name, several in REMEDIES.items() for s in several if strength(s) != "-"}}
edge_all = frontier([(task_before, 0.0), *everything])
print("\nthe frontier of everything, from the best at the task to the base:")
for p in edge_all:
    print(f"  task loss {p[0]:.3f}, forgotten {p[1]:+.3f}: {everything.get(p, 'the base')}")
assert (task_before, 0.0) in edge_all, "the base itself forgets nothing"
assert len(edge_all) > 2 and edge_all[0] == point(rows, leash), "the best at the task is on the leash"

# %% [markdown]
# ## The picture
#
# Left, methods over their rates; right, the remedies. Lower is better, and further left is better; the black steps are
# the frontier. Only the methods that start as the base have a line from it.

# %%
figure, (a, b) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained", sharey=True)
COLORS = dict(zip(RATES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")))


def steps(axis, edge):
    """The frontier as a staircase: everything above and to the right of it is beaten."""
    xs, ys = np.array(edge).T
    axis.step(xs, ys, where="post", color="black", linewidth=1, alpha=0.7, label="frontier")


a.plot(task_before, 0.0, "ko", markersize=5, label="the base")
for method, rates in RATES.items():
    from_base = [] if method in ("prompt", "prefix") else [(task_before, 0.0)]
    a.plot(*zip(*from_base, *points[method]), "o-", color=COLORS[method], markersize=5, label=METHODS[method].title)
    for rate in rates:
        s = Rewriting(method, rate)
        a.plot(over_seeds(rows, s), over_seeds(rows, s, "forgotten"), ".", color=COLORS[method], markersize=3)
    best = int(np.argmin([x for x, _ in points[method]]))
    place = {"full": (-34, 5), "prompt": (-27, -3)}.get(method, (6, 5))
    a.annotate(f"{rates[best]:g}", points[method][best], xytext=place, textcoords="offset points", fontsize=8, color=COLORS[method])
steps(a, edge)
b.plot(*zip((task_before, 0.0), *points["full"]), "-", color="0.7", label="full, over its rates")
for (name, several), marker, color in zip(REMEDIES.items(), "oDsv^PX*", ("black", *plt.cm.tab10.colors)):
    for s in several:
        x, y = point(rows, s)
        b.errorbar(x, y, *(over_seeds(rows, s, key).std(ddof=len(SEEDS) > 1) for key in ("forgotten", "task_loss")), marker=marker, color=color, linestyle="", markersize=7, label=name if s is several[0] else None)
        b.annotate(strength(s) if strength(s) != "-" else "", (x, y), xytext=(7, 3), textcoords="offset points", fontsize=7)
steps(b, edge_all)
limit = max(y for x, y in map(lambda s: point(rows, s), (s for several in REMEDIES.values() for s in several)))
xs = [point(rows, s)[0] for several in REMEDIES.values() for s in several]
a.set(xlim=(2.4, task_before + 0.1), ylim=(-0.03, 1.6 * limit), title="Methods, each over its learning rates (its best is labelled)", ylabel="forgotten: rise of the loss on general text")
b.set(xlim=(min(xs) - 0.05, max(xs) + 0.2), title="Remedies for full fine-tuning")
for axis in (a, b):
    axis.set_xlabel("held-out loss on the task (left is better)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
figure.savefig(OUT / "15_forgetting.png", dpi=120)
print("picture:", OUT / "15_forgetting.png")

# %% [markdown]
# ## Break it: too far to walk back
#
# Half of the way back was a bargain in section 2, because the base's valley and the tuned model's are one. Fine-tune at
# ten times the rate, and try the same.

# %%
settings = replace(FULL, learning_rate=1e-2, **small)
row, wrecked = fine_tune(base, data, settings)
line = np.array([evaluate(between(t, wrecked), data) for t in ts])
print("\nof the way    task loss    general loss")
for t, (task_loss, general_loss) in zip(ts, line):
    print(f"{t:10.0%} {task_loss:12.3f} {general_loss:15.3f}")
prompt = "It was a fine morning, and"
for name, model in (("the base", base), ("tuned at 1e-3", tuned), ("tuned at 1e-2", wrecked)):
    text = tokenizer.decode(model.generate([tokenizer.encode(prompt)], max_new_tokens=20)[0], skip_special_tokens=True)
    print(f"{name:14s} {text!r}")
if not REDUCED:
    assert line[-1, 1] - line[0, 1] > 3 * forgotten[-1], "it forgot far more"
    assert line[-1, 0] > row["task_loss"] - 1e-6 and line[:, 0].min() > start[0] - learned[-1], "and no point on the way is as good at the task"

# %% [markdown]
# ## Exercises
#
# 1. **Which text to replay?** `shipped.general_blocks` takes all corpora. Replay only novels: is the Bible's English,
#    which the task is near to anyway, kept all the same? What is kept of the dictionary?
# 2. **A leash that knows what matters.** L2-SP holds every weight alike. Elastic weight consolidation (Kirkpatrick et
#    al. 2017) weighs each by the mean square of its gradient on old text. Write it as a loss for the Trainer (see
#    `l2_sp` in `minipeft/experiments/run.py`) and put its point into the picture.
# 3. **Averaging as a method.** Give the points of section 2, $t = 0.25 \dots 1$, a line of their own in the picture. Is
#    walking back part of the way from a higher rate better than having gone at a lower one?
