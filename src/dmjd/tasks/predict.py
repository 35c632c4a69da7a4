"""`dmjd predict`: predict with a trained network."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from dmjd.backbones.files import load_backbone, task_of
from dmjd.config.common import DeviceSettings
from dmjd.config.downstream import (
    DenseSettings,
    DetectRun,
    DetectSettings,
    SegmentRun,
    SegmentSettings,
    StartSettings,
)
from dmjd.config.predict import PredictSettings
from dmjd.data.single import open_all_or_one
from dmjd.engine.claim import refuse_input, refuse_run
from dmjd.engine.distributed import join_ranks
from dmjd.errors import CheckpointError, ConfigError
from dmjd.evaluation.features import FeatureExtractor
from dmjd.reports.predictions import PredictionTable

DENSE: dict[str, Any] = {"segment": (SegmentSettings, SegmentRun), "detect": (DetectSettings, DetectRun)}


def predict(settings: PredictSettings) -> dict[str, Any] | None:
    """Write the predictions of a trained network for images, and print one line of JSON.

    A classifier writes a table of classes and probabilities; a segmenter or a detector writes the same as
    `dmjd segment --predict` or `dmjd detect --predict`.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the file holds no trained classifier, segmenter or detector.
        ConfigError: If settings are not for this kind of network, or the output would go into a run or among the
            images.
        DataError: If there are no images.
    """
    task = task_of(settings.start.backbone)
    if task.get("name") in DENSE:
        return look_at_pixels(settings, task["name"])
    return classify(settings, task.get("classes"))


def look_at_pixels(settings: PredictSettings, verb: str) -> dict[str, Any] | None:
    """Run a dense verb with `--predict`."""
    if settings.top is not None or settings.format is not None:
        raise ConfigError(f"--top and --format are for classifiers; {settings.start.backbone} is of dmjd {verb}")
    refuse_run(settings.out)
    whole, run = DENSE[verb]
    shared = {each.name: getattr(settings.run, each.name) for each in fields(DeviceSettings) if each.name != "data"}
    looking = whole(
        run=run(out=settings.out, **shared),
        start=StartSettings(backbone=settings.start.backbone),
        dense=DenseSettings(predict=Path(settings.run.data)),
    )
    return getattr(import_module(f"dmjd.tasks.{verb}"), verb)(looking)  # its libraries are an optional extra


def classify(settings: PredictSettings, named: Sequence[str] | None) -> dict[str, Any] | None:
    """Write classes and probabilities as they are computed, image by image."""
    began, run, table_path = time.perf_counter(), settings.run, settings.table
    refuse_run(table_path.parent)
    refuse_input(run.data, [table_path, table_path.with_name("skipped.tsv"), table_path.parent])
    with join_ranks(run.device) as ranks, ExitStack() as stack:
        given = settings.start.backbone
        network: Any = None if given.startswith("timm:") else load_backbone(given).to(ranks.device)
        if network is None or not network.num_classes:
            raise CheckpointError(f"a backbone without a classifier; {given}; run dmjd finetune, or dmjd linear, on it")
        backbone = FeatureExtractor(ranks=ranks, **settings.start.keywords, **run.keywords, pretrained=False)
        backbone.model = network  # with the classifier, which the extractor leaves out
        classes = named or [str(number) for number in range(network.num_classes)]

        def probabilities(images: Tensor) -> Tensor:
            return backbone.logits(images).softmax(dim=1)

        parts = backbone.open(lambda wanted: open_all_or_one(run.data, wanted))
        table = None
        if ranks.is_main:
            rows = PredictionTable(table_path, classes, top=settings.top)
            table = stack.enter_context(closing(rows))
        for images in parts:
            done = 0
            comparable = bool(images.classes) and {*images.classes} <= {*(named or ())}
            for values, seen, end in backbone.stream(probabilities, images, batch_size=run.batch_size):
                if table:
                    table.add(images, values, seen, comparable=comparable)
                    table.skip(images, sorted({*range(done, end)} - {*seen}))
                done = end
        if not table:
            return None
        summary = table.finish() | {"seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(summary))
        return summary
