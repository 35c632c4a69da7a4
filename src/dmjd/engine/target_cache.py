"""Targets kept on disk, for teachers that cost more to run than to read."""

import hashlib
import math
import shutil
import sqlite3
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dmjd.errors import StorageError
from dmjd.targets import Teacher

PAGE = 4096  # bytes; a larger target takes whole pages, smaller ones share them


class CachedTarget(nn.Module):
    """A frozen teacher whose targets are kept in a file, in float16 and by the content of the crop.

    The file is an SQLite database: a run may be killed at any moment, several runs may share it, and a crop's target is
    found whatever the order. Keys are hashes of the pixels, so on a GPU the images of a batch come back once a step.

    Args:
        teacher: What is kept.
        folder: Where; the file's name is made of the teacher's weights and settings.
        precision: Of the run, which the targets depend on a little.

    Raises:
        StorageError: If the file is no database.
    """

    def __init__(self, teacher: Teacher, folder: Path, *, precision: str):
        super().__init__()
        self.teacher, self.dim, self.num_tokens = teacher, teacher.dim, teacher.grid[0] * teacher.grid[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{identity(teacher, precision)[:16]}.sqlite"
        try:
            self.database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.execute("CREATE TABLE IF NOT EXISTS targets (crop BLOB PRIMARY KEY, target BLOB)")
        except sqlite3.Error as error:
            raise StorageError(f"no usable cache of targets ({error}); {self.path}; remove it") from None

    def bytes_for(self, num_crops: int) -> int:
        """Estimate the size of the file when it holds so many crops."""
        size = self.num_tokens * self.dim * 2
        return num_crops * (64 + (PAGE * math.ceil(size / (PAGE - 4)) if size > PAGE else int(1.2 * size)))

    def reserve(self, num_crops: int) -> str:
        """Say how large the file will become.

        Raises:
            StorageError: If the disk has not that much space left.
        """
        wanted, there = self.bytes_for(num_crops), self.path.stat().st_size
        free = shutil.disk_usage(self.path).free
        if wanted - there > free:
            have = f"the cache of targets needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise StorageError(f"{have}; {self.path.parent}; choose another --teacher.cache or fewer --crop.variants")
        return (
            f"targets of {num_crops} crops are kept in {self.path}: {wanted / 1e9:.2f} GB, {there / 1e9:.2f} GB there"
        )

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B L T"]:
        """Read the targets of images of 0..255, and compute those that are not there yet.

        Raises:
            StorageError: If they cannot be written.
        """
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.cpu().numpy()]
        marks = ",".join("?" * len(keys))
        found = dict(self.database.execute(f"SELECT crop, target FROM targets WHERE crop IN ({marks})", keys))
        missing = [place for place, key in enumerate(keys) if key not in found]
        if missing:
            targets = self.teacher(images[missing]).half().cpu().numpy()
            rows = [(keys[place], target.tobytes()) for place, target in zip(missing, targets, strict=True)]
            try:
                self.database.execute("BEGIN")
                self.database.executemany("INSERT OR IGNORE INTO targets VALUES (?, ?)", rows)
                self.database.execute("COMMIT")
            except sqlite3.Error as error:
                raise StorageError(f"targets cannot be kept ({error}); {self.path}; free some space") from None
            found |= dict(rows)
        tokens = torch.frombuffer(bytearray(b"".join(found[key] for key in keys)), dtype=torch.float16)
        return tokens.view(len(keys), self.num_tokens, self.dim).to(images.device, torch.float32)


def identity(teacher: Teacher, precision: str) -> str:
    """Hash what a teacher's targets depend on, beside the images."""
    maps = teacher._maps[0]
    digest = hashlib.sha256(repr((teacher.grid, maps.layers, maps.size, maps.bf16, precision)).encode())
    for value in (maps.mean, maps.std, *maps.network.state_dict().values()):
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def keep_targets(model: nn.Module, folder: Path, *, precision: str) -> list[CachedTarget]:
    """Put a cache before every frozen teacher of a model, and return the caches."""
    caches = []
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is Teacher:
                caches.append(CachedTarget(child, folder, precision=precision))
                setattr(parent, name, caches[-1])
    return caches
