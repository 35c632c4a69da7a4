"""Settings of `dmjd predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dmjd.config.common import BackboneSettings, ReadSettings, flat, group
from dmjd.config.rules import within
from dmjd.errors import ConfigError

ENDINGS = {"csv": ".csv", "json": ".jsonl"}  # file extensions of a classifier's predictions
UNWRITTEN = (".json", ".tsv", ".txt", ".parquet")  # extensions that ask for a file in a format that is not supported


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(BackboneSettings):
    """The network that a verb predicts with."""

    backbone: str
    """File written by finetune, linear, segment or detect: last.safetensors, best.safetensors, linear.safetensors."""


@dataclass(frozen=True, kw_only=True)
class PredictRun(ReadSettings):
    """What `dmjd predict` reads, and where it computes."""

    data: Annotated[str, Parameter(required=True)] = ""
    """An image, or what the other verbs take: a folder of images; a list of them (FILE.csv, .tsv, .parquet, .txt);
    FILE.zip, FILE.tar or tar shards; FILE.npy; hf:NAME; a built-in set."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Settings of `dmjd predict`."""

    run: Annotated[PredictRun, flat("Run")]
    start: Annotated[TrainedSettings, flat("Backbone")]
    out: Annotated[Path, group("Run")]
    """Folder for the predictions; for a classifier, the file itself if the name ends in .csv or .jsonl. Images that do
    not decode are listed in skipped.tsv beside them."""
    format: Annotated[Literal["csv", "json"] | None, group("Task")] = None
    """Format of a classifier's predictions: predictions.csv, or predictions.jsonl with one object per line. In the CSV,
    names that a spreadsheet would take for formulas are prefixed with a quote ('). Default: by the extension of
    --out, else csv."""
    top: Annotated[int | None, group("Task")] = None
    """Write this many of the most probable classes, with their probabilities. Default: the most probable class, and the
    probability of each class in a column of its name, or `probability of path` where a column has that name already."""

    def __post_init__(self) -> None:
        within(1, 1_000_000, self, "top")
        ending = self.out.suffix
        if ending.lower() in UNWRITTEN:
            raise ConfigError(f"--out {self.out}: there are no {ending} files of predictions; take .csv or .jsonl")
        if self.format and ending.lower() in {*ENDINGS.values()} - {ENDINGS[self.format]}:
            todo = f"leave it out, or give a name that ends in {ENDINGS[self.format]}"
            raise ConfigError(f"--format {self.format} does not match the file extension; --out {self.out}; {todo}")

    @property
    def table(self) -> Path:
        """File of a classifier's predictions."""
        named = self.out.suffix.lower() in ENDINGS.values()
        return self.out if named else self.out / f"predictions{ENDINGS[self.format or 'csv']}"
