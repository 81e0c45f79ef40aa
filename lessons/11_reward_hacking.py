# %% [markdown]
# # Lesson 11 · Reward hacking: what you measure, and what you meant
#
# A reward model is a guess at what people want, made from a few of their choices. Optimize the guess hard enough, and you
# get what the guess likes, which is something else: *when a measure becomes a target, it ceases to be a good measure*.
# In this lesson we own what nobody owns in practice: the true reward. A rater follows the rules of VADER, a reward
# model learns from the rater, PPO optimizes the model, and VADER itself, the **gold**, only watches.
#
# You need Lessons 9 and 10. It needs the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Run it with
# `python lessons/11_reward_hacking.py`, or open it as a notebook. `python lessons/11_reward_hacking.py --full` computes
# all runs behind the curves anew, with three seeds (about ten minutes of one core), where their results are missing in
# `lessons/results/11_reward_hacking.jsonl`.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer updates; `MINIPEFT_LESSONS_OUT` is where the picture goes (`lessons/out`).

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
from minipeft.experiments.sweep import read_rows, sweep

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "11_reward_hacking.jsonl"

base, tokenizer = mp.load_base()
STOPS = (tokenizer.eos_token_id, *(tokenizer.token_to_id(mark) for mark in ".!?"))  # an answer should finish its sentence
LENGTH = 20
gold = rlhf.gold_reward(tokenizer)


def openings(split):
    """Prompts: the first four words of sentences of Jane Austen's."""
    return [ids for ids in map(tokenizer.encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


# %% [markdown]
# ## 1 · A guess: a reward model from a few rankings
#
# The base continues each opening four times; the rater orders the four, with noise; the reward model learns all six pairs
# of a ranking at once (Lesson 9). A thousand rankings make a judge that is right in some 60% of the pairs; three hundred,
# one that is often no better than a coin. Both are confident enough to be optimized.

# %%
def continued(split, n, rng, seed):
    """(prompts, four answers of the base to each, their gold scores [n, 4])."""
    prompts = openings(split)
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:n]]
    answers = rlhf.sample_answers(base, prompts, 4, LENGTH, stop_token_ids=STOPS, seed=seed)
    return prompts, answers, np.array([rlhf.vader([tokenizer.decode(a, skip_special_tokens=True) for a in own]) for own in answers])


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
        learning_rate=2e-3, num_train_epochs=1, per_device_train_batch_size=8, warmup_ratio=0.1, seed=seed, progress=False
    )
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
        learning_rate=run.learning_rate, lr_scheduler_type="constant", seed=run.seed,
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
    sweep(RUNS, optimize, RESULTS, show=lambda line: print(line, flush=True))
rows = read_rows(RESULTS)


def found(beta, missing_eos_score=None, rankings=Run(0).rankings):
    """The runs of all seeds with these settings: {name: [seeds, updates]}."""
    wanted = (beta, missing_eos_score, rankings)
    same = [r for r in rows if (r["beta"], r["missing_eos_score"], r["rankings"]) == wanted]
    return {name: np.array([r["history"][name] for r in same]) for name in same[0]["history"]}


assert len(rows) == len(RUNS) and {r["seed"] for r in rows} == {0, 1, 2}
for rankings in (WEAK, Run(0).rankings):
    accuracies = sorted({r["accuracy"] for r in rows if r["rankings"] == rankings})
    print(f"judges from {rankings} rankings agree with the gold in", *(f"{a:.1%}" for a in accuracies), "of held-out pairs")

# %% [markdown]
# One run, live, with nothing to hold it. Proxy and gold start together. Read the last column, too.

