"""The module trees of the families, written down: one function each, which names every parameter once.

    list(gpt2(fields))   ->   [("transformer.wte.weight", "embedding", (50257, 768)), ...]

Names and shapes are those of the model that transformers (5.24) builds, so that `target_modules` means here what it
means there; the fields are those of its configuration classes, with their defaults (`FAMILIES`). In a table of fields
0 stands for a size that follows from others.

    model_type                              positions   norm       MLP             also
    gpt2, gpt_bigcode, opt                  learned     LayerNorm  two matrices    one key head (gpt_bigcode)
    gptj, gpt_neox, phi, falcon             rotary      LayerNorm  two matrices    beside the attention
    bloom                                   ALiBi       LayerNorm  two matrices    a norm on the embedding
    llama, mistral, qwen, qwen2             rotary      RMSNorm    gated           biases in q, k, v (qwen, qwen2)
    qwen3                                   rotary      RMSNorm    gated           norms on q and k
    gemma, gemma2, gemma3_text, gemma3      rotary      RMSNorm    gated           norms behind sublayers (2, 3) and on
                                                                                   q and k (3); an image encoder (gemma3)
    phi3                                    rotary      RMSNorm    gated           q, k, v in one matrix
    stablelm                                rotary      LayerNorm  gated
    mixtral, qwen2_moe, qwen3_moe, phimoe   rotary      RMSNorm    gated, experts  a router; LayerNorm (phimoe)
    t5, mt5                                 relative    RMSNorm    two, or gated   encoder and decoder
    whisper                                 learned     LayerNorm  two matrices    the same, behind convolutions
    bert, roberta, xlm-roberta              learned     LayerNorm  two matrices    a pooler
    vit                                     learned     LayerNorm  two matrices    a pooler; patches of an image
    deberta-v2                              relative    LayerNorm  two matrices

The causal language models, T5 and Whisper have their language-model head; the encoders are the bare model (with their
pooler, but for DeBERTa), as their authors count them.

Experts: since version 5 transformers holds those of a layer in two arrays, [experts, out, in], which are no linear
layers. bitsandbytes leaves them as they are, so four bits shrink only what is around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Entry = tuple[str, str, Shape]  # parameter name, kind, shape
Fields = Mapping[str, Any]  # of a configuration
Rule = Callable[[Fields], Iterator[Any]]


# ----------------------------------------------------------------------------------------------------------- layers


def linear(path: str, n_in: int, n_out: int, bias: bool = True) -> Iterator[Entry]:
    """torch.nn.Linear: weight [out, in] and bias [out]."""
    yield f"{path}.weight", "linear", (n_out, n_in)
    if bias:
        yield f"{path}.bias", "bias", (n_out,)


def conv1d(path: str, n_in: int, n_out: int) -> Iterator[Entry]:
    """GPT-2's linear layer, its weight the other way round, [in, out]."""
    yield f"{path}.weight", "conv1d", (n_in, n_out)
    yield f"{path}.bias", "bias", (n_out,)


def convolution(path: str, *shape: int) -> Iterator[Entry]:
    """A convolution: weight [out, in, width, ...] and bias [out]."""
    yield f"{path}.weight", "convolution", shape
    yield f"{path}.bias", "bias", shape[:1]


def embedding(path: str, n: int, d: int) -> Iterator[Entry]:
    """A table of n rows, [n, d]."""
    yield f"{path}.weight", "embedding", (n, d)


def layer_norm(path: str, d: int) -> Iterator[Entry]:
    """LayerNorm: weight and bias, [d]."""
    yield f"{path}.weight", "norm", (d,)
    yield f"{path}.bias", "bias", (d,)


def rms_norm(path: str, d: int) -> Iterator[Entry]:
    """RMSNorm: a weight [d]."""
    yield f"{path}.weight", "norm", (d,)


def head(c: Fields, n: int, d: int, table: str, bias: bool = False, path: str = "lm_head") -> Iterator[Any]:
    """The language model's head [V, d]: a second name of the embedding's table, or a matrix of its own."""
    if c["tie_word_embeddings"]:
        yield f"{path}.weight", "tied", f"{table}.weight"
    else:
        yield from linear(path, d, n, bias=False)
    if bias:
        yield f"{path}.bias", "bias", (n,)


