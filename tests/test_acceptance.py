"""What only the whole shows: the public names as a script elsewhere calls them, and promises that hold across layers."""

from __future__ import annotations

import ast
import fnmatch
import gc
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import minipeft as mp
from minipeft.autograd import cases
from minipeft.book.ranges import RANGE, ranged
from minipeft.cli import COMMANDS, _parse, main
from minipeft.experiments.rows import read_rows

ROOT = Path(__file__).parent.parent
F = mp.functional
SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 24}
DIALECTS = {
    "gpt2": mp.TransformerConfig.gpt2(**SHAPE, dropout=0.1),
    "llama": mp.TransformerConfig.llama(**SHAPE, num_key_value_heads=2, dropout=0.1),
}
dialects = pytest.mark.parametrize("dialect", DIALECTS)
IDS = np.random.default_rng(0).integers(0, 32, (3, 12))


# ------------------------------------------------------------------------------------------------ the public names

CONTRACT = {
    "Tensor": "data requires_grad=False",
    "Tensor.backward": "self grad=None",
    "Tensor.sum": "x axis=None keepdims=False",
    "Tensor.mean": "x axis=None keepdims=False",
    "Tensor.max": "x axis=None keepdims=False",
    "functional.linear": "x weight bias=None",
    "functional.embedding": "ids weight",
    "functional.layer_norm": "x weight bias eps=1e-05",
    "functional.rms_norm": "x weight eps=1e-06",
    "functional.softmax": "x axis=-1",
    "functional.log_softmax": "x axis=-1",
    "functional.cross_entropy": "logits targets ignore_index=-100",
    "functional.scaled_dot_product_attention": "q k v attn_mask=None is_causal=False",
    "functional.dropout": "x p rng",
    "optim.SGD": "params lr=0.001 momentum=0.0",
    "optim.Adam": "params lr=0.001 betas=(0.9,0.999) eps=1e-08 weight_decay=0.0",
    "optim.AdamW": "params lr=0.001 betas=(0.9,0.999) eps=1e-08 weight_decay=0.01",
    "optim.clip_grad_norm": "parameters max_norm",
    "optim.cosine": "step warmup_steps total_steps",
    "Transformer": "config seed=0",
    "Transformer.forward": "self input_ids=None attention_mask=None position_ids=None inputs_embeds=None past_key_values=None "
    "rng=None",
    "Transformer.loss": "self input_ids labels",
    "Transformer.generate": "self input_ids attention_mask=None max_new_tokens=20 temperature=0.0 top_k=None top_p=None seed=0 "
    "eos_token_id=None",
    "load_base": "",
    "from_pretrained": "path",
    "save_pretrained": "model path tokenizer=None",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_public_name_takes_its_arguments_by_name_and_in_order(name):
    found = mp
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    shown = [p.name + ("" if p.default is p.empty else "=" + repr(p.default).replace(" ", "")) for p in parameters]
    expected = CONTRACT[name].split()
    assert shown[: len(expected)] == expected


def test_the_command_gradcheck_knows_every_op_of_the_package():
    """In a fresh process, as the registry holds the ops of what has been imported."""
    ops = set()
    for path in (ROOT / "minipeft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "op" in [ast.unparse(d) for d in node.decorator_list]:
                ops.add(node.name)
    command = [sys.executable, "-m", "minipeft", "gradcheck", "--op", "no_such_op"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = re.search(r"\(known: (.*)\)", done.stderr)
    assert done.returncode == 2 and known, done.stderr
    assert set(known[1].split(", ")) == ops and len(ops) > 40


def test_the_command_gradcheck_fails_when_a_derivative_is_wrong(monkeypatch, capsys):
    wrong = cases.Case("off by half", lambda x: F.exp(x) + (x * 0.5).detach(), (cases.normal(2),), op="exp")
    monkeypatch.setattr(cases, "op_cases", lambda names=None: [wrong])
    assert main(["gradcheck", "--op", "exp"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "exp 1 - 1 FAILED" in out and "the pullback of input 0" in out and "0 of 1 checks passed" in out


def test_everything_listed_can_be_imported():
    names: dict = {}
    exec("from minipeft import *", names)
    assert set(mp.__all__) <= set(names) and set(mp.__all__) == set(dir(mp))
    assert not hasattr(mp, "no_such_name")


@dialects
def test_a_hand_written_loop_learns(dialect):
    """PyTorch's names only: schedule, parameter groups, clipping, loss, dropout by `rng`."""
    model = mp.Transformer(DIALECTS[dialect], seed=1)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    optimizer = mp.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.02)
    losses = []
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * mp.optim.cosine(step, 4, 40)
        loss = F.cross_entropy(model(IDS[:, :-1], rng=step), IDS[:, 1:])
        loss.backward()
        mp.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3.3 and losses[-1] < 1.0
    assert model.loss(IDS, IDS).item() == pytest.approx(F.cross_entropy(model(IDS[:, :-1]), IDS[:, 1:]).item(), rel=1e-6)
    with mp.no_grad():
        assert not model(IDS).requires_grad
    by_position = model.generate(IDS[:, :4], None, 5, 0.7, 10, 0.9, 3, ())
    by_name = model.generate(
        input_ids=IDS[:, :4], attention_mask=None, max_new_tokens=5, temperature=0.7, top_k=10, top_p=0.9, seed=3, eos_token_id=()
    )
    np.testing.assert_array_equal(by_position, by_name)
    assert by_name.shape == (3, 9) and by_name.dtype.kind == "i"


# --------------------------------------------------------------------------------------------------------- misuse

x = mp.Tensor(np.ones((2, 3), np.float32))
model = mp.Transformer(DIALECTS["llama"])


def flagged_afterwards():
    integers = mp.Tensor(np.arange(3))
    integers.requires_grad = True
    return integers * 2.0


def train_integers():
    codes = mp.nn.Parameter(np.zeros((4, 1), np.uint8), requires_grad=False)
    codes.requires_grad = True
    return mp.optim.AdamW([("layer.weight", codes)])


MISUSE = {
    "sum": (lambda: x.sum(axis=2), IndexError, "axis 2 is out of range for a tensor with 2 axes"),
    "mean": (lambda: x.mean(axis=(0, -3)), IndexError, "axis -3 is out of range for a tensor with 2 axes"),
    "max": (lambda: x.max(axis=5), IndexError, "axis 5 is out of range"),
    "gather": (lambda: F.gather(x, np.zeros((2, 1), int), axis=3), IndexError, "axis 3 is out of range"),
    "stack": (lambda: F.stack([x, x], axis=4), IndexError, "axis 4 is out of range for a tensor with 3 axes"),
    "integers": (flagged_afterwards, TypeError, r"only floating-point tensors .* int64 of shape \(3,\)"),
    "integer parameter": (train_integers, TypeError, r"layer.weight of shape \(4, 1\) is uint8; only floating-point"),
    "ids in lists": (lambda: model([[1, 2]]), TypeError, "input_ids must be an integer array, not a list"),
    "mask in lists": (lambda: model(IDS, [[1] * 12] * 3), TypeError, "attention_mask must be an integer array, not a list"),
    "load_base": (lambda: mp.load_base(load_in_4bit="false"), TypeError, "load_in_4bit must be True or False, not the text 'false'"),
    "from_pretrained": (lambda: mp.from_pretrained("x", load_in_4bit="no"), TypeError, "load_in_4bit must be True or False"),
    "quantize_model": (
        lambda: mp.quant.quantize_model(model, compress_statistics="no"), TypeError, "compress_statistics must be True or False"
    ),
    "adapter": (
        lambda: mp.PeftModel.from_pretrained(model, "x", is_trainable="no"), TypeError, "is_trainable must be True or False"
    ),
    "generate": (lambda: model.generate(IDS, use_cache="no"), TypeError, "use_cache must be True or False, not the text 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_one_sentence(name):
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message):
        call()


@dialects
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_of_nothing_gives_logits_of_nothing(dialect, shape):
    assert mp.Transformer(DIALECTS[dialect])(np.zeros(shape, np.int64)).shape == (*shape, 32)


# ------------------------------------------------------------------------------------------------- memory, randomness


@dialects
def test_nothing_waits_for_the_garbage_collector(dialect):
    """Training steps, checkpointing, generation and a Trainer's run leave no object in a reference cycle."""
    model = mp.Transformer(DIALECTS[dialect], seed=1)
    optimizer = mp.optim.AdamW(model.parameters())

    def step():
        F.cross_entropy(model(IDS, rng=1), IDS).backward()
        mp.optim.clip_grad_norm(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def everything():
        step()
        model.gradient_checkpointing_enable()
        step()
        model.gradient_checkpointing_enable(False)
        model(IDS)  # a graph that is never walked
        model.generate(IDS, max_new_tokens=4)
        model.copy()
        mp.Trainer(model, [(IDS[0], IDS[0])], args=mp.TrainingArguments(max_steps=1)).train()

    everything()  # what is imported or made once
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        everything()
        gc.collect()
        left = [type(o).__name__ for o in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


SCRIPT = """
import hashlib, sys, numpy as np, minipeft as mp
base, tokenizer = mp.load_base()
model = mp.Transformer(base.config.replace(num_hidden_layers=1, dropout=0.1), seed=3)
ids = np.array(tokenizer.encode("In the beginning God made the heaven and the earth."))
examples = [(ids[:n], ids[:n]) for n in range(6, len(ids))]
args = mp.TrainingArguments(sys.argv[1], max_steps=2, save_steps=2, per_device_train_batch_size=3)
mp.Trainer(model, examples, args=args).train()
mp.save_pretrained(model, sys.argv[1] + "/model", tokenizer)
print(hashlib.sha256(open(sys.argv[1] + "/model/model.safetensors", "rb").read()).hexdigest())
print(model.generate(ids[None], max_new_tokens=8, temperature=1.0, seed=5).tolist())
"""


def test_another_process_gives_the_same_bytes_and_nothing_is_written_elsewhere(tmp_path):
    said = []
    for n in (1, 2):
        places = {name: tmp_path / f"{name}{n}" for name in ("out", "home", "cwd", "temporary")}
        for place in places.values():
            place.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPLCONFIG"))}
        environment |= {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "PYTHONHASHSEED": str(n)}
        environment |= {"MINIPEFT_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"MPLCONFIGDIR": str(tmp_path / "matplotlib")}  # its font cache is matplotlib's own
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(places["out"])]
        done = subprocess.run(command, cwd=places["cwd"], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
        for name in ("home", "cwd", "temporary"):
            assert list(places[name].iterdir()) == [], name
        assert {p.name for p in places["out"].iterdir()} == {"checkpoint-2", "loss.png", "metrics.jsonl", "model"}
    assert said[0] == said[1]


def test_the_package_neither_runs_what_it_reads_nor_asks_the_network():
    sent = {"pickle", "cloudpickle"}  # to the processes and clusters that a user names; never a file
    banned = {"pickle", "shelve", "marshal", "dill", "joblib", "cloudpickle", "runpy", "code"}
    banned |= {"socket", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub"}
    found = []
    for path in sorted((ROOT / "minipeft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [(node.module or "").partition(".")[0]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile"):
                text = ast.unparse(node.args[0])  # what textbooks print is run as it is printed: a constant of the package
                printed = path.parent.name == "claims" and text in ("LAYER", "ZEROED if zeroed else LOOP")
                names = [] if printed else [f"{node.func.id}()"]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.load", "np.save", "np.savez", "np.fromfile"):
                names = [ast.unparse(node) + "()"]
            allowed = sent if path.name == "executors.py" else set()
            found += [f"{path.name}:{node.lineno} {n}" for n in names if n in banned - allowed or n.endswith("()")]
    assert not found, found


# ------------------------------------------------------------------------------------------------- what is shipped


def _ignored(path: Path) -> bool:
    patterns = (ROOT / ".gitignore").read_text().split() if (ROOT / ".gitignore").exists() else ["__pycache__/", "*.egg-info/"]
    relative = path.relative_to(ROOT)
    return any(fnmatch.fnmatch(part, pattern.strip("/")) for pattern in patterns for part in relative.parts)


def test_the_top_level_holds_five_things():
    found = {p.name for p in ROOT.iterdir() if p.name[0] != "." and not _ignored(p)}
    assert found == {"pyproject.toml", "minipeft", "lessons", "tests", "README.md"}


def test_every_file_of_the_package_is_installed_with_it():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setup["package-data"]["*"]
    for path in (ROOT / "minipeft").rglob("*"):
        if path.is_file() and path.suffix != ".py" and not _ignored(path):
            assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path
            package = path.parent
            while package != ROOT and not (package / "__init__.py").exists():
                package = package.parent
            assert package != ROOT
    assert (ROOT / "minipeft" / "py.typed").is_file()


# ---------------------------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_links_lead_somewhere():
    links = [link for link in re.findall(r"\[[^]]*\]\(([^)#\s]+)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_reading_order_gives_the_lines_of_what_it_names():
    lessons = [line for line in README.splitlines() if line.startswith("| [") and "](lessons/" in line]
    assert len(lessons) > 20 and all(RANGE.search(line) for line in lessons)
    assert ranged(README) == README, "python -m minipeft.book.ranges README.md"
    with pytest.raises(KeyError, match="defines no 'Lora'"):
        ranged("[`Lora`, lines 1-2](minipeft/peft/lora.py#L1-L2)")


def test_the_reading_order_gives_the_minutes_that_each_lesson_says():
    said = dict(re.findall(r"^\| \[\d\d [^]]+\]\((lessons/\w+\.py)\), (\d+) min", README, re.MULTILINE))
    assert len(said) == len([*ROOT.glob("lessons/[0-9]*.py")])
    for lesson, minutes in said.items():
        head = re.sub(r"\n# ?", " ", (ROOT / lesson).read_text(encoding="utf-8")[:3000])
        assert f"Reading takes about {minutes} minutes" in head, lesson


def test_readme_commands_are_what_the_command_line_takes():
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    calls = [shlex.split(call, comments=True) for line in lines for call in re.findall(r"bin/minipeft ([^&]*)", line)]
    assert {call[0] for call in calls} >= {"compare", "finetune", "generate", "gradcheck", "lessons"}
    for call in calls:
        if "--plugin" not in call:  # those are run in test_plugins
            assert _parse(call).command in COMMANDS


def test_readme_names_files_of_tests_that_exist():
    promises = README[README.index("## What you can rely on") :].split("\n## ")[0]
    named = set(re.findall(r"tests/[\w/*.]+\.py", promises))
    assert len(named) > 20
    assert [name for name in named if not list(ROOT.glob(name))] == []


@pytest.mark.usefixtures("methods_as_before")
def test_readme_python_runs(monkeypatch, tmp_path):
    """The blocks as written, on a fraction of the data."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    code = "\n".join(blocks)
    assert "[:2000]" in code
    monkeypatch.chdir(tmp_path)

    def run(r, lr, seed):
        return {"loss": r * lr + seed}

    names = {"ids": IDS, "targets": IDS, "run": run}
    exec(code.replace("[:2000]", "[:16]"), names)
    assert (tmp_path / "tuned" / "model.safetensors").is_file() and np.isfinite(names["loss"].item())
    assert [row["loss"] for row in names["rows"]] == [r * lr + seed for r in (4, 8) for lr in (1e-3, 3e-3) for seed in range(5)]


def test_the_table_of_speed_is_that_of_the_rows():
    rows, cells = read_rows(ROOT / "lessons/results/speed.jsonl"), 0
    processors = {"Xeon": "Xeon", "EPYC, AVX2": "family 25", "EPYC, AVX-512": "family 26"}
    works = {
        "GPT-2 step, 64 channels": "GPT-2 step, V 512, d 64,", "GPT-2 step, 128 channels": "GPT-2 step, V 512, d 128,",
        "GPT-2 step, 256 channels": "GPT-2 step, V 2048, d 256,", "LoRA step": "LoRA step", "QLoRA step": "QLoRA step",
        "tokens a second, 135M": "decode, 135M Llama, batch 1", "tokens a second, batches": "decode, 135M Llama, batch 8",
        "NF4 quantized": "NF4, quantize", "NF4 dequantized": "NF4, dequantize",
    }  # fmt: skip
    peers = {"JAX": "jax", "MyGrad": "mygrad", "HIPS autograd": "autograd", "tinygrad": "tinygrad"}
    head, _, *lines = re.search(r"(?m)^\| ours / theirs.*\n(?:\|.*\n)+", README)[0].splitlines()
    assert [name.strip() for name in head.split("|")[2:-1]] == [*processors]
    for line in lines:
        name, *found = (cell.strip() for cell in line.strip("|").split("|"))
        name, _, peer = name.partition(", beside ")
        work = next(work for start, work in works.items() if name.startswith(start))
        for processor, cell in zip(processors.values(), found, strict=True):
            of = [
                row for row in rows if processor in row["processor"] and row["work"].startswith(work) and "tiles" not in row["work"]
                and (row["peer"] == peers[peer] if peer else row["peer"] not in peers.values())
            ]  # fmt: skip
            median = {row["threads"]: f"{row['ratio_median']:.2f}" for row in of}
            assert cell == (", ".join(median.get(n, "–") for n in (1, 2)) if of else ""), line
            cells += len(of)
    assert cells == len([row for row in rows if "tiles" not in row["work"]]), "every row stands in the table"
