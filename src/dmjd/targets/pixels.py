"""Pixels as the target (MAE)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn

from dmjd.backbones.normalize import Normalize
from dmjd.targets.protocol import TargetRequest, register_target


def patchify(images: Num[Tensor, "B C H W"], patch_size: int) -> Num[Tensor, "B L T"]:
    """Cut images into patches: T = patch_size^2 * C in (row, column, channel) order, tokens in raster order."""
    rows = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # B C h w p p
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Num[Tensor, "L T"], grid: tuple[int, int], patch_size: int) -> Num[Tensor, "C H W"]:
    """Put the patches of one image back together."""
    patches = tokens.unflatten(1, (patch_size, patch_size, -1)).unflatten(0, grid)  # h w p p C
    return patches.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


class Pixels(nn.Module):
    """The pixels of a token's patch, normalised by the data's mean and standard deviation.

    Args:
        patch_size: Side of a token, in pixels.
        mean: Mean of every channel, for values in 0..1.
        std: Standard deviation of every channel, for values in 0..1.
        standardize: Standardise each patch by its own mean and (unbiased) variance as well (MAE, section 3).
    """

    backdrop: Literal["image", "target"] = "image"

    def __init__(self, patch_size: int, *, mean: Sequence[float], std: Sequence[float], standardize: bool = False):
        super().__init__()
        self.patch_size, self.standardize = patch_size, standardize
        self.dim = patch_size**2 * len(mean)
        self.widths: tuple[int, ...] = (self.dim,)
        self.normalize = Normalize(mean, std)
        self.caption = (
            "Pixels are normalised in each patch, so a predicted patch is drawn with the brightness and contrast of "
            "the true one."
            if standardize
            else "Pixels are predicted as they are."
        )

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        patches_BLT = patchify(self.normalize(images), self.patch_size)
        if self.standardize:
            mean, deviation = self._statistics(patches_BLT)
            patches_BLT = (patches_BLT - mean) / deviation
        return patches_BLT

    def picture(
        self, values: Float[Tensor, "L T"], image: UInt8[Tensor, "C H W"], truth: Float[Tensor, "n L T"]
    ) -> UInt8[Tensor, "c H W"]:
        """Draw values as pixels by undoing the normalisation.

        Standardised patches have lost their brightness and contrast; both are taken from the true patches of `image`,
        as in MAE's pictures.
        """
        values, normalize = values.cpu().double(), Normalize(*self.normalize.statistics)
        if self.standardize:
            mean, deviation = self._statistics(patchify(normalize(image[None].cpu().double()), self.patch_size)[0])
            values = values * deviation + mean
        grid = image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size
        pixels = unpatchify(values, grid, self.patch_size) * normalize.std + normalize.mean
        return (pixels.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)

    @staticmethod
    def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()


@register_target("pixels")
def build_pixels(request: TargetRequest) -> Pixels:
    """Build the target `pixels` for an encoder's tokens."""
    return _build(request, standardize=False)


@register_target("normalized_pixels")
def build_normalized_pixels(request: TargetRequest) -> Pixels:
    """Build the target `normalized_pixels` for an encoder's tokens."""
    return _build(request, standardize=True)


def _build(request: TargetRequest, *, standardize: bool) -> Pixels:
    request.refuse_argument()
    mean, std = request.normalize.statistics
    return Pixels(request.encoder.patch_size, mean=mean, std=std, standardize=standardize)
