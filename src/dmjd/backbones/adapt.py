"""Adapt weights to a network of the same kind with other channels, another patch size or another grid."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from dmjd.backbones.positions import resample_positions

# Parts that only one of the two networks may have: those of a task, and tokens that are not patches.
OPTIONAL = ("cls_token", "reg_token", "mask_token", "norm", "fc_norm", "attn_pool", "head")


class Adapted(NamedTuple):
    """Weights that fit a network; parameters missing here keep the network's own values."""

    weights: dict[str, Tensor]
    changes: list[str]  # what was resized, from which size to which


def adapt(weights: Mapping[str, Tensor], network: nn.Module, grid: tuple[int, int] | None = None) -> Adapted:
    """Resize weights to the shapes of a network of the same kind, width and depth.

    Args:
        weights: Weights under the network's names; a head, and tokens that the network lacks, are left out.
        network: A ViT or a ConvViT.
        grid: Rows and columns of the weights' position embeddings; None if they form a square.

    Raises:
        ValueError: If the weights are of another architecture; the message names the first keys.
    """
    ours, changes = network.state_dict(), []
    found = {name: value for name, value in weights.items() if name in ours}
    for name in ("patch_embed.proj.weight", "patch_embed1.proj.weight"):
        if name in found:
            given, wanted = found[name].shape, ours[name].shape
            if given[1] != wanted[1]:
                found[name] = adapt_input_conv(wanted[1], found[name], base_chans=given[1])
                changes.append(f"channels {given[1]} -> {wanted[1]}")
            if given[2:] != wanted[2:]:
                found[name] = resample_patch_embed(found[name], list(wanted[2:]))
                changes.append(f"patches {given[2]} -> {wanted[2]} px")
    if "pos_embed" in found and found["pos_embed"].shape[2] == ours["pos_embed"].shape[2]:
        before, after = grid or square(found["pos_embed"], weights), grid_of(network)
        found["pos_embed"] = adapt_positions(found["pos_embed"], ours["pos_embed"], before, after)
        if before != after:
            changes.append("positions {}x{} -> {}x{}".format(*before, *after))
    needed = [name for name in {**ours, **weights} if name.partition(".")[0] not in OPTIONAL]
    unlike = [name for name, value in found.items() if value.shape != ours[name].shape]
    wrong = [name for name in needed if name not in found] + unlike
    if wrong:
        raise ValueError(f"another architecture: {', '.join(wrong[:3])}")
    return Adapted(found, changes)


def adapt_positions(
    given: Float[Tensor, "1 _ D"], ours: Float[Tensor, "1 _ D"], before: tuple[int, int], after: tuple[int, int]
) -> Float[Tensor, "1 _ D"]:
    """Resample position embeddings to another grid.

    Positions of prefix tokens come from `given` if both have the same number of them, otherwise from `ours`.

    Args:
        given: Positions of prefix tokens, if any, followed by those of the tokens of a grid.
        ours: The positions to replace.
        before: Rows and columns of `given`.
        after: Rows and columns of `ours`.
    """
    prefix, tokens = given.tensor_split([given.shape[1] - math.prod(before)], dim=1)
    own = ours[:, : ours.shape[1] - math.prod(after)]
    tokens = resample_positions(tokens, before, after)
    return torch.cat([prefix if prefix.shape == own.shape else own, tokens], dim=1)


def grid_of(network: nn.Module) -> tuple[int, int]:
    """Return the rows and columns of a network's position embeddings."""
    known: Any = network
    rows, columns = known.grid if hasattr(known, "grid") else known.patch_embed.grid_size
    return rows, columns


def square(positions: Float[Tensor, "1 _ D"], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Find the square grid of position embeddings, whether or not they include those of prefix tokens.

    Raises:
        ValueError: If they do not form a square.
    """
    prefix = sum(weights[name].shape[1] for name in ("cls_token", "reg_token") if name in weights)
    for count in (positions.shape[1] - prefix, positions.shape[1]):
        if math.isqrt(count) ** 2 == count:
            return math.isqrt(count), math.isqrt(count)
    raise ValueError(f"{positions.shape[1]} positions do not form a square: pos_embed")
