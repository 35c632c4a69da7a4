"""`dmjd knn`: evaluate a backbone's features without any training."""

import json
import time
from typing import Any

import torch

from dmjd.config.downstream import KnnSettings
from dmjd.config.rules import to_yaml
from dmjd.data.labelled import labelled_parts
from dmjd.engine.claim import refuse_run
from dmjd.engine.distributed import join_ranks
from dmjd.evaluation.classification import ClassificationResult
from dmjd.evaluation.features import FeatureExtractor
from dmjd.evaluation.knn import knn_votes
from dmjd.evaluation.rank import rankme
from dmjd.reports.classification import write_classification


def knn(settings: KnnSettings) -> dict[str, Any] | None:
    """Classify held-out images by their neighbours among the training images and print one line of JSON.

    Its `rankme` is the effective number of directions that the features of the held-out images span.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone does not load.
        ConfigError: If `out` holds a run.
        DataError: If the images have no labels.
    """
    began, run = time.perf_counter(), settings.run
    if settings.out is not None:
        refuse_run(settings.out)
    with join_ranks(run.device) as ranks:
        torch.manual_seed(settings.seed)
        backbone = FeatureExtractor(ranks=ranks, **settings.start.keywords, **run.keywords)
        images = backbone.open_images(run.data, seed=settings.seed, part=settings.labels.part)
        parts = labelled_parts(images, address=run.data, seed=settings.seed)
        (bank, bank_labels), (queries, labels) = backbone.labelled_features(
            parts, layers=settings.layers, batch_size=run.batch_size
        )
        if not ranks.is_main:
            return None
        classes = parts.held_out.classes
        votes = knn_votes(
            bank, bank_labels, queries, k=settings.k, temperature=settings.temperature, num_classes=len(classes)
        )
        facts = {"train_images": len(bank), "rankme": round(rankme(queries), 2)}
        result = ClassificationResult(votes, labels, classes, facts)
        summary = result.summary() | {"part": parts.part, "seconds": round(time.perf_counter() - began, 1)}
        if settings.out is not None:
            write_classification(settings.out, verb="knn", settings=to_yaml(settings), summary=summary, **result.tables)
        print(json.dumps(summary))
        return summary
