"""Preferences from a model that follows written principles, in place of a person's: the labels of `chain`, given by a machine.

    principles   what the rater of `chain` goes by, in words: PRINCIPLES
    judge        SmolLM2-135M-Instruct, which is shown the principles and answers, and asked in one of four FORMS:

        choice       two answers, A and B, which is better?  log p("A") - log p("B"), in both orders, the mean of which
                     has no preference for a place
        few-shot     the same, after two such questions with their answers, EXAMPLES
        opinion      one answer, does it follow the principles?  log p("Yes") - log p("No")
        contrast     one answer, written on request:  log p(answer | asked to follow them) - log p(answer | asked to
                     break them)

    labels       LABELS comparisons of a seed, the first ones of `chain`, put in order by each of ARMS: the rater, the judge, a
                 coin, and, "flipped", by the gold, but turned round at random as often as the judge disagrees with it (are
                 the judge's errors worse than random ones?). From each order come a reward model, the best of 16 answers by
                 it, and a policy of PPO, all as in `chain`
    revision     the judge names what is wrong with an answer of the SFT model, then writes the sentence anew; the SFT model
                 is trained further on FEW of these sentences, and for comparison on its own answers as they were

How the judge is asked is chosen on comparisons of the seed TUNING, by agreement with the gold (`forms`): the choice that its
author makes with a few labels of his own. No seed of the report has chosen anything. Whether the principles matter then:
the first FEW comparisons with the two examples and no principles, BARE.

Sources: Bai et al. 2022, Constitutional AI (arXiv:2212.08073); Lee et al. 2023, RLAIF (arXiv:2309.00267), who take the mean
over both orders; Yang et al. 2023, RLCD (arXiv:2307.12950), whose two requests are the contrast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ..autograd.tensor import no_grad
from ..evaluation.answers import answer_turns
from ..evaluation.config import GenerationConfig
from ..experiments.rows import Row
from ..experiments.shipped import base, rounded
from ..text.datasets import Conversation, Message
from ..text.examples import Example, example_of
from ..text.templates import Turn, asked_turn, chat
from ..train.evaluation import example_losses
from . import chain
from .inputs import prefix_cached, smollm2
from .protocol import SEEDS, TUNING, version

PRINCIPLES = "A good sentence is kind and peaceful, is complete, says enough, and says nothing twice."
BROKEN = "A bad sentence is cruel and violent, is broken off, says little, and says the same thing twice."
LABELS, FEW, ASKED = chain.COMPARISONS[-1], 200, 100  # comparisons of a seed; see above; those on which the form is chosen
EXAMPLES = (  # (A, B, which is better)
    ("And the king sent his men to give food and water to the poor of the town.", "And the king sent his men to the king of the king and the king.", "A"),
    ("And she said to her servant, I will put you to death and your house will be", "And she said to her servant, May peace be with you and with your children.", "B"),
)  # fmt: skip
FORMS = ("choice", "few-shot", "opinion", "contrast")
FORM = "few-shot"  # the best of `forms`; the rule holds it against the row
BARE = "examples alone"  # FORM without the principles: a control, which labels nothing
SIZE = "full"  # what of a reward model is trained
ARMS = ("rater", "judge", "flipped", "coin")  # who puts the comparisons in order
WORDS = 40  # tokens of a criticism, at most


@dataclass(frozen=True)
class Constitution:
    """A row: of TUNING the agreement of all forms, of another seed all that is made of its labels, or the agreement of BARE."""

    seed: int
    form: str = FORM
    labels: int = LABELS
    base: str = field(default_factory=version)


def runs() -> list[Constitution]:
    return [Constitution(TUNING, "", ASKED), *map(Constitution, SEEDS), *(Constitution(seed, BARE, FEW) for seed in SEEDS)]


# ------------------------------------------------------------------------------------------------------------ the judge


def asked(*texts: str) -> Turn:
    """What the judge is shown: a question, or questions and answers in turn that end with a question."""
    _, tokenizer = smollm2()
    said = (Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return asked_turn(Conversation(tuple(said)), chat(tokenizer))


def ids_of(question: str) -> list[int]:
    """A question in the judge's chat format."""
    return smollm2()[1].encode_pieces(asked(question).prompt)


