"""Disjoint masks: which tokens each view of an image hides (DM).

All views of an image are drawn at once. Its tokens are shuffled, the first U of them form a circle, and view v hides
the v-th arc of M tokens. So every view hides M tokens, together they hide U, and no token of the circle is hidden twice
before all are hidden once.

A mask is bool, True = hidden from the encoder. Letters: B images, V views, N = B*V rows (image-major), L tokens of
which a view hides M and shows K = L - M, U tokens that at least one view hides.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dmjd.random import mix_all


class TokenIds(NamedTuple):
    """The indices of the visible and hidden tokens of every row, in raster order."""

    visible: Int[Tensor, "N K"]
    hidden: Int[Tensor, "N M"]


def disjoint_masks(
    batch_size: int,
    num_tokens: int,
    *,
    num_views: int,
    mask_ratio: float,
    predict_ratio: float = 1.0,
    generator: Generator | None = None,
) -> Bool[Tensor, "B V L"]:
    """Draw the masks of V views for each image, token by token.

    One view is MAE's masking; with four at a mask ratio of 0.75, every token is visible exactly once. Arguments and
    errors are those of `block_masks`.
    """
    return block_masks(
        batch_size,
        (1, num_tokens),
        block=1,
        num_views=num_views,
        mask_ratio=mask_ratio,
        predict_ratio=predict_ratio,
        generator=generator,
    )


def block_masks(
    batch_size: int,
    grid: tuple[int, int],
    *,
    block: int = 2,
    num_views: int,
    mask_ratio: float,
    predict_ratio: float = 1.0,
    generator: Generator | None = None,
) -> Bool[Tensor, "B V L"]:
    """Draw the masks of V views for each image in squares of `block` x `block` tokens (as in SimMIM).

    If squares do not tile the grid, those at its lower and right border are smaller and a few are split between views,
    so that the counts stay exact and every token is equally likely to be hidden.

    Args:
        batch_size: B; images are independent of each other.
        grid: Rows and columns of tokens, L = rows * columns.
        block: Side of a square, in tokens.
        num_views: V.
        mask_ratio: Corruption rate m_corr in (0, 1): a view keeps K = block^2 * floor(L / block^2 * (1 - m_corr)).
        predict_ratio: Prediction rate m_pred: U = round(m_pred * L), in whole squares if these tile the grid.
        generator: Source of randomness; the masks are on its device.

    Raises:
        ValueError: If there are no such masks; the message names the valid range.
    """
    device = None if generator is None else generator.device
    seeds = torch.randint(2**62, (batch_size,), generator=generator, device=device)
    return seeded_masks(
        seeds, grid, block=block, num_views=num_views, mask_ratio=mask_ratio, predict_ratio=predict_ratio
    )


def seeded_masks(
    seeds: Int[Tensor, " B"],
    grid: tuple[int, int],
    *,
    block: int = 2,
    num_views: int,
    mask_ratio: float,
    predict_ratio: float = 1.0,
) -> Bool[Tensor, "B V L"]:
    """Draw the masks of each image from its own seed, on the seeds' device, with the same bits on any device.

    Other arguments and errors are those of `block_masks`.
    """
    num_hidden, num_predicted = mask_counts(
        grid, block=block, num_views=num_views, mask_ratio=mask_ratio, predict_ratio=predict_ratio
    )
    rows, columns = (torch.arange(side, device=seeds.device) for side in grid)
    heights, widths = (
        (side - places[::block]).clamp(max=block) for side, places in zip(grid, (rows, columns), strict=True)
    )
    sizes_S = (heights[:, None] * widths).flatten()  # of the squares, in tokens
    square_L = (rows[:, None] // block * len(widths) + columns // block).flatten()
    within_L = (rows[:, None] % block * widths[columns // block] + columns % block).flatten()
    # Squares in random order, the tokens of one square side by side.
    draws = mix_all(seeds[:, None], torch.arange(len(sizes_S) + 1, device=seeds.device))
    order_BS = draws[:, :-1].argsort(dim=1, stable=True)
    sizes_BS = sizes_S[order_BS]
    starts_BS = sizes_BS.cumsum(dim=1) - sizes_BS
    place_BL = starts_BS.scatter(1, order_BS, starts_BS)
    if block > 1:
        place_BL = place_BL[:, square_L] + within_L
    if grid[0] % block or grid[1] % block:
        # Squares of unequal size do not come first equally often; a random rotation makes all tokens equally likely.
        place_BL = (place_BL + draws[:, -1:] % len(square_L)) % len(square_L)
    # The places that each view hides are the same for all images: look them up instead of computing B V L of them.
    places_L = torch.arange(len(square_L), device=seeds.device)
    arc_V1 = num_hidden * torch.arange(num_views, device=seeds.device)[:, None]
    hidden_VL = (places_L < num_predicted) & ((places_L - arc_V1) % num_predicted < num_hidden)
    shape = (len(seeds), *hidden_VL.shape)
    return hidden_VL.expand(shape).gather(2, place_BL[:, None, :].expand(shape))


def mask_counts(
    grid: tuple[int, int], *, block: int, num_views: int, mask_ratio: float, predict_ratio: float
) -> tuple[int, int]:
    """Return the number of tokens that each view hides, M, and that at least one view hides, U.

    Ratios are treated as exact decimals: a fifth of 100 tokens is 20, whatever 1 - 0.8 is in binary.

    Raises:
        ValueError: If V masks of M tokens cannot cover exactly U tokens.
    """
    num_tokens, area = grid[0] * grid[1], block * block
    if not (math.isfinite(mask_ratio) and math.isfinite(predict_ratio)):
        raise ValueError(f"mask_ratio {mask_ratio} and predict_ratio {predict_ratio} must be numbers between 0 and 1")
    corrupt, predict = Fraction(str(mask_ratio)), Fraction(str(predict_ratio))
    if num_views < 1:
        raise ValueError(f"num_views is {num_views}; an image needs at least 1 view")
    num_visible = area * math.floor(num_tokens * (1 - corrupt) / area)
    if not (0 < corrupt < 1 and num_visible > 0):
        most = math.floor(10_000 * (1 - Fraction(area, num_tokens))) / 10_000  # rounded up, it would be refused too
        highest = f"at most {most:g}" if num_tokens > area else "a larger image"
        raise ValueError(f"mask_ratio {mask_ratio} leaves no view of {num_tokens} tokens: choose above 0, {highest}")
    reach = min(Fraction(1), num_views * corrupt)
    if not corrupt <= predict <= reach:
        raise ValueError(
            f"predict_ratio {predict_ratio} is out of reach: {num_views} view(s) at mask_ratio {mask_ratio} predict "
            f"between {mask_ratio} and {float(reach):g} of the tokens"
        )
    num_hidden = num_tokens - num_visible
    unit = 1 if grid[0] % block or grid[1] % block else area
    return num_hidden, max(num_hidden, unit * round(num_tokens * predict / unit))


def token_ids(masked: Bool[Tensor, "B V L"], num_hidden: int | None = None) -> TokenIds:
    """List the visible and the hidden tokens of every row.

    Args:
        masked: True = hidden.
        num_hidden: M, if known; otherwise the tokens are counted, which synchronises with a GPU.

    Raises:
        ValueError: If tokens are counted and rows hide different numbers of them, all or none.
    """
    masked_NL = masked.flatten(0, 1)
    if num_hidden is None:
        counts_N = masked_NL.sum(dim=1)
        num_hidden = int(counts_N[0])
        if (counts_N != num_hidden).any() or num_hidden in (0, masked_NL.shape[1]):
            raise ValueError("masked: every view must hide the same number of tokens, and neither all nor none")
    order_NL = masked_NL.byte().argsort(dim=1, stable=True)
    return TokenIds(*order_NL.tensor_split([masked_NL.shape[1] - num_hidden], dim=1))


def gather_tokens(tokens: Float[Tensor, "B L D"], ids: Int[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
    """Gather S tokens for each of the V = N / B views of an image, without first copying all L tokens V times."""
    batch_size, _, width = tokens.shape
    ids_BVSD = ids.view(batch_size, -1, ids.shape[1], 1).expand(-1, -1, -1, width)
    return tokens[:, None].expand(-1, ids_BVSD.shape[1], -1, -1).gather(2, ids_BVSD).flatten(0, 1)
