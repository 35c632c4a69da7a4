"""Small sets are decoded once and held in memory, instead of being decoded again in every epoch."""

import math
from collections.abc import Iterator
from contextlib import suppress

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from dmjd.data.decode import BadImage
from dmjd.data.source import Source, View

MEMORY_LIMIT = 2**30  # bytes of decoded images that are worth holding, rather than decoding them every epoch


class PackedImages(View):
    """The decoded images of a source, of any sizes, packed into one buffer that worker processes share.

    Names and labels are looked up in the source.

    Args:
        source: What to decode; not empty.

    Attributes:
        pixels: All images one after the other.
        shapes: Channels, height and width of each.
        offsets: Where each begins.
        bad: Those that did not decode, with the reason.
    """

    pixels: UInt8[Tensor, " bytes"]
    shapes: Int[Tensor, "n 3"]
    offsets: Int[Tensor, " n"]
    bad: dict[int, str]

    def __init__(self, source: Source):
        super().__init__(source)
        self.bad = {}
        images = list(self._decoded())
        sizes = torch.tensor([image.numel() for image in images])
        self.pixels = torch.cat([image.reshape(-1) for image in images])
        self.shapes = torch.tensor([image.shape for image in images])
        self.offsets = sizes.cumsum(0) - sizes

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def read(self, index: int) -> UInt8[Tensor, "C H W"]:
        """Look one image up.

        Raises:
            BadImage: As decoding did.
        """
        if index in self.bad:
            raise BadImage(self.bad[index])
        shape, start = self.shapes[index].tolist(), int(self.offsets[index])
        return self.pixels[start : start + math.prod(shape)].view(shape)

    def _decoded(self) -> Iterator[Tensor]:
        count = len(self.source)
        for index in tqdm(range(count), desc="reading images", unit=" images", leave=False, disable=None):
            try:
                yield self.source.read(index)
            except BadImage as reason:
                self.bad[index] = str(reason)
                yield torch.empty(0, 0, 0, dtype=torch.uint8)


def in_memory(source: Source) -> Source:
    """Hold the decoded images of a source in memory if they are few and small; else leave it as it is.

    The size is judged by the largest of a few images from all over the set.
    """
    if source.in_memory:
        return source
    sizes = []
    for index in range(0, len(source), max(len(source) // 16, 1)):
        with suppress(BadImage):
            sizes.append(source.read(index).numel())
    if not sizes or max(sizes) * len(source) > MEMORY_LIMIT:
        return source
    return PackedImages(source)
