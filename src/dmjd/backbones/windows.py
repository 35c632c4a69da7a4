"""Windowed attention for a plain ViT, so that large images are affordable (ViTDet, Li et al. 2022, section 3)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

GLOBAL_BLOCKS = 4  # evenly spaced; all others attend within windows


class Windows:
    """Makes blocks of a ViT attend within square windows of tokens, without changing its weights or their names.

    The last block of each of `GLOBAL_BLOCKS` equal parts of the network still attends to all tokens. Class and register
    tokens are copied into every window, and their outputs are averaged over the windows.

    Args:
        vit: A timm ViT.
        size: Side of a window, in tokens.

    Attributes:
        grid: Rows and columns of tokens of the next images; multiples of `size`. Set it before every forward pass.

    Raises:
        ValueError: If the backbone is not a ViT.
    """

    def __init__(self, vit: nn.Module, size: int):
        blocks: Any = getattr(vit, "blocks", None)
        self.prefix: Any = getattr(vit, "num_prefix_tokens", None)
        if blocks is None or self.prefix is None or not all(hasattr(block, "attn") for block in blocks):
            raise ValueError("windows need a ViT")
        self.size = size
        self.grid = (size, size)
        ends = [round(len(blocks) * part / GLOBAL_BLOCKS) for part in range(GLOBAL_BLOCKS + 1)]
        self.windowed = [index for start, end in pairwise(ends) for index in range(start, end - 1)]
        for index in self.windowed:
            attention = blocks[index].attn  # not the block: stochastic depth must drop images, not windows
            attention.register_forward_pre_hook(lambda module, given: (self.split(given[0]), *given[1:]))
            attention.register_forward_hook(lambda module, given, found: self.join(found))

    def split(self, tokens: Tensor) -> Tensor:
        """Cut tokens (B, prefix + rows * columns, D) into windows (B * windows, prefix + size * size, D)."""
        (rows, columns), size = self.grid, self.size
        extra, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        parts = patches.unflatten(1, (rows // size, size, columns // size, size)).transpose(2, 3)
        parts = parts.flatten(1, 2).flatten(2, 3)  # (B, windows, size * size, D)
        extra = extra[:, None].expand(-1, parts.shape[1], -1, -1)
        return torch.cat([extra, parts], dim=2).flatten(0, 1)

    def join(self, windows: Tensor) -> Tensor:
        """Undo `split`."""
        (rows, columns), size = self.grid, self.size
        windows = windows.unflatten(0, (-1, rows // size * (columns // size)))
        extra, parts = windows[:, :, : self.prefix].mean(dim=1), windows[:, :, self.prefix :]
        parts = parts.unflatten(1, (rows // size, columns // size)).unflatten(3, (size, size))
        return torch.cat([extra, parts.transpose(2, 3).flatten(1, 4)], dim=1)
