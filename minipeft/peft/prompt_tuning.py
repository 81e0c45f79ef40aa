"""Prompt tuning: soft tokens in front of the input (Lester, Al-Rfou & Constant 2021, arXiv:2104.08691).

    [P; E(x)] ─► frozen model,    P [p, d] trained, p = num_virtual_tokens, E the model's token embedding      section 2

A row of P need not be the embedding of any token. Only P is trained, and a file holds only P. The model runs on p + T
positions (virtual_positions.py widens the mask and the positions); its caller gets the logits of the T, and in `loss`
the last soft token predicts the first token if its label counts (a Trainer's never does: see `collate`). P goes in while the cache is empty, and stays there. It cannot be merged
into the weights. The start matters, the less the larger the model (section 3.2, figure 3): RANDOM, PEFT's default, is
standard normal (the paper's is uniform); SAMPLE_VOCAB (any token; in the paper a common one) and TEXT copy embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import xp_of
from ..nn.module import Module
from ..nn.transformer import Transformer
from ..options import configuration, option
from .config import PeftError, Shape
from .prompt_learning import STORED, Prompt, PromptLearningConfig
from .weights import fill


class SoftTokens(Prompt):
    """Puts P [p, d] in front of the input's embeddings. A subclass gives P: trained itself, or computed (P-tuning)."""

    def put(self, model: Transformer, given: dict[str, Any], vectors: Tensor) -> dict[str, Any]:
        """[P; E(x)], P being `vectors`: inputs_embeds [B, p + T, d], in place of input_ids."""
        x = given["inputs_embeds"]  # [B, T, d]
        if x is None:
            x = model.backbone.embed(given["input_ids"], given["rng"])
        P = vectors if vectors.dtype == x.dtype else F.to(vectors, x.dtype)  # x may be float16, what is trained not
        soft = F.broadcast_to(P, (x.shape[0], *P.shape[-2:]))  # [B, p, d]
        return {**given, "input_ids": None, "inputs_embeds": F.cat([soft, x], axis=1)}


class PromptEmbedding(SoftTokens):
    """P is trained itself: prompt_embeddings [p, d]. It starts as E[ids], or standard normal."""

    def start(self, layer: Module, generator: np.random.Generator) -> None:
        E = layer.weight.data
        ids = self.config.first_ids(E.shape[0], generator)
        if ids is None:
            super().start(layer, generator)
        else:
            fill(self.prompt_embeddings, E[xp_of(E).asarray(ids)])


@configuration
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's options, with PEFT's names."""

    prompt_tuning_init: str = option(
        "RANDOM", "standard normal, or embeddings of random tokens, or of a text's tokens, cut off or repeated",
        choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    )  # fmt: skip
    prompt_tuning_init_text: str | None = option(None, "the text, with tokenizer_name_or_path")
    tokenizer_name_or_path: str | None = option(None, "directory of the text's tokenizer.json")
    prompt_tuning_init_ids: list[int] | None = option(None, "the text's token ids (not in PEFT; not saved)")

    peft_type, adapter_class = "PROMPT_TUNING", PromptEmbedding
    usual_learning_rate = 3e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.prompt_tuning_init_ids or (self.prompt_tuning_init_text and self.tokenizer_name_or_path)
        if self.prompt_tuning_init_ids and self.prompt_tuning_init != "TEXT":
            raise PeftError("prompt_tuning_init_ids are the tokens of prompt_tuning_init='TEXT': set it, too")
        if self.prompt_tuning_init == "TEXT" and not given:
            needed = "prompt_tuning_init_ids, or prompt_tuning_init_text and tokenizer_name_or_path"
            raise PeftError(f"prompt_tuning_init='TEXT' needs {needed}")

    def prompt_shapes(self, width: int) -> dict[str, Shape]:
        return {STORED: (self.num_virtual_tokens, self.token_dim or width)}

    def first_ids(self, vocabulary: int, generator: np.random.Generator) -> list[int] | None:
        """The p tokens whose embeddings are the start; None: it is random."""
        p = self.num_virtual_tokens
        if self.prompt_tuning_init == "RANDOM":
            return None
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return generator.integers(0, vocabulary, p).tolist()
        ids = self.prompt_tuning_init_ids or self.text_ids()
        ids = (list(ids) * -(-p // len(ids)))[:p]  # repeated, then cut to p
        if not all(0 <= i < vocabulary for i in ids):
            raise PeftError(f"prompt_tuning_init: token ids outside of 0..{vocabulary - 1}: {ids}")
        return ids

    def text_ids(self) -> list[int]:
        """The tokens of prompt_tuning_init_text. Raises PeftError without a tokenizer.json, or where there are none."""
        from tokenizers import Tokenizer

        path = Path(self.tokenizer_name_or_path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise PeftError(f"tokenizer_name_or_path={self.tokenizer_name_or_path!r}: no tokenizer.json is there")
        try:
            ids = Tokenizer.from_file(str(path)).encode(self.prompt_tuning_init_text).ids
        except Exception as error:  # the library raises bare Exception, with the reason as its text
            raise PeftError(f"tokenizer_name_or_path={str(path)!r}: cannot be read ({error})") from error
        if not ids:
            raise PeftError(f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} has no tokens")
        return ids
