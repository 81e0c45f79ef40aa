"""Methods of Hugging Face PEFT that are counted here and not trained: their parameters, from options and shapes.

    method                      trained at a layer [out, in]
    ADAPTION_PROMPT             P [1, len, d] and a gate, at the attention of the last layers       (LLaMA-Adapter)
    BOFT                        m butterflies of in/b rotations [b, b], and a scale [out]
    C3A                         out/b x in/b circulant blocks of b numbers
    DELORA                      LoRA's two factors and a scale
    FOURIERFT                   n frequencies
    HRA                         r reflections [in]
    MISS                        [r, out]; bat: out/r squares [r, r]; mini: [r, mini_r]
    RANDLORA                    n = min(out, in)/r pairs of random factors: r n scales, and n min(out, in) more
    ROAD                        a rotation and a scale for each two outputs; 2 or 4 times as many in its variants
    SHIRA                       r (in + out) of the weights
    VBLORA                      the logits of r (in + out)/l subvectors among n, and once the bank [n, l]

An option that the number does not depend on is accepted (`neutral`), any other that a class does not have is an error.
Departure from PEFT: GPT-2's [in, out] layers are counted with every method; PEFT refuses them with most.
Source: PEFT 0.21's tuners/*/layer.py, update_layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..options import REQUIRED, configuration, option
from ..peft.adalora import TARGETS as ALL_LINEAR
from ..peft.config import PeftConfig, PeftError, Shape
from ..peft.huggingface import PEFT_TYPES, config_class
from ..peft.prompt_learning import TOKEN_EMBEDDINGS
from ..peft.ranks import pattern_value
from ..peft.targets import CLASSIFIERS, CLASSIFIES, QUERY_AND_VALUE, out_in_shape
from .architectures import Architecture

GPT2_OUT = {**QUERY_AND_VALUE, "gpt2": ["mlp.c_proj"]}
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # PEFT's


def counted_config(options: dict[str, Any], arch: Architecture) -> PeftConfig:
    """The configuration, for a count on `arch`, of an adapter_config.json's content.

    What training needs and a count does not, AdaLoRA's total_step, may be absent. A prompt's task may be any; of a model
    with an encoder and a decoder it has num_transformer_submodules times as many vectors, by default 2 for SEQ_2_SEQ_LM
    and else 1, as in PEFT (a prefix has not). Of a classifier its head is trained beside it, as beside all methods.

    Raises KeyError for a method that is unknown, and PeftError as its configuration does.
    """
    kind = options["peft_type"]
    cls = config_class(kind) if kind in PEFT_TYPES else COUNTED[kind]
    if kind == "ADALORA" and options.get("total_step") is None:
        options = {**options, "total_step": options.get("tinit", 0) + options.get("tfinal", 0) + 1}
    if hasattr(cls, "prompt_shapes"):
        options, task = dict(options), options.get("task_type")
        sides = options.pop("num_transformer_submodules", None)
        sides = (2 if task == "SEQ_2_SEQ_LM" else 1) if sides is None else sides
        two = all(any(f"{stack}." in name for name in arch) for stack in ("encoder", "decoder"))
        if sides not in ((1, 2) if two else (1,)):
            stacks = "1 or 2" if two else f"1, as {arch.name} has not both an encoder and a decoder"
            raise PeftError(f"num_transformer_submodules must be {stacks}, not {sides!r} (SEQ_2_SEQ_LM means 2)")
        if task in CLASSIFIES:
            heads = (head for head in CLASSIFIERS if any(f"{head}." in name for name in arch))
            options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *heads]
        if task in TASKS:
            del options["task_type"]
        if sides == 2 and kind != "PREFIX_TUNING" and type(options.get("num_virtual_tokens")) is int:
            options["num_virtual_tokens"] *= 2
    return cls.from_dict(options)


@configuration(kw_only=True)
class Counted(PeftConfig):
    """The options that every method has."""

    neutral: ClassVar[str] = ""  # options of the method that the number does not depend on

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        return super().from_dict({k: v for k, v in options.items() if k not in cls.neutral.split()})

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        sizes = {path: out_in_shape(*layer) for path, layer in layers.items()}
        return {f"{path}.{key}": shape for path, size in sizes.items() for key, shape in self.fixed(*size).items()}

    def fixed(self, n_out: int, n_in: int) -> dict[str, Shape]:
        """What the file holds of a layer beside what is trained; {} for most."""
        return {}


def _parts(name: str, n: int, size: int, what: str) -> int:
    """n / size. Raises PeftError where that is no whole number."""
    if n % size:
        raise PeftError(f"{name}: {what} must divide its inputs and outputs, and {size} does not divide {n}")
    return n // size


@configuration(kw_only=True)
class AdaptionPromptConfig(Counted):
    """LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199); counted at the layer that makes an attention's queries."""

    adapter_len: int = option(REQUIRED, "vectors of an attention's prompt", least=1)
    adapter_layers: int = option(REQUIRED, "layers that have one, the last ones", least=1)

    peft_type = "ADAPTION_PROMPT"

    def with_targets(self, model: Any) -> Any:
        families = {"llama": ("self_attn", "q_proj"), "mistral": ("self_attn", "q_proj"), "gpt2": ("attn", "c_attn")}
        family, layers = model.config.model_type, model.config.num_hidden_layers
        if family not in families:
            raise PeftError(f"AdaptionPromptConfig is known of {', '.join(families)}, not of {family}")
        attention, queries = families[family]
        if self.target_modules not in (None, attention):
            raise PeftError(f"target_modules must be {attention!r} or null, not {self.target_modules!r}")
        if self.adapter_layers > layers:
            raise PeftError(f"adapter_layers={self.adapter_layers}, and the model has {layers}")
        return self.replace(target_modules=[queries], layers_to_transform=[*range(layers - self.adapter_layers, layers)])

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"adaption_prompt": (1, self.adapter_len, n_in), "adaption_gate": (1,)}


