"""SmolLM2-135M-Instruct: a real model's weights, tokens, logits, text and adapters against transformers and peft.

transformers reads the same .gguf file with code of its own: its dequantizer, its order of the attention's rows.
"""

import json
import logging
from itertools import pairwise

import numpy as np
import pytest

import minipeft as mp
from minipeft.cli import main
from minipeft.hub.smollm2 import HOW_TO_GET, find_smollm2
from minipeft.text.corpora import austen

reason = "needs the extra 'oracles': pip install 'minipeft[oracles]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
peft = pytest.importorskip("peft", reason=reason)
pytest.importorskip("gguf", reason="needs the extra 'hub': pip install 'minipeft[hub]'")
GGUF = find_smollm2()
pytestmark = [
    pytest.mark.skipif(GGUF is None, reason=HOW_TO_GET),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

ODD_TEXTS = [
    "",
    " ",
    "   leading, trailing   ",
    "\n\n\r\n \t\t\n",
    "In 2024, 1234567 cats ate 3.14159 of 10^100 ½ ² ٣ 五",
    "naïve café – “quotes” … é ﬁ ǅ",
    "🐱👩‍👩‍👧‍👦🇫🇷 e\u0301 \u200b\u00a0\ufeff",
    "def f(x):\n    return x**2  # it's, we'll, I'D, they'RE",
    "<|im_start|>user\n<|im_end|><|endoftext|><repo_name>",
    "中文字符、日本語、한국어 العربية हिन्दी",
    "\x00\x01\x7f\x80 \ud7ff\ue000\U0010ffff",
    "word" * 40 + " " * 40 + "!?" * 20,
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Why?  \n"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2? 🐱"},
    ],
]


@pytest.fixture(scope="module")
def ours():
    return mp.from_pretrained(GGUF)


@pytest.fixture(scope="module")
def theirs():
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers.AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory):
    """What save_pretrained makes of the file: a directory, with the tokenizer."""
    directory = tmp_path_factory.mktemp("smollm2")
    mp.save_pretrained(*ours[:1], directory, ours[1])
    return directory


@pytest.fixture(scope="module")
def from_directory(exported):
    """transformers' model of that directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(exported)


@pytest.fixture(scope="module")
def text_ids(ours):
    """256 tokens of a chapter of Jane Austen's, [1, 256]."""
    return np.array([ours[1].encode(austen("validation")[0].text)[:256]])


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


# ----------------------------------------------------------------------------------------------------------- weights


def test_weights_are_those_that_transformers_reads_from_the_file(ours, theirs):
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    found = dict(ours[0].named_parameters())
    assert found.keys() == expected.keys() and len(found) == 272
    assert [name for name, p in found.items() if not np.array_equal(p.data, expected[name])] == []
    assert sum(p.size for p in ours[0].parameters()) == 134_515_008


def test_exported_directory_is_the_model(theirs, from_directory):
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in from_directory.state_dict().items())
    for key in ("hidden_size", "rope_parameters", "eos_token_id", "pad_token_id", "vocab_size"):
        assert getattr(from_directory.config, key) == getattr(theirs.config, key), key
    assert np.float32(from_directory.config.rms_norm_eps) == np.float32(theirs.config.rms_norm_eps)


# ------------------------------------------------------------------------------------------------------------ logits


def test_logits_differ_by_rounding_alone(ours, theirs, exported, text_ids):
    """Of the exact logits, ours are no farther than theirs: float32 rounding, through 30 layers."""
    mine, others = ours[0](text_ids).data, logits_of(theirs, text_ids)
    exact = logits_of(transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float64), text_ids)
    error = np.abs(others - exact).max()
    assert 0 < error < 1e-5 * np.abs(exact).max()
    assert np.abs(mine - exact).max() < 2 * error
    assert np.sqrt(((mine - exact) ** 2).mean()) < 1.5 * np.sqrt(((others - exact) ** 2).mean())


