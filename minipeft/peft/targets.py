"""Which layers of a model a method is put on: its targets.

    with_targets     a configuration with the usual targets of a model's architecture filled in
    targets          whether a module is a target, by its path and kind
    resolve          {path: layer} of the targets among a model's modules
    resolve_saved    {path: module} of modules_to_save
    check_names      an error that names what matches nothing, and what was perhaps meant

Names alone decide, so that parameters can be counted from a table of shapes without building anything. The rules are
Hugging Face PEFT's.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from copy import copy
from functools import lru_cache
from typing import Any, ClassVar

from ..nn.heads import HEADS
from ..nn.layers import Conv1D, Embedding, LayerNorm, Linear, RMSNorm
from ..nn.module import Module
from ..options import check, configuration, option

Shape = tuple[int, ...]


def by_family(table: dict[str, list[str]]) -> dict[str, list[str]]:
    """{"bert roberta": names} as {"bert": names, "roberta": names}."""
    return {family: names for families, names in table.items() for family in families.split()}


# model_type -> the layers that LoRA and its relatives are put on where target_modules is None, as in PEFT
QUERY_AND_VALUE = by_family({
    "gpt2 gpt_bigcode": ["c_attn"], "gpt_neox falcon bloom": ["query_key_value"],
    "llama mixtral qwen3 gemma gemma2 gemma3_text stablelm gptj opt": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"], "t5 mt5": ["q", "v"],
    "bert roberta xlm-roberta": ["query", "value"], "deberta-v2": ["query_proj", "value_proj"],
})  # fmt: skip


class PeftError(ValueError):
    """A method cannot be applied as it was asked for; nothing has been changed."""


def kind_of(module: Module) -> str | None:
    """"linear", "conv1d", "embedding", "norm", or None for a module that is none of these."""
    if isinstance(module, Linear) or hasattr(module, "dequantize"):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, Embedding):
        return "embedding"
    return "norm" if isinstance(module, (LayerNorm, RMSNorm)) else None


def shape_of(module: Module) -> Shape:
    """The shape of a layer's weight as it is stored: [out, in] for linear, [in, out] for conv1d, [V, d], or [d]."""
    return (module.out_features, module.in_features) if kind_of(module) == "linear" else module.weight.shape


def out_in_shape(kind: str, shape: Shape) -> Shape:
    """(outputs, inputs) of a layer of this kind and shape; of an embedding, whose input is one-hot, (d, V)."""
    return shape if kind == "linear" else shape[::-1]


