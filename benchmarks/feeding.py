"""Speed and memory of data loading; prints one table for each part.

    python benchmarks/feeding.py photos FOLDER     photographs to crops of 224 px, against Pillow and torchvision
    python benchmarks/feeding.py small             images in memory to batches of two views, on one core

`--pairs` is the number of times that both sides run in turns. `small --before DIR` measures an earlier version as well:
DIR is the `src` of a version that did not yet crop a whole batch at once.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dmjd.data.builtin import ArrayImages
from dmjd.data.crops import RandomCrop
from dmjd.data.loader import train_batches
from dmjd.data.masked import MaskedSamples
from dmjd.data.memory import stack_of
from dmjd.data.sampler import StepSampler
from dmjd.data.source import open_source
from dmjd.masking import seeded_masks

BATCH = 64
BEFORE = """
import sys, time, torch
from functools import partial
from dmjd.data.builtin import ArrayImages
from dmjd.data.crops import random_crop
from dmjd.data.masked import MaskedSamples, collate_masked
from dmjd.data.sampler import StepSampler
from dmjd.masking import block_masks
torch.set_num_threads(1)
pixels = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
images = ArrayImages(address="x", pixels=pixels, labels=torch.zeros(5000, dtype=torch.long), classes=("a", "b"))
crop = partial(random_crop, size=(32, 32), scale=(0.5, 1.0), ratio=(0.75, 4 / 3), flip=True)
masks = partial(block_masks, 1, (8, 8), num_views=2, mask_ratio=0.6)
samples = MaskedSamples(images, crop, masks, 0)
batches = list(StepSampler(5000, 512, 0, 10, 0))
began = time.process_time()
for keys in batches:
    collate_masked([samples[key] for key in keys])
print(512 * len(batches) / (time.process_time() - began))
"""


class PlainImages(Dataset[torch.Tensor]):
    """The usual loader: Pillow decodes, torchvision crops and flips."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(224, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def rate(batches: Iterator[Any], size: Callable[[Any], int], count: int) -> float:
    """Measure images per second over `count` batches, after two that start the workers."""
    for _ in range(2):
        next(batches)
    began, images = time.perf_counter(), 0
    for _ in range(count):
        images += size(next(batches))
    return images / (time.perf_counter() - began)


def photos(folder: str, pairs: int, workers: int) -> None:
    """Time the loaders on the same photographs: as files, and as a set of `dmjd prepare`."""
    source = open_source(folder).train
    root = Path(folder) / "train" if (Path(folder) / "train").is_dir() else Path(folder)
    paths = [str(root / source.name(index)) for index in range(len(source))]
    crop, steps = RandomCrop((224, 224), (0.5, 1.0), (0.75, 4 / 3), flip=True), len(source) // BATCH - 4
    with tempfile.TemporaryDirectory() as made:
        words = ["prepare", "--data", folder, "--out", f"{made}/set", "--size", "256"]
        subprocess.run([sys.executable, "-m", "dmjd", *words], check=True, stdout=subprocess.DEVNULL)
        prepared = open_source(f"{made}/set").train

        def ours(images: Any) -> float:
            sampler = StepSampler(len(images), BATCH, 0, steps + 2, 0)
            loader = train_batches(MaskedSamples(images, crop, 0), sampler, None, workers=workers, pin_memory=False)
            return rate(iter(loader), lambda batch: len(batch.images), steps)

        def plain() -> float:
            loader = DataLoader(
                PlainImages(paths), BATCH, shuffle=True, num_workers=workers, drop_last=True,
                multiprocessing_context="spawn", worker_init_fn=one_thread,
            )  # fmt: skip
            return rate(iter(loader), len, steps)

        rows: list[tuple[float, float, float]] = [(plain(), ours(source), ours(prepared)) for _ in range(pairs)]
    print(f"| {len(source)} photographs, {workers} workers | images/s | times the first |\n|---|---|---|")
    for place, name in enumerate(("Pillow, torchvision v2", "dmjd, from files", "dmjd, prepared")):
        column = [row[place] for row in rows]
        ratios = [value / row[0] for value, row in zip(column, rows, strict=True)]
        print(f"| {name} | {spread(column, 0)} | {spread(ratios, 2)} |")


def one_thread(worker: int) -> None:
    """Keep workers from competing for each other's cores."""
    torch.set_num_threads(1)


def small(pairs: int, before: str | None) -> None:
    """Measure images of 32 px in memory to batches of 512 with two views, and the masks alone."""
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
    images = ArrayImages(address="x", pixels=pixels, labels=torch.zeros(5000, dtype=torch.long), classes=("a", "b"))
    crop = RandomCrop((32, 32), (0.5, 1.0), (0.75, 4 / 3), flip=True)
    samples = MaskedSamples(images, crop, 0, stack=stack_of(images))
    batches = list(StepSampler(5000, 512, 0, 40, 0))

    def now() -> float:
        began = time.process_time()
        for keys in batches:
            batch = samples.__getitems__(keys)
            seeded_masks(batch.seeds, (8, 8), num_views=2, mask_ratio=0.6)
        return 512 * len(batches) / (time.process_time() - began)

    def then() -> float:
        environment = os.environ | {"PYTHONPATH": str(before)}
        done = subprocess.run(
            [sys.executable, "-c", BEFORE], capture_output=True, text=True, env=environment, check=True
        )
        return float(done.stdout)

    rows = [(then() if before else float("nan"), now()) for _ in range(pairs)]
    print("| 32 px, in memory, two views | images/s of a core |\n|---|---|")
    if before:
        print(f"| before: one by one | {spread([row[0] for row in rows], 0)} |")
    print(f"| a batch at once | {spread([row[1] for row in rows], 0)} |")
    if before:
        print(f"| times as many | {spread([row[1] / row[0] for row in rows], 1)} |")
    torch.set_num_threads(2)
    for block in (1, 2):
        seconds = []
        for number in range(20):
            began = time.perf_counter()
            seeded_masks(torch.arange(1024) + number, (14, 14), block=block, num_views=4, mask_ratio=0.75)
            seconds.append(1000 * (time.perf_counter() - began))
        print(f"| ms for the masks of 1,024 images x 4 views, block {block} | {spread(seconds, 1)} |")


def spread(values: Any, digits: int) -> str:
    """Format the median, and the range of all values."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("photos", "small"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--before")
    arguments = parser.parse_args()
    if arguments.part == "small":
        small(arguments.pairs, arguments.before)
    else:
        photos(arguments.folder, arguments.pairs, arguments.workers)
