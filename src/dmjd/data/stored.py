"""Shared by most kinds of sets: images by index, and classes and parts from a column or the paths.

Archives, arrays, prepared and hub sets differ in where an image lies. Each provides a reader, a small picklable
function from the index of an image to its pixels; everything else is here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor

from dmjd.data.decode import Reduce, Wanted
from dmjd.data.packed import PackedNumbers, PackedStrings
from dmjd.data.source import HELD_OUT_PARTS, Source, Subset, places_of
from dmjd.errors import DataError

PARTS = ("train", *HELD_OUT_PARTS)
Classes = tuple[tuple[str, ...], PackedNumbers | None]  # names of the classes, and the class index of each image


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredImages:
    """Images that are stored in something other than a folder.

    Attributes:
        address: Name of the set.
        names: Name of each image.
        classes: Names of the classes, if there are any.
        labels: Class index of each, if there are classes.
        reader: Decodes the image of an index at its depth; raises `BadImage`.
    """

    address: str
    names: PackedStrings
    classes: tuple[str, ...]
    labels: PackedNumbers | None
    reader: Callable[[int, Reduce | None], Num[Tensor, "C H W"]]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        """False: images are decoded, or copied from disk, whenever they are read."""
        return False

    def name(self, index: int) -> str:
        """Look up the name of an image."""
        return self.names[index]

    def label(self, index: int) -> int | None:
        """Look up the class index of an image; None if there are no classes."""
        return None if self.labels is None else self.labels[index]

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        return self.reader(index, reduce)


def classes_of(labels: Iterable[str]) -> Classes:
    """Number the classes in a column of labels, in alphabetical order, or in numerical order if all are numbers.

    As with folders, a single class counts as no labels.
    """
    distinct, found = _numbered(labels)
    try:
        keys = {label: float(label) for label in distinct}
        numbers = all(map(math.isfinite, keys.values()))
    except ValueError:
        numbers = False
    return _in_order(sorted(distinct, key=lambda label: (keys[label], label) if numbers else label), distinct, found)


def classes_of_folders(names: PackedStrings) -> Classes:
    """Number the classes of paths alphabetically, if all are CLASS/IMAGE with two classes or more."""
    if not all(name.count("/") == 1 for name in names):
        return (), None
    distinct, found = _numbered(name.partition("/")[0] for name in names)
    return _in_order(sorted(distinct), distinct, found)


def _in_order(classes: Sequence[str], distinct: dict[str, int], found: Int[np.ndarray, " n"]) -> Classes:
    """Renumber labels, numbered by first occurrence, by their places among the classes."""
    if len(classes) < 2:
        return (), None
    return tuple(classes), PackedNumbers(torch.tensor(places_of(distinct, classes))[torch.from_numpy(found)])


def parts_by_column(source: Source, splits: Iterable[str], where: object) -> dict[str, Source]:
    """Split a set by a column with the name of each image's part.

    Args:
        source: The whole set.
        splits: The column, one name per image.
        where: File of the column, for messages.

    Raises:
        DataError: If the column contains anything but names of parts.
    """
    distinct, found = _numbered(splits)
    if others := sorted(distinct.keys() - set(PARTS)):
        raise DataError(f"unknown split {', '.join(others[:5])}; {where}; write {', '.join(PARTS[:-1])} or {PARTS[-1]}")
    return {part: Subset(source, np.flatnonzero(found == distinct[part])) for part in PARTS if part in distinct}


def _numbered(texts: Iterable[str]) -> tuple[dict[str, int], Int[np.ndarray, " n"]]:
    """Number strings by first occurrence; returns the number of each distinct string, and that of every string."""
    distinct: dict[str, int] = {}
    return distinct, np.fromiter((distinct.setdefault(text, len(distinct)) for text in texts), dtype=np.int64)


def refuse_frames(data: str, wanted: Wanted) -> None:
    """Refuse sets whose files would have to be opened one by one to count their pages.

    Raises:
        DataError: If pages are to be read as frames.
    """
    if wanted.pages == "frames":
        raise DataError(f"pages as frames are for folders and lists; {data}; unpack it, or say --data_pages bands")
