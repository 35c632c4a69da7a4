"""Settings of `dmjd search`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from dmjd.config.common import ReadSettings, flat, group
from dmjd.config.rules import within
from dmjd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SearchRun(ReadSettings):
    """Where `dmjd search` finds the pictures, and where it computes."""

    data: str = ""
    """Where the images are that the features are of, for the pictures. Default: the --data that embed had."""
    data_range: tuple[float, float] | None = None
    """Lowest and highest value of images deeper than 8 bits. Default: what embed took."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of `dmjd search`."""

    run: Annotated[SearchRun, flat("Run")] = field(default_factory=SearchRun)
    backbone: Annotated[str | None, group("Backbone")] = None
    """What made the features: a backbone.safetensors or timm:NAME. Default: the --backbone that embed had."""
    features: Annotated[Path, group("Run")]
    """F.npy of dmjd embed, with F.csv beside it."""
    out: Annotated[Path, group("Run")]
    """Folder of neighbours.csv or duplicates.csv, and of search.html, which shows the pictures."""
    query: Annotated[str | None, group("Task")] = None
    """An image, a folder of images or whatever --data takes: find what is nearest to each."""
    k: Annotated[int, group("Task")] = 10
    """Nearest images of each query. Every image is looked at: a million take seconds."""
    duplicates: Annotated[bool, group("Task")] = False
    """Find pairs inside the set that are almost the same, instead of the neighbours of queries. All images are
    compared with all others: 20,000 take seconds, 100,000 minutes, a million hours without a GPU."""
    threshold: Annotated[float, group("Task")] = 0.95
    """Cosine similarity from which two images count as almost the same."""

    def __post_init__(self) -> None:
        within(1, 10_000, self, "k")
        within(-1, 1, self, "threshold")
        if self.duplicates == (self.query is not None):
            raise ConfigError("one thing at a time; give --query or --duplicates")
