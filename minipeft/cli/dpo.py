"""Direct preference optimization: train a model on preference pairs, without a reward model and without sampling.

The data is a .jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...} lines, or --human, or generated pairs, as
for `minipeft reward`. The reference is the model as it is at the start.

The output directory is a model directory (an adapter directory of a method with adapters, or with --adapter), with metrics.jsonl,
loss.png and dpo.json. The same command with --resume goes on from the last checkpoint.

examples:
  minipeft dpo --output happier                                         generated pairs, the shipped base
  minipeft dpo --data pairs.jsonl --model tuned --output better
  minipeft dpo --data pairs.jsonl --adapter tuned-adapter --output better-adapter
  minipeft dpo --data pairs.jsonl --method lora -r 16 --output adapter
"""

from __future__ import annotations

import argparse

from .. import rlhf
from ..options import add_options, from_arguments
from ..rlhf.config import DPOConfig
from . import runs
from .preferences import add_pairs, add_trained, add_training, check_pairs, load_pairs, load_trained, template_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained(parser)
    add_pairs(parser)
    add_options(add_training(parser, learning_rate="a tenth of the method's"), DPOConfig, "beta")
    runs.add_output(parser)


def run(args: argparse.Namespace) -> int:
    output, options, config = runs.check_output(args), check_pairs(args), from_arguments(DPOConfig, args)

    key, method, policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    pairs, held_out = load_pairs(args, options, policy, tokenizer, template)
    arguments = runs.training_arguments(args, len(pairs), bool(held_out))
    if method:
        policy = method.prepare(policy, arguments.max_steps, args.seed)
    trainer = rlhf.dpo_trainer(policy, pairs, held_out or None, arguments, config.beta)
    runs.announce(pairs, held_out, trainer.args, before=f"method {key}; ", after=f", beta {config.beta:g}")
    runs.run_training(args, trainer)

    judged, of = trainer.eval_examples or trainer.train_examples, "held-out" if held_out else "training"
    rewards = rlhf.implicit_rewards(policy, judged, config.beta)
    accuracy, margin = rlhf.reward_accuracy(*rewards.T), float((rewards[:, 0] - rewards[:, 1]).mean())
    use = runs.save_model(policy, tokenizer, output, name)
    results = {
        "pairs": {"training": len(pairs), "held_out": len(held_out)},
        "accuracy": accuracy,
        "accuracy_of": f"{of} pairs",
        "margin": margin,
        "loss": trainer.evaluate(judged),
    }
    runs.write_record(args, results, options, trainer.args, config, template=name, method=key)
    print(
        f"prefers the chosen answer, more than at the start, in {accuracy:.1%} of {len(judged):,} {of} pairs; "
        f"margin {margin:.3f}"
    )
    print(f"saved in {output}  (minipeft generate {use} --prompt ...)")
    return 0
