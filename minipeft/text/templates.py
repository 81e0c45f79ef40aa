"""Prompt templates: a record becomes turns of (prompt, completion), of which only the completion is learned.

A prompt or completion is a tuple of pieces of text; a piece that is a `Special` is a special token, everything else is
plain text (`Tokenizer.encode_pieces`). `"".join(pieces)` is the text as it is usually shown.
"""

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minipeft.text.datasets import Completion, Conversation, Instruction, Message, Preference, Record
from minipeft.text.tokenizer import Special

# The published wording, to the letter: Taori et al. 2023, Stanford Alpaca, PROMPT_DICT in train.py.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
IM_START, IM_END = Special("<|im_start|>"), Special("<|im_end|>")

Pieces = tuple[str, ...]


class Turn(NamedTuple):
    """What the model is shown, and what it should say next."""

    prompt: Pieces
    completion: Pieces


Template = Callable[[Record], list[Turn]]


def get_template(name: str) -> Template:
    """The template called "plain", "alpaca" or "chatml", or `custom(name)` where `name` holds a {field}."""
    known: dict[str, Template] = {"plain": plain, "alpaca": alpaca, "chatml": chatml}
    if name in known:
        return known[name]
    if "{" in name:
        return custom(name)
    raise ValueError(f"a template is one of {', '.join(known)} or a text with a {{field}} in it, got {name!r}")


def default_template(record: Record) -> Template:
    """alpaca for Instruction records, chatml for a Conversation, plain for Completion and Preference."""
    return alpaca if isinstance(record, Instruction) else chatml if isinstance(record, Conversation) else plain


def plain(record: Record) -> list[Turn]:
    """Completion: the prompt and the completion as they are, nothing between them."""
    if not isinstance(record, Completion):
        raise ValueError(f"the plain template takes {{prompt, completion}} records, got {_form(record)}")
    return [Turn((record.prompt,), (record.completion,))]


def alpaca(record: Record) -> list[Turn]:
    """Instruction: Stanford Alpaca's prompt, with its input where there is one; the output follows `### Response:`."""
    if not isinstance(record, Instruction):
        raise ValueError(f"the alpaca template takes {{instruction, input, output}} records, got {_form(record)}")
    return [Turn(alpaca_prompt(record.instruction, record.input), (record.output,))]


def alpaca_prompt(instruction: str, input: str = "") -> Pieces:
    if input:
        return (ALPACA_WITH_INPUT.format(instruction=instruction, input=input),)
    return (ALPACA_WITHOUT_INPUT.format(instruction=instruction),)


def chatml(record: Record) -> list[Turn]:
    """ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` per message; one turn for each of the assistant's messages.

    Learned are the assistant's words and the `<|im_end|>` after them. The line break after the very last `<|im_end|>`
    is left off: nothing follows it. An Instruction or Completion is a conversation of one question and one answer.
    """
    if isinstance(record, Instruction):
        question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
        messages: Sequence[Message] = (Message("user", question), Message("assistant", record.output))
    elif isinstance(record, Completion):
        messages = (Message("user", record.prompt), Message("assistant", record.completion))
    elif isinstance(record, Conversation):
        messages = record.messages
    else:
        raise ValueError(
            f"the chatml template takes {{messages}}, {{instruction, input, output}} or {{prompt, completion}} "
            f"records, got {_form(record)}"
        )
    turns, seen = [], 0
    for position, message in enumerate(messages):
        if message.role == "assistant":
            prompt = chatml_prompt(messages[seen:position])
            turns.append(Turn((("\n", *prompt) if turns else prompt), (message.content, IM_END)))
            seen = position + 1
    return turns


def chatml_prompt(messages: Sequence[Message]) -> Pieces:
    """The messages, then the opening of the assistant's answer: what a chat model is asked to continue."""
    pieces: list[str] = []
    for message in messages:
        pieces += [IM_START, f"{message.role}\n{message.content}", IM_END, "\n"]
    return (*pieces, IM_START, "assistant\n")


def custom(prompt: str) -> Template:
    """A template from a format string for the prompt, such as `"Q: {prompt}\\nA:"`; the completion or output follows.

    The fields are those of the record: {prompt} of a Completion, {instruction} and {input} of an Instruction. `{{` is a
    brace. Anything else a format string can do (attributes, indices, conversions, widths) raises ValueError.
    """
    allowed = {"prompt": "completion", "instruction": "output", "input": "output"}
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"the template {prompt!r} is not a format string: {error}") from error
    fields = [field for _, field, _, _ in parts if field is not None]
    for _, field, specification, conversion in parts:
        if field is not None and (field not in allowed or specification or conversion):
            raise ValueError(
                f"a template's fields are {{prompt}}, {{instruction}} and {{input}}, got one for {field!r}"
                f"{' with a format' if specification or conversion else ''}"
            )
    if not fields:
        raise ValueError(f"the template {prompt!r} has no field, so every record would have the same prompt")
    if "prompt" in fields and len(set(fields)) > 1:
        raise ValueError("a template takes {prompt} or {instruction} and {input}, not both: no record has all of them")
    if "prompt" not in fields and "instruction" not in fields:
        raise ValueError("a template with {input} needs {instruction} too")

    def render(record: Record) -> list[Turn]:
        form = Completion if "prompt" in fields else Instruction
        if not isinstance(record, form):
            raise ValueError(
                f"a template with the fields {fields} takes {{{', '.join(form._fields)}}} records, got {_form(record)}"
            )
        if isinstance(record, Instruction) and record.input and "input" not in fields:
            raise ValueError("the record has an input, for which the template has no {input}")
        return [Turn((prompt.format(**record._asdict()),), (record[-1],))]

    return render


def preference_turns(record: Preference, template: Template = plain) -> tuple[Turn, Turn]:
    """The (chosen, rejected) answers to one prompt, each as a turn; the template must take Completion records."""
    if not isinstance(record, Preference):
        raise ValueError(f"preference pairs are {{prompt, chosen, rejected}} records, got {_form(record)}")
    chosen, rejected = (template(Completion(record.prompt, answer))[0] for answer in (record.chosen, record.rejected))
    return chosen, rejected


def _form(record: object) -> str:
    return "{" + ", ".join(getattr(record, "_fields", (type(record).__name__,))) + "}"
