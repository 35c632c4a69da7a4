"""The interface of a target, and the registry of all kinds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from dmjd.backbones import Encoder
from dmjd.backbones.normalize import Normalize
from dmjd.errors import ConfigError
from dmjd.registry import Registry


@runtime_checkable
class Target(Protocol):
    """A prediction target for every token; a module if it has weights or buffers."""

    dim: int  # width T
    widths: tuple[int, ...]  # of targets side by side, whose losses are summed; (dim,) for a single one
    caption: str  # one sentence for the report: what the pictures show
    backdrop: Literal["image", "target"]  # predictions are pasted into the image, or into the picture of the target

    def __call__(self, images: Tensor, /) -> Tensor:
        """Compute the targets (B, L, T) of images (B, C, H, W) of 0..255."""
        ...

    def picture(self, values: Tensor, image: Tensor, truth: Tensor) -> Tensor:
        """Draw the target of one image, or a prediction of it; tensors may be on any device.

        Args:
            values: Values to draw, (L, T).
            image: The image itself, uint8 (C, H, W).
            truth: True values of all images in the report, (n, L, T), so that they share one choice of colours.

        Returns:
            A picture on the CPU, uint8 (c, h, w) of c = 1, 3 or C channels; h and w are multiples of the grid's sides.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TargetRequest:
    """What a target is built from.

    Attributes:
        encoder: The encoder in training, which defines the tokens.
        in_chans: Channels of an image.
        image_hw: Height and width of an image, in pixels.
        normalize: How the encoder's images are normalised.
        argument: The part after the colon in the name of a target, such as NAME in `timm:NAME`.
        options: Settings of targets by section, such as {"hog": {"cell_size": 4}}.
    """

    encoder: Encoder
    in_chans: int
    image_hw: tuple[int, int]
    normalize: Normalize
    argument: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def option(self, section: str, name: str, default: Any) -> Any:
        """Look up a setting; returns `default` if it is missing or None."""
        value = self.options.get(section, {}).get(name)
        return default if value is None else value

    def refuse_argument(self) -> None:
        """Check that a target of a kind without an argument has none.

        Raises:
            ConfigError: If there is one.
        """
        if self.argument:
            raise ConfigError(f"this target takes nothing after a colon; :{self.argument}; leave it out")


register_target: Registry[Callable[[TargetRequest], Target]] = Registry(
    "target", "dmjd.targets", "timm:NAME, hf:NAME or a backbone.safetensors"
)
