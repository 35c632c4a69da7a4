"""The page of segmentation and detection: numbers, held-out images, a table by class."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dmjd.reports.page import jpeg
from dmjd.reports.results import write_results


def write_dense(
    out: Path,
    *,
    verb: str,
    settings: str,
    lead: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Sequence[UInt8[np.ndarray, "H W 3"]]],
    legend: Sequence[tuple[str, str]],
) -> None:
    """Write result.json, per_class.csv and report.html.

    Args:
        out: Directory of the results, created if needed.
        verb: Name of the verb.
        settings: Settings as YAML.
        lead: First sentence of the page.
        summary: The numbers: shares from 0 to 1 as floats, and images, train_images and seconds.
        rows: The table by class, each row starting with the name; shares are floats, or "" if there is none.
        pictures: The image, the truth and the prediction, by name of the held-out image.
        legend: Names of the classes and their colours.
    """
    shares = {name: value for name, value in summary.items() if isinstance(value, float) and name != "seconds"}
    numbers = {measure(name): f"{value:.1%}" for name, value in shares.items()}
    numbers |= {"Training images": f"{summary['train_images']:,}"}
    samples = [{"name": name, "pictures": [jpeg(each) for each in row]} for name, row in pictures.items()]
    write_results(
        out,
        verb=verb,
        settings=settings,
        summary=summary,
        rows=rows,
        template="dense.html",
        page={
            "lead": lead,
            "numbers": numbers,
            "columns": list(map(measure, rows[0])),
            "samples": samples,
            "legend": legend,
        },
    )


def measure(name: str) -> str:
    """Format the name of a number for display, such as mIoU for miou and AP50 for map50."""
    words = re.sub(r"\bm?ap", "AP", name.replace("_", " ")).replace("iou", "IoU")
    return words if words.startswith("mIoU") else words[0].upper() + words[1:]
