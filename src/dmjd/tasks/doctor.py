"""`dmjd doctor`: examine a set of images and advise what to do with it, or check that a run or backbone is intact."""

import json
import math
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmjd.config.common import RunSettings
from dmjd.config.doctor import DoctorSettings
from dmjd.data.checkup import Copies, Look, chosen, find_copies, look_at, measure_speed, measure_values, open_as_most
from dmjd.data.decode import Wanted
from dmjd.data.folder import ignored_files
from dmjd.data.loader import spare_cores
from dmjd.data.memory import MEMORY_LIMIT
from dmjd.data.prepared import SET, verify
from dmjd.data.source import Source, has_labels
from dmjd.engine.checkpoint import write_atomically
from dmjd.engine.integrity import examine_backbone, examine_checkpoint, examine_run, is_checkpoint, is_run
from dmjd.engine.run import one_cell
from dmjd.errors import DataError
from dmjd.reports.doctor import write_checkup

LONG = 5  # ratio of the sides above which most of an image is outside every crop
SLOW = 0.5  # share of a sample's time spent on decoding above which a prepared set pays off
ON_ONE_LINE = ("images", "looked_at", "broken", "refused", "equal", "near_pairs", "leaked", "command", "seconds")


def doctor(settings: DoctorSettings) -> dict[str, Any]:
    """Examine `settings.data` and print one line of JSON; for a set of images, also write the folder `settings.out`.

    Returns:
        The findings.

    Raises:
        CheckpointError: If a run, a checkpoint or a backbone is broken.
        DataError: If there are no images, none decodes, or a file of a prepared set has changed.
    """
    path = Path(settings.data)
    if path.suffix == ".safetensors":
        found = examine_backbone(path)
    elif is_checkpoint(path):
        found = examine_checkpoint(path)
    elif is_run(path):
        found = examine_run(path)
    else:
        found = examine_set(settings)
    print(json.dumps(found))
    return found


def examine_set(settings: DoctorSettings) -> dict[str, Any]:
    """Examine a set of images, write the findings to `settings.out` and return the most important ones."""
    began, data, out = time.perf_counter(), settings.data, settings.out
    if (Path(data) / SET).is_file():
        verify(Path(data))
    parts, wanted = open_as_most(data, settings.in_chans, settings.data_pages, look=True)
    if wanted.pages != settings.data_pages:
        what = "most files have several pages, read here as separate images"
        print(f"warning: {what}; {data}; say --data_pages bands (channels of one image) or frames", file=sys.stderr)
    looks = look_at(parts, chosen(parts, settings.max_images, settings.seed), settings.workers)
    good = [each for each in looks if not each.fault]
    if not good:
        raise DataError(f"none of {len(looks)} images can be used ({looks[0].fault}); {data}; give other files")
    copies = find_copies(good)
    found = {
        "data": data,
        **describe_files(data, parts, looks),
        **describe_images(good),
        **describe_copies(good, copies),
    }
    try:
        values = measure_values(parts, good)
        found |= {"mean": values.statistics.mean, "std": values.statistics.std}
        found |= {"value_range": [values.statistics.levels.low, values.statistics.levels.high], "filled": values.filled}
    except DataError:  # all values are the same
        values = None
    found |= advise(found, wanted, parts, good, settings)
    found["seconds"] = round(time.perf_counter() - began, 1)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "summary.json", json.dumps(found, indent=1))
    if values:
        values.statistics.write(out / "statistics.json")
    write_tables(out, looks, good, copies)
    page = write_checkup(out, found, parts, looks, copies, values)
    return {name: found[name] for name in ON_ONE_LINE} | {"out": str(page)}


# -- what there is -----------------------------------------------------------------------------------------------------


def describe_files(data: str, parts: Mapping[str, Source], looks: Sequence[Look]) -> dict[str, Any]:
    """Count the images of a set and describe their files; headers, sizes and faults are those of the sample."""
    endings = Counter(
        Path(source.name(index)).suffix.partition("#")[0].lower() or "none"
        for source in parts.values()
        for index in range(len(source))
    )
    sizes = [each.file_bytes for each in looks if each.file_bytes is not None]
    seen = [each.header for each in looks if each.header]
    faulty = [each for each in looks if each.fault]
    # In a file that is read as frames, every page has the header of the file.
    paged = {
        (each.part, re.sub(r"#\d+$", "", each.name)): each.header.pages
        for each in looks
        if each.header and each.header.pages > 1
    }
    return {
        "images": sum(map(len, parts.values())),
        "looked_at": len(looks),
        "parts": {name or "all": len(source) for name, source in parts.items()},
        "labels": {name or "all": labels_of_part(source) for name, source in parts.items() if has_labels(source)},
        "formats": dict(endings.most_common()),
        "passed_over": ignored_files(data),
        "file_bytes": spread(sizes),
        "channels": dict(Counter(each.channels for each in seen).most_common()),
        "depths": dict(Counter(each.dtype for each in seen).most_common()),
        "turned": sum(each.turned > 1 for each in seen),
        "pages": dict(Counter(paged.values()).most_common()),
        "broken": sum(each.broken for each in faulty),
        "refused": sum(not each.broken for each in faulty),
        "reasons": dict(Counter(each.fault for each in faulty).most_common(20)),
    }


