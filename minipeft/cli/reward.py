"""Train a reward model, the second stage of RLHF: a score for a text, learned from which of two answers was preferred.

The data is a .jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...} lines. With --human it is pairs of texts
that real people rated, from the source archive of vaderSentiment where you have it. Without either, the model itself
answers openings of sentences twice, and a noisy rater prefers the answer that VADER finds happier (extra 'rlhf').

The output directory is a Hugging Face directory (LlamaForSequenceClassification with one label) with the calibration
that gives its rewards mean 0 and deviation 1, the tokenizer, metrics.jsonl, reward.png (loss; predicted against
observed preferences) and reward.json. `minipeft ppo --reward DIR` optimizes it.

examples:
  minipeft reward --output judge                                        made pairs, the shipped base
  minipeft reward --data pairs.jsonl --model tuned --output judge       on top of a model of minipeft sft
  minipeft reward --human vaderSentiment-3.3.2.tar.gz --pairs 8000 --output judge
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from .arguments import add_machine, add_model, natural, use_machine
from .preferences import (
    WRITTEN_BY_ALL,
    add_output,
    add_pairs,
    add_training,
    load_pairs,
    load_policy,
    remove_earlier,
    template_of,
)

SUMMARY = "train a reward model on preferences"

WRITTEN = re.compile(WRITTEN_BY_ALL + r"loss\.png|reward\.png|reward\.json|reward_calibration\.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--adapter", metavar="DIR", help="an adapter directory, such as of minipeft sft, to build on")
    add_pairs(parser)
    group = parser.add_argument_group("training")
    add_training(group, 1e-3, "pairs")
    group.add_argument(
        "--center", type=natural, default=0.0, metavar="C", help="weight of (r_chosen + r_rejected)² (default: 0)"
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
    from ..train import Trainer, TrainingArguments, last_checkpoint
    from .prompts import save_template

    policy, tokenizer = load_policy(args.model, args.adapter, args.backend, merge=True)
    name, template = template_of(args, tokenizer)
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    pairs, held_out = load_pairs(args, policy, tokenizer, template)
    train, test = (
        [rlhf.Ranking((p.chosen.input_ids, p.rejected.input_ids)) for p in side] for side in (pairs, held_out)
    )
    texts = [text for ranking in train for text in ranking.texts]
    model = rlhf.RewardModel(policy, seed=args.seed)
    model.calibrate(texts[:256])  # a fresh head's scores have any scale; from here the loss starts near that of a coin
    steps = args.steps or math.ceil(args.epochs * math.ceil(len(train) / args.batch_size))
    arguments = TrainingArguments(
        output_dir=output,
        learning_rate=args.lr,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        warmup_ratio=args.warmup,
        eval_steps=max(1, steps // 5) if test else None,
        save_steps=args.save_steps or max(1, steps // 5),
        save_total_limit=1,
        seed=args.seed,
    )

    def loss(model, rng=None, **batch):
        return model.loss(**batch, center=args.center)

    trainer = Trainer(model, train, test or None, arguments, collate=rlhf.collate_rankings, loss=loss)
    err.print(
        f"{len(train):,} pairs to learn from, {len(test):,} held out; {steps:,} steps of {args.batch_size}, "
        f"learning rate {args.lr:g}"
    )
    if args.overwrite:
        remove_earlier(output, WRITTEN)
    try:
        result = trainer.train(resume_from_checkpoint=args.resume)
    except KeyboardInterrupt:
        if last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None
    judged = test or train
    chosen, rejected = (model.score_texts([r.texts[i] for r in judged]) for i in (0, 1))
    curve = rlhf.calibration_curve(chosen, rejected)
    rlhf.plot_calibration(*curve, result.losses(), output / "reward.png")
    accuracy = rlhf.reward_accuracy(chosen, rejected)
    model.calibrate(texts)
    model.save_pretrained(output, tokenizer)
    if name != "plain":
        save_template(output, name)
    options = {k: v for k, v in vars(args).items() if k not in ("run", "debug", "resume", "overwrite", "command")}
    write_json(
        output / "reward.json",
        {
            "options": {**options, "template": name, "steps": steps},
            "pairs": {"training": len(train), "held_out": len(test)},
            "accuracy": accuracy,
            "accuracy_of": "held-out pairs" if test else "training pairs",
            "calibration": {k: list(map(float, v)) for k, v in zip(("predicted", "observed", "pairs"), curve)},
            "mean": model.mean,
            "std": model.std,
        },
    )
    print(
        f"agrees with {accuracy:.1%} of {len(judged):,} {'held-out' if test else 'training'} preferences (a coin: 50%)"
    )
    print(f"saved in {output}  (minipeft ppo --reward {output} --output DIR)")
    return 0
