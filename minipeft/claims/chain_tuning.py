"""The rates of `chain`, held against others: each stage on its own, on what the stages before it have made at their rates.

    stage      its loss, on what no stage has learned from and no report asks
    sft        nats a token of demonstrations
    judge      the share of pairs of answers to a prompt that it orders otherwise than the rater. (Its loss in training
               depends on the scale of the rewards, which is calibrated afterwards.)
    chosen     1 - gold of its answers: SFT further, on the preferred answers
    dpo        1 - gold of its answers: SFT further, on the comparisons
    ppo        1 - gold of its answers, at the best judge and beta 0.05

Each is tuned as everything here (`mechanisms.best_rate`): from its rate in `chain` by factors of 2 to the better neighbor,
until none is better by LEAST, under the seed TUNING, which no report has. Whether a difference is more than luck: its
interval over the items, and the same two rates under one more seed, AGAIN.

Why the gold selects the policies. The judge's reward cannot: PPO exploits it, and the gold may fall while it rises, which is
what Gao et al. 2022 (arXiv:2210.10760) measure. Nor can what PPO makes large, reward less beta KL: the judge's word again.
A practitioner asks raters about answers to prompts that are kept for this, and so it is done here, for PPO and for what it
is compared with. The row has the reward and the KL, too: what they would have chosen. SFT is held by its own loss, the
demonstrations' alone; its gold stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import rlhf
from ..evaluation.intervals import Estimate, mean
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..text.examples import Example
from ..train import TrainingDiverged
from ..train.evaluation import example_losses
from . import chain
from .kindness import sentences
from .mechanisms import ByItem, best_rate
from .protocol import TUNING, version
from .register import listed

AGAIN = 6  # a second seed, which no report has
SELECTING, ANSWERS = 924, 4  # prompts, all that no report asks; answers to each that judges put in order
LEAST = {"sft": 0.002, "judge": 0.01, "chosen": 0.01, "dpo": 0.01, "ppo": 0.01}  # a rate that is better by less is not better
KNOWN = ("gold", "kl", "proxy", "ended")  # of a policy


@dataclass(frozen=True)
class Stage:
    """A row: a stage of the chain; of a judge also what is trained, on how many comparisons."""

    stage: str
    judge: str = ""
    comparisons: int = 0
    base: str = field(default_factory=version)

    @property
    def rate(self) -> float:
        """The one that `chain` has."""
        if self.judge:
            return chain.JUDGE_RATES[self.judge, self.comparisons]
        return chain.RATES[{"chosen": "sft"}.get(self.stage, self.stage)]

    @property
    def name(self) -> str:
        names = {"sft": "SFT", "chosen": "SFT on the preferred answers", "dpo": "DPO", "ppo": "PPO"}
        return names.get(self.stage) or f"the judge {self.judge}, {self.comparisons:,}"


def runs() -> list[Stage]:
    """All stages."""
    return [*map(Stage, ("sft", "ppo", "chosen", "dpo")), *(Stage("judge", *one) for one in chain.JUDGE_RATES)]


class Measured(NamedTuple):
    """What is to be small, item by item [n], the items' weights [n], and what else is known, by name."""

    totals: np.ndarray
    weights: np.ndarray
    known: Row

    @property
    def loss(self) -> float:
        return float(self.totals.sum() / self.weights.sum())

    def below(self, other: Measured) -> list[float | None]:
        """By how much its loss is lower than another's: [value, low, high], over the items."""
        return list(mean(other.totals - self.totals, self.weights))


# ---------------------------------------------------------------------------------------------------- what selects


@cache
def prompts() -> list[list[int]]:
    """Unseen ones, none of which is asked in a report."""
    return chain.encoded(chain.unseen()[chain.HELD_OUT :][:SELECTING])


@cache
def demonstrations() -> list[Example]:
    """The verses of these prompts, as far as they are such as SFT learns."""
    every, own = sentences("validation") | sentences("test"), chain.unseen()[chain.HELD_OUT :][:SELECTING]
    return chain.demonstrated({prompt: every[prompt] for prompt in own})


@cache
def ordered(seed: int) -> list[np.ndarray]:
    """ANSWERS of the SFT model to each prompt, behind it, in the rater's order, best first: the texts of all prompts."""
    answers = chain.sampled(seed, prompts(), ANSWERS, 30_000 + seed)
    order = rlhf.rank(chain.scored(prompts(), answers), np.random.default_rng([seed, 4]), temperature=chain.NOISE)
    return [text for ranking in rlhf.rankings(prompts(), answers, order) for text in ranking.texts]


def measured(s: Stage, seed: int, faster: float) -> Measured | None:
    """A stage under a seed, at `faster` times the rate that `chain` has; None where it diverged."""
    try:
        if s.stage == "judge":
            return of_judge(chain.fit_judge(seed, s.judge, chain.comparisons(seed)[2][: s.comparisons], faster), seed)
        if s.stage == "ppo":
            policy, row = chain.optimized(chain.Chain(seed, "ppo"), chain.judge(seed, *best()), lambda policy: {}, faster)
            return None if row["stopped"] else of_policy(policy, seed)
        if s.stage in chain.FURTHER:
            return of_policy(chain.FURTHER[s.stage](seed, faster), seed)
        policy = chain.sft(seed, faster)
        totals, weights = example_losses(policy, demonstrations(), 32, base()[1].pad_token_id)
        return Measured(totals, weights, of_policy(policy, seed).known)
    except (TrainingDiverged, FloatingPointError):
        return None


