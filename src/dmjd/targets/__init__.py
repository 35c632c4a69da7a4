"""What is predicted: one number vector of width `dim` for every token, computed once per image for all its views.

A target is a module with `dim` (the width T) and `forward(images) -> (B, L, T)` for images of 0..255. A new target is
one file here.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from dmjd.targets.concat import ConcatTarget
from dmjd.targets.hog import HOG, hog
from dmjd.targets.pixels import Pixels
from dmjd.targets.teacher import EmaTeacher, Teacher

__all__ = ["HOG", "ConcatTarget", "EmaTeacher", "Pixels", "Target", "Teacher", "hog"]


@runtime_checkable
class Target(Protocol):
    """What the method asks of a target."""

    dim: int

    def __call__(self, images: Tensor, /) -> Tensor:
        """Compute the targets (B, L, T) of images (B, C, H, W) of 0..255."""
        ...
