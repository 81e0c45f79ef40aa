"""Checkpoints: directories that appear whole or not at all, and are checked byte for byte when they are read.

    output_dir/checkpoint-120/model.safetensors       the trainable parameters
                              optimizer.safetensors   the optimizer's moments
                              callbacks.safetensors   what callbacks keep (AdaLoRA), if they do
                              best.safetensors        the trainable parameters of the best evaluation (early stopping)
                              state.json              everything else, the lines of metrics.jsonl up to here among it,
                                                      and the size and SHA-256 of the other files

A checkpoint is written into a temporary directory beside its place, every file and the directory are flushed to the
disk, and then the directory is renamed, which the file system does in one step. A crash or a `kill -9` at any moment
leaves the earlier checkpoints, and perhaps a temporary directory, which the next run removes. An old checkpoint is
deleted only when a newer one is on the disk, and a directory of that name that is none, never.

Frozen parameters are not stored, only their fingerprint: a checkpoint restores the full model together with the base
it was trained on, and refuses another base.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, is_array, to_numpy
from ..directory import discard
from ..files import FileError, expecting, fsync_directory, read_json, read_safetensors, write_json, write_safetensors
from ..nn.module import Module
from ..options import fits
from .optim import Optimizer

FORMAT = "minipeft checkpoint"
VERSION = 2


class CheckpointError(FileError):
    """A checkpoint is missing, damaged, or belongs to something else; the message names the file and the reason."""


def fingerprint(items: Iterable[tuple[str, Array]]) -> str:
    """SHA-256, in hexadecimal, over names, dtypes, shapes and bytes of arrays."""
    digest = hashlib.sha256()
    for name, array in items:
        host = np.ascontiguousarray(to_numpy(array))
        digest.update(f"{name} {host.dtype.str} {host.shape}\n".encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def arrays_in(value: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays, numbers and texts inside lists, tuples and dictionaries, by path; other objects are left out."""
    if is_array(value):
        yield name, value.astype(np.int64) if value.dtype.kind in "iu" else value  # the same in every width of integers
    elif isinstance(value, (str, int, float, np.generic)):
        value = value.item() if isinstance(value, np.generic) else value
        yield name, np.frombuffer(repr(value).encode(), np.uint8)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from arrays_in(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from arrays_in(part, f"{name}.{i}")


def frozen_fingerprint(model: Module) -> str:
    """The fingerprint of a model's parameters that do not require gradients."""
    return fingerprint((path, p.data) for path, p in model.named_parameters() if not p.requires_grad)


def adapter_options(model: Any) -> dict[str, dict[str, Any]]:
    """{adapter: its options} of a PeftModel, {} of others; without the base's name, and the ranks, which AdaLoRA moves."""
    without = ("base_model_name_or_path", "rank_pattern", "_kept")
    adapters = getattr(model, "peft_config", {}).items()
    return {name: {k: v for k, v in vars(config).items() if k not in without} for name, config in adapters}


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An optimizer's state as (host arrays by "parameter.slot", JSON values): what a checkpoint can hold."""
    state = optimizer.state_dict()
    entries = state["state"].items()
    arrays = {f"{i}.{k}": to_numpy(v) for i, entry in entries for k, v in entry.items() if is_array(v)}
    scalars = {str(i): {k: v for k, v in entry.items() if not is_array(v)} for i, entry in entries}
    return arrays, {"state": scalars, "param_groups": state["param_groups"]}


def unpack_optimizer(optimizer: Optimizer, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Restore the state that `pack_optimizer` gave. Raises as `Optimizer.load_state_dict`."""
    state = {i: dict(entry) for i, entry in values["state"].items()}
    for name, array in arrays.items():
        i, _, slot = name.partition(".")
        state[i][slot] = array
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})


def check_shapes(arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the arrays are those of these names and shapes."""
    for name in {**shapes, **arrays}:
        shape = arrays[name].shape if name in arrays else None
        if shape != shapes.get(name):
            raise ValueError(f"{name} has the shape {shape} there, {shapes.get(name)} here")


def check_identity(path: Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    """CheckpointError naming the first thing in which the run that is `here` differs from that of a checkpoint."""
    for name in [*here, *(set(there) - set(here))]:
        if here.get(name) != there.get(name):
            text = str(there.get(name))
            unsaid = len(text) > 200 or re.fullmatch("[0-9a-f]{64}", text)  # a fingerprint
            detail = "" if unsaid else f" ({text} there, {here.get(name)} here)"
            raise CheckpointError(
                f"{path}: is of a run with other {name}{detail}; resume with the same, or start a new run"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint directories inside `output_dir`, earliest step first."""
    found = (p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest step inside `output_dir`; None where there is none."""
    return (list_checkpoints(output_dir) or [None])[-1]


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether `save_checkpoint` wrote a directory, whatever has been damaged since."""
    try:
        with open(Path(path) / "state.json", "rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(64)
    except OSError:
        return False


def save_checkpoint(
    output_dir: str | os.PathLike, step: int, arrays: dict[str, dict[str, np.ndarray]], state: dict[str, Any], keep: int
) -> Path:
    """Write `checkpoint-{step}`, then delete all but the newest `keep` checkpoints; returns its path.

    Args:
        arrays: file name without suffix -> host arrays by name, each written as one safetensors file.
        state: JSON-able values.

    Raises ValueError where the checkpoint exists already: nothing is ever overwritten.
    """
    root = Path(output_dir)
    target = root / f"checkpoint-{step}"
    if target.exists():
        raise ValueError(f"{target} exists already; remove it first")
    temporary = root / f".checkpoint-{step}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir(parents=True)
    try:
        files = {}
        for name, group in arrays.items():
            path = temporary / f"{name}.safetensors"
            write_safetensors(path, group)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        body = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "state": state}
        write_json(temporary / "state.json", {**body, "sha256": _digest(body)})
        fsync_directory(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(root)
    remove_old(root, keep)
    return target


def remove_old(output_dir: str | os.PathLike, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in list(filter(is_checkpoint, list_checkpoints(output_dir)))[:-keep]:
        discard(old)


def load_checkpoint(path: str | os.PathLike) -> tuple[int, dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """(step, arrays by file and name, state) of a checkpoint directory, every byte of which is checked first.

    Raises CheckpointError, naming the file and the reason, for anything missing, truncated, altered or foreign.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    where = path / "state.json"
    try:
        body = read_json(where)
    except FileError as error:
        raise CheckpointError(str(error)) from error
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{where}: not the state of a minipeft checkpoint")
    if body.get("version") != VERSION:
        raise CheckpointError(f"{where}: format version {body.get('version')!r}; this package reads version {VERSION}")
    checksum = body.pop("sha256", None)
    arrays, here = {}, {file.name for file in path.iterdir() if file.is_file()}
    with expecting("what a checkpoint holds", where, CheckpointError):
        if checksum != _digest(body):
            raise CheckpointError(f"{where}: corrupted: its content does not match its checksum")
        for name, expected in body["files"].items():
            file = path / name
            if name not in here:
                raise CheckpointError(f"{file}: missing from the checkpoint")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file}: has {file.stat().st_size} bytes where {expected['bytes']} were written")
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: corrupted: its bytes do not match their checksum")
            arrays[name.removesuffix(".safetensors")] = read_safetensors(file)[0]
        step, state = body["step"], dict(body["state"])
        if not fits(step, int) or step < 0:
            raise ValueError(f"the step is {step!r}")
    return step, arrays, state


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
