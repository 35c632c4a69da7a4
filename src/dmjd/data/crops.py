"""What a step sees of an image: a random resized crop and a flip, a function of the sample's seed.

torchvision's `RandomResizedCrop` draws from the global generator and may draw ten times, so that neither can be
repeated for one sample alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Num
from torch import Tensor
from torch.nn.functional import interpolate

from dmjd.data.transfer import transfer
from dmjd.random import uniforms

IN_CACHE = 64  # images whose matrices stay in the cache of a CPU
FACTORS = (8, 4, 2)  # by which an image may be read smaller


class Box(NamedTuple):
    """Where an image is cut, in pixels, and whether the crop is mirrored, 0 or 1; or these of a batch, as arrays."""

    top: Any
    left: Any
    height: Any
    width: Any
    mirrored: Any


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

    def draws(self, seeds: Int[Tensor, " B"]) -> Float64[np.ndarray, "B 5"]:
        """Draw what is random about the crops of images, from a seed of each; on the CPU.

        Returns:
            Height and width of the box over the root of the image's area; where it lies between top and bottom and
            between left and right, 0 to 1; whether it is mirrored, 0 or 1.
        """
        area, shape, down, right, mirror = uniforms(seeds, 5).cpu().numpy().T
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = map(math.log, self.ratio)
        shape = np.exp(low + shape * (high - low))
        return np.stack([np.sqrt(area / shape), np.sqrt(area * shape), down, right, (mirror < 0.5) & self.flip], axis=1)

    def box(self, draws: Float64[np.ndarray, "*B 5"], height: int, width: int) -> Box:
        """Find the boxes of images of this size."""
        tall, wide, down, right, mirrored = draws.T
        root = math.sqrt(height * width)
        box_h = np.minimum(np.maximum(np.rint(tall * root), 1), height)
        box_w = np.minimum(np.maximum(np.rint(wide * root), 1), width)
        top, left = down * (height - box_h + 1), right * (width - box_w + 1)
        return Box(*(each.astype(np.int64) for each in (top, left, box_h, box_w, mirrored)))

    def factor(self, draws: Float64[np.ndarray, "5"], height: int, width: int) -> int:
        """Find how many times smaller an image may be read before its box has fewer pixels than the crop."""
        if min(height / self.size[0], width / self.size[1]) < FACTORS[-1]:
            return 1
        box = self.box(draws, height, width)
        largest = min(box.height / self.size[0], box.width / self.size[1])
        return next((factor for factor in FACTORS if factor <= largest), 1)

    def of_one(self, image: Num[Tensor, "C H W"], draws: Float64[np.ndarray, "5"]) -> Num[Tensor, "C h w"]:
        """Crop one image, at its depth."""
        box = self.box(draws, *image.shape[1:])
        crop = resize(image[:, box.top : box.top + box.height, box.left : box.left + box.width], self.size)
        return crop.flip(-1) if box.mirrored else crop

    def of_many(self, images: Num[Tensor, "B C H W"], draws: Float64[np.ndarray, "B 5"]) -> Num[Tensor, "B C h w"]:
        """Crop a batch of images of 0..255, uint8 or float32, where it is; within a level of what `of_one` does.

        Resampling is linear along rows and along columns: a product with one matrix per image for each. Bytes stay
        bytes: unrounded, flat parts of them would have faint edges, which a whitened target such as HOG makes loud.
        """
        box, (channels, height, width), (rows, columns) = (
            self.box(draws, *images.shape[2:]),
            images.shape[1:],
            self.size,
        )
        unmirrored = np.zeros_like(box.mirrored)
        down, down_of = _matrices(box.top, box.height, unmirrored, side=height, size=rows, device=images.device)
        across, across_of = _matrices(box.left, box.width, box.mirrored, side=width, size=columns, device=images.device)
        at_once = len(images) if images.is_cuda else IN_CACHE
        crops = images.new_empty(len(images), rows, channels * columns)
        for part, down_part, across_part, into in zip(
            *(each.split(at_once) for each in (images, down_of, across_of, crops)), strict=True
        ):
            # The channels of a row stand side by side.
            lines = part.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            narrow = lines.flatten(1, 2).bmm(across.index_select(0, across_part).mT).clamp_(0, 255)
            cut = down.index_select(0, down_part).bmm(narrow.view(len(part), height, -1)).clamp_(0, 255)
            into.copy_(cut.round_() if images.dtype == torch.uint8 else cut)
        return crops.unflatten(2, (channels, columns)).transpose(1, 2)


def _matrices(
    start: np.ndarray, length: np.ndarray, mirrored: np.ndarray, *, side: int, size: int, device: torch.device
) -> tuple[Float[Tensor, "n size side"], Int[Tensor, " B"]]:
    """Make the resampling matrices of a batch, and tell which of them each image takes.

    Boxes of small images are often the same, and so are their matrices.
    """
    places = (start * (side + 1) + length) * 2 + mirrored
    _, first, which = np.unique(places, return_index=True, return_inverse=True)
    different = transfer(torch.from_numpy(np.stack([start, length, mirrored])[:, first]), device)
    parts = different.split(len(first) if device.type == "cuda" else IN_CACHE, dim=1)
    matrices = [resampling(*part, side=side, size=size) for part in parts]
    return torch.cat(matrices), transfer(torch.from_numpy(which), device)


def resampling(
    start: Int[Tensor, " B"], length: Int[Tensor, " B"], mirrored: Int[Tensor, " B"], *, side: int, size: int
) -> Float[Tensor, "B size side"]:
    """Make the matrices that resample `length` pixels from `start` on, of `side`, to `size`: antialiased bicubic.

    A pixel of the result is a weighted mean of those around its middle. The weights are Keys' cubic with a = -1/2, made
    wider by the factor of the reduction, and cut off at the box: as Pillow and torch have them.
    """
    scale = (length.float() / size)[:, None, None]
    # Where pixels lie in the box; those outside of it are nowhere.
    places = torch.arange(side, device=start.device) - start[:, None]
    places = torch.where((places >= 0) & (places < length[:, None]), places + 0.5, torch.inf)[:, None, :]
    order = torch.arange(size, device=start.device)
    middles = (torch.where(mirrored[:, None] > 0, size - 1 - order, order)[:, :, None] + 0.5) * scale
    # The cubic in powers of what is left to its ends at 2 and at 1: u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    to_two = 2 - (places - middles).div_(scale.clamp(min=1.0)).abs_()
    to_two.clamp_(min=0)
    beyond = to_two - 1
    to_one = beyond.clamp(min=0)
    weights = (to_two * to_two).mul_(beyond.mul_(0.5)).add_((to_one * to_one).mul_(to_one.mul_(-2).add_(1)))
    return weights.div_(weights.sum(dim=2, keepdim=True))


def resize(image: Num[Tensor, "C H W"], size: tuple[int, int]) -> Num[Tensor, "C h w"]:
    """Resize an image (bicubic, antialiased) at its depth."""
    if tuple(image.shape[1:]) == size:
        return image
    known = image if image.dtype in (torch.uint8, torch.float32) else image.float()
    # Channels last is nearly twice as fast, copy included; `contiguous` would not see to the stride of a batch of one,
    # and torch would take what is left for channels first.
    known = known.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    resized = interpolate(known, size, mode="bicubic", antialias=True)[0]
    if resized.dtype == image.dtype:
        return resized
    info = torch.iinfo(image.dtype)
    return resized.round().clamp(info.min, info.max).to(image.dtype)


def center_crop(image: Num[Tensor, "C H W"], size: tuple[int, int]) -> Num[Tensor, "C h w"]:
    """Resize until the image just covers `size` and cut out the middle: what an evaluation sees."""
    factor = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    # A strip of 20 x 8000 would become one of 224 x 89,600: what is far from the middle goes first.
    near = [min(side, math.ceil(8 * target / factor)) for side, target in zip(image.shape[-2:], size, strict=True)]
    image = middle(image, near) if near != list(image.shape[-2:]) else image
    covered = [max(round(side * factor), target) for side, target in zip(image.shape[-2:], size, strict=True)]
    return middle(resize(image, (covered[0], covered[1])), list(size))


def middle(image: Num[Tensor, "C H W"], size: Sequence[int]) -> Num[Tensor, "C h w"]:
    """Cut out the middle; torchvision has this, and takes two seconds to be imported by every worker."""
    top, left = (round((side - wanted) / 2) for side, wanted in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
