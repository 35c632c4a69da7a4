"""Evaluation of object detection: COCO's average precision on all held-out images."""

import contextlib
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Num
from safetensors.torch import load, save
from torch import Tensor, nn

from dmjd.data.detection import DetectionSet, Objects
from dmjd.data.source import evenly
from dmjd.engine.distributed import Ranks
from dmjd.errors import DataError, extra
from dmjd.evaluation.dense import SHOWN, Judged, Shown, decodable

with extra("dense", "dmjd detect"):
    from torchmetrics.detection import MeanAveragePrecision

DRAWN = 0.5  # lowest score of a box that is drawn
MEASURES = {
    "map": "map",
    "map50": "map_50",
    "map75": "map_75",
    "map_small": "map_small",
    "map_medium": "map_medium",
    "map_large": "map_large",
}
MASKS = {"detection_mask", "groundtruth_mask"}  # states of the metric that are not tensors
Found = dict[str, Tensor]  # boxes (n, 4), labels from 0 (n), optionally descending scores (n) and masks (n, H, W)


@dataclass(frozen=True)
class Finder:
    """Finds objects in an image.

    Attributes:
        network: A torchvision detector in evaluation mode.
        autocast: Context manager for the forward pass.
    """

    network: nn.Module
    autocast: Callable[[], AbstractContextManager[None]]

    def __call__(self, image: Num[Tensor, "C H W"]) -> Found:
        """Return boxes, labels from 0, scores in descending order, and masks if the network has them; on the CPU.

        Args:
            image: Pixels of 0..255.
        """
        device = next(self.network.parameters()).device
        with self.autocast():
            (found,) = self.network([image.to(device) / 255])
        seen = {"boxes": found["boxes"].float(), "labels": found["labels"] - 1, "scores": found["scores"].float()}
        if "masks" in found:
            seen["masks"] = found["masks"][:, 0]
        return {name: value.cpu() for name, value in seen.items()}


def likely(found: Found) -> Found:
    """Keep the boxes that score at least `DRAWN`."""
    return {name: value[found["scores"] >= DRAWN] for name, value in found.items()}


def judge_detection(find: Finder, held_out: DetectionSet, ranks: Ranks) -> Judged:
    """Compute COCO's average precision (0 to 1) of boxes, and of masks if there are any, on all held-out images.

    Every rank evaluates its share. Objects are small, medium or large by the area of their box (COCO's own program uses
    that of the outline, even for boxes). A measure without any objects, such as that of small ones, is None.

    Raises:
        DataError: If there is no object.
    """
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if held_out.masks else ("bbox",),
        class_metrics=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # every rank has all images by then
    )
    judged: list[tuple[int, bytes]] = []
    shown: list[Shown] = []
    wanted = set(evenly(len(held_out), SHOWN))
    for index, (image, objects) in decodable(held_out, ranks):
        found, truth = find(image), annotation(objects)
        judged.append((index, compress(metric, found, truth)))
        if index in wanted:
            true = {name: value for name, value in truth.items() if name != "iscrowd"}
            shown.append(Shown(index, held_out.name(index), image, true, likely(found)))
    gathered = ranks.gather((judged, shown))
    judged = sorted((image for each in gathered for image in each[0]), key=lambda image: image[0])
    shown = sorted((picture for each in gathered for picture in each[1]), key=lambda picture: picture.number)
    for _, packed in judged:
        for name, value in load(packed).items():
            metric.metric_state[name].append(run_lengths(value) if name in MASKS else value)
    if all(bool(crowds.all()) for crowds in metric.groundtruth_crowds):
        raise DataError(f"no objects in the held-out images that decode; {held_out.address}; correct them")
    summary, rows = average_precision(metric, held_out)
    return Judged(summary | {"images": len(judged)}, rows, shown)


def annotation(objects: Objects) -> dict[str, Tensor]:
    """Convert the true objects of an image to the format of torchmetrics."""
    truth = {"boxes": objects.boxes, "labels": objects.labels, "iscrowd": objects.ignored.long()}
    return truth if objects.masks is None else truth | {"masks": objects.masks}


def compress(metric: MeanAveragePrecision, found: Found, truth: dict[str, Tensor]) -> bytes:
    """Add an image to the metric and take its state out again as bytes: masks are run lengths there, 100 times smaller.

    Small tensors kept for every image would fragment the memory between the masks of one image and the next; one byte
    string per image does not.
    """
    metric.update([found], [truth])
    kept = {name: values.pop() for name, values in metric.metric_state.items() if values}
    for name in MASKS & kept.keys():
        text = json.dumps([(size, counts.decode()) for size, counts in kept[name]])
        kept[name] = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
    return save(kept)


def run_lengths(text: Tensor) -> list[tuple[tuple[int, ...], bytes]]:
    """Restore the masks of an image to the metric's form, before `compress`: sizes, and COCO's run lengths."""
    return [(tuple(size), counts.encode()) for size, counts in json.loads(text.numpy().tobytes())]


def average_precision(
    metric: MeanAveragePrecision, held_out: DetectionSet
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute the measures of all images, and a row for every class."""
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        values = metric.compute()
    summary: dict[str, Any] = {}
    by_class: dict[str, dict[int, float | None]] = {}
    for kind, prefix in zip(metric.iou_type, ("", "mask_"), strict=False):
        ours = {name.removeprefix(f"{kind}_"): value for name, value in values.items()}
        summary |= {prefix + name: rounded(ours[theirs]) for name, theirs in MEASURES.items()}
        numbers, precisions = values["classes"].reshape(-1).tolist(), ours["map_per_class"].reshape(-1)
        by_class[f"{prefix}ap"] = dict(zip(numbers, map(rounded, precisions), strict=True))
    rows = [
        {"class": name, "objects": held_out.counts[number]}
        | {measure: "" if (value := found.get(number)) is None else value for measure, found in by_class.items()}
        for number, name in enumerate(held_out.classes)
    ]
    return summary, rows


def rounded(value: Tensor) -> float | None:
    """Round a measure; returns None for -1, which stands for no objects."""
    return round(float(value), 4) if value >= 0 else None
