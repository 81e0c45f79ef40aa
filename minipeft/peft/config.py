"""What every method's configuration shares: which modules it is for, and how it is read from and written as JSON.

A method is a configuration (a dataclass, with the field names of Hugging Face PEFT) that says which parameters it adds
where (`parameter_shapes`) and builds them: on layers (`adapters`), or in front of the input (`prompt`). Targets are
chosen by name alone, so that a parameter count can be had from a table of shapes without building anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from ..nn.layers import Conv1D, Embedding, LayerNorm, Linear, RMSNorm
from ..nn.module import Module
from ..options import check, configuration, option
from ..quant.surgery import HEADS

Shape = tuple[int, ...]
Seed = tuple[int, ...] | None  # names a random stream: numpy.random.default_rng(seed); None: allocate nothing

# model_type -> the layers that LoRA and its kin are put on where nothing is said, as in PEFT
QUERY_AND_VALUE = {
    "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "roberta": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"], "t5": ["q", "v"], "mt5": ["q", "v"], "bloom": ["query_key_value"],
    "opt": ["q_proj", "v_proj"],
}  # fmt: skip


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


def family_of(model: Any) -> str | None:
    """The model_type whose module names a model has: Mistral's and Qwen2's are Llama's."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return "llama" if model_type in ("mistral", "qwen2") else model_type


def shape_of(module: Module) -> Shape:
    """The shape of a layer's weight as it is stored: [out, in] for linear, [in, out] for conv1d, [V, d], or [d]."""
    return (module.out_features, module.in_features) if kind_of(module) == "linear" else module.weight.shape


