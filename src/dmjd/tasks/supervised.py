"""Training with labels, shared by every verb that does it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms.v2.functional import to_pil_image

from dmjd.config import Augment, Learn, to_dict, to_yaml
from dmjd.data import source as sources
from dmjd.data.loader import LabelledBatch, LabelledSamples, ReadableSamples, StepSampler, train_batches
from dmjd.data.source import Images
from dmjd.engine import checkpoint
from dmjd.engine.device import memory_errors
from dmjd.engine.loop import train
from dmjd.engine.optim import warmup_cosine, warmup_steps
from dmjd.engine.run import Record
from dmjd.evaluation.extractor import FeatureExtractor

# What may differ between a run and its resumption: none of it changes a loss on the same kind of device.
MAY_CHANGE = {"out", "resume", "preset", "config", "data", "workers", "device", "debug", "log"}


@dataclass(frozen=True)
class Transform:
    """timm's training transform on uint8 images (C, H, W); an object, so that worker processes can have it."""

    steps: Callable[[Any], Tensor]

    def __call__(self, image: Tensor) -> Tensor:
        """Augment and normalise one image."""
        return self.steps(to_pil_image(image))


def training_transform(backbone: FeatureExtractor, augment: Augment) -> Transform:
    """Make timm's training transform for a backbone's input."""
    mean, std = backbone.statistics
    transform = create_transform(
        (backbone.in_chans, *backbone.image_hw),
        is_training=True,
        scale=augment.scale,
        hflip=0.5 if augment.flip else 0.0,
        color_jitter=None,
        auto_augment=None if augment.auto_augment == "none" else augment.auto_augment,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = keep_a_bit
    return Transform(transform)


def keep_a_bit(image: Any, bits: int, **rest: Any) -> Any:
    """Posterize as timm does, but never to 0 bits, which Pillow refuses since version 13."""
    return posterize(image, max(bits, 1), **rest)


def labelled_samples(images: Images, transform: Transform, seed: int) -> LabelledSamples:
    """Make the samples of a classification, with small sets held in memory."""
    return LabelledSamples(sources.in_memory(images), transform, seed)


def supervise(
    settings: Learn,
    samples: ReadableSamples,
    collate: Callable[[list[Any]], Any],
    objective: Callable[[Any], dict[str, Tensor]],
    trained: nn.Module,
    optimizer: Optimizer,
    evaluate: Callable[[Record], dict[str, float]],
    *,
    backbone: FeatureExtractor,
    checkpointed: nn.Module,
    lr: float,
    warmup_epochs: float,
    schedule: Callable[..., Callable[[int], float]] = warmup_cosine,
    accumulation: int = 1,
    clip_grad: float = 0.0,
    after_step: Callable[[int], None] = lambda step: None,
) -> Record:
    """Train on labelled images, resumable, and record the run in `settings.out`.

    Args:
        settings: Of the verb.
        samples: What training sees, by (epoch, index).
        collate: Makes a batch of samples.
        objective: From a batch to scalars by name; `loss` is minimised.
        trained: Its parameters are trained.
        optimizer: Steps on them.
        evaluate: Judges the model on held-out images; its numbers go to metrics.jsonl, and what
            shall outlive a resumption to the record's summary.
        backbone: Says the device and the precision.
        checkpointed: What a checkpoint holds.
        lr: Peak learning rate.
        warmup_epochs: Linear warm-up.
        schedule: Makes the learning rate by step.
        accumulation: Parts of a step's batch.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        after_step: Called with the number of every step done.
    """
    count, device = len(samples.images), backbone.device
    steps = settings.steps or max(round(settings.epochs * count / settings.batch_size), 1)
    record = Record(settings.out, to_dict(settings), samples.images, batch_size=settings.batch_size)
    start = 0
    if settings.resume and (newest := checkpoint.latest(record.checkpoints)):
        start = record.resume(newest, model=checkpointed, optimizer=optimizer, may_change=MAY_CHANGE)
    else:
        record.begin(to_yaml(settings))
    positions = StepSampler(count, settings.batch_size, start, steps, settings.seed, accumulation)
    batches = train_batches(samples, positions, collate, workers=settings.workers, pin_memory=device.type == "cuda")
    warmup = warmup_steps(warmup_epochs, count, settings.batch_size, steps)
    trained.train()
    with memory_errors("choose a smaller --batch_size"):
        done = train(
            objective,
            [parameter for parameter in trained.parameters() if parameter.requires_grad],
            iter(batches),
            optimizer,
            start=start,
            steps=steps,
            seed=settings.seed,
            accumulation=accumulation,
            lr=schedule(lr, warmup=warmup, steps=steps),
            clip_grad=clip_grad,
            autocast=backbone.autocast,
        )
        for step in record.follow(
            done,
            type(settings).__name__.lower(),
            start=start,
            steps=steps,
            log_every=settings.log.log_every,
            evaluations=settings.log.evals,
            evaluate=partial(evaluate, record),
            saves=settings.log.saves,
            model=checkpointed,
            optimizer=optimizer,
        ):
            after_step(step.number)
    if start < steps:
        record.evaluate(steps, partial(evaluate, record))
    return record


def to_device(batch: LabelledBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy images and labels."""
    return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
