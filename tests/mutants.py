"""Mutation testing: one operator, number or condition of a module is changed at a time, and one of its tests must fail.

    pip install cosmic-ray                                      # it makes the changes
    python tests/mutants.py ops lora --results FILE
    python tests/mutants.py rlhf --results FILE --sample 200 --seed 1
    python tests/mutants.py quant --results FILE --again        # survivors once more, after new tests

No file is edited. Results are appended to FILE, and what stands there of the same source is not run again. First the
tests run as they are, which shows the lines that each runs. A mutant gets the tests that run its statement, the quickest
first, in a forked copy of the session that has collected them: there the code of its functions and the defaults of its
configurations are replaced. A constant cannot be replaced so; it gets a process that imports the mutant. One that is too
slow, or takes too much memory, counts as killed. Changed are

    + - * / // % ** & | << >> (each to one other), comparisons (their edge; == and is to their negations), numbers (one
    more, one less), True and False, and/or, conditions (not), unary - ~ not (removed), break/continue, loops (no turn);
    not in annotations, signatures' * and /, __all__, and texts of errors.

tests/mutants.json lists the mutants that may survive, with the reason: {module: {function: {changed line: reason}}}. The
exit status is 1 when another one does.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import functools
import gc
import hashlib
import importlib
import importlib.machinery
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {  # name: (modules, tests; all but ops on NumPy alone)
    "ops": (["autograd/ops.py"], "ops kernels autograd layers"),
    "lora": (["peft/lora.py"], "lora peft peft_rows qlora accounting_parameters accounting_shapes options"),
    "quant": (
        [f"quant/{name}.py" for name in "bitsandbytes checks codebooks eight_bits kernels linear nf4 surgery".split()],
        "quant quant_linear qlora hub_quantized optim",
    ),
    "rlhf": (["rlhf/*.py"], "rlhf preference_losses rlhf_reward best_of_n rlhf_online"),
}
HEAD = "mutants", "killed", "listed", "survived", "rate", "seconds"
LISTED = ROOT / "tests" / "mutants.json"
OPERATORS = """ReplaceBinaryOperator_ Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Div Mod_Div Pow_Mul
    BitAnd_BitOr BitOr_BitAnd LShift_RShift RShift_LShift
    ReplaceComparisonOperator_ Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is
    ReplaceUnaryOperator_ Delete_USub Delete_Invert Delete_Not
    Replace TrueWithFalse FalseWithTrue AndWithOr OrWithAnd BreakWithContinue ContinueWithBreak
    . NumberReplacer AddNot ZeroIterationForLoop"""
SECONDS = 3.0  # that a test may take to be used
BUDGET = {"": 12.0, "default": 12.0, "class": 6.0, "module": 4.0}  # seconds of tests that a mutant gets, the quickest
MEGABYTES = 3000  # of address space that a mutant may take, beside what the process has


# ------------------------------------------------------------------------------------------------------------ mutants


@dataclass(frozen=True)
class Mutant:
    """A changed module, and where: the function, the lines of the statement, whether they run on import."""

    module: str
    operator: str
    occurrence: int
    source: str
    function: str
    lines: tuple[int, ...]
    on_import: str  # "" in a function; else what is computed: a "default" of one, an attribute of a "class", or "module"
    text: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.module, self.operator, self.occurrence, self.source


def operators() -> dict[str, Any]:
    """cosmic-ray's operators that are used, by name."""
    from cosmic_ray.operators import (
        binary_operator_replacement,
        boolean_replacer,
        break_continue,
        comparison_operator_replacement,
        number_replacer,
        unary_operator_replacement,
        zero_iteration_for_loop,
    )

    modules = [binary_operator_replacement, boolean_replacer, break_continue, number_replacer]
    modules += [comparison_operator_replacement, unary_operator_replacement, zero_iteration_for_loop]
    every = {name: value for module in modules for name, value in vars(module).items()}
    found, prefix = {}, ""
    for word in OPERATORS.split():
        if word[-1] in "_." or word == "Replace":
            prefix = word.strip(".")
        else:
            found[prefix + word] = every[prefix + word]()
    return found


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast

    text = (ROOT / "minipeft" / module).read_text()
    digest, used, found, counts = hashlib.sha256(text.encode()).hexdigest()[:12], operators(), [], Counter()
    tree = get_ast(text)
    for node in list(ast_nodes(tree)):
        for name, operator in used.items():
            for index, _ in enumerate(operator.mutation_positions(node)):
                if not skipped(node):
                    new = changed(tree, node, operator, index)
                    found.append(Mutant(module, name, counts[name], digest, *place(node), new))
                counts[name] += 1
    return found


