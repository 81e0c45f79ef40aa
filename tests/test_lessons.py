"""Every lesson runs from top to bottom in its reduced setting, and has the form that the lessons promise."""

from __future__ import annotations

import ast
import math
import os
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from matplotlib.image import imread
from run_lessons import LessonRunner

from minipeft.book.site import glossary
from minipeft.hub.smollm2 import HOW_TO_GET

LESSONS = sorted((Path(__file__).parent.parent / "lessons").glob("*.py"))
lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
EMPHASIS = {  # bold words that name nothing for later
    "add", "input", "last real token", "learning the prompt too", "left", "more phrasings", "more tasks", "nudge",
    "one batch element", "other text", "phrasings", "plain words", "standard pytorch loop", "subtract", "tasks",
    "the second gold turns", "this engine", "why warm up",
}  # fmt: skip
ORACLES = {"PyTorch": "torch", "transformers": "transformers", "PEFT": "peft", "bitsandbytes": "bitsandbytes"}


def cells(path: Path) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of each percent cell; a markdown cell without its comment signs."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not parts[0].strip(), f"{path.name}: text before the first cell"
    found = []
    for head, body in zip(parts[1::2], parts[2::2]):
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            lines = body.strip("\n").split("\n")
            bare = [line for line in lines if not line.startswith("#")]
            assert not bare, f"{path.name}: a line of a markdown cell is not a comment: {bare[0]!r}"
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
        found.append((kind, body))
    return found


def test_there_are_lessons():
    assert LESSONS


