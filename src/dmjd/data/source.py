"""Where images come from: a folder of any shape, or a set by name.

A source is a numbered set of images with, perhaps, labels. A folder with a `train` part and a `val`, `validation` or
`test` part brings its own held-out images; from any other set a twentieth, drawn by seed, is held out. A part has
labels if every image lies in a folder of its class: PART/CLASS/IMAGE.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from dmjd.data import shapes
from dmjd.data.decode import EXTENSIONS, BadImage, decode
from dmjd.data.random import mix
from dmjd.errors import DataError

HELD_OUT_PARTS = ("val", "validation", "test")
BUILT_IN = ("shapes", "cifar10", "fashion-mnist")
MEMORY_LIMIT = 2**30  # bytes of decoded images that are worth holding, rather than decoding them every epoch
SHAPES_SIZES = {"train": 5000, "val": 1000}


@dataclass(frozen=True)
class PackedImages:
    """Decoded images of any sizes, packed into one buffer that worker processes share."""

    pixels: UInt8[Tensor, " bytes"]
    shapes: Int[Tensor, "n 3"]  # channels, height, width
    offsets: Int[Tensor, " n"]
    bad: dict[int, str]  # files that did not decode, with the reason

    @classmethod
    def pack(cls, decoded: Iterable[Tensor], bad: dict[int, str]) -> "PackedImages":
        """Pack images (C, H, W); `bad` may be filled while they are decoded."""
        images = list(decoded)
        sizes = torch.tensor([image.numel() for image in images])
        pixels = torch.cat([image.reshape(-1) for image in images])
        return cls(pixels, torch.tensor([image.shape for image in images]), sizes.cumsum(0) - sizes, bad)

    def subset(self, indices: Sequence[int]) -> "PackedImages":
        """Keep some of the images, in the same buffer."""
        bad = {new: self.bad[old] for new, old in enumerate(indices) if old in self.bad}
        return PackedImages(self.pixels, self.shapes[list(indices)], self.offsets[list(indices)], bad)

    def read(self, index: int) -> UInt8[Tensor, "C H W"]:
        """Look one image up; raises `BadImage` as decoding did."""
        if index in self.bad:
            raise BadImage(self.bad[index])
        shape, start = self.shapes[index].tolist(), int(self.offsets[index])
        return self.pixels[start : start + math.prod(shape)].view(shape)


@dataclass(frozen=True, kw_only=True)
class Images:
    """A numbered set of images.

    Attributes:
        names: Path of each image relative to the set's root, or a made-up name.
        labels: Class number of each image, if there are classes.
        classes: Names of the classes.
        root: Folder of the files; None for a set that lives in memory only.
        in_chans: Channels to decode, 3 or 1.
        held: The decoded images, if they are held in memory.
    """

    names: Sequence[str]
    labels: Sequence[int] | None
    classes: tuple[str, ...]
    root: Path | None
    in_chans: int
    held: PackedImages | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> UInt8[Tensor, "C H W"]:
        """Decode one image, or look it up.

        Raises:
            BadImage: If its file does not decode.
        """
        if self.held is not None:
            return self.held.read(index)
        assert self.root is not None
        return decode(self.root / self.names[index], self.in_chans)

    def labels_of(self, indices: Sequence[int]) -> Int[Tensor, " n"]:
        """Look up the labels of some images of a set that has labels."""
        assert self.labels is not None
        return torch.tensor([self.labels[index] for index in indices])

    def subset(self, indices: Sequence[int]) -> "Images":
        """Keep some of the images."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        held = self.held and self.held.subset(indices)
        return replace(self, names=[self.names[i] for i in indices], labels=labels, held=held)


class Parts(NamedTuple):
    """A data set: what is trained on and what is only looked at."""

    train: Images
    held_out: Images


