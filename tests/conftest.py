"""Set-up of all tests: shapes and types of every public signature are checked while they run.

Small labelled images and untrained networks are shared by the tests of every verb that judges a backbone.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jaxtyping import install_import_hook

install_import_hook("dmjd", "beartype.beartype")

import numpy as np
import pytest
import torch
from PIL import Image
from prefork import Dmjd

from dmjd.backbones.convvit import create_convvit
from dmjd.backbones.files import save_backbone
from dmjd.backbones.vit import create_vit

torch.set_num_threads(1)

COLOURS = {"red": (90, 0, 0), "green": (0, 90, 0), "blue": (0, 0, 90)}
SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
Paint = Callable[[Path, Mapping[str, int]], Path]


@pytest.fixture(scope="session")
def paint() -> Paint:
    """Write so many noisy images into each folder, in the colour that the folder is named after, if any."""

    def painted(root: Path, counts: Mapping[str, int]) -> Path:
        for place, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng((place, number)).integers(0, 120, (36, 40, 3))
                pixels += COLOURS.get(Path(folder).name, (0, 0, 0))
                Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{number:02d}.png")
        return root

    return painted


@pytest.fixture(scope="session")
def colours(paint: Paint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that a glance tells apart: 8 images of each for training, 4 held out."""
    counts = {f"{part}/{name}": count for part, count in (("train", 8), ("val", 4)) for name in COLOURS}
    return paint(tmp_path_factory.mktemp("data") / "colours", counts)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of tiny networks with random weights, one of another seed, and `blank`, whose weights are all zero."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(7)
    encoders = {
        "vit": create_vit("tiny", **SHAPE),
        "grey": create_vit("tiny", **SHAPE, in_chans=1),
        "convvit": create_convvit("tiny", **SHAPE),
        "blank": create_vit("tiny", **SHAPE),
    }
    for parameter in encoders["blank"].parameters():
        torch.nn.init.zeros_(parameter)
    for name, encoder in encoders.items():
        channels = 1 if name == "grey" else 3
        save_backbone(
            folder / f"{name}.safetensors", encoder.backbone, encoder.architecture, [0.4] * channels, [0.2] * channels
        )
    return {name: folder / f"{name}.safetensors" for name in encoders}


@pytest.fixture(scope="session")
def write_coco() -> Callable[..., Path]:
    """Write a set of discs and squares as COCO has it, the same images in both parts.

    Images of 50 x 70 pixels by name, with objects of (class, box as left, top, width and height, crowd).
    """

    def written(root: Path, boxes: Mapping[str, list[tuple[int, list[float], bool]]], *, masks: bool = False) -> Path:
        content: dict[str, list[Any]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 0, "name": "disc"}, {"id": 1, "name": "square"}],
        }
        for number, (name, objects) in enumerate(boxes.items()):
            pixels = np.random.default_rng(number).integers(0, 90, (50, 70, 3), dtype=np.uint8)
            for label, (left, top, width, height), crowd in objects:
                pixels[int(top) : int(top + height), int(left) : int(left + width), label] += 150
                corners = [left, top, left + width, top, left + width, top + height, left, top + height]
                outline = {"segmentation": [corners]} if masks else {}
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]),
                        "image_id": number,
                        "category_id": label,
                        "bbox": [left, top, width, height],
                        "iscrowd": int(crowd),
                        **outline,
                    }
                )
            content["images"].append({"id": number, "file_name": f"{name}.png", "height": 50, "width": 70})
            (root / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        (root / "annotations").mkdir()
        for part in ("train", "val"):
            (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        return root

    return written


@pytest.fixture(scope="session")
def interrupt() -> Callable[[Sequence[str]], None]:
    """Run a command in a process of its own and stop it by a signal after its first checkpoint."""

    def interrupted(arguments: Sequence[str]) -> None:
        with Dmjd([*arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as run:
            next(line for line in run.stderr if line.endswith("saved\n"))
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=120)
        assert run.returncode == 143

    return interrupted
