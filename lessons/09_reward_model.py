# %% [markdown]
# # Lesson 9 · A reward model: from choices to a number
#
# Two people who give marks from one to a hundred use two scales; asked which of two texts is better, they need none. A
# reward model, or *judge*, turns such choices into a number. After this lesson you can derive its loss from a model of
# how people choose, name choices that no such number explains, use rankings of more than two, and read the number at
# the right place; say why more than one pass overfits, what few and noisy labels teach, and what accuracy raters who
# disagree allow; put a model in the rater's place; and test and repair how sure a judge is.
#
# You need Lessons 3 and 4 (LoRA), and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Section 6 and the end of
# section 5 use Lesson 10's chain, and say what they need of it. Reading takes about 25 minutes (200 words or 25 lines
# of code a minute, up to the quiz). Run it with `python lessons/09_reward_model.py` (half a minute on two cores), or
# open it as a notebook. With `--full` it computes the runs missing in `lessons/results/09_reward_model.jsonl` (all:
# twenty minutes).
#
# Environment: `MINIPEFT_REDUCED=1` trains on less; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import os
import sys
from functools import cache
from itertools import permutations
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import judges, sweep
from experiments.judges import BY_1_2F, BY_VARIANCE, CLEAN, FEW, FEWEST, MANY_NOISY, NOISY, Run, accuracy, labels_of

import minipeft as mp
from minipeft import diagrams, rlhf
from minipeft.claims import constitution
from minipeft.claims.chain_rules import CHAIN, CONSTITUTION, crossed, shown, those_of
from minipeft.claims.chain_tuning import TUNED, rivals
from minipeft.experiments.rows import read_rows
from minipeft.experiments.seeds import interval

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "09_reward_model.jsonl"
if REDUCED:
    print("REDUCED SETTING: judges from 4 and 8 rankings for 100 and 300, 8 held-out prompts for 512: "
          "no share of what is computed now says anything. The rows are those of the full lesson.\n")

base, tokenizer = mp.load_base()
STOPS = (tokenizer.eos_token_id, *(tokenizer.token_to_id(mark) for mark in ".!?"))
LENGTH, K = 20, 4

# %% [markdown]
# ## 1 · How people choose
#
# Learning from human feedback has three stages; this lesson is the second:

# %%
diagrams.rlhf_stages(base.config).savefig(OUT / "09_reward_model_stages.png")

# %% [markdown]
# Bradley and Terry's model: every text has a quality $r$, and of two texts one wins with a probability that depends on
# the difference alone,
#
# $$P(y_w \succ y_l) = \sigma(r(y_w) - r(y_l)), \qquad \mathcal L = -\log \sigma\left(r(y_w) - r(y_l)\right),$$
#
# with $y_w$ the winner, $y_l$ the loser, and $\sigma(z) = 1 / (1 + e^{-z})$. So the loss of a pair *is* its negative
# log-likelihood. By hand, with the gradient, and as the library has it: two pairs, the first in the right order (1
# against 0.3), the second in the wrong one (0.2 against 0.5).
#
# **Predict:** which pair has the larger gradient?

# %%
chosen, rejected = np.array([1.0, 0.2]), np.array([0.3, 0.5])
by_hand = np.log1p(np.exp(-(chosen - rejected))).mean()
r_w, r_l = (mp.Tensor(r, requires_grad=True) for r in (chosen, rejected))
loss = rlhf.reward_loss(r_w, r_l)
loss.backward()
print(f"by hand {by_hand:.10f}, library {loss.item():.10f}; gradient {r_w.grad} of the chosen, {r_l.grad} of the rejected")
assert abs(loss.item() - by_hand) < 1e-12
assert np.allclose(r_w.grad, -1 / (1 + np.exp(chosen - rejected)) / 2), "largest where the model is wrong"
assert np.allclose(r_w.grad, -r_l.grad), "only the difference is learned: the zero of r is anywhere"

# %% [markdown]
# The second: the gradient of one pair's loss has the size $1 - \sigma(r_w - r_l)$, the probability that the model gives
# to the wrong order. It moves the two rewards apart and says nothing of their sum. Both texts answer one prompt, so
# each prompt has a zero of its own: the loss never compares the rewards of answers to two prompts. For the choice of
# answers this does not matter: a constant added to all answers of a prompt leaves the best one best.
#
# **What no reward explains.** Three people order three texts ABC, BCA and CAB. Two of three then prefer A to B, B to C,
# and C to A. At equal rewards each text is pulled up by the pair that it mostly wins as hard as down by the other. So
# the gradient is zero, and as the loss is convex, this is its minimum: the model says 0.5 where two of
# three agree. A model that reads both texts at once can say 2/3 each time. But then no text is best (Munos et al.
# 2023, arXiv:2312.00886, look for a policy that no other beats).
#
# Two refinements: a **margin** $m$, for pairs of which the rater was sure, asks for more than winning, $-\log\sigma(r_w
# - r_l - m)$ (Llama 2, Touvron et al. 2023, arXiv:2307.09288); **centering** adds $c\,(r_w + r_l)^2$, which pins the
# zero down.

# %%
full = rlhf.reward_loss(mp.Tensor(chosen), mp.Tensor(rejected), margin=np.array([0.5, 0]), center=0.01)
by_hand = (np.log1p(np.exp(-0.2)) + np.log1p(np.exp(0.3))) / 2 + 0.01 * (1.3**2 + 0.7**2) / 2
print(f"with a margin of 0.5 on the first pair, and centering: by hand {by_hand:.7f}, library {full.item():.7f}")
assert abs(full.item() - by_hand) < 1e-12

