"""The range of values that the images of a set really use, from which they are scaled to 0..255.

Networks, targets and reports all take pixels of 0..255, like those of 8-bit images. A camera of 12 bits writes 0..4095
into 16-bit files: dividing these by 65,535 would leave a sixteenth of the range, and nearly black images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from dmjd.errors import DataError

DEEP = (torch.uint16, torch.int16)


@dataclass(frozen=True)
class Levels:
    """The lowest and the highest value of deep images (more than 8 bits); images of 8 bits always have 0..255."""

    low: float = 0.0
    high: float = 255.0

    def scale(self, images: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Scale deep values to 0..255 as float32, clamping those outside; leave uint8 as it is.

        Dividing by the scale is exact where possible: 8-bit values times 257 come back exactly.
        """
        if images.dtype == torch.uint8:
            return images
        return ((images.float() - self.low) / ((self.high - self.low) / 255)).clamp(0, 255)

    def widen(self, images: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Scale 8-bit values to the range of deep ones, as float32, and leave deep values as they are."""
        wide = images.float()
        return wide * ((self.high - self.low) / 255) + self.low if images.dtype == torch.uint8 else wide


BYTES = Levels()


def levels_of(images: Iterable[Tensor]) -> Levels:
    """Find the range of a sample of images.

    The range of integers is that of their number of bits: 0..4095, or -1024..4095 for a scanner's Hounsfield units. The
    range of floats is 0..1 or 0..255 where they stay within it and use more than half of it (a reflectance of 0..1.3 is
    not taken for 0..255), else from their lowest to their highest value.
    """
    low, high, whole = math.inf, -math.inf, True
    for image in images:
        if image.dtype != torch.uint8 and image.numel():
            values, whole = image.numpy(), whole and not image.is_floating_point()
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        return BYTES
    if whole:
        return Levels(-_power(-low) if low < 0 else 0.0, max(_power(high + 1), 256.0) - 1)
    ends = next((end for end in (1.0, 255.0) if low >= 0 and end / 2 < high <= end), None)
    if ends is None and low == high:
        raise DataError(f"all values of the images are {low:g}; nothing can be learned; check --data")
    return Levels(0.0, ends) if ends else Levels(low, high)


def refuse_deep(image: Tensor, name: str) -> None:
    """Refuse values of more than 8 bits if all images that the range was measured on have 8.

    Raises:
        DataError: If there are any: clipped to 255, they would be white.
    """
    if image.dtype in DEEP and image.numpy().max() > BYTES.high:
        such = f"a value of {image.numpy().max()}, where images are said to have 8 bits or most of them do"
        raise DataError(f"{such}; {name}; say what values range over, to more than 255, by --data_range")


def _power(value: float) -> float:
    """Round up to a power of two, at least 1."""
    return 2.0 ** math.ceil(math.log2(max(value, 1.0)))
