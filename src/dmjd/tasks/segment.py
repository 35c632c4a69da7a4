"""`dmjd segment`: train a backbone and UPerNet on images with a class for every pixel, or predict with them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize

from dmjd.backbones.files import load_around, read_task
from dmjd.backbones.pyramid import Pyramid
from dmjd.config import Segment
from dmjd.data.loader import AnnotatedBatch, AnnotatedSamples
from dmjd.data.segmentation import Augmentation, SegmentationSet, load
from dmjd.data.source import class_names
from dmjd.engine.optim import warmup_cosine, warmup_poly
from dmjd.engine.run import refuse_second_run
from dmjd.errors import ConfigError
from dmjd.evaluation.extractor import FeatureExtractor
from dmjd.tasks.dense import (
    Judged,
    Picture,
    colours,
    decodable,
    fit,
    legend_of,
    opened,
    predict_images,
    rgb,
    shown_indices,
)

try:
    from segmentation_models_pytorch.base.modules import Conv2dReLU
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    from torchmetrics.classification import MulticlassConfusionMatrix
except ModuleNotFoundError as error:
    raise ConfigError(f"{error.name} is missing; dmjd segment needs it; pip install 'dmjd[dense]'") from None

FROM_TRAINING = ("crop_size", "decoder_channels", "auxiliary_weight", "inference", "stride")  # what predictions share


class Segmenter(nn.Module):
    """UPerNet (Xiao et al. 2018) on the maps of a backbone.

    Args:
        pyramid: Makes the maps.
        num_classes: Classes.
        channels: Width of UPerNet.
        auxiliary: With a second head, on the map of stride 16, for training.
    """

    def __init__(self, pyramid: Pyramid, num_classes: int, *, channels: int, auxiliary: bool):
        super().__init__()
        self.pyramid = pyramid
        # The decoder's list of widths starts with those of the image and of a map at stride 2, which it does not read.
        self.decoder = UPerNetDecoder([3, 0, *pyramid.channels], encoder_depth=5, decoder_channels=channels)
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            width = channels // 2
            self.auxiliary = nn.Sequential(
                Conv2dReLU(pyramid.channels[2], width, 3, padding=1, use_norm="batchnorm"),
                nn.Dropout2d(0.1),
                nn.Conv2d(width, num_classes, 1),
            )

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B classes H W"]]:
        """Compute logits of normalised images; in training a second set of them, of the auxiliary head."""
        maps = self.pyramid(images)
        logits = [self.classifier(self.decoder([images, images, *maps]))]
        if self.training and self.auxiliary is not None:
            logits.append(self.auxiliary(maps[2]))
        return [F.interpolate(each, images.shape[-2:], mode="bilinear") for each in logits]


def segment(settings: Segment) -> None:
    """Train, keep the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    With `settings.predict` nothing is trained: a mask and an overlay of every image go to `settings.out`.

    Raises:
        CheckpointError: If the backbone or the network does not load, or the run to resume is another one.
        ConfigError: If settings do not go together.
        DataError: If images or annotations are missing.
        NonFiniteError: If a loss is no number.
        SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
    """
    if settings.predict is not None:
        return predict(settings)
    refuse_second_run(settings.out, resume=settings.resume)
    backbone, pyramid = opened(settings)
    train, held_out = load(
        settings.data,
        in_chans=backbone.in_chans,
        classes=class_names(settings.data, settings.classes),
        ignore_index=settings.ignore_index,
        reduce_zero_label=settings.reduce_zero_label,
    )
    augmentation = Augmentation.of(
        settings.crop_hw,
        scale=settings.scale,
        flip=settings.flip,
        photometric=settings.photometric,
        mean=backbone.statistics[0],
        ignore_index=settings.ignore_index,
    )
    auxiliary = settings.auxiliary_weight > 0
    model = Segmenter(pyramid, len(train.classes), channels=settings.decoder_channels, auxiliary=auxiliary)
    model.to(backbone.device)

    def objective(batch: AnnotatedBatch) -> dict[str, Tensor]:
        images, labels = (part.to(backbone.device, non_blocking=True) for part in (batch.images, batch.annotations))
        first, *second = (
            pixel_loss(logits.float(), labels, settings.ignore_index) for logits in model(backbone.normalize(images))
        )
        if not second:
            return {"loss": first}
        return {"loss": first + settings.auxiliary_weight * second[0], "loss_auxiliary": second[0]}

    task = {"name": "segment", "classes": list(train.classes)}
    task |= {name: getattr(settings, name) for name in FROM_TRAINING}
    return fit(
        settings,
        backbone,
        model,
        AnnotatedSamples(train, augmentation, settings.seed),
        objective,
        lambda: judge(settings, backbone, model, held_out),
        task,
        lead=lambda summary: (
            f"A mean IoU of {summary['miou']:.1%} over the classes of {summary['images']:,} held-out images; "
            f"{summary['pixel_accuracy']:.1%} of their pixels are classified right."
        ),
        legend=legend_of(train.classes),
        schedule={"cosine": warmup_cosine, "poly": warmup_poly}[settings.schedule],
    )


def pixel_loss(
    logits: Float[Tensor, "B classes H W"], labels: Int[Tensor, "B H W"], ignore_index: int
) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy of the pixels that have a class; 0 if none has, where torch's own mean is none."""
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def judge(settings: Segment, backbone: FeatureExtractor, model: nn.Module, held_out: SegmentationSet) -> Judged:
    """Compare predictions with the labels of all held-out images, at the images' own size."""
    count, ignored = len(held_out.classes), held_out.ignore_index
    confusion = MulticlassConfusionMatrix(count, ignore_index=ignored, validate_args=False).to(backbone.device)
    pictures: dict[str, Sequence[Picture]] = {}
    images, shown = 0, shown_indices(len(held_out))
    for index, (image, labels) in decodable(held_out, "held-out images"):
        classes = classify(settings, backbone, model, image)
        confusion.update(classes, labels.to(backbone.device))
        images += 1
        if index in shown:
            known = labels.where(labels != ignored, count).numpy()
            pictures[held_out.names[index]] = rgb(image), colours(count)[known], colours(count)[classes.cpu().numpy()]
    summary, rows = scores(confusion.compute().cpu(), held_out.classes)
    return Judged(summary | {"images": images}, rows, pictures)


