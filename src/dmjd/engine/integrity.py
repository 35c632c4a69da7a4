"""The contents of a run, a checkpoint or a backbone file, and whether they are undamaged."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from dmjd.backbones.files import load_backbone
from dmjd.engine.checkpoint import MANIFEST, read_state, sha256
from dmjd.errors import CheckpointError

PARTS_OF_CHECKPOINT = ("model.safetensors", "optimizer.safetensors", "state.json")
NETWORKS = ("best", "last", "linear", "backbone", "pretrained")  # files of a run, of which its verb writes some


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is a checkpoint, intact or not."""
    return any((path / name).is_file() for name in (MANIFEST, *PARTS_OF_CHECKPOINT))


def is_run(path: Path) -> bool:
    """Tell whether a folder is the directory of a run."""
    return (path / "config.yaml").is_file()


def examine_backbone(path: Path) -> dict[str, Any]:
    """Load a backbone file and describe it.

    Raises:
        CheckpointError: If it is broken, or a weight is not finite.
    """
    model: Any = load_backbone(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    default = model.pretrained_cfg
    return {
        "kind": "backbone",
        "architecture": metadata["architecture"],
        **({"task": json.loads(metadata["task"]).get("name")} if "task" in metadata else {}),
        **examine_tensors(path),
        "input_size": list(default["input_size"]),
        "mean": list(default["mean"]),
        "std": list(default["std"]),
    }


def examine_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest and describe it.

    Raises:
        CheckpointError: If a file is missing or has changed, or a weight is not finite.
    """
    digests = _read_json(path / MANIFEST)
    for name in sorted({*digests, *PARTS_OF_CHECKPOINT}):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"a file of the checkpoint is missing; {file}; resume from an older one")
        if sha256(file) != digests.get(name):
            raise CheckpointError(f"a file does not match the checkpoint's manifest; {file}; resume from an older one")
    return {"kind": "checkpoint", "step": read_state(path)["step"], **examine_tensors(path / "model.safetensors")}


def examine_run(path: Path) -> dict[str, Any]:
    """Check the files of a run and its checkpoints, and describe its progress.

    Raises:
        CheckpointError: If one of them is broken.
    """
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise CheckpointError(f"no settings; {path / 'config.yaml'}; restore the file") from None
    lines, cut = _count_lines(path / "metrics.jsonl")
    summary = path / "summary.json" if (path / "summary.json").is_file() else path / "result.json"
    finished = summary.is_file()
    if finished:
        _read_json(summary)
    found = [examine_checkpoint(each) for each in sorted((path / "checkpoints").glob("step-*"))]
    files = [path / f"{name}.safetensors" for name in NETWORKS]
    return {
        "kind": "run",
        "finished": finished,
        "data": settings.get("data") if isinstance(settings, dict) else None,
        "metrics": lines,
        **({"metrics_cut": cut} if cut else {}),
        "steps": max((each["step"] for each in found), default=0),
        "checkpoints": [each["step"] for each in found],
        **{file.stem: examine_backbone(file) for file in files if file.is_file()},
    }


def examine_tensors(path: Path) -> dict[str, int]:
    """Count the tensors of a file and their values, and check that all are finite.

    Raises:
        CheckpointError: If a value is not finite, or the file is broken.
    """
    count = values = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(name)
                count, values = count + 1, values + tensor.numel()
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{name} is not finite; {path}; resume from an older checkpoint")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"no tensors ({error}); {path}; resume from an older checkpoint") from None
    return {"tensors": count, "parameters": values}


def _count_lines(path: Path) -> tuple[int, int]:
    """Count the lines of metrics, and the truncated ones: a killed run may leave one at the end.

    Raises:
        CheckpointError: If a line before the last is broken.
    """
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
        except ValueError:
            if number == len(lines):
                return number - 1, 1
            raise CheckpointError(f"line {number} is not JSON; {path}; remove the line") from None
    return len(lines), 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not JSON ({type(error).__name__}); {path}; resume from an older checkpoint") from None
    return content
