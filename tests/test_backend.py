"""Which library computes, with how many threads, from which random stream."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import strict_device
from hypothesis import given
from hypothesis import strategies as st

from minipeft import backend, cuda_kernels, philox
from minipeft.backend import BackendError, Rng, add_at, as_rng, asarray, get_backend, read, scatter_add, to_numpy, xp_of


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("MINIPEFT_")}
    return subprocess.run([sys.executable, "-c", code], env=keep | environment, capture_output=True, text=True)


# --------------------------------------------------------------------------------------------------------- library


def test_xp_of_is_the_library_of_the_arrays(xp):
    a = xp.asarray(np.ones(2))
    assert xp_of(a) is xp and xp_of(None, 2.0, a, a, True) is xp


def test_xp_of_without_an_array_is_numpy():
    assert xp_of() is np and xp_of(1, None, 2.5, [1, 2], np.float32(1)) is np


def test_xp_of_takes_subclasses_of_ndarray_for_numpy(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    assert xp_of(np.load(tmp_path / "a.npy", mmap_mode="r"), np.ones(3)) is np


def test_xp_of_refuses_two_libraries():
    with pytest.raises(BackendError, match=r"\(numpy and strict_device\).*to_numpy or minipeft.backend.asarray"):
        xp_of(np.ones(2), strict_device.asarray(np.ones(2)))


def test_moves_are_explicit_and_copy_only_across(xp):
    host = np.arange(3.0)
    there = asarray(host, xp)
    assert xp_of(there) is xp and asarray(there, xp) is there
    np.testing.assert_array_equal(to_numpy(there), host)
    assert to_numpy(host) is host and asarray(host, "numpy") is host
    assert xp_of(asarray(there, np)) is np
    assert asarray([1, 2], xp).tolist() == [1, 2]


def test_arrays_are_read_together_in_float64_and_in_their_shapes(xp):
    given = [np.float32(0.1) * np.ones(()), np.arange(6, dtype=np.int64).reshape(2, 3), np.array([True, False]), np.zeros((0, 4))]
    found = read(*(xp.asarray(a) for a in given), 2.5, np.ones(3, np.float16))  # numbers of the host stay there
    for a, b in zip(found, [*given, 2.5, np.ones(3)], strict=True):
        assert type(a) is np.ndarray and a.dtype == np.float64 and a.shape == np.shape(b)
        np.testing.assert_array_equal(a, np.asarray(b, np.float64))
    assert read() == []


def test_get_backend_by_name_and_environment(monkeypatch):
    monkeypatch.delenv("MINIPEFT_BACKEND", raising=False)
    assert get_backend() is np and get_backend("numpy") is np
    monkeypatch.setenv("MINIPEFT_BACKEND", "numpy")
    assert get_backend() is np
    monkeypatch.setenv("MINIPEFT_BACKEND", "torch")
    with pytest.raises(BackendError, match="unknown backend 'torch'; choose 'numpy' or 'cupy'"):
        get_backend()
    assert get_backend("numpy") is np  # an argument goes before the environment


def test_cupy_without_cupy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # what `import cupy` does where it is not installed
    monkeypatch.setenv("MINIPEFT_BACKEND", "cupy")
    with pytest.raises(BackendError, match=r"not installed; .*pip install 'minipeft\[gpu\]' for 12"):
        get_backend()


class Device:
    """What `get_backend` asks of CuPy: the number of its GPUs, a kernel and a matrix product."""

    def __init__(self, count, broken):
        def devices():
            if isinstance(count, Exception):
                raise count
            return count

        def fails(what, *_):
            if what == broken:
                raise RuntimeError(f"CuPy failed to load {what}: cannot open shared object file")
            return self

        self.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=devices))
        self.ones, self.product = partial(fails, "libnvrtc.so.12"), partial(fails, "libcublas.so.12")

    def __matmul__(self, other):
        return self.product()

    def get(self):
        return np.full((2, 2), 2.0)


@pytest.mark.parametrize(
    ("count", "broken", "reason"),
    [
        (RuntimeError("no CUDA-capable device"), None, "finds no usable GPU: no CUDA-capable device$"),
        (0, None, r"finds no GPU on this machine \(or CUDA_VISIBLE_DEVICES hides it\)$"),
        (1, "libnvrtc.so.12", r"cannot compute on it: .*libnvrtc.so.12: .*; install the extra .*'minipeft\[gpu13\]' for 13$"),
        (2, "libcublas.so.12", r"cannot compute on it: .*libcublas.so.12: .*'minipeft\[gpu\]' for 12"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_sentence(monkeypatch, count, broken, reason):
    monkeypatch.setitem(sys.modules, "cupy", Device(count, broken))
    with pytest.raises(BackendError, match=reason):
        get_backend("cupy")


def test_a_gpu_that_computes_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", working := Device(1, None))
    assert get_backend("cupy") is working


def test_cupy_that_is_there_but_broken_is_not_called_missing(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match="CuPy cannot be imported: libcuda is too old"):
        get_backend("cupy")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed here")
def test_a_model_asked_onto_a_missing_gpu_is_one_clear_error():
    code = "import minipeft as mp; mp.Transformer(mp.TransformerConfig.llama())"
    done = python(code, MINIPEFT_BACKEND="cupy")
    assert done.returncode == 1 and "pip install 'minipeft[gpu]'" in done.stderr.splitlines()[-1]


def test_importing_the_package_loads_nothing_heavy():
    code = """if True:
        import sys, minipeft as mp
        light = set(sys.modules)
        mp.Tensor([1.0]), mp.Transformer, mp.functional, mp.optim
        print(*[m for m in sorted(set(sys.modules)) if "." not in m])
        print(*[m for m in light if m.startswith("minipeft.")])
    """
    loaded, ours = python(code).stdout.splitlines()
    heavy = {"matplotlib", "tokenizers", "rich", "torch", "transformers", "peft", "cupy", "safetensors", "hypothesis"}
    assert not heavy & set(loaded.split()) and "numpy" in loaded.split()
    assert ours == "minipeft.lazy"  # `import minipeft` alone loads nothing else of its own


LORA = """
net = mp.nn.Sequential(mp.nn.Linear(4, 4))
model = mp.get_peft_model(net, mp.LoraConfig(r=2, target_modules=["0"]))
model.get_nb_trainable_parameters(), model.merge_and_unload(), repr(model)
"""


@pytest.mark.parametrize(
    "use, others",
    [
        ("import minipeft.quant", ("minipeft.autograd.cases", "minipeft.quant.cases")),
        (LORA, ("minipeft.quant", "minipeft.autograd.cases", "minipeft.peft.dora")),
    ],
)
def test_a_part_loads_nothing_of_others_that_it_does_not_need(use, others):
    done = python(f"import sys, minipeft as mp\n{use}\nprint([m for m in sys.modules if m.startswith({others})])")
    assert done.stdout == "[]\n"


def test_a_tensor_has_its_operators_when_nothing_else_was_imported():
    code = "import minipeft as mp; x = mp.Tensor([1.0], requires_grad=True); (x * 2).backward(); print(x.grad)"
    assert python(code).stdout == "[2.]\n"


# ----------------------------------------------------------------------------------------------------- scatter_add


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=40), st.integers(0, 2**31))
def test_scatter_add_is_add_at(width, ids, seed):
    rows = np.random.default_rng(seed).standard_normal((len(ids), width))
    found, expected = np.ones((6, width)), np.ones((6, width))
    ids = np.array(ids, np.int64)
    scatter_add(found, ids, rows)
    np.add.at(expected, ids, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scatter_add_on_every_device_and_of_any_row_shape(xp, dtype):
    ids, rows = np.array([2, 0, 2, 2]), np.arange(24, dtype=dtype).reshape(4, 2, 3)
    out = xp.asarray(np.zeros((3, 2, 3), dtype))
    scatter_add(out, xp.asarray(ids), xp.asarray(rows))
    expected = np.stack([rows[1], 0 * rows[0], rows[0] + rows[2] + rows[3]])
    np.testing.assert_array_equal(to_numpy(out), expected)
    scatter_add(out, xp.asarray(ids[:0]), xp.asarray(rows[:0]))
    np.testing.assert_array_equal(to_numpy(out), expected)


PLACES = {  # of an array [4, 3, 2]
    "rows": np.array([2, 0, 2, -1, 2, 3]),
    "rows, in two axes": np.array([[2, 0], [2, -2]], np.int32),
    "no rows": np.array([], np.int64),
    "places": (np.array([1, -3, 1, 2]), np.array([0, 2, 0, -2])),
    "places that broadcast": (np.array([[1], [3]]), np.array([0, -1, 2, 2])),
    "elements": (np.array([1, 1, 3, 1]), np.array([0, 0, 2, 0]), np.array([1, 1, 0, 0])),
    "columns": (slice(None), np.array([1, 1, 0])),
    "columns of the last rows": (slice(2, None), slice(None), np.array([0, 0, 1])),
    "a row's columns": (2, np.array([0, 0])),
    "of the last axis": (..., np.array([1, 1, 1])),
    "a list": [0, 0, 3],
}


@pytest.mark.parametrize("index", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_add_at_adds_in_numpys_order_on_every_device(xp, index, dtype, rng):
    def there(part):
        return xp.asarray(part) if isinstance(part, np.ndarray) else part

    expected = rng.standard_normal((4, 3, 2)).astype(dtype)
    out, values = xp.asarray(expected.copy()), rng.standard_normal(expected[index].shape).astype(dtype)
    np.add.at(expected, index, values)
    add_at(out, tuple(map(there, index)) if isinstance(index, tuple) else there(index), xp.asarray(values))
    np.testing.assert_array_equal(to_numpy(out), expected)


def test_add_at_writes_into_views_of_other_layouts(xp, rng):
    expected, values = np.zeros((3, 4), np.float32), rng.standard_normal((5, 2)).astype(np.float32)
    out, ids = xp.asarray(expected.copy()), np.array([3, 0, 0, 3, 0])
    np.add.at(expected.T[:, 1:], ids, values)
    add_at(out.T[:, 1:], xp.asarray(ids), xp.asarray(values.T.copy()).T)
    np.testing.assert_array_equal(to_numpy(out), expected)


def scattered():
    generator = np.random.default_rng(0)
    out = np.zeros((50, 16), np.float32)
    scatter_add(out, generator.integers(0, 50, 20_000), generator.standard_normal((20_000, 16), np.float32))
    return out


@pytest.mark.parametrize("compute", [scattered, lambda: Rng(5).uniform_rows((1000, 300))], ids=["scatter_add", "Rng"])
def test_results_repeat_bit_for_bit_with_any_number_of_threads(compute, threads):
    results = []
    for n in (1, 2, 3, 1):
        threads(n)
        results.append(compute())
    for out in results[1:]:
        np.testing.assert_array_equal(out, results[0])


# --------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "rows, width", [(0, 10), (1, 1 << 20), (5, 1 << 18), (1000, 1000), (1 << 20, 1), (3, 0), (17, 3)]
)
def test_parallel_rows_covers_each_row_once(threads, n, rows, width):
    threads(n)
    times = np.zeros(rows, int)
    backend.parallel_rows(np, lambda s: np.add.at(times, np.arange(rows)[s], 1), rows, width)
    backend.split_rows(lambda s: np.add.at(times, np.arange(rows)[s], 10), rows, rows * width)
    np.testing.assert_array_equal(times, np.full(rows, 11))


def test_a_device_gets_the_whole_at_once():
    calls = []
    backend.parallel_rows(strict_device, calls.append, 1 << 20, 100)
    assert calls == [slice(0, 1 << 20)]


def test_work_is_really_spread_over_threads(threads):
    threads(3)
    names, barrier = set(), threading.Barrier(3, timeout=10)

    def part(rows):
        barrier.wait()  # passes only when three threads are here at once
        names.add(threading.current_thread().name)

    backend.split_rows(part, 3, 1 << 30)
    assert len(names) == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_in_a_task_reaches_the_caller_after_all_have_ended(threads, failing):
    threads(3)
    ended = []

    def task(i):
        if i == failing:
            raise ZeroDivisionError(f"task {i}")
        ended.append(i)

    with pytest.raises(ZeroDivisionError, match=f"task {failing}"):
        backend.run_tasks([lambda i=i: task(i) for i in range(3)])
    assert sorted(ended) == [i for i in range(3) if i != failing]
    backend.run_tasks([lambda i=i: ended.append(i) for i in range(3)])  # the pool lives on
    assert len(ended) == 5


def test_tasks_may_have_tasks_of_their_own(threads):
    threads(2)
    done = []

    def outer(i):
        backend.run_tasks([lambda j=j: done.append((i, j)) for j in range(3)])

    runner = threading.Thread(target=lambda: backend.run_tasks([lambda i=i: outer(i) for i in range(4)]), daemon=True)
    runner.start()
    runner.join(10)
    assert sorted(done) == [(i, j) for i in range(4) for j in range(3)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes_on():
    code = """if True:
        import os, signal, sys, warnings
        import numpy as np, minipeft as mp
        warnings.simplefilter("ignore")
        mp.backend.set_num_threads(2)
        x = np.ones((700, 300), np.float32)
        before = mp.functional.gelu(x).data
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            os._exit(0 if (mp.functional.gelu(x).data == before).all() else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert python(code).returncode == 0


def test_the_number_of_threads_can_change_while_others_compute(threads):
    x, stop = np.ones((700, 300), np.float32), threading.Event()

    def compute():
        while not stop.is_set():
            y = backend.elementwise(lambda out, a: np.add(a, 1, out=out), x)
            assert (y == 2).all()

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(compute) for _ in range(3)]
        for n in [2, 3, 1, 2] * 10:
            threads(n)
        stop.set()
        for worker in workers:
            worker.result()


