"""Checkpoints that are there whole or not at all.

A checkpoint is a directory: `model.safetensors`, `optimizer.safetensors`, `state.json` and a `MANIFEST.json` with the
sha256 of each. It is written under a temporary name, flushed to the disk and renamed; older ones go only after the new
one has been read back. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dmjd.errors import CheckpointError

FORMAT = 1
KEEP = 2
MANIFEST = "MANIFEST.json"


def save(folder: Path, *, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`; `state` is any JSON that `read_state` shall return."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    for abandoned in folder.glob(".*.partial"):
        shutil.rmtree(abandoned)
    partial.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial / "model.safetensors")
    tensors, plain = flatten(optimizer)
    save_file(tensors, partial / "optimizer.safetensors")
    content = {**state, "format": FORMAT, "step": step, "optimizer": plain}
    (partial / "state.json").write_text(json.dumps(content, indent=1))
    digests = {path.name: sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(digests, indent=1))
    for path in (*partial.iterdir(), partial):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    flush(folder)
    if verify(final):
        others = sorted(folder.glob("step-*"))
        place = others.index(final)
        # Later ones are broken, or the run would have gone on from them: they must not push this one out.
        for other in (*others[: max(place + 1 - KEEP, 0)], *others[place + 1 :]):
            shutil.rmtree(other)
    return final


def latest(folder: Path) -> Path | None:
    """Find the newest checkpoint that is whole; None where none was ever written.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    whole = next((path for path in found if verify(path)), None)
    if found and whole is None:
        raise CheckpointError(f"no checkpoint is whole ({len(found)} broken); {folder}; remove them to start afresh")
    return whole


def read_state(path: Path) -> dict[str, Any]:
    """Read what was saved beside the tensors.

    Raises:
        CheckpointError: If another version wrote the checkpoint.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"format {state['format']}, this version reads {FORMAT}; {path}; use the version that wrote it"
        )
    return state


def load(path: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Restore a model and its optimizer.

    Raises:
        CheckpointError: If the checkpoint is of another model.
    """
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the checkpoint does not fit the model: {reason}; {path}; check the settings") from None
    unflatten(optimizer, load_file(path / "optimizer.safetensors"), read_state(path)["optimizer"])


def verify(path: Path) -> bool:
    """Tell whether every file of a checkpoint is what its manifest says."""
    try:
        digests = json.loads((path / MANIFEST).read_text())
        return bool(digests) and all(sha256(path / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def flatten(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """TokenIds an optimizer's state into tensors, named `PARAMETER.KEY`, and plain numbers."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{key}"] = value.contiguous()
            else:
                numbers[f"{parameter}.{key}"] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def unflatten(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Undo `flatten`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["numbers"]}.items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})


def sha256(path: Path) -> str:
    """Digest a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the disk, not its cache, hold a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file in one go."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8", errors="backslashreplace")  # file names need not be Unicode
    flush(partial)
    partial.replace(path)


def is_finite(model: nn.Module) -> bool:
    """Tell whether every weight is a number; one wait for the device."""
    return bool(torch.stack([value.isfinite().all() for value in model.parameters()]).all())
