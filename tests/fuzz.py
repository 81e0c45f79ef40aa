"""Damaged inputs for every reader: each must load, or raise the error that its docstring names, soon and in little memory.

    python tests/fuzz.py gguf --inputs 10000 --seed 3
    python tests/fuzz.py all --inputs 1000 --failures DIR
    python tests/fuzz.py adapter --inputs 1 --start 4711        # input 4711 again

An input is a valid one of tests/fuzz_readers.py, changed in a few places: values of JSON (also inside other files),
entries of tensor headers, texts, lengths, and plain bytes. Input number i of a seed is always the same. What is read is
used, too, as far as a user would at once: a model computes, a tokenizer encodes, a run is resumed.

--coverage lets atheris (a coverage-guided fuzzer, `pip install atheris`) choose the changes instead of the seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import lzma
import marshal
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

SECONDS, MEGABYTES = 2.0, 512  # that one input may take: of the processor (15 times as many by the clock), and of memory


class Draws:
    """Where the changes come from: random numbers of a seed."""

    def __init__(self, *path: Any):
        self.below = random.Random("/".join(map(str, path))).randrange

    def chance(self, p: float) -> bool:
        return self.below(1000) < 1000 * p

    def choice(self, values: Any) -> Any:
        return values[self.below(len(values))]


class Guided(Draws):
    """The bytes that a coverage-guided fuzzer gives."""

    def __init__(self, data: bytes):
        import atheris

        source = atheris.FuzzedDataProvider(data)
        self.below = lambda n: source.ConsumeIntInRange(0, n - 1)


# ------------------------------------------------------------------------------- files as trees of JSON's values and bytes

HUGE, DEEP = "\x00huge\x00", "\x00deep\x00"  # what `json` does not write: a number of 5,000 digits, 100,000 lists


def _json(tree: Any) -> bytes:
    text = json.dumps(tree)
    for mark, value in ((HUGE, "1" * 5000), (DEEP, "[" * 100_000 + "]" * 100_000)):
        text = text.replace(json.dumps(mark), value)
    return text.encode()


def _read_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _write_lines(tree: Any) -> bytes:
    return b"\n".join(map(_json, tree)) + b"\n"


def _read_safetensors(data: bytes) -> Any:
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:end])
    metadata = tensors.pop("__metadata__", {})
    for name, tensor in tensors.items():
        begin, stop = tensor.pop("data_offsets")
        tensor["data"] = data[end + begin : end + stop]
        if ".quant_state." in name:
            tensor["data"] = json.loads(tensor["data"])
    return {"metadata": metadata, "tensors": tensors, "shift": 0}


def _write_safetensors(tree: Any) -> bytes:
    header, body = {"__metadata__": tree["metadata"]}, b""
    for name, tensor in tree["tensors"].items():
        tensor = dict(tensor)
        data = tensor.pop("data")
        if not isinstance(data, bytes):
            data = _json(data)
            if not isinstance(tensor["shape"], str):
                tensor["shape"] = [len(data)]
        header[name] = {**tensor, "data_offsets": [len(body) + tree["shift"], len(body) + len(data)]}
        body += data
    text = _json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _read_gguf(data: bytes) -> Any:
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        return take(f"{take('Q')}s").decode()

    def value(kind: int) -> Any:
        if kind == 9:
            inner, n = take("I"), take("Q")
            return [inner, [value(inner) for _ in range(n)]]
        return text() if kind == 8 else take(_GGUF_NUMBERS[kind])

    version, n_tensors, n_entries = take("I"), take("Q"), take("Q")
    entries = []
    for _ in range(n_entries):
        name, kind = text(), take("I")
        entries.append([name, kind, value(kind)])
    tensors = [[text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")] for _ in range(n_tensors)]
    return {"version": version, "entries": entries, "tensors": tensors, "counts": [0, 0], "data": data[-(-at // 32) * 32 :]}


def _write_gguf(tree: Any) -> bytes:
    def number(form: str, value: Any) -> bytes:
        if form in "fd":
            return struct.pack(f"<{form}", float(value))
        return (int(value) % 256 ** struct.calcsize(form)).to_bytes(struct.calcsize(form), "little")

    def text(value: Any) -> bytes:
        data = str(value).encode("utf-8", "surrogatepass")
        return number("Q", len(data)) + data

    def any_(kind: int, value: Any) -> bytes:
        if kind == 9:
            return number("I", value[0]) + number("Q", len(value[1])) + b"".join(any_(value[0], v) for v in value[1])
        return text(value) if kind == 8 else number(_GGUF_NUMBERS.get(kind, "Q"), value)

    parts = [b"GGUF", number("I", tree["version"])]
    parts += [number("Q", len(tree[what]) + more) for what, more in zip(("tensors", "entries"), tree["counts"])]
    parts += [text(name) + number("I", kind) + any_(kind, value) for name, kind, value in tree["entries"]]
    for name, shape, kind, offset in tree["tensors"]:
        parts += [text(name), number("I", len(shape)), *(number("Q", n) for n in shape), number("I", kind), number("Q", offset)]
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % 32) + tree["data"]


def _read_csv(data: bytes) -> Any:
    names, *rows = csv.reader(io.StringIO(data.decode(), newline=""))
    return [names, *([json.loads(v) if n == "options" and v else v for n, v in zip(names, row)] for row in rows)]


def _write_csv(tree: Any) -> bytes:
    file = io.StringIO(newline="")
    for row in tree:
        csv.writer(file).writerow([_json(v).decode() if isinstance(v, (dict, list)) else v for v in row])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _read_tar(data: bytes) -> Any:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            content = archive.extractfile(member).read()
            found[member.name] = _read_tar(content) if member.name.endswith(".gz") else content.decode()
    return found


def _write_tar(tree: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, content in tree.items():
            data = _write_tar(content) if isinstance(content, dict) else str(content).encode("utf-8", "surrogatepass")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def _text(tree: Any) -> bytes:
    return str(tree).encode("utf-8", "surrogatepass")


TREES: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    ".json": (json.loads, _json),
    ".jsonl": (_read_lines, _write_lines),
    ".safetensors": (_read_safetensors, _write_safetensors),
    ".gguf": (_read_gguf, _write_gguf),
    ".csv": (_read_csv, _write_csv),
    ".gz": (_read_tar, _write_tar),
    ".xz": (lambda data: lzma.decompress(data).decode().split("\n"),
            lambda tree: lzma.compress(_text("\n".join(map(str, tree))), preset=0)),
}  # fmt: skip
TEXT = (bytes.decode, _text)
PACKED = {".gz": (gzip.decompress, gzip.compress), ".xz": (lzma.decompress, lzma.compress)}


# ------------------------------------------------------------------------------------------------------------ changes

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 65536, 10**6, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, -(2**63), 10**30, 0.5, -0.5]
NUMBERS += [1e-308, 1e308, -0.0, math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "x", "false", "none", "NaN", "../x", "/etc/passwd", "..", "a/b", "(", "[", "(.*)*x", "(a|.)*(.*)*b", "\x00", "é\u2028"]
TEXTS += ["\ud800", "\ufdd00\ufdd0", "x" * 70000, "1" * 5000, "1e9999", "{", "{x}", "{prompt}", "{{", "}}", "{% for i in range(99999) %}"]
TEXTS += ["{{ 'x' * 10**9 }}", "{{ messages | tojson(indent=10**9) }}", "{{ '\\ufdd05\\ufdd0' }}", "{% endfor %}", "\t", "\n", "|", "#", ","]
TEXTS += ["(?:(?:a{1000}){1000}){1000}x"]
VALUES = [None, True, False, [], {}, [[]], [None], {"": 0}, HUGE, DEEP, *NUMBERS, *TEXTS]


def change(tree: Any, draws: Draws) -> Any:
    """A tree with one node changed: of a container one inside it, more often than itself."""
    if isinstance(tree, (dict, list)) and tree and draws.chance(0.85):
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key, what = draws.choice(keys), draws.below(20)
        if what == 0:
            del tree[key]
        elif what == 1:  # put there what stands elsewhere
            tree[key] = deepcopy(tree[draws.choice(keys)])
        elif what == 2 and isinstance(tree, dict):  # rename
            tree[draws.choice([*map(str, tree), *TEXTS])] = tree.pop(key)
        elif what == 2:  # again
            tree.insert(key, tree[key])
        else:
            tree[key] = change(tree[key], draws)
        return tree
    what = draws.below(10)
    if what < 3:
        return deepcopy(draws.choice(VALUES))  # for later changes may go into it
    if isinstance(tree, bytes):
        return change_bytes(tree, draws)
    if isinstance(tree, str):
        return change_text(tree, draws)
    if isinstance(tree, (int, float)) and not isinstance(tree, bool):
        return draws.choice(NUMBERS) if what < 6 else draws.choice([tree + 1, tree - 1, tree * 2, -tree, float(tree), str(tree)])
    if isinstance(tree, list):
        return [*tree, deepcopy(draws.choice(VALUES))]
    return {**tree, draws.choice(TEXTS): deepcopy(draws.choice(VALUES))} if isinstance(tree, dict) else [tree]


def change_text(text: str, draws: Draws) -> str:
    """Something put in, taken out, or twice."""
    begin = draws.below(len(text) + 1)
    end = min(len(text), begin + draws.below(20))
    put = draws.choice([text[begin:end] * 2, draws.choice(TEXTS), "", str(draws.choice(NUMBERS)), chr(draws.below(256))])
    return text[:begin] + put + text[end:]


def change_bytes(data: bytes, draws: Draws) -> bytes:
    """The same of bytes; and the file cut off."""
    at, what = draws.below(min(len(data), 10**draws.below(7)) + 1), draws.below(6)  # the beginning more often
    end = at + 1 + draws.below(16)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[end:]
    if what == 2:
        return data[:at] + data[at:end] * 2 + data[end:]
    if what == 3:
        number = int(draws.choice([n for n in NUMBERS if isinstance(n, int)])) % 2**64
        return data[:at] + number.to_bytes(8, "little")[: draws.choice([1, 4, 8])] + data[end:]
    return data[:at] + bytes(draws.below(256) for _ in range(draws.choice([1, 1, 4]))) + data[at + (what == 4) :]


class Inputs:
    """The inputs of one reader: folders made of its valid ones."""

    def __init__(self, name: str, reader: Any, folder: Path):
        self.name, self.reader, self.here = name, reader, folder / "input"
        reader.make(folder / "valid")
        self.valid = sorted((folder / "valid").iterdir())
        self._trees: dict[Path, Any] = {}

    def make(self, draws: Draws) -> Path:
        """The next input, at the same place as the one before."""
        valid = draws.choice(self.valid)
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(valid, self.here)
        files = [path for pattern in self.reader.changed for path in sorted(self.here.glob(pattern))]
        for _ in range(1 + draws.chance(0.1)):
            self._change(draws.choice(files), valid, draws)
        if self.reader.finish is not None and draws.chance(0.9):
            self.reader.finish(self.here)
        return self.here

    def _change(self, path: Path, valid: Path, draws: Draws) -> None:
        data = path.read_bytes()
        read, write = TREES.get(path.suffix, TEXT)
        if draws.chance(0.85):
            source = valid / path.relative_to(self.here)
            if source not in self._trees:
                self._trees[source] = marshal.dumps(read(source.read_bytes()))
            tree = marshal.loads(self._trees[source])  # much faster than a deep copy
            for _ in range(draws.choice([1, 1, 1, 2, 3])):
                tree = change(tree, draws)
            try:
                data = write(tree)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error, csv.Error):
                pass  # no file of this kind says that: its bytes are changed instead
        if data == path.read_bytes() or draws.chance(0.1):
            unpack, pack = PACKED.get(path.suffix, (bytes, bytes)) if draws.chance(0.5) else (bytes, bytes)
            try:
                data = pack(change_bytes(unpack(data), draws))
            except (OSError, EOFError, zlib.error, lzma.LZMAError):  # it is damaged already
                data = change_bytes(data, draws)
        path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------ trying


class TooSlow(BaseException):
    """Time is up."""


def attempt(reader: Any, folder: Path) -> tuple[str, str]:
    """(what became of an input, and for what is not as it should be, what happened where)."""

    def ring(*_: Any) -> None:
        raise TooSlow

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 15 * SECONDS)}
    before = {number: signal.signal(number, ring) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    began = time.process_time()
    try:
        reader.read(folder)
        outcome = "loaded"
    except TooSlow as error:
        return "slow or large", f"no end after {SECONDS:g} s {_place(error)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if any(isinstance(e, MemoryError) for e in chain):
            return "slow or large", f"more than {MEGABYTES} MB {_place(chain[-1])}"
        if type(error) not in reader.errors:
            return "wrong type", f"{type(error).__name__} {_place(error)}: {str(error)[:100]}"
        outcome = "documented error"
    finally:
        for number, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])
    if time.process_time() - began > SECONDS:
        return "slow or large", f"{time.process_time() - began:.1f} s"
    return outcome, ""


def _place(error: BaseException) -> str:
    """The innermost line of the package in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}minipeft{os.sep}" in f.filename]
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of the package"


