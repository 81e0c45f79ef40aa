"""One decoder-only transformer in two dialects, GPT-2 and Llama, with the module trees of their Hugging Face families.

    token ids ─ embedding ─┬─► norm ─► attention ─(+)─┬─► norm ─► MLP ─(+)─► ... ─► norm ─► head ─► logits
                           └──────────────────────┘   └─────────────────┘

            normalization   positions                  MLP                        biases   head
    gpt2    LayerNorm       learned, added             W₂ gelu(W₁ x)              yes      tied to the embedding
    llama   RMSNorm         rotary, in the attention   W₃ (silu(W₁ x) * W₂ x)     no       tied or not

    attention(x) = W_o softmax(q kᵀ / sqrt(D)) v of earlier positions      q [B, H, T, D], k and v [B, kv, S, D]

Each head of k and v is read by H / kv heads of q. The model knows no fine-tuning method. It has two seams:
`inputs_embeds` (what prompt tuning feeds) and `past_key_values` (a generation cache, or a trained prefix). Everything
else replaces a module found by its path.

Sources: Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama, arXiv:2302.13971); Ainslie et al. 2023 (grouped-query
attention, arXiv:2305.13245). Departure from GPT-2: dropout acts on the embeddings and the residual branches, not on
the attention weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..autograd import checks
from ..autograd import ops as F
from ..autograd.tensor import Tensor, checkpoint, is_grad_enabled
from ..backend import Array, Rng, as_rng, asarray, get_backend, is_array, to_numpy, xp_of
from ..options import check, configuration, option
from . import device
from .layers import Conv1D, Dropout, Embedding, LayerNorm, Linear, RMSNorm
from .module import Module, ModuleList, Parameter

KeyValue = tuple[Any, Any]  # keys and values [B, num_key_value_heads, positions, head_dim], arrays or Tensors

FAMILIES = ("gpt2", "llama", "mistral", "qwen2")
INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


@configuration(frozen=True)
class RopeScaling:
    """Rotary frequencies of Llama 3.1 and later, stretched for a context longer than the one of pretraining.

        f ← f (k + (1 - k) / factor),   k = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)

    with turns = f · original_max_position_embeddings / 2π and k limited to [0, 1]: a frequency f of few turns in the
    original context is divided by `factor`, one of many stays. Source: Llama 3 (Grattafiori et al. 2024,
    arXiv:2407.21783) as published in its reference code; `rope_type` "llama3" in Hugging Face.
    Raises ValueError for options out of range.
    """

    factor: float = option(None, "divides the frequencies of long waves; must be given", least=1)
    low_freq_factor: float = option(None, "turns in the original context, below which a wave is long", above=0)
    high_freq_factor: float = option(None, "turns, above which a wave is short", above=0)
    original_max_position_embeddings: int = option(None, "positions of the original context", least=1)

    def __post_init__(self) -> None:
        check(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise ValueError(f"rope scaling needs 0 < low_freq_factor < high_freq_factor, not {low!r} and {high!r}")

    def __call__(self, frequency: Array) -> Array:
        """The frequencies, in radians per position, [D/2] -> [D/2]."""
        turns = frequency * (self.original_max_position_embeddings / (2 * math.pi))  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = xp_of(frequency).clip(kept, 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@configuration(frozen=True)
class TransformerConfig:
    """The shape of a model, with the field names of Hugging Face's Llama configuration.

    `TransformerConfig.gpt2(...)` and `.llama(...)` set the dialect and its defaults. The families "mistral" and "qwen2" are
    the Llama dialect too; Qwen2 has biases in its query, key and value projections.
    Raises ValueError for shapes that do not fit together.
    """

    model_type: str = option("llama", "the family", choices=FAMILIES)
    vocab_size: int = option(2048, "tokens", least=1)
    hidden_size: int = option(128, "channels of a position", least=1)
    intermediate_size: int = option(
        0, "channels inside the MLP; 0: 4 * hidden_size (gpt2), 8/3 of it, to the next multiple of 32 (llama)", least=0
    )
    num_hidden_layers: int = option(4, "blocks", least=1)
    num_attention_heads: int = option(4, "query heads", least=1)
    num_key_value_heads: int = option(0, "key and value heads; 0: num_attention_heads", least=0)
    head_dim: int = option(0, "channels of a head; 0: hidden_size / num_attention_heads", least=0)
    max_position_embeddings: int = option(256, "positions, at most", least=1)
    rms_norm_eps: float = option(1e-6, "added to the mean square in RMSNorm (llama)", least=0)
    layer_norm_epsilon: float = option(1e-5, "added to the variance in LayerNorm (gpt2)", least=0)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    rope_scaling: RopeScaling | None = option(None, "rotary frequencies for a longer context")
    tie_word_embeddings: bool = option(True, "the head is the embedding")
    attention_bias: bool = option(False, "biases in the attention's projections (llama)")
    mlp_bias: bool = option(False, "biases in the MLP (llama)")
    initializer_range: float = option(0.02, "standard deviation of the initial weights", least=0)
    dropout: float = option(0.0, "probability, of the embeddings and the residual branches", least=0, below=1)
    bos_token_id: int | None = option(None, "begins a text")
    eos_token_id: int | tuple[int, ...] | None = option(None, "ends a text; several: any of them does")
    pad_token_id: int | None = option(None, "fills a batch up")

    def __post_init__(self) -> None:
        check(self)
        gpt2, heads = self.model_type == "gpt2", self.num_attention_heads
        if self.model_type in ("mistral", "qwen2") and (self.attention_bias or self.mlp_bias):
            raise ValueError(f"attention_bias and mlp_bias are options of llama; {self.model_type} has none")
        if gpt2 and (self.attention_bias or self.mlp_bias or self.rope_scaling is not None):
            raise ValueError(
                "attention_bias, mlp_bias and rope_scaling are options of llama; gpt2 always has biases, and no rotary positions"
            )
        if self.hidden_size % heads and not self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        for name, value in (
            ("num_key_value_heads", heads),
            ("head_dim", self.hidden_size // heads),
            ("intermediate_size", 4 * self.hidden_size if gpt2 else -(-8 * self.hidden_size // 96) * 32),
        ):
            object.__setattr__(self, name, getattr(self, name) or value)
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if gpt2 and (self.num_key_value_heads != heads or self.head_dim * heads != self.hidden_size):
            raise ValueError(
                "the gpt2 dialect has as many key heads as query heads, "
                "and a head_dim of hidden_size / num_attention_heads"
            )
        if not gpt2 and self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head_dim, not {self.head_dim}")

    @classmethod
    def gpt2(cls, **fields: Any) -> TransformerConfig:
        """A GPT-2 configuration: layer norm, learned positions, tanh-GELU, biases, tied head."""
        return cls(model_type="gpt2", **fields)

    @classmethod
    def llama(cls, **fields: Any) -> TransformerConfig:
        """A Llama configuration: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""
        return cls(model_type="llama", **fields)

    def replace(self, **fields: Any) -> TransformerConfig:
        """The same configuration with some fields changed."""
        return dataclasses.replace(self, **fields)


