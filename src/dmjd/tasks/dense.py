"""What segmentation and detection share: training around a pyramid, a page of held-out images, predictions."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from matplotlib.colors import hsv_to_rgb
from torch import Tensor, nn
from tqdm import tqdm

from dmjd.backbones.files import save_backbone
from dmjd.backbones.pyramid import Pyramid
from dmjd.config import Dense
from dmjd.data.decode import BadImage, decode
from dmjd.data.loader import AnnotatedBatch, AnnotatedSamples, Readable, collate_annotated
from dmjd.data.source import folder_images
from dmjd.engine.optim import create_optimizer, warmup_cosine
from dmjd.engine.run import Record
from dmjd.errors import ConfigError, DataError
from dmjd.evaluation.extractor import FeatureExtractor
from dmjd.reports.page import jpeg
from dmjd.reports.results import write_results
from dmjd.tasks.supervised import supervise

SHOWN = 8  # held-out images in the report
Picture = UInt8[np.ndarray, "H W 3"]


@dataclass
class Judged:
    """A network on the held-out images.

    Attributes:
        summary: Numbers; the first one says which network is the best.
        rows: The table by class.
        pictures: By name of the image: itself, the truth, the prediction.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: dict[str, Sequence[Picture]] = field(default_factory=dict)


def opened(settings: Dense, window: int | None = None) -> tuple[FeatureExtractor, Pyramid]:
    """Open the backbone that settings name, and make maps of it, with windowed attention if wanted.

    Raises:
        CheckpointError: If it does not load.
        ConfigError: If it has no maps, or cannot have windows.
    """
    torch.manual_seed(settings.seed)
    # A trained network's file describes its backbone; the weights of all come later, by `load_around`.
    pretrained = not settings.untrained and settings.predict is None
    backbone = FeatureExtractor(settings, settings.backbone, pretrained=pretrained, drop_path_rate=settings.drop_path)
    try:
        pyramid = Pyramid(backbone.model, window).to(backbone.device).eval()
    except ValueError as error:
        raise ConfigError(f"{error}; {settings.backbone}; take another backbone") from None
    try:
        with torch.no_grad():
            pyramid(torch.zeros(1, backbone.in_chans, 64, 96, device=backbone.device))
    except (AssertionError, RuntimeError):  # some models of timm are bound to a size in ways of their own
        what = "the backbone does not take images of any size" + (", or not in windows" if window else "")
        raise ConfigError(f"{what}; {settings.backbone}; take another backbone") from None
    return backbone, pyramid


