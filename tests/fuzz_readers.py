"""Every reader of the package for tests/fuzz.py: how valid inputs are made, how one is read and used, what may be raised."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from test_gguf import F16, F32, Q8_0, build, byte_level, sentencepiece, write
from test_rlhf_reward import source_archive, tables
from test_text_chat import SYSTEM

import minipeft as mp
from minipeft import quant, rlhf
from minipeft.accounting import architecture, published
from minipeft.accounting.models import groups
from minipeft.experiments import rows
from minipeft.files import FileError, read_json, read_safetensors, write_json, write_safetensors
from minipeft.hub.pretrained import HubError
from minipeft.nn.heads import SequenceClassifier
from minipeft.peft.config import PeftError
from minipeft.text import corpora, datasets, templates
from minipeft.text.datasets import DatasetError
from minipeft.text.tokenizer import Tokenizer
from minipeft.train import CheckpointError, Trainer, TrainingArguments

IDS = np.array([[1, 2, 3, 4]])
SHAPE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)
LLAMA = mp.TransformerConfig.llama(intermediate_size=24, **SHAPE)
LLAMA_3 = LLAMA.replace(rope_scaling=mp.nn.transformer.RopeScaling(8.0, 1.0, 4.0, 64), tie_word_embeddings=False)
GPT2 = mp.TransformerConfig.gpt2(**SHAPE)


class Reader(NamedTuple):
    """make(folder) writes valid inputs, each a folder; read(folder) reads and uses one and may raise `errors`, exactly.

    changed  patterns of the files in it that are changed
    finish   what is done to an input after that
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    changed: tuple[str, ...] = ("*",)
    finish: Callable[[Path], None] | None = None


# -------------------------------------------------------------------------------------------------------------- models


def model(config: Any, seed: int = 1) -> Any:
    return mp.Transformer(config, seed=seed)


def use(model: Any) -> None:
    """What is read computes. That its logits are NaN, or that it has too few positions or tokens, is no reader's fault."""
    limit = min(IDS.shape[1], model.config.max_position_embeddings, 32)
    ids = np.minimum(IDS, model.config.vocab_size - 1)[:, :limit]
    if isinstance(model, SequenceClassifier):
        model(ids)
        return
    try:
        model.generate(ids, max_new_tokens=min(2, model.config.max_position_embeddings - limit))
    except FloatingPointError:
        pass


def read_model(folder: Path) -> None:
    use(mp.from_pretrained(folder)[0])


def models(folder: Path) -> None:
    of = {"llama": LLAMA, "llama3": LLAMA_3, "gpt2": GPT2}
    of |= {family: LLAMA.replace(model_type=family) for family in ("mistral", "qwen2")}
    for name, config in of.items():
        mp.save_pretrained(model(config), folder / name)
    for name in ("classifier", "unnamed"):
        mp.save_pretrained(SequenceClassifier(model(LLAMA), 3), folder / name)
    path = folder / "unnamed" / "config.json"
    content = read_json(path)
    del content["id2label"], content["label2id"]
    write_json(path, {**content, "num_labels": 3})


def described(folder: Path) -> None:
    """A config.json of each family."""
    by_family = {entry["config"]["model_type"]: entry["config"] for group in groups().values() for entry in group.values()}
    for family, config in by_family.items():
        (folder / family).mkdir(parents=True)
        write_json(folder / family / "config.json", config)


def quantized(folder: Path) -> None:
    for config, nested in ((LLAMA, True), (GPT2, False)):
        made = quant.quantize_model(model(config), compress_statistics=nested)
        mp.save_pretrained(made, folder / config.model_type)


