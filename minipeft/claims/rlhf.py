"""Reinforcement learning from human feedback: its stages, its two equations, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting.flops import step_flops
from ..accounting.memory import memory_ledger
from ..accounting.ppo import ppo_ledger
from ..autograd.tensor import no_grad
from ..backend import asarray, to_numpy, xp_of
from ..evaluation.intervals import share
from ..rlhf.advantages import shaped_rewards
from ..rlhf.config import PPOConfig
from ..rlhf.gold import rank
from ..rlhf.logprobs import sequence_logprobs
from ..rlhf.ppo import PPOTrainer, policy_loss
from ..rlhf.reward import Ranking as Ranked
from ..rlhf.reward import RewardModel, collate_rankings, reward_loss
from ..train import collate
from .inputs import BASE, SIZES, arrays, base, examples, moved, steps
from .register import Number, Verdict, as_number, claim, graded, listed, measured, those


@claim("rlhf-1", lesson="10_ppo.py", section="6 · The loss: no incentive beyond twenty percent")
def preference() -> Verdict:
    """Holds if, of pairs of texts, one step on PPO's loss moves log p(a) - log p(b) up where a is preferred and down where b
    is, clearly over pairs, while a step on the likelihood of both is the same for either preference; holds if one direction
    alone is so; does not hold here otherwise."""
    found = list(examples())
    ups, downs, same = [], [], []
    for one, other in zip(found[::2], found[1::2]):
        given = collate([one, other]).arguments
        ids, labels, mask = given["input_ids"], given["labels"], given["attention_mask"]
        change = {}
        for objective in ("a", "b", "likelihood"):
            model = base()[0].copy().requires_grad_(True)
            with no_grad():
                old = to_numpy(sequence_logprobs(model, ids, labels, mask).data)

            def loss(model: Any, objective: str = objective, old: np.ndarray = old, given: tuple = (ids, labels, mask)) -> Any:
                if objective == "likelihood":  # both texts are data: which is preferred does not enter
                    return model.loss(given[0], given[1], attention_mask=given[2])
                new = sequence_logprobs(model, *given).reshape(-1, 1)
                advantages = np.array([[1.0], [-1.0]], np.float32) * (1 if objective == "a" else -1)
                xp = xp_of(new.data)
                return policy_loss(new, asarray(old[:, None], xp), asarray(advantages, xp), xp.ones((2, 1)))

            steps(model, 1, lr=1e-4, loss=loss)
            with no_grad():
                new = to_numpy(sequence_logprobs(model, ids, labels, mask).data)
            change[objective] = float((new - old)[0] - (new - old)[1])
        ups.append(change["a"])
        downs.append(change["b"])
        same.append(change["likelihood"])
    up, down, neither = (
        measured(f"change of log p(a) - log p(b), {title}", values, "nats")
        for title, values in (("a preferred", ups), ("b preferred", downs), ("likelihood of both", same))
    )
    cases = {"a is preferred": up.low > 0, "b is preferred": down.high < 0}
    return Verdict(
        graded(cases),
        f"One step, with A = 1 for the preferred text and -1 for the other, moves log p(a) - log p(b) by {up.value:+.2f} nats where a "
        f"is preferred and by {down.value:+.2f} where b is; a step on the likelihood of both moves it by {neither.value:+.2f}.",
        up, [up, down, neither], items=len(ups), base=BASE, task="pairs of sentences, one step at rate 1e-4",
    )  # fmt: skip


@claim("rlhf-2", lesson="10_ppo.py", section="8 · One chain on one model")
def chain() -> Verdict:
    """Holds if three stages run in a chain: SFT lowers the loss; the reward model, which starts from the SFT model, ranks its pairs
    better after training; PPO starts from the SFT model, which is its reference, and moves from it; does not hold here if a link is
    missing. (On the shipped base; not tried on a larger model.)
    """
    tuned = base()[0].copy().requires_grad_(True)
    losses = steps(tuned, 3)
    judge = RewardModel(tuned).requires_grad_(True)
    shared = max(moved(_backbone(arrays(tuned)), _backbone(arrays(judge))).values())
    found = [e.input_ids for e in examples()]
    pairs = [Ranked([a, b[::-1].copy()]) for a, b in zip(found, found)]  # a sentence before its tokens in reverse order
    given = collate_rankings(pairs).arguments
    ranked = steps(judge, 3, loss=lambda m: m.loss(**given))
    prompts = [ids[:4].tolist() for ids in found]
    config = PPOConfig(
        steps=1, batch_size=8, mini_batch_size=8, num_epochs=1, response_length=8, missing_eos_score=None, progress=False
    )
    trainer = PPOTrainer(tuned.copy(), judge.requires_grad_(False), prompts, config)
    sft = arrays(tuned)
    links = {
        "SFT learns": losses[-1] < losses[0],
        "the reward model starts from it": shared == 0,
        "the reward model learns": ranked[-1] < ranked[0],
        "PPO starts from it": max(moved(sft, arrays(trainer.policy)).values()) == 0,
        "the reference is it": max(moved(sft, arrays(trainer.reference)).values()) == 0,
    }
    record = trainer.step()
    share_moved = moved(sft, arrays(trainer.policy))
    links["PPO moves the policy, not the reference"] = (
        max(share_moved.values()) > 0 and max(moved(sft, arrays(trainer.reference)).values()) == 0
    )
    whole = all(links.values())
    missing = f"; missing: {those(links, False)}" if not whole else ""
    return Verdict(
        graded({"": whole}),
        f"{sum(links.values())} of {len(links)} links are there{missing}. In a chain of {len(found)} sentences and 3 steps a stage SFT's loss "
        f"on them falls by {losses[0] - losses[-1]:.2f} nats, the reward model's by {ranked[0] - ranked[-1]:.2f}, and an update of PPO "
        "moves the policy away from its reference, the SFT model.",
        Number("links of the chain that are there", sum(links.values()), f"of {len(links)}"),
        [
            Number("fall of SFT's loss in 3 steps", losses[0] - losses[-1], "nats"),
            Number("fall of the reward model's in 3 steps", ranked[0] - ranked[-1], "nats"),
            Number("mean score of the answers", record["objective/scores"]),
            Number("loss of PPO's policy", record["loss/policy"]),
        ],
        base=BASE,
        task="8 sentences, 3 steps a stage, one update",
    )


def _backbone(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x for name, x in found.items() if name.startswith("model.")}


@claim("rlhf-3", lesson="09_reward_model.py", section="2 · A rater")
def bradley_terry() -> Verdict:
    """Holds if the reward model's loss is -log sigmoid(r1 - r2), to 1e-6, and a rater with Gumbel noise prefers the first text
    as often as sigmoid(r1 - r2) says, in each of five differences (within a 99 % interval of the draws); holds if one is so;
    does not hold here otherwise."""
    differences, draws = (-2.0, -0.5, 0.0, 1.0, 3.0), 20_000
    loss = [float(reward_loss(np.array([d]), np.array([0.0])).item()) for d in differences]
    probability = [1 / (1 + math.exp(-d)) for d in differences]
    error = max(abs(x + math.log(p)) for x, p in zip(loss, probability))
    evidence, inside = [], []
    for d, p in zip(differences, probability):
        first = rank(np.tile([[d, 0.0]], (draws, 1)), np.random.default_rng(0), temperature=1.0)[:, 0] == 0
        seen = share(first)
        inside.append(abs(seen.value - p) < 2.576 * math.sqrt(p * (1 - p) / draws))
        evidence += [
            as_number(f"r1 - r2 = {d:g}: the first is preferred", seen, "share"),
            Number(f"r1 - r2 = {d:g}: sigmoid", p, "share"),
        ]
    cases = {"the loss": error < 1e-6, "the rater": all(inside)}
    return Verdict(
        graded(cases),
        f"The loss is -log sigmoid(r1 - r2) to {error:.0e}, and of {draws:,} choices of a rater with Gumbel noise the share "
        f"is the sigmoid's for {sum(inside)} of {len(inside)} differences; whether people choose so is another question.",
        Number("largest difference of the loss from -log sigmoid", error, "nats"),
        evidence,
        items=draws,
        task="a rater's draws, rlhf.rank",
    )


@claim("rlhf-4", lesson="10_ppo.py", section="4 · Rewards: a price for leaving, and the score at the end")
def objective() -> Verdict:
    """Holds if, over all answers of two tokens, the expected sum of the library's rewards is E[r] - beta KL(pi || ref), for
    each beta, its maximum is at pi ~ ref exp(r / beta), and the reference of PPO is the model that it starts from; holds if
    some of these are so; does not hold here otherwise."""
    rng, V = np.random.default_rng(0), 4
    r = rng.standard_normal(V * V)
    ref, pi = (_tokens(rng, V) for _ in range(2))
    gaps, best = [], True
    for beta in (0.05, 0.2, 1.0):
        rewards = shaped_rewards(pi.T, ref.T, r, np.ones((V * V, 2)), beta)
        p, q = np.exp(pi.sum(0)), np.exp(ref.sum(0))
        both = float((p * rewards.sum(1)).sum()), float((p * r).sum() - beta * (p * np.log(p / q)).sum())
        gaps.append(abs(both[0] - both[1]))
        tilted = q * np.exp(r / beta)
        tilted /= tilted.sum()

        def value(p: np.ndarray, q: np.ndarray = q, beta: float = beta) -> float:
            return float((p * r).sum() - beta * (p * np.log(p / q)).sum())

        others = [value(0.9 * tilted + 0.1 * rng.dirichlet(np.ones(V * V))) for _ in range(50)]
        best &= value(tilted) > max(others)
    model = base()[0]
    config = PPOConfig(steps=1, batch_size=8, mini_batch_size=8, missing_eos_score=None, progress=False)
    trainer = PPOTrainer(model.copy().requires_grad_(True), lambda roll: np.zeros(8), [[5, 6]], config)
    own = max(moved(arrays(model), arrays(trainer.reference)).values()) == 0
    cases = {"the objective": max(gaps) < 1e-6, "its maximum": best, "the reference": own}
    return Verdict(
        graded(cases),
        f"Over all {V * V} answers of two tokens the expected rewards are E[r] - beta KL to {max(gaps):.0e} for three betas, "
        "no policy near ref exp(r / beta) is better, and PPO's reference is the model that it starts from: this is so "
        f"of {those(cases)}.",
        Number("largest difference of the two sides", max(gaps)),
        items=V * V,
        base=BASE,
        task="beta 0.05, 0.2 and 1",
    )


def _tokens(rng: np.random.Generator, V: int) -> np.ndarray:
    """log-probabilities [2, V V] of both tokens of each answer of two tokens, of a random policy."""
    first = np.log(rng.dirichlet(np.ones(V)))
    second = np.log(rng.dirichlet(np.ones(V), size=V))
    return np.stack([np.repeat(first, V), second.reshape(-1)])


LABELS = 33_207  # prompts whose answers were ranked for the reward model (Ouyang et al. 2022, table 6)
PROMPT, RESPONSE, EPOCHS = 256, 256, 4


@claim("rlhf-6", lesson="12_counting.py", section="7 · Time")
def expensive() -> Verdict:
    """Holds if, at 7B, full and with LoRA, PPO needs more than twice the memory of SFT and more than twice its FLOPs for the
    same texts, beside labels that SFT does not need; holds if in some of these; does not hold here if in none."""
    cases, evidence, ratios, once = {}, [], {}, []
    name, rows, length = SIZES["7B"], 8, PROMPT + RESPONSE
    for title, config in (("full", None), ("LoRA", mp.LoraConfig(r=8, target_modules="all-linear"))):
        how = {"precision": "bfloat16", "checkpointing": True}
        sft = memory_ledger(name, config, rows, length, **how)
        ppo = ppo_ledger(name, config, rows, PROMPT, RESPONSE, mini_batch=rows, **how)
        step = step_flops(name, config, rows, length)
        # sampling and the passes of policy, reference and reward model cost a forward pass each, every epoch a step
        update = 4 * step.forward + EPOCHS * step.total
        ratios[f"memory, {title}"], ratios[f"FLOPs, {title}"] = ppo.total / sft.total, update / step.total
        once.append(f"{(4 * step.forward + step.total) / step.total:.1f}")
        evidence += [
            Number(f"{title}: SFT's step", sft.total, "bytes"),
            Number(f"{title}: PPO's update", ppo.total, "bytes"),
            Number(f"{title}: SFT's step", step.total, "FLOPs"),
            Number(f"{title}: PPO's update of the same texts", update, "FLOPs"),
        ]
    cases = {case: ratio > 2 for case, ratio in ratios.items()}
    told = [f"{ratio:.1f} times ({case})" for case, ratio in ratios.items()]
    return Verdict(
        graded(cases),
        f"PPO of {EPOCHS} epochs, with policy, reference and reward model in memory and a value head on the policy, takes "
        f"{listed(told)} what SFT does at 7B: more than twice for {those(cases)} (with one epoch {listed(once)}). SFT is one stage; PPO is the last of three, and InstructGPT's judge needed {LABELS:,} ranked prompts.",
        Number("7B, LoRA: PPO's FLOPs over SFT's, for the same texts", ratios["FLOPs, LoRA"], "times"),
        [
            *evidence,
            Number("ranked prompts of InstructGPT's reward model (table 6)", LABELS),
            Number("models in memory: policy, reference, reward, value head", 4),
        ],
        base="LLaMA-7B, as shapes",
        task=f"{rows} x ({PROMPT} + {RESPONSE}) tokens, bfloat16, blocks computed again, {EPOCHS} epochs",
    )
