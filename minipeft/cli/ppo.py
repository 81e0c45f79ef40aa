"""Train a model on how its answers score: PPO, RLOO, GRPO.

This is reinforcement learning from human feedback. The reward is a directory of `minipeft reward`; or a function of
your own, --reward-function MODULE:NAME, importable from here, which is called as in TRL, name(prompts=[...],
completions=[...]), and returns a number for each completion; or, by default, VADER's sentiment of the answer (extra
'rlhf').
The prompts are a .jsonl file of records of any form, or of "prompt"s alone, or a .txt file with one a line; without
--prompts, openings of sentences of the shipped novels. The reference policy is the model as it is at the start.

The output directory is a model directory (an adapter directory of a method with adapters, or with --adapter), with
metrics.jsonl (all statistics, an update a line), ppo.png and ppo.json. --best-of N adds the baseline that trains
nothing: what the best of N answers of the policy at the start is worth, by the same reward, on held-out prompts (of a
file, a tenth). The same command with --resume goes on from the last checkpoint. The run stops with an error where the
KL diverges, a number is not finite, or answers have scored the same for long (--max-equal-updates).

examples:
  minipeft ppo --output happy                                           the shipped base made happy by VADER
  minipeft sft --output tuned; minipeft reward --model tuned --output judge
  minipeft ppo --model tuned --reward judge --prompts prompts.jsonl --output aligned
  minipeft ppo --algorithm grpo --kl-coef 0.02 --method lora -r 4 --lr 1e-3 --output adapter
  minipeft ppo --reward judge --kl-target 6 --output steady              an adaptive KL coefficient
  minipeft ppo --best-of 16 --output happy                               beside the best of 16 answers at the start
  minipeft ppo --reward-function rewards:short --output brief            short() of ./rewards.py
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import minipeft as mp

from .. import rlhf
from ..options import configuration, from_arguments, option
from ..rlhf.config import GroupConfig, PPOConfig
from . import outputs, runs
from .arguments import Arguments, Common, Parser
from .data import columns_of, split_off
from .foreign import load_function
from .models import load_trained
from .preferences import OPENING, add_trained, encoded_prompts, stop_tokens, template_of

BASELINE = 64  # held-out prompts of --best-of
MISSING_EOS = {"replace": {"missing_eos_score": -1.0}, "penalize": {"missing_eos_penalty": 1.0}, "ignore": {}}


@configuration(kw_only=True)
class OnlineOptions:
    """What answers and scores the prompts, beside the configuration of the algorithm."""

    reward: str | None = option(None, "a reward model's directory (default: VADER's sentiment)", metavar="DIR")
    reward_function: str | None = option(None, "or a function of prompts and completions", metavar="MODULE:NAME")
    prompts: str | None = option(None, "a .jsonl or .txt file; None: openings of the shipped novels", metavar="FILE")
    algorithm: str = option("ppo", "what improves the policy", choices=("ppo", "rloo", "grpo"))
    missing_eos: str = option("ignore", "an answer without its end scores -1, 1 less, as it does", choices=MISSING_EOS)
    best_of: int | None = option(None, f"also the best of N answers at the start to {BASELINE} prompts", least=2)


def add_arguments(parser: Parser) -> None:
    add_trained(parser)
    parser.options(OnlineOptions)
    parser.options(Common, "columns")
    parser.options(
        PPOConfig, "steps", "batch_size", "mini_batch_size", "num_epochs", "learning_rate", "kl_coef",
        "kl_target", "stop_kl", "max_kl", "max_equal_updates", "response_length", "temperature", "bf16", "save_steps", "seed",
        group="training", save_steps="updates between checkpoints; None: 1/5",
    )  # fmt: skip
    parser.options(GroupConfig, "num_generations", group="training")
    runs.add_output(parser)


def run(args: Arguments) -> None:
    args.only_one("reward", "reward_function")
    if not args.prompts:
        args.refuse(("columns",), "without --prompts")
    output = outputs.check_output(args)
    own, other = (PPOConfig, GroupConfig) if args.algorithm == "ppo" else (GroupConfig, PPOConfig)
    args.refuse((f.name for f in fields(other) if not hasattr(own, f.name)), f"with --algorithm {args.algorithm}")
    config = from_arguments(own, args, output_dir=output, save_total_limit=1, **MISSING_EOS[args.missing_eos])

    key, method, policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    room = policy.config.max_position_embeddings - config.response_length
    prompts, held_out = _prompts(args, tokenizer, template, room)
    ends = tuple(stop_tokens(policy, tokenizer, template))
    config = replace(config, stop_token_ids=ends, save_steps=config.save_steps or max(1, config.steps // 5))
    reward, watch = _reward(args, tokenizer)
    if method:
        steps = config.steps * config.num_epochs * config.batch_size // config.mini_batch_size  # of the optimizer
        policy = method.prepare(policy, steps, args.seed)
    kind = {"ppo": rlhf.PPOTrainer, "rloo": rlhf.RLOOTrainer, "grpo": rlhf.GRPOTrainer}[args.algorithm]
    trainer = kind(policy, reward, prompts, config, watch)
    trained = sum(p.size for p in trainer.trainable.values())
    runs.note(
        f"{args.algorithm}, {key}: {trained:,} trained parameters; {len(prompts):,} prompts; "
        f"{config.steps:,} updates of {config.batch_size} answers, learning rate {trainer.config.learning_rate:.3g}, "
        f"KL coefficient {config.kl_coef:g}"
    )
    shown, drawn = prompts[:3], (config.response_length, config.temperature, ends, config.seed)
    before = rlhf.rollout(trainer.reference, shown, *drawn)
    trainer.reward(before)  # a reward that does not work is reported before anything is written
    baseline = args.best_of and rlhf.best_of_n(trainer.reference, trainer.reward, held_out, args.best_of, *drawn)
    history = outputs.run_training(args, trainer)
    after = rlhf.rollout(policy, shown, *drawn)
    with mp.train.metrics.picture(output / "ppo.png") as path:
        rlhf.plot_run(history, path, baseline)
    sides = {"prompt": shown, "before": before.responses(), "after": after.responses()}
    texts = {what: [tokenizer.decode(ids, skip_special_tokens=True) for ids in side] for what, side in sides.items()}
    samples = [dict(zip(texts, sample)) for sample in zip(*texts.values())]
    results = {"updates": len(history), "first": history[0], "last": history[-1], "samples": samples}
    if baseline:
        best = float(rlhf.best_of_n(policy, trainer.reward, held_out, args.best_of, *drawn).expected[0])
        lists = {"start": baseline.expected.tolist(), "kl_bound": baseline.kl.tolist()}
        results["best_of_n"] = {"n": args.best_of, "prompts": len(held_out), **lists, "trained": best}
    saved = runs.save(args, policy, tokenizer, name, results, trainer.config, how=("--temperature", "1"), method=key)
    watched = ((f"watch/{w}", f"{w} (watched)") for w in watch)
    for key, what in (("objective/scores", "reward"), ("objective/kl", "KL"), *watched):
        first, last = ("none" if r[key] is None else f"{r[key]:.3f}" for r in (history[0], history[-1]))
        print(f"{what:16} {first:>8} -> {last}")
    if baseline:
        reached = f"{baseline.expected[0]:.3f} -> {best:.3f}"
        bound = f"{baseline.expected[-1]:.3f}, at a KL of {baseline.kl[-1]:.3f} at most"
        print(f"on {len(held_out)} held-out prompts, reward of an answer: {reached}; best of {args.best_of}: {bound}")
    for sample in samples:
        print(f"\n{sample['prompt']}\n  before: {sample['before'].strip()}\n  after:  {sample['after'].strip()}")
    print(f"\n{saved}")


def _prompts(args: Arguments, tokenizer: Any, template: Any, room: int) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts to train on, held-out ones for --best-of) as token ids; ValueError for one longer than `room`.

    A tenth of a file is held out; the shipped novels have validation chapters.
    """
    length = f"--response-length {args.response_length}"
    if room < 1:
        raise ValueError(f"{length} leaves no room for a prompt")
    read = mp.text.datasets.read_prompts
    texts = read(args.prompts, columns_of(args.columns)) if args.prompts else rlhf.sentence_openings("train", OPENING)
    prompts = encoded_prompts(texts, tokenizer, template)
    for number, ids in enumerate(prompts, start=1):
        if len(ids) > room:
            has = f"has {len(ids)} tokens; with {length} the model has room for {room}"
            raise ValueError(f"{args.prompts or 'openings of the shipped novels'}: prompt {number} {has}")
    if not args.best_of:
        return prompts, []
    if args.prompts:
        prompts, held_out = split_off(prompts, 0.1)
    else:
        held_out = encoded_prompts(rlhf.sentence_openings("validation", OPENING), tokenizer, template)
    return prompts, held_out[:BASELINE]


def _reward(args: Arguments, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """(what is optimized, what is watched)."""
    if args.reward_function is not None:
        function = load_function(args.reward_function, "--reward-function")
        return rlhf.text_reward(function, tokenizer, args.reward_function), {}
    gold = rlhf.gold_reward(tokenizer)
    if args.reward is None:
        rlhf.vader([])  # a missing extra is reported before anything is computed
        return gold, {}
    model, own = rlhf.RewardModel.from_pretrained(args.reward, args.backend)
    if own is not None and _vocabulary(own) != _vocabulary(tokenizer):
        raise ValueError(f"--reward {args.reward}: must be trained with the tokenizer of the model, and has another")
    with suppress(ImportError):
        rlhf.vader([])
        return model, {"vader": gold}
    return model, {}


def _vocabulary(tokenizer: Any) -> list[str]:
    return [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
