"""Mutation testing: one operator, number or condition of a module is changed at a time, and one of its tests must fail.

    pip install cosmic-ray                                      # it makes the changes
    python tests/mutants.py ops lora --results FILE
    python tests/mutants.py rlhf --results FILE --sample 200 --seed 1
    python tests/mutants.py quant --results FILE --again        # survivors once more, after new tests

No file is edited. Results are appended to FILE, and what stands there of the same source is not run again. First the
tests run as they are, which shows the lines that each runs. A mutant gets the tests that run its statement, the quickest
first: in a forked copy of the session that has collected them, where the code of its functions is replaced; or, where it
runs on import, as a default does, in a process that imports the mutant. One that is too slow, or takes too much memory,
counts as killed. Changed are

    + - * / // % ** & | << >> (each to one other), comparisons (their edge; == and is to their negations), numbers (one
    more, one less), True and False, and/or, conditions (not), unary - ~ not (removed), break/continue, loops (no turn);
    not in annotations, signatures' * and /, __all__, and texts of errors.

tests/mutants.json lists the mutants that may survive, with the reason: {module: {function: {changed line: reason}}}. The
exit status is 1 when another one does. A reason beside "" in the place of a line says why no test runs lines of the
function here, such as that CuPy does; the mutants of these lines are counted apart and are no part of the rate.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

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
LISTED = ROOT / "tests" / "mutants.json"
OPERATORS = """ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Div|Mod_Div|Pow_Mul
    |BitAnd_BitOr|BitOr_BitAnd|LShift_RShift|RShift_LShift)
    |ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)
    |ReplaceUnaryOperator_Delete_(USub|Invert|Not)
    |Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd|BreakWithContinue|ContinueWithBreak)
    |NumberReplacer|AddNot|ZeroIterationForLoop"""
BUDGET = 12.0  # seconds of tests that a mutant gets, the quickest
BYTES = 8 << 30  # of address space that a process may take

Tests = dict[str, tuple[float, dict[str, list[int]]]]  # the seconds of each, and the lines of each module that it runs


# ------------------------------------------------------------------------------------------------------------ mutants


class Mutant(NamedTuple):
    """A change of a module, which `operator` makes at its nth occurrence in the source of this digest, and where."""

    module: str
    operator: str
    occurrence: int
    source: str
    function: str
    lines: tuple[int, ...]  # of the statement; of what runs on import, of the function or class whose part it is
    on_import: bool


@functools.cache
def operators() -> dict[str, Any]:
    """cosmic-ray's operators that are used, by name."""
    from cosmic_ray.plugins import get_operator, operator_names

    names = [name for name in operator_names() if re.fullmatch(f"core/({OPERATORS})", name, re.VERBOSE)]
    return {name.removeprefix("core/"): get_operator(name)() for name in names}


def key(mutant: Mutant | dict[str, Any]) -> tuple[str, str, int, str]:
    """What names a mutant, or the one that a row of the results is about: its first four fields."""
    return tuple(mutant[name] for name in Mutant._fields[:4]) if isinstance(mutant, dict) else mutant[:4]


def rows(results: Path) -> list[dict[str, Any]]:
    """What a file of results holds."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module."""
    from cosmic_ray.ast import ast_nodes, get_ast

    text = (ROOT / "minipeft" / module).read_text()
    digest, found, counts = hashlib.sha256(text.encode()).hexdigest()[:12], [], Counter()
    for node in ast_nodes(get_ast(text)):
        for name, operator in operators().items():
            for _ in operator.mutation_positions(node):
                if not skipped(node):
                    found.append(Mutant(module, name, counts[name], digest, *place(node)))
                counts[name] += 1
    return found


def upwards(node: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, child) from a node to the module."""
    while node.parent is not None:
        yield node.parent, node
        node = node.parent


def skipped(node: Any) -> bool:
    """Whether a change says nothing here: an annotation, a mark in a signature or display, an error's text, `__all__`."""
    types = [parent.type for parent, _ in upwards(node)]
    for parent, child in upwards(node):
        annotation = parent.children[1] if parent.type == "annassign" else getattr(parent, "annotation", None)
        if parent.type == "tfpdef" or (child is annotation and parent.type in ("annassign", "param", "funcdef")):
            return True
        if parent.type == "expr_stmt" and parent.children[0].get_code().strip() == "__all__":
            return True
    if getattr(node, "value", "") in ("*", "**", "/") and types[0] in "parameters lambdef dictorsetmaker atom".split():
        return True
    return "fstring" in types and "raise_stmt" in types


