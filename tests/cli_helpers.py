"""What the tests of the command line share: a tiny model with the shipped tokenizer, runs, refusals, files."""

from __future__ import annotations

import json

import minipeft as mp
from minipeft.cli import main
from minipeft.files import read_safetensors


def tiny(path, **changes):
    """`path`, made a directory with a tiny, randomly initialized model and the shipped tokenizer."""
    _, tokenizer = mp.load_base()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 2048, "max_position_embeddings": 192, "eos_token_id": tokenizer.eos_token_id}
    mp.save_pretrained(mp.Transformer(mp.TransformerConfig.llama(**shape | changes), seed=1), path, tokenizer)
    return path


def run(*argv) -> int:
    return main([str(a) for a in argv])


def refused(capsys, *argv, silent=True) -> str:
    """The one line on standard error of a command that is refused, and writes nothing else."""
    capsys.readouterr()
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("minipeft: error: ") and err.count("\n") == 1 and not (silent and out), (out, err)
    return err


def jsonl(path, rows):
    """`path`, made a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def weights(path, name="model.safetensors"):
    return {key: array.copy() for key, array in read_safetensors(path / name)[0].items()}
