"""Train a reward model on preferences.

It scores a text, the second stage of RLHF, and is learned from which of two answers was preferred. The data is a .jsonl
file of {"prompt": ..., "chosen": ..., "rejected": ...} lines. With --human it is pairs of texts that real people rated,
from the source archive of vaderSentiment. Without either, the model itself answers openings of sentences twice, and a
noisy rater prefers the answer that VADER scores higher (extra 'rlhf').

--method lora and its kin train adapters and the head, and are merged at the end.

The output directory is a Hugging Face directory (LlamaForSequenceClassification with one label) with the calibration
that gives its rewards mean 0 and deviation 1, the tokenizer, metrics.jsonl, reward.png (loss; predicted against
observed preferences) and reward.json. `minipeft ppo --reward DIR` optimizes it. The accuracy is the share of
held-out pairs that it orders as they were labeled, with its 95 % interval; where none are held out, of those it learned.

examples:
  minipeft reward --output judge                                        generated pairs, the shipped base
  minipeft reward --data pairs.jsonl --model tuned --output judge       on top of a model of minipeft sft
  minipeft reward --method lora -r 16 --output judge
  minipeft reward --human vaderSentiment-3.3.2.tar.gz --pairs 8000 --output judge
"""

from __future__ import annotations

from functools import partial
from typing import Any

import minipeft as mp

from .. import rlhf
from ..options import from_arguments
from ..peft.methods import Method
from ..rlhf.config import RewardConfig
from . import outputs, runs
from .arguments import Arguments, Parser
from .method_options import method_of
from .models import load_model
from .preferences import accuracy_told, add_pairs, add_trained, add_training, check_pairs, load_pairs, template_of


def add_arguments(parser: Parser) -> None:
    add_trained(parser, "to build on")
    add_pairs(parser)
    add_training(parser)
    parser.options(RewardConfig, group="training")
    runs.add_output(parser)


def run(args: Arguments) -> None:
    output, config = outputs.check_output(args), from_arguments(RewardConfig, args)
    check_pairs(args)
    key, method = method_of(args)
    policy, tokenizer = load_model(args, method.quantized)
    policy = policy if args.adapter is None else policy.merge_and_unload()
    name, template = template_of(args, tokenizer)
    train, test = (
        [rlhf.Ranking((p.chosen.input_ids, p.rejected.input_ids)) for p in side]
        for side in load_pairs(args, policy, tokenizer, template)
    )
    arguments = runs.training_arguments(args, len(train), bool(test))
    texts = [text for ranking in train for text in ranking.texts]
    judge = rlhf.RewardModel(policy, seed=args.seed)
    model = _adapted(method, judge, arguments.max_steps, args.seed)
    model.calibrate(texts[:256])  # a fresh head's scores have any scale; from here the loss starts near that of a coin

    loss = partial(rlhf.RewardModel.loss, center=config.center)
    trainer = mp.Trainer(model, train, test or None, arguments, collate=rlhf.collate_rankings, loss=loss)
    runs.announce(trainer, before=f"method {key}; ")
    result = outputs.run_training(args, trainer)

    pairs = test or train
    chosen, rejected = (model.score_texts([r.texts[i] for r in pairs]) for i in (0, 1))
    curve = rlhf.calibration_curve(chosen, rejected)
    with mp.train.metrics.picture(output / "reward.png") as path:
        rlhf.plot_calibration(*curve, result.losses(), path)
    agrees, accuracy = accuracy_told(rlhf.reward_accuracy(chosen, rejected), len(pairs), bool(test))
    model = model.merge_and_unload() if isinstance(model, mp.PeftModel) else model
    model.calibrate(texts)
    results = {
        "pairs": {"training": len(train), "held_out": len(test)},
        **accuracy,
        "calibration": {k: list(map(float, v)) for k, v in zip(("predicted", "observed", "pairs"), curve)},
        "mean": model.mean,
        "std": model.std,
    }
    runs.save(args, model, tokenizer, name, results, trainer.args, config, method=key)
    print(f"agrees with {agrees} preferences (a coin: 50%)")
    print(f"saved in {args.output}  ({args.next_command('ppo', '--reward', args.output, '--output', 'DIR')})")


def _adapted(method: Method, model: rlhf.RewardModel, steps: int, seed: int) -> Any:
    """The model that is trained. With adapters, its new head is trained whole beside them.

    Raises PeftError for a method that cannot be merged: a reward model is saved as a plain one.
    """
    config = method.config()
    if hasattr(config, "modules_to_save"):
        method = method.with_options(modules_to_save=[*(config.modules_to_save or ()), "score"], task_type="SEQ_CLS")
    adapted = method.prepare(model, steps, seed)
    if hasattr(config, "modules_to_save"):
        adapted.merge_and_unload()  # what cannot be saved is said before the work
    return adapted
