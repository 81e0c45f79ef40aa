"""What the chain of RLHF decides: nearness to the start, instability, exploitation, alignment (`chain`).

    a difference   of two policies on the held-out prompts under the same seeds, with its interval over both
                   (`statistics.crossed`); clear: it excludes 0. Of k differences, that some are so is said only of those
                   that are clear at the level 1 - 0.05 / k
    a warning      the first update at which a statistic of a run has left its usual range, there and at the next one

Usual is what the unbroken runs (beta = 0.05) have at the same update under all seeds: their mean ± LIMIT standard
deviations, pooled over the updates; of `value_loss` and what else spans orders of magnitude, of the logarithms, and of
sqrt(KL). Each unbroken run is held against the others in the same way: how often it would have been warned of is the
control.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..evaluation.intervals import Estimate, mean
from . import chain, chain_tuning, constitution
from .chain import BETAS, BROKEN, CHECKS, COMPARISONS, HELD_OUT, JUDGES, SIZES
from .register import (
    HOLDS,
    IF,
    NOT,
    UNTESTABLE,
    Experiment,
    Number,
    Verdict,
    as_number,
    claim,
    itemized,
    listed,
    measured,
)
from .statistics import crossed, spreads

Rows = Sequence[Mapping[str, Any]]
SPREADS = 6  # standard deviations of ten seeds; two draws of a run differ by more about twice in a thousand times


class Sampled(Experiment):
    """Runs whose rows are of sampled texts. Other processors round otherwise, and draw other words: computed again, a run's
    mean gold may differ by SPREADS of its standard deviations over the seeds."""

    @property
    def allowed(self) -> str:
        return f"{SPREADS} standard deviations over the seeds"

    def differences(self, rows: Rows, others: Rows) -> list[str]:
        """The runs whose mean gold differs by more."""
        shipped, found = self.rows(), []
        for row, other in zip(rows, others, strict=True):
            setting = {name: row[name] for name in chain.Chain.__dataclass_fields__ if name != "seed"}
            seeds = [one for one in shipped if setting.items() <= one.items()]
            a, b, *golds = items([row, other, *seeds]).mean(axis=1)
            if not abs(a - b) <= (near := SPREADS * np.std(golds, ddof=1)):
                found.append(f"{chain.Chain(row['seed'], **setting)}, gold: {b:.3f}, and {a:.3f} in the package; {near:.3f} may be luck")
        return found


CHAIN = Sampled("chain", chain.run, chain.runs)
CONSTITUTION = Experiment("constitution", constitution.run, constitution.runs, varied=True)  # a row has several policies, of sampled texts

UNITS = {"gold": "gold", "kl": "nats an answer"}  # the gold is in [0, 1]
NEAR = {"gold": 0.02, "kl": 0.5}  # what nobody would notice
LIMIT = 4.0  # standard deviations
SPANNING = ("approxkl", "value_loss", "ratio_max", "grad_norm")  # orders of magnitude
WARNING = ("kl", "clipfrac", "entropy", "distinct_2", "length", *SPANNING)  # the statistics that a run logs without a gold
SETS = {"no clipping": "clipfrac"}  # what a way to break PPO sets by itself, at whatever the run does: that warns of nothing
LAST = str(CHECKS[-1])


# ----------------------------------------------------------------------------------------------------------- statistics


def those_of(rows: Rows, stage: str, seeds: Sequence[int] = (), **settings: Any) -> list[Mapping[str, Any]]:
    """The rows of a stage, seed by seed: with the settings that are given, and the defaults of `Chain` otherwise."""
    wanted = {"judge": SIZES[-1], "comparisons": COMPARISONS[-1], "beta": 0.05, "broken": "", "stage": stage} | settings
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted((row for row in found if not seeds or row["seed"] in seeds), key=lambda row: row["seed"])


def items(rows: Rows, key: str = "gold", check: str = LAST) -> np.ndarray:
    """A number of every held-out prompt, [seeds, HELD_OUT]. A run that was stopped before has earned no gold: 0."""
    found = [row["checks"].get(check, {}) if "checks" in row else row for row in rows]
    size = max(len(one.get(key, ())) for one in found)
    return np.array([one.get(key, [0.0] * size) for one in found], float)


Differences = Mapping[str, np.ndarray]  # name: [seeds, items], above 0 where it is as the statement says


def decided(differences: Differences, near: float) -> tuple[str, dict[str, Estimate], dict[str, bool]]:
    """(the verdict on a statement that says of all differences that they are above 0, their intervals, which are clear).

    Holds if all are clear; if some are, at the level of that many; does not hold here if each is below `near` with its
    whole interval; cannot be tested here otherwise."""
    found = {name: crossed(x) for name, x in differences.items()}
    clear = {name: e.low is not None and e.low > 0 for name, e in found.items()}
    below = all(e.high is not None and e.high < near for e in found.values())
    return HOLDS if all(clear.values()) else IF if surely(differences) else NOT if below else UNTESTABLE, found, clear


def surely(differences: Differences) -> list[str]:
    """Those that are clear where all the intervals are to hold together."""
    level = 1 - 0.05 / len(differences)
    return [name for name, x in differences.items() if (e := crossed(x, level=level)).low is not None and e.low > 0]


def scaled(name: str, values: Sequence[float]) -> np.ndarray:
    """A column of a history as its range is judged: the logarithms where it is SPANNING, the root of a KL."""
    x = np.asarray(values, float)
    if name == "kl":
        return np.sqrt(np.maximum(x, 0))
    return np.log(np.maximum(x, 1e-12)) if name in SPANNING else x


def warned(name: str, values: Sequence[float], usual: Sequence[Sequence[float]]) -> int | None:
    """The update, from 1, at which a statistic leaves its usual range for two updates in a row; None if it does not.

    values   of a run that may have been stopped; what is not finite is outside
    usual    of the unbroken runs, [runs, updates]
    """
    normal = np.stack([scaled(name, one) for one in usual])
    spread = math.sqrt(normal.var(axis=0, ddof=1).mean()) * math.sqrt(1 + 1 / len(normal))
    away = abs(scaled(name, values) - normal.mean(axis=0)[: len(values)])
    out = ~(away <= LIMIT * max(spread, 1e-9))
    both = np.flatnonzero(out & np.append(out[1:], True))  # the last update has no next one
    return int(both[0]) + 1 if len(both) else None


def first_warning(
    history: Mapping[str, Sequence[float]], usual: Sequence[Mapping[str, Sequence[float]]], but: str | None = None
) -> tuple[int | None, list[str]]:  # fmt: skip
    """(the update of the first warning, the statistics that gave it then), of all WARNING but one."""
    at = {name: warned(name, history[name], [one[name] for one in usual]) for name in WARNING if name != but}
    first = min((update for update in at.values() if update is not None), default=None)
    return first, [name for name, update in at.items() if first is not None and update == first]


def shown(e: Estimate, digits: int = 2) -> str:
    """ "+0.11 [-0.03, +0.25]": a value and its interval, where it has one."""
    return f"{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]" if e.low is not None else f"{e.value:+.{digits}f}"


def verdict(decision: str, because: str, effect: Number, evidence: Sequence[Number], rows: Rows) -> Verdict:
    """A verdict with the seeds of its rows, on the chain's prompts."""
    seeds = len({row["seed"] for row in rows})
    return Verdict(decision, because, effect, evidence, seeds, HELD_OUT, "the shipped base", "kind endings of verses")


