"""Scores of multiple choice and losses against transformers, as lm-evaluation-harness computes them from its logits."""

from importlib.resources import files

import numpy as np
import pytest
from twins import torch, transformers

import minipeft as mp
from minipeft.evaluation import evaluate, general_cloze
from minipeft.text.datasets import Completion, Conversation, Message, MultipleChoice

BASE = str(files("minipeft").joinpath("hub", "base"))


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(BASE)


def loglikelihood(theirs, context, continuation):
    """The harness's: spaces at the end of the context go to the continuation, which is what follows the context's tokens."""
    model, tokenizer = theirs
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    whole, given = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    return sum(logits[t - 1, whole[t]].item() for t in range(given, len(whole)))


def test_choices_are_scored_as_by_the_harness(theirs):
    records = [
        *general_cloze()[:12],
        MultipleChoice("The Lord is my ", ("shepherd.", "island, and all the people of the sea", "house"), 0),
        MultipleChoice("What is a dog?", ("an animal", "été"), 1),
    ]
    found = evaluate(*mp.load_base(), records)
    right, right_norm = [], []
    for record, own in zip(records, found.details):
        gap = "" if record.question.endswith(" ") else " "
        expected = np.array([loglikelihood(theirs, record.question, gap + choice) for choice in record.choices])
        np.testing.assert_allclose(own["logprobs"], expected, rtol=2e-5)
        lengths = np.array([float(len(choice)) for choice in record.choices])
        right.append(np.argmax(expected) == record.answer)
        right_norm.append(np.argmax(expected / lengths) == record.answer)
    assert found.scores["acc"].value == np.mean(right) and found.scores["acc_norm"].value == np.mean(right_norm)
    assert 0 < np.mean(right) < 1 and right != right_norm


def test_choices_in_a_chat_template(theirs):
    """The answer of the assistant, without the token that ends its turn."""
    record = MultipleChoice("Hello!", ("Good morning.", "No"), 0)
    prompt = theirs[1].apply_chat_template(
        [{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True,
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
            "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
        ),
    )  # fmt: skip
    (own,) = evaluate(*mp.load_base(), [record], "chatml").details
    model, tokenizer = theirs
    for choice, found in zip(record.choices, own["logprobs"]):
        given, answer = tokenizer.encode(prompt), tokenizer.encode(choice)
        with torch.no_grad():
            logits = model(torch.tensor([given + answer])).logits[0].double().log_softmax(dim=-1)
        expected = sum(logits[len(given) + i - 1, token].item() for i, token in enumerate(answer))
        assert found == pytest.approx(expected, rel=2e-5)


def test_the_loss_of_every_record_and_their_mean(theirs):
    records = [
        Completion("Word: dog (noun)\nMeaning:", " an animal"),
        Completion("And God said, Let there be", " light"),
    ]
    model, tokenizer = theirs
    total, count = 0.0, 0
    found = evaluate(*mp.load_base(), records, answers=False)
    for record, own in zip(records, found.details):
        prompt = tokenizer.encode(record.prompt)
        ids = [*tokenizer.encode(record.prompt + record.completion), tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        assert own["nll"] / own["tokens"] == pytest.approx(loss, rel=1e-5)
        total, count = total + own["nll"], count + own["tokens"]
    assert found.scores["loss"].value == pytest.approx(total / count)


def test_the_answers_are_transformers_answers(theirs):
    """Prompts of different lengths in one batch, in ChatML, until <|im_end|>."""
    model, tokenizer = theirs
    questions = ["Hello!", "What is the meaning of the word house, and who lives in it?"]
    expected = []
    for question in questions:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(text)])
        stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        kept = [token for token in out.tolist() if token not in stop]
        expected.append(tokenizer.decode(kept))
    records = [Conversation((Message("user", question),)) for question in questions]
    assert mp.ask(*mp.load_base(), records, max_new_tokens=12) == expected
