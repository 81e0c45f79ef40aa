"""The instruction tasks: what they ask, that answers are right, and that nothing of a test was trained."""

from collections import Counter
from itertools import combinations

import pytest

from minipeft.text.corpora import bible, wordnet
from minipeft.text.instructions import HELD_OUT, TASKS, TRAINED, instructions, is_right, pairs, phrase
from minipeft.text.splits import SPLITS

every_task = pytest.mark.parametrize("name", TASKS)


def test_there_are_several_tasks_and_phrasings():
    assert len(TRAINED) >= 6 and len(HELD_OUT) >= 3 and set(TRAINED) | set(HELD_OUT) == set(TASKS)
    for task in TASKS.values():
        assert len(task.phrasings) in (0, 4) and len(task.held_out_phrasings) == 2
        asked = (*task.phrasings, *task.held_out_phrasings)
        assert len(set(asked)) == len(asked)
        assert sum("{input}" in phrasing for phrasing in task.held_out_phrasings) == 1  # both of Alpaca's forms


def test_no_phrasing_of_a_test_is_trained():
    trained = {phrasing for task in TASKS.values() for phrasing in task.phrasings}
    asked = [phrasing for task in TASKS.values() for phrasing in task.held_out_phrasings]
    assert not trained & set(asked) and len(set(asked)) == len(asked)


@every_task
def test_no_input_and_no_pair_is_on_two_sides(name):
    sides = {split: pairs(name, split) for split in SPLITS}
    assert len(sides["train"]) > 1000 and min(len(sides["validation"]), len(sides["test"])) > 80
    inputs = {split: {input for input, _ in found} for split, found in sides.items()}
    for split, found in sides.items():
        assert len(inputs[split]) == len(found), "an input has one answer"
        assert all(input.strip() == input and output.strip() == output and output for input, output in found)
    for one, other in combinations(SPLITS, 2):
        assert not inputs[one] & inputs[other]


def test_no_text_of_the_test_side_is_in_any_trained_record():
    """Across tasks too: a verse that is to be rewritten in a test was not continued in training, and so on."""
    trained = {text for name in TRAINED for pair in pairs(name, "train") for text in pair if len(text) > 40}
    for split in ("validation", "test"):
        for name in TASKS:
            shared = [t for pair in pairs(name, split) for t in pair if len(t) > 40 and t in trained]
            # the second half of a verse may recur ("saith the LORD of hosts ..."); its first half, the input, does not
            assert len(shared) <= (0.01 * len(pairs(name, split)) if name == "continue" else 0), (name, shared[:3])


def test_every_pair_is_from_its_own_side_of_the_corpora():
    headwords = {split: {h.lemma for s in wordnet(split) for h in s.headwords} for split in SPLITS}
    verses = {split: {t for v in bible(split) for t in (v.king_james, v.basic_english)} for split in SPLITS}
    for split in SPLITS:
        for name in ("define", "use", "synonym"):
            assert all(input.rpartition(" (")[0] in headwords[split] for input, _ in pairs(name, split))
        for name in ("name", "fill", "synonym"):
            assert all(output in headwords[split] for _, output in pairs(name, split))
        for name in ("rewrite", "archaize"):
            assert all({input, output} <= verses[split] for input, output in pairs(name, split))


@every_task
def test_a_check_accepts_the_answer_and_not_another(name):
    check, found = TASKS[name].check, pairs(name, "test")[:60]
    if check is None:
        return
    assert all(check(input, output, output) for input, output in found)
    assert all(check(input, output, f" {output.upper()}.") for input, output in found)
    assert not any(check(input, output, wrong) for input, output in found for wrong in ("", "zebra crossing"))


@every_task
def test_the_answer_that_a_record_has_is_right(name):
    for held_out in {False, True} if name in TRAINED else {True}:
        for record in instructions([name], "test", held_out, cap=30):
            if TASKS[name].check is None:
                with pytest.raises(ValueError, match="cannot be right or wrong"):
                    is_right(name, "test", record, record.output)
            else:
                assert is_right(name, "test", record, f" {record.output}.")
                assert not is_right(name, "test", record, "zebra")
    if TASKS[name].check is not None:
        with pytest.raises(ValueError, match=f"none of the task '{name}' on the split 'test'"):
            is_right(name, "test", phrase(("garden", "x"), "Define:"), "x")


def test_what_is_right_by_the_dictionary_is_right():
    synonym, name = TASKS["synonym"].check, TASKS["name"].check
    assert synonym("car (noun)", "auto", "automobile") and not synonym("car (noun)", "auto", "car")
    definition = next(s.definition for s in wordnet("train") if {"car", "auto"} <= {h.lemma for h in s.headwords})
    assert name(definition, "car", "motorcar") and not name(definition, "car", "bicycle")


def test_classes_are_known_and_not_all_the_same():
    classes = Counter(output for _, output in pairs("source", "test"))
    assert len(classes) == 3 and len(set(classes.values())) == 1
    assert set(Counter(o for _, o in pairs("part-of-speech", "test"))) == {"noun", "verb", "adjective", "adverb"}


def test_a_record_is_a_phrasing_with_its_input():
    assert phrase(("chien", "dog"), "Translate.") == ("Translate.", "chien", "dog")
    assert phrase(("chien", "dog"), "Translate {input}, please.") == ("Translate chien, please.", "", "dog")
    by_input = dict(pairs("define", "test"))
    for record in instructions(["define"], "test", cap=50):
        said = [pair for pair in by_input.items() if pair[1] == record.output]
        assert record in {phrase(pair, p) for pair in said for p in TASKS["define"].phrasings}


def test_the_mixture_is_proportional_with_a_cap():
    tasks = ["synonym", "source", "define"]
    sizes = {name: min(len(pairs(name, "validation")), 600) for name in tasks}
    assert sizes["synonym"] < 600 == sizes["source"] == sizes["define"]
    mixed = instructions(tasks, "validation", cap=600)
    alone = {name: instructions([name], "validation", cap=600) for name in tasks}
    of_task = {(record.instruction, record.input): name for name, records in alone.items() for record in records}
    names = [of_task[record.instruction, record.input] for record in mixed]
    assert Counter(names) == sizes
    assert set(names[:30]) == set(tasks), "and shuffled"
    assert mixed == instructions(tasks, "validation", cap=600) != instructions(tasks, "validation", cap=600, seed=1)


def test_held_out_phrasings_ask_about_the_same_inputs():
    known, new = (instructions(["use"], "test", held_out_phrasings=h, cap=40) for h in (False, True))
    assert {record.output for record in known} == {record.output for record in new}
    assert not {record.instruction for record in known} & {record.instruction for record in new}


def test_fewer_phrasings_of_the_same_pairs():
    every, one = (instructions(["use", "define"], "test", cap=40, phrasings=n) for n in (None, 1))
    assert {record.instruction for record in one} == {TASKS[name].phrasings[0] for name in ("use", "define")}
    assert [record.output for record in one] == [record.output for record in every]


def test_what_is_refused():
    with pytest.raises(ValueError, match="the task 'fill' is held out: it has no phrasings to train on"):
        instructions(["fill"], "train")
    with pytest.raises(ValueError, match=r"the instruction tasks are rewrite, continue, .* got 'translate'"):
        instructions(["translate"], "train")
    with pytest.raises(ValueError, match="split must be one of"):
        instructions(["use"], "dev")
