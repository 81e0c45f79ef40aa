"""The callbacks that are ready to be used, on a Trainer and on an online trainer."""

import json
import shutil

import numpy as np
import pytest
from models import build, config

import minipeft as mp
from minipeft.autograd.autocast import rounded
from minipeft.train import EMA, Callback, EarlyStopping, Log, WeightsIn
from minipeft.train.checkpoint import CheckpointError

EXAMPLES = [(np.arange(i, i + 6), np.arange(i, i + 6)) for i in range(1, 13)]


def model():
    return mp.Transformer(config("llama", initializer_range=0.1), seed=1)


def trainer(m, held_out=None, **options):
    options = {"max_steps": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "progress": False} | options
    return mp.Trainer(m, EXAMPLES, held_out, mp.TrainingArguments(**options))


def online(policy, **options):
    options = {"steps": 4, "batch_size": 4, "mini_batch_size": 2, "num_epochs": 1, "progress": False} | options
    options |= {"response_length": 3, "missing_eos_score": None, "learning_rate": 1e-2}
    score = lambda roll: np.array([sum(t == 7 for t in r) + 0.1 * r[0] for r in roll.responses()])  # noqa: E731
    return mp.rlhf.RLOOTrainer(policy, score, [[1, 2], [3]], mp.rlhf.GroupConfig(num_generations=2, **options))


def by_hand(averages, m, decay=0.5):
    """The exponential moving average of what is trained, one step on."""
    for name, p in m.named_parameters():
        if p.requires_grad:
            averages[name] = decay * averages.get(name, p.data) + (1 - decay) * p.data


class Holder(mp.nn.Module):
    def __init__(self, w):
        self.w = w


class Reference(Callback):
    def __init__(self):
        self.averages = {}

    def after_step(self, model, step, record):
        by_hand(self.averages, model)


@pytest.mark.parametrize("make", [trainer, online])
def test_a_moving_average_of_the_weights(make):
    adapted = mp.get_peft_model(model(), mp.LoraConfig(r=2))
    ema, reference = EMA(0.5), Reference()
    with pytest.raises(ValueError, match="no averages of this model's parameters: train it first"):
        ema.applied(adapted).__enter__()
    make(adapted).train(callbacks=[ema, reference])
    last = {name: p.data.copy() for name, p in adapted.named_parameters()}
    ids = np.arange(1, 7)[None]
    before = adapted(ids).data
    with ema.applied(adapted):
        assert ema.averages.keys() == reference.averages.keys() and all("lora" in name for name in ema.averages)
        for name, p in adapted.named_parameters():
            np.testing.assert_allclose(p.data, reference.averages.get(name, last[name]), rtol=1e-5, atol=1e-8)
        assert (adapted(ids).data != before).any()
    assert all(np.array_equal(p.data, last[name]) for name, p in adapted.named_parameters())
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1, not 1"):
        EMA(1)


def test_an_average_survives_an_interruption(tmp_path):
    def run(directory, resume=False, before=()):
        ema = EMA(0.9)
        trainer(model(), save_steps=3, output_dir=tmp_path / directory).train(resume, callbacks=[*before, ema])
        return ema.averages

    class Interrupted(Exception):
        pass

    def interrupt(record):
        if record["step"] == 5:
            raise Interrupted

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("parts", before=[Log(interrupt)])
    resumed = run("parts", resume=True)  # without the Log, which only looks
    assert whole and all(np.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (EMA(0.9), EMA(0.5), r"\['EMA\(0.9\)'\] there, \['EMA\(0.5\)'\] here"),
        (EarlyStopping(9), EarlyStopping(8), r"EarlyStopping\(9, 'eval_loss', False\).* there"),
        (EarlyStopping(9), EarlyStopping(9, greater_is_better=True), r"EarlyStopping\(9, 'eval_loss', True\).* here"),
    ],
)
def test_a_run_is_resumed_with_callbacks_of_the_same_arguments(before, after, named, tmp_path):
    options = {"save_steps": 4, "output_dir": tmp_path}
    trainer(model(), **options).train(callbacks=[before])
    with pytest.raises(CheckpointError, match=f"is of a run with other callbacks .*{named}"):
        trainer(model(), **options).train(True, callbacks=[after])
    trainer(model(), **options).train(True, callbacks=[before])


