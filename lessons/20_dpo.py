# %% [markdown]
# # Lesson 20 · DPO: a policy from comparisons, without a reward model
#
# PPO (Lesson 10) needs a reward model, a value head, and answers sampled again and again. *Direct preference
# optimization* (Rafailov et al. 2023, arXiv:2305.18290) needs none of these: it has one loss of pairs. After this
# lesson you can derive it and say why the term that nobody can compute cancels; compute a step of it by hand; say how
# the *chosen* answer can become less probable; and tell IPO, KTO, ORPO and SimPO by what they change.
#
# You need Lessons 9 and 10 and the extra `rlhf` (`pip install 'minipeft[rlhf]'`). Reading takes about 23 minutes (200
# words or 25 lines of code a minute, up to the quiz). Run it with `python lessons/20_dpo.py` (about three quarters of
# a minute on two cores), or open it as a notebook. `python lessons/20_dpo.py --full` (in a notebook `!python
# lessons/20_dpo.py --full`) first computes those of the 18 runs behind section 4, with six seeds, that are missing in
# `lessons/results/20_dpo.jsonl` (all of them: about six minutes), and goes on with the lesson.
#
# Environment: `MINIPEFT_REDUCED=1` trains on fewer pairs; `MINIPEFT_LESSONS_OUT` is where the pictures go
# (`lessons/out`).

# %%
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import policies, preferences, sweep
from experiments.preferences import Learning

import minipeft as mp
from minipeft import diagrams, rlhf
from minipeft.claims.chain_rules import CHAIN, items, shown, those_of
from minipeft.claims.statistics import crossed
from minipeft.experiments.rows import read_rows
from minipeft.experiments.seeds import interval

F = mp.functional
REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = (
    Path(__file__).parent if "__file__" in globals()
    else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
)  # fmt: skip
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "20_dpo.jsonl"
if REDUCED:
    print("REDUCED SETTING: 16 pairs in section 4, too few to learn anything.\n")
if "--full" in sys.argv:
    sweep(preferences.measure, preferences.RUNS, RESULTS)

# %% [markdown]
# PPO and DPO both begin with comparisons, and both want what Lesson 10 wants: a high reward at a small KL.

# %%
diagrams.two_ways().savefig(OUT / "20_dpo_ways.png")

# %% [markdown]
# ## 1 · The best policy, in closed form
#
# For one prompt $x$, take the objective of Lesson 10, with the reward $r$ and the price of KL $\beta$. The reference
# $\pi_{\text{ref}}$ gives every answer a positive probability:
#
# $$\max_\pi \; E_{y \sim \pi}\Big[r(y) - \beta \log \frac{\pi(y)}{\pi_{\text{ref}}(y)}\Big] .$$
#
# Divide by $-\beta$, and write $r$ into the logarithm, as $r = \beta \log e^{r/\beta}$. What is to be made small is
#
# $$E_{y \sim \pi}\Big[\log \frac{\pi(y)}{\pi_{\text{ref}}(y)\, e^{r(y)/\beta}}\Big]
#   = \mathrm{KL}(\pi \,\|\, \pi^*) - \log Z, \qquad
# \pi^*(y) = \frac{1}{Z}\, \pi_{\text{ref}}(y)\, e^{r(y)/\beta}, \quad Z = \sum_y \pi_{\text{ref}}(y)\,
# e^{r(y)/\beta},$$
#
# where $Z$ only makes the probabilities sum to 1. A KL is smallest, 0, where both are the same. So the best policy is
# $\pi^*$: the reference, each probability multiplied by $e^{r/\beta}$ and divided by $Z$. An answer becomes more
# probable where its reward is above $\beta \log Z$, and less probable where it is below. By hand, with three answers:
# $\pi_{\text{ref}} = (0.5, 0.3, 0.2)$, $r = (0, \log 2, \log 4)$ and $\beta = 1$. The products are $0.5, 0.6, 0.8$, so
# $Z = 1.9$, and the first answer falls from 0.5 to $0.5 / 1.9$.
#
# One can sample from $\pi^*$ without $Z$, by *rejection*: draw an answer from the reference, and keep it with
# probability $e^{(r - r_{\max})/\beta}$.
#
# **Predict:** what does $\beta = \frac12$ change? (Then $e^{r/\beta} = 1, 4, 16$.) And of how many draws is one kept?

# %%
reference, r = np.array([0.5, 0.3, 0.2]), np.log([1.0, 2, 4])


def optimum(r, beta, reference):
    """(the best policy, log Z)."""
    weights = reference * np.exp(r / beta)
    return weights / weights.sum(), np.log(weights.sum())


def objective(p, r, beta, reference):
    return p @ r - beta * p @ np.log(p / reference)


