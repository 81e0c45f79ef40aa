"""Count what a method trains and stores, from shapes.

trained: updated by the optimizer; stored: what a task's own file holds; total: in the adapted model. A tied head counts
once, a packed weight counts its elements, a method's frozen constants are not in the total (as PEFT counts).

--adapter-config also takes methods of PEFT that are counted here and not trained: ADAPTION_PROMPT, BOFT, C3A, DELORA,
FOURIERFT, HRA, MISS, RANDLORA, ROAD, SHIRA, VBLORA.

The name of a method means what it means to `minipeft finetune`: lora adapts all linear layers. The layers that are
usual in PEFT, such as q_proj and v_proj, are those of --set target_modules=null.

examples:
  minipeft count gpt3 --method lora -r 8
  minipeft count llama-7b --method lora -r 8 --target q_proj v_proj
  minipeft count bert-base --method bottleneck --placement houlsby --bottleneck 64
  minipeft count roberta-large --num-labels 3 --method lora --target query value --modules-to-save classifier
  minipeft count gpt2-m --method lora -r 4 --target c_attn --set enable_lora=[true,false,true]
  minipeft count t5v1.1-xxl --method prompt --virtual-tokens 100 --json
  minipeft count path/to/config.json --method adalora -r 4
  minipeft count Qwen/Qwen2.5-7B-Instruct --method lora -r 32 --set target_modules=null
  minipeft count mixtral-8x7b --method lora -r 16 --target q_proj v_proj w1 w2 w3
  minipeft count path/to/config.json --adapter-config path/to/adapter
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .. import accounting
from .arguments import Arguments, Parser
from .bars import bar, console, grid, print_json, size
from .method_options import add_shapes, architecture_of, counted_of

SHOWN = 24  # rows of the table, the rest is one row


def add_arguments(parser: Parser) -> None:
    add_shapes(parser)


def run(args: Arguments) -> None:
    arch = architecture_of(args)
    name, config, _ = counted_of(args, arch)
    count, trained = accounting.count_parameters(arch, config), accounting.parameters.trained_parameters(arch, config)
    if args.json:
        parameters = {path: list(shape) for path, shape in trained.items()} if config is not None else None
        record = {"model": arch.name, "method": name, **vars(count), "share": count.share, "parameters": parameters}
        return print_json(record)
    out = console()
    out.print(f"{arch.name} ({arch.model_type}), {name}\n", style="bold")
    if trained:
        out.print(_table(trained))
    out.print(f"\ntrained {count.trainable:>17,}   {100 * count.share:.4f}% of all")
    sizes = f"{size(4 * count.stored)} a task in float32, {size(2 * count.stored)} in 16 bits"
    out.print(f"stored  {count.stored:>17,}   {sizes}")
    out.print(f"total   {count.total:>17,}   {size(2 * count.total)} in 16 bits\n")
    out.print(bar({"trained": count.trainable, "frozen": count.total - count.trainable}))


def _table(trained: Mapping[str, tuple[int, ...]]) -> Any:
    """One row for each kind of parameter, layers together."""
    rows = Counter((re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name), tuple(shape)) for name, shape in trained.items())
    table = grid("trained", "shape", "how many", "parameters")
    ranked = sorted(rows.items(), key=lambda row: -math.prod(row[0][1]) * row[1])
    for (name, shape), n in ranked[:SHOWN]:
        table.add_row(name, " x ".join(map(str, shape)), f"{n:,}", f"{n * math.prod(shape):,}")
    if len(ranked) > SHOWN:
        rest = [(n, n * math.prod(shape)) for (_, shape), n in ranked[SHOWN:]]
        table.add_row(f"{len(rest)} more", "", *[f"{sum(column):,}" for column in zip(*rest)])
    return table
