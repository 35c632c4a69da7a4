"""Features of another network as the target: a frozen one (CLIP, DINO, any of timm or ours), or the student's mean."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
        network: A timm model with `forward_intermediates`.
        grid: Rows and columns of the student's tokens.
        layers: Which maps, by timm's numbers; negative ones count from the end.
        in_chans: Channels of the images.
        wants: `input_size`, `mean` and `std` of the images it takes; default: those of its `pretrained_cfg`.

    Raises:
        ValueError: If the network takes other channels, has no such layers, or the layers' widths differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        grid: tuple[int, int],
        *,
        layers: Sequence[int] = (-1,),
        in_chans: int = 3,
        wants: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        wanted: Any = wants or getattr(network, "pretrained_cfg", None)
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


class MeanTeacher(Teacher):
    """The running mean of the student's own weights as the teacher (data2vec, Baevski et al. 2022).

    It is part of a checkpoint, but not trained: `follow` draws it towards the student after every step.

    Args:
        student: The backbone in training.
        grid: Rows and columns of its tokens.
        wants: `input_size`, `mean` and `std` of its images.
        layers: Which of its maps, by timm's numbers; data2vec takes the mean of the top ones.
        decay: Share of the mean that is kept at a step, at the start and at the end of a run.
    """

    def __init__(
        self,
        student: nn.Module,
        grid: tuple[int, int],
        wants: Mapping[str, Any],
        *,
        layers: Sequence[int] = (-1,),
        decay: tuple[float, float] = (0.996, 0.9999),
    ):
        super().__init__(deepcopy(student), grid, layers=layers, in_chans=wants["input_size"][0], wants=wants)
        self.decay = decay
        self.network = self._network[0]

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Leave the network in evaluation mode: it has no drop path."""
        super().train(mode)
        self.network.eval()
        return self

    @torch.no_grad()
    def follow(self, student: nn.Module, progress: float) -> None:
        """Move towards the student; the decay grows linearly with `progress`, from 0 to 1, through the run."""
        decay = self.decay[0] + (self.decay[1] - self.decay[0]) * progress
        for mean, value in zip(self.network.state_dict().values(), student.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - decay)
            else:
                mean.copy_(value)


def whiten(tokens: Float[Tensor, "*shape T"]) -> Float[Tensor, "*shape T"]:
    """Standardise every token (LayerNorm without affine)."""
    return F.layer_norm(tokens, tokens.shape[-1:])
