# %% [markdown]
# # Lesson 8 · Instruction tuning: from continuing text to doing what is asked
#
# A language model continues a text. Ask the shipped base "Define the word." and it goes on as a novel might: it never
# learned that a question wants an answer, and an end. Teaching it that is the first of three stages that made GPT-3
# into InstructGPT (Ouyang et al. 2022, arXiv:2203.02155): *supervised fine-tuning*, SFT, on pairs of an instruction
# and a good answer. The later stages, a reward model and reinforcement learning from human feedback (RLHF, Lessons 9
# and 10), learn from which of two answers people prefer. InstructGPT's validation loss rose after the first of 16
# epochs, but people preferred the later answers: the loss is not the aim.
#
# The loss is Lesson 3's. New are a template, a mask, rows that several records share, and above all *many tasks in
# many words*, to teach following instructions in general. Three things can be new to a tuned model: the input, the
# words that ask, and the task.
#
# You need Lessons 0 (seeds, intervals) and 3. Reading takes about 25 minutes (200 words or 25 lines of code a minute,
# up to the quiz). Run it with `python lessons/08_instruction_tuning.py` (a minute on two cores), or open it as a
# notebook. It trains one seed, and reads thirty runs, six conditions under five seeds each, from
# `lessons/results/08_instruction_tuning.jsonl`. With `--full` it first computes those missing there.
#
# Environment: `MINIPEFT_REDUCED=1` runs fewer steps; `MINIPEFT_LESSONS_OUT` is where the pictures go (`lessons/out`).

# %%
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # a script only saves its picture; a notebook has set its own
import numpy as np

sys.path.append("lessons")  # where experiments/ is, for a notebook that runs in the folder above

from experiments import rates, sweep, tuning

import minipeft as mp
from minipeft import diagrams
from minipeft.claims import following
from minipeft.claims.comparison import compare
from minipeft.claims.statistics import crossed
from minipeft.evaluation.intervals import mean
from minipeft.experiments.rows import read_rows
from minipeft.experiments.shipped import rounded
from minipeft.text.datasets import Conversation, Message
from minipeft.text.examples import Example, encode_examples
from minipeft.text.instructions import HELD_OUT, TASKS, TRAINED, instructions, is_right, pairs
from minipeft.text.templates import alpaca, chatml, custom
from minipeft.train import collate, collate_packed, evaluate
from minipeft.train.evaluation import example_losses

REDUCED = os.environ.get("MINIPEFT_REDUCED") == "1"
HERE = Path(__file__).parent if "__file__" in globals() else next(p for p in (Path.cwd(), Path("lessons")) if (p / "results").exists())
OUT = Path(os.environ.get("MINIPEFT_LESSONS_OUT", HERE / "out"))
OUT.mkdir(parents=True, exist_ok=True)
RESULTS = HERE / "results" / "08_instruction_tuning.jsonl"
if REDUCED:
    print("REDUCED SETTING: 16 records packed for 32, 2 steps of 4 for 60 of 24, and 1 test record a task for 86, answered in 4 "
          "tokens: no number of sections 3, 4 and 6 says anything. The rows are the full lesson's.\n")
base, tokenizer = mp.load_base()

# %% [markdown]
# ## 1 · The data: tasks, and ways to ask
#
# Every record is an instruction, an input that may be empty, and an output. Inputs and outputs are real, from two
# Bible translations, six novels and a dictionary; the instructions are ours. Seven tasks are trained, each in four
# phrasings. Two more phrasings of each and three whole tasks are kept for the tests: `archaize` (`rewrite` reversed),
# `name` (`define` reversed) and `fill` (which word a gap stands for).
#
# This scheme is FLAN's (Wei et al. 2022, arXiv:2109.01652). FLAN tunes 137 billion parameters on over 60 data sets in
# 12 *clusters* of like tasks, and holds out whole clusters, since a task is hardly new if its like was trained. (So
# our `archaize` and `name` are hardly new.) Stanford Alpaca (Taori et al. 2023) had a larger model, the *teacher*,
# write its 52,000 instructions and answers, by *Self-Instruct* (Wang et al. 2023, arXiv:2212.10560): from people's
# 175 tasks it makes up others.

# %%
for name, task in TASKS.items():
    way = (task.phrasings or task.held_out_phrasings)[0]
    shown = [pair for pair in pairs(name, "validation")[:200] if pair[0] != pair[1]]
    given, wanted = min(shown, key=lambda pair: abs(len(pair[0]) - 40) + len(pair[1]))
    kept_back = "" if task.phrasings else "(held out) "
    print(f"{kept_back}{name}: {way}\n    {given}\n    -> {wanted}")

everything_trained = {record for name in TRAINED for record in pairs(name, "train")}
for name in TASKS:
    assert not everything_trained & set(pairs(name, "test")), "no pair of a test is trained"
asked_in_training = {way for task in TASKS.values() for way in task.phrasings}
assert not asked_in_training & {way for task in TASKS.values() for way in task.held_out_phrasings}
assert not any("{input}" in TASKS[name].phrasings[0] for name in TRAINED), "see section 5, on one phrasing"

