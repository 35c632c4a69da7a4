"""Features of a frozen network as the target: CLIP, DINO, any model of timm, a backbone of our own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F


class Teacher(nn.Module):
    """Tokens of a frozen network, LayerNormed without affine, on the student's grid.

    The maps of several layers are LayerNormed, brought to the grid and averaged (data2vec, section 3). The network is
    no submodule: it is neither trained nor part of a checkpoint.

    Args:
        network: A timm model with `forward_intermediates`; its `pretrained_cfg` says what images it wants.
        grid: Rows and columns of the student's tokens.
        layers: Which maps, by timm's numbers; negative ones count from the end.
        in_chans: Channels of the images.

    Raises:
        ValueError: If the network takes other channels, has no such layers, or the layers' widths differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, grid: tuple[int, int], *, layers: Sequence[int] = (-1,), in_chans: int = 3):
        super().__init__()
        wanted: Any = getattr(network, "pretrained_cfg", None)
        if wanted is None or wanted["input_size"][0] != in_chans or not hasattr(network, "forward_intermediates"):
            raise ValueError(f"the teacher does not read images of {in_chans} channel(s), or has no layers to look at")
        self._network = (network.eval().requires_grad_(False),)  # in a tuple, hidden from torch's registry
        self.grid, self.layers, self.size = grid, list(layers), tuple(wanted["input_size"][1:])
        self.register_buffer("mean", torch.tensor(wanted["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(wanted["std"])[:, None, None], persistent=False)
        try:
            with torch.no_grad():
                self.dim = self(torch.zeros(1, in_chans, *self.size)).shape[-1]
        except (AssertionError, IndexError, RuntimeError) as error:
            raise ValueError(f"the teacher's layers {self.layers} cannot be taken together: {error}") from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        self._network[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255, resized to what the teacher wants."""
        pixels = images.float()
        if pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        network: Any = self._network[0]
        maps = network.forward_intermediates(
            (pixels / 255 - self.mean) / self.std, indices=self.layers, intermediates_only=True, output_fmt="NCHW"
        )
        return whiten(torch.stack([self._on_grid(features) for features in maps]).mean(dim=0))

    def _on_grid(self, features: Float[Tensor, "B T h w"]) -> Float[Tensor, "B L T"]:
        features = features.float()
        if len(self.layers) > 1:
            features = whiten(features.movedim(1, -1)).movedim(-1, 1)
        if features.shape[-2:] != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)


def whiten(tokens: Float[Tensor, "*shape T"]) -> Float[Tensor, "*shape T"]:
    """Standardise every token (LayerNorm without affine)."""
    return F.layer_norm(tokens, tokens.shape[-1:])
