"""Histograms of oriented gradients as the target (the "superior target" of the paper's own recipe)."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BINS = 9  # of 20 degrees each: unsigned gradients span 180


@torch.no_grad()
def hog_cells(images: Num[Tensor, "B C H W"], cell_size: int = 8) -> Float[Tensor, "B C h w 9"]:
    """Sum gradient magnitudes by orientation over square cells, divided by the cell's area; no block normalisation.

    A gradient is the difference of the two neighbours, zero on the border rows and columns; its orientation is
    atan2(row gradient, column gradient) modulo 180 degrees, hard-assigned to a bin.
    """
    pixels = images.float()
    across, down = torch.zeros_like(pixels), torch.zeros_like(pixels)
    torch.sub(pixels[..., 2:], pixels[..., :-2], out=across[..., 1:-1])
    torch.sub(pixels[..., 2:, :], pixels[..., :-2, :], out=down[..., 1:-1, :])
    magnitude = torch.hypot(across, down)
    # Turn every gradient into the upper half plane: there its angle has passed a bin's border exactly where the cross
    # product with the border's direction is not negative. Cheaper than atan2, and nothing rounds past the last bin.
    turned = (down < 0) | ((down == 0) & (across < 0))
    across, down = torch.where(turned, -across, across), torch.where(turned, -down, down)
    cells, passed = [], torch.ones_like(turned)
    for border in range(1, NUM_BINS + 1):
        angle = math.pi * border / NUM_BINS
        last = border == NUM_BINS
        passed_next = torch.zeros_like(turned) if last else down * math.cos(angle) >= across * math.sin(angle)
        cells.append(F.avg_pool2d(magnitude * (passed & ~passed_next), cell_size))
        passed = passed_next
    return torch.stack(cells, dim=-1)


def hog(images: Num[Tensor, "B C H W"], patch_size: int = 16, *, cell_size: int = 8) -> Float[Tensor, "B L T"]:
    """Compute HOG targets of images of 0..255, whitened over the bins of every cell (LayerNorm without affine).

    Inside a token the order is (cell row, cell column, bin, channel), T = (patch_size / cell_size)^2 * 9 * C.

    Raises:
        ValueError: If the patch does not consist of whole cells or the image of whole patches.
    """
    height, width = images.shape[-2:]
    if patch_size % cell_size or height % patch_size or width % patch_size:
        sizes = f"{height} x {width} px, patch_size {patch_size}, cell_size {cell_size}"
        raise ValueError(f"HOG needs images of whole patches and patches of whole cells: {sizes}")
    cells_BChw9 = F.layer_norm(hog_cells(images, cell_size), (NUM_BINS,), eps=1e-5)
    (batch_size, channels), side = images.shape[:2], patch_size // cell_size
    tokens = cells_BChw9.reshape(batch_size, channels, height // patch_size, side, width // patch_size, side, NUM_BINS)
    return tokens.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)


class HOG(nn.Module):
    """`hog` as a target; raises `ValueError` where a patch of `patch_size` px does not consist of whole cells."""

    def __init__(self, patch_size: int = 16, *, in_chans: int = 3, cell_size: int = 8):
        super().__init__()
        if patch_size % cell_size:
            raise ValueError(f"cell_size {cell_size} does not divide patch_size {patch_size}")
        self.patch_size, self.cell_size = patch_size, cell_size
        self.dim = (patch_size // cell_size) ** 2 * NUM_BINS * in_chans

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        return hog(images, self.patch_size, cell_size=self.cell_size)