def load(data: str, *, in_chans: int = 3, image_hw: tuple[int, int] = (64, 64), seed: int = 0) -> Parts:
    """Find a set by the name of a built-in one, optionally with its folder (`cifar10:DIR`), or by its path.

    Args:
        data: What to find.
        in_chans: Channels to decode, 3 or 1.
        image_hw: Size of the scenes of `shapes`, which are made to measure.
        seed: Seed of the held-out images, where the set does not name them.

    Raises:
        DataError: If there is nothing of the name, or no image in it.
    """
    name, _, folder = data.partition(":")
    if name == "shapes" and not folder:
        return Parts(*(_shapes(part, in_chans, max(16, *image_hw)) for part in ("train", "val")))
    if name == "cifar10":
        return _cifar10(Path(folder or cache()), in_chans)
    if name == "fashion-mnist":
        return _fashion_mnist(Path(folder) if folder else None, in_chans)
    root = Path(data)
    if not root.is_dir():
        hint = f"give a folder of images or one of {', '.join(BUILT_IN)}"
        raise DataError(f"no such data; {data}; {hint}")
    held_out = next((root / part for part in HELD_OUT_PARTS if (root / part).is_dir()), None)
    if (root / "train").is_dir() and held_out:
        return same_classes(folder_images(root / "train", in_chans), folder_images(held_out, in_chans))
    return hold_out(folder_images(root / "train" if (root / "train").is_dir() else root, in_chans), seed)


def same_classes(train: Images, held_out: Images) -> Parts:
    """Number the classes of the held-out part as those of the training part; classes of its own come after them."""
    if train.labels is None or held_out.labels is None:
        return Parts(train, held_out)
    classes = train.classes + tuple(name for name in held_out.classes if name not in train.classes)
    labels = [classes.index(held_out.classes[label]) for label in held_out.labels]
    return Parts(train, replace(held_out, classes=classes, labels=labels))


def load_all(data: str, *, in_chans: int = 3, image_hw: tuple[int, int] = (64, 64)) -> list[Images]:
    """Find every image of a set, part by part; names are relative to the set's root.

    Raises:
        DataError: If there is nothing of the name, or no image in it.
    """
    root = Path(data)
    if not root.is_dir():
        return list(load(data, in_chans=in_chans, image_hw=image_hw))
    parts = [part for part in ("train", *HELD_OUT_PARTS) if (root / part).is_dir()]
    if "train" not in parts:
        return [folder_images(root, in_chans)]
    found = [folder_images(root / part, in_chans) for part in parts]
    return [
        replace(images, names=[f"{part}/{name}" for name in images.names], root=root)
        for part, images in zip(parts, found, strict=True)
    ]


def hold_out(images: Images, seed: int) -> Parts:
    """Set a twentieth of the images aside (at most 1,000), drawn by seed; at least one if there are two."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(seed, len(images)))).tolist()
    count = min(1000, max(len(images) // 20, 1)) if len(images) > 1 else 0
    return Parts(images.subset(sorted(order[count:])), images.subset(sorted(order[:count])))


def class_names(data: str, file: Path | None) -> tuple[str, ...] | None:
    """Read names of classes, one in a line, from a file; without one, from `data`/classes.txt; None if there is none.

    Raises:
        DataError: If the file cannot be read, has no names, or has one twice.
    """
    file = file or Path(data) / "classes.txt"
    if file == Path(data) / "classes.txt" and not file.is_file():
        return None
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no names of classes ({error}); {file}; write one in a line") from None
    if not names or len({*names}) < len(names):
        raise DataError(f"{'a class comes twice' if names else 'no names of classes'}; {file}; write one in a line")
    return names


def few_labels(labels: Sequence[int], seed: int, *, fraction: float = 1.0, shots: int | None = None) -> list[int]:
    """Choose some images of every class, by seed: a share of them, at least one, or `shots`, as far as there are any.

    What a smaller share chooses, a larger one chooses too.
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, members in of_class.items():
        count = max(round(fraction * len(members)), 1) if shots is None else shots
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(mix(seed, label)))
        chosen += [members[place] for place in order[:count].tolist()]
    return sorted(chosen)


