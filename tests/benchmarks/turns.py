"""Two libraries timed in turns, each in a process of its own, with one thread and with all.

A worker loads its library and then serves one request at a time, while the other one sleeps: neither's
spinning threads or memory get in the other's way, and a machine whose speed drifts slows both. With n threads it has n of
the machine's cores. A ratio is ours / theirs: of the best turns, and the median over pairs of turns. Peak memory is the
largest resident set of the process (VmHWM) since it was ready, so the library's own code is in it.

    products' share = FLOPs of the step (`minipeft.accounting.step_flops`) / product rate / seconds of our best turn

The product rate is that of NumPy's products at the shapes of the model's own layers, in the worker that is timed: what
remains of the step would remain if everything else were free. `--json FILE` keeps the rows, a line each, in the place of
older ones of the same work, peer, threads and processor; `python tests/benchmarks/turns.py FILE` prints a table of each
processor's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

PAUSE = 0.3  # seconds before a turn, in which the other process's spinning threads fall asleep
SAME = ("work", "peer", "threads", "processor")  # what tells rows apart


# ------------------------------------------------------------------------------------------------------- in a worker


def serve(calls: dict[str, Callable]) -> None:
    """Answer each line of standard input, ["name", argument, ...], with [seconds, answer], until it ends."""
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


def trainers_step(model, optimizer, ids) -> Callable[[], float]:
    """A training step of ours on ids [B, T + 1], as the Trainer takes it; the last token is a target alone."""
    from minipeft.train.batches import collate
    from minipeft.train.callbacks import Callbacks
    from minipeft.train.evaluation import model_loss
    from minipeft.train.trainer import training_step

    batch, trained = collate([(row, row) for row in ids]), {n: p for n, p in model.named_parameters() if p.requires_grad}
    options = dict(step=1, seed=0, max_grad_norm=None, by_rows=True)
    return lambda: training_step(model, [batch], model_loss, trained, optimizer, Callbacks(model), **options)["loss"]


def products(make: Callable, wait: Callable = lambda y: y) -> Callable:
    """(weights, kinds) -> (FLOPs, seconds) of a model's products alone, each the best of five; see `weights`.

    make(n, m) is an array of the library. kinds: 1, x Wᵀ alone; 2, the input's gradient g W too; 3, and the weight's, gᵀ x.
    The weight then lies in cache where it fits: for products of few rows, bound by reading it, the rate is an upper bound.
    """

    def measure(weights: list, kinds: int) -> tuple[float, float]:
        flops = total = 0.0
        for tokens, n_in, n_out, times in weights:
            x, w, g = make(tokens, n_in), make(n_out, n_in), make(tokens, n_out)
            for product in (lambda: wait(x @ w.T), lambda: wait(g @ w), lambda: wait(g.T @ x))[:kinds]:  # noqa: B023
                total += times * min(seconds(product) for _ in range(5))
                flops += times * 2 * tokens * n_in * n_out
        return flops, total

    return measure


def numpy_products() -> Callable:
    import numpy as np

    return products(lambda n, m: np.random.default_rng(0).random((n, m), np.float32))


def torch_products() -> Callable:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return products(torch.rand)


# --------------------------------------------------------------------------------------------------- in the benchmark


def options(doc: str, what: tuple[str, ...], libraries: Sequence[str] = ("ours", "theirs"), **defaults) -> argparse.Namespace:
    """What a benchmark is asked for: some of `what`, and options with these defaults. A worker is asked to `serve`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"any of {', '.join(what)} (default: all)")
    parser.add_argument("--serve", choices=libraries, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=counts, default=sorted({1, cores()}), metavar="N,...", help="default: 1 and all")
    parser.add_argument("--json", metavar="FILE", help="put the rows into this file, a line of JSON each")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=str if default is None else type(default), default=default)
    found = parser.parse_args()
    if unknown := [name for name in found.what if name not in what]:
        parser.error(f"unknown: {unknown[0]!r} (choose from {', '.join(what)})")
    found.what = found.what or list(what)
    if found.serve:
        (n,) = found.threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])  # JAX and tinygrad take as many threads as cores
        for name in ("MINIPEFT_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(n)  # libraries are loaded from here on
        os.environ["HF_HUB_OFFLINE"] = "1"
    else:
        print(f"{processor()}; {cores()} cores", flush=True)
    return found


def counts(text: str) -> list[int]:
    """Numbers of threads, as in "1,2"."""
    found = [int(n) for n in text.split(",")]
    if bad := [n for n in found if not 1 <= n <= cores()]:
        raise argparse.ArgumentTypeError(f"{bad[0]} threads on {cores()} cores: give 1 to {cores()}")
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """Its name, its family and model, by which a virtual machine's can be told, and its vector and matrix units."""
    with open("/proc/cpuinfo") as file:
        found = dict(line.split("\t:", 1) if "\t:" in line else (line, "") for line in file.read().split("\n\n")[0].split("\n"))
    found = {name.strip(): value.strip() for name, value in found.items()}
    units = [unit for unit in ("avx2", "avx512f", "amx_tile", "asimd", "sve") if unit in found.get("flags", found.get("Features", "")).split()]
    place = " ".join(f"{name.lower()} {found[name]}" for name in ("cpu family", "model") if name in found)
    return ", ".join(filter(None, (found.get("model name", os.uname().machine), place, " ".join(units))))


class Worker:
    """This script, run with `arguments`, in a process that serves a library with a number of threads."""

    def __init__(self, library: str, threads: int, *arguments: str):
        command = [sys.executable, sys.argv[0], "--serve", library, "--threads", str(threads), *arguments]
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


class Pair:
    """A worker of ours and one of theirs: `with Pair(...) as pair`."""

    def __init__(self, threads: int, *arguments: str, libraries: tuple[str, str] = ("ours", "theirs")):
        self.threads, self.workers = threads, [Worker(library, threads, *arguments) for library in libraries]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: Any) -> None:
        for worker in self.workers:
            worker.close()

    def alternate(self, repeat: int, *request) -> tuple[list[list[float]], list]:
        """(seconds of each turn, for each worker; their first answers). A turn that is not counted goes first."""
        first = [worker.ask(*request)[1] for worker in self.workers]
        times = [[worker.ask(*request)[0] for worker in self.workers] for _ in range(repeat)]
        return [list(t) for t in zip(*times)], first

    def row(self, work: str, peer: str, times: list[list[float]], unit: str = "ms", amount: float = 1.0) -> dict:
        """The row of some work: in "ms" of each of the `amount` steps of a turn, or a turn's `amount` a second."""
        from minipeft import __version__

        a, b = ([1e3 * t / amount if unit == "ms" else amount / t for t in turn] for turn in times)
        best = min if unit == "ms" else max
        memory = [worker.ask("memory")[1] for worker in self.workers]
        return {
            "run": "speed", "settings": [*SAME], "work": work, "peer": peer, "threads": self.threads, "unit": unit, "amount": amount,
            "ours": best(a), "ours_median": statistics.median(a), "theirs": best(b), "theirs_median": statistics.median(b),
            "ratio": best(a) / best(b), "ratio_median": ratio(a, b), "pairs": len(a),
            "our_peak_mb": memory[0][1], "their_peak_mb": memory[1][1],
            "our_growth_mb": memory[0][1] - memory[0][0], "their_growth_mb": memory[1][1] - memory[1][0],
            "processor": processor(), "cores": cores(), "minipeft": __version__,
        }  # fmt: skip

    def beside_products(self, row: dict, weights: list, kinds: int, flops: float | None = None) -> dict:
        """The row with the rates of products of both libraries, and the share of our best time that products need.

        flops: of what took that time; by default those of `weights` themselves.
        """
        found = [worker.ask("products", weights, kinds)[1] for worker in self.workers]
        rates = [flops / seconds for flops, seconds in found]
        flops = found[0][0] if flops is None else flops
        spent = row["ours"] if row["unit"] == "ms" else 1e3 * row["amount"] / row["ours"]
        return row | {
            "our_gflops": rates[0] / 1e9, "their_gflops": rates[1] / 1e9, "products_share": 1e3 * flops / rates[0] / spent,
        }  # fmt: skip


