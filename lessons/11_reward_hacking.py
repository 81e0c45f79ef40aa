# %% [markdown]
# # Lesson 11 · Reward hacking: what you measure, and what you meant
#
# A reward model is a guess at what people want, made from a few of their choices. Optimize the guess hard enough, and
# you get what the guess likes, which is something else: *when a measure becomes a target, it ceases to be a good
# measure* (Goodhart's law). In this lesson we own what nobody owns in practice, the true reward: a rater follows the
# rules of VADER, a reward model (the **proxy**, or judge) learns from the rater, PPO optimizes the model, and VADER
# itself, the **gold**, only watches. After it you can say when the two part, warn of it without any gold, and say what
# each remedy costs.
#
# You need Lessons 9 and 10 and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Reading takes about 25 minutes (200
# words or 25 lines of code a minute, up to the quiz). Run it with `python lessons/11_reward_hacking.py` (about a minute
# and a half on two cores), or open it as a notebook. With `--full` it first computes those of the fifteen runs behind
# the curves that are missing in `lessons/results/11_reward_hacking.jsonl` (all of them: about eight minutes).
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer updates; `MINIPEFT_LESSONS_OUT` is where the picture goes
# (`lessons/out`).

# %%
import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams, rlhf
from minipeft.claims.chain_rules import CHAIN, along, crossed, items, shown, those_of
from minipeft.experiments.rows import read_rows
from minipeft.experiments.seeds import interval
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


diagrams.watched().savefig(OUT / "11_reward_hacking_watched.png")

# %% [markdown]
# ## 1 · A guess: a reward model from a few rankings
#
# The base continues each opening four times; the rater orders the four, with noise; the reward model learns all six
# pairs of a ranking at once (Lesson 9). Under each of three seeds a thousand rankings make a better judge than three
# hundred. No judge is known well: it is asked about the pairs of 64 prompts, 384 at most, and that alone is an error of
# 5 points or more. (Gao, Schulman and Hilton 2022, arXiv:2210.10760, section 3.3, find little better than chance below
# about 2,000 comparisons; 300 rankings are 1,800 pairs.) All rewards have one scale, so none of them shows that it is
# guessing, and any can be optimized.
#
# Of four kinds of failure that Gao et al. (section 4.2) list after Manheim & Garrabrant, two matter here,
# *regressional* and *extremal*. (*Causal*: what goes with the gold, such as length, does not bring it. *Adversarial*:
# an agent that knows the judge manipulates it.) Who chooses the highest guess also chooses the errors that raise it,
# however honest the judge. If gold and errors are normal and independent, the gold still rises with the guess, by the
# share $\sigma_g^2 / (\sigma_g^2 + \sigma_e^2)$ of it. And the policy comes to write what the judge never saw compared,
# where its errors may have any size: this can make the gold fall.

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
# $\beta = 0$ lets it go wherever the guess points; 0.05 is a small price, 0.2 a high one. A fourth setting has the
# small price and gives every answer without an end the score -1; a fifth has none and a judge that saw 300 rankings.

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
for r in rows:  # see section 3
    r["history"]["second"] = np.multiply(r["history"]["gold"], r["history"]["distinct_2"])


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
weak_accuracy, accuracy = map(np.array, accuracies.values())
error = 1.96 * math.sqrt(0.25 / (64 * math.comb(4, 2)))
gain, half_width = interval(accuracy - weak_accuracy)
print(f"each is known to ±{error:.1%} at best; the gain, seed by seed, is {gain:+.1%} ± {half_width:.1%}")
assert (accuracy > weak_accuracy).all(), "more rankings help"

# %% [markdown]
# One run, live, with nothing to hold it. We took seed 2, whose judge is one of the two best (section 3 has all). Proxy
# and gold rise together. *Distinct-2* is the share of bigrams in a batch that are different, *reference loss* the mean
# of $-\log \pi_{\text{ref}}$ over the policy's tokens.
#
# **Predict:** what does the policy write at the end? (Another machine, or another number of threads, draws other words
# after a few updates. What we claim, we read off three seeds.)

