"""Sets written by `dmjd prepare`: images decoded once, scaled down, and memory-mapped when they are read.

A set is a folder:

* `set.json`: how the set was made, its parts with their classes and numbers of images, and size and SHA-256 of every
  other file that is read. It is written last.
* `PART-00000.bin`, `PART-00001.bin`, ...: pixels, one image after the other, each H W C at its own depth, at an offset
  that is a multiple of 4 bytes. Channels come last because torch resizes such bytes more than 1.5 times as fast.
* `PART.index.safetensors`: `names` and `ends` (see `PackedStrings`), `places` (n, 6), which are file, offset in bytes,
  height, width, depth (index in `DTYPES`) and CRC-32, and `labels` (n) where there are classes.
* `skipped.tsv`: the images that did not decode, with the reasons.

An image whose CRC-32 does not match counts as one that does not decode. Sets of format 1 have no CRC-32.

PART is `all` in a set without parts. All numbers are little-endian, as on nearly all machines.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Num, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dmjd.data.crops import resize
from dmjd.data.decode import DTYPES, BadImage, Reduce, Wanted, as_wanted, channels_advice
from dmjd.data.packed import PackedNumbers, PackedStrings
from dmjd.data.source import Opener, Source, has_labels, labels_of, register_source
from dmjd.data.stored import StoredImages
from dmjd.errors import DataError

FORMAT = 2
READABLE = (1, 2)  # the first has no CRC-32
KIND = "images prepared by dmjd"
SET, JOURNAL = "set.json", "unfinished.jsonl"
ALIGNED = 4  # bytes; the offset of every image is a multiple of this
AGAIN = "copy it again, or prepare the set anew in another --out"


@dataclass(frozen=True, eq=False)
class PreparedReader:
    """Reads the images of one part of a set.

    Attributes:
        root: Folder of the set.
        stem: Prefix of the part's file names.
        wanted: How to read the images.
        in_chans: Channels of the stored images.
        places: File, offset, height, width, depth and, except in format 1, CRC-32 of each.
    """

    root: Path
    stem: str
    wanted: Wanted
    in_chans: int
    places: Int[Tensor, "n _"]

    def __call__(self, index: int, reduce: Reduce | None) -> Num[Tensor, "C H W"]:
        """Return an image as a view of the mapped file, or as a copy if channels or range are converted.

        Raises:
            BadImage: If it has changed since it was written.
        """
        file, offset, height, width, depth, *crc = self.places[index].tolist()
        kind = DTYPES[depth]
        size = height * width * self.in_chans * kind.itemsize
        stored = self._mapped(file)[offset : offset + size]
        if crc and [zlib.crc32(stored.numpy().data)] != crc:
            raise BadImage("changed since it was prepared")
        return as_wanted(stored.view(kind).view(height, width, self.in_chans).numpy(), self.wanted)

    def _mapped(self, file: int) -> UInt8[Tensor, " bytes"]:
        """Memory-map a file, once per process; an accidental write would change a private copy only."""
        if file not in self._maps:
            path = self.root / pixel_file(self.stem, file)
            self._maps[file] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        return self._maps[file]

    @cached_property
    def _maps(self) -> dict[int, Tensor]:
        """Mapped files by number."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Drop the mapped files on pickling for a worker, which maps them itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


# -- writing -----------------------------------------------------------------------------------------------------------


def shrink(image: Num[Tensor, "C H W"], size: int) -> Num[Tensor, "C h w"]:
    """Scale an image down to a short side of `size` pixels (bicubic, antialiased); smaller images stay as they are.

    Deep images are clipped to their own range: at an edge of 4095 the cubic overshoots, and 12 bits would become 13.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    if short <= size:
        return image
    smaller = resize(image, (round(height * size / short), round(width * size / short)))
    if image.dtype == torch.uint8:
        return smaller
    return torch.from_numpy(smaller.numpy().clip(image.numpy().min(), image.numpy().max()))


def pack(images: Iterable[Num[Tensor, "C _ _"]]) -> tuple[UInt8[Tensor, " bytes"], list[list[int]]]:
    """Pack images with the same number of channels one after the other.

    Returns:
        Their pixels, and offset, height, width, depth and CRC-32 of each.
    """
    content, places = bytearray(), []
    for image in images:
        pixels = image.permute(1, 2, 0).contiguous().numpy().data.cast("B")
        places.append([len(content), *image.shape[1:], DTYPES.index(image.dtype), zlib.crc32(pixels)])
        content += pixels
        content += bytes(-len(content) % ALIGNED)
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8), places


def write_index(path: Path, source: Source, kept: Int[Tensor, " n"], places: Int[Tensor, "n 6"]) -> None:
    """Write the index of a part.

    Args:
        path: File to write.
        source: Source of the images.
        kept: Indices of the images in the source.
        places: Places of the images in the set.
    """
    names = PackedStrings.pack(source.name(index) for index in kept.tolist())
    labels = {"labels": labels_of(source, kept.tolist())} if has_labels(source) else {}
    path.write_bytes(save({"names": names.content, "ends": names.ends, "places": places, **labels}))


def pixel_file(stem: str, number: int) -> str:
    """Return the name of a file of pixels."""
    return f"{stem}-{number:05d}.bin"


def index_file(stem: str) -> str:
    """Return the name of a part's index."""
    return f"{stem}.index.safetensors"


