"""A program of torch.export, for any batch size."""

import json
from pathlib import Path
from typing import Any

import torch

from dmjd.errors import ConfigError
from dmjd.formats.network import TRACED, FromPixels, Original, compare, draw_images


def write_torch(original: Original, path: Path) -> None:
    """Write the program, whose input is images of 0..1, and check that it computes the same: 1e-5.

    The program is compared before it is saved: such files contain pickles, which nothing here loads.

    Raises:
        ConfigError: If this kind of network has no program.
    """
    program, network = trace(original)
    compare(network, program.module(), original.input_size, tolerance=1e-5)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(describe(original))})


@torch.no_grad()
def trace(original: Original) -> tuple[Any, FromPixels]:
    """Export a network for images of 0..1; returns the program and the network.

    Raises:
        ConfigError: If it cannot be traced.
    """
    if original.kind == "detector":
        said = "the computation of a detector depends on the image, so it has no static graph"
        raise ConfigError(f"{said}; {original.path}; export its backbone, --to timm, or call dmjd detect --predict")
    network = FromPixels(original).eval()
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(network, (draw_images(TRACED, original.input_size),), dynamic_shapes=(batch,)), network


def describe(original: Original) -> dict[str, Any]:
    """Describe input and output, for users who open the file without this package."""
    outputs = {
        "backbone": "features (batch, width)",
        "classifier": "logits (batch, classes)",
        "segmenter": "logits (batch, classes, height, width)",
    }
    low, high = original.value_range
    mean, std = original.statistics
    return {
        "input": f"float32 (batch, channels, height, width), 0 to 1: values of {low:g} to {high:g}, scaled; "
        "they are normalised inside",
        "input_size": list(original.input_size),
        "output": outputs[original.kind],
        "classes": list(original.classes),
        "mean": mean,
        "std": std,
        "value_range": [low, high],
        "architecture": original.architecture[0],
    }