def odds(rows: Sequence[list[int]], words: tuple[str, str], batch_size: int = 32) -> np.ndarray:
    """log p(words[0]) - log p(words[1]) of the token that follows each row of ids, [n]. The rows begin alike."""
    model, tokenizer = smollm2()
    first, second = (model.lm_head.weight.data[tokenizer.encode(word)[0]] for word in words)
    found, order = np.zeros(len(rows)), sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        of = order[start : start + batch_size]
        with no_grad():
            found[of] = model.backbone(**prefix_cached([rows[i] for i in of])).data[:, -1] @ (first - second)
    return found


def choice(one: Sequence[str], other: Sequence[str], few: bool = False, principles: str = f"{PRINCIPLES} ") -> np.ndarray:
    """How much more the judge is for the one than for the other, [2, n]: with the one shown as A, and as B."""
    encode, question = smollm2()[1].encode, f"{principles}Which of the two sentences is better?\n\nA: {{}}\nB: {{}}\n\n"
    shown = "".join(f"{question.format(a, b)}Answer: {right}\n\n" for a, b, right in EXAMPLES)

    def odds_of(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        asking = [question.format(*pair) for pair in zip(a, b)]
        if few:
            return odds([encode(f"{shown}{text}Answer:") for text in asking], (" A", " B"))
        return odds([ids_of(f"{text}Answer with one letter, A or B.") for text in asking], ("A", "B"))

    return np.stack([odds_of(one, other), -odds_of(other, one)])


def opinion(sentences: Sequence[str]) -> np.ndarray:
    """How sure the judge is that a sentence follows the principles, [n]."""
    question = f"{PRINCIPLES} Is this a good sentence?\n\n{{}}\n\nAnswer with one word, Yes or No."
    return odds([ids_of(question.format(text)) for text in sentences], ("Yes", "No"))


def contrast(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """log p(answer | asked to follow the principles) - log p(answer | asked to break them), nats, [n]."""
    model, tokenizer = smollm2()

    def nll(principles: str, kind: str) -> np.ndarray:
        shown = [asked(f'{principles} Write a {kind} sentence that begins with "{p}".').prompt for p in prompts]
        ids = [tokenizer.encode_pieces((*pieces, p)) for pieces, p in zip(shown, prompts)]
        return example_losses(model, [*map(example_of, ids, map(tokenizer.encode, answers))], 16, 0)[0]

    return nll(BROKEN, "bad") - nll(PRINCIPLES, "good")


def preferences(form: str, prompts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """How much more the judge is for the first answer of each pair than for the second, [views, n]; with a choice in two views."""
    texts = [[p + pair[k] for p, pair in zip(prompts, pairs)] for k in (0, 1)]
    if form == BARE:
        return choice(*texts, few=True, principles="")
    if form in ("choice", "few-shot"):
        return choice(*texts, few=form == "few-shot")
    each = [opinion(texts[k]) if form == "opinion" else contrast(prompts, [pair[k] for pair in pairs]) for k in (0, 1)]
    return (each[0] - each[1])[None]


# ----------------------------------------------------------------------------------------------------------- comparisons


def texts(seed: int, n: int) -> tuple[list[str], list[tuple[str, str]], np.ndarray]:
    """(prompts, pairs of answers, the gold [n, 2]) of the first n comparisons of a seed."""
    prompts, answers, _ = chain.comparisons(seed)
    decode = partial(base()[1].decode, skip_special_tokens=True)
    return [*map(decode, prompts[:n])], [(decode(a), decode(b)) for a, b in answers[:n]], chain.scored(prompts[:n], answers[:n])


def agreement(preferred: np.ndarray, gold: np.ndarray) -> list[int]:
    """Whether the first is preferred where it has more gold, of the pairs whose gold differs."""
    some = gold[:, 0] != gold[:, 1]
    return ((preferred > 0) == (gold[:, 0] > gold[:, 1]))[some].astype(int).tolist()


def measured(form: str, prompts: Sequence[str], pairs: Sequence[tuple[str, str]], gold: np.ndarray) -> tuple[np.ndarray, Row]:
    """(preferences [n], what is known of them):

    agreement    [pairs whose gold differs] with the gold; of a choice also in each order alone, "one order"
    first        the share of pairs of which a choice takes the one that is shown first, whatever it is
    longer       the share that takes the longer one; of the gold, the same
    """
    views = preferences(form, prompts, pairs)
    both = views.mean(axis=0)
    longer = np.array([len(a) - len(b) for a, b in pairs])
    uneven = (longer != 0) & (gold[:, 0] != gold[:, 1])
    row: Row = {
        "agreement": agreement(both, gold),
        "longer": ((both > 0) == (longer > 0))[uneven].astype(int).tolist(),
        "gold_longer": ((gold[:, 0] > gold[:, 1]) == (longer > 0))[uneven].astype(int).tolist(),
    }
    if len(views) == 2:
        row["one order"] = agreement(views[0], gold) + agreement(views[1], gold)
        row["first"] = [*(views[0] > 0).astype(int).tolist(), *(views[1] < 0).astype(int).tolist()]
    return both, row


def ordered(arm: str, seed: int, preferred: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The order of each pair by someone, best first, [n, 2]."""
    n = len(preferred)
    if arm == "rater":
        return chain.comparisons(seed)[2][:n]
    first = {
        "judge": preferred > 0,
        "flipped": (gold[:, 0] > gold[:, 1]) ^ (np.random.default_rng([seed, 5]).random(n) > np.mean(agreement(preferred, gold))),
        "coin": np.random.default_rng([seed, 3]).random(n) < 0.5,
    }[arm]
    return np.stack([~first, first], axis=1).astype(int)


# -------------------------------------------------------------------------------------------------------------- revision


def revised(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The answers as the judge writes them anew, after it has said what is wrong with them: up to the sentence's end."""
    model, tokenizer = smollm2()
    first = [f"{PRINCIPLES} What is wrong with this sentence?\n\n{p}{a}" for p, a in zip(prompts, answers)]
    said = answer_turns(model, tokenizer, [*map(asked, first)], GenerationConfig(max_new_tokens=WORDS, batch_size=32))
    again = [f'Write a better sentence that begins with "{p}".' for p in prompts]
    turns = [*map(asked, first, said, again)]
    begun = [turn._replace(prompt=(*turn.prompt, p)) for turn, p in zip(turns, prompts)]
    written = answer_turns(model, tokenizer, begun, GenerationConfig(max_new_tokens=chain.LENGTH, batch_size=32))
    return [re.match(r"[^.!?\n]*[.!?]?", text)[0] for text in written]


def examples(prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
    """To be learned: each answer, and its end."""
    encode, end = base()[1].encode, base()[1].eos_token_id
    return [example_of(encode(p), [*encode(a), end]) for p, a in zip(prompts, answers)]


# --------------------------------------------------------------------------------------------------------------- the row


@np.errstate(all="ignore")  # of what breaks
def run(settings: Constitution) -> Row:
    """The row of TUNING: {"forms": {form: what `measured` gives}}. Of another seed what `measured` gives of BARE; or of FORM, and

    best, ppo     {arm: [HELD_OUT] the gold of the best of 16 answers by its reward model, and of its policy}
    right         {arm: the share of pairs of held-out answers that its reward model orders as the gold does}
    sft           [HELD_OUT] the gold of the SFT model; `own` and `revised`: trained further on its answers, and on revised ones
    changed       the share of the answers of which a revision changes anything
    read          some revisions, (prompt, answer, revision)
    """
    s = settings
    prompts, pairs, gold = texts(s.seed, s.labels)
    if s.seed == TUNING:
        return rounded({"forms": {form: measured(form, prompts, pairs, gold)[1] for form in FORMS}})
    preferred, row = measured(s.form, prompts, pairs, gold)
    if s.form == BARE:
        return rounded(row)
    row |= {"best": {}, "ppo": {}, "right": {}}
    for arm in ARMS:
        model = chain.fit_judge(s.seed, SIZE, ordered(arm, s.seed, preferred, gold))
        of_many = chain.best_by(model, s.seed)
        row["best"][arm], row["right"][arm] = of_many["gold"], of_many["accuracy"][0]
        policy, _ = chain.optimized(chain.Chain(s.seed, "ppo"), model, lambda policy: {})
        row["ppo"][arm] = chain.report(policy, s.seed, model)["gold"]
    prompts, own = prompts[:FEW], [pair[0] for pair in pairs[:FEW]]
    again = revised(prompts, own)
    row |= {"sft": chain.report(chain.sft(s.seed), s.seed, model)["gold"], "changed": float(np.mean([a != b for a, b in zip(own, again)]))}
    for name, answers in (("own", own), ("revised", again)):
        policy = chain.fitted(chain.sft(s.seed).copy(), examples(prompts, answers), chain.RATES["sft"], 1, s.seed)
        row[name] = chain.report(policy, s.seed, model)["gold"]
    return rounded(row | {"read": [*zip(prompts, own, again)][:8]})
