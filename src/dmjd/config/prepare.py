"""Settings of `dmjd prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dmjd.config.common import group
from dmjd.config.rules import LONGEST, within


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Settings of `dmjd prepare`."""

    data: Annotated[str, group("Run")]
    """What to prepare: whatever --data of the other verbs takes."""
    out: Annotated[Path, group("Run")]
    """Folder of the set. A set that is not finished goes on from where it was."""
    workers: Annotated[int | None, group("Run")] = None
    """Threads that decode, or 0 for none beside the one that writes; the set is the same for any number. Default: one
    per core, at most 16."""
    debug: Annotated[bool, group("Run")] = False
    """Show the traceback of an error."""
    size: Annotated[int, group("Images")] = 256
    """Short side of an image, in pixels; larger images become smaller, smaller ones stay as they are."""
    in_chans: Annotated[int, group("Images")] = 3
    """Channels of an image. Grey and colour become each other; images of any other number must have it."""
    data_pages: Annotated[Literal["bands", "frames"] | None, group("Images")] = None
    """What the pages of a TIFF are: bands of one image, or frames, each an image. Default: files have one page."""
    shard_mb: Annotated[int, group("Images")] = 1024
    """About how large a file of pixels becomes, in MiB."""

    def __post_init__(self) -> None:
        within(0, 512, self, "workers")
        within(1, LONGEST, self, "size")
        within(1, 10_000, self, "in_chans")
        within(1, 1_048_576, self, "shard_mb")