def best() -> tuple[str, int]:
    """The judge that PPO goes by."""
    return chain.SIZES[-1], chain.COMPARISONS[-1]


def of_judge(model: rlhf.RewardModel, seed: int) -> Measured:
    scores, (i, j) = model.score_texts(ordered(seed), 256).reshape(-1, ANSWERS), np.triu_indices(ANSWERS, 1)
    ahead = scores[:, i] - scores[:, j]
    return Measured((ahead <= 0).mean(axis=1), np.ones(len(ahead)), {"nats": float(np.logaddexp(0, -ahead).mean())})


def of_policy(policy: Any, seed: int) -> Measured:
    found = chain.report(policy, seed, chain.judge(seed, *best()), prompts())
    gold = np.array(found["gold"])
    return Measured(1 - gold, np.ones(len(gold)), {name: float(np.mean(found[name])) for name in KNOWN})


@np.errstate(all="ignore")  # of what diverges
def run(settings: Stage) -> Row:
    """The row of a stage.

    rate     the best, judged under TUNING
    tried    of each rate, by size: rate; loss, None where it diverged; lower, [value, low, high], by how much its loss is lower
             than at the rate that `chain` has; and what else is known of the policy or judge
    again    the same under the seed AGAIN, of the rate that `chain` has and of the best of all others
    """
    s, found = settings, {}

    def at(rate: float, seed: int = TUNING) -> Measured | None:
        if (rate, seed) not in found:
            found[rate, seed] = measured(s, seed, rate / s.rate)
        return found[rate, seed]

    def loss(rate: float) -> float | None:
        return None if at(rate) is None else at(rate).loss

    def told(rate: float, seed: int) -> Row:
        one, usual = at(rate, seed), at(s.rate, seed)
        lower = None if one is None or usual is None else one.below(usual)
        known = {"loss": None if one is None else one.loss, "lower": lower} | ({} if one is None else one.known)
        return {"rate": rate} | rounded(known)

    rate, tried = best_rate(loss, s.rate, LEAST[s.stage])
    other = min((one for one in tried if one != s.rate), key=lambda one: tried[one])
    again = [told(one, AGAIN) for one in sorted((s.rate, other))]
    return {"rate": rate, "tried": [told(one, TUNING) for one in tried], "again": again}


TUNED = ByItem("chain_tuning", run, runs)


# ------------------------------------------------------------------------------------------------------- what is said


class Rival(NamedTuple):
    """The best of the other rates, beside the one that `chain` has.

    times   its ratio to the one that `chain` has
    lower   by how much its loss is lower, under TUNING and under AGAIN
    gold    by how much a policy's gold is higher, in the mean of both; None of a judge
    """

    name: str
    times: float
    lower: tuple[Estimate, Estimate]
    gold: float | None

    @property
    def clear(self) -> bool:
        """Whether its loss is lower with both intervals."""
        return all(e.low is not None and e.low > 0 for e in self.lower)

    @property
    def words(self) -> str:
        """ "at 0.125 times the one used, though with less gold (-0.06)"."""
        gold = "" if self.gold is None else f", {'though with less' if self.gold < 0 else 'and with more'} gold ({self.gold:+.2f})"
        return f"at {self.times:g} times the one used{gold}"


def rivals(rows: Sequence[Mapping[str, Any]]) -> list[Rival]:
    """Of each stage of which another rate has not diverged."""
    found = []
    for row in rows:
        s = Stage(row["stage"], row["judge"], row["comparisons"])
        rate = next(one["rate"] for one in row["again"] if one["rate"] != s.rate)
        seeds = [{one["rate"]: one for one in row[name]} for name in ("tried", "again")]
        if all(of[rate]["lower"] for of in seeds):
            gold = None if s.stage == "judge" else float(np.mean([of[rate]["gold"] - of[s.rate]["gold"] for of in seeds]))
            found.append(Rival(s.name, rate / s.rate, (*(Estimate(*of[rate]["lower"]) for of in seeds),), gold))
    return found


def told(judges: Sequence[tuple[str, int]] | None = None, rows: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Whether the rates of the policies, and of these judges (default: PPO's), are the best, by the rows (default: those
    shipped)."""
    judges, rows = [best()] if judges is None else judges, TUNED.rows() if rows is None else rows
    used = [row for row in rows if row["stage"] != "judge" or (row["judge"], row["comparisons"]) in judges]
    better = [rival for rival in rivals(used) if rival.clear]
    stages = [Stage(row["stage"]).name for row in used if row["stage"] != "judge"]
    models = len(used) - len(stages)
    stages += [f"{models} reward models" if models > 1 else "the reward model"] * bool(models)
    if not better:
        return f"Of {listed(stages)}, none has clearly less loss at another rate."
    have = f"only {listed([rival.name for rival in better])} {'has' if len(better) == 1 else 'have'}"
    return f"Of {listed(stages)}, {have} clearly less loss at another rate: {listed([rival.words for rival in better])}."


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the rows; a stage that is there already is not computed again."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.claims.chain_tuning", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where chain_tuning.jsonl is, or is made")
    TUNED.compute(parser.parse_args(argv).directory)


if __name__ == "__main__":
    main()
