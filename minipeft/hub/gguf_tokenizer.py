"""The tokenizer that a GGUF file's metadata describes, as one of the `tokenizers` library.

    tokenizer.ggml.model    "gpt2": byte-level BPE, with merges        "llama": SentencePiece BPE, with scores
    tokenizer.ggml.pre      how a byte-level one cuts text into words before it merges
    tokenizer.ggml.tokens, .token_type, .merges, .scores, .bos_token_id, ...    tokenizer.chat_template

The file only names the way of cutting; the patterns of the supported families are here, from their tokenizer.json. An
unknown kind is refused: with another one the model would read other tokens than it was trained on.
"""

from __future__ import annotations

from typing import Any

from ..text.tokenizer import Tokenizer, of_library
from .configuration import HubError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # token types
MOST = 4096  # characters of a token: `_merges_from_scores` looks at all ways to cut it in two
_CONTRACTIONS_AND_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # None: GPT-2's pattern, which ByteLevel has built in
    "gpt-2": None,
    "smollm": None,  # and every digit by itself
    "llama-bpe": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS_AND_WORDS}|\p{{N}}|{_REST}",
}


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer; None where the file has none. Raises HubError for a kind that is not supported, and for damage."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise HubError(f"tokenizer.ggml.model is {kind!r}: only 'gpt2' and 'llama' are supported")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) and len(t) <= MOST for t in tokens):
        raise HubError(f"tokenizer.ggml.tokens must be a list of tokens, of at most {MOST} characters each")
    if len(set(tokens)) != len(tokens):
        raise HubError("tokenizer.ggml.tokens must be a list of tokens, no two alike")
    with of_library(HubError, "the metadata makes no tokenizer"):
        backend = _byte_level(metadata, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
        _add_special_tokens(backend, metadata, tokens)
        return Tokenizer(backend, _configuration(metadata, tokens))


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise HubError(f"tokenizer.ggml.pre is {pre!r}: only {', '.join(map(repr, _SPLITS))} are supported")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    split = _SPLITS[pre]
    first = pre_tokenizers.Split(Regex(split), behavior="isolated") if split else None
    if pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level]) if first else byte_level
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Any:
    """Llama 2's: `▁` stands for a space, one is put before the text, and bytes spell what has no token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    made = {token for token, type_ in zip(tokens, types) if type_ == _NORMAL}  # control tokens are not spelled
    merges = [pair for pair in _merges_from_scores(vocabulary, metadata.get("tokenizer.ggml.scores")) if "".join(pair) in made]
    backend = Backend(models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        decoder.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(decoder)
    return backend


def _merges_from_scores(vocabulary: dict[str, int], scores: Any) -> list[tuple[str, str]]:
    """The merges, best first, of a vocabulary with scores: every way to join two tokens into a third.

    SentencePiece joins, of all adjacent tokens whose union is a token, the two whose union has the highest score.
    """
    if not isinstance(scores, list) or len(scores) != len(vocabulary):
        raise HubError("tokenizer.ggml.scores must be a list with a score for each token")
    found = [
        (-scores[i], i, vocabulary[token[:cut]], vocabulary[token[cut:]], (token[:cut], token[cut:]))
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [pair for *_, pair in sorted(found)]


def _add_special_tokens(backend: Any, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Control tokens become special, user-defined ones stay whole in a text; BOS and EOS are added where wanted."""
    from tokenizers import AddedToken, processors

    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    begins = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    wanted = {}
    for name, usual in (("bos", begins), ("eos", False)):
        token = _special(metadata, tokens, name)
        if metadata.get(f"tokenizer.ggml.add_{name}_token", usual) and token is not None:
            wanted[name] = token
    if wanted:
        pieces = [wanted.get("bos"), "$A", wanted.get("eos")]
        ids = [(token, backend.token_to_id(token)) for token in wanted.values()]
        backend.post_processor = processors.TemplateProcessing(single=[p for p in pieces if p], special_tokens=ids)


def _configuration(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    config |= {f"{name}_token": _special(metadata, tokens, key) for name, key in names.items()}
    config["chat_template"] = metadata.get("tokenizer.chat_template")
    return {name: value for name, value in config.items() if value is not None}


def _special(metadata: dict[str, Any], tokens: list[str], key: str) -> str | None:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise HubError(f"tokenizer.ggml.{key}_token_id is {number!r}, but there are {len(tokens)} tokens")
    return tokens[number]
