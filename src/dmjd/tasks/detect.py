"""`dmjd detect`: train a backbone and Faster R-CNN, or Mask R-CNN where there are masks, or predict with them."""

import contextlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dmjd.backbones.files import load_around, read_task
from dmjd.backbones.pyramid import Pyramid
from dmjd.config import Detect
from dmjd.data.detection import Augmentation, DetectionSet, load
from dmjd.data.loader import AnnotatedBatch, AnnotatedSamples
from dmjd.data.source import class_names
from dmjd.engine.run import refuse_second_run
from dmjd.errors import ConfigError, DataError
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
    from faster_coco_eval.core import mask as run_lengths
    from torchmetrics.detection import MeanAveragePrecision
except ModuleNotFoundError as error:
    raise ConfigError(f"{error.name} is missing; dmjd detect needs it; pip install 'dmjd[dense]'") from None

FROM_TRAINING = ("crop_size", "fpn_channels", "head_channels", "window")  # what predictions share
BOX_SIDE = 7  # what torchvision's head sees of a box, in points of a map
DRAWN = 0.5  # lowest score of a box in a picture
MEASURES = {
    "map": "map",
    "map50": "map_50",
    "map75": "map_75",
    "map_small": "map_small",
    "map_medium": "map_medium",
    "map_large": "map_large",
}


class Maps(nn.Module):
    """The maps that torchvision's detectors look at: a feature pyramid network (Lin et al. 2017) on a backbone's."""

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """Compute maps of strides 4, 8, 16, 32 and 64, named 0, 1, 2, 3 and pool."""
        return self.fpn(dict(zip("0123", self.pyramid(images), strict=True)))


def detector(
    settings: Detect, backbone: FeatureExtractor, pyramid: Pyramid, num_classes: int, *, masks: bool
) -> nn.Module:
    """Make torchvision's detector: images (C, H, W) of 0..1 in a list, losses or boxes out."""
    width, hidden = settings.fpn_channels, settings.head_channels
    mean, std = backbone.statistics
    options: dict[str, Any] = {
        "min_size": min(settings.crop_hw),
        "max_size": max(settings.crop_hw),
        "image_mean": mean,
        "image_std": std,
        "size_divisible": 64,  # the coarsest map's stride
        "_skip_resize": True,  # in training: crops have their size
        "box_head": TwoMLPHead(width * BOX_SIDE**2, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes + 1),  # and the background
    }
    if masks:
        options["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        options["mask_predictor"] = MaskRCNNPredictor(width, width, num_classes + 1)
    model: Any = (MaskRCNN if masks else FasterRCNN)(Maps(pyramid, width), **options)
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor):
        part.register_forward_hook(lambda module, given, found: float32(found))
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        if pooler is not None:  # left alone, it guesses strides from the first image, wrongly for some sizes
            pooler.scales = [1 / stride for stride in pyramid.strides]
            pooler.map_levels = initLevelMapper(*(round(math.log2(pyramid.strides[end])) for end in (0, -1)))
    return model


def float32(found: Any) -> Any:
    """Cast what a part of the network says: boxes are computed in its type, and 8 bits of bf16 are no coordinate."""
    if isinstance(found, Tensor):
        return found.float()
    if isinstance(found, dict):
        return {name: value.float() for name, value in found.items()}
    return type(found)(float32(each) for each in found)


