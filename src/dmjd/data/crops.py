"""What a step sees of an image: a random resized crop and a flip, from the sample's own generator."""

import math

import torch
from jaxtyping import UInt8
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import InterpolationMode


def random_crop(
    image: UInt8[Tensor, "C H W"],
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    generator: Generator,
) -> UInt8[Tensor, "C h w"]:
    """Cut out a random box, resize it (bicubic, antialiased) and mirror every other one.

    The box's area is uniform in `scale` of the image's, its width over height log-uniform in `ratio`; a box that does
    not fit is clipped to the image. torchvision's `RandomResizedCrop` draws from the global generator and may draw ten
    times, so that neither can be repeated for one sample alone.
    """
    height, width = image.shape[-2:]
    area, shape, down, right, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    shape = math.exp(math.log(ratio[0]) + shape * (math.log(ratio[1]) - math.log(ratio[0])))
    box_h = min(max(round(math.sqrt(area / shape)), 1), height)
    box_w = min(max(round(math.sqrt(area * shape)), 1), width)
    top, left = int(down * (height - box_h + 1)), int(right * (width - box_w + 1))
    box = image[:, top : top + box_h, left : left + box_w]
    box = F.resize(box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return box.flip(-1) if flip and mirror < 0.5 else box


def center_crop(image: UInt8[Tensor, "C H W"], size: tuple[int, int]) -> UInt8[Tensor, "C h w"]:
    """Resize until the image just covers `size` and cut out the middle: what an evaluation sees."""
    factor = max(size[0] / image.shape[-2], size[1] / image.shape[-1])
    covered = [max(round(side * factor), target) for side, target in zip(image.shape[-2:], size, strict=True)]
    return F.center_crop(F.resize(image, covered, interpolation=InterpolationMode.BICUBIC, antialias=True), list(size))
