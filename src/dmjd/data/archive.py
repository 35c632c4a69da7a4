"""Images in archives, read without unpacking: zip and tar files, and the shards of a WebDataset.

A zip or tar file counts as the folder that it was made from. Shards contain samples: members whose names differ only
after the first dot belong together, such as `0001.jpg` and `0001.cls`. The headers of a tar file are read once and
cached for the next time, as long as size and time of the file are the same.
"""

import glob
import hashlib
import os
import re
import struct
import tarfile
import time
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Num
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dmjd.data.builtin import download_folder
from dmjd.data.decode import EXTENSIONS, MAX_BYTES, BadImage, Reduce, Wanted, decode
from dmjd.data.listing import SETTLED, keep, say_ignored, say_unread
from dmjd.data.packed import PackedStrings, Packer
from dmjd.data.source import HELD_OUT_PARTS, Opener, Source, is_file_name, register_source
from dmjd.data.stored import PARTS, StoredImages, classes_of, classes_of_folders, refuse_frames
from dmjd.errors import DataError

OPEN_FILES = 64  # most files that a process keeps open
CHAIN = 8  # longest chain of links to follow
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
IN_TAR, DEFLATED = 0, zipfile.ZIP_DEFLATED + 1  # how a member is stored in its file

Place = tuple[int, int, int, int]  # number of a file, offset of a member in it, bytes, and how it is stored


@dataclass(frozen=True)
class ArchiveReader:
    """Reads members of archives.

    Attributes:
        files: Paths of the archives.
        places: Place of each member, one `Place` per row.
        names: Name of each member, for messages.
        wanted: How to read the images.
    """

    files: PackedStrings
    places: Int[Tensor, "n 4"]
    names: PackedStrings
    wanted: Wanted

    def __call__(self, index: int, reduce: Reduce | None) -> Num[Tensor, "C H W"]:
        """Decode an image; raises `BadImage`."""
        file, start, size, kind = self.places[index].tolist()
        path = self.files[file]
        try:
            archive = self._open(path)
            if kind != IN_TAR:  # in a zip file, a header comes first, with a name and extra fields
                start += 30 + sum(struct.unpack("<HH", archive.read(start + 26, 4)))
            if size > MAX_BYTES:
                raise BadImage("a file of more than 512 MiB")
            content = archive.read(start, size)
            if kind == DEFLATED:
                content = inflate(content)
        except (OSError, struct.error, zlib.error) as error:
            raise BadImage(f"{type(error).__name__}: {error}") from None
        return decode(content, self.wanted, name=f"{path}/{self.names[index]}", reduce=reduce)

    @cached_property
    def _open(self) -> Callable[[str], "OpenFile"]:
        return lru_cache(OPEN_FILES)(OpenFile)

    def __getstate__(self) -> dict[str, object]:
        """Drop the open files on pickling for a worker, which opens its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_open"}


def inflate(content: bytes) -> bytes:
    """Decompress a member of a zip file, which may expand a thousandfold.

    Raises:
        BadImage: If it exceeds the limit of a file.
        zlib.error: If it is broken.
    """
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    whole = decompressor.decompress(content, MAX_BYTES)
    if decompressor.unconsumed_tail:
        raise BadImage("a file of more than 512 MiB")
    return whole


class OpenFile:
    """A file for random access by several threads at once; closed when the last of them drops it.

    Args:
        path: Its path.
    """

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes from an offset."""
        return os.pread(self.descriptor, size, start)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # it has none if opening failed
            os.close(self.descriptor)


# -- one archive -------------------------------------------------------------------------------------------------------


