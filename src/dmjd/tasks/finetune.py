"""`dmjd finetune`: train a backbone and a classifier on labelled images."""

from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.files import put_head, save_backbone
from dmjd.config import Finetune
from dmjd.data.loader import LabelledBatch, collate_labelled
from dmjd.engine.optim import create_optimizer
from dmjd.engine.run import Record, refuse_second_run
from dmjd.errors import ConfigError
from dmjd.evaluation.classification import Result
from dmjd.evaluation.extractor import FeatureExtractor, labelled
from dmjd.tasks.supervised import labelled_samples, supervise, to_device, training_transform


def finetune(settings: Finetune) -> None:
    """Train, keep the best and the last network as `best.safetensors` and `last.safetensors`, print one line of JSON.

    Raises:
        CheckpointError: If the backbone does not load, or the run to resume is another one.
        ConfigError: If settings do not go together.
        DataError: If the images have no labels.
        NonFiniteError: If a loss is no number.
        SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
    """
    refuse_second_run(settings.out, resume=settings.resume)
    torch.manual_seed(settings.seed)
    backbone = FeatureExtractor(
        settings, settings.backbone, pretrained=not settings.untrained, drop_path_rate=settings.drop_path
    )
    train, held_out = labelled(settings, backbone)
    model, architecture = put_head(backbone.model, backbone.architecture, len(train.classes))
    model.to(backbone.device)
    optim = settings.optim
    try:
        optimizer = create_optimizer(
            model,
            name=optim.name,
            lr=settings.lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            layer_decay=settings.layer_decay,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    ema = ModelEmaV3(model, decay=settings.ema) if settings.ema else None
    judged = ema.module if ema else model
    loss = Loss(settings, len(train.classes))
    result: Result | None = None

    def objective(batch: LabelledBatch) -> dict[str, Tensor]:
        images, labels = to_device(batch, backbone.device)
        return {"loss": loss(model, images, labels)}

    def evaluate(record: Record) -> dict[str, float]:
        nonlocal result
        judged.eval()
        backbone.model = judged
        scores, seen = backbone.features(held_out)
        model.train()
        result = Result(scores, held_out.labels_of(seen), train.classes)
        top1 = result.summary()["top1"]
        if top1 > record.summary.get("best_top1", -1.0):
            record.summary["best_top1"] = top1
            save_backbone(settings.out / "best.safetensors", judged, architecture, *backbone.statistics)
        return {"top1": top1}

    def after_step(step: int) -> None:
        if ema:
            ema.update(model, step=step)

    record = supervise(
        settings,
        labelled_samples(train, training_transform(backbone, settings.augment), settings.seed),
        collate_labelled,
        objective,
        model,
        optimizer,
        evaluate,
        backbone=backbone,
        checkpointed=nn.ModuleDict({"model": model, "ema": judged}) if ema else model,
        lr=settings.lr,
        warmup_epochs=optim.warmup_epochs,
        accumulation=optim.accumulation,
        clip_grad=optim.clip_grad,
        after_step=after_step,
    )
    if result is None:  # a run that was done before
        evaluate(record)
    assert result is not None
    save_backbone(settings.out / "last.safetensors", judged, architecture, *backbone.statistics)
    result.facts = {"best_top1": record.summary["best_top1"], "train_images": len(train)}
    result.finish(settings, settings.out, record.seconds)


class Loss:
    """Cross-entropy with smoothed labels, on images that timm's mixup and cutmix blend if they are wanted."""

    def __init__(self, settings: Finetune, num_classes: int):
        augment = settings.augment
        self.smoothing = augment.label_smoothing
        self.blend: Any = None
        if augment.mixup or augment.cutmix:
            if settings.batch_size // settings.optim.accumulation % 2:
                raise ConfigError(f"batch_size {settings.batch_size}: mixup and cutmix blend pairs; choose an even one")
            self.blend = Mixup(augment.mixup, augment.cutmix, label_smoothing=self.smoothing, num_classes=num_classes)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch."""
        if self.blend is None:
            return F.cross_entropy(model(images), labels, label_smoothing=self.smoothing)
        # timm draws from NumPy's generator; the loop has set torch's to this step.
        np.random.seed(int(torch.randint(2**31, ())))  # noqa: NPY002
        images, shares = self.blend(images, labels)
        return F.cross_entropy(model(images), shares)
