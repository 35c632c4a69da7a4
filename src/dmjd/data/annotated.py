"""Samples of segmentation and detection: images that are augmented together with their annotations."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from dmjd.data.decode import Wanted, orientation
from dmjd.data.levels import refuse_deep
from dmjd.data.source import Readable, join_skipped, read_or_substitute
from dmjd.errors import DataError
from dmjd.random import mix, seeded

AnnotatedSample = tuple[Tensor, Any, dict[str, str]]


class AnnotatedBatch(NamedTuple):
    """One micro-batch of images with their annotations."""

    images: Num[Tensor, "B C H W"]  # 0..255; uint8, or float32 if one of them has more than 8 bits
    annotations: Any  # one stacked tensor, or a list with those of each image
    skipped: dict[str, str]  # files that did not decode, with the reason; other images replace them


@dataclass(frozen=True)
class AnnotatedSamples(Dataset[AnnotatedSample]):
    """Training samples by (epoch, index), like `LabelledSamples`.

    Attributes:
        images: Reads pairs of an image and its annotation.
        augment: Transforms both together.
        seed: Seed of the run.
    """

    images: Readable
    augment: Callable[[Any, Any], tuple[Any, Any]]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> AnnotatedSample:
        """Augment the image (epoch, index) and its annotation.

        Returns:
            Both, and the files that did not decode.

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


class AnnotatedResize(v2.Transform):
    """Resize an image and its annotations to a size that a subclass chooses, in `make_params`, as `size`.

    Annotations without a size, such as labels of boxes, stay as they are.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input."""
        if not isinstance(inpt, tv_tensors.Mask):
            return self._call_kernel(v2.functional.resize, inpt, size=params["size"])
        # torchvision samples corners of pixels, half a pixel off the image's; and masks of bools in four times the time
        plain = inpt.as_subclass(Tensor)[None]
        known = plain.byte() if plain.dtype == torch.bool else plain
        resized = v2.functional.resize_image(known, params["size"], v2.InterpolationMode.NEAREST_EXACT)
        return tv_tensors.Mask(resized[0].to(inpt.dtype))


def turn_of(file: Path, given: tuple[int, ...], shown: tuple[int, ...]) -> int:
    """Find the EXIF orientation, 5 to 8, that makes an annotation fit its image, or 1 for none.

    Images are decoded upright, by their EXIF data. An annotation with the size that the file stores is turned likewise.
    One with the size that viewers show is not, nor is one whose size does not tell: that of a square image, or of an
    image that is only mirrored or upside down in its file.

    Args:
        file: The image.
        given: Height and width of the annotation.
        shown: Height and width of the decoded image.
    """
    turned = orientation(file) if given != shown and given == shown[::-1] else 1
    return turned if turned >= 5 else 1


def refuse_pages(data: str, wanted: Wanted) -> None:
    """Refuse pages as separate images: an annotation belongs to a whole file.

    Raises:
        DataError: If pages are to be read as frames.
    """
    if wanted.pages == "frames":
        raise DataError(
            f"annotations are of files, not of their pages; {data}; say --data_pages bands, or leave it out"
        )


def class_names(data: str, file: Path | None) -> tuple[str, ...] | None:
    """Read class names, one per line, from `file`, by default `data`/classes.txt; None if that does not exist.

    Raises:
        DataError: If `file` is missing, or a file cannot be read, has no names, or has a name twice.
    """
    if file is None:
        file = Path(data) / "classes.txt"
        if not file.is_file():
            return None
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no class names ({error}); {file}; write one per line") from None
    if not names or len({*names}) < len(names):
        raise DataError(f"{'a class occurs twice' if names else 'no class names'}; {file}; write one per line")
    return names
