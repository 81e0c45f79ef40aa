"""Asking a model: each form of prompt in its template, batches, stop tokens, and what is no prompt."""

import json

import numpy as np
import pytest
from cli_helpers import continued, jsonl, output, refused, run, tiny

import minipeft as mp
from minipeft.evaluation.answers import asked_turns
from minipeft.text.datasets import (
    Completion,
    Conversation,
    DatasetError,
    Document,
    Instruction,
    Message,
    MultipleChoice,
    Preference,
    UnpairedPreference,
    read_prompts,
)
from minipeft.text.templates import alpaca, chatml, plain

ASKED = Message("user", "What is a dog?")
CHAT = Conversation((Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), ASKED))
PROMPTS = {  # prompt -> (its usual template, a record of it with another answer)
    "The house of the": (plain, Completion("The house of the", "x")),
    Document("And he said"): (plain, Completion("And he said", "x")),
    Completion("Word: dog (noun)\nMeaning:", " an animal"): (plain, Completion("Word: dog (noun)\nMeaning:", "x")),
    Preference("A dog is", " good", " bad"): (plain, Completion("A dog is", "x")),
    UnpairedPreference("A cat is", " bad", False): (plain, Completion("A cat is", "x")),
    MultipleChoice("A dog is an", ("animal", "island"), 0): (plain, Completion("A dog is an", "x")),
    Instruction("Define.", "dog", "an animal"): (alpaca, Instruction("Define.", "dog", "x")),
    CHAT: (chatml, Conversation((*CHAT.messages, Message("assistant", "x")))),
}


@pytest.fixture(scope="module")
def base():
    return mp.load_base()


def by_hand(base, turns, n):
    """The answer, one prompt at a time, to the last of the turns."""
    model, tokenizer = base
    pieces = [piece for turn in turns for part in turn for piece in part][: -len(turns[-1].completion)]
    ends = [tokenizer.eos_token_id, tokenizer.token_to_id("<|im_end|>")]
    return continued(model, tokenizer, tokenizer.encode_pieces(pieces), n, ends)


def test_every_form_is_asked_in_its_template_whatever_the_batch(base):
    expected = [by_hand(base, template(record), 12) for template, record in PROMPTS.values()]
    for size in (1, 3, 8):
        assert mp.ask(*base, list(PROMPTS), max_new_tokens=12, batch_size=size) == expected
    assert len(set(expected)) == len(expected) and all(expected)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_is_a_list_of_one_and_its_answer_is_not_shown(base, prompt):
    (answer,) = mp.ask(*base, prompt, max_new_tokens=4)
    other = PROMPTS[prompt][1]
    assert [answer] == mp.ask(*base, [other], max_new_tokens=4), "whatever answer the record holds"


def test_templates_by_name_by_text_and_as_functions(base):
    expected = mp.ask(*base, ["Q: Who?\nA:"], max_new_tokens=6)
    assert mp.ask(*base, ["Who?"], "Q: {prompt}\nA:", max_new_tokens=6) == expected
    records = [Completion("Who?", "x"), MultipleChoice("Who?", ("a", "b"), 1)]
    for template in ("alpaca", alpaca):
        assert mp.ask(*base, records, template, max_new_tokens=6) == [by_hand(base, alpaca(records[0]), 6)] * 2


