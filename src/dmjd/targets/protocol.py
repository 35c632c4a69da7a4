"""What a target is, and the register of all kinds of them."""

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
    """What every token is to predict; a module if it has weights or buffers."""

    dim: int  # width T
    widths: tuple[int, ...]  # of targets side by side, whose losses are summed; (dim,) where there is one
    caption: str  # one sentence for the report: what the pictures show
    backdrop: Literal["image", "target"]  # what predictions are pasted into: the image, or the target's own picture

    def __call__(self, images: Tensor, /) -> Tensor:
        """Compute the targets (B, L, T) of images (B, C, H, W) of 0..255."""
        ...

    def picture(self, values: Tensor, image: Tensor, truth: Tensor) -> Tensor:
        """Draw the target of one image, or a prediction of it, wherever the tensors are.

        Args:
            values: What is drawn, (L, T).
            image: The image itself, uint8 (C, H, W).
            truth: True values of all images that the report shows, (n, L, T): colours are chosen for all of them.

        Returns:
            A picture on the CPU, uint8 (1, 3 or C, h, w), whose sides are multiples of those of the grid of tokens.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TargetRequest:
    """What targets are made for.

    Attributes:
        encoder: The backbone in training; says how tokens lie.
        in_chans: Channels of an image.
        image_hw: Height and width of an image, in pixels.
        normalize: How the encoder's images are normalised.
        argument: What follows the colon in the name of a target, such as NAME in `timm:NAME`.
        options: Settings of targets by section, such as {"hog": {"cell_size": 4}}.
    """

    encoder: Encoder
    in_chans: int
    image_hw: tuple[int, int]
    normalize: Normalize
    argument: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def option(self, section: str, name: str, default: Any) -> Any:
        """Look up a setting; `default` where it is missing or None."""
        value = self.options.get(section, {}).get(name)
        return default if value is None else value

    def refuse_argument(self) -> None:
        """Say that this kind of target has no argument.

        Raises:
            ConfigError: If there is one.
        """
        if self.argument:
            raise ConfigError(f"this target takes nothing after a colon; :{self.argument}; leave it out")


register_target: Registry[Callable[[TargetRequest], Target]] = Registry(
    "target", "dmjd.targets", "timm:NAME, hf:NAME or a backbone.safetensors"
)
