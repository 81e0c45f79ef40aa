"""Asking: from prompts, or records of any form, to a language model's answers as text.

prompt ─► template ─► tokens, padded on the left ─► generate, until a stop token ─► the text of the answer alone
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, takewhile
from typing import Any

from ..backend import Rng
from ..nn.generation import generate
from ..nn.module import Module
from ..peft.targets import listed
from ..text.datasets import FORMS, Record
from ..text.templates import Template, Turn, as_asked, asked_turn, get_template
from ..text.tokenizer import Special, Tokenizer
from ..train.batches import pad_sequences
from .config import GenerationConfig


def ask(
    model: Module,
    tokenizer: Tokenizer,
    prompts_or_records: str | Record | Iterable[str | Record],
    template: str | Template | None = None,
    *,
    adapter_names: Sequence[str] | None = None,
    **generation: Any,
) -> list[str]:
    """The model's answer to each prompt, in order: what it writes until a stop token, without the prompt.

        mp.ask(model, tokenizer, ["It was a fine morning"], max_new_tokens=40)
        mp.ask(model, tokenizer, ["What is a dog?"], template="chat")
        mp.ask(model, tokenizer, read_dataset("test.jsonl"), temperature=0.8, seed=1)
        mp.ask(model, tokenizer, ["Bonjour", "2 + 2 ="], adapter_names=["french", "sums"])    one batch, two adapters

    Args:
        prompts_or_records: texts, records of `minipeft.text.datasets`, or dicts like them; one alone is a list of one.
            Of a record only what is asked is shown to the model, never the answer that it holds (of a Document: its
            text).
        template: a name or text for `get_template`, or a template; by default the usual one of each record's form,
            and texts are shown as they are.
        adapter_names: of a `PeftModel`: the adapter that answers each prompt, "__base__" for none; by default the
            active ones answer all.
        generation: the options of `GenerationConfig`: max_new_tokens, temperature, top_k, top_p, seed, batch_size.

    The answer to a prompt depends on the seed and its place among the prompts of its adapter, and not on `batch_size`.
    Raises TypeError for what is no prompt and for unknown options, ValueError for an empty prompt, for one that with
    `max_new_tokens` is longer than the model takes, for options that make no sense, and for adapter_names that are not
    one a prompt.
    """
    config = GenerationConfig(**generation)
    if isinstance(template, str):
        template = get_template(template, tokenizer)
    alone = isinstance(prompts_or_records, (str, dict, *FORMS))
    prompts = [prompts_or_records] if alone else list(prompts_or_records)
    return list(answer_turns(model, tokenizer, asked_turns(prompts, template, tokenizer), config, adapter_names))


def asked_turns(
    prompts: Sequence[str | Record], template: Template | None = None, tokenizer: Tokenizer | None = None
) -> list[Turn]:
    """`asked_turn` of each; TypeError and ValueError say which of the prompts is wrong."""
    turns = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            record = as_asked(prompt)
            turns.append(asked_turn(record, template, tokenizer))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {number}: {error}") from error
        if not record[0]:
            raise ValueError(f"prompt {number} is empty; a prompt needs some text")
    return turns


def answer_turns(
    model: Module, tokenizer: Tokenizer, turns: Sequence[Turn], config: GenerationConfig,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[str]:  # fmt: skip
    """The answers in order, computed in batches; what is drawn does not depend on the batch size or on other adapters.

    Raises ValueError where `adapter_names` are not a list of one a turn.
    """
    names = [None] * len(turns) if adapter_names is None else listed("adapter_names", adapter_names)
    if len(names) != len(turns):
        raise ValueError(f"adapter_names has {len(names)} names for {len(turns)} prompts")
    counts: dict[str | None, Iterator[int]] = defaultdict(count)
    places = [next(counts[name]) for name in names]  # of each turn among those of its adapter
    stop_token_ids = {turn: stop_tokens(model, tokenizer, turn) for turn in set(turns)}
    encoded = [tokenizer.encode_pieces(turn.prompt, add_special_tokens=True) for turn in turns]
    for start in range(0, len(encoded), config.batch_size):
        own = slice(start, start + config.batch_size)
        ids, mask = pad_sequences(encoded[own], 0, side="left")
        ends = [stop_token_ids[turn] for turn in turns[own]]
        out = generate(
            model, ids, mask, seed=Rng(config.seed).take(places[own]), eos_token_id=ends,
            adapter_names=None if adapter_names is None else names[own], **config.options(),
        )  # fmt: skip
        for row, stop in zip(out[:, ids.shape[1] :].tolist(), ends):
            yield tokenizer.decode(list(takewhile(lambda token, stop=stop: token not in stop, row)))


def stop_tokens(model: Module, tokenizer: Tokenizer, turn: Turn) -> list[int]:
    """The ids that end a text: the model's, the tokenizer's, and the special token that ends the template's answers.

    Raises ValueError where the tokenizer lacks a token of the template.
    """
    try:
        tokenizer.encode_pieces([piece for piece in (*turn.prompt, *turn.completion) if isinstance(piece, Special)])
    except ValueError as error:
        raise ValueError(f"this model's tokenizer cannot write the template: {error}") from error
    configured = getattr(getattr(model, "config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    last = turn.completion[-1]
    ids = [*ids, tokenizer.eos_token_id, tokenizer.token_to_id(last) if isinstance(last, Special) else None]
    return sorted({i for i in ids if i is not None})