def blas_threads():
    from threadpoolctl import threadpool_info

    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas" and "numpy" in i["filepath"]}


def test_set_num_threads_reaches_blas(threads):
    for n in (1, 2):
        threads(n)
        assert backend.get_num_threads() == n and blas_threads() == {n}
        with backend.one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {n}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", None])
def test_a_wrong_number_of_threads(wrong):
    with pytest.raises(BackendError, match=f"at least 1, not {wrong!r}"):
        backend.set_num_threads(wrong)


def test_threads_by_environment():
    code = "from minipeft.backend import get_num_threads as n; print(n())"
    assert python(code, MINIPEFT_THREADS="3").stdout == "3\n"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert python(code).stdout == python(code, MINIPEFT_THREADS="").stdout == f"{cores}\n"
    for wrong in ("0", "two", "-1", "1.5", "2²"):
        done = python(code, MINIPEFT_THREADS=wrong)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            f"MINIPEFT_THREADS={wrong!r} is not a number of threads; give an integer of at least 1"
        )


def test_attention_as_the_first_thing_computed_leaves_blas_its_threads():
    code = """if True:
        import numpy as np, minipeft as mp
        from threadpoolctl import threadpool_info
        x = np.ones((1, 2, 8, 4), np.float32)
        mp.functional.scaled_dot_product_attention(x, x, x)
        print(*{i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas" and "numpy" in i["filepath"]})
    """
    assert python(code, MINIPEFT_THREADS="2").stdout == "2\n"


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (700, 300)])
def test_elementwise_of_any_layout(shape):
    a = np.asarray(np.random.default_rng(0).standard_normal(shape))
    for b in (a, a.T.copy().T, np.broadcast_to(a, (2, *shape))[0]):
        found = backend.elementwise(lambda out, x, y: np.subtract(2 * x, y, out=out), a, b)
        np.testing.assert_array_equal(found, 2 * a - b)
        assert isinstance(found, np.ndarray)