def changed(tree: Any, node: Any, operator: Any, index: int) -> str:
    """The text of a tree with a node changed by cosmic-ray; the tree is afterwards as it was."""
    parent, parts = node.parent, [node, *getattr(node, "children", ())]
    before = [(part, "value", part.value) for part in parts if hasattr(part, "value")]
    before += [(part, "children", list(part.children)) for part in parts if hasattr(part, "children")]
    at = next(i for i, child in enumerate(parent.children) if child is node) if parent else None
    new = operator.mutate(node, index)
    if new is not node:
        new.prefix = node.prefix if hasattr(new, "prefix") else ""
        parent.children[at] = new
    text = tree.get_code()
    if new is not node:
        parent.children[at] = node
    for part, name, value in before:
        setattr(part, name, value)
    return text


def parents(node: Any) -> Iterator[Any]:
    while node.parent is not None:
        yield node.parent
        node = node.parent


def skipped(node: Any) -> bool:
    """Whether a change says nothing here: an annotation, a mark in a signature or display, an error's text, `__all__`."""
    child, types = node, []
    for parent in parents(node):
        types.append(parent.type)
        if parent.type == "annassign" and child is parent.children[1]:
            return True
        if parent.type == "tfpdef" or (parent.type == "param" and child is parent.annotation):
            return True
        if parent.type == "funcdef" and child is parent.annotation:
            return True
        if parent.type == "expr_stmt" and parent.children[0].get_code().strip() == "__all__":
            return True
        child = parent
    if getattr(node, "value", "") in ("*", "**", "/") and types[0] in ("parameters", "lambdef", "dictorsetmaker", "atom"):
        return True
    return "fstring" in types and "raise_stmt" in types


def place(node: Any) -> tuple[str, tuple[int, ...], str]:
    """(the function's name, the lines of the statement, and what of it runs on import)."""
    names, lines, on_import, child = [], {node.start_pos[0], node.end_pos[0]}, "module", node
    headed = ("if_stmt", "while_stmt", "for_stmt", "with_stmt")
    for parent in parents(node):
        if parent.type == "simple_stmt" and len(lines) < 3:
            lines = set(range(parent.start_pos[0], parent.end_pos[0] + (parent.end_pos[1] > 0)))
        elif parent.type in headed and child is not parent.children[-1] and not names:
            lines.add(child.start_pos[0])
        if parent.type == "lambdef" and child is parent.children[-1]:
            on_import = ""
        if parent.type in ("funcdef", "classdef"):
            names.append(parent.name.value)
            if parent.type == "funcdef" and on_import:
                on_import = "" if child is parent.children[-1] else "default" if len(names) == 1 else on_import
                if on_import == "default" and len(names) == 1:
                    lines = set(range(parent.start_pos[0], parent.end_pos[0] + 1))
        child = parent
    if names and on_import == "module":
        on_import = "class"
    return ".".join(reversed(names)), tuple(sorted(lines)), on_import


def compiled(mutant: Mutant) -> tuple[str, CodeType | None, str]:
    """(the changed line, the module's code, or None where it does not compile; and the line as it was)."""
    path = ROOT / "minipeft" / mutant.module
    lines = zip(path.read_text().splitlines(), mutant.text.splitlines())
    old, new = next(((" ".join(a.split()), " ".join(b.split())) for a, b in lines if a != b), ("", ""))
    try:
        return new, compile(mutant.text, str(path), "exec", dont_inherit=True), old
    except SyntaxError:
        return new, None, old


