"""Reward models that learn, are calibrated, saved and loaded; raters, gold and human."""

from __future__ import annotations

import gzip
import io
import lzma
import sys
import tarfile

import numpy as np
import pytest
from models import traced

import minipeft as mp
from minipeft import rlhf
from minipeft.files import FileError
from minipeft.rlhf.ratings import KINDS
from minipeft.text.splits import side

EOS = 1


@pytest.fixture(scope="module")
def base():
    config = mp.TransformerConfig.llama(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32, initializer_range=0.2,
        eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return mp.Transformer(config, seed=1)


def text(*ids):
    return np.array([*ids, EOS])


# --------------------------------------------------------------------------------------------------------- the model


def test_a_reward_is_read_at_the_real_eos_although_eos_pads(base):
    model = rlhf.RewardModel(base, seed=2)
    short, long = text(5, 6), text(5, 6, 7, 8, 9)
    together = model.score_texts([short, long])
    np.testing.assert_allclose(together, [model.score_texts([t])[0] for t in (short, long)], atol=1e-6)
    np.testing.assert_allclose(together, model.score_texts([short, long], batch_size=1), atol=1e-6)
    ids = np.array([[5, 6, EOS, EOS, EOS, EOS], [5, 6, 7, 8, 9, EOS]])
    mask = np.array([[1, 1, 1, 0, 0, 0], [1] * 6])
    np.testing.assert_allclose(model.rewards(ids, mask).numpy(), together, atol=1e-6)


def test_head_is_drawn_as_the_references_draw_it(base):
    wide = mp.Transformer(
        base.config.replace(hidden_size=1024, head_dim=0, num_attention_heads=4, num_key_value_heads=0)
    )
    weight = rlhf.RewardModel(wide, seed=3).score.weight.data
    assert weight.std() == pytest.approx(1 / np.sqrt(1025), rel=0.1) and weight.shape == (1, 1024)


def test_loss_of_a_batch_of_rankings_is_the_mean_over_all_their_pairs(base):
    model = rlhf.RewardModel(base, seed=2)
    rankings = [
        rlhf.Ranking((text(5, 6), text(5, 7)), margin=0.5),
        rlhf.Ranking((text(8, 9, 3), text(8, 2), text(8, 4, 4, 4))),
    ]
    batch = rlhf.collate_rankings(rankings)
    assert batch.arguments["input_ids"].shape == (5, 5) and batch.weight == 2, "every text stands there once"
    a, b = model.score_texts(rankings[0].texts), model.score_texts(rankings[1].texts)
    first = np.log1p(np.exp(-(a[0] - a[1] - 0.5)))
    second = np.mean([np.log1p(np.exp(-(b[i] - b[j]))) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert model.loss(**batch.arguments).item() == pytest.approx((first + second) / 2, rel=1e-5)
    centered = [(a.sum() ** 2), np.mean([(b[i] + b[j]) ** 2 for i, j in ((0, 1), (0, 2), (1, 2))])]
    got = model.loss(**batch.arguments, center=0.01).item()
    assert got == pytest.approx((first + second) / 2 + 0.01 * np.mean(centered), rel=1e-5)
    with pytest.raises(ValueError, match="ranking 0 has 1 answer"):
        rlhf.collate_rankings([rlhf.Ranking((text(5),))])


def good_and_bad(n, seed):
    """Answers with more 7s are better."""
    rng, rankings = np.random.default_rng(seed), []
    for _ in range(n):
        answers = [rng.choice([7, 8], size=6, p=(p, 1 - p)) for p in (0.9, 0.1)]
        rankings.append(rlhf.Ranking(tuple(text(3, 4, *answer) for answer in answers)))
    return rankings


def test_it_learns_what_is_preferred_and_leaves_the_base_alone(base):
    before = {n: p.data.copy() for n, p in base.named_parameters()}
    model = rlhf.RewardModel(base, seed=2)
    args = mp.TrainingArguments(learning_rate=3e-3, num_train_epochs=2, per_device_train_batch_size=16, progress=False)
    mp.Trainer(model, good_and_bad(160, 0), args=args, collate=rlhf.collate_rankings).train()
    held_out = good_and_bad(60, 1)
    chosen, rejected = (model.score_texts([r.texts[i] for r in held_out]) for i in (0, 1))
    assert rlhf.reward_accuracy(chosen, rejected) > 0.9
    assert all(np.array_equal(before[n], p.data) for n, p in base.named_parameters())


def test_calibration_gives_mean_0_and_deviation_1_and_survives_saving(base, tmp_path):
    model = rlhf.RewardModel(base, seed=2)
    texts = [r.texts[0] for r in good_and_bad(50, 2)]
    raw = model.score_texts(texts)
    model.calibrate(texts)
    scores = model.score_texts(texts)
    assert scores.mean() == pytest.approx(0, abs=1e-6) and scores.std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(scores, (raw - raw.mean()) / raw.std(), atol=1e-5)
    assert (model.mean, model.std) == (pytest.approx(raw.mean()), pytest.approx(raw.std()))

    model.save_pretrained(tmp_path / "rm")
    again, tokenizer = rlhf.RewardModel.from_pretrained(tmp_path / "rm")
    assert tokenizer is None and isinstance(again, rlhf.RewardModel)
    assert again.score_texts(texts).tobytes() == scores.tobytes()
    plain, _ = mp.from_pretrained(tmp_path / "rm")
    ids = texts[0][None]
    assert plain(ids).item() == pytest.approx(raw[0]), "the directory is a sequence classifier's, uncalibrated"

    for content, message in (('{"mean": 0, "std": 0}', r"std 0\.0 are not a calibration"), ('{"mean": 0, "std": "inf"}', "std inf are not"), ('{"mean": 0}', "numbers 'mean' and 'std'")):
        (tmp_path / "rm" / "reward_calibration.json").write_text(content)
        with pytest.raises(FileError, match=message):
            rlhf.RewardModel.from_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"standard deviation .*: nothing to scale by"):
        model.calibrate([texts[0], texts[0]])
    with pytest.raises(ValueError, match="there are no reference texts"):
        model.calibrate([])
    assert model.score_texts(texts).tobytes() == scores.tobytes(), "it is calibrated as before"
    mean, std = model.mean, model.std
    model.calibrate(texts)
    assert (model.mean, model.std) == (mean, std), "whatever it was before"
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            model.score_texts(texts, size)
    mp.save_pretrained(base, tmp_path / "lm")
    with pytest.raises(ValueError, match="holds no reward model"):
        rlhf.RewardModel.from_pretrained(tmp_path / "lm")


def test_without_a_seed_a_head_is_that_of_seed_0(base):
    assert np.array_equal(rlhf.RewardModel(base).score.weight.data, rlhf.RewardModel(base, seed=0).score.weight.data)


def test_the_head_is_the_seeds_normal_numbers_over_the_root_of_one_more_than_the_width(base):
    drawn = np.random.default_rng(3).standard_normal((1, 16), np.float32)
    np.testing.assert_allclose(rlhf.RewardModel(base, seed=3).score.weight.data, drawn / np.sqrt(17), rtol=1e-6)


def test_a_reward_model_without_a_calibration_gives_raw_scores_and_infinite_ones_calibrate_nothing(base, tmp_path):
    model = rlhf.RewardModel(base, seed=2)
    model.save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "reward_calibration.json").unlink()
    loaded, _ = rlhf.RewardModel.from_pretrained(tmp_path / "rm")
    assert (loaded.mean, loaded.std) == (0, 1)
    texts = [text(5, 6), text(7, 8, 9)]
    model.score_texts = lambda texts: np.array([1e308, -1e308])
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="nothing to scale by"):
        model.calibrate(texts)


