"""An image file as a set of one, beside all that `--data` takes."""

from contextlib import suppress
from pathlib import Path

from numpy.lib.format import open_memmap

from dmjd.data.decode import EXTENSIONS, Wanted
from dmjd.data.folder import FolderImages
from dmjd.data.packed import PackedStrings
from dmjd.data.source import Source, open_all


def is_image(path: Path) -> bool:
    """Tell whether there is a file that ends as images do, and is no array of several."""
    if path.suffix.lower() == ".npy":
        with suppress(OSError, ValueError, EOFError):  # reading it says what is wrong
            if open_memmap(path, mode="r").ndim == 4:
                return False
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def open_image(path: Path, wanted: Wanted) -> Source:
    """Open an image file as a set of one."""
    names = PackedStrings.pack([path.name])
    return FolderImages(root=path.parent, names=names, wanted=wanted, classes=(), labels=None)


def open_all_or_one(data: str, wanted: Wanted) -> list[Source]:
    """Find every image of a set, part by part, or the one image of a file; an array is a set, as for `--data`.

    Raises:
        DataError: If there is nothing of the name, or no image in it.
    """
    path = Path(data)
    return [open_image(path, wanted)] if is_image(path) and path.suffix.lower() != ".npy" else open_all(data, wanted)
