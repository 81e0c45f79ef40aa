"""Reading data sets: each form, and one clear sentence with file and line for each thing that can be wrong."""

import json
import subprocess
import sys

import pytest

from minipeft.text.datasets import (
    Completion,
    Conversation,
    DatasetError,
    Document,
    Instruction,
    Message,
    MultipleChoice,
    Preference,
    read_dataset,
    read_prompts,
)

GOOD = {"prompt": "a", "completion": "b"}
ASKED = {"question": "q", "choices": ["a", "b"], "answer": 0}
SYSTEM, *CHAT = ({"role": r, "content": c} for r, c in (("system", "s"), ("user", "Hi"), ("assistant", "Hello")))
NO_MESSAGE = "message 1 must be an object with the fields 'role' and 'content'"
SAID = (Message("user", "Hi"), Message("assistant", "Hello"))


def write(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "row, record",
    [
        ({"text": " x\n"}, Document(" x\n")),
        (GOOD, Completion("a", "b")),
        ({"output": "o", "instruction": "i", "input": ""}, Instruction("i", "", "o")),
        ({"instruction": "i", "output": "o"}, Instruction("i", "", "o")),
        ({"messages": CHAT}, Conversation(SAID)),
        ({"messages": [SYSTEM, *CHAT]}, Conversation((Message("system", "s"), *SAID))),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, MultipleChoice("q", ("a", "b"), 1)),
        ({"question": "q", "choices": ["1", "0"], "answer": "0"}, MultipleChoice("q", ("1", "0"), 1)),
    ],
)
def test_forms(tmp_path, row, record):
    assert read_dataset(write(tmp_path, [row, row])) == [record, record]


def test_line_ends_byte_order_mark_and_blank_end(tmp_path):
    line = '{"text": "a\u2028b"}'  # a line separator inside a string is not a line end
    path = write(tmp_path, b"\xef\xbb\xbf" + f"{line}\r\n{line}\n\r\n \n".encode())
    assert read_dataset(path) == [Document("a\u2028b")] * 2


def test_text_file_is_one_document(tmp_path):
    assert read_dataset(write(tmp_path, b"\xef\xbb\xbfOne.\n\nTwo.\n", "a.txt")) == [Document("One.\n\nTwo.\n")]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{bad", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("", "the line is blank"),
        ("[1]", "must be a JSON object with the fields of one form, got a list"),
        ("null", "got null"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "text": "b"}', "field 'text' stands there twice"),
        ({"prompt": "a"}, "field 'completion' is missing; the form is {prompt, completion}"),
        ({"prompt": "a", "completion": "b", "id": 3}, "field 'id' is unknown; the form is {prompt, completion}"),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing; the form is {prompt, chosen, rejected}"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "fields 'chosen' and 'rejected' are the same text"),
        ({"prompt": "a", "chosen": None, "rejected": None}, "field 'chosen' must be a string, got null"),
        ({"instruction": "a", "response": "b"}, "field 'output' is missing, field 'response' is unknown"),
        ({"ask": "a"}, "the fields ['ask'] are none of the known forms: {text}, {prompt, completion}, "),
        ({}, "the fields [] are none of the known forms"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt' must be a string, got a number"),
        ({"prompt": None, "completion": "b"}, "field 'prompt' must be a string, got null"),
        ({"prompt": "", "completion": "b"}, "field 'prompt' is empty; it must hold some text"),
        ({"prompt": "a", "completion": " \n"}, "field 'completion' is only white space"),
        ('{"prompt": "a\\ud800", "completion": "b"}', "field 'prompt' holds half of a surrogate pair at character 1"),
        ({"instruction": "a", "input": " ", "output": "b"}, "field 'input' is only white space"),
        ({"text": "a"}, "has the form {text}, the lines before it {prompt, completion}; one file holds one form"),
        (ASKED | {"question": " "}, "field 'question' is only white space"),
        (ASKED | {"choices": "ab"}, "field 'choices' must be a list of at least two texts, got a string"),
        (ASKED | {"choices": []}, "field 'choices' must be a list of at least two texts, got an empty list"),
        (ASKED | {"choices": ["a"]}, "field 'choices' must be a list of at least two texts, got one"),
        (ASKED | {"choices": ["a", 3]}, "choice 1 must be a string, got a number"),
        (ASKED | {"choices": ["a", ""]}, "choice 1 is empty"),
        (ASKED | {"choices": ["a", "b", "a"]}, "choices 0 and 2 are the same text 'a'; each must be another"),
        (ASKED | {"answer": 2}, "field 'answer' must be the index of a choice, 0 to 1, or the text of one, got 2"),
        (ASKED | {"answer": -1}, "or the text of one, got -1"),
        (ASKED | {"answer": True}, "or the text of one, got True"),
        (ASKED | {"answer": "c"}, "or the text of one, got 'c'"),
        ({"choices": ["a"]}, "field 'question' is missing, field 'answer' is missing; the form is {question, choices, answer}"),
        ({"question": "a", "answer": "b"}, "{text}, {prompt, completion}, {instruction, input, output}, "),
        ({"question": "a", "answer": "b"}, "; --columns FIELD=NAME, in Python columns={FIELD: NAME}, renames fields and drops"),
        ({"prompt": "a", "completion": "b", "id": 3}, "; --columns FIELD=NAME, in Python columns="),
        ({"messages": "a"}, "field 'messages' must be a list of at least two messages, got a string"),
        ({"messages": []}, "got an empty list"),
        ({"messages": ["a"]}, f"{NO_MESSAGE}, got a string"),
        ({"messages": [{"role": "user"}]}, f"{NO_MESSAGE}, got the fields ['role']"),
        (
            {"messages": [CHAT[0] | {"role": "human"}]},
            "role of message 1 must be 'system', 'user' or 'assistant', got 'human'",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "got ['user']"),
        ({"messages": CHAT[:1]}, "the last message must be the assistant's"),
        ({"messages": CHAT[1:]}, "message 1 is the assistant's where the user's is due"),
        ({"messages": [*CHAT, CHAT[1]]}, "message 3 is the assistant's where the user's is due"),
        ({"messages": [*CHAT, SYSTEM]}, "message 3 is the system's where the user's is due"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "the content of message 2 is empty"),
    ],
)
def test_bad_line(tmp_path, row, reason):
    bad = row if isinstance(row, str) else json.dumps(row)
    path = write(tmp_path, f"{json.dumps(GOOD)}\n{bad}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DatasetError) as error:
        read_dataset(path)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)
    assert "\n" not in str(error.value) and error.value.line == 2