# %%
free = Run(0.0, updates=2, rankings=8) if REDUCED else Run(0.0, seed=2, updates=24)  # of the 30 of the sweep
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
# The policy writes the words that the judge likes again and again: the share of distinct bigrams has fallen.
#
# How far has it gone? Gao et al. measure it by $d = \sqrt{\mathrm{KL}}$ and find that the *gold* follows, along
# reinforcement learning and along the best of $n$,
#
# $$R_{\text{RL}}(d) = R_0 + d\,(a - b \log d) , \qquad R_{\text{bo}n}(d) = R_0 + d\,(a - b\, d) .$$
#
# $R_0$ is what the base has; $a$ and $b$ are fitted (they write $\alpha$ and $\beta$). With $b > 0$ the slope of the
# first, $a - b - b \log d$, falls with $d$, and is 0 at $d = e^{a/b - 1}$: there the gold turns; later with a larger
# judge, whose $b$ is smaller (their section 3.2). At $d = 0$ the slope
# is infinite, whatever the judge is worth, so the form means nothing there, and we fit it to $d > 0.3$. We fit each
# free run ($\beta = 0$) for itself. "No turn" is a fit with $b < 0$, or with its top below 0.3.
#
# A fit finds a top in noise, too. So we ask the gold itself, as the mean of five updates: it *turns* where it falls
# from its best by more than three standard errors, and *climbs* where it ends higher than it began by as much. The
# error comes from how much single updates scatter about a smooth curve. And we ask a second gold, which is harder to
# please: the gold of a batch times its distinct-2. It pays for happy words, but not for one happy word said again and
# again.
#
# **Predict:** with which of the six judges does the gold rise? The better half?

# %%
def smooth(values):
    """Means over five updates of [seeds, updates]: [seeds, updates - 4]."""
    return np.lib.stride_tricks.sliding_window_view(values, 5, axis=1).mean(axis=2)


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
    return tuple({k: smooth(v)[:, at] for k, v in columns.items()} for at in (0, -1))


def three_errors(name):
    """Three standard errors of the difference of two means over five updates, from the scatter of all runs."""
    bends = np.diff([r["history"][name] for r in rows], 2, axis=1)  # of noise alone: six times its variance
    return 3 * math.sqrt((bends**2).mean() / 6 * 2 / 5)


CLEAR = {name: three_errors(name) for name in ("gold", "second", "distinct_2", "ref_loss")}


def verdict(means, clear):
    """What the gold did in a run, from its means over five updates."""
    start, best, end = means[0], means.max(), means[-1]
    if best - max(start, end) > clear:
        return "turns"
    return "climbs" if end - start > clear else "falls" if end - start < -clear else "stays"


GOLDS = {"gold": "gold", "second": "gold x distinct-2"}
columns, weak = found(0.0), found(0.0, rankings=WEAK)
did, gained, agreed = {}, {}, {}  # {(rankings, seed): what each gold did}, by how much the first rose, the judge's agreement
print(f"\nnothing holds it: KL and means over five updates; clear is a difference of {CLEAR['gold']:.2f} and {CLEAR['second']:.2f}")
print("                   judge     proxy: first, last     KL" + "".join(f"   {n + ': first, best, last':36s}" for n in GOLDS.values()))
for rankings, c in ((WEAK, weak), (Run(0).rankings, columns)):
    (a, z), far = ends(c), np.sqrt(c["kl"].max(axis=1))
    for seed in range(3):
        golds = ""
        for name in GOLDS:
            means, turn = smooth(c[name])[seed], gao(c["kl"][seed], c[name][seed])[3]
            fit = "no turn" if turn is None else "beyond" if turn >= far[seed] else f"fit {turn:.1f}"
            did[rankings, seed, name] = verdict(means, CLEAR[name])
            golds += f"   {means[0]:+.2f} {means.max():+.2f} {means[-1]:+.2f} {did[rankings, seed, name]:6s} ({fit:7s})"
        gained[rankings, seed], agreed[rankings, seed] = z["gold"][seed] - a["gold"][seed], accuracies[rankings][seed]
        print(
            f"{rankings:5d}, seed {seed}     {agreed[rankings, seed]:.1%}   {a['proxy'][seed]:+8.2f}"
            f" {z['proxy'][seed]:+8.2f}   {z['kl'][seed]:6.1f}{golds}"
        )
