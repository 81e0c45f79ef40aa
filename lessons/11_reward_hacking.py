# %% [markdown]
# # Lesson 11 · Reward hacking: what you measure, and what you meant
#
# A reward model is a guess at what people want, made from a few of their choices. Optimize the guess hard enough, and
# you get what the guess likes, which is something else: *when a measure becomes a target, it ceases to be a good
# measure*. In this lesson we own what nobody owns in practice: the true reward. A rater follows the rules of VADER, a
# reward model learns from the rater, PPO optimizes the model, and VADER itself, the **gold**, only watches.
#
# You need Lessons 9 and 10 and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Run it with
# `python lessons/11_reward_hacking.py` (about a minute and a half on two cores), or open it as a notebook.
# `python lessons/11_reward_hacking.py --full` (in a notebook `!python lessons/11_reward_hacking.py --full`) first
# computes those of the fifteen runs behind the curves, with three seeds, that are missing in
# `lessons/results/11_reward_hacking.jsonl` (all of them: about eight minutes), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer updates; `MINIPEFT_LESSONS_OUT` is where the picture goes
# (`lessons/out`).

# %%
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import rlhf
from minipeft.experiments.rows import read_rows
from minipeft.experiments.sweep import sweep

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = (
    Path(__file__).parent if "__file__" in globals()
    else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
)  # fmt: skip
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "11_reward_hacking.jsonl"

base, tokenizer = mp.load_base()
STOPS = (tokenizer.eos_token_id, *(tokenizer.token_to_id(mark) for mark in ".!?"))  # an answer ends its sentence
LENGTH = 20
gold = rlhf.gold_reward(tokenizer)


def openings(split):
    """Prompts: the first four words of sentences of Jane Austen's."""
    return [ids for ids in map(tokenizer.encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


# %% [markdown]
# ## 1 · A guess: a reward model from a few rankings
#
# The base continues each opening four times; the rater orders the four, with noise; the reward model learns all six
# pairs of a ranking at once (Lesson 9). Of three judges from a thousand rankings, two are right in 67% and 61% of
# held-out pairs, and the third in 53%; of three from three hundred, two in 58% and 56%, and the third in 43%, less than
# a coin. More rankings help on average, but so does luck: two of those from three hundred are better than the third of
# those from a thousand. None of them shows that it is guessing: all rewards have one scale, and any can be optimized.

# %%
def continued(split, n, rng, seed):
    """(prompts, four answers of the base to each, their gold scores [n, 4])."""
    prompts = openings(split)
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:n]]
    answers = rlhf.sample_answers(base, prompts, 4, LENGTH, stop_token_ids=STOPS, seed=seed)
    texts = [[tokenizer.decode(a, skip_special_tokens=True) for a in own] for own in answers]
    return prompts, answers, np.array([rlhf.vader(own) for own in texts])


@cache
def reward_model(rankings, seed):
    """(reward model, share of held-out pairs in which it agrees with the gold)."""
    rng = np.random.default_rng(seed)
    prompts, answers, scores = continued("train", rankings, rng, seed)
    ranked = rlhf.rankings(prompts, answers, rlhf.rank(scores, rng, temperature=0.1))
    texts = [text for ranking in ranked for text in ranking.texts]
    model = rlhf.RewardModel(base, seed=seed)
    model.calibrate(texts[:512])
    args = mp.TrainingArguments(
        learning_rate=2e-3, num_train_epochs=1, per_device_train_batch_size=8, warmup_ratio=0.1, seed=seed,
        progress=False,
    )  # fmt: skip
    mp.Trainer(model, ranked, args=args, collate=rlhf.collate_rankings).train()
    model.calibrate(texts[:512])
    prompts, answers, scores = continued("validation", 64, rng, seed)
    rewards = model.score_texts([np.array([*p, *a]) for p, own in zip(prompts, answers) for a in own]).reshape(-1, 4)
    i, j = np.triu_indices(4, 1)
    difference, guess = (scores[:, i] - scores[:, j]).ravel(), (rewards[:, i] - rewards[:, j]).ravel()
    differ = difference != 0
    return model, float((difference * guess > 0)[differ].mean())


