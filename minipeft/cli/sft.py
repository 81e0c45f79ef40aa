"""Instruction tuning (SFT), the first stage of RLHF: on your own file, or on the instructions that ship with it.

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

import argparse

from . import finetune, outputs
from .arguments import positive_int, unknown

PER_TASK = 500
PER_TEST = 24  # records of a task in each of the tests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="FILE", help="a .jsonl or .txt file to learn from (default: the shipped instructions)"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="of the shipped instructions only these: rewrite, define, use, ..."
    )
    parser.add_argument(
        "--per-task", type=positive_int, metavar="N", help=f"at most N records of each of them (default: {PER_TASK})"
    )
    finetune.add_training_arguments(parser, longest=512)


def run(args: argparse.Namespace) -> int:
    outputs.check_output(args)
    if args.data is not None:
        if args.tasks or args.per_task:
            raise ValueError("--tasks and --per-task choose among the shipped instructions; they do not go with --data")
        return finetune.run(args)
    if hasattr(args, "validation"):
        raise ValueError("--validation goes with --data; the shipped instructions have held-out records of their own")
    from ..text.instructions import HELD_OUT, TRAINED, instructions

    tasks = list(dict.fromkeys(args.tasks or TRAINED))
    for name in tasks:
        if name not in TRAINED:
            raise ValueError(unknown("task", name, TRAINED))
    tests = {
        "new inputs": instructions(tasks, "validation", cap=PER_TEST),
        "new phrasings": instructions(tasks, "validation", held_out_phrasings=True, cap=PER_TEST),
        "new tasks": instructions(HELD_OUT, "validation", held_out_phrasings=True, cap=PER_TEST),
    }
    records = instructions(tasks, "train", cap=args.per_task or PER_TASK, seed=args.seed)
    return finetune.fine_tune(args, records, tests["new inputs"], tests)
