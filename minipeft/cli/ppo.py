"""Reinforcement learning from human feedback: let a model answer prompts, and train it on how its answers are scored.

The reward is a directory of `minipeft reward`; or a function of your own, --reward-function MODULE:NAME, importable from
here, which is called as in TRL, name(prompts=[...], completions=[...]), and returns a number for each completion; or, by
default, VADER's sentiment of the answer (extra 'rlhf').
The prompts are a .jsonl file of records of any form, or of "prompt"s alone, or a .txt file with one a line; without
--prompts, openings of sentences of the shipped novels. The reference policy is the model as it is at the start.

The output directory is a model directory (an adapter directory of a method with adapters, or with --adapter), with
metrics.jsonl (all statistics, an update a line), ppo.png and ppo.json. --best-of N adds the baseline that trains
nothing: what the best of N answers of the policy at the start is worth, by the same reward, on held-out prompts (of a
file, a tenth). The same command with --resume goes on from the last checkpoint. The run stops with an error where the KL
diverges, a number is not finite, or answers have scored the same for long (--max-equal-updates).

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

import argparse
from dataclasses import fields, replace
from typing import Any

from .. import rlhf
from ..options import add_options, from_arguments, reader
from ..rlhf.config import GroupConfig, PPOConfig
from . import outputs, runs
from .functions import load_function
from .preferences import OPENING, TEMPLATE, add_trained, load_trained, template_of

BASELINE = 64  # held-out prompts of --best-of
MISSING_EOS = {"replace": {"missing_eos_score": -1.0}, "penalize": {"missing_eos_penalty": 1.0}, "ignore": {}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trained(parser)
    reward = parser.add_mutually_exclusive_group()
    reward.add_argument("--reward", metavar="DIR", help="a reward model's directory (default: VADER's sentiment)")
    reward.add_argument("--reward-function", metavar="MODULE:NAME", help="or a function of prompts and completions")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a .jsonl or .txt file (default: openings of the shipped novels)"
    )
    parser.add_argument("--template", **TEMPLATE)
    group = parser.add_argument_group("training")
    group.add_argument("--algorithm", choices=("ppo", "rloo", "grpo"), default="ppo", help="default: ppo")
    add_options(
        group, PPOConfig, "steps", "batch_size", "mini_batch_size", "num_epochs", "learning_rate", "kl_coef",
        "kl_target", "stop_kl", "max_kl", "max_equal_updates", "response_length", "temperature", "save_steps", "seed",
        defaults={"seed": PPOConfig.seed},
        learning_rate="learning rate (default: 1/20 of the method's, of adapters 1/6, times 128 / hidden_size in wider models)",
        kl_target="ppo: move β towards this KL, nats a response",
        max_kl="an error above this KL, nats a response; may be raised with --resume",
        save_steps="updates between checkpoints (default: 1/5)", steps="updates, each on --batch-size fresh responses",
    )  # fmt: skip
    add_options(group, GroupConfig, "num_generations", num_generations="rloo, grpo: answers to each prompt")
    group.add_argument(
        "--missing-eos", choices=MISSING_EOS, default="ignore",
        help="an answer that no stop token ended scores -1, or 1 less, or as it does (default: ignore)",
    )  # fmt: skip
    group.add_argument(
        "--best-of", type=reader(int, {"least": 2}), metavar="N",
        help=f"also sample the best of N answers to {BASELINE} held-out prompts at most, at the start: the baseline",
    )  # fmt: skip
    runs.add_output(parser)


def run(args: argparse.Namespace) -> int:
    output = outputs.check_output(args)
    own, other = (PPOConfig, GroupConfig) if args.algorithm == "ppo" else (GroupConfig, PPOConfig)
    runs.refuse(args, (f.name for f in fields(other) if not hasattr(own, f.name)), f"with --algorithm {args.algorithm}")
    config = from_arguments(own, args, output_dir=output, save_total_limit=1, **MISSING_EOS[args.missing_eos])

    from ..evaluation import asked_turns, stop_tokens
    from ..train.metrics import picture

    key, method, policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    room = policy.config.max_position_embeddings - config.response_length
    prompts, held_out = _prompts(args, tokenizer, template, room, config.response_length)
    stop_token_ids = stop_tokens(policy, tokenizer, *asked_turns(["-"], template))
    often = config.save_steps or max(1, config.steps // 5)
    config = replace(config, stop_token_ids=tuple(stop_token_ids), save_steps=often)
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
    shown = prompts[:3]
    first_answers = _rollout(trainer.reference, shown, config)
    trainer.reward(first_answers)  # a reward that does not work is reported before anything is written
    before = _texts(first_answers, tokenizer)
    drawn = (config.response_length, config.temperature, config.stop_token_ids, config.seed)
    baseline = args.best_of and rlhf.best_of_n(trainer.reference, trainer.reward, held_out, args.best_of, *drawn)
    history = outputs.run_training(args, trainer)
    after = _texts(_rollout(policy, shown, config), tokenizer)
    with picture(output / "ppo.png") as path:
        rlhf.plot_run(history, path, baseline)
    use = runs.save_model(args, policy, tokenizer, name)
    samples = [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "before": b, "after": a}
        for prompt, b, a in zip(shown, before, after)
    ]
    results = {"updates": len(history), "first": history[0], "last": history[-1], "samples": samples}
    if baseline:
        trained = float(rlhf.best_of_n(policy, trainer.reward, held_out, args.best_of, *drawn).expected[0])
        lists = {"start": baseline.expected.tolist(), "kl_bound": baseline.kl.tolist()}
        results["best_of_n"] = {"n": args.best_of, "prompts": len(held_out), **lists, "trained": trained}
    runs.write_record(args, results, trainer.config, template=name, method=key)
    watched = ((f"watch/{w}", f"{w} (watched)") for w in watch)
    for key, what in (("objective/scores", "reward"), ("objective/kl", "KL"), *watched):
        first, last = ("none" if r[key] is None else f"{r[key]:.3f}" for r in (history[0], history[-1]))
        print(f"{what:16} {first:>8} -> {last}")
    if baseline:
        start, best, kl = baseline.expected[0], baseline.expected[-1], baseline.kl[-1]
        print(
            f"on {len(held_out)} held-out prompts, reward of an answer: {start:.3f} -> {trained:.3f}; of the best of "
            f"{args.best_of} at the start: {best:.3f}, at a KL of {kl:.3f} at most"
        )
    for sample in samples:
        print(f"\n{sample['prompt']}\n  before: {sample['before'].strip()}\n  after:  {sample['after'].strip()}")
    print(f"\nsaved in {args.output}  (minipeft generate {use} --temperature 1 --prompt ...)")
    return 0


def _prompts(
    args: argparse.Namespace, tokenizer: Any, template: Any, room: int, length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts to train on, held-out ones for --best-of) as token ids; ValueError for one longer than `room`.

    A tenth of a file is held out; the shipped novels have validation chapters.
    """
    from ..evaluation import asked_turns
    from ..text.datasets import read_prompts
    from .data import split_off

    if room < 1:
        raise ValueError(f"--response-length {length} leaves no room for a prompt")

    def encoded(texts: list[Any]) -> list[list[int]]:
        turns = asked_turns(texts, template, tokenizer)
        return [tokenizer.encode_pieces(turn.prompt, add_special_tokens=True) for turn in turns]

    prompts = encoded(read_prompts(args.prompts) if args.prompts else rlhf.sentence_openings("train", OPENING))
    for number, ids in enumerate(prompts, start=1):
        if len(ids) > room:
            has = f"has {len(ids)} tokens; with --response-length {length} the model has room for {room}"
            raise ValueError(f"{args.prompts or 'openings of the shipped novels'}: prompt {number} {has}")
    if not args.best_of:
        return prompts, []
    if args.prompts:
        prompts, held_out = split_off(prompts, 0.1)
        return prompts, held_out[:BASELINE]
    return prompts, encoded(rlhf.sentence_openings("validation", OPENING)[:BASELINE])


def _reward(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
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
        raise ValueError(
            f"--reward {args.reward}: has another tokenizer than the model; it must be trained with the same"
        )
    try:
        rlhf.vader([])
    except ImportError:
        return model, {}
    return model, {"vader": gold}


def _vocabulary(tokenizer: Any) -> list[str]:
    return [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]


def _rollout(policy: Any, prompts: list[list[int]], c: PPOConfig | GroupConfig) -> rlhf.Rollout:
    return rlhf.rollout(policy, prompts, c.response_length, c.temperature, c.stop_token_ids, c.seed)


def _texts(roll: rlhf.Rollout, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in roll.responses()]