# ---------------------------------------------------------------------------------------------------------- random


def test_a_stream_is_its_path(xp):
    a = to_numpy(Rng(3, 1, 4).uniform_rows((5, 7), xp))
    np.testing.assert_array_equal(to_numpy(Rng(3).at(1).at(4).uniform_rows((5, 7), xp)), a)
    np.testing.assert_array_equal(to_numpy(Rng(3).at(1, 4).uniform_rows((5, 7), xp)), a)
    for other in (Rng(3, 1, 5), Rng(4, 1, 4), Rng(3, 1), Rng(3, 1, 4, 0)):
        assert (to_numpy(other.uniform_rows((5, 7), xp)) != a).any()
    assert a.dtype == np.float32 and (a >= 0).all() and (a < 1).all()


def test_a_row_depends_on_its_place_in_the_batch_alone(xp):
    whole = to_numpy(Rng(1).uniform_rows((10, 3, 2), xp))
    part = to_numpy(Rng(1, first_row=4).uniform_rows((3, 3, 2), xp))
    np.testing.assert_array_equal(part, whole[4:7])
    np.testing.assert_array_equal(
        to_numpy(Rng(1, first_row=4).at(2).uniform_rows((1, 6), xp))[0], to_numpy(Rng(1, 2).uniform_rows((5, 6), xp))[4]
    )
    assert len({row.tobytes() for row in whole}) == 10


