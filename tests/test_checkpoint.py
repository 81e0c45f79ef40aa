"""Checkpoints: resumed runs end with the same bytes, killed runs too, and nothing damaged or foreign is taken."""

import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
from test_train import assert_same_bytes, bradley_terry, collate_scored, counting, pairs_of, tiny_model, weights

import minipeft as mp
from minipeft.files import read_safetensors, write_safetensors
from minipeft.train import Callback, CheckpointError, Trainer, TrainingArguments, load_checkpoint, save_checkpoint
from minipeft.train.batches import collate
from minipeft.train.checkpoint import arrays_in, fingerprint

STEPS = 9
EXAMPLES = counting(20, np.random.default_rng(5))


def trainer(directory, model=None, examples=None, **changes):
    """Dropout, accumulation, padding, a last step of the epoch that is smaller, evaluation with the best kept."""
    options = {
        "output_dir": directory, "learning_rate": 0.02, "max_steps": STEPS, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2, "eval_steps": 2, "early_stopping_patience": 100, "save_steps": 1,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "weight_decay": 0.1, **changes,
    }  # fmt: skip
    examples = examples or EXAMPLES
    return Trainer(model or tiny_model(0.1), examples[:16], examples[16:], TrainingArguments(**options))


def interrupted(directory, at, callbacks=(), **changes):
    """A run of which nothing is left but what lay on the disk after step `at`."""
    run = trainer(directory, **changes)
    step, run._step = run._step, lambda k: step(k) if k <= at else 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train(callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never interrupted: (weights, result)."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    result = run.train()
    return weights(run.model), result


@pytest.mark.parametrize("at", [1, 3, 6, 8])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, whole, at):
    interrupted(tmp_path, at)
    run = trainer(tmp_path, model=tiny_model(0.1, seed=99))
    result = run.train(resume_from_checkpoint=True)
    assert_same_bytes(weights(run.model), whole[0])
    best = [(r.steps, r.best_step, r.best_eval_loss) for r in (result, whole[1])]
    assert best[0] == best[1] and result.steps == STEPS
    timeless = [[{**r, "seconds": 0, "tokens_per_second": 0} for r in part.history] for part in (result, whole[1])]
    assert timeless[0] == timeless[1], "every step is recorded once"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


@pytest.mark.parametrize("optim", ["sgd", "adamw", "adamw_8bit"])
def test_steps_after_the_checkpoint_are_done_again_and_recorded_once(tmp_path, optim):
    options = {"optim": optim, "momentum": 0.9 * (optim == "sgd"), "save_steps": 4, "early_stopping_patience": None}
    wide = partial(tiny_model, 0.1, width=64)  # matrices large enough for moments of eight bits
    whole = trainer(tmp_path / "whole", model=wide(), **options)
    whole.train()
    interrupted(tmp_path / "run", 7, model=wide(), **options)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 7 + 3
    _, arrays, _ = load_checkpoint(tmp_path / "run" / "checkpoint-4")
    assert ("uint8" in {a.dtype.name for a in arrays["optimizer"].values()}) == (optim == "adamw_8bit")
    run = trainer(tmp_path / "run", model=wide(), **options)
    result = run.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-4")
    assert_same_bytes(weights(run.model), weights(whole.model))
    assert [step for step, _ in result.losses()] == list(range(1, STEPS + 1))


class Average(Callback):
    """Keeps a moving average of the norm's weight, and ends the run after its `last` step."""

    def __init__(self, last=None):
        self.kept, self.last = {}, last

    def after_step(self, model, step, record):
        new = model.model.norm.weight.data
        self.kept = {"mean": 0.5 * self.kept.get("mean", new) + 0.5 * new}
        return step == self.last

    def state_dict(self):
        return self.kept

    def load_state_dict(self, arrays):
        self.kept = arrays


def test_what_callbacks_keep_is_saved_and_a_run_without_them_is_another(tmp_path, whole):
    average, resumed, run = Average(), Average(), trainer(tmp_path / "whole")
    run.train(callbacks=[Callback(), average])
    assert_same_bytes(weights(run.model), whole[0])
    interrupted(tmp_path / "run", 5, callbacks=[Callback(), Average()])
    again = trainer(tmp_path / "run", model=tiny_model(0.1, seed=99))
    for callbacks, there, here in (([], "'Callback', 'Average'", ""), ([Average()] * 2, "'Callback'", "'Average'")):
        with pytest.raises(CheckpointError, match=f"other callbacks .*{there}.* there, .*{here}.* here"):
            again.train(resume_from_checkpoint=True, callbacks=callbacks)
    again.train(resume_from_checkpoint=True, callbacks=[Callback(), resumed])
    np.testing.assert_array_equal(resumed.kept["mean"], average.kept["mean"])
    trainer(tmp_path / "bare", max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"other callbacks \(\[.Early.*\] there, \['Average', .Early.*\] here\)"):
        trainer(tmp_path / "bare", max_steps=2).train(resume_from_checkpoint=True, callbacks=[Average()])


