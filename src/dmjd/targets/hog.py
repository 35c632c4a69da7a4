"""Histograms of oriented gradients as the target (the "superior target" of the paper's own recipe)."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.errors import ConfigError
from dmjd.targets.protocol import TargetRequest, register_target

NUM_BINS = 9  # of 20 degrees each: unsigned gradients span 180
AT_ONCE = 4  # images at a time on a CPU, so that intermediates of image size stay in its cache
STAR = 11  # side of a cell's picture, in pixels

# dmjd: as in the paper's official program. maskfeat: as in MaskFeat. mmpretrain: MaskFeat's with a Gaussian window.
HogVariant = Literal["dmjd", "maskfeat", "mmpretrain"]


def central(pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Compute central differences along columns and along rows; zero on the border."""
    rising, running = torch.zeros_like(pixels), torch.zeros_like(pixels)
    rising[..., 1:-1, :].copy_(pixels[..., 2:, :]).sub_(pixels[..., :-2, :])
    running[..., 1:-1].copy_(pixels[..., 2:]).sub_(pixels[..., :-2])
    return rising, running


def sobel(pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Compute Sobel gradients along rows and along columns, with reflection padding."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    across, down = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    rising = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    return rising, down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]


@torch.no_grad()
def hog_cells(
    images: Num[Tensor, "B C H W"], cell_size: int = 8, variant: HogVariant = "dmjd"
) -> Float[Tensor, "B C h w 9"]:
    """Sum gradient magnitudes by orientation over square cells: hard assignment, no normalisation over blocks.

    `dmjd` uses central differences and orientations atan2(row gradient, column gradient) modulo 180 degrees, and
    divides by the cell's area. `maskfeat` uses Sobel gradients and orientations atan2(column gradient, row gradient);
    `mmpretrain` also weights pixels with a Gaussian over windows of 2 x 2 cells, whose sigma is the side of a cell.
    """
    (height, width), device = images.shape[-2:], images.device
    row_H, column_W = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = height // cell_size, width // cell_size
    cell_HW = (row_H // cell_size)[:, None] * columns + column_W // cell_size
    place_H, place_W = (((side % (2 * cell_size) + 0.5) / cell_size - 1).square() for side in (row_H, column_W))
    window_HW = torch.exp(-0.5 * (place_H[:, None] + place_W))
    cells = []
    for part in images.split(AT_ONCE if device.type == "cpu" and not torch.compiler.is_compiling() else len(images)):
        rising, running = (central if variant == "dmjd" else sobel)(
            part.to(torch.promote_types(part.dtype, torch.float32))
        )
        magnitude = torch.hypot(rising, running)
        magnitude = magnitude * window_HW if variant == "mmpretrain" else magnitude
        orientation = (torch.atan2(rising, running) * (NUM_BINS / math.pi)).floor() % NUM_BINS
        places = (cell_HW * NUM_BINS + orientation.long()).flatten(2)
        sums = magnitude.new_zeros(*places.shape[:2], rows * columns * NUM_BINS)
        cells.append(sums.scatter_add_(2, places, magnitude.flatten(2)).unflatten(2, (rows, columns, NUM_BINS)))
    return torch.cat(cells) / (cell_size**2 if variant == "dmjd" else 1)


def hog(
    images: Num[Tensor, "B C H W"], patch_size: int = 16, *, cell_size: int | None = None, variant: HogVariant = "dmjd"
) -> Float[Tensor, "B L T"]:
    """Compute HOG targets of images of 0..255, T = (patch_size / cell_size)^2 * 9 * C.

    `cell_size` is the side of a cell in pixels, by default that of `default_cell_size`.
    `dmjd` standardises the bins of every cell (LayerNorm without affine); within a token the order is (cell row, cell
    column, bin, channel). `maskfeat` and `mmpretrain` divide them by their L2 norm; the order is (channel, bin, cell
    row, cell column).

    Raises:
        ValueError: If a patch does not consist of whole cells or the image of whole patches.
    """
    height, width = images.shape[-2:]
    cell_size = cell_size or default_cell_size(patch_size)
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
    """`hog` as a target.

    Args:
        patch_size: Side of a token, in pixels.
        in_chans: Channels of an image; each has its own histograms.
        cell_size: Side of a cell, in pixels.
        variant: Which definition of HOG, see `hog_cells`.

    Raises:
        ConfigError: If a patch does not consist of whole cells.
    """

    backdrop: Literal["image", "target"] = "target"
    caption = "Each star shows the edge directions of one cell, which are its histogram of oriented gradients."

    def __init__(self, patch_size: int = 16, *, in_chans: int = 3, cell_size: int = 8, variant: HogVariant = "dmjd"):
        super().__init__()
        if patch_size % cell_size:
            sizes = f"hog.cell_size {cell_size}, model.patch_size {patch_size}"
            raise ConfigError(f"a patch does not consist of whole HOG cells; {sizes}; choose a cell that divides it")
        self.patch_size, self.cell_size, self.variant = patch_size, cell_size, variant
        self.dim = (patch_size // cell_size) ** 2 * NUM_BINS * in_chans
        self.widths: tuple[int, ...] = (self.dim,)

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        return hog(images, self.patch_size, cell_size=self.cell_size, variant=self.variant)

    def picture(
        self, values: Float[Tensor, "L T"], image: UInt8[Tensor, "C H W"], truth: Float[Tensor, "n L T"]
    ) -> UInt8[Tensor, "1 h w"]:
        """Draw a star of strokes for each cell, whose brightness is the positive part of the bins' mean over channels.

        White is 2 for standardised bins (a bin that is alone in its cell reaches sqrt(8)), otherwise 1.
        """
        cells, whitened = self.patch_size // self.cell_size, self.variant == "dmjd"
        shape = (cells, cells, NUM_BINS, -1) if whitened else (-1, NUM_BINS, cells, cells)
        bins = values.float().cpu().nan_to_num().unflatten(1, shape)
        bins = bins.mean(dim=-1) if whitened else bins.mean(dim=1).permute(0, 2, 3, 1)  # L i j bin
        strength = (bins / (2 if whitened else 1)).clamp(0, 1)[..., None, None]
        # The other variants swap the arguments of atan2.
        edges = strokes(STAR) if whitened else strokes(STAR).mT
        stars = (strength * edges).amax(dim=3)  # L i j STAR STAR
        stars = stars.unflatten(0, (image.shape[-2] // self.patch_size, -1))
        picture = stars.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        return ((picture * 15).round() * 17).to(torch.uint8)[None]  # 16 levels: a small file


def strokes(size: int) -> Float[Tensor, "bins {size} {size}"]:
    """Draw a line through the centre for each bin, along the edge and thus perpendicular to the bin's gradient.

    The gradient of a bin has the direction (column, row) = (cos, sin) of its angle, as in `dmjd`.
    """
    angle = ((torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) * (math.pi / NUM_BINS))[:, None, None]
    place = torch.arange(size, dtype=torch.float64) - size // 2
    across = (place * angle.cos() + place[:, None] * angle.sin()).abs()
    return (1.2 - across).clamp(0, 1) * (torch.hypot(place[:, None], place) < size / 2)


def default_cell_size(patch_size: int) -> int:
    """Choose the side of a cell: 8 for patches of 16, 24, 32 ..., else half a patch, or all of a small or odd one."""
    if patch_size >= 16 and patch_size % 8 == 0:
        return 8
    # Cells smaller than 4 x 4 pixels have too few gradients for a histogram of nine bins.
    return patch_size // 2 if patch_size % 2 == 0 and patch_size >= 8 else patch_size


@register_target("hog")
def build_hog(request: TargetRequest) -> HOG:
    """Build the target `hog` for an encoder's tokens."""
    request.refuse_argument()
    patch_size = request.encoder.patch_size
    return HOG(
        patch_size,
        in_chans=request.in_chans,
        cell_size=request.option("hog", "cell_size", default_cell_size(patch_size)),
        variant=request.option("hog", "variant", "dmjd"),
    )
