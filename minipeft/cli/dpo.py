"""Direct preference optimization: train a model on preference pairs, without a reward model and without sampling.

The data is a .jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...} lines, or --human, or made pairs, as for
`minipeft reward`. The reference is the model as it is at the start.

The output directory is a model directory (an adapter directory with --method lora or --adapter), with metrics.jsonl,
loss.png and dpo.json. The same command with --resume goes on from the last checkpoint.

examples:
  minipeft dpo --output happier                                         made pairs, the shipped base
  minipeft dpo --data pairs.jsonl --model tuned --output better
  minipeft dpo --data pairs.jsonl --adapter tuned-adapter --output better-adapter
  minipeft dpo --data pairs.jsonl --method lora --lr 1e-3 --output adapter
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from .arguments import add_machine, positive, use_machine
from .preferences import (
    WRITTEN_BY_ALL,
    add_method,
    add_output,
    add_pairs,
    add_training,
    load_pairs,
    load_trained,
    remove_earlier,
    save_policy,
    template_of,
)

SUMMARY = "train a model on preferences, directly"

WRITTEN = re.compile(WRITTEN_BY_ALL + r"loss\.png|dpo\.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_method(parser)
    add_pairs(parser)
    group = parser.add_argument_group("training")
    add_training(group, 1e-4, "pairs")
    group.add_argument(
        "--beta", type=positive, default=0.1, metavar="B", help="how dear leaving the reference is (default: 0.1)"
    )
    add_output(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    from .finetune import check_output

    output = Path(args.output)
    check_output(output, args.resume, args.overwrite)
    use_machine(args)
    from rich.console import Console

    from .. import rlhf
    from ..files import write_json
    from ..train import TrainingArguments, last_checkpoint

    policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    pairs, held_out = load_pairs(args, policy, tokenizer, template)
    steps = args.steps or math.ceil(args.epochs * math.ceil(len(pairs) / args.batch_size))
    arguments = TrainingArguments(
        output_dir=output,
        learning_rate=args.lr,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        warmup_ratio=args.warmup,
        eval_steps=max(1, steps // 5) if held_out else None,
        save_steps=args.save_steps or max(1, steps // 5),
        save_total_limit=1,
        seed=args.seed,
    )
    trainer = rlhf.dpo_trainer(policy, pairs, held_out or None, arguments, args.beta)
    err.print(
        f"{len(pairs):,} pairs to learn from, {len(held_out):,} held out; {steps:,} steps of {args.batch_size}, "
        f"learning rate {args.lr:g}, beta {args.beta:g}"
    )
    if args.overwrite:
        remove_earlier(output, WRITTEN)
    try:
        trainer.train(resume_from_checkpoint=args.resume)
    except KeyboardInterrupt:
        if last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None
    judged = trainer.eval_examples or trainer.train_examples
    rewards = rlhf.implicit_rewards(policy, judged, args.beta)
    accuracy, margin = rlhf.reward_accuracy(*rewards.T), float((rewards[:, 0] - rewards[:, 1]).mean())
    save_policy(policy, tokenizer, output, name)
    options = {k: v for k, v in vars(args).items() if k not in ("run", "debug", "resume", "overwrite", "command")}
    write_json(
        output / "dpo.json",
        {
            "options": {**options, "template": name, "steps": steps},
            "pairs": {"training": len(pairs), "held_out": len(held_out)},
            "accuracy": accuracy,
            "accuracy_of": "held-out pairs" if held_out else "training pairs",
            "margin": margin,
            "loss": trainer.evaluate(judged),
        },
    )
    print(
        f"prefers the chosen answer, more than at the start, in {accuracy:.1%} of {len(judged):,} "
        f"{'held-out' if held_out else 'training'} pairs; margin {margin:.3f}"
    )
    kind = "--adapter" if hasattr(policy, "save_pretrained") else "--model"
    print(f"saved in {output}  (minipeft generate {kind} {output} --prompt ...)")
    return 0
