"""Settings of `dmjd search`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from dmjd.config.common import ReadSettings, flat, group
from dmjd.config.rules import within
from dmjd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SearchRun(ReadSettings):
    """Where `dmjd search` finds the images, and where it computes."""

    data: str = ""
    """The images that the features belong to, for the page. Default: the --data given to embed."""
    data_range: tuple[float, float] | None = None
    """Lowest and highest value of images deeper than 8 bits. Default: the range that embed used."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of `dmjd search`."""

    run: Annotated[SearchRun, flat("Run")] = field(default_factory=SearchRun)
    backbone: Annotated[str | None, group("Backbone")] = None
    """The backbone that computed the features: a backbone.safetensors or timm:NAME. Default: the --backbone given to
    embed."""
    features: Annotated[Path, group("Run")]
    """F.npy written by dmjd embed, with F.csv beside it."""
    out: Annotated[Path, group("Run")]
    """Folder for neighbours.csv or duplicates.csv, and for search.html, which shows the images."""
    query: Annotated[str | None, group("Task")] = None
    """An image, a folder of images, or anything else that --data takes: find the nearest neighbours of each image."""
    k: Annotated[int, group("Task")] = 10
    """Nearest images of each query. The search is exact; a million images take seconds."""
    duplicates: Annotated[bool, group("Task")] = False
    """Find pairs of near-duplicates in the set, instead of the neighbours of queries. All images are compared with all
    others: 20,000 take seconds, 100,000 minutes, a million hours without a GPU."""
    threshold: Annotated[float, group("Task")] = 0.95
    """Cosine similarity from which two images count as near-duplicates."""

    def __post_init__(self) -> None:
        within(1, 10_000, self, "k")
        within(-1, 1, self, "threshold")
        if self.duplicates == (self.query is not None):
            raise ConfigError("one thing at a time; give --query or --duplicates")