@configuration(kw_only=True)
class PeftConfig(ABC):
    """The options all methods have."""

    target_modules: list[str] | str | None = option(
        None,
        "names (a module matches when its path is the name or ends in '.name'), a regular expression that must match the "
        "whole path, or all-linear (every linear layer but the output head); None: the usual ones of the architecture",
    )
    exclude_modules: list[str] | str | None = option(None, "names or a regular expression; what matches is no target")
    layers_to_transform: list[int] | int | None = option(
        None, "only the layers of these numbers, the first number of a path (with target names only)", least=0
    )
    layers_pattern: list[str] | str | None = option(
        None, "name of the list of layers (or a regular expression), where a path has several numbers"
    )
    modules_to_save: list[str] | str | None = option(
        None,
        "ends of paths ('norm' matches input_layernorm, as in PEFT) of modules that are trained whole, as copies, and "
        "saved with the adapter",
    )
    base_model_name_or_path: str | None = option(None, "what the adapter was trained on, for the reader of its file")
    task_type: str | None = option(None, "what the model is for, in PEFT's words: CAUSAL_LM, SEQ_CLS, ...")
    inference_mode: bool = option(False, "a new model's adapter is frozen (set_adapter decides anew)")

    peft_type: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()  # the kinds of layers the method can be put on
    usual_targets: ClassVar[dict[str, list[str]]] = {}  # model_type -> target_modules
    ignored: ClassVar[frozenset[str]] = frozenset()  # options of PEFT that do not change what a saved adapter computes
    stores_constants: ClassVar[bool] = True  # whether the file holds the constants, or they are computed from the base
    averages: ClassVar[int] = 0  # running averages of each trained number that `after_step` keeps

    def __post_init__(self) -> None:
        check(self, PeftError)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            if isinstance(getattr(self, name), (set, frozenset, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(getattr(self, name), str):
                check_pattern(name, getattr(self, name))
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else ():
            check_pattern("layers_pattern", pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise PeftError("layers_to_transform needs target_modules given as names, not as a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise PeftError("layers_pattern says where layers_to_transform counts; give layers_to_transform too")

    # ------------------------------------------------------------------------------------------ what a method defines

    @abstractmethod
    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        """The parameters the method adds for one of the model's: {name within the module: shape}, {} where none.

        Args:
            name: the path of the module that holds the parameter.
            kind: "linear", "conv1d", "embedding" or "norm" for a module's weight, "bias" for its bias.
            shape: of that weight or bias, as it is stored.
        """

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """{name: shape} of what the method adds and never trains; {} for most.

        `layers` are the targets: {path: (kind, shape of the weight)}.
        """
        return {}

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Any]:
        """For methods that change layers: {path: trained part, an `Adapter`} of every target.

        `seeds` name the initial values by path; None where they are about to be loaded.
        """
        return {}

    def prompt(self, model: Module, seed: Seed) -> Any:
        """For methods that change a model's input: the trained part, a `Prompt`; None for all others."""
        return None

    def penalty(self, adapters: list[Any]) -> Any:
        """A term that the method adds to the training loss, from the active adapter's parts; None for most."""
        return None

    def after_step(self, model: Any, adapter_name: str, step: int) -> None:
        """What the method does after step number `step` (from 1) of the optimizer, while the gradients are there."""
        return None

    def training_state(self, model: Any, adapter_name: str) -> dict[str, Any]:
        """Arrays by name that `after_step` keeps beside the parameters; {} for most."""
        return {}

    def load_training_state(self, model: Any, adapter_name: str, arrays: dict[str, Any]) -> None:
        """Put back what `training_state` gave."""
        return None

    # ------------------------------------------------------------------------------------------------------- targets

    def with_targets(self, model: Module) -> PeftConfig:
        """This configuration, with target_modules filled in for the model's architecture where it was None."""
        if self.target_modules is not None or not self.kinds:
            return self
        model_type = family_of(model)
        if model_type not in self.usual_targets:
            known = ", ".join(self.usual_targets) or "none"
            raise PeftError(
                f"{type(self).__name__} needs target_modules for a {type(model).__name__} of type {model_type!r} "
                f"(it knows those of: {known})"
            )
        return self.replace(target_modules=list(self.usual_targets[model_type]))

    def targets(self, name: str, kind: str) -> bool:
        """Whether a module, by its path and kind, is one that the method is put on."""
        if not name or self._saves(name) or _matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return kind in ("linear", "conv1d") and name.rpartition(".")[2] not in HEADS  # as in PEFT
        if not _matches(self.target_modules, name):
            return False
        if self.layers_to_transform is None or name in self.target_modules:
            return True
        layers = self.layers_to_transform
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or [r"[^.]*"]
        found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name))), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)

    def _saves(self, name: str) -> bool:
        return any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in self.modules_to_save or ())

    def resolve(self, modules: dict[str, Module]) -> dict[str, Module]:
        """{path: layer} of every target among a model's modules. Raises PeftError for a name that matches nothing."""
        found = {name: m for name, m in modules.items() if self.targets(name, kind_of(m) or "")}
        self.check_names(modules, found)
        for name, module in found.items():
            self.check_target(name, module)
        return found

    def check(self, model: Module) -> None:
        """Raises PeftError where the method cannot be put on the model; builds nothing."""
        config = self.with_targets(model)
        modules = dict(model.named_modules())
        for name, module in config.resolve(modules).items():
            config.parameter_shapes(name, kind_of(module) or "", shape_of(module) if kind_of(module) else ())
        config.resolve_saved(modules)

    def check_names(self, paths: Iterable[str], found: Iterable[str]) -> None:
        """Raises PeftError where a name to target or exclude is none of the model's `paths`, or nothing was `found`."""
        paths = list(paths)
        if isinstance(self.target_modules, list):
            for target in self.target_modules:
                if not any(_matches([target], name) for name in paths):
                    raise PeftError(f"target_modules: no module is called {target!r}{_near(target, paths)}")
        out = self.exclude_modules
        for name in [out] if isinstance(out, str) else out or ():
            if not any(_matches(out if isinstance(out, str) else [name], path) for path in paths):
                raise PeftError(f"exclude_modules: no module is called {name!r}{_near(name, paths)}")
        if (self.kinds or self.target_modules) and not found:
            asked, hint = self.target_modules, ""
            if isinstance(asked, str):
                hint = " (a string is a regular expression for whole paths; names go into a list)"
            raise PeftError(
                f"target_modules={asked!r}{hint} matches no module that may be adapted{_near(str(asked), paths)}"
            )

    def check_target(self, name: str, module: Module) -> None:
        """Raises PeftError for a module that the method cannot be put on."""
        if kind_of(module) not in self.kinds:
            raise PeftError(
                f"target_modules: {name!r} is a {type(module).__name__}; "
                f"{type(self).__name__} works on {', '.join(self.kinds)}"
            )

    def resolve_saved(self, modules: dict[str, Any]) -> dict[str, Any]:
        """{path: module} of modules_to_save. Raises PeftError for a name that matches nothing."""
        found = {}
        for target in self.modules_to_save or ():
            matched = {name: m for name, m in modules.items() if name.endswith(target)}  # PEFT's rule: no dot before it
            if not matched and self.task_type in ("SEQ_CLS", "TOKEN_CLS") and target in ("classifier", "score"):
                continue  # PEFT names both of a classifier's usual heads
            if not matched:
                raise PeftError(f"modules_to_save: no module is called {target!r}{_near(target, modules)}")
            found.update(matched)
        return found

    # ---------------------------------------------------------------------------------------------------------- JSON

    def replace(self, **fields: Any) -> Any:
        """The same configuration with some options changed."""
        return dataclasses.replace(self, **fields)

    def saved_as(self, parts: list[Any]) -> Any:
        """The configuration that goes into a file beside the arrays of these trained parts: this one, for most."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says."""
        return {"peft_type": self.peft_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        """The configuration of an adapter_config.json.

        Raises PeftError naming each option that this package does not know and that is set to something: it would
        change the result.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        refused = {k: v for k, v in options.items() if k not in known | _NEUTRAL | cls.ignored and not _unset(v)}
        if refused:
            listed = ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
            raise PeftError(f"the adapter uses options that {cls.__name__} does not have: {listed}")
        return cls(**{k: v for k, v in options.items() if k in known})


# Options of PEFT's files that say nothing about what the adapter computes.
_NEUTRAL = frozenset(
    "peft_type peft_version auto_mapping revision megatron_config megatron_core qalora_group_size "
    "eva_config corda_config lora_ga_config loftq_config".split()
)


def _unset(value: Any) -> bool:
    return value in (None, False, "none") or value == [] or value == {}


def _matches(targets: list[str] | str | None, name: str) -> bool:
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _near(name: str, modules: Iterable[str]) -> str:
    """"; nearest: a, b" of the module names (last parts, and whole paths) that resemble `name`."""
    paths = [p for p in modules if p]
    if not paths:
        return "; nothing is inside this one: put a single layer into a Sequential, where it has the name '0'"
    last = dict.fromkeys(p.rpartition(".")[2] for p in paths if not p.rpartition(".")[2].isdigit())
    near = difflib.get_close_matches(name.rpartition(".")[2], list(last), n=3, cutoff=0.4) or difflib.get_close_matches(
        name, paths, n=3, cutoff=0.4
    )
    return f"; nearest: {', '.join(near)}" if near else f"; the modules are called {', '.join(list(last)[:12])}"


def check_pattern(option: str, pattern: str) -> None:
    """Raises PeftError where an option's pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise PeftError(f"{option}={pattern!r} is not a regular expression: {error}") from error


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's path (rank_pattern, alpha_pattern)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
