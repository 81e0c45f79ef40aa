"""Where the time of a training step goes: by phase, by op, and by thread.

    python tests/benchmarks/profile_step.py [small|middle|large|135m] [--dialect gpt2|llama] [--method full|lora|qlora]
        [--threads N] [--steps 10]

The step is the Trainer's (`training_step`): where it cuts a batch into rows, each thread has its own forward and backward.

phases    forward, backward, optimizer (with the norm of the gradients), summed over the threads; "engine" is what is in none
          of their ops: modules, the graph, sums of gradients. "step" is the rest of the step
ops       milliseconds a step of each op's value and of the pullback of each of its inputs, summed over the threads; apart
          from these, their matrix products, and their waiting for threads that help them. Pullbacks that share their work
          (attention's) do it in the first
threads   product: of its own; busy: on a core, of it in the kernel (memory that is mapped and zeroed); wanted: runnable, on
          no core; locked: inside a task, but neither, which is for the interpreter's lock; idle: outside of tasks. BLAS's own
          threads spin before they sleep: what they are busy with is not all work

An instrument costs time, too: the step as it is stands beside the one that was measured.
"""

from __future__ import annotations

import argparse
import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import real_llm
import training_step
import turns

PRODUCT, WAIT, TASK = "product", "wait", "task"  # what is no op
PHASES = ("step", "forward", "backward", "optimizer")
CLOCK = os.sysconf("SC_CLK_TCK")


