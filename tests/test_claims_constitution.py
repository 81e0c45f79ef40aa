"""Labels of a model that follows principles: the judge's two views, the labels, and the rule on made-up rows, both ways."""

from __future__ import annotations

import numpy as np
import pytest

from minipeft.claims import constitution
from minipeft.claims.chain_rules import even
from minipeft.claims.constitution import ARMS, FORM, FORMS, Constitution
from minipeft.claims.register import HOLDS, IF, NOT, RULES, UNTESTABLE, UNTRIED, rule_of
from minipeft.experiments.rows import described

pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")

ITEMS = 64


def test_a_judge_that_looks_at_the_place_alone_has_no_preference_left(monkeypatch):
    monkeypatch.setattr(constitution, "smollm2", lambda: (None, type("Tokenizer", (), {"encode": staticmethod(str)})))
    monkeypatch.setattr(constitution, "odds", lambda rows, words: np.full(len(rows), 2.0))
    views = constitution.choice(["a", "b"], ["c", "d"], few=True)
    assert views.tolist() == [[2, 2], [-2, -2]] and not views.mean(axis=0).any()


def test_a_judge_that_reads_is_for_the_same_answer_in_both_places(monkeypatch):
    monkeypatch.setattr(constitution, "smollm2", lambda: (None, type("Tokenizer", (), {"encode": staticmethod(str)})))

    def longer(rows, words):
        return np.array([text.rsplit("A: ")[-1].index("\n") - text.rsplit("B: ")[-1].index("\n") for text in rows], float)

    monkeypatch.setattr(constitution, "odds", longer)
    assert constitution.choice(["long, long", "b"], ["c", "d, d"], few=True).tolist() == [[9, -3], [9, -3]]


def test_what_is_measured_of_a_choice(monkeypatch):
    views = np.array([[3.0, 3.0, 3.0], [-1.0, 1.0, -5.0]])  # the first in the place of A in all; turned round, B, A, B
    monkeypatch.setattr(constitution, "preferences", lambda form, prompts, pairs: views)
    pairs, gold = [("long", "s"), ("s", "long"), ("same", "long")], np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    both, row = constitution.measured("choice", ["p"] * 3, pairs, gold)
    assert both.tolist() == [1, 2, -1]
    assert row["agreement"] == [1, 1] and row["one order"] == [1, 1, 0, 1], "pairs of the same gold do not count"
    assert row["first"] == [1, 1, 1, 1, 0, 1] and row["longer"] == [1, 0] == row["gold_longer"]


def test_labels_put_the_preferred_first():
    preferred, gold = np.array([2.0, -1.0]), np.array([[0.5, 0.2], [0.5, 0.2]])
    assert constitution.ordered("judge", 1, preferred, gold).tolist() == [[0, 1], [1, 0]]
    many, of_gold = preferred.repeat(200), gold.repeat(200, axis=0)
    coin = constitution.ordered("coin", 1, np.zeros(400), of_gold)
    assert 150 < coin[:, 0].sum() < 250 and (coin.sum(axis=1) == 1).all()
    assert (coin == constitution.ordered("coin", 1, many, of_gold)).all(), "a coin does not read"
    flipped = constitution.ordered("flipped", 1, np.append(many[:200], many[:200] * ([1] * 150 + [-1] * 50)), of_gold)
    assert flipped[:, 0].mean() == pytest.approx(50 / 400, abs=0.04), "as often against the gold as the judge"
    assert abs(flipped[:200, 0].mean() - flipped[200:, 0].mean()) < 0.08, "but anywhere"


def test_a_revision_teaches_its_end():
    one = constitution.examples(["And he said"], [" to them, Peace."])[0]
    tokenizer = constitution.base()[1]
    learned = one.input_ids[one.labels != -100]
    assert tokenizer.decode(learned, skip_special_tokens=True) == " to them, Peace." and learned[-1] == tokenizer.eos_token_id


# --------------------------------------------------------------------------------------------------------- made-up rows

LEVELS = {"sft": 0.3, "own": 0.3, "revised": 0.25}


def rows(best=(0.5, 0.5, 0.5, 0.3), ppo=(0.5, 0.5, 0.5, 0.3), asked=FORM, spread=0.01) -> list[dict]:
    """As if the gold by the rater, the judge, random errors, the coin had these means."""
    found = []
    for run in constitution.runs():
        if not run.form:
            found.append(described(run, constitution.run) | {"forms": {form: {"agreement": [1, 1, 1, form == asked]} for form in FORMS}})
            continue
        if run.form == constitution.BARE:
            found.append(described(run, constitution.run) | {"agreement": [1, 0, 0] if run.seed % 2 else [0, 0, 0]})
            continue
        rng = np.random.default_rng(run.seed)

        def of(level, rng=rng):
            return (level + spread * rng.normal(size=ITEMS)).tolist()

        made = {name: of(level) for name, level in LEVELS.items()} | {"right": dict.fromkeys(ARMS, 0.6), "changed": 1.0}
        made |= {key: [1, 1, 0] for key in ("agreement", "one order", "first", "longer", "gold_longer")}
        made |= {"best": dict(zip(ARMS, map(of, best))), "ppo": dict(zip(ARMS, map(of, ppo)))}
        found.append(described(run, constitution.run) | made)
    return found


@pytest.mark.parametrize("made, verdict", [
    ({}, HOLDS),
    ({"ppo": (0.6, 0.5, 0.5, 0.3)}, IF),  # worse than by the rater's labels
    ({"ppo": (0.3, 0.3, 0.3, 0.3)}, IF),
    ({"ppo": (0.3, 0.3, 0.3, 0.3), "best": (0.3, 0.3, 0.3, 0.3)}, NOT),
    ({"best": (0.5, 0.3, 0.3, 0.3), "ppo": (0.5, 0.3, 0.3, 0.3)}, NOT),
    ({"best": (0.3, 0.3, 0.3, 0.2), "ppo": (0.3, 0.3, 0.3, 0.2)}, NOT),  # above the coin's, which do harm
    ({"spread": 3.0}, UNTESTABLE),
])  # fmt: skip
def test_labels_by_principles_follow_their_rows(made, verdict):
    rule = rule_of("rlhf-9")
    found = rule.judge(rows(**made))
    assert found.verdict == verdict and found.seeds == 5
    assert found.effect.low <= found.effect.value <= found.effect.high
    assert "Trained on the judge's revisions, the SFT model has" in found.because
    assert "no principles, it agrees in 20% [-3%, 43%], with them in 67%: what the principles add is +0.47 [+0.24, +0.69]" in found.because


def test_who_goes_by_length_alone_is_right_in_half():
    gold = [1, 1, 1, 0]
    assert even({"longer": [1, 1, 1, 1], "gold_longer": gold}) == 0.5, "and in three of four, as the pairs are"
    assert even({"longer": gold, "gold_longer": gold}) == 1


def test_the_judge_is_asked_in_the_form_that_agrees_best():
    with pytest.raises(ValueError, match="not in the form that agrees best with the gold"):
        RULES["rlhf-9"].judge(rows(asked="choice"))


def test_without_all_rows_nothing_is_said():
    assert RULES["rlhf-9"].judge(rows()[:-1]).verdict == UNTRIED
    assert len({str(described(run)) for run in constitution.runs()}) == len(constitution.runs()) == 11
    assert Constitution(1).form == FORM
