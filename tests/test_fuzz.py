"""A short run of tests/fuzz.py: every reader, some damaged inputs, the same each time; and that the fuzzer sees what is wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import numpy as np
import pytest
from fuzz_readers import READERS, Reader

from minipeft.files import FileError, read_json

pytestmark = pytest.mark.filterwarnings("ignore")
SLOW = {"checkpoint": 12, "ppo": 15, "tokenizer": 60, "gguf": 60, "adapter": 60, "ratings": 60}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_loads_or_raises_the_documented_error_soon_and_in_little_memory(name):
    with np.errstate(all="ignore"):
        report = fuzz.fuzz(name, READERS[name], SLOW.get(name, 100), seed=1)
    assert not report.kinds, {kind: report.first[kind] for kind in report.kinds}
    assert report.counts["loaded"] and report.counts["documented error"] > report.counts.total() / 5


def broken(folder):
    """A reader with a defect for each column of the table."""
    value = read_json(folder / "x.json")["a"]
    if isinstance(value, str):
        while True:
            time.sleep(0.0001)
    if isinstance(value, list):
        bytearray(4 * fuzz.MEGABYTES << 20)  # much more: what earlier tests have left may be freed meanwhile
    return value + 1


def test_what_is_wrong_is_found_counted_kept_and_the_same_again(tmp_path, monkeypatch):
    def make(folder):
        (folder / "valid").mkdir(parents=True)
        (folder / "valid" / "x.json").write_text(json.dumps({"a": 1, "b": [2, "text"]}))

    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    reader = Reader(make, broken, (FileError, KeyError))
    whole = fuzz.fuzz("broken", reader, 90, seed=0, failures=tmp_path)
    assert {"loaded", "documented error", "wrong type", "slow or large"} == set(whole.counts)
    kinds = " ".join(whole.kinds)
    assert "TypeError" in kinds and "no end after 0.05 s" in kinds and "more than" in kinds
    number, what = whole.first[next(kind for kind in whole.kinds if "TypeError" in kind)]
    assert (tmp_path / "broken" / str(number) / "x.json").exists()
    again = fuzz.fuzz("broken", reader, 1, seed=0, start=number)
    assert [again.first[kind] for kind in again.kinds] == [(number, what)]


def test_the_command_prints_the_table_and_names_the_readers():
    script = str(Path(fuzz.__file__))
    run = subprocess.run([sys.executable, script, "template", "--inputs", "20"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    head, row = run.stdout.splitlines()
    assert head == fuzz.HEAD and row.split()[:2] == ["template", "20"] and row.split()[-2:] == ["0", "0"]
    run = subprocess.run([sys.executable, script, "nothing"], capture_output=True, text=True)
    assert run.returncode == 2 and "the readers are safetensors, config" in run.stderr
