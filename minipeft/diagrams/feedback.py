"""How a policy comes by its feedback: a ranking in pairs, an update of PPO, who optimizes and who only watches, DPO beside PPO."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from .drawing import GREY, ORANGE, box, cut, line, sheet, words

DOWN = {"color": ORANGE, "lw": 1.3}


def ranking(k: int) -> Any:
    """A figure of k ranked answers: each is scored once, and every pair of scores is compared."""
    axes = sheet()
    place = {i: (4.6 + 7.2 * i, 7 + 5.2 * i) for i in range(k)}  # of answer i: its column in the triangle, its row
    words(axes, 4.6, 5, "answers,\nbest first")
    for i in range(k):
        box(axes, 1, place[i][1], 7.2, 4.2, f"answer {i + 1}\n$r_{i + 1}$", "frozen")
    for i, j in combinations(range(k), 2):
        x, y = place[j][0], place[i][1]
        box(axes, x, y, 6.6, 4.2, f"$r_{i + 1} - r_{j + 1}$", "trained")
    for i in range(k - 1):
        line(axes, [(8.2, place[i][1] + 2.1), (place[i + 1][0], place[i][1] + 2.1)])
    pairs = k * (k - 1) // 2
    bottom = place[k - 1][1] + 4.2
    words(axes, 20, bottom + 2.4, f"{k} texts computed once, {pairs} differences compared", color=GREY)
    words(axes, 20, bottom + 4.4, f"(pair by pair: {2 * pairs} texts)", color=GREY)
    alt = (
        f"{k} ranked answers, best first, are each scored once, and each score is compared with those of all later answers: "
        f"{k} texts computed once, {pairs} differences. Pair by pair, it would be {2 * pairs} texts."
    )
    return cut(axes, bottom + 6.5, "One ranking, one batch element", alt)


def ppo_update() -> Any:
    """A figure of one update of PPO: what each of the four models says about an answer, and what is made of it."""
    axes = sheet()
    box(axes, 1.5, 5.5, 9, 4.4, "prompts $x$")
    box(axes, 15.5, 5.5, 9, 4.4, "policy\nsamples", "trained")
    box(axes, 29.5, 5.5, 9, 4.4, "answers\n$y_1 \\ldots y_n$")
    line(axes, [(10.5, 7.7), (15.5, 7.7)])
    line(axes, [(24.5, 7.7), (29.5, 7.7)])
    line(axes, [(34, 9.9), (34, 12), (5.2, 12)], head=False)
    models = [("policy", "$\\log\\pi_{old}(y_t)$", "trained"), ("reference", "$\\log\\pi_{ref}(y_t)$", "frozen"),
              ("reward", "score of $y$", "frozen"), ("value", "$V_t$", "trained")]  # fmt: skip
    for i, (name, says, kind) in enumerate(models):
        x = 1 + 9.7 * i
        line(axes, [(x + 4.3, 12), (x + 4.3, 14)])
        box(axes, x, 14, 8.7, 5.4, f"{name}\n{says}", kind)
    for i in range(3):
        line(axes, [(5.3 + 9.7 * i, 19.4), (5.3 + 9.7 * i, 22.5)])
    box(axes, 1, 22.5, 28.1, 4.6, "rewards $r_t$: the price of KL,\nand at the last token the score")
    line(axes, [(15, 27.1), (15, 30)])
    line(axes, [(34.4, 19.4), (34.4, 30)])
    box(axes, 1, 30, 38, 4.4, "advantages $A_t$ (then whitened), returns $R_t$")
    for x, name in ((1, "policy loss: ratio, clip, $A_t$"), (20.5, "value loss: $V_t$ against $R_t$")):
        line(axes, [(x + 9.2, 34.4), (x + 9.2, 37)])
        box(axes, x, 37, 18.5, 4, name)
    line(axes, [(10.2, 41), (10.2, 43.2), (29.7, 43.2), (29.7, 41)], head=False, **DOWN)
    words(axes, 20, 45, "some passes over these answers move policy and value;", color=ORANGE)
    words(axes, 20, 47, "then new answers. Reference and reward stay.", color=ORANGE)
    alt = (
        "the policy samples answers to prompts. Of each, policy and reference give log-probabilities, the reward model a score, and the value "
        "V_t. The first three make rewards: the price of KL, and at the last token the score. Rewards and V_t make advantages and returns, "
        "and these the losses of policy and value, which some passes over the answers move; then come new answers."
    )
    return cut(axes, 49, "One update of PPO", alt)


def watched() -> Any:
    """A figure of a proxy and a gold: the policy is optimized for what a judge learned of the gold, which itself only watches."""
    axes = sheet()
    top = (("gold", "what is meant"), ("rater", "noisy choices"), ("judge", "the proxy"))
    for i, (name, what) in enumerate(top):
        box(axes, 1 + 13.5 * i, 6, 11, 5.4, f"{name}\n{what}", ("plain", "plain", "frozen")[i])
        if i:
            line(axes, [(13.5 * i - 1.5, 8.7), (1 + 13.5 * i, 8.7)])
    box(axes, 28, 17.5, 11, 4.6, "policy", "trained")
    box(axes, 1, 17.5, 11, 4.6, "answers")
    line(axes, [(31, 11.4), (31, 17.5)], **DOWN)
    words(axes, 30.4, 14.4, "reward: optimized", ha="right", color=ORANGE)
    line(axes, [(28, 19.8), (12, 19.8)])
    line(axes, [(6.5, 17.5), (6.5, 11.4)], ls="--")
    words(axes, 7.2, 14.4, "only watched", ha="left", color=GREY)
    line(axes, [(9, 22.1), (9, 24.5), (39.5, 24.5), (39.5, 8.7), (39, 8.7)], **DOWN)
    words(axes, 24, 25.9, "scored", color=ORANGE)
    alt = (
        "the gold is what is meant. A rater makes noisy choices by it, and the judge, the proxy, learns from them. The judge scores the "
        "policy's answers, and the policy is optimized for this reward. The gold sees the answers, too, but only watches."
    )
    return cut(axes, 27.5, "What is measured, and what is meant", alt)


def two_ways() -> Any:
    """A figure of DPO beside a reward model and PPO: from the same comparisons to a policy."""
    axes = sheet()
    box(axes, 10, 5.5, 20, 4, "comparisons: $y_w$ won, $y_l$ lost")
    line(axes, [(15, 9.5), (15, 11.2), (9.5, 11.2), (9.5, 13)])
    line(axes, [(25, 9.5), (25, 11.2), (30.5, 11.2), (30.5, 13)])
    box(axes, 1, 13, 17, 4.6, "reward model $r$", "trained")
    line(axes, [(9.5, 17.6), (9.5, 20)])
    box(axes, 1, 20, 17, 4.6, "answers, sampled and\nscored, again and again")
    line(axes, [(9.5, 24.6), (9.5, 27)])
    box(axes, 1, 27, 17, 4.6, "policy $\\pi$", "trained")
    box(axes, 22, 13, 17, 4.6, "reference: $\\log\\pi_{ref}$\nof $y_w$ and $y_l$, once", "frozen")
    line(axes, [(30.5, 17.6), (30.5, 27)])
    words(axes, 31.2, 22.4, "one loss", ha="left", color=GREY)
    box(axes, 22, 27, 17, 4.6, "policy $\\pi$", "trained")
    words(axes, 9.5, 33.5, "PPO", fontweight="bold")
    words(axes, 30.5, 33.5, "DPO", fontweight="bold")
    alt = (
        "comparisons of a winning and a losing answer go two ways. PPO: they train a reward model; answers are sampled and scored by it, "
        "again and again; these train the policy. DPO: the frozen reference gives both answers' log-probabilities, once; one loss trains the policy."
    )
    return cut(axes, 35.5, "Two ways from comparisons to a policy", alt)