# %% [markdown]
# > `inst-3` FLAN: many tasks in many phrasings; Alpaca: data written by a teacher model; InstructGPT: SFT, then RLHF:
# > **cannot be tested here**. The teacher, SmolLM2-135M-Instruct after 3 answered questions, wrote answers that are
# > right in 0.360 [0.346, 0.375], where that can be checked. The base tuned on these (taught) is right in 0.254 of new
# > inputs, before that in 0.006, on people's (tuned) in 0.429; each task's most frequent answer (constant) is in 0.265,
# > and taught is clearly above it in use (new inputs) and use (new phrasings) alone. Taught beside constant, new
# > inputs: undecided (-0.011 [-0.040, +0.019]), not told; taught beside constant, new phrasings: worse (-0.027 [-0.051,
# > -0.003]). Taught beside tuned, new inputs: worse (-0.175 [-0.202, -0.147]); taught beside tuned, new phrasings:
# > worse (-0.134 [-0.165, -0.103]). (5 seeds, 2245 test items)

# %% [markdown]
# ## 2 · The template, and what of it is learned
#
# The model reads one sequence of tokens. A template says where the instruction ends and the answer begins; the one
# below is Alpaca's, to the letter. Whoever asks will type the prompt, so only the answer counts, and the
# end-of-sequence token, from which the model learns to *stop*:

# %%
record = instructions(["synonym"], "validation", cap=5, phrasings=1)[0]
ids, labels = encode_examples([record], tokenizer, 512, alpaca).examples[0]


def show(ids, labels):
    """The tokens, those that are learned between brackets."""
    shown = [tokenizer.decode([i]).replace("\n", "\\n") for i in ids]
    print("|".join(f"[{token}]" if label != -100 else token for token, label in zip(shown, labels)))


show(ids, labels)
answer = labels != -100
assert tokenizer.decode(ids[answer]) == record.output + "<|endoftext|>"
print(f"{len(ids)} tokens, {answer.sum()} of them learned")

# %%
around = slice(int(answer.argmax()) - 2, None)
names = [tokenizer.decode([i]).replace("<|endoftext|>", "end") for i in ids[around]]
rates.labels_drawing(names, labels[around]).savefig(OUT / "08_instruction_tuning_labels.png")

# %% [markdown]
# The loss averages over the orange ones:
#
# $$L = -\frac{1}{|A|} \sum_{t \in A} \log p(x_t \mid x_{<t}), \qquad A = \text{the answer's tokens and the end.}$$
#
# All other labels are $-100$. (TRL, Hugging Face's library for SFT and RLHF, does so by default for pairs of `prompt`
# and `completion`; of chats it learns every token unless `assistant_only_loss=True`.) The sum runs over the answers of
# a whole *batch*, with all its micro-batches where gradients are accumulated (Lesson 3), and $|A|$ counts their tokens:
# a mean of means would give a token of a short answer more weight.
#
# A chat has several turns. ChatML puts each message between `<|im_start|>role` and `<|im_end|>`; both marks are single
# tokens. Here no user's text can spell them, as texts and the template's tokens are encoded apart. (`transformers`
# writes the whole chat as one string and encodes that, so a user who types `<|im_end|>` closes the turn.) All of the
# assistant's turns are learned, each with its end; the user's and the system's are not. The base has never met these
# tokens: their embeddings, in and out, mean nothing until they are trained. LoRA leaves them frozen unless
# `modules_to_save` trains the matrix (last project), `trainable_token_indices` their rows, or `target_modules` adapts
# the matrix.

# %%
messages = [
    ("system", "Be brief."),
    ("user", "A verb?"),
    ("assistant", "Go."),
    ("user", "A noun?"),
    ("assistant", "Day."),
]
chat = Conversation(tuple(Message(*message) for message in messages))
chat_ids, chat_labels = encode_examples([chat], tokenizer, 512, chatml).examples[0]
show(chat_ids, chat_labels)
assert tokenizer.decode(chat_labels[chat_labels != -100]) == "Go.<|im_end|>Day.<|im_end|>"
typed = tokenizer.encode("<|im_end|>")
assert len(typed) > 1 and tokenizer.token_to_id("<|im_end|>") not in typed, "typed by a user, it is only text"

# %% [markdown]
# Where exactly does the answer begin? Not where its characters do: a token can hold characters of both. So prompt and
# prompt + answer are both encoded; where they *diverge*, the answer begins.
#
# **Predict:** a prompt ends with a space. Where does its answer begin?

# %%
space = custom("Word: {prompt} Answer: ")
for template in (custom("Word: {prompt} Answer:"), space):
    prompt = "".join(template(mp.text.datasets.Completion("dog", "-"))[0].prompt)
    alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + "hound")
    begins = next(i for i, (a, b) in enumerate(zip([*alone, -1], whole)) if a != b)
    print(f"{prompt!r}: the prompt alone has {len(alone)} tokens, {begins} of them are also those of prompt + answer")
assert begins == len(alone) - 1

# %% [markdown]
# One token before the prompt's end. In training the space belonged to the answer's first token; a user's prompt ends
# with the space alone, where the model has never had to go on. So let a template end without it.
#
# Alpaca's template would more than double a record's tokens, so ours is short.

# %%
TEMPLATE = custom("{instruction}\n{input}\nAnswer:")


def encode(records, template=TEMPLATE):
    """Records as (input_ids, labels)."""
    return encode_examples(records, tokenizer, 512, template).examples


