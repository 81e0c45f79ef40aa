"""How an answer is generated."""

from __future__ import annotations

from typing import Any

from ..options import check, configuration, option


@configuration(kw_only=True)
class GenerationConfig:
    """How a text is continued; names and meanings are those of Hugging Face's GenerationConfig where it has them.

    Raises ValueError, naming the option, for a value out of its range, and for a top_k or top_p at temperature 0.
    """

    max_new_tokens: int = option(100, "tokens to add at most", least=1)
    temperature: float = option(0.0, "0 is greedy", least=0, metavar="T")
    top_k: int | None = option(None, "draw from the K most probable tokens", least=0, metavar="K")
    top_p: float | None = option(None, "draw from the fewest tokens of mass P", above=0, most=1, metavar="P")
    seed: int = option(0, "seed of the draw", least=0)
    batch_size: int = option(8, "prompts at a time", least=1)

    def options(self) -> dict[str, Any]:
        """What `generate` and `generate_stream` take of it, but for the seed."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}

    def __post_init__(self) -> None:
        check(self)
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise ValueError("top_k and top_p limit a random draw; give a temperature above 0 with them")
