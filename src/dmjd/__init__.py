"""Masked image modelling: a folder of unlabelled images in, a vision backbone for timm out.

Disjoint masking with joint distillation (arXiv 2301.00230), MAE, MaskFeat, ConvMAE and related methods:

    run = dmjd.pretrain("photos", "runs/photos", minutes=10)
    run.numbers["verdict"]                     # did it learn?
    dmjd.knn(run.backbone, "labelled").numbers["top1"]
    model = run.load()                         # a timm model

Every verb of the command line is a function: pretrain, knn, linear, finetune, segment, detect, predict, embed, search,
export, plan, prepare, doctor, report. Settings have the names of the flags (`dmjd VERB --help`), with two underscores
in place of the dot after a section: `model__size="small"`. The other names are the parts that the verbs are made of.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmjd import errors, reference
    from dmjd.api import (
        Outcome,
        TrainingOutcome,
        detect,
        doctor,
        embed,
        export,
        finetune,
        knn,
        linear,
        plan,
        predict,
        prepare,
        pretrain,
        report,
        search,
        segment,
    )
    from dmjd.backbones.files import load_backbone
    from dmjd.factory import build, load_pretrained
    from dmjd.masking import block_masks, disjoint_masks
    from dmjd.method import DMJD
    from dmjd.reference import load_reference
    from dmjd.targets.hog import hog

__all__ = [
    "DMJD",
    "Outcome",
    "TrainingOutcome",
    "block_masks",
    "build",
    "detect",
    "disjoint_masks",
    "doctor",
    "embed",
    "errors",
    "export",
    "finetune",
    "hog",
    "knn",
    "linear",
    "load_backbone",
    "load_pretrained",
    "load_reference",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "reference",
    "report",
    "search",
    "segment",
]

_MODULES = ("errors", "reference")
_ELSEWHERE = {  # all others are in dmjd.api
    "DMJD": "dmjd.method",
    "block_masks": "dmjd.masking",
    "build": "dmjd.factory",
    "disjoint_masks": "dmjd.masking",
    "hog": "dmjd.targets.hog",
    "load_backbone": "dmjd.backbones.files",
    "load_pretrained": "dmjd.factory",
    "load_reference": "dmjd.reference",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: importing torch takes seconds, and the help text must not wait for it."""
    if name == "__version__":
        return version("dmjd")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_ELSEWHERE.get(name, "dmjd.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
