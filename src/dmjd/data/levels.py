"""The range of values that the images of a set really use, by which they are brought to 0..255.

Networks, targets and reports all take pixels of 0..255, as 8-bit images have them. A camera of 12 bits writes 0..4095
into 16-bit files: dividing these by 65,535 would leave a sixteenth of the range, and nearly black pictures.
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
    """The lowest and the highest value of deep images. Images of 8 bits have 0..255, whatever is set here."""

    low: float = 0.0
    high: float = 255.0

    def scale(self, images: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
        """Bring deep values to 0..255 as float32, those outside to the nearer end; leave uint8 as it is.

        A whole division keeps what it can: 8-bit values times 257 come back exactly.
        """
        if images.dtype == torch.uint8:
            return images
        return ((images.float() - self.low) / ((self.high - self.low) / 255)).clamp(0, 255)

    def widen(self, images: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Bring 8-bit values to the range of deep ones, as float32, and leave deep values as they are."""
        wide = images.float()
        return wide * ((self.high - self.low) / 255) + self.low if images.dtype == torch.uint8 else wide


BYTES = Levels()


def levels_of(images: Iterable[Tensor]) -> Levels:
    """Find the range of a sample of images.

    Whole numbers use a number of bits, and the range ends there: 0..4095, or -1024..4095 of a scanner's Hounsfield
    units. Floats range to 1 or 255 where they stay within and use more than half of it, as a reflectance of 0..1.3 does
    not use 255; others range from their lowest to their highest.
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
    """Refuse values of more than 8 bits where none of the images that the range was measured on has as many.

    Raises:
        DataError: If there are some: they would be white, or worse.
    """
    if image.dtype in DEEP and image.numpy().max() > BYTES.high:
        raise DataError(f"more than 8 bits, where most have 8; {name}; say what values range over: --data_range")


def _power(value: float) -> float:
    """Round up to a power of two, at least 1."""
    return 2.0 ** math.ceil(math.log2(max(value, 1.0)))
