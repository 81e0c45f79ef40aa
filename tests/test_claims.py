"""The register of claims: every rule states itself, computes its verdict, and comes out the other way from other numbers."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minipeft as mp
from minipeft import claims
from minipeft.claims import register, timing
from minipeft.claims.protocol import version
from minipeft.claims.quotes import quotation, quoted
from minipeft.claims.register import (
    HOLDS,
    IF,
    NOT,
    RULES,
    UNTESTABLE,
    UNTRIED,
    Experiment,
    Number,
    Verdict,
    graded,
    listed,
    measured,
    those,
)
from minipeft.text.templates import Turn

LESSONS = Path(__file__).parent.parent / "lessons"
IDS = [id for id in claims.statements() if claims.rule_of(id)]
IN_PLACE = [id for id in IDS if claims.rule_of(id).experiment is None]
EXPERIMENTS = {id: claims.rule_of(id).experiment for id in IDS if id not in IN_PLACE}


@cache
def has_rows(id: str) -> bool:
    """Whether all rows of an experiment are there; who collects the tests does not read them."""
    return not EXPERIMENTS[id].missing(EXPERIMENTS[id].rows())


# ------------------------------------------------------------------------------------------------------- the register


def test_the_statements_are_the_textbook_s_and_each_has_one_id():
    found = claims.statements()
    assert len(found) == 86 and [*found] == [s.id for s in found.values()]
    assert found["lora-6"].statement == "d = k = 4096, r = 8: 16.7M against 65K, 256 times" and found["lora-6"].kind == "count"
    sections = dict.fromkeys(s.section for s in found.values())
    assert [*sections] == [
        "overview",
        "full",
        "peft",
        "lora",
        "adapters",
        "soft prompts",
        "qlora",
        "instruction",
        "rlhf",
        "practice",
        "forgetting",
        "which",
    ]


@pytest.mark.parametrize("id", IDS)
def test_a_rule_states_itself_and_names_a_lesson_s_section(id):
    rule = claims.rule_of(id)
    assert rule.words.startswith("Holds if") and rule.words.endswith((".", ".)"))
    text = (LESSONS / rule.lesson).read_text(encoding="utf-8")
    assert re.search(rf"^# ## {re.escape(rule.section)}$", text, re.M), rule.section


@pytest.mark.parametrize("id", IDS)
def test_a_verdict_has_a_reason_an_effect_and_evidence(id):
    verdict = claims.judge(id)
    if verdict.verdict == UNTRIED and id in EXPERIMENTS and not has_rows(id):
        pytest.skip("not tried yet")
    assert verdict.verdict in register.VERDICTS and verdict.verdict != UNTRIED
    assert re.fullmatch(r"[A-Z0-9].*\.", verdict.because, re.S), verdict.because
    assert verdict.effect.name and np.isfinite(verdict.effect.value)
    for number in (verdict.effect, *verdict.evidence):
        assert number.low is None or number.low <= number.value <= number.high
    if id in EXPERIMENTS:
        assert verdict.seeds and verdict.base and verdict.task
        # times have no test set, and what is memorized was trained on
        assert verdict.items or EXPERIMENTS[id].timed or id == "full-7"
    lesson, said = (LESSONS / RULES[id].lesson).read_text(encoding="utf-8"), quotation(claims.statements()[id], verdict)
    if id in IN_PLACE and claims.statements()[id].kind not in ("count", "code", "decision", "fact"):
        # another processor rounds in another way, and a step's peak of memory is measured anew
        lesson, said = (re.sub(r"\d+\.\d+|\de[+-]\d+", "0", " ".join(text.split())) for text in (lesson, said))
    assert said in lesson, "its lesson says so: python -m minipeft.claims.quotes lessons/*.py"


def test_a_quotation_stands_at_the_end_of_its_section_and_an_old_one_goes():
    text = "# %% [markdown]\n# ## 8 · Merge: the detour disappears\n\n# %%\nx = 1\n\n# %% [markdown]\n# > `lora-1` outdated\n\n"
    text += "# %% [markdown]\n# ## Exercises\n"
    new = quoted(text, "04_lora.py")
    assert quoted(new, "04_lora.py") == new and "outdated" not in new
    assert re.search(r"x = 1\n\n# %% \[markdown\]\n# > `lora-10` no extra latency after merging: \*\*holds\*\*", new)
    assert new.endswith("\n\n# %% [markdown]\n# ## Exercises\n") and "`lora-1`" not in new


def test_comparisons_of_a_reason_are_quoted_as_a_list_from_three_on():
    two, three = (register.itemized([f"{name} beside base: better" for name in names]) for names in ("ab", "abc"))
    assert two == "A beside base: better; b beside base: better."
    said = quotation(claims.statements()["lora-8"], register.Verdict("holds", f"As stated: {three} And more.", seeds=5))
    assert said.endswith(
        "**holds**. As stated:\n# >\n# > - a beside base: better.\n# > - b beside base: better.\n# > - c beside base: better.\n"
        "# >\n# > And more. (5 seeds)\n"
    )


def test_what_needs_no_comparison_of_trained_quality_is_tried():
    decided = {"count", "equation", "code"}
    assert {s.id for s in claims.statements().values() if s.kind in decided} <= {*IDS}


@pytest.fixture
def ruleless(monkeypatch):
    """As if nobody had written the rule of rlhf-9."""
    claims.rule_of("rlhf-9")
    monkeypatch.delitem(register.RULES, "rlhf-9")


def test_a_statement_without_a_rule_is_not_tried(ruleless):
    assert claims.rule_of("rlhf-9") is None and claims.judge("rlhf-9").verdict == UNTRIED
    with pytest.raises(KeyError):
        claims.judge("lora-99")


@pytest.mark.parametrize(("id", "doc", "message"), [
    ("lora-99", "Holds if so.", "there is no statement 'lora-99'"),
    ("lora-6", "Holds if so.", "lora-6 has a rule already: example"),
    ("rlhf-9", None, "the rule of rlhf-9 must state itself"),
    ("rlhf-9", "It holds.", "the rule of rlhf-9 must state itself"),
])  # fmt: skip
def test_what_is_no_rule_is_refused(ruleless, id, doc, message):
    claims.rule_of("lora-6")

    def rule():
        return Verdict(HOLDS, "So it is.")

    rule.__doc__ = doc
    with pytest.raises(ValueError, match=message):
        claims.claim(id, lesson="04_lora.py", section="1")(rule)


def test_a_rule_stands_in_its_section_s_module(ruleless):
    def rule():
        """Holds if so."""

    rule.__module__ = "minipeft.claims.lora"
    with pytest.raises(ValueError, match=r"the rule of rlhf-9 belongs into minipeft\.claims\.rlhf"):
        claims.claim("rlhf-9", lesson="11_reward_hacking.py", section="1")(rule)
    assert "rlhf-9" not in register.RULES


def test_a_verdict_is_one_of_five():
    with pytest.raises(ValueError, match="verdict must be one of holds, holds if, does not hold here"):
        Verdict("true", "So it is.")


def test_what_takes_an_extra_that_is_missing_cannot_be_tested(monkeypatch):
    def rule():
        """Holds if so."""
        raise ImportError("it takes the package vaderSentiment")

    monkeypatch.setitem(register.RULES, "lora-6", register.Rule("lora-6", "", "", rule))
    verdict = claims.judge("lora-6")
    assert (verdict.verdict, verdict.because) == (UNTESTABLE, "it takes the package vaderSentiment.")


def test_cases_make_a_verdict():
    assert [graded(dict(enumerate(cases))) for cases in ((True, True), (True, False), (False, False))] == [HOLDS, IF, NOT]
    cases = {"7B": True, "70B": False, "the base": True}
    assert (those(cases), those(cases, False)) == ("7B and the base", "70B")
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["none", "a", "a and b", "a, b and c"]


def test_a_measured_number_has_student_s_interval():
    number = measured("x", [1.0, 2.0, 3.0], "times")
    half = 4.302652729911275 / 3**0.5  # t of 2 degrees of freedom, times s / sqrt(n)
    assert number.value == 2 and (number.low, number.high) == pytest.approx((2 - half, 2 + half))
    assert measured("x", [1.0]) == Number("x", 1.0)


# --------------------------------------------------------------------------------------- rules that compute in place

ALL = dict.fromkeys
OTHERWISE = {  # id -> (what the rule calls, what that gives in its place, the verdict then)
    "full-1": ("full._tuned", lambda: (0.5, 0.5, 0.1), NOT),
    "full-6": ("full.method_lines", lambda: {"lora": 3, "ia3": 4}, NOT),
    "full-8": ("full.bytes_on_disk", lambda save: 1000, NOT),
    "full-9": ("accounting.memory.memory_ledger", lambda *a, **k: SimpleNamespace(
        held={"gradients": 1, "optimizer states": 0, "trained weights": 2}, model_states=3), NOT),
    "full-11": ("full.PRICE", 1000.0, HOLDS),
    "peft-1": ("peft.bytes_on_disk", iter([5, 6]).__next__, NOT),
    "peft-2": ("peft.costs.memory", lambda *a: (10, 10), NOT),
    "lora-1": ("minipeft.peft.lora.LoraLinear.delta_weight", lambda self: np.zeros((96, 64), np.float32), NOT),
    "lora-5": ("lora.recompute", lambda row: -1.0, IF),
    "lora-9": ("lora.recompute", lambda row: 0.5, NOT),
    "adapter-2": ("adapters.moved", lambda before, after: ALL(before, 1.0), NOT),
    "soft-1": ("soft_prompts._difference", lambda a, b: 1.0, NOT),
    "soft-2": ("soft_prompts._difference", lambda a, b: 1.0, NOT),
    "soft-4": ("soft_prompts.elements", lambda shapes: 1, NOT),
    "soft-5": ("soft_prompts._difference", lambda a, b: 1.0, NOT),
    "soft-6": ("soft_prompts._difference", lambda a, b: 1.0, IF),
    "qlora-1": ("qlora.moved", lambda before, after: ALL(before, 1.0), NOT),
    "qlora-2": ("qlora.memory_ledger", lambda *a, **k: SimpleNamespace(held={"frozen weights": 10**13}), NOT),
    "qlora-3": ("qlora.footprints", lambda ids: [], NOT),
    "inst-2": ("instruction.alpaca", lambda record: [Turn((record.output,), (record.instruction,))], NOT),
    "rlhf-1": ("rlhf.policy_loss", lambda new, *a: (new * 0).sum(), NOT),
    "rlhf-2": ("rlhf.moved", lambda before, after: ALL(before, 1.0), NOT),
    "rlhf-3": ("rlhf.reward_loss", lambda a, b: mp.Tensor(np.zeros(())), IF),
    "rlhf-4": ("rlhf.shaped_rewards", lambda *a: np.zeros((16, 2)), IF),
    "rlhf-6": ("rlhf.EPOCHS", 0, NOT),
    "which-4": ("which.count_parameters", lambda *a: SimpleNamespace(stored=1), NOT),
    "which-5": ("which.CARD_SIZES", [1], NOT),
}  # fmt: skip


def place(name: str) -> str:
    """A name as monkeypatch takes it."""
    return name if name.startswith("minipeft.") else f"minipeft.{'' if name.startswith('accounting.') else 'claims.'}{name}"


@pytest.mark.parametrize("id", OTHERWISE)
def test_a_rule_comes_out_otherwise_where_what_it_computes_is_another(id, monkeypatch):
    rule, (name, value, expected) = claims.rule_of(id), OTHERWISE[id]
    if id == "peft-1":
        sizes = iter([5, 6])
        value = lambda save: next(sizes)  # noqa: E731
    monkeypatch.setattr(place(name), value)
    assert rule.judge().verdict == expected


@pytest.mark.parametrize("id", ["lora-6", "adapter-3", "soft-3"])
def test_a_count_comes_from_the_built_model(id, monkeypatch):
    rule = claims.rule_of(id)
    monkeypatch.setattr(mp, "PeftModel", lambda *a, **k: SimpleNamespace(get_nb_trainable_parameters=lambda: (7, 9)))
    assert rule.judge().verdict == NOT


def test_the_printed_layer_would_hold_if_it_were_repaired(monkeypatch):
    from minipeft.claims import lora

    right = lora.LAYER.replace("alpha / rank", "16 / rank").replace("# frozen", "; self.W.requires_grad_(False)")
    monkeypatch.setattr(lora, "LAYER", right.replace("in_features))\n        self.B", "in_features) / 27)\n        self.B"))
    assert claims.judge("lora-4").verdict == HOLDS
    monkeypatch.setattr(lora, "LAYER", right)
    assert claims.judge("lora-4").verdict == IF, "A is still too large"


def test_an_adapter_that_computes_something_else_fails_its_equation(monkeypatch):
    from minipeft.peft.bottleneck import NON_LINEARITIES

    monkeypatch.setitem(NON_LINEARITIES, "relu", NON_LINEARITIES["silu"])
    assert claims.judge("adapter-1").verdict == NOT


def test_the_traps_are_counted(monkeypatch):
    before = claims.judge("qlora-6")
    assert before.verdict == IF
    from minipeft.quant import nf4

    whole = nf4.quantize_scales

    def worse(c):
        codes, c2, mean = whole(c)
        return codes, c2, mean + 0.01

    monkeypatch.setattr(nf4, "quantize_scales", worse)
    assert claims.judge("qlora-6").effect.value == before.effect.value - 1, "the library's own scales are as wrong"


def test_every_rule_in_place_was_made_to_come_out_otherwise():
    tested = {*OTHERWISE, "lora-6", "adapter-3", "soft-3", "lora-4", "adapter-1", "qlora-6"}
    assert tested == {*IN_PLACE}


def test_lines_of_code_are_those_that_hold_code():
    from minipeft.claims.full import LOOP, lines_of_code

    assert lines_of_code(LOOP) == 5
    source = '"""Title.\n\nMore.\n"""\n# why\n\ndef f(x):\n    """Doc."""\n    y = (x +\n         1)\n    return """a\nb"""\n'
    assert lines_of_code(source) == 5


# ------------------------------------------------------------------------------------------------ rules that read rows


def changed(rows, **numbers):
    """The rows with some numbers computed from their own: name -> a function of the row."""
    return [row | {name: value(row) for name, value in numbers.items()} for row in rows]


# experiments whose rules are given made-up rows in test_claims_league, _instruction, _adapters, _chain, _constitution and _mechanisms
MADE_UP = {
    "league", "following", "knowledge", "components", "units", "chain", "constitution",
    "intrinsic_dimension", "memorization", "width", "speed",
}  # fmt: skip
ROWS = {  # id -> [(changes, the verdict then)]
    "full-2": [
        ({"after": lambda r: [i + 2 * (not r["zeroed"]) for i in range(9)]}, NOT),
        ({"after": lambda r: [i + r["seed"] for i in range(9)]}, HOLDS),
        ({"after": lambda r: [i + (not r["zeroed"] and r["rate"] > 1e-4) for i in range(9)]}, IF),
    ],
    "lora-10": [
        ({"merged": lambda r: r["base"]}, HOLDS),
        ({"merged": lambda r: 1.2 * r["base"]}, NOT),
        ({"merged": lambda r: (1 + 0.05 * (r["width"] > 128)) * r["base"], "copy": lambda r: r["base"]}, IF),
        ({"merged": lambda r: 1.05 * r["base"], "copy": lambda r: 1.05 * r["base"]}, HOLDS),
        ({"merged": lambda r: (1 + r["seed"]) * r["base"]}, UNTESTABLE),
    ],
    "adapter-7": [
        ({"adapters": lambda r: 1.1 * r["base"]}, HOLDS),
        ({"adapters": lambda r: r["base"]}, NOT),
        ({"adapters": lambda r: (1 + 0.2 * (r["width"] > 128)) * r["base"]}, IF),
    ],
    "lora-11": [
        ({"mixed": lambda r: 0.5 * r["one_by_one"]}, HOLDS),
        ({"mixed": lambda r: 1.5 * r["one_by_one"]}, NOT),
        ({"difference": lambda r: 1.0}, NOT),
        ({"mixed": lambda r: (0.5 + (r["phase"] == "training")) * r["one_by_one"]}, IF),
    ],
    "adapter-5": [
        ({"set": lambda r: 0.01 * r["token"]}, HOLDS),
        ({"set": lambda r: 0.5 * r["token"]}, IF),
        ({"set": lambda r: 2 * r["token"]}, NOT),
        ({"difference": lambda r: 1.0}, NOT),
    ],
    "soft-7": [
        ({"losses": lambda r: [i + 0.1 * (r["taken"] > 0) for i in range(9)]}, HOLDS),
        ({"losses": lambda r: [1.0] * 9}, NOT),
        ({"losses": lambda r: [i + 0.1 * (r["taken"] > 100) for i in range(9)]}, IF),
    ],
    "qlora-4": [
        ({"qlora": lambda r: 1.1 * r["lora"]}, HOLDS),
        ({"qlora": lambda r: 2 * r["lora"]}, NOT),
        ({"qlora": lambda r: (1 + 0.1 * r["seed"]) * r["lora"]}, NOT),
        ({"qlora": lambda r: 0.9 * r["lora"]}, NOT),
        ({"qlora": lambda r: (1.1 + (r["width"] > 256)) * r["lora"]}, IF),
    ],
}


@pytest.mark.parametrize(("id", "changes", "expected"), [(id, *case) for id, cases in ROWS.items() for case in cases])
def test_other_rows_give_another_verdict(id, changes, expected):
    rows = claims.rule_of(id).experiment.rows()
    assert claims.judge(id, changed(rows, **changes)).verdict == expected


def test_every_rule_that_reads_rows_has_them_all_and_was_given_others():
    assert {*ROWS} == {id for id in EXPERIMENTS if EXPERIMENTS[id].name not in MADE_UP and has_rows(id)}
    for id in ROWS:
        experiment = claims.rule_of(id).experiment
        assert len(experiment.rows()) == len(experiment.settings) and experiment.path().parent == register.ROWS


@pytest.mark.parametrize("path", [*register.ROWS.glob("*.jsonl"), *LESSONS.glob("results/*.jsonl")], ids=lambda path: path.stem)
def test_a_shipped_row_says_which_version_of_the_package_and_of_the_base_it_is_of(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(row.get("minipeft") for row in rows)
    if path.stem == "growth" or path == LESSONS / "results" / "speed.jsonl":
        return  # random weights
    bases = {row.get("version") or row["base"] for row in rows}
    assert bases == {"SmolLM2-135M-Instruct" if path.stem in ("smollm2", "smollm2_speed", "13_real_llm") else version()}


def test_rows_that_are_not_all_there_are_no_verdict():
    rule = claims.rule_of("soft-7")
    verdict = claims.judge("soft-7", rule.experiment.rows()[:-1])
    assert (verdict.verdict, verdict.because) == (UNTRIED, "lost_context.jsonl has 4 runs, and lacks 1.")


def test_an_experiment_keeps_its_rows_and_compares_them(tmp_path):
    calls = []

    def run(seed):
        calls.append(seed)
        return {"loss": seed + 0.5, "curve": [1.0, seed + 2.0], "date": "today"}

    experiment = Experiment("mine", run, lambda: mp.grid(seed=range(3)))
    assert experiment.rows(tmp_path) == []
    rows = experiment.compute(tmp_path, 1, lambda line: None)
    assert experiment.compute(tmp_path, 1, lambda line: None) == rows == experiment.rows(tmp_path) and calls == [0, 1, 2]
    assert experiment.path(tmp_path) == tmp_path / "mine.jsonl"
    other = [row | {"loss": row["loss"] * 1.01, "date": "tomorrow", "source_digest": "0"} for row in rows]
    assert experiment.differences(rows, other) == [], "within the tolerance"
    other[1]["curve"] = [1.0, 3.5]
    other[2]["loss"] = float("nan")
    assert experiment.differences(rows, other) == [
        "run 1, curve: [1.0, 3.5], and [1.0, 3.0] in the package", "run 2, loss: nan, and 2.5 in the package",
    ]  # fmt: skip
    assert Experiment("mine", run, [], timed=True).differences(rows, other) == []


def test_times_are_taken_one_by_one(tmp_path):
    timed = Experiment("times", lambda seed: {"process": os.getpid()}, lambda: mp.grid(seed=range(2)), timed=True)
    assert {row["process"] for row in timed.compute(tmp_path, 2, lambda line: None)} == {os.getpid()}


def test_rows_are_drawn_each_of_another_file_and_none_of_times(tmp_path, monkeypatch):
    def experiment(name, run, **options):
        one = Experiment(name, run, lambda: mp.grid(seed=range(3)), **options)
        one.compute(tmp_path, 1, lambda line: None)
        return one

    a, again = experiment("a", lambda seed: {"loss": 1.0 + seed}), experiment("b", lambda seed: {"loss": 2.0 + seed})
    times = experiment("c", lambda seed: {"seconds": 1.0}, timed=True)
    monkeypatch.setattr(Experiment, "path", lambda self, store=None: tmp_path / f"{self.name}.jsonl")
    assert {name for name, _ in register.recomputed([a, again, times], 2, 0)} == {"a", "b"}
    assert [name for name, _ in register.recomputed([a], 3, 0)] == ["a"] * 3
    drawn = [register.recomputed([a, again], 1, seed) for seed in range(8)]
    assert {name for ((name, _),) in drawn} == {"a", "b"} and not any(lines for ((_, lines),) in drawn)
    ((name, (line,)),) = register.recomputed([replace(a, run=lambda seed: {"loss": 9.0 - seed})], 1, 0)
    assert name == "a" and "in the package" in line
    assert register.recomputed([times], 3, 0) == []


# --------------------------------------------------------------------------------------------- what computes the rows


@pytest.fixture
def once(monkeypatch):
    """Alternatives are called once each, so that a row of times costs little; the times are 1, 2, ..."""
    from minipeft.claims import adapters, decoding, lora, qlora

    def in_turns(alternatives):
        return {name: (call(), i)[1] for i, (name, call) in enumerate(alternatives.items(), 1)}

    for module in (adapters, decoding, lora, qlora):
        monkeypatch.setattr(module, "in_turns", in_turns, raising=False)


def test_the_printed_loop_adds_gradients_up():
    from minipeft.claims.full import loop

    rows = [loop(zeroed, 1e-3, seed=0, steps=3, batch_size=2, tested=4) for zeroed in (True, False)]
    assert rows[0]["before"] == rows[1]["before"] and rows[0]["after"] != rows[1]["after"] and len(rows[0]["after"]) == 4
    one, other = (loop(zeroed, 1e-3, seed=0, steps=1, batch_size=2, tested=4) for zeroed in (True, False))
    assert one == other


def test_rows_of_times_have_what_their_rules_read(once):
    from minipeft.claims import adapters, decoding, lora, qlora

    keys = {"processor", "threads", "date"}
    assert decoding.times(128, 1, 0).keys() == keys | {"base", "copy", "unmerged", "merged", "adapters"}
    assert qlora.step_times(128, 0, layers=1, rows=1, length=4).keys() == keys | {"lora", "qlora"}
    swapped = adapters.swap(0)
    assert swapped["difference"] == 0 and 0 < swapped["adapter_bytes"] < swapped["model_bytes"]
    for phase in ("training", "generation"):
        row = lora.mixed_batch(phase, 0, tokens=2)
        assert row["difference"] < 1e-5 and row["base_bytes"] == 4 * 1443456
        adapter = mp.get_peft_model(decoding.random_model(128), mp.LoraConfig(r=8, target_modules="all-linear"))
        assert row["adapter_bytes"] == 4 * adapter.get_nb_trainable_parameters()[0]


def test_alternatives_are_timed_in_turns(monkeypatch):
    clock, order = iter(range(100000)), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    alternatives = {name: lambda name=name: order.append(name) for name in "ab"}
    assert timing.in_turns(alternatives, seconds=0, least=3) == {"a": 1, "b": 1}
    assert "".join(order) == "ab" * 4
    assert timing.processor() and timing.machine()["date"][:2] == "20"


def test_intervals_are_steady_within_ten_percent():
    assert timing.steady([Number("x", 1.0, "", 0.95, 1.05)])
    assert not timing.steady([Number("x", 1.0, "", 0.95, 1.05), Number("x", 1.0, "", 0.85, 1.15)])
