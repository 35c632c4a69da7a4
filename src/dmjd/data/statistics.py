"""Statistics of the values of a set: their range, and the mean and standard deviation of every channel."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmjd.data.levels import BYTES, Levels
from dmjd.errors import ConfigError, DataError

MIN_STD = 1e-3  # for a constant channel


@dataclass(frozen=True)
class Statistics:
    """Statistics to normalise images by.

    Attributes:
        mean: Mean of every channel, 0 to 1 of the range.
        std: Standard deviation of every channel, likewise.
        levels: The range of deep images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    levels: Levels = BYTES

    def write(self, path: Path) -> None:
        """Write a JSON file that `read` reads."""
        content = {"mean": self.mean, "std": self.std, "value_range": [self.levels.low, self.levels.high]}
        path.write_text(json.dumps(content) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Read a JSON file: `mean`, `std` and optionally `value_range`, as lists of numbers.

        Raises:
            ConfigError: If it is missing or malformed.
        """
        try:
            content = json.loads(path.read_text())
            mean, std = (tuple(map(float, content[name])) for name in ("mean", "std"))
            levels = Levels(*map(float, content.get("value_range", (0, 255))))
            if len(mean) != len(std) or not all(value > 0 for value in std) or levels.low >= levels.high:
                raise ValueError("mean and std differ in length, or a std or the range is not positive")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"no statistics ({error}); {path}; give JSON with the lists mean and std") from None
        return cls(mean, std, levels)


def statistics_of(images: Iterable[Tensor], levels: Levels) -> Statistics:
    """Measure a sample of images (C, H, W) with the same channels, at their depth; every image counts the same.

    Raises:
        DataError: If there are no images.
    """
    moments = []
    for image in images:
        pixels = levels.scale(image).double().flatten(1) / 255
        moments.append(torch.stack([pixels.mean(dim=1), pixels.square().mean(dim=1)]))
    if not moments:
        raise DataError("no image of a sample decodes; look at them with dmjd doctor; check --data")
    mean, square = torch.stack(moments).mean(dim=0)
    std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_STD)
    rounded = [tuple(round(value, 4) for value in each.tolist()) for each in (mean, std)]
    return Statistics(rounded[0], rounded[1], levels)
