"""The heads of joint distillation: a decoder for hidden tokens, a projector for visible ones."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmjd.backbones import Latents
from dmjd.backbones.blocks import NORM_EPS, QueryBlock, init_weights, transformer_blocks
from dmjd.backbones.positions import Grid, resample_positions, sincos_positions
from dmjd.masking import TokenIds, gather_tokens


class Decoder(nn.Module):
    """The masked branch: transformer blocks on latents and mask tokens predict the hidden tokens (MAE).

    With `cross`, mask tokens attend only to latents, not to each other, and latents are not updated (CrossMAE, Fu et
    al. 2024): hidden tokens are predicted independently, with two thirds of the arithmetic if 75 % are hidden.

    Args:
        in_dim: Width of the encoder.
        out_dim: T, width of the target.
        grid: Rows and columns of tokens.
        embed_dim: Width of the decoder.
        depth: Number of blocks, at least 1.
        num_heads: Attention heads per block.
        mlp_ratio: Width of a block's MLP relative to the width of the decoder.
        cross: Use cross-attention in all blocks.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Grid,
        *,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        cross: bool = False,
    ):
        super().__init__()
        self.embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(grid, embed_dim), requires_grad=False)
        self.grid, self.cross = grid, cross
        self.blocks = transformer_blocks(embed_dim, 0 if cross else depth - 1, num_heads, mlp_ratio)
        for _ in range(depth - len(self.blocks)):
            self.blocks.append(QueryBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.pred = nn.Linear(embed_dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latents: Latents, tokens: TokenIds, grid: Grid | None = None) -> Float[Tensor, "N M T"]:
        """Predict the hidden tokens, in the order of `tokens.hidden`; for another grid, positions are interpolated."""
        num_rows, num_hidden = tokens.hidden.shape
        # Blocks are permutation-equivariant: with the mask tokens last, nothing has to be unshuffled.
        prefix_NPE, visible_NKE = self.embed(latents.prefix), self.embed(latents.visible)
        position_NLE = resample_positions(self.pos_embed, self.grid, grid or self.grid).expand(num_rows, -1, -1)
        visible_NKE = visible_NKE + gather_tokens(position_NLE, tokens.visible)
        hidden_NME = self.mask_token + gather_tokens(position_NLE, tokens.hidden)
        x, hidden_NME = torch.cat([prefix_NPE, visible_NKE], dim=1), hidden_NME.to(visible_NKE.dtype)
        if self.cross:
            for block in self.blocks:
                hidden_NME = block(hidden_NME, x)
        else:
            x = torch.cat([x, hidden_NME], dim=1)
            for block in self.blocks[:-1]:
                x = block(x)
            hidden_NME = self.blocks[-1](x[:, -num_hidden:], x)
        return self.pred(self.norm(hidden_NME))


class LinearHead(nn.Module):
    """The masked branch of MaskFeat and SimMIM: one linear layer on the encoder's own mask tokens."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.pred = nn.Linear(in_dim, out_dim)
        self.apply(init_weights)

    def forward(self, latents: Latents, tokens: TokenIds, grid: Grid | None = None) -> Float[Tensor, "N M T"]:
        """Predict the hidden tokens, in the order of `tokens.hidden`; the encoder has added their positions."""
        return self.pred(latents.hidden)


class Projector(nn.Module):
    """The visible branch: a three-layer MLP on visible tokens, and a linear predictor.

    Args:
        in_dim: Width of the encoder.
        out_dim: T, width of the target.
        embed_dim: Hidden width; in the official recipe, the width of the decoder.
    """

    def __init__(self, in_dim: int, out_dim: int, *, embed_dim: int = 512):
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(in_dim, embed_dim),
            nn.LayerNorm(embed_dim, eps=NORM_EPS),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim, eps=NORM_EPS),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim, eps=NORM_EPS, elementwise_affine=False),
        )
        self.predict = nn.Linear(embed_dim, out_dim)
        self.apply(init_weights)

    def forward(self, latents: Latents) -> Float[Tensor, "N K T"]:
        """Predict the visible tokens, in the order of `TokenIds.visible`."""
        return self.predict(self.project(latents.visible))


class MisalignedProjector(Projector):
    """The visible branch as in the official program, where each prediction is compared with another token's target.

    That program leaves predictions in the random order in which the encoder saw the tokens, and targets in raster
    order. An ablation: its effect may be part of the published figures.
    """

    def forward(self, latents: Latents) -> Float[Tensor, "N K T"]:
        """Predict the visible tokens, in an order drawn anew for every view."""
        predictions_NKT = super().forward(latents)
        order_NK = torch.rand(predictions_NKT.shape[:2], device=predictions_NKT.device).argsort(dim=1)
        return gather_tokens(predictions_NKT, order_NK)
