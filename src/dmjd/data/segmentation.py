"""Images with a class for every pixel: DATA/images/PART/NAME.jpg and DATA/annotations/PART/NAME.png, as in ADE20K.

An annotation is an image with one number per pixel (grey or with a palette, 8 or 16 bits), of the size of its image as
stored in the file, or as turned by its EXIF data.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from dmjd.data.annotated import AnnotatedResize, refuse_pages, turn_of
from dmjd.data.decode import BadImage, Wanted, open_picture, open_regular, turn
from dmjd.data.folder import FolderFiles, image_names
from dmjd.data.packed import PackedStrings
from dmjd.data.source import HELD_OUT_PARTS, evenly
from dmjd.errors import DataError, one_line

TRAIN_PARTS = ("train", "training")  # the first that exists
SCALED = {"L;2": 85, "L;4": 17}  # factors by which Pillow scales grey of 2 and 4 bits for display
LOOKED_AT = 256  # most annotations that are read to check that the named classes occur
LONGEST = 4  # most that the longer side of a resized image has, over the target of the shorter one, as 2048 over 512


class Annotated(NamedTuple):
    """An image with the class of every pixel."""

    image: Num[Tensor, "C H W"]
    labels: Int[Tensor, "H W"]  # class index, or ignore_index


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationSet(FolderFiles):
    """A numbered set of annotated images.

    Attributes:
        part: Name of the part.
        annotations: Folder of the annotations.
        ignore_index: Label of pixels without a class.
        reduce_zero_label: Whether label 0 has no class, and label 1 is the first class.
    """

    part: str
    annotations: Path
    ignore_index: int
    reduce_zero_label: bool

    def read(self, index: int) -> Annotated:
        """Decode an image and its annotation.

        Raises:
            BadImage: If one does not decode, their sizes differ, or a label is not a class.
        """
        image, stored = self.image(index), self.labels(index)
        turned = turn_of(self.root / self.names[index], stored.shape, image.shape[1:])
        labels = torch.from_numpy(np.ascontiguousarray(turn(stored.numpy(), turned)))
        if image.shape[1:] != labels.shape:
            (height, width), (rows, columns) = image.shape[1:], labels.shape
            raise BadImage(f"image of {height}x{width} but annotation of {rows}x{columns} pixels")
        wrong = labels[(labels != self.ignore_index) & (labels >= len(self.classes))]
        if len(wrong):
            raise BadImage(
                f"annotation with label {int(wrong[0])}, but the last of {len(self.classes)} classes is "
                f"{len(self.classes) - 1}, and {self.ignore_index} is ignored (--ignore_index)"
            )
        return Annotated(image, labels)

    def labels(self, index: int) -> Int[Tensor, "H W"]:
        """Decode an annotation as its file stores it; raises `BadImage`."""
        try:
            path = self.annotations / Path(self.names[index]).with_suffix(".png")
            with open_regular(path) as file, open_picture(file, ("PNG",)) as picture:
                scale = SCALED.get(str(picture.tile[0][3]), 1)
                numbers = np.array(picture) // scale
        except BadImage as bad:
            raise BadImage(f"annotation: {bad}") from None
        except Exception as error:  # decoders raise all kinds of errors
            raise BadImage(f"annotation: {type(error).__name__}: {one_line(error)}"[:200]) from None
        if numbers.ndim != 2 or numbers.dtype.kind == "f":
            raise BadImage("annotation in colours; it has one number for every pixel")
        labels = torch.from_numpy(numbers.astype(np.int64))
        if self.reduce_zero_label:
            labels = torch.where((labels == 0) | (labels == self.ignore_index), self.ignore_index, labels - 1)
        return labels


def open_segmentation(
    data: str,
    wanted: Wanted,
    *,
    classes: Sequence[str] | None = None,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    part: str | None = None,
) -> tuple[SegmentationSet, SegmentationSet]:
    """Find the training and the held-out part of a set with a class for every pixel.

    Warns on stderr of named classes of which no pixel occurs in a sample of the training annotations.

    Args:
        data: Folder of the set.
        wanted: How to read its images.
        classes: Names of the classes. Default: the numbers up to the highest label of the training part.
        ignore_index: Label of pixels without a class.
        reduce_zero_label: Whether label 0 has no class either, and label 1 is the first class.
        part: Name of the held-out part. Default: the first of val, valid, validation and test that exists.

    Raises:
        DataError: If a part is missing, an image has no annotation or an annotation no image, a class is ignored, there
            is only one class, or the annotations that were read have no labels.
    """
    refuse_pages(data, wanted)
    root = Path(data)
    train, held_out = (
        _part(root, names, wanted=wanted, ignore_index=ignore_index, reduce_zero_label=reduce_zero_label)
        for names in (TRAIN_PARTS, (part,) if part else HELD_OUT_PARTS)
    )
    indices = evenly(len(train), LOOKED_AT if classes else len(train))
    seen = _labels_seen(train, indices)
    if classes:
        _warn_of_absent(train, classes, seen, len(indices))
    named = tuple(classes or _numbers(train, seen))
    if ignore_index < len(named):
        raise DataError(f"label {ignore_index} is both a class and ignored; {data}; see --ignore_index and --classes")
    return replace(train, classes=named), replace(held_out, classes=named)


def _part(root: Path, part_names: Sequence[str], **options: Any) -> SegmentationSet:
    part = next((name for name in part_names if (root / "images" / name).is_dir()), None)
    if part is None:
        raise DataError(
            f"no folder images/{part_names[0]}; {root}; --data needs images/PART/NAME.jpg and "
            "annotations/PART/NAME.png with the parts train and val, or that of --part"
        )
    images, annotations = root / "images" / part, root / "annotations" / part
    found = image_names(images)
    pictures: list[str] = [*image_names(annotations)] if annotations.is_dir() else []
    stems, annotated = (
        {Path(name).with_suffix("").as_posix() for name in names}
        for names in (found, [name for name in pictures if name.endswith(".png")])
    )
    if alone := sorted(stems ^ annotated):
        what = "an image without annotation" if alone[0] in stems else "an annotation without image"
        raise DataError(
            f"{what}: {alone[0]} (one of {len(alone)}); {images}, {annotations}; every image needs a NAME.png"
        )
    names = PackedStrings.pack(found)
    return SegmentationSet(root=images, names=names, part=part, annotations=annotations, classes=(), **options)


def _labels_seen(train: SegmentationSet, indices: Sequence[int]) -> set[int]:
    """Collect the labels in some annotations, including the ignored one; raises `DataError` if there is no other."""
    seen: set[int] = set()
    reason = "all pixels are ignored"
    for index in tqdm(indices, desc="looking at labels", unit=" images", leave=False, disable=None):
        try:
            seen |= {*train.labels(index).unique().tolist()}
        except BadImage as error:  # training counts and names them
            reason = str(error)
    if not seen - {train.ignore_index}:
        raise DataError(f"no labels in the annotations; {train.annotations}; {reason}")
    return seen


def _is_mask(train: SegmentationSet, seen: set[int]) -> bool:
    """Recognise binary masks as they are usually drawn: 0, and 255 for the object."""
    return seen == {0, 255} and not train.reduce_zero_label


def _warn_of_absent(train: SegmentationSet, classes: Sequence[str], seen: set[int], count: int) -> None:
    """Warn on stderr of classes of which no pixel occurs in the annotations that were read."""
    if absent := [name for number, name in enumerate(classes) if number not in seen]:
        named = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        todo = "write 1 instead of 255" if _is_mask(train, seen) else "a name's place in the list is its label, from 0"
        said = f"no pixel of {named} in {count} of {len(train)} annotations that were read"
        print(f"warning: {said}; {train.annotations}; {todo}", file=sys.stderr)


def _numbers(train: SegmentationSet, seen: set[int]) -> tuple[str, ...]:
    """Name the classes by their numbers, up to the highest label that occurs."""
    if _is_mask(train, seen):
        raise DataError(
            f"the only labels are 0 and 255; {train.annotations}; write 1 instead of 255, for a second class"
        )
    labels = seen - {train.ignore_index}
    if len(labels) == 1:
        only = f"the only label beside the ignored {train.ignore_index} is {labels.pop()}"
        raise DataError(f"{only}; {train.annotations}; the background is a class too, see --ignore_index")
    if len(labels) <= max(labels):
        said = f"labels 0 to {max(labels)} are taken for classes, {len(labels)} of them occur"
        print(f"warning: {said}; {train.annotations}; name the classes in classes.txt", file=sys.stderr)
    return tuple(str(number) for number in range(max(labels) + 1))


def seen_hw(image_hw: Sequence[int], side: int) -> list[int]:
    """Compute the size that an image is resized to: its shorter side is `side`, its longer one at most four times that.

    A longer image is scaled down to meet that limit, but to no less than one pixel high or wide: a strip of 20 x 8000
    pixels would otherwise become one of 512 x 204,800.
    """
    factor = min(side / min(image_hw), LONGEST * side / max(image_hw))
    return [max(round(full * factor), 1) for full in image_hw]


class RandomSeenSize(AnnotatedResize):
    """Resize an image and its labels to the size that `seen_hw` gives for a random side.

    Args:
        sides: The smallest and the largest side, in pixels.
    """

    def __init__(self, sides: tuple[int, int]):
        super().__init__()
        self.sides = range(sides[0], sides[1] + 1)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose a size."""
        side = self.sides[int(torch.randint(len(self.sides), ()))]
        return {"size": seen_hw(v2.query_size(flat_inputs), side)}


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Random size, crop, flip and colours of an image, and the same size, crop and flip of its labels.

    Attributes:
        geometry: Size, crop and flip, of both.
        colours: Jitter of brightness, contrast, saturation and hue, for images of 1 or 3 channels; None for no jitter.
    """

    geometry: v2.Compose
    colours: v2.ColorJitter | None

    @classmethod
    def of(
        cls,
        crop: tuple[int, int],
        *,
        scale: tuple[float, float],
        flip: bool,
        photometric: bool,
        mean: Sequence[float],
        ignore_index: int,
    ) -> "SegmentationAugmentation":
        """Make an augmentation, which draws from the global generators.

        Args:
            crop: Height and width of the crop.
            scale: Range of the image's shorter side before the crop, relative to the crop's; see `seen_hw`.
            flip: Whether to mirror with probability 1/2.
            photometric: Whether to jitter brightness, contrast, saturation and hue of images of 3 channels, and the
                first two of grey images.
            mean: Colour of the padding, 0 to 1.
            ignore_index: Label of the padding.
        """
        least, greatest = (max(round(min(crop) * factor), 1) for factor in scale)
        fill = {tv_tensors.Image: [255 * value for value in mean], tv_tensors.Mask: ignore_index}
        steps = [RandomSeenSize((least, greatest)), v2.RandomCrop(crop, pad_if_needed=True, fill=fill)]
        steps += [v2.RandomHorizontalFlip()] if flip else []
        return cls(v2.Compose(steps), v2.ColorJitter(0.25, 0.5, 0.5, 0.05) if photometric else None)

    def __call__(self, image: Tensor, labels: Tensor) -> Annotated:
        """Augment one image (C, H, W) of 0..255, uint8 or float32, and its labels (H, W)."""
        image, labels = self.geometry(tv_tensors.Image(image), tv_tensors.Mask(labels))
        image = image.as_subclass(Tensor)
        if self.colours is not None and len(image) in (1, 3):  # torchvision takes floats for 0..1
            image = self.colours(image / 255) * 255 if image.is_floating_point() else self.colours(image)
        return Annotated(image, labels.as_subclass(Tensor))
