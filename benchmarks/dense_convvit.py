"""The hybrid in its plain dense form: full maps, masks where they matter, visible tokens picked at the end.

Written from the paper's description as the reference to test and to race against: every view runs through whole maps,
and every block of the decoder computes all tokens. It reads the weights of our modules, so that both are one function.
"""

from copy import copy

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones import Latents
from dmjd.backbones.convvit import ConvBlock, ConvViT, ConvViTEncoder, PatchEmbed
from dmjd.heads import Decoder
from dmjd.masking import TokenIds, gather_tokens
from dmjd.method import DMJD


def norm(layer, x: Tensor) -> Tensor:
    """LayerNorm over the channels of a map."""
    return F.layer_norm(x.permute(0, 2, 3, 1), layer.normalized_shape, layer.weight, layer.bias, layer.eps).permute(
        0, 3, 1, 2
    )


def conv(layer, x: Tensor) -> Tensor:
    """A layer's weights as the convolution they are."""
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def embed(layer: PatchEmbed, x: Tensor) -> Tensor:
    """Patch embedding of a map."""
    return F.gelu(norm(layer.norm, conv(layer.proj, x)))


def dense_block(block: ConvBlock, x: Tensor, shown: Tensor | None) -> Tensor:
    """A convolution block on a map; `shown` is 0 at hidden positions."""
    inner = conv(block.conv1, norm(block.norm1, x))
    inner = inner if shown is None else inner * shown
    x = x + conv(block.conv2, conv(block.attn, inner))
    return x + conv(block.mlp.fc2, F.gelu(conv(block.mlp.fc1, norm(block.norm2, x))))


def dense_stages(model: ConvViT, images: Tensor, masked_NL: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of stages 1 and 2 and all tokens at the entrance of stage 3."""
    shown = {}
    if masked_NL is not None:
        token_map = (~masked_NL).to(images.dtype).unflatten(1, model.grid)[:, None]
        shown = {side: token_map.repeat_interleave(side, 2).repeat_interleave(side, 3) for side in (2, 4)}
    x1 = embed(model.patch_embed1, images)
    for block in model.blocks1:
        x1 = dense_block(block, x1, shown.get(4))
    x2 = embed(model.patch_embed2, x1)
    for block in model.blocks2:
        x2 = dense_block(block, x2, shown.get(2))
    x3 = model.patch_embed4(embed(model.patch_embed3, x2).flatten(2).transpose(1, 2)) + model.pos_embed
    return x1, x2, x3


def dense_latents(encoder: ConvViTEncoder, images: Tensor, masked: Tensor) -> Tensor:
    """Latents (N, K, D) of the visible tokens of every view, computed on whole maps."""
    model, masked_NL = encoder.backbone, masked.flatten(0, 1)
    images = images.repeat_interleave(masked.shape[1], dim=0)
    x1, x2, x3 = dense_stages(model, images, masked_NL)

    def pick(tokens: Tensor) -> Tensor:
        return tokens[~masked_NL].view(len(masked_NL), -1, tokens.shape[-1])

    x = pick(x3)
    for block in model.blocks3:
        x = block(x)
    for decode, stage in ((encoder.stage1_output_decode, x1), (encoder.stage2_output_decode, x2)):
        x = x + pick(conv(decode, stage).flatten(2).transpose(1, 2))
    return encoder.norm(x)


def dense_classifier(model: ConvViT, images: Tensor) -> Tensor:
    """Logits of whole images."""
    _, _, x = dense_stages(model, images, None)
    for block in model.blocks3:
        x = block(x)
    return model.head(model.fc_norm(x.mean(dim=1)))


class DenseEncoder(nn.Module):
    """The dense form in the place of a `ConvViTEncoder`, whose weights it uses."""

    num_prefix_tokens = 0

    def __init__(self, encoder: ConvViTEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, tokens: TokenIds) -> Latents:
        """Encode the visible tokens of every view, on whole maps."""
        num_views = len(tokens.visible) // len(images)
        num_tokens = tokens.visible.shape[1] + tokens.hidden.shape[1]
        masked_NL = torch.zeros(len(tokens.hidden), num_tokens, dtype=torch.bool, device=images.device)
        masked = masked_NL.scatter(1, tokens.hidden, True).unflatten(0, (-1, num_views))
        visible_NKD = dense_latents(self.encoder, images, masked)
        return Latents(visible_NKD[:, :0], visible_NKD, None)


class DenseDecoder(nn.Module):
    """The plain form of a `Decoder` with its weights: every block and prediction for all tokens, in raster order."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Latents, tokens: TokenIds) -> Tensor:
        """Predict all tokens and pick the hidden ones."""
        decoder = self.decoder
        visible_NKE = decoder.embed(latents.visible)
        mask_tokens = decoder.mask_token.to(visible_NKE.dtype).expand(*tokens.hidden.shape, -1)
        places = torch.cat([tokens.visible, tokens.hidden], dim=1).argsort(dim=1)
        x = gather_tokens(torch.cat([visible_NKE, mask_tokens], dim=1), places) + decoder.pos_embed
        for block in decoder.blocks:
            x = Block.forward(block, x)  # the last one computes all tokens too
        return gather_tokens(decoder.pred(decoder.norm(x)), tokens.hidden)


def dense_form(model: DMJD) -> DMJD:
    """The same pre-training model, with the same weights, in the plain dense form."""
    dense = copy(model)
    dense._modules = {
        **model._modules,
        "encoder": DenseEncoder(model.encoder),
        "decoder": DenseDecoder(model.decoder),
    }
    return dense
