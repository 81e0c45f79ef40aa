"""Files appear whole or not at all, and one sentence says why a file is not what it claims to be."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minipeft.files import (
    FileError,
    read_json,
    read_safetensors,
    write_atomic,
    write_json,
    write_safetensors,
    write_text,
)

DTYPES = ["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "u1", "?", "<u2", "<u4", "<u8"]


def raw(path, header, data=b"", length=None):
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --------------------------------------------------------------------------------------------------- atomic writes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the ne")
        raise error

    with pytest.raises(error):
        write_atomic(path, write)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    write_text(tmp_path / "file", "text")
    assert events == ["fsync", "rename", "fsync"]


def test_killed_while_writing_the_old_file_is_whole(tmp_path):
    path = tmp_path / "weights.safetensors"
    old = {"w": np.arange(100_000, dtype=np.float32)}
    write_safetensors(path, old)
    code = f"""if True:
        import numpy as np
        from minipeft.files import write_safetensors
        print("ready", flush=True)
        while True:
            write_safetensors({str(path)!r}, {{"w": np.arange(100_000, dtype=np.float32)}})
    """
    for pause in (0.0, 0.003, 0.01):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        np.testing.assert_array_equal(read_safetensors(path)[0]["w"], old["w"])


def test_two_writers_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"

    def write(file):
        write_text(path, "inner")
        file.write(b"outer")

    write_atomic(path, write)
    assert path.read_text() == "outer" and os.listdir(tmp_path) == ["file"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "file", "w+") as file:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{file.fileno()}")  # as /dev/stdout is where it goes to a file
        for name in ("pipe", "stdout"):
            with pytest.raises(ValueError, match=f"/{name}: is a device, a pipe or an open file; name a file"):
                write_text(tmp_path / name, "new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "stdout").is_symlink() and not (tmp_path / "file").read_text()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")  # takes the place of the link
    assert not (tmp_path / "link").is_symlink() and not (tmp_path / "file").read_text()


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory: '.*nowhere'$"):
        write_text(tmp_path / "nowhere" / "file", "text")


# ------------------------------------------------------------------------------------------------------------ JSON


def test_json_round_trip(tmp_path):
    value = {"é": [1, 2.5, None, True], "b": {"nested": "日本"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n") and "日本" in (tmp_path / "a.json").read_text("utf-8")


def test_a_full_disk_is_named(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*model\.bin'"):
        write_atomic(tmp_path / "model.bin", full)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_utf8_is_written_in_ascii_and_read_again(tmp_path):
    path = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "x.json", {"output": path})
    assert read_json(tmp_path / "x.json") == {"output": path}
    assert rb'"caf\udce9"' in (tmp_path / "x.json").read_bytes()


def test_json_writes_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"), (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "not valid JSON .*nested"),
        (b"[" * 100_000, "not valid JSON"), ("a directory", "cannot be read"),
    ],
)  # fmt: skip
def test_bad_json_names_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content == "a directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=rf"config.json: {message}"):
        read_json(path)


# ----------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    a = (np.random.default_rng(0).uniform(0, 2, (3, 4)) * 50).astype(dtype)
    arrays = {"a": a, "scalar": a[0, 0].reshape(()), "empty": a[:0], "transposed": a.T, "strided": a[::2, 1::2]}
    write_safetensors(tmp_path / "f", arrays, {"format": "pt", "note": "é"})
    found, metadata = read_safetensors(tmp_path / "f")
    assert metadata == {"format": "pt", "note": "é"} and set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == np.dtype(dtype) and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_the_same_arrays_and_metadata_are_the_same_bytes(tmp_path):
    metadata = {"format": "pt", "base_in_4bit": "true", "note": "é"}
    for i in range(8):  # the library's own order is another each time
        write_safetensors(tmp_path / f"{i}", {"a": np.ones(3, np.float32)}, metadata)
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(8)}) == 1


def test_the_safetensors_library_reads_what_we_write_and_the_other_way_round(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {"b": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.array([1, 2], np.int64)}
    write_safetensors(tmp_path / "ours", arrays)
    save_file(arrays, tmp_path / "theirs", metadata={"k": "v"})
    for found in (load_file(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")[0]):
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert read_safetensors(tmp_path / "theirs")[1] == {"k": "v"}


def test_the_same_arrays_give_the_same_bytes_and_nothing_gives_a_file(tmp_path):
    a, b = np.ones(3, np.float32), np.zeros((2, 2))
    write_safetensors(tmp_path / "1", {"a": a, "b": b})
    write_safetensors(tmp_path / "2", {"b": b, "a": a})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    write_safetensors(tmp_path / "3", {})
    assert read_safetensors(tmp_path / "3") == ({}, {})


def test_bfloat16_is_widened_bit_for_bit(tmp_path):
    bits = np.array([0x3F80, 0xC049, 0x0001, 0x7F80, 0xFF80, 0x8000, 0x7FC1], np.uint16)
    path = raw(tmp_path / "f", {"w": entry([7], 0, 14, "BF16")}, bits.tobytes())
    w = read_safetensors(path)[0]["w"]
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w.view(np.uint32), bits.astype(np.uint32) << 16)
    assert w[0] == 1.0 and w[1] == -3.140625 and np.isinf(w[3]) and np.isnan(w[6])


def test_reading_maps_the_file_and_cannot_change_it(tmp_path):
    path = tmp_path / "big"
    write_safetensors(path, {"a": np.zeros((1000, 1000), np.float32), "b": np.ones(5, np.float32)})
    tracemalloc.start()
    try:
        arrays, _ = read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of 4 MB of weights
    finally:
        tracemalloc.stop()
    assert not arrays["a"].flags.writeable and not arrays["a"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        arrays["b"][0] = 2
    write_safetensors(path, {"a": np.ones(1, np.float32)})  # replacing the file leaves what was read
    assert arrays["b"].tolist() == [1.0] * 5


ONE = {"a": entry([1], 0, 4)}
GOOD = {"a": entry([2, 2], 0, 16), "b": entry([1], 16, 20)}
BAD = {
    "empty file": lambda p: p.write_bytes(b""),
    "a few bytes": lambda p: p.write_bytes(b"abc"),
    "text": lambda p: p.write_text("import torch\n" * 10),
    "a pickle": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
    "header cut off": lambda p: raw(p, GOOD, length=10_000),
    "huge header": lambda p: raw(p, GOOD, bytes(20), length=1 << 63),
    "header that is not JSON": lambda p: raw(p, b"{nonsense", bytes(20)),
    "header that is not UTF-8": lambda p: raw(p, b'{"\xff": 1}', bytes(20)),
    "header that is nested without end": lambda p: raw(p, b'{"a":' * 100_000, bytes(20)),
    "header that is a list": lambda p: raw(p, [1, 2], bytes(20)),
    "entry that is a number": lambda p: raw(p, {"a": 1}, bytes(20)),
    "entry without dtype": lambda p: raw(p, {"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "three offsets": lambda p: raw(p, {"a": entry([1], 0, 4) | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "offsets that are text": lambda p: raw(p, {"a": entry([1], "0", "4")}, bytes(4)),
    "fractional shape": lambda p: raw(p, {"a": entry([1.5], 0, 6)}, bytes(6)),
    "metadata that is a list": lambda p: raw(p, {"__metadata__": [1], **ONE}, bytes(4)),
    "metadata that is not text": lambda p: raw(p, {"__metadata__": {"a": 1}, **ONE}, bytes(4)),
    "data cut off": lambda p: raw(p, GOOD, bytes(19)),
    "no data": lambda p: raw(p, GOOD),
    "shape and offsets disagree": lambda p: raw(p, {"a": entry([3], 0, 16)}, bytes(16)),
    "negative offset": lambda p: raw(p, {"a": entry([1], -4, 0)}, bytes(4)),
    "offsets in the wrong order": lambda p: raw(p, {"a": entry([1], 4, 0)}, bytes(4)),
    "negative shape": lambda p: raw(p, {"a": entry([-1, -4], 0, 16)}, bytes(16)),
    "huge shape": lambda p: raw(p, {"a": entry([1 << 40, 1 << 40], 0, 16)}, bytes(16)),
    "shape whose size overflows to fit": lambda p: raw(p, {"a": entry([1 << 32, 1 << 32], 0, 0)}),
    "huge offset": lambda p: raw(p, {"a": entry([1], 1 << 62, (1 << 62) + 4)}, bytes(4)),
    "overlapping tensors": lambda p: raw(p, {**ONE, "b": entry([2], 2, 10)}, bytes(10)),
    "a hole between tensors": lambda p: raw(p, {**ONE, "b": entry([1], 8, 12)}, bytes(12)),
    "bytes after the last tensor": lambda p: raw(p, GOOD, bytes(24)),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_file_is_one_clear_error_that_names_it(tmp_path, name):
    path = tmp_path / "model.safetensors"
    BAD[name](path)
    size = path.stat().st_size
    message = rf"model.safetensors: {size} bytes, no safetensors file, or a cut or damaged one \([^\n]+\)$"
    with pytest.raises(FileError, match=message):
        read_safetensors(path)


def test_a_dtype_that_numpy_lacks_is_refused_by_its_name(tmp_path):
    path = raw(tmp_path / "f", {"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4))
    with pytest.raises(FileError, match="'a' has the dtype F8_E4M3, which is not supported"):
        read_safetensors(path)


def test_a_missing_file_or_a_directory(tmp_path):
    with pytest.raises(FileError, match=r"gone.safetensors: no such file"):
        read_safetensors(tmp_path / "gone.safetensors")
    with pytest.raises((FileError, OSError)):
        read_safetensors(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_within_its_bytes(tmp_path, data):
    """Any byte of the header changed, or any cut: FileError or arrays, never another exception."""
    path, whole = tmp_path / "f", tmp_path / "whole"
    if not whole.exists():
        write_safetensors(whole, {"a": np.ones((2, 3), np.float32), "b": np.arange(4)}, {"k": "v"})
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        with pytest.raises(FileError):
            path.write_bytes(content)
            read_safetensors(path)
        return
    content[data.draw(st.integers(0, len(content) - 57))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        arrays, _ = read_safetensors(path)
    except FileError:
        return
    assert sum(a.nbytes for a in arrays.values()) <= len(content)


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**62], [2**64 - 1, 0], [1] * 65])
def test_a_shape_that_no_array_has_is_refused(tmp_path, shape):
    path = raw(tmp_path / "f", {"w": entry(shape, 0, 0 if 0 in shape else 4)}, b"" if 0 in shape else b"abcd")
    with pytest.raises(FileError, match=r"'w' has the shape .*, which no array has"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype", [np.longdouble, np.complex128])
def test_a_dtype_that_the_format_does_not_have_is_named_and_nothing_is_written(tmp_path, dtype):
    with pytest.raises(TypeError, match=r"cannot be written as safetensors .*(float128|longdouble|complex128)"):
        write_safetensors(tmp_path / "f", {"w": np.ones(3, dtype)})
    assert os.listdir(tmp_path) == []
