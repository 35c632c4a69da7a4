"""One array of images in a file, N H W, N H W C or N C H W, memory-mapped and read image by image.

A list of the same name beside it (`images.csv` for `images.npy`) may give each image a label and a part, row by row.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Num
from numpy.lib.format import open_memmap
from torch import Tensor

from dmjd.data.decode import Reduce, Wanted, as_wanted, at_known_depth, channels_advice
from dmjd.data.packed import PackedStrings
from dmjd.data.source import Opener, Source, is_file_name, register_source
from dmjd.data.stored import StoredImages, classes_of, parts_by_column
from dmjd.data.table import read_columns
from dmjd.errors import DataError


@dataclass(frozen=True)
class ArrayReader:
    """Reads images from an array on disk.

    Attributes:
        path: File of the array.
        channels_first: Whether its images are C H W, not H W or H W C.
        wanted: How to read the images.
    """

    path: Path
    channels_first: bool
    wanted: Wanted

    def __call__(self, index: int, reduce: Reduce | None) -> Num[Tensor, "C H W"]:
        """Copy an image; raises `BadImage` if it has NaN or infinite values."""
        array = np.array(self._images[index])
        if self.channels_first:
            array = np.moveaxis(array, 0, -1)
        return as_wanted(at_known_depth(array), self.wanted)

    @cached_property
    def _images(self) -> np.ndarray:
        return open_memmap(self.path, mode="r")

    def __getstate__(self) -> dict[str, object]:
        """Drop the mapped array, which pickling for a worker would copy."""
        return {name: value for name, value in self.__dict__.items() if name != "_images"}


def open_array(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open an array, with classes and parts if there is a list beside it.

    Raises:
        DataError: If it is not an array of images with the wanted channels, or the list does not fit it.
    """
    path = Path(data)
    reader = ArrayReader(path, _channels_first(path, wanted.in_chans), wanted)
    count = len(reader._images)
    beside = path.with_suffix(".csv")
    columns = read_columns(beside, needed=("label", "split")) if beside.is_file() else {}
    for cells in columns.values():
        if len(cells) != count:
            raise DataError(f"{len(cells)} rows for {count} images; {beside}; write one row per image")
    classes, labels = classes_of(columns["label"]) if "label" in columns else ((), None)
    images = StoredImages(
        address=data,
        names=PackedStrings.pack(f"{path.stem}/{number:07d}" for number in range(count)),
        classes=classes,
        labels=labels,
        reader=reader,
    )
    return parts_by_column(images, columns["split"], beside) if "split" in columns else {"": images}


def _channels_first(path: Path, in_chans: int) -> bool:
    """Tell N C H W from other layouts by the shape of an array: channels are last unless axis 1 fits `in_chans` better.

    Raises:
        DataError: If it is not an array of images with `in_chans` channels, or with 1 or 3 that convert to 3 or 1.
    """
    try:
        array = open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"no such array; {path}; check --data") from None
    except (OSError, ValueError, EOFError) as error:  # broken, or pickled objects, which are not safe to load
        raise DataError(f"not an array that can be mapped ({error}); {path}; write numbers with numpy.save") from None
    if array.dtype.kind not in "buif" or array.ndim not in (3, 4) or not array.size:
        shape = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"no array of images but {shape}; {path}; write numbers of shape N H W or N H W C")
    if array.ndim == 3:
        channels, first = 1, False
    else:
        first = _fit(array.shape[1], in_chans) > _fit(array.shape[3], in_chans)
        channels = array.shape[1 if first else 3]
    if not any(_fit(channels, in_chans)):
        raise DataError(f"{channels} channels, not {in_chans}; {path}; {channels_advice(channels)}")
    return first


def _fit(channels: int, in_chans: int) -> tuple[bool, bool]:
    """Rank a number of channels: as wanted, or else grey for colour or colour for grey."""
    return channels == in_chans, {channels, in_chans} <= {1, 3}


register_source("array")(Opener(lambda data: is_file_name(data, ".npy"), open_array, names_tell_part=True))
