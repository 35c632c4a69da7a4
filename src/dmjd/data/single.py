"""A single image file as a set of one, in addition to what `--data` takes."""

from contextlib import suppress
from pathlib import Path

from numpy.lib.format import open_memmap

from dmjd.data.decode import EXTENSIONS, Wanted
from dmjd.data.folder import FolderImages
from dmjd.data.packed import PackedStrings
from dmjd.data.source import Source, open_all


def open_all_or_one(data: str, wanted: Wanted) -> list[Source]:
    """Open every image of a set, part by part, or the one image of a file.

    An array of four dimensions is a set, as for `--data`, and one of two an image. One of three is an image if its
    first or last dimension may be the channels, else a set of grey images.

    Raises:
        DataError: If there is no such file or set, or no image in it.
    """
    path = Path(data)
    if not _is_image(path, wanted.in_chans):
        return open_all(data, wanted)
    names = PackedStrings.pack([path.name])
    return [FolderImages(root=path.parent, names=names, wanted=wanted, classes=(), labels=None)]


def _is_image(path: Path, in_chans: int) -> bool:
    """Tell whether this is a file with the extension of an image, and not an array of several images."""
    if path.suffix.lower() == ".npy":
        with suppress(OSError, ValueError, EOFError):  # reading it says what is wrong
            shape = open_memmap(path, mode="r").shape
            ends = shape[:1] + shape[-1:]
            grey = len(shape) == 3 and not any(end == in_chans or {end, in_chans} == {1, 3} for end in ends)
            if len(shape) == 4 or grey:
                return False
    return path.suffix.lower() in EXTENSIONS and path.is_file()
