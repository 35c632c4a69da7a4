"""Sources of images, and how they are found: by a path, or by the name of a set.

A source is a numbered set of images, with or without labels. `--data` is opened by the first registered kind that
accepts it. A set with a part `train` and a part `val`, `valid`, `validation` or `test` has its own held-out images; of
any other set a twentieth, drawn by seed, is held out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor

from dmjd.data.decode import BadImage, Reduce, Wanted
from dmjd.data.levels import Levels, levels_of
from dmjd.data.packed import PackedNumbers
from dmjd.errors import DataError
from dmjd.random import mix
from dmjd.registry import Registry

HELD_OUT_PARTS = ("val", "valid", "validation", "test")  # in order of preference


@runtime_checkable
class Readable(Protocol):
    """A numbered set whose items may fail to decode: images, or images with their annotations."""

    @property
    def address(self) -> str:
        """Name of the set in messages: the folder of its files, or its name."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether reading is just a look-up, which worker processes would only slow down."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Path of an image relative to the set's root, or a generated name; unique in the set."""
        ...

    def read(self, index: int, /) -> Any:
        """Decode an item.

        Raises:
            BadImage: If its file does not decode.
        """
        ...


@runtime_checkable
class Source(Readable, Protocol):
    """A numbered set of images, with or without labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty if there are no labels."""
        ...

    def label(self, index: int, /) -> int | None:
        """Index of an image's class in `classes`; None if there are no labels."""
        ...

    def read(self, index: int, /, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image at its depth: uint8, uint16, int16 or float32.

        Args:
            index: Index of the image.
            reduce: How much smaller it may be, if that is cheaper (see `decode`); a source may ignore this.

        Raises:
            BadImage: If its file does not decode.
        """
        ...


@dataclass(frozen=True)
class Parts:
    """A data set: training images and held-out images.

    Attributes:
        train: Training images.
        held_out: Held-out images, for evaluation only.
        part: Name of the held-out part in the set, or how it was chosen.
    """

    train: Source
    held_out: Source
    part: str = ""

    def __iter__(self) -> Iterator[Source]:
        return iter((self.train, self.held_out))


# -- opening -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opener:
    """How a kind of source is recognised and opened.

    A file that adds one ends with a line such as::

        register_source("tape")(Opener(lambda data: data.endswith(".tape"), open_tape))

    Attributes:
        accepts: Tells whether `data` is of this kind. The kind that `data` names, as NAME or NAME:ANYTHING, is asked
            first, and that of folders last.
        open: From (data, wanted) to the parts of the set by their names (`train`, `val`, ...); a set without parts is
            one part named "". Raises `DataError`.
        names_tell_part: Whether names of images are unique across parts; if not, they are prefixed with the name of
            their part when all parts are listed together.
    """

    accepts: Callable[[str], bool]
    open: Callable[[str, Wanted], dict[str, Source]]
    names_tell_part: bool = False


register_source: Registry[Opener] = Registry("data source", "dmjd.data")


def open_source(data: str, wanted: Wanted = Wanted(), *, seed: int = 0, part: str | None = None) -> Parts:  # noqa: B008 (frozen)
    """Open a set by its path, or by its name, optionally with its folder (`cifar10:DIR`), and hold out images.

    Args:
        data: Path or name of the set.
        wanted: How to read its images.
        seed: Seed of the choice of held-out images, where the set has no part for them.
        part: Name of the held-out part. Default: the first of val, valid, validation and test that the set has.

    Raises:
        DataError: If there is no such set, or no image in it.
    """
    return split(open_parts(data, wanted), data, seed=seed, part=part)


def split(parts: Mapping[str, Source], data: str, *, seed: int, part: str | None = None) -> Parts:
    """Choose the training and the held-out images of an open set, as `open_source` does.

    Raises:
        DataError: If there is no part to train on, or none of the name that is to be held out.
    """
    train = parts.get("train", parts.get(""))
    if train is None:
        raise DataError(f"no part to train on; {data}; the set needs a part called train, and has {', '.join(parts)}")
    others = [name for name in parts if name not in ("train", "")]
    if part is not None and part not in others:
        raise DataError(f"no such part; --part {part}; {data} has {', '.join(others) or 'no held-out part'}")
    name = part or next((name for name in HELD_OUT_PARTS if name in parts), None)
    return hold_out(train, seed) if name is None else same_classes(train, parts[name], name)


def open_parts(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open the parts of a set, by their names; a set without parts is one part named "".

    Raises:
        DataError: If there is no such set, or no image in it.
    """
    return opener_of(data).open(data, wanted)


def open_all(data: str, wanted: Wanted = Wanted()) -> list[Source]:  # noqa: B008 (frozen)
    """Open all images of a set, part by part; the names of a folder's images are relative to the set's root.

    Raises:
        DataError: If there is no such set, or no image in it.
    """
    opener = opener_of(data)
    parts = opener.open(data, wanted)
    return [
        source if opener.names_tell_part or not name else _Prefixed(source, name, data)
        for name, source in parts.items()
    ]


def hold_out(source: Source, seed: int) -> Parts:
    """Hold out a twentieth of the images (at most 1,000), drawn by seed; at least one if there are two."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(mix(seed, len(source)))).numpy()
    count = min(1000, max(len(source) // 20, 1)) if len(source) > 1 else 0
    return Parts(Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count])), "held out by seed")


def same_classes(train: Source, held_out: Source, part: str) -> Parts:
    """Number the classes of the held-out part as in the training part; classes that only it has come last."""
    if not (has_labels(train) and has_labels(held_out)) or train.classes == held_out.classes:
        return Parts(train, held_out, part)
    known = set(train.classes)
    own = tuple(name for name in held_out.classes if name not in known)
    return Parts(train, _Renumbered(held_out, train.classes + own), part)


def opener_of(data: str) -> Opener:
    """Find the kind of source that accepts a value of `--data`.

    Raises:
        DataError: If there is none.
    """
    names = register_source.names()
    named = data.partition(":")[0]
    for name in sorted(names, key=lambda name: (name != named, name == "folder", name)):
        opener = register_source.get(name)
        if opener.accepts(data):
            return opener
    if "://" in data:
        raise DataError(f"a set is not read over the network; {data}; download it, or list URLs of images in a .csv")
    if not data:
        raise DataError("no data; --data is empty; give a folder of images, or --data shapes for the built-in demo")
    what = "a file that is not a set of images" if Path(data).is_file() else "no such data"
    raise DataError(
        f"{what}; {data}; give a folder, a list (.csv, .tsv, .parquet, .txt), an archive (.zip, .tar), "
        "tar shards, an array (.npy), hf:NAME, or one of cifar10, fashion-mnist, shapes"
    )


def is_file_name(data: str, endings: str | tuple[str, ...]) -> bool:
    """Tell whether `data` is the name of a file with such an extension, existing or not."""
    return data.lower().endswith(endings) and "://" not in data and not Path(data).is_dir()


# -- a source through another ------------------------------------------------------------------------------------------


class View:
    """A source as it is; subclasses change one thing about it.

    Args:
        source: The underlying source.
    """

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def address(self) -> str:
        """Address of the source."""
        return self.source.address

    @property
    def in_memory(self) -> bool:
        """Whether the source is in memory."""
        return self.source.in_memory

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the source."""
        return self.source.classes

    def name(self, index: int) -> str:
        """Look up an image's name in the source."""
        return self.source.name(index)

    def label(self, index: int) -> int | None:
        """Look up an image's label in the source."""
        return self.source.label(index)

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image as the source does; raises `BadImage`."""
        return self.source.read(index, reduce)


class Subset(View):
    """Some images of a source, in the order given.

    Args:
        source: Source of the images.
        indices: Their indices in the source.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        super().__init__(source)
        self.indices = PackedNumbers(torch.as_tensor(indices, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Look up an image's name in the source."""
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int | None:
        """Look up an image's label in the source."""
        return self.source.label(self.indices[index])

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image as the source does; raises `BadImage`."""
        return self.source.read(self.indices[index], reduce)


class _Renumbered(View):
    """A source whose classes have other indices, in a longer list."""

    def __init__(self, source: Source, classes: tuple[str, ...]):
        super().__init__(source)
        self.all_classes = classes
        self.places = places_of(source.classes, classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.all_classes

    def label(self, index: int) -> int | None:
        label = self.source.label(index)
        return None if label is None else self.places[label]


class _Prefixed(View):
    """A part of a set, whose images' names start with the part's name."""

    def __init__(self, source: Source, part: str, address: str):
        super().__init__(source)
        self.part, self.whole = part, address

    @property
    def address(self) -> str:
        return self.whole

    def name(self, index: int) -> str:
        return f"{self.part}/{self.source.name(index)}"


class Scaled(View):
    """A source whose deep images are scaled to 0..255."""

    def __init__(self, source: Source, levels: Levels):
        super().__init__(source)
        self.levels = levels

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image as the source does, uint8 or float32 of 0..255; raises `BadImage`."""
        return self.levels.scale(self.source.read(index, reduce))


# -- questions ---------------------------------------------------------------------------------------------------------


def has_labels(source: Source) -> bool:
    """Tell whether the images have labels."""
    return bool(source.classes)


def places_of(names: Iterable[str], classes: Iterable[str]) -> list[int]:
    """Find the index of each name in a list of classes."""
    places = {name: place for place, name in enumerate(classes)}
    return [places[name] for name in names]


def labels_of(source: Source, indices: Iterable[int]) -> Int[Tensor, " n"]:
    """Look up the labels of some images of a source that has labels."""
    return torch.tensor([source.label(index) for index in indices], dtype=torch.long)


def evenly(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` numbers, evenly spread, so that sorted classes all appear."""
    return np.linspace(0, count - 1, min(count, most), dtype=int).tolist()


def sample(source: Readable, count: int = 256) -> Iterator[Any]:
    """Read some items, evenly spaced over a set, leaving out those that do not decode."""
    for index in evenly(len(source), count):
        with suppress(BadImage):
            yield source.read(index)


def measure_levels(source: Readable) -> Levels | None:
    """Measure the range of values in a sample of a set's images.

    Returns:
        The range; None if a first, smaller sample has 8 bits only, so that there is nothing to scale.
    """
    if all(image.dtype == torch.uint8 for image in _images(sample(source, 32))):
        return None
    return levels_of(_images(sample(source)))


def _images(members: Iterable[Any]) -> Iterator[Tensor]:
    return (member if isinstance(member, Tensor) else member[0] for member in members)


def fingerprint(source: Readable) -> str:
    """Compute a SHA-256 of the names of all images in their order, to tell one set from another."""
    digest = hashlib.sha256()  # of the names in lines, one by one: joined, they may be gigabytes
    for index in range(len(source)):
        line = f"\n{source.name(index)}" if index else source.name(index)
        digest.update(line.encode(errors="surrogateescape"))  # file names need not be Unicode
    return digest.hexdigest()


def read_or_substitute(source: Readable, index: int, reduce: Reduce | None = None) -> tuple[Any, int, dict[str, str]]:
    """Read an image, or the next one that decodes.

    Args:
        source: Source to read from.
        index: Index of the image.
        reduce: How much smaller it may be, for images without annotations (see `Source.read`).

    Returns:
        The item, its index, and the names of those that did not decode, with the reasons.

    Raises:
        DataError: If a hundred in a row do not decode.
    """
    skipped: dict[str, str] = {}
    for offset in range(min(len(source), 100)):
        candidate = (index + offset) % len(source)
        try:
            return source.read(candidate, *([reduce] if reduce else [])), candidate, skipped
        except BadImage as bad:
            skipped[source.name(candidate)] = str(bad)
    path, reason = next(iter(skipped.items()))
    raise DataError(f"{len(skipped)} images in a row do not decode; {path}: {reason}; check --data")


def why_bad(source: Readable, index: int) -> str:
    """Read an item that did not decode once more, and return the reason."""
    try:
        source.read(index)
    except BadImage as reason:
        return str(reason)
    return "did not decode at first"


def none_decodes(source: Readable, index: int, count: int) -> DataError:
    """Make the error that none of `count` images decodes, with the reason for one of them."""
    reason = why_bad(source, index)
    return DataError(f"none of {count} images decodes; {source.name(index)}: {reason}; check --data")


def join_skipped(skipped: Iterable[dict[str, str]]) -> dict[str, str]:
    """Merge the files of several samples, or of several ranks, that did not decode."""
    return {name: reason for each in skipped for name, reason in each.items()}
