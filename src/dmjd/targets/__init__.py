"""Prediction targets: a vector for every token, computed once per image and shared by all its views.

A new target is one file, here or in another distribution that offers it as an entry point of the group `dmjd.targets`:
a class that implements `Target`, and a function that builds it from a `TargetRequest`, decorated by `register_target`.

    protocol   the interface of a target, and the registry of targets
    pixels     raw pixels, or pixels normalised in each patch (MAE)
    hog        histograms of oriented gradients (MaskFeat, and the paper's own recipe)
    teacher    features of a frozen network
    ema        features of the exponential moving average of the student itself (data2vec)
    concat     several targets side by side
"""

from dataclasses import replace
from pathlib import Path

from dmjd.targets.concat import ConcatTarget
from dmjd.targets.ema import EmaTeacher
from dmjd.targets.hog import HOG, hog
from dmjd.targets.pixels import Pixels
from dmjd.targets.protocol import Target, TargetRequest, register_target
from dmjd.targets.teacher import Teacher

__all__ = [
    "HOG",
    "ConcatTarget",
    "EmaTeacher",
    "Pixels",
    "Target",
    "TargetRequest",
    "Teacher",
    "create_target",
    "hog",
    "register_target",
]


def create_target(name: str, request: TargetRequest) -> Target:
    """Build a target from its name: KIND, KIND:ARGUMENT, the path of a backbone.safetensors, or several joined by `+`.

    Raises:
        ConfigError: If there is no such kind, or it is incompatible with the request.
        CheckpointError: If the weights of a teacher cannot be loaded.
    """
    names = [name] if Path(name).is_file() else name.split("+")  # a file name may contain a +
    if len(names) > 1:
        return ConcatTarget([create_target(part, request) for part in names])
    kind, _, argument = name.partition(":")
    if name.endswith(".safetensors") and kind not in register_target.names():
        kind, argument = "file", name
    return register_target.get(kind)(replace(request, argument=argument))
