"""Looking inside: what modules give and its gradients, attentions, and the gradients of each layer."""

import gc
import weakref

import numpy as np
import pytest
from models import build, dialects, tokens

import minipeft as mp
from minipeft.backend import to_numpy
from minipeft.nn import Linear, Module, Sequential, gradient_norms


def loss_of(model, ids, **arguments):
    return model.loss(ids, ids, **arguments)


def blocks(dialect):
    return "model.layers" if dialect == "llama" else "transformer.h"


@dialects
def test_activations_and_their_gradients(dialect, rng, xp):
    model, ids = build(dialect, xp), xp.asarray(tokens(rng, 2, 5))
    before = to_numpy(loss_of(model, ids).data)
    with model.watch("*.mlp") as seen:
        loss = loss_of(model, ids)
        loss.backward()
    assert list(seen) == [f"{blocks(dialect)}.{i}.mlp" for i in range(2)]
    assert np.array_equal(to_numpy(loss.data), before)
    path, epsilon = f"{blocks(dialect)}.1.mlp", 1e-6
    given, gradient = seen[path].data, to_numpy(seen[path].grad)
    assert given.shape == (2, 5, 16) and gradient.shape == (2, 5, 16)

    class Shifted(Module):  # what the gradient says a small change does
        def forward(self, x, rng=None):
            return mp.Tensor(given + xp.asarray(epsilon * direction))

    direction = rng.standard_normal((2, 5, 16))
    model.replace(path, Shifted())
    assert (float(loss_of(model, ids).item()) - float(before)) / epsilon == pytest.approx(
        (gradient * direction).sum(), rel=1e-4
    )


def test_watching_leaves_nothing_behind(rng):
    model, ids = build("llama"), tokens(rng, 1, 4)
    classes = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), model.watch("*"):
        assert type(model.lm_head) is not Linear and isinstance(model.lm_head, Linear)
        1 / 0  # noqa: B018
    assert {path: type(module) for path, module in model.named_modules()} == classes
    with model.watch("*.mlp") as seen:
        twin = model.copy()
        model(ids)
    kept = weakref.ref(seen["model.layers.0.mlp"])
    first = kept().data
    twin(ids + 1)
    model(ids + 1)  # not watched any more, and a copy never was
    assert seen["model.layers.0.mlp"].data is first
    gc.disable()
    try:
        del seen
        assert kept() is None  # by reference counting alone
    finally:
        gc.enable()


def test_a_copy_made_inside_is_of_the_plain_classes(rng):
    model = build("llama")
    classes = {path: type(m) for path, m in model.named_modules()}
    with model.watch(), model.watch("*mlp"):
        copy = model.copy()
    assert {path: type(m) for path, m in copy.named_modules()} == classes
    copy.resize_token_embeddings(model.config.vocab_size + 2)


def test_the_gradient_comes_after_the_with_and_only_to_who_asks(rng):
    model, ids = build("llama"), tokens(rng, 2, 4)
    with model.watch("model.layers.0") as seen:
        loss = loss_of(model, ids)
    loss.backward()
    expected = seen["model.layers.0"].grad
    assert expected.any()
    with model.watch("model.layers.?") as seen:  # a term of the loss may be made of what was seen
        loss = loss_of(model, ids) + (seen["model.layers.0"] * seen["model.layers.0"]).sum()
        loss.backward()
    np.testing.assert_allclose(seen["model.layers.0"].grad, expected + 2 * seen["model.layers.0"].data, rtol=1e-9)
    with mp.no_grad(), model.watch("*.mlp") as seen:
        model(ids)
    assert not seen["model.layers.1.mlp"].requires_grad


def test_watching_twice_counts_a_gradient_once(rng):
    model, ids = build("llama"), tokens(rng, 1, 4)
    with model.watch("*.mlp") as once, model.watch("*") as again:
        loss_of(model, ids).backward()
    with model.watch("*.mlp") as alone:
        loss_of(model, ids).backward()
    assert again["model.layers.0.mlp"] is once["model.layers.0.mlp"]
    np.testing.assert_allclose(once["model.layers.0.mlp"].grad, alone["model.layers.0.mlp"].grad, rtol=1e-12)
    assert "model.layers.0.self_attn.q_proj" in again and "model.layers" not in again


def test_watching_through_adapters_and_in_generation(rng):
    adapted, ids = (
        mp.get_peft_model(build("llama"), mp.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])),
        tokens(rng, 2, 4),
    )
    with adapted.watch("*down_proj*") as seen:
        loss_of(adapted, ids).backward()
    one = "base_model.model.layers.0.mlp.down_proj"
    assert {one, f"{one}.base_layer", f"{one}.default"} <= set(seen)
    assert seen[one].grad.any() and seen[f"{one}.default"] is seen[one]
    with adapted.watch("*.mlp") as seen:
        adapted.generate(ids, max_new_tokens=3)
    assert seen["base_model.model.layers.0.mlp"].shape == (2, 1, 16)  # the last call


def test_a_checkpointed_block_is_seen_in_the_backward_pass(rng):
    model, ids = build("llama"), tokens(rng, 1, 4)
    with model.watch("*.mlp") as plain:
        loss_of(model, ids).backward()
    model.gradient_checkpointing_enable()
    with model.watch("*.mlp") as seen:
        loss_of(model, ids).backward()
    for path, x in plain.items():
        np.testing.assert_allclose(seen[path].grad, x.grad, rtol=1e-9, atol=1e-15)


