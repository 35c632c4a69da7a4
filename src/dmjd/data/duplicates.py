"""Images that occur twice: equal to the last bit, or so alike that one must be a copy of the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Num, UInt64
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

DISTANCE = 5  # bits in which the outlines of copies may differ
BANDS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # first bit and number of bits of each
ALIKE = 0.985  # correlation of the thumbnails of copies
SIDE = 16  # of a thumbnail, in pixels
FLAT = 0.01  # standard deviation of a thumbnail, over the image's largest value, up to which it counts as uniform


class Outline(NamedTuple):
    """Fingerprint of an image, to find copies of it whatever their size, brightness and contrast.

    Attributes:
        bits: 64 of them: whether brightness rises to the right, at 8 places of 8 rows.
        thumbnail: The image as 16 x 16 x 3 values with mean 0 and length 1.
    """

    bits: int
    thumbnail: Float32[np.ndarray, " n"]


def outline(image: Num[Tensor, "C H W"]) -> Outline | None:
    """Compute the outline of an image from its first three channels, or the first; None for a uniform image."""
    shown = (image[:3] if len(image) > 2 else image[:1]).float()
    small = adaptive_avg_pool2d(shown, (SIDE, SIDE)).expand(3, -1, -1)
    centred = (small - small.mean()).flatten()
    if centred.std() <= FLAT * shown.abs().max():
        return None
    grid = adaptive_avg_pool2d(shown.mean(dim=0, keepdim=True), (8, 9))[0]
    rises = grid.diff(dim=1) > 0.1 * grid.std()  # by more than noise: a white background counts as flat
    bits = int.from_bytes(np.packbits(rises.numpy()).tobytes(), "big")
    return Outline(bits, (centred / centred.norm()).numpy())


def exact_copies(digests: Sequence[bytes]) -> list[list[int]]:
    """Group the indices of images with the same digest: groups of two or more, in order of their first image."""
    groups: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        groups.setdefault(digest, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def near_copies(bits: UInt64[np.ndarray, " n"], thumbnails: Float32[np.ndarray, "n d"]) -> Iterator[tuple[int, int]]:
    """Find pairs of indices, the lower first, whose outlines differ in few bits and whose thumbnails correlate.

    If at most five bits differ, one of the six bands is equal, so that only outlines that share a band are compared.
    """
    bands = [(bits >> np.uint64(start)) & np.uint64((1 << length) - 1) for start, length in BANDS]
    for place, band in enumerate(bands):
        order = np.argsort(band, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for at, one in enumerate(group[:-1]):
                others = group[at + 1 :]
                others = others[np.bitwise_count(bits[others] ^ bits[one]) <= DISTANCE]
                for earlier in bands[:place]:  # already found in that band
                    others = others[earlier[others] != earlier[one]]
                alike = others[thumbnails[others] @ thumbnails[one] >= ALIKE]
                yield from ((int(one), int(other)) for other in alike)