def test_adalora_is_resumed_with_its_averages_and_what_it_pruned(tmp_path):
    def run(directory):
        config = mp.AdaLoraConfig(total_step=STEPS, init_r=4, target_r=2, tfinal=1, target_modules=["q_proj", "v_proj"])
        return {"directory": tmp_path / directory, "model": mp.get_peft_model(tiny_model(0.1), config)}

    whole, again = trainer(**run("whole")), trainer(**run("parts"))
    whole.train()
    interrupted(**run("parts"), at=5)
    again.train(resume_from_checkpoint=True)
    assert_same_bytes(weights(again.model), weights(whole.model))
    assert any((p.data == 0).any() for n, p in again.model.named_parameters() if "lora_E" in n), "it has pruned"


def test_a_run_that_a_callback_ended_is_resumed_as_finished(tmp_path):
    first, second = (trainer(tmp_path, save_steps=5).train(r, callbacks=[Average(last=3)]) for r in (False, True))
    assert first.steps == second.steps == 3 and mp.train.last_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_run_that_stopped_early_is_resumed_as_finished(tmp_path):
    random, counted = np.random.default_rng(0), counting(20, np.random.default_rng(1))
    noise = [(ids, random.integers(0, 32, len(ids))) for ids, _ in counted]
    options = {"max_steps": 200, "early_stopping_patience": 2, "learning_rate": 0.05, "save_steps": 50}
    run, again = (trainer(tmp_path, examples=noise, **options) for _ in range(2))
    first, second = run.train(), again.train(resume_from_checkpoint=True)
    assert first.stopped_early and second.stopped_early and first.steps == second.steps
    assert_same_bytes(weights(again.model), weights(run.model))


def test_the_newest_are_kept_and_leftovers_removed(tmp_path):
    leftover = tmp_path / f".checkpoint-3.{'0' * 32}.tmp"
    leftover.mkdir()
    (tmp_path / ".checkpoint-mine.tmp").mkdir()
    run = trainer(tmp_path, save_total_limit=3)
    (callback := Callback()).after_step = lambda *_: (tmp_path / "checkpoint-0").mkdir(exist_ok=True)
    run.train(callbacks=[callback])
    (tmp_path / "checkpoint-0").rmdir()  # it is no checkpoint, and was not deleted as the oldest one
    assert [p.name for p in mp.train.list_checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-8", "checkpoint-9"]
    assert mp.train.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    names = {p.name for p in tmp_path.iterdir()} - {"checkpoint-7", "checkpoint-8", "checkpoint-9"}
    assert names == {"metrics.jsonl", "loss.png", ".checkpoint-mine.tmp"}


def test_a_frozen_base_is_not_stored_but_recognized(tmp_path):
    def tuned(seed):
        frozen = tiny_model(seed=seed).requires_grad_(False)
        frozen.model.norm.weight.requires_grad = True
        return frozen

    trainer(tmp_path, model=tuned(0), max_steps=2).train()
    _, arrays, _ = load_checkpoint(tmp_path / "checkpoint-2")
    assert list(arrays["model"]) == ["model.norm.weight"]
    trainer(tmp_path, model=tuned(0), max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"other base \(its frozen parameters\)"):
        trainer(tmp_path, model=tuned(1), max_steps=2).train(resume_from_checkpoint=True)


def test_another_run_is_refused_by_what_differs(tmp_path):
    trainer(tmp_path, max_steps=2).train()
    for match, changes in {
        r"other learning_rate \(0.02 there, 0.5 here\)": {"learning_rate": 0.5},
        r"other max_steps \(2 there, 4 here\)": {"max_steps": 4},
        r"other seed \(0 there, 1 here\)": {"seed": 1},
        "other training examples; resume with the same": {"examples": counting(20, np.random.default_rng(6))},
        r"other number of evaluation examples \(4 there, 3 here\)": {"examples": EXAMPLES[:19]},
        "other trainable parameters": {"model": tiny_model(dialect="gpt2")},
        r"other config.dropout \(0.1 there, 0.2 here\)": {"model": tiny_model(0.2, seed=7)},
    }.items():
        model = changes.get("model") or tiny_model(0.1, seed=7)
        before = weights(model)
        with pytest.raises(CheckpointError, match=match):
            trainer(tmp_path, **{"max_steps": 2, **changes, "model": model}).train(resume_from_checkpoint=True)
        assert_same_bytes(weights(model), before)
    with pytest.raises(ValueError, match="checkpoint-2 is of an earlier run: resume from it, or choose another"):
        trainer(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint-2 is later than checkpoint-1"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="is not in output_dir"):
        trainer(tmp_path / "other", max_steps=2).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_a_run_on_another_objective_knows_its_pairs_and_its_loss(tmp_path):
    def run(seed, **options):
        pairs = pairs_of(counting(8, np.random.default_rng(seed)))
        args = TrainingArguments(tmp_path, max_steps=2, save_steps=1)
        return Trainer(mp.SequenceClassifier(tiny_model(), 1), pairs, args=args, collate=collate_scored, **options)

    run(0, loss=bradley_terry).train()
    run(0, loss=bradley_terry).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="other training examples"):
        run(1, loss=bradley_terry).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"other loss \(bradley_terry there, model_loss here\)"):
        run(0).train(resume_from_checkpoint=True)