def test_not_utf8(tmp_path):
    with pytest.raises(DatasetError, match=r"data\.jsonl:2: not UTF-8: byte 10 of the line is 0xe9"):
        read_dataset(write(tmp_path, b'{"text": "a"}\n{"text": "\xe9"}\n'))
    with pytest.raises(DatasetError, match=r"a\.txt:3: not UTF-8: found the byte 0xe9"):
        read_dataset(write(tmp_path, b"a\nb\n\xe9", "a.txt"))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", "\n \n", "the file is empty; it must hold at least one record"),
        ("a.txt", " \n", "the file is empty; it must hold some text"),
        ("a.tsv", "a\tb", "a data set is a .jsonl or .txt file, this one ends in '.tsv'$"),
    ],
)
def test_bad_file(tmp_path, name, content, reason):
    with pytest.raises(DatasetError, match=reason):
        read_dataset(write(tmp_path, content, name))


@pytest.mark.parametrize("name, content", [("a b.csv", "prompt,completion\na,\"b\n\"\n"), ("a.json", '[{"prompt": "a", "completion": "b\\n"}]')])
def test_the_command_that_the_error_gives_makes_a_data_set_of_another_file(tmp_path, name, content):
    path = write(tmp_path, content, name)
    with pytest.raises(DatasetError, match="this turns it into one: python -c ") as error:
        read_dataset(path)
    subprocess.run(error.value.reason.partition("one: ")[2].replace("python", sys.executable, 1), shell=True, check=True)
    assert read_dataset(path.with_suffix(".jsonl")) == [Completion("a", "b\n")]


def test_columns_rename_the_fields_that_they_name_and_drop_the_others(tmp_path):
    path, columns = write(tmp_path, '{"question": "a", "response": "b", "id": 3}\n'), {"prompt": "question"}
    assert read_dataset(path, {**columns, "completion": "response"}) == [Completion("a", "b")]
    assert read_prompts(path, columns) == ["a"]
    with pytest.raises(DatasetError, match=r"1: columns: there is no field 'answer'; the fields are \['id', 'question', 'response'\]"):
        read_dataset(path, {**columns, "completion": "answer"})
    with pytest.raises(DatasetError, match=r"columns: 'prompts' is no field of a form; those are text, prompt, "):
        read_dataset(path, {"prompts": "question"})
    for read in (read_dataset, read_prompts):
        with pytest.raises(DatasetError, match=r"only a \.jsonl file has columns"):
            read(write(tmp_path, "a", "a.txt"), columns)


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_dataset(tmp_path / "none.jsonl")
