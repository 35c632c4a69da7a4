"""A folder of images, however nested.

A part has labels if every image lies in a folder of its class: PART/CLASS/IMAGE.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from dmjd.data.decode import EXTENSIONS, decode
from dmjd.data.packed import PackedStrings
from dmjd.data.source import HELD_OUT_PARTS, Opener, Source, register_source
from dmjd.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderFiles:
    """Files below a folder, numbered: what every set of files has in common.

    Attributes:
        root: The folder.
        names: Path of each file below it.
        in_chans: Channels to decode, 3 or 1.
        classes: Names of the classes, if there are any.
    """

    root: Path
    names: PackedStrings
    in_chans: int
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

    def image(self, index: int) -> UInt8[Tensor, "C H W"]:
        """Decode one.

        Raises:
            BadImage: If it does not decode.
        """
        return decode(self.root / self.names[index], self.in_chans)


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderImages(FolderFiles):
    """The images of a folder, however nested.

    Attributes:
        labels: Number of the class of each, if there are classes.
    """

    labels: Int[np.ndarray, " n"] | None

    def label(self, index: int) -> int | None:
        """Look up the number of an image's class; None if there are no classes."""
        return None if self.labels is None else int(self.labels[index])

    def read(self, index: int) -> UInt8[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        return self.image(index)


def image_names(root: Path) -> list[str]:
    """List the paths of the images below a folder, sorted, without following links to folders.

    Raises:
        DataError: If there is none.
    """
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        names += [str(relative / name) for name in files if Path(name).suffix.lower() in EXTENSIONS and name[0] != "."]
    if not names:
        raise DataError(f"no images; {root}; images end in {', '.join(sorted(EXTENSIONS))}")
    return sorted(names)


def folder_images(root: Path, in_chans: int) -> FolderImages:
    """List the images below a folder, and their classes if each of them lies in one of two or more class folders.

    Raises:
        DataError: If there is no image.
    """
    names = image_names(root)
    folders = [Path(name).parts[:-1] for name in names]
    classes = tuple(sorted({parts[0] for parts in folders if parts}))
    labels = None
    if len(classes) < 2 or any(len(parts) != 1 for parts in folders):
        classes = ()
    else:
        number = {name: place for place, name in enumerate(classes)}
        labels = np.array([number[parts[0]] for parts in folders])
    return FolderImages(root=root, names=PackedStrings.pack(names), classes=classes, labels=labels, in_chans=in_chans)


def open_folder(data: str, *, in_chans: int, image_hw: tuple[int, int]) -> dict[str, Source]:
    """Find the parts of a folder; without a `train` part it is one, whatever is in it.

    Raises:
        DataError: If there is no image, or none in a part that training looks at.
    """
    root = Path(data)
    parts = [name for name in ("train", *HELD_OUT_PARTS) if (root / name).is_dir()]
    if "train" not in parts:
        return {"": folder_images(root, in_chans)}
    found: dict[str, Source] = {}
    for place, name in enumerate(parts):
        try:
            found[name] = folder_images(root / name, in_chans)
        except DataError:
            if place < 2:  # training looks at these two only; no other has to have images
                raise
    return found


register_source("folder")(Opener(lambda data: Path(data).is_dir(), open_folder))