def test_without_options_answers_are_of_24_tokens_and_of_seed_0(base):
    prompts = [[5], [6, 7]]
    assert rlhf.rollout(base, prompts, 5).responses() == rlhf.rollout(base, prompts, 5, 1.0, (), 0).responses()
    best = rlhf.best_of_n(base, lambda roll: roll.mask.sum(axis=1), prompts, 2)
    assert [len(r) for r in best.responses] == [24, 24]
    assert best.responses == rlhf.best_of_n(base, lambda roll: roll.mask.sum(axis=1), prompts, 2, 24, 1.0, (), 0, 64).responses
    assert rlhf.best_of_n(base, lambda roll: roll.mask.sum(axis=1), prompts, 1, 5).scores.tolist() == [[5], [5]]
    answers = rlhf.sample_answers(base, prompts)
    assert [len(own) for own in answers] == [2, 2] and answers == rlhf.sample_answers(base, prompts, 2, 24, 1.0, (), 0, 64)


def test_scores_that_differ_by_rounding_alone_or_not_at_all_calibrate_nothing_but_small_ones_do(base):
    model = rlhf.RewardModel(base, seed=2)
    for scores in ([1000, 1000.001], [0.0, 0.0]):
        model.score_texts = lambda texts, scores=scores: np.array(scores)
        with pytest.raises(ValueError, match=r"the 2 reference texts .* nothing to scale by"):
            model.calibrate([text(5), text(6)])
    model.score_texts = lambda texts: np.array([1e-4, 3e-4])
    model.calibrate([text(5), text(6)])
    assert (model.mean, model.std) == (pytest.approx(2e-4), pytest.approx(1e-4))


