"""Samples of segmentation and detection: images that are augmented together with what is to be seen in them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils.data import Dataset

from dmjd.data.decode import Wanted, orientation
from dmjd.data.levels import refuse_deep
from dmjd.data.source import Readable, join_skipped, read_or_substitute
from dmjd.errors import DataError
from dmjd.random import mix, seeded

AnnotatedSample = tuple[Tensor, Any, dict[str, str]]


class AnnotatedBatch(NamedTuple):
    """One micro-batch of images with what is to be seen in them."""

    images: Num[Tensor, "B C H W"]  # 0..255; uint8, or float32 if one of them is deep
    annotations: Any  # a tensor of all, or a list with those of every image
    skipped: dict[str, str]  # files that did not decode, with the reason; others stand in for them


@dataclass(frozen=True)
class AnnotatedSamples(Dataset[AnnotatedSample]):
    """Training samples by (epoch, index), as `LabelledSamples` are.

    Attributes:
        images: Reads pairs of an image and its annotation.
        augment: Changes both together.
        seed: Seed of the run.
    """

    images: Readable
    augment: Callable[[Any, Any], tuple[Any, Any]]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> AnnotatedSample:
        """Augment the image (epoch, index) and its annotation.

        Returns:
            Both, and what did not decode.

        Raises:
            DataError: If neither it nor the images after it decode.
        """
        epoch, index = key
        (image, annotation), read, skipped = read_or_substitute(self.images, index)
        refuse_deep(image, self.images.name(read))
        with seeded(mix(self.seed, epoch, index)):
            return *self.augment(image, annotation), skipped


def collate_annotated(samples: list[AnnotatedSample]) -> AnnotatedBatch:
    """Stack images and, where they are tensors, annotations."""
    images, annotations, skipped = zip(*samples, strict=True)
    stacked = torch.stack(annotations) if isinstance(annotations[0], Tensor) else list(annotations)
    return AnnotatedBatch(torch.stack(images), stacked, join_skipped(skipped))


def turn_of(file: Path, given: tuple[int, ...], shown: tuple[int, ...]) -> int:
    """Find how an annotation is turned to lie on its image: by an EXIF orientation, 5 to 8, or 1 for not at all.

    An image is decoded the way up that its EXIF data say. An annotation of the size in which the file stores it is
    turned along. One of the size that viewers show stays, and so does one whose size cannot tell: of a square image, or
    of one that is only mirrored or upside down in its file.

    Args:
        file: The image.
        given: Height and width of the annotation.
        shown: Height and width of the decoded image.
    """
    turned = orientation(file) if given != shown and given == shown[::-1] else 1
    return turned if turned >= 5 else 1


def refuse_pages(data: str, wanted: Wanted) -> None:
    """Refuse pages as images: an annotation is that of a file.

    Raises:
        DataError: If pages are wanted as frames.
    """
    if wanted.pages == "frames":
        raise DataError(
            f"annotations are of files, not of their pages; {data}; say --data_pages bands, or leave it out"
        )


def class_names(data: str, file: Path | None) -> tuple[str, ...] | None:
    """Read names of classes, one in a line, from a file; without one, from `data`/classes.txt; None if there is none.

    Raises:
        DataError: If the file that is named is missing, or one cannot be read, has no names, or has one twice.
    """
    if file is None:
        file = Path(data) / "classes.txt"
        if not file.is_file():
            return None
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no names of classes ({error}); {file}; write one in a line") from None
    if not names or len({*names}) < len(names):
        raise DataError(f"{'a class comes twice' if names else 'no names of classes'}; {file}; write one in a line")
    return names
