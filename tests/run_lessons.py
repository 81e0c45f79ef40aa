"""Runs lessons as scripts, each in a process of its own that begins with what they all load: `LessonRunner`.

A lesson in a new process loads NumPy, Matplotlib, the corpora and the base, encodes text, and reads the league's rows,
before it does what no other does. Here one process does that, and is forked for each lesson.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

SECONDS = 600  # that a lesson may take


class LessonRunner:
    """The process that is forked; it warns by an error, as `python -W error`. Call `close` at the end."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip

    def run(self, path: Path, folder: Path, environment: dict[str, str], log: Path) -> int:
        """The exit status of `python path` in a folder, under changes of the environment; what it prints is in `log`."""
        print(json.dumps([str(path), str(folder), environment, str(log)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def load() -> None:
    """What lessons have in common, kept by the modules that load it."""
    import matplotlib.pyplot  # noqa: F401

    from minipeft.claims import data, standings
    from minipeft.claims.league import MAIN, league
    from minipeft.experiments import shipped
    from minipeft.rlhf.openings import sentence_openings

    shipped.rewriting(1, seed=0)
    sentence_openings("train", 4)
    league(MAIN).rows()
    for task in data.TASKS:
        standings.tokens(task)  # of training examples, whose records are kept too


def script(path: str, folder: str, environment: dict[str, str], log: str) -> int:
    """The exit status of a script, run in this process."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    os.environ.update(environment)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path[0], status = [path], str(Path(path).parent), 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    load()
    gc.collect()
    gc.freeze()  # of what is loaded nothing becomes garbage: no lesson looks for it there
    gc.set_threshold(10_000)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(script(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
