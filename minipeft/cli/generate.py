"""Let a model continue text: the shipped base, or any saved model, with or without an adapter.

A prompt comes from --prompt (may be repeated), from a file, or from standard input. Of a file's records, of any form
that finetune, dpo or evaluate take, only what they ask is shown to the model. A model or adapter that finetune or sft
wrote is asked in the template that it was trained with (--template plain shows it the prompt as it is). Without
--temperature the most probable token is taken each time. On a terminal a single prompt's text appears as it is written.

Several adapters on one model answer every prompt, all in one batch, each as it does alone, after a line "==> DIR <=="
(with --json "adapter" is a field).

With --chat a prompt is a message to the model, put in the chat template that comes with it (ChatML where there is
none). Without a prompt it is a conversation: each line of standard input is a message, answered before the next is
read; it ends with /exit or at the end of the input (Ctrl-D).

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

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

from ..evaluation.config import GenerationConfig
from ..options import add_options, from_arguments
from .arguments import add_machine, add_model
from .models import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--adapter", nargs="+", action="extend", default=[], metavar="DIR",
        help="an adapter directory to put on the model; or several, each of which answers every prompt",
    )  # fmt: skip
    parser.add_argument(
        "--load-in-4bit", action="store_true",
        help="hold the linear layers in 4 bits, as in --method qlora (an adapter that was trained so needs no flag)",
    )  # fmt: skip
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given again")
    group.add_argument(
        "--prompts", metavar="FILE", help="prompts from a .txt file, one a line, or from the records of a .jsonl file"
    )
    group.add_argument("--escapes", action="store_true", help=r"read \n and \t in --prompt as line break and tab")
    group.add_argument(
        "--template", metavar="NAME|TEXT",
        help="plain, alpaca, chatml, chat or a text with {prompt}, for the prompts (default: as in training)",
    )  # fmt: skip
    group.add_argument("--chat", action="store_true", help="talk to the model: one message, or a conversation")
    group.add_argument("--system", metavar="TEXT", help="with --chat: a system message before it")
    group = parser.add_argument_group("generation")
    add_options(group, GenerationConfig)
    group = parser.add_argument_group("output")
    group.add_argument("--completion-only", action="store_true", help="leave out the prompt (templates always do)")
    group.add_argument("--json", action="store_true", help='one line {"prompt": ..., "completion": ...} a prompt')
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise ValueError("--system goes with --chat")
    if args.chat and args.template is not None:
        raise ValueError("--chat is a template; give either --chat or --template")
    if args.escapes and not args.prompt:
        raise ValueError(r"--escapes reads \n and \t in --prompt; files and standard input have real line breaks")
    if args.json and args.completion_only:
        raise ValueError("--json has prompt and completion in fields of their own; leave out --completion-only")
    config = from_arguments(GenerationConfig, args)

    from ..evaluation import answer_turns, asked_turns, stop_tokens
    from ..text.templates import question_and_answer

    if args.chat and not (args.prompt or args.prompts):
        if len(args.adapter) > 1:
            raise ValueError("a conversation is with one --adapter; several answer what --prompt or --prompts ask")
        return _converse(args, config)
    asked = _prompts(args)
    model, tokenizer = load_model(args.model, args.backend, args.load_in_4bit or None, args.adapter)
    asked = _in_chat(asked, args.system) if args.chat else asked
    prompts = [question_and_answer(prompt)[0] for prompt in asked]
    several = len(args.adapter) > 1
    adapters = args.adapter or [None]
    by_adapter = [asked_turns(asked, _template(args, adapter, tokenizer), tokenizer) for adapter in adapters]
    turns = list(chain(*zip(*by_adapter)))  # of the first prompt for each adapter, of the second, ...
    names = list(model.peft_config) * len(prompts) if several else None

    def shown(prompt: str, turn: Any) -> str:
        return prompt if not args.completion_only and turn.prompt == (prompt,) else ""

    if len(turns) == 1 and sys.stdout.isatty() and not args.json:
        sys.stdout.write(shown(prompts[0], turns[0]))
        ids = tokenizer.encode_pieces(turns[0].prompt, add_special_tokens=True)
        for text in stream_text(model, tokenizer, ids, config, stop_tokens(model, tokenizer, turns[0])):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0
    answers = answer_turns(model, tokenizer, turns, config, names)
    for (prompt, adapter), turn, completion in zip(product(prompts, adapters), turns, answers):
        if args.json:
            record = {"prompt": prompt, "completion": completion}
            print(json.dumps({"adapter": adapter, **record} if several else record, ensure_ascii=False), flush=True)
        else:
            print(f"==> {adapter} <==\n" * several + shown(prompt, turn) + completion, flush=True)
    return 0


def _converse(args: argparse.Namespace, config: GenerationConfig) -> int:
    """Answer one line of standard input after the other, each with the whole conversation before it in view."""
    from ..evaluation import asked_turns, stop_tokens
    from ..text.datasets import Message
    from ..text.templates import chat, chat_prompt

    model, tokenizer = load_model(args.model, args.backend, args.load_in_4bit or None, args.adapter)
    stop_token_ids = stop_tokens(model, tokenizer, *asked_turns(["-"], chat(tokenizer)))
    messages = [Message("system", args.system)] if args.system is not None else []
    terminal = sys.stdin.isatty()
    if terminal:
        print("(a line is a message; /exit or Ctrl-D ends the conversation)", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/exit":
            return 0
        if not said:
            continue
        messages.append(Message("user", said))
        prompt = tokenizer.encode_pieces(chat_prompt(messages, tokenizer), add_special_tokens=True)
        answer = ""
        for text in stream_text(model, tokenizer, prompt, config, stop_token_ids):
            answer += text
            if not args.json:
                print(text, end="", flush=True)
        print(json.dumps({"prompt": said, "completion": answer}, ensure_ascii=False) if args.json else "", flush=True)
        messages.append(Message("assistant", answer))


def _prompts(args: argparse.Namespace) -> list[Any]:
    """The prompts, texts or records, from exactly one of the three sources."""
    if args.prompt and args.prompts:
        raise ValueError("give either --prompt or --prompts, not both")
    if args.prompt:
        prompts = [p.replace("\\n", "\n").replace("\\t", "\t") if args.escapes else p for p in args.prompt]
    elif args.prompts:
        from ..text.datasets import read_prompts

        prompts = read_prompts(args.prompts)
    else:
        if sys.stdin.isatty():
            print("(the prompt is read from standard input; end it with Ctrl-D)", file=sys.stderr)
        prompts = [sys.stdin.read().removesuffix("\n")]
    return prompts


def _template(args: argparse.Namespace, adapter: str | None, tokenizer: Any) -> Any:
    """The one asked for, or that the adapter or model was trained in; None for the usual one of each prompt's form."""
    from ..text.templates import chat, get_template
    from .prompts import usual_template

    if args.chat:
        return chat(tokenizer)
    name = usual_template(args, adapter)
    return name and get_template(name, tokenizer)


def _in_chat(prompts: list[Any], system: str | None) -> list[Any]:
    """The prompts as conversations, with the system message before each, in place of one that is there."""
    from ..text.datasets import Conversation, Message
    from ..text.templates import as_messages

    before = () if system is None else (Message("system", system),)
    return [Conversation((*before, *(m for m in as_messages(p) if not before or m.role != "system"))) for p in prompts]


def stream_text(
    model: Any, tokenizer: Any, prompt: list[int], config: GenerationConfig, stop_token_ids: list[int]
) -> Iterator[str]:
    """The continuation of one prompt, in pieces of text as its tokens come; a character split over tokens waits."""
    from ..nn.generation import generate_stream

    tokens: list[int] = []
    shown = ""
    for token in generate_stream(model, [prompt], seed=config.seed, eos_token_id=stop_token_ids, **config.options()):
        if int(token[0]) in stop_token_ids:
            break
        tokens.append(int(token[0]))
        text = tokenizer.decode(tokens)
        if not text.endswith("�"):  # the first bytes of a character whose rest is yet to come
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(tokens)[len(shown) :]
    if rest:
        yield rest
