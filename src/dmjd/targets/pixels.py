"""Pixels as the target (MAE)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn


def patchify(images: Num[Tensor, "B C H W"], patch_size: int) -> Num[Tensor, "B L T"]:
    """Cut images into patches: T = patch_size^2 * C in (row, column, channel) order, tokens in raster order."""
    rows = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # B C h w p p
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class Pixels(nn.Module):
    """The pixels of a token's patch, normalised by the data's mean and standard deviation.

    Args:
        patch_size: Side of a token, in pixels.
        mean: Mean of every channel, for values in 0..1.
        std: Standard deviation of every channel, for values in 0..1.
        standardize: Standardise each patch by its own mean and (unbiased) variance as well (MAE, section 3).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int, *, mean: Sequence[float], std: Sequence[float], standardize: bool = False):
        super().__init__()
        self.patch_size, self.standardize = patch_size, standardize
        self.dim = patch_size**2 * len(mean)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        patches_BLT = patchify((images / 255 - self.mean) / self.std, self.patch_size)
        if self.standardize:
            variance, mean = torch.var_mean(patches_BLT, dim=-1, keepdim=True)
            patches_BLT = (patches_BLT - mean) / (variance + 1e-6).sqrt()
        return patches_BLT
