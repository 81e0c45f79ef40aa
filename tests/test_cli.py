"""The command line: help, errors in one line with exit status 2, and chains of tiny runs that a user would make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from cli_helpers import continued, jsonl, run, same_bytes, tiny, weights, written

import minipeft as mp
from minipeft.cli import COMMANDS
from minipeft.cli.models import save_template

PAIRS = [("one", "uno"), ("two", "due"), ("three", "tre"), ("four", "quattro"), ("five", "cinque"), ("six", "sei"),
         ("seven", "sette"), ("eight", "otto"), ("nine", "nove"), ("ten", "dieci"), ("hundred", "cento")]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(
        tmp_path_factory.mktemp("data") / "pairs.jsonl",
        ({"prompt": f"Q: {a}\nA:", "completion": f" {b}"} for a, b in PAIRS),
    )


def python(*argv, **options):
    environment = {**os.environ, "MINIPEFT_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, env=environment, **options
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_and_loads_no_array_library():
    code = "import sys; from minipeft.cli import main; main(sys.argv[1:]); sys.exit('numpy' in sys.modules)"
    for command in ("finetune", "generate", "evaluate", "reward", "dpo", "ppo", "count", "memory"):
        assert python("-c", code, command, "--help").returncode == 0, command
    result = python("-c", code, "--help")
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert re.search(rf"^ +{name}  +\w", result.stdout, re.M), result.stdout
    assert "minipeft finetune --data" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_explains_its_options_and_gives_examples(name, capsys):
    assert run(name, "--help") == 0
    out = capsys.readouterr().out
    _, _, examples = out.partition("\nexamples:\n")
    assert examples.startswith(f"  minipeft {name}")
    for line in examples.splitlines():  # every option that an example uses exists
        for word in line.split() if line.startswith(f"  minipeft {name}") else ():
            assert not word.startswith("--") or f"\n  {word}" in out, word


def test_version_and_the_module_form():
    result = python("-m", "minipeft", "--version")
    assert (result.returncode, result.stdout) == (0, f"minipeft {mp.__version__}\n")


def test_no_command_shows_the_help(capsys):
    assert run() == 0
    assert "commands:" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_template_does_nothing_to_running_text(model, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was a very good year. " * 200)
    argv = ["finetune", "--data", tmp_path / "book.txt", "--model", model, "--output", tmp_path / "o", "--template", "chat"]
    assert run(*argv) == 2 and "running text takes none" in capsys.readouterr().err


def test_a_record_that_is_too_long_is_named_by_its_number_in_the_file(model, tmp_path, capsys):
    """Wherever the split puts it."""
    for bad in (2, 7):
        rows = [{"prompt": f"Number {i}:", "completion": " word" * (300 if i == bad else 1)} for i in range(1, 9)]
        argv = ["--data", jsonl(tmp_path / "a.jsonl", rows), "--model", model, "--max-length", 64, "--output", tmp_path / "o"]
        assert run("finetune", *argv) == 2
        assert f"a.jsonl: 1 of 8 records are longer than 64 tokens, the first of them record {bad} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["comparre"], "unknown command 'comparre'; did you mean compare?"),
        (["--versio"], "did you mean --version?"),
        (["--threads", "1", "generate"], "--threads 1 stands before the command: options other than --debug and --plugin come after it"),
        (["compare", "--step", "3"], "unknown option '--step'; did you mean --steps"),
        (["compare", "--methods", "ful"], "did you mean full?"),
        (["compare", "--steps", "0"], "--steps: must be an integer of at least 1, not '0'"),
        (["compare", "--task", "rewrite", "--data", "x.jsonl"], "--task and --data exclude each other: give one of them"),
        (["compare", "--task", "rewrit"], "did you mean rewrite?"),
        (["finetune", "--output", "o"], "--data"),
        (["finetune", "--data", "d.jsonl"], "--output"),
        (["finetune", "--data", "d.jsonl", "--output", "o", "--method", "heads"], "did you mean head?"),
        (["finetune", "--data", "d.jsonl", "--output", "o", "--lr", "nan"], "--lr: must be a number above 0"),
        (["finetune", "--data", "d.jsonl", "--output", "o", "--resume", "--overwrite"], "give one of them"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--bf16", "--fp16"], "--bf16 and --fp16 exclude each other"),
        (["finetune", "--data", "{data}", "--output", "o", "extra"], "unknown argument 'extra'"),
        (["finetune", "--data", "missing.jsonl", "--output", "o"], "missing.jsonl"),
        (["finetune", "--data", "{data}", "--output", "{data}"], "is a file"),
        (["finetune", "--data", "{data}", "--output", "{model}"], "is not empty"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "nowhere"], "nowhere"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--max-length", "999"], "192 posit"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--max-length", "5"], "pairs.jsonl: 11 of 11 records are longer than 5 tokens, the first of them record 1 with 9; raise --max-length, or give --overflow truncate or drop"),
        (["finetune", "--data", "{data}", "--output", "o", "--template", "alpacca"], "alpaca"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--template", "{{input}}"], "{input}"),
        (["finetune", "--data", "{data}", "--output", "o", "--validation", "2"], "--validation"),
        (["finetune", "--data", "{data}", "--output", "o", "--validation", "no.jsonl"], "no.jsonl"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--resume"], "no checkpoint"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--method", "bitfit"], "this model has none; take LN tuning (ln), or a model"),
        (["finetune", "--data", "{data}", "--output", "o", "--model", "{model}", "--method", "lora", "--target", "nope"], "--target: no module is called 'nope'"),
        (["finetune", "--data", "{bad}", "--output", "o"], "bad.jsonl:2: not valid JSON"),
        (["finetune", "--data", "{preferences}", "--output", "o"], "preference"),
        (["finetune", "--data", "{data}", "--output", "o", "--steps", "1", "--epochs", "1"], "--epochs and --steps exclude each other"),
        (["finetune", "--data", "{data}", "--output", "o", "--validation", "0", "--eval-steps", "1"], "--eval-steps does nothing"),
        (["finetune", "--data", "{data}", "--output", "o", "--columns", "prompt"], "as prompt=question, each field once; 'prompt' is not so"),
        (["evaluate", "--data", "{data}", "--columns", "text=a", "text=b"], "'text=b' has that field twice"),
        (["evaluate", "--data", "{data}", "--columns", "text=body"], "1: columns: there is no field 'body'; the fields are"),
        (["evaluate", "--data", "general-cloze", "--columns", "text=a"], "--columns does nothing with general-cloze"),
        (["generate", "--prompt", "a", "--columns", "text=a"], "--columns does nothing without --prompts"),
        (["compare", "--columns", "text=a"], "--columns does nothing without --data"),
        (["sweep", "--output", "o", "--columns", "text=a"], "--columns does nothing without --data"),
        (["sft", "--output", "o", "--columns", "text=a"], "--columns does nothing without --data"),
        (["ppo", "--output", "o", "--columns", "text=a"], "--columns does nothing without --prompts"),
        (["dpo", "--output", "o", "--columns", "text=a"], "--columns does nothing with generated pairs"),
        (["generate", "--prompts", "{bad}", "--escapes"], "--escapes does nothing without --prompt"),
        (["generate", "--prompt", ""], "prompt 1 is empty"),
        (["generate", "--prompt", "a", "--prompts", "f"], "--prompt and --prompts exclude each other"),
        (["generate", "--prompts", "missing.txt"], "missing.txt: cannot be read (No such file"),
        (["generate", "--prompts", "{bad}"], "bad.jsonl:2: not valid JSON"),
        (["generate", "--prompt", "a", "--top-k", "5"], "give a temperature above 0"),
        (["generate", "--prompt", "a", "--system", "s"], "--chat"),
        (["generate", "--prompt", "a", "--model", "{model}", "--max-new-tokens", "500"], "192 positions"),
        (["generate", "--prompt", "a", "--model", "{model}", "--adapter", "nowhere"], "nowhere"),
        (["generate", "--prompt", "a", "--adapter", "{data}", "nowhere"], "there is no such directory"),
        (["generate", "--chat", "--adapter", "a", "b"], "a conversation is with one --adapter"),
        (["gradcheck", "--op", "gelo"], "gelu"),
        (["lessons", "999"], "999"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_status_2(argv, fragment, model, data, tmp_path, monkeypatch, capsys):
    bad, preferences = tmp_path / "bad.jsonl", tmp_path / "preferences.jsonl"
    bad.write_text('{"text": "one"}\n{"text": \n')
    preferences.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    monkeypatch.chdir(tmp_path)
    names = {"data": data, "model": model, "bad": bad, "preferences": preferences}
    assert run(*[a.format(**names) for a in argv]) == 2
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert lines[-1].startswith("minipeft: error: ") and fragment in lines[-1], err
    assert "Traceback" not in err and sum(line.startswith("minipeft: error") for line in lines) == 1
    assert not (tmp_path / "o").exists() or not any((tmp_path / "o").iterdir())  # nothing half-written


def test_debug_shows_the_traceback_wherever_it_stands():
    for argv in (["--debug", "generate", "--model", "nowhere", "--prompt", "a"],
                 ["generate", "--model", "nowhere", "--prompt", "a", "--debug"]):  # fmt: skip
        result = python("-m", "minipeft", *argv)
        assert result.returncode == 2
        assert result.stderr.startswith("Traceback") and result.stderr.splitlines()[-1].startswith("minipeft: error: ")


def test_columns_are_what_fields_are_called_in_the_file(model, data, tmp_path, capsys):
    """A file of other names gives the bytes that the usual names give."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    own = jsonl(tmp_path / "own.jsonl", [{"id": 1, "question": r["prompt"], "response": r["completion"]} for r in rows])
    columns = ("--columns", "prompt=question", "completion=response")
    options = ("--model", model, "--method", "lora", "--layers", 0, "-r", 1, "--steps", 1)
    for directory, file, more in (("usual", data, ()), ("renamed", own, columns)):
        assert run("finetune", "--data", file, "--validation", file, *options, "--output", tmp_path / directory, *more) == 0
    assert same_bytes("adapter_model.safetensors", tmp_path / "usual", tmp_path / "renamed")
    assert all("layers.0." in name for name in weights(tmp_path / "usual", "adapter_model.safetensors"))
    for command in (("evaluate", "--loss-only", "--data"), ("generate", "--max-new-tokens", 2, "--prompts")):
        capsys.readouterr()
        assert [run(*command, data, "--model", model), out := capsys.readouterr().out] == [0, out] and out
        assert [run(*command, own, "--model", model, *columns), capsys.readouterr().out] == [0, out]


