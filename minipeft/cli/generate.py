"""Let a model continue text, with or without adapters.

A prompt comes from --prompt (may be repeated), from a file, or from standard input. Of a file's records, of any form
that finetune, dpo or evaluate take, only what they ask is shown to the model. A model or adapter that finetune or sft
wrote is asked in the template that it was trained with (--template plain shows it the prompt as it is). Without
--temperature the most probable token is taken each time. On a terminal a single prompt's text appears as it is written.

Several adapters on one model answer every prompt, all in one batch, each as it does alone, after a line "==> DIR <=="
(with --json "adapter" is a field).

With --chat a prompt is a message to the model, put in the chat template that comes with it (ChatML where there is
none); a note says where it was trained in another template. Without a prompt it is a conversation: each line of
standard input is a message, answered before the next is read; it ends with /exit or at the end of the input (Ctrl-D).
Where it outgrows the model's positions, the oldest messages are left out, with their answers.

examples:
  minipeft generate --prompt "It was a fine morning"
  minipeft generate --prompt "Word: garden (noun)\\nMeaning:" --escapes --completion-only
  minipeft generate --model tuned --temperature 0.8 --top-p 0.9 --seed 1 --prompt "Once"
  minipeft generate --model tuned --chat --prompt "What is a dog?"
  minipeft generate --model SmolLM2-135M-Instruct.Q4_1.gguf --chat
  minipeft generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter tuned --load-in-4bit --chat
  minipeft generate --adapter poems recipes letters --prompt "A cup of tea"
  echo "It was" | minipeft generate --max-new-tokens 40
  minipeft generate --prompts questions.txt --json > answers.jsonl
  minipeft generate --adapter tuned --prompts my.jsonl --completion-only     the file that finetune was given
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, product
from typing import Any

import minipeft as mp

from ..evaluation.config import GenerationConfig
from ..options import configuration, from_arguments, option
from . import runs
from .arguments import Arguments, Common, Parser, add_machine
from .data import columns_of
from .models import load_model, usual_template


@configuration(kw_only=True)
class PromptOptions:
    """What the model is asked, and how its answers are shown."""

    adapter: list[str] | None = option(None, "an adapter directory; or several, which all answer", metavar="DIR")
    prompts: str | None = option(None, "a .txt file of prompts, one a line, or a .jsonl of records", metavar="FILE")
    escapes: bool = option(False, r"read \n and \t in --prompt as line break and tab")
    chat: bool = option(False, "talk to the model: one message, or a conversation")
    system: str | None = option(None, "with --chat: a system message before it")
    completion_only: bool = option(False, "leave out the prompt (templates always do)")


def add_arguments(parser: Parser) -> None:
    parser.options(Common, "model", "load_in_4bit")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given again")
    parser.options(PromptOptions)
    parser.options(Common, "columns")
    parser.options(Common, "template", "json", json='one line {"prompt": ..., "completion": ...} a prompt')
    parser.options(GenerationConfig, group="generation")
    add_machine(parser)


def run(args: Arguments) -> None:
    args.only_one("chat", "template")
    args.only_one("prompt", "prompts")
    args.only_one("json", "completion_only")
    if not args.chat:
        args.refuse(("system",), "without --chat")
    if not args.prompts:
        args.refuse(("columns",), "without --prompts")
    if not args.prompt:
        args.refuse(("escapes",), "without --prompt: files and standard input have real line breaks")
    config, several = from_arguments(GenerationConfig, args), len(args.adapter or ()) > 1
    conversation = args.chat and not (args.prompt or args.prompts)
    if conversation and several:
        raise ValueError("a conversation is with one --adapter; several answer what --prompt or --prompts ask")
    asked = None if conversation else _prompts(args)
    model, tokenizer = load_model(args)
    for adapter in (args.adapter or [None]) if args.chat else ():
        _note_other_template(args, adapter, tokenizer)
    if asked is None:
        return _converse(args, config, model, tokenizer)

    prompts = [mp.text.templates.question_and_answer(prompt)[0] for prompt in asked]
    adapters = args.adapter or [None]
    by_adapter = [mp.evaluation.asked_turns(asked, _template(args, a, tokenizer), tokenizer) for a in adapters]
    turns = list(chain(*zip(*by_adapter)))  # of the first prompt for each adapter, of the second, ...
    if len(turns) == 1 and sys.stdout.isatty() and not args.json:
        ends = mp.evaluation.stop_tokens(model, tokenizer, turns[0])
        answers: Iterable[Iterable[str]] = [stream_text(model, tokenizer, turns[0].prompt, config, ends)]
    else:
        names = list(model.peft_config) * len(prompts) if several else None
        answers = ([text] for text in mp.evaluation.answer_turns(model, tokenizer, turns, config, names))
    for (prompt, adapter), turn, pieces in zip(product(prompts, adapters), turns, answers):
        if args.json:
            record = ({"adapter": adapter} if several else {}) | {"prompt": prompt, "completion": "".join(pieces)}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            shown = prompt if not args.completion_only and turn.prompt == (prompt,) else ""
            print(f"==> {adapter} <==\n" * several + shown, end="", flush=True)
            print_pieces(pieces)
            print(flush=True)


def _converse(args: Arguments, config: GenerationConfig, model: Any, tokenizer: Any) -> None:
    """Answer one line of standard input after the other, each with all of the conversation before it that fits in view.

    The oldest messages leave with their answers; the system message stays. One that does not fit alone is not answered.
    """
    Message, templates = mp.text.datasets.Message, mp.text.templates
    turns = mp.evaluation.asked_turns(["-"], templates.chat(tokenizer))
    ends = mp.evaluation.stop_tokens(model, tokenizer, *turns)
    system = [Message("system", args.system)] if args.system is not None else []
    room = model.config.max_position_embeddings - getattr(model, "virtual_tokens", 0) - config.max_new_tokens
    messages: list[Any] = []  # of the user and of the model in turn
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print("(a line is a message; /exit or Ctrl-D ends the conversation)", file=sys.stderr)
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/exit":
            return
        if not said:
            continue
        asked = [*messages, Message("user", said)]
        for first in range(0, len(asked), 2):
            written = templates.chat_prompt([*system, *asked[first:]], tokenizer)
            if (size := len(tokenizer.encode_pieces(written, add_special_tokens=True))) <= room:
                break
        else:
            fits = f"at most {max(0, room)} fit beside --max-new-tokens {config.max_new_tokens}"
            print(f"(not answered: the message makes a prompt of {size} tokens; {fits})", file=sys.stderr)
            continue
        if first:
            print(f"(the conversation is full: its oldest {first} messages are left out)", file=sys.stderr)
        messages = asked[first:]
        pieces = stream_text(model, tokenizer, written, config, ends)
        answer = "".join(pieces) if args.json else print_pieces(pieces)
        print(json.dumps({"prompt": said, "completion": answer}, ensure_ascii=False) if args.json else "", flush=True)
        messages.append(Message("assistant", answer))


def _prompts(args: Arguments) -> list[Any]:
    """The prompts, texts or records, from one of the three sources; with --chat as conversations.

    A system message stands before each, in place of one that is there.
    """
    if args.prompt:
        prompts = [p.replace("\\n", "\n").replace("\\t", "\t") if args.escapes else p for p in args.prompt]
    elif args.prompts:
        prompts = mp.text.datasets.read_prompts(args.prompts, columns_of(args.columns))
    else:
        if sys.stdin.isatty():
            print("(the prompt is read from standard input; end it with Ctrl-D)", file=sys.stderr)
        prompts = [sys.stdin.read().removesuffix("\n")]
    if not args.chat:
        return prompts
    forms, found = mp.text.datasets, [mp.text.templates.as_messages(prompt) for prompt in prompts]
    if args.system is not None:
        system = forms.Message("system", args.system)
        found = [(system, *(message for message in own if message.role != "system")) for own in found]
    return [forms.Conversation(messages) for messages in found]


def _template(args: Arguments, adapter: str | None, tokenizer: Any) -> Any:
    """The one asked for, or that the adapter or model was trained in; None for the usual one of each prompt's form."""
    name = "chat" if args.chat else usual_template(args, adapter)
    return name and mp.text.templates.get_template(name, tokenizer)