def test_perplexity_on_a_shipped_text(ours, theirs, text_ids):
    with mp.no_grad():
        mine = float(np.exp(ours[0].loss(text_ids, text_ids).item()))
    labels = torch.tensor(text_ids)
    with torch.no_grad():  # of float64 logits: the mean that transformers forms in float32 is itself off by 2e-5
        others = float(torch.exp(torch.nn.functional.cross_entropy(theirs(labels).logits[0, :-1].double(), labels[0, 1:])))
    assert f"{mine:.4g}" == f"{others:.4g}"
    assert mine == pytest.approx(others, rel=1e-5)
    assert 5 < mine < 50  # of a sensible model; with its rows out of order it is in the thousands


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_greedy_text_is_the_same_token_for_token(conversation, ours, theirs):
    model, tokenizer = ours
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    mine = model.generate(np.array([prompt]), max_new_tokens=48)
    with torch.no_grad():
        others = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False).numpy()
    assert np.array_equal(mine, others)


def test_an_answer_reads_as_it_should(ours):
    model, tokenizer = ours
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=True)
    answer = model.generate(np.array([prompt]), max_new_tokens=32)[0, len(prompt) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# --------------------------------------------------------------------------------------------------------- tokenizer


def reference_bpe(tokenizer):
    """Byte-level BPE from its definition: split, spell bytes as letters, join the pair of the lowest rank, again."""
    regex = pytest.importorskip("regex")
    state = json.loads(tokenizer._plain.to_str())["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(state["merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(text):
        ids = []
        for run in regex.split(r"(\p{N})", text):  # every digit by itself, which then is a word
            for word in words.findall(run):
                parts = [spelled[b] for b in word.encode()]
                while len(parts) > 1:
                    rank, i = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(pairwise(parts)))
                    if rank == 10**9:
                        break
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                ids += [state["vocab"][part] for part in parts]
        return ids

    return encode


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokens_of_odd_texts(text, ours, exported):
    mine = ours[1]
    others = transformers.AutoTokenizer.from_pretrained(exported)
    plain = mine.encode(text)
    assert plain == reference_bpe(mine)(text)
    assert mine.decode(plain) == text
    assert mine.encode(text, allow_special=True) == others(text)["input_ids"]
    assert others.decode(plain, skip_special_tokens=False) == text
    again = mp.from_pretrained(exported)[1]
    assert again.encode(text) == plain and again.encode(text, allow_special=True) == others(text)["input_ids"]


def test_tokens_of_a_chapter(ours, exported):
    text = austen("test")[0].text
    plain = ours[1].encode(text)
    assert plain == reference_bpe(ours[1])(text) == transformers.AutoTokenizer.from_pretrained(exported)(text)["input_ids"]
    assert ours[1].decode(plain) == text


@pytest.mark.parametrize("opening", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_template(conversation, opening, ours, exported):
    others = transformers.AutoTokenizer.from_pretrained(exported)
    expected = others.apply_chat_template(conversation, tokenize=False, add_generation_prompt=opening)
    assert ours[1].apply_chat_template(conversation, opening, tokenize=False) == expected
    assert ours[1].apply_chat_template(conversation, opening) == others(expected, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_of_the_command_line_loads_in_peft(method, ours, from_directory, text_ids, tmp_path, capsys):
    data = tmp_path / "chat.jsonl"
    turns = [("Say yes.", "Yes."), ("Say no.", "No."), ("Say hello.", "Hello there.")]
    for question, answer in turns:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        data.open("a").write(json.dumps({"messages": messages}) + "\n")
    options = ["--method", method, "--steps", "2", "--batch-size", "2", "--validation", "0", "--lr", "1e-3"]
    output = tmp_path / "adapter"
    assert main(["finetune", "--model", str(GGUF), "--data", str(data), "--output", str(output), *options]) == 0
    capsys.readouterr()

    mine = mp.PeftModel.from_pretrained(ours[0], output)
    others = peft.PeftModel.from_pretrained(from_directory, output)
    try:
        found, expected, without = mine(text_ids).data, logits_of(others, text_ids), ours[0](text_ids).data
        assert np.abs(found - without).max() > 0.1  # two steps have changed it, far beyond rounding
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    finally:
        others.unload()
