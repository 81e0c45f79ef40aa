# %% [markdown]
# # Lesson 19 · Merging: adding what was learned
#
# Two adapters were trained on one base, each for its task. Can one model have both, without training again? And into
# which weights should an adapter be merged that was trained beside four-bit weights? This lesson merges by task
# arithmetic, TIES and DARE, by hand and with PEFT's options, measures what each loses, and chooses the base.
#
# You need Lessons 4 (LoRA), 7 (QLoRA) and 0 (section 9, intervals). Reading takes about 25 minutes (200 words or 25
# lines of code a minute, up to the quiz). Run it with `python lessons/19_merging.py` (a minute on two cores), or open
# it as a notebook. It trains the adapters of one seed now, and reads the losses of five from
# `lessons/results/19_merging.jsonl`; `--full` first computes those that are missing there (all: twenty minutes).
# Where a line begins with **Predict**, write down your answer; the next cell computes it.
#
# Environment: `MINIPEFT_REDUCED=1` trains 2 steps; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

# %%
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import items, merging, sweep
from experiments.items import below, ratio, spread
from experiments.merging import DENSITIES, NEGATIVE, PARTS, RULES, SCALES, TASKS, Merge

import minipeft as mp
from minipeft import diagrams
from minipeft.claims.statistics import crossed
from minipeft.experiments.rows import complete, read_rows
from minipeft.peft.combine import Combination
from minipeft.quant import quantize_model

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "19_merging.jsonl"
if REDUCED:
    print("REDUCED SETTING: the adapters that are trained now take 2 steps of 2 records for 40 of 8, so the distances of sections 4")
    print("and 6 and the shares of section 8 are not those of the text. The rows, and what is said of them, are the full lesson's.\n")

if "--full" in sys.argv:
    sweep(merging.run, merging.RUNS, RESULTS)
rows, SEEDS = complete(read_rows(RESULTS), merging.RUNS)
base, tokenizer = mp.load_base()
TOKENS = {task: items.tokens(merging.tested_on(task, Merge().test)) for task in merging.EVERYTHING}
print(f"{len(rows)} rows, seeds {SEEDS}, {', '.join(f'{len(n)} of {task}' for task, n in TOKENS.items())}")
assert len(rows) == 10 and {len(n) for n in TOKENS.values()} == {512}

# %% [markdown]
# ## 1 · Task vectors: four numbers
#
# Let a model have four weights, all 10. Two fine-tunes change them as the drawing says, in its first two rows.

# %%
diagrams.ties((4, 1, -5, 0.5), (-1, 2, 3, 0.5), density=0.5).savefig(OUT / "19_merging_ties.png")

# %% [markdown]
# A model is its weights, a long vector $\theta$. What fine-tuning on task $t$ has changed is the **task vector**
#
# $$\tau_t = \theta_t - \theta_0 .$$
#
# *Task arithmetic* (Ilharco et al. 2022, arXiv:2212.04089) computes with it: **add** several, to have all their tasks,
# or **subtract** one, to have less of its task,
#
# $$\theta = \theta_0 + \lambda \sum_t \tau_t , \qquad \theta = \theta_0 - \lambda \tau_t .$$
#
# $\lambda$ is a scale, chosen on validation data. All $\tau_t$ must start from one $\theta_0$, so that the same
# weight has the same role in each. (In a base trained from other random weights the same unit does something else.)
# The average of two fine-tuned models is $\lambda = \frac12$. (*Model soups* are averages of models fine-tuned on
# *one* task with different settings; Wortsman et al. 2022, arXiv:2203.05482.)
#
# Why may a sum work at all? The sum has each task if $\tau_t$ changes the outputs for inputs of task $t$, and hardly
# those for the inputs of the others. Ortiz-Jimenez et al. (2023, arXiv:2305.12827) call this *weight disentanglement*
# and find that pre-training brings it about. Nothing guarantees it, so section 5 measures. For LoRA, $\tau$ of a matrix
# is $\frac{\alpha}{r} B A$, and a merge (Lesson 4, section 8) is the case of one adapter and $\lambda = 1$.
#
# **Predict:** look at the sum, the third row. Which weights move in the direction that *both* tasks wanted, and which
# do not?

# %%
theta_0 = np.full(4, 10.0)
tau = np.array([[4, 1, -5, 0.5], [-1, 2, 3, 0.5]])
total = theta_0 + tau.sum(axis=0)
print("task 1:", theta_0 + tau[0], " task 2:", theta_0 + tau[1], " both:", total, " less of task 1:", theta_0 - tau[0])
assert total.tolist() == [13, 13, 8, 11]
assert np.array_equal(total - tau[1], theta_0 + tau[0]), "what was added can be taken away again"

