"""timm's ViT as an encoder of masked views."""

import math
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmjd.backbones import Architecture, Latents, encodes, register_encoder
from dmjd.backbones.blocks import init_weights
from dmjd.backbones.positions import sincos_positions
from dmjd.masking import TokenIds, gather_tokens

SIZES = ("tiny", "small", "base", "large")


@encodes(VisionTransformer)
class ViT(nn.Module):
    """Any timm `VisionTransformer`; hidden tokens never enter its blocks (MAE).

    Attributes:
        backbone: The timm model, with its weights unchanged.
        architecture: Name and arguments with which `timm.create_model` builds the same model.

    Raises:
        ValueError: If its tokens are not plain patches, since hidden pixels would leak through a convolutional stem, or
            if its pooling has weights.
    """

    def __init__(self, vit: VisionTransformer, architecture: Architecture | None = None):
        super().__init__()
        name = architecture[0] if architecture else type(vit).__name__
        if not isinstance(vit.patch_embed, PatchEmbed):
            raise ValueError(f"{name} has convolutions before its tokens, through which it would see hidden pixels")
        if pools_by_weights(vit):
            raise ValueError(
                f"{name} pools by weights that are not trained here; make it with fc_norm=False, no attn_pool"
            )
        self.backbone, self.architecture = vit, architecture
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.patch_size: int = vit.patch_embed.patch_size[0]

    def forward(self, images: Float[Tensor, "B C H W"], tokens: TokenIds) -> Latents:
        """Encode the visible tokens of every view; patches are embedded once per image."""
        embedded = self.backbone._pos_embed(self.backbone.patch_embed(images))
        prefix, patches_BLD = embedded.tensor_split([self.num_prefix_tokens], dim=1)
        visible_NKD = gather_tokens(patches_BLD, tokens.visible)
        num_views = len(visible_NKD) // len(images)
        latent = self._transform(torch.cat([prefix.repeat_interleave(num_views, dim=0), visible_NKD], dim=1))
        prefix, visible_NKD = latent.tensor_split([self.num_prefix_tokens], dim=1)
        return Latents(prefix, visible_NKD, None)

    def _transform(self, latent: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        latent = self.backbone.norm_pre(latent)
        if self.backbone.grad_checkpointing and self.training:
            latent = checkpoint_seq(self.backbone.blocks, latent)
        else:
            latent = self.backbone.blocks(latent)
        return self.backbone.norm(latent)


def pools_by_weights(network: nn.Module) -> bool:
    """Tell whether pooling has weights (attention, or a norm after it), which pre-training would not train."""
    return any(name.startswith(("attn_pool.", "fc_norm.")) for name in network.state_dict())


class MaskTokenViT(ViT):
    """A ViT in which one learned mask token replaces every hidden patch (BEiT, SimMIM, MaskFeat)."""

    def __init__(self, vit: VisionTransformer, architecture: Architecture | None = None):
        super().__init__(vit, architecture)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Float[Tensor, "B C H W"], tokens: TokenIds) -> Latents:
        """Encode all tokens of every view."""
        patches = self.backbone.patch_embed(images)  # B L D, or B h w D if the model takes any image size
        num_views = len(tokens.hidden) // len(images)
        patches_NLD = patches.flatten(1, -2).repeat_interleave(num_views, dim=0)
        hidden_ids = tokens.hidden[..., None].expand(-1, -1, self.embed_dim)
        mask_tokens = self.mask_token.to(patches.dtype).expand(hidden_ids.shape)
        patches_NLD = patches_NLD.scatter(1, hidden_ids, mask_tokens)
        latent = self._transform(self.backbone._pos_embed(patches_NLD.view(-1, *patches.shape[1:])))
        prefix, patches_NLD = latent.tensor_split([self.num_prefix_tokens], dim=1)
        return Latents(prefix, gather_tokens(patches_NLD, tokens.visible), gather_tokens(patches_NLD, tokens.hidden))


@register_encoder("vit")
def create_vit(
    size: str = "base",
    *,
    image_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    in_chans: int = 3,
    class_token: bool = False,
    reg_tokens: int = 0,
    mask_token: bool = False,
    **overrides: Any,
) -> ViT:
    """Create an untrained ViT with fixed sine-cosine position embeddings and MAE's initialisation.

    Args:
        size: One of `SIZES`.
        image_size: Side, or height and width, in pixels; multiples of `patch_size`.
        patch_size: Side of a token, in pixels.
        in_chans: Channels of an image.
        class_token: Give the encoder a class token.
        reg_tokens: Number of register tokens.
        mask_token: Replace hidden patches with a mask token instead of dropping them.
        **overrides: Further arguments of timm's `VisionTransformer`, such as `embed_dim`, `depth`, `num_heads`.

    Raises:
        ValueError: If the image does not consist of whole patches, or the size or an override is invalid.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} px does not consist of whole patches of {patch_size} px")
    if size not in SIZES:
        raise ValueError(f"there is no ViT of size {size!r}; choose one of {', '.join(SIZES)}")
    # The final norm comes before pooling because pre-training needs it on tokens; `put_head` moves it.
    arguments = dict(
        img_size=(height, width),
        patch_size=patch_size,
        in_chans=in_chans,
        class_token=class_token,
        reg_tokens=reg_tokens,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
        **overrides,
    )
    name = f"vit_{size}_patch16_224"
    try:
        vit = timm.create_model(name, **arguments)
    except TypeError as error:  # "... got an unexpected keyword argument 'NAME'"
        raise ValueError(f"a ViT has no setting {str(error).rpartition(' ')[2]}; take another preset") from None
    except AssertionError as error:  # a width that the number of heads does not divide
        raise ValueError(f"ViT {size}: {error}") from None
    vit.apply(init_weights)
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    vit.pos_embed.requires_grad_(False)
    with torch.no_grad():  # position embeddings of prefix tokens are zero
        vit.pos_embed.zero_()[:, -math.prod(vit.patch_embed.grid_size) :] = sincos_positions(
            vit.patch_embed.grid_size, vit.embed_dim
        )
    return (MaskTokenViT if mask_token else ViT)(vit, (name, arguments))
