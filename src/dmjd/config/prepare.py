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
    """Images to prepare: anything that --data of the other verbs takes."""
    out: Annotated[Path, group("Run")]
    """Folder of the prepared set. An unfinished set is continued."""
    workers: Annotated[int | None, group("Run")] = None
    """Threads that decode images; 0 for none besides the one that writes. The set is the same for any number. Default:
    one per core, at most 16."""
    debug: Annotated[bool, group("Run")] = False
    """Show the traceback of an error."""
    size: Annotated[int, group("Images")] = 256
    """Shorter side of an image, in pixels; larger images are scaled down, smaller ones stay as they are."""
    in_chans: Annotated[int, group("Images")] = 3
    """Channels of an image. Grey and colour images are converted into each other; any other number must be that of the
    images."""
    data_pages: Annotated[Literal["bands", "frames"] | None, group("Images")] = None
    """What the pages of a TIFF are: bands of one image, or frames, each an image. Default: files have one page."""
    shard_mb: Annotated[int, group("Images")] = 1024
    """Approximate size of a file of pixels, in MiB."""

    def __post_init__(self) -> None:
        within(0, 512, self, "workers")
        within(1, LONGEST, self, "size")
        within(1, 10_000, self, "in_chans")
        within(1, 1_048_576, self, "shard_mb")
