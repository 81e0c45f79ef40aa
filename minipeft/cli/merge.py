"""Merge an adapter into its base: a plain model directory, which needs no adapter and runs as fast as the base.

The base is the one that the adapter's directory names, in four bits if it was trained on that; --model says where it is
now. What was in four bits is dequantized, so the merged model computes what base and adapter did. With --requantize its
layers are put into four bits again, which loses some of what was learned (how much is printed).

Methods that no plain model equals (prompts, prefixes, bottleneck adapters) are refused. The merged model appears whole
or not at all; the adapter and the base stay as they are.

examples:
  minipeft merge --adapter adapter --output merged
  minipeft merge --adapter adapter --model SmolLM2-135M-Instruct.Q4_1.gguf --output merged
  minipeft merge --adapter adapter --requantize --output smaller

  minipeft generate --model merged --prompt "..."
"""

from __future__ import annotations

import argparse

from . import outputs
from .arguments import add_machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter directory")
    parser.add_argument(
        "--model", metavar="PATH", help="its base (default: the one that the adapter's directory names)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write; must be new or empty")
    parser.add_argument(
        "--requantize", action="store_true", help="put the layers that were in four bits into four bits again"
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    output = outputs.check_output(args)

    from ..directory import replacing
    from ..hub.pretrained import save_pretrained
    from ..peft.loftq import merge_and_requantize
    from ..peft.provenance import recorded_base
    from .models import load_model
    from .prompts import save_template, saved_template

    model, tokenizer = load_model(args.model, args.backend, None, args.adapter)
    errors = {}
    if args.requantize:
        merged, errors = merge_and_requantize(model)
        if not errors:
            raise ValueError(
                "--requantize is for an adapter on a base in four bits; this one is in floats: leave it out"
            )
    else:
        merged = model.merge_and_unload()

    with replacing(output) as fresh:
        save_pretrained(merged, fresh, tokenizer)
        base = args.model or recorded_base(args.adapter)[0]
        if template := saved_template(args.adapter) or saved_template(base):
            save_template(fresh, template)
    if errors:
        path, worst = max(errors.items(), key=lambda item: item[1].of_update)
        print(f"quantizing again lost {worst.of_update:.0%} of the change of {path}, the most of {len(errors)} layers")
    print(f"saved in {args.output}  (minipeft generate --model {args.output} --prompt ...)")
    return 0
