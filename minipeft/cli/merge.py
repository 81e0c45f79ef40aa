"""Merge an adapter into its base, as a plain model.

It needs no adapter and runs as fast as the base. The base is the one that the adapter's directory names, in four bits
if it was trained on that; --model says where it is now. What was in four bits is dequantized, so the merged model
computes what base and adapter did. With --requantize its layers are put into four bits again, which loses some of what
was learned (how much is printed).

Methods that no plain model equals (prompts, prefixes, bottleneck adapters) are refused. The merged model appears whole
or not at all; the adapter and the base stay as they are.

examples:
  minipeft merge --adapter adapter --output merged
  minipeft merge --adapter adapter --model SmolLM2-135M-Instruct.Q4_1.gguf --output merged
  minipeft merge --adapter adapter --requantize --output smaller

  minipeft generate --model merged --prompt "..."
"""

from __future__ import annotations

import minipeft as mp

from ..options import REQUIRED
from . import outputs
from .arguments import Arguments, Common, Parser, add_machine
from .models import load_model, save_template, usual_template


def add_arguments(parser: Parser) -> None:
    parser.options(
        Common, "adapter", "model", "output", defaults={"adapter": REQUIRED}, adapter="the adapter directory",
        model="its base (default: the one that the adapter's directory names)",
    )  # fmt: skip
    parser.add_argument("--requantize", action="store_true", help="put what was in four bits into four bits again")
    add_machine(parser)


def run(args: Arguments) -> None:
    output = outputs.check_output(args)
    model, tokenizer = load_model(args)
    merged, errors = mp.peft.merge_and_requantize(model) if args.requantize else (model.merge_and_unload(), {})
    if args.requantize and not errors:
        raise ValueError("--requantize is for an adapter on a base in four bits; this one is in floats: leave it out")
    with mp.directory.replacing(output) as fresh:
        mp.save_pretrained(merged, fresh, tokenizer)
        if template := usual_template(args):
            save_template(fresh, template)
    if errors:
        path, worst = max(errors.items(), key=lambda item: item[1].of_update)
        print(f"quantizing again lost {worst.of_update:.0%} of the change of {path}, the most of {len(errors)} layers")
    print(f"saved in {args.output}  ({args.next_command('generate', '--model', args.output, '--prompt', '...')})")