def test_a_calibration_curve_has_no_empty_bins():
    assert rlhf.calibration_curve(np.array([4.0]), np.array([0.0]))[2].tolist() == [1, 1], "one pair, from both sides"
    chosen = np.linspace(-3, 4, 50)
    moved, curve = rlhf.calibration_curve(chosen + 2, np.full(50, 2.0)), rlhf.calibration_curve(chosen, np.zeros(50), 10)
    for default, ten in zip(moved, curve, strict=True):  # only the difference counts
        np.testing.assert_allclose(default, ten)
    predicted, observed, count = rlhf.calibration_curve(np.array([4.0, 4.0]), np.array([0.0, 0.0]), bins=10)
    assert count.tolist() == [2, 2] and observed.tolist() == [0, 1] and predicted == pytest.approx([0.018, 0.982], abs=1e-3)


def test_accuracy_and_calibration_curve():
    assert rlhf.reward_accuracy(np.array([1.0, 0, 2]), np.array([0.0, 1, 2])) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 2, 40000)  # a model that is right about its own certainty
    won = rng.random(40000) < 1 / (1 + np.exp(-difference))
    chosen = np.where(won, difference, -difference)
    predicted, observed, count = rlhf.calibration_curve(chosen, np.zeros_like(chosen), bins=10)
    np.testing.assert_allclose(predicted, observed, atol=0.03)
    assert count.sum() == 80000 and (np.diff(predicted) > 0).all()
    np.testing.assert_allclose(predicted + predicted[::-1], 1, atol=1e-9)
    _, overconfident, _ = rlhf.calibration_curve(5 * chosen, np.zeros_like(chosen), bins=10)
    assert overconfident[-1] < 0.9, "said 0.95 and more, and was right less often"


# -------------------------------------------------------------------------------------------------------------- raters


@pytest.mark.parametrize("scores", [[0.3, 0.1], [0.1, 0.3, -0.1, 0.5]], ids=str)
@pytest.mark.parametrize("flip", [0.0, 0.25])
def test_a_rater_orders_any_two_answers_with_bradley_terrys_probability(scores, flip):
    order = rlhf.rank(np.tile(scores, (40000, 1)), np.random.default_rng(0), temperature=0.2, flip=flip)
    place, p = order.argsort(axis=1), 1 / (1 + np.exp((min(scores[:2]) - max(scores[:2])) / 0.2))
    better, worse = place[:, np.argmax(scores[:2])], place[:, np.argmin(scores[:2])]
    assert (better < worse).mean() == pytest.approx(p * (1 - flip) + (1 - p) * flip, abs=0.01)


def test_a_rater_puts_first_by_the_softmax_of_the_scores():
    """Plackett and Luce's distribution: of three answers the order of the first is not that of the last turned round."""
    scores = np.array([0.0, 0.1, 0.2])
    order = rlhf.rank(np.tile(scores, (40000, 1)), np.random.default_rng(0))
    p = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum()
    np.testing.assert_allclose(np.bincount(order[:, 0]) / 40000, p, atol=0.01)
    for wrong in (dict(temperature=-0.5), dict(flip=-0.5)):
        with pytest.raises(ValueError, match="temperature must not be negative and flip must lie in"):
            rlhf.rank(scores[None], np.random.default_rng(0), **wrong)