def test_divergence_is_one_line_too(model, data, tmp_path):
    result = python("-m", "minipeft", "finetune", "--data", data, "--model", model, "--output", tmp_path / "o",
                    "--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", "0", "--steps", "5")  # fmt: skip
    assert result.returncode == 2 and "diverged at step" in result.stderr.splitlines()[-1]
    assert "Warning" not in result.stderr


def test_a_missing_gpu_library_is_one_line_that_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    assert run("generate", "--prompt", "a", "--backend", "cupy") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minipeft: error: ") and "minipeft[gpu]" in line


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more(monkeypatch, capsys):
    for bug, name in ((lambda args: {}["key"], "KeyError: 'key'"), (lambda args: None.x, "AttributeError: ")):
        monkeypatch.setattr("minipeft.cli.use_machine", bug)
        assert run("generate", "--prompt", "a") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"minipeft: error: unexpected {name}") and line.endswith("(--debug shows where)")


def test_a_reader_that_leaves_is_no_error(model):
    command = [sys.executable, "-m", "minipeft", "generate", "--model", str(model), "--max-new-tokens", "2"]
    command += ["--batch-size", "1", *(["--prompt", "a"] * 200)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "count --models", "count gpt2"])
def test_a_reader_that_has_left_before_is_no_error_either(command, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(writing, "wb") as gone:
        done = subprocess.run([sys.executable, "-m", "minipeft", *command.split()], stdout=gone, stderr=subprocess.PIPE, env=env)
    assert done.returncode < 2 and done.stderr == b""  # argparse leaves its help unsaid


# ----------------------------------------------------------------------------------------------- finetune, generate


def finetune(model, data, output, *more) -> int:
    return run("finetune", "--model", model, "--data", data, "--output", output, "--steps", "6", "--batch-size", "4",
               "--lr", "0.01", *more)  # fmt: skip


def test_finetune_with_two_rates_for_the_two_factors(model, data, tmp_path, capsys):
    assert finetune(model, data, tmp_path / "plus", "--method", "lora", "--loraplus-lr-ratio", "16") == 0
    assert written(tmp_path / "plus")["options"]["loraplus_lr_ratio"] == 16
    capsys.readouterr()
    assert finetune(model, data, tmp_path / "full", "--loraplus-lr-ratio", "16") == 2
    assert "no lora_B of this model is trained" in capsys.readouterr().err
    assert finetune(model, data, tmp_path / "low", "--method", "lora", "--loraplus-lr-ratio", "0.5") == 2
    assert "must be a number of at least 1" in capsys.readouterr().err


def test_finetune_then_generate(model, data, tmp_path, capsys, rendered):
    output = tmp_path / "tuned"
    assert finetune(model, data, output, "--validation", data) == 0
    out = capsys.readouterr().out
    record = written(output)
    loss = record["held_out_loss"]
    assert loss["after"] < loss["before"] and f"before {loss['before']:.4f}  after {loss['after']:.4f}" in out
    assert record["examples"] == {"training": len(PAIRS), "held_out": len(PAIRS)}
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert not same(weights(model), weights(output))

    tuned, tokenizer = mp.from_pretrained(output)
    expected = continued(tuned, tokenizer, tokenizer.encode("Q: one\nA:"), 5)
    assert run("generate", "--model", output, "--prompt", "Q: one\nA:", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == f"Q: one\nA:{expected}\n"


def test_the_same_command_writes_the_same_weights_and_another_seed_others(model, data, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert finetune(model, data, tmp_path / name, "--seed", seed) == 0
    assert same_bytes("model.safetensors", tmp_path / "a", tmp_path / "b")
    assert not same_bytes("model.safetensors", tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_finetune_in_mixed_precision(precision, model, data, tmp_path):
    assert finetune(model, data, tmp_path / "exact") == finetune(model, data, tmp_path / "mixed", precision) == 0
    assert not same_bytes("model.safetensors", tmp_path / "exact", tmp_path / "mixed")
    assert ('"loss_scale": 65536.0' in (tmp_path / "mixed" / "metrics.jsonl").read_text()) == (precision == "--fp16")


RESUMED = {  # command -> its data, its options, what is saved
    "finetune": ("{pairs}", "--lr 0.01", "model.safetensors"),
    "sft": ("{pairs}", "--lr 0.03 --packing --fp16", "model.safetensors"),
    "reward": ("{preferences}", "--lr 0.02", "model.safetensors"),
    "dpo": ("{preferences}", "--lr 0.01 --method lora", "adapter_model.safetensors"),
    **dict.fromkeys(("ppo", "rloo", "grpo"), ("{prompts}", "--lr 0.001 --mini-batch-size 2 --response-length 6", "model.safetensors")),
}


@pytest.mark.parametrize("command", RESUMED)
def test_an_interrupted_run_resumes_to_the_same_bytes(command, model, data, tmp_path, monkeypatch, capsys):
    (file, options, saved), online = RESUMED[command], command in ("ppo", "rloo", "grpo")
    if online:
        pytest.importorskip("vaderSentiment", reason="needs the extra 'rlhf'")
    preferences = ({"prompt": f"Q: {a}\nA:", "chosen": f" {b}", "rejected": " no"} for a, b in PAIRS)
    jsonl(tmp_path / "preferences.jsonl", preferences)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    file = file.format(pairs=data, preferences=tmp_path / "preferences.jsonl", prompts=tmp_path / "prompts.txt")
    argv = [*(("ppo", "--algorithm", command, "--prompts") if online else (command, "--data")), file, *options.split()]

    def start(name, *more):
        output = tmp_path / name
        return run(*argv, "--model", model, "--output", output, "--batch-size", 4, "--steps", 4, "--save-steps", 2, *more)

    assert start("whole") == 0
    owner, name = (mp.rlhf.OnlineTrainer, "step") if online else (mp.Trainer, "_step")
    step, calls = getattr(owner, name), []

    def interrupted(self, *number):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *number)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert start("parts") == 130
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "minipeft: interrupted; the same command with --resume goes on from the last checkpoint"
    if command in ("finetune", "dpo"):
        option = "--adapter" if command == "dpo" else "--model"
        assert run("generate", option, tmp_path / "parts", "--prompt", "a") == 2
        assert capsys.readouterr().err == (
            f"minipeft: error: {option} {tmp_path / 'parts'} holds a run that has not ended: "
            "end it by its command with --resume\n"
        )
    assert start("parts") == 2  # not silently over what is there
    assert start("parts", "--resume", "--seed", 5) == 2  # another run
    capsys.readouterr()
    if not online:
        assert start("parts", "--resume", "--steps", 5) == 2
        assert "other --steps (4 there, 5 here)" in capsys.readouterr().err
    assert start("parts", "--resume") == 0
    assert same_bytes(saved, tmp_path / "whole", tmp_path / "parts")
    if online:
        assert same_bytes("metrics.jsonl", tmp_path / "whole", tmp_path / "parts")


def test_overwrite_replaces_an_earlier_run_and_leaves_other_files(model, data, tmp_path):
    output = tmp_path / "o"
    assert finetune(model, data, output, "--seed", 1) == 0
    (output / "notes.txt").write_text("mine")
    assert finetune(model, data, output, "--seed", 2, "--overwrite") == 0
    assert finetune(model, data, tmp_path / "fresh", "--seed", 2) == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert same(weights(output), weights(tmp_path / "fresh"))


def test_head_trains_the_head_alone(model, data, tmp_path):
    assert finetune(model, data, tmp_path / "o", "--method", "head") == 0
    base, tuned = weights(model), weights(tmp_path / "o")
    assert all(np.array_equal(tuned[name], array) for name, array in base.items() if name != "lm_head.weight")
    assert not np.array_equal(tuned["lm_head.weight"], base["model.embed_tokens.weight"])


def test_lora_saves_an_adapter_that_generate_puts_on_the_base(model, data, tmp_path, capsys):
    output = tmp_path / "an adapter"
    assert finetune(model, data, output, "--method", "lora") == 0
    assert f"(minipeft generate --adapter '{output}' --prompt ...)" in capsys.readouterr().out
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in output.iterdir()}
    assert not (output / "model.safetensors").exists()
    base, tokenizer = mp.from_pretrained(model)
    expected = continued(mp.PeftModel.from_pretrained(base, output), tokenizer, tokenizer.encode("Q: one\nA:"), 5)
    argv = ["generate", "--model", model, "--adapter", output, "--prompt", "Q: one\nA:", "--max-new-tokens", "5"]
    assert run(*argv, "--completion-only") == 0
    assert capsys.readouterr().out == expected + "\n"


def test_an_adapter_is_trained_further_in_its_template(model, data, tmp_path, capsys):
    first, further, template = tmp_path / "first", tmp_path / "further", "Italian: {prompt}"
    assert finetune(model, data, first, "--method", "lora", "--template", template, "--validation", data) == 0
    assert finetune(model, data, further, "--adapter", first, "--validation", data) == 0
    loss = [written(path)["held_out_loss"] for path in (first, further)]
    assert loss[1]["before"] == pytest.approx(loss[0]["after"], abs=1e-6) and loss[1]["after"] < loss[1]["before"]
    assert written(further)["options"]["template"] == template
    assert not same(*[weights(path, "adapter_model.safetensors") for path in (first, further)])
    capsys.readouterr()
    assert finetune(first, data, tmp_path / "o") == 2 and "it is an adapter's" in capsys.readouterr().err
    assert finetune(model, data, tmp_path / "o", "--adapter", first, "-r", 4) == 2
    assert "--rank does nothing with --adapter, which is trained further as it is" in capsys.readouterr().err


def test_accumulated_batches_are_one_large_batch(model, data, tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    assert finetune(model, data, large, "--optimizer", "sgd") == 0
    assert finetune(model, data, small, "--optimizer", "sgd", "--batch-size", "1", "--accumulation", "4") == 0
    a, b = weights(large), weights(small)
    assert max(float(abs(a[name] - b[name]).max()) for name in a) < 1e-6


@pytest.mark.parametrize(
    ("records", "more"),
    [
        ("It was a fine morning, and the birds sang. " * 30, ["--max-length", "64"]),
        ([{"instruction": f"Say {a}", "output": b} for a, b in PAIRS], ["--validation", "{file}"]),
        ([{"instruction": f"Say {a}", "output": b} for a, b in PAIRS], ["--template", "{instruction}\\n->", "--validation", "0"]),
    ],
    ids=["text file", "instructions", "custom template"],
)
def test_every_form_of_data(records, more, model, tmp_path):
    if isinstance(records, str):
        (file := tmp_path / "data.txt").write_text(records)
    else:
        file = jsonl(tmp_path / "data.jsonl", records)
    assert finetune(model, file, tmp_path / "o", *[m.replace("{file}", str(file)) for m in more]) == 0
    loss = written(tmp_path / "o")["held_out_loss"]
    if "0" in more:
        assert loss == {"before": None, "after": None}
    else:
        assert loss["after"] < loss["before"]


def test_records_that_do_not_fit_are_counted(model, data, tmp_path, capsys):
    assert finetune(model, data, tmp_path / "o", "--max-length", "8", "--overflow", "drop", "--validation", data) == 0
    assert "longer than 8 tokens: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- generate


def test_prompts_from_a_file_as_json_do_not_depend_on_the_batch(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("one\nThe house of the\nA\n")
    outputs = []
    for size in (1, 3):
        argv = ["generate", "--model", model, "--prompts", file, "--max-new-tokens", "6", "--temperature", "1"]
        assert run(*argv, "--json", "--batch-size", size) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert outputs[0] == outputs[1]
    assert [record["prompt"] for record in outputs[0]] == ["one", "The house of the", "A"]


def test_the_seed_decides_what_is_drawn(model, capsys):
    texts = []
    for seed in (1, 1, 2):
        run("generate", "--model", model, "--prompt", "The", "--temperature", "1", "--top-p", "0.95", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_from_standard_input(model):
    arguments = ["generate", "--model", model, "--max-new-tokens", "3"]
    piped = python("-m", "minipeft", *arguments, input="It was\n")
    given = python("-m", "minipeft", *arguments, "--prompt", "It was")
    assert piped.returncode == 0 and piped.stdout == given.stdout and piped.stdout.startswith("It was")


def test_a_terminal_sees_the_same_text_as_a_file(model, capsys, monkeypatch):
    argv = ["generate", "--model", model, "--prompt", "It was", "--temperature", "1.5", "--max-new-tokens", "30"]
    assert run(*argv) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(*argv) == 0
    assert capsys.readouterr().out == plain


def test_several_adapters_answer_every_prompt_each_as_alone(model, tmp_path, capsys):
    """One batch, adapters of every kind and of two templates: the text that each gives by itself, drawn or not."""
    base, _ = mp.from_pretrained(model)
    lora = mp.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    prompt, prefix = mp.PromptTuningConfig(num_virtual_tokens=5), mp.PrefixTuningConfig(num_virtual_tokens=3)
    adapters = [tmp_path / name for name in ("lora", "prompt", "prefix")]
    for directory, config in zip(adapters, (lora, prompt, prefix)):
        mp.get_peft_model(base, config).save_pretrained(directory)
    save_template(adapters[1], "alpaca")
    asked = ["generate", "--model", model, "--prompt", "one", "--prompt", "The house of the", "--max-new-tokens", "6"]
    for drawing in ([], ["--temperature", "1", "--seed", "3"]):
        alone = {}
        for adapter in adapters:
            assert run(*asked, *drawing, "--json", "--adapter", adapter) == 0
            alone[str(adapter)] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len({json.dumps(records) for records in alone.values()}) == 3
        expected = [{"adapter": a, **records[i]} for i in range(2) for a, records in alone.items()]
        for more in ([], ["--batch-size", "4"]):
            assert run(*asked, *drawing, *more, "--json", "--adapter", *adapters) == 0
            assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
        assert run(*asked, *drawing, "--adapter", adapters[0], "--adapter", *adapters[1:]) == 0
        shown = [("" if r["adapter"] == str(adapters[1]) else r["prompt"]) + r["completion"] for r in expected]
        assert capsys.readouterr().out == "".join(f"==> {r['adapter']} <==\n{t}\n" for r, t in zip(expected, shown))


# ---------------------------------------------------------------------------------------------------------- lessons


def test_lessons_are_listed_and_run(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "lessons"
    folder.mkdir()
    (folder / "01_first.py").write_text(
        "# %% [markdown]\n# # The first idea\nimport os\nprint(os.environ.get('MINIPEFT_REDUCED'))\n"
    )
    (folder / "02_second.py").write_text("# %% [markdown]\n# # Another\nassert 1 + 1 == 3, 'no'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIPEFT_REDUCED", raising=False)
    assert run("lessons") == 0
    out = capfd.readouterr().out
    assert "  1  The first idea" in out and "  2  Another" in out
    assert run("lessons", "1", "--reduced") == 0
    assert "\n1\n" in capfd.readouterr().out
    assert run("lessons", "1") == 0
    assert "\nNone\n" in capfd.readouterr().out
    assert run("lessons", "all") == 1  # the second fails
    out, err = capfd.readouterr()
    assert "lesson 1: done" in out and "lesson 2: FAILED" in out and "lessons that failed: 2" in err
