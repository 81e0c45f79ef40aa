"""The training loop: what a step is, accumulation, evaluation, early stopping, divergence, what is shown and kept."""

import io
import json
import math
import re
import sys

import numpy as np
import pytest

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.text.tokenizer import pad_sequences
from minipeft.train import AdamW, Batch, Callback, Log, Trainer, TrainingArguments, TrainingDiverged, collate
from minipeft.train.batches import epoch_order
from minipeft.train.rates import usual_learning_rate
from minipeft.train.schedule import SCHEDULES


def tiny_model(dropout=0.0, seed=0, dialect="llama", width=16):
    options = {"vocab_size": 32, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    make = getattr(mp.TransformerConfig, dialect)
    return mp.Transformer(make(**options, max_position_embeddings=24).replace(dropout=dropout), seed=seed)


def counting(n, rng, prompt=1, shortest=5, longest=14):
    """Sequences that count upwards from a random start; the first `prompt` tokens are not learned."""
    examples = []
    for _ in range(n):
        ids = (rng.integers(32) + np.arange(rng.integers(shortest, longest + 1))) % 32
        labels = ids.copy()
        labels[:prompt] = -100
        examples.append((ids, labels))
    return examples


def weights(model):
    return {name: to_numpy(array).copy() for name, array in model.state_dict().items()}


def assert_same_bytes(one, other):
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def train(model, examples, held_out=None, collate=None, loss=None, optimizer=None, callbacks=(), **arguments):
    """(the trainer, its result)."""
    args = TrainingArguments(**arguments)
    trainer = Trainer(model, examples, held_out, args, collate=collate, loss=loss, optimizer=optimizer)
    return trainer, trainer.train(callbacks=callbacks)


def test_training_learns_to_count_and_evaluates_what_it_was_held_out_from(rng):
    model, examples = tiny_model(), counting(80, rng)
    before = mp.train.evaluate(model, examples[64:])
    options = {"learning_rate": 0.02, "num_train_epochs": 6, "weight_decay": 0.01, "warmup_ratio": 0.1}
    trainer, result = train(model, examples[:64], examples[64:], eval_steps=20, **options)
    assert before == pytest.approx(math.log(32), rel=0.05) and trainer.evaluate() < 0.5
    assert result.steps == 6 * 8 and [step for step, _ in result.losses("eval_loss")] == [20, 40, 48]
    assert result.best_eval_loss == min(loss for _, loss in result.losses("eval_loss"))
    assert all(p.grad is None for p in model.parameters())


def test_the_trainer_is_the_loop_one_would_write(rng):
    """Schedule, clipping, no decay of vectors, the order of the data: against a hand-written loop, byte for byte."""
    examples = counting(10, rng, shortest=9, longest=9)
    model, twin = tiny_model(dialect="gpt2"), tiny_model(dialect="gpt2")
    _, result = train(
        model, examples, learning_rate=0.01, num_train_epochs=2, per_device_train_batch_size=4, weight_decay=0.5,
        max_grad_norm=0.1, lr_scheduler_type="cosine", warmup_steps=2, seed=3,
    )  # fmt: skip
    matrices = [p for p in twin.parameters() if p.ndim > 1]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    optimizer = AdamW([{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}])
    step = 0
    for epoch in range(2):
        order = epoch_order(10, 3, epoch)
        assert sorted(order) == list(range(10))
        for rows in (order[:4], order[4:8], order[8:]):
            ids, labels = (np.stack([examples[i][k] for i in rows]) for k in (0, 1))
            loss = twin.loss(ids, labels)
            loss.backward()
            norm = mp.train.clip_grad_norm(twin.parameters(), 0.1)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * SCHEDULES["cosine"](step, 2, 6)
            optimizer.step()
            optimizer.zero_grad()
            assert result.history[step]["loss"] == loss.item()
            assert result.history[step]["grad_norm"] == pytest.approx(norm, rel=1e-6)
            step += 1
    assert_same_bytes(weights(model), weights(twin))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_only_step_of_a_run_is_no_warm_up(schedule, rng):
    options = {"learning_rate": 0.01, "max_steps": 1, "lr_scheduler_type": schedule}
    trainer, _ = train(tiny_model(), counting(8, rng), warmup_ratio=0.05, **options)
    before, after = weights(tiny_model()), weights(trainer.model)
    assert trainer.warmup_steps == 0 and not any(np.array_equal(before[name], after[name]) for name in before)
    assert Trainer(tiny_model(), counting(8, rng), args=TrainingArguments(max_steps=40, warmup_ratio=0.05)).warmup_steps == 2


def test_loraplus_rates_follow_the_schedule_and_are_those_of_its_groups(rng):
    examples, ends, rates = counting(8, rng), [], []

    class Rates(Callback):
        def after_step(self, model, step, record):
            rates.append([group["lr"] for group in optimizer.param_groups])

    for ratio in (16, None):
        model = mp.get_peft_model(tiny_model(), mp.LoraConfig(r=2))
        optimizer = None if ratio else AdamW(mp.optim.loraplus_groups(model, 0.01, 16, weight_decay=0.1))
        options = {"learning_rate": 0.01, "weight_decay": 0.1, "max_steps": 4, "warmup_steps": 2}
        callbacks = [] if ratio else [Rates()]
        trainer, result = train(model, examples, optimizer=optimizer, loraplus_lr_ratio=ratio, callbacks=callbacks, **options)
        factor = SCHEDULES["linear"](3, 2, 4)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.01, 0.16], "afterwards as before"
        assert result.losses("learning_rate")[-1] == (4, 0.01 * factor)
        ends.append(weights(model))
    assert_same_bytes(*ends)
    assert rates[-1] == [0.01 * factor, 0.16 * factor]
    with pytest.raises(ValueError, match="no lora_B"):
        train(tiny_model(), examples, loraplus_lr_ratio=16)


