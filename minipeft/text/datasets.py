"""Data sets of your own: a file becomes records, or an error says which line is wrong and why.

A `.jsonl` file holds one JSON object per line, all of one form. The fields say which form it is:

    {"text": ...}                                           Document     text to continue, no prompt
    {"prompt": ..., "completion": ...}                      Completion   a prompt and what should follow it
    {"instruction": ..., "input": ..., "output": ...}       Instruction  Alpaca's form; "input" may be "" or left out
    {"messages": [{"role": ..., "content": ...}, ...]}      Conversation system (optional, first), then user and
                                                                         assistant in turn, ending with the assistant
    {"prompt": ..., "chosen": ..., "rejected": ...}         Preference   two answers, the first preferred
    {"prompt": ..., "completion": ..., "label": true}       UnpairedPreference  an answer that was liked, or not (false)
    {"question": ..., "choices": [...], "answer": ...}      MultipleChoice  "answer" is the index of a choice, from 0,
                                                                         or the text of one

A `.txt` file is one Document: all of it, blank lines included. (For many documents, write `{"text": ...}` lines.)
Both are UTF-8; a byte-order mark at the start and blank lines at the end are dropped. Anything else that is not as
described raises DatasetError; no line is ever skipped. Where a file has other fields, `columns` says which are meant:
{"prompt": "question", "completion": "response"}; those that it does not name are dropped.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..files import parse_json


class DatasetError(ValueError):
    """A data file is not as it should be; the text says the file, the line, what is wrong and what would be right."""

    def __init__(self, path: str | Path, line: int | None, reason: str):
        super().__init__(f"{path}:{line}: {reason}" if line is not None else f"{path}: {reason}")
        self.path, self.line, self.reason = str(path), line, reason


class Document(NamedTuple):
    """Text to continue, without a prompt."""

    text: str


class Completion(NamedTuple):
    """A prompt and what should follow it."""

    prompt: str
    completion: str


class Instruction(NamedTuple):
    """Alpaca's form; `input` may be ""."""

    instruction: str
    input: str
    output: str


class Message(NamedTuple):
    """What one side of a conversation says."""

    role: str  # "system", "user" or "assistant"
    content: str


class Conversation(NamedTuple):
    """An optional system message, then user and assistant in turn, ending with the assistant."""

    messages: tuple[Message, ...]


class Preference(NamedTuple):
    """Two answers to a prompt, the first preferred."""

    prompt: str
    chosen: str
    rejected: str


class UnpairedPreference(NamedTuple):
    """An answer to a prompt, and whether it is desirable."""

    prompt: str
    completion: str
    label: bool


class MultipleChoice(NamedTuple):
    """A question and two or more different answers to it, of which the one with the index `answer` is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


Record = Document | Completion | Instruction | Conversation | Preference | UnpairedPreference | MultipleChoice

FORMS = (Document, Completion, Instruction, Conversation, Preference, UnpairedPreference, MultipleChoice)
_OPTIONAL = {Instruction: {"input"}}  # fields that may be "" or left out
Columns = Mapping[str, str]  # a form's fields, each with its name in the file
_READ = {".json": "json.load(sys.stdin)", ".csv": "csv.DictReader(sys.stdin)"}  # the records of other files


def read_dataset(path: str | Path, columns: Columns | None = None) -> list[Record]:
    """The records of a `.jsonl` or `.txt` file, all of one type. Raises DatasetError."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        reason = f"a data set is a .jsonl or .txt file, this one ends in {path.suffix!r}"
        if path.suffix in _READ:
            code = f"import csv, json, sys; [print(json.dumps(r)) for r in {_READ[path.suffix]}]"
            read, written = (shlex.quote(str(p)) for p in (path, path.with_suffix(".jsonl")))
            reason += f'; this turns it into one: python -c "{code}" < {read} > {written}'
        raise DatasetError(path, None, reason)
    _check_columns(path, columns)
    if path.suffix == ".txt":
        return [_read_text(path)]
    records: list[Record] = []
    for number, record in enumerate(_parsed(path, partial(parse_record, columns=columns), "record"), start=1):
        if records and type(record) is not type(records[0]):
            one, other = fields_of(type(record)), fields_of(type(records[0]))
            reason = f"the record has the form {one}, the lines before it {other}; one file holds one form"
            raise DatasetError(path, number, reason)
        records.append(record)
    return records


