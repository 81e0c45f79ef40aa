"""What a method is: a configuration that says which parameters it adds where, and builds them.

    parameter_shapes    what is trained beside each of the model's weights: {name: shape}
    adapter             the trained part at one target; or
    prompt              the trained part in front of the model's input
    training_callback   what the method does in the training loop, where it does anything there (AdaLoRA)

A configuration is a dataclass with the field names of Hugging Face PEFT; `targets` says which layers are meant, and
`huggingface` reads and writes it.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

from ..nn.module import Module
from ..options import configuration, option
from .targets import PeftError, Shape, Targets, kind_of, out_in_shape, shape_of

__all__ = ["PeftConfig", "PeftError", "Seed", "Shape", "kind_of", "shape_of"]

Seed = tuple[int, ...] | None  # names a random stream: numpy.random.default_rng(seed); None: allocate nothing


@configuration(kw_only=True)
class PeftConfig(Targets, ABC):
    """The options all methods have. Raises PeftError, naming the option, for a value that makes no sense."""

    base_model_name_or_path: str | None = option(None, "what the adapter was trained on; None: the model's origin")
    task_type: str | None = option(None, "what the model is for, in PEFT's words: CAUSAL_LM, SEQ_CLS, ...")
    inference_mode: bool = option(False, "a new model's adapter is frozen (set_adapter changes that)")

    peft_type: ClassVar[str]
    adapter_class: ClassVar[Any]  # of the trained part at a target; see `Adapter`
    usual_learning_rate: ClassVar[float] = 3e-3  # AdamW's on the shipped base; see `minipeft.train.rates`
    stores_constants: ClassVar[bool] = True  # whether the file holds the constants, or they are computed from the base

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        """The parameters the method adds for one of the model's: {name within the module: shape}, {} where none.

        Args:
            name: the path of the module that holds the parameter.
            kind: "linear", "conv1d", "embedding" or "norm" for a module's weight, "bias" for its bias.
            shape: of that weight or bias, as it is stored.
        """
        mine = kind in self.kinds and self.targets(name, kind)
        return self.shapes(name, kind, *out_in_shape(kind, shape)) if mine else {}

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        """`parameter_shapes` at a target with this many outputs and inputs."""
        raise NotImplementedError(f"{type(self).__name__} defines no shapes")

    def layer_shapes(self, name: str, layer: Module) -> dict[str, Shape]:
        """`parameter_shapes` of all that is trained at a target."""
        return self.parameter_shapes(name, kind_of(layer), shape_of(layer))

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        """{name: shape} of what the method adds and never trains; {} for most.

        `layers` are the targets: {path: (kind, shape of the weight)}.
        """
        return {}

    def training_state_shapes(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        """{name: shape} of what the training callback keeps, from the adapter's {path: shape}; {} for most."""
        return {}

    def adapter(self, name: str, layer: Module, shapes: dict[str, Shape], seed: Seed) -> Any:
        """The trained part at one target, an `Adapter`, with the parameters of `parameter_shapes`."""
        return self.adapter_class(shapes, layer, seed, self, name)

    def adapters(self, layers: dict[str, Module], seeds: dict[str, Seed]) -> dict[str, Any]:
        """{path: trained part} of every target. `seeds` name the initial values; None: they are about to be loaded."""
        return {n: self.adapter(n, layer, self.layer_shapes(n, layer), seeds[n]) for n, layer in layers.items()}

    def prompt(self, model: Module, seed: Seed) -> Any:
        """For methods that change a model's input: the trained part, a `Prompt`; None for all others."""
        return None

    def training_callback(self, model: Any, adapter_name: str) -> Any:
        """What takes part in the training of this adapter (see `minipeft.train.callbacks`); None for most."""
        return None

    def check(self, model: Module) -> None:
        """Raises PeftError where the method cannot be put on the model; builds nothing."""
        config = self.with_targets(model)
        modules = dict(model.named_modules())
        for name, module in config.resolve(modules).items():
            config.layer_shapes(name, module)
        config.resolve_saved(modules)

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says; see `minipeft.peft.huggingface`."""
        from .huggingface import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        """The configuration of an adapter_config.json; see `minipeft.peft.huggingface`."""
        from .huggingface import from_dict

        return from_dict(cls, options)
