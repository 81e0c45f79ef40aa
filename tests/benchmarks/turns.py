"""Two libraries timed in turns, each in a process of its own.

A worker loads its library and then does what it is told, a request at a time, while the other one sleeps: neither's
spinning threads or memory get in the other's way, and a machine whose speed drifts slows both. A figure is the median of
the turns, a ratio the median over pairs of turns. Peak memory is the largest resident set of the process (VmHWM) since it
was ready, so the library's own code is in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PAUSE = 0.3  # seconds before a turn, in which the other process's spinning threads fall asleep


def serve(calls: dict[str, Callable]) -> None:
    """In the worker: answer each line of standard input, ["name", argument, ...], with [seconds, answer], until it ends."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    ready = resident("VmRSS")
    calls = {**calls, "memory": lambda: (ready, resident("VmHWM"))}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        start = time.perf_counter()
        answer = calls[name](*arguments)
        print(json.dumps([time.perf_counter() - start, answer]), flush=True)


def resident(which: str) -> float:
    """MB of memory of this process: "VmRSS" now, "VmHWM" at most."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) * 1024 / 1e6


class Worker:
    """This script, run with `arguments`, in a process that serves."""

    def __init__(self, *arguments: str):
        command = [sys.executable, sys.argv[0], *arguments]
        noise = None if os.environ.get("VERBOSE") else subprocess.DEVNULL  # progress bars and warnings of the peers
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True)

    def ask(self, *request) -> list:
        """[seconds, answer]."""
        time.sleep(PAUSE)
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise SystemExit(f"a worker ended; VERBOSE=1 shows why: {' '.join(self.process.args)}") from None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def alternate(workers: list[Worker], repeat: int, *request) -> tuple[list[list[float]], list]:
    """(seconds of each turn, for each worker; their first answers). A turn that is not counted goes first."""
    first = [worker.ask(*request)[1] for worker in workers]
    times = [[worker.ask(*request)[0] for worker in workers] for _ in range(repeat)]
    return [list(t) for t in zip(*times)], first


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a / b, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))
