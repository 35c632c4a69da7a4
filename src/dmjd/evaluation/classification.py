"""The result of a classification: numbers, a table by class, the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import Tensor


@dataclass
class ClassificationResult:
    """Scores of held-out images and their true classes.

    Attributes:
        scores: Any numbers that rank the classes.
        labels: True classes.
        classes: Names of the classes.
        facts: Further entries of the summary.
    """

    scores: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]
    classes: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def confusion(self) -> Int[np.ndarray, "true predicted"]:
        """Count images by true and predicted class."""
        numbers = np.arange(len(self.classes))
        return confusion_matrix(self.labels.numpy(), self.scores.argmax(dim=1).numpy(), labels=numbers)

    @property
    def tables(self) -> dict[str, Any]:
        """Tables for a page: rows by class, the confusion matrix, names of the classes."""
        return {"rows": self.by_class(), "confusion": self.confusion, "classes": self.classes}

    def summary(self) -> dict[str, Any]:
        """Accuracies from 0 to 1, with Wilson's 95 % interval for top-1; the mean is over classes that have images."""
        # Ties go to the first class, as in the confusion matrix; `topk` would break them arbitrarily.
        best = self.scores.argsort(dim=1, descending=True, stable=True)[:, :5] == self.labels[:, None]
        right, count = int(best[:, 0].sum()), len(self.labels)
        low, high = binomtest(right, count).proportion_ci(method="wilson")
        present = self.confusion.sum(axis=1) > 0
        by_class = self.confusion.diagonal()[present] / self.confusion.sum(axis=1)[present]
        return {
            "top1": round(right / count, 4),
            "top1_low": round(float(low), 4),
            "top1_high": round(float(high), 4),
            "top5": round(float(best.any(dim=1).float().mean()), 4),
            "mean_class_accuracy": round(float(by_class.mean()), 4),
            "images": count,
            **self.facts,
        }

    def by_class(self) -> list[dict[str, Any]]:
        """List for every class its held-out images, accuracy, precision and most frequent wrong prediction."""
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
                    "precision": round(int(counts[number]) / int(predicted), 4)
                    if (predicted := self.confusion[:, number].sum())
                    else "",
                    "taken_for": self.classes[int(wrong.argmax())] if wrong.any() else "",
                }
            )
        return rows
