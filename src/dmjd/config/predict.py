"""Settings of `dmjd predict`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dmjd.config.common import BackboneSettings, ReadSettings, flat, group
from dmjd.config.rules import within
from dmjd.errors import ConfigError

ENDINGS = {"csv": ".csv", "json": ".jsonl"}  # of a classifier's predictions
UNWRITTEN = (".json", ".tsv", ".txt", ".parquet")  # endings that ask for a file, of a format that is not there


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(BackboneSettings):
    """The network that a verb lets predict."""

    backbone: str
    """File that finetune, linear, segment or detect has written: last.safetensors, best.safetensors,
    linear.safetensors."""


@dataclass(frozen=True, kw_only=True)
class PredictRun(ReadSettings):
    """What `dmjd predict` looks at, and where it computes."""

    data: Annotated[str, Parameter(required=True)] = ""
    """An image, or what the other verbs take: folder of images; list of them (FILE.csv, .tsv, .parquet, .txt);
    FILE.zip, FILE.tar or tar shards; FILE.npy; hf:NAME; a built-in set."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Settings of `dmjd predict`."""

    run: Annotated[PredictRun, flat("Run")]
    start: Annotated[TrainedSettings, flat("Backbone")]
    out: Annotated[Path, group("Run")]
    """Folder of what is predicted; for a classifier also the file, if the name ends in .csv or .jsonl. Images that do
    not decode are named in skipped.tsv beside it."""
    format: Annotated[Literal["csv", "json"] | None, group("Task")] = None
    """Of a classifier's predictions: predictions.csv, or predictions.jsonl with an object in every line. In the table,
    names that a spreadsheet would take for formulas have a ' before them. Default: as --out ends, else csv."""
    top: Annotated[int | None, group("Task")] = None
    """Likeliest classes to write, with their probabilities. Default: the likeliest one, and the probability of each
    class under its name, or under `probability of path` where that is a column already."""

    def __post_init__(self) -> None:
        within(1, 1_000_000, self, "top")
        ending = self.out.suffix
        if ending.lower() in UNWRITTEN:
            raise ConfigError(f"--out {self.out}: there are no {ending} files of predictions; take .csv or .jsonl")
        if self.format and ending.lower() in {*ENDINGS.values()} - {ENDINGS[self.format]}:
            todo = f"leave it out, or give a name that ends in {ENDINGS[self.format]}"
            raise ConfigError(f"--format {self.format} is not what the file ends in; --out {self.out}; {todo}")

    @property
    def table(self) -> Path:
        """File of a classifier's predictions."""
        named = self.out.suffix.lower() in ENDINGS.values()
        return self.out if named else self.out / f"predictions{ENDINGS[self.format or 'csv']}"
