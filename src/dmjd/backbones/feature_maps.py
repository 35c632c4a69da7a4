"""Feature maps of a network, as targets need them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.normalize import Normalize


class FeatureMaps(nn.Module):
    """Maps of chosen layers of a network, from images of 0..255.

    Args:
        network: A timm model, or another with timm's `forward_intermediates` and `pretrained_cfg`.
        layers: Which maps, as timm numbers them; negative numbers count from the end. Default: `token_layer(network)`.
        in_chans: Channels of the images.
        takes: `input_size`, `mean` and `std` of the network's input; default: those of its `pretrained_cfg`.
        bf16: Compute in bfloat16, whatever the surrounding precision.

    Attributes:
        dim: Width of the maps.

    Raises:
        ValueError: If the network takes another number of channels or has no such layers, or their widths differ.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Sequence[int] | None = None,
        in_chans: int = 3,
        takes: Mapping[str, Any] | None = None,
        bf16: bool = False,
    ):
        super().__init__()
        wanted: Any = takes or getattr(network, "pretrained_cfg", None)
        if wanted is None or wanted["input_size"][0] != in_chans or not hasattr(network, "forward_intermediates"):
            raise ValueError(f"the teacher does not read images of {in_chans} channel(s), or has no feature maps")
        self.network, self.bf16 = network, bf16
        self.layers = [token_layer(network)] if layers is None else list(layers)
        self.size = tuple(wanted["input_size"][1:])
        self.normalize = Normalize(wanted["mean"], wanted["std"])
        try:
            with torch.no_grad():
                (self.dim,) = {features.shape[1] for features in self.eval()(torch.zeros(1, in_chans, *self.size))}
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"the teacher's layers {self.layers} cannot be combined: {error}") from None

    def forward(self, images: Num[Tensor, "B C H W"]) -> list[Float[Tensor, "B T h w"]]:
        """Compute the maps of images of 0..255, which are resized to the network's input size."""
        pixels = images.float()
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        network: Any = self.network
        options = {"intermediates_only": True, "stop_early": True, "output_fmt": "NCHW"}
        with torch.autocast(pixels.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            maps = network.forward_intermediates(self.normalize(pixels), indices=self.layers, **options)
        return [features.to(torch.promote_types(features.dtype, torch.float32)) for features in maps]


def token_layer(network: nn.Module) -> int:
    """Return the index of a network's token map, even if coarser maps follow it as in a ConvViT; otherwise the last.

    The token map has the network's `patch_size` as stride and its `num_features` as width. Both must match: a
    hierarchical network may have a `patch_size` too, but its maps become wider and coarser up to the last one.
    """
    described: Any = network
    tokens = getattr(described, "patch_size", None), getattr(described, "num_features", None)
    maps = enumerate(getattr(described, "feature_info", None) or ())
    return max((layer for layer, each in maps if (each["reduction"], each["num_chs"]) == tokens), default=-1)
