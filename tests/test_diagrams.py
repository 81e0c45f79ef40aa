"""The lessons' drawings: what they say is so, and a phone shows it."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import dataclasses
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import count_parameters
from minipeft.accounting.ppo import ppo_ledger
from minipeft.autograd.autocast import rounded
from minipeft.book.pictures import describe
from minipeft.diagrams.directions import dora_row
from minipeft.diagrams.formats import FORMATS, reach
from minipeft.diagrams.graphs import gradients
from minipeft.diagrams.losses import candidates
from minipeft.diagrams.merging import ties_steps
from minipeft.diagrams.stages import model_states

LLAMA = mp.TransformerConfig.llama(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
GPT2 = mp.TransformerConfig.gpt2(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
LORA = mp.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
METHODS = {
    "lora": LORA, "adapter": mp.BottleneckConfig(placement="houlsby", bottleneck_size=7),
    "prompt": mp.PromptTuningConfig(num_virtual_tokens=5), "prefix": mp.PrefixTuningConfig(num_virtual_tokens=5),
    "4bit": "4bit", "none": None,
}  # fmt: skip
SEVEN_B = mp.TransformerConfig.llama(
    vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, tie_word_embeddings=False,
)  # fmt: skip
FIGURES = {
    **{f"block {name}": lambda method=method: diagrams.block(LLAMA, method) for name, method in METHODS.items()},
    "block gpt2": lambda: diagrams.block(GPT2, mp.LoraConfig(r=3, target_modules=["c_attn"])),
    "block 7B": lambda: diagrams.block(SEVEN_B, mp.LoraConfig(r=16, target_modules="all-linear")),
    "square": lambda: diagrams.low_rank(4096, 4096, 8), "wide": lambda: diagrams.low_rank(128, 384, 16),
    "tall": lambda: diagrams.low_rank(384, 128, 64), "graph": diagrams.scalar_graph, "masks": diagrams.attention_mask,
    "values": lambda: diagrams.scalar_graph(backward=False), "ranking": lambda: diagrams.ranking(4),
    "update": diagrams.ppo_update, "watched": diagrams.watched, "two ways": diagrams.two_ways,
    "prediction": lambda: diagrams.prediction(*mp.load_base(), "And it came to pass in those", " days"),
    "surprise": lambda: diagrams.prediction(*mp.load_base(), "It is", " word"),
    "ties": lambda: diagrams.ties((4, 1, -5, 0.5), (-1, 2, 3, 0.5)),
    "stages": lambda: diagrams.rlhf_stages(LLAMA), "stages 7B": lambda: diagrams.rlhf_stages(SEVEN_B),
    "formats": diagrams.number_formats, "dora": diagrams.dora,
}  # fmt: skip


def said(figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_phone_shows_it(draw):
    """It is 4 inches wide, on white. Its letters have 8 points or more, stay inside, and do not overlap. Its text is short."""
    figure = draw()
    assert describe(figure) == f'Figure "{figure.get_suptitle()}": {figure.alt}' and 10 < len(figure.alt.split()) < 70
    assert figure.get_figwidth() == 4 and figure.get_facecolor() == (1, 1, 1, 1) and figure.get_suptitle()
    texts = [t for t in (*figure.axes[0].texts, figure._suptitle) if t.get_text()]
    assert min(t.get_fontsize() for t in texts) >= 8
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    for text, place in boxes:
        assert figure.bbox.x0 <= place.x0 and place.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= place.y0 and place.y1 <= figure.bbox.y1, text
    for (a, place), (b, other) in itertools.combinations(boxes, 2):
        assert not place.overlaps(other), (a, b)


def sees(model, ids, **given):
    """[queries, keys]: does the query's row of logits depend on the key's token?"""
    with mp.no_grad():
        before = model(ids, **given).numpy()[0]
        rows = []
        for key in range(ids.shape[1]):
            other = ids.copy()
            other[0, key] += 1
            rows.append(np.abs(model(other, **given).numpy()[0] - before).max(axis=-1) > 0)
    return np.array(rows).T


def test_masks_are_the_model_s():
    """Who sees whom in one block: as drawn. A packed row takes its mask from the batch, a prefix comes as a cache."""
    masks = diagrams.masks()
    one = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    model, ids = mp.Transformer(mp.TransformerConfig.llama(**one), seed=0), np.arange(6)[None]
    assert np.array_equal(sees(model, ids), masks["causal"])

    real = slice(2, None)
    padded = sees(model, ids, attention_mask=np.array([[0, 0, 1, 1, 1, 1]]))
    assert np.array_equal(padded[real], masks["padded"][real]) and not masks["padded"][:2].any()
    batch = mp.train.batches.collate_packed([(np.arange(3), np.arange(3))] * 2, capacity=6).arguments
    packed = {name: batch[name] for name in ("attention_mask", "position_ids")}
    assert np.array_equal(sees(model, batch["input_ids"], **packed), masks["packed"])

    cache = [tuple(np.random.default_rng(0).standard_normal((2, 1, 2, 2, 8), np.float32))]
    assert np.array_equal(sees(model, ids, past_key_values=cache), masks["prefix"][:, 2:])
    with mp.no_grad():
        before = model(ids, past_key_values=cache).numpy()[0]
        for key in range(2):
            other = [tuple(a.copy() for a in pair) for pair in cache]
            other[0][0][:, :, key] += 1
            changed = np.abs(model(ids, past_key_values=other).numpy()[0] - before).max(axis=-1) > 0
            assert np.array_equal(changed, masks["prefix"][:, key])
    alt = diagrams.attention_mask().alt
    for words in ("causal: a, ab, abc,", "prefix: PPa, PPab,", "padded: nobody, nobody, a, ab, abc, abcd;", "packed: a, ab, abc, A, AB, ABC."):
        assert words in alt


def test_the_graph_s_gradients_are_differences():
    x, w, t, h = 2.0, 3.0, 4.5, 1e-6
    found = gradients(x, w, t)

    def loss(x=x, w=w, t=t):
        return (w * x - t) ** 2

    for name, value in (("x", x), ("w", w), ("t", t)):
        difference = (loss(**{name: value + h}) - loss(**{name: value - h})) / (2 * h)
        assert math.isclose(found[name][1], difference, rel_tol=1e-8)
    assert found["p"] == (6, 3) and found["e"] == (1.5, 3) and found["L"] == (2.25, 1)
    text = said(diagrams.scalar_graph(x, w, t))
    assert "∂L/∂w = 6" in text and "1.5 + 1.5 = 3" in text and "∂L/∂w = 6" in diagrams.scalar_graph(x, w, t).alt
    forward = diagrams.scalar_graph(x, w, t, backward=False)
    assert "e = p - t\n1.5" in said(forward) and "∂" not in said(forward) + forward.alt, "values alone"


def test_a_prediction_s_loss_is_the_model_s():
    base, tokenizer = mp.load_base()
    text, (days,), (word,) = tokenizer.encode("And it came to pass in those"), tokenizer.encode(" days"), tokenizer.encode(" word")
    losses = {}
    for target in (days, word):
        ids = np.array([[*text, target]])
        labels = np.where(np.arange(len(text) + 1) == len(text), ids, -100)
        losses[target] = base.loss(ids, labels).item()
        shown = {i: -math.log(p) for i, _, p in candidates(base, text, target, 3)}
        assert len(shown) == 3 and math.isclose(shown[target], losses[target], rel_tol=1e-4)
    figure = diagrams.prediction(base, tokenizer, "And it came to pass in those", " days")
    text = said(figure)
    assert f"{losses[days]:.3f}" in text and "2,045" in text and "days" in text
    assert f"came is days: the loss is -ln {math.exp(-losses[days]):.3g} = {losses[days]:.3f}" in figure.alt


def test_a_block_names_shapes_and_counts():
    plain = said(diagrams.block(LLAMA))
    shapes = "[256, 64]", "[64, 64]", "[32, 64]", "[96, 64]", "[64, 96]", "[T, 256]"
    for words in (*shapes, "4 heads of 16; k, v: 2 heads", "2 such blocks"):
        assert words in plain
    total = count_parameters(LLAMA).total
    lora = said(diagrams.block(LLAMA, LORA))
    assert lora.count("+ BA, r 3") == 2 and f"{count_parameters(LLAMA, LORA).trainable:,} trained, {total:,} frozen" in lora
    for name, words in (("adapter", "adapter 64 → 7 → 64"), ("prompt", "[5 + T, 64]"), ("prefix", "Pk [5, 32]")):
        text = said(diagrams.block(LLAMA, METHODS[name]))
        assert words in text and f"{count_parameters(LLAMA, METHODS[name]).trainable:,} trained" in text
    quantized = mp.quant.quantize_model(mp.Transformer(LLAMA, seed=0))
    packed = sum(2 * math.prod(m.weight.shape) for _, m in quantized.named_modules() if type(m).__name__ == "Linear4bit")
    assert f"{packed:,} of {total:,} in 4 bits" in said(diagrams.block(LLAMA, "4bit"))


def test_a_block_says_what_the_method_adds_where():
    everywhere = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."
    for name, words in {
        "lora": "each of 2 blocks has BA, r 3 at q_proj, down_proj. 1,728 trained", "4bit": f"4 bits at {everywhere}",
        "adapter": "adapter 64 → 7 → 64 at o_proj, down_proj.", "prefix": "Pk [5, 32] at k_proj; Pv [5, 32] at v_proj.",
        "prompt": "5 trained virtual tokens [5, 64]", "none": "v_proj [32, 64], o_proj [64, 64])",
    }.items():  # fmt: skip
        assert words in diagrams.block(LLAMA, METHODS[name]).alt


def test_strips_are_lora_s():
    layer = mp.nn.Sequential(mp.nn.Linear(384, 128, bias=False))
    trained, total = mp.get_peft_model(layer, mp.LoraConfig(r=16, target_modules=["0"])).get_nb_trainable_parameters()
    text = said(diagrams.low_rank(128, 384, 16))
    assert f"{trained:,} numbers" in text and f"{total - trained:,} numbers" in text and "B: 128 x 16   A: 16 x 384" in text


def test_bytes_of_the_stages_are_the_ledger_s():
    """Of the last stage: all lines of the PPO ledger that are no activations, but for the reward model's head."""
    held = ppo_ledger(LLAMA).held
    states = sum(n for line, n in held.items() if line not in ("activations", "logits", "KV cache", "working memory"))
    size = model_states(LLAMA)
    alt = diagrams.rlhf_stages(LLAMA).alt
    assert "answers: policy trained, value a trained head on the policy, reference frozen, reward frozen; 1.9 MB." in alt
    head = held["reward model"] - size["frozen"]
    assert states == size["trained"] + size["head"] + 2 * size["frozen"] + head and 0 < head < 2 * size["head"]


