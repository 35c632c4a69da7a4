"""Images with boxes around objects, and optional masks: COCO's JSON files, or Pascal VOC's XML files.

COCO: DATA/annotations/*train*.json and *val*.json, images in the folder that the file is named after (train2017), in
such a folder in images/, in images/ or in DATA itself. VOC: DATA/Annotations, DATA/JPEGImages and DATA/ImageSets/Main.

The image sizes in these files are those that the image files store, or those after turning by EXIF data.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from dmjd.data.annotated import AnnotatedResize, refuse_pages, turn_of
from dmjd.data.decode import EXTENSIONS, BadImage, Wanted, turn
from dmjd.data.folder import FolderFiles
from dmjd.data.packed import PackedStrings
from dmjd.data.source import HELD_OUT_PARTS
from dmjd.errors import DataError, one_line

UNIQUE = (("categories", "id"), ("images", "id"), ("images", "file_name"), ("annotations", "id"))  # in a COCO file
VOC_PARTS = (("train", "val"), ("train", "test"), ("trainval", "test"))


class Objects(NamedTuple):
    """The objects in an image."""

    boxes: Float[Tensor, "n 4"]  # left, top, right, bottom in pixels
    labels: Int[Tensor, " n"]  # class index, from 0
    ignored: Bool[Tensor, " n"]  # crowds and difficult objects: not counted in training or evaluation
    masks: Bool[Tensor, "n H W"] | None


class Record(NamedTuple):
    """The annotation of one image, from the files of a set."""

    name: str
    size: tuple[int, int] | None  # height and width, if they are given
    objects: list[dict[str, Any]]  # each with `class`, `box` (left, top, right, bottom), `ignored`, `segmentation`


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSet(FolderFiles):
    """A numbered set of images with objects.

    Attributes:
        part: Name of the part.
        records: Size and objects of each image, as JSON.
        masks: Whether objects have masks.
        counts: Number of objects of every class, without ignored ones.
    """

    part: str
    records: PackedStrings
    masks: bool
    counts: tuple[int, ...]

    def read(self, index: int) -> tuple[Num[Tensor, "C H W"], Objects]:
        """Decode an image and its objects, in the orientation in which it is shown.

        Raises:
            BadImage: If it or a mask does not decode, or does not have the size in its annotation.
        """
        image = self.image(index)
        height, width = image.shape[1:]
        record = json.loads(self.records[index])
        given = tuple(record["size"] or (height, width))
        turned = turn_of(self.root / self.names[index], given, (height, width))
        if given != ((width, height) if turned > 1 else (height, width)):
            raise BadImage(f"image of {height}x{width} pixels, annotated as {given[0]}x{given[1]}")
        objects = record["objects"]
        boxes = torch.tensor([each["box"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        masks = None
        if self.masks:
            drawn = [turn(draw(each["segmentation"], each["box"], *given), turned) for each in objects]
            masks = torch.from_numpy(np.stack([*drawn])) if drawn else torch.zeros(0, height, width, dtype=torch.bool)
        return image, Objects(
            boxes=turn_boxes(boxes, turned, height, width),
            labels=torch.tensor([each["class"] for each in objects], dtype=torch.long),
            ignored=torch.tensor([each["ignored"] for each in objects], dtype=torch.bool),
            masks=masks,
        )


def draw(segmentation: Any, box: Sequence[float], height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """Draw an object's polygons or run lengths, or its box if it has neither.

    Raises:
        BadImage: If they do not decode, or have another size.
    """
    from faster_coco_eval.core import mask

    try:
        if isinstance(segmentation, list):  # fewer than three points enclose no area; the library takes two for a box
            segmentation = [each for each in segmentation if not isinstance(each, list) or len(each) >= 6]
        if not segmentation:
            left, top, right, bottom = box
            segmentation = [[left, top, right, top, right, bottom, left, bottom]]
        lengths = mask.frPyObjects(segmentation, height, width) if not is_compressed(segmentation) else segmentation
        lengths = mask.merge(lengths) if isinstance(lengths, list) else lengths
        drawn = mask.decode(lengths).astype(bool)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadImage(f"segmentation: {type(error).__name__}: {one_line(error)}"[:200]) from None
    if drawn.shape != (height, width):
        raise BadImage(f"image of {height}x{width} pixels, segmentation of {drawn.shape[0]}x{drawn.shape[1]}")
    return drawn


def turn_boxes(boxes: Float[Tensor, "n 4"], turned: int, height: int, width: int) -> Float[Tensor, "n 4"]:
    """Turn boxes as `turn` turns their image.

    Args:
        boxes: Left, top, right and bottom in pixels.
        turned: An EXIF orientation of 5 to 8, which swaps rows and columns, or 1 to leave boxes as they are.
        height: Height of the turned image.
        width: Width of the turned image.
    """
    left, top, right, bottom = boxes.unbind(dim=1)
    if turned >= 5:
        left, top, right, bottom = top, left, bottom, right
    if turned in (7, 8):
        top, bottom = height - bottom, height - top
    if turned in (6, 7):
        left, right = width - right, width - left
    return torch.stack([left, top, right, bottom], dim=1)


def is_compressed(segmentation: Any) -> bool:
    """Tell run lengths encoded as a string from polygons and from uncompressed run lengths."""
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes)


def open_detection(
    data: str, wanted: Wanted, *, classes: tuple[str, ...] | None = None, part: str | None = None
) -> tuple[DetectionSet, DetectionSet]:
    """Find the training and the held-out part of a set with boxes.

    Boxes are clipped to their image where its size is known. Boxes without area are left out, with a line on stderr. A
    part has masks if most of its objects have an outline; for the others, the box is used as the outline.

    Args:
        data: Folder of the set.
        wanted: How to read its images.
        classes: Names of the classes. Default: COCO's categories by their ids, VOC's names of the training part.
        part: Name of the held-out part. Default: the first of `HELD_OUT_PARTS` that exists; for VOC, val or test.

    Raises:
        DataError: If files are missing or broken, objects are of an unknown class, or a part has no object.
    """
    refuse_pages(data, wanted)
    root = Path(data)
    if (root / "ImageSets" / "Main").is_dir():
        folder = root / "JPEGImages"
        pairs = [(name, part) for name in ("train", "trainval")] if part else VOC_PARTS
        lists = [[root / "ImageSets" / "Main" / f"{name}.txt" for name in names] for names in pairs]
        pair = next((files for files in lists if all(file.is_file() for file in files)), lists[0])
        parts = [(folder, file.stem, read_voc(root, file)) for file in pair]
        named = classes or tuple(sorted({each["class"] for found in parts[0][2] for each in found.objects}))
    else:
        wanted_parts = (("train",), (part,) if part else HELD_OUT_PARTS)
        files = [coco_file(root, names) for names in wanted_parts]
        read = [read_coco(file) for file in files]
        parts = [
            (coco_images(root, (stem := file.stem.rpartition("_")[2], *names), found), stem, found)
            for file, names, (_, found) in zip(files, wanted_parts, read, strict=True)
        ]
        named = classes or read[0][0]
    train, held_out = (replace(collect(folder, found, named, wanted), part=name) for folder, name, found in parts)
    for images in (train, held_out):
        if not sum(images.counts):
            raise DataError(f"no objects; {images.root}; both parts need some")
    return train, held_out


def collect(root: Path, found: Iterable[Record], classes: tuple[str, ...], wanted: Wanted) -> DetectionSet:
    """Check and pack the images of one part."""
    names, records, flat, counts, outlined = [], [], [], [0] * len(classes), 0
    number = {name: place for place, name in enumerate(classes)}
    for image in found:
        if Path(image.name).is_absolute() or ".." in Path(image.name).parts:
            raise DataError(f"an annotation for a file elsewhere; {image.name}; give paths below {root}")
        if not (root / image.name).is_file():
            raise DataError(f"an annotation for a missing image; {root / image.name}; add it or take it out")
        objects = []
        for each in image.objects:
            if each["class"] not in number:
                known = ", ".join(classes[:10])
                raise DataError(f"an object of unknown class {each['class']!r}; {image.name}; the classes are {known}")
            left, top, right, bottom = (max(value, 0.0) for value in each["box"])
            if image.size:
                right, bottom = min(right, image.size[1]), min(bottom, image.size[0])
            if not (right > left and bottom > top):
                flat.append(image.name)
                continue
            outlined += bool(each["segmentation"]) and not each["ignored"]
            counts[number[each["class"]]] += not each["ignored"]
            objects.append({**each, "class": number[each["class"]], "box": [left, top, right, bottom]})
        names.append(image.name)
        records.append(json.dumps({"size": image.size, "objects": objects}))
    if flat:
        print(f"warning: {len(flat)} boxes without area left out, such as in {flat[0]}; {root}", file=sys.stderr)
    return DetectionSet(
        root=root,
        part="",
        names=PackedStrings.pack(names),
        classes=classes,
        wanted=wanted,
        records=PackedStrings.pack(records),
        masks=2 * outlined > sum(counts),
        counts=tuple(counts),
    )


# -- COCO --------------------------------------------------------------------------------------------------------------


def coco_file(root: Path, parts: Sequence[str]) -> Path:
    """Find the JSON file of a part; if there are several, that of instances.

    Raises:
        DataError: If there is none.
    """
    for part in parts:
        files = [
            file for file in root.glob(f"annotations/*{part}*.json") if part == "train" or "train" not in file.name
        ]
        if files:
            return min(files, key=lambda file: ("instances" not in file.name, file.name))
    raise DataError(
        f"no annotations/*{parts[0]}*.json and no ImageSets/Main; {root}; --data needs a set as COCO or Pascal VOC "
        "have it"
    )


def coco_images(root: Path, names: Sequence[str], found: Sequence[Record]) -> Path:
    """Find the folder that a part's paths start from: one of these names, in images/ or not, images/ or the root."""
    places = [place for name in names for place in (root / name, root / "images" / name)] + [root / "images", root]
    holding = (place for place in places if any((place / image.name).is_file() for image in found[:10]))
    return next(holding, next(place for place in places if place.is_dir()))


