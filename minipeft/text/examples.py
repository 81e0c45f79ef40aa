"""From records to what a model is trained on: (input_ids, labels), blocks of running text.

Labels have the length of the input ids and are not shifted: `labels[t]` is `input_ids[t]` where that token is to be
learned and -100 where it is not (a prompt, padding). `model.loss(input_ids, labels)` shifts inside, as in Hugging Face:
the logits at position t are compared with the label at t + 1, so the label of the first token is never used.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from minipeft.text.datasets import Document, Preference, Record
from minipeft.text.templates import Template, Turn, default_template, plain, preference_turns
from minipeft.text.tokenizer import Special, Tokenizer

IGNORE = -100  # cross entropy's ignore_index


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
    chosen: Example
    rejected: Example


def encode_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    max_length: int,
    template: Template | None = None,
    on_overflow: str = "error",
) -> EncodedExamples:
    """Records to examples of at most `max_length` tokens.

    Documents become one token stream with an end-of-sequence token after each, cut into blocks of `max_length`
    (`chunk_text`); every token is learned. All other records are rendered by `template` (by default the usual one of
    their form) and only completions are learned, with the end-of-sequence token after the last one where the template
    does not end it with a special token itself.

    on_overflow says what to do with a record longer than `max_length`: "error" raises ValueError, "truncate" keeps its
    first `max_length` tokens (and drops it if nothing learnable is left), "drop" leaves it out. The result counts them.
    Preference records are for `encode_preferences`; they raise ValueError here.
    """
    _check_lengths(max_length, on_overflow)
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
    """Preference records to pairs of examples with the same prompt, of which the answers are learned.

    An answer longer than `max_length` with its prompt raises ValueError: cut answers would be another preference.
    """
    _check_lengths(max_length, "error")
    pairs = [
        PreferencePair(*(encode_turns([turn], tokenizer) for turn in preference_turns(record, template)))
        for record in records
    ]
    _refuse_overlong([max(len(example.input_ids) for example in pair) for pair in pairs], max_length)
    return pairs


def encode_turns(turns: Sequence[Turn], tokenizer: Tokenizer) -> Example:
    """The turns one after the other; labels are the completions' tokens, -100 on the prompts.

    The text is encoded as a whole, since that is how its words are segmented wherever else the model reads them. A
    completion starts where the tokens of the text before it and the tokens of the whole diverge: where prompt and
    completion meet inside a token, that token is learned. (It is never what the model sees when asked, so a prompt
    should not end in the middle of a token: not in a space, for a tokenizer whose words begin with one.) It ends
    likewise.
    """
    text: list[str] = []  # pieces
    parts: list[list[int]] = []  # the tokens up to the end of each prompt and of each completion
    for part in (part for turn in turns for part in (turn.prompt, turn.completion)):
        text += part
        parts.append(tokenizer.encode_pieces(text, add_special_tokens=True))
    ids = parts[-1]
    if not isinstance(turns[-1].completion[-1], Special) and ids[-1] != _eos(tokenizer):
        ids.append(_eos(tokenizer))
    labels = np.full(len(ids), IGNORE, np.int64)
    for prompt, through_completion in zip(parts[::2], parts[1::2]):
        learned = slice(_common(prompt, ids), _common(through_completion, ids))
        labels[learned] = ids[learned]
    return Example(np.array(ids, np.int64), labels)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common before they diverge."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one int64 token stream, the end-of-sequence token after each."""
    eos = _eos(tokenizer)
    encoded = tokenizer.encode_batch(list(texts))
    stream = np.full(sum(len(ids) + 1 for ids in encoded), eos, np.int64)
    position = 0
    for ids in encoded:
        stream[position : position + len(ids)] = ids
        position += len(ids) + 1
    return stream


def chunk_text(ids: np.ndarray, length: int) -> list[np.ndarray]:
    """A token stream in blocks of `length`, in order; the last may be shorter, but not of a single token, which would
    hold nothing to predict."""
    if length < 2:
        raise ValueError(f"a block needs at least 2 tokens, one to predict the other from; got length {length}")
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


def _refuse_overlong(lengths: Sequence[int], max_length: int) -> None:
    overlong = [number for number, length in enumerate(lengths, start=1) if length > max_length]
    if overlong:
        raise ValueError(
            f"{len(overlong)} of {len(lengths)} records are longer than {max_length} tokens, the first of them record "
            f"{overlong[0]} with {lengths[overlong[0] - 1]}; raise max_length, or truncate or drop them"
        )
