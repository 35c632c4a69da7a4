"""What sets share that are no folders: images by number, and their classes and parts from what a column or a path says.

Lists, archives, arrays and tables differ in where an image lies. Each brings a reader, a small picklable function from
the number of an image to its pixels; all the rest is here.
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
Classes = tuple[tuple[str, ...], PackedNumbers | None]  # names of the classes, and the number of each image's


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredImages:
    """Images that something other than a folder stores.

    Attributes:
        address: What the set is called.
        names: Name of each image.
        classes: Names of the classes, if there are any.
        labels: Number of the class of each, if there are classes.
        reader: Decodes an image of a number at its depth; raises `BadImage`.
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
        """Look up the number of an image's class; None if there are no classes."""
        return None if self.labels is None else self.labels[index]

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        return self.reader(index, reduce)


def classes_of(labels: Iterable[str]) -> Classes:
    """Number the classes that a column of labels names, in alphabetical order, or by size if all are numbers.

    As with folders, a single class makes no labels.
    """
    distinct, found = _numbered(labels)
    try:
        keys = {label: float(label) for label in distinct}
        numbers = all(map(math.isfinite, keys.values()))
    except ValueError:
        numbers = False
    return _in_order(sorted(distinct, key=lambda label: (keys[label], label) if numbers else label), distinct, found)


def classes_of_folders(names: Sequence[str]) -> Classes:
    """Number the classes of paths if each is CLASS/IMAGE, of two classes or more, as those of a folder: by alphabet."""
    if not all(name.count("/") == 1 for name in names):
        return (), None
    distinct, found = _numbered(name.partition("/")[0] for name in names)
    return _in_order(sorted(distinct), distinct, found)


def _in_order(classes: Sequence[str], distinct: dict[str, int], found: Int[np.ndarray, " n"]) -> Classes:
    """Number texts that were numbered as they came by their places among the classes."""
    if len(classes) < 2:
        return (), None
    return tuple(classes), PackedNumbers(torch.tensor(places_of(distinct, classes))[torch.from_numpy(found)])


def parts_by_column(source: Source, splits: Iterable[str], where: object) -> dict[str, Source]:
    """Part a set by a column that has the name of the part of each image.

    Args:
        source: The whole set.
        splits: The column, one text an image.
        where: File of the column, for messages.

    Raises:
        DataError: If it has any other word than the names of parts.
    """
    distinct, found = _numbered(splits)
    if others := sorted(distinct.keys() - set(PARTS)):
        raise DataError(f"unknown split {', '.join(others[:5])}; {where}; write {', '.join(PARTS[:-1])} or {PARTS[-1]}")
    return {part: Subset(source, np.flatnonzero(found == distinct[part])) for part in PARTS if part in distinct}


def _numbered(texts: Iterable[str]) -> tuple[dict[str, int], Int[np.ndarray, " n"]]:
    """Number texts in the order in which they first come: the number of each distinct one, and that of every text."""
    distinct: dict[str, int] = {}
    return distinct, np.fromiter((distinct.setdefault(text, len(distinct)) for text in texts), dtype=np.int64)


def refuse_frames(data: str, wanted: Wanted) -> None:
    """Refuse sets whose files would have to be opened one by one to count their pages.

    Raises:
        DataError: If pages are wanted as frames.
    """
    if wanted.pages == "frames":
        raise DataError(f"pages as frames are for folders and lists; {data}; unpack it, or say --data_pages bands")