# %% [markdown]
# ## 2 · A rater
#
# Our rater follows **VADER** (Hutto & Gilbert 2014), rules over words that people rated for sentiment: the happier text
# is preferred. VADER's number, from -1 to 1, is the **gold**: what the rater goes by, and what we compare the reward
# model with. The texts are the base model's own: it continues openings of sentences by Jane Austen, four times each.
# The rater adds noise to each score and sorts. With Gumbel's noise, $-T \log(-\log u)$ for a uniform $u$ and a scale
# $T$, every pair is Bradley-Terry with $r = \text{score} / T$ (the difference of two such noises, over $T$, has the
# distribution function $\sigma$). The whole order is then Plackett and Luce's: the first is drawn by the softmax of $r$
# over all answers, the next over the rest, and so on. With probability `flip` the rater turns the order round.

# %%
@cache
def labelled(split, n, seed):
    """(prompts, answers, gold scores [n, K])."""
    prompts = [ids for ids in map(tokenizer.encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]
    prompts = [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))[:n]]
    answers = rlhf.sample_answers(base, prompts, K, LENGTH, stop_token_ids=STOPS, seed=seed)
    gold = np.array([rlhf.vader([tokenizer.decode(a, skip_special_tokens=True) for a in own]) for own in answers])
    return prompts, answers, gold


LARGEST = 8 if REDUCED else 300
prompts, answers, gold = labelled("train", LARGEST, 0)
order = rlhf.rank(gold, np.random.default_rng(0), temperature=0.1)
print(f"\n{len(prompts)} prompts; one of them, ranked by the rater:")
for i in order[1]:
    print(f"  {gold[1, i]:+.2f}  {tokenizer.decode(prompts[1])} |{tokenizer.decode(answers[1][i], skip_special_tokens=True)}")
i, j = np.triu_indices(K, 1)
zero, tied = (gold == 0).mean(), (gold[:, i] == gold[:, j]).mean()
print(f"{zero:.0%} of the answers have no word that VADER knows, or a balance of them: gold 0; so {tied:.0%} of the pairs are tied")
four = np.array([0.3, 0.2, 0.1, 0.25])
first = np.bincount(rlhf.rank(np.tile(four, (20000, 1)), np.random.default_rng(2), temperature=0.1)[:, 0], minlength=4) / 20000
assert np.allclose(first, mp.functional.softmax(mp.Tensor(four / 0.1)).numpy(), atol=4 * 0.5 / 20000**0.5), "Plackett and Luce"

# %% [markdown]
# Between tied answers the noise decides, and the reward model learns from these coin flips, too. Accuracies below are
# of pairs that are not tied. All pairs, tied ones too, are in what section 5 prints as our rater's ceiling, and in
# section 7.

# %% [markdown]
# > `rlhf-3` P(y1 > y2 | x) = sigmoid(r(x,y1) - r(x,y2)): **holds**. The loss is -log sigmoid(r1 - r2) to 2e-16, and of
# > 20,000 choices of a rater with Gumbel noise the share is the sigmoid's for 5 of 5 differences; whether people choose
# > so is another question. (20000 test items)

# %% [markdown]
# ## 3 · All pairs of a ranking, each text once
#
# A ranking of $K$ answers holds $K(K-1)/2$ comparisons. InstructGPT puts them all into **one batch element**: the $K$
# texts are computed once, and their scores are compared in every pair. It is cheaper. And as shuffled pairs, each text
# would come back in $K - 1$ updates of one pass, which overfitted (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

# %%
diagrams.ranking(K).savefig(OUT / "09_reward_model_ranking.png")

# %%
ranked = rlhf.rankings(prompts, answers, order)
batch = rlhf.collate_rankings(ranked[:8])
pairs = len(batch.arguments["better"])
print(f"\n8 rankings of {K}: {pairs} pairs from {len(batch.arguments['input_ids'])} texts; as pairs they would take {2 * pairs} texts")
assert pairs == 8 * K * (K - 1) // 2 and len(batch.arguments["input_ids"]) == 8 * K

# %% [markdown]
# The loss takes the pairs of a ranking as independent. They are not: A before B and B before C decide A
# and C. So over the orders the products of the pairs' probabilities do not sum to 1: circles (A before B before C
# before A), which no ranking has, take the rest. Plackett and Luce normalize over orders instead, by a softmax at each
# place. For $K = 2$ the two are one loss; for four texts, over all 24 orders:
#
# **Predict:** six pairs of one ranking say as much as how many independent ones?

# %%
orders = np.array(list(permutations(range(K))))  # best first
wins = K - 1 - np.argsort(orders, axis=1)  # of each text, in each order
for r in (four / 0.1, np.zeros(K)):
    placed, sigma = r[orders], 1 / (1 + np.exp(r - r[:, None]))  # sigma[a, b]: a is preferred to b
    luce = np.prod([np.exp(placed[:, k]) / np.exp(placed[:, k:]).sum(1) for k in range(K - 1)], axis=0)
    product = np.prod(sigma[orders[:, i], orders[:, j]], axis=1)
    print(f"rewards {r}: Plackett and Luce's probabilities sum to {luce.sum():.3f}, the products of pairs to {product.sum():.3f}")
    assert np.isclose(luce.sum(), 1) and np.allclose(luce @ wins, sigma.sum(1) - 0.5), "the mean wins are what the pairs expect"
spread = wins[:, 0].var() / ((K - 1) / 4)  # of equal texts; a quarter is the variance of a tossed coin
print(f"equal texts: wins vary {spread:.2f} times as much as of tossed pairs, {pairs // 8} pairs are worth {pairs / 8 / spread:.1f}")
assert np.isclose(spread, (K + 1) / 3)

