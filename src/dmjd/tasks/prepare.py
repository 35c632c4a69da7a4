"""`dmjd prepare`: decode and scale down images once, instead of in every epoch of every run.

Threads decode and one writes, in order, so that the files do not depend on their number. A journal records what has
safely reached the disk, so that a killed process can be resumed.
"""

import hashlib
import json
import os
import shlex
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from dmjd.config.prepare import PrepareSettings
from dmjd.data.decode import BadImage, Wanted
from dmjd.data.memory import in_threads
from dmjd.data.prepared import (
    FORMAT,
    JOURNAL,
    KIND,
    SET,
    index_file,
    pack,
    pixel_file,
    read_set,
    shrink,
    stem_of,
    write_index,
)
from dmjd.data.source import Source, fingerprint, open_parts, sample
from dmjd.data.workers import usable_cores
from dmjd.engine.checkpoint import flush, sha256, write_atomically
from dmjd.engine.claim import lock
from dmjd.engine.run import rows_of
from dmjd.errors import ConfigError, DataError, StorageError

CHUNK = 16  # images that are read on one thread and written together
SAFE = 2**26  # bytes after which written data is flushed to disk
Key = tuple[str, int]  # a part, and the number of an image in it


def prepare(settings: PrepareSettings) -> dict[str, Any]:
    """Write the set `settings.out` and print one line: what it holds, and what to do with it.

    Files that do not decode are left out and listed in skipped.tsv. A finished set is left as it is.

    Returns:
        Numbers of images, of skipped files and of bytes, and the path of the set.

    Raises:
        ConfigError: If `out` holds something else, or a set that was begun with other settings.
        DataError: If there are no images, they do not have the wanted channels, or none of a part decodes.
        StorageError: If the disk has not enough space or cannot be written, or another process is writing the set.
    """
    out, size = settings.out, settings.size
    wanted = Wanted(in_chans=settings.in_chans, image_hw=(size, size), pages=settings.data_pages)
    parts = open_parts(settings.data, wanted)
    plan = plan_of(settings, parts)
    done = (out / SET).is_file()
    if done:
        refuse_other(out, read_set(out), plan)
    else:
        if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL).is_file():
            raise ConfigError(f"it holds something else; {out}; choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
            refuse_small_disk(out, parts, size)
            with SetWriter(out, plan) as writer:
                fill(writer, parts, size, settings.workers)
                finish(writer, parts, plan)
        except OSError as error:
            todo = "free some space or check permissions, and run the same command again to continue"
            raise StorageError(f"{error.strerror or error}; {error.filename or out}; {todo}") from None
    (out / JOURNAL).unlink(missing_ok=True)
    summary = sum_up(out)
    print("this set is already finished; " * done + closing_line(settings, summary))
    return summary


def plan_of(settings: PrepareSettings, parts: dict[str, Source]) -> dict[str, Any]:
    """Describe the images of a set and how it is made: sets with the same plan have the same files."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "source": settings.data,
        "size": settings.size,
        "in_chans": settings.in_chans,
        "data_pages": settings.data_pages,
        "shard_mb": settings.shard_mb,
        "parts": {
            part: {"listed": len(source), "fingerprint": fingerprint(source), "classes": list(source.classes)}
            for part, source in parts.items()
        },
    }


def refuse_other(out: Path, before: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse to continue a set with other settings or other images.

    Raises:
        ConfigError: If it was begun with other settings.
        DataError: If it was begun with other images.
    """
    changed = [name for name in ("size", "in_chans", "data_pages", "shard_mb") if before[name] != plan[name]]
    if changed:
        raise ConfigError(
            f"the set was begun with {', '.join(f'{name} {before[name]}' for name in changed)}; {out}; "
            "give the same, or choose another --out"
        )
    if before["parts"] != plan["parts"]:
        raise DataError(f"the images of --data have changed since the set was begun; {out}; choose another --out")


def refuse_small_disk(out: Path, parts: dict[str, Source], size: int) -> None:
    """Estimate from some images how much space the set needs.

    Raises:
        StorageError: If the disk does not have it.
    """
    needed = 0.0
    for source in parts.values():
        sizes = [shrink(image, size).nbytes for image in sample(source, 32)]
        needed += len(source) * sum(sizes) / max(len(sizes), 1)
    there = sum(path.stat().st_size for path in out.iterdir())
    free = shutil.disk_usage(out).free
    if needed > there + free:
        raise StorageError(
            f"the set needs about {(needed - there) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {out}; "
            "free some space, or choose another --out or a smaller --size"
        )


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedChunk:
    """Some consecutive images.

    Attributes:
        pixels: Pixels of those that decode.
        places: Offset, height, width, depth and CRC-32 of each of them.
        skipped: Indices of the others, with the reasons.
    """

    pixels: UInt8[Tensor, " bytes"]
    places: list[list[int]]
    skipped: dict[int, str]


def fill(writer: "SetWriter", parts: Mapping[str, Source], size: int, workers: int | None) -> None:
    """Decode, shrink and write all images that are not written yet.

    Raises:
        DataError: If images do not have the wanted channels, or have pages and `--data_pages` is not given.
    """

    def read(keys: list[Key]) -> tuple[list[Key], PackedChunk]:
        images, skipped = [], dict[int, str]()
        for part, index in keys:
            try:
                images.append(shrink(parts[part].read(index), size))
            except BadImage as bad:
                skipped[index] = str(bad)
        return keys, PackedChunk(*pack(images), skipped)

    done = {part: progress.listed for part, progress in writer.parts.items()}
    total, before = sum(map(len, parts.values())), sum(done.values())
    workers = min(usable_cores(), 16) if workers is None else workers
    # Threads start at once and share memory, and decoding and resizing release the GIL. Processes would take seconds to
    # start, and sending the pixels of small images takes them as long as decoding does.
    one_core: Any = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with tqdm(total=total, initial=before, desc="preparing", unit=" images", leave=False, disable=None) as bar:
        for keys, chunk in in_threads(read, chunks(parts, done), workers, **one_core):
            writer.append(keys[0][0], chunk)
            bar.update(len(keys))


def chunks(parts: Mapping[str, Source], done: Mapping[str, int]) -> Iterator[list[Key]]:
    """Divide the images that are not done into chunks, none of which has images of two parts."""
    for part, source in parts.items():
        for start in range(done[part], len(source), CHUNK):
            yield [(part, index) for index in range(start, min(start + CHUNK, len(source)))]


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class PartProgress:
    """Progress of a part.

    Attributes:
        listed: Number of images that were read.
        kept: Indices of those that decode.
        places: File, offset, height, width, depth and CRC-32 of each of these, one image after the other.
        skipped: Indices of the others, with the reasons.
        ends: Bytes in each file.
    """

    listed: int = 0
    kept: array = field(default_factory=lambda: array("q"))
    places: array = field(default_factory=lambda: array("q"))
    skipped: dict[int, str] = field(default_factory=dict)
    ends: list[int] = field(default_factory=lambda: [0])

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of the journal, whether it was just written or is read again."""
        skipped = {int(index): reason for index, reason in line["skipped"].items()}
        numbers = range(self.listed, self.listed + len(line["places"]) + len(skipped))
        self.listed = numbers.stop
        self.kept.extend(index for index in numbers if index not in skipped)
        self.places.extend(number for place in line["places"] for number in (line["file"], *place))
        self.skipped |= skipped
        self.ends[line["file"] :] = [line["end"]]


class SetWriter:
    """Appends images to the files of a set, and records in a journal which have safely reached the disk.

    A new writer continues where the journal of an earlier one ends.

    Args:
        out: Folder of the set.
        plan: Images of the set and how it is made.

    Attributes:
        parts: Progress of each part.
        digests: SHA-256 of the files that this writer filled.

    Raises:
        ConfigError: If the set was begun with other settings.
        DataError: If it was begun with other images, or a file of it is missing or truncated.
        StorageError: If another process is writing it.
    """

    parts: dict[str, PartProgress]
    digests: dict[str, str]

    def __init__(self, out: Path, plan: Mapping[str, Any]):
        self.out, self.largest = out, plan["shard_mb"] * 2**20
        self.parts, self.digests = {part: PartProgress() for part in plan["parts"]}, {}
        self.file: BinaryIO | None = None
        self.digest = hashlib.sha256()
        self.waiting: list[bytes] = []  # lines of the journal whose images are not yet flushed
        self.unsafe = 0  # bytes of these
        self.journal = (out / JOURNAL).open("a+b")
        try:
            self._go_on(plan)
        except BaseException:
            self.journal.close()
            raise

    def __enter__(self) -> "SetWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        if self.file:
            self.file.close()

    def append(self, part: str, chunk: PackedChunk) -> None:
        """Write the next images of a part."""
        progress, size = self.parts[part], chunk.pixels.nbytes
        if progress.ends[-1] and progress.ends[-1] + size > self.largest:
            progress.ends.append(0)
        number, start = len(progress.ends) - 1, progress.ends[-1]
        content = chunk.pixels.numpy().data
        self._open(self.out / pixel_file(stem_of(part), number), start).write(content)
        self.digest.update(content)
        places = [[start + offset, *rest] for offset, *rest in chunk.places]
        line = {"part": part, "file": number, "end": start + size, "places": places, "skipped": chunk.skipped}
        self.waiting.append(json.dumps(line).encode() + b"\n")
        progress.add(json.loads(self.waiting[-1]))
        self.unsafe += size
        if self.unsafe >= SAFE:
            self.commit()

    def commit(self) -> None:
        """Flush all written images to disk, and then the lines of the journal that record them."""
        for file, lines in ((self.file, []), (self.journal, self.waiting)):
            if file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        self.waiting, self.unsafe = [], 0

    def _open(self, path: Path, start: int) -> BinaryIO:
        """Return the file to write to next: the open one, or another one from `start` on."""
        if self.file is None or Path(self.file.name) != path:
            self.close_file()
            self.file = path.open("r+b" if path.exists() else "w+b")
            self.file.truncate(start)
            self.digest = hashlib.file_digest(self.file, "sha256")  # this reads to the end, where writing continues
        return self.file

    def close_file(self) -> None:
        """Finish the open file, if there is one."""
        if self.file:
            self.commit()
            self.digests[Path(self.file.name).name] = self.digest.hexdigest()
            self.file.close()
            self.file = None

    def _go_on(self, plan: Mapping[str, Any]) -> None:
        """Read the complete lines of the journal, or begin it."""
        try:
            lock(self.journal, self.out)
        except BlockingIOError:
            raise StorageError(f"another process is writing this set; {self.out}; wait for it") from None
        self.journal.seek(0)
        whole = 0  # bytes of complete lines
        for line in self.journal:
            if not line.endswith(b"\n"):
                break
            content = json.loads(line)
            if whole:
                self.parts[content["part"]].add(content)
            else:
                if content["format"] != FORMAT:
                    raise DataError(f"begun by another version; {self.out}; remove it, and prepare the set anew")
                refuse_other(self.out, content, plan)
            whole += len(line)
        self.journal.truncate(whole)
        if not whole:
            self.waiting.append(json.dumps(plan).encode() + b"\n")
            self.commit()
        for path, size in self.files():
            if size and (not path.is_file() or path.stat().st_size < size):
                raise DataError(f"a file of the unfinished set is missing or truncated; {path}; remove {self.out}")

    def files(self) -> Iterator[tuple[Path, int]]:
        """Yield the files of pixels, and the bytes of each."""
        for part, progress in self.parts.items():
            for number, size in enumerate(progress.ends):
                yield self.out / pixel_file(stem_of(part), number), size


def finish(writer: SetWriter, parts: Mapping[str, Source], plan: Mapping[str, Any]) -> None:
    """Write the indices, the list of skipped files and, last, the description that marks the set as finished.

    Raises:
        DataError: If no image of a part decodes.
    """
    out, rows = writer.out, ""
    writer.close_file()
    for part, progress in writer.parts.items():
        for index, reason in progress.skipped.items():
            name = parts[part].name(index)
            rows += rows_of({f"{part}/{name}" if part else name: reason})
    write_atomically(out / "skipped.tsv", rows)
    paths = [path for path, _ in writer.files()]
    for part, progress in writer.parts.items():
        if not progress.kept:
            raise DataError(f"none of {progress.listed} images decodes; {parts[part].address}; see {out}/skipped.tsv")
        path = out / index_file(stem_of(part))
        kept, places = (torch.tensor(numbers) for numbers in (progress.kept, progress.places))
        write_index(path, parts[part], kept, places.view(-1, 6))
        flush(path)
        paths.append(path)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": writer.digests.get(path.name) or sha256(path)}
        for path in paths
    }
    images = {part: len(progress.kept) for part, progress in writer.parts.items()}
    write_atomically(out / SET, json.dumps({**plan, "images": images, "files": files}, indent=1) + "\n")
    flush(out)


def sum_up(out: Path) -> dict[str, Any]:
    """Count the contents of the set, and check that its files have the recorded sizes."""
    content = read_set(out)
    images, listed = sum(content["images"].values()), sum(part["listed"] for part in content["parts"].values())
    size = sum(file["bytes"] for file in content["files"].values())
    return {"images": images, "skipped": listed - images, "bytes": size, "out": str(out)}


def closing_line(settings: PrepareSettings, summary: Mapping[str, Any]) -> str:
    """Describe what the set holds, and what to do with it."""
    out, channels = shlex.quote(str(settings.out)), settings.in_chans
    command = f"dmjd pretrain --data {out}{'' if channels == 3 else f' --model.in_chans {channels}'}"
    skipped = f"{summary['skipped']:,} skipped{f' (see {out}/skipped.tsv)' if summary['skipped'] else ''}"
    return f"{summary['images']:,} images, {summary['bytes'] / 1e6:,.1f} MB, {skipped}; go on with {command}"
