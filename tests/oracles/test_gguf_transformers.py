"""GGUF files of every supported architecture and tokenizer kind, as transformers reads them with code of its own."""

import logging

import numpy as np
import pytest

import minipeft as mp

reason = "needs the extra 'oracles': pip install 'minipeft[oracles]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)
pytest.importorskip("gguf", reason="needs the extra 'hub': pip install 'minipeft[hub]'")
from test_gguf import F32, Q8_0, build, byte_level, ids, sentencepiece, write  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
TEXTS = ["the 12345, I'S\n\n  the", "naïve 🐱 ½\t\tx", " the  the", "ab abc é", "don't DON'T 3.14\r\n ok"]


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
def test_logits(case, kind, tmp_path):
    made = build(case)
    if case == "gpt2":  # of which transformers takes two sizes to be the usual ones, whatever the file says
        made = mp.Transformer(made.config.replace(intermediate_size=256, max_position_embeddings=1024), seed=3)
    path = write(tmp_path / "model.gguf", made, kind=kind, tokenizer=byte_level("gpt-2"))
    model, _ = mp.from_pretrained(path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = twin(torch.tensor(ids())).logits.numpy()
    np.testing.assert_allclose(model(ids()).data, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    named = {name: p.detach().numpy() for name, p in twin.named_parameters()}
    assert all(np.array_equal(p.data, named[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2"])
def test_byte_level_tokens(pre, tmp_path):
    write(tmp_path / "model.gguf", build("llama"), tokenizer=byte_level(pre))
    ours = mp.from_pretrained(tmp_path / "model.gguf")[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert theirs.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))


def test_sentencepiece_tokens(tmp_path):
    write(tmp_path / "model.gguf", build("llama"), tokenizer=sentencepiece)
    ours = mp.from_pretrained(tmp_path / "model.gguf")[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in (text for text in TEXTS if text[0] != " "):
        # before a text that begins with a space, llama.cpp and Llama 2's own tokenizer.json put another; transformers not
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode(text, add_special_tokens=True)[0] == 1
