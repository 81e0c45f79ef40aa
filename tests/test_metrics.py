"""chrF against its definition by hand, against published behaviour, and against values of sacreBLEU's."""

import pytest

from minipeft.train.metrics import chrf

PAIRS = [
    ("There were six steps going up to it.", "There were six steps going up to it, and the top was round."),
    ("And God said light", "God said, Let there be light: and there was light."),
    ("", "Something was expected here."),
    ("abc", "ab"),
    ("naïve café 🐱", "naive café 🐱🐱"),
]
OF_SACREBLEU = [62.6702, 21.9680, 0.0, 87.5, 56.9168]  # sacrebleu 2.6.0, corpus_chrf of each pair alone


@pytest.mark.parametrize("pair, expected", list(zip(PAIRS, OF_SACREBLEU)))
def test_values_of_sacrebleu(pair, expected):
    assert chrf([pair[0]], [pair[1]]) == pytest.approx(expected, abs=1e-4)


def test_a_corpus_is_not_the_mean_of_its_sentences():
    whole = chrf(*zip(*PAIRS))
    assert whole == pytest.approx(37.8324, abs=1e-4)
    assert abs(whole - sum(OF_SACREBLEU) / len(OF_SACREBLEU)) > 1


def test_by_hand():
    """'abc' for 'abd': of the letters 2 of 3 match, of the pairs 1 of 2, of the triples none of 1."""
    p = r = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf(["abc"], ["abd"]) == pytest.approx(100 * 5 * p * r / (4 * p + r))
    assert chrf(["aaaa"], ["a"], char_order=1) == pytest.approx(100 * 5 * 0.25 / (4 * 0.25 + 1))


def test_limits():
    text = "The same words."
    assert chrf([text], [text]) == pytest.approx(100)
    assert chrf(["The  same\nwords."], [text]) == pytest.approx(100)  # white space does not count
    assert chrf(["xyz"], ["abc"]) == 0 == chrf([""], [""])
    assert chrf(["the same words."], [text]) < 100  # capitals do
    assert chrf([text], [text + " And more."]) < chrf([text + " And more."], [text])  # recall weighs more
    for hypotheses, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="chrF compares texts in pairs"):
            chrf(hypotheses, references)
