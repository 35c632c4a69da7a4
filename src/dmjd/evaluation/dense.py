"""Code shared by the evaluation of segmentation and of detection."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Num
from torch import Tensor
from tqdm import tqdm

from dmjd.data.decode import BadImage
from dmjd.data.folder import file_and_page
from dmjd.data.levels import refuse_deep
from dmjd.data.single import open_all_or_one
from dmjd.data.source import Readable, join_skipped
from dmjd.engine.claim import refuse_input
from dmjd.engine.distributed import Ranks
from dmjd.engine.signals import stoppable
from dmjd.errors import ConfigError, DataError
from dmjd.evaluation.features import FeatureExtractor

SHOWN = 8  # held-out images in the report


class Shown(NamedTuple):
    """A held-out image for the report, with truth and prediction in the form of the task."""

    number: int  # index in the set
    name: str
    image: Num[Tensor, "C H W"]  # of 0..255
    truth: Any
    prediction: Any


@dataclass
class Judged:
    """The evaluation of a network on the held-out images.

    Attributes:
        summary: Numbers; the first one decides which network is the best.
        rows: The table by class.
        shown: Some images with their predictions.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    shown: list[Shown] = field(default_factory=list)


def decodable(images: Readable, ranks: Ranks) -> Iterator[tuple[int, Any]]:
    """Read this rank's share of a set image by image; a line on stderr counts those of all ranks that do not decode.

    Raises:
        DataError: If none decodes.
        Stopped: After a signal that ends runs.
    """
    bad: dict[str, str] = {}
    looked_at = tqdm(ranks.share(range(len(images))), desc="held-out images", leave=False, disable=None)
    for index in stoppable(looked_at, ranks.agree):
        try:
            item = images.read(index)
        except BadImage as reason:
            bad[images.name(index)] = str(reason)
            continue
        refuse_deep(item[0], images.name(index))
        yield index, item
    bad = join_skipped(ranks.gather(bad))
    if bad:
        path, why = next(iter(bad.items()))
        line = f"{len(bad)} of {len(images)} images left out, such as {path}: {why}"
        if len(bad) == len(images):
            raise DataError(f"{line}; {images.address}; correct them")
        print(f"warning: {line}; {images.address}", file=sys.stderr)


def output_name(name: str) -> str:
    """Name the output of an image, without suffix: always a path below a folder, and a different one for each page."""
    file, _ = file_and_page(name)
    path = Path(file).with_suffix("")
    # Names from a list may be absolute or contain "..": outputs there would land beside the images themselves.
    return "/".join(part for part in path.parts if part not in (path.anchor, "..")) + name.removeprefix(file)


def refuse_images(path: Path, out: Path) -> None:
    """Refuse to write predictions into a set, whose images and classes.txt they would replace.

    Raises:
        ConfigError: If `out` is the folder of the images, or holds a set of images with annotations.
    """
    if (out / "annotations").is_dir():
        raise ConfigError(f"a set of images with annotations; {out}; choose another --out")
    refuse_input(str(path), [out], folders=[out / name for name in ("images", "masks", "overlays")])


def images_to_predict(path: Path, backbone: FeatureExtractor) -> Iterator[tuple[str, Num[Tensor, "C H W"] | None]]:
    """Yield name and pixels of an image or of all in a set; None for one that does not decode, warned of at the end.

    Raises:
        DataError: If there is no image, none decodes, or two names differ only in their suffix.
    """
    parts = backbone.open(lambda wanted: open_all_or_one(str(path), wanted))
    names = [images.name(index) for images in parts for index in range(len(images))]
    first: dict[str, str] = {}
    for name in names:
        if (twin := first.setdefault(output_name(name), name)) is not name:
            raise DataError(f"two images of the same name but for the ending: {twin} and {name}; {path}; rename one")
    bad: dict[str, str] = {}
    seen = tqdm(total=len(names), desc="predicting", unit=" images", leave=False, disable=None)
    for images, index in ((part, index) for part in parts for index in range(len(part))):
        name = images.name(index)
        try:
            image = images.read(index)
        except BadImage as reason:
            bad[name] = str(reason)
            yield name, None
        else:
            refuse_deep(image, name)
            yield name, image
        seen.update()
    if len(bad) == len(names):
        name, why = next(iter(bad.items()))
        raise DataError(f"none of {len(names)} images decodes; {name}: {why}; check {path}")
    for name, why in bad.items():
        print(f"warning: {why}; {name} of {path}; left out", file=sys.stderr)
