"""Settings of `dmjd doctor`."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from dmjd.config.common import SEEDS, group
from dmjd.config.rules import within


@dataclass(frozen=True)
class DoctorSettings:
    """Settings of `dmjd doctor`."""

    data: Annotated[str, group("Run")]
    """What to examine: anything that --data of the other verbs takes, the directory of a run, a checkpoint, or a
    backbone.safetensors."""
    _: KW_ONLY
    out: Annotated[Path, group("Run")] = Path("doctor")
    """Folder for the findings about a set of images: report.html, summary.json, statistics.json, broken.tsv and
    duplicates.tsv."""
    max_images: Annotated[int, group("Run")] = 20_000
    """Most images to decode; of a larger set, a sample is decoded."""
    seed: Annotated[int, group("Run")] = 0
    """Seed of that sample."""
    workers: Annotated[int | None, group("Run")] = None
    """Threads that decode images. Default: one per core, at most 16."""
    debug: Annotated[bool, group("Run")] = False
    """Show the traceback of an error."""
    in_chans: Annotated[int | None, group("Images")] = None
    """Channels of an image. Default: what the headers of most files say, or 3 where there are no files."""
    data_pages: Annotated[Literal["bands", "frames"] | None, group("Images")] = None
    """What the pages of a TIFF are: bands of one image, or frames, each an image. Default: where most files have
    several, they are read as frames, and a warning asks for the choice."""

    def __post_init__(self) -> None:
        within(1, 1_000_000_000, self, "max_images")
        within(0, SEEDS, self, "seed")
        within(1, 512, self, "workers")
        within(1, 10_000, self, "in_chans")
