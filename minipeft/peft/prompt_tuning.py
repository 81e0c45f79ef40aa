"""Prompt tuning: soft tokens in front of the input (Lester, Al-Rfou & Constant 2021, arXiv:2104.08691).

    [P; E(x)] ─► frozen model,    P [p, d] trained, p = num_virtual_tokens, E the model's token embedding      section 2

A soft token is a vector that no token of the vocabulary need have. p d numbers are trained, and p positions of the
context are spent on them in every forward pass: `prompt_learning` widens the mask and the positions by p, and `model`
drops the first p logits. The start matters (section 3.2, figure 3): random vectors (RANDOM, PEFT's default) are far
from the embeddings that the model knows, words (SAMPLE_VOCAB, and PEFT's TEXT) are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..autograd import ops as F
from ..backend import xp_of
from ..nn.module import Module
from ..nn.transformer import Transformer
from ..options import configuration, option
from .config import PeftError, Seed, Shape
from .prompt_learning import STORED, Prompt, PromptLearningConfig
from .weights import fill


class SoftTokens(Prompt):
    """Vectors P [p, d] in front of the input's embeddings."""

    def put(self, model: Transformer, given: dict[str, Any]) -> dict[str, Any]:
        """[P; E(x)], inputs_embeds [B, p + T, d], in place of input_ids."""
        x = given["inputs_embeds"]  # [B, T, d]
        if x is None:
            x = model.backbone.embedding(given["input_ids"], given["rng"])
        P = self.vectors()
        P = P if P.dtype == x.dtype else F.to(P, x.dtype)
        soft = F.broadcast_to(P, (x.shape[0], *P.shape))  # [B, p, d]
        return {**given, "input_ids": None, "inputs_embeds": F.cat([soft, x], axis=1)}


class PromptEmbedding(SoftTokens):
    """The vectors themselves, prompt_embeddings: P [p, d]. They start as the embeddings of `ids`, or standard normal."""

    def __init__(self, shapes: dict[str, Shape], embedding: Module, seed: Seed, ids: list[int] | None = None):
        super().__init__(shapes, embedding, seed)
        self.length = self.prompt_embeddings.shape[0]
        P, E = self.prompt_embeddings, embedding.weight.data
        if seed is not None and ids is None:
            fill(P, np.random.default_rng(seed).standard_normal(P.shape, np.float32))
        elif seed is not None:
            fill(P, E[xp_of(E).asarray(ids)])


@configuration
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's options, with PEFT's names."""

    prompt_tuning_init: str = option(
        "RANDOM", "standard normal, or embeddings of random tokens, or of a text's tokens, cut off or repeated",
        choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    )  # fmt: skip
    prompt_tuning_init_text: str | None = option(None, "the text, with tokenizer_name_or_path")
    tokenizer_name_or_path: str | None = option(None, "directory of the text's tokenizer.json")
    prompt_tuning_init_ids: list[int] | None = option(None, "or the text's token ids (not in PEFT, nor in its file)")

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_ids:
            if not self.prompt_tuning_init_text or not self.tokenizer_name_or_path:
                raise PeftError(
                    "prompt_tuning_init='TEXT' needs prompt_tuning_init_ids, or prompt_tuning_init_text and "
                    "tokenizer_name_or_path"
                )

    def prompt_shapes(self, width: int) -> dict[str, Shape]:
        return {STORED: (self.num_virtual_tokens, self.token_dim or width)}

    def build(self, model: Transformer, seed: Seed) -> Prompt:
        E = model.backbone.embedding
        shapes, ids = self.prompt_shapes(model.config.hidden_size), self.first_ids(E.weight.shape[0], seed)
        return PromptEmbedding(shapes, E, seed, ids)

    def first_ids(self, vocabulary: int, seed: Seed) -> list[int] | None:
        """The p tokens whose embeddings are the start; None: it is random, or not wanted (no seed)."""
        p, ids = self.num_virtual_tokens, self.prompt_tuning_init_ids
        if seed is None or self.prompt_tuning_init == "RANDOM":
            return None
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return np.random.default_rng(seed).integers(0, vocabulary, p).tolist()
        if not ids:
            from tokenizers import Tokenizer

            path = Path(self.tokenizer_name_or_path)
            path = path / "tokenizer.json" if path.is_dir() else path
            if not path.is_file():
                raise PeftError(f"tokenizer_name_or_path={self.tokenizer_name_or_path!r}: no tokenizer.json is there")
            ids = Tokenizer.from_file(str(path)).encode(self.prompt_tuning_init_text).ids
        if not ids:
            raise PeftError(f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} has no tokens")
        ids = (list(ids) * -(-p // len(ids)))[:p]
        if not all(0 <= i < vocabulary for i in ids):
            raise PeftError(f"prompt_tuning_init: the text has token ids outside of 0..{vocabulary - 1}: {ids}")
        return ids
