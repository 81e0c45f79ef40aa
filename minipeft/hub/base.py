"""The small pretrained base that ships with the package; `build_base.py` trained it."""

from __future__ import annotations

from pathlib import Path

from ..nn.transformer import Transformer
from ..text.tokenizer import Tokenizer
from .pretrained import HubError, from_pretrained

BASE = Path(__file__).parent / "base"
NAME = "minipeft:base"  # what adapters of it remember; no name on the Hugging Face Hub has a colon


def load_base(backend: str | None = None, load_in_4bit: bool = False) -> tuple[Transformer, Tokenizer]:
    """(model, tokenizer): the shipped base, a Hugging Face directory read offline; float16 on disk, float32 in memory.

    `load_in_4bit` as in `from_pretrained`.

    Raises HubError when this installation lacks its files.
    """
    if not (BASE / "model.safetensors").is_file():
        raise HubError(f"{BASE}: the shipped base's weights are not in this installation; install the package again")
    model, tokenizer = from_pretrained(BASE, backend=backend, load_in_4bit=load_in_4bit)
    model.name_or_path = NAME
    return model, tokenizer