def scores(
    confusion: Int[Tensor, "true predicted"], classes: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute mean IoU, mean class accuracy and pixel accuracy (0 to 1), and a row for every class.

    IoU = true positives / (true + predicted - true positives). Its mean is over classes that occur in truth or
    prediction, that of accuracy over those that occur in truth; 0 if there is none.
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


def classify(
    settings: Segment, backbone: FeatureExtractor, model: nn.Module, image: UInt8[Tensor, "C H W"]
) -> Int[Tensor, "H W"]:
    """Find the class of every pixel, looking at the image with its shorter side as in training."""
    pixels = resize(image.to(backbone.device), [settings.short_side])
    with backbone.autocast():
        logits = look(settings, model, backbone.normalize(pixels)[None])
    return F.interpolate(logits, image.shape[-2:], mode="bilinear")[0].argmax(dim=0)


def look(settings: Segment, model: nn.Module, image: Float[Tensor, "1 C H W"]) -> Float[Tensor, "1 classes H W"]:
    """Compute logits of a whole image, or the mean of those of windows that cover it."""
    if settings.inference == "whole":
        return model(image)[0].float()
    window = [min(side, full) for side, full in zip(settings.crop_hw, image.shape[-2:], strict=True)]
    places = [
        starts(full, side, settings.stride or math.ceil(side * 2 / 3))
        for full, side in zip(image.shape[-2:], window, strict=True)
    ]
    total: Any = 0
    times = image.new_zeros(image.shape[-2:])
    for top in places[0]:
        for left in places[1]:
            part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(image[part])[0].float()
            total = total if isinstance(total, Tensor) else logits.new_zeros(1, logits.shape[1], *image.shape[-2:])
            total[part] += logits
            times[part[1:]] += 1
    return total / times


def starts(full: int, window: int, stride: int) -> list[int]:
    """Place windows a stride apart; the last one ends where the image ends."""
    return [min(stride * number, full - window) for number in range(math.ceil((full - window) / stride) + 1)]


def predict(settings: Segment) -> None:
    """Write the classes of all pixels (masks/NAME.png, numbers of classes.txt) and overlays/NAME.jpg."""
    task = read_task(settings.backbone, "segment")
    settings = replace(settings, **{name: task[name] for name in FROM_TRAINING})
    backbone, pyramid = opened(settings)
    classes, auxiliary = task["classes"], settings.auxiliary_weight > 0
    model = Segmenter(pyramid, len(classes), channels=settings.decoder_channels, auxiliary=auxiliary)
    load_around(settings.backbone, model)
    model.to(backbone.device).eval()
    folders = {name: settings.out / name for name in ("masks", "overlays")}

    def see(name: str, image: Tensor) -> None:
        with torch.inference_mode():
            numbers = classify(settings, backbone, model, image).cpu().numpy()
        mask = Image.fromarray(numbers.astype(np.uint8 if len(classes) <= 256 else np.uint16))
        if len(classes) <= 256:
            mask.putpalette(colours(len(classes))[:256].tobytes())
        paths = [
            folders["masks"] / Path(name).with_suffix(".png"),
            folders["overlays"] / Path(name).with_suffix(".jpg"),
        ]
        for path, picture in zip(
            paths, (mask, Image.fromarray(overlay(rgb(image), numbers, len(classes)))), strict=True
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)

    predict_images(settings, backbone.in_chans, see)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "classes.txt").write_text("".join(f"{name}\n" for name in classes), "utf-8")


def overlay(image: Picture, numbers: Int[np.ndarray, "H W"], count: int) -> Picture:
    """Colour an image by its pixels' classes."""
    return (image * 0.5 + colours(count)[numbers] * 0.5).astype(np.uint8)