# %% [markdown]
# Both losses still aim at the same rewards: the pairs' gradient at a text is, up to sign, its wins less those expected,
# and at the rater's own rewards these agree on average. But error bars that count the pairs are wrong. Of $K$ equal
# texts, the wins of one, and so its gradient's noise, have the variance $(K^2-1)/12$ over rankings and $(K-1)/4$ with
# independent pairs. The ratio is $(K + 1)/3$, so six pairs of a ranking of four equal texts say as much as 3.6
# independent ones.

# %% [markdown]
# ## 4 · Where the number is read
#
# The model is the base with a scalar head in place of the vocabulary's. The score is that of the **last real token**,
# the only one that has seen the whole text. "The last token that is no padding" is a trap: many tokenizers pad with the
# end-of-text token, and then a text's own is skipped. transformers' `LlamaForSequenceClassification` falls into it, so
# there pad with a token that ends no text. Ours goes by the mask of real tokens.

# %%
model, end = rlhf.RewardModel(base, seed=0), tokenizer.eos_token_id
text = [*prompts[0], *answers[0][0][:5], end]
padded, mask = np.array([text + [end] * 4]), np.array([[1] * len(text) + [0] * 4])
alone, right = model.rewards(np.array([text])).item(), model.rewards(padded, mask).item()
wrong = model.rewards(padded[:, : len(text) - 1]).item()
print(f"\nalone {alone:.4f}, padded with end-of-text {right:.4f}; looking for the last id that is not padding: {wrong:.4f}")
assert abs(alone - right) < 1e-4 < abs(alone - wrong)

# %% [markdown]
# ## 5 · Train, and what labels are worth
#
# InstructGPT's reward model overfitted in more than one pass (appendix C.2). A head alone shows how. It has 32 random
# features for each of 20 pairs, and a coin has chosen the winners, so there is nothing to learn.

# %%
rng = np.random.default_rng(0)
features, unseen = rng.standard_normal((20, 32)), rng.standard_normal((2000, 32))  # the winner's, less the loser's
for decay in (0.0, 0.1):
    head, norms = np.zeros(32), []
    for step in range(1, 10001):
        head += 0.5 * (features.T @ (1 / (1 + np.exp(features @ head))) / 20 - decay * head)
        if step in (10, 100, 1000, 10000):
            norms.append(np.linalg.norm(head))
    sure = (1 / (1 + np.exp(-abs(unseen @ head)))).mean()
    print(f"weight decay {decay}: {(features @ head > 0).mean():.0%} in order; norm after 10, 100, ... steps",
          *np.round(norms, 2), f"; on average {sure:.2f} sure of new pairs")
    grows = np.diff(norms)
    assert np.ptp(grows) < 0.25 * grows.mean() and sure > 0.9 if decay == 0 else abs(grows[-1]) < 1e-3 and 0.7 < sure < 0.8

# %% [markdown]
# Once all pairs are in order, to lengthen the head always lowers the loss, and no head has the lowest. Its norm grows
# as the logarithm of the steps (Soudry et al. 2018, arXiv:1710.10345), and it ends up sure of new pairs that are coin
# flips. Weight decay gives the loss a minimum, but here the head is still 0.74 sure where 0.5 is right.
#
# Below, all weights are trained. A fresh head's scores have any scale, so `calibrate` gives them mean 0 and standard
# deviation 1 before training, and again at the end: then rewards of two models have one mean and one scale on the
# training texts. After the second time $\sigma(r_i - r_j)$ is no longer the probability that the loss has taught, so
# section 7 takes the rewards from before.

# %%
@cache
def train(run, pool):
    """(model, rewards of the held-out answers [n, K] in units of the loss)."""
    prompts, answers, gold = (part[: max(run.rankings, 128)] for part in labelled("train", pool, run.seed))
    rng = np.random.default_rng(run.seed)
    ranked = rlhf.rankings(prompts, answers, rlhf.rank(gold, rng, temperature=0.1, flip=run.flip))
    texts = [text for ranking in ranked for text in ranking.texts][:512]
    model = rlhf.RewardModel(base, seed=run.seed)
    model.calibrate(texts)
    once = {"num_train_epochs": 1, "per_device_train_batch_size": run.batch_size, "warmup_ratio": 0.1, "progress": False}
    args = mp.TrainingArguments(learning_rate=run.learning_rate, seed=run.seed, **once)
    if run.rankings:  # 0: the untrained head
        mp.Trainer(model, ranked[: run.rankings], args=args, collate=rlhf.collate_rankings).train()
    held_out = [np.array([*p, *a]) for p, own in zip(held_prompts, held_answers) for a in own]
    rewards = model.score_texts(held_out).reshape(-1, K)
    model.calibrate(texts)
    return model, rewards


def measure(run):
    return judges.measured(*train(run, max(2000, run.rankings)), run, held_prompts, held_answers, held_gold)


held_prompts, held_answers, held_gold = labelled("validation", 8 if REDUCED else 512, 0)  # the same for all judges
if "--full" in sys.argv:
    sweep(measure, judges.RUNS, RESULTS)
kinds = judges.by_kind(read_rows(RESULTS))  # {(rankings, share turned round, batch size): rows, by seed}

live = [Run(4), Run(8)] if REDUCED else [Run(100), Run(300)]
print("\n rankings   pairs in which the better answer is preferred (a coin: 0.5)")
for run in live:
    _, rewards = train(run, LARGEST)
    acc = accuracy(rewards, held_gold)
    print(f"{run.rankings:9d}   {acc:.3f}, where the gold differs by more than 0.3: {accuracy(rewards, held_gold, 0.3):.3f}")
    stored = [row["accuracy"] for row in kinds[FEWEST]]
    assert run.rankings != 100 or abs(acc - stored[run.seed]) < 2 * np.std(stored, ddof=1), "the sweep's row of this seed says the same"

