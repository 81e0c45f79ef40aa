"""How often a step or a token asks something of the device, and waits for it: counted by a CUDA runtime on the host.

Needs CuPy on the package `hostcuda`, which counts every call; elsewhere these tests are left out.
"""

from __future__ import annotations

from functools import partial

import models
import numpy as np
import pytest
from test_optim import SHAPES, give_gradients, parameters

import minipeft as mp
from minipeft import quant, rlhf
from minipeft.nn.generation import generate_stream
from minipeft.peft import LoraConfig, get_peft_model
from minipeft.peft.methods import METHODS
from minipeft.text.examples import Example, PreferencePair
from minipeft.train import SGD, Adam, AdamW, Trainer, TrainingArguments, TrainingDiverged, clip_grad_norm
from minipeft.train.callbacks import Callback

hostcuda = pytest.importorskip("hostcuda", reason="counts launches and waits: needs CuPy on hostcuda")
cupy = pytest.importorskip("cupy")

LAYERS = 2
EXAMPLES = [(np.arange(1, n + 1), np.where(np.arange(n) < 3, -100, np.arange(1, n + 1))) for n in (9, 12, 10, 12) * 8]


def built(method, **fields):
    model = mp.Transformer(models.config("llama", num_hidden_layers=LAYERS, **fields), seed=0, backend="cupy")
    model = quant.quantize_model(model) if method == "qlora" else model
    return model if method == "full" else get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def counted(fn):
    with hostcuda.counting() as n:
        fn()
    return n


class Counts(Callback):
    """What was asked of the device from one record of a run to the next."""

    only_looks = True

    def __init__(self):
        self.steps = []

    def on_record(self, model, record):
        self.steps.append(hostcuda.summary())
        hostcuda.reset()


def step(method, accumulate=1, **options):
    """A step's counts, when everything is compiled."""
    size = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    args = TrainingArguments(max_steps=3, learning_rate=1e-3, progress=False, **size, **options)
    Trainer(built(method), EXAMPLES, args=args).train(callbacks=[counts := Counts()])
    return counts.steps[-1]


@pytest.mark.parametrize("optim", ["adamw", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_waits_once(accumulate, optim):
    assert step("full", accumulate, optim=optim).waits == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_waits_once(method):
    base = mp.Transformer(models.config("gpt2", num_hidden_layers=LAYERS), seed=0, backend="cupy")  # with biases, for BitFit
    args = TrainingArguments(max_steps=6, progress=False, per_device_train_batch_size=4)  # of which AdaLoRA prunes in three
    Trainer(METHODS[method].prepare(base, 6), EXAMPLES, args=args).train(callbacks=[counts := Counts()])
    assert {n.waits for n in counts.steps[1:]} == {1}


@pytest.mark.parametrize("loss", [None, partial(rlhf.RewardModel.loss, center=0.1)])
def test_a_step_of_a_reward_model_waits_once(loss):
    rankings = [rlhf.Ranking((a, b), margin=0.5) for (a, _), (b, _) in zip(EXAMPLES[:8:2], EXAMPLES[1:8:2])]
    args = TrainingArguments(max_steps=3, learning_rate=1e-3, progress=False, per_device_train_batch_size=4)
    judge = rlhf.RewardModel(built("full"))
    judge = judge if loss is None else get_peft_model(judge, LoraConfig(r=2, modules_to_save=["score"]))  # as `minipeft reward`
    Trainer(judge, rankings, args=args, collate=rlhf.collate_rankings, loss=loss).train(callbacks=[counts := Counts()])
    assert counts.steps[-1].waits == 1


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "orpo"])
def test_a_step_on_preferences_waits_once(loss):
    texts = [Example(*map(np.array, example)) for example in EXAMPLES[:8]]
    pairs = [PreferencePair(a, b) for a, b in zip(texts[::2], texts[1::2])]
    args = TrainingArguments(max_steps=3, learning_rate=1e-3, progress=False, per_device_train_batch_size=4)
    rlhf.dpo_trainer(built("full"), pairs, args=args, loss_type=loss).train(callbacks=[counts := Counts()])
    assert counts.steps[-1].waits == 1


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}])
def test_the_wait_comes_after_the_update_has_been_launched(precision, monkeypatch):
    waits, launch = [], AdamW.flat

    def update(*arrays, **numbers):
        launch(*arrays, **numbers)
        waits.append(hostcuda.summary().waits)

    monkeypatch.setattr(AdamW, "flat", staticmethod(update))
    assert step("lora", **precision).waits == 1 and len(waits) == 3 and waits[-1] == 0