rng = np.random.default_rng(0)
for beta in (1.0, 0.5):
    best, log_Z = optimum(r, beta, reference)
    others = [objective(p, r, beta, reference) for p in rng.dirichlet(np.ones(3), 10_000)]
    top = objective(best, r, beta, reference)
    print(f"beta {beta:g}: best policy {best.round(3)}, objective {top:.6f} = beta log Z; of 10,000 others {max(others):.6f}")
    assert max(others) < top and np.isclose(top, beta * log_Z)
    drawn = rng.choice(3, 100_000, p=reference)
    kept = drawn[rng.random(len(drawn)) < np.exp((r[drawn] - r.max()) / beta)]
    print(f"  by rejection {(np.bincount(kept) / len(kept)).round(3)}, {len(kept) / len(drawn):.0%} of the draws kept")
    assert np.allclose(np.bincount(kept) / len(kept), best, atol=0.01)
    assert np.isclose(len(kept) / len(drawn), np.exp(log_Z - r.max() / beta), atol=0.01)
assert round(best[2], 2) == 0.65, "with beta = 1/2"
assert round(1e-6 * np.exp(1 / 0.05) / (1 - 1e-6)) == 485, "one in a million, of a reward higher by 1"

# %% [markdown]
# A lower price lets the policy go further from the reference: with $\beta = \frac12$ the third answer has 65 %. And
# rejection keeps fewer draws, the share $Z e^{-r_{\max}/\beta}$.
#
# Then what is wrong with $\pi^*$ as it stands? $Z$ is a sum over all answers, $V^T$ of them with $T$ tokens from a
# vocabulary of $V$. Nobody can compute it, so nobody can evaluate $\pi^*(y)$. $Z$ is the mean of $e^{r/\beta}$ over
# answers of the reference, but a sample of them estimates it badly: at $\beta = 0.05$ an answer that is drawn once in a
# million makes up 485 times as much of $Z$ as all others together, if its reward is 1 and theirs is 0. Sampling by
# rejection does without $Z$, but it needs a reward model, a bound on the reward, and all the draws that it throws away.
# PPO does without it, too, since $\log Z$ is a constant of what it maximizes, but it needs a reward model and samples.
#
# ## 2 · Z cancels
#
# Solve the formula of $\pi^*$ for the reward, and write $Z(x)$ for $Z$, which differs from prompt to prompt:
#
# $$r(y) = \beta \log \frac{\pi^*(y)}{\pi_{\text{ref}}(y)} + \beta \log Z(x) .$$
#
# A comparison depends on a *difference* of two rewards: Bradley and Terry's probability that $y_w$ wins against $y_l$
# is $\sigma(r(y_w) - r(y_l))$ (Lesson 9). Both answers have the same prompt, so $\beta \log Z(x)$ cancels:
#
# $$r(y_w) - r(y_l) = \beta \log \frac{\pi^*(y_w)}{\pi_{\text{ref}}(y_w)} - \beta \log \frac{\pi^*(y_l)}{\pi_{\text{ref}}(y_l)}.$$
#
# So far the reward was given, and $\pi^*$ was its best policy. DPO turns this round: the reward is unknown, and the
# policy $\pi_\theta$ that we train takes the place of $\pi^*$. It states a reward, $r_\theta(y) = \beta \Delta(y)$ with
# $\Delta(y) = \log \pi_\theta(y) - \log \pi_{\text{ref}}(y)$ of a whole answer, for which $\pi_\theta$ itself is the
# best policy. So fit $r_\theta$ to the comparisons as Lesson 9 fits a reward model, by maximum likelihood, and the best
# policy is there at once:
#
# $$\mathcal L = -\log \sigma\big(\beta\, [\Delta(y_w) - \Delta(y_l)]\big).$$
#
# $\beta \Delta$ is called the *implicit reward*, and $\beta [\Delta(y_w) - \Delta(y_l)]$ the **margin**. With enough
# comparisons the minimum is at the best policy for the raters' own reward, if three things hold: raters choose as
# Bradley and Terry say, the model can express $\pi^*$, and the comparisons determine the rewards of a prompt's answers,
# up to one number a prompt. (Without the first it is the best policy for the reward, if any, that fits the comparisons
# best under Bradley and Terry's model.) Section 3 shows what can happen where none of the three holds: one answer
# always wins there, which no finite reward says; one weight cannot express every $\pi^*$; and the third answer is in no
# comparison.
#
# **Predict:** what comes out if the two answers of a pair belong to *different* prompts?

# %%
best, log_Z = optimum(r, 1.0, reference)
implicit = np.log(best / reference)
print("\nreward", r.round(3), "  implicit reward", implicit.round(3), f"  their difference is log Z = {log_Z:.3f}")
assert np.allclose(r - implicit, log_Z)
other = np.log([4.0, 4, 4])  # another prompt, all of whose answers are good
implicit_other = np.log(optimum(other, 1.0, reference)[0] / reference)
across = r[1] - other[0], implicit[1] - implicit_other[0]
print("answer 2 of this prompt against answer 1 of the other: rewards {:+.3f}, implicit {:+.3f}".format(*across))
assert np.isclose(implicit[2] - implicit[0], r[2] - r[0]) and across[0] < 0 < across[1]