def read_prompts(path: str | Path, columns: Columns | None = None) -> list[str | Record]:
    """The lines of a text file, or what every line of a .jsonl file asks: its field 'prompt', else the whole record.

    What is beside a 'prompt' does not matter, so that a line may hold a prompt alone. Raises DatasetError.
    """
    path = Path(path)
    _check_columns(path, columns)
    return list(_parsed(path, partial(_prompt, columns=columns) if path.suffix == ".jsonl" else _decoded, "prompt"))


def _check_columns(path: Path, columns: Columns | None) -> None:
    """Raises DatasetError for columns of a file that has none, or that no form has."""
    if columns and path.suffix != ".jsonl":
        raise DatasetError(path, None, "only a .jsonl file has columns; leave them out")
    known = dict.fromkeys(field for form in FORMS for field in form._fields)
    if wrong := [field for field in columns or () if field not in known]:
        raise DatasetError(path, None, f"columns: {wrong[0]!r} is no field of a form; those are {', '.join(known)}")


def _parsed(path: Path, parse: Callable[[bytes], Any], what: str) -> Iterator[Any]:
    """`parse` of every line of a file in turn; the ValueError that it raises becomes a DatasetError of the line."""
    lines = _content(path).split(b"\n")  # not splitlines(): a JSON string may hold U+2028 and its like
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DatasetError(path, None, f"the file is empty; it must hold at least one {what}")
    for number, line in enumerate(lines, start=1):
        try:
            yield parse(line)
        except ValueError as error:
            raise DatasetError(path, number, str(error)) from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DatasetError(path, None, f"cannot be read ({error.strerror or error})") from error


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}") from error


