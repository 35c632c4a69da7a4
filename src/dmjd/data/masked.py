"""Samples of pre-training: a random crop of every image, and the seed of its masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor
from torch.utils.data import Dataset

from dmjd.data.crops import RandomCrop
from dmjd.data.lent import borrow, is_lent, room
from dmjd.data.levels import BYTES, Levels, refuse_deep
from dmjd.data.memory import Stack
from dmjd.data.sampler import StepKeys
from dmjd.data.source import Source, join_skipped, read_or_substitute
from dmjd.data.transfer import transfer
from dmjd.random import mix_all

CROP, MASKS = 0, 1  # streams of random numbers


class MaskedBatch(NamedTuple):
    """One micro-batch of pre-training."""

    images: Num[Tensor, "B C H W"]  # at their depth, or of 0..255 on the network's device
    seeds: Int[Tensor, " B"]  # of the masks, which are drawn on the network's device
    indices: Int[Tensor, " B"]  # of the images, substitutes included
    skipped: dict[str, str]  # files that did not decode, with the reason; other images replace them

    def __reduce__(self) -> tuple[Any, ...]:
        """Send numbers as NumPy arrays: every tensor sent by a worker is a file, opened through a socket."""
        return _received, (self.images, is_lent(self.images), self.seeds.numpy(), self.indices.numpy(), self.skipped)


def _received(
    images: Tensor, lent: bool, seeds: np.ndarray, indices: np.ndarray, skipped: dict[str, str]
) -> MaskedBatch:
    return MaskedBatch(borrow(images) if lent else images, torch.from_numpy(seeds), torch.from_numpy(indices), skipped)


@dataclass(frozen=True)
class MaskedSamples(Dataset[MaskedBatch]):
    """Samples of pre-training by (epoch, index); everything random about one is a function of these and the seed.

    Attributes:
        images: The images that samples are made from.
        crop: Crops an image.
        seed: Seed of the run.
        variants: Number of different crops of an image; None for a new one in every epoch.
        levels: The range of deep images.
        stack: All images in one tensor, if batches are to be cropped at once.
        sizes: First epoch, and height and width, of each size of crops, if they are not always those of `crop`.
    """

    images: Source
    crop: RandomCrop
    seed: int
    variants: int | None = None
    levels: Levels = BYTES
    stack: Stack | None = None
    sizes: tuple[tuple[int, tuple[int, int]], ...] = ()

    def crop_at(self, epoch: int) -> RandomCrop:
        """Return the crop with the size of an epoch."""
        begun = [size for first, size in self.sizes if epoch >= first]
        return replace(self.crop, size=begun[-1]) if begun else self.crop

    def __getitems__(self, keys: StepKeys) -> MaskedBatch:
        """Crop the images of these (epoch, index), all to the size of the epoch in which their step begins.

        Raises:
            DataError: If neither an image nor those after it decode.
        """
        epochs, indices = torch.tensor(keys).unbind(dim=1)
        shown = epochs % self.variants if self.variants else epochs
        crop, of_masks = self.crop_at(keys.epoch), self.mask_seeds(epochs, indices)
        draws = crop.draws(mix_all(self.seed, shown, indices, CROP))
        if self.stack is not None:
            rows = transfer(self.stack.rows[indices], self.stack.pixels.device)
            pixels = self.stack.pixels.index_select(0, rows)
            images = crop.of_many(self.levels.scale(pixels), draws)
            return MaskedBatch(images, of_masks, self.stack.numbers[indices], {})
        crops, read, skipped = zip(*map(partial(self._crop, crop), indices.tolist(), draws), strict=True)
        return MaskedBatch(_stacked(crops, self.levels), of_masks, torch.tensor(read), join_skipped(skipped))

    def pixels(self, batch: MaskedBatch, device: torch.device) -> Num[Tensor, "B C H W"]:
        """Copy the images of a batch to a device, as pixels of 0..255."""
        return batch.images if self.stack else self.levels.scale(transfer(batch.images, device))

    def mask_seeds(self, epochs: Int[Tensor, " B"], indices: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Compute the seeds of the masks of samples."""
        return mix_all(self.seed, epochs, indices, MASKS)

    def _crop(self, crop: RandomCrop, index: int, draws: np.ndarray) -> tuple[Tensor, int, dict[str, str]]:
        """Read an image, or the next one that decodes, no larger than its crop needs.

        Raises:
            DataError: If it has more than 8 bits, unlike all images that the range was measured on.
        """
        image, read, skipped = read_or_substitute(
            self.images, index, lambda height, width: crop.factor(draws, height, width)
        )
        if self.levels == BYTES:
            refuse_deep(image, self.images.name(read))
        return crop.of_one(image, draws), read, skipped


def _stacked(crops: Sequence[Tensor], levels: Levels) -> Num[Tensor, "B C h w"]:
    """Stack crops at their depth; where only some have 8 bits, scale these to the range of the deep ones."""
    if len({crop.dtype for crop in crops}) > 1:
        crops = [levels.widen(crop) for crop in crops]
    as_they_lie = [crop.permute(1, 2, 0) for crop in crops]  # channels last
    batch = room((len(crops), *as_they_lie[0].shape), crops[0].dtype)
    return torch.stack(as_they_lie, out=batch).permute(0, 3, 1, 2)
