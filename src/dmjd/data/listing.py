"""The files of a folder: scanned in sorted order, and cached for the next time.

A listing takes the memory of the names and 8 bytes for each. A listing of many files is kept in the user's cache and is
valid as long as no folder has changed: a folder's modification time changes whenever a file in it is added, removed or
renamed.
"""

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmjd.data.packed import PackedStrings

MANY = 10_000  # files from which a listing is cached
LINKED = "linking to a folder"  # key of `passed_over` for links; no file extension looks like it
SETTLED = 2.0  # seconds after which a folder's time shows every later change, on the coarsest file systems


@dataclass(frozen=True)
class Listing:
    """The files below a folder.

    Attributes:
        names: Paths below it of the files with the wanted extensions, sorted.
        passed_over: Number of other files by extension; of links to folders by `LINKED`.
    """

    names: PackedStrings
    passed_over: dict[str, int]


def list_files(root: Path, endings: frozenset[str], cache: Path | None = None) -> Listing:
    """List the files below a folder by extension, without following links to folders or listing hidden files.

    Args:
        root: The folder.
        endings: Lower-case extensions of the files to list, with the dot.
        cache: Folder of cached listings; None for no caching.

    Raises:
        OSError: If a folder cannot be read.
    """
    key = hashlib.sha256("\n".join([str(root.resolve()), *sorted(endings)]).encode(errors="surrogateescape"))
    kept = cache / f"{key.hexdigest()[:32]}.safetensors" if cache else None
    if kept and (listing := _kept_listing(kept, root)):
        return listing
    began = time.time()
    folders: dict[str, int] = {}
    passed_over: Counter[str] = Counter()
    names = PackedStrings.pack(_scan(root, "", endings, folders, passed_over))
    listing = Listing(names, dict(sorted(passed_over.items())))
    if kept and len(names) >= MANY and max(folders.values()) / 1e9 < began - SETTLED:
        below, times = PackedStrings.pack(folders), torch.tensor(list(folders.values()))
        tensors = {"names": names.content, "ends": names.ends, "folders": below.content, "folder_ends": below.ends}
        keep(kept, tensors | {"times": times}, {ending: str(count) for ending, count in listing.passed_over.items()})
    return listing


def say_ignored(images: int, others: Mapping[str, int], address: object) -> None:
    """Report files besides the images on stderr, by extension: the five most frequent kinds.

    Args:
        images: Number of images.
        others: Number of other files by extension.
        address: Name of the set.
    """
    if not others:
        return
    kinds = sorted(others, key=lambda ending: (-others[ending], ending))
    named = [f"{others[ending]} {ending or 'without an ending'}" for ending in kinds[:5]]
    rest = sum(others[ending] for ending in kinds[5:])
    said = ", ".join([*named, *([f"{rest} of other kinds"] if rest else [])])
    print(f"{images} images; ignored: {said}; {address}", file=sys.stderr)


def say_unread(folders: Iterable[str], parts: Sequence[str], address: object) -> None:
    """Report folders beside a part `train` that are not read on stderr: in a set of vehicles, `train` may be a class.

    Args:
        folders: Names of the folders.
        parts: Names that a part may have.
        address: Name of the set.
    """
    names = sorted(folders)
    if names:
        said = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        print(f"not read: {said}; {address}; beside train, parts are {', '.join(parts)}", file=sys.stderr)


def _scan(
    root: Path, below: str, endings: frozenset[str], folders: dict[str, int], passed_over: Counter[str]
) -> Iterator[str]:
    """Walk a folder in the order of its sorted paths: a folder sorts as its name with a slash."""
    folders[below] = os.stat(root / below).st_mtime_ns
    with os.scandir(root / below) as entries:
        shown = [entry for entry in entries if entry.name[0] != "."]
    linked = {entry.name for entry in shown if _is_linked_folder(entry)}
    if linked:
        passed_over[LINKED] += len(linked)
    found = sorted(
        entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in shown if entry.name not in linked
    )
    for name in found:
        if name[-1] == "/":
            yield from _scan(root, below + name, endings, folders, passed_over)
        elif (ending := os.path.splitext(name)[1].lower()) in endings:
            yield below + name
        else:
            passed_over[ending] += 1


def _is_linked_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself; reading the image says so
        return False


def keep(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of the cache, whole or not at all, if the cache is writable."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with suppress(OSError, SafetensorError, UnicodeError):  # a file extension need not be Unicode
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(file)


def _kept_listing(kept: Path, root: Path) -> Listing | None:
    """Read a cached listing, if there is one and no folder has changed."""
    try:
        with safe_open(kept, framework="pt") as file:
            folders = PackedStrings(file.get_tensor("folders"), file.get_tensor("folder_ends"))
            for place, then in enumerate(file.get_tensor("times").tolist()):
                if os.stat(root / folders[place]).st_mtime_ns != then:
                    return None
            names = PackedStrings(file.get_tensor("names"), file.get_tensor("ends"))
            passed_over = {key: int(value) for key, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError):
        return None
    return Listing(names, passed_over)
