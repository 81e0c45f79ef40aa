"""The transformer: both dialects on every device, masks and positions, its two seams, memory, names and counts."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from models import DIALECTS, SHAPE, build, config, dialects, double, sgd_steps, tokens, traced

import minipeft as mp
from minipeft import functional as F
from minipeft.autograd.gradcheck import gradcheck
from minipeft.backend import Rng, to_numpy
from minipeft.nn.heads import SequenceClassifier
from minipeft.nn.transformer import KVCache, Transformer, TransformerConfig


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- on devices


@dialects
def test_forward_loss_and_gradients_are_those_of_numpy(dialect, xp, rng):
    ids, mask = tokens(rng, 3, 7), np.ones((3, 7), np.int64)
    mask[0, :3] = mask[1, 5:] = 0
    labels = np.where(mask, ids, -100)
    found = []
    for library in (np, xp):
        model = build(dialect, library, dropout=0.1)
        arrays = [library.asarray(a) for a in (ids, labels, mask)]
        logits = model(arrays[0], attention_mask=arrays[2])
        loss = model.loss(arrays[0], arrays[1], attention_mask=arrays[2])
        loss.backward()
        found.append([logits.data, loss.data, *[p.grad for p in model.parameters()]])
    assert type(found[1][0]) is xp.ndarray
    for here, there in zip(*found):
        close(here, there)


@dialects
def test_loss_is_the_shifted_cross_entropy_of_the_logits(dialect, xp, rng):
    model = build(dialect, xp)
    ids = tokens(rng, 2, 6)
    labels = ids.copy()
    labels[0, :3] = labels[1, 5] = -100
    logits = to_numpy(model(xp.asarray(ids)).data)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = [-log_p[b, t, labels[b, t + 1]] for b in range(2) for t in range(5) if labels[b, t + 1] != -100]
    close(model.loss(xp.asarray(ids), xp.asarray(labels)).data, np.asarray(np.mean(picked)))
    even = [-log_p[b, t].mean() for b in range(2) for t in range(5) if labels[b, t + 1] != -100]
    smoothed = model.loss(xp.asarray(ids), xp.asarray(labels), label_smoothing=0.2)
    close(smoothed.data, np.asarray(0.8 * np.mean(picked) + 0.2 * np.mean(even)))


# ----------------------------------------------------------------------------------------------- masks and positions


@dialects
def test_padding_changes_no_logits_of_real_positions_no_loss_and_no_gradients(dialect, xp, rng):
    model, ids = build(dialect, xp), tokens(rng, 2, 5)
    results = []
    for left, right in ((0, 0), (4, 0), (0, 4)):
        T = left + 5 + right
        padded, labels, mask = tokens(rng, 2, T), np.full((2, T), -100), np.zeros((2, T), np.int64)
        real = slice(left, left + 5)
        padded[:, real], labels[:, real], mask[:, real] = ids, ids, 1
        labels[:, left] = -100  # the first token has no predecessor: with left padding it must not count
        padded, labels, mask = map(xp.asarray, (padded, labels, mask))
        logits = model(padded, attention_mask=mask).data
        assert np.isfinite(to_numpy(logits)).all()  # padding positions that see nothing are numbers too
        model.zero_grad()
        loss = model.loss(padded, labels, attention_mask=mask)
        loss.backward()
        results.append([logits[:, real], loss.data, *[p.grad for p in model.parameters()]])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            close(a, b)


@dialects
def test_a_fully_padded_row_gives_numbers_and_no_gradient_into_others(dialect, xp, rng):
    model, ids = build(dialect, xp), tokens(rng, 2, 5)
    mask = np.array([[1] * 5, [0] * 5])
    labels = np.where(mask, ids, -100)
    loss = model.loss(*map(xp.asarray, (ids, labels)), attention_mask=xp.asarray(mask))
    loss.backward()
    close(loss.data, model.loss(xp.asarray(ids[:1]), xp.asarray(ids[:1])).data)
    assert all(np.isfinite(to_numpy(p.grad)).all() for p in model.parameters())


@dialects
def test_packed_sequences_equal_separate_ones(dialect, xp, rng):
    model, first, second = build(dialect, xp), tokens(rng, 1, 5), tokens(rng, 1, 3)
    segment = np.array([0] * 5 + [1] * 3)
    block = (segment[:, None] == segment[None, :])[None, None]  # [1, 1, T, T]; causality is added by the model
    positions = np.r_[np.arange(5), np.arange(3)][None]
    both = np.concatenate([first, second], axis=1)
    packed = model(xp.asarray(both), attention_mask=xp.asarray(block), position_ids=xp.asarray(positions))
    separate = [to_numpy(model(xp.asarray(s)).data) for s in (first, second)]
    close(packed.data, np.concatenate(separate, axis=1))


@dialects
def test_a_mask_of_ones_is_no_mask(dialect, xp, rng):
    model, ids = build(dialect, xp), xp.asarray(tokens(rng, 2, 6))
    for ones in (np.ones((2, 6), np.int64), np.ones((2, 6), bool), np.ones((2, 6), np.float32)):
        masked = model(ids, attention_mask=xp.asarray(ones))
        assert np.array_equal(to_numpy(model(ids).data), to_numpy(masked.data))


@dialects
def test_no_position_sees_a_later_one(dialect, rng):
    model, ids = build(dialect), tokens(rng, 1, 8)
    changed = ids.copy()
    changed[0, 5:] = (ids[0, 5:] + 1) % 40
    before, after = model(ids).data, model(changed).data
    assert np.array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


@dialects
def test_the_order_of_earlier_tokens_matters(dialect, rng):
    model = build(dialect)
    a, b = model(np.array([[3, 7, 9]])).data[:, -1], model(np.array([[7, 3, 9]])).data[:, -1]
    assert np.abs(a - b).max() > 1e-2


# ------------------------------------------------------------------------------------------------------ the two seams


def pairs(model, ids, mask=None):
    """Keys and values of `ids`, per layer."""
    cache = KVCache()
    model(ids, attention_mask=mask, past_key_values=cache)
    return [(k.copy(), v.copy()) for k, v in cache]


@dialects
def test_past_key_values_equal_the_full_forward_and_are_not_changed(dialect, xp, rng):
    model, ids = build(dialect, xp), tokens(rng, 2, 8)
    past = pairs(model, xp.asarray(ids[:, :5]))
    before = [to_numpy(a).copy() for pair in past for a in pair]
    logits = model(xp.asarray(ids[:, 5:]), past_key_values=past)
    close(logits.data, model(xp.asarray(ids)).data[:, 5:])
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(before, [a for pair in past for a in pair]))


@dialects
def test_a_cache_fed_piece_by_piece_equals_the_full_forward_with_left_padding(dialect, xp, rng):
    model, ids = build(dialect, xp, max_position_embeddings=72), tokens(rng, 2, 70)  # more than a block of attention
    mask = np.ones((2, 70), np.int64)
    mask[0, :3] = 0
    full = to_numpy(model(xp.asarray(ids), attention_mask=xp.asarray(mask)).data)
    cache = KVCache()
    for start, stop in [(0, 5), *[(t, t + 1) for t in range(5, 20)], (20, 68), (68, 69), (69, 70)]:
        piece = model(xp.asarray(ids[:, start:stop]), attention_mask=xp.asarray(mask[:, :stop]), past_key_values=cache)
        close(to_numpy(piece.data)[mask[:, start:stop] == 1], full[:, start:stop][mask[:, start:stop] == 1])
        assert len(cache) == stop


def test_a_cache_is_as_precise_as_what_is_added(xp, rng):
    k = rng.standard_normal((1, 2, 3, 4), "f")
    cache = KVCache([(xp.asarray(k.astype("float16")),) * 2])
    keys, _ = cache.append(0, xp.asarray(k), xp.asarray(k))
    assert keys.dtype == np.float32 and np.array_equal(to_numpy(keys)[:, :, 3:], k)
    narrow, _ = cache.append(0, *[xp.asarray(k.astype("float16"))] * 2)
    assert narrow.dtype == np.float32 and np.array_equal(to_numpy(narrow)[:, :, 3:6], k)


def test_a_cache_counts_its_bytes_copies_and_selects_rows(xp, rng):
    model, ids = build("llama", xp), xp.asarray(tokens(rng, 3, 4))
    cache = KVCache()
    model(ids, past_key_values=cache)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 4 * 4 * 8  # k and v, layers, batch, key heads, positions, channels, bytes
    twin = KVCache(cache)
    model(ids, past_key_values=cache)
    assert (len(cache), len(twin)) == (8, 4)
    kept = [to_numpy(k)[[2, 0]] for k, _ in twin]
    twin.select(xp.asarray([2, 0]))
    assert all(np.array_equal(to_numpy(k), row) for (k, _), row in zip(twin, kept))


@dialects
def test_inputs_embeds_equal_input_ids(dialect, xp, rng):
    model, ids = build(dialect, xp), xp.asarray(tokens(rng, 2, 6))
    embeds = model.backbone.embedding(ids)
    assert np.array_equal(to_numpy(model(ids).data), to_numpy(model(inputs_embeds=embeds).data))


@pytest.mark.parametrize("checkpointing", [False, True])
@dialects
def test_gradients_flow_into_embeddings_and_past_key_values(dialect, checkpointing, rng):
    model, ids = build(dialect), tokens(rng, 2, 4)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable(checkpointing)
    arrays = [model.backbone.embedding(ids).data, *[a for pair in pairs(model, tokens(rng, 2, 3)) for a in pair]]
    gradcheck(lambda x, *kv: model(inputs_embeds=x, past_key_values=[kv[:2], kv[2:]]), *arrays)
    assert all(p.grad is None for p in model.parameters())


@dialects
def test_gradients_behind_a_cache_are_those_behind_its_keys_and_values(dialect, rng):
    model, ids = build(dialect), tokens(rng, 2, 4)
    cache, gradients = mp.KVCache(pairs(model, tokens(rng, 2, 3))), []
    for past in (list(cache), cache):
        model.zero_grad()
        model.loss(ids, ids, past_key_values=past).backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(cache) == 7
    for path, g in gradients[0].items():
        np.testing.assert_allclose(gradients[1][path], g, rtol=1e-6, atol=1e-9, err_msg=path)


# ------------------------------------------------------------------------------------------------ dropout and memory


@dialects
def test_checkpointing_changes_no_number_not_even_with_dropout(dialect, xp, rng):
    ids, found = xp.asarray(tokens(rng, 3, 6)), []
    for enabled in (False, True):
        model = build(dialect, xp, dropout=0.2)
        model.gradient_checkpointing_enable(enabled)
        loss = model.loss(ids, ids, rng=Rng(7))
        loss.backward()
        found.append([to_numpy(a) for a in (loss.data, *[p.grad for p in model.parameters()])])
    assert found[0][0] == found[1][0]
    for a, b in zip(*found):
        close(a, b, 1e-12)


@dialects
def test_checkpointing_holds_one_activation_a_block(dialect, rng):
    model = Transformer(config(dialect, num_hidden_layers=8, hidden_size=32, max_position_embeddings=128), seed=0)
    ids, held = tokens(rng, 4, 128), {}
    for enabled in (False, True):
        model.gradient_checkpointing_enable(enabled)
        hidden = model.backbone(ids)  # a first call, so that what is allocated once does not count
        del hidden
        with traced() as memory:
            hidden = model.backbone(ids)
            held[enabled] = memory()[0] / (4 * 128 * 32 * 4)  # in activations [B, T, d]
        del hidden
    assert held[True] < 8 + 6  # the input of each block, the embeddings, the final norm
    assert held[False] > 8 * 10  # norms, queries, keys, values, attention, MLP of each block


@dialects
def test_frozen_weights_hold_no_activations(dialect, rng):
    model, ids = Transformer(config(dialect), seed=0).requires_grad_(False), tokens(rng, 8, 32)
    model(ids)
    with traced() as memory:
        logits = model(ids)
        held, _ = memory()
    assert logits._node is None
    assert held < 1.1 * logits.data.nbytes


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@dialects
def test_a_step_leaves_nothing_behind_without_the_garbage_collector(dialect, checkpointing, backward, rng):
    model, ids = Transformer(config(dialect, dropout=0.1), seed=0), tokens(rng, 32, 32)
    model.gradient_checkpointing_enable(checkpointing)

    def step(seed):
        loss = model.loss(ids, ids, rng=seed)
        if backward:
            loss.backward()
            model.zero_grad()

    step(0)
    gc.collect()
    with traced() as memory:
        gc.disable()
        try:
            step(1)
            before, _ = memory()
            for seed in range(2, 6):
                step(seed)
            growth = memory()[0] - before
        finally:
            gc.enable()
    assert growth < 32 * 32 * 16 * 4  # less than a single activation; Python's own small objects are a sixth of it


@dialects
def test_dropout_masks_belong_to_rows(dialect, xp, rng):
    model, ids = build(dialect, xp, dropout=0.3), tokens(rng, 4, 6)
    whole = to_numpy(model(xp.asarray(ids), rng=Rng(5)).data)
    halves = [to_numpy(model(xp.asarray(ids[i : i + 2]), rng=Rng(5, first_row=i)).data) for i in (0, 2)]
    close(whole, np.concatenate(halves))
    assert np.abs(whole - to_numpy(model(xp.asarray(ids), rng=Rng(6)).data)).max() > 1e-3
    close(model(xp.asarray(ids)).data, build(dialect, xp)(xp.asarray(ids)).data)  # without rng nothing drops


# ------------------------------------------------------------------------------------------------- names and counts

STATE = {
    "gpt2": """transformer.wte.weight 40 16; transformer.wpe.weight 32 16
        transformer.h.0.attn.c_attn.weight 16 48; transformer.h.0.attn.c_attn.bias 48
        transformer.h.0.attn.c_proj.weight 16 16; transformer.h.0.attn.c_proj.bias 16
        transformer.h.0.ln_1.weight 16; transformer.h.0.ln_1.bias 16; transformer.h.0.ln_2.weight 16
        transformer.h.0.ln_2.bias 16; transformer.h.0.mlp.c_fc.weight 16 64; transformer.h.0.mlp.c_fc.bias 64
        transformer.h.0.mlp.c_proj.weight 64 16; transformer.h.0.mlp.c_proj.bias 16
        transformer.ln_f.weight 16; transformer.ln_f.bias 16""",
    "llama": """model.embed_tokens.weight 40 16; model.layers.0.self_attn.q_proj.weight 16 16
        model.layers.0.self_attn.k_proj.weight 8 16; model.layers.0.self_attn.v_proj.weight 8 16
        model.layers.0.self_attn.o_proj.weight 16 16; model.layers.0.mlp.gate_proj.weight 64 16
        model.layers.0.mlp.up_proj.weight 64 16; model.layers.0.mlp.down_proj.weight 16 64
        model.layers.0.input_layernorm.weight 16; model.layers.0.post_attention_layernorm.weight 16
        model.norm.weight 16""",
}


@dialects
def test_state_dict_has_the_names_and_orientation_of_hugging_face(dialect):
    rows = [row.split() for row in STATE[dialect].replace("\n", ";").split(";")]
    expected = {name: tuple(map(int, shape)) for name, *shape in rows}
    fields = dict(num_hidden_layers=1, intermediate_size=64)
    tied = Transformer(config(dialect, **fields), seed=None)
    assert {path: a.shape for path, a in tied.state_dict().items()} == expected
    untied = Transformer(config(dialect, tie_word_embeddings=False, **fields), seed=None)
    assert {path: a.shape for path, a in untied.state_dict().items()} == expected | {"lm_head.weight": (40, 16)}


@dialects
def test_a_tied_weight_is_one_parameter_with_the_gradient_of_both_uses(dialect, rng):
    model, ids = build(dialect), tokens(rng, 2, 5)
    name = "transformer.wte.weight" if dialect == "gpt2" else "model.embed_tokens.weight"
    assert [p for p, _ in model.named_parameters()].count("lm_head.weight") == 0
    assert [p for p, q in model.all_named_parameters() if q is model.lm_head.weight] == [name, "lm_head.weight"]
    model.loss(ids, ids).backward()
    untied = double(Transformer(config(dialect, tie_word_embeddings=False), seed=None))
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight.data})
    untied.loss(ids, ids).backward()
    close(model.lm_head.weight.grad, untied.backbone.embedding.weight.grad + untied.lm_head.weight.grad)


def counted(dialect, **fields):
    """The number of parameters, which are not allocated."""
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads".split()
    fields = dict(zip(names, fields.pop("shape"))) | fields
    with traced() as memory:
        n = sum(p.size for p in Transformer(TransformerConfig(model_type=dialect, **fields), seed=None).parameters())
        assert memory()[1] < 8e6
    return n


@pytest.mark.parametrize(
    "V, d, L, P", [(40, 16, 2, 32), (97, 24, 3, 10), (50257, 768, 12, 1024), (50257, 12288, 96, 2048)]
)
def test_gpt2_parameters_by_formula_and_by_counting(V, d, L, P):
    n = counted("gpt2", shape=(V, d, L, 2), max_position_embeddings=P)
    assert n == V * d + P * d + L * (12 * d * d + 13 * d) + 2 * d
    if d == 768:
        assert n == 124_439_808  # the published GPT-2 "small"
    if d == 12288:
        assert round(n / 1e9) == 175  # GPT-3


@pytest.mark.parametrize(
    "V, d, f, L, H, K, D, tied",
    [(40, 16, 64, 2, 4, 2, 4, True), (97, 24, 40, 3, 3, 1, 6, False), (49152, 576, 1536, 30, 9, 3, 64, True)],
)
def test_llama_parameters_by_formula_and_by_counting(V, d, f, L, H, K, D, tied):
    widths = dict(intermediate_size=f, num_key_value_heads=K, head_dim=D)
    n = counted("llama", shape=(V, d, L, H), **widths, tie_word_embeddings=tied)
    assert n == V * d * (1 if tied else 2) + L * (2 * d * H * D + 2 * d * K * D + 3 * d * f + 2 * d) + d
    if d == 576:
        assert n == 134_515_008  # the published SmolLM2-135M


def test_same_seed_same_bytes_and_initial_scale():
    for dialect in DIALECTS:
        c = config(dialect, hidden_size=64, initializer_range=0.02, num_hidden_layers=8)
        a, b, other = Transformer(c, seed=3), Transformer(c, seed=3), Transformer(c, seed=4)
        for (path, p), q, r in zip(a.named_parameters(), b.parameters(), other.parameters()):
            assert p.data.tobytes() == q.data.tobytes() and p.dtype == np.float32
            if p.ndim == 1:
                assert (p.data == (1 if path.endswith("weight") else 0)).all(), path
                continue
            assert p.data.tobytes() != r.data.tobytes()
            residual = dialect == "gpt2" and path.endswith("c_proj.weight")
            assert p.data.std() == pytest.approx(0.02 / (4 if residual else 1), rel=0.1), path  # sqrt(2 * 8 layers) = 4


@dialects
def test_a_fresh_model_is_as_uncertain_as_a_uniform_guess(dialect, rng):
    model, ids = Transformer(config(dialect, initializer_range=0.02), seed=0), tokens(rng, 4, 16)
    assert model.loss(ids, ids).item() == pytest.approx(np.log(40), abs=0.05)


@dialects
def test_it_learns_a_sequence_by_heart(dialect, rng):
    model, ids = Transformer(config(dialect, initializer_range=0.1), seed=0), tokens(rng, 2, 8)
    sgd_steps(model, lambda: model.loss(ids, ids), steps=150, lr=0.3)
    assert model.loss(ids, ids).item() < 0.05


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="bert"), "model_type must be one of gpt2, llama, mistral, qwen2, got 'bert'"),
        (dict(vocab_size=0), "vocab_size must be an integer of at least 1, got 0"),
        (dict(num_hidden_layers=2.5), "num_hidden_layers must be an integer of at least 1, got 2.5"),
        (dict(hidden_size=10), "hidden_size 10 is not a multiple of num_attention_heads 4"),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (dict(hidden_size=12), "even head_dim, not 3"),
        (dict(num_key_value_heads=-2), "num_key_value_heads must be an integer of at least 0, got -2"),
        (dict(head_dim=-4), "head_dim must be an integer of at least 0, got -4"),
        (dict(intermediate_size=1.5), "intermediate_size must be an integer of at least 0, got 1.5"),
        (dict(model_type="gpt2", num_key_value_heads=2), "as many key heads as query heads"),
        (dict(dropout=1.0), "dropout must be a number of at least 0 and below 1, got 1.0"),
        (dict(model_type="qwen2", mlp_bias=True), "options of llama; qwen2 has none"),
        (dict(model_type="gpt2", attention_bias=True), "options of llama; gpt2 always has biases"),
    ],
)
def test_a_configuration_that_does_not_fit_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SHAPE | fields))


@dialects
def test_input_that_does_not_fit_says_why(dialect, xp, rng):
    """In host memory, wherever the model is."""
    model, ids = build(dialect, xp), tokens(rng, 2, 5)
    embeds = model.backbone.embedding(xp.asarray(ids))
    ones = np.ones((2, 4), "int64")
    long, far, unknown = tokens(rng, 1, 33), np.array([[0, 1, 2, 3, 32]]), np.array([[3, 40]])
    for error, message, arguments in [
        (ValueError, "either input_ids or inputs_embeds", {}),
        (ValueError, "either input_ids or inputs_embeds", dict(input_ids=ids, inputs_embeds=embeds)),
        (ValueError, r"must have the shape \[batch, seq\], not \(5,\)", dict(input_ids=ids[0])),
        (ValueError, r"\[batch, seq, 16\], not \(2, 5, 8\)", dict(inputs_embeds=embeds[:, :, :8])),
        (ValueError, r"attention_mask must have the shape \(2, 5\)", dict(input_ids=ids, attention_mask=ones)),
        (ValueError, r"position_ids must have the shape \(2, 5\)", dict(input_ids=ids, position_ids=ones)),
        (ValueError, "must not be negative; the lowest is -1", dict(input_ids=ids, position_ids=far - 1)),
        (ValueError, "reaches position 32, but this model has 32 positions", dict(input_ids=ids, position_ids=far)),
        (ValueError, "reaches position 32, .* shorten it to at most 32 tokens", dict(input_ids=long)),
        (IndexError, r"token id 40 is out of range; ids must lie in 0\.\.39", dict(input_ids=unknown)),
        (IndexError, r"token id -37 is out of range", dict(input_ids=unknown - 40)),
        (TypeError, "ids must be integers, not float64", dict(input_ids=ids.astype("float64"))),
        (ValueError, r"\(k, v\) of each of the 2 layers, not of 0", dict(input_ids=ids, past_key_values=[])),
        (ValueError, "of a batch of 1 rows, and this one has 2", dict(input_ids=ids, past_key_values=pairs(model, ids[:1]))),
    ]:
        with pytest.raises(error, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match=r"labels must have the shape of the input, \(2, 5\), not \(2, 4\)"):
        model.loss(ids, ones)
    with pytest.raises(IndexError, match="target 40 is out of range"):
        model.loss(unknown * 0, unknown)


@dialects
def test_a_model_on_a_device_takes_ids_masks_and_labels_from_host_memory(dialect, xp, rng):
    """The same logits, losses and gradients as from arrays of the device."""
    model, ids = build(dialect, xp), tokens(rng, 2, 7)
    labels, mask = np.where(rng.random(ids.shape) < 0.4, -100, ids), np.ones_like(ids)
    mask[1, :2] = 0
    for given in ({}, {"attention_mask": np.ones_like(ids)}, {"attention_mask": mask}):
        there = {name: xp.asarray(array) for name, array in given.items()}
        close(model(ids, **given).data, model(xp.asarray(ids), **there).data)
        results = []
        for loss in (model.loss(ids, labels, **given), model.loss(xp.asarray(ids), xp.asarray(labels), **there)):
            loss.backward()
            results.append([loss.data, *[p.grad for p in model.parameters()]])
            model.zero_grad()
        for a, b in zip(*results, strict=True):
            close(a, b)
    for module in (mp.nn.Linear(16, 40, seed=1), mp.nn.Linear(16, 40, bias=False, seed=1)):  # another head, and no plain one
        model.lm_head = module.to(xp)
        close(model.loss(ids, labels).data, model.loss(xp.asarray(ids), xp.asarray(labels)).data)
    assert np.isnan(model.loss(ids, np.full_like(ids, -100)).item())


def test_a_layer_in_the_place_of_the_head_is_used_by_the_loss(rng):
    """Surgery on the head must not be bypassed by the fused loss."""
    model, ids = build("llama"), tokens(rng, 2, 5)

    class Scaled(mp.nn.Module):
        def __init__(self, inner):
            self.inner = inner

        def forward(self, x, rng=None):
            return self.inner(x) * 2.0

    doubled = model.copy(share=True)
    doubled.replace("lm_head", Scaled(doubled.lm_head))
    logits = model(ids) * 2.0
    close(doubled.loss(ids, ids).data, F.cross_entropy(logits[:, :-1], ids[:, 1:]).data)


@dialects
def test_a_mask_that_is_added_to_scores_is_refused_where_it_would_be_read_the_other_way_round(dialect, xp, rng):
    model, ids = build(dialect, xp), xp.asarray(tokens(rng, 2, 5))
    added = np.where(np.tri(5, dtype=bool), 0.0, -np.inf).astype(np.float32)
    nan = np.ones((2, 5), np.float32)
    nan[0, 0] = np.nan
    hidden = np.tri(2, 5, -1, np.float32)  # its first row has zeros only
    for mask in (np.broadcast_to(added, (2, 1, 5, 5)).copy(), added[[0, 1]], nan, np.ones((2, 1, 5, 5), np.float32),
                 np.zeros((2, 5), np.float32), hidden):  # fmt: skip
        with pytest.raises(ValueError, match=r"attention_mask is 1 \(or true\) where .* give mask == 0"):
            model(ids, attention_mask=xp.asarray(mask))
    for mask in (np.full((2, 5), 2), -hidden.astype(int), np.full((2, 1, 5, 5), -1)):  # in host memory, where they are read
        with pytest.raises(ValueError, match=r"attention_mask is 1 \(or true\) where"):
            model(ids, attention_mask=mask)
    for mask in (np.full((2, 5), "1"), np.full((2, 5), None)):
        with pytest.raises(TypeError, match="attention_mask must hold true and false, or 1 and 0, not "):
            model(ids, attention_mask=mask)
    with pytest.raises(TypeError, match="position_ids must be integers, not float32"):
        model(ids, position_ids=xp.asarray(np.ones((2, 5), np.float32)))


@dialects
def test_labels_are_signed_integers_in_an_array(dialect, rng):
    model, ids = build(dialect), tokens(rng, 2, 5)
    for labels, what in ((ids.astype(np.uint8), "uint8"), (ids.tolist(), "list"), (ids.astype(float), "float64"), (None, "NoneType")):
        prompted = mp.get_peft_model(model, mp.PromptTuningConfig(num_virtual_tokens=2))
        for each in (model, prompted):
            with pytest.raises(TypeError, match=f"labels must be an array of signed integers, .*, not {what}"):
                each.loss(ids, labels)
    with pytest.raises(TypeError, match="labels must be an array, not a list"):
        SequenceClassifier(model, 2).loss(ids, [0, 1])
