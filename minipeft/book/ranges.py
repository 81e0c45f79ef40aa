"""Where to start reading: the README names functions and classes with their lines.

    [`gae`, lines 77-99](minipeft/rlhf/advantages.py#L77-L99)

`python -m minipeft.book.ranges README.md` brings the lines up to date; a test fails where they are not.
"""

from __future__ import annotations

import ast
import re
import sys

from ..files import rewrite
from .lessons import PACKAGE

RANGE = re.compile(r"\[`(\w+)`, lines \d+-\d+\]\((minipeft/[\w/]+\.py)#L\d+-L\d+\)")


def ranged(text: str) -> str:
    """The text with today's lines. Raises KeyError for a name that its file does not define."""
    return RANGE.sub(lambda match: _link(*match.groups()), text)


def _link(name: str, path: str) -> str:
    defined = ast.parse((PACKAGE.parent / path).read_text("utf-8")).body
    nodes = {node.name: node for node in defined if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if name not in nodes:
        raise KeyError(f"{path} defines no {name!r} at its top level")
    first = min(node.lineno for node in (nodes[name], *nodes[name].decorator_list))
    last = nodes[name].end_lineno
    return f"[`{name}`, lines {first}-{last}]({path}#L{first}-L{last})"


if __name__ == "__main__":
    rewrite(sys.argv[1:], lambda text, _: ranged(text))