def replaced(functions: list[FunctionType], mutant: Mutant, new: CodeType) -> bool:
    """Let the functions of a module compute by its new code and defaults; whether the changed one was among them.

    A function is known by its name and first line, where no other has both; so are the functions inside of it.
    """

    def walk(code: CodeType) -> Iterator[CodeType]:
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from walk(inner)

    def key(code: CodeType) -> tuple[str, int]:
        return code.co_qualname, code.co_firstlineno

    if mutant.on_import == "class":  # of which the options have their defaults and bounds in these places
        name = f"minipeft.{mutant.module[:-3].replace('/', '.')}"
        namespace = {"__name__": name, "__package__": name.rpartition(".")[0], "__file__": new.co_filename}
        exec(new, namespace)
        for old, made in ((getattr(sys.modules[name], key, None), value) for key, value in namespace.items()):
            if isinstance(old, type) and old.__module__ == name and hasattr(old, "__dataclass_fields__"):
                old.__init__, old.__dataclass_fields__ = made.__init__, made.__dataclass_fields__
                for key, value in vars(made).items():
                    if isinstance(value, (bool, int, float, tuple)) and not key.startswith("__"):
                        setattr(old, key, value)
        return hasattr(namespace[mutant.function], "__dataclass_fields__")
    codes = list(walk(new))
    many = Counter(map(key, codes))
    by_key, done, line = {key(code): code for code in codes if many[key(code)] == 1}, False, mutant.lines[-1]
    defaults = {}
    for node in ast.walk(ast.parse(mutant.text)) if mutant.on_import else ():
        if isinstance(node, ast.FunctionDef) and node.name == mutant.function.rpartition(".")[2]:
            defaults[node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])] = node.args
    for fn in functions:
        if fn.__code__.co_filename != new.co_filename or key(fn.__code__) not in by_key:
            continue
        code = by_key[key(fn.__code__)]
        if code.co_freevars != fn.__code__.co_freevars:
            continue
        fn.__code__ = code
        last = max(at for inner in walk(code) for *_, at in inner.co_lines() if at is not None)
        done |= code.co_firstlineno <= line <= last and not mutant.on_import
        if args := defaults.get((fn.__name__, code.co_firstlineno)):

            def value(node: ast.expr, fn: FunctionType = fn) -> Any:
                return eval(compile(ast.Expression(node), new.co_filename, "eval"), fn.__globals__)

            fn.__defaults__ = tuple(map(value, args.defaults)) or None
            fn.__kwdefaults__ = {a.arg: value(d) for a, d in zip(args.kwonlyargs, args.kw_defaults) if d} or None
            done = True
    return done


# ------------------------------------------------------------------------------------------------------------- running


def forked(action: Callable[[int], Any], seconds: float, log: str = os.devnull) -> tuple[str, str]:
    """(killed, survived or too slow, and by which test) of an action in a copy of this process that prints to `log`."""
    read, write = os.pipe()
    temporary = tempfile.mkdtemp(prefix="mutant-")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with its parent it ends, too
        os.close(read)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = temporary
        sink = os.open(log, os.O_RDWR | os.O_CREAT)
        for fd in (1, 2):
            os.dup2(sink, fd)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (MEGABYTES << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        status = 1
        try:
            status = int(action(write) or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os.killpg(pid, signal.SIGKILL)  # what it has started
    except ProcessLookupError:
        pass
    with os.fdopen(read) as pipe:
        name = pipe.read()
    shutil.rmtree(temporary, ignore_errors=True)
    return {0: "survived", -signal.SIGALRM: "too slow"}.get(status, "killed"), name


class StopAtFailure:
    """A plugin: the first failure ends the process, and its name is written to a pipe."""

    def __init__(self, pipe: int, names: list[str] | None = None):
        self.pipe, self.names = pipe, names

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self.pipe, report.nodeid.encode())
            os._exit(1)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.names or () if name in by_name]


def run_items(items: list[Any]) -> Iterator[tuple[Any, float]]:
    """Each item and its seconds."""
    for item, following in zip(items, [*items[1:], None]):
        began = time.perf_counter()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        yield item, time.perf_counter() - began


def caches_of_package() -> list[Any]:
    """What its functions remember."""
    wrappers = [o for o in gc.get_objects() if isinstance(o, functools._lru_cache_wrapper)]
    return [wrapper for wrapper in wrappers if "minipeft" in str(wrapper.__module__)]