def stem_of(part: str) -> str:
    """Return the prefix of a part's file names."""
    return part or "all"


# -- opening -----------------------------------------------------------------------------------------------------------


def open_prepared(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open a set and find its parts, without reading a pixel.

    Raises:
        DataError: If the set is not finished, a file of it is missing or truncated, or its images do not have the
            wanted channels.
    """
    root = Path(data)
    content = read_set(root)
    channels = content["in_chans"]
    if channels != wanted.in_chans and {channels, wanted.in_chans} != {1, 3}:
        raise DataError(f"{channels} channels, not {wanted.in_chans}; {root}; {channels_advice(channels)}")
    found: dict[str, Source] = {}
    for part, described in content["parts"].items():
        path = root / index_file(stem_of(part))
        try:
            stored = path.read_bytes()
            if hashlib.sha256(stored).hexdigest() != content["files"][path.name]["sha256"]:
                raise DataError(f"a file of the set has changed; {path}; {AGAIN}")
            index = load(stored)
            labels = index.get("labels")
            found[part] = StoredImages(
                address=data,
                names=PackedStrings(index["names"], index["ends"]),
                classes=tuple(described["classes"]),
                labels=None if labels is None else PackedNumbers(labels),
                reader=PreparedReader(root, stem_of(part), wanted, channels, index["places"]),
            )
        except (SafetensorError, KeyError) as error:
            raise DataError(f"not an index ({error}); {path}; {AGAIN}") from None
    return found


def read_set(root: Path) -> dict[str, Any]:
    """Read the description of a set, and check that its files exist and have the recorded sizes.

    Raises:
        DataError: If they do not, the set is not finished, or its format is unknown.
    """
    path = root / SET
    try:
        content = json.loads(path.read_bytes())
        if content["format"] not in READABLE:
            raise DataError(f"format {content['format']}, this version reads {FORMAT}; {path}; {AGAIN}")
        sizes = {root / name: described["bytes"] for name, described in content["files"].items()}
        classes = {part: described["classes"] for part, described in content["parts"].items()}
        if any(part != Path(part).name for part in classes) or not isinstance(content["in_chans"], int):
            raise ValueError(f"parts {', '.join(classes)}, channels {content['in_chans']}")
    except FileNotFoundError:
        raise DataError(f"not a finished set; {root}; run the same dmjd prepare again, which goes on with it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the description of a set ({error}); {path}; {AGAIN}") from None
    for file, size in sizes.items():
        if not file.is_file():
            raise DataError(f"a file of the set is missing; {file}; {AGAIN}")
        if file.stat().st_size != size:
            raise DataError(f"a file of the set has {file.stat().st_size} bytes, not {size}; {file}; {AGAIN}")
    return content


def verify(root: Path) -> None:
    """Read every file of a set and check that no bit has changed since it was written.

    Raises:
        DataError: If one has changed, or as in `read_set`.
    """
    for name, described in read_set(root)["files"].items():
        with (root / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != described["sha256"]:
                raise DataError(f"a file of the set has changed; {root / name}; {AGAIN}")


def _accepts(data: str) -> bool:
    """Tell a set, finished or not, from other folders, which may have a set.json of another kind."""
    root = Path(data)
    try:
        return (root / JOURNAL).is_file() or json.loads((root / SET).read_bytes())["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


register_source("prepared")(Opener(_accepts, open_prepared))
