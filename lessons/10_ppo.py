# %% [markdown]
# # Lesson 10 · PPO: trained on one's own words
#
# Fine-tuning shows a model what to say. Here nobody shows it anything: it says something itself, learns *how good that
# was*, and makes the better half of what it said a little more probable. This lesson takes PPO, the method behind
# InstructGPT, apart into functions of a few lines, checks each by hand, runs it against the reward model of Lesson 9,
# and puts its three simpler successors, DPO, RLOO and GRPO, beside it.
#
# You need Lesson 9 and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Run it with `python lessons/10_ppo.py` (about
# a minute and a half on two cores), or open it as a notebook. `python lessons/10_ppo.py --full` (in a notebook
# `!python lessons/10_ppo.py --full`) first computes those of the fifteen runs behind the comparison, with three seeds,
# that are missing in `lessons/results/10_ppo.jsonl` (all of them: about five minutes), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer updates; `MINIPEFT_LESSONS_OUT` is where the picture goes
# (`lessons/out`).

# %%
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft import diagrams, rlhf
from minipeft.autograd.tensor import no_grad
from minipeft.experiments.rows import read_rows
from minipeft.experiments.sweep import sweep

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = (
    Path(__file__).parent if "__file__" in globals()
    else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
)  # fmt: skip
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "10_ppo.jsonl"

base, tokenizer = mp.load_base()
STOPS = (tokenizer.eos_token_id, *(tokenizer.token_to_id(mark) for mark in ".!?"))
LENGTH = 20


def openings(split):
    """Prompts: the first four words of sentences of Jane Austen's."""
    return [ids for ids in map(tokenizer.encode, rlhf.sentence_openings(split, 4)) if len(ids) <= 8]


