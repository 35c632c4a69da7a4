"""Evaluation of semantic segmentation: mean IoU over all held-out images."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize

from dmjd.data.segmentation import SegmentationSet, seen_hw
from dmjd.data.source import evenly
from dmjd.engine.distributed import Ranks
from dmjd.errors import extra
from dmjd.evaluation.dense import SHOWN, Judged, Shown, decodable

with extra("dense", "dmjd segment"):
    from torchmetrics.classification import MulticlassConfusionMatrix


@dataclass(frozen=True)
class PixelClassifier:
    """Predicts the class of every pixel of an image.

    Attributes:
        network: Maps normalised images to a list whose first entry is logits.
        normalize: Normalises pixels of 0..255 for the network.
        autocast: Context manager for the forward pass.
        window_hw: Height and width of a training crop; its shorter side sets the size of images, by `seen_hw`.
        slide: Average the logits of windows of the crop's size, instead of seeing the whole image at once.
        stride: Pixels between windows; None for two thirds of a window.
    """

    network: nn.Module
    normalize: nn.Module
    autocast: Callable[[], AbstractContextManager[None]]
    window_hw: tuple[int, int]
    slide: bool = False
    stride: int | None = None

    def __call__(self, image: Num[Tensor, "C H W"]) -> Int[Tensor, "H W"]:
        """Classify the pixels of an image of 0..255, on the network's device."""
        device = next(self.network.parameters()).device
        pixels = resize(image.to(device), seen_hw(image.shape[-2:], min(self.window_hw)))
        with self.autocast():
            logits = self.logits(self.normalize(pixels[None]))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear")[0].argmax(dim=0)

    def logits(self, image: Float[Tensor, "1 C H W"]) -> Float[Tensor, "1 classes H W"]:
        """Compute the logits of a whole image, or their mean over windows that cover it."""
        if not self.slide:
            return self.network(image)[0].float()
        window = [min(side, full) for side, full in zip(self.window_hw, image.shape[-2:], strict=True)]
        places = [
            starts(full, side, self.stride or math.ceil(side * 2 / 3))
            for full, side in zip(image.shape[-2:], window, strict=True)
        ]
        total: Any = 0
        times = image.new_zeros(image.shape[-2:])
        for top in places[0]:
            for left in places[1]:
                part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                logits = self.network(image[part])[0].float()
                total = total if isinstance(total, Tensor) else logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
                total[part] += logits
                times[part[1:]] += 1
        return total / times


def starts(full: int, window: int, stride: int) -> list[int]:
    """Place windows a stride apart; the last one ends at the edge of the image."""
    return [min(stride * number, full - window) for number in range(math.ceil((full - window) / stride) + 1)]


def judge_segmentation(classify: PixelClassifier, held_out: SegmentationSet, ranks: Ranks) -> Judged:
    """Compare predictions with the labels of all held-out images at their original size; every rank does its share."""
    count, ignored = len(held_out.classes), held_out.ignore_index
    confusion = MulticlassConfusionMatrix(count, ignore_index=ignored, validate_args=False).to(ranks.device)
    shown: list[Shown] = []
    images, wanted = 0, set(evenly(len(held_out), SHOWN))
    for index, (image, labels) in decodable(held_out, ranks):
        classes = classify(image)
        confusion.update(classes, labels.to(ranks.device))
        images += 1
        if index in wanted:
            known = labels.where(labels != ignored, count)
            shown.append(Shown(index, held_out.name(index), image, known, classes.cpu()))
    counted = ranks.gather((confusion.confmat.cpu(), images, shown))
    summary, rows = scores(torch.stack([each[0] for each in counted]).sum(dim=0), held_out.classes)
    pictures = sorted((picture for each in counted for picture in each[2]), key=lambda picture: picture.number)
    return Judged(summary | {"images": sum(each[1] for each in counted)}, rows, pictures)


def scores(
    confusion: Int[Tensor, "true predicted"], classes: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute mean IoU, mean class accuracy and pixel accuracy (0 to 1), and a row for every class.

    IoU = true positives / (true + predicted - true positives). Its mean is over classes that occur in truth or
    prediction, that of accuracy over classes that occur in truth; 0 if there are none.
    """
    right, true, predicted = confusion.diagonal().double(), confusion.sum(1).double(), confusion.sum(0).double()
    union = true + predicted - right
    iou, accuracy = right / union, right / true
    summary = {
        "miou": round(float(iou.nanmean().nan_to_num()), 4),
        "pixel_accuracy": round(float((right.sum() / true.sum()).nan_to_num()), 4),
        "mean_class_accuracy": round(float(accuracy.nanmean().nan_to_num()), 4),
    }
    rows = [
        {
            "class": name,
            "pixels": int(true[number]),
            "accuracy": "" if true[number] == 0 else round(float(accuracy[number]), 4),
            "iou": "" if union[number] == 0 else round(float(iou[number]), 4),
        }
        for number, name in enumerate(classes)
    ]
    return summary, rows
