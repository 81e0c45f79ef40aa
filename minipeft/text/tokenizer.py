"""A Hugging Face tokenizer as a small class: `tokenizer.json` + `tokenizer_config.json` in, integers out and back.

The `tokenizers` library segments the text. This class adds the ids of end-of-sequence and padding, padding itself,
and a line between text and control: special tokens such as `<|im_end|>` appear only where the caller asks for them,
never because a user's text happens to spell one.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..directory import replacing
from ..files import FileError, expecting, read_json, write_json, write_text
from ..options import check_flags
from ..train.batches import pad_sequences
from . import chat

OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # files beside another tokenizer's
NOT_HERE = (
    "chat_template", "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
MOST_GROWTH, MOST_PATTERN = 10_000, 5_000  # see `read_backend`
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TIMES = {  # characters made of one, at most, by what has no text of its own to put
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 24, "ByteLevel": 5, "Metaspace": 2,
    "CTC": 3, "BPEDecoder": 3, "WordPiece": 2, "BertProcessing": 3, "RobertaProcessing": 3,
}  # fmt: skip
_NO_WORDS = {"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}, "added_tokens": []}
_GUARDS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # code points that Unicode keeps out of all text


class Special(str):
    """A piece that is a special token, among pieces of plain text: `[Special("<|im_start|>"), "user"]`."""

    __slots__ = ()


class Tokenizer:
    """Text to token ids and back.

    backend  a `tokenizers.Tokenizer`
    config   the content of `tokenizer_config.json`: `eos_token`, `pad_token`, `chat_template`, ...

    Attributes: `eos_token`, `pad_token` (str or None), `eos_token_id`, `pad_token_id` (int or None), `vocab_size` (ids
    are 0 .. vocab_size - 1, special tokens included), `chat_template` (a Jinja program as str, or None).
    Raises ValueError for a config whose tokens the tokenizer lacks, and for ids far above the number of tokens.
    """

    def __init__(self, backend: Any, config: dict[str, Any] | None = None):
        self.config, self.vocab_size = dict(config or {}), _size(backend)
        with of_library(ValueError, "the tokenizers library cannot write the tokenizer"):
            self._plain = _copy(backend)
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = True  # a special token's text in plain text is only text
        self._read()

    @cached_property
    def _control(self) -> Any:
        """The one that recognizes special tokens; most that are loaded never need it."""
        control = _copy(self._plain)
        control.encode_special_tokens = False
        return control

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: value for name, value in vars(self).items() if name not in ("_plain", "_control")}
        return type(self), (self._plain, self.config), kept  # for a copy of the backend forgets that special tokens are text

    def _read(self) -> None:
        """Look up what the class keeps of the vocabulary and of the config."""
        added = self._plain.get_added_tokens_decoder()
        self._special_texts = [token.content for token in added.values() if token.special]
        # longest first: where a special token's text begins with another's, the longer one is meant
        self._special = re.compile("|".join(map(re.escape, sorted(self._special_texts, key=len, reverse=True))) or "(?!)")
        self._begun = frozenset(text[:n] for text in self._special_texts for n in range(1, len(text)))
        self._most_begun = max(map(len, self._begun), default=0)  # characters
        self._special_ids = {id for id, token in added.items() if token.special}
        self.eos_token, self.eos_token_id = self._named_token("eos_token")
        self.pad_token, self.pad_token_id = self._named_token("pad_token")
        self.chat_template, self._with_tools = self._read_chat_template()

    def _named_token(self, name: str) -> tuple[str | None, int | None]:
        token = self.config.get(name)
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if token is None:
            return None, None
        if not isinstance(token, str):
            raise ValueError(f"tokenizer_config.json: {name} must be a string or an added token, got {token!r}")
        token_id = self._plain.token_to_id(token) if _is_unicode(token) else None
        if token_id is None:
            raise ValueError(f"tokenizer_config.json names {token!r} as {name}, which tokenizer.json does not have")
        return token, token_id

    def _read_chat_template(self) -> tuple[str | None, str | None]:
        """(the template, that for conversations with tools where it is another)."""
        template, named = self.config.get("chat_template"), {}
        if isinstance(template, list):  # several, each with a name
            if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
                raise ValueError("tokenizer_config.json: each chat_template of a list must be an object with a name")
            named = {entry["name"]: entry.get("template") for entry in template}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"tokenizer_config.json: chat_template must be a string, got {type(template).__name__}")
        with_tools = named.get("tool_use")
        return template, with_tools if isinstance(with_tools, str) else None

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads a Hugging Face directory's `tokenizer.json`, and `tokenizer_config.json` where there is one.

        An `eos_token` or `pad_token` that the config leaves out is taken from `special_tokens_map.json`; where
        neither file names one, its id is None. Raises FileError where `tokenizer.json` is missing (a directory with
        only `vocab.json` and `merges.txt`, or SentencePiece's `tokenizer.model`, must be converted), a file is
        damaged, or `read_backend` refuses it, and ValueError where the files contradict one another.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileError(f"{directory}: there is no tokenizer.json, the one form of tokenizer that is read")
        backend = read_backend(path)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            content = read_json(directory / name) if (directory / name).is_file() else {}
            config |= {key: value for key, value in content.items() if value is not None}
        if (directory / "chat_template.jinja").is_file():  # where newer versions of transformers put it
            with expecting("text in UTF-8", directory / "chat_template.jinja"):
                config["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, config)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads as they are.

        Another tokenizer's files of special tokens and of a template, which would be read beside them, are removed.
        """
        with replacing(directory, OTHERS) as fresh:
            write_text(fresh / "tokenizer.json", self._control.to_str(pretty=True) + "\n")
            write_json(fresh / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **self.config})

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_token={self.eos_token!r}, pad_token={self.pad_token!r})"

    def add_tokens(self, tokens: Sequence[str], special_tokens: bool = False) -> int:
        """Give these texts ids of their own, after all others; how many are new. As in transformers.

        An added token is one token wherever its text stands; with `special_tokens` only where it is asked for, like
        `<|im_end|>`. One that the vocabulary has keeps its id. The model needs as many rows:

            tokenizer.add_tokens(["<think>", "</think>"])
            model.resize_token_embeddings(tokenizer.vocab_size)

        Raises TypeError for what is no list of texts, ValueError for an empty one.
        """
        import tokenizers

        if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
            raise TypeError(f"tokens to add must be a list of texts, got {tokens!r}")
        if "" in tokens:
            raise ValueError("a token to add is empty")
        before = self.vocab_size
        added = [tokenizers.AddedToken(t, special=special_tokens, normalized=not special_tokens) for t in tokens]
        for backend in (self._plain, self._control):
            (backend.add_special_tokens if special_tokens else backend.add_tokens)(added)
        self.vocab_size = _size(self._plain)
        self._read()
        return self.vocab_size - before

    def add_special_tokens(self, special_tokens: Mapping[str, str | Sequence[str]]) -> int:
        """Add special tokens by what they are for, such as {"pad_token": "<pad>"}; how many are new.

        Names: "eos_token", "pad_token", "bos_token", and "additional_special_tokens", a list. Raises ValueError for
        another name, and as `add_tokens`.
        """
        known = ("eos_token", "pad_token", "bos_token")
        for name in special_tokens:
            if name not in (*known, "additional_special_tokens"):
                raise ValueError(f"special tokens are {', '.join(known)} and additional_special_tokens; not {name!r}")
        more = special_tokens.get("additional_special_tokens", ())
        if isinstance(more, str):
            raise TypeError(f"additional_special_tokens must be a list of texts, got {more!r}")
        named = {name: special_tokens[name] for name in known if name in special_tokens}
        count = self.add_tokens([*named.values(), *more], special_tokens=True)
        self.config |= named
        self._read()
        return count

    def token_to_id(self, token: str) -> int:
        """The id of one token; ValueError where the vocabulary does not have it."""
        token_id = self._plain.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return token_id

    def id_to_token(self, token_id: int) -> str:
        """One token as the vocabulary spells it; ValueError for an id outside it."""
        token = self._plain.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise ValueError(f"token ids are 0 to {self.vocab_size - 1}, got {token_id}")
        return token

    def encode(self, text: str, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        allow_special       False: `text` is only text; `<|im_end|>` in it becomes several ordinary tokens, so nobody
                            can end a turn by typing its marker. True: special tokens are recognized, as in Hugging
                            Face. (Added tokens that are not marked special are ordinary words, always recognized.)
        add_special_tokens  True: also what the tokenizer's own post-processor adds, a Llama's BOS for example.

        Raises as `encode_batch`.
        """
        return self.encode_batch([text], allow_special, add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], allow_special: bool = False, add_special_tokens: bool = False
    ) -> list[list[int]]:
        """`encode` of many texts, on several threads.

        Raises TypeError for what is no str, and for a str as True or False; ValueError for a text that is not valid
        Unicode, or that has no tokens here.
        """
        check_flags(allow_special=allow_special, add_special_tokens=add_special_tokens)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text to encode must be a str, got {type(text).__name__}")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"text to encode is not valid Unicode: {error}") from error
        backend = self._control if allow_special else self._plain
        with of_library(ValueError, "the tokenizer cannot encode this"):
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def encode_pieces(self, pieces: Iterable[str], add_special_tokens: bool = False, apart: bool = False) -> list[int]:
        """Token ids of a rendered template: `Special` pieces become special tokens, all other pieces are plain text.

        Equals `encode("".join(pieces), allow_special=True)` unless a plain piece spells a special token, or `apart`; then
        each run of plain text between special tokens is encoded by itself. `add_special_tokens` adds what the tokenizer
        puts before a text, and nothing after it, as the pieces are to be continued; nor anything to pieces that begin
        with a special token: they say themselves how a text begins. Raises ValueError where a Special piece is not a
        token of this tokenizer.
        """
        runs = _runs(pieces)
        for run in runs:
            if isinstance(run, Special):
                self.token_to_id(run)
        if not (apart or self.spells_special(runs)):
            ids = self.encode("".join(runs), True)
        else:
            ids = [i for run in runs for i in ([self.token_to_id(run)] if isinstance(run, Special) else self.encode(run))]
        if add_special_tokens and not (runs and isinstance(runs[0], Special)):
            begun = self._plain.encode("".join(runs)[:1], add_special_tokens=True)  # of its beginning, which is enough
            return begun.ids[: [*begun.special_tokens_mask, 0].index(0)] + ids
        return ids

    def spells_special(self, pieces: Iterable[str]) -> bool:
        """Whether plain text among the pieces spells a special token."""
        plain = [run for run in _runs(pieces) if not isinstance(run, Special)]
        return any(text in run for run in plain for text in self._special_texts)

    def apply_chat_template(
        self, messages: Sequence[Any], add_generation_prompt: bool = False, tokenize: bool = True, **variables: Any
    ) -> list[int] | str:
        """A conversation as the model's own chat template writes it: token ids, or the text with `tokenize=False`.

        messages               [{"role": "user", "content": "..."}, ...] or `Message`s
        add_generation_prompt  whether the opening of the assistant's answer follows, for the model to continue
        variables              further names for the template

        As in Hugging Face, except that a message that spells a special token stays text. Raises ValueError where the
        tokenizer has no template, or the template cannot write these messages; TypeError for arguments of Hugging
        Face's that this has not, and a text as True or False.
        """
        check_flags(add_generation_prompt=add_generation_prompt, tokenize=tokenize)
        if missing := [name for name in NOT_HERE if name in variables]:
            raise TypeError(f"apply_chat_template has no argument {missing[0]!r} here; other names are the template's variables")
        pieces = self.chat_pieces(messages, add_generation_prompt, **variables)
        return self.encode_pieces(pieces) if tokenize else "".join(pieces)

    def chat_pieces(
        self, messages: Sequence[Any], add_generation_prompt: bool = False, **variables: Any
    ) -> tuple[str, ...]:
        """The pieces of `apply_chat_template`; a special token that the template wrote is a `Special`.

        Raises ValueError as that does, TypeError for what is no message.
        """
        template = self.chat_template if variables.get("tools") is None else self._with_tools or self.chat_template
        if template is None:
            raise ValueError("the tokenizer has no chat template")
        content = [_as_mapping(message) for message in messages]
        said = json.dumps((content, variables), ensure_ascii=False, default=repr)  # repr escapes these characters
        guard = next((mark for mark in _GUARDS if mark not in said), None)
        if guard is None:
            raise ValueError(f"the messages hold all of the code points {_GUARDS!r}, which stand for no characters")
        hidden: dict[str, str] = {}

        def mark(text: str) -> str:
            hidden[place := f"{guard}{len(hidden)}{guard}"] = text
            return place

        def hide(value: Any, field: Any = None) -> Any:
            """A value without the special tokens' texts in it, so that each one in the result is the template's."""
            if isinstance(value, str):
                value = self._special.sub(lambda found: mark(found[0]), value)
                text = value.rstrip()  # as a template may do; what follows then could end a token that is begun here
                lengths = range(min(len(text), self._most_begun), 0, -1)
                n = next((n for n in lengths if text[-n:] in self._begun), 0) if field not in ("role", "type") else 0
                return text[: len(text) - n] + mark(text[-n:]) + value[len(text) :] if n else value
            if isinstance(value, Mapping):  # fields are asked for by their names, roles and types by their words
                return {hide(key, "type"): hide(item, key) for key, item in value.items()}
            return [hide(item) for item in value] if isinstance(value, list | tuple) else value

        names = {key: text for key in ("bos_token", "eos_token", "pad_token") if (text := self._named_token(key)[0])}
        variables = names | {key: hide(value) for key, value in variables.items()}
        text = chat.render(template, hide(content), add_generation_prompt=add_generation_prompt, **variables)
        pieces = [  # plain text and special tokens take turns
            Special(piece) if i % 2 else re.sub(f"{guard}\\d+{guard}", lambda m: hidden.get(m[0], m[0]), piece)
            for i, piece in enumerate(re.split(f"({self._special.pattern})", text))
        ]
        return tuple(filter(None, pieces))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` (any sequence or 1-D array of integers). Bytes that are no UTF-8 decode to U+FFFD.

        Raises ValueError for an id outside of the vocabulary.
        """
        ids, size = [int(token_id) for token_id in ids], self.vocab_size
        wrong = next((token_id for token_id in ids if not 0 <= token_id < size), None)
        if wrong is not None:
            raise ValueError(f"token ids are 0 to {size - 1}, got {wrong}")
        skipped = self._special_ids if skip_special_tokens else ()
        with of_library(ValueError, "the tokenizer cannot decode this"):
            return self._plain.decode([i for i in ids if i not in skipped], skip_special_tokens=False)

    def pad(self, sequences: Sequence[Sequence[int]], side: str = "right") -> tuple[np.ndarray, np.ndarray]:
        """`(ids, mask)`, int64 [batch, longest]: sequences filled up with the padding token, 1 where a token is real.

        side  "right" for training, "left" for generation (the last column is then everyone's last token).

        Raises ValueError for another side, and for a tokenizer that names neither a padding nor an EOS token.
        """
        pad_id = self.pad_token_id if self.pad_token_id is not None else self.eos_token_id
        if pad_id is None:
            raise ValueError("the tokenizer names neither a padding nor an end-of-sequence token to pad with")
        return pad_sequences(sequences, pad_id, side)


def _as_mapping(message: Any) -> Mapping[str, Any]:
    fields = message._asdict() if hasattr(message, "_asdict") else message
    if not isinstance(fields, Mapping) or not isinstance(fields.get("role"), str):
        raise TypeError(f'a message must be a mapping with "role" and "content", got {message!r}')
    return fields


@contextmanager
def of_library(error: type[ValueError], what: str) -> Iterator[None]:
    """Inside, what the tokenizers library raises, bare Exception or a panic of Rust's, becomes an `error`."""
    try:
        yield
    except error:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise error(f"{what} ({e})") from e


def read_backend(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json.

    Raises FileError for a damaged file, for a part that may make a text more than MOST_GROWTH times as long (without memory
    for that, the library ends the process), and for more than MOST_PATTERN characters of regular expressions, which may
    take a time that grows with the square of their number.
    """
    import tokenizers

    content = read_json(path)
    if (length := _patterns([content.get(name) for name in _PARTS])) > MOST_PATTERN:
        raise FileError(f"{path}: its regular expressions have {length:,} characters; at most {MOST_PATTERN:,} are supported")
    with of_library(FileError, f"{path}: not a tokenizer that the tokenizers library reads"):
        parts = tokenizers.Tokenizer.from_str(json.dumps(content | _NO_WORDS))  # the added tokens would be normalized
        for name in _PARTS:
            part = getattr(parts, name)
            if part is not None and _growth(json.loads(part.__getstate__())) > MOST_GROWTH:
                raise FileError(f"{path}: its {name} may make a text more than {MOST_GROWTH:,} times as long")
        return tokenizers.Tokenizer.from_str(json.dumps(content))


def _patterns(value: Any) -> int:
    """Characters of all regular expressions in JSON's values."""
    if isinstance(value, dict):
        return sum(len(v) if k == "Regex" and isinstance(v, str) else _patterns(v) for k, v in value.items())
    return sum(map(_patterns, value)) if isinstance(value, list) else 0


def _growth(part: dict[str, Any]) -> float:
    """At most how many characters (of a post-processor, tokens) a part of a tokenizer makes of one."""
    kind = part["type"]
    if kind == "Sequence":
        (inner,) = (value for value in part.values() if isinstance(value, list))
        return math.prod(map(_growth, inner), start=1.0)
    if kind == "Replace":  # a pattern may match the empty text, before and after each character
        text, put = part["pattern"].get("String"), len(part["content"])
        return max(1, put / len(text)) if text else 1 + 2 * put
    if kind == "Prepend":
        return 1 + len(part["prepend"])
    if kind == "Precompiled":  # the size of a trie, the trie, and what it puts, each ended by a zero
        data = base64.b64decode(part["precompiled_charsmap"])
        return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].decode("utf-8", "replace").split("\0")), default=1)
    if kind == "TemplateProcessing":
        return len(part["single"]) * max([1, *(len(token["ids"]) for token in part["special_tokens"].values())])
    return _TIMES.get(kind, 1)


def _size(backend: Any) -> int:
    """One more than the highest id; some below may be no token's. The library takes memory for all of them."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if highest >= max(2 * len(ids), 1 << 16):
        raise ValueError(f"the tokenizer has {len(ids)} tokens, but ids up to {highest}")
    return highest + 1


def _is_unicode(text: str) -> bool:
    """Whether a text has no halves of surrogate pairs, which UTF-8 does not have either."""
    return text == text.encode("utf-8", "ignore").decode("utf-8")


def _copy(backend: Any) -> Any:
    return type(backend).from_str(backend.to_str())


def _runs(pieces: Iterable[str]) -> list[str]:
    """The pieces, plain ones that follow one another as one."""
    runs: list[str] = []
    for piece in pieces:
        if isinstance(piece, Special) or not runs or isinstance(runs[-1], Special):
            runs.append(piece)
        else:
            runs[-1] += piece
    return runs