def family_of(model: Any, known: Container[str]) -> str | None:
    """A model's model_type; where that is not `known`, the one whose module names it has: Mistral's are Llama's."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return "llama" if model_type in ("mistral", "qwen2") and model_type not in known else model_type


CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")  # task types
CLASSIFIERS = ("classifier", "score")  # what PEFT takes their heads to be called


@configuration(kw_only=True)
class Targets:
    """The options that say which layers a method is put on.

    A name in target_modules matches a path that is the name or ends in ".name"; all-linear is every linear layer but
    the output head. layers_to_transform looks at the first number of a path, and goes with no regular expression; in a
    model's adapter names then stand for all-linear, which PEFT does not read beside it. A name in modules_to_save may
    begin in the middle of a word ("norm" matches input_layernorm), as in PEFT.
    Raises PeftError for options that contradict each other, and for what is no regular expression, or too long a one.
    """

    target_modules: list[str] | str | None = option(
        None, "ends of paths, a regular expression for whole paths, or all-linear; None: the architecture's usual ones"
    )
    exclude_modules: list[str] | str | None = option(None, "names or a regular expression; what matches is no target")
    layers_to_transform: list[int] | int | None = option(None, "only layers of these numbers; None or []: all", least=0)
    layers_pattern: list[str] | str | None = option(None, "what stands before that number, where a path has several")
    modules_to_save: list[str] | str | None = option(None, "ends of paths of modules that are trained whole, as copies")

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")  # of layers the method can be put on
    usual_targets: ClassVar[dict[str, list[str]] | None] = QUERY_AND_VALUE  # model_type -> target_modules

    def __post_init__(self) -> None:
        check(self, PeftError)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, sorted(getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_patterns(name, getattr(self, name))
        check_patterns("layers_pattern", *as_list(self.layers_pattern))
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if pattern and self.layers_to_transform is not None:
            needs = "target_modules given as names or as all-linear, not as a regular expression"
            raise PeftError(f"layers_to_transform needs {needs}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise PeftError("layers_pattern says where layers_to_transform counts; give layers_to_transform too")

    def replace(self, **fields: Any) -> Any:
        """The same configuration with some options changed."""
        return dataclasses.replace(self, **fields)

    def with_targets(self, model: Module) -> Any:
        """This configuration, with target_modules filled in for the model's architecture where it was None.

        Raises PeftError for an architecture whose usual targets are not known.
        """
        if self.target_modules is not None or not self.usual_targets:
            return self
        model_type = family_of(model, self.usual_targets)
        if model_type not in self.usual_targets:
            unknown = f"a {type(model).__name__} of type {model_type!r}"
            known = f"(it knows those of: {', '.join(self.usual_targets)})"
            raise PeftError(f"{type(self).__name__} needs target_modules for {unknown} {known}")
        return self.replace(target_modules=copy(self.usual_targets[model_type]))

    def targets(self, name: str, kind: str) -> bool:
        """Whether the method is put on the module at this path, of this kind."""
        saved = any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in self.trained_whole)
        if not name or saved or matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            found = kind in ("linear", "conv1d") and name.rpartition(".")[2] not in HEADS
        else:
            found = matches(self.target_modules, name)
        layers = as_list(self.layers_to_transform)
        if not found or not layers or name in as_list(self.target_modules):
            return found
        patterns = [rf"(?:^|.*?\.)(?:{p})\.(\d+)\." for p in as_list(self.layers_pattern)] or [r".*?\.[^.]*\.(\d+)\."]
        number = next((m for p in patterns if (m := match(p, name))), None)
        return number is not None and int(number.groups()[-1]) in layers

    @property
    def trained_whole(self) -> list[str]:
        """modules_to_save, and of a classifier its head, which is random, as in PEFT."""
        return list(dict.fromkeys((*(self.modules_to_save or ()), *(self.task_type in CLASSIFIES) * CLASSIFIERS)))

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        """{path: layer} of every target among a model's modules.

        Raises PeftError for a name that matches nothing, and for a module that the method cannot be put on.
        """
        kinds = {name: kind_of(m) or "" for name, m in modules.items()}
        found = {name: m for name, m in modules.items() if self.targets(name, kinds[name])}
        self.check_names(kinds, found)
        for name, module in found.items():
            self.check_target(name, module)
        return found

    def resolve_saved(self, modules: dict[str, Any]) -> dict[str, Any]:
        """{path: module} of modules_to_save, and of a classifier's head. Raises PeftError for a name that matches nothing."""
        found = {}
        for target in self.trained_whole:
            matched = {name: m for name, m in modules.items() if name.endswith(target)}  # PEFT's rule: no dot before it
            if not matched and target not in (self.task_type in CLASSIFIES) * CLASSIFIERS:  # PEFT names both
                raise PeftError(f"modules_to_save: no module is called {target!r}{_near(target, modules)}")
            found.update(matched)
        return found

    def check_names(self, paths: Mapping[str, str], found: Iterable[str]) -> None:
        """Raises PeftError where a name to target or exclude is none of a model's {path: kind}, or nothing was `found`."""
        names, out = self.target_modules, self.exclude_modules
        for option_, targets in (("target_modules", [] if isinstance(names, str) else names), ("exclude_modules", out)):
            for name in as_list(targets):
                if not any(matches(targets if isinstance(targets, str) else [name], path) for path in paths):
                    raise PeftError(f"{option_}: no module is called {name!r}{_near(name, paths)}")
        if (self.kinds or names) and not found:
            pattern = isinstance(names, str) and names != "all-linear"
            hint = " (a string is a regular expression for whole paths; names go into a list)" * pattern
            layers = as_list(self.layers_to_transform)
            near = f" in the layers {layers} of layers_to_transform" if layers else _near(str(names), paths)
            raise PeftError(f"target_modules={names!r}{hint} matches no module that may be adapted{near}")

    def check_target(self, name: str, module: Module) -> None:
        """Raises PeftError for a module that the method cannot be put on."""
        kind, made = kind_of(module), type(module).__name__
        if kind not in self.kinds:
            works = f"{type(self).__name__} works on {', '.join(self.kinds)}"
            raise PeftError(f"target_modules: {name!r} is a {made}; {works}")
        stored = getattr(self, "fan_in_fan_out", None)
        if kind in ("linear", "conv1d") and stored not in (None, kind == "conv1d"):
            weight = f"its weight {'[in, out]' if kind == 'conv1d' else '[out, in]'}; leave it None"
            raise PeftError(f"fan_in_fan_out={stored}, but {name!r} is a {made}, which stores {weight}")


