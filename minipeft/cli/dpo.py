"""Train a model on preferences, directly: DPO and its kin.

There is no reward model, and no sampling. The data is a .jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...}
lines, or --human, or generated pairs, as for `minipeft reward`. The reference is the model as it is at the start.
--loss takes the losses that came after DPO's: ipo, kto, orpo and simpo; the last two need no reference, and kto no
pairs: it also takes lines of {"prompt": ..., "completion": ..., "label": true or false}.

The output directory is a model directory (an adapter directory of a method with adapters, or with --adapter), with
metrics.jsonl, loss.png, dpo.png and dpo.json. The same command with --resume goes on from the last checkpoint. dpo.png
shows the log-probabilities of chosen and rejected answers beside loss and accuracy: the chosen may fall, since only its
difference from the rejected is trained, and most of what lowers one lowers the other (not so with orpo). The accuracy
of held-out pairs has its 95 % interval.

examples:
  minipeft dpo --output happier                                         generated pairs, the shipped base
  minipeft dpo --data pairs.jsonl --model tuned --output better
  minipeft dpo --data pairs.jsonl --adapter tuned-adapter --output better-adapter
  minipeft dpo --data pairs.jsonl --method lora -r 16 --output adapter
  minipeft dpo --data pairs.jsonl --loss simpo --beta 2.5 --gamma 1.4 --output better
  minipeft dpo --data liked.jsonl --loss kto --undesirable-weight 2 --output better
"""

from __future__ import annotations

import minipeft as mp

from .. import rlhf
from ..options import from_arguments
from ..rlhf.config import OPTIONS_OF_LOSS, DPOConfig
from . import outputs, runs
from .arguments import Arguments, Parser
from .models import load_trained
from .preferences import accuracy_told, add_pairs, add_trained, add_training, check_pairs, load_pairs, template_of

# What a loss's accuracy is the share of.
PREFERS = {
    "sigmoid": "prefers the chosen answer, more than at the start, in {} pairs",
    "ipo": "prefers the chosen answer, more than at the start, in {} pairs",
    "kto": "has moved {} answers to the right side of the KL",
    "orpo": "prefers the chosen answer, by its mean log-probability, in {} pairs",
    "simpo": "prefers the chosen answer, by its mean log-probability, in {} pairs",
}


def add_arguments(parser: Parser) -> None:
    add_trained(parser)
    add_pairs(parser)
    add_training(parser, learning_rate="peak learning rate; None: a tenth of the method's")
    parser.options(DPOConfig, "loss_type", "beta", "gamma", "desirable_weight", "undesirable_weight", group="training")
    runs.add_output(parser)


def run(args: Arguments) -> None:
    output = outputs.check_output(args)
    check_pairs(args)
    loss = args.loss_type
    other = (name for name in ("gamma", "desirable_weight", "undesirable_weight") if name not in OPTIONS_OF_LOSS[loss])
    args.refuse(other, f"with --loss {loss}")
    config = from_arguments(DPOConfig, args)

    key, method, policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    pairs, held_out = load_pairs(args, policy, tokenizer, template, unpaired=loss == "kto")
    counts = {"training": len(pairs), "held_out": len(held_out)}
    if loss == "kto":
        from ..rlhf.kto import unpaired

        pairs, held_out = unpaired(pairs), unpaired(held_out)
        if len(held_out) == 1:
            raise ValueError("KTO needs two held-out answers at least, and --validation holds out one: raise it, or give 0")
    arguments = runs.training_arguments(args, len(pairs), bool(held_out))
    if method:
        policy = method.prepare(policy, arguments.max_steps, args.seed)
    trainer = rlhf.dpo_trainer(policy, pairs, held_out or None, arguments, **vars(config))
    runs.announce(trainer, "answers" if loss == "kto" else "pairs", before=f"method {key}; ", after=f", loss {loss}, beta {config.beta:g}")
    examples = trainer.eval_examples or trainer.train_examples
    before = trainer.measure(examples)
    result = outputs.run_training(args, trainer)
    after = trainer.measure(examples)

    with mp.train.metrics.picture(output / "dpo.png") as path:
        rlhf.plot_preferences(result.history, path)
    share, accuracy = accuracy_told(after["rewards/accuracies"], len(examples), bool(held_out), "answers" if loss == "kto" else "pairs")
    margin = after.get("rewards/margins")
    results = {
        "pairs": counts,
        **accuracy,
        "margin": margin,
        "loss": after["loss"],
        "before": before,
        "after": after,
    }
    saved = runs.save(args, policy, tokenizer, name, results, trainer.args, config, method=key)
    for what in ("logps/chosen", "logps/rejected"):
        if what in before:
            print(f"log-probability, {what.removeprefix('logps/'):8} {before[what]:9.3f} -> {after[what]:.3f}")
    print(f"{PREFERS[loss].format(share)}{'' if margin is None else f'; margin {margin:.3f}'}")
    print(saved)
