"""Learning from human feedback as one chain on one model, and what PPO does along it.

    base ─► SFT ─► reward model ─► PPO            each stage starts from the weights of the stage before it
              └──────────────────────┘            and the SFT model is PPO's reference

    prompt         the first four words of a verse of the Bible in Basic English: "And the servant came"
    demonstration  the rest of such a verse, if it is one short sentence
    comparison     two answers of the SFT model to one prompt, of which a rater prefers one; a judge is a reward model
                   that learns from a number of comparisons
    gold           what the rater goes by and a person would say (`kindness`); it trains nothing: judges stand between

A seed draws the demonstrations, the prompts of the comparisons, the answers, the rater's noise, the judge's head, and the
order of all batches. Reports are on prompts with which no verse begins that a stage has learned from, nor one of the
Basic English Bible that the base has learned (a few begin verses of the King James Bible, which it has, too). The
temperature is 0.7 in sampling and in every log-probability.

Source of the design: Gao, Schulman and Hilton 2022, Scaling Laws for Reward Model Overoptimization (arXiv:2210.10760):
judges that learn from a gold reward's labels, PPO and best of n against each of them, and the gold over sqrt(KL).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from .. import rlhf
from ..autograd.tensor import no_grad
from ..backend import to_numpy
from ..evaluation.intervals import mean
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..peft import LoraConfig, get_peft_model
from ..rlhf.baseline import best_of_n_kl
from ..text.examples import Example, PreferencePair, example_of
from ..train import Trainer, TrainingArguments
from .kindness import form, gold, sentences
from .protocol import version

SEEDS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)  # 6 has selected rates: `chain_tuning`
SIZES = ("head", "lora", "full")  # what of a reward model is trained
COMPARISONS = (100, 600, 2000)
BETAS = (0.0, 0.05, 0.2)
CHARACTERS = 90  # of a demonstration's verse, at most
DEMONSTRATIONS, HELD_OUT, BEST_OF, SHOWN = 1000, 512, 16, 4
LENGTH, TEMPERATURE, NOISE = 24, 0.7, 0.05  # tokens of an answer, at most; of sampling; of the rater
UPDATES, CHECKS = 32, (8, 16, 32)  # of PPO; after which of them a free policy is measured on held-out prompts
RATES = {"sft": 1e-3, "ppo": 2e-4, "dpo": 4e-4}  # held against others in `chain_tuning`, as the judges'
JUDGE_RATES = {  # by what is trained and on how many comparisons
    ("head", 600): 0.32, ("lora", 600): 8e-3, ("full", 600): 1e-3,
    ("full", 100): 4e-3, ("full", 2000): 1e-3,
}  # fmt: skip

# One thing that is done otherwise. Options of PPO, or what `Broken` does
BROKEN: dict[str, dict[str, Any]] = {
    "ten times the rate": {"learning_rate": 10 * RATES["ppo"]},
    "no clipping": {"cliprange": 1e6, "cliprange_value": 1e6},
    "ten times the reward": {},
    "no price of a missing end": {"missing_eos_penalty": None},
    "returns from whitened advantages": {},
    "sampled at another temperature": {},
}
PUSHES = [("sft", "ten times the rate"), *(("ppo", what) for what in BROKEN)]


@dataclass(frozen=True)
class Chain:
    """What a row is the result of.

    stage        "base", "sft"; "chosen": the SFT model, trained further on the preferred answers; "dpo": on both answers of
                 the comparisons; "best": the best of BEST_OF answers of the SFT model by the judge; "ppo"
    judge        what of the reward model was trained, one of SIZES, on this number of comparisons
    beta         the price of KL
    broken       of PPO, one of BROKEN; of SFT, "ten times the rate"
    """

    seed: int
    stage: str
    judge: str = SIZES[-1]
    comparisons: int = COMPARISONS[-1]
    beta: float = 0.05
    broken: str = ""
    base: str = ""  # of which base, see `version`


JUDGES = [*((size, COMPARISONS[1]) for size in SIZES), *((SIZES[-1], n) for n in (COMPARISONS[0], COMPARISONS[2]))]


def of_seed(seed: int) -> list[Chain]:
    """All runs of a seed."""
    made = partial(Chain, seed, base=version())
    return [
        *map(made, ("base", "sft", "chosen", "dpo")),
        *(made("best", *judge) for judge in JUDGES),
        *(made("ppo", *judge, beta=0.0) for judge in JUDGES),
        *(made("ppo", beta=beta) for beta in BETAS[1:]),
        *(made(stage, broken=what) for stage, what in PUSHES),
    ]  # fmt: skip


def runs() -> list[Chain]:
    """All runs, seed by seed."""
    return [run for seed in SEEDS for run in of_seed(seed)]


def encoded(prompts: Sequence[str]) -> list[list[int]]:
    return [base()[1].encode(prompt) for prompt in prompts]


@cache
def unseen() -> list[str]:
    """All prompts with which no training verse begins, in an order that is drawn once."""
    every = [prompt for prompt in sentences("validation") | sentences("test") if prompt not in sentences("train")]
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


@cache
def held_out() -> list[list[int]]:
    """The prompts of all reports, as token ids: the first unseen ones. (The others select rates: `chain_tuning`.)"""
    return encoded(unseen()[:HELD_OUT])


@cache
def asked() -> list[list[int]]:
    """The prompts that stages learn with, as token ids: of the training verses."""
    return encoded([*sentences("train")])


def texts_of(roll: rlhf.Rollout) -> tuple[list[str], list[str], np.ndarray]:
    """(prompts, answers, whether they ended) of a rollout."""
    decode = partial(base()[1].decode, skip_special_tokens=True)
    return [*map(decode, roll.prompts())], [*map(decode, roll.responses())], to_numpy(roll.ended)


def scored(prompts: Sequence[Sequence[int]], answers: Sequence[Any]) -> np.ndarray:
    """The gold of k answers to each of n prompts, token ids all: [n, k]."""
    stop, decode = base()[1].eos_token_id, partial(base()[1].decode, skip_special_tokens=True)
    each = zip(map(decode, prompts), answers)
    return np.array([gold([p] * len(own), [*map(decode, own)], [a[-1] == stop for a in own]) for p, own in each])


def demonstrations(seed: int) -> list[Example]:
    """DEMONSTRATIONS of the training verses."""
    every = [*suited(sentences("train")).items()]
    drawn = np.random.default_rng([seed, 0]).permutation(len(every))[:DEMONSTRATIONS]
    return demonstrated(dict(every[i] for i in drawn))


def suited(verses: Mapping[str, str]) -> dict[str, str]:
    """Those of {prompt: verse} that are short and one sentence."""
    return {prompt: v for prompt, v in verses.items() if len(v) <= CHARACTERS and re.fullmatch(r"[^.!?]+\.", v)}


def demonstrated(verses: Mapping[str, str]) -> list[Example]:
    """Those of {prompt: verse} that are suited, each with an end-of-text token; the answers are learned."""
    short = suited(verses)
    answers = encoded([verse.removeprefix(prompt) for prompt, verse in short.items()])
    return [example_of(p, [*a, base()[1].eos_token_id]) for p, a in zip(encoded([*short]), answers)]


# ----------------------------------------------------------------------------------------------------------- the stages


def arguments(rate: float, epochs: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        learning_rate=rate, num_train_epochs=epochs, per_device_train_batch_size=16, warmup_ratio=0.1, seed=seed,
        progress=False,
    )  # fmt: skip


def fitted(model: Any, examples: Sequence[Any], rate: float, epochs: float, seed: int, **options: Any) -> Any:
    """The model, trained in place."""
    Trainer(model, examples, args=arguments(rate, epochs, seed), pad_token_id=base()[1].pad_token_id, **options).train()
    return model


@cache
def sft(seed: int, faster: float = 1) -> Any:
    """Stage 1: the base, trained on demonstrations."""
    return fitted(base()[0].copy(), demonstrations(seed), faster * RATES["sft"], 2, seed)


def chosen(seed: int, faster: float = 1) -> Any:
    """The SFT model, trained further on the answers that the rater preferred."""
    prompts, answers, order = comparisons(seed)
    preferred = [example_of(p, own[first]) for p, own, first in zip(prompts, answers, order[:, 0])]
    return fitted(sft(seed).copy(), preferred, faster * RATES["sft"], 1, seed)


def dpo(seed: int, faster: float = 1) -> Any:
    """The SFT model, trained further on the comparisons by DPO with its paper's β, 0.1 (its log-probabilities have no
    temperature). It is its reference."""
    pairs = [PreferencePair(*(example_of(p, [*own[i]]) for i in order)) for p, own, order in zip(*comparisons(seed))]
    policy = sft(seed).copy()
    rlhf.dpo_trainer(policy, pairs, args=arguments(faster * RATES["dpo"], 1, seed)).train()
    return policy


FURTHER = {"chosen": chosen, "dpo": dpo}  # what trains the SFT model further without a judge


def sampled(seed: int, prompts: Sequence[Sequence[int]], k: int, stream: int) -> list[Any]:
    """k answers of the SFT model to each prompt."""
    stop = (base()[1].eos_token_id,)
    return rlhf.sample_answers(sft(seed), prompts, k, LENGTH, TEMPERATURE, stop, stream, batch_size=256)


@cache
def comparisons(seed: int) -> tuple[list[list[int]], list[Any], np.ndarray]:
    """(prompts, two answers of the SFT model to each, the rater's order [n, 2]); fewer comparisons are the first of them."""
    every, n = asked(), max(COMPARISONS)
    prompts = [every[i] for i in np.random.default_rng([seed, 1]).permutation(len(every))[:n]]
    answers = sampled(seed, prompts, 2, seed)
    return prompts, answers, rlhf.rank(scored(prompts, answers), np.random.default_rng([seed, 2]), temperature=NOISE)


@cache
def judge(seed: int, size: str, n: int) -> rlhf.RewardModel:
    """Stage 2: a reward model of n comparisons, in the rater's order."""
    return fit_judge(seed, size, comparisons(seed)[2][:n])


def fit_judge(seed: int, size: str, order: np.ndarray, faster: float = 1) -> rlhf.RewardModel:
    """A reward model that starts from the SFT model and learns an order, best first, of each of the first comparisons, [n, 2];
    of the SFT model's answers, its rewards have mean 0 and variance 1."""
    ranked = rlhf.rankings(*(part[: len(order)] for part in comparisons(seed)[:2]), order)
    texts = [text for ranking in ranked for text in ranking.texts][:512]
    model = rlhf.RewardModel(sft(seed), seed=seed)
    model.calibrate(texts)
    trained: Any = model
    if size == "head":
        model.backbone.requires_grad_(False)
    elif size == "lora":
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["score"])
        trained = get_peft_model(model, config, seed=seed)
    fitted(trained, ranked, faster * JUDGE_RATES[size, len(order)], 1, seed, loss=rlhf.RewardModel.loss, collate=rlhf.collate_rankings)
    model = trained.merge_and_unload() if size == "lora" else model
    model.calibrate(texts)
    return model


