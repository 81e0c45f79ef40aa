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

A model of more than 50 million parameters is trained sparingly unless the options say otherwise: two examples at a
time, four times a step, activations computed again in backward. Conversations are put in the chat template that comes
with the model, and --template chat does so with other records.

examples:
  minipeft finetune --data my.jsonl --output tuned
  minipeft finetune --data my.jsonl --output tuned --resume          after an interruption
  minipeft finetune --data qa.jsonl --template "Q: {prompt}\\nA:" --method head --lr 1e-3 --epochs 5 --output tuned
  minipeft finetune --data my.jsonl --method lora -r 16 --alpha 32 --dropout 0.05 --output adapter
  minipeft finetune --data my.jsonl --method lora --target q_proj v_proj --set use_rslora=true --output adapter
  minipeft finetune --data my.jsonl --optimizer adamw_8bit --output tuned      moments of 2 bytes a parameter, not 8
  minipeft finetune --data my.jsonl --method lora --loraplus-lr-ratio 16 --lr 1e-3 --output adapter
  minipeft finetune --model SmolLM2-135M-Instruct.Q4_1.gguf --data chat.jsonl --method qlora --output adapter

  minipeft generate --model tuned --prompt "..."
  minipeft generate --adapter adapter --prompt "..."
  minipeft generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter adapter --load-in-4bit --chat
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..options import add_options, configuration, from_arguments, option
from . import outputs, runs
from .arguments import add_model
from .method_options import add_method, method_of

LARGE = 50_000_000  # parameters, above which a batch of 8 x 256 tokens would hold gigabytes of activations


@configuration(kw_only=True)
class DataOptions:
    """How records become examples to learn from and held-out ones."""

    validation: str = option(
        "0.1", "a held-out file, or the share of the data to hold out, 0 for none", metavar="FILE|FRACTION"
    )
    template: str | None = option(
        None, 'plain, alpaca, chatml, chat (which comes with the model) or a text such as "Q: {prompt}\\nA:" '
        "(default: by the form of the records)", metavar="NAME|TEXT",
    )  # fmt: skip
    max_length: int | None = option(None, "tokens of an example; None: as the model takes", least=1)
    overflow: str = option("error", "what to do with longer records", choices=("error", "truncate", "drop"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help="a .jsonl or .txt file to learn from")
    add_training_arguments(parser)


def add_training_arguments(parser: argparse.ArgumentParser, longest: int = 256) -> None:
    """All options but --data; `longest` is the default of --max-length, where the model takes as much."""
    parser.set_defaults(longest=longest)
    add_model(parser)
    add_method(parser)

    group = parser.add_argument_group("data")
    add_options(group, DataOptions, max_length=f"tokens of an example (default: {longest}, or what the model takes)")
    group = parser.add_argument_group("training")
    runs.add_training(
        group,
        "gradient_accumulation_steps", "packing", "lr_scheduler_type", "optim", "loraplus_lr_ratio", "weight_decay",
        "max_grad_norm", "eval_steps", "early_stopping_patience",
        defaults={
            "learning_rate": None, "per_device_train_batch_size": None, "gradient_accumulation_steps": None,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.05,
        },
        learning_rate="peak learning rate (default: the method's, times 128 / hidden_size in wider models)",
        per_device_train_batch_size="examples at a time (default: 8, in large models 2)",
        gradient_accumulation_steps="batches a step (default: 1, in large models without --batch-size 4)",
        max_grad_norm="clip the gradient to this 2-norm; 0 does not",
        eval_steps="steps between evaluations (default: 1/5)",
        seed="seed of the adapter's start, the order of the data and dropout",
    )  # fmt: skip
    group.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        help="compute activations again in backward: less memory, slower (default: in large models)",
    )  # fmt: skip
    runs.add_output(parser)


def run(args: argparse.Namespace) -> int:
    from .data import read_records

    outputs.check_output(args)
    return fine_tune(args, read_records(args.data), validation(args))


