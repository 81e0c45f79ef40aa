"""Data-parallel training: the same weights as one process, the bytes that move, workers that are lost."""

import multiprocessing
import os
import signal
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from test_train import counting, tiny_model, weights

import minipeft as mp
from minipeft.executors import LocalProcesses
from minipeft.train import Callback, Trainer, TrainingArguments
from minipeft.train.batches import Batch, collate, collate_packed, in_rows, in_two

OPTIONS = {"max_steps": 3, "learning_rate": 0.02, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


def processes():
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


def adapted(dropout=0.0):
    return mp.get_peft_model(tiny_model(dropout), mp.LoraConfig(r=2, init_lora_weights=False))


def trained(model, examples, executor=None, callbacks=(), **options):
    trainer = Trainer(model, examples, args=TrainingArguments(**{**OPTIONS, **options}))
    result = trainer.train(executor=executor, callbacks=callbacks)
    return weights(model), result


def same(together, alone):
    for key, array in alone.items():
        np.testing.assert_allclose(together[key], array, rtol=1e-5, atol=1e-6, err_msg=key)


def test_processes_train_the_weights_that_one_process_trains_and_move_what_is_trained(rng):
    examples = counting(24, rng, shortest=5, longest=12)
    moved = {}
    with processes() as executor:
        for name, make in (("lora", lambda: adapted(0.1)), ("full", lambda: tiny_model(0.1))):
            (alone, result), (together, spread) = trained(make(), examples), trained(make(), examples, executor)
            same(together, alone)
            np.testing.assert_allclose(result.losses(), spread.losses(), rtol=1e-6)
            moved[name] = dict(spread.losses("bytes_moved"))
            model = make()
            size = sum(p.data.nbytes for p in model.parameters() if p.requires_grad)
            tokens = moved[name][3] - 3 * 2 * size  # there and back, for each of three batches
            assert 0 < tokens < 3 * 4 * 12 * 3 * 8, "beside them, ids, labels and masks"
            assert moved[name][1] > moved[name][3] + sum(p.data.nbytes for p in model.parameters()), "the model, in the first step"
    assert "bytes_moved" not in result.history[0] and moved["lora"][3] < 0.4 * moved["full"][3]


def test_a_batch_is_cut_into_rows_for_workers_of_whom_there_are_more_than_batches(rng):
    examples = counting(24, rng, shortest=5, longest=12)
    alone, result = trained(adapted(0.1), examples, gradient_accumulation_steps=1)
    together, spread = trained(adapted(0.1), examples, 2, gradient_accumulation_steps=1)
    same(together, alone)
    np.testing.assert_allclose(result.losses(), spread.losses(), rtol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("kind", ["full", "lora", "packed", "checkpointed"])
def test_threads_that_share_the_rows_of_a_batch_train_the_weights_of_one(kind, accumulated, rng, monkeypatch, threads):
    def run(n):
        threads(n)
        model = tiny_model(0.1 if kind != "packed" else 0.0) if kind != "lora" else adapted(0.1)
        model.gradient_checkpointing = kind == "checkpointed"
        options = {"gradient_accumulation_steps": accumulated, "packing": kind == "packed"}
        return trained(model, examples, optim="sgd", **options)  # Adam's first steps are g / |g|, also of a rounding error

    examples = counting(24, rng, shortest=5, longest=12)
    alone, result = run(1)
    monkeypatch.setattr("minipeft.train.parallel.WORK", 0)
    calls = []
    monkeypatch.setattr("minipeft.train.parallel.in_rows", lambda batch, n: calls.append(n) or in_rows(batch, n))
    (together, spread), (again, _) = run(3), run(3)
    assert calls == [3] * 2 * 3 * accumulated
    same(together, alone)
    np.testing.assert_allclose(result.losses(), spread.losses(), rtol=1e-6)
    for name, array in together.items():
        np.testing.assert_array_equal(again[name], array, "the same number of threads gives the same bytes")


def test_rows_are_not_cut_where_somebody_looks_on_or_threads_have_too_little_work(rng, monkeypatch, threads):
    threads(2)
    examples, calls = counting(24, rng, shortest=8, longest=8), []
    monkeypatch.setattr("minipeft.train.parallel.in_rows", lambda batch, n: calls.append(n) or in_rows(batch, n))
    trained(tiny_model(), examples)
    monkeypatch.setattr("minipeft.train.parallel.WORK", 0)
    model = tiny_model()
    with model.watch("*.mlp"):
        trained(model, examples)
    trained(tiny_model(), examples, bf16=True)
    monkeypatch.setattr("minipeft.train.parallel.GRADIENTS", 1000)
    trained(tiny_model(), examples)
    assert not calls


@pytest.mark.parametrize("many", [1, 2])
def test_long_and_short_rows_are_computed_in_turn_where_much_would_be_padding(many, rng, monkeypatch, threads):
    """By one thread, and where the gradients of several would take too much memory."""

    def run(examples):
        calls.clear()
        return trained(adapted(0.1), examples, optim="sgd")[0]

    threads(many)
    calls, lengths = [], [12, 5, 5, 5]
    monkeypatch.setattr("minipeft.train.parallel.in_two", lambda batch: calls.append(in_two(batch)) or calls[-1])
    monkeypatch.setattr("minipeft.train.parallel.GRADIENTS", 0)
    examples = [counting(1, rng, shortest=lengths[i % 4], longest=lengths[i % 4])[0] for i in range(24)]
    whole, nothing = run(examples), list(calls)
    monkeypatch.setattr("minipeft.train.parallel.WORK", 0)
    same(run(examples), whole)
    assert not nothing and len(calls) == 9 and {len(parts) for parts in calls} == {1, 2}
    run(counting(24, rng, shortest=8, longest=8))
    assert {len(parts) for parts in calls} == {1}


def test_a_loss_of_ones_own_sees_whole_batches(rng, monkeypatch, threads):
    class ByRow(mp.Transformer):
        def loss(self, input_ids, labels, **arguments):
            assert len(input_ids) == 4 and arguments["attention_mask"] is not None
            return super().loss(input_ids, labels, **arguments)

    threads(2)
    monkeypatch.setattr("minipeft.train.parallel.WORK", 0)
    trained(ByRow(tiny_model().config, seed=0), [one for n in (5, 6, 7, 12) for one in counting(6, rng, shortest=n, longest=n)])


def test_a_step_with_little_work_wakes_no_thread_and_one_with_more_does(rng, monkeypatch, threads):
    threads(2)
    seen, loss = set(), mp.Transformer.loss

    def split(rows):
        seen.add(threading.get_ident())

    def spread(self, *args, **options):
        mp.backend.split_rows(split, 2, 1 << 20)
        return loss(self, *args, **options)

    monkeypatch.setattr(mp.Transformer, "loss", spread)
    trained(tiny_model(), counting(24, rng))
    assert seen == {threading.get_ident()}
    monkeypatch.setattr("minipeft.train.parallel.WORK", 0)
    monkeypatch.setattr("minipeft.train.parallel.GRADIENTS", 1000)  # so that rows are not cut
    trained(tiny_model(), counting(24, rng))
    assert len(seen) == 2


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 0, 1, 1), (0, 0, 1, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_parts_hold_each_row_once_and_labels_that_count(counts, n):
    labels = np.full((4, 6), -100)
    for row, count in zip(labels, counts):
        row[1 : 1 + count] = 7
    batch = Batch({"input_ids": np.arange(24).reshape(4, 6), "labels": labels, "attention_mask": None}, sum(counts), 24)
    parts = [([0, 1, 2, 3] if rows is None else rows, part) for rows, part in in_rows(batch, n)]
    assert sorted(row for rows, _ in parts for row in rows) == [0, 1, 2, 3] and len(parts) <= n
    for rows, part in parts:
        np.testing.assert_array_equal(part.arguments["input_ids"], batch.arguments["input_ids"][rows])
    assert sum(part.weight for _, part in parts) == batch.weight and sum(part.tokens for _, part in parts) == 24
    assert len(parts) == 1 or all(part.weight for _, part in parts)


ALL = None
LENGTHS = [
    ([9, 3, 4, 4, 3], lambda batch: in_rows(batch, 2), [[9], [4, 4, 3, 3]]),  # at most 16 tokens; else 18 or more
    ([5, 5, 5, 5], lambda batch: in_rows(batch, 2), [[5, 5], [5, 5]]),
    ([2, 8], lambda batch: in_rows(batch, 5), [[8], [2]]),
    ([5, 20, 5, 5, 5, 5], lambda batch: in_rows(batch, 2), [[20], [5, 5, 5, 5, 5]]),
    ([20, 10, 10, 5, 5, 5, 5, 5], in_two, [[20, 10, 10], [5, 5, 5, 5, 5]]),  # 85 tokens; 90 with 20 alone
    ([10, 10, 10, 9], in_two, ALL),
]


@pytest.mark.parametrize(("lengths", "cut", "parts"), LENGTHS)
def test_rows_of_about_one_length_are_padded_together(lengths, cut, parts):
    batch = collate([(np.full(m, m), np.full(m, m)) for m in lengths])
    found = cut(batch)
    if parts is ALL:
        assert found == [(None, batch)]
        return
    assert [[lengths[row] for row in rows] for rows, _ in found] == parts
    for rows, part in found:
        assert part.arguments["input_ids"].shape == part.arguments["labels"].shape == (len(rows), lengths[rows[0]])
        assert part.arguments["attention_mask"] is None and part.tokens == sum(lengths[row] for row in rows)


def test_packed_rows_keep_their_masks():
    batch = collate_packed([(np.full(m, m), np.full(m, m)) for m in (8, 5, 3, 4, 4)])
    assert in_two(batch) == [(None, batch)]
    parts = in_rows(batch, 3)
    assert len(parts) == 3 and sum(part.tokens for _, part in parts) == batch.tokens == 24
    assert all(part.arguments["attention_mask"].shape == (1, 1, 8, 8) for _, part in parts)


def test_threads_each_have_a_model_of_their_own(rng):
    examples = counting(24, rng)
    with ThreadPoolExecutor(3) as executor:
        together, _ = trained(adapted(), examples, executor)
    same(together, trained(adapted(), examples)[0])


class Kill(Callback):
    """Kills a worker after step 1."""

    def __init__(self, executor):
        self.executor = executor

    def after_step(self, model, step, record):
        if step == 1:
            first = next(iter(self.executor._processes))
            os.kill(getattr(first, "pid", first), signal.SIGKILL)


def test_a_batch_whose_worker_is_lost_is_computed_again(rng):
    examples = counting(24, rng)
    with LocalProcesses(2) as executor:
        together, result = trained(adapted(), examples, executor, [Kill(executor)])
    assert result.steps == 3
    same(together, trained(adapted(), examples)[0])
    with processes() as executor, pytest.raises(RuntimeError, match=r"a worker was lost, .* executor=2 is two processes"):
        trained(adapted(), examples, executor, [Kill(executor)])


def test_what_workers_cannot_do_is_named(rng):
    examples = counting(24, rng)
    for executor, message in ((13, "a step has 12 parts for 13 workers: use fewer workers"), (0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            trained(tiny_model(), examples, executor)
    trainer = Trainer(tiny_model(), examples, args=TrainingArguments(**OPTIONS), loss=lambda model, **batch: model.loss(**batch))
    with pytest.raises(ValueError, match="a step has 3 parts for 4 workers: set gradient_accumulation_steps to 4"):
        trainer.train(executor=4)
    with processes() as executor, pytest.raises(ValueError, match="the loss must be a function of a module to reach"):
        trainer.train(executor=executor)
    assert trainer.train(executor=2).steps == 3, "cloudpickle sends a lambda"


def refuse(model, **batch):
    raise ValueError("the loss reads no pickle")


def test_an_error_of_the_loss_is_raised_as_it_is(rng):
    trainer = Trainer(tiny_model(), counting(24, rng), args=TrainingArguments(**OPTIONS), loss=refuse)
    with pytest.raises(ValueError, match=r"^the loss reads no pickle$"):
        trainer.train(executor=2)


def test_a_constrained_oft_is_projected_where_the_weights_are(rng):
    def make():
        config = mp.peft.OFTConfig(r=0, oft_block_size=4, coft=True, eps=1e-2, target_modules=["q_proj", "v_proj"])
        return mp.get_peft_model(tiny_model(), config)

    examples = counting(24, rng)
    with ThreadPoolExecutor(3) as executor:
        together, _ = trained(make(), examples, executor)
    same(together, trained(make(), examples)[0])


def test_threads_that_share_a_constrained_oft_project_it_once(rng):
    config = mp.peft.OFTConfig(oft_block_size=64, coft=True, eps=1e-2, target_modules=["0"])
    ((_, oft),) = mp.get_peft_model(mp.nn.Sequential(mp.nn.Linear(512, 8)), config).parts("default")
    together = threading.Barrier(4)
    for _ in range(20):
        start = rng.standard_normal(oft.oft_R.shape).astype(np.float32)
        oft.oft_R.data = start.copy()
        alone, projected = oft.rotations().data, oft.oft_R.data.copy()
        np.testing.assert_allclose(np.sqrt(2 * (projected**2).sum(axis=1)), 1e-2 / np.sqrt(8), rtol=1e-6)
        oft.oft_R.data = start
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: (together.wait(), oft.rotations().data)[1], range(4)))
        assert all(np.array_equal(alone, R) for R in found) and np.array_equal(oft.oft_R.data, projected)


def test_a_dask_cluster_computes_the_batches(rng):
    distributed = pytest.importorskip("distributed")
    examples = counting(24, rng)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        together, _ = trained(adapted(), examples, client)
    same(together, trained(adapted(), examples)[0])


@pytest.mark.parametrize("lacking", ["a function", "a result"])
def test_what_another_process_cannot_open_is_an_error_and_the_process_goes_on(lacking, monkeypatch):
    """A module that was made here, as from a file by its path, or there."""

    def made_there():
        sys.modules["made_there"] = module = types.ModuleType("made_there")
        module.Thing = type("Thing", (), {"__module__": "made_there"})
        return module.Thing()

    monkeypatch.setitem(sys.modules, "made_here", module := types.ModuleType("made_here"))
    exec("def double(x): return 2 * x", module.__dict__)
    task = (module.double, 3) if lacking == "a function" else (made_there,)
    with LocalProcesses(1) as processes:
        with pytest.raises(ModuleNotFoundError, match="No module named 'made_"):
            processes.submit(*task).result(timeout=20)
        assert processes.submit(abs, -3).result(timeout=20) == 3
    assert processes.deaths == []


def leave():
    raise SystemExit(0)


def test_a_task_that_exits_ends_neither_its_process_nor_the_one_that_waits():
    with LocalProcesses(1) as processes:
        with pytest.raises(RuntimeError, match=r"it called sys.exit\(0\)"):
            processes.submit(leave).result()
        assert processes.submit(len, [1, 2]).result() == 2
