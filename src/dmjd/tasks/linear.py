"""`dmjd linear`: evaluate a frozen backbone's features with a linear classifier."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.config.downstream import LinearSettings
from dmjd.config.rules import flags_of, to_dict, to_yaml
from dmjd.data.labelled import (
    LabelledBatch,
    LabelledSamples,
    collate_labelled,
    labelled_parts,
    to_device,
    training_transform,
)
from dmjd.data.memory import in_memory
from dmjd.data.source import Parts, labels_of
from dmjd.engine.claim import claim, refuse_run
from dmjd.engine.device import memory_errors
from dmjd.engine.distributed import ParallelModel, Ranks, join_ranks
from dmjd.engine.loop import Plan
from dmjd.engine.optim import create_lars
from dmjd.engine.run import Run
from dmjd.engine.trainer import Trainer
from dmjd.errors import ConfigError, DataError
from dmjd.evaluation.classification import ClassificationResult
from dmjd.evaluation.features import FeatureExtractor
from dmjd.evaluation.linear import (
    choose_penalty,
    class_probabilities,
    fit_logistic,
    logistic_head,
    normalized_head,
)
from dmjd.reports.classification import write_classification

CROP_AND_FLIP: Any = {"scale": (0.08, 1.0), "flip": True, "auto_augment": "none", "random_erasing": 0.0}


def linear(settings: LinearSettings) -> dict[str, Any] | None:
    """Fit a linear classifier on frozen features, write the result to `settings.run.out`, print one line of JSON.

    Backbone and classifier are saved as `linear.safetensors` if the features are the backbone's own output.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone does not load, or the run to resume has other settings or images.
        ConfigError: If the backbone has no such layers, `out` holds a run, or a batch has one image per process.
        DataError: If the images have no labels.
    """
    began, run = time.perf_counter(), settings.run
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(run.device))
        if settings.recipe == "paper":
            if ranks.micro_batch(run.batch_size) < 2:
                raise ConfigError(f"batch_size {run.batch_size}: BatchNorm needs two images at a time or more")
            stack.enter_context(claim(run.out, resume=run.resume, ranks=ranks))
        else:
            refuse_run(run.out)
        torch.manual_seed(run.seed)
        backbone = FeatureExtractor(ranks=ranks, **settings.start.keywords, **run.keywords)
        images = backbone.open_images(run.data, seed=run.seed, part=settings.labels.part)
        parts = labelled_parts(images, address=run.data, seed=run.seed, **settings.labels.keywords)
        fit = fit_paper if settings.recipe == "paper" else fit_features
        result = fit(settings, backbone, parts, ranks)
        if result is None:
            return None
        summary = result.summary() | {"part": parts.part, "seconds": round(time.perf_counter() - began, 1)}
        write_classification(run.out, verb="linear", settings=to_yaml(settings), summary=summary, **result.tables)
        print(json.dumps(summary))
        return summary


def fit_features(
    settings: LinearSettings, backbone: FeatureExtractor, parts: Parts, ranks: Ranks
) -> ClassificationResult | None:
    """Fit a logistic regression on features computed once, with the penalty that is best in cross-validation."""
    with memory_errors("choose cpu for --device"):  # --batch_size is for the paper's recipe, so it is no remedy
        (bank, bank_labels), (queries, labels) = backbone.labelled_features(parts, layers=settings.layers)
    if not ranks.is_main:
        return None
    if len(bank_labels.unique()) < 2:
        raise DataError(f"only one class is left to learn; {settings.run.data}; check the files or give more labels")
    penalty = choose_penalty(bank, bank_labels, settings.run.seed)
    classes = parts.train.classes
    probe = fit_logistic(bank, bank_labels, penalty=penalty)
    keep(settings, backbone, logistic_head(probe, len(classes)), classes)
    scores = class_probabilities(probe, queries, len(classes))
    return ClassificationResult(scores, labels, classes, {"penalty": penalty, "train_images": len(bank)})


def fit_paper(
    settings: LinearSettings, backbone: FeatureExtractor, parts: Parts, ranks: Ranks
) -> ClassificationResult | None:
    """Train BatchNorm without affine and a linear layer with LARS on crops and flips, as MAE and the paper do."""
    run, (train, held_out) = settings.run, parts
    features, seen = backbone.features(held_out, layers=settings.layers)  # frozen: once is enough
    classifier = nn.Linear(features.shape[1], len(train.classes))
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    head = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), classifier).to(ranks.device)
    # Not compiled by default: nearly all the time goes into the frozen backbone.
    compiling = {"compile": "off"} if run.compile == "auto" else {}
    model = ParallelModel(head, ranks, **run.training | compiling)
    labels = labels_of(held_out, seen)

    def objective(model: ParallelModel, batch: LabelledBatch) -> dict[str, Tensor]:
        images, targets = to_device(batch, ranks.device)
        with torch.no_grad():
            pooled = backbone.pooled(images, settings.layers, normalized=True)
        return {"loss": F.cross_entropy(model(pooled), targets)}

    def judge() -> ClassificationResult:
        network = model.whole().eval()
        with torch.inference_mode():
            scores = network(features.to(ranks.device)).float().cpu()
        return ClassificationResult(scores, labels, train.classes, {"train_images": len(train)})

    mean, std = backbone.statistics
    transform = training_transform((backbone.in_chans, *backbone.image_hw), mean=mean, std=std, **CROP_AND_FLIP)
    steps = run.num_steps(len(train))
    trainer = Trainer(
        Run(to_dict(settings), train, ranks=ranks, held_out=len(held_out), defaults=flags_of(type(settings))),
        model,
        create_lars(classifier, settings.lr),
        Plan(steps=steps, lr=settings.lr, warmup_epochs=settings.warmup_epochs, **run.plan, **settings.log.plan),
        autocast=backbone.autocast,
    )
    trainer.begin(resume=run.resume)
    trainer.fit(
        LabelledSamples(in_memory(train), transform, run.seed),
        collate_labelled,
        objective,
        lambda step: {"top1": judge().summary()["top1"]},
    )
    with model.plainly():
        result = judge()
    trained = cast("nn.Sequential", model.whole())  # all ranks have to call this, to gather the weights
    if ranks.is_main:
        keep(settings, backbone, normalized_head(*trained), train.classes)
    return result if ranks.is_main else None


def keep(settings: LinearSettings, backbone: FeatureExtractor, head: nn.Linear, classes: Sequence[str]) -> None:
    """Save backbone and classifier as one timm model, `linear.safetensors`, in the same format as fine-tuning."""
    network: Any = backbone.model
    network.reset_classifier(len(classes))
    place = network.get_classifier()
    if settings.layers or not isinstance(place, nn.Linear) or place.weight.shape != head.weight.shape:
        what = "features of --layers" if settings.layers else "this backbone's features"
        print(f"no linear.safetensors: {what} are not the input of the network's head", file=sys.stderr)
        return
    place.load_state_dict(head.state_dict())
    settings.run.out.mkdir(parents=True, exist_ok=True)
    name, arguments = backbone.architecture
    with_head = (name, {**arguments, "num_classes": len(classes)})
    backbone.save_classifier(settings.run.out / "linear.safetensors", network, with_head, classes)
