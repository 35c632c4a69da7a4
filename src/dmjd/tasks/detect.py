"""`dmjd detect`: train a backbone and Faster R-CNN, or Mask R-CNN where there are masks, or predict with them."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dmjd.backbones.files import load_around, read_task
from dmjd.config.downstream import DetectSettings
from dmjd.config.rules import flags_of, to_dict, to_yaml
from dmjd.data.annotated import AnnotatedBatch, AnnotatedSamples, class_names
from dmjd.data.detection import DetectionAugmentation, DetectionSet, open_detection
from dmjd.data.transfer import transfer
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.claim import claim
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.evaluation.dense import Judged, images_to_predict, output_name, refuse_images
from dmjd.evaluation.detection import DRAWN, Finder, Found, judge_detection, likely
from dmjd.evaluation.features import FeatureExtractor
from dmjd.networks.around import fit_around, heads_of, make_pyramid
from dmjd.networks.detector import create_detector
from dmjd.reports.dense import write_dense
from dmjd.reports.overlays import legend_of, overlay_objects, rgb

FROM_TRAINING = ("fpn_channels", "head_channels", "window")  # taken by predictions, besides crop_size


def detect(settings: DetectSettings) -> dict[str, Any] | None:
    """Train, save the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    With `settings.dense.predict` nothing is trained: boxes as a COCO file and an overlay of every image go to
    `settings.run.out`.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone or the network does not load, or the run to resume has other settings or
            images.
        ConfigError: If settings are incompatible.
        DataError: If images or annotations are missing.
        NonFiniteError: If a loss is not finite.
        Stopped: After a signal that stops runs.
    """
    if settings.dense.predict is not None:
        return predict(settings)
    run = settings.run
    with join_ranks(run.device) as ranks, claim(run.out, resume=run.resume, ranks=ranks):
        ranks.micro_batch(run.batch_size, settings.optim.accumulation)
        torch.manual_seed(run.seed)
        start = settings.start.keywords | {"drop_path_rate": settings.tuning.drop_path}
        backbone = FeatureExtractor(ranks=ranks, **start, **run.keywords)
        classes = class_names(run.data, settings.dense.classes)
        train, held_out = backbone.open(
            lambda wanted: open_detection(run.data, wanted, classes=classes, part=settings.dense.part)
        )
        masks = train.masks and held_out.masks
        train, held_out = (replace(part, masks=masks) for part in (train, held_out))
        judged = fit(settings, backbone, train, held_out)
        if not ranks.is_main:
            return None
        summary = judged.summary | {"part": held_out.part}
        write_dense(
            run.out,
            verb="detect",
            settings=to_yaml(settings),
            lead=f"An average precision of {summary['map']:.1%} over IoU 0.5 to 0.95 ({summary['map50']:.1%} at 0.5) "
            f"for the boxes of {summary['images']:,} held-out images. "
            f"Pictures show boxes with a score of {DRAWN:g} or more.",
            summary=summary,
            rows=judged.rows,
            pictures={
                each.name: [
                    rgb(each.image),
                    *(overlay_objects(each.image, objects, train.classes) for objects in (each.truth, each.prediction)),
                ]
                for each in judged.shown
            },
            legend=legend_of(train.classes),
        )
        print(json.dumps(summary))
        return summary


def create(settings: DetectSettings, backbone: FeatureExtractor, num_classes: int, *, masks: bool) -> nn.Module:
    """Create the detector around a backbone."""
    network = create_detector(
        make_pyramid(backbone, settings.start.backbone, window=settings.window),
        num_classes,
        masks=masks,
        crop_hw=settings.dense.crop_hw,
        statistics=backbone.statistics,
        fpn_channels=settings.fpn_channels,
        head_channels=settings.head_channels,
    )
    return network.to(backbone.device)


def fit(settings: DetectSettings, backbone: FeatureExtractor, train: DetectionSet, held_out: DetectionSet) -> Judged:
    """Train the network, and evaluate it during training and at the end."""
    run, optim, dense, ranks = settings.run, settings.optim, settings.dense, backbone.ranks
    network = create(settings, backbone, len(train.classes), masks=train.masks)
    # Not compiled by default: the number of boxes differs in every batch, so it would be compiled again and again.
    compiling = {"compile": "off"} if run.compile == "auto" else {}
    model = ParallelModel(network, ranks, **run.training | compiling, all_used=False)

    def objective(model: ParallelModel, batch: AnnotatedBatch) -> dict[str, Tensor]:
        images = transfer(batch.images, ranks.device) / 255
        targets = [{name: transfer(value, ranks.device) for name, value in each.items()} for each in batch.annotations]
        losses = model(list(images), targets)
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    steps = run.num_steps(len(train))
    trainer = Trainer(
        Run(to_dict(settings), train, ranks=ranks, held_out=len(held_out), defaults=flags_of(type(settings))),
        model,
        create_optimizer(
            backbone.model,
            lr=settings.lr,
            layer_decay=settings.tuning.layer_decay,
            heads=heads_of(network, backbone.model),
            **optim.keywords,
        ),
        Plan(steps=steps, lr=settings.lr, **run.plan, **settings.log.plan, **optim.plan),
        autocast=backbone.autocast,
    )
    trainer.begin(resume=run.resume)
    mean = backbone.statistics[0]
    augmentation = DetectionAugmentation.of(dense.crop_hw, scale=dense.scale, flip=dense.flip, mean=mean)
    return fit_around(
        trainer,
        backbone,
        AnnotatedSamples(train, augmentation, run.seed),
        objective,
        lambda network: judge_detection(Finder(network, backbone.autocast), held_out, ranks),
        {"name": "detect", "classes": list(train.classes), "masks": train.masks, "crop_size": dense.crop_size}
        | {name: getattr(settings, name) for name in FROM_TRAINING},
    )


def predict(settings: DetectSettings) -> dict[str, Any] | None:
    """Write detections.json (a COCO file with scores), overlays/NAME.jpg and, with masks, masks/NAME.png.

    A pixel of masks/NAME.png is 0, or the rank by score, from 1, of its object among those with a score of 0.5 or more.
    """
    began, out, path = time.perf_counter(), settings.run.out, settings.dense.predict
    assert path is not None
    refuse_images(path, out)
    task = read_task(settings.start.backbone, "detect")
    settings = replace(
        settings,
        dense=replace(settings.dense, crop_size=task["crop_size"]),
        **{name: task[name] for name in FROM_TRAINING},
    )
    classes: list[str] = task["classes"]
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": [],
    }
    skipped = 0
    with join_ranks(settings.run.device) as ranks:
        if not ranks.is_main:  # predicting an image takes no longer than starting a process
            return None
        start = settings.start.keywords | {"pretrained": False}  # `load_around` loads all weights
        alone = Ranks(ranks.device)  # the others have left
        backbone = FeatureExtractor(ranks=alone, **start, **settings.run.keywords)
        network = create(settings, backbone, len(classes), masks=task["masks"]).eval()
        load_around(settings.start.backbone, network)
        find = Finder(network, backbone.autocast)
        for name, image in images_to_predict(path, backbone):
            if image is None:
                skipped += 1
                continue
            with torch.inference_mode():
                found = find(image)
            image_id, (height, width) = len(content["images"]) + 1, image.shape[1:]
            content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
            content["annotations"] += annotations(found, image_id, first_id=len(content["annotations"]) + 1)
            drawn = likely(found)
            write(out / "overlays" / f"{output_name(name)}.jpg", overlay_objects(image, drawn, classes))
            if "masks" in found:
                write(out / "masks" / f"{output_name(name)}.png", instances(drawn["masks"], height, width))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "detections.json", json.dumps(content))
    seconds = round(time.perf_counter() - began, 1)
    summary = {"images": len(content["images"]), "skipped": skipped, "out": str(out), "seconds": seconds}
    print(json.dumps(summary))
    return summary


def annotations(found: Found, image_id: int, *, first_id: int) -> list[dict[str, Any]]:
    """Convert the detections of an image to COCO's format; ids start at 1, since 0 means no match there."""
    rows = []
    for number, (label, score) in enumerate(zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)):
        left, top, right, bottom = (round(value, 2) for value in found["boxes"][number].tolist())
        row = {
            "id": first_id + number,
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
            "area": round((right - left) * (bottom - top), 2),
            "iscrowd": 0,
            "score": round(score, 4),
        }
        rows.append(row | (encoded(found["masks"][number]) if "masks" in found else {}))
    return rows


def encoded(mask: Tensor) -> dict[str, Any]:
    """Encode a mask in COCO's run-length encoding."""
    from faster_coco_eval.core import mask as run_lengths

    lengths = run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"segmentation": {**lengths, "counts": lengths["counts"].decode()}, "area": int(mask.sum())}


def instances(masks: Tensor, height: int, width: int) -> np.ndarray:
    """Number the pixels of masks in order; where masks overlap, the first one wins."""
    numbers = np.zeros((height, width), np.uint16)
    for place in range(len(masks), 0, -1):
        numbers[masks[place - 1].numpy()] = place
    return numbers


def write(path: Path, picture: np.ndarray) -> None:
    """Save a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