def fine_tune(
    args: argparse.Namespace, records: list[Any], held_out: Any, tests: dict[str, list[Any]] | None = None
) -> int:
    """Train on records as the options say, save, and print the held-out loss before and after, and that of each test.

    `held_out` is records, or a fraction of `records` to split off; `tests` are more records by name, tested apart.
    Raises ValueError for a method or a --max-length that takes more positions than the model has.
    """

    from ..accounting import architecture
    from ..experiments.costs import count
    from ..text.examples import encode_examples
    from ..train import Trainer
    from .data import encode, samples
    from .models import load_model
    from .prompts import chosen_template
    from .report import ANSWER, answered, console, show_samples

    (key, method), options = method_of(args), from_arguments(DataOptions, args)
    base, tokenizer = load_model(args.model, args.backend, load_in_4bit=method.quantized)
    name, template = chosen_template(options.template, records[0], tokenizer)
    limit = base.config.max_position_embeddings - method.virtual_tokens
    if limit < 1:
        raise ValueError(f"--method {key} takes {method.virtual_tokens} positions, all that the model has")
    if options.max_length and options.max_length > limit:
        taken = f", of which --method {key} takes {method.virtual_tokens}" if method.virtual_tokens else ""
        positions = f"{base.config.max_position_embeddings} positions of the model{taken}"
        raise ValueError(f"--max-length {options.max_length} is more than the {positions}")
    max_length = options.max_length or min(args.longest, limit)
    data = encode(records, held_out, tokenizer, max_length, template, options.overflow)
    if not data.held_out:
        runs.refuse(args, ("eval_steps", "early_stopping_patience"), "without held-out examples")
    sets = {"": data.held_out} if data.held_out else {}  # what the loss is measured on, before and after
    for what, of in (tests or {}).items():
        sets[what] = encode_examples(of, tokenizer, max_length, template, options.overflow).examples

    large, batch_size = architecture(base.config).size > LARGE, args.per_device_train_batch_size
    arguments = runs.training_arguments(
        args, len(data.train), bool(data.held_out),
        per_device_train_batch_size=batch_size or (2 if large else 8),
        gradient_accumulation_steps=args.gradient_accumulation_steps or (4 if large and not batch_size else 1),
    )  # fmt: skip
    model = method.prepare(base, arguments.max_steps, args.seed)
    if large if args.gradient_checkpointing is None else args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = Trainer(model, data.train, data.held_out or None, arguments, tokenizer.pad_token_id or 0)
    trainable, total = count(model)
    trained = f"method {key}: {trainable:,} of {total:,} parameters; "
    runs.announce(data.train, data.held_out, trainer.args, "examples", trained)
    if data.note:
        runs.note(data.note)

    before = {what: trainer.evaluate(of) for what, of in sets.items()}
    result = outputs.run_training(args, trainer)
    after = {what: trainer.evaluate(of) for what, of in sets.items()}
    use = runs.save_model(args, model, tokenizer, name)
    results = {
        "parameters": {"trainable": trainable, "all": total},
        "examples": {"training": len(data.train), "held_out": len(data.held_out)},
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "held_out_loss": {"before": before.pop("", None), "after": after.pop("", None)},
    }
    if tests:
        results["loss_apart"] = {what: {"before": before[what], "after": after[what]} for what in tests}
    runs.write_record(args, results, options, trainer.args, max_length=max_length, method=key)

    loss = results["held_out_loss"]
    if data.held_out:
        perplexity = " -> ".join(f"{math.exp(x):.2f}" if x < 700 else "inf" for x in loss.values())
        print(f"held-out loss  before {loss['before']:.4f}  after {loss['after']:.4f}  (perplexity {perplexity})")
    for what in tests or ():
        print(f"    {what:16} before {before[what]:.4f}  after {after[what]:.4f}  ({len(sets[what])} examples)")
    if result.stopped_early:
        print(f"stopped early, after {result.steps} steps; the weights are those of step {result.best_step}")
    shown = samples(data, tokenizer, 1, limit - ANSWER, template)
    show_samples(console(), answered({"before": base, "after": model}, tokenizer, shown, template))
    if args.model and hasattr(model, "save_pretrained"):
        use = f"--model {args.model} {use}"
    if method.quantized:
        use += " --load-in-4bit"
    print(f"saved in {args.output}  (minipeft generate {use} {'--chat' if name == 'chat' else '--prompt ...'})")
    return 0


def validation(args: argparse.Namespace) -> Any:
    """--validation: a fraction as a float, or the records of the file that it names.

    Raises ValueError for a number outside of [0, 1), and as `read_records`.
    """
    from .data import read_records

    text = from_arguments(DataOptions, args).validation
    try:
        fraction = float(text)
    except ValueError:
        return read_records(text)
    if not 0 <= fraction < 1:
        raise ValueError(f"--validation takes a file or a fraction of at least 0 and below 1, not {text}")
    return fraction
