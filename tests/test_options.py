"""One declaration an option: its check, its flag and its documentation agree. The limits of every option are listed here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import itertools
import math
import pkgutil
import re

import numpy as np
import pytest

import minipeft
from minipeft.options import add_options, check, configuration, from_arguments, option


@configuration
class Settings:
    """Of a run."""

    learning_rate: float = option(1e-3, "peak learning rate", above=0, flag="--lr")
    max_steps: int | None = option(None, "optimizer steps", least=1)
    target_modules: list[str] | str | None = option(None, "names")
    init: bool | str = option(True, "how it starts", choices=(True, False, "pissa"))
    packing: bool = option(False, "share rows")
    progress: bool = option(True, "a bar")
    rank_pattern: dict[str, int] = option({}, "ranks by name", least=1)
    dropout: float = option(0.0, "probability", least=0, below=1)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, or None, got 0"),
        ({"max_steps": True}, "max_steps must be an integer of at least 1, or None, got True"),
        ({"max_steps": 2.0}, "max_steps must be an integer of at least 1, or None, got 2.0"),
        ({"target_modules": 3}, "target_modules must be a list, each a text, or a text, or None, got 3"),
        ({"target_modules": ["q", None]}, "target_modules must be a list, each a text, or a text, or None, got ['q', None]"),
        ({"target_modules": {2}}, "target_modules must be a list, each a text, or a text, or None, got {2}"),
        ({"init": 1}, "init must be one of True, False, pissa, got 1"),
        ({"packing": "no"}, "packing must be True or False, got 'no'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern must be a dictionary, each value an integer of at least 1, got"),
        ({"dropout": 1}, "dropout must be a number of at least 0 and below 1, got 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(given, sentence):
    with pytest.raises(ValueError) as error:
        Settings(**given)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"learning_rat": 1}, "Settings has no option 'learning_rat'; nearest: learning_rate"),
        ({"lr": 1}, "Settings has no option 'lr'; nearest: learning_rate"),  # by its flag
        ({"xyz": 1}, "Settings has no option 'xyz'; it has learning_rate, max_steps, target_modules, init, packing"),
    ],
)
def test_a_misspelled_option_is_named_with_the_nearest(given, sentence):
    with pytest.raises(TypeError) as error:
        Settings(**given)
    assert str(error.value).startswith(sentence)


def test_the_methods_own_options_are_suggested():
    for name, nearest in {"rr": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_module": "target_modules"}.items():
        with pytest.raises(TypeError, match=f"LoraConfig has no option '{name}'; nearest: {nearest}(,|$)"):
            minipeft.LoraConfig(**{name: 1})
    with pytest.raises(TypeError, match="TransformerConfig has no option 'vocab'; nearest: vocab_size"):
        minipeft.TransformerConfig.llama(vocab=3)
    assert next(iter(inspect.signature(minipeft.LoraConfig).parameters)) == "r"


def test_numpy_scalars_become_python_numbers():
    made = Settings(max_steps=np.int64(3), learning_rate=np.float32(0.5))
    assert type(made.max_steps) is int and type(made.learning_rate) is float


def test_a_mutable_default_is_each_ones_own():
    Settings().rank_pattern["q"] = 1
    assert Settings().rank_pattern == {}


def test_the_command_line_has_the_defaults_of_the_class():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Settings)
    assert from_arguments(Settings, parser.parse_args([])) == Settings()
    line = "--lr 0.5 --max-steps 4 --target-modules q v --packing --no-progress".split()
    wanted = Settings(learning_rate=0.5, max_steps=4, target_modules=["q", "v"], packing=True, progress=False)
    assert from_arguments(Settings, parser.parse_args(line)) == wanted
    for wrong in ("0", "nan", "inf", "x"):
        with pytest.raises(argparse.ArgumentError, match=f"must be a number above 0, not '{wrong}'"):
            parser.parse_args(["--lr", wrong])
    assert "peak learning rate (default: 0.001)" in " ".join(parser.format_help().split())


def test_a_command_may_have_defaults_of_its_own_and_a_switch_may_take_a_value():
    @configuration
    class More(Settings):
        rows: bool | int = option(False, "share rows, of N tokens", least=1)
        again: bool | None = option(None, "compute again")

    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, More, "rows", "again", "learning_rate", "dropout", defaults={"learning_rate": None, "dropout": 0.5})
    assert vars(parser.parse_args([])) == {"rows": False, "again": None, "learning_rate": None, "dropout": 0.5}
    assert vars(parser.parse_args(["--rows", "--no-again"])) == vars(parser.parse_args([])) | {"rows": True, "again": False}
    assert parser.parse_args(["--rows", "8", "--again"]).rows == 8
    assert "probability (default: 0.5)" in " ".join(parser.format_help().split())


def test_the_docstring_lists_the_options():
    assert "learning_rate   peak learning rate (default: 0.001)" in Settings.__doc__


def test_another_error_and_a_post_init_of_its_own():
    @configuration
    class Own:
        n: int = option(1, "a number", least=1)

        def __post_init__(self):
            check(self, KeyError)

    with pytest.raises(KeyError, match="n must be an integer of at least 1"):
        Own(n=0)


# ------------------------------------------------------------------------------------------ what the package declares

LIMITS = {
    "a number above 0": """
        LoopOptions: fit tokens price; MethodOptions: reduction_factor; GridOptions: lr; Settings: learning_rate; BottleneckConfig: reduction_factor; OFTConfig: eps; OnlineConfig: learning_rate temperature cliprange
        max_kl stop_kl; TransformerConfig: rope_theta; PPOConfig: kl_target cliprange_value; DPOConfig: beta desirable_weight undesirable_weight; RopeScaling: low_freq_factor
        high_freq_factor; TrainingArguments: learning_rate
        num_train_epochs
    """,
    "a number above 0 and at most 1": "GenerationConfig: top_p; Combination: density; LoopOptions: utilization",
    "a number above 0 and below 1": "AdaLoraConfig: beta1 beta2",
    "a number of at least 0": """
        LoopOptions: headroom; GenerationConfig: temperature; TransformerConfig: rms_norm_eps layer_norm_epsilon initializer_range; PairOptions: rater_temperature; Settings: weight_decay replay l2_start; AdaLoraConfig:
        orth_reg_weight; OnlineConfig: max_grad_norm; PPOConfig: kl_coef vf_coef; GroupConfig: kl_coef; RewardConfig:
        center; DPOConfig: gamma; TrainingArguments: adam_epsilon momentum weight_decay max_grad_norm
    """,
    "a number of at least 1": "RopeScaling: factor; TrainingArguments: loraplus_lr_ratio",
    "a number of at least 0 and at most 1": "Settings: warmup; PPOConfig: gamma lam; TrainingArguments: warmup_ratio",
    "a number of at least 0 and below 1": """
        MethodOptions: lora_dropout; PairOptions: validation rater_flip; Settings: dropout; TransformerConfig: dropout; AdaLoraConfig:
        lora_dropout; LoraConfig: lora_dropout; VeraConfig: vera_dropout; LycorisConfig: rank_dropout
        module_dropout; OFTConfig: module_dropout; TrainingArguments: adam_beta1 adam_beta2
    """,
    "an integer of at least 0": """
        BOFTConfig: boft_block_size boft_block_num;
        GenerationConfig: top_k seed; Settings: seed; TransformerConfig: intermediate_size num_key_value_heads head_dim;
        AdaLoraConfig: tinit tfinal; Combination: seed; Targets: layers_to_transform; VeraConfig: projection_prng_key;
        OFTConfig: r oft_block_size; WithTokenRows: trainable_token_indices; TrainableTokensConfig: token_indices;
        OnlineConfig: stop_token_ids seed; TrainingArguments: packing warmup_steps seed
    """,
    "an integer of at least 1": """
        AdaptionPromptConfig: adapter_len adapter_layers; BOFTConfig: boft_n_butterfly_factor; C3AConfig: block_size block_size_pattern;
        DeloraConfig: r rank_pattern; FourierFTConfig: n_frequency n_frequency_pattern; HRAConfig: r; MissConfig: r mini_r;
        RandLoraConfig: r; ShiraConfig: r; VBLoRAConfig: r num_vectors vector_length;
        FinetuneOptions: max_length; EvaluationOptions: limit; Common: threads num_labels; MethodOptions: r num_virtual_tokens
        encoder_hidden_size bottleneck_size; StepOptions: batch seq generate ppo mini_batch; LoopOptions: accumulation gpus; ComparisonOptions: seeds;
        GridOptions: r seeds; InstructionOptions: per_task; RopeScaling: original_max_position_embeddings; GenerationConfig: max_new_tokens batch_size; PairOptions: max_length pairs response_length;
        Settings: steps batch_size accumulation evaluations; Rewriting: held_out blocks; TransformerConfig:
        vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings; AdaLoraConfig:
        total_step target_r init_r deltaT; BottleneckConfig: bottleneck_size; Combination: svd_rank; LoraConfig: r;
        Ranked: rank_pattern; PromptEncoderConfig: encoder_hidden_size; PrefixTuningConfig: encoder_hidden_size;
        PromptLearningConfig: num_virtual_tokens token_dim num_layers num_attention_heads; VeraConfig: r; LycorisConfig: r;
        OnlineConfig: steps batch_size mini_batch_size num_epochs response_length max_equal_updates save_steps
        save_total_limit; PPOConfig: kl_horizon; DPOConfig: reference_batch_size; TrainingArguments: max_steps
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_steps save_steps
        save_total_limit early_stopping_patience
    """,
    "an integer of at least 2": "RoadConfig: group_size; GroupConfig: num_generations; EvaluationOptions: max_length; OnlineOptions: best_of",
    "an integer of at least 4 and at most 100": "OFTConfig: num_cayley_neumann_terms",
    "an integer of at least -1": "LoKrConfig: decompose_factor",
    "one of .*": """
        MissConfig: init_weights; RoadConfig: variant;
        Options: quantity; FinetuneOptions: overflow; Common: backend; StepOptions: engine precision optimizer quantization;
        LoopOptions: adapters attention logits sharding cache_bits card;
        ComparisonOptions: methods; TaskOptions: task; OnlineOptions: algorithm missing_eos; Settings: method; TransformerConfig: model_type; BottleneckConfig:
        placement non_linearity; Combination: combination_type majority_sign_method; IA3Config: init_ia3_weights;
        LoraConfig: init_lora_weights; LycorisConfig: use_effective_conv2d; LoKrConfig: init_weights; PromptEncoderConfig: encoder_reparameterization_type; PrefixTuningConfig:
        init_weights; PromptLearningConfig: num_transformer_submodules; PromptTuningConfig: prompt_tuning_init;
        OnlineConfig: lr_scheduler_type; DPOConfig: loss_type; TrainingArguments: optim lr_scheduler_type
    """,
}
REQUIRED = {"adapter_len": 1, "adapter_layers": 1, "total_step": 10, "num_virtual_tokens": 4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "output": "o"}  # fmt: skip


def declared():
    """{configuration class: its own options that have limits or choices}, of the whole package."""
    found = {}
    for module in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
        if not module.name.endswith(("__main__", "book.conf")):  # which a command runs, and Sphinx
            for cls in vars(importlib.import_module(module.name)).values():
                if isinstance(cls, type) and cls.__module__ == module.name and dataclasses.is_dataclass(cls):
                    own = [f for f in dataclasses.fields(cls) if f.name in vars(cls).get("__annotations__", {})]
                    limited = {"least", "above", "most", "below", "choices"}
                    found[cls] = [f.name for f in own if limited & {k for k, v in f.metadata.items() if v is not None}]
    return found


CLASSES = {cls.__name__: cls for cls in declared()}
LISTED = [
    (limit, name, options.split())
    for limit, text in LIMITS.items() for name, _, options in (part.partition(":") for part in " ".join(text.split()).split("; "))
]  # fmt: skip


def just_outside(limit):
    """The values next to a limit's ends that it does not hold: "an integer of at least 1" -> 0."""
    whole, step = "integer" in limit, math.nextafter
    for kind, number in re.findall(r"(of at least|above|at most|below) (-?\d+)", limit):
        n = int(number)
        yield {"of at least": n - 1 if whole else step(n, -9), "at most": n + 1 if whole else step(n, 9)}.get(kind, n)
    if limit == "one of .*":
        yield "nonsense"


