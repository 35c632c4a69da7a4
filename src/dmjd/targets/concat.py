"""ConcatTarget targets at once: each has its part of the width, and a branch's loss is the sum of theirs."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn


class ConcatTarget(nn.Module):
    """Targets side by side; `dims` are their widths."""

    def __init__(self, targets: Sequence[Any]):
        super().__init__()
        self.targets = nn.ModuleList(targets)
        self.dims = tuple(target.dim for target in targets)
        self.dim = sum(self.dims)

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255."""
        return torch.cat([target(images) for target in self.targets], dim=-1)
