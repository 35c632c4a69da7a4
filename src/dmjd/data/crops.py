"""What a step sees of an image: a random resized crop and a flip, a function of the sample's seed.

torchvision's `RandomResizedCrop` draws from the global generator and may draw ten times, so that neither can be
repeated for one sample alone.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode

from dmjd.random import uniforms

IN_CACHE = 128  # images whose matrices stay in the cache of a CPU
FACTORS = (8, 4, 2)  # by which an image may be read smaller


@dataclass(frozen=True)
class Boxes:
    """A box of each of B images, in pixels, and whether it is mirrored."""

    top: Int[Tensor, " B"]
    left: Int[Tensor, " B"]
    height: Int[Tensor, " B"]
    width: Int[Tensor, " B"]
    mirrored: Bool[Tensor, " B"]

    def to(self, device: torch.device) -> "Boxes":
        """Copy them to a device, without waiting for it."""
        return Boxes(*(each.to(device, non_blocking=True) for each in vars(self).values()))


@dataclass(frozen=True)
class RandomCrop:
    """Cuts out a random box, resizes it (bicubic, antialiased) and mirrors every other one.

    Attributes:
        size: Height and width of a crop, in pixels.
        scale: Range of the box's area over the image's; uniform.
        ratio: Range of the box's width over its height; log-uniform. A box that does not fit is clipped to the image.
        flip: Mirror every other crop.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool

    def boxes(self, seeds: Int[Tensor, " B"], heights: Int[Tensor, " B"], widths: Int[Tensor, " B"]) -> Boxes:
        """Draw the boxes of images of these sizes, on the CPU: a logarithm need not have the same bits elsewhere."""
        area, shape, down, right, mirror = uniforms(seeds, 5).unbind(dim=1)
        low, high = map(math.log, self.ratio)
        area = heights * widths * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        shape = (low + shape * (high - low)).exp()
        height = (area / shape).sqrt().round().long().clamp(min=1).minimum(heights)
        width = (area * shape).sqrt().round().long().clamp(min=1).minimum(widths)
        top = (down * (heights - height + 1)).long()
        left = (right * (widths - width + 1)).long()
        return Boxes(top, left, height, width, (mirror < 0.5) & self.flip)

    def factor(self, seeds: Int[Tensor, " 1"], height: int, width: int) -> int:
        """Find how many times smaller an image may be read before its box has fewer pixels than the crop."""
        box = self.boxes(seeds, torch.tensor([height]), torch.tensor([width]))
        largest = min(int(box.height) / self.size[0], int(box.width) / self.size[1])
        return next((factor for factor in FACTORS if factor <= largest), 1)

    def of_one(self, image: Num[Tensor, "C H W"], seeds: Int[Tensor, " 1"]) -> Num[Tensor, "C h w"]:
        """Crop one image, at its depth."""
        box = self.boxes(seeds, *(torch.tensor([side]) for side in image.shape[1:]))
        top, left, height, width = (int(each) for each in (box.top, box.left, box.height, box.width))
        crop = resize(image[:, top : top + height, left : left + width], self.size)
        return crop.flip(-1) if box.mirrored else crop

    def of_many(self, images: Num[Tensor, "B C H W"], seeds: Int[Tensor, " B"]) -> Float[Tensor, "B C h w"]:
        """Crop a batch of images of 0..255 where it is; rounding is left out, and else this is what `of_one` does.

        Resampling is linear along rows and along columns: a product with one matrix per image for each.
        """
        sides = (torch.full_like(seeds, side) for side in images.shape[2:])
        box = self.boxes(seeds, *sides).to(images.device)
        at_once = len(seeds) if images.is_cuda else IN_CACHE
        parts = zip(images.split(at_once), *(each.split(at_once) for each in vars(box).values()), strict=True)
        return torch.cat([self._resample(part, Boxes(*sides)) for part, *sides in parts])

    def _resample(self, images: Tensor, box: Boxes) -> Tensor:
        (channels, height, width), (rows, columns) = images.shape[1:], self.size
        down = resampling(box.top, box.height, torch.zeros_like(box.mirrored), side=height, size=rows)
        across = resampling(box.left, box.width, box.mirrored, side=width, size=columns)
        narrow = images.float().flatten(1, 2).bmm(across.mT).clamp_(0, 255)
        narrow = narrow.unflatten(1, (channels, height)).transpose(1, 2).flatten(2)  # all channels side by side
        return down.bmm(narrow).clamp_(0, 255).unflatten(2, (channels, columns)).transpose(1, 2)


def resampling(
    start: Int[Tensor, " B"], length: Int[Tensor, " B"], mirrored: Bool[Tensor, " B"], *, side: int, size: int
) -> Float[Tensor, "B size side"]:
    """Make the matrices that resample `length` pixels from `start` on, of `side`, to `size`: antialiased bicubic.

    A pixel of the result is a weighted mean of those around its middle. The weights are Keys' cubic with a = -1/2, made
    wider by the factor of the reduction, and cut off at the box: as Pillow and torch have them.
    """
    scale = (length.float() / size)[:, None, None]
    places = (
        torch.arange(side, device=start.device) - start[:, None]
    )  # of the pixels in the box; those outside: nowhere
    places = torch.where((places >= 0) & (places < length[:, None]), places + 0.5, torch.inf)[:, None, :]
    order = torch.arange(size, device=start.device)
    middles = (torch.where(mirrored[:, None], size - 1 - order, order)[:, :, None] + 0.5) * scale
    # The cubic in powers of what is left to its ends at 2 and at 1: u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    to_two = (places - middles).div_(scale.clamp(min=1.0)).abs_().neg_().add_(2).clamp_(min=0)
    to_one = (to_two - 1).clamp_(min=0)
    weights = (to_two * to_two).mul_((to_two - 1).mul_(0.5)).add_((to_one * to_one).mul_(1 - 2 * to_one))
    return weights.div_(weights.sum(dim=2, keepdim=True))


def resize(image: Num[Tensor, "C H W"], size: tuple[int, int]) -> Num[Tensor, "C h w"]:
    """Resize an image (bicubic, antialiased) at its depth."""
    if image.dtype in (torch.uint8, torch.float32):
        return F.resize(image, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    info = torch.iinfo(image.dtype)
    resized = F.resize(image.float(), list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized.round().clamp(info.min, info.max).to(image.dtype)


def center_crop(image: Num[Tensor, "C H W"], size: tuple[int, int]) -> Num[Tensor, "C h w"]:
    """Resize until the image just covers `size` and cut out the middle: what an evaluation sees."""
    factor = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    # A strip of 20 x 8000 would become one of 224 x 89,600: what is far from the middle goes first.
    near = [min(side, math.ceil(8 * target / factor)) for side, target in zip(image.shape[-2:], size, strict=True)]
    image = F.center_crop(image, near) if near != list(image.shape[-2:]) else image
    covered = [max(round(side * factor), target) for side, target in zip(image.shape[-2:], size, strict=True)]
    return F.center_crop(resize(image, (covered[0], covered[1])), list(size))
