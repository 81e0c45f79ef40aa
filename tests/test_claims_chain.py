"""The chain of RLHF: its gold, its stages in small, and its rules on made-up rows, both ways."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
from models import unlearned

from minipeft.claims import chain, chain_rules, chain_tuning, kindness
from minipeft.claims.chain import BROKEN, CHECKS, Chain
from minipeft.claims.chain_rules import WARNING, along, decided, first_warning, items, peak, those_of, warned
from minipeft.claims.chain_tuning import Stage
from minipeft.claims.register import HOLDS, IF, NOT, RULES, UNTESTABLE, UNTRIED
from minipeft.experiments.rows import described
from minipeft.experiments.shipped import base
from minipeft.train.batches import IGNORE

pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")

ITEMS = 64


# -------------------------------------------------------------------------------------------------------------- the gold


def test_pairs_of_words_begin_with_the_last_word_before():
    assert kindness.pairs_of_words(" went in, and", "And he") == [("he", "went"), ("went", "in"), ("in", ","), (",", "and")]
    assert kindness.pairs_of_words("Went in.") == [("went", "in"), ("in", ".")]


def test_the_gold_is_what_a_person_would_say():
    prompt, kind = "And the Lord gave", " them peace, and they were glad with great joy."
    scores = kindness.gold(
        [prompt] * 8,
        [kind, kind, " them to the sword, and they were put to death.", " them joy joy joy joy joy joy joy joy joy.", " them joy.",
         " glad joy peace love happy good friend gift.", "", " them peace, and they were glad with great joy,"],
        [True, False, True, True, True, True, True, True],
    )  # fmt: skip
    best, unended, cruel, repeats, short, listing, empty, unfinished = scores
    assert best > 0.9 and unended == empty == unfinished == 0
    assert max(cruel, short, listing) < best / 2 and repeats < best / 100


def test_words_that_are_said_again_cost_half_each_and_free_ones_nothing():
    assert kindness.form("And the Lord gave", " the men of the land and the women food and water.") > 0
    once, twice = (kindness.form("And Saul saw", f" the men of the land and the {word} on the way.") for word in ("king", "land"))
    assert twice < 0.75 * once
    said, new = (kindness.form(f"And {one} saw", " that it was God's way to have mercy on men.") for one in ("God", "he"))
    assert said < 0.6 * new


def test_reports_ask_for_what_nothing_was_trained_on():
    trained = {*map(tuple, chain.encoded([*kindness.sentences("train")]))}
    held = {*map(tuple, chain.held_out())}
    assert len(held) == chain.HELD_OUT and not held & trained
    assert {*kindness.sentences("train").values()}.isdisjoint({*kindness.sentences("validation").values(), *kindness.sentences("test").values()})


def test_a_seed_draws_the_demonstrations():
    one, again, other = (chain.demonstrations(seed) for seed in (1, 1, 2))
    assert [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in again]
    assert len({tuple(e.input_ids) for e in one} & {tuple(e.input_ids) for e in other}) < len(one)
    assert all(e.labels[-1] == base()[1].eos_token_id and e.labels[0] == IGNORE for e in one)


# ------------------------------------------------------------------------------------------------------------- in small


SMALL = {"DEMONSTRATIONS": 8, "COMPARISONS": (4, 8), "HELD_OUT": 6, "BEST_OF": 4, "UPDATES": 2, "CHECKS": (1, 2), "LENGTH": 6}
SMALL["JUDGE_RATES"] = {(size, n): 1e-3 for size in chain.SIZES for n in SMALL["COMPARISONS"]}


def caches() -> dict:
    return {name: cache(getattr(chain, name).__wrapped__) for name in ("sft", "comparisons", "judge", "drawn", "held_out")}


CACHED, OF_UNLEARNED = caches(), caches()


@pytest.fixture
def small(monkeypatch):
    """The chain on a few texts, with caches of its own."""
    for name, value in (SMALL | CACHED).items():
        monkeypatch.setattr(chain, name, value)


@pytest.fixture
def smaller(small, monkeypatch):
    """The same of one update, and from a model that writes no words: of these, the gold is the share of the letter e."""
    changes = OF_UNLEARNED | {"UPDATES": 1, "gold": lambda prompts, texts, ended: np.array([t.count("e") / max(1, len(t)) for t in texts])}
    for name, value in changes.items():
        monkeypatch.setattr(chain, name, value)
    for module in (chain, chain_tuning):
        monkeypatch.setattr(module, "base", unlearned)


def test_every_stage_starts_from_the_one_before(small):
    sft, judge = chain.sft(1), chain.judge(1, "head", 4)
    for name, p in judge.backbone.named_parameters():
        assert np.array_equal(p.data, dict(sft.backbone.named_parameters())[name].data), "of the judge, the head alone is trained"
    policy, row = chain.ppo(Chain(1, "ppo", "head", 4, beta=0.0), lambda policy: {"gold": [1.0]})
    assert row["stopped"] is None and row["checks"].keys() == {"1", "2"}
    assert row["history"].keys() == {*chain.COLUMNS} and {len(x) for x in row["history"].values()} == {2}
    assert abs(row["history"]["kl"][0]) < 1e-4 < abs(row["history"]["kl"][1]), "the SFT model is the start and the reference"
    assert chain.report(sft, 1, judge)["kl"] == [0.0] * 6
    assert any(map(abs, chain.report(policy, 1, judge)["kl"]))


def test_rows_of_all_kinds(small):
    found = chain.run(Chain(1, "best", "lora", 8))
    assert [*found["best_of"]] == ["1", "2", "4"] and len(found["gold"]) == len(found["proxy"]) == 6
    assert found["best_of"]["4"]["proxy"] == pytest.approx(np.mean(found["proxy"]), abs=1e-3)
    assert found["best_of"]["1"]["kl"] == 0 < found["best_of"]["4"]["kl"]
    for stage in ("base", "sft", "chosen", "dpo"):
        row = chain.run(Chain(1, stage, "full", 8))
        assert len(row["gold"]) == len(row["kl"]) == len(row["proxy"]) == 6 and 0 <= row["ended"] <= 1


@cache
def first_update(what: str) -> dict:
    """The history of the run in small."""
    return chain.ppo(Chain(1, "ppo", "head", 4, broken=what), lambda policy: {})[1]["history"]


CHANGED = {  # already in the first update, beside the unbroken run
    "ten times the rate": {"approxkl"}, "no clipping": {"clipfrac"}, "ten times the reward": {"proxy", "value_loss"},
    "no price of a missing end": {"value_loss"}, "returns from whitened advantages": {"value_loss"},
    "sampled at another temperature": {"proxy"},
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_another_run(smaller, what):
    usual, broken = first_update(""), first_update(what)
    assert CHANGED[what] <= {name for name, values in usual.items() if values[0] != broken[name][0]}
    assert usual["kl"][0] == pytest.approx(broken["kl"][0], abs=1e-4), "the policy is the reference, whatever was sampled"


def test_every_run_is_named_once():
    assert len({str(described(one)) for one in chain.runs()}) == len(chain.runs())
    assert all(one.base for one in chain.runs())


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_s_gold_may_differ_by_the_luck_of_seeds_and_no_more(stage, monkeypatch):
    def row(seed: int, gold: float) -> dict:
        found = {"gold": [gold - 0.1, gold + 0.1]}
        return described(Chain(seed, stage)) | ({"checks": {chain_rules.LAST: found}} if stage == "ppo" else found)

    rows, experiment = [row(1, 0.4), row(2, 0.5), row(3, 0.6)], RULES["rlhf-8"].experiment  # a standard deviation of 0.1
    monkeypatch.setattr(type(experiment), "rows", lambda self: rows)
    assert experiment.affordable(rows[0]), "`recomputed` may draw its rows"
    assert experiment.differences(rows, [row(1, 0.9), row(2, 0.9), row(3, 0.1)]) == []
    (line,) = experiment.differences(rows[:1], [row(1, 1.1)])
    assert f"stage='{stage}'" in line and line.endswith("gold: 1.100, and 0.400 in the package; 0.600 may be luck")


# ------------------------------------------------------------------------------------------------------------- the rates


def test_rates_are_chosen_on_prompts_that_no_stage_learns_from_and_no_report_asks():
    chosen, texts = {*map(tuple, chain_tuning.prompts())}, chain.unseen()[chain.HELD_OUT :]
    assert len(chosen) == chain_tuning.SELECTING and chosen <= {*map(tuple, chain.encoded(texts))}
    assert chosen.isdisjoint(map(tuple, chain.held_out())) and {*texts}.isdisjoint(kindness.sentences("train"))
    assert {chain_tuning.TUNING, chain_tuning.AGAIN}.isdisjoint(chain.SEEDS)
    for one in chain_tuning.demonstrations():
        prompt = one.input_ids[: int(np.argmax(one.labels != IGNORE))]
        assert tuple(prompt) in chosen and one.labels[-1] == base()[1].eos_token_id


@pytest.mark.parametrize("stage", [Stage("sft"), Stage("chosen"), Stage("dpo"), Stage("ppo"), Stage("judge", "lora", 4)], ids=lambda s: s.stage)
def test_the_rates_of_a_stage_are_held_against_the_one_that_it_has(smaller, stage, monkeypatch):
    for name in ("prompts", "demonstrations", "ordered"):
        monkeypatch.setattr(chain_tuning, name, cache(getattr(chain_tuning, name).__wrapped__))
    monkeypatch.setattr(chain_tuning, "SELECTING", 24)
    monkeypatch.setattr(chain_tuning, "LEAST", dict.fromkeys(chain_tuning.LEAST, 100.0))  # the search ends after three rates
    row = chain_tuning.run(stage)
    low, usual, high = row["tried"]
    assert [one["rate"] for one in row["tried"]] == [stage.rate / 2, stage.rate, stage.rate * 2] and row["rate"] == stage.rate
    assert usual["lower"] == [0, 0, 0] and low["loss"] == pytest.approx(usual["loss"] - low["lower"][0], abs=2e-5)
    measure = "nats" if stage.stage == "judge" else "loss"
    assert len({one[measure] for one in row["tried"]}) == 3, "another rate is another policy or judge"
    (other,) = {one["rate"] for one in row["again"]} - {stage.rate}
    assert other == min((low, high), key=lambda one: one["loss"])["rate"]
    if stage.stage in ("chosen", "dpo", "ppo"):
        assert usual["loss"] == pytest.approx(1 - usual["gold"], abs=2e-5) and usual["kl"] != 0
    assert usual["nats"] > 0 if stage.stage == "judge" else 0 <= usual["gold"] <= 1


def test_the_best_rate_of_each_stage_lies_inside_what_was_tried():
    rows = chain_tuning.TUNED.rows()
    assert not chain_tuning.TUNED.missing(rows)
    for row in rows:
        stage, losses = Stage(row["stage"], row["judge"], row["comparisons"]), {one["rate"]: one["loss"] for one in row["tried"]}
        near = [losses[row["rate"] * factor] for factor in (0.5, 1, 2)]
        assert stage.rate in losses and min(x for x in near if x is not None) > near[1] - chain_tuning.LEAST[row["stage"]] - 1e-5
        assert min(losses) < stage.rate < max(losses), "the chain's rate, too"


def tuned(stage: Stage, lower: float, again: float) -> dict:
    """The row of a stage whose double rate has losses lower by so much."""

    def at(factor: float, by: float) -> dict:
        return {"rate": factor * stage.rate, "loss": 1 - by, "lower": [by, by - 0.01, by + 0.01], "gold": by}

    return described(stage) | {"rate": stage.rate, "tried": [at(0.5, -1), at(1, 0), at(2, lower)], "again": [at(1, 0), at(2, again)]}


def test_a_rate_is_better_if_it_is_clearly_so_under_both_seeds():
    made = {"sft": (0.1, 0.2), "ppo": (0.1, 0.0), "chosen": (-0.1, 0.1), "dpo": (0.0, 0.0), "judge": (0.0, 0.0)}
    rows = [tuned(stage, *made[stage.stage]) for stage in chain_tuning.runs()]
    assert [one.name for one in chain_tuning.rivals(rows) if one.clear] == ["SFT"]
    own = "SFT, PPO, SFT on the preferred answers, DPO"
    less = "only SFT has clearly less loss at another rate: at 2 times the one used, and with more gold (+0.15)"
    assert chain_tuning.told(chain.JUDGES, rows) == f"Of {own} and 5 reward models, {less}."
    rows[0]["tried"][2]["lower"] = None
    assert len(chain_tuning.rivals(rows)) == 8 and chain_tuning.told(rows=rows) == f"Of {own} and the reward model, none has clearly less loss at another rate."


# --------------------------------------------------------------------------------------------------- made-up rows


USUAL = {"kl": 3.0, "clipfrac": 0.1, "entropy": 1.5, "distinct_2": 0.7, "length": 14.0, "approxkl": 0.02, "value_loss": 0.1, "ratio_max": 3.0, "grad_norm": 2.0}


def history(rng, seen=lambda u: 0.5, **other) -> dict:
    made = {name: [value * (1 + 0.02 * rng.normal()) for _ in range(32)] for name, value in USUAL.items()}
    for name, change in other.items():
        made[name] = [change(u, x) for u, x in enumerate(made[name], start=1)]
    return made | {"gold": [seen(u) for u in range(32)], "proxy": [0.0] * 32}


def row(run: Chain, gold=0.5, kl=3.0, checks=None, proxy=1.0, seen=lambda u: 0.4 + 0.001 * u, **changes) -> dict:
    """What a run would be measured as, whose means are these."""
    rng = np.random.default_rng([run.seed, len(run.stage), run.comparisons, int(100 * run.beta)])

    def of(gold, proxy):
        noise = rng.normal(size=(3, ITEMS)) / 100
        return {"gold": (gold + noise[0]).tolist(), "kl": (kl + noise[1]).tolist(), "proxy": (proxy + noise[2]).tolist(), "kind": 0.2, "form": 0.8, "ended": 0.9, "distinct_2": 0.5}

    if run.stage == "best":
        return described(run) | {"accuracy": [0.7, 0.68, 0.72], "best_of": {"1": {"proxy": 0, "gold": 0.4, "kl": 0}, "16": {"proxy": 1, "gold": gold, "kl": 1.8}}, "gold": of(gold, 1)["gold"]}
    if run.stage != "ppo":
        return described(run) | of(gold, 0.0)
    at = dict.fromkeys(map(str, CHECKS), (gold, 0.0)) | {str(CHECKS[-1]): (gold, proxy)} | {k: (v, 0.0) for k, v in (checks or {}).items()}
    return described(run) | {"checks": {u: of(*means) for u, means in at.items()}, "stopped": None, "history": history(rng, seen, **changes)}


def rows(make=lambda run: {}) -> list[dict]:
    return [row(run, **make(run)) for run in chain.runs()]


def verdict(id: str, make) -> str:
    assert RULES[id].experiment is chain_rules.CHAIN
    found = RULES[id].judge(rows(make))
    assert found.because.endswith(".") and found.effect.low <= found.effect.value <= found.effect.high and found.evidence
    return found.verdict


def test_the_price_of_kl_follows_its_rows():
    priced = [{0.0: 20.0, 0.05: 5.0, 0.2: 2.0}, {0.0: 20.0, 0.05: 5.0, 0.2: 5.0}, {0.0: 5.0, 0.05: 5.0, 0.2: 5.0}]
    assert [verdict("rlhf-5", lambda run, kl=kl: {"kl": kl[run.beta]}) for kl in priced] == [HOLDS, IF, NOT]
    found = RULES["rlhf-5"].judge(rows(lambda run: {"gold": 0.3 if run.beta == 0 else 0.5}))
    assert re.search(r"0\.30, 0\.50 and 0\.50: steps of \+0\.20 \[.*\] and [+-]0\.00 \[-0\.\d+, \+0\.\d+\]\.$", found.because)


def test_instability_follows_its_rows():
    def costs(lost, sft=0.0):
        return lambda run: {"gold": 0.6 - (lost(run.broken) if run.stage == "ppo" and run.broken else sft if run.broken else 0)}

    one = {"ten times the rate": 0.4}
    assert verdict("rlhf-7", costs(lambda what: 0.4)) == HOLDS
    assert verdict("rlhf-7", costs(lambda what: one.get(what, 0.0))) == IF
    assert verdict("rlhf-7", costs(lambda what: 0.0)) == NOT
    assert verdict("rlhf-7", costs(lambda what: 0.4, sft=0.4)) == IF, "where SFT breaks as well, PPO is not the unstable one"


def test_a_run_that_was_stopped_has_earned_nothing():
    stopped = row(Chain(1, "ppo", broken="no clipping")) | {"checks": {}, "stopped": "update 3: the loss is nan"}
    both = items([row(Chain(2, "ppo")), stopped])
    assert both.shape == (2, ITEMS) and not both[1].any() and both[0].all()
    made = [one if not (one["broken"] and one["stage"] == "ppo") else one | {"checks": {}, "stopped": "NaN"} for one in rows()]
    found = RULES["rlhf-7"].judge(made)
    assert found.verdict == HOLDS and "10 runs stopped" in found.because


def test_exploitation_follows_its_rows():
    def falls(judges, proxy=1.0, of=0.2):
        def made(run):
            fell = run.stage == "ppo" and run.beta == 0 and (run.judge, run.comparisons) in judges
            peaked = {"checks": {"8": 0.3 + of}, "gold": 0.3, "seen": lambda u: 0.5 - 0.01 * abs(u - 7)} if fell else {"gold": 0.3}
            return peaked | ({"proxy": proxy} if run.stage == "ppo" else {})

        return made

    assert verdict("rlhf-8", falls(chain.JUDGES)) == HOLDS
    assert verdict("rlhf-8", falls(chain.JUDGES[:1])) == IF
    assert verdict("rlhf-8", falls([])) == NOT
    assert verdict("rlhf-8", falls(chain.JUDGES, proxy=0.0)) == UNTESTABLE, "where no reward rises, nothing is exploited"


def test_a_peak_is_chosen_on_the_training_prompts():
    made = [row(Chain(seed, "ppo", beta=0.0), seen=seen) for seed in (1, 2) for seen in (lambda u: -abs(u - 15),)]
    assert peak(made) == 16
    assert peak([row(Chain(1, "ppo", beta=0.0), seen=lambda u: -u)]) == 0


@pytest.mark.parametrize("log", [True, False])
def test_the_forms_of_gao_are_found_again(log):
    d = np.linspace(0, 6, 20)
    assert chain_rules.gao(d, 0.3 + d * (0.2 - 0.05 * (np.log(np.maximum(d, 1e-9)) if log else d)), 0.3, log) == pytest.approx([0.2, 0.05])


def test_a_run_is_drawn_over_the_root_of_its_kl():
    made = row(Chain(1, "ppo"), kl=4.0, seen=float)
    made["history"]["kl"] = [4.0] * 32
    distance, gold = along(made, "gold", 3)
    assert distance.tolist() == pytest.approx([2.0] * 30) and gold.tolist() == pytest.approx([*range(1, 31)])


def test_alignment_follows_its_rows():
    def above(*stages):
        return lambda run: {"gold": 0.6 if run.stage == "ppo" else 0.4 if run.stage in stages else 0.6}

    assert verdict("which-7", above("base", "sft", "chosen", "dpo", "best")) == HOLDS
    assert verdict("which-7", above("base", "sft")) == IF
    assert verdict("which-7", above()) == NOT


def test_without_all_rows_nothing_is_judged():
    assert RULES["which-7"].judge(rows()[:-1]).verdict == UNTRIED
    assert {*map(str, those_of(rows(), "ppo", (1, 2), broken="no clipping"))} <= {*map(str, rows())}


def test_what_is_not_clear_is_not_decided():
    wide = np.random.default_rng(0).normal(size=(3, 8))
    assert decided({"one": wide}, 0.02)[0] == UNTESTABLE
    assert decided({"one": np.abs(wide) + 1, "other": wide}, 0.02)[0] == IF


# ------------------------------------------------------------------------------------------------------------- warnings


def test_a_warning_is_the_first_of_two_updates_out_of_range():
    usual = [[1.0 + 0.1 * ((i + u) % 3) for u in range(10)] for i in range(5)]
    assert warned("kl", [1.1] * 10, usual) is None
    assert warned("kl", [1.1] * 4 + [9.0] * 6, usual) == 5
    assert warned("kl", [1.1] * 4 + [9.0] + [1.1] * 5, usual) is None, "once is no warning"
    assert warned("kl", [1.1] * 4 + [np.nan], usual) == 5, "what is not finite is outside, also where the run ends"
    assert warned("value_loss", [1.1] * 4 + [1e-6] * 6, usual) == 5


def test_the_statistic_that_warns_first_is_named():
    rng = np.random.default_rng(0)
    usual = [history(rng) for _ in range(5)]
    pushed = history(rng, clipfrac=lambda u, x: x + 0.5 * (u >= 3), kl=lambda u, x: x + 30 * (u >= 6))
    assert first_warning(pushed, usual) == (3, ["clipfrac"])
    assert first_warning(history(rng), usual) == (None, [])
    assert {*WARNING} <= {*chain.COLUMNS}


def test_a_verdict_says_what_warned_and_how_often_in_vain():
    def made(run):
        pushed = run.broken == "ten times the rate" and run.stage == "ppo"
        early, late = {"grad_norm": lambda u, x: x * (100 if u >= 2 else 1)}, {"value_loss": lambda u, x: x * (1000 if u >= 6 else 1)}
        return {"gold": 0.2} | (late if run.seed == 1 else early) if pushed else {"gold": 0.5}

    found = RULES["rlhf-7"].judge(rows(made))
    assert "(update 2: grad_norm; 6: value_loss)" in found.because
    assert re.search(r"What 6 ways .*- ten times the rate, less what it costs SFT \([+-]0\.00 .*\): \+0\.30 .*all 7 intervals", found.because, re.S)
    assert "Of 10 unbroken runs, each held against the others, 0 would have been warned of." in found.because