def test_what_a_partial_has_bound_is_part_of_a_runs_identity():
    def named(**options):
        return Trainer(tiny_model(), EXAMPLES[:2], collate=partial(collate, **options)).identity()["collate"]

    assert named(f=counting) == "collate(f=counting)", "no address of memory"
    assert named(v=Average(last=3), table=np.array([1, None])) == "collate(v=Average, table=ndarray)"
    long = np.zeros(5000)
    assert named(a=long) == named(a=long.copy()) != named(a=np.where(np.arange(5000) == 2000, 1, long))


@pytest.mark.parametrize("kind", [int, np.int64, np.float32, np.bool_])
def test_a_number_in_an_example_is_part_of_the_data_set(kind):
    def numbers(label):
        return fingerprint(arrays_in([(np.arange(3), kind(label))]))

    assert numbers(0) == numbers(0) != numbers(1)


def test_data_and_base_are_hashed_once_and_not_at_each_checkpoint(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("minipeft.train.trainer.fingerprint", lambda items: str(hashed.append(len(list(items)))))
    monkeypatch.setattr("minipeft.train.trainer.frozen_fingerprint", lambda model: hashed.append("base"))
    trainer(tmp_path).train()
    assert hashed == [2 * 16, 2 * 4, "base"]


DAMAGES = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "one bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "emptied": lambda data: b"",
    "foreign": lambda data: b'{"epoch": 3}' if data[:1] == b"{" else b"PK\x03\x04 not this" + bytes(len(data)),
    "edited": lambda data: data.replace(b'"step": 2', b'"step": 1'),
    "missing": None,
}
FILES = ["model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"]


