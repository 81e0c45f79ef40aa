"""Check every derivative against differences of values.

For a function with Jacobian J, a random direction u and a random cotangent w, the number <w, J u> comes from values
alone (a central difference, extrapolated) and <u, pullback(w)> from the pullback; they must be the same. Every
registered op is asked on many shapes, options and sets of inputs, then every parameter of small whole models of both
dialects, all in float64. "worst deviation" is relative to the size of the terms; 1e-7 is the limit, 1e-10 is usual.

The exit status is 1 when a check fails, and the failures are listed.

examples:
  minipeft gradcheck
  minipeft gradcheck --op softmax --op layer_norm
  minipeft gradcheck --models
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import minipeft as mp

from .arguments import Arguments, Parser, check_known
from .bars import console, grid


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--op", nargs="+", action="extend", metavar="NAME", help="only these ops")
    parser.add_argument("--models", action="store_true", help="only the whole models")


def run(args: Arguments) -> int:
    from rich.text import Text
    from tqdm import tqdm

    from ..autograd import cases, tensor
    from ..quant import cases as quant_cases  # noqa: F401  its op and its cases enter the registry

    args.only_one("op", "models")
    check_known("op", args.op or (), tensor.REGISTRY)
    ops, models = [] if args.models else cases.op_cases(args.op), {} if args.op else small_models()
    total = len(ops) + sum(len(model.parameters()) for model, _ in models.values())
    found: dict[str, list[tuple[float, Exception | None]]] = defaultdict(list)
    for name, deviation, error in tqdm(checked(ops, models), "checking", total, leave=False, disable=None):
        found[name].append((deviation, error))

    table, failures = grid("op or model", "checks", "worst deviation", ""), []
    for name, checks in found.items():
        errors = [error for _, error in checks if error]
        verdict = Text(f"{len(errors)} FAILED", "bold red") if errors else Text("ok", "green")
        table.add_row(name, str(len(checks)), "-" if errors else f"{max(d for d, _ in checks):.1e}", verdict)
        failures += errors
    out = console()
    out.print(table)
    for error in failures:
        out.print(f"\n{error}")
    out.print(f"\n{total - len(failures)} of {total} checks passed")
    return 1 if failures else 0


def checked(ops: list[Any], models: dict[str, tuple[Any, Any]]) -> Iterator[tuple[str, float, Exception | None]]:
    """(op or model, deviation, error) of each case of the ops, and of each parameter of the models."""
    from ..autograd import cases, gradcheck

    for case, deviation, error in cases.check_ops(ops):
        yield case.op, deviation, error
    for name, (model, call) in models.items():
        for _, deviation, error in gradcheck.check_parameters(partial(call, model), dict(model.named_parameters())):
            yield name, deviation, error


def small_models() -> dict[str, tuple[Any, Any]]:
    """name -> (model, how it is called): both dialects, with what changes the graph: heads, ties, masks, dropout."""
    import numpy as np

    Transformer, TransformerConfig = mp.Transformer, mp.TransformerConfig
    shape = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"initializer_range": 0.3, "max_position_embeddings": 8}
    gpt2, llama = TransformerConfig.gpt2(**shape), TransformerConfig.llama(**shape, num_key_value_heads=2)
    ids = np.random.default_rng(0).integers(0, 11, (2, 6))
    padding = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = np.where(ids < 3, -100, ids)
    checkpointed = Transformer(llama.replace(dropout=0.2), seed=3)
    checkpointed.gradient_checkpointing_enable()
    dropped = Transformer(gpt2.replace(dropout=0.2), seed=1)
    untied = Transformer(llama.replace(tie_word_embeddings=False), seed=2)
    return {
        "gpt2 model": (Transformer(gpt2, seed=1), lambda m: m(ids)),
        "gpt2 model, padding, dropout": (dropped, lambda m: m(ids, padding, rng=5)),
        "llama model": (Transformer(llama, seed=2), lambda m: m(ids)),
        "llama model, untied, loss": (untied, lambda m: m.loss(ids, labels, attention_mask=padding)),
        "llama model, checkpointing, dropout": (checkpointed, lambda m: m(ids, rng=5)),
    }