def test_early_stopping_by_a_record_of_either_trainer():
    result = trainer(model(), EXAMPLES, eval_steps=1, max_steps=50, learning_rate=1.0).train(
        callbacks=[EarlyStopping(2)]
    )
    losses = [loss for _, loss in result.losses("eval_loss")]
    assert result.stopped_early and result.steps == result.best_step + 2 < 50
    assert min(losses[-2:]) >= min(losses)
    run = online(build("llama"), steps=30)
    history = run.train(callbacks=[EarlyStopping(3, "objective/scores", greater_is_better=True)])
    scores = [record["objective/scores"] for record in history]
    assert len(history) < 30 and max(scores) == scores[-4] and max(scores[-3:]) <= scores[-4]
    with pytest.raises(ValueError, match="patience must be a positive integer, not 0"):
        EarlyStopping(0)


def test_a_log_sees_every_record_and_a_callback_reaches_record_model_and_gradients():
    records, updates, norms = [], [], []

    class Norms(Callback):
        def after_step(self, model, step, record):
            norms.append((record["step"], mp.nn.gradient_norms(model, "")[""]))

    result = trainer(model(), EXAMPLES[:4], eval_steps=4, max_grad_norm=1e-3).train(
        callbacks=[Log(records.append), Norms()]
    )
    assert records == result.history and [r["step"] for r in records if "eval_loss" in r] == [4, 8]
    assert [step for step, _ in norms] == list(range(1, 9))
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for _, norm in norms), "clipped"
    run = online(build("llama"))
    assert run.train(callbacks=[Log(updates.append)]) == updates and len(updates) == 4


def test_what_a_callback_adds_to_a_record_may_be_numpys(tmp_path):
    class Adds(Callback):
        def after_step(self, model, step, record):
            record |= {"a": np.float32(0.5), "b": np.int64(step)}

    result = trainer(model(), EXAMPLES[:4], output_dir=tmp_path, max_steps=1).train(callbacks=[Adds()])
    assert (result.history[0]["a"], result.history[0]["b"]) == (0.5, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["a"] == 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_without_a_master_copy_lose_small_steps(dtype):
    place = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]  # half of the last place of 1
    for step, moved in ((0.9 * place, False), (1.1 * place, True)):
        w = mp.nn.Parameter(np.ones(4, np.float32))
        held = WeightsIn(one := Holder(w), dtype)
        w.data += np.float32(step)
        held.after_step(one, 1, {})
        assert (w.data > 1).all() == moved, "float32 would have moved in both"
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16"):
        WeightsIn(one, "int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_held_in_either_dtype_are_that_after_every_step_and_after_a_resume(dtype, tmp_path):
    def run(directory, resume=None, steps=6):
        adapted = mp.get_peft_model(model(), mp.LoraConfig(r=2))
        frozen = {n: p.data.copy() for n, p in adapted.named_parameters() if not p.requires_grad}
        t = trainer(adapted, output_dir=directory, save_steps=3, max_steps=steps, bf16=dtype == "bfloat16")
        t.train(resume_from_checkpoint=resume, callbacks=[WeightsIn(adapted, dtype)])
        for name, p in adapted.named_parameters():
            assert np.array_equal(p.data, frozen[name] if name in frozen else rounded(p.data, dtype)), name
        return {n: p.data for n, p in t.trainable.items()}

    whole = run(tmp_path / "a")
    run(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    again = run(tmp_path / "b", resume=True)
    assert all(np.array_equal(again[name], w) for name, w in whole.items()) and any(w.any() for w in whole.values())
    other = mp.get_peft_model(model(), mp.LoraConfig(r=2))
    with pytest.raises(CheckpointError, match="callbacks"):
        trainer(other, output_dir=tmp_path / "b", save_steps=3, max_steps=6, bf16=dtype == "bfloat16").train(True)