def test_rows_taken_from_a_batch_and_behind_padding_draw_what_they_draw_in_it(xp):
    whole = to_numpy(Rng(1, first_row=2).uniform_rows((4, 3, 2), xp))  # rows 2 to 5
    stream = Rng(1, first_row=2).take([3, 0])
    np.testing.assert_array_equal(to_numpy(stream.uniform_rows((2, 3, 2), xp)), whole[[3, 0]])
    np.testing.assert_array_equal(to_numpy(stream.at(7).take([1]).uniform_rows((1, 5), xp)),
                                  to_numpy(Rng(1, 7, first_row=2).uniform_rows((1, 5), xp)))  # fmt: skip
    padded = to_numpy(stream.behind([0, 2]).at().uniform_rows((2, 5, 2), xp))
    np.testing.assert_array_equal(padded[0, :3], whole[3])
    np.testing.assert_array_equal(padded[1, 2:], whole[0])
    assert not padded[1, :2].any()


def test_a_stream_is_uniform():
    u = Rng(11).uniform_rows((2000, 100))
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.size)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - u.size / 20) ** 2 / (u.size / 20)).sum() < 60  # chi-squared with 19 degrees: 60 is beyond 1e-5
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 5 / np.sqrt(u.size)  # adjacent rows


@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (5, 7), (2, 70_001), (3, 5, 9), (4,), (0, 3), (3, 0)])
def test_every_device_draws_the_numbers_of_numpys_philox(xp, shape):
    stream, n = Rng(3, 1 << 40, first_row=(1 << 33) + 7), int(np.prod(shape[1:]))
    found = to_numpy(stream.uniform_rows(shape, xp))
    assert found.shape == shape and found.dtype == np.float32
    for i, row in enumerate(found.reshape(shape[0], n)):
        source = np.random.Philox(key=philox.key_of(stream.path), counter=[0, (1 << 33) + 7 + i, 0, 0])
        np.testing.assert_array_equal(row, np.random.Generator(source).random(n, np.float32))


