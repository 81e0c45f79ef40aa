"""A teacher: SmolLM2-135M-Instruct writes the answers from which the small base learns, where people's would stand.

It is shown SHOTS answered questions of the task in the same words, as the base is in `following`, then the question, and
goes on, greedily, to the end of the line. So people have written three answers of each task, and the teacher all others.

Sources: Wang et al. 2023, Self-Instruct (arXiv:2212.10560); Taori et al. 2023, Stanford Alpaca. There the teacher makes up the
questions, too; here they are the same for both, so that the answers differ, and what their tuning chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ..nn.generation import generate
from .inputs import prefix_cached, smollm2

TOKENS, BATCH = 48, 32  # of an answer, at most; answers at a time


def write(prompts: Sequence[str]) -> list[str]:
    """What the teacher writes after each prompt, up to the first line break. Prompts that begin alike are best side by side."""
    model, tokenizer = smollm2()
    encoded, found = [tokenizer.encode(prompt) for prompt in prompts], []
    for start in range(0, len(encoded), BATCH):
        given = prefix_cached(encoded[start : start + BATCH])
        out = generate(model, **given, max_new_tokens=TOKENS, eos_token_id=line_breaks())
        answers = out[:, given["input_ids"].shape[1] :]
        found += [tokenizer.decode(row, skip_special_tokens=True).partition("\n")[0].strip() for row in answers.tolist()]
    return found


@cache
def line_breaks() -> list[int]:
    """The tokens with a line break in them, and the one that ends a text."""
    tokenizer = smollm2()[1]
    return [i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i])] + [tokenizer.eos_token_id]