class Report:
    """What became of the inputs of one reader; failing ones are kept."""

    def __init__(self, name: str, failures: Path | None):
        self.name, self.failures, self.counts, self.kinds = name, failures, Counter(), Counter()
        self.first: dict[str, Any] = {}

    def add(self, number: Any, outcome: str, what: str, folder: Path) -> None:
        self.counts[outcome] += 1
        if not what:
            return
        kind = what.partition(": ")[0]
        self.kinds[kind] += 1
        self.first.setdefault(kind, (number, what))
        if self.failures is not None and self.kinds[kind] <= 5:
            shutil.copytree(folder, self.failures / self.name / str(number), dirs_exist_ok=True)

    def row(self) -> str:
        columns = ("loaded", "documented error", "wrong type", "slow or large")
        return f"{self.name:12} {self.counts.total():>9,} " + " ".join(f"{self.counts[c]:>16,}" for c in columns)


HEAD = f"{'reader':12} {'tried':>9} {'loaded':>16} {'documented error':>16} {'wrong type':>16} {'slow or large':>16}"


def limit_memory() -> None:
    """No more than MEGABYTES beside what the process has now, where the system says that."""
    if not os.path.exists("/proc/self/statm"):
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEGABYTES << 20), resource.RLIM_INFINITY))


def fuzz(
    name: str, reader: Any, inputs: int, seed: int, start: int = 0, failures: Path | None = None, show: Any = None
) -> Report:
    """Try inputs number start, start + 1, ... of a seed."""
    report, shown = Report(name, failures), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        source = Inputs(name, reader, Path(folder))
        for path in source.valid:  # valid ones load; and what is imported late does not count
            reader.read(shutil.copytree(path, source.here / path.name))
        limits = resource.getrlimit(resource.RLIMIT_AS)
        limit_memory()
        try:
            for number in range(start, start + inputs):
                path = source.make(Draws(seed, name, number))
                report.add(number, *attempt(reader, path), path)
                if show is not None and time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    show(f"{report.row()}  (input {number})")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    return report


