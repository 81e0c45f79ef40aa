"""What instruction tuning learns, and packed rows, against transformers."""

from importlib.resources import files

import numpy as np
import pytest

from minipeft.hub.base import load_base
from minipeft.text.datasets import Conversation, Message
from minipeft.text.examples import encode_examples
from minipeft.text.instructions import TRAINED, instructions
from minipeft.text.templates import chatml
from minipeft.train import collate, collate_packed

transformers = pytest.importorskip("transformers", reason="needs the extra 'oracles'")
torch = pytest.importorskip("torch", reason="needs the extra 'oracles'")

BASE = str(files("minipeft").joinpath("hub", "base"))
GENERATION = (  # ChatML whose template says, in transformers' way, which parts the assistant wrote
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@pytest.mark.parametrize("system", [(), (("system", "Be kind."),)])
def test_the_assistants_turns_are_what_transformers_masks(system):
    chat = [*system, ("user", "Hi"), ("assistant", "Hello, you!"), ("user", "Why?\n\n"), ("assistant", "\nSo.")]
    _, tokenizer = load_base()
    ((ids, labels),) = encode_examples(
        [Conversation(tuple(Message(*turn) for turn in chat))], tokenizer, 512, chatml
    ).examples
    theirs = transformers.AutoTokenizer.from_pretrained(BASE).apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=GENERATION, return_assistant_tokens_mask=True, return_dict=True, tokenize=True,
    )  # fmt: skip
    assert theirs["input_ids"][:-1] == ids.tolist(), "but for the line break after the last message"
    assert theirs["assistant_masks"][:-1] == (labels != -100).astype(int).tolist()


@pytest.mark.parametrize("template", [None, chatml])
def test_the_packed_loss_is_transformers_loss(template):
    """Theirs of our packed rows, given our mask and positions, and theirs of each example alone."""
    model, tokenizer = load_base()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    examples = encode_examples(instructions(TRAINED, "validation", cap=2), tokenizer, 512, template).examples
    batch = collate_packed(examples, tokenizer.pad_token_id, capacity=300)
    assert batch.arguments["attention_mask"].ndim == 4
    ours = model.loss(**batch.arguments).item()
    with torch.no_grad():
        T = batch.arguments["input_ids"].shape[1]
        allowed = torch.tensor(batch.arguments["attention_mask"]) & torch.ones(T, T, dtype=torch.bool).tril()
        packed = theirs(
            input_ids=torch.tensor(batch.arguments["input_ids"]),
            position_ids=torch.tensor(batch.arguments["position_ids"]),
            attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
            labels=torch.tensor(batch.arguments["labels"]),
        ).loss.item()
        alone = [
            theirs(input_ids=torch.tensor(ids[None]), labels=torch.tensor(labels[None])).loss.item()
            for ids, labels in examples
        ]
    counts = [collate([example]).weight for example in examples]
    assert ours == pytest.approx(packed, rel=1e-5)
    assert ours == pytest.approx(float(np.average(alone, weights=counts)), rel=1e-5)
