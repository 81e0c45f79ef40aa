"""The first op to overflow, and the first to flush gradients, by name."""

from __future__ import annotations

import models
import numpy as np
import pytest

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.autocast import autocast


def test_the_first_overflow_is_named_by_op_module_and_step(rng, xp):
    model, ids = mp.Transformer(models.config("llama"), seed=1).to(xp), xp.asarray(models.tokens(rng, 1, 6))
    model.model.layers[1].mlp.down_proj.weight.data *= 1e6
    with mp.PrecisionReport(model) as report:
        report.step = 7
        with np.errstate(all="ignore"), autocast("float16"), mp.no_grad():
            model(ids)
    first = report.first_overflow
    assert (first.op, first.module, first.direction, first.step) == ("linear", "model.layers.1.mlp.down_proj", "forward", 7)
    assert 0 < first.overflowed <= first.size == model.model.layers[1].mlp.down_proj.weight.size
    assert report.first_flush is None
    assert "first overflow   step 7, forward, linear in model.layers.1.mlp.down_proj" in repr(report)
    with mp.PrecisionReport(model) as report, autocast("bfloat16"), mp.no_grad():
        model(ids)
    assert report.first_overflow is None and "first overflow   none" in repr(report)


def test_counts_are_those_of_the_numbers(xp):
    x = xp.asarray(np.float32([[1e-9, 1.0, 2e-8, 1e6]]))
    w = mp.nn.Parameter(xp.asarray(np.eye(4, dtype=np.float32)))
    with np.errstate(all="ignore"), mp.PrecisionReport() as report, autocast("float16"):
        y = F.linear(mp.Tensor(x), w)
    (row,) = report.rows
    assert (row.op, row.module, row.size, row.overflowed, row.flushed) == ("linear", "", 4 + 16 + 4, 1, 2)
    assert str(row) == "step 1, forward, linear: 1 of 24 numbers (4.17%) became infinite, 2 of 24 numbers (8.33%) became zero"
    with np.errstate(all="ignore"):
        y.backward(xp.asarray(np.float32([[1e-8, 0, 1, -1e-8]])))  # and outside the `with`: noted all the same
    assert report.first_flush.direction == "backward" and report.first_flush.flushed == 2
    assert len(report.rows) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_flushed_gradient_is_named_and_a_scale_saves_it(checkpointing, rng):
    model, ids = mp.Transformer(models.config("llama"), seed=1), models.tokens(rng, 2, 8)
    model.gradient_checkpointing_enable() if checkpointing else None
    shares = []
    for scale in (1e-5, 2.0**10):
        with mp.PrecisionReport(model) as report, autocast("float16"):
            (model.loss(ids, ids) * scale).backward()
        shares.append(sum(row.flushed for row in report.rows if row.direction == "backward"))
        if scale < 1:
            assert report.first_flush.op == "cross_entropy" and report.first_flush.step == 1, "the gradient of the logits"
            where = {row.module for row in report.rows if row.direction == "backward"}
            assert "model.layers.0.mlp.down_proj" in where
    assert shares[1] < shares[0] / 10


def test_the_trainer_counts_its_steps():
    ids = np.arange(1, 12)
    examples = [(ids, ids)] * 4
    args = mp.TrainingArguments(fp16=True, max_steps=3, per_device_train_batch_size=2, progress=False, learning_rate=1e-3)

    class Enlarge(mp.train.Callback):
        def after_step(self, model, step, record):
            if step == 2:
                model.model.layers[0].mlp.up_proj.weight.data *= 1e5

    model = mp.Transformer(models.config("llama"), seed=1)
    trainer = mp.Trainer(model, examples, args=args)
    trainer.scaler = mp.GradScaler(init_scale=1.0)
    with mp.PrecisionReport(model) as report, pytest.raises(mp.train.TrainingDiverged, match="at step 3"):
        trainer.train(callbacks=[report, Enlarge()])
    assert (report.first_overflow.step, report.first_overflow.module) == (3, "model.layers.0.mlp.up_proj")


def test_it_leaves_nothing_behind(rng):
    model, ids = mp.Transformer(models.config("llama"), seed=1), models.tokens(rng, 1, 4)
    classes = [type(m) for _, m in model.named_modules()]
    with mp.PrecisionReport(model) as report, autocast("float16"):
        model.loss(ids, ids)
    seen = len(report._rows)
    with autocast("float16"):
        model.loss(ids, ids).backward()
    assert len(report._rows) == seen > 10 and [type(m) for _, m in model.named_modules()] == classes