@pytest.mark.parametrize(
    ("config", "method", "words"),
    [
        (LLAMA, mp.IA3Config(), "block draws a configuration of LORA"),
        (LLAMA, mp.BottleneckConfig(placement="parallel"), "parallel"),
        (LLAMA, mp.LoraConfig(target_modules=["q_proj", "embed_tokens"]), "every block alike"),
        (LLAMA, mp.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]), "every block alike"),
        (LLAMA, "8bit", "not '8bit'"),
        (dataclasses.replace(LLAMA, model_type="qwen2"), None, "qwen2"),
    ],
    ids=["method", "parallel", "embedding", "one block", "bits", "family"],
)
def test_what_cannot_be_drawn_is_refused(config, method, words):
    with pytest.raises(ValueError, match=words):
        diagrams.block(config, method)


def test_steps_of_ties_are_those_of_the_paper():
    """Algorithm 1 on numbers that one can follow by hand."""
    steps = ties_steps((4, 1, -5, 0.5), (-1, 2, 3, 0.5), 0.5)
    assert steps["trim 1"].tolist() == [4, 0, -5, 0] and steps["trim 2"].tolist() == [0, 2, 3, 0]
    assert steps["sign"].tolist() == [1, 1, -1, 1] and steps["mean"].tolist() == [4, 2, -5, 0]
    assert "2 · elect: +, +, -, +; 3 · mean: 4, 2, -5, 0" in diagrams.ties((4, 1, -5, 0.5), (-1, 2, 3, 0.5)).alt