def in_parts(folder: Path) -> None:
    mp.save_pretrained(model(LLAMA), folder / "llama")
    inside = folder / "llama"
    arrays = {name: np.array(array) for name, array in read_safetensors(inside / "model.safetensors")[0].items()}
    (inside / "model.safetensors").unlink()
    placed = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(arrays)}
    for file in set(placed.values()):
        write_safetensors(inside / file, {n: a for n, a in arrays.items() if placed[n] == file})
    write_json(inside / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": placed})


def ggufs(folder: Path) -> None:
    of = {"llama": (F32, sentencepiece), "llama 3": (F16, byte_level("llama-bpe")), "qwen2": (Q8_0, byte_level("qwen2"))}
    for case, (kind, tokenizer) in {**of, "gpt2": (F32, None)}.items():
        (folder / case).mkdir(parents=True)
        write(folder / case / "model.gguf", build(case), kind, tokenizer=tokenizer)


def read_gguf(folder: Path) -> None:
    read, tokenizer = mp.from_pretrained(folder / "model.gguf")
    use(read)
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a cab"))
        if tokenizer.chat_template is not None:
            try:
                tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            except ValueError as error:  # the template's fault
                assert type(error) is ValueError


# ---------------------------------------------------------------------------------------------------------------- text


def backend() -> Any:
    """A byte-level tokenizer of 259 tokens, the last two special."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def tokenizers_(folder: Path) -> None:
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    several = [{"name": name, "template": SYSTEM} for name in ("default", "tool_use")]
    for name, content in (("config", {**named, "chat_template": SYSTEM}), ("several", {"chat_template": several}), ("beside", {})):
        Tokenizer(backend(), content).save(folder / name)
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    words = {word: i for i, word in enumerate(("[UNK]", "Is", "it", "a", "##b", "c", "cab", "▁", "<|im_end|>"))}
    for name, kind in {
        "words": models.WordLevel(words, unk_token="[UNK]"), "pieces": models.WordPiece(words, unk_token="[UNK]"),
        "unigram": models.Unigram([(word, -float(i)) for word, i in words.items()], unk_id=0),
    }.items():  # fmt: skip
        made = Backend(kind)
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.add_special_tokens(["<|im_end|>"])
        Tokenizer(made, named).save(folder / name)
    grown = backend()
    longer = [normalizers.Replace(Regex("a+"), "a" * 10), normalizers.Replace("a", "a" * 5), normalizers.NFKC()]
    grown.normalizer = normalizers.Sequence([normalizers.Prepend("a"), *longer])
    Tokenizer(grown, {}).save(folder / "grown")
    write_json(folder / "beside" / "special_tokens_map.json", named)
    (folder / "beside" / "chat_template.jinja").write_text(SYSTEM)


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("Is it a cab?<|im_end|>", allow_special=True)
    tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi <|im_end|>"}], add_generation_prompt=True)


RECORDS: list[dict[str, Any]] = [
    {"text": "Some text."}, {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "b", "output": "c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": True},
    {"question": "a", "choices": ["b", "c"], "answer": 1},
]  # fmt: skip


def records(folder: Path) -> None:
    for number, record in enumerate(RECORDS):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "data.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    (folder / "text").mkdir()
    (folder / "text" / "data.txt").write_text("Some text,\nin two lines.\n")


def one(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.is_file())


def templates_(folder: Path) -> None:
    for number, text in enumerate(("Q: {prompt}\nA:", "{instruction} {{x}}\n{input}", "{instruction}")):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "template.txt").write_text(text)


def read_template(folder: Path) -> None:
    render = templates.custom((folder / "template.txt").read_text("utf-8", "replace"))
    for record in (datasets.Completion("a", "b"), datasets.Instruction("a", "", "c")):
        try:
            render(record)
        except ValueError as error:
            assert type(error) is ValueError


def corpora_(folder: Path) -> None:
    lines = {
        "bible": ["train\tGenesis\t1\t1\tIn the beginning\tAt the first", "test\tGenesis\t1\t2\tAnd the earth\tAnd"],
        "austen": ["train\tEmma\t1\tEmma Woodhouse,\\nhandsome", "test\tEmma\t2\tMr. Weston"],
    }
    for part in ("noun", "verb", "adj", "adv"):
        lines[f"wordnet-{part}"] = ["train\tdog#1#42|cur#2#0\ta canine\tthe dog|a cur"]
    (folder / "data" / "data").mkdir(parents=True)
    for name, rows_ in lines.items():
        (folder / "data" / "data" / f"{name}.tsv.xz").write_bytes(lzma.compress("\n".join([*rows_, ""]).encode(), preset=0))


def read_corpora(folder: Path) -> None:
    before = corpora.files
    corpora.files = lambda _: folder
    try:
        for corpus in (corpora.bible, corpora.austen, corpora.wordnet):
            corpus.__wrapped__("train")
    finally:
        corpora.files = before


# ------------------------------------------------------------------------------------------------------------ adapters

NAMES = dict(target_modules=["q_proj", "v_proj"])
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: mp.LoraConfig(
        r=2, use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 3}, alpha_pattern={".*v_proj": 4}, **NAMES
    ),
    "dora": lambda: mp.LoraConfig(
        r=2, use_dora=True, target_modules=r".*\.(q_proj|v_proj)", exclude_modules=["layers.1.self_attn.q_proj"],
        modules_to_save=["norm"],
    ),
    "layers": lambda: mp.LoraConfig(r=2, layers_to_transform=[0], layers_pattern="layers", **NAMES),
    "tokens": lambda: mp.LoraConfig(r=2, trainable_token_indices=[1, 2], **NAMES),
    "vera": lambda: mp.peft.VeraConfig(r=4, **NAMES),
    "adalora": lambda: mp.peft.AdaLoraConfig(total_step=10, init_r=3, target_r=2, **NAMES),
    "loha": lambda: mp.peft.LoHaConfig(r=2, **NAMES),
    "lokr": lambda: mp.peft.LoKrConfig(r=2, decompose_both=True, **NAMES),
    "oft": lambda: mp.peft.OFTConfig(oft_block_size=4, **NAMES),
    "ia3": lambda: mp.IA3Config(),
    "ln": lambda: mp.LNTuningConfig(),
    "bottleneck": lambda: mp.BottleneckConfig(bottleneck_size=2),
    "rows": lambda: mp.peft.TrainableTokensConfig(token_indices=[1, 2]),
    "prompt": lambda: mp.PromptTuningConfig(num_virtual_tokens=2),
    "prefix": lambda: mp.PrefixTuningConfig(num_virtual_tokens=2),
    "p-tuning": lambda: mp.peft.PromptEncoderConfig(num_virtual_tokens=2),
}  # fmt: skip
BASE = model(LLAMA.replace(tie_word_embeddings=False))


def adapters(folder: Path) -> None:
    for name, config in ADAPTERS.items():
        mp.get_peft_model(BASE, config()).save_pretrained(folder / name)


def read_adapter(folder: Path) -> None:
    adapted = mp.PeftModel.from_pretrained(BASE, folder)
    adapted(IDS)
    if not adapted.prompts and "BOTTLENECK" not in (config.peft_type for config in adapted.peft_config.values()):
        adapted.merge_and_unload()


# ---------------------------------------------------------------------------------------------------------------- runs

EXAMPLES = [(np.arange(i, i + 5), np.arange(i, i + 5)) for i in range(6)]
TINY = mp.TransformerConfig.llama(**{**SHAPE, "num_hidden_layers": 1, "hidden_size": 8}, eos_token_id=1)


def trainer(folder: Path, steps: int | None, method: str) -> Any:
    if method == "ppo":
        options = dict(batch_size=2, mini_batch_size=2, num_epochs=1, response_length=2, missing_eos_score=None)
        config = rlhf.PPOConfig(steps=3, save_steps=steps, output_dir=str(folder), kl_target=1.0, learning_rate=1e-3, **options)
        return rlhf.PPOTrainer(model(TINY), lambda roll: np.array([float(r[0]) for r in roll.responses()]), [[3], [4]], config)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, save_steps=steps, eval_steps=1,
        early_stopping_patience=9, learning_rate=1e-3,
    )  # fmt: skip
    config = mp.peft.AdaLoraConfig(total_step=3, init_r=3, target_r=2, target_modules=["q_proj"])
    trained = mp.get_peft_model(model(TINY), config) if method == "adalora" else model(TINY)
    return Trainer(trained, EXAMPLES[:4], EXAMPLES[4:], args)


def runs(*methods: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for method in methods:
            trainer(folder / method, 2, method).train()
            shutil.rmtree(folder / method / "checkpoint-3")
            (folder / method / "method").write_text(method)

    return make


def resume(folder: Path) -> None:
    run = trainer(folder, None, (folder / "method").read_text())
    try:
        with mock.patch("minipeft.train.trainer.plot_loss"):  # four fifths of the time; what fails in it is a warning
            run.train(resume_from_checkpoint=True)
    except (mp.train.TrainingDiverged, rlhf.RLHFError, FloatingPointError):  # the weights of the checkpoint are that bad
        pass


def sign(folder: Path) -> None:
    """Give what is in a checkpoint the checksums of what is in it."""
    path = folder / "checkpoint-2" / "state.json"
    try:
        body = json.loads(path.read_bytes())
        for name in body["files"]:
            data = (path.parent / name).read_bytes()
            body["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        pass
    try:
        body.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
        path.write_text(json.dumps({**body, "sha256": digest}))
    except (NameError, ValueError, TypeError, AttributeError, RecursionError):
        pass


def calibrations(folder: Path) -> None:
    made = rlhf.RewardModel(model(TINY))
    made.mean, made.std = 0.5, 2.0
    made.save_pretrained(folder / "reward")


def read_reward(folder: Path) -> None:
    rlhf.RewardModel.from_pretrained(folder)[0].rewards(IDS)


@dataclass(frozen=True)
class run:
    r: int
    seed: int


def stores(folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)
    for seed in range(2):
        row = {"run": "run", "settings": ["r", "seed"], "r": 4, "seed": seed, "qualname": "a.run"}
        rows.add_row(folder / "rows" / "rows.jsonl", {**row, "loss": 2.5, "at": {"x": [1, None]}, "bad": float("nan")})
        rows.add_row(folder / "rows" / "rows.jsonl", {**row, "r": 8, "error": "ValueError: no", "traceback": "..."})


def read_store(folder: Path) -> None:
    path = folder / "rows.jsonl"
    found = rows.read_rows(path)
    rows.complete(found, [run(4, seed) for seed in range(2)])
    mp.sweep(lambda r, seed: {"loss": 1.0}, [{"r": r, "seed": 0} for r in (4, 8)], 1, path, version="1", show=lambda line: None)
    try:
        mp.experiments.table(found, "loss", "r")
    except ValueError as error:  # of rows that have no number
        assert type(error) is ValueError


def archives(folder: Path) -> None:
    (folder / "archive").mkdir(parents=True)
    source_archive(folder / "archive", tables())


def figures(folder: Path) -> None:
    ids = ("tot-gpt2-l", "tot-gpt3-ft-untied")
    shipped = published.read_published()
    seen: set[str] = set()
    for row in shipped:  # one of each kind of options, small models first
        options = json.loads(row["options"] or "{}")
        kind = ",".join(sorted(options)) + str(options.get("config") and dict(options["config"]).get("peft_type")
                                                if isinstance(options.get("config"), dict) else "")  # fmt: skip
        if row["id"] in ids or kind not in seen:
            seen.add(kind)
            path = folder / row["id"] / "mine.csv"
            path.parent.mkdir(parents=True)
            cells = [[str(row[name]) for name in published.COLUMNS]]
            text = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [published.COLUMNS, *cells])
            path.write_text(text + "\n")


def read_figures(folder: Path) -> None:
    """Audit; raise what a row that is wrong says of itself."""
    for finding in published.audit(published.read_published(folder / "mine.csv")):
        if finding.verdict == "error":
            raise ValueError(finding.reason)


RUN = ("checkpoint-2/state.json", "checkpoint-2/state.json", "checkpoint-2/*")
READERS: dict[str, Reader] = {
    "safetensors": Reader(models, lambda folder: [a.sum() for a in read_safetensors(folder / "model.safetensors")[0].values()],
                          (FileError,), ("model.safetensors",)),
    "config": Reader(models, read_model, (HubError, FileError), ("config.json",)),
    "weights": Reader(models, read_model, (HubError, FileError), ("model.safetensors",)),
    "quantized": Reader(quantized, read_model, (HubError, FileError)),
    "index": Reader(in_parts, read_model, (HubError, FileError), ("*.index.json",)),
    "tokenizer": Reader(tokenizers_, read_tokenizer, (FileError, ValueError)),
    "adapter": Reader(adapters, read_adapter, (PeftError, FileError), ("*.json", "*.json", "*.json", "*.safetensors")),
    "gguf": Reader(ggufs, read_gguf, (HubError, FileError)),
    "audit": Reader(figures, read_figures, (FileError, ValueError)),
    "architecture": Reader(described, lambda folder: architecture(folder).size, (ValueError, FileError)),
    "template": Reader(templates_, read_template, (ValueError,)),
    "calibration": Reader(calibrations, read_reward, (FileError, HubError), ("reward_calibration.json",)),
    "prompts": Reader(records, lambda folder: datasets.read_prompts(one(folder)), (DatasetError,)),
    "dataset": Reader(records, lambda folder: datasets.read_dataset(one(folder)), (DatasetError,)),
    "rows": Reader(stores, read_store, (FileError,)),
    "checkpoint": Reader(runs("full", "adalora"), resume, (CheckpointError, FileError), RUN, sign),
    "ppo": Reader(runs("ppo"), resume, (CheckpointError, FileError), RUN, sign),
    "ratings": Reader(archives, lambda folder: rlhf.human_preferences(one(folder), "train", 20), (FileError, ValueError)),
    "corpora": Reader(corpora_, read_corpora, (FileError,), ("data/*",)),
}  # fmt: skip
