"""Augmentation for pre-training: a random resized crop and a flip, a function of the sample's seed.

torchvision's `RandomResizedCrop` draws from the global generator, up to ten times, so that one sample cannot be
repeated by itself.
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
FACTORS = (8, 4, 2)  # by which decoding may scale an image down


class Box(NamedTuple):
    """The box of a crop, in pixels, and whether the crop is mirrored, 0 or 1; or these of a batch, as arrays."""

    top: Any
    left: Any
    height: Any
    width: Any
    mirrored: Any


@dataclass(frozen=True)
class RandomCrop:
    """Cuts out a random box, resizes it (bicubic, antialiased) and mirrors half of the crops.

    Attributes:
        size: Height and width of a crop, in pixels.
        scale: Range of the box's area over the image's; uniform.
        ratio: Range of the box's width over its height; log-uniform. A box that does not fit is clipped to the image.
        flip: Whether to mirror with probability 1/2.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: bool

    def draws(self, seeds: Int[Tensor, " B"]) -> Float64[np.ndarray, "B 5"]:
        """Draw the random numbers for the crops of images, from a seed of each; on the CPU.

        Returns:
            Height and width of the box over the square root of the image's area; its position from top to bottom and
            from left to right, 0 to 1; whether it is mirrored, 0 or 1.
        """
        area, shape, down, right, mirror = uniforms(seeds, 5).cpu().numpy().T
        area = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = map(math.log, self.ratio)
        shape = np.exp(low + shape * (high - low))
        return np.stack([np.sqrt(area / shape), np.sqrt(area * shape), down, right, (mirror < 0.5) & self.flip], axis=1)

    def box(self, draws: Float64[np.ndarray, "*B 5"], height: int, width: int) -> Box:
        """Compute the boxes in images of this size."""
        tall, wide, down, right, mirrored = draws.T
        root = math.sqrt(height * width)
        box_h = np.minimum(np.maximum(np.rint(tall * root), 1), height)
        box_w = np.minimum(np.maximum(np.rint(wide * root), 1), width)
        top, left = down * (height - box_h + 1), right * (width - box_w + 1)
        return Box(*(each.astype(np.int64) for each in (top, left, box_h, box_w, mirrored)))

    def factor(self, draws: Float64[np.ndarray, "5"], height: int, width: int) -> int:
        """Find by which factor an image may be scaled down before its box has fewer pixels than the crop."""
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
        """Crop a batch of images of 0..255, uint8 or float32, on its device; within one grey level of `of_one`.

        Resampling is linear along rows and along columns: per image, one matrix product for each. Bytes stay bytes:
        unrounded, their flat areas would have faint edges, which a whitened target such as HOG amplifies.
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
            # The channels of a row lie side by side.
            lines = part.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            narrow = lines.flatten(1, 2).bmm(across.index_select(0, across_part).mT).clamp_(0, 255)
            cut = down.index_select(0, down_part).bmm(narrow.view(len(part), height, -1)).clamp_(0, 255)
            into.copy_(cut.round_() if images.dtype == torch.uint8 else cut)
        return crops.unflatten(2, (channels, columns)).transpose(1, 2)


def _matrices(
    start: np.ndarray, length: np.ndarray, mirrored: np.ndarray, *, side: int, size: int, device: torch.device
) -> tuple[Float[Tensor, "n size side"], Int[Tensor, " B"]]:
    """Compute the distinct resampling matrices of a batch, and which of them each image uses.

    Small images often have the same box, and so the same matrix.
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
    """Compute the matrices that resample `length` of `side` pixels, from `start` on, to `size`: antialiased bicubic.

    A pixel of the result is a weighted mean of the pixels around its centre. The weights are Keys' cubic with a = -1/2,
    widened by the reduction factor and cut off at the box, as in Pillow and torch.
    """
    scale = (length.float() / size)[:, None, None]
    # Positions of pixels in the box; those outside it are at infinity, and so have no weight.
    places = torch.arange(side, device=start.device) - start[:, None]
    places = torch.where((places >= 0) & (places < length[:, None]), places + 0.5, torch.inf)[:, None, :]
    order = torch.arange(size, device=start.device)
    middles = (torch.where(mirrored[:, None] > 0, size - 1 - order, order)[:, :, None] + 0.5) * scale
    # The cubic in the distances u and v to its ends at 2 and at 1: u^2 (u - 1) / 2 + v^2 (1 - 2 v).
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
    # Channels last is nearly twice as fast, copy included. `contiguous` of a batch of one would keep its strides, which
    # torch would take for channels first.
    known = known.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    resized = interpolate(known, size, mode="bicubic", antialias=True)[0]
    if resized.dtype == image.dtype:
        return resized
    info = torch.iinfo(image.dtype)
    return resized.round().clamp(info.min, info.max).to(image.dtype)


def center_crop(image: Num[Tensor, "C H W"], size: tuple[int, int]) -> Num[Tensor, "C h w"]:
    """Resize an image so that it just covers `size`, and cut out the middle: the input of evaluations."""
    factor = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    # A strip of 20 x 8000 would become one of 224 x 89,600, so its ends are cut off before resizing.
    near = [min(side, math.ceil(8 * target / factor)) for side, target in zip(image.shape[-2:], size, strict=True)]
    image = middle(image, near) if near != list(image.shape[-2:]) else image
    covered = [max(round(side * factor), target) for side, target in zip(image.shape[-2:], size, strict=True)]
    return middle(resize(image, (covered[0], covered[1])), list(size))


def middle(image: Num[Tensor, "C H W"], size: Sequence[int]) -> Num[Tensor, "C h w"]:
    """Cut out the middle. torchvision's function would do, but takes every worker two seconds to import."""
    top, left = (round((side - wanted) / 2) for side, wanted in zip(image.shape[-2:], size, strict=True))
    return image[..., top : top + size[0], left : left + size[1]]