def test_a_row_in_dora_is_the_library_s():
    """Of a layer with one output: merged, it has LoRA's row and DoRA's."""
    row, update = (12, 5), (-7, 3)
    drawn = dict(zip((False, True), dora_row(row, update)))
    for use_dora, wanted in drawn.items():
        layer = mp.nn.Sequential(mp.nn.Linear(2, 1, bias=False))
        layer.state_dict()["0.weight"][:] = row
        model = mp.get_peft_model(layer, mp.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], use_dora=use_dora))
        part = model.layers["0"].adapters["default"]
        part.lora_A.data[:], part.lora_B.data[:] = update, 1
        (merged,) = model.merge_and_unload().parameters()
        assert np.allclose(merged.numpy()[0], wanted, rtol=1e-6)
    assert math.isclose(np.linalg.norm(drawn[True]), 13) and math.isclose(np.linalg.norm(drawn[False]), 89**0.5)
    assert f"the sum, {89**0.5 / 13:.2f} m long" in diagrams.dora(row, update).alt


def test_formats_reach_as_far_as_their_numbers():
    alt = diagrams.number_formats().alt
    for dtype, bits in FORMATS.items():
        largest, step = reach(*bits)
        if dtype == "bfloat16":
            kept, lost = np.float32([largest, 1 + step]), np.float32([1 + step / 2])
            assert np.array_equal(rounded(kept, dtype), kept) and rounded(lost, dtype) == 1
            assert np.isinf(rounded(np.float32([largest * (1 + step / 2)]), dtype))
        else:
            assert (largest, step) == (np.finfo(dtype).max, np.finfo(dtype).eps)
        assert f"{dtype}: {bits[0]} exponent bits, {bits[1]} fraction bits; up to " in alt
    assert "up to 65,504;" in alt