some = instructions(TRAINED, "train", cap=40)
lengths = {name: [len(e.input_ids) for e in encode(some, t)] for name, t in (("Alpaca", alpaca), ("ours", TEMPLATE))}
learned = np.mean([(e.labels != -100).sum() for e in encode(some)])
print("tokens a record:", ", ".join(f"{name} {np.mean(n):.0f}" for name, n in lengths.items()), f"(of ours {learned:.0f} learned)")
assert np.mean(lengths["Alpaca"]) > 2 * np.mean(lengths["ours"])

# %% [markdown]
# > `inst-2` instruction, optional input, output as the format: **holds**. Instruction, input and output stand in this
# > order; of 104 tokens with an input 7 are learned, of 74 without 7: the output and the token that ends it. (2 test
# > items)

# %% [markdown]
# ## 3 · Packing
#
# Records differ in length, and a batch is a rectangle, filled up with padding, which is computed like everything else.
# Packing lets several records share a row. Positions begin anew with each. A mask (boolean, [rows, 1, T, T]) lets a
# token see only its own record, besides being causal (the last panel; $T$: tokens of a row). And the first
# token of each gets the label -100, so that no record predicts the next (where prompts are not learned, it has that
# label anyway). Then every record is computed as if it were alone, and the loss is the same number.

# %%
diagrams.attention_mask().savefig(OUT / "08_instruction_tuning_masks.png")

# %% [markdown]
# **Predict:** which share of a padded batch of 32 records is padding?

# %%
batch = encode(some[: 16 if REDUCED else 32])
packed, padded = collate_packed(batch), collate(batch)


def step(model, batch):
    """(loss, gradient of one weight matrix)"""
    loss = model.loss(**batch.arguments)
    loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    model.zero_grad()
    return loss.item(), gradient


model = base.copy()
(loss, gradient), (padded_loss, padded_gradient) = step(model, packed), step(model, padded)
alone = [evaluate(base, [example]) for example in batch]
counts = [collate([example]).weight for example in batch]
padding = {}
for name, b in (("padded", padded), ("packed", packed)):
    shape = b.arguments["input_ids"].shape
    padding[name] = 1 - b.tokens / np.prod(shape)
    print(f"{name}: {shape[0]} rows of {shape[1]}, {padding[name]:.0%} padding")
print(f"loss packed {loss:.6f}, padded {padded_loss:.6f}, one by one {np.average(alone, weights=counts):.6f}")
assert abs(loss - padded_loss) < 1e-5 and abs(loss - np.average(alone, weights=counts)) < 1e-5
assert (abs(gradient - padded_gradient).max() < 1e-5 * abs(padded_gradient).max()).item()
assert packed.tokens == padded.tokens and packed.weight == padded.weight
assert padding["padded"] > 0.5 > 0.1 > padding["packed"]

# %%
tuning.packed_picture(packed).savefig(OUT / "08_instruction_tuning_packed.png", dpi=120)

# %% [markdown]
# More than half is padding; in the packed rows it is less than a tenth. Rows are filled by best-fit decreasing: each
# record, the longest first, goes where it fits and the least room is left. Where a batch is a number of *rows*, as in
# TRL, packing puts more records into a step.
#
# **Predict:** leave out the positions alone, then the mask alone. Which harms this model?

# %%
without = {}
for what in ("position_ids", "attention_mask"):
    without[what] = base.loss(**{**packed.arguments, what: None}).item()
    print(f"without {what}: {without[what]:.6f}, wrong by {abs(without[what] - loss):.1e}")
assert abs(without["position_ids"] - loss) < 1e-4 < abs(without["attention_mask"] - loss)

# %% [markdown]
# The mask does; wrong positions do nothing here. Ours is a Llama: its rotary positions enter attention only as
# differences, and within a record those are right wherever it begins. (GPT-2 *adds* its positions to the embeddings;
# there both matter.)
#
# ## 4 · Train: one task, three, seven
#
# A run takes 60 steps of 24 records from one, three, or all seven tasks, about equally.

# %%
MIX = {1: ("rewrite",), 3: ("rewrite", "define", "source"), 7: TRAINED}


@dataclass(frozen=True)
class Tuning:
    """A run. learned: "answer" or "everything"; phrasings: ways each task is asked in; tested: records a task."""

    tasks: int = 7
    phrasings: int = 4
    learned: str = "answer"
    steps: int = 60
    batch_size: int = 24
    learning_rate: float = 5e-4
    tested: int = 86  # as many as the smallest task has
    seed: int = 0


def train(examples, s):
    """The base, tuned: full fine-tuning, packed."""
    tuned = base.copy()
    arguments = mp.TrainingArguments(
        learning_rate=s.learning_rate, max_steps=s.steps, per_device_train_batch_size=s.batch_size, packing=True,
        lr_scheduler_type="cosine", warmup_ratio=0.05, seed=s.seed, progress=False,
    )  # fmt: skip
    mp.Trainer(tuned, examples, args=arguments).train()
    return tuned