@pytest.mark.parametrize("dropout, packing", [(0.0, False), (0.2, False), (0.0, True), (0.2, True)])
def test_accumulated_gradients_equal_those_of_the_large_batch(rng, dropout, packing):
    """Examples of different lengths and counts: the mean is over tokens, not over batches; dropout masks agree too.

    Not so in packed rows, which another cut fills otherwise: they get other masks, though the loss is the same without.
    """
    examples, trained = counting(24, rng, prompt=3, shortest=5, longest=20), {}
    for size, accumulation in ((12, 1), (4, 3), (1, 12)):
        trainer, result = train(
            tiny_model(dropout), examples, learning_rate=0.1, optim="sgd", momentum=0.9, max_steps=4, packing=packing,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=None,
        )  # fmt: skip
        trained[size] = np.array(result.losses())[:, 1], weights(trainer.model)
    for size in (4, 1):
        if dropout and packing:
            assert abs(trained[size][0] / trained[12][0] - 1).max() > 1e-4
            continue
        np.testing.assert_allclose(trained[size][0], trained[12][0], rtol=1e-5)
        for name, array in trained[12][1].items():
            np.testing.assert_allclose(trained[size][1][name], array, rtol=1e-4, atol=2e-6, err_msg=name)


def test_dropout_acts_in_training_and_follows_the_seed(rng):
    examples, ends = counting(16, rng), {}
    for dropout, seed in ((0.0, 0), (0.3, 0), (0.3, 0), (0.3, 1)):
        model = tiny_model(dropout)
        train(model, examples, max_steps=2, learning_rate=0.01, seed=seed)
        ends.setdefault((dropout, seed), []).append(model.lm_head.weight.data.tobytes())
    assert ends[0.3, 0][0] == ends[0.3, 0][1]
    assert len({ends[0.0, 0][0], ends[0.3, 0][0], ends[0.3, 1][0]}) == 3


def test_padding_is_masked_and_absent_where_nothing_is_padded(rng):
    examples = counting(3, rng, shortest=4, longest=4) + counting(1, rng, shortest=9, longest=9)
    assert collate(examples[:3]).arguments["attention_mask"] is None
    batch = collate(examples, pad_token_id=7)
    assert batch.arguments["attention_mask"].tolist() == [[1] * 4 + [0] * 5] * 3 + [[1] * 9]
    assert (batch.arguments["input_ids"][0, 4:] == 7).all() and (batch.arguments["labels"][0, 4:] == -100).all()
    assert (batch.weight, batch.tokens) == (3 * 3 + 8, 3 * 4 + 9)
    model = tiny_model()
    losses = [Trainer(model, examples, examples, pad_token_id=pad).evaluate() for pad in (0, 7)]
    singly = Trainer(model, examples, examples, TrainingArguments(per_device_eval_batch_size=1)).evaluate()
    assert losses[0] == losses[1] == pytest.approx(singly, rel=1e-6)


def test_frozen_parameters_keep_their_bytes(rng):
    model = tiny_model().requires_grad_(False)
    model.model.norm.weight.requires_grad = True
    before = weights(model)
    train(model, counting(8, rng), max_steps=2, learning_rate=0.1)
    changed = [name for name, array in weights(model).items() if (array != before[name]).any()]
    assert changed == ["model.norm.weight"]


