"""The usual learning rate of a model that is about to be trained, where none is given (`learning_rate=None`).

    rate = rate of the method · min(1, 128 / hidden_size)

The rates of the methods (`PeftConfig.usual_learning_rate`; `peft.methods` has that of all weights, and of the head
alone) are AdamW's on the shipped base, of width 128, as it was after 3,600 of its 8,400 steps. They are from a grid
(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), runs of `minipeft compare`'s length and the validation split of its task: the highest
rate whose loss on the task is still at least 0.05 nats below that of the next lower one. Above it little is learned in
addition, or nothing, and what is forgotten multiplies. (Those of the head, QLoRA, prompt and P-tuning are from an
earlier grid, with runs of 80 steps; BitFit's is from none, as the shipped base has no biases.)

Wider models want less: a step of Adam moves every weight by about the rate, and a layer's output by about the rate times
its width (Yang et al. 2022, Tensor Programs V, arXiv:2203.03466).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..nn.heads import HEADS
from ..nn.module import Module
from ..peft.methods import FULL, HEAD, at_width


def with_learning_rate(args: Any, model: Module, share: float = 1.0) -> Any:
    """A dataclass of arguments with a learning rate: its own, or where that is None this share of the usual one."""
    if args.learning_rate is not None:
        return args
    return dataclasses.replace(args, learning_rate=usual_learning_rate(model) * share)


def usual_learning_rate(model: Module) -> float:
    """The usual rate for what requires gradients in a model: of several adapters, the lowest of theirs.

    A model without a `config.hidden_size` counts as one of the shipped base's width.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if configs := getattr(model, "peft_config", None):
        learning = [n for n in configs if any(p.requires_grad for _, part in model.parts(n) for p in part.parameters())]
        rate = min(configs[name].usual_learning_rate for name in learning or configs)
    else:
        rate = HEAD if trained and all(name.partition(".")[0] in HEADS for name in trained) else FULL
    return at_width(rate, model)