def test_what_is_drawn_depends_on_the_seed_and_the_place_alone(base):
    prompts = ["It was", "The", "She had no reason"]
    drawn = [
        mp.ask(*base, prompts, temperature=1, top_p=0.9, seed=seed, batch_size=size, max_new_tokens=8)
        for seed, size in ((0, 1), (0, 3), (1, 3))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_ends_before_the_stop_token(base):
    """The token that ends a template's answers is none of the answer; here it is the most probable one from the start."""
    model, tokenizer = base
    end = tokenizer.token_to_id("<|im_end|>")
    forced = model.copy()
    turns = [*asked_turns(["x"], plain), *asked_turns(["x"], chatml), *asked_turns([CHAT])]
    starts = [tokenizer.encode_pieces(turn.prompt, add_special_tokens=True) for turn in turns]
    hidden = np.stack([forced.backbone(np.array([ids])).data[0, -1] for ids in (*starts, [*starts[0], end])])
    forced.lm_head.weight.data[end] = np.linalg.lstsq(hidden, np.full(len(hidden), 1000.0))[0]
    assert mp.ask(forced, tokenizer, ["x"], "chatml", max_new_tokens=5) == [""]
    assert mp.ask(forced, tokenizer, ["x"], "plain", max_new_tokens=2) == ["<|im_end|>" * 2], "plain text ends with EOS"
    both = mp.ask(forced, tokenizer, [CHAT, "x"], max_new_tokens=2)
    assert both == ["", "<|im_end|>" * 2], "whatever ends the other answers of the batch"


def test_an_adapter_with_virtual_tokens_answers(base):
    model, tokenizer = base
    tuned = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=3))
    prompts = ["The", "And the house of"]
    alone = [mp.ask(tuned, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert mp.ask(tuned, tokenizer, prompts, max_new_tokens=5) == alone


def test_each_prompt_by_its_own_adapter(base):
    model, tokenizer = base
    tuned = mp.get_peft_model(model, mp.PrefixTuningConfig(num_virtual_tokens=3))
    tuned.add_adapter("lora", mp.LoraConfig(r=2, init_lora_weights=False))
    names, drawing = ["lora", "default", "__base__", "lora"], dict(temperature=1, seed=2, max_new_tokens=6)
    answers = mp.ask(tuned, tokenizer, ["The house of the"] * 4, adapter_names=names, batch_size=3, **drawing)
    tuned.set_adapter("lora")
    assert [answers[0], answers[3]] == mp.ask(tuned, tokenizer, ["The house of the"] * 2, **drawing)
    assert [answers[2]] == mp.ask(model, tokenizer, "The house of the", **drawing)
    with pytest.raises(ValueError, match="adapter_names has 1 names for 4 prompts"):
        mp.ask(tuned, tokenizer, ["a"] * 4, adapter_names=["lora"])
    for prompts in (["a"], ["a"] * 4):
        with pytest.raises(ValueError, match=r"adapter_names must be a list of names, such as \['lora'\], not the text"):
            mp.ask(tuned, tokenizer, prompts, adapter_names="lora")
    with pytest.raises(ValueError, match=r"adapters must be a list of names"):
        tuned.add_weighted_adapter("ab", [1, 1], "sum")


@pytest.mark.parametrize(
    "prompts, options, error, sentence",
    [
        ([["The"]], {}, TypeError, "prompt 1: a prompt is a text or a record of minipeft.text.datasets, not a list"),
        (["a", 3], {}, TypeError, "prompt 2: a prompt is a text or a record of minipeft.text.datasets, not a int"),
        ([{"prompt": "a"}], {}, ValueError, "field 'completion' is missing"),
        (["a", ""], {}, ValueError, "prompt 2 is empty; a prompt needs some text"),
        ([Conversation(())], {}, ValueError, "prompt 1: a conversation needs a question"),
        (
            ["a"],
            {"max_length": 3},
            TypeError,
            "has no option 'max_length'; nearest: max_new_tokens",
        ),
        (["a"], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of at least 1, got 0"),
        (["a"], {"top_k": 3}, ValueError, "give a temperature above 0"),
        (["a" * 5000], {}, ValueError, "this model has 512 positions"),
        ([CHAT], {"template": "plain"}, ValueError, "prompt 1: the plain template takes {prompt, completion} records"),
        (["a"], {"template": "alpacca"}, ValueError, "a template is one of plain, alpaca"),
    ],
)
def test_what_cannot_be_asked(base, prompts, options, error, sentence):
    with pytest.raises(error, match=sentence):
        mp.ask(*base, prompts, **options)


# -------------------------------------------------------------------------------------------------- the command line


FORMS = [
    ([{"prompt": "The dog", "completion": " is"}], "The dog", plain),
    ([{"prompt": "The dog", "id": 3}], "The dog", plain),
    ([{"prompt": "The dog", "chosen": "a", "rejected": "b"}], "The dog", plain),
    ([{"text": "The dog"}], "The dog", plain),
    ([{"question": "The dog", "choices": ["a", "b"], "answer": 1}], "The dog", plain),
    ([{"instruction": "Define.", "input": "dog", "output": "x"}], "Define.\n\ndog", alpaca),
    ([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}], "Hi", chatml),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("rows, shown, template", FORMS)
def test_generate_takes_the_records_of_every_form(model, tmp_path, capsys, rows, shown, template):
    file = jsonl(tmp_path / "prompts.jsonl", rows)
    options = ("generate", "--model", model, "--prompts", file, "--max-new-tokens", 6)
    status, out, err = output(capsys, *options, "--json")
    (expected,) = mp.ask(*mp.from_pretrained(model), read_prompts(file), template, max_new_tokens=6)
    assert (status, err) == (0, "") and json.loads(out) == {"prompt": shown, "completion": expected}
    assert output(capsys, *options)[1] == (shown if template is plain else "") + expected + "\n"


def test_generate_puts_records_into_a_chat(model, tmp_path, capsys):
    chat = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hi"}]
    file = jsonl(tmp_path / "a.jsonl", [{"messages": [*chat, {"role": "assistant", "content": "Hello"}]}])
    assert run("generate", "--model", model, "--prompts", file, "--chat", "--system", "Be brief.") == 0
    out = capsys.readouterr().out
    expected = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    assert out == mp.ask(*mp.from_pretrained(model), [expected])[0] + "\n"


def test_a_line_without_a_prompt_is_refused_by_its_number(model, tmp_path, capsys):
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    assert "a.jsonl:2: field 'prompt' is empty" in refused(capsys, "generate", "--model", model, "--prompts", file)
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: field 'prompt' must be a string, got a number"):
        read_prompts(jsonl(tmp_path / "a.jsonl", [{"prompt": 3}]))
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: the fields \['ask'\] are none of the known forms"):
        read_prompts(jsonl(tmp_path / "a.jsonl", [{"ask": "a"}]))
