"""Train the base model that ships with the package: `python -m minipeft.hub.build_base OUT_DIR`.

A Llama-dialect model of 1.4 million parameters learns next-token prediction on the training split of the shipped
corpora (King James and Basic English Bible, Jane Austen, WordNet), with this package's own trainer. OUT_DIR receives
the model as a Hugging Face directory (float16), the tokenizer, the loss curve, and `training.json`: the settings and
the held-out losses. The work directory holds the checkpoints; the same command continues from the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import write_json
from ..nn.transformer import Transformer, TransformerConfig
from ..text.corpora import general_text
from ..text.examples import encode_documents
from ..text.tokenizer import Tokenizer
from ..train.metrics import plot_loss
from ..train.trainer import Trainer, TrainingArguments, TrainingResult
from .base import BASE
from .pretrained import from_pretrained, save_pretrained

CONTEXT = 512


def blocks(split: str, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """The general text of a split as pairs (input_ids, labels) of [CONTEXT]: documents shuffled, EOS after each."""
    documents = general_text(split)
    order = np.random.default_rng(0).permutation(len(documents))
    stream = encode_documents([documents[i] for i in order], tokenizer)
    return [(row, row) for row in stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)]


def build(out: Path, work: Path, steps: int, start: Path | None = None) -> None:
    """Train (or continue training) and write the base into `out`; with `start`, from that model's weights."""
    tokenizer = Tokenizer.load(BASE)
    config = TransformerConfig.llama(
        vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Transformer(config, seed=0) if start is None else from_pretrained(start)[0]
    training, validation = blocks("train", tokenizer), blocks("validation", tokenizer)[:64]
    args = TrainingArguments(
        output_dir=work, max_steps=steps, per_device_train_batch_size=8, seed=0 if start is None else 1,
        learning_rate=3e-3 if start is None else 2e-3, lr_scheduler_type="cosine", warmup_steps=min(100, steps), weight_decay=0.1, adam_beta2=0.95,
        eval_steps=200, save_steps=200,
    )  # fmt: skip
    trainer = Trainer(model, training, validation, args, pad_token_id=tokenizer.pad_token_id)
    result = trainer.train(resume_from_checkpoint=any(work.glob("checkpoint-*")))
    held_out = {split: trainer.evaluate(blocks(split, tokenizer)) for split in ("validation", "test")}
    out.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, out, tokenizer, dtype="float16")
    write_record(out, args, result, held_out, len(training), start)


def write_record(
    out: Path, args: TrainingArguments, result: TrainingResult, held_out: dict, count: int, start: Path | None
) -> None:
    """`training.json` and `loss.png` beside the weights."""
    settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("output_dir", "progress")}
    curve = [[step, round(loss, 4)] for step, loss in result.losses() if step % 20 == 0 or step == 1]
    record = {
        "command": f"python -m minipeft.hub.build_base OUT_DIR --steps {args.max_steps}" + " --start DIR" * (start is not None),
        "tokens_seen": args.max_steps * args.per_device_train_batch_size * CONTEXT,
        "training_blocks": count,
        "tokens_per_block": CONTEXT,
        "held_out_loss_nats_per_token": {split: round(loss, 4) for split, loss in held_out.items()},
        "settings": settings,
        "training_loss": curve,
        "validation_loss_of_64_blocks": [[step, round(loss, 4)] for step, loss in result.losses("eval_loss")],
    }
    if start is not None and (start / "training.json").exists():
        record["start"] = json.loads((start / "training.json").read_text("utf-8"))  # how the model in DIR was trained
    write_json(out / "training.json", record)
    plot_loss(result.history, out / "loss.png")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m minipeft.hub.build_base", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory for the model (made if missing)")
    parser.add_argument("--work", type=Path, help="directory for checkpoints and metrics (default: OUT_DIR/work)")
    parser.add_argument("--steps", type=int, default=3600, help="training steps of 4,096 tokens (default: %(default)s, an hour)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="a model of this shape to go on from, at two thirds of the rate")
    args = parser.parse_args(argv)
    build(args.out, args.work or args.out / "work", args.steps, args.start)


if __name__ == "__main__":
    main()
