"""Memory that workers lend is used again, and not before the last tensor that looks at it is gone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from dmjd.data import lent
from dmjd.data.loader import train_batches
from dmjd.data.masked import MaskedBatch
from dmjd.data.sampler import StepSampler
from dmjd.data.source import Source

STEPS = 30


@dataclass(frozen=True)
class Numbered(Dataset[MaskedBatch]):
    """Batches full of their number, which say how many slots their worker has; larger ones from the second epoch on."""

    images: Source | None = None
    dtype: torch.dtype = torch.uint8
    later: int = 4  # height

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> MaskedBatch:
        height = self.later if keys[0][0] else 4
        batch = lent.room((len(keys), height, 4, 3), self.dtype).fill_(keys[0][1]).permute(0, 3, 1, 2)
        indices = torch.tensor([index for _, index in keys])
        return MaskedBatch(batch, torch.full_like(indices, len(lent._slots)), indices, {})


def loaded(samples: Numbered, workers: int = 1) -> Iterable[Any]:
    return train_batches(samples, StepSampler(50, 2, 0, STEPS, 0), None, workers=workers, pin_memory=False)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_lent__batches_that_are_kept_or_looked_at_stay_as_they_are(dtype: torch.dtype) -> None:
    kept = []
    for place, batch in enumerate(loaded(Numbered(dtype=dtype))):
        assert batch.images.shape == (2, 3, 4, 4)
        assert batch.images.dtype == dtype
        kept.append((batch.images if place % 2 else batch.images[1:, :, 2], int(batch.indices[0])))  # or a view alone
    assert len(kept) == STEPS
    assert all((images.float() == number).all() for images, number in kept)


@pytest.mark.long
def test_lent__a_worker_has_as_many_slots_as_batches_are_under_way() -> None:
    slots = [int(batch.seeds[0]) for batch in loaded(Numbered())]
    assert max(slots) <= 4  # two that the loader asked for, one that is looked at, one between
    assert int(list(loaded(Numbered()))[-1].seeds[0]) > 4


@pytest.mark.long
def test_lent__slots_that_no_batch_fits_any_more_are_given_up() -> None:
    slots = [int(batch.seeds[0]) for batch in loaded(Numbered(later=5))]
    assert max(slots[:24]) <= 4
    assert slots[-1] <= 5


def test_lent__without_workers_memory_is_like_any_other() -> None:
    batches = list(loaded(Numbered(), workers=0))
    assert all((batch.images == batch.indices[0]).all() and batch.seeds[0] == 0 for batch in batches)
