"""Small sets are decoded once and held in memory, instead of being decoded in every epoch.

Small images of one size form a single tensor on the network's device, from which a batch is cropped at once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int, Num, UInt8
from torch import Tensor
from tqdm import tqdm

from dmjd.data.builtin import ArrayImages
from dmjd.data.decode import DTYPES, BadImage, Reduce
from dmjd.data.source import Source, View
from dmjd.data.workers import usable_cores

MEMORY_LIMIT = 2**30  # bytes of decoded images up to which a set is held in memory
DEVICE_SHARE = 0.25  # share of a GPU's total memory that images may take; free memory would vary from run to run
CPU_SIDE = 128  # pixels; on a CPU, cropping larger images by matrix products is slower than one by one
CHUNK = 256  # images that a thread decodes at a time
THREADED = 2**16  # bytes of an image from which threads pay off: for smaller ones they mostly wait for the GIL

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Stack:
    """Images of one size and depth in one tensor.

    Attributes:
        pixels: The images that decode.
        numbers: For each image of the set its own index, or that of the next one that decodes.
        rows: The row of `pixels` that holds it.
    """

    pixels: Num[Tensor, "m C H W"]
    numbers: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]

    def to(self, device: torch.device) -> "Stack":
        """Move the pixels to a device."""
        return replace(self, pixels=self.pixels.to(device))

    def fits(self, device: torch.device) -> bool:
        """Tell whether cropping on the device pays off: a GPU has the memory, or on a CPU the images are small."""
        if device.type != "cuda":
            return max(self.pixels.shape[2:]) <= CPU_SIDE
        return self.pixels.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[1]


class PackedImages(View):
    """The decoded images of a source, of any sizes, packed into one buffer that worker processes share.

    Names and labels are looked up in the source.

    Args:
        source: Source to decode; not empty.
        threads: Number of threads that decode; 0 for the calling thread.

    Attributes:
        pixels: All images one after the other, each H W C.
        shapes: Height, width and channels of each, and the index of its type in `DTYPES`.
        offsets: First byte of each.
        bad: Images that did not decode, with the reason.
    """

    pixels: UInt8[Tensor, " bytes"]
    shapes: Int[Tensor, "n 4"]
    offsets: Int[Tensor, " n"]
    bad: dict[int, str]

    def __init__(self, source: Source, threads: int = 0):
        super().__init__(source)
        self.bad = {}
        content, shapes = bytearray(), np.zeros((len(source), 4), dtype=np.int64)
        offsets = np.zeros(len(source), dtype=np.int64)
        for index, image in enumerate(_decoded(source, threads)):
            if isinstance(image, BadImage):
                self.bad[index] = str(image)
                continue
            content += bytes(-len(content) % image.element_size())
            shapes[index] = (*image.shape[1:], image.shape[0], DTYPES.index(image.dtype))
            offsets[index] = len(content)
            if len(content) + image.nbytes > MEMORY_LIMIT:
                raise _TooLarge
            content += image.permute(1, 2, 0).contiguous().numpy().tobytes()
        self.pixels = torch.frombuffer(content or bytearray(1), dtype=torch.uint8)
        self.shapes, self.offsets = torch.from_numpy(shapes), torch.from_numpy(offsets)

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    @property
    def broken(self) -> dict[str, str]:
        """Names of the images that did not decode, with the reason."""
        return {self.name(index): reason for index, reason in self.bad.items()}

    @cached_property
    def stack(self) -> Stack | None:
        """All images in one tensor that shares their memory; None if they differ in size or depth, or none decodes."""
        good = [index for index in range(len(self)) if index not in self.bad]
        if not good or (self.shapes[good] != self.shapes[good[0]]).any():
            return None
        height, width, channels, kind = self.shapes[good[0]].tolist()
        size = height * width * channels * DTYPES[kind].itemsize
        pixels = self.pixels[: size * len(good)].view(DTYPES[kind]).view(len(good), height, width, channels)
        rows = torch.from_numpy(np.searchsorted(good, np.arange(len(self)))) % len(good)
        return Stack(pixels.permute(0, 3, 1, 2), torch.tensor(good)[rows], rows)

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Look up an image.

        Raises:
            BadImage: If it did not decode.
        """
        if index in self.bad:
            raise BadImage(self.bad[index])
        height, width, channels, kind = self.shapes[index].tolist()
        start, size = int(self.offsets[index]), height * width * channels * DTYPES[kind].itemsize
        pixels = self.pixels[start : start + size].view(DTYPES[kind])
        return pixels.view(height, width, channels).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, object]:
        """Drop the stack on pickling for a worker: it is computed again where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "stack"}


class _TooLarge(Exception):
    """The images exceed `MEMORY_LIMIT`."""


def _decoded(source: Source, threads: int) -> Iterator[Tensor | BadImage]:
    """Decode all images in order."""

    def read(start: int) -> list[Tensor | BadImage]:
        images: list[Tensor | BadImage] = []
        for index in range(start, min(start + CHUNK, len(source))):
            try:
                images.append(source.read(index))
            except BadImage as bad:
                images.append(bad)
        return images

    starts = range(0, len(source), CHUNK)
    with tqdm(total=len(source), desc="reading images", unit=" images", leave=False, disable=None) as bar:
        for images in in_threads(read, starts, threads):
            yield from images
            bar.update(len(images))


def in_threads(work: Callable[[T], U], items: Iterable[T], threads: int, **options: Any) -> Iterator[U]:
    """Do what `map` does, in threads that work only a little ahead.

    Args:
        work: Called with each item; results come in the order of the items.
        items: Items, read only as far ahead as the threads are.
        threads: Number of threads; 0 for the calling thread.
        options: Further arguments of `ThreadPoolExecutor`.
    """
    if not threads:
        yield from map(work, items)
        return
    waiting: deque[Future[U]] = deque()
    pool = ThreadPoolExecutor(threads, **options)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also if the generator is closed early
        pool.shutdown(cancel_futures=True)


def in_memory(source: Source) -> Source:
    """Hold the decoded images of a source in memory if they are few and small; else return it as it is.

    The size is estimated from the largest of a few images spread over the set. Large images are decoded on all cores.
    """
    if source.in_memory:
        return source
    sizes = []
    for index in range(0, len(source), max(len(source) // 16, 1)):
        with suppress(BadImage):
            sizes.append(source.read(index).nbytes)
    if not sizes or max(sizes) * len(source) > MEMORY_LIMIT:
        return source
    try:
        return PackedImages(source, threads=min(usable_cores(), 16) if max(sizes) > THREADED else 0)
    except _TooLarge:  # other images are larger than those few
        return source


def stack_of(source: Source) -> Stack | None:
    """Return the images of a source in one tensor, if they are held in one."""
    if isinstance(source, PackedImages):
        return source.stack
    if isinstance(source, ArrayImages):
        numbers = torch.arange(len(source))
        return Stack(source.pixels, numbers, numbers)
    return None
