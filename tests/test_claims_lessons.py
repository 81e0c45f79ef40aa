"""The rows of lessons/results, each computed again by the beginning of its lesson."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from minipeft.book import rows
from minipeft.book.lessons import LessonError
from minipeft.book.rows import FULL, OfLesson, of_lessons

LESSON = """# %%
import sys
from dataclasses import dataclass
from pathlib import Path

from minipeft.experiments.sweep import sweep

RESULTS = Path(__file__).parent / "results" / "07_lesson.jsonl"


@dataclass(frozen=True)
class Run:
    rate: float
    seed: int


def run(s):
    return {"loss": {"task": [s.rate, s.rate + s.seed]}, "read": ["text"], "cpu_seconds": 1.0}


if "--full" in sys.argv:
    sweep(run, [Run(rate, seed) for rate in (1.0, 2.0) for seed in range(3)], 1, RESULTS)
raise SystemExit("what comes then is not run")
"""


@pytest.fixture
def lesson(tmp_path):
    """A lesson with six rows."""
    path = tmp_path / "lessons" / "07_lesson.py"
    path.parent.mkdir()
    path.write_text(LESSON)
    made = OfLesson("07_lesson", tolerance=0.05, lesson=path)
    made.compute(tmp_path / "made")
    (tmp_path / "made" / "results").rename(path.parent / "results")
    return made


def rewrite(lesson, change):
    found = [change(row) for row in lesson.rows()]
    lesson.path().write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_row_is_computed_again_by_the_lesson_that_lacks_it_alone(lesson):
    before = lesson.path().read_bytes()
    for row in (lesson.rows()[0], lesson.rows()[5]):
        assert lesson.check(row, Random(0)) == []
    assert lesson.path().read_bytes() == before and len(lesson.rows()) == 6


def test_another_mean_is_told_beyond_the_seeds_and_the_tolerance(lesson):
    (seeds,) = rows.spread([*rows.by_settings(lesson.rows()).values()]).values()
    assert seeds == pytest.approx(np.std([0, 0.5, 1], ddof=1)), "of the means [rate, rate + seed], at one rate"
    rewrite(lesson, lambda row: row | {"loss": {"task": [x + 100 * (row["seed"] == 1) for x in row["loss"]["task"]]}} | {"read": ["other"]})
    assert lesson.check(lesson.rows()[0], Random(0)) == []
    rewrite(lesson, lambda row: row | {"loss": {"task": [x + 100 for x in row["loss"]["task"]]}} if row["seed"] != 1 else row)
    (line,) = lesson.check(lesson.rows()[0], Random(0))
    assert "loss task: 1.0, and 101.0 in lessons/results" in line and "'seed': 0" in line
    (line,) = lesson.differences([lesson.rows()[0]], [lesson.rows()[0] | {"loss": None}])
    assert "loss task: None" in line


def test_a_row_of_the_tuning_that_measures_less_hides_no_spread():
    group = [{"loss": 1.0}, {"loss": 2.0, "text": 1.0}, {"loss": 3.0, "text": 3.0}]
    assert rows.spread([group]) == {"loss": 1.0, "text": pytest.approx(2**0.5)}


def test_the_spread_of_five_seeds_of_other_settings_does_not_count(lesson):
    row = lesson.rows()[0]
    made = [row | {"seed": seed, "rate": rate, "loss": {"task": [rate + seed * (rate > 2)]}} for seed in range(5) for rate in (2.0, 3.0)]
    lesson.path().write_text("".join(json.dumps(one) + "\n" for one in made))
    (line,) = lesson.differences(made[:2], [one | {"loss": {"task": [one["rate"] + 1]}} for one in made[:2]])
    assert "'rate': 2.0" in line


def test_a_row_that_no_run_of_the_lesson_gives_is_told(lesson):
    lesson.lesson.write_text(LESSON.replace("(1.0, 2.0)", "(1.0,)"))
    (line,) = lesson.check(lesson.rows()[-1], Random(0))
    assert "'rate': 2.0" in line and line.endswith("the lesson does not compute it")
    assert lesson.differences(lesson.rows(), lesson.rows()[:2]) == [], "searches may go elsewhere on another processor"


def test_a_lesson_that_fails_is_told(lesson):
    lesson.lesson.write_text(LESSON.replace("def run(s):", "def run(s) -> nothing:"))
    with pytest.raises(LessonError, match=r"07_lesson\.py --full failed"):
        lesson.check(lesson.rows()[0], Random(0))


def test_every_lesson_with_rows_has_a_beginning_that_computes_them():
    found = of_lessons()
    assert {one.name[:2] for one in found} >= {"08", "09", "10", "11", "13", "14", "15", "17", "19", "20"}
    for one in found:
        text = one.lesson.read_text(encoding="utf-8")
        assert len(FULL.findall(text)) == 1 and "results" in text
        assert {one.affordable(row) for row in one.rows()} == {one.name != "13_real_llm"}, "SmolLM2's are left out"
    assert not replace(found[0], lesson=found[0].lesson.with_name("none.py"), name="none").path().exists()