def labels_of_part(source: Source) -> dict[str, int]:
    """Count the images of every class, in the order of the classes."""
    counts = Counter(source.label(index) for index in range(len(source)))
    return {name: counts[number] for number, name in enumerate(source.classes)}


def describe_images(good: Sequence[Look]) -> dict[str, Any]:
    """Measure the images that decode."""
    heights, widths = ([each.shape[place] for each in good] for place in (1, 2))
    long = sum(max(each.shape[1:]) > LONG * min(each.shape[1:]) for each in good)
    return {
        "heights": spread(heights),
        "widths": spread(widths),
        "long": long,
        "flat": sum(each.outline is None for each in good),
        "types": dict(Counter(each.dtype for each in good).most_common()),
    }


def describe_copies(good: Sequence[Look], copies: Copies) -> dict[str, Any]:
    """Count the images that occur more than once."""
    return {
        "equal": sum(len(group) - 1 for group in copies.exact),
        "near_pairs": len(copies.near),
        "leaked": len({held_out for held_out, _ in copies.leaked}),
        "held_out": sum(each.part not in ("", "train") for each in good),
    }


def spread(numbers: Sequence[int]) -> dict[str, int]:
    """Compute minimum, median and maximum of some numbers; empty if there are none."""
    if not numbers:
        return {}
    return {"min": min(numbers), "median": int(np.median(numbers)), "max": max(numbers)}


# -- what to do --------------------------------------------------------------------------------------------------------


def advise(
    found: Mapping[str, Any],
    wanted: Wanted,
    parts: Mapping[str, Source],
    good: Sequence[Look],
    settings: DoctorSettings,
) -> dict[str, Any]:
    """Choose suitable settings, and a command with those that `--preset auto` cannot find out by itself.

    For that, it measures how fast images can be read. What pages are, only the user knows: no command guesses it.
    """
    short = int(np.median([min(each.shape[1:]) for each in good]))
    size, patch = fitting_size(short)
    speed = measure_speed(parts, good, size)
    share = speed.decode / max(speed.decode + speed.crop, 1e-9)
    largest = max(int(np.prod(each.shape)) * np.dtype(each.dtype).itemsize for each in good)
    ready = all(source.in_memory for source in parts.values()) or largest * found["images"] <= MEMORY_LIMIT
    pages = ["--data_pages", settings.data_pages] if settings.data_pages else []
    chans = ["--model.in_chans", settings.in_chans] if settings.in_chans else []
    flags = ["--out", Path("runs") / name_of(found["data"]), *chans, *pages]
    broken = found["broken"] / found["looked_at"]
    if broken > RunSettings.max_bad:
        flags += ["--max_bad", min(math.ceil(110 * broken), 100) / 100]  # a tenth more, as it may be of a sample
    prepare = ["--out", "SET", "--size", size * 8 // 7, "--in_chans", wanted.in_chans, *pages]
    unsaid = wanted.pages != settings.data_pages
    slow = not ready and share > SLOW and short > size and not unsaid
    return {
        "in_chans": wanted.in_chans,
        "image_size": size,
        "patch_size": patch,
        "data_pages": wanted.pages,
        "pages_unsaid": unsaid,
        "decode_images_per_second": round(1 / max(speed.decode, 1e-9), 1),
        "samples_per_second": round(1 / max(speed.decode + speed.crop, 1e-9), 1),
        "decode_share": round(share, 3),
        "decoded_bytes": largest * found["images"],
        "fits_in_memory": ready,
        "workers": 0 if ready else spare_cores(),
        "command": command_line("pretrain", found["data"], flags),
        "prepare": command_line("prepare", found["data"], prepare) if slow else None,
    }


def command_line(verb: str, data: str, flags: Sequence[Any]) -> str:
    """Quote a command for the shell."""
    return shlex.join(["dmjd", verb, "--data", data, *map(str, flags)])


def name_of(data: str) -> str:
    """Make a folder's name from that of a set; characters with a meaning in a shell or a path become dashes."""
    return re.sub(r"\W+", "-", Path(data).absolute().stem).strip("-") or "run"


def fitting_size(short: int) -> tuple[int, int]:
    """Choose the side of a crop, at most 224 pixels, and of a patch, for images with a typical short side of `short`.

    There are at least eight patches along a side: with fewer there is little to hide.
    """
    patch = next((patch for patch in (16, 8) if short >= 8 * patch), 4)
    return min(max(round(short / patch) * patch, 32), 224), patch


# -- tables ------------------------------------------------------------------------------------------------------------


def write_tables(out: Path, looks: Sequence[Look], good: Sequence[Look], copies: Copies) -> None:
    """Write broken.tsv, with every file that cannot be used, and duplicates.tsv, with every pair of copies."""
    write_table(out / "broken.tsv", ((each.part, each.name, each.fault) for each in looks if each.fault))
    equal = ((group[0], other) for group in copies.exact for other in group[1:])
    rows = [("equal", *pair) for pair in equal] + [("near", *pair) for pair in copies.near]
    named = ((kind, good[one].part, good[one].name, good[two].part, good[two].name) for kind, one, two in rows)
    write_table(out / "duplicates.tsv", named)


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write rows of tab-separated cells."""
    lines = ("\t".join(map(one_cell, row)) for row in rows)
    write_atomically(path, "".join(f"{line}\n" for line in lines))