# %% [markdown]
# Then $Z$ does not cancel, and even the order may be wrong: a policy only says which answer it wants *to this prompt*.
# Within a prompt $Z$ does no harm: a number added to the rewards of all its answers changes neither a comparison nor
# $\pi^*$. So comparisons tell a reward only up to a function of the prompt. A ranking of several answers by Plackett
# and Luce's model, a softmax of rewards for the best, then for the best of the rest, gives a loss in which $Z$ cancels,
# too (Rafailov et al., appendix A.3).
#
# Now the loss of a batch and its gradient, beside NumPy. The derivative of $-\log \sigma(m)$ is $-\sigma(-m)$, so
#
# $$\nabla \mathcal L = -\beta\, \sigma(-m)\, \big[\nabla \log \pi(y_w) - \nabla \log \pi(y_l)\big], \qquad m = \text{margin}.$$
#
# A step pushes the chosen answer up and the rejected one down, hardest where the margin is
# below 0: where, beside the reference, the policy still prefers the rejected one.

# %%
sums = [mp.Tensor(np.array(s), requires_grad=True) for s in ([-1.7, -1.6], [-1.5, -1.5])]
ref_w, ref_l = np.array([-1.9, -1.5]), np.array([-1.4, -1.6])
loss = rlhf.dpo_loss(*sums, ref_w, ref_l, beta=0.1)
loss.backward()
margin = 0.1 * ((sums[0].data - ref_w) - (sums[1].data - ref_l))
by_hand = np.log1p(np.exp(-margin)).mean()
print(f"\nDPO of two pairs {loss.item():.7f}, by NumPy {by_hand:.7f}; gradient of the chosen {sums[0].grad.round(6)}")
assert abs(loss.item() - by_hand) < 5e-8 and np.allclose(sums[0].grad, -0.1 / (1 + np.exp(margin)) / 2)
assert np.allclose(sums[0].grad, -sums[1].grad)

# %% [markdown]
# ## 3 · The chosen answer falls
#
# A step pushes the chosen answer up. Does its probability rise? The loss asks for a difference alone, and answers
# share weights. The plainest model that shares one: a single weight $\theta$, and three answers with a feature $f$,
# which is 0 for the rejected answer, 1 for the chosen one and 3 for one that nobody compared, with
# $\pi \propto e^{\theta f}$. The reference is the start, $\theta = 0$, so the margin is $\beta \theta$, and DPO
# raises $\theta$ without end. And
#
# $$\log \pi(y_w) = \theta - \log\left(1 + e^\theta + e^{3\theta}\right), \qquad
#   \frac{d \log \pi(y_w)}{d \theta} = 1 - E_\pi[f] .$$
#
# **Predict:** at $\theta = 0$ all three are equally probable, so $E[f] = 4/3$. Where does the probability go?