def fit(
    settings: Dense,
    backbone: FeatureExtractor,
    model: nn.Module,
    samples: AnnotatedSamples,
    objective: Callable[[AnnotatedBatch], dict[str, Tensor]],
    judge: Callable[[], Judged],
    task: Mapping[str, Any],
    *,
    lead: Callable[[Mapping[str, Any]], str],
    legend: Sequence[tuple[str, str]] = (),
    schedule: Callable[..., Callable[[int], float]] = warmup_cosine,
) -> None:
    """Train, judge on the way and at the end, keep the best and the last network, write the page.

    Args:
        settings: Of the verb.
        backbone: What the model is built on.
        model: The network, which holds the backbone's model.
        samples: What training sees.
        objective: From a batch to scalars by name; `loss` is minimised.
        judge: Looks at the held-out images with the network in evaluation mode.
        task: What describes the network, for `read_task`.
        lead: From the numbers to the first sentence of the page.
        legend: Names and colours.
        schedule: Makes the learning rate by step.

    Raises:
        ConfigError: If the optimizer does not exist.
        CheckpointError: If the run to resume is another one.
        NonFiniteError: If a loss is no number.
        SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
    """
    optim = settings.optim
    inside = {id(module) for module in backbone.model.modules()}
    heads = nn.ModuleList(module for module in outermost(model, inside))
    try:
        optimizer = create_optimizer(
            backbone.model,
            name=optim.name,
            lr=settings.lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            layer_decay=settings.layer_decay,
            heads=heads,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    judged: Judged | None = None

    def save(name: str) -> None:
        path = settings.out / name
        save_backbone(path, backbone.model, backbone.architecture, *backbone.statistics, around=model, task=dict(task))

    def evaluate(record: Record) -> dict[str, float]:
        nonlocal judged
        model.eval()
        with torch.inference_mode():
            judged = judge()
        model.train()
        name, score = next(iter(judged.summary.items()))
        if score > record.summary.get(f"best_{name}", -1.0):
            record.summary[f"best_{name}"] = score
            save("best.safetensors")
        return {name: value for name, value in judged.summary.items() if isinstance(value, float)}

    record = supervise(
        settings,
        samples,
        collate_annotated,
        objective,
        model,
        optimizer,
        evaluate,
        backbone=backbone,
        checkpointed=model,
        lr=settings.lr,
        warmup_epochs=optim.warmup_epochs,
        schedule=schedule,
        accumulation=optim.accumulation,
        clip_grad=optim.clip_grad,
    )
    if judged is None:  # a run that was done before
        evaluate(record)
    assert judged is not None
    save("last.safetensors")
    best = {name: value for name, value in record.summary.items() if name.startswith("best_")}
    summary = judged.summary | best | {"train_images": len(samples.images)}
    summary["seconds"] = round(record.seconds, 1)
    shown = [{"name": name, "pictures": [jpeg(each) for each in row]} for name, row in judged.pictures.items()]
    numbers = {
        name.replace("_", " ").replace("miou", "mIoU").replace("map", "AP"): f"{value:.1%}"
        for name, value in summary.items()
        if isinstance(value, float)
    } | {"training images": f"{len(samples.images):,}"}
    numbers.pop("seconds")
    page = {"lead": lead(summary), "numbers": numbers, "samples": shown, "legend": legend}
    write_results(settings, settings.out, summary, judged.rows, "dense.html", **page)
    print(json.dumps(summary))


def outermost(model: nn.Module, inside: set[int]) -> Iterator[nn.Module]:
    """Find the largest parts of a network that hold nothing of its backbone."""
    for child in model.children():
        if id(child) in inside:
            continue
        if any(id(module) in inside for module in child.modules()):
            yield from outermost(child, inside)
        else:
            yield child


def decodable(images: Readable, desc: str) -> Iterator[tuple[int, Any]]:
    """Read the images of a set one by one; those that do not decode are counted in a line on stderr.

    Raises:
        DataError: If none decodes.
    """
    bad: dict[str, str] = {}
    for index in tqdm(range(len(images)), desc=desc, unit=" images", leave=False, disable=None):
        try:
            item = images.read(index)
        except BadImage as reason:
            bad[images.names[index]] = str(reason)
            continue
        yield index, item
    if bad:
        path, why = next(iter(bad.items()))
        line = f"{len(bad)} of {len(images)} images left out, such as {path}: {why}"
        if len(bad) == len(images):
            raise DataError(f"{line}; {images.root}; correct them")
        print(f"warning: {line}; {images.root}", file=sys.stderr)


def predict_images(settings: Dense, in_chans: int, see: Callable[[str, Tensor], None]) -> None:
    """Show an image or the images of a folder to `see`, by name and pixels; print how many they were as JSON.

    Raises:
        DataError: If there is none, or two have the same name but for its ending.
    """
    began, path = time.perf_counter(), settings.predict
    assert path is not None
    if not path.exists():
        raise DataError(f"no such image or folder; {path}; check --predict")
    root, names = (path, folder_images(path, in_chans).names) if path.is_dir() else (path.parent, [path.name])
    if len({Path(name).with_suffix("") for name in names}) < len(names):
        raise DataError(f"two images of the same name but for the ending; {path}; rename one")
    skipped = 0
    for name in tqdm(names, desc="predicting", unit=" images", leave=False, disable=None):
        try:
            image = decode(root / name, in_chans)
        except BadImage as reason:
            skipped += 1
            print(f"warning: {reason}; {root / name}; left out", file=sys.stderr)
            continue
        see(name, image)
    print(
        json.dumps(
            {"images": len(names) - skipped, "skipped": skipped, "seconds": round(time.perf_counter() - began, 1)}
        )
    )


def colours(count: int) -> Integer[np.ndarray, "n 3"]:
    """Choose colours of 0..255 for classes, the same in every run; one more, grey, is for what has no class."""
    numbers = np.arange(count)
    hues = np.stack([numbers * 0.618034 % 1, 0.95 - numbers % 3 * 0.2, 0.95 - numbers % 4 * 0.15], axis=1)
    return np.vstack([hsv_to_rgb(hues) * 255, [[128, 128, 128]]]).astype(np.uint8)


def legend_of(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pair classes with their colours as CSS has them."""
    return [
        (name, "#{:02x}{:02x}{:02x}".format(*colour))
        for name, colour in zip(classes, colours(len(classes)), strict=False)
    ]


def rgb(image: UInt8[Tensor, "C H W"]) -> Picture:
    """Lay an image of 1 or 3 channels out as pictures are."""
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy().copy()


def shown_indices(count: int) -> set[int]:
    """Choose held-out images for the report, spread over the set."""
    return {round(place * (count - 1) / max(SHOWN - 1, 1)) for place in range(SHOWN)}