def read_coco(file: Path) -> tuple[tuple[str, ...], list[Record]]:
    """Read a COCO file: the distinct names of its categories, in order of their ids, and its images.

    Raises:
        DataError: If it is broken, has an annotation for an image that it does not list, or has an id twice.
    """
    try:
        content = json.loads(file.read_text("utf-8-sig"))
        for kind, key in UNIQUE:
            counts = Counter(each[key] for each in content[kind] if each.get(key) is not None)
            if twice := [value for value, count in counts.items() if count > 1]:
                raise DataError(f"{counts[twice[0]]} {kind} have the {key} {twice[0]!r}; {file}; give each its own")
        categories = {each["id"]: each["name"] for each in sorted(content["categories"], key=lambda each: each["id"])}
        images = {
            each["id"]: Record(each["file_name"], size if all(size) else None, [])
            for each in content["images"]
            for size in [(int(each.get("height") or 0), int(each.get("width") or 0))]
        }
        for each in content["annotations"]:
            if each["image_id"] not in images:
                raise DataError(f"an annotation for image {each['image_id']}, which is not listed; {file}; add it")
            left, top, width, height = map(float, each["bbox"])
            images[each["image_id"]].objects.append(
                {
                    "class": categories.get(each["category_id"], f"category {each['category_id']}"),
                    "box": (left, top, left + width, top + height),
                    "ignored": bool(int(each.get("iscrowd") or 0)),
                    "segmentation": each.get("segmentation") or None,
                }
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a COCO file ({type(error).__name__}: {error}); {file}; correct it") from None
    return tuple(dict.fromkeys(categories.values())), list(images.values())


# -- Pascal VOC --------------------------------------------------------------------------------------------------------


def read_voc(root: Path, listed: Path) -> list[Record]:
    """Read the images of a part of Pascal VOC, which are listed in a file; 1, 0 or -1 after a name is ignored.

    Coordinates count pixels from 1 and include the last one: the left edge of a box is xmin - 1, the right one xmax. A
    box whose xmax is not above its xmin has no width.

    Raises:
        DataError: If a file is missing or broken.
    """
    try:
        lines = listed.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"no list of images; {listed}; write one name per line, in UTF-8") from None
    names = [re.sub(r"\s+-?[01]$", "", line.strip()) for line in lines if line.strip()]
    if not names:
        raise DataError(f"no images; {listed}; write one name per line")
    return [read_xml(root, name) for name in names]


