"""Disjoint masking with joint distillation: efficient masked image modelling (arXiv 2301.00230)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmjd.backbones.files import load_backbone
    from dmjd.factory import build
    from dmjd.masking import block_masks, disjoint_masks
    from dmjd.method import DMJD
    from dmjd.reference import load_reference
    from dmjd.targets.hog import hog

__all__ = ["DMJD", "block_masks", "build", "disjoint_masks", "hog", "load_backbone", "load_reference"]

_HOME = {
    "DMJD": "dmjd.method",
    "block_masks": "dmjd.masking",
    "build": "dmjd.factory",
    "disjoint_masks": "dmjd.masking",
    "hog": "dmjd.targets.hog",
    "load_backbone": "dmjd.backbones.files",
    "load_reference": "dmjd.reference",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: torch takes seconds, and the command line's help shall not."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
