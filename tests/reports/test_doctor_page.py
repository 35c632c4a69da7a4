"""The page of a set of images says what is wrong first, in words, and escapes what files are called."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dmjd.data.checkup import chosen, find_copies, look_at, measure_values
from dmjd.data.decode import Wanted
from dmjd.data.folder import open_folder
from dmjd.reports.doctor import notes, problems, write_checkup

FOUND: dict[str, Any] = {
    "data": "photos <b>",
    "images": 1200,
    "looked_at": 1000,
    "parts": {"train": 1000, "val": 200},
    "labels": {},
    "formats": {".png": 1200},
    "passed_over": {},
    "file_bytes": {},
    "channels": {3: 1000},
    "depths": {"uint8": 1000},
    "turned": 0,
    "pages": {},
    "broken": 0,
    "refused": 0,
    "heights": {"min": 40, "median": 60, "max": 80},
    "widths": {"min": 40, "median": 60, "max": 80},
    "long": 0,
    "flat": 0,
    "types": {"uint8": 1000},
    "equal": 0,
    "near_pairs": 0,
    "leaked": 0,
    "held_out": 150,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "value_range": [0.0, 255.0],
    "filled": 64,
    "in_chans": 3,
    "image_size": 64,
    "patch_size": 8,
    "data_pages": None,
    "pages_unsaid": False,
    "samples_per_second": 300.0,
    "decode_share": 0.6,
    "decoded_bytes": 2e9,
    "fits_in_memory": False,
    "workers": 1,
    "command": "dmjd pretrain --data photos",
    "prepare": "dmjd prepare --data photos --out SET",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a set with a leak, and with a broken file of a nasty name."""
    root, out = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("out")
    for part, seeds in (("train", range(5)), ("val", (3, 7))):
        (root / part).mkdir()
        for seed in seeds:
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / part / f"{seed} <i>.png")
    (root / "train" / "cut <script>.png").write_bytes(b"cut")
    parts = open_folder(str(root), Wanted())
    looks = look_at(parts, chosen(parts, 99, 0), 1)
    good = [each for each in looks if not each.fault]
    copies = find_copies(good)
    found = FOUND | {"equal": 1, "leaked": 1, "broken": 1, "labels": {"val": {"<u>": 3}}}
    path = write_checkup(out, found, parts, looks, copies, measure_values(parts, good))
    return path.read_text("utf-8")


def test_page__says_what_is_wrong_before_what_there_is(page: str) -> None:
    order = [
        "Leakage: 1 of 150 held-out images is",
        "1 of 1,000 files does not decode (0.10%)",
        "What to run",
        "Contents of the set",
    ]
    places = [page.index(each) for each in order]
    assert places == sorted(places)
    assert "a sample of 1,000 was decoded" in page
    assert "dmjd prepare --data photos --out SET" in page
    assert not re.search(r"[a-z]\.[A-Z]", page)  # a space between sentences


def test_page__shows_pairs_and_figures_and_escapes_names(page: str) -> None:
    assert page.count("data:image/jpeg") == 2
    assert page.count("<svg") == 2
    assert "Equal: in the training part and in another" in page
    assert "cut &lt;script&gt;.png" in page
    assert "photos &lt;b&gt;" in page
    assert not re.search(r"<script|<i>|<u>|https?://(?!www\.w3\.org)", page)


def test_page__of_a_set_in_order_says_so(tmp_path: Path) -> None:
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{seed}.png")
    parts = open_folder(str(tmp_path), Wanted())
    looks = look_at(parts, chosen(parts, 99, 0), 1)
    text = write_checkup(tmp_path, FOUND, parts, looks, find_copies(looks), None).read_text("utf-8")
    assert "Nothing has to be put right." in text
    assert "Worth knowing" not in text
    assert "<h2>Copies" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"leaked": 3}, "Leakage: 3 of 150 held-out images are also in the training part"),
        (
            {"value_range": [-9999.0, 200.0], "filled": 2},
            "all values lie in 2 of 64 steps of their range, -9999 to 200",
        ),
        ({"broken": 20}, "20 of 1,000 files do not decode (2.00%). Pre-training stops above 1%."),
        ({"broken": 1}, "Training leaves them out"),
        ({"refused": 1}, "1 of 1,000 files does not fit the others, which are read as images of 3 channels"),
        ({"labels": {"train": {"a": 5}, "val": {"a": 5, "b": 5}}}, "1 held-out class has no training images: b."),
        ({"pages": {5: 7}, "pages_unsaid": True}, "Files have several pages (7 of 5 pages), which may be channels of"),
        ({"types": {"uint8": 5, "uint16": 6}}, "Values are of different types: 5 uint8, 6 uint16."),
    ],
)
def test_problems__are_said_in_words(change: dict[str, Any], words: str) -> None:
    ((what, advice),) = problems(FOUND | change)
    assert words in what
    assert advice.endswith(".")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"equal": 2}, "Images that are exact copies of others: 2."),
        ({"near_pairs": 2}, "Pairs of images that are almost equal: 2."),
        (
            {"pages": {3: 7}, "data_pages": "frames"},
            "Files have several pages (7 of 3 pages); they were treated as frames",
        ),
        ({"pages": {3: 1}}, "Files have several pages (1 of 3 pages); they were refused."),
        ({"flat": 4}, "Images that are almost uniform: 4."),
        ({"long": 4}, "Images more than five times as long as wide: 4."),
        ({"labels": {"train": {"a": 500, "b": 5}}}, "The largest class has 500 images, the smallest 5."),
        ({"passed_over": {".txt": 3, "": 1}}, "Other files were ignored: 3 .txt, 1 without an ending."),
        ({"turned": 4}, "Photographs stored rotated (EXIF): 4."),
        ({"value_range": [0.0, 4095.0]}, "Values range from 0 to 4095"),
    ],
)
def test_notes__are_said_in_words(change: dict[str, Any], words: str) -> None:
    assert problems(FOUND | change) == []
    ((what, _),) = notes(FOUND | change)
    assert words in what


def test_notes__say_that_all_values_are_the_same() -> None:
    found = {name: value for name, value in FOUND.items() if name not in ("mean", "std", "value_range")}
    assert [what for what, _ in notes(found)] == ["All values are the same."]