@pytest.mark.parametrize("name, how", [(n, h) for n in FILES for h in DAMAGES if h != "edited" or n == "state.json"])
def test_a_damaged_file_is_named_with_the_reason(tmp_path, finished, name, how):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoint-2" / name
    file.unlink() if how == "missing" else file.write_bytes(DAMAGES[how](file.read_bytes()))
    model = tiny_model(0.1, seed=7)
    before = weights(model)
    reason = "truncated|not valid JSON|checksum|bytes where|missing|no such file|not the state of a minipeft checkpoint"
    with pytest.raises(CheckpointError, match=f"{name}: .*({reason})"):
        trainer(run, model=model, max_steps=2).train(resume_from_checkpoint=True)
    assert_same_bytes(weights(model), before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    trainer(directory, max_steps=2).train()
    return directory


def test_a_checkpoint_of_another_version_or_of_no_trainer_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"w": np.ones(3, np.float32)}}, {"note": 1}, keep=1)
    step, arrays, state = load_checkpoint(tmp_path / "checkpoint-1")
    assert (step, arrays["model"]["w"].tolist(), state) == (1, [1, 1, 1], {"note": 1})
    with pytest.raises(ValueError, match="checkpoint-1 exists already"):
        save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    where = tmp_path / "checkpoint-1" / "state.json"
    where.write_text(where.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(CheckpointError, match="format version 1; this package reads version 2"):
        load_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_checkpoint(tmp_path / "checkpoint-5")
    save_checkpoint(tmp_path, 2, {"model": {"w": np.ones(3, np.float32)}}, {"run": {}}, keep=1)
    reason = "checkpoint-2: was not written by a trainer: it has no identity, metrics, optimizer, state, stopped"
    with pytest.raises(CheckpointError, match=reason):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", [b"", b'{"step": 1}\n{"ste', b"\xff no JSON\n" * 99, None], ids=["cut", "torn", "other", "gone"])
def test_whatever_has_become_of_the_metrics_file_it_is_what_the_checkpoint_knows(tmp_path, finished, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").unlink() if damage is None else (run / "metrics.jsonl").write_bytes(damage)
    result = trainer(run, max_steps=2).train(resume_from_checkpoint=True)
    assert [step for step, _ in result.losses()] == [1, 2]
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_write_that_fails_leaves_no_trace(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, {"model": {"w": np.ones(3, np.float32)}}, {"note": object()}, keep=1)
    assert list(tmp_path.iterdir()) == []


def signed(path, change):
    """Change what is in a checkpoint and give it the checksums of what is in it then."""
    body = json.loads((path / "state.json").read_text())
    change(body)
    for name, entry in body["files"].items() if isinstance(body.get("files"), dict) else ():
        if isinstance(entry, dict) and (path / name).is_file():
            data = (path / name).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    del body["sha256"]
    text = json.dumps(body, sort_keys=True).encode()
    (path / "state.json").write_text(json.dumps({**body, "sha256": hashlib.sha256(text).hexdigest()}))


def within(*path, value):
    """A change: the value at a path of the body becomes another; None: it is deleted."""

    def change(body):
        *first, last = path
        for key in first:
            body = body[key]
        body[last] = value
        if value is None:
            del body[last]

    return change


@pytest.mark.parametrize(
    "change",
    [
        within("files", value=None), within("files", value=5), within("files", value={"model.safetensors": 5}), within("state", value=5),
        within("files", "../outside.safetensors", value={"bytes": 8, "sha256": hashlib.sha256(b"outside!").hexdigest()}),
        within("step", value="3"), within("step", value=-3), within("step", value=2.5), within("step", value=10**30),
        within("state", "stopped", value="no"), within("state", "identity", value=[]),
        *(within("state", "metrics", value=lines) for lines in (5, "{", "5\n", '{"step": "x"}\n', '{"step": 1, "loss": [1]}\n')),
        within("state", "optimizer", value={}), within("state", "optimizer", "state", "0", "step", value=-5),
        within("state", "optimizer", "param_groups", 0, "betas", value=[0.9]),
        within("state", "optimizer", "param_groups", 0, "lr", value="x"),
        within("state", "optimizer", "param_groups", 0, "weight_decay", value=True and "x"),
        within("state", "state", value={"best_step": "x"}), within("state", "state", value={"nothing": 1}),
        within("state", "state", "best_eval_loss", value="x"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_form_is_refused_though_its_checksums_agree(tmp_path, change):
    interrupted(tmp_path / "run", 3)
    (tmp_path / "outside.safetensors").write_bytes(b"outside!")
    (tmp_path / "run" / "outside.safetensors").write_bytes(b"outside!")
    path = mp.train.last_checkpoint(tmp_path / "run")
    signed(path, change)
    with pytest.raises(CheckpointError):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("file", ["model", "optimizer", "best", "callbacks"])
@pytest.mark.parametrize("damage", ["shape", "name", "bytes"])
def test_arrays_that_are_not_the_runs_are_refused_though_their_checksums_agree(tmp_path, file, damage):
    def adapted():
        return mp.get_peft_model(tiny_model(), mp.AdaLoraConfig(total_step=9, init_r=3, target_r=2, target_modules=["q_proj"]))

    interrupted(tmp_path, 3, model=adapted())
    path = mp.train.last_checkpoint(tmp_path)
    arrays = {name: np.array(array) for name, array in read_safetensors(path / f"{file}.safetensors")[0].items()}
    name = next(iter(arrays))
    if damage == "shape":
        arrays[name] = np.stack([arrays[name], arrays[name]])
    elif damage == "name":
        arrays["other"] = arrays.pop(name)
    write_safetensors(path / f"{file}.safetensors", arrays)
    if damage == "bytes":
        (path / f"{file}.safetensors").write_bytes(b"no safetensors")
    signed(path, lambda body: None)
    run = trainer(tmp_path, model=adapted())
    before = weights(run.model)
    with pytest.raises(CheckpointError):
        run.train(resume_from_checkpoint=True)
    assert_same_bytes(weights(run.model), before)