@pytest.mark.parametrize("limit, name, options", LISTED, ids=lambda x: x if isinstance(x, str) else "")
def test_every_option_refuses_the_value_just_outside_its_limits(limit, name, options):
    cls = next(c for c in (CLASSES[name], *CLASSES[name].__subclasses__()) if not inspect.isabstract(c))
    needed = {k: v for k, v in REQUIRED.items() if k in cls.__dataclass_fields__}
    for field, value in itertools.product(options, just_outside(limit)):
        several = field in ("stop_token_ids", "methods", "lr") or (name, field) == ("GridOptions", "r")
        given = {"q": value} if field.endswith("_pattern") else [value] if several else value
        with pytest.raises(ValueError, match=rf"^{field} must be .*{limit}(, or None)?, got {re.escape(repr(given))}"):
            cls(**needed | {field: given})


def test_the_limits_of_no_option_are_forgotten():
    listed = {name: sorted(o for _, n, options in LISTED if n == name for o in options) for _, name, _ in LISTED}
    assert listed == {cls.__name__: sorted(options) for cls, options in declared().items() if options}


@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63, True, math.nan, math.inf])
def test_a_number_is_one_that_an_array_can_hold(value):
    with pytest.raises(ValueError, match="n must be an integer"):
        mp_settings(n=value)
    if value != 2**63:
        with pytest.raises(ValueError, match="x must be a finite number"):
            mp_settings(x=value)


@configuration
class mp_settings:
    n: int = option(1, "a number")
    x: float = option(1.0, "a number")