def weights(config: Any, tokens: int, head: bool = True) -> list[list[int]]:
    """[tokens, inputs, outputs, how many there are] of each shape of a linear layer; the output head's too."""
    from minipeft.accounting import architecture

    arch, found = architecture(config), Counter()
    for name, shape in arch.items():
        if arch.kinds[name] in ("linear", "conv1d") and name != "lm_head.weight":
            found[shape if arch.kinds[name] == "conv1d" else shape[::-1]] += 1
    if head:
        found[config.hidden_size, config.vocab_size] += 1
    return [[tokens, *shape, times] for shape, times in found.items()]


def report(row: dict, path: str | None = None) -> None:
    """Print a row, and put it into the file of rows."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    print(f"{row['work']}; {threads}, {row['pairs']} pairs:", *_sentences(row), sep="\n    ", flush=True)
    if path:
        from minipeft.experiments.rows import read_rows
        from minipeft.files import write_text

        kept = [old for old in read_rows(path) if any(old[name] != row[name] for name in SAME)]
        write_text(path, "".join(f"{json.dumps(each)}\n" for each in [*kept, row]))


def share(row: dict) -> str:
    """The products' share in words; a share of more than all says that the machine was slower when products were timed."""
    if "products_share" not in row:
        return ""
    return f"{row['products_share']:.0%}" if row["products_share"] <= 1 else "not known"