# %% [markdown]
# Of $n$ rankings a share $f$ is turned round. At equal rewards the gradient of a turned pair is as large, with the
# other sign. So $1 - 2f$ of the mean gradient is left, and the mean square stays. If the mean is small beside the
# scatter over pairs, the scatter (mean square less squared mean) hardly changes. If learning were like taking a mean,
# whose noise falls as $1/\sqrt n$, gradient over noise would go as $(1 - 2f) \sqrt n$: that of $n (1 - 2f)^2$ clean
# ones. A text now wins with probability $f + (1 - 2f)\,\sigma$, never above $1 - f$. These pairs are no longer Bradley
# and Terry's; who knows $f$ puts this expression into the loss in place of $\sigma$.
#
# **Predict:** with a quarter turned round, how many clean rankings would 2000 be worth by that rule?

# %%
hits = {kind: judges.right(of) for kind, of in kinds.items()}  # [seeds, prompts], and the pairs of each prompt
print("\nrankings  turned round  batches of   pairs in the right order (5 seeds, 512 prompts)")
for kind in kinds:
    print("{:8,}  {:12.0%}  {:10}   ".format(*kind) + shown(crossed(*hits[kind]), 3))
beside = [(FEW, FEWEST), (CLEAN, FEW), (CLEAN, NOISY), (NOISY, FEW), (MANY_NOISY, BY_1_2F), (MANY_NOISY, BY_VARIANCE)]
beside += [(judges.NOISY_STEPS, BY_1_2F), (judges.NOISY_STEPS, judges.VARIANCE_STEPS)]
gain = {(one, other): crossed(hits[one][0] - hits[other][0], hits[CLEAN][1]) for one, other in beside}
for pair, difference in gain.items():
    print("{} less {}: ".format(*pair) + shown(difference, 3))
assert crossed(*hits[FEWEST]).low < 0.5 < crossed(*hits[FEW]).low and gain[FEW, FEWEST].low < 0, "100 rankings teach nothing clear"
assert gain[CLEAN, FEW].low > 0.1 and gain[CLEAN, NOISY].low > 0.1, "more rankings, a better judge; labels turned round cost accuracy"
assert all(gain[rule].low < 0 < gain[rule].high for rule in ((NOISY, FEW), (MANY_NOISY, BY_1_2F))), "as a quarter as many"
assert gain[MANY_NOISY, BY_VARIANCE].low > 0.08, "but clearly more than by the variance of a label"
assert all(found.low < 0 < found.high for (one, _), found in gain.items() if one == judges.NOISY_STEPS), "in as many steps, open"
right = 1 / (1 + np.exp(-abs(held_gold[:, i] - held_gold[:, j]) / 0.1))  # our rater, pair by pair; 0.5 where the gold is tied
varies = [1 - ((2 * p - 1) ** 2).mean() for p in (right, 0.25 + 0.5 * right)]  # the variance of a label, 1 or -1
print(f"with a quarter turned round the label of a given pair varies {varies[1] / varies[0]:.2f} times as much")
assert REDUCED or abs(varies[1] / varies[0] - 2) < 0.1

# %%
judges.labels_picture(kinds).savefig(OUT / "09_reward_model.png", dpi=120)

# %% [markdown]
# 500, by the rule. In one pass a hundred rankings teach nothing clearly better than a coin. 500 order 0.54 [0.51, 0.56]
# of the pairs rightly: clearly more than a coin, not clearly more than 100. 2,000 clean ones order 0.68 [0.66, 0.70].
# With a quarter turned round 2,000 lose 0.15, and are not told from 500. Another rule takes as noise only the variance
# of a given pair's label, which grows 2.05 times: $2000\,(1 - 2f)^2 / 2.05$, about 240. With 6,000 the two part: are
# they worth 1,500 or 730? They are not told from 1,500 (+0.03 [-0.04, 0.09]), and order clearly more than 730 (+0.12
# [0.09, 0.14]), but take more steps than either. In 188 steps, as 1,500 take, neither difference is clear (-0.04
# [-0.11, 0.03], +0.02 [-0.07, 0.12]): open. (The 730 took 183.) Intervals are over seeds and prompts.
#
# **What disagreement leaves possible.** InstructGPT's training labelers agreed in 73 % (section 3.4).
# Let each be right with probability $p$, independently. Two agree where both are right or both are wrong, $p^2 + (1 -
# p)^2$.

# %%
agree, best_possible = (right**2 + (1 - right) ** 2).mean(), right.mean()
theirs, ours = ((1 + np.sqrt(2 * a - 1)) / 2 for a in (0.73, agree))  # p² + (1 - p)² = a, solved for p
print(f"agreement 0.73: right in {theirs:.2f}; our rater's {agree:.3f}: "
      f"the gold agrees with its labels in {best_possible:.3f} (were all pairs equally hard, {ours:.3f})")
assert agree <= best_possible <= ours and abs(theirs - 0.84) < 0.005

# %% [markdown]
# Knowing the truth, a model agrees with 84 % of such labels, if all pairs are equally hard. InstructGPT's reward
# models, each trained on four fifths of the labelers, agreed with 72 % of their choices, 70 % of the others' (section
# 4.1). Where pairs differ, each has its $x = 2p - 1$, from 0 to 1. From the agreement, $(1 + x^2)/2$ on average, the
# mean of $x^2$ is 0.46. The mean of $x$ is at least as large, as $x^2 \le x$, and at most $\sqrt{0.46} = 0.68$, as a
# variance is not negative. So the ceiling, $(1 + x)/2$ on average, is between 0.73, where raters are sure of some pairs
# and toss a coin for the rest, and 0.84.
#
# **Head, LoRA, or all weights?** This we know on Lesson 10's chain (its gold: section 6): a model fine-tuned on
# demonstrations (the *SFT model*), a reward model, then PPO, which trains a *policy* to please the reward model.
#
# **Predict:** from 600 comparisons each, which orders the most pairs as the gold does?

