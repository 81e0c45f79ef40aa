"""Train a reward model, the second stage of RLHF: a score for a text, learned from which of two answers was preferred.

The data is a .jsonl file of {"prompt": ..., "chosen": ..., "rejected": ...} lines. With --human it is pairs of texts
that real people rated, from the source archive of vaderSentiment. Without either, the model itself
answers openings of sentences twice, and a noisy rater prefers the answer that VADER scores higher (extra 'rlhf').

--method lora and its kin train adapters and the head, and are merged at the end.

The output directory is a Hugging Face directory (LlamaForSequenceClassification with one label) with the calibration
that gives its rewards mean 0 and deviation 1, the tokenizer, metrics.jsonl, reward.png (loss; predicted against
observed preferences) and reward.json. `minipeft ppo --reward DIR` optimizes it.

examples:
  minipeft reward --output judge                                        generated pairs, the shipped base
  minipeft reward --data pairs.jsonl --model tuned --output judge       on top of a model of minipeft sft
  minipeft reward --method lora -r 16 --output judge
  minipeft reward --human vaderSentiment-3.3.2.tar.gz --pairs 8000 --output judge
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from .. import rlhf
from ..options import add_options, from_arguments
from ..peft.methods import Method
from ..rlhf.config import RewardConfig
from . import outputs, runs
from .arguments import add_model
from .method_options import add_method, method_of
from .preferences import add_pairs, add_training, check_pairs, load_pairs, template_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=", such as of minipeft sft, to build on")
    add_method(parser)
    add_pairs(parser)
    add_options(add_training(parser, learning_rate="the method's"), RewardConfig)
    runs.add_output(parser)


def run(args: argparse.Namespace) -> int:
    output, options, config = outputs.check_output(args), check_pairs(args), from_arguments(RewardConfig, args)

    from ..directory import replacing
    from ..peft.model import PeftModel
    from ..train import Trainer
    from ..train.metrics import picture
    from .models import load_model
    from .prompts import save_template

    key, method = method_of(args)
    policy, tokenizer = load_model(args.model, args.backend, method.quantized or None, args.adapter)
    policy = policy if args.adapter is None else policy.merge_and_unload()
    name, template = template_of(args, tokenizer)
    train, test = (
        [rlhf.Ranking((p.chosen.input_ids, p.rejected.input_ids)) for p in side]
        for side in load_pairs(args, options, policy, tokenizer, template)
    )
    arguments = runs.training_arguments(args, len(train), bool(test))
    texts = [text for ranking in train for text in ranking.texts]
    judge = rlhf.RewardModel(policy, seed=arguments.seed)
    model = _adapted(method, judge, arguments.max_steps, arguments.seed)
    model.calibrate(texts[:256])  # a fresh head's scores have any scale; from here the loss starts near that of a coin

    loss = partial(rlhf.RewardModel.loss, center=config.center)
    trainer = Trainer(model, train, test or None, arguments, collate=rlhf.collate_rankings, loss=loss)
    runs.announce(train, test, trainer.args, before=f"method {key}; ")
    result = outputs.run_training(args, trainer)

    judged, of = test or train, "held-out" if test else "training"
    chosen, rejected = (model.score_texts([r.texts[i] for r in judged]) for i in (0, 1))
    curve = rlhf.calibration_curve(chosen, rejected)
    with picture(output / "reward.png") as path:
        rlhf.plot_calibration(*curve, result.losses(), path)
    accuracy = rlhf.reward_accuracy(chosen, rejected)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.calibrate(texts)
    with replacing(output) as fresh:
        model.save_pretrained(fresh, tokenizer)
        save_template(fresh, name)
    results = {
        "pairs": {"training": len(train), "held_out": len(test)},
        "accuracy": accuracy,
        "accuracy_of": f"{of} pairs",
        "calibration": {k: list(map(float, v)) for k, v in zip(("predicted", "observed", "pairs"), curve)},
        "mean": model.mean,
        "std": model.std,
    }
    runs.write_record(args, results, options, trainer.args, config, template=name, method=key)
    print(f"agrees with {accuracy:.1%} of {len(judged):,} {of} preferences (a coin: 50%)")
    print(f"saved in {args.output}  (minipeft ppo --reward {args.output} --output DIR)")
    return 0


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
