"""What the name of a fine-tuning method means, everywhere: one entry each, with its usual options.

`register` adds one of your own. The parts of the library are imported when one is used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

FULL, HEAD = 1e-3, 3e-3  # the usual rates of all weights, and of the head alone; of a method, see its configuration
WIDTH = 128  # of the shipped base


def at_width(rate: float, model: Any) -> float:
    """The rate on a model: in proportion less for one wider than the shipped base."""
    return rate * min(1.0, WIDTH / getattr(getattr(model, "config", None), "hidden_size", WIDTH))


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    label      what a table calls it, short; an option in braces stands for its value
    kind       the peft_type of its configuration; or what `minipeft.accounting` takes for it: None for all parameters,
               "head", "frozen"
    options    of the configuration, those that are not its class's defaults. A function gives the value for a run of a
               number of steps; the parameters are as many for any number.
    quantized  whether the frozen weights are stored in 4 bits, which shapes and the configuration do not say
    """

    label: str
    kind: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = False

    def config(self, steps: int = 1) -> Any:
        """What `minipeft.accounting` takes for the method, for a run of this length: None, "head" or a configuration.

        Raises PeftError for options that make no sense.
        """
        if self.kind in (None, "head", "frozen"):
            return self.kind
        from .huggingface import config_class

        given = {name: value(steps) if callable(value) else value for name, value in self.options.items()}
        return config_class(self.kind)(**given)

    def with_options(self, **options: Any) -> Method:
        """The same method with some options changed."""
        return dataclasses.replace(self, options={**self.options, **options})

    @property
    def title(self) -> str:
        """The label with the values of the options, but for one that is None or 0."""
        if "{" not in self.label:
            return self.label
        words = self.label.format(**vars(self.config())).split()
        return " ".join(word for word in words if not word.endswith(("=None", "=0")))

    @cached_property
    def learning_rate(self) -> float:
        """The usual rate, on a model as wide as the shipped base; see `minipeft.train.rates`."""
        return {None: FULL, "head": HEAD}.get(self.kind) or self.config().usual_learning_rate

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the method takes from every example."""
        return getattr(self.config(), "num_virtual_tokens", 0)

    def prepare(self, base: Any, steps: int, seed: int = 0) -> Any:
        """The model that is trained, for a run of this number of steps; `base` stays as it is.

        The seed names the adapter's initial values, so that runs of several seeds also differ in them.

        Raises PeftError for a method that does not fit the model.
        """
        config = self.config(steps)
        if config is None:
            return base.copy().requires_grad_(True)
        if config == "head":
            from ..nn.heads import head_only

            return head_only(base)
        from .model import get_peft_model

        if self.quantized:
            from ..quant import Linear4bit, quantize_model

            if not any(isinstance(module, Linear4bit) for _, module in base.named_modules()):
                base = quantize_model(base)
        return get_peft_model(base, config, seed=seed)

    def why_not(self, base: Any) -> str | None:
        """Why the method cannot be put on a model (BitFit on one without biases), or None; nothing is built."""
        from .config import PeftConfig, PeftError

        config = self.config()
        try:
            if isinstance(config, PeftConfig):
                config.check(base)
        except PeftError as error:
            return str(error)
        return None


_lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
# A tenth of the run at full rank, then four tenths of pruning, then half of it at the ranks that are left.
_adalora = {
    "total_step": lambda steps: steps, "tinit": lambda steps: steps // 10, "tfinal": lambda steps: steps // 2,
    "init_r": 12, "target_r": 8, "lora_alpha": 24, "orth_reg_weight": 0.1, "target_modules": "all-linear",
}  # fmt: skip
_bottleneck = {"placement": "houlsby", "bottleneck_size": 16, "non_linearity": "relu"}
_virtual = {"num_virtual_tokens": 20}
_words = _virtual | {"prompt_tuning_init": "SAMPLE_VOCAB"}

METHODS: dict[str, Method] = {
    "head": Method("last layer", "head"),
    "full": Method("full", None),
    "bitfit": Method("BitFit", "BITFIT"),
    "ln": Method("LN tuning", "LN_TUNING"),
    "lora": Method("LoRA r={r}", "LORA", _lora),
    "dora": Method("DoRA r={r}", "LORA", _lora | {"use_dora": True}),
    "pissa": Method("PiSSA r={r}", "LORA", _lora | {"lora_alpha": 8, "init_lora_weights": "pissa"}),
    "adalora": Method("AdaLoRA r={target_r}", "ADALORA", _adalora),
    "vera": Method("VeRA r={r}", "VERA", {"r": 64, "target_modules": "all-linear"}),
    "loha": Method("LoHa r={r}", "LOHA", {"r": 4, "alpha": 8, "target_modules": "all-linear"}),
    "lokr": Method("LoKr r={r}", "LOKR", {"r": 8, "alpha": 16, "target_modules": "all-linear"}),
    "oft": Method("OFT b={oft_block_size} k={r}", "OFT", {"target_modules": "all-linear"}),
    "qlora": Method("QLoRA r={r}", "LORA", _lora, quantized=True),
    "ia3": Method("IA3", "IA3"),
    "bottleneck": Method("adapter m={bottleneck_size}", "BOTTLENECK", _bottleneck),
    "prompt": Method("prompt P={num_virtual_tokens}", "PROMPT_TUNING", _words),
    "prefix": Method("prefix P={num_virtual_tokens}", "PREFIX_TUNING", _virtual | {"prefix_projection": True}),
    "p-tuning": Method("P-tuning P={num_virtual_tokens}", "P_TUNING", _virtual),
}


def register(cls: Any = None, *, name: str | None = None, title: str | None = None, **options: Any) -> Any:
    """Make a method of your own known by name, as those that are shipped are. A decorator of its configuration class.

        @mp.peft.register(title="scale", target_modules="all-linear")
        @configuration
        class ScaleConfig(PeftConfig):
            peft_type, usual_learning_rate = "SCALE", 1e-2
            ...

    From then on directories with this peft_type can be loaded. With `--plugin MODULE` a command imports the module, and
    takes `--method scale`.

    Args:
        name: what `--method` calls it; by default the peft_type in small letters, with hyphens.
        title: what a table calls it, as `Method`'s label; by default the name.
        options: of the configuration, where the method's usual ones are not the defaults of the class: values alone,
            no functions of a number of steps.

    Returns the class. One that is defined again under the same name in the same module, as in a cell that is run again,
    replaces itself. Raises PeftError for what is no configuration class of a method, for options that it does not take,
    for a title that they do not fill, and for a name or a peft_type that is taken.
    """
    if cls is None:
        return partial(register, name=name, title=title, **options)
    from .config import PeftConfig, PeftError
    from .huggingface import PEFT_TYPES

    if not (isinstance(cls, type) and issubclass(cls, PeftConfig) and isinstance(getattr(cls, "peft_type", None), str)):
        raise PeftError(f"register takes a subclass of PeftConfig that has a peft_type, its name in files, not {cls!r}")
    kind, known = cls.peft_type, PEFT_TYPES.get(cls.peft_type)
    name = kind.lower().replace("_", "-") if name is None else name
    title = title or name
    try:
        config = cls(**options)
    except TypeError as error:  # which names the class and the option
        raise PeftError(f"register: {error}") from error
    try:
        title.format(**vars(config))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        named = f"a title's braces hold an option of {cls.__name__}, such as {{r}}"
        raise PeftError(f"register: {named}; got {title!r}") from error
    again = getattr(known, "__module__", "") == cls.__module__ and known.__qualname__ == cls.__qualname__
    if known and not again:
        raise PeftError(f"the peft_type {kind!r} is taken, by {getattr(known, '__name__', known)}; choose another")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == "frozen":
        raise PeftError(f"a method's name has small letters, digits, '_' and '-', and is not frozen; got {name!r}")
    if name in METHODS and not (again and METHODS[name].kind == kind):
        raise PeftError(f"the name {name!r} is taken, by {METHODS[name].title}; choose another with name=")
    PEFT_TYPES[kind] = cls
    METHODS[name] = Method(title, kind, options)
    return cls
