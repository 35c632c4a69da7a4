"""Samples of pretraining: a random crop of an image, and the masks of its views."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Generator, Tensor
from torch.utils.data import Dataset

from dmjd.data.random import mix
from dmjd.data.source import Source, join_skipped, read_or_substitute

MaskedSample = tuple[Tensor, Tensor, int, dict[str, str]]


class MaskedBatch(NamedTuple):
    """One micro-batch of pretraining."""

    images: UInt8[Tensor, "B C H W"]
    masked: Bool[Tensor, "B V L"]
    indices: Int[Tensor, " B"]  # of the images, substitutes included
    skipped: dict[str, str]  # files that did not decode, with the reason; others stand in for them


@dataclass(frozen=True)
class MaskedSamples(Dataset[MaskedSample]):
    """Samples of pretraining by (epoch, index); everything random about one is drawn from a generator of these.

    Attributes:
        images: What they are made of.
        crop: Of (image, generator=); makes a crop of one image.
        draw: Of (generator=); draws the masks of one image's views.
        seed: Seed of the run.
        variants: How many different crops there are of an image; None takes another one in every epoch.
    """

    images: Source
    crop: Callable[..., UInt8[Tensor, "C h w"]]
    draw: Callable[..., Bool[Tensor, "1 V L"]]
    seed: int
    variants: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> MaskedSample:
        """Crop the image (epoch, index) and draw its masks.

        Returns:
            The crop, the masks (V, L), the number of the image that was read, and what did not decode.

        Raises:
            DataError: If neither it nor the images after it decode.
        """
        epoch, index = key
        generator = Generator().manual_seed(mix(self.seed, epoch, index))
        of_crop = generator
        if self.variants:
            of_crop = Generator().manual_seed(mix(self.seed, index, epoch % self.variants))
        image, read, skipped = read_or_substitute(self.images, index)
        return self.crop(image, generator=of_crop), self.draw(generator=generator)[0], read, skipped

    def masks(self, epoch: int, index: int) -> Bool[Tensor, "V L"]:
        """Draw the masks of a sample without reading its image."""
        generator = Generator().manual_seed(mix(self.seed, epoch, index))
        if not self.variants:  # the crop draws first, the same numbers whatever the image
            self.crop(torch.zeros(1, 1, 1, dtype=torch.uint8), generator=generator)
        return self.draw(generator=generator)[0]


def collate_masked(samples: list[MaskedSample]) -> MaskedBatch:
    """Stack the crops and masks of samples."""
    images, masked, indices, skipped = zip(*samples, strict=True)
    return MaskedBatch(torch.stack(images), torch.stack(masked), torch.tensor(indices), join_skipped(skipped))
