"""Chat templates: the Jinja program that comes with a model's tokenizer and writes a conversation as the model knows it.

A template is a stranger's code, so it runs in Jinja's immutable sandbox: it can read its variables and write text,
and do nothing else. Beside Jinja itself it may use what `transformers` offers: `raise_exception`, `strftime_now`, the
filter `tojson`, `break` and `continue`, and the mark `generation`. Blocks are trimmed as in `transformers`.

The sandbox does not keep a program from running, or writing, without end. So the templates are rendered in a process of
their own, this file, which the system limits (not on Windows): one line of JSON in, one line out, until its input ends.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

SECONDS, MEGABYTES, CHARACTERS = 1.0, 512, 1 << 24  # of the processor; of memory; of what is written


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text that a chat template makes of messages, each a mapping with "role" and "content".

    `variables` are further names that it may use: add_generation_prompt, bos_token, eos_token, tools, ... Raises
    ValueError for a template that is not valid, that refuses the messages (because user and assistant do not take
    turns, say), that tries something that the sandbox forbids, or takes more than a second of the processor, 512 MB of
    memory or 2^24 characters; TypeError for variables that JSON does not have.
    """
    given = {"template": template, "messages": list(map(dict, messages)), "variables": variables}
    answer = _renderer.ask(json.dumps(given).encode() + b"\n")
    if "text" not in answer:
        raise ValueError(f"the chat template {answer['problem']}")
    return answer["text"]


class _Renderer:
    """The process, started when it is first needed, and again when it has died."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), None

    def ask(self, line: bytes) -> dict[str, str]:
        """The answer to one line."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
                command, pipe = [sys.executable, "-P", __file__], subprocess.PIPE
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=path)
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BaseException:  # an interrupt: the answer would be taken for that to the next line
                self.stop()
                raise
            if not answer:  # it has been killed, or is about to be
                self.stop()
        return json.loads(answer or f'{{"problem": "takes more than {SECONDS:g} s of the processor, or too much memory"}}')

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):  # what was not sent yet
                    pipe.close()
            self._process = None


_renderer = _Renderer()
atexit.register(_renderer.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renderer.__init__)  # the process is the parent's


# ---------------------------------------------------------------------------------------------------------- the process


def _main() -> None:
    with suppress(ImportError, ValueError):  # Windows; where the limits are lower already
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(AttributeError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    clock = getattr(signal, "setitimer", lambda which, seconds: None)
    which = getattr(signal, "ITIMER_PROF", None)
    for line in sys.stdin.buffer:
        clock(which, SECONDS)  # then the process is killed
        answer = _answer(**json.loads(line))
        clock(which, 0)
        print(json.dumps(answer), flush=True)


def _answer(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> dict[str, str]:
    import jinja2.sandbox

    try:
        text = _compiled(template).render(messages=messages, **{"tools": None, "documents": None} | variables)
    except jinja2.TemplateSyntaxError as error:
        return {"problem": f"is not valid Jinja: {error.message} (line {error.lineno})"}
    except jinja2.sandbox.SecurityError as error:
        return {"problem": f"tries something that is not allowed: {error}"}
    except jinja2.TemplateError as error:
        return {"problem": f"refuses these messages: {error}"}
    except Exception as error:  # whatever a foreign program can raise
        return {"problem": f"fails on these messages ({type(error).__name__}: {error})"}
    return {"text": text} if len(text) <= CHARACTERS else {"problem": f"writes more than {CHARACTERS:,} characters"}


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, around what the assistant writes: a mark, which changes no text."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    _main()