class Broken(rlhf.PPOTrainer):
    """PPO with one thing done otherwise."""

    broken = ""

    def rollout(self, group: int = 1) -> rlhf.Rollout:
        """The answers; log-probabilities have the config's temperature, whatever that of sampling is."""
        right = self.config.temperature
        if self.broken == "sampled at another temperature":
            self.config.temperature = 1.0
        roll = super().rollout(group)
        self.config.temperature = right
        return roll

    def epochs(self, batch: dict[str, Any]) -> dict[str, float]:
        """The passes; R = A + V with A as it is in the loss, whitened, is the bug."""
        if self.broken == "returns from whitened advantages":
            batch["returns"] = batch["advantages"] + batch["old_values"]
        return super().epochs(batch)


COLUMNS = {
    "proxy": "objective/raw_scores", "gold": "watch/gold", "kl": "objective/kl", "approxkl": "policy/approxkl",
    "clipfrac": "policy/clipfrac", "entropy": "policy/entropy", "value_loss": "loss/value", "ratio_max": "val/ratio_max",
    "grad_norm": "grad_norm", "distinct_2": "text/distinct_2", "length": "text/length",
}  # fmt: skip


def ppo(settings: Chain, check: Callable[[Any], Row]) -> tuple[Any, Row]:
    """(the policy, {"history": statistics by update, "checks": {update: what `check` found}, "stopped"}): stage 3.

    "stopped" is the error of a run that could not go on, and None otherwise. Without a price of KL all CHECKS are made,
    otherwise the last."""
    return optimized(settings, judge(settings.seed, settings.judge, settings.comparisons), check)


