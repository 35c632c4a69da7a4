"""Normalisation of pixels for a network."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

# Mean and standard deviation of the channels, for values in 0..1: ImageNet's for colour, round numbers for grey.
STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.5,), (0.25,)),
}


def default_statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel for images of which nothing else is known."""
    return STATISTICS.get(in_chans, ((0.5,) * in_chans, (0.25,) * in_chans))


class Normalize(nn.Module):
    """Pixels of 0..255, standardised with the mean and standard deviation of their channel.

    Args:
        mean: Mean of every channel, for values in 0..1.
        std: Standard deviation of every channel, for values in 0..1.

    Attributes:
        statistics: Mean and standard deviation as plain numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.statistics: tuple[list[float], list[float]] = (list(mean), list(std))
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise pixels of 0..255, uint8 or float; the result has the dtype of the module's buffers.

        Raises:
            ValueError: If the images have another number of channels.
        """
        if images.shape[-3] != len(self.mean):  # a single channel would silently be broadcast
            raise ValueError(f"images of {images.shape[-3]} channel(s), not {len(self.mean)}")
        return ((images / 255 - self.mean) / self.std).to(self.mean.dtype)
