"""Nearest neighbours and near-duplicates by cosine similarity: exact, computed in blocks to bound the memory."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dmjd.errors import ConfigError, DataError

SIMILARITIES = 2**24  # held in memory at a time: 64 MiB
BLOCK = 4096  # images compared with as many others at a time
MOST_PAIRS = 1_000_000
ROUNDING = 1e-6  # the computed similarity of equal rows may be so much less than 1


def nearest(
    bank: Float[np.ndarray, "n D"], queries: Float[Tensor, "q D"], *, k: int, device: torch.device
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Find the k rows of highest cosine similarity to each query.

    Args:
        bank: Rows to search, which may be memory-mapped.
        queries: Rows to compare them with.
        k: Number of neighbours; all rows if there are fewer.
        device: Where to compute.

    Returns:
        Similarities in descending order and the rows' indices, on the CPU.

    Raises:
        DataError: If a row has values that are not finite.
    """
    queries = F.normalize(queries.to(device), dim=1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=device)
    size = min(max(SIMILARITIES // len(queries), k), 2**16)
    for start, block in blocks(bank, size, device):
        found = queries @ block.T
        similar, place = found.topk(min(k, len(block)), dim=1)
        best, rows = torch.cat([best, similar], dim=1), torch.cat([rows, place + start], dim=1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return best.cpu(), rows.cpu()


def near_pairs(
    bank: Float[np.ndarray, "n D"], *, threshold: float, device: torch.device
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Find all pairs of rows, the lower number first, whose cosine similarity reaches a threshold.

    Raises:
        ConfigError: If there are more than a million.
        DataError: If a row has values that are not finite.
    """
    pairs, similar, count = [torch.empty(0, 2, dtype=torch.long)], [torch.empty(0)], 0
    total = -(-len(bank) // BLOCK)
    seen = tqdm(blocks(bank, BLOCK, device), desc="duplicates", unit=" blocks", total=total, leave=False, disable=None)
    for first, ours in seen:
        for ahead, others in blocks(bank[first:], BLOCK, device):
            found = ours @ others.T
            near = found >= threshold - ROUNDING
            near = near if ahead else near.triu(diagonal=1)
            if not near.any():
                continue
            similar.append(found[near].cpu())
            pairs.append(near.nonzero().cpu() + torch.tensor([first, first + ahead]))
            count += len(pairs[-1])
            if count > MOST_PAIRS:
                said = f"more than {MOST_PAIRS:,} pairs are this similar; --threshold {threshold:g}"
                raise ConfigError(f"{said}; choose a higher one")
    return torch.cat(pairs), torch.cat(similar)


def groups_of(pairs: Int[Tensor, "p 2"], count: int) -> list[list[int]]:
    """Find the connected components of the graph that pairs of numbers below `count` form, in order of their first."""
    from scipy.sparse import coo_array  # here: a run that pre-trains needs the other functions only, and starts sooner
    from scipy.sparse.csgraph import connected_components

    first, second = pairs.numpy().T
    joined = coo_array((np.ones(len(pairs), np.int8), (first, second)), shape=(count, count))
    _, group = connected_components(joined, directed=False)
    members: dict[int, list[int]] = {}
    for number in np.unique(pairs.numpy()).tolist():
        members.setdefault(int(group[number]), []).append(number)
    return list(members.values())


def blocks(
    bank: Float[np.ndarray, "n D"], size: int, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, "b D"]]]:
    """Read rows in blocks of `size`, as float32 of unit norm, each block with the index of its first row.

    Raises:
        DataError: If a row has values that are not finite.
    """
    for start in range(0, len(bank), size):
        block = torch.from_numpy(bank[start : start + size].astype(np.float32)).to(device)
        if not bool(block.isfinite().all()):
            row = start + int((~block.isfinite()).any(dim=1).nonzero()[0])
            raise DataError(f"values that are not finite; row {row} of the features; embed the images again")
        yield start, F.normalize(block, dim=1)
