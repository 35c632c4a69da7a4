"""`dmjd finetune`: train a backbone and a classifier on labelled images."""

import json
import sys
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.files import put_head
from dmjd.config.downstream import AugmentSettings, FinetuneSettings
from dmjd.config.rules import flags_of, to_dict, to_yaml
from dmjd.data.labelled import (
    LabelledBatch,
    LabelledSamples,
    TrainingTransform,
    collate_labelled,
    is_picture,
    labelled_parts,
    to_device,
    training_transform,
)
from dmjd.data.memory import in_memory
from dmjd.data.source import Parts, labels_of, sample
from dmjd.engine.claim import claim
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.errors import ConfigError
from dmjd.evaluation.classification import ClassificationResult
from dmjd.evaluation.features import FeatureExtractor
from dmjd.random import seeded
from dmjd.reports.classification import write_classification


def finetune(settings: FinetuneSettings) -> dict[str, Any] | None:
    """Train, save the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone does not load, or the run to resume has other settings or images.
        ConfigError: If settings are incompatible.
        DataError: If the images have no labels.
        NonFiniteError: If a loss is not finite.
        Stopped: After a signal that stops runs.
    """
    run = settings.run
    with join_ranks(run.device) as ranks, claim(run.out, resume=run.resume, ranks=ranks):
        ranks.micro_batch(run.batch_size, settings.optim.accumulation)
        torch.manual_seed(run.seed)
        backbone = FeatureExtractor(
            ranks=ranks, **settings.start.keywords, **run.keywords, drop_path_rate=settings.tuning.drop_path
        )
        images = backbone.open_images(run.data, seed=run.seed, part=settings.labels.part)
        parts = labelled_parts(images, address=run.data, seed=run.seed, **settings.labels.keywords)
        trainer, result = fit(settings, backbone, parts, ranks)
        if not ranks.is_main:
            return None
        result.facts = {"best_top1": trainer.run.summary["best_top1"], "train_images": len(parts.train)}
        summary = result.summary() | {"part": parts.part, "seconds": round(trainer.run.seconds, 1)}
        write_classification(run.out, verb="finetune", settings=to_yaml(settings), summary=summary, **result.tables)
        print(json.dumps(summary))
        return summary


def fit(
    settings: FinetuneSettings, backbone: FeatureExtractor, parts: Parts, ranks: Ranks
) -> tuple[Trainer, ClassificationResult]:
    """Train the backbone with a new head; returns the trainer and the last result on the held-out images."""
    run, optim, (train, held_out) = settings.run, settings.optim, parts
    network, architecture = put_head(backbone.model, backbone.architecture, len(train.classes))
    network.to(ranks.device)
    ema = ModelEmaV3(network, decay=settings.ema) if settings.ema else None
    model = ParallelModel(network, ranks, **run.training)
    loss = Loss(settings, len(train.classes), ranks.micro_batch(run.batch_size, optim.accumulation))
    result: ClassificationResult | None = None

    def objective(model: ParallelModel, batch: LabelledBatch) -> dict[str, Tensor]:
        return {"loss": loss(model, *to_device(batch, ranks.device))}

    def judged() -> nn.Module:
        return (ema.module if ema else model.whole()).eval()

    def evaluate(step: int) -> dict[str, float]:
        nonlocal result
        backbone.model = judged()
        scores, seen = backbone.see_all(backbone.logits, held_out)
        result = ClassificationResult(scores, labels_of(held_out, seen), train.classes)
        return {"top1": result.summary()["top1"]}

    def keep(name: str) -> None:
        best = judged()
        if ranks.is_main:
            backbone.save_classifier(run.out / name, best, architecture, train.classes)

    def after_step(step: int) -> None:
        if ema:
            ema.update(model.whole(), step=step)

    steps = run.num_steps(len(train))
    trainer = Trainer(
        Run(to_dict(settings), train, ranks=ranks, held_out=len(held_out), defaults=flags_of(type(settings))),
        model,
        create_optimizer(network, lr=settings.lr, layer_decay=settings.tuning.layer_decay, **optim.keywords),
        Plan(steps=steps, lr=settings.lr, **run.plan, **settings.log.plan, **optim.plan),
        autocast=backbone.autocast,
        checkpointed=nn.ModuleDict({"model": network, "ema": ema.module}) if ema else None,
    )
    trainer.begin(resume=run.resume)
    if ranks.is_main and settings.augment.auto_augment != "none" and not all(map(is_picture, sample(train, 16))):
        why = "more than 8 bits, or other channels than 1 or 3"
        print(f"warning: no RandAugment for images of {why}; {run.data}; see --augment.auto_augment", file=sys.stderr)
    samples = LabelledSamples(in_memory(train), augmentation(settings.augment, backbone), run.seed)
    trainer.fit(samples, collate_labelled, objective, evaluate, keep=keep, after_step=after_step)
    assert result is not None
    return trainer, result


def augmentation(augment: AugmentSettings, backbone: FeatureExtractor) -> TrainingTransform:
    """Make the augmentation in the settings, for the inputs of a backbone."""
    mean, std = backbone.statistics
    return training_transform(
        (backbone.in_chans, *backbone.image_hw),
        mean=mean,
        std=std,
        scale=augment.scale,
        flip=augment.flip,
        auto_augment=augment.auto_augment,
        random_erasing=augment.random_erasing,
    )


class Loss:
    """Cross-entropy with label smoothing, on images blended by timm's mixup and cutmix if these are on."""

    def __init__(self, settings: FinetuneSettings, num_classes: int, micro_batch: int):
        augment = settings.augment
        self.smoothing = augment.label_smoothing
        self.blend: Any = None
        if augment.mixup or augment.cutmix:
            if micro_batch % 2:
                raise ConfigError(f"mixup and cutmix need an even number; {micro_batch} at a time; see --batch_size")
            self.blend = Mixup(augment.mixup, augment.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)

    def __call__(self, model: ParallelModel, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch."""
        if self.blend is None:
            return F.cross_entropy(model(images), labels, label_smoothing=self.smoothing)
        with seeded(int(torch.randint(2**31, ()))):  # timm draws from NumPy's generator; torch's is that of this step
            images, shares = self.blend(images, labels)
        return F.cross_entropy(model(images), shares)
