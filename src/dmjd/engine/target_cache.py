"""Targets cached on disk, for teachers whose targets are cheaper to read than to compute."""

import hashlib
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from dmjd.errors import StorageError
from dmjd.targets import Teacher

PAGE = 4096  # bytes; a larger target takes whole pages, smaller ones share them
DIGEST = 8  # bytes of the hash in front of a target


class TargetCache:
    """The targets of a frozen teacher in a file, in float16, by the content of the crop.

    The file is an SQLite database: a run may be killed at any moment, several runs may share it, and targets are found
    in any order. Keys are hashes of the pixels, so that on a GPU the images of each batch are copied to the host once a
    step, and of the precision at that moment, which changes targets slightly. Each target is stored behind a hash of
    it; one that has changed on disk is computed again.

    Args:
        teacher: Teacher whose targets are cached; its `cache` is to be set to this.
        folder: Folder of the file, which is named after the teacher's fingerprint.

    Raises:
        StorageError: If the file is not a database.
    """

    def __init__(self, teacher: Teacher, folder: Path):
        self.dim, self.num_tokens = teacher.dim, math.prod(teacher.grid)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{teacher.fingerprint()[:16]}.sqlite"
        try:
            self.database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.execute("CREATE TABLE IF NOT EXISTS targets (crop BLOB PRIMARY KEY, target BLOB)")
        except sqlite3.Error as error:
            raise StorageError(f"no usable cache of targets ({error}); {self.path}; remove it") from None

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def bytes_for(self, num_crops: int) -> int:
        """Estimate the size of the file for this many crops."""
        size = DIGEST + self.num_tokens * self.dim * 2
        return num_crops * (64 + (PAGE * math.ceil(size / (PAGE - 4)) if size > PAGE else int(1.2 * size)))

    def reserve(self, num_crops: int) -> str:
        """Describe how large the file will become.

        Raises:
            StorageError: If the disk does not have the space.
        """
        wanted, there = self.bytes_for(num_crops), self.path.stat().st_size
        free = shutil.disk_usage(self.path).free
        if wanted - there > free:
            have = f"the cache of targets needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise StorageError(f"{have}; {self.path.parent}; choose another --teacher.cache or fewer --crop.variants")
        return (
            f"targets of {num_crops} crops are kept in {self.path}: {wanted / 1e9:.2f} GB, {there / 1e9:.2f} GB there"
        )

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, images: Num[Tensor, "B C H W"], compute: Callable[[Tensor], Tensor]) -> Float[Tensor, "B L T"]:
        """Read the targets of images of 0..255; missing ones are computed by `compute` and stored.

        Raises:
            StorageError: If targets cannot be written, or the database is broken.
        """
        kind = b"bf16" if torch.is_autocast_enabled(images.device.type) else b"fp32"
        keys = [
            hashlib.blake2b(image.tobytes(), digest_size=16, person=kind).digest() for image in images.cpu().numpy()
        ]
        marks = ",".join("?" * len(keys))
        try:
            rows = self.database.execute(f"SELECT crop, target FROM targets WHERE crop IN ({marks})", keys).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"no usable cache of targets ({error}); {self.path}; remove it") from None
        found = {key: row[DIGEST:] for key, row in rows if isinstance(row, bytes) and row == signed(key, row[DIGEST:])}
        missing = [place for place, key in enumerate(keys) if key not in found]
        if missing:
            targets = compute(images[missing]).half().cpu().numpy()
            computed = {keys[place]: target.tobytes() for place, target in zip(missing, targets, strict=True)}
            rows = [(key, signed(key, target)) for key, target in computed.items()]
            try:
                self.database.execute("BEGIN")
                self.database.executemany("INSERT OR REPLACE INTO targets VALUES (?, ?)", rows)
                self.database.execute("COMMIT")
            except sqlite3.Error as error:
                raise StorageError(f"targets cannot be kept ({error}); {self.path}; free some space") from None
            found |= computed
        tokens = torch.frombuffer(bytearray(b"".join(found[key] for key in keys)), dtype=torch.float16)
        return tokens.view(len(keys), self.num_tokens, self.dim).to(images.device, torch.float32)


def signed(key: bytes, target: bytes) -> bytes:
    """Prepend a hash of a target and of the crop that it belongs to."""
    return hashlib.blake2b(key + target, digest_size=DIGEST).digest() + target


@contextmanager
def cache_targets(model: nn.Module, folder: Path) -> Iterator[list[TargetCache]]:
    """Give every frozen teacher of a model a cache in a folder, open within the context, and yield the caches.

    Raises:
        StorageError: If a file there is not a database.
    """
    with ExitStack() as stack:
        caches = []
        for module in model.modules():
            if isinstance(module, Teacher):
                module.cache = stack.enter_context(closing(TargetCache(module, folder)))
                caches.append(module.cache)
        yield caches
