"""Transformer parts shared by encoders and decoder: timm's block, MAE's initialisation."""

from collections.abc import Iterable
from itertools import islice, repeat

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # of every LayerNorm in timm's and MAE's transformers


def transformer_blocks(
    dim: int, depth: int, num_heads: int, mlp_ratio: float, drop_path: Iterable[float] = repeat(0.0)
) -> nn.ModuleList:
    """Stack pre-norm transformer blocks with qkv bias (timm's `Block`), each with its own stochastic depth rate."""
    rates = islice(drop_path, depth)
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates)


class QueryBlock(Block):
    """A block that updates only M query tokens, which attend to S tokens that may or may not include them.

    If the queries are the last M of the S tokens, the result is `Block.forward(tokens)[:, -M:]`, without computing the
    queries, the projection and the MLP of the others; otherwise this is cross-attention.
    """

    def forward(self, queries: Float[Tensor, "N M D"], tokens: Float[Tensor, "N S D"]) -> Float[Tensor, "N M D"]:
        """Update `queries` by attention to `tokens`."""
        attn, width = self.attn, tokens.shape[-1]
        query = F.linear(self.norm1(queries), attn.qkv.weight[:width], attn.qkv.bias[:width])
        key, value = F.linear(self.norm1(tokens), attn.qkv.weight[width:], attn.qkv.bias[width:]).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        queries = queries + attn.proj(attended)
        return queries + self.mlp(self.norm2(queries))


def init_weights(module: nn.Module) -> None:
    """Initialise linear layers and patch convolutions with Xavier uniform and biases with zero (MAE, appendix A)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        with torch.no_grad():
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