def matches(targets: list[str] | str | None, name: str) -> bool:
    """Whether a path is, or ends in, one of these names; or matches this regular expression as a whole."""
    if isinstance(targets, str):
        return match(targets, name, whole=True) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


LONG = 10_000  # characters of a pattern, with its counted repeats written out, as the package regex compiles them
SECONDS, SLOW = 0.1, 0.001  # of the processor: what a pattern may take for one path; ten times as much for all slow ones
_spent: Counter[str] = Counter()  # by pattern, on those


@lru_cache(1 << 14)
def match(pattern: str, path: str, whole: bool = False) -> Any:
    """`re.match` (or `fullmatch`) in bounded time, by the package regex: "(.*)*x" takes `re` 2^n steps for n characters.

    Raises PeftError for a pattern that takes too long, or is none.
    """
    import regex

    began, found = time.thread_time(), None
    try:
        found = (regex.fullmatch if whole else regex.match)(pattern, path, timeout=SECONDS)
    except TimeoutError:
        _spent[pattern] += 10 * SECONDS
    except regex.error as error:
        raise PeftError(f"{pattern!r} is not a regular expression: {error}") from error
    if (took := time.thread_time() - began) > SLOW:
        _spent[pattern] += took
    if _spent[pattern] > 10 * SECONDS:
        raise PeftError(f"the pattern {pattern!r} takes too long to match; repeat nothing that repeats itself")
    return found


def check_patterns(name: str, *patterns: str) -> None:
    """Raises PeftError where a pattern of an option is no regular expression, or takes too much to compile."""
    for pattern in patterns:
        repeats = re.findall(r"\{(\d*),?(\d*)([\s#]?)", pattern)  # with (?x), digits go on after blanks and comments
        times = (max(1.0, float(least or 1), float(most or 1), LONG * bool(more)) for least, most, more in repeats)
        if len(pattern) * math.prod(times) > LONG:
            what = f"{LONG:,} characters long, times the numbers of its counted repeats"
            raise PeftError(f"{name}: a pattern must be at most {what}; {pattern[:60]!r} is longer")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError, TypeError) as error:
            raise PeftError(f"{name}={pattern!r} is not a regular expression: {error}") from error


def as_list(value: Any) -> list:
    """A list of its values, of a single one (a text, a number), or of none (None)."""
    if value is None or isinstance(value, (str, int)):
        return [] if value is None else [value]
    return list(value)


def listed(argument: str, names: Iterable[str]) -> list[str]:
    """Names as a list, also of an array of text. Raises PeftError for one text in place of a list."""
    if isinstance(names, str):
        raise PeftError(f"{argument} must be a list of names, such as [{names!r}], not the text {names!r}")
    return [str(name) for name in names]


def _near(name: str, modules: Iterable[str]) -> str:
    """"; nearest: a, b" of the module names (last parts, and whole paths) that resemble `name`."""
    paths = [p for p in modules if p]
    if not paths:
        return "; nothing is inside this one: put a single layer into a Sequential, where it has the name '0'"
    last = dict.fromkeys(p.rpartition(".")[2] for p in paths if not p.rpartition(".")[2].isdigit())
    near = difflib.get_close_matches(name.rpartition(".")[2], last, cutoff=0.4)
    near = near or difflib.get_close_matches(name, paths, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else f"; the modules are called {', '.join(list(last)[:12])}"