@configuration(kw_only=True)
class BOFTConfig(Counted):
    """BOFT (Liu et al. 2023, arXiv:2311.06243). PEFT trains one factor where its CUDA kernel is missing."""

    boft_block_size: int = option(4, "size b of a block; 0: as boft_block_num says", least=0)
    boft_block_num: int = option(0, "blocks of a layer; 0: as boft_block_size says", least=0)
    boft_n_butterfly_factor: int = option(1, "factors m", least=1)

    peft_type, neutral = "BOFT", "boft_dropout fan_in_fan_out init_weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise PeftError("give one of boft_block_size and boft_block_num, and 0 for the other")

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        other = _parts(name, n_in, self.boft_block_size or self.boft_block_num, "a block's size, or the number of blocks,")
        b = self.boft_block_size or other
        return {"boft_R": (self.boft_n_butterfly_factor, n_in // b, b, b), "boft_s": (n_out, 1)}


@configuration(kw_only=True)
class C3AConfig(Counted):
    """C3A: circulant blocks (Chen et al. 2024, arXiv:2407.19342)."""

    block_size: int = option(256, "size b of a block", least=1)
    block_size_pattern: dict[str, int] = option({}, "{end of a path, or a regular expression: b there}", least=1)

    peft_type, neutral, usual_targets = "C3A", "init_weights", GPT2_OUT

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        b = pattern_value(self.block_size_pattern, name, self.block_size)
        return {"c3a_kernel": (*[_parts(name, n, b, "block_size") for n in (n_out, n_in)], b)}


@configuration(kw_only=True)
class DeloraConfig(Counted):
    """DeLoRA (Bini et al. 2025, arXiv:2503.18225)."""

    r: int = option(8, "rank", least=1)
    rank_pattern: dict[str, int] = option({}, "{end of a path, or a regular expression: r there}", least=1)

    peft_type, neutral = "DELORA", "delora_lambda lambda_pattern module_dropout init_weights"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        r = pattern_value(self.rank_pattern, name, self.r)
        return {"delora_A": (r, n_in), "delora_B": (n_out, r), "delora_lambda": (1,)}

    def fixed(self, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"delora_w_norm": (n_in,)}


@configuration(kw_only=True)
class FourierFTConfig(Counted):
    """FourierFT (Gao et al. 2024, arXiv:2405.03003)."""

    n_frequency: int = option(1000, "frequencies of a layer", least=1)
    n_frequency_pattern: dict[str, int] = option({}, "{end of a path, or a regular expression: as many there}", least=1)

    peft_type, usual_targets = "FOURIERFT", GPT2_OUT
    neutral = "scaling random_loc_seed fan_in_fan_out init_weights ifft2_norm"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        n = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        return {"fourierft_spectrum": _among((n,), name, n_out, n_in)}


def _among(shape: Shape, name: str, n_out: int, n_in: int) -> Shape:
    """The shape. Raises PeftError where a layer has fewer weights."""
    if shape[0] > n_out * n_in:
        raise PeftError(f"{name}: {shape[0]:,} numbers are more than the layer's own, {n_out} x {n_in}")
    return shape


@configuration(kw_only=True)
class HRAConfig(Counted):
    """HRA: Householder reflections (Yuan et al. 2024, arXiv:2405.17484)."""

    r: int = option(8, "reflections", least=1)

    peft_type, neutral = "HRA", "apply_GS init_weights"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"hra_u": (n_in, self.r)}


@configuration(kw_only=True)
class MissConfig(Counted):
    """MiSS (Kang & Yin 2024, arXiv:2409.15371)."""

    r: int = option(64, "rank", least=1)
    mini_r: int = option(1, "with init_weights='mini', the columns that are repeated", least=1)
    init_weights: bool | str = option(True, "which variant", choices=(True, False, "bat", "mini"))

    peft_type, neutral = "MISS", "miss_dropout"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        if self.init_weights == "bat":
            _parts(name, n_in, self.r, "r")
            return {"miss_block": (_parts(name, n_out, self.r, "r"), self.r, self.r)}
        return {"miss_block": (self.r, self.mini_r if self.init_weights == "mini" else n_out)}


@configuration(kw_only=True)
class RandLoraConfig(Counted):
    """RandLoRA (Albert et al. 2025, arXiv:2502.00987)."""

    r: int = option(32, "rank of each random factor", least=1)
    save_projection: bool = option(True, "the file holds the random factors")

    peft_type = "RANDLORA"
    neutral = "projection_prng_key sparse very_sparse randlora_dropout randlora_alpha fan_in_fan_out init_weights"

    @property
    def stores_constants(self) -> bool:
        return self.save_projection

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        bases = -(-min(n_out, n_in) // self.r)
        return {"randlora_lambda": (self.r, bases), "randlora_gamma": (bases, min(n_out, n_in))}

    def constant_shapes(self, layers: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        small, large = sorted(map(max, zip(*[out_in_shape(*layer) for layer in layers.values()])))
        return {"randlora_A": (self.r, 1, small), "randlora_B": (large, -(-small // self.r), self.r)}


@configuration(kw_only=True)
class RoadConfig(Counted):
    """RoAd (Liao & Monz 2024, arXiv:2409.00119)."""

    variant: str = option("road_1", "how many outputs share a rotation", choices=("road_1", "road_2", "road_4"))
    group_size: int = option(64, "outputs that are rotated together", least=2)

    peft_type, neutral = "ROAD", "init_weights"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        _parts(name, n_out, self.group_size, "group_size")
        n = n_out * int(self.variant[-1]) // 2
        return {"road_theta": (n,), "road_alpha": (n,)}


@configuration(kw_only=True)
class ShiraConfig(Counted):
    """SHiRA: sparse weights (Bhardwaj et al. 2024, arXiv:2406.13175)."""

    r: int = option(32, "of the LoRA that has as many", least=1)

    peft_type, neutral = "SHIRA", "mask_type random_seed fan_in_fan_out init_weights"

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"shira_weight": _among((self.r * (n_out + n_in),), name, n_out, n_in)}

    def fixed(self, n_out: int, n_in: int) -> dict[str, Shape]:
        return {"shira_indices": (2, self.r * (n_out + n_in))}


@configuration(kw_only=True)
class VBLoRAConfig(Counted):
    """VB-LoRA (Li et al. 2024, arXiv:2405.15179). The bank, which all layers share, is counted at the token embedding."""

    r: int = option(4, "rank", least=1)
    num_vectors: int = option(256, "vectors of the bank", least=1)
    vector_length: int = option(256, "length of a vector", least=1)

    peft_type, usual_targets = "VBLORA", {**ALL_LINEAR, "roberta": ["query", "value"]}
    neutral = "topk vblora_dropout fan_in_fan_out init_vector_bank_bound init_logits_std"

    def parameter_shapes(self, name: str, kind: str, shape: Shape) -> dict[str, Shape]:
        if kind == "embedding" and name.rpartition(".")[2] in TOKEN_EMBEDDINGS:
            return {"vblora_vector_bank": (self.num_vectors, self.vector_length)}
        return super().parameter_shapes(name, kind, shape)

    def shapes(self, name: str, kind: str, n_out: int, n_in: int) -> dict[str, Shape]:
        rows, columns = (_parts(name, n, self.vector_length, "vector_length") for n in (n_out, n_in))
        n = self.num_vectors
        return {"vblora_logits_A": (self.r, columns, n), "vblora_logits_B": (rows, self.r, n)}

    def check_names(self, paths: Any, found: Any) -> None:
        super().check_names(paths, [name for name in found if not name.endswith("vblora_vector_bank")])


COUNTED = {cls.peft_type: cls for cls in Counted.__subclasses__()}