@pytest.fixture(scope="module")
def runner():
    environment = {**os.environ, "MINIPEFT_REDUCED": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("MINIPEFT_THREADS", "1")  # the models are small, and a thread may wait for a busy core
    made = LessonRunner(environment)
    yield made
    made.close()


@lesson
def test_lesson_runs_and_leaves_its_picture(path, runner, tmp_path):
    out, home, log = tmp_path / "out", tmp_path / "elsewhere", tmp_path / "log.txt"
    home.mkdir()
    text = path.read_text(encoding="utf-8")
    status = runner.run(path, home, {"MINIPEFT_LESSONS_OUT": str(out)}, log)
    printed = log.read_text(encoding="utf-8")
    assert status == 0, f"{path.name} failed:\n{printed[-6000:]}"
    if HOW_TO_GET in printed:
        pytest.skip(HOW_TO_GET)
    assert ("REDUCED SETTING: " in printed) == ("MINIPEFT_REDUCED" in text), "a reduced lesson says so"
    pictures = set(out.glob(f"{path.stem}*.png"))
    assert pictures, f"{path.name} saved no picture named {path.stem}*.png"
    named = [re.sub(r"\{\w+\}", "*", name) for name in re.findall(r'OUT / f?"([^"]+\.png)"', text)]
    assert set().union(*map(out.glob, named)) == pictures and all(map(list, map(out.glob, named))), "the reduced run saves all pictures"
    for picture in pictures:
        pixels = imread(picture)[::4, ::4]
        assert min(pixels.shape[:2]) > 40, f"{picture.name} is small"
        assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.01, f"{picture.name} is blank"
    assert not list(home.iterdir()), f"{path.name} wrote outside its output folder"


@lesson
def test_lesson_has_its_form(path):
    found = cells(path)
    text = "\n".join(body for kind, body in found if kind == "markdown")
    code = "\n".join(body for kind, body in found if kind == "code")
    assert found[0][0] == "markdown" and found[0][1].startswith("# "), "it begins with a heading"
    assert {"markdown", "code"} == {kind for kind, _ in found}
    assert "$" in text, "it states an equation"
    assert "import minipeft as mp" in code, "it uses the library"
    assert ("MINIPEFT_REDUCED" in code) == ('print("REDUCED SETTING: ' in code), "a reduced lesson says so"
    assert re.search(r"^## .*break it", text, re.MULTILINE | re.IGNORECASE), "it has a break-it experiment"
    _, exercises = re.split(r"^## Exercises$", text, maxsplit=1, flags=re.MULTILINE)
    numbered = re.findall(r"^(?:\d\. |\*\*\d\d\.\d )", exercises, re.MULTILINE)
    assert 2 <= len(numbered) <= 5, "it ends with two to five exercises"


@lesson
def test_lesson_asserts_what_it_claims(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asserted = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserted) >= 5
    assert not [node for node in asserted if isinstance(node.test, ast.Constant)], "an assertion that asserts nothing"


@lesson
def test_lesson_says_how_long_it_takes_to_read(path):
    """200 words or 25 lines of code, of 140 columns at most, a minute, up to the quiz. What the book folds is not read: imports, figures."""
    words = lines = 0
    preamble = next(body for kind, body in cells(path) if kind == "code")
    for kind, body in cells(path):
        body, quiz, _ = body.partition("## Quiz\n")
        if kind == "markdown":
            words += len(body.split())
        elif body != preamble and ".savefig(" not in body:
            lines += sum(bool(line.strip()) for line in body.splitlines())
        assert kind == "markdown" or max(map(len, body.splitlines())) <= 140, "too long a line"
        if quiz:
            break
    assert quiz, "it has a quiz"
    stated = int(re.search(r"Reading\s+takes\s+about\s+(\d+)\s+minutes", cells(path)[0][1])[1])
    assert stated == math.ceil(words / 200 + lines / 25), f"{words} words and {lines} lines of code, said to be {stated} minutes"
    assert stated <= 25, "what can be read at one sitting"


@cache
def prose(path: Path) -> str:
    """What a lesson says up to its quiz, without the verdicts, which are not its own words."""
    text = "\n".join(body for kind, body in cells(path) if kind == "markdown").partition("## Quiz\n")[0]
    return re.sub(r"^>.*$", "", text, flags=re.MULTILINE)


@lesson
def test_what_a_lesson_defines_is_in_the_glossary(path):
    """A term is bold within a paragraph; what begins a list's item, or ends with a full stop or colon, is a heading."""
    words = {word.casefold() for entry, _ in glossary() for word in entry.split(", ")} | EMPHASIS
    text = re.sub(r"^\|.*$", "", prose(path), flags=re.MULTILINE)
    for lead, bold in re.findall(r"(^(?:- |\d\. ))?\*\*([^*]+)\*\*", text, re.MULTILINE):
        term = " ".join(bold.split()).casefold()
        if not lead and term[-1] not in ".:?" and term != "predict":
            assert words & {term, term.removesuffix("s")}, f"{path.name}: {term!r}"


def says(text: str, word: str) -> bool:
    """Whether a word of the glossary is there: also in the plural or with -ed, and for its n or N also a number."""
    parts = [r"\$?(?:n|\d+)\$?" if part in ("n", "N") else re.escape(part) for part in re.split(r"[\s-]", word)]
    if re.fullmatch(r"\w+y", parts[-1]):
        parts[-1] = parts[-1][:-1] + "(?:y|ies)"
    return bool(re.search(rf"(?<!\w){'[ -]'.join(parts)}(?:e?s|ed)?(?!\w)", text, re.IGNORECASE))


@pytest.mark.parametrize("words, meaning", glossary(), ids=[words for words, _ in glossary()])
def test_the_lessons_that_an_entry_names_say_its_word(words, meaning):
    """Each lesson says one of the words, one of them each word; of the lessons in which a word is bold, one is named."""
    numbers = re.search(r"\((\d+(?:, \d+)*)\)$", meaning)
    assert numbers, "it names no lesson"
    named = [int(number) for number in numbers[1].split(", ")]
    plain = {number: " ".join(prose(LESSONS[number]).replace("*", "").split()) for number in named}
    for number, text in plain.items():
        assert any(says(text, word) for word in words.split(", ")), f"Lesson {number} does not say it"
    for word in words.split(", "):
        assert any(says(text, word) for text in plain.values()), f"none of the lessons says {word!r}"
        bold = rf"\*\*{re.escape(word)}s?\*\*"
        defining = [n for n, path in enumerate(LESSONS) if re.search(bold, " ".join(prose(path).split()), re.IGNORECASE)]
        assert not defining or set(defining) & set(named), f"{word!r} is bold in {defining}"


def test_versions_of_other_libraries_are_the_oldest_that_the_oracles_allow():
    """Lesson 0 says of which versions the lessons speak, so does the glossary, and no lesson names another one."""
    project = tomllib.loads((LESSONS[0].parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["project"]["optional-dependencies"]["oracles"])
    assert wanted.keys() == set(ORACLES.values())
    meanings = dict(glossary())
    for name, package in ORACLES.items():
        version = wanted[package]
        assert re.search(rf"version {re.escape(version)}(?![\d.])", meanings[name]), f"the glossary's {name}"
        for path in LESSONS:
            stated = re.findall(rf"(?<!\w)`?{name}`? \(?(\d+(?:\.\d+)+)", " ".join(prose(path).split()))
            assert all(f"{version}.".startswith(f"{less}.") for less in stated), f"{path.name}: {name} {stated}"
            assert path != LESSONS[0] or stated == [version], f"{path.name}: {name} {stated}"
