"""Examination of a set of images: every image is decoded once, and its properties are kept.

A file that does not decode, or has other channels than the rest, is counted and named, and stops nothing.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from dmjd.data.crops import RandomCrop
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.duplicates import Outline, exact_copies, near_copies, outline
from dmjd.data.folder import file_and_page
from dmjd.data.levels import BYTES, levels_of
from dmjd.data.memory import in_threads
from dmjd.data.peek import Peek, peek
from dmjd.data.prepared import SET, read_set
from dmjd.data.source import Source, evenly, is_file_name, open_parts
from dmjd.data.statistics import Statistics, statistics_of
from dmjd.data.workers import usable_cores
from dmjd.errors import DataError

CHUNK = 64  # images that a thread examines at a time
BINS = 64  # of a histogram of values
MEASURED = 256  # images whose values are measured, as training does
TIMED = 64  # images that are timed
PEEKED = 64  # headers read per part
MOST_PAIRS = 10_000  # pairs of near copies: a set of nothing but copies has millions


@dataclass(frozen=True, kw_only=True)
class Look:
    """One image of a set.

    Attributes:
        part: Its part of the set, and `index` its number there.
        name: Its name in its source.
        fault: Why it does not decode, or does not fit the others; if empty, shape, dtype and digest are set.
        broken: Whether the file itself is at fault.
        header: Its header, if it is a file.
        file_bytes: Size of that file.
        shape: Channels, height and width.
        dtype: Type of its values.
        digest: SHA-256 of its values.
        outline: Its fingerprint, to find copies; None for a uniform image.
    """

    part: str
    index: int
    name: str
    fault: str = ""
    broken: bool = False
    header: Peek | None = None
    file_bytes: int | None = None
    shape: tuple[int, int, int] = (0, 0, 0)
    dtype: str = ""
    digest: bytes = b""
    outline: Outline | None = None


def file_of(source: Source, index: int) -> Path | None:
    """Find the file of an image in a folder or a list; None if it is inside another file, or drawn."""
    root, name = Path(source.address), source.name(index)
    for each in (name, file_and_page(name)[0]):
        file = (root if root.is_dir() else root.parent) / each
        if file.is_file():
            return file
    return None


def headers(parts: Mapping[str, Source]) -> list[Peek]:
    """Read the headers of some files, evenly spaced over a set."""
    found = []
    for source in parts.values():
        for index in evenly(len(source), PEEKED):
            if file := file_of(source, index):
                with suppress(BadImage):
                    found.append(peek(file))
    return found


def stored_channels(data: str) -> int:
    """Look up the channels of a prepared set or an array, which have one number for all images; 3 for any other set."""
    if (Path(data) / SET).is_file():
        channels: int = read_set(Path(data))["in_chans"]
        return channels
    if is_file_name(data, ".npy"):
        with suppress(OSError, ValueError, EOFError):  # opening it says what is wrong
            shape = open_memmap(data, mode="r").shape
            return int(min(shape[1], shape[3])) if len(shape) == 4 else 1
    return 3


def open_as_most(
    data: str, in_chans: int | None, pages: Literal["bands", "frames"] | None, *, look: bool = False
) -> tuple[dict[str, Source], Wanted]:
    """Open a set in the way that suits most of its files: with the channels that they have.

    Args:
        data: What to open.
        in_chans: Channels, if they are known.
        pages: What pages are, if that is known; otherwise files of several pages are refused.
        look: If `pages` is None and most files have several pages, open them as frames.

    Raises:
        DataError: If there is no such set, or no image in it.
    """
    stored = stored_channels(data)
    wanted = Wanted(in_chans=in_chans or stored, pages=pages)
    parts = open_parts(data, wanted)
    seen = headers(parts)
    channels = Counter(each.channels * (each.pages if pages == "bands" else 1) for each in seen)
    usual = channels.most_common(1)[0][0] if channels else stored
    several = sum(each.pages > 1 for each in seen) > len(seen) / 2
    fitting = Wanted(in_chans=in_chans or usual, pages=pages or ("frames" if look and several else None))
    return (parts if fitting == wanted else open_parts(data, fitting)), fitting


def chosen(parts: Mapping[str, Source], count: int, seed: int) -> list[tuple[str, int]]:
    """Choose the images to examine, by part and number: all of them, or a sample drawn by seed, in order."""
    starts = np.cumsum([0, *map(len, parts.values())])
    numbers = torch.randperm(int(starts[-1]), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    names, places = list(parts), np.searchsorted(starts, numbers.numpy(), side="right") - 1
    return [(names[part], int(number - starts[part])) for part, number in zip(places, numbers.tolist(), strict=True)]


def look_at(parts: Mapping[str, Source], images: list[tuple[str, int]], workers: int | None) -> list[Look]:
    """Decode images and keep their properties, in threads: decoders release the GIL."""
    threads = workers or min(usable_cores(), 16)
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    looks: list[Look] = []

    def look_at_all(chunk: list[tuple[str, int]]) -> list[Look]:
        return [look(parts[part], part, index) for part, index in chunk]

    with tqdm(total=len(images), desc="looking at images", unit=" images", leave=False, disable=None) as bar:
        for found in in_threads(look_at_all, chunks, threads):
            looks += found
            bar.update(len(found))
    return looks


def look(source: Source, part: str, index: int) -> Look:
    """Decode one image and keep its properties."""
    one = partial(Look, part=part, index=index, name=source.name(index))
    if file := file_of(source, index):
        one = partial(one, file_bytes=file.stat().st_size)
        with suppress(BadImage):  # decoding says why
            one = partial(one, header=peek(file))
    try:
        image = source.read(index)
    except BadImage as bad:
        return one(fault=str(bad), broken=True)
    except DataError as error:
        what, *_, advice = str(error).split("; ")
        return one(fault=f"{what}; {advice}")
    kind = str(image.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{tuple(image.shape)} {kind}".encode())
    digest.update(image.contiguous().numpy().tobytes())
    shape = (image.shape[0], image.shape[1], image.shape[2])
    return one(shape=shape, dtype=kind, digest=digest.digest(), outline=outline(image))


# -- values ------------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """Pixel values of a sample of images.

    Attributes:
        statistics: Mean and standard deviation to normalise images by.
        histograms: By channel, the share of values in each of 64 equal bins over the range; all images count the same.
    """

    statistics: Statistics
    histograms: Float64[np.ndarray, "C bins"]

    @property
    def filled(self) -> int:
        """Bins with more than a thousandth of the values, in the channel that has the most of them."""
        return int((self.histograms > 0.001).sum(axis=1).max())


def measure_values(parts: Mapping[str, Source], looks: Sequence[Look]) -> Values:
    """Measure a sample of the images that decode.

    Args:
        parts: Sources of the images.
        looks: Images that decode, at least one.

    Raises:
        DataError: If all values are the same.
    """
    few = [looks[place] for place in evenly(len(looks), MEASURED)]
    deep = any(each.dtype != "uint8" for each in few)
    levels = levels_of(_images(parts, few)) if deep else BYTES
    shares = np.zeros((few[0].shape[0], BINS))

    def counted() -> Iterator[Tensor]:
        for image in _images(parts, few):
            steps = (levels.scale(image).float().flatten(1) * (BINS / 256)).long().numpy()
            shares[:] += [np.bincount(channel, minlength=BINS) / channel.size for channel in steps]
            yield image

    statistics = statistics_of(counted(), levels)
    return Values(statistics, shares / len(few))


class Speed(NamedTuple):
    """Core-seconds per training sample."""

    decode: float
    crop: float


def measure_speed(parts: Mapping[str, Source], looks: Sequence[Look], size: int) -> Speed:
    """Time reading as in training: decoding no larger than the random crop needs, and the crop of `size` pixels."""
    crop = RandomCrop((size, size), (0.2, 1.0), (3 / 4, 4 / 3), True)
    few, times = [looks[place] for place in evenly(len(looks), TIMED)], []
    for each, draws in zip(few, crop.draws(torch.arange(len(few))), strict=True):
        began = time.process_time()
        image = parts[each.part].read(each.index, partial(crop.factor, draws))
        read = time.process_time()
        crop.of_one(image, draws)
        times.append((read - began, time.process_time() - read))
    decode, crops = np.mean(times, axis=0).tolist()
    return Speed(decode, crops)


def _images(parts: Mapping[str, Source], looks: Sequence[Look]) -> Iterator[Tensor]:
    return (parts[each.part].read(each.index) for each in looks)


# -- copies ------------------------------------------------------------------------------------------------------------


class Copies(NamedTuple):
    """Images that occur more than once, by their places in a list.

    Attributes:
        exact: Groups of equal images.
        near: Pairs of images that are almost equal; of equal images only the first is paired.
        leaked: Pairs of an image outside the part `train` and a copy of it inside, exact copies first.
    """

    exact: list[list[int]]
    near: list[tuple[int, int]]
    leaked: list[tuple[int, int]]


def find_copies(looks: Sequence[Look]) -> Copies:
    """Find equal and almost equal images among those that decode."""
    exact = exact_copies([each.digest for each in looks])
    later = {number for group in exact for number in group[1:]}
    firsts = [(place, each.outline) for place, each in enumerate(looks) if each.outline and place not in later]
    near: list[tuple[int, int]] = []
    if firsts:
        bits = np.array([found.bits for _, found in firsts], dtype=np.uint64)
        thumbnails = np.stack([found.thumbnail for _, found in firsts])
        pairs = islice(near_copies(bits, thumbnails), MOST_PAIRS)
        near = sorted((firsts[one][0], firsts[other][0]) for one, other in pairs)
    leaked = []
    for group in (*exact, *map(list, near)):
        inside = [place for place in group if looks[place].part == "train"]
        leaked += [(place, inside[0]) for place in group if inside and looks[place].part != "train"]
    return Copies(exact, near, leaked)