class Session:
    """A plugin in the place of pytest's loop: the tests as they are, then every mutant in a copy of the process."""

    def __init__(self, modules: list[str], mutants: list[Mutant], report: Callable[..., None], folder: Path, cache: Path):
        self.modules, self.mutants, self.report, self.folder, self.cache = modules, mutants, report, folder, cache
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:  # skipped ones, too
            self.failed.add(report.nodeid)

    def _traced(self, items: list[Any]) -> None:
        """Which lines of which module each test runs, into a file."""
        paths = {str(ROOT / "minipeft" / module): module for module in self.modules}
        found, lines = {}, set()

        def trace(frame: Any, event: str, _: Any) -> Any:
            name = paths.get(frame.f_code.co_filename)
            if name is None:
                return None

            def local(frame: Any, event: str, _: Any) -> Any:
                lines.add((name, frame.f_lineno))
                return local

            lines.add((name, frame.f_lineno))
            return local

        threading.settrace(trace)
        sys.settrace(trace)
        caches = caches_of_package()
        for cache in caches:
            cache.cache_clear()
        for item, seconds in run_items(items):
            for cache in caches:  # what the next test needs it computes itself
                cache.cache_clear()
            if item.nodeid not in self.failed and seconds < SECONDS:
                found[item.nodeid] = (seconds, sorted(lines))
            lines.clear()
        (self.folder / "lines.json").write_text(json.dumps(found))

    def _again(self, names: list[str], items: list[Any]) -> None:
        """Their seconds in the order that mutants use; a test that needs another order is left out."""
        by_name = {item.nodeid: item for item in items}
        found = {item.nodeid: seconds for item, seconds in run_items([by_name[name] for name in names])}
        found = {name: seconds for name, seconds in found.items() if name not in self.failed}
        (self.folder / "seconds.json").write_text(json.dumps(found))

    def _measured(self, items: list[Any]) -> dict[str, tuple[float, set[tuple[str, int]]]]:
        """{test: (seconds, lines)}; of files that are as they were when they were measured, from the cache."""
        same = "".join((ROOT / "minipeft" / name).read_text() for name in self.modules)
        paths = {item.path for item in items}
        digests = {path: hashlib.sha256((same + path.read_text()).encode()).hexdigest() for path in paths}
        stored = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        new = [item for item in items if digests[item.path] not in stored]
        if new:
            forked(lambda _: self._traced(new), 3600)
            lines = json.loads((self.folder / "lines.json").read_text())
            forked(lambda _: self._again(sorted(lines, key=lambda name: lines[name][0]), new), 3600)
            seconds = json.loads((self.folder / "seconds.json").read_text())
            for item in new:
                tests = stored.setdefault(digests[item.path], {})
                if item.nodeid in seconds:
                    tests[item.nodeid] = seconds[item.nodeid], lines[item.nodeid][1]
            self.cache.write_text(json.dumps(stored))
        found = {name: test for digest in set(digests.values()) for name, test in stored[digest].items()}
        return {name: (seconds, {tuple(line) for line in lines}) for name, (seconds, lines) in found.items()}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        items = session.items
        for module in self.modules:  # not all are imported by all tests
            importlib.import_module(f"minipeft.{module[:-3].replace('/', '.')}".removesuffix(".__init__"))
        tests = self._measured(items)
        by_name = {item.nodeid: item for item in items}
        functions = [o for o in gc.get_objects() if isinstance(o, FunctionType)]
        functions = [fn for fn in functions if fn.__code__.co_filename.startswith(str(ROOT / "minipeft"))]
        caches = caches_of_package()
        gc.freeze()  # copies of the process share these objects' memory
        self.report(f"{len(items)} tests, {len(tests)} used, {math.fsum(s for s, _ in tests.values()):.0f} s")
        killers: Counter[tuple[str, str, str]] = Counter()  # which tests have found something in a function: first
        for mutant in self.mutants:
            names = sorted(chosen(mutant, tests), key=lambda name: -killers[mutant.module, mutant.function, name])
            limit = 20 + 5 * math.fsum(tests[name][0] for name in names)
            outcome, test, began = "survived", "", time.perf_counter()
            text, code, old = compiled(mutant)
            if code is None:
                continue
            if names and mutant.on_import != "module":

                def live(pipe: int, mutant: Mutant = mutant, code: CodeType = code, names: list[str] = names) -> None:
                    if not replaced(functions, mutant, code):
                        os.write(pipe, b"import")
                        return
                    for cache in caches:
                        cache.cache_clear()
                    session.config.pluginmanager.register(StopAtFailure(pipe))
                    for _ in run_items([by_name[name] for name in names]):
                        pass

                outcome, test = forked(live, limit)
                killers[mutant.module, mutant.function, test] += outcome == "killed"
            if names and outcome == "survived" and (mutant.on_import == "module" or test == "import"):
                outcome, test = "import", ""
            self.report(mutant, outcome, test, time.perf_counter() - began, text, old, names, limit)
        return True


