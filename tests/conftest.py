"""Every test that takes `xp` runs on NumPy and on a stand-in device; `--device cupy` runs it on a real GPU instead.

Such a test makes its arrays with `xp.asarray(numpy_array)`, computes, and reads back with
`minipeft.backend.to_numpy(array)`. The stand-in (tests/strict_device.py) refuses what CuPy would refuse.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import socket
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from minipeft import backend
from minipeft.train.metrics import png

os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n auto`: a process a core, so a thread each
    os.environ.setdefault("MINIPEFT_THREADS", "1")
settings.register_profile("a slow machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("a slow machine")

DEVICES = {"numpy": "numpy", "strict": "strict_device", "cupy": "cupy"}
NO_INVERSE = pytest.StashKey[str]()
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "", None)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        action="append",
        choices=list(DEVICES),
        help="array library that tests with the fixture xp use; may be repeated (default: numpy and strict)",
    )


def pytest_configure(config):
    if "cupy" not in (config.getoption("device") or []):
        return
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise pytest.UsageError(f"--device cupy needs CuPy, the extra 'gpu' of minipeft: {error}") from None
    try:
        count, reason = cupy.cuda.runtime.getDeviceCount(), "it lists none"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        count, reason = 0, str(error)
    if count == 0:
        raise pytest.UsageError(f"--device cupy needs a GPU, and CuPy finds none here: {reason}")
    try:
        cupy.linalg.inv(cupy.eye(2))
    except Exception as error:
        config.stash[NO_INVERSE] = f"CuPy cannot invert a matrix here: {type(error).__name__}: {error}"


def pytest_collection_modifyitems(config, items):
    """Where CuPy has no cuSOLVER, the op `inv`, and exact OFT, which is made of it, are not tested on it."""
    if (reason := config.stash.get(NO_INVERSE, None)) is not None:
        for item in items:
            if "cupy" in item.name and ("inv" in re.split(r"[\[\]-]", item.name) or "oft exactly" in item.name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection(session):
    """Nothing that collecting makes is garbage, and nobody need look for it."""
    gc.disable()


def pytest_collection_finish(session):
    """What was collected stays to the end: who looks for garbage need not look at thousands of tests each time, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


@pytest.hookimpl(trylast=True)  # behind the end of the file's fixtures
def pytest_runtest_teardown(item, nextitem):
    """So does what the tests of a file have loaded, such as rows and modules."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_generate_tests(metafunc):
    if "xp" in metafunc.fixturenames:
        names = metafunc.config.getoption("device") or ["numpy", "strict"]
        metafunc.parametrize("xp", list(dict.fromkeys(names)), indirect=True)


@pytest.fixture(scope="module")
def xp(request):
    """The array library under test: numpy, the strict stand-in for CuPy, or CuPy."""
    return importlib.import_module(DEVICES[request.param])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def threads():
    """Sets the number of threads; afterwards it is as before."""
    before = backend.get_num_threads()
    yield backend.set_num_threads
    backend.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Any attempt to reach another host fails; sockets of this machine stay open to it."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local_connect(self, address):
        if isinstance(address, tuple) and address[0] not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to connect to {address[0]}: tests use no network")
        return connect(self, address)

    def local_resolve(host, *args, **kwargs):
        if host not in LOCAL_HOSTS:
            raise RuntimeError(f"a test tried to look up {host}: tests use no network")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_connect)
        patch.setattr(socket, "getaddrinfo", local_resolve)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """`os.fsync` checks its descriptor and returns: that files outlive a power cut is nothing that a test could see.

    When it is called, test_files.py sees; processes that tests start wait as usual.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_rendering():
    """A command's figure is made, and not rendered, which takes longer than its training here; see `rendered`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minipeft.train.metrics.png", lambda figure: b"not rendered")
        yield


@pytest.fixture
def rendered(monkeypatch):
    """For tests that look at pictures: figures are rendered."""
    monkeypatch.setattr("minipeft.train.metrics.png", png)


@pytest.fixture
def methods_as_before(tmp_path):
    """What a test registers as a method of its own is forgotten."""
    from minipeft.peft.huggingface import PEFT_TYPES
    from minipeft.peft.methods import METHODS

    tables, path = [(table, dict(table)) for table in (PEFT_TYPES, METHODS)], list(sys.path)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    sys.path[:] = path
    for name in [n for n, m in sys.modules.items() if str(tmp_path) in (getattr(m, "__file__", None) or "")]:
        del sys.modules[name]
