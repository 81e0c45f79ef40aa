"""The statements that the experiments on mechanisms decide; each experiment and its statistic has a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import intrinsic_dimension, memorization, speed, width
from .mechanisms import judged
from .register import Experiment, Verdict, claim

Rows = Sequence[Mapping[str, Any]]

SUBSPACES = Experiment("intrinsic_dimension", intrinsic_dimension.run, intrinsic_dimension.runs)
MEMORY = Experiment("memorization", memorization.run, memorization.runs)
WIDTHS = Experiment("width", width.run, width.runs)
SPEED = Experiment("speed", speed.run, speed.runs, timed=True)


@claim("lora-3", lesson="18_lora_questioned.py", section="1 · Is the update of low rank?", experiment=SUBSPACES)
def low_dimension(rows: Rows) -> Verdict:
    """Holds if fine-tuning from the base is low in three senses: d90, the size of a random subspace that has 90 % of the gain, is below a
    hundredth of all weights; the best part of rank 16 of every update has 90 % of the gain; the rank that holds 90 % of an update's
    squared norm is below half of noise's. Holds if in some of these; does not hold here if in none."""
    return judged(intrinsic_dimension.verdict(rows), "d90 from the base", "numbers", 5, 512, "source")


@claim("full-7", lesson="03_full_finetuning.py", section="The memory bill", experiment=MEMORY)
def capacity(rows: Rows) -> Verdict:
    """Holds if full fine-tuning memorizes clearly more bits of random answers than every method that trains fewer parameters; holds if
    clearly more than some; does not hold here if than none."""
    return judged(memorization.verdict(rows), "bits more than the nearest method", "bits", 5, None, "random answers")


@claim("full-3", lesson="14_best_practices.py", section="2 · The learning rate", experiment=WIDTHS)
def small_rates(rows: Rows) -> Verdict:
    """Holds if at every width, 32 to 256, the best rate of full fine-tuning is clearly below half of pretraining's, and the rate predicted
    at a 7B model's width meets 1e-5 to 5e-5; holds if some of this is so; does not hold here if nothing is."""
    return judged(width.small_rates(rows), "predicted at width 4096", "rate", 5, 256, "pretraining, then source")


@claim("peft-3", lesson="16_which_method.py", section="2 · What it costs on this machine", experiment=SPEED)
def faster(rows: Rows) -> Verdict:
    """Holds if every method that trains fewer parameters is clearly faster than full fine-tuning, in seconds a step and in seconds to
    two fixed losses; holds if clearly faster in some of these; does not hold here if in none."""
    return judged(speed.verdict(rows), "seconds a step of the slowest, over full fine-tuning's", "times", 5, 96, "rewrite")
