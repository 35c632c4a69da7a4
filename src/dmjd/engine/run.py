"""The directory of a run: what is written there during training, and how a run is resumed."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dmjd.data.cells import plain_cell
from dmjd.data.source import Readable, fingerprint
from dmjd.engine import checkpoint
from dmjd.engine.distributed import Ranks
from dmjd.engine.loggers import Logger, Pictures, new_name, open_loggers, require
from dmjd.errors import CheckpointError, DataError, one_line

ONCE = {"allow_change", "resume", "debug"}  # settings of a process, not of the run
RESULTS = ("summary.json", "result.json")  # exist once a run has finished
# Settings that may differ when a run is resumed: none changes a loss on the same kind of device.
MAY_CHANGE = {
    *(
        "out",
        "resume",
        "allow_change",
        "checkpoint_minutes",
        "max_bad",
        "preset",
        "config",
        "data",
        "monitor",
        "log",
        "log_to",
        "debug",
    ),
    *("workers", "device", "parallel", "compile", "activation_checkpointing"),
}


class Run:
    """Writes config.yaml, metrics.jsonl and skipped.tsv of one run, on rank 0, and logs to the loggers in its settings.

    Args:
        settings: Plain values, with the directory as `out` and the images per step as `batch_size`; a resumed run must
            have the same.
        images: Training images.
        ranks: Ranks that train.
        held_out: Number of held-out images.
        defaults: Defaults of the settings by their flags, for settings that a run of an earlier version lacks.

    Attributes:
        summary: Results of the run besides its metrics; kept in the checkpoints.

    Raises:
        ConfigError: If one of its loggers is not installed.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        images: Readable,
        *,
        ranks: Ranks,
        held_out: int,
        defaults: Mapping[str, Any],
    ):
        self.settings, self.ranks, self.held_out, self.defaults = settings, ranks, held_out, defaults
        self.out = Path(settings["out"])
        self.address, self.count = images.address, len(images)
        self.fingerprint = fingerprint(images)
        self.skipped: dict[str, str] = {}
        self.summary: dict[str, Any] = {}
        self.evaluated: set[int] = set()  # steps whose evaluation was recorded
        self.earlier, self.began = 0.0, time.perf_counter()
        self.loggers: dict[str, Logger] | None = None  # None outside of `logging`
        self.first = 0  # step from which this process writes
        require(self.log_to)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @property
    def log_to(self) -> Sequence[str]:
        """Names of the run's loggers, in addition to metrics.jsonl."""
        return self.settings.get("log_to", ())

    @property
    def seconds(self) -> float:
        """Seconds of the run, including evaluations, summed over all processes that have resumed it."""
        return self.earlier + time.perf_counter() - self.began

    def begin(self) -> None:
        """Start a run: write its settings, and empty files of metrics and skipped images.

        Metrics of a run that ended before its first checkpoint are kept in another file.
        """
        self.make_directory()
        metrics = self.out / "metrics.jsonl"
        if self.ranks.is_main and any(values["step"] for _, values in read_lines(metrics)):
            metrics.replace(kept := metrics.with_name("metrics-before.jsonl"))
            print(f"no checkpoint to resume from; {self.out}; the run starts over, see {kept.name}", file=sys.stderr)
        self.write_settings()
        for name in ("metrics.jsonl", "skipped.tsv"):
            self.replace(name, "")

    def write_settings(self) -> None:
        """Write config.yaml, without settings that concern this process only."""
        settings = {key: value for key, value in self.settings.items() if key not in ONCE}
        self.replace("config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def make_directory(self) -> None:
        """Create the directory if it does not exist."""
        if self.ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Keep the loggers open until the context ends; a nested context leaves them open.

        Raises:
            ConfigError: If a logger does not start.
        """
        if self.loggers is not None:
            yield
            return
        self.loggers = {}
        try:
            self.ranks.on_main(self.open_loggers)
            yield
        finally:
            self.tell(lambda logger: logger.finish())
            self.loggers = None

    def open_loggers(self) -> None:
        """Open the loggers, where a resumed run continues under its old name."""
        if self.log_to:
            name = self.summary.setdefault("logged_as", new_name(self.out))
            self.loggers = open_loggers(self.log_to, name, self.out, by_flag(self.settings), first=self.first)

    def tell(self, act: Callable[[Logger], None]) -> None:
        """Call `act` with every logger; one that fails is dropped, and the run goes on."""
        loggers = self.loggers or {}
        for name, logger in [*loggers.items()]:
            try:
                act(logger)
            except Exception as error:  # a server is gone, a disk is full: each library raises errors of its own
                del loggers[name]
                said = one_line(error)
                print(f"warning: no longer logged to {name} ({said}); metrics.jsonl has all", file=sys.stderr)

    def show(self, pictures: Pictures, step: int) -> None:
        """Log pictures."""
        self.tell(lambda logger: logger.show(pictures, step))

    def state(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint, as `restore` takes it."""
        return {
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "summary": self.summary,
        }

    def restore(self, state: Mapping[str, Any], *, longer: bool = False) -> None:
        """Resume the run from a checkpoint's state; lines of later steps are dropped, and will be written again.

        Args:
            state: As returned by `state`.
            longer: Whether the run has more steps now, which is always allowed; results of the shorter run are removed.

        Raises:
            CheckpointError: If settings or images have changed, and `allow_change` does not name them.
        """
        self.make_directory()
        allowed = {*self.settings.get("allow_change", ())}
        before, now = {**self.defaults, **by_flag(state["settings"])}, by_flag(self.settings)
        changed = {
            key: f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key.partition(".")[0] not in MAY_CHANGE
        }
        refused = [
            said for key, said in changed.items() if key not in allowed | ({"epochs", "steps"} if longer else set())
        ]
        if refused:
            todo = "resume it without them, or name each with --allow_change"
            if any(said.startswith("minutes ") for said in refused):
                todo = "minutes became epochs when the run began: give --epochs to go on for longer"
            raise CheckpointError(f"the run has other settings: {', '.join(refused)}; {self.out}; {todo}")
        if state["fingerprint"] != self.fingerprint and "data" not in allowed:
            raise CheckpointError(
                f"the images of --data have changed since; {self.out}; start another run in another --out, or resume "
                "with --allow_change data"
            )
        if changed and self.ranks.is_main:
            print(f"changed: {', '.join(changed.values())}", file=sys.stderr)
            self.write_settings()
        if longer and self.ranks.is_main:
            for name in RESULTS:
                (self.out / name).unlink(missing_ok=True)
        self.earlier, self.began, self.first = state["seconds"], time.perf_counter(), state["step"] + 1
        self.skipped, self.summary = dict(state["skipped"]), dict(state["summary"])
        kept = [
            (line, values) for line, values in read_lines(self.out / "metrics.jsonl") if values["step"] <= state["step"]
        ]
        self.evaluated = {values["step"] for _, values in kept if "loss" not in values}
        self.ranks.on_main(lambda: self.replace("metrics.jsonl", "".join(line for line, _ in kept)))
        self.ranks.on_main(lambda: self.replace("skipped.tsv", rows_of(self.skipped)))
        if self.loggers is not None:  # after a rollback: what they show of later steps is void
            self.tell(lambda logger: logger.finish())
            self.ranks.on_main(self.open_loggers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, with null for numbers that are not finite, and log its numbers."""
        images = step * self.settings["batch_size"]
        counters = {"step": step, "epoch": images / self.count, "images": images, "seconds": round(self.seconds, 3)}
        if "loss" not in values:
            self.evaluated.add(step)
        if not self.ranks.is_main:
            return
        line = {key: value if math.isfinite(value) else None for key, value in {**counters, **values}.items()}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        self.tell(lambda logger: logger.log(numbers, step))

    def skip(self, skipped: Mapping[str, str]) -> None:
        """Record files that did not decode, by name and reason.

        Raises:
            DataError: If their share of the set exceeds the setting `max_bad`.
        """
        new = {path: reason for path, reason in sorted(skipped.items()) if path not in self.skipped}
        if not new:
            return
        self.skipped |= new
        if self.ranks.is_main:
            with (self.out / "skipped.tsv").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(rows_of(new))  # a kill may truncate a line; a resumed run rewrites them all
        most, count = self.settings["max_bad"], self.count + self.held_out
        if len(self.skipped) > most * count:
            raise DataError(
                f"{len(self.skipped)} of {count} images do not decode, over {100 * most:g} %; {self.address}; "
                f"see {self.out / 'skipped.tsv'}, or raise --max_bad and add --resume"
            )

    def replace(self, name: str, text: str) -> None:
        """Write a file of the run atomically."""
        if self.ranks.is_main:
            checkpoint.write_atomically(self.out / name, text)


def rows_of(skipped: Mapping[str, str]) -> str:
    """Write names and reasons as lines of skipped.tsv."""
    return "".join(f"{one_cell(path)}\t{reason}\n" for path, reason in skipped.items())


def by_flag(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `dmjd.config.load.by_flag` does, in a package that must not import the settings."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """Read the values in metrics.jsonl, as `read_lines` does; empty if there is no file."""
    return [values for _, values in read_lines(metrics)]


def read_lines(metrics: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the lines of metrics.jsonl and their values, except lines damaged by a kill or a power failure."""
    found = []
    for line in metrics.read_text("utf-8", errors="replace").splitlines(keepends=True) if metrics.exists() else ():
        with suppress(ValueError):
            values = json.loads(line)
            if line.endswith("\n") and isinstance(values, dict) and "step" in values:
                found.append((line, values))
    return found


def read_facts(path: Path) -> dict[str, Any]:
    """Read the results of a run, one of `RESULTS`; empty if a power failure has lost or damaged the file."""
    with suppress(FileNotFoundError, ValueError):
        return {**json.loads(path.read_text("utf-8"))}
    return {}


def one_cell(name: str) -> str:
    """Escape a file's name for a cell of a table: tabs and line breaks as in Python's strings."""
    return plain_cell(name.translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"}))