def _sentences(row: dict) -> list[str]:
    figures = f"minipeft {row['ours']:.4g} {row['unit']}, {row['peer']} {row['theirs']:.4g}"
    found = [f"{figures}; ratio of the best {row['ratio']:.2f}, median {row['ratio_median']:.2f}"]
    if "products_share" in row:
        rates = f"NumPy {row['our_gflops']:.0f} GFLOP/s, {row['peer']} {row['their_gflops']:.0f}"
        found.append(f"products: {rates}; share of our time {share(row)}")
    mine, growth = row["our_peak_mb"] / row["their_peak_mb"], row["our_growth_mb"] / max(row["their_growth_mb"], 0.1)
    return [*found, f"resident memory at the peak {row['our_peak_mb']:.0f} MB, ratio {mine:.2f}, of its growth {growth:.2f}"]


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a / b, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))


def in_turns(repeat: int, **calls: Callable) -> dict[str, list[float]]:
    """{name: seconds of each turn}, one call of each after the other in this process, after a turn that is not counted."""
    for call in calls.values():
        call()
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(repeat)]
    return {name: [turn[name] for turn in turns] for name in calls}


def table(rows: list[dict]) -> str:
    """The rows in Markdown: a table for each processor, those of one work below each other."""
    lines = []
    for on in dict.fromkeys(f"{row['processor']}; {row['cores']} cores" for row in rows):
        found = [row for row in rows if on == f"{row['processor']}; {row['cores']} cores"]
        lines += [on, "", "| work | peer | threads | ours | theirs | ratio, best | median | products |", "|---|---|---|---|---|---|---|---|"]
        for row in sorted(found, key=lambda row: [r["work"] for r in found].index(row["work"])):
            figures = (f"{row['ours']:.4g} {row['unit']}", f"{row['theirs']:.4g}", f"{row['ratio']:.2f}", f"{row['ratio_median']:.2f}", share(row))
            lines.append(f"| {' | '.join((row['work'], row['peer'], str(row['threads']), *figures))} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    from minipeft.experiments.rows import read_rows

    print(table(read_rows(sys.argv[1])))