def test_callbacks_stand_around_the_optimizers_step_the_models_own_first(rng):
    model, seen = tiny_model(), []

    class Watcher(Callback):
        def __init__(self, name, last=None):
            self.name, self.last = name, last

        def see(self, when, step):
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
            seen.append((self.name, when, step, norm, model.lm_head.weight.data.copy()))

        def before_step(self, model, step):
            if self.name == "own":
                model.lm_head.weight.grad += 3
            self.see("before", step)

        def after_step(self, model, step, record):
            self.see("after", step)
            assert record["grad_norm"] == pytest.approx(seen[-3][3], rel=1e-5) and record["step"] == step
            return step == self.last

    model.training_callbacks = lambda: [Watcher("own", last=3)]
    result = Trainer(model, counting(8, rng), args=TrainingArguments(max_steps=9)).train(callbacks=[Watcher("mine")])
    order = [(name, when, step) for step in (1, 2, 3) for when in ("before", "after") for name in ("own", "mine")]
    assert [entry[:3] for entry in seen] == order and result.steps == 3 and result.stopped_early
    norms, arrays = [entry[3] for entry in seen], [entry[4] for entry in seen]
    assert norms[1] > 0.9 * 3 * math.sqrt(32 * 16), "what the first added, the second sees, not clipped"
    assert norms[2] == pytest.approx(1, rel=1e-3), "after the step the clipped gradients are still there"
    assert (arrays[0] == arrays[1]).all() and (arrays[1] != arrays[2]).any()


def test_early_stopping_ends_with_the_best_weights(rng):
    """Labels that mean nothing: the held-out loss soon rises."""
    noise = [(ids, rng.integers(0, 32, len(ids))) for ids, _ in counting(24, rng)]
    options = {"learning_rate": 0.03, "max_steps": 200, "eval_steps": 4, "early_stopping_patience": 3}
    trainer, result = train(tiny_model(), noise[:16], noise[16:], **options)
    evaluations = result.losses("eval_loss")
    assert result.stopped_early and result.steps == result.best_step + 3 * 4 < 200
    assert evaluations[-4] == (result.best_step, result.best_eval_loss)
    assert all(loss > result.best_eval_loss for _, loss in evaluations[-3:])
    assert trainer.evaluate() == result.best_eval_loss


def test_patience_without_evaluations_is_refused(rng):
    examples = counting(4, rng)
    with pytest.raises(ValueError, match="early_stopping_patience needs eval_steps"):
        train(tiny_model(), examples, examples, max_steps=2, early_stopping_patience=1)


def test_a_run_that_a_callback_ends_is_evaluated_at_its_end(rng):
    class End(Callback):
        def after_step(self, model, step, record):
            return step == 3

    examples = counting(20, rng)
    _, result = train(tiny_model(), examples[:16], examples[16:], callbacks=[End()], max_steps=6)
    assert result.losses("eval_loss") == [(3, result.best_eval_loss)]


def test_a_rate_that_is_set_before_training_is_the_one(rng):
    model, examples = tiny_model(), counting(8, rng)
    trainer, before = Trainer(model, examples, args=TrainingArguments(max_steps=2)), weights(model)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.train()
    assert_same_bytes(weights(model), before)


def test_an_optimizer_that_is_given_again_begins_at_its_rate(rng):
    model, examples = tiny_model(), counting(8, rng)
    optimizer = AdamW(model.parameters(), lr=0.01)
    rates = [train(model, examples, optimizer=optimizer, max_steps=3)[1].losses("learning_rate") for _ in range(2)]
    assert rates[0] == rates[1] and rates[0][0][1] > rates[0][-1][1]


@pytest.mark.parametrize("name", ["loss", "step", "learning_rate", "tokens", "grad_norm", "seconds"])
def test_a_statistic_cannot_take_the_place_of_what_is_recorded(rng, name):
    loss = lambda model, rng=None, **arguments: (model.loss(**arguments), {name: np.array([7.5])})  # noqa: E731
    with pytest.raises(ValueError, match=f"cannot be called '{name}': a record has that field"):
        train(tiny_model(), counting(4, rng), loss=loss, max_steps=1)