free_rows = [r for r in rows if r["beta"] == 0]
print("one answer of each at the end:")
for r in sorted(free_rows, key=lambda r: (r["rankings"], r["seed"])):
    print(f"{r['rankings']:5d}, seed {r['seed']}: {' '.join(r['samples'][2].split())}")
GOOD = 0.6  # of held-out pairs
good = [run for run in gained if agreed[run] > GOOD]
print(f"gold gained with the {len(good)} judges above {GOOD:.0%}:", *(f"{gained[run]:+.2f}" for run in good))
print("with the others:", *(f"{gained[run]:+.2f}" for run in gained if run not in good))
by_chance = math.comb(len(gained), len(good))
print(f"by chance alone the {len(good)} that gain most would be the best {len(good)} judges one time in {by_chance}")
weak_first, weak_last = ends(weak)
first, _ = ends(columns)
last = {beta: ends(found(beta))[1] for beta in BETAS}
for a, z in ((weak_first, weak_last), (first, last[0.0])):
    assert (z["proxy"] > a["proxy"]).all(), "every proxy rises"
assert min(gained[run] for run in good) > 0.7, "the gold rises with a good judge"
assert max(gained[run] for run in gained if run not in good) < 0.3, "and hardly with another"
assert not any(did[*run, "gold"] == "turns" for run in gained), "no gold turns clearly,"
assert all(did[*run, "second"] == "turns" for run in good), "but the second one does, where there was any"
assert [f"{gold:.2f}" for gold in last[0.0]["gold"][1:]] == ["0.99", "0.94"]

print("\nmean ± deviation of 3 seeds, last five updates")
print("                     proxy            gold             KL  distinct-2  reference loss")
for beta, end in last.items():
    print(
        f"beta = {beta:4.2f}       "
        + "    ".join(f"{end[k].mean():+.2f} ± {end[k].std(ddof=1):.2f}" for k in ("proxy", "gold"))
        + f"   {end['kl'].mean():6.1f}  {end['distinct_2'].mean():10.2f}  {end['ref_loss'].mean():14.2f}"
    )  # fmt: skip

# %%
figure, axes = plt.subplots(1, 4, figsize=(18, 4.2))
curves = [(found(beta), dict(color=color, label=f"β = {beta:g}")) for beta, color in zip(BETAS, ("C3", "C1", "C0"))]
curves.append((weak, dict(color="black", linestyle="--", label=f"β = 0, {WEAK} rankings")))
titles = ("Proxy: optimized", "Gold: only watched", "Distinct bigrams", "Gold × distinct bigrams")
for ax, key, title in zip(axes, ("proxy", "gold", "distinct_2", "second"), titles):
    for c, style in curves:
        for d, y in zip(np.sqrt(smooth(c["kl"])), smooth(c[key])):  # one line a seed
            ax.plot(d, y, linewidth=1.4, **style)
    ax.set(title=title, xlabel="sqrt(KL)")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].legend(handles=axes[0].lines[::3], frameon=False, fontsize=7)  # the colors are the same in all
figure.tight_layout()
figure.savefig(OUT / "11_reward_hacking.png", dpi=120)

# %% [markdown]
# **The proxy climbs with every judge, the gold only with a good one.** With the two judges that agree with the gold in
# more than 60% of held-out pairs, it climbs to 0.99 and 0.94. With the four others it moves by no more than its noise.
# Six runs are few: if agreement meant nothing, the two best judges would still be the two that bring gold one time in
# fifteen. And agreement is no promise: it is measured on pairs of the *base's* answers, and says little about answers
# that the base would never give.
#
# **Does the gold turn, as in the paper?** In no run clearly. With the two good judges it is highest at the end, while
# the text has become "love love love", or "a great deal a great". VADER counts happy words, and the judge has learned
# from it: this gold was only another measure, optimized through the proxy. **The second gold turns**, with both good
# judges, and the fit puts the top near $\sqrt{\mathrm{KL}} = 5$. But we chose it after we had read the answers. Judges
# of helpfulness are pleased by length: Singhal et al. 2023 (arXiv:2310.03716) find in three settings that RLHF's gains
# came in large part from longer answers. A cure is to take off what length alone predicts, or to charge for it; either
# also punishes answers that are long because they say more.
#
# **And with a gold that asks for what one sees?** That is the one chain of Lesson 10, section 8: a fine-tuned model
# that ends its sentences, and a gold that was laid down before any run: whole, in English, without repetition, kind.
# PPO without a price against five judges, each under five seeds. The dashed line is the best of 1 to 16 answers by the
# same judge, whose KL is at most $\log n - (n-1)/n$ (Lesson 10): 1.8 nats for 16.
#
# **Predict:** with which of the five does the gold end above the SFT model's, and with which does the best of 16 do
# better?

