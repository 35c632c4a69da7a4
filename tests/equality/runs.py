"""Short runs of every training verb, whose losses are stored in `curves.json` and compared to the last bit.

`python tests/equality/runs.py` writes the file anew: do that only for a change that is meant to change losses.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

STORED = Path(__file__).parent / "curves.json"
FIXTURES = Path(__file__).parents[1] / "fixtures"
EXACT = ("loss", "loss_masked", "loss_visible", "grad_norm", "lr")
VIT = str(FIXTURES / "vit.safetensors")

# `{}` stands for the folder of `paint`.
COMMANDS: dict[str, list[str]] = {
    "quick": [
        "pretrain",
        "--preset",
        "quick",
        "--data",
        "shapes",
        "--monitor.log_every",
        "1",
        "--monitor.max_images",
        "20",
    ],
    "quick-convmae": [
        *("pretrain", "--preset", "quick-convmae", "--data", "{}/classes"),
        *("--batch_size", "16", "--optim.accumulation", "2"),
        *("--monitor.log_every", "1", "--monitor.max_images", "20"),
    ],
    "ema": [
        *("pretrain", "--preset", "quick", "--data", "{}/classes", "--batch_size", "16"),
        *("--masked.target", "hog+ema"),
        *("--visible.target", "normalized_pixels", "--optim.clip_grad", "1.0"),
        *("--monitor.log_every", "1", "--monitor.max_images", "20"),
    ],
    "linear": [
        *("linear", "--recipe", "paper", "--backbone", VIT, "--data", "{}/classes", "--batch_size", "8"),
        *("--log.log_every", "1"),
    ],
    "finetune": [
        *("finetune", "--preset", "quick", "--backbone", VIT, "--data", "{}/classes", "--batch_size", "8"),
        *("--augment.auto_augment", "rand-m9-mstd0.5-inc1", "--augment.random_erasing", "0.25"),
        *("--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--drop_path", "0.2", "--log.log_every", "1"),
    ],
    "segment": [
        *("segment", "--preset", "camvid", "--backbone", VIT, "--data", "{}/streets", "--crop_size", "32"),
        *("--batch_size", "4", "--decoder_channels", "16", "--auxiliary_weight", "0.4", "--log.log_every", "1"),
    ],
    "detect": [
        *("detect", "--preset", "bccd", "--backbone", VIT, "--data", "{}/cells", "--crop_size", "64"),
        *("--batch_size", "2", "--fpn_channels", "16", "--head_channels", "32", "--log.log_every", "1"),
    ],
}


def paint(root: Path) -> None:
    """Draw three small sets: images of classes, images with a class for every pixel, images with boxes."""
    for number in range(24):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 120, (48, 56, 3)).astype(np.uint8)
        top, left, side = (int(value) for value in rng.integers(4, 20, 3))
        pixels[top : top + side, left : left + side, number % 3] += 120
        part = "val" if number % 4 == 3 else "train"
        labels = np.zeros(pixels.shape[:2], np.uint8)
        labels[top : top + side, left : left + side] = 1 + number % 2
        folders = {
            f"classes/{part}/{'abc'[number % 3]}/{number:02d}.png": pixels,
            f"streets/images/{part}/{number:02d}.png": pixels,
            f"streets/annotations/{part}/{number:02d}.png": labels,
            f"cells/JPEGImages/{number:02d}.png": pixels,
        }
        for name, picture in folders.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / name)
        note = ElementTree.Element("annotation")
        ElementTree.SubElement(note, "filename").text = f"{number:02d}.png"
        thing = ElementTree.SubElement(note, "object")
        ElementTree.SubElement(thing, "name").text = "ab"[number % 2]
        box = ElementTree.SubElement(thing, "bndbox")
        for name, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), (left + 1, top + 1, left + side, top + side), strict=True
        ):
            ElementTree.SubElement(box, name).text = str(value)
        for name in ("Annotations", "ImageSets/Main"):
            (root / "cells" / name).mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(note).write(root / "cells" / "Annotations" / f"{number:02d}.xml")
        with (root / "cells" / "ImageSets" / "Main" / f"{part}.txt").open("a") as file:
            file.write(f"{number:02d}\n")


def curves(data: Path, out: Path) -> dict[str, list[dict[str, float]]]:
    """Run ten steps of every command, in a process of their own, and read what they logged."""
    lines = []
    for name, words in COMMANDS.items():
        line = [*(word.replace("{}", str(data)) for word in words), "--steps", "10", "--out", str(out / name)]
        lines.append([*line, "--device", "cpu", "--workers", "0", "--precision", "fp32"])
    program = f"import dmjd.cli, sys; sys.exit(max(dmjd.cli.main(line) for line in {lines!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
    return {name: read(out / name / "metrics.jsonl") for name in COMMANDS}


def read(metrics: Path) -> list[dict[str, float]]:
    """Read what has to be equal of every step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: line[key] for key in EXACT if key in line} for line in lines if "loss" in line]


def machine() -> dict[str, str]:
    """Name what the last bits of a float depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": model or platform.processor(), "capability": capability}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        paint(Path(folder) / "data")
        stored = curves(Path(folder) / "data", Path(folder))
    STORED.write_text(json.dumps({"machine": machine(), "curves": stored}, indent=1) + "\n")
