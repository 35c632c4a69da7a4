"""The hybrid's pre-training step as the released program computes it, operator by operator, on our weights.

Written from the method's description, as the reference to test and to race against. Every view is a row of its own.
Maps are NCHW and whole: hidden tokens are set to zero where a convolution would carry them to others, and tokens are
picked at the end of a stage. Attention is softmax(q k^T) v. The decoder puts tokens back in raster order, and computes
and predicts all of them; the loss then leaves out those that were visible.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmjd.backbones.convvit import ConvBlock, ConvViT, ConvViTEncoder, PatchEmbed
from dmjd.masking import TokenIds
from dmjd.method import DMJD, Losses
from dmjd.targets import HOG

NUM_BINS = 9


def plain_cells(images: Tensor, cell_size: int = 8) -> Tensor:
    """Compute histograms of oriented gradients (B, C, h, w, 9) over the whole batch, one operator after the other.

    Gradients are convolutions of each channel; magnitudes are scattered into nine maps and summed over cells.
    """
    pixels = images.float()
    channels, (height, width) = pixels.shape[1], pixels.shape[2:]
    difference = pixels.new_tensor([-1.0, 0.0, 1.0])
    across = F.conv2d(pixels, difference.view(1, 1, 1, 3).expand(channels, 1, 1, 3), groups=channels)
    down = F.conv2d(pixels, difference.view(1, 1, 3, 1).expand(channels, 1, 3, 1), groups=channels)
    columns, rows = F.pad(across, (1, 1)), F.pad(down, (0, 0, 1, 1))
    magnitude = torch.hypot(rows, columns)
    degrees = torch.rad2deg(torch.atan2(rows, columns)) % 180
    bins = (degrees / (180 / NUM_BINS)).floor().long() % NUM_BINS
    maps = pixels.new_zeros(len(pixels), channels, NUM_BINS, height, width)
    maps.scatter_(2, bins[:, :, None], magnitude[:, :, None])
    cells = maps.unfold(3, cell_size, cell_size).unfold(4, cell_size, cell_size).sum(dim=(-1, -2)) / cell_size**2
    return cells.movedim(2, -1)


@torch.no_grad()
def plain_hog(images: Tensor, patch_size: int = 16, cell_size: int = 8) -> Tensor:
    """Compute HOG targets (B, L, T): cells whitened, in a token by (cell row, cell column, bin, channel)."""
    with torch.autocast(images.device.type, enabled=False):
        cells = F.layer_norm(plain_cells(images, cell_size), (NUM_BINS,))
    side = patch_size // cell_size
    tokens = cells.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # B C h i w j bin
    return tokens.permute(0, 2, 4, 3, 5, 6, 1).flatten(3).flatten(1, 2)


def norm_map(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of a map."""
    channels_last = x.permute(0, 2, 3, 1)
    normed = F.layer_norm(channels_last, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return normed.permute(0, 3, 1, 2)


def convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A layer's weights as the convolution they are."""
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def embed(layer: PatchEmbed, x: Tensor) -> Tensor:
    """Patch embedding of a map."""
    return F.gelu(norm_map(layer.norm, convolve(layer.proj, x)))


def conv_block(block: ConvBlock, x: Tensor, shown: Tensor | None) -> Tensor:
    """A convolution block on a map; `shown` is 0 at hidden positions."""
    inner = convolve(block.conv1, norm_map(block.norm1, x))
    inner = inner if shown is None else shown * inner
    x = x + convolve(block.conv2, convolve(block.attn, inner))
    return x + convolve(block.mlp.fc2, F.gelu(convolve(block.mlp.fc1, norm_map(block.norm2, x))))


def transformer_block(block: nn.Module, x: Tensor) -> Tensor:
    """A pre-norm block whose attention has its matrix of weights."""
    attn = block.attn
    query, key, value = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = ((query @ key.transpose(-2, -1)) * attn.scale).softmax(dim=-1)
    x = x + attn.proj((weights @ value).transpose(1, 2).flatten(2))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def pick(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens (N, S, D) of (N, L, D) by number."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def as_tokens(maps: Tensor) -> Tensor:
    """Read a map as tokens (N, L, D) in raster order."""
    return maps.flatten(2).transpose(1, 2)


def plain_stages(model: ConvViT, images: Tensor, masked_NL: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of stages 1 and 2 and all tokens at the entrance of stage 3."""
    shown: dict[int, Tensor] = {}
    if masked_NL is not None:
        token_map = (~masked_NL).to(images.dtype).unflatten(1, model.grid)[:, None]
        shown = {side: token_map.repeat_interleave(side, 2).repeat_interleave(side, 3) for side in (2, 4)}
    x1 = embed(model.patch_embed1, images)
    for block in model.blocks1:
        x1 = conv_block(block, x1, shown.get(4))
    x2 = embed(model.patch_embed2, x1)
    for block in model.blocks2:
        x2 = conv_block(block, x2, shown.get(2))
    return x1, x2, model.patch_embed4(as_tokens(embed(model.patch_embed3, x2))) + model.pos_embed


def masks_of(tokens: TokenIds) -> Tensor:
    """Mark the hidden tokens of every row, (N, L)."""
    num_tokens = tokens.visible.shape[1] + tokens.hidden.shape[1]
    shown = torch.zeros(len(tokens.hidden), num_tokens, dtype=torch.bool, device=tokens.hidden.device)
    return shown.scatter(1, tokens.hidden, True)


def plain_latents(encoder: ConvViTEncoder, images: Tensor, tokens: TokenIds) -> Tensor:
    """Latents (N, K, D) of the visible tokens of every view."""
    model = encoder.backbone
    rows = images.repeat_interleave(len(tokens.visible) // len(images), dim=0)
    x1, x2, x3 = plain_stages(model, rows, masks_of(tokens))
    x = pick(x3, tokens.visible)
    for block in model.blocks3:
        x = transformer_block(block, x)
    for decode, stage in ((encoder.stage1_output_decode, x1), (encoder.stage2_output_decode, x2)):
        x = x + pick(as_tokens(convolve(decode, stage)), tokens.visible)
    return encoder.norm(x)


def plain_classifier(model: ConvViT, images: Tensor) -> Tensor:
    """Logits of whole images."""
    _, _, x = plain_stages(model, images, None)
    for block in model.blocks3:
        x = transformer_block(block, x)
    return model.head(model.fc_norm(x.mean(dim=1)))


class PlainHybrid(nn.Module):
    """The step of a hybrid with HOG targets, in plain form.

    Args:
        model: Whose weights and settings it has.
    """

    def __init__(self, model: DMJD):
        super().__init__()
        assert isinstance(model.target, HOG)
        assert model.masked_loss == "l2"
        self.model = model

    def forward(self, images: Tensor, tokens: TokenIds) -> Losses:
        """Compute the losses of a batch."""
        model = self.model
        target_BLT = plain_hog(images, model.target.patch_size, model.target.cell_size)
        target_NLT = target_BLT.repeat_interleave(len(tokens.visible) // len(images), dim=0)
        latent_NKD = plain_latents(model.encoder, model.normalize(images), tokens)
        error_NL = (self.decode(latent_NKD, tokens).float() - target_NLT).square().mean(dim=-1)
        masked_NL = masks_of(tokens)
        masked_loss = (error_NL * masked_NL).sum() / masked_NL.sum()
        if model.projector is None:
            return Losses(masked_loss, masked_loss, torch.zeros_like(masked_loss))
        predicted_NKT = model.projector.predict(model.projector.project(latent_NKD))
        visible_loss = F.smooth_l1_loss(predicted_NKT.float(), pick(target_NLT, tokens.visible), beta=model.beta)
        return Losses(masked_loss + model.visible_weight * visible_loss, masked_loss, visible_loss)

    def decode(self, latent_NKD: Tensor, tokens: TokenIds) -> Tensor:
        """Predict all tokens, in raster order."""
        decoder = self.model.decoder
        visible_NKE = decoder.embed(latent_NKD)
        mask_tokens = decoder.mask_token.to(visible_NKE.dtype).repeat(*tokens.hidden.shape, 1)
        raster = torch.cat(tokens, dim=1).argsort(dim=1)
        x = pick(torch.cat([visible_NKE, mask_tokens], dim=1), raster) + decoder.pos_embed
        for block in decoder.blocks:
            x = transformer_block(block, x)
        return decoder.pred(decoder.norm(x))