# %%
chain = CHAIN.rows()
assert not CHAIN.missing(chain), "all runs are there: see `minipeft claims --run rlhf-5`"
print("\ntrained   comparisons   pairs ordered as the gold does (mean of 10 seeds, 95 %)")
ordered = {}
for size, n in (("head", 600), ("lora", 600), ("full", 100), ("full", 600), ("full", 2000)):
    ordered[size, n] = np.array([row["accuracy"][0] for row in those_of(chain, "best", judge=size, comparisons=n)])
    print("{:8s}  {:11,}   {:.3f} ± {:.3f}".format(size, n, *interval(ordered[size, n])))
print("all weights less LoRA: {:.3f} ± {:.3f}".format(*interval(ordered["full", 600] - ordered["lora", 600])))
clearly = ("full", 2000, "full", 600), ("full", 600, "full", 100), ("lora", 600, "head", 600), ("full", 600, "lora", 600)
assert all(np.subtract(*interval(ordered[a, n] - ordered[b, m])) > 0 for a, n, b, m in clearly)
assert not any(rival.clear for rival in rivals(TUNED.rows()) if rival.gold is None), "of no judge is another rate clearly better"

# %% [markdown]
# Over the seeds, clearly, LoRA beats the head, all weights beat LoRA (by 0.01), and, there, more comparisons help. Each
# judge has its own rate; no other tried is clearly better under both seeds (`claims/chain_tuning.py`).
#
# ## 6 · Labels from a model that follows principles
#
# Bai et al. 2022 (Constitutional AI, arXiv:2212.08073) let a model label harmlessness in people's place: it reads
# written **principles**, and two answers, and says which follows them better. The rest of the chain stays as it is;
# with such labels it is called RLAIF, for AI feedback. In this section *judge* means the labeler,
# SmolLM2-135M-Instruct. The gold is that of Lesson 10's chain, which the principles put in words:

# %%
print(constitution.PRINCIPLES)

# %% [markdown]
# The judge gives log-probabilities, not words: it prefers A by $d = \log p(\text{A}) - \log p(\text{B})$. With the two
# answers the other way round it gives $d'$. Suppose that $d$ is a preference for the place or its letter (A is always
# first), the same in both orders, plus one for the answer, whose sign turns. Then $(d - d')/2$ is the latter alone.
#
# It first sees two solved examples, the best of four ways of asking on another seed
# (`minipeft/claims/constitution.py`).
#
# **Predict:** in how many of 100 pairs does so small a model take the answer that is shown first?

# %%
aided = CONSTITUTION.rows()
labels, bare = ([row for row in aided if row["form"] == form] for form in (constitution.FORM, constitution.BARE))
found = {key: interval([np.mean(row[key]) for row in labels]) for key in ("first", "one order", "agreement")}
found["examples alone"] = interval([np.mean(row["agreement"]) for row in bare])
asked = [row["agreement"][: len(other["agreement"])] for row, other in zip(labels, bare)]  # the same comparisons
found["what principles add"] = interval([np.mean(own) - np.mean(other["agreement"]) for own, other in zip(asked, bare)])
print(f"{constitution.FORM}, {len(labels)} seeds: " + ", ".join("{} {:.3f} ± {:.3f}".format(key, *x) for key, x in found.items()))
assert found["first"][0] > 0.95 and abs(found["one order"][0] - 0.5) < 0.02 and found["agreement"][0] - found["agreement"][1] > 0.5
assert found["what principles add"][0] < found["what principles add"][1], "not clear"

print(f"\ngold on held-out prompts, after {labels[0]['labels']} labels of each, "
      f"less the SFT model's {np.mean([row['sft'] for row in labels]):.3f}")
by = {arm: {how: np.array([row[how][arm] for row in labels]) for how in ("best", "ppo")} for arm in constitution.ARMS}
over_sft = {arm: {how: crossed(gold - [row["sft"] for row in labels]) for how, gold in ways.items()} for arm, ways in by.items()}
for arm, ways in over_sft.items():
    right = f"{np.mean([row['right'][arm] for row in labels]):.2f}"
    print(f"{arm:7s} best of 16: {shown(ways['best'])}, PPO: {shown(ways['ppo'])}; the reward model is right in {right} of pairs")
clear = {(arm, how): np.sign(e.value) for arm, ways in over_sft.items() for how, e in ways.items() if e.low * e.high > 0}
assert clear == {("rater", "best"): 1, ("rater", "ppo"): 1, ("flipped", "best"): -1, ("coin", "best"): -1}
less = {(arm, how): crossed(by["judge"][how] - by[arm][how]) for arm in ("rater", "flipped") for how in ("best", "ppo")}
print("the judge's less another's: " + ", ".join(f"{arm} {how} {shown(e)}" for (arm, how), e in less.items()))
assert less["rater", "best"].high < 0 < less["flipped", "best"].low and less["flipped", "ppo"].low < 0 < less["flipped", "ppo"].high

