"""The network of a file of ours, for exports, and the comparison of an export with it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmjd.backbones import Architecture
from dmjd.backbones.files import load_around, load_backbone, read_file, task_of
from dmjd.backbones.normalize import Normalize
from dmjd.backbones.pyramid import Pyramid

Kind = Literal["backbone", "classifier", "segmenter", "detector"]
DENSE: dict[str, Kind] = {"segment": "segmenter", "detect": "detector"}  # kinds of file by the verb that wrote them
Size = tuple[int, int, int]
BATCHES = (3, 1)  # batch sizes that an export is tested with
TRACED = 2  # batch size for tracing


@dataclass(frozen=True)
class Original:
    """The network of a file, in evaluation mode.

    Attributes:
        path: The file.
        model: The timm model: the whole network, or the backbone inside a segmenter or a detector.
        architecture: Name and arguments for `timm.create_model`.
        kind: Kind of network in the file.
        classes: Names of the classes, or their numbers if the file has no names.
        statistics: Mean and standard deviation of every channel, 0 to 1.
        value_range: The values of images that become 0 and 1.
        task: The task that the network was trained for, as its file describes it.
    """

    path: Path
    model: nn.Module
    architecture: Architecture
    kind: Kind
    classes: tuple[str, ...]
    statistics: tuple[list[float], list[float]]
    value_range: tuple[float, float]
    task: dict[str, Any]

    @property
    def model_size(self) -> Size:
        """Channels, height and width of the images that the timm model is built for."""
        channels, height, width = self.model.pretrained_cfg["input_size"]  # type: ignore[index]
        return channels, height, width

    @property
    def input_size(self) -> Size:
        """Channels, height and width of the images that the whole network was last trained on."""
        channels, height, width = self.model_size
        sides = str(self.task.get("crop_size", f"{height}x{width}")).split("x")
        return channels, int(sides[0]), int(sides[-1])

    def features(self, images: Float[Tensor, "B C H W"]) -> Tensor:
        """Compute the output of the timm model for images of 0..1."""
        return self.model(Normalize(*self.statistics)(images * 255))


def draw_images(count: int, size: Size) -> Float[Tensor, "B C H W"]:
    """Draw random images of 0..1, the same ones at every call."""
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(count))


def open_original(path: Path) -> Original:
    """Open a file written by pre-training, fine-tuning, segmentation or detection.

    Raises:
        CheckpointError: If it is not such a file.
    """
    model: Any = load_backbone(path)
    metadata, task, config = read_file(path)[0], task_of(path), model.pretrained_cfg
    alone: Kind = "classifier" if model.num_classes else "backbone"
    return Original(
        path=path,
        model=model,
        architecture=(metadata["architecture"], json.loads(metadata["model_args"])),
        kind=DENSE.get(task.get("name", ""), alone),
        classes=tuple(task.get("classes", map(str, range(model.num_classes)))),
        statistics=(list(config["mean"]), list(config["std"])),
        value_range=tuple(model.value_range or (0.0, 255.0)),
        task=task,
    )


class FromPixels(nn.Module):
    """A network that includes its normalisation: images of 0..1 in, features or logits out."""

    def __init__(self, original: Original):
        super().__init__()
        self.normalize = Normalize(*original.statistics)
        self.network = segmenter(original) if original.kind == "segmenter" else original.model

    def forward(self, images: Float[Tensor, "B C H W"]) -> Tensor:
        """Compute the network's output for images of 0..1."""
        found = self.network(self.normalize(images * 255))
        return found[0] if isinstance(found, list) else found  # a segmenter returns a list with the logits of each head


def segmenter(original: Original) -> nn.Module:
    """Build the segmenter of a file, with its weights.

    Raises:
        CheckpointError: If the weights do not match the description.
        ConfigError: If the extra `dense` is missing.
    """
    from dmjd.networks.segmenter import Segmenter

    task = original.task
    network = Segmenter(
        Pyramid(original.model),
        len(original.classes),
        channels=task["decoder_channels"],
        auxiliary=task["auxiliary_weight"] > 0,
    )
    load_around(original.path, network)
    return network.eval()


@torch.no_grad()
def compare(
    original: Callable[[Tensor], Tensor], exported: Callable[[Tensor], Tensor], size: Size, tolerance: float
) -> None:
    """Check that both have the same output for images of 0..1 of a size, for several batch sizes.

    Raises:
        AssertionError: If they differ by more than the tolerance, relative to the largest output.
    """
    for count in BATCHES:
        images = draw_images(count, size)
        expected = original(images)
        scale = max(float(expected.abs().max()), 1.0)
        torch.testing.assert_close(exported(images), expected, rtol=0, atol=tolerance * scale)


def compare_models(original: Original, loaded: nn.Module) -> None:
    """Check that a loaded timm model computes the same as the original: 1e-5.

    Raises:
        AssertionError: If it does not.
    """
    normalize = Normalize(*original.statistics)
    compare(original.features, lambda images: loaded(normalize(images * 255)), original.model_size, tolerance=1e-5)