def open_archive(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open a zip or tar file as if it were unpacked: parts and classes are folders in it.

    A single folder around everything is left out of the names.

    Raises:
        DataError: If it is missing, broken, compressed as a whole, or has no image.
    """
    path = Path(data)
    refuse_frames(data, wanted)
    if data.lower().endswith(COMPRESSED):
        raise DataError(f"a compressed tar file; {path}; unpack it, or pack it without compression")
    members = _images(path, _zip_members(path) if data.lower().endswith(".zip") else _tar_members(path))
    tops = {name.partition("/")[0] for name in members}
    if len(tops) == 1 and not tops & {*PARTS, *members}:
        members = {name.partition("/")[2]: place for name, place in members.items()}
    if not any(name.startswith("train/") for name in members):
        return {"": _source(data, path, members, wanted)}
    folders = {name.partition("/")[0] for name in members if "/" in name}
    say_unread(folders.difference(PARTS), HELD_OUT_PARTS, path)
    by_part = {
        part: {name.removeprefix(f"{part}/"): place for name, place in members.items() if name.startswith(f"{part}/")}
        for part in PARTS
    }
    return {part: _source(data, path, inside, wanted) for part, inside in by_part.items() if inside}


def _source(data: str, path: Path, members: dict[str, Place], wanted: Wanted) -> StoredImages:
    """Make a source from members by their names."""
    names = sorted(members)
    packed = PackedStrings.pack(names)
    classes, labels = classes_of_folders(packed)
    reader = ArchiveReader(
        PackedStrings.pack([str(path)]), torch.tensor([members[name] for name in names]), packed, wanted
    )
    return StoredImages(address=data, names=packed, classes=classes, labels=labels, reader=reader)


def _images(path: Path, members: Iterable[tuple[str, Place]]) -> dict[str, Place]:
    """Pick the images by extension, except hidden ones; of two with one name the last counts, as in unpacking."""
    images: dict[str, Place] = {}
    passed_over: Counter[str] = Counter()
    for name, place in members:
        name = os.path.normpath(name).lstrip("/")
        ending = os.path.splitext(name)[1].lower()
        if "/." in f"/{name}":
            continue
        if ending in EXTENSIONS:
            images[name] = place
        else:
            passed_over[ending] += 1
    if not images:
        raise DataError(f"no images; {path}; images end in {', '.join(sorted(EXTENSIONS))}")
    say_ignored(len(images), passed_over, path)
    return images


def _zip_members(path: Path) -> list[tuple[str, Place]]:
    """List the files in a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [each for each in archive.infolist() if not each.is_dir()]
    except FileNotFoundError:
        raise DataError(f"no such archive; {path}; check --data") from None
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise DataError(f"no whole zip file ({error}); {path}; copy it again, or pack it anew") from None
    for each in found:
        if each.flag_bits & 1 or each.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = "encrypted" if each.flag_bits & 1 else f"compressed by method {each.compress_type}"
            raise DataError(f"{each.filename} is {how}; {path}; unpack it, or pack it by plain zip")
    return [(each.filename, (0, each.header_offset, each.compress_size, each.compress_type + 1)) for each in found]


def _tar_members(path: Path) -> Iterable[tuple[str, Place]]:
    """List the files in a tar file."""
    index = index_tar(path)
    for name, (start, size) in zip(index.names, index.spans.tolist(), strict=True):
        yield name, (0, start, size, IN_TAR)


# -- shards ------------------------------------------------------------------------------------------------------------


def open_shards(data: str, wanted: Wanted) -> dict[str, Source]:
    """Open the shards of a pattern, in its order; samples have labels if each of them has a `.cls` member.

    Raises:
        DataError: If a shard is missing or broken, a sample has two images, or there is no image at all.
    """
    refuse_frames(data, wanted)
    paths = expand(data)
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    names, labels, places = Packer(), Packer(), array("q")
    labelled = True
    for number, path in enumerate(tqdm(paths, desc="indexing shards", leave=False, disable=None)):
        shard = os.path.relpath(path, root)
        for name, label, (start, size) in _samples(Path(path)):
            names.append(f"{shard}/{name}")
            labels.append(label or "")
            labelled = labelled and label is not None
            places.extend((number, start, size, IN_TAR))
    if not places:
        raise DataError(f"no images in {len(paths)} shards; {data}; images end in {', '.join(sorted(EXTENSIONS))}")
    classes, numbers = classes_of(labels.packed()) if labelled else ((), None)
    packed = names.packed()
    reader = ArchiveReader(PackedStrings.pack(paths), torch.from_numpy(np.asarray(places)).view(-1, 4), packed, wanted)
    return {"": StoredImages(address=data, names=packed, classes=classes, labels=numbers, reader=reader)}


def expand(pattern: str) -> list[str]:
    """List the files of a pattern: all that `{00..12}` and `{a,b}` stand for, and those that `*`, `?` and `[]` match.

    Raises:
        DataError: If one is missing, or there is none.
    """
    found: list[str] = []
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    for choice in product(*(_choices(piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces))):
        path = "".join(choice)
        there = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not there:
            raise DataError(f"no such shard; {path}; check the pattern {pattern}, and that all shards were copied")
        found += there
    if not found:
        raise DataError(f"no shards; {pattern}; write the lower number of a range first")
    return list(dict.fromkeys(found))


def _choices(inside: str) -> Sequence[str]:
    """List the alternatives in braces: numbers of equal width, or texts between commas."""
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",")


def _samples(path: Path) -> Iterator[tuple[str, str | None, tuple[int, int]]]:
    """List the samples of a shard: name and place of the image, and the label."""
    index = index_tar(path)
    images: dict[str, tuple[str, tuple[int, int]]] = {}
    plain: dict[str, bool] = {}
    labels: dict[str, str] = {}
    others: dict[str, str] = {}  # images that do not take precedence over an earlier one
    for name, text, (start, size) in zip(index.names, index.texts, index.spans.tolist(), strict=True):
        folder, _, file = name.rpartition("/")
        stem, _, ending = file.lower().partition(".")
        key = f"{folder}/{file[: len(stem)]}"
        if ending == "cls":
            labels[key] = text
        elif stem and os.path.splitext(file)[1].lower() in EXTENSIONS:
            is_plain = "." not in ending
            if plain.get(key) == is_plain:
                if images[key][1] != (start, size):  # not a link to it
                    others[key] = name
            elif key not in images or is_plain:  # 0001.jpg rather than 0001.mask.png
                images[key], plain[key] = (name, (start, size)), is_plain
                others.pop(key, None)
    for key, (name, place) in images.items():
        if key in others:
            raise DataError(f"two images in a sample, {name} and {others[key]}; {path}; leave one of them out")
        yield name, labels.get(key), place


