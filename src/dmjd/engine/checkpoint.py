"""Checkpoints that are written completely or not at all.

A checkpoint is a directory: `model.safetensors`, `optimizer.safetensors`, `state.json` and a `MANIFEST.json` with the
SHA-256 of each. It is written under a temporary name, flushed to disk and renamed; older ones are removed only after
the new one has been read back. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dmjd.engine.distributed import shared_like, whole
from dmjd.errors import CheckpointError, one_line

FORMAT = 2  # format 1 named the optimizer's states by number
# Keys of an optimizer's groups: those that are not JSON, and those that a resumed run sets itself, from its settings.
UNKEPT = {"params", "momentum_dtype"}
OF_THIS_RUN = {"betas", "fused", "lr_scale", "weight_decay"}
KEEP = 2
MANIFEST = "MANIFEST.json"


class Tensors(NamedTuple):
    """Unsharded tensors of a run by name, and the plain numbers of its optimizer."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, Any]  # `states` by name, and `groups` in their order: some optimizers count steps there


def collect(model: nn.Module, trained: nn.Module, optimizer: Optimizer, *, keep: bool = True) -> Tensors:
    """Collect the contents of a checkpoint from all ranks, all of which have to call this.

    An optimizer's state is named after its parameter, as NAME:KEY, so that it fits any number of ranks and any order of
    parameter groups. A tensor of a group, such as LAMB's step count, is `group NUMBER:KEY`.

    Args:
        model: Model to save.
        trained: The part of it whose parameters the optimizer has.
        optimizer: Optimizer to save.
        keep: Whether this rank gets the tensors; a rank that does not write only sends its shards.
    """
    states = {
        f"{name}:{key}": value
        for name, parameter in trained.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    groups = [{key: value for key, value in group.items() if key not in UNKEPT} for group in optimizer.param_groups]
    of_groups = {f"group {number}:{key}": value for number, group in enumerate(groups) for key, value in group.items()}
    tensors = {name: value for name, value in {**states, **of_groups}.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in states.items() if name not in tensors}
    groups = [{key: value for key, value in group.items() if not isinstance(value, Tensor)} for group in groups]
    weights, moments = gather(model.state_dict(), keep=keep), gather(tensors, keep=keep)
    return Tensors(weights, moments, {"states": numbers, "groups": groups})


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors that may be sharded, one after the other; if `keep`, return them in host memory."""
    kept = {}
    for name, value in tensors.items():
        together = whole(value)
        if keep:
            kept[name] = together.cpu().contiguous()
    return kept


def save(folder: Path, tensors: Tensors, state: Mapping[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN`; `state` is any JSON with the `step`, which `read_state` returns."""
    final = folder / f"step-{state['step']:08d}"
    partial = folder / f".{final.name}.partial"
    for abandoned in folder.glob(".*.partial"):
        shutil.rmtree(abandoned)
    partial.mkdir(parents=True)
    save_tensors(tensors.model, partial / "model.safetensors")
    save_tensors(tensors.optimizer, partial / "optimizer.safetensors")
    content = {**state, "format": FORMAT, "optimizer": tensors.numbers}
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
        # Later ones are broken, or the run would have resumed from them: they must not displace this one.
        for other in (*others[: max(place + 1 - KEEP, 0)], *others[place + 1 :]):
            shutil.rmtree(other)
    return final


def latest(folder: Path) -> Path | None:
    """Find the newest intact checkpoint, and warn of newer ones that are not; None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints, but none is intact.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    kept = next((path for path in found if verify(path)), None)
    if found and kept is None:
        raise CheckpointError(f"no checkpoint is intact ({len(found)} broken); {folder}; remove them to start afresh")
    if kept:
        for path in found[: found.index(kept)]:
            print(f"warning: a checkpoint does not match its manifest; {path}; {kept.name} is used", file=sys.stderr)
    return kept


def whole_ones(folder: Path) -> list[Path]:
    """List the intact checkpoints, newest first."""
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if verify(path)]


def read_state(path: Path) -> dict[str, Any]:
    """Read the state that was saved beside the tensors.

    Raises:
        CheckpointError: If it is broken, or has another format.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["format"] == FORMAT:
            return state
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"no state of a run; {path / 'state.json'}; remove this checkpoint") from None
    raise CheckpointError(
        f"format {state['format']}, this version reads {FORMAT}; {path}; use the version that wrote it"
    )


def load(path: Path, *, model: nn.Module, trained: nn.Module, optimizer: Optimizer) -> None:
    """Restore what `collect` collected, on any number of ranks.

    Raises:
        CheckpointError: If the checkpoint does not fit the model.
    """
    try:
        ours = model.state_dict()
        weights = {name: shared_like(value, ours.get(name, value)) for name, value in read(path / "model").items()}
        model.load_state_dict(weights)
        moments, numbers = read(path / "optimizer"), read_state(path)["optimizer"]
        states: dict[str, dict[str, Any]] = {}
        for name, value in {**moments, **numbers["states"]}.items():
            owner, _, key = name.rpartition(":")
            states.setdefault(owner, {})[key] = value
        for number, (group, saved) in enumerate(zip(optimizer.param_groups, numbers["groups"], strict=True)):
            saved |= states.get(f"group {number}", {})
            group.update({key: value for key, value in saved.items() if key not in OF_THIS_RUN})
    except (RuntimeError, SafetensorError, ValueError) as error:
        reason = one_line(error, 300)
        raise CheckpointError(f"the checkpoint does not fit the model: {reason}; {path}; check the settings") from None
    fused = {parameter for group in optimizer.param_groups if group.get("fused") for parameter in group["params"]}
    for name, parameter in trained.named_parameters():
        for key, value in states.get(name, {}).items():
            if isinstance(value, Tensor) and (value.shape == parameter.shape or parameter in fused):
                value = shared_like(value.to(parameter.device), parameter)
            optimizer.state[parameter][key] = value


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of `path`.safetensors."""
    return load_file(path.with_suffix(".safetensors"))


def verify(path: Path) -> bool:
    """Tell whether every file of a checkpoint matches its manifest."""
    try:
        digests = json.loads((path / MANIFEST).read_text())
        inside = all(Path(name).name == name for name in digests)
        return bool(digests) and inside and all(sha256(path / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors with the usual permissions: safetensors would make it readable by its owner only."""
    path.touch()
    permissions = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(permissions)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8", errors="backslashreplace")  # file names need not be Unicode
    flush(partial)
    partial.replace(path)


def is_finite(tensors: Tensors) -> bool:
    """Tell whether every number of the model and of its optimizer is finite."""
    return all(bool(value.isfinite().all()) for part in (tensors.model, tensors.optimizer) for value in part.values())
