"""Position embeddings of tokens on a grid: fixed ones, and resampling to another grid."""

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

Grid = tuple[int, int]  # rows and columns of tokens


def sincos_positions(grid: Grid, dim: int) -> Float[Tensor, "1 L D"]:
    """Compute fixed 2-D sine-cosine position embeddings (MAE): the first half encodes columns, the second rows.

    Raises:
        ValueError: If `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim} cannot hold 2-D sine-cosine positions; choose a multiple of 4")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)[None].float()


def resample_positions(positions: Float[Tensor, "1 L D"], grid: Grid, wanted: Grid) -> Float[Tensor, "1 l D"]:
    """Interpolate position embeddings to another grid (bicubic, antialiased); for the same grid, return them as is."""
    if grid == wanted:  # during export, timm would interpolate even then
        return positions
    return resample_abs_pos_embed(positions, list(wanted), list(grid), num_prefix_tokens=0)
