"""Pictures of what was hidden and predicted, and how often tokens were hidden."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dmjd.reports.token_pictures import coverage, error_picture, places, sample_rows

GRID = (2, 3)
HIDDEN = np.array([1, 0, 0, 0, 0, 1], bool)  # the first token and the last one


def opened(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("L"))


@pytest.mark.parametrize("backdrop", ["image", "target"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sample_rows__paste_predictions_in_hidden_places_only(backdrop: str, channels: int) -> None:
    side = 8 if backdrop == "image" else 4  # pictures of targets may have a scale of their own
    drawn = 1 if channels == 1 or backdrop == "target" else 3
    tensors = {
        "images": np.full((1, channels, 16, 24), 90, np.uint8),
        "masked": np.stack([HIDDEN, ~HIDDEN])[None].astype(np.uint8),
        "target": np.full((1, drawn, 2 * side, 3 * side), 60, np.uint8),
        "predicted": np.full((1, 2, drawn, 2 * side, 3 * side), 200, np.uint8),
    }
    (((image, target), (seen, pasted), (other_seen, _)),) = sample_rows(tensors, GRID, backdrop)
    assert [shot["caption"] for shot in (image, target, seen, pasted)] == [
        "Image",
        "Target",
        "View 1: seen",
        "Predicted",
    ]
    assert "33% of its tokens hidden" in seen["alt"]
    assert "67% of its tokens hidden" in other_seen["alt"]
    assert (opened(image["src"]) == 90).all()
    assert (opened(target["src"]) == 60).all()
    at = places(HIDDEN, GRID, (16, 24))
    assert (opened(seen["src"]) == np.where(at, 128, 90)).all()
    at = places(HIDDEN, GRID, (2 * side, 3 * side))
    known = 90 if backdrop == "image" else 20  # the dimmed target
    assert (opened(pasted["src"]) == np.where(at, 200, known)).all()


def test_places__are_the_pixels_of_hidden_tokens() -> None:
    at = places(HIDDEN, GRID, (3, 4, 6))
    assert at.shape == (4, 6)
    assert at[:2, :2].all()
    assert at[2:, 4:].all()
    assert at.sum() == 8


def test_coverage__states_the_measured_rates_and_those_of_independent_masks() -> None:
    times = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 1, 1, 1]])
    found = coverage(times, GRID, 2)
    assert (found["predicted"], found["corrupted"], found["independent"]) == ("91.7%", "50.0%", "75.0%")
    assert found["span"] == "0.50 to 1.50"
    assert "Share of tokens: 8.3% hidden 0 times, 83.3% hidden 1 times, 8.3% hidden 2 times" in found["bars"]


def test_sample_rows__show_features_and_errors_where_a_run_has_drawn_them() -> None:
    tensors = {
        "images": np.full((1, 3, 8, 12), 90, np.uint8),
        "masked": np.stack([HIDDEN, ~HIDDEN])[None].astype(np.uint8),
        "target": np.full((1, 3, 8, 12), 60, np.uint8),
        "predicted": np.full((1, 2, 3, 8, 12), 200, np.uint8),
        "errors": np.array([[[0.0, 9, 9, 9, 9, 2.0], [9, 1.0, 1.0, 1.0, 1.0, 9]]], np.float32),
        "patch_colours": np.arange(18, dtype=np.uint8).reshape(1, 3, 2, 3),
    }
    (((_, _, colours), (*_, error), (*_, other)),) = sample_rows(tensors, GRID, "image")
    assert (colours["caption"], opened(colours["src"]).shape) == ("Features", GRID)
    assert (error["caption"], other["caption"]) == ("Error 1.00", "Error 1.00")  # means of hidden tokens alone


def test_error_picture__goes_from_blue_to_red_and_leaves_visible_tokens_grey() -> None:
    errors = np.array([0.0, 5, 5, 5, 5, 7.0], np.float32)
    drawn = error_picture(errors, HIDDEN, GRID)
    assert (drawn[:, 0, 1:] == 128).all()
    assert (drawn[:, 1, :2] == 128).all()
    assert drawn[2, 0, 0] > drawn[0, 0, 0]
    assert drawn[0, 1, 2] > drawn[2, 1, 2]
