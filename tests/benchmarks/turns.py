"""Two libraries timed in turns, each in a process of its own.

A worker loads its library and then serves one request at a time, while the other one sleeps: neither's
spinning threads or memory get in the other's way, and a machine whose speed drifts slows both. A figure is the median of
the turns, a ratio the median over pairs of turns. Peak memory is the largest resident set of the process (VmHWM) since it
was ready, so the library's own code is in it.
"""

from __future__ import annotations

import argparse
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


def seconds(fn: Callable) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def stepper(loss: Callable, optimizer) -> Callable[[], float]:
    """A training step of either library: the value of `loss()`, by whose gradients `optimizer` has stepped."""

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def options(doc: str, what: tuple[str, ...], **defaults) -> argparse.Namespace:
    """What a benchmark is asked for: some of `what`, and options with these defaults. A worker is asked to `serve`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"any of {', '.join(what)} (default: all)")
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    for name, default in {"threads": 2, **defaults}.items():
        parser.add_argument(f"--{name}", type=str if default is None else type(default), default=default)
    found = parser.parse_args()
    if unknown := [name for name in found.what if name not in what]:
        parser.error(f"unknown: {unknown[0]!r} (choose from {', '.join(what)})")
    found.what = found.what or list(what)
    if not found.serve:  # a worker has them from here
        for name in ("MINIPEFT_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(found.threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
    return found


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


def both(*arguments: str) -> list[Worker]:
    """A worker of ours and one of theirs."""
    return [Worker("--serve", library, *arguments) for library in ("ours", "theirs")]


def in_turns(repeat: int, **calls: Callable) -> dict[str, list[float]]:
    """{name: seconds of each turn}, one call of each after the other in this process, after a turn that is not counted."""
    for call in calls.values():
        call()
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeat)]
    return {name: [turn[name] for turn in turns] for name in calls}


def memory(workers: list[Worker]) -> str:
    (ready, peak), (their_ready, their_peak) = (worker.ask("memory")[1] for worker in workers)
    return (
        f"resident memory before and at the peak: minipeft {ready:.0f} and {peak:.0f} MB, theirs {their_ready:.0f} and "
        f"{their_peak:.0f} MB; ratio of the peaks {peak / their_peak:.2f}, of their growth "
        f"{(peak - ready) / max(their_peak - their_ready, 0.1):.2f}"
    )


def alternate(workers: list[Worker], repeat: int, *request) -> tuple[list[list[float]], list]:
    """(seconds of each turn, for each worker; their first answers). A turn that is not counted goes first."""
    first = [worker.ask(*request)[1] for worker in workers]
    times = [[worker.ask(*request)[0] for worker in workers] for _ in range(repeat)]
    return [list(t) for t in zip(*times)], first


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a / b, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))
