"""Fine-tune a model on your own file.

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
  minipeft finetune --data more.jsonl --adapter adapter --output further    the adapter learns on, in its template
  minipeft finetune --data my.jsonl --columns prompt=question completion=response --output tuned
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

import math
from typing import Any

import minipeft as mp

from ..options import REQUIRED, configuration, option
from . import outputs, runs
from .arguments import Arguments, Common, Parser
from .data import encode, longest, read_records
from .method_options import add_method
from .models import chosen_template, load_trained, usual_template
from .report import sampled, show_samples

OVERLONG = "raise --max-length, or give --overflow truncate or drop"
LARGE = 50_000_000  # parameters, above which a batch of 8 x 256 tokens would hold gigabytes of activations


@configuration(kw_only=True)
class FinetuneOptions:
    """How records become examples to learn from and held-out ones, and what TrainingArguments do not say."""

    validation: str = option("0.1", "a held-out file, or the share to hold out, 0 for none", metavar="FILE|FRACTION")
    max_length: int = option(256, "tokens of an example, where the model takes as many", least=1)
    overflow: str = option("error", "what to do with longer records", choices=("error", "truncate", "drop"))
    gradient_checkpointing: bool | None = option(None, "less memory, more time; None: in large models")


def add_arguments(parser: Parser) -> None:
    parser.options(Common, "data", "columns", defaults={"data": REQUIRED})
    add_training_arguments(parser)


def add_training_arguments(parser: Parser, **defaults: Any) -> None:
    """All options but --data; `defaults` of FinetuneOptions."""
    parser.options(Common, "model", "adapter", adapter="an adapter directory to train further")
    add_method(parser)
    template = "plain, alpaca, chatml, chat or a text with {prompt}; None: by the form of the records"
    parser.options(Common, "template", group="data", template=template)
    parser.options(FinetuneOptions, group="data", defaults=defaults)
    by_size = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None}
    runs.add_training(
        parser, "gradient_accumulation_steps", "packing", "lr_scheduler_type", "optim", "loraplus_lr_ratio",
        "weight_decay", "max_grad_norm", "eval_steps", "early_stopping_patience",
        defaults=by_size | {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05},
        per_device_train_batch_size="examples at a time; None: 8, in large models 2",
        eval_steps="steps between evaluations; None: 1/5",
        gradient_accumulation_steps="batches a step; None: 1, in large models without --batch-size 4",
    )  # fmt: skip
    runs.add_output(parser)


def run(args: Arguments) -> None:
    outputs.check_output(args)
    fine_tune(args, read_records(args.data, args.columns), validation(args.validation, args.columns), {})


def fine_tune(args: Arguments, records: list[Any], held_out: Any, tests: dict[str, list[Any]]) -> None:
    """Train on records as the options say, save, and print the held-out loss before and after, and that of each test.

    `held_out` is records, or a fraction of `records` to split off; `tests` are more records by name, tested apart.
    Raises ValueError for a method or a --max-length that takes more positions than the model has.
    """
    key, method, base, tokenizer = load_trained(args)
    further = method is None and not isinstance(records[0], mp.text.datasets.Document)
    name, template = chosen_template(usual_template(args) if further else args.template, records[0], tokenizer)
    virtual_tokens = method.virtual_tokens if method else base.virtual_tokens
    max_length = longest(base, virtual_tokens, args.max_length, insisted="max_length" in args.given)
    try:
        data = encode(records, held_out, tokenizer, max_length, template, args.overflow)
    except ValueError as error:
        split = args.data and isinstance(held_out, float)  # else it may be a record of another file
        message = str(error).replace("raise max_length, or truncate or drop them", OVERLONG)
        raise ValueError(f"{args.data}: {message}" if split else message) from error
    if not data.held_out:
        args.refuse(("eval_steps", "early_stopping_patience"), "without held-out examples")
    sets = {"": data.held_out} if data.held_out else {}  # what the loss is measured on, before and after
    for what, of in tests.items():
        sets[what] = mp.text.examples.encode_examples(of, tokenizer, max_length, template, args.overflow).examples

    large, batch_size = mp.accounting.architecture(base.config).size > LARGE, args.per_device_train_batch_size
    arguments = runs.training_arguments(
        args, len(data.train), bool(data.held_out),
        per_device_train_batch_size=batch_size or (2 if large else 8),
        gradient_accumulation_steps=args.gradient_accumulation_steps or (4 if large and not batch_size else 1),
    )  # fmt: skip
    model = method.prepare(base, arguments.max_steps, args.seed) if method else base
    if large if args.gradient_checkpointing is None else args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer = mp.Trainer(model, data.train, data.held_out or None, arguments, tokenizer.pad_token_id or 0)
    trainable, total = mp.experiments.costs.count(model)
    runs.announce(trainer, "examples", f"method {key}: {trainable:,} of {total:,} parameters; ")
    runs.note(data.note)

    asked = {"tokenizer": tokenizer, "data": data, "n": 1, "template": template}
    asked["room"] = base.config.max_position_embeddings - virtual_tokens
    samples = sampled({"before": base}, **asked)  # now, as an adapter is trained in its place
    before = {what: trainer.evaluate(of) for what, of in sets.items()}
    result = outputs.run_training(args, trainer)
    after = {what: trainer.evaluate(of) for what, of in sets.items()}
    losses = {what: {"before": before.get(what), "after": after.get(what)} for what in ("", *sets)}
    loss = losses.pop("")
    results = {
        "parameters": {"trainable": trainable, "all": total},
        "examples": {"training": len(data.train), "held_out": len(data.held_out)},
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "held_out_loss": loss,
    }
    if tests:
        results["loss_apart"] = losses
    saved = runs.save(args, model, tokenizer, name, results, trainer.args, max_length=max_length, method=key)
    if data.held_out:
        perplexity = " -> ".join(f"{math.exp(x):.2f}" if x < 700 else "inf" for x in loss.values())
        print(f"held-out loss  before {loss['before']:.4f}  after {loss['after']:.4f}  (perplexity {perplexity})")
    for what in losses:
        print(f"    {what:16} before {before[what]:.4f}  after {after[what]:.4f}  ({len(sets[what])} examples)")
    if result.stopped_early:
        print(f"stopped early, after {result.steps} steps; the weights are those of step {result.best_step}")
    pairs = zip(samples, sampled({"after": model}, **asked))
    show_samples([old._replace(answers={**old.answers, **new.answers}) for old, new in pairs])
    print(saved)


def validation(text: str, columns: list[str] | None) -> Any:
    """--validation: a fraction as a float, or the records of the file that it names.

    Raises ValueError for a number outside of [0, 1), and as `read_records`.
    """
    try:
        fraction = float(text)
    except ValueError:
        return read_records(text, columns)
    if not 0 <= fraction < 1:
        raise ValueError(f"--validation takes a file or a fraction of at least 0 and below 1, not {text}")
    return fraction
