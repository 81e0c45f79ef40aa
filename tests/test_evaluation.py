"""Scores: losses and log-probabilities against a computation by hand, intervals, answers, choices, the shipped items."""

import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from models import build, tokens

import minipeft as mp
from minipeft.autograd.tensor import no_grad
from minipeft.evaluation import Estimate, evaluate, general_cloze, mean, share
from minipeft.text.corpora import general_text
from minipeft.text.datasets import (
    Completion,
    Conversation,
    Document,
    Instruction,
    Message,
    MultipleChoice,
    Preference,
    UnpairedPreference,
)
from minipeft.text.examples import encode_choices, encode_examples
from minipeft.text.templates import alpaca, chatml, custom, plain
from minipeft.train import evaluate as mean_loss
from minipeft.train import example_losses

RECORDS = [
    Completion("Word: dog (noun)\nMeaning:", " an animal"),
    Completion("Word: house (noun)\nMeaning:", " a building in which a family lives"),
    Completion("And God said, Let there be", " light"),
]
QUESTION = MultipleChoice("In the beginning God created the heaven and the", ("dog", "earth", "chair of wood"), 1)


@pytest.fixture(scope="module")
def base():
    return mp.load_base()


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


def logprob(model, ids, start):
    """Σ log p(ids[t] | ids[:t]) for t from start on, from the logits of one text alone."""
    with no_grad():
        logits = model(np.array([ids])).data[0]
    return sum(log_softmax(logits[t - 1])[ids[t]] for t in range(start, len(ids)))


# ------------------------------------------------------------------------------------------------ losses of examples


def padded_examples(rng):
    ids = [tokens(rng, n) for n in (9, 4, 7, 5, 2)]
    return [(own, np.where(np.arange(len(own)) < i, -100, own)) for i, own in enumerate(ids)]  # the last has no label


