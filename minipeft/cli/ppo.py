"""Reinforcement learning from human feedback: let a model answer prompts, and train it on how its answers are scored.

The reward is a directory of `minipeft reward`, or, without --reward, VADER's sentiment of the answer (extra 'rlhf').
The prompts are a .jsonl file with a "prompt" in every line or a .txt file with one a line; without --prompts, openings
of sentences of the shipped novels. The reference policy is the model as it is at the start.

The output directory is a model directory (an adapter directory with --method lora or --adapter), with metrics.jsonl
(all statistics, an update a line), ppo.png and ppo.json. The same command with --resume goes on from the last
checkpoint. The run stops with a sentence where the KL diverges, a number is not finite, or all answers score the same.

examples:
  minipeft ppo --output happy                                           the shipped base made happy by VADER
  minipeft sft --output tuned; minipeft reward --model tuned --output judge
  minipeft ppo --model tuned --reward judge --prompts prompts.jsonl --output aligned
  minipeft ppo --algorithm grpo --kl-coef 0.02 --method lora --lr 1e-3 --output adapter
  minipeft ppo --reward judge --kl-target 6 --output steady              an adaptive KL coefficient
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import add_machine, add_seed, natural, positive, positive_int, use_machine
from .preferences import (
    OPENING,
    WRITTEN_BY_ALL,
    add_method,
    add_output,
    load_trained,
    remove_earlier,
    save_policy,
    template_of,
)

SUMMARY = "train a model on how its own answers are scored (PPO, RLOO, GRPO)"

WRITTEN = re.compile(WRITTEN_BY_ALL + r"ppo\.png|ppo\.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_method(parser)
    parser.add_argument("--reward", metavar="DIR", help="a reward model's directory (default: VADER's sentiment)")
    parser.add_argument(
        "--prompts", metavar="FILE", help="a .jsonl or .txt file (default: openings of the shipped novels)"
    )
    parser.add_argument(
        "--template",
        metavar="NAME|TEXT",
        help="plain, alpaca, chatml or a text with {prompt} (default: the model's own)",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--algorithm", choices=("ppo", "rloo", "grpo"), default="ppo", help="default: ppo")
    group.add_argument("--steps", type=positive_int, default=40, metavar="N", help="updates (default: 40)")
    group.add_argument(
        "--batch-size", type=positive_int, default=32, metavar="N", help="answers an update (default: 32)"
    )
    group.add_argument(
        "--mini-batch-size", type=positive_int, default=16, metavar="N", help="answers an optimizer step (default: 16)"
    )
    group.add_argument(
        "--epochs", type=positive_int, default=2, metavar="N", help="passes over the answers (default: 2)"
    )
    group.add_argument(
        "--generations", type=positive_int, default=4, metavar="K", help="answers a prompt, of rloo and grpo"
    )
    group.add_argument("--lr", type=positive, default=1e-4, metavar="RATE", help="learning rate (default: 1e-4)")
    group.add_argument("--kl-coef", type=natural, default=0.05, metavar="B", help="price of KL (default: 0.05)")
    group.add_argument(
        "--kl-target", type=positive, metavar="KL", help="adapt the price to this KL, nats a response (ppo)"
    )
    group.add_argument(
        "--stop-kl", type=positive, metavar="KL",
        help="end the run after the first update that samples above this KL; that update still trains",
    )  # fmt: skip
    group.add_argument(
        "--max-kl", type=positive, default=100.0, metavar="KL",
        help="an error above this KL (default: 100); may be raised with --resume",
    )  # fmt: skip
    group.add_argument("--response-length", type=positive_int, default=24, metavar="N", help="tokens (default: 24)")
    group.add_argument("--temperature", type=positive, default=1.0, metavar="T", help="of sampling (default: 1)")
    group.add_argument(
        "--missing-eos", choices=("replace", "penalize", "ignore"), default="ignore",
        help="an answer without end scores -1, or 1 less, or as it does (default: ignore)",
    )  # fmt: skip
    group.add_argument(
        "--save-steps", type=positive_int, metavar="N", help="updates between checkpoints (default: 1/5)"
    )
    add_seed(group, "the prompts and the answers")
    add_output(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    from .finetune import check_output

    output = Path(args.output)
    check_output(output, args.resume, args.overwrite)
    use_machine(args)
    if args.kl_target and args.algorithm != "ppo":
        raise ValueError(f"--kl-target adapts PPO's KL coefficient; {args.algorithm} keeps its own fixed")
    from rich.console import Console

    from .. import rlhf
    from ..files import write_json
    from ..train import last_checkpoint
    from .generate import stops
    from .prompts import asked

    policy, tokenizer = load_trained(args)
    name, template = template_of(args, tokenizer)
    prompts = _prompts(args, tokenizer, template, policy.config.max_position_embeddings - args.response_length)
    ends = stops(policy, tokenizer, asked(template, "-"))
    reward, watch = _reward(args, tokenizer)
    common = dict(
        output_dir=output, steps=args.steps, batch_size=args.batch_size, mini_batch_size=args.mini_batch_size,
        num_epochs=args.epochs, learning_rate=args.lr, kl_coef=args.kl_coef, max_kl=args.max_kl, stop_kl=args.stop_kl,
        response_length=args.response_length, temperature=args.temperature, seed=args.seed, save_total_limit=1,
        missing_eos_score=-1.0 if args.missing_eos == "replace" else None,
        missing_eos_penalty=1.0 if args.missing_eos == "penalize" else None,
        save_steps=args.save_steps or max(1, args.steps // 5), stop_token_ids=tuple(ends),
    )  # fmt: skip
    if args.algorithm == "ppo":
        trainer = rlhf.PPOTrainer(policy, reward, prompts, rlhf.PPOConfig(**common, kl_target=args.kl_target), watch)
    else:
        kind = {"rloo": rlhf.RLOOTrainer, "grpo": rlhf.GRPOTrainer}[args.algorithm]
        trainer = kind(policy, reward, prompts, rlhf.GroupConfig(**common, num_generations=args.generations), watch)
    trained = sum(p.size for p in trainer.trainable.values())
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
        f"{args.algorithm}, {args.method}: {trained:,} trained parameters; {len(prompts):,} prompts; {args.steps:,} "
        f"updates of {args.batch_size} answers, learning rate {args.lr:g}, KL coefficient {args.kl_coef:g}"
    )
    if args.overwrite:
        remove_earlier(output, WRITTEN)
    shown = prompts[: min(3, len(prompts))]
    before = _answers(trainer.reference, shown, tokenizer, ends, args)
    try:
        with _progress(args.steps) as show:
            history = trainer.train(resume_from_checkpoint=args.resume, on_step=show)
    except KeyboardInterrupt:
        if last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None
    after = _answers(policy, shown, tokenizer, ends, args)
    rlhf.plot_run(history, output / "ppo.png")
    save_policy(policy, tokenizer, output, name)
    options = {k: v for k, v in vars(args).items() if k not in ("run", "debug", "resume", "overwrite", "command")}
    samples = [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "before": b, "after": a}
        for prompt, b, a in zip(shown, before, after)
    ]
    write_json(
        output / "ppo.json",
        {
            "options": {**options, "template": name},
            "updates": len(history),
            "first": history[0],
            "last": history[-1],
            "samples": samples,
        },
    )
    for key, what in (
        ("objective/scores", "reward"),
        ("objective/kl", "KL"),
        *((f"watch/{w}", f"{w} (watched)") for w in watch),
    ):
        first, last = ("none" if r[key] is None else f"{r[key]:.3f}" for r in (history[0], history[-1]))
        print(f"{what:16} {first:>8} -> {last}")
    for sample in samples:
        print(f"\n{sample['prompt']}\n  before: {sample['before'].strip()}\n  after:  {sample['after'].strip()}")
    kind = "--adapter" if hasattr(policy, "save_pretrained") else "--model"
    print(f"\nsaved in {output}  (minipeft generate {kind} {output} --temperature 1 --prompt ...)")
    return 0


def _prompts(args: argparse.Namespace, tokenizer: Any, template: Any, room: int) -> list[list[int]]:
    """The prompts as token ids; ValueError for one that, answered, is longer than the model."""
    from .. import rlhf
    from .generate import read_prompts
    from .prompts import asked

    if room < 1:
        raise ValueError(f"--response-length {args.response_length} leaves no room for a prompt")
    texts = read_prompts(Path(args.prompts)) if args.prompts else rlhf.sentence_openings("train", OPENING)
    encoded = [tokenizer.encode_pieces(asked(template, text).prompt, add_special_tokens=True) for text in texts]
    for number, ids in enumerate(encoded, start=1):
        if not 1 <= len(ids) <= room:
            what = (
                "is empty"
                if not ids
                else f"has {len(ids)} tokens; with --response-length {args.response_length} the model has room for "
                f"{room}"
            )
            raise ValueError(f"{args.prompts}: prompt {number} {what}")
    return encoded


def _reward(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """(what is optimized, what is watched)."""
    from .. import rlhf

    gold = rlhf.gold_reward(tokenizer)
    if args.reward is None:
        rlhf.vader([])  # a missing extra is told before anything is computed
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


def _answers(
    policy: Any, prompts: list[list[int]], tokenizer: Any, ends: list[int], args: argparse.Namespace
) -> list[str]:
    from .. import rlhf

    roll = rlhf.rollout(policy, prompts, args.response_length, args.temperature, ends, args.seed)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in roll.responses()]


class _progress:
    """A bar on standard error, where that is a terminal: `with _progress(n) as show: show(record)`."""

    def __init__(self, total: int):
        self.bar, self.total = None, total

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        if not (sys.stderr is not None and sys.stderr.isatty()):
            return lambda record: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeRemainingColumn

        text = "reward {task.fields[reward]}  KL {task.fields[kl]}  left"
        self.bar = Progress(
            "update {task.completed}/{task.total}",
            BarColumn(),
            text,
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        task = self.bar.add_task("train", total=self.total, reward="-", kl="-")
        self.bar.start()
        return lambda record: self.bar.update(
            task,
            completed=record["step"],
            reward=f"{record['objective/scores']:.3f}",
            kl=f"{record['objective/kl']:.2f}",
        )

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
