# %% [markdown]
# # Lesson 11 · Reward hacking: what you measure, and what you meant
#
# A reward model is a guess at what people want, made from a few of their choices. Optimize the guess hard enough, and
# you get what the guess likes, which may be something else: *when a measure becomes a target, it ceases to be a good
# measure* (Goodhart's law). In this lesson we own what nobody owns in practice, the true reward: a rater follows the
# rules of VADER, a reward model (the **proxy**, or judge) learns from the rater, PPO optimizes a policy against the
# proxy, and VADER itself, the **gold**, only watches. After this lesson you can say when and why proxy and gold part,
# warn without any gold, and say what each remedy brings and costs.
#
# You need Lessons 9 and 10 and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Reading takes about 25 minutes (200
# words or 25 lines of code a minute, up to the quiz). Run it with `python lessons/11_reward_hacking.py` (about a minute
# and a half on two cores), or open it as a notebook. With `--full` it first computes those of the 43 runs that are
# missing in `lessons/results/11_reward_hacking.jsonl` (all of them: about twenty minutes).
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer updates; `MINIPEFT_LESSONS_OUT` is where the pictures go
# (`lessons/out`).

# %%
import math
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import hacking, sweep
from experiments.hacking import at_kl, ends, smooth, three_errors, verdict

import minipeft as mp
from minipeft import diagrams, rlhf
from minipeft.claims.chain import JUDGES
from minipeft.claims.chain_rules import CHAIN, along, crossed, gao_of, items, shown, those_of
from minipeft.evaluation.intervals import Estimate, mean
from minipeft.experiments.rows import read_rows
from minipeft.experiments.seeds import interval
from minipeft.experiments.shipped import rounded

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "11_reward_hacking.jsonl"
if REDUCED:
    print("REDUCED SETTING: a quarter of the draws in section 1, and judges from 8 rankings and 2 updates of 8 short answers in "
          "sections 2 and 6, on fewer prompts, too few to learn anything. The rows are those of the full lesson.\n")

base, tokenizer = mp.load_base()
STOPS = (tokenizer.eos_token_id, *(tokenizer.token_to_id(mark) for mark in ".!?"))  # an answer ends its sentence
LENGTH, BATCH = (6, 8) if REDUCED else (20, 32)  # of an answer, and of an update
HELD_OUT = 512 if "--full" in sys.argv else 8 if REDUCED else 128  # prompts that a judge is asked about
gold = rlhf.gold_reward(tokenizer)

# %%
diagrams.watched().savefig(OUT / "11_reward_hacking_watched.png")

# %% [markdown]
# ## 1 · A guess: a reward model from a few rankings
#
# The base continues each opening four times; the rater orders the four, with noise; the reward model learns all six
# pairs of a ranking at once (Lesson 9). How often does it agree with the gold? We ask about the pairs of 512 prompts
# that it has not seen (128 if it is trained now). The six pairs of a prompt depend on each other, so the interval is
# over prompts.

# %%
@cache
def openings(split):
    """Prompts: the first four words of sentences of Jane Austen's."""
    return [ids for ids in map(tokenizer.encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


def continued(split, n, rng, seed):
    """(prompts, four answers of the base to each, their gold scores [n, 4])."""
    prompts = openings(split)
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:n]]
    answers = rlhf.sample_answers(base, prompts, 4, LENGTH, stop_token_ids=STOPS, seed=seed)
    texts = [[tokenizer.decode(a, skip_special_tokens=True) for a in own] for own in answers]
    return prompts, answers, np.array([rlhf.vader(own) for own in texts])


@cache
def reward_model(rankings, seed):
    """(reward model, share of held-out pairs in which it agrees with the gold: [value, low, high])."""
    rng = np.random.default_rng(seed)
    prompts, answers, scores = continued("train", rankings, rng, seed)
    ranked = rlhf.rankings(prompts, answers, rlhf.rank(scores, rng, temperature=0.1))
    texts = [text for ranking in ranked for text in ranking.texts]
    model = rlhf.RewardModel(base, seed=seed)
    model.calibrate(texts[:512])
    once = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "warmup_ratio": 0.1, "progress": False}
    args = mp.TrainingArguments(learning_rate=2e-3, seed=seed, **once)
    mp.Trainer(model, ranked, args=args, collate=rlhf.collate_rankings).train()
    model.calibrate(texts[:512])
    prompts, answers, scores = continued("validation", HELD_OUT, rng, seed)
    rewards = model.score_texts([np.array([*p, *a]) for p, own in zip(prompts, answers) for a in own]).reshape(-1, 4)
    i, j = np.triu_indices(4, 1)
    difference, guess = scores[:, i] - scores[:, j], rewards[:, i] - rewards[:, j]  # [prompts, 6]
    return model, list(mean((difference * guess > 0).sum(axis=1), (difference != 0).sum(axis=1)))


