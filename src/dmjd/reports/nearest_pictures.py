"""Held-out images beside their nearest training images, by the features of a backbone and by pixels.

The file of neighbours holds thumbnails, so that the page can be rendered again without the images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmjd.engine.checkpoint import save_tensors
from dmjd.errors import CheckpointError
from dmjd.reports.page import jpeg

Names = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class NearestPictures:
    """Pictures of images and of their neighbours by the backbone's features and by pixels, nearest first.

    Attributes:
        queries: The held-out images.
        by_features: Pictures of the nearest training images by features.
        features_similarity: Cosine similarities of these.
        by_pixels: Pictures of the nearest training images by pixels.
        pixels_similarity: Cosine similarities of these.
    """

    queries: UInt8[Tensor, "q c h w"]
    by_features: UInt8[Tensor, "q k c h w"]
    features_similarity: Float[Tensor, "q k"]
    by_pixels: UInt8[Tensor, "q k c h w"]
    pixels_similarity: Float[Tensor, "q k"]


def write_nearest(path: Path, pictures: NearestPictures, names: Mapping[str, Any]) -> None:
    """Write the neighbours that the report shows.

    Args:
        path: File to write.
        pictures: Its content.
        names: Names of the images, under the attributes' names, and `compared`, the number of training images searched.
    """
    tensors = {name: value.cpu().contiguous() for name, value in vars(pictures).items()}
    save_tensors(tensors, path, {"names": json.dumps(names)})


def read_nearest(path: Path) -> dict[str, Any]:
    """Read such a file and arrange its pictures for the page.

    Raises:
        CheckpointError: If the file is broken, or of another version.
    """
    try:
        with safe_open(path, "numpy") as file:
            names = json.loads((file.metadata() or {})["names"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        rows = [
            {
                "query": {"name": name, "src": jpeg(colour(tensors["queries"][place]))},
                "by_features": shots(tensors, names, "features", place),
                "by_pixels": shots(tensors, names, "pixels", place),
            }
            for place, name in enumerate(names["queries"])
        ]
        return {"nearest": rows, "compared": int(names["compared"])}
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"broken pictures ({error}); {path}; remove the file for a report without") from None


def shots(tensors: Mapping[str, np.ndarray], names: Mapping[str, Names], kind: str, place: int) -> list[dict[str, str]]:
    """Describe the neighbours of one image for the page."""
    found = zip(
        tensors[f"by_{kind}"][place],
        tensors[f"{kind}_similarity"][place],
        names[f"by_{kind}"][place],
        strict=True,
    )
    return [{"name": name, "said": f"{value:.3f}", "src": jpeg(colour(shot))} for shot, value, name in found]


def colour(picture: UInt8[np.ndarray, "c h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a picture of one or three channels to RGB, channels last."""
    return np.broadcast_to(picture, (3, *picture.shape[1:])).transpose(1, 2, 0).copy()
