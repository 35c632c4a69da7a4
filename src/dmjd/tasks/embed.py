"""`dmjd embed`: features of images as a matrix."""

import csv
import json
import time

import numpy as np
import torch

from dmjd.config.downstream import EmbedSettings
from dmjd.data.cells import plain_cell
from dmjd.data.source import open_all
from dmjd.engine.distributed import join_ranks
from dmjd.evaluation.features import FeatureExtractor


def embed(settings: EmbedSettings) -> None:
    """Write features (N, D), float32, to `settings.out` and `path,label` row by row to the .csv beside it.

    All images of a folder are embedded, whatever its parts; the label is there for class folders. Files that do not
    decode are left out of both and named in the closing line's count.

    Raises:
        CheckpointError: If the backbone does not load.
        DataError: If there are no images, or none decodes.
    """
    began, run = time.perf_counter(), settings.run
    with join_ranks(run.device) as ranks:
        torch.manual_seed(0)
        backbone = FeatureExtractor(ranks=ranks, **settings.start.keywords, **run.keywords)
        matrices, rows = [], []
        skipped = 0
        for images in backbone.open(lambda wanted: open_all(run.data, wanted)):
            found, seen = backbone.features(images, batch_size=run.batch_size)
            matrices.append(found.numpy())
            skipped += len(images) - len(seen)
            for index in seen:
                number = images.label(index)
                cells = [images.name(index), *([] if number is None else [images.classes[number]])]
                rows.append([*map(plain_cell, cells)])
        if not ranks.is_main:
            return
        out = settings.out if settings.out.suffix == ".npy" else settings.out.with_name(f"{settings.out.name}.npy")
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, np.concatenate(matrices))
        with out.with_suffix(".csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"] if any(len(row) > 1 for row in rows) else ["path"])
            writer.writerows(rows)
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({"images": len(rows), "skipped": skipped, "out": str(out), "seconds": seconds}))
