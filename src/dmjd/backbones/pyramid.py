"""Maps at strides 4, 8, 16 and 32 from any backbone, for images of any size: the input of dense tasks."""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.windows import Windows


class Pyramid(nn.Module):
    """Four maps of a backbone.

    A backbone with stages (the hybrid, any convolutional network) provides its own maps at these strides; for a missing
    stride, the nearest map is resized. A plain ViT has one map, from which transposed convolutions and pooling make
    four (the simple feature pyramid of ViTDet, Li et al. 2022, section 3).

    Args:
        backbone: A timm model with `feature_info` and `forward_intermediates`, without a classifier.
        window: Side, in tokens, of the windows that most blocks of a ViT attend in; None for all tokens.

    Attributes:
        channels: Widths of the maps.
        levels: The trainable layers outside the backbone.

    Raises:
        ValueError: If the backbone has no maps, or if windows are requested and it is not a ViT.
    """

    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)

    def __init__(self, backbone: nn.Module, window: int | None = None):
        super().__init__()
        info: Any = getattr(backbone, "feature_info", None)
        if info is None or not hasattr(backbone, "forward_intermediates"):
            raise ValueError("the backbone has no feature maps")
        take_any_size(backbone)
        self.backbone = backbone
        reductions, widths = [each["reduction"] for each in info], [each["num_chs"] for each in info]
        self.multiple = max(32, *reductions) if len({*reductions}) > 1 else reductions[-1]
        if len({*reductions}) == 1:
            self.layers = [len(reductions) - 1]
            ups = [max(round(math.log2(reductions[-1] / stride)), 0) for stride in self.strides]
            self.levels = nn.ModuleList(level(widths[-1], up) for up in ups)
            self.channels = [widths[-1] >> up for up in ups]
        else:
            self.layers = [nearest(stride, reductions) for stride in self.strides]
            self.channels = [widths[layer] for layer in self.layers]
            self.levels = nn.ModuleList(nn.Identity() for _ in self.strides)

        self.windows = Windows(backbone, window) if window else None
        self.multiple *= window or 1

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B D h w"]]:
        """Compute the maps of normalised images; map s has ceil(H / s) rows and ceil(W / s) columns."""
        height, width = images.shape[-2:]
        down, right = (-side % self.multiple for side in (height, width))
        backbone: Any = self.backbone
        indices = sorted({*self.layers})
        if self.windows:
            patch = self.multiple // self.windows.size
            self.windows.grid = ((height + down) // patch, (width + right) // patch)
        found = backbone.forward_intermediates(
            F.pad(images, (0, right, 0, down)), indices=indices, intermediates_only=True, output_fmt="NCHW"
        )
        by_layer = dict(zip(indices, found, strict=True))
        layers = self.layers if len(self.layers) > 1 else self.layers * len(self.strides)
        maps = []
        for stride, layer, make in zip(self.strides, layers, self.levels, strict=True):
            features = make(by_layer[layer])
            full = (math.ceil((height + down) / stride), math.ceil((width + right) / stride))
            if features.shape[-2] > full[0]:
                features = pool(features, full)
            elif features.shape[-2:] != full:
                features = F.interpolate(features, full, mode="bilinear")
            maps.append(features[..., : math.ceil(height / stride), : math.ceil(width / stride)])
        return maps


def level(width: int, ups: int) -> nn.Module:
    """Build the layers that turn a ViT's only map into a larger one: `ups` times twice the size and half the width."""
    layers: list[nn.Module] = []
    for up in range(ups):
        layers.append(nn.ConvTranspose2d(width >> up, width >> (up + 1), 2, stride=2))
        layers += [LayerNorm2d(width >> (up + 1)), nn.GELU()] if up + 1 < ups else []
    return nn.Sequential(*layers, LayerNorm2d(width >> ups))


def pool(maps: Float[Tensor, "B D H W"], size: tuple[int, int]) -> Float[Tensor, "B D h w"]:
    """Max-pool maps to a smaller size, with overlapping windows where a side is not a multiple of the new one."""
    if not torch.compiler.is_exporting():
        return F.adaptive_max_pool2d(maps, size)
    for dim, count in zip((2, 3), size, strict=True):  # the same result with operators that ONNX has
        side = maps.shape[dim]
        ends = [(place * side // count, -(-(place + 1) * side // count)) for place in range(count)]
        maps = torch.stack([maps.narrow(dim, start, end - start).amax(dim) for start, end in ends], dim)
    return maps


def nearest(stride: int, reductions: list[int]) -> int:
    """Choose the layer whose stride is nearest to the wanted one; of equals, the last."""
    return min(range(len(reductions)), key=lambda layer: (abs(math.log2(reductions[layer] / stride)), -layer))


def take_any_size(backbone: nn.Module) -> None:
    """Make a timm ViT resample its position embeddings for every image, as if built with `dynamic_img_size`."""
    vit: Any = backbone
    if getattr(vit, "dynamic_img_size", None) is False:
        vit.dynamic_img_size = True
        vit.patch_embed.strict_img_size, vit.patch_embed.flatten = False, False
        vit.patch_embed.output_fmt = Format.NHWC
