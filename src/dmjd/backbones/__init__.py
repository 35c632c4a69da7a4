"""Encoders: what `method` asks of a backbone, and the backbones that answer.

The contract is small: attributes that size the heads and the masks, and one call that reads V masked views of every
image. An encoder may keep hidden tokens out (`hidden` is None) or carry them along as mask tokens.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from dmjd.masking import TokenIds


class Latents(NamedTuple):
    """What an encoder says of N rows; tokens in the order of `TokenIds`."""

    prefix: Float[Tensor, "N P D"]  # class and register tokens
    visible: Float[Tensor, "N K D"]
    hidden: Float[Tensor, "N M D"] | None


@runtime_checkable
class Encoder(Protocol):
    """What the method asks of a backbone."""

    embed_dim: int
    num_prefix_tokens: int
    grid: tuple[int, int]  # rows and columns of tokens
    patch_size: int  # side of a token, in pixels
    architecture: tuple[str, dict[str, Any]] | None  # name and arguments that make it by `timm.create_model`

    @property
    def backbone(self) -> nn.Module:
        """What is left after pre-training: a timm model."""
        ...

    def __call__(self, images: Tensor, tokens: TokenIds, /) -> Latents:
        """Encode V views of images (B, C, H, W), already normalised; nothing of a hidden pixel reaches the latents."""
        ...
