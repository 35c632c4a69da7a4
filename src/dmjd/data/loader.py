"""Batches of images for training and evaluation; the network sees the same, whichever processes load them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Num
from torch import Generator, Tensor

from dmjd.data.decode import BadImage
from dmjd.data.levels import refuse_deep
from dmjd.data.sampler import StepSampler
from dmjd.data.source import Readable, Source
from dmjd.data.workers import load_batches, usable_cores

FEW = 512  # images below which reading takes less time than starting workers


@runtime_checkable
class ReadableSamples(Protocol):
    """Training samples by (epoch, index), made from a set of images.

    They have `__getitem__`, for one sample, or `__getitems__`, for a batch at once; in the latter case a `stack` that
    is not None means that batches are made on the network's device.
    """

    @property
    def images(self) -> Readable:
        """The images that samples are made from."""
        ...


def train_batches(
    samples: ReadableSamples,
    sampler: StepSampler,
    collate: Callable[[list[Any]], Any] | None,
    *,
    workers: int | None,
    pin_memory: bool,
) -> Iterable[Any]:
    """Load the micro-batches of a run, in order.

    Args:
        samples: Samples to load.
        sampler: Order of the samples.
        collate: Makes a batch from samples; None for samples that come as a batch.
        workers: Number of processes; None takes none for images in memory, else one fewer than the cores of this rank.
            Batches that are made on the network's device never take any.
        pin_memory: Make copies to a GPU asynchronous.

    Raises:
        ConfigError: While loading, if a process was killed or stopped.
    """
    in_place = getattr(samples, "stack", None) is not None
    if in_place or (workers is None and samples.images.in_memory):
        workers = 0
    elif workers is None:
        workers = spare_cores()
    return load_batches(samples, sampler, collate or _as_is, workers=workers, pin_memory=pin_memory and not in_place)


def read_batches(
    source: Source,
    indices: Sequence[int],
    transform: Callable[[Num[Tensor, "C H W"]], Num[Tensor, "C h w"]],
    *,
    batch_size: int,
    workers: int | None,
    pin_memory: bool,
) -> Iterator[tuple[Num[Tensor, "b C h w"], list[int]]]:
    """Read images for an evaluation, in order; those that do not decode are left out.

    Args:
        source: The set.
        indices: Indices of the images to read.
        transform: Resizes all images to one size.
        batch_size: Images in a batch (the last may have fewer), before those that do not decode are left out.
        workers: Number of processes; None takes none for fewer than 512 images, else one fewer than the cores of this
            rank. Images in memory never take any.
        pin_memory: Make copies to a GPU asynchronous.

    Yields:
        Images and their indices. There are always ceil(len(indices) / batch_size) batches: one in which no image
        decodes has shape (0, 0, 0, 0).
    """
    if source.in_memory or (workers is None and len(indices) < FEW):
        workers = 0  # reading is done before a worker has started
    elif workers is None:
        workers = spare_cores()
    chunks = (list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    reading, generator = _Reading(source, transform), Generator()  # the loader draws a seed: not from the global one
    return iter(load_batches(reading, chunks, _stack, workers=workers, pin_memory=pin_memory, generator=generator))


@dataclass(frozen=True)
class _Reading:
    """Images by index, or None for one that does not decode."""

    source: Source
    transform: Callable[[Tensor], Tensor]

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        try:
            image = self.source.read(index)
        except BadImage:
            return None, index
        refuse_deep(image, self.source.name(index))
        return self.transform(image), index


def _stack(read: list[tuple[Tensor | None, int]]) -> tuple[Tensor, list[int]]:
    decoded = [(image, index) for image, index in read if image is not None]
    if not decoded:
        return torch.empty(0, 0, 0, 0, dtype=torch.uint8), []
    images, indices = zip(*decoded, strict=True)
    if len({image.dtype for image in images}) > 1:  # some have 8 bits; deeper ones were scaled to 0..255 as floats
        images = tuple(image.float() for image in images)
    return torch.stack(images), list(indices)


def _as_is(batch: Any) -> Any:
    """Return samples that come as a batch."""
    return batch


def spare_cores() -> int:
    """Count the cores that the main process leaves for workers: 1 to 16."""
    return max(min(usable_cores() - 1, 16), 1)
