"""The directory of a run: what is written there while it trains, and how a run is taken up again."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmjd.data.source import Readable, fingerprint
from dmjd.engine import checkpoint
from dmjd.engine.distributed import Ranks
from dmjd.errors import CheckpointError, ConfigError, DataError

MAX_BAD = 0.01  # share of a set's files that may fail to decode before the run stops
# What may differ between a run and its resumption: none of it changes a loss on the same kind of device.
MAY_CHANGE = frozenset(
    ["out", "resume", "preset", "config", "data", "workers", "device", "parallel", "compile", "debug", "monitor", "log"]
)


class Run:
    """Writes config.yaml, metrics.jsonl and skipped.tsv of one run, on rank 0.

    Args:
        out: The directory.
        settings: As plain values; a resumed run must have the same.
        images: What is trained on.
        batch_size: Images in a step.
        ranks: Who trains.

    Attributes:
        summary: What the run has found out beside its metrics; kept in the checkpoints.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], images: Readable, *, batch_size: int, ranks: Ranks):
        self.out, self.settings, self.batch_size, self.ranks = out, settings, batch_size, ranks
        self.address, self.count = images.address, len(images)
        self.fingerprint = fingerprint(images)
        self.skipped: dict[str, str] = {}
        self.summary: dict[str, Any] = {}
        self.evaluated: set[int] = set()  # steps after which an evaluation was written down
        self.earlier, self.began = 0.0, time.perf_counter()
        self.board: Any = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @property
    def seconds(self) -> float:
        """Seconds of the run, evaluations included, over all processes that worked on it one after the other."""
        return self.earlier + time.perf_counter() - self.began

    def begin(self, config: str) -> None:
        """Start a run: settings as YAML, and metrics and skipped files without a line."""
        self.open()
        for name, text in (("config.yaml", config), ("metrics.jsonl", ""), ("skipped.tsv", "")):
            self.replace(name, text)

    def open(self) -> None:
        """Make the directory and open the log of TensorBoard."""
        if self.ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.board = tensorboard(self.out)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run, for `restore`."""
        return {
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "summary": self.summary,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the run up where a checkpoint's state left it; lines of later steps will be written again.

        Raises:
            CheckpointError: If it is a run of other settings or other images.
        """
        self.open()
        saved = state["settings"]
        keys = {*saved, *self.settings} - MAY_CHANGE
        changed = sorted(key for key in keys if saved.get(key) != self.settings.get(key))
        if changed:
            raise CheckpointError(f"the run has other {', '.join(changed)}; {self.out}; resume it without these flags")
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the images of --data have changed since; {self.out}; start another run in another --out"
            )
        self.earlier, self.skipped, self.summary = state["seconds"], state["skipped"], state["summary"]
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        read = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = [(line, values) for line, values in read if values["step"] <= state["step"]]
        self.evaluated = {values["step"] for _, values in kept if "loss" not in values}
        self.ranks.on_main(lambda: self.replace("metrics.jsonl", "".join(line for line, _ in kept)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, and its numbers to TensorBoard; what is not finite becomes null."""
        images = step * self.batch_size
        counters = {"step": step, "epoch": images / self.count, "images": images, "seconds": round(self.seconds, 3)}
        if "loss" not in values:
            self.evaluated.add(step)
        if not self.ranks.is_main:
            return
        line = {key: value if math.isfinite(value) else None for key, value in {**counters, **values}.items()}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for key in (key for key, value in line.items() if key != "step" and value is not None):
                self.board.add_scalar(key, line[key], step)

    def skip(self, skipped: Mapping[str, str]) -> None:
        """Record files that did not decode, by name and reason.

        Raises:
            DataError: If they are more than 1 % of the set.
        """
        if skipped.keys() <= self.skipped.keys():
            return
        self.skipped |= skipped
        rows = "".join(f"{one_cell(path)}\t{reason}\n" for path, reason in sorted(self.skipped.items()))
        self.replace("skipped.tsv", rows)
        if len(self.skipped) > MAX_BAD * self.count:
            raise DataError(
                f"{len(self.skipped)} of {self.count} images do not decode, more than {MAX_BAD:.0%}; {self.address}; "
                f"see {self.out / 'skipped.tsv'}"
            )

    def replace(self, name: str, text: str) -> None:
        """Write a file of the run in one go."""
        if self.ranks.is_main:
            checkpoint.write_atomically(self.out / name, text)


def refuse_second_run(out: Path, *, resume: bool, ranks: Ranks) -> None:
    """Keep a run from being overwritten.

    Raises:
        ConfigError: If `out` holds a run and it was not said to resume it.
    """
    if ranks.on_main((out / "config.yaml").exists) and not resume:
        raise ConfigError(f"there is a run already; {out}; add --resume to go on with it or choose another --out")


def one_cell(name: str) -> str:
    """Write a file's name so that it stays in its cell of a table: tabs and line breaks as in Python's strings."""
    return name.translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"})


def tensorboard(out: Path) -> Any:
    """Open a TensorBoard log, if TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
