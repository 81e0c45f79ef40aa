"""What a block keeps for its backward pass, by the terms, and as autograd packs it in models of transformers and PEFT."""

from __future__ import annotations

import pytest

from minipeft import LoraConfig
from minipeft.accounting import architecture
from minipeft.accounting.activations import PYTHON_GELU, Term, block_terms, blocks_of
from minipeft.accounting.parameters import trained_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

B, S = 2, 47
LLAMA = dict(
    model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, head_dim=16,
)  # fmt: skip
GPT2 = dict(model_type="gpt2", vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
MODELS = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "gpt2": GPT2 | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
MODELS["gpt2, GELU in one op"] = MODELS["gpt2"] | {"activation_function": "gelu_pytorch_tanh"}


def bytes_packed(model, block_type, autocast):
    """Bytes a token that the second block keeps: storages, each once, that are neither weights nor made before it."""
    ids = torch.zeros(B, S, dtype=torch.long)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen, kept, inside = {}, [0], [False]

    def pack(t):
        storage = t.untyped_storage()
        # what autocast narrowed of the weights, and the rotation, are no multiple of 2 x 47
        if storage.data_ptr() not in own | seen.keys():
            seen[storage.data_ptr()] = storage
            if inside[0] and t.numel() % (B * S) == 0:
                kept[0] += storage.nbytes()
        return t

    block = [m for m in model.modules() if type(m).__name__ == block_type][1]
    block.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
    block.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, labels=ids, use_cache=False)
    return kept[0] / (B * S)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("attention", ["eager", "flash"])
@pytest.mark.parametrize("method", ["full", "lora", "lora in bfloat16"])
@pytest.mark.parametrize("weights", ["bfloat16", "float32", "float32, autocast", "bfloat16, autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_the_terms_of_a_block_are_the_bytes_that_autograd_packs(name, weights, method, attention):
    kind = MODELS[name]["model_type"]
    if (kind, weights) == ("gpt2", "bfloat16, autocast"):
        pytest.skip("on a CPU, autocast widens neither layer norms nor softmax, as it does on a GPU")
    config = {key: value for key, value in MODELS[name].items() if key != "model_type"}
    config |= {"attn_implementation": "sdpa" if attention == "flash" else "eager"}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    model = model.to(getattr(torch, weights.split(",")[0])).train()
    targets = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]
    ours, narrow = None, method != "lora"
    if method != "full":
        ours = LoraConfig(r=3, target_modules=targets)
        theirs = peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        model = peft.get_peft_model(model, theirs, autocast_adapter_dtype=not narrow)
        model.enable_input_require_grads()
    arch, autocast = architecture(MODELS[name]), "autocast" in weights
    size = 2 if weights.startswith("bfloat16") else 4
    adapters = size if narrow else 4
    block = blocks_of(arch, trained_parameters(arch, ours))[1]
    terms = list(block_terms(block, S, weights=size, autocast=autocast, adapters=adapters, attention=attention))
    terms = [t for t in terms if "dropout" not in t.name]  # that of the model is off here
    if kind == "gpt2" and weights == "bfloat16":  # on a CPU, mean and 1 / std have the input's dtype; on a GPU float32
        terms.append(Term("statistics", "", -2 * 4))
    block_type = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer", "gpt2": "GPT2Block"}[kind]
    assert sum(t.bytes for t in terms) == pytest.approx(bytes_packed(model, block_type, autocast), rel=1e-9), terms


def test_families_whose_gelu_is_written_in_python_keep_four_arrays_and_others_one():
    """x, x / 2, the tanh and 1 + tanh; BLOOM's is a function of its own, which keeps x alone."""
    from transformers.activations import ACT2FN
    from transformers.models.bloom.modeling_bloom import BloomGelu

    def arrays(activation):
        x, seen = torch.randn(3, 5, requires_grad=True), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            activation.train()(x)
        return sum(t.numel() == x.numel() for t in seen.values())

    assert arrays(BloomGelu()) == 1 and "bloom" not in PYTHON_GELU
    assert transformers.MT5Config().dense_act_fn == transformers.GPT2Config().activation_function == "gelu_new"
    assert arrays(ACT2FN["gelu_new"]) == 4 and {"mt5", "gpt2"} <= set(PYTHON_GELU)
