"""chrF is sacreBLEU's, on real and on odd texts."""

import numpy as np
import pytest

from minipeft.text.corpora import bible
from minipeft.train.metrics import chrf

sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra 'oracles': pip install 'minipeft[oracles]'")


def expected(hypotheses, references, **options):
    return sacrebleu.corpus_chrf(hypotheses, [references], **options).score


def test_verses():
    verses = bible("validation")[:200]
    ours, theirs = [v.king_james for v in verses], [v.basic_english for v in verses]
    assert chrf(ours, theirs) == pytest.approx(expected(ours, theirs), rel=1e-12)
    assert chrf(ours, theirs, char_order=4, beta=1) == pytest.approx(expected(ours, theirs, char_order=4, beta=1), rel=1e-12)
    for one, other in zip(ours[:30], theirs[:30]):
        assert chrf([one], [other]) == pytest.approx(expected([one], [other]), rel=1e-12)


def test_odd_texts():
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("ab c🐱\n"), generator.integers(0, 12))) for _ in range(400)]
    for size in (1, 2, 5):
        for i in range(0, 390, size):
            ours, theirs = texts[i : i + size], texts[i + 5 : i + 5 + size]
            assert chrf(ours, theirs) == pytest.approx(expected(ours, theirs), rel=1e-12, abs=1e-12)