def folder_images(root: Path, in_chans: int) -> Images:
    """List the images below a folder, sorted, without following links to folders.

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
    names.sort()
    folders = [Path(name).parts[:-1] for name in names]
    classes = tuple(sorted({parts[0] for parts in folders if parts}))
    if len(classes) < 2 or any(len(parts) != 1 for parts in folders):
        return Images(names=names, labels=None, classes=(), root=root, in_chans=in_chans)
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[parts[0]] for parts in folders]
    return Images(names=names, labels=labels, classes=classes, root=root, in_chans=in_chans)


def in_memory(images: Images) -> Images:
    """Hold a folder's decoded images in memory if they are few and small; else leave it as it is.

    The size is judged by the largest of a few images from all over the set.
    """
    sizes = []
    for index in range(0, len(images) if images.held is None else 0, max(len(images) // 16, 1)):
        with suppress(BadImage):
            sizes.append(images.read(index).numel())
    if not sizes or max(sizes) * len(images) > MEMORY_LIMIT:
        return images
    bad: dict[int, str] = {}

    def decoded() -> Iterator[Tensor]:
        for index in tqdm(range(len(images)), desc="reading images", unit=" images", leave=False, disable=None):
            try:
                yield images.read(index)
            except BadImage as reason:
                bad[index] = str(reason)
                yield torch.empty(images.in_chans, 0, 0, dtype=torch.uint8)

    return replace(images, held=PackedImages.pack(decoded(), bad))


def cache() -> Path:
    """Where downloaded sets are kept: $DMJD_DATA, else a folder of the user's cache."""
    return Path(os.environ.get("DMJD_DATA") or Path.home() / ".cache" / "dmjd")


def _array_images(name: str, array: np.ndarray, labels: Sequence[int], classes: Sequence[str], in_chans: int) -> Images:
    """Make a set of an array N H W (grey) or N H W 3."""
    pixels = torch.from_numpy(array).unsqueeze(-1) if array.ndim == 3 else torch.from_numpy(array)
    pixels = pixels.permute(0, 3, 1, 2)
    if in_chans == 1 and pixels.shape[1] == 3:
        pixels = pixels.float().mean(dim=1, keepdim=True).round().byte()
    return Images(
        names=[f"{name}/{i:05d}" for i in range(len(array))],
        labels=[int(label) for label in labels],
        classes=tuple(classes),
        root=None,
        in_chans=in_chans,
        held=PackedImages.pack(pixels.expand(-1, in_chans, -1, -1), {}),
    )


def _shapes(part: str, in_chans: int, size: int) -> Images:
    scenes = [shapes.scene(part, index, size=size) for index in range(SHAPES_SIZES[part])]  # type: ignore[arg-type]
    array = np.stack([scene.image for scene in scenes])
    return _array_images(f"shapes/{part}", array, [scene.label for scene in scenes], shapes.CLASSES, in_chans)


def _cifar10(root: Path, in_chans: int) -> Parts:
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 could not be downloaded ({error}); {root}; put cifar-10-batches-py there") from None
    names = ("cifar10/train", "cifar10/test")
    return Parts(*(_array_images(n, p.data, p.targets, p.classes, in_chans) for n, p in zip(names, parts, strict=True)))


def _fashion_mnist(folder: Path | None, in_chans: int) -> Parts:
    from torchvision.datasets import FashionMNIST

    debian = Path("/usr/share/datasets/fashion-mnist")
    root = folder or (debian if debian.is_dir() else cache() / "FashionMNIST" / "raw")
    if not (root / "train-images-idx3-ubyte.gz").is_file():
        try:
            FashionMNIST(str(cache()), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"Fashion-MNIST could not be downloaded ({error}); {root}; put train-images-idx3-ubyte.gz "
                "and its siblings there, or install Debian's dataset-fashion-mnist"
            ) from None
        root = cache() / "FashionMNIST" / "raw"
    parts = []
    for part in ("train", "t10k"):
        pixels, labels = (_idx(root / f"{part}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
            raise DataError(f"{len(pixels)} images but {len(labels)} labels; {root}; fetch {part}-*.gz anew")
        name = f"fashion-mnist/{part}"
        parts.append(_array_images(name, pixels, labels.tolist(), FashionMNIST.classes, in_chans))
    return Parts(*parts)


def _idx(path: Path) -> np.ndarray:
    """Read a zipped idx file of bytes: two zeros, type 8, the number of sides, each side as 4 bytes, the values."""
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise DataError(f"not an idx file ({error}); {path}; fetch it anew") from None
