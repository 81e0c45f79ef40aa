"""Methods on models: surgery that leaves the model it starts from as it was, bit for bit.

    base ── copy(share=True) ──► base_model of the PeftModel: new modules, the base's own arrays, all frozen
                                   └ each target: AdaptedLayer(base layer, {"default": adapter, ...})

Adapters own what they train, so a hundred of them on one base cost a hundred adapters. Which are active is one
`Selection`, shared by all layers. A merge makes a new dense model. The names are those of Hugging Face PEFT, which
changes the model that it is given.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from ..autograd.tensor import Tensor, is_grad_enabled
from ..backend import Array, as_rng, to_numpy, xp_of
from ..nn.module import Module, Parameter
from ..nn.transformer import INPUTS, check_labels
from ..options import check_flags
from .config import PeftConfig, PeftError
from .layer import AdaptedLayer, Adapter, TrainedCopy
from .mixed import BASE, Selection
from .mixed_prompts import RowPrompts
from .prompt_learning import Prompt
from .provenance import on_base, warn_of_another_base
from .targets import as_list, listed
from .weights import quantized

M = TypeVar("M", bound=Module)  # the plain model


def get_peft_model(model: M, config: PeftConfig, adapter_name: str = "default", seed: int = 0) -> PeftModel[M]:
    """A new model with a method applied; `model` stays as it is, now and during training.

    Args:
        model: any Module; its arrays are shared, frozen.
        config: the method.
        seed: of the adapter's initial values.

    Raises PeftError where the method does not fit the model: a name that matches nothing, a rank larger than a matrix;
    and for a model that has adapters already.
    """
    return PeftModel(model, config, adapter_name, seed)


class PeftModel(Module, Generic[M]):
    """A model with named adapters, called like the model; attributes it does not have are those of `base_model`.

    peft_config       {adapter name: configuration}
    active_adapters   the names of those in use

    Arguments and errors: see `get_peft_model`; without a seed (None) nothing is allocated, only counted.
    """

    def __init__(self, model: M, config: PeftConfig, adapter_name: str = "default", seed: int | None = 0):
        if isinstance(model, PeftModel) or any(isinstance(module, AdaptedLayer) for _, module in model.named_modules()):
            raise PeftError("the model has adapters already; use add_adapter, or merge_and_unload first")
        self.base_model = model.copy(share=True).requires_grad_(False)
        self.peft_config: dict[str, PeftConfig] = {}
        self.layers: dict[str, AdaptedLayer] = {}  # by the path of the layer in the plain model
        self.prompts: dict[str, Prompt] = {}
        self.selection = Selection()
        self._start: dict[str, dict[str, str]] = {}  # adapter -> parameter -> digest of its first value
        self.add_adapter(adapter_name, config, seed)
        self.set_adapter(adapter_name, config.inference_mode)

    def extra_repr(self) -> str:
        """What the virtual tokens leave of the model's positions."""
        lines = []
        for name, prompt in self.prompts.items():
            P, limit = prompt.length, self.base_model.config.max_position_embeddings
            left = f"which leave {limit - P} of {limit} positions"
            lines.append(f"{name}: {P} virtual tokens in front of the input, {left}")
        return "\n".join(lines)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base_model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.base_model, name)

    def children(self) -> Iterator[tuple[str, Module]]:
        """The model, then the prompts by adapter name."""
        yield "base_model", self.base_model
        yield from self.prompts.items()

    def to(self, xp: ModuleType | str) -> PeftModel:
        """Move every parameter, and the merged weights, to an array library's device; see `Module.to`."""
        for layer in self.layers.values():
            if layer.merged is not None:
                layer.merged.to(xp)
        return super().to(xp)

    # ------------------------------------------------------------------------------------------------- computing

    def forward(self, *inputs: Any, adapter_names: list[str] | None = None, **arguments: Any) -> Any:
        """What the model gives: for a language model, logits of the input's length.

        `adapter_names`: one name a row of the batch ("__base__" for none), in place of the active adapters. Every row
        is what it is alone, also with dropout, where row i alone has `Rng(seed, first_row=i)`. A KVCache that was begun
        so goes on with the names of the rows that are left. Raises PeftError for names that are unknown or not one a
        row.
        """
        given = (*inputs[:1], arguments.get("input_ids"), arguments.get("inputs_embeds"))
        first = next((x for x in given if x is not None), None)
        with self._call(adapter_names, first) as prompt:
            if prompt is None:
                return self.base_model(*inputs, **arguments)
            attentions: list[Tensor] | None = [] if arguments.pop("output_attentions", False) else None
            given = self._bind(*inputs, **arguments, attentions=attentions)
            hidden = self.base_model.backbone(**prompt.arguments(self.base_model, **given))
            logits = self.base_model.lm_head(hidden[:, hidden.shape[1] - first.shape[1] :], given["rng"])
            return logits if attentions is None else (logits, attentions)

    def last_logits(self, input_ids: Array, *, adapter_names: list[str] | None = None, **arguments: Any) -> Tensor:
        """Logits [B, V] at the last position, as `forward` gives them: to generate, without those at all others.

        Raises PeftError as `forward`.
        """
        with self._call(adapter_names, input_ids) as prompt:
            given = self._bind(input_ids, **arguments)
            given = given if prompt is None else prompt.arguments(self.base_model, **given)
            return self.base_model.lm_head(self.base_model.backbone(**given)[:, -1])

    def loss(
        self, input_ids: Array, labels: Array, *, adapter_names: list[str] | None = None, **arguments: Any
    ) -> Tensor:
        """The model's loss, a scalar; labels have the input's length.

        With a prompt, the last virtual token predicts the first token of the input, as in PEFT; a prefix predicts none.
        With `adapter_names` (see `forward`) it is the mean over all labels of the batch that count, and each adapter's
        gradient comes from its own rows; `set_requires_grad` says which learn. Raises PeftError where gradients would
        be recorded for merged adapters, which get none.
        """
        if is_grad_enabled():
            self.check_unmerged()
        with self._call(adapter_names, input_ids) as prompt:
            if prompt is None:
                return self.base_model.loss(input_ids, labels, **arguments)
            check_labels(labels)
            label_smoothing = arguments.pop("label_smoothing", 0.0)
            given = self._bind(input_ids, **arguments)
            hidden = self.base_model.backbone(**prompt.arguments(self.base_model, **given))  # [B, P + T or T, d]
            inputs = given["inputs_embeds"] if input_ids is None else input_ids
            xp, rng = xp_of(labels), given["rng"]
            if isinstance(prompt, RowPrompts):  # only soft tokens predict a first token
                predicted = xp.asarray(prompt.soft > 0)[:, None] | (xp.arange(labels.shape[1]) > 0)
                labels, rng = xp.where(predicted, labels, -100), prompt.behind(rng)
            uncounted = xp.full((len(labels), hidden.shape[1] - inputs.shape[1]), -100, labels.dtype)
            labels = xp.concatenate([uncounted, labels], axis=1)
            return self.base_model.head_loss(hidden, labels, rng, label_smoothing)

    def _bind(self, *inputs: Any, **arguments: Any) -> dict[str, Any]:
        """All arguments of Transformer.forward by name."""
        bound = inspect.signature(self.base_model.backbone.forward).bind(*inputs, **arguments)
        bound.apply_defaults()
        self.base_model.backbone.check_inputs(*[bound.arguments[name] for name in INPUTS])
        return {**bound.arguments, "rng": as_rng(bound.arguments["rng"])}

    def training_callbacks(self) -> list[Any]:
        """What takes part in the training of those that learn, as AdaLoRA does; see `minipeft.train.callbacks`."""
        trained = (name for name in self.peft_config if any(p.requires_grad for _, p in self._trained(name)))
        callbacks = (self.peft_config[name].training_callback(self, name) for name in trained)
        return [callback for callback in callbacks if callback is not None]

    def generate(
        self, input_ids: Any, attention_mask: Any = None, max_new_tokens: int = 20, *,
        adapter_names: list[str] | None = None, **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Continue the prompts, [B, T] -> int64 [B, T + n]; see `minipeft.nn.generation.generate`.

            model.generate(ids, mask, adapter_names=["a", "b", "__base__"], temperature=1, seed=1)

        With `adapter_names` each row is continued by its own adapter ("__base__": none), with the tokens that it gets
        alone, where row i alone has the seed `Rng(seed, first_row=i)`. Raises PeftError for names that are unknown, and
        for past_key_values where there are virtual tokens.
        """
        from ..nn.generation import generate

        names = self.active_adapters if adapter_names is None else adapter_names
        if any(self.virtual_tokens_of(names)) and options.get("past_key_values"):
            raise PeftError("with virtual tokens, generation starts from the prompt: past_key_values cannot be given")
        return generate(self, input_ids, attention_mask, max_new_tokens, adapter_names=adapter_names, **options)

    @property
    def virtual_tokens(self) -> int:
        """Positions of the model's context that the active adapters take from the input."""
        return max(self.virtual_tokens_of(self.selection.active), default=0)

    def virtual_tokens_of(self, adapter_names: Iterable[str]) -> list[int]:
        """Positions of the model's context that each of these adapters takes from the input.

        Raises PeftError for a name that is unknown.
        """
        return [self.prompts[name].length if name in self.prompts else 0 for name in self._rows(adapter_names)]

    @contextmanager
    def _call(self, adapter_names: list[str] | None, inputs: Any) -> Iterator[Prompt | RowPrompts | None]:
        """Inside, a call of the model, with an adapter for each row or the active ones; gives what stands in front."""
        rows = None if adapter_names is None else self._rows(adapter_names)
        if rows is not None and inputs is not None and inputs.shape[0] != len(rows):
            raise PeftError(f"adapter_names has {len(rows)} names for an input of {inputs.shape[0]} rows")
        rows = None if self.selection.disabled else rows
        with self.selection.call(rows) as names:
            prompts = [self.prompts.get(name) for name in names]
            if rows is not None and self.prompts:
                yield RowPrompts(prompts)
            else:
                yield next((prompt for prompt in prompts if prompt is not None), None)

    def _rows(self, adapter_names: Iterable[str]) -> list[str]:
        """The adapter of each row. Raises PeftError for a name that is unknown."""
        names = listed("adapter_names", adapter_names)
        self._known(*(name for name in dict.fromkeys(names) if name != BASE))
        return names

    # -------------------------------------------------------------------------------------------- named adapters

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in use, in the order in which they are applied."""
        return list(self.selection.active)

    def add_adapter(self, adapter_name: str, config: PeftConfig, seed: int | None = 0) -> None:
        """Add a named adapter, not active yet; without a seed (None) its values are not allocated, only counted.

        Raises PeftError, with nothing changed, when it does not fit.
        """
        if not re.fullmatch(r"[\w-]+", adapter_name) or adapter_name in ("base_layer", "base_model", BASE):
            rule = f"letters, digits, '_' and '-', and is not base_layer, base_model or {BASE}"
            raise PeftError(f"an adapter's name consists of {rule}; got {adapter_name!r}")
        if adapter_name in self.peft_config:
            raise PeftError(f"there is an adapter {adapter_name!r} already; delete it first or choose another name")
        modules = dict(plain_modules(self.base_model))
        first = {id(module): path for path, module in reversed(modules.items())}  # of a module in two places, as in PEFT
        config = config.with_targets(self.base_model).replace()  # a copy, which nobody else changes
        if config.base_model_name_or_path is None:
            config = on_base(config, self.base_model)
        numbers = {path: i for i, path in enumerate(modules)}
        once = {path: module for path, module in modules.items() if first[id(module)] == path}
        targets, copied = config.resolve(once), config.resolve_saved(once)
        if config.target_modules == "all-linear" and config.layers_to_transform is not None:  # PEFT reads names only
            config.target_modules = sorted({path.rpartition(".")[2] for path in targets})
        for path in copied:
            if path in targets:
                raise PeftError(f"{path} is a target and in modules_to_save: name it in one of them")
            if inside := next((other for other in copied if other.startswith(f"{path}.")), None):
                raise PeftError(f"modules_to_save: {inside} lies inside of {path}, which is trained whole")
        seeds = {path: None if seed is None else (seed, numbers[path]) for path in targets}
        adapters: dict[str, Adapter] = config.adapters(targets, seeds)
        prompt = config.prompt(self.base_model, None if seed is None else (seed, len(modules)))
        if copied:  # as in the plain model, without the adapters of layers inside
            plain = self.replaced(lambda _, layer: layer.base_layer)
            adapters |= {path: TrainedCopy(plain.get_submodule(path), seed) for path in copied}
        if not adapters and prompt is None:
            raise PeftError(f"{type(config).__name__} trains nothing of this {type(self.base_model).__name__}")
        for path, adapter in adapters.items():
            if path not in self.layers:
                self.layers[path] = AdaptedLayer(modules[path], self.selection, numbers[path])
                _put(modules, path, self.layers[path])
            self.layers[path].adapters[adapter_name] = adapter
        if prompt is not None:
            self.prompts[adapter_name] = prompt
        self.peft_config[adapter_name] = config
        self._start[adapter_name] = {}
        self.set_requires_grad(adapter_name, False)
        if seed is not None:
            self.mark_start(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use this adapter (or these, one around the other), and train it unless `inference_mode`; freeze all others.

        Raises PeftError for a name that is unknown or given twice, and for more than one prompt.
        """
        names = as_list(adapter_name)
        self._known(*names)
        if sum(name in self.prompts for name in names) > 1:
            raise PeftError("at most one of the active adapters can change the input")
        self.selection.names = names
        self.set_requires_grad(list(self.peft_config), False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Train these adapters, or freeze them, whichever are active: for batches of `adapter_names`.

        Raises PeftError for a name that is unknown or given twice.
        """
        names = as_list(adapter_names)
        self._known(*names)
        for name in names:
            for _, adapter in self.parts(name):
                adapter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; a layer without adapters becomes the plain layer again.

        Raises PeftError for a name that is unknown.
        """
        self._known(adapter_name)
        modules = dict(plain_modules(self.base_model))
        for path, layer in list(self.layers.items()):
            layer.adapters.pop(adapter_name, None)
            if adapter_name in layer.merged_names:
                layer.merged, layer.merged_names = None, []
            if not layer.adapters:
                _put(modules, path, layer.base_layer)
                del self.layers[path]
        self.prompts.pop(adapter_name, None)
        del self.peft_config[adapter_name], self._start[adapter_name]
        self.selection.names = [name for name in self.selection.names if name != adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside `with model.disable_adapter():` the model computes what the base does, whichever adapters are chosen."""
        before, self.selection.disabled = self.selection.disabled, True
        try:
            yield
        finally:
            self.selection.disabled = before

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **how: Any) -> None:
        """Add a LoRA adapter that combines others; see `minipeft.peft.combine.add_weighted_adapter`."""
        from .combine import add_weighted_adapter

        add_weighted_adapter(self, adapters, weights, adapter_name, **how)

    def parts(self, adapter_name: str) -> list[tuple[str, Adapter]]:
        """(path of the layer, adapter) of everything that a named adapter consists of; ("", prompt) for a prompt."""
        found = [(path, layer.adapters.get(adapter_name)) for path, layer in self.layers.items()]
        found.append(("", self.prompts.get(adapter_name)))
        return [(path, part) for path, part in found if part is not None]

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                raise PeftError(f"there is no adapter {name!r}; there are {', '.join(self.peft_config)}")
        if len(set(names)) < len(names):
            raise PeftError(f"each adapter can be used once, but the names are {', '.join(names)}")

    # ---------------------------------------------------------------------------------------------------- merging

    def merge_and_unload(self, adapter_names: list[str] | None = None) -> M:
        """A new plain model that computes what this one does with these adapters (the active ones by default).

        Its arrays are its own, and dense: what is quantized is dequantized. Merging into a tied embedding unties it, in
        the model and in its configuration, where the head has not become the same. Raises PeftError for a method that
        no plain model equals, and for a merge that is not finite.
        """
        names = self._mergeable(adapter_names)
        model = self.replaced(lambda _, layer: layer.merge(names))
        if names and quantized(model):
            from ..quant import dequantize_model

            model = dequantize_model(model)
        return independent(model)

    def unload(self) -> M:
        """A new plain model: the base without adapters. Its arrays are its own."""
        return self.merge_and_unload([])

    def replaced(self, made: Callable[[str, AdaptedLayer], Module]) -> Any:
        """The plain model, sharing the base's arrays, with made(path, layer) in the place of each adapted layer."""
        twin = self.copy(share=True)
        modules = dict(plain_modules(twin.base_model))
        for path in sorted(twin.layers, key=lambda path: path.count("."), reverse=True):  # inner layers first
            _put(modules, path, made(path, twin.layers[path]))
        return twin.base_model

    def merge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Compute with merged weights while exactly these adapters (the active ones) are in use; keep the base's.

        Merged adapters get no gradient: `loss` raises PeftError where one would be recorded. Raises PeftError, with
        nothing changed, where `merge_and_unload` does.
        """
        names = self._mergeable(adapter_names)
        having = {path: [n for n in names if n in layer.adapters] for path, layer in self.layers.items()}
        merged = {path: self.layers[path].merge(own).requires_grad_(False) for path, own in having.items() if own}
        for path, layer in self.layers.items():
            layer.merged, layer.merged_names = merged.get(path), having[path]

    def unmerge_adapter(self) -> None:
        """Drop the merged weights; the base's, which were kept, are used again: nothing is subtracted or rounded."""
        for layer in self.layers.values():
            layer.merged, layer.merged_names = None, []

    def check_unmerged(self) -> None:
        """Raises PeftError where something is to be trained and adapters are merged: they would get no gradient."""
        names = self.active_adapters  # those merged beside others are not used
        merged = any(
            layer.merged_names and layer.merged_names == [n for n in names if n in layer.adapters]
            for layer in self.layers.values()
        )
        if merged and self.get_nb_trainable_parameters()[0]:
            raise PeftError("merged adapters get no gradient: call unmerge_adapter() first, or compute in no_grad()")

    def _mergeable(self, adapter_names: list[str] | None) -> list[str]:
        """These names, or the active ones. Raises PeftError for those that no plain model equals."""
        names = self.active_adapters if adapter_names is None else listed("adapter_names", adapter_names)
        self._known(*names)
        for name in names:
            if name in self.prompts:
                raise PeftError(f"the adapter {name!r} changes the input; no plain model equals it")
        return names

    # ------------------------------------------------------------------------------------------------ what is there

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, tied ones once; a quantized weight counts its elements."""
        parts, packed = [part for name in self.peft_config for _, part in self.parts(name)], quantized(self)
        trained = {p for part in parts for p in part.trained().values()} | {m.bias for m in packed}
        others = {p for module in (*parts, *packed) for p in module.parameters()} - trained  # constants, and packed
        counted = [p for p in self.parameters() if p not in others]
        elements = sum(m.out_features * m.in_features for m in packed)
        return sum(p.size for p in counted if p.requires_grad), sum(p.size for p in counted) + elements

    def print_trainable_parameters(self) -> None:
        """Print the counts, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    def mark_start(self, adapter_name: str) -> None:
        """From here on `assert_learning` compares with the present values."""
        self._start[adapter_name] = {name: _digest(p) for name, p in self._trained(adapter_name)}

    def _trained(self, adapter_name: str) -> Iterator[tuple[str, Parameter]]:
        for path, adapter in self.parts(adapter_name):
            for key, p in adapter.trained().items():
                yield (f"{path}.{key}" if path else key), p

    def unmoved(self) -> list[str]:
        """Paths, as in `named_parameters`, of trainable adapter parameters that are, bit for bit, as at the start."""
        trained = [(start, *item) for adapter, start in self._start.items() for item in self._trained(adapter)]
        kept = {id(p) for start, name, p in trained if p.requires_grad and start.get(name) == _digest(p)}
        return [path for path, p in self.named_parameters() if id(p) in kept]

    # ------------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, directory: str | os.PathLike, selected_adapters: list[str] | None = None) -> None:
        """Write every adapter, or those selected, as PEFT does; see `minipeft.peft.huggingface.save_adapter`.

        The adapter "default" is written into the directory itself, others into sub-directories of their names. Raises
        PeftError for a name that is unknown.
        """
        from .huggingface import save_adapter

        names = list(self.peft_config) if selected_adapters is None else listed("selected_adapters", selected_adapters)
        self._known(*names)
        for name in names:
            save_adapter(self, name, Path(directory) / ("" if name == "default" else name))

    @classmethod
    def from_pretrained(
        cls, model: M, directory: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
    ) -> PeftModel[M]:
        """`model` with the adapter of a directory, which PEFT or this package wrote.

        Raises FileError or PeftError for a directory that is incomplete, does not fit the model, or uses options that
        this package does not have, TypeError for a text as is_trainable. Warns where it was trained on another base; see
        `minipeft.peft.provenance`.
        """
        check_flags(is_trainable=is_trainable)
        from .huggingface import load_arrays, read_adapter

        config, arrays = read_adapter(directory)
        adapted = cls(model, on_base(config, model), adapter_name, seed=None)
        load_arrays(adapted, adapter_name, arrays, directory)
        warn_of_another_base(model, directory)
        adapted.set_adapter(adapter_name, inference_mode=not is_trainable)
        return adapted

    def load_adapter(self, directory: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter of a directory under a name of its own, not active yet; frozen unless `is_trainable`.

        `set_adapter` changes that. Raises what `from_pretrained` raises, with nothing changed.
        """
        from .huggingface import load_arrays, read_adapter

        config, arrays = read_adapter(directory)
        self.add_adapter(adapter_name, on_base(config, self.base_model), seed=None)
        try:
            load_arrays(self, adapter_name, arrays, directory)
            warn_of_another_base(self.base_model, directory)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise
        self.set_requires_grad(adapter_name, is_trainable)


def assert_learning(model: PeftModel) -> None:
    """Check, after some steps of training, that every trainable adapter parameter has moved.

    Raises AssertionError naming those that are still what they were: their gradient was zero or never reached them.
    `mp.why_unmoved(model, loss)` says where it ends.
    """
    unmoved = model.unmoved()
    if unmoved:
        listed = f"{', '.join(unmoved[:10])}{' ...' if len(unmoved) > 10 else ''}"
        raise AssertionError(f"{len(unmoved)} adapter parameters never moved: {listed}")


# ---------------------------------------------------------------------------------------------------------- the tree


def plain_modules(model: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """(path, module) as in the plain model: adapted layers are seen through."""
    if isinstance(model, AdaptedLayer):
        model = model.base_layer
    yield prefix, model
    for name, child in model.children():
        yield from plain_modules(child, f"{prefix}.{name}" if prefix else name)


def _put(modules: dict[str, Module], path: str, module: Module) -> None:
    """Put a module at a path of the plain model, whose modules by path are given."""
    parent, _, name = path.rpartition(".")
    modules[parent]._set_child(name, module)


def independent(model: Module) -> Any:
    """A copy with arrays of its own, all trainable, whose configuration says whether the head is tied."""
    model = model.copy().requires_grad_(True)
    if hasattr(model, "name_or_path"):
        model.name_or_path = None  # it is not what is stored there
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        head, embedding = model.lm_head.weight, model.backbone.embedding.weight
        if head is not embedding and bool((head.data == embedding.data).all().item()):  # both merged the same
            model.lm_head.weight = embedding
        elif head is not embedding:
            model.config = model.backbone.config = config.replace(tie_word_embeddings=False)
    return model


def _digest(p: Parameter) -> str:
    return hashlib.blake2b(np.ascontiguousarray(to_numpy(p.data)).tobytes(), digest_size=16).hexdigest()