def place(node: Any) -> tuple[str, tuple[int, ...], bool]:
    """(the function's name, the lines whose tests the mutant gets, and whether it runs on import)."""
    names, lines, on_import = [], {node.start_pos[0], node.end_pos[0]}, True
    for parent, child in upwards(node):
        span = range(parent.start_pos[0], parent.end_pos[0] + (parent.end_pos[1] > 0))
        if parent.type == "simple_stmt" and len(lines) < 3:
            lines = set(span)
        elif parent.type in ("if_stmt", "while_stmt", "for_stmt", "with_stmt") and child is not parent.children[-1]:
            lines |= {child.start_pos[0]} if not names else set()
        if parent.type in ("funcdef", "lambdef") and child is parent.children[-1]:
            on_import = False
        if parent.type in ("funcdef", "classdef"):
            names.append(parent.name.value)
            lines = set(span) if on_import else lines
    return ".".join(reversed(names)), tuple(sorted(lines)), on_import


def compiled(mutant: Mutant) -> tuple[str, str, CodeType | None]:
    """(the line as it was, the changed line, the module's code, or None where it does not compile)."""
    from cosmic_ray.mutating import mutate_code

    path = ROOT / "minipeft" / mutant.module
    text = path.read_text()
    changed = mutate_code(text, operators()[mutant.operator], mutant.occurrence)
    lines = zip(text.splitlines(), changed.splitlines())
    old, new = next(((" ".join(a.split()), " ".join(b.split())) for a, b in lines if a != b), ("", ""))
    try:
        return old, new, compile(changed, str(path), "exec", dont_inherit=True)
    except SyntaxError:
        return old, new, None


def replaced(functions: list[FunctionType], mutant: Mutant, new: CodeType) -> bool:
    """Let the functions of a module compute by its new code; whether the changed one was among them.

    A function is known by its name and first line, where no other has both; so are the functions inside of it.
    """

    def walk(code: CodeType) -> Iterator[CodeType]:
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from walk(inner)

    def name(code: CodeType) -> tuple[str, int]:
        return code.co_qualname, code.co_firstlineno

    many, done = Counter(map(name, walk(new))), False
    by_name = {name(code): code for code in walk(new) if many[name(code)] == 1}
    for fn in functions:
        code = by_name.get(name(fn.__code__))
        if fn.__code__.co_filename == new.co_filename and code and code.co_freevars == fn.__code__.co_freevars:
            fn.__code__ = code
            last = max(at for inner in walk(code) for *_, at in inner.co_lines() if at is not None)
            done |= code.co_firstlineno <= mutant.lines[0] <= last
    return done


# ------------------------------------------------------------------------------------------------------------- running


def forked(action: Callable[[int], Any], seconds: float, log: str = os.devnull) -> tuple[str, str]:
    """("survived", "killed" or "too slow", what it wrote) of an action in a copy of this process that prints to `log`.

    The action gets a pipe to write to. The seconds are the processor's; it may wait ten times as long.
    """
    read, write = os.pipe()
    temporary = tempfile.mkdtemp(prefix="mutant-")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with its parent it ends, too
        os.close(read)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = temporary
        sink = os.open(log, os.O_RDWR | os.O_CREAT)
        for fd in (1, 2):
            os.dup2(sink, fd)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        for timer, name, of in (("ITIMER_PROF", "SIGPROF", 1), ("ITIMER_REAL", "SIGALRM", 10)):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
            signal.setitimer(getattr(signal, timer), of * seconds)
        status = 1
        try:
            status = int(action(write) or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it has started
    with os.fdopen(read) as pipe:
        written = pipe.read()
    shutil.rmtree(temporary, ignore_errors=True)
    slow = status in (-signal.SIGALRM, -signal.SIGPROF)
    return "survived" if status == 0 else "too slow" if slow else "killed", written


class StopAtFailure:
    """A plugin: of the tests only those named run, and the first failure ends the process; its name goes to a pipe."""

    def __init__(self, pipe: int, names: list[str]):
        self.pipe, self.names = pipe, names

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self.pipe, report.nodeid.encode())
            os._exit(1)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.names if name in by_name]


def run_items(items: list[Any]) -> Iterator[tuple[str, float]]:
    """The name of each test, which has run, and the processor's seconds."""
    for item, following in zip(items, [*items[1:], None]):
        began = time.process_time()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        yield item.nodeid, time.process_time() - began


