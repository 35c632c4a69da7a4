"""`dmjd knn`: what a backbone's features are worth without any training."""

import time

from dmjd.config import Knn
from dmjd.evaluation.classification import Result
from dmjd.evaluation.extractor import extractor, labelled
from dmjd.evaluation.features import knn_votes


def knn(settings: Knn) -> None:
    """Classify held-out images by their neighbours among the training images and print one line of JSON.

    Raises:
        CheckpointError: If the backbone does not load.
        DataError: If the images have no labels.
    """
    began = time.perf_counter()
    backbone = extractor(settings)
    sides = []
    for images in labelled(settings, backbone):
        found, seen = backbone.features(images, layers=settings.layers, batch_size=settings.batch_size)
        sides += [found, images.labels_of(seen)]
    bank, bank_labels, queries, labels = sides
    votes = knn_votes(
        bank, bank_labels, queries, k=settings.k, temperature=settings.temperature, num_classes=len(images.classes)
    )
    result = Result(votes, labels, images.classes, {"train_images": len(bank)})
    result.finish(settings, settings.out, time.perf_counter() - began)
