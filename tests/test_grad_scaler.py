"""Loss scaling by hand and in the Trainer: what it saves, when it skips, and that a resumed run has the same bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import models
import numpy as np
import pytest

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.autocast import autocast
from minipeft.backend import to_numpy

IDS = [np.arange(1, n) for n in (9, 12, 10, 7, 12, 8)]
EXAMPLES = [(ids, np.where(np.arange(len(ids)) < 2, -100, ids)) for ids in IDS]


def arguments(**options):
    defaults = dict(learning_rate=1e-2, max_steps=4, per_device_train_batch_size=2, progress=False)
    return mp.TrainingArguments(**defaults | options)


def train(model=None, callbacks=(), init_scale=None, resume=None, executor=None, **options):
    model = model or mp.Transformer(models.config("llama"), seed=1)
    trainer = mp.Trainer(model, EXAMPLES, args=arguments(**options))
    if init_scale is not None and not resume:
        trainer.scaler = mp.GradScaler(init_scale=init_scale, growth_interval=2)
    result = trainer.train(callbacks=callbacks, resume_from_checkpoint=resume, executor=executor)
    return {n: p.data.copy() for n, p in model.named_parameters()}, result, trainer


def test_scaled_gradients_survive_float16(xp):
    x, w = mp.Tensor(xp.asarray(np.ones((1, 2), np.float32))), mp.nn.Parameter(xp.asarray(np.eye(2, dtype=np.float32)))
    optimizer, scaler = mp.optim.SGD([w], lr=1.0), mp.GradScaler()
    with autocast("float16"):
        loss = F.linear(x, w).sum() * 1e-9
    loss.backward()
    assert not to_numpy(w.grad).any(), "1e-9 is below the smallest number of float16"
    w.grad = None
    with autocast("float16"):
        loss = F.linear(x, w).sum() * 1e-9
    scaler.scale(loss).backward()
    assert to_numpy(w.grad) == pytest.approx(1e-9 * 2**16, rel=1e-3)
    assert scaler.unscale_(optimizer)
    assert to_numpy(w.grad) == pytest.approx(1e-9, rel=1e-3)
    expected = to_numpy(w.data) - to_numpy(w.grad)
    scaler.step(optimizer)
    scaler.update()
    np.testing.assert_array_equal(to_numpy(w.data), expected)


def test_a_step_that_overflows_is_left_out(xp):
    w = mp.nn.Parameter(xp.asarray(np.ones(3, np.float32)))
    optimizer, scaler = mp.optim.AdamW([w]), mp.GradScaler(init_scale=8.0)
    w.grad = xp.asarray(np.float32([1, np.inf, 1]))
    scaler.step(optimizer)
    assert to_numpy(w.data).tolist() == [1, 1, 1] and not optimizer.state and scaler.get_scale() == 8
    scaler.update()
    assert scaler.get_scale() == 4
    w.grad = xp.asarray(np.float32([1e30, 1, 1]))  # whose square is infinite in float32, and which itself is not
    assert scaler.unscale_(optimizer)
    with np.errstate(over="ignore"):
        scaler.step(optimizer)
    assert to_numpy(w.data)[0] != 1


def test_misuse_is_refused_in_a_sentence():
    w = mp.nn.Parameter(np.ones(2, np.float32))
    optimizer, scaler = mp.optim.SGD([w], lr=1.0), mp.GradScaler()
    with pytest.raises(ValueError, match=r"no parameter of the optimizer has a gradient"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"update\(\) comes after"):
        scaler.update()
    w.grad = np.ones(2, np.float32)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="has already been called on this optimizer"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="has already been called since"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"is being called after step\(\)"):
        scaler.unscale_(optimizer)
    w.grad, w.data = np.ones(2, np.float16), np.ones(2, np.float16)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients: the trained weights are stored in float16"):
        mp.GradScaler().unscale_(optimizer)
    for losses in (5.0, (x for x in ())):
        with pytest.raises(TypeError, match="scales a Tensor, or a list or tuple of them, not a"):
            mp.GradScaler().scale(losses)
    for options in ({"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}, {"init_scale": -1.0}):
        with pytest.raises(ValueError, match=r"GradScaler: .* must be"):
            mp.GradScaler(**options)
    for state in ({}, scaler.state_dict() | {"scale": np.nan}, scaler.state_dict() | {"_growth_tracker": 5000}):
        with pytest.raises(ValueError, match="GradScaler: "):
            mp.GradScaler().load_state_dict(state)
    with pytest.raises(ValueError, match="bf16 and fp16 are two precisions: set one"):
        mp.TrainingArguments(bf16=True, fp16=True)


def test_a_float16_loss_is_scaled_in_float32():
    scaled = mp.GradScaler().scale([mp.Tensor(np.float16(2.0))])[0]
    assert scaled.dtype == np.float32 and scaled.item() == 2 * 65536


def test_a_gradient_that_no_scale_makes_finite_ends_the_run():
    def loss(model, **batch):
        zero = (model.parameters()[0] * 0.0).sum()
        return model.loss(**batch) + (zero * zero).sqrt()  # finite, with a gradient of 0 / 0

    model = mp.Transformer(models.config("llama"), seed=1)
    trainer = mp.Trainer(model, EXAMPLES, args=arguments(fp16=True, max_steps=200), loss=loss)
    with pytest.raises(mp.train.TrainingDiverged, match="step 58"):  # from 2^16 to 2^-41
        trainer.train()


def test_not_enabled_it_does_nothing():
    w = mp.nn.Parameter(np.ones(2, np.float32))
    optimizer, scaler = mp.optim.SGD([w], lr=1.0), mp.GradScaler(enabled=False)
    loss = (w * 1.0).sum()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1 and scaler.state_dict() == {}
    loss.backward()
    scaler.step(optimizer)
    scaler.update()
    assert w.data.tolist() == [0, 0]
    both = mp.GradScaler(init_scale=2.0).scale([mp.Tensor(1.0), mp.Tensor(3.0)])
    assert [t.item() for t in both] == [2, 6]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trainer_rounds_in_training_and_evaluation(precision):
    exact, low = train(), train(**{precision: True})
    place = 2.0**-8 if precision == "bf16" else 2.0**-11
    for name, w in exact[0].items():
        assert low[0][name].dtype == np.float32 and not np.array_equal(low[0][name], w)
    for a, b in zip(exact[1].history, low[1].history):
        assert a["loss"] != b["loss"] and abs(a["loss"] - b["loss"]) < 20 * place * a["loss"]
        assert ("loss_scale" in b) == (precision == "fp16")
    model, trainer = low[2].model, low[2]
    with autocast(trainer.precision):
        inside = mp.train.evaluate(model, EXAMPLES)
    assert trainer.evaluate(EXAMPLES) == inside != mp.train.evaluate(model, EXAMPLES)
    with autocast(trainer.precision):  # a trainer without the option leaves an outer autocast as it is
        assert mp.Trainer(model, EXAMPLES, args=arguments()).evaluate(EXAMPLES) == inside


def test_overflowing_steps_change_nothing_and_the_clip_sees_unscaled_gradients():
    class Seen(mp.train.Callback):
        def __init__(self):
            self.before, self.after = [], []

        def before_step(self, model, step):
            self.before.append(max(float(abs(p.grad).max()) for p in model.parameters()))

        def after_step(self, model, step, record):
            self.after.append(step)

    seen, start = Seen(), mp.Transformer(models.config("llama"), seed=1)
    weights, result, trainer = train(start.copy(), [seen], init_scale=2.0**24, fp16=True, max_steps=1)
    assert result.history[0]["loss_scale"] == 2.0**24 and "grad_norm" not in result.history[0]
    assert trainer.scaler.get_scale() == 2.0**23 and seen.after == []
    for name, p in start.named_parameters():
        np.testing.assert_array_equal(weights[name], p.data)
    seen = Seen()
    _, result, trainer = train(start.copy(), [seen], init_scale=2.0**24, fp16=True, max_steps=14)
    stepped = [r["step"] for r in result.history if "grad_norm" in r]
    assert 0 < len(stepped) < 14 and seen.after == stepped
    _, plain, _ = train(start.copy(), max_steps=1)
    first = next(r for r in result.history if "grad_norm" in r)
    assert first["grad_norm"] == pytest.approx(plain.history[0]["grad_norm"], rel=0.5), "not times the scale"
    assert all(np.isfinite(seen.before[step - 1]) and seen.before[step - 1] < 100 for step in stepped)
    scales = [r["loss_scale"] for r in result.history]
    assert {b / a for a, b in pairwise(scales)} == {0.5, 1, 2}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_has_the_same_bytes(precision, tmp_path):
    options = dict(init_scale=2.0**20, max_steps=9, save_steps=3, save_total_limit=9) | {precision: True}
    options = options if precision == "fp16" else options | {"init_scale": None}
    whole, result, trainer = train(output_dir=tmp_path / "a", **options)
    train(output_dir=tmp_path / "b", **options)
    for step in (6, 9):
        done = tmp_path / "b" / f"checkpoint-{step}"
        for file in done.iterdir():
            file.unlink()
        done.rmdir()
    resumed, again, other = train(output_dir=tmp_path / "b", resume=True, **options)
    for name, w in whole.items():
        np.testing.assert_array_equal(resumed[name], w)
    if precision == "fp16":
        assert other.scaler.state_dict() == trainer.scaler.state_dict()
        assert [r["loss_scale"] for r in again.history] == [r["loss_scale"] for r in result.history]
        assert {r["loss_scale"] for r in result.history} != {2.0**20}
    with pytest.raises(mp.train.CheckpointError, match=precision):
        train(output_dir=tmp_path / "b", resume=True, **options | {precision: False})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_workers_round_and_scale_too(precision):
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=2) | {precision: True}
    here, _, _ = train(**options)
    with ThreadPoolExecutor(1) as pool:
        there, _, _ = train(executor=pool, **options)
    for name, w in here.items():
        np.testing.assert_allclose(there[name], w, rtol=1e-5, atol=1e-7)


def test_a_forward_pass_that_overflows_names_the_remedy():
    model = mp.Transformer(models.config("llama"), seed=1)
    model.lm_head.weight.data *= 1e6
    with pytest.raises(mp.train.TrainingDiverged, match=r"float16 has nothing above 65504: .* bf16 has float32's range"):
        train(model, fp16=True)
    train(model, bf16=True)


def test_an_evaluation_that_overflows_names_the_remedy_too():
    class Grow(mp.train.Callback):
        def after_step(self, model, step, record=None):
            model.lm_head.weight.data *= 1e6

    model = mp.Transformer(models.config("llama"), seed=1)
    run = mp.Trainer(model, EXAMPLES, EXAMPLES, arguments(fp16=True, max_steps=1))
    with np.errstate(all="ignore"), pytest.raises(mp.train.TrainingDiverged, match=r"step 1: the loss is .* float16 has nothing above 65504"):
        run.train(callbacks=[Grow()])