def guided(name: str, reader: Any, inputs: int, seed: int, failures: Path | None) -> None:
    """The same with changes that atheris chooses; it ends the process."""
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    source, report = Inputs(name, reader, folder), Report(name, failures)
    for path in source.valid:
        reader.read(shutil.copytree(path, source.here / path.name))

    def one(data: bytes) -> None:
        path = source.make(Guided(data))
        report.add(report.counts.total(), *attempt(reader, path), path)
        if report.counts.total() == inputs:
            show_reports([report])
            shutil.rmtree(folder)
            os._exit(bool(report.kinds))

    atheris.Setup([sys.argv[0], f"-seed={seed}", f"-runs={inputs * 2}", "-max_len=4096", "-len_control=0", "-verbosity=0"], one)
    atheris.Fuzz()


def show_reports(reports: list[Report]) -> None:
    """The table, and below it each kind of failure once."""
    print(HEAD, *[report.row() for report in reports], sep="\n")
    for report in reports:
        for kind, count in report.kinds.most_common():
            number, what = report.first[kind]
            print(f"{report.name}: {count} as input {number}: {what!r}")
    sys.stdout.flush()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", help="all, or the name of one; a wrong name lists them")
    parser.add_argument("--inputs", type=int, default=1000, metavar="N", help="of each reader (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="names the inputs (default: 0)")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="number of the first input, to go on (default: 0)")
    parser.add_argument("--failures", type=Path, metavar="DIR", help="keep inputs that fail in DIR/READER/NUMBER")
    parser.add_argument("--coverage", action="store_true", help="one reader, guided by atheris")
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MINIPEFT_THREADS", "RAYON_NUM_THREADS"):  # a thread takes address space
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if args.coverage:
        try:
            import atheris
        except ImportError:
            parser.error("--coverage takes the package atheris: pip install atheris")
        with atheris.instrument_imports(include=["minipeft"]):
            from fuzz_readers import READERS
    else:
        from fuzz_readers import READERS
    import numpy as np

    if args.reader not in ("all", *READERS):
        parser.error(f"the readers are {', '.join(READERS)}; got {args.reader!r}")
    np.seterr(all="ignore")
    warnings.simplefilter("ignore")
    if args.coverage:
        guided(args.reader, READERS[args.reader], args.inputs, args.seed, args.failures)
    reports = []
    for name in READERS if args.reader == "all" else [args.reader]:
        show = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        reports.append(fuzz(name, READERS[name], args.inputs, args.seed, args.start, args.failures, show))
        show(reports[-1].row())
    show_reports(reports)
    return int(any(report.kinds for report in reports))


if __name__ == "__main__":
    sys.exit(main())
