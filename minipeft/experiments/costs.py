"""What a method costs, apart from what it learns: parameters, bytes on the disk and in memory, seconds per token."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ..accounting import architecture, measure_peak, memory_ledger
from ..autograd.tensor import no_grad
from ..backend import synchronize, xp_of
from ..nn.transformer import KVCache
from ..peft.config import PeftError
from ..peft.huggingface import state
from ..peft.methods import Method
from ..peft.model import PeftModel
from ..text.examples import Example
from ..train import Trainer, TrainingArguments, collate, evaluate


def count(model: Any) -> tuple[int, int]:
    """(parameters that are trained, all parameters), a tied one once; of a PeftModel as PEFT counts them."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.size, p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def storage(model: Any) -> int:
    """Bytes to keep for the task: what is trained; of an adapter, the arrays of its file."""
    if isinstance(model, PeftModel):
        return sum(p.data.nbytes for name in model.active_adapters for p in state(model, name).values())
    return sum(p.data.nbytes for p in model.parameters() if p.requires_grad)


def memory(
    method: Method | None, base: Any, examples: list[Example], batch_size: int, pad_token_id: int
) -> tuple[int, int]:
    """(predicted, measured) peak bytes of a step on the longest examples, everything included: weights, gradients,
    optimizer states, activations. For the frozen base (None), of an evaluation. On a device it is that of its memory.
    """
    longest = sorted(examples, key=lambda example: -len(example.input_ids))[:batch_size]
    labels = collate(longest, pad_token_id).arguments["labels"]
    if method and method.quantized:
        ledger = memory_ledger(method.prepare(base, steps=2), None, *labels.shape, labels=labels)
    else:
        config, mode = (method.config(), "train") if method else ("frozen", "evaluate")
        ledger = memory_ledger(architecture(base.config), config, *labels.shape, labels=labels, mode=mode)

    def step() -> None:
        model = base.copy()  # so that the weights are counted too
        if method:
            model = method.prepare(model, steps=2)  # where it quantizes, this lets go of the float weights
            arguments = TrainingArguments(max_steps=2, per_device_train_batch_size=batch_size, progress=False)
            Trainer(model, longest, args=arguments, pad_token_id=pad_token_id).train()
        else:
            evaluate(model, longest, batch_size, pad_token_id)

    return ledger.total, measure_peak(step, xp_of(base.parameters()[0].data))


def merged(model: Any) -> Any | None:
    """The plain model that computes the same; None where no plain model does (an adapter, a prompt)."""
    if not isinstance(model, PeftModel):
        return model
    try:
        return model.merge_and_unload()
    except PeftError:
        return None


def latency(model: Any, prompt: int = 16, tokens: int = 32, passes: int = 5) -> float:
    """Seconds of a step that generates one token of one sequence, with a cache, after a prompt.

    The median over `tokens` steps, and the least of that over `passes`: what else the machine does only adds to it.
    """
    xp = xp_of(model.parameters()[0].data)
    ids = xp.zeros((1, prompt), xp.int64)
    medians = []
    with no_grad():
        for _ in range(passes):
            cache, seconds = KVCache(), []
            model(ids, past_key_values=cache)
            for _ in range(tokens):
                synchronize(xp)
                start = time.perf_counter()
                model(ids[:, :1], past_key_values=cache)
                synchronize(xp)
                seconds.append(time.perf_counter() - start)
            medians.append(statistics.median(seconds))
    return min(medians)