def test_without_noise_the_better_one_wins_and_equals_are_a_coin():
    scores = np.array([[0.1, 0.3, 0.2]] * 4 + [[0.0, 0.0, 1.0]] * 1000)
    order = rlhf.rank(scores, np.random.default_rng(0), temperature=0)
    assert order[:4].tolist() == [[1, 2, 0]] * 4 and (order[4:, 0] == 2).all()
    assert 0.4 < (order[4:, 1] == 0).mean() < 0.6
    assert rlhf.rank(scores, np.random.default_rng(0), flip=1.0, temperature=0)[0].tolist() == [0, 2, 1]
    first, again = (rlhf.rank(scores, np.random.default_rng(5), 0.1, 0.1) for _ in range(2))
    assert np.array_equal(first, again)
    with pytest.raises(ValueError, match="flip must lie in"):
        rlhf.rank(scores, np.random.default_rng(0), flip=1.5)


def test_gold_is_vaders_compound_score():
    pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")
    good, bad, not_good = rlhf.vader(["What a happy, delightful day!", "miserable grief", "She was not happy."])
    assert good > 0.5 and bad < -0.5 and not_good < 0


def test_a_missing_vader_names_the_extra(monkeypatch):
    from minipeft.rlhf import gold

    gold._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'minipeft\[rlhf\]'"):
        rlhf.vader(["text"])


def test_openings_are_words_of_sentences():
    openings = rlhf.sentence_openings("validation", words=4)
    assert len(openings) > 500 and len(set(openings)) == len(openings)
    assert all(len(o.split()) == 4 and o[0].isupper() for o in openings)
    assert not set(openings) & set(rlhf.sentence_openings("test", words=6))
    assert rlhf.sentence_openings("test") == rlhf.sentence_openings("test", words=5)
    assert not any(o.endswith((".", "!", "?")) for o in rlhf.sentence_openings("validation", words=8)), "never a whole one"


# ------------------------------------------------------------------------------------------------------ human raters


def archive(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def tables(texts=30, line="", ratings=None):
    """Each file pair of the archive, with made-up texts: the higher their number, the better they are rated."""
    files, rows = {}, [(f"{i // 3}_{i % 3}\t{i % 5 - 2}\t", i, i % 5 - 2) for i in range(texts)]
    for prefix in KINDS:
        truth = "".join(f"{start}The text {prefix} number {i}.\r\n" for start, i, _ in rows)
        rated = "".join(f"{start}0.5\t{ratings or [low, low, low + 1]}\r\n" for start, _, low in rows)
        files[f"hutto_ICWSM_2014/{prefix}_GroundTruth.txt"] = ("\ufeff" + truth + line).encode()
        files[f"hutto_ICWSM_2014/{prefix}_anonDataRatings.txt"] = rated.encode()
    return files


def source_archive(tmp_path, files):
    path = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    inner = archive(files)
    path.write_bytes(
        archive({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner, "../../evil.txt": b"x"})
    )
    return path


def test_human_ratings_are_read_from_the_nested_archive_in_memory(tmp_path):
    path = source_archive(tmp_path, tables())
    found = rlhf.human_ratings(path)
    assert len(found) == 4 * 30 and {r.kind for r in found} == set(KINDS.values())
    assert found[4].text == "The text movieReviewSnippets number 4." and found[4].ratings == (2, 2, 3)
    assert found[4].document == "movieReviewSnippets 1", "sentences of one review belong together"
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and not (tmp_path.parent.parent / "evil.txt").exists()
    (tmp_path / "inner.tar.gz").write_bytes(archive(tables()))
    assert rlhf.human_ratings(tmp_path / "inner.tar.gz") == found
    with tarfile.open(path, "w:gz") as tar:  # with a folder, in which a file would be, and its tables
        folder = tarfile.TarInfo("notes.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in tables().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert rlhf.human_ratings(path) == found


def test_human_preferences_follow_the_raters_and_keep_documents_apart(tmp_path):
    path = source_archive(tmp_path, tables(texts=300))
    rated = {f" {r.text}": r for r in rlhf.human_ratings(path)}
    train, test = (rlhf.human_preferences(path, split, pairs=400, seed=1) for split in ("train", "test"))
    assert len(train) == 400 and {p.prompt for p in train} == set(KINDS.values())
    for pair in train:
        chosen, rejected = rated[pair.chosen], rated[pair.rejected]
        assert chosen.kind == rejected.kind == pair.prompt and max(chosen.ratings) > min(rejected.ratings)
    documents = [{rated[text].document for p in side for text in (p.chosen, p.rejected)} for side in (train, test)]
    assert not documents[0] & documents[1]
    assert rlhf.human_preferences(path, "train", pairs=400, seed=1) == train
    assert rlhf.human_preferences(path, "train", pairs=400, seed=2) != train
    assert rlhf.human_preferences(path, pairs=40) == rlhf.human_preferences(path, "train", pairs=40, seed=0)


def test_a_text_may_have_tabs(tmp_path):
    files = {name: content.replace(b"number 4.", b"number\t4\t.") for name, content in tables().items()}
    assert rlhf.human_ratings(source_archive(tmp_path, files))[4].text == "The text movieReviewSnippets number\t4\t."


def test_two_ratings_are_enough_for_a_preference_and_one_is_not(tmp_path):
    files = tables(texts=300, ratings="[1, 2]")
    pairs = rlhf.human_preferences(source_archive(tmp_path, files), pairs=20)
    assert len(pairs) == 20 and all(pair.chosen != pair.rejected for pair in pairs)
    with pytest.raises(ValueError, match="has no two texts whose ratings differ"):
        rlhf.human_preferences(source_archive(tmp_path, tables(texts=300, ratings="[1]")), pairs=20)


def test_two_texts_of_one_document_are_enough(tmp_path):
    path, split = source_archive(tmp_path, tables(texts=2)), side("movieReviewSnippets 0")
    assert {p.prompt for p in rlhf.human_preferences(path, split, pairs=40)} >= {KINDS["movieReviewSnippets"]}


def test_a_split_of_one_text_leaves_no_pair_to_draw(tmp_path):
    with pytest.raises(ValueError, match="has no two texts whose ratings differ"):
        rlhf.human_preferences(source_archive(tmp_path, tables(texts=1, ratings="[1, 2]")), pairs=20)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a/readme.txt": b"hello"}, "holds no movieReviewSnippets_GroundTruth.txt; give the source archive"),
        (tables(line="only two\tcolumns\r\n"), "line 31: does not have 3 columns"),
        (tables(line="99_1\t0\t  \r\n"), "line 31: does not have 3 columns"),
        (tables(ratings="[1, __import__]"), r"text 1 \(0_0\): the ratings are not a list of whole numbers"),
        (tables(line="99_1\t0\tunrated text\r\n"), r"\(99_1\) has no ratings"),
    ],
)
def test_an_archive_that_is_something_else_is_refused_in_a_sentence(files, message, tmp_path):
    with pytest.raises(FileError, match=message):
        rlhf.human_ratings(source_archive(tmp_path, files))


