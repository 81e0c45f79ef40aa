"""Chat templates: the Jinja program that comes with a model's tokenizer and writes a conversation as the model knows it.

A template is a stranger's code, so it runs in Jinja's immutable sandbox: it can read its variables and write text,
and do nothing else. Beside Jinja itself it may use what `transformers` offers: `raise_exception`, `strftime_now`, the
filter `tojson`, `break` and `continue`. Blocks are trimmed as in `transformers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text that a chat template makes of messages, each a mapping with "role" and "content".

    `variables` are further names that it may use: add_generation_prompt, bos_token, eos_token, tools, ... Raises
    ValueError for a template that is not valid, that refuses the messages (because user and assistant do not take
    turns, say), or that tries something that the sandbox forbids.
    """
    import jinja2.sandbox  # here: only those who render a template wait for the import

    try:
        return _compiled(template).render(messages=messages, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
    except jinja2.sandbox.SecurityError as error:
        raise ValueError(f"the chat template tries something that is not allowed: {error}") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # whatever a foreign program can raise
        raise ValueError(f"the chat template fails on these messages ({type(error).__name__}: {error})") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
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