def detect(settings: Detect) -> None:
    """Train, keep the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    With `settings.predict` nothing is trained: boxes as a COCO file and an overlay of every image go to `settings.out`.

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
    backbone, pyramid = opened(settings, window=settings.window)
    classes = class_names(settings.data, settings.classes)
    train, held_out = load(settings.data, in_chans=backbone.in_chans, classes=classes)
    masks = train.masks and held_out.masks
    train, held_out = (replace(part, masks=masks) for part in (train, held_out))
    model = detector(settings, backbone, pyramid, len(train.classes), masks=masks).to(backbone.device)
    augmentation = Augmentation.of(
        settings.crop_hw, scale=settings.scale, flip=settings.flip, mean=backbone.statistics[0]
    )

    def objective(batch: AnnotatedBatch) -> dict[str, Tensor]:
        images = batch.images.to(backbone.device, non_blocking=True) / 255
        targets = [
            {name: value.to(backbone.device, non_blocking=True) for name, value in each.items()}
            for each in batch.annotations
        ]
        losses = model(list(images), targets)
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    task = {"name": "detect", "classes": list(train.classes), "masks": masks}
    task |= {name: getattr(settings, name) for name in FROM_TRAINING}
    return fit(
        settings,
        backbone,
        model,
        AnnotatedSamples(train, augmentation, settings.seed),
        objective,
        lambda: judge(backbone, model, held_out),
        task,
        lead=lambda summary: (
            f"An average precision of {summary['map']:.1%} over IoU 0.5 to 0.95 ({summary['map50']:.1%} at 0.5) for "
            f"the boxes of {summary['images']:,} held-out images."
        ),
        legend=legend_of(train.classes),
    )


def judge(backbone: FeatureExtractor, model: nn.Module, held_out: DetectionSet) -> Judged:
    """Compute COCO's average precision (0 to 1) of boxes, and of masks if there are any, on all held-out images.

    Small, medium and large are so by the area of the box (COCO's own program takes that of the outline, for boxes too).
    A measure without objects, such as that of small ones, is None.
    """
    kinds = ("bbox", "segm") if held_out.masks else ("bbox",)
    metric = MeanAveragePrecision(iou_type=kinds, class_metrics=True, backend="faster_coco_eval")
    pictures: dict[str, Sequence[Picture]] = {}
    images, counted, shown = 0, 0, shown_indices(len(held_out))
    for index, (image, objects) in decodable(held_out, "held-out images"):
        found = see(backbone, model, image)
        truth = {"boxes": objects.boxes, "labels": objects.labels, "iscrowd": objects.ignored.long()}
        if objects.masks is not None:
            truth["masks"] = objects.masks
        metric.update([found], [truth])
        images += 1
        counted += int((~objects.ignored).sum())
        if index in shown:
            true = {name: value for name, value in truth.items() if name != "iscrowd"}
            likely = {name: value[found["scores"] >= DRAWN] for name, value in found.items()}
            pictures[held_out.names[index]] = [
                rgb(image),
                *(overlay(image, each, held_out.classes) for each in (true, likely)),
            ]
    if not counted:
        raise DataError(f"no objects in the held-out images that decode; {held_out.root}; correct them")
    with contextlib.redirect_stdout(io.StringIO()):  # the library reports its progress
        values = metric.compute()
    summary: dict[str, Any] = {}
    by_class: dict[str, dict[int, float | None]] = {}
    for kind, prefix in zip(kinds, ("", "mask_"), strict=False):
        ours = {name.removeprefix(f"{kind}_"): value for name, value in values.items()}
        summary |= {prefix + name: share(ours[theirs]) for name, theirs in MEASURES.items()}
        numbers, precisions = values["classes"].reshape(-1).tolist(), ours["map_per_class"].reshape(-1)
        by_class[f"{prefix}ap"] = dict(zip(numbers, map(share, precisions), strict=True))
    rows = [
        {"class": name, "objects": held_out.counts[number]}
        | {measure: "" if (value := found.get(number)) is None else value for measure, found in by_class.items()}
        for number, name in enumerate(held_out.classes)
    ]
    return Judged(summary | {"images": images}, rows, pictures)


def share(value: Tensor) -> float | None:
    """Round a measure; -1 stands for none."""
    return round(float(value), 4) if value >= 0 else None


def see(backbone: FeatureExtractor, model: nn.Module, image: UInt8[Tensor, "C H W"]) -> dict[str, Tensor]:
    """Find objects in an image: boxes, labels from 0, scores in falling order, and masks if the network has them."""
    with backbone.autocast():
        (found,) = model([image.to(backbone.device) / 255])
    seen = {"boxes": found["boxes"].float(), "labels": found["labels"] - 1, "scores": found["scores"].float()}
    if "masks" in found:
        seen["masks"] = found["masks"][:, 0] >= 0.5
    return {name: value.cpu() for name, value in seen.items()}


def overlay(image: UInt8[Tensor, "C H W"], found: dict[str, Tensor], classes: Sequence[str]) -> Picture:
    """Draw boxes and masks on an image, in the colours of their classes."""
    picture = image.expand(3, -1, -1).contiguous()
    chosen = [tuple(colours(len(classes))[label].tolist()) for label in found["labels"].tolist()]
    if not chosen:
        return rgb(picture)
    if "masks" in found:
        picture = draw_segmentation_masks(picture, found["masks"], alpha=0.4, colors=chosen)
    return rgb(draw_bounding_boxes(picture, found["boxes"], colors=chosen, width=2))


def predict(settings: Detect) -> None:
    """Write detections.json (a COCO file with scores), overlays/NAME.jpg and, with masks, masks/NAME.png.

    A pixel of masks/NAME.png is 0 or the place, from 1, of the object in order of scores, of those of 0.5 and more.
    """
    task = read_task(settings.backbone, "detect")
    settings = replace(settings, **{name: task[name] for name in FROM_TRAINING})
    backbone, pyramid = opened(settings, window=settings.window)
    classes: list[str] = task["classes"]
    model = detector(settings, backbone, pyramid, len(classes), masks=task["masks"])
    load_around(settings.backbone, model)
    model.to(backbone.device).eval()
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": [],
    }

    def look(name: str, image: Tensor) -> None:
        with torch.inference_mode():
            found = see(backbone, model, image)
        image_id, (height, width) = len(content["images"]) + 1, image.shape[1:]
        content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for number, (label, score) in enumerate(zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)):
            left, top, right, bottom = (round(value, 2) for value in found["boxes"][number].tolist())
            each = {
                "id": len(content["annotations"]) + 1,  # to COCO's evaluation 0 is no match
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                "area": round((right - left) * (bottom - top), 2),
                "iscrowd": 0,
                "score": round(score, 4),
            }
            if "masks" in found:
                each |= encoded(found["masks"][number])
            content["annotations"].append(each)
        likely = {name: value[found["scores"] >= DRAWN] for name, value in found.items()}
        write(settings.out / "overlays" / Path(name).with_suffix(".jpg"), overlay(image, likely, classes))
        if "masks" in found:
            write(settings.out / "masks" / Path(name).with_suffix(".png"), instances(likely["masks"], height, width))

    predict_images(settings, backbone.in_chans, look)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "detections.json").write_text(json.dumps(content), "utf-8")


def encoded(mask: Tensor) -> dict[str, Any]:
    """Write a mask as COCO's run lengths."""
    lengths = run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"segmentation": {**lengths, "counts": lengths["counts"].decode()}, "area": int(mask.sum())}


def instances(masks: Tensor, height: int, width: int) -> np.ndarray:
    """Number the pixels of masks in order; the first one wins."""
    numbers = np.zeros((height, width), np.uint16)
    for place in range(len(masks), 0, -1):
        numbers[masks[place - 1].numpy()] = place
    return numbers


def write(path: Path, picture: np.ndarray) -> None:
    """Save a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
