"""Fine-tune the shipped base, or any model, on your own file.

The data is a .jsonl file, one JSON object a line, all of one form:
    {"prompt": ..., "completion": ...}
    {"instruction": ..., "input": ..., "output": ...}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"text": ...}
or a .txt file of running text. Of prompts and completions only the completions are learned. Some records are held out
for testing, unless --validation names a file of its own.

The output directory is a Hugging Face model directory (an adapter directory of a method with adapters). Beside it are
metrics.jsonl, loss.png, finetune.json, template.json (the template, for what uses the model next), and the last
checkpoint, from which the same command with --resume goes on (safe to delete when the run has ended).

A model of more than 50 million parameters is trained sparingly unless the options say otherwise: two examples at a time,
four times a step, activations computed again in backward. Conversations are put in the chat template that comes with the
model, and --template chat does so with other records.

examples:
  minipeft finetune --data my.jsonl --output tuned
  minipeft finetune --data my.jsonl --output tuned --resume          after an interruption
  minipeft finetune --data qa.jsonl --template "Q: {prompt}\\nA:" --method head --lr 1e-3 --epochs 5 --output tuned
  minipeft finetune --data my.jsonl --method lora --output adapter
  minipeft finetune --model SmolLM2-135M-Instruct.Q4_1.gguf --data chat.jsonl --method qlora --output adapter

  minipeft generate --model tuned --prompt "..."
  minipeft generate --adapter adapter --prompt "..."
  minipeft generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter adapter --load-in-4bit --chat
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
from pathlib import Path
from typing import Any

from ..experiments.methods import METHODS
from .arguments import add_machine, add_model, add_seed, natural, positive, positive_int, proportion, use_machine

SUMMARY = "fine-tune a model on your own file"

LARGE = 50_000_000  # parameters, above which a batch of 8 x 256 tokens would hold gigabytes of activations

WRITTEN = re.compile(
    r"checkpoint-\d+|metrics\.jsonl|loss\.png|finetune\.json|sft\.json|template\.json|config\.json|generation_config\.json|tokenizer\.json"
    r"|tokenizer_config\.json|model\.safetensors|adapter_config\.json|adapter_model\.safetensors"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help="a .jsonl or .txt file to learn from")
    add_training_arguments(parser)


def add_training_arguments(parser: argparse.ArgumentParser, longest: int = 256) -> None:
    """All options but --data; `longest` is the default of --max-length, where the model takes as much."""
    parser.set_defaults(longest=longest)
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must be new or empty")
    add_model(parser)
    methods = ", ".join(f"{name} {method.learning_rate:g}" for name, method in METHODS.items())
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="full",
        help=f"default: full (learning rates: {methods}; times 128 / hidden_size in wider models)",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--validation",
        default="0.1",
        metavar="FILE|FRACTION",
        help="a held-out file, or the share of the data to hold out, 0 for none (default: 0.1)",
    )
    group.add_argument(
        "--template",
        metavar="NAME|TEXT",
        help=r'plain, alpaca, chatml, chat (which comes with the model) or a text such as "Q: {prompt}\nA:" (default: by the form of the records)',
    )
    group.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help=f"tokens of an example (default: {longest}, or what the model takes)",
    )
    group.add_argument(
        "--overflow",
        choices=("error", "truncate", "drop"),
        default="error",
        help="what to do with longer records (default: error)",
    )

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive, default=3.0, metavar="N", help="passes over the data (default: 3)")
    group.add_argument("--steps", type=positive_int, metavar="N", help="steps instead of epochs")
    group.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="examples at a time (default: 8, in large models 2)"
    )
    group.add_argument(
        "--accumulation",
        type=positive_int,
        metavar="N",
        help="batches a step (default: 1, in large models without --batch-size 4)",
    )
    group.add_argument(
        "--packing",
        nargs="?",
        type=positive_int,
        const=True,
        default=False,
        metavar="N",
        help="let the examples of a batch share rows, of N tokens (default: the longest's): the same loss, less padding",
    )
    group.add_argument(
        "--lr", type=positive, metavar="RATE", help="learning rate (default: the method's, see --method)"
    )
    group.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), default="cosine", help="default: %(default)s"
    )
    group.add_argument(
        "--warmup", type=proportion, default=0.05, metavar="SHARE", help="share of the steps (default: 0.05)"
    )
    group.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="default: %(default)s")
    group.add_argument("--weight-decay", type=natural, default=0.0, metavar="X", help="default: 0")
    group.add_argument(
        "--max-grad-norm", type=natural, default=1.0, metavar="X", help="clip the gradient; 0 does not (default: 1)"
    )
    group.add_argument("--eval-steps", type=positive_int, metavar="N", help="steps between evaluations (default: 1/5)")
    group.add_argument("--save-steps", type=positive_int, metavar="N", help="steps between checkpoints (default: 1/5)")
    group.add_argument(
        "--early-stopping", type=positive_int, metavar="N", help="stop after N evaluations without gain, keep the best"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations again in backward: less memory, slower (default: in large models)",
    )
    add_seed(group, "the order of the data, and of dropout")

    group = parser.add_argument_group("an output directory that is not empty")
    group.add_argument("--resume", action="store_true", help="go on from its last checkpoint; give the same options")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run's files (others stay)")
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    from .data import read_records

    check_output(Path(args.output), args.resume, args.overwrite)
    return fine_tune(args, read_records(args.data), validation(args.validation))


def fine_tune(
    args: argparse.Namespace, records: list[Any], held_out: Any, tests: dict[str, list[Any]] | None = None
) -> int:
    """Train on records as the options say, save, and print what became of the held-out loss, and of that of each test.

    `held_out` is records, or a fraction of `records` to split off; `tests` are more records by name, told apart.
    """
    output, tests = Path(args.output), tests or {}
    use_machine(args)
    from rich.console import Console

    from ..accounting import architecture
    from ..experiments.costs import count
    from ..files import write_json
    from ..hub.pretrained import save_pretrained
    from ..text.examples import encode_examples
    from ..train import Trainer, TrainingArguments, last_checkpoint
    from .data import encode, samples
    from .models import load_model
    from .prompts import chosen_template, save_template
    from .report import ANSWER, answer, console, show_samples

    method = METHODS[args.method]
    base, tokenizer = load_model(args.model, args.backend, load_in_4bit=method.quantized)
    name, template = chosen_template(args.template, records[0], tokenizer)
    large = architecture(base.config).size > LARGE
    batch_size = args.batch_size or (2 if large else 8)
    accumulation = args.accumulation or (4 if large and args.batch_size is None else 1)
    limit = base.config.max_position_embeddings - method.virtual_tokens
    if limit < 1:
        raise ValueError(f"--method {args.method} takes {method.virtual_tokens} positions, all that the model has")
    if args.max_length and args.max_length > limit:
        taken = f", of which --method {args.method} takes {method.virtual_tokens}" if method.virtual_tokens else ""
        positions = f"{base.config.max_position_embeddings} positions of the model{taken}"
        raise ValueError(f"--max-length {args.max_length} is more than the {positions}")
    max_length = args.max_length or min(args.longest, limit)
    data = encode(records, held_out, tokenizer, max_length, template, args.overflow)
    apart = {
        what: encode_examples(of, tokenizer, max_length, template, args.overflow).examples for what, of in tests.items()
    }

    steps = args.steps or math.ceil(args.epochs * math.ceil(len(data.train) / (batch_size * accumulation)))
    model = method.prepare(base, steps)
    if large if args.gradient_checkpointing is None else args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    often = max(1, steps // 5)
    arguments = TrainingArguments(
        output_dir=output,
        learning_rate=args.lr or method.rate_for(base),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        packing=args.packing,
        optim=args.optimizer,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm or None,
        lr_scheduler_type=args.schedule,
        warmup_ratio=args.warmup,
        eval_steps=(args.eval_steps or often) if data.held_out else None,
        save_steps=args.save_steps or often,
        save_total_limit=1,
        early_stopping_patience=args.early_stopping,
        seed=args.seed,
    )
    pad = tokenizer.pad_token_id or 0
    trainer = Trainer(model, data.train, data.held_out or None, arguments, pad)
    trainable, total = count(model)
    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    err.print(
        f"method {args.method}: {trainable:,} of {total:,} parameters; {len(data.train):,} examples to learn from, "
        f"{len(data.held_out):,} held out; {steps:,} steps of {batch_size * accumulation}, learning rate {arguments.learning_rate:.3g}"
    )
    if data.note:
        err.print(data.note)

    before, before_apart = _losses(trainer, data.held_out, apart)
    if args.overwrite:
        remove_earlier(output)
    try:
        result = trainer.train(resume_from_checkpoint=args.resume)
    except KeyboardInterrupt:
        if last_checkpoint(output) is None:
            raise
        raise KeyboardInterrupt("the same command with --resume goes on from the last checkpoint") from None
    after, after_apart = _losses(trainer, data.held_out, apart)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(output)
        tokenizer.save(output)
    else:
        save_pretrained(model, output, tokenizer)
    if name is not None:
        save_template(output, name)
    settings = {"run", "debug", "resume", "overwrite", "command", "longest"}
    options = {k: v for k, v in vars(args).items() if k not in settings}
    write_json(
        output / f"{args.command}.json",
        {
            "options": {
                **options,
                "lr": arguments.learning_rate,
                "max_length": max_length,
                "steps": steps,
                "batch_size": batch_size,
                "accumulation": accumulation,
            },
            "parameters": {"trainable": trainable, "all": total},
            "examples": {"training": len(data.train), "held_out": len(data.held_out)},
            "steps": result.steps,
            "stopped_early": result.stopped_early,
            "held_out_loss": {"before": before, "after": after},
            **(
                {"loss_apart": {k: {"before": before_apart[k], "after": after_apart[k]} for k in apart}}
                if apart
                else {}
            ),
        },
    )

    if before is not None and after is not None:
        print(f"held-out loss  before {before:.4f}  after {after:.4f}  (perplexity {_exp(before)} -> {_exp(after)})")
    for what in apart:
        print(
            f"    {what:16} before {before_apart[what]:.4f}  after {after_apart[what]:.4f}  ({len(apart[what])} examples)"
        )
    if result.stopped_early:
        print(f"stopped early, after {result.steps} steps; the weights are those of step {result.best_step}")
    shown = samples(data, tokenizer, 1, limit - ANSWER, template)
    for sample in shown:
        answers = {name: answer(m, tokenizer, sample.ids) for name, m in (("before", base), ("after", model))}
        show_samples(console(), [(sample, answers)])
    on = f"--model {args.model} " if args.model else ""
    use = f"{on}--adapter {output}" if hasattr(model, "save_pretrained") else f"--model {output}"
    use += " --load-in-4bit" if method.quantized else ""
    print(f"saved in {output}  (minipeft generate {use} {'--chat' if name == 'chat' else '--prompt ...'})")
    return 0


def _losses(trainer: Any, held_out: list[Any], apart: dict[str, list[Any]]) -> tuple[float | None, dict[str, float]]:
    return trainer.evaluate() if held_out else None, {what: trainer.evaluate(of) for what, of in apart.items()}


def _exp(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 700 else "inf"


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """ValueError where the directory cannot take a run: not a directory, or not empty and nothing said about that."""
    if resume and overwrite:
        raise ValueError("--resume goes on with an earlier run and --overwrite replaces it: give one of them")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; a directory is to be written")
    if output.is_dir() and any(output.iterdir()) and not (resume or overwrite):
        raise ValueError(f"--output {output} is not empty; choose another, or give --resume or --overwrite")


def remove_earlier(output: Path) -> None:
    """Remove what an earlier run of this command wrote into the directory, and nothing else."""
    for path in sorted(output.iterdir()) if output.is_dir() else []:
        if WRITTEN.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def validation(text: str) -> Any:
    """--validation: a fraction as a float, or the records of the file that it names."""
    from .data import read_records

    try:
        fraction = float(text)
    except ValueError:
        return read_records(text)
    if not 0 <= fraction < 1:
        raise ValueError(f"--validation takes a file or a fraction of at least 0 and below 1, not {text}")
    return fraction