class Profile:
    """Seconds in functions, without those in other timed functions inside: {(label, the label around it): seconds}."""

    def __init__(self):
        self.mine, self.threads = threading.local(), {}  # thread's id: its seconds
        self.on = False

    def timed(self, label: str, fn: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            if not self.on:
                return fn(*args, **options)
            if not hasattr(self.mine, "stack"):
                self.mine.stack, self.mine.spent = [("", 0.0)], defaultdict(float)
                self.threads[threading.get_native_id()] = self.mine.spent
            stack = self.mine.stack
            stack.append((label, 0.0))
            start = time.perf_counter()
            try:
                return fn(*args, **options)
            finally:
                took = time.perf_counter() - start
                _, inside = stack.pop()
                around, others = stack[-1]
                stack[-1] = around, others + took
                self.mine.spent[label, around] += took - inside
                if label == TASK or label in PHASES:
                    self.mine.spent[f"in {label}", ""] += took

        return call

    def op(self, name: str, form: Callable) -> Callable:
        """A form of an op, timed, and its pullbacks with it."""

        def evaluate(*args: Any, **options: Any) -> tuple:
            value, *pullbacks = form(*args, **options)
            return value, *[pull and self.timed(f"{name} d{i}", pull) for i, pull in enumerate(pullbacks)]

        return self.timed(name, evaluate)

    def instrument(self, model: Any) -> None:
        """Every op and phase, NumPy's matrix product, and the tasks that threads are given and wait for."""
        import numpy as np

        from minipeft.autograd.tensor import REGISTRY, Tensor
        from minipeft.train import parallel, trainer
        from minipeft.train.optimizer import Optimizer

        for name, op in REGISTRY.items():
            for library, form in op.forms.items():
                op.forms[library] = self.op(name, form)
        model.loss = self.timed("forward", model.loss)
        Tensor.backward, parallel.gradients = self.timed("backward", Tensor.backward), self.timed("backward", parallel.gradients)
        Optimizer.step, trainer.clipped = self.timed("optimizer", Optimizer.step), self.timed("optimizer", trainer.clipped)
        np.matmul = self.timed(PRODUCT, np.matmul)
        submit = ThreadPoolExecutor.submit
        ThreadPoolExecutor.submit = lambda pool, fn, *args, **options: submit(pool, self.timed(TASK, fn), *args, **options)
        Future.exception, Future.result = self.timed(WAIT, Future.exception), self.timed(WAIT, Future.result)


def scheduled() -> dict[int, tuple[float, float, float]]:
    """{thread: seconds (on a core, of it in the kernel, wanting a core)} of this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        run, wait, _ = (task / "schedstat").read_text().split()
        kernel = int((task / "stat").read_text().rpartition(")")[2].split()[12])
        found[int(task.name)] = int(run) / 1e9, kernel / CLOCK, int(wait) / 1e9
    return found


def model_and_ids(size: str, dialect: str, method: str) -> tuple[Any, Any]:
    """What `training_step` and `real_llm` time: (model, ids [B, T + 1]); LoRA has rank 8 on queries and values."""
    import numpy as np

    import minipeft as mp

    if size == "135m":
        config = mp.TransformerConfig.llama(**real_llm.SHAPE)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (real_llm.BATCH, real_llm.LENGTH))
    else:
        config, ids = training_step.config_of(dialect, size), training_step.tokens_of(size)
    model = mp.Transformer(config, seed=0)
    if method == "full":
        return model, ids
    if method == "qlora":
        model = mp.quant.quantize_model(model)
    targeted = ["c_attn"] if config.model_type == "gpt2" else ["q_proj", "v_proj"]
    return mp.get_peft_model(model, mp.LoraConfig(r=8, target_modules=targeted)), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=[*training_step.SIZES, "135m"], default="middle")
    parser.add_argument("--dialect", choices=["gpt2", "llama"], default="gpt2", help="of the first three sizes")
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="full")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    for name in ("MINIPEFT_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(asked.threads)  # NumPy is loaded from here on
    import minipeft as mp

    profile = Profile()
    model, ids = model_and_ids(asked.size, asked.dialect, asked.method)
    profile.instrument(model)  # every op that the model has brought
    optimizer = mp.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    one = profile.timed("step", turns.trainers_step(model, optimizer, ids))

    def step() -> float:
        return turns.seconds(one)

    plain = [step() for _ in range(3 + asked.steps)][3:]
    before, faults, profile.on = scheduled(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt, True
    start = time.perf_counter()
    measured = [step() for _ in range(asked.steps)]
    wall, profile.on = time.perf_counter() - start, False
    after, faults = scheduled(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds / asked.steps:9.2f}"

    print(f"{asked.size}, {asked.dialect if asked.size != '135m' else 'llama'}, {asked.method}, {asked.threads} threads")
    print(f"a step: best {1e3 * min(plain):.2f} ms as it is, {1e3 * min(measured):.2f} ms measured (mean {ms(wall).strip()})")
    print(f"{faults // asked.steps} pages of memory mapped a step")
    print(f"\n{'phase':34}       ms   engine")
    for name in PHASES:
        took = sum(each.get((f"in {name}", ""), 0.0) for each in profile.threads.values())
        engine = sum(t for each in profile.threads.values() for (label, _), t in each.items() if label == name)
        print(f"{name:34}{ms(took)}{ms(engine)}")
    ops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in profile.threads.values():
        for (label, around), t in each.items():
            op, _, which = (around if label in (PRODUCT, WAIT) else label).partition(" ")
            if op not in (*PHASES, TASK, "", "in"):
                ops[op][{PRODUCT: PRODUCT, WAIT: WAIT}.get(label, which or "value")] += t
    print(f"\n{'op':34}    total  product   helped    value  pullbacks")
    for op, parts in sorted(ops.items(), key=lambda item: -sum(item[1].values())):
        pulls = ", ".join(f"{which} {ms(t).strip()}" for which, t in sorted(parts.items()) if which[0] == "d")
        columns = ms(sum(parts.values())), ms(parts[PRODUCT]), ms(parts[WAIT]), ms(parts["value"])
        print(f"{op:34}{''.join(columns)}  {pulls}")
    print(f"\n{'thread':34}  product     busy   kernel   wanted   locked     idle")
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for task, now in after.items():
        busy, kernel, wanted = (b - a for a, b in zip(before.get(task, (0.0, 0.0, 0.0)), now))
        each = profile.threads.get(task, {})
        product = sum(t for (label, _), t in each.items() if label == PRODUCT)
        inside = wall if task == threading.main_thread().native_id else each.get((f"in {TASK}", ""), 0.0)
        inside -= sum(t for (label, _), t in each.items() if label == WAIT)
        if task not in names:
            inside = busy
        locked = max(0.0, inside - busy - wanted)
        idle = max(0.0, wall - busy - wanted - locked)
        print(f"{names.get(task, 'of a library'):34}{''.join(map(ms, (product, busy, kernel, wanted, locked, idle)))}")


if __name__ == "__main__":
    main()
