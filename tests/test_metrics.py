"""chrF against its definition by hand and against published behavior; sacreBLEU computes it."""

import sys

import pytest

from minipeft.train.metrics import chrf

pytest.importorskip("sacrebleu", reason="needs the extra 'hub': pip install 'minipeft[hub]'")


def test_by_hand():
    """'abc' for 'abd': of the letters 2 of 3 match, of the pairs 1 of 2, of the triples none of 1."""
    p = r = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf(["abc"], ["abd"]) == pytest.approx(100 * 5 * p * r / (4 * p + r))
    assert chrf(["aaaa"], ["a"], char_order=1) == pytest.approx(100 * 5 * 0.25 / (4 * 0.25 + 1))
    precision, recall = 2 / 4, 2 / 3  # of two pairs together, and so no mean of 100 and of 0
    assert chrf(("ab", "cd"), ("ab", "e"), char_order=1, beta=1) == pytest.approx(200 / (1 / precision + 1 / recall))


def test_limits(monkeypatch):
    text = "The same words."
    assert chrf([text], [text]) == pytest.approx(100)
    assert chrf(["The  same\nwords."], [text]) == pytest.approx(100)  # white space does not count
    assert chrf(["xyz"], ["abc"]) == 0 == chrf([""], [""])
    assert chrf(["the same words."], [text]) < 100  # capitals do
    assert chrf([text], [text + " And more."]) < chrf([text + " And more."], [text])  # recall weighs more
    for hypotheses, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match="chrF compares texts in pairs"):
            chrf(hypotheses, references)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(ImportError, match=r"computing chrF takes the package sacrebleu: pip install 'minipeft\[hub\]'"):
        chrf([text], [text])
