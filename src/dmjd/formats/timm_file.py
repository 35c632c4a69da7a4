"""Weights that plain timm loads."""

import json
from pathlib import Path
from typing import Any

import timm
from timm.models import model_entrypoint

from dmjd.backbones.files import images_cfg, save_backbone
from dmjd.formats.network import Original, compare_models


def write_timm(original: Original, path: Path) -> None:
    """Write the timm model, and check that timm's `create_model` with this file computes the same: 1e-5."""
    save_model(original, path)
    name, arguments = original.architecture
    compare_models(original, timm.create_model(name, **arguments, checkpoint_path=str(path)).eval())


def save_model(original: Original, path: Path) -> None:
    """Write the timm model as a file of ours, which timm and all verbs can open."""
    save_backbone(
        path,
        original.model,
        original.architecture,
        *original.statistics,
        value_range=original.value_range,
        task=original.task if original.kind == "classifier" else None,
    )


def how_to_load(original: Original, path: Path) -> str:
    """Write the Python code that loads the file; timm's transforms get image size and statistics from the model."""
    name, arguments = original.architecture
    plain: Any = json.loads(json.dumps(arguments))
    given = "".join(f", {key}={value!r}" for key, value in plain.items())
    channels, *image_hw = original.model_size
    known = images_cfg(channels, image_hw, *original.statistics)
    return (
        f'{imports(original)}model = timm.create_model("{name}"{given}, pretrained_cfg_overlay={known!r}, '
        f"checkpoint_path={str(path)!r}).eval()"
    )


def imports(original: Original) -> str:
    """Write the imports needed before timm can create the model."""
    module = model_entrypoint(original.architecture[0].partition(".")[0]).__module__
    return "import timm\n" + ("" if module.startswith("timm.") else f"import {module}  # tells timm of the model\n")