def optimized(settings: Chain, model: rlhf.RewardModel, check: Callable[[Any], Row], faster: float = 1) -> tuple[Any, Row]:
    """The same, by any reward model."""
    s, reward = settings, rlhf.learned_reward(model)
    options = {"learning_rate": faster * RATES["ppo"], "missing_eos_penalty": 1.0} | BROKEN.get(s.broken, {})
    config = rlhf.PPOConfig(
        steps=UPDATES, batch_size=32, mini_batch_size=16, num_epochs=2, response_length=LENGTH, temperature=TEMPERATURE,
        kl_coef=s.beta, max_kl=1e9, lr_scheduler_type="constant", seed=s.seed, progress=False, **options,
    )  # fmt: skip
    scale, policy = 10.0 if s.broken == "ten times the reward" else 1.0, sft(s.seed).copy()
    trainer = Broken(
        policy, lambda roll: scale * reward(roll), asked(), config,
        watch={"gold": lambda roll: gold(*texts_of(roll))},
    )  # fmt: skip
    trainer.broken, checks, stopped = s.broken, {}, None
    try:
        for _ in range(UPDATES):
            trainer.step()
            if trainer.updates in (CHECKS if s.beta == 0 else CHECKS[-1:]):
                checks[str(trainer.updates)] = check(policy)
    except (rlhf.RLHFError, FloatingPointError) as error:
        stopped = str(error)
    history = {name: [record[key] for record in trainer.history] for name, key in COLUMNS.items()}
    return policy, {"history": history, "checks": checks, "stopped": stopped}


