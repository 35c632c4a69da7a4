"""The programs that `--log_to` names show what metrics.jsonl says, also of a run that goes on."""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import dmjd
from dmjd.cli import main
from dmjd.config.common import LogTo
from dmjd.engine.loggers import LOGGERS, new_name, open_loggers
from dmjd.errors import ConfigError

TINY: dict[str, Any] = {
    "preset": "quick",
    "steps": 3,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "model": {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "masking__block": 1,
    "monitor__evals": 0,
    "monitor__log_every": 1,
}
TRAINING: dict[str, Any] = {"steps": 3, "batch_size": 4, "workers": 0, "device": "cpu", "log__log_every": 1}
PICTURE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
SETTINGS = {"seed": 3, "optim.blr": 0.1, "log_to": ["wandb"]}


def losses(run: dmjd.TrainingOutcome) -> list[tuple[int, float]]:
    return [(line["step"], pytest.approx(line["loss"])) for line in run.metrics if "loss" in line]


def read_tensorboard(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It warns of events of steps that come again, which is what is looked at.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_log_to__knows_what_the_setting_names() -> None:
    assert LOGGERS.keys() == {*get_args(LogTo)}


@pytest.mark.long
def test_log_to__tensorboard_has_the_numbers_of_all_steps_once_and_the_pictures(colours: Path, tmp_path: Path) -> None:
    dmjd.pretrain(colours, tmp_path / "run", **TINY, log_to=["tensorboard"])
    run = dmjd.pretrain(colours, tmp_path / "run", **{**TINY, "steps": 5}, resume=True)
    board = read_tensorboard(run.out)
    assert [(event.step, event.value) for event in board.Scalars("loss")] == losses(run)
    (final,) = {line["knn_top1"] for line in run.metrics if line["step"] == 5 and "knn_top1" in line}
    assert board.Scalars("knn_top1")[-1].value == pytest.approx(final)
    names = board.Tags()["images"]
    assert len(names) == 8
    shown = board.Images(names[0])[-1]
    assert (shown.step, shown.height) == (5, 32)
    assert shown.width > 4 * 32, "image, target, and for each view what was seen and predicted"


def test_log_to__what_was_written_after_the_last_checkpoint_is_not_shown_twice(tmp_path: Path) -> None:
    first = open_loggers(["tensorboard"], "run", tmp_path, {}, first=0)["tensorboard"]
    for step in (1, 2, 3, 4):
        first.log({"loss": 10.0 + step}, step)
    first.finish()
    second = open_loggers(["tensorboard"], "run", tmp_path, {}, first=3)["tensorboard"]
    second.log({"loss": 3.0}, 3)
    second.finish()
    assert [(event.step, event.value) for event in read_tensorboard(tmp_path).Scalars("loss")] == [
        (1, 11.0),
        (2, 12.0),
        (3, 3.0),
    ]


def test_log_to__a_supervised_run_is_logged_too(colours: Path, backbones: Mapping[str, Path], tmp_path: Path) -> None:
    run = dmjd.finetune(backbones["vit"], colours, tmp_path, **TRAINING, log_to=["tensorboard"])
    board = read_tensorboard(run.out)
    assert [(event.step, event.value) for event in board.Scalars("loss")] == losses(run)
    assert board.Scalars("top1")[-1].value == pytest.approx(run.numbers["top1"])


@pytest.mark.parametrize("name", LOGGERS)
def test_log_to__a_program_that_is_missing_is_one_line_before_anything_is_written(
    name: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to make an import fail
    words = ["--preset", "quick", "--device", "cpu", "--workers", "0", "--log_to", name]
    assert main(["pretrain", "--data", str(colours), "--out", str(tmp_path / "run"), *words]) == 2
    (line,) = (each for each in capsys.readouterr().err.splitlines() if each.startswith("error"))
    assert line == f"error: {name} is not installed; --log_to {name}; pip install {name}"
    assert not (tmp_path / "run").exists()


class Full:
    """A logger whose disk is full after the second step."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any], first: int):
        self.steps: list[int] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step > 1:
            raise OSError("no space left")

    def show(self, pictures: Any, step: int) -> None:
        raise AssertionError("it was left out before")

    def finish(self) -> None:
        raise AssertionError("it was left out before")


def test_log_to__a_program_that_fails_does_not_end_a_run(
    colours: Path,
    backbones: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(LOGGERS, "tensorboard", Full)
    run = dmjd.finetune(backbones["vit"], colours, tmp_path, **TRAINING, log_to=["tensorboard"])
    assert [step for step, _ in losses(run)] == [1, 2, 3]
    said = capsys.readouterr().err
    assert said.count("no longer logged to tensorboard (no space left)") == 1


def test_log_to__a_program_that_does_not_start_is_a_mistake_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    with pytest.raises(ConfigError, match=r"tensorboard does not start .*; --log_to tensorboard"):
        open_loggers(["tensorboard"], "run", tmp_path, {}, first=0)


def test_new_name__is_one_of_its_own_that_every_program_takes(tmp_path: Path) -> None:
    names = {new_name(tmp_path / "a run / of:mine#1") for _ in range(3)}
    assert len(names) == 3
    assert all(name.isascii() and not set(name) & set("/\\#?%: ") for name in names)


# -- programs that are not among the packages of the tests -------------------------------------------------------------


def log_twice(name: str, out: Path) -> None:
    """Log two steps, end, and go on with the next one."""
    for first, steps in ((0, (1, 2)), (3, (3,))):
        logger = open_loggers([name], "run-1", out, SETTINGS, first=first)[name]
        for step in steps:
            logger.log({"loss": 10.0 - step}, step)
        logger.show({"predictions/1": PICTURE}, steps[-1])
        logger.finish()


def test_mlflow__goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_twice("mlflow", tmp_path)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dmjd").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-1", "FINISHED")
    assert run.data.params["optim.blr"] == "0.1"
    found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert found == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "predictions")] == ["predictions/1.png"]


def test_wandb__goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_twice("wandb", tmp_path)
    kept = sorted((tmp_path / "wandb").glob("offline-run-*-run-1/run-run-1.wandb"))  # offline, a file for each part
    assert len(kept) == 2
    found = [re.findall(rb"loss\x82\x01.([0-9.]+)", file.read_bytes(), flags=re.DOTALL) for file in kept]
    assert [{float(value) for value in values} for values in found] == [{9.0, 8.0}, {7.0}]
    for step, file in zip((2, 3), kept, strict=True):
        assert [*(file.parent / "files" / "media" / "images" / "predictions").glob(f"1_{step}_*.png")]


def test_trackio__goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    log_twice("trackio", tmp_path)
    (run,) = trackio.Api().runs("dmjd")
    assert run.name == "run-1"
    assert run.config["optim.blr"] == 0.1