def test_another_kind_of_example_and_an_optimizer_of_ones_own(rng):
    model = mp.SequenceClassifier(tiny_model(), num_labels=2)
    examples = [(ids, int(ids[0] >= 16)) for ids, _ in counting(64, rng, shortest=6, longest=6)]

    def classes(batch):
        ids = np.stack([ids for ids, _ in batch])
        return Batch({"input_ids": ids, "labels": np.array([label for _, label in batch])}, len(batch), ids.size)

    optimizer = AdamW([{"params": model.parameters(), "lr": 0.01}])
    trainer, _ = train(model, examples, examples, classes, optimizer=optimizer, num_train_epochs=8)
    assert trainer.evaluate() < 0.2
    with pytest.raises(ValueError, match=r"lacks score\.weight"):
        Trainer(model, examples, collate=classes, optimizer=AdamW(model.backbone.parameters()))


def pairs_of(examples):
    """(chosen, rejected): low numbers are better than high ones."""
    return [(ids % 16, 16 + ids % 16) for ids, _ in examples]


def collate_scored(pairs):
    ids, mask = pad_sequences([ids for pair in pairs for ids in pair], pad_value=0)
    return Batch({"input_ids": ids, "attention_mask": mask}, weight=len(pairs), tokens=int(mask.sum()))


def bradley_terry(model, input_ids, attention_mask, rng=None):
    scores = model(input_ids, attention_mask, rng=rng).reshape(-1, 2)
    return -mp.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


def test_another_objective(rng):
    """The Trainer's docstring: pairs, and a loss that no model has; accumulated as one batch, and evaluated."""
    pairs, trained = pairs_of(counting(48, rng)), []
    for size, accumulation in ((8, 1), (2, 4)):
        model = mp.SequenceClassifier(tiny_model(), num_labels=1)
        before = mp.train.evaluate(model, pairs[40:], collate=collate_scored, loss=bradley_terry)
        trainer, result = train(
            model, pairs[:40], pairs[40:], collate_scored, bradley_terry, learning_rate=0.02, num_train_epochs=6,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", momentum=0.9,
        )  # fmt: skip
        trained.append([loss for _, loss in result.losses()])
    assert before == pytest.approx(math.log(2), abs=0.05) and trainer.evaluate() < 0.1
    np.testing.assert_allclose(trained[0][:6], trained[1][:6], rtol=1e-4)
    evaluated = mp.train.evaluate(model, pairs[40:], 3, collate=collate_scored, loss=bradley_terry)
    assert evaluated == pytest.approx(trainer.evaluate(), rel=1e-5)


def test_evaluating_needs_nothing_to_train_and_no_batch_size(xp, rng):
    examples, model = counting(7, rng, prompt=3), tiny_model(0.5).requires_grad_(False).to(xp)
    with mp.no_grad():
        by_hand = [(model.loss(xp.asarray(i)[None], xp.asarray(la)[None]).item(), (la[1:] != -100).sum())
                   for i, la in examples]  # fmt: skip
    expected = sum(loss * n for loss, n in by_hand) / sum(n for _, n in by_hand)
    for size in (1, 3, 8):
        assert mp.train.evaluate(model, examples, size, pad_token_id=5) == pytest.approx(expected, rel=1e-6)
    ids, labels = examples[0]
    for wrong, reason in (([], "no examples to evaluate on"), ([(ids, labels * 0 - 100)], "no label counts in any")):
        with pytest.raises(ValueError, match=reason):
            mp.train.evaluate(model, wrong)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            mp.train.evaluation.example_losses(model, examples, size)


def test_training_runs_on_the_device(xp, rng):
    examples, on_host, on_device = counting(8, rng), tiny_model(0.1), tiny_model(0.1).to(xp)
    options = {"max_steps": 2, "learning_rate": 0.01, "eval_steps": 1, "early_stopping_patience": 1}
    host, device = (train(m, examples[:6], examples[6:], **options)[1] for m in (on_host, on_device))
    assert device.losses("eval_loss")[0][1] == pytest.approx(host.losses("eval_loss")[0][1], rel=0.05)
    assert type(on_device.lm_head.weight.data) is type(xp.zeros(1))


