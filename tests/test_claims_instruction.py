"""Following instructions, and knowing facts: what is asked, of whom, and the rules on made-up rows, both ways."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from models import unlearned

import minipeft as mp
from minipeft.claims import following, inputs, knowledge, teacher
from minipeft.claims.following import KINDS, Following, asked, drawn, prompt, put
from minipeft.claims.knowledge import Knowledge, facts_of, keys
from minipeft.claims.protocol import SEEDS, version
from minipeft.claims.register import HOLDS, IF, NOT, UNTESTABLE, UNTRIED, rule_of
from minipeft.experiments.rows import described
from minipeft.experiments.shipped import base
from minipeft.text.corpora import general_corpora
from minipeft.text.instructions import HELD_OUT, TASKS, TRAINED, pairs

ITEMS = 200


@pytest.fixture
def short(monkeypatch):
    """A search for a rate ends after three; the model is small."""
    for module in (following, knowledge):
        monkeypatch.setattr(module, "LEAST", 100.0)
        monkeypatch.setattr(module, "base", unlearned)


def shares(share: float, seeds: int = 5, items: int = ITEMS) -> list[list[int]]:
    """[seeds, items], of which a share is 1, with some luck of the seeds."""
    return [(np.arange(items) < items * share + seed % 2).astype(int).tolist() for seed in range(seeds)]


# ---------------------------------------------------------------------------------------------- what is asked, of whom


def test_the_same_pairs_are_asked_in_any_words_and_none_is_trained():
    one, other = (drawn(TRAINED, "test", 5, 0, words) for words in ("phrasings", "held_out_phrasings"))
    assert [(q.task, q.pair) for q in one] == [(q.task, q.pair) for q in other]
    assert len(one) == 5 * len(TRAINED)
    trained = {q.pair[0] for q in drawn(TRAINED, "train", 100, 1)}
    assert not trained & {q.pair[0] for kind in KINDS for q in asked("tuned", kind, 86)}
    assert {q.task for q in asked("tuned", "tasks", 2)} == {name for name in HELD_OUT if TASKS[name].check}


def test_shuffled_records_have_the_same_instructions_but_not_their_own():
    questions = drawn(TRAINED, "train", 30, 1)
    shuffled = put(questions, "shuffled", 1)
    assert sorted(q.phrasing for q in shuffled) == sorted(q.phrasing for q in questions)
    assert [q.pair for q in shuffled] == [q.pair for q in questions]
    own = np.mean([q.phrasing in TASKS[q.task].phrasings for q in shuffled])
    assert own == pytest.approx(1 / len(TRAINED), abs=0.1)


def test_a_prompt_has_the_instruction_the_input_and_shots_of_the_same_task():
    question = following.Question("synonym", ("stone (noun)", "rock"), "Name a synonym.")
    assert prompt(question, "tuned") == "Name a synonym.\nstone (noun)\nAnswer:"
    assert prompt(put([question], "bare", 0)[0], "bare") == "stone (noun)\nAnswer:"
    few = prompt(question, "few-shot")
    assert few.count("Name a synonym.\n") == 1 + following.SHOTS
    assert few.endswith("\n\nName a synonym.\nstone (noun)\nAnswer:")
    shown = [part.split("\n")[1] for part in few.split("\n\n")[:-1]]
    assert {*shown} <= {input for input, _ in pairs("synonym", "train")}


def test_a_teacher_answers_each_question_in_its_place_as_the_base_is_asked(monkeypatch):
    questions, seen = drawn(TRAINED, "train", 3, 1), []
    monkeypatch.setattr(teacher, "write", lambda prompts: seen.extend(prompts) or [p.rpartition("\n\n")[2] for p in prompts])
    taught = put(questions, "taught", 1)
    assert [(q.task, q.pair[0], q.phrasing) for q in taught] == [(q.task, q.pair[0], q.phrasing) for q in questions]
    assert [q.pair[1] for q in taught] == [q.prompt for q in questions]
    assert sorted(seen) == sorted(prompt(q, "few-shot") for q in questions)
    following.answered.cache_clear()
    monkeypatch.setattr(teacher, "write", lambda prompts: ["noun"] * len(prompts))
    nouns = np.mean([q.pair[1] == "noun" for q in questions if q.task == "part-of-speech"])
    checked = [q.task for q in questions if TASKS[q.task].check]
    assert following.written_right(questions) == pytest.approx(nouns * checked.count("part-of-speech") / len(checked))
    following.answered.cache_clear()


def test_one_constant_answer_is_right_as_often_as_the_most_frequent():
    questions = asked("taught", "inputs", 768)
    found, tasks = np.array(following.constant(questions)), np.array([q.task for q in questions])
    assert found[tasks == "source"].mean() == pytest.approx(1 / 3, abs=1e-6), "as many of each book"
    nouns = np.mean([q.pair[1] == "noun" for q in questions if q.task == "part-of-speech"])
    assert found[tasks == "part-of-speech"].mean() == nouns > 0.5


def test_what_prompts_begin_with_is_computed_once_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(inputs, "smollm2", base)
    monkeypatch.setattr(teacher, "smollm2", base)
    teacher.line_breaks.cache_clear()
    model, tokenizer = base()
    rows = [tokenizer.encode(f"And the king said to the {who}") for who in ("man", "people of the land", "man and his son")]
    for group in (rows, [rows[0][3:], rows[1]]):  # with and without a common beginning
        given = inputs.prefix_cached(group)
        with mp.no_grad():
            last = model.backbone(**given).data[:, -1]
            alone = [model.backbone(np.array([row])).data[0, -1] for row in group]
        np.testing.assert_allclose(last, alone, atol=1e-4)
    prompts = [tokenizer.decode(row) for row in rows]
    written = [mp.ask(model, tokenizer, prompt, max_new_tokens=teacher.TOKENS)[0] for prompt in prompts]
    assert teacher.write(prompts) == [text.partition("\n")[0].strip() for text in written]
    teacher.line_breaks.cache_clear()


def test_the_same_input_and_answer_stand_under_the_instructions_of_tasks_with_such_inputs():
    for kind, (tasks, words) in KINDS.items():
        for own in following.alternatives(kind, 2):
            assert len({q.pair for q in own}) == 1 and len({q.phrasing for q in own}) == len(own) > 1
            owners = [[task for task in tasks if q.phrasing in getattr(TASKS[task], words)] for q in own]
            assert owners[0] == [own[0].task] and all(owner != [own[0].task] for owner in owners[1:])
            assert len({"{input}" in q.phrasing for q in own}) == 1, "in the same form"


def test_enough_questions_of_each_kind_of_new():
    n = Following("base").tested
    assert all(len(asked("base", kind, Following("base").answered)) > 500 for kind in KINDS)
    books = Counter(q.answer for q in asked("base", "inputs", Following("base").answered) if q.task == "source")
    assert len(books) == 3 and len({*books.values()}) == 1, "as many of each: one constant answer is right in a third"
    found = {kind: following.alternatives(kind, n) for kind in KINDS}
    assert all(len(of) > 500 for of in found.values())
    tasks = [own[0].task for own in found["inputs"]]
    by_hand = {"define": 1 / 3, "use": 1 / 3, "synonym": 1 / 3, "rewrite": 1 / 2, "continue": 1 / 2}
    assert following.guess("inputs", n) == pytest.approx(np.mean([by_hand[task] for task in tasks]))
    assert following.guess("tasks", n) == pytest.approx(1 / 3)


def test_absent_facts_are_in_no_text_of_the_base_and_present_ones_are():
    text = {name: "\n".join(documents) for name, documents in general_corpora("train").items()}
    for kind, corpus in (("define", "wordnet"), ("continue", "king-james")):
        present, absent = (facts_of(kind, where, 20) for where in ("present", "absent"))
        assert all(output in text[corpus] for _, output in present)
        assert not any(f"{input}{': ' if kind == 'define' else ' '}{output}" in text[corpus] for input, output in absent)


def test_a_fact_is_known_by_its_word_among_words_that_are_tested_too():
    facts = facts_of("define", "absent", 60)
    for (input, output), given in zip(facts, keys(facts)):
        assert given[0] == input and len({*given}) == knowledge.CHOICES
        assert {*given} <= {word for word, _ in facts}
        assert all(dict(facts)[word] != output for word in given[1:])
    nouns = [given for given in keys(facts) if given[0].endswith("(noun)")]
    assert all(word.endswith("(noun)") for given in nouns for word in given)


def test_both_arms_are_tuned_on_as_many_records_of_each_task():
    these, others = (knowledge.lessons(Knowledge(arm, facts=10), 1) for arm in ("these", "others"))
    assert [q.task for q in these] == [q.task for q in others]
    facts = {fact for kind in knowledge.KINDS for where in knowledge.SPLITS for fact in facts_of(kind, where, 10)}
    assert {q.pair for q in these} >= facts
    assert not {q.pair for q in others if q.task in knowledge.KINDS} & facts


# ------------------------------------------------------------------------------------------------------------ the cells


def test_a_cell_of_following(short):
    small = {"answered": 2, "tested": 2, "steps": 2, "batch_size": 7, "validation": 1, "seeds": (1, 2)}
    base, tuned = (following.run(Following(arm, **small)) for arm in ("base", "shuffled"))
    assert {kind: np.array(values).shape for kind, values in tuned["nll"].items()} == {
        "inputs": (2, 8), "phrasings": (2, 8), "tasks": (2, 4),
    }  # fmt: skip
    assert len(base["answers"]["tasks"]) == 1 and "rate" not in base
    assert [len(base["followed"][kind][0]) for kind in KINDS] == [10, 10, 6]
    assert tuned["rate"] in dict(tuned["rates"])
    assert sum(tuned["nll"]["inputs"][0]) < sum(base["nll"]["inputs"][0]), "it has learned something"
    assert described(Following("base"))["base"] == version()


def test_answered_questions_are_of_no_fact_that_is_tested():
    for kind in knowledge.KINDS:
        told = knowledge.shown(kind)
        assert told.count("Answer:") == following.SHOTS and told.endswith("\n\n")
        assert not any(output in told for where in knowledge.SPLITS for _, output in facts_of(kind, where, 256))


def test_a_cell_of_knowledge(short, monkeypatch):
    monkeypatch.setattr(knowledge, "READ", 4)
    small = {"facts": 4, "validation": 1, "seeds": (1,)}
    base, tuned = (knowledge.run(Knowledge(arm, **small)) for arm in ("base", "these"))
    assert base["known"].keys() == tuned["known"].keys() and len(base["known"]) == 8
    assert all(np.array(values).shape == (1, 4) for values in tuned["known"].values())
    assert base["read"].keys() == base["shown"].keys() == {"define, present", "define, absent", "continue, present", "continue, absent"}


# ------------------------------------------------------------------------------------------------------------ the rules


def following_rows(id: str, right: dict[str, dict[str, float]]) -> list[dict]:
    """Rows whose arms are right so often in each kind."""
    rows = []
    for one in rule_of(id).experiment.settings:
        seeds = 1 if one.arm in following.UNTUNED else 5
        answers = {kind: shares(right[one.arm][kind], seeds) for kind in KINDS}
        nll = {kind: [[3.0 - r for r in own] for own in of] for kind, of in answers.items()}
        tasks = {kind: ["source", "use"] * (ITEMS // 2) for kind in KINDS}
        made = {"tasks": tasks, "tokens": {kind: [2] * ITEMS for kind in KINDS}, "answers": answers, "nll": nll}
        made |= {"guess": everywhere(1 / 3)} if one.arm in following.INSTRUCTED else {}
        if one.arm == "taught":
            made |= {"written": [0.4, 0.42, 0.41, 0.39, 0.4], "constant": {kind: shares(0.3)[0] for kind in KINDS}}
        rows.append(described(one) | made | ({"followed": answers} if one.arm in following.INSTRUCTED else {}))
    return rows


def everywhere(share: float) -> dict[str, float]:
    return dict.fromkeys(KINDS, share)


LOW, HIGH = everywhere(0.1), everywhere(0.5)


@pytest.mark.parametrize("id", ["inst-1", "which-6"])
def test_instructions_are_followed_where_their_words_make_the_difference(id):
    arms = ("base", "few-shot", "shuffled", "bare")
    followed = {**dict.fromkeys(arms, LOW), "tuned": HIGH}
    rule = rule_of(id)
    found = rule.judge(following_rows(id, followed))
    assert (found.verdict, found.seeds, found.items) == (HOLDS, 5, ITEMS)
    assert found.effect.low > 0.3
    for alike in (LOW, HIGH):
        assert rule.judge(following_rows(id, dict.fromkeys((*arms, "tuned"), alike))).verdict == NOT
    trained = rule.judge(following_rows(id, followed | {"tuned": HIGH | {"tasks": 0.1}}))
    assert trained.verdict == IF
    assert "right answers, tuned beside base, new tasks: equal" in trained.because
    form = rule.judge(following_rows(id, dict.fromkeys((*arms, "tuned"), HIGH) | {"base": LOW}))
    assert form.verdict == IF, "the form of the input tells the task: better than the base, and no better than the control"
    names = {n.name for n in found.evidence}
    assert names >= {"tuned, new tasks", "base, new inputs, source", "loss, tuned over base, new inputs"}
    assert "instructions followed, tuned over guess, new tasks" in names
    assert ("instructions followed, tuned over shuffled, new tasks" in names) is (id == "inst-1")
    assert ("- new inputs: tuned 0." in found.because and "a guess 0.333." in found.because) is (id == "inst-1")


def test_a_teacher_helps_where_its_pupil_is_better_than_the_base_and_not_worse_than_people_s():
    rule = rule_of("inst-3")
    made = {"base": LOW, "taught": HIGH, "tuned": HIGH}
    found = rule.judge(following_rows("inst-3", made))
    assert (found.verdict, found.seeds, found.items) == (HOLDS, 5, ITEMS)
    assert found.effect.low > 0.1 and found.effect.name == "taught over constant, new inputs"
    assert "right in 0.404" in found.because
    worse = rule.judge(following_rows("inst-3", made | {"tuned": everywhere(0.7)}))
    assert worse.verdict == IF and "taught beside tuned, new phrasings: worse" in worse.because
    assert rule.judge(following_rows("inst-3", made | {"base": HIGH, "taught": LOW, "tuned": HIGH})).verdict == NOT
    assert "clearly above it in source and use (new inputs) and source and use (new phrasings) alone" in found.because
    by_rote = rule.judge(following_rows("inst-3", made | {"taught": everywhere(0.2)}))
    assert by_rote.verdict == NOT and "taught beside constant, new inputs: worse" in by_rote.because.lower()
    rows = following_rows("inst-3", made)
    rows[1]["answers"]["inputs"][2] = None
    assert rule.judge(rows).verdict == UNTESTABLE
    assert not rule.experiment.affordable({"arm": "taught"}) and rule.experiment.affordable({"arm": "tuned"})


def test_what_diverged_or_lacks_an_arm_is_no_verdict():
    rows = following_rows("inst-1", dict.fromkeys(("base", "shuffled", "tuned"), HIGH))
    assert rule_of("inst-1").judge(rows[:-1]).verdict == UNTRIED
    rows[-1]["answers"]["tasks"][2] = None
    found = rule_of("inst-1").judge(rows)
    assert found.verdict == UNTESTABLE and "diverged" in found.because
    assert rule_of("inst-1").judge([row | {"base": "another"} for row in rows]).verdict == UNTRIED, "another base's rows"


def knowledge_rows(read: float, base_text: float, base_asked: float, others: float, these: float) -> list[dict]:
    """Rows with these shares: of facts read over others, known to the base in its own text and when asked, and known after tuning."""
    rows = []
    for one in rule_of("inst-4").experiment.settings:
        share = {"base": base_asked, "others": others, "these": these}[one.arm]
        seeds = 1 if one.arm == "base" else 5
        cells = [(kind, where, way) for kind in knowledge.KINDS for where in knowledge.SPLITS for way in knowledge.WAYS]
        known = {", ".join(c): shares(base_text if c[2] == "text" else share, seeds) for c in cells}
        cells = [(kind, where) for kind in knowledge.KINDS for where in knowledge.SPLITS]
        own = {", ".join(c): shares(0.5 + read * (c[1] == "present"), 1)[0] for c in cells}
        rows.append(described(one) | {"known": known} | ({"read": own, "shown": own} if one.arm == "base" else {}))
    return rows


def test_tuning_aligns_what_was_there_or_teaches():
    rule = rule_of("inst-4")
    aligns = rule.judge(knowledge_rows(0.4, 0.6, 0.3, 0.6, 0.6))
    assert aligns.verdict == HOLDS
    teaches = rule.judge(knowledge_rows(0.4, 0.6, 0.3, 0.6, 0.9))
    assert teaches.verdict == IF
    assert "it does not learn them: not so" in teaches.because
    beyond = rule.judge(knowledge_rows(0.4, 0.4, 0.3, 0.6, 0.6))
    assert "no more of them than the base in its own text: not so" in beyond.because
    assert rule.judge(knowledge_rows(-0.4, 0.2, 0.6, 0.6, 0.9)).verdict == NOT
    assert teaches.effect.low > 0.2 and teaches.seeds == len(SEEDS)


def test_two_samples_of_facts_are_apart_by_their_own_spreads():
    found = knowledge.apart([1, 0, 1, 1], [0, 0, 1, 0])
    assert found.value == 0.5
    assert found.high - found.value == pytest.approx(2.446912 * (0.25 / 4 + 0.25 / 4) ** 0.5, rel=1e-5)
