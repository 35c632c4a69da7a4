"""Held-out images as one picture each, for loggers that show images beside metrics."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from safetensors import safe_open

from dmjd.reports.token_pictures import views_of

GAP = 4  # white pixels between two pictures


def read_strips(path: Path) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """Put each held-out image in a row with its target, and with the input and the prediction of each view.

    Args:
        path: File of samples of a run, see `dmjd.reports.token_pictures.write_samples`.
    """
    with safe_open(path, "numpy") as file:
        about = file.metadata()
        images, masked, target, predicted = map(file.get_tensor, ("images", "masked", "target", "predicted"))
    rows, columns = map(int, about["grid"].split())
    strips = {}
    for place, image in enumerate(images):
        shown = (image, target[place], masked[place], predicted[place])
        views = views_of(*shown, (rows, columns), about["backdrop"])
        shots = [image, target[place], *(shot for _, *pair in views for shot in pair)]
        size = image.shape[:0:-1]
        strips[f"predictions/{place + 1}"] = join([in_colour_at(shot, size) for shot in shots])
    return strips


def in_colour_at(shot: UInt8[np.ndarray, "c h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Resize a picture, grey or in colour, to a width and height, without interpolation."""
    colours = np.broadcast_to(shot, (3, *shot.shape[1:])).transpose(1, 2, 0)
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).resize(size, Image.Resampling.NEAREST))


def join(shots: list[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "H all 3"]:
    """Join pictures of the same size in a row."""
    spaced = [np.pad(shot, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for shot in shots]
    return np.concatenate(spaced, axis=1)[:, :-GAP]
