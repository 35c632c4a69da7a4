"""`dmjd search`: find similar images and near-duplicates by the features that `dmjd embed` wrote."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from dmjd.config.search import SearchSettings
from dmjd.data.decode import Wanted
from dmjd.data.levels import Levels
from dmjd.data.single import open_all_or_one
from dmjd.data.source import open_all
from dmjd.engine.checkpoint import sha256
from dmjd.engine.claim import refuse_input
from dmjd.engine.distributed import Ranks, join_ranks
from dmjd.errors import CheckpointError, ConfigError
from dmjd.evaluation.feature_file import FeatureBank, read_features
from dmjd.evaluation.features import FeatureExtractor
from dmjd.evaluation.neighbours import groups_of, near_pairs, nearest
from dmjd.reports.search import Album, write_duplicates, write_neighbours


def search(settings: SearchSettings) -> dict[str, Any] | None:
    """Write the nearest neighbours of each query, or the near-duplicates, and a page; print one line of JSON.

    Returns:
        The results, on rank 0.

    Raises:
        CheckpointError: If the backbone does not load, or is not the one that computed the features.
        ConfigError: If the backbone is not known, there are too many duplicates, or an input would be overwritten.
        DataError: If there are no features, or no queries.
    """
    began = time.perf_counter()
    table = settings.out / ("duplicates.csv" if settings.duplicates else "neighbours.csv")
    for read in filter(None, (str(settings.features), settings.query)):
        refuse_input(read, [table])
    with join_ranks(settings.run.device) as ranks:
        bank = read_features(settings.features)
        summary = find_duplicates(settings, bank, ranks) if settings.duplicates else find_nearest(settings, bank, ranks)
        if not ranks.is_main:
            return None
        summary |= {"seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(summary))
        return summary


def find_nearest(settings: SearchSettings, bank: FeatureBank, ranks: Ranks) -> dict[str, Any]:
    """Compute the features of the queries on all ranks, and find their neighbours."""
    run = settings.run
    backbone, album = backbone_of(settings, bank, ranks), album_of(settings, bank)
    layers = tuple(bank.record.get("layers", ()))
    queries = backbone.open(lambda wanted: open_all_or_one(str(settings.query), wanted))
    found, shown, skipped = [], [], 0
    for images in queries:
        features, seen = backbone.features(images, layers=layers, batch_size=run.batch_size)
        found.append(features)
        shown += [(images, index) for index in seen]
        skipped += len(images) - len(seen)
    features = torch.cat(found)
    if features.shape[1] != bank.rows.shape[1]:
        what = f"features of width {bank.rows.shape[1]}, and of the queries {features.shape[1]}"
        raise ConfigError(f"{what}; {settings.features}; give the --backbone that computed them")
    if not ranks.is_main:
        return {}
    similar, rows = nearest(bank.rows, features, k=settings.k, device=ranks.device)
    write_neighbours(settings.out, shown, rows, similar, album)
    return {"queries": len(shown), "skipped": skipped, "images": len(bank.rows), "out": str(settings.out)}


def find_duplicates(settings: SearchSettings, bank: FeatureBank, ranks: Ranks) -> dict[str, Any]:
    """Compare all images with all others, on rank 0."""
    if not ranks.is_main:
        return {}
    album = album_of(settings, bank)
    pairs, similar = near_pairs(bank.rows, threshold=settings.threshold, device=ranks.device)
    groups = groups_of(pairs, len(bank.rows))
    write_duplicates(settings.out, groups, pairs, similar, album)
    return {"pairs": len(pairs), "groups": len(groups), "images": len(bank.rows), "out": str(settings.out)}


def backbone_of(settings: SearchSettings, bank: FeatureBank, ranks: Ranks) -> FeatureExtractor:
    """Open the backbone that computed the features.

    Raises:
        CheckpointError: If the file has changed since.
        ConfigError: If the backbone is not known.
    """
    name = settings.backbone or bank.record.get("backbone")
    if name is None:
        raise ConfigError(f"the backbone of the features is not known; {settings.features}; give --backbone")
    made_by = bank.record.get("backbone_sha256")
    if made_by and Path(name).is_file() and sha256(Path(name)) != made_by:
        raise CheckpointError(f"another backbone computed the features; {name}; give that one, or embed again")
    images = {name: value for name, value in settings.run.keywords.items() if value is not None}
    ranged = bank.record.get("value_range")
    known = {"value_range": ranged if ranged != [0.0, 255.0] else None, "pages": bank.record.get("data_pages")}
    return FeatureExtractor(name=name, ranks=ranks, **{**known, **images})


def album_of(settings: SearchSettings, bank: FeatureBank) -> Album:
    """Open the images that the features belong to."""
    record, run = bank.record, settings.run
    levels = Levels(*(run.data_range or record.get("value_range") or (0.0, 255.0)))
    wanted = Wanted(record.get("in_chans", 3), levels=levels, pages=run.data_pages or record.get("data_pages"))
    data = run.data or record.get("data")
    return Album(bank.names, open_all(data, wanted) if data else [])
