"""What the tests of the command line share: a tiny model with the shipped tokenizer, runs, refusals, files."""

from __future__ import annotations

import json
from itertools import takewhile
from unittest.mock import patch

import minipeft as mp
from minipeft.cli import compare, main, report
from minipeft.experiments import shipped
from minipeft.files import read_safetensors

ENCODED, TOKENIZERS = shipped.general_blocks, {}


def tiny(path, **changes):
    """`path`, made a directory with a tiny, randomly initialized model and the shipped tokenizer."""
    _, tokenizer = mp.load_base()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"vocab_size": 2048, "max_position_embeddings": 192, "eos_token_id": tokenizer.eos_token_id}
    mp.save_pretrained(mp.Transformer(mp.TransformerConfig.llama(**shape | changes), seed=1), path, tokenizer)
    return path


def general_blocks(tokenizer, *size):
    """`shipped.general_blocks`, which encodes much: once for all tokenizers that are the same."""
    return ENCODED(TOKENIZERS.setdefault((tokenizer._plain.to_str(), str(tokenizer.config)), tokenizer), *size)


def run(*argv) -> int:
    """The status of a command, in this process; the answers that it shows are short, and so is what is timed."""
    with (
        patch.object(report, "ANSWER", 8),
        patch.dict(compare.TOKENS, tokens=4, passes=1),
        patch.object(shipped, "general_blocks", general_blocks),
    ):
        return main([str(a) for a in argv])


def output(capsys, *argv) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command."""
    capsys.readouterr()
    return run(*argv), *capsys.readouterr()


def reported(capsys, *argv) -> dict:
    """What a command writes with --json."""
    status, out, err = output(capsys, *argv, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


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


def written(output) -> dict:
    """The record that a command has left in its directory."""
    (path,) = (path for name in ("finetune", "sft", "reward", "dpo", "ppo") if (path := output / f"{name}.json").exists())
    return json.loads(path.read_text())


def same_bytes(name, *directories) -> bool:
    return len({(directory / name).read_bytes() for directory in directories}) == 1


def continued(model, tokenizer, ids, n, stop_token_ids=None) -> str:
    """The text of at most n tokens after a prompt, before the first that ends it."""
    stop_token_ids = stop_token_ids or [tokenizer.eos_token_id]
    out = model.generate([ids], max_new_tokens=n, eos_token_id=stop_token_ids)[0, len(ids) :].tolist()
    return tokenizer.decode(list(takewhile(lambda token: token not in stop_token_ids, out)))