# --------------------------------------------------------------------------------- decoders with two matrices in the MLP


def gpt2(c: Fields) -> Iterator[Entry]:
    """GPT2LMHeadModel (Radford et al. 2019) and GPTBigCodeForCausalLM (Allal et al. 2023, arXiv:2301.03988).

    The latter's linear layers are not GPT-2's, and all its query heads share one key and one value head.
    """
    d, ff, p = c["n_embd"], c["n_inner"] or 4 * c["n_embd"], "transformer."
    layer, keys = (conv1d, d) if c["model_type"] == "gpt2" else (linear, d // c["n_head"] if c["multi_query"] else d)
    yield from embedding(f"{p}wte", c["vocab_size"], d)
    yield from embedding(f"{p}wpe", c["n_positions"], d)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        yield from layer_norm(f"{h}ln_1", d)
        yield from layer(f"{h}attn.c_attn", d, d + 2 * keys)
        yield from layer(f"{h}attn.c_proj", d, d)
        yield from layer_norm(f"{h}ln_2", d)
        yield from layer(f"{h}mlp.c_fc", d, ff)
        yield from layer(f"{h}mlp.c_proj", ff, d)
    yield from layer_norm(f"{p}ln_f", d)
    yield from head(c, c["vocab_size"], d, f"{p}wte")


def gptj(c: Fields) -> Iterator[Entry]:
    """GPTJForCausalLM (Wang & Komatsuzaki 2021): one norm serves attention and MLP, which stand beside each other."""
    d, ff, p = c["n_embd"], c["n_inner"] or 4 * c["n_embd"], "transformer."
    yield from embedding(f"{p}wte", c["vocab_size"], d)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        yield from layer_norm(f"{h}ln_1", d)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{h}attn.{name}", d, d, bias=False)
        yield from linear(f"{h}mlp.fc_in", d, ff)
        yield from linear(f"{h}mlp.fc_out", ff, d)
    yield from layer_norm(f"{p}ln_f", d)
    yield from head(c, c["vocab_size"], d, f"{p}wte", bias=True)


def gpt_neox(c: Fields) -> Iterator[Entry]:
    """GPTNeoXForCausalLM (Black et al. 2022, arXiv:2204.06745; Pythia: Biderman et al. 2023, arXiv:2304.01373)."""
    d, ff, p, bias = c["hidden_size"], c["intermediate_size"], "gpt_neox.", c["attention_bias"]
    yield from embedding(f"{p}embed_in", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        yield from layer_norm(f"{h}input_layernorm", d)
        yield from layer_norm(f"{h}post_attention_layernorm", d)
        yield from linear(f"{h}attention.query_key_value", d, 3 * d, bias)
        yield from linear(f"{h}attention.dense", d, d, bias)
        yield from linear(f"{h}mlp.dense_h_to_4h", d, ff)
        yield from linear(f"{h}mlp.dense_4h_to_h", ff, d)
    yield from layer_norm(f"{p}final_layer_norm", d)
    yield from head(c, c["vocab_size"], d, f"{p}embed_in")


def phi(c: Fields) -> Iterator[Entry]:
    """PhiForCausalLM, of phi-1, 1.5 and 2 (Li et al. 2023, arXiv:2309.05463): biases also in the head."""
    d, ff, width = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    kv = (c["num_key_value_heads"] or c["num_attention_heads"]) * width
    yield from embedding("model.embed_tokens", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        for name, n in (("q_proj", c["num_attention_heads"] * width), ("k_proj", kv), ("v_proj", kv)):
            yield from linear(f"{h}self_attn.{name}", d, n)
        yield from linear(f"{h}self_attn.dense", c["num_attention_heads"] * width, d)
        if c["qk_layernorm"]:
            yield from layer_norm(f"{h}self_attn.q_layernorm", width)
            yield from layer_norm(f"{h}self_attn.k_layernorm", width)
        yield from linear(f"{h}mlp.fc1", d, ff)
        yield from linear(f"{h}mlp.fc2", ff, d)
        yield from layer_norm(f"{h}input_layernorm", d)
    yield from layer_norm("model.final_layernorm", d)
    yield from head(c, c["vocab_size"], d, "model.embed_tokens", bias=True)


def falcon(c: Fields) -> Iterator[Entry]:
    """FalconForCausalLM (Almazrouei et al. 2023, arXiv:2311.16867).

    The 7B shares one key and one value head and has one norm a block, 40B and 180B group the heads and have two.
    """
    d, ff, bias, new = c["hidden_size"], c["ffn_hidden_size"] or 4 * c["hidden_size"], c["bias"], c["new_decoder_architecture"]
    heads, p = c["num_attention_heads"], "transformer."
    kv = (c["num_kv_heads"] or heads) if new else 1 if c["multi_query"] else heads
    two = (c["num_ln_in_parallel_attn"] or 1 + new) == 2
    norms = ["ln_attn", "ln_mlp"] if two else ["input_layernorm"]
    if not c["parallel_attn"]:
        norms = ["input_layernorm", "post_attention_layernorm"]
    yield from embedding(f"{p}word_embeddings", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}h.{i}."
        yield from linear(f"{h}self_attention.query_key_value", d, (heads + 2 * kv) * (d // heads), bias)
        yield from linear(f"{h}self_attention.dense", d, d, bias)
        yield from linear(f"{h}mlp.dense_h_to_4h", d, ff, bias)
        yield from linear(f"{h}mlp.dense_4h_to_h", ff, d, bias)
        for name in norms:
            yield from layer_norm(h + name, d)
    yield from layer_norm(f"{p}ln_f", d)
    yield from head(c, c["vocab_size"], d, f"{p}word_embeddings")


def bloom(c: Fields) -> Iterator[Entry]:
    """BloomForCausalLM (Scao et al. 2022, arXiv:2211.05100): no position table (ALiBi), a norm on the embedding."""
    d, p = c["hidden_size"], "transformer."
    yield from embedding(f"{p}word_embeddings", c["vocab_size"], d)
    yield from layer_norm(f"{p}word_embeddings_layernorm", d)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        yield from layer_norm(f"{h}input_layernorm", d)
        yield from linear(f"{h}self_attention.query_key_value", d, 3 * d)
        yield from linear(f"{h}self_attention.dense", d, d)
        yield from layer_norm(f"{h}post_attention_layernorm", d)
        yield from linear(f"{h}mlp.dense_h_to_4h", d, 4 * d)
        yield from linear(f"{h}mlp.dense_4h_to_h", 4 * d, d)
    yield from layer_norm(f"{p}ln_f", d)
    yield from head(c, c["vocab_size"], d, f"{p}word_embeddings")


def opt(c: Fields) -> Iterator[Entry]:
    """OPTForCausalLM (Zhang et al. 2022, arXiv:2205.01068): two positions more than the context, as an offset."""
    d, ff, p, bias = c["hidden_size"], c["ffn_dim"], "model.decoder.", c["enable_bias"]
    narrow, norm = c["word_embed_proj_dim"] or d, layer_norm if c["layer_norm_elementwise_affine"] else lambda *_: ()
    yield from embedding(f"{p}embed_tokens", c["vocab_size"], narrow)
    yield from embedding(f"{p}embed_positions", c["max_position_embeddings"] + 2, d)
    if narrow != d:
        yield from linear(f"{p}project_out", d, narrow, bias=False)
        yield from linear(f"{p}project_in", narrow, d, bias=False)
    if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"]:
        yield from norm(f"{p}final_layer_norm", d)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{h}self_attn.{name}", d, d, bias)
        yield from norm(f"{h}self_attn_layer_norm", d)
        yield from linear(f"{h}fc1", d, ff, bias)
        yield from linear(f"{h}fc2", ff, d, bias)
        yield from norm(f"{h}final_layer_norm", d)
    yield from head(c, c["vocab_size"], narrow, f"{p}embed_tokens")


# ------------------------------------------------------------------------------------------- decoders with a gated MLP


def llama(c: Fields, p: str = "model.") -> Iterator[Entry]:
    """LlamaForCausalLM (Touvron et al. 2023, arXiv:2302.13971) and the families with its tree, seen in the table above.

    Qwen2 has biases in the query, key and value projections; Llama's `attention_bias` gives o_proj one too.
    """
    d, family, norm = c["hidden_size"], c["model_type"], rms_norm
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"] or c["num_attention_heads"]
    width = c.get("head_dim") or d // heads
    bias = c.get("attention_bias", False)
    if family in ("stablelm", "phimoe"):
        norm = layer_norm
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family in ("gemma2", "gemma3_text", "gemma3"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if c.get("use_parallel_residual"):
        norms = norms[:1]
    yield from embedding(f"{p}embed_tokens", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        if family == "phi3":
            yield from linear(f"{h}self_attn.qkv_proj", d, (heads + 2 * kv) * width, bias=False)
        else:
            for name, n in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
                yield from linear(f"{h}self_attn.{name}", d, n * width, family == "qwen2" or c.get("qkv_bias", bias))
        yield from linear(f"{h}self_attn.o_proj", heads * width, d, bias)
        if family in ("qwen3", "qwen3_moe", "gemma3_text", "gemma3"):
            yield from norm(f"{h}self_attn.q_norm", width)
            yield from norm(f"{h}self_attn.k_norm", width)
        if _has_experts(c, i):
            yield from experts(c, f"{h}mlp.")
        else:
            yield from gated(f"{h}mlp.", d, c["intermediate_size"], c.get("mlp_bias", False), family == "phi3")
        for name in norms:
            yield from norm(h + name, d)
    yield from norm(f"{p}norm", d)
    yield from head(c, c["vocab_size"], d, f"{p}embed_tokens", c.get("lm_head_bias", False))


def gated(h: str, d: int, ff: int, bias: bool = False, fused: bool = False) -> Iterator[Entry]:
    """down(act(gate(x)) * up(x)); gate and up may be one matrix."""
    for name in ["gate_up_proj"] if fused else ["gate_proj", "up_proj"]:
        yield from linear(h + name, d, (1 + fused) * ff, bias)
    yield from linear(f"{h}down_proj", ff, d, bias)


def _has_experts(c: Fields, i: int) -> bool:
    """Whether layer i has experts in place of an MLP."""
    if "decoder_sparse_step" not in c:
        return "num_local_experts" in c
    return i not in c["mlp_only_layers"] and (i + 1) % c["decoder_sparse_step"] == 0


def experts(c: Fields, h: str) -> Iterator[Entry]:
    """A router and the gated MLPs that it chooses from (Jiang et al. 2024, arXiv:2401.04088).

    PEFT (0.21) puts LoRA on the router and the experts of Mixtral and Qwen3 (see `parameters`). It leaves those of
    Qwen2-MoE alone, but for the expert that all share, and of Phi-3.5-MoE it adapts the router, a linear layer there.
    """
    d, family, ff = c["hidden_size"], c["model_type"], c.get("moe_intermediate_size") or c["intermediate_size"]
    E = c.get("num_local_experts") or c["num_experts"]
    adapted = family in ("mixtral", "qwen3_moe")
    router, kind = ("router", "linear") if family == "phimoe" else ("gate", "router" if adapted else "parameter")
    yield f"{h}{router}.weight", kind, (E, d)
    yield f"{h}experts.gate_up_proj", "experts" if adapted else "parameter", (E, 2 * ff, d)
    yield f"{h}experts.down_proj", "experts" if adapted else "parameter", (E, d, ff)
    if family == "qwen2_moe":
        yield from gated(f"{h}shared_expert.", d, c["shared_expert_intermediate_size"])
        yield f"{h}shared_expert_gate.weight", "router", (1, d)


def qwen(c: Fields) -> Iterator[Entry]:
    """QWenLMHeadModel (Bai et al. 2023, arXiv:2309.16609), whose code is on the hub beside its weights.

    Its intermediate_size is that of both gated projections together.
    """
    d, ff, inner, p = c["hidden_size"], c["intermediate_size"] // 2, c["kv_channels"] * c["num_attention_heads"], "transformer."
    yield from embedding(f"{p}wte", c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}h.{i}."
        yield from rms_norm(f"{h}ln_1", d)
        yield from linear(f"{h}attn.c_attn", d, 3 * inner)
        yield from linear(f"{h}attn.c_proj", d, inner, bias=not c["no_bias"])
        yield from rms_norm(f"{h}ln_2", d)
        yield from linear(f"{h}mlp.w1", d, ff, bias=not c["no_bias"])
        yield from linear(f"{h}mlp.w2", d, ff, bias=not c["no_bias"])
        yield from linear(f"{h}mlp.c_proj", ff, d, bias=not c["no_bias"])
    yield from rms_norm(f"{p}ln_f", d)
    yield from head(c, c["vocab_size"], d, f"{p}wte")


def gemma3(c: Fields) -> Iterator[Entry]:
    """Gemma3ForConditionalGeneration (Gemma Team 2025, arXiv:2503.19786): SigLIP's image encoder, a projection, Gemma 3."""
    v, p = c["vision_config"], "model.vision_tower."
    d, patch = v["hidden_size"], v["patch_size"]
    if v["vision_use_head"]:
        raise ValueError("vision_config: the parameters of vision_use_head are not known here; Gemma 3 has it false")
    yield from convolution(f"{p}embeddings.patch_embedding", d, v["num_channels"], patch, patch)
    yield from embedding(f"{p}embeddings.position_embedding", (v["image_size"] // patch) ** 2, d)
    for i in range(v["num_hidden_layers"]):
        h = f"{p}encoder.layers.{i}."
        yield from layer_norm(f"{h}layer_norm1", d)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{h}self_attn.{name}", d, d)
        yield from layer_norm(f"{h}layer_norm2", d)
        yield from linear(f"{h}mlp.fc1", d, v["intermediate_size"])
        yield from linear(f"{h}mlp.fc2", v["intermediate_size"], d)
    yield from layer_norm(f"{p}post_layernorm", d)
    p = "model.multi_modal_projector."
    yield f"{p}mm_input_projection_weight", "parameter", (d, c["hidden_size"])
    yield from rms_norm(f"{p}mm_soft_emb_norm", d)
    yield from llama(c, "model.language_model.")


# ------------------------------------------------------------------------------------------------------- two stacks


def t5(c: Fields) -> Iterator[Entry]:
    """T5ForConditionalGeneration and MT5's (Raffel et al. 2019, arXiv:1910.10683; v1.1: gated GELU, untied head).

    One table of relative positions in each stack's first block; no biases; RMS norms. A config.json of transformers 5
    calls every head tied, whatever its checkpoint holds: of v1.1 it says so by `scale_decoder_outputs`, and mT5's head
    is always its own.
    """
    d, ff, inner, V = c["d_model"], c["d_ff"], c["d_kv"] * c["num_heads"], c["vocab_size"]
    yield from embedding("shared", V, d)

    def attention(path: str, relative: bool) -> Iterator[Entry]:
        for name in "qkv":
            yield from linear(f"{path}.{name}", d, inner, bias=False)
        yield from linear(f"{path}.o", inner, d, bias=False)
        if relative:
            yield from embedding(f"{path}.relative_attention_bias", c["relative_attention_num_buckets"], c["num_heads"])

    for stack, layers in (("encoder", c["num_layers"]), ("decoder", c["num_decoder_layers"] or c["num_layers"])):
        for i in range(layers):
            sublayers = ["SelfAttention", *(["EncDecAttention"] if stack == "decoder" else []), "DenseReluDense"]
            for j, name in enumerate(sublayers):
                h = f"{stack}.block.{i}.layer.{j}."
                if name != "DenseReluDense":
                    yield from attention(h + name, relative=i == 0 and j == 0)
                else:
                    for wi in ("wi_0", "wi_1") if c["feed_forward_proj"].startswith("gated") else ("wi",):
                        yield from linear(f"{h}{name}.{wi}", d, ff, bias=False)
                    yield from linear(f"{h}{name}.wo", ff, d, bias=False)
                yield from rms_norm(f"{h}layer_norm", d)
        yield from rms_norm(f"{stack}.final_layer_norm", d)
    tied = c["tie_word_embeddings"] and c["scale_decoder_outputs"] and c["model_type"] != "mt5"
    yield from head({"tie_word_embeddings": tied}, V, d, "shared")


def whisper(c: Fields) -> Iterator[Entry]:
    """WhisperForConditionalGeneration (Radford et al. 2022, arXiv:2212.04356): keys have no bias.

    Two convolutions over the spectrogram stand before the encoder; its positions are sinusoids, stored and not trained.
    """
    d, p = c["d_model"], "model.encoder."

    def attention(path: str) -> Iterator[Entry]:
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{path}.{name}", d, d, bias=name != "k_proj")
        yield from layer_norm(f"{path}_layer_norm", d)

    yield from convolution(f"{p}conv1", d, c["num_mel_bins"], 3)
    yield from convolution(f"{p}conv2", d, d, 3)
    yield from embedding(f"{p}embed_positions", c["max_source_positions"], d)
    for stack in ("encoder", "decoder"):
        p = f"model.{stack}."
        if stack == "decoder":
            yield from embedding(f"{p}embed_tokens", c["vocab_size"], d)
            yield from embedding(f"{p}embed_positions", c["max_target_positions"], d)
        for i in range(c[f"{stack}_layers"]):
            h = f"{p}layers.{i}."
            yield from attention(f"{h}self_attn")
            if stack == "decoder":
                yield from attention(f"{h}encoder_attn")
            yield from linear(f"{h}fc1", d, c[f"{stack}_ffn_dim"])
            yield from linear(f"{h}fc2", c[f"{stack}_ffn_dim"], d)
            yield from layer_norm(f"{h}final_layer_norm", d)
        yield from layer_norm(f"{p}layer_norm", d)
    yield from head(c, c["vocab_size"], d, "model.decoder.embed_tokens", path="proj_out")


# --------------------------------------------------------------------------------------------------------- encoders


def bert(c: Fields) -> Iterator[Entry]:
    """BertModel, RobertaModel and XLMRobertaModel, with pooler (Devlin et al. 2018, arXiv:1810.04805)."""
    d, ff, p = c["hidden_size"], c["intermediate_size"], "embeddings."
    yield from embedding(f"{p}word_embeddings", c["vocab_size"], d)
    yield from embedding(f"{p}position_embeddings", c["max_position_embeddings"], d)
    yield from embedding(f"{p}token_type_embeddings", c["type_vocab_size"], d)
    yield from layer_norm(f"{p}LayerNorm", d)
    for i in range(c["num_hidden_layers"]):
        yield from _encoder_layer(f"encoder.layer.{i}.", d, ff, ("query", "key", "value"))
    yield from linear("pooler.dense", d, d)


def _encoder_layer(h: str, d: int, ff: int, projections: tuple[str, ...]) -> Iterator[Entry]:
    for name in projections:
        yield from linear(f"{h}attention.self.{name}", d, d)
    yield from linear(f"{h}attention.output.dense", d, d)
    yield from layer_norm(f"{h}attention.output.LayerNorm", d)
    yield from linear(f"{h}intermediate.dense", d, ff)
    yield from linear(f"{h}output.dense", ff, d)
    yield from layer_norm(f"{h}output.LayerNorm", d)


def deberta(c: Fields) -> Iterator[Entry]:
    """DebertaV2Model (He et al. 2020, arXiv:2006.03654; 2021, arXiv:2111.09543).

    One table of relative positions serves all layers; unless `share_att_key`, each layer projects it with matrices of
    its own. The convolution over the first layer's input is there where `conv_kernel_size` says so.
    """
    d, ff = c["hidden_size"], c["intermediate_size"]
    for key, usual in (("embedding_size", d), ("attention_head_size", d // c["num_attention_heads"])):
        if c[key] not in (0, usual):
            raise ValueError(f"deberta-v2: the parameters of {key}={c[key]} are not known here; it must be {usual}")
    yield from embedding("embeddings.word_embeddings", c["vocab_size"], d)
    if c["position_biased_input"]:
        yield from embedding("embeddings.position_embeddings", c["max_position_embeddings"], d)
    if c["type_vocab_size"]:
        yield from embedding("embeddings.token_type_embeddings", c["type_vocab_size"], d)
    yield from layer_norm("embeddings.LayerNorm", d)
    projections = ("query_proj", "key_proj", "value_proj")
    if c["relative_attention"] and not c["share_att_key"]:
        kinds = c["pos_att_type"]
        projections += ("pos_key_proj",) * ("c2p" in kinds) + ("pos_query_proj",) * ("p2c" in kinds)
    for i in range(c["num_hidden_layers"]):
        yield from _encoder_layer(f"encoder.layer.{i}.", d, ff, projections)
    if c["relative_attention"]:
        limit = c["max_relative_positions"] if c["max_relative_positions"] > 0 else c["max_position_embeddings"]
        buckets = c["position_buckets"] if c["position_buckets"] > 0 else limit
        yield from embedding("encoder.rel_embeddings", 2 * buckets, d)
    if "layer_norm" in c["norm_rel_ebd"].split("|"):
        yield from layer_norm("encoder.LayerNorm", d)
    if c["conv_kernel_size"] > 0:
        if d % c["conv_groups"]:
            raise ValueError(f"deberta-v2: conv_groups={c['conv_groups']} does not divide hidden_size={d}")
        yield from convolution("encoder.conv.conv", d, d // c["conv_groups"], c["conv_kernel_size"])
        yield from layer_norm("encoder.conv.LayerNorm", d)


def vit(c: Fields) -> Iterator[Entry]:
    """ViTModel, with pooler (Dosovitskiy et al. 2020, arXiv:2010.11929): patches of an image, and one position more."""
    d, ff, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    width = d // c["num_attention_heads"] * c["num_attention_heads"]
    yield "embeddings.cls_token", "parameter", (1, 1, d)
    yield "embeddings.position_embeddings", "parameter", (1, (c["image_size"] // patch) ** 2 + 1, d)
    yield from convolution("embeddings.patch_embeddings.projection", d, c["num_channels"], patch, patch)
    for i in range(c["num_hidden_layers"]):
        h = f"layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from linear(f"{h}attention.{name}", d, width, c["qkv_bias"])
        yield from linear(f"{h}attention.o_proj", width, d)
        yield from layer_norm(f"{h}layernorm_before", d)
        yield from layer_norm(f"{h}layernorm_after", d)
        yield from linear(f"{h}mlp.fc1", d, ff)
        yield from linear(f"{h}mlp.fc2", ff, d)
    yield from layer_norm("layernorm", d)
    yield from linear("pooler.dense", d, c["pooler_output_size"] or d)


# -------------------------------------------------------------------------------------------------- fields and defaults

# Hugging Face writes only the fields that differ from its defaults; 0 stands for a field that is derived from others.
_DECODER = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=0, head_dim=0, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA = dict(_DECODER, attention_bias=False, mlp_bias=False)
_MISTRAL = dict(_DECODER, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072)
_QWEN2 = dict(_DECODER, vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768)
_MOE = dict(
    _QWEN2, hidden_size=2048, num_hidden_layers=24, decoder_sparse_step=1, mlp_only_layers=frozenset(),
)  # fmt: skip
_GEMMA2 = dict(
    _DECODER, vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True, attention_bias=False,
)  # fmt: skip
_GEMMA3 = dict(_GEMMA2, vocab_size=262208, max_position_embeddings=131072)
_PHI = dict(_DECODER, vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, qk_layernorm=False)
_GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=0, tie_word_embeddings=True)
_BERT = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, type_vocab_size=2,
)  # fmt: skip
_T5 = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=0, num_heads=8,
    relative_attention_num_buckets=32, feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True,
)  # fmt: skip
_VIT = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
    patch_size=16, num_channels=3,
)  # fmt: skip

# model_type -> its rule, and its fields with the defaults of its configuration class
FAMILIES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "gpt2": (gpt2, _GPT2),
    "gpt_bigcode": (gpt2, dict(_GPT2, multi_query=True)),
    "gptj": (gptj, dict(_GPT2, vocab_size=50400, n_positions=2048, n_embd=4096, n_layer=28, n_head=16,
                        tie_word_embeddings=False)),
    "gpt_neox": (gpt_neox, dict(
        vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64, intermediate_size=24576,
        max_position_embeddings=2048, tie_word_embeddings=False, attention_bias=True)),
    "llama": (llama, _LLAMA),
    "mistral": (llama, _MISTRAL),
    "mixtral": (llama, dict(_MISTRAL, num_local_experts=8, num_experts_per_tok=2)),
    "qwen": (qwen, dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
                        num_attention_heads=32, kv_channels=128, no_bias=True, tie_word_embeddings=False)),
    "qwen2": (llama, _QWEN2),
    "qwen2_moe": (llama, dict(
        _MOE, intermediate_size=5632, num_attention_heads=16, num_experts=60, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts_per_tok=4, qkv_bias=True)),
    "qwen3": (llama, dict(_QWEN2, head_dim=128, attention_bias=False)),
    "qwen3_moe": (llama, dict(
        _MOE, intermediate_size=6144, num_key_value_heads=4, num_experts=128, moe_intermediate_size=768,
        num_experts_per_tok=8, attention_bias=False)),
    "gemma": (llama, dict(
        _GEMMA2, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16)),
    "gemma2": (llama, _GEMMA2),
    "gemma3_text": (llama, _GEMMA3),
    "gemma3": (gemma3, dict(_GEMMA3, vision_config=dict(_VIT, vision_use_head=True))),
    "phi": (phi, _PHI),
    "phi3": (llama, dict(_DECODER, vocab_size=32064, hidden_size=3072, intermediate_size=8192,
                         max_position_embeddings=4096)),
    "phimoe": (llama, dict(
        _MISTRAL, vocab_size=32064, intermediate_size=6400, num_local_experts=16, num_experts_per_tok=2,
        attention_bias=False, lm_head_bias=False)),
    "stablelm": (llama, dict(
        _DECODER, vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32,
        max_position_embeddings=4096, qkv_bias=False, use_parallel_residual=False)),
    "falcon": (falcon, dict(
        vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71, num_kv_heads=0,
        ffn_hidden_size=0, num_ln_in_parallel_attn=0, max_position_embeddings=2048, new_decoder_architecture=False,
        multi_query=True, parallel_attn=True, bias=False, tie_word_embeddings=True)),
    "bloom": (bloom, dict(vocab_size=250880, hidden_size=64, n_layer=2, n_head=8, tie_word_embeddings=True)),
    "opt": (opt, dict(
        vocab_size=50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072, num_attention_heads=12,
        max_position_embeddings=2048, word_embed_proj_dim=0, do_layer_norm_before=True, tie_word_embeddings=True,
        enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)),
    "t5": (t5, _T5),
    "mt5": (t5, dict(_T5, vocab_size=250112, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu")),
    "whisper": (whisper, dict(
        vocab_size=51865, num_mel_bins=80, d_model=384, encoder_layers=4, encoder_attention_heads=6, decoder_layers=4,
        decoder_ffn_dim=1536, encoder_ffn_dim=1536, max_source_positions=1500, max_target_positions=448,
        tie_word_embeddings=True)),
    "bert": (bert, _BERT),
    "roberta": (bert, {**_BERT, "vocab_size": 50265}),
    "xlm-roberta": (bert, _BERT),
    "deberta-v2": (deberta, dict(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=24, num_attention_heads=24, intermediate_size=6144,
        max_position_embeddings=512, type_vocab_size=0, relative_attention=False, max_relative_positions=-1,
        position_biased_input=True, position_buckets=-1, norm_rel_ebd="none", share_att_key=False, pos_att_type=frozenset(),
        conv_kernel_size=0, conv_groups=1, embedding_size=0, attention_head_size=0)),
    "vit": (vit, dict(_VIT, qkv_bias=True, pooler_output_size=0)),
}  # fmt: skip
