"""Full fine-tuning: the procedure, the loop, and what it costs."""

from __future__ import annotations

import ast
import inspect
import io
import math
import statistics
import sys
import tempfile
import tokenize
from functools import cache
from typing import Any

import numpy as np

import minipeft as mp

from ..accounting.parameters import count_parameters
from ..train import collate
from ..train.evaluation import example_losses
from . import data, large, width
from .inputs import BASE, SIZES, arrays, base, batch, bytes_on_disk, examples, moved, steps
from .mechanisms import ByItem
from .register import UNTRIED, Number, Verdict, claim, graded, listed, those
from .statistics import crossed

LOOP = """\
for input_ids, labels in batches:
    logits = model(input_ids)
    loss = task_loss(logits, labels)
    loss.backward()
    optimizer.step()
"""  # as textbooks print it
ZEROED = LOOP + "    optimizer.zero_grad()\n"
PRINTED, USUAL = 5e-5, 1e-3  # rates: of the textbooks, and the library's for a model of this size
PRICE, CARD, UTILIZATION, TOKENS = 2.0, "h100", 0.4, 512  # dollars an hour of a card, at a share of its peak; an example's


@cache
def _tuned() -> tuple[float, float, float]:
    """Two steps on every parameter: (share of the numbers that moved, the same with a head, loss after saving - before)."""
    from ..nn.heads import SequenceClassifier
    from ..train import evaluate

    model, tokenizer = base()
    tuned, start = model.copy().requires_grad_(True), arrays(model)
    steps(tuned)
    classifier = SequenceClassifier(model, 2)
    classifier.requires_grad_(True)
    head, given = arrays(classifier), collate(examples()).arguments
    labels = batch(8, 1)[:, 0] % 2
    steps(classifier, loss=lambda m: m.loss(given["input_ids"], labels, given["attention_mask"]))
    with tempfile.TemporaryDirectory() as directory:
        mp.save_pretrained(tuned, directory, tokenizer)
        again = mp.from_pretrained(directory)[0]
    losses = [evaluate(m, list(examples()), 8, tokenizer.pad_token_id) for m in (tuned, again)]
    shares = [
        sum(share * before[name].size for name, share in moved(before, arrays(m)).items())
        / sum(x.size for x in before.values())
        for before, m in ((start, tuned), (head, classifier))
    ]
    return shares[0], shares[1], losses[1] - losses[0]


