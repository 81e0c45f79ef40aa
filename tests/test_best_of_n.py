"""Best of n: the estimator, the bound on its KL, and the answers that are chosen."""

from __future__ import annotations

from itertools import combinations
from math import log

import numpy as np
import pytest
from test_rlhf_online import EOS, PROMPTS, base, liked

from minipeft import rlhf


def test_the_expected_best_is_the_mean_over_all_sets_of_n(rng):
    scores = rng.standard_normal((3, 6))
    want = [[np.mean([max(c) for c in combinations(row, n)]) for n in range(1, 7)] for row in scores]
    np.testing.assert_allclose(rlhf.expected_best(scores), want, rtol=1e-12)


def test_it_is_unbiased_and_finite_for_many_answers(rng):
    """The largest of n uniform numbers is n / (n + 1) on average."""
    found = rlhf.expected_best(rng.random((200, 2000)))
    n = np.arange(1, 2001)
    np.testing.assert_allclose(found.mean(axis=0), n / (n + 1), atol=2e-3)
    assert (np.diff(found, axis=1) >= -1e-12).all()


def test_the_kl_of_the_best_of_n_is_at_most_the_bound(rng):
    """Of a policy of 40 answers, whose best-of-n distribution is P(max <= i) - P(max < i)."""
    p = rng.dirichlet(np.ones(40))
    below = np.concatenate([[0], p.cumsum()])
    for n in (1, 2, 4, 16):
        best = below[1:] ** n - below[:-1] ** n
        kl = (best * np.log(np.where(best > 0, best / p, 1))).sum()
        assert kl <= rlhf.best_of_n_kl(n) + 1e-12
    uniform = np.full(100_000, 1e-5).cumsum()  # no two answers alike
    best = np.diff(uniform**4, prepend=0)
    assert (best * np.log(best / 1e-5)).sum() == pytest.approx(log(4) - 3 / 4, abs=1e-4)
    assert rlhf.best_of_n_kl(4) == pytest.approx(log(4) - 3 / 4)


def test_the_best_of_each_prompts_answers():
    options = dict(length=6, stop_token_ids=[EOS], seed=3)
    found = rlhf.best_of_n(base(), liked, PROMPTS, 5, **options, batch_size=7)
    drawn = rlhf.sample_answers(base(), PROMPTS, k=5, **options)
    scores = np.array([[sum(t == 7 for t in a) + 0.01 * len(a) for a in own] for own in drawn])
    np.testing.assert_allclose(found.scores, scores)
    assert found.responses == [own[i] for own, i in zip(drawn, scores.argmax(axis=1))]
    assert found.expected[0] == pytest.approx(scores.mean()) and found.expected[4] == pytest.approx(
        scores.max(1).mean()
    )
    assert found.kl[0] == 0 and len(found.kl) == 5
    with pytest.raises(ValueError, match="n of at least 1, got 0"):
        rlhf.best_of_n(base(), liked, PROMPTS, 0)
    with pytest.raises(ValueError, match=r"one score a response, \(8,\), not \(3,\)"):
        rlhf.best_of_n(base(), lambda roll: np.arange(3.0), PROMPTS, 2)
    with pytest.raises(ValueError, match=r"NaN or infinite for 1 of 8 responses, first of prompts\[2\]"):
        rlhf.best_of_n(base(), lambda roll: np.array([0, 0, 0, 0, 0, np.nan, 0, 0.0]), PROMPTS, 2)
    with pytest.raises(ValueError, match="there are no prompts"):
        rlhf.best_of_n(base(), liked, [], 2)
    with pytest.raises(ValueError, match=r"batch_size, .* must be at least 1, got 0"):
        rlhf.best_of_n(base(), liked, PROMPTS, 2, batch_size=0)


def test_a_bad_score_is_counted_in_its_own_batch_and_its_prompt_is_named():
    last = lambda roll: np.zeros(3) if len(roll.mask) == 3 else np.array([0, np.nan])  # noqa: E731
    ends = lambda roll: np.array([np.nan, 0, np.inf])  # noqa: E731
    for scores, message in ((last, r"for 1 of 2 responses, first of prompts\[3\]"), (ends, r"for 2 of 3 .* prompts\[0\]")):
        with pytest.raises(ValueError, match=message):
            rlhf.best_of_n(base(), scores, PROMPTS, 2, length=2, batch_size=3)
    assert rlhf.best_of_n(base(), liked, PROMPTS[:1], 2, length=2, batch_size=1).scores.shape == (1, 2)


def test_scores_of_one_prompt_need_no_axis_of_prompts():
    assert rlhf.expected_best(np.array([1.0, 3.0, 2.0])) == pytest.approx([2, 8 / 3, 3])


def test_a_reward_model_chooses_too():
    judge = rlhf.RewardModel(base(), seed=2)
    found = rlhf.best_of_n(base(), judge, PROMPTS[:2], 3, length=4)
    for prompt, answer, own in zip(PROMPTS, found.responses, found.scores):
        assert judge.score_texts([np.array([*prompt, *answer])])[0] == pytest.approx(own.max(), abs=1e-5)