def _note_other_template(args: Arguments, adapter: str | None, tokenizer: Any) -> None:
    """A line on standard error where --chat does not ask in the template that the adapter or model was trained in."""
    trained, templates = usual_template(args, adapter), mp.text.templates
    own = templates.chat(tokenizer)
    if trained not in (None, "chat") and templates.get_template(trained, tokenizer) is not own:
        asked = "ChatML" if own is templates.chatml else "the tokenizer's chat template"
        what = f"{adapter or args.model} was trained in the template {trained!r}, and --chat asks in {asked}"
        runs.note(f"{what}: for answers as trained, leave --chat out")


def print_pieces(pieces: Iterable[str]) -> str:
    """The text of the pieces, each of which is shown as it comes."""
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    return text


def stream_text(model: Any, tokenizer: Any, prompt: Any, config: GenerationConfig, ends: list[int]) -> Iterator[str]:
    """The continuation of one prompt, in pieces of text as its tokens come; a character split over tokens waits."""
    ids, tokens, shown = tokenizer.encode_pieces(prompt, add_special_tokens=True), [], ""
    options = {"seed": config.seed, "eos_token_id": ends, **config.options()}
    for token in mp.nn.generation.generate_stream(model, [ids], **options):
        if int(token[0]) in ends:
            break
        tokens.append(int(token[0]))
        text = tokenizer.decode(tokens)
        if not text.endswith("�"):  # the first bytes of a character whose rest is yet to come
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(tokens)[len(shown) :]