# %% [markdown]
# It takes the first in nearly all pairs, so asked once it agrees with the gold in half; over both orders in 0.62. The
# principles add nothing clear: that it follows them is not shown. By 2,000 labels of the rater best of 16 and PPO
# gain clearly over the SFT model; by the judge's, neither, and its best of 16 is clearly below the rater's. *Flipped*
# are the gold's labels, turned round at random as often as the judge errs: their best of 16 is below the judge's, if
# barely; PPO is undecided. (The judge may err where the gold hardly differs.) With a large judge, Lee et al. 2023
# (arXiv:2309.00267) find AI's labels about as good as people's.
#
# **Which errors does averaging repair?** Two kinds of judges are equally good one by one: careless ones, each with an
# error of its own, and ones who all like length.
#
# **Predict:** one of either kind is right in 0.75. And a majority of 25?

# %%
lead, longer = np.random.default_rng(0).standard_normal((2, 20000))  # of one text over another, in quality and in length
errors = np.random.default_rng(1).standard_normal((25, 20000))
for votes in (1, 5, 25):
    majority = (lead + errors[:votes] > 0).mean(axis=0) > 0.5
    careless, biased = (np.mean(vote == (lead > 0)) for vote in (majority, lead + longer > 0))
    print(f"majority of {votes:2d}: careless judges are right in {careless:.2f}, those who like length in {biased:.2f}")
assert careless > 0.9 and abs(biased - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 20000), "who errs alike votes alike"

# %% [markdown]
# Over 0.9 for careless ones, still 0.75 for the others. More labels average out random errors, as more judges do. A
# systematic one stays, and the reward model learns it as quality, unless it is known and canceled, as the swap cancels
# the place.
#
# The other half of Constitutional AI comes before: a model criticizes its own answers, rewrites them, and is trained on
# these **revisions**. Here the judge rewrites the SFT model's.

# %% [markdown]
# > `rlhf-9` Constitutional AI: preferences from a model that follows written principles instead of from people:
# > **cannot be tested here**. Asked about two answers, the judge takes the one that is shown first in 100%; over both
# > orders it agrees with the gold in 62% [60%, 63%], and takes the longer answer in 56% [54%, 57%], the gold in 48%;
# > with length averaged out (the mean of its agreement where the longer has more gold and where the shorter has) it
# > agrees in 62% [60%, 64%]. On the first 200, shown the same examples and no principles, it agrees in 58% [55%, 61%],
# > with them in 60%: what the principles add is +0.02 [-0.01, +0.06]. What a reward model of 2000 labels gains of the
# > gold:
# >
# > - the best of 16 over SFT: +0.02 [-0.05, +0.09].
# > - the best of 16 over a coin's: +0.14 [+0.05, +0.23].
# > - PPO over SFT: +0.03 [-0.06, +0.11].
# > - PPO over a coin's: +0.07 [-0.02, +0.16].
# > - the best of 16 over the rater's: -0.13 [-0.20, -0.06].
# > - PPO over the rater's: -0.08 [-0.22, +0.06].
# >
# > Shown to be at most 0.02 worse than by the rater's: none. As many labels of the rater gain over SFT: the best of 16
# > +0.15 [+0.12, +0.17] and PPO +0.11 [+0.04, +0.18]; the gold's, turned round at random as often as the judge errs:
# > the best of 16 -0.07 [-0.09, -0.04] and PPO -0.01 [-0.04, +0.02]. Trained on the judge's revisions, the SFT model
# > has -0.05 [-0.09, -0.01] beside training on its own answers; a revision changes 73% of them. Of SFT, PPO, SFT on the
# > preferred answers, DPO and the reward model, only SFT has clearly less loss at another rate: at 0.125 times the one
# > used, though with less gold (-0.05). (5 seeds, 512 test items)

# %% [markdown]
# ## 7 · Does it know how sure it can be?
#
# $\sigma(r_i - r_j)$ claims to be a probability. Of the pairs to which the model gives 0.7, do raters choose the first
# in 70%? We let the rater label every held-out pair anew, and first ask section 5's judge of 300 rankings.
#
# **Predict:** does a reward model that has learned next to nothing say 0.5 everywhere?

# %%
model, rewards = train(run := live[1], LARGEST)
curve = rlhf.calibration_curve(*labels_of(rewards, held_gold, run))
print("\npredicted  observed  pairs, each from both sides")
for p, share, n in zip(*curve):
    print(f"{p:9.2f}  {share:8.2f}  {n:5.0f}")
assert np.allclose(np.average(curve[:2], axis=1, weights=curve[2]), 0.5), "each pair is looked at from both sides"

# %% [markdown]
# The **expected calibration error** is the mean distance between the two columns, weighed by the pairs. For all runs:

# %%
def calibration_error(predicted, observed, count):
    return (count * abs(predicted - observed)).sum() / count.sum()


wrong = {kind: np.array([calibration_error(*np.array(row["calibration"]).T) for row in of]) for kind, of in kinds.items()}
for kind in kinds:
    print("{:,} rankings, {:.0%} turned round, by {}: calibration error ".format(*kind) + "{:.3f} ± {:.3f}".format(*interval(wrong[kind])))
assert wrong[FEWEST].min() > 0.13 > 0.06 > max(wrong[kind].max() for kind in (FEW, CLEAN, NOISY))
for kind in (FEWEST, CLEAN):
    (said, was), off, overall = judges.by_tenths(kinds[kind])
    print(f"{kind[0]} clean rankings: it says {said:.2f}, the rater agrees in {was:.2f}; the difference from 0.5 on, by tenths:",
          *("{:+.2f} ± {:.2f},".format(*x) for x in off.values()), "all {:+.3f} ± {:.3f}".format(*overall))
    clear = [k for k, (mean, half_width) in off.items() if abs(mean) > half_width]
    if kind == FEWEST:
        assert sum(off[7]) < 0
    else:
        assert clear == [7] and off[7][0] > 1.66 * off[7][1] and abs(overall[0]) < overall[1]  # 1.66: t of 99 % over t of 95 %
