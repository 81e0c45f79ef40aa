"""python .ci/stand_in.py LESSON: a lesson with the tests' stand-in for CuPy where MINIPEFT_BACKEND=cupy asks for it."""

import runpy
import sys

sys.path.insert(0, "tests")
import strict_device

from minipeft import backend

real = backend.get_backend
backend.get_backend = lambda name=None: strict_device if name in (None, "cupy") else real(name)  # before others import it
sys.argv = sys.argv[1:]
sys.path.insert(0, "lessons")
runpy.run_path(sys.argv[0], run_name="__main__")
