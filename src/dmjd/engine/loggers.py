"""Where the numbers of a run go beside metrics.jsonl: programs that show them, which `--log_to` names.

None of them is required. A run has a name of its own there, under which a resumed one goes on; `dmjd` is its project,
unless the environment says otherwise (WANDB_PROJECT, TRACKIO_PROJECT, MLFLOW_EXPERIMENT_NAME).
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
Pictures = Mapping[str, UInt8[ndarray, "h w c"]]  # by their names


@runtime_checkable
class Logger(Protocol):
    """What shows the numbers of a run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, by name."""

    def show(self, pictures: Pictures, step: int) -> None:
        """Take pictures of a step."""

    def finish(self) -> None:
        """Send or write what is left."""


class TensorBoard:
    """Writes to the folder `tensorboard` of a run; `first` is the first step that will be written."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any], first: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote of later steps than its last checkpoint is not shown.
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
    """Hands numbers to wandb, or to trackio, which has wandb's interface."""

    def __init__(self, library: str, name: str, out: Path, settings: Mapping[str, Any], first: int):
        self.library = import_module(library)
        # To wandb a run is its id, to trackio its name.
        own = {"id": name, "dir": str(out)} if library == "wandb" else {}
        project = os.environ.get(f"{library.upper()}_PROJECT", PROJECT)
        self.run = self.library.init(project=project, name=name, config=dict(settings), resume="allow", **own)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, by name; wandb leaves out those of steps that it has."""
        self.run.log(dict(values), step=step)

    def show(self, pictures: Pictures, step: int) -> None:
        """Take pictures of a step."""
        self.run.log({name: self.library.Image(picture) for name, picture in pictures.items()}, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self.run.finish()


class MLflow:
    """Hands numbers to MLflow, to the server or the folder that MLFLOW_TRACKING_URI names."""

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
        """Say that the run has ended."""
        self.client.set_terminated(self.id)


LOGGERS: dict[str, Callable[[str, Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": partial(Tracker, "wandb"),
    "trackio": partial(Tracker, "trackio"),
    "mlflow": MLflow,
}


def require(names: Sequence[str]) -> None:
    """Refuse to log to what is not installed.

    Raises:
        ConfigError: If something is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed; --log_to {name}; pip install {name}")


def new_name(out: Path) -> str:
    """Name a run after its directory, and unlike any other run."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.resolve().name)[:80]}-{secrets.token_hex(4)}"


def open_loggers(
    names: Sequence[str], name: str, out: Path, settings: Mapping[str, Any], *, first: int
) -> dict[str, Logger]:
    """Open what a run logs to.

    Args:
        names: Which of `LOGGERS`.
        name: Of the run, there.
        out: Its directory.
        settings: By their flags.
        first: Step from which numbers come.

    Raises:
        ConfigError: If one does not start: nobody is logged in, a server does not answer.
    """
    opened: dict[str, Logger] = {}
    for each in names:
        try:
            opened[each] = LOGGERS[each](name, out, settings, first)
        except Exception as error:  # of libraries with errors of their own
            raise ConfigError(f"{each} does not start ({one_line(error)}); --log_to {each}; see its manual") from error
    return opened
