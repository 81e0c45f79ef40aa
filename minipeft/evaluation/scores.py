"""How good a model is on records: its loss, its answers beside the expected ones, its choice among given answers.

    records with answers   loss          nats per token of the answers and their ends (of documents: of the text)
                           exact_match   share of answers that are the expected ones, but for white space around them
                           chrf          chrF of all answers together, 0 to 100, with sacreBLEU (extra `hub`)
                           metric        mean of your own metric(answer, expected answer) -> number
    multiple choice        acc           share of questions whose right choice has the highest Σ_t log p(choice_t | ...)
                           acc_norm      the same, with each sum divided by the number of characters of the choice

acc and acc_norm are those of EleutherAI's lm-evaluation-harness as its code computes them. (The paper about it,
Biderman et al. 2024, arXiv:2405.14782, says that acc_norm divides by bytes: for ASCII the same.) The first of equal
choices counts.
Every score has a 95 % confidence interval over the records (`intervals`), but for chrF, which is no mean over them. The
blocks of one running text depend on each other: the interval of its loss is too narrow.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..nn.module import Module
from ..text.datasets import Document, MultipleChoice, Preference, Record, UnpairedPreference, fields_of, record_of
from ..text.examples import encode_choices, encode_examples
from ..text.templates import Template, get_template, plain, question_and_answer
from ..text.tokenizer import Tokenizer
from ..train.evaluation import example_losses
from ..train.metrics import chrf
from .answers import ask
from .config import GenerationConfig
from .intervals import Estimate, mean, share

Metric = Callable[[str, str], float]  # metric(answer, expected answer)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds.

    scores    by their names, see the module
    details   a dictionary a record: what was asked, answered and expected; of multiple choice the log-probability of
              each choice, their sum over its tokens; the loss as (nll, tokens)
    tokens    that the loss is the mean of; 0 of multiple choice
    chance    the accuracy of guessing, the mean of 1 / number of choices; None but for multiple choice
    note      "" or a sentence about a score that could not be computed
    """

    scores: dict[str, Estimate]
    details: list[dict[str, Any]] = field(repr=False)
    tokens: int = 0
    chance: float | None = None
    note: str = ""