# %% [markdown]
# How can such a guess lead astray? In four ways (Manheim & Garrabrant 2018, arXiv:1803.04585):
#
# - *Regressional*: the guess is gold plus error, and whoever chooses the highest guess also chooses the errors that
#   raise it, however honest the judge.
# - *Extremal*: the policy comes to write what the judge never saw, where the judge's errors may have any size.
# - *Causal*: a feature goes with what is good, but does not cause it. Kind sentences have happy words, but happy words
#   alone make no kind sentence.
# - *Adversarial*: another agent games the measure for a goal of its own.
#
# A proxy is *hackable* if some change of the policy raises it and lowers the gold. Among all policies every proxy is
# hackable, unless it or the gold is constant, or both order the policies alike (Skalse et al. 2022, arXiv:2209.13085).
# How much optimizing a proxy bears also depends on the *tail* of its errors. Take the best of $n$ by a guess that is
# gold, normal with variance 1, plus independent error of the same variance: once normal, once by Student's t with three
# degrees of freedom, where a few errors are huge.
#
# How far is the best of $n$ from the base? The rank of an answer among the base's is uniform between 0 and 1. The rank
# $u$ of the best of $n$ has the density $n u^{n-1}$, and so the KL $E[\log n u^{n-1}] = \log n - (n-1)/n$. Given the
# rank, base and best of $n$ draw the answer alike, so rank and answer together have that KL, the answer alone at most
# that, and less where answers tie: 0 if all do (Beirami et al. 2024, arXiv:2401.01879).

# %%
rng = np.random.default_rng(0)
true, brought = rng.normal(size=2**19 if REDUCED else 2**21), {}
for tail, off in (("normal", rng.normal(size=true.size)), ("heavy", rng.standard_t(3, size=true.size) / math.sqrt(3))):
    for n in (1, 4, 16, 256, 4096):
        guess = (true + off).reshape(-1, n)
        chosen = guess.argmax(axis=1)[:, None]
        a, b = brought[tail, n] = [np.take_along_axis(x.reshape(-1, n), chosen, axis=1).mean() for x in (guess, true)]
        print(f"{tail:6s} error, best of {n:4d}: KL at most {math.log(n) - (n - 1) / n:.2f}   guess {a:5.2f}   gold {b:.2f}")
assert np.allclose([b / a for (tail, n), (a, b) in brought.items() if tail == "normal" and n > 1], 0.5, atol=0.03)
assert brought["heavy", 16][1] > brought["heavy", 256][1] > brought["heavy", 4096][1], "the gold has turned"

# %% [markdown]
# With normal errors the gold keeps rising, by the share $\sigma_g^2 / (\sigma_g^2 + \sigma_e^2)$ of the guess, here a
# half ($\sigma_g^2$ and $\sigma_e^2$ are the variances of gold and error). With the heavy tail it turns: more and more
# of the highest guesses are huge errors on ordinary answers.
#
# A price of KL does not save the gold. Lift the answers with a guess above $t$ from probability $q$ to $p$. This costs
# $p \log (p/q)$ nats; the term of the other answers takes less than $p$ off, as $(1 - p) \log (1 - p) > -p$. If the
# mean guess was 0, the lift pays more than $(p - q)\,t$: the others' mean is below 0. The heavy tail has $q \sim
# t^{-3}$, so $\log (1/q)$ is only about $3 \log t$. With $p = t^{-1/2}$ the pay, about $\sqrt t$, grows without bound,
# while the cost goes to 0. The gold gained goes to 0, too: error put these answers above $t$, and their share $p$
# vanishes. With a normal tail $\log (1/q)$ grows like $t^2$, so the cost outgrows the pay. Kwa, Thomas & Garriga-Alonso
# 2024 (arXiv:2407.14503) prove both. Heavy-tailed errors allow any reward at hardly any KL, with hardly more gold if
# the gold's own tail is light. Under light-tailed, independent errors a lower price brings ever more gold.

# %% [markdown]
# ## 2 · Optimize the guess
#
# PPO maximizes, over policies $\pi$ that answer $y$ to a prompt $x$, the guess $\hat r$ minus a price of leaving the
# reference $\pi_{\text{ref}}$:
#
# $$\max_\pi \; E_{y \sim \pi}\left[\hat r(x, y)\right] - \beta \, \mathrm{KL}(\pi \,\|\, \pi_{\text{ref}}) .$$
#
# $\beta = 0$ lets it go wherever the guess points; 0.05 is a small price, 0.2 a high one. A fourth setting has the
# small price and gives every answer without an end the score -1, instead of the judge's; a fifth has no price and
# judges from 300 rankings instead of 1,000.

# %%
@dataclass(frozen=True)
class Run:
    beta: float
    missing_eos_score: float | None = None
    seed: int = 0
    updates: int = 30
    rankings: int = 1000
    learning_rate: float = 3e-4


POLICIES = {}