@pytest.mark.parametrize("size", [1, 2, 5])
def test_example_losses_are_those_of_each_example_alone(xp, rng, size):
    model = build("llama", xp)
    examples = padded_examples(rng)
    nll, counted = example_losses(model, examples, size)
    assert nll.dtype == np.float64 and counted.tolist() == [8, 3, 5, 2, 0]
    host = build("llama")
    expected = [-logprob(host, ids, max(1, int((labels == -100).sum()))) for ids, labels in examples]
    np.testing.assert_allclose(nll, expected, rtol=1e-9, atol=1e-12)
    assert nll.sum() / counted.sum() == pytest.approx(mean_loss(model, examples, size), rel=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        mp.LoraConfig(target_modules="all-linear"),
        mp.PromptTuningConfig(num_virtual_tokens=3),
        mp.PrefixTuningConfig(num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_example_losses_of_a_model_with_an_adapter(rng, config):
    model = mp.get_peft_model(build("llama"), config, seed=1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    nll, counted = example_losses(model, examples := padded_examples(rng)[1:4])
    assert nll.sum() / counted.sum() == pytest.approx(mean_loss(model, examples, 1), rel=1e-9)
    assert nll.sum() != pytest.approx(example_losses(build("llama"), examples)[0].sum(), rel=1e-3)


def test_a_model_that_computes_no_numbers_is_said_so(rng):
    model = build("llama")
    model.lm_head.weight.data[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="the loss of example 0 is nan: check the model's weights"):
        example_losses(model, padded_examples(rng))


# --------------------------------------------------------------------------------------------------------- intervals


def test_a_mean_of_records_that_weigh_alike_has_the_usual_interval():
    y = np.array([1.0, 2.0, 4.0, 5.0])
    error = 3.1824463 * y.std(ddof=1) / 2  # Student's t for 3 degrees of freedom
    assert mean(y) == pytest.approx((3.0, 3 - error, 3 + error), rel=1e-5)
    assert mean([2.0]) == Estimate(2.0, None, None)


def test_a_mean_of_units_in_records_by_hand():
    """y = (2, 8), w = (1, 3): R = 10/4; residuals 2 - 2.5 = -0.5 and 8 - 7.5 = 0.5; SE² = 2 · (0.25 + 0.25) / 16."""
    value, low, high = mean([2, 8], [1, 3])
    assert value == 2.5 and high - value == pytest.approx(12.7062 / 4) == value - low


def test_the_interval_holds_the_truth_in_95_of_100_samples(rng):
    """Texts of different lengths whose tokens are alike within a text: the interval of single tokens would be too short."""
    inside = 0
    for _ in range(1000):
        n = rng.integers(1, 30, 200)
        low, high = mean(n * (3 + rng.standard_normal(200)), n)[1:]
        inside += low <= 3 <= high
    assert 920 <= inside <= 975


@pytest.mark.parametrize("n", [2, 3, 5])
def test_it_holds_the_truth_as_often_for_a_few_records(rng, n):
    intervals = [mean(3 + rng.standard_normal(n))[1:] for _ in range(2000)]
    assert abs(np.mean([low <= 3 <= high for low, high in intervals]) - 0.95) < 0.015  # 3 standard deviations


def test_a_share_has_wilsons_interval():
    assert share([True] * 5 + [False] * 5) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    assert share([True, False, False, False]) == pytest.approx((0.25, 0.045587, 0.699358), abs=1e-6)
    assert share([False] * 3) == pytest.approx((0, 0, 0.561497), abs=1e-6)
    assert share([True] * 3) == pytest.approx((1, 0.438503, 1), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------- answers


def test_the_loss_is_the_trainers_and_does_not_depend_on_the_batch(base):
    model, tokenizer = base
    found = evaluate(model, tokenizer, RECORDS, answers=False)
    examples = encode_examples(RECORDS, tokenizer, 100).examples
    assert found.scores.keys() == {"loss"} and found.chance is None
    assert found.scores["loss"].value == pytest.approx(mean_loss(model, examples), rel=1e-5)
    assert found.tokens == sum(own["tokens"] for own in found.details)
    assert found.tokens == sum(int((labels != -100).sum()) for _, labels in examples)
    again = evaluate(model, tokenizer, RECORDS, answers=False, batch_size=1)
    np.testing.assert_allclose(found.scores["loss"], again.scores["loss"], rtol=1e-5, atol=1e-5)  # its lower end is near 0


def test_answers_beside_the_expected_ones(base):
    model, tokenizer = base
    written = mp.ask(model, tokenizer, RECORDS, max_new_tokens=4)
    records = [RECORDS[0], *(Completion(r.prompt, f"{own} ") for r, own in zip(RECORDS[1:], written[1:]))]
    seen = []

    def metric(answer, expected):
        seen.append((answer, expected))
        return len(answer) == len(expected)

    found = evaluate(model, tokenizer, records, metric=metric, max_new_tokens=4)
    assert found.scores["exact_match"] == share([False, True, True]), "white space at the ends does not count"
    assert seen == [(own, record.completion) for own, record in zip(written, records)]
    assert found.scores["metric"].value == 0 and found.scores["metric"].low == 0
    assert [own["answer"] for own in found.details] == written
    pytest.importorskip("sacrebleu", reason="needs the extra 'hub'")
    assert 0 < found.scores["chrf"].value < 100 and found.scores["chrf"].low is None and found.note == ""


def test_without_sacrebleu_a_sentence_stands_for_chrf(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    found = evaluate(*base, RECORDS, max_new_tokens=2)
    assert "chrf" not in found.scores and found.scores.keys() == {"loss", "exact_match"}
    assert found.note == "computing chrF takes the package sacrebleu: pip install 'minipeft[hub]'"


def test_dicts_are_records(base):
    dicts = [record._asdict() for record in RECORDS]
    assert evaluate(*base, dicts, answers=False).scores == evaluate(*base, RECORDS, answers=False).scores


def test_running_text_is_scored_in_blocks(base):
    model, tokenizer = base
    document = Document("In the beginning God created the heaven and the earth. " * 8)
    blocks = math.ceil((len(tokenizer.encode(document.text)) + 1) / 16)  # with the token that ends a document
    found = evaluate(model, tokenizer, [document], max_length=16)
    assert found.scores.keys() == {"loss"} and len(found.details) == blocks > 2 and found.scores["loss"].low is not None
    assert len(evaluate(model, tokenizer, [document], max_length=16, limit=2).details) == 2


@pytest.mark.parametrize(
    "record, template",
    [
        (Instruction("Define.", "dog", "an animal"), "alpaca"),
        (Conversation((Message("user", "Hi"), Message("assistant", "Hello"))), "chatml"),
        (Completion("Who?", "I"), "Q: {prompt}\nA: "),
    ],
)
def test_the_template_is_that_of_ask(base, record, template):
    found = evaluate(*base, [record, record], template, max_new_tokens=3)
    assert [own["answer"] for own in found.details] == mp.ask(*base, [record] * 2, template, max_new_tokens=3)


@pytest.mark.parametrize(
    "records, options, sentence",
    [
        ([], {}, "there are no records"),
        (["text"], {}, "record 1 is a str, none of minipeft.text.datasets"),
        (
            [RECORDS[0], QUESTION],
            {},
            r"record 2 has the form {question, choices, answer}, the first {prompt, completion}",
        ),
        ([Preference("a", "b", "c")], {}, "have no single answer"),
        ([UnpairedPreference("a", "b", True)], {}, "have no single answer"),
        ([Document("a b c")], {"template": "alpaca"}, "a template is for records with a prompt"),
        ([{"prompt": "a"}], {}, "record 1: field 'completion' is missing"),
        (RECORDS, {"limit": 0}, "limit must be an integer of at least 1, or None, got 0"),
        (RECORDS, {"limit": -1}, "limit must be an integer of at least 1, or None, got -1"),
        (RECORDS, {"max_length": 0}, "max_length must be an integer of at least 2, or None, got 0"),
        (RECORDS, {"metric": lambda a, b: sys.exit(3)}, "the metric fails on record 1: SystemExit: 3"),
        (RECORDS, {"max_length": 513}, "max_length 513 is more than the 512 positions"),
        (RECORDS, {"max_length": 5}, "3 of 3 records are longer than 5 tokens"),
        (
            RECORDS,
            {"answers": False, "temperature": 1.0},
            "temperature is for answers that are generated, and there are none",
        ),
        ([QUESTION], {"metric": max}, "metric is for answers that are generated"),
        ([QUESTION], {"max_length": 4}, "1 of 1 records are longer than 4 tokens"),
        (RECORDS, {"metric": lambda a, b: "x"}, "the metric must give a finite number; on record 1 it gives 'x'"),
        (RECORDS, {"metric": lambda a, b: math.nan}, "on record 1 it gives nan"),
        (RECORDS, {"metric": lambda a, b: 1 // 0}, "the metric fails on record 1: ZeroDivisionError"),
        (RECORDS, {"max_length": 5, "beams": 3}, "has no option 'beams'"),
        ([QUESTION], {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_evaluated(base, records, options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        evaluate(
            *base, records, **({"max_new_tokens": 1} if "metric" in options and records == RECORDS else {}), **options
        )


# --------------------------------------------------------------------------------------------------- multiple choice


def test_the_log_probabilities_of_choices_by_hand(base):
    """The question and each choice after a space, a text at a time; the scores' tokens are those of the choice alone."""
    model, tokenizer = base
    question = tokenizer.encode(QUESTION.question)
    whole = [tokenizer.encode(f"{QUESTION.question} {choice}") for choice in QUESTION.choices]
    assert all(ids[: len(question)] == question for ids in whole)
    expected = [logprob(model, ids, len(question)) for ids in whole]
    (own,) = evaluate(model, tokenizer, [QUESTION]).details
    np.testing.assert_allclose(own["logprobs"], expected, rtol=1e-5)
    assert own["tokens"] == [len(ids) - len(question) for ids in whole] == [2, 1, 4]


class Fixed:
    """Stands for a model's log-probabilities."""

    def __init__(self, monkeypatch, values):
        found = (-np.array(values, np.float64), np.ones(len(values), np.int64))
        monkeypatch.setattr("minipeft.evaluation.scores.example_losses", lambda *a: found)


def test_acc_and_acc_norm_where_the_answer_is_known(base, monkeypatch):
    records = [
        MultipleChoice("?", ("ab", "abcdefgh"), 1),  # -2/2 < -4/8: the sum prefers the short one, the mean the long one
        MultipleChoice("?", ("ab", "abcdefgh"), 0),
        MultipleChoice("?", ("éé", "abc", "x", "y"), 0),  # -3/2 > -6/3: characters count, not bytes
        MultipleChoice("?", ("ab", "cd"), 0),  # equal: the first counts
    ]
    Fixed(monkeypatch, [-2, -4, -2, -4, -3, -6, -4, -5, -1, -1])
    found = evaluate(*base, records)
    assert found.scores["acc"] == share([False, True, True, True])
    assert found.scores["acc_norm"] == share([True, False, True, True])
    assert found.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    assert [len(own["logprobs"]) for own in found.details] == [2, 2, 4, 2] and found.tokens == 0


def test_a_model_that_knows_the_answers_is_right_everywhere(base):
    """Copies of verses that the base knows by heart, beside words that are none."""
    texts = ["And it came to pass", "and the house of Israel", "the LORD thy God"]
    records = [MultipleChoice(a, ("xq zz", b, "vv kk"), 1) for a, _, b in (t.rpartition(" ") for t in texts)]
    scores = evaluate(*base, records).scores
    assert scores["acc"].value == scores["acc_norm"].value == 1
    wrong = [record._replace(answer=0) for record in records]
    assert evaluate(*base, wrong).scores["acc"].value == 0


@pytest.mark.parametrize(
    "question, choice, template, prompt, scored",
    [
        ("A dog is an", "animal", plain, "A dog is an", " animal"),
        ("A dog is an ", "animal", plain, "A dog is an", " animal"),
        ("A dog is an", " animal", plain, "A dog is an", " animal"),
        ("Who?", "me", custom("Q: {prompt}\nA: "), "Q: Who?\nA:", " me"),
        ("Who?", "me", custom("Q: {prompt}\nA:\n"), "Q: Who?\nA:\n", "me"),
        ("Who?", "me", chatml, "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "me"),
    ],
)
def test_what_is_given_and_what_is_scored(base, question, choice, template, prompt, scored):
    """A space that the prompt ends with belongs to the token of the word after it; nothing that ends an answer counts."""
    _, tokenizer = base
    ((one, _),) = encode_choices([MultipleChoice(question, (choice, "zebra"), 0)], tokenizer, 100, template)
    start = int((one.labels == -100).sum())
    assert tokenizer.decode(one.input_ids[:start]) == prompt and tokenizer.decode(one.input_ids[start:]) == scored
    assert (one.labels[start:] == one.input_ids[start:]).all()


def test_all_choices_of_a_question_are_scored_from_the_same_position(base):
    """One choice ends the word that the question breaks off in: there the token before is part of what differs."""
    _, tokenizer = base
    record = MultipleChoice("He gave them the hou", ("se", "\n."), 0)
    ((one, other),) = encode_choices([record], tokenizer, 100, custom("{prompt}"))
    start = [int((own.labels == -100).sum()) for own in (one, other)]
    assert start[0] == start[1] < len(tokenizer.encode(record.question)), "the last word's tokens are scored in both"
    assert one.input_ids[: start[0]].tolist() == other.input_ids[: start[0]].tolist()


def test_a_template_asks_otherwise_and_scores_otherwise(base):
    default, same, other = (evaluate(*base, [QUESTION], t).details[0]["logprobs"] for t in (None, "plain", alpaca))
    assert default == same != other


# ----------------------------------------------------------------------------------------------------- shipped items


@pytest.fixture(scope="module")
def items():
    return general_cloze()


def test_the_general_items_are_well_formed(items, base):
    tokenizer = base[1]
    assert len(items) == 640 == len({item.question for item in items})
    for item in items:
        assert len(set(item.choices)) == 4
        assert {len(tokenizer.encode(f" {choice}")) for choice in item.choices} == {6}
    assert min(Counter(item.answer for item in items).values()) > 120
    assert general_cloze.__wrapped__() == items, "the same at every call"


def test_the_general_items_are_held_out_text_that_is_nowhere_in_the_training_text(items):
    held_out, training = (" ".join(" ".join(general_text(split)).split()) for split in ("test", "train"))
    for item in items[::16]:
        passage = f"{item.question} {item.choices[item.answer]}"
        assert passage in held_out
        assert " ".join(passage.split()[-8:]) not in training
        for choice in item.choices:
            assert choice in held_out


def test_the_base_is_well_above_chance_on_the_general_items(items, base):
    found = evaluate(*base, items[:200], batch_size=32)
    assert found.chance == 0.25 and found.scores["acc"].low > 0.5 and found.scores["acc_norm"].low > 0.45


def test_a_model_that_has_learned_nothing_is_at_chance(items, base):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    untrained = mp.Transformer(replace(base[0].config, head_dim=16, **small), seed=3)
    found = evaluate(untrained, base[1], items[:200], batch_size=32)
    assert found.scores["acc"].low < 0.25 < found.scores["acc"].high
