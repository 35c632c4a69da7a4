"""The directory of a run: what is written there while it trains, and how a run is taken up again."""

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
RESULTS = ("summary.json", "result.json")  # there when a run has come to its end
# What may differ between a run and its resumption: none of it changes a loss on the same kind of device.
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
    """Writes config.yaml, metrics.jsonl and skipped.tsv of one run, on rank 0, and logs to what its settings name.

    Args:
        settings: As plain values, of which `out` is the directory and `batch_size` the images in a step; a resumed run
            must have the same.
        images: What is trained on.
        ranks: Who trains.
        held_out: How many images it is judged by.
        defaults: Of the settings by their flags: what a run of an earlier version had, which lacks a setting.

    Attributes:
        summary: What the run has found out beside its metrics; kept in the checkpoints.

    Raises:
        ConfigError: If something that it logs to is not installed.
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
        self.evaluated: set[int] = set()  # steps after which an evaluation was written down
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
        """Names of what the run logs to, beside metrics.jsonl."""
        return self.settings.get("log_to", ())

    @property
    def seconds(self) -> float:
        """Seconds of the run, evaluations included, over all processes that worked on it one after the other."""
        return self.earlier + time.perf_counter() - self.began

    def begin(self) -> None:
        """Start a run: its settings, and metrics and skipped files without a line.

        What a run that was ended before its first checkpoint has written down of its steps is kept aside.
        """
        self.make_directory()
        metrics = self.out / "metrics.jsonl"
        if self.ranks.is_main and any(values["step"] for _, values in read_lines(metrics)):
            metrics.replace(kept := metrics.with_name("metrics-before.jsonl"))
            print(f"no checkpoint to go on from; {self.out}; begins again, see {kept.name}", file=sys.stderr)
        self.write_settings()
        for name in ("metrics.jsonl", "skipped.tsv"):
            self.replace(name, "")

    def write_settings(self) -> None:
        """Write config.yaml, without what was asked of the process at hand alone."""
        settings = {key: value for key, value in self.settings.items() if key not in ONCE}
        self.replace("config.yaml", yaml.safe_dump(settings, sort_keys=False))

    def make_directory(self) -> None:
        """Make the directory, if there is none."""
        if self.ranks.is_main:
            self.out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log to what the settings name, too, until the context ends; inside another one, until that ends.

        Raises:
            ConfigError: If something does not start.
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
        """Open what the run logs to, where it goes on as the run that it was."""
        if self.log_to:
            name = self.summary.setdefault("logged_as", new_name(self.out))
            self.loggers = open_loggers(self.log_to, name, self.out, by_flag(self.settings), first=self.first)

    def tell(self, act: Callable[[Logger], None]) -> None:
        """Do something with all that the run logs to; what fails is left out from then on, and the run goes on."""
        loggers = self.loggers or {}
        for name, logger in [*loggers.items()]:
            try:
                act(logger)
            except Exception as error:  # a server is gone, a disk full: of libraries with errors of their own
                del loggers[name]
                said = one_line(error)
                print(f"warning: no longer logged to {name} ({said}); metrics.jsonl has all", file=sys.stderr)

    def show(self, pictures: Pictures, step: int) -> None:
        """Hand pictures to what the run logs to."""
        self.tell(lambda logger: logger.show(pictures, step))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run, for `restore`."""
        return {
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "summary": self.summary,
        }

    def restore(self, state: Mapping[str, Any], *, longer: bool = False) -> None:
        """Take the run up where a checkpoint's state left it; lines of later steps will be written again.

        Args:
            state: As `state` made it.
            longer: The run has more steps now; that may change without leave, and what the shorter one came to goes.

        Raises:
            CheckpointError: If it is a run of other settings or other images, and `allow_change` does not name them.
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
                f"the images of --data have changed since; {self.out}; start another run in another --out, or go on "
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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl, where what is not finite becomes null, and log its numbers."""
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
            DataError: If they are more of the set than the setting `max_bad` permits.
        """
        new = {path: reason for path, reason in sorted(skipped.items()) if path not in self.skipped}
        if not new:
            return
        self.skipped |= new
        if self.ranks.is_main:
            with (self.out / "skipped.tsv").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(rows_of(new))  # a kill may cut a line: what is resumed writes them all anew
        most, count = self.settings["max_bad"], self.count + self.held_out
        if len(self.skipped) > most * count:
            raise DataError(
                f"{len(self.skipped)} of {count} images do not decode, over {100 * most:g} %; {self.address}; "
                f"see {self.out / 'skipped.tsv'}, or raise --max_bad and add --resume"
            )

    def replace(self, name: str, text: str) -> None:
        """Write a file of the run in one go."""
        if self.ranks.is_main:
            checkpoint.write_atomically(self.out / name, text)


def rows_of(skipped: Mapping[str, str]) -> str:
    """Write names and reasons as lines of skipped.tsv."""
    return "".join(f"{one_cell(path)}\t{reason}\n" for path, reason in skipped.items())


def by_flag(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Do what `dmjd.config.load.by_flag` does, in a room that knows no settings."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
    return flat


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """Read what the lines of metrics.jsonl say, as `read_lines` does; none where there is no file."""
    return [values for _, values in read_lines(metrics)]


def read_lines(metrics: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the lines of metrics.jsonl and what they say, but those that a kill or a power cut has spoilt."""
    found = []
    for line in metrics.read_text("utf-8", errors="replace").splitlines(keepends=True) if metrics.exists() else ():
        with suppress(ValueError):
            values = json.loads(line)
            if line.endswith("\n") and isinstance(values, dict) and "step" in values:
                found.append((line, values))
    return found


def read_facts(path: Path) -> dict[str, Any]:
    """Read what a run came to, one of `RESULTS`; nothing where a power cut has lost or spoilt the file."""
    with suppress(FileNotFoundError, ValueError):
        return {**json.loads(path.read_text("utf-8"))}
    return {}


def one_cell(name: str) -> str:
    """Write a file's name so that it stays in its cell of a table: tabs and line breaks as in Python's strings."""
    return plain_cell(name.translate({ord(character): repr(character)[1:-1] for character in "\t\n\r"}))
