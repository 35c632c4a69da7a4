"""Features of another network as the target: a frozen one (CLIP, DINO, any of timm or ours), or the student's mean."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.feature_maps import Maps


class Teacher(nn.Module):
    """Tokens of a frozen network, LayerNormed without affine, on the student's grid.

    ConcatTarget maps are LayerNormed, brought to the grid and averaged (data2vec, section 3). The network is no submodule:
    it is neither trained nor part of a checkpoint.

    Args:
        maps: What the network sees.
        grid: Rows and columns of the student's tokens.
    """

    def __init__(self, maps: Maps, grid: tuple[int, int]):
        super().__init__()
        self.grid, self.dim = grid, maps.dim
        self._maps = (maps.eval().requires_grad_(False),)  # in a tuple, hidden from torch's registry

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        self._maps[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        maps = self._maps[0](images)
        if len(maps) > 1:
            maps = [whiten(features.movedim(1, -1)).movedim(-1, 1) for features in maps]
        return whiten(torch.stack([on_grid(features, self.grid) for features in maps]).mean(dim=0))


class EmaTeacher(Teacher):
    """The running mean of the student's own weights as the teacher (data2vec, Baevski et al. 2022).

    It is part of a checkpoint, but not trained: `follow` draws it towards the student after every step.

    Args:
        maps: What a copy of the student sees; data2vec takes the top layers.
        grid: Rows and columns of its tokens.
        decay: Share of the mean that is kept at a step, at the start and at the end of a run.
    """

    def __init__(self, maps: Maps, grid: tuple[int, int], *, decay: tuple[float, float] = (0.996, 0.9999)):
        super().__init__(maps, grid)
        self.maps, self.decay = maps, decay

    def train(self, mode: bool = True) -> "EmaTeacher":
        """Leave the network in evaluation mode: it has no drop path."""
        super().train(mode)
        self.maps.eval()
        return self

    @torch.no_grad()
    def follow(self, student: nn.Module, progress: float) -> None:
        """Move towards the student; the decay grows linearly with `progress`, from 0 to 1, through the run."""
        decay = self.decay[0] + (self.decay[1] - self.decay[0]) * progress
        for mean, value in zip(self.maps.network.state_dict().values(), student.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - decay)
            else:
                mean.copy_(value)


def on_grid(features: Float[Tensor, "B T h w"], grid: tuple[int, int]) -> Float[Tensor, "B L T"]:
    """Resize a map to a grid (bilinear, antialiased) and list its tokens in raster order."""
    if features.shape[-2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", antialias=True)
    return features.flatten(2).transpose(1, 2)


def whiten(tokens: Float[Tensor, "*shape T"]) -> Float[Tensor, "*shape T"]:
    """Standardise every token (LayerNorm without affine)."""
    return F.layer_norm(tokens, tokens.shape[-1:])
