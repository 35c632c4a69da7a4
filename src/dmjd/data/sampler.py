"""The samples of a step, a pure function of (seed, step): the same after resuming at any step, on any number of ranks.

The images of a run are one endless stream: position p is image order(epoch)[p mod n] of epoch p // n. Step s takes the
positions s*B ... s*B + B-1, so every batch is full, whatever the size of the set.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Generator, Tensor
from torch.utils.data import Sampler

from dmjd.random import mix


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    """Shuffle the indices of `count` images for an epoch."""
    return torch.randperm(count, generator=Generator().manual_seed(mix(seed, epoch)))


class StepKeys(list[tuple[int, int]]):
    """The (epoch, index) pairs of a micro-batch, and the `epoch` in which its step begins: the same on all ranks."""

    def __init__(self, keys: Iterable[tuple[int, int]], epoch: int):
        super().__init__(keys)
        self.epoch = epoch


@dataclass(frozen=True)
class StepSampler(Sampler[StepKeys]):
    """The (epoch, index) pairs of every micro-batch of one rank, from a step to the end of the run.

    A step's batch is split into accumulation * world_size micro-batches; rank r takes number r, r + world_size, ...

    Attributes:
        count: Images in the set.
        batch_size: Images in one step, over all ranks and micro-batches; a multiple of their number.
        start: Steps that are already done.
        steps: Steps of the whole run.
        seed: Seed of the order of the images.
        accumulation: Micro-batches of one rank in a step.
        rank: This rank, from 0.
        world_size: Number of ranks.
    """

    count: int
    batch_size: int
    start: int
    steps: int
    seed: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulation

    def __iter__(self) -> Iterator[StepKeys]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.start, self.steps):
            for part in range(self.accumulation):
                first = step * self.batch_size + (part * self.world_size + self.rank) * micro
                yield StepKeys(self._positions(first, first + micro), step * self.batch_size // self.count)

    def _positions(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the (epoch, index) of positions `first` ... `last` - 1, epoch by epoch."""
        for epoch in range(first // self.count, (last - 1) // self.count + 1):
            begin, end = (min(max(place - epoch * self.count, 0), self.count) for place in (first, last))
            for index in order(self.seed, epoch, self.count)[begin:end].tolist():
                yield epoch, index