def evaluate(
    model: Module,
    tokenizer: Tokenizer,
    records: Sequence[Record | dict[str, Any]],
    template: str | Template | None = None,
    *,
    metric: Metric | None = None,
    answers: bool = True,
    max_length: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    **generation: Any,
) -> Evaluation:
    """The scores of a model on records of one form; see the module for what they are.

        evaluate(model, tokenizer, read_dataset("test.jsonl"), max_new_tokens=20).scores["exact_match"]

    Args:
        records: of minipeft.text.datasets, or dicts with the fields of one.
        template: as in `ask`; of multiple choice `plain` by default, so that models that were trained in different
            templates are asked the same.
        metric: your own; only where there are answers.
        answers: whether answers are generated and scored, beside the loss; documents and multiple choice have none.
        max_length: tokens of a record at most, of documents the length of the blocks that their text is cut into, which
            then take the place of records; by default what the model takes.
        limit: how many records are used at most, the first ones.
        generation: the options of `GenerationConfig`.

    Raises TypeError for what is no record, ValueError for records of several forms, for preferences, for a record that
    is too long, for options that do nothing with these records, and for a metric that fails; as `ask` does;
    FloatingPointError where the model computes no number.
    """
    if not records:
        raise ValueError("there are no records to evaluate on")
    for name, value, least in (("limit", limit, 1), ("max_length", max_length, 2)):
        if value is not None and (not isinstance(value, numbers.Integral) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, or None, got {value!r}")
    records = _records(records)
    form = type(records[0])
    if form in (Preference, UnpairedPreference):
        raise ValueError(f"{fields_of(form)} records have no single answer; rlhf.reward_accuracy judges pairs")
    if form is Document and template is not None:
        raise ValueError("a template is for records with a prompt, and running text has none; leave it out")
    if isinstance(template, str):
        template = get_template(template, tokenizer)
    room = model.config.max_position_embeddings - getattr(model, "virtual_tokens", 0)
    if max_length is not None and max_length > room:
        raise ValueError(f"max_length {max_length} is more than the {room} positions that the model has for a text")
    length, answered = max_length or room, answers and form not in (Document, MultipleChoice)
    if not answered:
        for name in [*["metric"] * (metric is not None), *generation]:
            raise ValueError(f"{name} is for answers that are generated, and there are none; leave it out")
    GenerationConfig(batch_size=batch_size, **generation)  # a wrong option is reported before anything is computed
    if form is MultipleChoice:
        return _choices(model, tokenizer, records[:limit], template or plain, length, batch_size)

    if form is not Document:
        records = records[:limit]
    examples = encode_examples(records, tokenizer, length, template).examples[:limit]
    nll, tokens = example_losses(model, examples, batch_size, tokenizer.pad_token_id or 0)
    scores = {"loss": mean(nll, tokens)}
    details: list[dict[str, Any]] = [{"nll": float(a), "tokens": int(b)} for a, b in zip(nll, tokens)]
    note = ""
    if answered:
        found = ask(model, tokenizer, records, template, batch_size=batch_size, **generation)
        questions, expected = zip(*map(question_and_answer, records))
        texts = ({"question": q, "answer": a, "expected": e} for q, a, e in zip(questions, found, expected))
        details = [text | own for text, own in zip(texts, details)]
        scores["exact_match"] = share([a.strip() == e.strip() for a, e in zip(found, expected)])
        try:
            scores["chrf"] = Estimate(chrf(found, expected))
        except ImportError as error:
            note = str(error)
        if metric is not None:
            scores["metric"] = mean([_measured(metric, a, e, i) for i, (a, e) in enumerate(zip(found, expected), 1)])
    return Evaluation(scores, details, int(tokens.sum()), note=note)


def _records(values: Sequence[Any]) -> list[Record]:
    """Records, or dicts like them, as records of one form. TypeError and ValueError say which is none."""
    records: list[Record] = []
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict | Record):
            raise TypeError(f"record {number} is a {type(value).__name__}, none of minipeft.text.datasets")
        try:
            records.append(record_of(value))
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        form, first = fields_of(records[-1]), fields_of(records[0])
        if form != first:
            raise ValueError(f"record {number} has the form {form}, the first {first}")
    return records


def _measured(metric: Metric, answer: str, expected: str, number: int) -> float:
    """metric(answer, expected), which is a stranger's code. ValueError says on which record and how it fails."""
    try:
        value = metric(answer, expected)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the metric fails on record {number}: {type(error).__name__}: {error}") from error
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
        raise ValueError(f"the metric must give a finite number; on record {number} it gives {value!r}")
    return float(value)


def _choices(
    model: Module, tokenizer: Tokenizer, records: Sequence[MultipleChoice], template: Template, length: int, size: int
) -> Evaluation:
    encoded = encode_choices(records, tokenizer, length, template)
    flat = [example for own in encoded for example in own]
    nll, tokens = example_losses(model, flat, size, tokenizer.pad_token_id or 0)
    ends = np.cumsum([len(record.choices) for record in records])[:-1]
    logprobs = [-own for own in np.split(nll, ends)]  # [choices] of each record
    lengths = [np.array([len(choice) for choice in record.choices]) for record in records]
    right = [record.answer for record in records]
    scores = {
        "acc": share([own.argmax() == i for own, i in zip(logprobs, right)]),
        "acc_norm": share([(own / n).argmax() == i for own, n, i in zip(logprobs, lengths, right)]),
    }
    details = [
        {**record._asdict(), "logprobs": own.tolist(), "tokens": n.tolist()}
        for record, own, n in zip(records, logprobs, np.split(tokens, ends))
    ]
    return Evaluation(scores, details, chance=float(np.mean([1 / len(record.choices) for record in records])))