fresh = abs(1 / (1 + np.exp(-np.sqrt(2) * lead)) - 0.5).mean()
far = {kind: judges.sureness(of) for kind, of in kinds.items()}
print(f"mean distance of what it says from 0.5: in theory {fresh:.2f}; untrained {far[judges.UNTRAINED].mean():.2f}, "
      f"after 100 rankings {far[FEWEST].mean():.2f}, after 500 {far[FEW].mean():.2f}")
assert (0.6 * far[judges.UNTRAINED] < far[FEWEST]).all() and (far[FEWEST] < far[judges.UNTRAINED]).all() and far[FEW].max() < 0.06
before, after = (train(run, LARGEST)[1] for run in (Run(0, seed=live[0].seed), live[0]))
alike = np.corrcoef(*(np.subtract(x[:, i], x[:, j]).ravel() for x in (before, after)))[0, 1]
print(f"correlation of the differences of {live[0].rankings} rankings' judge with those of its head before training: {alike:.2f}")
assert REDUCED or alike < 0.6, "nearly as sure, but of other differences"
careless = [bin[0] for row in kinds[NOISY] for bin in row["calibration"]]
assert 0.4 < min(careless) and max(careless) < 0.6, "a careless rater's judge is never sure"

# %%
curves = {f"{run.rankings} rankings": curve, "2000 rankings": np.array(kinds[CLEAN][0]["calibration"]).T}
judges.calibration_picture(curves).savefig(OUT / "09_reward_model_calibration.png", dpi=120)

# %% [markdown]
# No: where judges of 100 rankings say 0.75, the rater agrees in about half of the pairs. A fresh head is surer still:
# its rewards have deviation 1, the differences of independent ones $\sqrt 2$, and a $\sigma$ of these is 0.23 away from
# 0.5 on average. Our heads are 0.21 away before training, after 100 rankings still 0.17; after 500, 0.04. But the judge
# of 100 does not just say what its fresh head said: the reward differences of the two correlate by only 0.29 (one
# seed).
#
# With two thousand clean rankings the rater agrees more often than the judge says, by 0.01 ± 0.03 over all pairs: not
# clear. In one of the five bins from 0.5 on it is clear, also if all five intervals are to hold together (99 % each):
# where the judge says 0.75 the rater agrees in 0.81, more by 0.06 ± 0.03. (The cause is open: neither another rate nor
# a second pass was tried.) The careless rater's two thousand taught little, but honestly: these judges never say more
# than 0.6.
#
# **Repair.** Divide all rewards by one number, the **temperature** (not the rater's $T$) that has the smallest loss on
# held-out pairs (Guo et al. 2017, arXiv:1706.04599). We choose it for the judge of 300 rankings on half of the prompts,
# and look at the other half.

# %%
fit, test = np.split(np.subtract(*labels_of(rewards, held_gold, run)), 2)  # reward differences; pairs of a prompt stay together
temperatures = np.geomspace(0.25, 64, 200)
fitted = temperatures[np.argmin([np.logaddexp(0, -fit / t).mean() for t in temperatures])]
losses = {t: np.logaddexp(0, -test / t).mean() for t in (1.0, fitted)}
for t, loss in losses.items():
    sure, distance = (1 / (1 + np.exp(-abs(test / t)))).mean(), calibration_error(*rlhf.calibration_curve(test / t, 0 * test))
    print(f"temperature {t:5.2f}: on average {sure:.2f} sure, loss {loss:.4f} (a coin's: {np.log(2):.4f}), "
          f"calibration error {distance:.3f}")
assert REDUCED or (fitted > 1 and losses[fitted] < losses[1.0]), "less sure, and better for it"

# %% [markdown]
# Now the judge of 300 rankings says little more than 0.5. Division changes no order, so the accuracy and the best of 16
# are what they were: a temperature repairs certainty and nothing else, and that for texts like these.

# %% [markdown]
# ## 8 · Break it: texts that nobody ever compared
#
# The judges are the five of 2,000 clean rankings, and the untrained heads that they began with. First, length, among
# texts like those in training. Then texts unlike these: the same token ten times after a held-out prompt (another for
# each seed), for every token there is. The judge chooses the best. Beside them stand 256 answers of the base.
#
# **Predict:** how many of the 2,046 beat nine in ten of the real answers? And the best of 256?

# %%
likes = [judges.prefers_longer(*own) for own in ((answers, gold), (held_answers, held_gold))]
print("\nthe gold prefers the longer of two in {:.0%} of the pairs in training, {:.0%} held out".format(*likes))
golds = {}
for name, kind in (("2,000 clean rankings", CLEAN), ("no training", judges.UNTRAINED)):
    texts = [tokenizer.decode([row["token"]] * 10) for row in kinds[kind]]
    golds[kind] = rlhf.vader(texts)
    for row, text, g in zip(kinds[kind], texts, golds[kind]):
        print(f"{name}: bar {row['bar']:+.2f}, best answer {row['best'][0]:+.2f}; "
              f"{row['above']:4d} tokens above the bar, best {row['best'][1]:+.2f} (gold {g:+.2f}): {text}")
    assert all(row["best"][1] > row["best"][0] for row in kinds[kind]), "a token that beats every real answer, under every seed"
    longer_of_two, above = (interval([row[what] / n for row in kinds[kind]]) for what, n in (("longer", 1), ("above", 2046)))
    print("  the longer of two preferred in {:.2f} ± {:.2f};".format(*longer_of_two),
          "share of tokens above the bar {:.2f} ± {:.2f}".format(*above))
    assert abs(longer_of_two[0] - 0.5) < longer_of_two[1] and abs(above[0] - 0.1) < above[1], "neither is clear"
