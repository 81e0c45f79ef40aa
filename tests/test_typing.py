"""Types reach the user: mypy sees through the names that are imported when they are first used."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs mypy, of the extra 'test'")


def test_mypy_accepts_what_is_right_and_refuses_what_is_misspelled(tmp_path):
    program = Path(__file__).with_name("typed.py")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--follow-imports=silent",
        "--ignore-missing-imports",
        "--no-error-summary",
    ]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path}", program],
        cwd=program.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    lines = program.read_text(encoding="utf-8").splitlines()
    wanted = {number: line.partition("# error: ")[2] for number, line in enumerate(lines, 1) if "# error: " in line}
    found = {int(line.split(":")[1]): line for line in errors}
    assert found.keys() == wanted.keys(), done.stdout + done.stderr
    for number, text in wanted.items():
        assert text in found[number]
