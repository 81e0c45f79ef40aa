"""Let a model continue text: the shipped base, or any saved model, with or without an adapter.

A prompt comes from --prompt (may be repeated), from a file, or from standard input. A model or adapter that finetune or
sft wrote is asked in the template that it was trained with (--template plain shows it the prompt as it is). Without
--temperature the most probable token is taken each time. On a terminal a single prompt's text appears as it is written.

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
  echo "It was" | minipeft generate --max-new-tokens 40
  minipeft generate --prompts questions.txt --json > answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from ..options import add_options, check, configuration, from_arguments, option
from .arguments import add_machine, add_model
from .models import load_model


@configuration(kw_only=True)
class Drawing:
    """How a text is continued. Raises ValueError for a top_k or top_p at temperature 0."""

    max_new_tokens: int = option(100, "tokens to add at most", least=1)
    temperature: float = option(0.0, "0 is greedy", least=0, metavar="T")
    top_k: int | None = option(None, "draw from the K most probable tokens", least=0, metavar="K")
    top_p: float | None = option(None, "draw from the fewest tokens of mass P", above=0, most=1, metavar="P")
    seed: int = option(0, "seed of the draw", least=0)
    batch_size: int = option(8, "prompts at a time", least=1)

    def options(self) -> dict[str, Any]:
        """What `generate` and `generate_stream` take of it, but for the seed."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")}

    def __post_init__(self) -> None:
        check(self)
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise ValueError("--top-k and --top-p limit a random draw; give --temperature above 0 with them")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=" to put on the model")
    parser.add_argument(
        "--load-in-4bit", action="store_true", help="hold the linear layers in 4 bits, as in --method qlora"
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given again")
    group.add_argument(
        "--prompts", metavar="FILE", help="prompts from a .txt file, one a line, or from the 'prompt's of a .jsonl file"
    )
    group.add_argument("--escapes", action="store_true", help=r"read \n and \t in --prompt as line break and tab")
    group.add_argument(
        "--template", metavar="NAME|TEXT",
        help="plain, alpaca, chatml, chat or a text with {prompt}, for the prompts (default: as in training)",
    )  # fmt: skip
    group.add_argument("--chat", action="store_true", help="talk to the model: one message, or a conversation")
    group.add_argument("--system", metavar="TEXT", help="with --chat: a system message before it")
    group = parser.add_argument_group("generation")
    add_options(group, Drawing)
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
    drawing = from_arguments(Drawing, args)

    from .prompts import stop_tokens

    if args.chat and not (args.prompt or args.prompts):
        return _converse(args, drawing)
    prompts = _prompts(args)
    model, tokenizer = load_model(args.model, args.backend, args.load_in_4bit, args.adapter)
    turns = [_turn(prompt, args, tokenizer) for prompt in prompts]
    stop_token_ids = stop_tokens(model, tokenizer, turns[0])
    encoded = [tokenizer.encode_pieces(turn.prompt, add_special_tokens=True) for turn in turns]
    echo = not args.completion_only and turns[0].prompt == (prompts[0],)

    if len(prompts) == 1 and sys.stdout.isatty() and not args.json:
        sys.stdout.write(prompts[0] if echo else "")
        for text in stream_text(model, tokenizer, encoded[0], drawing, stop_token_ids):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return 0
    for prompt, completion in zip(prompts, _completions(model, tokenizer, encoded, drawing, stop_token_ids)):
        if args.json:
            print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False), flush=True)
        else:
            print(prompt + completion if echo else completion, flush=True)
    return 0


def _converse(args: argparse.Namespace, drawing: Drawing) -> int:
    """Answer one line of standard input after the other, each with the whole conversation before it in view."""
    from ..text.datasets import Message
    from ..text.templates import chat, chat_prompt
    from .prompts import asked, stop_tokens

    model, tokenizer = load_model(args.model, args.backend, args.load_in_4bit, args.adapter)
    stop_token_ids = stop_tokens(model, tokenizer, asked(chat(tokenizer), "-"))
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
        for text in stream_text(model, tokenizer, prompt, drawing, stop_token_ids):
            answer += text
            if not args.json:
                print(text, end="", flush=True)
        print(json.dumps({"prompt": said, "completion": answer}, ensure_ascii=False) if args.json else "", flush=True)
        messages.append(Message("assistant", answer))


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts as text, from exactly one of the three sources."""
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
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} is empty; a prompt needs some text")
    return prompts


def _turn(prompt: str, args: argparse.Namespace, tokenizer: Any) -> Any:
    """What the model is shown, and a completion that ends as an answer to it does."""
    from ..text.datasets import Conversation, Message
    from ..text.templates import chat, get_template
    from .prompts import asked, saved_template

    if not args.chat:
        name = args.template or saved_template(args.adapter) or saved_template(args.model) or "plain"
        return asked(get_template(name.replace("\\n", "\n"), tokenizer), prompt)
    system = [Message("system", args.system)] if args.system is not None else []
    return chat(tokenizer)(Conversation((*system, Message("user", prompt), Message("assistant", "-"))))[0]


def _completions(
    model: Any, tokenizer: Any, encoded: list[list[int]], d: Drawing, stop_token_ids: list[int]
) -> Iterator[str]:
    """The completions in order, computed in batches; what is drawn for a prompt does not depend on the batch size."""
    from ..backend import Rng
    from ..nn.generation import generate
    from ..text.tokenizer import pad_sequences

    for start in range(0, len(encoded), d.batch_size):
        ids, mask = pad_sequences(encoded[start : start + d.batch_size], 0, side="left")
        stream = Rng(d.seed, first_row=start)
        out = generate(model, ids, mask, seed=stream, eos_token_id=stop_token_ids, **d.options())
        for row in out[:, ids.shape[1] :].tolist():
            yield tokenizer.decode(list(takewhile(lambda token: token not in stop_token_ids, row)))


def stream_text(model: Any, tokenizer: Any, prompt: list[int], d: Drawing, stop_token_ids: list[int]) -> Iterator[str]:
    """The continuation of one prompt, in pieces of text as its tokens come; a character split over tokens waits."""
    from ..nn.generation import generate_stream

    tokens: list[int] = []
    shown = ""
    for token in generate_stream(model, [prompt], seed=d.seed, eos_token_id=stop_token_ids, **d.options()):
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
