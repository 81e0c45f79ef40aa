"""The pages of the book, as Sphinx reads them, and the site that it writes.

    OUT/notebooks/   the executed lessons
    OUT/book.json    a hash of all that the site was made from: where it is the same, nothing is done
    OUT/index.html   ... and the rest of the site, which takes the place of an older one when it is complete
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import directory
from ..files import read_json, write_json, write_text
from . import links
from .lessons import PACKAGE, REDUCED, digest, find_lessons, key_of, sources, title, write_notebooks

RECORD, NEW = "book.json", ".minipeft-new"
CONFIGURATION = Path(__file__).parent


def build(out: Path, say: Callable[[str], None]) -> bool:
    """Write the book into `out`; False where nothing has changed since it was written.

    Raises LessonError; ValueError where `out` is not empty and holds no book; RuntimeError with what Sphinx says.
    """
    lessons = find_lessons()
    directory.keep_apart(out, [("the package", PACKAGE), *(("the lessons", p.parent) for p in lessons.values())], "OUT")
    with directory.locked(out):
        foreign = {path.name for path in out.iterdir()} - {"notebooks", NEW, directory.LOCK}
        if foreign and not (out / RECORD).exists():
            raise ValueError(f"OUT {out} is not empty and holds no book ({min(foreign)}); choose another directory")
        record = read_json(out / RECORD) if (out / RECORD).exists() else {}
        key = digest(*sources(), *(key_of(path) for path in lessons.values()), _readme(lessons))
        if record.get("key") == key and (out / "index.html").exists():
            return False
        notebooks = write_notebooks(lessons, out / "notebooks", say)
        say("the pages")
        directory.discard(out / NEW)
        fresh = out / NEW
        with TemporaryDirectory(prefix="minipeft-book-") as work:
            write_pages(Path(work, "pages"), notebooks)
            sphinx(Path(work))
            shutil.copytree(Path(work, "html"), fresh)
        names = sorted(path.name for path in fresh.iterdir())
        write_json(fresh / RECORD, {"key": key, "names": [*names, RECORD]})
        directory.publish(fresh, out, record.get("names", []))
    return True


def _readme(lessons: dict[int, Path]) -> str:
    """What the README says of lessons."""
    path = next(iter(lessons.values())).parents[1] / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def sphinx(work: Path) -> None:
    """Make html/ of pages/. Sphinx runs in a process of its own, for it keeps much in globals."""
    places = (str(work / name) for name in ("doctrees", "pages", "html"))
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "auto", "-c", str(CONFIGURATION), "-d", *places]
    lessons = next(iter(find_lessons().values())).parent  # where experiments/ is
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), str(lessons), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not (work / "html" / "index.html").exists():
        raise RuntimeError(f"Sphinx failed: {(done.stderr.strip() or 'it wrote no index.html').splitlines()[-1]}")
    print(done.stderr, end="", file=sys.stderr)
    (work / "html" / ".buildinfo").unlink(missing_ok=True)


def write_pages(pages: Path, notebooks: dict[Path, Any]) -> None:
    """The sources of all pages, as Sphinx reads them."""
    import nbformat

    for path, notebook in notebooks.items():
        _write(pages / "lessons" / f"{path.stem}.ipynb", nbformat.writes(lesson_page(path, notebook)))
    for module in links.modules():
        _write(pages / "api" / f"{module}.md", module_page(module))
    _write(pages / "api" / "index.md", api_page())
    _write(pages / "claims.md", claims_page({path.name: path for path in notebooks}))
    _write(pages / "glossary.md", glossary_page())
    _write(pages / "commands.md", commands_page())
    _write(pages / "index.md", index_page(notebooks))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def lesson_page(path: Path, notebook: Any) -> Any:
    """A lesson's notebook with alternative texts, links to the code, and the claims that it judges."""
    import nbformat

    page = nbformat.from_dict(notebook)
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = links.linked(cell.source)
            continue
        pictures = [output["data"]["text/plain"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if pictures:
            cell.metadata["mystnb"] = {"image": {"alt": " ".join(pictures)}}
    end = [links.to_code(path, set(links.modules())), _claims_of(path)]
    end.append(f'<p><a href="../notebooks/{path.stem}.ipynb" download>This lesson as a notebook</a>, executed.</p>')
    page.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(filter(None, end)), id="end"))
    return page


def _claims_of(path: Path) -> str:
    """Links to the statements of textbooks that a lesson judges."""
    from ..claims.register import rule_of, statements

    ids = [id for id in statements() if (rule := rule_of(id)) and rule.lesson == path.name]
    return "Claims on trial here: " + ", ".join(f"[{id}](../claims.md#{id})" for id in ids) + "." if ids else ""


