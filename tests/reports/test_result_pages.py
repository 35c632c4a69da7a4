"""What judgements by labels leave behind."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmjd.reports.classification import write_classification
from dmjd.reports.dense import write_dense

SUMMARY = {"top1": 0.75, "top1_low": 0.6, "top1_high": 0.85, "top5": 1.0, "mean_class_accuracy": 0.7, "images": 1234}
COUNTS = {"train_images": 5678, "part": "val", "seconds": 90.0}


def classify(out: Path, count: int = 2, **more: float) -> str:
    classes = ["$a$ <b>", *(f"class {number}" for number in range(1, count))]
    rows = [
        {"class": name, "images": 4 if number else 0, "accuracy": 0.5 if number else "", "precision": "",
         "taken_for": ""}
        for number, name in enumerate(classes)
    ]  # fmt: skip
    write_classification(
        out,
        verb="knn",
        settings="k: 20\n",
        summary=SUMMARY | COUNTS | more,
        rows=rows,
        confusion=np.eye(count, dtype=np.int64),
        classes=classes,
    )
    return (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("count", [2, 50])
def test_write_classification__leaves_numbers_a_table_a_picture_and_a_page(tmp_path: Path, count: int) -> None:
    text = classify(tmp_path / "new" / "run", count)
    out = tmp_path / "new" / "run"
    assert {path.name for path in out.iterdir()} == {"result.json", "per_class.csv", "confusion.png", "report.html"}
    assert json.loads((out / "result.json").read_text()) == SUMMARY | COUNTS
    with (out / "per_class.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == count
    with Image.open(out / "confusion.png") as image:
        assert min(image.size) > 200
    assert "Report of dmjd knn" in text
    assert "75.0% of 1,234 held-out images (val) are classified correctly" in text
    assert "k: 20" in text
    assert "data:image/png;base64," in text
    assert "Best during training" not in text


def test_write_classification__shows_the_best_and_the_hardest_first(tmp_path: Path) -> None:
    text = classify(tmp_path, best_top1=0.8)
    assert "80.0%" in text
    assert "its number is optimistic" in text
    assert text.index('<th scope="row">class 1</th>') < text.index('<th scope="row">$a$ &lt;b&gt;</th>')


def test_write_dense__shows_shares_pictures_and_colours(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1.0, "map": 0.1}\n{"step": 2, "epoch": 2.0, "map": 0.2}\n'
    )
    picture = np.zeros((20, 30, 3), np.uint8)
    write_dense(
        tmp_path,
        verb="detect",
        settings="seed: 0\n",
        lead="An average precision.",
        summary={"map": 0.25, "map50": 0.5, "map_small": None, "mask_map": 0.1, "best_map": 0.3, "images": 7, **COUNTS},
        rows=[{"class": "cell", "objects": 1200, "ap": 0.25}, {"class": "none", "objects": 0, "ap": ""}],
        pictures={"a<b>.png": [picture] * 3},
        legend=[("cell", "#ff0000")],
    )
    text = (tmp_path / "report.html").read_text("utf-8")
    for wanted in (
        "Report of dmjd detect",
        "An average precision.",
        "<dt>AP</dt><dd>25.0%</dd>",
        "<dt>AP50</dt><dd>50.0%</dd>",
        "<dt>Mask AP</dt><dd>10.0%</dd>",
        "<dt>Best AP</dt><dd>30.0%</dd>",
        "<dt>Training images</dt><dd>5,678</dd>",
        'alt="a&lt;b&gt;.png: prediction"',
        "background: #ff0000",
        '<th scope="col">Objects</th><th scope="col">AP</th>',
        "<td>1,200</td><td>25.0%</td>",
        "<td>0</td><td>\u2013</td>",
        "AP, percent over epochs: boxes from 10 to 20",
    ):
        assert wanted in text
    assert "AP small" not in text
    assert text.count("data:image/jpeg") == 3
