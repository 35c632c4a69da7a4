"""The result of a classification: numbers, a table by class, the confusion matrix, a page to look at."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor

from dmjd.reports.page import data_uri
from dmjd.reports.results import write_results

MOST_NAMED = 40  # classes whose names fit beside the picture of a confusion matrix


@dataclass
class Result:
    """Scores of held-out images beside their classes.

    Attributes:
        scores: Any numbers that order the classes.
        labels: True classes.
        classes: Names of the classes.
        facts: Further numbers for the line of JSON.
    """

    scores: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]
    classes: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def confusion(self) -> Int[np.ndarray, "true predicted"]:
        """Count images by true and predicted class."""
        numbers = np.arange(len(self.classes))
        return confusion_matrix(self.labels.numpy(), self.scores.argmax(dim=1).numpy(), labels=numbers)

    def summary(self) -> dict[str, Any]:
        """Accuracies from 0 to 1, with Wilson's 95 % interval of the first; the mean is over classes with images."""
        best = self.scores.topk(min(5, self.scores.shape[1]), dim=1).indices == self.labels[:, None]
        right, count = int(best[:, 0].sum()), len(self.labels)
        low, high = binomtest(right, count).proportion_ci(method="wilson")
        present = self.confusion.sum(axis=1) > 0
        by_class = self.confusion.diagonal()[present] / self.confusion.sum(axis=1)[present]
        return {
            "top1": round(right / count, 4),
            "top1_low": round(low, 4),
            "top1_high": round(high, 4),
            "top5": round(float(best.any(dim=1).float().mean()), 4),
            "mean_class_accuracy": round(float(by_class.mean()), 4),
            "images": count,
            **self.facts,
        }

    def finish(self, settings: Any, out: Path | None, seconds: float) -> None:
        """Write result.json, per_class.csv, confusion.png and report.html to `out`; print the numbers as JSON.

        `seconds` is what the run took.
        """
        summary = self.summary() | {"seconds": round(seconds, 1)}
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # the table has names that the picture's font has not
                self.picture().savefig(out / "confusion.png", dpi=110)
            picture = data_uri((out / "confusion.png").read_bytes())
            rows = self.by_class()
            hardest = sorted(rows, key=lambda row: row["accuracy"] if row["images"] else 2)
            write_results(settings, out, summary, rows, "classification.html", hardest=hardest, confusion=picture)
        print(json.dumps(summary))

    def by_class(self) -> list[dict[str, Any]]:
        """Count for every class its held-out images, those recognised, and what it is most often taken for."""
        rows = []
        for number, counts in enumerate(self.confusion):
            wrong = counts.copy()
            wrong[number] = 0
            total = int(counts.sum())
            rows.append(
                {
                    "class": self.classes[number],
                    "images": total,
                    "accuracy": round(int(counts[number]) / total, 4) if total else "",
                    "precision": round(int(counts[number]) / int(said), 4)
                    if (said := self.confusion[:, number].sum())
                    else "",
                    "taken_for": self.classes[int(wrong.argmax())] if wrong.any() else "",
                }
            )
        return rows

    def picture(self) -> Figure:
        """Draw the confusion matrix; rows are true classes and sum to one."""
        counts = self.confusion
        named = len(self.classes) <= MOST_NAMED
        side = 2.2 + (0.28 * len(self.classes) if named else 6)
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(counts / counts.sum(axis=1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        if named:
            # Folders may be called anything: no mathematics, nothing that is not text.
            names = [name.encode(errors="backslashreplace").decode() for name in self.classes]
            axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
            axes.set_yticks(range(len(names)), names, parse_math=False)
        figure.colorbar(shown, label="share of the true class")
        return figure