# ----------------------------------------------------------------------------------------------------------- caches


class KVCache:
    """The keys and values of the positions seen so far, per layer, in buffers that grow by doubling.

    Args:
        past_key_values: optional (k, v) per layer, [B, kv, positions, D], to start from (copied), such as a trained
            prefix or another cache.

    visible    boolean [B, n] in host memory: which of the first n positions a row has, where adapters with virtual
               tokens are mixed; None: all
    """

    def __init__(self, past_key_values: Sequence[KeyValue] = ()):
        self.visible: Array | None = getattr(past_key_values, "visible", None)
        self._buffers: list[list[Array]] = []
        self._lengths: list[int] = []
        for layer, (k, v) in enumerate(past_key_values):
            self.append(layer, k.data if isinstance(k, Tensor) else k, v.data if isinstance(v, Tensor) else v)

    def __repr__(self) -> str:
        return f"KVCache({len(self._buffers)} layers, {len(self)} positions)"

    def __len__(self) -> int:
        return self._lengths[0] if self._lengths else 0

    def __iter__(self) -> Iterator[KeyValue]:
        """(k, v) of each layer, views: `KVCache(cache)` is an independent copy."""
        return ((k[:, :, :n], v[:, :, :n]) for (k, v), n in zip(self._buffers, self._lengths))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, without the room to grow."""
        return sum(k.nbytes + v.nbytes for k, v in self)

    def append(self, layer: int, k: Array, v: Array) -> KeyValue:
        """Add k, v [B, kv, new, D] to a layer; returns all its keys and values, views [B, kv, positions, D]."""
        *buffers, n = self.reserve(layer, k.shape, v.shape, like=k)
        m = n + k.shape[2]
        for buffer, new in zip(buffers, (k, v)):
            buffer[:, :, n:m] = new
        return buffers[0][:, :, :m], buffers[1][:, :, :m]

    def reserve(self, layer: int, k: tuple[int, ...], v: tuple[int, ...], like: Array) -> tuple[Array, Array, int]:
        """(keys, values, n): a layer's buffers, into which k and v of these shapes [B, kv, new, D] are to be written from
        position n on; they count as added."""
        if layer == len(self._buffers):
            self._buffers.append([like[..., :0, :0], like[..., :0, :0]])
            self._lengths.append(0)
        n = self._lengths[layer]
        for i, (B, kv, new, D) in enumerate((k, v)):
            buffer = self._buffers[layer][i]
            dtype = xp_of(like).result_type(buffer.dtype, like.dtype) if n else like.dtype
            if buffer.shape[-2] < n + new or buffer.dtype != dtype:
                shape = B, kv, max(n + new, 2 * buffer.shape[-2], 16), D
                grown = xp_of(like).empty_like(like, dtype, shape=shape, order="C")
                if n:
                    grown[:, :, :n] = buffer[:, :, :n]
                self._buffers[layer][i] = grown
        self._lengths[layer] = n + k[2]
        return *self._buffers[layer], n

    def select(self, rows: Array) -> None:
        """Keep only these batch rows (integer array [b])."""
        self._buffers = [[buffer[rows] for buffer in pair] for pair in self._buffers]
        self.visible = None if self.visible is None else self.visible[to_numpy(rows)]


def _extend(k: Tensor, v: Tensor, past: KVCache | Sequence[KeyValue] | None, layer: int) -> tuple[Any, Any]:
    """The keys and values of earlier positions and these."""
    if past is None:
        return k, v
    if isinstance(past, KVCache):
        keys, values = past.append(layer, k.data, v.data)
        if not is_grad_enabled():
            return keys, values
        n = keys.shape[2] - k.shape[2]
        past = {layer: (keys[:, :, :n], values[:, :, :n])}  # the new ones keep their graph
    return F.cat([past[layer][0], k], axis=2), F.cat([past[layer][1], v], axis=2)


def from_host(array: Array, xp: ModuleType, check: Callable[[Array], None] = lambda array: None) -> Array:
    """The array on the device of `xp`; from host memory it comes checked, as to read it there is not to wait."""
    if xp is np or not isinstance(array, np.ndarray):
        return array
    check(array)
    return xp.asarray(array)


def past_length(past: KVCache | Sequence[KeyValue] | None) -> int:
    """How many earlier positions a cache or prefix holds."""
    return 0 if past is None else len(past) if isinstance(past, KVCache) else past[0][0].shape[2] if past else 0


def attend(q: Tensor, k: Any, v: Any, context: Context, layer: int) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over the keys that a query may see: q [B, H, T, D], k and v [B, kv, S, D].

    Where the attentions are asked for, by the plain definition, which has them: P [B, H, T, S].
    """
    if context.attentions is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, is_causal=True)
    (B, H, T, D), (kv, S), xp = q.shape, k.shape[1:3], xp_of(q.data)
    visible = xp.arange(S) <= xp.arange(S - T, S)[:, None]  # [T, S]
    visible = visible if context.mask is None else visible & context.mask
    scores = q.reshape(B, kv, H // kv, T, D) @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)  # [B, kv, H/kv, T, S]
    some = visible | ~visible.any(axis=-1, keepdims=True)  # all, where a query may see nothing
    scores = F.where(some, scores.reshape(B, H, T, S), float(xp.finfo(q.dtype).min))
    P = F.softmax(scores) * visible
    P.retain_grad()
    context.attentions[layer : layer + 1] = [P]  # a checkpointed layer comes twice, the second time with its graph
    return (P.reshape(B, kv, H // kv, T, S) @ v[:, :, None]).reshape(B, H, T, v.shape[3])


@dataclass
class Context:
    """What every block of one forward pass gets beside its input."""

    mask: Array | None  # boolean, broadcastable to [B, 1, T, S]; None where causality says everything
    rotation: tuple[Array, Array] | None  # cos and sin [B or 1, T, head_dim/2] of the positions (llama)
    past: KVCache | Sequence[KeyValue] | None
    attentions: list[Tensor] | None = None  # of the layers so far; None where nobody asks


# ----------------------------------------------------------------------------------------------------- llama dialect


class LlamaAttention(Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, c: TransformerConfig):
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        bias = c.attention_bias or c.model_type == "qwen2"
        self.q_proj = Linear(c.hidden_size, heads, bias, seed=None)
        self.k_proj = Linear(c.hidden_size, kv, bias, seed=None)
        self.v_proj = Linear(c.hidden_size, kv, bias, seed=None)
        self.o_proj = Linear(heads, c.hidden_size, c.attention_bias, seed=None)
        self.head_dim = c.head_dim

    def forward(self, x: Tensor, context: Context, layer: int, rng: Rng | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        (B, T, _), D, past = x.shape, self.head_dim, context.past
        q, k, v = self.q_proj(x, rng), self.k_proj(x, rng), self.v_proj(x, rng)  # [B, T, heads * D]
        cached = isinstance(past, KVCache) and not is_grad_enabled()
        if context.attentions is None and (past is None or cached):
            shape = B, k.shape[2] // D, T, D
            cache = past.reserve(layer, shape, shape, like=k.data) if cached else None
            # `attend`, with rotation before it, as one op
            y = F.rotary_attention(q, k, v, *context.rotation, attn_mask=context.mask, cache=cache)
            return self.o_proj(y, rng)

        def heads(y: Tensor) -> Tensor:  # [B, T, H * D] -> [B, H, T, D]
            return y.reshape(B, T, y.shape[2] // D, D).swapaxes(1, 2)

        q, k = F.rope(heads(q), *context.rotation), F.rope(heads(k), *context.rotation)
        k, v = _extend(k, heads(v), past, layer)
        y = attend(q, k, v, context, layer)
        return self.o_proj(y.swapaxes(1, 2).reshape(B, T, y.shape[1] * D), rng)


class LlamaMLP(Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: TransformerConfig):
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, seed=None)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias, seed=None)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, seed=None)

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., d] -> [..., d]."""
        return self.down_proj(F.swiglu(self.gate_proj(x, rng), self.up_proj(x, rng)), rng)


class LlamaBlock(Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, c: TransformerConfig):
        self.self_attn = LlamaAttention(c)
        self.mlp = LlamaMLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, seed=None)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, seed=None)
        self.dropout = Dropout(c.dropout)

    def forward(self, x: Tensor, context: Context, layer: int, rng: Rng | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        a = self.self_attn(self.input_layernorm(x, rng), context, layer, rng)
        x = F.add(x, self.dropout(a, rng and rng.at(0)), later=True)
        m = self.mlp(self.post_attention_layernorm(x, rng), rng)
        return F.add(x, self.dropout(m, rng and rng.at(1)), later=True)


# ------------------------------------------------------------------------------------------------------ gpt2 dialect


class GPT2Attention(Module):
    """Multi-head attention with a fused query-key-value projection."""

    def __init__(self, c: TransformerConfig):
        self.c_attn = Conv1D(c.hidden_size, 3 * c.hidden_size, seed=None)
        self.c_proj = Conv1D(c.hidden_size, c.hidden_size, seed=None)
        self.num_heads = c.num_attention_heads

    def forward(self, x: Tensor, context: Context, layer: int, rng: Rng | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        B, T, d = x.shape
        qkv = self.c_attn(x, rng)  # [B, T, 3d]
        if context.past is None and context.attentions is None:
            # `attend` as one op
            return self.c_proj(F.packed_attention(qkv, self.num_heads, attn_mask=context.mask), rng)
        heads = qkv.reshape(B, T, 3, self.num_heads, d // self.num_heads).transpose(2, 0, 3, 1, 4)  # [3, B, H, T, D]
        k, v = _extend(heads[1], heads[2], context.past, layer)
        y = attend(heads[0], k, v, context, layer)
        return self.c_proj(y.swapaxes(1, 2).reshape(B, T, d), rng)


class GPT2MLP(Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, c: TransformerConfig):
        self.c_fc = Conv1D(c.hidden_size, c.intermediate_size, seed=None)
        self.c_proj = Conv1D(c.intermediate_size, c.hidden_size, seed=None)

    def forward(self, x: Tensor, rng: Rng | None = None) -> Tensor:
        """x [..., d] -> [..., d]."""
        return self.c_proj(F.gelu(self.c_fc(x, rng)), rng)


class GPT2Block(Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, c: TransformerConfig):
        self.ln_1 = LayerNorm(c.hidden_size, c.layer_norm_epsilon, seed=None)
        self.attn = GPT2Attention(c)
        self.ln_2 = LayerNorm(c.hidden_size, c.layer_norm_epsilon, seed=None)
        self.mlp = GPT2MLP(c)
        self.dropout = Dropout(c.dropout)

    def forward(self, x: Tensor, context: Context, layer: int, rng: Rng | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]."""
        a = self.attn(self.ln_1(x, rng), context, layer, rng)
        x = F.add(x, self.dropout(a, rng and rng.at(0)), later=True)
        m = self.mlp(self.ln_2(x, rng), rng)
        return F.add(x, self.dropout(m, rng and rng.at(1)), later=True)


# --------------------------------------------------------------------------------------------------------- backbone


class Backbone(Module):
    """Embeddings, blocks and the final norm: token ids (or their embeddings) -> hidden states [B, T, d].

    Subclasses name the parts as their family does: `blocks`, `embedding` and `final_norm` find them.
    """

    config: TransformerConfig
    gradient_checkpointing: bool = False
    blocks: ModuleList
    embedding: Embedding
    final_norm: Module

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | Sequence[KeyValue] | None = None,
        rng: Rng | int | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, d]. Arguments and errors are those of `Transformer.forward`.

        A list that is given as `attentions` is filled with each layer's, [B, H, T, past + T].
        """
        c, rng = self.config, as_rng(rng)
        self.check_inputs(input_ids, attention_mask, position_ids, inputs_embeds)
        x = self.embed(input_ids, rng) if inputs_embeds is None else inputs_embeds
        if isinstance(past_key_values, (list, tuple)) and len(past_key_values) != len(self.blocks):
            raise ValueError(
                f"past_key_values must hold (k, v) of each of the {len(self.blocks)} layers, not of {len(past_key_values)}"
            )
        (B, T, _), past, xp = x.shape, past_length(past_key_values), xp_of(x.data)
        first = next(iter(past_key_values or ()), None)
        if first is not None and first[0].shape[0] != B:
            raise ValueError(f"past_key_values are of a batch of {first[0].shape[0]} rows, and this one has {B}")
        mask, positions = self._mask_and_positions(attention_mask, position_ids, B, past, T)
        mask, positions = from_host(mask, xp), from_host(positions, xp)
        x, rotation = self._positions(x, positions)
        if c.dropout and rng is not None:
            x = F.dropout(x, c.dropout, rng.at(c.num_hidden_layers))
        if attentions is not None:
            attentions.clear()
        context = Context(mask, rotation, past_key_values, attentions)
        for i, block in enumerate(self.blocks):
            layer_rng = rng and rng.at(i)
            if self.gradient_checkpointing and is_grad_enabled() and not isinstance(past_key_values, KVCache):
                used = [
                    *block.parameters(),
                    *(t for t in (past_key_values or [()] * (i + 1))[i] if isinstance(t, Tensor)),
                ]
                run = copy_context().run  # computed again in backward, a block sees the context variables of now
                compute = lambda x, run=run, b=block, i=i, r=layer_rng: run(b, x, context, i, r)  # noqa: E731
                x = checkpoint(compute, x, parameters=used)
            else:
                x = block(x, context, i, layer_rng)
        return self.final_norm(x, rng)

    def check_inputs(
        self, input_ids: Array | None, attention_mask: Array | None, position_ids: Array | None, inputs_embeds: Tensor | None
    ) -> None:  # fmt: skip
        """Raises ValueError or TypeError for what is no input, or two."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        for name, given in zip(INPUTS, (input_ids, attention_mask, position_ids)):
            if not (given is None or hasattr(given, "ndim")):
                raise TypeError(f"{name} must be an integer array, not a {type(given).__name__}")
        if attention_mask is not None:
            check_mask(attention_mask)
        if input_ids is not None and input_ids.ndim != 2:
            raise ValueError(f"input_ids must have the shape [batch, seq], not {input_ids.shape}")
        if inputs_embeds is not None and (inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size):
            shape = f"[batch, seq, {self.config.hidden_size}]"
            raise ValueError(f"inputs_embeds must have the shape {shape}, not {inputs_embeds.shape}")

    def embed(self, input_ids: Array, rng: Rng | None = None) -> Tensor:
        """The embeddings of ids [B, T], on the model's device: [B, T, d]. Raises IndexError for ids out of range."""
        xp = xp_of(self.embedding.weight.data)
        return self.embedding(from_host(input_ids, xp, lambda ids: checks.ids(ids, self.config.vocab_size)), rng)

    def _mask_and_positions(
        self, mask: Array | None, positions: Array | None, B: int, past: int, T: int
    ) -> tuple[Array | None, Array]:
        """(boolean mask or None, integer positions [B or 1, T]), where the arrays are; on a device they are not read."""
        S, limit, xp = past + T, self.config.max_position_embeddings, xp_of(mask, positions)
        if mask is not None and mask.shape not in ((B, S), (B, 1, T, S)):
            raise ValueError(f"attention_mask must have the shape {(B, S)} or {(B, 1, T, S)}, not {mask.shape}")
        if positions is None:
            if mask is None or mask.ndim == 4:
                positions = xp.arange(past, S)[None]
            else:
                positions = xp.maximum((mask != 0).astype(xp.int64).cumsum(axis=1) - 1, 0)[:, past:]
        elif positions.dtype.kind not in "iu":
            raise TypeError(f"position_ids must be integers, not {positions.dtype}")
        elif positions.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids must have the shape {(B, T)} or {(1, T)}, not {positions.shape}")
        if positions.size and xp is np:
            low, high = int(positions.min().item()), int(positions.max().item())
            if low < 0:
                raise ValueError(f"position_ids must not be negative; the lowest is {low}")
            if high >= limit:
                raise ValueError(
                    f"the sequence reaches position {high}, but this model has {limit} positions (0..{limit - 1}): "
                    f"shorten it to at most {limit} tokens"
                )
        if mask is not None and mask.ndim == 2:
            mask = None if xp is np and mask.all() else (mask != 0)[:, None, None, :]
        elif mask is not None:
            mask = mask.astype(bool, copy=False)
        return mask, positions

    def _positions(self, x: Tensor, positions: Array) -> tuple[Tensor, tuple[Array, Array] | None]:
        raise NotImplementedError(f"{type(self).__name__} does not say how positions enter")