# %%
chain = CHAIN.rows()
assert not CHAIN.missing(chain), "all runs are there: see `minipeft claims --run rlhf-8`"
JUDGES = (("head", 600), ("lora", 600), ("full", 100), ("full", 600), ("full", 2000))
figure, panels = plt.subplots(1, 5, figsize=(22, 4.2), sharey=True)
print("\njudge                    right   proxy: SFT, end, rise (5 seeds, 95 %)   gold: SFT, end, change (seeds and prompts, 95 %)   best of 16 less the end")
rises, moves, better, right = {}, {}, {}, {}
before = items(those_of(chain, "sft"))
for ax, (size, n) in zip(panels, JUDGES):
    runs = those_of(chain, "ppo", judge=size, comparisons=n, beta=0.0)
    many = those_of(chain, "best", judge=size, comparisons=n)
    for key, color in (("proxy", "C3"), ("gold", "C2")):
        for i, row in enumerate(runs):  # a line a seed
            ax.plot(*along(row, key), color=color, linewidth=1.2, label=None if i else key)
        best_of = {m: [row["best_of"][m] for row in many] for m in many[0]["best_of"]}
        means = [np.mean([e[key] for e in each]) for each in best_of.values()]
        ax.plot(np.sqrt([each[0]["kl"] for each in best_of.values()]), means, "--", color=color, linewidth=2)
    ax.set(title=f"{size}, {n} comparisons", xlabel="sqrt(KL)")
    ax.spines[["top", "right"]].set_visible(False)
    one, end = np.array([e["proxy"] for e in best_of["1"]]), items(runs, "proxy").mean(axis=1)
    rises[size, n], moves[size, n] = interval(end - one), crossed(items(runs) - before)
    better[size, n] = crossed(items(many) - items(runs))
    right[size, n] = np.mean([row["accuracy"][0] for row in many])
    assert math.isclose(best_of["16"][0]["kl"], math.log(16) - 15 / 16, abs_tol=0.01)
    assert items(runs, "kl").mean() > best_of["16"][0]["kl"], "PPO goes farther than the best of 16"
    print(
        f"{size:5s} {n:5,} comparisons  {right[size, n]:.1%}   {one.mean():+.2f}  {end.mean():+.2f}  {rises[size, n][0]:+.2f} ± {rises[size, n][1]:.2f}"
        f"              {before.mean():.2f}  {items(runs).mean():.2f}  {shown(moves[size, n])}   {shown(better[size, n])}"
    )
panels[0].legend(frameon=False)
figure.tight_layout()
figure.savefig(OUT / "11_reward_hacking_chain.png", dpi=120)
poor = [judge for judge in JUDGES if judge[1] < 2000]
assert all(value > half for value, half in rises.values()), "every proxy rises clearly"
assert all(moves[judge].high < 0.02 for judge in poor), "no judge from few comparisons brings gold"
assert all(better[judge].low > 0 for judge in poor), "the best of 16 has clearly more"
assert sum(right[judge] > GOOD for judge in poor) == 2, "good by section 3's measure"
print("gold clearly below where it began:", ", ".join(f"{size} {n}" for (size, n), e in moves.items() if e.high < 0))
curves = [along(row, "gold")[1] for row in runs]  # of the last judge, means over five updates of training
print("full 2,000, each seed's gold, highest and last:", ", ".join(f"{y.max():.2f} {y[-1]:.2f}" for y in curves))

# %% [markdown]
# Every proxy rises clearly. With the four judges from 100 or 600 comparisons the gold rises with none; with the two
# that the output names it ends clearly below the SFT model's. Two of the four agree with this gold in more than 60% of
# pairs: it is another gold, and that share alone does not tell. With the best judge neither a gain nor a loss at the
# end is clear; the last line shows from which height each seed came. And the best of 16 by the same judge has more gold
# than the end of PPO without a price, at a smaller KL; clearly so with the four poor judges.
#
# The verdict below asks of *each* judge that its reward rises, and the gold falls, from the gold's peak to the end.

