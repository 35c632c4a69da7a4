"""Encoders: the interface that `method` needs, and the backbones that implement it.

The contract is small: attributes that determine the sizes of heads and masks, and one call that encodes V masked views
of every image. An encoder either drops hidden tokens (`hidden` is None) or replaces them with mask tokens.

A new backbone is one file: a function that builds the encoder, registered under its name for `--model.backbone`.

    vit, convvit              encoders of masked views
    blocks, normalize         parts that encoders and heads share
    positions                 position embeddings of tokens on a grid
    depthwise                 the hybrid's convolutions, on whole maps or, with Triton, on visible rows only
    adapt                     weights resized for a network of the same kind with other channels, patches or grid
    files                     backbone.safetensors, and backbones by name, for every verb that starts from one
    feature_maps, pyramid     maps of any backbone: for targets, for dense tasks (windows: attention for large images)
    huggingface               teachers loaded by transformers
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from dmjd.masking import TokenIds
from dmjd.registry import Registry

Architecture = tuple[str, dict[str, Any]]  # name and arguments for `timm.create_model`


class Latents(NamedTuple):
    """The encoder's output for N rows, with tokens in the order of `TokenIds`."""

    prefix: Float[Tensor, "N P D"]  # class and register tokens
    visible: Float[Tensor, "N K D"]
    hidden: Float[Tensor, "N M D"] | None


@runtime_checkable
class Encoder(Protocol):
    """The interface that the method needs from a backbone."""

    embed_dim: int
    grid: tuple[int, int]  # rows and columns of tokens
    patch_size: int  # side of a token, in pixels
    architecture: Architecture | None

    @property
    def backbone(self) -> nn.Module:
        """The timm model that pre-training produces."""
        ...

    def __call__(self, images: Tensor, tokens: TokenIds, /) -> Latents:
        """Encode V views of normalised images (B, C, H, W); the latents must not depend on any hidden pixel."""
        ...


# A builder returns an untrained encoder: builder(size, *, image_size, patch_size, in_chans, **options). The options
# are those settings of the section `model` that the user has set, such as `embed_dim`.
register_encoder: Registry[Callable[..., Encoder]] = Registry("backbone", "dmjd.backbones", "timm:NAME or a file")

_ENCODERS: dict[type[nn.Module], Callable[[Any, Architecture], Encoder]] = {}


def encodes(network: type[nn.Module]) -> Callable[[Any], Any]:
    """Register the decorated encoder for a class of timm models."""

    def remember(encoder: Any) -> Any:
        _ENCODERS[network] = encoder
        return encoder

    return remember


def encoder_of(network: nn.Module, architecture: Architecture) -> Encoder:
    """Wrap an existing network in its encoder, keeping its weights.

    Raises:
        ValueError: If there is no encoder for networks of its class.
    """
    register_encoder.names()  # imports all encoders
    make = next((_ENCODERS[kind] for kind in type(network).__mro__ if kind in _ENCODERS), None)
    if make is None:
        readable = ", ".join(sorted(kind.__name__ for kind in _ENCODERS))
        raise ValueError(f"{architecture[0]} cannot read masked views; those can: {readable}")
    return make(network, architecture)