def _json(line: bytes) -> Any:
    if not line.strip():
        raise ValueError("the line is blank; every line before the end must hold one JSON object")
    try:
        return parse_json(_decoded(line), object_pairs_hook=_object_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error


def _prompt(line: bytes, columns: Columns | None) -> str | Record:
    value = _renamed(_json(line), columns)
    if isinstance(value, dict) and "prompt" in value:
        return _text(value["prompt"], "field 'prompt'")
    return record_of(value)


def parse_record(line: bytes, columns: Columns | None = None) -> Record:
    """One JSON line in UTF-8 as a record; ValueError says what is wrong with it."""
    return record_of(_renamed(_json(line), columns))


def _renamed(value: Any, columns: Columns | None) -> Any:
    if not columns or not isinstance(value, dict):
        return value
    if missing := [name for name in columns.values() if name not in value]:
        raise ValueError(f"columns: there is no field {missing[0]!r}; the fields are {sorted(value)}")
    return {field: value[name] for field, name in columns.items()}


def record_of(value: Any) -> Record:
    """A dict with the fields of one form as a record of that form; a record as it is.

    Raises ValueError for anything else, naming what is wrong with it.
    """
    if isinstance(value, FORMS):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object with the fields of one form, got {_json_type(value)}")
    form = _form_of(value)
    if form is Conversation:
        return Conversation(_messages(value["messages"]))
    if form is MultipleChoice:
        choices = _choices(value["choices"])
        return MultipleChoice(_text(value["question"], "field 'question'"), choices, _answer(value["answer"], choices))
    if form is UnpairedPreference and not isinstance(value["label"], bool):
        raise ValueError(f"field 'label' must be true (desirable) or false, got {_json_type(value['label'])}")
    optional = _OPTIONAL.get(form, ())
    record = form(
        *(
            value[field] if field == "label" else _text(value.get(field, ""), f"field {field!r}", field in optional)
            for field in form._fields
        )
    )
    if form is Preference and record.chosen == record.rejected:
        raise ValueError("fields 'chosen' and 'rejected' are the same text, so that neither is preferred")
    return record


def _read_text(path: Path) -> Document:
    content = _content(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError(path, line, f"not UTF-8: found the byte 0x{content[error.start]:02x}") from error
    if not text.strip():
        raise DatasetError(path, None, "the file is empty; it must hold some text")
    return Document(text)


def _form_of(value: dict[str, Any]) -> type[Record]:
    """The form with these fields. Where there is none, ValueError says what the nearest form lacks or does not have."""
    keys = set(value)
    for form in FORMS:
        if set(form._fields) - _OPTIONAL.get(form, set()) <= keys <= set(form._fields):
            return form
    forms = [form for form in FORMS if form is not MultipleChoice or "choices" in keys]  # else questions are prompts
    nearest = max(forms, key=lambda form: len(keys & set(form._fields)) / len(keys | set(form._fields)))
    every = ", ".join(map(fields_of, FORMS))
    columns = "; --columns FIELD=NAME, in Python columns={FIELD: NAME}, renames fields and drops the others"
    if not keys & set(nearest._fields):
        raise ValueError(f"the fields {sorted(keys)} are none of the known forms: {every}{columns}")
    missing = [field for field in nearest._fields if field not in keys | _OPTIONAL.get(nearest, set())]
    wrong = [f"field {field!r} is missing" for field in missing]
    wrong += [f"field {field!r} is unknown" for field in sorted(keys - set(nearest._fields))]
    columns *= not keys <= set(nearest._fields)
    raise ValueError(f"{', '.join(wrong)}; the form is {fields_of(nearest)} (all forms: {every}){columns}")


def _text(value: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, got {_json_type(value)}")
    if not value.strip() and not (may_be_empty and value == ""):
        raise ValueError(f"{what} is {'empty' if not value else 'only white space'}; it must hold some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair at character {error.start}, no text") from error
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        got = "one" if isinstance(value, list) and value else _json_type(value)
        raise ValueError(f"field 'choices' must be a list of at least two texts, got {got}")
    choices = tuple(_text(item, f"choice {number}") for number, item in enumerate(value))
    for number, text in enumerate(choices):
        if (first := choices.index(text)) != number:
            raise ValueError(f"choices {first} and {number} are the same text {text!r}; each must be another")
    return choices


def _answer(value: Any, choices: tuple[str, ...]) -> int:
    """The index of the right choice, from the index or the text of it."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if type(value) is int and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"field 'answer' must be the index of a choice, 0 to {len(choices) - 1}, or the text of one, got {value!r}"
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"field 'messages' must be a list of at least two messages, got {_json_type(value)}")
    messages = []
    for number, item in enumerate(value, start=1):
        what = f"message {number}"
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            got = f"the fields {sorted(item)}" if isinstance(item, dict) else _json_type(item)
            raise ValueError(f"{what} must be an object with the fields 'role' and 'content', got {got}")
        if item["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"the role of {what} must be 'system', 'user' or 'assistant', got {item['role']!r}")
        messages.append(Message(item["role"], _text(item["content"], f"the content of {what}")))
    first = 1 + (messages[0].role == "system")
    for number, message in enumerate(messages[first - 1 :], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if message.role != expected:
            raise ValueError(
                f"message {number} is the {message.role}'s where the {expected}'s is due; after an optional first "
                f"system message, user and assistant take turns"
            )
    if messages[-1].role != "assistant":
        last = messages[-1].role
        raise ValueError(f"the last message must be the assistant's, since that is what is learned; got the {last}'s")
    return tuple(messages)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"field {name!r} stands there twice")
        value[name] = item
    return value


def fields_of(form: object) -> str:
    """ "{prompt, completion}", of a form or a record; of anything else its type's name."""
    return "{" + ", ".join(getattr(form, "_fields", (type(form).__name__,))) + "}"


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object", list: "a list"}
    made = names.get(type(value), f"a {type(value).__name__}")
    return "null" if value is None else "an empty list" if value == [] else made