# %%
f = np.array([0.0, 1, 3])
theta, path = mp.nn.Parameter(np.zeros(1)), []
optimizer = mp.optim.SGD([theta], lr=1.0)
for _ in range(30):
    logp = F.log_softmax(theta * f)
    path.append(np.exp(logp.data))
    loss = rlhf.dpo_loss(logp[1:2], logp[0:1], np.log([1 / 3]), np.log([1 / 3]), beta=1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
path = np.array(path)
print("\nstep  rejected  chosen  never compared  margin")
for step in (0, 1, 3, 10, 29):
    lost, won, third = path[step]
    print(f"{step:4d}  {lost:8.3f}  {won:6.3f}  {third:14.3f}  {np.log(won / lost):6.2f}")
assert (np.diff(np.log(path[:, 1] / path[:, 0])) > 0).all(), "the margin rises at every step"
assert (np.diff(path[:, 1]) < 0).all() and path[-1, 2] > 0.99, "the chosen falls at every step; the third gets all"

# %%
preferences.answers_picture(path).savefig(OUT / "20_dpo_answers.png", dpi=120)

# %% [markdown]
# It goes to the third answer, which has more of the feature that tells the chosen from the rejected one. In the picture
# both answers that were compared go to 0, the chosen one later, and the gray line takes all. The chosen answer falls
# wherever $E_\pi[f]$ is above its own feature, 1. The loss falls all the while, since the rejected answer
# falls faster. Razin et al. (2024, arXiv:2410.08847) call it *likelihood displacement*. In language models they trained
# *No* to be preferred to *Never*, and *Yes* rose.
#
# ## 4 · In a language model
#
# Now the model and the rater of Lessons 9 and 10: to each of 1,000 openings the base writes four answers, and the
# rater picks the best and the worst. DPO sees each pair once, 16 a step, so a step reports of its pairs before it has
# learned from them. All weights are trained, at a rate of 3e-4, with $\beta = 0.05$; ORPO's $\beta$, the weight of a
# term (section 5), is 0.1. (Code: `lessons/experiments/preferences.py`.)
#
# **Predict:** $\Delta$ of the chosen and of the rejected answers starts at 0. Where does each go?

# %%
live = Learning("dpo", **(dict(rankings=16) if REDUCED else {}))
policy, history = preferences.learn(live)
columns = {name: np.array([h[f"rewards/{name}"] for h in history]) / live.beta for name in ("chosen", "rejected")}
part = max(1, len(history) // 4)
print("\nnats an answer, of pairs not seen before    chosen  rejected  difference")
for i in range(0, len(history), part):
    w, lost = (columns[name][i : i + part].mean() for name in ("chosen", "rejected"))
    print(f"steps {i + 1:2d} to {min(i + part, len(history)):2d} {w:33.2f}  {lost:8.2f}  {w - lost:10.2f}")
assert abs(columns["chosen"][0]) < 0.01 and abs(history[0]["loss"] - np.log(2)) < 1e-3, "it starts as its reference"
if not REDUCED:
    late = {name: values[len(values) // 2 :].mean() for name, values in columns.items()}
    assert late["rejected"] < late["chosen"] < 0, "both fall, the rejected one further"
    under_reference = np.array([h["logps/chosen"] for h in history]) - columns["chosen"]  # log pi_ref of each step's pairs
    assert under_reference.std() > -late["chosen"], "from step to step the pairs change more than the policy has learned"

# %% [markdown]
# Both fall, the rejected one further. Is that DPO's doing? One part of it is not. The chosen and the rejected answer
# are picked from four draws of the reference, and the mean of $\Delta$ over all such draws is
# $-\mathrm{KL}(\pi_{\text{ref}} \,\|\, \pi)$, the forward KL of Lesson 10, section 4: *every* policy that has moved
# makes its old answers less probable in the mean. So we ask what $\Delta$ the four answers to a held-out prompt have:
# the best, the two in the middle, which no pair would show, and the worst. Beside DPO stand plain fine-tuning on the
# same chosen answers, and ORPO (section 5), whose loss is that of the fine-tuning plus one of pairs. Six seeds, 512
# prompts, 95 % intervals over both. (They are openings of held-out chapters with which no training sentence begins; no
# setting was chosen on them.)

# %%
rows = read_rows(RESULTS)


def of(loss, name):
    """Delta of held-out answers, [seeds, prompts]."""
    return np.array([row[name] for row in sorted(rows, key=lambda row: row["seed"]) if row["loss"] == loss])


LOSSES, ANSWERS = ("dpo", "chosen", "orpo"), ("chosen", "middle", "rejected")
table = {(loss, name): crossed(of(loss, name)) for loss in LOSSES for name in ANSWERS}
gap = {loss: crossed(of(loss, "chosen") - of(loss, "rejected")) for loss in LOSSES}
four = {loss: (of(loss, "chosen") + 2 * of(loss, "middle") + of(loss, "rejected")) / 4 for loss in LOSSES}  # estimates -KL
above = {loss: crossed(of(loss, "chosen") - four[loss]) for loss in LOSSES}
print("\ntrained by        best answer           the middle two        worst                 best - worst")
for loss, title in zip(LOSSES, ("DPO", "the chosen alone", "ORPO")):
    cells = [*(table[loss, name] for name in ANSWERS), gap[loss]]
    print(f"{title:16s}  " + "  ".join(f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]".ljust(20) for e in cells))
for loss, e in above.items():
    print(f"{loss}: mean of the four {four[loss].mean():+.2f}; the best is above it by {e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]")
seen = {name: np.array([np.mean(r[f"step_{name}"][16:]) for r in rows if r["loss"] == "dpo"]) for name in ("chosen", "rejected")}
w, lost, both = (interval(x) for x in (*seen.values(), seen["chosen"] - seen["rejected"]))
print(f"DPO, pairs of its steps from the 17th on: chosen {w[0]:+.2f} ± {w[1]:.2f}, rejected {lost[0]:+.2f} ± {lost[1]:.2f},", end=" ")
print(f"difference {both[0]:+.2f} ± {both[1]:.2f}")
assert w[0] + w[1] < 0 < both[0] - both[1], "of pairs not seen before the chosen answer falls, and the margin is above 0"
assert all(len(r["step_chosen"]) == 63 for r in rows if r["loss"] == "dpo"), "1,000 pairs, 16 a step: 744 from the 17th on"
assert max(e.high for e in table.values()) < 0, "all held-out answers fall, under all three losses"
assert all(crossed(of("dpo", "chosen") - of(loss, "chosen")).high < 0 for loss in ("chosen", "orpo"))
assert min(e.low for e in gap.values()) > 0
assert gap["dpo"].low < both[0] < gap["dpo"].high, "the best falls less than the worst, as in the steps' pairs"
assert min(e.low for e in above.values()) > 0, "and less than the four do in the mean"

# %%
preferences.steps_picture(rows).savefig(OUT / "20_dpo_steps.png", dpi=120)

# %%
preferences.held_out_picture(table).savefig(OUT / "20_dpo_held_out.png", dpi=120)

# %% [markdown]
# On the pairs of its own steps, over six seeds, DPO's chosen answers fall, and the margin is clearly above 0: that is
# all that the loss asks for. In the first picture look at the bundles: both leave 0, and the rejected answers' goes
# further down. On the held-out prompts the answers fall under all three losses, as they must in the mean for any policy
# that has moved: in the second picture no interval reaches 0. The best answer falls clearly more under DPO than under
# the other two. (They move less altogether, so this is no ranking of methods.) But the yardstick is the mean fall of
# DPO's four answers, 2.47 nats, and the best falls clearly less, 2.14. So moving alone suffices for its fall: these
# runs show *that* it falls, and not section 3's cause at work. Where the probability goes was not measured.
#
# Does the best answer fall less than the worst one? Clearly: by 0.47 ± 0.08 nats in the steps' pairs, each before it
# was learned from (744 a seed, other ones for each), and by 0.60 on the held-out prompts after training (the same for
# all seeds). In the second picture DPO's dots stand in the raters' order, from the best on the right to the worst on
# the left. The best falls clearly less than the worst without a loss of pairs, too: by 0.33 under fine-tuning on the
# chosen answers alone. (Under ORPO by 0.32.)
#
# Where the chosen answer is a good one, the fall matters: its probability may go to answers that nobody has compared
# (section 3). So look at `rewards/chosen`, which is $\beta \Delta$, while you train, not at the margin alone, and hold
# it beside the mean of $\beta \Delta$ over all of the reference's answers to the same prompts: moving alone lowers both
# (pairs of another model need its answers). (A step's `logps/chosen` changes more with its pairs than by what was
# learned.) To hold it up, one can add the chosen answer's log-likelihood to what is maximized, as ORPO does (Pang et
# al. 2024, arXiv:2404.19733). Whether that holds it up on the pairs' own prompts was not measured here; on others it
# fell.
#
# ## 5 · The family
#
# $|y|$ is the number of an answer's tokens, $p(y) = \pi(y)^{1/|y|}$ the geometric mean of their probabilities, and
# $\text{odds}(p) = p / (1 - p)$:
#
# | | loss of a pair | what it changes |
# |---|---|---|
# | **DPO** | $-\log \sigma(\beta [\Delta_w - \Delta_l])$ | |
# | **IPO** (Azar et al. 2023, 2310.12036) | $(\Delta_w - \Delta_l - 1/(2\beta))^2$ | the difference has a goal, and is not to pass it |
# | **KTO** (Ethayarajh et al. 2024, 2402.01306) | $1 - \sigma(\pm \beta [\Delta - z])$ | single answers, good (+) or bad (−), no pairs; $z$ is the point from which gains and losses count |
# | **ORPO** (Hong et al. 2024, 2403.07691) | $-\log p_w - \beta \log \sigma(\log \text{odds } p_w - \log \text{odds } p_l)$ | no reference; the first term is to hold the chosen up |
# | **SimPO** (Meng et al. 2024, 2405.14734) | $-\log \sigma(\beta [\log p_w - \log p_l] - \gamma)$ | no reference; means over tokens, so that length alone gives no larger margin; the chosen is to lead by $\gamma$ |
#
# All are in `minipeft/rlhf/preference_losses.py`, a few lines each. (TRL's IPO divides each $\Delta$ by the answer's
# tokens, so its goal is in nats a token.) DPO's $\Delta$ is a sum over tokens, to which a longer answer can contribute
# more. Park et al. (2024, arXiv:2403.19159) find that DPO exploits length, in summaries and in dialogue.
#
# **Predict:** a pair has $\Delta_w - \Delta_l = 20$ nats, with $\beta = 0.1$. In which direction does DPO push it, and
# in which IPO?

# %%
differences = np.linspace(-10, 25, 71)


def curve(loss):
    """(loss, push on the difference) at each of `differences`, for beta = 0.1."""
    x, zero = mp.Tensor(differences, requires_grad=True), np.zeros(len(differences))
    values = [loss(x[i : i + 1], zero[:1], zero[:1], zero[:1], beta=0.1) for i in range(len(differences))]
    sum(values[1:], values[0]).backward()
    return np.array([v.item() for v in values]), -x.grad


curves = {"DPO": curve(rlhf.dpo_loss), "IPO": curve(rlhf.ipo_loss)}
at = int(np.argmin(abs(differences - 20)))
print("\npush at a difference of 20 nats: " + ", ".join(f"{name} {push[at]:+.4f}" for name, (_, push) in curves.items()))
print("                    at its goal, 5:  " + ", ".join(f"{name} {push[30]:+.4f}" for name, (_, push) in curves.items()))
assert round(np.log(0.9 / 0.1) / live.beta) == 44
assert round(both[0], 2) == 0.47, "the best difference at q = 0.9, and section 4's: see below"
assert differences[30] == 5 and curves["DPO"][1][at] > 0 > curves["IPO"][1][at] and abs(curves["IPO"][1][30]) < 1e-12

# %%
preferences.push_picture(differences, curves).savefig(OUT / "20_dpo_push.png", dpi=120)

# %% [markdown]
# DPO pushes it further, ever more weakly; IPO pulls it back to $1/(2\beta) = 5$. In the picture IPO's line crosses 0 at
# the dashed goal; DPO's nears 0 on the right and never crosses it. What does DPO's $\beta$ do, then? If raters prefer
# $y_w$ in a share $q$ of the comparisons of the same two answers, the loss is smallest where $\sigma(\beta [\Delta_w -
# \Delta_l]) = q$, so the best difference is $\log\frac{q}{1-q} / \beta$: the smaller $\beta$, the further. With $q = 1$
# it is infinite, whatever $\beta$: the loss has no price of KL, only these best differences. Where each pair can reach
# its own, $\beta$ holds the policy near the reference only where comparisons contradict each other and training lasts
# long enough; else the end of training does. So in section 4: even at $q = 0.9$ the best difference would be 44 nats,
# and the steps' pairs, each seen once, stood at 0.47. While $\sigma(-m)$ is about $\frac12$, as there, $\beta$ is a
# factor of the whole gradient, which Adam all but divides out (Lesson 0, section 6): twice the $\beta$ should give
# about the same $\Delta$ and twice the margin. (Rafailov et al., appendix B, and TRL take 0.1.) *Label smoothing*
# (Mitchell 2023, ericmitchell.ai/cdpo.pdf) trains as if a share $\varepsilon$ of the raters had said the opposite: $-(1
# - \varepsilon) \log \sigma(m) - \varepsilon \log \sigma(-m)$, so $q$ is at most $1 - \varepsilon$, and the best
# difference is finite.
#
# **KTO** has no second answer to compare with, so it compares with $z$, which should be $\mathrm{KL}(\pi \,\|\,
# \pi_{\text{ref}})$, the mean $\Delta$ of the policy's own answers. To spare the sampling, $z$ is the mean $\Delta$ of
# answers in the data, each behind another's prompt, or 0 where that is negative: cheap, but biased. It counts as a
# constant: no gradient goes through it. The farther an answer is from $z$, the less a further nat counts, on both
# sides: in this way people value gains and losses, say Kahneman and Tversky, the K and T of the name.
#
# **Predict:** a good answer's $\Delta$ is 80 nats below $z$, and in a pair $\Delta_w - \Delta_l = -80$. How
# hard do KTO and DPO push?

# %%
pushes = {}
for name, loss in (
    ("KTO", lambda x, zero: rlhf.kto_loss(x, zero, np.array([True]), 0.0, beta=0.1)),
    ("DPO", lambda x, zero: rlhf.dpo_loss(x, zero, zero, zero, beta=0.1)),
):
    for stands in (-80.0, 0.0, 80.0):
        x = mp.Tensor(np.array([stands]), requires_grad=True)
        loss(x, np.zeros(1)).backward()
        pushes[name, stands] = -x.grad[0]
    print(f"{name}: push at -80, 0 and 80 nats", *(f"{pushes[name, stands]:.5f}" for stands in (-80.0, 0.0, 80.0)))
assert np.isclose(pushes["KTO", -80.0], pushes["KTO", 80.0]) and pushes["KTO", 0.0] > 50 * pushes["KTO", 80.0]
assert pushes["DPO", -80.0] > 1.9 * pushes["DPO", 0.0]

# %% [markdown]
# DPO pushes such a pair hardest. KTO hardly pushes the answer, no more than one that is long settled. That may spare
# the policy wrong labels, and may leave out what is hard to learn (Ethayarajh et al. name both).
#
# **ORPO** has no reference, and its first term is plain fine-tuning on the chosen answers, so it needs no stage of SFT
# before it. In its second term, $d \log \text{odds}(p) / d \log p = 1 / (1 - p)$. Where $p$, a mean over tokens, is
# small, this is near 1 (1.16 at 2 nats a token): $\log \text{odds}(p)$ is then about $\log p$, and the term about
# SimPO's loss with $\beta = 1$ and $\gamma = 0$, times ORPO's $\beta$.
#
# ## 6 · Beside PPO
#
# PPO holds a policy with a value head, a reference and a reward model, and samples. A step of DPO is a forward and a
# backward pass of the policy over both answers. The reference's log-probabilities are computed once, before training
# (in TRL with `precompute_ref_log_probs=True`; by default it computes them at each step). With a new adapter
# (`peft_config`) TRL needs no second model: it takes the policy with its adapter disabled.
#
# Lesson 10, section 9, has both, each at the rate that a search chose ($\beta$ was not tuned), from the same rater's
# 1,000 rankings: DPO from the best and the worst of each, PPO from all six pairs, through a reward model, and from 512
# answers of its own.

# %%
ppo_rows = read_rows(HERE / "results" / "10_ppo.jsonl")
on = {m: policies.reports(ppo_rows, m) for m in ("base", "PPO", "DPO")}
beside = {(one, other): policies.less(on[one], on[other]) for one, other in (("PPO", "base"), ("DPO", "base"), ("DPO", "PPO"))}
print("\n5 seeds, 512 test prompts (* excludes 0)")
for (one, other), found in beside.items():
    print(f"{one} less {other}: {policies.said(found)}")
print("answers that end: " + ", ".join(f"{m} {on[m]['ended'].mean():.0%}" for m in on))
assert min(beside[m, "base"]["gold"].low for m in ("PPO", "DPO")) > 0 > beside["DPO", "PPO"]["gold"].low
assert beside["DPO", "PPO"]["gold"].high > 0 > beside["DPO", "PPO"]["reward"].high and beside["DPO", "PPO"]["kl"].low > 0
assert on["DPO"]["ended"].max() < 0.03 < 0.3 < on["base"]["ended"].min(), "fewer of DPO's answers end"

# %% [markdown]
# Both gain gold, clearly; which gains more is not told. PPO's judge, which DPO never met, gives DPO clearly less
# reward, at a larger KL. (Of the nine intervals printed, one may exclude 0 by chance.) Hardly any of its answers end
# within 20 tokens, so a part of its gold may be length: kind words need room. This was not separated.
#
# The chain of Lesson 10, section 8, asks otherwise. Its gold wants answers that end, are long enough, have pairs of
# words that verses have, repeat nothing, and are kind; both begin with a model fine-tuned on demonstrations, SFT; both
# learn from the same 2,000 comparisons, PPO through a reward model and with 1,024 answers of its own. No other rate
# that was tried gives either clearly more gold, on other prompts.
#
# **Predict:** which one has more gold there?

# %%
recorded = CHAIN.rows()
chain = {m: items(those_of(recorded, stage)) for m, stage in (("SFT", "sft"), ("PPO", "ppo"), ("DPO", "dpo"))}
moved = {m: items(those_of(recorded, stage), "kl").mean() for m, stage in (("PPO", "ppo"), ("DPO", "dpo"))}
print("\non the chain, 10 seeds, 512 held-out prompts: gold of " + ", ".join(f"{m} {x.mean():.2f}" for m, x in chain.items()))
for one, other in (("PPO", "SFT"), ("DPO", "SFT"), ("DPO", "PPO")):
    print(f"{one} less {other}: {shown(crossed(chain[one] - chain[other]))}")
print("KL from SFT, nats an answer: " + ", ".join(f"{m} {kl:.1f}" for m, kl in moved.items()))
assert min(crossed(chain[one] - chain[other]).low for one, other in (("PPO", "SFT"), ("DPO", "SFT"), ("DPO", "PPO"))) > 0
assert moved["DPO"] > moved["PPO"]

# %% [markdown]
# DPO, clearly, at a larger KL. (PPO's $\beta$, 0.05, is the best of three on these very prompts; DPO's is its paper's
# 0.1, not tuned. As we read the answers in Lesson 10, DPO's kinder words make no more sense.)
#
# With large models, from dialogue to code, Xu et al. (2024, arXiv:2404.10719) report PPO above DPO in all their cases.
# One difference may be a cause, untested here. DPO is *offline*: once it has moved, its pairs are no longer answers of
# its own, so no comparison corrects what section 3 shows. PPO is *online*: it samples what it would now say, and a
# judge scores it; but it can exploit the judge (Lesson 11). Online DPO has pairs of fresh answers labeled at each step
# (Guo et al. 2024, arXiv:2402.04792).
#
# ## 7 · Break it: a reference that is not the start
#
# So far the reference was the policy at the start, and $\Delta_w - \Delta_l$ began at 0. Suppose another model is
# taken as the reference by mistake, which finds the rejected answer much less probable than the policy does.
#
# **Predict:** three answers again, all equally probable at the start; but the reference says (0.005, 0.5, 0.495), with
# the first one rejected and the second chosen. Does the first step push more or less than with the right one?

# %%
def first_push(reference):
    logits = mp.Tensor(np.zeros(3), requires_grad=True)
    logp, ref = F.log_softmax(logits), np.log(reference)
    rlhf.dpo_loss(logp[1:2], logp[0:1], ref[1:2], ref[0:1], beta=1.0).backward()
    return -logits.grad


right, mistaken, other_way = (first_push(ref) for ref in ([1 / 3, 1 / 3, 1 / 3], [0.005, 0.5, 0.495], [0.5, 0.005, 0.495]))
print("\npush on the three logits: right reference", right.round(3), "  mistaken", mistaken.round(3), end="")
print("  mistaken the other way", other_way.round(3))
assert np.allclose(right, [-0.5, 0.5, 0]) and mistaken[1] > 0.98 and other_way[1] < 0.02

# %% [markdown]
# It pushes more, nearly twice as hard: beside that reference the policy seems to prefer the rejected answer a
# hundredfold, and $\sigma(-m)$ is near its largest value, 1. With the error the other way it is near 0: hardly anything
# is learned at first, and the loss is low. Nor does longer training mend it where raters disagree ($q < 1$): the best
# $\Delta_w - \Delta_l$ (section 5) is counted from the reference, so a policy that reaches it has the ratio of the two
# answers wrong by a hundred, too. In your own runs look at the first step: where policy and reference are one, the loss
# is $\log 2$ and `rewards/chosen` is 0. (Where the reference is wrong by one factor for both answers, neither the loss
# nor what DPO learns from the pair changes; only the two rewards themselves show it.) Where the pairs are another
# model's, Rafailov et al. (section 4) first fine-tune on the chosen answers, and take the result as start and as
# reference.
#
# Now break it yourself: swap chosen and rejected in a random half of the pairs of section 4. Then $q = \frac12$, and
# the best difference is 0 (section 5). What do loss, margin and `rewards/accuracies` (the share of pairs with a margin
# above 0) do?

# %% [markdown]
# ## Quiz
#
# **1.** What is the best policy for a reward and a price of KL? Why can nobody evaluate it, and how can one sample from
# it all the same?
#
# <details><summary>Answer</summary>
#
# $\pi^* = \pi_{\text{ref}}\, e^{r/\beta} / Z$. Nobody can evaluate it, since $Z$ is a sum over all answers to the
# prompt. One can sample from it by rejection, at the cost of the draws that are thrown away.
#
# </details>
#
# **2.** Why does $Z(x)$ not appear in DPO's loss? When would it have to?
#
# <details><summary>Answer</summary>
#
# A comparison depends on the difference of two rewards, and $\beta \log Z(x)$ is the same for both answers to a prompt.
# It would have to if the answers of a pair belonged to different prompts.
#
# </details>
#
# **3.** How can the chosen answer become less probable while the loss falls?
#
# <details><summary>Answer</summary>
#
# The loss asks for a difference alone. Where answers share weights, both can fall, the rejected one faster; the
# probability goes to answers that nobody compared.
#
# </details>
#
# **4.** Why do the base's own answers become less probable in the mean under *any* policy that has moved?
#
# <details><summary>Answer</summary>
#
# The mean of $\log \pi - \log \pi_{\text{ref}}$ over answers drawn from the reference is $-\mathrm{KL}(\pi_{\text{ref}}
# \,\|\, \pi)$, which is below 0 unless both are the same.
#
# </details>
#
# **5.** What does IPO do with a pair whose difference is larger than $1/(2\beta)$, and what does DPO?
#
# <details><summary>Answer</summary>
#
# IPO pulls it back; DPO pushes it further, ever more weakly.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("20.1", value)`, or at the terminal with
# `minipeft exercise 20.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 20.3 FILE.py`.
#
# **20.1 The best policy.** A prompt has two answers, which the reference gives with probabilities 0.75 and 0.25. Their
# rewards are 0 and 1. What is the probability of the second under the best policy for $\beta = 0.5$?
#
# **20.2 A margin.** The log-probabilities of the chosen answer are -12 (policy) and -10 (reference), those of the
# rejected one -20 and -15. What is DPO's loss for $\beta = 0.1$?
#
# **20.3 DPO.** Write `dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)`: the mean loss of
# pairs, from four vectors of log-probabilities of whole answers. It should not overflow.
#
# **20.4 Who falls?** In section 3 the third answer has the feature 0.2 in place of 3. What is $d \log \pi(y_w) /
# d\theta$ at $\theta = 0$?
#
# Projects, with no answer written down:
#
# - **Another price.** Train section 4 with `beta` 0.5 and 0.005. What do they change in the chosen answer's $\Delta$?
# - **Hold it up.** Add the chosen answer's negative log-likelihood to DPO's loss, with a weight (Pang et al. 2024,
#   arXiv:2404.19733). How much does it take until the chosen answer does not fall?
#
# <details><summary>Solution of 20.1</summary>
#
# The weights are $0.75$ and $0.25\, e^{1/0.5}$.
#
# ```python
# weight = 0.25 * np.exp(1 / 0.5)
# check("20.1", weight / (0.75 + weight))
# ```
#
# </details>
#
# <details><summary>Solution of 20.2</summary>
#
# $\Delta_w = -2$ and $\Delta_l = -5$: both have fallen, and the margin is $0.1 \cdot 3$.
#
# ```python
# check("20.2", np.log(1 + np.exp(-0.3)))
# ```
#
# </details>
#
# <details><summary>Solution of 20.3</summary>
#
# $-\log \sigma(m) = \log(1 + e^{-m})$, which `logaddexp` computes without overflow.
#
# ```python
# def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
#     margin = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
#     return np.logaddexp(0, -margin).mean()
#
# check("20.3", dpo_loss)
# ```
#
# </details>
#
# <details><summary>Solution of 20.4</summary>
#
# $1 - E[f] = 1 - (0 + 1 + 0.2) / 3$: above 0, so this chosen answer rises.
#
# ```python
# check("20.4", 1 - (0 + 1 + 0.2) / 3)
# ```
#
# </details>
