"""What refers to what: lessons to the library's objects and back, and the docstrings as Sphinx reads them.

Two sources say what a lesson explains: the README's table of lessons names files, and the lesson's own code names
functions and classes. Both may be of the library, or of the code that stands beside the lessons, in lessons/experiments.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .lessons import PACKAGE, find_lessons, sources, title

SPECIAL = re.compile(r"([\\`*_{}\[\]<>$|#~])")
LISTED = re.compile(r"(\d+\.|-) ")
MARK = re.compile(r"`+([^`]+)`+")
FILE = r"(?:minipeft|lessons/experiments)/[\w/]+"
EXPERIMENTS = "experiments"  # the package of lessons/experiments, as lessons import it


def escape(text: str) -> str:
    """Plain text as Markdown."""
    return SPECIAL.sub(r"\\\1", text)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w-]+", "-", heading.lower()).strip("-")


def module_name(file: str) -> str:
    """minipeft/peft/lora.py -> minipeft.peft.lora; lessons/experiments/ranks.py -> experiments.ranks"""
    return file.strip("/").removesuffix(".py").removeprefix("lessons/").replace("/", ".").removesuffix(".__init__")


def file_of(module: str) -> str:
    """minipeft.peft.lora -> peft/lora.py; experiments.ranks -> lessons/experiments/ranks.py"""
    path = modules()[module]
    return path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else path.parents[2]).as_posix()


def of_lessons(module: str) -> bool:
    """Whether a module is one of lessons/experiments, and not of the library."""
    return module.split(".")[0] == EXPERIMENTS


@cache
def modules() -> dict[str, Path]:
    """The modules of the library, without commands and book, and those of lessons/experiments, by their names."""
    lessons = next(iter(find_lessons().values())).parent
    files = {path.relative_to(PACKAGE.parent): path for path in sources("cli", "book") if path.suffix == ".py"}
    files |= {path.relative_to(lessons): path for path in sorted(lessons.glob(f"{EXPERIMENTS}/*.py"))}
    return {module_name(file.as_posix()): path for file, path in files.items()}


@cache
def explained(lesson: Path) -> tuple[str, ...]:
    """The modules that the README's table of lessons names beside a lesson."""
    readme = lesson.parents[1] / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.exists() else []
    row = next((line for line in lines if line.startswith("|") and f"(lessons/{lesson.name})" in line), "")
    named = map(module_name, re.findall(rf"\(({FILE})(?:\.py)?\)", row))
    return tuple(name for name in dict.fromkeys(named) if name in modules())


@cache
def used(lesson: Path) -> dict[str, list[str]]:
    """module -> names of its functions and classes that a lesson's code uses, `mp.optim.AdamW` and imported names: of those
    with a docstring, which alone have a place in the reference."""
    if str(lesson.parent) not in sys.path:
        sys.path.append(str(lesson.parent))  # where experiments/ is
    tree, names, found = ast.parse(lesson.read_text(encoding="utf-8")), {}, {}
    for node in ast.walk(tree):  # breadth first: imports at the top come before what uses them
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minipeft":
                    names[alias.asname or "minipeft"] = importlib.import_module(alias.name if alias.asname else "minipeft")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("minipeft", EXPERIMENTS):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                names[alias.asname or alias.name] = _member(module, alias.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):  # F = mp.functional
            if isinstance(value := _resolve(node.value, names), ModuleType):
                names[node.targets[0].id] = value
    for node in ast.walk(tree):
        value = _resolve(node, names) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))) and value.__doc__ and value.__module__ in modules():
            found.setdefault(value.__module__, set()).add(value.__qualname__)
    return {module: sorted(found[module], key=_line(module)) for module in sorted(found)}