def module_page(module: str) -> str:
    """The reference of a module."""
    name = links.file_of(module) if links.of_lessons(module) else module.removeprefix("minipeft.")
    return f"---\norphan: true\n---\n\n# {links.escape(name)}\n\n[All modules](index.md)\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def api_page() -> str:
    """The public names of `mp`, all modules, and those of lessons/experiments."""
    import minipeft as mp

    rows = []
    for name in sorted(mp.__all__):
        value = getattr(mp, name)
        target = getattr(value, "__name__", "") if hasattr(value, "__path__") or hasattr(value, "__file__") else ""
        module = target or getattr(value, "__module__", "")
        if module in links.modules():
            anchor = "" if target else f"#{module}.{value.__qualname__}"
            summary = re.split(r"(?<=[.:])\s", (value.__doc__ or "").strip().partition("\n\n")[0])[0]
            rows.append(f'<a href="{module}.html{anchor}"><code>mp.{name}</code></a>\n: {links.escape(" ".join(summary.split()))}\n')
    every: dict[bool, list[str]] = {False: [], True: []}
    for module, path in links.modules().items():
        every[links.of_lessons(module)].append(f"- [{links.escape(module)}]({module}.md): {links.escape(_summary(path))}")
    return "\n".join([
        "# Reference\n\nThe public names of `import minipeft as mp`; below, all modules, with their source.\n",
        *rows, "## Modules\n", *every[False], "", *(["## Beside the lessons\n", *every[True], ""] if every[True] else []),
    ])  # fmt: skip


def _summary(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def claims_page(lessons: dict[str, Path]) -> str:
    """The register: each statement, its verdict, and the numbers behind it."""
    from ..claims.register import figure, interval, judge, rule_of, statements

    parts, section = ["# Claims\n\nWhat textbooks teach about fine-tuning, each statement with the verdict that a rule computes."], ""
    for id, statement in statements().items():
        if statement.section != section:
            section = statement.section
            parts.append(f"## {links.escape(section)}")
        rule, verdict = rule_of(id), judge(id)
        parts.append(f"### {id}\n\n{links.escape(statement.statement)}")
        because = "\n".join("- " * line.startswith("- ") + links.escape(line.removeprefix("- ")) for line in verdict.because.splitlines())
        parts.append(f"**{verdict.verdict}**: {because}")
        if rule:
            parts.append(f"Rule: {links.escape(' '.join(rule.words.split()))}")
            if path := lessons.get(rule.lesson):
                place = f"lessons/{path.stem}.ipynb#{links.slug(rule.section)}"
                parts.append(f"Lesson: [{links.escape(title(path).split(' · ')[0])}, {links.escape(rule.section)}]({place})")
        numbers = list(dict.fromkeys(filter(None, [verdict.effect, *verdict.evidence])))
        if numbers:
            rows = [f"| {links.escape(n.name)} | {links.escape(figure(n))} | {links.escape(interval(n))} |" for n in numbers]
            parts.append("\n".join(["| evidence | value | 95 % interval |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def glossary() -> list[tuple[str, str]]:
    """(word, or words with a comma between, and their meaning) of each entry of glossary.txt."""
    text = (Path(__file__).parent / "glossary.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^ {4}(\S.*?) {2,}(\S.*(?:\n {12,}\S.*)*)", text, re.MULTILINE)
    return [(words, " ".join(meaning.split())) for words, meaning in rows]


def glossary_page() -> str:
    """The glossary, in the order of the alphabet."""
    rows = sorted(glossary(), key=lambda row: row[0].casefold())
    entries = (f"{links.escape(words)}\n: {links.escape(meaning)}\n" for words, meaning in rows)
    lead = "The words of the course, and the numbers of the lessons that define them."
    return f"# Glossary\n\n{lead}\n\n" + "\n".join(entries)


def commands_page() -> str:
    """The help of each command: the docstring of its file, read and not imported."""
    parts = ["# Commands\n\n`minipeft COMMAND --help` lists the options of each."]
    for path in sorted((PACKAGE / "cli").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if "\nexamples:\n" in text and path.stem != "__init__":
            parts.append(f"## minipeft {path.stem}\n\n````{{code-block}} text\n{text}\n````")
    return "\n\n".join(parts) + "\n"


def index_page(notebooks: dict[Path, Any]) -> str:
    """The cover."""
    reduced = os.environ.get(REDUCED) == "1"
    setting = "in a reduced setting: fewer steps, and fewer claims" if reduced else "in full"
    lessons = "\n".join(f"lessons/{path.stem}" for path in notebooks)
    return f"""# minipeft

Fine-tuning large language models, from scratch, in NumPy. The lessons derive each method, build it, and assert what they
claim as they run; this book shows them as they ran, {setting}.

```{{toctree}}
:caption: Lessons
:maxdepth: 1

{lessons}
```

```{{toctree}}
:caption: Reference
:maxdepth: 1

claims
glossary
commands
api/index
```
"""
