"""The directory of a run: what is written there while it trains, and how a run is taken up again."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dmjd.data.loader import Readable
from dmjd.engine import checkpoint
from dmjd.engine.loop import Step
from dmjd.engine.signals import stop_signals
from dmjd.errors import CheckpointError, ConfigError, DataError, NonFiniteError

MAX_BAD = 0.01  # share of a set's files that may fail to decode before the run stops


def refuse_second_run(out: Path, *, resume: bool) -> None:
    """Keep a run from being overwritten.

    Raises:
        ConfigError: If `out` holds a run that shall not be resumed.
    """
    if (out / "config.yaml").exists() and not resume:
        raise ConfigError(f"there is a run already; {out}; add --resume to go on with it or choose another --out")


class Record:
    """Writes config.yaml, metrics.jsonl, skipped.tsv and checkpoints of one run.

    Attributes:
        summary: What the run has found out beside its metrics; kept in the checkpoints.
    """

    def __init__(self, out: Path, settings: dict[str, Any], images: Readable, *, batch_size: int):
        self.out, self.settings, self.batch_size = out, settings, batch_size
        self.root, self.count = images.root, len(images)
        names = "\n".join(images.names).encode(errors="surrogateescape")  # file names need not be Unicode
        self.fingerprint = hashlib.sha256(names).hexdigest()
        self.skipped: dict[str, str] = {}
        self.summary: dict[str, Any] = {}
        self.earlier, self.began = 0.0, time.perf_counter()
        self.logged: tuple[int, float] | None = None  # step and time of the last line
        out.mkdir(parents=True, exist_ok=True)
        self.board = tensorboard(out)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @property
    def seconds(self) -> float:
        """Seconds of the run, evaluations included, over all processes that worked on it."""
        return self.earlier + time.perf_counter() - self.began

    def begin(self, config: str) -> None:
        """Start a run: settings, and metrics and skipped files without a line."""
        for name, text in (("config.yaml", config), ("metrics.jsonl", ""), ("skipped.tsv", "")):
            checkpoint.write_atomically(self.out / name, text)

    def resume(self, path: Path, *, model: nn.Module, optimizer: Optimizer, may_change: set[str]) -> int:
        """Take the run up where a checkpoint left it and return the steps done; later lines will be written again.

        Raises:
            CheckpointError: If it is a run of other settings or other images.
        """
        state = checkpoint.read_state(path)
        saved, now = state["settings"], self.settings
        changed = sorted(key for key in {*saved, *now} - may_change if saved.get(key) != now.get(key))
        if changed:
            raise CheckpointError(f"the run has other {', '.join(changed)}; {self.out}; resume it without these flags")
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the images of --data have changed since; {self.out}; start another run in another --out"
            )
        checkpoint.load(path, model=model, optimizer=optimizer)
        self.earlier, self.skipped, self.summary = state["seconds"], state["skipped"], state["summary"]
        metrics = self.out / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        checkpoint.write_atomically(metrics, "".join(kept))
        return int(state["step"])

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and its numbers to TensorBoard; what is no number becomes null."""
        line = {key: value if math.isfinite(value) else None for key, value in line.items()}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for key in (key for key, value in line.items() if key != "step" and value is not None):
                self.board.add_scalar(key, line[key], line["step"])

    def evaluate(self, step: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Measure what the network is worth after a step, and write it down."""
        measured = measure()
        images = step * self.batch_size
        counters = {"step": step, "epoch": images / self.count, "images": images, "seconds": round(self.seconds, 3)}
        self.write(counters | measured)
        return measured

    def log(self, step: Step, gauge: Callable[[float], dict[str, float]]) -> dict[str, Any]:
        """Write a step down; here the loop waits for the device.

        Args:
            step: What was done.
            gauge: Adds to the line what it has seen in the seconds since the last one.

        Raises:
            NonFiniteError: If loss or gradient are no numbers.
        """
        images = step.number * self.batch_size
        line = {
            "step": step.number,
            "epoch": images / self.count,
            "images": images,
            "seconds": round(self.seconds, 3),
            **{name: float(value) for name, value in step.losses.items()},
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),
            "data_seconds": round(step.data_seconds, 3),
        }
        now, since = time.perf_counter(), self.logged or (step.start, step.began)
        line["images_per_second"] = round((step.number - since[0]) * self.batch_size / (now - since[1]), 2)
        line |= gauge(now - since[1])
        self.logged = (step.number, now)
        self.write(line)
        if not (step.losses["loss"].isfinite() and step.grad_norm.isfinite()):
            raise NonFiniteError(
                f"the loss is {line['loss']} and the gradient's norm {line['grad_norm']} at step {step.number}; "
                f"{self.out}; checkpoints before are finite: start another run with a lower --optim.blr"
            )
        return line

    def skip(self, skipped: dict[str, str]) -> None:
        """Record files that did not decode.

        Raises:
            DataError: If they are more than 1 % of the set.
        """
        if skipped.keys() <= self.skipped.keys():
            return
        self.skipped |= skipped
        rows = "".join(f"{one_cell(path)}\t{reason}\n" for path, reason in sorted(self.skipped.items()))
        checkpoint.write_atomically(self.out / "skipped.tsv", rows)
        if len(self.skipped) > MAX_BAD * self.count:
            raise DataError(
                f"{len(self.skipped)} of {self.count} images do not decode, more than {MAX_BAD:.0%}; {self.root}; "
                f"see {self.out / 'skipped.tsv'}"
            )

    def follow(
        self,
        done: Iterable[Step],
        name: str,
        *,
        start: int,
        steps: int,
        log_every: int,
        evaluations: int,
        evaluate: Callable[[], dict[str, float]],
        saves: int,
        model: nn.Module,
        optimizer: Optimizer,
        gauge: Callable[[float], dict[str, float]] = lambda seconds: {},
    ) -> Iterator[Step]:
        """Follow a run step by step: show a bar, log, evaluate and save on the way, stop for a signal, pass steps on.

        Args:
            done: The steps.
            name: What the bar says.
            start: Steps done before.
            steps: Steps of the whole run.
            log_every: Steps between two lines of metrics.jsonl.
            evaluations: How many, beside those before and after the run.
            evaluate: Measures what an evaluation writes down.
            saves: How many checkpoints; the last step has one in any case.
            model: What a checkpoint holds.
            optimizer: What a checkpoint holds.
            gauge: Adds to a line what it has seen in the seconds since the last one.

        Raises:
            DataError: If too many files do not decode.
            NonFiniteError: If loss, gradient or weights are no numbers.
            SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
        """
        evaluate_at, save_at = spaced(steps, evaluations + 1) - {steps}, spaced(steps, saves) | {steps}
        bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=None, dynamic_ncols=True)
        with bar, stop_signals() as stop:
            for step in done:
                yield step
                self.skip(step.skipped)
                if step.number % log_every == 0 or step.number in evaluate_at | {steps}:
                    line = self.log(step, gauge)
                    losses = {key.removeprefix("loss_"): f"{line[key]:.4f}" for key in step.losses}
                    bar.set_postfix({**losses, "images/s": f"{line['images_per_second']:.0f}"}, refresh=False)
                if step.number in evaluate_at:
                    began = time.perf_counter()
                    self.evaluate(step.number, evaluate)
                    taken = self.summary.get("monitor_seconds", 0.0) + time.perf_counter() - began
                    self.summary["monitor_seconds"] = round(taken, 1)
                    self.logged = (step.number, time.perf_counter())
                if step.number in save_at or stop:
                    self.save(step, model=model, optimizer=optimizer)
                bar.update()
                if stop and step.number < steps:
                    print(f"stopped at step {step.number}; {self.out}; go on with --resume", file=sys.stderr)
                    raise SystemExit(143)

    def save(self, step: Step, *, model: nn.Module, optimizer: Optimizer) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteError: If a weight is no number; then none is written.
        """
        if not checkpoint.is_finite(model):
            raise NonFiniteError(f"weights are no numbers at step {step.number}; {self.out}; lower --optim.blr")
        state = {
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "summary": self.summary,
        }
        checkpoint.save(self.checkpoints, step=step.number, model=model, optimizer=optimizer, state=state)
        if not sys.stderr.isatty():
            print(f"step {step.number}: loss {float(step.losses['loss']):.4f}, saved", file=sys.stderr, flush=True)


def spaced(steps: int, parts: int) -> set[int]:
    """Cut a run into equal parts and return the steps where they end."""
    return {round(steps * part / parts) for part in range(1, parts + 1)} - {0}


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
