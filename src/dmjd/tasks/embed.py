"""`dmjd embed`: features of images as a matrix."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmjd.config.downstream import EmbedSettings
from dmjd.data.source import Source, fingerprint, has_labels, none_decodes, open_all
from dmjd.engine.checkpoint import sha256
from dmjd.engine.claim import refuse_input
from dmjd.engine.distributed import join_ranks
from dmjd.evaluation.feature_file import FeatureWriter, feature_files
from dmjd.evaluation.features import FeatureExtractor


def embed(settings: EmbedSettings) -> dict[str, Any] | None:
    """Write features (N, D), or (N, L, D) of patches, to `settings.out`, and path and label row by row beside it.

    All images are embedded, from all parts of a set; labels are written for sets that have them. Files that do not
    decode are left out of both and counted in the final line.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone does not load, or the files to continue are from a run with other settings.
        ConfigError: If the backbone has no such layers, `out` is among the images, or another process is writing it.
        DataError: If there are no images, or none decodes.
    """
    began, run = time.perf_counter(), settings.run
    refuse_input(run.data, [*feature_files(settings.out), settings.out.parent])
    with join_ranks(run.device) as ranks, ExitStack() as stack:
        torch.manual_seed(0)
        backbone = FeatureExtractor(ranks=ranks, **settings.start.keywords, **run.keywords)
        parts = backbone.open(lambda wanted: open_all(run.data, wanted))
        columns = ["path", "label"] if any(map(has_labels, parts)) else ["path"]
        writer = FeatureWriter(settings.out, origin(settings, backbone, parts), columns=columns, dtype=settings.dtype)
        stack.enter_context(closing(writer))
        first, start = ranks.on_main(partial(writer.begin, resume=settings.resume))
        see = partial(backbone.tokens if settings.tokens else backbone.pooled, layers=settings.layers)
        for number, images in enumerate(parts[first:], first):
            done = start if number == first else 0
            for values, seen, end in backbone.stream(see, images, batch_size=run.batch_size, start=done):
                if ranks.is_main:
                    rows = None if values is None else values.numpy()
                    skipped = end - done - len(seen)
                    writer.append(rows, [cells(images, index) for index in seen], skipped, (number, end))
                done = end
        ranks.on_main(partial(finish, writer, parts[0]))
        if not ranks.is_main:
            return None
        said = {"images": writer.rows, "skipped": writer.skipped, "out": str(writer.out)}
        summary = said | {"seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(summary))
        return summary


def origin(settings: EmbedSettings, backbone: FeatureExtractor, parts: Sequence[Source]) -> dict[str, Any]:
    """Describe the origin of the features, for `dmjd search` and for a run that is resumed."""
    run, file = settings.run, Path(settings.start.backbone)
    return {
        "backbone": settings.start.backbone,
        "backbone_sha256": sha256(file) if file.is_file() else None,
        "layers": list(settings.layers),
        "tokens": settings.tokens,
        "dtype": settings.dtype,
        "data": run.data,
        "data_pages": run.data_pages,
        "in_chans": backbone.in_chans,
        "value_range": list(backbone.value_range),
        "names_sha256": [fingerprint(part) for part in parts],
        "batch_size": run.batch_size,
        "processes": backbone.ranks.world_size,
    }


def cells(images: Source, index: int) -> list[str]:
    """Return the name of an image, and its class if it has one."""
    label = images.label(index)
    return [images.name(index), *([] if label is None else [images.classes[label]])]


def finish(writer: FeatureWriter, images: Source) -> None:
    """Give the files their final names.

    Raises:
        DataError: If they are empty; it says why the first image does not decode.
    """
    if not writer.rows:
        writer.discard()
        raise none_decodes(images, 0, writer.skipped)
    writer.finish()