def read_xml(root: Path, name: str) -> Record:
    """Read one file of Pascal VOC; see `read_voc`."""
    file = root / "Annotations" / f"{name}.xml"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"an image elsewhere; {name}; list names of files in {root / 'Annotations'}")
    try:
        tree = ElementTree.parse(file).getroot()
        size = [int(float(tree.findtext(f"size/{side}", "0"))) for side in ("height", "width")]
        objects = []
        for each in tree.iter("object"):
            left, top, right, bottom = (
                float(each.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")
            )
            flat = right <= left or bottom <= top
            objects.append(
                {
                    "class": each.findtext("name", "").strip(),
                    "box": (left, top, left, top) if flat else (left - 1, top - 1, right, bottom),
                    "ignored": each.findtext("difficult", "0").strip() == "1",
                    "segmentation": None,
                }
            )
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"not an annotation of Pascal VOC ({error}); {file}; correct it") from None
    folder = root / "JPEGImages"
    pictures = (f"{name}{ending}" for ending in (".jpg", *sorted(EXTENSIONS)))
    picture = next((picture for picture in pictures if (folder / picture).is_file()), f"{name}.jpg")
    return Record(picture, (size[0], size[1]) if all(size) else None, objects)


# -- training ----------------------------------------------------------------------------------------------------------


