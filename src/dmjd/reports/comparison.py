"""The page of several pre-training runs side by side: their differences in settings and results."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmjd.engine.run import MAY_CHANGE, by_flag
from dmjd.errors import ConfigError
from dmjd.reports.curves import HUES, SOLID, Line, overlay
from dmjd.reports.page import compact, duration, write_page
from dmjd.reports.pretraining import DASH, MEASURES, RunRecord, read_run, text

UNSHOWN = MAY_CHANGE - {"data", "preset", "device"}  # settings that do not affect results
BY_LABELS = ("knn_top1", "linear_top1")  # measures that are comparable between any two runs on the same images


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Write the page of several runs, in the given order.

    Args:
        runs: Directories written by `dmjd pretrain`, finished or not.
        path: File to write.

    Returns:
        Its path.

    Raises:
        ConfigError: If one is not such a directory, there are too many, or one is given twice.
        CheckpointError: If the settings of one are broken.
    """
    if len(runs) > len(HUES):
        raise ConfigError(f"{len(runs)} runs; a page has {len(HUES)} at most; leave some out")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError(f"a run is given twice; {', '.join(map(str, runs))}; name each once")
    records = [read_run(run) for run in runs]
    names = [record.name for record in records]
    unique = names if len({*names}) == len(names) else [str(run) for run in runs]
    known = dict(zip(unique, records, strict=True))
    alike = same_losses(known)
    data = {str(record.settings.get("data", "")) for record in records}
    same_data = len(data) == 1
    page = {
        "data": data.pop() if same_data else "",
        "runs": [
            {
                "name": name,
                "hue": place,
                "dashed": place >= SOLID,
                "state": state(record),
                "verdict": record.facts.get("verdict") or {},
            }
            for place, (name, record) in enumerate(known.items())
        ],
        "measures": measures(known, same_data),
        "effort": effort(known),
        "settings": differing(known),
        "alike": alike,
        "alone": [group[0] for group in alike if len(group) == 1],
        "curves": curves(known, alike),
    }
    write_page(path, "comparison.html", page)
    return path


def state(record: RunRecord) -> str:
    """Describe how far a run got."""
    if record.facts:
        return "finished"
    return f"not finished, step {record.now['step']:,.0f}" if "step" in record.now else "not started"


def measures(known: Mapping[str, RunRecord], same_data: bool) -> dict[str, list[dict[str, Any]]]:
    """Write each measure that any run has, for all runs; mark the best accuracy if all have the same images."""
    table = {}
    for key, title in MEASURES.items():
        values = [record.measured(key) for record in known.values()]
        if all(after is None for _, after in values):
            continue
        trained = [after for _, after in values if after is not None]
        best = max(trained) if key in BY_LABELS and same_data and len({*trained}) > 1 else math.inf
        table[title] = [
            {
                "before": "" if before is None else text(key, before),
                "after": text(key, after),
                "best": after == best,
            }
            for before, after in values
        ]
    return table


def effort(known: Mapping[str, RunRecord]) -> dict[str, list[str]]:
    """Write training time, number of images and device of all runs."""
    rows: dict[str, list[str]] = {}
    for title, key in {"Training images": "num_images", "Epochs": "epoch", "Images seen": "images"}.items():
        rows[title] = [compact(record.now[key]) if key in record.now else DASH for record in known.values()]
    rows["Time"] = [duration(record.now["seconds"]) if "seconds" in record.now else DASH for record in known.values()]
    for title, key in {"Images per second": "images_per_second", "Parameters": "parameters"}.items():
        rows[title] = [compact(record.now[key]) if key in record.now else DASH for record in known.values()]
    rows["Device"] = [str((record.facts.get("environment") or {}).get("device", DASH)) for record in known.values()]
    return {title: cells for title, cells in rows.items() if {*cells} != {DASH}}


def differing(known: Mapping[str, RunRecord]) -> dict[str, list[str]]:
    """List the settings that differ between runs, by their flags."""
    settings = [by_flag(record.settings) for record in known.values()]
    flags = dict.fromkeys(flag for each in settings for flag in each)  # in the order of the files
    rows = {flag: [cell(each.get(flag)) for each in settings] for flag in flags}
    return {flag: cells for flag, cells in rows.items() if len({*cells}) > 1 and flag.partition(".")[0] not in UNSHOWN}


def cell(value: Any) -> str:
    """Write the value of a setting."""
    if isinstance(value, float):
        return f"{value:g}"
    return DASH if value is None else " ".join(map(cell, value)) if isinstance(value, list) else str(value)


def same_losses(known: Mapping[str, RunRecord]) -> list[list[str]]:
    """Group runs whose losses are comparable: they have the same images, tokens, targets and losses."""
    groups: dict[str, list[str]] = {}
    for name, record in known.items():
        settings = by_flag(record.settings)
        visible = bool(settings.get("visible.weight"))
        counts = ["data", "model.patch_size", "masked.target", "masked.loss", "visible.weight"]
        counts += ["visible.target", "visible.loss", "visible.beta"] if visible else []
        scale: Line = {flag: settings.get(flag) for flag in counts}
        if "hog" in f"{scale['masked.target']} {scale.get('visible.target')}":
            scale |= {flag: value for flag, value in settings.items() if flag.startswith("hog.")}
        groups.setdefault(repr(scale), []).append(name)
    return [*groups.values()]


def curves(known: Mapping[str, RunRecord], alike: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Draw what can be compared: losses within each group of comparable runs, and measures and speed of all runs."""
    lines = {name: record.lines for name, record in known.items()}
    drawn = []
    for group in alike:
        title = "Loss" if len(group) == len(lines) else f"Loss of {' and '.join(group)}"
        drawn += [overlay(title, "loss", lines, shown=group)]
        drawn += [overlay(f"{title} over time", "loss", lines, "seconds", shown=group)]
    titles = {
        "knn_top1": "k-NN top-1, percent",
        "explained": "Hidden tokens explained, percent",
        "rankme": "RankMe",
        "images_per_second": "Images per second",
        "lr": "Learning rate",
    }
    for key, title in titles.items():
        drawn += [overlay(title, key, lines)]
        drawn += [overlay(f"{title}, over time", key, lines, "seconds")] if key in BY_LABELS else []
    return [figure for figure in drawn if figure]