def memories() -> Callable[[], Any]:
    """What makes the package's functions forget what they remember."""
    wrappers = [o for o in gc.get_objects() if isinstance(o, functools._lru_cache_wrapper)]
    return lambda: [wrapper.cache_clear() for wrapper in wrappers if "minipeft" in str(wrapper.__module__)]


class Session:
    """A plugin in the place of pytest's loop: the tests as they are, then mutants in copies of the process."""

    def __init__(self, modules: list[str], mutants: list[Mutant], save: Callable[..., None], measured: Path):
        self.modules, self.mutants = modules, mutants
        self.save, self.measured = save, measured  # gets what became of a mutant that is not imported; `Tests`, a file
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:  # skipped ones, too
            self.failed.add(report.nodeid)

    def measure(self, items: list[Any]) -> None:
        """{test: (seconds, lines)} into the file; a test that fails after the quicker ones is left out."""
        paths = {str(ROOT / "minipeft" / module): module for module in self.modules}
        lines, of_test = defaultdict(set), {}

        def trace(frame: Any, event: str, _: Any) -> Any:
            if name := paths.get(frame.f_code.co_filename):
                lines[name].add(frame.f_lineno)
                return trace
            return None

        threading.settrace(trace)
        sys.settrace(trace)
        forget = memories()
        forget()
        for name, seconds in run_items(items):
            forget()  # what the next test needs it computes itself
            of_test[name] = seconds, {module: sorted(found) for module, found in lines.items()}
            lines.clear()
        sys.settrace(None)
        threading.settrace(None)
        passed = [item for item in items if item.nodeid not in self.failed]
        again = dict(run_items(sorted(passed, key=lambda item: of_test[item.nodeid][0])))
        found = {name: (seconds, of_test[name][1]) for name, seconds in again.items() if name not in self.failed}
        self.measured.write_text(json.dumps(found))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        gc.unfreeze()  # what conftest.py has frozen could not be found
        for module in self.modules:  # not all are imported by all tests
            importlib.import_module(name_of(module))
        forked(lambda _: self.measure(session.items), 3600)
        tests, by_name = json.loads(self.measured.read_text()), {item.nodeid: item for item in session.items}
        functions = [o for o in gc.get_objects() if isinstance(o, FunctionType)]
        forget = memories()
        gc.freeze()  # copies of the process share these objects' memory
        for mutant in self.mutants:
            names, limit = chosen(mutant, tests)
            began, (*texts, code) = time.perf_counter(), compiled(mutant)
            if mutant.on_import or not names or code is None:
                continue

            def live(pipe: int, mutant: Mutant = mutant, code: CodeType = code, names: list[str] = names) -> None:
                if not replaced(functions, mutant, code):
                    os.write(pipe, b"import")
                    return
                forget()
                session.config.pluginmanager.register(StopAtFailure(pipe, names))
                for _ in run_items([by_name[name] for name in names]):
                    pass

            outcome, test = forked(live, limit)
            if test != "import":
                self.save(mutant, outcome, test, began, *texts)
        return True


def chosen(mutant: Mutant, tests: Tests) -> tuple[list[str], float]:
    """The tests that a mutant gets, the quickest, and the seconds that they may take.

    They run its statement. Of what runs on import: first those that run a line near it, then those that run its module,
    then all.
    """
    names, spent = [], 0.0
    found = [(set(mutant.lines).isdisjoint(ran.get(mutant.module, ())), mutant.module not in ran, seconds, name)
             for name, (seconds, ran) in tests.items()]  # fmt: skip
    for elsewhere, _, seconds, name in sorted(found):
        if spent + seconds < BUDGET and (mutant.on_import or not elsewhere):
            names.append(name)
            spent += seconds
    return names, 20 + 5 * spent


def by_import(group: str, module: str, code: CodeType | None, names: list[str], seconds: float) -> tuple[str, str]:
    """What becomes of tests in a process that imports a module of this code, None for its own: see `forked`."""
    original, changed = SourceFileLoader.get_code, code and name_of(module)
    files = list(dict.fromkeys(test.partition("::")[0] for test in names))

    def run(pipe: int) -> int:
        SourceFileLoader.get_code = lambda self, name: code if name == changed else original(self, name)
        return pytest.main([*options(group), *files], plugins=[StopAtFailure(pipe, names)])

    return forked(run, seconds)