def test_devices_agree_on_rows_taken_and_padded(xp):
    stream = Rng(2, 5).take([9, 0, 4, 9]).behind([0, 3, 4, 1])
    for shape in ((4, 4), (4, 4, 3), (4, 40, 11)):
        np.testing.assert_array_equal(to_numpy(stream.uniform_rows(shape, xp)), stream.uniform_rows(shape))


PI = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89, 0x452821E638D01377,
      0xBE5466CF34E90C6C]  # fmt: skip


@pytest.mark.parametrize(
    "counter, key, expected",  # Random123's kat_vectors
    [
        ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ([2**64 - 1] * 4, [2**64 - 1] * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (PI[:4], PI[4:], "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
    ],
)
def test_philox_gives_the_published_vectors(xp, counter, key, expected):
    if xp.__name__ == "cupy":
        run = cuda_kernels.rows("run", "word k0, word k1, word* x", "philox(k0, k1, x);", cuda_kernels.PHILOX)
        x = xp.asarray(np.array(counter, np.uint64))
        run(xp.zeros(1), float, 1, 1, *map(np.uint64, key), x, threads=1)
        found = x.tolist()
    else:  # NumPy counts before it draws
        before = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % (1 << 256)
        found = np.random.Philox(counter=before, key=np.array(key, np.uint64)).random_raw(4).tolist()
    assert " ".join(f"{word:016x}" for word in found) == expected


def test_paths_that_end_in_zeros_are_streams_of_their_own():
    drawn = [Rng(*path).uniform_rows((2, 4)).tobytes() for path in ((), (0,), (0, 0), (0, 0, 0), (1 << 32,), (0, 1))]
    rows = {part for whole in drawn for part in (whole[:16], whole[16:])}
    assert len(rows) == 12


def test_as_rng():
    stream = Rng(1)
    assert as_rng(None) is None and as_rng(stream) is stream and as_rng(7).path == (7,)
