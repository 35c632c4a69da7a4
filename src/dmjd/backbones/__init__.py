"""Encoders: what `method` asks of a backbone, and the backbones that answer.

The contract is small: attributes that size the heads and the masks, and one call that reads V masked views of every
image. An encoder may keep hidden tokens out (`hidden` is None) or carry them along as mask tokens.

A new backbone is one file: a function that makes the encoder, registered by the name that `--model.backbone` takes.

    vit, convvit              encoders of masked views
    blocks, normalize         parts that several of them and the heads share
    positions                 of tokens on a grid
    depthwise                 the hybrid's convolutions, on whole maps or, by Triton, on visible rows
    adapt                     weights of one network in the shapes of another of its kind
    files                     backbone.safetensors, and backbones by name, for every verb that starts from one
    feature_maps, pyramid     maps of any backbone: for targets, for dense tasks (windows: attention for large images)
    huggingface               teachers that transformers loads
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from dmjd.masking import TokenIds
from dmjd.registry import Registry

Architecture = tuple[str, dict[str, Any]]  # name and arguments that make a network by `timm.create_model`


class Latents(NamedTuple):
    """The encoder's output for N rows; tokens in the order of `TokenIds`."""

    prefix: Float[Tensor, "N P D"]  # class and register tokens
    visible: Float[Tensor, "N K D"]
    hidden: Float[Tensor, "N M D"] | None


@runtime_checkable
class Encoder(Protocol):
    """What the method asks of a backbone."""

    embed_dim: int
    grid: tuple[int, int]  # rows and columns of tokens
    patch_size: int  # side of a token, in pixels
    architecture: Architecture | None

    @property
    def backbone(self) -> nn.Module:
        """What is left after pre-training: a timm model."""
        ...

    def __call__(self, images: Tensor, tokens: TokenIds, /) -> Latents:
        """Encode V views of images (B, C, H, W), already normalised; nothing of a hidden pixel reaches the latents."""
        ...


# A builder makes an untrained encoder: builder(size, *, image_size, patch_size, in_chans, **options). Its options are
# those of the settings' section `model` that a user has set, such as `embed_dim`.
register_encoder: Registry[Callable[..., Encoder]] = Registry("backbone", "dmjd.backbones", "timm:NAME or a file")

_ENCODERS: dict[type[nn.Module], Callable[[Any, Architecture], Encoder]] = {}


def encodes(network: type[nn.Module]) -> Callable[[Any], Any]:
    """Name the class of timm models whose masked views the decorated encoder reads."""

    def remember(encoder: Any) -> Any:
        _ENCODERS[network] = encoder
        return encoder

    return remember


def encoder_of(network: nn.Module, architecture: Architecture) -> Encoder:
    """Make the encoder of an existing network, with its weights as they are.

    Raises:
        ValueError: If there is no encoder for networks of its class.
    """
    register_encoder.names()  # all are imported now
    make = next((_ENCODERS[kind] for kind in type(network).__mro__ if kind in _ENCODERS), None)
    if make is None:
        readable = ", ".join(sorted(kind.__name__ for kind in _ENCODERS))
        raise ValueError(f"{architecture[0]} cannot read masked views; those can: {readable}")
    return make(network, architecture)