def chosen(mutant: Mutant, tests: dict[str, tuple[float, set[tuple[str, int]]]]) -> list[str]:
    """The tests that run a mutant's statement; of what runs on import: those that run its module."""
    whole = mutant.on_import in ("class", "module")
    here = {(mutant.module, line) for line in mutant.lines}
    found = [(seconds, name) for name, (seconds, ran) in tests.items() if here & ran]
    rest = []
    if whole:
        rest = [(s, name) for name, (s, ran) in tests.items() if not here & ran and mutant.module in {m for m, _ in ran}]
        if not found and not rest:  # such as a module of constants
            rest = [(seconds, name) for name, (seconds, _) in tests.items()]
    names, spent = [], 0.0
    for seconds, name in [*sorted(found), *sorted(rest)]:
        spent += seconds
        if spent < BUDGET[mutant.on_import]:
            names.append(name)
    return names


def imported(group: str, mutant: Mutant, code: CodeType, names: list[str], pipe: int) -> int:
    """Run tests in a process that imports the mutant; not 0 where they fail."""
    original, name = importlib.machinery.SourceFileLoader.get_code, "minipeft." + mutant.module[:-3].replace("/", ".")
    name = name.removesuffix(".__init__")
    importlib.machinery.SourceFileLoader.get_code = lambda self, full: code if full == name else original(self, full)
    files = list(dict.fromkeys(test.partition("::")[0] for test in names))
    return pytest.main([*options(group), *files], plugins=[StopAtFailure(pipe, names)])


def modules_of(group: str) -> list[str]:
    """The paths of its modules in the package."""
    package = ROOT / "minipeft"
    return [str(path.relative_to(package)) for pattern in GROUPS[group][0] for path in sorted(package.glob(pattern))]


def options(group: str) -> list[str]:
    """What pytest is told."""
    return ["-q", "-p", "no:cacheprovider", "--tb=no", *(["--device", "numpy"] if group != "ops" else [])]


