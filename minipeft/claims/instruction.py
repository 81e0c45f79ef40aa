"""Instruction tuning: the format, whether the instruction is followed, and whether a teacher's answers will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..text.datasets import Instruction
from ..text.examples import encode_turns
from ..text.templates import alpaca
from ..train.batches import IGNORE
from . import following
from .inputs import base
from .register import Number, Verdict, claim, graded

WITH = Instruction("Give the meaning of this word.", "stone", "a hard piece of rock")
WITHOUT = Instruction("Give the meaning of stone.", "", "a hard piece of rock")


Rows = Sequence[Mapping[str, Any]]


@claim(
    "inst-1",
    lesson="08_instruction_tuning.py",
    section="4 · Train: one task, three, seven",
    experiment=following.experiment("base", "shuffled", "tuned"),
)
def follows(rows: Rows) -> Verdict:
    """Holds if, asked about new inputs, in new words, and for new tasks, the base tuned on seven tasks clearly gives more right
    answers than the base, and than the base tuned on the same records with their instructions shuffled; and, where inputs do not
    tell the task, finds the right answer likeliest under its own instruction clearly more often than the latter or a guess,
    whichever does so more: then it is the words of the instruction that count, and not the form of the input. Holds if in some
    of these nine comparisons; does not hold here if in none."""
    found = following.verdict(rows, ("answers", "base"), ("answers", "shuffled"), following.CONTROL)
    return found if found.effect is None else replace(found, because=f"{found.because}\n\n{following.shares(rows)}")


@claim("inst-2", lesson="08_instruction_tuning.py", section="2 · The template, and what of it is learned")
def form() -> Verdict:
    """Holds if a record with an input is encoded as instruction, input and output in this order, one without leaves the
    input's heading out, and the tokens that are learned are those of the output and the end; holds if one of these is so; does
    not hold here otherwise."""
    tokenizer, cases, evidence = base()[1], {}, []
    for name, record in (("with an input", WITH), ("without", WITHOUT)):
        (turn,) = alpaca(record)
        text = "".join((*turn.prompt, *turn.completion))
        parts = [part for part in (record.instruction, record.input, record.output) if part]
        places = [text.find(part) for part in parts]
        example = encode_turns([turn], tokenizer)
        learned = [i for i in example.labels.tolist() if i != IGNORE]
        output = tokenizer.decode(learned, skip_special_tokens=True)
        ordered = -1 not in places and places == sorted(places) and ("### Input:" in text) == bool(record.input)
        cases[name] = ordered and output == record.output and learned[-1] == tokenizer.eos_token_id
        evidence += [Number(f"{name}: tokens", len(example.labels)), Number(f"{name}: tokens that are learned", len(learned))]
    return Verdict(
        graded(cases),
        f"Instruction, input and output stand in this order; of {evidence[0].value} tokens with an input {evidence[1].value} "
        f"are learned, of {evidence[2].value} without {evidence[3].value}: the output and the token that ends it.",
        Number("tokens that are learned, with an input", 100 * evidence[1].value / evidence[0].value, "%"),
        evidence,
        items=2,
        task="two records in Alpaca's template",
    )


@claim(
    "inst-3",
    lesson="08_instruction_tuning.py",
    section="1 · The data: tasks, and ways to ask",
    experiment=following.experiment("base", "taught", "tuned"),
)
def taught(rows: Rows) -> Verdict:
    """Holds if, asked about new inputs, and in new words, the base tuned on a teacher's answers clearly gives more right answers than
    the base or one constant answer to each task, whichever is right more often, and is not inferior (interval above -0.02)
    to the base tuned on people's answers to the same; holds if in some of these four comparisons; does not hold here if in
    none. (That three papers did so is on record; whether a teacher's data help is what can be tried.)"""
    return following.by_teacher(rows)