class LlamaModel(Backbone):
    """The Llama backbone: embed_tokens, layers, norm."""

    def __init__(self, c: TransformerConfig):
        self.config = c
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, seed=None)
        self.layers = ModuleList([LlamaBlock(c) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, seed=None)

    blocks = property(lambda self: self.layers)
    embedding = property(lambda self: self.embed_tokens)
    final_norm = property(lambda self: self.norm)

    def _positions(self, x: Tensor, positions: Array) -> tuple[Tensor, tuple[Array, Array] | None]:
        xp, half = xp_of(x.data), self.config.head_dim // 2
        # float64 angles: at position 10,000 a float32 product would already be wrong in its fourth digit
        frequency = self.config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)  # [D/2]
        if self.config.rope_scaling is not None:
            frequency = self.config.rope_scaling(frequency)
        if xp.__name__ == "cupy":
            return x, device.rotation(positions, frequency, x.dtype)
        angle = positions[..., None] * xp.asarray(frequency)  # [B or 1, T, D/2]
        return x, (xp.cos(angle).astype(x.dtype, copy=False), xp.sin(angle).astype(x.dtype, copy=False))


class GPT2Model(Backbone):
    """The GPT-2 backbone: wte, wpe, h, ln_f."""

    def __init__(self, c: TransformerConfig):
        self.config = c
        self.wte = Embedding(c.vocab_size, c.hidden_size, seed=None)
        self.wpe = Embedding(c.max_position_embeddings, c.hidden_size, seed=None)
        self.h = ModuleList([GPT2Block(c) for _ in range(c.num_hidden_layers)])
        self.ln_f = LayerNorm(c.hidden_size, c.layer_norm_epsilon, seed=None)

    blocks = property(lambda self: self.h)
    embedding = property(lambda self: self.wte)
    final_norm = property(lambda self: self.ln_f)

    def _positions(self, x: Tensor, positions: Array) -> tuple[Tensor, tuple[Array, Array] | None]:
        return x + self.wpe(positions), None


