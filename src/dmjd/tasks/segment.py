"""`dmjd segment`: train a backbone and UPerNet on images with a class for every pixel, or predict with them."""

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dmjd.backbones.files import load_around, read_task
from dmjd.config.downstream import SegmentSettings
from dmjd.config.rules import flags_of, to_dict, to_yaml
from dmjd.data.annotated import AnnotatedBatch, AnnotatedSamples, class_names
from dmjd.data.segmentation import SegmentationAugmentation, SegmentationSet, open_segmentation
from dmjd.data.transfer import transfer
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.claim import claim
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.errors import ConfigError
from dmjd.evaluation.dense import Judged, images_to_predict, output_name, refuse_images
from dmjd.evaluation.features import FeatureExtractor
from dmjd.evaluation.segmentation import PixelClassifier, judge_segmentation
from dmjd.networks.around import fit_around, heads_of, make_pyramid
from dmjd.networks.segmenter import Segmenter, pixel_loss
from dmjd.reports.dense import write_dense
from dmjd.reports.overlays import class_colours, colour_pixels, legend_of, overlay_pixels, rgb

# Settings that predictions take from training, besides crop_size.
FROM_TRAINING = ("decoder_channels", "auxiliary_weight", "inference", "stride")


def segment(settings: SegmentSettings) -> dict[str, Any] | None:
    """Train, save the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    With `settings.dense.predict` nothing is trained: a mask and an overlay of every image go to `settings.run.out`.

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
        if ranks.micro_batch(run.batch_size, settings.optim.accumulation) < 2:
            raise ConfigError(f"batch_size {run.batch_size}: BatchNorm needs two images at a time or more")
        torch.manual_seed(run.seed)
        start = settings.start.keywords | {"drop_path_rate": settings.tuning.drop_path}
        backbone = FeatureExtractor(ranks=ranks, **start, **run.keywords)
        train, held_out = backbone.open(
            lambda wanted: open_segmentation(
                run.data,
                wanted,
                classes=class_names(run.data, settings.dense.classes),
                ignore_index=settings.ignore_index,
                reduce_zero_label=settings.reduce_zero_label,
                part=settings.dense.part,
            )
        )
        judged = fit(settings, backbone, train, held_out)
        if not ranks.is_main:
            return None
        summary, classes = judged.summary | {"part": held_out.part}, train.classes
        write_dense(
            run.out,
            verb="segment",
            settings=to_yaml(settings),
            lead=f"A mean IoU of {summary['miou']:.1%} over the classes of {summary['images']:,} held-out images; "
            f"{summary['pixel_accuracy']:.1%} of their pixels are classified correctly.",
            summary=summary,
            rows=judged.rows,
            pictures={
                each.name: [rgb(each.image), *(colour_pixels(x, len(classes)) for x in (each.truth, each.prediction))]
                for each in judged.shown
            },
            legend=legend_of(classes),
        )
        print(json.dumps(summary))
        return summary


def create(settings: SegmentSettings, backbone: FeatureExtractor, num_classes: int) -> Segmenter:
    """Create the network around a backbone."""
    pyramid = make_pyramid(backbone, settings.start.backbone)
    auxiliary = settings.auxiliary_weight > 0
    network = Segmenter(pyramid, num_classes, channels=settings.decoder_channels, auxiliary=auxiliary)
    return network.to(backbone.device)


def pixel_classifier(settings: SegmentSettings, backbone: FeatureExtractor, network: nn.Module) -> PixelClassifier:
    """Make the pixel classifier described by the settings."""
    return PixelClassifier(
        network,
        backbone.normalize,
        backbone.autocast,
        settings.dense.crop_hw,
        slide=settings.inference == "slide",
        stride=settings.stride,
    )


def fit(
    settings: SegmentSettings, backbone: FeatureExtractor, train: SegmentationSet, held_out: SegmentationSet
) -> Judged:
    """Train the network, and evaluate it during training and at the end."""
    run, optim, dense, ranks = settings.run, settings.optim, settings.dense, backbone.ranks
    network = create(settings, backbone, len(train.classes))
    model = ParallelModel(network, ranks, **run.training, all_used=False)

    def objective(model: ParallelModel, batch: AnnotatedBatch) -> dict[str, Tensor]:
        images = backbone.normalize(transfer(batch.images, ranks.device))
        labels = transfer(batch.annotations, ranks.device)
        first, *second = (pixel_loss(logits.float(), labels, settings.ignore_index) for logits in model(images))
        if not second:
            return {"loss": first}
        return {"loss": first + settings.auxiliary_weight * second[0], "loss_auxiliary": second[0]}

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
        Plan(steps=steps, lr=settings.lr, shape=settings.schedule, **run.plan, **settings.log.plan, **optim.plan),
        autocast=backbone.autocast,
    )
    trainer.begin(resume=run.resume)
    augmentation = SegmentationAugmentation.of(
        dense.crop_hw,
        scale=dense.scale,
        flip=dense.flip,
        photometric=settings.photometric,
        mean=backbone.statistics[0],
        ignore_index=settings.ignore_index,
    )
    return fit_around(
        trainer,
        backbone,
        AnnotatedSamples(train, augmentation, run.seed),
        objective,
        lambda network: judge_segmentation(pixel_classifier(settings, backbone, network), held_out, ranks),
        {"name": "segment", "classes": list(train.classes), "crop_size": dense.crop_size}
        | {name: getattr(settings, name) for name in FROM_TRAINING},
    )


def predict(settings: SegmentSettings) -> dict[str, Any] | None:
    """Write the class of every pixel (masks/NAME.png, indices into classes.txt) and overlays/NAME.jpg."""
    began, out, path = time.perf_counter(), settings.run.out, settings.dense.predict
    assert path is not None
    refuse_images(path, out)
    task = read_task(settings.start.backbone, "segment")
    settings = replace(
        settings,
        dense=replace(settings.dense, crop_size=task["crop_size"]),
        **{name: task[name] for name in FROM_TRAINING},
    )
    with join_ranks(settings.run.device) as ranks:
        if not ranks.is_main:  # predicting an image takes no longer than starting a process
            return None
        start = settings.start.keywords | {"pretrained": False}  # `load_around` loads all weights
        alone = Ranks(ranks.device)  # the others have left
        backbone = FeatureExtractor(ranks=alone, **start, **settings.run.keywords)
        classes = task["classes"]
        network = create(settings, backbone, len(classes)).eval()
        load_around(settings.start.backbone, network)
        classify = pixel_classifier(settings, backbone, network)
        counts = [0, 0]
        for name, image in images_to_predict(path, backbone):
            counts[image is None] += 1
            if image is None:
                continue
            with torch.inference_mode():
                numbers = classify(image).cpu()
            mask = Image.fromarray(numbers.numpy().astype(np.uint8 if len(classes) <= 256 else np.uint16))
            if len(classes) <= 256:
                mask.putpalette(class_colours(len(classes))[:256].tobytes())
            picture = Image.fromarray(overlay_pixels(rgb(image), numbers, len(classes)))
            for folder, suffix, drawn in (("masks", ".png", mask), ("overlays", ".jpg", picture)):
                file = out / folder / f"{output_name(name)}{suffix}"
                file.parent.mkdir(parents=True, exist_ok=True)
                drawn.save(file)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in classes))
    seconds = round(time.perf_counter() - began, 1)
    summary = {"images": counts[0], "skipped": counts[1], "out": str(out), "seconds": seconds}
    print(json.dumps(summary))
    return summary
