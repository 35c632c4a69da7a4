"""Built-in sets: `shapes`, which is drawn when opened, and CIFAR-10 and Fashion-MNIST, which are downloaded once."""

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from dmjd.data.decode import Reduce, Wanted, fit_channels
from dmjd.data.shapes import CLASSES, scene
from dmjd.data.source import Opener, Source, register_source
from dmjd.errors import DataError

SHAPES_SIZES = {"train": 5000, "val": 1000}


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayImages:
    """Labelled images of one size, in memory.

    Attributes:
        address: Name of the set and its part, and prefix of the names of its images.
        pixels: The images.
        labels: Class index of each.
        classes: Names of the classes.
    """

    address: str
    pixels: UInt8[Tensor, "n C H W"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def name(self, index: int) -> str:
        """Name an image by its number."""
        return f"{self.address}/{index:05d}"

    def label(self, index: int) -> int | None:
        """Look up the class index of an image."""
        return int(self.labels[index])

    def read(self, index: int, reduce: Reduce | None = None) -> UInt8[Tensor, "C H W"]:
        """Look up an image."""
        return self.pixels[index]


def download_folder() -> Path:
    """Find where downloaded sets are kept: $DMJD_DATA, else a folder in the user's cache."""
    return Path(os.environ.get("DMJD_DATA") or Path.home() / ".cache" / "dmjd")


def open_shapes(data: str, wanted: Wanted) -> dict[str, Source]:
    """Draw the scenes of `shapes`, with sides as long as the longer one of `wanted.image_hw`, at least 16 pixels."""
    size, parts = max(16, *wanted.image_hw), dict[str, Source]()
    for part, count in SHAPES_SIZES.items():
        scenes = [scene(part, index, size=size) for index in range(count)]  # type: ignore[arg-type]
        array = np.stack([each.image for each in scenes])
        parts[part] = _array_images(f"shapes/{part}", array, [each.label for each in scenes], CLASSES, wanted.in_chans)
    return parts


def open_cifar10(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open CIFAR-10 in the folder after the colon, or where downloads are kept; download it if it is missing.

    Raises:
        DataError: If it cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10

    root = Path(data.partition(":")[2] or download_folder())
    try:
        found = {part: CIFAR10(str(root), train=part == "train", download=True) for part in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 could not be downloaded ({error}); {root}; put cifar-10-batches-py there") from None
    return {
        part: _array_images(f"cifar10/{part}", each.data, each.targets, each.classes, wanted.in_chans)
        for part, each in found.items()
    }


def open_fashion_mnist(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open Fashion-MNIST in the folder after the colon, in that of Debian's package, or where downloads are kept.

    Raises:
        DataError: If it cannot be downloaded, or its files are broken.
    """
    from torchvision.datasets import FashionMNIST

    debian, downloaded = Path("/usr/share/datasets/fashion-mnist"), download_folder() / "FashionMNIST" / "raw"
    root = Path(data.partition(":")[2] or (debian if debian.is_dir() else downloaded))
    if not (root / "train-images-idx3-ubyte.gz").is_file():
        try:
            FashionMNIST(str(download_folder()), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST could not be downloaded ({error}); {root}; put train-images-idx3-ubyte.gz "
                "and its siblings there, or install Debian's dataset-fashion-mnist"
            ) from None
        root = downloaded
    parts: dict[str, Source] = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        pixels, labels = (_idx(root / f"{stem}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise DataError(f"{len(pixels)} images but {len(labels)} labels; {root}; download {stem}-*.gz again")
        name = f"fashion-mnist/{stem}"
        parts[part] = _array_images(name, pixels, labels.tolist(), FashionMNIST.classes, wanted.in_chans)
    return parts


def _array_images(
    address: str, array: np.ndarray, labels: Sequence[int], classes: Sequence[str], in_chans: int
) -> ArrayImages:
    """Make a set from an array N H W (grey) or N H W 3."""
    if in_chans not in (1, 3):
        advice = "pretrain a backbone for such images with --model.in_chans 3 or 1"
        raise DataError(f"{3 if array.ndim == 4 else 1} channels, not {in_chans}; {address}; {advice}")
    pixels = np.stack([fit_channels(image, in_chans) for image in array])
    return ArrayImages(
        address=address,
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),  # resizing rounds other layouts differently
        labels=torch.tensor([int(label) for label in labels]),
        classes=tuple(classes),
    )


def _idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: two zeros, type 8, number of dimensions, each dimension as 4 bytes, values."""
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"not an idx file ({error}); {path}; download it again") from None


def _is(name: str) -> Callable[[str], bool]:
    """Accept a name, with or without a colon and a folder after it."""
    return lambda data: data.partition(":")[0] == name


register_source("shapes")(Opener(lambda data: data == "shapes", open_shapes, names_tell_part=True))
register_source("cifar10")(Opener(_is("cifar10"), open_cifar10, names_tell_part=True))
register_source("fashion-mnist")(Opener(_is("fashion-mnist"), open_fashion_mnist, names_tell_part=True))