# ----------------------------------------------------------------------------------------------------------- the reports


def report(policy: Any, seed: int, reward: rlhf.RewardModel, prompts: Sequence[Sequence[int]] = ()) -> Row:
    """Of a policy's answers to n prompts, the held-out ones.

    gold, kl, proxy           [n]: the gold; log π(y) - log π_SFT(y), nats an answer; the judge's reward
    kind, form, ended         means of the gold's parts (`kindness`): VADER in [-1, 1], and shares
    distinct_2, length        distinct pairs of tokens in all answers; tokens of an answer
    samples                   the first SHOWN prompts, each with its answer
    """
    parts, answers, samples, prompts = [], [], [], prompts or held_out()
    with no_grad():
        for i in range(0, len(prompts), 128):
            stream = rlhf.rollouts.Rng(10_000 + seed, first_row=i)
            roll = rlhf.rollout(policy, prompts[i : i + 128], LENGTH, TEMPERATURE, (base()[1].eos_token_id,), stream)
            given = roll.input_ids, roll.attention_mask, LENGTH, TEMPERATURE
            ratio = rlhf.response_logprobs(policy, *given).data - rlhf.response_logprobs(sft(seed), *given).data
            begun, texts, ended = texts_of(roll)
            kind = rlhf.vader([prompt + text for prompt, text in zip(begun, texts)])
            kl, shares = to_numpy((ratio * roll.mask).sum(axis=1)), [*map(form, begun, texts)]
            parts.append([gold(begun, texts, ended), kl, to_numpy(reward.rewards(*given[:2]).data), kind, shares, ended])
            answers += roll.responses()
            samples += map("".join, zip(begun, texts))
    columns = dict(zip(("gold", "kl", "proxy", "kind", "form", "ended"), np.concatenate(parts, axis=1, dtype=float)))
    items = {name: columns[name].round(3).tolist() for name in ("gold", "kl", "proxy")}
    means = {name: float(columns[name].mean()) for name in ("kind", "form", "ended")}
    variety = {"distinct_2": rlhf.distinct_n(answers), "length": float(np.mean([*map(len, answers)]))}
    return items | means | variety | {"samples": samples[:SHOWN]}


