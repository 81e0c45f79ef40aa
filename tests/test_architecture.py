"""The structure that the design promises: layers import one way, the import is light, the top level holds five things."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_layers_import_one_way():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_stands_in_one_file():
    files = {path.relative_to(ROOT / "minipeft"): path.read_text(encoding="utf-8") for path in (ROOT / "minipeft").rglob("*.py")}
    assert [str(name) for name, text in files.items() if "__device__" in text or "long long" in text] == ["cuda_kernels.py"]


def test_import_loads_numpy_and_little_else():
    code = "import sys, minipeft; minipeft.Tensor, minipeft.Transformer; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "rich", "tokenizers", "torch", "safetensors", "cupy", "scipy"} & set(loaded)


def test_every_public_name_exists():
    import minipeft

    for package in (minipeft, *(getattr(minipeft, n) for n in "accounting diagrams evaluation hub nn peft rlhf text train".split())):
        assert package.__all__
        for name in package.__all__:
            assert getattr(package, name) is not None and name in dir(package)
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing
    assert minipeft.functional is minipeft.autograd.ops and minipeft.train.schedule.SCHEDULES


def test_numeric_layers_name_no_array_library():
    """In code whose arrays may live on a device, `np` may make and describe host values, never compute."""
    allowed = {"ndarray", "generic", "float16", "float32", "float64", "int64", "uint8", "dtype", "random", "cumsum", "prod"}
    allowed |= {"asarray", "array", "zeros", "ones", "full", "broadcast_to", "sqrt", "integer", "floating", "arange", "flatnonzero"}
    # The judge moves everything to the host first, its cases begin there, and tokens are drawn there from the last logits;
    # kernels.py is for NumPy's arrays alone.
    host = {"gradcheck.py", "cases.py", "generation.py", "kernels.py"}
    found = []
    for layer in ("autograd", "nn"):
        for path in {p for p in (ROOT / "minipeft" / layer).glob("*.py") if p.name not in host}:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np" and node.attr not in allowed:
                    found.append(f"{path.name}:{node.lineno} np.{node.attr}")
    assert not found, found