def modules_of(group: str) -> list[str]:
    """The paths of its modules in the package."""
    package = ROOT / "minipeft"
    return [str(path.relative_to(package)) for pattern in GROUPS[group][0] for path in sorted(package.glob(pattern))]


def name_of(module: str) -> str:
    """What Python calls the module at a path in the package."""
    return f"minipeft.{module[:-3].replace('/', '.')}".removesuffix(".__init__")


def options(group: str) -> list[str]:
    """The arguments of pytest."""
    return ["-q", "-p", "no:cacheprovider", "--tb=no", *(["--device", "numpy"] if group != "ops" else [])]


def run_group(group: str, todo: list[Mutant], results: Path) -> None:
    """Run mutants of a group; what became of each is appended to a file."""

    def save(mutant: Mutant, outcome: str, test: str, began: float, old: str, new: str) -> None:
        row = dict(zip(Mutant._fields[:5], mutant)) | {"number": mutant.lines[0], "line": new, "was": old}
        row |= {"outcome": outcome, "by": test, "seconds": round(time.perf_counter() - began, 2)}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        measured, log, before = Path(folder, "tests.json"), Path(folder, "log"), len(rows(results))
        files = [f"tests/test_{name}.py" for name in GROUPS[group][1].split()]
        plugin = Session(modules_of(group), todo, save, measured)
        if forked(lambda _: pytest.main(["-s", *options(group), *files], [plugin]), 86400, str(log))[0] != "survived":
            raise SystemExit(log.read_text()[-3000:])
        tests, saved, checked = json.loads(measured.read_text()), {key(r) for r in rows(results)[before:]}, False
    for mutant in todo:
        if key(mutant) in saved:
            continue
        began, (names, limit), (*texts, code) = time.perf_counter(), chosen(mutant, tests), compiled(mutant)
        outcome, test = "no Python" if code is None else "not run", ""
        if names and code:
            if not checked and by_import(group, mutant.module, None, names, limit)[0] != "survived":
                raise SystemExit(f"{group}: the tests of {mutant.module} fail where it is imported as it is")
            checked = True
            outcome, test = by_import(group, mutant.module, code, names, limit)
        save(mutant, outcome, test, began, *texts)


# ------------------------------------------------------------------------------------------------------------- results


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=GROUPS, help="see GROUPS in this file")
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
    for name in ("matplotlib", "numpy", "rich.console", "tokenizers"):
        importlib.import_module(name)  # once, for all

    listed = json.loads(LISTED.read_text())
    entries = {(module, fn, line) for module, fns in listed.items() for fn, lines in fns.items() for line in lines}
    known, used = {key(r): r for r in rows(args.results)}, set()

    def state(r: dict[str, Any]) -> str:
        if r["outcome"] not in ("survived", "not run"):
            return "killed"
        entry = r["module"], r["function"], "" if r["outcome"] == "not run" else r["line"]
        used.add(entry)
        return "survived" if entry not in entries else "not run" if not entry[2] else "listed"

    table, alive, stale = [], [], []
    for group in args.groups:
        mutants = [mutant for module in modules_of(group) for mutant in mutants_of(module)]
        if args.sample is not None and args.sample < len(mutants):
            mutants = sorted(random.Random(args.seed).sample(mutants, args.sample), key=key)
        todo = [m for m in mutants if key(m) not in known or (args.again and state(known[key(m)]) == "survived")]
        if todo:
            run_group(group, todo, args.results)
            known = {key(r): r for r in rows(args.results)}
        found = [r for m in mutants if (r := known[key(m)])["outcome"] != "no Python"]
        count = Counter(map(state, found))
        alive += [r for r in found if state(r) == "survived"]
        if args.sample is None:
            stale += [entry for entry in sorted(entries - used) if entry[0] in modules_of(group)]
        ran, seconds = len(found) - count["not run"], sum(r["seconds"] for r in found)
        counts = [count[name] for name in ("killed", "listed", "survived", "not run")]
        table.append([group, ran, *counts, f"{count['killed'] / max(1, ran):.1%}", f"{seconds:.0f}"])
    for module, function, line in stale:
        print(f"{LISTED.name} names what is killed or gone: {module} {function}: {line}")
    for r in alive:
        print(f"{r['module']}:{r['number']} {r['function']}: {r['was']}  ->  {r['line']}")
    for line in ("group mutants killed listed survived not_run rate seconds".split(), *table):
        print("".join(f"{cell:>9}" for cell in line))
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