def drawn(s):
    """The examples of a run."""
    names, n = MIX[s.tasks], s.steps * s.batch_size
    examples = encode(instructions(names, "train", cap=-(-n // len(names)), seed=s.seed, phrasings=s.phrasings)[:n])
    return [Example(ids, ids.copy()) for ids, _ in examples] if s.learned == "everything" else examples


def tests(n):
    """n records of each task of the split "test": {what is new: {task: records}}."""
    return {
        "inputs": {name: instructions([name], "test", cap=n) for name in TRAINED},
        "phrasings": {name: instructions([name], "test", held_out_phrasings=True, cap=n) for name in TRAINED},
        "tasks": {name: instructions([name], "test", held_out_phrasings=True, cap=n) for name in HELD_OUT},
    }


def answers(model, records, template=TEMPLATE, max_new_tokens=4 if REDUCED else 14):
    """(what the model writes, whether it stopped by itself), greedily."""
    prompts = [tokenizer.encode_pieces(template(record)[0].prompt) for record in records]
    ids, mask = tokenizer.pad(prompts, side="left")
    out = model.generate(ids, mask, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id)
    written = []
    for row in out[:, ids.shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
        written.append((tokenizer.decode(row[:end], skip_special_tokens=True).strip(), end is not None))
    return written


def measure(model, n):
    """On n test records a task, by what is new: each answer's loss in nats a token, shares of right answers, how many stop."""
    row = {"loss": {}, "right": {}, "stopped": {}}
    for new, of in tests(n).items():
        row["loss"][new], ended = {}, []
        for name, records in of.items():
            nats, tokens = example_losses(model, encode(records), 32, tokenizer.pad_token_id)
            row["loss"][new][name] = (nats / tokens).round(4).tolist()
        for name, records in of.items():
            if TASKS[name].check is not None:
                written = answers(model, records)
                right = [is_right(name, "test", record, text) for record, (text, _) in zip(records, written)]
                row["right"].setdefault(new, {})[name] = float(np.mean(right))
                ended += [stopped for _, stopped in written]
        row["stopped"][new] = float(np.mean(ended))
    return rounded(row)


def run(settings):
    return measure(train(drawn(settings), settings), settings.tested)


def validated(s):
    """The loss on validation of a run's own tasks in its own phrasings: nats a token, the mean over tasks."""
    asked = (instructions([name], "validation", cap=s.tested, phrasings=s.phrasings) for name in MIX[s.tasks])
    return {"validation": tuning.mean_loss(train(drawn(s), s), map(encode, asked), tokenizer.pad_token_id)}


assert Tuning.tested == min(len(pairs(name, "test")) for name in TASKS)
SEEDS = (0, 1, 2, 3, 4)
CONDITIONS = [Tuning(tasks=1), Tuning(tasks=3), Tuning(), Tuning(phrasings=1), Tuning(phrasings=3), Tuning(learned="everything")]
if "--full" in sys.argv:
    sweep(validated, [replace(c, learning_rate=r, seed=tuning.SEED) for c in CONDITIONS for r in tuning.RATES], RESULTS)
    sweep(run, [replace(tuning.at_best(c, RESULTS), seed=s) for s in SEEDS for c in CONDITIONS], RESULTS)

# %% [markdown]
# One of these runs, on seven tasks: what the model writes about new inputs, in trained words, before and after.
#
# **Predict:** what will carry over to the three tasks that nobody trained: a lower loss, short answers that end, right
# answers?

# %%
small = dict(steps=2, batch_size=4, tested=1) if REDUCED else {}
settings = Tuning(**small)
before = measure(base, settings.tested)
tuned = train(drawn(settings), settings)
now = measure(tuned, settings.tested)
for name in ("define", "source", "part-of-speech", "use", "synonym"):
    (record,) = instructions([name], "test", cap=1, seed=3)
    for who, model in (("base", base), ("tuned", tuned)):
        ((text, stopped),) = answers(model, [record])
        print(f"{who:5} | {record.instruction} {record.input} -> {text!r}{'' if stopped else ' ...'}")
    print(f"      | wanted: {record.output!r}")

# %% [markdown]
# How often does it stop within 14 tokens, and how often is it right? The loss here, unlike training's (section 2), is a
# mean of means: over an answer's tokens, a task's 86 records (as many as the smallest task has), and the tasks. It is
# computed with the wanted answer's beginning given, as in training (*teacher forcing*); what the model writes goes on
# from its own tokens, so one wrong token can spoil the rest. A program can check the answers to four of the seven
# trained tasks and to two of the three new ones: the whole answer must be the wanted one, or another that the
# dictionary allows (for `use`, any that has the word in it).


# %%
def overall(row, what, new):
    """The mean over tasks of a row's losses, or shares, for what is new: "inputs", "phrasings" or "tasks"."""
    return float(np.mean([np.mean(of) for of in row[what][new].values()]))


for who, row in (("base", before), ("tuned", now)):
    for what, title in (("loss", "loss, nats a token"), ("right", "right answers")):
        print(f"{who:5} {title:18}", ", ".join(f"new {new} {overall(row, what, new):.3f}" for new in row[what]))
    print(f"{who:5} {'stops by itself':18}", ", ".join(f"new {new} {share:.2f}" for new, share in row["stopped"].items()))

# %%
def shares(row):
    return {"stopped": row["stopped"], "right": {new: overall(row, "right", new) for new in row["right"]}}


tuning.answers_picture(shares(before), shares(now), REDUCED).savefig(OUT / "08_instruction_tuning_answers.png", dpi=120)

# %% [markdown]
# To the new **tasks** two of the three things carry over: the loss falls by more than a nat, and nearly all checked
# answers end, though none is right. (How much of the fall is the end alone, one token, was not measured.) New
# **phrasings** cost less than a tenth of a nat in the mean over tasks, and the share of right answers differs by less
# than a tenth.

# %%
if not REDUCED:
    assert overall(now, "loss", "phrasings") - overall(now, "loss", "inputs") < 0.1
    assert abs(overall(now, "right", "phrasings") - overall(now, "right", "inputs")) < 0.1 < overall(now, "right", "inputs")
    assert overall(now, "loss", "tasks") < overall(before, "loss", "tasks") - 1
    assert overall(now, "right", "tasks") == 0 and now["stopped"]["tasks"] > 0.9 > 0.1 > before["stopped"]["tasks"]
    assert 0.8 < now["stopped"]["inputs"] < 1

# %% [markdown]
# Does a tuned model follow the *instruction*, or do what was done to inputs of this form? Of "stone (noun)" the
# meaning, a phrase, or a synonym may be asked. An instruction counts as *followed* if the right answer is likelier
# under it than under those of the other tasks with such inputs. Of 774 questions of trained tasks 430 are of three that
# share one form of input, 344 of two, so a guess has $(\frac{430}{3} + \frac{344}{2}) / 774 = 0.41$; among the three
# new ones, $\frac13$. The *control* differs in one thing alone: it was tuned on *shuffled* instructions, each that of
# another record.

# %%
told = following.experiment("base", "shuffled", "tuned").rows()
for what, other, signs in (("answers", "shuffled", "+=="), ("followed", "shuffled", "+++"), ("followed", "base", "+=+")):
    for new, sign in zip(("inputs", "phrasings", "tasks"), signs):
        e = compare(*(following.reports(told, new, what)[arm] for arm in ("tuned", other)), what).better
        print(f"{what:8}, new {new:9}: tuned less {other:8} {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]")
        assert ("+" if e.low > 0 else "-" if e.high < 0 else "=") == sign
for name, sign in (("source", 1), ("part-of-speech", -1)):
    e = tuning.over_constant(told, name)
    print(f"{name}: right answers, tuned less who always gives the most frequent one {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]")
    assert min(sign * e.low, sign * e.high) > 0

# %% [markdown]
# In trained words the tuned model gives clearly more right answers than the control, if only by 0.026, and it follows
# 0.62 of the instructions, clearly more than the control (0.40), the base and a guess. In new words it follows 0.42,
# clearly more than the control (0.37, itself below a guess), not than the base or a guess. At new tasks it is above the
# control, by 0.021 [0.002, 0.040], but not clearly above a guess. That tuning teaches following is shown for trained
# words alone. (At new tasks no model gives a right answer: "equal" shows little there.) It names the book of 768
# sentences clearly more rightly than one constant answer would, by 0.171 [0.128, 0.214]; the part of speech of 623
# words clearly less so, by 0.028 [0.005, 0.051].
#
# Does tuning teach *facts*, or only to give those that the base knows? The latter is the *superficial alignment
# hypothesis* (Zhou et al. 2023, arXiv:2305.11206, LIMA). A fact is what a word means (`define`) or how a verse goes on
# (`continue`). A model *knows* it if, of four words or beginnings, the right one makes the meaning or the end
# likeliest. A fact is *asked* by a trained instruction, or tested *in the base's own text*: after "stone (noun):" or
# the verse's beginning alone. In its own text, the base does not know the facts that it was trained on clearly better
# than those that it never read, of which it "knows" half or more: by this test, what is known need not be memory. One
# model is tuned on the tested facts, and so *told* them; its control on *other* facts of the same kinds.
#
# - Of the facts that the base was trained on, the control, asked, knows clearly more than the base asked, after three
#   answered questions, or (by 0.05) in its own text. There it is not clearly apart: it learned to be asked.
# - Of the facts that the base never read, the model told them knows clearly more than the control, asked or in the
#   base's own text. The control has learned to be asked, too; so tuning taught facts. (Each is tested in the words in
#   which it was told.)

# %% [markdown]
# > `inst-1` supervised examples teach a model to follow instructions: **holds if**. Of 9 comparisons (4 better, 3 equal
# > and 2 undecided within [-0.06, +0.04] of items) 4 are as stated, 3 are not and 2 are not told. At the level for 9:
# >
# > - right answers, tuned beside base, new inputs: better (+0.423 [+0.400, +0.446]).
# > - instructions followed, tuned beside guess, new inputs: better (+0.209 [+0.181, +0.237]).
# > - right answers, tuned beside base, new phrasings: better (+0.370 [+0.341, +0.400]).
# >
# > Shares of instructions followed:
# >
# > - new inputs: tuned 0.616 [0.588, 0.644], shuffled 0.404 [0.368, 0.441], base 0.411 [0.377, 0.446], a guess 0.407.
# > - new phrasings: tuned 0.417 [0.388, 0.447], shuffled 0.365 [0.333, 0.397], base 0.395 [0.362, 0.430], a guess
# >   0.407.
# > - new tasks: tuned 0.312 [0.278, 0.346], shuffled 0.290 [0.258, 0.323], base 0.266 [0.229, 0.305], a guess 0.333.
# >
# > Right answers to new inputs: tuned 0.429, shuffled 0.403 and base 0.006. (5 seeds, 516 test items)
#
# > `inst-4` the model has the knowledge already; tuning aligns behaviour with intent: **holds if**. 1 of 5 parts are
# > so:
# >
# > - the base knows facts of its own text better than others (define): not so (-3.1 [-10.9, +4.6] points).
# > - the base knows facts of its own text better than others (continue): not told apart (+1.9 [-4.9, +8.7] points).
# > - tuned on other facts, it knows more of those in the base's text than the base, both asked: so (+19.1 [+14.8,
# >   +23.5] points).
# > - asked, it knows no more of them than the base in its own text: not so (+4.7 [+1.1, +8.3] points).
# > - told facts that were in none of its texts, it does not learn them: not so (+17.5 [+14.6, +20.3] points).
# >
# > "Better" and "more" are so where the interval lies above 0, not so where below 5 points; "no more" and "does not"
# > the other way round. The last part compares a model told these facts with one told others, both asked; in the base's
# > own text the difference is +14.2 [+11.2, +17.1]. After 3 answered questions the base knows 50 % of the facts in its
# > texts; who was told others knows, asked, +18.9 [+14.6, +23.3] points more. Of facts in none of its texts the base
# > knows, in its own text, 53 % of the meanings and 73 % of the verse ends; a guess 25 %. (5 seeds, 512 test items)

# %% [markdown]
# ## 5 · How many tasks, in how many words?
#
# Now all conditions, five seeds each, from the file. *Rewrite* is trained in all of them, the *new tasks* in none.
# Intervals (95 %) are over seeds and test records; a difference is *clear* where its own excludes 0 (Lesson 0). Each
# condition has the best of five rates, by the loss of its own tasks on validation, under a sixth seed: 5e-4 to 2e-3.
#
# **Predict:** more tasks for the same number of records: is the loss of `rewrite` higher or lower, and that of the new
# tasks?

# %%
CONDITIONS = ONE_TASK, THREE_TASKS, SEVEN, ONE_PHRASING, THREE_PHRASINGS, EVERYTHING = [tuning.at_best(c, RESULTS) for c in CONDITIONS]
NAMES = {
    ONE_TASK: "one task", THREE_TASKS: "three tasks", SEVEN: "seven tasks",
    ONE_PHRASING: "... in one phrasing", THREE_PHRASINGS: "... in three, of one form", EVERYTHING: "... prompt learned too",
}  # fmt: skip
COLUMNS = {
    "rewrite, new inputs": ("inputs", ("rewrite",)),
    "7 tasks, new inputs": ("inputs", TRAINED),
    "7 tasks, new phrasings": ("phrasings", TRAINED),
    "3 new tasks": ("tasks", HELD_OUT),
}
runs = {condition: tuning.rows_of(read_rows(RESULTS), condition, SEEDS) for condition in CONDITIONS}  # one of each seed
table = {condition: {title: tuning.losses(runs[condition], *column) for title, column in COLUMNS.items()} for condition in NAMES}
at_start = {title: np.mean([np.mean(before["loss"][new][name]) for name in of]) for title, (new, of) in COLUMNS.items()}
tuning.show_losses(table, at_start, NAMES, f"the base{', on 1 record' * REDUCED}")
if not REDUCED:
    stored = table[SEVEN]["7 tasks, new inputs"][0].mean()
    print(f"seven tasks, seed 0: {overall(now, 'loss', 'inputs'):.4f} just now, {stored:.4f} in the file")
    luck = np.std([overall(row, "loss", "inputs") for row in runs[SEVEN]], ddof=1)
    assert abs(overall(now, "loss", "inputs") - stored) < 2 * luck, "the same settings, the same result, but for rounding"

# %%
by_tasks = {
    title: {c.tasks: crossed(table[c][title]) for c in (ONE_TASK, THREE_TASKS, SEVEN)}
    for title in ("rewrite, new inputs", "3 new tasks")
}
tuning.tasks_picture(by_tasks, at_start).savefig(OUT / "08_instruction_tuning_tasks.png", dpi=120)

# %%
CHECKS = (  # a and b, and whether a's loss is above b's: True, False, or None for undecided
    (ONE_TASK, THREE_TASKS, {"rewrite, new inputs": False, "3 new tasks": True}),
    (THREE_TASKS, SEVEN, {"rewrite, new inputs": False, "3 new tasks": True}),
    (ONE_PHRASING, SEVEN, {"7 tasks, new phrasings": True, "3 new tasks": True}),
    (ONE_PHRASING, THREE_PHRASINGS, {"7 tasks, new phrasings": None, "3 new tasks": True}),
    (THREE_PHRASINGS, SEVEN, {"7 tasks, new phrasings": True, "3 new tasks": True}),
    (EVERYTHING, SEVEN, {"7 tasks, new inputs": True, "7 tasks, new phrasings": True, "3 new tasks": None}),
)
print("how much more the loss is, and its interval")
for a, b, expected in CHECKS:
    for title, higher in expected.items():
        e = crossed(table[a][title] - table[b][title])
        found = None if e.low < 0 < e.high else e.value > 0
        print(f"{NAMES[a].removeprefix('... '):22} less {NAMES[b].removeprefix('... '):22}{title:24}{e.value:+.3f} "
              f"[{e.low:+.3f}, {e.high:+.3f}]{' undecided' * (found is None)}")
        assert found is higher, (NAMES[a], title)

# %%
ends = [np.mean([row["stopped"]["tasks"] for row in runs[c]]) for c in (ONE_TASK, THREE_TASKS)]
use = [np.mean([row["right"][new]["use"] for row in runs[SEVEN]]) for new in ("inputs", "phrasings")]
print(f"new tasks, answers that stop: {ends[0]:.0%} and {ends[1]:.0%}; right of `use`: {use[0]:.0%}, in new words {use[1]:.0%}")
for a, b, signs in ((ONE_TASK, THREE_TASKS, "=++"), (THREE_TASKS, SEVEN, "+=+")):
    for name, sign in zip(HELD_OUT, signs):
        e = crossed(np.subtract(*(tuning.losses(runs[c], "tasks", (name,)) for c in (a, b))))
        print(f"{name:8} falls from {a.tasks} to {b.tasks} trained tasks by {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]")
        assert ("+" if e.low > 0 else "-" if e.high < 0 else "=") == sign
assert ends[0] < 0.1 < 0.95 < ends[1] and use[1] < 0.75 * use[0] and SEVEN == Tuning()
for new in ("inputs", "phrasings", "tasks"):
    one, four = (np.array([overall(row, "right", new) for row in runs[c]]) for c in (ONE_PHRASING, SEVEN))
    e = mean(four - one)  # over the seeds
    print(f"right answers, new {new}: one phrasing {one.mean():.3f}, four {four.mean():.3f}, "
          f"more by {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]")
    assert e.low < 0 < e.high if new != "tasks" else not one.any() and not four.any()

# %%
more = {
    NAMES[c].removeprefix("... "): {title: crossed(values - table[SEVEN][title]) for title, values in table[c].items()}
    for c in CONDITIONS[3:]
}
tuning.words_picture(more).savefig(OUT / "08_instruction_tuning_words.png", dpi=120)

# %% [markdown]
# **More tasks** raise the loss of `rewrite`, which gets fewer records, and lower the mean loss on the new ones, from
# one to three to seven. From one to three `name` and `fill`, whose answers are one word, clearly fall; from three to
# seven `fill` and `archaize` clearly fall. Hardly any answer to a new task stops after one trained task, nearly all
# after three. Which tasks are trained changes with their number: from one to three the short answers among them may be
# what helps.
#
# **More phrasings** lower the loss clearly: four beside one by 0.213 [0.177, 0.249] nats at the new tasks, and by 0.019
# [0.008, 0.030] at the trained ones, asked in new words. They give not clearly more right answers, and at the new tasks
# none. (New words cost a third of those of `use`.) Is it their number, or their form? The first three have the input on
# a line of its own; the fourth, like half of the held-out ones, within the sentence. At the new tasks three of the
# first form beside one lower it by 0.132 [0.099, 0.165]. The fourth takes off another 0.081 [0.028, 0.134]; at the
# trained ones only this last step clearly helps, perhaps by its form, but a fourth of the first form was not run.
#
# **Learning the prompt too** is clearly worse on the trained tasks, perhaps because over two thirds of the tokens in
# that loss are prompts'. At the new ones it is undecided.

# %% [markdown]
# ## 6 · Break it
#
# First: ask in another template than the training's. No error is raised.
#
# **Predict:** a letter off, Alpaca's template, ChatML: which costs least, and which most?

# %%
asked = [(name, record) for name in TRAINED if TASKS[name].check for record in instructions([name], "test", cap=1 if REDUCED else 40)]
mismatch, losses = {}, {}
for name, template in {
    "the training's template": TEMPLATE,
    "a letter off ('answer:')": custom("{instruction}\n{input}\nanswer:"),
    "Alpaca": alpaca,
    "ChatML": chatml,
}.items():
    records = [record for _, record in asked]
    written = answers(tuned, records, template)
    mismatch[name] = np.array([is_right(task, "test", record, text) for (task, record), (text, _) in zip(asked, written)], float)
    losses[name], stop = evaluate(tuned, encode(records, template), 32), np.mean([end for _, end in written])
    less = mean(mismatch[name] - mismatch["the training's template"])  # answer by answer
    print(f"{name:30} loss {losses[name]:.2f}, {stop:.0%} stop by themselves, {mismatch[name].mean():.0%} right", end="")
    print(f" ({less.value:+.3f} [{less.low:+.3f}, {less.high:+.3f}])" if len(mismatch) > 1 else "")
if not REDUCED:
    same, near, other, unknown = losses.values()
    assert less.high < 0 and near - same < 0.05 < other - near and unknown > other + 1

# %% [markdown]
# A letter off costs less than 0.05 nats, Alpaca's template over 0.05 more. With ChatML, whose tokens the base has never
# met, the loss is over a nat above Alpaca's. How much of that is the end, there `<|im_end|>`, which the model was never
# trained to write, was not measured. But of these 160 answers clearly fewer are right than in the training's. With
# `transformers` two slips change the prompt: without `add_generation_prompt=True` it does not open the assistant's
# turn, and a chat already written out by the template can get a second beginning-of-sequence token, unless it is
# encoded with `add_special_tokens=False` (huggingface.co/docs/transformers/chat_templating).
#
# Second: forget the end-of-sequence token. That happens where padding is the same token, and all labels with its id are
# set to -100.
#
# **Predict:** what becomes of the answers' own tokens, and of what follows them?

# %%
def without_end(examples):
    """The same examples, whose last token is not learned."""
    return [Example(ids, np.where(np.arange(len(ids)) == len(ids) - 1, -100, labels)) for ids, labels in examples]


never = train(without_end(drawn(settings)), settings)
(record,) = instructions(["part-of-speech"], "test", cap=1, seed=3)
own = {}
for who, model in (("with the end", tuned), ("without", never)):
    stops = np.mean([stopped for _, stopped in answers(model, [record for _, record in asked])])
    own[who] = evaluate(model, without_end(encode([record for _, record in asked])), 32)
    print(f"{who:12} loss of the answers' own tokens {own[who]:.2f}; {stops:.0%} of the answers stop;", end=" ")
    print(repr(answers(model, [record], max_new_tokens=24)[0][0]))
if not REDUCED:
    assert stops < 0.1 and abs(own["with the end"] - own["without"]) < 0.1

# %% [markdown]
# The answers' own tokens are learned about as well (within 0.1 nats), but hardly any answer stops.

# %% [markdown]
# ## Quiz
#
# **1.** Three things can be new to a tuned model. Which cost this one little beyond new inputs, and which carried over
# only in form?
#
# <details><summary>Answer</summary>
#
# New phrasings cost less than a tenth of a nat in the mean, and the share of right answers differs by less than a
# tenth; but that of `use` falls by a third, and instructions in new words are not clearly followed more often than by a
# guess. On new tasks the loss fell by more than a nat, and yet not one of the answers that are checked was right: after
# "Answer:" comes something short, and then the end.
#
# </details>
#
# **2.** Why should a prompt not end with a space?
#
# <details><summary>Answer</summary>
#
# Tokens can reach across the boundary. In training the space belonged to the answer's first token, so the model has
# never had to go on from a space alone.
#
# </details>
#
# **3.** Several records share a row. What keeps each as if it were alone, and what of this does this model not need?
#
# <details><summary>Answer</summary>
#
# Positions that begin anew with each record, a mask by which a token sees only its own, and no label for a record's
# first token. A Llama's rotary positions enter only as differences, so wrong ones do nothing here; the mask always
# matters.
#
# </details>
#
# **4.** A model of seven tasks and one of a single task are compared at the same number of records. What does each
# gain?
#
# <details><summary>Answer</summary>
#
# The one trained on `rewrite` alone has the lower loss on it: all its records are of that task. The one trained on
# seven has the lower mean loss on the tasks that neither was trained on.
#
# </details>
#
# **5.** The end-of-sequence token was masked in training. What becomes of the answers?
#
# <details><summary>Answer</summary>
#
# Their own tokens are learned about as well as before, but not that they end: hardly any answer stops.
#
# </details>

# %% [markdown]
# ## Exercises
#
# Check an answer with `from minipeft.exercises import check` and `check("08.2", value)`, or at the terminal with
# `minipeft exercise 08.2 VALUE`. A function is an answer, too; at the terminal it is taken from a file,
# `minipeft exercise 08.1 FILE.py`.
#
# **08.1 A packed row.** Write `packed_mask(lengths)`: the boolean mask `[T, T]` of a row in which records of these
# lengths follow each other, without padding; True where a token (row) sees another (column): itself, and earlier ones
# of its record.
#
# **08.2 Which mean?** A batch has three answers of 2, 3 and 11 tokens, whose mean losses are 3.0, 2.0 and 1.0 nats.
# What is the loss of the batch, as section 2 defines it?
#
# **08.3 Where the answer begins.** Write `answer_begins(prompt, whole)`: given the tokens of the prompt and those of
# prompt and answer together, two lists, the index in `whole` at which the answer begins.
#
# Projects, with no answer written down:
#
# - **A mean of means.** Average the loss of each *record* instead of each token (a `loss` and a `collate` of your own
#   for `mp.Trainer`). Which tasks gain, which lose? Look at the lengths of their answers.
# - **One task.** Train on "source" alone, `MIX[1] = ("source",)`, for the same 60 steps. How many of its answers are
#   right, beside the 48 % of `inst-1`'s model? What do the other six tasks take from it, records or room? Keep its 206
#   records and leave the others out; then give it 1,440 among 8,640 of the others, in the 420 steps that these take.
# - **ChatML.** `minipeft sft --template chatml --steps 25 --batch-size 24 --output full`, and again with `--method lora
#   --output lora`. How many answers of each end (`mp.ask`, with `template="chatml"`)? Look at the embedding of
#   `<|im_end|>`, which the base has never met in a text (its length, beside that of a word), and at what LoRA leaves
#   frozen. What does `modules_to_save=["embed_tokens", "lm_head"]` change, and what does it cost in parameters?
#
# <details><summary>Solution of 08.1</summary>
#
# The same record, and not later.
#
# ```python
# def packed_mask(lengths):
#     record = np.repeat(np.arange(len(lengths)), lengths)
#     return np.tril(record[:, None] == record)
#
# check("08.1", packed_mask)
# ```
#
# </details>
#
# <details><summary>Solution of 08.2</summary>
#
# The sum over all answer tokens, by their number. The mean of the means would be 2.
#
# ```python
# check("08.2", (2 * 3.0 + 3 * 2.0 + 11 * 1.0) / (2 + 3 + 11))
# ```
#
# </details>
#
# <details><summary>Solution of 08.3</summary>
#
# The first place where the two differ; the prompt's length, where they do not.
#
# ```python
# def answer_begins(prompt, whole):
#     return next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
#
# check("08.3", answer_begins)
# ```
#
# </details>