# %% [markdown]
# The second and the fourth: both tasks agree on the sign. The first gives task 1 three quarters of what it wanted,
# $+4$, and moves against task 2; the third gives it less than half, $-2$ of $-5$, against task 2's $+3$.
# **Interference** is what a task loses because the update of another was added. TIES' paper names two causes: signs
# that disagree, as here, and small changes of one task that disturb another and help none. Section 5 measures it as the
# rise of a task's test loss over its own adapter alone at the same scale, so net of what the other may help.
#
# ## 2 · TIES: trim, elect, average what agrees
#
# TIES (Yadav et al. 2023, arXiv:2306.01708) has three steps, the lower half of the drawing.
#
# 1. **Trim**: of each task vector keep the largest numbers by magnitude, a share called the *density* (20 % in the
#    paper); the others become 0. The paper trims a whole task vector; PEFT, and so this lesson, trims each matrix.
# 2. **Elect a sign** for each weight: that of the sum of what is left. (PEFT's `majority_sign_method="frequency"`
#    counts signs instead. A sum of 0 elects plus, and where nothing is left $\tau$ is 0.)
# 3. **Disjoint mean**: average those numbers that have the elected sign, and leave out the others, zeros included.
#
# $$\tilde\tau_t = \text{trim}(\tau_t), \qquad \gamma = \text{sign}\Big(\sum_t \tilde\tau_t\Big), \qquad
# \tau = \frac{\sum_{t:\ \text{sign}(\tilde\tau_t) = \gamma} \tilde\tau_t}{\text{number of them}} , \qquad \theta =
# \theta_0 + \lambda \tau .$$
#
# **Predict:** the third weight gets $-5$ and $+3$, the first $4$ and, after trimming, nothing. What comes out?

