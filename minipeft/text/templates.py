"""Prompt templates: a record becomes turns of (prompt, completion); only the completion is learned.

A prompt or completion is a tuple of pieces of text. A piece that is a `Special` is a special token, all others are
plain text (`Tokenizer.encode_pieces`). `"".join(pieces)` is the text as it is usually shown.
A template raises ValueError for a record of a form that it does not take.
"""

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .datasets import (
    Completion,
    Conversation,
    Document,
    Instruction,
    Message,
    MultipleChoice,
    Preference,
    Record,
    UnpairedPreference,
    fields_of,
    record_of,
)
from .tokenizer import Special, Tokenizer

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
CHATML = (  # what `chatml` does, as a tokenizer's chat template
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Pieces = tuple[str, ...]


class Turn(NamedTuple):
    """What the model reads, and what it should write next."""

    prompt: Pieces
    completion: Pieces


Template = Callable[[Record], list[Turn]]


def get_template(name: str, tokenizer: Tokenizer | None = None) -> Template:
    """The template called "plain", "alpaca", "chatml" or "chat" (the tokenizer's own).

    `custom(name)` for a name with a {field}. Raises ValueError for any other.
    """
    known: dict[str, Template] = {"plain": plain, "alpaca": alpaca, "chatml": chatml}
    if tokenizer is not None:
        known["chat"] = chat(tokenizer)
    if name in known:
        return known[name]
    if "{" in name:
        return custom(name)
    raise ValueError(f"a template is one of {', '.join(known)} or a text with a {{field}} in it, got {name!r}")


def default_template(record: Record, tokenizer: Tokenizer | None = None) -> Template:
    """`alpaca` for an Instruction, the tokenizer's own (or `chatml`) for a Conversation, else `plain`."""
    if isinstance(record, Conversation):
        return chatml if tokenizer is None else chat(tokenizer)
    return alpaca if isinstance(record, Instruction) else plain


def plain(record: Record) -> list[Turn]:
    """Completion: the prompt and the completion as they are, nothing between them."""
    _check_form(record, Completion, "the plain template")
    return [Turn((record.prompt,), (record.completion,))]


def alpaca(record: Record) -> list[Turn]:
    """Instruction: Stanford Alpaca's prompt, with its input where there is one; the output follows `### Response:`.

    The prompt of a Completion is an instruction without input.
    """
    record = _instruction(record)
    _check_form(record, Instruction, "the alpaca template")
    form = ALPACA_WITH_INPUT if record.input else ALPACA_WITHOUT_INPUT
    return [Turn((form.format(instruction=record.instruction, input=record.input),), (record.output,))]


def chatml(record: Record) -> list[Turn]:
    """ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` per message; one turn for each of the assistant's messages.

    The assistant's words and the `<|im_end|>` after them are learned. The line break after the very last `<|im_end|>`
    is left out: nothing follows it. An Instruction or Completion is a conversation of one question and one answer.
    Source: OpenAI's chatml.md (2023).
    """
    return _turns(_messages(record, "chatml"), chatml_prompt)


def chatml_prompt(messages: Sequence[Message], add_generation_prompt: bool = True) -> Pieces:
    """The messages, then (by default) the opening of the assistant's answer, for a model to continue."""
    pieces: list[str] = []
    for message in messages:
        pieces += [IM_START, f"{message.role}\n{message.content}", IM_END, "\n"]
    return (*pieces, IM_START, "assistant\n") if add_generation_prompt else tuple(pieces)


def chat(tokenizer: Tokenizer) -> Template:
    """The tokenizer's own chat template; `chatml` where it has none, or that one.

    There is one turn for each of the assistant's messages. Its completion is what the template writes after the
    opening of the answer, up to the last special token there (the end of the turn). Records as for `chatml`. The
    template raises ValueError for messages that the chat template cannot write, or writes differently once the answer
    is there.
    """
    if tokenizer.chat_template in (None, CHATML):
        return chatml
    return lambda record: _turns(_messages(record, "chat"), tokenizer.chat_pieces)


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> Pieces:
    """A conversation and the opening of the next answer, as `chat(tokenizer)` writes them."""
    if tokenizer.chat_template in (None, CHATML):
        return chatml_prompt(messages)
    return tokenizer.chat_pieces(messages, add_generation_prompt=True)


def _turns(messages: Sequence[Message], written: Callable[..., Pieces]) -> list[Turn]:
    """A turn for each of the assistant's messages, found in what `written(messages, add_generation_prompt)` gives."""
    turns, done, before = [], 0, ""
    for position, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = "".join(written(messages[:position], add_generation_prompt=True))
        pieces = written(messages[: position + 1], add_generation_prompt=False)
        text = "".join(pieces)
        if not text.startswith(prompt) or not prompt.startswith(before):
            raise ValueError(
                "the tokenizer's chat template writes the messages before an answer differently once the answer is "
                "there, so the answer cannot be found in it; use another template, such as chatml"
            )
        last = max((i for i, piece in enumerate(pieces) if isinstance(piece, Special)), default=-1)
        end = len("".join(pieces[: last + 1]))
        end = end if end > len(prompt) else len(text)
        turns.append(Turn(_cut(pieces, done, len(prompt)), _cut(pieces, len(prompt), end)))
        done, before = end, text[:end]
    return turns


def _cut(pieces: Pieces, begin: int, end: int) -> Pieces:
    """The pieces between two positions of their text; neither position lies inside a special token."""
    part, at = [], 0
    for piece in pieces:
        inside = piece[max(0, begin - at) : max(0, end - at)]
        at += len(piece)
        if inside:
            part.append(Special(inside) if isinstance(piece, Special) else inside)
    return tuple(part)


def _messages(record: Record, template: str) -> tuple[Message, ...]:
    """A record as a conversation: an Instruction or Completion is one question and one answer."""
    if isinstance(record, Conversation):
        return record.messages
    if isinstance(record, Instruction):
        question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
        return Message("user", question), Message("assistant", record.output)
    if isinstance(record, Completion):
        return Message("user", record.prompt), Message("assistant", record.completion)
    _check_form(record, Conversation, f"the {template} template")


def custom(prompt: str) -> Template:
    """A template from a format string for the prompt, such as `"Q: {prompt}\\nA:"`; the completion or output follows.

    The fields are those of the record: {prompt} of a Completion, {instruction} and {input} of an Instruction. A
    Completion's prompt can also be an {instruction}, without input. `{{` is a brace. Whatever else a format string
    can do (attributes, indices, conversions, widths) raises ValueError.
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
        record = record if "prompt" in fields else _instruction(record)
        _check_form(record, Completion if "prompt" in fields else Instruction, f"a template with the fields {fields}")
        if isinstance(record, Instruction) and record.input and "input" not in fields:
            raise ValueError("the record has an input, for which the template has no {input}")
        return [Turn((prompt.format(**record._asdict()),), (record[-1],))]

    return render


def as_asked(prompt: str | Record) -> Record:
    """What is asked, as a Completion, Instruction or Conversation with its answer: what templates take.

    Of a MultipleChoice the question and the right choice, of a Preference the prompt and the preferred answer, of an
    UnpairedPreference the prompt and its answer, liked or not. A text or a Document is asked to be continued, and "-" stands for the answer that it and a Conversation without an answer
    lack. Raises TypeError for anything else, ValueError for a conversation in which nobody asks.
    """
    if isinstance(prompt, dict):
        prompt = record_of(prompt)
    if isinstance(prompt, str | Document):
        prompt = Completion(prompt if isinstance(prompt, str) else prompt.text, "-")
    elif isinstance(prompt, Preference):
        prompt = Completion(prompt.prompt, prompt.chosen)
    elif isinstance(prompt, UnpairedPreference):
        prompt = Completion(prompt.prompt, prompt.completion)
    elif isinstance(prompt, MultipleChoice):
        prompt = Completion(prompt.question, prompt.choices[prompt.answer])
    elif isinstance(prompt, Conversation):
        if all(message.role != "user" for message in prompt.messages):
            raise ValueError("a conversation needs a question: there is no message of the user")
        if prompt.messages[-1].role == "user":
            prompt = Conversation((*prompt.messages, Message("assistant", "-")))
    if not isinstance(prompt, Completion | Instruction | Conversation):
        raise TypeError(f"a prompt is a text or a record of minipeft.text.datasets, not a {type(prompt).__name__}")
    return prompt


def as_messages(prompt: str | Record) -> tuple[Message, ...]:
    """What is asked, as a conversation that ends with the answer; see `as_asked`."""
    return _messages(as_asked(prompt), "chatml")


def question_and_answer(prompt: str | Record) -> tuple[str, str]:
    """(what is asked, the answer) in plain words: of a conversation the last question and the answer to it."""
    question, answer = as_messages(prompt)[-2:]
    return question.content, answer.content


def asked_turn(prompt: str | Record, template: Template | None = None, tokenizer: Tokenizer | None = None) -> Turn:
    """All that a model is shown when it is asked, and how an answer to it is written; see `as_asked`.

    `template` is by default the usual one of the record's form. Raises as it and `as_asked` do.
    """
    record = as_asked(prompt)
    *before, last = (template or default_template(record, tokenizer))(record)
    return Turn((*(piece for turn in before for part in turn for piece in part), *last.prompt), last.completion)


def choice_turns(record: MultipleChoice, template: Template = plain) -> list[Turn]:
    """Each of the choices as the answer to the question, in order.

    `plain` puts a space between the two where neither has white space there, which is what lm-evaluation-harness calls
    the target delimiter; other templates say themselves what stands between.
    """
    _check_form(record, MultipleChoice, "scoring choices")
    turns = []
    for choice in record.choices:
        apart = template is not plain or record.question[-1].isspace() or choice[0].isspace()
        turns.append(template(Completion(record.question, choice if apart else f" {choice}"))[-1])
    return turns


def preference_turns(record: Preference, template: Template = plain) -> tuple[Turn, Turn]:
    """The (chosen, rejected) answers to one prompt, each as a turn; the template takes Completion records."""
    _check_form(record, Preference, "a preference pair")
    chosen, rejected = (template(Completion(record.prompt, answer))[0] for answer in (record.chosen, record.rejected))
    return chosen, rejected


def unpaired_turn(record: UnpairedPreference, template: Template = plain) -> Turn:
    """The answer to a prompt; the template takes Completion records."""
    _check_form(record, UnpairedPreference, "an unpaired preference")
    return template(Completion(record.prompt, record.completion))[0]


def _instruction(record: Record) -> Record:
    """A Completion as the Instruction that its prompt is; any other record as it is."""
    return Instruction(record.prompt, "", record.completion) if isinstance(record, Completion) else record


def _check_form(record: object, form: type[Record], taker: str) -> None:
    """Raises ValueError unless the record has this form, into which `_instruction` and `_messages` turn other forms."""
    if not isinstance(record, form):
        others = {Instruction: (Instruction, Completion), Conversation: (Conversation, Instruction, Completion)}
        wanted = " or ".join(fields_of(other) for other in others.get(form, (form,)))
        raise ValueError(f"{taker} takes {wanted} records, got {fields_of(record)}")
