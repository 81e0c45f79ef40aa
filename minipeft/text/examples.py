"""From records to training examples (input_ids, labels), and from running text to blocks.

Labels have the length of the input ids and are not shifted: `labels[t]` is `input_ids[t]` where that token is
learned, and -100 where it is not (a prompt, padding). `model.loss(input_ids, labels)` shifts inside, as in Hugging
Face: the logits at position t are compared with the label at t + 1, so the label of the first token is never used.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ..train.batches import IGNORE
from .datasets import Document, MultipleChoice, Preference, Record, UnpairedPreference, record_of
from .templates import Template, Turn, choice_turns, default_template, plain, preference_turns, unpaired_turn
from .tokenizer import Special, Tokenizer


class Example(NamedTuple):
    """One sequence to train on: two int64 arrays [length]."""

    input_ids: np.ndarray
    labels: np.ndarray


class EncodedExamples(NamedTuple):
    """The examples, and how many records were cut to fit or left out because they did not."""

    examples: list[Example]
    truncated: int
    dropped: int


class PreferencePair(NamedTuple):
    """The preferred answer to a prompt and the other one, each behind the prompt."""

    chosen: Example
    rejected: Example


class UnpairedExample(NamedTuple):
    """An answer behind its prompt, and whether it is desirable."""

    example: Example
    label: bool


def encode_examples(
    records: Sequence[Record | dict[str, Any]],
    tokenizer: Tokenizer,
    max_length: int,
    template: Template | None = None,
    on_overflow: str = "error",
) -> EncodedExamples:
    """Records, or dicts with the fields of one, to examples of at most `max_length` tokens.

    Documents become one token stream with an end-of-sequence token after each, cut into blocks of `max_length`
    (`chunk_text`); every token is learned. `template` (by default the usual one of their form) renders all other
    records, and only completions are learned, with the end-of-sequence token after the last one where the template
    does not end it with a special token itself.

    on_overflow is what happens to a record longer than `max_length`: "error" raises ValueError, "truncate" keeps its
    first `max_length` tokens (and drops it if nothing to learn is left), "drop" leaves it out. The result counts them.
    Preference records raise ValueError: they are for `encode_preferences` and `encode_unpaired`.
    """
    _check_lengths(max_length, on_overflow)
    records = [record_of(record) for record in records]
    if all(isinstance(record, Document) for record in records):
        blocks = chunk_text(encode_documents([record.text for record in records], tokenizer), max_length)
        return EncodedExamples([Example(block, block.copy()) for block in blocks], 0, 0)
    encoded = [encode_turns((template or default_template(record, tokenizer))(record), tokenizer) for record in records]
    if on_overflow == "error":
        _refuse_overlong([len(example.input_ids) for example in encoded], max_length)
    examples, truncated, dropped = [], 0, 0
    for example in encoded:
        if len(example.input_ids) > max_length:
            cut = Example(example.input_ids[:max_length], example.labels[:max_length])
            if on_overflow == "drop" or not (cut.labels[1:] != IGNORE).any():
                dropped += 1
                continue
            example, truncated = cut, truncated + 1
        examples.append(example)
    return EncodedExamples(examples, truncated, dropped)


def encode_preferences(
    records: Sequence[Preference], tokenizer: Tokenizer, max_length: int, template: Template = plain
) -> list[PreferencePair]:
    """Preference records to pairs of examples with the same prompt; the answers are learned.

    Raises ValueError where prompt and answer are longer than `max_length`: a cut answer would be another preference.
    """
    _check_lengths(max_length, "error")
    rendered = [preference_turns(record, template) for record in records]
    pairs = [PreferencePair(*(encode_turns([turn], tokenizer) for turn in turns)) for turns in rendered]
    _refuse_overlong([max(len(example.input_ids) for example in pair) for pair in pairs], max_length, "shorten them")
    return pairs


def encode_unpaired(
    records: Sequence[UnpairedPreference], tokenizer: Tokenizer, max_length: int, template: Template = plain
) -> list[UnpairedExample]:
    """Unpaired preference records to examples with their labels. Raises as `encode_preferences`."""
    _check_lengths(max_length, "error")
    encoded = [encode_turns([unpaired_turn(record, template)], tokenizer) for record in records]
    _refuse_overlong([len(example.input_ids) for example in encoded], max_length, "shorten them")
    return [UnpairedExample(example, record.label) for example, record in zip(encoded, records)]


def encode_choices(
    records: Sequence[MultipleChoice], tokenizer: Tokenizer, max_length: int, template: Template = plain
) -> list[list[Example]]:
    """For each record an example a choice: the question and the choice, whose tokens are the labels.

    Nothing that ends an answer is a label. The labels of all choices of a record begin at the same position, the first
    at which the question with some choice differs from the question alone: the same text is given for all. Raises
    ValueError where question and choice are longer than `max_length`.
    """
    _check_lengths(max_length, "error")
    found = []
    for record in records:
        ids, shared = [], []
        for turn in choice_turns(record, template):
            answer = [piece for piece in turn.completion if not isinstance(piece, Special)]
            prompt = tokenizer.encode_pieces(turn.prompt, add_special_tokens=True)
            ids.append(tokenizer.encode_pieces((*turn.prompt, *answer), add_special_tokens=True))
            shared.append(_common(prompt, ids[-1]))
        labels = [[IGNORE] * min(shared) + own[min(shared) :] for own in ids]
        found.append([Example(np.array(i, np.int64), np.array(l, np.int64)) for i, l in zip(ids, labels)])
    _refuse_overlong([max(len(example.input_ids) for example in own) for own in found], max_length, "shorten them")
    return found


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer) -> Example:
    """The turns one after the other; labels are the completions' tokens, and -100 on the prompts.

    The text is encoded as a whole, as the model reads it everywhere else. A completion starts where the tokens of the
    text before it and the tokens of the whole diverge: where prompt and completion meet inside a token, that token is
    learned. (When asked, the model reads another token there. So a prompt should not end in the middle of a token,
    not in a space for a tokenizer whose words begin with one.) A completion ends in the same way. Raises
    ValueError where the tokenizer names no end-of-sequence token to put at the end.
    """
    pieces = [part for turn in turns for part in (turn.prompt, turn.completion)]
    apart = tokenizer.spells_special([piece for part in pieces for piece in part])  # then in every part, or none
    text: list[str] = []
    parts: list[list[int]] = []  # the tokens up to the end of each prompt and of each completion
    for part in pieces:
        text += part
        parts.append(tokenizer.encode_pieces(text, add_special_tokens=True, apart=apart))
    ids = parts[-1]
    if not isinstance(turns[-1].completion[-1], Special) and ids[-1] != _eos(tokenizer):
        ids.append(_eos(tokenizer))
    labels = np.full(len(ids), IGNORE, np.int64)
    for prompt, through_completion in zip(parts[::2], parts[1::2]):
        learned = slice(_common(prompt, ids), _common(through_completion, ids))
        labels[learned] = ids[learned]
    return Example(np.array(ids, np.int64), labels)


def example_of(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """Token ids of a prompt and its answer, [P] and [A]: an example [P + A] of which the answer is learned."""
    ids = np.array([*prompt, *answer], np.int64)
    return Example(ids, np.where(np.arange(len(ids)) < len(prompt), IGNORE, ids))


def _common(one: list[int], other: list[int]) -> int:
    """The number of tokens that two sequences have in common before they diverge."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one int64 token stream [n], the end-of-sequence token after each. Raises as `encode_turns`."""
    eos = _eos(tokenizer)
    encoded = tokenizer.encode_batch(list(texts))
    return np.fromiter(chain.from_iterable((*ids, eos) for ids in encoded), np.int64)


def chunk_text(ids: np.ndarray, length: int) -> list[np.ndarray]:
    """A token stream [n] in blocks [length], in order. The last may be shorter; a single token, which predicts nothing,
    is left out. Raises ValueError for a length below 2."""
    if length < 2:
        raise ValueError(f"a block needs at least 2 tokens, the second to be predicted; got length {length}")
    blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    return blocks[:-1] if blocks and len(blocks[-1]) < 2 else blocks


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json)")
    return tokenizer.eos_token_id


def _check_lengths(max_length: int, on_overflow: str) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if on_overflow not in ("error", "truncate", "drop"):
        raise ValueError(f"on_overflow must be 'error', 'truncate' or 'drop', got {on_overflow!r}")


def _refuse_overlong(lengths: Sequence[int], max_length: int, remedy: str = "truncate or drop them") -> None:
    overlong = [number for number, length in enumerate(lengths, start=1) if length > max_length]
    if overlong:
        raise ValueError(
            f"{len(overlong)} of {len(lengths)} records are longer than {max_length} tokens, the first of them record "
            f"{overlong[0]} with {lengths[overlong[0] - 1]}; raise max_length, or {remedy}"
        )