assert min(golds[CLEAN]) > held_gold.max() and max(golds[judges.UNTRAINED]) == 0, "the rater's own rule says so, too, of the former"

# %%
judges.nonsense_picture(kinds[CLEAN][0]).savefig(OUT / "09_reward_model_nonsense.png", dpi=120)

# %% [markdown]
# Of two held-out answers the gold prefers the longer in 53 %; no preference of the judges, for length or against it, is
# clear.
#
# Of the tokens 8 % ± 3 pass the bar, that is, beat nine in ten of the real answers: not clearly fewer than of these.
# Under every seed one of them, said ten times, has more reward than the best of 256 real answers. But they are eight
# times as many: from one distribution, too, the highest of all 2,302 would be a token in 2,046/2,302 = 0.89 of the
# draws. What tells is which token. The untrained heads' are any ones: *all*, *till*. After 2,000 rankings they are
# *love*, *strong*, and three times *great*. The judge has learned the rater's words, and the rater's own rule, VADER,
# gives these texts more than any held-out answer. So at the top new texts did not mislead these judges: VADER agrees.
# But VADER is not what a reader wants, and on texts that nobody ever compared that shows. Whoever looks for the highest
# reward finds such texts, and a policy trained on a judge searches so: Lesson 11.

# %% [markdown]
# ## Quiz
#
# **1.** Why is the zero of a learned reward anywhere, and what pins it down?
#
# <details><summary>Answer</summary>
#
# In Bradley and Terry's model a text wins with a probability that depends on the difference of the rewards alone.
# Centering adds $c\,(r_w + r_l)^2$, which pins the zero down.
#
# </details>
#
# **2.** Why are all pairs of a ranking put into one batch element?
#
# <details><summary>Answer</summary>
#
# The $K$ texts are computed once and compared in every pair. It is cheaper, and comparisons that share a text do not
# come back as if they were new, which overfits.
#
# </details>
#
# **3.** Why does "the last token that is no padding" read the reward at the wrong place?
#
# <details><summary>Answer</summary>
#
# Many tokenizers pad with the end-of-text token; then the real one at the end is taken for padding and skipped.
#
# </details>
#
# **4.** A judge from a hundred rankings says 0.75. What is that worth here, and how is it with a judge from two
# thousand clean ones?
#
# <details><summary>Answer</summary>
#
# With few rankings a coin does as well where it says 0.75: it does not know that it does not know. With two thousand
# clean ones the rater agrees in 0.81 there, so there it could be surer; over all of its pairs the two do not clearly
# differ on average.
#
# </details>
#
# **5.** What kind of text did section 8 find, and why could it be scored so?
#
# <details><summary>Answer</summary>
#
# A word that VADER finds happy, ten times, such as "great". The judge has learned the rater's words, and the rater's
# own rule likes such a text more than any held-out answer. That neither judge nor rule is what a reader wants shows on
# texts that nobody ever compared.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("09.1", value)`, or at the terminal with
# `minipeft exercise 09.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 09.2 FILE.py`.
#
# **09.1 Each text once.** InstructGPT ranked up to 9 answers to a prompt. How many times fewer texts are computed when
# each ranking of 9 is one batch element, against all of its pairs one by one?
#
# **09.2 The loss of pairs.** Write `reward_loss(chosen, rejected)`: the mean loss of pairs, from two vectors of
# rewards. It should not overflow where rewards are far apart.
#
# **09.3 A careless rater.** The rater of section 2, with $T = 0.1$, holds the scale upside down, and so turns the order
# round, with probability 0.25. In which share of its choices does it prefer a text of score 0.3 to one of 0.2? To three
# digits.
#
# **09.4 How honest?** Write `calibration_error(predicted, observed, count)`, the expected calibration error of section
# 7, from three vectors.
#
# Projects, with no answer written down:
#
# - **Pairs or rankings?** Train on as many *pairs* as `Run(300)` sees, each from a prompt of its own (K = 2). What did
#   the pairs that share a text cost in accuracy, and what did they save in labels and in time?
# - **A second pass.** Set `num_train_epochs=2`. Follow the training loss and the held-out accuracy: where do they part?
# - **Real people.** If you have vaderSentiment's source archive,
#   `rlhf.human_preferences("vaderSentiment-3.3.2.tar.gz")` gives pairs of texts that people rated, with the noise of
#   people. How far does the same model get on them?
#
# <details><summary>Solution of 09.1</summary>
#
# 36 pairs take 72 texts, in place of 9: $K - 1$ times as many.
#
# ```python
# check("09.1", 9 * 8 / 2 * 2 / 9)
# ```
#
# </details>
#
# <details><summary>Solution of 09.2</summary>
#
# $-\log \sigma(z) = \log(1 + e^{-z})$, which `logaddexp` computes without overflow.
#
# ```python
# check("09.2", lambda chosen, rejected: np.logaddexp(0, rejected - chosen).mean())
# ```
#
# </details>
#
# <details><summary>Solution of 09.3</summary>
#
# Upside down, it prefers 0.3 as often as it would otherwise prefer 0.2.
#
# ```python
# upright = 1 / (1 + np.exp(-(0.3 - 0.2) / 0.1))
# check("09.3", 0.75 * upright + 0.25 * (1 - upright))
# ```
#
# </details>
#
# <details><summary>Solution of 09.4</summary>
#
# The mean distance, weighed by the pairs.
#
# ```python
# def calibration_error(predicted, observed, count):
#     return (count * abs(predicted - observed)).sum() / count.sum()
#
# check("09.4", calibration_error)
# ```
#
# </details>
