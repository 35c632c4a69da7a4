"""`dmjd linear`: what a frozen backbone's features are worth to a linear classifier."""

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dmjd.config import Augment, Linear
from dmjd.data.loader import LabelledBatch, collate_labelled
from dmjd.data.source import Parts, few_labels
from dmjd.engine.optim import create_lars
from dmjd.engine.run import refuse_second_run
from dmjd.errors import DataError
from dmjd.evaluation.classification import Result
from dmjd.evaluation.extractor import FeatureExtractor, extractor, labelled
from dmjd.evaluation.features import logistic_regression
from dmjd.tasks.supervised import labelled_samples, supervise, to_device, training_transform

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
FITTED = 0.8  # share of the training images that a penalty is fitted on; the others choose it
# The paper's probe: crop and flip only.
CROP_AND_FLIP = Augment(auto_augment="none", random_erasing=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)


def linear(settings: Linear) -> None:
    """Fit a linear classifier on frozen features, write the result to `settings.out`, print one line of JSON.

    Raises:
        CheckpointError: If the backbone does not load, or the run to resume is another one.
        ConfigError: If the backbone has no such layers.
        DataError: If the images have no labels.
    """
    began = time.perf_counter()
    if settings.recipe == "paper":
        refuse_second_run(settings.out, resume=settings.resume)
    backbone = extractor(settings)
    parts = labelled(settings, backbone)
    result = (paper if settings.recipe == "paper" else sweep)(settings, backbone, parts)
    result.finish(settings, settings.out, time.perf_counter() - began)


def sweep(settings: Linear, backbone: FeatureExtractor, parts: Parts) -> Result:
    """Fit logistic regressions on features computed once, with the penalty that does best on a slice of them."""
    sides = []
    for images in parts:
        found, seen = backbone.features(images, layers=settings.layers)
        sides += [found, images.labels_of(seen)]
    bank, bank_labels, queries, labels = sides
    if len(bank_labels.unique()) < 2:
        raise DataError(f"only one class is left to learn; {settings.data}; check the files or give more labels")
    penalty = choose_penalty(bank, bank_labels, settings.seed)
    num_classes = len(parts.train.classes)
    scores = logistic_regression(bank, bank_labels, queries, num_classes=num_classes, penalty=penalty)
    return Result(scores, labels, parts.train.classes, {"penalty": penalty, "train_images": len(bank)})


def choose_penalty(bank: Tensor, labels: Tensor, seed: int) -> float:
    """Choose the penalty by the accuracy on a slice of the training images, stratified, that is not fitted.

    The larger of two that do equally well; 1 where no image can be spared.
    """
    fitted = torch.zeros(len(labels), dtype=torch.bool)
    fitted[few_labels(labels.tolist(), seed, fraction=FITTED)] = True
    if fitted.all():
        return 1.0
    num_classes, right = int(labels.max()) + 1, []
    for penalty in tqdm(PENALTIES, desc="penalties", leave=False, disable=None):
        scores = logistic_regression(
            bank[fitted], labels[fitted], bank[~fitted], num_classes=num_classes, penalty=penalty
        )
        right.append(int((scores.argmax(dim=1) == labels[~fitted]).sum()))
    return max(zip(right, PENALTIES, strict=True))[1]


def paper(settings: Linear, backbone: FeatureExtractor, parts: Parts) -> Result:
    """Train BatchNorm without affine and a linear layer by LARS on crops and flips, as MAE and the paper do."""
    train, held_out = parts
    found, seen = backbone.features(held_out, layers=settings.layers)  # frozen: once is enough
    classifier = nn.Linear(found.shape[1], len(train.classes))
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    head = nn.Sequential(nn.BatchNorm1d(found.shape[1], affine=False, eps=1e-6), classifier).to(backbone.device)
    labels = held_out.labels_of(seen)

    def objective(batch: LabelledBatch) -> dict[str, Tensor]:
        images, targets = to_device(batch, backbone.device)
        with torch.no_grad():
            features = backbone.pooled(images, settings.layers, normalized=True)
        return {"loss": F.cross_entropy(head(features), targets)}

    def judge() -> Result:
        head.eval()
        with torch.inference_mode():
            scores = head(found.to(backbone.device)).float().cpu()
        head.train()
        return Result(scores, labels, train.classes, {"train_images": len(train)})

    supervise(
        settings,
        labelled_samples(train, training_transform(backbone, CROP_AND_FLIP), settings.seed),
        collate_labelled,
        objective,
        head,
        create_lars(classifier, settings.lr),
        lambda record: {"top1": judge().summary()["top1"]},
        backbone=backbone,
        checkpointed=head,
        lr=settings.lr,
        warmup_epochs=settings.warmup_epochs,
    )
    return judge()