@claim("full-1", lesson="03_full_finetuning.py", section="Step 4 · Save: a whole model per task")
def procedure() -> Verdict:
    """Holds if, with and without a classifier's head, two steps move more than 99 % of all numbers, and the model that is
    loaded from the saved directory has the same loss; holds if some of these three are so; does not hold here if none is."""
    language, head, difference = _tuned()
    right = {
        "every parameter trains with the model's own head": language > 0.99,
        "every parameter trains with a new head": head > 0.99,
        "the checkpoint is whole": difference == 0,
    }
    return Verdict(
        graded(right),
        f"It is so that {those(right)}. Two steps move {language:.1%} of the language model's numbers, and {head:.1%} with a "
        f"classifier's head, as then the embeddings of words that the batch lacks have no gradient. The "
        f"saved model's loss differs by {difference:.2g}.",
        Number("share of the numbers that two steps move", 100 * language, "%"),
        [Number("with a classifier's head", 100 * head, "%"), Number("loss after loading - before saving", difference, "nats")],
        base=BASE, task="8 sentences",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the loop


def loop(zeroed: bool, rate: float, seed: int, steps: int = 60, batch_size: int = 8, tested: int = 512) -> dict[str, Any]:
    """The row of a run of the printed loop on verses, with AdamW: before and after it, in nats a token, the loss on each of
    `tested` verses of the test split."""
    model, tokenizer = base()
    model, drawn = model.copy().requires_grad_(True), data.drawn("rewrite", steps * batch_size, seed)
    pairs = [collate(drawn[i : i + batch_size], tokenizer.pad_token_id).arguments for i in range(0, len(drawn), batch_size)]

    def task_loss(logits: Any, labels: Any) -> Any:
        return mp.functional.cross_entropy(logits[:, :-1], labels[:, 1:])

    names = {
        "batches": [(given["input_ids"], given["labels"]) for given in pairs], "model": model,
        "task_loss": task_loss, "optimizer": mp.optim.AdamW(model.parameters(), lr=rate),
    }  # fmt: skip
    exec(ZEROED if zeroed else LOOP, names)  # the text itself, which `simple` counts, too
    return {"before": _before(tested), "after": _losses(model, tested)}


def _losses(model: Any, tested: int) -> list[float]:
    nats, tokens = example_losses(model, data.encode(data.asked("rewrite", "test", tested)), 32, base()[1].pad_token_id)
    return (nats / tokens).round(4).tolist()


@cache
def _weights(tested: int) -> np.ndarray:
    """By which a verse's mean over its tokens counts in the mean over all tokens: its share of them, times the number of verses."""
    tokens = np.array([sum(label >= 0 for label in one.labels) for one in data.encode(data.asked("rewrite", "test", tested))])
    return tokens / tokens.mean()


@cache
def _before(tested: int) -> list[float]:
    return _losses(base()[0], tested)


LOOPS = ByItem("loop", loop, lambda: mp.grid(zeroed=[True, False], rate=[PRINTED, USUAL], seed=range(5)), tolerance=0.05)


@claim("full-2", lesson="03_full_finetuning.py", section="Step 3 · Train: and which learning rate?", experiment=LOOPS)
def printed_loop(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if, at each rate, the loop as printed ends at a test loss that is not clearly above that of the same loop with gradients
    zeroed (95 % over seeds and verses); holds if so at one rate alone; does not hold here if at none."""
    evidence, cases, above, told = [], {}, [], []
    before, weights = rows[0]["before"], _weights(len(rows[0]["after"]))
    for rate in sorted({row["rate"] for row in rows}):
        zeroed, printed = (weights * [r["after"] for r in rows if r["zeroed"] is z and r["rate"] == rate] for z in (True, False))
        found = {"zeroed": zeroed, "as printed": printed, "as printed, less zeroed": printed - zeroed}
        numbers = [
            Number(f"rate {rate:g}: loss after, {name}", e.value, "nats a token", e.low, e.high)
            for name, e in ((name, crossed(x)) for name, x in found.items())
        ]
        evidence, above = evidence + numbers, [*above, numbers[-1]]
        cases[f"at rate {rate:g}"] = numbers[-1].low <= 0
        told.append(f"{numbers[-1].value:+.3f} nats at rate {rate:g}")
    because = (
        f"The printed loop never zeroes the gradients, and each step takes the sum of all so far. Its test loss, which begins at "
        f"{np.mean(_weights(len(before)) * before):.2f}, ends {listed(told)} above that of the same loop with zeroing: clearly above at "
        f"{sum(not x for x in cases.values())} of {len(cases)} rates."
    )
    return Verdict(
        graded(cases), because, max(above, key=lambda n: n.value), evidence, 5, len(rows[0]["after"]), BASE,
        "verses into Basic English, 60 steps of 8, AdamW",
    )  # fmt: skip


@claim("full-3", lesson="14_best_practices.py", section="2 · The learning rate", experiment=width.EXPERIMENT)
def rate_against_width(rows: list[dict[str, Any]]) -> Verdict:
    """Holds if at every width, 32 to 256, and at 128 after ten times the pretraining, the best rate of full fine-tuning is clearly below
    half of pretraining's, and the rate that a law of width predicts at 7B (its interval) meets 1e-5 to 5e-5; holds if some of this is
    so. The law counts only if it gives SmolLM2-135M's best rate (of smollm2.jsonl: 320 examples, one seed) within a factor of 2; if it
    does not, and nothing else is so, it cannot be tested here; if it does, and nothing is so, it does not hold here."""
    best = large.best_rates(large.EXPERIMENT.rows()).get("full")
    if best is None:
        return Verdict(UNTRIED, "smollm2.jsonl lacks full fine-tuning.")
    return width.verdict(rows, best)


@claim("full-6", lesson="16_which_method.py", section="1 · Eight ways, and what each needs")
def simple() -> Verdict:
    """Holds if the training loop, with its line that zeroes gradients, has fewer lines than the file of each other method;
    holds if fewer than most; does not hold here otherwise. Lines of code: without comments, docstrings and blanks."""
    own = lines_of_code(ZEROED)
    others = method_lines()
    longer = [n for n in others.values() if n > own]
    verdict = graded({"all": len(longer) == len(others), "most": 2 * len(longer) > len(others)})
    shortest, longest = min(others, key=others.get), max(others, key=others.get)
    return Verdict(
        verdict,
        f"The loop has {own} lines, and full fine-tuning adds none; a method's file adds {others[shortest]} ({shortest}) to "
        f"{others[longest]} ({longest}), not counting the surgery that they share.",
        Number("lines of a method's file, the median, over the loop's", statistics.median(others.values()) / own, "times"),
        [Number("the loop", own, "lines"), *(Number(f"peft/{name}.py", n, "lines") for name, n in sorted(others.items()))],
    )  # fmt: skip


def method_lines() -> dict[str, int]:
    """The lines of each shipped method's own file, by the file's name."""
    from ..peft.huggingface import config_class
    from ..peft.methods import METHODS

    own = {config_class(m.kind) for m in METHODS.values() if m.kind not in (None, "head", "frozen")}
    modules = {cls.__module__ for cls in own if cls.__module__.startswith("minipeft.")}  # those of a plugin are not ours
    return {name.rpartition(".")[2]: lines_of_code(inspect.getsource(sys.modules[name])) for name in modules}


def lines_of_code(source: str) -> int:
    """Lines that hold code: no comments, docstrings or blanks."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in silent]
    found = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        texts = [n for n in getattr(node, "body", []) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)] \
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else []  # fmt: skip
        for text in texts:
            found -= {*range(text.lineno, text.end_lineno + 1)}
    return len(found)


# ----------------------------------------------------------------------------------------------------------- its costs


@claim("full-8", lesson="03_full_finetuning.py", section="Step 4 · Save: a whole model per task")
def storage() -> Verdict:
    """Holds if the saved file has all bytes of all parameters, and fine-tuning moves more than half of the numbers, so that a
    file of what has changed is no smaller; does not hold here otherwise."""
    model, _ = base()
    file = bytes_on_disk(lambda path: mp.save_pretrained(model, path))
    held, share = sum(p.data.nbytes for p in model.parameters()), _tuned()[0]
    sizes = {size: 2 * count_parameters(name).stored for size, name in SIZES.items()}
    return Verdict(
        graded({"a whole copy": file >= held and share > 0.5}),
        f"Two steps move {share:.0%} of the numbers (whether their change can be compressed is not tried), and the file has {file / held:.2f} times the bytes of the parameters; "
        f"in 16 bits a task takes {listed([f'{n / 1e9:.1f} GB at {size}' for size, n in sizes.items()])}.",
        Number("a task's file at 7B, 16 bits", sizes["7B"] / 1e9, "GB"),
        [
            Number("the base's file, float32", file, "bytes"), Number("its parameters", held, "bytes"),
            *(Number(f"{size} ({SIZES[size]}), 16 bits", n, "bytes") for size, n in sizes.items()),
        ],
        base=BASE,
    )  # fmt: skip


@claim("full-9", lesson="12_counting.py", section="3 · Bytes of a parameter")
def memory() -> Verdict:
    """Holds if, at 7B and 70B in 16 bits, gradients and the optimizer's states take more bytes than the weights, for every
    optimizer; holds if for some; does not hold here if for none."""
    from ..accounting.memory import memory_ledger
    from ..accounting.precision import OPTIMIZERS

    extra, evidence, cases = {}, [], {}
    for optimizer in OPTIMIZERS:
        for size, name in SIZES.items():
            held = memory_ledger(name, None, optimizer=optimizer, precision="bfloat16").held
            extra[optimizer, size] = (held["gradients"] + held["optimizer states"]) / held["trained weights"]
            evidence.append(Number(f"{size}, {optimizer}: gradients and states over weights", extra[optimizer, size], "times"))
        cases[optimizer] = all(extra[optimizer, size] > 1 for size in SIZES)
    bytes_7B = memory_ledger(SIZES["7B"], None, optimizer="adamw", precision="bfloat16").model_states
    few = (
        f", and with {those(cases, False)} {extra[those(cases, False), '7B']:.0f} times"
        if sum(not c for c in cases.values()) == 1
        else ""
    )
    return Verdict(
        graded(cases),
        f"The optimizer is one of {those(cases)}: in 16 bits, with no float32 copy, gradients and states take "
        f"{extra['adamw', '7B']:.0f} times the bytes of the weights with AdamW{few}; at 7B all three take {bytes_7B / 1e9:.0f} GB with AdamW.",
        Number("gradients and AdamW's states over weights, 7B", extra["adamw", "7B"], "times"), evidence,
    )  # fmt: skip


@claim("full-11", lesson="12_counting.py", section="7 · Time")
def expensive() -> Verdict:
    """Holds if, at 7B and 70B, 1,000 examples of 512 tokens cost more than 1 dollar of GPU time (2 dollars an H100-hour, at 40
    % of its peak) and the states do not fit one card of 80 GB; holds if only one of the two is so; does not hold here
    otherwise."""
    from ..accounting.cards import CARDS
    from ..accounting.flops import step_flops
    from ..accounting.memory import memory_ledger

    cases, evidence, money, cards, without = {}, [], {}, {}, {}
    for size, name in SIZES.items():
        flops = step_flops(name, None, 1, TOKENS)
        seconds = 1000 * flops.seconds(CARD, UTILIZATION)
        money[size] = seconds / 3600 * PRICE
        states, without[size] = (memory_ledger(name, None, precision=p).model_states for p in ("mixed", "bfloat16"))
        cards[size] = math.ceil(states / (CARDS[CARD][0] * 1e9))
        cases |= {f"computation at {size}": money[size] > 1, f"memory at {size}": cards[size] > 1}
        evidence += [
            Number(f"{size}: 1,000 examples", 1000 * flops.total, "FLOPs"), Number(f"{size}: the same", seconds, "seconds"),
            Number(f"{size}: the same", money[size], "dollars"), Number(f"{size}: weights, gradients, states", states, "bytes"),
            Number(f"{size}: cards of {CARDS[CARD][0]} GB for these", cards[size], "cards"),
            Number(f"{size}: the same without a float32 copy of the weights", without[size], "bytes"),
        ]  # fmt: skip
    told = [f"{size} takes {cards[size]} cards and {money[size]:.2f} dollars" for size in SIZES]
    return Verdict(
        graded(cases),
        f"Expensive is {those(cases)}, by these limits: one card of {CARDS[CARD][0]} GB for the states (16 bytes a parameter, no batch; "
        f"without a float32 copy of the weights {without['7B'] / 1e9:.0f} GB at 7B), 1 dollar for 1,000 examples of {TOKENS} tokens ({PRICE:g} dollars an {CARD.upper()}-hour at {UTILIZATION:.0%} of its peak). "
        f"{listed(told)}.",
        Number("1,000 examples at 7B", money["7B"], "dollars"),
        evidence,
        task=f"examples of {TOKENS} tokens, {PRICE:g} dollars an {CARD.upper()}-hour at {UTILIZATION:.0%} of its peak",
    )
