"""What a page is made of: words for numbers, and pictures inside it."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dmjd.reports.page import compact, duration, jpeg, png, render, write_page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (42.0, "42 s"),
        (59.7, "1 min"),
        (600.0, "10 min"),
        (3600.0, "1 h 0 min"),
        (12034.0, "3 h 21 min"),
        (72e4, "200 h"),
    ],
)
def test_duration__reads_naturally(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("value", "text"), [(0.3, "0.3"), (12.0, "12"), (9469.0, "9,469"), (21_665_664.0, "21.7 M")])
def test_compact__reads_naturally(value: float, text: str) -> None:
    assert compact(value).replace("\u00a0", " ") == text


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "P"), (4, "P")])
def test_png__shows_one_channel_or_three(channels: int, mode: str) -> None:
    uri = png(np.full((channels, 8, 12), 200, np.uint8))
    assert uri.startswith("data:image/png;base64,")
    assert (opened(uri).size, opened(uri).mode) == ((12, 8), mode)
    assert np.asarray(opened(uri).convert("RGB")).mean() == 200


def test_jpeg__is_made_smaller_to_a_width() -> None:
    picture = np.full((300, 600, 3), 90, np.uint8)
    assert opened(jpeg(picture, width=100)).size == (100, 50)
    assert opened(jpeg(picture[:50, :50])).size == (50, 50)


def test_write_page__escapes_text_and_replaces_the_page_as_a_whole(tmp_path) -> None:
    page = {"name": "<i>", "verb": "knn", "settings": "a: <b>", "summary": {}, "rows": []}
    for _ in range(2):
        write_page(tmp_path / "report.html", "results.html", page)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert text == render("results.html", page)
    assert "<h1>&lt;i&gt;</h1>" in text
    assert "a: &lt;b&gt;" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
