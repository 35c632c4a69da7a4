"""What is predicted: a vector of numbers for every token, computed once per image for all its views.

A new target is one file, here or in another distribution that offers it as an entry point of the group `dmjd.targets`:
a class with what `Target` asks for, and a function that makes it of a `TargetRequest`, decorated by `register_target`.

    protocol   what a target is, and the register of them
    pixels     pixels, as they are or normalised in each patch (MAE)
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
    """Make the target of a name: KIND, KIND:ARGUMENT, the path of a backbone.safetensors, or several joined by `+`.

    Raises:
        ConfigError: If there is no such kind, or it does not go together with the rest.
        CheckpointError: If the weights of a teacher cannot be loaded.
    """
    names = [name] if Path(name).is_file() else name.split("+")  # the name of a file may have a + of its own
    if len(names) > 1:
        return ConcatTarget([create_target(part, request) for part in names])
    kind, _, argument = name.partition(":")
    if name.endswith(".safetensors") and kind not in register_target.names():
        kind, argument = "file", name
    return register_target.get(kind)(replace(request, argument=argument))