# -------------------------------------------------------------------------------------------------------- the model


class BackboneModel(Module):
    """A model with a backbone under its family's name: `model.model` (llama) or `model.transformer` (gpt2)."""

    config: TransformerConfig
    name_or_path: str | None = None  # what it was read from, which the files of its adapters remember

    @property
    def backbone(self) -> Backbone:
        """The part below the head."""
        return self.transformer if self.config.model_type == "gpt2" else self.model

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Keep only each block's input in the forward pass and compute the block again in backward (`checkpoint`)."""
        self.backbone.gradient_checkpointing = enabled


def check_mask(mask: Array) -> None:
    """Raises ValueError for a mask of other numbers than 0 and 1, or that may be added to scores; TypeError for no numbers.

    Integers on a device are not read.
    """
    kind = mask.dtype.kind
    if kind not in "biuf":
        raise TypeError(f"attention_mask must hold true and false, or 1 and 0, not {mask.dtype}")
    if kind == "b" or (kind != "f" and xp_of(mask) is not np):
        return
    wrong = ((mask != 0) & (mask != 1)).any()
    if kind == "f" and mask.ndim == 2:  # a row of zeros adds nothing, so that all is seen, or there is nothing to see
        wrong |= (mask == 0).all(axis=1).any()
    if (kind == "f" and mask.ndim == 4) or bool(wrong.item()):
        raise ValueError(
            f"attention_mask is 1 (or true) where there is something to see, and else 0; this one, of {mask.dtype} and "
            f"shape {mask.shape}, is of another kind; of one that is added to the scores give mask == 0"
        )


