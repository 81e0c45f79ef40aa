"""Trains the shipped tokenizer, byte-level byte-pair encoding with 2,048 tokens, on the training split only.

    python -m minipeft.text.build_tokenizer OUT_DIR

Writes `tokenizer.json` and `tokenizer_config.json` (ChatML template) into OUT_DIR, the same bytes every time. The
vocabulary is 4 special tokens, the 256 bytes, and 1,788 merges (Sennrich et al. 2016, Neural Machine Translation of
Rare Words with Subword Units; on bytes as in GPT-2, Radford et al. 2019), digits one by one. Every text can be encoded,
and decodes to exactly itself.
"""

import argparse
from pathlib import Path

from .corpora import general_text
from .templates import CHATML
from .tokenizer import Tokenizer

VOCAB_SIZE = 2048
PAD, EOS, IM_START, IM_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0 to 3


def build_tokenizer(documents: list[str]) -> Tokenizer:
    """The tokenizer of these documents; the same documents give the same one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    config |= {"additional_special_tokens": [IM_START, IM_END], "clean_up_tokenization_spaces": False}
    return Tokenizer(backend, config | {"chat_template": CHATML})


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    name, form = "python -m minipeft.text.build_tokenizer", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=form)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    out = parser.parse_args(argv).out
    documents = general_text("train")
    tokenizer = build_tokenizer(documents)
    tokenizer.save(out)
    sample = documents[::100]
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    print(f"{out}: {tokenizer.vocab_size} tokens, {sum(map(len, sample)) / tokens:.2f} characters per token")


if __name__ == "__main__":
    main()