def test_a_step_that_is_not_finite_is_refused_on_the_device():
    """NaN in the loss, or in a gradient alone: no weight has changed when that is known, and no state is kept."""
    for callbacks, reason in (([], "the loss is nan"), ([Spoil()], "in the gradient of")):
        model = built("full")
        if not callbacks:
            model.model.norm.weight.data[3] = np.nan
        before = {name: p.data.get() for name, p in model.named_parameters()}
        trainer = Trainer(model, EXAMPLES, args=TrainingArguments(max_steps=1, learning_rate=1e-3, progress=False))
        with pytest.raises(TrainingDiverged, match=reason):
            trainer.train(callbacks=callbacks)
        for name, p in model.named_parameters():
            np.testing.assert_array_equal(p.data.get(), before[name])
        assert not trainer.optimizer.state


class Spoil(Callback):
    """An infinite number in one gradient."""

    def before_step(self, model, step):
        model.parameters()[0].grad[1, 2] = np.inf


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_training_step_clips_and_updates_in_five_launches(method):
    n = step(method)
    assert n.waits == 1
    assert {name: n.kernels[name] for name in ("adam", "sum_of_squares", "clip")} == {
        "adam": 2 if method == "full" else 1, "sum_of_squares": 1, "clip": 1,
    }  # matrices and vectors decay differently  # fmt: skip


def test_four_bits_cost_one_launch_for_each_time_that_a_weight_is_read():
    dense, packed = step("lora"), step("qlora")
    assert 0 < packed.launches - dense.launches == packed.kernels["dequantize_4bit"] <= 2 * 7 * LAYERS
    assert packed.gemms == dense.gemms


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_in_four_bits_is_one_launch_and_one_product(rng, nested):
    W, x = (cupy.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((96, 64), (3, 64)))
    layer = quant.Linear4bit(*quant.quantize_4bit(W, compress_statistics=nested))
    for _ in range(2):
        n = counted(lambda: layer(mp.Tensor(x)))
    assert (n.launches, n.gemms, n.waits) == (1, 1, 0)


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD])
def test_an_optimizer_is_one_launch_for_all_of_its_parameters(rng, kind):
    params = parameters(cupy, rng, SHAPES * 9)
    optimizer = kind(params)
    for _ in range(2):
        give_gradients(cupy, rng, params)
        n = counted(optimizer.step)
    assert (n.launches, n.waits, n.h2d) == (1, 0, 1)
    clipping = counted(lambda: clip_grad_norm(params, 0.1))
    assert clipping.launches <= 4 and clipping.waits == 1


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.8), dict(temperature=0.8, top_k=5, top_p=0.9)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_waits_once_and_is_chosen_in_one_launch(sampling, padded):
    mask = np.ones((3, 4), np.int64)
    mask[0, : 2 * padded] = 0
    tokens = generate_stream(built("full"), np.full((3, 4), 7), mask, 6, eos_token_id=[50], **sampling)
    for _ in range(6):
        n = counted(lambda: next(tokens))
    assert n.waits == 1 and n.kernels["pick"] == 1
    assert n.d2h_bytes == 3 * 8 and n.h2d <= 4


@pytest.mark.parametrize("kind", ["PPO", "GRPO", "RLOO"])
def test_a_minibatch_of_online_rlhf_waits_once(kind, monkeypatch):
    options = dict(steps=2, batch_size=4, mini_batch_size=2, num_epochs=1, response_length=3, learning_rate=1e-4)
    options |= dict(missing_eos_score=None, progress=False)
    config = rlhf.PPOConfig(**options) if kind == "PPO" else rlhf.GroupConfig(**options, num_generations=2)
    trainer = getattr(rlhf, f"{kind}Trainer")(built("lora"), lambda roll: np.arange(4.0), [[1, 2], [3, 4, 5]], config)
    seen, epochs = [], trainer.epochs
    monkeypatch.setattr(trainer, "epochs", lambda batch: (seen.append(counted(lambda: seen.append(epochs(batch)))), seen[-2])[1])
    trainer.train()
    assert seen[-1].waits == 2  # of two minibatches
