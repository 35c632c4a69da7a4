"""Several targets at once: each occupies part of the width, and the loss of a branch is the sum of their losses."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn

from dmjd.targets.protocol import Target


class ConcatTarget(nn.Module):
    """Targets side by side, in the given order; only the first one is drawn."""

    def __init__(self, targets: Sequence[Target]):
        super().__init__()
        self.parts = tuple(targets)
        # Their weights and buffers; a target without any need not be a module.
        modules = {str(place): target for place, target in enumerate(targets) if isinstance(target, nn.Module)}
        self.targets = nn.ModuleDict(modules)
        self.widths: tuple[int, ...] = tuple(target.dim for target in targets)
        self.dim = sum(self.widths)
        self.backdrop: Literal["image", "target"] = targets[0].backdrop
        self.caption = f"{targets[0].caption.rstrip('.')}; of {len(targets)} targets, only the first is drawn."

    def forward(self, images: Num[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Compute the targets of images of 0..255 and concatenate them along the width."""
        return torch.cat([target(images) for target in self.parts], dim=-1)

    def picture(
        self, values: Float[Tensor, "L T"], image: UInt8[Tensor, "C H W"], truth: Float[Tensor, "n L T"]
    ) -> UInt8[Tensor, "c h w"]:
        """Draw the first target's part of the values."""
        return self.parts[0].picture(values[..., : self.widths[0]], image, truth[..., : self.widths[0]])
