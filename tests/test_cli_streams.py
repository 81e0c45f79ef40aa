"""The command line with standard streams of every kind: closed, full, of a narrow encoding, a terminal; and interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import jsonl, run, tiny

ROOT = str(Path(__file__).parent.parent)
posix = pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX closes the streams")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = ({"prompt": f"{i}:", "completion": f" {i}"} for i in range(6))
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def shell(redirections, *argv, path=ROOT, **environment):
    """`minipeft ARGV REDIRECTIONS` of a shell."""
    command = ["sh", "-c", f'"$@" {redirections}', "sh", sys.executable, "-m", "minipeft", *map(str, argv)]
    environment = {**os.environ, "MINIPEFT_THREADS": "1", "PYTHONPATH": str(path), **environment}
    listen = None if sys.platform == "win32" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background, too
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, preexec_fn=listen)


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(closed, model, data, tmp_path):
    output = tmp_path / "o"
    done = shell(closed, "finetune", "--model", model, "--data", data, "--output", output, "--steps", 1)
    assert done.returncode == 0 and b"Error" not in done.stderr and (output / "model.safetensors").exists()
    assert (b"saved in" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@posix
def test_a_closed_standard_input_has_no_prompt(model):
    done = shell("<&-", "generate", "--model", model)
    assert (done.returncode, done.stderr) == (2, b"minipeft: error: prompt 1 is empty; a prompt needs some text\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_encoding_of_the_output_lacks_is_escaped_as_in_json(encoding, model, tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("é’🙂\n", encoding="utf-8")
    argv = ["generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 4]
    texts = {}
    for form in ("text", "json"):
        done = shell("", *argv, *["--json"] * (form == "json"), PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        texts[form] = done.stdout.decode(encoding)
    assert json.loads(texts["json"])["prompt"] == "é’🙂"
    shown = {"ascii": r"\u00e9\u2019\ud83d\ude42", "latin-1": r"é\u2019\ud83d\ude42", "utf-8": "é’🙂"}[encoding]
    assert texts["text"].startswith(shown)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["count", "gpt3"], ["lessons"]], ids="-".join)
def test_a_full_disk_behind_the_output_is_one_line(argv, unbuffered):
    done = shell("> /dev/full", *argv, PYTHONUNBUFFERED=unbuffered)
    said = b"minipeft: error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_no_text_of_a_model_or_a_file_controls_the_terminal(model, data, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    evil = "a\x1b[2J\x9b31m\x07\rb"
    (prompts := tmp_path / "prompts.txt").write_text(f"{evil}\none\n", encoding="utf-8")
    for name in ("TERM", "COLORTERM"):
        monkeypatch.setenv(name, "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run("generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 1) == 0
    assert terminal.getvalue().startswith(r"a\u001b[2J\u009b31m\u0007\rb") and "\x1b" not in terminal.getvalue()
    assert sys.stdout is terminal, "as it was"

    rows = jsonl(tmp_path / "evil.jsonl", ({"prompt": f"{i} {evil}", "completion": evil} for i in range(4)))
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    argv = ["finetune", "--model", model, "--data", rows, "--output", tmp_path / "o", "--steps", 1]
    assert run(*argv) == 0
    shown = terminal.getvalue()
    assert r"a\u001b[2J\u009b31m" in shown and "\x1b[2J" not in shown and "\x9b" not in shown
    assert "\x1b[1m" in shown, "the bold words of a table are"
    assert run("generate", "--model", tmp_path / "\x1b[2J", "--prompt", "a") == 2
    assert r"\u001b[2J" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_a_file_holds_the_text_as_it_is(model, tmp_path, capsys):
    (prompts := tmp_path / "prompts.txt").write_text("a\x1b[2J\n", encoding="utf-8")
    assert run("generate", "--model", model, "--prompts", prompts, "--max-new-tokens", 1) == 0
    assert capsys.readouterr().out.startswith("a\x1b[2J")


@pytest.mark.parametrize("moment", ["argparse", "numpy"])
def test_an_interrupt_at_the_very_start_shows_no_traceback(moment, tmp_path):
    """The module that is imported then interrupts its process."""
    (tmp_path / f"{moment}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = shell("", "generate", "--prompt", "a", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="its file names are UTF-8")
def test_paths_that_are_no_utf8(model, data, tmp_path):
    base, output, merged, page = (tmp_path / os.fsdecode(name) for name in (b"b\xe9", b"o\xe9", b"m\xe9", b"p\xe9"))
    os.rename(tiny(tmp_path / "tiny"), base)
    assert run("finetune", "--model", base, "--data", data, "--output", output, "--steps", 1, "--method", "lora") == 0
    assert json.loads((output / "finetune.json").read_text())["options"]["output"] == str(output)
    assert run("generate", "--adapter", output, "--prompt", "a", "--max-new-tokens", 1) == 0
    assert run("merge", "--adapter", output, "--output", merged) == 0
    argv = ["compare", "--model", merged, "--data", data, "--reduced", "--steps", 1, "--methods", "full"]
    assert run(*argv, "--report", page) == 0 and (page / "index.html").exists()


def test_matplotlib_that_cannot_be_imported_loses_nothing(model, data, tmp_path):
    """matplotlib refuses to be imported with the name of a backend that it does not have."""
    done = shell("", "finetune", "--model", model, "--data", data, "--output", tmp_path, "--steps", 1, MPLBACKEND="nonsense")
    assert done.returncode == 0 and {"model.safetensors", "finetune.json"} <= {path.name for path in tmp_path.iterdir()}
    assert b"minipeft: warning: " in done.stderr and b"loss.png was not drawn: " in done.stderr


def test_a_picture_that_cannot_be_drawn_loses_nothing(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pairs = jsonl(tmp_path / "pairs.jsonl", ({"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(6)))
    (prompts := tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "rewards_here.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    online = ["--reward-function", "rewards_here:length", "--prompts", prompts, "--batch-size", 2, "--mini-batch-size", 2]
    of = {"finetune": ["--data", data], "reward": ["--data", pairs], "dpo": ["--data", pairs]}
    of["ppo"] = [*online, "--response-length", 4]
    for command, more in of.items():
        assert run(command, "--model", model, "--output", output := tmp_path / command, "--steps", 1, *more) == 0
        assert {"model.safetensors", f"{command}.json"} <= {path.name for path in output.iterdir()}
        said = capsys.readouterr().err
        assert "minipeft: warning: " in said and ".png was not drawn: " in said


def test_a_report_that_cannot_be_written_is_said_before_the_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minipeft.cli.compare.train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    argv = ["compare", "--model", model, "--reduced", "--methods", "full", "--output", tmp_path / "o"]
    assert run(*argv, "--report", tmp_path / "file" / "page") == 2
    assert "Not a directory" in (said := capsys.readouterr().err) and str(tmp_path / "file" / "page") in said