def test_a_pattern_that_matches_nothing_names_its_neighbors():
    with pytest.raises(
        KeyError, match=r"no module's path matches 'model.layers.0.mpl'; nearest: .*model\.layers\.0\.mlp"
    ):
        build("llama").watch("model.layers.0.mpl").__enter__()
    for pattern, nearest in (("*.q_prj", "q_proj"), ("*.self_atn", "self_attn"), ("*.dwn_proj*", "down_proj")):
        with pytest.raises(KeyError, match=rf"nearest: model\.layers\.\d\.\S*{nearest}, "):
            build("llama").watch(pattern).__enter__()
    with pytest.raises(TypeError, match=r"one pattern, .* not by \['\*\.mlp'\]"):
        build("llama").watch(["*.mlp"]).__enter__()


# -------------------------------------------------------------------------------------------------------- attentions


def test_the_loss_says_how_attentions_are_asked_for(rng):
    with pytest.raises(TypeError, match=r"attentions=\[\]"):
        loss_of(build("llama"), tokens(rng, 1, 4), output_attentions=True)


@dialects
def test_attentions_are_what_the_logits_are_made_of(dialect, rng, xp):
    model, ids = build(dialect, xp), xp.asarray(tokens(rng, 2, 5))
    mask = np.ones((2, 5), int)
    mask[1, :2] = 0
    logits, attentions = model(ids, xp.asarray(mask), output_attentions=True)
    real = mask.astype(bool)
    np.testing.assert_allclose(
        to_numpy(logits.data)[real], to_numpy(model(ids, xp.asarray(mask)).data)[real], atol=1e-10
    )
    assert len(attentions) == 2
    for P in attentions:
        P = to_numpy(P.data)
        assert P.shape == (2, 4, 5, 5) and not np.triu(P, 1).any() and not P[1, :, :, :2].any()
        np.testing.assert_allclose(P.sum(axis=-1), np.broadcast_to(real[:, None], (2, 4, 5)), atol=1e-12)


@dialects
@pytest.mark.parametrize("checkpointing", [False, True])
def test_attentions_of_a_loss_have_gradients(dialect, checkpointing, rng):
    model, ids, kept = build(dialect), tokens(rng, 2, 5), []
    loss_of(model, ids).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(checkpointing)
    for _ in range(2):  # the list is filled anew
        model.zero_grad()
        loss_of(model, ids, attentions=kept).backward()
    assert len(kept) == 2 and all(P.grad.shape == (2, 4, 5, 5) and P.grad.any() for P in kept)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, expected[name], rtol=1e-7, atol=1e-10, err_msg=name)


def test_attentions_reach_the_past_and_virtual_tokens(rng):
    model, ids = build("llama"), tokens(rng, 2, 5)
    cache = mp.KVCache()
    model(ids[:, :3], past_key_values=cache)
    logits, attentions = model(ids[:, 3:], past_key_values=cache, output_attentions=True)
    whole, all_attentions = model(ids, output_attentions=True)
    np.testing.assert_allclose(logits.data, whole.data[:, 3:], atol=1e-10)
    np.testing.assert_allclose(attentions[1].data, all_attentions[1].data[:, :, 3:], atol=1e-10)
    lora = mp.get_peft_model(model, mp.LoraConfig())
    assert np.array_equal(lora(ids, output_attentions=True)[1][0].data, all_attentions[0].data)
    for config, T in (
        (mp.PromptTuningConfig(num_virtual_tokens=3), 8),
        (mp.PrefixTuningConfig(num_virtual_tokens=3), 5),
    ):
        prompted = mp.get_peft_model(model, config)
        logits, attentions = prompted(ids, output_attentions=True)
        assert logits.shape == (2, 5, 40) and attentions[0].shape == (2, 4, T, 8)
        np.testing.assert_allclose(logits.data, prompted(ids).data, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ the gradients


def test_gradient_norms_of_layers(rng, xp):
    model = build("llama", xp)
    assert gradient_norms(model) == {}
    with pytest.raises(
        KeyError, match=r"no module's path matches 'model.layers.0.mpl'; nearest: .*model\.layers\.0\.mlp"
    ):
        gradient_norms(model, "model.layers.0.mpl")
    loss_of(model, xp.asarray(tokens(rng, 2, 5))).backward()
    norms = gradient_norms(model)
    assert norms[""] == pytest.approx(mp.train.clip_grad_norm(model.parameters(), np.inf), rel=1e-12)
    assert list(gradient_norms(model, "model.layers.?")) == ["model.layers.0", "model.layers.1"]
    q = to_numpy(model.model.layers[1].self_attn.q_proj.weight.grad)
    assert norms["model.layers.1.self_attn.q_proj"] == pytest.approx(np.linalg.norm(q))
    below = [norm for path, norm in norms.items() if path.startswith("model.layers.1.") and path.count(".") == 3]
    inputs = [
        norms[f"model.layers.1.{name}"] for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    ]
    assert len(below) == 4 and norms["model.layers.1"] == pytest.approx(np.linalg.norm(inputs))


def test_retain_grad_of_a_tensor_in_the_middle(rng):
    x = mp.Tensor(rng.standard_normal(3), requires_grad=True)
    y = x * 2
    y.retain_grad()
    y.retain_grad()
    (y * y).sum().backward()
    np.testing.assert_allclose(y.grad, 2 * y.data)
    np.testing.assert_allclose(x.grad, 8 * x.data)
    y.grad[:] = 0  # its own memory
    assert x.grad.any()
    x.retain_grad()  # a leaf: nothing to do
    assert Sequential()(x) is x