# %%
free = Run(0.0, updates=2, rankings=8) if REDUCED else Run(0.0)
live = optimize(free)
h = live["history"]
print("\nupdate   proxy    gold      KL  distinct-2  reference loss")
for u in sorted({*range(0, free.updates, max(1, free.updates // 6)), free.updates - 1}):
    print(f"{u + 1:6d}  {h['proxy'][u]:+.3f}  {h['gold'][u]:+.3f}  {h['kl'][u]:6.2f}  {h['distinct_2'][u]:10.2f}  {h['ref_loss'][u]:14.2f}")
print(*live["samples"], sep="\n")
assert abs(h["kl"][0]) < 1e-3
if not REDUCED:
    assert np.mean(h["proxy"][-4:]) > np.mean(h["proxy"][:4]) + 1, "the guess is won over"
    assert np.mean(h["distinct_2"][-4:]) < np.mean(h["distinct_2"][:4]) - 0.05, "with ever fewer words"

# %% [markdown]
# ## 3 · The price of going far
#
# How far has a policy gone? Gao, Schulman and Hilton (2022) measure it by $d = \sqrt{\mathrm{KL}}$ and find that the *gold*,
# along an optimization by reinforcement learning, follows
#
# $$R_{\text{gold}}(d) = R_0 + d\,(\alpha - \beta \log d) .$$
#
# It rises first, since the proxy knows something; it turns where what is left to win is what the proxy has wrong: the
# earlier, the less the proxy knows. We fit it to the free runs ($\beta = 0$ in the objective) of each judge.

# %%
BINS = np.linspace(0, 9, 19)


def against_distance(columns, name):
    """(d, mean over all seeds and updates near d) of a number."""
    d, y = np.sqrt(np.maximum(columns["kl"], 0)).ravel(), columns[name].ravel()
    place = np.digitize(d, BINS)
    groups = [(d[place == b].mean(), y[place == b].mean()) for b in np.unique(place) if (place == b).sum() >= 2]
    return np.array(groups).T


def gao(kl, gold_scores):
    """(R0, alpha, beta, the distance at which the fitted curve turns)."""
    d, y = np.sqrt(np.maximum(kl, 0)).ravel(), np.ravel(gold_scores)
    moved = d > 0.3
    basis = np.stack([np.ones(moved.sum()), d[moved], -d[moved] * np.log(d[moved])], axis=1)
    (R0, alpha, bend), *_ = np.linalg.lstsq(basis, y[moved], rcond=None)
    return R0, alpha, bend, np.exp(alpha / bend - 1) if bend > 0 else np.inf


def ends(columns):
    """({name: mean of each seed's first five updates}, ... of its last five)."""
    return tuple({k: v[:, part].mean(axis=1) for k, v in columns.items()} for part in (slice(5), slice(-5, None)))


columns, weak = found(0.0), found(0.0, rankings=WEAK)
print("\nnothing holds it        judge   proxy, first and last    gold, first and last       KL   the fit turns at sqrt(KL) =")
for rankings, c in ((WEAK, weak), (Run(0).rankings, columns)):
    for seed in range(3):
        accuracy = next(r["accuracy"] for r in rows if (r["rankings"], r["seed"]) == (rankings, seed))
        (a, z), turn = ends({k: v[seed : seed + 1] for k, v in c.items()}), gao(c["kl"][seed], c["gold"][seed])[3]
        print(
            f"{rankings:5d} rankings, seed {seed}   {accuracy:.1%}   {a['proxy'][0]:+8.2f} {z['proxy'][0]:+8.2f}       {a['gold'][0]:+8.2f} {z['gold'][0]:+8.2f}"
            f"        {z['kl'][0]:6.1f}   {'beyond the run' if turn > np.sqrt(c['kl'][seed].max()) else f'{turn:.1f}'}"
        )
weak_first, weak_last = ends(weak)
first, _ = ends(columns)
last = {beta: ends(found(beta))[1] for beta in BETAS}
assert all((z["proxy"] > a["proxy"]).all() for a, z in ((weak_first, weak_last), (first, last[0.0]))), "every proxy rises"
assert weak_last["gold"].mean() < weak_first["gold"].mean() + 0.02, "a judge that knows nothing brings nothing, or takes"
assert last[0.0]["gold"].mean() > first["gold"].mean() + 0.3, "a judge that knows something brings something"
ceiling = columns["gold"][1]  # seed 1: the poorest of the better judges
assert ceiling[-5:].mean() < max(ceiling[i : i + 5].mean() for i in range(len(ceiling) - 5)) - 0.05, "here the gold turns over"
print("\nlast five updates       proxy            gold             KL    distinct-2  reference loss  (mean ± deviation of 3 seeds)")
for beta, end in last.items():
    print(
        f"beta = {beta:4.2f}       {end['proxy'].mean():+.2f} ± {end['proxy'].std(ddof=1):.2f}    {end['gold'].mean():+.2f} ± {end['gold'].std(ddof=1):.2f}"
        f"   {end['kl'].mean():6.1f}   {end['distinct_2'].mean():8.2f}    {end['ref_loss'].mean():8.2f}"
    )

# %% [markdown]
# With the judges from 300 rankings, and with seed 1 of the better ones, it is as Gao et al. have it: the proxy climbs, and the
# gold stays, or turns and falls. That holds even for the one of them that agrees with the gold in 62% of the held-out pairs:
# those are pairs of the *base's* answers, and say little about answers that the base would never give.
#
# **Where this goes against the textbook.** With the two better judges *the gold does not turn*. It climbs to 0.9, while the
# text becomes "great great great great". Nobody would call that an answer; VADER does, since it counts happy words. The proxy
# had learned to count them, too. So the gold was only another measure, and it was optimized through the proxy that
# had learned from it. What turned over is what we meant, and of all numbers on this page only the next two noticed.

# %% [markdown]
# ## 4 · Two witnesses who need no gold
#
# In practice nobody watches the gold. Two numbers cost nothing and give the game away. **Distinct-2**, the share of bigrams
# in a batch that are different: a policy that found a phrase the judge likes says it again and again. And the **reference
# loss**, what the base thinks of the policy's tokens: language that no longer surprises in a good way.

# %%
for name, text in (("distinct_2", "distinct bigrams"), ("ref_loss", "reference loss, nats a token")):
    print(f"beta = 0: {text} {first[name].mean():.2f} -> {last[0.0][name].mean():.2f};  beta = {BETAS[-1]}: -> {last[BETAS[-1]][name].mean():.2f}")
assert (last[0.0]["distinct_2"] < first["distinct_2"]).all(), "in every seed"
assert (last[0.0]["ref_loss"] > first["ref_loss"]).all()
assert last[0.0]["kl"].mean() > last[BETAS[-1]]["kl"].mean(), "a price of KL keeps it near"

# %% [markdown]
# ## 5 · What repairs what
#
# **KL** in the reward makes going far cost what it may bring. A **penalty** for answers without an end repairs another hole:
# nothing in the judge asks for an end, and in most runs ends die out. **Early stopping** changes nothing in the objective,
# and just does not go there: here, at the first update whose KL passes 8.

# %%
STOP = 8.0
ended = found(0.05, -1.0)
repairs = {f"beta = {beta}": last[beta] for beta in BETAS}
repairs["beta = 0.05, no end: -1"] = ends(ended)[1]
passed = [int(np.argmax(kl > STOP)) if (kl > STOP).any() else len(kl) - 1 for kl in columns["kl"]]
repairs["beta = 0, stopped at KL 8"] = {
    k: np.array([row[max(0, u - 2) : u + 1].mean() for row, u in zip(v, passed)]) for k, v in columns.items()
}
print("\n                              proxy    gold      KL  distinct-2  finished")
for name, end in repairs.items():
    print(
        f"{name:26s}    {end['proxy'].mean():+.2f}   {end['gold'].mean():+.2f}  {end['kl'].mean():6.1f}  {end['distinct_2'].mean():10.2f}  {end['ended'].mean():7.0%}"
    )
finished = repairs["beta = 0.05, no end: -1"]["ended"].mean(), repairs["beta = 0.05"]["ended"].mean()
assert finished[0] > finished[1], "whoever pays for not ending, ends"
assert repairs["beta = 0, stopped at KL 8"]["distinct_2"].mean() > repairs["beta = 0.0"]["distinct_2"].mean()

# %% [markdown]
# What each bought: the price of KL kept the language (distinct bigrams, reference loss) and gave up proxy and gold for it; the
# penalty brought the ends back, in every seed; the early stop cost nothing to try and ends beside the dearest KL, but one
# has to know when. None of them makes the judge any wiser, and in seed 1, whose judge knows little, none brought much gold.

# %% [markdown]
# ## 6 · Break it: ask a second judge
#
# If one judge can be fooled, why not two? Train a second one, on other prompts and other answers, and show it what the
# policy wrote for the first. If it was fooled as well, then the two share what they have wrong: both grew on the same base.

# %%
policy = POLICIES[free]
second, agrees = reward_model(free.rankings, 1)
judge, _ = reward_model(free.rankings, 0)
prompts = openings("validation")[: 16 if REDUCED else 128]
table = {}
for name, model in (("base", base), ("policy", policy)):
    roll = rlhf.rollout(model, prompts, LENGTH, 1.0, STOPS, seed=2)
    with mp.no_grad():
        table[name] = [j.rewards(roll.input_ids, roll.attention_mask).numpy().mean() for j in (judge, second)] + [gold(roll).mean()]
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
            ax.plot(np.sqrt(np.maximum(c["kl"][seed], 0)), c[name][seed], "-", color=colors[beta], alpha=0.25, linewidth=0.8)
        ax.plot(*against_distance(c, name), "-", color=colors[beta], linewidth=2, label=f"β = {beta:g}")
for ax, name in ((axes[0], "proxy"), (axes[1], "gold"), (axes[2], "distinct_2")):
    ax.plot(*against_distance(weak, name), "--", color="black", linewidth=1.5, label=f"β = 0, judges from {WEAK} rankings")
axes[1].plot(*against_distance({k: v[1:2] for k, v in columns.items()}, "gold"), ":", color="C3", linewidth=2, label="β = 0, seed 1")
for ax, title in zip(axes, ("Proxy: optimized", "Gold: only watched", "Distinct bigrams")):
    ax.set(title=title, xlabel="sqrt(KL)")
    ax.legend(frameon=False, fontsize=8)
names = list(repairs)
for shift, key, color in ((-0.2, "gold", "C2"), (0.2, "distinct_2", "C7")):
    axes[3].barh(np.arange(len(names)) + shift, [repairs[n][key].mean() for n in names], 0.38, color=color, label=key.replace("_", "-"))
axes[3].set_yticks(range(len(names)), names, fontsize=8)
axes[3].invert_yaxis()
axes[3].set(title="At the end", xlim=(0, 1.35))
axes[3].legend(frameon=False, fontsize=8, loc="lower right")
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "11_reward_hacking.png", dpi=120)

# %% [markdown]
# ## Exercises
#
# 1. **A better judge.** Train one from 3000 rankings. Does the gold rise earlier along $\sqrt{KL}$? Does the text get better?
# 2. **Another gold.** Watch a gold that is harder to fool: VADER times the share of an answer's words that are different.
#    Where does *it* turn?
# 3. **A budget.** Take `kl_target=6`, an adaptive price, with three starting values of `kl_coef`. Does the way to the
#    target matter for what is found there?
