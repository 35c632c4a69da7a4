"""Batches as a pure function of (seed, step): any number of workers or ranks, from any step on, sees the same.

The images of a run are one endless stream: position p is image order(epoch)[p mod n] of epoch p // n. Step s takes the
positions s*B ... s*B + B-1, so every batch is full, whatever the size of the set. Everything random about a sample is
drawn from a generator of (seed, epoch, index).
"""

import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dmjd.data.decode import BadImage
from dmjd.data.random import mix
from dmjd.data.source import Images
from dmjd.errors import DataError

Sample = tuple[Tensor, Tensor, int, dict[str, str]]


class Batch(NamedTuple):
    """One micro-batch."""

    images: UInt8[Tensor, "B C H W"]
    masked: Bool[Tensor, "B V L"]
    indices: Int[Tensor, " B"]  # of the images, substitutes included
    skipped: dict[str, str]  # files that did not decode, with the reason; others stand in for them


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """Shuffle the images of an epoch."""
    return torch.randperm(count, generator=Generator().manual_seed(mix(seed, epoch)))


@runtime_checkable
class Readable(Protocol):
    """A numbered set whose members may fail to decode: images, or images with their annotations."""

    @property
    def names(self) -> Sequence[str]:
        """Path of each image relative to the set's root."""
        ...

    @property
    def root(self) -> Path | None:
        """Folder of the images."""
        ...

    @property
    def held(self) -> Any:
        """What is held in memory, if anything."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, /) -> Any:
        """Decode a member; raises `BadImage`."""
        ...


def read_or_substitute(images: Readable, index: int) -> tuple[Any, int, dict[str, str]]:
    """Read an image, or the next one that decodes, and say which files did not.

    Raises:
        DataError: If a hundred in a row do not decode.
    """
    skipped: dict[str, str] = {}
    for offset in range(min(len(images), 100)):
        candidate = (index + offset) % len(images)
        try:
            return images.read(candidate), candidate, skipped
        except BadImage as bad:
            skipped[images.names[candidate]] = str(bad)
    path, reason = next(iter(skipped.items()))
    raise DataError(f"{len(skipped)} images in a row do not decode; {path}: {reason}; check --data")


@dataclass(frozen=True)
class Samples(Dataset[Sample]):
    """Training samples by (epoch, index): a crop and the masks of its views."""

    images: Images
    crop: Callable[..., UInt8[Tensor, "C h w"]]  # of (image, generator=)
    draw: Callable[..., Bool[Tensor, "1 V L"]]  # of (generator=)
    seed: int
    variants: int | None = None  # different crops of an image; None: another one every epoch

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Make one sample."""
        epoch, index = key
        generator = Generator().manual_seed(mix(self.seed, epoch, index))
        of_crop = generator
        if self.variants:
            of_crop = Generator().manual_seed(mix(self.seed, index, epoch % self.variants))
        image, read, skipped = read_or_substitute(self.images, index)
        return self.crop(image, generator=of_crop), self.draw(generator=generator)[0], read, skipped


@runtime_checkable
class ReadableSamples(Protocol):
    """Training samples by (epoch, index) of a set of images."""

    @property
    def images(self) -> Readable:
        """What they are made of."""
        ...

    def __getitem__(self, key: tuple[int, int], /) -> Any: ...


class LabelledBatch(NamedTuple):
    """One micro-batch for supervised training."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    skipped: dict[str, str]


@dataclass(frozen=True)
class LabelledSamples(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """Training samples with labels by (epoch, index).

    The augmentations of timm and torchvision draw from the global generators of Python, NumPy and torch: for a sample
    these are set to a seed of (seed, epoch, index), and afterwards to where they were.
    """

    images: Images
    transform: Callable[[Tensor], Tensor]  # from uint8 (C, H, W) to what the model takes
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, dict[str, str]]:
        """Make one sample."""
        epoch, index = key
        image, read, skipped = read_or_substitute(self.images, index)
        assert self.images.labels is not None
        with seeded(mix(self.seed, epoch, index)):
            return self.transform(image), self.images.labels[read], skipped


class AnnotatedBatch(NamedTuple):
    """One micro-batch of images with what is to be seen in them."""

    images: Any  # uint8 (B, C, H, W)
    annotations: Any
    skipped: dict[str, str]


@dataclass(frozen=True)
class AnnotatedSamples(Dataset[tuple[Any, Any, dict[str, str]]]):
    """Training samples by (epoch, index): images that an augmentation changes together with their annotations."""

    images: Readable  # reads (image, annotation)
    augment: Callable[[Any, Any], tuple[Any, Any]]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, dict[str, str]]:
        """Make one sample."""
        epoch, index = key
        (image, annotation), _, skipped = read_or_substitute(self.images, index)
        with seeded(mix(self.seed, epoch, index)):
            return *self.augment(image, annotation), skipped


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set the global generators to a seed, and back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm draws there)
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.random.default_generator.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def collate_labelled(samples: list[tuple[Tensor, int, dict[str, str]]]) -> LabelledBatch:
    """Stack samples with labels."""
    images, labels, skipped = zip(*samples, strict=True)
    return LabelledBatch(torch.stack(images), torch.tensor(labels), {k: v for each in skipped for k, v in each.items()})


def collate_annotated(samples: list[tuple[Any, Any, dict[str, str]]]) -> AnnotatedBatch:
    """Stack images and, where they are tensors, annotations."""
    images, annotations, skipped = zip(*samples, strict=True)
    stacked = torch.stack(annotations) if isinstance(annotations[0], Tensor) else list(annotations)
    return AnnotatedBatch(torch.stack(images), stacked, {k: v for each in skipped for k, v in each.items()})


@dataclass(frozen=True)
class StepSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of every micro-batch of one rank, from a step to the end of the run.

    A step's batch is cut into accumulation * world_size micro-batches; rank r takes number r, r + world_size, ...
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.start, self.steps):
            for part in range(self.accumulation):
                first = step * self.batch_size + (part * self.world_size + self.rank) * micro
                places = [divmod(position, self.count) for position in range(first, first + micro)]
                yield [(epoch, int(order(self.seed, epoch, self.count)[place])) for epoch, place in places]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples."""
    images, masked, indices, skipped = zip(*samples, strict=True)
    return Batch(
        torch.stack(images),
        torch.stack(masked),
        torch.tensor(indices),
        {k: v for each in skipped for k, v in each.items()},
    )


def train_batches(
    samples: ReadableSamples,
    positions: StepSampler,
    collate: Callable[[list[Any]], Any],
    *,
    workers: int | None,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Load the micro-batches of a run, in order.

    Args:
        samples: What to load.
        positions: Which, when.
        collate: Makes a batch of samples.
        workers: Processes; None takes none for images in memory and else one per core but one.
        pin_memory: Make copies to a GPU asynchronous.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if samples.images.held is not None else max(min(cores - 1, 16), 1)
    return DataLoader(
        cast("Dataset[Any]", samples),  # batches are what `collate` makes of the samples
        batch_sampler=positions,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        # fork deadlocks beside threads (CPython gh-112275); spawned workers also go when their parent is killed.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=set_up_worker if workers else None,
    )


def set_up_worker(worker: int) -> None:
    """Keep workers from competing for each other's cores, and alive at Ctrl-C: the main process still ends its step."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