def _member(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        return importlib.import_module(f"{owner.__name__}.{name}")


def _resolve(node: ast.AST, names: dict[str, Any]) -> Any:
    """The library's object that `node`, a name with attributes, stands for; None for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) or inspect.isclass(owner) else None
    return None


def _line(module: str) -> Any:
    """The line of a module's name, to sort by."""
    text = modules()[module].read_text(encoding="utf-8")
    lines = {node.name: node.lineno for node in ast.walk(ast.parse(text)) if hasattr(node, "name") and hasattr(node, "lineno")}
    return lambda name: lines.get(name.split(".")[-1], 0)


@cache
def lessons_of(name: str) -> tuple[Path, ...]:
    """The lessons that explain a module, those that use one of lessons/experiments, or a function or class, given as module.name."""
    module, _, member = name.rpartition(".")
    found = find_lessons().values()
    if name not in modules():
        return tuple(path for path in found if member in used(path).get(module, ()))
    return tuple(path for path in found if name in (used(path) if of_lessons(name) else explained(path)))


def source_page(module: str, member: str = "") -> str:
    """The page of a module's source, at a member's first line; from the top of the book."""
    return f"_modules/{module.replace('.', '/')}.html{f'#{member}' if member else ''}"


def to_code(lesson: Path, sourced: set[str]) -> str:
    """The end of a lesson: the lines that it explains and uses, in Markdown with HTML links; those of lessons/experiments by themselves."""
    names, first = used(lesson), explained(lesson)
    rows: dict[bool, list[str]] = {False: [], True: []}
    for module in (*first, *(m for m in names if m not in first)):
        if module not in sourced:
            continue
        members = [_link(source_page(module, name), name) for name in names.get(module, ()) if "<" not in name]
        where = f"[{escape(file_of(module))}](../api/{module}.md)"
        rows[of_lessons(module)].append(f"- {f'**{where}**' if module in first else where}{': ' * bool(members)}{' · '.join(members)}")
    heads = {False: "## In the library", True: "## Beside the lessons"}
    leads = {
        False: "The names lead to their lines, the files to their reference; files in bold are what the lesson explains.",
        True: "These files are no part of the library: they hold the experiments of the lessons, and draw their pictures.",
    }
    return "\n\n".join(f"{heads[beside]}\n\n{leads[beside]}\n\n" + "\n".join(some) for beside, some in rows.items() if some)


def linked(markdown: str) -> str:
    """A lesson's text, in which `minipeft/peft/lora.py` and `lessons/experiments/ranks.py` lead to their sources."""

    def link(match: re.Match[str]) -> str:
        module = module_name(match[1])
        return _link(source_page(module), match[1]) if module in modules() else match[0]

    return re.sub(rf"`({FILE}\.py)`", link, markdown)


def _link(page: str, text: str) -> str:
    return f'<a href="../{page}"><code>{text}</code></a>'


def from_lessons(paths: tuple[Path, ...], up: str, code: bool = False) -> str:
    """'Explained or used in ...' as HTML (or, of the docstrings, reStructuredText); "" for none."""
    if code:
        links = [f":doc:`{title(path).split(' · ')[0]} </lessons/{path.stem}>`" for path in paths]
    else:
        links = [f'<a href="{up}lessons/{path.stem}.html">{title(path)}</a>' for path in paths]
    return f"Explained or used in {', '.join(links)}." if links else ""


def restructured(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: paragraphs and lists as they are, indented or aligned text as it stands."""
    blocks, result = re.split(r"\n\s*\n", "\n".join(lines)), []
    for block in filter(str.strip, blocks):
        rows = block.split("\n")
        aligned = sum(bool(re.search(r"\S {2,}\S", row)) for row in rows) > len(rows) / 3
        if rows[0].startswith("    ") or aligned:
            result += ["::", "", *(f"    {row}" for row in rows), ""]
        elif any(LISTED.match(row) for row in rows):
            for row in rows:
                result += ([""] if LISTED.match(row) else []) + [_inline(row)]
            result.append("")
        else:
            result += _paragraph(rows)
    return result


def _paragraph(rows: list[str]) -> list[str]:
    """Prose up to the first indented line, the rest as it stands."""
    cut = next((i for i, row in enumerate(rows) if row.startswith("  ")), len(rows))
    prose = [_inline(row.strip()) for row in rows[:cut]]
    rest = ["::", "", *(f"    {row}" for row in rows[cut:]), ""] if cut < len(rows) else []
    return [*prose, "", *rest]


def _inline(text: str) -> str:
    """Backticks mark code; nothing else is markup."""
    parts = MARK.split(text)
    return "".join(
        f"\\ ``{part}``\\ " if i % 2 else re.sub(r"([\\*_|])", r"\\\1", part) for i, part in enumerate(parts)
    )  # fmt: skip
