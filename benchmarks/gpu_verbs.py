"""Short commands of every verb that computes on a device, and of the options of a pre-training run.

`gpu_correct.py` runs each on a device and on the CPU, and compares the printed output and the files. Networks are tiny
and images are noise with one colour per class, so that everything takes two minutes. Random numbers that torch would
draw on the device are drawn on the CPU in both cases: the channels that dropout drops, and the boxes that a detector
is trained on.
"""

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dmjd.cli import main as dmjd_main

TINY = "--model.embed_dim 24 --model.depth 2 --decoder.embed_dim 24 --decoder.depth 1"
TRAIN = (
    f"pretrain --data IMAGES/train --out OUT --steps 8 --batch_size 16 --monitor.log_every 1 --monitor.evals 1 {TINY}"
)
PLAIN = f"{TRAIN} --workers 0 --preset quick"
DENSE = "--out OUT --steps 4 --batch_size 4 --log.evals 1 --log.log_every 1"
BOXES = f"{DENSE} --crop_size 64 --fpn_channels 8 --head_channels 16"
# In this order: a command may use the files that an earlier one wrote on the CPU, as RUN/NAME.
LINES = {
    "vit": PLAIN,
    "convvit": f"{TRAIN} --workers 2 --preset quick-dmjd",
    "on-device": f"{PLAIN} --data_on_device yes",
    "workers": f"{TRAIN} --preset quick --workers 2 --data_on_device no",
    "ema": f"{PLAIN} --masked.target hog+ema --visible.weight 1",
    "teacher": f"{PLAIN} --masked.target RUN/vit/backbone.safetensors --teacher.cache OUT/cache --crop.variants 2",
    "pixels": f"{PLAIN} --masked.target normalized_pixels",
    "maskfeat-hog": f"{PLAIN} --hog.variant maskfeat",
    "checkpointing": f"{TRAIN} --workers 0 --preset quick-dmjd --activation_checkpointing",
    "accumulation": f"{PLAIN} --optim.accumulation 2",
    "progressive": f"{PLAIN} --crop.progressive 0.5",
    "cross": f"{PLAIN} --decoder.cross",
    "lamb": f"{PLAIN} --optim.name lamb --optim.clip_grad 1",
    "convmae": f"{TRAIN} --workers 0 --preset quick-convmae",
    "fastconvmae": f"{TRAIN} --workers 0 --preset quick-fastconvmae",
    "knn": "knn --data IMAGES --backbone RUN/vit/backbone.safetensors --out OUT",
    "linear": "linear --data IMAGES --backbone RUN/convvit/backbone.safetensors --out OUT",
    "finetune": "finetune --preset quick --data IMAGES --backbone RUN/convvit/backbone.safetensors --steps 8 "
    "--batch_size 16 --out OUT",
    "predict": "predict --data IMAGES/test --backbone RUN/finetune/last.safetensors --out OUT",
    "embed": "embed --data IMAGES --backbone RUN/vit/backbone.safetensors --out OUT.npy",
    "embed-convvit": "embed --data IMAGES --backbone RUN/convvit/backbone.safetensors --out OUT.npy",
    "search": "search --features RUN/embed.npy --query IMAGES/test --out OUT",
    "segment": f"segment --data SCENES --backbone RUN/vit/backbone.safetensors {DENSE} --crop_size 32 "
    "--decoder_channels 16",
    "segment-convvit": "segment --data SCENES --backbone RUN/convvit/backbone.safetensors "
    f"{DENSE} --crop_size 32 --decoder_channels 16",
    "predict-segments": "predict --data SCENES/images/val --backbone RUN/segment/last.safetensors --out OUT",
    "detect": f"detect --data BOXES --backbone RUN/vit/backbone.safetensors --window 2 {BOXES}",
    "predict-boxes": "predict --data BOXES/images --backbone RUN/detect/last.safetensors --out OUT",
}
# Numbers that count decisions, such as classes of pixels, where a near tie may be decided differently.
DECIDED = ("accuracy", "iou", "top1", "map", "mean of")
# Values that differ from run to run on any device.
TIMES = ("seconds", "_share", "minutes", "device", "out", "file", "per_s", "_ms", "memory", "bytes", "gib")


