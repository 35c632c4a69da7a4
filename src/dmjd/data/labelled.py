"""Samples of classification: augmented images and their labels, of all images or of a few per class."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from dmjd.data.levels import refuse_deep
from dmjd.data.source import Parts, Source, Subset, has_labels, join_skipped, labels_of, read_or_substitute
from dmjd.data.table import ENDINGS
from dmjd.data.transfer import transfer
from dmjd.errors import DataError
from dmjd.random import mix, seeded

LabelledSample = tuple[Tensor, int, dict[str, str]]


class LabelledBatch(NamedTuple):
    """One micro-batch for training with labels."""

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    skipped: dict[str, str]  # files that did not decode, with the reason; other images replace them


@dataclass(frozen=True)
class LabelledSamples(Dataset[LabelledSample]):
    """Training samples with labels by (epoch, index).

    The augmentations of timm and torchvision draw from the global generators of Python, NumPy and torch. For a sample,
    these are seeded with a hash of (seed, epoch, index), and restored afterwards.

    Attributes:
        images: A source with labels.
        transform: From an image of 0..255, uint8 or float32, to an input of the model.
        seed: Seed of the run.
    """

    images: Source
    transform: Callable[[Num[Tensor, "C H W"]], Float[Tensor, "C h w"]]
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        """Augment the image (epoch, index).

        Returns:
            An input of the model, the label, and the files that did not decode.

        Raises:
            DataError: If neither it nor the images after it decode.
        """
        epoch, index = key
        image, read, skipped = read_or_substitute(self.images, index)
        refuse_deep(image, self.images.name(read))
        label = self.images.label(read)
        assert label is not None
        with seeded(mix(self.seed, epoch, index)):
            return self.transform(image), label, skipped


def to_device(batch: LabelledBatch, device: torch.device) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]:
    """Copy images and labels to the network's device."""
    return transfer(batch.images, device), transfer(batch.labels, device)


def collate_labelled(samples: list[LabelledSample]) -> LabelledBatch:
    """Stack the images and labels of samples."""
    images, labels, skipped = zip(*samples, strict=True)
    return LabelledBatch(torch.stack(images), torch.tensor(labels), join_skipped(skipped))


# -- augmentation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingTransform:
    """Augmentation of an image; an object, so that it can be pickled for worker processes.

    Attributes:
        steps: timm's transform, for images that Pillow can hold.
        tensor_steps: The same without a policy, for any other image.
    """

    steps: Callable[[Any], Tensor]
    tensor_steps: Callable[[Tensor], Tensor]

    def __call__(self, image: Num[Tensor, "C H W"]) -> Float[Tensor, "C h w"]:
        """Augment and normalise one image of 0..255, drawing from the global generators."""
        return self.steps(to_pil_image(image)) if is_picture(image) else self.tensor_steps(image)


def is_picture(image: Num[Tensor, "C H W"]) -> bool:
    """Tell whether Pillow can hold an image, so that a policy can augment it: 8 bits, and 1 or 3 channels."""
    return image.dtype == torch.uint8 and len(image) in (1, 3)


def training_transform(
    input_size: tuple[int, int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: tuple[float, float],
    flip: bool,
    auto_augment: str,
    random_erasing: float,
) -> TrainingTransform:
    """Make timm's training transform for a backbone; images that Pillow cannot hold are not augmented by the policy.

    Args:
        input_size: Channels, height and width.
        mean: Mean of every channel, 0 to 1.
        std: Standard deviation of every channel.
        scale: Range of a crop's area, as a share of the image's.
        flip: Whether to mirror with probability 1/2.
        auto_augment: Policy in timm's syntax, such as rand-m9-mstd0.5-inc1, or `none`.
        random_erasing: Probability that a box is filled with noise.
    """
    transform = create_transform(
        input_size,
        is_training=True,
        scale=scale,
        hflip=0.5 if flip else 0.0,
        color_jitter=None,
        auto_augment=None if auto_augment == "none" else auto_augment,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        re_prob=random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = _posterize
    tensor_steps = [
        v2.RandomResizedCrop(input_size[1:], scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(0.5 if flip else 0.0),
        v2.ToDtype(torch.float32),
        v2.Normalize([255 * value for value in mean], [255 * value for value in std]),
        RandomErasing(random_erasing, mode="pixel", device="cpu"),
    ]
    return TrainingTransform(transform, v2.Compose(tensor_steps))


def _posterize(image: Any, bits: int, **rest: Any) -> Any:
    """Posterize like timm, but never to 0 bits, which Pillow refuses since version 13."""
    return posterize(image, max(bits, 1), **rest)


# -- which labels ------------------------------------------------------------------------------------------------------


def labelled_parts(parts: Parts, *, address: str, seed: int, fraction: float = 1.0, shots: int | None = None) -> Parts:
    """Check that a set can be learned from, and keep only the training images whose labels are to be used.

    Args:
        parts: The set.
        address: Name of the set, for messages.
        seed: Seed of the choice.
        fraction: Share of the labels of every class.
        shots: Number of labels per class, instead of a share.

    Raises:
        DataError: If there are no labels, or a class of held-out images has no training images.
    """
    train, held_out = parts
    if not (has_labels(train) and has_labels(held_out)):
        raise _no_labels(parts, address)
    labels, asked = (labels_of(part, range(len(part))).tolist() for part in parts)
    unknown = [held_out.classes[label] for label in sorted({*asked} - {*labels})]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        said = f"held-out classes without training images: {', '.join(unknown[:5])}{more}"
        numbers = all(re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", name) for name in unknown)
        todo = "add some" + "; labels are classes: there is no regression, which predicts numbers" * numbers
        raise DataError(f"{said}; {address}; {todo}")
    if fraction == 1.0 and shots is None:
        return parts
    return Parts(Subset(train, label_subset(labels, seed, fraction=fraction, shots=shots)), held_out, parts.part)


def _no_labels(parts: Parts, address: str) -> DataError:
    """Describe the error: what labels have to look like and, for files and folders, which images have none."""
    what = "no labels"
    needs = "as folders PART/CLASS/IMAGE or CLASS/IMAGE, with the parts train and val (or valid, validation, test)"
    if address.lower().endswith(ENDINGS):
        needs = "in a column called label: give every row one, or leave the row out"
    elif Path(address).exists():
        names = [part.name(index) for part in parts if not has_labels(part) for index in range(len(part))]
        if odd := [name for name in names if name.count("/") != 1]:
            what = f"no labels, for {len(odd)} of {len(names)} images are not CLASS/IMAGE, such as {odd[0]}"
    if address.lower().endswith(".tar"):
        needs += ", or as .cls files of shards, which a pattern names ('shard-{0000..0007}.tar')"
    return DataError(f"{what}; {address}; needs two classes or more, {needs}")


def label_subset(labels: Sequence[int], seed: int, *, fraction: float = 1.0, shots: int | None = None) -> list[int]:
    """Choose some images of every class, by seed: a share of them, at least one, or up to `shots`.

    A larger share contains every smaller one.

    Returns:
        Places in `labels`, ascending.
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