def optimize(run):
    judge, accuracy = reward_model(run.rankings, run.seed)
    policy = base.copy()
    config = rlhf.PPOConfig(
        steps=run.updates, batch_size=BATCH, mini_batch_size=BATCH // 2, num_epochs=2, response_length=LENGTH,
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
    samples = [tokenizer.decode(p) + " |" + tokenizer.decode(a, skip_special_tokens=True) for p, a in zip(roll.prompts(), roll.responses())]
    return {"accuracy": rounded(accuracy), "history": columns, "samples": samples}


BETAS = (0.0, 0.05, 0.2)
RUNS = [Run(beta, seed=seed) for seed in range(3) for beta in BETAS]
RUNS += [Run(0.05, missing_eos_score=-1.0, seed=seed) for seed in range(3)]
WEAK = 300  # rankings: what a judge is worth that has seen less
RUNS += [Run(0.0, seed=seed, rankings=WEAK) for seed in range(3)]
# and more, for the means of section 5
RUNS += [Run(beta, end, seed) for seed in range(3, 10) for beta, end in ((0.0, None), (0.05, None), (0.2, None), (0.05, -1.0))]
if "--full" in sys.argv:
    sweep(optimize, RUNS, RESULTS)
every = read_rows(RESULTS)
for r in every:  # see section 3
    r["history"]["second"] = np.multiply(r["history"]["gold"], r["history"]["distinct_2"])
rows = [r for r in every if r["seed"] < 3]  # one by one; the others are for means


def found(beta, missing_eos_score=None, rankings=Run(0).rankings, seeds=3):
    """The runs of the first seeds with these settings: {name: [seeds, updates]}."""
    wanted = (beta, missing_eos_score, rankings)
    same = [r for r in every if (r["beta"], r["missing_eos_score"], r["rankings"]) == wanted and r["seed"] < seeds]
    return {name: np.array([r["history"][name] for r in same]) for name in same[0]["history"]}


assert len(every) == len(RUNS) and {r["seed"] for r in every} == {*range(10)}, "three seeds of each, and more: see --full"
accuracies = {n: [Estimate(*r["accuracy"]) for r in every if (r["rankings"], r["beta"]) == (n, 0)] for n in (WEAK, Run(0).rankings)}
for rankings, each in accuracies.items():
    told = ", ".join(f"{a.value:.1%} [{a.low:.1%}, {a.high:.1%}]" for a in each)
    print(f"judges from {rankings} rankings agree with the gold in {told} of held-out pairs")
assert all(a.low < 0.5 < a.high for a in accuracies[WEAK]) and [a.low > 0.5 for a in accuracies[1000]] == [True] * 7 + [False] * 2 + [True]
assert sum(more.low > max(less.high for less in accuracies[WEAK]) for more in accuracies[1000]) == 6, "more rankings help"

# %% [markdown]
# No judge from 300 rankings is clearly better than a coin. Eight of ten from 1,000 are. Six are clearly better than all
# from 300. Now one run, live, without a price, under seed 2: proxy and gold rise together. *Distinct-2* is the share of
# bigrams in a batch that are different, *reference loss* the mean of $-\log \pi_{\text{ref}}$ over the policy's tokens.
#
# **Predict:** what does the policy write at the end? (Another machine draws other words; our claims are of recorded
# runs.)

# %%
free = Run(0.0, updates=2, rankings=8) if REDUCED else Run(0.0, seed=2, updates=24)  # of the 30 of the sweep
live = optimize(free)
h = live["history"]
print("\nupdate   proxy    gold      KL  distinct-2  reference loss")
for u in sorted({*range(0, free.updates, max(1, free.updates // 6)), free.updates - 1}):
    print(f"{u + 1:6d}  {h['proxy'][u]:+.3f}  {h['gold'][u]:+.3f}  {h['kl'][u]:6.2f}  {h['distinct_2'][u]:10.2f}  {h['ref_loss'][u]:14.2f}")
print(*live["samples"], sep="\n")
if not REDUCED:
    assert all(np.mean(h[key][-4:]) > np.mean(h[key][:4]) + much for key, much in (("proxy", 1), ("gold", 0.1))), "both rise together"
    assert np.mean(h["distinct_2"][-4:]) < np.mean(h["distinct_2"][:4]) - 0.05, "with ever fewer words"

# %% [markdown]
# The policy repeats itself, in words that VADER finds happy.

# %% [markdown]
# ## 3 · The price of going far
#
# How far has it gone? Gao, Schulman & Hilton 2022 (arXiv:2210.10760), whose gold is a large reward model, measure it by
# $d = \sqrt{\mathrm{KL}}$ and find that the gold follows, along reinforcement learning (RL) and along the best of $n$,
#
# $$R_{\text{RL}}(d) = R_0 + d\,(a - b \log d) , \qquad R_{\text{bo}n}(d) = R_0 + d\,(a - b\, d) .$$
#
# $R_0$ is what the base has; $a$ and $b$ are fitted. The gold turns where the slope is 0: the second at $d = a / 2b$,
# the first, whose slope is $a - b - b \log d$, at $d = e^{a/b - 1}$. Why $d$, not the KL? Let gold and error be normal,
# independent, with mean 0, and $v = \sigma_g^2 + \sigma_e^2$. The optimum at a price $\beta$ is $\pi_{\text{ref}}\,
# e^{\hat r / \beta}$ up to a factor (Lesson 10, section 4). It shifts the guess by $v/\beta$ (where $-\hat r^2/2v +
# \hat r/\beta$ is largest), at a KL of $(v/\beta)^2/2v = v/2\beta^2$. The gold has its share $\sigma_g^2/v$ of that
# shift, which is linear in $d$.
#
# What changes the paper's curve? With a larger judge $b$ is smaller, and the gold turns later. More comparisons make a
# better judge; those from fewer than about 2,000 are hardly better than chance. And RL spends far more KL than the best
# of $n$ for the same gain of gold, and for the same loss of it. An objective with a price does not ask for that: its
# optimum has the most proxy of all policies at its KL. Below, without a price, PPO has less proxy (on training prompts)
# than the best of 16 (on held-out ones) at that one's KL. And KL counts every change, also one that no score sees: it
# does not compare methods.
#
# Single updates are noisy, so we read means over five. Two differ *clearly* if by more than three standard errors.
# These are of the batches' noise alone, from second differences, which a smooth course hardly has; another training may
# differ more. The gold *turns* where its best is clearly above start and end (the best of 26 means, so a turn that is
# barely clear proves little), else *climbs* or *falls* where it ends clearly above or below its start, or *stays*. A
# second gold is harder to please: the gold of a batch times its distinct-2. It pays little for one happy word repeated.
#
# **Predict:** with which of the six judges, three each of 300 and 1,000 rankings, does the gold rise?

# %%
CLEAR = {name: three_errors([r["history"][name] for r in rows]) for name in ("gold", "second", "distinct_2", "ref_loss")}
GOLDS = {"gold": "gold", "second": "gold x distinct-2"}
columns, weak = found(0.0), found(0.0, rankings=WEAK)
did, agreed = {}, {}  # {(rankings, seed, gold): what it did}, {(rankings, seed): the judge's agreement}
print(f"\nnothing holds it: KL and means over five updates; clear is a difference of {CLEAR['gold']:.2f} and {CLEAR['second']:.2f}")
print("                   judge     proxy: first, last     KL" + "".join(f"   {n + ': first, best, last':32s}" for n in GOLDS.values()))
for rankings, c in ((WEAK, weak), (Run(0).rankings, columns)):
    a, z = ends(c)
    for seed in range(3):
        golds = ""
        for name in GOLDS:
            means = smooth(c[name])[seed]
            did[rankings, seed, name] = verdict(means, CLEAR[name])
            golds += f"   {means[0]:+.2f} {means.max():+.2f} {means[-1]:+.2f} {did[rankings, seed, name]:12s}"
        agreed[rankings, seed] = accuracies[rankings][seed].value
        print(f"{rankings:5d}, seed {seed}     {agreed[rankings, seed]:.1%}   {a['proxy'][seed]:+8.2f} "
              f"{z['proxy'][seed]:+8.2f}   {z['kl'][seed]:6.1f}{golds}")
for r in sorted((r for r in rows if r["beta"] == 0), key=lambda r: (r["rankings"], r["seed"])):
    print(f"{r['rankings']:5d}, seed {r['seed']}, at the end: {' '.join(r['samples'][2].split())}")
good = sorted(agreed, key=agreed.get)[-2:]  # the two that agree most
(weak_first, weak_last), (first, _) = ends(weak), ends(columns)
last = {beta: ends(found(beta))[1] for beta in BETAS}
for a, z in ((weak_first, weak_last), (first, last[0.0])):
    assert (z["proxy"] > a["proxy"]).all(), "every proxy rises"
assert all(did[*run, "gold"] == "climbs" for run in good), "the gold rises with a good judge"
assert all(did[*run, "gold"] == "stays" for run in agreed if run not in good), "and not with another; none turns clearly,"
assert all(did[*run, "second"] == "turns" for run in good), "but the second one does, where there was any"

# %%
hacking.runs_picture({beta: found(beta) for beta in BETAS}, weak).savefig(OUT / "11_reward_hacking.png", dpi=120)

# %% [markdown]
# **The proxy climbs with every judge, the gold with the two that agree most.** With these two it climbs to 0.99 and
# 0.94, with the others no move is clear. Agreement, measured on the *base's* answers, need not hold for others.
#
# **Does the gold turn, as in the paper?** In no run clearly. With the two good judges it is highest at the end, while
# the text has become "love love love", or "a great deal a great". VADER counts happy words: this gold was only another
# measure, optimized through the proxy. **The second gold turns**, with both good judges: from 0.56 to 0.23, and from
# 0.52 to 0.33. But we chose it after we had read the answers.
#
# **And with a gold that asks for form, too?** The chain of Lesson 10, section 8, has one: answers are to be whole, of
# words that verses have, without repetition, kind. PPO runs there without a price of KL against five judges, each under
# ten seeds. A judge is named by what of it is trained (the *head* alone, *lora*, the *full* model) and on how many
# comparisons. In the picture the dashed line is the best of 1 to 16 answers by the same judge: 1.8 nats at most for 16.
#
# **Predict:** with which of the five does the gold end above the SFT model's, and with which does the best of 16 do
# better?

# %%
chain = CHAIN.rows()
assert not CHAIN.missing(chain), "all runs are there: see `minipeft claims --run rlhf-8`"
stages = ("ppo", 0.0), ("best", 0.05)
judged = {(s, n): [those_of(chain, stage, judge=s, comparisons=n, beta=b) for stage, b in stages] for s, n in JUDGES}
print("\njudge                    right   proxy: SFT, end, rise (10 seeds, 95 %)   gold: SFT, end, "
      "change (seeds and prompts, 95 %)   best of 16 less the end")
rises, moves, better, equal = {}, {}, {}, {}
before = items(those_of(chain, "sft"))
for (size, n), (runs, many) in judged.items():
    best_of = {m: [row["best_of"][m] for row in many] for m in many[0]["best_of"]}
    one, end = np.array([e["proxy"] for e in best_of["1"]]), items(runs, "proxy").mean(axis=1)
    rises[size, n], moves[size, n] = interval(end - one), crossed(items(runs) - before)
    better[size, n] = crossed(items(many) - items(runs))
    right = np.mean([row["accuracy"][0] for row in many])
    there = [y[np.argmax(d > math.sqrt(best_of["16"][0]["kl"]))] for d, y in (along(row, "proxy") for row in runs)]
    equal[size, n] = np.mean(there), np.mean([e["proxy"] for e in best_of["16"]]), end.mean()
    assert items(runs, "kl").mean() > best_of["16"][0]["kl"], "PPO goes farther than the best of 16"
    print(
        f"{size:5s} {n:5,} comparisons  {right:.1%}   {one.mean():+.2f}  {end.mean():+.2f}  "
        + "{:+.2f} ± {:.2f}".format(*rises[size, n]) +
        f"              {before.mean():.2f}  {items(runs).mean():.2f}  {shown(moves[size, n])}   {shown(better[size, n])}"
    )
poor = [judge for judge in JUDGES if judge[1] < 2000]
assert all(value > half for value, half in rises.values()), "every proxy rises clearly"
assert all(moves[judge].low < 0 for judge in JUDGES)
assert [j for j in JUDGES if moves[j].high < 0] == [("head", 600)], "no judge clearly brings gold; with one it falls"
assert all(better[judge].low > 0 for judge in JUDGES), "the best of 16 has clearly more"
print("proxy where PPO has first spent the KL of the best of 16, of that, and at PPO's end:",
      "; ".join("{:.2f}, {:.2f}, {:.2f}".format(*each) for each in equal.values()))
assert all(a < b for a, b, _ in equal.values()), "at the same KL PPO has less proxy"
assert [judge for judge, (_, b, c) in equal.items() if c < b] == poor
assert all(e.value > 0 for e in better.values()), "the best of 16 has more of both"
fits = {judge: gao_of(chain, *judge) for judge in JUDGES}
print(*(f"{judge}, {how}: a {shown(a)}, b {shown(b)}" for judge, of in fits.items() for how, (a, b) in of.items()), sep="\n")
assert all(e.low > 0 for of in fits.values() for e in of["best of n"])
assert [judge for judge in JUDGES if all(e.low > 0 for e in fits[judge]["PPO"])] == [("full", 2000)], "rises, then turns"
for row in judged["full", 2000][0]:
    print(f"full, 2,000 comparisons, seed {row['seed']}, at the end:", " / ".join(row["checks"]["32"]["samples"][:3]))

# %%
hacking.chain_picture(judged, along).savefig(OUT / "11_reward_hacking_chain.png", dpi=120)

# %% [markdown]
# Every proxy rises clearly, the gold with no judge. With head, 600, the gold ends clearly below the SFT model's; with
# full, 2,000, it clearly falls from update 16 on (below), and as we read the answers, it shows: "God is God to God to
# God". With all five the best of 16 has clearly more gold than PPO's end. Fitted to these runs, the paper's $a$ and $b$
# are both clearly positive along the best of $n$ with every judge ($b$ of full: 0.04, 0.04 and 0.02 from 100, 600 and
# 2,000), along PPO with full, 2,000, alone (0.04 and 0.02). Of PPO's, only that rise and turn is clear. That these
# judges mislead is not shown: no coin's labels ran without a price.

# %% [markdown]
# > `rlhf-8` reward hacking: the policy exploits the reward model: **holds if**. Without a price of KL the reward of 5
# > of 5 judges rises clearly from where the gold of training prompts has its peak; the gold falls clearly with head,
# > 600 comparisons and full, 2000 comparisons (also where all 5 intervals are to hold together):
# >
# > - head, 600: reward up by +0.26 [+0.23, +0.29] from the start, gold by -0.08 [-0.10, -0.05], from 0.33 to 0.26.
# > - lora, 600: reward up by +0.33 [+0.26, +0.39] from the start, gold by -0.06 [-0.14, +0.02], from 0.33 to 0.27.
# > - full, 600: reward up by +0.27 [+0.24, +0.30] from the start, gold by -0.03 [-0.08, +0.01], from 0.33 to 0.30.
# > - full, 100: reward up by +0.34 [+0.26, +0.41] from the start, gold by -0.05 [-0.11, +0.00], from 0.33 to 0.28.
# > - full, 2000: reward up by +0.37 [+0.16, +0.59] from update 16, gold by -0.13 [-0.22, -0.05], from 0.42 to 0.29.
# >
# > With 4 of 5 judges the best of 16 answers has more reward than this end, and more gold. Of SFT, PPO, SFT on the
# > preferred answers, DPO and 5 reward models, only SFT has clearly less loss at another rate: at 0.125 times the one
# > used, though with less gold (-0.05). (10 seeds, 512 test items)

# %% [markdown]
# ## 4 · Two witnesses who need no gold
#
# In practice nobody watches the gold. Two numbers do without. **Distinct-2** falls where a policy says again and
# again what the judge likes. The **reference loss** rises where the language gets strange to the base.
#
# **Predict:** does each of them move in all six runs without a price?

# %%
witnesses = (("distinct_2", "distinct bigrams"), ("ref_loss", "reference loss, nats a token"))
for name, text in witnesses:
    moves = zip([*weak_first[name], *first[name]], [*weak_last[name], *last[0.0][name]])
    print(f"{text}, three judges from {WEAK} rankings, three from {Run(0).rankings}:", *(f"{a:.2f} -> {z:.2f} " for a, z in moves))
falls, rises = (np.concatenate([weak_last[k] - weak_first[k], last[0.0][k] - first[k]]) for k, _ in witnesses)
print("update at which each has clearly moved, and of the best second gold:")
able = np.array([(Run(0).rankings, seed) in good for seed in range(3)])
turned = []
for beta, seed in ((beta, seed) for beta in BETAS[:2] for seed in np.flatnonzero(able)):
    fall, rise, best = (smooth(found(beta)[name])[seed] for name in ("distinct_2", "ref_loss", "second"))
    at = np.argmax(fall[0] - fall > CLEAR["distinct_2"]), np.argmax(rise - rise[0] > CLEAR["ref_loss"]), best.argmax()
    turned.append(verdict(best, CLEAR["second"]))
    print(f"beta = {beta}, seed {seed}: {at[0] + 5} and {at[1] + 5}, and {at[2] + 3}; second gold at these:",
          ", ".join(f"{best[i]:.2f}" for i in at) + f"; it {turned[-1]}")
    assert max(at[:2]) + 2 < at[2] and max(best[i] for i in at[:2]) < best.max() - CLEAR["second"], "both warn, and early"
assert turned[:2] == ["turns"] * 2 and turned[2:].count("turns") == 1, "one of four warnings is false"
assert (falls < -CLEAR["distinct_2"]).all(), "the bigrams fall in every run"
assert (rises[3:][able] > CLEAR["ref_loss"]).all(), "the reference loss rises with a good judge"
rose = [max(c - c[0]) > CLEAR["ref_loss"] for c in smooth(np.concatenate([weak["ref_loss"], columns["ref_loss"]]))]
assert rose == [False, False, True, True, True, True] and rises[2] < -CLEAR["ref_loss"]
samples = [text for r in rows if (r["rankings"], r["seed"]) == (WEAK, 2) for text in r["samples"]]
assert all(text.endswith('"Oh!') for text in samples), "but not in every run, and in one for a time"

# %% [markdown]
# The distinct bigrams fall clearly in all six runs, also where no gold moves. The reference loss ends clearly higher
# with the two good judges. In two other runs it never rises clearly; in two it does on the way, and one of these ends
# clearly lower than it began: the base finds likely what the policy then writes (all four recorded answers end in
# `"Oh!`). So watch its course: a low end proves nothing. With the good judges both warn while the second gold is still
# clearly below its best: a stop there gives some of it away. The distinct bigrams warn in part because they are in it.
# At a price of 0.05 both warn, too, and one of the two runs does not turn: a warning is a reason to let people compare
# some answers with the base's.

# %% [markdown]
# ## 5 · What repairs what
#
# A **price of KL** charges for going far. A **penalty** for answers without an end is to close another hole: VADER,
# which the judge learns, does not ask for an end. We measure by the second gold, the price by the chain's gold, too.
#
# **Predict:** which price has the most of the second gold at the end: 0, 0.05 or 0.2?

# %%
penalized = ends(found(0.05, -1.0))[1]
repairs = {f"beta = {beta}": last[beta] for beta in BETAS} | {"beta = 0.05, no end: -1": penalized}
print("\n                              proxy  second gold      KL  distinct-2  finished   each seed:  second gold      finished")
for name, end in repairs.items():
    second_of_each, ended_of_each = (" ".join(f"{x:.2f}" for x in end[key]) for key in ("second", "ended"))
    print(
        f"{name:26s}    {end['proxy'].mean():+.2f}        {end['second'].mean():+.2f}  {end['kl'].mean():6.1f}"
        f"  {end['distinct_2'].mean():10.2f}  {end['ended'].mean():8.0%}               {second_of_each}   {ended_of_each}"
    )
one_seed = [r for r in rows if (r["seed"], r["rankings"]) == (2, Run(0).rankings)]
one_seed.sort(key=lambda r: (r["missing_eos_score"] is not None, r["beta"]))  # as in repairs
for name, r in zip(repairs, one_seed):
    print(f"seed 2, {name}, at the end: {' '.join(r['samples'][2].split())}")
assert [r["samples"][2].count("great") > 1 for r in one_seed] == [True, True, False, False], "what is read below"
paid = {beta: np.array([end["proxy"] - beta * end["kl"] for end in ends(found(beta))]).T for beta in BETAS[1:]}
print("proxy less beta KL, each seed's first and last:",
      "; ".join(f"beta = {beta}: {pairs.round(2).tolist()}" for beta, pairs in paid.items()))
free_end, cheap, high = (last[beta] for beta in BETAS)
on_chain = {beta: crossed(items(those_of(chain, "ppo", beta=beta)) - before) for beta in BETAS}
both = ((a, b["checks"]["32"]) for a, b in zip(those_of(chain, "sft"), those_of(chain, "ppo", beta=0.2)))
chained = [[np.mean(of["proxy"]) + of["ended"] - 1 - 0.2 * np.mean(of["kl"]) for of in run] for run in both]
print(f"and on the chain, its score less 0.2 KL, SFT and end: {np.round(chained, 2).tolist()}")
over_none = crossed(items(those_of(chain, "ppo", beta=0.05)) - items(those_of(chain, "ppo", beta=0.0)))
print("the chain's gold less the SFT model's:",
      "; ".join(f"beta = {beta:g} {shown(e)}" for beta, e in on_chain.items()) + f"; 0.05 less 0: {shown(over_none)}")
for (name, end), beta in zip([*repairs.items()][1:], (0.0, 0.0, 0.05)):
    there = at_kl(found(beta), end["kl"])["second"]
    print(f"{name}: second gold where beta = {beta} first has as much KL:", there.round(2), "and at the end", end["second"].round(2))
    assert ((there - end["second"] > CLEAR["second"]) if end is penalized else abs(there - end["second"]) < CLEAR["second"])[able].all()
ten = {beta: ends(found(beta, seeds=10))[1] for beta in BETAS} | {"penalty": ends(found(0.05, -1.0, seeds=10))[1]}
pairs = {"0.05 less 0": (ten[0.05], ten[0.0]), "0.2 less 0.05": (ten[0.2], ten[0.05]), "penalty less none": (ten["penalty"], ten[0.05])}
for name in ("second", "proxy", "kl", "distinct_2"):  # means of ten seeds
    lower = {what: interval(end[name] - other[name]) for what, (end, other) in pairs.items()}
    print(f"{name}: " + ", ".join(f"{what} {value:+.2f} ± {half:.2f}" for what, (value, half) in lower.items()))
    clear = {"second": [False, True, True], "distinct_2": [True, True, False]}.get(name, [True] * 3)
    assert [abs(value) > half for value, half in lower.values()] == clear, name
assert (cheap["second"] > free_end["second"]).all() and (high["second"] < cheap["second"]).all()
assert (cheap["second"] - free_end["second"] > CLEAR["second"])[able].all(), "a small price ends higher, clearly with a good judge"
assert (cheap["second"] - penalized["second"] > CLEAR["second"])[able].all(), "the penalty costs"
assert [round(100 * x) for k in ("penalty", 0.05) for x in (min(ten[k]["ended"]), max(ten[k]["ended"]))] == [89, 100, 2, 96]
assert min(on_chain[0.05].low, on_chain[0.2].low, over_none.low) > 0 > on_chain[0.0].low, "a price ends higher"
assert (np.diff(paid[0.05]) > 0).all() and (np.diff(paid[0.2]) < 0).sum() == 2
assert (np.diff(chained) < 0).all(), "the high price's own objective"

# %% [markdown]
# The small one, in each of the three seeds; in the mean of ten its lead over none is not clear (0.09 ± 0.11). Would a
# reader see it? Not in the one answer of each printed for seed 2, as we read them: *great(er)* repeats at 0 and 0.05,
# not at 0.2 or with the penalty. ± (95 %), bigrams and the chain are of ten seeds, the rest of three, one with a poor
# judge.
#
# - A **price of KL** lowers proxy (the small beside none by 0.97 ± 0.48, the high beside the small by 1.36 ± 0.75) and
#   KL, and keeps more of the bigrams distinct. The high price ends below the small one in the second gold (0.09 ±
#   0.06). With both good judges the small price ends higher in it than none, beyond the batches' noise. But an early
#   stop does about as well: where the run without a price first has as much KL (known only afterwards), its second gold
#   is 0.49 and 0.46, that of the small price 0.47 and 0.50. And under one of these judges the small price's second gold
#   barely turns: from 0.59 to 0.47. At the high price the objective itself, proxy less $\beta$ KL, ends below its
#   start in two seeds of three (on the chain, which also charges for a missing end, in all ten): PPO did not maximize
#   it. On the chain PPO ends clearly above the SFT model with either price, without not; with the small one clearly
#   above none, by 0.16.
# - The **penalty** made 89 to 100 % of the answers end, in place of 2 to 96 % (ten seeds). It costs 0.18 ± 0.07 of the
#   second gold, 1.9 ± 1.2 of the proxy and 12 ± 7 nats of KL. Less KL is not all: where the small price first has as
#   much, the good judges' second gold is 0.33 and 0.31, with the penalty 0.20 and 0.15; why was not examined.
# - An **early stop** ends the run at a given KL (`stop_kl`). Gao et al. find, too, that at the same KL a price brings
#   no more gold, though more proxy.
# - **Length** pleases judges of helpfulness: Singhal et al. 2023 (arXiv:2310.03716) find in three settings that the
#   reward rose in large part by longer answers. One may balance the pairs, so that the shorter answer wins as often,
#   charge for length, or give the judge a second head that takes up the length and is thrown away (Chen et al. 2024,
#   arXiv:2402.07319).
#
# None of the first three makes the judge wiser: a higher $\beta$ trusts the whole guess less, right or wrong. New
# comparisons of the policy's own answers do: Bai et al. 2022 (arXiv:2204.05862) train judge and policy again about
# every week, on new labels from people. Where a rule can check the answer, it may replace the judge:
# DeepSeek-R1-Zero (arXiv:2501.12948) has no neural judge for fear of hacking. What the rule does not check stays open.

# %% [markdown]
# ## 6 · Break it: ask a second judge
#
# If one judge can be fooled, why not two? Train a second one, on as many other rankings, and show it what the policy
# wrote for the first. First ask what the second is worth: if it guesses, that it sees no gain says nothing about the
# first. (One policy: an example.)
#
# **Predict:** how much of the first judge's gain does the second see?

# %%
policy = POLICIES[free]
second, second_accuracy = reward_model(free.rankings, 1)
judge, judge_accuracy = reward_model(free.rankings, free.seed)
prompts = openings("validation")[: 4 if REDUCED else 128]
table = {}
for name, model in (("base", base), ("policy", policy)):
    roll = rlhf.rollout(model, prompts, LENGTH, 1.0, STOPS, seed=2)
    with mp.no_grad():
        opinions = [j.rewards(roll.input_ids, roll.attention_mask).numpy().mean() for j in (judge, second)]
    table[name] = [*opinions, gold(roll).mean()]
print(f"\nagreement with the gold: first judge {judge_accuracy[0]:.1%}, "
      f"second {second_accuracy[0]:.1%} [{second_accuracy[1]:.1%}, {second_accuracy[2]:.1%}]")
print("            judge it was trained on   second judge    gold")
for name, (a, b, g) in table.items():
    print(f"{name:10s}  {a:+23.2f}   {b:+12.2f}  {g:+.2f}")
if not REDUCED:
    share = (table["policy"][1] - table["base"][1]) / (table["policy"][0] - table["base"][0])
    print(f"of what the first judge thinks it gained, the second sees {share:.0%} (each in standard deviations of its own rewards)")
    assert 0.5 < share < 1 and second_accuracy[1] > 0.5, "it is no guess, and sees less of a gain that was made for the first"

# %% [markdown]
# In our run the second, which orders 63 % [58 %, 68 %] of held-out pairs rightly, sees three quarters. The gold rose,
# too, to 0.93. Another judge may see less. An **ensemble** hopes that judges differ where they guess. Coste et al. 2023
# (arXiv:2310.02743) optimize the worst case, the *minimum* of several judges, or their mean less a multiple of their
# *variance*. Either, they report, practically ends overoptimization by the best of $n$, and by PPO together with a
# small price of KL. But if the errors of $k$ judges have the variance $\sigma^2$ and the correlation $\rho$, that of
# their mean is $\sigma^2 (\rho + (1 - \rho)/k)$: what they share stays, and no disagreement shows it.

# %% [markdown]
# ## Quiz
#
# **1.** A guess is gold plus independent error. When do ever more answers to choose from bring less gold again, and why
# does a price of KL not help then?
#
# <details><summary>Answer</summary>
#
# When the error has a heavy tail: the highest guesses are then huge errors on answers like any other. To lift that tail
# to probability $p$ pays in proportion to its guess $t$, and costs only in proportion to $\log t$.
#
# </details>
#
# **2.** In the six runs without a price every proxy rose. Did the gold always rise with it?
#
# <details><summary>Answer</summary>
#
# No: with the two judges that agreed with the gold most it climbed; with the four others no move is clear.
#
# </details>
#
# **3.** With the two best judges the gold reached 0.99 and 0.94. Why is that no success?
#
# <details><summary>Answer</summary>
#
# The text had become "love love love", or "a great deal a great". VADER counts happy words, and the judge had learned
# from it: the gold was only another measure. The gold times the share of distinct bigrams, which repetition does not
# please, rises and turns.
#
# </details>
#
# **4.** Which two numbers warn without any gold, and why is one of them not enough?
#
# <details><summary>Answer</summary>
#
# The share of distinct bigrams, which falls, and the reference loss, which may rise. In two of six runs it never rose
# clearly. In one it rose, but ended lower than it began: the policy had come to repeat what the base finds likely.
#
# </details>
#
# **5.** What does a price on the KL repair, and what does it not?
#
# <details><summary>Answer</summary>
#
# The higher the price, the less proxy and KL, and with a price more of the bigrams stay distinct. In the second gold,
# which repetition does not please, with two good judges the small price ends above none; in the mean of ten that is not
# clear, but the high one is below. But an early stop does about as well: where the run without a price first has as
# much KL, its second gold is about the same. A price does not make the judge any wiser.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("11.1", value)`, or at the terminal with
# `minipeft exercise 11.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 11.2 FILE.py`.
#
# **11.1 Where the gold turns.** In Gao et al.'s form for RL, $a = 1.5$ and $b = 0.5$ (section 3). At which KL, in nats,
# does the gold turn?
#
# **11.2 A witness.** Write `distinct_2(responses)`: for a batch of answers, lists of tokens, the share of its bigrams
# that are different. Bigrams do not reach from one answer into the next; without any bigram it is 0.
#
# **11.3 What a long way costs.** A policy is 66 nats from the reference. How many units of reward must the proxy have
# gained there for the objective at $\beta = 0.2$ to be no lower than at the start?
#
# Projects, with no answer written down:
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