# %% [markdown]
# > `rlhf-8` reward hacking: the policy exploits the reward model: **holds if**. Without a price of KL the reward of 5
# > of 5 judges rises clearly from where the gold has its peak; meanwhile the gold falls clearly with head, 600
# > comparisons and full, 100 comparisons:
# >
# > - head, 600 comparisons: the reward rises by +0.29 [+0.23, +0.34] from the start to the end, and the gold falls by
# >   +0.10 [+0.03, +0.16], from 0.34 to 0.25.
# > - lora, 600 comparisons: the reward rises by +0.26 [+0.23, +0.28] from the start to the end, and the gold falls by
# >   +0.04 [-0.01, +0.09], from 0.34 to 0.30.
# > - full, 600 comparisons: the reward rises by +0.29 [+0.25, +0.33] from the start to the end, and the gold falls by
# >   +0.04 [-0.01, +0.09], from 0.34 to 0.30.
# > - full, 100 comparisons: the reward rises by +0.17 [+0.08, +0.26] from the start to the end, and the gold falls by
# >   +0.11 [+0.07, +0.16], from 0.34 to 0.23.
# > - full, 2000 comparisons: the reward rises by +0.32 [+0.10, +0.54] from update 16 to the end, and the gold falls by
# >   +0.09 [-0.08, +0.25], from 0.40 to 0.31.
# >
# > (5 seeds, 256 test items)

# %% [markdown]
# ## 4 · Two witnesses who need no gold
#
# In practice nobody watches the gold. Two numbers cost nothing. **Distinct-2** falls where a policy that found a phrase
# the judge likes says it again and again. The **reference loss** rises where the language gets strange to the base.
#
# **Predict:** does each of them move in all six free runs?

# %%
witnesses = (("distinct_2", "distinct bigrams"), ("ref_loss", "reference loss, nats a token"))
for name, text in witnesses:
    for rankings, a, z in ((WEAK, weak_first, weak_last), (Run(0).rankings, first, last[0.0])):
        moves = ", ".join(f"{x:.2f} -> {y:.2f}" for x, y in zip(a[name], z[name]))
        print(f"beta = 0, {rankings:4d} rankings: {text:30s} {moves}  (each seed)")
falls, rises = (np.concatenate([weak_last[k] - weak_first[k], last[0.0][k] - first[k]]) for k, _ in witnesses)
print(
    f"clear (three standard errors): distinct bigrams fall in {(falls < -CLEAR['distinct_2']).sum()} of {falls.size}; the"
    f" reference loss rises in {(rises > CLEAR['ref_loss']).sum()} and falls in {(rises < -CLEAR['ref_loss']).sum()}"
)
likely = min(free_rows, key=lambda r: np.mean(r["history"]["ref_loss"][-5:]))
print("where the reference loss is lowest at the end:")
print(*("    " + " ".join(text.split()) for text in likely["samples"]), sep="\n")
assert (falls < -CLEAR["distinct_2"]).all(), "the bigrams fall in every run"
assert (falls[rises < CLEAR["ref_loss"]] < -0.1).all(), "and not by little where the reference loss does not rise"

# %% [markdown]
# The distinct bigrams fall clearly in all six runs. The reference loss rises clearly in two, those of the two good
# judges, and in one it falls: there the policy says again and again what the base finds likely, `"Oh!`, which is as
# empty as "love love love". So a low reference loss is no proof of innocence. Ask both. The KL says only how far a
# policy has gone, not how well.

# %% [markdown]
# ## 5 · What repairs what
#
# A **price of KL** makes going far cost what it may bring. A **penalty** for answers without an end repairs another
# hole: nothing in the judge asks for an end. **Early stopping** leaves the objective as it is and ends the run at a
# given KL: here we read off the free runs what they had, as a mean of three updates, when KL first passed 8 (in a run,
# the setting is `stop_kl=8`). What did each bring? The plain gold cannot say, since it is pleased by repetition. So we
# ask the second one, and for the price the gold of the chain, too.
#
# **Predict:** which price has the most of the second gold at the end: 0, 0.05 or 0.2?