def test_no_archive_at_all(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"not an archive")
    for name, message in (("x.tar.gz", "not a .tar.gz archive"), ("nothing.tar.gz", "cannot be read")):
        with pytest.raises(FileError, match=message):
            rlhf.human_ratings(tmp_path / name)


def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(tmp_path):
    big = {f"a/{i}.txt": b"0" * (30 << 20) for i in range(3)}
    path = tmp_path / "x.tar.gz"
    path.write_bytes(archive(big))
    assert path.stat().st_size < 1 << 20
    with traced() as memory, pytest.raises(FileError, match="has more than 67108864 bytes unpacked"):
        rlhf.human_ratings(path)
    with traced() as memory, pytest.raises(FileError, match="has more than 67108864 bytes unpacked"):
        rlhf.human_ratings(source_archive(tmp_path, big))
        assert memory()[1] < 300 << 20


def test_what_was_unpacked_is_not_unpacked_again(tmp_path):
    """tarfile looks for three more kinds of compression by itself, whose headers may ask for gigabytes."""
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(lzma.compress(gzip.decompress(archive({"a/x.txt": b"text"})))))
    with pytest.raises(FileError, match=r"not a .tar.gz archive"):
        rlhf.human_ratings(path)


def test_a_damaged_archive_is_an_error_of_the_file(tmp_path):
    path = source_archive(tmp_path, tables())
    data = path.read_bytes()
    for at in range(12, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        with pytest.raises(FileError) as error:
            rlhf.human_ratings(path)
        assert type(error.value) is FileError
    for ratings in ("[01, 2]", "[1, 99999999999]"):
        with pytest.raises(FileError, match="the ratings are not a list of whole numbers"):
            rlhf.human_ratings(source_archive(tmp_path, tables(ratings=ratings)))
