"""A folder of images, however nested.

A part has labels if every image lies in a folder of its class: PART/CLASS/IMAGE.
"""

import glob
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Num
from torch import Tensor

from dmjd.data.builtin import download_folder
from dmjd.data.decode import EXTENSIONS, Reduce, Wanted, count_pages, decode
from dmjd.data.listing import LINKED, list_files, say_ignored, say_unread
from dmjd.data.packed import PackedNumbers, PackedStrings
from dmjd.data.source import HELD_OUT_PARTS, Opener, Source, opener_of, register_source
from dmjd.data.stored import PARTS, classes_of_folders
from dmjd.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderFiles:
    """Numbered files below a folder, the base of every set of files.

    Attributes:
        root: The folder.
        names: Path of each file below it.
        wanted: How to read the images.
        classes: Names of the classes, if there are any.
    """

    root: Path
    names: PackedStrings
    wanted: Wanted
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def address(self) -> str:
        """The folder."""
        return str(self.root)

    @property
    def in_memory(self) -> bool:
        """False: files are decoded whenever they are read."""
        return False

    def name(self, index: int) -> str:
        """Look up the path of a file below the folder."""
        return self.names[index]

    def image(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image.

        Raises:
            BadImage: If it does not decode.
        """
        file, page = file_and_page(self.names[index]) if self.wanted.pages == "frames" else (self.names[index], "")
        return decode(os.path.join(self.root, file), self.wanted, frame=int(page or 0), reduce=reduce)


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderImages(FolderFiles):
    """The images of a folder, however nested.

    Attributes:
        labels: Class index of each, if there are classes.
    """

    labels: PackedNumbers | None

    def label(self, index: int) -> int | None:
        """Look up the class index of an image; None if there are no classes."""
        return None if self.labels is None else self.labels[index]

    def read(self, index: int, reduce: Reduce | None = None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        return self.image(index, reduce)


def image_names(root: Path) -> PackedStrings:
    """List the paths of the images below a folder, sorted, and report other files on stderr.

    Raises:
        DataError: If there is no image, or a folder cannot be read.
    """
    try:
        listing = list_files(root, EXTENSIONS, download_folder() / "listings")
    except OSError as error:
        raise DataError(f"{error.strerror}; {error.filename}; check its permissions") from None
    if not len(listing.names):
        linked = ", and folders that are links are not followed" if LINKED in listing.passed_over else ""
        raise DataError(f"no images; {root}; images end in {', '.join(sorted(EXTENSIONS))}{linked}")
    say_ignored(len(listing.names), listing.passed_over, root)
    return listing.names


def ignored_files(data: str) -> dict[str, int]:
    """Count the files of a folder that are not images, by extension; empty where `data` is not a folder of images."""
    counts: Counter[str] = Counter()
    root = Path(data)
    for folder in (root / part for part in part_names(root) or [""]) if opener_of(data) is FOLDER else ():
        with suppress(OSError):  # a part that training did not read
            counts.update(list_files(folder, EXTENSIONS, download_folder() / "listings").passed_over)
    return counts


def folder_images(root: Path, wanted: Wanted) -> FolderImages:
    """List the images below a folder, and their classes if every image lies in one of two or more class folders.

    Raises:
        DataError: If there is no image.
    """
    names = image_names(root)
    if wanted.pages == "frames":
        names = PackedStrings.pack(page for name in names for page in page_names(root, name))
    classes, labels = classes_of_folders(names)
    return FolderImages(root=root, names=names, wanted=wanted, classes=classes, labels=labels)


def page_names(root: Path, name: str) -> list[str]:
    """List the pages of a file below a folder, as FILE#PAGE if there are several."""
    count = count_pages(root / name)
    return [name] if count == 1 else [f"{name}#{page}" for page in range(count)]


def file_and_page(name: str) -> tuple[str, str]:
    """Split a name made by `page_names`; the page is empty if the file has only one."""
    file, _, page = name.rpartition("#")
    return (file, page) if file and page.isdecimal() else (name, "")


def open_folder(data: str, wanted: Wanted) -> dict[str, Source]:
    """Find the parts of a folder; without a part `train`, the whole folder is one.

    Raises:
        DataError: If there is no image, or none in a part that training uses.
    """
    root = Path(data)
    parts = part_names(root)
    if not parts:
        return {"": folder_images(root, wanted)}
    folders = {name.rstrip("/") for name in glob.glob("*/", root_dir=root)}
    say_unread(folders.difference(parts), HELD_OUT_PARTS, root)
    found: dict[str, Source] = {}
    for place, name in enumerate(parts):
        try:
            found[name] = folder_images(root / name, wanted)
        except DataError:
            if place < 2:  # training uses only these two; the others may be empty
                raise
    return found


def part_names(root: Path) -> list[str]:
    """List the parts of a folder, train first; empty without a part `train`."""
    parts = [name for name in PARTS if (root / name).is_dir()]
    return parts if "train" in parts else []


FOLDER = register_source("folder")(Opener(lambda data: bool(data) and Path(data).is_dir(), open_folder))
