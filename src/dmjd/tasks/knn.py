"""`dmjd knn`: what a backbone's features are worth without any training."""

import json
import time

from dmjd.config import Knn
from dmjd.data import sources
from dmjd.engine.metrics import knn_top1
from dmjd.errors import DataError
from dmjd.tasks.backbone import Extractor


def knn(settings: Knn) -> None:
    """Classify held-out images by their neighbours among the training images and print one line of JSON.

    Raises:
        CheckpointError: If the backbone does not load.
        DataError: If the images have no labels.
    """
    began = time.perf_counter()
    extractor = Extractor(settings)
    parts = sources.load(settings.data, in_chans=extractor.in_chans, image_hw=extractor.image_hw, seed=settings.seed)
    if parts.train.labels is None or parts.held_out.labels is None:
        raise DataError(f"no labels; {settings.data}; k-NN wants PART/CLASS/IMAGE or CLASS/IMAGE")
    unknown = parts.held_out.classes[len(parts.train.classes) :]
    if unknown:
        raise DataError(f"held-out classes without training images: {', '.join(unknown)}; {settings.data}; add some")
    sides = []
    for images in parts:
        found, seen = extractor.features(images)
        sides += [found, images.labels_of(seen)]
    top1 = knn_top1(*sides, k=settings.k, temperature=settings.temperature)
    print(
        json.dumps({"top1": round(top1, 4), "images": len(sides[2]), "seconds": round(time.perf_counter() - began, 1)})
    )
