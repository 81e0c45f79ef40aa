"""The timeline of a step: its peak is the ledger's, its ops are those that run, its bytes what tracemalloc sees."""

from __future__ import annotations

import json

import accounting_cases
import numpy as np
import pytest
from accounting_cases import CONFIGS, METHODS, QUANTIZED, built

import minipeft as mp
from minipeft.accounting import memory_ledger, timeline, what_ifs
from minipeft.accounting.shapes import Meter, ShapeArray
from minipeft.accounting.timeline_shown import block_of, chrome
from minipeft.autograd import ops as F
from minipeft.autograd.tensor import Tensor
from minipeft.book.pictures import describe

dialect, one_thread = accounting_cases.dialect, accounting_cases.one_thread
SHOWN = (
    "full", "head", "lora", "lora, every layer", "lora with dropout", "dora", "qlora", "adalora", "oft",
    "prefix", "prompt",
)  # fmt: skip
STEP = ("activations", "logits", "working memory", "gradients")


def course(dialect, method, batch=2, seq_len=64, **options):
    return timeline(CONFIGS[dialect], METHODS[method], batch, seq_len, **QUANTIZED.get(method, {}), **options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", SHOWN)
def test_the_peak_is_the_ledgers_line_by_line(dialect, method, checkpointing):
    found = course(dialect, method, checkpointing=checkpointing)
    ledger = memory_ledger(
        CONFIGS[dialect], METHODS[method], 2, 64, checkpointing=checkpointing, **QUANTIZED.get(method, {})
    )
    assert found.peak == ledger.total
    assert found.lines_at_peak == dict(ledger.lines)
    of_model = timeline(built(dialect, method), batch=2, seq_len=64, checkpointing=checkpointing)
    assert of_model.events == found.events and (of_model.live == found.live).all()


@pytest.mark.parametrize("precision", ["mixed", "mixed-float32-gradients", "bfloat16", "float16-base"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "momentum", "sgd"])
def test_the_peak_is_the_ledgers_in_other_precisions_and_with_other_optimizers(precision, optimizer):
    for batch, checkpointing in ((1, False), (16, False), (16, True)):
        options = dict(
            batch=batch, seq_len=96, optimizer=optimizer, precision=precision, checkpointing=checkpointing
        )
        assert timeline(CONFIGS["llama"], **options).peak == memory_ledger(CONFIGS["llama"], **options).total


def test_gradients_of_other_bytes_than_activations_count_with_theirs_from_the_moment_they_are_made():
    with Meter(2, gradients=4) as meter:
        w = Tensor(ShapeArray.uncounted(meter, (64, 64)), requires_grad=True)
        x = Tensor(ShapeArray.uncounted(meter, (8, 64)))
        meter.backward(F.sum(F.linear(x, w)))
        assert meter.lines["gradients"] == 4 * 64 * 64
        assert meter.peak == sum(meter.at_peak.values()) and meter.at_peak["gradients"] == 4 * 64 * 64


def test_the_op_at_the_peak_is_named_with_its_module_and_phase():
    at = timeline("gpt2", None, 1, 512).at_peak
    assert at == ("embedding", "transformer.wte", "backward", True)
    assert str(at) == "embedding (pullback) in transformer.wte, backward"
    lora = mp.LoraConfig(target_modules="all-linear")
    assert timeline("llama-7b", lora, 1, 512).at_peak.op == "linear_cross_entropy"
    again = timeline("llama-7b", lora, 1, 512, checkpointing=True).at_peak
    assert (again.op, again.path, again.phase) == ("swiglu", "base_model.model.layers.31.mlp", "backward")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_events_are_the_ops_of_modules_in_three_phases(dialect, checkpointing):
    found = course(dialect, "lora, every layer", checkpointing=checkpointing)
    assert [phase for phase, *_ in found.phases()] == ["forward", "backward", "optimizer"]
    paths = {path for path, _ in built(dialect, "lora, every layer").named_modules()}
    assert {event.path for event in found.events} <= paths
    forward, backward = ([e for e in found.events if e.phase == phase] for phase in ("forward", "backward"))
    assert not any(event.pullback for event in forward)
    again = {(event.op, event.path) for event in backward if not event.pullback}
    assert again <= {(event.op, event.path) for event in forward}
    assert bool(again) == checkpointing and all(block_of(path) for _, path in again)
    assert len({event.path for event in backward if event.pullback}) > 20


def test_what_lives_at_the_peak_sums_to_its_lines_and_is_known_by_its_maker():
    for checkpointing in (False, True):
        found = timeline("gpt2", None, 1, 128, checkpointing=checkpointing)
        for line in STEP:
            assert sum(g.nbytes for g in found.largest if g.line == line) == found.lines_at_peak.get(line, 0)
        up = next(g for g in found.largest if g.shape == (768, 3072) and g.line == "gradients")
        assert (up.op, up.path, up.n) == ("addmm", "transformer.h.*.mlp.c_fc", 12)
        assert [g.nbytes for g in found.largest] == sorted((g.nbytes for g in found.largest), reverse=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora, every layer", "lora with dropout", "qlora", "prompt"])
def test_every_op_of_a_step_that_is_run_is_within_3_percent_of_the_peak(dialect, method, checkpointing):
    found = course(dialect, method, 3, 128, checkpointing=checkpointing, measure=True)
    assert len(found.measured) == len(found.events)
    gap, event = found.deviation
    assert abs(gap) < 0.03 * found.peak, event
    assert found.measured.max() == pytest.approx(found.peak, rel=0.03)


def test_a_model_that_is_measured_stays_as_it_is():
    model = built("llama", "lora")
    before = {name: array.copy() for name, array in model.state_dict().items()}
    found = timeline(model, batch=2, seq_len=32, measure=True)
    assert found.measured.max() == pytest.approx(found.peak, rel=0.05)
    assert all((array == before[name]).all() for name, array in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_classifier_has_a_timeline_too():
    model, labels = mp.SequenceClassifier(mp.Transformer(CONFIGS["llama"], seed=0), num_labels=3), np.arange(4) % 3
    found = timeline(model, batch=4, seq_len=128, labels=labels, measure=True)
    assert found.peak == memory_ledger(model, batch=4, seq_len=128, labels=labels).total
    assert found.measured.max() == pytest.approx(found.peak, rel=0.05)


def test_the_trace_is_well_formed_and_holds_the_peak(tmp_path):
    found = course("llama", "lora, every layer", checkpointing=True, measure=True)
    found.to_chrome(tmp_path / "step.json")
    trace = json.loads((tmp_path / "step.json").read_text())
    assert trace == json.loads(json.dumps(chrome(found)))
    events = trace["traceEvents"]
    assert all({"name", "ph", "pid", "tid"} <= event.keys() for event in events)
    assert all(event["ts"] >= 0 for event in events if event["ph"] != "M")
    (instant,) = (event for event in events if event["ph"] == "i")
    op, path, phase, pullback = found.at_peak
    named = {"bytes": found.peak, "op": op, "module": path, "phase": phase, "pullback": pullback}
    assert instant["s"] == "g" and instant["args"] == named == trace["otherData"]["peak"]
    assert instant["ts"] == int(found.total.argmax())
    spans, open_until = [event for event in events if event["ph"] == "X"], []
    for span in sorted(spans, key=lambda span: span["ts"]):  # stable: parents are written first
        open_until = [end for end in open_until if end > span["ts"]]
        assert all(span["ts"] + span["dur"] <= end for end in open_until), "spans are nested"
        open_until.append(span["ts"] + span["dur"])
    assert [span["name"] for span in spans if span["cat"] == "phase"] == ["forward", "backward", "optimizer"]
    blocks = [span["name"] for span in spans if span["cat"] == "block"]
    assert blocks == ["layers.0", "layers.1", "layers.1", "layers.0"]
    assert sum(span["cat"] == "op" for span in spans) == len(found.events)
    for name, expected in (("", found.total), (", sum", found.total), (", measured", found.measured)):
        counted = [event for event in events if event["ph"] == "C" and event["name"] == f"live bytes{name}"]
        now, at = None, {event["ts"]: sum(event["args"].values()) for event in counted}
        for i, n in enumerate(expected.tolist()):
            now = at.get(i, now)
            assert now == n, (name, i)
    assert (tmp_path / "step.json").stat().st_size < 600 * len(found.events)


def test_the_picture_is_a_png_and_a_figure_that_a_notebook_shows_and_says_in_words(tmp_path, rendered):
    found = course("gpt2", "full")
    figure = found.plot(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert f"forward, backward, optimizer; {found.peak:,} bytes at the peak, in {found.at_peak}" in describe(figure)
    assert f"activations {found.lines_at_peak['activations']:,}" in describe(figure)


def test_what_ifs_change_one_thing_each():
    lora = mp.LoraConfig(r=8)
    found = what_ifs(CONFIGS["llama"], lora, 2, 128)
    assert list(found) == ["rank 4", "rank 16", "length 64", "length 256", "checkpointing", "adamw_8bit", "sgd"]
    for name, options in {
        "rank 16": dict(config=mp.LoraConfig(r=16), seq_len=128), "length 256": dict(config=lora, seq_len=256),
        "checkpointing": dict(config=lora, seq_len=128, checkpointing=True),
        "sgd": dict(config=lora, seq_len=128, optimizer="sgd"),
    }.items():  # fmt: skip
        assert found[name].peak == memory_ledger(CONFIGS["llama"], batch=2, **options).total, name
    longer = what_ifs(CONFIGS["llama"], mp.PromptTuningConfig(num_virtual_tokens=20), 2, 200, checkpointing=True)
    assert "this model's 256 positions" in longer["length 400"] and "no checkpointing" in longer
    assert {"virtual tokens 10", "virtual tokens 40"} <= longer.keys()
    assert list(what_ifs(built("gpt2", "lora"), batch=1, seq_len=8))[:2] == ["length 4", "length 16"]
    assert "rank 6 to 4" in what_ifs(CONFIGS["llama"], mp.AdaLoraConfig(init_r=12, target_r=8, total_step=10), 1, 8)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(config="frozen"), "nothing of the model is trained, so there is no step"),
    (dict(model="bert-base"), r"activations are known of .*gpt2, llama"),
    (dict(optimizer="lion"), "optimizer must be one of adamw"),
    (dict(seq_len=0), "seq_len must be a positive integer, not 0"),
    (dict(measure=True, precision="bfloat16"), "a step is run in float32; precision='bfloat16' is only predicted"),
    (dict(model="llama-65b", measure=True), r"the step needs 1,\d+,\d+,\d+,\d+ bytes, and this machine has"),
])
def test_nonsense_is_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        timeline(**{"model": "gpt2", "seq_len": 16, **arguments})