# %%
STOP = 8.0
ended = found(0.05, -1.0)
repairs = {f"beta = {beta}": last[beta] for beta in BETAS}
repairs["beta = 0.05, no end: -1"] = ends(ended)[1]
passed = [int(np.argmax(kl > STOP)) if (kl > STOP).any() else len(kl) - 1 for kl in columns["kl"]]
repairs["beta = 0, stopped at KL 8"] = {
    k: np.array([row[max(0, u - 2) : u + 1].mean() for row, u in zip(v, passed)]) for k, v in columns.items()
}
print("\n                              proxy  second gold      KL  distinct-2  finished   each seed:  second gold      finished")
for name, end in repairs.items():
    second_of_each, ended_of_each = (" ".join(f"{x:.2f}" for x in end[key]) for key in ("second", "ended"))
    print(
        f"{name:26s}    {end['proxy'].mean():+.2f}        {end['second'].mean():+.2f}  {end['kl'].mean():6.1f}"
        f"  {end['distinct_2'].mean():10.2f}  {end['ended'].mean():8.0%}               {second_of_each}   {ended_of_each}"
    )
free_end, cheap, high = (last[beta] for beta in BETAS)
penalized, stopped = repairs["beta = 0.05, no end: -1"], repairs["beta = 0, stopped at KL 8"]
print(f"difference of the second gold, each seed; clear in one seed is {CLEAR['second']:.2f}")
for name, end, other in (
    ("beta = 0.05 against 0", cheap, free_end),
    ("beta = 0.2 against 0.05", high, cheap),
    ("no end: -1 against none, beta = 0.05", penalized, cheap),
    ("stopped at KL 8 against beta = 0.2", stopped, high),
):
    value, half_width = interval(end["second"] - other["second"])
    print(f"{name:38s} {' '.join(f'{x:+.2f}' for x in end['second'] - other['second'])}: {value:+.2f} ± {half_width:.2f}")
on_chain = {beta: crossed(items(those_of(chain, "ppo", beta=beta)) - before) for beta in BETAS}
print("the chain's gold less the SFT model's:", "; ".join(f"beta = {beta:g} {shown(e)}" for beta, e in on_chain.items()))
for name in ("proxy", "kl"):
    assert (np.diff([last[beta][name] for beta in BETAS], axis=0) < 0).all(), f"the higher the price, the less {name}"
for end in (cheap, high, stopped):
    assert (end["distinct_2"] > free_end["distinct_2"] + CLEAR["distinct_2"]).all(), "each keeps bigrams distinct"
able = accuracy > GOOD
assert (cheap["second"] - free_end["second"] > CLEAR["second"])[able].all(), "a small price ends clearly higher"
assert (high["second"] < cheap["second"]).all(), "and a high one below it"
assert (cheap["second"] - penalized["second"] > CLEAR["second"])[able].all(), "the penalty costs"
assert (penalized["ended"] > 0.9).all() and (cheap["ended"] < 0.05).all(), "whoever pays for not ending, ends"
value, half_width = interval(stopped["second"] - high["second"])
assert (stopped["second"] < high["second"])[able].all() and abs(value) < half_width
assert max(passed) < len(columns["kl"][0]) / 2 and on_chain[0.05].low > 0 > on_chain[0.0].low

# %% [markdown]
# The small one. Three seeds are few, and one of the judges is poor: each interval above includes 0, and we read the
# single seeds:
#
# - A **price of KL**, small or high, lowers proxy and KL and keeps more of the bigrams distinct, in every seed. With
#   both good judges the small price ends clearly higher in the second gold than none. The high one ends below the small
#   one in every seed: it also forbids what is worth having. On the chain, too, the small price ends clearly above the
#   SFT model, and no price does not.
# - The **penalty** made more than 90% of the answers end, in place of fewer than 5%. With both good judges it costs
#   clearly in the second gold.
# - The **early stop** ends at about the KL of the high price, in less than half of the updates. With both good judges
#   it has less of the second gold there, but the interval of three seeds includes 0. Gao et al. (section 3.6) find the
#   same gold at the same KL with a price and without: in their setting a price acts like an early stop.
#
# None of them makes the judge any wiser. At a price the best policy is $\pi_{\text{ref}}\, e^{\hat r / \beta}$, up to a
# factor (Lesson 10): a higher $\beta$ trusts the whole guess less, right or wrong. New comparisons of the policy's own
# answers do make it wiser: Bai et al. 2022 (arXiv:2204.05862) train judge and policy again every week. If each of $k$
# rounds goes $d/k$ along Gao et al.'s curve with the same $a$ and $b$, the gold has $b\, d \log k$ more than after one
# round of $d$ (their section 4.3).