def show(ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


# %% [markdown]
# Of four models in three stages, each stage holds those that are drawn filled (bytes of the shipped base, without
# activations).

# %%
diagrams.rlhf_stages(base.config).savefig(OUT / "10_ppo_stages.png")

# %% [markdown]
# ## 1 · The rollout
#
# Prompts of different lengths are padded on the **left**, so that all go on at the same column. Tokens are drawn at
# temperature 1 from the whole distribution: cutting its tail (top-k, top-p) would draw from another distribution than
# the one whose log-probabilities we are going to compare. What comes after the first token that ends a sentence is not
# the model's answer any more, and is masked. The log-probabilities of the answer come from one ordinary forward pass.

# %%
prompts = openings("train")
roll = rlhf.rollout(base, prompts[:4], LENGTH, temperature=1.0, stop_token_ids=STOPS, seed=0)
for prompt, response in zip(roll.prompts(), roll.responses()):
    print(f"  {show(prompt):24s} |{show(response)}")
print("mask of the last:", *roll.mask[-1])
logprobs = rlhf.response_logprobs(base, roll.input_ids, roll.attention_mask, LENGTH).numpy()  # [4, LENGTH]
alone = [*roll.prompts()[1], *roll.responses()[1]]
with no_grad():
    logits = base(np.array([alone])).numpy()[0]  # [T, V], not padded
n = len(roll.responses()[1])
by_hand = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
by_hand = by_hand[np.arange(len(alone) - n - 1, len(alone) - 1), alone[-n:]]
print(f"log-probabilities, in the padded batch and alone, differ by {abs(by_hand - logprobs[1, :n]).max():.1e}")
assert np.allclose(by_hand, logprobs[1, :n], atol=1e-4), "padding does not matter"

# %% [markdown]
# ## 2 · Rewards: a price for leaving, and the score at the end
#
# The reward model scores the whole answer once. Let $\pi(y_t)$ be the probability that the policy gives to the answer's
# token $y_t$, after the prompt and the tokens before it, and $\pi_{\text{ref}}(y_t)$ that of the **reference**, which
# is the policy as it was at the start. Every token pays for what the two differ by, at the price $\beta$:
#
# $$r_t = -\beta \left(\log \pi(y_t) - \log \pi_{\text{ref}}(y_t)\right) + [t \text{ is last}] \cdot \text{score}.$$
#
# ## 3 · Advantages: was that token better than expected?
#
# A value head guesses, at every token, what is still to come, $V_t$. What happened minus what was expected is
# $\delta_t = r_t + \gamma V_{t+1} - V_t$, and generalized advantage estimation sums it up over the rest of the answer:
#
# $$A_t = \delta_t + \gamma\lambda A_{t+1}, \qquad R_t = A_t + V_t .$$
#
# $A_t$ is the **advantage** of a token, $R_t$ the **return** that the value head is trained on. The discount $\gamma$
# is 1 here: a reward counts the same however late it comes. $\lambda = 0.95$ makes a surprise count a little less with
# every token that lies before it: with 0 an advantage is $\delta_t$ alone, with 1 the sum of all that follow.
#
# Last, the advantages are **whitened**: subtract their mean over all tokens of the batch, divide by their standard
# deviation. Whoever does so must take the returns first. The numbers below are test values, whose results were computed
# without this library.

# %%
old = np.array([[-1, -2, -0.5, 0], [-0.7, -1.2, -0.9, -2.3]])
ref = np.array([[-1.2, -1.5, -0.6, 0], [-0.9, -1, -1.4, -2]])
V, score = np.array([[0.1, 0.2, 0.3, 0], [-0.1, 0, 0.4, 0.5]]), np.array([1, -0.5])
mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
rewards = rlhf.shaped_rewards(old, ref, score, mask, beta=0.1)
A, R = rlhf.gae(rewards, V, 1.0, 0.95, mask)
A_hand = np.zeros(3)
for t in (2, 1, 0):  # the first answer, by hand
    following = (V[0, t + 1], A_hand[t + 1]) if t < 2 else (0.0, 0.0)
    A_hand[t] = rewards[0, t] + following[0] - V[0, t] + 0.95 * following[1]
print("\nrewards   ", *rewards.round(4))
print("advantages", *A.round(6), "  expected for the first: 0.845225 0.8055 0.69")
assert np.allclose(A[0, :3], A_hand) and np.allclose(A_hand, [0.845225, 0.8055, 0.69])
assert np.allclose(R, (A + V) * mask)
A_white = rlhf.whiten(A, mask)

# %% [markdown]
# > `rlhf-4` maximise E[r] - beta KL(pi || pi_SFT): the reference is the SFT model: **holds**. Over all 16 answers of
# > two tokens the expected rewards are E[r] - beta KL to 2e-16 for three betas, no policy near ref exp(r / beta) is
# > better, and PPO's reference is the model that it starts from: so for the objective, its maximum and the reference.
# > (16 test items)

# %% [markdown]
# ## 4 · The loss: no more than twenty percent at a time
#
# The answers are used for several passes, and after the first step they are somebody else's: the policy has moved. The
# ratio $\rho_t = \pi(y_t) / \pi_{\text{old}}(y_t)$ corrects for it, where $\pi_{\text{old}}$ is the policy that drew
# them; and clipping, into $1 \pm \varepsilon$ with $\varepsilon = 0.2$, takes the incentive away to move further on the
# strength of old data. The value head is clipped in the same way, around its old guess $V_{\text{old}}$, and its loss
# weighs 0.1. $A$ is whitened, $R$ is not, and the means are over all tokens of the answers:
#
# $$\mathcal L = \text{mean} \max\left(-A\rho, \; -A\,\mathrm{clip}(\rho, 1 \pm \varepsilon)\right)
#   + 0.1 \cdot \tfrac12\, \text{mean} \max\left((V - R)^2,
#   (\mathrm{clip}(V, V_{\text{old}} \pm \varepsilon) - R)^2\right).$$

# %%
new = mp.Tensor(old + np.array([[0.1, -0.3, 0.25, 0], [0, 0.3, -0.1, 0.05]]), requires_grad=True)
V_new = mp.Tensor(V + np.array([[0.3, -0.1, 0.05, 0], [0.25, -0.3, 0.1, 0]]), requires_grad=True)
pg, vf = rlhf.policy_loss(new, old, A_white, mask), rlhf.value_loss(V_new, V, R, mask)
(pg + 0.1 * vf).backward()
print(f"policy loss {pg.item():.10f} (expected 0.0144655480), value loss {vf.item():.10f} (expected 0.2774734938)")
assert abs(pg.item() - 0.0144655480) < 1e-9 and abs(vf.item() - 0.2774734938) < 1e-9
print("gradient of the first answer", *new.grad[0].round(6), "  the third token's ratio is 1.28, and clipped: 0")
assert new.grad[0, 2] == 0 and abs(new.grad[0, 0] + 0.1739469439) < 1e-9

# %% [markdown]
# > `rlhf-1` optimise for preference, not likelihood: **holds**. One step moves log p(a) - log p(b) by +10.03 nats where
# > a is preferred and by -10.12 where b is, on the same texts; the likelihood of both, to which a preference is
# > nothing, moves it by -0.48; as stated where a is preferred and b is preferred. (4 test items)

# %% [markdown]
# ## 5 · Run it
#
# The judge is Lesson 9's: a reward model of a rater who follows VADER. VADER itself, the gold, is only watched. With
# every update the trainer checks that, before the first step, every ratio is 1: a policy that scores its own
# answers otherwise has dropout on, or another temperature, or lost its positions.
#
# The run printed here is computed now. Another machine, or another number of threads, rounds otherwise, after a few
# updates draws other words, and ends with other numbers; what we claim, we read off the three seeds in section 6.

# %%
@cache
def judge_and_pairs(rankings, seed):
    """A reward model, and the same rater's best and worst answers as pairs for DPO."""
    rng = np.random.default_rng(seed)
    prompts = openings("train")
    prompts = [prompts[i] for i in rng.permutation(len(prompts))[:rankings]]
    answers = rlhf.sample_answers(base, prompts, 4, LENGTH, stop_token_ids=STOPS, seed=seed)
    order = rlhf.rank(np.array([rlhf.vader([show(a) for a in own]) for own in answers]), rng, temperature=0.1)
    ranked = rlhf.rankings(prompts, answers, order)
    texts = [text for ranking in ranked for text in ranking.texts]
    model = rlhf.RewardModel(base, seed=seed)
    model.calibrate(texts[:512])
    args = mp.TrainingArguments(
        learning_rate=2e-3, num_train_epochs=1, per_device_train_batch_size=8, warmup_ratio=0.1, seed=seed,
        progress=False,
    )  # fmt: skip
    mp.Trainer(model, ranked, args=args, collate=rlhf.collate_rankings).train()
    model.calibrate(texts[:512])
    return model, rlhf.preference_pairs(prompts, answers, order)


@dataclass(frozen=True)
class Run:
    """One way to make the base happier, from a number of rankings of the rater's."""

    method: str
    seed: int = 0
    updates: int = 16
    rankings: int = 1000
    beta: float = 0.05
    learning_rate: float = 3e-4


TRAINERS = {
    "PPO": (rlhf.PPOTrainer, rlhf.PPOConfig), "RLOO": (rlhf.RLOOTrainer, rlhf.GroupConfig),
    "GRPO": (rlhf.GRPOTrainer, rlhf.GroupConfig),
}  # fmt: skip
gold = rlhf.gold_reward(tokenizer)
cached = {}


def learn(run):
    """(policy, history) after `updates` updates of 32 answers each; DPO takes the pairs once instead."""
    if run in cached:
        return cached[run]
    judge, pairs = judge_and_pairs(run.rankings, run.seed)
    policy, history = base.copy(), []
    if run.method == "DPO":
        args = mp.TrainingArguments(
            learning_rate=run.learning_rate, num_train_epochs=1, per_device_train_batch_size=16, warmup_ratio=0.1,
            per_device_eval_batch_size=32, seed=run.seed, progress=False,
        )  # fmt: skip
        rlhf.dpo_trainer(policy, pairs, args=args, beta=run.beta).train()
    elif run.method != "base":
        kind, config = TRAINERS[run.method]
        config = config(
            steps=run.updates, batch_size=32, mini_batch_size=16, num_epochs=2, response_length=LENGTH, max_kl=1e6,
            stop_token_ids=STOPS, missing_eos_score=None, kl_coef=run.beta, learning_rate=run.learning_rate,
            lr_scheduler_type="constant", seed=run.seed, progress=False,
        )  # fmt: skip
        history = kind(policy, judge, openings("train"), config, watch={"gold": gold}).train()
    cached[run] = policy, history
    return policy, history


def judged(policy, judge, seed=0):
    """What a policy has become, on 128 held-out prompts: reward, gold, KL from the base, distinct bigrams."""
    test = openings("validation")
    roll = rlhf.rollout(policy, test[: 32 if REDUCED else 128], LENGTH, 1.0, STOPS, seed=10_000 + seed)
    with no_grad():
        logp, ref = (
            rlhf.response_logprobs(m, roll.input_ids, roll.attention_mask, LENGTH).numpy() for m in (policy, base)
        )
        proxy = judge.rewards(roll.input_ids, roll.attention_mask).numpy().mean()
    return {
        "reward": round(float(proxy), 4), "gold": round(float(gold(roll).mean()), 4),
        "kl": round(float(((logp - ref) * mp.backend.to_numpy(roll.mask)).sum(axis=1).mean()), 4),
        "distinct_2": round(rlhf.distinct_n(roll.responses()), 4), "ended": round(roll.ended.mean().item(), 4),
    }  # fmt: skip


def measure(run):
    """What the sweep writes down."""
    judge, _ = judge_and_pairs(run.rankings, run.seed)
    began = time.process_time()
    policy, history = learn(run)
    seconds = time.process_time() - began
    curves = {
        name: [round(r[key], 4) for r in history]
        for name, key in (("reward", "objective/scores"), ("kl", "objective/kl"), ("gold", "watch/gold"))
    }
    return {**judged(policy, judge, run.seed), "history": curves if history else None, "cpu_seconds": round(seconds, 1)}


ALGORITHMS = ("PPO", "RLOO", "GRPO", "DPO")
RUNS = [Run(method, seed) for seed in range(3) for method in ("base", *ALGORITHMS)]
if "--full" in sys.argv:
    sweep(measure, RUNS, executor=1, store=RESULTS)
rows = read_rows(RESULTS)

small = dict(updates=2, rankings=16) if REDUCED else {}
ppo = Run("PPO", **small)
judge, pairs = judge_and_pairs(ppo.rankings, ppo.seed)
policy, history = learn(ppo)
print("\nupdate  reward    gold      KL  clipped  entropy  distinct-2  ended")
for r in history[:: max(1, len(history) // 6)] + history[-1:]:
    print(
        f"{r['step']:6d}  {r['objective/scores']:+.3f}  {r['watch/gold']:+.3f}  {r['objective/kl']:6.2f}"
        f"  {r['policy/clipfrac']:7.2f}  {r['policy/entropy']:7.2f}  {r['text/distinct_2']:10.2f}  {r['num_eos']:5d}"
    )
assert abs(history[0]["objective/kl"]) < 1e-3, "it starts as its own reference"
for r in history:  # the first minibatch of each update was checked while it ran; the books balance, too
    assert abs(r["objective/rlhf_reward"] - r["objective/scores"] - r["objective/non_score_reward"]) < 1e-6
if not REDUCED:
    start, end = (np.mean([r["objective/scores"] for r in part]) for part in (history[:4], history[-4:]))
    assert end > start + 0.25, "what is optimized rises"

# %% [markdown]
# The same prompts, before and after:

# %%
shown = openings("validation")[:4]
for name, model in (("before", base), ("after", policy)):
    print(name)
    roll = rlhf.rollout(model, shown, LENGTH, 1.0, STOPS, seed=1)
    for prompt, response in zip(roll.prompts(), roll.responses()):
        print(f"  {show(prompt):24s} |{show(response)}")

# %% [markdown]
# > `rlhf-2` three stages: SFT on demonstrations, a reward model, PPO against it: **holds**. 6 of 6 links are there:
# > SFT's loss falls by 2.78 nats, the reward model's by 0.99, and an update of PPO, of 8 answers scored -2.42 on
# > average, moves the policy away from its reference, the SFT model.

# %% [markdown]
# ## 6 · Three successors
#
# PPO needs a value function, a second thing that can be wrong. What came after it does without:
#
# | | what an answer is compared with | ratio | KL |
# |---|---|---|---|
# | **RLOO** | the mean score of the *other* answers to its prompt | whole answers | in the reward |
# | **GRPO** | the mean of its group, in standard deviations: $(r - \bar r)/(s + 10^{-4})$ | tokens | in the loss, $e^{d} - 1 - d$ |
# | **DPO** | the other answer of a pair: no reward model, and nothing is sampled while it trains | – | in the loss: it *is* the reward |
#
# A group is the answers to one prompt; $r$ is the score of one of them, $\bar r$ and $s$ are the mean and the standard
# deviation of their scores, and $d = \log \pi_{\text{ref}}(y_t) - \log \pi(y_t)$.
#
# DPO turns the objective around. Its optimum is $\pi \propto \pi_{\text{ref}}\, e^{r/\beta}$, so every policy is the
# optimum of some reward, $r = \beta \log (\pi / \pi_{\text{ref}})$, and Bradley-Terry (Lesson 9) can be fitted to
# *that*. With $y_w$ the answer that won, $y_l$ the one that lost, $\pi(y)$ the probability of a whole answer and
# $\sigma(z) = 1/(1 + e^{-z})$:
#
# $$\mathcal L = -\log \sigma\left(\beta \log \tfrac{\pi(y_w)}{\pi_{\text{ref}}(y_w)}
#   - \beta \log \tfrac{\pi(y_l)}{\pi_{\text{ref}}(y_l)}\right).$$

# %%
group = np.array([1.0, 2, 6])
print("\nscores 1 2 6:  RLOO", rlhf.rloo_advantages(group, 3), " GRPO", rlhf.grpo_advantages(group, 3).round(4))
assert np.allclose(rlhf.rloo_advantages(group, 3), [1 - 4, 2 - 3.5, 6 - 1.5])
assert np.allclose(rlhf.grpo_advantages(group, 3), (group - 3) / (group.std(ddof=1) + 1e-4))
sums = [mp.Tensor(np.array(s)) for s in ([-1.7, -1.6], [-1.5, -1.5])]
dpo = rlhf.dpo_loss(*sums, np.array([-1.9, -1.5]), np.array([-1.4, -1.6]), beta=0.1).item()
print(f"DPO of the test vector {dpo:.7f} (expected 0.6907284)")
assert abs(dpo - 0.6907284) < 5e-8

print("\non held-out prompts   reward    gold      KL  distinct-2  ended")
page = {}
for method in ("base", *ALGORITHMS) if REDUCED else ("base", "PPO", "DPO"):  # the others take as long as PPO again, each
    model, _ = learn(Run(method, **small))
    page[method] = judged(model, judge)
    p = page[method]
    print(
        f"{method:20s}  {p['reward']:+.3f}  {p['gold']:+.3f}  {p['kl']:6.2f}  {p['distinct_2']:10.2f}  {p['ended']:5.0%}"
    )
assert page["base"]["kl"] == 0
if not REDUCED:
    for method in ("PPO", "DPO"):
        assert page[method]["reward"] > page["base"]["reward"], method

# %% [markdown]
# One seed says little. All methods with three of them, from the file that `--full` writes:

# %%
table = {m: sorted((r for r in rows if r["method"] == m), key=lambda r: r["seed"]) for m in ("base", *ALGORITHMS)}
assert all([r["seed"] for r in found] == [0, 1, 2] for found in table.values()), "three seeds of each: see --full"
swept = {
    m: {k: np.array([r[k] for r in found]) for k in ("reward", "gold", "kl", "distinct_2", "ended", "cpu_seconds")}
    for m, found in table.items()
}  # {method: {name: [seeds]}}
print("\nmean of 3 seeds       reward         gold           KL   distinct-2  ended  CPU seconds of training")
for method, c in swept.items():
    print(
        f"{method:20s}  " + "  ".join(f"{c[k].mean():+.2f} ± {c[k].std(ddof=1):.2f}" for k in ("reward", "gold"))
        + f"  {c['kl'].mean():6.1f}  {c['distinct_2'].mean():11.2f}  {c['ended'].mean():5.0%}"
        f"  {c['cpu_seconds'].mean():23.0f}"
    )  # fmt: skip
before, sampling = swept["base"], ALGORITHMS[:3]
risen = {m: swept[m]["gold"] > before["gold"] for m in ALGORITHMS}  # in which seeds
for method in ALGORITHMS:
    assert (swept[method]["reward"] > before["reward"]).all(), f"{method}: the reward rises in every seed"
    assert swept[method]["gold"].mean() > before["gold"].mean(), f"{method}: the gold rises on average"
    assert (swept[method]["distinct_2"] < before["distinct_2"]).all(), f"{method}: fewer distinct bigrams in every seed"
for method in sampling:
    for name in ("reward", "kl"):
        assert (swept["DPO"][name] < swept[method][name]).all(), f"DPO has less {name} than {method} in every seed"
assert risen["DPO"].all() and risen["GRPO"].all(), "the gold of these two rises in every seed"
assert all(risen[m].tolist() == [False, True, True] for m in ("PPO", "RLOO")), "that of these two falls with seed 0"
assert max(swept["DPO"]["kl"]) < min(min(swept[m]["kl"]) for m in sampling) / 2, "DPO goes less than half as far"
leaders = [max(ALGORITHMS, key=lambda m: swept[m]["gold"][seed]) for seed in range(3)]
print(f"most gold with seed 0, 1 and 2: {', '.join(leaders)}")
assert leaders == ["DPO", "PPO", "PPO"]
assert all((swept[m]["ended"] < before["ended"]).all() for m in ALGORITHMS), "ends become rarer in every run"
golds = [swept[m]["gold"] for m in sampling]
assert np.ptp(golds, axis=1).min() > np.ptp([g.mean() for g in golds]), "the seeds of each differ by more than their means"

# %% [markdown]
# In every seed all four raise the judge's reward. The gold rises with it in ten runs of twelve, on average from 0.06 to
# 0.25 (DPO and GRPO), 0.26 (RLOO) and 0.39 (PPO); PPO and RLOO with seed 0 earn more reward, and their gold falls a
# little. Which method has the most gold depends on the seed, and the gold of each of the three that sample differs more
# from seed to seed than their means do from each other: this comparison does not part them. DPO goes less than half as
# far, at a KL of 3 against 8 to 12, and gets less reward than each of them in every seed.
#
# Two things fell that nobody asked about, in all twelve runs. Distinct bigrams become fewer. And of the base's answers
# 44% end their sentence, of the trained policies' 12% (PPO), 7% (RLOO), 13% (GRPO) and 26% (DPO). Nothing here asks for
# an end; Lesson 11 puts a price on its absence.
#
# Read it with care: the three that sample were given the same number of answers at the same learning rate, which suits
# one of them better than another, and DPO saw the rater's pairs instead of the judge. The seconds are those of the
# training alone. They leave out the 4,000 answers of the base that the rater ordered, of which DPO's pairs are made,
# and the training of the judge on them, without which the other three cannot begin. It is a page to compare
# *mechanisms*. That the gold rises with the reward is no law, as seed 0 shows; Lesson 11 goes on from there.
#
# ## 7 · Break it: whiten first, then take the returns
#
# The most quoted bug of PPO is one of order. Give the value head perfect foresight, up to a thousandth. The advantages
# are then nothing but that thousandth, and there is nothing to learn. Whitening blows them up to variance one, which is
# right for the policy loss. But returns taken *after* it, as $R = A_{\text{white}} + V$, tell a perfect value head that
# it is wrong by one, and its loss is $\tfrac12 \cdot 1^2$.

# %%
rng = np.random.default_rng(0)
ones = np.ones((32, LENGTH))
paid = rng.standard_normal((32, LENGTH)) * 0.1
perfect = np.cumsum(paid[:, ::-1], axis=1)[:, ::-1] + 1e-3 * rng.standard_normal((32, LENGTH))
A, R = rlhf.gae(paid, perfect, 1.0, 0.95, ones)
R_wrong = rlhf.whiten(A, ones) + perfect
losses = [rlhf.value_loss(mp.Tensor(perfect), perfect, target, ones).item() for target in (R, R_wrong)]
print(f"\nvalue loss of a perfect value head: {losses[0]:.1e}; with whitening before the returns: {losses[1]:.2f}")
assert losses[0] < 1e-5 and abs(losses[1] - 0.5) < 0.01

# %% [markdown]
# Now break it yourself: give PPO ten times the learning rate, and `max_kl=100` back. Which number tells first that
# something is wrong, in which update, and which check stops the run?

# %%
figure, axes = plt.subplots(1, 4, figsize=(18, 4.2))
colors = dict(zip(ALGORITHMS, ("C0", "C1", "C2", "C4")))


def smooth(y, width=4):
    return [np.mean(y[max(0, i + 1 - width) : i + 1]) for i in range(len(y))]


for method in ALGORITHMS[:3]:
    for ax, key in zip(axes, ("reward", "gold", "kl")):
        each = np.array([smooth(r["history"][key]) for r in table[method]])
        x = np.arange(1, each.shape[1] + 1)
        ax.plot(x, each.mean(axis=0), color=colors[method], label=method)
        ax.fill_between(x, each.min(axis=0), each.max(axis=0), color=colors[method], alpha=0.15, linewidth=0)
for ax, title in zip(axes, ("Reward: optimized", "Gold: only watched", "KL from the base, nats an answer")):
    ax.set(title=title, xlabel="update")
axes[0].legend(frameon=False)
for method in ALGORITHMS:
    kl, value = ([r[k] for r in table[method]] for k in ("kl", "gold"))
    axes[3].plot(np.sqrt(np.maximum(kl, 0)), value, "o", color=colors[method], label=method)
axes[3].axhline(np.mean([r["gold"] for r in table["base"]]), color="grey", linestyle="--", linewidth=1, label="base")
axes[3].set(title="What it cost (each dot a seed)", xlabel="sqrt(KL)", ylabel="gold, held-out prompts")
axes[3].legend(frameon=False)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(OUT / "10_ppo.png", dpi=120)

# %% [markdown]
# ## Quiz
#
# **1.** Why are prompts of different lengths padded on the left for a rollout?
#
# <details><summary>Answer</summary>
#
# So that all go on at the same column. The log-probabilities are the same as those of the row alone.
#
# </details>
#
# **2.** Why are the answers drawn without top-k or top-p?
#
# <details><summary>Answer</summary>
#
# Cutting the tail would draw from another distribution than the one whose log-probabilities are compared later.
#
# </details>
#
# **3.** Every token has a reward, but the judge scores an answer once. What is the reward of a token that is not the
# last?
#
# <details><summary>Answer</summary>
#
# The price of KL alone, $-\beta\,(\log \pi(y_t) - \log \pi_{\text{ref}}(y_t))$. The score is added at the last.
#
# </details>
#
# **4.** A token's ratio is 1.28 and its advantage is positive. What is the gradient of its policy loss, and why?
#
# <details><summary>Answer</summary>
#
# Zero: beyond $1 + \varepsilon = 1.2$ the clipped term is the larger loss, and it does not depend on the ratio. That
# takes away the incentive to move further on the strength of old data.
#
# </details>
#
# **5.** The advantages are whitened before the returns are taken. What does a perfect value head learn from that?
#
# <details><summary>Answer</summary>
#
# That it is wrong by one: whitening blows its tiny advantages up to variance one, and $R = A_{\text{white}} + V$
# carries that into the target. Its loss becomes $\frac12$.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("10.1", value)`, or at the terminal with
# `minipeft exercise 10.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 10.2 FILE.py`.
#
# **10.1 Three tokens.** An answer of three tokens has the rewards 0, 0, 1 and the guesses $V$ = 0.5, 0.5, 0.5. With
# $\gamma = 1$ and $\lambda = 0.5$, what are the three advantages? By hand: three numbers, for `check` a list.
#
# **10.2 Advantages.** Write `gae(rewards, values, gamma, lam)` for one answer: the advantages of its tokens, all real.
#
# **10.3 The clip.** Write `clipped_loss(ratio, A, eps)`: the policy loss of each token, before the mean. Which side is
# clipped where $A < 0$?
#
# **10.4 One success in four.** Four answers to a prompt have the scores 0, 0, 0 and 1. What is RLOO's advantage of the
# first?
#
# Further, without a checker:
#
# - **LoRA.** Give `PPOTrainer` the policy `mp.get_peft_model(base, mp.LoraConfig(target_modules="all-linear"))` and ten
#   times the learning rate. Which arrays do policy and reference share? How does reward per KL compare?
# - **An adaptive price.** Set `kl_target=6` and watch `objective/kl_coef`. Does the KL settle, and how fast may it
#   move?
# - **One pass.** With `num_epochs=1` and `mini_batch_size=32` every ratio is 1 and clipping never acts. What is left of
#   PPO, and is it worse?
#
# <details><summary>Solution of 10.1</summary>
#
# From the last: $\delta = (0, 0, 0.5)$, as after the end $V$ is 0; then half of what follows.
#
# ```python
# check("10.1", [0.125, 0.25, 0.5])
# ```
#
# </details>
#
# <details><summary>Solution of 10.2</summary>
#
# A walk from the end, where nothing is still to come.
#
# ```python
# def gae(rewards, values, gamma, lam):
#     A, following = np.zeros(len(rewards)), (0.0, 0.0)  # V and A of the next token
#     for t in reversed(range(len(rewards))):
#         A[t] = rewards[t] + gamma * following[0] - values[t] + gamma * lam * following[1]
#         following = values[t], A[t]
#     return A
#
# check("10.2", gae)
# ```
#
# </details>
#
# <details><summary>Solution of 10.3</summary>
#
# The larger of two losses: for $A < 0$ the ratio is clipped below, at $1 - \varepsilon$.
#
# ```python
# check("10.3", lambda ratio, A, eps: np.maximum(-A * ratio, -A * np.clip(ratio, 1 - eps, 1 + eps)))
# ```
#
# </details>
#
# <details><summary>Solution of 10.4</summary>
#
# The mean of the *other* three is a third.
#
# ```python
# check("10.4", 0 - (0 + 0 + 1) / 3)
# ```
#
# </details>
