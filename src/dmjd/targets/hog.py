"""Histograms of oriented gradients as the target (the "superior target" of the paper's own recipe)."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BINS = 9  # of 20 degrees each: unsigned gradients span 180
AT_ONCE = 4  # images; all that is as large as the images then stays in the cache of a CPU, and small on a GPU

# dmjd: the official program of the paper. maskfeat: MaskFeat's own. mmpretrain: the same with a Gaussian window.
HogVariant = Literal["dmjd", "maskfeat", "mmpretrain"]


def central(pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Subtract the two neighbours, along columns and along rows; zero on the border."""
    rising, running = torch.zeros_like(pixels), torch.zeros_like(pixels)
    torch.sub(pixels[..., 2:, :], pixels[..., :-2, :], out=rising[..., 1:-1, :])
    torch.sub(pixels[..., 2:], pixels[..., :-2], out=running[..., 1:-1])
    return rising, running


def sobel(pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Subtract the two neighbours, smoothed by 1 2 1, along rows and along columns; the image is reflected."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    rising = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    return rising, down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]


@torch.no_grad()
def hog_cells(
    images: Num[Tensor, "B C H W"], cell_size: int = 8, variant: HogVariant = "dmjd"
) -> Float[Tensor, "B C h w 9"]:
    """Sum gradient magnitudes by orientation over square cells: hard assignment, no normalisation over blocks.

    `dmjd` takes central differences, orientations atan2(row gradient, column gradient) modulo 180 degrees, and divides
    by the cell's area. `maskfeat` takes Sobel's gradients and orientations atan2(column gradient, row gradient);
    `mmpretrain` moreover weighs pixels by a Gaussian of a cell's side as its deviation, over windows of 2 x 2 cells.
    """
    (height, width), device = images.shape[-2:], images.device
    row_H, column_W = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = height // cell_size, width // cell_size
    cell_HW = (row_H // cell_size)[:, None] * columns + column_W // cell_size
    place_H, place_W = (((side % (2 * cell_size) + 0.5) / cell_size - 1).square() for side in (row_H, column_W))
    window_HW = torch.exp(-0.5 * (place_H[:, None] + place_W))
    cells = []
    for part in images.split(AT_ONCE):
        rising, running = (central if variant == "dmjd" else sobel)(part.float())
        magnitude = torch.hypot(rising, running)
        magnitude = magnitude * window_HW if variant == "mmpretrain" else magnitude
        orientation = (torch.atan2(rising, running) * (NUM_BINS / math.pi)).floor() % NUM_BINS
        places = (cell_HW * NUM_BINS + orientation.long()).flatten(2)
        sums = torch.zeros(*places.shape[:2], rows * columns * NUM_BINS, device=device)
        cells.append(sums.scatter_add_(2, places, magnitude.flatten(2)).unflatten(2, (rows, columns, NUM_BINS)))
    return torch.cat(cells) / (cell_size**2 if variant == "dmjd" else 1)


def hog(
    images: Num[Tensor, "B C H W"], patch_size: int = 16, *, cell_size: int = 8, variant: HogVariant = "dmjd"
) -> Float[Tensor, "B L T"]:
    """Compute HOG targets of images of 0..255, T = (patch_size / cell_size)^2 * 9 * C.

    `dmjd` whitens the bins of every cell (LayerNorm without affine); inside a token the order is (cell row, cell
    column, bin, channel). `maskfeat` and `mmpretrain` divide them by their L2 norm; the order is (channel, bin, cell
    row, cell column).

    Raises:
        ValueError: If the patch does not consist of whole cells or the image of whole patches.
    """
    height, width = images.shape[-2:]
    if patch_size % cell_size or height % patch_size or width % patch_size:
        sizes = f"{height} x {width} px, patch_size {patch_size}, cell_size {cell_size}"
        raise ValueError(f"HOG needs images of whole patches and patches of whole cells: {sizes}")
    cells_BChw9 = hog_cells(images, cell_size, variant)
    whitened = variant == "dmjd"
    cells_BChw9 = F.layer_norm(cells_BChw9, (NUM_BINS,)) if whitened else F.normalize(cells_BChw9, dim=-1)
    (batch_size, channels), side = images.shape[:2], patch_size // cell_size
    tokens = cells_BChw9.reshape(batch_size, channels, height // patch_size, side, width // patch_size, side, NUM_BINS)
    return tokens.permute(0, 2, 4, *((3, 5, 6, 1) if whitened else (1, 6, 3, 5))).flatten(3).flatten(1, 2)


class HOG(nn.Module):
    """`hog` as a target; raises `ValueError` where a patch of `patch_size` px does not consist of whole cells."""

    def __init__(self, patch_size: int = 16, *, in_chans: int = 3, cell_size: int = 8, variant: HogVariant = "dmjd"):
        super().__init__()
        if patch_size % cell_size:
            raise ValueError(f"cell_size {cell_size} does not divide patch_size {patch_size}")
        self.patch_size, self.cell_size, self.variant = patch_size, cell_size, variant
        self.dim = (patch_size // cell_size) ** 2 * NUM_BINS * in_chans

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        return hog(images, self.patch_size, cell_size=self.cell_size, variant=self.variant)