# %% [markdown]
# ## 6 · Break it: ask a second judge
#
# If one judge can be fooled, why not two? Train a second one, on 400 rankings of another draw of prompts and other
# answers, and show it what the policy wrote for the first. What it sees of the gain is what the two share, right or
# wrong: both grew on the same base. First ask what the second is worth: from one that guesses, no gain is no sign of
# honesty. (One live run, and one pair of judges: an example.)
#
# **Predict:** how much of the first judge's gain does the second see?

# %%
policy = POLICIES[free]
second, second_accuracy = reward_model(8 if REDUCED else 400, 1)
judge, judge_accuracy = reward_model(free.rankings, free.seed)
prompts = openings("validation")[: 16 if REDUCED else 128]
table = {}
for name, model in (("base", base), ("policy", policy)):
    roll = rlhf.rollout(model, prompts, LENGTH, 1.0, STOPS, seed=2)
    with mp.no_grad():
        opinions = [j.rewards(roll.input_ids, roll.attention_mask).numpy().mean() for j in (judge, second)]
    table[name] = [*opinions, gold(roll).mean()]
print(f"\nagreement with the gold: first judge {judge_accuracy:.1%}, second {second_accuracy:.1%}, ±{error:.1%} or more")
print("            judge it was trained on   second judge    gold")
for name, (a, b, g) in table.items():
    print(f"{name:10s}  {a:+23.2f}   {b:+12.2f}  {g:+.2f}")
share = (table["policy"][1] - table["base"][1]) / (table["policy"][0] - table["base"][0])
print(f"of what the first judge thinks it gained, the second sees {share:.0%}")
if not REDUCED:
    assert share < 1, "the second judge sees less of a gain that was made for the first"

# %% [markdown]
# The last line says it, and the gold's gain stands beside it: where the second judge sees little of a gain that the
# gold sees too, it is no wiser, only another judge. The *minimum* of several judges, or their mean less their variance,
# was a better reward than any one of them in the setting of Coste et al. 2023 (arXiv:2310.02743). But errors that all
# judges share stay, even where each was pretrained from another seed (Eisenstein et al. 2023, arXiv:2312.09244).
#
# Now break it yourself: optimize the minimum of the two judges (a reward is any function of a rollout). Is it an honest
# judge, or only a slower way to the same place?

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
# No: with the two judges that agreed with it in more than 60% of held-out pairs it climbed, with the four others it
# moved no more than its noise. That is six runs; which judges are good, and what they bring, differs from base to base.
#
# </details>
#
# **3.** With the two best judges the gold reached 0.99 and 0.94. Why is that no success?
#
# <details><summary>Answer</summary>
#
# The text had become "love love love love". VADER counts happy words, and the judge had learned from it: the gold was
# only another measure. The gold times the share of distinct bigrams, which repetition does not please, rises and turns.
#
# </details>
#
# **4.** Which two numbers warn without any gold, and why is one of them not enough?
#
# <details><summary>Answer</summary>
#
# The share of distinct bigrams, which falls, and the reference loss, which may rise. It does not where the policy
# repeats what the base finds likely.
#
# </details>
#
# **5.** What does a price on the KL repair, and what does it not?
#
# <details><summary>Answer</summary>
#
# The higher the price, the less proxy and KL, and with a price more of the bigrams stay distinct, in every seed. In the
# second gold, the one that repetition does not please, the small price ends above none with both good judges, and the
# high one below the small one, clearly in one seed: a price may be too high. It does not make the judge any wiser.
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
# - **Another gold.** Section 3 multiplies two means of a batch. Watch a gold of each answer: VADER times the share of
#   its words that are different. Does it turn at the same distance?
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