@cache
def drawn(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(texts, gold [HELD_OUT, BEST_OF]) of BEST_OF answers of the SFT model to each held-out prompt."""
    answers = sampled(seed, held_out(), BEST_OF, 20_000 + seed)
    return [np.array([*p, *a]) for p, own in zip(held_out(), answers) for a in own], scored(held_out(), answers)


def best(seed: int, size: str, n: int) -> Row:
    """What a judge of n comparisons chooses, as `best_by`."""
    return best_by(judge(seed, size, n), seed)


def best_by(model: rlhf.RewardModel, seed: int) -> Row:
    """Best of n by a reward model, and how good it is.

    accuracy     [value, low, high] the share of pairs of answers to a prompt that it orders as the gold does, over prompts
    best_of      for n = 1, 2, 4, ...: {n: {"kl", at most; "proxy"; "gold", means}}
    gold, proxy  [HELD_OUT] of the best of all
    samples      these, of the first SHOWN prompts
    """
    texts, truth = drawn(seed)
    scores = model.score_texts(texts, 256).reshape(truth.shape)
    i, j = np.triu_indices(BEST_OF, 1)
    wins, differ = (scores[:, i] - scores[:, j]) * (truth[:, i] - truth[:, j]) > 0, truth[:, i] != truth[:, j]
    some, found, of_n = differ.any(axis=1), {}, 1
    while of_n <= BEST_OF:
        groups, values = (x.reshape(HELD_OUT, -1, of_n) for x in (scores, truth))
        values = np.take_along_axis(values, groups.argmax(axis=2)[..., None], axis=2)[..., 0]
        found[str(of_n)] = {"kl": float(best_of_n_kl(of_n)), "proxy": float(groups.max(axis=2).mean()), "gold": float(values.mean())}
        of_n *= 2
    return {
        "accuracy": list(mean((wins & differ).sum(axis=1)[some], differ.sum(axis=1)[some])), "best_of": found,
        "gold": values[:, 0].round(3).tolist(), "proxy": scores.max(axis=1).round(3).tolist(),
        "samples": [base()[1].decode(texts[k], skip_special_tokens=True) for k in scores[:SHOWN].argmax(axis=1) + BEST_OF * np.arange(SHOWN)],
    }  # fmt: skip


@np.errstate(all="ignore")  # of what breaks
def run(settings: Chain) -> Row:
    """The row of a run: what `report` gives of its policy, and beside it what `ppo` gives; or what `best` gives."""
    s = settings
    if s.stage == "best":
        return rounded(best(s.seed, s.judge, s.comparisons))
    check = partial(report, seed=s.seed, reward=judge(s.seed, s.judge, s.comparisons))
    if s.stage == "ppo":
        return rounded(ppo(s, check)[1])
    return rounded(check(policy_of(s)))


def policy_of(settings: Chain) -> Any:
    """The policy of a stage."""
    s = settings
    if s.stage == "base":
        return base()[0]
    if s.stage == "sft":
        return sft(s.seed, 10) if s.broken else sft(s.seed)
    if s.stage in FURTHER:
        return FURTHER[s.stage](s.seed)
    return ppo(s, lambda policy: {})[0]