class Verbs:
    """The commands, run on the CPU and on a device, each in its own folder.

    Args:
        folder: For images and runs.
        device: That is checked.
    """

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        for part, count in (("train", 16), ("test", 6)):
            for label, name in enumerate(("red", "green", "blue")):
                for number in range(count):
                    pixels = np.random.default_rng((count, label, number)).integers(0, 120, (72, 80, 3))
                    pixels[..., label] += 90
                    save(folder / "images" / part / name / f"{number}.png", pixels)
        for part, count in (("train", 8), ("val", 3)):
            for number in range(count):
                rng = np.random.default_rng((count, number))
                labels, edge = np.zeros((40, 52), np.uint8), rng.integers(12, 40)
                labels[:, edge:] = 1
                pixels = rng.integers(0, 120, (40, 52, 3)) + 90 * np.eye(3, dtype=int)[labels]
                save(folder / "scenes" / "images" / part / f"{number}.png", pixels)
                save(folder / "scenes" / "annotations" / part / f"{number}.png", labels)
        content: dict[str, list[object]] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "box"}]}
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 90, (50, 70, 3))
            left, top = 3 + 4 * number, 5 + 2 * number
            pixels[top : top + 24, left : left + 24] += 150
            save(folder / "boxes" / "images" / f"{number}.png", pixels)
            content["images"].append({"id": number, "file_name": f"{number}.png", "height": 50, "width": 70})
            box = {"bbox": [left, top, 24, 24], "category_id": 0, "iscrowd": 0}
            content["annotations"].append({"id": number, "image_id": number, **box})
        (folder / "boxes" / "annotations").mkdir()
        for part in ("train", "val"):
            (folder / "boxes" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))

    def numbers(self, name: str, device: str, runs: Path) -> dict[str, float]:
        """Run a command on a device and collect its last printed output, the losses of its steps, and its features.

        Args:
            name: Of the line.
            device: Where it computes.
            runs: Folder for what it writes.

        Raises:
            RuntimeError: If it fails, with the last line of what it said.
        """
        out = runs / name
        places = {"IMAGES": self.folder / "images", "SCENES": self.folder / "scenes", "BOXES": self.folder / "boxes"}
        line = LINES[name]
        for word, place in {**places, "RUN": self.folder / "expected", "OUT": out}.items():
            line = line.replace(word, str(place))
        printed, said = io.StringIO(), io.StringIO()
        words = [*line.split(), "--device", device, "--precision", "fp32"]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said), drawn_on_the_cpu():
            status = dmjd_main(words)
        if status:
            last_line = said.getvalue().strip().rpartition("\n")[2].replace(f"{self.folder}/", "")
            raise RuntimeError(f"exit {status}: {last_line}")
        found: dict[str, float] = {}
        last = printed.getvalue().strip().rpartition("\n")[2]
        if last.startswith("{"):
            found |= flat("said", json.loads(last))
        if (out / "metrics.jsonl").is_file():
            for number, text in enumerate((out / "metrics.jsonl").read_text().splitlines()):
                found |= flat(f"metrics {number}", json.loads(text))
        if (runs / f"{name}.npy").is_file():
            features = np.load(runs / f"{name}.npy").astype(np.float64)
            found |= {f"feature {number}": value for number, value in enumerate(features.ravel())}
        for path in sorted(out.glob("*.csv")) if out.is_dir() else ():
            with path.open(newline="") as file:
                for number, row in enumerate(csv.DictReader(file)):
                    found |= flat(f"{path.name} {number}", {key: number_of(text) for key, text in row.items()})
        if (out / "detections.json").is_file():
            scores = [each["score"] for each in json.loads((out / "detections.json").read_text())["annotations"]]
            found |= {f"score {place}": score for place, score in enumerate(sorted(scores, reverse=True))}
        for path in sorted(out.rglob("masks/*.png")):  # of classes
            with Image.open(path) as mask:
                found[f"mean of {path.name}"] = float(np.asarray(mask, np.float64).mean())
        return found

    def compare(self, name: str) -> Iterator[tuple[str, float]]:
        """Run a command on both; yield what differs most, and by how much, among numbers and among shares of decisions.

        Raises:
            RuntimeError: If one fails, or they give other numbers.
            ValueError: If there are none.
        """
        expected = self.numbers(name, "cpu", self.folder / "expected")
        ours = self.numbers(name, self.device, self.folder / "found")
        if expected.keys() != ours.keys():
            raise RuntimeError(f"other numbers: {sorted(expected.keys() ^ ours.keys())[:5]}")
        differences = {key: differing(ours[key], value) for key, value in expected.items()}
        decided = [key for key in differences if any(part in key for part in DECIDED)]
        for kind, keys in (("numbers", differences.keys() - set(decided)), ("decisions", decided)):
            if keys:
                worst = max(sorted(keys), key=differences.__getitem__)
                yield f"{len(keys)} {kind}, most in {worst}", differences[worst]


@contextlib.contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Let torch draw random numbers on the CPU instead of another device, whose numbers differ for the same seed."""
    permute, drop = torch.randperm, functional.dropout2d

    def randperm(count: int, *, device: torch.device | str = "cpu", **how: Any) -> Tensor:
        return permute(count, **how).to(device)

    def dropout2d(given: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training:
            return given
        return given * drop(torch.ones((*given.shape[:2], 1, 1)), p).to(given)

    torch.randperm, functional.dropout2d = randperm, dropout2d
    try:
        yield
    finally:
        torch.randperm, functional.dropout2d = permute, drop


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def number_of(text: str) -> object:
    """Read a cell of a table: a number if it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def flat(name: str, found: object) -> dict[str, float]:
    """List the numbers in values read from JSON, except times and the like."""
    if isinstance(found, dict):
        kept = {key: value for key, value in found.items() if not any(part in key for part in TIMES)}
        return {key: value for name_, each in kept.items() for key, value in flat(f"{name} {name_}", each).items()}
    if isinstance(found, list):
        return {key: value for at, each in enumerate(found) for key, value in flat(f"{name} {at}", each).items()}
    return {name: float(found)} if isinstance(found, int | float) else {}


def differing(ours: float, theirs: float) -> float:
    """Compare two numbers: their difference relative to the larger of the second and a tenth."""
    if math.isnan(theirs) or math.isnan(ours):
        return 0.0 if math.isnan(theirs) == math.isnan(ours) else math.inf
    return float(abs(ours - theirs) / max(abs(theirs), 0.1))