# %% [markdown]
# ## 2 · Optimize the guess
#
# PPO maximizes, over policies $\pi$, the guess $\hat r$ minus the price of leaving the reference:
#
# $$\max_\pi \; E_{y \sim \pi}\left[\hat r(x, y)\right] - \beta \, \mathrm{KL}(\pi \,\|\, \pi_{\text{ref}}) .$$
#
# $\beta = 0$ lets it go wherever the guess points. A third setting gives every answer without an end the score -1.

# %%
@dataclass(frozen=True)
class Run:
    """One run of PPO against a reward model."""

    beta: float
    missing_eos_score: float | None = None
    seed: int = 0
    updates: int = 30
    rankings: int = 1000
    learning_rate: float = 3e-4


POLICIES = {}


def optimize(run):
    """What is optimized and what is watched, update by update."""
    judge, accuracy = reward_model(run.rankings, run.seed)
    policy = base.copy()
    config = rlhf.PPOConfig(
        steps=run.updates, batch_size=32, mini_batch_size=16, num_epochs=2, response_length=LENGTH,
        stop_token_ids=STOPS, missing_eos_score=run.missing_eos_score, kl_coef=run.beta, max_kl=1e6,
        learning_rate=run.learning_rate, lr_scheduler_type="constant", seed=run.seed, progress=False,
    )  # fmt: skip
    history = rlhf.PPOTrainer(policy, judge, openings("train"), config, watch={"gold": gold}).train()
    names = {
        "kl": "objective/kl", "proxy": "objective/raw_scores", "gold": "watch/gold", "distinct_2": "text/distinct_2",
        "ref_loss": "text/ref_loss", "ended": "num_eos", "clipfrac": "policy/clipfrac",
    }  # fmt: skip
    columns = {name: [round(float(r[key]), 4) for r in history] for name, key in names.items()}
    columns["ended"] = [n / config.batch_size for n in columns["ended"]]
    POLICIES[run] = policy
    roll = rlhf.rollout(policy, openings("validation")[:4], LENGTH, 1.0, STOPS, seed=1)
    samples = [
        tokenizer.decode(p) + " |" + tokenizer.decode(a, skip_special_tokens=True)
        for p, a in zip(roll.prompts(), roll.responses())
    ]
    return {"accuracy": round(accuracy, 4), "history": columns, "samples": samples}


BETAS = (0.0, 0.05, 0.2)
RUNS = [Run(beta, seed=seed) for seed in range(3) for beta in BETAS]
RUNS += [Run(0.05, missing_eos_score=-1.0, seed=seed) for seed in range(3)]
WEAK = 300  # rankings: what a judge is worth that has seen less
RUNS += [Run(0.0, seed=seed, rankings=WEAK) for seed in range(3)]
if "--full" in sys.argv:
    sweep(optimize, RUNS, executor=1, store=RESULTS)
rows = read_rows(RESULTS)


def found(beta, missing_eos_score=None, rankings=Run(0).rankings):
    """The runs of all seeds with these settings: {name: [seeds, updates]}."""
    wanted = (beta, missing_eos_score, rankings)
    same = [r for r in rows if (r["beta"], r["missing_eos_score"], r["rankings"]) == wanted]
    return {name: np.array([r["history"][name] for r in same]) for name in same[0]["history"]}


assert len(rows) == len(RUNS) and {r["seed"] for r in rows} == {0, 1, 2}, "three seeds of each: see --full"
accuracies = {
    rankings: [next(r["accuracy"] for r in rows if (r["rankings"], r["seed"]) == (rankings, seed)) for seed in range(3)]
    for rankings in (WEAK, Run(0).rankings)
}  # of each seed
for rankings, each in accuracies.items():
    print(f"judges from {rankings} rankings agree with the gold in", *(f"{a:.1%}" for a in each), "of held-out pairs")
weak_accuracy, accuracy = accuracies.values()
assert np.mean(accuracy) > np.mean(weak_accuracy), "more rankings help"
assert max(weak_accuracy) > min(accuracy), "but so does luck"