# %%
trimmed = np.where(np.abs(tau) >= np.sort(np.abs(tau), axis=1)[:, [2]], tau, 0)  # of four numbers the two largest
elected = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
agree = np.sign(trimmed) == elected
by_hand = (trimmed * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
library = Combination("ties", density=0.5).combine(np.float32(tau), [1, 1])
print("TIES:", by_hand)
assert np.array_equal(by_hand, library) and by_hand.tolist() == [4, 2, -5, 0]

# %% [markdown]
# $-5$ and $4$. Where only one task has a number left, its number is kept and not halved: the mean is over *agreeing*
# numbers. Where two tasks' signs disagree, the larger one wins and the other task gets nothing. (Of 3, $-2$ and $-2$
# the minus wins.)
#
# ## 3 · DARE: drop at random, and rescale
#
# DARE (Yu et al. 2023, arXiv:2311.03099) makes task vectors sparse at random, so that fewer weights are changed by two
# tasks. It drops each number with probability $p$ and divides those that stay by the density $d = 1 - p$:
#
# $$\tilde\tau = \frac{m\, \tau}{d}, \quad m \in \{0, 1\},\ P(m = 1) = d: \qquad
# \mathbb{E}[\tilde\tau] = \tau, \qquad \text{Var}[\tilde\tau] = \frac{d}{d^2} \tau^2 - \tau^2 = \frac{1 - d}{d}\,
# \tau^2 .$$
#
# So the mean over all draws is right, and one draw has a **variance** that grows without bound as $d$ falls. Four
# numbers have 16 masks, all equally likely at $d = \frac12$, so the mean and the variance can be computed exactly.

# %%
masks = np.array(list(itertools.product([0, 1], repeat=4)))
drawn = masks * tau[0] / 0.5  # [16, 4]
print("first three of 16:", *drawn[1:4], " mean of all:", drawn.mean(axis=0), " variance:", drawn.var(axis=0))
assert np.array_equal(drawn.mean(axis=0), tau[0]) and np.array_equal(drawn.var(axis=0), tau[0] ** 2)
one = Combination("dare_linear", density=0.5).thin("dare_linear", np.float32(tau[0]))
assert all(x in (0, 2 * t) for x, t in zip(one, tau[0])), "the library draws one of them"

# %% [markdown]
# Sum these variances: on average over the draws, the noise's squared length is $\frac{1 - d}{d}$ times the vector's
# own. So at $d = \frac12$ the noise is about as long as the vector, at $d = 0.1$ three times as long. Section 6
# measures what that costs.
#
# ## 4 · Adapters: two factors in place of one vector
#
# An adapter stores its $\tau$ as two factors, $B$ and $A$; call its scaling $s = \alpha / r$. PEFT's
# `add_weighted_adapter` makes one adapter of several with weights $w_i$, and `combination_type` says how:
#
# | type | what is made | the sum of the products? |
# |---|---|---|
# | `cat` | $[B_1\ B_2]$ beside $[w_1 s_1 A_1;\ w_2 s_2 A_2]$, rank $r_1 + r_2$ | exactly |
# | `svd` | the best approximation of the sum that has rank $r$ | no: its smaller singular values are left out |
# | `linear` | $A = \sum \sqrt{w_i s_i} A_i$, $B = \sum \sqrt{w_i s_i} B_i$, rank $r$ | no: cross terms |
# | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | the rule on each *factor*, weighted as in `linear` | no |
# | `ties_svd` and so on | the rule, weighted, on the products $s_i B_i A_i$, then the nearest matrix of rank `svd_rank` | no |
#
# (`magnitude_prune` is TIES' trimming alone, `dare_ties` TIES with DARE's dropping in place of the trimming. Of a
# negative $w_i$ `linear` takes the root of its size, and gives the minus to $A_i$ alone, as on both factors it would
# cancel.) A trimmed product is not of low rank, so the last row loses what a rank of `svd_rank` cannot hold; its
# default is the adapters' $r$. **Whole matrices** below is the last row with `svd_rank=128`, the width of this model:
# nothing is cut off, and the rule acts on $\tau$ itself. The **cross terms** of `linear`, for $w_i s_i = 1$:
#
# $$(B_1 + B_2)(A_1 + A_2) = B_1 A_1 + B_2 A_2 + \underbrace{B_1 A_2 + B_2 A_1}_{\text{nobody trained these}} .$$
#
# If $A_1$ and $A_2$ started from different seeds, they are nearly orthogonal. But two runs of one script with one seed
# start with the *same* $A$, and it changes little: then $A_1 \approx A_2$.
#
# **Predict:** what is the product then? Three adapters are trained now: `rewrite` (King James to plain English),
# `define` (a word to its meaning), and `same`, `define` again with `rewrite`'s initial $A$. Each is LoRA with $r = 8$
# on all linear layers, 40 steps of 8 records.

# %%
settings = Merge(steps=2, batch_size=2, validation=4, test=8) if REDUCED else Merge()
model = merging.adapters(settings)
updates = {name: merging.deltas(model, name) for name in (*TASKS, "same")}


def flat(update):
    """All matrices of an update as one vector, float64."""
    return np.concatenate([update[path].reshape(-1) for path in sorted(update)]).astype(float)


def combined(other, how):
    """(||M - S|| / ||S||, <M, S> / <S, S>) of a merged adapter M and the sum S of the two products."""
    model.add_weighted_adapter(["rewrite", other], [1.0, 1.0], "merged", **how)
    M, S = flat(merging.deltas(model, "merged")), flat(updates["rewrite"]) + flat(updates[other])
    model.delete_adapter("merged")
    return float(np.linalg.norm(M - S) / np.linalg.norm(S)), float(M @ S / (S @ S))


measured = {name: combined(*rule) for name, rule in RULES.items()}
print(f"\n{'weights 1 and 1':24s}distance to the sum    times the sum")
for name, (distance, times) in measured.items():
    print(f"  {name:22s}{distance:19.3f}{times:17.2f}")
a, b = flat(updates["rewrite"]), flat(updates["define"])
cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
print(f"cosine of the two updates: {cosine:.3f}")
assert measured["cat"][0] < 1e-5 < measured["svd"][0] < measured["linear"][0] and (REDUCED or 0.3 < measured["svd"][0] < 0.4)
assert all(min(D.shape) <= RULES["ties, whole matrices"][1]["svd_rank"] for D in updates["rewrite"].values()), "no rank is cut off"
assert abs(measured["linear, same start"][1] - 2) < 0.4 and abs(measured["linear"][1] - 1) < 0.2

# %% [markdown]
# With the same start, $(B_1 + B_2)(A + A) = 2\,(B_1 + B_2)\,A$: `linear` makes about *twice* the sum. With different
# starts it makes once the sum, plus cross terms, about as long and nearly orthogonal to it. TIES on products makes
# less than the sum, because it keeps one number in five here, and averages where both tasks have one left; on factors
# still less, because both factors are trimmed. DARE with a plain sum makes once the sum, with noise. (Densities, 0.2
# for TIES and 0.5 for the others, were not chosen on validation.) So a weight of 1 means another length under each
# rule, and weights have to be chosen for each rule.
#
# ## 5 · Does it work?
#
# Each of five seeds draws its training records, its starts, DARE's masks and 64 validation records of each task; the
# 512 test records of each are the same for all (of `rewrite`, Lesson 3's, longer than those of training). The
# validation records choose one weight for both adapters, of 0.375, 0.5, 0.75, 1, 1.5 and 2. There are four controls:
# the base; either adapter alone; **joint** training of one adapter of rank 8 on both tasks (the same records, in 40
# steps of 16); and, because a weight changes the length of an update, each adapter alone at other scales. Intervals are
# of 95 %, over seeds and test records together.
#
# **Predict:** two adapters, tasks with different prompts. Is the sum at full scale, $\lambda = 1$, better at `rewrite`
# than half of each? And which rule is best?

# %%
def loss(name, task="rewrite", what="tasks"):
    """Test losses [seeds, records] of a model of the rows."""
    mine = sorted((row for row in rows if row["what"] == what), key=lambda row: row["seed"])
    return items.per_token([row["losses"][name][task] for row in mine], TOKENS[task])


def both(name, other=None):
    """The mean of the two tasks' losses, [seeds, records of both]."""
    return items.both(loss(name, "rewrite"), loss(other or name, "define"))


def word(a, b):
    return {True: "better", False: "worse"}.get(below(a, b), "undecided")


chosen = {name: sorted({row["weights"][name] for row in rows if row["what"] == "tasks"}) for name in RULES}
print(f"\n{'':22s}{'rewrite':>22s}{'define':>22s}{'mean minus cat':>25s}             weights chosen")
for name in ("base", "rewrite 1.0", "define 1.0", "joint", *sorted(RULES, key=lambda name: both(name).mean())):
    beside = f"{spread(both(name) - both('cat')):>25s}  {word(both(name), both('cat')):11s}" if name != "cat" else ""
    print(
        f"  {name:20s}{spread(loss(name)):>22s}{spread(loss(name, 'define')):>22s}{beside}"
        + (f"{', '.join(map(str, chosen[name])):>14s}" if name in RULES else "")
    )
assert below(both("cat"), both("base")) and below(both("cat"), both("rewrite 1.0")) and below(both("cat"), both("define 1.0"))
assert below(both("joint"), both("cat")), "training on both is better than the sum"
clear = [name for name in RULES if below(both(name), both("cat"))]
print("clearly better than cat:", ", ".join(clear) or "no rule")
on_factors = [name for name, (_, how) in RULES.items() if not how["combination_type"].endswith(("cat", "svd"))]
worse, at_995 = ({name for name in RULES if below(both("cat"), both(name), level)} for level in (0.95, 0.995))
assert not clear and worse == {*on_factors, "dare, whole matrices", "svd"} - {"linear, same start"}
assert at_995 == worse - {"magnitude_prune"}
assert below(both("ties, whole matrices"), both("sum 1.0")), "TIES at 1 beats the sum at 1"
kept = ratio(both("base") - both("cat"), both("base") - both("rewrite 1.0", "define 1.0"))
print(f"the sum keeps {spread(kept)} of what each adapter gains on its own task")
print("the sum at 1 minus the sum at 0.5:", *(f"{task} {spread(loss('sum 1.0', task) - loss('sum 0.5', task))}" for task in TASKS))
assert 0.88 < kept.low and kept.high < 0.94 and 0.03 < (both("cat") - both("joint")).mean() < 0.07
assert all(below(loss("sum 0.5", task), loss("sum 1.0", task)) for task in TASKS), "full scale is worse than half"
assert items.within(both("svd") - both("cat"), 0.01) and not below(both("sum 0.75"), both("ties, whole matrices"))
assert merging.WEIGHTS == (0.375, 0.5, 0.75, 1, 1.5, 2)
print("\nscale  task         alone                 with the other        difference")
for t in SCALES:
    for task in TASKS:
        alone, summed = loss(f"{task} {t}", task), loss(f"sum {t}", task)
        print(f"{t:5g}  {task:9s}", *(f"{spread(x):21s}" for x in (alone, summed, summed - alone)))
for task in TASKS:
    assert below(loss(f"{task} 1.0", task), loss("sum 1.0", task)) and below(loss("sum 0.75", task), loss("sum 1.0", task))
    rise = {t: loss(f"sum {t}", task) - loss(f"{task} {t}", task) for t in SCALES}
    assert 0.09 < crossed(rise[1.0]).low and crossed(rise[1.0]).high < 0.15 and ratio(rise[0.5], rise[1.0]).high < 1 / 2
    assert ratio(rise[0.75], rise[1.0]).high < 3 / 4
    assert items.within(loss(f"{task} 0.75", task) - loss(f"{task} 1.0", task), 0.03)
for task, other in zip(TASKS, TASKS[::-1]):
    first, second = loss(f"{other} 0.25", task) - loss("base", task), loss("sum 0.25", task) - loss(f"{task} 0.25", task)
    print(f"a quarter of {other} changes the loss on {task} by {spread(first)} alone, by {spread(second)} beside a quarter of {task}")
    assert crossed(first).high < -0.1 and items.within(second, 0.02)
if not REDUCED:
    nats = merging.losses(merging.merged(model, list(TASKS), [0.75, 0.75], combination_type="cat"), settings)
    now = {task: sum(values) / TOKENS[task].sum() for task, values in nats.items()}
    print("\nnow, seed 0, the sum at 0.75:", ", ".join(f"{task} {value:.3f}" for task, value in now.items()))
    assert all(abs(value - loss("sum 0.75", task)[0].mean()) < 0.05 for task, value in now.items())

# %%
curves = {
    (task, kind): [loss("base", task).mean(), *(loss(f"{name} {t}", task).mean() for t in SCALES)]
    for task in TASKS
    for kind, name in (("alone", task), ("in a sum", "sum"))
}
merging.sum_picture(curves, {task: loss("joint", task).mean() for task in TASKS}).savefig(OUT / "19_merging_sum.png", dpi=130)

# %% [markdown]
# - **The sum works.** At 0.75, chosen on validation, it keeps about nine tenths of what the adapters gain on their own
#   tasks, in the mean of both.
# - **Full scale is worse than half**, on either task. The larger the scale, the larger the interference: about 0.12
#   nats at 1 on either task, less than half of that at 0.5. Alone, 0.75 of an adapter is about as good as all of it. So
#   0.75 loses little of each update and avoids over a quarter of the interference.
# - **Joint training is better**, by about 0.05 nats a token. But it needs the training data of both tasks at once; a
#   merge only validation records, for its weight. Where one model need not have both tasks, keep the adapters and
#   choose one a request (Lesson 4, section 9).
# - **No rule is clearly better than the sum**, each at its chosen weight. TIES on products is undecided. `svd`, which
#   halves the rank, is clearly worse, but by less than 0.01, though in section 4 it is a third of the sum's length away
#   from it. DARE on whole matrices is worse, and so are the rules on factors but one: `linear, same start` is
#   undecided. It merges another adapter, and its weight is the lowest tried, so a lower one may be better. (If the
#   intervals of all ten rules beside the sum are to hold together 19 times in 20, each has the level 99.5 %. Then
#   `magnitude_prune` is undecided, too.) Compare rules at their own best weights: TIES at 1 (whole matrices) beats the
#   sum at 1, and not the sum at 0.75.
#
# The two updates are nearly orthogonal, and yet each does something to the other's task. A quarter of either adapter
# alone lowers the loss on the other's task by over a tenth of a nat. If effects added up, it would do so beside a
# quarter of that task's own adapter, too; there it changes the loss by less than 0.02. Their angle does not tell that.
#
# TIES' paper merges seven tasks and more, where more signs conflict; this experiment does not test that.
#
# ## 6 · What variance costs
#
# One adapter, no merging: `rewrite`, of which DARE keeps a density $d$; on whole matrices $\frac{\alpha}{r} BA$
# (section 4; no rank is cut off), or on the two factors, as in `dare_linear`. Each seed draws its own masks. The
# control is trimming whole matrices to that density.
#
# **Predict:** at $d = 0.1$ the noise on whole matrices is three times as long as the update. What is left of the gain?

# %%
print(f"\n{'density':>8s}{'noise / update':>16s}{'whole matrices':>22s}{'factors':>22s}{'largest kept':>22s}")
for d in DENSITIES:
    cells = "".join(f"{spread(loss(f'{rule} {d}')):>22s}" for rule in ("dare_linear_svd", "dare_linear", "magnitude_prune_svd"))
    print(f"{d:8g}{np.sqrt((1 - d) / d):16.2f}{cells}")
    assert below(loss(f"magnitude_prune_svd {d}"), loss(f"dare_linear_svd {d}"))
    assert below(loss(f"dare_linear_svd {d}"), loss(f"dare_linear {d}"))
print(f"all of it: {spread(loss('rewrite 1.0'))}; the base: {spread(loss('base'))}")
remains = ratio(loss("base") - loss("dare_linear_svd 0.1"), loss("base") - loss("rewrite 1.0"))
print(f"DARE on whole matrices keeps {spread(remains)} of the gain at density 0.1")
for rule, length, low, high in (("dare_linear_svd", 3, 0.8, 1.3), ("dare_linear", 9, 5, 8)):  # on whole matrices, on factors
    thin = merging.thinned(model, "rewrite", rule, 0.1, settings.seed)
    ratios = [
        [np.linalg.norm(thin[path] - D, order) / np.linalg.norm(D, order) for order in (None, 2)]
        for path, D in updates["rewrite"].items()
    ]
    whole, strongest = np.median(ratios, axis=0)
    print(f"{rule} at 0.1, median over the matrices: noise / update {whole:.2f} in all, {strongest:.2f} in the strongest direction of each")
    assert REDUCED or (abs(whole / length - 1) < 0.1 and low < strongest < high)
assert 0.8 < remains.low and remains.high < 0.9 and below(loss("base"), loss("dare_linear 0.1"))
assert items.within(loss("magnitude_prune_svd 0.2") - loss("rewrite 1.0"), 0.02)

# %%
kept = {
    rule: [loss("rewrite 1.0").mean(), *(loss(f"{rule} {d}").mean() for d in DENSITIES)]
    for rule in ("magnitude_prune_svd", "dare_linear_svd", "dare_linear")
}
merging.density_picture(kept, loss("base").mean()).savefig(OUT / "19_merging_density.png", dpi=130)

# %% [markdown]
# More than eight tenths. This may be why (no run here tests it): an update of rank 8 has its length in a few
# directions; independent noise has it spread over all. Each measured in its own strongest direction (its largest
# singular value), the noise is not three times as strong as the update, but about as strong. On the *factors* it is
# over five times as strong. A product of one number of $B$ and one of $A$ passes two masks, so its noise is
# $\sqrt{1/d^2 - 1}$, nearly ten, times as large (measured for $BA$: nine); and it is less spread, as the noise of one
# number of $A$ is in a whole column. There the model is worse than the base.
#
# The control: at each density the largest numbers, as they are, are better than as many random ones, divided by $d$.
# (They also hold more of the update's length.) DARE's paper drops 90 % or even 99 % of the updates of large models with
# hardly a loss (its abstract). It names as the reason that fine-tuning had changed each weight by little, mostly within
# 0.002; after continued pretraining, with larger changes, it fails. On this small model it costs.
#
# ## 7 · Subtracting
#
# $\theta_0 - \lambda \tau$ for `rewrite`, with $\lambda$ from 0.1 to 0.5. The control is a random update with the same
# rank and the same length in each matrix. What else changes? The loss on `define`, and on general text of the base's
# own domain. (In Ilharco et al. 4.8 % of GPT-2 Large's texts were toxic, and 0.8 % after a model tuned on toxic text
# was subtracted, at nearly the same perplexity.)
#
# **Predict:** does the model get worse at everything, or at `rewrite` alone?

# %%
print(f"\n{'rise of the loss':22s}{'rewrite':>22s}{'define':>22s}{'general':>26s}")
for t in NEGATIVE:
    for name in (f"minus rewrite {t}", f"random {t}"):
        cells = (spread(loss(name, task) - loss("base", task)) for task in TASKS)
        print(
            f"  {name:20s}"
            + "".join(f"{cell:>22s}" for cell in cells)
            + f"{spread(loss(name, 'general') - loss('base', 'general'), 4):>26s}"
        )
    fall = {task: loss(f"minus rewrite {t}", task) - loss("base", task) for task in merging.EVERYTHING}
    share = ratio(fall["define"], fall["rewrite"])  # of two tasks: their records are no pairs, and any order gives the same variance
    assert below(fall["define"], fall["rewrite"]) and below(8 * fall["general"], fall["define"])
    assert below(loss(f"random {t}"), loss(f"minus rewrite {t}")) and 1 / 3 < share.low and share.high < 4 / 5

# %% [markdown]
# Neither. The loss on general text rises less than an eighth as much as on `define`. But `define` gets worse, too, by
# between a third and four fifths as much as `rewrite`. A task vector holds all that was learned; both tasks expect a
# short answer after a prompt, which may be why (no control tests it). On `rewrite` the random update does clearly less:
# so length and rank alone do not do this harm. (The control does not match the strength of the update's strongest
# direction.) Test what should stay.
#
# ## 8 · Into which base?
#
# An adapter with the update $U = \frac{\alpha}{r} BA$ was trained with QLoRA, beside $Q = \text{NF4}(W)$, the weights
# as they come back from four bits. It can be merged in four ways:
#
# | | merged into $Q$ | merged into $W$ |
# |---|---|---|
# | kept in floats | $Q + U$: exactly what was trained | $W + U$: the *wrong* base, which it never saw |
# | in four bits again | $\text{NF4}(Q + U)$ | $\text{NF4}(W + U)$ |
#
# PEFT's `merge_and_unload` on a model in four bits makes $\text{NF4}(Q + U)$: it dequantizes, adds, quantizes again,
# and warns of "rounding errors".
#
# First an example with four numbers and the integers as code book. Let $W = (0.2, 0.4, 0.7, 0.9)$, so
# $Q = (0, 0, 1, 1)$, and let the update be $0.25$ for each: a quarter of the gap between two points, $+1$ in all.
#
# **Predict:** by how much does the sum of the four change, when $Q + U$ is rounded, and when $W + U$ is?

# %%
w, u = np.array([0.2, 0.4, 0.7, 0.9]), 0.25
q = np.round(w)
print("\nW:", w, " Q:", q)
print("Q + U rounded:", np.round(q + u), " the sum changes by", np.round(q + u).sum() - q.sum())
print("W + U rounded:", np.round(w + u), " the sum changes by", np.round(w + u).sum() - q.sum())
assert np.round(q + u).sum() == q.sum() and np.round(w + u).sum() - q.sum() == 4 * u

# %% [markdown]
# By 0 and by 1. $Q$ lies *on* the points of the code book, so whatever is smaller than half a gap is rounded back: the
# update is lost as a whole. $W$ lies between the points. One weight in four is within a quarter of a gap below a gap's
# middle, and moves by a whole gap: each weight is wrong, and the mean is right. (Noise that is added before rounding
# for this purpose is called *dither*; here the error $W - Q$ is the dither.) With gap $g$, $|u| \le g$, and $w$
# anywhere in the gap with equal probability, a share $|u| / g$ moves by one gap:
#
# $$\mathbb{E}\,[\,\text{round}(w + u) - \text{round}(w)\,] = \frac{u}{g} \cdot g = u .$$
#
# NF4's gaps are not equal, and $U$, trained beside $Q$, need not be independent of $W - Q$. So an adapter is
# trained beside NF4 now, its update scaled down, and the share measured that arrives in the rounded weights,
# $\langle \text{NF4}(X + U) - \text{NF4}(X),\, U \rangle / \langle U, U \rangle$, for $X = Q$ and $X = W$.

# %%
quantized = merging.train(mp.get_peft_model(quantize_model(base), merging.CONFIG, seed=settings.seed), settings, "rewrite")
U = merging.deltas(quantized, "default")
W = {path: base.get_submodule(path).weight.numpy() for path in U}


def nf4(w):
    return mp.quant.dequantize_4bit(*mp.quant.quantize_4bit(w, compress_statistics=True))


def arrives(t, on_codes):
    """The share of t U that arrives, over all layers."""
    got = 0.0
    for path, update in U.items():
        start = nf4(W[path]) if on_codes else W[path]
        got += float(((nf4(start + np.float32(t) * update) - nf4(start)) * update).sum())
    return got / t / sum(float((update**2).sum()) for update in U.values())


parts = (1.0, 0.5, 0.25, 0.125)
share = {on_codes: [arrives(t, on_codes) for t in parts] for on_codes in (True, False)}
size = np.median([np.linalg.norm(U[path]) / np.linalg.norm(nf4(W[path]) - W[path]) for path in U])
print(f"\nthe update is {size:.2f} times as long as the error of NF4 (median over the matrices)")
print("of the update that arrives       ", "".join(f"{t:9g} U" for t in parts))
print("  merged into Q, rounded again   ", "".join(f"{s:11.0%}" for s in share[True]))
print("  merged into W, rounded again   ", "".join(f"{s:11.0%}" for s in share[False]))
assert all(0.8 < s < 1.2 for s in share[False]), "about all of it, at every size"
assert REDUCED or 0.45 < share[True][0] < 0.7
assert share[True][-1] < 0.2 and share[True] == sorted(share[True], reverse=True), "the smaller, the more is lost"

# %%
merging.bits_picture(parts, share).savefig(OUT / "19_merging_bits.png", dpi=130)

# %% [markdown]
# The smaller the update, the smaller the share of it that $\text{NF4}(Q + U)$ keeps; of $W + U$ about all arrives at
# every size. Now the test losses. $\frac12 U$ and $\frac14 U$ are the trained update scaled down, a stand-in for
# training that changes less.
#
# **Predict:** which is worse, the wrong base in floats, or the right base in four bits?

# %%
Q = loss("Q", what="bases")
print(f"\nbase: W {spread(loss('W', what='bases'))}, Q {spread(Q)}; LoRA trained beside W, merged into W: "
      f"{spread(loss('LoRA 1.0 on W', what='bases'))}")
kinds = {"Q + U": "QLoRA {} on Q", "W + U": "QLoRA {} on W", "NF4(Q + U)": "NF4(QLoRA {} on Q)", "NF4(W + U)": "NF4(QLoRA {} on W)"}
print(f"{'':12s}" + "".join(f"{t:>19g} U, minus Q + U" + " " * 13 for t in PARTS))
for name, kind in kinds.items():
    cells = []
    for t in PARTS:
        here, exact = loss(kind.format(t), what="bases"), loss(f"QLoRA {t} on Q", what="bases")
        cells.append(f"{spread(here):>23s}{spread(here - exact) if name != 'Q + U' else '':>25s}")
    print(f"  {name:10s}" + "".join(cells))
for t in PARTS:
    exact, wrong, coded, best = (loss(f"{kind.format(t)}", what="bases") for kind in kinds.values())
    assert below(wrong, exact) and below(exact, best) and below(best, coded), "in this order, at every size"
    assert crossed(best - exact).high < 0.015
gain = {t: ratio(Q - loss(f"NF4(QLoRA {t} on Q)", what="bases"), Q - loss(f"QLoRA {t} on Q", what="bases")) for t in PARTS}
print("the share of the gain that NF4(Q + U) keeps:", ", ".join(f"{t:g} U: {spread(gain[t])}" for t in PARTS))
some = merging.as_much(mp.quant.dequantize_model(quantized.unload()), U, 0)["passed"]  # of the adapter above
elements = np.concatenate([(some[path] != 0).ravel() for path in U]).mean()
much = sum((some[path] * U[path]).sum() for path in U) / sum((U[path] ** 2).sum() for path in U)
print(f"codes change of {elements:.1%} of the elements; alone, at their size in U, they are {much:.0%} of U")
brings = {}
PASSED = {"passed": "these elements", "jumped": "these, as rounding moves them,"}
for part, what in (PASSED | {"scaled": "as much of all elements", "random": "as much at random", "QLoRA 0.5": "half of U"}).items():
    brings[part] = ratio(Q - loss(f"{part} on Q", what="bases"), Q - loss("QLoRA 1.0 on Q", what="bases"))
    print(f"  {what} bring{'s' * (part[-1] == '5')} {spread(brings[part])} of the gain of U")
    assert part not in ("scaled", "random") or below(loss("passed on Q", what="bases"), loss(f"{part} on Q", what="bases"))
assert REDUCED or (0.06 < elements < 0.1 and 0.3 < much < 0.45)
assert 0.75 < brings["scaled"].low and brings["passed"].high < brings["jumped"].low and round(brings["passed"].value, 2) == 0.90
blind, learned = (loss("LoRA 1.0 on Q", what="bases") - loss(name, what="bases") for name in ("LoRA 1.0 on W", "QLoRA 1.0 on Q"))
print(f"put on Q, LoRA's adapter, trained beside W, loses {spread(blind)}; QLoRA's is {spread(learned)} better there")
print("of what it loses that is", spread(ratio(learned, blind)))
assert 1 / 4 < ratio(learned, blind).low and ratio(learned, blind).high < 1 / 2
assert gain[0.25].high < gain[0.5].low and gain[0.5].high < gain[1.0].low
assert gain[1.0].low > 0.9 and 0.35 < gain[0.5].low and gain[0.5].high < 0.6 and gain[0.25].high < 0.15

# %% [markdown]
# - **Best of the four is the wrong base in floats**, $W + U$: $W$ is the better base, even though the adapter learned
#   to correct some of the error of $Q$. (LoRA's adapter, trained beside $W$, loses about 0.03 nats if it is put on $Q$;
#   QLoRA's, put on $Q$, loses a quarter to a half less.)
# - **In four bits, merge into $W$ and round once**: $\text{NF4}(W + U)$ costs less than 0.015 nats beside
#   what was trained, at every size.
# - **Do not merge into $Q$ and round**: $\text{NF4}(Q + U)$ keeps over nine tenths of the gain of $U$, about half of
#   that of $\frac12 U$ and less than 15 % of that of $\frac14 U$. What is lost depends on the size of the update
#   relative to the gaps, and a warning is all that is said.
#
# How can $U$ keep nine tenths of its gain when only about half of it arrives? Mostly because the gain is not
# proportional to the scale: 0.37 $U$ brings 0.84 of it, $\frac12 U$ 0.92. A little because of which elements pass: the
# 8 % that get another code are 0.37 of $U$, too (in the measure of what arrives), and bring 0.90; as much at random
# brings 0.84. And these elements move by a whole gap: moved so, they bring 0.96; the whole of NF4$(Q + U)$, 0.97.
#
# **LoftQ** (Lesson 7, section 6) starts the adapter as a correction of $Q$. On $W$ there is nothing to correct.
#
# **Predict:** does an adapter from LoftQ's start lose or gain by the wrong base, compared with QLoRA's?

# %%
print(f"\n          its own base in floats; minus that: on W{'NF4(on its own)':>25s}{'NF4(on W)':>25s}")
for name in ("QLoRA", "LoftQ"):
    exact = loss(f"{name} 1.0 on Q", what="bases")
    cells = (spread(loss(k, what="bases") - exact) for k in (f"{name} 1.0 on W", f"NF4({name} 1.0 on Q)", f"NF4({name} 1.0 on W)"))
    print(f"  {name:8s}{spread(exact):>22s}" + "".join(f"{cell:>25s}" for cell in cells))
d_qlora, d_loftq = (loss(f"{name} 1.0 on W", what="bases") - loss(f"{name} 1.0 on Q", what="bases") for name in ("QLoRA", "LoftQ"))
print("the wrong base costs LoftQ, compared with QLoRA:", spread(d_loftq - d_qlora))
assert below(d_qlora, d_loftq) and below(d_loftq, 0 * d_loftq), "LoftQ gains less, but it gains"
assert below(*(loss(f"{name} 1.0 on Q", what="bases") for name in ("QLoRA", "LoftQ"))) is None
for bits in ("NF4({} 1.0 on Q)", "NF4({} 1.0 on W)"):
    costs = [loss(bits.format(name), what="bases") - loss(f"{name} 1.0 on Q", what="bases") for name in ("QLoRA", "LoftQ")]
    assert below(*costs), "and in four bits it loses more"

# %% [markdown]
# It gains less than QLoRA's adapter; but in floats, with a single turn of LoftQ and rank 8, $W$ is still slightly
# better for it than its own $Q$. Merged in four bits, into $Q$ or into $W$, both adapters lose, LoftQ's more. So
# where the weights must stay in four bits and the adapter need not be merged, keep it beside its own $Q$. (Which of
# the two is better there is undecided.)
#
# ## 9 · Break it: ten small updates through four bits
#
# One matrix, of one seed, is updated ten times: merge a twentieth of $U$, round to four bits, start from there. The
# control adds the same updates to $W$, and rounds once at the end.
#
# **Predict:** which share of the ten updates arrives in either?

# %%
path = "model.layers.2.mlp.down_proj"
step, start = np.float32(0.05) * U[path], nf4(W[path])
stepwise = start
for _ in range(10):
    stepwise = nf4(stepwise + step)
once = nf4(W[path] + 10 * step)
arrived = [float(((x - start) * step).sum() / (10 * (step**2).sum())) for x in (stepwise, once)]
print(f"\nof ten updates arrive: rounded each time {arrived[0]:.0%}, rounded once {arrived[1]:.0%}")
assert arrived[0] < 0.1 < 0.9 < arrived[1]

# %% [markdown]
# Nearly nothing, and nearly all. So bfloat16 loses small steps (Lesson 17, section 3); here the gaps are wider. Keep
# the unquantized weights, as the master copy of everything that is merged. Now break it yourself: at which size of one
# step does `stepwise` arrive?

# %% [markdown]
# ## Quiz
#
# **1.** Two task vectors have $-5$ and $+3$ for a weight. What do the sum and TIES make of it, and what does the second
# task get?
#
# <details><summary>Answer</summary>
#
# The sum has $-2$, which gives the first task less than half and moves against the second. TIES elects the sign of the
# sum, minus, and averages those that have it: $-5$. The second task gets nothing: the conflict is decided, not solved.
#
# </details>
#
# **2.** DARE's mean is right at every density. Why not keep one number in a hundred?
#
# <details><summary>Answer</summary>
#
# One draw is used, not the mean. Its variance is $(1 - d)/d$ times the square of the update: at 0.01 the noise is
# about ten times as long as the update.
#
# </details>
#
# **3.** Two adapters are merged by `linear` with weights 1 and 1. When is the result about twice the sum of their
# products?
#
# <details><summary>Answer</summary>
#
# When both started from the same $A$, which changes little: $(B_1 + B_2)(A + A)$ is $2 (B_1 + B_2) A$. With different
# starts it is once the sum, with cross terms.
#
# </details>
#
# **4.** Merged adapters do worse than each alone at the same scale. Which control separates scale from
# interference, and what does joint training add?
#
# <details><summary>Answer</summary>
#
# Each adapter alone at the same scale separates the scale from the presence of the other, which is interference. Joint
# training says what one adapter of this size can do on both tasks.
#
# </details>
#
# **5.** An adapter was trained beside NF4 weights, and the merged model shall be in four bits. Which weights is it
# merged into before rounding, and why?
#
# <details><summary>Answer</summary>
#
# Into the unquantized ones. They lie anywhere between the points of the code book, so a small update moves some of them
# by a whole gap, and the mean is right. Dequantized weights lie on the points, and what is smaller than half a gap is
# rounded back.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("19.2", value)`, or at the terminal with
# `minipeft exercise 19.2 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 19.1 FILE.py`.
#
# **19.1 TIES.** Write `ties(tau, density)`: the merged task vector of `tau [n, m]`, one row a task. Of each row the
# `int(density * m)` largest magnitudes are kept; a sum of zero elects plus.
#
# **19.2 How long is the noise?** An update has the length 2. DARE keeps one number in ten. How long is the noise of one
# draw (the root of its expected square)?
#
# **19.3 Side by side.** Write `cat(A, B, s, w)`: the factors `(A, B)` of one adapter with scaling 1 whose product is
# $\sum_i w_i s_i B_i A_i$ exactly; `A`, `B`, `s`, `w` are lists.
#
# **19.4 A tenth of a gap.** Codes are the integers and an update adds 0.1 to every weight. Which share of the weights
# changes its code when the update is merged into weights that lie anywhere, and which when into weights on their codes?
# Two numbers.
#
# Projects, with no answer written down:
#
# - **Weights of their own.** The rows give both adapters one weight. With `merging.merged`, try a grid of two on
#   validation records. Is the best pair equal?
# - **Three tasks.** Train a third adapter on `use`. Does the best scale of the sum fall with the number of tasks?
#
# <details><summary>Solution of 19.1</summary>
#
# The three steps of section 2.
#
# ```python
# def ties(tau, density):
#     kept = np.zeros_like(tau)
#     for row, out in zip(tau, kept):
#         largest = np.argsort(-abs(row))[: int(density * len(row))]
#         out[largest] = row[largest]
#     agree = np.sign(kept) == np.where(kept.sum(axis=0) >= 0, 1, -1)
#     return (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
#
# check("19.1", ties)
# ```
#
# </details>
#
# <details><summary>Solution of 19.2</summary>
#
# $\sqrt{(1 - d) / d}$ times the length.
#
# ```python
# check("19.2", 2 * (0.9 / 0.1) ** 0.5)
# ```
#
# </details>
#
# <details><summary>Solution of 19.3</summary>
#
# The weights go to one of the two factors, not to both.
#
# ```python
# def cat(A, B, s, w):
#     return np.concatenate([a * x * y for a, x, y in zip(A, s, w)]), np.concatenate(B, axis=1)
#
# check("19.3", cat)
# ```
#
# </details>
#
# <details><summary>Solution of 19.4</summary>
#
# One in ten lies in the tenth of a gap below the middle; on the codes none does.
#
# ```python
# check("19.4", [0.1, 0])
# ```
#
# </details>
