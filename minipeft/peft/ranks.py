"""The rank r and the scaling of low-rank methods, which may differ from layer to layer (LoRA, LoHa, LoKr)."""

from __future__ import annotations

from typing import Any

from ..nn.module import Module
from ..options import configuration, option
from .config import PeftConfig, PeftError
from .targets import check_patterns, match


@configuration(kw_only=True)
class Ranked(PeftConfig):
    """The options of a method whose r and alpha may differ from layer to layer; a pattern matches the end of a path."""

    rank_pattern: dict[str, int] = option({}, "{end of a path, or a regular expression: r there}", least=1)
    alpha_pattern: dict[str, float] = option({}, "{end of a path, or a regular expression: alpha there}")

    def __post_init__(self) -> None:
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        super().__post_init__()
        check_patterns("rank_pattern", *self.rank_pattern)
        check_patterns("alpha_pattern", *self.alpha_pattern)

    def rank(self, name: str) -> int:
        """r of the module at a path."""
        return pattern_value(self.rank_pattern, name, self.r)

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        found = super().resolve(modules)
        for what in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, what):
                if not any(pattern_value({pattern: True}, name, False) for name in found):
                    such = ", ".join(list(found)[:3])
                    raise PeftError(f"{what}: {pattern!r} matches none of the adapted modules, such as {such}")
        return found


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's path; else the default."""
    return next((value for pattern, value in patterns.items() if match(rf"(.*\.)?({pattern})$", name)), default)


def check_rank(config: PeftConfig, name: str, r: int, n_out: int, n_in: int) -> None:
    """Raises PeftError for a rank that the matrix [n_out, n_in] at a path does not have.

    An adapter that is read from a file (inference_mode) may have any rank, as in PEFT.
    """
    if r > min(n_in, n_out) and not config.inference_mode:
        raise PeftError(f"{name}: a rank of {r} is larger than the matrix [{n_out}, {n_in}]; take a smaller one")