def check_labels(labels: Any) -> None:
    """Raises TypeError for labels that are no array of signed integers: -100 is one of them."""
    if not is_array(labels) or labels.dtype.kind != "i":
        what = labels.dtype if is_array(labels) else type(labels).__name__
        raise TypeError(f"labels must be an array of signed integers, in which -100 does not count, not {what}")


def _resized(weight: Array, n: int, generator: np.random.Generator) -> Array:
    """The first n rows of a weight [V, d]; beyond V, rows x̄ + sqrt(1e-9 / V) gᵀ(W - x̄) with normal g [V].

    Such a row has the mean x̄ of the rows of W and 1e-9 of their covariance, which is never formed.
    """
    xp, V = xp_of(weight), len(weight)
    mean = weight.mean(axis=0, dtype=xp.promote_types(weight.dtype, xp.float32))
    g = generator.standard_normal((max(0, n - V), V), np.float32) * np.float32(math.sqrt(1e-9 / V))
    new = mean + asarray(g, xp) @ (weight - mean)
    return xp.concatenate([weight[:n], new.astype(weight.dtype)])


class Transformer(BackboneModel):
    """A decoder-only language model: token ids -> logits over the next token.

    Args:
        config: its shape and dialect.
        seed: names the initial weights: N(0, initializer_range²), in the gpt2 dialect divided by sqrt(2 * layers) for
            the projections that end a residual branch (Radford et al. 2019); norms 1, biases 0. None leaves every
            weight unallocated, for counting or loading.
        backend: "numpy" or "cupy"; None asks MINIPEFT_BACKEND.

    `model.model` (llama) or `model.transformer` (gpt2) is the backbone, which gives hidden states.
    Raises as `get_backend`.
    """

    def __init__(self, config: TransformerConfig, seed: int | None = 0, backend: str | None = None):
        self.config = config
        if config.model_type == "gpt2":
            self.transformer = GPT2Model(config)
        else:
            self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, seed=None)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        if seed is not None:
            self._initialize(np.random.default_rng(seed))
            self.to(get_backend(backend))

    def _initialize(self, generator: np.random.Generator) -> None:
        c = self.config
        for path, p in self.named_parameters():
            if len(p.shape) == 1:
                p.data = np.full(p.shape, float(path.endswith("weight")), np.float32)
                continue
            std = c.initializer_range
            if c.model_type == "gpt2" and path.endswith("c_proj.weight"):
                std /= math.sqrt(2 * c.num_hidden_layers)
            p.data = generator.standard_normal(p.shape, np.float32) * np.float32(std)

    def resize_token_embeddings(self, new_num_tokens: int, seed: int = 0) -> Embedding:
        """Give the vocabulary this many tokens, in place: embedding, head (a tied one stays tied) and configuration.

        New rows are drawn as in Hugging Face transformers (`mean_resizing`): from a normal distribution with the mean of
        the present rows and 1e-9 of their covariance, the embedding's and an untied head's each from their own. So a
        new token is about as probable as the others are on average, where a random row could take all of the
        probability (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). A smaller
        vocabulary loses its last tokens. The old arrays stay as they are, for whoever shares them. Returns the embedding.

        Departure: transformers adds no noise where the covariance is, up to rounding, not positive definite.

        Raises ValueError for a number below 1, and for a model whose embedding or head has an adapter or is quantized.
        """
        embedding, head = self.backbone.embedding, self.lm_head
        if new_num_tokens < 1:
            raise ValueError(f"a vocabulary has at least one token, got {new_num_tokens}")
        if type(embedding) is not Embedding or type(head) is not Linear:
            other = next(type(m).__name__ for m in (embedding, head) if type(m) not in (Embedding, Linear))
            raise ValueError(f"resize the vocabulary before adapters or four bits come in; there is a {other} already")
        tied = head.weight is embedding.weight
        for number, layer in enumerate((embedding,) if tied else (embedding, head)):
            rows = _resized(layer.weight.data, new_num_tokens, np.random.default_rng([seed, number]))
            layer.weight = Parameter(rows, requires_grad=layer.weight.requires_grad)
        if tied:
            head.weight = embedding.weight
        self.config = self.backbone.config = self.config.replace(vocab_size=new_num_tokens)
        return embedding

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | Sequence[KeyValue] | None = None,
        rng: Rng | int | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """Logits [B, T, vocab_size].

        Args:
            input_ids: integer array [B, T]; or give `inputs_embeds`, a Tensor [B, T, d], in its place.
            attention_mask: [B, past + T], 1 where there is a token, 0 where there is padding (left or right); or boolean
                [B, 1, T, past + T], saying which query may see which key (packing). Causality holds in any case.
            position_ids: [B, T]; by default they count the unmasked positions.
            past_key_values: (k, v) per layer of earlier positions, never changed; or a KVCache, which is appended to.
            rng: a seed or `Rng`; dropout acts only when it is given.
            output_attentions: True gives (logits, attentions), where attentions[layer] [B, H, T, past + T] is how
                much each query reads of each key, a Tensor whose `.grad` a backward pass fills. They are computed by
                the plain definition, which is slower. `loss` takes a list in place of it, to be filled: `attentions=`.

        A model on a device takes ids, mask and positions from there or from host memory, and so does `loss` its labels.
        In host memory they are checked, and then moved. On the device they are not read, which would be to wait for it:
        an id or label that is out of range gives NaN.

        Raises IndexError for ids out of range, TypeError for what is no integer array, and ValueError for shapes that
        do not fit or a sequence longer than `max_position_embeddings`.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, rng
        attentions: list[Tensor] | None = [] if output_attentions else None
        logits = self.lm_head(self.backbone(*given, attentions), as_rng(rng))
        return (logits, attentions) if output_attentions else logits

    def loss(self, input_ids: Array, labels: Array, *, label_smoothing: float = 0.0, **arguments: Any) -> Tensor:
        """Mean next-token cross-entropy, in nats: position t predicts labels[:, t + 1]; labels of -100 do not count.

        `labels` has the shape of `input_ids` (as in Hugging Face, they are shifted here); further arguments are those
        of `forward`; `label_smoothing` is `cross_entropy`'s. Logits are computed only where a label counts (where labels
        are on a device: everywhere), and held once. Raises as `forward`, ValueError for labels of another shape,
        TypeError for what are no signed integers.
        """
        if "output_attentions" in arguments:
            raise TypeError(
                "loss returns the loss alone: give it a list that is filled with the attentions, attentions=[]"
            )
        hidden = self.backbone(input_ids, **arguments)
        return self.head_loss(hidden, labels, as_rng(arguments.get("rng")), label_smoothing)

    def head_loss(self, hidden: Tensor, labels: Array, rng: Rng | None = None, label_smoothing: float = 0.0) -> Tensor:
        """The loss of `loss`, from hidden states [B, T, d] and labels [B, T]; raises as `loss`."""
        check_labels(labels)
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must have the shape of the input, {hidden.shape[:2]}, not {labels.shape}")
        xp, targets = xp_of(hidden.data), xp_of(labels).full(labels.shape, -100, labels.dtype)
        targets[:, :-1] = labels[:, 1:]
        plain = type(self.lm_head) is Linear and self.lm_head.bias is None
        if xp is not np and isinstance(targets, np.ndarray):
            checks.targets("loss", targets, targets.shape, self.config.vocab_size, -100)
            if plain:  # which labels count, the device's kernel could say only after a wait
                rows = np.flatnonzero(targets != -100)
                hidden = F.embedding(xp.asarray(rows), hidden.reshape(-1, hidden.shape[2]))  # these rows of it
                targets = targets.reshape(-1)[rows]
            targets = xp.asarray(targets)
        if plain:
            return F.linear_cross_entropy(hidden, self.lm_head.weight, targets, label_smoothing=label_smoothing)
        return F.cross_entropy(self.lm_head(hidden, rng), targets, label_smoothing=label_smoothing)

    def generate(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Rng = 0,
        eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The prompts [B, T] and their continuations, greedy unless `temperature` is above 0: int64 [B, T + n].

        All arguments and errors are those of `minipeft.nn.generation.generate_stream`.
        """
        from .generation import generate

        options.update(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, eos_token_id=eos_token_id)
        return generate(self, input_ids, attention_mask, max_new_tokens, **options)