def run_group(group: str, todo: list[Mutant], save: Callable[..., None], cache: Path) -> None:
    """Run mutants of a group; `save` gets what became of each."""
    survivors: list[tuple[Mutant, list[str], float, float]] = []
    number, began = 0, time.perf_counter()
    screen = os.fdopen(os.dup(2), "w")

    def show(text: str) -> None:
        print(f"{group}: {text}", file=screen, flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        first = folder / "first.jsonl"

        def report(mutant: Any, *result: Any) -> None:
            nonlocal number
            if isinstance(mutant, str):
                return show(mutant)
            number += 1
            outcome, test, seconds, text, old, names, limit = result
            if outcome == "import":
                with first.open("a") as file:
                    file.write(json.dumps([todo.index(mutant), seconds, names, limit]) + "\n")
            else:
                save(mutant, outcome, test, seconds, text, old)
            if number % 20 == 0:
                show(f"{number} of {len(todo)}, {time.perf_counter() - began:.0f} s")

        def session(_: int) -> int:
            files = [f"tests/test_{name}.py" for name in GROUPS[group][1].split()]
            plugin = Session(modules_of(group), todo, report, folder, cache)
            return pytest.main(["-s", *options(group), *files], plugins=[plugin])

        if forked(session, 86400, str(folder / "log"))[0] != "survived":
            raise SystemExit((folder / "log").read_text()[-3000:])
        for line in first.read_text().splitlines() if first.exists() else ():
            index, seconds, names, limit = json.loads(line)
            survivors.append((todo[index], names, seconds, limit))
        if survivors:  # a process that imports what is not changed has no failure
            mutant, names, _, limit = survivors[0]
            path = ROOT / "minipeft" / mutant.module
            code = compile(path.read_text(), str(path), "exec", dont_inherit=True)
            if forked(lambda pipe: imported(group, mutant, code, names, pipe), 20 + limit)[0] != "survived":
                raise SystemExit(f"{group}: the tests of {mutant.module} fail where nothing is changed")
        for i, (mutant, names, seconds, limit) in enumerate(survivors):
            text, code, old = compiled(mutant)
            started = time.perf_counter()
            outcome, test = "survived", ""
            if names:
                arguments = group, mutant, code, names
                outcome, test = forked(lambda pipe, a=arguments: imported(*a, pipe), 20 + limit)
            save(mutant, outcome, test, seconds + time.perf_counter() - started, text, old)
            show(f"by import {i + 1} of {len(survivors)}: {outcome}; {mutant.module}:{mutant.lines[0]} {text[:80]}")
        show(f"{len(todo)} in {time.perf_counter() - began:.0f} s")


# ------------------------------------------------------------------------------------------------------------- results


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(GROUPS)
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "all"], metavar="GROUP", help=f"any of {names}; all")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON lines, read and appended to")
    parser.add_argument("--sample", type=int, metavar="N", help="of each group only N mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default: 0)")
    parser.add_argument("--again", action="store_true", help="run survivors again that are not listed")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MINIPEFT_THREADS", "RAYON_NUM_THREADS"):  # a process with threads cannot be copied
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import matplotlib  # noqa: F401  imported once, for all
    import numpy  # noqa: F401
    import rich.console  # noqa: F401
    import tokenizers  # noqa: F401

    def stored() -> dict[Any, dict[str, Any]]:
        rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
        return {(r["module"], r["operator"], r["occurrence"], r["source"]): r for r in rows}

    known = stored()
    reasons = json.loads(LISTED.read_text())
    listed = {(module, fn, line) for module, fns in reasons.items() for fn, lines in fns.items() for line in lines}
    is_listed = lambda r: (r["module"], r["function"], r["line"]) in listed  # noqa: E731

    def save(mutant: Mutant, outcome: str, test: str, seconds: float, text: str, old: str) -> None:
        row = dict(zip(("module", "operator", "occurrence", "source"), mutant.key))
        row |= {"function": mutant.function, "number": mutant.lines[0], "line": text, "was": old}
        row |= {"outcome": outcome, "by": test, "seconds": round(seconds, 2)}
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    table, alive, stale = [], [], []
    for group in GROUPS if "all" in args.groups else dict.fromkeys(args.groups):
        mutants = [mutant for module in modules_of(group) for mutant in mutants_of(module)]
        if args.sample is not None and args.sample < len(mutants):
            mutants = sorted(random.Random(args.seed).sample(mutants, args.sample), key=lambda m: m.key)
        redo = lambda r: args.again and r["outcome"] == "survived" and not is_listed(r)  # noqa: E731
        todo = [m for m in mutants if m.key not in known or redo(known[m.key])]
        if todo:
            run_group(group, todo, save, args.results.with_suffix(f".{group}.tests").absolute())
            known = stored()
        found = [known[m.key] for m in mutants if m.key in known]
        left = [r for r in found if r["outcome"] == "survived"]
        alive += [r for r in left if not is_listed(r)]
        if len(found) == len(mutants) and args.sample is None:
            kept = {(r["module"], r["function"], r["line"]) for r in left}
            stale += [entry for entry in listed if entry[0] in modules_of(group) and entry not in kept]
        killed, unlisted = len(found) - len(left), sum(not is_listed(r) for r in left)
        table.append(f"{group:8}{len(found):>9}{killed:>8}{len(left) - unlisted:>8}{unlisted:>10}"
                     f"{killed / max(1, len(found)):>8.1%}{sum(r['seconds'] for r in found):>9.0f}")  # fmt: skip
    for module, function, line in sorted(stale):
        print(f"{LISTED.name} names what is killed or gone: {module} {function}: {line}")
    for r in alive:
        print(f"{r['module']}:{r['number']} {r['function']}: {r['was']}  ->  {r['line']}")
    print(f"{'group':8}" + "{:>9}{:>8}{:>8}{:>10}{:>8}{:>9}".format(*HEAD), *table, sep="\n")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