# ------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(("config", "rate"), [
    (mp.LoraConfig(r=2), 3e-3), (mp.LoraConfig(r=2, init_lora_weights="pissa"), 1e-3), (mp.IA3Config(), 3e-2),
    (mp.PrefixTuningConfig(num_virtual_tokens=2), 1e-2), (None, 1e-3), ("head", 3e-3),
])  # fmt: skip
@pytest.mark.parametrize("width", [16, 256])
def test_without_a_learning_rate_it_is_the_methods_less_in_a_wide_model(rng, config, rate, width):
    model = mp.Transformer(mp.TransformerConfig.llama(
        vocab_size=32, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=24))  # fmt: skip
    model = mp.head_only(model) if config == "head" else mp.get_peft_model(model, config) if config else model
    usual = Trainer(model, counting(2, rng)).args.learning_rate
    assert usual == usual_learning_rate(model) == rate * min(1, 128 / width)
    args = TrainingArguments(learning_rate=5e-5, max_steps=1, lr_scheduler_type="constant")
    given = Trainer(model, counting(2, rng), args=args)
    assert given.args is args and given.train().history[0]["learning_rate"] == 5e-5


def test_the_usual_rate_is_that_of_the_adapters_that_learn_whichever_are_active():
    model = mp.get_peft_model(tiny_model(), mp.LoraConfig(r=2), "lora")
    model.add_adapter("ia3", mp.IA3Config())
    assert usual_learning_rate(model) == 3e-3
    model.set_adapter("lora", inference_mode=True)
    model.set_requires_grad("ia3")
    assert usual_learning_rate(model) == 3e-2
    model.set_requires_grad(["lora", "ia3"])
    assert usual_learning_rate(model) == 3e-3, "the lowest"


def test_a_model_of_ones_own_without_a_learning_rate_takes_that_of_full_fine_tuning(rng):
    def loss(model, x, rng=None):
        return (model(x) ** 2).mean()

    def collate(rows):
        return Batch({"x": np.stack(rows)}, len(rows), len(rows))

    examples = list(rng.standard_normal((4, 3), np.float32))
    assert Trainer(mp.nn.Linear(3, 3), examples, collate=collate, loss=loss).args.learning_rate == 1e-3


