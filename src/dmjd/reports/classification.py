"""The page of a classification, with its confusion matrix."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from dmjd.reports.curves import new_figure
from dmjd.reports.page import data_uri
from dmjd.reports.results import write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 40  # classes whose names fit beside the picture of a confusion matrix


def write_classification(
    out: Path,
    *,
    verb: str,
    settings: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    confusion: Int[np.ndarray, "true predicted"],
    classes: Sequence[str],
) -> None:
    """Write result.json, per_class.csv, confusion.png and report.html.

    Args:
        out: Directory of the results, created if needed.
        verb: Name of the verb.
        settings: Settings as YAML.
        summary: The numbers: top1, top1_low, top1_high, top5, mean_class_accuracy, images, train_images and seconds,
            and best_top1 if there is one; and `part`, the name of the part that was evaluated.
        rows: The table by class: class, images, accuracy, precision and taken_for.
        confusion: Images by true and predicted class.
        classes: Names of the classes.
    """
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font may lack characters of a name; the table shows them
        draw_confusion(confusion, classes).savefig(buffer, dpi=110)
    (out / "confusion.png").write_bytes(buffer.getvalue())
    hardest = sorted(rows, key=lambda row: row["accuracy"] if row["images"] else 2)
    write_results(
        out,
        verb=verb,
        settings=settings,
        summary=summary,
        rows=rows,
        template="classification.html",
        page={"hardest": hardest, "confusion": data_uri(buffer.getvalue())},
    )


def draw_confusion(confusion: Int[np.ndarray, "true predicted"], classes: Sequence[str]) -> "Figure":
    """Draw a confusion matrix; rows are true classes and sum to one."""
    named = len(classes) <= MOST_NAMED
    side = 2.2 + (0.28 * len(classes) if named else 6)
    figure = new_figure(side + 0.8, side, layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(confusion / confusion.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if named:
        # Class names come from folders: do not parse them as mathematics, and escape what is not valid text.
        names = [name.encode(errors="backslashreplace").decode() for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    figure.colorbar(shown, label="share of the true class")
    return figure
