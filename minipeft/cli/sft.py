"""Teach a model to follow instructions.

This is instruction tuning (SFT), the first stage of RLHF: on your own file, or on the instructions that ship with it.
The data is a .jsonl file of one form (or a .txt file), as for `minipeft finetune`:
    {"instruction": ..., "input": ..., "output": ...}
    {"prompt": ..., "completion": ...}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"text": ...}
Without --data the model learns seven tasks over the shipped corpora, each asked for in four ways (rewrite a verse in
plain English, define a word, name its part of speech, ...), and is then tested on new inputs, on phrasings it has
not met, and on three tasks it has not learned. Only the answers are learned, and the token that ends them. (The
shipped base has never met the tokens of ChatML: with --template chatml take --method full, as adapters leave embeddings
frozen.)

The output directory is a model directory, or an adapter directory, with sft.json and template.json beside it: the later
stages (reward, dpo, ppo) and generate put their prompts in the same template.

examples:
  minipeft sft --output tuned
  minipeft sft --tasks define use --per-task 2000 --method lora --packing --output tuned
  minipeft sft --data my.jsonl --template chatml --output tuned
  minipeft sft --data my.jsonl --template "Task: {instruction}\\nText: {input}\\nAnswer:" --output tuned

  minipeft generate --model tuned --prompt "Give the meaning of this word: garden (noun)"
"""

from __future__ import annotations

from functools import partial

import minipeft as mp

from ..options import configuration, option
from . import finetune, outputs
from .arguments import Arguments, Common, Parser, check_known


@configuration(kw_only=True)
class InstructionOptions:
    """Which of the shipped instructions are learned."""

    tasks: list[str] | None = option(None, "of the shipped instructions only these: rewrite, define, use, ...")
    per_task: int = option(500, "at most N records of each of them", least=1)


def add_arguments(parser: Parser) -> None:
    data = "a .jsonl or .txt file to learn from (default: the shipped instructions)"
    parser.options(Common, "data", "columns", data=data)
    parser.options(InstructionOptions)
    finetune.add_training_arguments(parser, max_length=512)


def run(args: Arguments) -> None:
    if args.data is not None:
        args.refuse(("tasks", "per_task"), "with --data, being about the shipped instructions")
        return finetune.run(args)
    args.refuse(("columns",), "without --data")
    args.refuse(("validation",), "without --data, as the shipped instructions have held-out records of their own")
    outputs.check_output(args)
    shipped = mp.text.instructions
    tasks = list(dict.fromkeys(args.tasks or shipped.TRAINED))
    check_known("task", tasks, shipped.TRAINED)
    held_out = partial(shipped.instructions, split="validation", cap=24)  # records of a task in each of the tests
    inputs, phrasings = held_out(tasks), held_out(tasks, held_out_phrasings=True)
    others = held_out(shipped.HELD_OUT, held_out_phrasings=True)
    tests = {"new inputs": inputs, "new phrasings": phrasings, "new tasks": others}
    records = shipped.instructions(tasks, "train", cap=args.per_task, seed=args.seed)
    finetune.fine_tune(args, records, inputs, tests)
