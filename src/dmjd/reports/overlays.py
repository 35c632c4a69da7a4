"""Classes and objects drawn over an image."""

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb

import numpy as np
import torch
from jaxtyping import Integer, Num, UInt8
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

Picture = UInt8[np.ndarray, "H W 3"]


def class_colours(count: int) -> UInt8[np.ndarray, "n 3"]:
    """Choose colours of 0..255 for classes, the same in every run, and grey as one more for pixels without a class."""
    numbers = np.arange(count)
    hues = np.stack([numbers * 0.618034 % 1, 0.95 - numbers % 3 * 0.2, 0.95 - numbers % 4 * 0.15], axis=1)
    colours = [hsv_to_rgb(*hue) for hue in hues]
    return np.vstack([np.array(colours).reshape(-1, 3) * 255, [[128, 128, 128]]]).astype(np.uint8)


def legend_of(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the names of classes with their colours in CSS notation."""
    colours = class_colours(len(classes))[:-1].tolist()
    return [(name, "#{:02x}{:02x}{:02x}".format(*colour)) for name, colour in zip(classes, colours, strict=True)]


def rgb(image: Num[Tensor, "C H W"]) -> Picture:
    """Convert an image of 0..255 to RGB: its first three channels, or the first as grey if it has fewer.

    Images deeper than 8 bits, which are float32, are rounded.
    """
    shown = image[: 3 if len(image) > 2 else 1].expand(3, -1, -1).permute(1, 2, 0)
    return shown.round().clamp(0, 255).byte().cpu().numpy().copy()


def colour_pixels(numbers: Integer[Tensor, "H W"], count: int) -> Picture:
    """Draw the classes of pixels, numbered below `count`; `count` itself stands for no class."""
    return class_colours(count)[numbers.cpu().numpy()]


def overlay_pixels(image: Picture, numbers: Integer[Tensor, "H W"], count: int) -> Picture:
    """Blend an image equally with the colours of its pixels' classes."""
    return (image * 0.5 + colour_pixels(numbers, count) * 0.5).astype(np.uint8)


def overlay_objects(image: Num[Tensor, "C H W"], found: Mapping[str, Tensor], classes: Sequence[str]) -> Picture:
    """Draw objects on an image, in the colours of their classes.

    Args:
        image: Pixels of 0..255.
        found: `boxes` (n, 4) as left, top, right, bottom in pixels; `labels` (n) from 0; and optionally `masks`
            (n, H, W), True inside.
        classes: Names of the classes.
    """
    picture = rgb(image)
    chosen = [tuple(class_colours(len(classes))[label].tolist()) for label in found["labels"].tolist()]
    if not chosen:
        return picture
    pixels = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    if "masks" in found:
        pixels = draw_segmentation_masks(pixels, found["masks"], alpha=0.4, colors=chosen)
    return rgb(draw_bounding_boxes(pixels, found["boxes"], colors=chosen, width=2))