def summary(name: str, rows: Rows, keys: Sequence[str] = ("gold", "kl")) -> list[Number]:
    """A policy's numbers on the held-out prompts, as evidence: of the runs that were not stopped."""
    whole = [row for row in rows if "checks" not in row or LAST in row["checks"]]
    if not whole:
        return []
    last = [row["checks"][LAST] if "checks" in row else row for row in whole]
    shares = [key for key in ("kind", "form", "ended", "distinct_2") if key in last[0]]
    numbers = [as_number(f"{name}: {key}", crossed(items(whole, key)), UNITS[key]) for key in keys]
    return numbers + [measured(f"{name}: {key}", [one[key] for one in last], "share") for key in shares]


def along(row: Mapping[str, Any], key: str, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """A run of PPO as Gao et al. draw it: (sqrt(KL), a column of its history), each a running mean over `width` updates."""
    columns = (np.array(row["history"][name], float) for name in ("kl", key))
    kl, values = (np.convolve(x, np.ones(width) / width, "valid") for x in columns)
    return np.sqrt(np.maximum(kl, 0)), values


def gao(d: np.ndarray, gold: np.ndarray, start: float, log: bool) -> np.ndarray:
    """(a, b) of Gao et al. (arXiv:2210.10760), least squares: gold = start + d (a - b log d) along PPO, start + d (a - b d) along the
    best of n."""
    slopes = np.stack([d, -d * (np.log(np.maximum(d, 1e-9)) if log else d)], axis=1)
    return np.linalg.lstsq(slopes, gold - start, rcond=None)[0]


def gao_of(rows: Rows, size: str, n: int) -> dict[str, list[Estimate]]:
    """[a, b] of a judge, over the seeds: along PPO without a price of KL, and along the best of 1 to 16."""
    runs, many = (those_of(rows, stage, judge=size, comparisons=n, **of) for stage, of in (("ppo", {"beta": 0.0}), ("best", {})))
    starts = items(those_of(rows, "sft")).mean(axis=1)
    found = {"PPO": [gao(*along(row, "gold"), start, True) for row, start in zip(runs, starts)], "best of n": []}
    for row in many:
        kl, gold = np.array([[one["kl"], one["gold"]] for one in row["best_of"].values()]).T
        found["best of n"].append(gao(np.sqrt(kl), gold, gold[0], False))
    return {how: [mean(x) for x in np.transpose(each)] for how, each in found.items()}


# ---------------------------------------------------------------------------------------------------------------- rules


@claim("rlhf-5", lesson="10_ppo.py", section="8 · One chain on one model", experiment=CHAIN)
def near_its_start(rows: Rows) -> Verdict:
    """Holds if, after as many updates of PPO, each higher price of KL (0, 0.05, 0.2) clearly leaves the policy at a lower KL from the SFT
    model, on held-out prompts; holds if one of the two does; does not hold here if neither saves half a nat."""
    of = {beta: those_of(rows, "ppo", beta=beta) for beta in BETAS}
    kl = {beta: items(found, "kl") for beta, found in of.items()}
    steps = {f"{high:g} in place of {low:g}": kl[low] - kl[high] for low, high in pairwise(BETAS)}
    decision, found, _ = decided(steps, NEAR["kl"])
    saved = "; ".join(f"beta {name} saves {shown(e, 1)} nats" for name, e in found.items())
    gold = [items(one) for one in of.values()]
    earned = listed([shown(crossed(high - low)) for low, high in pairwise(gold)])
    because = (
        f"After {LAST} updates the KL from the SFT model is {listed([f'{x.mean():.1f}' for x in kl.values()])} nats an answer at beta "
        f"{listed([f'{beta:g}' for beta in BETAS])}: {saved}. The gold is "
        f"{listed([f'{x.mean():.2f}' for x in gold])}: steps of {earned}."
    )  # fmt: skip
    effect = as_number(f"nats saved by beta {next(iter(found))}", next(iter(found.values())), "nats an answer")
    evidence = [number for beta, one in of.items() for number in summary(f"beta {beta:g}", one)]
    return verdict(decision, because, effect, evidence, of[BETAS[0]])


@claim("rlhf-7", lesson="10_ppo.py", section="10 · Break it: whiten first, then take the returns", experiment=CHAIN)
def unstable(rows: Rows) -> Verdict:
    """Holds if each change of one thing in PPO (see `chain.BROKEN`) clearly costs gold on held-out prompts, and ten times the rate costs
    PPO clearly more than it costs SFT; holds if some of these are so; does not hold here if each costs less than 0.02. Beside it
    stands the ratio of the gold's standard deviations over seeds, PPO's to SFT's."""
    usual = those_of(rows, "ppo")
    broken = {what: those_of(rows, "ppo", broken=what) for what in BROKEN}
    both = {what: items([*usual, *of]) for what, of in broken.items()}
    costs = {what: x[: len(usual)] - x[len(usual) :] for what, x in both.items()}
    sft, faster = those_of(rows, "sft"), those_of(rows, "sft", broken="ten times the rate")
    beyond, of_sft = "ten times the rate, less what it costs SFT", items(sft) - items(faster)
    costs[beyond] = costs["ten times the rate"] - of_sft
    decision, found, _ = decided(costs, NEAR["gold"])
    histories, told, evidence = [row["history"] for row in usual], [], []
    for what, of in broken.items():
        own = SETS.get(what)
        warnings = [first_warning(row["history"], histories, own) for row in of]
        updates = [update for update, _ in warnings if update is not None]
        at: dict[str, list[str]] = {}  # what warned: at which updates
        for u in sorted(set(updates)):
            at.setdefault(listed(list(dict.fromkeys(name for update, first in warnings if update == u for name in first))), []).append(str(u))
        when = "update " + "; ".join(f"{listed(us)}: {names}" for names, us in at.items()) if at else "no warning"
        when += f"; {own} is left out: always 0 without a clip" if own else ""
        lost = [row for row in of if row["stopped"]]
        said = f"{what} of ratios and values" if own else what
        told.append(f"{said}: {shown(found[what])} ({when}{f'; {len(lost)} runs stopped' if lost else ''})")
        evidence += [Number(f"{what}: update of the first warning, median", float(np.median(updates)))] if updates else []
        evidence += summary(what, of)[:2]
    told.append(f"{beyond} ({shown(crossed(of_sft))}{', a gain' if of_sft.mean() < 0 else ''}): {shown(found[beyond])}")
    apart = spreads(*(items(of).mean(axis=1) for of in (usual, sft)))
    false = [first_warning(one, [*histories[:i], *histories[i + 1 :]])[0] for i, one in enumerate(histories)]
    because = (
        f"What {len(broken)} ways to break it cost of the gold, beside the usual run (and each seed's first warning, if any): {itemized(told)}Where all {len(costs)} intervals are to hold "
        f"together, these are above 0: {listed(surely(costs))}. {chain_tuning.told()} "
        f"Of {len(false)} unbroken runs, each held against the others, {sum(update is not None for update in false)} would have been warned of. "
        f"PPO's gold has a standard deviation over seeds that is {apart.value:.1f} [{apart.low:.1f}, {apart.high:.1f}] times SFT's."
    )  # fmt: skip
    worst = max(BROKEN, key=lambda what: found[what].value)
    evidence.append(as_number("standard deviation of the gold over seeds, PPO's over SFT's", apart, "times"))
    evidence += [as_number(f"gold lost: {name}", e, "gold") for name, e in found.items()] + summary("unbroken", usual)
    return verdict(decision, because, as_number(f"gold lost: {worst}", found[worst], "gold"), evidence, sft)


def peak(rows: Rows) -> int:
    """Where the gold of a run's own samples is highest, in the mean over the runs and over three updates: 0, the start, or one of
    CHECKS but the last. It is chosen on training prompts, and measured on held-out ones."""
    gold = np.mean([row["history"]["gold"] for row in rows], axis=0)
    return max((0, *CHECKS[:-1]), key=lambda update: gold[max(0, update - 1) : update + 2].mean())


@claim("rlhf-8", lesson="11_reward_hacking.py", section="3 · The price of going far", experiment=CHAIN)
def exploited(rows: Rows) -> Verdict:
    """Holds if, with each of five judges and without a price of KL, the gold on held-out prompts falls clearly from its peak (chosen on
    the training prompts) to the last update while the judge's reward rises clearly from there; holds if with some; does not hold here if
    it falls by less than 0.02 with each; cannot be tested here if no reward rises."""
    falls, told, evidence, less = {}, [], [], 0
    for size, n in JUDGES:
        name, of = f"{size}, {n} comparisons", those_of(rows, "ppo", judge=size, comparisons=n, beta=0.0)
        many, top = those_of(rows, "best", judge=size, comparisons=n), peak(of)
        before = items(of, check=str(top)) if top else items(those_of(rows, "sft"))
        one, most = (np.array([[row["best_of"][key][what] for what in ("proxy", "gold")] for row in many]) for key in ("1", "16"))
        rise = crossed(items(of, "proxy") - (items(of, "proxy", str(top)) if top else one[:, :1]))  # one answer: the SFT model's
        fall = crossed(before - items(of))
        if rise.low is not None and rise.low > 0:
            falls[name] = before - items(of)
        end = np.array([items(of, "proxy").mean(), items(of).mean()])
        less, gained = less + bool((end < most.mean(axis=0)).all()), end - one.mean(axis=0)
        came = gained[1] / gained[0] / (np.divide(*(most - one).mean(axis=0)[::-1]))
        told.append(
            f"{size}, {n}: reward up by {shown(rise)} from {f'update {top}' if top else 'the start'}, gold by "
            f"{shown(crossed(items(of) - before))}, from {before.mean():.2f} to {items(of).mean():.2f}"
        )
        right = np.array([row["accuracy"][0] for row in many])
        evidence += [as_number(f"fall of the gold: {name}", fall, "gold"), as_number(f"{name}: rise of the judge's reward", rise, "reward")]
        evidence += [measured(f"{name}: pairs ordered as the gold does", right.tolist(), "share")]
        evidence += [Number(f"{name}: gold per reward, over best of 16's", float(came), "times"), *summary(name, of)]
        evidence += [as_number(f"{name}: {x} of Gao et al., {how}", e, "gold a root of nats") for how, ab in gao_of(rows, size, n).items() for x, e in zip("ab", ab)]
    if not falls:
        because = f"The reward of no judge rises clearly from the peak of the gold: nothing to exploit it by. {itemized(told)}"
        return verdict(UNTESTABLE, because, evidence[0], evidence[1:], those_of(rows, "sft"))
    decision, found, clear = decided(falls, NEAR["gold"])
    decision = IF if decision == HOLDS and len(falls) < len(JUDGES) else decision
    clearly, sure = [name for name, is_so in clear.items() if is_so], surely(falls)
    together = f"{'also' if sure == clearly else f'with {listed(sure)},'} where all {len(falls)} intervals are to hold together"
    because = (
        f"Without a price of KL the reward of {len(falls)} of {len(JUDGES)} judges rises clearly from where the gold of training prompts has its peak; "
        f"the gold falls clearly with {listed(clearly)} ({together}): {itemized(told)}"
        f"With {less} of {len(JUDGES)} judges the best of 16 answers has more reward than this end, and more gold. {chain_tuning.told(JUDGES)}"
    )  # fmt: skip
    most_fallen = max(found, key=lambda name: found[name].value)
    return verdict(decision, because, as_number(f"fall of the gold, {most_fallen}", found[most_fallen], "gold"), evidence, those_of(rows, "sft"))


@claim("which-7", lesson="16_which_method.py", section="5 · And the other two jobs", experiment=CHAIN)
def aligned(rows: Rows) -> Verdict:
    """Holds if PPO (beta 0.05, the best judge) has clearly more gold on held-out prompts than the base, the SFT model, the SFT model at ten
    times its rate, the SFT model trained on the preferred answers or by DPO on the comparisons, and the best of 16 answers by the same
    judge; holds if than some of these; does not hold here if it is less than 0.02 above each."""
    policy = those_of(rows, "ppo")
    others = {
        "the base": those_of(rows, "base"), "SFT": those_of(rows, "sft"), "SFT at ten times the rate": those_of(rows, "sft", broken="ten times the rate"),
        "SFT on the preferred answers": those_of(rows, "chosen"), "DPO": those_of(rows, "dpo"),
        "the best of 16": those_of(rows, "best"),
    }  # fmt: skip
    over = {name: items(policy) - items(of) for name, of in others.items()}
    decision, found, _ = decided(over, NEAR["gold"])
    because = (
        f"PPO by a judge of {COMPARISONS[-1]:,} comparisons has a gold of {items(policy).mean():.2f}: {itemized([f'{shown(e)} beside {name}' for name, e in found.items()])}Where all "
        f"{len(over)} intervals are to hold together, it is above {listed(surely(over))}, at a KL of {items(policy, 'kl').mean():.1f} nats from SFT. "
        f"{chain_tuning.told()}"
    )  # fmt: skip
    evidence = summary("PPO", policy)
    for name, of in others.items():
        evidence += [as_number(f"PPO over {name}", found[name], "gold"), *summary(name, of, ("gold",))]
    return verdict(decision, because, as_number("PPO over SFT", found["SFT"], "gold"), evidence, policy)


@claim("rlhf-9", lesson="09_reward_model.py", section="6 · Labels from a model that follows principles", experiment=CONSTITUTION)
def by_principles(rows: Rows) -> Verdict:
    """Holds if, on held-out prompts, the best of 16 answers and PPO, each by a reward model of the judge's labels, have clearly more gold than
    the SFT model and than the same by a coin's labels, and are not worse than by the rater's (interval above -0.02); holds if one of the two
    clearly has more than both SFT and the coin's; does not hold here if each gains less than 0.02 over SFT; cannot be tested here
    otherwise. (A coin's labels may do harm: to be above it alone is no gain.)"""
    forms, bare = next(row for row in rows if "forms" in row)["forms"], [row for row in rows if row["form"] == constitution.BARE]
    rows = [row for row in rows if row["form"] == constitution.FORM]
    asked = {form: mean(of["agreement"]) for form, of in forms.items()}
    if max(asked, key=lambda form: asked[form].value) != constitution.FORM:
        raise ValueError(f"the judge is asked by {constitution.FORM!r}, and not in the form that agrees best with the gold: {asked}")

    def gold(how: str, arm: str = "") -> np.ndarray:
        return np.array([row[how][arm] if arm else row[how] for row in rows])

    rater = " over the rater's"
    ways, gains, parity = {"best": "the best of 16", "ppo": "PPO"}, {}, {}
    for how, name in ways.items():
        gains[f"{name} over SFT"] = gold(how, "judge") - gold("sft")
        gains[f"{name} over a coin's"] = gold(how, "judge") - gold(how, "coin")
        parity[f"{name}{rater}"] = gold(how, "judge") - gold(how, "rater")
    _, found, clear = decided(gains, NEAR["gold"])
    gained = any(all(name in surely(gains) for name in gains if name.startswith(way)) for way in ways.values())
    little = all(found[f"{name} over SFT"].high < NEAR["gold"] for name in ways.values())
    decision = HOLDS if all(clear.values()) else IF if gained else NOT if little else UNTESTABLE
    beside = {name: crossed(x) for name, x in parity.items()}
    equal = {name: e.low is not None and e.low > -NEAR["gold"] for name, e in beside.items()}
    decision = IF if decision == HOLDS and not all(equal.values()) else decision
    found |= beside

    def share(key: str) -> Estimate:
        """The mean over the seeds of a share of pairs."""
        return mean([float(np.mean(row[key])) for row in rows])

    others = {arm: [crossed(gold(how, arm) - gold("sft")) for how in ways] for arm in ("rater", "flipped")}
    people, random = (listed([f"{name} {shown(e)}" for name, e in zip(ways.values(), of)]) for of in others.values())
    lengths = mean([even(row) for row in rows])
    without = [float(np.mean(row["agreement"])) for row in bare]
    same = [float(np.mean(row["agreement"][: len(one["agreement"])])) for row, one in zip(rows, bare)]  # the same comparisons
    added = mean([x - y for x, y in zip(same, without)])
    first, longer, revised = share("first"), share("longer"), crossed(gold("revised") - gold("own"))
    because = (
        f"Asked about two answers, the judge takes the one that is shown first in {first.value:.0%}; over both orders it agrees with the gold in "
        f"{percent(share('agreement'))}, and takes the longer answer in {percent(longer)}, the gold in {share('gold_longer').value:.0%}; with length "
        f"averaged out (the mean of its agreement where the longer has more gold and where the shorter has) it agrees in {percent(lengths)}. "
        f"On the first {bare[0]['labels']}, shown the same examples and no principles, it agrees in {percent(mean(without))}, with them in "
        f"{np.mean(same):.0%}: what the principles add is {shown(added)}. "
        f"What a reward model of {rows[0]['labels']} labels gains of the gold: {itemized([f'{name}: {shown(e)}' for name, e in found.items()])}"
        f"Shown to be at most {NEAR['gold']:g} worse than by the rater's: {listed([n.removesuffix(rater) for n, so in equal.items() if so])}. "
        f"As many labels of the rater gain over SFT: {people}; the gold's, "
        f"turned round at random as often as the judge errs: {random}. "
        f"Trained on the judge's revisions, "
        f"the SFT model has {shown(revised)} beside training on its own answers; a revision changes {np.mean([r['changed'] for r in rows]):.0%} of them. "
        f"{chain_tuning.told([(constitution.SIZE, constitution.LABELS)])}"
    )  # fmt: skip
    evidence = [as_number(name, e, "gold") for name, e in found.items()] + [as_number("revisions over own answers", revised, "gold")]
    evidence += [as_number(name, share(key), "share") for key, name in SHARES.items()]
    evidence.append(as_number("judge and gold agree, length averaged out", lengths, "share"))
    evidence += [as_number("judge and gold agree, examples alone", mean(without), "share"), as_number("what principles add", added, "share")]
    evidence += [as_number(f"{form}, chosen among: agreement", e, "share") for form, e in asked.items()]
    evidence += [as_number(f"{name}, {arm}", crossed(gold(how, arm)), "gold") for how, name in ways.items() for arm in constitution.ARMS]
    evidence += [measured(f"reward model, {arm}: pairs ordered as the gold does", gold("right", arm).tolist(), "share") for arm in constitution.ARMS]
    evidence += [as_number(name, crossed(gold(name)), "gold") for name in ("sft", "own", "revised")]
    decisive = "the best of 16 over SFT"
    return verdict(decision, because, as_number(decisive, found[decisive], "gold"), evidence, rows)


SHARES = {
    "agreement": "judge and gold agree, both orders", "one order": "judge and gold agree, one order", "first": "takes the first",
    "longer": "takes the longer", "gold_longer": "gold takes the longer",
}  # fmt: skip


def even(row: Mapping[str, Any]) -> float:
    """The share of a judge's right choices, the mean over pairs whose longer answer has more gold and those whose shorter one has:
    whoever goes by length alone is right in half."""
    right, longer = np.equal(row["longer"], row["gold_longer"]), np.array(row["gold_longer"], bool)
    return float(right[longer].mean() + right[~longer].mean()) / 2


def percent(e: Estimate) -> str:
    return f"{e.value:.0%}" if e.low is None else f"{e.value:.0%} [{e.low:.0%}, {e.high:.0%}]"