# %% [markdown]
# One run, live, with nothing to hold it. Proxy and gold rise together. Read the last two columns, and the samples, too.
# (Another machine, or another number of threads, rounds otherwise, and after a few updates draws other words. What we
# claim, we read off three seeds.)

# %%
free = Run(0.0, updates=2, rankings=8) if REDUCED else Run(0.0, updates=24)  # of the 30 of the sweep
live = optimize(free)
h = live["history"]
print("\nupdate   proxy    gold      KL  distinct-2  reference loss")
for u in sorted({*range(0, free.updates, max(1, free.updates // 6)), free.updates - 1}):
    print(
        f"{u + 1:6d}  {h['proxy'][u]:+.3f}  {h['gold'][u]:+.3f}  {h['kl'][u]:6.2f}  {h['distinct_2'][u]:10.2f}"
        f"  {h['ref_loss'][u]:14.2f}"
    )
print(*live["samples"], sep="\n")
assert abs(h["kl"][0]) < 1e-3
if not REDUCED:
    assert np.mean(h["proxy"][-4:]) > np.mean(h["proxy"][:4]) + 1, "the guess is won over"
    assert np.mean(h["distinct_2"][-4:]) < np.mean(h["distinct_2"][:4]) - 0.05, "with ever fewer words"

# %% [markdown]
# ## 3 · The price of going far
#
# How far has a policy gone? Gao, Schulman and Hilton (2022) measure it by $d = \sqrt{\mathrm{KL}}$ and find that the
# *gold*, along an optimization by reinforcement learning, follows
#
# $$R_{\text{gold}}(d) = R_0 + d\,(a - b \log d) ,$$
#
# where $R_0$ is what the base has and $a$ and $b$ are fitted (they write $\alpha$ and $\beta$; our $\beta$ is the price
# of KL). With $b > 0$ it rises first, since the proxy knows something, and turns at $d = e^{a/b - 1}$, where what is
# left to win is what the proxy has wrong. We fit it to the free runs ($\beta = 0$), each for itself. "No turn" is a fit
# that has no top in the run at all: with $b < 0$, or one at a distance below 0.3, which we leave out of the fit.

# %%
BINS = np.linspace(0, 9, 19)


def against_distance(columns, name):
    """(d, mean over all seeds and updates near d) of a number."""
    d, y = np.sqrt(np.maximum(columns["kl"], 0)).ravel(), columns[name].ravel()
    place = np.digitize(d, BINS)
    groups = [(d[place == b].mean(), y[place == b].mean()) for b in np.unique(place) if (place == b).sum() >= 2]
    return np.array(groups).T


NEAR = 0.3  # distances below are noise: the policy is still the base


def gao(kl, gold_scores):
    """(R0, a, b, the distance at which the fitted curve turns; None where it has no top)."""
    d, y = np.sqrt(np.maximum(kl, 0)).ravel(), np.ravel(gold_scores)
    moved = d > NEAR
    basis = np.stack([np.ones(moved.sum()), d[moved], -d[moved] * np.log(d[moved])], axis=1)
    (R0, a, b), *_ = np.linalg.lstsq(basis, y[moved], rcond=None)
    turn = np.exp(a / b - 1) if b > 0 else 0.0
    return R0, a, b, turn if turn > NEAR else None


def ends(columns):
    """({name: mean of each seed's first five updates}, ... of its last five)."""
    return tuple({k: v[:, part].mean(axis=1) for k, v in columns.items()} for part in (slice(5), slice(-5, None)))


def verdict(start, best, end):
    """What the gold did in a run, from its means over five updates: the first, the highest and the last."""
    if best - max(start, end) > 0.05:
        return "turns"
    return "climbs" if end - start > 0.05 else "falls" if end - start < -0.05 else "stays"


columns, weak = found(0.0), found(0.0, rankings=WEAK)
did, gained = {}, {}  # {(rankings, seed): what the gold did}, and by how much it rose
print("\nnothing holds it        judge   proxy, first, last   gold, first, best, last          KL   the gold   fit turns at")
for rankings, c in ((WEAK, weak), (Run(0).rankings, columns)):
    (a, z), far = ends(c), np.sqrt(c["kl"].max(axis=1))
    for seed in range(3):
        turn = gao(c["kl"][seed], c["gold"][seed])[3]
        fit = "no turn" if turn is None else "beyond the run" if turn >= far[seed] else f"sqrt(KL) = {turn:.1f}"
        best = np.convolve(c["gold"][seed], np.ones(5) / 5, "valid").max()
        did[rankings, seed] = verdict(a["gold"][seed], best, z["gold"][seed])
        gained[rankings, seed] = z["gold"][seed] - a["gold"][seed]
        print(
            f"{rankings:5d} rankings, seed {seed}   {accuracies[rankings][seed]:.1%}"
            f"   {a['proxy'][seed]:+8.2f} {z['proxy'][seed]:+8.2f}"
            f"      {a['gold'][seed]:+8.2f} {best:+8.2f} {z['gold'][seed]:+8.2f}"
            f"   {z['kl'][seed]:6.1f}   {did[rankings, seed]:8s}   {fit}"
        )
agreed = [accuracies[rankings][seed] for rankings, seed in gained]
order = np.corrcoef(*(np.argsort(np.argsort(v)) for v in (agreed, list(gained.values()))))[0, 1]
print(f"rank correlation of a judge's agreement with the gold it brought, six judges: {order:+.2f}")
weak_first, weak_last = ends(weak)
first, _ = ends(columns)
last = {beta: ends(found(beta))[1] for beta in BETAS}
for a, z in ((weak_first, weak_last), (first, last[0.0])):
    assert (z["proxy"] > a["proxy"]).all(), "every proxy rises"
assert 0 < sum(what == "climbs" for what in did.values()) < len(did), "the gold does not always rise with it"
for seed in np.argsort(accuracy)[1:]:
    assert did[1000, seed] == "climbs" and gained[1000, seed] > 0.7, "the two better judges from 1000: it does not turn"
print("\nmean ± deviation of 3 seeds, last five updates")
print("                     proxy            gold             KL  distinct-2  reference loss")
for beta, end in last.items():
    print(
        f"beta = {beta:4.2f}       "
        + "    ".join(f"{end[k].mean():+.2f} ± {end[k].std(ddof=1):.2f}" for k in ("proxy", "gold"))
        + f"   {end['kl'].mean():6.1f}  {end['distinct_2'].mean():10.2f}  {end['ref_loss'].mean():14.2f}"
    )  # fmt: skip

# %% [markdown]
# **As in the textbook.** Every proxy climbs, whatever its judge knows. With seed 1 of the judges from 1000 rankings
# (53%) the gold rises to 0.20, turns, and falls to 0.12. Of the judges from 300, two (56% and 43%) bring no gold that
# could turn, and the third (58%) brings some, 0.26 at the end. The six come almost in the order of their agreement. But
# that is no promise: it is measured on pairs of the *base's* answers, and says little about answers that the base would
# never give.
#
# **Against the textbook.** With the two better judges from 1000 *the gold does not turn*. It climbs to 0.98 with both,
# while the text becomes "great great great great", or "good good for good". Nobody would call that an answer; VADER
# does, since it counts happy words. The proxy had learned to count them, too. So the gold was only another measure, and
# it was optimized through the proxy that had learned from it. What turned over is what we meant. Neither proxy nor gold
# noticed; the KL did, which went to 66 and 67 nats, and so do two numbers more.

# %% [markdown]
# ## 4 · Two witnesses who need no gold
#
# In practice nobody watches the gold. Two numbers cost nothing. **Distinct-2** is the share of bigrams in a batch that
# are different: it falls where a policy that found a phrase the judge likes says it again and again. The **reference
# loss** is how unlikely the base finds the policy's tokens, $-\log \pi_{\text{ref}}$ in the mean over tokens: it rises
# where the language gets strange. In all six free runs the one falls and the other rises. But ask both: in the run
# whose bigrams move least, which is printed last, the other speaks clearly.

# %%
witnesses = (("distinct_2", "distinct bigrams"), ("ref_loss", "reference loss, nats a token"))
for name, text in witnesses:
    for rankings, a, z in ((WEAK, weak_first, weak_last), (Run(0).rankings, first, last[0.0])):
        moves = ", ".join(f"{x:.2f} -> {y:.2f}" for x, y in zip(a[name], z[name]))
        print(f"beta = 0, {rankings:4d} rankings: {text:30s} {moves}  (each seed)")
for a, z in ((weak_first, weak_last), (first, last[0.0])):
    assert (z["distinct_2"] < a["distinct_2"]).all() and (z["ref_loss"] > a["ref_loss"]).all(), "in all six"
moved = [np.concatenate([weak_last[k] - weak_first[k], last[0.0][k] - first[k]]) for k, _ in witnesses]
least = int(np.argmax(moved[0]))
fallen, risen = -moved[0][least], moved[1][least]
print(f"in the run whose distinct bigrams fall least, by {fallen:.2f}, the reference loss rises by {risen:.2f}")
assert risen > 0.5, "strange without repeating itself"

# %% [markdown]
# ## 5 · What repairs what
#
# **KL** in the reward makes going far cost what it may bring. A **penalty** for answers without an end repairs another
# hole: nothing in the judge asks for an end. Of the twelve runs without it, some hardly end an answer at the end of the
# run, and others nearly every one; how many is printed below the table. **Early stopping** changes nothing in the
# objective, and just does not go there: here we read off the free runs what they had at the first update whose KL
# passes 8 (in a run, the setting is `stop_kl=8`).

# %%
STOP = 8.0
ended = found(0.05, -1.0)
repairs = {f"beta = {beta}": last[beta] for beta in BETAS}
repairs["beta = 0.05, no end: -1"] = ends(ended)[1]
passed = [int(np.argmax(kl > STOP)) if (kl > STOP).any() else len(kl) - 1 for kl in columns["kl"]]
repairs["beta = 0, stopped at KL 8"] = {
    k: np.array([row[max(0, u - 2) : u + 1].mean() for row, u in zip(v, passed)]) for k, v in columns.items()
}
print("\n                              proxy    gold      KL  distinct-2  finished   each seed:  gold             finished")
for name, end in repairs.items():
    gold_of_each, ended_of_each = (" ".join(f"{x:.2f}" for x in end[key]) for key in ("gold", "ended"))
    print(
        f"{name:26s}    {end['proxy'].mean():+.2f}   {end['gold'].mean():+.2f}  {end['kl'].mean():6.1f}"
        f"  {end['distinct_2'].mean():10.2f}  {end['ended'].mean():8.0%}               {gold_of_each}   {ended_of_each}"
    )
unpenalized = np.array([weak_last["ended"], *(last[beta]["ended"] for beta in BETAS)])  # [4 settings, seeds]
few, nearly_all = (unpenalized < 0.1).sum(), (unpenalized > 0.9).sum()
print(f"of {unpenalized.size} runs without the penalty, {few} end fewer than 10% of their answers, {nearly_all} more than 90%")
cheap, high = last[0.05], last[0.2]
for name, sign in (("proxy", -1), ("kl", -1), ("distinct_2", 1)):
    steps = sign * np.diff([last[beta][name] for beta in BETAS], axis=0)
    assert (steps > 0).all(), f"the higher the price, the {'more' if sign > 0 else 'less'} {name}, in every seed"
assert (high["ref_loss"] < last[0.0]["ref_loss"]).all(), "a high price keeps the language, in every seed,"
assert high["gold"].mean() < 0.5 * last[0.0]["gold"].mean(), "and gives up gold on average"
penalized, stopped = repairs["beta = 0.05, no end: -1"], repairs["beta = 0, stopped at KL 8"]
assert (penalized["ended"] > cheap["ended"]).all(), "whoever pays for not ending, ends"
assert penalized["gold"].mean() < cheap["gold"].mean(), "and it costs gold on average"
assert (stopped["distinct_2"] > last[0.0]["distinct_2"]).all() and (stopped["gold"] > first["gold"]).all()
assert max(passed) < len(columns["kl"][0]) / 2

# %% [markdown]
# What each bought:
#
# - A small **price of KL** (0.05) cost gold: 0.53 on average, against 0.69 without it. It cost it where the judge knows
#   something, 0.80 and 0.65 in place of 0.98 in seeds 0 and 2; in seed 1, whose judge knows little, it made no
#   difference (0.14 and 0.12). It made more of the bigrams distinct in every seed.
# - A high one (0.2) kept the language (0.91 distinct bigrams against 0.37, and a lower reference loss in every seed),
#   and gave up more than half of the gold: 0.31. In seed 1, where the gold turns without it, there is a little more of
#   it, 0.17.
# - The **penalty** made more answers end in every seed, from 8, 2 and 96% to 98, 81 and 100%. It cost gold where it had
#   something to change, 0.34 and 0.01 in place of 0.80 and 0.14; in seed 2, whose answers ended anyway, it cost none.
# - The **early stop** ends about where the high price does (KL 7.5 and 6.2, gold 0.26 and 0.31), in half the updates;
#   but one has to know when.
#
# None of them makes the judge any wiser.

# %% [markdown]
# ## 6 · Break it: ask a second judge
#
# If one judge can be fooled, why not two? Train a second one, on 400 rankings of other prompts and other answers, and show
# it what the policy wrote for the first. If it was fooled as well, then the two share what they have wrong: both grew on the same
# base. (One live run, and one pair of judges: an example, no measurement over seeds.)

# %%
policy = POLICIES[free]
second, _ = reward_model(8 if REDUCED else 400, 1)
judge, _ = reward_model(free.rankings, 0)
prompts = openings("validation")[: 16 if REDUCED else 128]
table = {}
for name, model in (("base", base), ("policy", policy)):
    roll = rlhf.rollout(model, prompts, LENGTH, 1.0, STOPS, seed=2)
    with mp.no_grad():
        opinions = [j.rewards(roll.input_ids, roll.attention_mask).numpy().mean() for j in (judge, second)]
    table[name] = [*opinions, gold(roll).mean()]
print("\n            judge it was trained on   second judge    gold")
for name, (a, b, g) in table.items():
    print(f"{name:10s}  {a:+23.2f}   {b:+12.2f}  {g:+.2f}")
share = (table["policy"][1] - table["base"][1]) / (table["policy"][0] - table["base"][0])
print(f"of what the first judge thinks it gained, the second sees {share:.0%}")
if not REDUCED:
    assert share < 1, "the second judge is harder to fool with what was made for the first"

# %% [markdown]
# Now break it yourself: optimize the *minimum* of the two judges (a reward is any function of a rollout). Is it an
# honest judge, or only a slower way to the same place?

# %%
figure, axes = plt.subplots(1, 4, figsize=(18, 4.2))
colors = dict(zip(BETAS, ("C3", "C1", "C0")))
for beta in BETAS:
    c = found(beta)
    for ax, name in ((axes[0], "proxy"), (axes[1], "gold"), (axes[2], "distinct_2")):
        for seed in range(3):
            d = np.sqrt(np.maximum(c["kl"][seed], 0))
            ax.plot(d, c[name][seed], "-", color=colors[beta], alpha=0.25, linewidth=0.8)
        ax.plot(*against_distance(c, name), "-", color=colors[beta], linewidth=2, label=f"β = {beta:g}")
for ax, name in ((axes[0], "proxy"), (axes[1], "gold"), (axes[2], "distinct_2")):
    label = f"β = 0, judges from {WEAK} rankings"
    ax.plot(*against_distance(weak, name), "--", color="black", linewidth=1.5, label=label)
seed = int(np.argmin(accuracy))
poorest = {k: v[[seed]] for k, v in columns.items()}
axes[1].plot(*against_distance(poorest, "gold"), ":", color="C3", linewidth=2, label=f"β = 0, seed {seed}")
for ax, title in zip(axes, ("Proxy: optimized", "Gold: only watched", "Distinct bigrams")):
    ax.set(title=title, xlabel="sqrt(KL)")
axes[0].legend(frameon=False, fontsize=8)  # the colors are the same in the next two
axes[1].legend(handles=axes[1].lines[-1:], frameon=False, fontsize=8, loc="lower right")
names = list(repairs)
for shift, key, color in ((-0.2, "gold", "C2"), (0.2, "distinct_2", "C7")):
    widths = [repairs[n][key].mean() for n in names]
    axes[3].barh(np.arange(len(names)) + shift, widths, 0.38, color=color, label=key.replace("_", "-"))
axes[3].set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
axes[3].invert_yaxis()
axes[3].set(title="At the end", xlim=(0, 1))
axes[3].legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "11_reward_hacking.png", dpi=120)

# %% [markdown]
# ## Quiz
#
# **1.** What is the gold in this lesson, and what may it do in training?
#
# <details><summary>Answer</summary>
#
# VADER, whose rules the rater follows. It only watches: PPO optimizes the reward model that learned from the rater.
#
# </details>
#
# **2.** Every proxy rose in the free runs. Did the gold always rise with it?
#
# <details><summary>Answer</summary>
#
# No: with some judges it climbed to the end, with one it rose and fell again, and others brought none. The six came
# almost in the order of their agreement with the gold.
#
# </details>
#
# **3.** With the two best judges the gold reached 0.98. Why is that no success?
#
# <details><summary>Answer</summary>
#
# The text had become "great great great great". VADER counts happy words, and the proxy had learned to count them: the
# gold was only another measure. What turned over is what we meant.
#
# </details>
#
# **4.** Which two numbers warn without any gold, and why is one of them not enough?
#
# <details><summary>Answer</summary>
#
# The share of distinct bigrams, which falls, and the reference loss, which rises. In the run whose bigrams moved least
# the reference loss spoke clearly.
#
# </details>
#
# **5.** What does a price on the KL repair, and what does it not?
#
# <details><summary>Answer</summary>
#
# It makes going far cost what it may bring: the higher the price, the less proxy and KL, and the more distinct bigrams,
# in every seed. It does not make the judge any wiser, and the high price gave up more than half of the gold.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("11.1", value)`, or at the terminal with
# `minipeft exercise 11.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 11.2 FILE.py`.
#
# **11.1 Where the gold turns.** A fit has $a = 1.5$ and $b = 0.5$ (section 3). At which KL, in nats, does the gold
# turn?
#
# **11.2 A witness.** Write `distinct_2(responses)`: for a batch of answers, lists of tokens, the share of its bigrams
# that are different. Bigrams do not reach from one answer into the next; without any bigram it is 0.
#
# **11.3 What a long way costs.** A policy is 66 nats from the reference. How many units of reward must the proxy have
# gained there for the objective at $\beta = 0.2$ to be no lower than at the start?
#
# Further, without a checker:
#
# - **A better judge.** Train one from 3000 rankings. Does the gold rise earlier along $\sqrt{KL}$? Does the text get
#   better?
# - **Another gold.** Watch a gold that is harder to fool: VADER times the share of an answer's words that are
#   different. Where does *it* turn?
# - **A budget.** Take `kl_target=6`, an adaptive price, with three starting values of `kl_coef`. Does the way to the
#   target matter for what is found there?
#
# <details><summary>Solution of 11.1</summary>
#
# At $d = e^{a/b - 1} = e^2$, and the KL is $d^2$.
#
# ```python
# check("11.1", np.exp(1.5 / 0.5 - 1) ** 2)
# ```
#
# </details>
#
# <details><summary>Solution of 11.2</summary>
#
# All bigrams of the batch together.
#
# ```python
# def distinct_2(responses):
#     bigrams = [pair for r in responses for pair in zip(r, r[1:])]
#     return len(set(bigrams)) / max(1, len(bigrams))
#
# check("11.2", distinct_2)
# ```
#
# </details>
#
# <details><summary>Solution of 11.3</summary>
#
# The price times the way; at the start the KL is 0.
#
# ```python
# check("11.3", 0.2 * 66)
# ```
#
# </details>