def test_a_learning_rate_beyond_reason_is_named_with_step_and_parameter(rng):
    model, options = tiny_model(), {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": None}
    reason = r"diverged at step 2: the loss is nan; .* lower learning_rate \(it was 1e\+39"
    with pytest.raises(TrainingDiverged, match=reason) as error:
        train(model, counting(8, rng), learning_rate=1e39, max_steps=9, **options)
    assert error.value.step == 2 and error.value.parameter in dict(model.named_parameters())
    assert "became NaN or infinite in the update before" in str(error.value)


def test_activations_that_overflow_are_told_from_weights_that_are_not_numbers(rng):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[:] = 3e38
    where = r"every trained parameter is finite, the largest value is 3e\+38 in model.layers.1.mlp.up_proj.weight"
    with pytest.raises(TrainingDiverged, match=f"step 1: the loss is .*{where}"):
        train(model, counting(8, rng), max_steps=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = np.nan
    with pytest.raises(TrainingDiverged) as error:
        train(model, counting(8, rng), max_steps=1)
    assert error.value.parameter == "model.layers.0.mlp.up_proj.weight"


def test_the_gradient_that_went_wrong_first_is_named(rng):
    """A loss that is finite but has an infinite slope at 0, in one parameter."""

    class Root(mp.nn.Module):
        def __init__(self):
            self.fine, self.sore = mp.nn.Parameter(np.ones(2, np.float32)), mp.nn.Parameter(np.zeros(3, np.float32))

        def loss(self, rng=None):
            return self.fine.sum() + mp.functional.sqrt(self.sore).sum()

    with pytest.raises(TrainingDiverged, match="the loss is 2; in the gradient of sore 3 of 3 elements are") as error:
        train(Root(), [None], max_steps=1, collate=lambda _: Batch({}, 1, 1))
    assert (error.value.step, error.value.loss, error.value.parameter) == (1, 2.0, "sore")


# ----------------------------------------------------------------------------------------------------- what is said


def test_metrics_are_lines_of_json_and_the_curve_is_a_picture(tmp_path, rng, capsys, rendered):
    options = {"output_dir": tmp_path / "run", "max_steps": 4, "eval_steps": 2}
    _, result = train(tiny_model(), counting(8, rng), counting(4, rng), **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    kinds = [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]
    assert [(r["step"], "loss" in r) for r in lines] == kinds
    assert set(lines[0]) == set("step epoch loss learning_rate grad_norm tokens seconds tokens_per_second".split())
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["loss.png", "metrics.jsonl"]
    assert capsys.readouterr() == ("", ""), "nothing is printed by a run that is short"


def test_the_curve_of_a_short_run_has_ticks_at_whole_steps(monkeypatch):
    drawn = []
    monkeypatch.setattr("minipeft.train.metrics.save_png", lambda figure, path: drawn.append(figure))
    mp.train.metrics.plot_loss([{"step": step, "loss": 1.0} for step in (1, 2)], "loss.png")
    assert {1.0, 2.0} <= {*drawn[0].axes[0].get_xticks()} and all(tick.is_integer() for tick in drawn[0].axes[0].get_xticks().tolist())


@pytest.mark.parametrize("place", ["terminal", "notebook"])
@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_and_a_notebook_show_a_bar_with_loss_speed_and_time_left(place, monkeypatch, rng, progress):
    shown = io.StringIO()
    shown.isatty = lambda: place == "terminal"
    if place == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    train(tiny_model(), counting(8, rng), max_steps=3, progress=progress)
    *others, last = shown.getvalue().split("\r")  # the same line is written again
    if not progress:
        assert (others, last) == ([], "")
    else:
        assert re.search(r"^[█#]{10,} step 3/3  loss 3\.\d{3}  [\d,]+ tokens/s  +\d\.\d\ds/step  00:00 left *\n$", last)


@pytest.mark.parametrize("progress", [True, False])
def test_without_a_terminal_there_is_a_line_every_ten_seconds(monkeypatch, capsys, rng, progress):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def four_seconds_later(record):
        now[0] += 4

    train(tiny_model(), counting(8, rng), callbacks=[Log(four_seconds_later)], max_steps=7, progress=progress)
    out, shown = capsys.readouterr()
    assert out == ""
    lines = [re.sub(r"loss 3\.\d\d\d  [\d,]+ tokens/s", "...", line) for line in shown.splitlines()]
    wanted = ["step 3/7  ...   4.00s/step  00:16 left", "step 6/7  ...   4.00s/step  00:04 left"]
    assert lines == (wanted if progress else [])


def test_numbers_of_numpy_are_numbers_and_a_norm_of_zero_clips_nothing(rng, tmp_path):
    """As a sweep over np.logspace or np.arange gives them; they are saved with a checkpoint, too."""
    examples, ends = counting(8, rng), []
    for norm in (np.float32(0), None):
        trainer, _ = train(
            tiny_model(), examples, output_dir=tmp_path / str(norm), learning_rate=np.float32(0.5), optim="sgd",
            max_steps=np.int64(2), max_grad_norm=norm, seed=np.uint8(3), save_steps=np.int32(1),
        )  # fmt: skip
        args = trainer.args
        assert (type(args.max_steps), type(args.seed), type(args.learning_rate)) == (int, int, float)
        ends.append(weights(trainer.model))
    assert_same_bytes(*ends)


def test_what_makes_no_sense_is_refused_before_anything_happens(rng, tmp_path):
    model, examples, frozen = tiny_model(), counting(4, rng), tiny_model().requires_grad_(False)
    ids, labels = examples[2]
    silent, first_only = np.full_like(ids, -100), np.where(np.arange(len(ids)) == 0, ids, -100)
    for match, arguments in {
        "learning_rate must be a number above 0, or None, got nan": {"learning_rate": math.nan},
        "packing is for .* a collate of its own does its own packing": {"packing": True, "collate": collate},
        "momentum is not an option of optim='adamw'; got 0.9": {"momentum": 0.9},
        "adam_beta1 is not an option of optim='sgd'": {"optim": "sgd", "adam_beta1": 0.5},
        "save_steps needs an output_dir": {"save_steps": 1},
        "need eval_examples": {"eval_steps": 2},
        "there are no training examples": {"examples": []},
        "eval_examples is empty": {"held_out": []},
        r"training example 2 \(\d+ tokens\) has no label that counts": {"examples": [*examples[:2], (ids, silent)]},
        "evaluation example 0 .* has no label": {"held_out": [(ids, first_only)]},
        "example 0: input_ids and labels must be integer arrays of one length": {"examples": [(ids, labels[1:])]},
        "training example 0 is not a pair": {"examples": [ids]},
        "nothing to train": {"model": frozen},
    }.items():
        with pytest.raises(ValueError, match=match):
            train(**{"model": model, "examples": examples, **arguments})
    with pytest.raises(TypeError, match=r"train_examples must be a list of examples, not a generator: list\(...\) makes one"):
        Trainer(model, (example for example in examples))
    for match, directory in (("needs the output_dir", None), ("holds no checkpoint", tmp_path)):
        with pytest.raises(ValueError, match=match):
            Trainer(model, examples, args=TrainingArguments(directory)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there are no examples to evaluate on"):
        Trainer(model, examples).evaluate()
    assert list(tmp_path.iterdir()) == []