class LargeScaleJitter(AnnotatedResize):
    """Resize an image and its objects to its size in evaluation times a random factor (Ghiasi et al. 2021).

    torchvision's `ScaleJitter` takes the crop's height for its width.

    Args:
        crop: Sides of a crop. In evaluation, an image has the largest size that fits into them, in landscape or
            portrait.
        scale: Range of the factor.
    """

    def __init__(self, crop: tuple[int, int], scale: tuple[float, float]):
        super().__init__()
        self.crop, self.scale = crop, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose a size."""
        sides = v2.query_size(flat_inputs)
        fit = min(min(self.crop) / min(sides), max(self.crop) / max(sides))
        factor = fit * float(torch.empty(()).uniform_(*self.scale))
        return {"size": [max(round(side * factor), 1) for side in sides]}


@dataclass(frozen=True)
class DetectionAugmentation:
    """Large-scale jitter, a crop and a flip of an image and its objects."""

    steps: v2.Compose

    @classmethod
    def of(
        cls, crop: tuple[int, int], *, scale: tuple[float, float], flip: bool, mean: Sequence[float]
    ) -> "DetectionAugmentation":
        """Make an augmentation, which draws from the global generators.

        Args:
            crop: Height and width of the crop.
            scale: Range of the image's size before the crop, relative to its size in evaluation.
            flip: Whether to mirror with probability 1/2.
            mean: Colour of the padding, 0 to 1.
        """
        steps = [
            LargeScaleJitter(crop, scale),
            v2.RandomCrop(
                crop,
                pad_if_needed=True,
                fill={tv_tensors.Image: [255 * value for value in mean], tv_tensors.Mask: 0, "others": 0},
            ),
        ]
        steps += [v2.RandomHorizontalFlip()] if flip else []
        return cls(v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)]))

    def __call__(self, image: Tensor, objects: Objects) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment one image (C, H, W) and its objects, returned as torchvision's boxes, labels from 1, and masks."""
        counted = ~objects.ignored
        boxes = tv_tensors.BoundingBoxes(objects.boxes[counted], format="XYXY", canvas_size=image.shape[-2:])
        target = {"boxes": boxes, "labels": objects.labels[counted] + 1}
        if objects.masks is not None:
            target["masks"] = tv_tensors.Mask(objects.masks[counted])
        image, target = self.steps(tv_tensors.Image(image), target)
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        if "masks" in target:  # a crop may leave a box with only a part of its object, or none
            seen = target["masks"].flatten(1).any(dim=1)
            target = {name: value[seen] for name, value in target.items()}
            target["boxes"] = masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        return image.as_subclass(Tensor), target
