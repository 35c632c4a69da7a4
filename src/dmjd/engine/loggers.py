"""Loggers that show the numbers of a run, in addition to metrics.jsonl, chosen by `--log_to`.

None of them is required. A run has a unique name there, under which it continues when resumed; its project is `dmjd`,
unless an environment variable names another (WANDB_PROJECT, TRACKIO_PROJECT, MLFLOW_EXPERIMENT_NAME).
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import UInt8
from numpy import ndarray

from dmjd.errors import ConfigError, one_line

PROJECT = "dmjd"
Pictures = Mapping[str, UInt8[ndarray, "h w c"]]  # by name


@runtime_checkable
class Logger(Protocol):
    """Shows the numbers of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step, by name."""

    def show(self, pictures: Pictures, step: int) -> None:
        """Log pictures of a step."""

    def finish(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Writes to the folder `tensorboard` of a run, from step `first` on."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any], first: int):
        from torch.utils.tensorboard import SummaryWriter

        # Hides what a killed process wrote for steps after its last checkpoint.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, pictures: Pictures, step: int) -> None:
        """Take pictures of a step."""
        for name, picture in pictures.items():
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def finish(self) -> None:
        """Write what is left."""
        self.writer.close()


class Tracker:
    """Logs to wandb, or to trackio, which has wandb's interface."""

    def __init__(self, library: str, name: str, out: Path, settings: Mapping[str, Any], first: int):
        self.library = import_module(library)
        # wandb identifies a run by its id, trackio by its name.
        own = {"id": name, "dir": str(out)} if library == "wandb" else {}
        project = os.environ.get(f"{library.upper()}_PROJECT", PROJECT)
        self.run = self.library.init(project=project, name=name, config=dict(settings), resume="allow", **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step, by name; wandb ignores those of steps that it already has."""
        self.run.log(dict(values), step=step)

    def show(self, pictures: Pictures, step: int) -> None:
        """Take pictures of a step."""
        self.run.log({name: self.library.Image(picture) for name, picture in pictures.items()}, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self.run.finish()


class MLflow:
    """Logs to MLflow, on the server or in the folder of MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any], first: int):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project)
        runs = self.client.search_runs([experiment], f"attributes.run_name = '{name}'")
        if runs:
            self.id = runs[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(experiment, run_name=name).info.run_id
        for key, value in settings.items():
            self.client.log_param(self.id, key, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, by name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in values.items()])

    def show(self, pictures: Pictures, step: int) -> None:
        """Take pictures of a step."""
        for name, picture in pictures.items():
            self.client.log_image(self.id, picture, f"{name}.png")

    def finish(self) -> None:
        """Mark the run as ended."""
        self.client.set_terminated(self.id)


LOGGERS: dict[str, Callable[[str, Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Tracker, "wandb"),
    "trackio": partial(Tracker, "trackio"),
    "mlflow": MLflow,
}


def require(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed.

    Raises:
        ConfigError: If one is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed; --log_to {name}; pip install {name}")


def new_name(out: Path) -> str:
    """Make a unique name for a run, from that of its directory."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.resolve().name)[:80]}-{secrets.token_hex(4)}"


def open_loggers(
    names: Sequence[str], name: str, out: Path, settings: Mapping[str, Any], *, first: int
) -> dict[str, Logger]:
    """Open the loggers of a run.

    Args:
        names: Names of loggers, from `LOGGERS`.
        name: Name of the run in them.
        out: Directory of the run.
        settings: Settings by their flags.
        first: First step to be logged.

    Raises:
        ConfigError: If one does not start, since nobody is logged in or a server does not answer.
    """
    opened: dict[str, Logger] = {}
    for each in names:
        try:
            opened[each] = LOGGERS[each](name, out, settings, first)
        except Exception as error:  # each library raises errors of its own
            raise ConfigError(f"{each} does not start ({one_line(error)}); --log_to {each}; see its manual") from error
    return opened