# -- where the members of a tar file lie ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarIndex:
    """The files in a tar file, in their order.

    Attributes:
        names: Their paths.
        spans: Offset and size of each, in bytes.
        texts: Contents of the `.cls` files; empty for all others.
    """

    names: PackedStrings
    spans: Int[Tensor, "n 2"]
    texts: PackedStrings


def index_tar(path: Path) -> TarIndex:
    """Index the files in a tar file.

    Raises:
        DataError: If it is missing, broken or truncated.
    """
    try:
        status = os.stat(path)
        stamp = {"size": str(status.st_size), "time": str(status.st_mtime_ns), "links": "followed"}
        key = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
        kept = download_folder() / "indices" / f"{key}.safetensors"
        if index := _kept_index(kept, stamp):
            return index
        index = _scan(path)
    except FileNotFoundError:
        raise DataError(f"no such tar file; {path}; check --data") from None
    except tarfile.ReadError as error:
        raise DataError(f"no whole tar file ({error}); {path}; copy it again, or pack it anew uncompressed") from None
    except OSError as error:
        raise DataError(f"{error.strerror or error}; {path}; check its permissions") from None
    if status.st_mtime_ns / 1e9 < time.time() - SETTLED:
        names, texts = index.names, index.texts
        tensors = {"names": names.content, "ends": names.ends, "spans": index.spans}
        keep(kept, tensors | {"texts": texts.content, "text_ends": texts.ends}, stamp)
    return index


def _scan(path: Path) -> TarIndex:
    """Read all headers; a truncated file raises `tarfile.ReadError`. Links to files in the archive come last."""
    names, spans, texts, links = Packer(), array("q"), Packer(), dict[str, str]()
    with tarfile.open(path, "r:") as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # the headers of a million files would take a gigabyte
            if member.islnk():
                links[member.name] = member.linkname
            elif member.issym():
                links[member.name] = os.path.join(os.path.dirname(member.name), member.linkname)
            if not member.isreg() or member.issparse():
                continue
            links.pop(member.name, None)  # of members with one name, the last counts
            content = archive.extractfile(member) if member.name.lower().endswith(".cls") else None
            names.append(member.name)
            spans.extend((member.offset_data, member.size))
            texts.append(content.read().decode(errors="replace").strip() if content else "")
    with path.open("rb") as file:  # tarfile takes a broken header for the end, which must be a block of zeros
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
    index = TarIndex(names.packed(), torch.from_numpy(np.asarray(spans)).view(-1, 2), texts.packed())
    return _with_links(index, links) if links else index


def _with_links(index: TarIndex, links: Mapping[str, str]) -> TarIndex:
    """Add links, with the places of their targets; links out of the archive would be broken once unpacked, too."""
    targets = {os.path.normpath(name): os.path.normpath(target) for name, target in links.items()}
    for _ in range(CHAIN):
        targets = {name: targets.get(target, target) for name, target in targets.items()}
    ends = {*targets.values()}
    places = {name: place for place, name in enumerate(map(os.path.normpath, index.names)) if name in ends}
    # A file that is packed twice is stored as a link to itself the second time.
    found = {name: places[target] for name, target in targets.items() if target in places and name != target}
    return TarIndex(
        PackedStrings.pack([*index.names, *found]),
        torch.cat([index.spans, index.spans[list(found.values())]]),
        PackedStrings.pack([*index.texts, *(index.texts[place] for place in found.values())]),
    )


def _kept_index(kept: Path, stamp: dict[str, str]) -> TarIndex | None:
    """Read a cached index, if there is one and its tar file has not changed."""
    try:
        with safe_open(kept, framework="pt") as file:
            if file.metadata() != stamp:
                return None
            return TarIndex(
                PackedStrings(file.get_tensor("names"), file.get_tensor("ends")),
                file.get_tensor("spans"),
                PackedStrings(file.get_tensor("texts"), file.get_tensor("text_ends")),
            )
    except (OSError, SafetensorError):
        return None


# -- registration ------------------------------------------------------------------------------------------------------


def _is_pattern(data: str) -> bool:
    """Tell a pattern of shards from the name of a file."""
    return is_file_name(data, ".tar") and any(each in data for each in "{*?[") and not os.path.exists(data)


def _is_archive(data: str) -> bool:
    """Tell whether a name is that of a zip or tar file."""
    return is_file_name(data, (".zip", ".tar", *COMPRESSED)) and not _is_pattern(data)


register_source("archive")(Opener(_is_archive, open_archive))
register_source("shards")(Opener(_is_pattern, open_shards, names_tell_part=True))
