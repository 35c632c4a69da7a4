"""A classifier's predictions, as a table or as lines of JSON."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dmjd.data.cells import plain_cell
from dmjd.data.source import Source, why_bad
from dmjd.engine.checkpoint import flush, write_atomically
from dmjd.engine.run import rows_of
from dmjd.errors import DataError

OWN = ("path", "class", "probability")  # columns that exist whatever the names of the classes


class PredictionTable:
    """Writes a row for every image; `path` appears only when the table is finished.

    Args:
        path: File of the table; with the suffix .jsonl, every line is a JSON object.
        classes: Names of the classes.
        top: Number of likeliest classes to write; None for the likeliest one and the probabilities of all.
    """

    def __init__(self, path: Path, classes: Sequence[str], *, top: int | None = None):
        self.path, self.is_json = path, path.suffix.lower() == ".jsonl"
        self.classes, self.all = list(classes), top is None
        self.top = min(top or 1, len(classes))
        self.images = self.labelled = self.right = 0
        self.skipped: dict[str, str] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.beside = self.path.with_name("skipped.tsv")
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.file = self.partial.open("w", newline="", encoding="utf-8", errors="backslashreplace")
        self.cells = csv.writer(self.file)
        if not self.is_json:
            more = [name for place in range(2, self.top + 1) for name in (f"class_{place}", f"probability_{place}")]
            every = [f"probability of {name}" if name in OWN else name for name in classes] if self.all else []
            self.cells.writerow([*OWN, *more, *map(plain_cell, every)])

    def add(
        self, images: Source, values: Float[Tensor, "n classes"] | None, numbers: Sequence[int], *, comparable: bool
    ) -> None:
        """Write rows.

        Args:
            images: The set.
            values: Class probabilities of some images; None if there are none.
            numbers: Indices of these images.
            comparable: Whether the set has labels whose names are those of the classes.
        """
        if values is None:
            return
        best = values.topk(self.top, dim=1).indices.tolist()
        for number, row, places in zip(numbers, values.tolist(), best, strict=True):
            self.write(images.name(number), row, places)
            label = images.label(number) if comparable else None
            if label is not None:
                self.labelled += 1
                self.right += images.classes[label] == self.classes[places[0]]
        self.images += len(numbers)

    def write(self, name: str, probabilities: Sequence[float], best: Sequence[int]) -> None:
        """Write a row."""
        if not self.is_json:
            pairs = ((plain_cell(self.classes[place]), f"{probabilities[place]:.6f}") for place in best)
            every = (f"{value:.6f}" for value in probabilities) if self.all else ()
            self.cells.writerow([plain_cell(name), *(cell for pair in pairs for cell in pair), *every])
            return
        shown = range(len(self.classes)) if self.all else best
        said: dict[str, Any] = {"path": name, "class": self.classes[best[0]]}
        said["probability"] = round(probabilities[best[0]], 6)
        said["probabilities"] = {self.classes[place]: round(probabilities[place], 6) for place in shown}
        self.file.write(json.dumps(said, ensure_ascii=False) + "\n")

    def skip(self, images: Source, numbers: Sequence[int]) -> None:
        """Record why images do not decode."""
        for number in numbers:
            self.skipped[images.name(number)] = why_bad(images, number)

    def close(self) -> None:
        """Delete the file, unless it is finished."""
        self.file.close()
        self.partial.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Rename the file, write `skipped.tsv` beside it or delete that of an earlier table, and return a summary.

        Raises:
            DataError: If no image decoded.
        """
        if not self.images:
            name, reason = next(iter(self.skipped.items()))
            raise DataError(f"none of {len(self.skipped)} images decodes; {name}: {reason}; check --data")
        self.file.close()
        flush(self.partial)
        self.partial.replace(self.path)
        if self.skipped:
            write_atomically(self.beside, rows_of(self.skipped))
        else:
            self.beside.unlink(missing_ok=True)
        top1 = {"top1": round(self.right / self.labelled, 4)} if self.labelled else {}
        return {"images": self.images, "skipped": len(self.skipped), **top1, "out": str(self.path)}
