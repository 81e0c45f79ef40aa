"""Prompt tuning: soft tokens in front of the input (Lester, Al-Rfou & Constant 2021, arXiv:2104.08691).

    [P; E(x)] ─► frozen model,   P [num_virtual_tokens, d] trained, E the model's token embedding        section 2

A soft token is a vector that no token of the vocabulary need have. P d numbers are trained, and P positions of the
context are spent on them in every forward pass. The start matters (section 3.2, figure 3): random vectors are far from
the embeddings that the model knows, words of the vocabulary are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..autograd import ops as F
from ..autograd.tensor import Tensor
from ..backend import xp_of
from ..nn.module import Module
from ..nn.transformer import Transformer
from ..options import configuration, option
from .config import PeftError, Seed, Shape
from .layer import Prompt, fill
from .prompt_learning import PromptLearningConfig, make_room

INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")


@configuration
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's options, with PEFT's names."""

    prompt_tuning_init: str = option(
        "RANDOM",
        "RANDOM (standard normal), SAMPLE_VOCAB (embeddings of random tokens), or TEXT (those of a text's tokens, cut off "
        "or repeated to num_virtual_tokens)",
        choices=INITS,
    )
    prompt_tuning_init_text: str | None = option(None, "the text, with tokenizer_name_or_path")
    tokenizer_name_or_path: str | None = option(None, "directory of the text's tokenizer.json")
    prompt_tuning_init_ids: list[int] | None = option(
        None, "or, in place of both, the text's token ids (not in PEFT, and not in its file)"
    )

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    ignored: ClassVar[frozenset[str]] = frozenset({"tokenizer_kwargs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init == "TEXT" and not self.prompt_tuning_init_ids:
            if not self.prompt_tuning_init_text or not self.tokenizer_name_or_path:
                raise PeftError(
                    "prompt_tuning_init='TEXT' needs prompt_tuning_init_ids, or prompt_tuning_init_text and "
                    "tokenizer_name_or_path"
                )

    def shapes(self, width: int) -> dict[str, Shape]:
        return {self.stored_key: (self.num_virtual_tokens, self.token_dim or width)}

    def build(self, model: Transformer, seed: Seed) -> Prompt:
        d = model.config.hidden_size
        if self.token_dim != d:
            raise PeftError(f"token_dim={self.token_dim}, but this model's embeddings have {d} numbers")
        prompt = PromptEmbedding(self.shapes(d), model.backbone.embedding, seed)
        if seed is not None:
            prompt.start(self, model.backbone.embedding, np.random.default_rng(seed))
        return prompt

    def token_ids(self) -> list[int]:
        """The tokens of the text for prompt_tuning_init='TEXT', num_virtual_tokens of them."""
        ids = self.prompt_tuning_init_ids
        if not ids:
            from tokenizers import Tokenizer

            path = Path(self.tokenizer_name_or_path)
            path = path / "tokenizer.json" if path.is_dir() else path
            if not path.is_file():
                raise PeftError(f"tokenizer_name_or_path={self.tokenizer_name_or_path!r}: no tokenizer.json is there")
            ids = Tokenizer.from_file(str(path)).encode(self.prompt_tuning_init_text).ids
        if not ids:
            raise PeftError(f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} has no tokens")
        return (list(ids) * -(-self.num_virtual_tokens // len(ids)))[: self.num_virtual_tokens]

    def to_dict(self) -> dict[str, Any]:
        """As PEFT has it. It asks TEXT for a tokenizer even of a trained prompt: without one, the start goes unsaid."""
        options = super().to_dict()
        del options["prompt_tuning_init_ids"]
        if self.prompt_tuning_init == "TEXT" and not self.tokenizer_name_or_path:
            options["prompt_tuning_init"] = "RANDOM"
        return options


class SoftTokens(Prompt):
    """Vectors in front of the input's embeddings. A subclass says how they are computed."""

    def vectors(self) -> Tensor:
        """[P, d]."""
        raise TypeError(f"{type(self).__name__} defines no vectors")

    def arguments(self, model: Module, **given: Any) -> dict[str, Any]:
        """The input's embeddings with the vectors in front: inputs_embeds [B, P + T, d] in place of input_ids."""
        given, absent = make_room(self.length, given, model.config.max_position_embeddings, in_input=True)
        if not absent:  # the vectors are among the positions seen
            return given
        x = given["inputs_embeds"]
        if x is None:
            x = model.backbone.embedding(given["input_ids"], given["rng"])
        vectors = self.vectors()
        if vectors.dtype != x.dtype:
            vectors = F.to(vectors, x.dtype)
        vectors = F.broadcast_to(vectors, (x.shape[0], *vectors.shape))
        return {**given, "input_ids": None, "inputs_embeds": F.cat([vectors, x], axis=1)}


class PromptEmbedding(SoftTokens):
    """The vectors themselves, prompt_embeddings [P, d]."""

    def __init__(self, shapes: dict[str, Shape], embedding: Module, seed: Seed):
        super().__init__(shapes, embedding, seed)
        self.length = self.prompt_embeddings.shape[0]

    def start(self, config: PromptTuningConfig, embedding: Module, generator: np.random.Generator) -> None:
        """Give the vectors their first values."""
        if config.prompt_tuning_init == "RANDOM":
            self.draw(generator)
            return
        weight = embedding.weight.data
        vocabulary = weight.shape[0]
        if config.prompt_tuning_init == "TEXT":
            ids = config.token_ids()
            if not all(0 <= i < vocabulary for i in ids):
                raise PeftError(f"prompt_tuning_init: the text has token ids outside of 0..{vocabulary - 1}: {ids}")
        else:
            ids = generator.integers(0, vocabulary, self.length).tolist()
        xp = xp_of(weight)
        self.prompt_embeddings.data = weight[xp.asarray(ids)].astype(self.prompt_embeddings.dtype)

    def draw(self, generator: np.random.Generator) -> None:
        """Give the vectors standard normal values."""
        fill(self.prompt_embeddings, generator.standard_normal(self.prompt_embeddings.shape, np.float32))

    def vectors(self) -> Tensor:
        return self.prompt_embeddings
